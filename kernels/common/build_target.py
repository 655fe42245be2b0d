"""What is compiled ahead of time: one kernel in one configuration, as Triton's compiler takes it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmtl.kernels.common.launches import Launch


class BuildTarget(NamedTuple):
    """One kernel in one configuration, as `triton.compiler.ASTSource` takes it."""

    name: str
    fn: Any  # the JITFunction
    signature: dict[str, str]
    constexprs: dict[str, Any]
    attrs: dict[tuple[int], list[list[Any]]]
    num_warps: int
    num_stages: int
    dtype: torch.dtype
    representative: bool  # the one of its kernel and dtype that every test run compiles
    expects_mma: bool
    expects_loads16: bool  # of 16 bytes a thread
    max_registers: int | None = None
    expects_wgmma: bool = False  # on sm_90: products of a warp group in place of those of a warp
    archs: tuple[int, ...] = (80, 90)


_TYPE_NAMES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int64: "i64",
    torch.int32: "i32",
}


def as_target(
    name: str, made: Launch, dtype: torch.dtype, representative: bool, mma: bool, loads16: bool
) -> BuildTarget:
    """The launch as Triton would specialise it: ones become constants, multiples of 16 are marked."""
    signature: dict[str, str] = {}
    constexprs: dict[str, Any] = {}
    attrs: dict[tuple[int], list[list[Any]]] = {}
    for position, param in enumerate(made.fn.params):
        value = made.arguments[param.name]
        fixed = param.is_constexpr or value is None or (not isinstance(value, Tensor) and value == 1)
        if fixed and (param.is_constexpr or not param.do_not_specialize or value is None):
            signature[param.name] = "constexpr"
            constexprs[param.name] = value
            continue
        if isinstance(value, Tensor):
            signature[param.name] = f"*{_TYPE_NAMES[value.dtype]}"
            divisible = value.data_ptr() % 16 == 0
        else:
            number = "fp32" if isinstance(value, float) else "i32" if -(2**31) <= value < 2**31 else "i64"
            signature[param.name] = param.annotation_type or number
            divisible = isinstance(value, int) and value % 16 == 0
        if divisible and not param.do_not_specialize:
            attrs[(position,)] = [["tt.divisibility", 16]]
    return BuildTarget(
        name, made.fn, signature, constexprs, attrs, made.num_warps, made.num_stages, dtype, representative, mma,
        loads16, made.max_registers,
    )  # fmt: skip
