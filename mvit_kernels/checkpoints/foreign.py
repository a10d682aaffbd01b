# SPDX-License-Identifier: Apache-2.0
"""Files that are not PyTorch weights: what each one is, by its first bytes or its pickle, and what to do instead."""

from __future__ import annotations

import contextlib
import pickletools
import re
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO, Any

from .._utils.text import some

AGAIN = "fetch or save it again"
_UNPACK = "unpack it, and give the file inside"
_OTHER_FRAMEWORK = (
    "convert it to a PyTorch state dict where it was made, or fetch the PyTorch weights of the same model"
)
_STATE_DICT = "where it was made, save torch.save(model.state_dict(), path)"

# (offset, magic bytes, kind of file, what to do)
_MAGIC = (
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file, as Keras saves", _OTHER_FRAMEWORK),
    (4, b"TFL3", "a TensorFlow Lite model", _OTHER_FRAMEWORK),
    (0, b"GGUF", "a GGUF file, of llama.cpp", _OTHER_FRAMEWORK),
    (0, b"\x93NUMPY", "a NumPy array", _OTHER_FRAMEWORK),
    (0, b"\x1f\x8b", "compressed by gzip", _UNPACK),
    (0, b"BZh", "compressed by bzip2", _UNPACK),
    (0, b"\xfd7zXZ\0", "compressed by xz", _UNPACK),
    (0, b"\x28\xb5\x2f\xfd", "compressed by zstd", _UNPACK),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", _UNPACK),
    (0, b"Rar!\x1a\x07", "a RAR archive", _UNPACK),
    (257, b"ustar", "a tar archive", _UNPACK),
    (0, b"\x89PNG\r\n\x1a\n", "an image (PNG)", "give the weights' file"),
    (0, b"\xff\xd8\xff", "an image (JPEG)", "give the weights' file"),
    (0, b"%PDF-", "a PDF document", "give the weights' file"),
)

# Names that the pickle of a tensor refers to.
_OF_TENSORS = re.compile(
    r"torch\.((_utils|_tensor|storage|serialization|nn\.parameter|cuda)\.)?\w+|collections\.(OrderedDict|Counter)|"
    r"_codecs\.encode|builtins\.(set|complex|bytearray)"
)
# Modules that no honest checkpoint refers to. The list only decides the message; safety does not depend on it.
_RUN_COMMANDS = frozenset(
    "os posix nt subprocess sys runpy importlib shutil socket pty ctypes webbrowser code codeop commands pickle "
    "_pickle marshal operator pydoc timeit pip cProfile asyncio multiprocessing".split()
)
_BUILTINS_THAT_RUN = {"__import__", "apply", "breakpoint", "compile", "eval", "exec", "execfile", "getattr", "open"}


def refuse_objects(path: Path, names: list[str], error: Exception | None = None) -> None:
    """Raise ValueError if one of `names`, which a pickle would import, does not belong to a tensor."""
    running = [name for name in names if _runs_commands(name)]
    if running:
        raise ValueError(
            f"load_checkpoint: {path} is a pickle that calls {some(running)}, which weights never do. Nothing in it "
            "was executed; do not open it by other means (pickle, weights_only=False), and take weights from a source "
            "that you trust"
        ) from error
    unknown = [name for name in names if not _OF_TENSORS.fullmatch(name)]
    if unknown:
        raise ValueError(
            f"load_checkpoint: {path} holds Python objects besides tensors ({some(unknown)}) and is not read, since "
            f"that could run code; {_STATE_DICT}"
        ) from error


def _runs_commands(name: str) -> bool:
    module, _, function = name.rpartition(".")
    if module == "builtins":
        return function in _BUILTINS_THAT_RUN
    return module.partition(".")[0] in _RUN_COMMANDS


def pickled_names(path: Path) -> list[str]:
    """The names that a file's pickles would import, each once, as far as they can be read. They are taken from the
    opcodes; nothing is executed."""
    names: dict[str, None] = {}
    try:
        with contextlib.ExitStack() as stack:
            file: IO[bytes] = stack.enter_context(path.open("rb"))
            if zipfile.is_zipfile(file):
                archive = stack.enter_context(zipfile.ZipFile(file))
                file = stack.enter_context(archive.open(next(n for n in archive.namelist() if n.endswith("data.pkl"))))
            else:
                file.seek(0)
            for _ in range(5):  # torch < 1.6: magic number, protocol, system, the object, keys of its storages
                names.update(dict.fromkeys(_names_of_one_pickle(file)))
    except Exception:  # damaged, or not a pickle: pickletools raises many kinds
        pass
    return list(names)


