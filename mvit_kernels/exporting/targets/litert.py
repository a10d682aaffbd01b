# SPDX-License-Identifier: Apache-2.0
"""LiteRT, formerly TensorFlow Lite: a ``.tflite`` file, through litert_torch, run by ai_edge_litert."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor, nn

from ..._utils.third_party import import_litert, import_litert_torch
from ..plan import IMAGES, Contents, Plan
from . import Loaded, Target
from ._quiet import quiet

_SIGNATURE = "serving_default"


class LiteRT(Target):
    """LiteRT in the phone form with channels last, as its convolutions have them.

    Images stay (B, C, H, W), as in all files, which takes one transpose at the start.
    """

    name, suffix, form = "litert", ".tflite", "phone"
    form_options = MappingProxyType({"channels_last": True})

    def require(self) -> None:
        with quiet():
            import_litert_torch()
            import_litert("interpreter")

    def write(self, network: nn.Module, plan: Plan, path: Path) -> None:
        with quiet():
            converted = import_litert_torch().convert(network, sample_kwargs={IMAGES: plan.example()})
            converted.export(str(path))

    def load(self, path: Path, plan: Plan) -> Loaded:
        interpreter = import_litert("interpreter").Interpreter(str(path), num_threads=torch.get_num_threads())
        runner = interpreter.get_signature_runner(_SIGNATURE)

        def run(images: Tensor) -> dict[str, Tensor]:
            found = runner(**{IMAGES: images.contiguous().numpy()})
            # The converter names them output_0, output_1 in the order of the network's.
            return {name: torch.from_numpy(found[f"output_{i}"]) for i, name in enumerate(plan.outputs)}

        return run

    def contents(self, path: Path) -> Contents:
        schema = import_litert("schema_py_generated")
        model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(path.read_bytes(), 0))
        kinds = {value: name for name, value in vars(schema.BuiltinOperator).items() if isinstance(value, int)}
        nodes: Counter[str] = Counter()
        highest = 0
        for graph in model.subgraphs:
            nodes.update(kinds[model.operatorCodes[operator.opcodeIndex].builtinCode] for operator in graph.operators)
            results = {index for operator in graph.operators for index in operator.outputs}
            ranks = [0 if graph.tensors[i].shape is None else len(graph.tensors[i].shape) for i in results]
            highest = max(highest, *ranks)
        return Contents(nodes, nodes["TRANSPOSE"], highest)

    def check(self, contents: Contents, plan: Plan) -> None:
        if (contents.highest_rank or 0) > 4:
            raise RuntimeError(
                f"export: the LiteRT file has a tensor of {contents.highest_rank} axes; with this version of "
                "litert_torch, or this model's head, the phone form does not stay within 4. Report it, and use another "
                "target until then"
            )


TARGETS = (LiteRT(),)
