"""Evaluation with closed gates, and of batch norms by task: every short way gives what the long one does.

The long way is that of gradients (`torch.enable_grad`), which asks the ops.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrize, prune

import fastmtl
from fastmtl.core import dispatch
from fastmtl.nn import TapsGate, TaskBatchNorm2d, TaskConv2d, TaskLinear, convert, merge, tasks
from fastmtl.ops import task_plan

NAMES = ["photo", "sketch", "clipart"]
IDS = torch.tensor([1, 0, 1, 1, 0, 1])  # no clipart
F64 = torch.float64
needs_extension = pytest.mark.skipif(dispatch.extension is None, reason="the compiled kernel is what is tested")


def _conv(score: float = 0.0, **options: Any) -> TaskConv2d:
    layer = TaskConv2d(3, 4, 3, NAMES, padding=1, gate=TapsGate(), **{"dtype": F64, **options}).eval()
    with torch.no_grad():
        for name in NAMES:
            layer.gate[name].fill_(score)
            layer.delta[name].copy_(torch.randn_like(layer.delta[name]))
    return layer


def _short(layer: nn.Module, x: Tensor, told: Any) -> Tensor:
    with torch.no_grad(), tasks(told):
        return layer(x)


def _long(layer: nn.Module, x: Tensor, told: Any) -> Tensor:
    with torch.enable_grad(), tasks(told):
        return layer(x).detach()


def _told() -> list[Any]:
    return [IDS, IDS.int(), task_plan(IDS, 3), [NAMES[t] for t in IDS.tolist()], "photo", "sketch"]


def _counted(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A list that grows with each call of the layers' op."""
    calls: list[Any] = []
    module = __import__("fastmtl.nn.layers.conv", fromlist=["task_conv2d"])
    op = module.task_conv2d

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(args)
        return op(*args, **kwargs)

    monkeypatch.setattr(module, "task_conv2d", counted)
    return calls


