"""`method_weights` and the classes on it: each method's defining equation, its properties, and TorchJD's numbers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from conftest import Backend
from torch import Tensor

from fastmtl import methods, ops
from fastmtl.ops.gradients.method_weights import OPTIONS

F64 = torch.float64
# method and options, as the classes have them by default
DEFAULTS: dict[str, list[float]] = {
    "mgda": [],
    "cagrad": [0.5],
    "imtlg": [],
    "config": [],
    "nashmtl": [0.0],
    "fairgrad": [2.0],
    "alignedmtl": [0.0, 0.0],
    "upgrad": [1e-4],
    "dualproj": [1e-4],
}
SCALED = ("nashmtl", "fairgrad")  # whose weights change with the scale of the gradients, by definition


def gradients(kind: str, num_tasks: int, seed: int = 0) -> Tensor:
    """`[T, P]` float64."""
    generator = torch.Generator().manual_seed(1000 * num_tasks + seed)
    g = torch.randn(num_tasks, 3 * num_tasks + 2, dtype=F64, generator=generator)
    if kind == "conflicting":
        return g - 0.8 * g.mean(0)
    if kind == "lengths":  # of very different size, with a part in common
        common = torch.randn(g.shape[1], dtype=F64, generator=generator)
        return (1.5 * torch.randn(num_tasks, 1, dtype=F64, generator=generator)).exp() * g + common
    if kind == "dependent":
        return g[:, : max(1, num_tasks // 2)].clone()
    if kind == "duplicates":
        return g[torch.arange(num_tasks) // 2].clone()
    if kind == "opposite":
        g[-1] = -g[0]
        return g
    if kind == "zero row":
        g[num_tasks // 2] = 0.0
        return g
    assert kind == "ordinary"
    return g


REGULAR = ("ordinary", "conflicting", "lengths")
HARD = (*REGULAR, "dependent", "duplicates", "opposite", "zero row")
SIZES = (1, 2, 3, 8, 64)


def solved(name: str, gram: Tensor, **options: Tensor | None) -> Tensor:
    w = ops.method_weights(gram, name, DEFAULTS[name], **options)
    assert w.dtype == F64 and w.shape == gram.shape[:1] and w.isfinite().all()
    return w


# methods with tests of their own
ELSEWHERE = ("krum", "pcd", "sdmgrad", "modo")


def test_defaults_cover_every_method() -> None:
    assert [*DEFAULTS, *ELSEWHERE] == list(OPTIONS)


# --- defining equations


@pytest.mark.parametrize("num_tasks", SIZES)
@pytest.mark.parametrize("kind", HARD)
def test_mgda_is_the_shortest_convex_combination(kind: str, num_tasks: int, backend: Backend) -> None:
    m = gradients(kind, num_tasks)
    m = m @ m.mT
    w = solved("mgda", m)
    assert (w >= 0).all() and abs(w.sum() - 1) < 1e-12
    products, square = m @ w, w @ m @ w
    # no gradient is nearer to the origin along the point than the point itself; so all tasks descend
    lengths = m.diagonal().sqrt()
    assert (products >= square - 1e-8 * lengths * square.clamp(min=0).sqrt() - 1e-14 * lengths.max() ** 2).all()


@pytest.mark.parametrize("c", [0.1, 0.5, 1.5])
@pytest.mark.parametrize("num_tasks", SIZES)
@pytest.mark.parametrize("kind", HARD)
def test_cagrad_is_best_for_the_worst_task(kind: str, num_tasks: int, c: float, backend: Backend) -> None:
    g = gradients(kind, num_tasks)
    mean = g.mean(0)
    w = ops.method_weights(g @ g.mT, "cagrad", [c])
    update, reach = w @ g, c * mean.norm()
    assert (update - mean).norm() <= reach * (1 + 1e-7)
    worst = (g @ update).min()
    # of every convex combination p the dual <g_p, g_0> + reach |g_p| is an upper bound; at the solution it is reached
    more = w - 1 / num_tasks
    assert (more >= -1e-9 * more.abs().max()).all()
    bounds = []
    if more.sum() > 0:
        p = more / more.sum()
        bounds.append((p @ g) @ mean + reach * (p @ g).norm())
    if kind in ("opposite", "zero row"):
        bounds.append(torch.zeros((), dtype=F64))  # a convex combination is zero
    scale = g.norm(dim=1).max() * mean.norm() * (1 + c)
    assert worst >= min(bounds) - 1e-6 * scale
    if c < 1:
        assert update @ mean >= 0.5 * (1 - c) * mean @ mean  # the mean loss falls


@pytest.mark.parametrize("num_tasks", SIZES)
@pytest.mark.parametrize("kind", REGULAR)
def test_imtlg_has_equal_projections(kind: str, num_tasks: int, backend: Backend) -> None:
    g = gradients(kind, num_tasks)
    w = solved("imtlg", g @ g.mT)
    assert abs(w.sum() - 1) < 1e-9
    projections = (g / g.norm(dim=1, keepdim=True)) @ (w @ g)
    assert (projections - projections.mean()).abs().max() <= 1e-8 * (w @ g).norm()


@pytest.mark.parametrize("num_tasks", SIZES)
@pytest.mark.parametrize("kind", REGULAR)
def test_config_has_equal_cosines_and_the_summed_length(kind: str, num_tasks: int, backend: Backend) -> None:
    g = gradients(kind, num_tasks)
    update = solved("config", g @ g.mT) @ g
    cosines = (g / g.norm(dim=1, keepdim=True)) @ update / update.norm()
    assert cosines.min() > 0 and (cosines - cosines.mean()).abs().max() <= 1e-8
    torch.testing.assert_close(update.norm(), (g @ (update / update.norm())).sum(), rtol=1e-8, atol=0.0)


@pytest.mark.parametrize(("name", "alpha"), [("nashmtl", 1.0), ("fairgrad", 1.0), ("fairgrad", 0.5), ("fairgrad", 2.0)])
@pytest.mark.parametrize("num_tasks", SIZES)
@pytest.mark.parametrize("kind", REGULAR)
def test_fairness_equations(kind: str, num_tasks: int, name: str, alpha: float, backend: Backend) -> None:
    g = gradients(kind, num_tasks)
    m = g @ g.mT
    a = ops.method_weights(m, name, [0.0] if name == "nashmtl" else [alpha])
    assert (a > 0).all()
    torch.testing.assert_close(m @ a, a ** (-1 / alpha), rtol=1e-8, atol=0.0)


def test_nashmtl_has_at_most_the_norm(backend: Backend) -> None:
    g = gradients("conflicting", 5)
    free = ops.method_weights(g @ g.mT, "nashmtl", [0.0])
    for most in (0.5, 100.0):
        w = ops.method_weights(g @ g.mT, "nashmtl", [most])
        norm = (free @ g).norm()
        torch.testing.assert_close(w, free * min(1.0, most / norm.item()), rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("num_tasks", SIZES)
@pytest.mark.parametrize("kind", REGULAR)
def test_alignedmtl_makes_principal_components_equal(kind: str, num_tasks: int, backend: Backend) -> None:
    g = gradients(kind, num_tasks)
    values, vectors = torch.linalg.eigh(g @ g.mT)
    # the square root of the matrix takes the weights to the mean, at the length of the shortest component
    root = vectors @ values.clamp(min=0).sqrt().diag() @ vectors.mT
    found = root @ solved("alignedmtl", g @ g.mT)
    expected = values.min().sqrt() * torch.full((num_tasks,), 1 / num_tasks, dtype=F64)
    torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-7 * values.max().sqrt().item())


def regularised(m: Tensor) -> Tensor:
    return m / m.trace().clamp(min=1e-300) + 1e-4 * torch.eye(m.shape[0], dtype=F64)


def projected(m: Tensor, u: Tensor) -> Tensor:
    """The weights of `u^T G`, projected on the cone without conflict, by another solver: least squares over y >= 0."""
    optimize = pytest.importorskip("scipy.optimize", reason="the other solver")
    root = np.linalg.cholesky(regularised(m).numpy()).T
    y, _ = optimize.nnls(root, -root @ u.numpy(), maxiter=100 * len(u))
    return u + torch.from_numpy(y)


@pytest.mark.parametrize("num_tasks", SIZES)
@pytest.mark.parametrize("kind", HARD)
def test_dualproj_and_upgrad_project_on_the_cone(kind: str, num_tasks: int, backend: Backend) -> None:
    g = gradients(kind, num_tasks)
    m, n = g @ g.mT, num_tasks
    u = torch.full((n,), 1 / n, dtype=F64)
    w = solved("dualproj", m)
    residual = regularised(m) @ w
    assert (w >= u - 1e-12).all() and (residual >= -1e-10).all() and ((w - u) * residual).abs().max() <= 1e-9
    torch.testing.assert_close(w, projected(m, u), rtol=1e-6, atol=1e-6)
    w = solved("upgrad", m)
    assert (regularised(m) @ w >= -1e-9).all()
    torch.testing.assert_close(w, sum(projected(m, row) for row in u.diag()), rtol=1e-6, atol=1e-6)


# --- closed forms


@pytest.mark.parametrize("name", DEFAULTS)
def test_one_task(name: str, backend: Backend) -> None:
    w = ops.method_weights(torch.tensor([[4.0]], dtype=F64), name, DEFAULTS[name])
    # Nash: 4 a = 1 / a; FairGrad: 4 a = a^(-1/2); CAGrad goes further by c
    expected = {"nashmtl": 0.5, "fairgrad": 0.25 ** (2 / 3), "cagrad": 1.5}.get(name, 1.0)
    torch.testing.assert_close(w, torch.tensor([expected], dtype=F64), rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("name", ["imtlg", "config"])
def test_no_direction_is_made_of_rounding(name: str, backend: Backend) -> None:
    """Two pairs of opposite gradients on one line, in float32: no direction has equal projections on all."""
    for seed in range(20):
        g = torch.randn(2, 1, generator=torch.Generator().manual_seed(seed))
        g = torch.cat([g, -1.3 * g])
        assert (ops.method_weights(g @ g.T, name) == 0).all()


def test_two_tasks(backend: Backend) -> None:
    m = torch.tensor([[4.0, -1.0], [-1.0, 1.0]], dtype=F64)
    # (K22 - K12) / (K11 + K22 - 2 K12)
    torch.testing.assert_close(solved("mgda", m), torch.tensor([2 / 7, 5 / 7], dtype=F64), rtol=1e-12, atol=0.0)
    # K v = (2, 1): v = (3, 6) / 3
    torch.testing.assert_close(solved("imtlg", m), torch.tensor([1 / 3, 2 / 3], dtype=F64), rtol=1e-12, atol=0.0)
    # a = (1 / |g_1|, 1 / |g_2|) / sqrt(1 + cosine)
    a = torch.tensor([0.5, 1.0], dtype=F64) / 0.5**0.5
    torch.testing.assert_close(solved("nashmtl", m), a, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("name", DEFAULTS)
def test_no_gradient_at_all(name: str, backend: Backend) -> None:
    w = solved(name, torch.zeros(3, 3, dtype=F64))
    assert name in ("mgda", "cagrad", "upgrad", "dualproj") or (w == 0).all()


# --- properties


@pytest.mark.parametrize("name", DEFAULTS)
@pytest.mark.parametrize("kind", ["conflicting", "lengths", "duplicates"])
def test_scale(kind: str, name: str, backend: Backend) -> None:
    g = gradients(kind, 6)
    w = solved(name, g @ g.mT)
    for scale in (1e-12, 1e-3, 1e12):
        found = solved(name, (scale * g) @ (scale * g).mT)
        if name in SCALED:
            found, expected = (scale * found @ g), w @ g
            found, expected = found / found.norm(), expected / expected.norm()
        else:
            expected = w
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6 * expected.abs().max().item())


@pytest.mark.parametrize("name", DEFAULTS)
@pytest.mark.parametrize("kind", ["conflicting", "lengths"])
def test_permutation(kind: str, name: str, backend: Backend) -> None:
    g = gradients(kind, 7)
    order = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    found, w = solved(name, (g @ g.mT)[order][:, order]), solved(name, g @ g.mT)
    torch.testing.assert_close(found, w[order], rtol=1e-7, atol=1e-8 * w.abs().max().item())


@pytest.mark.parametrize("name", DEFAULTS)
def test_absent_tasks_are_not_in_the_problem(name: str, backend: Backend) -> None:
    g = gradients("conflicting", 6)
    present = torch.tensor([True, False, True, True, False, True])
    m = g @ g.mT
    m[1], m[:, 4] = torch.nan, torch.inf
    w = solved(name, m, present=present)
    assert (w[~present] == 0).all()
    here = g[present]
    torch.testing.assert_close(w[present], solved(name, here @ here.mT), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", DEFAULTS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_shows(bad: float, name: str, backend: Backend) -> None:
    m = torch.eye(4, dtype=F64)
    m[1, 2] = m[2, 1] = bad
    present = torch.tensor([True, True, True, False])
    w = ops.method_weights(m, name, DEFAULTS[name], present=present)
    assert w[:3].isnan().all() and w[3] == 0


@pytest.mark.parametrize("name", DEFAULTS)
def test_sixteen_bit_gradients(name: str, backend: Backend) -> None:
    """The update differs by the rounding of the gradients."""
    g = gradients("ordinary", 5)
    method = methods.get(name)
    found = method(g.to(torch.bfloat16)).double()
    expected = method(g.to(torch.bfloat16).double())
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02 * expected.abs().max().item())


@pytest.mark.parametrize("name", ["config", "alignedmtl", "upgrad", "dualproj"])
def test_preferences(name: str, backend: Backend) -> None:
    g = gradients("conflicting", 4)
    equal = solved(name, g @ g.mT, preferences=torch.full((4,), 0.25))
    torch.testing.assert_close(equal, solved(name, g @ g.mT), rtol=1e-9, atol=1e-12)
    first = solved(name, g @ g.mT, preferences=torch.tensor([1.0, 0.0, 0.0, 0.0]))
    cosines = torch.stack([(g @ (w @ g))[0] / (w @ g).norm() for w in (equal, first)])
    assert cosines[1] > cosines[0]


@pytest.mark.parametrize("name", ["config", "alignedmtl", "upgrad", "dualproj"])
@pytest.mark.parametrize("kind", ["conflicting", "opposite", "zero row"])
def test_preferences_for_absent_tasks_alone(kind: str, name: str, backend: Backend) -> None:
    """Nothing that counts is there: no update, as where no task is present; and next to none where little is there."""
    g = gradients(kind, 5)
    present = torch.tensor([False, True, True, False, True])
    counts = torch.tensor([0.7, 0.0, 0.0, 0.3, 0.0], dtype=F64)
    assert (solved(name, g @ g.mT, present=present, preferences=counts) == 0).all()
    assert (solved(name, g @ g.mT, present=torch.zeros(5, dtype=torch.bool)) == 0).all()
    if name != "config":  # whose length is that of the gradients
        little = torch.where(present, 1e-6, counts)
        assert solved(name, g @ g.mT, present=present, preferences=little).abs().max() < 1e-4


# --- TorchJD


def _parity() -> dict[str, Callable[[object], tuple[Callable[[Tensor], Tensor], methods.Method]]]:
    return {
        "imtlg": lambda jd: (jd.IMTLG(), methods.IMTLG()),
        "config": lambda jd: (jd.ConFIG(), methods.ConFIG()),
        "alignedmtl": lambda jd: (jd.AlignedMTL(), methods.AlignedMTL()),
        "upgrad": lambda jd: (jd.UPGrad(), methods.UPGrad()),
        "dualproj": lambda jd: (jd.DualProj(), methods.DualProj()),
        "fairgrad": lambda jd: (jd.FairGrad(alpha=2.0), methods.FairGrad(alpha=2.0)),
    }


@pytest.mark.parametrize("name", _parity())
@pytest.mark.parametrize("num_tasks", [2, 5, 12])
def test_torchjd(num_tasks: int, name: str, backend: Backend) -> None:
    theirs, ours = _parity()[name](pytest.importorskip("torchjd.aggregation"))
    for kind in ("ordinary", "conflicting"):
        g = gradients(kind, num_tasks)
        expected = theirs(g)
        torch.testing.assert_close(ours(g), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


# --- bad input


def test_bad_arguments() -> None:
    m = torch.eye(3)
    with pytest.raises(ValueError, match=r"method: expected one of mgda, .*, got 'nothing'"):
        ops.method_weights(m, "nothing")
    with pytest.raises(ValueError, match=r"options: cagrad takes 1 numbers \[c\], got \[\]"):
        ops.method_weights(m, "cagrad")
    with pytest.raises(ValueError, match="c: expected a number from 0, got -1"):
        ops.method_weights(m, "cagrad", [-1.0])
    with pytest.raises(ValueError, match="preferences: mgda takes none"):
        ops.method_weights(m, "mgda", preferences=torch.ones(3))
    with pytest.raises(ValueError, match=r"preferences: expected shape \[3\], got \[2\]"):
        ops.method_weights(m, "upgrad", [1e-4], preferences=torch.ones(2))
    with pytest.raises(TypeError, match=r"preferences: expected a floating-point tensor, got torch\.int64"):
        ops.method_weights(m, "upgrad", [1e-4], preferences=torch.ones(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"gram: expected a square \[T, T\] matrix"):
        ops.method_weights(torch.ones(2, 3), "mgda")
    with pytest.raises(TypeError, match=r"gram: expected a floating-point tensor, got torch\.int64"):
        ops.method_weights(torch.ones(2, 2, dtype=torch.int64), "mgda")
    with pytest.raises(TypeError, match=r"present: expected torch\.bool"):
        ops.method_weights(m, "mgda", present=torch.ones(3))
