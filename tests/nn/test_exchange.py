"""A task's parts as a file: `extract` and `insert`, and files that are none."""

from __future__ import annotations

import os
import pickle
import traceback
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from task_models import IDS, NAMES, ResNet, move
from torch import Tensor, nn

from fastmtl.nn import TaskHeads, convert, extract, insert, merge, param_groups, task_names, tasks
from fastmtl.nn.module import task_layers

KINDS = ("taps", "dense", "lora", "patch", "separate", "modulator", "hypergrid")
X = torch.linspace(-2, 2, 4 * 3 * 8 * 8).view(4, 3, 8, 8)


def made(kind: str = "taps", seed: int = 0, **options: Any) -> nn.Module:
    torch.manual_seed(seed)
    return convert(ResNet().eval(), NAMES, kind, **options)


def trained(kind: str = "taps", **options: Any) -> nn.Module:
    model = made(kind, **options)
    move(model)
    return model


def saved(state: dict[str, Tensor], folder: Path, ending: str) -> Path:
    path = folder / f"task.{ending}"
    if ending == "safetensors":
        pytest.importorskip("safetensors.torch", reason="safetensors is not installed").save_file(state, path)
    else:
        torch.save(state, path)
    return path


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_task_goes_through_a_file_into_another_copy(kind: str, ending: str, tmp_path: Path) -> None:
    source, target = trained(kind), made(kind)
    with tasks("sketch"):
        expected = source(X)
    before = {path: {name: layer.part(name) for name in NAMES} for path, layer in task_layers(target)}
    kept = {key: x.clone() for key, x in target.state_dict().items()}
    path = saved(extract(source, "sketch"), tmp_path, ending)
    insert(target, "cartoon", path)
    assert task_names(target) == (*NAMES, "cartoon")
    with tasks("cartoon"):
        torch.testing.assert_close(target(X), expected)
    # nobody else was touched: the very tensors, and their values
    for where, layer in task_layers(target):
        for name in NAMES:
            assert all(x is before[where][name][part] for part, x in layer.part(name).items())
    assert all(torch.equal(target.state_dict()[key], x) for key, x in kept.items())
    # over a task that is there: its tensors stay, their values are new
    insert(target, "photo", path)
    assert task_names(target) == (*NAMES, "cartoon")
    with tasks("photo"):
        torch.testing.assert_close(target(X), expected)
    for where, layer in task_layers(target):
        assert all(x is before[where]["photo"][part] for part, x in layer.part("photo").items())


def test_what_is_closed_is_left_out() -> None:
    model = trained()
    nn.init.zeros_(model.conv1.gate["sketch"])
    nn.init.ones_(model.fc.gate["sketch"])
    state = extract(model, "sketch")
    assert not state["conv1/delta"].numel() and "conv1/gate" in state and state["fc/delta"].numel()
    assert "conv1/delta" in extract(model, "sketch", unused=True)
    target = made()
    insert(target, "sketch", state)
    assert torch.equal(target.conv1.delta["sketch"], torch.zeros_like(model.conv1.delta["sketch"]))
    with tasks("sketch"):
        torch.testing.assert_close(target(X), model(X))


