"""What each PTX instruction is in C++, with the functions of ptx.h. Sections of the PTX ISA say what it has to do.

A register is a variable of its class: `bool`, an unsigned integer, or a float. `value` reads an operand as an
instruction's type has it, `put` writes a result of such a type.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable

from host.ptx.module import SIZES, Instruction, Kernel, PtxError

UNSIGNED = {1: "u8", 2: "u16", 4: "u32", 8: "u64"}
SPECIAL = {
    "%tid.x": "special.tid",
    "%ntid.x": "special.ntid",
    "%laneid": "(special.tid % 32)",
    "%warpid": "(special.tid / 32)",
    **{f"%ctaid.{axis}": f"special.ctaid[{k}]" for k, axis in enumerate("xyz")},
    **{f"%nctaid.{axis}": f"special.nctaid[{k}]" for k, axis in enumerate("xyz")},
    **{f"%tid.{axis}": "u32(0)" for axis in "yz"},
    **{f"%ntid.{axis}": "u32(1)" for axis in "yz"},
}
COMPARED = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
COMPARED_UNSIGNED = {"lo": "<", "ls": "<=", "hi": ">", "hs": ">="}
# true also if one is NaN: the opposite of the opposite comparison
COMPARED_UNORDERED = {"neu": "==", "ltu": ">=", "leu": ">", "gtu": "<=", "geu": "<"}
WIDE = {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}
# that change nothing about the values: caches, hints, scopes larger than the model's
CACHE = {"ca", "cg", "cs", "lu", "cv", "wb", "wt", "nc", "volatile", "weak", "relaxed", "gpu", "cta", "sys"}


def c_type(t: str) -> str:
    """Of a register or a value."""
    if t == "pred":
        return "bool"
    return t if t in ("f32", "f64") or t[0] == "s" else UNSIGNED[SIZES[t]]


def is_float(t: str) -> bool:
    return t in ("f32", "f64")


class Emitter:
    """Of one kernel; collects the registers that it uses."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.registers: dict[str, str] = {}  # C++ name -> C++ type
        self.waits = any(one.name == "griddepcontrol.wait" for one in kernel.instructions)

    def emit(self, one: Instruction) -> str:
        """A C++ statement."""
        make: Callable[[Instruction], str] | None = getattr(self, f"_{one.opcode}", None)
        try:
            if make is None:
                raise PtxError("unknown")
            text = make(one)
        except (PtxError, KeyError, ValueError, IndexError, StopIteration) as e:
            at = f"line {one.line} of {self.kernel.name}"
            raise PtxError(f"{at}: {one.name} is not translated: {one} ({e})") from e
        if one.guard is None:
            return text
        return f"if ({one.guard[:1].strip('%')}{self.register(one.guard.lstrip('!'))}) {{ {text} }}"

    # --- operands

    def register(self, name: str) -> str | None:
        kind = self.kernel.type_of(name)
        if kind is None:
            return None
        variable = re.sub(r"\W", "_", name.lstrip("%"))
        self.registers[f"r_{variable}"] = c_type(kind)
        return f"r_{variable}"

    def symbol(self, name: str) -> str | None:
        """The address of a variable: in shared memory an offset, else the host's."""
        if name in self.kernel.shared:
            return str(self.kernel.shared[name])
        if name == self.kernel.dynamic:
            return "dynamic"
        for k, parameter in enumerate(self.kernel.parameters):
            if name == parameter.name:
                return f"reinterpret_cast<u64>(&params.p{k})"
        return None

    def value(self, operand: str, t: str) -> str:
        want = c_type(t)
        if operand.startswith("!"):
            return f"!{self.value(operand[1:], t)}"
        if operand in SPECIAL:
            return f"{want}({SPECIAL[operand]})"
        name = self.register(operand)
        if name is not None:
            return self._as(name, self.registers[name], want)
        if m := re.fullmatch(r"0[fF](\w{8})", operand):
            return f"__builtin_bit_cast({want}, 0x{m[1]}u)"
        if m := re.fullmatch(r"0[dD](\w{16})", operand):
            return f"__builtin_bit_cast({want}, u64(0x{m[1]}))"
        if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|[0-9]+)U?", operand):
            number = int(operand.rstrip("U"), 0)
            if t == "pred":
                return "true" if number else "false"
            return f"{want}(0x{number % (1 << 8 * SIZES[t]):x}u{'ll' * (SIZES[t] == 8)})"
        if m := re.fullmatch(r"([\w$]+)(\+\d+)?", operand):
            address = self.symbol(m[1])
            if address is not None:
                return f"{want}({address}{m[2] or ''})"
        raise PtxError(f"the operand {operand}")

    @staticmethod
    def _as(name: str, have: str, want: str) -> str:
        if have == want:
            return name
        if "bool" in (have, want):
            raise PtxError("a predicate among other values")
        if is_float(have) or is_float(want):
            if have[1:] != want[1:]:
                raise PtxError(f"{want} of a register of {have}")
            return f"__builtin_bit_cast({want}, {name})"
        return f"{want}({name})"

    def put(self, operand: str, t: str, value: str) -> str:
        """value: of the C++ type of t."""
        if operand == "_":
            return f"static_cast<void>({value});"
        name = self.register(operand)
        if name is None:
            raise PtxError(f"the register {operand}")
        have = self.registers[name]
        if is_float(have) != is_float(t):
            return f"{name} = __builtin_bit_cast({have}, {c_type(t)}({value}));"
        return f"{name} = {value};"

    def address(self, operand: str, space: str) -> str:
        m = re.fullmatch(r"\[\s*([%\w$.]+?)\s*(?:([+-])\s*(-?\w+))?\s*\]", operand)
        if m is None:
            raise PtxError(f"the address {operand}")
        offset = int(m[3] or "0", 0) * (-1 if m[2] == "-" else 1)
        t = "u32" if space == "shared" else "u64"
        base = self.value(m[1], t)
        return f"{base} + {t}({offset}ll)" if offset else base

    @staticmethod
    def parts(operand: str) -> list[str]:
        """Of a vector, or the operand itself."""
        return [x.strip() for x in operand.strip("{}").split(",")]

    def array(self, t: str, name: str, operand: str, count: int) -> str:
        values = [self.value(x, t) for x in self.parts(operand)]
        if len(values) != count:
            raise PtxError(f"{len(values)} registers in place of {count}")
        return f"{c_type(t)} {name}[{count}] = {{{', '.join(values)}}};"

    def where(self, one: Instruction) -> str:
        return json.dumps(f"{one} (line {one.line})")

    # --- memory

    @staticmethod
    def space(one: Instruction, *known: str) -> str:
        spaces = [m.partition("::")[0] for m in one.modifiers]
        found = next((s for s in spaces if s in known), "generic")
        rest = {m for m in one.modifiers[:-1] if not m.startswith((found, "L1::", "L2::"))} - CACHE - {"v2", "v4"}
        if rest:
            raise PtxError(f"unknown: {', '.join(sorted(rest))}")
        return found

    def _ld(self, one: Instruction) -> str:
        t, space = one.modifiers[-1], self.space(one, "shared", "global", "param")
        to = self.parts(one.operands[0])
        size = SIZES[t] * len(to)
        at = self.address(one.operands[1], space)
        if space == "param":
            place = f"ptx::param_at({at}, {size}, &params, sizeof params, {self.where(one)})"
        else:
            used = min(one.used or size, size)
            place = f"ptx::{space}_at({at}, {size}, {used}, {self.where(one)})"
        puts = " ".join(self.put(x, t, f"v[{k}]") for k, x in enumerate(to))
        return f"{{ auto* v = static_cast<const {c_type(t)}*>({place}); {puts} }}"

    def _st(self, one: Instruction) -> str:
        t, space = one.modifiers[-1], self.space(one, "shared", "global")
        values = [self.value(x, t) for x in self.parts(one.operands[1])]
        size = SIZES[t] * len(values)
        early = f"ptx::check_waited({self.where(one)}); " if self.waits and space != "shared" else ""
        at = self.address(one.operands[0], space)
        stored = f"const {c_type(t)} v[] = {{{', '.join(values)}}};"
        return f"{{ {early}{stored} ptx::store_{space}({at}, v, {size}, {self.where(one)}); }}"

    def _atom(self, one: Instruction) -> str:
        t = one.modifiers[-1]
        op = next(m for m in one.modifiers if m in ("add", "exch", "cas", "min", "max", "and", "or", "xor"))
        order = [m for m in one.modifiers if m in ("acq_rel", "acquire", "release", "relaxed")] or ["relaxed"]
        if order[0] not in ("acq_rel", "relaxed") or set(one.modifiers[:-1]) - {op, order[0], "global", "gpu"}:
            raise PtxError("only relaxed or acq_rel, of global memory, for the GPU")
        x = self.value(one.operands[2], t)
        new = {
            "add": f"old + {x}",
            "exch": x,
            "min": f"old < {x} ? old : {x}",
            "max": f"old > {x} ? old : {x}",
            "and": f"old & {x}",
            "or": f"old | {x}",
            "xor": f"old ^ {x}",
        }
        if op == "cas":
            new["cas"] = f"old == {x} ? {self.value(one.operands[3], t)} : old"
        acq_rel = "true" if order[0] == "acq_rel" else "false"
        place = f"ptx::atomic_at({self.address(one.operands[1], 'global')}, {SIZES[t]}, {acq_rel}, {self.where(one)})"
        return (
            f"{{ auto* v = static_cast<{c_type(t)}*>({place}); const {c_type(t)} old = *v; "
            f"*v = {new[op]}; {self.put(one.operands[0], t, 'old')} }}"
        )

    def _red(self, one: Instruction) -> str:
        return self._atom(Instruction("atom", one.modifiers, ("_", *one.operands), line=one.line))

    def _cvta(self, one: Instruction) -> str:
        space = next(m for m in one.modifiers if m in ("global", "shared", "param"))
        x = self.value(one.operands[1], "u64")
        if space == "shared":
            x = f"{x} - shared" if "to" in one.modifiers else f"{x} + shared"
        return self.put(one.operands[0], "u64", x)

    def _cp(self, one: Instruction) -> str:
        kind = one.modifiers[:2]
        if kind == ("async", "commit_group"):
            return "ptx::commit_copies();"
        if kind == ("async", "wait_group"):
            return f"ptx::wait_for_copies({int(one.operands[0], 0)}, {self.where(one)});"
        if kind == ("async", "wait_all"):
            return f"ptx::commit_copies(); ptx::wait_for_copies(0, {self.where(one)});"
        if kind not in (("async", "cg"), ("async", "ca")) or one.modifiers[2:4] != ("shared", "global"):
            raise PtxError("unknown")
        to, source, size, *taken = one.operands
        count = f"{taken[0]}" if taken and taken[0].isdigit() else self.value(taken[0], "u32") if taken else size
        to, source = self.address(to, "shared"), self.address(source, "global")
        return f"ptx::copy_async({to}, {source}, {int(size, 0)}, {count}, {self.where(one)});"

    def _prefetch(self, one: Instruction) -> str:
        return ";"

    # --- moves and conversions

    def _mov(self, one: Instruction) -> str:
        t = one.modifiers[-1]
        to, source = one.operands
        if to.startswith("{"):
            names = self.parts(to)
            bits = 8 * SIZES[t] // len(names)
            part = f"b{bits}"
            puts = [self.put(x, part, f"{c_type(part)}(x >> {bits * k})") for k, x in enumerate(names) if x != "_"]
            return f"{{ const auto x = {self.value(source, f'b{8 * SIZES[t]}')}; {' '.join(puts)} }}"
        if source.startswith("{"):
            values = self.parts(source)
            bits = 8 * SIZES[t] // len(values)
            whole = UNSIGNED[SIZES[t]]
            parts = [f"{whole}({self.value(x, f'b{bits}')}) << {bits * k}" for k, x in enumerate(values)]
            return self.put(to, f"b{8 * SIZES[t]}", " | ".join(parts))
        return self.put(to, t, self.value(source, t))

    def _cvt(self, one: Instruction) -> str:
        *how, to, source = one.modifiers
        if to in ("bf16x2", "f16x2") and how == ["rn"]:
            high, low = (f"u32(ptx::to_{to[:-2]}({self.value(x, 'f32')}))" for x in one.operands[1:])
            return self.put(one.operands[0], "b32", f"{high} << 16 | {low}")
        x = self.value(one.operands[1], source)
        if to == "tf32":
            if source != "f32" or how != ["rna"]:
                raise PtxError("anything but float32, rounded to nearest, ties away from zero")
            return self.put(one.operands[0], to, f"ptx::to_tf32({x})")
        if source in ("f16", "bf16"):
            if to != "f32" or how:
                raise PtxError("16 bits to anything but float32")
            return self.put(one.operands[0], to, f"ptx::from_{source}({x})")
        if to in ("f16", "bf16"):
            if source != "f32" or how != ["rn"]:
                raise PtxError("anything but float32 to 16 bits")
            return self.put(one.operands[0], to, f"ptx::to_{to}({x})")
        if is_float(source) and not is_float(to):
            if how != ["rzi"]:
                raise PtxError("a rounding but toward zero")
            return self.put(one.operands[0], to, f"ptx::to_integer<{c_type(to)}>({x})")
        if how not in ([], ["rn"]):
            raise PtxError("a rounding but to nearest")
        return self.put(one.operands[0], to, f"{c_type(to)}({x})")

    def _selp(self, one: Instruction) -> str:
        t = one.modifiers[-1]
        to, x, y, p = one.operands
        return self.put(to, t, f"{self.value(p, 'pred')} ? {self.value(x, t)} : {self.value(y, t)}")

    def _prmt(self, one: Instruction) -> str:
        if one.modifiers != ("b32",):
            raise PtxError("a mode")
        return self.put(one.operands[0], "b32", f"ptx::permute({self._values(one, 'b32')})")

    # --- arithmetic

    def _values(self, one: Instruction, t: str) -> str:
        return ", ".join(self.value(x, t) for x in one.operands[1:])

    def _arithmetic(self, one: Instruction, operator: str) -> str:
        *how, t = one.modifiers
        if [m for m in how if m not in ("rn", "lo")] or t in ("f16", "bf16", "f16x2", "bf16x2"):
            raise PtxError("unknown")
        # of integers without a sign, which wrap; 16 bits become int otherwise
        unsigned = t if is_float(t) else f"b{8 * SIZES[t]}"
        x, y = (self.value(x, unsigned) for x in one.operands[1:])
        return self.put(one.operands[0], unsigned, f"{'u32(1) * ' * (SIZES[t] == 2)}{x} {operator} {y}")

    def _add(self, one: Instruction) -> str:
        return self._arithmetic(one, "+")

    def _sub(self, one: Instruction) -> str:
        return self._arithmetic(one, "-")

    def _mul(self, one: Instruction) -> str:
        t = one.modifiers[-1]
        if is_float(t) or one.modifiers[0] == "lo":
            return self._arithmetic(one, "*")
        wide = WIDE.get(t, "u64")
        x, y = (f"{wide}({self.value(x, t)})" for x in one.operands[1:])
        if one.modifiers[0] == "wide":
            return self.put(one.operands[0], wide, f"{x} * {y}")
        if SIZES[t] == 8:
            x, y = x.replace("u64(", "static_cast<unsigned __int128>("), f"u64({y})"
            if t == "s64":
                raise PtxError("the high half of 64 bits with a sign")
        return self.put(one.operands[0], t, f"{c_type(t)}({x} * {y} >> {8 * SIZES[t]})")

    def _mad(self, one: Instruction) -> str:
        t = one.modifiers[-1]
        kind = one.modifiers[0]
        if kind not in ("lo", "wide"):
            raise PtxError("unknown")
        wide = WIDE[t] if kind == "wide" else f"u{8 * SIZES[t]}"
        x, y = (f"{c_type(wide)}({self.value(x, t)})" for x in one.operands[1:3])
        unsigned = UNSIGNED[SIZES[wide]]
        return self.put(
            one.operands[0], wide, f"{unsigned}({x} * {y}) + {unsigned}({self.value(one.operands[3], wide)})"
        )

    def _fma(self, one: Instruction) -> str:
        if one.modifiers not in (("rn", "f32"), ("rn", "f64")):
            raise PtxError("unknown")
        t = one.modifiers[-1]
        function = "__builtin_fmaf" if t == "f32" else "__builtin_fma"
        return self.put(one.operands[0], t, f"{function}({self._values(one, t)})")

    def _div(self, one: Instruction) -> str:
        *how, t = one.modifiers
        x, y = (self.value(x, t) for x in one.operands[1:])
        if (how, t) == (["full"], "f32"):
            return self.put(one.operands[0], t, f"ptx::divide_full({x}, {y})")
        if how not in ([], ["rn"]):
            raise PtxError("not exact")
        # by zero: any number will do
        return self.put(one.operands[0], t, f"{x} / {y}" if is_float(t) else f"{y} ? {x} / {y} : {c_type(t)}(-1)")

    def _rem(self, one: Instruction) -> str:
        t = one.modifiers[-1]
        x, y = (self.value(x, t) for x in one.operands[1:])
        return self.put(one.operands[0], t, f"{y} ? {x} % {y} : {x}")

    def _exact(self, one: Instruction, text: str) -> str:
        if one.modifiers not in (("rn", "f32"), ("rn", "f64")):
            raise PtxError("not exact")
        t = one.modifiers[-1]
        return self.put(one.operands[0], t, text.format(self.value(one.operands[1], t), f="f" * (t == "f32")))

    def _rcp(self, one: Instruction) -> str:
        return self._exact(one, "1 / {0}")

    def _sqrt(self, one: Instruction) -> str:
        return self._exact(one, "__builtin_sqrt{f}({0})")

    def _least(self, one: Instruction, operator: str) -> str:
        *how, t = one.modifiers
        if how or t[0] not in "usf":
            raise PtxError("unknown")
        if is_float(t):
            function = f"__builtin_{'fmin' if operator == '<' else 'fmax'}{'f' * (t == 'f32')}"
            return self.put(one.operands[0], t, f"{function}({self._values(one, t)})")
        x, y = (self.value(x, t) for x in one.operands[1:])
        return self.put(one.operands[0], t, f"{x} {operator} {y} ? {x} : {y}")

    def _min(self, one: Instruction) -> str:
        return self._least(one, "<")

    def _max(self, one: Instruction) -> str:
        return self._least(one, ">")

    def _neg(self, one: Instruction) -> str:
        (t,) = one.modifiers
        x = self.value(one.operands[1], t)
        return self.put(one.operands[0], t, f"-{x}" if is_float(t) else f"{c_type(t)}(0 - {UNSIGNED[SIZES[t]]}({x}))")

    def _abs(self, one: Instruction) -> str:
        (t,) = one.modifiers
        function = {"f32": "__builtin_fabsf", "f64": "__builtin_fabs"}[t]
        return self.put(one.operands[0], t, f"{function}({self.value(one.operands[1], t)})")

    # --- bits

    def _popc(self, one: Instruction) -> str:
        (t,) = one.modifiers
        count = {"b32": "__builtin_popcount", "b64": "__builtin_popcountll"}[t]
        return self.put(one.operands[0], "u32", f"u32({count}({self.value(one.operands[1], t)}))")

    def _bits(self, one: Instruction, operator: str) -> str:
        (t,) = one.modifiers
        x, y = (self.value(x, t) for x in one.operands[1:])
        return self.put(one.operands[0], t, f"{c_type(t)}({x} {operator} {y})")

    def _and(self, one: Instruction) -> str:
        return self._bits(one, "&")

    def _or(self, one: Instruction) -> str:
        return self._bits(one, "|")

    def _xor(self, one: Instruction) -> str:
        return self._bits(one, "^")

    def _not(self, one: Instruction) -> str:
        (t,) = one.modifiers
        x = self.value(one.operands[1], t)
        return self.put(one.operands[0], t, f"!{x}" if t == "pred" else f"{c_type(t)}(~{x})")

    def _shl(self, one: Instruction) -> str:
        (t,) = one.modifiers
        x, n = self.value(one.operands[1], t), self.value(one.operands[2], "u32")
        return self.put(one.operands[0], t, f"ptx::shift_left<{c_type(t)}>({x}, {n})")

    def _shr(self, one: Instruction) -> str:
        (t,) = one.modifiers
        x, n = self.value(one.operands[1], t), self.value(one.operands[2], "u32")
        return self.put(one.operands[0], t, f"ptx::shift_right<{c_type(t)}>({x}, {n})")

    def _shf(self, one: Instruction) -> str:
        side, mode, t = one.modifiers
        low, high, n = (self.value(x, "u32") for x in one.operands[1:])
        if mode == "wrap":
            n = f"({n} & 31)"
        function = {"l": "funnel_left", "r": "funnel_right"}[side]
        return self.put(one.operands[0], t, f"ptx::{function}({low}, {high}, {n})")

    def _lop3(self, one: Instruction) -> str:
        if one.modifiers != ("b32",):
            raise PtxError("unknown")
        return self.put(one.operands[0], "b32", f"ptx::logic({self._values(one, 'b32')})")

    def _bfi(self, one: Instruction) -> str:
        if one.modifiers != ("b32",):
            raise PtxError("unknown")
        return self.put(one.operands[0], "b32", f"ptx::insert_bits({self._values(one, 'b32')})")

    def _bfe(self, one: Instruction) -> str:
        (t,) = one.modifiers
        x, at, count = self.value(one.operands[1], t), *(self.value(x, "u32") for x in one.operands[2:])
        return self.put(one.operands[0], t, f"ptx::extract_bits<{c_type(t)}>({x}, {at}, {count})")

    # --- comparisons

    def _setp(self, one: Instruction) -> str:
        how, *more, t = one.modifiers
        x, y = (self.value(x, t) for x in one.operands[1:3])
        if t in ("f16", "bf16"):
            x, y, t = f"ptx::from_{t}({x})", f"ptx::from_{t}({y})", "f32"
        if is_float(t) and how == "ne":  # false if one is NaN
            found = f"({x} < {y} || {x} > {y})"
        elif is_float(t) and how == "equ":
            found = f"!({x} < {y} || {x} > {y})"
        elif is_float(t) and how in COMPARED_UNORDERED:
            found = f"!({x} {COMPARED_UNORDERED[how]} {y})"
        elif is_float(t) and how in ("num", "nan"):
            found = f"{'!' * (how == 'num')}({x} != {x} || {y} != {y})"
        elif t[0] == "b" and how not in ("eq", "ne"):
            raise PtxError("an order of bits")
        else:
            found = f"({x} {({**COMPARED, **COMPARED_UNSIGNED} if t[0] == 'u' else COMPARED)[how]} {y})"
        also = {"and": " && third", "or": " || third", "xor": " != third"}[more[0]] if more else ""
        third = f" const bool third = {self.value(one.operands[3], 'pred')};" if more else ""
        to, *other = one.operands[0].split("|")
        puts = " ".join([self.put(to, "pred", "found" + also), *(self.put(x, "pred", "!found" + also) for x in other)])
        return f"{{ const bool found = {found};{third} {puts} }}"

    # --- control

    def _bra(self, one: Instruction) -> str:
        return f"goto {label(one.operands[0])};"

    def _ret(self, one: Instruction) -> str:
        return "return;"

    def _bar(self, one: Instruction) -> str:
        if one.modifiers == ("warp", "sync"):
            return f"ptx::warp_barrier({self.value(one.operands[0], 'u32')});"
        if one.modifiers != ("sync",) or one.operands != ("0",):
            raise PtxError("a barrier of some threads")
        return "ptx::barrier();"

    def _membar(self, one: Instruction) -> str:
        if one.modifiers != ("gl",):
            raise PtxError("unknown")
        return "ptx::fence();"

    def _fence(self, one: Instruction) -> str:
        if one.modifiers not in (("acq_rel", "gpu"), ("sc", "gpu")):
            raise PtxError("unknown")
        return "ptx::fence();"

    def _griddepcontrol(self, one: Instruction) -> str:
        # launches run one after another
        return {"launch_dependents": ";", "wait": "ptx::wait_for_launch_before();"}[one.modifiers[0]]

    # --- warps and tensor cores

    def _shfl(self, one: Instruction) -> str:
        sync, mode, t = one.modifiers
        if sync != "sync" or t != "b32":
            raise PtxError("unknown")
        to, *valid = one.operands[0].split("|")
        value, b, c, mask = (self.value(x, "b32") for x in one.operands[1:])
        text = f"const u32 value = ptx::shuffle('{mode[0]}', {value}, {b}, {c}, {mask}, &in_range);"
        puts = self.put(to.strip(), "b32", "value") + "".join(self.put(p.strip(), "pred", "in_range") for p in valid)
        return f"{{ bool in_range; {text} {puts} }}"

    def _vote(self, one: Instruction) -> str:
        _, how, t = one.modifiers
        vote, mask = self.value(one.operands[1], "pred"), self.value(one.operands[2], "u32")
        found = {"ballot": "{}", "any": "{} != 0", "all": "{} == ~0u"}[how].format(f"ptx::ballot({vote}, {mask})")
        return self.put(one.operands[0], t, found)

    def _redux(self, one: Instruction) -> str:
        _, op, t = one.modifiers
        code = {"add": "a", "min": "n", "max": "x", "and": "&", "or": "|", "xor": "^"}[op]
        value, mask = self.value(one.operands[1], "b32"), self.value(one.operands[2], "u32")
        signed = "true" if t == "s32" else "false"
        return self.put(one.operands[0], "b32", f"ptx::reduce('{code}', {value}, {signed}, {mask})")

    def _ldmatrix(self, one: Instruction) -> str:
        count = int(next(m for m in one.modifiers if re.fullmatch(r"x[124]", m))[1])
        if "m8n8" not in one.modifiers or one.modifiers[-1] != "b16":
            raise PtxError("a shape")
        trans = "true" if "trans" in one.modifiers else "false"
        at = self.address(one.operands[1], "shared")
        puts = " ".join(self.put(x, "b32", f"v[{k}]") for k, x in enumerate(self.parts(one.operands[0])))
        return f"{{ u32 v[4]; ptx::load_matrix(v, {at}, {count}, {trans}, {self.where(one)}); {puts} }}"

    def _mma(self, one: Instruction) -> str:
        if one.modifiers[:2] != ("sync", "aligned") or one.modifiers[3:5] != ("row", "col"):
            raise PtxError("unknown")
        shape, types = one.modifiers[2], one.modifiers[5:]
        to, a, b, c = one.operands
        if (shape, types) == ("m8n8k4", ("f64",) * 4):
            sums = self.array("f64", "d", c, 2)
            (a,), (b,) = self.parts(a), self.parts(b)
            product = f"ptx::mma_f64(d, {self.value(a, 'f64')}, {self.value(b, 'f64')});"
        else:
            wanted = {"tf32": "m16n8k8", "bf16": "m16n8k16", "f16": "m16n8k16"}[types[1]]
            if shape != wanted or types != ("f32", types[1], types[1], "f32"):
                raise PtxError("a shape")
            sums = " ".join([self.array("f32", "d", c, 4), self.array("b32", "a", a, 4), self.array("b32", "b", b, 2)])
            product = f"ptx::mma_{types[1]}(d, a, b);"
        t = types[0]
        puts = " ".join(self.put(x, t, f"d[{k}]") for k, x in enumerate(self.parts(to)))
        return f"{{ {sums} {product} {puts} }}"


def label(name: str) -> str:
    return "L_" + re.sub(r"\W", "_", name)
