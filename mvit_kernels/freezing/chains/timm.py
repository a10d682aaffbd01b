# SPDX-License-Identifier: Apache-2.0
"""timm's MobileViT (``ByobNet``): logits, pooled features without classes, or the last map without pooling too."""

from __future__ import annotations

from torch import nn

from ..._utils.plain import does_nothing, is_global_mean, is_own, is_plain
from ..program import NotNative
from ._chain import Chain, frozen, idle


def chain(model: nn.Module) -> Chain | None:
    """The chain of a timm model; None for a model of another library."""
    if not is_own(model, "timm", "ByobNet"):
        return None
    if not is_own(model._modules.get("head"), "timm", "ClassifierHead"):
        raise NotNative(f"its head is a {type(model._modules.get('head')).__name__}, not timm's ClassifierHead")
    head, classifier = model.head, model.head._modules.get("fc")
    pools, passed = pooling(head.global_pool, "head.global_pool")
    others = [f"head.{name}" for name, part in head._modules.items() if part is not head.global_pool]
    if classifier is not None and not does_nothing(classifier):
        others.remove("head.fc")
    else:
        classifier = None
    return Chain(
        body=frozen(model, "stem", "stages", "final_conv"),
        pools=head.in_features if pools else 0,
        classifier=classifier,
        passed=(head, *passed, *idle(model, *others)),
    )


def pooling(module: nn.Module, name: str) -> tuple[bool, tuple[nn.Module, ...]]:
    """Whether timm's pooling layer takes the mean, to (B, C), or does nothing; and the modules that it consists of.
    Raises `NotNative` for another pooling."""
    if not is_own(module, "timm", "SelectAdaptivePool2d") or set(module._modules) != {"pool", "flatten"}:
        raise NotNative(f"{name} is a {type(module).__name__}, not timm's SelectAdaptivePool2d")
    pool, flatten = module.pool, module.flatten
    inside = (module, pool, flatten)
    if does_nothing(pool) and does_nothing(flatten):
        return False, inside
    if is_own(pool, "timm", "FastAdaptiveAvgPool"):
        if pool.flatten and getattr(pool, "input_fmt", "NCHW") == "NCHW" and does_nothing(flatten):
            return True, inside
    elif is_global_mean(pool) and is_plain(flatten, nn.Flatten) and flatten.start_dim == 1:
        return True, inside
    raise NotNative(f"{name} is not the mean over a map; of poolings only 'avg' is native")
