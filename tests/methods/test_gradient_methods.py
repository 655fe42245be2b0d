"""GradDrop, TrimmedMean, DBMTL, MoCo and ExcessMTL: what their papers say, in plain float64; TorchJD's numbers; state;
and the ways in which gradients come about."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from cases_elementwise import graddrop64, uniform_numbers
from conftest import Backend
from torch import Tensor, nn

import fastmtl
from fastmtl import methods, ops
from fastmtl.core.gradient_rows import GradientRows, bank_rows
from fastmtl.methods import DBMTL, ExcessMTL, GradDrop, Method, MoCo, Seen, TrimmedMean
from fastmtl.methods.held import HeldGradients
from fastmtl.ops.gradients.order import Draw, shared_source

F64 = torch.float64
T = 3
NAMES = ["a", "b", "c", "d", "e"]
KINDS: dict[str, Callable[[], Method]] = {
    "graddrop": lambda: GradDrop(generator=ops.order_state(3)),
    "leak": lambda: GradDrop([0.25, 0.5, 0.75], generator=ops.order_state(3)),
    "trimmedmean": lambda: TrimmedMean(1),
    "dbmtl": lambda: DBMTL(beta=0.7, beta_sigma=0.3),
    "moco": lambda: MoCo(gamma=0.01, rho=0.1),
    "moco softmax": lambda: MoCo(gamma=0.01, gamma_sigma=0.0, projection="softmax"),
    "excessmtl": lambda: ExcessMTL(step_size=0.5, warmup=2),
}
RUNNING = ("dbmtl", "moco", "moco softmax", "excessmtl")


def gradients(num_tasks: int, num_columns: int = 40, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(100 * num_tasks + seed)
    g = torch.randn(num_tasks, num_columns, dtype=F64, generator=generator)
    return torch.linspace(1, 3, num_tasks, dtype=F64)[:, None] * (g - 0.8 * g.mean(0))


def step(method: Method, grads: Tensor, losses: Tensor | None = None, **seen: Any) -> tuple[Tensor, Any, Any]:
    """One update of a `[T, P]` bank, and what came with it."""
    out = torch.empty_like(grads[0])
    num_tasks = len(grads)
    what = {"names": NAMES[:num_tasks], "present": [True] * num_tasks, "losses": losses} | seen
    gram, weights = method.update(bank_rows(grads), [out], Seen(**what))
    return out, gram, weights


# --- plain float64, written from the papers. Each takes one step after the other: `[T, P]` and `[T]` -> `[P]`.


class PlainGradDrop:
    def __init__(self, leak: Tensor | None = None, seed: int = 3) -> None:
        self.leak, self.seed, self.steps = leak, seed, 0

    def __call__(self, g: Tensor, losses: Tensor) -> Tensor:
        u = uniform_numbers(g, self.seed, self.steps)
        self.steps += 1
        return graddrop64(g, u, self.leak)[0]


class PlainTrimmedMean:
    def __call__(self, g: Tensor, losses: Tensor) -> Tensor:
        columns = [sorted(column)[1:-1] for column in g.mT.tolist()]
        return torch.tensor([sum(c) / len(c) for c in columns], dtype=F64)


class PlainDBMTL:
    """Lin et al. 2023, Algorithm 1."""

    def __init__(self, beta: float = 0.7, sigma: float = 0.3) -> None:
        self.beta, self.sigma, self.k, self.m = beta, sigma, 0, None

    def __call__(self, g: Tensor, losses: Tensor) -> Tensor:
        self.k += 1
        beta = self.beta / self.k**self.sigma
        log_gradients = g / (losses + 1e-8)[:, None]
        before = torch.zeros_like(g) if self.m is None else self.m
        self.m = beta * before + (1 - beta) * log_gradients
        norms = self.m.norm(dim=1)
        return norms.max() * (self.m / norms[:, None]).sum(0)


class PlainMoCo:
    """Fernando et al. 2023, with the new averages in lambda's step."""

    def __init__(self, gamma_sigma: float, rho: float, project: Callable[[Tensor], Tensor]) -> None:
        self.gamma_sigma, self.rho, self.project, self.k, self.y = gamma_sigma, rho, project, 0, None

    def __call__(self, g: Tensor, losses: Tensor) -> Tensor:
        self.k += 1
        if self.y is None:
            self.y = torch.zeros_like(g)
            self.w = torch.full((len(g),), 1 / len(g), dtype=F64)
        self.y = self.y - 0.5 / self.k**0.5 * (self.y - g)
        slope = self.y @ self.y.mT @ self.w + self.rho * self.w
        self.w = self.project(self.w - 0.01 / self.k**self.gamma_sigma * slope)
        return self.w @ self.y


