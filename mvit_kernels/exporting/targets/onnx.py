# SPDX-License-Identifier: Apache-2.0
"""ONNX, for ONNX Runtime and whatever else reads it."""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..._utils.third_party import import_onnxruntime, import_onnxscript
from ..plan import IMAGES, Contents, Plan
from . import Loaded, Target
from .torch import dynamic_shapes

# In 18 attention is written out: for whatever reads ONNX. In 23 it is one node, 2 to 3 % faster on a CPU, which ONNX
# Runtime has had since 1.23; but its 1.24 still runs that node on the CPU where all others run on a GPU, and providers
# for phones and TensorRT leave out nodes that they do not know.
OPSETS = (18, 23)


def in_opset(plan: Plan, opset: int) -> Plan:
    """The plan of a graph in `opset`, with attention as it has it."""
    return plan._replace(opset=opset, attention="onnx" if opset >= 23 else "products")


def onnx_program(network: nn.Module, plan: Plan) -> Any:
    """The ``torch.onnx.ONNXProgram`` of `network`, whose outputs are a tuple.

    Raises:
        ImportError: onnxscript, which PyTorch's exporter needs, is not installed.
    """
    import_onnxscript()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns about its own parts
        return torch.onnx.export(
            network,
            (plan.example(),),
            dynamo=True,
            verbose=False,
            opset_version=plan.opset,
            input_names=[IMAGES],
            output_names=list(plan.outputs),
            dynamic_shapes=dynamic_shapes(plan),
        )


class Onnx(Target):
    """ONNX in the plain form.

    Half precision is for runtimes on a GPU: ONNX Runtime on a CPU converts every node to float32 and back.
    """

    name, suffix, form = "onnx", ".onnx", "plain"
    dtypes = (torch.float32, torch.float16)
    opsets = OPSETS
    dynamic_batch = dynamic_batch_is_free = dynamic_size = True

    def require(self) -> None:
        import_onnxscript()
        import_onnxruntime()

    def write(self, network: nn.Module, plan: Plan, path: Path) -> None:
        path.write_bytes(onnx_program(network, plan).model_proto.SerializeToString())

    def load(self, path: Path, plan: Plan) -> Loaded:
        runtime = import_onnxruntime()
        session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]

        def run(images: Tensor) -> dict[str, Tensor]:
            arrays = session.run(None, {IMAGES: images.contiguous().numpy()})
            return {name: torch.from_numpy(array) for name, array in zip(names, arrays, strict=True)}

        return run

    def contents(self, path: Path) -> Contents:
        import onnx

        model = onnx.load(str(path))
        nodes = Counter(node.op_type for node in model.graph.node if node.op_type != "Constant")
        nodes.update(node.op_type for function in model.functions for node in function.node)
        values = (*model.graph.value_info, *model.graph.input, *model.graph.output)
        ranks = [len(value.type.tensor_type.shape.dim) for value in values]
        return Contents(nodes, nodes["Transpose"], max(ranks, default=None))


TARGETS = (Onnx(),)
