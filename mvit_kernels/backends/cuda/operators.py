# SPDX-License-Identifier: Apache-2.0
"""Which calls ``csrc/cuda`` can serve: for each operator, a function from a call to the reasons against it.

Only patch_attention has a gradient. Triton serves calls of the other operators that need one.
"""

from __future__ import annotations

import math

import torch

from .. import gpu
from ..contract import Call, Predicate
from .plans import INVERTED_RESIDUALS, plan_transformer

DTYPES = (torch.bfloat16, torch.float16)
# The same limits as in csrc/cuda/patch_attention.h and csrc/cuda/rows.h.
MAX_HEAD_DIM = 64
MAX_TOKENS = 2**16 - 1
MAX_TOKENS_WITH_GRADIENT = 4096
MAX_STRANDS = 2**31 - 1
MAX_NORM_WIDTH = 256
MAX_ROWS = 2**31 - 1
MAX_WIDTH = 2**20 - 8
# Limits of the one-launch transformer.
HEADS = 4
MAX_SEQUENCES = 2**31 - 1
# Limits of the inverted residual: pixels of an image, and of all together (there are fewer blocks than pixels).
MAX_PIXELS = 2**31 - 1
MAX_HIDDEN = 2**20 - 1


def _dtype(call: Call) -> list[str]:
    """The reason against a dtype without kernels."""
    return [] if call.dtype in DTYPES else [f"{call.dtype} is not supported in CUDA C++; bfloat16 and float16 are"]


