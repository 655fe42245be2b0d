"""Faults that can be planted in PTX: what may stand in the place of an instruction."""

from __future__ import annotations

from dataclasses import replace

from host.ptx.module import Instruction

# an edge more or less
NEIGHBOURS = {"lt": "le", "le": "lt", "gt": "ge", "ge": "gt", "eq": "ne", "ne": "eq"}


def faults_of(one: Instruction) -> list[Instruction | None]:
    """None: the instruction is left out."""
    if one.opcode in ("bar", "membar", "fence") or one.modifiers[:2] == ("async", "commit_group"):
        return [None]
    if one.modifiers[:2] == ("async", "wait_group"):
        return [replace(one, operands=(str(int(one.operands[0], 0) + 1),))]
    if one.opcode == "atom" and "acq_rel" in one.modifiers:
        return [replace(one, modifiers=tuple("relaxed" if m == "acq_rel" else m for m in one.modifiers))]
    if one.guard is not None:
        return [replace(one, guard=None), None]
    if one.opcode == "setp" and one.modifiers[0] in NEIGHBOURS:
        return [replace(one, modifiers=(NEIGHBOURS[one.modifiers[0]], *one.modifiers[1:]))]
    return []
