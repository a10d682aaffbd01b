# SPDX-License-Identifier: Apache-2.0
"""Reads checkpoint files: verifies their checksums, and executes nothing in them.

PyTorch does not check the checksums of an archive's records, so a flipped byte silently becomes a weight. They are
checked here first: 30 ms for the 22 MB of MobileViT-S, in addition to 70 ms for reading. Files of torch < 1.6 and of
safetensors have no checksums; for these everything is checked that their structure allows.
"""

from __future__ import annotations

import contextlib
import errno
import pickle
import re
import stat
import threading
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, NoReturn

import torch

from .foreign import AGAIN, first_line, foreign_kind, kind_of_archive, kind_of_directory, pickled_names, refuse_objects

_TORCH_LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # torch < 1.6: its magic number, pickled

# Objects that training scripts save beside the weights: settings, metrics, paths (timm's CheckpointSaver, Lightning,
# Hydra). The classes are not imported, but replaced by the inert stand-ins below.
_OBJECTS = (
    *("argparse.Namespace", "types.SimpleNamespace", "torch.torch_version.TorchVersion", "typing.Any"),
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    *("numpy.dtype", "numpy.ndarray"),
    *(f"datetime.{name}" for name in ("date", "datetime", "timedelta", "timezone")),
    *(
        f"{module}.{pure}{kind}Path"
        for module in ("pathlib", "pathlib._local")
        for pure in ("", "Pure")
        for kind in ("", "Posix", "Windows")
    ),
    *(f"builtins.{name}" for name in ("bool", "dict", "float", "frozenset", "int", "list", "str", "tuple")),
    *("omegaconf.dictconfig.DictConfig", "omegaconf.listconfig.ListConfig"),
    *("omegaconf.base.ContainerMetadata", "omegaconf.base.Metadata"),
    *(f"omegaconf.nodes.{kind}Node" for kind in ("Any", "Boolean", "Float", "Integer", "String")),
)
_DICTS = (
    "collections.defaultdict",
    *("lightning.fabric.utilities.data.AttributeDict", "lightning_fabric.utilities.data.AttributeDict"),
    *("lightning.pytorch.utilities.parsing.AttributeDict", "pytorch_lightning.utilities.parsing.AttributeDict"),
)


