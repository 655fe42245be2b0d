"""`fastmtl.methods`: weights of every method, absent tasks, look-up by name, foreign callables."""

from __future__ import annotations

import pytest
import torch
from conftest import Backend
from torch import Tensor

from fastmtl import methods, ops
from fastmtl.ops.gradients import reference
from fastmtl.ops.gradients.method_weights import OPTIONS


def weights_of(method: methods.Weighting, gram: Tensor, present: list[bool]) -> Tensor:
    return methods.weights_of(method, gram, methods.Seen([str(t) for t in range(len(gram))], present))


def is_method(kind: object) -> bool:
    return isinstance(kind, type) and issubclass(kind, methods.Method) and kind is not methods.Method


# what the package exports, and what of it has weights of a Gram matrix and is known by name
EXPORTED = {kind.__name__.lower(): kind for kind in vars(methods).values() if is_method(kind)}
WITH_ARGUMENTS = [name.lower() for name in methods.names.WITH_ARGUMENTS]
BY_NAME = [name for name in EXPORTED if name not in WITH_ARGUMENTS]
ALL = [name for name in BY_NAME if not EXPORTED[name].needs]
ORDER = torch.tensor([[1, 2, 3, 0], [3, 0, 2, 1], [0, 1, 3, 2], [2, 1, 0, 3]])


