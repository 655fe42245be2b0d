"""The life of every layer of `fastmtl.nn`: from and to plain ones, tasks that come and go, copies, bad input."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases_layers import (
    ALL,
    CASES,
    IDS,
    MERGED,
    NAMES,
    PLAIN,
    assert_same_gradients,
    call,
    filled,
    made,
    own,
)
from torch import Tensor, nn

from fastmtl.nn import (
    TaskEmbedding,
    TaskHeads,
    TaskHyperGrid,
    TaskLayerNorm,
    TaskLinear,
    TaskModulator,
    TaskModule,
    TaskModules,
    TaskMultiheadAttention,
    TaskRMSNorm,
    TaskScaleShift,
    context,
    extract,
    insert,
    tasks,
)
from fastmtl.nn.module import TaskComposite
from fastmtl.parameters import is_per_task


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    yield
    assert context._current is None and not context._entered


# --- plain layers


@PLAIN
def test_begins_as_the_plain_layer(name: str) -> None:
    case = CASES[name]
    plain = case.plain().double().eval()
    layer, x = case.from_plain(copy.deepcopy(plain)), case.x()
    assert isinstance(layer, (TaskModule, TaskComposite)) and not layer.training and layer.tasks == tuple(NAMES)
    y, expected = call(case, layer, x, IDS), case.call(plain, x)
    torch.testing.assert_close(y, expected)
    if getattr(getattr(layer, "q_proj", layer), "shared", "heads" not in name):
        assert not any(layer.changed(t) or layer.added(t) for t in NAMES)
    for task in NAMES:
        torch.testing.assert_close(case.call(layer.merged(task), x), expected)


@PLAIN
def test_a_plain_state_dict_loads(name: str) -> None:
    """Strictly, into a layer with other numbers: what was shared, or every task's, is then the plain layer's."""
    case = CASES[name]
    plain, layer = filled(case.plain()), case.from_plain(case.plain()).double()
    for assign in (False, True):
        layer.load_state_dict({key: x.clone() for key, x in plain.state_dict().items()}, assign=assign)
        assert own(layer) == own(case.from_plain(case.plain()))
    x = case.x()
    for task in NAMES:
        torch.testing.assert_close(call(case, layer, x, task), case.call(plain, x))
    # no two tasks hold the same memory, also after assign=True
    held = [p.data_ptr() for p in layer.parameters()]
    assert len(held) == len(set(held))
    net = nn.Sequential(layer)
    net.load_state_dict(nn.Sequential(plain).state_dict())
    state = net.state_dict()
    filled(layer)
    net.load_state_dict(state)


@PLAIN
def test_a_plain_state_dict_of_another_size_does_not_load(name: str) -> None:
    case = CASES[name]
    layer = case.from_plain(case.plain()).double()
    state = {key: torch.zeros([n + 1 for n in x.shape]) for key, x in case.plain().state_dict().items()}
    with pytest.raises(RuntimeError, match="size mismatch"):
        layer.load_state_dict(state)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        layer.load_state_dict({**case.plain().state_dict(), "stranger.x": torch.zeros(1)})


@MERGED
def test_merged_gives_a_plain_layer(name: str) -> None:
    case, layer, x = made(name)
    layer.eval()
    for t, task in enumerate(NAMES):
        plain = layer.merged(t if t else task)
        assert not any(type(m).__module__.startswith("fastmtl") for m in plain.modules())
        assert not any(is_per_task(p) for p in plain.parameters()) and not plain.training
        assert all(p.requires_grad for p in plain.parameters())
        torch.testing.assert_close(case.call(plain, x), call(case, layer, x, task))
        shared = {p.data_ptr() for p in layer.parameters()}
        assert not shared & {p.data_ptr() for p in plain.parameters()}
        other = copy.deepcopy(plain)
        other.load_state_dict(plain.state_dict())


@MERGED
def test_merged_of_no_task(name: str) -> None:
    layer = CASES[name].make()
    with pytest.raises(ValueError, match="task: expected one of photo, sketch, clipart, got 'oil'"):
        layer.merged("oil")
    with pytest.raises(ValueError, match=r"task: expected 0\.\.2, got 3"):
        layer.merged(3)


# --- tasks come and go


@ALL
def test_added_and_removed_tasks(name: str) -> None:
    case, layer, x = made(name)
    before = call(case, layer, x, IDS)
    held = {id(p) for p in layer.parameters()}
    options = (
        {"size": 5} if name == "heads_padded" else {"module": nn.Linear(4, 5).double()} if "modules" in name else {}
    )
    layer.add_task("late", **options)
    layer.add_task("twin", like="sketch")
    assert layer.tasks == (*NAMES, "late", "twin")
    torch.testing.assert_close(call(case, layer, x, IDS), before)
    new = {key for key, p in layer.named_parameters() if id(p) not in held}
    assert new and all({"late", "twin"} & set(key.split(".")) for key in new) and new <= own(layer)
    assert all(layer.get_parameter(key).dtype == torch.float64 for key in new)
    torch.testing.assert_close(call(case, layer, x, "twin"), call(case, layer, x, "sketch"))
    part, other = layer.part("twin"), layer.part("sketch")
    assert part.keys() == other.keys() and part
    for key, value in part.items():
        assert torch.equal(value, other[key]) and value.data_ptr() != other[key].data_ptr()
    ids = torch.tensor([3, 0, 4, 3, 1])
    assert_same_gradients(case, layer, x, ids, call(case, layer, x, ids))
    layer.remove_task("photo")
    layer.remove_task(2)
    assert layer.tasks == ("sketch", "clipart", "twin")
    y = call(case, layer, x, torch.tensor([1, 1, 0, 1, 1]))
    torch.testing.assert_close(y[[0, 2, 4]], before[[0, 2, 4]])
    assert not any({"photo", "late"} & set(key.split(".")) for key in layer.state_dict())
    layer.remove_task("twin")
    layer.remove_task("clipart")
    with pytest.raises(ValueError, match="task: expected one of several tasks, got 'sketch', the only one"):
        layer.remove_task("sketch")


@pytest.mark.parametrize("name", [name for name in CASES if "heads" not in name])
def test_reset_makes_all_tasks_alike(name: str) -> None:
    """In the same parameters, as a model that was made without memory needs it."""
    case, layer, x = made(name)
    before, y = dict(layer.named_parameters()), call(case, layer, x, "photo")
    layer.reset_parameters()
    assert all(p is before[key] for key, p in layer.named_parameters())
    found = [call(case, layer, x, task) for task in NAMES]
    assert all(torch.equal(found[0], other) for other in found[1:])
    assert found[0].isfinite().all() and not torch.equal(found[0], y)
    if not any(word in name for word in ("separate", "depthwise", "no_bias")):
        assert not any(layer.changed(task) for task in NAMES)


@ALL
def test_a_task_that_cannot_be_added_changes_nothing(name: str) -> None:
    layer = CASES[name].make()
    before = list(layer.state_dict())
    for args, error, match in (
        (("sketch",), ValueError, "name: expected a new task, got 'sketch'"),
        (("a.b",), ValueError, "got 'a.b'"),
        ((3,), TypeError, r"expected names \(str\), got int"),
        (("late", "oil"), ValueError, "like: expected one of photo, sketch, clipart, got 'oil'"),
        (("late", 1), TypeError, "like: expected the name of a task or None, got int"),
    ):
        with pytest.raises(error, match=match):
            layer.add_task(*args)
    assert list(layer.state_dict()) == before and layer.tasks == tuple(NAMES)


@ALL
def test_a_part_is_all_that_belongs_to_a_task(name: str) -> None:
    layer = filled(CASES[name].make())
    held = {x.data_ptr(): key for key, x in (*layer.named_parameters(), *layer.named_buffers())}
    seen: set[str] = set()
    for task in NAMES:
        keys = {held[x.data_ptr()] for x in layer.part(task).values()}
        assert keys and all(task in key.split(".") for key in keys)
        seen |= keys & dict(layer.named_parameters()).keys()
        # what a closed gate has counts for nothing
        closed = task == "photo" and ("taps" in name or name == "conv_grouped")
        most = sum(x.numel() for x in layer.part(task).values())
        assert layer.added(task) == 0 if closed else 0 < layer.added(task) <= most
        assert layer.changed(task) != closed
    assert seen == own(layer)


@PLAIN
def test_nothing_is_left_without_memory(name: str) -> None:
    """A layer is made without memory first; parameters and buffers of the one that is handed out have some."""
    layer = CASES[name].from_plain(CASES[name].plain())
    tensors = [*layer.named_parameters(), *layer.named_buffers()]
    assert [key for key, x in tensors if x.is_meta] == []


# --- copies, saved states


def through_torch_save(layer: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def through_safe_state(layer: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = filled(copy.deepcopy(layer))
    other.load_state_dict(torch.load(file, weights_only=True))
    return other


def through_assigned_state(layer: nn.Module) -> nn.Module:
    other = filled(copy.deepcopy(layer))
    other.load_state_dict({key: x.clone() for key, x in layer.state_dict().items()}, assign=True)
    return other


WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "torch_save": through_torch_save,
    "state": through_safe_state,
    "assign": through_assigned_state,
    "to": lambda layer: copy.deepcopy(layer).to(torch.float32).to(torch.float64),
}


@ALL
@pytest.mark.parametrize("way", WAYS)
def test_copies(name: str, way: str) -> None:
    case, layer, x = made(name)
    if way == "to":
        layer = layer.float().double()
    other = WAYS[way](layer)
    assert other.tasks == layer.tasks and own(other) == own(layer)
    assert torch.equal(call(case, other, x, IDS), call(case, layer, x, IDS))
    other.add_task("late", like="photo")
    assert "late" not in layer.tasks and len(own(other)) > len(own(layer))


@ALL
def test_a_part_moves_to_another_copy(name: str) -> None:
    """Taken out of one, put into another copy as a new task and in the place of an old one."""
    case, layer, x = made(name)
    other = copy.deepcopy(layer)
    before = call(case, other, x, "photo")
    with torch.no_grad():
        for key in own(layer):
            if "clipart" in key.split("."):
                layer.get_parameter(key).mul_(-1.5)
    state = extract(nn.Sequential(layer), "clipart")
    for task in ("guest", "sketch"):
        insert(nn.Sequential(other), task, state)
        y, expected = call(case, other, x, task), call(case, layer, x, "clipart")
        # of padded heads as many columns as the largest that is left
        torch.testing.assert_close(y, expected[..., : y.shape[-1]])
        assert y.shape == expected.shape or name == "heads_padded"
    y = call(case, other, x, "photo")
    torch.testing.assert_close(y, before[..., : y.shape[-1]])
    assert own(other) > own(layer)
    with pytest.raises(ValueError, match="state: "):
        insert(nn.Sequential(other), "late", {key: v[..., None] for key, v in state.items() if "fastmtl" not in key})


# --- bad input


class Scaled(nn.Embedding):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def _hooked(layer: nn.Module) -> nn.Module:
    layer.register_forward_hook(lambda *args: None)
    return layer


def _attention_hooked_inside() -> nn.Module:
    layer = nn.MultiheadAttention(4, 2)
    _hooked(layer.out_proj)
    return layer


ATTENTION = TaskMultiheadAttention.from_layer


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: TaskEmbedding(0, 4, 2), ValueError, "num_embeddings: expected at least 1, got 0"),
        (lambda: TaskEmbedding(4, 2.0, 2), TypeError, "embedding_dim: expected an int, got float"),
        (lambda: TaskEmbedding(4, 2, 2, padding_idx=4), ValueError, r"padding_idx: expected -4\.\.3, got 4"),
        (lambda: TaskEmbedding(4, 2, 2, padding_idx="a"), TypeError, "padding_idx: expected an int or None, got str"),
        (lambda: TaskEmbedding(4, 2, 2, gate=1.0, shared=False), ValueError, "shared: expected True beside a gate"),
        (lambda: TaskEmbedding.from_layer(nn.Linear(2, 2), 2), TypeError, r"expected nn\.Embedding, got Linear"),
        (lambda: TaskEmbedding.from_layer(Scaled(2, 2), 2), TypeError, r"the forward of nn\.Embedding, got Scaled's"),
        (lambda: TaskEmbedding.from_layer(_hooked(nn.Embedding(2, 2)), 2), ValueError, "expected no hooks"),
        (
            lambda: TaskEmbedding.from_layer(nn.Embedding(2, 2, max_norm=1.0), 2),
            ValueError,
            r"layer: expected max_norm None, got 1\.0: .* set layer\.max_norm = None",
        ),
        (
            lambda: TaskEmbedding.from_layer(nn.Embedding(2, 2, scale_grad_by_freq=True), 2),
            ValueError,
            "layer: expected scale_grad_by_freq False, got True: .* set layer",
        ),
        (
            lambda: TaskEmbedding.from_layer(nn.Embedding(2, 2, sparse=True), 2),
            ValueError,
            "layer: expected sparse False, got True: .* set layer",
        ),
        (lambda: TaskEmbedding(4, 2, 2)(torch.ones(3)), TypeError, "x: expected int64 or int32, got torch.float32"),
        (lambda: TaskEmbedding(4, 2, 2)(torch.tensor([4])), ValueError, r"x: expected row numbers 0\.\.3, got 4\.\.4"),
        (lambda: TaskEmbedding(4, 2, 2, shared=False)(torch.tensor([-1])), ValueError, r"0\.\.3, got -1\.\.-1"),
        (lambda: TaskEmbedding(4, 2, 2)([1]), TypeError, "x: expected a tensor, got list"),
        (lambda: TaskEmbedding(4, 2, 2)(torch.tensor(1)), ValueError, r"x: expected shape \[N, \.\.\.\], got \[\]"),
        (lambda: TaskHeads(4, [2, 3]), TypeError, "sizes: expected a dict from names to sizes, got list"),
        (lambda: TaskHeads(4, {}), ValueError, "tasks: expected at least one name, got none"),
        (lambda: TaskHeads(4, {"a": 0}), ValueError, r"sizes\['a'\]: expected at least 1, got 0"),
        (lambda: TaskHeads(4.0, {"a": 1}), TypeError, "in_features: expected an int, got float"),
        (lambda: TaskHeads(4, {"a.b": 1}), ValueError, "got 'a.b'"),
        (lambda: TaskHeads(4, {"items": 1}), ValueError, "got 'items'"),
        (lambda: TaskHeads(4, {"a": 1}, output="tuple"), ValueError, "expected None, 'list' or 'padded', got 'tuple'"),
        (lambda: TaskHeads(4, {"a": 1}, fill=None), TypeError, "fill: expected a number, got NoneType"),
        (lambda: TaskHeads.from_modules([nn.Linear(2, 2)]), TypeError, "modules: expected a dict from names to mod"),
        (lambda: TaskHeads.from_modules({"a": 3}), TypeError, r"modules\['a'\]: expected a module, got int"),
        (
            lambda: TaskHeads.from_modules(dict.fromkeys("ab", nn.Linear(2, 2))),
            ValueError,
            "modules: expected a module for each task, got the same one twice",
        ),
        (
            lambda: TaskHeads.from_modules({"a": nn.Sequential(TaskLinear(2, 2, 2))}),
            ValueError,
            r"modules\['a'\]: expected a plain module, got one with layers that differ by task",
        ),
        (lambda: TaskHeads.from_layer(nn.Conv2d(2, 2, 1), 2), TypeError, r"expected nn\.Linear, got Conv2d"),
        (lambda: TaskHeads(4, {"a": 1}).add_task("b", "a", size=3), ValueError, "size: expected None beside like"),
        (lambda: TaskHeads(4, {"a": 1}).add_task("b", size=-3), ValueError, "size: expected at least 1, got -3"),
        (lambda: TaskHeads(4, {"a": 1}).add_task("b", module=3), TypeError, "module: expected a module, got int"),
        (lambda: TaskModules({"a.b": nn.Linear(1, 1)}), ValueError, "got 'a.b'"),
        (lambda: TaskMultiheadAttention(6, 4, 2), ValueError, "num_heads: expected a divisor of embed_dim = 6, got 4"),
        (lambda: TaskMultiheadAttention(6, True, 2), TypeError, "num_heads: expected an int, got bool"),
        (lambda: TaskMultiheadAttention(0, 1, 2), ValueError, "embed_dim: expected at least 1, got 0"),
        (lambda: TaskMultiheadAttention(6, 2, 2, 1.5), ValueError, "dropout: expected a number from 0 to 1, got 1.5"),
        (lambda: TaskMultiheadAttention(6, 2, 2, "no"), TypeError, "dropout: expected a number, got str"),
        (lambda: ATTENTION(nn.Linear(2, 2), 2), TypeError, r"expected nn\.MultiheadAttention, got Linear"),
        (
            lambda: ATTENTION(nn.MultiheadAttention(4, 2, kdim=3), 2),
            ValueError,
            "layer: expected kdim and vdim as embed_dim = 4, got 3 and 4; leave this layer out",
        ),
        (
            lambda: ATTENTION(nn.MultiheadAttention(4, 2, add_bias_kv=True), 2),
            ValueError,
            "layer: expected add_bias_kv False, got True; leave",
        ),
        (
            lambda: ATTENTION(nn.MultiheadAttention(4, 2, add_zero_attn=True), 2),
            ValueError,
            "layer: expected add_zero_attn False, got True; leave",
        ),
        (lambda: ATTENTION(_hooked(nn.MultiheadAttention(4, 2)), 2), ValueError, "expected no hooks"),
        (lambda: ATTENTION(_attention_hooked_inside(), 2), ValueError, "expected no hooks"),
        (lambda: TaskModulator(nn.Conv1d(2, 2, 1), 2), TypeError, r"expected nn\.Conv2d, nn\.Linear or Conv1D of"),
        (
            lambda: TaskModulator(nn.Conv2d(2, 2, 1, padding_mode="circular"), 2),
            ValueError,
            "expected padding_mode 'zeros', got 'circular'",
        ),
        (lambda: TaskModulator(nn.Linear(2, 2), 2, joint=1), TypeError, "joint: expected a bool, got int"),
        (lambda: TaskModulator(nn.MultiheadAttention(4, 2).out_proj, 2), TypeError, r"got the out_proj of nn\.Multi"),
        (lambda: TaskHyperGrid(nn.Linear(4, 6), 2, grid=(4, 2)), ValueError, "expected rows that divide 6, got 4"),
        (lambda: TaskHyperGrid(nn.Linear(4, 6), 2, grid=(2, 0)), ValueError, "expected columns that divide 4, got 0"),
        (lambda: TaskHyperGrid(nn.Linear(4, 6), 2, grid=(2, 1.0)), TypeError, "two ints, got float for the columns"),
        (lambda: TaskHyperGrid(nn.Linear(4, 6), 2, grid=3), TypeError, "grid: expected rows and columns or None"),
        (lambda: TaskHyperGrid(_hooked(nn.Linear(4, 6)), 2), ValueError, "expected no hooks"),
        (lambda: TaskScaleShift(0, 2), ValueError, "num_channels: expected at least 1, got 0"),
    ],
)
def test_bad_arguments(call: Callable[[], Any], error: type[Exception], match: str) -> None:
    with tasks("0"), pytest.raises(error, match=match):
        call()


def inputs(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape) for shape in shapes]


@pytest.mark.parametrize(
    ("args", "options", "error", "match"),
    [
        (inputs((2, 4)) * 3, {}, ValueError, r"query: expected shape \[N, L, 4\], got \[2, 4\]"),
        (inputs((2, 3, 5)) * 3, {}, ValueError, r"query: expected shape \[N, L, 4\], got \[2, 3, 5\]"),
        (inputs((2, 3, 4), (3, 3, 4), (3, 3, 4)), {}, ValueError, "key: expected 2 samples as query, got 3"),
        (inputs((2, 3, 4), (2, 3, 4), (2, 2, 4)), {}, ValueError, r"value: expected shape \[2, 3, 4\] as key"),
        ([None] * 3, {}, TypeError, "query: expected a tensor, got NoneType"),
        (
            inputs((2, 3, 4)) * 3,
            {"attn_mask": torch.zeros(3, 2)},
            ValueError,
            r"attn_mask: expected shape \[3, 3\] or \[4, 3, 3\], got \[3, 2\]",
        ),
        (
            inputs((2, 3, 4)) * 3,
            {"attn_mask": torch.zeros(3, 3, dtype=torch.int64)},
            TypeError,
            "attn_mask: expected bool or floating-point numbers, got torch.int64",
        ),
        (
            inputs((2, 3, 4)) * 3,
            {"key_padding_mask": torch.zeros(3, 2)},
            ValueError,
            r"key_padding_mask: expected shape \[2, 3\], got \[3, 2\]",
        ),
    ],
)
def test_attention_refuses_inputs(args: list, options: dict, error: type[Exception], match: str) -> None:
    layer = TaskMultiheadAttention(4, 2, ["a", "b"], batch_first=True)
    with tasks("a"), pytest.raises(error, match=match):
        layer(*args, **options)


def test_heads_refuse_results_of_other_shapes() -> None:
    heads = {"a": nn.Sequential(nn.Linear(4, 2)), "b": nn.Sequential(nn.Linear(4, 3))}
    layer = TaskHeads.from_modules(heads)
    with tasks(["a", "b"]), pytest.raises(ValueError, match=r"output: expected 'list', or 'padded' .* \[2\] and \[3\]"):
        layer(torch.randn(2, 4))
    padded = TaskHeads.from_modules(heads, output="padded", fill=0.5)
    with tasks(["a", "b"]):
        y = padded(torch.randn(2, 4))
    assert y.shape == (2, 3) and y[0, 2] == 0.5
    flat = TaskHeads.from_modules({"a": nn.Flatten(0), "b": nn.Identity()})
    with tasks("a"), pytest.raises(ValueError, match=r"head 'a': expected a tensor of 2 samples, got shape \[8\]"):
        flat(torch.randn(2, 4))


@pytest.mark.parametrize(
    "name", ["linear_dense", "conv_dense", "layer_norm", "embedding_dense", "heads", "heads_modules"]
)
def test_ids_that_do_not_fit(name: str) -> None:
    case, layer, x = made(name)
    with tasks(IDS[:3]), pytest.raises(ValueError, match="task_ids: expected shape"):
        case.call(layer, x)
    with tasks(torch.tensor([0, 1, 3, 0, 0])), pytest.raises(ValueError, match="expected ids from 0 to 2, got 3"):
        case.call(layer, x)


CONV, LINEAR = nn.Conv2d(4, 6, 3), nn.Linear(4, 6)


@pytest.mark.parametrize(
    ("layer", "x", "error", "match"),
    [
        (TaskModulator(CONV, 1), torch.ones(2, 3, 5, 5), ValueError, r"x: expected shape \[N, 4, H, W\], got \[2, 3"),
        (TaskModulator(LINEAR, 1), torch.ones(2, 3), ValueError, r"x: expected shape \[N, \.\.\., 4\], got \[2, 3\]"),
        (TaskModulator(LINEAR, 1), torch.ones(2, 4).double(), TypeError, "weight: expected torch.float64 beside x"),
        (TaskHyperGrid(LINEAR, 1), torch.ones(2, 4).long(), TypeError, "x: expected float64, float32, bfloat16 or"),
        (TaskHyperGrid(CONV, 1), torch.ones(2, 4, 5), ValueError, r"x: expected shape \[N, 4, H, W\], got \[2, 4, 5"),
        (TaskHeads(4, {"0": 2}, output="list"), torch.ones(2, 3), ValueError, r"expected shape \[N, \.\.\., 4\], got"),
        (TaskHeads(4, {"0": 2}, output="list"), torch.ones(2, 4).double(), TypeError, "weight: expected torch.float64"),
        (TaskHeads(4, {"0": 2}), torch.ones(2, 3), ValueError, "x: expected"),
    ],
)
def test_refuses_inputs(layer: nn.Module, x: Tensor, error: type[Exception], match: str) -> None:
    with tasks("0"), pytest.raises(error, match=match):
        layer(x)


def test_an_input_without_samples_in_front() -> None:
    with tasks("0"), pytest.raises(ValueError, match=r"x: expected samples in its first dimension, got shape \[4\]"):
        TaskLinear(4, 2, 2)(torch.randn(4))


@pytest.mark.parametrize("norm", [TaskLayerNorm(4, NAMES), TaskRMSNorm(4, NAMES)], ids=["layer_norm", "rms_norm"])
def test_norms_refuse_a_sample_without_a_batch(norm: TaskLayerNorm | TaskRMSNorm) -> None:
    with (
        pytest.raises(ValueError, match=r"x: expected samples in its first dimension, got shape \[4\]"),
        tasks("photo"),
    ):
        norm(torch.randn(4))
    with tasks("photo"):
        assert norm(torch.randn(1, 4)).shape == (1, 4)
