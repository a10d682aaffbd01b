# SPDX-License-Identifier: Apache-2.0
"""Malformed direct calls of the raw operators: each must raise or return, and the process go on.

    python tests/_malformed.py [--backend cpu] [--count 20000] [--first 0] [--all]

Call number n of a backend is the same everywhere: a well-formed call of a seeded choice of sizes, some of which may
be 0 or huge, with up to three of its arguments made wrong. They are made in a child of this process, in which well-formed
calls between them must go on giving the right values. A call that ends the child, or that takes longer than
`SECONDS`, is printed as a line to paste; ``--all`` goes on after it.
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
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch

import mvit_kernels  # noqa: F401
from mvit_kernels import cpu
from mvit_kernels._library import SCHEMAS

SECONDS = 60  # a call may take
MEMORY = 1 << 30  # bytes of addresses that the child may have beside those it begins with: no tensor of 2^31 elements
EVERY = 40  # calls between two well-formed ones
LARGE = 1 << 20  # elements of a tensor that is not made, but expanded from one
HUGE = (2**31 - 1, 2**31, 2**33 + 1, 2**40, 2**62, 2**63 - 1)
INTEGERS = (-(2**63), -(2**31), -3, -1, 0, 1, 2, 3, 5, 0x5555555555555556, *HUGE)
FLOATS = (0.0, -1.0, 1e308, float("nan"), float("inf"), float("-inf"))
DTYPES = (
    *("float32", "bfloat16", "float16", "float64", "complex64", "complex128", "bool", "uint8", "int8", "int32", "int64"),
    "float8_e4m3fn",
)
LAYOUTS = (
    *("contiguous", "transposed", "strided", "expanded", "overlapping", "offset", "negated", "meta", "sparse", "zero"),
    "needs_grad",
)


# ---------------------------------------------------------------------------------------------------------- arguments


class Spec:
    """What makes an argument; its literal leaves out what is as usual."""

    def __repr__(self) -> str:
        given = [(f.name, getattr(self, f.name), f.default) for f in fields(self)]
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value, usual in given if value != usual)})"


@dataclass(frozen=True, repr=False)
class T(Spec):
    """A tensor of these sizes; `fill` replaces its values."""

    shape: tuple[int, ...]
    dtype: str = "float32"
    layout: str = "contiguous"
    fill: float | None = None

    def make(self) -> torch.Tensor:
        dtype, numel = getattr(torch, self.dtype), 1
        for size in self.shape:
            numel *= size
        if self.layout == "meta":
            return torch.empty(self.shape, dtype=dtype, device="meta")
        if self.layout == "zero":
            return torch._efficientzerotensor(self.shape, dtype=dtype)
        if numel == 0:  # sizes whose strides overflow are possible too
            return torch.empty(0, dtype=dtype).as_strided(self.shape, [0] * len(self.shape))
        if numel > LARGE or self.layout == "overlapping":
            return self._values(1).to(dtype).as_strided(self.shape, [0] * len(self.shape))
        t = self._values(numel).to(dtype).view(self.shape)
        if self.layout == "transposed":
            return t.permute(*reversed(range(t.dim()))).contiguous().permute(*reversed(range(t.dim())))
        if self.layout == "strided":
            return t.repeat_interleave(2, -1)[..., ::2] if t.dim() else t
        if self.layout == "expanded":
            return t[:1].expand(self.shape) if t.dim() else t
        if self.layout == "offset":
            return torch.cat((t.flatten()[:1], t.flatten()))[1:].view(self.shape)
        if self.layout == "negated":
            return torch._neg_view(t)
        if self.layout == "sparse":
            return t.to_sparse()
        return t.requires_grad_() if self.layout == "needs_grad" else t

    def _values(self, count: int) -> torch.Tensor:
        if self.fill is not None:
            return torch.full((count,), self.fill)
        return _NOISE[:count].clone() if self.dtype.startswith(("float", "bfloat")) else _NOISE[:count] * 50


_NOISE = torch.randn(LARGE, generator=torch.Generator().manual_seed(0)) * 0.3


@dataclass(frozen=True, repr=False)
class Words(Spec):
    """The program of `network(base)`, some of its words replaced, of the rest those at `keep`, in this order."""

    base: str
    replaced: tuple[tuple[int, int], ...] = ()
    keep: tuple[int, ...] | None = None
    dtype: str = "int64"
    layout: str = "contiguous"

    def make(self) -> torch.Tensor:
        words = network(self.base).program.clone()
        for at, word in self.replaced:
            words[at] = word
        if self.keep is not None:
            words = words[list(self.keep)]
        return lay_out(words, self.dtype, self.layout)


@dataclass(frozen=True, repr=False)
class Weights(Spec):
    """The packed weights of `network(base)`, all or the first `bytes_` of them."""

    base: str
    bytes_: int | None = None
    dtype: str = "uint8"
    layout: str = "contiguous"

    def make(self) -> torch.Tensor:
        return lay_out(network(self.base).weights[: self.bytes_].clone(), self.dtype, self.layout)


def lay_out(values: torch.Tensor, dtype: str, layout: str) -> torch.Tensor:
    values = values.to(getattr(torch, dtype))
    if layout == "strided":
        return values.repeat_interleave(2)[::2]
    if layout == "offset":
        return torch.cat((values[:1], values))[1:]
    if layout == "two axes":
        return values[None]
    return values.to("meta") if layout == "meta" else values


class Call(NamedTuple):
    """``mvit_kernels::<operator>.<backend>`` and its arguments, tensors as what makes them."""

    operator: str
    backend: str
    arguments: tuple[Any, ...]

    def make(self) -> tuple[Any, ...]:
        return tuple(
            [t if t is None else t.make() for t in a] if isinstance(a, list) and a and hasattr(a[0], "make") else _made(a)
            for a in self.arguments
        )

    def __call__(self) -> Any:
        return getattr(getattr(torch.ops.mvit_kernels, self.operator), self.backend)(*self.make())


def _made(argument: Any) -> Any:
    return argument.make() if hasattr(argument, "make") else argument


def network(base: str) -> Any:
    """A small frozen chain's native call: "chain" in float32, "half" in bfloat16 (pairs where the processor has them)."""
    if base not in _networks:
        from mvit_kernels.nn.network import Network
        from test_network import chain

        module, _ = chain()
        _networks[base] = Network(module.bfloat16() if base == "half" else module)
    return _networks[base]


