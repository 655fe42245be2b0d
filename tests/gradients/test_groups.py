"""Gram matrices, weights and weighted sums of groups of parameters in one call: what a call for each group gives."""

from __future__ import annotations

from typing import Any

import cases
import pytest
import torch
from cases import ListCase, random_weights
from conftest import Backend
from torch import Tensor

import fastmtl
from fastmtl import methods, ops
from fastmtl.core.gradient_rows import GradientRows, accumulate_dtype, first_of_params
from fastmtl.core.tensors import is_dense
from fastmtl.methods.gram_method import GramMethod
from fastmtl.ops.gradients import method_weights as of_methods
from fastmtl.ops.gradients import pcgrad as of_pcgrad
from fastmtl.ops.gradients import reference
from fastmtl.ops.gradients.arguments import read_lists
from fastmtl.ops.gradients.gram import gram_rows
from fastmtl.ops.gradients.groups import Grouped, combine_groups_into, gram_groups
from fastmtl.ops.gradients.method_weights import OPTIONS, method_weights_groups
from fastmtl.ops.gradients.order import Draw, drawn_orders, order_state
from fastmtl.ops.gradients.pcgrad import pcgrad_weights_groups

CPU = torch.device("cpu")
CASES = [
    *(ListCase(k, 3, d) for k in ("nones", "mixed_layouts", "mixed_dtypes", "empty_tensors") for d in cases.DTYPES),
    *(ListCase("nones", t) for t in (1, 2, 5, 8, 17, 128)),
    ListCase("channels_last", 3, torch.bfloat16),
    ListCase("many", 20, torch.float16),
    ListCase("large", 2),
    ListCase("absent_parameter", 7, torch.float64),
    ListCase("all_none", 2),
    ListCase("no_parameter", 2),
]


def grouped(case: ListCase, count: int) -> Grouped:
    """The parameters in all but the last of so many groups, by turns and not in order."""
    rows = read_lists(case.make())
    return Grouped(rows, [(5 * i + 2) % max(count - 1, 1) for i in range(rows.num_params)], count)


def bank64(rows: GradientRows) -> Tensor:
    return reference.bank_from_lists([x.double() for x in rows.tensors], rows.index, rows.num_tasks, rows.num_params)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("count", [1, 3, 70])
def test_gram(case: ListCase, count: int, level: Backend) -> None:
    both = grouped(case, count)
    dtype = accumulate_dtype([x.dtype for x in both.rows.tensors])
    found = gram_groups(both, dtype, CPU)
    assert found.shape == (count, case.num_tasks, case.num_tasks) and found.dtype == dtype
    for m, rows in zip(found, both.split(), strict=True):
        if not rows.tensors:
            assert not bool(m.any())
            continue
        own = [x.dtype for x in rows.tensors]
        cases.assert_gram(m.to(cases.gram_dtype(own)), bank64(rows), own, cases.gram_slack(level.name))
        alone = gram_rows(rows)
        assert torch.equal(m.to(alone.dtype), alone)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("count", [1, 3, 70])
@pytest.mark.parametrize("in_place", [False, True])
def test_combine(case: ListCase, count: int, in_place: bool, level: Backend) -> None:
    both = grouped(case, count)
    weights = random_weights((count, case.num_tasks))
    first = first_of_params(both.rows.tensors, both.rows.index, both.rows.num_params)
    expected = {}
    for k, rows in enumerate(both.split()):
        members = [i for i, group in enumerate(both.groups) if group == k]
        columns = reference.combine_list(weights[k], [x.double() for x in rows.tensors], rows.index, rows.num_params)
        kept = first_of_params(rows.tensors, rows.index, rows.num_params)
        expected |= {members[i]: x for i, x in zip(kept, columns, strict=True)}
    sizes = {i: x.abs().max() if x.numel() else torch.zeros(()) for i, x in expected.items()}
    # an expanded gradient has no memory for a sum
    out = [x if in_place and is_dense(x) else torch.empty_like(x) for x in first.values()]
    combine_groups_into(weights, both, out)
    for i, found in zip(first, out, strict=True):
        unit = cases.unit_roundoff(found.dtype)
        scale = float(weights.abs().sum()) * max(1.0, float(sizes[i]))
        torch.testing.assert_close(found.double(), expected[i], rtol=4 * unit, atol=4 * unit * scale)


def grams(num_tasks: int, count: int, seed: int = 0) -> Tensor:
    g = torch.randn(count, num_tasks, num_tasks + 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    g = g - 0.9 * g.mean(1, keepdim=True)
    return g @ g.mT


@pytest.mark.parametrize("num_tasks", [1, 2, 7, 17, 50])
@pytest.mark.parametrize("given", [False, True])
def test_pcgrad_weights(num_tasks: int, given: bool, backend: Backend) -> None:
    count, present = 6, [t % 3 != 1 for t in range(num_tasks)]
    m = grams(num_tasks, count)
    order = cases.random_order(num_tasks) if given else None
    for key, state in ((5, None), (-7, order_state(3))):
        for mean, here in ((False, None), (True, present)):
            before = None if state is None else state.clone()
            w = pcgrad_weights_groups(m, order, Draw(key, state), mean=mean, present=here)
            again = None if before is None else before.clone()
            orders = drawn_orders(Draw(key, again), count, num_tasks, CPU) if order is None else [order] * count
            for found, matrix, visits in zip(w, m, orders, strict=True):
                c = reference.pcgrad_coefficients(matrix, visits)
                rows = c if here is None else c[torch.tensor(here)]
                wanted = rows.sum(0) / (len(rows) if mean else 1)
                if here is not None:
                    wanted[~torch.tensor(here)] = 0.0
                torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9 * float(c.abs().sum()))
            if state is not None:
                assert state[1] == before[1] + (0 if given else count)
    if not given:  # no two groups have one order
        drawn = drawn_orders(Draw(5, None), count, 17, CPU)
        assert all(not torch.equal(drawn[i], drawn[j]) for i in range(count) for j in range(i))


