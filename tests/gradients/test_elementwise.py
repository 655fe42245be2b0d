"""`graddrop`, `trimmed_mean`, `average_gradients` and `excess_risks`: values, draws, memory and bad input, on
every backend and CPU level."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cases
import cases_elementwise as elementwise
import pytest
import torch
from cases import BAD_GRADS, BadGrads, BankCase, ListCase
from conftest import Backend
from torch import Tensor

from fastmtl import ops, use_backend
from fastmtl.ops import average_gradients, excess_risks, graddrop, order_state, trimmed_mean
from fastmtl.ops.gradients.arguments import read_rows

ids = {"ids": str}


@pytest.mark.parametrize("case", elementwise.CASES, **ids)
def test_graddrop(case: BankCase | ListCase, level: Backend) -> None:
    elementwise.check_graddrop(case)


@pytest.mark.parametrize("case", elementwise.CASES, **ids)
def test_trimmed_mean(case: BankCase | ListCase, level: Backend) -> None:
    elementwise.check_trimmed_mean(case)


@pytest.mark.parametrize("case", elementwise.CASES, **ids)
def test_average_gradients(case: BankCase | ListCase, level: Backend) -> None:
    elementwise.check_average_gradients(case)


@pytest.mark.parametrize("case", elementwise.CASES, **ids)
def test_excess_risks(case: BankCase | ListCase, level: Backend) -> None:
    elementwise.check_excess_risks(case)


# --- what is drawn


@pytest.mark.parametrize(
    "case", [BankCase(5, 4097), BankCase(3, 1025, torch.bfloat16), ListCase("mixed_layouts", 8)], **ids
)
def test_graddrop_draws_the_same_everywhere(case: BankCase | ListCase, level: Backend) -> None:
    """No tolerance: the decisions are the same, and without a leak so are the sums."""
    found = graddrop(case.make(), generator=order_state(11))
    with use_backend("reference"):
        expected = graddrop(case.make(), generator=order_state(11))
    assert torch.equal(elementwise.result(found), elementwise.result(expected))


def test_graddrop_draws_anew(level: Backend) -> None:
    grads = BankCase(2, 4097).make()
    state = order_state(1)
    first, second = graddrop(grads, generator=state), graddrop(grads, generator=state)
    assert state[1] == 2 and not torch.equal(first, second)
    assert torch.equal(graddrop(grads, generator=order_state(1)), first)
    assert not torch.equal(graddrop(grads, generator=order_state(2)), first)
    torch.manual_seed(3)
    one, two = graddrop(grads), graddrop(grads)
    torch.manual_seed(3)
    assert torch.equal(graddrop(grads), one) and torch.equal(graddrop(grads), two) and not torch.equal(one, two)


def test_graddrop_draws_by_parameter(level: Backend) -> None:
    """A parameter's numbers are its own, whether those before it have gradients or not."""
    grads = ListCase("dense", 3).make()
    whole = graddrop(grads, generator=order_state(1))
    part = graddrop([[None, *row[1:]] for row in grads], generator=order_state(1))
    assert part[0] is None
    assert all(torch.equal(x, y) for x, y in zip(whole[1:], part[1:], strict=True))


def test_graddrop_draws_by_the_purity(level: Backend) -> None:
    """Shares of 1/2, 3/4 and 1 in many columns: six standard deviations at most."""
    n = 1 << 18
    for weak, strong, share in ((1.0, 1.0, 0.5), (1.0, 3.0, 0.75), (0.0, 2.0, 1.0)):
        grads = torch.stack([torch.full((n,), -weak), torch.full((n,), strong)])
        kept = (graddrop(grads, generator=order_state(5)) == strong).double().mean().item()
        assert abs(kept - share) <= 6 * (share * (1 - share) / n) ** 0.5
        # and neighbours are drawn apart from each other
        if share == 0.5:
            x = (graddrop(grads, generator=order_state(6)) > 0).double() * 2 - 1
            assert all(abs((x[k:] * x[:-k]).mean()) < 6 / n**0.5 for k in (1, 2, 64, 1024, 16384))


