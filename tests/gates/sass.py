# SPDX-License-Identifier: Apache-2.0
"""The instructions of a listing, by cuobjdump or nvdisasm, and which of them are in loops: what runs once costs little,
what loops have costs a lot. `gates.machine_code` looks for mistakes in them.

Example:
    >>> {name: in_loops(code, lambda each: each.divides) for name, code in functions(listing.splitlines())}
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;")
_GUARD = re.compile(r"^@(!?U?P\w+)\s+")
_TARGET = re.compile(r"\b0x([0-9a-f]+)\s*$")
JUMPS = ("BRA", "BRX", "JMP", "JMX", "CALL", "WARPSYNC", "BSSY")  # what may name another instruction


class Instruction(NamedTuple):
    address: int
    guard: str  # "P0" or "!P0", the predicate under which it is executed; "" without one
    name: str  # with its modifiers: "I2F.U32.RP"
    operands: str

    def __str__(self) -> str:
        return f"{self.name} {self.operands}"

    @property
    def divides(self) -> bool:
        """Whether it begins an integer division: some twenty instructions around a reciprocal in floating point, whose
        operand is rounded up, as in no conversion that a program asks for."""
        return self.name.startswith("I2F") and ".RP" in self.name

    @property
    def spills(self) -> bool:
        """Whether it reads or writes the stack."""
        return self.name.split(".")[0] in ("LDL", "STL")


def instruction(line: str) -> Instruction | None:
    """What a line of a listing has; None for all other lines."""
    match = _LINE.match(line)
    if match is None:
        return None
    text = match[2]
    guard = _GUARD.match(text)
    name, _, operands = text[guard.end() if guard else 0 :].partition(" ")
    return Instruction(int(match[1], 16), guard[1] if guard else "", name, operands.strip())


def functions(lines: Iterable[str]) -> Iterator[tuple[str, list[Instruction]]]:
    """(mangled name, instructions) of each function in a listing by ``cuobjdump -sass``."""
    name, found = "", []
    for line in lines:
        if "Function :" in line:
            if name:
                yield name, found
            name, found = line.split()[-1], []
        elif each := instruction(line):
            found.append(each)
    if name:
        yield name, found


def successors(code: list[Instruction]) -> list[set[int]]:
    """For each instruction the numbers of those that may be executed next.

    A function that is called returns to any of its calls.

    Raises:
        ValueError: a jump whose target the listing does not tell.
    """
    place = {instruction.address: number for number, instruction in enumerate(code)}
    after_calls = {n + 1 for n, each in enumerate(code) if each.name.startswith("CALL") and n + 1 < len(code)}
    graph: list[set[int]] = []
    for number, each in enumerate(code):
        kind = each.name.split(".")[0]
        falls_through = each.guard != "" or kind not in ("BRA", "BRX", "JMP", "JMX", "EXIT", "RET", "CALL")
        falls_through |= kind == "BRA" and "," in each.operands  # BRA.DIV and the like have a condition of their own
        following = {number + 1} if falls_through and number + 1 < len(code) else set()
        if kind in JUMPS:
            target = None if kind in ("BRX", "JMX") else _TARGET.search(each.operands)
            if target and int(target[1], 16) in place:
                following.add(place[int(target[1], 16)])
            elif kind not in ("WARPSYNC", "BSSY"):
                raise ValueError(
                    f"{each.name} {each.operands} at {each.address:#x} jumps to where the listing does not tell"
                )
        elif kind == "RET":
            following |= after_calls
        graph.append(following)
    return graph


def cycles(graph: list[set[int]]) -> set[int]:
    """The nodes from which a path leads back to themselves: Tarjan's components, without recursion."""
    order: dict[int, int] = {}
    low: dict[int, int] = {}
    stack: list[int] = []
    on_stack: set[int] = set()
    found: set[int] = set()
    for start in range(len(graph)):
        if start in order:
            continue
        order[start] = low[start] = len(order)
        stack.append(start)
        on_stack.add(start)
        work = [(start, iter(graph[start]))]
        while work:
            node, rest = work[-1]
            for following in rest:
                if following not in order:
                    order[following] = low[following] = len(order)
                    stack.append(following)
                    on_stack.add(following)
                    work.append((following, iter(graph[following])))
                    break
                if following in on_stack:
                    low[node] = min(low[node], order[following])
            else:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[node])
                if low[node] == order[node]:
                    component = []
                    while not component or component[-1] != node:
                        component.append(stack.pop())
                        on_stack.discard(component[-1])
                    if len(component) > 1 or node in graph[node]:
                        found.update(component)
    return found


def in_loops(code: list[Instruction], which: Callable[[Instruction], bool]) -> int:
    """How many instructions for which `which` is true can be executed more than once."""
    if not any(map(which, code)):
        return 0
    return sum(which(code[number]) for number in cycles(successors(code)))
