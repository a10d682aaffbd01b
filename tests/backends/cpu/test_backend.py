# SPDX-License-Identifier: Apache-2.0
"""The C++ backend, in what the operators' own tests (which also run on path ``cpu``) do not cover.

Sizes around every vector's width, scores far outside exp's range, other numbers of threads, two callers at once, calls
that bypass Python's checks. test_instruction_sets.py runs those named ``test_kernels_…`` on every instruction set.
"""

import random
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from mvit_kernels.backends import library
from mvit_kernels.backends.library import raw
from support.cases import backward_arguments, convert, make, poisoned, raw_arguments
from support.checks import check, check_autocast, check_registration
from support.layouts import LAYOUTS, lay_out
from support.native import LIBRARY, skip_without_a_compiler, why_not_built

OP = "patch_attention"

skip_without_a_compiler()


def test_the_library_loads():
    assert LIBRARY.exists(), f"the C++ library is not built: {why_not_built()}"
    assert library.load("cpu") == ""


# ---------------------------------------------------------------------------------- kernels, on every instruction set


def _drawn(seed: int) -> dict:
    """A random case for `check`: most sizes lie next to a multiple of some vector's width."""
    draw = random.Random(seed)
    dtype = draw.choice(["float32", "float32", "bfloat16", "float64"])
    patch = draw.choice([(1, 1), (2, 2), (2, 2), (1, 2), (3, 1)])
    tokens = draw.choice([1, 2, 5, 8, 15, 16, 17, 31, 33, 47, 48, 49, 63, 65, 97, 127, 129, 130])
    if dtype == "float64":
        tokens = min(tokens, 33)  # when sums are long, PyTorch's float64 makes nearly the same roundings as the truth
    columns = draw.choice([n for n in range(1, tokens + 1) if tokens % n == 0])
    return dict(
        sizes=dict(
            shape=(draw.choice([1, 1, 2]), tokens // columns * patch[0], columns * patch[1]),
            heads=draw.choice([1, 2, 4]),
            head_dim=draw.choice([1, 3, 7, 8, 9, 15, 16, 17, 20, 24, 30, 31, 33, 36, 47, 48, 49, 60, 64, 65, 128]),
            patch=patch,
            scale=draw.choice([None, None, 0.3, -0.2]),
        ),
        dtype=dtype,
        layout=draw.choice(["contiguous", "transposed", "sliced", "offset", "expanded"]),  # adjacent channels
        seed=seed,
    )


@pytest.mark.parametrize("seed", range(50))
def test_kernels_drawn_at_random(seed):
    case = _drawn(seed)
    print(f"check({OP!r}, **{case}, path='cpu')")  # pytest shows it if the test fails
    check(OP, **case, path="cpu")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tokens, head_dim", [(256, 36), (340, 20), (1024, 16)])
def test_kernels_long_sequences(tokens, head_dim, dtype):
    check(OP, dict(shape=(1, tokens // 4, 4), heads=2, head_dim=head_dim, patch=(1, 1)), dtype=dtype, path="cpu")


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("tokens", [9, 150])
def test_kernels_scores_of_ten_thousand(tokens, dtype):
    """Weights are 0 and 1, and running maxima jump by thousands; of bfloat16's 8 bits we only ask for finite
    results."""
    sizes = dict(shape=(1, tokens, 1), heads=2, head_dim=16, patch=(1, 1), magnitude=100.0)
    if dtype != "bfloat16":
        check(OP, sizes, dtype=dtype, path="cpu")
    tensors, settings = make(OP, sizes)
    tensors = convert(tensors, getattr(torch, dtype))
    out, logsumexp = raw(OP, "cpu")(*raw_arguments(OP, tensors, settings))
    grad = raw(f"{OP}_backward", "cpu")(*backward_arguments(OP, tensors, settings, (out, logsumexp), out))
    assert logsumexp.max() > 1e4 and out.isfinite().all() and grad.isfinite().all()


def test_kernels_infinite_weights_of_nothing():
    """A score of -inf has weight 0, as in PyTorch; a row of NaN affects its own sequence only."""
    qkv = torch.randn(1, 40, 1, 3 * 16, generator=torch.Generator().manual_seed(0))
    qkv[0, :, 0, 0] = qkv[0, :, 0, 0].abs() + 1
    qkv[0, 7, 0, 16] = -torch.inf
    out, logsumexp = raw(OP, "cpu")(qkv, 1, (1, 1), 0.25)
    q, k, v = qkv[0, :, 0].split(16, -1)
    torch.testing.assert_close(out[0, :, 0], torch.softmax(q @ k.t() * 0.25, -1) @ v)
    torch.testing.assert_close(logsumexp[0, 0, 0], torch.logsumexp(q @ k.t() * 0.25, -1))


def _forward_and_backward(sizes: dict, dtype: str = "float32", seed: int = 0) -> list[torch.Tensor]:
    tensors, settings = make(OP, sizes, seed)
    tensors = convert(tensors, getattr(torch, dtype))
    results = raw(OP, "cpu")(*raw_arguments(OP, tensors, settings))
    return [*results, raw(f"{OP}_backward", "cpu")(*backward_arguments(OP, tensors, settings, results, results[0]))]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize(
    "sizes",
    [
        dict(shape=(1, 32, 32), heads=1, head_dim=36, patch=(2, 2)),  # 4 strands: threads share out their queries
        dict(shape=(1, 65, 7), heads=1, head_dim=17, patch=(1, 1)),  # 1 strand of 455 tokens, no multiple of a part
        dict(shape=(2, 16, 16), heads=4, head_dim=48, patch=(2, 2)),
    ],
    ids=str,
)
def test_kernels_same_bits_for_any_number_of_threads(sizes, dtype):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = _forward_and_backward(sizes, dtype)
        for threads in (1, 2, 3, 4, 7, 4, 2):
            torch.set_num_threads(threads)
            together = _forward_and_backward(sizes, dtype)
            assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True)), f"{threads} threads"
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_kernels_backward_takes_what_autograd_brings(layout):
    """A gradient of any layout, even with channels that are not adjacent, and saved tensors of any strides."""
    tensors, settings = make(OP, dict(shape=(2, 6, 8), heads=2, head_dim=12, patch=(2, 2)))
    qkv = tensors["qkv"].float()
    out, logsumexp = raw(OP, "cpu")(*raw_arguments(OP, {"qkv": qkv}, settings))
    grad_out, _ = lay_out(torch.randn(out.shape, generator=torch.Generator().manual_seed(1)), layout)
    rest = (2, (2, 2), 12**-0.5)
    backward = raw(f"{OP}_backward", "cpu")
    expected = backward(grad_out.contiguous(), qkv, out, logsumexp, *rest)
    got = backward(grad_out, qkv, lay_out(out, "strided")[0], lay_out(logsumexp, "transposed")[0], *rest)
    assert torch.equal(got, expected)


def test_kernels_leave_nothing_behind():
    """The memory that a thread keeps between calls never shows: small, large and poisoned calls in turn."""
    small = dict(shape=(1, 5, 3), heads=2, head_dim=17, patch=(1, 1))
    large = dict(shape=(1, 40, 8), heads=2, head_dim=60, patch=(1, 1))
    first = _forward_and_backward(small)
    tensors, settings = make(OP, large)
    raw(OP, "cpu")(torch.full_like(tensors["qkv"], torch.nan).float(), 2, (1, 1), 1.0)
    with poisoned():
        again = _forward_and_backward(small)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


# ------------------------------------------------------------------------------------------------ the operators' edge


def test_two_python_threads_at_once():
    cases = [dict(shape=(1, 24, 24), heads=2, head_dim=d, patch=(2, 2)) for d in (16, 36)]
    alone = [_forward_and_backward(sizes, seed=i) for i, sizes in enumerate(cases)]
    with ThreadPoolExecutor(4) as pool:
        jobs = [(i, pool.submit(_forward_and_backward, cases[i], seed=i)) for _ in range(20) for i in range(2)]
    for i, job in jobs:
        assert all(torch.equal(a, b) for a, b in zip(alone[i], job.result(), strict=True))


@pytest.mark.parametrize("shape", [(0, 4, 4, 24), (2, 0, 4, 24), (2, 4, 0, 24)])
def test_maps_of_nothing(shape):
    qkv = torch.empty(shape)
    out, logsumexp = raw(OP, "cpu")(qkv, 2, (2, 2), 1.0)
    assert out.shape == (*shape[:3], 8) and logsumexp.numel() == out.numel() // 4
    assert raw(f"{OP}_backward", "cpu")(out, qkv, out, logsumexp, 2, (2, 2), 1.0).shape == shape


GOOD = dict(qkv=torch.ones(1, 4, 6, 24), num_heads=2, patch_size=[2, 2], scale=1.0)


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(qkv=torch.ones(4, 6, 24)), "not of 3 axes"),
        (dict(qkv=torch.ones(1, 4, 6, 0)), "0 channels are not q, k and v of 2 heads"),
        (dict(qkv=torch.ones(1, 4, 6, 25)), "25 channels are not q, k and v of 2 heads"),
        (dict(qkv=torch.ones(1, 4, 6, 24).int()), "float32, bfloat16, float16 and float64"),
        (dict(num_heads=0), "of 0 heads"),
        (dict(num_heads=5), "of 5 heads"),
        (dict(patch_size=[0, 2]), "two positive numbers"),
        (dict(patch_size=[2, -2]), "two positive numbers"),
        (dict(patch_size=[4, 4]), "a map of 4 x 6 does not divide into patches of 4 x 4"),
    ],
    ids=str,
)
def test_the_library_checks_for_itself(change, says):
    with pytest.raises(RuntimeError, match=re.escape(says)):
        raw(OP, "cpu")(**{**GOOD, **change})


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(grad_out=torch.ones(1, 4, 6, 7)), "grad_out is not of qkv's (B, H, W) and 8 channels"),
        (dict(grad_out=torch.ones(2, 4, 6, 8)), "grad_out is not of qkv's (B, H, W) and 8 channels"),
        (dict(grad_out=torch.ones(1, 4, 6, 8).double()), "grad_out is not of qkv's dtype and device"),
        (dict(out=torch.ones(1, 4, 6)), "out is not of qkv's (B, H, W) and 8 channels"),
        (dict(logsumexp=torch.ones(1, 4, 2, 5)), "logsumexp is not the one that the forward operator"),
        (dict(logsumexp=torch.ones(1, 4, 2, 6).double()), "logsumexp is not the one that the forward operator"),
    ],
    ids=str,
)
def test_the_library_checks_backward_for_itself(change, says):
    out, logsumexp = raw(OP, "cpu")(**GOOD)
    with pytest.raises(RuntimeError, match=re.escape(says)):
        raw(f"{OP}_backward", "cpu")(**{**GOOD, **dict(grad_out=out, out=out, logsumexp=logsumexp), **change})


@pytest.mark.parametrize("layout", ["contiguous", "sliced"])
def test_registration(layout):
    check_registration(OP, dict(shape=(2, 6, 8), heads=2, head_dim=12, patch=(2, 2)), layout, backend="cpu")


def test_autocast():
    check_autocast(OP, dict(shape=(2, 6, 8), heads=2, head_dim=12, patch=(2, 2)), path="cpu")
