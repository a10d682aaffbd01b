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

from .._utils.compiling import assume_constant_result
from .._utils.plain import is_own
from .._utils.transforms import again, gradients, is_channels_last, obstacle
from ._block import has_hooks

# Milliseconds of forward and backward at 256 px, batch 8, channels-last, with two threads on an Intel Xeon with AMX
# (torch 2.14.1 with oneDNN 3.12): in bfloat16; as here; and all of it in float32, casts included, which saves twice the
# bytes for backward and changes the forward.
#
#     S      128 channels, 128 px   202.5   38.9   44.3          XXS    32 channels, 128 px    41.1    9.5   11.7
#            256            64      116.8   21.1   21.7                 48            64       17.3    4.5    5.2
#            384            32       58.9    6.6    7.6                 96            32       14.2    3.0    3.4
#            512            16       35.3    2.8    3.2                128            16        8.5    1.8    1.6
#
# As here it is 2.3 to 5.8 times as fast at batch 1, 3.9 to 13 times at batch 8; XS is alike, and so is one thread. Of
# 168.7 ms for the first one's gradients in bfloat16 the weight's takes 10.9; the input's takes 14.7 in float32. Without
# AMX but with bfloat16 instructions (ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16) oneDNN takes the same kernel (145.8 instead
# of 31.2 ms for the first); without these (AVX512_CORE) it has a depthwise one, which is faster than float32, by 1.2 to
# 1.4. At stride 1 it has one everywhere, and bfloat16 is faster.


@functools.cache
def _has_bfloat16_instructions() -> bool:
    return getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()


@assume_constant_result
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