def _names_of_one_pickle(file: IO[bytes]) -> Iterator[str]:
    memo: dict[Any, object] = {}
    strings: list[object] = []  # STACK_GLOBAL takes module and name from the last two
    last: object = None
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name in ("GLOBAL", "INST"):
            module, _, name = str(argument).partition(" ")
            if (module, name) in NAME_MAPPING:  # protocols 0 to 2 use Python 2's module names
                module, name = NAME_MAPPING[module, name]
            yield f"{IMPORT_MAPPING.get(module, module)}.{name}"
        elif opcode.name == "STACK_GLOBAL":
            yield ".".join(map(str, strings[-2:]))
        elif opcode.name == "MEMOIZE":
            memo[len(memo)] = last
            continue
        elif opcode.name.endswith("PUT"):
            memo[argument] = last
            continue
        last = memo.get(argument) if opcode.name.endswith("GET") else argument
        if isinstance(last, str):
            strings.append(last)


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its class name."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


# -- other kinds


def foreign_kind(path: Path, head: bytes) -> tuple[str, str] | None:
    """(kind, what to do) for a file that begins with `head`; None if the kind is unknown."""
    for offset, magic, kind, advice in _MAGIC:
        if head.startswith(magic, offset):
            return kind, advice
    text = _as_text(head)
    if text is not None:
        return _kind_of_text(path, text)
    # ONNX, TensorFlow and Core ML write protocol buffers, which have no magic number: a version, then other fields.
    if head[:1] == b"\x08" and head[2:3] in (b"\x12", b"\x1a", b"\x22", b"\x2a", b"\x32", b"\x3a", b"\x42"):
        if path.suffix == ".mlmodel":
            return "a Core ML model", _OTHER_FRAMEWORK
        return ("a TensorFlow SavedModel" if head[1] == 1 else "an ONNX model"), _OTHER_FRAMEWORK
    if re.search(r"\.(data-\d+-of-\d+|index|meta)$", path.name):
        return "of a TensorFlow checkpoint, by its name", _OTHER_FRAMEWORK
    if head[:1] == b"\x80" and b"\2" <= head[1:2] <= b"\5":
        return "a corrupt pickle, or one of pickle.dump or joblib, which could run code", _STATE_DICT
    return None


def kind_of_archive(names: Collection[str]) -> tuple[str, str]:
    """(kind, what to do) for a zip archive that contains these files."""
    if any(name.endswith("/constants.pkl") for name in names):
        return "a TorchScript archive", f"{_STATE_DICT}; or pass torch.jit.load(path).state_dict()"
    if any(name.endswith("archive_format") for name in names):
        return "an exported program (torch.export)", f"{_STATE_DICT}; or pass torch.export.load(path).state_dict"
    if names and all(name.endswith(".npy") for name in names):
        return "an archive of NumPy arrays (.npz)", _OTHER_FRAMEWORK
    if "model.weights.h5" in names:
        return "a Keras model", _OTHER_FRAMEWORK
    return f"a zip archive of {some(names, 3) or 'nothing'}", _UNPACK


def kind_of_directory(path: Path) -> tuple[str, str]:
    """(kind, what to do) for a folder."""
    names = {each.name for each in path.iterdir()}
    if any(name.endswith(".distcp") for name in names):
        convert = "torch.distributed.checkpoint.format_utils.dcp_to_torch_save(folder, file)"
        return "a directory, a distributed checkpoint", f"convert it to one file: {convert}"
    if "saved_model.pb" in names:
        return "a directory, a TensorFlow SavedModel", _OTHER_FRAMEWORK
    if "data.pkl" in names:
        return "a directory, an unpacked file of torch.save", "fetch the file itself (some browsers unpack it)"
    weights = sorted(name for name in names if name.endswith((".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar")))
    return "a directory", "give the file inside it" + (f", as {path / weights[0]}" if weights else "")


def _as_text(head: bytes) -> str | None:
    """The start of the file as text; None if it is not text."""
    try:
        text = head.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if error.start < max(len(head) - 3, 1):  # not a character cut off at the end
            return None
        text = head[: error.start].decode("utf-8-sig")
    return text if all(char.isprintable() or char in "\r\n\t\f" for char in text) else None


def _kind_of_text(path: Path, text: str) -> tuple[str, str]:
    start = text.lstrip().lower()
    if start.startswith("version https://git-lfs"):
        return "a Git LFS pointer", "run 'git lfs pull' where it is from"
    if start.startswith(("<!doctype html", "<html", "<head", "<body", "<script")):
        return "a web page (HTML)", (
            "the page about the weights was saved, or one that asks to log in: fetch the file itself (on GitHub 'raw', "
            "on the Hugging Face hub 'resolve' instead of 'blob' in the address)"
        )
    if start.startswith("<"):
        return "an XML document", "if it is a server's error, read it; fetch the file of the weights itself"
    if start.startswith(("{", "[")):
        if "weight_map" in start or path.name.endswith(".index.json"):
            return "an index of several files of weights (JSON)", "join them into one state dict, and pass that"
        return "JSON text", "give the file of the weights, often in the same folder"
    return f"a text file, which begins {' '.join(text.split())[:40]!r}", "give the file of the weights"
