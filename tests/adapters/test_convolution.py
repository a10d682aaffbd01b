# SPDX-License-Identifier: Apache-2.0
"""Convolution layers in training on `batch_norm_activation`: parity, and what `accelerate`, `restore` and `report` do.

A fake backend serves the operator in float64, so that everything is compared to the last digits; the real kernels are
in `test_accelerate_parity.py`, under autocast too, and in the operator's own tests.
"""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from mvit_kernels import accelerate, report, restore
from mvit_kernels._utils.third_party import import_timm
from support import models
from support.convolutions import OPERATOR, assert_trains_alike, stepped, training_block
from support.declined import block_classes, classes, evaluated
from support.fake_backend import fake_backend
from support.models import LIBRARIES, assert_same, blocks, fused_norms

pytestmark = pytest.mark.usefixtures("fused_batch_norm")

# The batch norms of a first block, with the activation behind each; Hugging Face's begins with an inverted residual.
INSIDE = {
    "timm": ["silu"] * 3,
    "huggingface": ["silu", "silu", None, "silu", "silu", "silu"],
    "kornia": ["silu"] * 4,
    "cvnets": ["silu"] * 3,
    "own": ["silu"] * 3,
}

# -------------------------------------------------------------------------------------------------------------- parity


@pytest.mark.parametrize("library", LIBRARIES)
def test_blocks_train_alike(library):
    """Outputs, every gradient, and what two steps leave in parameters, running statistics and counters."""
    block, x = training_block(library)
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
    block, x = training_block()
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
    block, x = training_block()
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
    block, x = training_block()
    plain = copy.deepcopy(block).conv_kxk
    layer = accelerate(block).conv_kxk
    penalties = []
    for candidate in (layer, plain):
        images = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(candidate(images).square().sum(), images, create_graph=True)
        gradient.square().sum().backward()
        penalties.append(images.grad)
    torch.testing.assert_close(*penalties, rtol=1e-8, atol=1e-8 * penalties[1].abs().max().item())


# ------------------------------------------------------------------------------------- accelerate, restore and report


def test_restore_and_copies():
    block, x = training_block("kornia")
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
        assert_trains_alike(blocks(ours.double())[0].train(), blocks(plain)[0].train(), training_block(library)[1])
    assert not fused


def test_distributed_data_parallel(process_group):
    """Which broadcasts the buffers that the operator updates in place."""
    block, x = training_block()
    plain = DistributedDataParallel(copy.deepcopy(block))
    ours = DistributedDataParallel(accelerate(block))
    with fused_norms() as fused:
        assert_trains_alike(ours, plain, x)
    assert len(fused) == 6


@pytest.mark.parametrize("library", ["timm", "kornia"])
def test_compiled(library):
    """One graph; statistics move, and a norm that is frozen later is."""
    torch._dynamo.reset()
    block, x = training_block(library)
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
    block, x = training_block("kornia")
    plain = copy.deepcopy(block)
    accelerate(block)
    sequential, reference = block.conv1, plain.conv1
    exported = torch.export.export(sequential, (x,))
    assert not [node for node in exported.graph.nodes if "mvit" in str(node.target)]
    scripted = torch.jit.script(sequential)
    assert_same(scripted(x).detach(), reference(x).detach())
    assert block_classes(block) == [type(block)]
