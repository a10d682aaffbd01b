# SPDX-License-Identifier: Apache-2.0
"""The operations of a `Lowering`, and what each launches: the Triton launch for views of what it reads and then writes,
or PyTorch's copy. CUDA C++'s calls are made in `mvit_kernels.backends.cuda`.

The kernels are imported when a network is prepared: they load Triton.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from ..backends.library import TransformerLayerWeights
from .program import Place, Stack

if TYPE_CHECKING:
    from ..backends.triton._launch import Launch


class Operation(NamedTuple):
    """What one launch does.

    A launch is prepared by ``make(*views)``, with a view of each place in `reads` and then `writes`. Where `is_call`,
    ``make(*views)`` is the call itself, of PyTorch or of CUDA C++, which writes the last of them.
    """

    name: str
    reads: tuple[Place, ...]
    writes: tuple[Place, ...]
    make: Callable[..., Launch | None]
    is_call: bool = False


class InvertedResidualWeights(NamedTuple):
    """An inverted residual's weights: of three launches, and of one."""

    expand: tuple[Tensor, Tensor]
    depthwise: tuple[Tensor, Tensor]
    project: tuple[Tensor, Tensor]
    packed: Tensor | None  # for CUDA C++; None where it is not there or has no such kernel
    half_filter: bool  # whether they are packed for the kernel that filters in float16


class EndOfStack(NamedTuple):
    """What a convolution behind a stack needs for one launch with its last steps."""

    norm: tuple[Tensor, Tensor]
    eps: float
    product: tuple[Tensor, Tensor] | None  # the MLP's second half, if it is a launch of its own


class StackWeights(NamedTuple):
    """A transformer's weights as the operators take them."""

    stack: Stack
    layers: list[TransformerLayerWeights]
    final_norm: tuple[Tensor, Tensor] | None


def convolution(
    weight: Tensor, bias: Tensor, stride: int, dilation: int, activation: str | None, x: Tensor, out: Tensor
) -> Launch:
    return convolution_residual(weight, bias, stride, dilation, activation, x, None, out)


def convolution_residual(
    weight: Tensor,
    bias: Tensor,
    stride: int,
    dilation: int,
    activation: str | None,
    x: Tensor,
    residual: Tensor | None,
    out: Tensor,
) -> Launch:
    from ..backends.triton import convolution

    options = dict(stride=stride, dilation=dilation, activation=activation)
    return convolution.launch(x, weight, bias, residual, out, **options)


def depthwise_convolution(
    weight: Tensor, bias: Tensor, stride: int, dilation: int, activation: str | None, x: Tensor, out: Tensor
) -> Launch:
    from ..backends.triton import depthwise_convolution

    options = dict(stride=stride, dilation=dilation, activation=activation)
    return depthwise_convolution.launch(x, weight, bias, out, **options)


def mean(x: Tensor, out: Tensor) -> Launch:
    from ..backends.triton import mean

    return mean.launch(x, out)


def resize(x: Tensor, out: Tensor) -> Launch:
    from ..backends.triton import resize

    return resize.launch(x, out)


def layer_norm_linear(
    layer: TransformerLayerWeights, eps: float, x: Tensor, out: Tensor, mean: Tensor, rstd: Tensor
) -> Launch:
    return norm_linear(layer[:2], layer[2:4], eps, None, x, out, mean, rstd)


def norm_linear(
    norm: tuple[Tensor, Tensor],
    linear: tuple[Tensor, Tensor | None],
    eps: float,
    activation: str | None,
    x: Tensor,
    out: Tensor,
    mean: Tensor,
    rstd: Tensor,
) -> Launch:
    """LayerNorm and a linear layer, into a map that may be part of another one."""
    from ..backends.triton import layer_norm_linear

    return layer_norm_linear.launch(x, *norm, *linear, out, mean, rstd, eps, activation or "")


def patch_attention(
    heads: int, patch: tuple[int, int], scale: float, qkv: Tensor, out: Tensor, logsumexp: Tensor
) -> Launch:
    from ..backends.triton import patch_attention

    return patch_attention.launch(qkv, out, logsumexp, heads, patch, scale)


def linear_residual(weight: Tensor, bias: Tensor, x: Tensor, residual: Tensor, out: Tensor) -> Launch:
    from ..backends.triton import linear_residual

    return linear_residual.launch(x, weight, bias, residual, out)


def projection_norm_linear(
    product: tuple[Tensor, Tensor],
    norm: tuple[Tensor, Tensor],
    following: tuple[Tensor, Tensor | None],
    eps: float,
    activation: str | None,
    x: Tensor,
    residual: Tensor,
    *written: Tensor,
) -> Launch:
    """Two linear layers, (weight, bias) each, and the LayerNorm between them. `written`: the rows between, unless
    nobody reads them, and the result."""
    from ..backends.triton import projection_norm_linear

    middle, out = written if len(written) == 2 else (None, *written)
    layers = (*product, residual, *norm, *following)
    return projection_norm_linear.launch(x, *layers, middle, out, eps, activation or "")


def layer_norm_mlp(
    layer: TransformerLayerWeights, eps: float, x: Tensor, out: Tensor, mean: Tensor, rstd: Tensor
) -> Launch:
    from ..backends.triton import layer_norm_mlp

    return layer_norm_mlp.launch(x, *layer[6:], out, mean, rstd, eps)


def layer_norm(
    weights: tuple[Tensor, Tensor], eps: float, x: Tensor, out: Tensor, mean: Tensor, rstd: Tensor
) -> Launch:
    from ..backends.triton import layer_norm

    return layer_norm.launch(x, *weights, out, mean, rstd, eps)


# Calls


def copy(x: Tensor, out: Tensor) -> None:
    out.copy_(x)