@pytest.mark.parametrize("options", [{}, {"rank": 3}])
def test_an_untouched_task_makes_a_small_file(options: Any, tmp_path: Path) -> None:
    model, target = made(**options), trained(**options)
    state = extract(model, "sketch")
    halves = {"/A", "/B"} if options else {"/delta"}
    assert not any(x.numel() for key, x in state.items() if key.endswith(tuple(halves))) and "fc/gate" in state
    assert halves == {key[2:] for key in extract(model, "sketch", unused=True) if key.startswith("fc/")} - {"/gate"}
    whole = saved(extract(model, "sketch", unused=True), tmp_path, "pt").stat().st_size
    numbers = sum(x.numel() * x.element_size() for x in state.values())
    path = saved(state, tmp_path, "pt")
    # what is left: gates and norms, what tells what the file belongs to, and torch's own for each tensor
    assert numbers < 4000 and path.stat().st_size < whole - sum(
        x.numel() * x.element_size()
        for key, x in extract(model, "sketch", unused=True).items()
        if not state[key].numel()
    )
    with tasks("sketch"):
        expected = model(X)
    for name in ("photo", "cartoon"):
        insert(target, name, path)
        with tasks(name):
            torch.testing.assert_close(target(X), expected)
        # and it can be trained on: no half is zero whose other half is
        if options:
            assert (target.fc.A[name] != 0).any() and not target.fc.B[name].any()
        with tasks(name):
            target(X).square().sum().backward()
        assert any(p.grad is not None and p.grad.any() for p in target.fc.parameters() if p.requires_grad)
        target.zero_grad()


def test_a_file_with_zeros_as_earlier_versions_wrote_it_is_read() -> None:
    model, target = made(), trained()
    insert(target, "photo", extract(model, "photo", unused=True))
    assert not target.fc.delta["photo"].any()


def test_one_half_of_a_delta_is_none() -> None:
    model = trained(rank=3)
    nn.init.ones_(model.fc.gate["photo"])
    for half in ("A", "B"):
        state = extract(model, "photo")
        del state[f"fc/{half}"]
        with pytest.raises(ValueError, match=f"layer 'fc': expected {half}, got"):
            insert(model, "cartoon", state)


def test_another_rank_makes_new_parameters_and_the_same_rank_keeps_them() -> None:
    target = made("lora", rank=2)
    before = target.fc.part("photo")
    insert(target, "photo", extract(trained("lora", rank=2), "photo"))
    assert all(x is before[name] for name, x in target.fc.part("photo").items())
    insert(target, "photo", extract(trained("lora", rank=5), "photo"))
    new = {id(p) for group in param_groups(target) for p in group["params"]}
    assert all(id(x) in new and x is not before[name] for name, x in target.fc.part("photo").items())
    assert not any(id(x) in new for x in before.values())


def test_ranks_come_with_the_task() -> None:
    source = trained("lora", rank=5)
    target = made("lora", rank=2)
    insert(target, "cartoon", extract(source, "photo"))
    insert(target, "photo", extract(source, "photo"))
    assert target.fc.rank == {"photo": 5, "sketch": 2, "clipart": 2, "cartoon": 5}
    with tasks("photo"):
        expected = source(X)
    for name in ("cartoon", "photo"):
        with tasks(name):
            torch.testing.assert_close(target(X), expected)
    move(target)
    with tasks(IDS):
        mixed = target(X)
    torch.testing.assert_close(merge(target, "photo")(X)[IDS == 0], mixed[IDS == 0], atol=1e-5, rtol=1e-4)


def test_heads_of_another_size() -> None:
    def model(sizes: dict[str, int]) -> nn.Module:
        net = made("dense", where="conv1")
        torch.manual_seed(3)
        net.fc = TaskHeads(16, sizes)
        return net

    source = model({"photo": 5, "sketch": 3, "clipart": 4})
    target = model({"photo": 5, "sketch": 3, "clipart": 4})
    move(source)
    insert(target, "cartoon", extract(source, "clipart"))
    assert target.fc.heads["cartoon"].out_features == 4
    with tasks("cartoon"):
        found = target(X)[3]
    with tasks("clipart"):
        torch.testing.assert_close(found, source(X)[2])


