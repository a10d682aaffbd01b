# SPDX-License-Identifier: Apache-2.0
"""Does training with accelerated blocks give what plain PyTorch gives? Losses step by step, and final accuracies.

    python examples/parity.py DIR                                         # DIR/<class>/<image>
    python examples/parity.py DIR --models timm own --steps 50 --seeds 3 --size 64

Rounding errors grow in training: two right float32 runs drift apart, and any one difference may be small by luck. So
each network is trained in float32 several times from the same weights and on the same batches, the images of a batch
each time in another order. That is the same function (batch norm and the mean loss know no order) with other roundings.
The truth is the same training of the plain network in float64, and the rule that of the operators: at every step the
largest error so far of the accelerated runs is at most twice that of the plain runs plus one rounding unit of the loss.

The steps are SGD's with momentum. Adam's first step is the sign of the gradient: a weight whose gradient is near 0 goes
up or down by its rounding, and one such weight decides how far two right runs are apart. AdamW makes the final
accuracies, of a held-back quarter after EPOCHS epochs; these have no truth, and come with their spread over seeds.
Dropout is 0 in all of it.
"""

import argparse
import copy
import functools
import statistics
import sys
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mvit_kernels


def build(library: str, classes: int, seed: int = 0) -> nn.Module:
    """MobileViT-XXS as its library makes it, not accelerated and without dropout."""
    torch.manual_seed(seed)
    if library == "own":
        return mvit_kernels.restore(mvit_kernels.MobileViT("xxs", num_classes=classes, dropout=0.0))
    return timm.create_model("mobilevit_xxs", num_classes=classes)


# Rates at which a network learns and is not chaotic. At 0.02 our own, whose first weights are larger, is: after 50
# steps on land_use two right runs differ by 0.2, and the rule would say nothing.
SGD = {
    "timm": functools.partial(torch.optim.SGD, lr=0.02, momentum=0.9, weight_decay=1e-4),
    "own": functools.partial(torch.optim.SGD, lr=0.003, momentum=0.9, weight_decay=1e-4),
}
ADAMW = functools.partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.01)


def train(model: nn.Module, images: Tensor, labels: Tensor, batches: list[Tensor], optimizer) -> list[float]:
    """One step a batch of indices, in the model's dtype; the loss of each. `optimizer` makes one for parameters."""
    dtype = next(model.parameters()).dtype
    optimizer = optimizer(model.train().parameters())
    losses = []
    for batch in batches:
        loss = F.cross_entropy(model(images[batch].to(dtype)), labels[batch], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def reordered(batches: list[Tensor], seed: int) -> list[Tensor]:
    """The same batches, each in another order; seed 0 leaves them."""
    generator = torch.Generator().manual_seed(seed)
    return [batch[torch.randperm(len(batch), generator=generator)] if seed else batch for batch in batches]


def envelope(runs: list[list[float]], truth: list[float]) -> list[float]:
    """For each step, the largest error of any run up to it."""
    largest, worst = [], 0.0
    for *losses, exact in zip(*runs, truth, strict=True):
        errors = [abs(loss - exact) for loss in losses]
        worst = max(worst, *errors) if all(error == error for error in errors) else float("inf")  # NaN is no luck
        largest.append(worst)
    return largest


def drift(
    plain: nn.Module, fast: nn.Module, images: Tensor, labels: Tensor, batches: list[Tensor], optimizer, runs: int = 3
) -> tuple[list[float], list[float], list[float]]:
    """The losses in float64, and the `envelope` of the plain and of the accelerated runs in float32."""
    truth = train(copy.deepcopy(plain).double(), images, labels, batches, optimizer)
    found = [
        envelope(
            [train(copy.deepcopy(m), images, labels, reordered(batches, seed), optimizer) for seed in range(runs)],
            truth,
        )
        for m in (plain, fast)
    ]
    return truth, *found


def first_miss(truth: list[float], plain: list[float], fast: list[float]) -> int | None:
    """The first step at which the rule does not hold, or None."""
    unit = torch.finfo(torch.float32).eps
    for step, (loss, allowed, error) in enumerate(zip(truth, plain, fast, strict=True)):
        if not error <= 2 * (allowed + unit * abs(loss)):
            return step
    return None


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return (model.eval()(images).argmax(1) == labels).double().mean().item()


def read(folder: Path, size: int) -> tuple[Tensor, Tensor, list[str]]:
    """All images at `size`, (N, 3, size, size) in [0, 1], their labels and the classes."""
    from torchvision import datasets, transforms

    steps = [transforms.Resize(size), transforms.CenterCrop(size), transforms.ToTensor()]
    found = datasets.ImageFolder(folder, transforms.Compose(steps))
    images, labels = zip(*found, strict=True)
    return torch.stack(images), torch.tensor(labels), found.classes


def epochs(count: int, batch: int, steps: int, seed: int) -> list[Tensor]:
    """Batches of indices below `count`, shuffled anew each epoch; a rest that fills no batch is dropped."""
    generator = torch.Generator().manual_seed(seed)
    batches: list[Tensor] = []
    while len(batches) < steps:
        batches += torch.randperm(count, generator=generator)[: count // batch * batch].split(batch)
    return batches[:steps]


def main() -> int:
    sys.stdout.reconfigure(line_buffering=True)  # minutes lie between its lines, also where they go to a file
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--models", nargs="+", choices=["timm", "own"], default=["timm", "own"])
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--runs", type=int, default=3, help="float32 runs each, in other orders within a batch")
    parser.add_argument("--seeds", type=int, default=3, help="trainings for the final accuracy; 0: none")
    parser.add_argument("--epochs", type=int, default=6, help="of these")
    args = parser.parse_args()

    images, labels, classes = read(args.folder, args.size)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], labels[order]
    kept = len(images) - len(images) // 4
    if kept < args.batch:
        parser.error(f"{args.folder} has {len(images)} images, {kept} of them for training; --batch is {args.batch}")
    batches, missed = epochs(kept, args.batch, args.steps, seed=0), False
    for library in args.models:
        plain = build(library, len(classes))
        fast = mvit_kernels.accelerate(copy.deepcopy(plain), strict=True)
        truth, allowed, ours = drift(plain, fast, images, labels, batches, SGD[library], args.runs)
        print(
            f"{library}: loss in float64, and largest error so far of {args.runs} float32 runs, plain and accelerated"
        )
        for step in sorted({0, 4, 9, *range(19, len(truth), 10), len(truth) - 1} & set(range(len(truth)))):
            print(f"  step {step + 1:3}: {truth[step]:.4f}  {allowed[step]:.1e}  {ours[step]:.1e}")
        miss = first_miss(truth, allowed, ours)
        missed |= miss is not None
        print("  within the rule at every step" if miss is None else f"  MISSED THE RULE at step {miss + 1}")
        for name, accelerated in (("plain", False), ("accelerated", True)) if args.seeds else ():
            scores = []
            for seed in range(args.seeds):
                model = build(library, len(classes), seed)
                if accelerated:
                    mvit_kernels.accelerate(model, strict=True)
                steps = epochs(kept, args.batch, args.epochs * (kept // args.batch), seed)
                train(model, images, labels, steps, ADAMW)
                scores.append(accuracy(model, images[kept:], labels[kept:]))
            spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
            each = ", ".join(f"{score:.3f}" for score in scores)
            print(f"  {name}: accuracy {statistics.mean(scores):.3f} ± {spread:.3f} over {args.seeds} seeds ({each})")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
