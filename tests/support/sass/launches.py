# SPDX-License-Identifier: Apache-2.0
"""Launches of the CUDA kernels as an H200 would get them: grid, threads, shared memory and parameters, by the library's
own host code.

Example:
    >>> launch, = cuda_launches("transformer", batch=256, side=32, width=144)
    >>> launch.kernel, launch.grid, launch.threads
    ('_ZN4mvit18transformer_kernel…', (1024, 1, 1), 256)

The host code is compiled for the emulation (`support.emulation`), whose launches go to a watcher. Tensors are addresses
without memory, far apart, so that `support.sass.trace` knows which tensor an access is to.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from dataclasses import dataclass

from support import emulation
from support.emulation import Driver
from support.sass.operands import address, constant_bank

MULTIPROCESSORS, SHARED_LIMIT = 132, 232_448
EPS = 1e-5
_WATCHER = ctypes.CFUNCTYPE(None, ctypes.c_char_p, *([ctypes.c_int64] * 4), ctypes.c_void_p, ctypes.c_int64)


@dataclass(frozen=True)
class Launch:
    kernel: str  # mangled
    grid: tuple[int, int, int]
    threads: int
    shared: int  # bytes, dynamic
    parameters: bytes

    def bank(self) -> bytes:
        return constant_bank(self.threads, self.grid, self.parameters)


def cuda_launches(operator: str, batch: int, side: int, width: int, **more: int) -> list[Launch]:
    """The launches of an operator on `batch` maps of side × side × width in bfloat16, with patches of 2 × 2, four heads
    and twice the width in the MLP, as MobileViT-S has them.

    Args:
        more: other sizes: ``layers``, ``hidden`` and what a plan has of transformer (``tiles``,
            ``sequences_of_a_block``); ``outs`` of layer_norm_linear and linear_residual; ``hidden`` of layer_norm_mlp;
            ``outs``, ``stride``, ``hidden`` and ``small`` of inverted_residual.

    Raises:
        LookupError: no such operator, or no kernel for these sizes.
    """
    if operator not in _OPERATORS:
        raise LookupError(f"no launch of {operator} is known; {', '.join(_OPERATORS)} are")
    return _OPERATORS[operator](batch, side, width, **more)


FOLDERS = [emulation.EMULATION]  # of drivers: the first that has one is taken


@functools.cache
def _driver(name: str, *macros: str) -> Driver:
    emulation.EMULATION = next(folder for folder in FOLDERS if (folder / f"{name}.cpp").exists())
    return Driver(name, macros=macros)


def _watched(driver: Driver, call: Callable[[], None]) -> list[Launch]:
    found: list[Launch] = []

    def watch(kernel, blocks_x, blocks_y, threads, shared, parameters, count):
        given = ctypes.string_at(parameters, count)
        found.append(Launch(kernel.decode(), (blocks_x, blocks_y, 1), threads, shared, given))

    watcher = _WATCHER(watch)
    driver._library.emulation_watch(watcher)
    try:
        call()
    finally:
        driver._library.emulation_watch(_WATCHER())
    if not found:
        raise RuntimeError(f"the call of {driver.name} launched nothing")
    return found


def _transformer(batch: int, side: int, width: int, layers: int = 0, hidden: int = 0, **cut: int) -> list[Launch]:
    from mvit_kernels.backends.cuda import plans

    tokens, head_dim = side * side // 4, width // 4
    plan = plans.plan_transformer(width, head_dim, tokens, 4 * batch, MULTIPROCESSORS, SHARED_LIMIT)
    if isinstance(plan, str):
        raise LookupError(plan)
    layers = layers or {32: 2, 16: 4, 8: 3}.get(side, 2)
    driver = _driver("transformer", f"MVIT_ONLY_ONE=find_transformer<{width}>(head_dim, tiles, half)")
    sizes = (0, batch, side, side, width, head_dim, 2, 2, layers, hidden or 2 * width, 1)
    pointers = map(address, range(3))
    return _watched(driver, lambda: driver.forward(0, *pointers, *sizes, EPS, *plan._replace(**cut)))


def _layer_norm_linear(batch: int, side: int, width: int, outs: int = 0) -> list[Launch]:
    driver, sizes = _driver("rows", "MVIT_ONLY_BFLOAT16"), (batch * side * side, width, outs or 3 * width)
    pointers, limits = map(address, range(8)), (MULTIPROCESSORS, SHARED_LIMIT)
    return _watched(driver, lambda: driver.layer_norm_linear(0, *pointers, *sizes, EPS, 0, 1, *limits, 0))


def _linear_residual(batch: int, side: int, width: int, outs: int = 0) -> list[Launch]:
    driver, sizes = _driver("rows", "MVIT_ONLY_BFLOAT16"), (batch * side * side, width, outs or width)
    pointers, limits = map(address, range(5)), (MULTIPROCESSORS, SHARED_LIMIT)
    return _watched(driver, lambda: driver.linear_residual(0, *pointers, *sizes, *limits, 0))


def _layer_norm_mlp(batch: int, side: int, width: int, hidden: int = 0) -> list[Launch]:
    driver, sizes = _driver("mlp", "MVIT_ONLY_BFLOAT16"), (batch * side * side, width, hidden or 2 * width)
    pointers, limits = map(address, range(10)), (MULTIPROCESSORS, SHARED_LIMIT)
    return _watched(driver, lambda: driver.layer_norm_mlp(0, *pointers, *sizes, EPS, 1, *limits, -1, 0))


def _patch_attention(batch: int, side: int, width: int) -> list[Launch]:
    driver, head_dim, half = _driver("patch_attention", "MVIT_ONLY_BFLOAT16"), width // 4, side // 2
    qkv = (address(0), side * side * 3 * width, side * 3 * width, 3 * width)
    out = (address(1), side * side * width, side * width, width)
    copy = next(size for size in (16, 8, 4) if 2 * head_dim % size == 0)
    sizes = (batch, half, half, 2, 2, 4, head_dim)
    return _watched(driver, lambda: driver.forward(0, *qkv, *out, address(2), *sizes, head_dim**-0.5, copy, 0))


def _inverted_residual(
    batch: int, side: int, width: int, outs: int = 0, stride: int = 1, hidden: int = 0, small: int = 0
) -> list[Launch]:
    outs = outs or width
    one = f"find_inverted_residual<{width}>({outs}, {stride}, {'true' if small else 'false'}, false, false)"
    driver = _driver("inverted_residual", f"MVIT_ONLY_ONE={one}")
    sizes = (batch, side, side, width, hidden or 4 * width, outs, stride, stride == 1 and width == outs, small)
    return _watched(driver, lambda: driver.forward(0, *map(address, range(3)), 0, *sizes))


_OPERATORS: dict[str, Callable[..., list[Launch]]] = {
    "transformer": _transformer,
    "layer_norm_linear": _layer_norm_linear,
    "linear_residual": _linear_residual,
    "layer_norm_mlp": _layer_norm_mlp,
    "patch_attention": _patch_attention,
    "inverted_residual": _inverted_residual,
}


def operators() -> list[str]:
    """Whose launches are known."""
    return list(_OPERATORS)
