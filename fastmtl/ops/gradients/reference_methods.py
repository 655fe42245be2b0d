"""Oracle of `method_weights`: each method by its defining equation, in plain PyTorch and float64, on the host."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

EPS = torch.finfo(torch.float64).eps
# of an entry of a Gram matrix, at most: see csrc/common/solvers/team.h
ENTRY_ROUNDINGS = 32


class _Problem(NamedTuple):
    """n present tasks: their Gram matrix over its largest entry of the diagonal, `scale`; its rounding; preferences;
    numbers by task, if any; which tasks they are of all."""

    m: Tensor
    scale: float
    rounding: float
    preferences: Tensor
    per_task: Tensor | None
    tasks: Tensor

    @property
    def lengths(self) -> Tensor:
        """`[n]`, 1 for a zero gradient."""
        square = self.m.diagonal()
        return torch.where(square > 0, square, 1.0).sqrt()

    @property
    def has_gradient(self) -> Tensor:
        return self.m.diagonal() > 0

    @property
    def cosines(self) -> Tensor:
        """`[n, n]`, with rows of zeros for zero gradients."""
        c = self.m / self.lengths[:, None] / self.lengths
        return c - torch.diag(c.diagonal()) + torch.diag(self.has_gradient.to(c.dtype))


def _solve(a: Tensor, b: Tensor) -> Tensor:
    """`a^-1 b`; of a matrix that rounding leaves without an inverse, the shortest solution of least squares."""
    found, info = torch.linalg.solve_ex(a, b)
    return torch.linalg.pinv(a) @ b if bool(info != 0) and bool(a.isfinite().all()) else found


def method_weights(
    gram: Tensor,
    method: str,
    options: Sequence[float],
    present: Tensor | None = None,
    preferences: Tensor | None = None,
    per_task: Tensor | None = None,
) -> Tensor:
    """The weights `[T]` float64 of a method, 0 for absent tasks: see `fastmtl.ops.method_weights`."""
    here = torch.arange(gram.shape[0]) if present is None else present.cpu().nonzero()[:, 0]
    m = gram.detach().cpu().to(torch.float64)[here][:, here]
    out = torch.zeros(gram.shape[0], dtype=torch.float64)
    n = len(here)
    if n > 0 and not bool(torch.isfinite(m).all()):
        out[here] = torch.nan
    elif n > 0:
        share = 1.0 if method == "alignedmtl" and options[1] == 1 else 1.0 / n
        given = torch.full((n,), share, dtype=torch.float64)
        if preferences is not None:
            given = preferences.detach().cpu().to(torch.float64)[here]
        numbers = None if per_task is None else per_task.detach().cpu().to(torch.float64)[here]
        scale = m.diagonal().max().item()
        if scale > 0 or method in ("sdmgrad", "modo"):
            scaled = m / (scale if scale > 0 else 1.0)
            problem = _Problem(scaled, scale, torch.finfo(gram.dtype).eps, given, numbers, here)
            out[here] = _METHODS[method](problem, *options)
        elif method in ("mgda", "cagrad", "upgrad", "dualproj"):
            out[here] = given
    return out.to(gram.device)


def method_step(
    gram: Tensor,
    method: str,
    options: Sequence[float],
    kept: Tensor | None = None,
    counted: Tensor | None = None,
    average: Tensor | None = None,
    momentum: float = 0.0,
    present: Tensor | None = None,
    preferences: Tensor | None = None,
    per_task: Tensor | None = None,
    also: Tensor | None = None,
    vectors: Tensor | None = None,
) -> Tensor:
    """The weights `[T]` of a method that changes what it keeps: see `fastmtl.ops.gradients.method_step`."""
    here = torch.ones(gram.shape[0], dtype=torch.bool, device=gram.device) if present is None else present
    if method == "given":
        assert preferences is not None
        w = torch.where(gram[here][:, here].isfinite().all(), preferences, torch.nan)
    elif method == "pcd" and kept is not None and counted is not None:
        w = _pcd_step(gram, options, kept, counted, here, per_task)
    elif method == "paretomtl":
        assert kept is not None and counted is not None and per_task is not None and vectors is not None
        w = _pareto_step(gram, options, kept, counted, here, per_task, vectors)
    elif kept is not None:
        w = _descent_step(gram, method, options, kept, here, preferences, also)
    else:
        w = method_weights(gram, method, options, here, preferences, per_task)
    if average is not None:
        w = torch.where(average.isnan(), w, momentum * average + (1 - momentum) * w)
        average.copy_(torch.where(here & w[here].isfinite().all(), w, average))
    return torch.where(here, w, 0.0)


def _pcd_step(
    gram: Tensor, options: Sequence[float], kept: Tensor, counted: Tensor, here: Tensor, per_task: Tensor | None
) -> Tensor:
    beta, eps = options[2:]
    square = gram.diagonal().to(torch.float64)
    average, count = beta * kept + (1 - beta) * square, beta * counted + (1 - beta)
    w = method_weights(gram, "pcd", options[:2], here, (average / count + eps).rsqrt(), per_task)
    moves = here & gram[here][:, here].isfinite().all()
    kept.copy_(torch.where(moves, average, kept))
    counted.copy_(torch.where(moves, count, counted))
    return w


def _descent_step(
    gram: Tensor,
    method: str,
    options: Sequence[float],
    kept: Tensor,
    here: Tensor,
    preferences: Tensor | None,
    also: Tensor | None,
) -> Tensor:
    w = method_weights(gram, method, options, here, preferences, kept)
    if also is not None and not bool(also[here][:, here].isfinite().all()):
        w = torch.where(here, torch.nan, w)
    kept.copy_(torch.where(here & w.isfinite().all(), w, kept))
    if method == "modo":
        return w
    shares = here.to(torch.float64) if preferences is None else preferences.to(torch.float64) * here
    shares = shares if shares.sum() > 0 else here.to(torch.float64)
    return (w + options[3] * shares / shares.sum()) / (1 + options[3])


def _pareto_step(
    gram: Tensor,
    options: Sequence[float],
    kept: Tensor,
    counted: Tensor,
    here: Tensor,
    losses: Tensor,
    vectors: Tensor,
) -> Tensor:
    index, most_start_steps = options
    num_tasks = gram.shape[0]
    # the task gradients, and those of the constraints, (u_j - u_k) . L > 0 being a violation
    rows = torch.cat([torch.eye(num_tasks, dtype=vectors.dtype).to(vectors.device), vectors - vectors[int(index)]])
    rows, losses = torch.where(here, rows, 0.0), torch.where(here, losses, 0.0)
    m = torch.where(here[:, None] & here, gram.to(torch.float64), 0.0)
    active = rows[num_tasks:] @ losses > 0
    started = (kept > 0) | ~active.any() | (counted >= most_start_steps)
    w = method_weights(rows @ m @ rows.mT, "mgda", [], torch.cat([started & here, active])) @ rows
    if not bool(m.isfinite().all() & losses.isfinite().all()):
        return torch.where(here, torch.nan, w)
    if not bool(here.any()):
        return w
    counted.add_(~started)
    kept.copy_(started)
    return w


def _solve_with_bounds(m: Tensor, q: Tensor) -> Tensor:
    """The y >= 0 that minimises `y . M y / 2 + q . y`, for a positive definite M.

    Lawson and Hanson 1974, in coordinates in which M has a diagonal of ones.
    """
    unit = m.diagonal().sqrt()
    m, q = m / unit[:, None] / unit, q / unit
    y = torch.zeros_like(q)
    free = torch.zeros_like(q, dtype=torch.bool)
    for _ in range(10 * len(q) + 10):
        slope = m @ y + q
        helps = ~free & (slope < -1e-14 * (m.abs() @ y + q.abs()))
        if not bool(helps.any()):
            break
        newest = torch.where(helps, slope, torch.inf).argmin()
        free[newest] = True
        while bool(free.any()):
            chosen = free.nonzero()[:, 0]
            goal = torch.zeros_like(y)
            goal[chosen] = _solve(m[chosen][:, chosen], -q[chosen])
            negative = free & (goal <= 0)
            if not bool(negative.any()):
                y = goal
                break
            steps = torch.where(negative, y / torch.where(negative, y - goal, 1.0), torch.inf)
            step = steps.min()
            y = torch.where(free, (1 - step) * y + step * goal, 0.0).clamp(min=0)
            leaves = steps.argmin()
            y[leaves], free[leaves] = 0.0, False
        if not bool(free[newest]):  # rounding let it seem to help
            break
    return y / unit


def _shortest(m: Tensor) -> Tensor:
    """The w >= 0 of sum 1 that minimises `w . M w`.

    Of all y = t w, `y . M y / 2 + s (sum(y) - 1)^2 / 2` is least for that w, whatever s > 0.
    """
    square = m.diagonal()
    if bool((square <= 0).any()):
        return torch.nn.functional.one_hot(square.argmin(), len(square)).to(m.dtype)
    s = square.min()
    y = _solve_with_bounds(m + s, -s.expand(len(square)).clone())
    return y / y.sum()


def _mgda(p: _Problem) -> Tensor:
    return _shortest(p.m)


def _cagrad(p: _Problem, c: float) -> Tensor:
    n = len(p.m)
    mean = torch.full((n,), 1.0 / n, dtype=torch.float64)
    dots, square = p.m.mean(1), p.m.mean().item()  # of each gradient with the mean one
    if c == 0 or square <= n * p.rounding * p.m.abs().mean().item():
        return mean
    reach, noise = c * math.sqrt(square), max(n * p.rounding, 1e-12)

    def weights(tau: float) -> Tensor:
        return _shortest(p.m + tau * (dots[:, None] + dots) + tau**2 * square)

    def excess(log_tau: float) -> float:
        w = weights(math.exp(log_tau))
        squared = max((w @ p.m @ w).item(), noise * (w @ p.m.abs() @ w).item())
        return 0.5 * math.log(max(squared, 1e-300)) - math.log(reach) - log_tau

    high = -math.log(reach)
    w = _shortest(p.m)
    least = noise * (w @ p.m.abs() @ w).item()
    shortest = (w @ p.m @ w).item()
    low = 0.5 * math.log(max(shortest, least, 1e-300)) - math.log(reach)
    if shortest <= least:  # no direction serves all tasks: any tau that is small enough will do
        low += math.log(max(c, 1.0))
    low = max(low, high - 40)
    for _ in range(60):  # bisection: below the root |g_w| is the larger one
        middle = 0.5 * (low + high)
        low, high = (middle, high) if excess(middle) > 0 else (low, middle)
    tau = math.exp(low)
    return torch.where(p.has_gradient, mean + weights(tau) / tau, mean)


def _pseudo_solve(c: Tensor, b: Tensor, rounding: float) -> Tensor:
    """`C^+ b`: eigenvalues that rounding may have made count as zero, and so do such parts of b."""
    values, vectors = torch.linalg.eigh(c)
    n, along = len(b), vectors.mT @ b
    # eigenvectors turn with the rounding of the matrix, and have some of their own
    none = max(4 * n, ENTRY_ROUNDINGS) * max(rounding, 4 * EPS) * b.norm()
    there = (values > max(n, ENTRY_ROUNDINGS) * rounding * values.max()) & (along.abs() > none)
    return vectors @ torch.where(there, along / torch.where(there, values, 1.0), 0.0)


def _imtlg(p: _Problem) -> Tensor:
    v = _pseudo_solve(p.cosines, p.has_gradient.to(torch.float64), p.rounding) / p.lengths
    v = torch.where(p.has_gradient, v, 0.0)
    return v / v.sum() if v.sum().abs() > 1e-12 * v.abs().sum() else torch.zeros_like(v)


def _config(p: _Problem) -> Tensor:
    w = torch.where(p.has_gradient, _pseudo_solve(p.cosines, p.preferences, p.rounding), 0.0)
    direction = p.cosines @ w  # the dot products of unit gradients with the direction, which is |u| long
    square = w @ direction
    if not bool(square > 0):
        return torch.zeros_like(w)
    return (p.lengths @ direction) / square * w / p.lengths


def _fair(p: _Problem, power: float) -> Tensor:
    """The a > 0 with `K a = a^-power`, for the matrix over its scale: Newton's method in z = |g| a."""
    m = p.cosines
    m = m - torch.diag(m.diagonal()) + torch.eye(len(m), dtype=m.dtype) * (1 + len(m) * p.rounding)
    u = p.lengths

    def target(z: Tensor) -> Tensor:
        return (u / z) ** power / u

    alone = u ** ((power - 1) / (power + 1))  # where all are orthogonal; best along that ray
    square = (alone @ m @ alone).item()
    z = alone * ((alone * target(alone)).sum() / square) ** (1 / (1 + power)) if square > 0 else alone
    last = math.inf
    for iteration in range(200):
        wanted = target(z)
        step = _solve(m + torch.diag((power * wanted / z).clamp(max=1e300)), wanted - m @ z) / z
        # far from its solution an entry jumps to where it would meet its own equation, M z being as it is
        far = step.abs() > 3 if iteration < 50 else torch.zeros_like(step, dtype=torch.bool)
        # a solution may have entries that no float64 holds: at the least there is they stay
        held = (z <= 1e-280) & (step < 0)
        falls = torch.where(far | held, 0.0, -step).max().item()
        length = min(-math.expm1(-math.log1p(power * falls) / power), 0.99) / falls if falls > 0 else 1.0
        jumped = torch.exp((-(1 - power * step).clamp(min=1e-300).log() / power).clamp(max=600)) * z
        stepped = z + length * step * z
        up = torch.maximum(stepped, torch.minimum(jumped, alone))
        moves = torch.where(held, 0.0, step.abs()).max().item()
        z = torch.where(held, z, torch.where(far, torch.where(step < 0, jumped.clamp(min=1e-280), up), stepped))
        if moves < 1e-14 or (moves < 1e-6 and moves > 0.5 * last):
            break
        last = moves
    return z / p.lengths


