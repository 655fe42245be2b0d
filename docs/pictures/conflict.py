"""Draws conflict.svg: two task gradients in conflict, their sum, and what PCGrad makes of them.

python docs/pictures/conflict.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot

FIRST, SECOND = np.array([3.0, 0.3]), np.array([-1.0, 1.1])
# grey, blue, orange and green that stand out on white and on black
GREY, BLUE, ORANGE, GREEN = "#808890", "#3d8bd9", "#e07b29", "#2f9e5f"


def projected(gradient: np.ndarray, other: np.ndarray) -> np.ndarray:
    """PCGrad's step: without its part against the other, if it has one."""
    return gradient - min(gradient @ other, 0.0) / (other @ other) * other


def arrow(axes, tip: np.ndarray, colour: str, text: str, at: tuple[float, float], **style) -> None:
    axes.annotate("", xy=tip, xytext=(0, 0), arrowprops={"arrowstyle": "-|>", "color": colour, "lw": 2.2} | style)
    axes.text(*at, text, color=colour, fontsize=12, ha="center", va="center")


def panel(axes, title: str) -> None:
    axes.set_title(title, color=GREY, fontsize=12)
    axes.set_xlim(-1.9, 3.5)
    axes.set_ylim(-0.55, 3.2)
    axes.set_aspect("equal")
    axes.axis("off")


def main() -> None:
    # the same file from every run
    matplotlib.rcParams["svg.hashsalt"] = "conflict"
    first, second = projected(FIRST, SECOND), projected(SECOND, FIRST)
    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(8.2, 3.6))
    panel(left, "two task gradients\nconflict: their angle\nis above 90°")
    panel(middle, "the sum follows the\nlonger one: it is a step\nback for task 2")
    panel(right, "PCGrad takes out what is\nagainst the other: a step\nforward for both")
    for axes, style in ((left, {}), (middle, {"alpha": 0.45}), (right, {"alpha": 0.3})):
        arrow(axes, FIRST, BLUE, "task 1", (FIRST[0] - 0.3, FIRST[1] - 0.45), **style)
        arrow(axes, SECOND, ORANGE, "task 2", (SECOND[0] - 0.1, SECOND[1] + 0.3), **style)
    total = FIRST + SECOND
    arrow(middle, total, GREEN, "sum", (total[0] + 0.4, total[1] + 0.2))
    for gradient, result, colour in ((FIRST, first, BLUE), (SECOND, second, ORANGE)):
        right.plot(*zip(gradient, result, strict=True), color=colour, linestyle=":", linewidth=1.5)
        arrow(right, result, colour, "", (0, 0))
    total = first + second
    arrow(right, total, GREEN, "update", (total[0] + 0.6, total[1] + 0.15))
    figure.tight_layout()
    path = Path(__file__).with_suffix(".svg")
    figure.savefig(path, transparent=True, bbox_inches="tight", pad_inches=0.05, metadata={"Date": None})
    path.write_text("\n".join(line.rstrip() for line in path.read_text().splitlines()) + "\n")


if __name__ == "__main__":
    main()
