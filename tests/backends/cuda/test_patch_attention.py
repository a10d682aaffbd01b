# SPDX-License-Identifier: Apache-2.0
"""``patch_attention`` in CUDA C++: its own source, run on the CPU with a race check on, against float64."""

import pytest
import torch

from mvit_kernels.backends import reference
from support.emulation import Driver
from support.oracle import patch_attention_and_logsumexp
from support.ptx.compiled_cuda import CompiledDriver
from support.tolerance import assert_close_as_pytorch

HEAD_DIMS = (8, 16, 20, 24, 30, 36, 48, 60)  # Kornia's 8, then those of xxs, xs and s
DTYPES = (torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def driver():
    return Driver("patch_attention")


def draw(shape, heads, head_dim, patch, dtype=torch.bfloat16, seed=0, magnitude=1.0):
    """qkv and grad_out of a map of shape (B, patch rows, patch columns)."""
    (batch, rows, columns), (ph, pw) = shape, patch
    generator = torch.Generator().manual_seed(seed)
    size = (batch, rows * ph, columns * pw)
    qkv = torch.randn(*size, 3 * heads * head_dim, generator=generator) * magnitude
    return qkv.to(dtype), torch.randn(*size, heads * head_dim, generator=generator).to(dtype)


def common_bytes(tensor, head_dim):
    """As csrc/cuda/patch_attention.cpp computes it."""
    places = tensor.data_ptr() | 16 | 2 * head_dim
    for size, step in zip(tensor.shape[:3], tensor.stride()[:3], strict=True):
        places |= 2 * step if size > 1 else 0
    return places & -places


def sizes(qkv, heads, patch):
    batch, height, width, channels = qkv.shape
    return batch, height // patch[0], width // patch[1], *patch, heads, channels // (3 * heads)


def forward(driver, qkv, heads, patch, scale, seed=0, out=None):
    batch, rows, columns, ph, pw, _, head_dim = sizes(qkv, heads, patch)
    out = qkv.new_full((*qkv.shape[:3], qkv.shape[3] // 3), torch.nan) if out is None else out
    logsumexp = torch.full((batch, ph * pw, heads, rows * columns), torch.nan)
    maps = (qkv, *qkv.stride()[:3], out, *out.stride()[:3], logsumexp)
    rest = (*sizes(qkv, heads, patch), float(scale), common_bytes(qkv, head_dim), qkv.dtype == torch.float16)
    driver.forward(seed, *maps, *rest, writes=[out, logsumexp])
    return out, logsumexp


def is_whole(qkv, heads, patch):
    """Whether backward gives a whole strand to one block, as csrc/cuda/patch_attention.h decides it."""
    _, rows, columns, _, _, _, head_dim = sizes(qkv, heads, patch)
    return rows * columns <= (256 if head_dim <= 40 else 128)


def backward(driver, grad_out, qkv, out, logsumexp, heads, patch, scale, whole=False, seed=0, grad_qkv=None):
    head_dim = qkv.shape[3] // (3 * heads)
    grad_qkv = torch.full(qkv.shape, torch.nan, dtype=qkv.dtype) if grad_qkv is None else grad_qkv
    maps = (t for tensor in (grad_out, qkv, out) for t in (tensor, *tensor.stride()[:3]))
    copy_bytes = min(common_bytes(qkv, head_dim), common_bytes(grad_out, head_dim))
    rest = (*sizes(qkv, heads, patch), float(scale), copy_bytes, qkv.dtype == torch.float16, whole)
    driver.backward(seed, *maps, logsumexp, grad_qkv, *grad_qkv.stride()[:3], *rest, writes=[grad_qkv])
    return grad_qkv


def check(driver, qkv, grad_out, heads, patch, scale=None, seeds=(0,)):
    """Values, logsumexp and gradients by the tolerance rule; the same bits whatever the schedule."""
    scale = (qkv.shape[3] // (3 * heads)) ** -0.5 if scale is None else scale
    out, logsumexp = forward(driver, qkv, heads, patch, scale, seeds[0])
    given = (driver, grad_out, qkv, out, logsumexp, heads, patch, scale)
    grads = {whole: backward(*given, whole, seeds[0]) for whole in (False, True)[: 1 + is_whole(qkv, heads, patch)]}
    for seed in seeds[1:]:
        for ours, again in zip((out, logsumexp), forward(driver, qkv, heads, patch, scale, seed), strict=True):
            assert torch.equal(ours, again)
        for whole, grad_qkv in grads.items():
            assert torch.equal(grad_qkv, backward(*given, whole, seed))

    exact = qkv.detach().double().requires_grad_()
    truth, true_logsumexp = patch_attention_and_logsumexp(exact, heads, patch, scale)
    usual = qkv.detach().clone().requires_grad_()
    pytorch = reference.patch_attention(usual, heads, patch, scale)
    _, pytorch_logsumexp = torch.ops.mvit_kernels.patch_attention.reference(qkv, heads, patch, scale)
    truth.backward(grad_out.double())
    pytorch.backward(grad_out)
    assert_close_as_pytorch("out", out, pytorch, truth)
    assert_close_as_pytorch("logsumexp", logsumexp, pytorch_logsumexp, true_logsumexp)
    inner = qkv.shape[3] // 3
    parts = {"grad_qkv": slice(None)}
    if logsumexp.shape[-1] > 1:  # for one token grad_q and grad_k are 0
        parts |= {f"grad_{name}": slice(index * inner, (index + 1) * inner) for index, name in enumerate("qkv")}
    for whole, grad_qkv in grads.items():
        for name, part in parts.items():
            name = f"{name}, {'whole' if whole else 'by blocks'}"
            assert_close_as_pytorch(name, grad_qkv[..., part], usual.grad[..., part], exact.grad[..., part])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_head_dims(driver, head_dim, dtype):
    check(driver, *draw((2, 4, 4), 4, head_dim, (2, 2), dtype), 4, (2, 2), seeds=(0, 1, 2))


@pytest.mark.parametrize("head_dim", [2, 6, 22, 44, 50, 58, 64])
def test_other_head_dims(driver, head_dim):
    check(driver, *draw((1, 3, 6), 2, head_dim, (1, 2)), 2, (1, 2))


@pytest.mark.parametrize("head_dim", [20, 36, 60])
@pytest.mark.parametrize(
    "shape, patch",
    [
        ((2, 1, 1), (2, 2)),  # N = 1
        ((1, 3, 1), (1, 3)),  # one patch across
        ((1, 1, 5), (3, 1)),
        ((1, 5, 3), (2, 1)),
        ((3, 7, 7), (1, 1)),  # N = 49; three strands for two groups
        ((1, 5, 13), (1, 1)),  # N = 65, one more than a chunk
        ((1, 10, 13), (1, 1)),  # N = 130, two more than a block
    ],
)
def test_shapes(driver, shape, patch, head_dim):
    check(driver, *draw(shape, 1, head_dim, patch), 1, patch, seeds=(3, 4))


@pytest.mark.parametrize("head_dim", [16, 36, 48])
@pytest.mark.parametrize("tokens", [(14, 14), (16, 16)])
def test_whole_sequences(driver, tokens, head_dim):
    check(driver, *draw((1, *tokens), 1, head_dim, (1, 1)), 1, (1, 1))


def test_the_longest_sequence_of_a_segmentation_network(driver):
    check(driver, *draw((1, 32, 32), 1, 20, (1, 1)), 1, (1, 1))


@pytest.mark.parametrize("scale", [1.0, -0.3, 0.0])
def test_scale(driver, scale):
    check(driver, *draw((1, 6, 6), 2, 24, (1, 1)), 2, (1, 1), scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [0.25, -0.25])
def test_scores_that_overflow_without_the_maximum_taken_out(driver, scale, dtype):
    """Scores reach ± 300, and the largest of a row is as often in a later chunk as in the first."""
    check(driver, *draw((1, 12, 12), 1, 16, (1, 1), dtype, magnitude=9.0), 1, (1, 1), scale)


@pytest.mark.parametrize("head_dim, wanted", [(8, 16), (16, 16), (24, 16), (20, 8), (36, 8), (60, 8), (30, 4)])
def test_rows_are_copied_as_widely_as_they_lie(driver, head_dim, wanted):
    """By 16, 8 or 4 bytes at once, even where a wider copy would happen to be aligned; all with the same result."""
    qkv, grad_out = draw((1, 4, 6), 2, head_dim, (2, 1))
    assert common_bytes(qkv, head_dim) == wanted
    whole, _ = forward(driver, qkv, 2, (2, 1), 0.3)
    for start in (2, 4):  # elements off
        buffer = torch.full((qkv.numel() + 8,), 42.0, dtype=qkv.dtype)
        moved = buffer[start : start + qkv.numel()].view(qkv.shape)
        moved.copy_(qkv)
        assert common_bytes(moved, head_dim) == min(2 * start, wanted)
        assert torch.equal(forward(driver, moved, 2, (2, 1), 0.3)[0], whole)
        check(driver, moved, grad_out, 2, (2, 1), 0.3)


def test_strides(driver):
    """A map cut out of a larger one, one with its axes in another order, and one image expanded to a batch."""
    qkv, grad_out = draw((2, 4, 6), 2, 20, (2, 2))
    cut = torch.full((2, 11, 15, 130), 42.0, dtype=qkv.dtype)[:, 2:10, 1:13, 4:124]
    cut.copy_(qkv)
    check(driver, cut, grad_out, 2, (2, 2))
    turned = qkv.transpose(1, 2).contiguous().transpose(1, 2)
    check(driver, turned, grad_out.transpose(0, 1).contiguous().transpose(0, 1), 2, (2, 2))
    check(driver, qkv[:1].expand(3, -1, -1, -1), grad_out[:1].expand(3, -1, -1, -1), 2, (2, 2))


@pytest.mark.parametrize("head_dim", [20, 30])
def test_nothing_is_written_beside_the_result(driver, head_dim):
    qkv, grad_out = draw((1, 5, 7), 2, head_dim, (1, 2))
    plain, logsumexp = forward(driver, qkv, 2, (1, 2), 0.2)
    buffer = torch.full((3, 9, 20, 2 * head_dim + 6), 42.0, dtype=qkv.dtype)
    view = buffer[1:2, 2:7, 3:17, 2 : 2 + 2 * head_dim]
    forward(driver, qkv, 2, (1, 2), 0.2, out=view)
    assert torch.equal(view, plain)
    view.fill_(42)
    assert (buffer == 42).all()
    wide = torch.full((3, 9, 20, 6 * head_dim + 6), 42.0, dtype=qkv.dtype)
    view = wide[1:2, 2:7, 3:17, 2 : 2 + 6 * head_dim]
    for whole in (False, True):
        given = (driver, grad_out, qkv, plain, logsumexp, 2, (1, 2), 0.2, whole)
        backward(*given, grad_qkv=view)
        assert torch.equal(view, backward(*given))
        view.fill_(42)
        assert (wide == 42).all()


def test_nan_stays_in_its_sequence(driver):
    qkv, grad_out = draw((1, 4, 5), 2, 24, (2, 2))
    qkv[0, 3, 2] = torch.nan
    out, _ = forward(driver, qkv, 2, (2, 2), 0.2)
    rows, columns = torch.arange(8)[:, None], torch.arange(10)[None]
    assert torch.equal(out[0].isnan().all(-1), (rows % 2 == 1) & (columns % 2 == 0))
    assert torch.equal(out[0].isnan().any(-1), (rows % 2 == 1) & (columns % 2 == 0))


def test_scores_far_below_zero(driver):
    """Compared with which the score 0 of a padding row is infinitely large."""
    qkv, grad_out = draw((1, 5, 5), 2, 36, (1, 1), magnitude=0.1)
    qkv[..., :72] += 3
    qkv[..., 72:144] -= 3
    check(driver, qkv, grad_out, 2, (1, 1), 1.0)


def test_matrices_lie_in_different_banks(driver):
    """In all launches that this file has made so far."""
    assert driver.matrix_conflicts() == 0


# ------------------------------------------------------------------------------------------------------ planted faults

BARRIER = "sync_threads();  // the next chunk is there for all warps, and all are done with this one\n"
RACE = "no barrier after|nobody wrote it|in flight"
FORWARD, BACKWARD = "patch_attention_kernel.cu", "patch_attention_backward_kernel.cu"
WHOLE, GRADIENT = "patch_attention_backward_whole_kernel.cu", "patch_attention_gradient.h"
ONE_HEAD_DIM = [
    ("patch_attention.h", "switch (padded) {", "return f(std::integral_constant<int, 40>{});\n#if 0"),
    ("patch_attention.h", "return f(std::integral_constant<int, 64>{});\n  }", "#endif"),
]
FAULTS = [
    (FORWARD, BARRIER, "", RACE),
    (FORWARD, f"wait_copies<0>();\n    {BARRIER}", f"wait_copies<1>();\n    {BARRIER}", "in flight"),
    (FORWARD, "sync_threads();\n  Attention", "Attention", RACE),
    (FORWARD, "slots + chunk % plan.slots * slot_bytes;\n    if", "slots;\n    if", RACE),
    (FORWARD, "i % 2 >= keys", "i % 2 > keys", "error .* is over"),
    (FORWARD, "total[m][r] *= shrink;", "", "error .* is over"),
    (FORWARD, "n < shape.tokens && column == 0", "n <= shape.tokens && column == 0", "outside of every buffer"),
    ("strands.h", "if (head_dim == padded) return;", "return;", "nobody wrote it"),
    ("strands.h", "n < token_count;", "true;", "outside of every buffer|error .* is over"),
    (
        "strands.h",
        "~0u / tokens.columns + 1",
        "~0u / tokens.columns",
        "outside of every buffer|error .* is over|no barrier",
    ),
    (BACKWARD, BARRIER, "", RACE),
    (BACKWARD, f"wait_copies<0>();\n      {BARRIER}", BARRIER, "in flight"),
    (GRADIENT, "exists ? exp2", "true ? exp2", "error nan is over"),
    (GRADIENT, "(ds[half][i] - queries.delta[i % 2])", "ds[half][i]", "error .* is over"),
    (WHOLE, "sync_threads();  // all warps", "//", RACE),
    (WHOLE, "sync_threads();  // ds of this chunk", "//", RACE),
    (WHOLE, "key < tokens ? tiles[m][i] : 0", "tiles[m][i]", "error nan is over"),
    (WHOLE, "wait_copies<0>();", "wait_copies<1>();", "in flight"),
]


@pytest.mark.parametrize("header, text, other, says", FAULTS, ids=range(len(FAULTS)))
def test_a_planted_fault_is_found(header, text, other, says):
    """At every seed, in a sequence of more than two chunks and blocks, or one that ends inside a tile. (Where no race
    is, any order of the threads has the same values.)"""
    driver = Driver("patch_attention", [*ONE_HEAD_DIM, (header, text, other)], ["MVIT_ONLY_BFLOAT16"])
    long = draw((1, 10, 13), 1, 36, (2, 1), magnitude=2.0)
    below, grad_out = draw((1, 5, 5), 2, 36, (1, 1), magnitude=0.1)
    below[..., :72] += 3
    below[..., 72:144] -= 3
    for seed in range(5 if says in (RACE, "in flight") else 2):
        with pytest.raises(AssertionError, match=says):
            check(driver, *long, 1, (2, 1), seeds=(seed,))
            check(driver, below, grad_out, 2, (1, 1), 1.0, seeds=(seed,))


def test_without_a_fault_the_same_is_right():
    test_scores_far_below_zero(Driver("patch_attention", ONE_HEAD_DIM, ["MVIT_ONLY_BFLOAT16"]))


def test_compiled_code_that_does_not_run_is_no_success(monkeypatch):
    """`support.ptx.compiled_cuda` gets the launches of a driver's host code. One that emulates its kernel itself makes
    none: its source would run, and every test of compiled code would pass."""
    driver = CompiledDriver("patch_attention")
    monkeypatch.setattr(Driver, "_call", lambda *arguments, **named: None)
    with pytest.raises(AssertionError, match=r"patch_attention\.cpp: forward executed no PTX"):
        driver.forward(0, writes=[torch.zeros(1)])
