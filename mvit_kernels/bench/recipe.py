# SPDX-License-Identifier: Apache-2.0
"""One whole training step of the paper's recipe, on images and labels that are there already.

The recipe (arXiv:2110.02178, appendix A, and cvnets' configurations): AdamW with weight decay 0.01 on everything, label
smoothing 0.1, automatic mixed precision, dropout as the model has it, and an exponential moving average of the weights
with momentum 5e-4 after every step. Augmentation and loading are left out: `benchmarks/loader.py` measures those.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .._utils.third_party import import_timm
from ..zoo import logits

LABEL_SMOOTHING, WEIGHT_DECAY, EMA_MOMENTUM = 0.1, 0.01, 5e-4
DROPOUT = {"xxs": 0.05, "xs": 0.1, "s": 0.1}  # in every transformer layer
CLASSIFIER_DROPOUT = 0.1


def recipe_step(model: nn.Module, images: Tensor, dtype: torch.dtype = torch.float32) -> Callable[[], Tensor]:
    """The step as a function, which returns the loss.

    Example:
        >>> step = recipe_step(accelerate(model), images, torch.bfloat16)
        >>> loss = step()

    Args:
        model: a classifier, compiled or not; put into training mode, with its dropout live. The learning rate is 0, so
            that only running statistics change, and every step costs what the first one did.
        images: (B, C, H, W) float32.
        dtype: of autocast; float32 for none.

    Raises:
        ImportError: timm, whose `ModelEmaV3` averages the weights, is not installed.
    """
    import_timm()
    from timm.utils import ModelEmaV3

    model.train()
    plain = getattr(model, "_orig_mod", model)  # torch.compile's wrapper shares its parameters
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.0, weight_decay=WEIGHT_DECAY)
    average = ModelEmaV3(plain, decay=1 - EMA_MOMENTUM)
    criterion = nn.CrossEntropyLoss(label_smoothing=LABEL_SMOOTHING)
    cast = dtype not in (torch.float32, torch.float64)
    labels: list[Tensor] = []

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(images.device.type, dtype if cast else None, enabled=cast):
            output = logits(model(images))
            if not labels:  # the number of classes is known now
                drawn = torch.randint(
                    output.shape[1], (len(images),), generator=torch.Generator().manual_seed(0), device="cpu"
                )
                labels.append(drawn.to(images.device))
            loss = criterion(output, labels[0])
        loss.backward()
        optimizer.step()
        average.update(plain)
        return loss.detach()

    return step
