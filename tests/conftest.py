# SPDX-License-Identifier: Apache-2.0
"""What every test needs."""

import gc
import os
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

# Dozens of tests start processes. Where PYTHONDONTWRITEBYTECODE is set, as in many containers, each compiles what it
# imports: 4 of the 7 seconds that torch._dynamo takes. What is compiled goes to build/ then, which is ours to write to.
if sys.dont_write_bytecode:
    sys.dont_write_bytecode = False
    sys.pycache_prefix = os.environ["PYTHONPYCACHEPREFIX"] = str(Path(__file__).parents[1] / "build" / "bytecode")
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# Read when torch loads OpenMP. Its threads spin while they wait for each other: next to any other process, two threads
# were ten times slower than one, and the tests of threads took longer than all others.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import pytest
import torch

from mvit_kernels.__main__ import main
from mvit_kernels.backends import triton
from mvit_kernels.nn import MobileViT
from support import TESTS

torch.set_num_threads(1)  # while modules are imported, and in their fixtures

if triton.target.INTERPRETED:  # the Triton backend serves CPU tensors, and is a path of the operators' tests
    from support import bounds, interpreter

    interpreter.repair()
    bounds.check_bounds()

if os.environ.get("MVIT_KERNELS_EMULATED") == "1":  # the CUDA backend serves CPU tensors, and is a path as well
    from support import emulated  # noqa: F401

if os.environ.get("MVIT_KERNELS_COMPILED") == "1":  # the Triton backend serves CPU tensors, by its compiled kernels
    from support.ptx import serve_cpu_tensors

    serve_cpu_tensors.serve()


# Files of few tests that take half a minute and more, the longest first; before all others, then those with the most
# tests. A worker that started the first of these at the end ran on alone for four minutes. (`make test` tells xdist to
# keep this order; its own order puts them last.) Files that compile the same for CUDA's emulation are apart.
LONG = (
    "backends/cpu/test_instruction_sets backends/cpu/test_aarch64 backends/triton/test_backend bench/test_peers "
    "bench/test_bench backends/cuda/test_backend backends/cuda/test_patch_attention backends/cuda/test_rows "
    "freezing/test_models backends/cuda/test_transformer verification/test_verify adapters/test_accelerate_systems "
    "nn/test_timm_models adapters/test_torchscript ops/test_malformed_calls backends/triton/test_compile "
    "bench/test_networks bench/test_scripts bench/test_demo docs/test_site docs/test_snippets packaging/test_build "
    "packaging/test_imports packaging/test_packaging packaging/test_environment ops/test_compile nn/test_mobilevit"
).split()


def pytest_collection_modifyitems(items):
    tests = Counter(item.path for item in items)
    order = {TESTS / f"{name}.py": place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: (order.get(item.path, len(LONG)), -tests[item.path]))


def pytest_collection_finish():
    """The garbage collector passes over what is imported by now, and will stay: 700,000 objects, which made a test
    that copies a model four times take 0.45 s instead of 0.23 s."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def one_thread():
    """On a busy machine, waking a second thread for a tiny operator takes ten times as long as the operator. Tests that
    are about threads set their number, and need not set it back."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def process_group(tmp_path_factory):
    """torch.distributed with one process."""
    file = tmp_path_factory.mktemp("gloo") / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


# The command line, for the files that run it.


@pytest.fixture
def run(capsys):
    """Run a command; its exit code, and what it printed to stdout and stderr."""

    def run(*arguments):
        code = main([str(argument) for argument in arguments])
        return SimpleNamespace(code=code, **capsys.readouterr()._asdict())

    return run


@pytest.fixture
def refused(run):
    """Run a command that must fail: exit code 2, nothing on stdout, and one sentence, which is returned."""

    def refused(*arguments):
        result = run(*arguments)
        assert result.code == 2 and result.out == ""
        assert result.err.startswith("mvit-kernels: error: ") and result.err.count("\n") == 1
        return result.err

    return refused


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A checkpoint of MobileViT-XXS with 5 classes."""
    path = tmp_path_factory.mktemp("weights") / "xxs.pth"
    torch.save(MobileViT("xxs", num_classes=5).state_dict(), path)
    return path


@pytest.fixture
def photo(tmp_path):
    from PIL import Image  # here: the operators' tests run where nothing but torch and pytest is installed

    path = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)).save(path)
    return path
