"""`one_pass` in the loops that people have: compiled, checkpointed, in mixed precision."""

from __future__ import annotations

import copy
import functools
import io
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases_one_pass import IDS, Attention, N, T, Tokens, assert_rows, cross_entropy, expected_rows, make, of
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils.checkpoint import checkpoint

import fastmtl
from fastmtl.nn import TaskLinear, tasks
from fastmtl.parameters import is_per_task
from fastmtl.task_gradients.one_pass.known_tensors import OF_MODEL
from fastmtl.task_gradients.one_pass.sample_axis import ATTRIBUTE

COMPILED = ["mlp", "conv, group norm", "layer norm, rms norm", "encoder, norm first", "attention", "conv1d, prelu"]


def _rows(model: nn.Module, losses: Tensor) -> list[list[Tensor]]:
    params = list(model.parameters())
    return [list(torch.autograd.grad(losses[of(t)].sum(), params, retain_graph=True)) for t in range(T)]


@pytest.mark.skipif(
    torch.__version__ < (2, 11), reason="dynamo of torch 2.10 can't set attributes of tensors within a graph"
)
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_models_trace_one_graph(name: str) -> None:
    case, model, x = make(name)
    model.eval()  # dropout draws otherwise under compile
    torch._dynamo.reset()
    graphs = 0

    def count(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=count, bw_compiler=lambda g, i: make_boxed_func(g.forward))
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for step in range(4):
        ids = IDS.roll(step)
        with fastmtl.one_pass(compiled, ids, T, batch_dim=case.batch_dim) as bank:
            case.per_sample(compiled(x + step if x.is_floating_point() else x)).sum().backward()
        assert [id(p) for p in bank.params] == [id(p) for p in model.parameters()]
        assert_rows(bank, expected_rows(case, model, x + step if x.is_floating_point() else x, ids))
    assert graphs == 1
    bank.apply("pcgrad")


class _Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.layer, self.after = nn.Linear(4, 5), nn.LSTM(5, 5, batch_first=True), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.layer(self.before(x).relu())[0][:, -1])


def test_a_recurrent_layer_in_a_compiled_model() -> None:
    """dynamo runs it as it is, behind a graph break, where it must leave the followed calls alone."""
    model, x = _Recurrent().double(), torch.randn(N, 3, 4).double()
    compiled = torch.compile(model, backend="aot_eager")
    rows = []
    for each in (model, compiled):
        with fastmtl.one_pass(model, IDS, T) as bank:
            each(x).square().sum().backward()
        rows.append([bank.row(t) for t in range(T)])
        bank.apply("sum")
    torch.testing.assert_close(rows[1], rows[0])


def test_a_stream_through_a_compiled_model_is_refused() -> None:
    """Its graph has no second backward pass for plain gradients: an update without them would be no update."""
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(6, 7), nn.GELU(), nn.Linear(7, 5))
    compiled, x = torch.compile(model, backend="aot_eager"), torch.randn(N, 6)
    with fastmtl.one_pass(model, IDS, T, memory="stream") as bank:
        cross_entropy(compiled(x)).sum().backward()
    with pytest.raises(RuntimeError, match=r"gave parameter '0.weight' .* no gradient, as .* compiled graph"):
        bank.apply("sum")
    assert all(p.grad is None for p in model.parameters())


def test_compiled_with_inductor() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 7), nn.GELU(), nn.Linear(7, 5))
    compiled = torch.compile(model)
    for step in range(2):
        x = torch.randn(N, 6)
        with fastmtl.one_pass(compiled, IDS.roll(step), T) as bank:
            cross_entropy(compiled(x)).sum().backward()
        losses = cross_entropy(model(x))
        want = [
            torch.autograd.grad(losses[IDS.roll(step) == t].sum(), list(model.parameters()), retain_graph=True)
            for t in range(T)
        ]
        assert_rows(bank, [list(row) for row in want], 1e-5)


