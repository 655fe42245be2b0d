"""`fastmtl.nn`: per-task layers against plain torch, the context that tells the tasks, and training."""

from __future__ import annotations

import copy
import io
import pickle
import sys
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import fastmtl
from fastmtl.nn import TaskConv2d, TaskLinear, TaskParameters, checkpoint_contexts, context, tasks
from fastmtl.parameters import is_per_task

NAMES = ["photo", "sketch", "clipart"]
IDS = torch.tensor([2, 0, 1, 0, 2])


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    yield
    assert context._current is None and not context._entered


def filled(layer: nn.Module) -> nn.Module:
    """The layer with random numbers in every parameter."""
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn(p.shape))
    return layer


def by_hand(layer: TaskConv2d | TaskLinear, x: Tensor, ids: Tensor) -> Tensor:
    """Each sample on its own through plain torch, from the layer's parameters."""
    rows = []
    for sample, t in zip(x, ids.tolist(), strict=True):
        name = layer.tasks[t]
        scale = 1.0 if layer.gate is None else layer.gate[name]
        weight = layer.weight + scale * layer.delta[name]
        bias = layer.bias
        if layer.task_bias is not None:
            bias = layer.task_bias[name] + (0.0 if bias is None else bias)
        if isinstance(layer, TaskLinear):
            rows.append(F.linear(sample, weight, bias))
        else:
            geometry = layer.stride, layer.padding, layer.dilation, layer.groups
            rows.append(F.conv2d(sample[None], weight, bias, *geometry)[0])
    return torch.stack(rows)


def make(kind: type[nn.Module] = TaskLinear, names: object = NAMES, **options: object) -> nn.Module:
    """A small layer in float64, all its numbers random."""
    size = (4, 6, 3) if kind is TaskConv2d else (4, 6)
    return filled(kind(*size, names, dtype=torch.float64, **options))


def picture(n: int = len(IDS)) -> Tensor:
    return torch.randn(n, 4, 7, 6, dtype=torch.float64)


def assert_same_gradients(layer: nn.Module, x: Tensor, ids: Tensor) -> None:
    """Values and every gradient against `by_hand`."""
    x = x.requires_grad_()
    with tasks(ids):
        y = layer(x)
    expected = by_hand(layer, x, ids)
    torch.testing.assert_close(y, expected)
    g = torch.randn_like(y)
    wanted = [x, *layer.parameters()]
    found = torch.autograd.grad(y, wanted, g, allow_unused=True)
    for a, b in zip(found, torch.autograd.grad(expected, wanted, g, allow_unused=True), strict=True):
        if a is None or b is None:
            # of a task without samples: nothing at all, or zero
            assert (a is None or not a.any()) and (b is None or not b.any())
        else:
            torch.testing.assert_close(a, b)


OPTIONS = [{}, {"gate": 0.5}, {"per_task_bias": True}, {"gate": 1.0, "per_task_bias": True, "bias": False}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(
    "geometry",
    [
        {},
        {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)},
        {"padding": "same", "groups": 2},
        {"padding": "valid"},
    ],
    ids=str,
)
def test_conv_equals_plain_torch(options: dict, geometry: dict) -> None:
    assert_same_gradients(make(TaskConv2d, **options, **geometry), picture(), IDS)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", [(5, 4), (5, 3, 4), (5, 2, 3, 4)], ids=str)
def test_linear_equals_plain_torch(options: dict, shape: tuple[int, ...]) -> None:
    assert_same_gradients(make(**options), torch.randn(shape, dtype=torch.float64), IDS)


def test_linear_takes_an_id_per_token() -> None:
    layer, x = make(), torch.randn(2, 5, 4, dtype=torch.float64)
    ids = torch.tensor([[0, 2, 2, 1, 0], [1, 1, 0, 2, 2]], dtype=torch.int32)
    with tasks(ids):
        y = layer(x)
    torch.testing.assert_close(y.flatten(0, 1), by_hand(layer, x.flatten(0, 1), ids.flatten()))


