"""The Gram methods against a second implementation of each: from its paper, on the gradients themselves, with scipy.

Nothing here knows how the package solves them. Gradients are whole numbers, so that the Gram matrix in float64 is exact
and every difference is the solvers'. Hulls and cones are searched by nonnegative least squares, eigenvalues come from
the singular values of the gradients: problems whose condition is the root of the Gram matrix's.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import Backend
from torch import nn

import fastmtl
from fastmtl import methods

optimize = pytest.importorskip("scipy.optimize")

KINDS = ("random", "low rank", "duplicates", "zero row", "opposite", "common", "lengths", "nearly opposite")
EPS = float(np.finfo(np.float64).eps)
cases = pytest.mark.parametrize("kind", KINDS)


def sizes(**tasks: tuple[int, ...]) -> pytest.MarkDecorator:
    """Numbers of tasks for each backend: the compiled code has the larger ones too."""
    rows = [pytest.param(Backend(name), n, id=f"{name}-{n}") for name, counts in tasks.items() for n in counts]
    return pytest.mark.parametrize("backend, num_tasks", rows, indirect=["backend"])


def gradients(kind: str, num_tasks: int) -> np.ndarray:
    """`[T, P]` float64 of whole numbers, whose products are summed without rounding."""
    r = np.random.default_rng([KINDS.index(kind), num_tasks])
    columns = max(1, num_tasks // 2) if kind == "low rank" else num_tasks + 5
    g = r.integers(-50, 51, (num_tasks, columns)).astype(np.float64)
    if kind == "duplicates":
        g[num_tasks // 2 :] = g[: num_tasks - num_tasks // 2]
    if kind == "zero row":
        g[num_tasks // 2] = 0
    if kind == "opposite":
        g[-1] = -g[0]
    if kind == "common":  # a part in common that is 30,000 times as long: condition numbers to 2e14
        g += 2.0**20
    if kind == "lengths":
        g *= 2.0 ** r.integers(0, 16, (num_tasks, 1))
    if kind == "nearly opposite" and num_tasks > 1:  # and long: condition numbers from 4e10 to 6e12
        g[0] *= 2.0**10
        g[-1] = -g[0] + r.integers(-1, 2, columns)
    return g


def solved(method: methods.Method, g: np.ndarray) -> np.ndarray:
    return method.weights(torch.from_numpy(g @ g.T)).numpy()


def lengths(g: np.ndarray) -> np.ndarray:
    return np.sqrt((g * g).sum(1))


def units(g: np.ndarray) -> np.ndarray:
    norms = lengths(g)
    return g / np.where(norms == 0, 1, norms)[:, None]


def apart(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, relative to the largest number."""
    return float(np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-300))


def shortest(g: np.ndarray) -> np.ndarray:
    """Weights of the shortest convex combination: least distance programming (Lawson and Hanson 1974, chapter 23)."""
    rows = np.vstack([g.T / max(lengths(g).max(), 1), np.ones(len(g))])
    u, _ = optimize.nnls(rows, np.eye(len(rows))[-1], maxiter=100 * len(g))
    return u / u.sum()


# --- the shortest convex combination


@cases
@sizes(reference=(1, 2, 5), cpu=(1, 2, 3, 5, 16, 128))
def test_mgda(kind: str, num_tasks: int, backend: Backend) -> None:
    g = gradients(kind, num_tasks)
    w = solved(methods.MGDA(), g)
    assert w.min() >= 0 and w.sum() == pytest.approx(1, rel=1e-12)
    best, found = shortest(g) @ g, w @ g
    assert found @ found <= (1 + 1e-9) * (best @ best) + EPS * (g * g).sum(1).max()


