# SPDX-License-Identifier: Apache-2.0
"""The device's own time of a call, without what launching costs: replays of a CUDA graph over rotated inputs.

Example:
    >>> replay = capture([functools.partial(layer_norm_linear, x, *weights) for x in maps])
    >>> times = interleave({"ours": replay.run}, seconds=1, device="cuda", events=True)
    >>> times["ours"].per(replay.calls)

A graph holds one call for each of several sets of inputs, and keeps every result in memory of its own. With more than
three times the L2 cache in all (`sets_beyond_cache`), no call finds its input there from the replay before; weights are
shared, as they are where such a call is really made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

BEYOND = 3  # times the L2 cache
MOST_SETS = 512  # a map of 60 KB would want 2,500: capturing that many calls of eight candidates takes minutes
WARM_UP_CALLS = 3  # on the stream that captures: libraries make their workspaces for each stream


class Replay(NamedTuple):
    """A captured graph: `run` replays it, which does `calls` calls."""

    run: Callable[[], None]
    calls: int


def sets_beyond_cache(bytes_a_call: float, device: torch.device) -> int:
    """How many sets of inputs and results, of so many bytes each, are more than three times the L2 cache together."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return count_beyond(bytes_a_call, cache)


def count_beyond(bytes_a_call: float, cache: float) -> int:
    """`sets_beyond_cache` for a cache of `cache` bytes; at least 1, and `MOST_SETS` at most."""
    return max(1, min(MOST_SETS, int(BEYOND * cache / max(bytes_a_call, 1)) + 1))


def capture(calls: Sequence[Callable[[], object]]) -> Replay:
    """A graph of all `calls`, one after the other.

    Raises:
        RuntimeError: a call does what a graph cannot hold, as waiting for the device.
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
        # Kept until the end of the capture: memory that was given back would serve the next call's results, and stay
        # in the cache.
        results = [call() for call in calls]
    del results
    return Replay(graph.replay, len(calls))
