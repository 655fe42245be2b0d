"""Products of tensors as equations of letters, as `torch.einsum` takes them."""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmtl.task_gradients.one_pass.tensors import nested
from fastmtl.task_gradients.one_pass.torch_call import TorchCall


class Equation(NamedTuple):
    """A product, summed over the letters that its result lacks. Dimensions of size 1 broadcast.

    Attributes:
        terms: for each operand a letter for each of its dimensions.
        result: the letters of the result.
    """

    terms: tuple[str, ...]
    result: str

    def __str__(self) -> str:
        return f"{','.join(self.terms)}->{self.result}"


def equation_of(call: TorchCall) -> tuple[Equation, list[Tensor]] | None:
    """The equation of a call, and its operands without what is added to the product; None: it is no product."""
    name, args = call.name, call.args
    if name in ("matmul", "rmatmul"):
        a, b = call.factors()
        return _of_matmul(a.dim(), b.dim()), [a, b]
    if name == "einsum":
        return _of_einsum(args[0], nested(args[1:]))
    if name == "linear":
        x, w = call.argument(0, "input"), call.argument(1, "weight")
        letters = _free(x.dim() + 1)
        out = letters[-1] if w.dim() == 2 else ""
        return Equation((letters[:-1], out + letters[-2]), letters[:-2] + out), [x, w]
    if name == "bilinear":
        x, y, w = (call.argument(k, n) for k, n in enumerate(("input1", "input2", "weight")))
        *batch, i, j, out = _free(x.dim() + 2)
        before = "".join(batch)
        return Equation((before + i, before + j, out + i + j), before + out), [x, y, w]
    if name in ("outer", "ger"):
        return Equation(("a", "b"), "ab"), [args[0], args[1] if len(args) > 1 else nested(call.kwargs)[-1]]
    if name == "inner":
        a, b = args[0], call.argument(1, "other")
        return _contracted(a, b, [a.dim() - 1], [b.dim() - 1]) if a.dim() and b.dim() else None
    if name == "tensordot":
        a, b, dims = args[0], call.argument(1, "b"), call.argument(2, "dims", 2)
        if isinstance(dims, Tensor):
            dims = dims.tolist()
        if isinstance(dims, int):
            return _contracted(a, b, list(range(a.dim() - dims, a.dim())), list(range(dims)))
        left, right = ([d] if isinstance(d, int) else d for d in dims)
        return _contracted(a, b, [d % a.dim() for d in left], [d % b.dim() for d in right])
    return None


def _free(count: int, taken: str = "") -> str:
    """Letters that are not taken."""
    return "".join(c for c in string.ascii_letters if c not in taken)[:count]


def _of_matmul(a: int, b: int) -> Equation:
    """`a @ b` of so many dimensions."""
    before = _free(max(a, b, 2) - 2, "ijk")

    def term(dims: int, matrix: str, vector: str) -> str:
        return before[len(before) - (dims - 2) :] + matrix if dims > 1 else vector

    return Equation((term(a, "ij", "j"), term(b, "jk", "j")), before + "i" * (a > 1) + "k" * (b > 1))


def _of_einsum(equation: Any, operands: Sequence[Tensor]) -> tuple[Equation, list[Tensor]] | None:
    if not isinstance(equation, str):
        return None
    equation = equation.replace(" ", "")
    left, arrow, result = equation.partition("->")
    terms = left.split(",")
    widths = [
        x.dim() - len(term.replace("...", "")) if "..." in term else 0 for term, x in zip(terms, operands, strict=True)
    ]
    every = _free(max(widths), equation)
    if not arrow:
        letters = left.replace(",", "").replace(".", "")
        result = "..." * ("." in left) + "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    terms = [term.replace("...", every[len(every) - width :]) for term, width in zip(terms, widths, strict=True)]
    return Equation(tuple(terms), result.replace("...", every)), list(operands)


def _contracted(a: Tensor, b: Tensor, left: Sequence[int], right: Sequence[int]) -> tuple[Equation, list[Tensor]]:
    """Summed over dimensions of a and of b, in pairs."""
    first = _free(a.dim())
    second = list(_free(b.dim(), first))
    for i, j in zip(left, right, strict=True):
        second[j] = first[i]
    result = [c for d, c in enumerate(first) if d not in left] + [c for d, c in enumerate(second) if d not in right]
    return Equation((first, "".join(second)), "".join(result)), [a, b]


def sizes_of_letters(equation: Equation, operands: Sequence[Tensor]) -> dict[str, int]:
    """How long the dimension of each letter is, after broadcasting."""
    sizes: dict[str, int] = {}
    for term, x in zip(equation.terms, operands, strict=True):
        for letter, size in zip(term, x.shape, strict=True):
            sizes[letter] = size if sizes.get(letter, 1) == 1 else sizes[letter]
    return sizes


def narrowed(term: str, x: Tensor, sizes: dict[str, int]) -> tuple[str, Tensor]:
    """Without the dimensions along which it is broadcast."""
    kept = [letter for letter, size in zip(term, x.shape, strict=True) if size == sizes[letter]]
    if len(kept) == x.dim():
        return term, x
    return "".join(kept), x.reshape([sizes[letter] for letter in kept])


def contracted(terms: Sequence[str], operands: Sequence[Tensor], kept: str) -> tuple[str, Tensor]:
    """The product of operands, summed over the letters that are not kept."""
    result = "".join(dict.fromkeys(c for term in terms for c in term if c in kept))
    if len(operands) == 1 and terms[0] == result:
        return result, operands[0]
    return result, torch.einsum(str(Equation(tuple(terms), result)), *operands)
