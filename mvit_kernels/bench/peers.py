# SPDX-License-Identifier: Apache-2.0
"""The forms of a model that can be timed against each other, by name.

Example:
    >>> form = PEERS["frozen"].build(Subject(model, images))
    >>> form.model(form.images)

Other runtimes (ONNX Runtime, OpenVINO, those of phones) are in `mvit_kernels.bench.runtimes`. They are optional:
building a form whose library is not installed raises an ImportError that says what to install.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import runtime
from ..adapters import accelerate, restore
from ..freezing import freeze
from ..verification import named_outputs
from .recipe import recipe_step
from .runtimes import ExportedFile, OnnxRuntime, OpenVino

CHECKED_PIXELS = 64 * 256**2  # of a recipe's batch: S in float64 then takes some 20 GB, by arithmetic


class Subject(NamedTuple):
    """What the candidates are built from; `compare` does not change it."""

    model: nn.Module  # float32, on the images' device
    images: Tensor  # (B, C, H, W) float32
    dtype: torch.dtype = torch.float32  # of weights and images; in training of autocast, with float32 weights
    backend: str | None = None  # of the accelerated and frozen forms
    training: bool = False  # forward and backward, without dropout, which would make gradients incomparable
    step: bool = False  # with training: an optimizer step too (AdamW with learning rate 0, so that no weight changes)
    recipe: bool = False  # with training: a whole step of the paper's recipe, see `mvit_kernels.bench.recipe`

    @property
    def mode(self) -> str:
        """The column `mode` of results: inference, training, step or recipe."""
        if not self.training:
            return "inference"
        return "recipe" if self.recipe else "step" if self.step else "training"

    @property
    def checked(self) -> Subject:
        """What is compared with float64 before `self` is timed: of a recipe, whose dropout is live and whose float64
        would not fit a GPU, forward and backward without dropout on the first images; otherwise `self`."""
        if not self.recipe:
            return self
        most = max(2, CHECKED_PIXELS // self.images[0, 0].numel())
        return self._replace(recipe=False, images=self.images[:most])


class Form(NamedTuple):
    """What a peer makes of a `Subject`: a model, and the images in the form that it takes."""

    model: Callable[[Tensor], Any]  # a module; for an `inference_only` peer, any function
    images: Tensor


class Peer(NamedTuple):
    """One form of a model, selectable by name."""

    summary: str
    build: Callable[[Subject], Form]
    inference_only: bool = False
    ours: bool = False  # a wrong result is a defect of this package
    lazy: bool = False  # the first call compiles
    has_graphs: bool = False  # on a GPU it replays CUDA graphs of its own


def eager(subject: Subject) -> Form:
    """The model in plain PyTorch, as before `accelerate`, with dropout off."""
    model = restore(copy.deepcopy(subject.model)).train(subject.training)
    for module in model.modules():
        if "drop" in type(module).__name__.lower():
            module.eval()
    if subject.training:
        return Form(model, subject.images)
    return Form(model.to(subject.dtype), subject.images.to(subject.dtype))


def channels_last(subject: Subject) -> Form:
    """`eager` with weights and images in channels-last memory format."""
    model, images = eager(subject)
    return Form(model.to(memory_format=torch.channels_last), images.contiguous(memory_format=torch.channels_last))


def _accelerated(subject: Subject) -> Form:
    model, images = channels_last(subject)
    return Form(accelerate(model, backend=subject.backend, strict=True), images)


def _frozen(subject: Subject) -> Form:
    model = accelerate(copy.deepcopy(subject.model), backend=subject.backend, strict=True)
    return Form(
        freeze(model, dtype=subject.dtype),
        subject.images.to(subject.dtype, memory_format=torch.channels_last),
    )


def _from_file(subject: Subject) -> Form:
    """The frozen model in `mvit_kernels.runtime`, without PyTorch. It takes and gives float32 arrays, whatever it
    computes in; the images are rounded to `dtype` first, so that all candidates see the same values."""
    if subject.images.device.type != "cpu":
        raise ValueError("the runtime without PyTorch is a peer on the CPU only")
    model, images = _frozen(subject)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "network.mvit")
        model.save(path)
        network = runtime.Network(path, threads=torch.get_num_threads())
    return Form(lambda x: torch.from_numpy(network(x.numpy())), images.float().contiguous())


def _compiled(build: Callable[[Subject], Form], **options: Any) -> Callable[[Subject], Form]:
    def compiled(subject: Subject) -> Form:
        model, images = build(subject)
        # Static shapes, as by default in a first call: a second batch size in the process would make them dynamic.
        return Form(torch.compile(model, dynamic=False, **options), images)

    return compiled


def _runtime(runtime: Callable[..., Any], **options: Any) -> Callable[[Subject], Form]:
    def built(subject: Subject) -> Form:
        # Other runtimes take float32 weights and images, whatever they compute in. The images are rounded to `dtype`
        # first, so that all candidates see the same values.
        model, _ = eager(subject._replace(dtype=torch.float32))
        images = subject.images.to(subject.dtype).float().contiguous()
        threads = torch.get_num_threads()
        return Form(runtime(model, images, dtype=subject.dtype, threads=threads, **options), images)

    return built


# Targets of `mvit_kernels.export` whose runtimes are for phones, and the runtimes
PHONES = {"ncnn": "ncnn", "litert": "LiteRT", "executorch": "ExecuTorch"}

PEERS: dict[str, Peer] = {
    "eager": Peer("eager PyTorch, NCHW", eager),
    "channels_last": Peer("eager PyTorch, channels-last", channels_last),
    "accelerated": Peer("channels-last, mvit_kernels.accelerate", _accelerated, ours=True),
    "frozen": Peer("mvit_kernels.freeze", _frozen, inference_only=True, ours=True),
    "runtime": Peer(
        "the frozen model from its file, in mvit_kernels.runtime, without PyTorch",
        _from_file,
        inference_only=True,
        ours=True,
    ),
    "compile": Peer("torch.compile", _compiled(eager), lazy=True),
    "compile_channels_last": Peer("torch.compile, channels-last", _compiled(channels_last), lazy=True),
    "compile_reduce_overhead": Peer(
        "torch.compile, mode reduce-overhead",
        _compiled(channels_last, mode="reduce-overhead"),
        lazy=True,
        has_graphs=True,
    ),
    "compile_max_autotune": Peer(
        "torch.compile, mode max-autotune",
        _compiled(channels_last, mode="max-autotune"),
        lazy=True,
        has_graphs=True,
    ),
    "compile_freezing": Peer(
        "torch.compile with inductor's freezing",
        _compiled(channels_last, options={"freezing": True}),
        inference_only=True,
        lazy=True,
    ),
    "compile_accelerated": Peer("torch.compile of the accelerated model", _compiled(_accelerated), lazy=True),
    "onnxruntime": Peer("ONNX Runtime", _runtime(OnnxRuntime), inference_only=True),
    "openvino": Peer("OpenVINO", _runtime(OpenVino), inference_only=True),
    "onnxruntime_exported": Peer(
        "ONNX Runtime on what mvit_kernels.export writes",
        _runtime(OnnxRuntime, plain=True),
        inference_only=True,
        ours=True,
    ),
    "openvino_exported": Peer(
        "OpenVINO on what mvit_kernels.export writes", _runtime(OpenVino, plain=True), inference_only=True, ours=True
    ),
    **{
        target: Peer(
            f"{name} on what mvit_kernels.export writes",
            _runtime(ExportedFile, target=target),
            inference_only=True,
            ours=True,
        )
        for target, name in PHONES.items()
    },
    "openvino_by_image": Peer(
        "OpenVINO, one stream per thread, one request per image", _runtime(OpenVino, by_image=True), inference_only=True
    ),
}


def call_of(form: Form, subject: Subject, reverse: bool = False) -> Callable[[], object]:
    """The function to time: in inference a plain call; in training forward, backward with a fixed random cotangent, and
    the optimizer step if `subject.step`, or a whole step if `subject.recipe`. With `reverse` the cotangent's batch
    order is reversed."""
    if not subject.training:
        return lambda: form.model(form.images)
    if subject.recipe:
        return recipe_step(form.model, form.images, subject.dtype)
    cast = subject.dtype not in (torch.float32, torch.float64)
    optimizer = torch.optim.AdamW(form.model.parameters(), lr=0.0) if subject.step else None
    cotangents: dict[str, Tensor] = {}

    def train() -> dict[str, Tensor]:
        form.model.zero_grad(set_to_none=True)
        with torch.autocast(form.images.device.type, subject.dtype if cast else None, enabled=cast):
            outputs = named_outputs(form.model(form.images))
        for name, value in outputs.items():
            if name not in cotangents:
                generator = torch.Generator().manual_seed(0)
                cotangent = torch.randn(value.shape, generator=generator, dtype=torch.float64, device="cpu")
                cotangents[name] = (cotangent.flip(0) if reverse else cotangent).to(value)
        torch.autograd.backward(list(outputs.values()), [cotangents[name] for name in outputs])
        if optimizer is not None:
            optimizer.step()
        return outputs

    return train


def check_peers(names: Iterable[str], training: bool = False) -> list[str]:
    """`names` without repeats, with eager first, to which ratios refer; "all" stands for every peer (that can train).

    Raises:
        ValueError: an unknown peer; with `training`, one for inference only.
    """
    names = list(names)
    if "all" in names:
        names = [name for name, peer in PEERS.items() if not (training and peer.inference_only)]
    for name in names:
        if name not in PEERS:
            raise ValueError(f"unknown peer {name!r}; choose from {', '.join(PEERS)}, or 'all'")
        if training and PEERS[name].inference_only:
            raise ValueError(f"peer {name!r} is for inference only; leave it out when training is measured")
    return list(dict.fromkeys(["eager", *names]))
