# SPDX-License-Identifier: Apache-2.0
"""What a user does first, by the installed package alone; `release/try_wheel.py` runs it in a clean environment.

It ends with an error where the package comes from elsewhere than the environment, is without the libraries that the
wheel had, or computes wrongly, and prints one line of what was seen.
"""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import mvit_kernels

assert "torch" not in sys.modules, "importing mvit_kernels loads torch"
INSTALLED = Path(sysconfig.get_path("purelib"))
assert INSTALLED in Path(mvit_kernels.__file__).parents, f"{mvit_kernels.__file__} is not what was installed"

command = Path(sysconfig.get_path("scripts"), "mvit-kernels")
printed = subprocess.run([command, "info", "--json"], stdout=subprocess.PIPE, text=True, check=True).stdout
info = json.loads(printed)
assert info["backends"]["cpu"]["reasons_against"] == [], info["backends"]["cpu"]
libraries = sorted(file.name for file in INSTALLED.glob("mvit_kernels/lib/*.so"))
assert {"libmvit_kernels_cpu.so", "libmvit_runtime.so"} <= set(libraries)
for name, entry in info["libraries"].items():
    assert entry["built"] == (f"libmvit_kernels_{name}.so" in libraries), entry
    assert entry["version"] == mvit_kernels.__version__ and entry["commit"], entry
if "libmvit_kernels_cuda.so" in libraries:
    reasons = "; ".join(info["backends"]["cuda"]["reasons_against"])
    assert "does not load" not in reasons and "not built" not in reasons, reasons

from mvit_kernels import runtime  # noqa: E402

assert runtime.version() == mvit_kernels.__version__ and runtime.header_path().exists()
assert "torch" not in sys.modules, "the runtime without PyTorch loads torch"

import torch  # noqa: E402

from mvit_kernels.backends import library  # noqa: E402

for name in libraries:  # the dynamic linker finds every symbol, whatever this machine's GPU
    torch.ops.load_library(library.LIBRARY_DIRECTORY / name)

torch.manual_seed(0)
model = mvit_kernels.MobileViT("xxs", num_classes=10).eval()
x = torch.rand(2, 3, 96, 96)
with torch.inference_mode():
    usual = model(x)
    mvit_kernels.accelerate(model)
    report = mvit_kernels.report(model)
    assert len(report.accelerated) == 3 and not report.declined, report
    frozen = mvit_kernels.freeze(model)
    with mvit_kernels.use_backend("cpu"):  # by name: never in silence on anything else
        blocks = model(x)
    torch.testing.assert_close(blocks, usual, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(frozen(x), usual, rtol=1e-3, atol=1e-4)
    with tempfile.TemporaryDirectory() as folder:
        frozen.save(Path(folder, "xxs.mvit"))
        network = runtime.Network(Path(folder, "xxs.mvit"))
    assert torch.equal(torch.from_numpy(network(x.numpy())), frozen(x)), "the runtime gives other bits"
for verified in (
    mvit_kernels.verify(model, x),
    mvit_kernels.verify(model, x, gradients=True),
    mvit_kernels.verify(frozen, x, reference=model),
):
    assert verified.ok, verified
isa = info["machine"]["kernels_instruction_set"]
commit = info["libraries"]["cpu"]["commit"]
print(
    f"seen: mvit_kernels {mvit_kernels.__version__} at {commit}, {', '.join(libraries)} ({isa}); Python "
    f"{sys.version.partition(' ')[0]}, torch {torch.__version__}: info, accelerate, freeze, verify (3 ways), "
    "the runtime are right"
)
