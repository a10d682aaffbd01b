# SPDX-License-Identifier: Apache-2.0
"""``patch_attention``: which tokens attend to each other, values and gradients on every path, and what it refuses."""

import pytest
import torch
import torch.nn.functional as F

from mvit_kernels import patch_attention
from support.cases import DTYPES, call, call_raw, convert, evaluate, make, paths, plain_dtype, takes
from support.checks import check
from support.layouts import lay_out
from support.operator_tests import OperatorTests
from support.oracle import patch_attention_and_logsumexp, sequences
from support.tolerance import assert_close_as_pytorch

OP = "patch_attention"
PATHS = paths(OP)
SMALL = dict(shape=(2, 6, 8), heads=2, head_dim=12, patch=(2, 2))
HEAD_DIMS = (8, 16, 20, 24, 30, 36, 48, 60)  # Kornia's 8, then those of xxs, xs and s
CASES = [
    *(dict(shape=(2, 4, 6), heads=4, head_dim=head_dim, patch=(2, 2)) for head_dim in HEAD_DIMS),
    *(dict(shape=(1, 4, 6), heads=2, head_dim=head_dim, patch=(2, 2)) for head_dim in (1, 17, 33, 100)),
    *(dict(shape=(1, 4, 4), heads=heads, head_dim=16, patch=(2, 2)) for heads in (1, 2, 3, 5, 6, 7, 8)),
    *(dict(shape=(2, 8, 6), heads=2, head_dim=12, patch=patch) for patch in ((2, 1), (1, 2), (4, 2), (2, 3), (1, 1))),
    dict(shape=(1, 10, 2), heads=2, head_dim=16, patch=(2, 2)),  # one patch across
    dict(shape=(2, 2, 2), heads=4, head_dim=16, patch=(2, 2)),  # one patch: N = 1, the values themselves
    dict(shape=(3, 1, 1), heads=2, head_dim=8, patch=(1, 1)),
    dict(shape=(1, 16, 16), heads=4, head_dim=16, patch=(2, 2)),  # N = 64, stage 4 of xxs at 256 px
    dict(shape=(1, 10, 26), heads=1, head_dim=20, patch=(2, 2)),  # N = 65, one more than any tile
    dict(shape=(1, 34, 10), heads=1, head_dim=8, patch=(1, 1)),  # N = 340
]
REFUSED = [
    (dict(qkv=[1.0]), TypeError, ("qkv is a list", "torch.Tensor is wanted")),
    (dict(qkv=lambda t: t.long()), TypeError, ("qkv is torch.int64", "float32, bfloat16")),
    (dict(qkv=lambda t: t[0]), ValueError, ("qkv has shape (6, 8, 72)", "4 axes (B, H, W, 3·inner)")),
    (dict(qkv=lambda t: t[..., :71]), ValueError, ("qkv has 71 channels", "3 · num_heads = 6")),
    (dict(qkv=lambda t: t[..., :0]), ValueError, ("qkv has 0 channels", "positive multiple")),
    (dict(num_heads=5), ValueError, ("qkv has 72 channels", "3 · num_heads = 15")),
    (dict(num_heads=0), ValueError, ("num_heads is 0", "positive int")),
    (dict(num_heads=True), ValueError, ("num_heads is True", "positive int")),
    (dict(num_heads=2.0), ValueError, ("num_heads is 2.0", "positive int")),
    (dict(qkv=lambda t: t[:, :5]), ValueError, ("qkv is a map of 5 × 8", "patches of 2 × 2", "transformer_on_map")),
    (dict(qkv=lambda t: t[:, :, :7]), ValueError, ("qkv is a map of 6 × 7", "patches of 2 × 2")),
    (dict(qkv=lambda t: t[:, :0]), ValueError, ("qkv is a map of 0 × 8",)),
    (dict(patch_size=(4, 3)), ValueError, ("qkv is a map of 6 × 8", "patches of 4 × 3")),
    (dict(patch_size=(2, 2, 2)), ValueError, ("patch_size is (2, 2, 2)", "(height, width)")),
    (dict(patch_size=(0, 2)), ValueError, ("patch_size is (0, 2)", "positive ints")),
    (dict(patch_size=(2.0, 2)), ValueError, ("patch_size is (2.0, 2)", "positive ints")),
    (dict(patch_size=2.0), ValueError, ("patch_size is 2.0", "positive ints")),
    (dict(patch_size=None), ValueError, ("patch_size is None", "positive ints")),
    (dict(patch_size=True), ValueError, ("patch_size is True", "positive ints")),
    (dict(patch_size="22"), ValueError, ("patch_size is '22'", "positive ints")),
    (dict(scale=float("inf")), ValueError, ("scale is inf", "finite")),
    (dict(scale=float("nan")), ValueError, ("scale is nan", "finite")),
    (dict(scale="0.1"), ValueError, ("scale is '0.1'", "finite")),
    (dict(backend="CPU"), ValueError, ("unknown backend 'CPU'",)),
]


