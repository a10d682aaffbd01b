# SPDX-License-Identifier: Apache-2.0
"""Checks of arguments that several public functions take."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import nn


def check_model(function: str, model: Any) -> None:
    """Check that the argument `model` of the public `function` is a module.

    Raises:
        TypeError: it is not; the message says what to give instead of what came.
    """
    if isinstance(model, nn.Module):
        return
    came, instead = type(model).__name__, 'such as timm.create_model("mobilevit_s")'
    if isinstance(model, type):
        came, instead = f"the class {model.__name__}", f"which {model.__name__}(…) makes"
    elif isinstance(model, str | os.PathLike):
        came = f"the {came} {os.fspath(model)!r}"
        if os.path.splitext(model)[1]:
            instead = "into which mvit_kernels.load_checkpoint loads a file"
        elif isinstance(model, str):
            instead = f"such as timm.create_model({model!r})"
    elif isinstance(model, Mapping):
        instead = "into which model.load_state_dict loads weights"
    elif isinstance(model, list | tuple) and any(isinstance(each, nn.Module) for each in model):
        instead = f"such as one element of this {came}"
    raise TypeError(f"{function}: model is {came}; a torch.nn.Module is wanted, {instead}")
