# SPDX-License-Identifier: Apache-2.0
"""The environment that `make` makes is whole: torchvision's compiled operators load beside its torch, without help."""

from __future__ import annotations

import importlib.util
import itertools
import os
import subprocess
import sys

import pytest

ORDERS = [" ".join(order) for order in itertools.permutations(("timm", "torchvision", "mvit_kernels"))][::2]

# All orders from one process: what they import of torch alone took most of the time of each, 4 seconds of 7.
CODE = """
import os, sys
import torch, torch._dynamo
assert not {"timm", "torchvision", "mvit_kernels"} & set(sys.modules)
for order in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        for name in order.split():
            globals()[name] = __import__(name)
        boxes = torch.tensor([[0.0, 0, 2, 2], [0, 0, 2, 1.9], [3, 3, 4, 4]])
        print(order, torchvision.ops.nms(boxes, torch.tensor([0.9, 0.8, 0.7]), 0.5).tolist(), flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, order
"""


@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")  # importing it takes 5 s
def test_plain_imports_work_in_any_order(tmp_path):
    path = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, "-c", CODE, *ORDERS],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{order} [0, 2]" for order in ORDERS]