def _nashmtl(p: _Problem, max_norm: float) -> Tensor:
    a = torch.where(p.has_gradient, _fair(p, 1.0), 0.0) * p.scale**-0.5
    norm = (a @ p.m @ a).clamp(min=0).sqrt().item() * p.scale**0.5
    return a * (max_norm / norm) if 0 < max_norm < norm else a


def _fairgrad(p: _Problem, alpha: float) -> Tensor:
    return torch.where(p.has_gradient, _fair(p, 1 / alpha), 0.0) * p.scale ** (-alpha / (1 + alpha))


def _alignedmtl(p: _Problem, scale: float, reduction: float) -> Tensor:
    values, vectors = torch.linalg.eigh(p.m)
    # no more than entries of these lengths may be off by: a short gradient that is none of the others' is more
    sizes = (vectors.mT.abs() @ torch.where(p.has_gradient, p.lengths, 0.0)).square()
    none = torch.maximum(len(values) * values.max(), ENTRY_ROUNDINGS * sizes.clamp(max=values.max()))
    there = values > p.rounding * none
    kept = values[there]
    to = (kept.min(), kept.median(), kept.mean())[int(scale)]
    factors = torch.where(there, (to / torch.where(there, values, 1.0)).sqrt(), 0.0)
    along = vectors.mT @ p.preferences
    # what rounding of the eigenvectors makes of preferences that are across one
    across = along.abs() <= 16 * len(values) * EPS * p.preferences.norm()
    return vectors @ torch.where(across, 0.0, factors * along)


