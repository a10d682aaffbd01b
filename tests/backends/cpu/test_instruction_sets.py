# SPDX-License-Identifier: Apache-2.0
"""Every C++ kernel on every instruction set that the processor has.

The library reads MVIT_KERNELS_CPU_ISA once, so each set is a process of its own, which runs the operators' own tests by
path ``cpu``, those of frozen networks, and the ``test_kernels_…`` of the files beside this one.
"""

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mvit_kernels.backends import cpu
from support import TESTS
from support.native import instruction_sets, skip_without_a_compiler

skip_without_a_compiler()

HERE = Path(__file__).parent
OPERATORS = (
    "layer_norm_linear",
    "patch_attention",
    "linear_residual",
    "layer_norm_mlp",
    "inverted_residual",
    "transformer",
    "batch_norm_activation",  # whose kernels are those of sets without pairs
)
OPERATORS_TESTS = [TESTS / "ops" / f"test_{name}.py" for name in OPERATORS]
OWN_TESTS = [
    HERE / f"test_{name}.py"
    for name in ("backend", "rows", "exactness", "reach", "stack", "subnormals", "winograd", "instruction_sets")
]
NETWORK_TESTS = [TESTS / "freezing" / f"test_{name}.py" for name in ("network", "network_file")]
# What Python code decides, and no kernel: whether an operator is registered, and its graph; how a library's model
# becomes a network, of which our own model's, equal to all others', stays. And float16, which no kernel knows: it is
# float32 before (csrc/cpu/float16.h). A name that has it as "bfloat16" is another.
SAME_ON_ALL = ("test_registration", "test_graph", "throughout and not own", "-float16", "[float16")

ISAS = instruction_sets()


def _processor_has(isa: str) -> bool:
    if isa == "portable":
        return True
    if platform.machine() not in ("x86_64", "AMD64"):
        return False
    flags = set(re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.M)[1].split())
    avx512 = {"avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl"}
    pairs = avx512 | {"avx512_bf16"}
    needed = {"avx2": {"avx2", "fma"}, "avx512": avx512, "avx512bf16": pairs, "amx_emulated": pairs}
    needed["amx"] = pairs | {"amx_tile", "amx_bf16"}
    return needed[isa] <= flags


def _is_preferred(isa: str) -> bool:
    """Whether it is taken where no set is named. Intel's vdpbf16ps is slow; emulation is for tests."""
    amd = platform.machine() in ("x86_64", "AMD64") and "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    return isa != "amx_emulated" and (isa != "avx512bf16" or amd)


def _python(isa: str | None, *arguments: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "MVIT_KERNELS_CPU_ISA"}
    if isa is not None:
        environment["MVIT_KERNELS_CPU_ISA"] = isa
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=300)


def test_the_best_instruction_set_is_chosen():
    best = next(isa for isa in ISAS if _processor_has(isa) and _is_preferred(isa))
    assert os.environ.get("MVIT_KERNELS_CPU_ISA", best) == cpu.instruction_set()


@pytest.mark.parametrize("isa", ISAS)
def test_every_kernel_on(isa):
    if not _processor_has(isa):
        pytest.skip(f"this processor has no {isa}")
    if isa == cpu.instruction_set():
        return  # the tests in this very process run them
    if isa == "amx_emulated" and cpu.instruction_set() == "amx":
        return  # the same kernels, whose emulated tiles test_tiles.py holds to the bits of the processor's
    # Of two of these, which have avx512's kernels for all else, the other differs in bfloat16 alone.
    like_avx512 = {"avx512", "avx512bf16", "amx_emulated", "amx"}
    dtypes = " and (bfloat16 or dtype1)" if {isa, cpu.instruction_set()} <= like_avx512 else ""
    # Folders' and files' names are keywords too: "ops and cpu" are the operators' tests of path cpu.
    tests = f"(ops and cpu or test_kernels or test_network) and not ({' or '.join(SAME_ON_ALL)})"
    run = _python(
        *(isa, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", f"{tests}{dtypes} or in_use_is"),
        *map(str, [*OPERATORS_TESTS, *NETWORK_TESTS, *OWN_TESTS]),
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) > 300


def test_the_instruction_set_in_use_is_the_one_asked_for():
    assert cpu.instruction_set() in (os.environ.get("MVIT_KERNELS_CPU_ISA"), *ISAS)
    if "MVIT_KERNELS_CPU_ISA" in os.environ:
        assert cpu.instruction_set() == os.environ["MVIT_KERNELS_CPU_ISA"]


@pytest.mark.parametrize("wrong", ["sse2", "AVX2 "])
def test_an_unknown_instruction_set_is_an_error_that_names_the_known(wrong):
    call = "import torch, mvit_kernels as m; m.patch_attention(torch.ones(1, 2, 2, 24), num_heads=2, patch_size=2)"
    run = _python(wrong, "-c", call)
    assert run.returncode == 1
    last = run.stderr.strip().splitlines()[-1]
    assert (
        f"MVIT_KERNELS_CPU_ISA is '{wrong}'" in last
        and "choose one of amx, amx_emulated, avx512bf16, avx512, avx2 and portable" in last
    )
