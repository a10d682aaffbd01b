# SPDX-License-Identifier: Apache-2.0
"""The runtime without PyTorch: what it takes and refuses, alone and from several threads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

import mvit_kernels
from mvit_kernels import MobileViT, runtime
from support import ROOT
from support.native import skip_without_a_compiler

skip_without_a_compiler()

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(scope="module")
def frozen() -> torch.nn.Module:
    torch.manual_seed(0)
    return mvit_kernels.freeze(MobileViT("xxs", num_classes=11).eval())


@pytest.fixture(scope="module")
def path(frozen, tmp_path_factory) -> str:
    file = tmp_path_factory.mktemp("runtime") / "größe xxs.mvit"
    labels = [f"class {i}" for i in range(11)]
    frozen.save(file, labels=labels, preprocessing={"mean": MEAN, "std": STD}, size=(64, 96))
    return str(file)


@pytest.fixture(scope="module")
def network(path):
    with runtime.Network(path, threads=2) as opened:
        yield opened


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((3, 3, 64, 96), dtype=np.float32)


def _printed(code: str, path: str) -> str:
    """By `code`, which must succeed, in a process of its own whose argument is the file."""
    run = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return run.stdout


def of_torch(frozen, images: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return frozen(torch.from_numpy(np.ascontiguousarray(images))).numpy()


def test_logits_are_the_frozen_models_bits(network, frozen, images):
    logits = network(images)
    assert logits.shape == (3, 11) and logits.dtype == np.float32
    assert np.array_equal(logits, of_torch(frozen, images))
    assert np.array_equal(network(images.transpose(0, 2, 3, 1), "NHWC"), logits)
    other = images[:1, :, :50, :41]
    assert np.array_equal(network(other), of_torch(frozen, other))


def test_what_the_file_says(network):
    assert network.input_shape == (3, 64, 96) and network.labels == [f"class {i}" for i in range(11)]
    assert tuple(network.preprocessing["mean"]) == MEAN and network.metadata["result"] == "vector"
    assert network.threads == 2 and runtime.instruction_set() and runtime.version() == mvit_kernels.__version__


def test_bytes_of_a_photo_are_normalized_as_torchvision_does(network, frozen):
    pixels = np.random.default_rng(1).integers(0, 256, (2, 64, 96, 3), dtype=np.uint8)
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div(255)
    x = x.sub(torch.tensor(MEAN)[:, None, None]).div(torch.tensor(STD)[:, None, None])
    expected = of_torch(frozen, x.numpy())
    assert np.array_equal(network(pixels), expected)
    assert np.array_equal(network(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)), "NCHW"), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_for_a_network_that_takes_bgr(frozen, dtype, tmp_path):
    half = mvit_kernels.freeze(MobileViT("xxs", num_classes=4).eval(), dtype=dtype)
    mean, std = (0.1, 0.2, 0.3), (1.0, 0.5, 0.25)
    half.save(tmp_path / "bgr.mvit", preprocessing={"mean": mean, "std": std, "channel_order": "BGR"})
    pixels = np.random.default_rng(2).integers(0, 256, (1, 32, 32, 3), dtype=np.uint8)
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div(255)
    x = x.sub(torch.tensor(mean)[:, None, None]).div(torch.tensor(std)[:, None, None]).flip(1)
    with torch.inference_mode(), runtime.Network(str(tmp_path / "bgr.mvit")) as network:
        assert np.array_equal(network(pixels), half(x).float().numpy())


def test_several_threads_at_the_same_time(network, frozen, images):
    expected = [of_torch(frozen, images[i : i + 1]) for i in range(3)]
    wrong = []

    def work(index: int) -> None:
        for _ in range(20):
            if not np.array_equal(network(images[index : index + 1]), expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_every_thread_takes_images(path):
    """One that computes an image needs memory of its own for the maps: its page faults are counted. In a new process,
    for a thread may get memory that another, which has ended, left in place."""
    code = (
        "import sys, numpy; from pathlib import Path; from mvit_kernels import runtime\n"
        "def faults():\n"
        "    stats = {task.name: (task / 'stat').read_text() for task in Path('/proc/self/task').iterdir()}\n"
        "    return {task: int(stat.rpartition(')')[2].split()[7]) for task, stat in stats.items()}\n"
        "before = faults()\n"
        "with runtime.Network(sys.argv[1], threads=3) as network:\n"
        "    workers = faults().keys() - before.keys()\n"
        "    assert len(workers) == 2, workers\n"
        "    x = numpy.zeros((12, 3, 128, 128), numpy.float32)\n"
        "    for _ in range(100):  # on one processor the others may do all of a few calls\n"
        "        network(x)\n"
        "        if all(faults()[worker] > 30 for worker in workers):\n"
        "            break\n"
        "    else:\n"
        "        raise AssertionError(faults())\n"
    )
    _printed(code, path)


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists() or "VmFlags" not in Path("/proc/self/smaps").read_text(),
    reason="this system has no huge pages for the asking, or does not say where",
)
def test_weights_and_maps_are_asked_for_in_huge_pages(path):
    """Whether the system gives them or not. In a process that has asked for none before."""
    code = (
        "import sys, numpy; from pathlib import Path; from mvit_kernels import runtime\n"
        "def asked():\n"
        "    size = total = 0  # in KB\n"
        "    for line in Path('/proc/self/smaps').read_text().splitlines():\n"
        "        name, _, rest = line.partition(':')\n"
        "        size = int(rest.split()[0]) if name == 'Size' else size\n"
        "        total += size if name == 'VmFlags' and 'hg' in rest.split() else 0\n"
        "    return total\n"
        "counts = [asked()]\n"
        "with runtime.Network(sys.argv[1], threads=1) as network:\n"
        "    counts.append(asked())\n"
        "    network(numpy.zeros((1, 3, 256, 256), numpy.float32))\n"
        "    print(*counts, asked())\n"
    )
    before, weights, maps = map(int, _printed(code, path).split())
    assert weights - before >= 2048 and maps - weights >= 2048, (before, weights, maps)


def test_a_forked_process_runs_and_ends(path):
    """A fork has the network and none of its threads."""
    code = (
        "import os, sys, numpy; from mvit_kernels import runtime\n"
        "n, x = runtime.Network(sys.argv[1], threads=3), numpy.ones((1, 3, 64, 96), numpy.float32)\n"
        "y = n(x); child = os.fork()\n"
        "if not child:\n"
        "    same = numpy.array_equal(n(x), y); n.close(); os._exit(7 if same else 1)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), numpy.array_equal(n(x), y))"
    )
    assert _printed(code, path).split() == ["7", "True"]


@pytest.mark.parametrize(
    "call, error, says",
    [
        (lambda n, x: n(x.tolist()), TypeError, "images are list; an array of uint8 or float32 is wanted"),
        (lambda n, x: n(x.astype(np.float64)), TypeError, "images are float64"),
        (lambda n, x: n(x[0]), ValueError, r"images are \(3, 64, 96\); \(batch, 3, H, W\) is wanted"),
        (lambda n, x: n(x[:, :2]), ValueError, r"images are \(3, 2, 64, 96\)"),
        (lambda n, x: n(x, "NHWC"), ValueError, r"\(batch, H, W, 3\) is wanted"),
        (lambda n, x: n(x, "HWC"), ValueError, "layout is 'HWC'"),
        (lambda n, x: n(x[:0]), RuntimeError, "mvit_output_shape: images of 0 x 64 x 96 are none"),
        (lambda n, x: setattr(n, "threads", 0), RuntimeError, "mvit_set_threads: threads is 0; 1 to 1024"),
    ],
)
def test_wrong_calls(network, images, call, error, says):
    with pytest.raises(error, match=says):
        call(network, images)


def test_bytes_without_a_normalization_are_refused(frozen, tmp_path):
    frozen.save(tmp_path / "plain.mvit", preprocessing={"mean": None, "std": None})
    with runtime.Network(tmp_path / "plain.mvit") as network:
        with pytest.raises(RuntimeError, match="mvit_run: the file does not say how uint8 images are normalized"):
            network(np.zeros((1, 32, 32, 3), np.uint8))


def test_a_closed_network(path):
    network = runtime.Network(path)
    network.close()
    network.close()
    with pytest.raises(ValueError, match="it is closed"):
        network(np.zeros((1, 3, 32, 32), np.float32))


def test_files_that_are_none(path, tmp_path):
    with open(path, "rb") as stream:
        content = stream.read()
    for name, wrong, says in (
        ("empty", b"", "this is no file of a frozen network"),
        ("foreign", b"PK\3\4" * 100, "this is no file of a frozen network"),
        ("cut", content[:-1], "it has .* bytes and should have"),
        ("longer", content + b"\0", "it has .* bytes and should have"),
        ("flipped", content[:-9] + bytes([content[-9] ^ 1]) + content[-8:], "its checksum is another"),
        ("newer", content[:8] + b"\2" + content[9:], "the file has format 2, and this library reads format 1"),
        ("text mode", content.replace(b"\r\n", b"\n"), "this is no file of a frozen network"),
    ):
        file = tmp_path / name
        file.write_bytes(wrong)
        with pytest.raises(RuntimeError, match=f"mvit_open: {file}: .*{says}"):
            runtime.Network(file)
        with pytest.raises(RuntimeError, match=f"mvit_open_memory: .*{says}"):
            runtime.Network(wrong)
        with pytest.raises(ValueError, match=f"load: {file}: "):
            mvit_kernels.load(file)
    with pytest.raises(RuntimeError, match="mvit_open: .*nowhere: No such file or directory"):
        runtime.Network(tmp_path / "nowhere")
    with pytest.raises(RuntimeError, match="mvit_open: "):
        runtime.Network(tmp_path)


def test_it_imports_neither_torch_nor_anything_that_has_it(path):
    code = (
        "import sys, json, numpy; from mvit_kernels import runtime\n"
        "n = runtime.Network(sys.argv[1]); y = n(numpy.ones((1, 3, 64, 96), numpy.float32))\n"
        "print(json.dumps([sorted(m for m in sys.modules if 'torch' in m), y.tolist()]))"
    )
    modules, logits = json.loads(_printed(code, path))
    assert modules == []
    with runtime.Network(path) as network:
        assert np.array_equal(np.float32(logits), network(np.ones((1, 3, 64, 96), np.float32)))


def _told(*command: object) -> str:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True).stdout


def test_the_library_is_small_and_needs_the_systems_libraries_alone():
    library = runtime.library_path()
    assert library.stat().st_size < 3_000_000
    dynamic = _told("readelf", "-d", library).splitlines()
    needed = [line.split("[")[1].rstrip("]") for line in dynamic if "(NEEDED)" in line]
    system = ("libstdc++.so", "libm.so", "libgcc_s.so", "libc.so", "libpthread.so", "ld-linux")
    assert needed and all(name.startswith(system) for name in needed), needed
    exported = _told("nm", "-D", "--defined-only", library).split()[2::3]
    declared = (ROOT / "csrc" / "runtime" / "mvit_runtime.h").read_text()
    assert len(exported) == declared.count("MVIT_API") - 2 and all(f"{name}(" in declared for name in exported)
    assert runtime.header_path().read_text() == declared


def test_an_unknown_instruction_set_is_said(path):
    code = "import sys; from mvit_kernels import runtime as r; print(repr(r.instruction_set())); r.Network(sys.argv[1])"
    environment = {**os.environ, "MVIT_KERNELS_CPU_ISA": "sse2"}
    command = [sys.executable, "-c", code, path]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert run.stdout.strip() == "''" and "MVIT_KERNELS_CPU_ISA is 'sse2'" in run.stderr
