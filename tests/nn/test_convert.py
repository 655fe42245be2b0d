"""`fastmtl.nn.convert` and `merge`: on networks that nobody here wrote, and with every kind."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import task_models
import torch
from task_models import IDS, MODELS, NAMES, Case, ResNet, move, tell
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastmtl import nn as task_nn
from fastmtl.nn import (
    TaskBatchNorm2d,
    TaskConv2d,
    TaskEmbedding,
    TaskHeads,
    TaskLayerNorm,
    TaskLinear,
    TaskModule,
    TaskMultiheadAttention,
    add_task,
    checkpoint_contexts,
    context,
    convert,
    extract,
    insert,
    layer_report,
    merge,
    remove_task,
    task_names,
    tasks,
)
from fastmtl.nn.module import task_layers
from fastmtl.parameters import is_per_task

KINDS = ("taps", "dense", "lora", "patch", "separate", "modulator", "hypergrid")
# of kinds that do not convert what a network has: what is left out
LEAVE_OUT = {
    ("encoder", "modulator"): (nn.Conv2d, nn.Linear),
    ("encoder", "hypergrid"): (nn.Conv2d, nn.Linear),
}


def where_of(model: str, kind: str) -> Any:
    return LEAVE_OUT.get((model, kind))


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    yield
    assert context._current is None and not context._entered


def converted(name: str, kind: str, **options: Any) -> tuple[Case, nn.Module]:
    case = task_models.make(name)
    model = convert(copy.deepcopy(case.model), NAMES, kind, where_of(name, kind), **options)
    return case, model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_network_is_converted_trained_on_mixed_batches_and_merged(name: str, kind: str) -> None:
    case, model = converted(name, kind)
    plain = case.run(case.model)
    # the same as before, with ids and with one name
    with tell(case):
        torch.testing.assert_close(case.run(model), plain, atol=1e-6, rtol=1e-6)
    with tell(case, NAMES[1]):
        torch.testing.assert_close(case.run(model), plain, atol=1e-6, rtol=1e-6)
    # each sample as its task's merged network has it
    move(model)
    with tell(case):
        mixed = case.run(model)
    assert not torch.allclose(mixed, plain, atol=1e-4)
    for t, task in enumerate(NAMES):
        single = merge(model, task)
        assert not any(type(m).__module__.startswith("fastmtl") for m in single.modules())
        assert not any(is_per_task(p) for p in single.parameters())
        assert all(p.requires_grad for p in single.parameters())
        assert single.state_dict().keys() == case.model.state_dict().keys()
        torch.testing.assert_close(case.run(single)[t == IDS], mixed[t == IDS], atol=1e-5, rtol=1e-4)
        with tell(case, task):
            torch.testing.assert_close(case.run(model)[t == IDS], mixed[t == IDS], atol=1e-5, rtol=1e-4)
    # the plain state_dict loads after conversion, and is that of the layers: others' parts stay
    before = {path: layer.part(NAMES[0]) for path, layer in task_layers(model)}
    model.load_state_dict(case.model.state_dict())
    for path, layer in task_layers(model):
        assert layer.part(NAMES[0]).keys() == before[path].keys()


@pytest.mark.parametrize("kind", KINDS)
def test_training_gives_what_a_loop_over_tasks_gives(kind: str) -> None:
    case = task_models.make("resnet")
    model = convert(case.model, NAMES, kind, joint=True).double()
    move(model)
    x, target = torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    with tasks(IDS):
        loss = ((model(x) - target) ** 2).sum()
    loss.backward()
    found = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for t, task in enumerate(NAMES):
        with tasks(task):
            ((model(x[t == IDS]) - target[t == IDS]) ** 2).sum().backward()
    for name, p in model.named_parameters():
        if p.grad is None:
            assert found[name] is None, name
        else:
            torch.testing.assert_close(
                found[name], p.grad, atol=1e-8, rtol=1e-6, msg=lambda m, name=name: f"{name}: {m}"
            )


def test_an_absent_task_keeps_no_gradient() -> None:
    _, model = converted("resnet", "taps")
    model.train()
    with tasks(["photo", "photo", "clipart", "photo"]):
        y = model(torch.randn(4, 3, 8, 8))
    y.sum().backward()
    for _, layer in task_layers(model):
        assert all(p.grad is None for p in layer.part("sketch").values())
        assert all(p.grad is not None for p in layer.part("photo").values() if isinstance(p, nn.Parameter))


def test_what_each_kind_trains() -> None:
    for kind, frozen in {"taps": True, "lora": True, "patch": True, "modulator": True, "dense": False,
                         "separate": False, "hypergrid": False}.items():  # fmt: skip
        for joint in (None, True, False):
            model = convert(ResNet(), NAMES, kind, joint=joint)
            shared = [p for p in model.parameters() if not is_per_task(p)]
            expected = (not frozen) if joint is None else joint
            assert all(p.requires_grad == expected for p in shared)
            assert all(p.requires_grad for p in model.parameters() if is_per_task(p))


def paths(model: nn.Module) -> list[str]:
    return [path for path, _ in task_layers(model)]


@pytest.mark.parametrize(
    ("kind", "where", "expected"),
    [
        ("dense", "fc", ["fc"]),
        ("dense", "layer1", ["layer1.conv1", "layer1.conv2"]),
        ("dense", "*.conv1", ["layer1.conv1", "layer2.conv1", "layer3.conv1"]),
        ("dense", ["conv1", "fc"], ["conv1", "fc"]),
        ("dense", nn.Linear, ["fc"]),
        ("dense", (nn.Linear, "layer3"), ["layer3.conv1", "layer3.conv2", "fc"]),
        ("dense", lambda _, layer: getattr(layer, "out_channels", 0) == 8, ["conv1", "layer1.conv1", "layer1.conv2"]),
        ("dense", "bottom:2", ["conv1", "layer1.conv1"]),
        ("dense", "top:1", ["fc"]),
        ("dense", "bottom:0.15", ["conv1", "layer1.conv1", "layer1.conv2"]),
        ("dense", "bottom:9", ["conv1", "layer1.conv1", "layer1.conv2", "layer2.conv1", "layer2.conv2",
                                "layer2.downsample.0", "layer3.conv1", "layer3.conv2", "fc"]),
        ("separate", "bottom:2", ["conv1", "bn1", "layer1.conv1", "layer1.bn1"]),
        ("separate", "top:2", ["layer3.conv2", "layer3.bn2", "fc"]),
        ("taps", "layer1", ["layer1.conv1", "layer1.bn1", "layer1.conv2", "layer1.bn2"]),
        ("taps", "bottom:1", ["conv1", "bn1"]),
        ("patch", None, ["bn1", "layer1.bn1", "layer1.bn2", "layer2.bn1", "layer2.bn2", "layer2.downsample.1",
                         "layer3.bn1", "layer3.bn2"]),
        ("patch", "layer3", ["layer3.bn1", "layer3.bn2"]),
    ],
)  # fmt: skip
def test_where(kind: str, where: Any, expected: list[str]) -> None:
    assert paths(convert(ResNet(), 2, kind, where)) == expected


def test_calls_compose() -> None:
    model = convert(ResNet(), NAMES, "taps", [nn.Conv2d])
    convert(model, NAMES, "patch")
    convert(model, NAMES, "separate", "fc")
    assert task_names(model) == NAMES
    kinds = {path: type(layer) for path, layer in task_layers(model)}
    assert kinds["conv1"] is TaskConv2d and kinds["bn1"] is TaskBatchNorm2d and kinds["fc"] is TaskLinear
    assert not model.fc.shared and model.conv1.taps is not None
    x = torch.randn(4, 3, 8, 8)
    with tasks(IDS):
        mixed = model.eval()(x)
    torch.testing.assert_close(merge(model, "sketch")(x)[IDS == 1], mixed[IDS == 1])


@pytest.mark.parametrize("kind", ["dense", "hypergrid", "modulator"])
@torch.no_grad()
def test_a_deep_network_differs_from_its_merged_one_by_rounding_alone(kind: str) -> None:
    # whose 17 blocks have depthwise convolutions and narrow ends: float32 shows what they make of rounding
    tf = pytest.importorskip("transformers", reason="transformers is not installed")
    plain = tf.MobileNetV2ForImageClassification(tf.MobileNetV2Config(image_size=32, depth_multiplier=0.35))
    model = convert(plain, NAMES, kind).double()
    move(model, 0.3)
    # in training mode, as else numbers are as small as their rounding in an untrained network
    model.train().classifier.train(False)
    model.dropout.p = 0.0
    x = torch.randn(4, 3, 32, 32).double()
    with tasks("sketch"):
        expected = copy.deepcopy(model)(x).logits
    found = merge(model, "sketch")(x).logits
    assert expected.std() > 0.01
    torch.testing.assert_close(found, expected, atol=1e-11, rtol=1e-11)


def test_a_layer_alone_is_converted() -> None:
    assert isinstance(convert(nn.Linear(4, 2), 2, "dense"), TaskLinear)
    assert isinstance(convert(nn.LayerNorm(4), 2, "patch"), TaskLayerNorm)
    assert isinstance(convert(nn.MultiheadAttention(4, 2), 2, "lora"), TaskMultiheadAttention)


def test_a_module_at_two_places_is_converted_once() -> None:
    layer = nn.Linear(4, 4)
    model = convert(nn.Sequential(layer, nn.ReLU(), layer), 2, "dense")
    assert model[0] is model[2] and isinstance(model[0], TaskLinear)
    assert len(list(task_layers(model))) == 1
    single = merge(model, 0)
    assert single[0] is single[2]


@pytest.mark.parametrize("kind", ["dense", "taps", "lora", "separate"])
def test_tied_weights_are_converted_once(kind: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 4, bias=False))
    model[2].weight = model[0].weight
    x, plain = torch.randn(4, 4), None
    plain = model(x)
    convert(model, NAMES, kind, joint=True)
    assert model[0] is not model[2]
    with tasks(IDS):
        torch.testing.assert_close(model(x), plain)
    names = ("A", "B") if kind == "lora" else ("delta",)
    for name in names:
        assert getattr(model[0], name) is getattr(model[2], name)
    move(model)
    with tasks(IDS):
        mixed = model(x)
    for t, task in enumerate(NAMES):
        single = merge(model, task)
        assert single[0].weight is single[2].weight
        torch.testing.assert_close(single(x)[t == IDS], mixed[t == IDS])


def test_tasks_come_to_tied_layers_and_go_with_the_model() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 4, bias=False))
    model[2].weight = model[0].weight
    model = copy.deepcopy(convert(model, NAMES, "lora"))
    part = extract(model, "photo")
    for call in (lambda: model[0].remove_task("photo"), lambda: model[2].add_task("guest")):
        with pytest.raises(ValueError, match=r"TaskLinear whose A, B another layer has, too; call fastmtl\.nn"):
            call()
    assert model[0].tasks == model[2].tasks == NAMES and "guest" not in model[2].rank
    insert(model, "other", part)
    add_task(model, "guest", like="photo")
    remove_task(model, "sketch")
    want = ("photo", "clipart", "other", "guest")
    assert model[0].tasks == model[2].tasks == tuple(model[0].B) == want and model[0].B is model[2].B
    with tasks(torch.arange(4)):
        assert model(torch.randn(4, 4)).shape == (4, 4)
    with pytest.raises(ValueError, match="another layer has, too"):
        model[0].remove_task("photo")


@pytest.mark.parametrize("kind", ["taps", "dense", "lora", "patch", "separate", "modulator", "hypergrid"])
def test_a_network_converted_on_the_meta_device_takes_a_plain_checkpoint(kind: str) -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, groups=4))

    plain = make().eval()
    with torch.device("meta"):
        model = convert(make(), NAMES, kind).eval()
    model.load_state_dict(plain.state_dict(), assign=True)
    here = convert(copy.deepcopy(plain), NAMES, kind)
    assert not any(x.is_meta for x in model.state_dict().values())
    for (name, p), (other, q) in zip(model.named_parameters(), here.named_parameters(), strict=True):
        assert name == other and p.requires_grad == q.requires_grad and is_per_task(p) == is_per_task(q), name
    x = torch.randn(4, 3, 7, 7)
    with tasks(IDS):
        torch.testing.assert_close(model(x), plain(x))
    # and a checkpoint of its own
    move(here)
    with torch.device("meta"):
        model = convert(make(), NAMES, kind).eval()
    model.load_state_dict(here.state_dict(), assign=True)
    with tasks(IDS):
        torch.testing.assert_close(model(x), here(x))


def test_an_embedding_and_the_head_tied_to_it() -> None:
    case = task_models.make("gpt2")
    model = convert(copy.deepcopy(case.model), NAMES, "dense", ["transformer.wte", "lm_head"])
    assert isinstance(model.transformer.wte, TaskEmbedding) and isinstance(model.lm_head, TaskLinear)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model.lm_head.delta is model.transformer.wte.delta
    move(model)
    with tell(case):
        mixed = case.run(model)
    single = merge(model, "photo")
    assert single.lm_head.weight is single.transformer.wte.weight
    torch.testing.assert_close(case.run(single)[IDS == 0], mixed[IDS == 0], atol=1e-5, rtol=1e-4)
    # only the head: what all share stays tied, and a merged model without a change, too
    model = convert(copy.deepcopy(case.model), NAMES, "dense", "lm_head")
    assert model.lm_head.weight is model.transformer.wte.weight
    single = merge(model, "photo")
    assert single.lm_head.weight is single.transformer.wte.weight


def test_nothing_is_changed_if_anything_is_refused() -> None:
    model = ResNet()
    model.layer3.conv2.register_forward_hook(lambda *_: None)
    before = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=r"layer3\.conv2: layer: expected no hooks.*leave it out by where="):
        convert(model, NAMES, "taps")
    assert [type(m) for m in model.modules()] == before
    assert all(p.requires_grad for p in model.parameters())
    convert(model, NAMES, "taps", lambda name, _: name != "layer3.conv2")


BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "no module": (lambda: convert(3, 2), TypeError, "model: expected a module, got int"),
    "scripted": (
        lambda: convert(torch.jit.script(nn.Sequential(nn.Linear(2, 2))), 2), TypeError,
        "model: expected a module in Python, got a scripted one",
    ),
    "compiled": (
        lambda: convert(torch.compile(ResNet()), 2), ValueError,
        "model: expected one that is not compiled yet, got 'OptimizedModule'; compile what convert returns",
    ),
    "a part compiled": (
        lambda: convert(nn.Sequential(torch.compile(nn.Linear(2, 2))), 2), ValueError, "not compiled yet, got '0'",
    ),
    "no kind": (lambda: convert(ResNet(), 2, "tapas"), ValueError, "kind: expected one of taps, dense.*got 'tapas'"),
    "kind of another type": (lambda: convert(ResNet(), 2, 3), TypeError, "kind: expected a str, got int"),
    "option": (lambda: convert(ResNet(), 2, "dense", rank=3), TypeError, "options: expected gate, per_task.*'rank'"),
    "no option": (lambda: convert(ResNet(), 2, "patch", rank=3), TypeError, "options: expected none with kind 'patch'"),
    "joint": (lambda: convert(ResNet(), 2, joint=1), TypeError, "joint: expected a bool or None, got int"),
    "a rank missing": (
        lambda: convert(nn.Linear(4, 4), ["a", "b"], "lora", rank={"a": 2}), ValueError,
        "rank: expected one for each of a, b, got none for 'b'$",
    ),
    "a rank of no task": (
        lambda: convert(nn.Linear(4, 4), ["a", "b"], "lora", rank={"a": 2, "b": 1, "c": 1}), ValueError,
        "rank: expected one for each of a, b, got one for 'c', no task of the layer$",
    ),
    "a rank of another name": (
        lambda: convert(nn.Linear(4, 4), ["a", "b"], "lora", rank={"a": 2, "c": 1}), ValueError,
        "got none for 'b' and one for 'c', no task of the layer$",
    ),
    "a rank by position": (
        lambda: convert(nn.Linear(4, 4), 2, "lora", rank={0: 2, 1: 2}), TypeError,
        r"rank: expected ranks by the names of tasks \(str\), got a key 0",
    ),
    "a task's rank": (
        lambda: convert(nn.Linear(4, 4), ["a", "b"], "lora", rank={"a": 2, "b": 0}), ValueError,
        r"rank\['b'\]: expected at least 1, got 0",
    ),
    "a task's rank, a float": (
        lambda: convert(nn.Linear(4, 4), ["a", "b"], "lora", rank={"a": 2, "b": 2.0}), TypeError,
        r"rank\['b'\]: expected an int, got float",
    ),
    "ranks in a list": (
        lambda: convert(nn.Linear(4, 4), 2, "lora", rank=[2, 2]), TypeError,
        "rank: expected an int, or a dict of one for each task, got list",
    ),
    "PEFT's rank": (lambda: convert(ResNet(), 2, "lora", r=2), TypeError, "got 'r'; the rank is rank="),
    "PEFT's alpha": (
        lambda: convert(ResNet(), 2, "lora", lora_alpha=2), TypeError, "got 'lora_alpha'; PEFT's alpha / r is scaling="
    ),
    "PEFT's heads": (
        lambda: convert(ResNet(), 2, "lora", modules_to_save=["fc"]), TypeError, "got 'modules_to_save'; a call with"
    ),
    "a layer of other kinds": (
        lambda: convert(nn.Sequential(nn.Embedding(4, 2), nn.Linear(2, 2)), 2, "lora", "0"), ValueError,
        "got '0', an Embedding; kinds that convert it: 'taps', 'dense', 'separate'",
    ),
    "the end of a name": (
        lambda: convert(ResNet(), 2, where="conv2"), ValueError,
        r"got 'conv2', which matches nothing; a name means a whole path, and '\*.conv2' all that end so; layers",
    ),
    "the end of a name in a list": (
        lambda: convert(ResNet(), 2, where=["fc", "conv2"]), ValueError,
        r"got 'conv2', which matches nothing; a name means a whole path, and '\*.conv2'",
    ),
    "ids that are one int": (
        lambda: tasks(2), TypeError, "task_ids: expected an int64 or int32 tensor .*the name of one task.*, got int"
    ),
    "rank": (lambda: convert(ResNet(), 2, "lora", rank=0), ValueError, "rank: expected at least 1, got 0"),
    "names twice": (lambda: convert(ResNet(), ["a", "a"]), ValueError, "tasks: expected different names"),
    "no tasks": (lambda: convert(ResNet(), 0), ValueError, "tasks: expected at least 1, got 0"),
    "no layers": (
        lambda: convert(nn.Sequential(nn.ReLU()), 2), ValueError,
        "model: expected a layer that kind 'taps' converts .Conv2d.*, got none",
    ),
    "matches nothing": (
        lambda: convert(ResNet(), 2, where="layer9"), ValueError,
        "where: expected to match a layer, got 'layer9', which matches nothing; layers: 'conv1'",
    ),
    "type of nothing": (lambda: convert(ResNet(), 2, where=nn.Conv1d), ValueError, "Conv1d, which matches nothing"),
    "matches others": (
        lambda: convert(nn.Sequential(nn.Conv1d(2, 2, 1), nn.Linear(2, 2)), 2, where=nn.Conv1d), ValueError,
        "where: expected Conv2d, .* for kind 'taps', got '0', a Conv1d",
    ),
    "an activation": (
        lambda: convert(ResNet(), 2, where=lambda _, layer: layer is None), ValueError, "which matches nothing",
    ),
    "others around": (
        lambda: convert(nn.Sequential(nn.ReLU(), nn.Linear(2, 2)), 2, where="0"), ValueError,
        "where: expected a layer that kind 'taps' converts .*got '0', which matches other modules alone; .*: '1'",
    ),
    "named, and unknown": (
        lambda: convert(nn.Sequential(nn.Conv1d(2, 2, 1), nn.Linear(2, 2)), 2, where=["0", "1"]), ValueError,
        "which matches other modules alone|expected.*got '0', a Conv1d",
    ),
    "where of another type": (lambda: convert(ResNet(), 2, where=3), TypeError, "where: expected a name, a.*got int"),
    "a layer itself": (
        lambda: convert(ResNet(), 2, where=nn.Linear(2, 2)), TypeError, "where: .*got Linear .*its name",
    ),
    "a layer in a list": (
        lambda: convert(ResNet(), 2, where=["fc", nn.Linear(2, 2)]), TypeError, "where: .*got Linear .*its name",
    ),
    "type of no module": (lambda: convert(ResNet(), 2, where=int), TypeError, "a type of nn.Module, got int"),
    "empty name": (lambda: convert(ResNet(), 2, where=""), ValueError, "where: expected a name, got an empty one"),
    "empty list": (lambda: convert(ResNet(), 2, where=[]), ValueError, "where: expected at least one"),
    "predicate": (lambda: convert(ResNet(), 2, where=lambda *_: 1), TypeError, "answers with a bool, got int"),
    "bottom:0": (lambda: convert(ResNet(), 2, where="bottom:0"), ValueError, "where: expected bottom:2.*'bottom:0'"),
    "bottom:x": (lambda: convert(ResNet(), 2, where="bottom:x"), ValueError, "where: expected bottom:2.*'bottom:x'"),
    "top:1.5": (lambda: convert(ResNet(), 2, where="top:1.5"), ValueError, "where: expected top:2.*'top:1.5'"),
    "share": (
        lambda: convert(ResNet(), 2, where="top:0.0001"), ValueError, "a share that one layer fits in, got 'top:0.0001'"
    ),
    "more layers than there are": (
        lambda: convert(ResNet(), 2, "dense", "bottom:99"), ValueError,
        "where: expected at most bottom:9, since the kind converts 9 layers of this model, got bottom:99",
    ),
    "one more than there are": (
        lambda: convert(ResNet(), 2, "modulator", "top:10"), ValueError, "where: expected at most top:9, .*got top:10"
    ),
    "counted in a list": (lambda: convert(ResNet(), 2, where=["top:1"]), ValueError, "expected 'top:1' alone"),
    "padding": (
        lambda: convert(nn.Conv2d(2, 2, 3, padding_mode="circular"), 2), ValueError,
        "padding_mode 'zeros', got 'circular'",
    ),
    "weight norm": (
        lambda: convert(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)), 2), ValueError,
        "expected a plain parameter 'weight'",
    ),
    "merge of a plain model": (lambda: merge(ResNet(), 0), ValueError, "model: expected layers with parts of tasks"),
    "merge of no model": (lambda: merge(3, 0), TypeError, "model: expected a module, got int"),
    "merge of no task": (lambda: merge(convert(ResNet(), 2), 2), ValueError, r"task: expected 0\.\.1, got 2"),
    "merge of no name": (lambda: merge(convert(ResNet(), NAMES), "x"), ValueError, "expected one of photo.*'x'"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case: str) -> None:
    call, error, text = BAD[case]
    with pytest.raises(error, match=text):
        call()


def test_a_second_time_is_refused() -> None:
    model = convert(ResNet(), NAMES, "dense", "layer1")
    for where in ("layer1", "layer1.conv1", ["fc", "layer1.conv1"]):
        with pytest.raises(ValueError, match=r"not converted yet, got 'layer1\.conv1', a TaskConv2d"):
            convert(model, NAMES, "taps", where)
    convert(model, NAMES, "taps")
    with pytest.raises(ValueError, match=r"expected a layer that kind 'dense' converts.*got none; converted already"):
        convert(model, NAMES, "dense")
    with pytest.raises(ValueError, match="tasks: expected photo, sketch, clipart as 'conv1' has, got a, b"):
        convert(model, ["a", "b"], "dense")


def test_a_forward_without_tasks_says_what_to_do() -> None:
    _, model = converted("resnet", "taps")
    with pytest.raises(RuntimeError, match=r"with fastmtl\.nn\.tasks\(task_ids\).*with fastmtl\.nn\.tasks\(name\)"):
        model(torch.randn(2, 3, 8, 8))
    with tasks("cartoon"), pytest.raises(ValueError, match="expected one of photo, sketch, clipart, got 'cartoon'"):
        model(torch.randn(2, 3, 8, 8))
    with tasks(torch.tensor([0, 3])), pytest.raises(ValueError, match="task_ids: expected ids from 0 to 2, got 3"):
        model(torch.randn(2, 3, 8, 8))


def test_windows_without_repeat_are_an_error() -> None:
    case, model = converted("swin", "dense")
    with tasks(IDS), pytest.raises(ValueError, match="task_ids: expected"):
        case.run(model)


def test_a_low_rank_delta_of_the_wrong_rank_is_not_merged() -> None:
    model = convert(nn.Sequential(nn.Linear(4, 2), nn.Conv2d(2, 3, 1)), NAMES, "lora", rank=2)
    for layer in model:
        layer.A["photo"] = nn.Parameter(torch.ones(3, *layer.A["photo"].shape[1:]))
        with pytest.raises(ValueError, match=r"task 'photo': expected a low-rank delta whose halves fit, got A \[3,"):
            merge(layer, "photo")
        merge(layer, "sketch")


@pytest.mark.parametrize("kind", KINDS)
def test_copies_and_files(kind: str) -> None:
    case, model = converted("resnet", kind)
    move(model)
    with tell(case):
        expected = case.run(model)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    fresh = convert(task_models.make("resnet").model, NAMES, kind)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    whole = io.BytesIO()
    torch.save(model, whole)
    whole.seek(0)
    others = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), fresh, torch.load(whole, weights_only=False)]
    assigned = convert(task_models.make("resnet").model, NAMES, kind)
    assigned.load_state_dict(model.state_dict(), assign=True)
    for other in (*others, assigned):
        with tell(case):
            assert torch.equal(case.run(other), expected)
        marks = [is_per_task(p) for p in model.parameters()]
        assert [is_per_task(p) for p in other.parameters()] == marks and any(marks)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["taps", "lora", "patch", "separate", "modulator", "hypergrid"])
@torch.no_grad()
def test_16_bit(kind: str, dtype: torch.dtype) -> None:
    case, model = converted("resnet", kind)
    move(model)
    with tell(case):
        expected = case.run(model)
        found = model.to(dtype)(case.inputs["x"].to(dtype))
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("name", ["resnet", "encoder"])
def test_autocast(name: str) -> None:
    case, model = converted(name, "taps")
    move(model, 0.02)
    with tell(case):
        expected = case.run(model)
        with torch.autocast("cpu", torch.bfloat16):
            found = case.run(model)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, atol=0.1, rtol=0.1)
    found.float().sum().backward()
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize(("name", "kind"), [("resnet", "taps"), ("encoder", "lora")])
def test_compiled(name: str, kind: str) -> None:
    case, model = converted(name, kind)
    move(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for ids in (IDS, torch.tensor([0, 1, 2, 2])):
        with tell(case, ids):
            torch.testing.assert_close(case.run(compiled), case.run(model), atol=1e-5, rtol=1e-4)
    with tell(case, "sketch"):
        torch.testing.assert_close(case.run(compiled), case.run(model), atol=1e-5, rtol=1e-4)


def test_checkpointing() -> None:
    case, model = converted("vit", "dense")
    move(model)

    def gradients(run: Any) -> list[Tensor]:
        model.zero_grad()
        with tell(case):
            y = run()
        y.sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    expected = gradients(lambda: case.run(model))
    model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": checkpoint_contexts})
    model.train()
    for m in model.modules():
        if isinstance(m, nn.Dropout):
            m.eval()
    torch.testing.assert_close(gradients(lambda: case.run(model)), expected)
    block = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    convert(block, NAMES, "dense")
    x = torch.randn(4, 4, requires_grad=True)
    with tasks(IDS):
        y = checkpoint(block, x, use_reentrant=False, context_fn=checkpoint_contexts)
    y.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel, torch.optim.swa_utils.AveragedModel])
def test_of_a_wrapped_model_the_one_inside_is_merged(wrap: Any) -> None:
    case, model = converted("resnet", "dense")
    move(model)
    single, expected = merge(wrap(model), "photo"), merge(model, "photo")
    assert type(single) is ResNet and single.state_dict().keys() == expected.state_dict().keys()
    assert torch.equal(case.run(single), case.run(expected))


def test_a_merged_model_is_exported() -> None:
    case, model = converted("resnet", "taps")
    move(model)
    single = merge(model, "sketch")
    program = torch.export.export(single, (case.inputs["x"],))
    torch.testing.assert_close(program.module()(case.inputs["x"]), case.run(single))


def test_taps_sequentially_jointly_and_from_a_joint_net() -> None:
    x, y = torch.randn(12, 3, 8, 8), torch.randint(0, 5, (12,))
    ids = torch.arange(12) % 3

    def train(model: nn.Module, ids: Tensor | str, rows: Tensor, steps: int = 3) -> None:
        optimizer = torch.optim.SGD(task_nn.param_groups(model), lr=0.05, momentum=0.9)
        for _ in range(steps):
            optimizer.zero_grad()
            with tasks(ids):
                loss = nn.functional.cross_entropy(model(x[rows]), y[rows]) + 0.1 * task_nn.sparsity_loss(model)
            loss.backward()
            optimizer.step()

    # sequential: W frozen, one task after another, none touches what others have
    model = convert(ResNet(), NAMES, "taps")
    shared = [p.clone() for p in model.parameters() if not is_per_task(p)]
    for t, task in enumerate(NAMES):
        kept = {name: [p.clone() for p in task_nn.task_parameters(model, name)] for name in NAMES if name != task}
        train(model, task, ids == t)
        for name, tensors in kept.items():
            assert all(map(torch.equal, task_nn.task_parameters(model, name), tensors))
        assert layer_report(model).to_dict()["tasks"][task]["changed_layers"] > 0
    assert all(map(torch.equal, [p for p in model.parameters() if not is_per_task(p)], shared))
    # full joint: W and all tasks' parts at once, from mixed batches
    model = convert(ResNet(), NAMES, "taps", joint=True)
    shared = [p.clone() for p in model.parameters() if not is_per_task(p)]
    train(model, ids, torch.arange(12) >= 0)
    assert not any(map(torch.equal, [p for p in model.parameters() if not is_per_task(p)], shared))
    # memory-efficient joint: the plain net on all tasks, then as the first
    plain = ResNet()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05)
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(plain(x), y).backward()
        optimizer.step()
    model = convert(plain, NAMES, "taps")
    train(model, "sketch", ids == 1)
    assert layer_report(model).to_dict()["tasks"]["photo"]["changed_layers"] == 0


def test_closed_gates_run_the_plain_layers() -> None:
    case, model = converted("resnet", "taps")
    move(model)
    for _, layer in task_layers(model):
        if "gate" in layer.containers():
            for p in layer.gate.values():
                nn.init.zeros_(p)
            for p in layer.delta.values():
                nn.init.constant_(p, float("nan"))
    with torch.no_grad(), tell(case):
        mixed = case.run(model)
    assert mixed.isfinite().all()
    torch.testing.assert_close(case.run(merge(model, "photo"))[IDS == 0], mixed[IDS == 0])


def test_heads_of_different_sizes_stay_as_they_are() -> None:
    model = ResNet()
    model.fc = TaskHeads(16, {"photo": 5, "sketch": 3, "clipart": 4})
    convert(model, NAMES, "taps")
    with tasks(IDS):
        outputs = model.eval()(torch.randn(4, 3, 8, 8))
    assert [list(y.shape) for y in outputs] == [[2, 5], [1, 3], [1, 4]]
    assert merge(model, "sketch").fc.out_features == 3


class Own(TaskModule):
    """A layer of one's own."""

    def __init__(self, names: Any) -> None:
        super().__init__(names)
        self.shift = task_nn.TaskParameters()
        self._start_tasks()

    def _start(self, name: str) -> None:
        self.shift[name] = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        plan = self._plan(x)
        return x + torch.stack([self.shift[name] for name in self.tasks])[plan.task_ids][:, None]

    def changed(self, task: int | str) -> bool:
        return bool(self.shift[self.task_name(task)] != 0)

    def merged(self, task: int | str, memo: Any = None) -> nn.Module:
        return nn.Identity()


