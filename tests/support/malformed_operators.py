# SPDX-License-Identifier: Apache-2.0
"""Well-formed calls of every raw operator, with seeded sizes that may be 0 or huge, for `gates.malformed`."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch

from mvit_kernels.backends import reference  # noqa: F401  (its raw operators)
from mvit_kernels.backends.library import SCHEMAS
from support.malformed_arguments import Call, T, Weights, Words, network

HUGE = (2**31 - 1, 2**31, 2**33 + 1, 2**40, 2**62, 2**63 - 1)


class Sizes:
    """Draws sizes: usual ones (multiples of 8 if `eights`, where there are such); if `wild`, also 0 and huge ones."""

    def __init__(self, r: random.Random, wild: bool, eights: bool) -> None:
        self.r, self.wild, self.eights = r, wild, eights

    def __call__(self, *usual: int) -> int:
        if self.wild and self.r.random() < 0.15:
            return self.r.choice((0, 0, 0, 1, self.r.choice(HUGE), 3, 17))
        return (
            self.r.choice([size for size in usual if size % 8 == 0] or usual) if self.eights else self.r.choice(usual)
        )


def _rows(s: Sizes, dtype: str) -> tuple[tuple[int, ...], int, Callable[..., T]]:
    leading = s.r.choice(((s(1, 3, 33),), (s(1, 2), s(5, 9)), (s(1, 2), s(2, 3), s(4, 5)), ()))
    return leading, s(1, 3, 8, 16, 24, 33), lambda *shape: T(shape, dtype)


def _statistics(dtype: str) -> str:
    return "float64" if dtype == "float64" else "float32"


def _batch_norm_activation(s, dtype):
    c = s(1, 3, 8, 16, 33)
    vectors = T((c,), dtype), T((c,), dtype)
    return T((s(2, 3), c, s(1, 4, 9), s(1, 5)), dtype), *vectors, 1e-5, s.r.choice(("", "silu"))


def _batch_norm_activation_backward(s, dtype):
    x, weight, bias, _, activation = _batch_norm_activation(s, dtype)
    statistic = T(weight.shape, _statistics(dtype))
    return x, x, statistic, statistic, weight, bias, activation


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


def _pack_network(s, dtype):
    base = "half" if dtype == "bfloat16" else "chain"
    return Words(base, stored=True), Weights(base, stored=True)


def _network(s, dtype):
    base = "half" if dtype == "bfloat16" else "chain"
    x = T((s(1, 2, 3), 3, s(1, 8, 15, 16), s(4, 9, 16)), dtype, s.r.choice(("contiguous", "transposed", "offset")))
    return x, Weights(base), Words(base), *network_sizes(base)


def network_sizes(base: str) -> tuple[int, int]:
    return network(base).out_channels, network(base).halvings


FRONTS = {name[1:]: value for name, value in list(globals().items()) if name[1:] in SCHEMAS}
NATIVE = {
    "network": _network,
    "pack_network": _pack_network,
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
    if operator in (*NATIVE, "transformer", "inverted_residual") and backend == "cpu":
        return ("float32", "bfloat16")
    return ("bfloat16", "float16") if backend == "cuda" else ("float32", "bfloat16", "float64")


def well_formed(operator: str, backend: str, r: random.Random, wild: bool = False) -> Call:
    make = {**FRONTS, **NATIVE}[operator]
    return Call(
        operator, backend, tuple(make(Sizes(r, wild, eights=backend == "cuda"), r.choice(dtypes_of(operator, backend))))
    )
