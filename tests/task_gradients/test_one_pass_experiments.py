"""Functions without a rule: `one_pass` tries them, and takes what is proven apart; the rest is refused."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import fuzz_one_pass
import pytest
import torch
import torch.nn.functional as F
from adversaries import APART, MIXED, SUMS, N, opaque, values
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastmtl
from fastmtl.task_gradients.one_pass.experiments import verdict
from fastmtl.task_gradients.one_pass.experiments.values import codes

T = 3
IDS = torch.tensor([0, 2, 1, 1, 0, 2, 2, 0])


@pytest.fixture(autouse=True)
def _no_verdicts() -> Iterator[None]:
    verdict.forget()
    yield
    verdict.forget()


class Scaled(nn.Module):
    """A parameter for each place of a sample, then a function that nobody knows.

    Args:
        function: it.
        x: the batch that it is for.
    """

    def __init__(self, function: Callable[[Tensor], Any], x: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(1 + 0.1 * values(*x.shape[1:], seed=2).abs())
        self.function = opaque(function)

    def forward(self, x: Tensor) -> Any:
        return self.function(x * self.weight)


def _rows(losses: Tensor, ids: Tensor, weight: Tensor) -> list[Tensor]:
    return [torch.autograd.grad(losses[ids == t].sum(), weight, retain_graph=True)[0] for t in range(T)]


def _assert_rows(bank: fastmtl.OnePassBank, want: list[Tensor]) -> None:
    for t, row in enumerate(want):
        (got,) = bank.row(t)
        torch.testing.assert_close(torch.zeros_like(row) if got is None else got, row, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("arguments", [{}, {"check": True}, {"memory": "stream"}], ids=str)
@pytest.mark.parametrize("name", APART)
def test_rows_of_what_keeps_samples_apart(name: str, arguments: dict[str, Any]) -> None:
    function, x, axis = APART[name]
    model = Scaled(function, x)
    with torch.no_grad():
        torch.manual_seed(1)
        out = model(x)
    places = {"rolled": IDS.roll(1), "kron turned": IDS.repeat(5)}.get(name)
    if places is None:
        places = IDS.repeat_interleave(out.shape[axis] // N) if name != "merged before" else IDS.repeat(N)

    def losses() -> Tensor:
        torch.manual_seed(1)
        out = model(x)
        return (
            (out * (1 + out.detach().sign())).square().movedim(axis, 0).flatten(1).sum(1) if out.dim() > 1 else out**2
        )

    want = _rows(losses(), places, model.weight)
    with fastmtl.one_pass(model, IDS, T, **arguments) as bank:
        losses().sum().backward()
    if "memory" in arguments:
        bank.apply("sum")
        torch.testing.assert_close(model.weight.grad, sum(want), rtol=1e-8, atol=1e-12)
        return
    _assert_rows(bank, want)


@pytest.mark.parametrize("fallback", ["error", "loop"])
@pytest.mark.parametrize("name", MIXED)
def test_what_mixes_samples_is_refused(name: str, fallback: str) -> None:
    function, x = MIXED[name]
    model = Scaled(function, x)
    match = "mixes samples|can't be told"
    with pytest.raises(ValueError, match=match), fastmtl.one_pass(model, IDS, T, fallback=fallback):
        model(x).square().sum().backward()


@pytest.mark.parametrize("n", [3, 6])
def test_what_mixes_one_pair_alone_is_refused(n: int) -> None:
    """Of a few samples, and for values far from those that there are."""
    x = values(n, 2)
    for to, of in itertools.permutations(range(n), 2):
        for sign in (1, -1):

            def gated(x: Tensor, to: int = to, of: int = of, sign: int = sign) -> Tensor:
                open_ = (torch.arange(n) == to)[:, None] & (sign * x[of] > 1e6)
                return torch.where(open_, x + x[of], x)

            model = Scaled(gated, x)
            with pytest.raises(ValueError, match="mixes samples"), fastmtl.one_pass(model, torch.arange(n), n):
                model(x).square().sum().backward()


@pytest.mark.parametrize("arguments", [{}, {"memory": "stream"}], ids=str)
@pytest.mark.parametrize("name", SUMS)
def test_rows_of_sums(name: str, arguments: dict[str, Any]) -> None:
    """The row of a task is what a sum over its samples alone would give, if the others count as they are."""
    function, x = SUMS[name]
    model = Scaled(function, x)
    want = []
    for t in range(T):
        copies = [model.weight.detach().clone().requires_grad_() for _ in range(T)]
        own = torch.stack([copies[k] for k in IDS])
        want.append(torch.autograd.grad(function(x * own).sum(), copies)[t])
    with fastmtl.one_pass(model, IDS, T, **arguments) as bank:
        model(x).sum().backward()
    if "memory" in arguments:
        bank.apply("sum")
        torch.testing.assert_close(model.weight.grad, sum(want), rtol=1e-8, atol=1e-12)
    else:
        _assert_rows(bank, want)


def test_error_does_not_try() -> None:
    function, x, _ = APART["distances to a table"]
    calls: list[int] = []

    def counting(x: Tensor) -> Tensor:
        calls.append(1)
        return function(x)

    model = Scaled(counting, x)
    with pytest.raises(ValueError, match="can't be followed"), fastmtl.one_pass(model, IDS, T, unknown="error"):
        model(x).sum(1).square().sum().backward()
    assert len(calls) == 1
    with pytest.raises(ValueError, match="unknown: expected 'probe' or 'error', got 'guess'"):
        fastmtl.one_pass(model, IDS, T, unknown="guess")


def test_verdicts_are_kept() -> None:
    """By function and form of the arguments: other values of the same form are not tried again."""
    calls: list[int] = []

    def counting(x: Tensor, power: int) -> Tensor:
        calls.append(power)
        return torch.fft.fft(x, dim=1).abs() ** power

    hidden = opaque(counting)
    weight = nn.Parameter(values(3, seed=2))

    def step(x: Tensor, power: int, ids: Tensor = IDS) -> int:
        before = len(calls)
        with fastmtl.one_pass([weight], ids, T) as bank:
            hidden(x * weight, power).sum(1).square().sum().backward()
        losses = (torch.fft.fft(x * weight, dim=1).abs() ** power).sum(1).square()
        _assert_rows(bank, _rows(losses, ids, weight))
        assert (bank.report().runs > 0) == (len(calls) - before > 1)
        return len(calls) - before

    assert step(values(N, 3), 1) > 10
    assert step(values(N, 3, seed=5), 1) == 1
    assert step(values(N, 3, seed=6), 1, IDS.flip(0)) == 1
    assert step(values(N, 3), 2) > 10  # another argument
    assert step(values(N, 3).T.contiguous().T, 1) > 10  # other strides
    assert step(values(6, 3), 1, IDS[:6]) > 10  # another size


def test_verdicts_that_hold_for_some_constants_alone() -> None:
    """A product with a unit matrix keeps the samples apart, one with another matrix does not."""
    product = opaque(lambda m, x: torch.stack([x[int(k)] for k in m.argmax(1)]))
    weight, x = nn.Parameter(values(3, seed=2)), values(N, 3)
    unit, turned = torch.eye(N + 1, N)[:N], torch.eye(N).roll(1, 0)
    for matrix, ids in ((unit, IDS), (unit, IDS), (turned, IDS.roll(1)), (unit, IDS)):
        with fastmtl.one_pass([weight], IDS, T) as bank:
            product(bank.constant(matrix), x * weight).square().sum(1).sum().backward()
        losses = (x * weight)[matrix.argmax(1)].square().sum(1)
        _assert_rows(bank, _rows(losses, ids, weight))
    changing = torch.eye(N)
    for _ in range(2):
        with fastmtl.one_pass([weight], IDS, T) as bank:
            product(bank.constant(changing), x * weight).square().sum(1).sum().backward()
        losses = (x * weight)[changing.argmax(1)].square().sum(1)
        _assert_rows(bank, _rows(losses, IDS[changing.argmax(1)], weight))
        changing.copy_(turned)  # the same tensor, written to


def test_index_that_is_in_turn_by_chance() -> None:
    pick = opaque(lambda x, index: x[index])
    weight, x = nn.Parameter(values(3, seed=2)), values(N, 3)
    for index in (torch.arange(N), torch.arange(N).flip(0), torch.arange(N)):
        with fastmtl.one_pass([weight], IDS, T) as bank:
            pick(x * weight, index).square().sum(1).square().sum().backward()
        losses = (x * weight).square().sum(1).square()
        _assert_rows(bank, _rows(losses, IDS, weight))


def test_a_batch_of_one_sample_or_one_task() -> None:
    """Nothing needs to be told apart: all that is made of them belongs to that task."""
    function, x = MIXED["covariance"]
    model = Scaled(function, x)
    for ids, few in ((torch.full((N,), 1), x), (torch.tensor([1]), x[:1])):
        (want,) = torch.autograd.grad(model(few).square().sum(), model.weight)
        with fastmtl.one_pass(model, ids, T) as bank:
            model(few).square().sum().backward()
        _assert_rows(bank, [torch.zeros_like(want), want, torch.zeros_like(want)])
    with pytest.raises(ValueError, match="mixes samples"), fastmtl.one_pass(model, IDS, T):
        model(x).square().sum().backward()  # the verdict of one task is no verdict for several


class _Counting(torch.autograd.Function):
    seen = 0

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        _Counting.seen += 1
        ctx.factor = float(_Counting.seen)
        return x * ctx.factor

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * ctx.factor


def _running() -> Callable[[Tensor], Tensor]:
    mean = [0.0]

    def function(x: Tensor) -> Tensor:
        mean[0] = 0.9 * mean[0] + 0.1 * float(x.detach().mean())
        return x - mean[0]

    return function


def _only_finite(x: Tensor) -> Tensor:
    if not bool(x.isfinite().all()):
        raise ValueError("expected finite values")
    return x * 2


def _leaves_if_not_finite(x: Tensor) -> Tensor:
    if not bool(x.isfinite().all()):
        raise SystemExit("expected finite values")
    return x * 2


def _only_these(x: Tensor) -> Tensor:
    if not torch.equal(x.detach(), _only_these.x):  # type: ignore[attr-defined]
        raise ValueError("expected what came first")
    return x * 2


def _changing(x: Tensor) -> Tensor:
    out = x * 2
    x.detach().add_(1)
    return out


@pytest.mark.parametrize(
    ("function", "match"),
    [
        (_Counting.apply, "run again, it gives something else"),
        (_running(), "run again, it gives something else"),
        (_changing, "it changes its arguments"),
        (lambda x: x * float(x.detach().isfinite().all()), "mixes samples"),
        (lambda x: x[x.detach()[:, 0] > 0].exp(), "the shape of its result depends on values|can't be told"),
    ],
)
def test_functions_with_a_state_are_refused(function: Callable[[Tensor], Any], match: str) -> None:
    x = values(N, 3)
    model = Scaled(function, x)
    with pytest.raises(ValueError, match=match), fastmtl.one_pass(model, IDS, T):
        model(x).square().sum(1).square().sum().backward()


def test_running_statistics_of_the_model_are_put_back() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(values(3, seed=2))
            self.register_buffer("mean", torch.zeros(3, dtype=torch.float64))
            self.function = opaque(self._norm)

        def _norm(self, x: Tensor) -> Tensor:
            self.mean.mul_(0.9).add_(0.1 * x.detach().mean(0))
            return x * 2

        def forward(self, x: Tensor) -> Tensor:
            return self.function(x * self.weight)

    model, x = Normed(), values(N, 3)
    with pytest.raises(ValueError, match="it changes a tensor of the model"), fastmtl.one_pass(model, IDS, T):
        model(x).square().sum(1).square().sum().backward()
    torch.testing.assert_close(model.mean, 0.1 * (x * model.weight).detach().mean(0))  # as after one run


def test_functions_that_take_some_values_alone() -> None:
    x = values(N, 3)
    for function in (_only_finite, _leaves_if_not_finite):
        model = Scaled(function, x)
        want = _rows(model(x).square().sum(1).square(), IDS, model.weight)
        with fastmtl.one_pass(model, IDS, T) as bank:
            model(x).square().sum(1).square().sum().backward()
        _assert_rows(bank, want)
    model = Scaled(_only_these, x)
    _only_these.x = (x * model.weight).detach()  # type: ignore[attr-defined]
    match = "can't be run on the values of other samples.*expected what came first"
    with pytest.raises(ValueError, match=match), fastmtl.one_pass(model, IDS, T):
        model(x).square().sum(1).square().sum().backward()
    with fastmtl.one_pass(model, IDS, T) as bank:  # the way out
        bank.samples(model(x)).square().sum(1).square().sum().backward()
    _assert_rows(bank, want)


def test_written_in_place() -> None:
    weight, x, order = nn.Parameter(values(3, seed=2)), values(N, 3), torch.tensor([3, 1, 0, 2, 7, 6, 5, 4])
    with fastmtl.one_pass([weight], IDS, T) as bank:
        out = torch.zeros(N, 3, dtype=torch.float64).index_copy_(0, order, x * weight)
        out.square().sum(1).square().sum().backward()
    losses = (x * weight).square().sum(1).square()
    _assert_rows(bank, _rows(losses, IDS, weight))


def test_verdicts_hold_no_tensor_alive() -> None:
    pick = opaque(lambda x, index: x[index])  # a verdict on these numbers alone
    weight, x, index = nn.Parameter(values(3, seed=2)), values(N, 3), torch.arange(N)
    with fastmtl.one_pass([weight], IDS, T) as bank:
        pick(x * weight, bank.constant(index)).square().sum(1).square().sum().backward()
    held = [weakref.ref(index), weakref.ref(x)]
    del index, x, bank
    gc.collect()
    assert verdict._verdicts and [ref() for ref in held] == [None, None]


def test_the_report() -> None:
    function, x, _ = APART["distances to a table"]
    model = Scaled(function, x)
    with fastmtl.one_pass(model, IDS, T) as bank:
        out = model(bank.samples(x))
        F.relu(out).sum(1).square().sum().backward()
    report = bank.report()
    assert report.by_rule["relu"] == 1 and report.by_rule["mul"] == 1
    assert report.by_word == {"samples": 1}
    (said,) = report.by_experiment.values()
    assert said == ["samples along axis 0"]
    assert report.runs > 0 and report.seconds > 0
    text = str(report)
    assert "by rule:" in text and "relu 1" in text and "samples along axis 0" in text and "samples 1" in text
    bank.apply("sum")
    assert bank.report() == report


def test_check_tells_the_cost(capsys: pytest.CaptureFixture[str]) -> None:
    function, x, _ = APART["distances to a table"]
    model = Scaled(function, x)
    with fastmtl.one_pass(model, IDS, T, check=True):
        model(x).square().sum(1).sum().backward()
    assert "runs of calls without a rule took" in capsys.readouterr().out


def test_a_verdict_for_a_mask_of_ones_does_not_hold_for_others() -> None:
    x, weight = values(N, 3), nn.Parameter(values(3, seed=2))
    mask = torch.ones(N, 3, dtype=torch.bool)

    def run() -> fastmtl.OnePassBank:
        with fastmtl.one_pass([weight], IDS, T) as bank:
            z = x * weight
            z.masked_scatter(mask.clone(), z * 2).square().sum().backward()
        return bank

    copies = weight.detach().expand(T, 3).clone().requires_grad_()
    (x * copies[IDS] * 2).square().sum().backward()
    _assert_rows(run(), list(copies.grad))
    mask[::2, 1] = False
    with pytest.raises(ValueError, match="mixes samples"):
        run()


def test_random_chains() -> None:
    """`tests/helpers/fuzz_one_pass.py` runs as many of them as there is time for."""
    found = fuzz_one_pass.run(1_000_000, 300)
    assert set(found) <= fuzz_one_pass.FINE, found
    assert len(found[fuzz_one_pass.RIGHT]) > 60 and len(found[fuzz_one_pass.REFUSED]) > 60


@pytest.mark.parametrize("seed", [20617, 23438])
def test_chains_that_raised_errors(seed: int) -> None:
    """Experiments run calls under `torch.func.vmap`, whose tensors tell no memory."""
    assert fuzz_one_pass.try_chain(seed) in fuzz_one_pass.FINE


@pytest.mark.parametrize("n", [1, 2, 3, 7, 64, 71])
def test_of_any_two_samples_each_is_changed_without_the_other(n):
    sets = torch.stack(codes(n, torch.Generator().manual_seed(n)))
    assert sets.any(0).all()
    apart = (sets[:, :, None] & ~sets[:, None, :]).any(0)
    assert apart.fill_diagonal_(True).all()


class _Normal(torch.autograd.Function):
    """log_ndtr, with functions in its formula that no rule knows."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.special.log_ndtr(x)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * (-x * x / 2 - torch.special.log_ndtr(x)).exp() / (2 * torch.pi) ** 0.5 + 0 * torch.special.erfcx(g)


