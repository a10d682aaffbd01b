# SPDX-License-Identifier: Apache-2.0
"""A call's time by category, and the copies of feature maps that it makes.

Example:
    >>> profile = time_by_category(lambda: model(images))
    >>> profile.categories["layout copies"]     # milliseconds a call
    3.4
    >>> for copy in layout_copies(lambda: block(x)):
    ...     print(copy)
    LayoutCopy(operator='aten::reshape', shape=(1, 64, 16, 2, 16, 2), count=1)

Times are torch.profiler's self times: the time in an operator without the operators that it calls. They add up, and the
difference to the wall clock is the time between operators.
"""

from __future__ import annotations

import functools
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from .timing import synchronize

LAUNCH_GAPS = "launch gaps"  # wall-clock time outside of all operators: Python, dispatch, an idle device
OTHER = "other"

# Category -> patterns of operator names, without namespace, leading and trailing underscores, and "_backward". An
# operator is in the first category that matches; those that match none (views, allocation, pooling) are "other".
CATEGORIES = {
    "convolution": (
        "*convolution*",
        "*conv2d*",
        "*conv_depthwise*",
        "inverted_residual",
    ),
    "linear": (
        "addmm",
        "mm",
        "linear",
        "linear_pointwise",
        "layer_norm_linear",
        "linear_residual",
        "layer_norm_mlp",
    ),
    # bmm and softmax are attention in separate steps, as in Hugging Face's eager attention.
    "attention": ("*scaled_dot_product*", "patch_attention", "bmm", "baddbmm", "matmul", "softmax*"),
    "fused transformer": ("transformer",),
    "frozen network": ("network",),
    # Includes residual additions, dropout and other elementwise arithmetic on maps.
    "norm and activation": (
        "*batch_norm*",
        "*layer_norm*",
        "silu",
        "sigmoid",
        "relu*",
        "add",
        "mul",
        "div",
        "sub",
        "rsqrt",
        "*dropout*",
        "bernoulli",
    ),
    # A dtype conversion is also a copy, so autocast's casts are counted here.
    "layout copies": ("copy", "clone", "contiguous", "cat", "to_copy", "to_mkldnn", "to_dense"),
    "fused by torch.compile": ("*fused_*", "Torch-Compiled Region*", "*CompiledFxGraph*"),
}


class Operator(NamedTuple):
    """One operator of a profile: self time in milliseconds per call of the function, and how often it ran in it."""

    name: str
    category: str
    ms: float
    count: float


class Profile(NamedTuple):
    """A call's time in milliseconds: wall-clock time under the profiler, and its parts, which add up to it."""

    wall_ms: float
    categories: dict[str, float]  # every one of `CATEGORIES`, "other" and "launch gaps", in this order
    operators: tuple[Operator, ...]  # the slowest first


class LayoutCopy(NamedTuple):
    """A tensor that was copied: the outermost operator that caused the copy, its shape, and how often."""

    operator: str
    shape: tuple[int, ...]
    count: int


@functools.cache
def category(operator: str) -> str:
    """The category of an operator, from its name in the profiler.

    Example:
        >>> category("aten::_softmax"), category("aten::native_batch_norm_backward"), category("aten::view")
        ('attention', 'norm and activation', 'other')
    """
    name = operator.rpartition("::")[2].strip("_").removesuffix("_backward")
    for category, patterns in CATEGORIES.items():
        if any(fnmatchcase(name, pattern) for pattern in patterns):
            return category
    return OTHER


def time_by_category(
    function: Callable[[], object],
    *,
    calls: int = 5,
    warmup: int = 2,
    device: str | torch.device = "cpu",
) -> Profile:
    """Profile `function` and add up its time by category.

    Example:
        >>> print(table({"before": time_by_category(before), "after": time_by_category(after)}))

    On the CPU this is the operators' self time. On CUDA it is the time of the kernels that they launch, and the gaps
    are the time in which the device is idle. The profiler costs some microseconds per operator, more than an operator
    on a tiny map takes: compare profiles only with each other, and measure speed with `mvit_kernels.bench.timing`.

    Args:
        function: the function to profile, without arguments; set the grad mode outside.
        calls: number of calls that the profile is averaged over.
        warmup: warm-up calls without the profiler.
        device: device type on which it runs, "cpu" or "cuda".

    Returns:
        A `Profile` in milliseconds per call.

    Raises:
        ValueError: `calls` or `warmup` is not positive.
    """
    if calls < 1 or warmup < 1:
        raise ValueError(f"time_by_category: calls is {calls} and warmup {warmup}; both must be 1 or more")
    on_gpu = torch.device(device).type == "cuda"
    for _ in range(warmup):
        function()
    synchronize(device)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with profile(activities=activities, acc_events=True) as profiler:
        start = time.perf_counter()
        for _ in range(calls):
            function()
        synchronize(device)
        wall = (time.perf_counter() - start) * 1e3 / calls

    operators = sorted(_operators(profiler.events(), calls, on_gpu), key=lambda row: -row.ms)
    categories = dict.fromkeys((*CATEGORIES, OTHER), 0.0)
    for operator in operators:
        categories[operator.category] += operator.ms
    categories[LAUNCH_GAPS] = max(0.0, wall - sum(categories.values()))
    return Profile(wall, categories, tuple(operators))