class TestPatchAttention(OperatorTests):
    operator, cases, small, refused = OP, CASES, SMALL, REFUSED
    tiny = [dict(shape=(1, 4, 2), heads=2, head_dim=2, patch=patch) for patch in ((2, 1), (1, 1))]
    repeated = dict(shape=(2, 16, 16), heads=4, head_dim=16, patch=(2, 2))
    test_norm_parameters_in_float32 = None  # it has no norm


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_empty_batch(dtype, path):
    check(OP, dict(shape=(0, 4, 6), heads=2, head_dim=12, patch=(2, 2)), dtype=dtype, path=path)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scale", [1.0, 0.05, -0.3, 0.0, 1])
def test_scale(scale, dtype, path):
    check(OP, {**SMALL, "scale": scale}, dtype=dtype, path=path)


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_pytorch_is_never_asked_for_a_scale_that_is_not_positive(scale, monkeypatch):
    """Its fused attention on a GPU gives NaN there."""
    asked, attention = [], F.scaled_dot_product_attention

    def watched(*arguments, scale, **more):
        asked.append(scale)
        return attention(*arguments, scale=scale, **more)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    tensors, settings = make(OP, {**SMALL, "scale": scale})
    call(OP, convert(tensors, torch.bfloat16), settings, "reference")
    assert asked and min(asked) > 0


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_scores_that_overflow_without_the_maximum_taken_out(dtype, path):
    """Scores reach ± 300: exp(300) is infinite in float32, and half of a row's weights underflow."""
    check(OP, dict(shape=(1, 16, 16), heads=2, head_dim=16, patch=(2, 2), magnitude=9.0), dtype=dtype, path=path)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", PATHS[1:])
def test_saved_logsumexp(backend, dtype):
    """The raw operator's second result, (B, ph·pw, heads, N): the logarithm of each row's softmax normaliser."""
    backend = "reference" if backend == "raw" else backend
    if not takes(backend, dtype):
        return  # its predicate refuses, which test_values_and_gradients checks
    tensors, settings = make(OP, dict(shape=(2, 4, 6), heads=3, head_dim=10, patch=(2, 1)))
    qkv = tensors["qkv"].to(getattr(torch, dtype))
    _, logsumexp = call_raw(OP, backend, {"qkv": qkv}, settings)
    q, k, _ = (
        qkv.float().reshape(2, 2, 2, 6, 3, 3, 10).permute(4, 0, 2, 5, 1, 3, 6).flatten(4, 5)
    )  # (B, place, head, N, head_dim); places are rows of a patch
    pytorch = torch.logsumexp(q @ k.transpose(-1, -2) * 10**-0.5, -1)
    _, truth = patch_attention_and_logsumexp(qkv.double(), 3, (2, 1), 10**-0.5)
    assert_close_as_pytorch("logsumexp", logsumexp, pytorch, truth)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("patch", [(2, 2), (1, 1), (2, 1), (1, 3), (4, 3)])
def test_who_attends_to_whom(patch, path):
    """With equal scores and a distinct value for each token, the result shows exactly which tokens were attended to."""
    height, width = 4, 6
    tokens = height * width
    values = torch.eye(tokens).reshape(1, height, width, tokens)
    qkv = torch.cat([torch.zeros(1, height, width, 2 * tokens), values], -1)
    qkv, settings = qkv.to(plain_dtype(path)), {"num_heads": 1, "patch_size": patch, "scale": None}
    out = call(OP, {"qkv": qkv}, settings, path).reshape(tokens, tokens).float()
    ph, pw = patch
    for t in range(tokens):
        for s in range(tokens):
            (h, w), (hs, ws) = divmod(t, width), divmod(s, width)
            together = h % ph == hs % ph and w % pw == ws % pw
            assert (out[t, s] > 0) == together, f"token {(h, w)} and {(hs, ws)} of patches {patch}"
    torch.testing.assert_close(out.sum(-1), torch.ones(tokens), rtol=0, atol=4 * torch.finfo(plain_dtype(path)).eps)


@pytest.mark.parametrize("path", PATHS)
def test_heads_keep_apart(path):
    """Changing one head's q, k and v changes only that head's part of the result, and everywhere."""
    tensors, settings = make(OP, dict(shape=(1, 4, 4), heads=4, head_dim=8, patch=(2, 2)))
    qkv = tensors["qkv"].to(plain_dtype(path))
    before = call(OP, {"qkv": qkv}, settings, path)
    qkv.unflatten(-1, (3, 4, 8))[..., 2, :] += torch.randn(1, 4, 4, 3, 8).to(qkv.dtype)
    changed = (call(OP, {"qkv": qkv}, settings, path) != before).unflatten(-1, (4, 8)).any(-1)
    assert changed[..., 2].all() and not changed[..., [0, 1, 3]].any()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("patch", [(2, 2), (4, 1)])
