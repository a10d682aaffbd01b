# SPDX-License-Identifier: Apache-2.0
"""Suite ``operators``: each operator at the stages of MobileViT, in forward and in forward plus backward.

Example:
    >>> [case.name for case in cases("cpu")][:2]
    ['transformer, s stage 3, 256 px, batch 1, float32, inference', 'transformer, s stage 4, ...']

Our backends are compared with PyTorch's composition of the operator and with the usual alternatives: each of PyTorch's
attention backends, an inverted residual as three channels-last convolutions, the compiled composition. Cases are
ordered by interest: S forward, its first stack over batch sizes and sequence lengths, S backward, S forward again with
torch.compile (which takes long), other dtypes, then all operators over batch sizes and lengths, and the smaller
variants.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ... import backends
from ...rounding import RoundedArithmetic
from ...verification import GRADIENT, ErrorRow, error_row
from ..comparison import build_and_check, measure
from ..device_clock import Replay, capture, sets_beyond_cache
from ..origin import environment
from ..results import Row
from ..tables import Result, rows_of
from ._case import Case, Context
from .operands import VARIANTS, Operands, Stage, operands, operands_of, sequence_of, sizes_of, stages

# The whole stack, then its parts, the slowest first.
ORDER = ("transformer", "transformer_layer", "patch_attention", "layer_norm_mlp", "layer_norm_linear")
ORDER += ("linear_residual", "inverted_residual", "layer_norm", "batch_norm_activation")
BATCH = {"cpu": 1, "cuda": 64}
BATCHES = {"cpu": (2, 4, 8, 16), "cuda": (1, 8, 256)}
SIZES = (128, 192, 384, 512)  # N at stage 3: 64, 144, 576, 1024
DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("bfloat16", "float32", "float16")}
ATTENTIONS = {
    "sdpa_math": SDPBackend.MATH,
    "sdpa_flash": SDPBackend.FLASH_ATTENTION,
    "sdpa_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
}
ON_CPU = ("sdpa_math", "sdpa_flash")  # the attention backends that PyTorch has on the CPU
DRAWS = 8  # random draws that are checked together if one alone misses
COMPILE_USUALLY = {"cpu": 15.0, "cuda": 8.0}  # seconds that compiling an operator usually takes


class Setting(NamedTuple):
    """The parameters of one case."""

    operator: str
    stage: Stage
    size: int  # of the image, px
    dtype: str
    training: bool
    compiled: bool = False  # with torch.compile among the candidates

    @property
    def name(self) -> str:
        s = self.stage
        kind = ("training" if self.training else "inference") + ", compiled too" * self.compiled
        return f"{self.operator}, {s.variant} stage {s.index}, {self.size} px, batch {s.batch}, {self.dtype}, {kind}"

    def draw(self, seed: int) -> Operands:
        """Random operands, float32 on the CPU."""
        return operands(self.operator, self.stage, seed=seed)

    @property
    def subject(self) -> dict[str, object]:
        return {
            "subject": self.operator,
            "stage": f"{self.stage.variant}/{self.stage.index}",
            "mode": "training" if self.training else "inference",
            "size": self.size,
            "batch": self.stage.batch,
            "tokens": self.stage.tokens,
            "sequence": self.stage.sequence,
            "dtype": self.dtype,
            "backend": "auto",
        }


def settings(device: str) -> Iterator[Setting]:
    """What is measured, the most valuable first; some settings come twice."""
    batch, dtypes = BATCH[device], DTYPES[device]
    compiled = dtypes if device == "cpu" else dtypes[:1]

    def has_kernels(operator: str) -> bool:
        return any(operator in backends.operators(name) for name in backends.PREFERENCE[device][:-1])

    def all_of(variants, size, batch, dtype, training=False, compiled=False) -> Iterator[Setting]:
        for operator in filter(has_kernels, ORDER):
            for stage in stages(variants, size, batch):
                if not (training and operator == "inverted_residual"):
                    yield Setting(operator, stage, size, dtype, training, compiled)

    yield from all_of(["s"], 256, batch, dtypes[0])
    for size, other in (*((256, other) for other in BATCHES[device]), *((size, batch) for size in SIZES)):
        # At a batch at which one launch of a whole stack is the plan on a GPU, every stack.
        first = stages(["s"], size, other)[: 3 if (device, other) == ("cuda", 256) else 1]
        yield from (Setting("transformer", stage, size, dtypes[0], False) for stage in first)
    yield from all_of(["s"], 256, batch, dtypes[0], training=True)
    yield from all_of(["s"], 256, batch, dtypes[0], compiled=True)
    for dtype in dtypes[1:]:
        yield from all_of(["s"], 256, batch, dtype)
    for other in BATCHES[device]:
        yield from all_of(["s"], 256, other, dtypes[0])
    for size in SIZES:
        yield from (s for s in all_of(["s"], size, batch, dtypes[0]) if s.stage.index == 3)
    for variant in VARIANTS[1:]:
        for training in (False, True):
            yield from all_of([variant], 256, batch, dtypes[0], training)
    for dtype in dtypes[1:]:
        yield from all_of(["s"], 256, batch, dtype, training=True)
    for dtype in compiled:
        for training in (False, True):
            yield from all_of(["s"], 256, batch, dtype, training, compiled=True)


def cases(device: str) -> list[Case]:
    """The cases of this suite."""
    return [case_of(setting, device) for setting in dict.fromkeys(settings(device))]


def case_of(setting: Setting, device: str) -> Case:
    """One setting as a case."""
    one = operands(setting.operator, setting.stage._replace(batch=1))
    cost = max(one.flop * setting.stage.batch / 1e9 * (3 if setting.training else 1), 1e-3)
    run = functools.partial(measure_setting, setting)
    return Case(setting.name, setting.subject, cost, run, COMPILE_USUALLY[device] if setting.compiled else 0.0)


class OwnShape(NamedTuple):
    """One call of an operator at a shape of the user's own, for `results_of`."""

    operator: str
    shape: tuple[int, ...]  # of `operands_of`
    sizes: dict[str, Any]
    dtype: str
    training: bool = False
    compiled: bool = True

    def draw(self, seed: int) -> Operands:
        return operands_of(self.operator, self.shape, seed=seed, **self.sizes)

    @property
    def name(self) -> str:
        kind = "training" if self.training else "inference"
        return f"{self.operator}, {self.about}, {self.dtype}, {kind}"

    @property
    def about(self) -> str:
        """The shape, and the sizes that a call has beyond it: ``8x32x32x144, num_heads 4, patch_size 2x2``."""
        known = sizes_of(self.operator) | self.sizes
        texts = {n: "x".join(map(str, v)) if isinstance(v, tuple) else v for n, v in known.items() if v is not None}
        return ", ".join(["x".join(map(str, self.shape)), *(f"{name} {text}" for name, text in texts.items())])

    @property
    def subject(self) -> dict[str, object]:
        patch_size = (sizes_of(self.operator) | self.sizes).get("patch_size")
        return {
            "subject": self.operator,
            "stage": self.about,
            "mode": "training" if self.training else "inference",
            "size": "",
            "batch": self.shape[0],
            "tokens": math.prod(self.shape[:-1]),
            "sequence": sequence_of(self.shape, patch_size) if patch_size else "",
            "dtype": self.dtype,
            "backend": "auto",
        }


