"""Mends Triton's interpreter where it fails on kernels that Triton compiles; each mend knows the releases it is for."""

from __future__ import annotations

from typing import Any

import numpy as np


def mend_interpreter() -> None:
    """To be called before the first kernel runs."""
    from triton.runtime import interpreter

    _loop_bounds(interpreter)
    _splat_of_bool(interpreter)


def _loop_bounds(interpreter: Any) -> None:
    # Triton 3.6 calls int() on an array of one element for a bound that is not constant, which numpy 2.4 refuses
    patch_tensor = getattr(interpreter, "_patch_lang_tensor", None)
    if patch_tensor is None:
        return

    def with_index(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = with_index


def _splat_of_bool(interpreter: Any) -> None:
    # Triton 3.9 makes int32 of a scalar bool that is spread over a block, and then refuses it as a mask
    builder = interpreter.InterpreterBuilder
    create_splat = builder.create_splat

    def keeps_bool(self: Any, *args: Any) -> Any:
        made = create_splat(self, *args)
        if any(isinstance(x, interpreter.TensorHandle) and x.data.dtype == np.bool_ for x in args):
            made.data = made.data.astype(np.bool_)
        return made

    builder.create_splat = keeps_bool
