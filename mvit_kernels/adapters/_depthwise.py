# SPDX-License-Identifier: Apache-2.0
"""Depthwise convolutions of stride 2 in bfloat16 on the CPU, whose input gradient is faster in float32.

oneDNN has depthwise kernels for every other pass. For the input gradient at stride 2 it takes, on processors with
AVX-512's bfloat16 instructions, a kernel for dense groups (``brgconv_strided:avx512_core_bf16``), which fills each
group's one channel up to 16 × 2 and so does 32 times the arithmetic. In float32 it takes a depthwise one (``jit_dw``).
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._utils.plain import is_own
from .._utils.transforms import again, gradients, is_channels_last, obstacle
from ._block import has_hooks

# Milliseconds of the two gradients at 256 px, batch 8, channels-last, with two threads on an Intel Xeon with AMX
# (torch 2.14.1 with oneDNN 3.12): both in bfloat16; and the input's in float32, casts included, beside the weight's in
# bfloat16, as here. With the whole convolution in float32 (forward too) S's first is 34.0 instead of 28.9 in all.
#
#     S      128 channels, 128 px   192.0   25.1          XXS    32 channels, 128 px    32.8    5.7
#            256            64      101.5   12.8                 48            64       15.5    1.9
#            384            32       54.9    4.5                 96            32       13.7    1.1
#            512            16       34.1    1.9                128            16        8.4    0.7
#
# Batches of 1 and 2, one thread, and XS are alike (the whole convolution in bfloat16 takes 2.4 to 13 times its time in
# float32). Without AMX but with bfloat16 instructions (ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16) they are too (4.7 to 10.8);
# without these (AVX512_CORE) bfloat16 has a depthwise kernel, and is faster by 1.2 to 1.4. At stride 1 it has one
# everywhere.


@functools.cache
def _has_bfloat16_instructions() -> bool:
    return getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()


@torch.compiler.assume_constant_result
def _is_slow_here() -> bool:
    return _has_bfloat16_instructions()


def is_slow(conv: nn.Module, x: Tensor) -> bool:
    """Whether ``conv(x)`` is a convolution for which `convolution` computes the same, with a faster gradient."""
    if not (isinstance(x, Tensor) and x.device.type == "cpu" and x.requires_grad and torch.is_grad_enabled()):
        return False
    if not (type(conv) is nn.Conv2d or is_own(conv, "cvnets", "Conv2d")) or conv.stride != (2, 2):
        return False
    weight = conv._parameters.get("weight")
    return (
        weight is not None
        and _dtype(x) == torch.bfloat16
        and conv.groups == conv.in_channels == conv.out_channels == x.shape[1]
        and x.dim() == 4
        and conv.padding_mode == "zeros"
        and isinstance(conv.padding, tuple)
        and (weight.dtype == x.dtype or torch.is_autocast_enabled("cpu"))
        and is_channels_last(x)
        and _is_slow_here()
        and "forward" not in conv.__dict__
        and not has_hooks(conv)
        and not obstacle((x, weight))
    )


def convolution(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """``conv(x)``, bit for bit, with the input's gradient computed in float32; for calls that are `is_slow`."""
    x, weight = x.to(torch.bfloat16), conv.weight.to(torch.bfloat16)
    bias = None if conv.bias is None else conv.bias.to(torch.bfloat16)
    return _Convolution.apply(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)


def _dtype(x: Tensor) -> torch.dtype:
    """Of the convolution of x."""
    if torch.is_autocast_enabled("cpu") and x.dtype != torch.float64:
        return torch.get_autocast_dtype("cpu")
    return x.dtype


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, *settings):
        ctx.save_for_backward(x, weight)
        ctx.settings, ctx.bias = settings, None if bias is None else list(bias.shape)
        return F.conv2d(x, weight, bias, *settings)

    @staticmethod
    def backward(ctx, grad_out):
        x, weight = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.settings
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        if again():
            bias = None if ctx.bias is None else weight.new_zeros(ctx.bias).requires_grad_()
            return gradients(F.conv2d, grad_out, x, weight, bias, *ctx.settings)
        settings = stride, padding, dilation, False, (0, 0), groups
        grad_x = grad_weight = grad_bias = None
        if needs_x:
            # Of the input only shape and strides are read: it is left uninitialised.
            arguments = grad_out.float(), torch.empty_like(x, dtype=torch.float32), weight.float(), None
            wanted = True, False, False
            grad_x = torch.ops.aten.convolution_backward(*arguments, *settings, wanted)[0].to(x.dtype)
        if needs_weight or needs_bias:
            wanted = False, needs_weight, needs_bias
            _, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
                grad_out, x, weight, ctx.bias, *settings, wanted
            )
        return grad_x, grad_weight, grad_bias, None, None, None, None
