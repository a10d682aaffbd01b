# SPDX-License-Identifier: Apache-2.0
"""When packed weights are packed again, by whom, and who waits for it: streams and graph captures, simulated.

A simulated stream runs its work when `Device.run` says so, in the order of the stream and of the events it waits for; a
capture records it instead, for `Graph.replay`. So what a call reads is what it would read on a GPU.
"""

import contextlib

import pytest
import torch

from mvit_kernels.backends import gpu
from mvit_kernels.backends.cuda import kept, packing, transformer
from mvit_kernels.backends.library import flatten
from support.cases import convert, make, structured


class Event:
    def __init__(self, stream):
        self.after = len(stream.work)
        self.stream = stream

    def query(self):
        assert self.stream.device.current.capturing is None, "no event can be asked inside a capture"
        return self.stream.done >= self.after


class Stream:
    def __init__(self, device, handle):
        self.device, self.cuda_stream = device, handle
        self.work, self.done = [], 0
        self.capturing = None  # the graph that records

    def add(self, work):
        (self.work if self.capturing is None else self.capturing).append(work)

    def record_event(self):
        return Event(self)

    def wait_event(self, event):
        assert self.capturing is None, "a capture cannot wait for work outside of it"
        self.add(event)

    def step(self):
        """Do the next piece of work, unless it has to wait."""
        if self.done == len(self.work):
            return False
        work = self.work[self.done]
        if isinstance(work, Event):
            if not work.query():
                return False
        else:
            work()
        self.done += 1
        return True


class Device:
    """Streams, of which one is current. Packing is queued there and writes when the stream runs."""

    def __init__(self, monkeypatch, stack):
        self.streams = [Stream(self, handle) for handle in (1, 2, 3)]
        self.current = self.streams[0]
        self.recorded = []  # streams that the allocator knows of
        self.packs = 0
        self.stack = stack

        def pack(*arguments):
            """Memory at once, its values by the stream: from the weights as they are when it runs."""
            self.packs += 1
            fresh = torch.zeros(0, dtype=torch.uint8).new_zeros(self.truth().shape)
            self.current.add(lambda: fresh.set_(self.truth()))
            return fresh

        monkeypatch.setattr(kept, "_call", pack)
        monkeypatch.setattr(kept, "_current_stream", lambda tensor: self.current)
        monkeypatch.setattr(kept, "_capturing", lambda tensor: self.current.capturing is not None)
        monkeypatch.setattr(kept, "_record_stream", lambda data, stream: self.recorded.append(stream.cuda_stream))
        queue, copy = self, torch.Tensor.copy_

        def copy_(into, other):
            queue.current.add(lambda: copy(into, other))
            return into

        monkeypatch.setattr(torch.Tensor, "copy_", copy_)

    def truth(self):
        return packing.pack_transformer(*self.stack, num_heads=4, dtype=torch.bfloat16)

    def call(self):
        """A call of the operator; gives a list that has what its kernel read, once that has run."""
        packed = transformer.packed_weights(flatten(self.stack[0], zeros=False), self.stack[1], 4, torch.bfloat16)
        read = []
        self.current.add(lambda: read.append(packed.clone()))
        return read

    def run(self, *streams):
        """Run these streams as far as they get, the first as long as possible; all of them without any."""
        streams = streams or self.streams
        while any(stream.step() for stream in streams):
            pass

    @contextlib.contextmanager
    def on(self, stream):
        before, self.current = self.current, stream
        yield stream
        self.current = before

    @contextlib.contextmanager
    def capture(self):
        """Like torch.cuda.graph: it waits for the device, and a stream of its own records."""
        self.run()
        graph = []
        with self.on(self.streams[2]) as stream:
            stream.capturing = graph
            yield graph
            stream.capturing = None


def replay(device, graph):
    for work in graph:
        device.current.add(work)
    device.run()


@pytest.fixture
def device(monkeypatch):
    tensors, _ = make("transformer", dict(shape=(1, 2, 2, 64), heads=4, patch=(2, 2), layers=1))
    s = structured("transformer", convert(tensors, torch.bfloat16))
    return Device(monkeypatch, (s["layers"], s["final_norm"]))


