# SPDX-License-Identifier: Apache-2.0
"""Imports of the libraries whose models this package accelerates, and of its peers; all of them are optional."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType

import torch

# The two operators that torchvision's Python code expects to exist when it is imported.
_TORCHVISION_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_torchvision_library: torch.library.Library | None = None  # the schemas live as long as this object


def prepare_torchvision() -> None:
    """Import torchvision, if it is installed, in a way that also works without its compiled part.

    Example:
        >>> mvit_kernels.prepare_torchvision()
        >>> import timm  # which imports torchvision

    torchvision is compiled for one build of torch, on Linux usually the CUDA one. Beside another build its compiled
    part does not load, and ``import torchvision`` raises ``RuntimeError: operator torchvision::nms does not exist``,
    although timm and transformers need only its image transforms. In this case alone the missing schemas are declared
    and the import is repeated. Nothing is declared where torchvision works, is absent, or fails for another reason; its
    own error is raised unchanged.
    """
    global _torchvision_library
    if "torchvision" in sys.modules or importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if _torchvision_library or not ("torchvision::" in str(error) and "does not exist" in str(error)):
            raise
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]  # imported before the failure, without the schemas
        _torchvision_library = torch.library.Library("torchvision", "FRAGMENT")
        for schema in _TORCHVISION_SCHEMAS:
            _torchvision_library.define(schema)
        importlib.import_module("torchvision")


def import_timm() -> ModuleType:
    """timm, or an ImportError that says what to install."""
    return _import("timm", extra="timm", through_torchvision=True)


def import_torchvision() -> ModuleType:
    """torchvision, or an ImportError that says what to install."""
    return _import("torchvision", extra="train", through_torchvision=True)


def import_transformers() -> ModuleType:
    """Hugging Face transformers, or an ImportError that says what to install."""
    return _import("transformers", extra="huggingface", through_torchvision=True)


def import_kornia() -> ModuleType:
    """Kornia, or an ImportError that says what to install."""
    return _import("kornia", extra="kornia", through_torchvision=False)


def import_torchmetrics() -> ModuleType:
    """torchmetrics, or an ImportError that says what to install."""
    return _import("torchmetrics", extra="train", through_torchvision=True)


def import_onnxscript() -> ModuleType:
    """onnxscript, which ``torch.onnx.export`` needs, or an ImportError that says what to install."""
    return _import("onnxscript", extra="onnx", through_torchvision=False)


def import_onnxruntime() -> ModuleType:
    """ONNX Runtime, or an ImportError that says what to install."""
    return _import("onnxruntime", extra="onnx", through_torchvision=False)


def import_openvino() -> ModuleType:
    """OpenVINO, or an ImportError that says what to install."""
    # Its converter reports each use over the network from a forked process, which may crash beside torch's threads.
    # Without this package it reports nothing.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type] # Python's own way to forbid an import
    return _import("openvino", extra="openvino", through_torchvision=False)


def import_coremltools() -> ModuleType:
    """coremltools, or an ImportError that says what to install."""
    return _import("coremltools", extra="coreml", through_torchvision=False)


def import_pnnx() -> ModuleType:
    """pnnx, which writes ncnn's files, or an ImportError that says what to install."""
    return _import("pnnx", extra="ncnn", through_torchvision=False)


def import_ncnn() -> ModuleType:
    """ncnn, or an ImportError that says what to install."""
    return _import("ncnn", extra="ncnn", through_torchvision=False)


def import_litert_torch() -> ModuleType:
    """litert_torch, which writes LiteRT's files, or an ImportError that says what to install."""
    return _import("litert_torch", extra="litert", through_torchvision=False)


def import_litert(module: str) -> ModuleType:
    """A module of ai_edge_litert, such as "interpreter", or an ImportError that says what to install."""
    return _import_below("ai_edge_litert", module, extra="litert")


def import_executorch(module: str) -> ModuleType:
    """A module of executorch, such as "runtime", or an ImportError that says what to install."""
    return _import_below("executorch", module, extra="executorch")


def _import_below(package: str, module: str, *, extra: str) -> ModuleType:
    """A module of a package that is useless without it."""
    _import(package, extra=extra, through_torchvision=False)
    return _import(f"{package}.{module}", extra=extra, through_torchvision=False)


def _import(name: str, *, extra: str, through_torchvision: bool) -> ModuleType:
    if sys.modules.get(name):
        return sys.modules[name]
    if importlib.util.find_spec(name) is None:
        raise ImportError(f"{name} is not installed: pip install 'mvit_kernels[{extra}]'", name=name)
    try:
        if through_torchvision:
            prepare_torchvision()
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:
        raise ImportError(
            f"{name} is installed but does not import ({error}): "
            f"pip install --upgrade 'mvit_kernels[{extra}]', or another version of what is named",
            name=name,
        ) from error
