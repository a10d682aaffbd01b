# SPDX-License-Identifier: Apache-2.0
"""What counts as right: as close to float64 as PyTorch itself comes in the same dtype, twice over at most."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


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

    For a float64 result no truth is at hand that is exact beside it, so the yardstick is PyTorch's error in float32,
    scaled by the ratio of the units. The factor is 10 then: PyTorch sums some float32 rows in float64, and float64 in
    nothing wider.

    The factor and the band leave room for another order of summation, and for one more rounding; they do not grow with
    whatever an implementation happens to do. A NaN of ours fails.

    Raises:
        AssertionError: ours has another shape or dtype than PyTorch's, or is too far off; the message has the numbers.
    """
    assert truth64.dtype == torch.float64, f"{name}: the truth is {truth64.dtype}, not float64"
    assert ours.shape == truth64.shape, f"{name}: shape {tuple(ours.shape)}, not {tuple(truth64.shape)}"
    wanted = torch.float32 if ours.dtype == torch.float64 else ours.dtype
    assert pytorch.dtype == wanted, f"{name}: {ours.dtype}, while PyTorch gives {pytorch.dtype}"
    unit = torch.finfo(ours.dtype).eps / torch.finfo(pytorch.dtype).eps
    allowed_for = unit * largest_error(pytorch, truth64)
    assert math.isfinite(allowed_for), f"{name}: PyTorch itself overflows here, so the case says nothing"
    band = rounding_band(ours.dtype, truth64)
    factor = 10 if ours.dtype == torch.float64 else 2
    error, bound = largest_error(ours, truth64), factor * (allowed_for + band)
    if not error <= bound:
        difference = (ours.detach().to("cpu", torch.float64) - truth64.detach()).abs()
        where = tuple(int(i) for i in torch.unravel_index(difference.nan_to_num(nan=torch.inf).argmax(), ours.shape))
        raise AssertionError(
            f"{name}: error {error:.3e} is over {bound:.3e} = {factor} · (PyTorch's {allowed_for:.3e} + "
            f"band {band:.3e}); {ours.dtype}, shape {tuple(ours.shape)}, worst at {where}: {ours[where].item()} "
            f"for {truth64[where].item()}"
        )


DRAWS = 8


def assert_close_over_draws(draw: Callable[[int], dict[str, tuple[Tensor, Tensor, Tensor]]], seed: int = 0) -> None:
    """The rule for each name that `draw(seed)` gives, as (ours, PyTorch's, truth64): on one draw, or else on eight.

    Both sides of the rule are maxima of rounding errors. Over the one or three values of a small bias either may be off
    by luck: a right operator misses about once in 3,500 checks. Eight draws stacked are one larger sample for the same
    rule; wrong values stay wrong in it, and so does an operator that is regularly less exact than PyTorch.
    """
    for name, (ours, pytorch, truth) in (first := draw(seed)).items():
        try:
            assert_close_as_pytorch(name, ours, pytorch, truth)
        except AssertionError:
            if not ours.isfinite().all():
                raise
            break
    else:
        return
    draws = [first, *(draw(seed + 1000 * more) for more in range(1, DRAWS))]
    for name in first:
        stacked = (torch.stack(tensors) for tensors in zip(*(draw[name] for draw in draws), strict=True))
        assert_close_as_pytorch(f"{name} over {DRAWS} draws", *stacked)
