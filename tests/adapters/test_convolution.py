# SPDX-License-Identifier: Apache-2.0
"""Convolution layers in training: what runs on `batch_norm_activation`, and what must not.

A fake backend serves the operator in float64, so that everything is compared to the last digits; the real kernels are
in `test_accelerate_parity.py`, under autocast too, and in the operator's own tests.
"""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from mvit_kernels import accelerate, report, restore
from mvit_kernels._utils.third_party import import_timm
from mvit_kernels.backends import use_backend
from support import models
from support.declined import block_classes, classes, evaluated
from support.fake_backend import fake_backend
from support.models import LIBRARIES, assert_same, blocks, fused_norms

OPERATOR = "batch_norm_activation"
# The batch norms of a first block, with the activation behind each; Hugging Face's begins with an inverted residual.
INSIDE = {
    "timm": ["silu"] * 3,
    "huggingface": ["silu", "silu", None, "silu", "silu", "silu"],
    "kornia": ["silu"] * 4,
    "cvnets": ["silu"] * 3,
    "own": ["silu"] * 3,
}


@pytest.fixture(autouse=True)
def served():
    with fake_backend([OPERATOR]):
        yield


def first_block(library="timm"):
    """In float64 and channels-last, in training, and an input."""
    block = blocks(models.build(library).double())[0].train().to(memory_format=torch.channels_last)
    channels = next(module for module in block.modules() if isinstance(module, nn.Conv2d)).in_channels
    x = torch.randn(2, channels, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return block, x.contiguous(memory_format=torch.channels_last)


def stepped(block, x, steps=2):
    """The outputs of some steps of SGD, then gradients, parameters and buffers."""
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
    outputs = []
    for step in range(steps):
        optimizer.zero_grad()
        x = x.detach().requires_grad_()
        outputs.append(block(x + step))
        outputs[-1].square().mean().backward()
        optimizer.step()
    found = {f"output {step}": y.detach() for step, y in enumerate(outputs)} | {"gradient of x": x.grad}
    found |= {f"gradient of {name}": p.grad for name, p in block.named_parameters() if p.grad is not None}
    return found | dict(block.state_dict())


def assert_trains_alike(ours, plain, x):
    expected, found = stepped(plain, x), stepped(ours, x)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        scale = value.double().abs().max().clamp(min=1)
        torch.testing.assert_close(
            found[name], value, rtol=0, atol=1e-9 * scale.item(), msg=lambda m, n=name: f"{n}: {m}"
        )


# -------------------------------------------------------------------------------------------------------------- parity


@pytest.mark.parametrize("library", LIBRARIES)
def test_blocks_train_alike(library):
    """Outputs, every gradient, and what two steps leave in parameters, running statistics and counters."""
    block, x = first_block(library)
    plain = copy.deepcopy(block)
    accelerate(block, strict=True)
    with fused_norms() as fused:
        assert_trains_alike(block, plain, x)
    assert fused == 2 * INSIDE[library]


@pytest.mark.parametrize("library", LIBRARIES)
def test_every_batch_norm_of_a_model(library):
    model = models.build(library)
    ours = models.accelerated(model)
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    x = models.images(2, 64, 128).double()
    with fused_norms() as fused:
        y, gradients = models.differentiated(ours.double(), x)
    assert len(fused) == norms and fused.count(None) >= 7  # inverted residuals end without an activation
    expected, expected_gradients = models.differentiated(model.double(), x)
    assert_same(y, expected)
    models.assert_gradients_as_pytorch(gradients, expected_gradients, expected_gradients, unit=1e-9)
    for (name, value), other in zip(model.named_buffers(), ours.buffers(), strict=True):
        torch.testing.assert_close(other, value, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("library", LIBRARIES)
def test_evaluation_is_unchanged(library):
    """Bit for bit, as is the count of batches."""
    model = models.build(library)
    x = models.images(1, 64, 64)
    with fused_norms() as fused:
        ours = evaluated(models.accelerated(model), x)
    assert not fused
    assert torch.equal(ours, evaluated(models.accelerated(model, convolutions=False), x))


def test_statistics_without_gradients():
    """As recalibration of batch norms needs them."""
    block, x = first_block()
    plain = copy.deepcopy(block)
    accelerate(block)
    with torch.no_grad(), fused_norms() as fused:
        assert_same(block(x), plain(x))
    assert len(fused) == 3
    for value, expected in zip(block.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_moves_the_statistics_twice(use_reentrant):
    """As it does in PyTorch, whose forward also runs again in backward."""
    block, x = first_block()
    plain = copy.deepcopy(block)
    accelerate(block)
    results = []
    for candidate in (block, plain):
        y = checkpoint(candidate, x.clone().requires_grad_(), use_reentrant=use_reentrant)
        y.square().sum().backward()
        results.append([y.detach(), *(p.grad for p in candidate.parameters()), *candidate.buffers()])
    assert block.conv_kxk.bn.num_batches_tracked == plain.conv_kxk.bn.num_batches_tracked
    for value, expected in zip(*results, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9)


def test_second_derivatives():
    block, x = first_block()
    plain = copy.deepcopy(block).conv_kxk
    layer = accelerate(block).conv_kxk
    penalties = []
    for candidate in (layer, plain):
        images = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(candidate(images).square().sum(), images, create_graph=True)
        gradient.square().sum().backward()
        penalties.append(images.grad)
    torch.testing.assert_close(*penalties, rtol=1e-8, atol=1e-8 * penalties[1].abs().max().item())


# ------------------------------------------------------------------------------------------------------------ refusals


def _set(**attributes):
    def change(layer):
        for name, value in attributes.items():
            setattr(layer.bn, name, value)

    return change


def _forward_on_the_instance(layer):
    layer.bn.forward = lambda x: 2 * nn.BatchNorm2d.forward(layer.bn, x)


class _Doubled(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


class _Doubling(nn.Module):
    def forward(self, x):
        return 2 * x


def _subclass(layer):
    norm = _Doubled(layer.bn.num_features)
    norm.load_state_dict(layer.bn.state_dict())
    layer.bn = norm.double()


def _synchronised(layer):
    layer.bn = import_timm().layers.convert_sync_batchnorm(layer.bn)


def _not_affine(layer):
    layer.bn.weight = layer.bn.bias = None


REFUSALS = {
    "frozen": lambda layer: layer.bn.eval(),
    "cumulative average": _set(momentum=None),
    "no running statistics": _set(running_mean=None, running_var=None, track_running_stats=False),
    "statistics not tracked": _set(track_running_stats=False),
    "not affine": _not_affine,
    "another activation": lambda layer: setattr(layer.bn, "act", nn.ReLU()),
    "a dropout between": lambda layer: setattr(layer.bn, "drop", _Doubling()),
    "a forward of its own": _forward_on_the_instance,
    "a subclass": _subclass,
    "synchronised": _synchronised,
    "parametrized": lambda layer: parametrize.register_parametrization(layer.bn, "weight", _Doubling()),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", REFUSALS)
def test_what_the_operator_would_compute_differently(kind, when):
    """The layer runs its own forward; the block's two others stay fast."""
    block, x = first_block()
    if when == "after":
        accelerate(block)
        stepped(block, x, steps=1)  # it has been looked at
    REFUSALS[kind](block.conv_kxk)
    plain = restore(copy.deepcopy(block)) if when == "after" and kind != "a forward of its own" else None
    if plain is None:
        plain, _ = first_block()
        if when == "after":
            stepped(plain, x, steps=1)
        REFUSALS[kind](plain.conv_kxk)
    accelerate(block)
    with fused_norms() as fused:
        assert_trains_alike(block, plain, x)
    assert fused == 2 * ["silu"] * 2


@pytest.mark.parametrize(
    ("inner", "register"),
    [
        ("bn", "register_forward_hook"),
        ("bn", "register_full_backward_hook"),
        ("bn.act", "register_forward_pre_hook"),
        ("bn.drop", "register_forward_hook"),
    ],
)
def test_hooks_on_what_is_bypassed(inner, register):
    """Called while they are there; hooks on the layer and on the convolution change nothing."""
    block, x = first_block()
    plain = copy.deepcopy(block)
    accelerate(block)
    stepped(copy.deepcopy(block), x)
    seen = []
    block.conv_kxk.register_forward_hook(lambda *_: seen.append("layer"))
    block.conv_kxk.conv.register_forward_hook(lambda *_: seen.append("convolution"))
    handle = getattr(block.conv_kxk.get_submodule(inner), register)(lambda *_: seen.append(inner))
    assert "carries a hook" in report(block).convolutions[0].reasons[0]
    with fused_norms() as fused:
        assert_trains_alike(block, plain, x)
    assert len(fused) == 4 and sorted(seen) == sorted(2 * ["layer", "convolution", inner])
    handle.remove()
    with fused_norms() as fused:
        assert_trains_alike(block, plain, x)
    assert len(fused) == 6 and seen.count(inner) == 2


def test_hooks_on_all_modules():
    block, x = first_block()
    plain = copy.deepcopy(block)
    accelerate(block)
    seen = []
    handle = register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        with fused_norms() as fused:
            assert_same(block(x).detach(), plain(x).detach())
    finally:
        handle.remove()
    assert not fused and block.conv_kxk.bn in seen


def test_lora_on_a_convolution_is_called():
    """The convolution remains a module, so the layer stays fast."""

    class Adapted(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base_layer, self.up = base, nn.Conv2d(base.in_channels, base.out_channels, 3, padding=1).double()

        def forward(self, x):
            return self.base_layer(x) + self.up(x)

    block, x = first_block()
    block.conv_kxk.conv = Adapted(block.conv_kxk.conv)
    plain = copy.deepcopy(block)
    accelerate(block)
    with fused_norms() as fused:
        assert_trains_alike(block, plain, x)
    assert len(fused) == 6


def test_parts_of_a_sequential():
    """Kornia's inverted residuals: three convolutions in one; the frozen norm runs by itself, the others do not."""
    model = models.build("kornia").double().train()
    plain = copy.deepcopy(model)
    ours = models.accelerated(model)
    for candidate in (ours, plain):
        candidate.mv2[0].conv[1].eval()
    inverted, x = ours.mv2[0], torch.randn(2, 16, 8, 8, dtype=torch.float64)
    with fused_norms() as fused:
        assert_trains_alike(inverted, plain.mv2[0], x)
    assert fused == 2 * ["silu", None]
    part = inverted.conv[3:6]  # Sequential makes it of its own class
    with fused_norms() as fused:
        y = torch.randn(2, 32, 8, 8, dtype=torch.float64)
        assert_trains_alike(part, plain.mv2[0].conv[3:6], y)
    assert fused == 2 * ["silu"]


def test_where_no_kernel_serves():
    """Requested backends and refused layouts: the original forward, without an error."""
    block, x = first_block()
    plain = copy.deepcopy(block)
    accelerate(block, backend=None)
    with use_backend("reference"), fused_norms() as fused:
        assert_trains_alike(block, plain, x)
    assert not fused
    with fake_backend([OPERATOR], refuses=lambda call: ["no"] * (call.fact("layout") != "channels_last")):
        with fused_norms() as fused:
            assert_trains_alike(block.to(memory_format=torch.contiguous_format), plain, x.contiguous())
        assert not fused


def test_too_few_values():
    """PyTorch's own error."""
    block, _ = first_block()
    layer = accelerate(block).conv_kxk
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        layer(torch.randn(1, 48, 1, 1, dtype=torch.float64))


# ------------------------------------------------------------------------------------- accelerate, restore and report


def test_restore_and_copies():
    block, x = first_block("kornia")
    plain, original = copy.deepcopy(block), classes(block)
    accelerate(block)
    stepped(copy.deepcopy(block), x)
    file = io.BytesIO()
    torch.save(block, file)
    file.seek(0)
    for copied in (copy.deepcopy(block), pickle.loads(pickle.dumps(block)), torch.load(file, weights_only=False)):
        assert classes(copied) == classes(block) != original
        with fused_norms() as fused:
            assert_trains_alike(copied, copy.deepcopy(plain), x)
        assert len(fused) == 8
    assert list(block.state_dict()) == list(plain.state_dict())
    assert classes(restore(block)) == original
    with fused_norms() as fused:
        assert_trains_alike(block, plain, x)
    assert not fused


def test_convolutions_are_left_alone_on_request():
    model = models.build("timm")
    original = classes(model)
    accelerate(model, convolutions=False)
    assert sum(a is not b for a, b in zip(classes(model), original, strict=True)) == 3
    assert str(report(model)).endswith("0 of 32 convolution layers: batch norm + SiLU fused in training")
    accelerate(model)
    assert str(report(model)).endswith("32 of 32 convolution layers: batch norm + SiLU fused in training: triton")
    accelerate(model, convolutions=False)  # undoes the earlier call
    assert sum(a is not b for a, b in zip(classes(model), original, strict=True)) == 3


def test_a_backend_without_the_operator():
    """Named for the blocks: the convolution layers are left alone, also if asked for."""
    block_operators = ("layer_norm_linear", "patch_attention", "linear_residual", "layer_norm_mlp")
    with fake_backend(block_operators, preferred=False):
        model = accelerate(models.build("timm"), backend="triton", convolutions=True)
        assert len(report(model).accelerated) == 3
        assert not any(layer.fused for layer in report(model).convolutions)


def test_models_without_blocks():
    convolutions = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.SiLU())
    original = classes(convolutions)
    assert classes(accelerate(convolutions)) == original and not report(convolutions).convolutions


def test_report_says_why_not():
    model = accelerate(models.build("own"))
    norm = blocks(model)[0].conv_local.norm
    norm.register_forward_hook(lambda *_: None)
    last = str(report(model)).splitlines()[-1]
    fused = "  31 of 32 convolution layers: batch norm + SiLU fused in training: triton; not all, because "
    assert last.startswith(f"{fused}its BatchNorm2d carries a hook")
    assert str(report(model)).splitlines()[0] == "3 of 3 MobileViT blocks swapped, none of them served by a kernel"


def test_report_says_where_no_kernel_serves():
    """Fused are those that a kernel serves on the layers' device: as `accelerate` swapped them is not enough."""
    model = accelerate(models.build("timm")).to("meta")
    told = report(model)
    assert len(told.convolutions) == 32 and not any(layer.fused for layer in told.convolutions)
    assert str(told).endswith("0 of 32 convolution layers: batch norm + SiLU fused in training; none, for that reason")
    with fake_backend([OPERATOR], refuses=lambda call: ["never on Sundays"] if call.needs_grad else []):
        last = str(report(model.to_empty(device="cpu"))).splitlines()[-1]
        assert last.endswith("fused in training; none, because triton: never on Sundays")


@pytest.mark.parametrize("first", ["accelerate", "convert"])
@pytest.mark.parametrize("library", ["own", "timm"])
def test_synchronised_batch_norms(library, first):
    """Converted before or after `accelerate`: they run module by module."""
    convert = (
        nn.SyncBatchNorm.convert_sync_batchnorm if library == "own" else import_timm().layers.convert_sync_batchnorm
    )
    model = models.build(library)
    plain = convert(copy.deepcopy(model)).double()
    ours = convert(accelerate(model)) if first == "accelerate" else accelerate(convert(model))
    assert len(report(ours).accelerated) == 3
    assert "SyncBatchNorm" in str(report(ours)) and "0 of 32" in str(report(ours))
    with fused_norms() as fused:
        assert_trains_alike(blocks(ours.double())[0].train(), blocks(plain)[0].train(), first_block(library)[1])
    assert not fused


def test_distributed_data_parallel(process_group):
    """Which broadcasts the buffers that the operator updates in place."""
    block, x = first_block()
    plain = DistributedDataParallel(copy.deepcopy(block))
    ours = DistributedDataParallel(accelerate(block))
    with fused_norms() as fused:
        assert_trains_alike(ours, plain, x)
    assert len(fused) == 6


@pytest.mark.parametrize("library", ["timm", "kornia"])
def test_compiled(library):
    """One graph; statistics move, and a norm that is frozen later is."""
    torch._dynamo.reset()
    block, x = first_block(library)
    name = {"timm": "conv_kxk", "kornia": "conv1"}[library]
    plain = copy.deepcopy(block.get_submodule(name))
    layer = accelerate(block).get_submodule(name)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for frozen in (False, True):
        for candidate in (layer, plain) if frozen else ():
            next(module for module in candidate.modules() if isinstance(module, nn.BatchNorm2d)).eval()
        results = []
        for candidate in (compiled, plain):
            images = x.clone().requires_grad_()
            y = candidate(images)
            y.square().sum().backward()
            results.append([y.detach(), images.grad, *candidate.buffers()])
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    torch._dynamo.reset()


def test_exported_and_scripted_as_before():
    """Exports of a model in training are plain PyTorch; TorchScript compiles the library's own forward."""
    block, x = first_block("kornia")
    plain = copy.deepcopy(block)
    accelerate(block)
    sequential, reference = block.conv1, plain.conv1
    exported = torch.export.export(sequential, (x,))
    assert not [node for node in exported.graph.nodes if "mvit" in str(node.target)]
    scripted = torch.jit.script(sequential)
    assert_same(scripted(x).detach(), reference(x).detach())
    assert block_classes(block) == [type(block)]