def test_into_a_model_of_another_precision() -> None:
    source, target = trained(), made().to(torch.bfloat16)
    insert(target, "cartoon", extract(source, "photo"))
    assert target.conv1.delta["cartoon"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda s: s.pop("fastmtl.version"), "got nothing at 'fastmtl.version'"),
        (lambda s: s.clear(), "got nothing at 'fastmtl.version', 'fastmtl.layers', 'fastmtl.base'"),
        (lambda s: s.update({"fastmtl.version": torch.tensor(2)}), "expected version 1, got 2"),
        (lambda s: s.update({"fastmtl.version": torch.tensor(1.5)}), "expected version 1"),
        (lambda s: s.update({"fastmtl.version": torch.ones(3)}), r"expected version 1, got \[3\]"),
        (lambda s: s.update({"fastmtl.layers": torch.zeros(32, dtype=torch.uint8)}), "got one of another model"),
        (lambda s: s.update({"fastmtl.layers": torch.zeros(3)}), "got one of another model"),
        (lambda s: s.update({"fastmtl.base": torch.zeros(3)}), "expected fastmtl.base of shape"),
        (lambda s: s["fastmtl.base"].fill_(float("nan")), "got one of others"),
        (
            lambda s: s["fastmtl.base"].add_(1.0),
            r"got one of others \(layer 'conv1'\); load .* check_base=False",
        ),
        (lambda s: s.pop("fc/delta"), "layer 'fc': expected delta"),  # its gate is open
        (lambda s: (s.pop("fc/delta"), s["fc/gate"].fill_(float("nan"))), "layer 'fc': expected delta"),
        (lambda s: (s.pop("fc/delta"), s["fc/gate"].fill_(0.0)), None),
        (lambda s: s.update({"fc/delta": torch.zeros(0)}), None),
        (lambda s: s.update({"fc/gate": torch.zeros(0)}), r"expected gate of shape \[\], got \[0\]"),
        (lambda s: s.pop("fc/gate"), "layer 'fc': expected gate"),
        (lambda s: s.pop("bn1/weight"), "layer 'bn1': expected weight"),
        (lambda s: s.update({"fc/delta": torch.zeros(2)}), r"expected delta of shape \[5, 16\], got \[2\]"),
        (lambda s: s.update({"fc/delta": torch.zeros(5, 16, dtype=torch.complex64)}), "of real numbers"),
        (
            lambda s: s.update({"fc/delta": torch.zeros(5, 16).bool()}),
            "floating-point numbers, got torch.bool",
        ),
        (
            lambda s: s.update({"bn1/num_batches_tracked": torch.tensor(float("nan"))}),
            "of integers, got torch.f",
        ),
        (lambda s: s.update({"fc/evil": torch.zeros(2)}), "layer 'fc': expected delta, gate, got 'evil'"),
        (lambda s: s.update({"fd/delta": torch.zeros(2)}), "the layers of this model, got one of another, 'fd/delta'"),
        (lambda s: s.update({"fc": torch.zeros(2)}), "got one of another, 'fc'"),
        (lambda s: s.update({"fc/delta": "text"}), "expected tensors by name, got str at 'fc/delta'"),
        (lambda s: s.update({3: torch.zeros(2)}), "expected tensors by name, got Tensor at 3"),
    ],
)
def test_a_state_that_is_none_changes_nothing(change: Any, text: str | None) -> None:
    model = trained()
    state = extract(model, "photo")
    change(state)
    kept = {key: x.clone() for key, x in model.state_dict().items()}
    if text is None:
        insert(model, "cartoon", state)  # a delta behind a closed gate is zero
        assert not model.fc.delta["cartoon"].any()
        return
    for name in ("cartoon", "photo"):
        with pytest.raises(ValueError, match=text):
            insert(model, name, state)
    assert task_names(model) == NAMES
    assert model.state_dict().keys() == kept.keys()
    assert all(torch.equal(model.state_dict()[key], x) for key, x in kept.items())