class _Block(nn.Module):
    """Layers of a kind of their own, with a buffer as long as the batch."""

    def __init__(self, per_task: bool) -> None:
        super().__init__()
        self.inner = TaskLinear(6, 6, T) if per_task else nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)
        self.register_buffer("shift", torch.randn(N, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.norm(self.inner(x))) * self.shift


class _Blocks(nn.Module):
    def __init__(self, per_task: bool, broken: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Block(per_task) for _ in range(3))
        self.broken = broken

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
            if self.broken:
                torch._dynamo.graph_break()
        return x


@pytest.mark.parametrize("way", ["each block", "each block, fullgraph", "graph breaks", "a function"])
@pytest.mark.parametrize("per_task", [False, True], ids=["plain", "by task"])
def test_one_graph_of_several_layers_gives_each_its_own_rows(per_task: bool, way: str) -> None:
    # dynamo keeps graphs by the code that they come from, which layers of one class share
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = _Blocks(per_task, way == "graph breaks").double()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_()
    x = torch.randn(N, 6, dtype=torch.float64)
    with tasks(IDS):
        y = model(x)
    want = cross_entropy(y).detach()
    shared = [p for p in model.parameters() if not is_per_task(p)]
    rows = [torch.autograd.grad(cross_entropy(y)[of(t)].sum(), shared, retain_graph=True) for t in range(T)]
    run = model
    if way == "graph breaks":
        run = torch.compile(model, backend="eager")
    elif way == "a function":
        call = torch.compile(lambda block, x: block(x), backend="eager")
        run = lambda x: functools.reduce(lambda x, block: call(block, x), model.blocks, x)  # noqa: E731
    else:
        for block in model.blocks:
            block.compile(backend="eager", fullgraph="fullgraph" in way and torch.__version__ >= (2, 11))
    for _ in range(2):
        with tasks(IDS), fastmtl.one_pass(model, IDS, T) as bank:
            losses = cross_entropy(run(x))
            losses.sum().backward()
        torch.testing.assert_close(losses.detach(), want)
        assert_rows(bank, [list(row) for row in rows])
    # and leaves nothing on the model
    left = {name for x in (*model.parameters(), *model.buffers()) for name in x.__dict__}
    assert not left & {OF_MODEL, ATTRIBUTE}


class _Checkpointed(nn.Module):
    def __init__(self, reentrant: bool = False) -> None:
        super().__init__()
        self.before = nn.Linear(6, 6)
        self.inner = nn.Sequential(nn.Linear(6, 7), nn.Dropout(0.2), nn.GELU(), nn.LayerNorm(7), nn.Linear(7, 6))
        self.after = nn.Linear(6, 5)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        return self.after(checkpoint(self.inner, self.before(x), use_reentrant=self.reentrant))


@pytest.mark.parametrize("arguments", [{}, {"check": True}, {"memory": "stream"}])
def test_checkpointing(arguments: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model, x = _Checkpointed().double(), torch.randn(N, 6, dtype=torch.float64)
    torch.manual_seed(1)
    rows = _rows(model, cross_entropy(model(x)))
    torch.manual_seed(1)
    with fastmtl.one_pass(model, IDS, T, **arguments) as bank:
        cross_entropy(model(x)).sum().backward()
    if "memory" not in arguments:
        assert_rows(bank, rows)
    bank.apply("sum")
    for p, *parts in zip(model.parameters(), *rows, strict=True):
        torch.testing.assert_close(p.grad, sum(parts))


def test_reentrant_checkpointing_is_refused() -> None:
    model, x = _Checkpointed(True), torch.randn(N, 6)
    with pytest.raises(ValueError, match="use_reentrant=False"), fastmtl.one_pass(model, IDS, T):
        cross_entropy(model(x)).sum().backward()


def test_sequential_checkpoints_inside_an_encoder() -> None:
    torch.manual_seed(0)
    model = Tokens(norm_first=True).double()
    tokens = torch.randint(0, 11, (N, 8))
    for layer in model.encoder.layers:
        inner = layer.forward
        layer.forward = lambda *a, inner=inner, **k: checkpoint(inner, *a, use_reentrant=False, **k)
    torch.manual_seed(1)
    rows = _rows(model, cross_entropy(model(tokens)))
    torch.manual_seed(1)
    with fastmtl.one_pass(model, IDS, T) as bank:
        cross_entropy(model(tokens)).sum().backward()
    assert_rows(bank, rows)


@pytest.mark.parametrize("memory", ["bank", "stream"])
def test_autocast_and_grad_scaler(memory: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Flatten(1), nn.Linear(288, 16), nn.LayerNorm(16),
        nn.Linear(16, 5),
    )  # fmt: skip
    x = torch.randn(N, 3, 8, 8)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        losses = cross_entropy(model(x).float())
    want = _rows(model, losses)
    order = fastmtl.methods.PCGrad(order=torch.arange(T).repeat(T, 1))
    with fastmtl.one_pass(model, IDS, T, memory=memory) as bank:
        with torch.autocast("cpu", torch.bfloat16):
            loss = cross_entropy(model(x).float()).sum()
        scaler.scale(loss).backward()
    surgery = bank.apply(order, loss_scale=scaler.get_scale())
    flat = torch.stack([torch.cat([g.flatten() for g in row]) for row in want])
    gram = fastmtl.ops.gram(flat)
    assert (surgery.gram - gram).abs().max() < 2e-2 * gram.max()
    scaler.unscale_(optimizer)
    update = torch.cat([p.grad.flatten() for p in model.parameters()])
    expected = fastmtl.ops.pcgrad(flat, torch.arange(T).repeat(T, 1))
    assert (update - expected).norm() < 2e-2 * expected.norm()
    scaler.step(optimizer)
    scaler.update()


def test_a_step_that_overflows_is_skipped() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(6, 5), torch.randn(N, 6)
    x[3] = float("inf")
    before = copy.deepcopy(model.state_dict())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with fastmtl.one_pass(model, IDS, T) as bank:
        scaler.scale(cross_entropy(model(x)).sum()).backward()
    bank.apply("pcgrad")
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 512.0
    for k, v in model.state_dict().items():
        assert torch.equal(v, before[k])


def test_a_training_loop_equals_one_with_backward() -> None:
    torch.manual_seed(0)
    one = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 5)).double()
    other = copy.deepcopy(one)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (one, other)]
    for step in range(5):
        x, ids = torch.randn(N, 6, dtype=torch.float64), IDS.roll(step)
        method = fastmtl.methods.PCGrad(order=torch.randint(0, T, (T, T)))
        for o in optimizers:
            o.zero_grad()
        with fastmtl.one_pass(one, ids, T) as bank:
            cross_entropy(one(x)).mean().backward()
        bank.apply(method)
        losses = cross_entropy(other(x)) / N
        fastmtl.backward([losses[ids == t].sum() for t in range(T)], method=method)
        for o in optimizers:
            o.step()
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_inside_inference_of_another_model() -> None:
    torch.manual_seed(0)
    model, teacher, x = nn.Linear(6, 5), nn.Linear(6, 5), torch.randn(N, 6)
    with fastmtl.one_pass(model, IDS, T) as bank:
        with torch.no_grad():
            target = teacher(x).softmax(1) + model(x).softmax(1)
        (-(target * model(x).log_softmax(1)).sum(1)).mean().backward()
    losses = -((teacher(x).softmax(1) + model(x).softmax(1)).detach() * model(x).log_softmax(1)).sum(1) / N
    assert_rows(bank, _rows(model, losses), 1e-5)


