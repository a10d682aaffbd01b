# SPDX-License-Identifier: Apache-2.0
"""ncnn, through pnnx: a ``.param`` file with the layers and a ``.bin`` file with the weights beside it."""

from __future__ import annotations

import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor, nn

from ..._utils.third_party import import_ncnn, import_pnnx
from ..plan import IMAGES, Contents, Plan
from . import Loaded, Target
from ._quiet import quiet

_NO_WORK = ("Input", "Split", "MemoryData")  # names for values, and constants


class Ncnn(Target):
    """ncnn in the phone form, all heads of a patch position at once.

    One head after another has three times the layers, and takes 3 % longer (mobilevit_xxs at 256 px, one core of an
    Intel Xeon: 19.6 instead of 19.0 ms, measured once). ``dtype=torch.float16`` is the weights' in the file; the
    application's ``ncnn::Option`` chooses that of the arithmetic.
    """

    name, suffix, form = "ncnn", ".param", "phone"
    form_options = MappingProxyType({"one_head": False})
    dtypes = (torch.float32, torch.float16)
    casts_network = False

    def require(self) -> None:
        import_pnnx()
        import_ncnn()

    def write(self, network: nn.Module, plan: Plan, path: Path) -> None:
        if plan.batch != 1:
            raise ValueError(f"export: batch is {plan.batch}; ncnn's maps have no batch axis, so batch=1 is wanted")
        example = plan.example()
        with tempfile.TemporaryDirectory() as folder:
            with quiet():
                torch.jit.save(torch.jit.trace(network, example, check_trace=False), f"{folder}/network.pt")
            command = [
                import_pnnx().EXEC_PATH,
                "network.pt",
                f"inputshape={list(example.shape)}".replace(" ", ""),
                f"fp16={int(plan.dtype == torch.float16)}",
            ]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
            param, weights = Path(folder, "network.ncnn.param"), Path(folder, "network.ncnn.bin")
            if done.returncode or not param.exists():
                raise RuntimeError(f"export: pnnx failed with status {done.returncode}:\n{done.stdout}{done.stderr}")
            path.write_text(_renamed(param.read_text(), plan.outputs))
            path.with_suffix(".bin").write_bytes(weights.read_bytes())

    def load(self, path: Path, plan: Plan) -> Loaded:
        ncnn = import_ncnn()
        net = ncnn.Net()
        for option in ("use_fp16_packed", "use_fp16_storage", "use_fp16_arithmetic", "use_vulkan_compute"):
            setattr(net.opt, option, False)  # the arithmetic of a file is compared in float32
        net.opt.num_threads = torch.get_num_threads()
        with quiet():
            failed = net.load_param(str(path)) or net.load_model(str(path.with_suffix(".bin")))
        if failed:
            raise RuntimeError(f"export: ncnn {ncnn.__version__} does not load what pnnx wrote, {path}")

        def run(images: Tensor) -> dict[str, Tensor]:
            (image,) = images.contiguous().numpy()
            results = {}
            with net.create_extractor() as extractor:
                extractor.input(IMAGES, ncnn.Mat(image).clone())
                for name in plan.outputs:
                    status, result = extractor.extract(name)
                    if status:
                        raise RuntimeError(f"export: ncnn fails to compute {name!r} of {path}, with status {status}")
                    results[name] = torch.from_numpy(np.array(result))[None]
            return results

        return run

    def contents(self, path: Path) -> Contents:
        nodes = Counter(line.split()[0] for line in path.read_text().splitlines()[2:])
        for kind in _NO_WORK:
            del nodes[kind]
        return Contents(nodes, nodes["Permute"])


def _renamed(param: str, outputs: tuple[str, ...]) -> str:
    """The layers with the names of all files for input and outputs, instead of pnnx's in0, out0, out1."""
    names = {"in0": IMAGES} | {f"out{index}": name for index, name in enumerate(outputs)}
    return "\n".join(" ".join(names.get(word, word) for word in line.split()) for line in param.splitlines()) + "\n"


TARGETS = (Ncnn(),)
