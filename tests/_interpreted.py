# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels in Triton's interpreter, at few shapes that meet every branch. ``test_triton_backend`` runs this
file in a process of its own, since TRITON_INTERPRET is read when kernels are defined:

    TRITON_INTERPRET=1 python -m pytest tests/_interpreted.py

The operators' whole suites run there too (``make test-interpreted``), in minutes.
"""

import pytest
import torch
from _cases import DIFFERENTIABLE, call, convert, evaluate, make
from _checks import (
    check,
    check_autocast,
    check_gradients_one_by_one,
    check_registration,
    check_same_bits,
    one_thread,  # noqa: F401 (a fixture)
)
from _tolerance import assert_close_as_pytorch

import mvit_kernels
from mvit_kernels.triton import INTERPRETED

assert INTERPRETED, "run it with TRITON_INTERPRET=1"
launch = pytest.importorskip("mvit_kernels.triton._launch")

NARROW = {  # rows that are no tile, widths that are no power of two
    "layer_norm_linear": dict(shape=(2, 3, 5, 24), n=40, activation="silu"),
    "patch_attention": dict(shape=(2, 6, 8), heads=2, head_dim=12, patch=(2, 2)),
    "linear_residual": dict(shape=(2, 3, 5, 24), n=40),
    "layer_norm_mlp": dict(shape=(2, 3, 5, 24), hidden=40),
}

ROW_WISE = [
    ("linear_residual", dict(shape=(5, 33), n=100, bias=False), "float32"),
    ("linear_residual", dict(shape=(70, 144), n=144), "bfloat16"),  # nine chunks of 16 columns, two tiles of rows
    ("linear_residual", dict(shape=(5, 32), n=240), "float16"),
    ("linear_residual", dict(shape=(0, 24), n=8), "float32"),
    ("layer_norm_linear", dict(shape=(70, 144), n=432), "bfloat16"),
    ("layer_norm_linear", dict(shape=(5, 120), n=40, activation="silu"), "float16"),  # padded: 2 · 64
    ("layer_norm_linear", dict(shape=(5, 17), n=33, bias=False), "float32"),
    ("layer_norm_linear", dict(shape=(130, 24), n=8, activation="silu"), "float32"),  # several parts of the rows
    ("layer_norm_linear", dict(shape=(3, 300), n=24), "bfloat16"),  # too wide to stay in registers
    ("layer_norm_linear", dict(shape=(0, 24), n=8), "bfloat16"),
    ("layer_norm_mlp", dict(shape=(70, 144), hidden=288), "bfloat16"),
    ("layer_norm_mlp", dict(shape=(3, 80), hidden=320), "float16"),
    ("layer_norm_mlp", dict(shape=(40, 33), hidden=50), "float32"),
    ("layer_norm_mlp", dict(shape=(2, 0, 24), hidden=8), "float32"),
]
ATTENTION = [
    (dict(shape=(2, 4, 6), heads=4, head_dim=60, patch=(2, 2)), "bfloat16"),  # short
    (dict(shape=(1, 4, 6), heads=3, head_dim=20, patch=(2, 1)), "float32"),  # short, a head too many in the tile
    (dict(shape=(2, 2, 2), heads=4, head_dim=16, patch=(2, 2)), "float16"),  # one token
    (dict(shape=(1, 16, 16), heads=2, head_dim=36, patch=(2, 2)), "bfloat16"),  # 64 tokens, whole, in two parts
    (dict(shape=(1, 15, 16), heads=1, head_dim=30, patch=(1, 1)), "float16"),  # 240 tokens, whole, in blocks of keys
    (dict(shape=(1, 10, 26), heads=1, head_dim=36, patch=(2, 2)), "bfloat16"),  # 65 tokens: by blocks
    (dict(shape=(1, 3, 17), heads=1, head_dim=48, patch=(1, 1)), "float32"),
    (dict(shape=(1, 3, 7), heads=1, head_dim=100, patch=(1, 1)), "bfloat16"),
    (dict(shape=(0, 4, 6), heads=2, head_dim=12, patch=(2, 2)), "bfloat16"),
]


@pytest.mark.parametrize("operator, sizes, dtype", ROW_WISE, ids=str)
def test_row_wise(operator, sizes, dtype):
    check(operator, sizes, dtype=dtype, path="triton")


@pytest.mark.parametrize("sizes, dtype", ATTENTION, ids=str)
def test_attention(sizes, dtype):
    check("patch_attention", sizes, dtype=dtype, path="triton")


@pytest.mark.parametrize("layout", ["permuted", "sliced", "offset", "expanded"])
@pytest.mark.parametrize("operator", DIFFERENTIABLE)
def test_layouts(operator, layout):
    check(operator, NARROW[operator], dtype="bfloat16", path="triton", layout=layout)


@pytest.mark.parametrize("operator", ["layer_norm_linear", "layer_norm_mlp"])
def test_mean_far_from_zero(operator):
    sizes = dict(shape=(40, 64), mean=1e3)
    check(operator, {**sizes, **(dict(n=32) if "linear" in operator else dict(hidden=32))}, path="triton")


@pytest.mark.parametrize("operator", ["layer_norm_linear", "layer_norm_mlp"])
def test_norm_parameters_in_float32(operator):
    check(operator, NARROW[operator], dtype="bfloat16", norm_dtype="float32", path="triton")


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_scale(scale):
    check("patch_attention", {**NARROW["patch_attention"], "scale": scale}, path="triton")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scores_that_overflow_without_the_maximum_taken_out(dtype):
    sizes = dict(shape=(1, 8, 16), heads=1, head_dim=16, patch=(2, 1), magnitude=9.0)
    check("patch_attention", sizes, dtype=dtype, path="triton")


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # of keys whose gradients are not stored
@pytest.mark.parametrize("tokens", [6, 48, 65])
def test_keys_after_the_last_weigh_nothing(tokens):
    """All scores are about −100: against them a key of zeros, as tiles are filled up with, would have infinite
    weight."""
    qkv = torch.randn(1, tokens, 1, 48, generator=torch.Generator().manual_seed(0))
    qkv[..., :16] += 5
    qkv[..., 16:32] -= 5
    settings = {"num_heads": 1, "patch_size": (1, 1), "scale": None}
    ways = {}
    for way in ("triton", "usual", "oracle"):
        x = qkv.to(torch.bfloat16).to(torch.float64 if way == "oracle" else torch.bfloat16)
        ways[way] = evaluate(lambda t, way=way: call("patch_attention", t, settings, way), {"qkv": x}, True)
    for name, ours in ways["triton"].items():
        assert_close_as_pytorch(name, ours, ways["usual"][name], ways["oracle"][name])


@pytest.mark.parametrize("operator", DIFFERENTIABLE)
def test_torch_knows_the_operators(operator):
    check_registration(operator, NARROW[operator], backend="triton")
    check_autocast(operator, NARROW[operator], "triton")
    check_gradients_one_by_one(operator, NARROW[operator], "triton")
    check_same_bits(operator, NARROW[operator], "triton")


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_float32_keeps_to_what_pytorch_allows(precision):
    """By default products of float32 are as exact as PyTorch's; where TF32 is allowed, of TF32's ten bits."""
    sizes = dict(shape=(6, 64), n=64)
    tensors, settings = make("linear_residual", sizes)
    tensors = convert(tensors, torch.float32)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        ours = call("linear_residual", tensors, settings, "triton")
    finally:
        torch.set_float32_matmul_precision(before)
    largest = (ours - call("linear_residual", tensors, settings, "usual")).abs().max().item()
    assert largest < 1e-5 if precision == "highest" else 1e-5 < largest < 1e-2


# --------------------------------------------------------------------------------------------- launches, memory, graphs


def layer(x, weights, heads=4):
    """One transformer layer by the Triton operators."""
    norm1, qkv, proj, norm2, fc1, fc2 = weights
    with mvit_kernels.use_backend("triton"):
        attended = mvit_kernels.patch_attention(
            mvit_kernels.layer_norm_linear(x, *norm1, *qkv), num_heads=heads, patch_size=(2, 2)
        )
        return mvit_kernels.layer_norm_mlp(mvit_kernels.linear_residual(attended, *proj, x), *norm2, *fc1, *fc2)


def weights_of(d, dtype):
    def linear(n, k):
        return tuple((torch.randn(s) * k**-0.5).to(dtype).requires_grad_() for s in ((n, k), (n,)))

    def norm():
        return tuple(torch.rand(d).requires_grad_() for _ in range(2))

    return norm(), linear(3 * d, d), linear(d, d), norm(), linear(2 * d, d), linear(d, 2 * d)


def test_launches_of_a_layer():
    """Four kernels forward and twelve backward; PyTorch's own take about thirty and sixty."""
    x = torch.randn(1, 4, 4, 32, dtype=torch.bfloat16, requires_grad=True)
    weights = weights_of(32, torch.bfloat16)
    with launch.watching() as forward:
        out = layer(x, weights)
    with launch.watching() as backward:
        out.sum().backward()
    names = [[each.plan.kernel.fn.__name__ for each in launches] for launches in (forward, backward)]
    assert names[0] == ["_normed_product", "forward", "_product", "_mlp"]
    row_wise = ["_norm_backward", "_weight_gradient", "_sum_parts"]
    assert names[1] == [
        *("_hidden", "_norm_backward", "_weight_gradient", "_weight_gradient", "_sum_parts"),
        *("_product", "_weight_gradient", "_sum_parts"),
        "backward",
        *row_wise,
    ]