@pytest.mark.parametrize("k", range(6))
def test_only_gates_of_tasks_that_are_present_count(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, layer, x, told = _counted(monkeypatch), _conv(), torch.randn(6, 3, 5, 4, dtype=F64), _told()[k]
    with torch.no_grad():
        layer.gate["clipart"].fill_(1.0)
        layer.delta["clipart"].fill_(torch.nan)
    assert torch.equal(_short(layer, x, told), F.conv2d(x, layer.weight, layer.bias, padding=1))
    assert not calls
    with torch.no_grad():
        layer.gate["sketch" if told != "photo" else "photo"].fill_(1.0)
    torch.testing.assert_close(_short(layer, x, told), _long(layer, x, told))
    assert len(calls) == 2


@pytest.mark.parametrize("number", [3, 40])
def test_gates_open_again(number: int) -> None:
    """By a step of an optimizer, a loaded state, a write past autograd's versions; for few tasks and for many."""
    names = [f"t{k}" for k in range(number)]
    layer = TaskLinear(3, 2, names, gate=TapsGate(), dtype=F64)
    for name in names:
        nn.init.zeros_(layer.gate[name])
        nn.init.normal_(layer.delta[name])
    x, ids = torch.randn(number, 3, dtype=F64), torch.arange(number)
    state = copy.deepcopy(layer.state_dict())
    shared = F.linear(x, layer.weight, layer.bias)

    def check(opened: bool) -> None:
        y = _short(layer, x, ids)
        torch.testing.assert_close(y, _long(layer, x, ids))
        assert torch.equal(y, shared) != opened
        assert torch.equal(_short(layer, x, names[0]), shared)

    check(False)
    last = layer.gate[names[-1]]
    last.data.fill_(0.5)
    check(True)
    last.data = torch.zeros_like(last)
    check(False)
    optimizer = torch.optim.SGD([last], lr=1.0)
    last.grad = torch.full_like(last, -1.0)
    optimizer.step()
    check(True)
    layer.load_state_dict(state)
    check(False)
    state[f"gate.{names[-1]}"] = torch.ones((), dtype=F64)
    layer.load_state_dict(state, assign=True)
    check(True)
    with torch.no_grad():
        layer.gate[names[-1]].fill_(torch.nan)
    assert _short(layer, x, ids)[-1].isnan().all()


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("number", [1, 40])
def test_a_score_at_the_threshold_is_open(dtype: torch.dtype, number: int) -> None:
    """Also where the threshold is no number of the score's dtype: float32 has 0.7 a bit below."""
    for threshold in (0.7, 0.1, 0.3):
        gate = TapsGate(threshold, start=threshold)
        layer = TaskLinear(2, 2, number, gate=gate, dtype=dtype)
        for delta in layer.delta.values():
            nn.init.ones_(delta)
        x = torch.ones(number, 2, dtype=dtype)
        assert gate(layer.gate["0"]) == 1
        y = _short(layer, x, torch.arange(number))
        assert not torch.equal(y, F.linear(x, layer.weight, layer.bias))
        torch.testing.assert_close(y, _long(layer, x, torch.arange(number)))


def test_scores_of_several_dtypes() -> None:
    layer, x = _conv(), torch.randn(6, 3, 5, 4, dtype=F64)
    layer.gate["sketch"].data = torch.zeros((), dtype=torch.float32)
    shared = F.conv2d(x, layer.weight, layer.bias, padding=1)
    assert torch.equal(_short(layer, x, IDS), shared)
    layer.gate["sketch"].data.fill_(1.0)
    assert not torch.equal(_short(layer, x, IDS), shared)


def test_tasks_come_and_go() -> None:
    model = convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), NAMES, "taps").double().eval()
    x = torch.randn(6, 3, 5, 5, dtype=F64)
    for p in model[0].gate.values():
        nn.init.zeros_(p)
    plain = merge(model, "photo").eval()
    with torch.no_grad():
        expected = plain(x)
        torch.testing.assert_close(_short(model, x, IDS), expected)
        fastmtl.nn.add_task(model, "film", like="sketch")
        model[1].running_mean["film"].fill_(2.0)
        model[0].gate["film"].fill_(1.0)
        model[0].delta["film"].fill_(0.5)
        torch.testing.assert_close(_short(model, x, IDS), expected)
        film = merge(model, "film").eval()(x)
        torch.testing.assert_close(_short(model, x, "film"), film)
        torch.testing.assert_close(_short(model, x, torch.full((6,), 3)), film)
        fastmtl.nn.remove_task(model, "photo")
        torch.testing.assert_close(_short(model, x, torch.full((6,), 2)), film)
        with pytest.raises(ValueError, match="expected one of sketch, clipart, film, got 'photo'"):
            _short(model, x, "photo")


def test_ids_that_do_not_fit_are_refused() -> None:
    layer, x = _conv(), torch.randn(6, 3, 5, 4, dtype=F64)
    with pytest.raises(ValueError, match="task_ids"):
        _short(layer, x, IDS[:5])
    with pytest.raises(ValueError, match="expected ids from 0 to 2, got 3"):
        _short(layer, x, IDS + 2)
    with pytest.raises(ValueError, match="plan of 3 tasks, got one of 4"):
        _short(layer, x, task_plan(IDS, 4))
    with pytest.raises(ValueError, match="x: "):
        _short(layer, x[0], "photo")


def _closed(kind: str, **options: Any) -> tuple[nn.Module, Tensor]:
    """A layer whose short way is torch's, and an input that it takes."""
    if kind == "norm":
        return TaskBatchNorm2d(3, NAMES, **options).eval(), torch.randn(6, 3, 5, 4)
    gate = TapsGate(start=0.0)
    if kind == "linear":
        return TaskLinear(3, 2, NAMES, gate=gate, **options), torch.randn(6, 3)
    return TaskConv2d(3, 4, 3, NAMES, padding=(1, 0), gate=gate, **options), torch.randn(6, 3, 5, 4)


