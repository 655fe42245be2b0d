"""MoDo, Pareto MTL and CR-MOGM: their equations, their state, and what they need."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import Backend
from torch import Tensor

import fastmtl
from fastmtl import methods
from fastmtl.methods import Seen
from fastmtl.methods.simplex import project_on_simplex

F64 = torch.float64


def gradients(num_tasks: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(100 * num_tasks + seed)
    g = torch.randn(num_tasks, 2 * num_tasks + 3, dtype=F64, generator=generator)
    return g - 0.8 * g.mean(0)


def names(num_tasks: int) -> list[str]:
    return [f"task {t}" for t in range(num_tasks)]


def everywhere(num_tasks: int, **more: Tensor) -> Seen:
    return Seen(names(num_tasks), [True] * num_tasks, **more)


# --- the simplex


def on_simplex_by_bisection(x: Tensor) -> Tensor:
    """`max(x - shift, 0)` with the shift at which it adds up to 1."""
    low, high = x.min().item() - 1, x.max().item()
    for _ in range(200):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if (x - middle).clamp(min=0).sum() > 1 else (low, middle)
    return (x - low).clamp(min=0)


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 20, 128])
def test_projection_on_the_simplex(num_tasks):
    for scale in (1e-6, 0.1, 1.0, 100.0):
        x = scale * gradients(num_tasks)[:, 0]
        w = project_on_simplex(x)
        torch.testing.assert_close(w, on_simplex_by_bisection(x), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(project_on_simplex(w), w, rtol=1e-12, atol=1e-15)
    equal = torch.full((num_tasks,), -7.0, dtype=F64)
    torch.testing.assert_close(project_on_simplex(equal), torch.full_like(equal, 1 / num_tasks))


def test_projection_on_the_simplex_of_present_tasks():
    x = torch.tensor([0.3, math.nan, -2.0, 0.1], dtype=F64)
    present = torch.tensor([True, False, True, True])
    torch.testing.assert_close(project_on_simplex(x, present), torch.tensor([0.6, 0.0, 0.0, 0.4], dtype=F64))
    for bad in (math.nan, math.inf, -math.inf):
        x[2] = bad
        w = project_on_simplex(x, present)
        assert w[present].isnan().all() and w[1] == 0
    assert project_on_simplex(x, torch.zeros(4, dtype=torch.bool)).tolist() == [0, 0, 0, 0]


# --- MoDo


def test_modo_is_a_projected_step():
    g, other = gradients(5), gradients(5, 1)
    method, want = methods.MoDo(gamma=0.05, rho=0.2), torch.full((5,), 0.2, dtype=F64)
    for _ in range(4):
        want = on_simplex_by_bisection(want - 0.05 * (g @ (other.mT @ want) + 0.2 * want))
        w = method.weigh(g @ g.mT, everywhere(5, second=g @ other.mT))
        torch.testing.assert_close(w, want, rtol=1e-9, atol=1e-12)
    assert want.min() == 0 or want.std() > 0.01


def test_modo_goes_to_the_shortest_combination():
    """With the same batch twice, no noise and many steps it is MGDA's."""
    g = gradients(3)
    method, gram = methods.MoDo(gamma=0.02, rho=0.0), g @ g.mT
    for _ in range(3000):
        w = method.weigh(gram, everywhere(3, second=gram))
    torch.testing.assert_close(w, methods.MGDA().weights(gram), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("num_tasks", [2, 5, 12])
def test_modo_as_torchjd(num_tasks):
    theirs = pytest.importorskip("torchjd.aggregation").MoDoWeighting(gamma=0.03, rho=0.1)
    ours = methods.MoDo(gamma=0.03, rho=0.1)
    for seed in range(5):
        g, other = gradients(num_tasks, seed), gradients(num_tasks, seed + 50)
        found = ours.weigh(g @ g.mT, everywhere(num_tasks, second=g @ other.mT))
        torch.testing.assert_close(found, theirs(g @ other.mT), rtol=1e-9, atol=1e-12)


def test_modo_knows_tasks_by_name():
    m = torch.diag(torch.tensor([9.0, 1.0, 4.0], dtype=F64))
    method = methods.MoDo(gamma=0.02, rho=0.0)
    three = method.weigh(m, Seen(["a", "b", "c"], [True] * 3, second=m))
    # of tasks that are there again in another order the numbers are the same; a new one begins with 1/n
    pair = method.weigh(torch.zeros(2, 2), Seen(["c", "a"], [True] * 2, second=torch.zeros(2, 2, dtype=F64)))
    torch.testing.assert_close(pair, on_simplex_by_bisection(three[[2, 0]]), rtol=1e-9, atol=0)
    zero = torch.zeros(3, 3, dtype=F64)
    again = method.weigh(zero, Seen(["a", "b", "new"], [True] * 3, second=zero))
    want = on_simplex_by_bisection(torch.stack([pair[1], three[1], torch.tensor(1 / 3, dtype=F64)]))
    torch.testing.assert_close(again, want, rtol=1e-9, atol=0)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_modo_with_absent_tasks(as_tensor):
    g, other = gradients(4), gradients(4, 1)
    here = [True, False, True, True]
    second = g @ other.mT
    second[1] = second[:, 1] = math.nan
    present = torch.tensor(here) if as_tensor else here
    w = methods.MoDo(0.05).weigh(g @ g.mT, Seen(names(4), present, second=second))
    small = [0, 2, 3]
    alone = methods.MoDo(0.05).weigh(torch.eye(3), everywhere(3, second=g[small] @ other[small].mT))
    assert w[1] == 0
    torch.testing.assert_close(w[small], alone, rtol=1e-12, atol=0)


def test_modo_after_an_overflow_goes_on_from_before():
    m = torch.diag(torch.tensor([2.0, 1.0], dtype=F64))
    method, same = methods.MoDo(0.1), methods.MoDo(0.1)
    method.weigh(m, everywhere(2, second=m)), same.weigh(m, everywhere(2, second=m))
    for bad in (math.nan, math.inf, -math.inf):
        broken = m.clone()
        broken[0, 1] = bad
        assert method.weigh(broken, everywhere(2, second=broken)).isnan().all()
    assert torch.equal(method.weigh(m, everywhere(2, second=m)), same.weigh(m, everywhere(2, second=m)))


def test_modo_refuses():
    with pytest.raises(ValueError, match="gamma: expected a positive number, got 0"):
        methods.MoDo(gamma=0)
    with pytest.raises(ValueError, match="rho: expected a number from 0, got -1"):
        methods.MoDo(rho=-1)
    assert methods.get("modo").needs == {"second_batch"}


# --- CR-MOGM


def test_crmogm_is_a_running_average():
    grams = [gradients(4, seed) @ gradients(4, seed).mT for seed in range(4)]
    method, want = methods.CRMOGM(methods.MGDA(), momentum=0.7), None
    for gram in grams:
        new = methods.MGDA().weights(gram)
        want = new if want is None else 0.7 * want + 0.3 * new
        torch.testing.assert_close(method.weights(gram), want, rtol=1e-12, atol=1e-15)
    method.reset()
    torch.testing.assert_close(method.weights(grams[0]), methods.MGDA().weights(grams[0]), rtol=1e-12, atol=0)


@pytest.mark.parametrize("alpha", [0.0, 0.4, 0.9])
def test_crmogm_as_torchjd(alpha):
    jd = pytest.importorskip("torchjd.aggregation")
    theirs = jd.CRMOGMWeighting(jd.UPGradWeighting(), alpha=alpha)
    ours = methods.CRMOGM(methods.UPGrad(), momentum=alpha)
    for seed in range(4):
        gram = gradients(5, seed) @ gradients(5, seed).mT
        torch.testing.assert_close(ours.weights(gram), theirs(gram), rtol=1e-3, atol=1e-3)


def test_crmogm_of_a_callable_sees_present_tasks_alone():
    shapes = []

    def method(gram: Tensor) -> Tensor:
        shapes.append(gram.shape[0])
        return gram.diagonal()

    ours = methods.CRMOGM(method, momentum=0.5)
    m = torch.diag(torch.tensor([1.0, 2.0, 3.0], dtype=F64))
    assert ours.weigh(m, Seen(["a", "b", "c"], [True, False, True])).tolist() == [1, 0, 3]
    # b's first weight is taken as it is; the others' is the average
    assert ours.weigh(3 * m, Seen(["c", "b", "a"], [True] * 3)).tolist() == [3, 6, 5]
    assert shapes == [2, 3]


def test_crmogm_keeps_an_absent_tasks_average():
    method = methods.CRMOGM(lambda gram: gram.diagonal(), momentum=0.5)
    one = torch.eye(2, dtype=F64)
    method.weigh(one, Seen(["a", "b"], [True, True]))
    assert method.weigh(3 * one, Seen(["a", "b"], [True, False])).tolist() == [2, 0]
    assert method.weigh(3 * one, Seen(["a", "b"], [True, True])).tolist() == [2.5, 2]


def test_crmogm_after_an_overflow():
    method = methods.CRMOGM(methods.MGDA(), momentum=0.5)
    gram = torch.diag(torch.tensor([1.0, 3.0], dtype=F64))
    first = method.weights(gram)
    assert method.weights(torch.full((2, 2), math.nan)).isnan().all()
    torch.testing.assert_close(method.weights(gram), first, rtol=1e-15, atol=0)


def test_crmogm_saves_the_state_of_the_method_too():
    m = torch.diag(torch.tensor([2.0, 1.0], dtype=F64))
    method, other = (methods.CRMOGM(methods.MoDo(0.1), momentum=0.5) for _ in range(2))
    seen = everywhere(2, second=m)
    method.weigh(m, seen)
    other.load_state_dict(method.state_dict())
    assert torch.equal(other.weigh(m, seen), method.weigh(m, seen))
    assert len(method.state_tensors(names(2), torch.device("cpu"))) == 2
    method.reset()
    fresh = methods.CRMOGM(methods.MoDo(0.1), momentum=0.5)
    assert torch.equal(method.weigh(m, seen), fresh.weigh(m, seen))
    assert method.needs == {"second_batch"} and methods.CRMOGM(methods.Sum()).needs == frozenset()
    with pytest.raises(ValueError, match="expected that of CRMOGM, average, method, got names"):
        method.load_state_dict({"names": []})
    with pytest.raises(TypeError, match="method CRMOGM: needs the task gradients of a second"):
        method.weights(m)


@pytest.mark.parametrize("name", ["weights", "weigh"])
def test_crmogm_asks_a_class_derived_from_a_gram_method(name: str, backend: Backend) -> None:
    """Which may have weights of its own, beside those that one op solves for."""
    derived = type("Derived", (methods.MGDA,), {name: lambda self, gram, *args, **kwargs: gram.diagonal().clone()})
    method = methods.CRMOGM(derived(), momentum=0.5)
    gram = torch.diag(torch.tensor([2.0, 3.0], dtype=F64))
    assert method.weigh(gram, everywhere(2)).tolist() == [2.0, 3.0]
    assert method.weigh(3 * gram, everywhere(2)).tolist() == [4.0, 6.0]


def test_crmogm_refuses():
    class Elementwise(methods.Method):
        needs = frozenset({"gradients"})

    with pytest.raises(TypeError, match="method: expected one with weights"):
        methods.CRMOGM(Elementwise())
    with pytest.raises(TypeError, match="got the class Sum"):
        methods.CRMOGM(methods.Sum)
    with pytest.raises(ValueError, match="method: expected one of"):
        methods.CRMOGM("nothing")
    with pytest.raises(TypeError, match=r"expected a name, a Method or a callable .*, got int"):
        methods.CRMOGM(3)
    assert repr(methods.CRMOGM("mgda")) == repr(methods.CRMOGM(methods.MGDA()))
    for bad in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match="momentum: expected a number from 0 to below 1"):
            methods.CRMOGM(methods.Sum(), momentum=bad)


