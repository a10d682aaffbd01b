# SPDX-License-Identifier: Apache-2.0
"""What ``torch.utils.flop_counter`` counts for our raw operators: their products, as for PyTorch's own.

Example:
    >>> with torch.utils.flop_counter.FlopCounterMode() as counter:
    ...     mvit_kernels.layer_norm_mlp(x, *weights)
    >>> counter.get_total_flops()

A multiplication and an addition are two FLOPs; norms, softmax and SiLU count as none. Backward operators recompute some
products of the forward pass, and those count, as they do for PyTorch's fused attention.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence

import torch

from .._utils.imports import after_import
from ..backends import library  # noqa: F401 (it defines the operators)

Shape = Sequence[int]


def flop_formula(name: str, get_raw: bool = False) -> Callable[[Callable], Callable]:
    """Register the decorated function for operator `name`, all backends. It is called with shapes in place of tensors,
    unless `get_raw`. It is registered when the counter is imported, which imports Triton: 0.1 to 0.4 s."""

    def register(formula: Callable) -> Callable:
        def with_counter() -> None:
            counter = sys.modules["torch.utils.flop_counter"]
            counter.register_flop_formula(getattr(torch.ops.mvit_kernels, name), get_raw=get_raw)(formula)

        after_import("torch.utils.flop_counter", with_counter)
        return formula

    return register


def linear_flops(x: Shape, weight: Shape) -> int:
    """Of rows x (…, k) times a weight (n, k)."""
    return 2 * math.prod(x[:-1]) * math.prod(weight)


def attention_flops(x: Shape, inner: int, patch_size: Shape) -> int:
    """Of scores and weighted values on a (B, H, W, …) map: a token attends to those at its position in every patch."""
    batch, height, width = x[:3]
    tokens = (height // patch_size[0]) * (width // patch_size[1])
    return 4 * batch * height * width * tokens * inner


def inverted_residual_flops(x: Shape, hidden: int, out: int, stride: int) -> int:
    """Of the three convolutions on a (B, H, W, C) map, with a depthwise filter of 3 × 3."""
    batch, height, width, channels = x
    pixels = ((height - 1) // stride + 1) * ((width - 1) // stride + 1)
    return 2 * batch * hidden * (height * width * channels + pixels * 9 + pixels * out)


def layer_flops(x: Shape, qkv: Shape, proj: Shape, fc1: Shape, fc2: Shape, patch_size: Shape) -> int:
    """Of one transformer layer on a (B, H, W, d) map, from the shapes of its linear weights."""
    inner = (*x[:-1], proj[1])
    rows = (
        linear_flops(x, qkv) + linear_flops(inner, proj) + linear_flops(x, fc1) + linear_flops((*x[:-1], fc2[1]), fc2)
    )
    return rows + attention_flops(x, proj[1], patch_size)


@flop_formula("layer_norm")
def _layer_norm(*arguments, out_shape=None) -> int:
    return 0


@flop_formula("layer_norm_backward")
def _layer_norm_backward(*arguments, out_shape=None) -> int:
    return 0


@flop_formula("batch_norm_activation")
def _batch_norm_activation(*arguments, out_shape=None) -> int:
    return 0


@flop_formula("batch_norm_activation_backward")
def _batch_norm_activation_backward(*arguments, out_shape=None) -> int:
    return 0


@flop_formula("layer_norm_linear")
def _layer_norm_linear(x, norm_weight, norm_bias, weight, *rest, out_shape=None) -> int:
    return linear_flops(x, weight)


@flop_formula("layer_norm_linear_backward")
def _layer_norm_linear_backward(
    grad_out, x, mean, rstd, norm_weight, norm_bias, weight, bias, activation, out_shape=None
) -> int:
    return (3 if activation else 2) * linear_flops(x, weight)


@flop_formula("patch_attention")
def _patch_attention(qkv, num_heads, patch_size, scale, out_shape=None) -> int:
    return attention_flops(qkv, qkv[-1] // 3, patch_size)


@flop_formula("patch_attention_backward")
def _patch_attention_backward(grad_out, qkv, out, logsumexp, num_heads, patch_size, scale, out_shape=None) -> int:
    return 5 * attention_flops(qkv, qkv[-1] // 3, patch_size) // 2  # the scores again, and four gradients


@flop_formula("linear_residual")
def _linear_residual(x, weight, *rest, out_shape=None) -> int:
    return linear_flops(x, weight)


@flop_formula("linear_residual_backward")
def _linear_residual_backward(grad_out, x, weight, out_shape=None) -> int:
    return 2 * linear_flops(x, weight)


@flop_formula("layer_norm_mlp")
def _layer_norm_mlp(x, norm_weight, norm_bias, fc1_weight, *rest, out_shape=None) -> int:
    return 2 * linear_flops(x, fc1_weight)


@flop_formula("layer_norm_mlp_backward")
def _layer_norm_mlp_backward(
    grad_out, x, mean, rstd, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, out_shape=None
) -> int:
    return 5 * linear_flops(x, fc1_weight)


@flop_formula("transformer_layer")
def _transformer_layer(x, *arguments, out_shape=None) -> int:
    qkv, proj, fc1, fc2 = arguments[2], arguments[4], arguments[8], arguments[10]
    return layer_flops(x, qkv, proj, fc1, fc2, arguments[14])


@flop_formula("transformer_layer_backward")
def _transformer_layer_backward(grad_out, x, *arguments, out_shape=None) -> int:
    qkv, proj, fc1, fc2 = arguments[9], arguments[11], arguments[14], arguments[16]
    again = linear_flops(x, qkv) + linear_flops(x, fc1) + attention_flops(x, proj[1], arguments[19]) // 2
    return 2 * layer_flops(x, qkv, proj, fc1, fc2, arguments[19]) + again


@flop_formula("inverted_residual")
def _inverted_residual(x, expand_weight, *arguments, out_shape=None) -> int:
    return inverted_residual_flops(x, expand_weight[0], arguments[3][0], arguments[5])


@flop_formula("transformer")
def _transformer(x, weights, final_norm_weight, final_norm_bias, num_heads, patch_size, eps, out_shape=None) -> int:
    layers = [weights[index : index + 12] for index in range(0, len(weights), 12)]
    return sum(layer_flops(x, layer[2], layer[4], layer[8], layer[10], patch_size) for layer in layers)
