# SPDX-License-Identifier: Apache-2.0
"""Frozen networks as prepared launches, run in Triton's interpreter on CPU tensors; see interpreted.py:

TRITON_INTERPRET=1 python -m pytest tests/gates/interpreted_networks.py
"""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import mvit_kernels
from mvit_kernels.backends import StackPlan, cuda, gpu, triton
from mvit_kernels.backends.triton.target import INTERPRETED
from mvit_kernels.freezing import arena, graphs, lowering, native
from mvit_kernels.freezing.launched import LaunchedNetwork
from mvit_kernels.freezing.modules import FrozenSequential
from mvit_kernels.freezing.native import kind_on
from support import models
from support.cuda_graphs import Runtime
from support.emulation import load_operators
from support.networks import Draw, chain, composed
from support.tolerance import assert_close_as_pytorch

assert INTERPRETED, "run it with TRITON_INTERPRET=1"
pytest.importorskip("triton", reason="Triton is not installed")
from mvit_kernels.backends.triton import prepared  # noqa: E402


def launched(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The module's result, which must come from prepared launches."""
    with torch.inference_mode(), mvit_kernels.use_backend("triton"):
        y = module(x)
        assert isinstance(module._network, LaunchedNetwork), module._network
        assert module._network.plan(x) is not None
    return y


def judge(module: FrozenSequential, x: torch.Tensor, dtype: torch.dtype) -> LaunchedNetwork:
    """Hold the launches to the module's composed form in `dtype`, by the errors of both against float64."""
    module = copy.deepcopy(module).to(dtype)
    truth = composed(copy.deepcopy(module).double(), x.to(dtype).double())
    ours = launched(module, x)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    assert_close_as_pytorch("launches", ours, composed(module, x), truth)
    return module._network


# -------------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("dtype, shape", [(torch.bfloat16, (2, 3, 17, 23)), (torch.float32, (1, 3, 16, 18))], ids=str)
def test_a_chain_of_every_kind(dtype, shape):
    module, draw = chain()
    judge(module, draw(*shape), dtype)


draw = Draw(1)
SMALL = {
    "block without norm, fusion and bias": lambda: [
        draw.block(8, 16, layers=1, fusion=False, final_norm=False, qkv_bias=False)
    ],
    "block that joins the other way round": lambda: [draw.block(8, 16, layers=1, input_first=False, dilation=2)],
    "patches that do not fit": lambda: [draw.conv(8, 8), draw.block(8, 16, layers=1, patch=(3, 2))],
    "inverted residual, from the image": lambda: [
        draw.inverted(8, 16, 8, dilation=2),
        draw.inverted(8, 24, 12, stride=2),
    ],
    "depthwise, from the image": lambda: [draw.depthwise(8, stride=2, act="relu"), draw.conv(8, 20, act=False)],
    "pyramid, from the image": lambda: [draw.pyramid(8, 8, 16)],
    "one 1 x 1": lambda: [draw.conv(8, 12, act="relu")],
}


@pytest.mark.parametrize("name", SMALL)
def test_small_chains(name):
    judge(FrozenSequential(*SMALL[name]()), Draw(2)(1, 8, 7, 8), torch.float16)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "expanded", "double"])
@pytest.mark.parametrize("first", ["stem", "1 x 1"])
def test_images_of_any_layout(first, layout):
    """A stem reads them where they are; others get a channels-last copy."""
    made = Draw(3)
    module = FrozenSequential(made.conv(3, 16, 3, stride=2) if first == "stem" else made.conv(3, 16)).to(torch.bfloat16)
    x = made(2, 3, 6, 8)
    expected = launched(module, x)
    x = {
        "contiguous": x,
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "sliced": torch.cat((x, x), dim=3)[:, :, :, 8:],
        "expanded": x[:1].expand(2, -1, -1, -1),
        "double": x.double(),
    }[layout]
    y = launched(module, x)
    assert torch.equal(y[:1], expected[:1]) and (layout == "expanded" or torch.equal(y, expected))


_run = LaunchedNetwork.run