def _regularised(p: _Problem, reg_eps: float) -> Tensor:
    return p.m / p.m.trace() + reg_eps * torch.eye(len(p.m), dtype=p.m.dtype)


def _dualproj(p: _Problem, reg_eps: float) -> Tensor:
    m = _regularised(p, reg_eps)
    return p.preferences + _solve_with_bounds(m, m @ p.preferences)


def _upgrad(p: _Problem, reg_eps: float) -> Tensor:
    m = _regularised(p, reg_eps)
    rows = [u + _solve_with_bounds(m, m @ u) for u in torch.diag(p.preferences)]
    return torch.stack(rows).sum(0)


def _krum(p: _Problem, byzantine: float, selected: float, squared: float) -> Tensor:
    n, square = len(p.m), p.m.diagonal()
    distances = (square[:, None] + square - 2 * p.m).clamp(min=0)
    distances = distances if squared == 1 else distances.sqrt()
    others = torch.eye(n) == 0
    nearest = min(max(n - int(byzantine) - 2, 1), n - 1)
    scores = torch.stack(
        [row[other].sort().values[:nearest].sum() for row, other in zip(distances, others, strict=True)]
    )
    count = min(int(selected), n)
    w = torch.zeros_like(scores)
    w[scores.argsort(stable=True)[:count]] = 1 / count
    return w