# --- Pareto MTL

CIRCLE = [[math.cos(a), math.sin(a)] for a in (0.0, 0.4, 0.8, 1.2, 0.5 * math.pi)]


def shortest(rows: np.ndarray) -> np.ndarray:
    """Shares of the shortest convex combination, by another solver: least squares over shares >= 0."""
    optimize = pytest.importorskip("scipy.optimize", reason="the other solver")
    scale = np.linalg.norm(rows, axis=1).max()
    a = np.concatenate([rows.T / scale, 1e4 * np.ones((1, len(rows)))])
    shares, _ = optimize.nnls(a, np.append(np.zeros(rows.shape[1]), 1e4), maxiter=1000)
    return shares / shares.sum()


def pareto_update(g: Tensor, losses: Tensor, vectors: Tensor, index: int, start: bool) -> Tensor:
    """As the paper writes it, with the gradients at hand."""
    unit = vectors / vectors.norm(dim=1, keepdim=True)
    active = [u - unit[index] for u in unit if (u - unit[index]) @ losses > 0]
    rows = ([] if start else list(g)) + [d @ g for d in active]
    stacked = torch.stack(rows)
    return torch.from_numpy(shortest(stacked.numpy())) @ stacked


@pytest.mark.parametrize("index", range(5))
def test_paretomtl_in_both_phases(index, backend: Backend):
    g = torch.randn(2, 9, dtype=F64, generator=torch.Generator().manual_seed(index))
    losses = torch.tensor([1.0, 0.7], dtype=F64)
    vectors = torch.tensor(CIRCLE, dtype=F64)
    method = methods.ParetoMTL(CIRCLE, index)
    inside = int((vectors @ losses).argmax())
    for phase in range(2):
        start = phase == 0 and index != inside
        w = method.weigh(g @ g.mT, everywhere(2, losses=losses))
        torch.testing.assert_close(w @ g, pareto_update(g, losses, vectors, index, start), rtol=1e-6, atol=1e-7)
        assert method.state_dict()["started"] == (not start)
        method.weigh(g @ g.mT, everywhere(2, losses=vectors[index]))  # inside its part: the first phase ends
    assert method.state_dict()["start_steps"] == (index != inside)