def test_an_absent_task_has_no_gradient() -> None:
    layer = make(TaskConv2d, gate=1.0, per_task_bias=True)
    with tasks(torch.tensor([0, 0, 2])):
        layer(picture(3)).square().sum().backward()
    assert layer.delta["sketch"].grad is None and layer.delta["photo"].grad.any()
    assert layer.gate["sketch"].grad is None and layer.task_bias["sketch"].grad is None
    assert layer.gate["photo"].grad.any() and layer.task_bias["photo"].grad.any()


@pytest.mark.parametrize("layers", [1, 2])
def test_torchs_fused_transformer_does_not_pass_the_deltas_by(layers: int) -> None:
    block = torch.nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    block.linear1, block.linear2 = (TaskLinear.from_layer(x, NAMES) for x in (block.linear1, block.linear2))
    for name, p in block.named_parameters():
        if "delta" in name:
            torch.nn.init.normal_(p)
    model = torch.nn.TransformerEncoder(block, layers)
    x, ids = torch.randn(3, 5, 8), torch.tensor([2, 0, 1])
    with tasks(ids):
        expected = model.train()(x)
        with torch.no_grad():
            torch.testing.assert_close(model.eval()(x), expected)


def test_the_projection_of_an_attention_is_refused() -> None:
    with pytest.raises(TypeError, match=r"out_proj of nn\.MultiheadAttention"):
        TaskLinear.from_layer(torch.nn.MultiheadAttention(8, 2).out_proj, NAMES)


# --- made from plain layers

PLAIN = {
    "conv": lambda: (nn.Conv2d(4, 6, 3, 2, 1), TaskConv2d, torch.randn(5, 4, 7, 6)),
    "grouped": lambda: (nn.Conv2d(4, 6, 3, padding="same", groups=2, bias=False), TaskConv2d, torch.randn(5, 4, 7, 6)),
    "linear": lambda: (nn.Linear(4, 6), TaskLinear, torch.randn(5, 3, 4)),
    "double": lambda: (nn.Linear(4, 6, bias=False).double(), TaskLinear, torch.randn(5, 4).double()),
}  # fmt: skip


@pytest.mark.parametrize("kind", PLAIN)
def test_from_layer_starts_as_the_plain_layer(kind: str) -> None:
    plain, kind, x = PLAIN[kind]()
    plain.weight.requires_grad_(False)
    plain.eval()
    state = torch.get_rng_state()
    layer = kind.from_layer(plain, NAMES, gate=0.5, per_task_bias=True)
    assert torch.equal(torch.get_rng_state(), state), "it drew random numbers"
    with tasks(IDS):
        torch.testing.assert_close(layer(x), plain(x))
    assert layer.weight is plain.weight and layer.bias is plain.bias and not layer.training
    assert not layer.weight.requires_grad and all(d.requires_grad for d in layer.delta.values())
    assert all(d.dtype == x.dtype for d in layer.parameters())
    fresh = kind.from_layer(copy.deepcopy(plain), NAMES, gate=0.5, per_task_bias=True)
    missing, unexpected = fresh.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected and all(key.split(".")[0] in ("delta", "gate", "task_bias") for key in missing)


def test_from_layer_keeps_the_memory_order() -> None:
    plain = nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last)
    layer = TaskConv2d.from_layer(plain, 2)
    assert all(d.is_contiguous(memory_format=torch.channels_last) for d in layer.delta.values())
    layer = TaskConv2d(4, 6, 3, 2).to(memory_format=torch.channels_last)
    assert all(d.is_contiguous(memory_format=torch.channels_last) for d in layer.delta.values())
    x = torch.randn(2, 4, 5, 5).to(memory_format=torch.channels_last)
    with tasks(torch.tensor([1, 0])):
        y = layer(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, by_hand(layer, x, torch.tensor([1, 0])), rtol=1e-5, atol=1e-5)


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight - self.weight.mean(), self.bias)


def _hooked(layer: nn.Module) -> nn.Module:
    layer.register_forward_hook(lambda *args: None)
    return layer


