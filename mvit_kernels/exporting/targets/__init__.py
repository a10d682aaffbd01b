# SPDX-License-Identifier: Apache-2.0
"""The formats that `export` writes, one module each; a module is imported when its target is asked for.

Example:
    >>> target = target_named("onnx")
    >>> target.write(network, plan, path)
    >>> outputs = target.load(path, plan)(images)
"""

from __future__ import annotations

import abc
import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ..plan import Contents, Plan

# name -> module below this package with `TARGET`
TARGETS = {
    "onnx": "onnx",
    "openvino": "openvino",
    "coreml": "coreml",
    "ncnn": "ncnn",
    "litert": "litert",
    "executorch": "executorch",
    "torch": "torch",
    "aotinductor": "torch",
}

Loaded = Callable[[Tensor], dict[str, Tensor]]  # float32 images (B, C, H, W) -> named float32 outputs


class Target(abc.ABC):
    """A format of files: what it can hold, how it is written, and how what was written is run.

    `network` below is an ordinary PyTorch module in evaluation mode, in `form`, that takes float32 images and returns
    a tuple of float32 tensors, one for each of ``plan.outputs``. It computes in ``plan.dtype`` unless
    `casts_network` is False: such a target rounds the weights of a float32 network itself.
    """

    name: str  # as in ``export(target=name)``
    suffix: str  # of the path, such as ".onnx"
    form: str  # "plain" or "phone", see `mvit_kernels.exporting.forms`
    form_options: Mapping[str, Any] = MappingProxyType({})  # of the form's function, such as `phone_form`
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    casts_network: bool = True
    attention: str = "products"  # how the plain form computes it, see `mvit_kernels.exporting.plain`
    opsets: tuple[int, ...] = ()  # of ONNX's operators that it can be written in; the first is the default
    slack: float = 8.0  # how many times PyTorch's own error is allowed, see `mvit_kernels.exporting.comparison`
    dynamic_batch: bool = False  # whether a file can take any number of images
    dynamic_batch_is_free: bool = False  # whether that costs no time, so that it is the default
    dynamic_size: bool = False  # whether a file can take images of any size
    enumerated_sizes: bool = False  # whether a file can take images of several given sizes

    @abc.abstractmethod
    def require(self) -> None:
        """Import what `write` needs, so that what is missing is said before any work is done.

        Raises:
            ImportError: a library is missing; the error names the extra to install.
        """

    @abc.abstractmethod
    def write(self, network: nn.Module, plan: Plan, path: Path) -> None:
        """Write `network` to `path`, whose suffix is `suffix`. Further files have the same stem and folder, in which
        nothing else is."""

    @abc.abstractmethod
    def load(self, path: Path, plan: Plan) -> Loaded | None:
        """A function that runs the file; None where this machine has no runtime for it.

        Raises:
            ImportError: the runtime exists for this machine, but is not installed; the error names the extra.
        """

    @abc.abstractmethod
    def contents(self, path: Path) -> Contents:
        """What the file consists of, read from the file."""

    def check(self, contents: Contents, plan: Plan) -> None:  # noqa: B027 # most promise nothing of the kind
        """Raise RuntimeError where the file breaks what the target's form promises, such as a highest rank."""


def target_named(name: str) -> Target:
    """The target of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in TARGETS:
        raise ValueError(f"export: target is {name!r}; one of {', '.join(TARGETS)} is wanted")
    module = importlib.import_module(f"{__name__}.{TARGETS[name]}")
    return next(target for target in module.TARGETS if target.name == name)
