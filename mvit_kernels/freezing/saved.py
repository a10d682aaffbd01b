# SPDX-License-Identifier: Apache-2.0
"""A frozen network as one file: ``freeze(model).save("s.mvit")`` and `load`.

The file holds a program, the weights as PyTorch orders them, and metadata in JSON (labels, preprocessing, where it
comes from); csrc/runtime/file.h says where. It has no code and no pickle, and is the same whatever processor it was
written on: weights are packed for the one at hand when it is loaded. `mvit_kernels.runtime` and the C library behind it
read it without PyTorch.
"""

from __future__ import annotations

import json
import math
import os
import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from .. import __version__
from .._utils.files import write_bytes
from ..backends import cpu
from ..backends.library import raw
from .description import describe
from .half_range import ranges_of
from .network import call_packed, reads_rows
from .program import STORED_TYPES, NotNative, Stored, build
from .whole import whole_network

MAGIC, FORMAT = b"\x89MVIT\r\n\x1a", 1
HEADER = struct.Struct("<8s2I7Q4I8f2I")  # csrc/runtime/file.h
_CHECKED_FROM = 16  # the checksum is of all that follows it
_VECTOR, _NORMALIZES, _REVERSES = 1, 2, 4


class Saver:
    """The ``save`` of a frozen model. An attribute of the model, not a method: its class is the library's own."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def __call__(
        self,
        path: str | os.PathLike[str],
        *,
        labels: Sequence[str] | None = None,
        preprocessing: Mapping[str, Any] | None = None,
        size: int | tuple[int, int] | None = None,
    ) -> None:
        """Write the frozen model to a file that `mvit_kernels.load`, `mvit_kernels.runtime` and libmvit_runtime read.

        Example:
            >>> mvit_kernels.freeze(model).save("s.mvit")
            >>> mvit_kernels.freeze(model).save("pets.mvit", labels=("cat", "dog"))

        The whole network is in the file, from the image to the logits (pooling and classifier included), or to the last
        map of a network that does not classify. Results are the bits that the frozen model gives. What ``freeze`` found
        on an `example` is ``half_ranges`` of its metadata; the networks of files run on CPUs, where it changes nothing.

        Args:
            path: the file; an existing one is replaced when the new one is complete.
            labels: names of the classes, in the logits' order; None for those that the model knows (Hugging Face's
                ``config.id2label``, timm's ImageNet names).
            preprocessing: how photos become the network's input, where the model does not know it or says something
                else: ``rescale``, by which bytes are multiplied (1/255), then ``mean`` and ``std``, in the order R, G,
                B, and ``channel_order`` of the input, "RGB" or "BGR". With mean and std the runtime takes bytes. More
                entries, anything that JSON can hold, are kept.
            size: (height, width) of the images that the network is for, or one side; None for what the model knows, or
                256.

        Raises:
            ValueError: the network cannot be a file, for the reason given (a layer that was not frozen, a hook, several
                results); or an argument is not what is wanted.
            TypeError: a label is no string.
        """
        try:
            whole = whole_network(self._model)
        except NotNative as reason:
            raise ValueError(f"save: {reason}") from reason
        known = describe(self._model, labels=labels)
        known["preprocessing"] = {**(known.get("preprocessing") or {}), **(preprocessing or {})}
        ranges = ranges_of(self._model)
        if ranges:
            known["half_ranges"] = {name: known_range._asdict() for name, known_range in ranges.items()}
        if size is not None:
            known["preprocessing"]["size"] = [size, size] if isinstance(size, int) else list(size)
        dtype = next(whole.links.buffers()).dtype
        builder = build(whole.links, dtype)
        content = file_of(builder.stored(), whole.channels, whole.vector, known, builder.values[0][0])
        write_bytes(Path(path), content)

    def __repr__(self) -> str:
        return f"save of a frozen {type(self._model).__name__}"


def file_of(stored: Stored, channels: int, vector: bool, metadata: dict[str, Any], in_channels: int) -> bytes:
    """The bytes of a file. `channels`: of the result; the network may make more, which are dropped."""
    preprocessing = metadata.get("preprocessing") or {}
    mean, std, reverses = _normalization(preprocessing, in_channels)
    height, width = _size(preprocessing)
    flags = _VECTOR * vector + _NORMALIZES * (mean is not None) + _REVERSES * reverses
    facts = {"mvit_kernels": __version__, "result": "vector" if vector else "map", **metadata}
    text = json.dumps(facts, ensure_ascii=False).encode()
    sections = text, stored.program.numpy().tobytes(), stored.weights.numpy().tobytes()
    content, places = bytearray(HEADER.size), []
    for section in sections:
        content += bytes(-len(content) % 64)
        places.append(len(content))
        content += section
    counts = len(text), len(sections[1]) // 8, len(sections[2])
    where = [number for pair in zip(places, counts, strict=True) for number in pair]
    four = [(list(values or []) + [fill] * 4)[:4] for values, fill in ((mean, 0.0), (std, 1.0))]
    rest = where, (channels, flags, height, width), *four
    fields = [len(content), *(number for part in rest for number in part), stored.halvings, 0]
    HEADER.pack_into(content, 0, MAGIC, FORMAT, 0, *fields)
    HEADER.pack_into(content, 0, MAGIC, FORMAT, zlib.crc32(memoryview(content)[_CHECKED_FROM:]), *fields)
    return bytes(content)


def _normalization(preprocessing: Mapping[str, Any], in_channels: int) -> tuple[list | None, list | None, bool]:
    """Mean and standard deviation of each channel of the input, of values from 0 to 1 (None where a network does not
    take bytes), and whether the channels of a photo are reversed."""
    order, scale = preprocessing.get("channel_order", "RGB"), preprocessing.get("rescale", 1 / 255)
    if order not in ("RGB", "BGR"):
        raise ValueError(f"save: preprocessing has a channel_order of {order!r}; 'RGB' or 'BGR' is wanted")
    statistics = []
    for name in ("mean", "std"):
        values = preprocessing.get(name)
        if values is None or in_channels > 4:
            return None, None, False
        numbers = values if isinstance(values, list | tuple) else ()
        if len(numbers) != in_channels or not all(isinstance(v, int | float) and math.isfinite(v) for v in numbers):
            raise ValueError(f"save: preprocessing has a {name} of {values!r}; {in_channels} numbers are wanted")
        statistics.append([float(v) / (255 * scale) for v in numbers][:: -1 if order == "BGR" else 1])
    mean, std = statistics
    if not all(value > 0 for value in std):
        raise ValueError(f"save: preprocessing has a std of {preprocessing['std']!r}; numbers above 0 are wanted")
    return mean, std, order == "BGR"


def _size(preprocessing: Mapping[str, Any]) -> tuple[int, int]:
    size = preprocessing.get("size") or (256, 256)  # the paper's
    if len(size) != 2 or not all(isinstance(side, int) and 0 < side < 2**31 for side in size):
        raise ValueError(f"save: size is {size!r}; (height, width) is wanted, in pixels")
    return size[0], size[1]


class SavedNetwork(nn.Module):
    """A frozen network from a file, for inference on the CPU: (B, C, H, W) of the file's dtype in, logits (B, classes)
    or a map (B, C', H', W') out.

    Example:
        >>> network = mvit_kernels.load("s.mvit")
        >>> network.labels[network(images).argmax(1)[0]]

    Attributes:
        metadata: what the file says of itself, a dict. `labels` and `preprocessing` are parts of it.
        input_size: (height, width) of the images that it is for; it takes others too.
        dtype: of its weights; inputs are cast to it, and results have it.
    """

    def __init__(
        self,
        program: Tensor,
        weights: Tensor,
        dtype: torch.dtype,
        *,
        channels: int,
        halvings: int,
        vector: bool,
        metadata: dict[str, Any],
        input_size: tuple[int, int],
    ) -> None:
        super().__init__()
        self.training = False
        self.metadata, self.input_size, self.dtype = metadata, input_size, dtype
        self._program, self._weights = raw("pack_network", "cpu")(program, weights)
        values = int(self._program[2])
        self.in_channels, made = int(self._program[4]), int(self._program[2 + 2 * values])
        if not 0 < channels <= made:
            raise ValueError(f"the file is damaged: its program makes {made} channels, and {channels} are wanted")
        self._channels, self._vector, self._result = channels, vector, (made, halvings)
        self._reads_rows = reads_rows(self._program)

    @property
    def labels(self) -> list[str] | None:
        """Names of the classes, in the logits' order; None where nobody gave them."""
        return self.metadata.get("labels")

    @property
    def preprocessing(self) -> dict[str, Any]:
        """How images become the network's input."""
        return self.metadata.get("preprocessing") or {}

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, classes), or a map (B, C', H', W'), of images (B, C, H, W)."""
        if not isinstance(x, Tensor) or not x.is_floating_point():
            what = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"SavedNetwork: x is {what}; a float tensor, scaled and normalized, is wanted")
        if x.device.type != "cpu" or x.dim() != 4 or x.shape[1] != self.in_channels or x.numel() == 0:
            raise ValueError(
                f"SavedNetwork: x is {tuple(x.shape)} on {x.device}; (B, {self.in_channels}, H, W) on the CPU is wanted"
            )
        x = x.detach()
        rows = call_packed(x, self.dtype, self._program, self._weights, *self._result, self._reads_rows)
        if self._vector:
            return rows.flatten(1)[:, : self._channels].contiguous()
        return rows.permute(0, 3, 1, 2)[:, : self._channels]

    def train(self, mode: bool = True) -> SavedNetwork:
        """Stay in evaluation mode; raises RuntimeError if `mode` is True."""
        if mode:
            raise RuntimeError("SavedNetwork: a network from a file is frozen and cannot be trained")
        return super().train(False)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError("SavedNetwork: its weights are packed for this processor; load the file again instead")

    def extra_repr(self) -> str:
        return f"{self.metadata.get('architecture', '')} {self.dtype}, {self._channels} channels, {self.input_size}"


