# SPDX-License-Identifier: Apache-2.0
"""Every operator as it is usually written in PyTorch, in the given dtype: unfold, library layers, fold.

The tolerance rule measures this against float64 to learn how exact a dtype allows an implementation to be. The
transformer with live dropout is here too: sequences are unfolded, so its random draws are the ones that the usual
implementations make.
"""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from support.oracle import branch_factors


def unfold(x: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """(B, H, W, C) -> (B·P, N, C), by PyTorch's own unfold of the channels-first map."""
    (b, h, w, c), places = x.shape, patch_size[0] * patch_size[1]
    if b == 0:  # F.unfold takes no empty batch
        return x.reshape(0, h * w // places, c)
    columns = F.unfold(x.permute(0, 3, 1, 2), patch_size, stride=patch_size)  # (B, C·P, N)
    return columns.reshape(b, c, places, -1).permute(0, 2, 3, 1).flatten(0, 1).contiguous()


def fold(x: Tensor, like: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """(B·P, N, C) -> (B, H, W, C)."""
    (b, h, w, _), c = like.shape, x.shape[-1]
    if b == 0:
        return x.reshape(0, h, w, c)
    columns = x.unflatten(0, (b, -1)).permute(0, 3, 1, 2).flatten(1, 2)
    return F.fold(columns, (h, w), patch_size, stride=patch_size).permute(0, 2, 3, 1)


def layer_norm(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float) -> Tensor:
    """With parameters kept in float32, as mixed-precision training has it, the norm is computed there."""
    return F.layer_norm(x.to(norm_weight.dtype), (x.shape[-1],), norm_weight, norm_bias, eps).to(x.dtype)


def batch_norm_activation(x, weight, bias, running_mean, running_var, momentum, eps, activation) -> Tensor:
    y = F.batch_norm(x, running_mean, running_var, weight, bias, True, momentum, eps)
    return F.silu(y) if activation else y


def layer_norm_linear(x, norm_weight, norm_bias, weight, bias, eps, activation) -> Tensor:
    y = F.linear(layer_norm(x, norm_weight, norm_bias, eps), weight, bias)
    return F.silu(y) if activation else y


def attention(x: Tensor, num_heads: int, scale: float, dropout: float = 0.0) -> Tensor:
    """(S, N, 3·inner) -> (S, N, inner)."""
    s, n, channels = x.shape
    q, k, v = x.reshape(s, n, 3, num_heads, channels // (3 * num_heads)).permute(2, 0, 3, 1, 4)
    # With a scale of 0 or less the fused kernels of a GPU give NaN; the plain products are right everywhere.
    with sdpa_kernel(SDPBackend.MATH) if scale <= 0 else contextlib.nullcontext():
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scale)
    return out.transpose(1, 2).reshape(s, n, channels // 3)


def patch_attention(qkv, num_heads, patch_size, scale) -> Tensor:
    return fold(attention(unfold(qkv, patch_size), num_heads, scale), qkv, patch_size)


def linear_residual(x, weight, bias, residual) -> Tensor:
    return residual + F.linear(x, weight, bias)


def layer_norm_mlp(x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, eps) -> Tensor:
    hidden = F.silu(F.linear(layer_norm(x, norm_weight, norm_bias, eps), fc1_weight, fc1_bias))
    return x + F.linear(hidden, fc2_weight, fc2_bias)


def inverted_residual(
    x,
    expand_weight,
    expand_bias,
    depthwise_weight,
    depthwise_bias,
    project_weight,
    project_bias,
    stride,
    dilation,
    residual,
) -> Tensor:
    y = F.silu(F.conv2d(x.permute(0, 3, 1, 2), expand_weight[:, :, None, None], expand_bias))
    y = F.conv2d(y, depthwise_weight, depthwise_bias, stride, dilation, dilation, groups=y.shape[1])
    y = F.conv2d(F.silu(y), project_weight[:, :, None, None], project_bias).permute(0, 2, 3, 1)
    return x + y if residual else y


def drop_path(branch: Tensor, probability: float, scale_by_keep: bool) -> Tensor:
    """One draw for each row of a (S, N, d) batch of sequences."""
    if not probability:
        return branch
    keep = torch.empty(branch.shape[0], 1, 1, dtype=branch.dtype).bernoulli_(1 - probability)
    return branch * (keep / (1 - probability) if scale_by_keep and probability < 1 else keep)


def transformer_layer(x, layer, num_heads, patch_size, eps, dropout=None, seed=None) -> Tensor:
    """With masks that were drawn before, applied to a branch as PyTorch's dropout does it: in float32, rounded once."""
    norm1_w, norm1_b, qkv_w, qkv_b, proj_w, proj_b, norm2_w, norm2_b, fc1_w, fc1_b, fc2_w, fc2_b = layer

    def dropped(branch: Tensor, factor: Tensor | float) -> Tensor:
        if isinstance(factor, float):
            return branch
        return (branch.float() * factor.to(branch.device, torch.float32)).to(branch.dtype)

    factor1, factor2 = branch_factors(x, dropout, seed, patch_size)
    y = unfold(x, patch_size)
    qkv = F.linear(layer_norm(y, norm1_w, norm1_b, eps), qkv_w, qkv_b)
    branch = attention(qkv, num_heads, (proj_w.shape[1] // num_heads) ** -0.5)
    x = x + dropped(fold(F.linear(branch, proj_w, proj_b), x, patch_size), factor1)
    hidden = F.silu(F.linear(layer_norm(x, norm2_w, norm2_b, eps), fc1_w, fc1_b))
    return x + dropped(F.linear(hidden, fc2_w, fc2_b), factor2)


def transformer(x, layers, final_norm, num_heads, patch_size, eps, dropout=None) -> Tensor:
    """`dropout`: one (attention, projection, activation, mlp, path1, path2, path_scale) a layer, or None."""
    y = unfold(x, patch_size)
    for index, layer in enumerate(layers):
        norm1_w, norm1_b, qkv_w, qkv_b, proj_w, proj_b, norm2_w, norm2_b, fc1_w, fc1_b, fc2_w, fc2_b = layer
        p_attention, p_projection, p_activation, p_mlp, p_path1, p_path2, path_scale = (
            dropout[index] if dropout else (0.0,) * 6 + (True,)
        )
        qkv = F.linear(layer_norm(y, norm1_w, norm1_b, eps), qkv_w, qkv_b)
        branch = attention(qkv, num_heads, (proj_w.shape[1] // num_heads) ** -0.5, p_attention)
        branch = F.dropout(F.linear(branch, proj_w, proj_b), p_projection)
        y = y + drop_path(branch, p_path1, path_scale)
        branch = F.dropout(F.silu(F.linear(layer_norm(y, norm2_w, norm2_b, eps), fc1_w, fc1_b)), p_activation)
        branch = F.dropout(F.linear(branch, fc2_w, fc2_b), p_mlp)
        y = y + drop_path(branch, p_path2, path_scale)
    if final_norm is not None:
        y = layer_norm(y, *final_norm, eps)
    return fold(y, x, patch_size)


def transformer_on_map(x, layers, final_norm, num_heads, patch_size, eps, dropout=None) -> Tensor:
    (ph, pw), (height, width) = patch_size, x.shape[2:]
    whole = (-(-height // ph) * ph, -(-width // pw) * pw)
    if whole != (height, width):
        x = F.interpolate(x, whole, mode="bilinear", align_corners=False)
    y = transformer(x.permute(0, 2, 3, 1), layers, final_norm, num_heads, patch_size, eps, dropout).permute(0, 3, 1, 2)
    return F.interpolate(y, (height, width), mode="bilinear", align_corners=False) if whole != (height, width) else y
