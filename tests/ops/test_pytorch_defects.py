# SPDX-License-Identifier: Apache-2.0
"""What PyTorch gets wrong, and is therefore never asked for."""

import copy

import pytest
import torch

import mvit_kernels
from mvit_kernels.freezing.modules import FrozenConv2d
from support.networks import Draw, composed


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("stride, dilation", [(2, 1), (2, 2), (3, 1), (1, 1)])
def test_pytorch_gets_no_one_column_convolution_that_it_would_get_wrong(stride, dilation, activation):
    """With AMX, torch 2.13 multiplies unwritten memory where a strided bfloat16 convolution gives one column of more
    than four rows; seen when previously freed memory was full of NaN:
    ``F.conv2d(torch.randn(1, 8, 24, 1).bfloat16(), torch.randn(8, 8, 3, 3).bfloat16(), None, 2, 1)``."""
    draw = Draw(0)
    for inp, width in ((8, 1), (3, 2), (17, 3), (40, 4)):
        weight, bias, pads = draw(24, inp, 3, 3, std=0.1), draw(24, std=0.1), (dilation, dilation)
        conv = FrozenConv2d(
            weight, bias, stride=(stride,) * 2, padding=pads, dilation=(dilation,) * 2, activation=activation
        )
        x = draw(2, inp, 25, width).bfloat16()
        truth = composed(copy.deepcopy(conv.bfloat16()).double(), x.double())
        for _ in range(3):
            unwritten = [torch.full((2**size,), torch.nan) for size in range(6, 18) for _ in range(3)]
            del unwritten
            y = composed(conv, x)
            assert y.shape == truth.shape and y.is_contiguous(memory_format=torch.channels_last)
            torch.testing.assert_close(y.double(), truth, rtol=0.01, atol=0.01)
    if stride == 3:
        return
    # An inverted residual of one hidden channel has a depthwise convolution of that kind.
    block = draw.inverted(8, 1, 8, stride=stride, dilation=dilation).bfloat16()
    x = draw(2, 8, 25, 1).bfloat16()
    truth = composed(copy.deepcopy(block).double(), x.double())
    weights = [getattr(block, part) for part in ("expand", "depthwise", "project")]
    flat = [t for w in weights for t in (w.weight if w is block.depthwise else w.weight.flatten(1), w.bias)]
    for _ in range(3):
        unwritten = [torch.full((2**size,), torch.nan) for size in range(6, 18) for _ in range(3)]
        del unwritten
        rows = mvit_kernels.inverted_residual(
            x.permute(0, 2, 3, 1),
            *flat,
            stride=stride,
            dilation=dilation,
            residual=block.residual,
            backend="reference",
        )
        torch.testing.assert_close(rows.permute(0, 3, 1, 2).double(), truth, rtol=0.01, atol=0.01)