_networks: dict[str, Any] = {}

# --------------------------------------------------------------------------------------------------- well-formed calls


class Sizes:
    """Draws sizes: usual ones, and where `wild` also 0 and the huge."""

    def __init__(self, r: random.Random, wild: bool) -> None:
        self.r, self.wild = r, wild

    def __call__(self, *usual: int) -> int:
        if self.wild and self.r.random() < 0.15:
            return self.r.choice((0, 0, 0, 1, self.r.choice(HUGE), 3, 17))
        return self.r.choice(usual)


def _rows(s: Sizes, dtype: str) -> tuple[tuple[int, ...], int, Callable[..., T]]:
    leading = s.r.choice(((s(1, 3, 33),), (s(1, 2), s(5, 9)), (s(1, 2), s(2, 3), s(4, 5)), ()))
    return leading, s(1, 3, 8, 16, 24, 33), lambda *shape: T(shape, dtype)


def _statistics(dtype: str) -> str:
    return "float64" if dtype == "float64" else "float32"


def _layer_norm(s, dtype):
    rows, d, t = _rows(s, dtype)
    return t(*rows, d), t(d), t(d), 1e-5


def _layer_norm_backward(s, dtype):
    rows, d, t = _rows(s, dtype)
    statistic = T(rows, _statistics(dtype))
    return t(*rows, d), t(*rows, d), statistic, statistic, t(d)


def _layer_norm_linear(s, dtype):
    rows, d, t = _rows(s, dtype)
    n = s(1, 8, 24, 33)
    return t(*rows, d), t(d), t(d), t(n, d), s.r.choice((None, t(n))), 1e-5, s.r.choice(("", "silu"))