def test_graddrop_leak(level: Backend) -> None:
    grads = BankCase(5, 1025).make()
    everything = graddrop(grads, leak=torch.ones(5))
    torch.testing.assert_close(everything, grads.sum(0), rtol=1e-5, atol=1e-5)
    assert torch.equal(
        graddrop(grads, leak=torch.zeros(5), generator=order_state(1)), graddrop(grads, generator=order_state(1))
    )


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_scale(scale: float, level: Backend) -> None:
    """Times a power of two nothing is rounded otherwise."""
    factor = 2.0 ** round(torch.tensor(scale).log2().item())
    grads = BankCase(5, 1025).make()
    one = graddrop(grads, generator=order_state(1))
    assert torch.equal(graddrop(factor * grads, generator=order_state(1)), factor * one)
    assert torch.equal(trimmed_mean(factor * grads, 1), factor * trimmed_mean(grads, 1))
    held, scaled = torch.zeros(5, 1025), torch.zeros(5, 1025)
    for _ in range(2):
        risk, other = excess_risks(grads, held, torch.ones(5)), excess_risks(factor * grads, scaled, torch.ones(5))
    torch.testing.assert_close(other, factor * risk, rtol=1e-6, atol=0)


# --- memory


WRITERS: dict[str, Callable[..., Any]] = {
    "graddrop": lambda grads, **options: graddrop(grads, generator=order_state(4), **options),
    "leak": lambda grads, **options: graddrop(
        grads, generator=order_state(4), leak=torch.linspace(0, 1, len(grads)), **options
    ),
    "trimmed_mean": lambda grads, **options: trimmed_mean(grads, (len(grads) - 1) // 2, **options),
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize(
    "case", [BankCase(5, 4097), BankCase(8, 1000, torch.bfloat16, "row_strided"), BankCase(1, 3)], **ids
)
def test_into_the_first_row(name: str, case: BankCase, level: Backend) -> None:
    expected = WRITERS[name](case.make())
    grads = case.make()
    rest = grads[1:].clone()
    found = WRITERS[name](grads, out=grads[0])
    assert found.data_ptr() == grads.data_ptr() and torch.equal(grads[0], expected) and torch.equal(grads[1:], rest)


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("case", [ListCase("dense", 3), ListCase("channels_last", 3, torch.bfloat16)], **ids)
def test_into_the_first_gradients(name: str, case: ListCase, level: Backend) -> None:
    expected = WRITERS[name](case.make())
    grads = case.make()
    WRITERS[name](grads, out=grads[0])
    assert all(torch.equal(x, y) for x, y in zip(grads[0], expected, strict=True))


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("case", [BankCase(3, 65), ListCase("nones", 3), ListCase("channels_last", 3)], **ids)
def test_result_is_new_memory(name: str, case: BankCase | ListCase, level: Backend) -> None:
    grads = case.make()
    found = WRITERS[name](grads)
    if isinstance(grads, Tensor):
        assert found.shape == grads.shape[1:] and found.dtype == grads.dtype
        return
    for i, x in enumerate(found):
        like = next((row[i] for row in grads if row[i] is not None), None)
        assert (x is None) == (like is None)
        if x is not None:
            assert (x.dtype, x.shape, x.stride()) == (like.dtype, like.shape, torch.empty_like(like).stride())


@pytest.mark.parametrize("case", [BankCase(8, 70000), ListCase("large", 5)], **ids)
def test_number_of_threads(case: BankCase | ListCase, level: Backend, threads: None) -> None:
    if level.name == "reference":
        pytest.skip("torch's own sums depend on the number of threads")
    found = []
    for count in (1, 2):
        torch.set_num_threads(count)
        grads = case.make()
        held, squares = (elementwise.held_for(grads, torch.Generator().manual_seed(0), positive=True) for _ in range(2))
        factors = torch.full((case.num_tasks,), 0.5)
        found.append(
            [
                *(elementwise.result(write(grads)) for write in WRITERS.values()),
                average_gradients(grads, held, factors, factors),
                average_gradients(grads, held, factors, factors, gram=True),
                excess_risks(grads, squares, factors),
                cases.double(held),
                cases.double(squares),
            ]
        )
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


# --- non-finite input


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", WRITERS)
def test_non_finite_shows(name: str, value: float, level: Backend) -> None:
    """Wherever it is, in its column alone, among the largest that are left out too."""
    for columns in (1, 65, 2049):
        for row in range(3):
            grads = BankCase(3, columns).make()
            grads[row, columns // 2] = value
            found = WRITERS[name](grads)
            assert found[columns // 2].isnan() and found.isnan().sum() == 1


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_non_finite_does_not_stay(value: float, level: Backend) -> None:
    for columns in (1, 65, 2049):
        ones = torch.ones(3)
        grads = BankCase(3, columns).make()
        grads[1, columns // 2] = value
        for gram in (False, True):
            held = torch.full((3, columns), 2.0)
            found = average_gradients(grads, held, 0.5 * ones, ones, gram=gram)
            assert held[1, columns // 2] == 2 and held.isfinite().all()
            assert torch.equal(held[0], 1 + grads[0])
            shown = found.isnan()
            assert shown[1].all() and (shown[:, 1].all() if gram else True)
            assert not shown[0, 0].any() if gram else shown.tolist() == [False, True, False]
        held = torch.full((3, columns), 2.0)
        assert excess_risks(grads, held, ones).isnan().tolist() == [False, True, False]
        assert held[1, columns // 2] == 2 and held.isfinite().all()


def test_a_sum_that_overflows_shows(level: Backend) -> None:
    """Where the square itself is finite, and the sum of squares is not."""
    held = torch.full((2, 65), 3e38)
    grads = torch.tensor([[1.5e19], [1.0]]).expand(2, 65)
    assert excess_risks(grads, held, torch.ones(2)).isnan().tolist() == [True, False]
    assert (held == 3e38).all()


def test_a_factor_that_is_not_finite(level: Backend) -> None:
    """A loss of 0 or NaN, for example: its average stays as it was."""
    grads = BankCase(3, 65).make()
    for value in (torch.nan, torch.inf):
        held = torch.full((3, 65), 2.0)
        found = average_gradients(grads, held, torch.full((3,), 0.5), torch.tensor([1.0, value, 1.0]))
        assert found.isnan().tolist() == [False, True, False] and (held[1] == 2).all()


def test_what_is_not_there_is_not_looked_at(level: Backend) -> None:
    grads = BankCase(3, 65).make()
    expected = trimmed_mean(grads[[0, 2]], 0)
    grads[1] = torch.nan
    present = torch.tensor([True, False, True])
    for leak in (None, torch.tensor([0.25, 0.5, 0.75])):
        two = None if leak is None else leak[[0, 2]]
        drawn = graddrop(grads, present=present, leak=leak, generator=order_state(1))
        assert torch.equal(drawn, graddrop(grads[[0, 2]], leak=two, generator=order_state(1)))
    assert torch.equal(trimmed_mean(grads, 0, present=present), expected)
    assert trimmed_mean(grads, 1, present=present).isnan().all()  # nothing is left
    keep, take = torch.tensor([0.5, 1.0, 0.5]), torch.tensor([0.5, 0.0, 0.5])
    for gram in (False, True):
        held = torch.full((3, 65), 2.0)
        assert average_gradients(grads, held, keep, take, gram=gram).isfinite().all() and (held[1] == 2).all()
    held = torch.full((3, 65), 2.0)
    assert excess_risks(grads, held, take)[1] == 0 and (held[1] == 2).all()


def test_subnormal_squares(level: Backend) -> None:
    """Squares that are zero in float32: no 0 / 0."""
    held = torch.zeros(2, 65)
    assert excess_risks(torch.full((2, 65), 1e-30), held, torch.ones(2)).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 4, 5, 6, 7, 8, 13, 31, 32, 33, 127, 128])
def test_trimmed_mean_sorts(num_tasks: int, level: Backend) -> None:
    """Every number of rows and, of few, every trim; duplicates and both infinities' neighbours."""
    generator = torch.Generator().manual_seed(num_tasks)
    grads = torch.randint(-9, 9, (num_tasks, 70), generator=generator).to(torch.float64)
    grads[0] = 1e300
    most = (num_tasks - 1) // 2
    for trim in range(most + 1) if num_tasks < 9 else (1, most // 2, most):
        if trim == 0:
            continue
        ordered = grads.sort(dim=0).values[trim : num_tasks - trim]
        torch.testing.assert_close(trimmed_mean(grads, trim), ordered.mean(0), rtol=1e-14, atol=1e-14)


# --- bad input


@pytest.mark.parametrize("bad", BAD_GRADS, **ids)
def test_bad_gradients(bad: BadGrads) -> None:
    ones = torch.ones(2)
    for call in (
        lambda g: graddrop(g),
        lambda g: trimmed_mean(g, 0),
        lambda g: average_gradients(g, g, ones, ones),
        lambda g: excess_risks(g, g, ones),
    ):
        with pytest.raises(bad.error, match=bad.match):
            call(bad.make())


def test_bad_arguments(level: Backend) -> None:
    g = torch.ones(3, 5)
    for trim, error in ((2, ValueError), (-1, ValueError), (1.0, TypeError), (True, TypeError), (None, TypeError)):
        with pytest.raises(error, match="trim: expected"):
            trimmed_mean(g, trim)
    for call, name in (
        (lambda x: graddrop(g, leak=x), "leak"),
        (lambda x: average_gradients(g, g.clone(), x, torch.ones(3)), "keep"),
        (lambda x: average_gradients(g, g.clone(), torch.ones(3), x), "take"),
        (lambda x: excess_risks(g, g.clone(), x), "scale"),
    ):
        with pytest.raises(TypeError, match=f"{name}: expected a tensor, got list"):
            call([1.0, 1.0, 1.0])
        with pytest.raises(TypeError, match=f"{name}: expected a floating-point tensor, got torch.int64"):
            call(torch.ones(3, dtype=torch.int64))
        with pytest.raises(ValueError, match=rf"{name}: expected shape \[3\], got \[2\]"):
            call(torch.ones(2))
        with pytest.raises(ValueError, match=f"{name}: expected device cpu as the gradients, got meta"):
            call(torch.ones(3, device="meta"))
    for x, error, match in (
        ([True] * 3, TypeError, "expected a tensor, got list"),
        (torch.ones(3), TypeError, "expected torch.bool, got torch.float32"),
        (torch.ones(2, dtype=torch.bool), ValueError, r"expected shape \[3\], got \[2\]"),
        (torch.ones(3, dtype=torch.bool, device="meta"), ValueError, "expected device cpu"),
    ):
        with pytest.raises(error, match=f"present: {match}"):
            trimmed_mean(g, 1, present=x)
        with pytest.raises(error, match=f"present: {match}"):
            graddrop(g, present=x)
    with pytest.raises(TypeError, match="generator: expected"):
        graddrop(g, generator=3)
    with pytest.raises(ValueError, match="out: expected shape"):
        graddrop(g, out=torch.empty(4))
    with pytest.raises(RuntimeError, match="out: can't be recorded"):
        trimmed_mean(g.clone().requires_grad_(), 1, out=torch.empty(5))


def test_bad_held() -> None:
    g, ones = torch.ones(3, 5, dtype=torch.bfloat16), torch.ones(3)
    for held, error, match in (
        ([[]], TypeError, "expected a tensor as the gradients are, got list"),
        (torch.ones(3, 4), ValueError, r"expected shape \[3, 5\], torch.float32, cpu, got \[3, 4\]"),
        (
            torch.ones(3, 5, dtype=torch.bfloat16),
            ValueError,
            "expected .*torch.float32, cpu, got .*torch.bfloat16",
        ),
        (torch.ones(5, 3).mT, ValueError, "expected rows without gaps or overlap"),
        (torch.ones(1, 5).expand(3, 5), ValueError, "expected rows without gaps or overlap"),
    ):
        with pytest.raises(error, match=f"averages: {match}"):
            average_gradients(g, held, ones, ones)
        with pytest.raises(error, match=f"squares: {match}"):
            excess_risks(g, held, ones)
    lists = [[torch.ones(2, 3), None], [None, None]]
    good = torch.ones(2, 3)
    for held, error, match in (
        (good, TypeError, "averages: expected 2 lists of 2 tensors"),
        ([[good, None]], TypeError, "averages: expected 2 lists of 2 tensors"),
        ([[good], [good]], TypeError, r"averages\[0\]: expected a list of 2 tensors"),
        ([[good, None], [None, None]], TypeError, r"averages\[1\]\[0\]: expected a tensor, got NoneType"),
        ([[good, None], [good.double(), None]], ValueError, r"averages\[1\]\[0\]: .*got .*torch.float64"),
        ([[good, None], [torch.ones(3, 2), None]], ValueError, r"averages\[1\]\[0\]: expected shape \[2, 3\]"),
        ([[good, None], [torch.ones(2, 6)[:, ::2], None]], ValueError, r"averages\[1\]\[0\]: expected a dense tensor"),
        (
            [[good, None], [torch.ones(3, 2).mT, None]],
            ValueError,
            r"averages\[1\]: expected strides as in averages\[0\]",
        ),
    ):
        with pytest.raises(error, match=match):
            average_gradients(lists, held, torch.ones(2), torch.ones(2))


# --- compiled and recorded


def test_not_recorded(level: Backend) -> None:
    grads = BankCase(3, 65).make().requires_grad_()
    assert not graddrop(grads).requires_grad and not trimmed_mean(grads, 1).requires_grad
    ones = torch.ones(3, requires_grad=True)
    assert not average_gradients(grads, torch.zeros(3, 65), ones, ones).requires_grad
    assert not excess_risks(grads, torch.zeros(3, 65), ones).requires_grad


def test_a_changed_average_is_seen_by_autograd(level: Backend) -> None:
    held = torch.ones(3, 65)
    x = torch.ones(3, 65, requires_grad=True)
    y = (x * held).sum()
    average_gradients(torch.ones(3, 65), held, torch.ones(3), torch.ones(3))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@pytest.mark.slow
def test_compiled(level: Backend, fresh_compiler: None) -> None:
    def run(grads: Tensor, held: Tensor, state: Tensor) -> tuple[Tensor, ...]:
        half = torch.full((5,), 0.5)
        drawn = ops.graddrop(grads, generator=state)
        return drawn, ops.trimmed_mean(grads, 1), ops.average_gradients(grads, held, half, half, gram=True), held

    grads = BankCase(5, 1025).make()
    expected = run(grads, torch.ones(5, 1025), order_state(2))
    state = order_state(2)
    found = torch.compile(run, fullgraph=True, backend="aot_eager")(grads, torch.ones(5, 1025), state)
    assert state[1] == 1
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_lists_in_the_form_of_the_op() -> None:
    """`read_rows` reads a bank and lists alike."""
    assert read_rows(torch.ones(2, 3)).bank is not None
    assert read_rows([[torch.ones(3), None]]).index == [0]
