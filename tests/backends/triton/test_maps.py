# SPDX-License-Identifier: Apache-2.0
"""How the frozen networks' kernels are planned: what they refuse, how maps are addressed, and which tiles are taken.

Their values are tested in gates/interpreted_convolutions.py, and what the compiler makes of them in test_networks.py.
"""

import itertools

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from mvit_kernels.backends.triton import _maps, convolution, depthwise_convolution, mean, resize  # noqa: E402
from mvit_kernels.backends.triton._launch import Launch, watching  # noqa: E402


def t(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, device="meta", dtype=dtype)


def conv(x=None, weight=None, bias=None, residual=None, out=None, **settings):
    x = t(2, 6, 8, 16) if x is None else x
    weight = convolution.packed(t(24, 16, 1, 1)) if weight is None else weight
    return convolution.launch(x, weight, bias, residual, t(2, 6, 8, 24) if out is None else out, **settings)


def depthwise(x=None, weight=None, out=None, bias=None, **settings):
    x = t(2, 6, 8, 16) if x is None else x
    return depthwise_convolution.launch(
        x, t(16, 1, 3, 3) if weight is None else weight, bias, t(2, 6, 8, 16) if out is None else out, **settings
    )


REFUSED = [
    (lambda: conv(x=t(6, 8, 16)), "4 axes"),
    (lambda: conv(x=t(2, 16, 6, 8).permute(0, 2, 3, 1)), "channels of x are 48 elements apart"),
    (lambda: conv(out=t(2, 24, 6, 8).permute(0, 2, 3, 1)), "channels of out are 48 elements apart"),
    (lambda: conv(weight=t(24, 8, 1, 1)), r"\(out, 16, k, k\) with an odd k is wanted"),
    (lambda: conv(weight=t(24, 16, 2, 2)), "an odd k is wanted"),
    (lambda: conv(weight=t(24, 16, 3, 3)), r"weight is not channels-last in memory; give packed\(weight\)"),
    (lambda: conv(activation="gelu"), "activation is 'gelu'"),
    (lambda: conv(out=t(2, 6, 8, 16)), r"out has shape \(2, 6, 8, 16\); \(2, 6, 8, 24\) is wanted"),
    (lambda: conv(stride=2), r"\(2, 3, 4, 24\) is wanted"),
    (lambda: conv(bias=t(16)), r"bias has shape \(16,\); \(24,\) is wanted"),
    (lambda: conv(residual=t(2, 6, 8, 16)), "residual has shape"),
    (lambda: conv(x=t(2**15, 256, 256, 16), out=t(2**15, 256, 256, 24)), "more than 2147483647 pixels"),
    (lambda: depthwise(weight=t(16, 1, 5, 5)), "weight has shape"),
    (lambda: depthwise(bias=t(8)), "bias has shape"),
    (lambda: depthwise(out=t(2, 6, 8, 8)), "out has shape"),
    (lambda: depthwise(activation="gelu"), "activation is 'gelu'"),
    (lambda: mean.launch(t(2, 6, 8, 16), t(2, 16)), "4 axes"),
    (lambda: mean.launch(t(2, 6, 8, 16), t(2, 1, 1, 8)), "out has shape"),
    (lambda: resize.launch(t(2, 6, 8, 16), t(2, 3, 3, 8)), "out has shape"),
    (lambda: resize.launch(t(2, 0, 8, 16), t(2, 3, 3, 16)), "0 × 8 to 3 × 3 pixels; at least one"),
]


@pytest.mark.parametrize("call, says", REFUSED)
def test_refuses(call, says):
    with watching(90), pytest.raises(ValueError, match=says):
        call()


@pytest.mark.parametrize(
    "call",
    [
        lambda x: conv(x=x, weight=t(24, 16, 1, 1, dtype=torch.float64), out=x),
        lambda x: depthwise(x=x, out=x),
        lambda x: mean.launch(x, x),
        lambda x: resize.launch(x, x),
    ],
)
def test_has_no_kernels_for_float64(call):
    with watching(90), pytest.raises((TypeError, ValueError), match="float64|has shape"):
        call(t(2, 6, 8, 16, dtype=torch.float64))


