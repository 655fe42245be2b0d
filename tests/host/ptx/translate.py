"""PTX kernels as C++ functions of the same names and arguments, which the linker puts in the kernels' places."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from host.ptx.instructions import Emitter, label
from host.ptx.module import Instruction, Kernel, Label

# instruction -> what may stand in its place: None for nothing
Faults = Callable[[Instruction], Sequence[Instruction | None]]


def no_faults(one: Instruction) -> Sequence[Instruction | None]:
    return ()


def _argument(size: int, is_struct: bool) -> str:
    return f"Bytes<{size}>" if is_struct else f"u{8 * size}"


def translate(kernel: Kernel, faults: Faults = no_faults) -> str:
    """A translation unit. With faults also `int planted_<kernel>`, which says which of them it has: 0 none, 1 the first
    one of the first instruction, and so on."""
    emitter = Emitter(kernel)
    lines: list[str] = []
    planted = 0
    for one in kernel.body:
        if isinstance(one, Label):
            lines.append(f"{label(one.name)}:;")
            continue
        text = emitter.emit(one)
        for wrong in faults(one):
            planted += 1
            wrong_text = ";" if wrong is None else emitter.emit(wrong)
            here = f"if (planted_{kernel.name} == {planted})"
            text = f"{here} {{ ptx::fault_reached = true; {wrong_text} }} else {{ {text} }}"
        lines.append(text)
    types = [_argument(p.size, p.is_struct) for p in kernel.parameters]
    arguments = [f"{t} p{k}" for k, t in enumerate(types)]
    # what a register holds before it is written
    registers = [
        f"{t} {name} = {'false' if t == 'bool' else f'{t}(0xCDCDCDCDCDCDCDCDull)'};"
        for name, t in emitter.registers.items()
    ]
    behind = -(-kernel.shared_bytes // 128) * 128
    members, values = " ".join(f"{one};" for one in arguments), ", ".join(f"p{k}" for k in range(len(types)))
    head = [
        "const ptx::Special special = ptx::special();",
        f"struct {{ {members} }} params{{{values}}};",
        f"constexpr u32 dynamic = {behind};",
        f'const u64 shared = ptx::enter("{kernel.name}", {behind});',
        "static_cast<void>(special), static_cast<void>(params), static_cast<void>(dynamic), static_cast<void>(shared);",
        *registers,
    ]
    body = "\n".join(f"  {line}" for line in (*head, *lines))
    switch = f'extern "C" int planted_{kernel.name};\nint planted_{kernel.name} = 0;\n' if planted else ""
    given = ", ".join(f"*static_cast<const {t}*>(given[{k}])" for k, t in enumerate(types))
    return (
        f'#include "ptx.h"\n\n{switch}extern "C" void {kernel.name}({", ".join(arguments)}) {{\n{body}\n}}\n'
        f'extern "C" void call_{kernel.name}(const void* const* given) {{ {kernel.name}({given}); }}\n'
    )
