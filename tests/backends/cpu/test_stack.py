# SPDX-License-Identifier: Apache-2.0
"""`transformer` beyond its operator's tests: token counts around tiles, blocks and parts of a sequence, heads of every
width, and bits that depend neither on threads nor on the sequences that share a block."""

import math

import pytest
import torch

from support.cases import call, convert, make
from support.checks import check
from support.native import skip_without_a_compiler
from support.tolerance import assert_close_as_pytorch

skip_without_a_compiler()

OP = "transformer"
SIZES = [
    # map, head_dim: one token, a tile of them, one less and more than a block, part of a sequence (128) or two of these
    ((1, 1), 16),
    ((4, 4), 60),
    ((1, 31), 20),
    ((3, 11), 36),
    ((7, 7), 48),
    ((8, 16), 64),
    ((3, 43), 34),
    ((15, 17), 36),
    ((16, 17), 100),
    ((6, 50), 2),
]
DTYPES = ["float32", "bfloat16"]


def stack(size, head_dim, images=1, **others):
    width = 2 * head_dim if head_dim > 2 else 24
    return dict(shape=(images, *size, width), heads=2, head_dim=head_dim, patch=(1, 1), layers=2) | others


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size, head_dim", SIZES, ids=str)
def test_kernels_any_number_of_tokens(size, head_dim, dtype):
    check(OP, stack(size, head_dim), dtype=dtype, path="cpu")


@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_scores_of_thousands(dtype):
    """Weights are 0 and 1, and maxima of later parts of a sequence are higher by hundreds."""
    tensors, settings = make(OP, stack((5, 60), 16, layers=1, final_norm=False))
    tensors = convert(tensors, getattr(torch, dtype))
    tensors["layers.0.qkv_weight"][:64] *= 20  # q and k
    ours = call(OP, tensors, settings, "cpu").double()
    truth = call(OP, convert(tensors, torch.float64), settings, "oracle")
    usual = call(OP, tensors, settings, "usual").double()
    assert (ours - truth).abs().mean() <= 2 * (usual - truth).abs().mean() + 1e-6


LEVELS = {  # about what is added to all scores of a key, by its place among 150: parts of 64, 64 and 22 and padding
    "near zero": lambda key: 0,
    "all far below": lambda key: -250,
    "one far above, first": lambda key: 250 * (key == 3),
    "one far above, last": lambda key: 250 * (key == 149),
    "ever higher": lambda key: {3: 90, 70: 250, 149: 450}.get(key, 0),
    "ever lower": lambda key: {3: 450, 70: 250, 149: 90}.get(key, 0),
    "far below, then near zero": lambda key: -250 * (key < 64),
    "near zero, then far below": lambda key: -250 * (key >= 64),
    "far below, then not so far": lambda key: -450 if key < 64 else -250,
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("levels", LEVELS)
def test_kernels_far_scores_anywhere(levels, dtype):
    """In the first of two heads; in the second, levels are of the other sign."""
    tensors, settings = make(OP, stack((6, 25), 16, layers=1, final_norm=False))
    tensors["x"] = torch.zeros(150, 32, dtype=torch.float64)
    tensors["layers.0.norm1_weight"].fill_(1)
    for name in ("norm1_bias", "qkv_bias"):
        tensors[f"layers.0.{name}"].zero_()
    for head, sign in enumerate((4, -4)):  # a score's first product is the level: sign · level / √16
        for row in (head * 16, 32 + head * 16):
            tensors["layers.0.qkv_weight"][row] = 0
        tensors["layers.0.qkv_bias"][head * 16] = sign
        tensors["layers.0.qkv_weight"][32 + head * 16, 0] = 90
    for key, token in enumerate(tensors["x"]):
        # A LayerNorm keeps the one channel's part of 1, and 30 of ±1, as all tokens of a level have.
        level = LEVELS[levels](key)
        token[0] = math.copysign({0: 0, 90: 1, 250: 3, 450: 9}[abs(level)], level)
        signs = torch.tensor([1.0, -1.0] * 15, dtype=torch.float64)
        token[1:31] = signs[torch.randperm(30, generator=torch.Generator().manual_seed(key))]
    tensors["x"] = tensors["x"].reshape(1, 6, 25, 32)
    single = convert(tensors, getattr(torch, dtype))
    ours, usual = (call(OP, single, settings, path) for path in ("cpu", "usual"))
    truth = call(OP, convert(single, torch.float64), settings, "oracle")
    assert_close_as_pytorch(levels, ours, usual, truth)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("larger", [1, 4])  # times: with 4, the highest scores are near zero for some queries only
@pytest.mark.parametrize(
    "size, head_dim", [((4, 4), 60), ((6, 7), 24), ((7, 7), 36), ((8, 8), 48), ((15, 17), 16)], ids=str
)
def test_kernels_same_bits_for_any_threads_and_neighbours(size, head_dim, larger, dtype):
    tensors, settings = make(OP, stack(size, head_dim, images=7))
    tensors = convert(tensors, getattr(torch, dtype))
    tensors["layers.0.qkv_weight"][: 4 * head_dim] *= larger  # q and k
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = call(OP, tensors, settings, "cpu")
        for threads in (2, 3, 5):
            torch.set_num_threads(threads)
            assert torch.equal(call(OP, tensors, settings, "cpu"), alone), f"{threads} threads"
        for images in (slice(0, 1), slice(3, 5), slice(1, 7)):
            assert torch.equal(call(OP, {**tensors, "x": tensors["x"][images]}, settings, "cpu"), alone[images])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(4, 4), (1, 5), (7, 7)], ids=str)
def test_kernels_poison_stays_in_its_sequence(size, dtype, poison):
    """Of all that share its block, in every layer."""
    tensors, settings = make(OP, stack(size, 20, images=4))
    tensors = convert(tensors, getattr(torch, dtype))
    clean = call(OP, tensors, settings, "cpu")
    for image in range(4):
        x = tensors["x"].clone()
        x[image, -1, -1, 3] = poison
        changed = (call(OP, {**tensors, "x": x}, settings, "cpu") != clean).flatten(1).any(1)
        assert changed.tolist() == [i == image for i in range(4)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_wide_heads(dtype):
    """Many dims in all: where a head's values are follows from the row by a multiplication."""
    check(OP, dict(shape=(1, 2, 2, 24), heads=10, head_dim=512, patch=(1, 1), layers=1), dtype=dtype, path="cpu")