def _least_multipliers(c: Tensor, h: Tensor, dependent: float) -> Tensor | None:
    """The y >= 0 that minimises `y . C y / 2 - h . y`; None: it falls without end.

    Goldfarb and Idnani 1983: the constraint `C y >= h` that is violated most is brought to equality, while the active
    ones stay at it; one whose y comes to zero on the way is let go.
    """
    y, active = torch.zeros_like(h), []

    def across(i: int) -> tuple[float, Tensor]:
        """The squared part of vector i across the active ones, and how it is made of these."""
        rates = _solve(c[active][:, active], c[active, i])
        return (c[i, i] - c[i, active] @ rates).item(), rates

    for _ in range(20 * len(h) + 20):
        violation, size = h - c @ y, (h.abs().amax() + y.sum()).item() if len(h) else 0.0
        found = [(-violation[i].item(), i) for i in range(len(h)) if i not in active and violation[i] > 1e-12 * size]
        found = [(v, i) for v, i in found if -v > dependent * size or across(i)[0] > dependent]
        if not found:
            break
        entering = min(found)[1]
        while entering not in active:
            part, rates = across(entering)
            left = (h - c @ y)[entering].item()
            whole = left / part if part > 0 else torch.inf
            steps = torch.where(rates > 0, y[active] / torch.where(rates > 0, rates, 1.0), torch.inf)
            step = min([whole, *steps.tolist()])
            if step == whole and part <= dependent:
                return None
            y[active] = (y[active] - step * rates).clamp(min=0)
            y[entering] += step
            if step == whole:
                active.append(entering)
            else:
                y[active.pop(int(steps.argmin()))] = 0.0
    y[active] = _solve(c[active][:, active], h[active]).clamp(min=0)
    return y


