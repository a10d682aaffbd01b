# SPDX-License-Identifier: Apache-2.0
"""ExecuTorch: a ``.pte`` file whose work XNNPACK does, where this build has it, and else portable kernels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ..._utils.third_party import import_executorch
from ..plan import Contents, Plan
from . import Loaded, Target
from ._quiet import quiet

_aten = torch.ops.aten
_DELEGATE = "XnnpackBackend"


class ExecuTorch(Target):
    """ExecuTorch in the phone form, all heads of a patch position at once, with LayerNorm's means as convolutions.

    XNNPACK reduces over the last two axes alone, so every other mean would end a part that it computes as a whole.
    """

    name, suffix, form = "executorch", ".pte", "phone"
    form_options = MappingProxyType({"one_head": False, "mean": "convolution"})

    def require(self) -> None:
        with quiet():
            import_executorch("exir")
            import_executorch("runtime")

    def write(self, network: nn.Module, plan: Plan, path: Path) -> None:
        with quiet():
            program = torch.export.export(network, (plan.example(),)).run_decompositions(_simple())
            lowered = import_executorch("exir").to_edge_transform_and_lower(program, partitioner=_partitioners())
            path.write_bytes(lowered.to_executorch().buffer)

    def load(self, path: Path, plan: Plan) -> Loaded:
        with quiet():
            program = import_executorch("runtime").Runtime.get().load_program(path.read_bytes())

        def run(images: Tensor) -> dict[str, Tensor]:
            # Loaded by every call, since a method does not keep the memory of its program, and this function does.
            outputs = program.load_method("forward").execute([images.contiguous()])
            return {name: value.clone() for name, value in zip(plan.outputs, outputs, strict=True)}

        return run

    def contents(self, path: Path) -> Contents:
        """Calls of operators by their names, and of XNNPACK, each of which is a part of the network."""
        with quiet():
            serialization = import_executorch("exir._serialize._program")
        program = serialization.deserialize_pte_binary(path.read_bytes()).program
        nodes: Counter[str] = Counter()
        highest = 0
        for plan in program.execution_plan:
            for chain in plan.chains:
                for instruction in chain.instructions:
                    arguments = instruction.instr_args
                    if hasattr(arguments, "delegate_index"):
                        nodes[plan.delegates[arguments.delegate_index].id] += 1
                    elif hasattr(arguments, "op_index"):
                        nodes[plan.operators[arguments.op_index].name] += 1
            ranks = [len(value.val.sizes) for value in plan.values if hasattr(value.val, "sizes")]
            highest = max([highest, *ranks])
        return Contents(nodes, nodes["aten::permute_copy"] + nodes["aten::transpose_copy"], highest)


def _partitioners() -> list[Any]:
    """XNNPACK's, if this build of ExecuTorch can run what it takes."""
    backends = import_executorch("runtime").Runtime.get().backend_registry
    if not backends.is_available(_DELEGATE):
        return []
    return [import_executorch("backends.xnnpack.partition.xnnpack_partitioner").XnnpackPartitioner()]


def _simple() -> dict[Any, Callable[..., Any]]:
    """Operators as those that XNNPACK takes: ExecuTorch's own way leaves an ``expand`` before each operand of a batched
    product, and a ``split``, and each ends a part."""

    def matmul(a: Tensor, b: Tensor) -> Tensor:
        batch = a.shape[:-2]
        product = torch.bmm(a.reshape(-1, *a.shape[-2:]), b.reshape(-1, *b.shape[-2:]))
        return product.reshape(*batch, a.shape[-2], b.shape[-1])

    def split(x: Tensor, size: int, dim: int = 0) -> list[Tensor]:
        return [x.narrow(dim, start, min(size, x.shape[dim] - start)) for start in range(0, x.shape[dim], size)]

    return {_aten.matmul.default: matmul, _aten.split.Tensor: split}


TARGETS = (ExecuTorch(),)
