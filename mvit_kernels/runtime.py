# SPDX-License-Identifier: Apache-2.0
"""Frozen networks from files with NumPy alone, without PyTorch: the binding of libmvit_runtime.

Example:
    >>> from mvit_kernels import runtime
    >>> network = runtime.Network("s.mvit")          # written by mvit_kernels.freeze(model).save("s.mvit")
    >>> logits = network(photo[None])                # uint8 (B, H, W, 3), normalized as the file says
    >>> network.labels[logits[0].argmax()]

Importing this module imports NumPy and nothing else; from there to the first logits of MobileViT-S is less than a tenth
of a second. C and C++ programs use the same library: `library_path` and `header_path` say where it and mvit_runtime.h
are.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["Network", "header_path", "instruction_set", "library_path", "version"]

_FOLDER = Path(os.environ.get("MVIT_KERNELS_LIBRARIES") or Path(__file__).parent / "lib")
_TYPES = {np.dtype(np.float32): 0, np.dtype(np.uint8): 1}
_LAYOUTS = {"NCHW": 0, "NHWC": 1}
_Handle = ctypes.c_void_p
_Shape3, _Shape4 = ctypes.c_int64 * 3, ctypes.c_int64 * 4


class _Images(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("type", ctypes.c_int),
        ("layout", ctypes.c_int),
        ("batch", ctypes.c_int64),
        ("height", ctypes.c_int64),
        ("width", ctypes.c_int64),
    ]


def library_path() -> Path:
    """Where libmvit_runtime.so is."""
    return _FOLDER / "libmvit_runtime.so"


def header_path() -> Path:
    """Where mvit_runtime.h, which declares the library's functions for C and C++, is."""
    return _FOLDER / "mvit_runtime.h"


@functools.cache
def _library() -> ctypes.CDLL:
    if not library_path().exists():
        raise ImportError(
            f"mvit_kernels.runtime: there is no {library_path().name} in {_FOLDER}. It is built with mvit_kernels' C++ "
            "library on Linux: pip install --no-build-isolation mvit_kernels, or `make build` beside the sources"
        )
    library = ctypes.CDLL(str(library_path()))
    handle, text = ctypes.POINTER(_Handle), ctypes.c_char_p
    floats = ctypes.POINTER(ctypes.c_float)
    for name, result, arguments in (
        ("open", ctypes.c_int, [text, handle]),
        ("open_memory", ctypes.c_int, [ctypes.c_char_p, ctypes.c_size_t, handle]),
        ("close", None, [_Handle]),
        ("input_shape", ctypes.c_int, [_Handle, _Shape3]),
        ("output_shape", ctypes.c_int, [_Handle, *[ctypes.c_int64] * 3, _Shape4]),
        ("run", ctypes.c_int, [_Handle, ctypes.POINTER(_Images), floats, ctypes.c_size_t]),
        ("set_threads", ctypes.c_int, [_Handle, ctypes.c_int]),
        ("threads", ctypes.c_int, [_Handle]),
        ("metadata", text, [_Handle]),
        ("error_text", text, []),
        ("runtime_version", text, []),
        ("instruction_set", text, []),
    ):
        function = getattr(library, f"mvit_{name}")
        function.restype, function.argtypes = result, arguments
    return library


def version() -> str:
    """The library's version."""
    return _library().mvit_runtime_version().decode()


def instruction_set() -> str:
    """The instruction set that the library uses here: "amx", "avx512", …; the environment variable
    ``MVIT_KERNELS_CPU_ISA`` names another. "" where that one is unknown or unsupported."""
    return _library().mvit_instruction_set().decode()


def _check(status: int) -> None:
    if status != 0:
        raise RuntimeError(_library().mvit_error_text().decode(errors="replace"))


