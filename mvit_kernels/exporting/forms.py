# SPDX-License-Identifier: Apache-2.0
"""A frozen network as ordinary PyTorch modules, in a form that other runtimes run well.

The frozen modules run as native calls, which no file can hold, and composed of their parts they go through views that
suit our kernels. Here each becomes the plain module that computes the same: a convolution with a bias and an
activation, a mean, a block. Blocks come in two forms, which differ in the transformer alone: the plain one below, for
runtimes with fast products of rows (`mvit_kernels.exporting.plain`), and the phone form, in which no tensor has more
than four axes (`mvit_kernels.exporting.phone`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._utils.plain import copy_of
from ..freezing import freeze
from ..freezing.block import FrozenMobileViTBlock
from ..freezing.convolutions import replace
from ..freezing.frozen import Frozen
from ..freezing.modules import FrozenConv2d, FrozenInvertedResidual, FrozenMean, FrozenSequential
from ..freezing.pyramid import FrozenASPP
from ..freezing.whole import as_library_class
from .plan import Plan

_HALF = (torch.float16, torch.bfloat16)
_ACTIVATIONS: dict[str | None, Callable[[], nn.Module]] = {
    "silu": nn.SiLU,
    "relu": nn.ReLU,
    None: nn.Identity,
}


class Convolution(nn.Module):
    """A convolution with a bias, and SiLU, ReLU or nothing: of a `FrozenConv2d`."""

    def __init__(self, frozen: FrozenConv2d) -> None:
        super().__init__()
        out, width, *kernel = frozen.weight.shape
        self.conv = nn.Conv2d(
            width * frozen.groups,
            out,
            kernel,
            frozen.stride,
            frozen.padding,
            frozen.dilation,
            frozen.groups,
            device="meta",
        )
        self.conv.weight = nn.Parameter(frozen.weight.detach().contiguous(), requires_grad=False)
        self.conv.bias = nn.Parameter(frozen.bias.detach(), requires_grad=False)
        self.act = _ACTIVATIONS[frozen.activation]()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x))


class InvertedResidual(nn.Module):
    """Expansion, depthwise convolution and projection, with the input added or not: of a `FrozenInvertedResidual`."""

    def __init__(self, frozen: FrozenInvertedResidual) -> None:
        super().__init__()
        self.expand, self.depthwise, self.project = map(Convolution, (frozen.expand, frozen.depthwise, frozen.project))
        self.residual = frozen.residual

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.residual else y


class Mean(nn.Module):
    """The mean over a map, (B, C, H, W) to (B, C, 1, 1): of a `FrozenMean`."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3), keepdim=True)


class Pyramid(nn.Module):
    """DeepLabv3's pyramid: of a `FrozenASPP`.

    The mean's branch is the same at every position. Where the projection is 1×1, so is what the projection makes of it,
    which is then added: without an ``expand``, with which litert_torch writes a file that LiteRT does not run.
    """

    def __init__(self, frozen: FrozenASPP) -> None:
        super().__init__()
        self.branches = nn.ModuleList(map(Convolution, frozen.branches))
        self.pool, self.project = Convolution(frozen.pool), Convolution(frozen.project)
        self.project_pool: nn.Conv2d | None = None
        conv = self.project.conv
        if conv.kernel_size == (1, 1) and conv.groups == 1 and conv.padding == (0, 0):
            width = frozen.pool.out_channels
            rest = conv.in_channels - width
            self.project_pool = nn.Conv2d(width, conv.out_channels, 1, bias=False, device="meta")
            self.project_pool.weight = nn.Parameter(conv.weight[:, rest:].contiguous(), requires_grad=False)
            conv.weight = nn.Parameter(conv.weight[:, :rest].contiguous(), requires_grad=False)
            conv.in_channels = rest

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.pool(x.mean((2, 3), keepdim=True))
        views = [branch(x) for branch in self.branches]
        if self.project_pool is not None:
            y = self.project.conv(torch.cat(views, dim=1)) + self.project_pool(pooled)
            return self.project.act(y)
        return self.project(torch.cat((*views, pooled.expand(-1, -1, *x.shape[2:])), dim=1))


