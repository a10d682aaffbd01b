# SPDX-License-Identifier: Apache-2.0
"""The raw operators ``mvit_kernels::<name>.reference`` and ``…_backward.reference``.

They compute the same values as the plain functions, with the formulas that the kernels use: saved statistics,
recomputed intermediates, explicit gradients. They define what the raw operators of the other backends return, and test
the autograd functions in ``ops/`` without compiled code.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...dropout import ATTENTION_BRANCH, MLP_BRANCH, branch_factor
from ..library import register_reference
from .plain import (
    _merge_heads,
    _split_heads,
    _wide,
    batch_norm_activation,
    inverted_residual,
    layer_norm,
    layer_norm_linear,
    layer_norm_mlp,
    linear_residual,
    to_sequences,
    transformer,
)


def _normalize(x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """(x − mean) · rstd in the wide dtype."""
    return (x.to(mean.dtype) - mean.unsqueeze(-1)) * rstd.unsqueeze(-1)


def _statistics(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and 1/sqrt(variance + eps) of each row, in two passes: the one-pass formula cancels where |mean| ≫ σ."""
    x = x.to(_wide(x.dtype))
    variance, mean = torch.var_mean(x, dim=-1, correction=0)
    return mean, torch.rsqrt(variance + eps)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _silu_backward(grad: Tensor, x: Tensor) -> Tensor:
    sigmoid = torch.sigmoid(x)
    return grad * sigmoid * (1 + x * (1 - sigmoid))