def test_a_layer_of_ones_own_that_lacks_something_says_what() -> None:
    class Half(TaskModule):
        def _start(self, name: str) -> None:
            pass

    half = Half(NAMES)
    half._start_tasks()
    for method in ("merged", "changed"):
        with pytest.raises(
            NotImplementedError, match=f"layer Half: has no {method}, which a class of its own implements"
        ):
            getattr(half, method)("photo")
    with pytest.raises(NotImplementedError, match="layer TaskModule: has no _start"):
        TaskModule(NAMES)._start_tasks()


def test_t5_has_rms_norms() -> None:
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5", reason="transformers is not installed")
    norm = t5.T5LayerNorm(8)
    nn.init.uniform_(norm.weight)
    x = torch.randn(4, 3, 8)
    expected = norm(x)
    model = convert(nn.Sequential(norm), NAMES, "patch")
    with tasks(IDS):
        torch.testing.assert_close(model(x), expected)
    assert type(merge(model, "photo")[0]) is t5.T5LayerNorm


def test_a_layer_of_ones_own() -> None:
    model = convert(nn.Sequential(nn.Linear(4, 4), Own(NAMES)), NAMES, "dense")
    task_nn.add_task(model, "cartoon", like="photo")
    assert list(model[1].shift) == [*NAMES, "cartoon"]
    state = task_nn.extract(model, "photo")
    assert "1/shift" in state
    task_nn.insert(model, "more", state)
    assert "1" in layer_report(model).layers and isinstance(merge(model, "more")[1], nn.Identity)