def _patch_attention(call: Call) -> list[str]:
    reasons = _dtype(call)
    head_dim, heads, (ph, pw) = call.fact("head_dim"), call.fact("num_heads"), call.fact("patch_size")
    batch, height, width, _ = call.shape
    tokens, strands = (height // ph) * (width // pw), batch * ph * pw * heads
    if not call.fact("dense_rows"):
        reasons.append("the channels of qkv are not adjacent in memory; call .contiguous() first")
    if head_dim % 2 or head_dim > MAX_HEAD_DIM:
        reasons.append(f"heads of {head_dim} are not supported; even ones up to {MAX_HEAD_DIM} are")
    if tokens > MAX_TOKENS:
        reasons.append(f"sequences of {tokens} tokens are too long; at most {MAX_TOKENS} are supported")
    elif call.needs_grad and tokens > MAX_TOKENS_WITH_GRADIENT:
        reasons.append(
            f"sequences of {tokens} tokens are too long for a gradient; at most {MAX_TOKENS_WITH_GRADIENT} are "
            "supported"
        )
    if strands > MAX_STRANDS:
        reasons.append(f"{strands} sequences, counting each head; at most {MAX_STRANDS} are supported")
    return reasons


def _rows(call: Call, *tensors: str) -> list[str]:
    reasons = _dtype(call)
    if call.needs_grad:
        reasons.append(f"{call.operator} has no gradient in CUDA C++, and this call needs one")
    if not call.fact("contiguous"):
        reasons.append(f"{' or '.join(tensors)} is not contiguous; call .contiguous() first")
    if math.prod(call.shape[:-1]) > MAX_ROWS:
        reasons.append(f"{math.prod(call.shape[:-1])} rows; at most {MAX_ROWS} are supported")
    return reasons


def _width(name: str, width: int) -> list[str]:
    if 0 < width <= MAX_WIDTH and width % 8 == 0:
        return []
    return [f"{name} is {width}; a positive multiple of 8, at most {MAX_WIDTH}, is wanted"]


def _norm_width(width: int) -> list[str]:
    if width <= MAX_NORM_WIDTH:
        return []
    return [f"rows of {width} are too wide to be normalised in registers; widths up to {MAX_NORM_WIDTH} are supported"]


def _fits(needed: int) -> list[str]:
    available = gpu.limits().shared_bytes
    if needed <= available:
        return []
    return [f"a block needs {needed} bytes of shared memory; this GPU has {available} per block"]


def _row_bytes(width: int) -> int:
    """Bytes of a row of 16-bit elements in shared memory: an odd number of 16-byte units."""
    return 16 * (width // 8 | 1)


def product_bytes(width: int, normed: bool) -> int:
    """The least shared memory of a product's block, in bytes: one warp's 16 rows, and 32 columns' weights and biases.

    Args:
        width: elements of a row of x, a multiple of 8.
        normed: of `layer_norm_linear`, which keeps LayerNorm's parameters there too.
    """
    return (16 + 32) * _row_bytes(16 * math.ceil(width / 16)) + 64 + (16 * width if normed else 0)


def _linear_residual(call: Call) -> list[str]:
    width = call.shape[-1]
    reasons = _rows(call, "x", "residual") + _width("the width of x", width)
    return reasons + _width("out_features", call.fact("out_features")) + _fits(product_bytes(width, normed=False))


def _layer_norm_linear(call: Call) -> list[str]:
    width = call.shape[-1]
    reasons = _rows(call, "x") + _width("the width of x", width) + _norm_width(width)
    return reasons + _width("out_features", call.fact("out_features")) + _fits(product_bytes(width, normed=True))


def _layer_norm_mlp(call: Call) -> list[str]:
    width = call.shape[-1]
    reasons = _rows(call, "x") + _width("the width of x", width) + _norm_width(width)
    return reasons + _width("hidden_features", call.fact("hidden_features"))  # all widths fit the smallest GPU's 99 KB


def _transformer(call: Call) -> list[str]:
    reasons = _dtype(call)
    if not call.fact("same_widths"):
        reasons.append("its layers have different widths")
    if call.fact("num_heads") != HEADS:
        reasons.append(f"{call.fact('num_heads')} heads are not supported; {HEADS} are")
    if call.fact("hidden_features") == 0:
        reasons.append("hidden_features is 0; at least 1 is wanted")
    images, height, width, d = call.shape
    ph, pw = call.fact("patch_size")
    if images * ph * pw > MAX_SEQUENCES:
        reasons.append(f"{images * ph * pw} sequences; at most {MAX_SEQUENCES} are supported")
    # For one sequence: whether there is a plan does not depend on the number of images, and a trace must not either.
    plan = plan_transformer(d, call.fact("head_dim"), height // ph * (width // pw), 1, *gpu.limits())
    return [*reasons, plan] if isinstance(plan, str) else reasons


def _inverted_residual(call: Call) -> list[str]:
    reasons = _dtype(call)
    images, height, width, channels = call.shape
    out, stride, dilation = call.fact("out_features"), call.fact("stride"), call.fact("dilation")
    if not call.fact("dense_rows"):
        reasons.append("the channels of x are not adjacent in memory; call .contiguous() first")
    if dilation != 1:
        reasons.append(f"dilation {dilation} is not supported; 1 is")
    if not 0 < call.fact("hidden_features") <= MAX_HIDDEN:
        reasons.append(f"{call.fact('hidden_features')} hidden channels; 1 to {MAX_HIDDEN} are supported")
    if images * height * width > MAX_PIXELS:
        reasons.append(f"{images * height * width} pixels; at most {MAX_PIXELS} are supported")
    if (channels, out, stride) not in INVERTED_RESIDUALS:
        served = ", ".join(f"{c} to {o} with {s}" for c, o, s in INVERTED_RESIDUALS)
        return [*reasons, f"{channels} channels to {out} with stride {stride} are not supported; {served} are"]
    return reasons + _fits(INVERTED_RESIDUALS[channels, out, stride])


SUPPORTS: dict[str, Predicate] = {
    "layer_norm_linear": _layer_norm_linear,
    "patch_attention": _patch_attention,
    "linear_residual": _linear_residual,
    "layer_norm_mlp": _layer_norm_mlp,
    "transformer": _transformer,
    "inverted_residual": _inverted_residual,
}
