# SPDX-License-Identifier: Apache-2.0
"""Every operator as a plain function, differentiable by PyTorch itself, in every dtype including float64.

They run on a CPU without the compiled library and on an unsupported GPU, and they are what an exporter sees.

MobileViT: Mehta & Rastegari 2021, arXiv:2110.02178, section 3. The shapes are documented in ``ops/``.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._utils.transforms import again, gradients, transform
from ...dropout import LayerDropout, dropped

# ---------------------------------------------------------------------------------------------- sequences and maps


def to_sequences(x: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """(B, H, W, C) -> (B·ph·pw, N, C): one sequence for the tokens at one position of every patch (the paper's unfold).

    Args:
        x: (B, H, W, C), of any dtype.
        patch_size: (ph, pw); H and W are multiples of it, and N = H / ph · W / pw.
    """
    (ph, pw), (b, h, w, c) = patch_size, x.shape
    x = x.reshape(b, h // ph, ph, w // pw, pw, c).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(b * ph * pw, (h // ph) * (w // pw), c)


def to_map(sequences: Tensor, size: tuple[int, int], patch_size: tuple[int, int]) -> Tensor:
    """(B·ph·pw, N, C) -> (B, H, W, C): the inverse of `to_sequences` (the paper's fold).

    The batch size is passed as -1: the tracing ONNX exporter would record it as a constant, as it does all sizes of a
    tensor after attention.

    Args:
        sequences: (B·ph·pw, N, C), of any dtype.
        size: (H, W).
        patch_size: (ph, pw).
    """
    (ph, pw), (h, w), c = patch_size, size, sequences.shape[-1]
    x = sequences.reshape(-1, ph, pw, h // ph, w // pw, c).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(-1, h, w, c)


def _split_heads(qkv: Tensor, num_heads: int, patch_size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """(B, H, W, 3·inner) -> q, k, v, each (B·ph·pw, heads, N, head_dim)."""
    return to_sequences(qkv, patch_size).unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def _merge_heads(x: Tensor, size: tuple[int, int], patch_size: tuple[int, int]) -> Tensor:
    """(B·ph·pw, heads, N, head_dim) -> (B, H, W, inner)."""
    return to_map(x.transpose(1, 2).flatten(2), size, patch_size)


def constants(sizes: Sequence[int]) -> tuple[int, ...]:
    """Sizes that depend on weights alone, as ints also under ``torch.jit.trace``, where sizes are tensors."""
    if not torch.jit.is_tracing():
        return tuple(sizes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # it warns that they become constants
        return tuple(int(size) for size in sizes)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics and accumulation."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# --------------------------------------------------------------------------------------------------- plain functions


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm over the last axis, in x's dtype, also where the affine parameters are in float32."""
    width = constants(x.shape[-1:])
    if weight.dtype == x.dtype:
        return F.layer_norm(x, width, weight, bias, eps)
    return F.layer_norm(x.to(weight.dtype), width, weight, bias, eps).to(x.dtype)


def batch_norm_activation(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    activation: str | None,
) -> Tensor:
    """act(BN(x)) by the statistics of the batch, which the running ones learn from."""
    out = F.batch_norm(x, running_mean, running_var, weight, bias, True, momentum, eps)
    return F.silu(out) if activation else out


def layer_norm_linear(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    activation: str | None = None,
) -> Tensor:
    """act(LN(x) Wᵀ + b)."""
    out = F.linear(layer_norm(x, norm_weight, norm_bias, eps), weight, bias)
    return F.silu(out) if activation else out


def patch_attention(
    qkv: Tensor, num_heads: int, patch_size: tuple[int, int], scale: float, dropout: float = 0.0
) -> Tensor:
    """softmax(scale · q kᵀ) v within each patch-position sequence; `dropout` applies to the attention weights."""
    q, k, v = _split_heads(qkv, num_heads, patch_size)
    if scale <= 0:  # PyTorch's fused attention on a GPU takes the row maximum before it scales, and returns NaN
        q, scale = (-q, -scale) if scale else (0 * q, 1.0)
    if transform() and not dropout:  # PyTorch's fused attention has no forward-mode derivative either
        out = _attention(q, k, v, scale)
    else:
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scale)
        if out.requires_grad and not (dropout or torch.compiler.is_compiling() or torch.jit.is_tracing()):
            out = _DifferentiableAgain.apply(out, q, k, v, scale)
    return _merge_heads(out, (qkv.shape[1], qkv.shape[2]), patch_size)


def patch_attention_written_out(qkv: Tensor, num_heads: int, patch_size: tuple[int, int], scale: float) -> Tensor:
    """`patch_attention` from operators that all have derivatives of every order and mode."""
    out = _attention(*_split_heads(qkv, num_heads, patch_size), scale)
    return _merge_heads(out, (qkv.shape[1], qkv.shape[2]), patch_size)


def _attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    q, k, v, dtype = *(t.to(_wide(q.dtype)) for t in (q, k, v)), q.dtype
    return (torch.softmax(scale * (q @ k.transpose(-1, -2)), -1) @ v).to(dtype)


class _DifferentiableAgain(torch.autograd.Function):
    """`out`, the result of PyTorch's fused attention, whose backward has no derivative. Gradients that will be
    differentiated again bypass it and go through `_attention`."""

    @staticmethod
    def forward(ctx, out, q, k, v, scale):
        ctx.save_for_backward(q, k, v)
        ctx.scale = scale
        return out.view_as(out)

    @staticmethod
    def backward(ctx, grad_out):
        q, k, v = ctx.saved_tensors
        if not again():
            return grad_out, None, None, None, None
        return None, *gradients(_attention, grad_out, q, k, v, ctx.scale)


def linear_residual(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    """residual + x Wᵀ + b."""
    return residual + F.linear(x, weight, bias)


def layer_norm_mlp(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    eps: float,
) -> Tensor:
    """x + fc2(silu(fc1(LN(x))))."""
    hidden = layer_norm_linear(x, norm_weight, norm_bias, fc1_weight, fc1_bias, eps, "silu")
    return linear_residual(hidden, fc2_weight, fc2_bias, x)


def inverted_residual(
    x: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor,
    project_weight: Tensor,
    project_bias: Tensor,
    stride: int,
    dilation: int,
    residual: bool,
) -> Tensor:
    """project(silu(depthwise(silu(expand(x))))), plus x (MobileNetV2's block, arXiv:1801.04381, batch norms folded)."""
    y = F.silu(F.linear(x, expand_weight, expand_bias)).permute(0, 3, 1, 2)
    geometry = ((stride, stride), (dilation, dilation), (dilation, dilation), y.shape[1])
    one_column = is_one_column(y, depthwise_weight, *geometry)
    y = F.conv2d(F.pad(y, (0, stride)) if one_column else y, depthwise_weight, depthwise_bias, *geometry)
    y = y[..., :1] if one_column else y
    y = F.linear(F.silu(y).permute(0, 2, 3, 1), project_weight, project_bias)
    return x + y if residual else y


def is_one_column(
    x: Tensor,
    weight: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> bool:
    """Whether PyTorch gets this convolution wrong: dense, strided, in bfloat16 on the CPU, with one column of output.

    With AMX, oneDNN in torch 2.13 then multiplies uninitialised memory, and the result is 1e36 or NaN. Padding the map
    so that there is a second column, and dropping that, works around it.

    Args:
        x: (B, C, H, W).
        weight: (out, C / groups, kh, kw).
        stride, padding, dilation, groups: as in ``conv2d``, for (height, width).
    """
    if x.dtype != torch.bfloat16 or x.device.type != "cpu" or stride[1] == 1 or groups > 1:
        return False
    reach = dilation[1] * (weight.shape[3] - 1) + 1
    return x.shape[-1] + 2 * padding[1] - reach < stride[1]


def transformer_layer(
    x: Tensor,
    layer: Sequence[Any],
    num_heads: int,
    patch_size: tuple[int, int],
    eps: float,
    dropout: LayerDropout | None = None,
) -> Tensor:
    """One pre-norm layer, its dropout drawn by PyTorch."""
    attention, projection, activation, mlp, path1, path2, path_scale = dropout or LayerDropout()
    norm1_weight, norm1_bias, qkv_weight, qkv_bias, proj_weight, proj_bias = layer[:6]
    qkv = layer_norm_linear(x, norm1_weight, norm1_bias, qkv_weight, qkv_bias, eps)
    scale = (qkv.shape[-1] // (3 * num_heads)) ** -0.5
    attended = patch_attention(qkv, num_heads, patch_size, scale, attention)
    x = x + dropped(F.linear(attended, proj_weight, proj_bias), projection, path1, patch_size, path_scale)
    norm2_weight, norm2_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias = layer[6:]
    hidden = layer_norm_linear(x, norm2_weight, norm2_bias, fc1_weight, fc1_bias, eps, "silu")
    hidden = F.dropout(hidden, activation) if activation else hidden
    return x + dropped(F.linear(hidden, fc2_weight, fc2_bias), mlp, path2, patch_size, path_scale)


def transformer(
    x: Tensor,
    layers: Sequence[Sequence[Any]],
    final_norm: tuple[Tensor, Tensor] | None,
    num_heads: int,
    patch_size: tuple[int, int],
    eps: float,
) -> Tensor:
    """The whole stack. Everything but attention is row-wise, so the rows are put into sequence order once: a map of
    N × 1 tokens with 1 × 1 patches is one sequence, and attention on it copies nothing."""
    size = (x.shape[1], x.shape[2])
    rows = to_sequences(x, patch_size).unsqueeze(2)
    for layer in layers:
        rows = transformer_layer(rows, layer, num_heads, (1, 1), eps)
    if final_norm is not None:
        rows = layer_norm(rows, *final_norm, eps)
    return to_map(rows.squeeze(2), size, patch_size)
