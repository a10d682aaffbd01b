# SPDX-License-Identifier: Apache-2.0
"""A NaN or an infinity in one place changes what it mathematically can reach, and not one bit of anything else.

Kernels work on whole vectors, pairs and tiles: the partner of an odd pixel, a lane between two sequences, a border of
zeros. None of that may be multiplied by data, since 0 · NaN is NaN. test_instruction_sets.py runs these again on every
instruction set.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import mvit_kernels
from mvit_kernels.backends import library
from mvit_kernels.freezing.modules import FrozenSequential
from mvit_kernels.freezing.program import TO_SIZE_OF, TO_WHOLE_PATCHES, Builder, Place
from support.cases import call, convert, make
from support.native import skip_without_a_compiler
from support.networks import Draw, composed, native

skip_without_a_compiler()

POISONS = (float("nan"), float("inf"), -float("inf"))
DTYPES = ("float32", "bfloat16")


def check(function: Callable[[Tensor], Tensor], x: Tensor, at: tuple[int, ...], reach: Tensor, what: str) -> None:
    """`function(x)` with each poison at x[at] keeps the bits of the clean result, which is finite, outside `reach`."""
    clean = function(x)
    assert clean.isfinite().all(), what
    assert not reach.expand_as(clean).all(), f"{what}: everything is in reach, so the case says nothing"
    for poison in POISONS:
        dirty = x.clone()
        dirty[at] = poison
        result = function(dirty)
        changed = (result != clean) & ~reach.expand_as(clean)  # NaN counts as changed
        assert not changed.any(), f"{what}, {poison} at {at}: {int(changed.sum())} values outside its reach changed"


ROWS = [(37, 17, 33), (37, 18, 34), (5, 24, 40), (70, 3, 5), (131, 64, 6)]


@pytest.mark.parametrize("sizes", ROWS, ids=str)
@pytest.mark.parametrize("dtype", [*DTYPES, "float64"])
@pytest.mark.parametrize("operator", ["layer_norm_linear", "linear_residual", "layer_norm_mlp"])
def test_kernels_rows(operator, dtype, sizes):
    """Only its own row: the result, and the gradient of x for a poisoned row and for a poisoned gradient."""
    rows, d, n = sizes
    tensors, settings = make(operator, dict(shape=(rows, d)) | (dict(hidden=n) if "mlp" in operator else dict(n=n)))
    tensors = convert(tensors, getattr(torch, dtype))
    x = tensors["x"]
    out = call(operator, tensors, settings, "cpu")
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(x.dtype)

    def grad_x(x: Tensor, grad: Tensor) -> Tensor:
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(call(operator, {**tensors, "x": leaf}, settings, "cpu"), leaf, grad)[0]

    for row in (0, rows // 2, rows - 1):
        reach = (torch.arange(rows) == row)[:, None]
        check(lambda x: call(operator, {**tensors, "x": x}, settings, "cpu"), x, (row, d - 1), reach, "result")
        check(lambda g: grad_x(x, g), grad_out, (row, 0), reach, "gradient of x by grad_out")
        check(lambda x: grad_x(x, grad_out), x, (row, 1), reach, "gradient of x") if "norm" in operator else None


@pytest.mark.parametrize(
    "heads, head_dim, patch, size",
    [(2, 5, (2, 2), (6, 10)), (3, 16, (1, 2), (5, 14)), (1, 1, (1, 3), (1, 9))],
)
@pytest.mark.parametrize("dtype", [*DTYPES, "float64"])
def test_kernels_patch_attention(dtype, heads, head_dim, patch, size):
    """Only one head of one sequence, forward and backward."""
    inner = heads * head_dim
    qkv = torch.randn(2, *size, 3 * inner, generator=torch.Generator().manual_seed(0)).to(getattr(torch, dtype))
    settings = dict(num_heads=heads, patch_size=patch, backend="cpu")
    grad_out = torch.randn(2, *size, inner, generator=torch.Generator().manual_seed(1)).to(qkv.dtype)

    def grad(qkv: Tensor, grad_out: Tensor) -> Tensor:
        leaf = qkv.clone().requires_grad_()
        return torch.autograd.grad(mvit_kernels.patch_attention(leaf, **settings), leaf, grad_out)[0]

    h, w, head = size[0] - 1, size[1] - 1, heads - 1
    rows, columns = torch.arange(size[0])[:, None], torch.arange(size[1])
    place = ((rows % patch[0] == h % patch[0]) & (columns % patch[1] == w % patch[1]))[None, :, :, None]
    place = place & (torch.arange(2) == 1)[:, None, None, None]
    reach = place & (torch.arange(inner) // head_dim == head)
    for part in range(3):
        at = (1, h, w, part * inner + head * head_dim)
        check(lambda q: mvit_kernels.patch_attention(q, **settings), qkv, at, reach, f"part {part}")
        check(lambda q: grad(q, grad_out), qkv, at, reach.repeat(1, 1, 1, 3), f"gradient by part {part}")
    check(lambda g: grad(qkv, g), grad_out, (1, h, w, head * head_dim), reach.repeat(1, 1, 1, 3), "by grad_out")


@pytest.mark.parametrize(
    "shape, hidden, out",
    [
        ((3, 33, 65, 4), 2, 64),
        ((1, 9, 10, 6), 34, 18),
        ((1, 8, 7, 5), 33, 7),
        ((1, 7, 9, 4), 5, 6),
        ((1, 6, 23, 3), 16, 3),
    ],
    ids=str,
)
@pytest.mark.parametrize("stride, dilation", [(1, 1), (2, 1), (1, 2), (2, 3)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_inverted_residual(dtype, stride, dilation, shape, hidden, out):
    tensors, settings = make(
        "inverted_residual", dict(shape=shape, hidden=hidden, out=out, stride=stride, dilation=dilation)
    )
    tensors64, tensors = convert(tensors, torch.float64), convert(tensors, getattr(torch, dtype))
    for h, w in (
        (0, 0),
        (shape[1] // 2, shape[2] // 2),
        (shape[1] // 2, shape[2] // 2 + 1),
        (shape[1] - 1, shape[2] - 1),
    ):
        at = (0, h, w, shape[3] - 1)
        dirty = tensors64["x"].clone()
        dirty[at] = torch.nan
        reach = call("inverted_residual", {**tensors64, "x": dirty}, settings, "oracle").isnan()
        with torch.inference_mode():
            check(
                lambda x: call("inverted_residual", {**tensors, "x": x}, settings, "cpu"),
                tensors["x"], at, reach, f"pixel {h}, {w}",
            )  # fmt: skip


@pytest.mark.parametrize("eps", [1e-5, 1e-60])
@pytest.mark.parametrize(
    "sizes",
    [
        dict(shape=(2, 6, 10, 16), heads=2, patch=(2, 2)),  # 15 tokens a sequence
        dict(shape=(1, 2, 66, 8), heads=1, patch=(2, 2)),  # 33: one in a block of its own
        dict(shape=(2, 5, 15, 12), heads=3, patch=(5, 3)),  # 5, of 4 channels a head
        dict(shape=(1, 6, 18, 10), heads=2, patch=(2, 3)),  # 18 tokens of 5 channels a head
        dict(shape=(3, 2, 2, 8), heads=2, patch=(2, 2)),  # one
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_transformer(dtype, sizes, eps):
    """Only one sequence; lanes between two sequences hold rows of zeros, which eps = 0 turns into NaN."""
    tensors, settings = make("transformer", sizes)
    tensors, settings = convert(tensors, getattr(torch, dtype)), {**settings, "eps": eps}
    (_, height, width, _), (ph, pw) = sizes["shape"], sizes["patch"]
    with torch.inference_mode():
        for h, w in ((0, 0), (height - 1, width - 1)):
            rows, columns = torch.arange(height)[:, None], torch.arange(width)
            reach = ((rows % ph == h % ph) & (columns % pw == w % pw))[None, :, :, None]
            reach = reach & (torch.arange(sizes["shape"][0]) == 0)[:, None, None, None]
            check(
                lambda x: call("transformer", {**tensors, "x": x}, settings, "cpu"),
                tensors["x"],
                (0, h, w, 1),
                reach,
                "x",
            )


def test_kernels_resize():
    """A pixel of weight 0 is not read: three columns become four and then three again, and the four rows stay as they
    are."""
    library.load("cpu")
    builder = Builder(2, torch.float32)
    source = builder.copy(Place(0, 0, 2), builder.value(2))
    resized = builder._step(TO_WHOLE_PATCHES, source, builder.value(2), 4, 4)
    back = builder._step(TO_SIZE_OF, resized, builder.value(2), source.value)
    builder.copy(back, builder.value(2))
    stored = builder.stored()
    program, weights = torch.ops.mvit_kernels.pack_network.cpu(stored.program, stored.weights)
    x, reach = Draw(1)(1, 2, 4, 3), torch.zeros(1, 4, 3, 2, dtype=torch.bool)
    reach[:, 2, :, 1] = True
    check(lambda x: torch.ops.mvit_kernels.network.cpu(x, weights, program, 2, 0), x, (0, 1, 2, 1), reach, "resize")


NETWORKS: dict[str, Callable[[Draw], FrozenSequential]] = {
    "an image's convolution": lambda draw: FrozenSequential(draw.conv(3, 16, 3, stride=2), draw.conv(16, 6, 1)),
    "odd channels": lambda draw: FrozenSequential(draw.conv(3, 7, 3), draw.inverted(7, 13, 5), draw.conv(5, 9, 3)),
    "dilated": lambda draw: FrozenSequential(draw.conv(4, 18, 3, dilation=2), draw.inverted(18, 22, 18, dilation=2)),
    "strided": lambda draw: FrozenSequential(draw.conv(3, 8, 3, stride=2), draw.inverted(8, 24, 10, stride=2)),
    "a block": lambda draw: FrozenSequential(draw.conv(3, 8, 3), draw.block(8, 12, heads=2, fusion=False, layers=1)),
}


@pytest.mark.parametrize("size", [(23, 31), (14, 22)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("network", NETWORKS)
def test_kernels_network(network, dtype, size):
    """Frozen chains: maps with borders of zeros, images of three channels that become four, resizes."""
    draw = Draw(5)
    module = NETWORKS[network](draw)
    x = draw(2, module[0].weight.shape[1], *size).to(getattr(torch, dtype))
    exact, module = copy.deepcopy(module).double(), module.to(x.dtype)
    for h, w in ((0, 0), (size[0] // 2, size[1] // 2 + 1), (size[0] - 1, size[1] - 1)):
        at = (0, 1, h, w)
        dirty = x.double()
        dirty[at] = torch.nan
        check(lambda x: native(module, x), x, at, composed(exact, dirty).isnan(), f"pixel {h}, {w}")
