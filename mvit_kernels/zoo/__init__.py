# SPDX-License-Identifier: Apache-2.0
"""MobileViT models of every library by name, and photographs for them: shared by the commands and the benchmarks."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .builders import builder, network_of

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
    """Build a MobileViT by name, in evaluation mode.

    Example:
        >>> model = load("mobilevit_s")                             # timm's; also "timm/mobilevit_s"
        >>> model = load("huggingface/xs", num_classes=10)          # the published architecture, built locally
        >>> model = load("apple/mobilevit-small", pretrained=True)  # from the hub or a folder
        >>> model = load("kornia/xxs")                              # a backbone: Kornia has no classifier
        >>> model = load("own/xxs", checkpoint="land_use21.pth")    # 21 classes, as in the checkpoint
        >>> model = load("deeplabv3/s")                             # segmentation; "ssdlite/s" is for detection
        >>> model = load("apple/deeplabv3-mobilevit-small")         # Hugging Face's

    Without weights to load, the model gets random weights for measuring, the same at every call, chosen so that errors
    show. The libraries' initial weights hide errors: Hugging Face draws batch-norm weights from N(0, 0.02), so that
    activations vanish; running statistics of 0 and 1, which all libraries have, hide a wrong fold; linear weights of
    standard deviation 0.02 make attention nearly uniform. Here norms have weights of 0.75 to 1.25 and biases around 0,
    linear layers preserve the scale of their input, and running statistics are those of a random batch.

    Args:
        name: the model's name, as in the example; None for our own network with the checkpoint's task and variant, or
            "own/s" without one.
        pretrained: load published weights from the Hugging Face hub.
        checkpoint: a file for `mvit_kernels.load_checkpoint`; the number of classes is read from it.
        num_classes: number of classes, 0 for a model without a classifier; None for the checkpoint's number, or the
            published one (1000; for segmentation 21, for detection 81, with the background).
        device: "cpu", "cuda" or "cuda:N".

    Returns:
        The model on `device`, in evaluation mode.

    Raises:
        ValueError: an unknown name (the message suggests similar ones), a model without MobileViT blocks, arguments
            that exclude each other, a device that does not exist; and as `load_checkpoint`.
        ImportError: the model's library is not installed.
        OSError: there is no such file, or published weights could not be fetched.
    """
    import torch

    from ..adapters import report

    if pretrained and checkpoint is not None:
        raise ValueError("--pretrained and --checkpoint exclude each other: give one of the two")
    where = checked_device(device)
    network, variant, weights = "mobilevit", None, None
    if checkpoint is not None:
        weights, network, variant, classes = _read_checkpoint(Path(checkpoint))
    if name is None:
        name = f"{'own' if network == 'mobilevit' else network}/{variant or 's'}"
    if (
        checkpoint is not None
        and num_classes is None
        and not name.startswith("kornia/")
        and network == network_of(name)
    ):
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
            # On smaller images a detector's last maps have one pixel, and four values are no statistics.
            randomise(model, 320 if network_of(name) == "ssdlite" else 128)
    return model.to(where)


def logits(output: Any) -> Tensor:
    """The tensor in a model's output: the logits, or a backbone's last map; the first one of several.

    Raises:
        TypeError: there is no tensor in the output.
    """
    import torch

    while not isinstance(output, torch.Tensor):
        for attribute in ("logits", "last_hidden_state"):
            if getattr(output, attribute, None) is not None:
                output = getattr(output, attribute)
                break
        else:
            if not isinstance(output, list | tuple) or not output:
                raise TypeError(f"the model returned {type(output).__name__}, which contains no tensor")
            output = output[0]
    return output


def checked_device(name: str) -> Any:
    """The ``torch.device`` of this name, "cpu", "cuda" or "cuda:N".

    Raises:
        ValueError: another name, or a GPU that does not exist.
    """
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {name}: unknown or unsupported device; give cpu, cuda or cuda:N")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if not count:
            raise ValueError(f"--device {name}: PyTorch sees no NVIDIA GPU here (torch {torch.__version__})")
        if (device.index or 0) >= count:
            raise ValueError(f"--device {name}: there are {count} GPUs, cuda:0 to cuda:{count - 1}")
    return device


def _read_checkpoint(path: Path) -> tuple[Checkpoint, str, str | None, int | None]:
    """The checkpoint, its network as by `network_of`, its variant or None if it is unknown, and its number of classes
    (0: no classifier; None: a head of other shapes than the published)."""
    from ..checkpoints import VARIANT_OF_WIDTH, read_checkpoint
    from ..checkpoints.keys import read_keys

    checkpoint = read_checkpoint(path, str(path))
    state_dict = checkpoint.state_dict
    if _is_kornia(state_dict):  # in a layout that load_checkpoint does not read
        return checkpoint, "mobilevit", None, 0
    keys = read_keys(state_dict, str(path))
    if keys.prefix:
        print(f"{path}: the network's keys are those below {keys.prefix!r}", file=sys.stderr)
    first = {own: state_dict[names[0]] for own, names in keys.found.items()}

    def length(own_key: str) -> int:
        return first[own_key].numel() if own_key in first else 0

    variant = VARIANT_OF_WIDTH.get(length("stages.4.1.norm.weight"))
    if keys.head:
        return checkpoint, keys.head.name.lower(), variant, keys.head.classes(first)
    return checkpoint, "mobilevit", variant, length("classifier.bias")


def _load_weights(model: nn.Module, name: str, checkpoint: Checkpoint, path: str) -> None:
    from ..checkpoints import load_into

    if not (name.startswith("kornia/") and _is_kornia(checkpoint.state_dict)):
        load_into(model, checkpoint, path)
        return
    try:
        model.load_state_dict(checkpoint.state_dict)
    except RuntimeError as error:
        raise ValueError(
            f"{path} has weights of Kornia's MobileViT that do not fit {name}; give another variant"
        ) from error


def _is_kornia(state_dict: dict[str, Tensor]) -> bool:
    return "conv1.0.weight" in state_dict


def randomise(model: nn.Module, size: int = 128) -> None:
    """Give `model` random weights that do not hide errors, and calibrate its batch norms on images of this size; see
    `load`."""
    import torch
    from torch import nn

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
                module.weight.uniform_(0.75, 1.25)
                module.bias.normal_(std=0.1)
            elif isinstance(module, nn.Linear):
                module.weight.normal_(std=module.in_features**-0.5)
    calibrate(model, [torch.rand(4, 3, size, size, device="cpu")])


def calibrate(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Set the running statistics of every batch norm to those of `batches`.

    As after training, no activation vanishes or explodes, and a wrongly folded batch norm changes the output.
    """
    import torch
    from torch import nn

    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative average over all batches
        norm.train()
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()
