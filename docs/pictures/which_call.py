"""Draws which_call.svg: four questions, and the call that each answer leads to.

python docs/pictures/which_call.py
"""

from __future__ import annotations

from pathlib import Path

# boxes have a paper of their own, so that they read the same on a white and on a black page
QUESTION, ANSWER = ("#e9f1fb", "#3d8bd9"), ("#e7f4ec", "#2f9e5f")
INK, GREY = "#1c2733", "#808890"
LEFT, RIGHT, TOP = (4, 226), (292, 344), 4  # (x, width) of the two columns
HEIGHT, STEP = 76, 112

STEPS = (
    (
        ("Shall a task have", "weights of its own?"),
        "yes",
        ("fastmtl.nn.convert(model, names, kind)", "with fastmtl.nn.tasks(task_ids):"),
        "train by loss.backward(), or read on",
    ),
    (
        ("Do task gradients conflict,", "and does it do harm?"),
        "no",
        ("sum(losses).backward()",),
        "nothing of fastmtl: the sum is the cheapest",
    ),
    (
        ("Are there several losses", "of the same samples?"),
        "yes",
        ("fastmtl.backward(losses)",),
        "T backward passes; fewer: features=, Every",
    ),
    (
        ("Every sample has one task.", "One forward pass for all?"),
        "yes",
        ("with fastmtl.one_pass(model, task_ids, T):",),
        "one forward and one backward pass",
    ),
)
LAST = (("bank = fastmtl.GradientBank(model, names)",), "a forward and a backward pass for each task")
WORDS = ("no, or as well", "yes", "no", "no")
SANS = 'font-family="Roboto, Helvetica, Arial, sans-serif"'
MONO = 'font-family="Roboto Mono, Menlo, Consolas, monospace"'


def box(column: tuple[int, int], y: int, colours: tuple[str, str]) -> str:
    (x, width), (fill, edge) = column, colours
    return (
        f'<rect x="{x}" y="{y}" width="{width}" height="{HEIGHT}" rx="9" fill="{fill}" stroke="{edge}" '
        'stroke-width="1.5"/>'
    )


def text(x: float, y: float, words: str, font: str, size: float, colour: str, anchor: str = "middle") -> str:
    return f'<text x="{x}" y="{y}" {font} font-size="{size}" fill="{colour}" text-anchor="{anchor}">{words}</text>'


def answer(y: int, code: tuple[str, ...], note: str) -> list[str]:
    middle = RIGHT[0] + RIGHT[1] / 2
    lines = [(c, MONO, 12.8, INK) for c in code] + [(note, SANS, 13.5, "#4a5663")]
    first = y + HEIGHT / 2 - 10 * (len(lines) - 1) + 5
    return [
        box(RIGHT, y, ANSWER),
        *(text(middle, first + 20 * k, w, font, size, colour) for k, (w, font, size, colour) in enumerate(lines)),
    ]


def arrow(x0: float, y0: float, x1: float, y1: float) -> str:
    return f'<line x1="{x0}" y1="{y0}" x2="{x1}" y2="{y1}" stroke="{GREY}" stroke-width="2" marker-end="url(#tip)"/>'


def picture() -> str:
    middle, across = LEFT[0] + LEFT[1] / 2, LEFT[0] + LEFT[1]
    parts = []
    for k, (question, word, code, note) in enumerate(STEPS):
        y = TOP + k * STEP
        parts += [box(LEFT, y, QUESTION)]
        parts += [text(middle, y + 33 + 21 * i, line, SANS, 16, INK) for i, line in enumerate(question)]
        parts += [arrow(across, y + HEIGHT / 2, RIGHT[0] - 4, y + HEIGHT / 2)]
        parts += [text((across + RIGHT[0]) / 2 - 3, y + HEIGHT / 2 - 8, word, SANS, 15, GREY)]
        parts += answer(y, code, note)
        if k < len(STEPS) - 1:
            parts += [arrow(middle, y + HEIGHT, middle, y + STEP - 4)]
        parts += [text(middle + 12, y + HEIGHT + 26, WORDS[k], SANS, 15, GREY, "start")]
    y = TOP + len(STEPS) * STEP
    level = y + HEIGHT / 2
    parts += [
        f'<line x1="{middle}" y1="{y - STEP + HEIGHT}" x2="{middle}" y2="{level}" stroke="{GREY}" stroke-width="2"/>',
        arrow(middle - 1, level, RIGHT[0] - 4, level),
        *answer(y, *LAST),
    ]
    width, height = RIGHT[0] + RIGHT[1] + 4, y + HEIGHT + 4
    tip = (
        '<defs><marker id="tip" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" '
        f'orient="auto"><path d="M0 0 L10 5 L0 10 z" fill="{GREY}"/></marker></defs>'
    )
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'role="img">'
    )
    return "\n".join([head, "<title>Which call suits your loop</title>", tip, *parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    Path(__file__).with_suffix(".svg").write_text(picture())
