# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels in Triton's interpreter, at a few shapes that reach every branch.
backends/triton/test_backend.py runs this file in a process of its own, since TRITON_INTERPRET is read when kernels are
defined:

    TRITON_INTERPRET=1 python -m pytest tests/gates/interpreted.py

The operators' whole suites run there too (``make test-interpreted``), in minutes.
"""

import copy
import importlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import mvit_kernels
from mvit_kernels.backends.triton.target import INTERPRETED
from support.cases import NARROW, call, convert, differentiable_on, evaluate, make
from support.checks import check, check_autocast, check_gradients_one_by_one, check_registration, check_same_bits
from support.layers import layer_of, operators_of, weights_of
from support.tolerance import assert_close_as_pytorch

assert INTERPRETED, "run it with TRITON_INTERPRET=1"
launch = pytest.importorskip("mvit_kernels.backends.triton._launch")

ROW_WISE = [
    ("layer_norm", dict(shape=(70, 144)), "bfloat16"),
    ("layer_norm", dict(shape=(5, 33)), "float32"),
    ("layer_norm", dict(shape=(3, 300)), "float16"),
    ("layer_norm", dict(shape=(0, 24)), "bfloat16"),
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
    (dict(shape=(1, 6, 6), heads=1, head_dim=8, patch=(1, 3)), "bfloat16"),
    (dict(shape=(1, 5, 5), heads=1, head_dim=17, patch=(1, 1)), "float32"),
    (dict(shape=(1, 4, 8), heads=1, head_dim=33, patch=(1, 1)), "float16"),
    (dict(shape=(1, 257, 1), heads=1, head_dim=8, patch=(1, 1)), "bfloat16"),  # more than backward takes whole
]
LAYERS = [
    (dict(shape=(1, 4, 8, 64), heads=4, patch=(2, 2), dropout=dict(projection=0.1, mlp=0.1)), "bfloat16"),
    (dict(shape=(2, 4, 4, 48), heads=4, patch=(2, 1), dropout=dict(path1=0.5, path2=0.3)), "float16"),
    (dict(shape=(1, 4, 4, 40), heads=4, head_dim=8, hidden=160, patch=(2, 2), qkv_bias=False), "bfloat16"),
    (
        dict(
            shape=(2, 9, 10, 33),  # 90 rows an image: a tile of 64 rows covers parts of two
            heads=3,
            head_dim=20,
            hidden=17,
            patch=(3, 2),
            dropout=dict(projection=0.2, mlp=0.3, path1=0.4, path2=0.5, path_scale=False),
        ),
        "float32",
    ),
    (dict(shape=(0, 4, 6, 24), heads=2, patch=(2, 2), dropout=dict(mlp=0.5)), "float32"),
]


@pytest.mark.parametrize("operator, sizes, dtype", ROW_WISE, ids=str)
def test_row_wise(operator, sizes, dtype):
    check(operator, sizes, dtype=dtype, path="triton")


@pytest.mark.parametrize("sizes, dtype", ATTENTION, ids=str)
def test_attention(sizes, dtype):
    check("patch_attention", sizes, dtype=dtype, path="triton")


def test_programs_of_several_blocks_of_rows(monkeypatch):
    """As happens from 4224 rows on, where LayerNorm's backward has reached its largest number of programs."""
    monkeypatch.setattr(importlib.import_module("mvit_kernels.backends.triton.layer_norm"), "_PARTS", 2)
    for rows in (64, 65, 100, 130):
        check("layer_norm", dict(shape=(rows, 24)), path="triton")


@pytest.mark.parametrize("sizes, dtype", LAYERS, ids=str)
def test_layers(sizes, dtype):
    check("transformer_layer", sizes, dtype=dtype, path="triton")


