"""Which implementation of an op runs: the compiled C++ (`cpu`), the compiled CUDA C++ (`cuda`), Triton
(`triton`), plain PyTorch (`reference`), or, for some layers on a GPU that was measured, torch's own operators
(`torch`), which nobody can force."""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.autograd import forward_ad

from fastmtl.core.tensors import PLAIN

BACKENDS = ("cpu", "cuda", "triton", "reference")

# the backends that an op prefers, best first, by type of device; the reference comes last, and serves all
# other devices.
_PREFERENCE: Mapping[str, tuple[str, ...]] = {
    "cpu": ("cpu",),
    "cuda": ("cuda", "triton"),
}


# where setup.py leaves a note of what it left out
BUILD_NOTE = Path(__file__).parents[1] / "_build.json"


def build_note(part: str) -> str | None:
    """Why setup.py left out `"extension"` or `"cuda"`; None if it did not, or left no note."""
    return json.loads(BUILD_NOTE.read_text()).get(part) if BUILD_NOTE.exists() else None


def _load_extension() -> tuple[Any, str | None]:
    try:
        return importlib.import_module("fastmtl._C"), None
    except ImportError as error:
        return None, build_note("extension") or f"{type(error).__name__}: {error}"


extension, extension_error = _load_extension()
_forced: list[str] = []
_warned = False


def build_info() -> dict[str, Any]:
    """What was compiled into the extension; an empty dict without one."""
    return dict(extension.build_info()) if extension is not None else {}


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}: expected one of {', '.join(BACKENDS)}, got {name!r}")
    return name


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Forces one backend for every fastmtl op called inside the `with` block, in this process.

    Args:
        name: `"cpu"`, `"cuda"`, `"triton"` or `"reference"`. The environment variable `FASTMTL_BACKEND`
            does the same for a whole run.

    Raises:
        ValueError: the name is not one of the above.
        RuntimeError: (from the op) the forced backend cannot serve the call; it never falls back.
    """
    _forced.append(_checked(name, "use_backend"))
    try:
        yield
    finally:
        _forced.pop()


def forced_backend() -> str | None:
    """The backend forced by `use_backend` or `FASTMTL_BACKEND`, or None."""
    if _forced:
        return _forced[-1]
    name = os.environ.get("FASTMTL_BACKEND")
    return _checked(name, "FASTMTL_BACKEND") if name else None


def unavailable(backend: str, device_type: str) -> str | None:
    """Why `backend` cannot serve tensors on `device_type` in this process; None if it can."""
    if backend in ("reference", "torch"):
        return None
    return _triton_unavailable(device_type) if backend == "triton" else _compiled_unavailable(backend, device_type)


@functools.cache
def _built_for_cuda(built: Any) -> bool:
    return bool(built.build_info().get("cuda_architectures"))


def _compiled_unavailable(backend: str, device_type: str) -> str | None:
    if extension is None:
        return f"no compiled extension ({extension_error})"
    if backend != device_type:
        return f"the {backend} backend takes {backend} tensors, got tensors on {device_type!r}"
    if backend == "cuda" and not _built_for_cuda(extension):
        return "the extension was built without CUDA (`fastmtl info` says why)"
    return None


def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter, and so on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def _triton_import_error() -> str | None:
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    return None


def _triton_unavailable(device_type: str) -> str | None:
    if _triton_import_error() is not None:
        return _triton_import_error()
    if device_type == "cuda" or (device_type == "cpu" and interpreting()):
        return None
    hint = " (on the CPU only in its interpreter: TRITON_INTERPRET=1)" if device_type == "cpu" else ""
    return f"the triton backend takes cuda tensors, got tensors on {device_type!r}{hint}"


def triton_kernels(module: str) -> Any:
    """A module of `kernels/`, imported when it is first used: it imports Triton."""
    return importlib.import_module(f"fastmtl.kernels.{module}")


def choose(
    op: str,
    device_type: str | None,
    implementations: Mapping[str, Callable[..., Any]],
    unsupported: Mapping[str, str | None] | None = None,
    order: Sequence[str] | None = None,
) -> Callable[..., Any]:
    """The implementation of `op` to run for tensors on `device_type`.

    Args:
        op, device_type: for errors, and for what is preferred. None: there is no tensor, so that nothing is computed,
            and plain torch makes the empty result whatever is forced.
        implementations: by backend.
        unsupported: backend -> why it cannot serve these arguments (None: it can).
        order: of the backends that are asked where none is forced, best first; None: that of all ops.

    Raises:
        RuntimeError: a forced backend has no kernel for this op, this device or these arguments.
    """
    return implementations[choose_backend(op, device_type, implementations, unsupported, order)]


def choose_backend(
    op: str,
    device_type: str | None,
    implementations: Mapping[str, Callable[..., Any]],
    unsupported: Mapping[str, str | None] | None = None,
    order: Sequence[str] | None = None,
) -> str:
    """The name under which `choose` finds its implementation."""
    if device_type is None:
        return "reference"
    declined = {} if unsupported is None else unsupported
    forced = forced_backend()
    if forced is not None:
        reason = unavailable(forced, device_type)
        if reason is None and forced not in implementations:
            reason = f"it has no kernel for {op}"
        reason = reason or declined.get(forced)
        if reason is not None:
            raise RuntimeError(f"fastmtl.{op}: backend {forced!r} is forced but cannot serve this call: {reason}")
        return forced
    for backend in _PREFERENCE.get(device_type, ()) if order is None else order:
        if backend in implementations and not declined.get(backend) and unavailable(backend, device_type) is None:
            return backend
    if device_type == "cpu" and extension is None:
        _warn_reference_once()
    return "reference"


def _warn_reference_once() -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            f"fastmtl runs its plain PyTorch reference: {unavailable('cpu', 'cpu')}. "
            "Results are right, speed is not what it could be; see `fastmtl info`.",
            RuntimeWarning,
            stacklevel=3,
        )


def unwatched() -> bool:
    """Whether nothing must see an op being called by an eager caller: no mode, transform of functions, trace, profiler
    or forward-mode differentiation."""
    return (
        torch._C._functorch.maybe_current_level() is None
        and not torch._C._is_tracing()
        and not torch._C._autograd._profiler_enabled()
        and forward_ad._current_level < 0
        and torch._C._len_torch_function_stack() == 0
        and torch._C._len_torch_dispatch_stack() == 0
    )


def straight_to_cpu() -> bool:
    """Whether an eager call may go to a kernel of the CPU itself, past its op: no other backend is forced, and the call
    is `unwatched`."""
    if extension is None:
        return False
    if (_forced or extension.has_variable("FASTMTL_BACKEND")) and forced_backend() not in (None, "cpu"):
        return False
    return unwatched()


def straight_unrecorded(*tensors: Any) -> bool:
    """Whether an eager call on these may go to a kernel of the CPU itself, and autograd records nothing of it."""
    return (
        not torch.compiler.is_compiling()
        and all(type(x) in PLAIN for x in tensors)
        and tensors[0].is_cpu
        and not any(map(torch.Tensor.is_neg, tensors))
        and straight_to_cpu()
        and not (torch.is_grad_enabled() and torch._C._any_requires_grad(*tensors))
    )


def checking() -> bool:
    """Whether values on a GPU are checked up front too (task ids, Gram matrices), at the price of waiting for it."""
    return os.environ.get("FASTMTL_CHECK", "0") not in ("", "0")
