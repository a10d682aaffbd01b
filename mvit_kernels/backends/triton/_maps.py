# SPDX-License-Identifier: Apache-2.0
"""What the kernels on maps share: how maps (B, H, W, C) of any strides are addressed, and activations.

A map's channels are adjacent, and its other strides are free, so that it can be a range of channels of a wider map.
Strides are run-time numbers in units of `vector_of` elements: the multiplication by that constant tells the compiler
that 16 bytes can be loaded at once, and another map of the same widths needs no other kernel.

Pixels are counted through images, rows and columns. Where that counts through memory too (`flat`), a pixel's address is
a product; elsewhere it takes divisions, by constants: those by run-time numbers cost 430 instructions a tile.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _rows

MAX_PIXELS = 2**31 - 1


def check_map(function: str, name: str, x: Tensor, adjacent: bool = True) -> None:
    """Raise ValueError if x is not a map (B, H, W, C) whose channels are adjacent in memory."""
    if x.dim() != 4:
        raise ValueError(f"{function}: {name} has shape {tuple(x.shape)}; 4 axes (B, H, W, C) are wanted")
    if adjacent and x.stride(3) != 1 and x.shape[3] > 1:
        raise ValueError(
            f"{function}: the channels of {name} are {x.stride(3)} elements apart and must be adjacent; permute a "
            "channels-last tensor with permute(0, 2, 3, 1)"
        )
    if x.shape[0] * x.shape[1] * x.shape[2] > MAX_PIXELS:
        raise ValueError(f"{function}: {name} has more than {MAX_PIXELS} pixels; split the batch")


def check_shape(function: str, name: str, x: Tensor, shape: tuple[int, ...], why: str) -> None:
    """Raise ValueError if x is there and does not have the shape."""
    if x is not None and tuple(x.shape) != shape:
        raise ValueError(f"{function}: {name} has shape {tuple(x.shape)}; {shape} is wanted, {why}")


def check_activation(function: str, activation: str | None) -> None:
    """Raise ValueError if `activated` does not know the activation."""
    if activation not in (None, "silu", "relu"):
        raise ValueError(f"{function}: activation is {activation!r}; 'silu', 'relu' or None is wanted")


def strides_of(x: Tensor) -> tuple[int, int, int]:
    """Elements from one image, row and column to the next; 0 along an axis of one, where PyTorch leaves any number."""
    return tuple(stride if size > 1 else 0 for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True))


def flat(*maps: Tensor | None) -> bool:
    """Whether the pixels of each map are equally far apart, in the order in which they are counted."""
    for x in maps:
        expected = None
        for axis in (2, 1, 0) if x is not None else ():
            if x.shape[axis] > 1:
                if expected is not None and x.stride(axis) != expected:
                    return False
                expected = x.stride(axis) * x.shape[axis]
    return True


def pixel_stride(x: Tensor) -> int:
    """Elements from one pixel to the next of a map that is `flat`."""
    for axis in (2, 1, 0):
        if x.shape[axis] > 1:
            return x.stride(axis)
    return 0


def vector_of(*maps: Tensor | None) -> int:
    """The largest power of two that divides all strides of these maps, and is 16 bytes at most: at addresses so far
    apart, that many elements can be loaded at once."""
    widest = 8
    common = 0
    for x in maps:
        if x is not None:
            widest = min(widest, 16 // x.element_size())
            common = math.gcd(common, *strides_of(x))
    return math.gcd(widest, common) if common else widest


def in_units(x: Tensor | None, vector: int) -> tuple[int, int, int]:
    """`strides_of` in units of `vector` elements; zeros for a map that is not there."""
    return (0, 0, 0) if x is None else tuple(stride // vector for stride in strides_of(x))


def is_wide(pixels: int, *maps: Tensor | None) -> bool:
    """Whether offsets inside a tile of so many pixels, of the map that has the fewest, need 64 bits, from the image
    where it begins."""
    fewest = min(max(x.shape[1] * x.shape[2], 1) for x in maps if x is not None)
    for x in maps:
        if x is not None:
            SB, SH, SW = strides_of(x)
            images = pixels // fewest + 1
            if images * SB + (x.shape[1] + 2) * SH + (x.shape[2] + 2) * SW + x.shape[3] >= 2**31:
                return True
    return False


def kernel_strides(weight: Tensor) -> tuple[int, int, int]:
    """Elements from one output channel, row and column of a convolution's weight to the next."""
    return weight.stride(0), weight.stride(2), weight.stride(3)


def out_size(size: int, stride: int) -> int:
    """Pixels of a side behind a convolution whose padding keeps the size at stride 1."""
    return (size - 1) // stride + 1


def device_key(*tensors: Tensor | None) -> tuple[int | torch.dtype | None, ...]:
    """What selects a compiled kernel beside its constants: the device, and the tensors' dtypes."""
    return (tensors[0].get_device(), *(None if t is None else t.dtype for t in tensors))


@triton.jit
def places(first, BM: tl.constexpr, H: tl.constexpr, W: tl.constexpr, WIDE: tl.constexpr):
    """The BM pixels from `first` on, of images of H × W: the image of the first, and for each pixel how many images
    further it is, and its row and column."""
    image = first // (H * W)
    pixel = first - image * (H * W) + tl.arange(0, BM)
    if WIDE:
        pixel = pixel.to(tl.int64)
    further = pixel // (H * W)
    pixel -= further * (H * W)
    row = pixel // W
    return image, further, row, pixel - row * W


@triton.jit
def activated(y, ACTIVATION: tl.constexpr):
    """SiLU, ReLU, or y itself."""
    if ACTIVATION == "silu":
        return _rows.silu(y)
    elif ACTIVATION == "relu":
        return tl.where(y < 0, 0.0, y)  # NaN stays NaN, as in PyTorch
    else:
        return y
