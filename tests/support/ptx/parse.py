# SPDX-License-Identifier: Apache-2.0
"""PTX as nvcc and Triton write it, read into statements.

Example:
    >>> kernel = parse(Path("product.ptx").read_text())["_product"]
    >>> kernel.parameters[0], kernel.statements[0].opcode
    (Parameter(name='_product_param_0', type='u64', offset=0, size=8), 'ld.param.b64')
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

SIZES = {"pred": 1, "8": 1, "16": 2, "32": 4, "64": 8}


@dataclass(frozen=True)
class Parameter:
    """A parameter of a kernel: a number, a pointer, or a struct (then of type "b8"), at its offset among all."""

    name: str
    type: str
    offset: int
    size: int


@dataclass
class Statement:
    """An instruction, or a label if it has no opcode. A vector operand is a tuple, an address the text in brackets."""

    line: int  # in the whole text, from 1
    opcode: str = ""
    operands: list[str | tuple[str, ...]] = field(default_factory=list)
    predicate: str = ""  # "%p1", or "!%p1"
    label: str = ""

    @property
    def base(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def modifiers(self) -> list[str]:
        return self.opcode.replace("::", ".").split(".")[1:]

    @property
    def type(self) -> str:
        """The last modifier, which is the type of most instructions."""
        return self.opcode.rsplit(".", 1)[-1]


@dataclass
class Kernel:
    """An entry of a PTX text."""

    name: str
    parameters: list[Parameter]
    registers: dict[str, str]  # name → "pred", "b16", "b32" or "b64"
    statements: list[Statement]
    shared: dict[str, int]  # the offset of each variable in shared memory
    shared_size: int  # of the variables whose size is known
    text: list[str]  # lines of the whole text

    @property
    def parameter_bytes(self) -> int:
        return max((p.offset + p.size for p in self.parameters), default=0)

    def source(self, line: int) -> str:
        """The instruction of a line, and the line of source that it was compiled from, if the text says."""
        for earlier in reversed(self.text[:line]):
            if found := re.search(r"^\s*\.loc\b.*// (\S+)$", earlier):
                return f"{self.text[line - 1].strip()} of {found[1]}"
        return self.text[line - 1].strip()


def size_of(type: str) -> int:
    """Bytes of a PTX type."""
    return SIZES["pred" if type == "pred" else type.lstrip("bfsu")]


def parse(text: str) -> dict[str, Kernel]:
    """The kernels of a PTX text by name.

    Raises:
        ValueError: a statement is none that is known here.
    """
    code = re.sub(r"//[^\n]*", "", text)
    lines, shared, size = text.split("\n"), {}, 0
    declared = r"\.shared\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)(?:\[(\d*)\])?;"
    dynamic = []
    for align, type, name, count in re.findall(declared, code):
        if count == "" and f"{name}[]" in code:
            dynamic.append(name)
            continue
        step = int(align or size_of(type))
        shared[name] = size = -(-size // step) * step
        size += size_of(type) * int(count or 1)
    size = -(-size // 16) * 16
    shared |= dict.fromkeys(dynamic, size)
    kernels = {}
    for entry in re.finditer(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)[^{]*", code):
        registers: dict[str, str] = {}
        statements = list(_body(code, entry.end(), registers))
        kernels[entry[1]] = Kernel(entry[1], _parameters(entry[2]), registers, statements, shared, size, lines)
    return kernels


def _parameters(text: str) -> list[Parameter]:
    found, offset = [], 0
    for part in filter(str.strip, text.split(",")):
        match = re.search(r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\b.*?([\w$]+)(?:\[(\d+)\])?\s*$", part, re.S)
        step, size = int(match[1] or size_of(match[2])), size_of(match[2]) * int(match[4] or 1)
        offset = -(-offset // step) * step
        found.append(Parameter(match[3], match[2], offset, size))
        offset += size
    return found


_STATEMENT = re.compile(
    r"\s*(?:(?P<directive>\.(?:loc|file|section)\b[^\n]*)|(?P<brace>[{}])|(?P<label>[\w$]+):(?!:)|(?P<code>[^;]+);)"
)


def _body(code: str, start: int, registers: dict[str, str]) -> Iterator[Statement]:
    """The statements from the brace at `start` to the one that closes it. A register that is declared in inner braces
    gets a name of its own."""
    scopes: list[dict[str, str]] = []
    at, line, counted = start, 1, 0
    while match := _STATEMENT.match(code, at):
        at, begins = match.end(), match.start(match.lastgroup)
        line, counted = line + code.count("\n", counted, begins), begins
        if match["brace"] == "{":
            scopes.append({})
        elif match["brace"]:
            scopes.pop()
            if not scopes:
                return
        elif match["label"]:
            yield Statement(line, label=match["label"])
        elif match["code"] and match["code"].startswith(".reg"):
            for name, type in _declared(match["code"]):
                own = name if len(scopes) == 1 else f"{name}_{len(registers)}"
                scopes[-1][name], registers[own] = own, type
        elif match["code"] and not match["code"].startswith("."):
            yield _instruction(line, match["code"], scopes)
    raise ValueError(f"the kernel's body does not end: {code[at : at + 80]!r}")


def _declared(text: str) -> Iterator[tuple[str, str]]:
    type, names = re.match(r"\.reg\s+\.(\w+)\s+(.*)", text, re.S).groups()
    type = type if type == "pred" else f"b{max(16, 8 * size_of(type))}"
    for name in re.split(r"\s*,\s*", names.strip()):
        if many := re.match(r"(.*)<(\d+)>", name):
            yield from ((f"{many[1]}{i}", type) for i in range(int(many[2])))
        else:
            yield name, type


def _instruction(line: int, text: str, scopes: list[dict[str, str]]) -> Statement:
    match = re.match(r"(?:@(!?[%\w]+)\s+)?([a-z][\w.:]*)\s*(.*)", text, re.S)
    if not match:
        raise ValueError(f"line {line} is no instruction: {text!r}")
    renamed: dict[str, str] = {}
    for scope in scopes[1:]:
        renamed |= {name: own for name, own in scope.items() if name != own}

    def own(part: str) -> str:
        return (
            re.sub(r"[%\w$.]+", lambda word: renamed.get(word[0], word[0]), part.strip()) if renamed else part.strip()
        )

    operands = []
    for part in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", match[3]):
        inside = own(part.strip("{} "))
        operands.append(tuple(map(str.strip, inside.split(","))) if part.startswith("{") else inside.strip("[] "))
    return Statement(line, match[2], operands, own(match[1] or ""))
