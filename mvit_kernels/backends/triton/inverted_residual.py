# SPDX-License-Identifier: Apache-2.0
"""``inverted_residual`` in Triton: three launches, each with its bias, activation or residual inside. The expanded map
is written and read once, in x's dtype, before the depthwise convolution and behind it. Inference only."""

from . import convolution, depthwise_convolution
from ._launch import dense, register
from ._maps import out_size

OP = "inverted_residual"


@register(OP)
def forward(
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
):
    weights = dense(expand_weight, expand_bias, depthwise_weight, depthwise_bias, project_weight, project_bias)
    expand_weight, expand_bias, depthwise_weight, depthwise_bias, project_weight, project_bias = weights
    B, H, W, _ = x.shape
    size = B, out_size(H, stride), out_size(W, stride)
    expanded = x.new_empty((B, H, W, expand_weight.shape[0]))
    filtered = x.new_empty((*size, expand_weight.shape[0]))
    out = x.new_empty((*size, project_weight.shape[0]))
    silu = {"activation": "silu"}
    convolution.launch(x, expand_weight[:, :, None, None], expand_bias, None, expanded, **silu).run()
    # The weight as it is: packed, its loads would be eight times fewer, and there would be a fourth launch.
    depthwise_convolution.launch(
        expanded, depthwise_weight, depthwise_bias, filtered, stride=stride, dilation=dilation, **silu
    ).run()
    convolution.launch(filtered, project_weight[:, :, None, None], project_bias, x if residual else None, out).run()
    return out
