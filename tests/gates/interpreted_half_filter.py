# SPDX-License-Identifier: Apache-2.0
"""A frozen network whose inverted residuals filter in float16 where an example has shown that they may: prepared
launches in Triton's interpreter, with CUDA C++'s kernels emulated beside them; see interpreted.py:

TRITON_INTERPRET=1 python -m pytest tests/gates/interpreted_half_filter.py
"""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import mvit_kernels
from freezing.test_half_range import blocks, convolution, known, norm
from mvit_kernels.backends import cuda
from mvit_kernels.backends.triton.target import INTERPRETED
from mvit_kernels.freezing import lowering
from mvit_kernels.freezing.launched import LaunchedNetwork
from mvit_kernels.nn.layers import ConvNormAct, InvertedResidual
from support.emulation import load_operators
from support.networks import composed
from support.tolerance import assert_close_as_pytorch

assert INTERPRETED, "run it with TRITON_INTERPRET=1"
pytest.importorskip("triton", reason="Triton is not installed")

IMAGES = torch.randn(1, 3, 18, 22, generator=torch.Generator().manual_seed(1))
BEYOND = 40000.0  # within float16's range, and not within a fourth of it


@pytest.fixture
def emulated(monkeypatch):
    """CUDA C++ takes every inverted residual; gives the `half_filter` of each call."""
    load_operators("inverted_residual")
    monkeypatch.setattr(cuda.BACKEND, "unavailable", lambda device_type: [])
    monkeypatch.setattr(lowering, "backends", SimpleNamespace(server=lambda operator, call: "cuda"))
    from mvit_kernels.backends.cuda import inverted_residual

    calls, prepared = [], inverted_residual.prepared

    def watched(*settings):
        call = prepared(*settings)
        return lambda x, out: (calls.append(settings[4]), call(x, out))[1]

    monkeypatch.setattr(inverted_residual, "prepared", watched)
    return calls


def made(beyond: bool) -> nn.Sequential:
    """16 to 16, of which a channel may be large, and 16 to 24 with stride 2."""
    torch.manual_seed(0)
    blocks = InvertedResidual(16, 16, expand_ratio=2), InvertedResidual(16, 24, stride=2, expand_ratio=2)
    model = nn.Sequential(ConvNormAct(3, 16, 3, stride=2), *blocks).eval()
    with torch.no_grad():
        if beyond:
            norm(model[1].expand).bias[5] += BEYOND
            convolution(model[1].depthwise).weight[5] *= 0.1
            convolution(model[1].project).weight[:, 5] *= 1e-3
    return model


def judge(frozen: nn.Module) -> torch.Tensor:
    with torch.inference_mode(), mvit_kernels.use_backend("triton"):
        ours = frozen(IMAGES)
        assert isinstance(frozen._network, LaunchedNetwork), frozen._network
    truth = composed(copy.deepcopy(frozen).double(), IMAGES.to(torch.bfloat16).double())
    assert_close_as_pytorch("launches", ours, composed(frozen, IMAGES), truth)
    return ours


def test_within_the_range(emulated):
    frozen = mvit_kernels.freeze(made(False), dtype=torch.bfloat16, example=IMAGES)
    assert known(frozen) == [True, True]
    first = judge(frozen)
    assert emulated == [True, True]
    emulated.clear()
    copied = copy.deepcopy(frozen)
    assert torch.equal(judge(copied), first) and emulated == [True, True]
    plain = mvit_kernels.freeze(made(False), dtype=torch.bfloat16)
    emulated.clear()
    assert not torch.equal(judge(plain), first) and emulated == [False, False]


def test_a_network_beyond_the_range_is_right_as_well(emulated):
    frozen = mvit_kernels.freeze(made(True), dtype=torch.bfloat16, example=IMAGES)
    (_, first), (_, second) = frozen.freeze_report.half_ranges
    assert 65504 / 4 < first.expanded < 65504 and first.reason is not None and second.reason is None
    judge(frozen)
    assert emulated == [False, True]


def test_a_changed_weight_is_float32_s_again(emulated):
    """Of a network that was called before; and its results are those of the new weights."""
    frozen = mvit_kernels.freeze(made(False), dtype=torch.bfloat16, example=IMAGES)
    judge(frozen)
    emulated.clear()
    other = mvit_kernels.freeze(made(True), dtype=torch.bfloat16)
    blocks(frozen)["1"].load_state_dict(blocks(other)["1"].state_dict())
    judge(frozen)
    assert emulated == [False, True]
