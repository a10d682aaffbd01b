# SPDX-License-Identifier: Apache-2.0
"""Winograd's algorithm for dense 3 × 3 convolutions in float32 (csrc/cpu/winograd.h), on every instruction set.

Its tiles are 2 × 2 pixels. Which convolutions it takes depends on their channels: from 32 on, in and out."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F

from mvit_kernels.rounding import RoundedArithmetic
from support.exactness import MOST
from support.native import skip_without_a_compiler
from support.networks import Draw, composed, native
from support.tolerance import assert_close_as_pytorch

skip_without_a_compiler()


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (1, 6), (3, 5), (7, 7), (16, 14), (31, 9)], ids=str)
@pytest.mark.parametrize("inp, out", [(32, 32), (33, 50), (36, 147), (321, 40), (1100, 37)])
def test_kernels_of_all_widths_on_odd_maps(inp, out, size):
    """Channels and columns that fill no vector, one to four panels, groups of tiles that end within a row."""
    draw = Draw(out)
    conv, x = draw.conv(inp, out, 3), draw(2, inp, *size)
    truth, pytorch = composed(copy.deepcopy(conv).double(), x.double()), composed(conv, x)
    assert_close_as_pytorch("a convolution", native(conv, x), pytorch, truth)


def test_kernels_write_nothing_beside_their_channels():
    """Both parts of a concatenated map, of which one convolution writes the first and reads both."""
    draw = Draw(3)
    block, x = draw.block(33, 36), draw(2, 33, 7, 10)
    truth = composed(copy.deepcopy(block).double(), x.double())
    assert_close_as_pytorch("a block", native(block, x), composed(block, x), truth)


@pytest.mark.parametrize("inp, out, size", [(96, 96, (32, 32)), (192, 96, (16, 16)), (320, 160, (8, 8))])
def test_kernels_are_as_exact_as_careful_arithmetic(inp, out, size):
    """Direct sums, that is: in float32 larger tiles (4 × 4) would be ten times as far off, and fail this."""
    draw = Draw(inp)
    conv, x = draw.conv(inp, out, 3, act=False), F.silu(draw(1, inp, *size))
    exact = copy.deepcopy(conv).double()
    truth = composed(exact, x.double())
    with torch.no_grad(), RoundedArithmetic(torch.float32, 0):  # in inference mode it sees no convolution
        careful = exact(x.double())
    errors = [(value.double() - truth).square().mean().sqrt() for value in (native(conv, x), careful)]
    assert errors[0] < MOST * errors[1]


@pytest.mark.parametrize("size", [(9, 8), (32, 30)], ids=str)
def test_kernels_give_the_same_bits_however_the_work_is_shared_out(size):
    """147 columns are two to ten panels, which threads begin and end within."""
    draw = Draw(0)
    conv, x = draw.conv(192, 147, 3), draw(3, 192, *size)
    torch.set_num_threads(1)
    expected = native(conv, x)
    for count in (2, 3, 4, 7):
        torch.set_num_threads(count)
        assert torch.equal(native(conv, x), expected)
        assert torch.equal(native(conv, x[1:2]), expected[1:2])


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_kernels_keep_what_is_not_finite_to_the_tiles_that_see_it(poison):
    """It is not finite wherever the filter meets it, and elsewhere in those tiles; all other bits stay."""
    draw = Draw(0)
    conv, x = draw.conv(40, 48, 3, act=False), draw(1, 40, 13, 12)
    expected = native(conv, x)
    y, z = 6, 5
    x[0, 7, y, z] = poison
    found = native(conv, x)
    met = torch.zeros(13, 12, dtype=torch.bool)
    met[y - 1 : y + 2, z - 1 : z + 2] = True
    sees = torch.zeros_like(met)
    for top in range(0, 13, 2):
        for left in range(0, 12, 2):
            if top - 1 <= y <= top + 2 and left - 1 <= z <= left + 2:
                sees[top : top + 2, left : left + 2] = True
    finite = found.isfinite()[0]
    assert not finite[:, met].any()
    assert finite[:, ~sees].all() and torch.equal(found[0][:, ~sees], expected[0][:, ~sees])
