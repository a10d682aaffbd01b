# SPDX-License-Identifier: Apache-2.0
"""The CUDA backend's operators with a Python part on CPU tensors: that Python, and the kernels' own source under
emulation."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from mvit_kernels import backends
from mvit_kernels.backends import cuda
from mvit_kernels.backends.cuda import transformer
from support.cases import Tensors, call, convert, make
from support.emulation import Driver, load_operators
from support.tolerance import assert_close_as_pytorch


def run(
    driver: Driver, x: Tensor, packed: Tensor, layers, head_dim, hidden, final_norm, patch, eps, plan, seed=0
) -> Tensor:
    """The launch that ``csrc/cuda/transformer.cpp`` would make, into memory full of NaN."""
    out = torch.full_like(x, torch.nan, memory_format=torch.contiguous_format)
    x = x.contiguous()
    sizes = (*x.shape, head_dim, *patch, layers, hidden, final_norm)
    if x.numel():
        driver.forward(seed, x, out, packed, x.dtype == torch.float16, *sizes, float(eps), *plan, writes=[out])
    return out


def check_launch(
    operator: str,
    launched: Callable[..., Tensor],
    driver: Driver,
    sizes: dict[str, Any],
    dtype: torch.dtype,
    change: Callable[[Tensors], None] | None = None,
    **how: Any,
) -> None:
    """Hold what `launched` computes of a case against float64. `change` is applied to the tensors first."""
    tensors, settings = make(operator, sizes)
    if change is not None:
        change(tensors)
    low = convert(tensors, dtype)
    ours = launched(driver, sizes, dtype, tensors=tensors, **how)
    truth = call(operator, convert(low, torch.float64), settings, "oracle")
    assert_close_as_pytorch(str(sizes), ours, call(operator, low, settings, "usual"), truth)


@contextlib.contextmanager
def serving_cpu_tensors(monkeypatch) -> Iterator[list[tuple]]:
    """Inside, the CUDA backend is the first choice for CPU tensors, and takes every stack in one launch that it can,
    whether or not that would pay on a GPU; gives the shape and plan of each launch."""
    launches = []

    def plan(*arguments):
        launches.append((*arguments[:4], plan_of(*arguments)))
        return launches[-1][-1]

    plan_of = transformer.plan_of
    monkeypatch.setattr(transformer, "plan_of", plan)
    monkeypatch.setattr(cuda, "one_launch_pays", lambda *sizes, alone: True)
    with preferred(monkeypatch, "transformer", transformer.forward):
        yield launches


@contextlib.contextmanager
def preferred(monkeypatch, operator: str, forward: Callable[..., Tensor]) -> Iterator[None]:
    """Inside, the CUDA backend is the first choice for CPU tensors, and `forward` is ``mvit_kernels::<operator>.cuda``
    for them."""
    load_operators(operator)
    monkeypatch.setattr(cuda.BACKEND, "unavailable", lambda device_type: [])
    monkeypatch.setitem(backends.PREFERENCE, "cpu", ("cuda", "reference"))
    monkeypatch.setattr(backends, "_choices", {})
    library = torch.library.Library("mvit_kernels", "FRAGMENT")
    library.impl(f"{operator}.cuda", forward, "CPU")
    try:
        yield
    finally:
        library._destroy()
