"""The kernels that look at the gradients element by element in Triton's interpreter, against the float64 oracle."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import cases
import cases_elementwise as elementwise
import pytest
import torch
from cases import BankCase, ListCase

import fastmtl
from fastmtl.core import dispatch
from fastmtl.ops import average_gradients, excess_risks, graddrop, order_state, trimmed_mean

if not dispatch.interpreting():
    pytest.skip("needs TRITON_INTERPRET=1, set before Triton is imported", allow_module_level=True)
pytest.importorskip("triton")

from fastmtl.kernels.common.launches import launch as real_launch
from fastmtl.kernels.gradients import elementwise_launchers, launchers

# the interpreter cuts bfloat16 off instead of rounding: 2^-8 on a GPU
UNIT = {**{dtype: cases.unit_roundoff(dtype) for dtype in cases.DTYPES}, torch.bfloat16: 2.0**-7}

BANKS = [
    BankCase(1, 31),
    BankCase(3, 0),
    BankCase(2, 1),
    BankCase(3, 129),
    BankCase(4, 1024),
    BankCase(9, 65),
    BankCase(17, 40),
    *(BankCase(5, 130, dtype) for dtype in (torch.float64, torch.bfloat16, torch.float16)),
    BankCase(8, 1032, torch.bfloat16),
    BankCase(3, 65, torch.float16, "transposed"),
    BankCase(4, 140, torch.float32, "misaligned"),
    BankCase(3, 70, torch.float64, "step2"),
    BankCase(4, 70, torch.float32, "expanded_column"),
]
LISTS = [
    *(ListCase(kind, 3) for kind in ("nones", "absent_parameter", "absent_task", "scalars", "mixed_dtypes")),
    ListCase("mixed_layouts", 3, torch.bfloat16),
    ListCase("channels_last", 3, torch.bfloat16),
    ListCase("empty_tensors", 2),
    ListCase("all_none", 2),
]
# with many programs of several short tiles
SMALL = [
    BankCase(3, 129),
    BankCase(8, 264, torch.bfloat16),
    BankCase(3, 70, torch.float64, "step2"),
    LISTS[0],
    LISTS[4],
]


@pytest.fixture(autouse=True)
def triton_backend() -> Iterator[None]:
    with fastmtl.use_backend("triton"):
        yield


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (launchers, elementwise_launchers):
        monkeypatch.setattr(module, "LANES", 16)
    monkeypatch.setattr(launchers, "BLOCKS", 4)


def check_everything(case: BankCase | ListCase) -> None:
    elementwise.check_graddrop(case, UNIT)
    elementwise.check_trimmed_mean(case, UNIT)
    elementwise.check_average_gradients(case)
    elementwise.check_excess_risks(case)


@pytest.mark.parametrize("case", [*BANKS, *LISTS], ids=str)
def test_values(case: BankCase | ListCase) -> None:
    check_everything(case)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_many_programs(case: BankCase | ListCase, small_parts: None) -> None:
    check_everything(case)


DRAWN = [BankCase(5, 1025), ListCase("mixed_layouts", 4), ListCase("absent_parameter", 4)]


@pytest.mark.parametrize("case", DRAWN, ids=str)
def test_graddrop_draws_the_same_everywhere(case: BankCase | ListCase) -> None:
    found = graddrop(case.make(), generator=order_state(11))
    with fastmtl.use_backend("reference"):
        expected = graddrop(case.make(), generator=order_state(11))
    assert torch.equal(elementwise.result(found), elementwise.result(expected))


def test_into_the_first_row() -> None:
    grads = BankCase(5, 600).make()
    for write in (lambda g, **o: graddrop(g, generator=order_state(4), **o), lambda g, **o: trimmed_mean(g, 1, **o)):
        expected, given = write(grads), grads.clone()
        write(given, out=given[0])
        assert torch.equal(given[0], expected) and torch.equal(given[1:], grads[1:])


def test_wide_trims_take_narrow_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that what is cut off stays in registers."""
    blocks = []

    def seen(fn: Any, *args: Any, **arguments: Any) -> None:
        blocks.append((arguments["TRIM"], arguments["BLOCK"], arguments["tiles_per_block"]))
        real_launch(fn, *args, **arguments)

    monkeypatch.setattr(elementwise_launchers, "launch", seen)
    grads = BankCase(33, 600).make()
    for trim in (1, 16):
        found = trimmed_mean(grads, trim)
        torch.testing.assert_close(found, grads.sort(dim=0).values[trim : 33 - trim].mean(0), rtol=1e-5, atol=1e-6)
    assert blocks == [(1, 512, 1), (16, 128, 4)]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_non_finite(value: float) -> None:
    ones = torch.ones(3)
    for columns in (1, 65, 520):
        grads = BankCase(3, columns).make()
        grads[1, columns // 2] = value
        for found in (graddrop(grads), graddrop(grads, leak=ones), trimmed_mean(grads, 1), trimmed_mean(grads, 0)):
            assert found[columns // 2].isnan() and found.isnan().sum() == 1
        for gram in (False, True):
            held = torch.full((3, columns), 2.0)
            shown = average_gradients(grads, held, 0.5 * ones, ones, gram=gram).isnan()
            assert held[1, columns // 2] == 2 and held.isfinite().all() and shown[1].all()
            assert not shown[0, 0].any() if gram else shown.tolist() == [False, True, False]
        held = torch.full((3, columns), 2.0)
        assert excess_risks(grads, held, ones).isnan().tolist() == [False, True, False]
        assert held[1, columns // 2] == 2 and held.isfinite().all()


def test_what_is_not_there_is_not_looked_at() -> None:
    grads = BankCase(3, 65).make()
    expected = trimmed_mean(grads[[0, 2]], 0)
    grads[1] = torch.nan
    present = torch.tensor([True, False, True])
    drawn = graddrop(grads, present=present, generator=order_state(1))
    assert torch.equal(drawn, graddrop(grads[[0, 2]], generator=order_state(1)))
    torch.testing.assert_close(trimmed_mean(grads, 0, present=present), expected, rtol=1e-6, atol=1e-7)
    assert trimmed_mean(grads, 1, present=present).isnan().all()  # nothing is left
    keep, take = torch.tensor([0.5, 1.0, 0.5]), torch.tensor([0.5, 0.0, 0.5])
    for gram in (False, True):
        held = torch.full((3, 65), 2.0)
        assert average_gradients(grads, held, keep, take, gram=gram).isfinite().all() and (held[1] == 2).all()
    held = torch.full((3, 65), 2.0)
    assert excess_risks(grads, held, take)[1] == 0 and (held[1] == 2).all()