def launches(function: Callable[[], object], device: str | torch.device) -> int:
    """How many kernels one call of `function` launches on a GPU, including those of a replayed graph. Memcpy and memset
    operations are not counted."""
    function()
    synchronize(device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as profiler:
        function()
        synchronize(device)
    return sum(
        event.device_type != torch.autograd.DeviceType.CPU
        and not event.name.startswith(("Memcpy", "Memset"))
        and not getattr(event, "is_user_annotation", False)
        for event in profiler.events()
    )


def _operators(events: Iterable[Any], calls: int, on_gpu: bool) -> list[Operator]:
    times: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    kernels = 0.0
    for event in events:
        ms = (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e3 / calls
        if event.device_type != torch.autograd.DeviceType.CPU:  # a kernel; its operator's event has its time as well
            kernels += event.self_device_time_total / 1e3 / calls
        elif _lays_down_a_bias(event):
            times[event.cpu_parent.name] += ms
        else:
            times[event.name] += ms
            counts[event.name] += 1
    unclaimed = kernels - sum(times.values())
    if on_gpu and unclaimed > 1e-6:
        times["kernels launched by no operator"] = unclaimed
    return [Operator(name, category(name), ms, counts[name] / calls) for name, ms in times.items() if ms > 0]


def _lays_down_a_bias(event: Any) -> bool:
    """Whether it is addmm's copy of the bias into the rows of its result: part of a linear layer, not a map's copy."""
    parent = event.cpu_parent
    return event.name == "aten::copy_" and parent is not None and parent.name in ("aten::addmm", "aten::baddbmm")


def table(profiles: dict[str, Profile]) -> str:
    """Profiles of one model in several forms side by side: milliseconds per call, and percent of the call's time."""
    names = [*CATEGORIES, OTHER, LAUNCH_GAPS]
    names = [name for name in names if any(profile.categories[name] for profile in profiles.values())]
    width = max(map(len, names))
    lines = [f"{'ms a call':<{width}}" + "".join(f"  {name:>16}" for name in profiles)]
    for name in names:
        line = f"{name:<{width}}"
        for one in profiles.values():
            ms = one.categories[name]
            share = 100 * ms / one.wall_ms
            line += f"  {ms:9.3f}  {share:3.0f} %"
        lines.append(line)
    lines.append(f"{'total':<{width}}" + "".join(f"  {one.wall_ms:9.3f}       " for one in profiles.values()))
    return "\n".join(line.rstrip() for line in lines)


def layout_copies(function: Callable[[], object]) -> list[LayoutCopy]:
    """Every tensor that PyTorch copies while `function` runs, the largest first.

    Example:
        >>> layout_copies(lambda: x.permute(0, 2, 3, 1).contiguous())
        [LayoutCopy(operator='aten::contiguous', shape=(1, 64, 64, 32), count=1)]

    A copy is an ``aten::copy_`` (in which every contiguous, clone, reshape and dtype conversion ends) or an
    ``aten::cat``, for which the profiler does not record shapes: its shape is (). Scalars are left out, and so is the
    bias with which a matrix product initializes its sums. Data that a kernel moves internally is not visible: oneDNN's
    reorders within a convolution, the packing of a matrix product.
    """
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True, acc_events=True) as profiler:
        function()
    found: Counter[tuple[str, tuple[int, ...]]] = Counter()
    for event in profiler.events():
        shape = tuple(event.input_shapes[0]) if event.input_shapes else ()
        if event.name == "aten::cat" or (event.name == "aten::copy_" and shape and not _lays_down_a_bias(event)):
            found[_outermost(event), shape] += 1
    copies = [LayoutCopy(operator, shape, count) for (operator, shape), count in found.items()]
    return sorted(copies, key=lambda copy: (-math.prod(copy.shape), copy))


def _outermost(event: Any) -> str:
    name = event.name
    while event.cpu_parent is not None:
        event = event.cpu_parent
        if "::" in event.name and not event.name.startswith("autograd::"):  # an operator, not a user-defined range
            name = event.name
    return name
