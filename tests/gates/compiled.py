# SPDX-License-Identifier: Apache-2.0
"""What Triton compiles, executed: the operators on its PTX for sm_80, forward and backward, by the tolerance rule and
under every check of the emulation (see support/ptx/program.py). `make test-compiled` runs it, in a process of its own:

    MVIT_KERNELS_COMPILED=1 python -m pytest tests/gates/compiled.py

Triton's interpreter (interpreted.py) runs the source instead; there no layout, barrier, copy or address of the
compiler's exists.
"""

import os

import pytest
import torch

from mvit_kernels.backends.triton import layer_norm_linear
from support import few_rows
from support.cases import call, convert, make
from support.checks import check
from support.ptx import serve_cpu_tensors
from support.ptx.serve_cpu_tensors import launched
from support.row_tiles import as_for_many_rows
from support.tolerance import assert_close_as_pytorch

assert os.environ.get("MVIT_KERNELS_COMPILED") == "1", "run it with MVIT_KERNELS_COMPILED=1"

ROW_WISE = [
    ("layer_norm", dict(shape=(70, 144)), "bfloat16"),
    ("layer_norm", dict(shape=(5, 33)), "float32"),
    ("linear_residual", dict(shape=(70, 144), n=144), "bfloat16"),
    ("linear_residual", dict(shape=(5, 33), n=100, bias=False), "float32"),
    ("layer_norm_linear", dict(shape=(130, 24), n=8, activation="silu"), "float32"),
    ("layer_norm_linear", dict(shape=(70, 144), n=432), "bfloat16"),
    ("layer_norm_linear", dict(shape=(3, 300), n=24), "bfloat16"),  # too wide to stay in registers
    ("layer_norm_mlp", dict(shape=(70, 144), hidden=288), "bfloat16"),
    ("layer_norm_mlp", dict(shape=(3, 80), hidden=320), "float16"),
]
ATTENTION = [
    dict(shape=(2, 4, 6), heads=4, head_dim=60, patch=(2, 2)),  # short
    dict(shape=(1, 16, 16), heads=2, head_dim=36, patch=(2, 2)),  # backward whole
    dict(shape=(1, 10, 26), heads=1, head_dim=36, patch=(2, 2)),  # 65 tokens: by blocks
    dict(shape=(1, 257, 1), heads=1, head_dim=8, patch=(1, 1)),
]
LIVE = dict(projection=0.1, mlp=0.1, path1=0.1, path2=0.1)
KERNELS = {  # all of backends/triton
    *("_forward", "_backward", "_sum_parts", "_product", "_product_resident", "_weight_gradients"),
    *("_normed_product", "_norm_backward"),
    *("_mlp", "_hidden", "_drop", "_backward_whole", "_backward_blocks", "forward", "backward", "_projected"),
}
# Of batch norm in parts. Those of frozen networks are executed by gates/executed.py.
KERNELS |= {"_statistics", "_combine_statistics", "_normalise", "_sum_gradients", "_combine_gradients", "_gradient"}


@pytest.mark.parametrize("operator, sizes, dtype", ROW_WISE, ids=str)
def test_row_wise(operator, sizes, dtype):
    check(operator, sizes, dtype=dtype, path="triton")


@pytest.mark.parametrize("sizes", ATTENTION, ids=str)
def test_attention(sizes):
    check("patch_attention", sizes, dtype="bfloat16", path="triton")


@pytest.mark.parametrize("shape", [(2, 24, 24, 24), (1, 17, 6, 8)], ids=str)
def test_batch_norm(shape):
    """In parts, whose sums are combined, and in one launch."""
    check("batch_norm_activation", dict(shape=shape), dtype="bfloat16", path="triton", layout="channels_last")


def test_a_layer_with_dropout():
    sizes = dict(shape=(1, 4, 8, 64), heads=4, patch=(2, 2), dropout=LIVE)
    check("transformer_layer", sizes, dtype="bfloat16", path="triton")


@pytest.mark.parametrize("side, d", [(32, 144), (16, 192), (8, 240)], ids=["stage 3", "stage 4", "stage 5"])
@pytest.mark.parametrize(
    "operator, more",
    [
        ("layer_norm_linear", lambda d: dict(n=3 * d)),
        ("linear_residual", lambda d: dict(n=d)),
        ("layer_norm_mlp", lambda d: dict(hidden=2 * d)),
        ("patch_attention", lambda d: dict(heads=4, head_dim=d // 4, patch=(2, 2))),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_image_of_mobilevit_s(operator, more, side, d):
    """Forward at the sizes of one image of 256 pixels."""
    shape = (1, side, side) if operator == "patch_attention" else (1, side, side, d)
    check(operator, dict(shape=shape, **more(d)), dtype="bfloat16", path="triton", gradients=False)


@pytest.mark.parametrize(
    "sizes, how",
    [
        ((64, 240, 240, 480, torch.bfloat16), {}),
        ((17, 480, 240, 720, torch.bfloat16), dict(activation="")),
        ((33, 192, 192, 384, torch.float16), {}),
        ((520, 144, 144, 288, torch.bfloat16), {}),
        ((17, 384, 192, 128, torch.bfloat16), dict(beside=128)),
    ],
    ids=str,
)
def test_few_rows(sizes, how):
    """What a frozen network launches for them."""
    few_rows.check(*sizes, **how)


def test_the_convolution_behind_the_last_norm():
    """Into a part of a map, whose other channels stay as they are; its bias is in float32."""
    tensors, settings = make("layer_norm_linear", dict(shape=(70, 144), n=96, activation="silu"))
    low = convert(tensors, torch.bfloat16)
    low["bias"] = low["bias"].float()
    whole, vectors = torch.full((70, 192), torch.nan, dtype=torch.bfloat16), torch.empty(2, 70)
    layer_norm_linear.launch(*low.values(), whole[:, 96:], *vectors, settings["eps"], "silu").run()
    assert whole[:, :96].isnan().all()
    truth = call("layer_norm_linear", convert(low, torch.float64), settings, "oracle")
    usual = call("layer_norm_linear", convert(low, torch.bfloat16), settings, "usual")
    assert_close_as_pytorch("part", whole[:, 96:], usual, truth)


@pytest.mark.parametrize(
    "operator, sizes",
    [
        ("layer_norm_linear", dict(shape=(130, 80), n=150)),
        ("layer_norm_mlp", dict(shape=(70, 80), hidden=80)),
        ("linear_residual", dict(shape=(130, 80), n=80)),
        ("linear_residual", dict(shape=(70, 192), n=192)),  # too wide for the weight to stay
    ],
    ids=str,
)
def test_the_tiles_for_many_rows(monkeypatch, operator, sizes):
    """Those of 9.0, with two programs where they share tiles of rows."""
    as_for_many_rows(monkeypatch)
    check(operator, sizes, dtype="bfloat16", path="triton", gradients=False)


@pytest.mark.parametrize("seed", range(1, 4))
def test_other_schedules(monkeypatch, seed):
    """Of threads and blocks."""
    monkeypatch.setitem(serve_cpu_tensors.settings, "seed", seed)
    check("linear_residual", dict(shape=(70, 144), n=144), dtype="bfloat16", path="triton")
    check("patch_attention", ATTENTION[2], dtype="bfloat16", path="triton")


def test_every_kernel_ran(request):
    if request.config.getoption("keyword"):
        pytest.skip("some tests were left out")
    assert {launch.plan.kernel.fn.__name__ for launch, _ in launched} == KERNELS