# --------------------------------------------------------------------------------------------------------- one case


def measure_setting(setting: Setting, context: Context) -> list[Row]:
    """Build, check and time every candidate of one setting."""
    results, case = results_of(setting, context)
    work = case.training_work if setting.training else case.work
    identity = {"suite": context.suite} | setting.subject | {"backend": context.backend or "auto"}
    ceilings = context.ceilings(getattr(torch, setting.dtype))
    return rows_of(results, environment(context.device), work=work, ceilings=ceilings, **identity)


def results_of(setting: Setting | OwnShape, context: Context) -> tuple[list[Result], Operands]:
    """What `measure_setting` makes rows of, and the operands.

    Raises:
        ValueError: there is no candidate of a name in `context.peers`.
    """
    dtype, device = getattr(torch, setting.dtype), torch.device(context.device)

    def draw(seed: int) -> Operands:
        return setting.draw(seed).to(device, dtype)

    case = draw(0)
    with torch.set_grad_enabled(setting.training):
        own, truth = truth_of(case, setting.training)
        results: dict[str, Result] = {}
        functions: dict[str, Callable[..., Tensor]] = {}
        with_compile = setting.compiled and (context.peers is None or "compile" in context.peers)
        for name, function in _asked_for(candidates(case, device.type, with_compile), case, context).items():
            context.progress(f"  {name}")  # after a crash the log shows the candidate
            compiled = name.startswith("compile")
            limit = context.build_seconds(COMPILE_USUALLY[device.type]) if compiled else None
            gate = functools.partial(check, case, setting.training, own, truth, redraw=draw)
            built, results[name] = build_and_check(name, lambda f=function: f, gate, limit)
            if compiled:
                context.built(results[name].build_seconds)
            if built is not None:
                functions[name] = function
        del own, truth, gate
        for backend in backends.PREFERENCE[device.type] if context.peers is None and context.backend is None else ():
            if why := backends.unavailable(backend, device.type):
                results[backend] = Result(backend, note=f"absent: {'; '.join(why)}")

        calls = {name: call_of(f, case.tensors, setting.training) for name, f in functions.items()}
        replays = {name: functools.partial(_replay, f, case, setting.training, device) for name, f in functions.items()}
        context.progress(f"  timing {', '.join(calls)}")
        measure(results, calls, replays=replays, device=device, warmup_seconds=0.05, seconds=context.seconds)
        if with_compile:
            del functions, calls, replays
            torch.compiler.reset()
    return list(results.values()), case