# what the ops refuse: torch would compute something, or say less
REFUSED = {
    "ints": (lambda x: x.mul(4).long(), "x: expected float64, float32, bfloat16 or float16, got torch.int64"),
    "bools": (lambda x: x > 0, "x: expected float64, float32, bfloat16 or float16, got torch.bool"),
    "complex": (lambda x: x + 0j, "x: expected float64, float32, bfloat16 or float16, got torch.complex64"),
    "float64": (lambda x: x.double(), "expected torch.float64 beside x in torch.float64, got torch.float32"),
    "sparse": (lambda x: x.to_sparse(), "x: expected a dense"),
    "meta": (lambda x: x.to("meta"), "expected device meta as x, got cpu"),
    "channels": (lambda x: torch.cat([x, x], 1), r"x: expected .*, got \D*6"),
}


@pytest.mark.parametrize("told", [IDS, "photo"], ids=["mixed", "one"])
@pytest.mark.parametrize("kind", ["linear", "conv", "norm"])
@pytest.mark.parametrize("name", REFUSED)
def test_what_the_ops_refuse_is_refused_in_evaluation(name: str, kind: str, told: Any) -> None:
    change, text = REFUSED[name]
    layer, x = _closed(kind)
    _short(layer, x, told)
    for run in (_long, _short):
        with pytest.raises((TypeError, ValueError), match=text):
            run(layer, change(x), told)


def test_a_weight_of_16_bits_takes_no_float32() -> None:
    for kind in ("linear", "conv", "norm"):
        layer, x = _closed(kind, dtype=torch.bfloat16)
        for run in (_long, _short):
            with pytest.raises(TypeError, match=r"expected torch\.float32 beside x in torch\.float32, got torch\.bf"):
                run(layer, x, IDS)


def test_pictures_smaller_than_the_filter_are_refused() -> None:
    for padding in ((1, 0), "valid", "same"):
        layer = TaskConv2d(3, 4, 3, NAMES, padding=padding, gate=TapsGate(start=0.0))
        for size in ((5, 2), (1, 3), (1, 1)):
            x = torch.randn(6, 3, *size)
            if padding == "same" or (padding == (1, 0) and size == (1, 3)):
                torch.testing.assert_close(_short(layer, x, IDS), _long(layer, x, IDS))
                continue
            for run in (_long, _short):
                with pytest.raises(ValueError, match="x: expected at least"):
                    run(layer, x, IDS)


class _Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_a_shared_weight_that_is_computed(kind: str, name: str) -> None:
    """Pruned or parametrised, it is no parameter of the layer."""
    for change in (
        lambda layer: prune.l1_unstructured(layer, name, amount=1),
        lambda layer: parametrize.register_parametrization(layer, name, _Twice()),
    ):
        layer, x = _closed(kind)
        for delta in layer.delta.values():
            nn.init.normal_(delta)
        before = _short(layer, x, IDS)
        change(layer)
        y = _short(layer, x, IDS)
        assert not torch.allclose(y, before)
        torch.testing.assert_close(y, _long(layer, x, IDS))
        torch.testing.assert_close(_short(layer, x, "photo"), _long(layer, x, "photo"))


def test_ids_that_are_rewritten_are_read_again() -> None:
    layer, x, ids = _conv(), torch.randn(6, 3, 5, 4, dtype=F64), torch.zeros(6, dtype=torch.int64)
    norm = TaskBatchNorm2d(3, NAMES, dtype=F64).eval()
    with torch.no_grad(), tasks(ids):
        layer.gate["clipart"].fill_(1.0)
        norm.running_mean["clipart"].fill_(3.0)
        closed, at_first = layer(x), norm(x)
        ids[0] = 2
        y, z = layer(x), norm(x)
    assert torch.equal(y[1:], closed[1:]) and not torch.allclose(y[0], closed[0])
    torch.testing.assert_close(z[0], at_first[0] - 3 / (1 + norm.eps) ** 0.5)
    torch.testing.assert_close(z[1:], at_first[1:])


