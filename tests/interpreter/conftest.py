"""Makes Triton's interpreter run loops with bounds that are not constants, under numpy 2.4 and later too."""

from __future__ import annotations

import os
from typing import Any

if os.environ.get("TRITON_INTERPRET", "0") == "1":
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def _patch_with_index(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        # Triton 3.6 calls int() on an array of one element, which numpy 2.4 refuses
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = _patch_with_index
