# SPDX-License-Identifier: Apache-2.0
"""The environment that `make` makes is whole: torchvision's compiled operators load beside its torch, without help."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import pytest

pytest.importorskip("timm")

ORDERS = [" ".join(order) for order in itertools.permutations(("timm", "torchvision", "mvit_kernels"))]


@pytest.mark.parametrize("order", ORDERS[::2])
def test_plain_imports_work_in_any_order(order, tmp_path):
    code = f"import {', '.join(order.split())}, torch\n"
    code += "boxes = torch.tensor([[0.0, 0, 2, 2], [0, 0, 2, 1.9], [3, 3, 4, 4]])\n"
    code += "print(torchvision.ops.nms(boxes, torch.tensor([0.9, 0.8, 0.7]), 0.5).tolist())\n"
    path = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[0, 2]\n"