@pytest.mark.parametrize("told", [IDS, "photo"], ids=["mixed", "one"])
def test_compiled(told: Any) -> None:
    model = convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), NAMES, "taps").eval()
    for p in model[0].gate.values():
        nn.init.zeros_(p)
    x = torch.randn(6, 3, 5, 5)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(_short(compiled, x, told), _short(model, x, told))


def test_under_one_pass() -> None:
    """A mode that follows the samples of a batch takes no notice of what is evaluated without gradients."""
    model = convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten()), NAMES, "taps", joint=True)
    x = torch.randn(6, 3, 5, 5)
    model.eval()
    for p in model[0].gate.values():
        nn.init.zeros_(p)
    expected = _short(model, x, IDS)
    with tasks(IDS), fastmtl.one_pass(model, IDS, NAMES):
        with torch.no_grad():
            torch.testing.assert_close(model(x), expected)
        model(x).square().mean(1).sum().backward()


@pytest.mark.parametrize("kind", [TaskConv2d, TaskLinear], ids=["conv", "linear"])
def test_under_autocast(kind: type[nn.Module]) -> None:
    """As the plain layer, which rounds its weight, too."""
    sizes = (3, 4, 1) if kind is TaskConv2d else (5, 4)
    layer = kind(*sizes, NAMES, gate=TapsGate()).eval()
    for p in layer.gate.values():
        nn.init.zeros_(p)
    x = torch.randn(6, 3, 5, 5)
    with torch.autocast("cpu", torch.bfloat16):
        short, plain = _short(layer, x, IDS), layer.merged("photo")(x)
    assert short.dtype == torch.bfloat16 and torch.equal(short, plain)


# --- batch norm


def _norm(channels: int, dtype: torch.dtype, **options: Any) -> TaskBatchNorm2d:
    norm = TaskBatchNorm2d(channels, NAMES, dtype=dtype, **options).eval()
    with torch.no_grad():
        for held in norm.containers().values():
            for name in NAMES:
                if held[name].is_floating_point():
                    held[name].copy_(torch.rand(channels, dtype=F64) + 0.5)
    return norm


def _oracle(norm: TaskBatchNorm2d, x: Tensor, ids: Tensor) -> Tensor:
    """Sample by sample in float64."""
    found = []
    for one, t in zip(x.double(), ids.tolist(), strict=True):
        mean, var, weight, bias = (
            None if held is None else held[NAMES[t]].detach().double()
            for held in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
        )
        found.append(F.batch_norm(one[None], mean, var, weight, bias, False, 0.0, norm.eps)[0])
    return torch.stack(found)


SIZES = [(1, 1, 1), (3, 1, 1), (3, 2, 2), (4, 1, 7), (5, 3, 3), (64, 2, 4), (64, 3, 6), (300, 2, 1), (300, 1, 9),
         (2, 40, 31), (17, 33, 7), (256, 16, 16)]  # fmt: skip
