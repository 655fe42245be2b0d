"""Orders that the device draws, or that are given for some of the tasks, on every backend."""

from __future__ import annotations

import cases
import cases_cuda
import pytest
import torch
from cases import BankCase
from cases_cuda import (
    DEVICE,
    assert_same_bits,
    slack,
    use,
)

from fastmtl.core.gradient_rows import bank_rows
from fastmtl.ops import gram, order_state, pcgrad, pcgrad_project, random_order
from fastmtl.ops.gradients import reference
from fastmtl.ops.gradients.order import Draw, drawn_order
from fastmtl.ops.gradients.pcgrad import pcgrad_rows_into

pytestmark = pytest.mark.gpu
forced = cases_cuda.forced

ORDER_TASKS = (1, 2, 8, 17, 50, 128)


@pytest.mark.parametrize("num_tasks", ORDER_TASKS)
def test_drawn_orders_are_those_of_the_cpu(num_tasks: int, forced: str | None) -> None:
    """For a seed of torch's generator, a state, both at once, and lists: the bits of a call with that order given."""
    grads = BankCase(num_tasks, 1000).make(DEVICE)
    lists = [[row[:333].clone(), row[333:].clone()] for row in grads]
    with use("pcgrad", forced):
        for form in (grads, lists):
            for call in (pcgrad, pcgrad_project):
                torch.manual_seed(5)
                order = random_order(num_tasks)
                assert order.device.type == "cpu"
                torch.manual_seed(5)
                assert_same_bits(call(form), call(form, order.to(DEVICE)))
                torch.manual_seed(5)
                assert_same_bits(random_order(num_tasks, device=DEVICE).cpu(), order)
        state, twin = order_state(-7, device=DEVICE), order_state(-7)
        for count in range(1, 4):
            order = random_order(num_tasks, generator=twin)
            assert_same_bits(pcgrad(grads, generator=state), pcgrad(grads, order.to(DEVICE)))
            assert state.tolist() == twin.tolist() == [-7, count]
        # a key of the host's and a state, as in a captured graph
        rows, out = bank_rows(grads), [torch.empty_like(grads[0])]
        order = drawn_order(Draw(2**62 + 3, twin), num_tasks, torch.device("cpu"))
        pcgrad_rows_into(rows, None, Draw(2**62 + 3, state), out)
        assert_same_bits(out[0], pcgrad(grads, order.to(DEVICE)))
        assert state.tolist() == twin.tolist()


@pytest.mark.parametrize(("num_tasks", "key"), [(20, 84120), (50, 84120), (128, 1136), (128, 21465)])
def test_drawn_orders_of_equal_halves(num_tasks: int, key: int, forced: str | None) -> None:
    """Keys of which a row draws two numbers with the same upper half, as a test on the host makes sure."""
    grads = BankCase(num_tasks, 1000).make(DEVICE)
    order = drawn_order(Draw(key, None), num_tasks, torch.device("cpu"))
    out = [torch.empty_like(grads[0])]
    with use("pcgrad", forced):
        pcgrad_rows_into(bank_rows(grads), None, Draw(key, None), out)
        assert_same_bits(out[0], pcgrad(grads, order.to(DEVICE)))


def test_order_of_a_generator_on_the_device(forced: str | None) -> None:
    grads = BankCase(9, 1000).make(DEVICE)
    with use("pcgrad", forced):
        found = pcgrad(grads, generator=torch.Generator(DEVICE).manual_seed(3))
        again = torch.randint(0, (1 << 63) - 1, (2,), generator=torch.Generator(DEVICE).manual_seed(3), device=DEVICE)
        order = drawn_order(Draw(0, again.cpu()), 9, torch.device("cpu"))
        assert_same_bits(found, pcgrad(grads, order.to(DEVICE)))


def test_orders_differ(forced: str | None) -> None:
    """Four tasks of which every two conflict: the coefficients tell the orders apart."""
    m = torch.full((4, 4), -0.5).fill_diagonal_(1.6)
    rows, state = bank_rows(torch.linalg.cholesky(m).to(DEVICE)), order_state(1, device=DEVICE)
    seen = set()
    with use("pcgrad", forced):
        for _ in range(12):
            out = [torch.empty(4, 4, device=DEVICE)]
            _, c = pcgrad_rows_into(rows, None, Draw(0, state), out, project=True)
            seen.add(tuple(c.flatten().tolist()))
    assert len(seen) > 6 and int(state[1]) == 12


def test_absent_tasks_and_mean(forced: str | None) -> None:
    """As `PCGrad.update` calls it: weights of the present tasks alone."""
    grads = BankCase(6, 1000).make(DEVICE)
    present = [True, False, True, True, False, True]
    grads[[1, 4]] = 0.0
    order = cases.random_order(6)
    for mean in (False, True):
        out = [torch.empty_like(grads[0])]
        with use("pcgrad", forced):
            m, w = pcgrad_rows_into(bank_rows(grads), order.to(DEVICE), Draw(0, None), out, mean=mean, present=present)
        c = reference.pcgrad_coefficients(reference.gram(grads.cpu().double()), order)
        expected = c[torch.tensor(present)].sum(0) / (4 if mean else 1)
        expected[[1, 4]] = 0.0
        torch.testing.assert_close(w.cpu(), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(out[0].cpu().double(), expected @ grads.cpu().double(), rtol=1e-4, atol=1e-3)
        cases.assert_gram(m, grads.cpu().double(), [torch.float32], slack(forced))


@pytest.mark.parametrize("num_tasks", [3, 40])
def test_nothing_to_read_still_draws(num_tasks: int, forced: str | None) -> None:
    """P = 0, and lists of empty tensors: the order is drawn and the state advanced all the same."""
    state = order_state(2, device=DEVICE)
    bank = torch.zeros(num_tasks, 0, device=DEVICE)
    empty = [[torch.zeros(0, 3, device=DEVICE)] for _ in range(num_tasks)]
    with use("pcgrad", forced):
        assert pcgrad(bank, generator=state).shape == (0,)
        assert pcgrad_project(bank, generator=state).shape == (num_tasks, 0)
        assert pcgrad(empty, generator=state)[0].shape == (0, 3)
        assert torch.equal(gram(bank), torch.zeros(num_tasks, num_tasks, device=DEVICE))
    assert int(state[1]) == 3
