# SPDX-License-Identifier: Apache-2.0
"""The truth of the tests: every operator from its textbook formula, in float64, one step at a time.

Nothing here is shared with the package, and nothing is a fused operator of PyTorch's: sequences are gathered by an
index that plain loops write down, softmax and LayerNorm are spelled out, the depthwise convolution is nine shifted
products and the bilinear resize two matrices. Gradients come from autograd through these elementary steps.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sequences(height: int, width: int, patch_size: tuple[int, int]) -> list[list[int]]:
    """For each place in a patch, row-major, the flat indices h·width + w of its tokens, row-major over patches."""
    ph, pw = patch_size
    found = []
    for i in range(ph):
        for j in range(pw):
            found.append([h * width + w for h in range(height) for w in range(width) if h % ph == i and w % pw == j])
    return found


def layer_norm(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float) -> Tensor:
    centred = x - x.sum(-1, keepdim=True) / x.shape[-1]
    variance = (centred * centred).sum(-1, keepdim=True) / x.shape[-1]
    return centred / torch.sqrt(variance + eps) * norm_weight + norm_bias


def batch_norm_activation(x, weight, bias, running_mean, running_var, momentum, eps, activation) -> Tensor:
    """(N, C, H, W), by the statistics of the batch."""
    mean, variance = batch_statistics(x)
    y = (x - mean[:, None, None]) / torch.sqrt(variance + eps)[:, None, None]
    y = y * weight[:, None, None] + bias[:, None, None]
    return silu(y) if activation == "silu" else y


def batch_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """The mean and the (biased) variance of each channel of an (N, C, H, W) map."""
    count = x.shape[0] * x.shape[2] * x.shape[3]
    mean = x.sum((0, 2, 3)) / count
    centred = x - mean[:, None, None]
    return mean, (centred * centred).sum((0, 2, 3)) / count


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = torch.einsum("...k,nk->...n", x, weight)
    return y if bias is None else y + bias


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """One head of one sequence, (N, head_dim) each: the weighted values, and the log of each row's normaliser."""
    scores = scale * torch.einsum("id,jd->ij", q, k)
    largest = scores.detach().amax(-1, keepdim=True)
    exponentials = torch.exp(scores - largest)
    total = exponentials.sum(-1, keepdim=True)
    return torch.einsum("ij,jd->id", exponentials / total, v), (torch.log(total) + largest).squeeze(-1)


def patch_attention_and_logsumexp(
    qkv: Tensor, num_heads: int, patch_size: tuple[int, int], scale: float
) -> tuple[Tensor, Tensor]:
    """(B, H, W, 3·inner) -> (B, H, W, inner) and (B, ph·pw, heads, N)."""
    batch, height, width, channels = qkv.shape
    inner = channels // 3
    head_dim = inner // num_heads
    groups = sequences(height, width, patch_size)
    out = 0 * qkv[..., :inner].reshape(batch, height * width, inner)  # in the graph for an empty batch too
    logsumexp = torch.zeros(batch, len(groups), num_heads, len(groups[0]), dtype=qkv.dtype)
    for b in range(batch):
        for place, tokens in enumerate(groups):
            rows = qkv.reshape(batch, height * width, channels)[b, tokens]
            for head in range(num_heads):
                first, last = head * head_dim, (head + 1) * head_dim
                q, k, v = (rows[:, part * inner + first : part * inner + last] for part in range(3))
                values, logs = attention(q, k, v, scale)
                out[b, tokens, first:last] = values
                logsumexp[b, place, head] = logs
    return out.reshape(batch, height, width, inner), logsumexp


def patch_attention(qkv: Tensor, num_heads: int, patch_size: tuple[int, int], scale: float) -> Tensor:
    return patch_attention_and_logsumexp(qkv, num_heads, patch_size, scale)[0]


def layer_norm_linear(x, norm_weight, norm_bias, weight, bias, eps, activation) -> Tensor:
    y = linear(layer_norm(x, norm_weight, norm_bias, eps), weight, bias)
    return silu(y) if activation == "silu" else y


def linear_residual(x, weight, bias, residual) -> Tensor:
    return residual + linear(x, weight, bias)


def layer_norm_mlp(x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, eps) -> Tensor:
    hidden = silu(linear(layer_norm(x, norm_weight, norm_bias, eps), fc1_weight, fc1_bias))
    return x + linear(hidden, fc2_weight, fc2_bias)


def depthwise(x: Tensor, weight: Tensor, bias: Tensor, stride: int, dilation: int) -> Tensor:
    """A 3 × 3 depthwise convolution of a (B, H, W, C) map with `dilation` zeros around it."""
    batch, height, width, channels = x.shape
    padded = torch.zeros(batch, height + 2 * dilation, width + 2 * dilation, channels, dtype=x.dtype)
    padded[:, dilation : dilation + height, dilation : dilation + width] = x
    rows, columns = math.ceil(height / stride), math.ceil(width / stride)
    y = bias.expand(batch, rows, columns, channels)
    for i in range(3):
        for j in range(3):
            top, left = i * dilation, j * dilation
            tap = padded[
                :,
                top : top + (rows - 1) * stride + 1 : stride,
                left : left + (columns - 1) * stride + 1 : stride,
            ]
            y = y + tap * weight[:, 0, i, j]
    return y


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
    hidden = silu(linear(x, expand_weight, expand_bias))
    hidden = silu(depthwise(hidden, depthwise_weight, depthwise_bias, stride, dilation))
    y = linear(hidden, project_weight, project_bias)
    return x + y if residual else y


