# SPDX-License-Identifier: Apache-2.0
"""The inference-only modules that `freeze` puts in place: batch norms folded, SiLU fused, channels-last inside.

Everything they hold is a buffer in evaluation mode; ``train()`` raises, since a folded batch norm cannot be trained.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import backends
from ..ops import TransformerLayerWeights, inverted_residual
from ..ops.inverted_residual import inverted_residual_call
from .functional import transformer_on_map


class Frozen(nn.Module):
    """What the frozen modules share: evaluation mode, for good."""

    def __init__(self) -> None:
        super().__init__()
        self.training = False

    def train(self, mode: bool = True) -> Frozen:
        if mode:
            raise RuntimeError(
                f"{type(self).__name__} is frozen for inference and cannot be trained; train the model that freeze() "
                "was given (accelerate() speeds that up), then freeze it again"
            )
        return super().train(False)


class FrozenConv2d(Frozen):
    """A convolution with its batch norm folded in and SiLU fused: (B, C, H, W), any layout in, channels-last out.

    Example:
        >>> FrozenConv2d(weight, bias, stride=(2, 2), padding=(1, 1), activation="silu")(images)

    On the CPU it is oneDNN's convolution with SiLU (and a residual addition) as its epilogue and with weights reordered
    once for the first input's size: half the time of convolution, batch norm and SiLU one after another.

    Args:
        weight: (out, in / groups, kh, kw).
        bias: (out,).
        stride, padding, dilation: pairs of ints.
        groups: as in ``nn.Conv2d``.
        activation: "silu" or None.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor,
        *,
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] = (0, 0),
        dilation: tuple[int, int] = (1, 1),
        groups: int = 1,
        activation: str | None = None,
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight.contiguous(memory_format=torch.channels_last))
        self.register_buffer("bias", bias)
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups
        self.activation = activation
        self._packed: Tensor | None = None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """``act(conv(x))``, or ``conv(x) + residual`` (then there is no activation)."""
        x = x.to(self.weight.dtype).contiguous(memory_format=torch.channels_last)
        if _onednn_serves(x):
            return self._onednn(x, residual)
        y = F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        if residual is not None:
            return y + residual
        return F.silu(y) if self.activation else y

    def _onednn(self, x: Tensor, residual: Tensor | None) -> Tensor:
        geometry = (self.padding, self.stride, self.dilation, self.groups)
        packed = self._packed
        if packed is None:
            packed = torch.ops.mkldnn._reorder_convolution_weight(self.weight, *geometry, list(x.shape))
            self._packed = packed
        if residual is None:
            activation = "swish" if self.activation else "none"
            return torch.ops.mkldnn._convolution_pointwise(x, packed, self.bias, *geometry, activation, [], "")
        residual = residual.contiguous(memory_format=torch.channels_last)
        return torch.ops.mkldnn._convolution_pointwise(
            x, residual, packed, self.bias, *geometry, "add", 1.0, None, [], None
        )

    # The packed weights are oneDNN's own tensors: made anew after a move, a load, a copy or a pickle.

    def _apply(self, *args, **kwargs):
        self._packed = None
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args, **kwargs):
        self._packed = None
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self):
        return {**self.__dict__, "_packed": None}

    def extra_repr(self) -> str:
        out, width, kh, kw = self.weight.shape
        return (
            f"{width * self.groups}, {out}, kernel_size=({kh}, {kw}), stride={self.stride}, padding={self.padding}, "
            f"dilation={self.dilation}, groups={self.groups}, activation={self.activation}"
        )


def _onednn_serves(x: Tensor) -> bool:
    """oneDNN's fused convolutions: CPU, float32 or (where the processor has it) bfloat16, outside of any tracing."""
    if x.device.type != "cpu" or torch.compiler.is_compiling() or torch.jit.is_tracing() or x.requires_grad:
        return False
    if type(x) is not Tensor or not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return False
    if x.numel() == 0:
        return False
    return x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


