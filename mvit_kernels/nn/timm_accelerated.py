# SPDX-License-Identifier: Apache-2.0
"""timm's own MobileViTs, accelerated from birth: `timm.create_model("accelerated_mobilevit_s", pretrained=True)`.

For programs that make models by name and take no line of code in between, such as timm's `train.py`. timm's own names
keep their meaning. Requires timm; imported only by `mvit_kernels.nn.register_timm_models`.
"""

from __future__ import annotations

from typing import Any

from timm.models import mobilevit, register_model
from torch import nn

from ..adapters import accelerate

__all__: list[str] = []  # timm adds each registered name


def _create(name: str, backend: str | None, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    # strict: what was asked for by this name must not run as plain timm without a word
    return accelerate(getattr(mobilevit, name)(pretrained=pretrained, **kwargs), backend=backend, strict=True)


@register_model
def accelerated_mobilevit_xxs(pretrained: bool = False, backend: str | None = None, **kwargs: Any) -> nn.Module:
    """timm's `mobilevit_xxs`, its weights included, accelerated; `backend` as for `accelerate`, the rest as for timm's.

    Raises:
        ValueError: the arguments make a model whose blocks cannot be accelerated, or one without blocks.
    """
    return _create("mobilevit_xxs", backend, pretrained, kwargs)


@register_model
def accelerated_mobilevit_xs(pretrained: bool = False, backend: str | None = None, **kwargs: Any) -> nn.Module:
    """timm's `mobilevit_xs`, accelerated; see `accelerated_mobilevit_xxs`."""
    return _create("mobilevit_xs", backend, pretrained, kwargs)


@register_model
def accelerated_mobilevit_s(pretrained: bool = False, backend: str | None = None, **kwargs: Any) -> nn.Module:
    """timm's `mobilevit_s`, accelerated; see `accelerated_mobilevit_xxs`."""
    return _create("mobilevit_s", backend, pretrained, kwargs)