def conflicting(num_tasks: int = 4, seed: int = 0) -> Tensor:
    g = torch.randn(num_tasks, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return g - 0.9 * g.mean(0)


def test_get_finds_every_method_by_name():
    assert {"pcgrad", "gradvac", "sum", "mean", "randomweights", *OPTIONS} - {"sdmgrad", "modo"} == set(ALL)
    for name in BY_NAME:
        assert type(methods.get(name)) is EXPORTED[name]
    for name in WITH_ARGUMENTS:
        with pytest.raises(ValueError, match=f"method: {EXPORTED[name].__name__} takes arguments: pass an instance"):
            methods.get(name)


def test_get_passes_instances_and_callables_through():
    method = methods.Mean()
    assert methods.get(method) is method
    f = lambda gram: gram.diagonal()  # noqa: E731
    assert methods.get(f) is f


def test_get_rejects_what_is_no_method():
    known = f"{', '.join(sorted(BY_NAME))}, or an instance of"
    with pytest.raises(ValueError, match=rf"{known} .* \(classes in fastmtl.methods\), got 'no such method'"):
        methods.get("no such method")
    with pytest.raises(TypeError, match=r"write PCGrad\(\)"):
        methods.get(methods.PCGrad)
    with pytest.raises(TypeError, match="got int"):
        methods.get(3)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_pcgrad_weights_give_the_projected_gradients(reduction):
    g = conflicting()
    want = getattr(reference.pcgrad_loop(g, ORDER), reduction)(0)
    method = methods.PCGrad(reduction, order=ORDER)
    w = method.weights(g @ g.mT)
    assert w.dtype == torch.float64 and w.shape == (4,)
    torch.testing.assert_close(w @ g, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(method(g), want, rtol=1e-12, atol=1e-12)
    lists = method([[row[:10], row[10:]] for row in g])
    torch.testing.assert_close(torch.cat(lists), want, rtol=1e-12, atol=1e-12)


def test_pcgrad_include_self_reaches_the_op():
    g = conflicting(seed=3)
    order = torch.stack([torch.randperm(4, generator=torch.Generator().manual_seed(s)) for s in range(4)])
    method = methods.PCGrad(order=order, include_self=True)
    want = reference.pcgrad_loop(g, order, include_self=True).sum(0)
    torch.testing.assert_close(method.weights(g @ g.mT) @ g, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(method(g), want, rtol=1e-12, atol=1e-12)


def test_pcgrad_draws_a_fresh_order_each_time_and_repeats_it_for_a_seed():
    g = conflicting(8)
    gram = g @ g.mT
    draws = [methods.PCGrad(generator=torch.Generator().manual_seed(7)).weights(gram) for _ in range(2)]
    assert torch.equal(*draws)
    method = methods.PCGrad()
    assert len({tuple(method.weights(gram).tolist()) for _ in range(5)}) > 1


def test_pcgrad_rejects_bad_arguments():
    with pytest.raises(ValueError, match="'max'"):
        methods.PCGrad("max")
    with pytest.raises(ValueError, match="order"):
        methods.PCGrad(order=ORDER).weights(torch.eye(3))
    with pytest.raises(ValueError, match=r"0\.\.3"):
        methods.PCGrad(order=ORDER + 1).weights(torch.eye(4))


def test_sum_and_mean():
    g = conflicting().float()
    assert methods.Sum().weights(g @ g.mT).tolist() == [1.0] * 4
    assert methods.Mean().weights(g @ g.mT).tolist() == [0.25] * 4
    torch.testing.assert_close(methods.Sum()(g), g.sum(0))
    torch.testing.assert_close(methods.Mean()(g), g.mean(0))


def test_random_weights_are_a_softmax_of_normal_draws():
    w = methods.RandomWeights(generator=torch.Generator().manual_seed(1)).weights(torch.eye(5))
    z = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(w, z.exp() / z.exp().sum())
    method = methods.RandomWeights()
    assert not torch.equal(method.weights(torch.eye(5)), method.weights(torch.eye(5)))


@pytest.mark.parametrize("name", ALL)
def test_absent_tasks_are_not_in_the_problem(name):
    g = conflicting()
    here = [0, 1, 3]
    present = torch.tensor([True, True, False, True])
    gram = g @ g.mT
    gram[2] = gram[:, 2] = torch.nan
    if name in ("pcgrad", "gradvac"):  # whose first steps are the same
        for reduction in ("sum", "mean"):
            w = EXPORTED[name](reduction=reduction, order=ORDER).weights(gram, present=present)
            small = {0: 0, 1: 1, 3: 2}
            order = torch.tensor([[small[j] for j in ORDER[i].tolist() if j != 2] for i in here])
            want = getattr(reference.pcgrad_loop(g[here], order), reduction)(0)
            torch.testing.assert_close(w[here] @ g[here], want, rtol=1e-12, atol=1e-12)
            assert w[2] == 0
        return
    w = methods.get(name).weights(gram, present=present)
    assert w[2] == 0 and bool(torch.isfinite(w).all())
    if name == "sum":
        assert w.tolist() == [1, 1, 0, 1]
    elif name == "mean":
        torch.testing.assert_close(w, torch.tensor([1, 1, 0, 1], dtype=torch.float64) / 3)
    elif name == "randomweights":
        torch.testing.assert_close(w.sum(), torch.ones((), dtype=torch.float64))
    else:
        torch.testing.assert_close(w[here], methods.get(name).weights(gram[here][:, here]), rtol=1e-12, atol=0)


# the weight of a single task, by the square of its gradient's length, where it is not 1: Nash-MTL and FairGrad depend
# on scale, and CAGrad goes as far beyond the mean as its ball reaches
WEIGHT_ALONE = {
    "cagrad": lambda square: 1.5,
    "nashmtl": lambda square: square**-0.5,
    "fairgrad": lambda square: square**-0.5,
}


@pytest.mark.parametrize("name", ALL)
def test_one_task_keeps_its_gradient(name):
    alone = WEIGHT_ALONE.get(name, lambda square: 1.0)
    w = methods.get(name).weights(torch.full((1, 1), 4.0))
    torch.testing.assert_close(w, torch.tensor([alone(4.0)], dtype=torch.float64), rtol=1e-6, atol=0)
    w = methods.get(name).weights(torch.full((3, 3), torch.nan).fill_diagonal_(2.0), present=torch.arange(3) == 1)
    torch.testing.assert_close(w, torch.tensor([0, alone(2.0), 0], dtype=torch.float64), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ALL)
def test_weights_reject_bad_grams_and_masks(name):
    method = methods.get(name)
    with pytest.raises(ValueError, match=r"square.*\[2, 3\]"):
        method.weights(torch.zeros(2, 3))
    with pytest.raises(TypeError, match="int64"):
        method.weights(torch.zeros(2, 2, dtype=torch.int64))
    with pytest.raises(TypeError, match="list"):
        method.weights([[1.0]])
    with pytest.raises(TypeError, match=r"present.*torch.bool"):
        method.weights(torch.eye(2), present=torch.ones(2))
    with pytest.raises(ValueError, match=r"present.*\[3\]"):
        method.weights(torch.eye(2), present=torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="device"):
        method.weights(torch.eye(2), present=torch.ones(2, dtype=torch.bool, device="meta"))


@pytest.mark.parametrize("name", ALL)
def test_all_zero_gradients_give_a_zero_update(name):
    g = torch.zeros(3, 5)
    assert methods.get(name)(g).tolist() == [0.0] * 5


@pytest.mark.parametrize("name", ALL)
def test_no_value_is_read_on_the_host(name):
    # under fake tensors any .item(), boolean index or `if tensor` raises
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        gram, present = torch.zeros(4, 4), torch.zeros(4, dtype=torch.bool)
        assert methods.get(name).weights(gram, present=present).shape == (4,)


def test_solve_gives_a_callable_the_gram_of_the_present_tasks():
    gram = torch.arange(16.0).reshape(4, 4)
    seen = []

    def method(m: Tensor) -> Tensor:
        seen.append(m)
        return m.diagonal() + 1

    assert weights_of(method, gram, [True] * 4).tolist() == [1, 6, 11, 16]
    assert seen.pop() is gram
    assert weights_of(method, gram, [True, False, False, True]).tolist() == [1, 0, 0, 16]
    assert seen.pop().tolist() == [[0, 3], [12, 15]]


def test_solve_checks_what_a_method_returns():
    gram, every = torch.eye(3), [True] * 3
    with pytest.raises(TypeError, match="expected a tensor of 3 weights, got list"):
        weights_of(lambda m: [1.0, 1.0, 1.0], gram, every)
    with pytest.raises(TypeError, match="int64"):
        weights_of(lambda m: torch.ones(3, dtype=torch.int64), gram, every)
    with pytest.raises(ValueError, match=r"3 weights.*\[2\]"):
        weights_of(lambda m: torch.ones(2), gram, every)
    with pytest.raises(ValueError, match=r"2 weights.*\[3\]"):
        weights_of(lambda m: torch.ones(3), gram, [True, False, True])
    with pytest.raises(ValueError, match=r"\[3, 1\]"):
        weights_of(lambda m: torch.ones(3, 1), gram, every)
    with pytest.raises(ValueError, match="meta"):
        weights_of(lambda m: torch.ones(3, device="meta"), gram, every)


STATEFUL = {
    "paretomtl": lambda: methods.ParetoMTL(torch.tensor([[0.2, 0.3, 0.5], [0.5, 0.4, 0.1]]), 1),
    "crmogm": lambda: methods.CRMOGM(methods.UPGrad(), momentum=0.5),
    "crmogm of pcgrad": lambda: methods.CRMOGM(methods.PCGrad(), momentum=0.5),
    "every": lambda: methods.Every(methods.UPGrad(), 2),
}


@pytest.mark.parametrize("who_knows", ["host", "device"])
@pytest.mark.parametrize("name", [*BY_NAME, *STATEFUL, "a callable"])
def test_of_no_task_the_weights_are_zero_and_the_state_stays(name: str, who_knows: str, backend: Backend) -> None:
    if name in EXPORTED and "gradients" in EXPORTED[name].needs:
        pytest.skip("has no weights of a Gram matrix")
    method = STATEFUL[name]() if name in STATEFUL else (lambda m: m.diagonal()) if name == "a callable" else None
    method = methods.get(name) if method is None else method
    m = ops.gram(conflicting(3))
    names, losses = ["a", "b", "c"], torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)

    def weigh(gram: Tensor, present: list[bool]) -> Tensor:
        given = torch.tensor(present) if who_knows == "device" else present
        return methods.weights_of(method, gram, methods.Seen(names, given, losses=losses, second=gram))

    def state() -> dict[str, list[float]]:
        found = method.state_dict() if isinstance(method, methods.Method) and name != "every" else {}
        found = found.get("average", found)
        return {key: x.nan_to_num(-1.0).tolist() for key, x in found.items() if isinstance(x, Tensor)}

    for gram in (m, torch.full_like(m, torch.nan)):
        assert weigh(gram, [False] * 3).tolist() == [0.0] * 3
    assert weigh(m, [True] * 3).isfinite().all()
    before = state()
    assert weigh(m, [False] * 3).tolist() == [0.0] * 3
    assert state() == before
    fresh = weigh(m, [True, False, True])
    assert fresh.isfinite().all() and fresh[1] == 0


def test_the_first_phase_of_paretomtl_is_not_over_for_want_of_tasks(backend: Backend) -> None:
    method = STATEFUL["paretomtl"]()
    losses = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    method.weigh(torch.eye(3), methods.Seen(["a", "b", "c"], torch.zeros(3, dtype=torch.bool), losses=losses))
    assert method.state_dict()["started"] == 0


def test_a_method_of_ones_own():
    class Inverse(methods.Method):
        def _weights(self, gram, present):
            return 1 / gram.diagonal()

    g = conflicting()
    torch.testing.assert_close(Inverse()(g), (g / ops.gram(g).diagonal()[:, None]).sum(0))
    w = weights_of(Inverse(), ops.gram(g), [True, False, True, True])
    assert w[1] == 0 and torch.equal(w[0], 1 / ops.gram(g)[0, 0])
