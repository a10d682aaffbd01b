# SPDX-License-Identifier: Apache-2.0
"""Suites ``blocks``, ``models``, ``training`` and ``mobile``: whole networks and their MobileViT blocks.

Example:
    >>> [case.name for case in models("cpu")][:2]
    ['mobilevit_s, 256 px, batch 1, float32, inference', 'mobilevit_xxs, 256 px, batch 1, float32, inference']

Each case is a table of `mvit_kernels.bench.comparison`. ``mobile`` follows the paper's protocol for mobile devices: 100
calls at batch 1 in full precision, with MobileNetV2 at 224 px and MobileViT at 256 px (arXiv:2110.02178, section 4.3;
the paper takes the mean on a phone, this suite the median on this machine).
"""

from __future__ import annotations

import copy
import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..._utils.third_party import import_timm
from ...adapters import adapter_of, restore
from ...nn import MobileViT
from ...training.sampler import resolutions
from ...zoo import load, randomise
from ..ceilings import Work
from ..comparison import compare, measure, prepare
from ..origin import environment
from ..peers import PEERS, PHONES, Form, Subject, call_of
from ..recipe import CLASSIFIER_DROPOUT, DROPOUT
from ..results import Row, row
from ..runtimes import is_installed
from ..tables import Result, csv_rows
from . import operators
from ._case import Case, Context
from .operands import stages

GFLOP = {"s": 4.06, "xs": 1.97, "xxs": 0.83}  # forward pass of one image of 256 px
TASKS = {"ssdlite": 320, "deeplabv3": 512}  # detection and segmentation, at the published sizes, px
CHEAP = {
    "cpu": ("eager", "channels_last", "accelerated", "frozen", "onnxruntime", "openvino"),
    "cuda": ("eager", "channels_last", "accelerated", "frozen"),
}
COMPILED = {
    "cpu": ("compile_freezing", "compile", "compile_accelerated", "compile_max_autotune"),
    "cuda": ("compile_channels_last", "compile_reduce_overhead", "compile_max_autotune", "compile_accelerated"),
}
COMPILED_RECIPE = ("compile_channels_last", "compile_accelerated")
USUALLY = {"cpu": 40.0, "cuda": 40.0}  # seconds that compiling a network usually takes
MEMORY_SECONDS = 40.0  # per peer: remaining time below which peak memory is not measured
MOBILE_RUNS = 100
MOBILE_BASELINE, MOBILE_PX = "mobilenetv2_100", 224
MOBILE_MORE = ("runtime", "onnxruntime_exported", "openvino_exported")  # on the CPU, and the runtimes of phones
MOBILE_NAMES = (MOBILE_BASELINE, "mobilevit_xxs", "mobilevit_xs", "mobilevit_s")


class Setting(NamedTuple):
    """One table: a model by name (see `mvit_kernels.zoo.load`), or one of its blocks, and how it is called."""

    model: str
    size: int  # of the image, px
    batch: int
    dtype: str
    training: bool = False
    stage: int | None = None  # stage of the block; None for the whole model
    compiled: bool = False  # with torch.compile among the candidates
    recipe: bool = False  # with training: a whole step of the paper's recipe, see `mvit_kernels.bench.recipe`

    @property
    def variant(self) -> str:
        return self.model.rpartition("_" if "_" in self.model else "/")[2]

    @property
    def name(self) -> str:
        stage = f", block of stage {self.stage}" if self.stage else ""
        kind = "whole recipe" if self.recipe else "training" if self.training else "inference"
        kind += ", compiled too" * self.compiled
        return f"{self.model}{stage}, {self.size} px, batch {self.batch}, {self.dtype}, {kind}"

    @property
    def mode(self) -> str:
        if not self.training:
            return "inference"
        return "recipe" if self.recipe else "training" if self.stage else "step"

    @property
    def subject(self) -> dict[str, object]:
        return {
            "subject": "block" if self.stage else self.model,
            "stage": f"{self.variant}/{self.stage}" if self.stage else "",
            "mode": self.mode,
            "size": self.size,
            "batch": self.batch,
            "dtype": self.dtype,
            "backend": "auto",
        }

    @property
    def gflop(self) -> float:
        """Estimated GFLOP of a call; the number in the results is counted."""
        share = 0.2 if self.stage else 1.0
        return GFLOP[self.variant] * share * self.batch * (self.size / 256) ** 2 * (3 if self.training else 1)


