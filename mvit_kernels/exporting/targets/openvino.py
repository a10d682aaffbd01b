# SPDX-License-Identifier: Apache-2.0
"""OpenVINO's own format: NAME.xml with the graph and NAME.bin with the weights, made from the ONNX graph.

Attention is written out (opset 18): OpenVINO's reader makes 54 transposes of nine Attention nodes, and 36 of these, to
be run at the same speed.
"""

from __future__ import annotations

import functools
import io
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..._utils.third_party import import_onnxscript, import_openvino
from ..plan import Contents, Plan
from . import Loaded, Target
from .onnx import onnx_program


@functools.cache
def openvino_core() -> Any:
    """One core for the life of the process. OpenVINO 2026.4's CPU plugin sets an alternate signal stack for the thread
    when a core first uses it, and restores the previous one when the core is destroyed. With two cores that stack may
    already be freed, and Python's next signal handler crashes the process."""
    return import_openvino().Core()


def openvino_model(network: nn.Module, plan: Plan) -> Any:
    """The ``openvino.Model`` of `network`. Converted, not only read: 328 nodes of XXS instead of 708, 103 of which ask
    for shapes that are known."""
    graph = onnx_program(network, plan).model_proto.SerializeToString()
    return import_openvino().convert_model(io.BytesIO(graph))


class OpenVino(Target):
    """OpenVINO in the plain form.

    float16 files have half the bytes; a processor computes in what OpenVINO chooses for it, or in what its
    INFERENCE_PRECISION_HINT says. With a dynamic batch or size a call takes a tenth longer, measured at batch 1.
    """

    name, suffix, form = "openvino", ".xml", "plain"
    dtypes = (torch.float32, torch.float16)
    casts_network = False
    dynamic_batch = dynamic_size = True

    def require(self) -> None:
        import_onnxscript()
        import_openvino()

    def write(self, network: nn.Module, plan: Plan, path: Path) -> None:
        import_openvino().save_model(openvino_model(network, plan), path, compress_to_fp16=plan.dtype == torch.float16)

    def load(self, path: Path, plan: Plan) -> Loaded:
        # f32: a processor with bfloat16 products would use them, and a difference would say nothing about the file.
        compiled = openvino_core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        names = [output.get_any_name() for output in compiled.outputs]

        def run(images: Tensor) -> dict[str, Tensor]:
            results = compiled([images.contiguous().numpy()])
            return {name: torch.from_numpy(results[index].copy()) for index, name in enumerate(names)}

        return run

    def contents(self, path: Path) -> Contents:
        nodes: Counter[str] = Counter()
        ranks = []
        for node in openvino_core().read_model(str(path)).get_ordered_ops():
            if node.get_type_name() not in ("Constant", "Parameter", "Result"):
                nodes[node.get_type_name()] += 1
                ranks += [output.get_partial_shape().rank.get_length() for output in node.outputs()]
        return Contents(nodes, nodes["Transpose"], max(ranks, default=None))


TARGETS = (OpenVino(),)