@pytest.mark.parametrize("layout", ["permuted", "sliced", "offset", "expanded"])
@pytest.mark.parametrize("operator", differentiable_on("triton"))
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
    """All scores are about −100: compared with them a key of zeros, with which tiles are padded, would have infinite
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


@pytest.mark.parametrize("operator", differentiable_on("triton"))
def test_torch_knows_the_operators(operator):
    # A layer of 24 channels takes twice as long, most of it for the gradients of weights.
    sizes = dict(shape=(2, 2, 4, 16), heads=2, patch=(2, 2)) if operator == "transformer_layer" else NARROW[operator]
    check_registration(operator, sizes, backend="triton")
    if operator != "batch_norm_activation":  # which autocast leaves alone
        check_autocast(operator, sizes, "triton")
    if operator != "transformer_layer":  # fourteen layers; its autograd function is tested by the path "raw"
        check_gradients_one_by_one(operator, sizes, "triton")
    check_same_bits(operator, sizes, "triton")


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_float32_keeps_to_what_pytorch_allows(precision):
    """By default float32 products are as exact as PyTorch's; where TF32 is allowed, they have TF32's ten bits."""
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


# ----------------------------------------------------------------------------------------------------- launches, memory


def launched(function):
    """The kernels that a call and its backward would launch, by name."""
    with launch.watching(90) as forward:
        out = function()
    with launch.watching(90) as backward:
        out.sum().backward()
    return [[each.plan.kernel.fn.__name__ for each in launches] for launches in (forward, backward)]


FORWARD = ["_normed_product", "forward", "_product", "_mlp"]


def test_launches_of_the_operators():
    """Four kernels forward and eleven backward, and autograd adds up the gradients of x."""
    x, layer = torch.randn(1, 4, 4, 32, dtype=torch.bfloat16, requires_grad=True), weights_of(32, torch.bfloat16)
    forward, backward = launched(lambda: operators_of(x, layer))
    weights = ["_weight_gradients", "_sum_parts"]
    assert forward == FORWARD
    assert backward == [
        *("_hidden", "_norm_backward", *weights),
        *("_product", *weights),
        "backward",
        *("_norm_backward", *weights),
    ]


@pytest.mark.parametrize(
    "live, more",
    [
        (None, []),
        (dict(projection=0.1, path1=0.1), []),
        (dict(projection=0.1, mlp=0.1), ["_drop"]),
    ],
    ids=str,
)
def test_launches_of_a_layer(live, more):
    """As one operator: four forward and eight backward. Dropout is part of these, but for one more kernel in
    backward."""
    x, layer = torch.randn(1, 4, 4, 32, dtype=torch.bfloat16, requires_grad=True), weights_of(32, torch.bfloat16)
    dropout = mvit_kernels.LayerDropout(**live) if live else None
    forward, backward = launched(lambda: layer_of(x, layer, dropout))
    assert forward == FORWARD
    attention = ["_normed_product", "backward", "_norm_backward"]
    assert backward == [*more, "_hidden", "_norm_backward", "_product", *attention, "_weight_gradients", "_sum_parts"]


class PyTorchLaunches(TorchDispatchMode):
    """Counts PyTorch's own kernels: all operators but views and allocations. A GPU launches more than one for some, so
    PyTorch's count is a lower bound; ours counts by `launched`."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().partition(".")[0]
        if not (function.is_view or "empty" in name or name in ("aten::_unsafe_view", "aten::detach")):
            if not name.startswith("mvit_kernels::"):
                self.names.append(name.removeprefix("aten::"))
        return function(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def blocks():
    """timm's first MobileViT block of xxs in training mode, and the same block accelerated."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    found = [m for m in timm.create_model("mobilevit_xxs").modules() if type(m).__name__ == "MobileVitBlock"]
    block = found[0].train()
    return block, mvit_kernels.accelerate(copy.deepcopy(block), backend="triton", strict=True)


@pytest.fixture
def nothing_launched(monkeypatch):
    """For tests that count, and look at no value. `launched` still records: a `watching` around the whole call would
    hold the gradients, and autograd would copy them."""
    call = launch.Plan.__call__
    monkeypatch.setattr(launch.Plan, "__call__", lambda *given: call(*given) if launch._watcher is not None else None)


def train(block, x):
    with torch.autocast("cpu", torch.bfloat16):
        return block(x.clone().requires_grad_())


def test_launches_of_a_block(blocks, nothing_launched):
    """A whole block under autocast, convolutions included: timm's launches, and ours. Around the two layers: one cast
    of all weights forward and one of all gradients backward, the last LayerNorm, of three kernels, and three batch
    norms with their SiLU, one launch each way for so small a map."""
    x = torch.randn(1, 48, 4, 4).to(memory_format=torch.channels_last)
    counts = []
    for block in blocks:
        with PyTorchLaunches() as pytorch:
            train(block, x).sum().backward()
        counts.append(pytorch.names)
    by_timm, ours = counts
    forward, backward = launched(lambda: train(blocks[1], x))
    layer = ["_hidden", "_norm_backward", "_product", "_normed_product", "backward", "_norm_backward"]
    assert forward == ["_forward", *FORWARD * 2, "_forward", *["_forward"] * 2]
    layers = ["_backward", "_sum_parts", *[*layer, "_weight_gradients", "_sum_parts"] * 2]
    assert backward == [*["_backward"] * 2, *layers, "_backward"]
    for name in ("convolution", "convolution_backward", "cat"):  # around the transformer, the same in both
        assert by_timm.count(name) == ours.count(name), name
    assert by_timm.count("native_batch_norm") == by_timm.count("silu_") == 3
    assert not {"native_batch_norm", "native_batch_norm_backward", "silu_", "silu_backward"} & set(ours)
    assert ours.count("_foreach_copy_") == 2
    assert not {"addmm", "mm", "native_layer_norm", "silu", "native_layer_norm_backward"} & set(ours)
    assert by_timm.count("_to_copy") - ours.count("_to_copy") >= 32  # casts of 16 weights, there and back
    total = len(ours) + len(forward) + len(backward)
    assert total <= 0.55 * len(by_timm), f"{total} launches, and timm's block {len(by_timm)}"


def kept_bytes(block, x) -> int:
    """The bytes that autograd keeps between forward and backward, except weights and their casts; tensors that share
    memory count once."""
    weights = {tuple(sorted(p.shape)) for p in block.parameters()}
    storages = {}

    def keep(t):
        if tuple(sorted(t.shape)) not in weights:
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage()  # kept alive, so that no address is reused
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        train(block, x)
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_memory_kept_for_backward(blocks, memory_format, nothing_launched):
    """At most half of what timm's block keeps, convolutions included, both in bfloat16 under autocast."""
    x = torch.randn(1, 48, 8, 12).to(memory_format=memory_format)  # 96 tokens: no weight has that width
    theirs, ours = (kept_bytes(block, x) for block in blocks)
    assert ours * 2 <= theirs, f"{ours} bytes, and timm's block {theirs}"


def test_a_mask_is_not_kept():
    """Dropout keeps its seed and nothing more."""
    x, layer = torch.randn(1, 4, 4, 32), weights_of(32, torch.float32)

    def kept(dropout):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
            layer_of(x, layer, dropout)
        return sum(sizes)

    assert kept(mvit_kernels.LayerDropout(0.0, 0.1, 0.0, 0.1, 0.1, 0.1)) == kept(None) + 16


@pytest.mark.parametrize("probability", [0.0, 0.1])
def test_nothing_on_the_host_depends_on_data(probability):
    """A call and its backward plan all launches with tensors that have no data: no synchronisation, no choice that a
    CUDA graph would freeze."""
    from gates.triton_gate import stage
    from mvit_kernels.dropout import draw_seeds

    assert len(stage(64, 1, torch.bfloat16, "highest", 90, probability)) > 30
    assert draw_seeds(3, "meta")[2].shape == (2,)


def test_tiles_do_not_change_the_rows():
    """A row's result does not depend on which rows lie beside it, nor on how many."""
    tensors, settings = make("layer_norm_mlp", dict(shape=(70, 24), hidden=40))
    tensors = convert(tensors, torch.float32)
    whole = evaluate(lambda t: call("layer_norm_mlp", t, settings, "triton"), tensors, False)["out"]
    part = call("layer_norm_mlp", {**tensors, "x": tensors["x"][66:]}, settings, "triton")
    assert torch.equal(part, whole[66:])