class Network:
    """A frozen network from a file, called with NumPy arrays; its results are the bits of the frozen model in PyTorch.

    Any number of threads may call it at the same time. Use it in a ``with`` block, or `close` it, to free its memory
    before Python does.

    Args:
        path: a file that ``mvit_kernels.freeze(model).save(path)`` wrote; or its bytes.
        threads: how many threads a call uses; None for as many as this process may use processors.

    Raises:
        RuntimeError: the file is missing, of another kind or version, or damaged.
        ImportError: there is no libmvit_runtime here.
    """

    def __init__(self, path: str | os.PathLike[str] | bytes, *, threads: int | None = None) -> None:
        self._handle = _Handle()
        library = _library()
        if isinstance(path, bytes):
            _check(library.mvit_open_memory(path, len(path), ctypes.byref(self._handle)))
        else:
            _check(library.mvit_open(os.fsencode(path), ctypes.byref(self._handle)))
        self.metadata: dict[str, Any] = json.loads(library.mvit_metadata(self._handle))
        if not isinstance(self.metadata, dict):
            raise RuntimeError(f"mvit_open: the file is damaged: its metadata are a {type(self.metadata).__name__}")
        shape = _Shape3()
        _check(library.mvit_input_shape(self._handle, shape))
        self.input_shape: tuple[int, int, int] = (shape[0], shape[1], shape[2])
        if threads is not None:
            self.threads = threads

    @property
    def labels(self) -> list[str] | None:
        """Names of the classes, in the logits' order; None where the file has none."""
        return self.metadata.get("labels")

    @property
    def preprocessing(self) -> dict[str, Any]:
        """How images become the network's input, with mean, std, size and more as the file has them."""
        return self.metadata.get("preprocessing") or {}

    @property
    def threads(self) -> int:
        """How many threads a call uses. Not to be set while a call runs."""
        return _library().mvit_threads(self._open())

    @threads.setter
    def threads(self, threads: int) -> None:
        _check(_library().mvit_set_threads(self._open(), threads))

    def __call__(self, images: np.ndarray, layout: str | None = None) -> np.ndarray:
        """Run a batch.

        Args:
            images: uint8, RGB from 0 to 255, which the library normalizes as the file says; or float32, scaled and
                normalized already. `input_shape` says what height and width the network is for; others work too.
            layout: "NHWC" or "NCHW", the order of the axes; None for NHWC of uint8, NCHW of float32.

        Returns:
            float32: the logits (B, classes), or a map in the images' layout.

        Raises:
            TypeError: another dtype. ValueError: another shape or layout. RuntimeError: what the library says.
        """
        if not isinstance(images, np.ndarray) or images.dtype not in _TYPES:
            what = images.dtype if isinstance(images, np.ndarray) else type(images).__name__
            raise TypeError(f"runtime.Network: images are {what}; an array of uint8 or float32 is wanted")
        layout = layout or ("NHWC" if images.dtype == np.uint8 else "NCHW")
        if layout not in _LAYOUTS:
            raise ValueError(f"runtime.Network: layout is {layout!r}; 'NCHW' or 'NHWC' is wanted")
        channels = self.input_shape[0]
        axes = dict(zip(layout, images.shape, strict=False))
        if images.ndim != 4 or axes["C"] != channels:
            wanted = layout.replace("N", "batch ").replace("C", f"{channels} ").replace("H", "H ").replace("W", "W ")
            raise ValueError(f"runtime.Network: images are {images.shape}; ({', '.join(wanted.split())}) is wanted")
        images = np.ascontiguousarray(images)
        batch, made, height, width = self.result_shape(axes["N"], axes["H"], axes["W"])
        sizes: tuple[int, ...] = (batch, height, width, made) if layout == "NHWC" else (batch, made, height, width)
        result = np.empty((batch, made) if self.metadata.get("result") == "vector" else sizes, np.float32)
        given = _Images(images.ctypes.data, _TYPES[images.dtype], _LAYOUTS[layout], axes["N"], axes["H"], axes["W"])
        floats = result.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        _check(_library().mvit_run(self._open(), ctypes.byref(given), floats, result.size))
        return result

    def result_shape(self, batch: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Of a batch of images: (batch, channels, height, width); of logits the last two are 1.

        Raises:
            RuntimeError: the network does not take such images.
        """
        shape = _Shape4()
        _check(_library().mvit_output_shape(self._open(), batch, height, width, shape))
        return shape[0], shape[1], shape[2], shape[3]

    def close(self) -> None:
        """Free the network; it cannot be called afterwards."""
        handle, self._handle = getattr(self, "_handle", None), _Handle()
        if handle:
            _library().mvit_close(handle)

    def _open(self) -> ctypes.c_void_p:
        if not self._handle:
            raise ValueError("runtime.Network: it is closed")
        return self._handle

    def __enter__(self) -> Network:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()
