# SPDX-License-Identifier: Apache-2.0
"""Every lane's address in Triton's interpreter, held against the tensors of the launch.

A read past a tensor's end goes unseen on a GPU for as long as the allocator has mapped what follows, under
compute-sanitizer's memcheck as well, and on the CPU wherever the heap goes on. Here each access that no mask excludes
must lie inside the elements of one of the launch's tensors: inside the tensor, not its storage, so that the gaps and
the ends of a view count too.
"""

from bisect import bisect_right

import numpy as np
from triton.runtime import interpreter


class OutOfBounds(AssertionError):
    """A kernel accessed memory outside of all its tensors."""


def check_bounds() -> None:
    """Patch the interpreter, for this process."""
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, arguments = builder.create_masked_load, builder.create_masked_store, executor._init_args_hst
    ranges: list[tuple[int, int]] = []
    first_bytes: list[int] = []

    def init_args(self, *given):
        made = arguments(self, *given)
        ranges[:] = sorted(_extent(value) for value in made[0] if hasattr(value, "data_ptr") and value.numel())
        first_bytes[:] = [start for start, _ in ranges]
        return made

    def check(what, ptrs, mask):
        size = max(ptrs.get_element_ty().primitive_bitwidth // 8, 1)
        addresses = np.broadcast_to(ptrs.data, np.shape(mask.data))[mask.data.astype(bool, copy=False)]
        if not addresses.size:
            return
        # Nearly always all lie in one tensor. Two searches say so, one for each lane take a fifth of a launch's time.
        lowest, highest = int(addresses.min()), int(addresses.max())
        at = bisect_right(first_bytes, lowest)
        if at and at == bisect_right(first_bytes, highest) and highest + size <= ranges[at - 1][1]:
            return
        addresses = addresses.astype(np.int64)
        starts, ends = np.array(ranges, dtype=np.int64).T if ranges else (np.zeros(0), np.zeros(0))
        place = np.searchsorted(starts, addresses, side="right") - 1
        wrong = (place < 0) | (addresses + size > ends[place])
        if wrong.any():
            first = int(addresses[wrong][0])
            near = min(ranges, key=lambda extent: min(abs(first - extent[0]), abs(first - extent[1])), default=None)
            where = "no tensor was given" if near is None else f"{first - near[1]:+} bytes from the end of the nearest"
            raise OutOfBounds(f"{what} of {size} bytes outside of the launch's tensors: {where}, {wrong.sum()} lanes")

    def masked_load(self, ptrs, mask, *others):
        check("a load", ptrs, mask)
        return load(self, ptrs, mask, *others)

    def masked_store(self, ptrs, value, mask, *others):
        check("a store", ptrs, mask)
        return store(self, ptrs, value, mask, *others)

    builder.create_masked_load, builder.create_masked_store = masked_load, masked_store
    executor._init_args_hst = init_args


def _extent(tensor) -> tuple[int, int]:
    """Addresses of a tensor's first byte, and of that behind its last element."""
    steps = [(side - 1) * stride for side, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    start, size = tensor.data_ptr(), tensor.element_size()
    return start + size * sum(step for step in steps if step < 0), start + size * (1 + sum(max(s, 0) for s in steps))