def _layer_norm_linear_backward(s, dtype):
    rows, d, t = _rows(s, dtype)
    n, statistic = s(1, 8, 24, 33), T(rows, _statistics(dtype))
    weights = t(d), t(d), t(n, d), s.r.choice((None, t(n)))
    return t(*rows, n), t(*rows, d), statistic, statistic, *weights, s.r.choice(("", "silu"))


def _linear_residual(s, dtype):
    rows, d, t = _rows(s, dtype)
    n = s(1, 8, 24, 33)
    return t(*rows, d), t(n, d), s.r.choice((None, t(n))), t(*rows, n)


def _linear_residual_backward(s, dtype):
    rows, d, t = _rows(s, dtype)
    n = s(1, 8, 24, 33)
    return t(*rows, n), t(*rows, d), t(n, d)


def _layer_norm_mlp(s, dtype):
    rows, d, t = _rows(s, dtype)
    h = s(1, 8, 24, 33)
    return t(*rows, d), t(d), t(d), t(h, d), t(h), t(d, h), t(d), 1e-5


def _layer_norm_mlp_backward(s, dtype):
    rows, d, t = _rows(s, dtype)
    h, statistic = s(1, 8, 24, 33), T(rows, _statistics(dtype))
    return t(*rows, d), t(*rows, d), statistic, statistic, t(d), t(d), t(h, d), t(h), t(d, h)


def _map(s: Sizes, wide: bool = True) -> tuple[int, int, int, list[int], int]:
    """(B, H, W), the patch, and the number of tokens."""
    patch = [s(1, 2, 2), s(1, 2, 2, 3)]
    rows, columns = s(1, 2, 3), s(1, 2, 5)
    return s(1, 2), rows * patch[0], columns * patch[1], patch, rows * columns


def _patch_attention(s, dtype):
    b, h, w, patch, _ = _map(s)
    heads, head_dim = s(1, 2, 3), s(1, 4, 8, 17)
    return T((b, h, w, 3 * heads * head_dim), dtype), heads, patch, 0.3


def _patch_attention_backward(s, dtype):
    b, h, w, patch, tokens = _map(s)
    heads, head_dim = s(1, 2, 3), s(1, 4, 8, 17)
    out = T((b, h, w, heads * head_dim), dtype)
    logsumexp = T((b, patch[0] * patch[1], heads, tokens), _statistics(dtype))
    return out, T((b, h, w, 3 * heads * head_dim), dtype), out, logsumexp, heads, patch, 0.3


def _layer(s: Sizes, t: Callable[..., T], d: int, inner: int, hidden: int) -> list[T]:
    linear = t(3 * inner, d), t(3 * inner), t(d, inner), t(d)
    return [t(d), t(d), *linear, t(d), t(d), t(hidden, d), t(hidden), t(d, hidden), t(d)]


def _transformer(s, dtype):
    b, h, w, patch, _ = _map(s)
    heads, head_dim, d, hidden = s(1, 2, 3), s(1, 4, 8), s(4, 8, 20), s(1, 8, 31)

    def t(*shape):
        return T(shape, dtype)

    weights = [w for _ in range(s.r.choice((1, 2))) for w in _layer(s, t, d, heads * head_dim, hidden)]
    norm = s.r.choice(((None, None), (t(d), t(d))))
    return t(b, h, w, d), weights, *norm, heads, patch, 1e-5


def _transformer_layer(s, dtype):
    b, h, w, patch, _ = _map(s)
    heads, head_dim, d, hidden = s(1, 2, 3), s(1, 4, 8), s(4, 8, 20), s(1, 8, 31)

    def t(*shape):
        return T(shape, dtype)

    layer = _layer(s, t, d, heads * head_dim, hidden)
    return t(b, h, w, d), *layer, None, heads, patch, 1e-5, [0.0] * 4, False


def _transformer_layer_backward(s, dtype):
    b, h, w, patch, tokens = _map(s)
    heads, head_dim, d, hidden = s(1, 2, 3), s(1, 4, 8), s(4, 8, 20), s(1, 8, 31)

    def t(*shape):
        return T(shape, dtype)

    layer, x, statistic = _layer(s, t, d, heads * head_dim, hidden), t(b, h, w, d), T((b, h, w), _statistics(dtype))
    weights = [layer[i] for i in (0, 1, 2, 3, 4, 6, 7, 8, 9, 10)]
    logsumexp = T((b, patch[0] * patch[1], heads, tokens), _statistics(dtype))
    saved = statistic, statistic, t(b, h, w, heads * head_dim), logsumexp, x, statistic, statistic
    return x, x, *saved, *weights, None, heads, patch, 1e-5, [0.0] * 4, False


