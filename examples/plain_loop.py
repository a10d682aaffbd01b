# SPDX-License-Identifier: Apache-2.0
"""MobileViT trained on a folder of images in a plain PyTorch loop; acceleration is one line of it.

    python examples/plain_loop.py DIR                                     # DIR/<class>/<image>
    python examples/plain_loop.py DIR --bf16 --checkpointing --compile
    torchrun --nproc-per-node 2 examples/plain_loop.py DIR

It writes model.pt, whose weights load into timm's model with or without this package.
"""

import argparse
import math
import os

import timm
import torch
import torch.distributed as dist
from timm.utils import ModelEmaV3
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler
from torchvision import datasets, transforms

import mvit_kernels

parser = argparse.ArgumentParser()
parser.add_argument("folder", metavar="DIR")
parser.add_argument("--model", default="mobilevit_xxs")
parser.add_argument("--size", type=int, default=256)
parser.add_argument("--batch", type=int, default=32, help="images a process")
parser.add_argument("--epochs", type=int, default=10)
parser.add_argument("--lr", type=float, default=1e-3)
parser.add_argument("--workers", type=int, default=2)
parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
parser.add_argument("--checkpointing", action="store_true", help="recompute blocks in backward instead of keeping maps")
parser.add_argument("--compile", nargs="?", const="inductor", metavar="BACKEND", help="torch.compile")
parser.add_argument("--backend", help="of mvit_kernels; None leaves the choice to each call")
parser.add_argument("--plain", action="store_true", help="do not accelerate, to compare")
parser.add_argument("--resume", metavar="FILE")
parser.add_argument("--output", default="model.pt")
args = parser.parse_args()

distributed = "RANK" in os.environ  # set by torchrun
device = (
    torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")
)
if distributed:
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
first = not distributed or dist.get_rank() == 0
torch.manual_seed(0)

crop = [transforms.RandomResizedCrop(args.size), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
images = datasets.ImageFolder(args.folder, transforms.Compose(crop))
sampler = DistributedSampler(images) if distributed else RandomSampler(images)
loader = DataLoader(images, args.batch, sampler=sampler, num_workers=args.workers)

# The order: accelerate, then device, memory format and checkpointing, optimizer, EMA, DDP, torch.compile.
net = timm.create_model(args.model, num_classes=len(images.classes))
if not args.plain:
    mvit_kernels.accelerate(net, backend=args.backend)
net.to(device, memory_format=torch.channels_last).set_grad_checkpointing(args.checkpointing)
optimizer = torch.optim.AdamW(net.parameters(), lr=args.lr, weight_decay=0.01)
steps, warmup = args.epochs * len(loader), 0.05 * args.epochs * len(loader) + 1
schedule = torch.optim.lr_scheduler.LambdaLR(
    optimizer, lambda step: min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * min(step / steps, 1)))
)
ema = ModelEmaV3(net, decay=0.999, use_warmup=True)  # a deep copy, which is accelerated as well
parts = {"model": net, "ema": ema.module, "optimizer": optimizer, "schedule": schedule}
start = 0
if args.resume:
    saved = torch.load(args.resume, map_location=device, weights_only=True)
    start = saved["epoch"]
    for name, part in parts.items():
        part.load_state_dict(saved[name])
model = net
if distributed:
    model = torch.nn.parallel.DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)
if args.compile:
    model = torch.compile(model, backend=args.compile)
if first:
    print(mvit_kernels.report(net))

for epoch in range(start, args.epochs):
    if distributed:
        sampler.set_epoch(epoch)
    total = torch.zeros((), device=device)
    for x, labels in loader:
        x = x.to(device, memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            loss = torch.nn.functional.cross_entropy(model(x), labels.to(device), label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 10.0)
        optimizer.step()
        schedule.step()
        ema.update(net, step=schedule.last_epoch)
        total += loss.detach()
    if first:
        print(f"epoch {epoch + 1}: loss {total.item() / len(loader):.4f}", flush=True)
        saved = {name: part.state_dict() for name, part in parts.items()}
        torch.save(saved | {"epoch": epoch + 1, "classes": images.classes}, args.output)
if distributed:
    dist.destroy_process_group()
