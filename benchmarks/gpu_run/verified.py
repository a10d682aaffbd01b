# SPDX-License-Identifier: Apache-2.0
"""`verify` of one network in one dtype: accelerated and frozen, in float32 with gradients.

python verified.py own/s bfloat16
"""

from __future__ import annotations

import json
import sys

import torch

import mvit_kernels
from mvit_kernels.zoo import load


def main(arguments: list[str]) -> int:
    name, dtype, *size = arguments
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = mvit_kernels.accelerate(load(name).to(device, getattr(torch, dtype)).eval())
    images = torch.rand(2, 3, *([int(size[0])] * 2 if size else (256, 256)), device=device, dtype=getattr(torch, dtype))
    # What may end the process comes last: training by Triton.
    checks = {
        "accelerated": lambda: mvit_kernels.verify(model, images),
        "frozen": lambda: mvit_kernels.verify(mvit_kernels.freeze(model), images, reference=model),
    }
    if dtype == "float32":
        checks["gradients"] = lambda: mvit_kernels.verify(model, images, gradients=True)
    right = True
    for what, verify in checks.items():
        report = verify()
        right &= report.ok
        print(json.dumps({"what": "verify", "model": name, "dtype": dtype, "form": what, "ok": report.ok}), flush=True)
        if not report.ok:
            print(f"TOO LARGE: {name} {dtype} {what}\n{report}", flush=True)
    return int(not right)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
