# SPDX-License-Identifier: Apache-2.0
"""The device time of a call, without launch overhead: replays of a CUDA graph over several sets of inputs.

Example:
    >>> replay = capture([functools.partial(layer_norm_linear, x, *weights) for x in maps])
    >>> times = interleave({"ours": replay.run}, seconds=1, device="cuda", events=True)
    >>> times["ours"].per(replay.calls)

A graph holds one call for each of several sets of inputs, and every result has memory of its own. Together they are
more than three times as large as the L2 cache (`sets_beyond_cache`), so no call finds its input there from the previous
replay. Weights are shared, as in a real model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

BEYOND = 3  # times the size of the L2 cache
MOST_SETS = 512  # a map of 60 KB would need 2,500: capturing that many calls of eight candidates takes minutes
WARM_UP_CALLS = 3  # on the capturing stream: libraries allocate workspaces per stream


class Replay(NamedTuple):
    """A captured graph: `run` replays it, which makes `calls` calls."""

    run: Callable[[], None]
    calls: int


def sets_beyond_cache(bytes_a_call: float, device: torch.device) -> int:
    """How many sets of inputs and results, of `bytes_a_call` each, together exceed three times the L2 cache."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return count_beyond(bytes_a_call, cache)


def count_beyond(bytes_a_call: float, cache: float) -> int:
    """`sets_beyond_cache` for a cache of `cache` bytes; at least 1 and at most `MOST_SETS`."""
    return max(1, min(MOST_SETS, int(BEYOND * cache / max(bytes_a_call, 1)) + 1))


def capture(calls: Sequence[Callable[[], object]]) -> Replay:
    """Capture a CUDA graph of all `calls` in sequence.

    Raises:
        RuntimeError: a call does something that cannot be captured, such as waiting for the device.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP_CALLS):
            calls[0]()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        # Kept until the end of the capture: freed memory would be used for the next call's results and stay in the
        # cache.
        results = [call() for call in calls]
    del results
    return Replay(graph.replay, len(calls))