def test_gradient_reversal() -> None:
    class Reverse(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.view_as(x)

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return -g

    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 7), nn.Linear(7, 5)).double(), torch.randn(N, 6, dtype=torch.float64)
    rows = _rows(model, cross_entropy(model[1](Reverse.apply(model[0](x)))))
    for reverse in (Reverse.apply, lambda h: Reverse.apply(h)):  # bound before the block, and inside it
        with fastmtl.one_pass(model, IDS, T) as bank:
            cross_entropy(model[1](reverse(model[0](x)))).sum().backward()
        assert_rows(bank, rows)
    with (
        pytest.raises(ValueError, match=r"Reverse\.apply can't be followed"),
        fastmtl.one_pass(model, IDS, T, unknown="error"),
    ):
        model[1](Reverse.apply(model[0](x)))
    with fastmtl.one_pass(model, IDS, T, unknown="error") as bank:
        cross_entropy(model[1](bank.samples(Reverse.apply(model[0](x)), 0))).sum().backward()
    assert_rows(bank, rows)


def test_attention_of_another_model_is_torch_again() -> None:
    """After the block nothing of it is left in torch."""
    layer = Attention(True, False).double().eval()
    x = torch.randn(4, N, 6, dtype=torch.float64)
    before = layer(x)
    with fastmtl.one_pass(layer, IDS, T, batch_dim=1):
        inside = layer(x)
    torch.testing.assert_close(inside, before)
    torch.testing.assert_close(layer(x), before)
    assert F.relu(x).grad_fn is None


# --- what the block tells the model's tensors


@pytest.mark.parametrize("first", ["forward", "apply"])
def test_a_bank_that_streams_is_applied_inside_the_block_of_another(first: str) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 5)).double(), torch.randn(N, 6).double()
    rows = _rows(model, cross_entropy(model(x)))
    with fastmtl.one_pass(model, IDS, T, memory="stream") as streamed:
        cross_entropy(model(x)).sum().backward()
    with fastmtl.one_pass(model, IDS, T) as bank:
        if first == "forward":
            y = model(x)
        streamed.apply("sum")
        if first == "apply":
            y = model(x)
        cross_entropy(y).sum().backward()
    assert_rows(bank, rows)
    for p, *of_tasks in zip(model.parameters(), *rows, strict=True):
        torch.testing.assert_close(p.grad, sum(of_tasks))
    assert not any(OF_MODEL in p.__dict__ for p in model.parameters())


def test_a_model_is_copied_and_saved_inside_the_block() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 5)).double().eval(), torch.randn(N, 6)
    x = x.double()
    rows = _rows(model, cross_entropy(model(x)))
    file = io.BytesIO()
    with fastmtl.one_pass(model, IDS, T) as bank:
        loss = cross_entropy(model(x)).sum()
        torch.save(model, file)
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        loss.backward()
    assert_rows(bank, rows)
    file.seek(0)
    for other in (*copies, torch.load(file, weights_only=False)):
        torch.testing.assert_close(other(x), model(x))
        with fastmtl.one_pass(other, IDS, T) as bank:
            cross_entropy(other(x)).sum().backward()
        assert_rows(bank, rows)


def test_a_copy_of_a_buffer_is_no_buffer() -> None:
    """What was copied inside a block may be a batch in a later one."""
    torch.manual_seed(0)
    model, x = nn.Linear(6, 5).double(), torch.randn(N, 6, dtype=torch.float64)
    model.register_buffer("last", x.clone())
    with fastmtl.one_pass(model, IDS, T):
        kept = copy.deepcopy(model.last)
        cross_entropy(model(x + model.last - kept)).sum().backward()
    with fastmtl.one_pass(model, IDS, T) as bank:
        cross_entropy(model(kept)).sum().backward()
    assert_rows(bank, _rows(model, cross_entropy(model(kept))))