def models(device: str) -> list[Case]:
    """timm's, Hugging Face's, Kornia's and our own models, also for detection and segmentation: latency at batch 1,
    throughput at larger batches."""
    first, batches, dtypes = (
        ("float32", (1, 8), ("bfloat16",)) if device == "cpu" else ("bfloat16", (256, 1), ("float16", "float32"))
    )
    s, xxs, xs = "mobilevit_s", "mobilevit_xxs", "mobilevit_xs"
    found = [Setting(model, 256, batch, first) for batch in batches for model in (s, xxs)]
    found += [Setting(model, 256, batch, dtypes[0]) for batch in batches for model in (s, xxs)]
    found += [setting._replace(compiled=True) for setting in found[: 8 if device == "cpu" else 4]]
    found += [Setting(xs, 256, batch, first) for batch in batches]
    usual = 1 if device == "cpu" else 64  # images of more pixels, too: they are checked in float64
    found += [Setting(f"{library}/s", 256, usual, first) for library in ("huggingface", "kornia", "own")]
    tasks = [(f"{task}/{variant}", size) for variant in ("s", "xxs") for task, size in TASKS.items()]
    found += [Setting(model, size, usual, first) for model, size in tasks]
    found += [Setting(s, size, usual, first) for size in (224, 320)]
    found += [Setting(s, 256, usual, dtype) for dtype in dtypes[1:]]
    more = (64, 256) if device == "cpu" else (64, 8)
    found += [Setting(model, 256, batch, first) for batch in more for model in (s, xxs, xs)]
    found += [Setting(s, 256, 1, "float16")] if device == "cpu" else []
    found += [Setting(s, size, batch, first) for batch in batches[1:] for size in (224, 320)]
    found += [Setting(model, size, batch, first) for batch in batches[1:] for model, size in tasks]
    found += [Setting(model, size, batch, dtypes[0]) for batch in (usual, *batches[1:]) for model, size in tasks]
    return [_case(setting, device) for setting in found]


def training(device: str) -> list[Case]:
    """Training steps: forward, backward and AdamW; bfloat16 under autocast. Then whole recipes."""
    batch, dtypes = (8, ("float32", "bfloat16")) if device == "cpu" else (64, ("bfloat16", "float32"))
    names = ("mobilevit_xxs", "mobilevit_s", "mobilevit_xs", "huggingface/s", "kornia/s", "own/s")
    found = [Setting(name, 256, batch, dtype, training=True) for name in names for dtype in dtypes]
    compiled = [one._replace(compiled=True) for one in found[:4] if device == "cpu" or one.dtype == dtypes[0]]
    whole = recipes(device)
    found = found[:4] + compiled + whole[:2] + found[4:] + whole[2:]  # the first: XXS and S
    return [_case(setting, device) for setting in found]


def recipes(device: str) -> list[Setting]:
    """Whole steps of the paper's recipe: at 256 px in batches of 64 to 512 on a GPU; at the resolutions of the
    multi-scale sampler with the batches that it draws; and all of them beside `torch.compile`."""
    first, batches, dtype = (8, (32,), "float32") if device == "cpu" else (128, (64, 256, 512), "bfloat16")
    names = ("own/xxs", "own/s")
    found = [Setting(name, 256, batch, dtype) for batch in (first, *batches) for name in names]
    scales = [size for size in resolutions(first) if size.height != 256]
    found += [Setting(name, size.height, size.batch, dtype) for name in names for size in scales]
    found += [Setting(name, 256, first, dtype) for name in ("own/xs", "mobilevit_s", "huggingface/s")]
    found = [setting._replace(training=True, recipe=True) for setting in found]
    return found + [setting._replace(compiled=True) for setting in found]


