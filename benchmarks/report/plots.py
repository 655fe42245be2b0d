"""Plots of the results, as PNG files."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

from fastmtl.benchmarks.runner.registry import TAPS_MEMORY, TASK_STEP, WHOLE_CALL

LABELS = {
    "ours": "fastmtl",
    "sum": "sum(losses)",
    "naive": "naive PCGrad",
    "plain": "plain torch",
    "torchjd": "TorchJD",
    "torchjd_autogram": "TorchJD autogram",
    "libmtl": "LibMTL",
}
# the plots of suite `methods`; ours last, on top
METHOD_STYLES: dict[str, dict[str, Any]] = {
    "plain": {"color": "0.6", "marker": "s", "linestyle": "--"},
    "libmtl": {"color": "C3", "marker": "^"},
    "torchjd": {"color": "C2", "marker": "D"},
    "ours": {"color": "C1", "marker": "o", "linewidth": 2.5},
}
# the plot of steps with one task per sample: label -> in words, style; drawn in this order, the line to beat first
TASKS = "tasks"
TASK_STYLES: dict[str, tuple[str, dict[str, Any]]] = {
    "per_task": ("a forward and backward per task", {"color": "black", "marker": "s"}),
    "per_task_bank": ("the same, fastmtl.GradientBank", {"color": "0.55", "marker": "s", "linestyle": "--"}),
    "t_backwards": ("T backwards", {"color": "C3", "marker": "^"}),
    "backward": ("fastmtl.backward", {"color": "C0", "marker": "v"}),
    "torchjd": ("TorchJD, PCGrad", {"color": "C2", "marker": "D"}),
    "torchjd_upgrad": ("TorchJD, UPGrad", {"color": "C2", "marker": "d", "linestyle": "--"}),
    "torchjd_autogram": ("TorchJD autogram", {"color": "C4", "marker": "x"}),
    "streamed": ("fastmtl.one_pass, streamed", {"color": "C1", "marker": "o", "linestyle": "--"}),
    "ours": ("fastmtl.one_pass", {"color": "C1", "marker": "o", "linewidth": 2.5}),
}
# the plot of converted networks, drawn in this order
MODEL_STYLES: dict[str, tuple[str, dict[str, Any]]] = {
    "loop": ("the converted network, a loop over tasks", {"color": "C3", "marker": "^"}),
    "separate": ("T plain networks", {"color": "black", "marker": "s"}),
    "adapter": ("shared layers and a loop over adapters", {"color": "C2", "marker": "D"}),
    "ours": ("the converted network, a mixed batch", {"color": "C1", "marker": "o", "linewidth": 2.5}),
}
MARKERS = {100_000: "v", 1_000_000: "o", 11_000_000: "s", 25_000_000: "D"}


def relative(path: Path, root: Path) -> str:
    return Path(os.path.relpath(path, root)).as_posix()


def is_tasks(name: str) -> bool:
    """Whether a file is the plot of steps with one task per sample."""
    return name.endswith(f"-{TASKS}.png")


def _figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Any, Any]:
    """A figure, and the grid of its axes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(rows, columns, figsize=(width, height), dpi=120, squeeze=False)
    for axes in grid.flat:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, grid


def _axes(width: float = 9.0) -> tuple[Any, Any]:
    figure, grid = _figure(width, 4.2)
    return figure, grid[0, 0]


def _save(figure: Any, path: Path) -> Path:
    from matplotlib import pyplot

    figure.tight_layout()
    # a legend may stand outside the axes
    figure.savefig(path, metadata={"Software": None}, bbox_inches="tight" if figure.legends else None)
    pyplot.close(figure)
    return path


def _lines(results: dict[str, Any]) -> dict[tuple[int, str], list[dict[str, Any]]]:
    """Rows of `pcgrad` on a bank, by P and dtype, in order of T."""
    found: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for row in results["rows"]:
        p = row["params"]
        if row["op"] == "pcgrad" and p.get("layout") == "bank" and row["status"] == "ok":
            found.setdefault((p["P"], p["dtype"]), []).append(row)
    return {key: sorted(rows, key=lambda row: row["params"]["T"]) for key, rows in sorted(found.items())}


def _tasks_axis(axes: Any, lines: dict[Any, list[dict[str, Any]]]) -> None:
    ticks = sorted({row["params"]["T"] for rows in lines.values() for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(t) for t in ticks])
    axes.set_xlabel("tasks T")