def run_in_nan(self, lowering, image, result, arena):
    arena.fill_(255)
    result.fill_(torch.nan)
    return _run(self, lowering, image, result, arena)


@pytest.fixture(scope="module")
def own():
    """Our XXS in bfloat16, an image, and what launches made of it: in memory whose bytes were all set, so that every
    float in it was NaN until it was written."""
    frozen, x = mvit_kernels.freeze(models.build("own"), dtype=torch.bfloat16), models.images(1, 64, 64)
    with torch.inference_mode(), mvit_kernels.use_backend("triton"), pytest.MonkeyPatch.context() as patched:
        patched.setattr(LaunchedNetwork, "run", run_in_nan)
        logits = frozen(x)
    return frozen, x, logits


def whole(frozen: nn.Module) -> LaunchedNetwork:
    network = vars(frozen)["_mvit_call"].network
    assert isinstance(network, LaunchedNetwork), network
    return network


def test_a_model(own):
    """From the image to the logits, in one call."""
    frozen, x, logits = own
    with torch.inference_mode(), mvit_kernels.use_backend("reference"):
        usual = frozen(x)
        truth = models.build("own").double()(x.bfloat16().double())
    assert_close_as_pytorch("logits", logits, usual, truth)
    whole(frozen)


def test_a_model_of_timm():
    model, x = models.build("timm"), models.images(1, 33, 33)
    frozen = mvit_kernels.freeze(model, dtype=torch.bfloat16)
    with torch.inference_mode():
        with mvit_kernels.use_backend("triton"):
            logits = frozen(x)
        whole(frozen)
        with mvit_kernels.use_backend("reference"):
            usual = frozen(x)
        truth = model.double()(x.bfloat16().double())
    assert_close_as_pytorch("logits", logits, usual, truth)


# ----------------------------------------------------------------------------------------------- memory, launches


def test_values_that_live_at_once_do_not_overlap(own):
    with mvit_kernels.use_backend("triton"):
        found = whole(own[0]).lowering(1, (64, 64))
    lives = found.lives()
    for one, at in found.offsets.items():
        assert at % arena.ALIGNMENT == 0 and at + found.values[one].bytes <= found.arena
        for other, there in found.offsets.items():
            if one < other and lives[one][0] <= lives[other][1] and lives[other][0] <= lives[one][1]:
                assert at + found.values[one].bytes <= there or there + found.values[other].bytes <= at


@pytest.fixture
def s():
    frozen = mvit_kernels.freeze(models.build("own", "s"), dtype=torch.bfloat16)
    with mvit_kernels.use_backend("triton"):
        links = mvit_kernels.freezing.whole.whole_network(frozen).links
        return links.native(kind_on("cpu"))


def test_launches_of_s(s):
    """All in Triton: stem, seven inverted residuals of three, three blocks of three and of four launches a layer (the
    last norm is inside a convolution), the last convolution, the mean and the classifier. By what is chosen on a GPU:
    tests/freezing/test_launches.py."""
    with mvit_kernels.use_backend("triton"):
        whole = s.lowering(256, (256, 256))
    assert len(whole.operations) == 1 + 7 * 3 + 3 * 4 + (2 + 4 + 3) * 4 + 3
    lives = whole.lives()
    most = max(
        sum(whole.values[value].bytes for value in whole.offsets if lives[value][0] <= at <= lives[value][1])
        for at in range(len(whole.operations))
    )
    assert most <= whole.arena <= 1.15 * most < 6 * 2**20 * 256  # bytes: 6 MB an image