@pytest.mark.parametrize("num_tasks", [1, 3, 8])
def test_paretomtl_descends(num_tasks, backend: Backend):
    """Along the update no loss grows, and no violation of an active constraint."""
    generator = torch.Generator().manual_seed(num_tasks)
    vectors = torch.rand(6, num_tasks, dtype=F64, generator=generator) + 0.01
    unit = vectors / vectors.norm(dim=1, keepdim=True)
    for index in range(6):
        g = torch.randn(num_tasks, 20, dtype=F64, generator=generator)
        losses = torch.rand(num_tasks, dtype=F64, generator=generator)
        method = methods.ParetoMTL(vectors, index, max_start_steps=0)
        update = method.weigh(g @ g.mT, everywhere(num_tasks, losses=losses)) @ g
        violated = (unit - unit[index])[(unit - unit[index]) @ losses > 0]
        products = torch.cat([g @ update, violated @ (g @ update)])
        assert (products >= update @ update - 1e-9).all()
        if num_tasks > 1 and len(violated):
            start = methods.ParetoMTL(vectors, index).weigh(g @ g.mT, everywhere(num_tasks, losses=losses)) @ g
            assert (violated @ (g @ start) >= start @ start - 1e-9).all()


def test_paretomtl_finds_the_parts_of_the_front():
    """The paper's synthetic example: two losses with a concave front, and one model for each preference vector."""
    size = 20
    centre = 1 / size**0.5

    def losses_of(x: Tensor) -> list[Tensor]:
        return [1 - (-(x - centre).square().sum()).exp(), 1 - (-(x + centre).square().sum()).exp()]

    found = []
    for index in range(len(CIRCLE)):
        x = torch.nn.Parameter(torch.linspace(-0.3, 0.4, size, dtype=F64))
        method = methods.ParetoMTL(CIRCLE, index, max_start_steps=200)
        for _ in range(400):
            x.grad = None
            fastmtl.backward(losses_of(x), [x], method=method)
            with torch.no_grad():
                x -= 0.2 * x.grad
        with torch.no_grad():
            found.append(torch.stack(losses_of(x)))
    losses = torch.stack(found)
    assert (losses[:, 0].diff() > 0.05).all() or (losses[:, 0].diff() < -0.05).all()
    angles = torch.atan2(losses[:, 1], losses[:, 0])
    wanted = torch.tensor([math.atan2(y, x) for x, y in CIRCLE], dtype=F64)
    assert (angles - wanted).abs().max() < 0.25
    # on the front, x is (a, ..., a) with a between the two centres
    a = torch.linspace(-centre, centre, 2001, dtype=F64)
    front = torch.stack([1 - (-size * (a - s * centre).square()).exp() for s in (1, -1)], 1)
    assert (torch.cdist(losses, front).min(1).values < 0.02).all()


