# SPDX-License-Identifier: Apache-2.0
"""The meaning of every operator in plain PyTorch: the oracle of all tests, and the fallback.

Example:
    >>> out = reference.patch_attention(qkv, num_heads=4, patch_size=(2, 2), scale=36**-0.5)

Two forms of each operator live here.

- A plain function, differentiable by PyTorch itself in every dtype including float64. It is what a CPU without the
  compiled library and an unsupported GPU run, and what an exporter sees.
- The raw operators ``mvit_kernels::<name>.reference`` and ``…_backward.reference``: the same values by the formulas
  that the kernels use (saved statistics, recomputed intermediates, explicit gradients). They define what the raw
  operators of the other backends must return, and prove the autograd functions in ``ops/`` without any compiled code.

MobileViT: Mehta & Rastegari 2021, arXiv:2110.02178, section 3. Shapes are in ``ops/``.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ._library import register_reference
from ._transforms import again, gradients, transform
from .dropout import ATTENTION_BRANCH, MLP_BRANCH, LayerDropout, branch_factor, dropped

# ---------------------------------------------------------------------------------------------- sequences and maps


def to_sequences(x: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """(B, H, W, C) -> (B·ph·pw, N, C): the tokens at one place of every patch, as one sequence (the paper's unfold)."""
    (ph, pw), (b, h, w, c) = patch_size, x.shape
    x = x.reshape(b, h // ph, ph, w // pw, pw, c).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(b * ph * pw, (h // ph) * (w // pw), c)


def to_map(sequences: Tensor, size: tuple[int, int], patch_size: tuple[int, int]) -> Tensor:
    """(B·ph·pw, N, C) -> (B, H, W, C): the inverse of `to_sequences` (the paper's fold).

    The batch is -1, since ONNX's exporter of traces takes the size that a tensor had after attention for a constant.
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
    """Sizes that the weights alone decide, as numbers also for ``torch.jit.trace``, which has tensors for sizes."""
    if not torch.jit.is_tracing():
        return tuple(sizes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # that they are constants from then on
        return tuple(int(size) for size in sizes)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics and accumulation."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# --------------------------------------------------------------------------------------------------- plain functions


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm over the last axis, in x's dtype, also where the affine parameters are kept in float32."""
    width = constants(x.shape[-1:])
    if weight.dtype == x.dtype:
        return F.layer_norm(x, width, weight, bias, eps)
    return F.layer_norm(x.to(weight.dtype), width, weight, bias, eps).to(x.dtype)


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
    """softmax(scale · q kᵀ) v inside each patch-position sequence; `dropout` on the attention weights."""
    q, k, v = _split_heads(qkv, num_heads, patch_size)
    if scale <= 0:  # PyTorch's fused attention on a GPU takes the largest score before it scales, and gives NaN
        q, scale = (-q, -scale) if scale else (0 * q, 1.0)
    if transform() and not dropout:  # PyTorch's fused attention has no tangents either
        out = _attention(q, k, v, scale)
    else:
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scale)
        if out.requires_grad and not (dropout or torch.compiler.is_compiling() or torch.jit.is_tracing()):
            out = _DifferentiableAgain.apply(out, q, k, v, scale)
    return _merge_heads(out, (qkv.shape[1], qkv.shape[2]), patch_size)


def patch_attention_written_out(qkv: Tensor, num_heads: int, patch_size: tuple[int, int], scale: float) -> Tensor:
    """`patch_attention` of nothing that lacks a derivative of some order or mode."""
    out = _attention(*_split_heads(qkv, num_heads, patch_size), scale)
    return _merge_heads(out, (qkv.shape[1], qkv.shape[2]), patch_size)


def _attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    q, k, v, dtype = *(t.to(_wide(q.dtype)) for t in (q, k, v)), q.dtype
    return (torch.softmax(scale * (q @ k.transpose(-1, -2)), -1) @ v).to(dtype)


class _DifferentiableAgain(torch.autograd.Function):
    """`out`, the result of PyTorch's fused attention, whose backward has no derivative: gradients that are to be
    differentiated again go past it, and through `_attention`."""

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
    """Whether a convolution is of the kind that PyTorch gets wrong: dense, strided, in bfloat16 on the CPU, and with a
    result of one column. With AMX, torch 2.13's oneDNN then multiplies memory that nobody wrote, and gives 1e36 or NaN.
    A second column, thrown away afterwards, cures it."""
    if x.dtype != torch.bfloat16 or x.device.type != "cpu" or stride[1] == 1 or groups > 1:
        return False
    reach = dilation[1] * (weight.shape[3] - 1) + 1
    return x.shape[-1] + 2 * padding[1] - reach < stride[1]


def transformer_layer(
    x: Tensor,
    layer: tuple[Tensor | None, ...],
    num_heads: int,
    patch_size: tuple[int, int],
    eps: float,
    dropout: LayerDropout | None = None,
) -> Tensor:
    """One pre-norm layer, its live dropout drawn by PyTorch."""
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
    layers: list[tuple[Tensor | None, ...]],
    final_norm: tuple[Tensor, Tensor] | None,
    num_heads: int,
    patch_size: tuple[int, int],
    eps: float,
) -> Tensor:
    """The whole stack. Everything but attention is row-wise, so the rows are put in sequence order once: a map of
    N × 1 tokens with 1 × 1 patches is one sequence, and attention on it copies nothing."""
    size = (x.shape[1], x.shape[2])
    rows = to_sequences(x, patch_size).unsqueeze(2)
    for layer in layers:
        rows = transformer_layer(rows, layer, num_heads, (1, 1), eps)
    if final_norm is not None:
        rows = layer_norm(rows, *final_norm, eps)
    return to_map(rows.squeeze(2), size, patch_size)


# ----------------------------------------------------------------------------------------------------- raw operators


def _normalize(x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """(x − mean) · rstd in the wide dtype."""
    return (x.to(mean.dtype) - mean.unsqueeze(-1)) * rstd.unsqueeze(-1)


def _statistics(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and 1/sqrt(variance + eps) of the rows; two passes, since the one-pass formula cancels where |mean| ≫ σ."""
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
    if not (probability or path):
        return 1.0
    return branch_factor(seed, branch, x.shape, probability, path, patch_size, path_scale).to(_wide(x.dtype))


def transformer_layer_from_seed(x, *arguments) -> Tensor:
    """The raw operator's result alone, its dropout computed from the seed, differentiable by PyTorch."""
    return _transformer_layer(x, *arguments)[0]


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
    branch = F.linear(layer_norm_linear(middle, *layer[6:10], eps, "silu"), *layer[10:]).to(mean1.dtype)
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
    grad_middle = grad_middle - branch + grad_out  # that operator's residual takes the branch's gradient
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