@pytest.mark.parametrize(
    ("kind", "layer", "error", "match"),
    [
        (TaskConv2d, lambda: nn.Linear(2, 2), TypeError, r"layer: expected nn\.Conv2d, got Linear"),
        (TaskLinear, lambda: nn.Conv2d(2, 2, 1), TypeError, r"layer: expected nn\.Linear, got Conv2d"),
        (TaskConv2d, lambda: Standardised(2, 2, 1), TypeError, "layer: expected the forward of nn.Conv2d"),
        (TaskConv2d, lambda: nn.Conv2d(2, 2, 1, padding_mode="reflect"), ValueError, "'zeros', got 'reflect'"),
        (TaskLinear, lambda: nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)), ValueError, "is computed"),
        (TaskLinear, lambda: nn.LazyLinear(2), ValueError, "not initialised"),
        (TaskLinear, lambda: _hooked(nn.Linear(2, 2)), ValueError, "layer: expected no hooks"),
    ],
)
def test_from_layer_refuses(kind: type, layer: Callable, error: type, match: str) -> None:
    with pytest.raises(error, match=match):
        kind.from_layer(layer(), 2)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: TaskLinear(2, 2, 0), ValueError, "tasks: expected at least 1, got 0"),
        (lambda: TaskLinear(2, 2, []), ValueError, "tasks: expected at least one name, got none"),
        (lambda: TaskLinear(2, 2, True), TypeError, "tasks: expected a number or a sequence of names, got bool"),
        (lambda: TaskLinear(2, 2, "ab"), TypeError, "tasks: expected a number or a sequence of names, got str"),
        (lambda: TaskLinear(2, 2, ["a", "a"]), ValueError, "tasks: expected different names"),
        (lambda: TaskLinear(2, 2, ["a.b"]), ValueError, "without dots that are not empty, got 'a.b'"),
        (lambda: TaskLinear(2, 2, [""]), ValueError, "without dots that are not empty, got ''"),
        (lambda: TaskLinear(2, 2, ["keys"]), ValueError, "no attribute of nn.ParameterDict, got 'keys'"),
        (lambda: TaskLinear(2, 2, ["training"]), ValueError, "no attribute of nn.ParameterDict, got 'training'"),
        (lambda: TaskLinear(2, 2, [1]), TypeError, r"tasks: expected names \(str\), got int"),
        (lambda: TaskLinear(2, 2, 2, gate=True), TypeError, "gate: expected a number, a TapsGate or None, got bool"),
        (lambda: TaskLinear(2, 2, 2, gate=float("nan")), ValueError, "gate: expected a finite number, got nan"),
        (lambda: TaskConv2d(3, 4, 1, 2, groups=2), ValueError, "groups: expected a divisor of in_channels = 3"),
        (lambda: TaskConv2d(2, 2, 3, 2, stride=2, padding="same"), ValueError, "padding: 'same' needs stride 1"),
        (lambda: TaskConv2d(2, 2, 0, 2), ValueError, "kernel_size: expected at least 1"),
        (lambda: TaskLinear(2, 2, ["a"]).add_task("a"), ValueError, "name: expected a new task, got 'a'"),
        (lambda: TaskLinear(2, 2, ["a"]).add_task("a.b"), ValueError, "got 'a.b'"),
        (lambda: TaskLinear(2, 2, ["a"]).effective_weight("b"), ValueError, "task: expected one of a, got 'b'"),
        (lambda: TaskLinear(2, 2, ["a"]).effective_weight(1), ValueError, r"task: expected 0\.\.0, got 1"),
        (lambda: TaskLinear(2, 2, ["a"]).effective_bias(None), TypeError, "a position or a name, got NoneType"),
        (lambda: TaskParameters({"pop": torch.ones(1)}), ValueError, "got 'pop'"),
        (
            lambda: tasks([0, 1]),
            TypeError,
            r"task_ids: expected a tensor of ids, or names \(str\), got a list with int in it; torch\.tensor",
        ),
        (lambda: tasks(["a", 1]), TypeError, r"task_ids: expected a tensor of ids, .* got a list with int in it$"),
        (lambda: tasks(torch.ones(2)), TypeError, "task_ids: expected int64 or int32, got torch.float32"),
    ],
)
def test_bad_arguments(call: Callable, error: type, match: str) -> None:
    with pytest.raises(error, match=match):
        call()


