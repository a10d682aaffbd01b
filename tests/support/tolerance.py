# SPDX-License-Identifier: Apache-2.0
"""What counts as right: an error against float64 at most twice that of PyTorch in the same dtype, or of careful
arithmetic in that dtype."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mvit_kernels.rounding import PLAUSIBLE_BANDS, deciding_error, yardstick


def largest_error(value: Tensor, truth: Tensor) -> float:
    """The largest absolute difference from `truth`; NaN if there is one in `value`, 0 for empty tensors."""
    if truth.numel() == 0:
        return 0.0
    return (value.detach().to("cpu", torch.float64) - truth.detach()).abs().max().item()


def rounding_band(dtype: torch.dtype, truth: Tensor) -> float:
    """One unit of `dtype` at the size of the truth's largest value."""
    return torch.finfo(dtype).eps * truth.detach().abs().max().item() if truth.numel() else 0.0


class Compared(NamedTuple):
    """A result of ours, and what it is judged by.

    `careful` gives a sample of what careful arithmetic makes of it, by a seed: a float64 run under
    `mvit_kernels.rounding.RoundedArithmetic`, with errors of PyTorch's dtype.
    """

    ours: Tensor
    pytorch: Tensor
    truth: Tensor
    careful: Callable[[int], Tensor] | None = None


def assert_close_as_pytorch(
    name: str, ours: Tensor, pytorch: Tensor, truth64: Tensor, careful: Callable[[int], Tensor] | None = None
) -> None:
    """e(ours) ≤ 2 · (e(PyTorch in the same dtype) + band), e being the largest error against float64; or, where
    `careful` is given (see `Compared`), the same with the error of careful arithmetic instead of PyTorch's.

    Example:
        >>> assert_close_as_pytorch("fc1, out", ours, torch.nn.functional.linear(x, w), x.double() @ w.double().t())

    PyTorch's error differs from machine to machine, and the careful one does not: so what is that exact passes
    everywhere. It is computed only where PyTorch's does not decide, or is so large that it may be garbage.

    For a float64 result there is no truth of higher precision, so both yardsticks are float32's errors, scaled by the
    ratio of the units. The factor is then 10: PyTorch sums some float32 rows in float64, and float64 in nothing wider;
    and the truth is as far off as we are.

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
    band = rounding_band(ours.dtype, truth64)
    factor = 10 if ours.dtype == torch.float64 else 2
    error, judge, of = largest_error(ours, truth64), unit * largest_error(pytorch, truth64), "PyTorch's"
    if not (judge <= PLAUSIBLE_BANDS * band and error <= factor * (judge + band)):
        if careful is not None:
            expected = unit * deciding_error(
                careful, truth64, lambda one: error <= factor * (unit * one + band) < torch.inf
            )
            own, judge = judge, yardstick(judge, expected)
            of = of if judge == own else "careful arithmetic's"
        assert judge < torch.inf, f"{name}: PyTorch itself overflows here, so the case says nothing"
    bound = factor * (judge + band)
    if not error <= bound:
        difference = (ours.detach().to("cpu", torch.float64) - truth64.detach()).abs()
        where = tuple(int(i) for i in torch.unravel_index(difference.nan_to_num(nan=torch.inf).argmax(), ours.shape))
        raise AssertionError(
            f"{name}: error {error:.3e} is over {bound:.3e} = {factor} · ({of} {judge:.3e} + band {band:.3e}); "
            f"{ours.dtype}, shape {tuple(ours.shape)}, worst at {where}: {ours[where].item()} "
            f"for {truth64[where].item()}"
        )


DRAWS = 8


def assert_close_over_draws(draw: Callable[[int], dict[str, Compared]], seed: int = 0) -> None:
    """The rule for each name that `draw(seed)` gives: on one draw by PyTorch's error, or if that fails on eight by
    both.

    Both sides of the rule are maxima of rounding errors. Over the one or three values of a small bias either may be off
    by luck: a right operator misses about once in 3,500 checks. Eight draws stacked are one larger sample; of careful
    arithmetic there are `RUNS` such, and a result as exact as that misses in less than a millionth of
    them (verification/test_tolerance.py). Wrong values stay wrong in it. What is regularly less exact is found by
    verification/test_exactness.py.
    """
    for name, (ours, pytorch, truth, _) in (first := draw(seed)).items():
        try:
            assert_close_as_pytorch(name, ours, pytorch, truth)
        except AssertionError:
            if not ours.isfinite().all():
                raise
            break
        if not largest_error(pytorch, truth) <= PLAUSIBLE_BANDS * rounding_band(pytorch.dtype, truth):
            break
    else:
        return
    draws = [first, *(draw(seed + 1000 * more) for more in range(1, DRAWS))]
    for name in first:
        several = [draw[name] for draw in draws]
        stacked = (torch.stack(tensors) for tensors in list(zip(*several, strict=True))[:3])
        careful = None
        if all(one.careful is not None for one in several):
            careful = functools.partial(
                lambda several, run: torch.stack([one.careful(run) for one in several]), several
            )
        assert_close_as_pytorch(f"{name} over {DRAWS} draws", *stacked, careful)