def _inverted_residual(s, dtype):
    c, hidden, out, residual = s(1, 3, 8), s(1, 8, 17, 32), s(1, 5, 8), s.r.random() < 0.3

    def t(*shape):
        return T(shape, dtype)

    out, stride = (c, 1) if residual else (out, s.r.choice((1, 2)))
    weights = t(hidden, c), t(hidden), t(hidden, 1, 3, 3), t(hidden), t(out, hidden), t(out)
    return t(s(1, 2), s(1, 4, 7), s(1, 5, 6), c), *weights, stride, s(1, 1, 2, 3), residual


def _pack_convolution(s, dtype):
    out, width, kernel = s(1, 8, 33), s(1, 4, 17), s(1, 3)
    return T((out, width, kernel, kernel), dtype), T((out,))


def _pack_inverted_residual(s, dtype):
    c, hidden, out = s(1, 4, 17), s(1, 8, 33), s(1, 5, 16)
    weights = T((hidden, c), dtype), T((hidden, 1, 3, 3), dtype), T((out, hidden), dtype)
    return weights[0], T((hidden,)), weights[1], T((hidden,)), weights[2], T((out,))


def _network(s, dtype):
    base = "half" if dtype == "bfloat16" else "chain"
    x = T((s(1, 2, 3), 3, s(1, 8, 15, 16), s(4, 9, 16)), dtype, s.r.choice(("contiguous", "transposed", "offset")))
    return x, Weights(base), Words(base), *network_sizes(base)


def network_sizes(base: str) -> tuple[int, int]:
    return network(base).out_channels, network(base).halvings


FRONTS = {name[1:]: value for name, value in list(globals().items()) if name[1:] in SCHEMAS}
NATIVE = {
    "network": _network,
    "pack_convolution": _pack_convolution,
    "pack_inverted_residual": _pack_inverted_residual,
}


def operators(backend: str) -> list[str]:
    """Those that `backend` has for CPU tensors."""
    names = [*SCHEMAS, *NATIVE] if backend == "cpu" else [*SCHEMAS]
    found = [n for n in names if backend == "reference" or _has_kernel(f"mvit_kernels::{n}.{backend}")]
    assert found, f"there are no kernels of {backend}"
    return found


