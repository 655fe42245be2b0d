"""Which layers each task has changed, and what that costs."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from fastmtl.nn.models.merge import task_names
from fastmtl.nn.module import task_layers
from fastmtl.parameters import is_per_task


class LayerReport(NamedTuple):
    """What `layer_report` has found. `str` of it is a table.

    Attributes:
        tasks: the names of the tasks.
        layers: the paths of the layers with parts of tasks, from the bottom to the top.
        changed: for each task, whether it computes something else than the plain layer, layer by layer.
        added: for each task, how many numbers its part has, layer by layer; 0 where it is not needed.
        base: how many numbers the plain network has.
    """

    tasks: tuple[str, ...]
    layers: tuple[str, ...]
    changed: dict[str, tuple[bool, ...]]
    added: dict[str, tuple[int, ...]]
    base: int

    @property
    def size(self) -> float:
        """All that must be kept, for the network and all tasks, as a multiple of the plain network."""
        return (self.base + sum(map(sum, self.added.values()))) / self.base if self.base else float("nan")

    def to_dict(self) -> dict[str, Any]:
        """The report in plain lists, dictionaries and numbers, as JSON takes them."""
        return {
            "base_parameters": self.base,
            "size": self.size,
            "layers": list(self.layers),
            "tasks": {
                name: {
                    "changed": [
                        path for path, is_changed in zip(self.layers, self.changed[name], strict=True) if is_changed
                    ],
                    "changed_layers": sum(self.changed[name]),
                    "added_parameters": sum(self.added[name]),
                    "size": (self.base + sum(self.added[name])) / self.base if self.base else float("nan"),
                }
                for name in self.tasks
            },
        }

    def __str__(self) -> str:
        rows = [("task", "layers changed", "parameters added", "size")]
        for name, row in self.to_dict()["tasks"].items():
            of = f"{row['changed_layers']} of {len(self.layers)}"
            rows.append((name, of, f"{row['added_parameters']:,}", f"{row['size']:.3f}x"))
        added = sum(map(sum, self.added.values()))
        rows.append(("all", "", f"{added:,}", f"{self.size:.3f}x"))
        widths = [max(len(row[k]) for row in rows) for k in range(4)]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
            for row in rows
        ]
        return "\n".join(line.rstrip() for line in lines) + f"\nplain network: {self.base:,} parameters"


def layer_report(model: nn.Module) -> LayerReport:
    """Which layers each task has changed, how many parameters it adds, and the size of all as a multiple of the base.

    A layer is changed if it computes something else for the task than the plain layer: its gate is open and its
    delta is not zero, its norm's scale, shift or statistics are others, its weights are separate. Parts that change
    nothing count as no parameters, since they need not be kept. Waits for the device.

    Args:
        model: with layers of `fastmtl.nn`.

    Returns:
        A `LayerReport`, which prints as a table.

    Raises:
        TypeError, ValueError: no layers with parts of tasks.

    Source: Wallingford et al. 2022 (TAPS), table 1: tasks are compared by the share of parameters that they add.

    Example:
        >>> report = layer_report(convert(torch.nn.Linear(4, 2), ["left", "right"]))
        >>> report.to_dict()["tasks"]["left"]["changed"]
        []
    """
    names = task_names(model)
    layers = list(task_layers(model))
    changed = {name: tuple(layer.changed(name) for _, layer in layers) for name in names}
    # layers with tied weights have parts in common, which count where they are first
    added = {}
    for name in names:
        seen: set[int] = set()
        added[name] = tuple(_not_seen(layer.kept(name), seen) for _, layer in layers)
    base, seen = sum(p.numel() for p in model.parameters() if not is_per_task(p)), set()
    for _, layer in layers:
        part = layer.part(names[0])
        twice = sum(x.numel() for x in part.values()) - _not_seen(part, seen)
        base += max(0, layer.plain_size() - twice)
    return LayerReport(names, tuple(path for path, _ in layers), changed, added, base)


def _not_seen(part: Mapping[str, Tensor], seen: set[int]) -> int:
    """How many numbers a part has in tensors that are not in `seen`, which then has them."""
    new = [x for x in part.values() if id(x) not in seen]
    seen.update(map(id, new))
    return sum(x.numel() for x in new)


def heatmap(report: LayerReport, path: str | os.PathLike[str] | None = None) -> Any:
    """The picture of a report: one row per task, one column per layer, dark where the task has changed it.

    Args:
        report: of `layer_report`.
        path: where to save it (PNG, PDF or SVG by its ending); None: nowhere.

    Returns:
        The figure, of `matplotlib`.

    Raises:
        ImportError: `matplotlib` is not installed.
        TypeError: no report.

    Source: Wallingford et al. 2022 (TAPS), figure 4.

    Example:
        >>> figure = heatmap(layer_report(convert(torch.nn.Linear(4, 2), ["left", "right"])))
    """
    if not isinstance(report, LayerReport):
        raise TypeError(f"report: expected what layer_report returns, got {type(report).__name__}")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure()
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.imshow(
        [list(map(float, report.changed[name])) for name in report.tasks], cmap="Blues", vmin=0, vmax=1.2, aspect="auto"
    )
    # in inches: a column is as wide as its name is high, but where there are hundreds
    column = max(0.05, min(0.22, 16 / len(report.layers)))
    step = math.ceil(0.11 / column)
    axes.set_yticks(range(len(report.tasks)), report.tasks, fontsize=9)
    axes.set_xticks(range(0, len(report.layers), step), report.layers[::step], rotation=90, fontsize=6)
    axes.set_xticks([k - 0.5 for k in range(1, len(report.layers))], minor=True)
    axes.set_yticks([k - 0.5 for k in range(1, len(report.tasks))], minor=True)
    axes.grid(which="minor", color="white", linewidth=1)
    axes.tick_params(which="minor", length=0)
    axes.set_xlabel("layer, from the bottom to the top", fontsize=9)
    title = axes.set_title(
        f"layers that each task has changed; {report.size:.2f}x the size of one network", fontsize=9, loc="left"
    )
    # names are as long as they are: the figure grows with them, and not the cells
    renderer = canvas.get_renderer()
    left = 0.25 + max(t.get_window_extent(renderer).width for t in axes.get_yticklabels()) / figure.dpi
    below = 0.45 + max(t.get_window_extent(renderer).height for t in axes.get_xticklabels()) / figure.dpi
    across = max(column * len(report.layers), title.get_window_extent(renderer).width / figure.dpi)
    down = max(0.25 * len(report.tasks), 0.5)
    width, height = left + across + 0.15, below + down + 0.35
    figure.set_size_inches(width, height)
    axes.set_position((left / width, below / height, across / width, down / height))
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure
