# SPDX-License-Identifier: Apache-2.0
"""Models in ONNX Runtime and OpenVINO, as peers on the CPU: built from a plain model, called with a torch tensor.

Example:
    >>> fast = OpenVino(model, images, dtype=torch.bfloat16, threads=2)
    >>> logits = fast(images)

Both run the ONNX graph that PyTorch's exporter makes of the model, with the shapes of the example. Images are passed
and results returned as numpy views, so that only the runtime's own work is timed. A result is the runtime's memory and
valid until its next call: copy what you want to keep.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .._utils.third_party import import_onnxruntime, import_onnxscript, import_openvino
from ..verification import named_outputs


class _Flat(nn.Module):
    """The model with its outputs in a tuple, whatever their structure: ONNX graphs support no other."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(named_outputs(self.model(images)).values())


def export(model: nn.Module, images: Tensor) -> tuple[bytes, list[str]]:
    """The serialized ONNX graph of `model` for the shape of `images`, and its outputs' names as in `named_outputs`.

    Raises:
        ImportError: onnxscript, which PyTorch's exporter needs, is not installed.
    """
    import_onnxscript()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns about its own parts
        names = list(named_outputs(model(images)))
        program = torch.onnx.export(_Flat(model), (images,), dynamo=True, verbose=False)
    return program.model_proto.SerializeToString(), names


class OnnxRuntime:
    """`model` in ONNX Runtime, in float32 on `threads` threads of the CPU.

    Raises:
        ImportError: onnxruntime or onnxscript is not installed.
        ValueError: another dtype than float32, or images on another device.
    """

    def __init__(self, model: nn.Module, images: Tensor, *, dtype: torch.dtype, threads: int) -> None:
        _check(images, dtype, (torch.float32,), "ONNX Runtime")
        runtime = import_onnxruntime()
        graph, self._names = export(model, images)
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
        self, model: nn.Module, images: Tensor, *, dtype: torch.dtype, threads: int, by_image: bool = False
    ) -> None:
        _check(images, dtype, (torch.float32, torch.bfloat16), "OpenVINO")
        core = _openvino_core()
        graph, self._names = export(model, images[:1] if by_image else images)
        precision = "bf16" if dtype == torch.bfloat16 else "f32"
        settings = {
            "INFERENCE_PRECISION_HINT": precision,
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": threads if by_image else 1,
        }
        compiled = core.compile_model(core.read_model(graph), "CPU", settings)
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


@functools.cache
def _openvino_core() -> Any:
    """One core for the life of the process. OpenVINO 2026.4's CPU plugin sets an alternate signal stack for the thread
    when a core first uses it, and restores the previous one when the core is destroyed. With two cores that stack may
    already be freed, and Python's next signal handler crashes the process."""
    return import_openvino().Core()


def _check(images: Tensor, dtype: torch.dtype, dtypes: tuple[torch.dtype, ...], runtime: str) -> None:
    if images.device.type != "cpu":
        raise ValueError(f"{runtime} is a peer on the CPU only, and the images are on {images.device}")
    if dtype not in dtypes:
        known = " and ".join(str(one).removeprefix("torch.") for one in dtypes)
        raise ValueError(f"{runtime} computes in {known} on the CPU, not in {str(dtype).removeprefix('torch.')}")


def _structured(names: list[str], arrays: list[np.ndarray]) -> Tensor | dict[str, Tensor]:
    """The results in a form for which `named_outputs` gives the names of the model's own outputs."""
    tensors = [torch.from_numpy(array) for array in arrays]
    if names == ["output"]:
        return tensors[0]
    return {name.removeprefix("output."): tensor for name, tensor in zip(names, tensors, strict=True)}