def test_orders_are_those_of_calls_in_a_row() -> None:
    state, again = order_state(11), order_state(11)
    found = drawn_orders(Draw(9, state), 4, 5, CPU)
    one_by_one = [drawn_orders(Draw(9, again), 1, 5, CPU)[0] for _ in range(4)]
    assert torch.equal(found, torch.stack(one_by_one)) and torch.equal(state, again)
    assert torch.equal(drawn_orders(Draw(9, None), 1, 5, CPU)[0], ops.random_order(5, generator=_with_key(9)))


def _with_key(key: int) -> Tensor:
    state = order_state(0)
    state[0] = key
    return state


METHOD_OPTIONS = {"cagrad": [0.5], "nashmtl": [0.0], "fairgrad": [2.0], "alignedmtl": [0.0, 0.0]}
METHOD_OPTIONS |= {"upgrad": [1e-4], "dualproj": [1e-4], "krum": [1.0, 2.0, 1.0], "pcd": [0.0, 0.1]}
METHOD_OPTIONS |= {"sdmgrad": [10.0, 0.5, 20.0, 0.3], "modo": [0.1, 0.2]}


@pytest.mark.parametrize("method", OPTIONS)
def test_method_weights(method: str, backend: Backend) -> None:
    m, present = grams(5, 9).to(torch.float32), torch.arange(5) != 3
    options = METHOD_OPTIONS.get(method, [])
    found = method_weights_groups(m, method, options, present=present)
    alone = [ops.method_weights(one, method, options, present=present) for one in m]
    assert torch.equal(found, torch.stack(alone))


# --- the classes


@pytest.mark.parametrize("kind", [k for k in methods.names.CLASSES if issubclass(k, GramMethod)] + [methods.PCGrad])
def test_one_call_for_all_groups(kind: type[methods.Method], monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    for module, name in ((of_methods, "_kernel"), (of_pcgrad, "_weights_kernel")):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, real=real: (called.append(args[0].shape), real(*args)))
    seen = [methods.Seen([f"{k}/{t}" for t in range(5)], [True] * 5) for k in range(4)]
    with fastmtl.use_backend("cpu"):
        methods.group_weights_of(kind(), grams(5, 4), seen)
    assert called == [(4, 5, 5)]


class Doubled(methods.MGDA):
    """Weights of its own, of a class that solves for all groups at once."""

    def weights(self, gram: Tensor, *, present: Tensor | None = None) -> Tensor:
        return 2 * super().weights(gram, present=present)


class Signed(methods.PCGrad):
    def _weights(self, gram: Tensor, present: Tensor | None) -> Tensor:
        return -super()._weights(gram, present)


ORDER = cases.random_order(5)
PER_CLASS: dict[str, Any] = {
    "mgda": methods.MGDA,
    "upgrad": lambda: methods.UPGrad(preferences=[1.0, 2.0, 0.5, 1.0, 3.0]),
    "krum": lambda: methods.Krum(selected=2),
    "sum": methods.Sum,
    "pcgrad given": lambda: methods.PCGrad(order=ORDER, include_self=True),
    "pcgrad state": lambda: methods.PCGrad("mean", generator=order_state(4)),
    "crmogm": lambda: methods.CRMOGM(methods.MGDA()),
    "derived": Doubled,
    "derived from pcgrad": lambda: Signed(generator=order_state(4)),
}


@pytest.mark.parametrize("name", PER_CLASS)
def test_weigh_groups_is_weigh_for_each(name: str, backend: Backend) -> None:
    m, together, apart = grams(5, 4), PER_CLASS[name](), PER_CLASS[name]()
    for present in ([True] * 5, [True, True, False, True, True]):
        seen = [methods.Seen([f"{k}/{t}" for t in range(5)], present) for k in range(4)]
        w = methods.group_weights_of(together, m, seen)
        alone = torch.stack([methods.weights_of(apart, one, x) for one, x in zip(m, seen, strict=True)])
        torch.testing.assert_close(w, alone, rtol=1e-12, atol=1e-12)


def test_bad_weights_of_groups() -> None:
    class Wrong(methods.Sum):
        def weigh_groups(self, grams: Tensor, seen: Any) -> Tensor:
            return torch.ones(5, dtype=torch.float64)

    seen = [methods.Seen([f"{k}/{t}" for t in range(5)], [True] * 5) for k in range(4)]
    with pytest.raises(ValueError, match=r"expected weights \[4, 5\] on cpu, got \[5\] on cpu"):
        methods.group_weights_of(Wrong(), grams(5, 4), seen)
    with pytest.raises(ValueError, match="needs at least 7 tasks, got 5"):
        methods.group_weights_of(methods.Krum(byzantine=4), grams(5, 4), seen)