def test_sequences_before_the_batch_are_refused() -> None:
    """As long as the batch, a sequence would be taken for it, and nothing would show that."""
    model = nn.Transformer(8, 2, 1, 1, 16, dropout=0.0).double().eval()
    with pytest.raises(
        ValueError, match=r"model: expected batch_first=True, since 'encoder\.layers\.0\.linear1' would"
    ):
        convert(model, NAMES, "dense", nn.Linear)
    with pytest.raises(ValueError, match=r"encoder: expected batch_first=True, since 'encoder\.norm' would"):
        convert(nn.ModuleDict({"encoder": model.encoder}), NAMES, "patch", "encoder.norm")
    assert not list(task_layers(model))
    source, target = torch.randn(2, 3, 3, 8, dtype=torch.float64)
    ids = torch.tensor([2, 0, 1])
    expected = model(source, target)
    converted = convert(model, NAMES, "lora", nn.MultiheadAttention)
    with tasks(ids):
        torch.testing.assert_close(converted(source, target), expected)
    for p in converted.parameters():
        if is_per_task(p):
            nn.init.normal_(p)
    with tasks(ids):
        y = converted(source, target)
    for n, task in enumerate(NAMES[t] for t in ids):
        torch.testing.assert_close(y[:, n], merge(converted, task)(source, target)[:, n])