def _asked_for(
    found: dict[str, Callable[..., Tensor]], case: Operands, context: Context
) -> dict[str, Callable[..., Tensor]]:
    """Of the candidates those of the backend and of the names that were asked for, and eager."""
    if context.backend:  # also one that does not take this call: its row then says why
        found = {name: function for name, function in found.items() if name not in backends.BACKENDS}
        found[context.backend] = functools.partial(case.public, backend=context.backend)
    if context.peers is None:
        return found
    if unknown := [name for name in context.peers if name not in found]:
        known = ", ".join(dict.fromkeys([*found, "compile"]))
        raise ValueError(f"{case.operator} has no candidate {', '.join(unknown)} here; choose from {known}")
    return {name: function for name, function in found.items() if name == "eager" or name in context.peers}


def candidates(case: Operands, device: str, compiled: bool) -> dict[str, Callable[..., Tensor]]:
    """Candidate's name -> function from the tensors to the result."""
    found: dict[str, Callable[..., Tensor]] = {"eager": case.plain}
    if case.operator == "patch_attention":
        for name, backend in ATTENTIONS.items():
            if device == "cuda" or name in ON_CPU:
                found[name] = functools.partial(_with_attention, backend, case.plain)
    if case.operator == "inverted_residual":
        found["convolutions"] = _convolutions
    for backend in backends.PREFERENCE[device]:
        kernels = backend != "reference" and case.operator in backends.operators(backend)
        if kernels and not backends.unavailable(backend, device):
            found[backend] = functools.partial(case.public, backend=backend)
    if compiled:
        plain = case.plain
        found["compile"] = torch.compile(lambda *t: plain(*t), dynamic=False)
    return found