def _pcd(p: _Problem, primary: float, tau: float) -> Tensor:
    n, w = len(p.m), torch.zeros(len(p.m), dtype=torch.float64)
    first = int((p.tasks == primary).to(torch.int64).argmax())  # the first place, if it is absent
    if not bool(p.has_gradient[first]):
        return w
    others = (p.has_gradient & (torch.arange(n) != first)).nonzero()[:, 0]
    c = p.cosines[others][:, others]
    # in units of the length of the first gradient
    relative = p.lengths[others] / p.lengths[first]
    taus = torch.full_like(relative, tau) if p.per_task is None else p.per_task[others]
    h = taus * p.preferences[others] / p.preferences[first] * relative - p.cosines[others, first]
    if not bool(h.isfinite().all()):
        return torch.full_like(w, torch.nan)
    y = _least_multipliers(c, h, max(n * p.rounding, 1e-9))
    w[first] = 1.0
    if y is None:
        return w
    square = (1 + 2 * y @ p.cosines[others, first] + y @ c @ y).item()
    w[others] = y / relative
    return w / math.sqrt(square) if square > n * p.rounding * float((1 + y.sum()) ** 2) else 0 * w


def _on_simplex(v: Tensor) -> Tensor:
    """The nearest point of the simplex; NaN where an entry is not finite."""
    if not bool(v.isfinite().all()):
        return torch.full_like(v, torch.nan)
    v = v - v.max()
    falling = v.sort(descending=True).values
    excess = (falling.cumsum(0) - 1) / torch.arange(1, len(v) + 1)
    return (v - excess[falling > excess][-1]).clamp(min=0)


def _start(p: _Problem) -> Tensor:
    """The weights that a descent starts from; NaN: an equal share."""
    even = torch.full_like(p.preferences, 1 / len(p.m))
    return even if p.per_task is None else torch.where(p.per_task.isnan(), even, p.per_task)


def _modo(p: _Problem, gamma: float, rho: float) -> Tensor:
    w = _start(p)
    m = p.m * (p.scale if p.scale > 0 else 1.0)
    return _on_simplex(w - gamma * (m @ w + rho * w))


def _sdmgrad(p: _Problem, lr: float, momentum: float, steps: float, lambda_: float) -> Tensor:
    size = p.m.diagonal().clamp(min=0).sqrt().mean()
    m = p.m / size**2
    shares = p.preferences if p.preferences.sum() > 0 else torch.ones_like(p.preferences)
    wanted = lambda_ * shares / shares.sum()
    w = _on_simplex(_start(p))
    moving = torch.zeros_like(w)
    for _ in range(int(steps) if size > 0 else 0):
        moving = momentum * moving + m @ (w + wanted)
        w = _on_simplex(w - lr * moving)
    return w


_METHODS: dict[str, Callable[..., Tensor]] = {
    "mgda": _mgda,
    "cagrad": _cagrad,
    "imtlg": _imtlg,
    "config": _config,
    "nashmtl": _nashmtl,
    "fairgrad": _fairgrad,
    "alignedmtl": _alignedmtl,
    "upgrad": _upgrad,
    "dualproj": _dualproj,
    "krum": _krum,
    "pcd": _pcd,
    "sdmgrad": _sdmgrad,
    "modo": _modo,
}