def test_effective_weight_and_bias() -> None:
    layer = make(TaskConv2d, gate=0.5, per_task_bias=True, padding=1)
    x = picture()
    with tasks(IDS):
        y = layer(x)
    for t, name in enumerate(NAMES):
        w, b, rows = layer.effective_weight(name), layer.effective_bias(t), torch.eq(IDS, t)
        torch.testing.assert_close(F.conv2d(x[rows], w, b, padding=1), y[rows])
    layer.effective_weight("photo").sum().backward()
    torch.testing.assert_close(layer.gate["photo"].grad, layer.delta["photo"].sum())
    assert layer.gate["sketch"].grad is None
    with torch.no_grad():
        layer.gate["photo"].zero_()
        layer.delta["photo"].fill_(torch.nan)
        assert torch.equal(layer.effective_weight("photo"), layer.weight)


def test_repr_names_what_differs() -> None:
    conv = TaskConv2d(4, 6, 3, ["a", "b"], 2, "valid", bias=False, gate=1.0)
    assert conv.extra_repr() == "4, 6, kernel_size=(3, 3), stride=(2, 2), tasks=['a', 'b'], bias=False, gate=1"
    assert TaskLinear(4, 6, 30, per_task_bias=True).extra_repr().endswith("tasks=30, per_task_bias=True")
    assert "30 x [6, 4]" in repr(TaskLinear(4, 6, 30)) and len(repr(TaskLinear(4, 6, 30)).splitlines()) < 10


# --- the context


def test_without_a_context_it_says_what_to_do() -> None:
    with pytest.raises(RuntimeError, match=r"TaskConv2d: .* inside `with fastmtl\.nn\.tasks\(task_ids\):`"):
        make(TaskConv2d)(picture())


def test_the_inner_block_counts_and_the_outer_one_comes_back() -> None:
    layer, x = make(), torch.randn(2, 4, dtype=torch.float64)
    first, second = torch.tensor([0, 1]), torch.tensor([2, 2])
    with tasks(first):
        with pytest.raises(KeyError), tasks(second):
            torch.testing.assert_close(layer(x), by_hand(layer, x, second))
            raise KeyError
        torch.testing.assert_close(layer(x), by_hand(layer, x, first))
        again = tasks(second)
        with again, again:
            pass
        torch.testing.assert_close(layer(x), by_hand(layer, x, first))
    with pytest.raises(RuntimeError, match="not known"):
        layer(x)


def test_blocks_that_end_out_of_turn() -> None:
    layer, x = make(), torch.randn(2, 4, dtype=torch.float64)
    first, second = tasks(torch.tensor([0, 1])), tasks(torch.tensor([2, 2]))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    torch.testing.assert_close(layer(x), by_hand(layer, x, second.task_ids))
    second.__exit__(None, None, None)


def test_backward_after_the_block_and_inside_another() -> None:
    layer, x = make(TaskConv2d), picture()
    with tasks(IDS):
        y = layer(x)
    (expected,) = torch.autograd.grad(by_hand(layer, x, IDS).square().sum(), layer.weight)
    with tasks(torch.zeros(3, dtype=torch.int64)):
        torch.testing.assert_close(torch.autograd.grad(y.square().sum(), layer.weight)[0], expected)


def test_it_holds_in_other_threads() -> None:
    layer, x, found = make(), torch.randn(5, 4, dtype=torch.float64), []
    with tasks(IDS):
        thread = threading.Thread(target=lambda: found.append(layer(x)))
        thread.start()
        thread.join()
    torch.testing.assert_close(found[0], by_hand(layer, x, IDS))


def test_each_thread_sees_its_own_blocks() -> None:
    layer, x, found = make(), torch.randn(5, 4, dtype=torch.float64), {}
    meet = threading.Barrier(2, timeout=60)

    def run(name: str, ids: torch.Tensor) -> None:
        with tasks(ids.flip(0)):
            with tasks(ids):
                meet.wait()  # both are in their blocks
                found[name] = [layer(x)]
                meet.wait()
            found[name].append(layer(x))
            meet.wait()

    threads = [threading.Thread(target=run, args=(name, ids)) for name, ids in (("a", IDS), ("b", IDS.roll(1)))]
    with tasks(IDS.roll(2)):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        torch.testing.assert_close(layer(x), by_hand(layer, x, IDS.roll(2)))
    for name, ids in (("a", IDS), ("b", IDS.roll(1))):
        torch.testing.assert_close(found[name][0], by_hand(layer, x, ids))
        torch.testing.assert_close(found[name][1], by_hand(layer, x, ids.flip(0)))


