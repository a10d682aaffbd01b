# SPDX-License-Identifier: Apache-2.0
"""The error that careful arithmetic in a dtype makes, on any machine: a float64 run with random rounding errors.

Example:
    >>> with RoundedArithmetic(torch.float32, seed=0):
    ...     sample = model(images.double())  # a model in float64
    >>> careful_error([sample], truth)       # the largest error that careful float32 code would make

PyTorch's own error depends on the machine: MKL sums products three to four times as exactly on Intel as on AMD. This
yardstick does not. It is Monte Carlo arithmetic (Parker 1997) with the errors of probabilistic analysis (Higham & Mary
2019, doi:10.1137/18M1226312): every operator of PyTorch is decomposed into its elementary operations, and each result
gets an independent random error of the size of a rounding. So errors propagate through a whole network, forward and
backward, as real ones do, and no model needs an error formula of its own.

With u = 0.425 · eps / 2, the root mean square of a rounding error relative to its value, the variances are

- u² · y² for an elementary operation with the result y;
- u² · (2 · S² + Q · log₂ K) for a pairwise sum S of K values whose squares sum to Q;
- u² · (S² · (L² / K + K / L) / 3 + Q · (L + K / L) / 2) for a sum S of K products whose squares sum to Q, summed in
  blocks of L = 64 and then over the blocks. (Partial sums drift to S and walk at random: in one chain their squares sum
  to S² · K / 3 and to Q · K / 2.)
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from .backends import use_backend

aten = torch.ops.aten

# Of an error uniform within half a unit in the last place, for mantissas whose logarithm is uniform.
ROOT_MEAN_SQUARE = math.sqrt(1 / 3 * 3 / (8 * math.log(2)))
BLOCK = 64
RUNS = 8  # samples for `careful_error`; over eight draws of one value, that makes 64 errors

# PyTorch's error is no yardstick where it is garbage. Up to this many bands it is trusted; above, it may be at most so
# many times the careful one. That ratio is 4 where MKL sums a few hundred products in one chain; 45 and 1400 in
# LayerNorm's gradients (bfloat16 at a mean of 1000, float16 rows of two columns), whose statistics PyTorch rounds to 16
# bits.
PLAUSIBLE_BANDS, PLAUSIBLE_RATIO = 32, 2000

# Pointwise and exact.
EXACT = {aten.abs, aten.clamp, aten.clamp_min, aten.clone, aten.maximum, aten.minimum, aten.neg, aten.relu, aten.where}
# Not tagged as pointwise, but rounded as if they were: a few products each.
ROUNDED = {aten._adaptive_avg_pool2d, aten.avg_pool2d}
# Decomposed into their elementary operations.
COMPOSED = {
    aten.addmm,
    aten.baddbmm,
    aten.native_batch_norm,
    aten.native_batch_norm_backward,
    aten.native_layer_norm,
    aten.native_layer_norm_backward,
    aten.silu_backward,
    aten._softmax,
    aten._softmax_backward_data,
    aten.var_mean,
}
# Their first result is in the dtype; the statistics beside it are in float32.
WITH_STATISTICS = {aten.native_batch_norm, aten.native_layer_norm}


class RoundedArithmetic:
    """A context in which PyTorch's float64 results, backward passes included, carry random rounding errors.

    Example:
        >>> with RoundedArithmetic(torch.bfloat16, seed=0):
        ...     sample = model(images.double())

    The result of an operator is off by errors of `dtype`, the steps inside it by float32's. Our operators run as their
    references. The context can be entered again, and then continues with new errors.

    Args:
        dtype: float32, bfloat16 or float16. (Float64's errors are float32's, 2⁻²⁹ times as large.)
        seed: of the random errors.

    Raises:
        ValueError: `dtype` is float64.
    """

    def __init__(self, dtype: torch.dtype, seed: int = 0) -> None:
        self._mode = _Errors(dtype, seed)
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> None:
        # The reference operators and the plain attention are made of operators that can be decomposed.
        for context in (use_backend("reference"), sdpa_kernel(SDPBackend.MATH), self._mode):
            self._stack.enter_context(context)

    def __exit__(self, *exception: Any) -> None:
        self._stack.__exit__(*exception)


def careful_error(samples: Sequence[Tensor], truth: Tensor) -> float:
    """The largest error to expect of careful arithmetic, in the units of `truth`.

    It is the largest error of the samples, or four times their root mean square where that is more, as with few values.

    Args:
        samples: `RUNS` results under `RoundedArithmetic`, each with a seed of its own, of the truth's shape.
        truth: the float64 result.

    Returns:
        The error; 0 where `truth` is empty.
    """
    if truth.numel() == 0:
        return 0.0
    errors = torch.stack([sample.detach() - truth.detach() for sample in samples])
    return max(errors.abs().max().item(), 4 * errors.square().mean().sqrt().item())


def deciding_error(careful: Callable[[int], Tensor], truth: Tensor, allows: Callable[[float], bool]) -> float:
    """`careful_error` of as many samples as decide: the largest error of the first one that allows what is judged, or,
    if none does, that of all `RUNS`.

    The verdict is that of all of them: `careful_error` is no less than the largest error of any. Each sample is a whole
    computation, and the first one decides most cases.

    Args:
        careful: from a seed to a result under `RoundedArithmetic`, of the truth's shape.
        truth: the float64 result.
        allows: whether a careful error allows what is judged; it then allows it by every larger one too.

    Returns:
        The error; 0 where `truth` is empty.
    """
    samples: list[Tensor] = []
    for seed in range(RUNS):
        samples.append(careful(seed))
        largest = (samples[-1].detach() - truth.detach()).abs().max().item() if truth.numel() else 0.0
        if allows(largest):
            return largest
    return careful_error(samples, truth)


def yardstick(pytorch: float, careful: float) -> float:
    """The error to judge by: PyTorch's own, or the careful one where that is larger or PyTorch's is garbage.

    Args:
        pytorch, careful: largest absolute errors against float64.
    """
    return pytorch if careful <= pytorch <= PLAUSIBLE_RATIO * careful else careful


class _Errors(TorchDispatchMode):
    def __init__(self, dtype: torch.dtype, seed: int) -> None:
        super().__init__()
        if dtype == torch.float64:
            raise ValueError(
                "RoundedArithmetic: dtype is float64, whose errors float64 cannot resolve; pass torch.float32"
            )
        self.seed = seed
        self.generators: dict[torch.device, torch.Generator] = {}
        self.unit = ROOT_MEAN_SQUARE * torch.finfo(dtype).eps / 2
        self.inner_unit = ROOT_MEAN_SQUARE * torch.finfo(torch.float32).eps / 2
        self.depth = 0  # how deep inside decomposed operators

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = func._overloadpacket
        if packet in COMPOSED:
            self.depth += 1
            try:
                with self:
                    results = torch._decomp.decomposition_table[func](*args, **kwargs)
            finally:
                self.depth -= 1
        elif packet in FOLLOWED:
            results = FOLLOWED[packet](self, func, *args, **kwargs)
        else:
            results = func(*args, **kwargs)
            if packet in EXACT or not (torch.Tag.pointwise in func.tags or packet in ROUNDED):
                return results
        unit = self.inner_unit if self.depth else self.unit
        rounded = results if isinstance(results, tuple | list) else (results,)
        for value in rounded[:1] if packet in WITH_STATISTICS else rounded:
            if isinstance(value, Tensor) and value.is_floating_point():
                value.mul_(1 + unit * self._random(value))
        return results

    def _random(self, like: Tensor) -> Tensor:
        generator = self.generators.get(like.device)
        if generator is None:
            generator = self.generators[like.device] = torch.Generator(like.device).manual_seed(self.seed)
        # in float32: its normal numbers cost a fifth of float64's
        return torch.randn(like.shape, dtype=torch.float32, device=like.device, generator=generator).to(like.dtype)

    def _off(self, total: Tensor, variance: Tensor) -> Tensor:
        return total + self.inner_unit * variance.sqrt() * self._random(total)

    def _sum(self, func: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        total = func(x, *args, **kwargs)
        if not x.is_floating_point():
            return total
        count = x.numel() / max(total.numel(), 1)
        squares = func(x * x, *args, **kwargs)
        if func._overloadpacket is aten.mean:
            squares = squares / count
        return self._off(total, 2 * total * total + squares * math.log2(max(count, 1)))

    def _products(self, total: Tensor, squares: Tensor, count: int) -> Tensor:
        block = min(count, BLOCK)
        blocks = count / max(block, 1)
        drift, walk = (block * block / max(count, 1) + blocks) / 3, (block + blocks) / 2
        return self._off(total, drift * total * total + walk * squares)

    def _mm(self, func: Any, a: Tensor, b: Tensor) -> Tensor:
        return self._products(func(a, b), func(a * a, b * b), a.shape[-1])

    def _convolution(self, func: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
        squares = func(x * x, weight * weight, None, *geometry)
        y = self._products(func(x, weight, None, *geometry), squares, weight[0].numel())
        return y if bias is None else y + bias.reshape(-1, *[1] * (x.dim() - 2))

    def _convolution_backward(
        self, func: Any, grad: Tensor, x: Tensor, weight: Tensor, *rest: Any
    ) -> tuple[Tensor | None, ...]:
        totals = func(grad, x, weight, *rest)
        squares = func(grad * grad, x * x, weight * weight, *rest)
        positions = grad.numel() // max(grad.shape[1], 1)
        counts = (weight.shape[0] * weight[0, 0].numel() // rest[-2], positions, positions)
        results = zip(totals, squares, counts, strict=True)
        return tuple(None if result[0] is None else self._products(*result) for result in results)

    def _resize(self, func: Any, x: Tensor, size: list[int] | None, align_corners: bool, *scales: Any) -> Tensor:
        if size is None:  # given as scale factors, in one list
            size = [int(old * factor) for old, factor in zip(x.shape[2:], scales[0], strict=True)]
        return aten.upsample_bilinear2d(x, size, align_corners, *self._drifting(size, x.shape[2:]))

    def _resize_backward(
        self,
        func: Any,
        grad: Tensor,
        size: list[int],
        input_size: list[int],
        align_corners: bool,
        *scales: float | None,
    ) -> Tensor:
        return func(grad, size, input_size, align_corners, *self._drifting(size, input_size[2:]))

    def _drifting(self, size: Sequence[int], of: Sequence[int]) -> list[float]:
        """A resize's scales with random errors, for the rounding of the scales and of the coordinates computed from
        them. Both grow with the coordinate: at 20 pixels they are 20 times an ordinary error."""
        errors = (2 * self.inner_unit * self._random(torch.empty(2, dtype=torch.float64, device="cpu"))).tolist()
        return [new / old * (1 + error) for new, old, error in zip(size, of, errors, strict=True)]


FOLLOWED: dict[Any, Callable[..., Any]] = {
    aten.sum: _Errors._sum,
    aten.mean: _Errors._sum,
    aten.mm: _Errors._mm,
    aten.bmm: _Errors._mm,
    aten.mv: _Errors._mm,
    aten.dot: _Errors._mm,
    aten.convolution: _Errors._convolution,
    aten.convolution_backward: _Errors._convolution_backward,
    aten.upsample_bilinear2d: _Errors._resize,
    aten.upsample_bilinear2d_backward: _Errors._resize_backward,
}
