# SPDX-License-Identifier: Apache-2.0
"""PTX to C++: a function for a thread, made of the operations of ``emulated_cuda/ptx.h``.

Example:
    >>> text, blocks = translate(parse(ptx)["_product"])     # C++, and the instructions of each counted stretch

An instruction becomes one C++ statement, under a ``#line`` of its line in the PTX: so reports name that. Registers are
integers of their size, and what a float instruction reads and writes are the bits. What is not known here is an error.
"""

from __future__ import annotations

from collections.abc import Callable

from .parse import Kernel, Statement, size_of

C_TYPES = {"f32": "float", "f64": "double", "pred": "bool"} | {
    f"{kind}{size}": f"{'' if kind == 's' else 'u'}int{size}_t" for kind in "bsu" for size in (8, 16, 32, 64)
}
REGISTERS = {"pred": "bool", "b16": "uint16_t", "b32": "uint32_t", "b64": "uint64_t"}
COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
COMPARISONS |= {"lo": "<", "ls": "<=", "hi": ">", "hs": ">="}
INFIX = {"add": "+", "sub": "-", "and": "&", "or": "|", "xor": "^", "rem": "%", "div": "/", "mul": "*"}
HALVES = {"bf16": "BFloat16", "f16": "Half", "bf16x2": "BFloat16", "f16x2": "Half"}
SPECIAL = {
    "%tid.x": "ptx::thread()",
    "%laneid": "ptx::thread() % 32",
    "%ctaid.x": "ptx::block_x()",
    "%ctaid.y": "ptx::block_y()",
    "%ntid.x": "ptx::threads",
    "%nctaid.x": "ptx::blocks_x",
    "%nctaid.y": "ptx::blocks_y",
    **dict.fromkeys(("%tid.y", "%tid.z", "%ctaid.z"), "0u"),
    **dict.fromkeys(("%ntid.y", "%ntid.z", "%nctaid.z"), "1u"),
}


def name_of(register: str) -> str:
    return register.replace("%", "").replace("$", "_")


