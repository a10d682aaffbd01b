# SPDX-License-Identifier: Apache-2.0
"""A LightningModule around an accelerated MobileViT, on a folder of images: EMA, bfloat16, DDP and resuming.

    python examples/lightning_module.py DIR                               # DIR/<class>/<image>
    python examples/lightning_module.py DIR --precision bf16-mixed --checkpointing --epochs 30
    python examples/lightning_module.py DIR --devices 2                   # DDP; torchrun works too
    python examples/lightning_module.py DIR --resume lightning_results/last.ckpt

The checkpoints load into an unaccelerated model: `mvit_kernels.load_checkpoint(model, "best.ckpt")` takes the averaged
weights, or drop the prefix `model.` of `state_dict`.
"""

import argparse
import math

import lightning
import timm
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch.utils.data import DataLoader, Subset
from torchvision import datasets, transforms

import mvit_kernels


class Classifier(lightning.LightningModule):
    """Accelerated in __init__: before Lightning calls configure_optimizers, copies for EMA and wraps for DDP."""

    def __init__(self, name, classes, lr, checkpointing=False, backend=None):
        super().__init__()
        self.save_hyperparameters()
        self.model = mvit_kernels.accelerate(timm.create_model(name, num_classes=classes), backend=backend)
        self.model.to(memory_format=torch.channels_last).set_grad_checkpointing(checkpointing)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams.lr, weight_decay=0.01)
        steps = self.trainer.estimated_stepping_batches

        def cosine(step):
            return min((step + 1) / (0.05 * steps + 1), 0.5 + 0.5 * math.cos(math.pi * min(step / steps, 1)))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch, _):
        images, labels = batch
        loss = F.cross_entropy(self.model(images), labels, label_smoothing=0.1)
        self.log("loss", loss, on_step=False, on_epoch=True, sync_dist=True)
        return loss

    def validation_step(self, batch, _):
        images, labels = batch
        hits = (self.model(images).argmax(1) == labels).float().mean()
        self.log("accuracy", hits, batch_size=len(labels), sync_dist=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", metavar="DIR")
    parser.add_argument("--model", default="mobilevit_xxs")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--precision", default="32-true", help="such as bf16-mixed or 16-mixed")
    parser.add_argument("--devices", default="1")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--resume", metavar="FILE")
    parser.add_argument("--output", default="lightning_results")
    args = parser.parse_args()

    lightning.seed_everything(0, workers=True)
    crop = [transforms.RandomResizedCrop(args.size, scale=(0.3, 1.0)), transforms.RandomHorizontalFlip()]
    centre = [transforms.Resize(args.size), transforms.CenterCrop(args.size)]
    train, validation = (
        datasets.ImageFolder(args.folder, transforms.Compose([*steps, transforms.ToTensor()]))
        for steps in (crop, centre)
    )
    order = torch.randperm(len(train)).tolist()
    held_back = len(train) // 4
    train_loader = DataLoader(Subset(train, order[held_back:]), args.batch, shuffle=True, num_workers=args.workers)
    validation_loader = DataLoader(Subset(validation, order[:held_back]), args.batch, num_workers=args.workers)

    module = Classifier(args.model, len(train.classes), args.lr, args.checkpointing)
    print(mvit_kernels.report(module))
    trainer = lightning.Trainer(
        max_epochs=args.epochs,
        precision=args.precision,
        devices=args.devices if args.devices == "auto" else int(args.devices),
        strategy="auto" if args.devices == "1" else "ddp",
        gradient_clip_val=10.0,
        callbacks=[
            EMAWeightAveraging(decay=0.99),
            ModelCheckpoint(args.output, filename="best", monitor="accuracy", mode="max", save_last=True),
        ],
        logger=False,
        default_root_dir=args.output,
    )
    trainer.fit(module, train_loader, validation_loader, ckpt_path=args.resume)
    metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
    print(f"loss {metrics['loss']:.4f}, accuracy {metrics['accuracy']:.3f}")


if __name__ == "__main__":
    main()