def test_paretomtl_scale_and_order(backend: Backend):
    g = gradients(4)
    vectors = torch.rand(5, 4, dtype=F64, generator=torch.Generator().manual_seed(3)) + 0.01
    losses = torch.tensor([1.0, 0.1, 3.0, 0.5], dtype=F64)
    order = torch.tensor([2, 0, 3, 1])
    for limit in (None, 0):
        w = methods.ParetoMTL(vectors, 1, max_start_steps=limit).weigh(g @ g.mT, everywhere(4, losses=losses))
        for scale in (1e-12, 1e-3, 1e12):
            method = methods.ParetoMTL(vectors * scale, 1, max_start_steps=limit)
            found = method.weigh(scale**2 * g @ g.mT, everywhere(4, losses=losses / scale))
            torch.testing.assert_close(found, w, rtol=1e-6, atol=1e-8)
        method = methods.ParetoMTL(vectors[:, order], 1, max_start_steps=limit)
        gram = (g @ g.mT)[order][:, order]
        found = method.weigh(gram, Seen([names(4)[t] for t in order], [True] * 4, losses=losses[order]))
        torch.testing.assert_close(found, w[order], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_paretomtl_with_absent_tasks(as_tensor, backend: Backend):
    g = gradients(3)
    vectors = torch.tensor([[1.0, 0.2, 0.5], [0.1, 1.0, 0.5]], dtype=F64)
    unit = vectors / vectors.norm(dim=1, keepdim=True)
    here = [True, True, False]
    gram = g @ g.mT
    gram[2] = gram[:, 2] = math.nan
    seen = Seen(names(3), torch.tensor(here) if as_tensor else here, losses=torch.tensor([1.0, 0.1, math.nan]).double())
    w = methods.ParetoMTL(vectors, 1, max_start_steps=0).weigh(gram, seen)
    # the same without the third column of the constraints
    rows = torch.cat([g[:2], ((unit[0] - unit[1])[:2] @ g[:2])[None]])
    assert w[2] == 0
    torch.testing.assert_close(w[:2] @ g[:2], torch.from_numpy(shortest(rows.numpy())) @ rows, rtol=1e-6, atol=1e-7)


def test_paretomtl_ends_the_first_phase_after_a_number_of_steps():
    method = methods.ParetoMTL([[1.0, 0.0], [0.0, 1.0]], 0, max_start_steps=2)
    gram, outside = torch.eye(2, dtype=F64), everywhere(2, losses=torch.tensor([0.0, 1.0], dtype=F64))
    # the only row is the constraint's (-1, 1)
    for _ in range(2):
        assert method.weigh(gram, outside).tolist() == [-1, 1]
    # (1, 0), (0, 1) and (-1, 1): the shortest is between the first and the third
    torch.testing.assert_close(method.weigh(gram, outside), torch.tensor([0.2, 0.4], dtype=F64))
    saved = method.state_dict()
    other = methods.ParetoMTL([[1.0, 0.0], [0.0, 1.0]], 0, max_start_steps=2)
    other.load_state_dict(saved)
    assert torch.equal(other.weigh(gram, outside), method.weigh(gram, outside))
    method.reset()
    assert method.weigh(gram, outside).tolist() == [-1, 1]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_paretomtl_what_is_not_finite_shows_and_changes_nothing(bad, backend: Backend):
    method = methods.ParetoMTL(CIRCLE, 0)
    gram, losses = torch.eye(2, dtype=F64), torch.tensor([1.0, 1.0], dtype=F64)
    broken = gram.clone()
    broken[0, 1] = broken[1, 0] = bad
    for seen, m in ((everywhere(2, losses=losses), broken), (everywhere(2, losses=losses * bad), gram)):
        assert method.weigh(m, seen).isnan().all()
    saved = method.state_dict()
    assert saved["started"] == 0 and saved["start_steps"] == 0


def test_paretomtl_refuses():
    for vectors, kind, text in (
        ("ab", TypeError, "expected K vectors of T numbers, got str"),
        ([1.0, 2.0], ValueError, r"\[K, T\], got shape \[2\]"),
        ([[1.0, -1.0]], ValueError, "numbers from 0"),
        ([[1.0, 0.0], [0.0, 0.0]], ValueError, "in no vector all of them 0"),
        ([[math.nan, 1.0]], ValueError, "numbers from 0"),
        (torch.ones(100, 29), ValueError, "expected K \\+ T up to 128"),
    ):
        with pytest.raises(kind, match=text):
            methods.ParetoMTL(vectors, 0)
    with pytest.raises(ValueError, match=r"index: expected an integer from 0 to 4, got 5"):
        methods.ParetoMTL(CIRCLE, 5)
    with pytest.raises(TypeError, match="index: expected an integer, got float"):
        methods.ParetoMTL(CIRCLE, 1.0)
    with pytest.raises(ValueError, match="max_start_steps: expected an integer from 0, got -1"):
        methods.ParetoMTL(CIRCLE, 1, max_start_steps=-1)
    with pytest.raises(TypeError, match="max_start_steps: expected an integer, got float"):
        methods.ParetoMTL(CIRCLE, 1, max_start_steps=1.5)
    with pytest.raises(ValueError, match="preferences: expected vectors of 3 tasks, got 2"):
        methods.ParetoMTL(CIRCLE, 1).weigh(torch.eye(3), everywhere(3, losses=torch.ones(3, dtype=F64)))


# --- all of them


def test_no_value_is_read_on_the_host():
    from torch._subclasses.fake_tensor import FakeTensorMode

    pareto = methods.ParetoMTL(CIRCLE, 0, max_start_steps=3)
    with FakeTensorMode(allow_non_fake_inputs=True):
        gram, present = torch.zeros(2, 2), torch.zeros(2, dtype=torch.bool)
        seen = Seen(["a", "b"], present, losses=torch.zeros(2, dtype=F64), second=torch.zeros(2, 2, dtype=F64))
        for method in (methods.MoDo(), methods.CRMOGM(methods.MGDA()), methods.CRMOGM(methods.MoDo()), pareto):
            for _ in range(2):
                assert method.weigh(gram, seen).shape == (2,)