class Translator:
    """One kernel's translation."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.symbols = {p.name: p.offset for p in kernel.parameters} | kernel.shared

    # ---- operands

    def read(self, operand: str, type: str) -> str:
        """The operand as a value of a PTX type."""
        if operand in self.kernel.registers:
            value = name_of(operand)
            return f"ptx::f({value})" if type == "f32" else f"({C_TYPES[type]}){value}"
        if operand in SPECIAL:
            return f"({C_TYPES[type]})({SPECIAL[operand]})"
        if operand in self.symbols:
            return f"({C_TYPES[type]}){self.symbols[operand]}"
        if operand.startswith(("0f", "0F")):
            bits = f"0x{operand[2:]}u"
            return f"ptx::f({bits})" if type == "f32" else f"({C_TYPES[type]}){bits}"
        try:
            value = int(operand.rstrip("U"), 0)
        except ValueError:
            raise ValueError(f"{operand!r} is neither a register, a number nor a variable") from None
        return f"({C_TYPES[type]}){value}{'ull' if value > 2**63 - 1 else 'll'}"

    def write(self, register: str, type: str, value: str) -> str:
        """The assignment of a value of a PTX type. A shorter integer fills a register by its sign."""
        if register == "_":
            return f"(void)({value});"
        if type == "f32":
            return f"{name_of(register)} = ptx::u({value});"
        kind = REGISTERS[self.kernel.registers[register]]
        return f"{name_of(register)} = ({kind})({C_TYPES[type]})({value});"

    def address(self, operand: str, type: str = "u64") -> str:
        base, sign, offset = operand.partition("+")
        if not sign and operand.rfind("-") > 0:
            base, sign, offset = operand.rpartition("-")
        base = self.read(base.strip(), type)
        return f"({base} {sign} {int(offset, 0)})" if sign else base

    # ---- instructions

    def statement(self, s: Statement) -> str:
        if s.predicate:
            s = Statement(s.line, s.opcode, s.operands)
        handler: Callable[[Statement], str] | None = getattr(self, f"_{s.base}", None)
        if handler is None:
            raise ValueError(f"line {s.line}: {s.opcode} is not known to support/ptx/translate.py")
        return handler(s)

    def _infix(self, s: Statement) -> str:
        to, a, b = s.operands
        known = {"f32", "rn", "ftz", "full", "approx", "lo", s.type}
        if unknown := set(s.modifiers) - known:
            raise ValueError(f"line {s.line}: {s.opcode}: {unknown} is not known")
        a, b = self.read(a, s.type), self.read(b, s.type)
        if s.base in ("div", "rem") and s.type != "f32":
            return self.write(to, s.type, f"ptx::{s.base}({a}, {b})")
        if s.base == "div" and "rn" not in s.modifiers:
            return self._rounded(s, f"ptx::divided({a}, {b})")
        return self._rounded(s, f"{a} {INFIX[s.base]} {b}")

    def _rounded(self, s: Statement, value: str) -> str:
        """The assignment, of what .ftz flushes to zero."""
        return self.write(s.operands[0], s.type, f"ptx::flushed({value})" if "ftz" in s.modifiers else value)

    _add = _sub = _and = _or = _xor = _rem = _div = _infix

    def _mul(self, s: Statement) -> str:
        to, a, b, *c = s.operands
        wide = {16: 32, 32: 64}.get(8 * size_of(s.type), 0)
        if "wide" in s.modifiers:
            long = f"{s.type[0]}{wide}"
            value = f"({C_TYPES[long]}){self.read(a, s.type)} * {self.read(b, s.type)}"
            return self.write(to, long, value + (f" + {self.read(c[0], long)}" if c else ""))
        if "hi" in s.modifiers:
            value = f"ptx::high({self.read(a, s.type)}, {self.read(b, s.type)})"
            return self.write(to, s.type, value + (f" + {self.read(c[0], s.type)}" if c else ""))
        if c:
            value = f"{self.read(a, s.type)} * {self.read(b, s.type)} + {self.read(c[0], s.type)}"
            return self.write(to, s.type, value)
        return self._infix(s)

    _mad = _mul

    def _call(self, s: Statement, function: str, *types: str) -> str:
        """The operation of ptx.h on the operands, of the instruction's type or of `types`."""
        kinds = types or (s.type,) * (len(s.operands) - 1)
        values = [self.read(x, type) for x, type in zip(s.operands[1:], kinds, strict=True)]
        return self._rounded(s, f"ptx::{function}({', '.join(values)})")

    def _fma(self, s: Statement) -> str:
        return self._pairs(s, "fma_halves") if s.type == "f16x2" else self._call(s, "fma")

    def _neg(self, s: Statement) -> str:
        return self._call(s, "negative")

    def _abs(self, s: Statement) -> str:
        return self._call(s, "absolute")

    def _min(self, s: Statement) -> str:
        return self._call(s, f"{s.base}imum")

    _max = _min

    def _not(self, s: Statement) -> str:
        value = self.read(s.operands[1], s.type)
        return self.write(s.operands[0], s.type, f"!{value}" if s.type == "pred" else f"~{value}")

    def _shl(self, s: Statement) -> str:
        return self._call(s, {"shl": "left", "shr": "right"}[s.base], s.type, "u32")

    _shr = _shl

    def _bfe(self, s: Statement) -> str:
        return self._call(s, "extract", s.type, "u32", "u32")

    def _bfi(self, s: Statement) -> str:
        return self._call(s, "insert", s.type, s.type, "u32", "u32")

    def _prmt(self, s: Statement) -> str:
        return self._call(s, "permute")

    def _lop3(self, s: Statement) -> str:
        return self._call(s, "logic", "b32", "b32", "b32", "u32")

    def _shf(self, s: Statement) -> str:
        return self._call(s, f"funnel_{s.modifiers[0]}<{int('wrap' in s.modifiers)}>", "b32", "b32", "u32")

    def _ex2(self, s: Statement) -> str:
        return self._call(s, f"{s.base}<{int('ftz' in s.modifiers)}>")

    _lg2 = _ex2

    def _rcp(self, s: Statement) -> str:
        return self._call(s, f"{s.base}<{int('approx' in s.modifiers)}>")

    _rsqrt = _sqrt = _rcp

    def _tanh(self, s: Statement) -> str:
        return self._pairs(s, "tanh_halves") if s.type == "f16x2" else self._call(s, "tanh")

    def _pairs(self, s: Statement, function: str) -> str:
        """An operation of simt.h on two float16 a register."""
        values = (self.read(x, "b32") for x in s.operands[1:])
        return self.write(s.operands[0], "b32", f"{function}({', '.join(values)})")

    def _setp(self, s: Statement) -> str:
        to, a, b, *other = s.operands
        comparison, kind = s.modifiers[0], s.type
        a, b = self.read(a, kind), self.read(b, kind)
        plain = comparison if comparison in COMPARISONS else comparison.removesuffix("u")
        if comparison in ("nan", "num"):
            value = f"{'' if comparison == 'nan' else '!'}ptx::unordered({a}, {b})"
        else:
            value = f"({a} {COMPARISONS[plain]} {b})"
            if kind == "f32" and plain != comparison:
                value = f"({value} || ptx::unordered({a}, {b}))"
            elif kind == "f32" and plain == "ne":
                value = f"({value} && !ptx::unordered({a}, {b}))"
        to, _, opposite = to.partition("|")
        text, given = self.write(to, "pred", value), ""
        if other:
            operation = next(name for name in s.modifiers if name in ("and", "or", "xor"))
            negated, register = other[0].startswith("!"), other[0].lstrip("!")
            given = f" {INFIX[operation]} {'!' * negated}{self.read(register, 'pred')}"
            text = self.write(to, "pred", value + given)
        return text + (self.write(opposite, "pred", f"!{value}{given}") if opposite else "")

    def _selp(self, s: Statement) -> str:
        to, a, b, p = s.operands
        return self.write(to, s.type, f"{self.read(p, 'pred')} ? {self.read(a, s.type)} : {self.read(b, s.type)}")

    def _mov(self, s: Statement) -> str:
        to, value = s.operands
        if isinstance(to, tuple):
            size = 8 * size_of(s.type) // len(to)
            parts = [f"(v >> {size * i})" for i in range(len(to))]
            writes = [self.write(r, f"b{size}", part) for r, part in zip(to, parts, strict=True) if r != "_"]
            return f"{{ const auto v = {self.read(value, s.type)}; {' '.join(writes)} }}"
        if isinstance(value, tuple):
            size = 8 * size_of(s.type) // len(value)
            parts = [f"({C_TYPES[s.type]}){self.read(r, f'b{size}')} << {size * i}" for i, r in enumerate(value)]
            return self.write(to, s.type, " | ".join(parts))
        if s.type == "pred" and value not in self.kernel.registers:
            return self.write(to, "pred", f"{value} != 0")
        if value in SPECIAL or value not in self.symbols:
            kind = s.type.replace("f", "b")
            return self.write(to, kind, self.read(value, kind))
        return self.write(to, s.type, self.read(value, s.type))

    def _cvt(self, s: Statement) -> str:
        to, *values = s.operands
        *_, into, of = s.modifiers
        if into in HALVES and of == "f32":
            values = [self.read(v, "f32") for v in values]
            if into.endswith("x2"):
                return self.write(to, "b32", f"pack<{HALVES[into]}>({values[1]}, {values[0]})")
            return self.write(to, "b16", f"(uint16_t)pack<{HALVES[into]}>({values[0]}, 0)")
        if of in HALVES and into == "f32":
            return self.write(to, "f32", f"unpack({HALVES[of]}{{{self.read(values[0], 'b16')}}})")
        if into == "tf32":
            return self.write(to, "b32", f"ptx::to_tf32({self.read(values[0], 'f32')})")
        if of == "f32" and into != "f32":
            rounding = next(name for name in s.modifiers if name in ("rzi", "rni", "rmi", "rpi"))
            return self.write(to, into, f"ptx::{rounding}<{C_TYPES[into]}>({self.read(values[0], 'f32')})")
        return self.write(to, into, f"({C_TYPES[into]}){self.read(values[0], of)}")

    def _cvta(self, s: Statement) -> str:
        return self.write(s.operands[0], s.type, self.read(s.operands[1], s.type))

    # ---- memory

    def _ld(self, s: Statement) -> str:
        to, at = s.operands
        space, kind = s.modifiers[0], s.type
        registers = to if isinstance(to, tuple) else (to,)
        if space == "param":
            return self._parameter(registers, at, kind)
        place = self.address(at, "u32" if space == "shared" else "u64")
        loads = f"const auto v = ptx::load_{space}<{C_TYPES[kind.replace('f', 'u')]}, {len(registers)}>({place});"
        kind = kind.replace("f", "b")
        return f"{{ {loads} {' '.join(self.write(r, kind, f'v.x[{i}]') for i, r in enumerate(registers))} }}"

    def _parameter(self, registers: tuple[str, ...], at: str, kind: str) -> str:
        kind, place = kind.replace("f", "b"), self.address(at)
        step = size_of(kind)
        values = (f"ptx::parameter<{C_TYPES[kind]}>({place} + {step * i})" for i in range(len(registers)))
        return " ".join(self.write(r, kind, value) for r, value in zip(registers, values, strict=True))

    def _st(self, s: Statement) -> str:
        at, value = s.operands
        space, kind = s.modifiers[0], s.type.replace("f", "b")
        values = value if isinstance(value, tuple) else (value,)
        kind_c = C_TYPES[kind]
        place = self.address(at, "u32" if space == "shared" else "u64")
        made = ", ".join(self.read(v, kind) for v in values)
        return f"ptx::store_{space}(ptx::Several<{kind_c}, {len(values)}>{{{{{made}}}}}, {place});"

    def _cp(self, s: Statement) -> str:
        if "commit_group" in s.modifiers:
            return "commit_copies();"
        if "wait_group" in s.modifiers:
            return f"ptx::wait_copies({self.read(s.operands[0], 'u32')});"
        if "wait_all" in s.modifiers:
            return "commit_copies(); ptx::wait_copies(0);"
        to, at, size, *given = s.operands
        return (
            f"ptx::copy_async<{int(size, 0)}>({self.address(to, 'u32')}, {self.address(at)}, "
            f"{self.read(given[0] if given else size, 'u32')});"
        )

    # ---- all lanes together

    def _bar(self, s: Statement) -> str:
        if "warp" in s.modifiers:
            return f"ptx::whole({self.read(s.operands[0], 'u32')}); sync_warp();"
        if s.operands != ["0"]:
            raise ValueError(f"line {s.line}: {s.opcode} {s.operands}: only barrier 0 of all threads is known")
        return "sync_threads();"

    _barrier = _bar

    def _shfl(self, s: Statement) -> str:
        to, value, lane, clamp, mask = s.operands
        to, _, valid = to.partition("|")
        values = (self.read(x, "b32") for x in (value, lane, clamp, mask))
        text = f"const auto v = ptx::shuffle<ptx::Shuffle::{s.modifiers[1]}>({', '.join(values)}); "
        text += self.write(to, "b32", "v.value")
        return f"{{ {text} {self.write(valid, 'pred', 'v.valid') if valid else ''} }}"

    def _vote(self, s: Statement) -> str:
        to, value, mask = s.operands
        negated, value = "!" * value.startswith("!"), self.read(value.lstrip("!"), "pred")
        mode = s.modifiers[1]
        result = f"ptx::ballot({negated}{value}, {self.read(mask, 'u32')})"
        asked = {"any": f"{result} != 0", "all": f"{result} == ~0u", "ballot": result}
        return self.write(to, s.type, asked[mode])

    def _ldmatrix(self, s: Statement) -> str:
        to, at = s.operands
        trans = str("trans" in s.modifiers).lower()
        text = f"const auto v = ptx::load_matrices<{len(to)}, {trans}>({self.address(at, 'u32')});"
        return f"{{ {text} {' '.join(self.write(r, 'b32', f'v.x[{i}]') for i, r in enumerate(to))} }}"

    def _mma(self, s: Statement) -> str:
        to, a, b, c = s.operands
        shape, left = s.modifiers[2], s.modifiers[6]
        if s.modifiers[3:6] != ["row", "col", "f32"] or left not in ("bf16", "f16", "tf32"):
            raise ValueError(f"line {s.line}: {s.opcode} is not known")
        kind = "ptx::Tf32" if left == "tf32" else HALVES[left]
        assert (shape, len(a)) in (("m16n8k16", 4), ("m16n8k8", 4 if left == "tf32" else 2)), s.opcode
        values = [", ".join(self.read(x, "b32") for x in group) for group in (c, a, b)]
        text = (
            f"const auto v = ptx::mma<{kind}, {len(a)}>({{{{{values[0]}}}}}, {{{{{values[1]}}}}}, {{{{{values[2]}}}}});"
        )
        return f"{{ {text} {' '.join(self.write(r, 'b32', f'v.x[{i}]') for i, r in enumerate(to))} }}"

    # ---- flow

    def _bra(self, s: Statement) -> str:
        return f"goto {name_of(s.operands[0])};"

    def _ret(self, s: Statement) -> str:
        return "return;"

    _exit = _ret