def test_a_thread_keeps_its_own_block_while_another_one_enters_and_leaves() -> None:
    """Threads are switched wherever they can be: a block that is half entered must not be seen."""
    ended, before = threading.Event(), sys.getswitchinterval()

    def run() -> None:
        while not ended.is_set():
            with tasks("sketch"):
                pass

    other = threading.Thread(target=run)
    sys.setswitchinterval(1e-6)
    try:
        other.start()
        with tasks("photo") as own:
            seen = {context.current_tasks() is own for _ in range(200_000)}
    finally:
        sys.setswitchinterval(before)
        ended.set()
        other.join()
    assert seen == {True}


def test_a_network_sorts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sorted_for = []
    monkeypatch.setattr(context, "task_plan", lambda ids, n: sorted_for.append(n) or fastmtl.ops.task_plan(ids, n))
    net = nn.Sequential(*(filled(TaskLinear(4, 4, n)) for n in (3, 3, 5, 3)))
    ids, x = IDS.clone(), torch.randn(5, 4)
    with tasks(ids):
        net(x)
        net(x)
        assert sorted_for == [3, 5]
        ids.copy_(torch.tensor([0, 0, 1, 1, 2]))
        torch.testing.assert_close(net[0](x), by_hand(net[0], x, ids))
        assert sorted_for == [3, 5, 3]
    with tasks(fastmtl.ops.task_plan(ids, 3)):
        torch.testing.assert_close(net[0](x), by_hand(net[0], x, ids))
        with pytest.raises(ValueError, match="expected a plan of 5 tasks, got one of 3"):
            net[2](x)
    assert sorted_for == [3, 5, 3]


def test_inference_mode_and_training_in_one_block() -> None:
    layer, x = make(), torch.randn(5, 4, dtype=torch.float64)
    with tasks(IDS):
        with torch.inference_mode():
            seen = layer(x)
        y = layer(x)
    y.sum().backward()
    assert torch.equal(seen, y) and layer.weight.grad.any()


def test_ids_that_do_not_fit() -> None:
    layer = make(TaskConv2d)
    with tasks(torch.tensor([0, 1, 3, 0, 0])), pytest.raises(ValueError, match="expected ids from 0 to 2, got 3"):
        layer(picture())
    with tasks(torch.tensor([0, 1])), pytest.raises(ValueError, match=r"task_ids: expected shape \[5\]"):
        layer(picture())


class Net(nn.Module):
    """An ordinary network: a trunk, the parts that a checkpoint or a compiler takes, and two heads."""

    def __init__(self, checkpointed: object = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, padding=1)
        self.mixer = nn.Linear(6, 6)
        self.heads = nn.ModuleList(nn.Linear(6, 1) for _ in range(2))
        self.checkpointed = checkpointed

    def trunk(self, x: Tensor) -> Tensor:
        return self.mixer(F.relu(self.conv(x)).flatten(2).mT).tanh().mean(1)

    def forward(self, x: Tensor) -> Tensor:
        features = self.trunk(x) if self.checkpointed is None else checkpoint(self.trunk, x, **self.checkpointed)
        return torch.cat([head(features) for head in self.heads], 1)


def task_net(checkpointed: object = None, **options: object) -> Net:
    torch.manual_seed(1)
    net = Net(checkpointed)
    net.conv = TaskConv2d.from_layer(net.conv, NAMES, **options)
    net.mixer = TaskLinear.from_layer(net.mixer, NAMES, **options)
    for layer in (net.conv, net.mixer):
        with torch.no_grad():
            for d in layer.delta.values():
                d.normal_(std=0.3)
    return net.double()


def gradients(net: nn.Module) -> dict[str, Tensor | None]:
    return {name: p.grad for name, p in net.named_parameters()}


