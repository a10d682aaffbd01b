# SPDX-License-Identifier: Apache-2.0
"""A written file, run by its runtime, compared with the model that it was made from.

Both are compared with the model in float64, as everywhere in this package (`mvit_kernels.verification`). A runtime may
be `Target.slack` times as far from it as PyTorch is in the same dtype, and a rounding unit: others sum in another order
and approximate exponentials, which is their choice, not an error of the file. ONNX Runtime, OpenVINO and
``torch.export`` were measured at 0.3 to 3.8 times. A file that computes something else is off by thousands of times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .._utils.plain import cast_floats, copy_of
from ..adapters import restore
from ..verification import Double, error_row
from ..zoo.images import preprocess, sample_photos
from .plan import Plan, outputs_by_name


class Difference(NamedTuple):
    """How far one output of a file is from the model in float64, over all images of one kind."""

    inputs: str  # such as "random 256x256" or "photos 256x256"
    output: str
    error: float  # largest absolute difference
    pytorch_error: float  # the same of PyTorch in the file's dtype
    scale: float  # largest value of the output in float64
    allowed: float

    @property
    def relative(self) -> float:
        """`error` as a share of the output's largest value."""
        return self.error / self.scale if self.scale else self.error

    @property
    def ok(self) -> bool:
        """Whether the error is allowed; that of a NaN is not."""
        return self.error <= self.allowed


class Agreement(NamedTuple):
    """On how many images a classifier's file and the model in float64 name the same class."""

    same: int
    images: int


def compare(
    run: Callable[[Tensor], dict[str, Tensor]], model: nn.Module, plan: Plan, slack: float
) -> tuple[tuple[Difference, ...], Agreement | None]:
    """Run a file and its model on random images and on photographs; see the module.

    Args:
        run: the file.
        model: that it was made from.
        plan: that it was made for. With a dynamic batch or size, others than the example's are tried too.
        slack: as `Target.slack`.

    Returns:
        A `Difference` for each output and kind of images, and for a classifier an `Agreement`.
    """
    model = restore(copy_of(model)).eval().cpu()
    exact = cast_floats(copy_of(model), torch.float64)
    own = cast_floats(model, plan.dtype)
    differences, same, images = [], 0, 0
    for name, batches in _inputs(own, plan):
        rows: dict[str, list[Difference]] = {}
        for batch in batches:
            with torch.no_grad():
                with Double():
                    truth = outputs_by_name(exact(batch.double()))
                pytorch = outputs_by_name(own(batch.to(plan.dtype)))
            ours = run(batch)
            for output, value in truth.items():
                row = error_row(f"{name}, {output}", ours[output].double(), [pytorch[output].double()], value)
                unit = torch.finfo(plan.dtype).eps
                allowed = slack * (row.pytorch_error + unit * row.scale)
                found = Difference(name, output, row.error, row.pytorch_error, row.scale, allowed)
                rows.setdefault(output, []).append(found)
            if _are_logits(truth):
                (output, value), *_ = truth.items()
                same += int((ours[output].argmax(1) == value.argmax(1)).sum())
                images += len(batch)
        differences += [_worst(found) for found in rows.values()]
    return tuple(differences), Agreement(same, images) if images else None


def _are_logits(outputs: dict[str, Tensor]) -> bool:
    return len(outputs) == 1 and all(value.dim() == 2 and value.shape[1] > 1 for value in outputs.values())


def _worst(found: list[Difference]) -> Difference:
    """The one that is the least allowed, or not a number."""
    return max(found, key=lambda row: float("inf") if row.error != row.error else row.error / (row.allowed or 1e-300))


def _inputs(model: nn.Module, plan: Plan) -> Iterator[tuple[str, list[Tensor]]]:
    """(name, batches of images): of every size of the plan, and where it is dynamic of another batch and size."""
    for size in plan.sizes:
        yield f"random {_text(size)}", [plan.example(size, seed=1)]
        photos = _photos(plan, size)
        if photos:
            yield f"photos {_text(size)}", photos
    other = plan
    if plan.dynamic_batch:
        other = other._replace(batch=plan.batch + 2)
    if plan.dynamic_size:
        height, width = plan.sizes[0]
        other = other._replace(sizes=((height + 22, width + 38),))  # maps that are no whole number of patches
        try:
            with torch.no_grad():
                model(other.example().to(plan.dtype))
        except RuntimeError:  # Kornia's take whole patches alone
            other = other._replace(sizes=((height + 64, width + 128),))
    if other != plan:
        yield f"{other.batch} random {_text(other.sizes[0])}", [other.example(seed=2)]


def _photos(plan: Plan, size: tuple[int, int]) -> list[Tensor]:
    """The photographs that installed packages ship, in batches of the plan's; the last one is filled with copies."""
    if plan.channels != 3:
        return []
    photos = [preprocess(image, size) for _, image in sample_photos()]
    batches = [photos[start : start + plan.batch] for start in range(0, len(photos), plan.batch)]
    return [torch.stack((batch * plan.batch)[: plan.batch]) for batch in batches]


def _text(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