TOLERANCES = {F64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.fixture
def own_level() -> Iterator[None]:
    """The level of vector instructions is what it was, afterwards."""
    before = dispatch.extension.cpu_level()
    yield
    dispatch.extension.set_cpu_level(before)


@needs_extension
@pytest.mark.parametrize("mixed", [False, True], ids=["of the dtype of x", "float32"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["pixels", "channels"])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_batch_norm_in_one_pass(
    dtype: torch.dtype, layout: torch.memory_format, mixed: bool, monkeypatch: pytest.MonkeyPatch, own_level: None
) -> None:
    def no_op(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the op was asked")

    monkeypatch.setattr("fastmtl.nn.layers.batch_norm.task_batch_norm", no_op)
    held = torch.float32 if mixed and dtype != F64 else dtype
    for channels, h, w in SIZES:
        for options in ({}, {"bias": False}, {"affine": False}):
            norm = _norm(channels, held, **options)
            x = torch.randn(6, channels, h, w).to(dtype).contiguous(memory_format=layout)
            for told, ids in ((IDS, IDS), ("clipart", torch.full((6,), 2))):
                expected = _oracle(norm, x, ids)
                for level in dispatch.extension.available_cpu_levels():
                    dispatch.extension.set_cpu_level(level)
                    y = _short(norm, x, told)
                    assert y.dtype == dtype and y.stride() == x.stride()
                    torch.testing.assert_close(y.double(), expected, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype] * 4)


@needs_extension
def test_batch_norm_has_the_same_bits_for_any_number_of_threads(threads: None) -> None:
    norm, x = _norm(64, torch.float32), torch.randn(6, 64, 40, 40)
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        for layout in (torch.contiguous_format, torch.channels_last):
            found.append(_short(norm, x.contiguous(memory_format=layout), IDS))
    assert all(torch.equal(y, found[k % 2]) for k, y in enumerate(found))


def test_batch_norm_otherwise() -> None:
    """What the short ways do not serve goes the long one, with the same result or the error of the op."""
    norm, x = _norm(4, F64), torch.randn(6, 4, 3, 5, dtype=F64)
    expected = _oracle(norm, x, IDS)
    for turned in (x.transpose(2, 3).contiguous().transpose(2, 3), x.repeat_interleave(2, 3)[..., ::2]):
        torch.testing.assert_close(_short(norm, turned, IDS), expected)
    with fastmtl.use_backend("reference"):
        torch.testing.assert_close(_short(norm, x, IDS), expected)
    assert _short(norm, x[:0], IDS[:0]).shape == (0, 4, 3, 5)
    assert _short(norm, x[:0], "photo").shape == (0, 4, 3, 5)
    for told in (IDS, "photo"):
        with pytest.raises(TypeError, match=r"expected torch.float32 beside x in torch.float32, got torch.float64"):
            _short(norm, x.float(), told)
    with pytest.raises(ValueError, match="expected shape"):
        _short(norm, x, IDS[:5])
    norm.running_mean["sketch"] = norm.running_mean["sketch"].repeat_interleave(2)[::2]
    torch.testing.assert_close(_short(norm, x, IDS), expected)
    seen = torch.func.vmap(lambda one: _short(norm, one, "photo"))(x[None])
    torch.testing.assert_close(seen[0], _oracle(norm, x, torch.zeros_like(IDS)))


def test_batch_norm_follows_its_tensors() -> None:
    norm, x = _norm(4, F64), torch.randn(6, 4, 3, 5, dtype=F64)
    for told, ids in ((IDS, IDS), ("sketch", torch.ones_like(IDS))):
        with torch.no_grad():
            norm.running_mean["sketch"].data.add_(1)
            norm.weight["sketch"].data = norm.weight["sketch"] * 2
        torch.testing.assert_close(_short(norm, x, told), _oracle(norm, x, ids))
        norm.train()
        with tasks(IDS):
            norm(x)
        norm.eval()
        torch.testing.assert_close(_short(norm, x, told), _oracle(norm, x, ids))


def test_batch_norm_after_copies_and_loads() -> None:
    norm, x = _norm(4, F64), torch.randn(6, 4, 3, 5, dtype=F64)
    other = copy.deepcopy(norm)
    with torch.no_grad():
        for held in other.containers().values():
            held["photo"].add_(1)
    for assign in (False, True):
        loaded = copy.deepcopy(norm)
        _short(loaded, x, IDS)
        loaded.load_state_dict(other.state_dict(), assign=assign)
        torch.testing.assert_close(_short(loaded, x, IDS), _oracle(other, x, IDS))
    torch.testing.assert_close(_short(norm, x, IDS), _oracle(norm, x, IDS))
    parametrize.register_parametrization(norm.weight, "photo", _Twice())
    torch.testing.assert_close(_short(norm, x, IDS), _long(norm, x, IDS))


def _negated(values: Tensor) -> Tensor:
    """The same numbers, in memory that holds their negatives."""
    found = torch.complex(torch.zeros_like(values), -values).conj().imag
    assert found.is_neg()
    return found


def test_numbers_that_lie_as_their_negatives() -> None:
    """As the imaginary part of a conjugate does."""
    layer, x = _conv(), torch.randn(6, 3, 5, 4, dtype=F64)
    shared = F.conv2d(x, layer.weight, layer.bias, padding=1)
    for score in (-0.5, 0.05, 0.5):
        layer.gate["sketch"].data = _negated(torch.tensor(score, dtype=F64))
        y = _short(layer, x, IDS)
        torch.testing.assert_close(y, _long(layer, x, IDS))
        assert torch.equal(y, shared) == (score < 0.1)
    for channels in (1, 2):
        norm, pictures = _norm(channels, F64), torch.randn(6, channels, 3, 5, dtype=F64)
        expected = _oracle(norm, pictures, IDS)
        assert channels == 2 or _negated(pictures[:1, :, :1, :1]).is_contiguous()
        torch.testing.assert_close(_short(norm, _negated(pictures), IDS), expected)
        norm.running_mean["sketch"] = _negated(norm.running_mean["sketch"])
        torch.testing.assert_close(_short(norm, pictures, IDS), expected)


@needs_extension
def test_a_backend_that_the_environment_forces(monkeypatch: pytest.MonkeyPatch) -> None:
    norm, x = _norm(4, F64), torch.randn(6, 4, 3, 5, dtype=F64)
    expected = _short(norm, x, IDS)
    assert dispatch.straight_to_cpu()
    monkeypatch.setenv("FASTMTL_BACKEND", "reference")
    assert not dispatch.straight_to_cpu()
    torch.testing.assert_close(_short(norm, x, IDS), expected)
    monkeypatch.setenv("FASTMTL_BACKEND", "cpu")
    assert dispatch.straight_to_cpu()


def test_tensors_that_are_replaced_while_they_are_read() -> None:
    """As another thread may, whenever torch is asked something in between."""
    norm, pictures, layer, x = _norm(1, F64), torch.randn(6, 1, 2, 2, dtype=F64), _conv(-0.5), torch.randn(6, 3, 5, 4)
    expected, shared = _oracle(norm, pictures, IDS), F.conv2d(x.double(), layer.weight, layer.bias, padding=1)
    held, gates, replaced = norm.running_mean._buffers, layer.gate._parameters, []

    def replace(values: dict[str, Tensor | None], like: Tensor) -> bool:
        values.update((name, like.clone()) for name in NAMES)
        replaced.append(values)
        return False

    held["photo"].is_neg = lambda: replace(held, torch.full((1,), 7.0, dtype=F64))
    torch.testing.assert_close(_short(norm, pictures, IDS), expected)
    gates["photo"].is_neg = lambda: replace(gates, torch.ones((), dtype=F64))
    assert torch.equal(_short(layer, x.double(), IDS), shared)
    assert replaced == [] if dispatch.extension is None else replaced == [held, gates]


@pytest.mark.parametrize("told", [IDS, "photo"], ids=["mixed", "one"])
@pytest.mark.parametrize("eps", [-1.0, torch.nan, torch.inf, True])
def test_an_eps_that_the_op_refuses(eps: Any, told: Any) -> None:
    norm, x = _norm(2, F64), torch.randn(6, 2, 3, 3, dtype=F64)
    norm.eps = eps
    for run in (_long, _short):
        with pytest.raises((TypeError, ValueError), match=r"^eps: expected a .*number"):
            run(norm, x, told)


@pytest.mark.parametrize("told", [IDS, "photo"], ids=["mixed", "one"])
def test_vmap_over_layers_of_which_some_are_open(told: Any) -> None:
    layers, x = [_conv(), _conv(1.0)], torch.randn(6, 3, 5, 4, dtype=F64)
    stacked = torch.func.stack_module_state(layers)

    def run(parameters: Any, buffers: Any) -> Tensor:
        return torch.func.functional_call(layers[0], (parameters, buffers), x)

    with torch.no_grad(), tasks(told):
        found = torch.func.vmap(run)(*stacked)
    torch.testing.assert_close(found, torch.stack([_long(layer, x, told) for layer in layers]))


@pytest.mark.parametrize("grad", [False, True])
def test_vmap_over_ids(grad: bool) -> None:
    model, x = nn.Sequential(_conv(1.0), _norm(4, F64)).eval(), torch.randn(6, 3, 5, 4, dtype=F64)
    ids = torch.stack([IDS, IDS.flip(0)])

    def run(ids: Tensor) -> Tensor:
        with tasks(ids):
            return model(x)

    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(torch.func.vmap(run)(ids), torch.stack([run(i) for i in ids]))


def test_a_tangent_of_a_closed_gate_is_not_lost() -> None:
    layer, x = _conv(), torch.randn(6, 3, 5, 4, dtype=F64)
    with forward_ad.dual_level():
        y = _short(layer, forward_ad.make_dual(x, x), IDS)
        torch.testing.assert_close(
            forward_ad.unpack_dual(y).tangent, F.conv2d(x, layer.weight, padding=1), check_stride=False
        )
        layer.gate._parameters["sketch"] = forward_ad.make_dual(torch.zeros((), dtype=F64), torch.ones((), dtype=F64))
        with pytest.raises(NotImplementedError, match="has no forward-mode derivative"):
            _short(layer, x, IDS)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_trace_holds_for_gates_that_open() -> None:
    layer, x = _conv(), torch.randn(6, 3, 5, 4, dtype=F64)
    with torch.no_grad(), tasks(IDS):
        traced = torch.jit.trace(layer, (x,), check_trace=False)
        for score in (0.0, 1.0):
            for gate in layer.gate.values():
                gate.fill_(score)
            torch.testing.assert_close(traced(x), layer(x))


def test_a_profiler_sees_the_op() -> None:
    norm, x = _norm(4, F64), torch.randn(6, 4, 3, 5, dtype=F64)
    with torch.profiler.profile() as profile:
        _short(norm, x, IDS)
    assert "fastmtl::task_batch_norm" in {event.key for event in profile.key_averages()}


def test_a_transformer_layer_still_runs_its_layers() -> None:
    """torch's fused layer would read the shared weights past a forward."""
    model = convert(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), NAMES, "dense").eval()
    for layer in (model.linear1, model.linear2):
        for delta in layer.delta.values():
            nn.init.normal_(delta)
    x = torch.randn(6, 5, 8)
    torch.testing.assert_close(_short(model, x, IDS), _long(model, x, IDS))
    assert not torch.allclose(_short(model, x, "photo"), _short(model, x, "sketch"))


# --- threads


def test_each_thread_asks_for_its_own_tasks() -> None:
    """Which tasks are present decides between the plain layer and the task op, and which statistics a norm takes."""
    layer = TaskLinear(4, 3, NAMES, gate=1.0, dtype=torch.float64)
    norm = TaskBatchNorm2d(3, NAMES, dtype=torch.float64).eval()
    with torch.no_grad():
        for t, name in enumerate(NAMES):
            layer.gate[name].fill_(float(t > 0))  # the first task's is closed
            layer.delta[name].normal_()
            norm.running_mean[name].fill_(float(t))
    x, pictures = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 3, 2, 2, dtype=torch.float64)
    expected: dict[str, list[torch.Tensor]] = {}
    for name in NAMES:
        with tasks(name), torch.no_grad():
            expected[name] = [layer(x), norm(pictures)]
    found: dict[str, list[torch.Tensor]] = {}
    meet = threading.Barrier(len(NAMES), timeout=60)

    def run(name: str) -> None:
        with tasks(name), torch.no_grad():
            meet.wait()  # all are in their blocks
            found[name] = [layer(x), norm(pictures)]
            meet.wait()

    threads = [threading.Thread(target=run, args=(name,)) for name in NAMES]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in NAMES:
        for y, of_task in zip(found[name], expected[name], strict=True):
            torch.testing.assert_close(y, of_task, rtol=0, atol=0)