def nearest_on_simplex(x: Tensor) -> Tensor:
    low, high = x.min().item() - 1, x.max().item()
    for _ in range(200):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if (x - middle).clamp(min=0).sum() > 1 else (low, middle)
    return (x - low).clamp(min=0)


class PlainExcessMTL:
    """He et al. 2024: the risks of the first two steps, then exponentiated gradient steps."""

    def __init__(self) -> None:
        self.k, self.s, self.first = 0, None, 0.0

    def __call__(self, g: Tensor, losses: Tensor) -> Tensor:
        if self.s is None:
            self.s, self.w = torch.zeros_like(g), torch.full((len(g),), 1 / len(g), dtype=F64)
        self.s = self.s + g**2
        risk = (g**2 / self.s.sqrt()).sum(1)
        if self.k < 2:
            self.first = self.first + risk / 2
        else:
            self.w = self.w * torch.exp(0.5 * risk / self.first)
            self.w = self.w / self.w.sum()
        self.k += 1
        return self.w @ g


PLAIN: dict[str, Callable[[], Any]] = {
    "graddrop": PlainGradDrop,
    "leak": lambda: PlainGradDrop(torch.tensor([0.25, 0.5, 0.75])),
    "trimmedmean": PlainTrimmedMean,
    "dbmtl": PlainDBMTL,
    "moco": lambda: PlainMoCo(0.5, 0.1, nearest_on_simplex),
    "moco softmax": lambda: PlainMoCo(0.0, 0.0, lambda x: x.softmax(0)),
    "excessmtl": PlainExcessMTL,
}


