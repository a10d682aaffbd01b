# SPDX-License-Identifier: Apache-2.0
"""Models in other runtimes, as peers on the CPU: built from a plain model, called with a torch tensor.

Example:
    >>> fast = OpenVino(model, images, dtype=torch.bfloat16, threads=2)
    >>> logits = fast(images)

`OnnxRuntime` and `OpenVino` run the ONNX graph that PyTorch's exporter makes of the model, with the shapes of the
example; or, if `plain`, what `mvit_kernels.export` makes of it. Images are passed and results returned as numpy views,
so that only the runtime's own work is timed. A result is the runtime's memory and valid until its next call: copy what
you want to keep. `ExportedFile` runs the file that `mvit_kernels.export` writes for any other target.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from .._utils.third_party import import_onnxruntime
from ..exporting import export as export_file
from ..exporting.plain import plain_form
from ..exporting.plan import FlatOutputs, Plan, output_names
from ..exporting.targets import target_named
from ..exporting.targets.onnx import onnx_program
from ..exporting.targets.openvino import openvino_core, openvino_model
from ..verification import named_outputs


def export(model: nn.Module, images: Tensor, *, plain: bool = False) -> tuple[bytes, list[str]]:
    """The serialized ONNX graph of `model` for the shape of `images`, and its outputs' names as in `named_outputs`.

    Args:
        model: a model without frozen modules.
        images: the example.
        plain: export the plain form, as `mvit_kernels.export` does, instead of the model as it is.

    Raises:
        ImportError: onnxscript, which PyTorch's exporter needs, is not installed.
    """
    network, plan, names = _network(model, images, plain)
    return onnx_program(network, plan).model_proto.SerializeToString(), names


def _network(model: nn.Module, images: Tensor, plain: bool) -> tuple[nn.Module, Plan, list[str]]:
    """What the exporter is given, in the plain form or as it is, and the outputs' names."""
    with torch.no_grad():
        outputs = model(images)
    batch, channels, height, width = images.shape
    plan = Plan(((height, width),), output_names(outputs), batch, channels)
    return FlatOutputs(plain_form(model, plan) if plain else model), plan, list(named_outputs(outputs))


class OnnxRuntime:
    """`model` in ONNX Runtime, in float32 on `threads` threads of the CPU.

    Raises:
        ImportError: onnxruntime or onnxscript is not installed.
        ValueError: another dtype than float32, or images on another device.
    """

    def __init__(
        self, model: nn.Module, images: Tensor, *, dtype: torch.dtype, threads: int, plain: bool = False
    ) -> None:
        _check(images, dtype, (torch.float32,), "ONNX Runtime")
        runtime = import_onnxruntime()
        graph, self._names = export(model, images, plain=plain)
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads
        # Otherwise its threads spin for a while after a call, on the cores that the next candidate needs.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        self._session = runtime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        self._input = self._session.get_inputs()[0].name

    def __call__(self, images: Tensor) -> Tensor | dict[str, Tensor]:
        return _structured(self._names, self._session.run(None, {self._input: images.numpy()}))


class OpenVino:
    """`model` in OpenVINO on `threads` threads, computing in `dtype` (float32, bfloat16); images and results are
    float32.

    With `by_image` each image is a request of its own, and as many run at the same time as there are threads, one
    thread each. This is OpenVINO's THROUGHPUT mode, which is faster than one request for the whole batch.

    Raises:
        ImportError: openvino or onnxscript is not installed.
        ValueError: a dtype that it does not support on this processor, or images on another device.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        *,
        dtype: torch.dtype,
        threads: int,
        by_image: bool = False,
        plain: bool = False,
    ) -> None:
        _check(images, dtype, (torch.float32, torch.bfloat16), "OpenVINO")
        core = openvino_core()
        example = images[:1] if by_image else images
        if plain:
            network, plan, self._names = _network(model, example, plain)
            graph = openvino_model(network, plan)
        else:
            serialized, self._names = export(model, example)
            graph = core.read_model(serialized)
        precision = "bf16" if dtype == torch.bfloat16 else "f32"
        settings = {
            "INFERENCE_PRECISION_HINT": precision,
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": threads if by_image else 1,
        }
        compiled = core.compile_model(graph, "CPU", settings)
        if compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name() != precision:
            raise ValueError(f"OpenVINO has no {precision} on this processor")
        self._requests = [compiled.create_infer_request() for _ in range(len(images) if by_image else 1)]

    def __call__(self, images: Tensor) -> Tensor | dict[str, Tensor]:
        array = images.numpy()
        if len(self._requests) == 1:
            results = self._requests[0].infer([array], share_inputs=True, share_outputs=True)
            return _structured(self._names, list(results.values()))
        for index, request in enumerate(self._requests):
            request.start_async([array[index : index + 1]], share_inputs=True)
        for request in self._requests:
            request.wait()
        parts = ([tensor.data for tensor in request.output_tensors] for request in self._requests)
        return _structured(self._names, [np.concatenate(part) for part in zip(*parts, strict=True)])


class ExportedFile:
    """`model` in the file that `mvit_kernels.export` writes for `target`, in float32 on PyTorch's number of threads of
    the CPU (ExecuTorch takes as many as there are processors).

    Raises:
        ImportError: a library of the target is not installed.
        ValueError: another dtype than float32, images on another device, or no runtime of the target on this machine.
    """

    def __init__(self, model: nn.Module, images: Tensor, *, dtype: torch.dtype, threads: int, target: str) -> None:
        chosen = target_named(target)
        _check(images, dtype, (torch.float32,), chosen.name)
        chosen.require()
        _, plan, self._names = _network(model, images, plain=False)
        self._folder = tempfile.TemporaryDirectory()  # runtimes may read the file again, or have it mapped
        path = Path(self._folder.name, f"network{chosen.suffix}")
        export_file(model, path, target=target, sizes=[plan.sizes[0]], batch=plan.batch)
        run = chosen.load(path, plan)
        if run is None:
            raise ValueError(f"{chosen.name} has no runtime on this machine")
        self._run = run

    def __call__(self, images: Tensor) -> Tensor | dict[str, Tensor]:
        return _structured(self._names, list(self._run(images).values()))


def is_installed(target: str) -> bool:
    """Whether the libraries of a target of `mvit_kernels.export` are installed."""
    try:
        target_named(target).require()
    except ImportError:
        return False
    return True


def _check(images: Tensor, dtype: torch.dtype, dtypes: tuple[torch.dtype, ...], runtime: str) -> None:
    if images.device.type != "cpu":
        raise ValueError(f"{runtime} is a peer on the CPU only, and the images are on {images.device}")
    if dtype not in dtypes:
        known = " and ".join(str(one).removeprefix("torch.") for one in dtypes)
        raise ValueError(f"{runtime} computes in {known} on the CPU, not in {str(dtype).removeprefix('torch.')}")


def _structured(names: list[str], arrays: Sequence[np.ndarray | Tensor]) -> Tensor | dict[str, Tensor]:
    """The results in a form for which `named_outputs` gives the names of the model's own outputs."""
    tensors = [torch.from_numpy(array) if isinstance(array, np.ndarray) else array for array in arrays]
    if names == ["output"]:
        return tensors[0]
    return {name.removeprefix("output."): tensor for name, tensor in zip(names, tensors, strict=True)}
