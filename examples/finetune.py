# SPDX-License-Identifier: Apache-2.0
"""A pretrained MobileViT fine-tuned on photos of your own, then frozen, checked and saved.

    python examples/finetune.py                                           # made-up photos, random weights
    python examples/finetune.py DIR --checkpoint mobilevit_xxs.pth        # DIR/<class>/<image>; a quarter is held back
    python examples/finetune.py DIR --checkpoint mobilevit_s.pth --model mobilevit_s --bf16 --epochs 20

The checkpoint may be of timm, Hugging Face, cvnets or this package; its classifier is replaced. `mvit-kernels train`
does the same and more without a program of your own; plain_loop.py has DDP, EMA, resuming and torch.compile.
"""

import argparse
import sys

import timm
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Subset
from torchvision import datasets, transforms

import mvit_kernels

parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
parser.add_argument("folder", metavar="DIR", nargs="?", help="a folder of images for each class; made-up ones without")
parser.add_argument("--model", default="mobilevit_xxs")
parser.add_argument("--checkpoint", metavar="FILE", help="pretrained weights; random ones without")
parser.add_argument("--size", type=int, default=256)
parser.add_argument(
    "--mean", type=float, nargs=3, default=[0, 0, 0], help="as the checkpoint was trained; timm's are 0"
)
parser.add_argument("--std", type=float, nargs=3, default=[1, 1, 1])
parser.add_argument("--batch", type=int, default=16)
parser.add_argument("--epochs", type=int, default=5)
parser.add_argument("--lr", type=float, default=2e-3, help="of the new classifier; the rest learns at a tenth of it")
parser.add_argument("--workers", type=int, default=0)
parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
parser.add_argument("--output", default="finetuned.pth")
args = parser.parse_args()

torch.manual_seed(0)
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
mvit_kernels.keep_freed_memory()  # on the CPU saves the page faults of each step's tensors

# Photos: a training and a validation view of the same folder, and a split by a fixed order.
end = [transforms.ToTensor(), transforms.Normalize(args.mean, args.std)]
crop = [transforms.RandomResizedCrop(args.size, scale=(0.5, 1.0)), transforms.RandomHorizontalFlip(), *end]
centre = [transforms.Resize(args.size), transforms.CenterCrop(args.size), *end]
if args.folder:
    train, validation = (datasets.ImageFolder(args.folder, transforms.Compose(steps)) for steps in (crop, centre))
else:
    made_up = dict(size=32, image_size=(3, args.size, args.size), num_classes=2)
    train, validation = (datasets.FakeData(**made_up, transform=transforms.Compose(steps)) for steps in (crop, centre))
classes = getattr(train, "classes", ["0", "1"])
order = torch.randperm(len(train)).tolist()
held_back = len(order) // 4
if not held_back:
    parser.error(f"{args.folder} has {len(order)} images; at least four are needed, one of which is held back")
train_loader = DataLoader(Subset(train, order[held_back:]), args.batch, shuffle=True, num_workers=args.workers)
validation_loader = DataLoader(Subset(validation, order[:held_back]), args.batch, num_workers=args.workers)

# The model without a classifier, its weights, a classifier for the new classes; then accelerate, then the optimizer.
model = timm.create_model(args.model, num_classes=0)
if args.checkpoint:
    mvit_kernels.load_checkpoint(model, args.checkpoint)
model.reset_classifier(len(classes))
mvit_kernels.accelerate(model).to(device, memory_format=torch.channels_last)
print(mvit_kernels.report(model))
head = list(model.get_classifier().parameters())
rest = [parameter for parameter in model.parameters() if all(parameter is not one for one in head)]
groups = [{"params": rest, "lr": args.lr / 10}, {"params": head, "lr": args.lr}]
optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
schedule = torch.optim.lr_scheduler.OneCycleLR(
    optimizer, [group["lr"] for group in groups], total_steps=args.epochs * len(train_loader)
)


def accuracy(model):
    with torch.inference_mode():
        hits = [(model(x.to(device)).argmax(1).cpu() == labels) for x, labels in validation_loader]
    return torch.cat(hits).float().mean().item()


for epoch in range(args.epochs):
    model.train()
    total = 0.0
    for x, labels in train_loader:
        x = x.to(device, memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            loss = F.cross_entropy(model(x), labels.to(device), label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        total += loss.item()
    print(f"epoch {epoch + 1}: loss {total / len(train_loader):.4f}, accuracy {accuracy(model.eval()):.3f}", flush=True)

# An ordinary timm checkpoint: it loads with or without this package. And the same model for inference alone.
torch.save({"state_dict": model.state_dict(), "classes": classes}, args.output)
frozen = mvit_kernels.freeze(model)
images = next(iter(validation_loader))[0][:1].to(device)
result = mvit_kernels.verify(frozen, images, reference=model)
print(f"{result}\nfrozen: accuracy {accuracy(frozen):.3f}; the weights are in {args.output}")
sys.exit(not result.ok)
