"""Gradients that depend on each other exactly: what rounding leaves of an eigenvalue of zero is no direction."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import Backend

from fastmtl import methods, ops
from fastmtl.ops.gradients import reference_methods

KINDS = ("opposite pairs", "one opposite pair", "duplicates", "multiples", "sums", "few dimensions")


def coefficients(kind: str, num_tasks: int) -> np.ndarray:
    """`[T, rank]` whole numbers: what each gradient is of `rank` independent ones."""
    r = np.random.default_rng([KINDS.index(kind), num_tasks])
    half = (num_tasks + 1) // 2
    rank = half if kind in ("opposite pairs", "duplicates", "multiples") else num_tasks - 1
    c = np.eye(num_tasks, max(rank, 1))
    if kind == "few dimensions":
        return r.integers(-3, 4, (num_tasks, max(1, num_tasks // 3))).astype(float)
    if kind == "sums":
        c[-1] = r.integers(-2, 3, c.shape[1])
    if kind == "one opposite pair" and num_tasks > 1:
        c[-1] = -c[0]
    for t in range(half, num_tasks):
        if kind in ("opposite pairs", "duplicates", "multiples"):
            c[t] = c[t - half] * {"opposite pairs": -1, "duplicates": 1, "multiples": r.choice([-4, -2, 2, 3])}[kind]
    return c


def aligned(g: np.ndarray, rank: int, scale: str, preferences: np.ndarray) -> np.ndarray:
    """The update, from the singular values of the gradients, `rank` of which are not zero."""
    left, sigma, right = np.linalg.svd(g, full_matrices=False)
    left, values, right = left[:, :rank], sigma[:rank] ** 2, right[:rank]
    to = {"min": values.min(), "median": np.sort(values)[(rank - 1) // 2], "rmse": values.mean()}[scale]
    return np.sqrt(to) * (preferences @ left) @ right


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_tasks", [2, 3, 4, 8, 16, 33, 64, 128])
@pytest.mark.parametrize("scale", ["min", "median", "rmse"])
def test_alignedmtl_has_the_rank_of_the_gradients(kind: str, num_tasks: int, scale: str, backend: Backend) -> None:
    c = coefficients(kind, num_tasks)
    rank = int(np.linalg.matrix_rank(c))
    r = np.random.default_rng(num_tasks)
    for columns in (num_tasks + 3, 3 * num_tasks + 40):
        g = c @ r.standard_normal((c.shape[1], columns))
        order, preferences = r.permutation(num_tasks), r.uniform(0.1, 1.0, num_tasks)
        for given in (None, preferences):
            numbers = np.full(num_tasks, 1 / num_tasks) if given is None else given
            expected = aligned(g, rank, scale, numbers)
            size = numbers.sum() * np.linalg.norm(g, axis=1).max()
            for factor in (1.0, 1e-12, 1e12):
                h = factor * g[order]
                method = methods.AlignedMTL(scale, preferences=None if given is None else numbers[order].tolist())
                w = method.weights(torch.from_numpy(h @ h.T)).numpy()
                assert np.linalg.norm(w @ g[order] - expected) < 1e-9 * size
                if given is None and kind == "opposite pairs" and num_tasks % 2 == 0:
                    assert not w.any()  # the sum of all is zero, and no direction is made of rounding


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_tasks", [2, 3, 5, 8])
def test_gradients_whose_entries_are_all_alike(num_tasks: int, dtype: torch.dtype, backend: Backend) -> None:
    """All products of an entry of the Gram matrix are rounded to the same side, more than at random."""
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        entry = 2 * torch.rand(num_tasks, 1, dtype=dtype, generator=generator) + 0.1
        entry[1:] *= torch.randn(num_tasks - 1, 1, dtype=dtype, generator=generator).sign()
        g = entry.expand(num_tasks, 1000).contiguous()
        m = ops.gram(g)
        eps = torch.finfo(dtype).eps
        lengths = g.double().norm(dim=1)
        unit = lengths * entry[:, 0].sign() / lengths.norm()
        w = methods.AlignedMTL().weights(m)
        torch.testing.assert_close(w, unit * unit.mean(), rtol=0, atol=100 * eps)
        # the cosines have but one direction, too: that of the signs
        signs = entry[:, 0].sign().double()
        preferences = torch.rand(num_tasks, dtype=torch.float64, generator=generator)
        w = methods.ConFIG(preferences=preferences).weights(m)
        expected = lengths @ signs / num_tasks * signs
        torch.testing.assert_close(w * lengths, expected, rtol=0, atol=100 * eps * lengths.sum().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_alignedmtl_keeps_a_short_gradient_of_its_own(dtype: torch.dtype, backend: Backend) -> None:
    """Its entries are as exact as those of the long ones: only a sum of long ones can be made of rounding."""
    eps = torch.finfo(dtype).eps
    short = 2 * (3 * eps) ** 0.5  # its square is 12 roundings of the largest
    g = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, short]], dtype=dtype)
    w = methods.AlignedMTL().weights(ops.gram(g))
    torch.testing.assert_close(w * 3, torch.tensor([short, short, 1.0], dtype=torch.float64), rtol=1e-6, atol=0)


def test_the_reference_solves_what_has_no_inverse() -> None:
    """As the compiled solvers it raises nothing: the shortest solution, or NaN for what is not finite."""
    a = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
    b = torch.tensor([1.0, -1.0], dtype=torch.float64)
    torch.testing.assert_close(reference_methods._solve(a, b), b / 2)
    assert reference_methods._solve(a * torch.nan, b).isnan().all()