def _has_kernel(name: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU")


def dtypes_of(operator: str, backend: str) -> tuple[str, ...]:
    if operator in NATIVE and not cpu.multiplies_bf16_pairs() and operator != "network":
        return ("float32",)
    if operator in (*NATIVE, "transformer", "inverted_residual") and backend == "cpu":
        return ("float32", "bfloat16")
    return ("bfloat16", "float16") if backend == "cuda" else ("float32", "bfloat16", "float64")


def well_formed(operator: str, backend: str, r: random.Random, wild: bool = False) -> Call:
    make = {**FRONTS, **NATIVE}[operator]
    return Call(operator, backend, tuple(make(Sizes(r, wild), r.choice(dtypes_of(operator, backend)))))


# ----------------------------------------------------------------------------------------------------- what is wrong


def malformed(number: int, backend: str) -> Call:
    """Call `number`: up to three arguments are wrong, or none where the sizes may be wild."""
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
        total = network(argument.base).weights.numel()
        return Weights(
            r.choice(("chain", "half", argument.base, argument.base)),
            r.choice((None, 0, 1, 64, total - 1, total - 64, total // 2)),
            r.choice(("uint8", "uint8", "uint8", "float32", "int64", "bool")),
            r.choice(("contiguous", "contiguous", "strided", "offset", "two axes", "meta")),
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
    tensors = [other for other in others if isinstance(other, T)]  # of a None
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
    program = network(words.base).program.tolist()
    steps, at = [], 4 + 2 * program[2]
    for _ in range(program[3]):
        steps.append((at, at + program[at]))
        at += program[at]
    way, replaced = r.random(), dict(words.replaced)
    if way < 0.7:
        for _ in range(r.choice((1, 1, 2, 4))):
            begin, end = r.choice((*steps, (0, 4), (4, 4 + 2 * program[2])))
            word = r.randrange(begin, end)
            value = (program[word] + 1, program[word] - 1, program[word] + 2, -program[word], 2 * program[word])
            usual = r.choice((r.randrange(-2, 40), r.choice(program), 64 * r.randrange(10**4)))
            replaced[word] = r.choice((*value, usual, usual, r.choice(INTEGERS)))
        replaced = {word: (value + 2**63) % 2**64 - 2**63 for word, value in replaced.items()}
        return Words(words.base, tuple(replaced.items()), words.keep)
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
        return Words(r.choice(("chain", "half")), words.replaced, words.keep, r.choice(("int32", "float64", "int64")),
                     r.choice(("strided", "offset", "two axes", "meta", "contiguous")))  # fmt: skip
    return Words(words.base, tuple(replaced.items()), tuple(keep))


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
    """Well-formed calls of every operator, against the reference at first and against these bits afterwards."""

    def __init__(self, backend: str) -> None:
        r = random.Random(f"well-formed calls of {backend}")
        self.calls = [well_formed(name, backend, r) for name in operators(backend) for _ in range(3)]
        self.expected = [_tensors(call()) for call in self.calls]
        for call, values in zip(self.calls, self.expected, strict=True):
            if call.operator not in NATIVE and backend != "reference":
                for ours, right in zip(values, _tensors(call._replace(backend="reference")()), strict=True):
                    tolerance = 3e-2 if "16" in str(ours.dtype) else 1e-3
                    torch.testing.assert_close(ours, right, rtol=tolerance, atol=tolerance, msg=lambda m, c=call: f"{c}: {m}")

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


def child(backend: str, first: int, last: int, state: mmap.mmap, limited: bool) -> None:
    """Calls [first, last); `state` has the number of the one that runs, and how many raised."""
    torch.set_num_threads(1)
    sentinel = Sentinel(backend)
    if limited:
        used = int(open("/proc/self/statm").read().split()[0]) * mmap.PAGESIZE
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, -1))
    raised = 0
    for number in range(first, last):
        state[:16] = struct.pack("qq", number, raised)
        call = malformed(number, backend)
        signal.setitimer(signal.ITIMER_REAL, SECONDS)  # whose signal ends the process
        try:
            with torch.no_grad():
                call()
        except Exception:
            raised += 1
        signal.setitimer(signal.ITIMER_REAL, 0)
        if number % EVERY == 0:
            sentinel.check(number // EVERY)
    for turn in range(len(sentinel.calls)):
        sentinel.check(turn)
    state[:16] = struct.pack("qq", last, raised)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--backend", default="cpu", choices=("cpu", "cuda", "reference"), help="cuda: under emulation")
    parser.add_argument("--count", type=int, default=20000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--all", action="store_true", help="go on after a call that ended the process")
    args = parser.parse_args()
    if args.backend == "cpu" and cpu.unavailable("cpu"):
        sys.exit(cpu.unavailable("cpu")[0])
    if args.backend == "cuda":
        from _emulation import load_operators

        load_operators()
    state, begun, at, raised, deadly = mmap.mmap(-1, 16), time.monotonic(), args.first, 0, 0
    last = args.first + args.count
    sanitized = "libasan" in os.environ.get("LD_PRELOAD", "")  # it maps terabytes, and limits allocations by itself
    while at < last:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                child(args.backend, at, last, state, limited=not sanitized)
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
        print(f"{how}, call {number}; paste in tests/: PYTHONPATH=.. python -c \"from _malformed import *; "
              f'run({malformed(number, args.backend)!r})"', flush=True)  # fmt: skip
        at = number + 1
        if not args.all:
            break
    print(f"{args.backend}: {args.count} calls, {raised} raised, {deadly} ended the process; {time.monotonic() - begun:.0f} s")
    return int(deadly > 0)


if __name__ == "__main__":
    sys.exit(main())
