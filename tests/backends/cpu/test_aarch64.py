# SPDX-License-Identifier: Apache-2.0
"""csrc/cpu on aarch64, compiled for it and run by an emulator: every operator, and a whole frozen network whose weights
are packed there. `support.other_machine` says how, and why nothing is to be seen here of time.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator

import pytest
import torch

import mvit_kernels
from mvit_kernels.freezing.frozen import Frozen
from mvit_kernels.freezing.modules import FrozenSequential
from mvit_kernels.nn import MobileViT
from support.checks import check
from support.native import skip_without_a_compiler
from support.networks import Draw, chain, composed, native
from support.other_machine import Machine, machine, why_not
from support.tolerance import assert_close_as_pytorch

skip_without_a_compiler()
if platform.machine() == "aarch64":
    pytest.skip("this is an aarch64 machine: all other tests run its kernels", allow_module_level=True)
if why_not("aarch64"):
    pytest.skip(f"aarch64 is not tested: {why_not('aarch64')}", allow_module_level=True)

OPERATORS = {  # widths and lengths that are whole vectors and tiles, and such that are not
    "batch_norm_activation": [dict(shape=(2, 17, 6, 7)), dict(shape=(3, 2, 40, 30), activation=None)],
    "layer_norm_linear": [dict(shape=(2, 3, 64), n=192), dict(shape=(37, 17), n=33, activation="silu")],
    "linear_residual": [dict(shape=(70, 64), n=80), dict(shape=(5, 33), n=100)],
    "layer_norm_mlp": [dict(shape=(40, 64), hidden=128), dict(shape=(5, 17), hidden=33)],
    "patch_attention": [
        dict(shape=(1, 16, 16), heads=4, head_dim=16, patch=(2, 2)),
        dict(shape=(1, 10, 26), heads=1, head_dim=17, patch=(2, 2)),
    ],
    "transformer": [
        dict(shape=(1, 8, 8, 64), heads=4, patch=(2, 2), layers=2),
        dict(shape=(2, 6, 10, 33), heads=3, patch=(2, 1), layers=1),
    ],
    "inverted_residual": [
        dict(shape=(1, 8, 8, 16), hidden=32, out=16, residual=True),
        dict(shape=(2, 7, 5, 17), hidden=33, out=12, stride=2),
        dict(shape=(1, 7, 5, 8), hidden=24, out=12, dilation=3),
    ],
}


@pytest.fixture(scope="module")
def aarch64() -> Iterator[Machine]:
    with machine("aarch64") as served:
        yield served


def test_it_is_aarch64_and_what_it_has(aarch64):
    facts = {"isa": b"portable", "plain_isa": b"portable", "vector_bytes": 16, "bf16_products": 0}
    assert aarch64.facts == facts


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_values_and_gradients(operator, dtype, aarch64):
    before = len(aarch64.calls)
    for sizes in OPERATORS[operator]:
        check(operator, sizes, dtype=dtype, path="cpu")
    inference = operator in ("transformer", "inverted_residual")
    if not (inference and dtype == "float64"):
        names = {f"{operator}.cpu"} | (set() if inference else {f"{operator}_backward.cpu"})
        assert set(aarch64.calls[before:]) == names


def _check_frozen(module: Frozen, x: torch.Tensor, dtype: torch.dtype, served: Machine) -> None:
    """Packed and run over there; against float64, with the same modules one by one as PyTorch's result. Three threads
    give the bits of one."""
    before, module = len(served.calls), module.to(dtype)
    ours = native(module, x.to(dtype))
    assert {"pack_network.cpu", "network.cpu"} <= set(served.calls[before:])
    torch.set_num_threads(3)
    assert torch.equal(native(module, x.to(dtype)), ours)
    torch.set_num_threads(1)
    usual = composed(module, x.to(dtype))
    assert_close_as_pytorch(f"a network of {dtype}", ours, usual, composed(module.double(), x.to(dtype).double()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_frozen_chain(dtype, aarch64):
    module, draw = chain()
    _check_frozen(module, draw(2, 3, 37, 50), dtype, aarch64)


def test_relu_and_depthwise_and_dilated_convolutions(aarch64):
    draw = Draw(1)
    links = (
        draw.conv(3, 17, 3, stride=2, act="relu"),
        draw.depthwise(17, act="relu"),
        draw.inverted(17, 33, 20),
        draw.conv(20, 33, 3, dilation=3),
        draw.pyramid(33, 12, 24),
    )
    _check_frozen(FrozenSequential(*links), draw(1, 3, 21, 30), torch.float32, aarch64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_whole_frozen_xxs(dtype, aarch64):
    """MobileViT-XXS, from pixels to classes."""
    torch.manual_seed(0)
    model = MobileViT("xxs", num_classes=10).eval()
    x = torch.randn(1, 3, 64, 64)
    before = len(aarch64.calls)
    frozen = mvit_kernels.freeze(model).to(dtype)
    with torch.inference_mode():
        ours = frozen(x.to(dtype))
        with mvit_kernels.use_backend("reference"):
            usual = frozen(x.to(dtype))
            exact = mvit_kernels.freeze(model).to(dtype).double()(x.to(dtype).double())
    assert {"pack_network.cpu", "network.cpu"} <= set(aarch64.calls[before:])
    assert_close_as_pytorch(f"a frozen XXS of {dtype}", ours, usual, exact)


def test_an_error_over_there_is_raised_here(aarch64):
    with pytest.raises(RuntimeError, match="linear_residual: residual is not of x's leading axes and 5 channels"):
        torch.ops.mvit_kernels.linear_residual.cpu(torch.ones(2, 4), torch.ones(5, 4), None, torch.ones(2, 6))
