# SPDX-License-Identifier: Apache-2.0
"""Apple's cvnets MobileViT classifier (cvnets.models.classification.mobilevit), and copies of it.

The code is copied more often than the package is installed. So a model is recognized by its class name and children,
and then tested: on two small random images, in float64, the chain must compute what the model's own forward does. That
also tells apart models that return a dict, as cvnets' do with a neural augmentor.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..._utils.plain import alike, copy_of, does_nothing, is_plain
from ..program import NotNative
from ._chain import Chain, frozen, idle, is_linear

_CHILDREN = ("conv_1", "layer_1", "layer_2", "layer_3", "layer_4", "layer_5", "conv_1x1_exp", "classifier")
# Sizes of the images of the test. Of no map are there as many patches as channels, where cvnets' LayerNorm normalizes
# over the patches, and stage 5 is resized: 24, 6 and 2 patches, and 12, 4 and 1.
_SIZES = ((96, 64), (64, 48))
_tried: dict[tuple[object, ...], bool] = {}


def chain(model: nn.Module) -> Chain | None:
    """The chain of a cvnets classifier; None for a model of another library."""
    original = _original(type(model))
    if original.__name__ != "MobileViT" or not all(model._modules.get(name) is not None for name in _CHILDREN):
        return None
    names = list(model.classifier._modules)
    if not is_plain(model.classifier, nn.Sequential) or len(names) < 2:
        raise NotNative(f"its classifier is a {type(model.classifier).__name__}, not cvnets' Sequential")
    pool, *between, last = names
    classifier = model.classifier._modules[last]
    if not is_linear(classifier):
        raise NotNative(f"classifier.{last} is a {type(classifier).__name__}, not a linear layer")
    found = Chain(
        body=frozen(model, *_CHILDREN[:-1]),
        pools=classifier.weight.shape[1],
        classifier=classifier,
        passed=(
            model.classifier,
            model.classifier._modules[pool],
            *idle(model, *(f"classifier.{name}" for name in between)),
        ),
        facts=tuple((model, name) for name in ("neural_augmentor", "gradient_checkpointing") if hasattr(model, name)),
    )
    if not _computes(model, original, found):
        raise NotNative(f"it has the name of cvnets' {original.__name__}, but computes something different")
    return found


def _computes(model: nn.Module, original: type[nn.Module], found: Chain) -> bool:
    """Whether the chain computes what the model's own forward does: tried once for the same classes and facts."""
    facts = tuple(str(getattr(owner, name)) for owner, name in found.facts)
    classes = (original, *(type(module) for module in model.modules()), *facts)
    if classes not in _tried:
        images = next(value for value in found.body[0].buffers() if value.dim() == 4).shape[1]
        copied = copy_of(model)
        copied.__class__ = original  # not in one call
        _tried[classes] = alike(_Chained(copied), copied, images, _SIZES)
    return _tried[classes]


class _Chained(nn.Module):
    """A copy of a cvnets classifier, computed as the chain."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        for name in _CHILDREN[:-1]:
            x = self.model._modules[name](x)
        linear = [module for module in self.model.classifier if not does_nothing(module)][-1]
        return torch.nn.functional.linear(x.mean((-2, -1)), linear.weight, linear.bias)


def _original(cls: type[nn.Module]) -> type[nn.Module]:
    """The library's class, of one that `mvit_kernels.freezing.whole` put in its place."""
    return getattr(cls, "_mvit_library_class", cls)