def _with_attention(backend: SDPBackend, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return function(*tensors)


def _convolutions(x, expand, expand_bias, depthwise, depthwise_bias, project, project_bias) -> Tensor:
    y = F.silu(F.conv2d(x.permute(0, 3, 1, 2), expand[:, :, None, None], expand_bias))
    y = F.silu(F.conv2d(y, depthwise, depthwise_bias, 2, 1, groups=y.shape[1]))
    return F.conv2d(y, project[:, :, None, None], project_bias).permute(0, 2, 3, 1)


def call_of(function: Callable[..., Tensor], tensors: tuple[Tensor, ...], training: bool) -> Callable[[], object]:
    """The function to time: the call, or in training forward and backward with a fixed random cotangent."""
    if not training:
        return lambda: function(*tensors)
    leaves = [t.detach().requires_grad_() for t in tensors]
    with torch.no_grad():
        cotangent = torch.randn_like(function(*tensors))

    def train() -> tuple[Tensor, ...]:
        out = function(*leaves)
        return (out, *torch.autograd.grad(out, leaves, cotangent))

    return train


def _replay(function: Callable[..., Tensor], case: Operands, training: bool, device: torch.device) -> Replay:
    work = case.training_work if training else case.work
    parameters = sum(t.nbytes for i, t in enumerate(case.tensors) if i not in case.activations)
    count = sets_beyond_cache(max(1e6 * work.megabytes - parameters, 1), device)
    draws = [case.tensors, *(case.with_maps(torch.randn_like) for _ in range(count - 1))]
    return capture([call_of(function, tensors, training) for tensors in draws])


# --------------------------------------------------------------------------------------------------------- the gate


def truth_of(case: Operands, training: bool) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """PyTorch's own results in the case's dtype, for both orders of the batch, and the float64 results."""
    generator = torch.Generator().manual_seed(1)
    out = case.plain(*case.tensors).detach()
    cotangent = torch.randn(out.shape, generator=generator, device="cpu").to(out)
    own = [_outputs(case, case.plain, case.tensors, cotangent, training)]
    flipped = _outputs(case, case.plain, case.with_maps(lambda t: t.flip(0)), cotangent.flip(0), training)
    flipped["output"] = flipped["output"].flip(0)
    for index in case.activations if training else ():
        name = GRADIENT + case.names[index]
        flipped[name] = flipped[name].flip(0)
    own.append(flipped)
    wide = tuple(t.double() for t in case.tensors)
    return own, _outputs(case, case.plain, wide, cotangent.double(), training)


def _outputs(case: Operands, function, tensors, cotangent: Tensor, training: bool) -> dict[str, Tensor]:
    if not training:
        return {"output": function(*tensors)}
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = function(*leaves)
    gradients = torch.autograd.grad(out, leaves, cotangent)
    return {"output": out.detach()} | {GRADIENT + name: g for name, g in zip(case.names, gradients, strict=True)}


def check(
    case: Operands,
    training: bool,
    own: list[dict[str, Tensor]],
    truth: dict[str, Tensor],
    function: Callable[..., Tensor],
    redraw: Callable[[int], Operands] | None = None,
) -> ErrorRow:
    """Apply the tolerance rule; return the row of the result or gradient that is closest to its limit or beyond it.

    Both sides of the rule are maxima of rounding errors, and over few values either may be off by chance: a correct
    operator misses in about one of a hundred cases. An operator that misses is therefore checked on `DRAWS` draws
    together, a larger sample for the same rule, in which wrong values remain wrong.

    Args:
        case, training: the operands, and whether gradients are checked.
        own, truth: as `truth_of` returns them.
        function: the candidate.
        redraw: from a seed to other operands; None to decide on one draw.
    """
    rows = _rows(case, training, own, truth, function)
    if redraw is not None and not all(row.ok for row in rows) and all(math.isfinite(row.error) for row in rows):
        draws = [rows]
        for other in map(redraw, range(1, DRAWS)):
            draws.append(_rows(other, training, *truth_of(other, training), function))
        unit = torch.finfo(case.tensors[0].dtype).eps
        rows = [_together(several, unit) for several in zip(*draws, strict=True)]
    return max(rows, key=lambda row: (not row.ok, row.error / row.allowed if row.allowed else row.error))


def _rows(case: Operands, training: bool, own, truth, function) -> list[ErrorRow]:
    cotangent = torch.randn(truth["output"].shape, generator=torch.Generator().manual_seed(1), device="cpu")
    outputs = _outputs(case, function, case.tensors, cotangent.to(own[0]["output"]), training)
    wide = tuple(t.double() for t in case.tensors)

    @functools.cache
    def careful(seed: int) -> dict[str, Tensor]:
        with RoundedArithmetic(outputs["output"].dtype, seed):
            return _outputs(case, case.plain, wide, cotangent.to(own[0]["output"]).double(), training)

    return [
        error_row(
            name, outputs[name], [o[name] for o in own], truth[name], careful=lambda s, name=name: careful(s)[name]
        )
        for name in truth
    ]


def _together(rows: Sequence[ErrorRow], unit: float) -> ErrorRow:
    """Combine one tensor's errors over several draws, as if all were one sample."""
    error, pytorch, scale = (max(row[column] for row in rows) for column in (1, 2, 4))
    careful = max((row.careful_error for row in rows if row.careful_error is not None), default=None)
    allowed = max(2 * (pytorch + unit * scale), *(row.allowed for row in rows))
    return ErrorRow(rows[0].name, error, pytorch, allowed, scale, careful)