def blocks(device: str) -> list[Case]:
    """timm's MobileViT block of every stage, and its stack of transformer layers, which takes most of the time."""
    batches, dtypes = ((1, 8), ("float32", "bfloat16")) if device == "cpu" else ((64, 1, 256), ("bfloat16", "float32"))
    found = [Setting("mobilevit_s", 256, batches[0], dtypes[0], stage=stage) for stage in (3, 4, 5)]
    found += [Setting("mobilevit_s", 256, batches[0], dtypes[0], True, stage) for stage in (3, 4, 5)]
    found += [Setting("mobilevit_s", 256, batches[0], dtypes[1], stage=stage) for stage in (3, 4, 5)]
    found += [
        Setting("mobilevit_s", 256, batch, dtypes[0], stage=stage) for batch in batches[1:] for stage in (3, 4, 5)
    ]
    found += [
        Setting(f"mobilevit_{v}", 256, batches[0], dtypes[0], stage=st) for v in ("xs", "xxs") for st in (3, 4, 5)
    ]
    stacks = [
        operators.case_of(operators.Setting("transformer", stage, 256, dtypes[0], training), device)
        for training in (False, True)
        for stage in stages(["s"], 256, batches[0])
    ]
    return stacks + [_case(setting, device) for setting in found]


def mobile(device: str) -> list[Case]:
    """MobileViT compared with MobileNetV2, by the paper's protocol."""
    subject = {"subject": "protocol", "mode": "inference", "batch": 1, "dtype": "float32", "backend": "auto"}
    subject |= {"stage": "", "size": "", "tokens": "", "sequence": ""}
    return [
        Case("100 runs at batch 1, float32, compared with MobileNetV2", subject, sum(GFLOP.values()), _measure_mobile)
    ]


def _case(setting: Setting, device: str) -> Case:
    run = functools.partial(measure_setting, setting)
    usually = USUALLY[device] * (2 if setting.recipe else 1)  # a recipe's check is compiled, and its step
    return Case(setting.name, setting.subject, setting.gflop, run, usually * setting.compiled, setting.model)


# ----------------------------------------------------------------------------------------------------------- one case


def measure_setting(setting: Setting, context: Context) -> list[Row]:
    """Build, check and time the peers of one setting; if its library is missing, return a row that says so."""
    origin = environment(context.device)
    try:
        subject = subject_of(setting, context.device)._replace(backend=context.backend)
    except ImportError as error:
        note = f"absent: {error}"
        return [
            row(suite=context.suite, candidate="eager", clock="wall", samples=0, note=note, **setting.subject, **origin)
        ]
    peers = [name for name in CHEAP[context.device] if not (setting.training and PEERS[name].inference_only)]
    if context.device == "cpu" and setting.batch > 1 and not setting.training:
        peers.append("openvino_by_image")
    limit = context.build_seconds(USUALLY[context.device])
    possible = COMPILED_RECIPE if setting.recipe else COMPILED[context.device]
    possible = [n for n in possible if not (setting.training and PEERS[n].inference_only)]
    if setting.compiled:
        # One for every ten usual compile times that are left of the budget, and at least one.
        peers += possible[: max(1, int(context.left / 10 / USUALLY[context.device]))]
    cheap = [name for name in peers if not PEERS[name].lazy]
    # For the peak memory each peer is built once more, which takes longer than timing it.
    weighed = context.memory and context.left > MEMORY_SECONDS * len(cheap) and setting.batch <= 8 and not setting.stage
    results = compare(
        subject,
        peers,
        seconds=context.seconds,
        warmup_seconds=0.1,
        build_seconds=limit or max(context.left, 60.0),
        memory=cheap if weighed else False,
        progress=lambda line: context.progress(f"  {line}"),
    )
    for result in results:
        if PEERS[result.candidate].lazy:
            context.built(result.build_seconds)
    return csv_rows(
        results,
        subject,
        setting.model,
        origin,
        work=work_of(subject),
        ceilings=context.ceilings(subject.dtype),
        suite=context.suite,
        **setting.subject | {"backend": context.backend or "auto"},
    )


def subject_of(setting: Setting, device: str) -> Subject:
    """The model with random images, or one of its blocks with the maps that the network passes to it.

    Raises:
        ImportError: the model's library is not installed.
    """
    model = load(setting.model, device=device)
    if setting.recipe:
        import_timm()  # its average of the weights is part of the step
        model = _with_dropout(model)
    images = torch.rand(
        setting.batch, 3, setting.size, setting.size, generator=torch.Generator().manual_seed(0), device="cpu"
    )
    images = images.to(device)
    if setting.stage:
        model, images = _block(model, setting.stage, images)
    return Subject(
        model,
        images,
        getattr(torch, setting.dtype),
        None,
        setting.training,
        step=setting.mode == "step",
        recipe=setting.recipe,
    )


