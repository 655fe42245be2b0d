"""Makes Triton's interpreter run loops with bounds that are not constants, under numpy 2.4 and later too.

Triton 3.6 calls int() on an array of one element, which numpy 2.4 refuses; later releases may not need it.
"""

from __future__ import annotations

from typing import Any


def mend_interpreter() -> None:
    from triton.runtime import interpreter

    patch_tensor = getattr(interpreter, "_patch_lang_tensor", None)
    if patch_tensor is None:
        return

    def with_index(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = with_index
