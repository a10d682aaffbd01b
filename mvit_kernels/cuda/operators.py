# SPDX-License-Identifier: Apache-2.0
"""Which calls of the single operators ``csrc/cuda`` can serve: functions from a call to the reasons why not.

Only patch_attention has a gradient; a call of another that needs one is Triton's.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from ..backends import Call

DTYPES = (torch.bfloat16, torch.float16)
# As csrc/cuda/patch_attention.h and csrc/cuda/rows.h have them.
MAX_HEAD_DIM = 64
MAX_TOKENS = 2**16 - 1
MAX_TOKENS_WITH_GRADIENT = 4096
MAX_STRANDS = 2**31 - 1
MAX_NORM_WIDTH = 256
MAX_ROWS = 2**31 - 1
MAX_WIDTH = 2**20 - 8


def dtype_reasons(call: Call) -> list[str]:
    """Whether there are kernels for the dtype."""
    return [] if call.dtype in DTYPES else [f"{call.dtype} is not supported in CUDA C++; bfloat16 and float16 are"]


def patch_attention(call: Call) -> list[str]:
    reasons = dtype_reasons(call)
    head_dim, heads, (ph, pw) = call.fact("head_dim"), call.fact("num_heads"), call.fact("patch_size")
    batch, height, width, _ = call.shape
    tokens, strands = (height // ph) * (width // pw), batch * ph * pw * heads
    if not call.fact("dense_rows"):
        reasons.append("the channels of qkv are not adjacent in memory; call .contiguous() first")
    if head_dim % 2 or head_dim > MAX_HEAD_DIM:
        reasons.append(f"heads of {head_dim} are not supported; even ones up to {MAX_HEAD_DIM} are")
    if tokens > MAX_TOKENS:
        reasons.append(f"sequences of {tokens} tokens are too long; {MAX_TOKENS} go")
    elif call.needs_grad and tokens > MAX_TOKENS_WITH_GRADIENT:
        reasons.append(f"sequences of {tokens} tokens are too long for a gradient; {MAX_TOKENS_WITH_GRADIENT} go")
    if strands > MAX_STRANDS:
        reasons.append(f"{strands} heads of sequences are more than {MAX_STRANDS}")
    return reasons


def _rows(call: Call, *tensors: str) -> list[str]:
    reasons = dtype_reasons(call)
    if call.needs_grad:
        reasons.append(f"{call.operator} has no gradient in CUDA C++, and this call needs one")
    if not call.fact("contiguous"):
        reasons.append(f"{' or '.join(tensors)} is not contiguous; call .contiguous() first")
    if math.prod(call.shape[:-1]) > MAX_ROWS:
        reasons.append(f"{math.prod(call.shape[:-1])} rows are more than {MAX_ROWS}")
    return reasons


def _width(name: str, width: int) -> list[str]:
    if 0 < width <= MAX_WIDTH and width % 8 == 0:
        return []
    return [f"{name} is {width}; a multiple of 8 is wanted"]


def _norm_width(width: int) -> list[str]:
    if width <= MAX_NORM_WIDTH:
        return []
    return [f"rows of {width} are too wide to be normalised in registers; {MAX_NORM_WIDTH} go"]


def _fits(needed: int, device: Callable[[], tuple[int, int]]) -> list[str]:
    available = device()[1]
    if needed <= available:
        return []
    return [f"a block needs {needed} bytes of shared memory, and this GPU gives one {available}"]


def _row_bytes(width: int) -> int:
    """Of a row of 16-bit elements in shared memory, on an odd number of 16-byte units."""
    return 16 * (width // 8 | 1)


def product_bytes(width: int) -> int:
    """The least shared memory of a product's block: 32 rows, and two slots of 64 rows of weights, at most 256 wide."""
    parts = max(1, math.ceil(width / 256))
    depth = width if parts == 1 else 16 * math.ceil(math.ceil(width / parts) / 16)
    return 32 * _row_bytes(width) + 2 * 64 * _row_bytes(depth)


def mlp_bytes(width: int) -> int:
    """Of the MLP's block: 64 normalised rows and 64 hidden values of each, and the weights of these."""
    return (64 + 64) * _row_bytes(width) + (64 + 16 * math.ceil(width / 16)) * _row_bytes(64)


def row_wise(device: Callable[[], tuple[int, int]]) -> dict[str, Callable[[Call], list[str]]]:
    """The predicates that ask for the shared memory that `device` tells of."""

    def linear_residual(call: Call) -> list[str]:
        width = call.shape[-1]
        reasons = _rows(call, "x", "residual") + _width("the width of x", width)
        return reasons + _width("out_features", call.fact("out_features")) + _fits(product_bytes(width), device)

    def layer_norm_linear(call: Call) -> list[str]:
        width = call.shape[-1]
        reasons = _rows(call, "x") + _width("the width of x", width) + _norm_width(width)
        return reasons + _width("out_features", call.fact("out_features")) + _fits(product_bytes(width), device)

    def layer_norm_mlp(call: Call) -> list[str]:
        width = call.shape[-1]
        reasons = _rows(call, "x") + _width("the width of x", width) + _norm_width(width)
        return reasons + _width("hidden_features", call.fact("hidden_features")) + _fits(mlp_bytes(width), device)

    return {
        "layer_norm_linear": layer_norm_linear,
        "linear_residual": linear_residual,
        "layer_norm_mlp": layer_norm_mlp,
    }
