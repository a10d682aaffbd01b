# SPDX-License-Identifier: Apache-2.0
"""A timm model made faster: accelerate it, see what was swapped, verify the numbers, freeze it, time all forms.

    python examples/timm_model.py                                         # random weights: nothing is downloaded
    python examples/timm_model.py --model mobilevit_s --checkpoint mobilevit_s.pth --batch 8
    python examples/timm_model.py --dtype bfloat16 --device cuda

The checkpoint may be of timm, Hugging Face, cvnets or this package. The exit code is 1 if a number is not as exact as
PyTorch's own.
"""

import argparse
import copy
import random
import statistics
import sys
import time

import timm
import torch

import mvit_kernels

parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
parser.add_argument("--model", default="mobilevit_xxs", help="mobilevit_xxs (the default), mobilevit_xs, mobilevit_s")
parser.add_argument("--checkpoint", metavar="FILE", help="weights; random ones without")
parser.add_argument("--classes", type=int, default=1000)
parser.add_argument("--size", type=int, default=256)
parser.add_argument("--batch", type=int, default=1)
parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
parser.add_argument("--rounds", type=int, default=30, help="times that each form is timed")
args = parser.parse_args()

torch.manual_seed(0)
dtype = getattr(torch, args.dtype)
model = timm.create_model(args.model, num_classes=args.classes).eval()  # pretrained=True where there is a network
if args.checkpoint:
    mvit_kernels.load_checkpoint(model, args.checkpoint)
model.to(args.device, dtype)
images = torch.rand(args.batch, 3, args.size, args.size, device=args.device, dtype=dtype)
plain = copy.deepcopy(model)

# 1. In place, one line; parameters and state_dict stay as they are.
mvit_kernels.accelerate(model)
print(mvit_kernels.report(model), "\n")

# 2. The same numbers? Both paths against float64, block by block.
accelerated_is_right = mvit_kernels.verify(model, images)
print(accelerated_is_right, "\n")

# 3. For inference alone: a copy with folded batch norms and packed weights.
frozen = mvit_kernels.freeze(model)
frozen_is_right = mvit_kernels.verify(frozen, images, reference=model)
print(frozen_is_right, "\n")

# 4. All forms take turns, in a new order each round, so that what else runs here disturbs them alike.
forms = {
    "eager": (plain, images),
    "channels-last": (copy.deepcopy(plain).to(memory_format=torch.channels_last),
                      images.contiguous(memory_format=torch.channels_last)),
    "accelerated": (model.to(memory_format=torch.channels_last),
                    images.contiguous(memory_format=torch.channels_last)),
    "frozen": (frozen, images),
}  # fmt: skip
seconds = {name: [] for name in forms}
with torch.inference_mode():
    for turn in range(-3, args.rounds):  # the first three warm up
        for name in random.sample(list(forms), len(forms)):
            form, x = forms[name]
            start = time.perf_counter()
            form(x).cpu()  # which waits for a GPU
            if turn >= 0:
                seconds[name].append(time.perf_counter() - start)
eager = statistics.median(seconds["eager"])
for name, samples in seconds.items():
    median = statistics.median(samples)
    print(f"{name:<14}{1e3 * median:8.2f} ms  {eager / median:5.2f} × as fast as eager")
sys.exit(not (accelerated_is_right.ok and frozen_is_right.ok))