@pytest.mark.parametrize("input_first", [True, False])
def test_with_cuda_s_operators(monkeypatch, input_first):
    """Emulated, beside Triton's launches: whole stacks, and whole inverted residuals, one into a map of its own and one
    into a part of that which a block's fusion reads. Against float64, in memory that was NaN before."""
    made = Draw(4)
    block = made.block(24, 64, layers=2, input_first=input_first)
    module = FrozenSequential(
        made.conv(3, 16, 3, stride=2),
        made.inverted(16, 40, 16),
        made.inverted(16, 40, 24, stride=2),
        block,
        made.inverted(24, 48, 24),
        made.conv(24, 16),
    )
    load_operators("inverted_residual")
    load_operators("transformer")
    monkeypatch.setattr(cuda.BACKEND, "unavailable", lambda device_type: [])

    def plan(stack, *_, **__):
        return StackPlan.OPERATORS if cuda.BACKEND.supports["transformer"](stack) else StackPlan.WHOLE

    chosen = SimpleNamespace(plan_stack=plan, choose=lambda call: "cuda", server=lambda operator, call: "cuda")
    monkeypatch.setattr(lowering, "backends", chosen)
    monkeypatch.setattr(LaunchedNetwork, "run", run_in_nan)
    x = made(1, 3, 15, 18)
    network = judge(module, x, torch.bfloat16)
    with mvit_kernels.use_backend("triton"):
        names = [operation.name for operation in network.lowering(1, (15, 18)).operations]
    assert [names.count(one) for one in ("inverted_residual", "depthwise_convolution", "transformer")] == [3, 0, 1]
    (steps,) = network._prepared.values()
    assert sum(isinstance(step, prepared.PreparedCall) for step in steps) == 4


# ------------------------------------------------------------------------------------- what launches do not serve


class Seen(TorchDispatchMode):
    """Sees PyTorch's operators, and no launch."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.fixture
def pair():
    made = Draw(5)
    module = FrozenSequential(made.conv(3, 8, 3, stride=2), made.inverted(8, 16, 8)).to(torch.bfloat16)
    return module, made(1, 3, 6, 6)


@pytest.fixture
def calls(monkeypatch):
    made, run = [], LaunchedNetwork.run
    monkeypatch.setattr(LaunchedNetwork, "run", lambda self, *memory: made.append(self) or run(self, *memory))
    return made


def test_where_launches_may_not_be_called(pair, calls):
    module, x = pair
    with mvit_kernels.use_backend("triton"):
        expected = module(x)
        network = module._network
        assert calls == [network]
        module(x.clone().requires_grad_())
        assert module(x[:0]).shape == (0, *expected.shape[1:])
        with Seen() as seen:
            module(x)
        assert any("convolution" in name for name in seen.names)
        with torch.autocast("cpu", torch.bfloat16):
            module(x)
        torch.func.functional_call(module, {"0.bias": module[0].bias + 1}, x)
        handle = module[1].project.register_forward_hook(lambda *_: None)
        module(x)
        handle.remove()
        assert calls.count(network) == 1  # parts by themselves may be others
        assert torch.equal(module(x), expected) and calls.count(network) == 2
    before = len(calls)
    with mvit_kernels.use_backend("reference"):
        module(x)
    module(x)  # by the CPU's own
    assert len(calls) == before


def test_float32_is_asked_for(pair):
    """On a GPU it is cuDNN's, unless Triton is asked for by name."""
    module = pair[0].float()
    with mvit_kernels.use_backend("triton"):
        network = LaunchedNetwork(module)
        assert network.plan(pair[1]) is not None
    assert network.plan(pair[1]) is None
    with pytest.raises(native.NotNative, match="left to cuDNN"):
        LaunchedNetwork(module)


def test_changes_are_seen(pair, calls):
    module, x = pair
    before = launched(module, x)
    module.load_state_dict({name: value * 2 for name, value in module.state_dict().items()})
    after = launched(module, x)
    assert not torch.equal(after, before)
    torch.testing.assert_close(after, composed(module, x), rtol=0.05, atol=0.05)
    assert torch.equal(launched(pickle.loads(pickle.dumps(module)), x), after)
    assert len(calls) == 3


def test_a_stack_that_no_kernel_takes():
    made = Draw(6)
    wide = triton.target.MAX_WIDTH + 16
    module = FrozenSequential(made.conv(3, 8, 3, stride=2), made.block(8, wide, layers=1))
    with mvit_kernels.use_backend("triton"):
        reason = module.native(kind_on("cpu"))
    assert "no kernels serve its transformer" in str(reason) and str(wide) in str(reason)


