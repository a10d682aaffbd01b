# SPDX-License-Identifier: Apache-2.0
"""The inference-only modules that `freeze` puts in place: batch norms folded, SiLU fused, channels-last inside.

Everything they hold is a buffer in evaluation mode; ``train()`` raises, since a folded batch norm cannot be trained.

On the CPU each runs as one native call, everything inside it included (`mvit_kernels.freezing.network`); where that
does not serve, on other devices and dtypes, under tracing, with a gradient or with hooks inside, it is composed of its
parts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import backends
from .._utils.transforms import channels_last, obstacle
from ..backends import reference
from ..ops import inverted_residual
from ..ops._checks import DTYPES
from ..ops.inverted_residual import inverted_residual_call
from .network import Builder, Network, NotNative, Place, hooks_inside, links_of, network_allowed


class Frozen(nn.Module):
    """What the frozen modules share: evaluation mode, for good, and the native call for all that is inside.

    A subclass says what it computes twice: ``composed(x)`` with PyTorch, and ``emit(builder, source, target)`` with the
    steps of a `Builder` (it raises `NotNative` where there are none for it). ``place(builder)`` is where it wishes to
    find its input, None for anywhere; ``in_channels`` how many channels that has.
    """

    generation = 0  # counts the changes that make packed weights stale
    _network: Network | NotNative | None = None

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.training = False

    def train(self, mode: bool = True) -> Frozen:
        if mode:
            raise RuntimeError(
                f"{type(self).__name__} is frozen for inference and cannot be trained; train the model that freeze() "
                "was given (accelerate() speeds that up), then freeze it again"
            )
        return super().train(False)

    def __prepare_scriptable__(self):
        raise RuntimeError(
            f"{type(self).__name__} is frozen, and its native calls are nothing that TorchScript compiles; use "
            "torch.jit.trace, or torch.jit.script the model that freeze() was given"
        )

    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        if network_allowed(x):
            network = self.native()
            if isinstance(network, Network) and network.serves(x):
                return network(x)
        return self.composed(x)

    def _check(self, x: Tensor) -> None:
        """Refuse what PyTorch's convolution refuses too: floats are cast to the weights' dtype, but integers are an
        image that nobody scaled, and of complex numbers a cast drops half. (0.2 µs.)"""
        if not isinstance(x, Tensor):
            raise TypeError(f"{type(self).__name__}: x is {type(x).__name__}; a torch.Tensor is wanted")
        if x.dtype not in DTYPES:
            raise TypeError(
                f"{type(self).__name__}: x is {x.dtype}; float32, bfloat16, float16 or float64 is wanted. Bring it to "
                "the range that the model was trained on first: an image of bytes by x.float() / 255, then its mean "
                "and deviation"
            )

    def native(self) -> Network | NotNative:
        """The native call as things are now, or why there is none."""
        network = self._network
        if network is None or (isinstance(network, Network) and network.is_stale()):
            try:
                network = Network(self)
            except NotNative as reason:
                network = reason
            self._network = network
        return network

    def place(self, builder: Builder) -> Place | None:
        return None

    def _changed(self) -> None:
        self.generation += 1
        self._network = None

    # Packed weights are made anew after a move, a load, a copy, a pickle and a change of what is inside.

    def _apply(self, *args, **kwargs):
        self._changed()
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args, **kwargs):
        self._changed()
        super()._load_from_state_dict(*args, **kwargs)

    def __setattr__(self, name: str, value) -> None:
        if not name.startswith("_") and (isinstance(value, (nn.Module, Tensor)) or name in self._modules):
            self._changed()
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        self._changed()
        super().__delattr__(name)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        self._changed()
        super().add_module(name, module)

    def __getstate__(self):
        return {**self.__dict__, "_network": None}


class FrozenSequential(Frozen, nn.Sequential):
    """Frozen modules one after another, such as a stage of a model, or all of its stages."""

    @property
    def in_channels(self) -> int:
        return self.links()[0].in_channels

    def links(self) -> list[Frozen]:
        """The frozen modules one after another, those of Sequentials inside included."""
        return [link for child in self for link in links_of(child)]

    def composed(self, x: Tensor) -> Tensor:
        return nn.Sequential.forward(self, x)


class FrozenConv2d(Frozen):
    """A convolution with its batch norm folded in and SiLU fused: (B, C, H, W), any layout in, channels-last out.

    Example:
        >>> FrozenConv2d(weight, bias, stride=(2, 2), padding=(1, 1), activation="silu")(images)

    Composed, on the CPU, it is oneDNN's convolution with SiLU (and a residual addition) as its epilogue and with
    weights reordered once for the first input's size: half the time of convolution, batch norm and SiLU in turn.

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
        self._packed: tuple[Tensor, Tensor] | None = None  # the weight, and as oneDNN reorders it

    @property
    def in_channels(self) -> int:
        return self.weight.shape[1] * self.groups

    # Around a bare convolution may be somebody's code that reads what nn.Conv2d has.

    @property
    def out_channels(self) -> int:
        return self.weight.shape[0]

    @property
    def kernel_size(self) -> tuple[int, int]:
        return tuple(self.weight.shape[2:])

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """``act(conv(x))``, or ``conv(x) + residual`` (then there is no activation)."""
        if residual is None:
            return super().forward(x)
        self._check(x)
        return self.composed(x, residual)

    def composed(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        x = x.to(self.weight.dtype)
        if x.dim() == 4:  # nn.Conv2d takes an image without a batch too
            x = channels_last(x)
        if residual is None and reference.is_one_column(
            x, self.weight, self.stride, self.padding, self.dilation, self.groups
        ):
            y = self.composed(F.pad(x, (0, self.stride[1])))[..., :1]
            return channels_last(y) if x.dim() == 4 else y
        if _onednn_serves(x, self.weight):
            return self._onednn(x, residual)
        y = F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        if residual is not None:
            return y + residual
        return F.silu(y) if self.activation else y

    def _onednn(self, x: Tensor, residual: Tensor | None) -> Tensor:
        geometry = (self.padding, self.stride, self.dilation, self.groups)
        weight, packed = self._packed or (None, None)
        if weight is not self.weight:  # torch.func.functional_call lends another
            packed = torch.ops.mkldnn._reorder_convolution_weight(self.weight, *geometry, list(x.shape))
            self._packed = (self.weight, packed)
        if residual is None:
            activation = "swish" if self.activation else "none"
            return torch.ops.mkldnn._convolution_pointwise(x, packed, self.bias, *geometry, activation, [], "")
        residual = residual.contiguous(memory_format=torch.channels_last)
        return torch.ops.mkldnn._convolution_pointwise(
            x, residual, packed, self.bias, *geometry, "add", 1.0, None, [], None
        )

    def place(self, builder: Builder) -> Place | None:
        """A 3×3 convolution reads the border as it reads the rest."""
        if self.weight.shape[2] == 1:
            return None
        return builder.value(self.in_channels, self.dilation[0])

    def emit(self, builder: Builder, source: Place, target: Place | None) -> Place:
        kernel = self.weight.shape[2]
        same = (self.stride, self.dilation) == (self.stride[:1] * 2, self.dilation[:1] * 2)
        padded = self.padding == (self.dilation[0] * (kernel // 2),) * 2
        if self.groups != 1 or not same or not padded or kernel not in (1, 3) or self.stride[0] > 2:
            raise NotNative(f"it has a convolution with {self.extra_repr()}")
        if self.weight.shape[3] != kernel or (kernel == 1 and self.stride[0] != 1):
            raise NotNative(f"it has a convolution with {self.extra_repr()}")
        return builder.convolution(self, source, target)

    # The weights that oneDNN packed are its own tensors.

    def _changed(self) -> None:
        self._packed = None
        super()._changed()

    def __getstate__(self):
        return {**super().__getstate__(), "_packed": None}

    # A state dict is dense, as safetensors wants it; here a dense 3×3 convolution's weight is channels-last.

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = destination[f"{prefix}weight"].contiguous()

    def _load_from_state_dict(self, *args, **kwargs):
        super()._load_from_state_dict(*args, **kwargs)
        self._buffers["weight"] = self.weight.contiguous(memory_format=torch.channels_last)  # after assign=True

    def extra_repr(self) -> str:
        out, width, kh, kw = self.weight.shape
        return (
            f"{width * self.groups}, {out}, kernel_size=({kh}, {kw}), stride={self.stride}, padding={self.padding}, "
            f"dilation={self.dilation}, groups={self.groups}, activation={self.activation}"
        )


def _onednn_serves(x: Tensor, weight: Tensor) -> bool:
    """oneDNN's fused convolutions: CPU, float32 or (where the processor has it) bfloat16, outside of any tracing and of
    modes that listen to operators, to count their FLOPs for one."""
    if x.device.type != "cpu" or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if x.requires_grad or weight.requires_grad or obstacle((x, weight)) or torch._C._len_torch_dispatch_stack():
        return False
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return False
    if x.dim() != 4 or x.numel() == 0:
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

    @property
    def in_channels(self) -> int:
        return self.expand.in_channels

    def emit(self, builder: Builder, source: Place, target: Place | None) -> Place:
        if self.depthwise.stride[0] > 2:
            raise NotNative(f"it has a depthwise convolution with {self.depthwise.extra_repr()}")
        return builder.inverted_residual(self, source, target)

    def composed(self, x: Tensor) -> Tensor:
        expand, depthwise, project = self.expand, self.depthwise, self.project
        x = channels_last(x.to(expand.weight.dtype))
        rows = x.permute(0, 2, 3, 1)
        expand_weight, project_weight = expand.weight.flatten(1), project.weight.flatten(1)
        stride, dilation = depthwise.stride[0], depthwise.dilation[0]
        call = inverted_residual_call(rows, expand_weight, project_weight, (x,), stride, dilation, self.residual)
        if not hooks_inside(self) and backends.serves("inverted_residual", call):
            weights = (expand_weight, expand.bias, depthwise.weight, depthwise.bias, project_weight, project.bias)
            rows = inverted_residual(rows, *weights, stride=stride, dilation=dilation, residual=self.residual)
            return rows.permute(0, 3, 1, 2)
        return project(depthwise(expand(x)), x if self.residual else None)
