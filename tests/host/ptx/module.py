"""Reads PTX: kernels, their arguments, variables and instructions. What is not known ends in an error that names it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

SIZES = {
    **{f"{kind}{bits}": bits // 8 for kind in "bus" for bits in (8, 16, 32, 64)},
    **{"f16": 2, "bf16": 2, "f32": 4, "f64": 8, "f16x2": 4, "bf16x2": 4, "tf32": 4},
}


class PtxError(Exception):
    """PTX that is not understood."""


@dataclass(frozen=True)
class Instruction:
    """`opcode` without its modifiers; `guard`: "%p1" or "!%p1"; `used`: bytes that a load makes use of, if not all;
    `source`: the project's line that it comes from, as in solve.cuh:62, if the compiler says so."""

    opcode: str
    modifiers: tuple[str, ...]
    operands: tuple[str, ...]
    guard: str | None = None
    line: int = 0
    used: int | None = None
    source: str = ""

    @property
    def name(self) -> str:
        return ".".join([self.opcode, *self.modifiers])

    def __str__(self) -> str:
        guard = f"@{self.guard} " if self.guard else ""
        return f"{guard}{self.name} {', '.join(self.operands)}".strip()


@dataclass(frozen=True)
class Label:
    name: str


@dataclass(frozen=True)
class Parameter:
    name: str
    size: int
    is_struct: bool


@dataclass
class Kernel:
    """`registers`: name, or prefix of numbered names, to type; `shared`: variable to offset."""

    name: str
    parameters: list[Parameter]
    dynamic: str | None  # the variable behind the others
    body: list[Instruction | Label] = field(default_factory=list)
    registers: dict[str, str] = field(default_factory=dict)
    shared: dict[str, int] = field(default_factory=dict)
    shared_bytes: int = 0

    @property
    def instructions(self) -> Iterator[Instruction]:
        return (one for one in self.body if isinstance(one, Instruction))

    def type_of(self, register: str) -> str | None:
        return self.registers.get(register) or self.registers.get(register.rstrip("0123456789") + "<>")


PROJECT = f"{Path(__file__).parents[3]}/"