@pytest.mark.parametrize("name", KINDS)
def test_against_plain_float64(name: str, backend: Backend) -> None:
    method, plain = KINDS[name](), PLAIN[name]()
    for k in range(5):
        g, losses = gradients(T, seed=k), torch.rand(T, dtype=F64) + 0.1
        out, gram, weights = step(method, g, losses)
        torch.testing.assert_close(out, plain(g, losses), rtol=1e-10, atol=1e-12)
        assert gram.shape == (T, T)
        if name in RUNNING:
            assert weights.shape == (T,) and weights.dtype == F64
        else:
            assert weights is None
            torch.testing.assert_close(gram, g @ g.mT, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", RUNNING)
def test_gram_and_weights_belong_to_the_update(name: str, backend: Backend) -> None:
    """The update's length is that of the weighted sum of what the Gram matrix is of."""
    method = KINDS[name]()
    for k in range(3):
        out, gram, w = step(method, gradients(T, seed=k), torch.rand(T, dtype=F64) + 0.1)
        torch.testing.assert_close(w @ gram @ w, out.square().sum(), rtol=1e-10, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", KINDS)
def test_dtypes(name: str, dtype: torch.dtype, backend: Backend) -> None:
    """The update is rounded once; what is kept is in float32."""
    method, plain = KINDS[name](), PLAIN[name]()
    for k in range(3):
        g, losses = gradients(T, 200, seed=k).to(dtype), torch.rand(T, dtype=F64) + 0.1
        out = step(method, g, losses)[0]
        expected = plain(g.double(), losses)
        assert out.dtype == dtype
        tolerance = 1e-5 + torch.finfo(dtype).eps
        off = (out.double() - expected).abs() > tolerance * (expected.abs() + 1)
        assert off.sum() == 0 or (name in ("graddrop", "leak") and off.double().mean() < 0.01)


# --- TorchJD


def test_graddrop_equals_torchjds(monkeypatch: pytest.MonkeyPatch, backend: Backend) -> None:
    aggregation = pytest.importorskip("torchjd.aggregation")
    g = gradients(5, 300)
    numbers = uniform_numbers(g, 9, 0)
    leak = torch.tensor([0.0, 0.5, 1.0, 0.1, 0.9], dtype=F64)
    monkeypatch.setattr(torch, "rand", lambda *shape, **options: numbers.clone())
    for share in (None, leak):
        ours = GradDrop(share, generator=ops.order_state(9))(g)
        torch.testing.assert_close(ours, aggregation.GradDrop(leak=share)(g), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("num_tasks", "trim"), [(1, 0), (3, 0), (3, 1), (8, 2), (9, 4)])
def test_trimmed_mean_equals_torchjds(num_tasks: int, trim: int, backend: Backend) -> None:
    aggregation = pytest.importorskip("torchjd.aggregation")
    g = gradients(num_tasks)
    expected = aggregation.TrimmedMean(trim_number=trim)(g)
    torch.testing.assert_close(TrimmedMean(trim)(g), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("warmup", [1, 3])
def test_excessmtl_equals_torchjds(warmup: int, backend: Backend) -> None:
    """Up to its absolute 1e-7."""
    aggregation = pytest.importorskip("torchjd.aggregation")
    theirs = aggregation.ExcessMTL(robust_step_size=0.7, n_warmup_steps=warmup)
    ours = ExcessMTL(step_size=0.7, warmup=warmup)
    for k in range(6):
        g = gradients(4, seed=k)
        torch.testing.assert_close(ours(g), theirs(g), rtol=1e-4, atol=1e-5)


# --- properties


def test_graddrop_of_gradients_that_agree_is_their_sum(backend: Backend) -> None:
    g = gradients(4).abs()
    torch.testing.assert_close(GradDrop()(g), g.sum(0))
    torch.testing.assert_close(GradDrop()(-g), -g.sum(0))
    assert (GradDrop()(torch.stack([g[0], -g[0]])).abs() == g[0]).all()
    assert (GradDrop()(torch.zeros(3, 5)) == 0).all()


@pytest.mark.parametrize("num_tasks", [1, 2])
@pytest.mark.parametrize("name", [name for name in KINDS if name not in ("leak", "trimmedmean")])
def test_few_tasks(name: str, num_tasks: int, backend: Backend) -> None:
    method, plain = KINDS[name](), PLAIN[name]()
    for k in range(3):
        g, losses = gradients(num_tasks, seed=k), torch.ones(num_tasks, dtype=F64)
        torch.testing.assert_close(step(method, g, losses)[0], plain(g, losses), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", RUNNING)
def test_duplicates_weigh_the_same(name: str, backend: Backend) -> None:
    method = KINDS[name]()
    for k in range(3):
        g = gradients(2, seed=k)[[0, 1, 0]]
        w = step(method, g, torch.ones(3, dtype=F64))[2]
        torch.testing.assert_close(w[0], w[2], rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", RUNNING)
def test_zero_and_opposite_gradients(name: str, backend: Backend) -> None:
    for rows in ((1.0, 0.0, -1.0), (0.0, 0.0, 0.0)):
        method = KINDS[name]()
        for k in range(4):
            g = torch.tensor(rows, dtype=F64)[:, None] * gradients(1, seed=k)
            out, _, w = step(method, g, torch.ones(3, dtype=F64))
            assert out.isfinite().all() and w.isfinite().all()
            assert (out == 0).all() if rows == (0.0, 0.0, 0.0) else True


@pytest.mark.parametrize("name", [name for name in KINDS if name != "leak"])
def test_permutation(name: str, backend: Backend) -> None:
    """State goes by the names of the tasks, whatever their order."""
    one, other = KINDS[name](), KINDS[name]()
    order = torch.tensor([2, 0, 1])
    for k in range(4):
        g, losses = gradients(T, seed=k), torch.rand(T, dtype=F64) + 0.1
        expected = step(one, g, losses)[0]
        permuted = order if k % 2 else torch.arange(T)
        found = step(other, g[permuted], losses[permuted], names=[NAMES[t] for t in permuted])[0]
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
@pytest.mark.parametrize("name", ["graddrop", "trimmedmean", "excessmtl"])
def test_scale(name: str, scale: float, backend: Backend) -> None:
    one, other = KINDS[name](), KINDS[name]()
    for k in range(4):
        g = gradients(T, seed=k).float()
        torch.testing.assert_close(step(other, scale * g)[0], scale * step(one, g)[0], rtol=2e-4, atol=1e-6 * scale)


@pytest.mark.parametrize("scale", [1e-6, 1e12])
def test_dbmtl_does_not_see_the_scale_of_a_loss(scale: float, backend: Backend) -> None:
    one, other = DBMTL(eps=0.0), DBMTL(eps=0.0)
    for k in range(4):
        g, losses = gradients(T, seed=k), torch.rand(T, dtype=F64) + 0.1
        factors = torch.tensor([1.0, scale, 1.0], dtype=F64)
        expected, _, w = step(one, g, losses)
        found, _, v = step(other, factors[:, None] * g, factors * losses)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(v, w, rtol=1e-9, atol=0)


@pytest.mark.parametrize("by_tensor", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_loss_scale(name: str, by_tensor: bool, backend: Backend) -> None:
    """Gradients with a loss scale that changes give that scale's update; state has none."""
    one, other = KINDS[name](), KINDS[name]()
    for k in range(4):
        g, losses = gradients(T, seed=k), torch.rand(T, dtype=F64) + 0.1
        scale = 2.0 ** (10 - 3 * k)
        expected, gram, _ = step(one, g, losses)
        given = torch.tensor(scale) if by_tensor else scale
        found, scaled, _ = step(other, scale * g, losses, loss_scale=given)
        torch.testing.assert_close(found, scale * expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(scaled, scale**2 * gram, rtol=1e-9, atol=1e-9)


# --- absent tasks


@pytest.mark.parametrize("by_mask", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_absent_tasks(name: str, by_mask: bool, backend: Backend) -> None:
    """As if they were not there, also where the device alone knows, and their rows hold zeros."""
    some = NAMES[:4]
    here = [True, True, False, True]
    one, other = KINDS[name](), KINDS[name]()
    if name == "leak":
        other.leak = torch.tensor([0.25, 0.5, 0.0, 0.75], dtype=F64)
    for k in range(3):
        g, losses = gradients(3, seed=k), torch.rand(3, dtype=F64) + 0.1
        expected = step(one, g, losses, names=["a", "b", "d"])[0]
        out = torch.empty(40, dtype=F64)
        all_losses = torch.zeros(4, dtype=F64)
        all_losses[torch.tensor(here)] = losses
        if by_mask:
            bank = torch.zeros(4, 40, dtype=F64)
            bank[torch.tensor(here)] = g
            rows, present = bank_rows(bank), torch.tensor(here)
        else:
            rows, present = GradientRows(list(g), [0, 1, 3], 4, 1), here
        _, weights = other.update(rows, [out], Seen(some, present, losses=all_losses))
        torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
        assert weights is None or weights[2] == 0


@pytest.mark.parametrize("name", RUNNING)
def test_a_task_that_comes_back_finds_its_state(name: str, backend: Backend) -> None:
    method = KINDS[name]()
    for k in range(3):
        step(method, gradients(T, seed=k), torch.ones(T, dtype=F64))
    before = method.state_dict()[method._holds]
    step(method, gradients(2, seed=7), torch.ones(2, dtype=F64), names=["a", "c"])
    after = method.state_dict()[method._holds]
    assert torch.equal(after["b"][0], before["b"][0])
    assert not torch.equal(after["a"][0], before["a"][0]) and not torch.equal(after["c"][0], before["c"][0])
    absent = Seen(["a", "b", "c"], [True, False, True], losses=torch.ones(3, dtype=F64))
    g = gradients(2, seed=8)
    method.update(GradientRows(list(g), [0, 2], 3, 1), [torch.empty(40, dtype=F64)], absent)
    assert torch.equal(method.state_dict()[method._holds]["b"][0], before["b"][0])


def test_trimmed_mean_of_too_few_tasks() -> None:
    with pytest.raises(ValueError, match=r"TrimmedMean\(1\) leaves out 2 tasks: expected more of them, got 2 present"):
        TrimmedMean(1)(torch.ones(2, 5))
    with pytest.raises(ValueError, match="got 2 present"):
        step(TrimmedMean(1), torch.ones(3, 5), present=[True, False, True])
    out = step(TrimmedMean(1), torch.ones(3, 5), present=torch.tensor([True, False, True]))[0]
    assert out.isnan().all()


# --- what is not finite


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", KINDS)
def test_non_finite_gradients_show_and_pass(name: str, value: float, backend: Backend) -> None:
    """A step that overflowed, and that a `GradScaler` skips, leaves no trace that is not finite."""
    method = KINDS[name]()
    ones = torch.ones(T, dtype=F64)
    step(method, gradients(T), ones)
    bad = gradients(T, seed=1)
    bad[1, 7] = value
    out, _, w = step(method, bad, ones)
    assert not out.isfinite().all() and (w is None or w.isnan().all())
    out = step(method, gradients(T, seed=2), ones)[0]
    assert out.isfinite().all()


def test_dbmtl_of_losses_without_a_logarithm(backend: Backend) -> None:
    for loss in (-1.0, math.nan, math.inf):
        method = DBMTL()
        out, _, w = step(method, gradients(T), torch.tensor([1.0, loss, 1.0], dtype=F64))
        assert out.isnan().all() and w.isnan().all()
        assert step(method, gradients(T), torch.ones(T, dtype=F64))[0].isfinite().all()
    assert step(DBMTL(eps=0.0), gradients(T), torch.zeros(T, dtype=F64))[0].isnan().all()


# --- state


@pytest.mark.parametrize("name", RUNNING)
def test_state_is_saved_and_restored(name: str, backend: Backend) -> None:
    method = KINDS[name]()
    losses = torch.rand(T, dtype=F64) + 0.1
    assert method.state_dict() == {}
    for k in range(4):
        step(method, gradients(T, seed=k), losses)
    file = io.BytesIO()
    torch.save(method.state_dict(), file)
    expected = step(method, gradients(T, seed=9), losses)[0]
    file.seek(0)
    state = torch.load(file, weights_only=True)
    fresh = KINDS[name]()
    fresh.load_state_dict(state)
    assert torch.equal(step(fresh, gradients(T, seed=9), losses)[0], expected)
    method.load_state_dict(state)
    assert torch.equal(step(method, gradients(T, seed=9), losses)[0], expected)
    # and the one that was loaded is not written to
    fresh = KINDS[name]()
    fresh.load_state_dict(state)
    assert torch.equal(step(fresh, gradients(T, seed=9), losses)[0], expected)


@pytest.mark.parametrize("name", RUNNING)
def test_reset(name: str, backend: Backend) -> None:
    method, losses = KINDS[name](), torch.ones(T, dtype=F64)
    expected = [step(method, gradients(T, seed=k), losses)[0] for k in range(3)]
    method.reset()
    found = [step(method, gradients(T, seed=k), losses)[0] for k in range(3)]
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    other = torch.ones(T, 7, dtype=F64)
    with pytest.raises(ValueError, match=r"task 'a': the method keeps tensors of other shared parameters, of shapes"):
        step(method, other, losses)
    method.reset()
    assert step(method, other, losses)[0].isfinite().all()
    method.load_state_dict({})
    assert method.state_dict() == {}


@pytest.mark.parametrize("name", RUNNING)
def test_bad_state(name: str) -> None:
    method = KINDS[name]()
    step(method, gradients(T), torch.ones(T, dtype=F64))
    good = method.state_dict()
    for state in ({"numbers": good["numbers"]}, {**good, "more": 1}, {"step": torch.ones(())}):
        with pytest.raises(ValueError, match="state: expected that of"):
            method.load_state_dict(state)
    for held in ([], {"a": torch.ones(3)}, {"a": [3]}, {1: []}, {"a": [torch.ones(3, dtype=torch.int64)]}):
        with pytest.raises(ValueError, match=r"expected a list of tensors for the name of each task|\[T\]|names"):
            method.load_state_dict({**good, method._holds: held})


def test_held_gradients_keep_one_memory_order() -> None:
    """A layout that changes from step to step, or was saved in another, is brought into that of the first."""
    held = HeldGradients()
    last = torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last)
    rows = GradientRows([last, last.contiguous()], [0, 1], 2, 1)
    first = held.of(rows, ["a", "b"])
    assert all(x.stride() == last.stride() for x in first)
    rows = GradientRows([last.contiguous(), last.contiguous()], [0, 1], 2, 1)
    assert all(x is y for x, y in zip(held.of(rows, ["a", "b"]), first, strict=True))
    rows = GradientRows([last.contiguous()] * 3, [0, 1, 2], 3, 1)
    assert held.of(rows, ["b", "new", "a"])[1].stride() == last.stride()


def test_averages_of_several_layouts(backend: Backend) -> None:
    """Gradients of one memory order, then of another: the same update as of one."""
    one, other = MoCo(gamma=0.01), MoCo(gamma=0.01)
    for k in range(3):
        g = [gradients(1, 120, seed=10 * k + t).reshape(2, 3, 4, 5) for t in range(2)]
        expected = one([[x] for x in g])[0]
        moved = [x.to(memory_format=torch.channels_last) if (t + k) % 2 else x for t, x in enumerate(g)]
        torch.testing.assert_close(other([[x] for x in moved])[0], expected, rtol=1e-12, atol=1e-12)


# --- arguments


def test_bad_arguments() -> None:
    for call, error, match in (
        (lambda: GradDrop([0.5, 1.5]), ValueError, "leak: expected numbers from 0 to 1, got"),
        (lambda: GradDrop([math.nan]), ValueError, "leak: expected numbers from 0 to 1"),
        (lambda: GradDrop([]), ValueError, r"leak: expected T numbers, got shape \[0\]"),
        (lambda: GradDrop(0.5), TypeError, "leak: expected T numbers, got float"),
        (lambda: GradDrop("0.5"), TypeError, "leak: expected T numbers, got str"),
        (lambda: GradDrop(generator=3), TypeError, "generator: expected a torch.Generator or a state, got int"),
        (lambda: GradDrop([0.5])(torch.ones(2, 3)), ValueError, "leak: expected 2 numbers, one for each task, got 1"),
        (lambda: TrimmedMean(-1), ValueError, "trim: expected an integer from 0, got -1"),
        (lambda: TrimmedMean(1.0), TypeError, "trim: expected an integer, got float"),
        (lambda: TrimmedMean(True), TypeError, "trim: expected an integer, got bool"),
        (lambda: DBMTL(1.0), ValueError, "beta: expected a number from 0 to below 1, got 1.0"),
        (lambda: DBMTL(beta_sigma=-1), ValueError, "beta_sigma: expected a number from 0, got -1"),
        (lambda: DBMTL(eps=math.nan), ValueError, "eps: expected a number from 0, got nan"),
        (lambda: MoCo(0.0), ValueError, "beta: expected a number above 0 to 1, got 0.0"),
        (lambda: MoCo(gamma=0), ValueError, "gamma: expected a positive number, got 0"),
        (lambda: MoCo(rho=-1), ValueError, "rho: expected a number from 0, got -1"),
        (lambda: MoCo(gamma_sigma=math.inf), ValueError, "gamma_sigma: expected a number from 0, got inf"),
        (lambda: MoCo(projection="max"), ValueError, "projection: expected 'simplex' or 'softmax', got 'max'"),
        (lambda: ExcessMTL(0.0), ValueError, "step_size: expected a positive number, got 0.0"),
        (lambda: ExcessMTL(warmup=0), ValueError, "warmup: expected an integer from 1, got 0"),
        (lambda: ExcessMTL(warmup=1.5), TypeError, "warmup: expected an integer, got float"),
    ):
        with pytest.raises(error, match=match):
            call()


@pytest.mark.parametrize("name", KINDS)
def test_a_gram_matrix_is_not_enough(name: str) -> None:
    with pytest.raises(TypeError, match=r"needs .*the task gradients themselves"):
        KINDS[name]().weights(torch.eye(3))
    with pytest.raises(TypeError, match="has no weights of a Gram matrix"):
        KINDS[name]().weigh(torch.eye(3), Seen(NAMES[:3], [True] * 3, losses=torch.ones(3, dtype=F64)))


def test_dbmtl_cannot_be_called_without_losses() -> None:
    with pytest.raises(TypeError, match="method DBMTL: needs the tasks' losses and the task gradients themselves"):
        DBMTL()(torch.ones(2, 3))


@pytest.mark.parametrize("name", KINDS)
def test_no_value_is_read_on_the_host(name: str) -> None:
    # under fake tensors any .item(), boolean index or `if tensor` raises
    from torch._subclasses.fake_tensor import FakeTensorMode

    method = KINDS[name]()
    with FakeTensorMode(allow_non_fake_inputs=True), fastmtl.use_backend("reference"):
        for present in (torch.ones(T, dtype=torch.bool), [True] * T):
            out = step(method, torch.zeros(T, 40), torch.zeros(T, dtype=F64), present=present)[0]
            assert out.shape == (40,)


# --- several ranks


def test_ranks_draw_the_same() -> None:
    """What a rank sends the others is enough to draw what it draws, whatever its key and counter."""
    device = torch.device("cpu")
    for source in (
        Draw(0x123456789ABCDEF, None),
        Draw(5, torch.tensor([-(1 << 62) - 12345, 1 << 40])),
        Draw(0, torch.tensor([-1, 0])),
    ):
        sent: list[Tensor] = []
        shared = shared_source(source, device, lambda x, sent=sent: sent.append(x) or x.clone())
        assert sent[0].dtype == F64
        received = shared_source(Draw(99, None), device, lambda x, sent=sent: sent[0])
        assert torch.equal(shared.state, received.state)
        key, state = source
        words = [key, 0] if state is None else [int(state[0]) ^ key, int(state[1])]
        assert shared.key == 0 and shared.state.tolist() == words
    assert shared_source(Draw(7, None), device, None) == Draw(7, None)


@pytest.mark.parametrize("name", KINDS)
def test_columns_in_parts(name: str) -> None:
    """Two ranks with half of the columns each, whose Gram matrices are added up, do what one does with all."""
    if name in ("graddrop", "leak"):
        pytest.skip("what a part draws is its own")
    whole, parts = KINDS[name](), [KINDS[name](), KINDS[name]()]
    for k in range(3):
        g, losses = gradients(T, seed=k), torch.rand(T, dtype=F64) + 0.1
        expected, gram, _ = step(whole, g, losses)
        halves = [g[:, :15].contiguous(), g[:, 15:].contiguous()]
        # first what each contributes, on copies; then the step, with the sums
        sums: list[Tensor] = []
        for method, half in zip(parts, halves, strict=True):
            mine: list[Tensor] = []
            copy = KINDS[name]()
            copy.load_state_dict(method.state_dict())
            step(copy, half, losses, total=lambda m, mine=mine: mine.append(m.clone()) or m)
            sums = mine if not sums else [a + b for a, b in zip(sums, mine, strict=True)]
        found = []
        for method, half in zip(parts, halves, strict=True):
            left = list(sums)
            out, total, _ = step(method, half, losses, total=lambda m, left=left: left.pop(0))
            assert not left
            torch.testing.assert_close(total, gram, rtol=1e-10, atol=1e-12)
            found.append(out)
        torch.testing.assert_close(torch.cat(found), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", KINDS)
def test_a_rank_without_columns(name: str) -> None:
    """It comes to every sum, and writes nothing."""
    with_columns, without = KINDS[name](), KINDS[name]()
    calls: list[list[Any]] = [[], []]
    losses = torch.ones(T, dtype=F64)
    step(with_columns, gradients(T), losses, total=lambda m: calls[0].append(m.shape) or m)
    seen = Seen(NAMES[:T], [True] * T, losses=losses, total=lambda m: calls[1].append(m.shape) or m)
    gram, _ = without.update(GradientRows([], [], T, 0), [], seen)
    assert gram.shape == (T, T) and calls[0] == calls[1]


# --- as gradients come about


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh())
        self.heads = nn.ModuleList(nn.Linear(5, 2) for _ in range(T))

    def losses(self, x: Tensor) -> list[Tensor]:
        z = self.trunk(x)
        return [(head(z) - (-1) ** t).square().mean() for t, head in enumerate(self.heads)]


def plain_step(net: nn.Module, params: Sequence[Tensor], losses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """`[T, P]` gradients and `[T]` losses, float64, by autograd alone."""
    rows = [torch.cat([g.flatten() for g in torch.autograd.grad(x, params, retain_graph=True)]) for x in losses]
    return torch.stack(rows), torch.stack([x.detach() for x in losses])


def shared_gradient(params: Sequence[Tensor]) -> Tensor:
    return torch.cat([p.grad.flatten() for p in params])


@pytest.mark.parametrize("way", ["backward", "bank"])
@pytest.mark.parametrize("name", ["trimmedmean", *RUNNING])
def test_in_backward_and_in_a_bank(name: str, way: str, backend: Backend) -> None:
    net = Net().double()
    params = list(net.trunk.parameters())
    method, plain = KINDS[name](), PLAIN[name]()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    bank = fastmtl.GradientBank(net, NAMES[:T])
    for _ in range(4):
        x = torch.randn(6, 4, dtype=F64)
        g, values = plain_step(net, params, net.losses(x))
        expected = plain(g, values)
        optimizer.zero_grad()
        losses = dict(zip(NAMES, net.losses(x), strict=False))
        if way == "backward":
            surgery = fastmtl.backward(losses, net, method=method)
        else:
            for task, loss in losses.items():
                with bank.task(task):
                    loss.backward(retain_graph=True)
            needed = {"losses": losses} if "losses" in method.needs else {}
            surgery = bank.apply(method, **needed)
        torch.testing.assert_close(shared_gradient(params), expected, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(surgery.grad_norm(), expected.norm(), rtol=1e-9, atol=0)
        for t, head in enumerate(net.heads):
            own = torch.autograd.grad(net.losses(x)[t], list(head.parameters()))
            assert all(torch.allclose(p.grad, y) for p, y in zip(head.parameters(), own, strict=True))
        optimizer.step()


@pytest.mark.parametrize("name", ["trimmedmean", *RUNNING])
def test_in_one_pass(name: str, backend: Backend) -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    params = list(net.parameters())
    method, plain = KINDS[name](), PLAIN[name]()
    ids = torch.tensor([0, 1, 2, 1, 0, 2, 2])
    for _ in range(3):
        x, y = torch.randn(7, 4, dtype=F64), torch.randn(7, 2, dtype=F64)
        parts = [(net(x[ids == t]) - y[ids == t]).square().sum() for t in range(T)]
        g, values = plain_step(net, params, parts)
        expected = plain(g, values)
        net.zero_grad()
        with fastmtl.one_pass(net, ids, NAMES[:T]) as bank:
            (net(x) - y).square().sum().backward()
        bank.apply(method, **({"losses": parts} if "losses" in method.needs else {}))
        torch.testing.assert_close(shared_gradient(params), expected, rtol=1e-9, atol=1e-12)


def test_graddrop_in_backward(backend: Backend) -> None:
    """Each parameter is drawn for by its place; the update is the op's."""
    net = Net().double()
    params = list(net.trunk.parameters())
    x = torch.randn(6, 4, dtype=F64)
    rows = [list(torch.autograd.grad(loss, params, retain_graph=True)) for loss in net.losses(x)]
    expected = ops.graddrop(rows, generator=ops.order_state(3))
    state = ops.order_state(3)
    surgery = fastmtl.backward(net.losses(x), net, method=GradDrop(generator=state))
    assert all(torch.equal(p.grad, y) for p, y in zip(params, expected, strict=True))
    assert state[1] == 1 and surgery.weights is None
    torch.testing.assert_close(surgery.gram, ops.gram(rows))
    torch.testing.assert_close(surgery.grad_norm(), shared_gradient(params).norm())


@pytest.mark.parametrize("name", ["graddrop", "moco"])
def test_not_streamed(name: str) -> None:
    net, x = nn.Linear(4, 2), torch.randn(3, 4)
    with fastmtl.one_pass(net, torch.tensor([0, 1, 0]), 2, memory="stream") as bank:
        net(x).square().sum().backward()
    with pytest.raises(ValueError, match="needs the task gradients themselves: memory='stream' keeps none"):
        bank.apply(KINDS[name]())


def test_by_name(backend: Backend) -> None:
    net = Net()
    for name in ("graddrop", "dbmtl", "moco", "excessmtl"):
        assert isinstance(methods.get(name), Method)
        fastmtl.backward(net.losses(torch.randn(6, 4)), net, method=name)


def test_with_a_grad_scaler(backend: Backend) -> None:
    """An overflow is skipped, and the steps behind it are as if it had not been."""
    for name in ("dbmtl", "moco", "excessmtl"):
        results = []
        for overflow in (False, True):
            torch.manual_seed(1)
            net, method = Net().double(), KINDS[name]()
            scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
            optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
            for k in range(4):
                x = torch.randn(6, 4, dtype=F64)
                repeats = (math.inf, 1.0) if overflow and k == 2 else (1.0,)
                for factor in repeats:
                    optimizer.zero_grad()
                    losses = [scaler.scale(loss * factor) for loss in net.losses(x)]
                    fastmtl.backward(losses, net, method=method, loss_scale=scaler.get_scale())
                    scaler.step(optimizer)
                    scaler.update()
            results.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
        torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)
