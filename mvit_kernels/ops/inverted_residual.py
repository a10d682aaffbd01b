# SPDX-License-Identifier: Apache-2.0
"""``inverted_residual``: MobileNetV2's block with folded batch norms; the expanded tensor never reaches memory.
Inference only."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..backends import Call, choose, reference
from ..backends.library import raw, register_fake
from . import _checks as checks

OP = "inverted_residual"


def inverted_residual(
    x: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor,
    project_weight: Tensor,
    project_bias: Tensor,
    *,
    stride: int = 1,
    dilation: int = 1,
    residual: bool = False,
    backend: str | None = None,
) -> Tensor:
    """``project(silu(depthwise3×3(silu(expand(x)))))``, plus ``x`` if `residual`; kernels are for inference only.

    Example:
        >>> y = inverted_residual(x, *expand, *depthwise, *project, stride=2)     # each a (weight, bias)

    Args:
        x: (B, H, W, C) float32, bfloat16, float16 or float64, token-major: a channels-last map seen through
            ``permute(0, 2, 3, 1)``.
        expand_weight, expand_bias: (hidden, C), (hidden,), in x's dtype, like all weights here.
        depthwise_weight, depthwise_bias: (hidden, 1, 3, 3), (hidden,). The expanded map is padded with `dilation` zeros
            on each side.
        project_weight, project_bias: (out, hidden), (out,).
        stride: of the depthwise convolution, 1 or 2.
        dilation: of the depthwise convolution, at least 1.
        residual: add x to the result; this needs stride 1 and out = C.
        backend: the backend for this call, by name; None chooses automatically (`mvit_kernels.backends`). Under
            PyTorch's transforms and for tensor subclasses that choice is PyTorch itself.

    Returns:
        (B, ceil(H / stride), ceil(W / stride), out), in x's dtype, or in autocast's dtype where it is enabled.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, device, shape or value.
        BackendError: `backend` cannot serve the call; kernels are for inference and never serve one that needs a
            gradient.

    Sandler et al. 2018, arXiv:1801.04381, section 3.3, with SiLU as in MobileViT.
    """
    dtype = checks.autocast_dtype(x)
    checks.tensor(OP, "x", x, 4, "(B, H, W, C)")
    weights = {
        "expand_weight": expand_weight,
        "expand_bias": expand_bias,
        "depthwise_weight": depthwise_weight,
        "depthwise_bias": depthwise_bias,
        "project_weight": project_weight,
        "project_bias": project_bias,
    }
    checks.like(OP, x, "x", dtype is not None, **weights)
    channels = x.shape[-1]
    if expand_weight.dim() != 2 or expand_weight.shape[1] != channels:
        raise ValueError(
            f"{OP}: expand_weight has shape {tuple(expand_weight.shape)}; (hidden, {channels}) is wanted, for x of "
            f"{channels} channels"
        )
    hidden = expand_weight.shape[0]
    checks.shape(OP, "expand_bias", expand_bias, (hidden,), "one value for each row of expand_weight")
    checks.shape(
        OP, "depthwise_weight", depthwise_weight, (hidden, 1, 3, 3), "one 3 × 3 filter for each hidden channel"
    )
    checks.shape(OP, "depthwise_bias", depthwise_bias, (hidden,), "one value for each hidden channel")
    if project_weight.dim() != 2 or project_weight.shape[1] != hidden:
        raise ValueError(
            f"{OP}: project_weight has shape {tuple(project_weight.shape)}; (out, {hidden}) is wanted, for {hidden} "
            "hidden channels"
        )
    checks.shape(OP, "project_bias", project_bias, project_weight.shape[:1], "one value for each row of project_weight")
    if x.shape[1] == 0 or x.shape[2] == 0:
        raise ValueError(f"{OP}: x is an empty map of {x.shape[1]} × {x.shape[2]} pixels")
    if not isinstance(stride, int) or stride not in (1, 2):
        raise ValueError(f"{OP}: stride is {stride!r}; 1 or 2 is wanted")
    if not isinstance(dilation, int) or dilation < 1:
        raise ValueError(f"{OP}: dilation is {dilation!r}; a positive int is wanted")
    if residual and (stride != 1 or project_weight.shape[0] != channels):
        raise ValueError(
            f"{OP}: residual wants stride 1 and as many channels out as in; stride is {stride}, {channels} channels "
            f"come in and {project_weight.shape[0]} go out"
        )

    tensors = (x, *weights.values())
    if dtype is not None:
        tensors = checks.cast(dtype, *tensors)
        x = tensors[0]
    call = inverted_residual_call(x, expand_weight, project_weight, tensors, stride, dilation, residual)
    chosen = choose(call, backend)
    if chosen == "reference":
        return reference.inverted_residual(*tensors, stride, dilation, residual)  # type: ignore[call-arg, arg-type] # seven
    return raw(OP, chosen)(*tensors, stride, dilation, residual)


def inverted_residual_call(
    x: Tensor,
    expand_weight: Tensor,
    project_weight: Tensor,
    tensors: Sequence[Tensor],
    stride: int,
    dilation: int,
    residual: bool,
) -> Call:
    """The `Call` that backends judge, for these arguments; `tensors` are all that may need a gradient."""
    return checks.call(
        OP,
        x,
        tensors,
        hidden_features=expand_weight.shape[0],
        out_features=project_weight.shape[0],
        stride=stride,
        dilation=dilation,
        residual=residual,
        dense_rows=x.stride(-1) == 1,
    )


@register_fake(OP)
def _fake(
    x,
    expand_weight,
    expand_bias,
    depthwise_weight,
    depthwise_bias,
    project_weight,
    project_bias,
    stride,
    dilation,
    residual,
):
    b, h, w, _ = x.shape
    return x.new_empty((b, (h - 1) // stride + 1, (w - 1) // stride + 1, project_weight.shape[0]))