def _floor(results: dict[str, Any], path: Path) -> Path | None:
    lines = _lines(results)
    if not lines:
        return None
    figure, axes = _axes()
    for (size, dtype), rows in lines.items():
        axes.plot(
            [row["params"]["T"] for row in rows],
            [row["time_over"]["two_reads"] for row in rows],
            marker=MARKERS.get(size, "x"),
            linestyle="-" if dtype == "float32" else "--",
            label=f"P = {size / 1e6:g}M, {dtype}",
        )
    axes.axhline(1.0, color="0.5", linewidth=0.8)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("time / two reads of G at copy speed")
    axes.set_title(f"pcgrad on {results['machine']['device']}", fontsize=10)
    _tasks_axis(axes, lines)
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return _save(figure, path)


def _speedup(results: dict[str, Any], path: Path) -> Path | None:
    lines = {key: rows for key, rows in _lines(results).items() if key[1] == "float32"}
    if not lines:
        return None
    figure, axes = _axes()
    colours = {"naive": "C3", "plain": "C0", "torchjd": "C2"}
    for (size, _), rows in lines.items():
        for family, colour in colours.items():
            points = [(r["params"]["T"], r["speedup_over_best"].get(family)) for r in rows]
            points = [(t, ratio) for t, ratio in points if ratio is not None]
            if points:
                label = f"{LABELS[family]}, P = {size / 1e6:g}M"
                axes.plot(*zip(*points, strict=True), marker=MARKERS.get(size, "x"), color=colour, label=label)
    axes.axhline(1.0, color="0.5", linewidth=0.8)
    axes.set_yscale("log")
    axes.set_ylabel("how many times faster fastmtl is")
    axes.set_title(f"pcgrad, float32, on {results['machine']['device']}", fontsize=10)
    _tasks_axis(axes, lines)
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return _save(figure, path)


def _step(results: dict[str, Any], path: Path) -> Path | None:
    rows = [row for row in results["rows"] if row["op"] == "training step" and row["status"] == "ok"]
    if not rows:
        return None
    row = rows[0]
    bars = {label: entry for label, entry in row["times"].items() if "median" in entry}
    figure, axes = _axes(7.5)
    heights = [1e3 * entry["median"] for entry in bars.values()]
    spread = [
        [1e3 * (entry["median"] - entry["p20"]) for entry in bars.values()],
        [1e3 * (entry["p80"] - entry["median"]) for entry in bars.values()],
    ]
    colours = ["C1" if label == "ours" else "0.7" for label in bars]
    axes.bar([LABELS.get(label, label) for label in bars], heights, yerr=spread, color=colours, capsize=3)
    axes.set_ylabel("ms per training step")
    axes.tick_params(axis="x", labelsize=8)
    axes.set_title(f"{row['params']['T']} tasks on overlaid digits, {results['machine']['device']}", fontsize=10)
    return _save(figure, path)


def _conv(results: dict[str, Any], path: Path) -> Path | None:
    """Forward and backward over the floor, by layer: T = 8 and 32, sorted and unsorted."""
    main = ("both", "on", "channels_last", "list", False)
    keys = ("direction", "gates", "layout", "delta", "gates_trained")
    found: dict[tuple[int, bool], dict[str, float]] = {}
    rows = [
        row
        for row in results["rows"]
        if row["suite"] == "conv" and row["status"] == "ok" and "floor" in row.get("time_over", {})
    ]
    rows = [row for row in rows if tuple(row["params"].get(key) for key in keys) == main and row["op"] == "task_conv2d"]
    if not rows:
        return None
    # one batch size and dtype: those with the most rows
    setups = Counter((row["params"]["B"], row["params"]["dtype"], row["params"]["weight_dtype"]) for row in rows)
    setup = setups.most_common(1)[0][0]
    for row in rows:
        p = row["params"]
        if (p["B"], p["dtype"], p["weight_dtype"]) == setup and p["T"] in (8, 32):
            found.setdefault((p["T"], p["sorted"]), {})[p["layer"]] = row["time_over"]["floor"]
    if not found:
        return None
    layers = list(dict.fromkeys(layer for ratios in found.values() for layer in ratios))
    figure, axes = _axes(10.0)
    for (tasks, in_order), ratios in sorted(found.items()):
        axes.plot(
            [layers.index(layer) for layer in ratios],
            list(ratios.values()),
            marker="o" if in_order else "s",
            fillstyle="full" if in_order else "none",
            linestyle="none",
            color={8: "C0", 32: "C1"}[tasks],
            label=f"T = {tasks}, {'sorted' if in_order else 'unsorted'}",
        )
    axes.axhline(1.0, color="0.5", linewidth=0.8)
    axes.set_ylim(bottom=0)
    axes.set_xticks(range(len(layers)), [layer.replace(" ", "\n", 2) for layer in layers], fontsize=7)
    axes.set_ylabel("time / (one shared convolution + deltas at copy speed)", fontsize=8)
    title = f"task_conv2d, forward + backward, batch {setup[0]}, {setup[1]}, on {results['machine']['device']}"
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return _save(figure, path)


