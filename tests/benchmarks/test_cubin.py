"""The reader of machine code: fields of an instruction, loops, paths, and rounds of load latency."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from fastmtl.benchmarks.machine_code import cubin
from fastmtl.benchmarks.machine_code.cubin import Code, Loop, parse

SAMPLES = Path(__file__).parent / "sass"
NONE = 7


def line(at: int, text: str, *, board: int = NONE, waits: tuple[int, ...] = ()) -> str:
    """An instruction as cuobjdump prints it, with no more of its encoding than the reader looks at."""
    control = 1 | board << 5 | NONE << 8 | sum(1 << k for k in waits) << 11
    return f"        /*{at:04x}*/ {text} ; /* 0x{0:016x} */\n   /* 0x{control << 41:016x} */\n"


def code_of(*instructions: tuple[str, dict]) -> Code:
    """The instructions at 0x00, 0x10, ... of a kernel."""
    text = "".join(line(16 * k, one, **fields) for k, (one, fields) in enumerate(instructions))
    return Code("a_kernel", 90, 32, 0, 0, parse(text))


def only_loop(*instructions: tuple[str, dict]) -> Loop:
    (loop,) = code_of(*instructions, ("@P0 BRA 0x0", {}), ("EXIT", {})).loops
    return loop


def load(register: int, board: int) -> tuple[str, dict]:
    return f"LDG.E.128 R{register}, desc[UR4][R2.64]", {"board": board}


def use(*waits: int) -> tuple[str, dict]:
    return "FADD R0, R0, R4", {"waits": waits}


def test_eight_loads_that_are_each_waited_for_are_eight_rounds() -> None:
    loop = only_loop(*(one for k in range(8) for one in (load(4 * k, 0), use(0))))
    assert loop.rounds == 8
    assert (loop.bytes, loop.in_flight) == (8 * 512, 512)


def test_eight_loads_before_the_first_wait_are_one_round() -> None:
    # of six scoreboards: some count several loads
    loop = only_loop(*(load(4 * k, k % 6) for k in range(8)), *(use(k) for k in range(6)))
    assert loop.rounds == 1
    assert loop.in_flight == 8 * 512


def test_loads_for_the_next_step_are_one_round_and_more_work_at_once() -> None:
    # what this step uses was loaded by the step before, into other registers
    assert only_loop(use(0), load(4, 0)).rounds == 1
    # two steps ahead, in turn: each load has two steps to come
    loop = only_loop(use(0), load(4, 0), use(1), load(8, 1))
    assert loop.rounds == 1 and loop.in_flight == 2 * 512


def test_a_scoreboard_that_another_load_shares_is_waited_for_with_it() -> None:
    # the pointer is needed, but its scoreboard counts a row too
    pointer = ("LDS.64 R2, [R9]", {"board": 0})
    assert only_loop(load(4, 1), pointer, use(0), load(8, 1), use(1)).rounds == 1
    assert only_loop(load(4, 0), pointer, use(0), load(8, 1), use(1)).rounds == 2


def test_a_load_behind_its_pointer_is_two_rounds() -> None:
    assert (
        only_loop(("LDG.E.64 R2, desc[UR4][R8.64]", {"board": 0}), ("NOP", {"waits": (0,)}), load(4, 1), use(1)).rounds
        == 2
    )


@pytest.mark.parametrize("most", [0, 1, 3, 6])
def test_copies_ahead_are_less_than_a_round(most: int) -> None:
    copy = ("LDGSTS.E.BYPASS.128 [R37], desc[UR8][R30.64]", {})
    loop = only_loop((f"DEPBAR.LE SB0, {most:#x}", {}), copy, copy, ("LDGDEPBAR", {"board": 0}))
    assert loop.rounds == pytest.approx(1 / (most + 1), rel=0.05)
    assert loop.in_flight == pytest.approx((most + 1) * 1024, rel=0.05)


def test_a_loop_that_never_waits_has_no_rounds() -> None:
    loop = only_loop(load(4, NONE))
    assert loop.rounds == 0 and math.isinf(loop.in_flight)


def test_the_path_is_the_one_with_the_widest_loads() -> None:
    # 0x10: a branch to elements one by one, each waited for, at 0x50
    narrow = ("LDG.E.U16 R4, desc[UR4][R2.64]", {"board": 2})
    code = code_of(
        ("NOP", {}),
        ("@P1 BRA 0x50", {}),
        load(4, 0),
        use(0),
        ("BRA 0xa0", {}),
        narrow,
        use(2),
        narrow,
        use(2),
        ("NOP", {}),
        ("@P0 BRA 0x0", {}),
        ("EXIT", {}),
    )
    (loop,) = code.loops
    assert loop.loads == {16: 1} and loop.rounds == 1
    assert [one.address for one in loop.path] == [0x00, 0x10, 0x20, 0x30, 0x40, 0xA0]


def test_loads_count_for_the_innermost_loop_alone() -> None:
    code = code_of(
        load(4, 0),  # 0x00, of the loop outside
        use(0),
        load(8, 1),  # 0x20, of the loop within
        load(12, 1),
        use(1),
        ("@P0 BRA 0x20", {}),
        ("@P1 BRA 0x0", {}),
        ("EXIT", {}),
    )
    outer, inner = code.loops
    assert (outer.loads, outer.rounds) == ({16: 1}, 1)
    assert (inner.loads, inner.rounds) == ({16: 2}, 1)


def test_code_that_lies_behind_the_loop_belongs_to_it() -> None:
    # a branch back is a loop only where its target comes before it on every way
    code = code_of(
        ("@P2 BRA 0x50", {}),
        load(4, 0),  # 0x10, the loop
        use(0),
        ("@P0 BRA 0x0", {}),
        ("EXIT", {}),
        ("NOP", {}),  # 0x50: rare, put at the end
        ("BRA 0x10", {}),
    )
    (loop,) = code.loops
    assert loop.rounds == 1 and [one.address for one in loop.path] == [0x00, 0x10, 0x20, 0x30]


def test_fields_of_an_instruction() -> None:
    (one,) = parse(line(0x3A80, "@!P0 LDG.E.64.STRONG.GPU R58, desc[UR6][R18.64]", board=2, waits=(0, 5)))
    assert (one.address, one.name, one.guarded) == (0x3A80, "LDG.E.64.STRONG.GPU", True)
    assert (one.loads, one.board, one.waits, one.stall) == (8, 2, frozenset({0, 5}), 1)
    widths = {"LDG.E R4, [R2]": 4, "LDG.E.U16 R4, [R2]": 2, "LD.E.128 R4, [R2]": 16, "LDS.128 R4, [R2]": 0}
    assert {text: parse(line(0, text))[0].loads for text in widths} == widths
    branches = {"BRA 0x10": False, "@P0 BRA 0x10": True, "BRA P1, 0x10": True, "EXIT": False, "@P0 EXIT": True}
    assert {text: parse(line(0, text))[0].falls_through for text in branches} == branches
    # sm_80 goes around a far branch by a call under a predicate; another call comes back
    targets = {"BRA P1, 0x10": 16, "@P0 CALL.REL.NOINC 0x20": 32, "CALL.REL.NOINC 0x20": None, "NOP": None}
    assert {text: parse(line(0, text))[0].target for text in targets} == targets


@pytest.mark.parametrize(
    ("name", "loads", "rounds", "instructions"), [("rows_f64", {16: 8}, 1, 85), ("queue_f64", {16: 2}, 0.5, 60)]
)
def test_real_machine_code(name: str, loads: dict[int, int], rounds: float, instructions: int) -> None:
    """The encodings of nvcc 13.0 for sm_90: eight rows at once; a queue of two steps."""
    (loop,) = Code(name, 90, 32, 0, 0, parse((SAMPLES / f"{name}.sass").read_text())).loops
    assert (loop.loads, loop.rounds, len(loop.path)) == (loads, rounds, instructions)


def test_real_machine_code_that_waits_is_seen() -> None:
    text = (SAMPLES / "rows_f64.sass").read_text()
    code = parse(text)
    waiting = []
    for one in code:
        waiting.append(one)
        if one.loads:  # whatever comes next needs it
            waiting.append(cubin.Instruction(one.address, "NOP", "", False, 1, NONE, frozenset({one.board})))
    assert cubin.count_rounds(waiting) == 8


def test_blocks_of_a_multiprocessor() -> None:
    def blocks(registers: int, shared: int = 0, threads: int = 256, dynamic: int = 0, arch: int = 90) -> int:
        return Code("", arch, registers, 0, shared, ()).blocks(threads, dynamic)

    assert [blocks(n) for n in (32, 80, 81, 128, 129, 255)] == [8, 3, 2, 2, 1, 1]
    assert blocks(32, threads=1024) == 2
    assert (blocks(32, shared=75 * 1024), blocks(32, dynamic=114 * 1024)) == (3, 1)
    assert (blocks(32, shared=54 * 1024), blocks(32, shared=54 * 1024, arch=80)) == (4, 2)


def test_dumps_are_taken_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usage = (
        " Function a_kernel:\n  REG:40 STACK:8 SHARED:1024 LOCAL:0\n Function b_kernel:\n  REG:90 STACK:0 SHARED:0\n"
    )
    sass = f"\tcode for sm_90\n\t\tFunction : a_kernel\n{line(0, 'EXIT')}\n\t\tFunction : b_kernel\n{line(0, 'NOP')}"
    sass += line(16, "EXIT")
    program = tmp_path / "cuobjdump"
    program.write_text(f"#!/bin/sh\ncase $1 in -sass) cat {tmp_path}/sass;; *) cat {tmp_path}/usage;; esac\n")
    program.chmod(0o755)
    (tmp_path / "usage").write_text(usage)
    (tmp_path / "sass").write_text(sass)
    monkeypatch.setattr(cubin, "tool", lambda name: str(program))
    a, b = cubin.read(tmp_path / "any.cubin").values()
    assert (a.name, a.arch, a.registers, a.stack, a.shared, len(a.instructions)) == ("a_kernel", 90, 40, 8, 1024, 1)
    assert (b.name, b.registers, [one.name for one in b.instructions]) == ("b_kernel", 90, ["NOP", "EXIT"])
    (tmp_path / "sass").write_text("")
    with pytest.raises(ValueError, match="kernels without machine code"):
        cubin.read(tmp_path / "any.cubin")