def _layer_norm_backward(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias, all in the wide dtype, from the gradient of LN(x)."""
    normalized = _normalize(x, mean, rstd)
    grad_normalized = grad * weight.to(grad.dtype)
    projection = (grad_normalized * normalized).mean(-1, keepdim=True)
    grad_x = (grad_normalized - grad_normalized.mean(-1, keepdim=True) - normalized * projection) * rstd.unsqueeze(-1)
    return grad_x, _rows(grad * normalized).sum(0), _rows(grad).sum(0)


@register_reference("layer_norm")
def _layer_norm(x, norm_weight, norm_bias, eps):
    return layer_norm(x, norm_weight, norm_bias, eps).contiguous(), *_statistics(x, eps)


@register_reference("layer_norm_backward")
def _layer_norm_only_backward(grad_out, x, mean, rstd, norm_weight):
    grad_x, grad_weight, grad_bias = _layer_norm_backward(grad_out.to(mean.dtype), x, mean, rstd, norm_weight)
    return grad_x.to(x.dtype).contiguous(), grad_weight.to(norm_weight.dtype), grad_bias.to(norm_weight.dtype)


def _over_pixels(vector: Tensor) -> Tensor:
    """(C,) against an (N, C, H, W) map."""
    return vector[:, None, None]


def _laid_out_like(x: Tensor, values: Tensor) -> Tensor:
    return torch.empty_like(x).copy_(values)


@register_reference("batch_norm_activation")
def _batch_norm_activation(x, weight, bias, eps, activation):
    out = batch_norm_activation(x, weight, bias, None, None, 0.0, eps, activation)
    variance, mean = torch.var_mean(x.to(_wide(x.dtype)), dim=(0, 2, 3), correction=0)
    count = x.shape[0] * x.shape[2] * x.shape[3]
    unbiased = variance * (count / (count - 1) if count > 1 else torch.nan)
    return _laid_out_like(x, out), mean, torch.rsqrt(variance + eps), unbiased


@register_reference("batch_norm_activation_backward")
def _batch_norm_activation_backward(grad_out, x, mean, rstd, weight, bias, activation):
    wide, pixels = mean.dtype, (0, 2, 3)
    normalized = (x.to(wide) - _over_pixels(mean)) * _over_pixels(rstd)
    grad, scale = grad_out.to(wide), weight.to(wide)
    if activation:
        grad = _silu_backward(grad, normalized * _over_pixels(scale) + _over_pixels(bias.to(wide)))
    grad_bias, grad_weight = grad.sum(pixels), (grad * normalized).sum(pixels)
    count = max(x.shape[0] * x.shape[2] * x.shape[3], 1)
    grad_x = grad - _over_pixels(grad_bias / count) - normalized * _over_pixels(grad_weight / count)
    grad_x = grad_x * _over_pixels(scale * rstd)
    return _laid_out_like(x, grad_x), grad_weight.to(weight.dtype), grad_bias.to(bias.dtype)


@register_reference("layer_norm_linear")
def _layer_norm_linear(x, norm_weight, norm_bias, weight, bias, eps, activation):
    out = layer_norm_linear(x, norm_weight, norm_bias, weight, bias, eps, activation).contiguous()
    return out, *_statistics(x, eps)


@register_reference("layer_norm_linear_backward")
def _layer_norm_linear_backward(grad_out, x, mean, rstd, norm_weight, norm_bias, weight, bias, activation):
    wide = mean.dtype
    normed = _normalize(x, mean, rstd) * norm_weight.to(wide) + norm_bias.to(wide)
    grad = grad_out.to(wide)
    if activation:
        grad = _silu_backward(grad, F.linear(normed, weight.to(wide), None if bias is None else bias.to(wide)))
    grad_weight = _rows(grad).t() @ _rows(normed)
    grad_bias = _rows(grad).sum(0)
    grad_x, grad_norm_weight, grad_norm_bias = _layer_norm_backward(grad @ weight.to(wide), x, mean, rstd, norm_weight)
    return (
        grad_x.to(x.dtype).contiguous(),
        grad_norm_weight.to(norm_weight.dtype),
        grad_norm_bias.to(norm_bias.dtype),
        grad_weight.to(weight.dtype).contiguous(),
        grad_bias.to(weight.dtype),
    )


@register_reference("patch_attention")
def _patch_attention(qkv, num_heads, patch_size, scale):
    q, k, v = (t.to(_wide(qkv.dtype)) for t in _split_heads(qkv, num_heads, patch_size))
    scores = scale * (q @ k.transpose(-1, -2))
    logsumexp = torch.logsumexp(scores, -1)
    out = _merge_heads(torch.softmax(scores, -1) @ v, (qkv.shape[1], qkv.shape[2]), patch_size)
    return out.to(qkv.dtype).contiguous(), logsumexp.unflatten(0, (qkv.shape[0], patch_size[0] * patch_size[1]))


@register_reference("patch_attention_backward")
def _patch_attention_backward(grad_out, qkv, out, logsumexp, num_heads, patch_size, scale):
    wide, size = logsumexp.dtype, (qkv.shape[1], qkv.shape[2])
    q, k, v = (t.to(wide) for t in _split_heads(qkv, num_heads, patch_size))

    def heads(t: Tensor) -> Tensor:
        return to_sequences(t, patch_size).unflatten(-1, (num_heads, -1)).transpose(1, 2).to(wide)

    grad, out = heads(grad_out), heads(out)
    p = torch.exp(scale * (q @ k.transpose(-1, -2)) - logsumexp.flatten(0, 1).unsqueeze(-1))
    grad_scores = scale * p * (grad @ v.transpose(-1, -2) - (grad * out).sum(-1, keepdim=True))
    grads = (grad_scores @ k, grad_scores.transpose(-1, -2) @ q, p.transpose(-1, -2) @ grad)
    return torch.cat([_merge_heads(g, size, patch_size) for g in grads], -1).to(qkv.dtype)


@register_reference("linear_residual")
def _linear_residual(x, weight, bias, residual):
    return linear_residual(x, weight, bias, residual).contiguous()


@register_reference("linear_residual_backward")
def _linear_residual_backward(grad_out, x, weight):
    wide = _wide(x.dtype)
    grad = grad_out.to(wide)
    return (
        (grad @ weight.to(wide)).to(x.dtype).contiguous(),
        (_rows(grad).t() @ _rows(x).to(wide)).to(weight.dtype).contiguous(),
        _rows(grad).sum(0).to(weight.dtype),
    )


@register_reference("layer_norm_mlp")
def _layer_norm_mlp(x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, eps):
    out = layer_norm_mlp(x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, eps).contiguous()
    return out, *_statistics(x, eps)


@register_reference("layer_norm_mlp_backward")
def _layer_norm_mlp_backward(grad_out, x, mean, rstd, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight):
    wide = mean.dtype
    normed = _normalize(x, mean, rstd) * norm_weight.to(wide) + norm_bias.to(wide)
    before = F.linear(normed, fc1_weight.to(wide), fc1_bias.to(wide))
    grad = grad_out.to(wide)
    grad_before = _silu_backward(grad @ fc2_weight.to(wide), before)
    grad_x, grad_norm_weight, grad_norm_bias = _layer_norm_backward(
        grad_before @ fc1_weight.to(wide), x, mean, rstd, norm_weight
    )
    return (
        (grad_x + grad).to(x.dtype).contiguous(),
        grad_norm_weight.to(norm_weight.dtype),
        grad_norm_bias.to(norm_bias.dtype),
        (_rows(grad_before).t() @ _rows(normed)).to(fc1_weight.dtype).contiguous(),
        _rows(grad_before).sum(0).to(fc1_bias.dtype),
        (_rows(grad).t() @ _rows(F.silu(before))).to(fc2_weight.dtype).contiguous(),
        _rows(grad).sum(0).to(fc2_weight.dtype),
    )


def _factor(x: Tensor, seed: Tensor | None, branch: int, probability, path, patch_size, path_scale) -> Tensor | float:
    if seed is None or not (probability or path):  # there is a seed where something is dropped
        return 1.0
    return branch_factor(seed, branch, x.shape, probability, path, patch_size, path_scale).to(_wide(x.dtype))


@register_reference("transformer_layer")
def _transformer_layer(x, *arguments):
    layer, (seed, num_heads, patch_size, eps, (projection, path1, mlp, path2), path_scale) = (
        arguments[:12],
        arguments[12:],
    )
    scale = (layer[2].shape[0] // (3 * num_heads)) ** -0.5
    qkv, mean1, rstd1 = _layer_norm_linear(x, *layer[:4], eps, "")
    attended, logsumexp = _patch_attention(qkv, num_heads, patch_size, scale)
    branch = F.linear(attended, *layer[4:6]).to(mean1.dtype)
    branch = branch * _factor(x, seed, ATTENTION_BRANCH, projection, path1, patch_size, path_scale)
    middle = (x + branch.to(x.dtype)).contiguous()
    mean2, rstd2 = _statistics(middle, eps)
    norm2_weight, norm2_bias, fc1_weight, fc1_bias = layer[6:10]
    hidden = layer_norm_linear(middle, norm2_weight, norm2_bias, fc1_weight, fc1_bias, eps, "silu")
    branch = F.linear(hidden, *layer[10:]).to(mean1.dtype)
    branch = branch * _factor(x, seed, MLP_BRANCH, mlp, path2, patch_size, path_scale)
    return (middle + branch.to(x.dtype)).contiguous(), mean1, rstd1, attended, logsumexp, middle, mean2, rstd2


@register_reference("transformer_layer_backward")
def _transformer_layer_backward(grad_out, x, *arguments):
    mean1, rstd1, attended, logsumexp, middle, mean2, rstd2 = arguments[:7]
    norm1_weight, norm1_bias, qkv_weight, qkv_bias, proj_weight, *mlp_weights = arguments[7:17]
    seed, num_heads, patch_size, eps, (projection, path1, mlp, path2), path_scale = arguments[17:]
    qkv = layer_norm_linear(x, norm1_weight, norm1_bias, qkv_weight, qkv_bias, eps)
    wide, scale = mean1.dtype, (qkv.shape[-1] // (3 * num_heads)) ** -0.5
    grad_out, middle, attended, qkv = (t.to(wide) for t in (grad_out, middle, attended, qkv))
    branch = grad_out * _factor(x, seed, MLP_BRANCH, mlp, path2, patch_size, path_scale)
    grad_middle, *grads2 = _layer_norm_mlp_backward(branch, middle, mean2, rstd2, *mlp_weights)
    grad_middle = grad_middle - branch + grad_out  # the MLP's backward added `branch` as its residual's gradient
    branch = grad_middle * _factor(x, seed, ATTENTION_BRANCH, projection, path1, patch_size, path_scale)
    grad_attended, *grads_of_proj = _linear_residual_backward(branch, attended, proj_weight)
    grad_qkv = _patch_attention_backward(grad_attended, qkv, attended, logsumexp, num_heads, patch_size, scale)
    grad_x, *grads1 = _layer_norm_linear_backward(
        grad_qkv, x.to(wide), mean1, rstd1, norm1_weight, norm1_bias, qkv_weight, None, ""
    )
    return (grad_x + grad_middle).to(x.dtype).contiguous(), *grads1, *grads_of_proj, *grads2


@register_reference("inverted_residual")
def _inverted_residual(x, *arguments):
    return inverted_residual(x, *arguments).contiguous()


@register_reference("transformer")
def _transformer(x, weights, final_norm_weight, final_norm_bias, num_heads, patch_size, eps):
    layers = [tuple(weights[i : i + 12]) for i in range(0, len(weights), 12)]
    final_norm = None if final_norm_weight is None else (final_norm_weight, final_norm_bias)
    return transformer(x, layers, final_norm, num_heads, tuple(patch_size), eps).contiguous()


def transformer_layer_from_seed(x, *arguments) -> Tensor:
    """The result of the raw operator alone, with dropout computed from the seed; differentiable by PyTorch."""
    return _transformer_layer(x, *arguments)[0]