def test_prepares_and_launches_when_run(monkeypatch):
    with watching(90) as launches:
        step = conv()
        assert isinstance(step, Launch) and launches == []
        step.run()
        assert launches == [step]
        conv(x=t(0, 6, 8, 16), out=t(0, 6, 8, 24)).run()  # no images
        assert len(launches) == 1


def test_another_map_of_the_same_widths_needs_no_other_kernel():
    """A 1×1 convolution's plan is for its widths, and for how much can be loaded at once; views share it."""
    wide = t(2, 6, 8, 64)
    with watching(90):
        whole = conv()
        assert conv(x=wide[..., 16:32], out=wide[..., 40:]).plan is whole.plan
        assert conv(x=t(2, 3, 16, 16), out=t(2, 3, 16, 24)).plan is whole.plan
        assert conv(x=t(2, 6, 8, 20)[..., :16]).plan is not whole.plan  # 8 bytes at once
        assert conv(x=t(2, 6, 9, 16)[:, :, :8]).plan is not whole.plan  # rows with a gap
        assert conv(bias=t(24)).plan is not whole.plan
        assert conv(bias=t(24, dtype=torch.float32)).plan is not conv(bias=t(24)).plan
    with watching(80):
        assert conv().plan is not whole.plan


def test_flat():
    x = t(2, 6, 8, 64)
    assert _maps.flat(x, None, x[..., 8:24]) and _maps.pixel_stride(x[..., 8:24]) == 64
    assert not _maps.flat(x[:, :, :4]) and not _maps.flat(x[:, :5]) and _maps.flat(x[:1, :5])
    assert _maps.flat(x[:, :1, :1]) and _maps.pixel_stride(x[:, :1, :1]) == 6 * 8 * 64
    assert _maps.flat(x[:, :, :1][:1]) and _maps.pixel_stride(x[:1, :, :1]) == 8 * 64
    assert not _maps.flat(x, x[:, :, :4]) and not _maps.flat(x.permute(0, 2, 1, 3))


@pytest.mark.parametrize(
    "channels, dtype, vector",
    [(48, torch.bfloat16, 8), (48, torch.float32, 4), (20, torch.bfloat16, 4), (17, torch.float16, 1)],
)
def test_vectors(channels, dtype, vector):
    assert _maps.vector_of(t(2, 3, 5, channels, dtype=dtype)) == vector
    assert _maps.vector_of(t(2, 3, 5, 64, dtype=dtype)[..., :channels], None) == 16 // dtype.itemsize


def test_offsets_of_more_than_31_bits():
    assert not _maps.is_wide(128, t(2**20, 8, 8, 640))  # many images, each near enough
    assert _maps.is_wide(64, t(2, 2**15, 2**15, 4))
    assert _maps.is_wide(128, t(4, 1, 1, 16).as_strided((4, 1, 1, 16), (2**25, 16, 16, 1)))


def test_columns_cover_each_channel_once():
    for N, most in itertools.product(range(1, 700), (16, 32, 64, 160)):
        first, second, tiles = convolution.columns_of(N, most)
        width = first + second
        assert width <= most and tiles * width >= N and (tiles - 1) * width < N
        for part in (first, second):
            assert part == 0 or (part >= 16 and part & (part - 1) == 0)


def test_columns_of_published_widths():
    """None of their columns is padding where a tile is widest, but in 24 (to 32) and 240 (to 256)."""
    for N in (16, 32, 48, 64, 80, 96, 128, 144, 160, 192, 256, 320, 384, 512, 640):
        first, second, tiles = convolution.columns_of(N, 160)
        assert tiles * (first + second) == N
    assert convolution.columns_of(24, 160) == (32, 0, 1) and convolution.columns_of(240, 160) == (128, 0, 2)


def test_one_image_still_has_many_programs():
    """The last map of s has 64 pixels. In tiles of 64, a product over it would run on five of 132 SMs."""
    with watching(90):
        out = t(1, 8, 8, 640)
        step = conv(x=t(1, 8, 8, 160), weight=convolution.packed(t(640, 160, 1, 1)), out=out)
        assert step.grid[0] >= 80
        assert depthwise(x=out, weight=t(640, 1, 3, 3), out=out).grid[0] >= 80
        large = t(256, 64, 64, 64)
        step = conv(x=large, weight=convolution.packed(t(64, 64, 1, 1)), out=large)
        assert step.grid == (256 * 64 * 64 // 64,)