def assert_same(found: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> None:
    assert found.keys() == expected.keys()
    for name, g in expected.items():
        torch.testing.assert_close(found[name], g, msg=lambda text, name=name: f"{name}: {text}")


def plain_gradients(x: Tensor, ids: Tensor) -> dict[str, Tensor | None]:
    net = task_net()
    with tasks(ids):
        net(x).square().sum().backward()
    return gradients(net)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_with_backward_inside_the_block(reentrant: bool) -> None:
    net, x = task_net({"use_reentrant": reentrant}), picture().requires_grad_()
    with tasks(IDS):
        net(x).square().sum().backward()
    assert_same(gradients(net), plain_gradients(x.detach(), IDS))


def test_checkpoint_with_backward_outside_says_so() -> None:
    net = task_net({"use_reentrant": False})
    with tasks(IDS):
        y = net(picture())
    with pytest.raises(RuntimeError, match=r"recomputes .* call backward\(\) inside the block"):
        y.sum().backward()


def test_checkpoint_that_keeps_its_tasks() -> None:
    """Two batches, one backward pass, inside the block of neither."""
    net = task_net({"use_reentrant": False, "context_fn": checkpoint_contexts})
    x, other, other_ids = picture(), picture(3), torch.tensor([1, 1, 0])
    with tasks(IDS):
        loss = net(x).square().sum()
    with tasks(other_ids):
        loss = loss + net(other).square().sum()
    loss.backward()
    both = plain_gradients(x, IDS), plain_gradients(other, other_ids)
    assert_same(gradients(net), {k: _sum(both[0][k], both[1][k]) for k in both[0]})


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return a if b is None else b if a is None else a + b


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("given", ["ids", "plan"])
def test_compiled_once_for_all_ids(given: str) -> None:
    net, eager = task_net(gate=0.7, per_task_bias=True), task_net(gate=0.7, per_task_bias=True)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(net, backend=counter, fullgraph=True)
    for step in range(4):
        x, ids = picture(), torch.tensor([0, 1, 2, step % 3, 0]).roll(step)
        task_ids = ids if given == "ids" else fastmtl.ops.task_plan(ids, 3)
        for model, call in ((net, compiled), (eager, eager)):
            model.zero_grad()
            with tasks(torch.zeros(1, dtype=torch.int64)), tasks(task_ids):
                loss = call(x).square().sum()
            loss.backward()
        assert_same(gradients(net), gradients(eager))
    assert counter.frame_count == 1


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_with_the_block_inside() -> None:
    net, counter = task_net(), CompileCounterWithBackend("aot_eager")

    def loss(x: Tensor, ids: Tensor) -> Tensor:
        with tasks(ids):
            return net(x).square().sum()

    compiled = torch.compile(loss, backend=counter, fullgraph=True)
    for ids in (IDS, IDS.flip(0)):
        x = picture()
        torch.testing.assert_close(compiled(x, ids), loss(x, ids))
    assert counter.frame_count == 1


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("given", ["ids", "plan"])
def test_a_compiled_model_that_is_given_ids_itself_takes_its_tasks_from_the_block(given: str) -> None:
    # the first call has one tensor for both, which the graph must not take for a rule
    layer, table = filled(TaskLinear(4, 6, NAMES)), torch.randn(3, 6)

    def model(x: Tensor, ids: Tensor) -> Tensor:
        return layer(x) + table[ids]

    compiled, x, others = torch.compile(model, backend="eager", fullgraph=True), torch.randn(5, 4), IDS.roll(1)
    for of_block, of_model in ((IDS, IDS), (IDS, others), (others, IDS)):
        told = of_block
        if given == "plan":
            told = fastmtl.ops.task_plan(of_block, 3)
            of_model = told.task_ids if of_model is of_block else of_model
        with tasks(told):
            torch.testing.assert_close(compiled(x, of_model), model(x, of_model))


def test_autocast_casts_the_input_only() -> None:
    layer, x = filled(TaskConv2d(4, 6, 3, NAMES, gate=0.5, per_task_bias=True)), torch.randn(5, 4, 7, 6)
    with torch.autocast("cpu", torch.bfloat16), tasks(IDS):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    wide = copy.deepcopy(layer).double()
    expected = by_hand(wide, x.bfloat16().double(), IDS)
    torch.testing.assert_close(y.double(), expected, rtol=2e-2, atol=2e-2 * float(expected.detach().abs().max()))
    expected.square().sum().backward()
    for name, p in layer.named_parameters():
        assert p.grad.dtype == torch.float32
        g = wide.get_parameter(name).grad
        torch.testing.assert_close(p.grad.double(), g, rtol=5e-2, atol=3e-2 * float(g.abs().max()))


# --- copies, conversions, saved states


def marked(module: nn.Module) -> bool:
    own = [(name, is_per_task(p)) for name, p in module.named_parameters()]
    assert own
    return all(mark == (name.split(".")[0] in ("delta", "gate", "task_bias")) for name, mark in own)


def through_pickle(layer: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(layer))


def through_torch_save(layer: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def through_assigned_state(layer: nn.Module) -> nn.Module:
    state = {key: value.clone() for key, value in layer.state_dict().items()}
    made = make(TaskConv2d, gate=1.0, per_task_bias=True)
    made.load_state_dict(state, assign=True)
    return made


def through_meta(layer: nn.Module) -> nn.Module:
    made = TaskConv2d(4, 6, 3, NAMES, gate=1.0, per_task_bias=True, device="meta", dtype=torch.float64)
    made.to_empty(device="cpu").load_state_dict(layer.state_dict())
    return made


def through_swapped_state(layer: nn.Module) -> nn.Module:
    made = make(TaskConv2d, gate=1.0, per_task_bias=True)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        made.load_state_dict(copy.deepcopy(layer.state_dict()))
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    return made


WAYS = {
    "deepcopy": copy.deepcopy,
    "pickle": through_pickle,
    "torch_save": through_torch_save,
    "assign": through_assigned_state,
    "swap": through_swapped_state,
    "meta": through_meta,
    "double": lambda layer: layer.double(),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_copies_and_conversions(way: Callable[[nn.Module], nn.Module]) -> None:
    layer = make(TaskConv2d, gate=1.0, per_task_bias=True)
    assert marked(layer)
    made = way(layer)
    assert marked(made) and made.tasks == layer.tasks
    x = picture()
    with tasks(IDS):
        assert torch.equal(made(x), layer(x))
    made.add_task("late")
    assert marked(made) and made.delta["late"].dtype == torch.float64


def test_conversion_to_other_parameters_keeps_the_marks() -> None:
    layer = TaskLinear(2, 2, NAMES, gate=1.0)
    before = layer.delta["photo"]
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        layer.to(torch.bfloat16)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    assert layer.delta["photo"] is not before and layer.gate["photo"].dtype == torch.bfloat16 and marked(layer)


def test_state_of_one_task_alone() -> None:
    layer, other = make(), make()
    state = {key: value for key, value in layer.state_dict().items() if key.endswith(".sketch")}
    assert list(state) == ["delta.sketch"]
    before = {key: value.clone() for key, value in other.state_dict().items()}
    other.load_state_dict(state, strict=False)
    changed = [key for key, value in other.state_dict().items() if not torch.equal(value, before[key])]
    assert changed == ["delta.sketch"] and torch.equal(other.delta["sketch"], layer.delta["sketch"])


def test_reset_keeps_the_parameters() -> None:
    layer = make(TaskConv2d, gate=0.25, per_task_bias=True)
    before = dict(layer.named_parameters())
    layer.reset_parameters()
    assert all(p is before[name] for name, p in layer.named_parameters())
    assert not any(d.any() for d in layer.delta.values()) and all(g == 0.25 for g in layer.gate.values())
    assert not any(b.any() for b in layer.task_bias.values()) and layer.weight.std() > 0


# --- training


def test_add_task_leaves_the_others_alone() -> None:
    layer = make(TaskConv2d, gate=0.5, per_task_bias=True)
    x = picture()
    with tasks(IDS):
        before = layer(x)
    held = {id(p) for p in layer.parameters()}
    layer.add_task("quickdraw")
    assert layer.tasks == (*NAMES, "quickdraw")
    with tasks(IDS):
        assert torch.equal(layer(x), before)
    with tasks(torch.tensor([3])):
        y = layer(x[:1])
    torch.testing.assert_close(y, F.conv2d(x[:1], layer.weight, layer.bias))
    new = [name for name, p in layer.named_parameters() if id(p) not in held]
    assert new == ["delta.quickdraw", "gate.quickdraw", "task_bias.quickdraw"]
    assert_same_gradients(layer, x, torch.tensor([3, 0, 3, 1, 3]))


def test_frozen_parts_get_no_gradient() -> None:
    layer = make(TaskConv2d, gate=0.5, per_task_bias=True)
    for p in (layer.weight, layer.delta["photo"], layer.gate["sketch"]):
        p.requires_grad_(False)
    with tasks(IDS):
        layer(picture()).square().sum().backward()
    assert {name for name, p in layer.named_parameters() if p.grad is None} == {"weight", "delta.photo", "gate.sketch"}


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_training_one_task_leaves_the_others_untouched(optimizer: type[torch.optim.Optimizer]) -> None:
    net = task_net()
    for name, p in net.named_parameters():
        p.requires_grad_(".delta." in name)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    steps = optimizer(net.parameters(), lr=1e-2, weight_decay=0.1)
    x, target, losses = picture(), torch.randn(5, 2, dtype=torch.float64), []
    for _ in range(15):
        with tasks(torch.ones(5, dtype=torch.int64)):
            loss = F.mse_loss(net(x), target)
        steps.zero_grad()
        loss.backward()
        steps.step()
        losses.append(loss.item())
    changed = {name for name, p in net.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"conv.delta.sketch", "mixer.delta.sketch"} and losses[-1] < losses[0]


def reference_update(net: nn.Module, losses: list[Tensor]) -> dict[str, Tensor]:
    """PCGrad of the shared parameters, both orders, and plain sums for what belongs to one task or one loss."""
    named = dict(net.named_parameters())
    grads = [torch.autograd.grad(loss, list(named.values()), retain_graph=True, allow_unused=True) for loss in losses]
    rows = [dict(zip(named, row, strict=True)) for row in grads]
    shared = [n for n in named if n.startswith(("conv.", "mixer.")) and n.split(".")[1] in ("weight", "bias")]
    flat = [torch.cat([row[n].flatten() for n in shared]) for row in rows]
    dot = flat[0] @ flat[1]
    assert dot < 0, "the tasks must conflict, or the test shows nothing"
    update = sum(g - dot / (o @ o) * o for g, o in ((flat[0], flat[1]), (flat[1], flat[0])))
    parts = update.split([named[n].numel() for n in shared])
    out = {n: part.view_as(named[n]) for n, part in zip(shared, parts, strict=True)}
    for n in named:
        if n not in out:
            out[n] = _sum(rows[0][n], rows[1][n])
    return out


def conflicting(net: nn.Module, x: Tensor) -> list[Tensor]:
    # one head each, which thus stays out of the surgery too
    features = net.trunk(x)
    left, right = (head(features)[:, 0] for head in net.heads)
    return [left.square().mean() + left.sum(), right.square().mean() - right.sum()]


@pytest.mark.parametrize("way", ["backward", "bank"])
def test_surgery_leaves_per_task_parameters_alone(way: str) -> None:
    """Two losses over one mixed batch reach every delta; a few steps of training."""
    net = copy.deepcopy(task_net(gate=1.0, per_task_bias=True))
    net.heads[1].load_state_dict(net.heads[0].state_dict())
    steps, x = torch.optim.SGD(net.parameters(), lr=1e-3), picture()
    for _ in range(3):
        steps.zero_grad()
        with tasks(IDS):
            expected = reference_update(net, conflicting(net, x))
            if way == "backward":
                fastmtl.backward(conflicting(net, x))
            else:
                bank = fastmtl.GradientBank(net, 2)
                for t in range(2):
                    with bank.task(t):
                        conflicting(net, x)[t].backward()
                bank.apply("pcgrad")
        assert_same(gradients(net), expected)
        steps.step()