def _code(text: str) -> str:
    """Line for line without comments and what is for debuggers, but for `.loc file:line`: the innermost place of an
    inlined function that is the project's."""
    files = {m[1]: m[2] for m in re.finditer(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', text, flags=re.M)}

    def place(found: re.Match[str]) -> str:
        places = [(files[file], line) for file, line in re.findall(r"(?:\.loc|inlined_at)\s+(\d+)\s+(\d+)", found[0])]
        here = [f"{Path(file).name}:{line}" for file, line in places if file.startswith(PROJECT)]
        return f".loc {here[0]};" if here else ""

    def lines_of(found: re.Match[str]) -> str:
        return "\n" * found[0].count("\n")

    text = re.sub(r"/\*.*?\*/", lines_of, text, flags=re.S)
    text = re.sub(r"//[^\n]*", "", text)
    text = re.sub(r"^\s*\.section\s[^{]*\{.*?\}", lines_of, text, flags=re.S | re.M)
    text = re.sub(r"^[ \t]*\.file\b[^\n]*", "", text, flags=re.M)
    return re.sub(r"^[ \t]*\.loc\b[^\n]*", place, text, flags=re.M)


def _closing(text: str, start: int) -> int:
    """The place of the bracket that closes the one before `start`."""
    depth = 1
    for at in range(start, len(text)):
        depth += (text[at] in "({[") - (text[at] in ")}]")
        if depth == 0:
            return at
    raise PtxError("a bracket that is not closed")


def split_operands(text: str) -> tuple[str, ...]:
    """At the commas that no bracket encloses."""
    found, depth, start = [], 0, 0
    for at, c in enumerate(text):
        depth += (c in "({[") - (c in ")}]")
        if c == "," and depth == 0:
            found.append(text[start:at].strip())
            start = at + 1
    return (*found, text[start:].strip()) if text.strip() else ()


def _parameters(text: str) -> list[Parameter]:
    found = []
    for one in split_operands(text):
        m = re.fullmatch(
            r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)\s+(?:\.ptr\s*(?:\.\w+\s*)?(?:\.align\s+\d+\s*)?)?"
            r"([\w$]+)(?:\[(\d+)\])?",
            one,
        )
        if m is None:
            raise PtxError(f"an argument: {one}")
        found.append(Parameter(m[2], SIZES[m[1]] * int(m[3] or 1), m[3] is not None))
    return found


_VARIABLE = re.compile(r"\.shared\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)(?:\[(\d*)\])?")


class _Reader:
    """One kernel's body. Inline assembly may have a scope with registers of its own, which are renamed."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.scopes: list[dict[str, str]] = [{}]
        self.num_scopes = 0
        self.used: int | None = None
        self.source = ""

    def read(self, text: str, line: int) -> None:
        start = 0
        for at, c in enumerate(text):
            piece = text[start:at].strip()
            if c in "{}" and not piece:
                self.scope(opens=c == "{")
            elif c == ";":
                self.statement(" ".join(piece.split()), line)
            elif c == ":" and re.fullmatch(r"[\w$]+", piece) and text[at + 1] != ":":
                self.kernel.body.append(Label(piece))
            else:
                line += c == "\n"
                continue
            start = at + 1
        if text[start:].strip():
            raise PtxError(f"{text[start:].strip()!r} in {self.kernel.name}")

    def scope(self, opens: bool) -> None:
        self.num_scopes += opens
        self.scopes.append({}) if opens else self.scopes.pop()

    def statement(self, text: str, line: int) -> None:
        if not text:
            return
        if text.startswith(".reg "):
            self.declare(text)
        elif text.startswith(".shared "):
            self.shared(text)
        elif text.startswith(".loc "):
            self.source = text.removeprefix(".loc ")
        elif text.startswith(".pragma"):
            m = re.search(r"used_bytes_mask (\w+)", text)
            self.used = int(m[1], 0).bit_length() if m else self.used
        elif text.startswith("."):
            raise PtxError(f"line {line} of {self.kernel.name}: {text}")
        else:
            self.instruction(text, line)

    def declare(self, text: str) -> None:
        m = re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", text)
        if m is None:
            raise PtxError(text)
        for name in m[2].split(","):
            name = re.sub(r"<\d+>", "<>", name.strip())
            if len(self.scopes) > 1:
                self.scopes[-1][name] = name = f"{name}${self.num_scopes}"
            self.kernel.registers[name] = m[1]

    def shared(self, text: str) -> None:
        m = _VARIABLE.fullmatch(text)
        if m is None:
            raise PtxError(text)
        align = int(m[1] or SIZES[m[2]])
        offset = -(-self.kernel.shared_bytes // align) * align
        self.kernel.shared[m[3]] = offset
        self.kernel.shared_bytes = offset + SIZES[m[2]] * int(m[4] or 1)

    def instruction(self, text: str, line: int) -> None:
        for names in self.scopes[1:]:
            for name, renamed in names.items():
                text = re.sub(rf"(?<![\w$%]){re.escape(name)}(?![\w$])", lambda _, to=renamed: to, text)
        m = re.fullmatch(r"(?:@(!?[%\w$]+)\s+)?([\w.:]+)\s*(.*)", text)
        if m is None:
            raise PtxError(f"line {line} of {self.kernel.name}: {text}")
        opcode, *modifiers = m[2].split(".")
        one = Instruction(opcode, tuple(modifiers), split_operands(m[3]), m[1], line, self.used, self.source)
        self.used = None
        self.kernel.body.append(one)


def read(text: str) -> list[Kernel]:
    """The kernels of a PTX file; lines count from each one's first."""
    text = _code(text)
    kernels = []
    head = text.partition(".entry")[0]
    for m in re.finditer(r"^\s*\.(?:global|const|func)\b.*", text, flags=re.M):
        raise PtxError(m[0].strip())
    dynamic = [m[3] for m in _VARIABLE.finditer(head) if m[4] == ""]
    statics = [m[0] for m in _VARIABLE.finditer(head) if m[4] != ""]
    for m in re.finditer(r"\.entry\s+([\w$]+)\s*\(", text):
        end = _closing(text, m.end())
        begin = text.index("{", end) + 1
        kernel = Kernel(m[1], _parameters(text[m.end() : end]), dynamic[0] if dynamic else None)
        reader = _Reader(kernel)
        for variable in statics:
            reader.shared(variable)
        reader.read(text[begin : _closing(text, begin)], text.count("\n", m.start(), begin))
        kernels.append(kernel)
    return kernels
