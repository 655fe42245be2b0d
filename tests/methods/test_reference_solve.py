"""What the plain-torch solvers make of matrices without an inverse."""

from __future__ import annotations

import torch

from fastmtl.ops.gradients import reference_methods


def test_the_reference_solves_what_has_no_inverse() -> None:
    """As the compiled solvers it raises nothing: the shortest solution, or NaN for what is not finite."""
    a = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
    b = torch.tensor([1.0, -1.0], dtype=torch.float64)
    torch.testing.assert_close(reference_methods._solve(a, b), b / 2)
    assert reference_methods._solve(a * torch.nan, b).isnan().all()
