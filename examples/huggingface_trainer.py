# SPDX-License-Identifier: Apache-2.0
"""Hugging Face's Trainer with an accelerated MobileViTForImageClassification, on a folder of images.

    python examples/huggingface_trainer.py DIR                            # DIR/<class>/<image>
    python examples/huggingface_trainer.py DIR --checkpointing --bf16 --epochs 30
    python examples/huggingface_trainer.py DIR --from apple/mobilevit-xx-small
    torchrun --nproc-per-node 2 examples/huggingface_trainer.py DIR

OUTPUT/best is an ordinary model folder: `MobileViTForImageClassification.from_pretrained` reads it, with or without
this package.
"""

import argparse

import numpy as np
import torch
from torch.utils.data import Dataset, Subset
from torchvision import datasets, transforms
from transformers import MobileViTConfig, MobileViTForImageClassification, Trainer, TrainingArguments

import mvit_kernels

# MobileViT-XXS; MobileViTConfig() itself is S.
XXS = dict(hidden_sizes=[64, 80, 96], neck_hidden_sizes=[16, 16, 24, 48, 64, 80, 320], expand_ratio=2.0)


class Images(Dataset):
    """An image folder as the Trainer wants it: dictionaries of the model's arguments, so it needs no `datasets`."""

    def __init__(self, folder, size, training):
        crop = [transforms.RandomResizedCrop(size, scale=(0.3, 1.0)), transforms.RandomHorizontalFlip()]
        steps = crop if training else [transforms.Resize(size), transforms.CenterCrop(size)]
        self.images = datasets.ImageFolder(folder, transforms.Compose([*steps, transforms.ToTensor()]))

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image, label = self.images[index]
        return {"pixel_values": image.flip(0), "labels": label}  # Hugging Face's MobileViT reads BGR


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", metavar="DIR")
    parser.add_argument("--from", dest="source", metavar="NAME", help="pretrained weights; XXS from scratch without")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--epochs", type=float, default=10)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--compile", metavar="BACKEND", help="torch.compile's backend, such as inductor")
    parser.add_argument("--resume", action="store_true", help="from the last checkpoint in OUTPUT")
    parser.add_argument("--output", default="trainer_results")
    args = parser.parse_args()

    train, validation = Images(args.folder, args.size, True), Images(args.folder, args.size, False)
    order = np.random.default_rng(0).permutation(len(train))
    held_back = len(train) // 4
    classes = dict(enumerate(train.images.classes))
    labels = dict(num_labels=len(classes), id2label=classes, label2id={name: i for i, name in classes.items()})
    torch.manual_seed(0)
    if args.source:
        model = MobileViTForImageClassification.from_pretrained(args.source, ignore_mismatched_sizes=True, **labels)
    else:
        model = MobileViTForImageClassification(MobileViTConfig(image_size=args.size, **XXS, **labels))
    mvit_kernels.accelerate(model)  # before the Trainer, which makes the optimizer, compiles and wraps for DDP
    print(mvit_kernels.report(model))

    def accuracy(predictions):
        return {"accuracy": float((predictions.predictions.argmax(-1) == predictions.label_ids).mean())}

    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            args.output,
            per_device_train_batch_size=args.batch,
            per_device_eval_batch_size=args.batch,
            num_train_epochs=args.epochs,
            learning_rate=args.lr,
            weight_decay=0.01,
            label_smoothing_factor=0.1,
            use_cpu=not torch.cuda.is_available(),
            bf16=args.bf16,
            gradient_checkpointing=args.checkpointing,
            torch_compile=args.compile is not None,
            torch_compile_backend=args.compile,
            dataloader_num_workers=args.workers,
            eval_strategy="epoch",
            save_strategy="epoch",
            logging_strategy="epoch",
            load_best_model_at_end=True,
            metric_for_best_model="accuracy",
            save_total_limit=2,
            report_to="none",
        ),
        train_dataset=Subset(train, order[held_back:].tolist()),
        eval_dataset=Subset(validation, order[:held_back].tolist()),
        compute_metrics=accuracy,
    )
    trainer.train(resume_from_checkpoint=args.resume)
    trainer.save_model(f"{args.output}/best")
    print(f"accuracy {trainer.evaluate()['eval_accuracy']:.3f}")


if __name__ == "__main__":
    main()