def translate(kernel: Kernel) -> tuple[str, list[list[Statement]]]:
    """The C++ of a kernel, and its stretches of instructions: of each, the function counts how often a thread comes by.

    Raises:
        ValueError: an instruction is not known here, and which.
    """
    translator = Translator(kernel)
    targets = {s.operands[0] for s in kernel.statements if s.base == "bra"}
    stretches: list[list[Statement]] = []
    text = []
    begins = True
    for s in kernel.statements:
        if s.label:
            if s.label in targets:
                text.append(f"{name_of(s.label)}:;")
                begins = True
            continue
        if begins:
            text.append(f"++ptx::visits[{len(stretches)}];")
            stretches.append([])
            begins = False
        stretches[-1].append(s)
        made = translator.statement(s)
        if s.predicate:
            made = f"if ({'!' * s.predicate.startswith('!')}{name_of(s.predicate.lstrip('!'))}) {{ {made} }}"
        text.append(f'#line {s.line} "kernel.ptx"\n{made}')
        begins = s.base in ("bra", "ret", "exit")
    used = {type: [name_of(r) for r, kind in kernel.registers.items() if kind == type] for type in REGISTERS}
    declared = [f"  {REGISTERS[type]} {' = 0, '.join(names)} = 0;" for type, names in used.items() if names]
    body = "\n".join(text)
    return f"void kernel() {{\n{chr(10).join(declared)}\n{body}\n}}\n", stretches
