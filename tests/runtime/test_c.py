# SPDX-License-Identifier: Apache-2.0
"""The C API: the example, compiled as C and as C++, and the functions' own answers to wrong arguments."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch

import mvit_kernels
from mvit_kernels import MobileViT, runtime
from support import ROOT
from support.native import skip_without_a_compiler

skip_without_a_compiler()

EXAMPLE = ROOT / "examples" / "c" / "classify.c"


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> str:
    torch.manual_seed(1)
    file = tmp_path_factory.mktemp("c") / "xxs.mvit"
    mvit_kernels.freeze(MobileViT("xxs", num_classes=7).eval()).save(file)
    return str(file)


@pytest.mark.parametrize("language", ["c", "c++"])
def test_the_example(language, path, tmp_path):
    compiler = shutil.which({"c": "cc", "c++": "c++"}[language])
    if compiler is None:
        pytest.skip(f"there is no {language} compiler")
    flags = ["-Wall", "-Wextra", "-Werror", "-pedantic", f"-std={language}{'99' if language == 'c' else '11'}"]
    built = tmp_path / "classify"
    library = runtime.library_path()
    command = [compiler, "-x", language, EXAMPLE, *flags, "-I", runtime.header_path().parent, "-o", built, "-x", "none"]
    subprocess.run([*command, library, f"-Wl,-rpath,{library.parent.resolve()}"], check=True)
    pixels = np.random.default_rng(3).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    (tmp_path / "photo.ppm").write_bytes(b"P6\n64 48\n255\n" + pixels.tobytes())
    run = subprocess.run([built, path, tmp_path / "photo.ppm"], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    with runtime.Network(path) as network:
        logits = network(pixels[None])[0]
    told = re.findall(r"(\d+)\. class (\d+), logit (-?[\d.]+)", run.stdout)
    assert [int(index) for _, index, _ in told] == np.argsort(-logits)[:5].tolist()
    assert all(abs(float(value) - logits[int(index)]) < 1e-4 for _, index, value in told)
    for arguments, says in (
        ([path], "classify NETWORK.mvit PHOTO.ppm"),
        ([tmp_path / "none.mvit", tmp_path / "photo.ppm"], "No such file"),
        ([path, path], "no binary PPM"),
    ):
        run = subprocess.run([built, *arguments], capture_output=True, text=True, timeout=60)
        assert run.returncode == 1 and says in run.stderr


def test_wrong_arguments_are_errors(path):
    library, handle = runtime._library(), ctypes.c_void_p()
    said = library.mvit_error_text

    def fails(status: int, text: str) -> None:
        assert status == -1 and text in said().decode(), said()

    fails(library.mvit_open(None, ctypes.byref(handle)), "mvit_open: path is NULL")
    fails(library.mvit_open(os.fsencode(path), None), "mvit_open: network is NULL")
    fails(library.mvit_open_memory(None, 5, ctypes.byref(handle)), "data is NULL")
    assert library.mvit_open(os.fsencode(path), ctypes.byref(handle)) == 0 and said() == b""
    shape3, shape4 = (ctypes.c_int64 * 3)(), (ctypes.c_int64 * 4)()
    fails(library.mvit_input_shape(None, shape3), "network or shape is NULL")
    fails(library.mvit_output_shape(handle, 1, -1, 32, shape4), "images of 1 x -1 x 32 are none, or too large")
    fails(library.mvit_output_shape(handle, 2**62, 32, 32, shape4), "too large")
    room, pixels = (ctypes.c_float * 7)(), np.zeros((1, 32, 32, 3), np.uint8)

    def run(type_: int = 1, layout: int = 1, batch: int = 1, data: bool = True, size: int = 7) -> int:
        images = runtime._Images(pixels.ctypes.data if data else None, type_, layout, batch, 32, 32)
        return library.mvit_run(handle, ctypes.byref(images), room, size)

    assert run() == 0
    fails(run(type_=7), "images.type is 7; MVIT_FLOAT32 or MVIT_UINT8 is wanted")
    fails(run(layout=-1), "images.layout is -1")
    fails(run(batch=0), "images of 0 x 32 x 32 are none")
    fails(run(data=False), "images.data or result is NULL")
    fails(run(size=6), "result has room for 6 floats, and the result has 7: ask mvit_output_shape")
    fails(library.mvit_run(None, None, room, 7), "network or images is NULL")
    fails(library.mvit_set_threads(handle, 5000), "threads is 5000; 1 to 1024 is wanted")
    assert library.mvit_threads(None) == 0 and library.mvit_metadata(None) == b""
    library.mvit_close(handle)
    library.mvit_close(None)
