# SPDX-License-Identifier: Apache-2.0
"""What counts as right: as close to float64 as PyTorch itself comes in the same dtype, twice over at most."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class NearMiss(AssertionError):
    """The rule is broken, by a factor of two at most.

    Both sides of the rule are maxima of rounding errors, and a small tensor has few: where PyTorch is lucky, a right
    operator misses about once in 3,500 checks (measured over seeds). `_checks.check` then wants another draw to pass.
    """


def largest_error(value: Tensor, truth: Tensor) -> float:
    """The largest absolute difference from `truth`; NaN if there is one in `value`, 0 for empty tensors."""
    if truth.numel() == 0:
        return 0.0
    return (value.detach().to("cpu", torch.float64) - truth.detach()).abs().max().item()


def rounding_band(dtype: torch.dtype, truth: Tensor) -> float:
    """One unit of `dtype` at the size of the truth's largest value."""
    return torch.finfo(dtype).eps * truth.detach().abs().max().item() if truth.numel() else 0.0


def assert_close_as_pytorch(name: str, ours: Tensor, pytorch: Tensor, truth64: Tensor) -> None:
    """e(ours) ≤ 2 · (e(PyTorch in the same dtype) + band), e being the largest error against float64.

    Example:
        >>> assert_close_as_pytorch("fc1, out", ours, torch.nn.functional.linear(x, w), x.double() @ w.double().t())

    The factor and the band leave room for another order of summation, and for one more rounding; they do not grow with
    whatever an implementation happens to do. A NaN of ours fails.

    Raises:
        AssertionError: ours has another shape or dtype than PyTorch's, or is too far off; the message has the numbers.
        NearMiss: too far off by less than a factor of two.
    """
    assert truth64.dtype == torch.float64, f"{name}: the truth is {truth64.dtype}, not float64"
    assert ours.shape == truth64.shape, f"{name}: shape {tuple(ours.shape)}, not {tuple(truth64.shape)}"
    assert ours.dtype == pytorch.dtype, f"{name}: {ours.dtype}, while PyTorch gives {pytorch.dtype}"
    allowed_for = largest_error(pytorch, truth64)
    assert math.isfinite(allowed_for), f"{name}: PyTorch itself overflows here, so the case says nothing"
    band = rounding_band(pytorch.dtype, truth64)
    error, bound = largest_error(ours, truth64), 2 * (allowed_for + band)
    if not error <= bound:
        difference = (ours.detach().to("cpu", torch.float64) - truth64.detach()).abs()
        where = tuple(int(i) for i in torch.unravel_index(difference.nan_to_num(nan=torch.inf).argmax(), ours.shape))
        raise (NearMiss if error <= 2 * bound else AssertionError)(
            f"{name}: error {error:.3e} is over {bound:.3e} = 2 · (PyTorch's {allowed_for:.3e} + band {band:.3e}); "
            f"{ours.dtype}, shape {tuple(ours.shape)}, worst at {where}: {ours[where].item()} for {truth64[where].item()}"
        )
