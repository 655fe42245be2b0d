"""Which processor this is, as far as the time of a product depends on it."""

from __future__ import annotations

import functools
import platform
import re
from pathlib import Path
from typing import NamedTuple

import torch

from fastmtl.core import dispatch

# ends the instructions of a processor that multiplies bfloat16 in pairs (AVX512-BF16)
PAIRS = "_bf16"


class Processor(NamedTuple):
    """What a table was measured on, or is looked for.

    `name`: with family and model, since a virtual machine's processor may be called "AMD EPYC" whatever its age.
    `level`: the instructions that the compiled extension uses; "none" without one. `threads`: torch's.
    """

    name: str
    vendor: str
    level: str
    threads: int

    @property
    def slug(self) -> str:
        """For a file name: lower-case letters, digits and dashes."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")


@functools.cache
def _cpuinfo() -> dict[str, str]:
    """The first value of each key of Linux's description of the processor; empty elsewhere."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    found: dict[str, str] = {}
    for key, value in re.findall(r"^([^\t:]+?)[ \t]*:[ \t]*(.+)$", text, re.MULTILINE):
        found.setdefault(key, value.strip())
    return found


def cpu_name() -> str:
    """As the processor calls itself."""
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def this_processor() -> Processor:
    info = _cpuinfo()
    name = cpu_name()
    if "cpu family" in info and "model" in info:
        name += f", family {info['cpu family']} model {info['model']}"
    level = "none" if dispatch.extension is None else dispatch.extension.cpu_level()
    if dispatch.extension is not None and dispatch.extension.multiplies_pairs():
        level += PAIRS
    return Processor(name, info.get("vendor_id", "unknown"), level, torch.get_num_threads())
