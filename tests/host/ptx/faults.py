"""Faults that can be planted in PTX: what may stand in the place of an instruction."""

from __future__ import annotations

from dataclasses import replace

from host.ptx.module import Instruction

# an edge more or less
NEIGHBOURS = {"lt": "le", "le": "lt", "gt": "ge", "ge": "gt", "eq": "ne", "ne": "eq"}

ORDER, DATA, CONTROL = "order", "data", "control"


def kind_of(one: Instruction) -> str | None:
    """What a fault in the instruction would be about: the order of accesses, what is computed and stored, or which
    instructions are run; None: no fault is planted."""
    if one.guard is not None or (one.opcode == "setp" and one.modifiers[0] in NEIGHBOURS):
        return CONTROL
    if one.opcode in ("bar", "membar", "fence") or (one.opcode == "atom" and "acq_rel" in one.modifiers):
        return ORDER
    if one.opcode == "cp" and one.modifiers[1] in ("commit_group", "wait_group"):
        return ORDER
    return DATA if one.opcode in ("mma", "cp", "st", "shfl") else None


def faults_of(one: Instruction) -> list[Instruction | None]:
    """None: the instruction is left out. A shuffle gives each lane its own value instead, as if no lane were another's;
    a copy of some bytes and zeros behind them copies what lies behind them too."""
    kind = kind_of(one)
    if kind == CONTROL and one.guard is not None:
        return [replace(one, guard=None), None]
    if kind == CONTROL:
        return [replace(one, modifiers=(NEIGHBOURS[one.modifiers[0]], *one.modifiers[1:]))]
    if kind == ORDER and one.opcode == "atom":
        return [replace(one, modifiers=tuple("relaxed" if m == "acq_rel" else m for m in one.modifiers))]
    if kind == ORDER and one.modifiers[-1] == "wait_group":
        return [replace(one, operands=(str(int(one.operands[0], 0) + 1),))]
    if one.opcode == "shfl":
        own = Instruction("mov", ("b32",), (one.operands[0].split("|")[0], one.operands[1]), line=one.line)
        return [replace(own, source=one.source)]
    if one.opcode == "cp" and len(one.operands) == 4:
        return [None, replace(one, operands=one.operands[:3])]
    return [] if kind is None else [None]
