# SPDX-License-Identifier: Apache-2.0
"""MobileViT models by name, of every library, and the photographs that they look at: what the commands and the
benchmarks share."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .builders import builder

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor, nn

    from ..checkpoints import Checkpoint


def load(
    name: str | None,
    *,
    pretrained: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    device: str = "cpu",
) -> nn.Module:
    """A MobileViT by name, for evaluation.

    Example:
        >>> model = load("mobilevit_s")                             # timm's; also "timm/mobilevit_s"
        >>> model = load("huggingface/xs", num_classes=10)          # built here, as published
        >>> model = load("apple/mobilevit-small", pretrained=True)  # the hub's, or a folder's
        >>> model = load("kornia/xxs")                              # a backbone: Kornia has no classifier
        >>> model = load("own/xxs", checkpoint="land_use21.pth")    # 21 classes, as the checkpoint has

    Without weights to load, the model is made for measuring: random weights, the same at every call, that
    hide no errors. As models come, they would: Hugging Face draws batch norm weights from N(0, 0.02), so that
    activations vanish; everyone's running statistics are 0 and 1, so that a wrong fold goes unseen; linear
    weights of 0.02 make attention all but uniform. Here norms have weights of 0.75 to 1.25 and biases around
    0, linear layers keep the size of what they are given, and running statistics are those of a random batch.

    Args:
        name: None for own/ and the checkpoint's variant, "own/s" without one.
        pretrained: published weights, from the hub.
        checkpoint: a file for `mvit_kernels.load_checkpoint`; the number of classes is read from it.
        num_classes: 0 for none; None for the checkpoint's, else 1000.
        device: where to.

    Raises:
        ValueError: an unknown name (with near ones), a model without MobileViT blocks, arguments that exclude
            each other, a device that is not there; what `load_checkpoint` raises.
        ImportError: the model's library is not installed.
        OSError: no such file; published weights could not be fetched.
    """
    import torch

    from ..adapters import report

    if pretrained and checkpoint is not None:
        raise ValueError("--pretrained and --checkpoint exclude each other: give one of the two")
    where = checked_device(device)
    variant, weights = None, None
    if checkpoint is not None:
        weights, variant, classes = _read_checkpoint(Path(checkpoint))
    name = f"own/{variant or 's'}" if name is None else name
    if checkpoint is not None and num_classes is None and not name.startswith("kornia/"):
        num_classes = classes
    build = builder(name, pretrained)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build(num_classes).eval()
        if not report(model).blocks:
            raise ValueError(f"--model {name}: {report(model)}")
        if weights is not None:
            _load_weights(model, name, weights, str(checkpoint))
        elif not pretrained:
            randomise(model)
    return model.to(where)


def logits(output: Any) -> Tensor:
    """The tensor in what a model returned: logits, or of a backbone its last map; the first of several.

    Raises:
        TypeError: there is no tensor in it.
    """
    import torch

    while not isinstance(output, torch.Tensor):
        for attribute in ("logits", "last_hidden_state"):
            if getattr(output, attribute, None) is not None:
                output = getattr(output, attribute)
                break
        else:
            if not isinstance(output, list | tuple) or not output:
                raise TypeError(f"the model returned {type(output).__name__}, in which there is no tensor")
            output = output[0]
    return output


def checked_device(name: str) -> Any:
    """The ``torch.device`` of this name.

    Raises:
        ValueError: no device's name, or a GPU that is not there.
    """
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {name}: no device has this name here; give cpu, cuda or cuda:N")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if not count:
            raise ValueError(f"--device {name}: PyTorch sees no NVIDIA GPU here (torch {torch.__version__})")
        if (device.index or 0) >= count:
            raise ValueError(f"--device {name}: there are {count} GPUs, cuda:0 to cuda:{count - 1}")
    return device


def _read_checkpoint(path: Path) -> tuple[Checkpoint, str | None, int]:
    """The checkpoint, its variant where it is a known one, and its number of classes (0: none)."""
    from ..checkpoints import VARIANT_OF_WIDTH, read_checkpoint
    from ..checkpoints.keys import read_keys

    checkpoint = read_checkpoint(path, str(path))
    state_dict = checkpoint.state_dict
    if _is_kornia(state_dict):  # which fits no layout but its own
        return checkpoint, None, 0
    keys = read_keys(state_dict, str(path))
    found = keys.found
    if keys.prefix:
        print(f"{path}: the network's keys are those below {keys.prefix!r}", file=sys.stderr)

    def length(own_key: str) -> int:
        return state_dict[found[own_key][0]].numel() if own_key in found else 0

    return checkpoint, VARIANT_OF_WIDTH.get(length("stages.4.1.norm.weight")), length("classifier.bias")


def _load_weights(model: nn.Module, name: str, checkpoint: Checkpoint, path: str) -> None:
    from ..checkpoints import load_into

    if not (name.startswith("kornia/") and _is_kornia(checkpoint.state_dict)):
        load_into(model, checkpoint, path)
        return
    try:
        model.load_state_dict(checkpoint.state_dict)
    except RuntimeError as error:
        raise ValueError(f"{path} is of Kornia's MobileViT, and does not fit {name}: take another variant") from error


def _is_kornia(state_dict: dict[str, Tensor]) -> bool:
    return "conv1.0.weight" in state_dict


def randomise(model: nn.Module) -> None:
    """See `load`."""
    import torch
    from torch import nn

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
                module.weight.uniform_(0.75, 1.25)
                module.bias.normal_(std=0.1)
            elif isinstance(module, nn.Linear):
                module.weight.normal_(std=module.in_features**-0.5)
    calibrate(model, [torch.rand(4, 3, 128, 128, device="cpu")])


def calibrate(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Give every batch norm the statistics that it sees on `batches`: as after training, no activation vanishes or
    explodes, and a wrongly folded batch norm shows."""
    import torch
    from torch import nn

    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over all batches
        norm.train()
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()
