"""`fastmtl info`: what was built, what is active, and why each inactive backend is off."""

from __future__ import annotations

import datetime
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from fastmtl._version import DISTRIBUTION, __version__
from fastmtl.core import dispatch
from fastmtl.core.memory import why_memory_is_not_kept
from fastmtl.tuning import gpu, search
from fastmtl.tuning.processor import this_processor


def collect() -> dict[str, Any]:
    """Versions, compiled parts and the state of every backend, as plain data."""
    build = dispatch.build_info()
    extension = dispatch.extension
    backends = {name: dispatch.unavailable(name, _device_of(name)) or _no_device(name) for name in dispatch.BACKENDS}
    return {
        "fastmtl": __version__,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "platform": platform.platform(),
        "extension": getattr(extension, "__file__", None),
        "extension_error": dispatch.extension_error,
        "compiler": build.get("compiler"),
        "torch_stable_abi": build.get("torch_target"),
        "cpu_levels_compiled": build.get("cpu_levels", []),
        "cpu_level_active": extension.cpu_level() if extension is not None else None,
        "cuda_architectures": [f"sm_{arch}" for arch in build.get("cuda_architectures", [])],
        "cuda_kernels": build.get("cuda_kernels", []),
        "cuda_reason": None if build.get("cuda_architectures") else dispatch.build_note("cuda"),
        "triton": _triton_version(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "gpu_table": _gpu_table() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "freed_memory": _freed_memory(),
        "tuned": _tuned(),
        "forced_backend": dispatch.forced_backend(),
        "inactive": {name: reason for name, reason in backends.items() if reason is not None},
        "active": [name for name, reason in backends.items() if reason is None],
    }


def _freed_memory() -> str:
    why = why_memory_is_not_kept()
    return "kept from the first backward pass on the CPU on" if why is None else f"handed back: {why}"


def _tuned() -> dict[str, Any]:
    """Which table of crossovers a process that starts here and now reads, and which others it refuses."""
    found = search.find(this_processor())
    return {
        "path": None if found.path is None else str(found.path),
        "place": found.place,
        "origin": dict(found.table.origin),
        "refused": {str(path): reason for path, reason in found.refused},
    }


def _gpu_table() -> str:
    """Which backend is asked first for layers by task on the current device."""
    major, minor = torch.cuda.get_device_capability()
    table, refused = gpu.find(torch.cuda.get_device_name(), 10 * major + minor)
    found = f"measured on {table.origin.get('date')}" if table.source == "measured" else f"the model of {table.card}"
    return found if refused is None else f"{found}; refused: {refused}"


def _age(date: str) -> str:
    """Of a table, in words; the date itself where it says nothing."""
    try:
        then = datetime.datetime.fromisoformat(date)
        days = (datetime.datetime.now(then.tzinfo) - then).days
    except ValueError:
        return f"of {date}"
    return "of today" if days == 0 else f"{days} day{'s' if days > 1 else ''} old" if days > 0 else f"of {date}"


def _when(tuned: dict[str, Any]) -> str:
    """A user's own table has an age; one that is shipped was measured elsewhere, and has a date."""
    date = tuned["origin"]["date"]
    return f"measured on {date.split('T')[0]}" if tuned["place"] == search.SHIPPED else _age(date)


def _tuned_lines(tuned: dict[str, Any]) -> list[str]:
    origin = tuned["origin"]
    if not origin:
        lines = ["tuned       by the defaults: no table can be read"]
    else:
        lines = [
            f"tuned       by {tuned['path']} ({tuned['place']}, {_when(tuned)})",
            f"  measured  on {origin['name']}, {origin['level']}, {origin['threads']} threads, by fastmtl "
            f"{origin.get('fastmtl')} with torch {origin.get('torch')}, commit {str(origin.get('commit'))[:7]}",
        ]
    return lines + [f"  refused   {path}: {reason}" for path, reason in tuned["refused"].items()]


def _device_of(backend: str) -> str:
    interpreted = backend == "triton" and dispatch.interpreting()
    return "cuda" if backend in ("cuda", "triton") and not interpreted else "cpu"


def _no_device(backend: str) -> str | None:
    if _device_of(backend) == "cpu" or torch.cuda.is_available():
        return None
    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) was built without CUDA"
    return "torch sees no CUDA device"


def _triton_version() -> str | None:
    try:
        return version("triton")
    except PackageNotFoundError:
        return None


def _namesake() -> str | None:
    """The release of the other project whose distribution has the name of this package."""
    try:
        return version("fastmtl")
    except PackageNotFoundError:
        return None


def report() -> str:
    """The text that `fastmtl info` prints."""
    found = collect()
    target = found["torch_stable_abi"]
    abi = f"{int(target, 16) >> 56}.{int(target, 16) >> 48 & 0xFF} and later" if target else "-"
    lines = [
        f"fastmtl {found['fastmtl']}  (python {found['python']}, torch {found['torch']}, {found['platform']})",
        f"extension   {found['extension'] or 'none: ' + str(found['extension_error'])}",
    ]
    if found["extension"]:
        cuda = ", ".join(found["cuda_architectures"]) or f"none: {found['cuda_reason']}"
        if found["cuda_kernels"]:
            cuda += f"; kernels: {', '.join(found['cuda_kernels'])}"
        lines += [
            f"  compiler  {found['compiler']}, torch stable ABI: {abi}",
            f"  CPU       {', '.join(found['cpu_levels_compiled'])} compiled, {found['cpu_level_active']} in use, "
            f"{found['threads']} threads",
            f"  CUDA      {cuda}",
        ]
        lines += _tuned_lines(found["tuned"])
    if (namesake := _namesake()) is not None:
        lines.append(
            f"mixed up    another project, fastmtl {namesake}, is installed into the same folder: pip uninstall "
            f"fastmtl {DISTRIBUTION}, then install {DISTRIBUTION} alone"
        )
    lines.append(f"memory      freed memory is {found['freed_memory']}")
    interpreted = ", interpreted on CPU tensors (TRITON_INTERPRET=1)" if dispatch.interpreting() else ""
    lines.append(f"Triton      {found['triton'] or 'none'}{interpreted}")
    lines.append(f"GPU         {found['gpu'] or 'none'}")
    if found["gpu_table"]:
        lines.append(f"  layers    by task as {found['gpu_table']} has it")
    if found["forced_backend"]:
        lines.append(f"forced      {found['forced_backend']}")
    lines.append(f"active      {', '.join(found['active'])}")
    lines += [f"off         {name}: {reason}" for name, reason in found["inactive"].items()]
    lines.append("other devices (MPS, XPU, ROCm) run the reference")
    return "\n".join(lines)


def main() -> int:
    print(report(), flush=True)
    return 0
