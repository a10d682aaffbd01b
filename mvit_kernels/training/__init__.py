# SPDX-License-Identifier: Apache-2.0
"""Training and evaluation: recipes, tasks, the multi-scale sampler and a thin loop from timm's parts.

Example:
    >>> from mvit_kernels.training.loop import Settings, train
    >>> from mvit_kernels.training.recipe import read_recipe
    >>> summary = train("photos", read_recipe("finetune", {"epochs": 10}), "runs/photos", checkpoint="xxs.pth")
    >>> summary.best["top1"]
    0.93

The parts stand alone. Inside a loop of your own (timm's ``train.py``, Hugging Face's Trainer, Lightning),
`mvit_kernels.accelerate` is all that is needed.
"""