def load(path: str | os.PathLike[str]) -> SavedNetwork:
    """Load a file that a frozen model's ``save`` wrote, packed for the processor at hand.

    Example:
        >>> network = mvit_kernels.load("s.mvit")
        >>> with torch.inference_mode():
        ...     logits = network(images)

    Args:
        path: the file. Nothing in it is executed.

    Returns:
        A `SavedNetwork`, whose results are the bits that the frozen model gave. `mvit_kernels.runtime.Network` is the
        same without PyTorch.

    Raises:
        ValueError: it is another kind of file, of another version, or damaged.
        OSError: it cannot be read.
        RuntimeError: there is no C++ library here.
    """
    reasons = cpu.BACKEND.unavailable("cpu")
    if reasons:
        raise RuntimeError(f"load: {'; '.join(reasons)}")
    with open(path, "rb") as stream:
        content = torch.empty(os.fstat(stream.fileno()).st_size, dtype=torch.uint8, device="cpu")
        read = stream.readinto(memoryview(content.numpy())) if len(content) else 0
    try:
        if read != len(content):
            raise ValueError(f"{read} of {len(content)} bytes could be read")
        return _parsed(content)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"load: {os.fspath(path)}: {error}") from error


def _parsed(content: Tensor) -> SavedNetwork:
    data = memoryview(content.numpy())
    if len(data) < HEADER.size or data[:8] != MAGIC:
        raise ValueError("this is no file of a frozen network; freeze(model).save(path) writes one")
    _, version, checksum, size, *fields = HEADER.unpack_from(data)
    if version != FORMAT:
        raise ValueError(f"the file has format {version}, and this version of mvit_kernels reads format {FORMAT}")
    if size != len(data) or checksum != zlib.crc32(data[_CHECKED_FROM:]):
        raise ValueError("the file is damaged; copy it again")
    sections = []
    for (at, count), element in zip(zip(fields[0:6:2], fields[1:6:2], strict=True), (1, 8, 1), strict=True):
        if at % 64 or not HEADER.size <= at <= size or count > (size - at) // element:
            raise ValueError("the file is damaged: a part of it would lie outside")
        sections.append(content[at : at + count * element])
    channels, flags, height, width = fields[6:10]
    halvings, program = fields[-2], sections[1].view(torch.int64)
    metadata = json.loads(bytes(sections[0].numpy()))
    if len(program) < 2 or not 0 <= int(program[1]) < len(STORED_TYPES) or not isinstance(metadata, dict):
        raise ValueError("the file is damaged: it has no program")
    return SavedNetwork(
        program,
        sections[2],
        list(STORED_TYPES)[int(program[1])],
        channels=channels,
        halvings=halvings,
        vector=bool(flags & _VECTOR),
        metadata=metadata,
        input_size=(height, width),
    )
