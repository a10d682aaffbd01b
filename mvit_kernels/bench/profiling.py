# SPDX-License-Identifier: Apache-2.0
"""Where a call's time goes, by category, and which copies of feature maps it makes.

Example:
    >>> profile = time_by_category(lambda: model(images))
    >>> profile.categories["layout copies"]     # milliseconds a call
    3.4
    >>> for copy in layout_copies(lambda: block(x)):
    ...     print(copy)
    LayoutCopy(operator='aten::reshape', shape=(1, 64, 16, 2, 16, 2), count=1)

Times are torch.profiler's self times: what an operator spends in itself, without the operators that it calls. So they
add up, and what is missing up to the wall clock is the time between operators.
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

LAUNCH_GAPS = "launch gaps"  # the wall clock's time outside of all operators: Python, dispatch, an idle device
OTHER = "other"

# Category -> patterns of operator names: without namespace, leading and trailing underscores, and "_backward". The
# first category with a match has the operator; whatever matches none (views, allocation, pooling) is "other".
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
    # bmm and softmax are an attention that is written out, as in Hugging Face's eager one
    "attention": ("*scaled_dot_product*", "patch_attention", "bmm", "baddbmm", "matmul", "softmax*"),
    "fused transformer": ("transformer",),
    "frozen network": ("network",),
    # With the residual additions, dropout and other arithmetic that reads a map and writes one.
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
    # A conversion of the dtype is a copy too, and under autocast it is counted here.
    "layout copies": ("copy", "clone", "contiguous", "cat", "to_copy", "to_mkldnn", "to_dense"),
    "fused by torch.compile": ("*fused_*", "Torch-Compiled Region*", "*CompiledFxGraph*"),
}


class Operator(NamedTuple):
    """One operator of a profile: self time in milliseconds a call, and how often it ran in a call."""

    name: str
    category: str
    ms: float
    count: float


class Profile(NamedTuple):
    """A call's time in milliseconds: the wall clock's under the profiler, and its parts, which sum up to it."""

    wall_ms: float
    categories: dict[str, float]  # every one of `CATEGORIES`, "other" and "launch gaps", in this order
    operators: tuple[Operator, ...]  # the slowest first


class LayoutCopy(NamedTuple):
    """A tensor that was copied: the outermost operator that asked for it, its shape, and how often."""

    operator: str
    shape: tuple[int, ...]
    count: int


@functools.cache
def category(operator: str) -> str:
    """The category of an operator by the profiler's name for it.

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

    On the CPU it is the operators' own time. On CUDA it is the time of the kernels that they launch, and the gaps are
    the time in which the device waits. The profiler costs some microseconds an operator, more than an operator on a
    tiny map: compare profiles with each other, and speeds by `mvit_kernels.bench.timing`.

    Args:
        function: what is profiled, without arguments; set the grad mode outside.
        calls: how many calls the profile is the mean of.
        warmup: calls before, without the profiler.
        device: "cpu" or "cuda", where its work is done.

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
    """How many kernels one call of `function` launches on a GPU, those of a replayed graph too; copies and fills that
    are no kernels are not counted."""
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
        if event.device_type != torch.autograd.DeviceType.CPU:  # a kernel; its operator has its time as well
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
    """addmm begins by copying its bias into every row of the result: part of a linear layer, no copy of a map."""
    parent = event.cpu_parent
    return event.name == "aten::copy_" and parent is not None and parent.name in ("aten::addmm", "aten::baddbmm")


def table(profiles: dict[str, Profile]) -> str:
    """Profiles of one model in several forms side by side: milliseconds a call, and per cent of the call's time."""
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

    A copy is an ``aten::copy_`` (the end of every contiguous, clone, reshape and dtype conversion) or an ``aten::cat``,
    of which the profiler does not record the shapes: its shape is (). Left out are scalars, and the bias that a matrix
    product starts its sums from. What a kernel moves inside itself cannot be seen: oneDNN's reorders within a
    convolution, the packing of a matrix product.
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
        if "::" in event.name and not event.name.startswith("autograd::"):  # no range with a name of somebody's
            name = event.name
    return name