def test_other_shared_weights_are_seen() -> None:
    state, other = extract(trained(), "photo"), made(seed=1)
    with pytest.raises(ValueError, match="expected a task that belongs to these shared weights"):
        insert(other, "cartoon", state)
    assert task_names(other) == NAMES
    insert(other, "cartoon", state, check_base=False)
    # rounding is no other weight
    insert(made().to(torch.bfloat16), "cartoon", state)
    insert(made().to(torch.float16), "cartoon", state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_that_are_all_alike_are_no_others_once_they_are_rounded(dtype: torch.dtype) -> None:
    model = convert(nn.Linear(3, 4, bias=False), NAMES, "dense")
    nn.init.constant_(model.weight, 0.1)
    state = extract(model, "photo")
    insert(model.to(dtype), "cartoon", state)
    nn.init.constant_(model.weight, 0.2)
    with pytest.raises(ValueError, match="expected a task that belongs to these shared weights"):
        insert(model, "more", state)


def test_another_model_is_seen() -> None:
    state = extract(trained("dense"), "photo")
    for other in (made("taps"), made("lora"), made("dense", where="fc")):
        with pytest.raises(ValueError, match="state: expected"):
            insert(other, "cartoon", state)


class Hostile:
    def __reduce__(self) -> Any:
        return os.mkdir, (str(Hostile.folder),)


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_files_that_are_none(ending: str, tmp_path: Path) -> None:
    model = trained()
    path = saved(extract(model, "photo"), tmp_path, ending)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:-30], whole[:10], b"", b"\x00" * 64, b"text", b"text\n" * 99):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"state: expected a file .*task\.") as caught:
            insert(model, "cartoon", path)
        check_no_way_to_run_code(caught)
    with pytest.raises(FileNotFoundError, match=r"state: expected a file, got '.*nothing"):
        insert(model, "cartoon", tmp_path / f"nothing.{ending}")
    with pytest.raises(ValueError, match=r"state: expected a file, got '.*', which is a directory"):
        insert(model, "cartoon", tmp_path)
    assert task_names(model) == NAMES


def check_no_way_to_run_code(caught: Any) -> None:
    """torch tells the reader of a file that it can't take to switch off what keeps the file's code from running."""
    shown = "".join(traceback.format_exception(caught.value)).replace("weights_only=True", "")
    assert "weights_only" not in shown and "safe_globals" not in shown and "trust" not in shown


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("empty", "which is empty"),
        ("cut", "which is cut off or damaged; copy or save it again"),
        ("old, cut", "which torch.save has not written, or which is cut off or damaged"),
        ("noise", "which torch.save has not written, or which is cut off or damaged"),
        ("model", r"which holds more than tensors \(task_models.ResNet\) and is not read; save what extract"),
        ("pickle", "which torch.save has not written"),
        ("safetensors", "which looks like one of safetensors; give it a name that ends in .safetensors"),
    ],
)
def test_what_a_file_is_instead(content: str, text: str, tmp_path: Path) -> None:
    model = trained("dense", where="fc")
    state = extract(model, "photo")
    path = saved(state, tmp_path, "safetensors" if content == "safetensors" else "pt")
    if content == "safetensors":
        path = path.rename(tmp_path / "task.pt")
    elif content == "model":
        torch.save(model, path)
    elif content == "pickle":
        path.write_bytes(pickle.dumps({"fc/delta": 1}))
    elif content.startswith("old"):
        torch.save(state, path, _use_new_zipfile_serialization=False)
        path.write_bytes(path.read_bytes()[:-20])
    else:
        path.write_bytes({"empty": b"", "cut": path.read_bytes()[:-30], "noise": bytes(range(7, 250)) * 3}[content])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of the pickle
        with pytest.raises(ValueError, match=text) as caught:
            insert(model, "cartoon", path)
    check_no_way_to_run_code(caught)


