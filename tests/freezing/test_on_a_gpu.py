# SPDX-License-Identifier: Apache-2.0
"""Frozen networks on a GPU: launches, streams, threads and CUDA graphs as they are. Without a GPU it says "no GPU" and
skips; what needs none is in tests/gates/interpreted_networks.py and test_graphs.py."""

from __future__ import annotations

import threading

import pytest
import torch

import mvit_kernels
from mvit_kernels import CudaGraphs, backends
from mvit_kernels.freezing.launched import LaunchedNetwork
from support import models
from support.tolerance import assert_close_as_pytorch

if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)
if why := backends.unavailable("triton", "cuda"):
    pytest.skip(why[0], allow_module_level=True)


@pytest.fixture(scope="module")
def model():
    return models.build("own").cuda()


@pytest.fixture(scope="module")
def plain(model):
    return mvit_kernels.freeze(model, dtype=torch.bfloat16)


@pytest.fixture
def fast(model):
    return mvit_kernels.freeze(model, dtype=torch.bfloat16, cuda_graph=CudaGraphs(shapes=2))


def call(frozen, x):
    with torch.inference_mode():
        y = frozen(x)
    network = vars(frozen)["_mvit_call"].network
    assert isinstance(network, LaunchedNetwork), network
    return y


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 3, 256, 256), (64, 3, 256, 256), (2, 3, 65, 97)], ids=str)
def test_launches(model, shape, dtype):
    x = models.images(*shape[:1], *shape[2:]).cuda()
    judge(mvit_kernels.freeze(model, dtype=dtype), x, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_filters_in_float16(model, dtype):
    """Of inverted residuals, where CUDA C++ has them: of other bits, and as exact as the rule wants them."""
    if why := backends.unavailable("cuda", "cuda"):
        pytest.skip(why[0])
    x = models.images(4, 256, 256).cuda()
    frozen = mvit_kernels.freeze(model, dtype=dtype, example=x)
    ranges = frozen.freeze_report.half_ranges
    assert len(ranges) == 7 and all(known.reason is None for _, known in ranges)
    ours = judge(frozen, x, dtype)
    assert not torch.equal(ours, call(mvit_kernels.freeze(model, dtype=dtype), x))
    on_cpu = mvit_kernels.freeze(models.build("own"), dtype=dtype, example=x.cpu()).freeze_report.half_ranges
    for (_, known), (_, other) in zip(ranges, on_cpu, strict=True):
        torch.testing.assert_close(torch.tensor(known), torch.tensor(other), rtol=0.1, atol=0)


def judge(frozen, x, dtype):
    """Two calls give the same bits, by the rule; returns them."""
    ours = [call(frozen, x) for _ in range(2)]  # by tensors, then by addresses
    assert torch.equal(*ours)
    with torch.inference_mode():
        with mvit_kernels.use_backend("reference"):
            usual = frozen(x)
        truth = models.build("own").double().cuda()(x.to(dtype).double())
    assert_close_as_pytorch("logits", ours[0].cpu(), usual.cpu(), truth.cpu())
    return ours[0]


def test_graphs(plain, fast):
    for batch in (1, 2, 1, 3, 1):
        x = torch.randn(batch, 3, 64, 64, device="cuda")
        assert torch.equal(call(fast, x), call(plain, x))


def test_streams_and_threads(plain, fast):
    images = [torch.randn(1 + i % 2, 3, 64, 64, device="cuda") for i in range(16)]
    wanted, wrong = [call(plain, x) for x in images], []
    torch.cuda.synchronize()

    def work(first):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(8):
                found = [call(fast, x) for x in images[first::4]]
                torch.empty(1 << 20, device="cuda").normal_()  # allocations beside the captures
                stream.synchronize()
                wrong.extend(1 for y, z in zip(found, wanted[first::4], strict=True) if not torch.equal(y, z))

    threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("form", ["plain", "fast"])
def test_inside_of_another_graph(form, request):
    frozen, x = request.getfixturevalue(form), torch.randn(1, 3, 64, 64, device="cuda")
    call(frozen, x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call(frozen, x)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(y, call(frozen, x))


def test_weights_that_change_and_a_model_that_moves(plain, fast):
    x = torch.randn(1, 3, 64, 64, device="cuda")
    before = call(fast, x)
    fast.load_state_dict({name: value * 1.01 for name, value in fast.state_dict().items()})
    after = call(fast, x)
    assert not torch.equal(before, after)
    with torch.inference_mode():
        assert fast.cpu()(x.cpu()).device.type == "cpu"
    assert torch.equal(call(fast.cuda(), x), after)