def philox(key: int, counter: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """Philox-4x32-10 of Salmon et al. 2011, in Python's own integers."""
    x, (low, high) = list(counter), (key % 2**32, key // 2**32)
    for _ in range(10):
        a, b = 0xD2511F53 * x[0], 0xCD9E8D57 * x[2]
        x = [b // 2**32 ^ x[1] ^ low, b % 2**32, a // 2**32 ^ x[3] ^ high, a % 2**32]
        low, high = (low + 0x9E3779B9) % 2**32, (high + 0xBB67AE85) % 2**32
    return tuple(x)


def branch_factor(seed: Tensor, branch: int, shape, probability, path, patch_size, path_scale) -> Tensor:
    """The factor by which dropout multiplies a (B, H, W, d) residual branch, one element at a time."""
    (batch, height, width, d), (ph, pw) = shape, patch_size
    key, above = (int(s) for s in seed)
    high = (above % 2**32, above // 2**32)
    factor = torch.ones(shape, dtype=torch.float64)
    for b in range(batch):
        for h in range(height):
            for w in range(width):
                if probability:
                    token = (b * height + h) * width + w
                    numbers = [n for c in range(0, d, 4) for n in philox(key, (c // 4 + branch * 2**30, token, *high))]
                    kept = (torch.tensor(numbers[:d]) >= round(probability * 2**32)).double()
                    factor[b, h, w] *= kept / (1 - probability) if probability < 1 else 0
                if path:
                    sequence = (b * ph + h % ph) * pw + w % pw
                    kept = philox(key, (2**31 + branch * 2**30, sequence, *high))[0] >= round(path * 2**32)
                    factor[b, h, w] *= kept / (1 - path if path_scale else 1) if path < 1 else 0
    return factor


def branch_factors(x: Tensor, dropout, seed, patch_size) -> tuple[Tensor | float, Tensor | float]:
    """Of both branches of a layer; 1 where nothing is dropped."""
    if dropout is None:
        return 1.0, 1.0
    attention, mlp = (dropout.projection, dropout.path1), (dropout.mlp, dropout.path2)
    return tuple(
        branch_factor(seed.cpu(), branch, x.shape, *live, patch_size, dropout.path_scale) if any(live) else 1.0
        for branch, live in enumerate((attention, mlp))
    )


def transformer_layer(x, layer, num_heads, patch_size, eps, dropout=None, seed=None) -> Tensor:
    """`layer`: twelve tensors, in the order of `mvit_kernels.TransformerLayerWeights`."""
    norm1_w, norm1_b, qkv_w, qkv_b, proj_w, proj_b, norm2_w, norm2_b, fc1_w, fc1_b, fc2_w, fc2_b = layer
    factor1, factor2 = branch_factors(x, dropout, seed, patch_size)
    qkv = linear(layer_norm(x, norm1_w, norm1_b, eps), qkv_w, qkv_b)
    scale = 1 / math.sqrt(proj_w.shape[1] / num_heads)
    x = x + linear(patch_attention(qkv, num_heads, patch_size, scale), proj_w, proj_b) * factor1
    return x + linear(silu(linear(layer_norm(x, norm2_w, norm2_b, eps), fc1_w, fc1_b)), fc2_w, fc2_b) * factor2


def transformer(x, layers, final_norm, num_heads, patch_size, eps) -> Tensor:
    """`layers`: twelve tensors each."""
    for layer in layers:
        x = transformer_layer(x, layer, num_heads, patch_size, eps)
    return x if final_norm is None else layer_norm(x, *final_norm, eps)


def resize_matrix(size: int, new: int) -> Tensor:
    """(new, size): bilinear weights along one axis with ``align_corners=False``, pixel centres at i + 1/2."""
    matrix = torch.zeros(new, size, dtype=torch.float64)
    for i in range(new):
        position = max((i + 0.5) * size / new - 0.5, 0.0)
        low = min(math.floor(position), size - 1)
        high = min(low + 1, size - 1)
        matrix[i, low] += 1 - (position - low)
        matrix[i, high] += position - low
    return matrix


def resize(x: Tensor, height: int, width: int) -> Tensor:
    """A (B, C, H, W) map."""
    return resize_matrix(x.shape[2], height) @ x @ resize_matrix(x.shape[3], width).t()


def transformer_on_map(x, layers, final_norm, num_heads, patch_size, eps) -> Tensor:
    """(B, d, H, W), resized up to whole patches before and back after."""
    (ph, pw), (height, width) = patch_size, x.shape[2:]
    x = resize(x, math.ceil(height / ph) * ph, math.ceil(width / pw) * pw)
    y = transformer(x.permute(0, 2, 3, 1), layers, final_norm, num_heads, patch_size, eps)
    return resize(y.permute(0, 3, 1, 2), height, width)
