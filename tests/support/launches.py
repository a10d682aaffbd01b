# SPDX-License-Identifier: Apache-2.0
"""What stands in for a GPU and its compiled kernels, so that launches can be looked at without one."""

from types import SimpleNamespace

import torch


class Kernel:
    """Stands in for a jitted kernel: records the slow launches (``kernel[grid](…)``) and the quick ones (``run``)."""

    def __init__(self):
        self.slow, self.quick = [], []

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            self.slow.append((grid, arguments, options))
            return SimpleNamespace(
                run=lambda *all: self.quick.append(all), function="function", packed_metadata="metadata"
            )

        return launch


def as_on_a_gpu(monkeypatch, module) -> None:
    """Let `module`, ``mvit_kernels.backends.triton._launch``, launch for CPU tensors, which are on device -1, the
    current one."""
    monkeypatch.setattr(module, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: -1)
    active = SimpleNamespace(get_current_stream=lambda device: f"stream of {device}")
    monkeypatch.setattr(module, "driver", SimpleNamespace(active=active))
    monkeypatch.setattr(module, "_profiled", lambda: False)
    monkeypatch.setattr(module, "_architecture", lambda device: 80)
