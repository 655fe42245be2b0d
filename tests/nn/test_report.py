"""Which layers a task has changed, as a table, as plain data and as a picture."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from task_models import NAMES, ResNet
from torch import nn

from fastmtl.nn import add_task, convert, heatmap, layer_report, merge
from fastmtl.nn.module import task_layers


def model_with_changes() -> nn.Module:
    torch.manual_seed(0)
    model = convert(ResNet().eval(), NAMES, "taps")
    nn.init.ones_(model.conv1.delta["photo"])
    nn.init.ones_(model.layer1.conv1.delta["photo"])
    nn.init.zeros_(model.layer1.conv1.gate["photo"])  # closed: what is behind it does not count
    nn.init.ones_(model.fc.delta["sketch"])
    nn.init.ones_(model.bn1.bias["sketch"])
    return model


def test_what_counts() -> None:
    plain = sum(p.numel() for p in ResNet().parameters())
    report = layer_report(model_with_changes())
    found = report.to_dict()
    assert json.loads(json.dumps(found)) == found
    assert found["base_parameters"] == report.base == plain
    assert found["tasks"]["photo"]["changed"] == ["conv1"]
    assert found["tasks"]["sketch"]["changed"] == ["bn1", "fc"]
    assert found["tasks"]["clipart"]["changed"] == []
    # a delta and its gate; a norm by task with its statistics, which the plain norm has, too
    assert found["tasks"]["photo"]["added_parameters"] in (8 * 3 * 9, 8 * 3 * 9 + 1)
    assert found["tasks"]["clipart"] == {"changed": [], "changed_layers": 0, "added_parameters": 0, "size": 1.0}
    assert found["tasks"]["photo"]["size"] == 1 + found["tasks"]["photo"]["added_parameters"] / plain
    added = sum(task["added_parameters"] for task in found["tasks"].values())
    assert report.size == found["size"] == 1 + added / plain
    assert found["layers"] == [path for path, _ in task_layers(model_with_changes())]


@pytest.mark.parametrize("kind", ["taps", "dense", "lora", "patch", "modulator", "hypergrid"])
def test_at_first_nothing_is_changed(kind: str) -> None:
    report = layer_report(convert(ResNet(), NAMES, kind))
    assert report.size == 1.0 and report.base == sum(p.numel() for p in ResNet().parameters())


def test_separate_layers_are_a_copy_for_each_task() -> None:
    plain = ResNet()
    report = layer_report(convert(ResNet(), NAMES, "separate", "fc"))
    assert report.base == sum(p.numel() for p in plain.parameters())
    assert report.to_dict()["tasks"]["photo"] == {
        "changed": ["fc"], "changed_layers": 1, "added_parameters": 85, "size": 1 + 85 / report.base,
    }  # fmt: skip


def test_the_table() -> None:
    text = str(layer_report(model_with_changes())).splitlines()
    assert text[0].split() == ["task", "layers", "changed", "parameters", "added", "size"]
    assert text[1].startswith("photo") and "1 of" in text[1] and text[1].endswith("x")
    assert text[4].startswith("all") and text[5].startswith("plain network: ")
    assert len({len(line) for line in text[1:5]}) == 1


def test_the_picture(tmp_path: Path) -> None:
    model = model_with_changes()
    report = layer_report(model)
    figure = heatmap(report, str(tmp_path / "tasks.png"))
    axes = figure.axes[0]
    assert [t.get_text() for t in axes.get_yticklabels()] == list(NAMES)
    picture = axes.images[0].get_array()
    assert picture.tolist() == [list(map(float, report.changed[name])) for name in NAMES]
    assert (tmp_path / "tasks.png").read_bytes()[:4] == b"\x89PNG"
    add_task(model, "cartoon")
    assert heatmap(layer_report(model)).axes[0].images[0].get_array().shape == (4, len(report.layers))


@pytest.mark.parametrize("names", [["a"], ["photographs", "pencil sketches", "clip art of the web", "W" * 40], 30])
@pytest.mark.parametrize("layers", [1, 4, 60, 200])
def test_the_names_in_the_picture_are_apart_and_inside(names: Any, layers: int) -> None:
    path = ".".join(["encoder"] * 8)
    model = nn.Sequential()
    for k in range(layers):
        inner = nn.Sequential()
        inner.add_module("a_layer_with_a_long_name_in_it" if k % 3 else "short", nn.Linear(1, 1))
        model.add_module(f"{path.replace('.', '_')}_{k}", inner)
    figure = heatmap(layer_report(convert(model, names, "dense")))
    renderer = figure.canvas.get_renderer()
    figure.draw(renderer)
    axes = figure.axes[0]
    tasks = [t.get_window_extent(renderer) for t in axes.get_yticklabels()]
    paths = [t.get_window_extent(renderer) for t in axes.get_xticklabels()]
    title, label = (t.get_window_extent(renderer) for t in (axes._left_title, axes.xaxis.label))
    assert axes.get_title(loc="left").startswith("layers that each task has changed")
    for boxes in (tasks, paths):
        assert not any(a.overlaps(b) for a, b in itertools.pairwise(boxes))
    assert not any(a.overlaps(b) for a in tasks for b in paths)
    assert not any(box.overlaps(other) for box in (*paths, *tasks) for other in (title, label))
    for box in (*tasks, *paths, title, label):
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1


def test_what_is_reported_is_what_is_merged() -> None:
    model = model_with_changes()
    for name in NAMES:
        single = merge(model, name).state_dict()
        torch.manual_seed(0)
        base = ResNet()
        different = {
            key.rpartition(".")[0]
            for key, x in base.state_dict().items()
            if not torch.equal(x, single[key]) and x.is_floating_point()
        }
        assert different == set(layer_report(model).to_dict()["tasks"][name]["changed"])


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match="report: expected what layer_report returns, got int"):
        heatmap(3)
    with pytest.raises(ValueError, match="expected layers with parts of tasks"):
        layer_report(ResNet())


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight


def test_what_tied_layers_have_in_common_counts_once() -> None:
    model = convert(Tied(), ["left", "right"], "dense", where=["embed", "head"])
    nn.init.ones_(model.embed.delta["left"])
    report = layer_report(model)
    assert report.changed["left"] == (True, True)
    assert report.base == 28 and report.added == {"left": (28, 0), "right": (0, 0)}
    separate = layer_report(convert(Tied(), ["left", "right"], "separate", where=["embed", "head"]))
    assert separate.base == 28 and separate.added == {"left": (28, 0), "right": (28, 0)}