def _tasks(results: dict[str, Any], path: Path) -> Path | None:
    """Step time against T, over that of a plain step, a panel per network; batches in random order."""
    from matplotlib import ticker

    by_network: dict[str, list[dict[str, Any]]] = {}
    for row in results["rows"]:
        shuffled = row["op"] == TASK_STEP and row["status"] == "ok" and not row["params"]["sorted"]
        if shuffled and "median" in row["times"].get("sum", {}):
            by_network.setdefault(row["params"]["network"], []).append(row)
    if not by_network:
        return None
    # one place more, for the legend
    across = min(3, len(by_network) + 1)
    down = -(-(len(by_network) + 1) // across)
    figure, grid = _figure(3.6 * across, 3.0 * down, down, across)
    panels = list(grid.flat)
    for axes, (network, rows) in zip(panels, by_network.items(), strict=False):
        rows.sort(key=lambda row: row["params"]["T"])
        for label, (words, style) in TASK_STYLES.items():
            points = [
                (row["params"]["T"], row["times"][label]["median"] / row["times"]["sum"]["median"])
                for row in rows
                if "median" in row["times"].get(label, {})
            ]
            if points:
                axes.plot(*zip(*points, strict=True), label=words, markersize=4, **style)
        axes.axhline(1.0, color="0.5", linewidth=0.8)
        axes.set_yscale("log")
        # a panel without T backward passes is not blown up
        axes.set_ylim(bottom=0.9, top=max(3.0, axes.get_ylim()[1]))
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        axes.yaxis.set_minor_locator(ticker.NullLocator())
        axes.set_title(f"{network}, batch {rows[0]['params']['batch']}", fontsize=9)
        axes.tick_params(labelsize=8)
        _tasks_axis(axes, {network: rows})
        axes.xaxis.label.set_size(8)
    # of whichever panel has the most lines
    handles, words = max(
        (axes.get_legend_handles_labels() for axes in panels[: len(by_network)]), key=lambda x: len(x[1])
    )
    for axes in panels[len(by_network) :]:
        axes.axis("off")
    panels[len(by_network)].legend(handles, words, fontsize=8, frameon=False, loc="center")
    figure.supylabel("step time / plain step", fontsize=9)
    figure.suptitle(f"PCGrad, every sample with one task, on {results['machine']['device']}", fontsize=10)
    return _save(figure, path)


def _methods(results: dict[str, Any], path: Path) -> Path | None:
    """Time of the weights against T: a picture for each method, in which plain torch and the peers are beside it."""
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in results["rows"]:
        if row["suite"] == "methods" and row["status"] == "ok" and "P" not in row["params"]:
            lines.setdefault(row["op"], []).append(row)
    if not lines:
        return None
    columns = min(4, len(lines))
    height = -(-len(lines) // columns)
    figure, grid = _figure(2.9 * columns, 2.3 * height + 0.6, height, columns)
    for axes in grid.flat[len(lines) :]:
        axes.set_axis_off()
    for axes, (name, rows) in zip(grid.flat, lines.items(), strict=False):
        rows.sort(key=lambda row: row["params"]["T"])
        for label, style in METHOD_STYLES.items():
            points = [
                (row["params"]["T"], 1e3 * row["times"][label]["median"])
                for row in rows
                if "median" in row["times"].get(label, {})
            ]
            if points:
                axes.plot(*zip(*points, strict=True), label=LABELS[label], markersize=4, **style)
        axes.set_yscale("log")
        axes.set_title(name, fontsize=10)
        _tasks_axis(axes, {name: rows})
        axes.tick_params(labelsize=8)
    drawn = list(grid.flat[: len(lines)])
    bounds = [axes.get_ylim() for axes in drawn]
    for axes in drawn:  # one scale for all
        axes.set_ylim(min(low for low, _ in bounds), max(high for _, high in bounds))
    for axes in grid[:, 0]:
        axes.set_ylabel("milliseconds", fontsize=9)
    _shared_legend(figure, grid)
    figure.suptitle(f"weights of a [T, T] matrix on {results['machine']['device']}", fontsize=10)
    return _save(figure, path)


def _shared_legend(figure: Any, grid: Any) -> None:
    """One legend for all axes, below them."""
    found: dict[str, Any] = {}
    for axes in grid.flat:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    # in the order of the styles, whichever method had a line first
    shown = {LABELS[label]: found[LABELS[label]] for label in METHOD_STYLES if LABELS[label] in found}
    figure.legend(
        shown.values(), shown, ncols=len(shown), fontsize=9, frameon=False, loc="upper center", bbox_to_anchor=(0.5, 0)
    )


def _calls(results: dict[str, Any], path: Path) -> Path | None:
    """Time of the whole `method(grads)`: a picture for each size, a group of bars for each method."""
    sizes: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for row in results["rows"]:
        if row["suite"] == "methods" and row["status"] == "ok" and row["op"].endswith(WHOLE_CALL):
            sizes.setdefault((row["params"]["T"], row["params"]["P"]), []).append(row)
    # a size that one method alone has is no comparison of methods
    sizes = {size: rows for size, rows in sizes.items() if len(rows) > 1} or sizes
    if not sizes:
        return None
    figure, grid = _figure(10.0, 2.6 * len(sizes) + 0.5, len(sizes), 1)
    for axes, ((num_tasks, num_params), rows) in zip(grid.flat, sizes.items(), strict=True):
        for k, (label, style) in enumerate(METHOD_STYLES.items()):
            points = [
                (place + 0.2 * (k - 1.5), 1e3 * row["times"][label]["median"])
                for place, row in enumerate(rows)
                if "median" in row["times"].get(label, {})
            ]
            if points:
                axes.bar(*zip(*points, strict=True), width=0.2, color=style["color"], label=LABELS[label])
        axes.set_yscale("log")
        axes.set_ylabel("milliseconds", fontsize=9)
        axes.set_title(f"T = {num_tasks}, P = {num_params / 1e6:g}M", fontsize=10)
        axes.set_xticks(range(len(rows)), [row["op"].removesuffix(WHOLE_CALL) for row in rows], fontsize=8)
    _shared_legend(figure, grid)
    figure.suptitle(f"method(grads) on {results['machine']['device']}", fontsize=10)
    return _save(figure, path)


def _models(results: dict[str, Any], path: Path) -> Path | None:
    """Time of converted networks against T, over that of the plain network; a panel for each network, kind and mode."""
    panels: dict[tuple[str, str, bool], list[dict[str, Any]]] = {}
    for row in results["rows"]:
        p = row["params"]
        open_gates = row["suite"] == "models" and row["op"] != TAPS_MEMORY and p["gates"] == "open"
        if open_gates and row["status"] == "ok" and "median" in row["times"].get("plain", {}):
            panels.setdefault((p["network"], p["kind"], p["train"]), []).append(row)
    # a single T is no line
    panels = {key: rows for key, rows in panels.items() if len(rows) > 1} or panels
    if not panels:
        return None
    across = min(3, len(panels))
    down = -(-len(panels) // across)
    figure, grid = _figure(3.6 * across, 3.0 * down + 0.8, down, across)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for axes, ((network, kind, train), rows) in zip(grid.flat, panels.items(), strict=False):
        rows.sort(key=lambda row: row["params"]["T"])
        for label, (words, style) in MODEL_STYLES.items():
            points = [
                (row["params"]["T"], row["times"][label]["median"] / row["times"]["plain"]["median"])
                for row in rows
                if "median" in row["times"].get(label, {})
            ]
            if points:
                axes.plot(*zip(*points, strict=True), label=words, markersize=4, **style)
        axes.axhline(1.0, color="0.5", linewidth=0.8)
        axes.set_ylim(bottom=0)
        axes.set_title(f"{network}\n{kind}, {'training step' if train else 'evaluation'}", fontsize=9)
        axes.tick_params(labelsize=8)
        _tasks_axis(axes, {network: rows})
        axes.xaxis.label.set_size(8)
    found: dict[str, Any] = {}
    for axes in grid.flat:
        for handle, words in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(words, handle)
    figure.legend(
        found.values(), found, ncols=2, fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, 0)
    )
    figure.supylabel("time / plain network", fontsize=9)
    figure.suptitle(f"converted networks on {results['machine']['device']}", fontsize=10)
    return _save(figure, path)


def draw(results: dict[str, Any], out: Path) -> list[Path]:
    """Draws what the results have rows for; returns the files `<slug>-floor.png` and so on."""
    out.mkdir(parents=True, exist_ok=True)
    found = [
        draw_one(results, out / f"{results['slug']}-{name}.png")
        for name, draw_one in (
            (TASKS, _tasks),
            ("floor", _floor),
            ("speedup", _speedup),
            ("step", _step),
            ("conv", _conv),
            ("methods", _methods),
            ("calls", _calls),
            ("models", _models),
        )
    ]
    return [path for path in found if path is not None]