class FrozenInvertedResidual(Frozen):
    """MobileNetV2's block of three frozen convolutions, as one operator where a backend serves it.

    Args:
        expand, depthwise, project: the three convolutions, SiLU on the first two.
        residual: add the input.
    """

    def __init__(self, expand: FrozenConv2d, depthwise: FrozenConv2d, project: FrozenConv2d, residual: bool) -> None:
        super().__init__()
        self.expand, self.depthwise, self.project, self.residual = expand, depthwise, project, residual

    def forward(self, x: Tensor) -> Tensor:
        expand, depthwise, project = self.expand, self.depthwise, self.project
        x = x.to(expand.weight.dtype).contiguous(memory_format=torch.channels_last)
        rows = x.permute(0, 2, 3, 1)
        expand_weight, project_weight = expand.weight.flatten(1), project.weight.flatten(1)
        stride, dilation = depthwise.stride[0], depthwise.dilation[0]
        call = inverted_residual_call(rows, expand_weight, project_weight, (x,), stride, dilation, self.residual)
        if backends.serves("inverted_residual", call):
            weights = (expand_weight, expand.bias, depthwise.weight, depthwise.bias, project_weight, project.bias)
            rows = inverted_residual(rows, *weights, stride=stride, dilation=dilation, residual=self.residual)
            return rows.permute(0, 3, 1, 2)
        return project(depthwise(expand(x)), x if self.residual else None)


class FrozenMobileViTBlock(Frozen):
    """A MobileViT block of any library for inference: convolutions frozen, the transformer's weights joined and cast
    once.

    Args:
        downsampling, before, after, fusion, input_first: as in ``adapters._block.BlockParts``.
        layers: `TransformerLayerWeights` of each layer.
        final_norm: (weight, bias) of the last LayerNorm, or None.
        num_heads, patch_size, eps, backend: as in `mvit_kernels.transformer`.
        fallback, takes: where ``takes(fallback, x)`` is false, the library's own block `fallback` serves the call (maps
            on which Kornia raises and cvnets normalises otherwise).
    """

    def __init__(
        self,
        *,
        downsampling: nn.Module | None,
        before: Sequence[nn.Module],
        layers: Sequence[TransformerLayerWeights],
        final_norm: tuple[Tensor, Tensor] | None,
        after: Sequence[nn.Module],
        fusion: nn.Module | None,
        input_first: bool,
        num_heads: int,
        patch_size: tuple[int, int],
        eps: float,
        fallback: nn.Module | None = None,
        takes: Callable[[nn.Module, Tensor], bool] | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.downsampling = downsampling
        self.before, self.after, self.fusion = nn.Sequential(*before), nn.Sequential(*after), fusion
        self.input_first, self.num_heads, self.patch_size, self.eps = input_first, num_heads, patch_size, eps
        self.fallback, self.takes, self.backend, self.num_layers = fallback, takes, backend, len(layers)
        for index, layer in enumerate(layers):
            for name, value in layer._asdict().items():
                self.register_buffer(f"layer{index}_{name}", value)
        for name, value in zip(("weight", "bias"), final_norm or (None, None), strict=True):
            self.register_buffer(f"final_norm_{name}", value)

    def forward(self, x: Tensor) -> Tensor:
        if self.takes is not None and not self.takes(self.fallback, x):
            return self.fallback(x)
        if self.downsampling is not None:
            x = self.downsampling(x)
        y = self.before(x)
        final_norm = None if self.final_norm_weight is None else (self.final_norm_weight, self.final_norm_bias)
        y = transformer_on_map(
            y,
            self.layers(),
            final_norm,
            num_heads=self.num_heads,
            patch_size=self.patch_size,
            eps=self.eps,
            backend=self.backend,
        )
        y = self.after(y)
        if self.fusion is None:
            return y
        x = x.to(y.dtype)
        return self.fusion(torch.cat((x, y) if self.input_first else (y, x), dim=1))

    def layers(self) -> list[TransformerLayerWeights]:
        """The weights, layer by layer."""
        return [
            TransformerLayerWeights(
                *(self._buffers[f"layer{index}_{name}"] for name in TransformerLayerWeights._fields)
            )
            for index in range(self.num_layers)
        ]