class Block(nn.Module):
    """A MobileViT block of any library: of a `FrozenMobileViTBlock`. A form implements `transformer`.

    Where the library's own block serves the call (`FrozenMobileViTBlock.takes`), it does here too.

    Args:
        frozen: the block.
        plan: says whether the size of the map is known when the network is traced.
    """

    def __init__(self, frozen: FrozenMobileViTBlock, plan: Plan) -> None:
        super().__init__()
        self.downsampling = None if frozen.downsampling is None else _plain(frozen.downsampling)
        self.before, self.after = _plain(frozen.before), _plain(frozen.after)
        self.fusion = None if frozen.fusion is None else _plain(frozen.fusion)
        self.input_first, self.num_heads, self.patch_size = frozen.input_first, frozen.num_heads, frozen.patch_size
        self.eps = frozen.eps
        self.takes, self.fallback = frozen.takes, None
        self.dynamic, self.resizes = plan.dynamic_size, True
        if frozen.takes is not None:
            self._refuse_what_is_not_known(frozen)
            if not self.dynamic:
                self.fallback = _plain(frozen.fallback)

    def _refuse_what_is_not_known(self, frozen: FrozenMobileViTBlock) -> None:
        """A library's block may compute something else on maps of some sizes, or raise."""
        if not self.dynamic:
            return
        d, (ph, pw) = frozen.layers()[0].proj_weight.shape[0], self.patch_size
        if not frozen.takes(frozen.fallback, torch.empty((1, d, ph * d, pw), device="meta")):
            raise ValueError(
                "export: sizes is 'dynamic', but cvnets' block computes something else on a map with as many patches "
                "as channels, and a file would have to know its size; give the size, as in sizes=256"
            )
        # Kornia's block raises for maps that are not whole patches, and so does a file that does not resize them.
        self.resizes = frozen.takes(frozen.fallback, torch.empty((1, d, ph + 1, pw), device="meta"))

    def forward(self, x: Tensor) -> Tensor:
        if self.fallback is not None and not self.takes(self.fallback, x):
            return self.fallback(x)
        if self.downsampling is not None:
            x = self.downsampling(x)
        y = self.after(self._on_whole_patches(self.before(x)))
        if self.fusion is None:
            return y
        return self.fusion(torch.cat((x, y) if self.input_first else (y, x), dim=1))

    def _on_whole_patches(self, x: Tensor) -> Tensor:
        size, (ph, pw) = (x.shape[2], x.shape[3]), self.patch_size
        # Not -(-size // ph): a trace keeps the division, and ONNX's division of a negative number rounds towards 0.
        whole = ((size[0] + ph - 1) // ph * ph, (size[1] + pw - 1) // pw * pw)
        # With an unknown size there is no branch: a resize to the same size gives the same values.
        if not (self.resizes if self.dynamic else size != whole):
            return self.transformer(x)
        x = F.interpolate(x, size=whole, mode="bilinear", align_corners=False)
        return F.interpolate(self.transformer(x), size=size, mode="bilinear", align_corners=False)

    def transformer(self, x: Tensor) -> Tensor:
        """The transformer layers and the final norm on a (B, d, H, W) map of whole patches."""
        raise NotImplementedError


BlockForm = Callable[[FrozenMobileViTBlock, Plan], Block]


def in_form(model: nn.Module, plan: Plan, block: BlockForm) -> nn.Module:
    """A copy of `model` for inference, of ordinary modules alone, whose MobileViT blocks are `block`'s.

    It is in float32, or in float64 where the model is.

    Args:
        model: accelerated, frozen or plain; what `freeze` leaves as it is stays as it is.
        plan: what the network will be traced for.
        block: makes a block of a frozen one.
    """
    holder = nn.Module()
    holder.model = as_library_class(frozen_copy(model))
    _replace_all(holder, {FrozenMobileViTBlock: lambda frozen: block(frozen, plan)})
    return holder.model.requires_grad_(False)


def frozen_copy(model: nn.Module) -> nn.Module:
    """A frozen copy of `model` on the CPU, in float32 where it was in half precision; of a frozen one a copy."""
    copied = copy_of(model).cpu()._apply(lambda value: value.float() if value.dtype in _HALF else value)
    return copied if any(isinstance(module, Frozen) for module in copied.modules()) else freeze(copied)


def _replace_all(holder: nn.Module, makers: dict[type, Callable[[Any], nn.Module]]) -> None:
    """Replace the frozen modules below `holder`, outermost first: each makes what is inside it itself."""
    for module in list(holder.modules()):
        maker = ({**_MAKERS, **makers}).get(type(module))
        if maker is not None and any(module is part for part in holder.modules()):
            replace(holder, module, maker(module).eval())


def _plain(module: nn.Module) -> nn.Module:
    """A frozen module as an ordinary one, with everything inside it; another with what is inside it."""
    holder = nn.Module()
    holder.inner = module
    _replace_all(holder, {})
    return holder.inner


def _sequence(frozen: FrozenSequential) -> nn.Sequential:
    """A Sequential with the same names; what is in it is replaced by its own makers."""
    sequence = nn.Sequential()
    sequence._modules.update(frozen._modules)
    return sequence


_MAKERS: dict[type, Callable[[Any], nn.Module]] = {
    FrozenConv2d: Convolution,
    FrozenInvertedResidual: InvertedResidual,
    FrozenMean: lambda _: Mean(),
    FrozenSequential: _sequence,
    FrozenASPP: Pyramid,
}
