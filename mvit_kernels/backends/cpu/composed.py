# SPDX-License-Identifier: Apache-2.0
"""Row-wise operators composed of PyTorch's products and our LayerNorm, where these are faster than our fused kernels.

PyTorch's products are MKL's (float32) and oneDNN's (bfloat16). They lose what fusion saves, and win where their
instructions are better: AMX for bfloat16, which our kernels of these sets lack, and MKL's float32 sums of products on
Intel. `FASTER` is measured, a row a case; `benchmarks/products.py` prints rows to paste. What is not in it is ours.

Under ``torch.use_deterministic_algorithms(True)`` everything is ours: the bits of our gradients do not depend on the
number of threads, MKL's and oneDNN's may.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..library import raw

F32, BF16 = torch.float32, torch.bfloat16


class Case(NamedTuple):
    """Calls in which the composed operator is faster: `rows` or more rows, of width `narrowest` to `widest`."""

    rows: int
    narrowest: int
    widest: int

    def has(self, x: Tensor) -> bool:
        return self.narrowest <= x.shape[-1] <= self.widest and x.numel() >= self.rows * x.shape[-1]


# For processors with AMX, of which PyTorch's products of bfloat16 make use; by our instruction set, dtype and operator.
# A set that is not here has not been measured, and runs our kernels: those of AMD and Arm too.
# All on two cores of an Intel Xeon with AMX (family 6 model 207), torch 2.14.1 with MKL 2024.2 and oneDNN 3.12, at the
# shapes of XXS, XS and S at 256 px (512 to 32768 rows), with one thread and with two; behind each row the times of our
# kernel over those of the composed operator.
_FLOAT32 = {
    "linear_residual_backward": Case(512, 64, 240)
}  # 1.0 to 1.5; the others 0.7 to 1.2, or for one of 1 and 2 threads
FASTER: dict[str, dict[torch.dtype, dict[str, Case]]] = {
    "amx": {F32: _FLOAT32},  # which has the float32 kernels of avx512; bfloat16's are ours at every shape
    "avx512": {
        F32: _FLOAT32,
        BF16: {
            "layer_norm_linear": Case(512, 64, 240),  # 1.3 to 3.0
            "layer_norm_linear_backward": Case(512, 64, 240),  # 1.1 to 2.3
            "linear_residual": Case(512, 64, 240),  # 1.2 to 3.0, but 0.9 for 512 rows of 96 on two threads
            "linear_residual_backward": Case(512, 64, 240),  # 1.2 to 2.8
            "layer_norm_mlp": Case(512, 96, 240),  # 1.2 to 2.3, for 512 rows of 96 1.0; 1.0 to 1.2 for 64 and 80
            "layer_norm_mlp_backward": Case(512, 120, 240),  # 1.0 to 2.0; 0.7 to 1.3 below
        },
    },
    "avx512bf16": {  # which has the float32 kernels of avx512
        F32: _FLOAT32,
        BF16: {
            "layer_norm_linear": Case(512, 64, 240),  # 2.0 to 4.2
            "layer_norm_linear_backward": Case(512, 64, 240),  # 1.5 to 3.1
            "linear_residual": Case(512, 64, 240),  # 1.3 to 4.0
            "linear_residual_backward": Case(512, 64, 240),  # 1.5 to 3.9
            "layer_norm_mlp": Case(512, 64, 240),  # 1.3 to 3.0
            "layer_norm_mlp_backward": Case(512, 64, 240),  # 1.0 to 2.7
        },
    },
}


def run(name: str, arguments: tuple[Any, ...], instruction_set: str) -> Any:
    """The raw operator `name`, composed or as one kernel.

    Args:
        name: of the operator or its backward.
        arguments: of its schema; x is the first of a forward, the second of a backward.
        instruction_set: of our kernels, on a processor with AMX; "" on any other.
    """
    x = arguments[name.endswith("_backward")]
    if composes(name, x, instruction_set):
        return COMPOSED[name](*arguments)
    return raw(name, "cpu")(*arguments)


def composes(name: str, x: Tensor, instruction_set: str) -> bool:
    """Whether the composed operator is the faster one for rows like x's."""
    case = FASTER.get(instruction_set, {}).get(x.dtype, {}).get(name)
    return case is not None and case.has(x) and not torch.are_deterministic_algorithms_enabled()


# ---- the operators, as in backends/library.py -----------------------------------------------------------------------


def layer_norm_linear(x, norm_weight, norm_bias, weight, bias, eps, activation):
    normed, mean, rstd = raw("layer_norm", "cpu")(x, norm_weight, norm_bias, eps)
    out = F.linear(normed, weight, bias)
    return (F.silu(out) if activation else out), mean, rstd


def layer_norm_linear_backward(grad_out, x, mean, rstd, norm_weight, norm_bias, weight, bias, activation):
    normed = _normalised(x, mean, rstd, norm_weight, norm_bias)
    grad = _rows(grad_out)
    if activation:
        grad = torch.ops.aten.silu_backward(grad, F.linear(normed, weight, bias))
    grad_normed = torch.mm(grad, weight).view(x.shape)
    grad_x, *grads_of_norm = raw("layer_norm_backward", "cpu")(grad_normed, x, mean, rstd, norm_weight)
    return grad_x, *grads_of_norm, torch.mm(grad.t(), normed), grad.sum(0)


def linear_residual(x, weight, bias, residual):
    return F.linear(x, weight, bias).add_(residual)


def linear_residual_backward(grad_out, x, weight):
    grad = _rows(grad_out)
    return torch.mm(grad, weight).view(x.shape), torch.mm(grad.t(), _rows(x)), grad.sum(0)


def layer_norm_mlp(x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, eps):
    normed, mean, rstd = raw("layer_norm", "cpu")(x, norm_weight, norm_bias, eps)
    hidden = F.silu(F.linear(normed, fc1_weight, fc1_bias), inplace=True)
    return F.linear(hidden, fc2_weight, fc2_bias).add_(x), mean, rstd


def layer_norm_mlp_backward(grad_out, x, mean, rstd, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight):
    normed = _normalised(x, mean, rstd, norm_weight, norm_bias)
    before = F.linear(normed, fc1_weight, fc1_bias)
    grad = _rows(grad_out)
    grad_fc2_weight = torch.mm(grad.t(), F.silu(before))
    grad_before = torch.ops.aten.silu_backward(torch.mm(grad, fc2_weight), before)
    grad_normed = torch.mm(grad_before, fc1_weight).view(x.shape)
    grad_x, *grads_of_norm = raw("layer_norm_backward", "cpu")(grad_normed, x, mean, rstd, norm_weight)
    grads_of_fc1 = torch.mm(grad_before.t(), normed), grad_before.sum(0)
    return grad_x.add_(grad_out), *grads_of_norm, *grads_of_fc1, grad_fc2_weight, grad.sum(0)


COMPOSED: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        layer_norm_linear,
        layer_norm_linear_backward,
        linear_residual,
        linear_residual_backward,
        layer_norm_mlp,
        layer_norm_mlp_backward,
    )
}


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _normalised(x, mean, rstd, norm_weight, norm_bias) -> Tensor:
    """LayerNorm(x) as rows, from the statistics of forward."""
    return _rows(torch.ops.mvit_kernels.layer_norm_from_statistics.cpu(x, mean, rstd, norm_weight, norm_bias))