def _with_dropout(model: nn.Module) -> nn.Module:
    """Our own model with the paper's dropout; those of other libraries as these make them for training."""
    if not isinstance(model, MobileViT):
        return model
    trained = MobileViT(
        model.mode, num_classes=model.num_classes, dropout=DROPOUT[model.mode], classifier_dropout=CLASSIFIER_DROPOUT
    )
    trained.load_state_dict(model.state_dict())
    return trained.to(next(model.parameters()).device).eval()


def _block(model: nn.Module, stage: int, images: Tensor) -> tuple[nn.Module, Tensor]:
    """The MobileViT block of `stage`, and its input map for `images`."""
    block = [module for module in model.modules() if adapter_of(module) is not None][stage - 3]
    seen: list[Tensor] = []
    hook = block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().clone()))
    with torch.no_grad():
        model(images)
    hook.remove()
    return block, seen[0]


def work_of(subject: Subject) -> Work:
    """The minimal work of one call: the counted operations of its convolutions and products, and the bytes of weights
    and images. In training both the operations and the weights' bytes count three times."""
    model = restore(copy.deepcopy(subject.model)).float()
    image = subject.images[:1].float()
    counter = FlopCounterMode(display=False)
    with torch.set_grad_enabled(False), sdpa_kernel(SDPBackend.MATH), counter:
        model(image)
    flop = counter.get_total_flops() * len(subject.images) * (3 if subject.training else 1)
    unit = subject.dtype.itemsize
    weights = sum(p.numel() for p in model.parameters()) * (3 if subject.training else 1)
    return Work(flop / 1e9, (weights + subject.images.numel()) * unit / 1e6)


# --------------------------------------------------------------------------------------------- the paper's protocol


def _measure_mobile(context: Context) -> list[Row]:
    """Time all models and forms in turns, so that all ratios come from one run; they refer to MobileNetV2 in eager."""
    origin = environment(context.device)
    forms: dict[str, tuple[Subject, Form]] = {}
    results: dict[str, Result] = {}
    subjects: dict[str, Subject] = {}
    device = torch.device(context.device)
    compiled = context.left > 10 * USUALLY[context.device]  # for all models or none
    with torch.no_grad():
        for name in MOBILE_NAMES:
            context.progress(f"  {name}")
            subjects[name] = subject = _mobile_subject(name, context.device)._replace(backend=context.backend)
            peers = _mobile_peers(name, context.device)
            peers += COMPILED[context.device][:1] if compiled else ()
            found, built = prepare(subject, peers, build_seconds=max(2 * USUALLY[context.device], 60.0))
            for peer, result in found.items():
                results[f"{name} {peer}"] = result
                if PEERS[peer].lazy:
                    context.built(result.build_seconds)
            forms |= {f"{name} {peer}": (subject, form) for peer, form in built.items()}
        context.progress(f"timing {len(forms)} forms, {MOBILE_RUNS} runs of each")
        calls = {name: call_of(form, subject) for name, (subject, form) in forms.items()}
        baselines = dict.fromkeys(calls, f"{MOBILE_BASELINE} eager")
        measure(results, calls, device=device, warmup_seconds=0.2, rounds=MOBILE_RUNS, baselines=baselines)
        del calls, forms
        torch.compiler.reset()
    rows = []
    for name, subject in subjects.items():
        mine = [result for key, result in results.items() if key.startswith(f"{name} ")]
        about: dict[str, Any] = {"work": work_of(subject), "ceilings": context.ceilings(torch.float32)}
        rows += csv_rows(mine, subject, name, origin, suite=context.suite, **about)
    return rows


def _mobile_peers(name: str, device: str) -> list[str]:
    """Every form of a model, and every runtime that is installed; of MobileNetV2 what others make of it."""
    peers = list(CHEAP[device])
    if device == "cpu":
        peers += MOBILE_MORE
    if name == MOBILE_BASELINE:
        peers = [peer for peer in peers if not PEERS[peer].ours]
    return peers + [peer for peer in PHONES if device == "cpu" and is_installed(peer)]


def _mobile_subject(name: str, device: str) -> Subject:
    if name == MOBILE_BASELINE:
        model, size = import_timm().create_model(name).eval(), MOBILE_PX
        randomise(model)
    else:
        model, size = load(name), 256
    images = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0), device="cpu")
    return Subject(model.to(device), images.to(device))