def test_no_code_in_a_file_is_run(tmp_path: Path) -> None:
    Hostile.folder = tmp_path / "was_run"
    model = trained()
    for write in (lambda p: torch.save({"x": Hostile()}, p), lambda p: p.write_bytes(pickle.dumps(Hostile()))):
        path = tmp_path / "hostile.pt"
        write(path)
        with pytest.raises(ValueError, match="whole and without code") as caught:
            insert(model, "cartoon", path)
        check_no_way_to_run_code(caught)
        with pytest.raises(ValueError, match="state: expected a file of safetensors"):
            insert(model, "cartoon", path.rename(tmp_path / "hostile.safetensors"))
    assert not Hostile.folder.exists()
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="a file with what extract returns, got list"):
        insert(model, "cartoon", tmp_path / "list.pt")


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: extract(made(), "x"), ValueError, "expected one of photo, sketch, clipart, got 'x'"),
        (lambda: extract(ResNet(), 0), ValueError, "expected layers with parts of tasks"),
        (lambda: insert(made(), 3, {}), TypeError, "task: expected a name, got int"),
        (lambda: insert(made(), "a.b", {}), ValueError, "names without dots"),
        (lambda: insert(made(), "a", 3), TypeError, "state: expected what extract returns, or a path, got int"),
    ],
)
def test_bad_arguments(call: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        call()


@pytest.mark.parametrize(
    ("kind", "there", "here"),
    [("lora", {"scaling": 2.0}, {"scaling": 1.0}), ("taps", {"threshold": 0.1}, {"threshold": 0.5, "start": 0.6})],
)
def test_a_part_that_would_mean_something_else_is_refused(kind: str, there: Any, here: Any) -> None:
    state = extract(made(kind, where="fc", **there), "sketch")
    with pytest.raises(ValueError, match="another model"):
        insert(made(kind, where="fc", **here), "new", state)
    insert(made(kind, where="fc", **there), "new", state)


# --- what belongs to a task's file


def batch_normed() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1), nn.Flatten(), nn.Linear(18, 2))


@pytest.mark.parametrize("kind, where", [("patch", None), ("separate", "bottom:1"), ("lora", "0"), ("taps", "0")])
def test_another_network_around_the_layers_by_task_is_seen(kind: str, where: str | None) -> None:
    model = convert(batch_normed(), NAMES, kind, where)
    state = extract(model, NAMES[0])
    with torch.no_grad():
        model[4].weight.add_(1.0)
    with pytest.raises(ValueError, match=r"one of others \('4.weight'\)"):
        insert(model, NAMES[1], state)
    insert(model, NAMES[1], state, check_base=False)


@pytest.mark.filterwarnings("ignore:the shared parameters are frozen")
def test_shared_statistics_belong_to_a_file() -> None:
    model = convert(batch_normed(), NAMES, "lora", "0", joint=False)
    state = extract(model, NAMES[0])
    model[1].running_var.mul_(3.0)
    with pytest.raises(ValueError, match=r"one of others \('1.running_var'\)"):
        insert(model, "new", state)
    assert "new" not in task_names(model)


@pytest.mark.parametrize("bad", ["sparse", "meta"])
def test_tensors_without_values_change_nothing(bad: str) -> None:
    model = convert(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), NAMES, "dense")
    state = extract(model, NAMES[0])
    for key in ("1/delta", "fastmtl.base", "fastmtl.version"):
        x = state[key]
        wrong = {**state, key: x.to("meta") if bad == "meta" or x.dim() == 0 else x.to_sparse()}
        before = {k: v.clone() for k, v in model.state_dict().items()}
        for task in ("new", NAMES[0]):
            with pytest.raises(ValueError, match="expected dense tensors, got"):
                insert(model, task, wrong)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and len(before) == len(
            model.state_dict()
        )


def test_files_of_wrapped_models_are_those_of_the_model() -> None:
    model = convert(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), NAMES, "dense")
    with torch.no_grad():
        model[0].delta[NAMES[0]].normal_()
    state = extract(model, NAMES[0])
    average = torch.optim.swa_utils.AveragedModel(model)
    for wrapped in (average, nn.DataParallel(model), torch.compile(model)):
        assert sorted(extract(wrapped, NAMES[0])) == sorted(state)
    insert(average, NAMES[1], state)
    assert torch.equal(average.module[0].delta[NAMES[1]], model[0].delta[NAMES[0]])
    model[0] = torch.compile(model[0])
    assert sorted(extract(model, NAMES[0])) == sorted(state)
