"""Every layer of `fastmtl.nn` from one table: values and gradients against plain torch, task by task."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases_layers import (
    ALL,
    CASES,
    IDS,
    NAMES,
    TOKENS,
    assert_same_gradients,
    by_hand,
    call,
    filled,
    made,
    own,
    tolerance_of,
    transformers_conv1d,
)
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import fastmtl
from fastmtl.nn import (
    TaskBatchNorm2d,
    TaskEmbedding,
    TaskHeads,
    TaskHyperGrid,
    TaskLinear,
    TaskModulator,
    TaskMultiheadAttention,
    TaskScaleShift,
    context,
    convert,
    extract,
    insert,
    layer_report,
    merge,
    param_groups,
    sparsity_loss,
    task_vectors,
    tasks,
)
from fastmtl.nn.layers.gate import scaled_by_gate
from fastmtl.nn.module import task_layers
from fastmtl.parameters import is_per_task


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    yield
    assert context._current is None and not context._entered


# --- values and gradients


@ALL
@pytest.mark.parametrize("ids", [IDS, IDS.int().flip(0), torch.zeros_like(IDS)], ids=["mixed", "int32", "one_task"])
def test_equals_plain_torch(name: str, ids: Tensor) -> None:
    """Values and every gradient. Tasks without samples have none at all, as in the loop over samples."""
    case, layer, x = made(name)
    x = x.requires_grad_() if x.is_floating_point() else x
    assert_same_gradients(case, layer, x, ids, call(case, layer, x, ids))


@ALL
def test_equals_plain_torch_by_the_reference(name: str) -> None:
    case, layer, x = made(name)
    with fastmtl.use_backend("reference"):
        y = call(case, layer, x, IDS)
        assert_same_gradients(case, layer, x, IDS, y)


@TOKENS
def test_takes_an_id_per_token(name: str) -> None:
    case, layer, x = made(name)
    ids = torch.arange(x.shape[0] * x.shape[1]).view(x.shape[:2]) * 7 % 5 % 3
    if isinstance(layer, TaskMultiheadAttention):
        # tokens see each other: what is compared is each projection, by a layer that has one task everywhere
        with tasks(ids):
            y = layer.q_proj(x)
        expected = torch.stack([layer.q_proj.effective_weight(t) for t in range(3)])[ids] @ x[..., None]
        torch.testing.assert_close(y, expected[..., 0] + torch.stack([_bias(layer, t) for t in range(3)])[ids])
        same = torch.full_like(ids, 1)
        torch.testing.assert_close(call(case, layer, x, same), call(case, layer, x, same[:, 0]))
        return
    x = x.requires_grad_() if x.is_floating_point() else x
    assert_same_gradients(case, layer, x, ids, call(case, layer, x, ids))


def _bias(layer: TaskMultiheadAttention, task: int) -> Tensor:
    bias = layer.q_proj.effective_bias(task)
    assert bias is not None
    return bias


@ALL
def test_tasks_by_name(name: str) -> None:
    case, layer, x = made(name)
    by_id = call(case, layer, x, IDS)
    assert torch.equal(call(case, layer, x, [NAMES[t] for t in IDS]), by_id)
    one = call(case, layer, x, "sketch")
    assert torch.equal(one, call(case, layer, x, torch.ones_like(IDS)))
    torch.testing.assert_close(one[2], by_id[2])
    with pytest.raises(ValueError, match="tasks: expected one of photo, sketch, clipart, got 'oil'"):
        call(case, layer, x, "oil")
    assert torch.equal(call(case, layer, x, fastmtl.ops.task_plan(IDS, 3)), by_id)
    with tasks(IDS):
        with torch.inference_mode():
            assert torch.equal(case.call(layer, x), by_id)
        assert case.call(layer, x).requires_grad


@ALL
def test_tasks_repeated(name: str) -> None:
    """Each sample of the batch makes two of the layer, one behind the other, as windows do."""
    case, layer, x = made(name)
    twice = x.repeat_interleave(2, 0)
    expected = call(case, layer, twice, IDS.repeat_interleave(2))
    assert torch.equal(call(case, layer, twice, IDS, repeat=True), expected)
    with pytest.raises(ValueError, match="task_ids: expected shape"):
        call(case, layer, twice, IDS)


@ALL
def test_outside_a_block_it_says_what_to_do(name: str) -> None:
    case, layer, x = made(name)
    with pytest.raises(RuntimeError, match=r"inside `with fastmtl\.nn\.tasks"):
        case.call(layer, x)


@ALL
def test_absent_tasks_have_no_gradient(name: str) -> None:
    case, layer, x = made(name)
    call(case, layer, x, torch.tensor([0, 2, 2, 0, 0])).square().sum().backward()
    absent = {key for key in own(layer) if "sketch" in key.split(".")}
    assert absent and all(layer.get_parameter(key).grad is None for key in absent)
    assert all(p.grad is not None for key, p in layer.named_parameters() if key not in absent)


@ALL
def test_a_nan_of_one_task_reaches_no_other(name: str) -> None:
    case, layer, x = made(name)
    expected = call(case, layer, x, IDS)
    broken = copy.deepcopy(layer)
    with torch.no_grad():
        for key in own(broken):
            if "sketch" in key.split("."):
                broken.get_parameter(key).fill_(torch.nan)
    y = call(case, broken, x, IDS)
    others = IDS != 1
    assert torch.equal(y[others], expected[others]) and y[~others].isnan().any()
    for layer_, result in ((broken, y), (layer, expected)):
        layer_.zero_grad()
        result.square().sum().backward()
    for key in own(layer):
        if "sketch" not in key.split("."):
            assert torch.equal(broken.get_parameter(key).grad, layer.get_parameter(key).grad), key


@ALL
def test_empty_batch(name: str) -> None:
    case, layer, x = made(name)
    if name == "heads_modules":
        with pytest.raises(ValueError, match="x: expected samples, since heads of any kind do not tell their sizes"):
            call(case, layer, x[:0], IDS[:0])
        return
    y = call(case, layer, x[:0], IDS[:0])
    assert y.shape == (0, *call(case, layer, x, IDS).shape[1:])


# --- dtypes


@ALL
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit(name: str, dtype: torch.dtype) -> None:
    """All in 16 bits: values and gradients against the same numbers in float64."""
    case, wide, x = made(name)
    narrow = copy.deepcopy(wide).to(dtype)
    wide.load_state_dict(narrow.state_dict())
    x = x.to(dtype) if x.is_floating_point() else x
    y = call(case, narrow, x, IDS)
    assert y.dtype == dtype
    expected = by_hand(case, wide, x.double() if x.is_floating_point() else x, IDS)
    torch.testing.assert_close(y.double(), expected, **tolerance_of(dtype, float(expected.detach().abs().max())))
    y.double().sum().backward()
    expected.sum().backward()
    largest = {key: float(p.grad.abs().max()) for key, p in wide.named_parameters()}
    for key, p in wide.named_parameters():
        g = narrow.get_parameter(key).grad
        assert g.dtype == dtype
        # through a softmax gradients cancel: that of a key's bias is exactly zero
        size = max(largest.values()) if "attention" in name else largest[key]
        torch.testing.assert_close(g.double(), p.grad, **tolerance_of(dtype, 2 * size))


@ALL
def test_autocast(name: str) -> None:
    case, wide, x = made(name)
    layer = copy.deepcopy(wide).float()
    wide.load_state_dict(layer.state_dict())
    x = x.float() if x.is_floating_point() else x
    with torch.autocast("cpu", torch.bfloat16):
        y = call(case, layer, x, IDS)
    # as in plain torch, embeddings and norms keep the dtype that they are given
    keep = ("embedding", "batch_norm", "layer_norm", "rms_norm")
    assert y.dtype == (torch.float32 if name.startswith(keep) else torch.bfloat16)
    expected = by_hand(case, wide, x.double() if x.is_floating_point() else x, IDS)
    size = float(expected.detach().abs().max())
    torch.testing.assert_close(y.double(), expected, **tolerance_of(torch.bfloat16, size))
    y.double().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())


# --- gradient surgery


@ALL
def test_surgery_leaves_the_tasks_tensors_alone(name: str) -> None:
    """Of two losses over one mixed batch the parts get the sum of their gradients."""
    case, layer, x = made(name)
    losses = [lambda y: y.square().mean(), lambda y: -y.sum()]
    fastmtl.backward([loss(call(case, layer, x, IDS)) for loss in losses])
    found = {key: layer.get_parameter(key).grad.clone() for key in own(layer)}
    layer.zero_grad()
    sum(loss(call(case, layer, x, IDS)) for loss in losses).backward()
    for key, g in found.items():
        torch.testing.assert_close(g, layer.get_parameter(key).grad)


# each task has all of its own in the others
SHARED = [n for n in CASES if not any(word in n for word in ("separate", "norm", "scale", "heads", "depth", "no_bias"))]


@pytest.mark.parametrize("name", SHARED)
def test_one_pass_gives_each_tasks_gradient_of_what_is_shared(name: str) -> None:
    case, layer, x = made(name)
    shared = [p for p in layer.parameters() if not is_per_task(p)]
    assert shared

    def losses() -> Tensor:
        return call(case, layer, x, IDS).flatten(1).square().sum(1)

    with fastmtl.one_pass(layer, IDS, 3) as bank:
        losses().sum().backward()
    for t in range(3):
        expected = torch.autograd.grad(losses()[t == IDS].sum(), shared, allow_unused=True)
        for row, g, p in zip(bank.row(t), expected, shared, strict=True):
            torch.testing.assert_close(row, torch.zeros_like(p) if g is None else g)


def _mixed_heads(**options: Any) -> TaskHeads:
    sizes = {"photo": 3, "sketch": 5, "clipart": 2}
    if options.pop("modules", False):
        return TaskHeads.from_modules(
            {t: nn.Sequential(nn.Linear(4, n), nn.Tanh()) for t, n in sizes.items()}, **options
        )
    return TaskHeads(4, sizes, **options)


@pytest.mark.parametrize(
    "head",
    [
        lambda: TaskHeads(4, dict.fromkeys(NAMES, 3)),
        lambda: _mixed_heads(),
        lambda: _mixed_heads(output="padded", fill=0.0),
        lambda: _mixed_heads(output="padded", fill=0.0, modules=True),
        lambda: _mixed_heads(output="list", modules=True),
    ],
    ids=["one_size", "list", "padded", "modules_padded", "modules_list"],
)
def test_one_pass_with_heads_by_task(head: Callable[[], TaskHeads]) -> None:
    """The trunk's task gradients are those of each task's samples alone."""
    net = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), head()).double()
    x, trunk = torch.randn(5, 6, dtype=torch.float64), list(net[0].parameters())

    def loss(ids: Tensor, x: Tensor) -> Tensor:
        with tasks(ids):
            y = net(x)
        return sum(part.square().sum() for part in (y if isinstance(y, list) else [y]))

    with fastmtl.one_pass(net, IDS, 3) as bank:
        loss(IDS, x).backward()
    for t in range(3):
        expected = torch.autograd.grad(loss(IDS[t == IDS], x[t == IDS]), trunk)
        for row, g in zip(bank.row(t), expected, strict=True):
            torch.testing.assert_close(row, g)


# --- compiled

COMPILED = [
    "conv_taps", "linear_ranks", "conv1d_separate", "embedding_taps", "embedding_separate", "attention_dense",
    "layer_norm", "scale_shift", "heads", "heads_padded", "modulator_conv", "hypergrid_linear",
]  # fmt: skip


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_once_for_all_ids(name: str) -> None:
    case, layer, x = made(name)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x: case.call(layer, x), backend=counter, fullgraph=True)
    for ids in (IDS, IDS.flip(0), torch.tensor([0, 0, 2, 2, 0])):
        with tasks(ids):
            y = compiled(x)
        expected = by_hand(case, layer, x, ids)
        torch.testing.assert_close(y, expected)
        g = torch.randn_like(y)
        wanted = list(layer.parameters())
        found = torch.autograd.grad(y, wanted, g, allow_unused=True)
        for a, b in zip(found, torch.autograd.grad(expected, wanted, g, allow_unused=True), strict=True):
            # in a graph a task without samples has a gradient of zero
            torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b)
    assert counter.frame_count == 1


# --- what a GPU sees without waiting


@pytest.mark.parametrize("gate", [None, 0.5])
def test_the_way_of_a_gpu_for_an_embedding(gate: float | None) -> None:
    """One table of all tasks, and NaN for a sample of no task."""
    case = CASES["embedding_gate" if gate else "embedding_dense"]
    layer, x = filled(case.make()), case.x()
    plan = fastmtl.ops.task_plan(IDS, 3)
    assert layer.gate is None or gate
    y = layer.weight[x] + layer._from_one_table(x, plan)
    torch.testing.assert_close(y, by_hand(case, layer, x, IDS))
    stray = plan._replace(task_ids=torch.tensor([2, 0, 3, -1, 2]))
    y = layer._from_one_table(x, stray)
    assert y[2:4].isnan().all() and not y[[0, 1, 4]].isnan().any()
    # nor does it read another task's table
    y = layer._from_one_table(x.index_fill(1, torch.tensor([3]), 9), plan)
    assert y[:, 3].isnan().all() and not y[:, [0, 1, 2, 4, 5]].isnan().any()


# --- gates


def test_a_closed_gate_reads_nothing() -> None:
    x = torch.tensor([1.0, torch.nan, 3.0], dtype=torch.float64, requires_grad=True)
    gate = torch.tensor([2.0, 0.0, 0.0], dtype=torch.float64, requires_grad=True)
    y = scaled_by_gate(x, gate)
    assert y.tolist() == [2.0, 0.0, 0.0]
    y.backward(torch.tensor([1.0, 1.0, torch.inf], dtype=torch.float64))
    assert x.grad.tolist() == [2.0, 0.0, 0.0]
    assert gate.grad[0] == 1 and gate.grad[1].isnan() and gate.grad[2] == torch.inf


def test_scaled_by_gate_twice() -> None:
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    gate = torch.randn(2, 1, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(scaled_by_gate, (x, gate))
    torch.autograd.gradgradcheck(scaled_by_gate, (x, gate))


def test_a_closed_embedding() -> None:
    """The score of a closed gate still learns; its delta is not read."""
    case, layer, x = made("embedding_taps")
    with torch.no_grad():
        layer.delta["photo"].fill_(torch.nan)
    y = call(case, layer, x, torch.zeros_like(IDS))
    assert torch.equal(y, layer.weight[x])
    y.sum().backward()
    assert not layer.delta["photo"].grad.any() and layer.gate["photo"].grad.isnan()
    with torch.no_grad():
        for score in layer.gate.values():
            score.zero_()
        for delta in layer.delta.values():
            delta.fill_(torch.nan)
        assert torch.equal(call(case, layer, x, IDS), layer.weight[x])


# --- one kind of layer each


def test_embedding_trains_no_padding() -> None:
    layer = TaskEmbedding(5, 3, NAMES, padding_idx=-1, gate=0.5)
    assert layer.padding_idx == 4 and not layer.weight[4].any() and layer.weight[:4].std() > 0
    assert layer.extra_repr() == "5, 3, padding_idx=4, tasks=['photo', 'sketch', 'clipart'], gate=0.5"
    with tasks("photo"):
        layer(torch.tensor([[4, 4], [4, 4]])).sum().backward()
    assert not layer.weight.grad.any() and not layer.delta["photo"].grad.any() and layer.gate["photo"].grad == 0


def test_embedding_of_positions() -> None:
    """Numbers of all samples in one row, as BERT and GPT-2 have them for positions."""
    layer, x = filled(TaskEmbedding(9, 4, NAMES)), torch.arange(6)[None]
    with tasks(IDS):
        y = layer(x)
        assert torch.equal(y, layer(x.expand(5, 6)))
    with tasks("photo"):
        assert torch.equal(layer(x), y[1:2])
    with tasks(IDS[:, None]), pytest.raises(ValueError, match="task_ids: expected shape"):
        layer(x)


@pytest.mark.parametrize("ids", [IDS, torch.tensor([0, 0, 2, 0, 2])], ids=["all", "one_absent"])
@pytest.mark.parametrize("modules", [False, True])
def test_heads_of_different_sizes_give_a_list(modules: bool, ids: Tensor) -> None:
    layer = filled(TaskHeads(4, {"photo": 3, "sketch": 5, "clipart": 2}))
    if modules:
        heads = {name: nn.Sequential(copy.deepcopy(head)) for name, head in layer.heads.items()}
        layer = TaskHeads.from_modules(heads, output="list")
    x = torch.randn(5, 2, 4, dtype=torch.float64, requires_grad=True)
    with tasks(ids):
        found = layer(x)
    assert isinstance(found, list) and len(found) == 3
    for t, task in enumerate(NAMES):
        if not (ids == t).any():
            assert len(found[t]) == 0 and (modules or found[t].shape == (0, 2, layer.sizes[task]))
            continue
        torch.testing.assert_close(found[t], layer.heads[task](x[ids == t]))
    sum(y.square().sum() for y in found).backward()
    for t, task in enumerate(NAMES):
        assert all((p.grad is not None) == bool((ids == t).any()) for p in layer.heads[task].parameters())


def test_heads_as_a_list_of_tokens() -> None:
    layer, x = filled(TaskHeads(4, dict.fromkeys(NAMES, 5), output="list")), torch.randn(2, 3, 4, dtype=torch.float64)
    ids = torch.tensor([[0, 2, 2], [1, 0, 2]])
    with tasks(ids):
        found = layer(x)
    for t, task in enumerate(NAMES):
        torch.testing.assert_close(found[t], layer.heads[task](x[ids == t]))


def test_heads_padded_without_a_column_of_their_own() -> None:
    """By default a softmax gives nothing to the columns that a head has not, and nothing is learned from them."""
    layer = filled(TaskHeads(4, {"photo": 3, "sketch": 5}, output="padded"))
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    with tasks(["photo", "sketch"]):
        y = layer(x)
    assert torch.equal(y.softmax(1)[0, 3:], torch.zeros(2, dtype=torch.float64)) and y[1].isfinite().all()
    nn.functional.cross_entropy(y, torch.tensor([2, 4])).backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in (x, *layer.parameters()))


def test_heads_of_any_kind_are_held_and_marked() -> None:
    norm = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5))
    layer = TaskHeads.from_modules({"left": norm, "right": nn.Linear(4, 5)})
    assert layer.heads["left"] is norm and all(is_per_task(p) for p in norm.parameters())
    assert set(layer.part("left")) == set(norm.state_dict())
    with pytest.raises(ValueError, match="module: expected the head of 'late', or like=, since not all heads"):
        layer.add_task("late")
    layer.add_task("late", module=nn.Linear(4, 5))
    layer.add_task("later", like="left")
    assert layer.tasks == ("left", "right", "late", "later")
    with tasks(["later", "late", "later"]):
        assert layer(torch.randn(3, 4)).shape == (3, 5)
    assert norm[1].num_batches_tracked == 0 and layer.heads["later"][1].num_batches_tracked == 1
    merged = layer.merged("left")
    assert merged is not norm and isinstance(merged[1], nn.BatchNorm1d)


def test_heads_that_differ_need_to_be_told() -> None:
    layer = TaskHeads(4, {"a": 2, "b": 3})
    with pytest.raises(ValueError, match="size: expected that of the head of 'c', or like=, since the heads' sizes"):
        layer.add_task("c")
    layer.add_task("c", size=7)
    layer.add_task("d", like="a")
    assert layer.sizes == {"a": 2, "b": 3, "c": 7, "d": 2}


@pytest.mark.parametrize(
    "options", [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}], ids=str
)
def test_batch_norm_of_a_mixed_batch_is_that_of_each_task(options: dict[str, Any]) -> None:
    """Two steps in training, one in evaluation; the last task is in the first batch alone."""
    plain = nn.BatchNorm2d(4, **options).double()
    layer = TaskBatchNorm2d.from_layer(plain, NAMES)
    single = {task: copy.deepcopy(plain) for task in NAMES}
    for step, ids in enumerate((IDS, torch.tensor([1, 0, 1, 0, 0]), IDS)):
        training = step < 2
        x = torch.randn(5, 4, 3, 2, dtype=torch.float64, requires_grad=True)
        with tasks(ids):
            y = layer.train(training)(x)
        g = torch.randn_like(y)
        (found,) = torch.autograd.grad(y, x, g)
        for t in ids.unique().tolist():
            part = x.detach()[ids == t].requires_grad_()
            expected = single[NAMES[t]].train(training)(part)
            torch.testing.assert_close(y[ids == t], expected)
            torch.testing.assert_close(found[ids == t], torch.autograd.grad(expected, part, g[ids == t])[0])
    for task, norm in single.items():
        for key, value in layer.part(task).items():
            torch.testing.assert_close(value, getattr(norm, key))
        assert layer.merged(task).state_dict().keys() == norm.state_dict().keys()


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "masks",
    [
        {},
        {"need_weights": False},
        {"average_attn_weights": False},
        {"key_padding_mask": "bool"},
        {"key_padding_mask": "bool", "need_weights": False},
        {"key_padding_mask": "float", "attn_mask": 2},
        {"key_padding_mask": "bool", "attn_mask": 3, "need_weights": False},
        {"attn_mask": 3},
        {"attn_mask": "bool", "need_weights": False},
    ],
    ids=str,
)
def test_attention_has_the_results_of_the_plain_one(batch_first: bool, training: bool, bias: bool, masks: dict) -> None:
    """Other keys than queries; dropout draws the same numbers."""
    plain = nn.MultiheadAttention(8, 2, 0.3, bias, batch_first=batch_first).double().train(training)
    layer = TaskMultiheadAttention.from_layer(plain, NAMES)
    assert layer.out_proj.weight is plain.out_proj.weight
    query, keys = torch.randn(5, 4, 8, dtype=torch.float64), torch.randn(5, 3, 8, dtype=torch.float64)
    if not batch_first:
        query, keys = query.transpose(0, 1), keys.transpose(0, 1)
    padding = torch.zeros(5, 3, dtype=torch.bool)
    padding[1, 2:] = padding[4, :1] = True
    hidden = (torch.rand(10, 4, 3) > 0.6).index_fill(2, torch.tensor([1]), False)
    given = {
        "key_padding_mask": {"bool": padding, "float": padding.double() * -3.0},
        "attn_mask": {2: torch.randn(4, 3).double(), 3: hidden, "bool": hidden[0]},
    }
    options = {key: given[key][value] if key in given else value for key, value in masks.items()}
    torch.manual_seed(5)
    expected = plain(query, keys, keys, **options)
    torch.manual_seed(5)
    with tasks(IDS):
        found = layer(query, keys, keys, **options)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_causal_attention(need_weights: bool, padded: bool) -> None:
    plain = nn.MultiheadAttention(8, 2, batch_first=True).double()
    layer, x = TaskMultiheadAttention.from_layer(plain, NAMES), torch.randn(5, 4, 8, dtype=torch.float64)
    options = {"attn_mask": nn.Transformer.generate_square_subsequent_mask(4, dtype=torch.float64), "is_causal": True}
    if padded:
        options["key_padding_mask"] = torch.zeros(5, 4, dtype=torch.float64)
    with tasks(IDS):
        found = layer(x, x, x, need_weights=need_weights, **options)
        with pytest.raises(ValueError, match="attn_mask: expected a mask beside is_causal=True"):
            layer(x, x, x, is_causal=True)
    torch.testing.assert_close(found, plain(x, x, x, need_weights=need_weights, **options))


@pytest.mark.parametrize("masked", [True, False])
def test_torchs_fused_encoder_does_not_pass_the_attention_by(masked: bool) -> None:
    """In eval it would read the weights past a forward, or make a nested tensor of a padding mask."""
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), 2)
    for block in model.layers:
        block.self_attn = TaskMultiheadAttention.from_layer(block.self_attn, NAMES)
        for inner in block.self_attn.inner_layers:
            for delta in inner.delta.values():
                nn.init.normal_(delta)
    x, padding = torch.randn(5, 4, 8), torch.zeros(5, 4, dtype=torch.bool)
    padding[:, 3:] = True
    with tasks(IDS), torch.no_grad():
        expected = model.train()(x, src_key_padding_mask=padding if masked else None)
        found = model.eval()(x, src_key_padding_mask=padding if masked else None)
    torch.testing.assert_close(found, expected)
    with pytest.raises(TypeError, match="in_proj_weight: expected the weights of q_proj"):
        torch.add(model.layers[0].self_attn.in_proj_weight, x)


def test_nested_tensors_are_refused() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1).eval()
    model.layers[0].linear1 = TaskLinear.from_layer(model.layers[0].linear1, 3)
    padding = torch.zeros(5, 4, dtype=torch.bool)
    padding[:, 3:] = True
    with tasks(IDS), torch.no_grad():
        with pytest.raises(ValueError, match="set its use_nested_tensor = False"):
            model(torch.randn(5, 4, 8), src_key_padding_mask=padding)
        model.use_nested_tensor = False
        assert model(torch.randn(5, 4, 8), src_key_padding_mask=padding).shape == (5, 4, 8)


def test_whatever_walks_a_model_finds_the_layers_inside_an_attention() -> None:
    """Gates, differences and parts of its projections count, each once; it is one plain layer when merged."""
    plain = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = convert(copy.deepcopy(plain), NAMES, "taps", nn.MultiheadAttention)
    attention = model.self_attn
    assert isinstance(attention, TaskMultiheadAttention)
    assert [path for path, _ in task_layers(model)] == [f"self_attn.{n}_proj" for n in ("q", "k", "v", "out")]
    assert sparsity_loss(model, "photo").item() == pytest.approx(0.15)
    gates = param_groups(model)[-1]
    assert gates["name"] == "gates" and len(gates["params"]) == 4 * 3
    filled(model, None)
    assert set(task_vectors(model)["sketch"]) == {f"self_attn.{n}_proj.weight" for n in ("q", "k", "v", "out")}
    report = layer_report(model)
    assert report.changed["photo"] == (False,) * 4 and report.changed["sketch"] == (True,) * 4
    assert sum(report.added["sketch"]) == 4 * 64 and report.base == sum(p.numel() for p in plain.parameters())
    other = convert(copy.deepcopy(plain), NAMES, "taps", nn.MultiheadAttention)
    other.load_state_dict({key: x for key, x in model.state_dict().items() if "delta" not in key}, strict=False)
    insert(other, "guest", extract(model, "sketch"))
    x = torch.randn(5, 4, 8)
    with tasks("sketch"):
        expected = model.eval()(x)
    with tasks("guest"):
        torch.testing.assert_close(other.eval()(x), expected)
    merged = merge(model, "sketch")
    assert isinstance(merged.self_attn, nn.MultiheadAttention)
    torch.testing.assert_close(merged(x), expected)
    merged.load_state_dict(plain.state_dict())


def test_attention_reset_as_the_plain_layer() -> None:
    for options in ({}, {"shared": False}):
        layer = TaskMultiheadAttention(64, 4, NAMES, **options)
        plain = nn.MultiheadAttention(64, 4)
        for task in NAMES:
            merged = layer.merged(task)
            assert abs(merged.in_proj_weight.std() / plain.in_proj_weight.std() - 1) < 0.05
            assert abs(merged.out_proj.weight.std() / plain.out_proj.weight.std() - 1) < 0.05
            assert not merged.in_proj_bias.any() and not merged.out_proj.bias.any()
            assert torch.equal(merged.in_proj_weight, layer.merged(0).in_proj_weight)


def test_a_modulator_freezes_what_is_shared() -> None:
    plain = nn.Conv2d(3, 8, 3)
    layer = TaskModulator.from_layer(plain, NAMES)
    assert layer.weight is plain.weight and {n for n, p in layer.named_parameters() if p.requires_grad} == own(layer)
    assert all(p.requires_grad for p in TaskModulator(nn.Linear(3, 8), NAMES, joint=True).parameters())
    assert all(p.requires_grad for p in layer.merged(0).parameters())


def test_a_modulator_of_groups_merges_into_one() -> None:
    layer = TaskModulator(nn.Conv2d(4, 6, 3, groups=2), NAMES)
    assert layer.merged("photo").groups == 2 and not layer.changed("photo")
    filled(layer, None)
    merged = layer.merged("photo")
    assert merged.groups == 1 and merged.weight.shape == (6, 4, 3, 3)
    assert layer.added("photo") == 36


@pytest.mark.parametrize(
    ("layer", "grid"),
    [
        (lambda: nn.Linear(24, 10), (10, 12)),
        (lambda: nn.Linear(17, 34), (2, 1)),
        (lambda: nn.Conv2d(8, 64, 3, groups=2), (16, 8)),
        (lambda: transformers_conv1d(32, 7), (16, 7)),
    ],
)
def test_default_grid(layer: Callable[[], nn.Module], grid: tuple[int, int]) -> None:
    made = TaskHyperGrid.from_layer(layer(), NAMES)
    assert made.grid == grid and len(made.row["photo"]) == grid[0] and len(made.column["photo"]) == grid[1]
    assert f"grid={grid}" in repr(made)


def test_a_scale_and_shift_merges_where_it_does_nothing() -> None:
    layer = TaskScaleShift(4, NAMES)
    assert isinstance(layer.merged("photo"), nn.Identity)
    with torch.no_grad():
        layer.shift["photo"].add_(1)
    with pytest.raises(ValueError, match="task 'photo': expected a layer that plain torch has"):
        layer.merged("photo")
