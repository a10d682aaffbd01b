# SPDX-License-Identifier: Apache-2.0
"""Malformed direct calls of the raw operators: each must raise or return, and the process must survive.

    python -m gates.malformed [--backend cpu] [--count 20000] [--first 0] [--all]

Call number n of a backend is the same everywhere: a well-formed call of a seeded choice of sizes, some of which may
be 0 or huge, with up to three of its arguments made wrong. Calls run in a child of this process, in which well-formed
calls between them must keep giving the right values. A call that ends the child, or that takes longer
than `SECONDS`, is printed as a line to paste; ``--all`` goes on after it.
"""

from __future__ import annotations

import argparse
import mmap
import os
import random
import resource
import signal
import struct
import sys
import time
from dataclasses import replace
from math import inf, nan
from typing import Any

import torch

from mvit_kernels.backends import cpu
from support.malformed_arguments import DTYPES, LAYOUTS, Call, T, Weights, Words, network_of
from support.malformed_operators import HUGE, NATIVE, operators, well_formed

SECONDS = 60  # a call may take
MEMORY = 1 << 30  # bytes of address space that the child may add to what it starts with: no tensor of 2^31 elements
EVERY = 40  # calls between two well-formed ones
INTEGERS = (-(2**63), -(2**31), -3, -1, 0, 1, 2, 3, 5, 0x5555555555555556, *HUGE)
FLOATS = (0.0, -1.0, 1e308, nan, inf, -inf)


# ----------------------------------------------------------------------------------------------------- what is wrong


def malformed(number: int, backend: str) -> Call:
    """Call `number`: up to three wrong arguments, or possibly none where the sizes may be wild."""
    r = random.Random(f"{backend} {number}")
    names = _operators.setdefault(backend, operators(backend))
    call = well_formed(r.choice(names), backend, r, wild=r.random() < 0.5)
    arguments = list(call.arguments)
    for _ in range(r.choice((0, 1, 1, 1, 2, 3))):
        at = r.randrange(len(arguments))
        arguments[at] = changed(arguments[at], r, arguments)
    return call._replace(arguments=tuple(arguments))


_operators: dict[str, list[str]] = {}