# -------------------------------------------------------------------------------------------------------------- graphs


@pytest.fixture
def runtime(monkeypatch):
    fake = Runtime()
    monkeypatch.setattr(graphs, "runtime", fake)
    return fake


def test_a_frozen_model_with_graphs(runtime):
    """The same bits as without; once captured for a shape and state of the weights; copies have no graphs."""
    made = Draw(7)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.SiLU(), nn.Conv2d(8, 4, 1)).eval()
    x, y = made(1, 3, 6, 6), made(2, 3, 6, 6)
    with mvit_kernels.use_backend("triton"), torch.inference_mode():
        plain = mvit_kernels.freeze(model, dtype=torch.bfloat16)
        fast = mvit_kernels.freeze(model, dtype=torch.bfloat16, cuda_graph=2)
        first = fast(x)
        assert torch.equal(first, plain(x)) and (runtime.captured, runtime.replays) == (1, 1)
        assert torch.equal(fast(y), plain(y)) and torch.equal(fast(2 * x), plain(2 * x))
        assert torch.equal(first, plain(x))  # later calls leave earlier results alone
        assert (runtime.captured, runtime.replays) == (2, 3)
        runtime.capturing = True
        assert torch.equal(fast(x), first) and runtime.replays == 3  # part of the graph around it
        runtime.capturing = False
        again = pickle.loads(pickle.dumps(copy.deepcopy(fast)))
        assert torch.equal(again(x), first) and runtime.captured == 3
        fast.load_state_dict({name: value * 2 for name, value in fast.state_dict().items()})
        plain.load_state_dict(fast.state_dict())
        assert torch.equal(fast(x), plain(x)) and not torch.equal(fast(x), first)
        assert runtime.captured == 4


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_a_call_looks_its_lowering_up_once(runtime, monkeypatch, cuda_graph):
    made, found = Draw(8), []
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.SiLU()).eval()
    lookup = LaunchedNetwork.lowering
    monkeypatch.setattr(LaunchedNetwork, "lowering", lambda self, *of: found.append(of) or lookup(self, *of))
    with mvit_kernels.use_backend("triton"), torch.inference_mode():
        frozen, x = mvit_kernels.freeze(model, dtype=torch.bfloat16, cuda_graph=cuda_graph), made(1, 3, 6, 6)
        found.clear()
        for calls in (1, 2):
            frozen(x)
            assert found == [(1, (6, 6))] * calls
    assert runtime.captured == cuda_graph


def test_nothing_is_packed_while_a_graph_is_captured(pair, monkeypatch):
    """On the stream of the model's device, whatever the current one is."""
    asked = []
    monkeypatch.setattr(gpu, "is_capturing", lambda device: asked.append(device) or True)
    with mvit_kernels.use_backend("triton"), pytest.raises(native.NotNative, match="is being captured") as raised:
        LaunchedNetwork(pair[0])
    assert asked == [pair[1].device] and not raised.value.lasts


def test_graphs_want_a_native_call(runtime):
    with pytest.raises(ValueError, match="cuda_graph is for native calls, and there is none: .*kernel_size"):
        mvit_kernels.freeze(nn.Conv2d(3, 8, 5), cuda_graph=True)


def test_a_backbone_is_one_call():
    """Its last map: as many channels as the network says."""
    with mvit_kernels.use_backend("triton"):
        frozen = mvit_kernels.freeze(models.build("own", num_classes=0), dtype=torch.bfloat16)
        call = vars(frozen)["_mvit_call"]
    assert isinstance(call.network, LaunchedNetwork) and call.whole.channels == call.network.out_channels > 3


def test_what_judges_by_a_stand_in_sees_adjacent_channels():
    """A backend declines maps whose channels are not."""
    module, draw = chain()
    launched(module.to(torch.bfloat16), draw(1, 3, 16, 18))
    with mvit_kernels.use_backend("triton"):
        made = module._network.lowering(1, (16, 18))
    at = next(at for operation in made.operations for at in operation.writes if at.channels > 8)
    assert made._stand_in(at).stride(-1) == 1
