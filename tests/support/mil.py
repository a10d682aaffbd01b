# SPDX-License-Identifier: Apache-2.0
"""Runs Core ML's ML programs with PyTorch, in float32, for systems without Core ML: what a written file computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mvit_kernels.exporting.targets import coreml

READERS = {"FLOAT32": "read_float_data", "INT32": "read_int32_data", "UINT16": "read_uint16_data"}


def run(path: Path, images: Tensor, function: str | None = None) -> dict[str, Tensor]:
    """The outputs of a function of a ``.mlpackage``, computed operation by operation from what the file says."""
    stored = _stored(path)
    values: dict[str, Any] = {"images": images}
    used = set()
    for operation in coreml.operations(path, function):
        if operation.type == "const":
            (output,) = operation.outputs
            values[output.name] = _constant(operation, stored)
            continue
        arguments = {}
        for key, argument in operation.inputs.items():
            names = [each.name for each in argument.arguments]
            used.update(names)
            found = [values[name] for name in names]
            arguments[key] = found if key == "values" else found[0]
        results = OPERATIONS[operation.type](arguments)
        for output, result in zip(operation.outputs, results, strict=True):
            sizes = tuple(dimension.constant.size for dimension in output.type.tensorType.dimensions)
            assert tuple(result.shape) == sizes, f"{operation.type} {output.name}: {tuple(result.shape)}, not {sizes}"
            values[output.name] = result
    return {name: value for name, value in values.items() if name not in used and isinstance(value, Tensor)}


def _stored(path: Path) -> Any:
    """A reader of the values that are in a file of their own."""
    with coreml.quiet("coremltools"):
        from coremltools.libmilstoragepython import _BlobStorageReader

    (file,) = path.rglob("weight.bin")
    return _BlobStorageReader(str(file))


def _constant(operation: Any, stored: Any) -> Any:
    from coremltools.proto import MIL_pb2

    value = operation.attributes["val"]
    kind = MIL_pb2.DataType.Name(value.type.tensorType.dataType)
    if value.WhichOneof("value") == "blobFileValue":
        offset = value.blobFileValue.offset
        if kind == "FLOAT16":
            array = np.asarray(stored.read_fp16_data(offset), np.uint16).view(np.float16)
        else:
            array = np.asarray(getattr(stored, READERS[kind])(offset))
        shape = [dimension.constant.size for dimension in value.type.tensorType.dimensions]
        return torch.from_numpy(array.reshape(shape).astype(np.float32 if array.dtype.kind == "f" else np.int64))
    tensor = value.immediateValue.tensor
    field = tensor.WhichOneof("value")
    if field == "bytes":  # of the types that a message has no field for
        items = np.frombuffer(tensor.bytes.values, np.dtype(kind.lower())).tolist()
    else:
        items = list(getattr(tensor, field).values)
    if not value.type.tensorType.rank:
        return items[0]
    return torch.tensor(items) if isinstance(items[0], float) else items


def _ints(value: Any) -> list[int]:
    return [int(each) for each in (value.tolist() if isinstance(value, Tensor) else value)]


def _conv(a: dict[str, Any]) -> Tensor:
    assert a["pad_type"] in ("custom", "valid")
    top, bottom, left, right = _ints(a["pad"]) if a["pad_type"] == "custom" else (0, 0, 0, 0)
    x = F.pad(a["x"], (left, right, top, bottom))
    strides, dilations = _ints(a["strides"]), _ints(a["dilations"])
    return F.conv2d(x, a["weight"], a.get("bias"), strides, 0, dilations, int(a["groups"]))


def _matmul(a: dict[str, Any]) -> Tensor:
    x, y = a["x"], a["y"]
    return (x.mT if a["transpose_x"] else x) @ (y.mT if a["transpose_y"] else y)


def _slice(a: dict[str, Any]) -> Tensor:
    x, begin, end = a["x"], _ints(a["begin"]), _ints(a["end"])
    every = [False] * x.dim()
    whole = list(a.get("end_mask", every))
    squeezed = list(a.get("squeeze_mask", every))
    assert not any(squeezed)
    strides = _ints(a["stride"]) if "stride" in a else [1] * x.dim()
    return x[tuple(slice(b, None if m else e, s) for b, e, m, s in zip(begin, end, whole, strides, strict=True))]


def _split(a: dict[str, Any]) -> tuple[Tensor, ...]:
    axis = int(a["axis"])
    if "split_sizes" in a:
        return a["x"].split(_ints(a["split_sizes"]), axis)
    return a["x"].chunk(int(a["num_splits"]), axis)


def _layer_norm(a: dict[str, Any]) -> Tensor:
    x, axes = a["x"], _ints(a["axes"])
    assert "gamma" not in a and "beta" not in a
    x = x - x.mean(axes, keepdim=True)
    return x * torch.rsqrt(x.square().mean(axes, keepdim=True) + float(a["epsilon"]))


def _upsample(a: dict[str, Any]) -> Tensor:
    assert not a["align_corners"]
    size = [
        round(n * float(a[f"scale_factor_{way}"])) for n, way in zip(a["x"].shape[2:], ("height", "width"), strict=True)
    ]
    return F.interpolate(a["x"], size=size, mode="bilinear", align_corners=False)


def _one(function: Callable[[dict[str, Any]], Tensor]) -> Callable[[dict[str, Any]], tuple[Tensor, ...]]:
    return lambda arguments: (function(arguments),)


# An operation that is not here is one that the phone form should not need.
OPERATIONS: dict[str, Callable[[dict[str, Any]], tuple[Tensor, ...]]] = {"split": _split} | {
    name: _one(function)
    for name, function in {
        "add": lambda a: a["x"] + a["y"],
        "cast": lambda a: a["x"],
        "concat": lambda a: torch.cat(a["values"], int(a["axis"])),
        "conv": _conv,
        "layer_norm": _layer_norm,
        "linear": lambda a: F.linear(a["x"], a["weight"], a["bias"]),
        "matmul": _matmul,
        "mul": lambda a: a["x"] * a["y"],
        "pixel_shuffle": lambda a: F.pixel_shuffle(a["x"], int(a["upscale_factor"])),
        "pixel_unshuffle": lambda a: F.pixel_unshuffle(a["x"], int(a["downscale_factor"])),
        "reduce_mean": lambda a: a["x"].mean(_ints(a["axes"]), keepdim=bool(a["keep_dims"])),
        "relu": lambda a: F.relu(a["x"]),
        "reshape": lambda a: a["x"].reshape(_ints(a["shape"])),
        "silu": lambda a: F.silu(a["x"]),
        "slice_by_index": _slice,
        "softmax": lambda a: a["x"].softmax(int(a["axis"])),
        "squeeze": lambda a: a["x"].squeeze(tuple(_ints(a["axes"]))),
        "upsample_bilinear": _upsample,
    }.items()
}