class _Ignored:
    """Stand-in for an object that is not a weight: accepts whatever a pickle passes to it, and keeps nothing."""

    def __init__(self, *args: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


class _IgnoredDict:
    """Stand-in for a subclass of dict: becomes a plain dict, the only kind that PyTorch's unpickler fills."""

    def __new__(cls, *args: object) -> dict:  # type: ignore[misc] # on purpose
        return {}


_STAND_INS = [(_Ignored, name) for name in _OBJECTS] + [(_IgnoredDict, name) for name in _DICTS]
_stand_ins_lock = threading.Lock()


@contextlib.contextmanager
def _stand_ins() -> Iterator[None]:
    """Allow the stand-ins, for one file at a time: PyTorch's list of safe globals is process-wide."""
    with _stand_ins_lock, torch.serialization.safe_globals([*_STAND_INS]):
        yield


def read_file(path: Path) -> object:
    """The contents of a file of `torch.save` or of safetensors, on the CPU.

    Nothing in the file is executed; known objects that are not tensors become stand-ins.

    Raises:
        FileNotFoundError, IsADirectoryError, PermissionError: the path cannot be read.
        ImportError: the file is in safetensors format, and safetensors is not installed.
        ValueError: the file is empty, damaged (with checksums, the message names the record), contains objects that are
            neither tensors nor known, or has another format (the message names it and says what to do).
    """
    if path.is_dir():
        kind, advice = kind_of_directory(path)
        raise IsADirectoryError(f"load_checkpoint: {path} is {kind}; {advice}")
    if re.match(r"https?:/", str(path)):
        raise FileNotFoundError(f"load_checkpoint: {path} is a URL; download the file and give its path")
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise FileNotFoundError(f"load_checkpoint: there is no file {path}") from None
    if not stat.S_ISREG(mode):
        raise ValueError(f"load_checkpoint: {path} is a pipe or a device; give a file, which can be read twice")
    with path.open("rb") as file:
        head = file.read(512)
        if not head:
            raise ValueError(f"load_checkpoint: {path} is empty (0 bytes); fetch it again")
        if head.startswith(b"PK"):
            _check_archive(path, file)
            return _load(path, file)
        if head.startswith(_TORCH_LEGACY):
            checkpoint = _load(path, file)
            _check_legacy(path, file, checkpoint)
            return checkpoint
        # safetensors: 8 bytes of header length, then the header in JSON.
        foreign = None if head[8:9] == b"{" and head[4:8] == bytes(4) else foreign_kind(path, head)
        if foreign is None and (head[8:9] == b"{" or path.suffix == ".safetensors"):
            return _read_safetensors(path)
    refuse_objects(path, pickled_names(path))
    if foreign is not None:
        _refuse(path, *foreign)
    raise ValueError(
        f"load_checkpoint: {path} is corrupt or not a file of torch.save or safetensors (it begins "
        f"{head[:8].hex(' ')}); {AGAIN}"
    )


def _refuse(path: Path, kind: str, advice: str) -> NoReturn:
    raise ValueError(f"load_checkpoint: {path} is {kind}, not a file of torch.save or safetensors; {advice}")


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("load_checkpoint: to read safetensors, install it: pip install safetensors") from error
    try:
        return safetensors.torch.load_file(path, device="cpu")
    except OSError:
        raise
    except Exception as error:  # its parser and its reader raise many kinds
        raise ValueError(
            f"load_checkpoint: {path} is corrupt or not a safetensors file ({first_line(error)}); {AGAIN}"
        ) from error


# -- torch.save


def _check_archive(path: Path, file: IO[bytes]) -> None:
    """Check that it is an archive of torch.save, and that every record matches its checksum."""
    try:
        archive = zipfile.ZipFile(file)
        records = archive.infolist()
    except Exception as error:  # mostly BadZipFile; others if a field is damaged
        raise ValueError(
            f"load_checkpoint: {path} is corrupt: the archive's directory, at its end, is missing or damaged "
            f"(an interrupted download?); {AGAIN}"
        ) from error
    names = [record.filename for record in records]
    pickled = next((name for name in names if name.count("/") == 1 and name.endswith("/data.pkl")), None)
    if pickled is None or any(name.endswith("/constants.pkl") for name in names):
        _refuse(path, *kind_of_archive(names))
    # After torch.serialization.set_crc32_options(False) files have no checksums: all are 0.
    has_checksums = any(record.CRC for record in records)
    for record in records if has_checksums else ():
        try:
            if record.external_attr & 0x10:  # a folder to PyTorch's reader, which then leaves the tensor uninitialized
                raise zipfile.BadZipFile("it is marked as a folder")
            with archive.open(record) as content:
                while content.read(1 << 20):
                    pass
        except Exception as error:  # zipfile passes on what its decoders raise
            raise ValueError(
                f"load_checkpoint: {path} is corrupt: its record {record.filename} is damaged "
                f"({first_line(error)}); {AGAIN}"
            ) from error
    with archive.open(pickled) as content:
        protocol = content.read(2)
    if protocol[:1] == b"\x80" and protocol[1:] > b"\3":
        raise ValueError(
            f"load_checkpoint: {path} was saved with pickle protocol {protocol[1]}, which PyTorch reads only in a way "
            "that could run code; where it was made, leave out pickle_protocol: torch.save(model.state_dict(), path)"
        )


def _check_legacy(path: Path, file: IO[bytes], checkpoint: object) -> None:
    """Check what the structure allows: the file ends with its last tensor, and every tensor is dense in memory."""
    if file.tell() != path.stat().st_size:
        raise ValueError(f"load_checkpoint: {path} is corrupt: it has data after its last tensor; {AGAIN}")
    for name, tensor in _tensors("", checkpoint):
        length = 1
        for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
            if size > 1 and stride != length:
                raise ValueError(
                    f"load_checkpoint: {path} is corrupt, or its {name} is a view of other memory (shape "
                    f"{tuple(tensor.shape)}, strides {tensor.stride()}); {AGAIN}"
                )
            length *= size


def _tensors(name: str, value: object) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield from _tensors(str(key), each)


def _load(path: Path, file: IO[bytes]) -> object:
    """Read with PyTorch, and again with stand-ins if there are objects beside the weights."""
    try:
        try:
            file.seek(0)
            return torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:
            file.seek(0)
            with _stand_ins():
                return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # the parser raises many kinds
        if isinstance(error, OSError) and error.errno == errno.EIO:
            raise
        if isinstance(error, pickle.UnpicklingError):
            stand_ins = _OBJECTS + _DICTS
            refuse_objects(path, [name for name in pickled_names(path) if name not in stand_ins], error)
        raise ValueError(f"load_checkpoint: {path} is corrupt or not a file of torch.save; {AGAIN}") from error