def test_a_pixel_changes_its_own_sequence_only(patch, path):
    tensors, settings = make(OP, dict(shape=(2, 8, 6), heads=2, head_dim=12, patch=patch))
    qkv = tensors["qkv"].to(plain_dtype(path))
    before = call(OP, {"qkv": qkv}, settings, path)
    qkv[1, 5, 3] += 1
    changed = (call(OP, {"qkv": qkv}, settings, path) != before).any(-1)
    expected = torch.zeros(2, 48, dtype=torch.bool)
    expected[1, next(tokens for tokens in sequences(8, 6, patch) if 5 * 6 + 3 in tokens)] = True
    assert torch.equal(changed, expected.reshape(2, 8, 6))


@pytest.mark.parametrize("path", PATHS)
def test_permuted_tokens_permute_the_result(path):
    """Attention does not depend on the order of a sequence; nor do gradients."""
    tensors, settings = make(OP, dict(shape=(1, 6, 8), heads=2, head_dim=12, patch=(2, 2)))
    generator = torch.Generator().manual_seed(3)
    order = torch.arange(48)
    for tokens in sequences(6, 8, (2, 2)):
        order[torch.tensor(tokens)] = torch.tensor(tokens)[torch.randperm(len(tokens), generator=generator)]
    back = order.argsort()

    def shuffled(t):
        qkv = t["qkv"].flatten(1, 2)[:, order].reshape(t["qkv"].shape)
        return call(OP, {"qkv": qkv}, settings, path).flatten(1, 2)[:, back].reshape(1, 6, 8, 24)

    inputs = convert(tensors, plain_dtype(path))
    ours = evaluate(shuffled, inputs, True)
    usual = evaluate(lambda t: call(OP, t, settings, "usual"), inputs, True)
    truth = evaluate(lambda t: call(OP, t, settings, "oracle"), convert(inputs, torch.float64), True)
    for name, value in ours.items():
        assert_close_as_pytorch(name, value, usual[name], truth[name])


@pytest.mark.parametrize("path", PATHS)
def test_a_whole_map_patch_size_of_one_is_ordinary_attention(path):
    qkv = torch.randn(2, 5, 3, 3 * 2 * 16, generator=torch.Generator().manual_seed(0)).to(plain_dtype(path))
    out = call(
        OP, {"qkv": qkv}, {"num_heads": 2, "patch_size": 1, "scale": None}, path if path != "raw" else "reference"
    )
    q, k, v = qkv.reshape(2, 15, 3, 2, 16).permute(2, 0, 3, 1, 4).double()
    truth = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 5, 3, 32)
    pytorch = F.scaled_dot_product_attention(*(t.to(qkv.dtype) for t in (q, k, v))).transpose(1, 2)
    pytorch = pytorch.reshape(2, 5, 3, 32)
    assert_close_as_pytorch("attention", out, pytorch, truth)


@pytest.mark.parametrize("path", PATHS)
def test_one_token_a_sequence_is_its_value(path):
    """And its score, which has no influence, gets a gradient of exactly 0."""
    generator = torch.Generator().manual_seed(0)
    inner = 4 * (50 if path == "cuda" else 100)  # CUDA C++ has heads of up to 64
    qkv = torch.randn(2, 2, 2, 3 * inner, generator=generator).to(plain_dtype(path)).requires_grad_(path != "raw")
    out = call(OP, {"qkv": qkv}, {"num_heads": 4, "patch_size": (2, 2), "scale": None}, path)
    assert torch.equal(out, qkv[..., 2 * inner :])
    if path in ("cpu", "triton"):  # else it is what PyTorch's fused attention gives, or a 16-bit result's rounding
        grad = torch.randn(out.shape, generator=generator).to(out.dtype)
        (grad_qkv,) = torch.autograd.grad(out, qkv, grad)
        assert not grad_qkv[..., : 2 * inner].any() and torch.equal(grad_qkv[..., 2 * inner :], grad)


@pytest.mark.parametrize("path", PATHS)
def test_nan_stays_in_its_sequence(path):
    tensors, settings = make(OP, SMALL)
    qkv = tensors["qkv"].to(plain_dtype(path))
    qkv[1, 3, 2] = torch.nan
    found = call(OP, {"qkv": qkv}, settings, path).isnan().all(-1)
    expected = torch.zeros(2, 48, dtype=torch.bool)
    expected[1, sequences(6, 8, (2, 2))[2]] = True  # row 3, column 2: second row, first column of the patch
    assert torch.equal(found, expected.reshape(2, 6, 8))


@pytest.mark.parametrize("layout", ["contiguous", "permuted", "transposed"])
@pytest.mark.parametrize("patch", [(2, 2), (1, 1)])
@pytest.mark.parametrize("heads", [1, 2])
def test_the_result_is_contiguous(heads, patch, layout):
    qkv, _ = lay_out(torch.randn(2, 4, 6, 48), layout)
    assert patch_attention(qkv, num_heads=heads, patch_size=patch, backend="reference").is_contiguous()
