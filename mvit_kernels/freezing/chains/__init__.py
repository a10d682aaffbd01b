# SPDX-License-Identifier: Apache-2.0
"""The networks of every library as a whole: what each forward computes, as a chain from the image to the result.

One file a library. ``chain(model)`` is None for a model that is not the library's; it raises `NotNative` for one that
is and computes something else than a chain. ``CALLS`` has the classes that are called otherwise than with one tensor.
"""

from __future__ import annotations

from torch import nn

from ..program import NotNative
from . import cvnets, huggingface, kornia, own, timm
from ._chain import ONE_TENSOR, Calls, Chain

__all__ = ["Calls", "Chain", "calls_of", "chain_of"]

_LIBRARIES = (timm, own, huggingface, kornia, cvnets)


def chain_of(model: nn.Module) -> Chain:
    """What `model`, which is frozen, computes; raises `NotNative` if that is not known, or is not a chain."""
    for library in _LIBRARIES:
        chain = library.chain(model)
        if chain is not None:
            return chain
    raise NotNative(f"what a {type(model).__name__} does between its frozen layers is not known")


def calls_of(original: type[nn.Module]) -> Calls:
    """How models of a library's class are called."""
    return huggingface.CALLS.get(original.__name__, ONE_TENSOR) if huggingface.has(original) else ONE_TENSOR