@pytest.mark.parametrize("checked", [False, True])
def test_nothing_in_a_backward_pass_is_tried(checked):
    model, x = nn.Linear(6, 6).double(), torch.randn(N, 6).double()
    with fastmtl.one_pass(model, torch.arange(N) % 3, 3, check=checked) as bank:
        _Normal.apply(model(x)).sum().backward()
        assert list(bank.report().by_experiment) == ["_Normal.apply"]


def test_what_a_compiled_graph_runs_is_not_tried():
    model = nn.Sequential(nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 2)).double()
    compiled, x = torch.compile(model, backend="aot_eager"), torch.randn(N, 6).double()
    with fastmtl.one_pass(compiled, torch.arange(N) % 3, 3, check=True) as bank:
        compiled(x).sum().backward()
        assert bank.report().runs == 0


def test_what_a_checkpoint_recomputes_is_tried_before() -> None:
    """The graphs of the experiments are none of what it recomputes."""
    x = values(N, 3)
    model = Scaled(lambda x: x * x.sigmoid(), x)
    want = _rows(model(x).square().sum(1), IDS, model.weight)
    with fastmtl.one_pass(model, IDS, T) as bank:
        checkpoint(model, x, use_reentrant=False).square().sum().backward()
    assert bank.report().runs > 0
    _assert_rows(bank, want)