def cagrad_bound(g: np.ndarray, c: float) -> float:
    """No direction d with `|d - g_0| <= c |g_0|` has a larger `min_i <g_i, d>`.

    For every w of the simplex, `<g_w, g_0> + c |g_0| |g_w|` is a bound (the paper's dual); the least is sought.
    With `|g_w| = min_t (|g_w|^2 / t + t) / 2` the problem in w is, for each t, that of a shortest convex combination,
    and what is left is convex in t.
    """
    g0 = g.mean(0)
    length = float(np.linalg.norm(g0))

    def at(log_t: float) -> np.ndarray:
        return shortest(g + np.exp(log_t) / c * g0) @ g

    def smoothed(log_t: float) -> float:
        s, t = at(log_t), np.exp(log_t) * length
        return float(c * length * (s @ s / t + t) / 2 + s @ g0)

    def dual(s: np.ndarray) -> float:
        return float(s @ g0 + c * length * np.linalg.norm(s))

    found = optimize.minimize_scalar(smoothed, bounds=(-30, 15), method="bounded", options={"xatol": 1e-10})
    return min(dual(at(found.x)), dual(shortest(g) @ g))


@cases
@sizes(reference=(1, 2, 5), cpu=(1, 2, 3, 5, 16))
@pytest.mark.parametrize("c", [0.4, 0.9, 1.5])
def test_cagrad(kind: str, num_tasks: int, c: float, backend: Backend) -> None:
    check_cagrad(gradients(kind, num_tasks), c)


@sizes(cpu=(64, 128))
@pytest.mark.parametrize("kind", ["random", "low rank"])
def test_cagrad_among_many_tasks(kind: str, num_tasks: int, backend: Backend) -> None:
    check_cagrad(gradients(kind, num_tasks), 0.5)


def check_cagrad(g: np.ndarray, c: float) -> None:
    num_tasks = len(g)
    g0 = g.mean(0)
    length = float(np.linalg.norm(g0))
    d = solved(methods.CAGrad(c), g) @ g
    if length == 0:
        assert not d.any()
        return
    # lengths and inner products are sums of entries of the Gram matrix, which may cancel
    forgiven = 1e-8 + np.sqrt(EPS * num_tasks) * lengths(g).max() / length
    assert np.linalg.norm(d - g0) <= c * length * (1 + forgiven)
    bound = cagrad_bound(g, c)
    assert (g @ d).min() >= bound - forgiven * max(length * length, abs(bound))


