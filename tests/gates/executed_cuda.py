# SPDX-License-Identifier: Apache-2.0
"""Which calls of the CUDA kernels `gates.executed` executes as nvcc compiles them, and what it counts of them.

Example:
    >>> for launch in launched("cuda small", 0):   # the first of CALLS["cuda small"]
    ...     print(launch.kernel, launch.counts["mma"])

The calls are made as the tests of ``tests/backends/cuda`` make them, by drivers whose launches run PTX
(`support.ptx.compiled_cuda`). Small ones reach every kernel; the others have the sizes of one image of MobileViT-S.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from backends.cuda import test_inverted_residual, test_mlp, test_patch_attention, test_rows, test_transformer
from gates.cuda_gate import nvcc_version, readable, tool
from support.cases import convert, make
from support.ptx.compiled_cuda import CompiledDriver, Launch

DTYPE = torch.bfloat16


def rows(operator: str, gpu: tuple[int, ...] = test_rows.H100, **sizes) -> Callable[[], CompiledDriver]:
    """A row-wise operator."""

    def call() -> CompiledDriver:
        driver = driver_of("mlp" if operator == "layer_norm_mlp" else "rows")
        tensors, settings = make(operator, sizes)
        test_rows.launch(driver, operator, convert(tensors, DTYPE), settings, 0, gpu)
        return driver

    return call


def attention(shape: tuple[int, int, int], head_dim: int, heads: int = 4) -> Callable[[], CompiledDriver]:
    """patch_attention of a map of patches of 2×2, and its gradient by every kernel that takes it."""

    def call() -> CompiledDriver:
        driver, patch, scale = driver_of("patch_attention"), (2, 2), head_dim**-0.5
        qkv, grad_out = test_patch_attention.draw(shape, heads, head_dim, patch, DTYPE)
        out, logsumexp = test_patch_attention.forward(driver, qkv, heads, patch, scale)
        for whole in (False, True)[: 1 + test_patch_attention.is_whole(qkv, heads, patch)]:
            test_patch_attention.backward(driver, grad_out, qkv, out, logsumexp, heads, patch, scale, whole)
        return driver

    return call


def transformer(**sizes) -> Callable[[], CompiledDriver]:
    """A stack in one launch."""

    def call() -> CompiledDriver:
        driver = driver_of("transformer")
        test_transformer.launched(driver, {"heads": 4, "patch": (2, 2), **sizes}, DTYPE)
        return driver

    return call


def inverted_residual(*shape, **how: bool) -> Callable[[], CompiledDriver]:
    """An inverted residual of (channels in, channels out, stride), in its larger or its `small` tile, with filters in
    float32 or with `half_filter`."""

    def call() -> CompiledDriver:
        driver = driver_of("inverted_residual")
        test_inverted_residual.launched(driver, test_inverted_residual.sizes_of(*shape), DTYPE, **how)
        return driver

    return call


def stage(side: int, width: int, layers: int) -> list[Callable[[], CompiledDriver]]:
    """A stage of MobileViT-S for one image, whose map has side² pixels."""
    shape = (1, side, side, width)
    return [
        rows("layer_norm_linear", shape=shape, n=3 * width),
        rows("linear_residual", shape=shape, n=width),
        rows("layer_norm_mlp", shape=shape, hidden=2 * width),
        rows("layer_norm_mlp", (*test_rows.H100, 0), shape=shape, hidden=2 * width),
        attention((1, side // 2, side // 2), width // 4),
        transformer(shape=shape, layers=layers),
    ]


CALLS: dict[str, list[Callable[[], CompiledDriver]]] = {
    "cuda small": [
        rows("linear_residual", shape=(33, 32), n=72, bias=False),
        rows("linear_residual", shape=(35, 480), n=72),  # weights in parts
        rows("layer_norm_linear", shape=(33, 80), n=72, activation="silu"),
        rows("layer_norm_mlp", shape=(65, 64), hidden=256),
        rows("layer_norm_mlp", test_mlp.STAY, shape=(65, 64), hidden=256),  # the kernel for many rows
        attention((2, 4, 4), 8),
        attention((1, 5, 13), 36, heads=1),  # 65 tokens
        transformer(shape=(1, 4, 6, 64)),
        transformer(shape=(1, 14, 14, 80), layers=1),  # 49 tokens
        inverted_residual(16, 16, 1),
        inverted_residual(48, 64, 2),
        inverted_residual(64, 64, 1),
        inverted_residual(64, 64, 1, small=True),
        inverted_residual(64, 64, 1, half_filter=True),
        inverted_residual(32, 64, 2, half_filter=True),
        inverted_residual(128, 160, 2),
        inverted_residual(128, 160, 2, small=True),
    ],
    "cuda s stage 3": stage(32, 144, 2),
    "cuda s stage 4": stage(16, 192, 4),
    "cuda s stage 5": stage(8, 240, 3),
}


@functools.cache
def driver_of(name: str) -> CompiledDriver:
    return CompiledDriver(name)


def launched(case: str, index: int) -> list[Launch]:
    """What a call launches, executed.

    Raises:
        EmulationFault: a kernel does what it must not.
    """
    driver = CALLS[case][index]()
    found, driver.launched[:] = list(driver.launched), []
    return found


def kernel_of(launch: Launch) -> str:
    """`transformer_kernel<BFloat16, 144, 36, 2>`."""
    return readable([launch.kernel])[0]


def compiler() -> str | None:
    """`nvcc 13.0.88`, or None where there is none."""
    return f"nvcc {nvcc_version()}" if tool("nvcc") else None
