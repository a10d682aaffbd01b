# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs on a CPU: what captures by keeping the call, and replays it, and a log of both."""

import contextlib

from mvit_kernels.freezing import graphs


class Event:
    def __init__(self, log):
        self.log = log
        log.append("made")

    def record(self):
        self.log.append("record")

    def wait(self):
        self.log.append("wait")

    def synchronize(self):
        self.log.append("synchronize")


class Runtime(graphs.Runtime):
    device_type = "cpu"

    def __init__(self):
        self.capturing, self.captured, self.log, self.devices = False, 0, [], []

    @property
    def replays(self):
        return self.log.count("replay")

    def on(self, device):
        self.devices.append(device)
        return contextlib.nullcontext()

    def is_capturing(self):
        return self.capturing

    def capture(self, call, device):
        self.captured += 1
        call()

        def replay():
            self.log.append("replay")
            call()

        return replay

    def event(self):
        return Event(self.log)