def changed(argument: Any, r: random.Random, others: list[Any]) -> Any:
    if isinstance(argument, T):
        return _changed_tensor(argument, r, others)
    if isinstance(argument, Words):
        return _changed_words(argument, r)
    if isinstance(argument, Weights):
        total = network_of(argument).weights.numel()
        return replace(
            argument,
            base=r.choice(("chain", "half", argument.base, argument.base)),
            bytes_=r.choice((None, 0, 1, 64, total - 1, total - 64, total // 2)),
            dtype=r.choice(("uint8", "uint8", "uint8", "float32", "int64", "bool")),
            layout=r.choice(("contiguous", "contiguous", "strided", "offset", "two axes", "meta")),
        )
    if isinstance(argument, bool):
        return not argument
    if isinstance(argument, int):
        return r.choice((*INTEGERS, argument + 1, argument - 1, 2 * argument))
    if isinstance(argument, float):
        return r.choice(FLOATS)
    if isinstance(argument, str):
        return r.choice(("", "silu", "relu", "SiLU", "\0", "é" * 1000))
    if isinstance(argument, list):
        return _changed_list(argument, r, others)
    tensors = [other for other in others if isinstance(other, T)]  # in place of a None
    return r.choice((None, *tensors))


def _changed_tensor(t: T, r: random.Random, others: list[Any]) -> Any:
    shape, way = list(t.shape), r.random()
    if way < 0.35 and shape:
        at = r.randrange(len(shape))
        shape[at] = r.choice((0, 1, shape[at] - 1, shape[at] + 1, 2 * shape[at], r.choice(HUGE)))
        return T(tuple(max(0, size) for size in shape), t.dtype, t.layout, t.fill)
    if way < 0.5:
        shapes = (shape[1:], shape[:-1], [*shape, 1], [1, *shape], shape[::-1], [], [0], [0] * len(shape))
        return T(tuple(r.choice(shapes)), t.dtype, t.layout, t.fill)
    if way < 0.65:
        return T(t.shape, r.choice(DTYPES), t.layout, t.fill)
    if way < 0.85:
        return T(t.shape, t.dtype, r.choice(LAYOUTS), t.fill)
    if way < 0.92:
        return T(t.shape, t.dtype, t.layout, r.choice(FLOATS))
    return None if way < 0.94 else r.choice([other for other in others if isinstance(other, T)])


def _changed_words(words: Words, r: random.Random) -> Words:
    program = network_of(words).program.tolist()
    steps, at = [], words.steps_at()
    for _ in range(program[3]):
        steps.append((at, at + program[at]))
        at += program[at]
    way, replaced = r.random(), dict(words.replaced)
    if way < 0.7:
        for _ in range(r.choice((1, 1, 2, 4))):
            begin, end = r.choice((*steps, (0, 4), (4, words.steps_at())))
            word = r.randrange(begin, end)
            value = (program[word] + 1, program[word] - 1, program[word] + 2, -program[word], 2 * program[word])
            usual = r.choice((r.randrange(-2, 40), r.choice(program), 64 * r.randrange(10**4)))
            replaced[word] = r.choice((*value, usual, usual, r.choice(INTEGERS)))
        replaced = {word: (value + 2**63) % 2**64 - 2**63 for word, value in replaced.items()}
        return replace(words, replaced=tuple(replaced.items()))
    keep = list(range(len(program)))
    if way < 0.8:
        keep = keep[: r.randrange(len(keep))]
    elif way < 0.9:  # steps in another order, one twice or one missing
        order = steps[:]
        r.choice((r.shuffle, lambda o: o.pop(r.randrange(len(o))), lambda o: o.insert(0, r.choice(o))))(order)
        keep = [*range(steps[0][0]), *(word for begin, end in order for word in range(begin, end))]
        if len(order) != len(steps) and r.random() < 0.8:
            replaced[3] = len(order)
    elif way < 0.95:
        r.shuffle(keep)
    else:
        return replace(
            words,
            base=r.choice(("chain", "half")),
            dtype=r.choice(("int32", "float64", "int64")),
            layout=r.choice(("strided", "offset", "two axes", "meta", "contiguous")),
        )
    return replace(words, replaced=tuple(replaced.items()), keep=tuple(keep))


def _changed_list(values: list[Any], r: random.Random, others: list[Any]) -> Any:
    way = r.random()
    if way < 0.15:
        return []
    if way < 0.3:
        return values[: r.randrange(len(values) + 1)]
    if way < 0.4:
        return values + values[: r.randrange(len(values) + 1)]
    if way < 0.5:
        return r.sample(values, len(values))
    if not values:
        return values
    at = r.randrange(len(values))
    return [*values[:at], changed(values[at], r, others), *values[at + 1 :]]


# ------------------------------------------------------------------------------------------------------------ running


class Sentinel:
    """Well-formed calls of every operator, compared with the reference at first and with those bits afterwards."""

    def __init__(self, backend: str) -> None:
        r = random.Random(f"well-formed calls of {backend}")
        self.calls = [well_formed(name, backend, r) for name in operators(backend) for _ in range(3)]
        self.expected = [_tensors(call()) for call in self.calls]
        for call, values in zip(self.calls, self.expected, strict=True):
            # Statistics that are not x's: CPU kernels correct them, and a lone token's score takes no gradient.
            of_statistics = call.operator in ("layer_norm_linear_backward", "layer_norm_mlp_backward")
            of_statistics |= (call.operator, backend) == ("layer_norm_backward", "cpu")
            of_statistics |= call.operator == "patch_attention_backward" and call.arguments[3].shape[-1] == 1
            if call.operator not in NATIVE and backend != "reference" and not of_statistics:
                for ours, right in zip(values, _tensors(call._replace(backend="reference")()), strict=True):
                    tolerance = 3e-2 if "16" in str(ours.dtype) else 1e-3
                    torch.testing.assert_close(
                        ours, right, rtol=tolerance, atol=tolerance, msg=lambda m, c=call: f"{c}: {m}"
                    )

    def check(self, turn: int) -> None:
        at = turn % len(self.calls)
        for before, now in zip(self.expected[at], _tensors(self.calls[at]()), strict=True):
            assert torch.equal(before, now), f"no longer what it was: run({self.calls[at]!r})"


def _tensors(results: Any) -> list[torch.Tensor]:
    return list(results) if isinstance(results, tuple | list) else [results]


def run(call: Call) -> None:
    """The call, which may raise."""
    try:
        call()
    except Exception as error:
        print(f"{type(error).__name__}: {str(error)[:500]}")
    else:
        print("it returned")


def child(sentinel: Sentinel, backend: str, first: int, last: int, state: mmap.mmap, limited: bool) -> None:
    """Calls [first, last); `state` has the number of the one that runs, and how many raised."""
    if limited:
        used = int(open("/proc/self/statm").read().split()[0]) * mmap.PAGESIZE
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, -1))
    raised, made = 0, {}
    for number in range(first, last):
        state[:16] = struct.pack("qq", number, raised)
        call = malformed(number, backend)
        signal.setitimer(signal.ITIMER_REAL, SECONDS)  # its signal ends the process
        returned = made.setdefault(call.operator, [])
        try:
            with torch.no_grad():
                call()
            returned.append(True)
        except Exception:
            returned.append(False)
            raised += 1
        signal.setitimer(signal.ITIMER_REAL, 0)
        if number % EVERY == 0:
            sentinel.check(number // EVERY)
    for turn in range(len(sentinel.calls)):
        sentinel.check(turn)
    state[:16] = struct.pack("qq", last, raised)
    for operator, returned in made.items():
        print(f"{operator}: {sum(returned)} of {len(returned)} returned")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--backend", default="cpu", choices=("cpu", "cuda", "reference"), help="cuda: under emulation")
    parser.add_argument("--count", type=int, default=20000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--all", action="store_true", help="go on after a call that ended the process")
    args = parser.parse_args()
    if args.backend == "cpu" and cpu.BACKEND.unavailable("cpu"):
        sys.exit(cpu.BACKEND.unavailable("cpu")[0])
    if args.backend == "cuda":
        from support.emulation import load_operators

        load_operators()
    torch.set_num_threads(1)
    sentinel = Sentinel(args.backend)
    state, begun, at, raised, deadly = mmap.mmap(-1, 16), time.monotonic(), args.first, 0, 0
    last = args.first + args.count
    sanitized = "libasan" in os.environ.get("LD_PRELOAD", "")  # it maps terabytes, and limits allocations by itself
    while at < last:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                child(sentinel, args.backend, at, last, state, limited=not sanitized)
                code = 0
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        number, done = struct.unpack("qq", state[:16])
        raised += done
        if code == 0:
            break
        deadly += 1
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        print(f"{how}, call {number}; PYTHONPATH=tests python -c \"from gates.malformed import *; "
              f'run({malformed(number, args.backend)!r})"', flush=True)  # fmt: skip
        at = number + 1
        if not args.all:
            break
    what = f"{raised} raised, {deadly} ended the process"
    print(f"{args.count} calls of {args.backend}, {what}; {time.monotonic() - begun:.0f} s")
    return int(deadly > 0)


if __name__ == "__main__":
    sys.exit(main())