@pytest.mark.parametrize("num_tasks", [2, 5, 8, 16])
@pytest.mark.parametrize("share", [-0.9, -0.1, 0.1, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("noise", [0.0, 1e-15, 1e-9])
def test_cagrad_of_equal_angles(num_tasks: int, share: float, noise: float, backend: Backend) -> None:
    """The worst task is best served by the mean itself, made 1 + c times as long."""
    cosine = share if share > 0 else share / (num_tasks - 1)
    m = torch.full((num_tasks, num_tasks), cosine, dtype=torch.float64).fill_diagonal_(1.0)
    change = noise * torch.randn(num_tasks, num_tasks, dtype=torch.float64)
    w = methods.CAGrad(0.5).weights(m + change + change.T)
    torch.testing.assert_close(w, torch.full_like(w, 1.5 / num_tasks), rtol=1e-6, atol=0)


def turned_off(g: np.ndarray) -> np.ndarray:
    """The direction nearest to the mean gradient that harms no task, by least squares on the unit vectors."""
    v, _ = optimize.nnls(units(g).T, -g.mean(0))
    return g.mean(0) + v @ units(g)


@sizes(reference=(4, 8), cpu=(4, 8, 32, 64))
@pytest.mark.parametrize("c", [2.0, 10.0, 50.0, 1e6])
@pytest.mark.parametrize("pairs", ["one", "all"])
def test_cagrad_of_opposites_in_a_large_ball(pairs: str, c: float, num_tasks: int, backend: Backend) -> None:
    """Where two gradients are opposite no direction serves all tasks, however far it may be from the mean."""
    g = np.random.default_rng(num_tasks).standard_normal((num_tasks, 2 * num_tasks + 5))
    if pairs == "one":
        g[-1] = -g[0]
    else:
        g[num_tasks // 2 :] = -1.3 * g[: num_tasks // 2]
    expected = turned_off(g)
    assert np.linalg.norm(expected - g.mean(0)) < 0.99 * c * np.linalg.norm(g.mean(0))
    d = solved(methods.CAGrad(c), g) @ g
    assert np.linalg.norm(d - expected) < 1e-7 * np.linalg.norm(g.mean(0))
    assert (units(g) @ d).min() > -1e-7 * np.linalg.norm(g.mean(0))


# --- equal projections


@cases
@sizes(reference=(1, 2, 5), cpu=(1, 2, 3, 5, 16, 128))
def test_imtlg_and_config(kind: str, num_tasks: int, backend: Backend) -> None:
    g = gradients(kind, num_tasks)
    u, part = units(g), lengths(g) > 0
    w = solved(methods.IMTLG(), g)
    d = solved(methods.ConFIG(), g) @ g
    if not part.any():
        assert not w.any() and not d.any()
        return
    cut = 1e-9 if kind == "nearly opposite" else 1e-12  # of singular values, whose squares are what is known to eps
    x = np.linalg.pinv(u, rcond=cut) @ part.astype(np.float64)  # ConFIG, equation 2
    if np.linalg.norm(x) < 1e-6:  # all gradients on one line, in both directions
        assert not w.any() and not d.any()
        return
    x /= np.linalg.norm(x)
    condition = np.linalg.cond(u[part]) ** 2 if np.linalg.matrix_rank(u[part]) == part.sum() else 1.0
    tolerance = 1e-13 * num_tasks + 10 * EPS * condition
    assert apart(d, (g @ x).sum() * x) < tolerance  # equation 3
    assert w.sum() == pytest.approx(1, rel=1e-10)
    # the update of IMTL-G has the same direction, and equal projections where there are any
    assert apart(w @ g, (w @ g) @ x * x) < tolerance
    spread = np.ptp((u @ (w @ g))[part])
    assert spread < 1e-8 * np.linalg.norm(w @ g) or np.ptp((u @ x)[part]) > 1e-3
    if kind in ("random", "lengths", "common") and 1 < num_tasks <= 40:
        # the paper's closed form: no projection on the differences of the unit gradients
        rest = np.linalg.solve((u[0] - u[1:]) @ (g[0] - g[1:]).T, (u[0] - u[1:]) @ g[0])
        assert apart(w @ g, np.append(1 - rest.sum(), rest) @ g) < 1e-6


# --- fairness


@cases
@sizes(reference=(1, 2, 5), cpu=(1, 2, 3, 5, 16, 128))
@pytest.mark.parametrize("alpha", [0.3, 1.0, 2.0, 10.0])
def test_nashmtl_and_fairgrad(kind: str, num_tasks: int, alpha: float, backend: Backend) -> None:
    g = gradients(kind, num_tasks)
    m = g @ g.T
    a = solved(methods.NashMTL() if alpha == 1 else methods.FairGrad(alpha), g)
    part = lengths(g) > 0
    assert not a[~part].any()
    a, m = a[part], m[np.ix_(part, part)]
    assert (a > 0).all() and np.isfinite(a).all()
    best = shortest(g[part]) @ g[part] if part.any() else np.zeros(0)
    if part.any() and best @ best < 1e-20 * (g * g).sum(1).max():
        return  # the equation has no solution
    rounding = 1e-12 if backend.name == "cpu" else 1e-9
    assert (np.abs(m @ a - a ** (-1 / alpha)) <= rounding * np.abs(m) @ a).all()


@sizes(reference=(3, 8), cpu=(3, 8, 32))
@pytest.mark.parametrize("decades", [4, 8])
@pytest.mark.parametrize("alpha", [0.1, 5.0, 10.0, 20.0, 100.0])
def test_fairgrad_of_lengths_far_apart(alpha: float, decades: int, num_tasks: int, backend: Backend) -> None:
    """Some weights are then many orders of magnitude off those of orthogonal gradients, or no float64 holds them."""
    r = np.random.default_rng([num_tasks, decades])
    g = 10 ** r.uniform(-decades, decades, (num_tasks, 1)) * r.standard_normal((num_tasks, 2 * num_tasks + 5))
    m, a = g @ g.T, solved(methods.FairGrad(alpha), g)
    assert np.isfinite(a).all() and (a >= 0).all()
    held = a * lengths(g) > 1e-200 * (a * lengths(g)).max()
    assert held.any() and (alpha >= 20 or held.all())
    wanted = np.where(held, a, 1.0) ** (-1 / alpha)
    assert (np.abs(m @ a - wanted) <= 1e-11 * np.abs(m) @ a)[held].all()


@sizes(reference=(8, 33), cpu=(8, 33, 64))
@pytest.mark.parametrize("decades", [0, 30])
def test_fairgrad_of_weights_that_no_float64_holds(decades: int, num_tasks: int, backend: Backend) -> None:
    """Two gradients all but opposite ask for weights of 1e9 and more, beside which others fall to nothing."""
    for seed in range(4):
        r = np.random.default_rng([seed, num_tasks])
        g = r.standard_normal((num_tasks, 2 * num_tasks + 5))
        g[-1] = -g[0] + 1e-5 * r.standard_normal(2 * num_tasks + 5)
        if decades:
            g *= 10 ** r.uniform(-decades, decades, (num_tasks, 1))
        a = solved(methods.FairGrad(100.0), g)
        assert np.isfinite(a).all() and (a >= 0).all()
        if not decades:
            held = a > 1e-200 * a.max()
            m, wanted = g @ g.T, np.where(held, a, 1.0) ** -0.01
            assert held.any() and (np.abs(m @ a - wanted) <= 1e-8 * np.abs(m) @ a)[held].all()


@pytest.mark.parametrize("alpha", [0.1, 0.5, 1.0])
def test_fairgrad_of_a_gradient_that_all_but_vanishes(alpha: float, backend: Backend) -> None:
    g = np.random.default_rng(0).standard_normal((4, 9)) * np.array([[1.0], [1e-38], [1e-60], [1.0]])
    m, a = g @ g.T, solved(methods.FairGrad(alpha), g)
    assert np.isfinite(a).all() and (a > 0).all()
    assert (np.abs(m @ a - a ** (-1 / alpha)) <= 1e-9 * np.abs(m) @ a).all()


def test_fairness_is_the_minimum(backend: Backend) -> None:
    """`a'K a / 2 - sum log a` has its minimum where `K a = 1 / a`; looked for without that equation."""
    g = gradients("random", 5) / 50
    m = g @ g.T

    def value(x: np.ndarray) -> float:
        return float(np.exp(x) @ m @ np.exp(x) / 2 - x.sum())

    found = optimize.minimize(value, np.zeros(5), method="BFGS", options={"gtol": 1e-10})
    assert apart(solved(methods.NashMTL(), g), np.exp(found.x)) < 1e-6


# --- principal components


@cases
@sizes(reference=(1, 2, 5), cpu=(1, 2, 3, 5, 16, 128))
@pytest.mark.parametrize(
    "scale, reduction", [("min", "mean"), ("median", "sum"), ("rmse", "mean")], ids=["min", "median", "rmse"]
)
def test_alignedmtl(kind: str, num_tasks: int, scale: str, reduction: str, backend: Backend) -> None:
    g = gradients(kind, num_tasks)
    w = solved(methods.AlignedMTL(scale, reduction), g)
    if not g.any():
        assert not w.any()
        return
    left, sigma, right = np.linalg.svd(g, full_matrices=False)
    values = sigma**2
    kept = values > EPS * num_tasks * values.max()
    left, values, right = left[:, kept], values[kept], right[kept]
    if values.max() > 1e12 * values.min():
        return  # which of them are zero is no longer to be told
    to = {"min": values.min(), "median": np.sort(values)[(len(values) - 1) // 2], "rmse": values.mean()}[scale]
    expected = np.sqrt(to) * left.sum(0) @ right * (1 / num_tasks if reduction == "mean" else 1.0)
    off = np.linalg.norm(w @ g - expected) / np.sqrt(to * num_tasks) * (num_tasks if reduction == "mean" else 1)
    assert off < 1e-12 + 10 * num_tasks * EPS * values.max() / values.min()


def test_alignedmtl_of_gradients_that_all_but_vanish(backend: Backend) -> None:
    """The square of what they have in common with the others is a number of few bits."""
    g = np.eye(4) + 0.5
    scales = np.array([1.0, 1e-79, 1e-80, 1e-80])
    w = methods.AlignedMTL().weights(torch.from_numpy((g @ g.T) * scales[:, None] * scales)).numpy()
    np.testing.assert_allclose(w, [0.25, 0.0, 0.0, 0.0], atol=1e-12)


# --- the cone without conflict


def in_cone(m: np.ndarray, least: np.ndarray) -> np.ndarray:
    """Of all `v >= least` the one with the smallest `v' M v`."""
    root = np.linalg.cholesky(m).T
    more, _ = optimize.nnls(root, -root @ least)
    return least + more


@cases
@sizes(reference=(1, 2, 5), cpu=(1, 2, 3, 5, 16, 128))
@pytest.mark.parametrize("reg_eps", [1e-4, 1e-7])
def test_dualproj_and_upgrad(kind: str, num_tasks: int, reg_eps: float, backend: Backend) -> None:
    g = gradients(kind, num_tasks)
    equal = np.full(num_tasks, 1 / num_tasks)
    if not g.any():
        assert apart(solved(methods.DualProj(reg_eps), g), equal) == 0
        assert apart(solved(methods.UPGrad(reg_eps), g), equal) == 0
        return
    m = g @ g.T / (g * g).sum() + reg_eps * np.eye(num_tasks)
    tolerance = 1e-12 + 10 * EPS / reg_eps
    assert apart(solved(methods.DualProj(reg_eps), g), in_cone(m, equal)) < tolerance
    if num_tasks <= 40:
        expected = np.mean([in_cone(m, own) for own in np.eye(num_tasks)], 0)
        assert apart(solved(methods.UPGrad(reg_eps), g), expected) < 10 * tolerance


# --- two tasks, in closed form


@pytest.mark.parametrize("cosine", [-0.99, -0.5, 0.0, 0.3, 0.95])
@pytest.mark.parametrize("ratio", [1.0, 3.0, 1e5])
def test_two_tasks(cosine: float, ratio: float, backend: Backend) -> None:
    """Lengths 1 and r, inner product `r cos`."""
    m = torch.tensor([[1.0, ratio * cosine], [ratio * cosine, ratio**2]], dtype=torch.float64)
    g0 = np.sqrt(1 + 2 * ratio * cosine + ratio**2) / 2

    def check(method: methods.Method, *expected: float) -> None:
        np.testing.assert_allclose(method.weights(m).numpy(), expected, rtol=1e-9)

    # the foot of the perpendicular on the segment between the gradients, or the shorter of them (r >= 1)
    first = 1.0 if ratio * cosine >= 1 else (ratio**2 - ratio * cosine) / (1 + ratio**2 - 2 * ratio * cosine)
    np.testing.assert_allclose(methods.MGDA().weights(m).numpy(), (first, 1 - first), rtol=1e-9, atol=1e-12)
    check(methods.IMTLG(), ratio / (1 + ratio), 1 / (1 + ratio))
    # a bisector of unit length, as long as both projections on it
    check(methods.ConFIG(), (1 + ratio) / 2, (1 + ratio) / 2 / ratio)
    check(methods.NashMTL(), (1 + cosine) ** -0.5, (1 + cosine) ** -0.5 / ratio)
    if cosine >= 0:
        check(methods.DualProj(), 0.5, 0.5)
        check(methods.UPGrad(), 0.5, 0.5)
    if ratio == 1:  # by symmetry
        check(methods.CAGrad(0.5), 0.75, 0.75)
        check(methods.FairGrad(2.0), *[(1 + cosine) ** (-2 / 3)] * 2)
        # (K/2 + eps) v = 0 in the second row where the first task's projection is bounded below by its own 1
        v = -min(cosine, 0.0) / (1 + 2e-8)
        np.testing.assert_allclose(methods.UPGrad(1e-8).weights(m).numpy(), [(1 + v) / 2] * 2, rtol=1e-6)
    d = methods.CAGrad(0.5).weights(m).numpy() - 0.5
    assert np.sqrt(d @ m.numpy() @ d) == pytest.approx(0.5 * g0, rel=1e-6)


# --- TorchJD


GRAMIAN = {  # name -> arguments
    "AlignedMTL": {},
    "CAGrad": {"c": 0.5},
    "Constant": {"weights": torch.tensor([0.2, 0.3, 0.5])},
    "DualProj": {},
    "FairGrad": {"alpha": 2.0},
    "GradVac": {},
    "IMTLG": {},
    "Krum": {"n_byzantine": 0},
    "MGDA": {},
    "Mean": {},
    "PCD": {},
    "PCGrad": {},
    "Random": {},
    "Sum": {},
    "UPGrad": {},
}


def weighting(name: str) -> nn.Module:
    jd = pytest.importorskip("torchjd.aggregation")
    if not hasattr(jd, f"{name}Weighting"):
        pytest.skip(f"this torchjd has no {name}Weighting")
    try:
        return getattr(jd, f"{name}Weighting")(**GRAMIAN[name])
    except ImportError as error:  # its optional solvers
        pytest.skip(str(error))


@pytest.mark.parametrize("name", GRAMIAN)
@pytest.mark.parametrize("absent", [False, True])
def test_weightings_of_torchjd_are_methods(name: str, absent: bool) -> None:
    method = weighting(name)
    if absent and name in ("Constant", "Krum"):
        pytest.skip("asks for three tasks")
    data = torch.randn(3, 4, 6)
    trunk, target = nn.Linear(6, 5), torch.randn(3, 4, 5)

    def losses() -> list[torch.Tensor | None]:
        found = [(trunk(x) - y).square().mean() for x, y in zip(data, target, strict=True)]
        return [found[0], None, found[1]] if absent else found

    rows = [torch.autograd.grad(loss, tuple(trunk.parameters())) for loss in losses() if loss is not None]
    flat = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    torch.manual_seed(1)
    w = weighting(name)(flat @ flat.T)
    torch.manual_seed(1)
    surgery = fastmtl.backward(losses(), trunk, method=method)
    found = torch.cat([p.grad.flatten() for p in trunk.parameters()])
    torch.testing.assert_close(found, w @ flat, rtol=1e-4, atol=1e-5)
    if absent:
        assert surgery.weights[1] == 0
    assert torch.isfinite(surgery.weights).all() and surgery.weights.any()


PARITY = {
    "AlignedMTL": methods.AlignedMTL(),
    "DualProj": methods.DualProj(),
    "FairGrad": methods.FairGrad(2.0),
    "IMTLG": methods.IMTLG(),
    "UPGrad": methods.UPGrad(),
}


@pytest.mark.parametrize("name", PARITY)
@pytest.mark.parametrize("kind", ["random", "duplicates", "opposite", "zero row", "low rank"])
@pytest.mark.parametrize("num_tasks", [1, 2, 6])
def test_parity_with_torchjd(name: str, kind: str, num_tasks: int, backend: Backend) -> None:
    g = gradients(kind, num_tasks) / 50
    if name == "FairGrad" and (kind in ("opposite", "low rank", "zero row")) and num_tasks > 1:
        pytest.skip("the equation has no solution, or a task is no party here")
    if not g.any() or (name == "IMTLG" and kind in ("opposite", "low rank") and num_tasks > 1):
        pytest.skip("no equal projections: theirs are least squares of the gradients, ours of their directions")
    expected = weighting(name)(torch.from_numpy(g @ g.T)).numpy()
    assert np.abs(solved(PARITY[name], g) @ g - expected @ g).max() < 2e-4 * max(
        lengths(g).max(), np.abs(expected @ g).max()
    )
