# SPDX-License-Identifier: Apache-2.0
"""Core ML, for Apple's devices: an ML program in a ``.mlpackage``, converted on any system from ``torch.export``.

No runtime exists outside macOS, so the written program is checked instead: no transpose, no tensor of more than four
axes, and every weight of the network, rounded once.

A file for several sizes has a function for each, with the same weights, named ``images_<height>x<width>``; the first is
the default. One function that takes several would decide about shapes while it runs, and could not fold a resize away
that only some sizes need.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import nn

from ..._utils.third_party import import_coremltools
from ..plan import IMAGES, Contents, Plan
from . import Target
from ._quiet import quiet

_LOGGER = "coremltools"
_HIGHEST_RANK = 4


class CoreML(Target):
    """Core ML in the phone form, one head of attention after another."""

    name, suffix, form = "coreml", ".mlpackage", "phone"
    form_options = MappingProxyType({"one_head": True})
    dtypes = (torch.float32, torch.float16)
    casts_network = False
    enumerated_sizes = True

    def require(self) -> None:
        with quiet(_LOGGER):
            import_coremltools()

    def write(self, network: nn.Module, plan: Plan, path: Path) -> None:
        with quiet(_LOGGER):
            if len(plan.sizes) == 1:
                self._write_one(network, plan, plan.sizes[0], path)
            else:
                self._write_several(network, plan, path)

    def _write_several(self, network: nn.Module, plan: Plan, path: Path) -> None:
        tools = import_coremltools()
        functions = tools.utils.MultiFunctionDescriptor()
        with tempfile.TemporaryDirectory() as folder:
            for height, width in plan.sizes:
                name = f"{IMAGES}_{height}x{width}"
                one = Path(folder, f"{name}{self.suffix}")
                self._write_one(network, plan, (height, width), one)
                functions.add_function(str(one), src_function_name="main", target_function_name=name)
            functions.default_function_name = "{}_{}x{}".format(IMAGES, *plan.sizes[0])
            tools.utils.save_multifunction(functions, str(path))

    def _write_one(self, network: nn.Module, plan: Plan, size: tuple[int, int], path: Path) -> None:
        tools = import_coremltools()
        example = plan.example(size)
        program = torch.export.export(network, (example,)).run_decompositions({})
        passes = tools.PassPipeline.DEFAULT
        # It makes a batch norm of a product and a sum, with an epsilon of 1e-5 beside the variance of 1: off by 5e-6.
        passes.remove_passes({"common::fuse_elementwise_to_batchnorm"})
        model = tools.convert(
            program,
            inputs=[tools.TensorType(name=IMAGES, shape=tuple(example.shape), dtype=np.float32)],
            outputs=[tools.TensorType(name=name, dtype=np.float32) for name in plan.outputs],
            convert_to="mlprogram",
            compute_precision=tools.precision.FLOAT16 if plan.dtype == torch.float16 else tools.precision.FLOAT32,
            # Functions that share their weights came with iOS 18, pixel_unshuffle with iOS 16.
            minimum_deployment_target=tools.target.iOS16 if len(plan.sizes) == 1 else tools.target.iOS18,
            pass_pipeline=passes,
            skip_model_load=True,
        )
        model.short_description = (
            f"MobileViT, images {IMAGES} of {plan.batch} x {plan.channels} x {size[0]} x {size[1]}"
        )
        model.user_defined_metadata["mvit_kernels.form"] = self.form
        model.save(str(path))
        _check_weights(network, path)

    def load(self, path: Path, plan: Plan) -> None:
        return None

    def contents(self, path: Path) -> Contents:
        nodes: Counter[str] = Counter()
        highest = 0
        for operation in operations(path):
            if operation.type == "const":
                continue
            nodes[operation.type] += 1
            highest = max(highest, *(output.type.tensorType.rank for output in operation.outputs))
        return Contents(nodes, nodes["transpose"], highest)

    def check(self, contents: Contents, plan: Plan) -> None:
        if contents.transposes or (contents.highest_rank or 0) > _HIGHEST_RANK:
            raise RuntimeError(
                f"export: the Core ML program has {contents.transposes} transposes and a tensor of "
                f"{contents.highest_rank} axes; with this version of coremltools, or this model's head, the phone form "
                "does not stay within 0 and 4. Report it, and use another target until then"
            )


def operations(path: Path, function: str | None = None) -> Iterator[Any]:
    """The operations of a ``.mlpackage``, as messages of Core ML's specification: of one function, or of all."""
    with quiet(_LOGGER):
        specification = import_coremltools().models.MLModel(str(path), skip_model_load=True).get_spec()
    for name, found in specification.mlProgram.functions.items():
        if function in (None, name):
            yield from found.block_specializations[found.opset].operations


def weights(path: Path) -> dict[str, np.ndarray]:
    """The constants of a ``.mlpackage`` with one function, by name."""
    with quiet(_LOGGER):
        tools = import_coremltools()
        from coremltools import optimize

        model = tools.models.MLModel(str(path), skip_model_load=True)
        found = optimize.coreml.get_weights_metadata(model, weight_threshold=1)
    return {name: constant.val for name, constant in found.items()}


def _check_weights(network: nn.Module, path: Path) -> None:
    """Hold the file's constants to the weights of the network's convolutions and linear layers."""
    values = [value for value in weights(path).values() if np.issubdtype(value.dtype, np.floating)]
    if not all(np.isfinite(value).all() for value in values):
        raise RuntimeError(
            "export: a weight is not finite in the Core ML file; float16 ends at 65504, so give dtype=torch.float32"
        )
    written = {value.tobytes() for value in values}
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            wanted = module.weight.detach().contiguous().numpy()
            if not any(wanted.astype(dtype).tobytes() in written for dtype in (np.float32, np.float16)):
                raise RuntimeError(
                    f"export: the weight of {name} is not in the Core ML file, or not as it was; report it with the "
                    "version of coremltools"
                )


TARGETS = (CoreML(),)