# --- what is missing, and what is not frozen


def test_a_misspelt_name_among_others_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(ValueError, match="'layer9', which matches nothing"):
        convert(model, 2, "dense", ["0", "layer9"])
    assert type(model[0]) is nn.Linear
    convert(model, 2, "dense", ["0", nn.Conv2d])


def test_statistics_that_are_not_frozen_are_told_of() -> None:
    def network() -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 4), nn.BatchNorm1d(4))

    with pytest.warns(UserWarning, match=r"statistics of the norms '1', '4':.*where=torch.nn.BatchNorm2d"):
        convert(network(), 2, "lora")
    with pytest.warns(UserWarning, match=r"statistics of the norms '4':.*keep them in eval mode"):
        convert(network(), 2, "taps")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert(network(), 2, "dense")
        convert(network(), 2, "taps", joint=True)


@pytest.mark.parametrize(
    ("layer", "options", "text"),
    [
        (lambda: nn.Linear(8, 8), {"rank": 1000}, r"at most 8, .*\('the model'\) can use, got 1000"),
        (lambda: nn.Sequential(nn.Linear(3, 2), nn.Linear(9, 4)), {}, r"at most 4, .*\('1'\) can use, got 8"),
        (lambda: nn.Sequential(nn.Conv2d(2, 30, 3)), {"rank": 19}, r"at most 18, .*\('0'\) can use, got 19"),
        (
            lambda: nn.Sequential(nn.MultiheadAttention(8, 2, batch_first=True)),
            {"rank": {"a": 4, "b": 9}},
            r"at most 8, .*\('0.q_proj'\) can use, got 9",
        ),
        (lambda: nn.Sequential(nn.Linear(8, 8)), {"rank": 9, "kind": "taps"}, "at most 8, .* got 9"),
    ],
)
def test_a_rank_that_no_layer_can_use_is_told_of(layer: Any, options: Any, text: str) -> None:
    options = {"kind": "lora", **options}
    with pytest.warns(UserWarning, match=f"rank: expected {text}"):
        model = convert(layer(), ["a", "b"], **options)
    assert all(layer.rank["b"] == len(layer.A["b"]) for _, layer in task_layers(model))  # and taken, as PEFT takes it


def test_a_rank_that_some_layer_can_use_is_taken() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3)), 2, "lora", rank=8)
        convert(nn.Linear(8, 8), 2, "lora", rank={"0": 1, "1": 8})
        convert(nn.Linear(1, 1), 2, "dense")


@pytest.mark.parametrize(
    "kind, missing",
    [("taps", "0.gate."), ("taps", "0.delta."), ("taps", "1.running_mean."), ("patch", "1.weight."), ("lora", "0.A.")],
)
@pytest.mark.filterwarnings("ignore:the shared parameters are frozen")
def test_what_a_checkpoint_lacks_is_missing(kind: str, missing: str) -> None:
    def made() -> nn.Module:
        return convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), 2, kind)

    state = made().state_dict()
    left = {key: x for key, x in state.items() if not key.startswith(missing)}
    assert len(left) < len(state)
    with pytest.raises(RuntimeError, match="Missing key"):
        made().load_state_dict(left)
    with pytest.raises(RuntimeError, match="Missing key"):
        plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).state_dict()
        del plain["1.running_var"]
        convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), 2, "taps").load_state_dict(plain)