def change(device):
    """Another version at once, and other values when the stream comes to it."""
    weight = device.stack[0][0].fc1_weight
    weight.add_(0)
    device.current.add(lambda: weight.data.add_(1))


def test_the_first_call_packs_and_the_next_ones_read(device):
    reads = [device.call() for _ in range(3)]
    device.run()
    assert device.packs == 1 and all(torch.equal(read[0], device.truth()) for read in reads)


def test_another_stream_waits_for_the_packing(device):
    first, second = device.streams[:2]
    device.call()
    with device.on(second):
        read = device.call()
    device.run(second)
    assert not read, "it has read what is not packed yet"
    device.run(first, second)
    assert torch.equal(read[0], device.truth()) and device.packs == 1


def test_another_stream_waits_for_a_packing_anew(device):
    """And its packing anew comes after the other's first one."""
    second = device.streams[1]
    device.call()
    with device.on(second):
        change(device)
        read = device.call()
    device.run(second)
    assert not read
    device.run()
    assert torch.equal(read[0], device.truth()) and device.packs == 2
    again = device.call()
    device.run()
    assert torch.equal(again[0], device.truth()) and device.packs == 2


def test_nobody_waits_for_what_is_over(device):
    device.call()
    device.run()
    with device.on(device.streams[1]) as second:
        device.call()
        assert not any(isinstance(work, Event) for work in second.work)
    assert list(kept.packed.values())[-1].event is None, "every call would ask"


def test_the_allocator_knows_every_stream_that_reads(device):
    device.call()
    for _ in range(2):
        with device.on(device.streams[1]):
            device.call()
    assert device.recorded == [2], "once each, and not the stream that allocated"


def test_a_capture_reads_what_was_packed_before(device):
    device.call()
    with device.capture() as graph:
        read = device.call()
    assert device.packs == 1 and len(graph) == 1, "the graph has the kernel alone"
    replay(device, graph)
    assert torch.equal(read[-1], device.truth())


def test_a_graph_reads_weights_that_were_packed_anew(device):
    device.call()
    with device.capture() as graph:
        read = device.call()
    change(device)
    device.call()
    device.run()
    replay(device, graph)
    assert torch.equal(read[-1], device.truth())


def test_weights_changed_before_a_capture_are_not_taken_for_packed(device):
    """What a capture records has not run: eager calls after it pack themselves, whether or not it was replayed."""
    device.call()
    change(device)
    with device.capture() as graph:
        inside = device.call()
    eager = device.call()
    device.run()
    assert torch.equal(eager[0], device.truth())
    replay(device, graph)
    assert torch.equal(inside[-1], device.truth())
    change(device)
    replay(device, graph)
    assert torch.equal(inside[-1], device.truth()), "a replay packs the weights as they are then"


def test_weights_first_seen_in_a_capture_belong_to_the_graph(device):
    before = len(kept.packed)
    with device.capture() as graph:
        inside = device.call()
    assert len(kept.packed) == before
    eager = device.call()
    device.run()
    assert torch.equal(eager[0], device.truth())
    replay(device, graph)
    assert torch.equal(inside[-1], device.truth())


def test_captures_are_asked_of_the_device_of_the_weights(monkeypatch):
    """Of its current stream, whatever the current device is."""
    current = [0]

    @contextlib.contextmanager
    def on(device):
        before, current[0] = current[0], device.index
        yield
        current[0] = before

    monkeypatch.setattr(torch.cuda, "device", on)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: current[0] == 1)
    assert gpu.is_capturing(torch.device("cuda:1")) and not gpu.is_capturing(torch.device("cuda:0"))
    assert not gpu.is_capturing(torch.device("cpu")) and current == [0]
    asked = []
    monkeypatch.setattr(gpu, "is_capturing", lambda device: bool(asked.append(device)))
    weights = torch.zeros(3)
    kept.keep([weights], "what", lambda: weights.clone())
    assert asked == [weights.device]
