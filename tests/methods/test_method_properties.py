"""What holds for every method whatever the gradients, on gradients that Hypothesis makes up.

Each example has up to 6 tasks, gradients whose lengths differ by up to eight orders of magnitude, and rows that may be
zero, equal or opposite.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastmtl import methods
from fastmtl.methods import Method, Seen

hypothesis = pytest.importorskip("hypothesis", reason="makes up the gradients")
st = hypothesis.strategies

F64 = torch.float64
VECTORS = torch.rand(4, 6, dtype=F64, generator=torch.Generator().manual_seed(0)) + 0.01


WITH_ARGUMENTS: dict[str, Callable[[int], Method]] = {
    "paretomtl": lambda num_tasks: methods.ParetoMTL(VECTORS[:, :num_tasks], 1, max_start_steps=0),
    "crmogm": lambda num_tasks: methods.CRMOGM(methods.UPGrad(), momentum=0.5),
    "pcgrad": lambda num_tasks: methods.PCGrad(order=torch.arange(num_tasks).repeat(num_tasks, 1)),
    "gradvac": lambda num_tasks: methods.GradVac(order=torch.arange(num_tasks).repeat(num_tasks, 1)),
}


def made(name: str, num_tasks: int) -> Method:
    return WITH_ARGUMENTS[name](num_tasks) if name in WITH_ARGUMENTS else methods.get(name)


# with weights, which are no random numbers
EXPORTED = {
    kind.__name__.lower(): kind
    for kind in (*methods.names.CLASSES, *(getattr(methods, name) for name in methods.names.WITH_ARGUMENTS))
}
KNOWN = [name for name in EXPORTED if name in methods.names.METHODS or name in WITH_ARGUMENTS]
NAMES = [name for name in KNOWN if "gradients" not in EXPORTED[name].needs and name != "randomweights"]
# the order of tasks matters to them by definition: they visit tasks in turn, take the first of equals, or have a first
ORDERED = ("pcgrad", "gradvac", "krum", "pcd")
# by definition their weights change with the scale of the gradients: by which power of it, by default
SCALED = {"nashmtl": -1.0, "fairgrad": -1.0}
# beyond such a condition the rounding of the Gram matrix moves weights by more than the tests allow
WELL_CONDITIONED = 1e6


def settings(count: int):
    return hypothesis.settings(
        max_examples=count, deadline=None, derandomize=True, database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip


@st.composite
def gradient_rows(draw, spread: int = 4, special: bool = True) -> Tensor:
    """`[T, P]` float64."""
    num_tasks = draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    g = torch.randn(num_tasks, num_tasks + 4, dtype=F64, generator=generator)
    g = g - draw(st.sampled_from([0.0, 0.5, 0.9])) * g.mean(0)
    exponents = [draw(st.integers(-spread, spread)) for _ in range(num_tasks)] if spread else [0] * num_tasks
    g = g * (10.0 ** torch.tensor(exponents, dtype=F64))[:, None]
    for t in range(num_tasks) if special else ():
        kind = draw(st.sampled_from(["as it is"] * 6 + ["zero", "equal", "opposite"]))
        if kind == "zero":
            g[t] = 0
        elif kind != "as it is":
            g[t] = g[0] if kind == "equal" else -g[0]
    return g


def weights(name: str, g: Tensor, *, scale: float = 1.0, order: list[int] | None = None, **seen) -> Tensor:
    """The weights that a new method gives to these gradients, in this order of tasks."""
    num_tasks = len(g)
    losses = torch.linspace(1.0, 2.0, num_tasks, dtype=F64)
    other = g.roll(1, 1) + 0.3 * g
    at = torch.tensor(range(num_tasks) if order is None else order)
    method = made(name, num_tasks)
    if name == "paretomtl":
        method = methods.ParetoMTL(VECTORS[:, :num_tasks][:, at], 1, max_start_steps=0)
    rows, others = scale * g[at], scale * other[at]
    everything = Seen([str(int(t)) for t in at], [True] * num_tasks, losses=losses[at], second=rows @ others.mT, **seen)
    return method.weigh(rows @ rows.mT, everything)


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_finite_and_the_update_too(name: str):
    @settings(40)
    @hypothesis.given(gradient_rows())
    def check(g: Tensor) -> None:
        w = weights(name, g)
        assert w.shape == g.shape[:1] and w.dtype == F64
        assert w.isfinite().all() and (w @ g).isfinite().all()

    check()


@pytest.mark.parametrize("name", [name for name in NAMES if name != "modo"])
def test_the_scale_of_all_gradients_does_not_matter(name: str):
    @settings(25)
    @hypothesis.given(gradient_rows(spread=1, special=False), st.integers(-12, 12))
    def check(g: Tensor, exponent: int) -> None:
        hypothesis.assume(torch.linalg.cond(g @ g.mT) < WELL_CONDITIONED)
        w, found = weights(name, g), weights(name, g, scale=10.0**exponent)
        want = w * 10.0 ** (exponent * SCALED.get(name, 0.0))
        torch.testing.assert_close(found, want, rtol=1e-6, atol=1e-6 * want.abs().max().item())

    check()


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ORDERED])
def test_the_order_of_tasks_does_not_matter(name: str):
    @settings(25)
    @hypothesis.given(gradient_rows(spread=1, special=False), st.randoms(use_true_random=False))
    def check(g: Tensor, random) -> None:
        hypothesis.assume(torch.linalg.cond(g @ g.mT) < WELL_CONDITIONED)
        order = random.sample(range(len(g)), len(g))
        w, found = weights(name, g), weights(name, g, order=order)
        torch.testing.assert_close(found, w[order], rtol=1e-6, atol=1e-6 * w.abs().max().item())

    check()


@pytest.mark.parametrize("name", NAMES)
def test_a_number_that_is_not_finite_shows(name: str):
    @settings(15)
    @hypothesis.given(gradient_rows(special=False), st.data(), st.sampled_from([math.nan, math.inf, -math.inf]))
    def check(g: Tensor, data, bad: float) -> None:
        g[data.draw(st.integers(0, len(g) - 1)), data.draw(st.integers(0, g.shape[1] - 1))] = bad
        w = weights(name, g)
        assert not (w @ g).isfinite().all()
        if name not in ("sum", "mean", "pcgrad", "gradvac"):
            assert w.isnan().all()

    check()


@pytest.mark.parametrize("name", ["mgda", "upgrad", "dualproj"])
def test_no_task_is_made_worse(name: str):
    @settings(40)
    @hypothesis.given(gradient_rows(spread=2))
    def check(g: Tensor) -> None:
        w, square = weights(name, g), g.square().sum()
        # by their definition UPGrad and DualProj project with 1e-4 of the trace on the diagonal of the Gram matrix
        slack = 0.0 if name == "mgda" else 1e-4 * square * w
        assert (g @ (w @ g) + slack >= -1e-10 * square).all()

    check()


def test_cagrad_lowers_the_mean_loss():
    @settings(40)
    @hypothesis.given(gradient_rows(spread=2), st.floats(0.0, 0.95))
    def check(g: Tensor, c: float) -> None:
        update = methods.CAGrad(c).weights(g @ g.mT) @ g
        mean = g.mean(0)
        assert update @ mean >= 0.9 * (1 - c) * mean @ mean - 1e-12 * g.norm(dim=1).max() ** 2

    check()
