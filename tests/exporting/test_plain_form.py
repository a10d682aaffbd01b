# SPDX-License-Identifier: Apache-2.0
"""The plain form computes what the model does, in float64, of every library and head, on maps of any size."""

import pytest
import torch
from torch import nn

import mvit_kernels
from mvit_kernels.exporting.plain import PlainBlock, plain_form
from mvit_kernels.exporting.plan import FlatOutputs, Plan, output_names, outputs_by_name
from mvit_kernels.freezing.frozen import Frozen
from support import models

WAYS = ("products", "pytorch", "onnx")


def exactly(model: nn.Module, plan: Plan) -> nn.Module:
    """`plain_form` of a model in float64."""
    return plain_form(model, plan)


def assert_same(model: nn.Module, network: nn.Module, images: torch.Tensor) -> None:
    with torch.no_grad():
        expected, got = outputs_by_name(model(images)), outputs_by_name(network(images))
    assert list(got) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=1e-10 * value.abs().max().item())


def images(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@pytest.mark.parametrize(
    "library, prepared", [*((library, "plain") for library in models.LIBRARIES), ("timm", "accelerated")]
)
def test_every_library(library, prepared):
    """On 96 × 160 px the last map, 3 × 5, is no whole number of patches; Kornia raises there, and so does its form."""
    model = models.double(library)
    given = mvit_kernels.accelerate(models.double(library)) if prepared == "accelerated" else model
    network = exactly(given, Plan(((96, 160),)))
    assert not any(isinstance(module, Frozen) for module in network.modules())
    if library == "kornia":
        with pytest.raises(Exception) as theirs:
            model(images(1, 3, 96, 160))
        with pytest.raises(type(theirs.value)):
            network(images(1, 3, 96, 160))
        assert_same(model, network, images(2, 3, 64, 128))
    else:
        assert_same(model, network, images(2, 3, 96, 160))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_every_way_of_attention_on_maps_of_any_size(way, dynamic):
    model = models.double("timm")
    network = exactly(model, Plan(((64, 64),), dynamic_size=dynamic, attention=way))
    for size in ((64, 64), (96, 160), (70, 90)):
        assert_same(model, network, images(2, 3, *size))


def test_a_frozen_model_and_its_weights():
    """It is taken as it is: with its own weights, not with those of a model that is frozen again."""
    model = models.double("own")
    frozen = mvit_kernels.freeze(model)
    with torch.no_grad():
        frozen.classifier.bias += 1
    assert_same(frozen, exactly(frozen, Plan(((64, 64),))), images(2, 3, 64, 96))
    assert any(isinstance(module, Frozen) for module in frozen.modules())


def test_what_is_not_frozen_stays():
    """A block with a hook inside is declined, and exported as the library has it."""
    model = models.double("timm")
    model.stages[3][1].transformer[0].attn.register_forward_hook(lambda module, args, output: output * 2)
    network = exactly(model, Plan(((64, 64),)))
    assert sum(isinstance(module, PlainBlock) for module in network.modules()) == 2
    assert_same(model, network, images(1, 3, 64, 96))


HEADS = {
    "ssdlite": lambda: mvit_kernels.MobileViTSSDLite("xxs", num_classes=7),
    "deeplabv3": lambda: mvit_kernels.MobileViTDeepLabV3("xxs", num_classes=5),
    "huggingface deeplabv3": lambda: models.huggingface("xxs", "ForSemanticSegmentation", num_labels=5),
    "huggingface without a head": lambda: models.huggingface("xxs", "Model"),
    "timm's features": lambda: models.timm("xxs", features_only=True),
}


@pytest.mark.parametrize("head", HEADS)
def test_heads(head):
    torch.manual_seed(0)
    model = models.sensible(HEADS[head]()).double().eval()
    network = exactly(model, Plan(((64, 64),)))
    assert not any(isinstance(module, Frozen) for module in network.modules())
    assert_same(model, network, images(2, 3, 96, 160))
    with torch.no_grad():
        flat = FlatOutputs(network)(images(1, 3, 64, 64))
    names = output_names(model(images(1, 3, 64, 64)))
    assert len(flat) == len(names) and all(name.isidentifier() for name in names)


def test_cvnets_normalises_over_patches_where_there_are_as_many_as_channels():
    """XXS at 128 px: the last blocks' fallback. A file of any size cannot know, and is refused."""
    model = models.double("cvnets")
    plan = Plan(((128, 128),))
    network = exactly(model, plan)
    assert any(not module.takes(module.fallback, torch.empty(1, 64, 16, 16)) for module in blocks(network))
    assert_same(model, network, images(1, 3, 128, 128))
    with pytest.raises(ValueError, match="cvnets' block computes something else .* give the size, as in sizes=256"):
        exactly(model, plan._replace(dynamic_size=True))


def blocks(network: nn.Module) -> list[PlainBlock]:
    return [module for module in network.modules() if isinstance(module, PlainBlock)]


def test_nothing_has_more_than_four_axes():
    ranks = []
    network = exactly(models.double("own"), Plan(((64, 64),)))

    class Ranks(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            ranks.append(max((t.dim() for t in (result,) if isinstance(t, torch.Tensor)), default=0))
            return result

    with torch.no_grad(), Ranks():
        network(images(1, 3, 64, 96))
    assert max(ranks) == 4


def test_kornia_of_any_size_does_not_resize():
    network = exactly(models.double("kornia"), Plan(((64, 64),), dynamic_size=True))
    assert [block.resizes for block in blocks(network)] == [False] * 3
    with pytest.raises(RuntimeError):
        network(images(1, 3, 96, 160))