def saved_bytes(function) -> int:
    """What autograd keeps of what `function` computes, parameters aside; tensors that share memory count once."""
    storages = {}

    def keep(t):
        if not isinstance(t, torch.nn.Parameter) and not (t.is_leaf and t.requires_grad):
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage()  # kept alive, so that no address is reused
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        function()
    return sum(storage.nbytes() for storage in storages.values())


def test_memory_kept_for_backward():
    """At most half of what timm's layer keeps, both in bfloat16 under autocast."""
    timm = pytest.importorskip("timm.models.vision_transformer")
    d, block = 64, None
    block = timm.Block(d, 4, mlp_ratio=2.0, qkv_bias=True, act_layer=torch.nn.SiLU).train()
    x = torch.randn(1, 8, 8, d, dtype=torch.bfloat16)
    kept = []

    def by_timm():
        with torch.autocast("cpu", torch.bfloat16):
            kept.append(block(x.reshape(4, 16, d).requires_grad_()))

    def by_ours():
        kept.append(layer(x.clone().requires_grad_() * 1, weights_of(d, torch.bfloat16)))

    theirs, ours = saved_bytes(by_timm), saved_bytes(by_ours)
    assert ours * 2 <= theirs, f"{ours} bytes, and timm's layer {theirs}"


def test_compiles_whole():
    """One graph, forward and backward, by the operators themselves; the same values."""
    weights = weights_of(32, torch.float32)
    leaves = [t for pair in weights for t in pair]
    x = torch.randn(1, 4, 4, 32, requires_grad=True)
    expected = layer(x, weights)
    gradients = torch.autograd.grad(expected.square().sum(), [x, *leaves])
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    out = compiled(x, weights)
    assert torch.equal(out, expected)
    for ours, eager in zip(torch.autograd.grad(out.square().sum(), [x, *leaves]), gradients, strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-6, atol=1e-6)


def test_tiles_do_not_change_the_rows():
    """A row's result does not depend on which rows lie beside it, nor on how many."""
    tensors, settings = make("layer_norm_mlp", dict(shape=(70, 24), hidden=40))
    tensors = convert(tensors, torch.float32)
    whole = evaluate(lambda t: call("layer_norm_mlp", t, settings, "triton"), tensors, False)["out"]
    part = call("layer_norm_mlp", {**tensors, "x": tensors["x"][66:]}, settings, "triton")
    assert torch.equal(part, whole[66:])
