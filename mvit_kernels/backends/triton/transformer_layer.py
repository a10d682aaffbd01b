# SPDX-License-Identifier: Apache-2.0
"""``transformer_layer`` in Triton: the kernels of its four operators, launched by one operator.

Forward launches four kernels. Backward launches eight, where the four operators launch eleven and an addition: the
gradient of the residual is added where the LayerNorm's gradient is written, and all weight gradients of the layer are
one launch, plus one that adds up their parts. One of the eight recomputes q, k and v, which would be half of what is
saved. Dropout or drop-path on the MLP branch takes a ninth, since two kernels read its gradient. On the attention
branch it takes none: the kernel that writes the gradient of the rows between the branches writes both.
"""

import torch

from ...dropout import ATTENTION_BRANCH, MLP_BRANCH
from . import layer_norm_linear, layer_norm_mlp, linear_residual, patch_attention
from ._dropout import drop_rows, dropped
from ._launch import dense, register
from ._row_gradients import norm_backward
from ._weight_gradients import Norm, Product, weight_gradients

OP = "transformer_layer"


@register(OP)
def forward(
    x,
    norm1_weight,
    norm1_bias,
    qkv_weight,
    qkv_bias,
    proj_weight,
    proj_bias,
    norm2_weight,
    norm2_bias,
    fc1_weight,
    fc1_bias,
    fc2_weight,
    fc2_bias,
    seed,
    num_heads,
    patch_size,
    eps,
    dropout,
    path_scale,
):
    (x,) = dense(x)
    projection, path1, mlp, path2 = dropout
    scale = (proj_weight.shape[1] // num_heads) ** -0.5
    qkv, mean1, rstd1 = layer_norm_linear.forward(x, norm1_weight, norm1_bias, qkv_weight, qkv_bias, eps, "")
    attended, logsumexp = patch_attention.forward(qkv, num_heads, patch_size, scale)
    drop = dropped(x, seed, ATTENTION_BRANCH, projection, path1, path_scale, patch_size)
    middle = linear_residual.forward(attended, proj_weight, proj_bias, x, drop)
    drop = dropped(x, seed, MLP_BRANCH, mlp, path2, path_scale, patch_size)
    weights = (norm2_weight, norm2_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    out, mean2, rstd2 = layer_norm_mlp.forward(middle, *weights, eps, drop)
    return out, mean1, rstd1, attended, logsumexp, middle, mean2, rstd2


@register(f"{OP}_backward")
def backward(
    grad_out,
    x,
    mean1,
    rstd1,
    attended,
    logsumexp,
    middle,
    mean2,
    rstd2,
    norm1_weight,
    norm1_bias,
    qkv_weight,
    qkv_bias,
    proj_weight,
    norm2_weight,
    norm2_bias,
    fc1_weight,
    fc1_bias,
    fc2_weight,
    seed,
    num_heads,
    patch_size,
    eps,
    dropout,
    path_scale,
):
    grad_out, x, attended, middle = dense(grad_out, x, attended, middle)
    norm1_weight, norm1_bias, qkv_weight, proj_weight = dense(norm1_weight, norm1_bias, qkv_weight, proj_weight)
    norm2_weight, norm2_bias, fc1_weight, fc1_bias, fc2_weight = dense(
        norm2_weight, norm2_bias, fc1_weight, fc1_bias, fc2_weight
    )
    rows = mean1.numel()
    projection, path1, mlp, path2 = dropout
    scale = (proj_weight.shape[1] // num_heads) ** -0.5

    drop = dropped(x, seed, MLP_BRANCH, mlp, path2, path_scale, patch_size)
    grad_mlp = drop_rows(grad_out, drop)
    hidden, grad_hidden = layer_norm_mlp.hidden_gradient(
        grad_mlp, middle, mean2, rstd2, norm2_weight, norm2_bias, fc1_weight, fc1_bias, fc2_weight
    )
    drop = dropped(x, seed, ATTENTION_BRANCH, projection, path1, path_scale, patch_size)
    grad_middle = torch.empty_like(middle)
    grad_proj = norm_backward(grad_hidden, fc1_weight, middle, mean2, rstd2, norm2_weight, grad_out, grad_middle, drop)
    grad_attended = torch.empty_like(attended)
    if rows:
        linear_residual.product(grad_proj, proj_weight, None, None, grad_attended, rows, transposed=False).run()
    qkv, _, _ = layer_norm_linear.forward(x, norm1_weight, norm1_bias, qkv_weight, qkv_bias, eps, "")
    grad_qkv = patch_attention.backward(grad_attended, qkv, attended, logsumexp, num_heads, patch_size, scale)
    grad_x = torch.empty_like(x)
    norm_backward(grad_qkv, qkv_weight, x, mean1, rstd1, norm1_weight, grad_middle, grad_x)

    of_qkv, of_proj, of_fc1, of_fc2 = weight_gradients(
        rows,
        Product(grad_qkv, x, qkv_weight, Norm(mean1, rstd1, norm1_weight, norm1_bias)),
        Product(grad_proj, attended, proj_weight),
        Product(grad_hidden, middle, fc1_weight, Norm(mean2, rstd2, norm2_weight, norm2_bias)),
        Product(grad_mlp, hidden, fc2_weight),
    )
    return (
        grad_x,
        *of_qkv.of_norm,
        *of_qkv.of_linear,
        *of_proj.of_linear,
        *of_fc1.of_norm,
        *of_fc1.of_linear,
        *of_fc2.of_linear,
    )
