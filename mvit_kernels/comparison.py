# SPDX-License-Identifier: Apache-2.0
"""One model in several forms, each checked against float64 and then timed against the others.

Example:
    >>> results = compare(Subject(model, images), ["eager", "accelerated", "frozen", "compile"], seconds=10)
    >>> print(table(results))
    candidate      median ms   p20 - p80        ratio    error   allowed
    eager              60.18   58.90 - 63.02     1.00  2.1e-06   5.0e-06
    ...

A candidate is timed only if its output (in training, every gradient too) keeps the tolerance rule of
`mvit_kernels.verification`: a wrong result has no speed. One that cannot be built, is wrong, or takes too long to
compile stays in the table, with the reason in place of its times.
"""

from __future__ import annotations

import contextlib
import copy
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _peak_memory
from .peers import PEERS, Form, Subject, call_of, channels_last, check_peers, eager
from .timing import THREADS_ASLEEP, Timing, interleave
from .verification import GRADIENT, ErrorRow, error_rows, named_outputs

Progress = Callable[[str], None]


class Result(NamedTuple):
    """One line of the table. Without times where the candidate was not timed; `note` says why."""

    candidate: str
    timing: Timing | None = None
    ratio: float | None = None  # eager's median over this one's: above 1 is faster than eager
    row: ErrorRow | None = None  # the output or gradient that is nearest to what is allowed
    build_seconds: float = 0.0  # until the first call was done: what compiling costs
    peak_mb: float | None = None  # memory at its highest during one call, see `mvit_kernels._peak_memory`
    note: str = ""


# -------------------------------------------------------------------------------------------------- comparing


def compare(
    subject: Subject,
    peers: Iterable[str],
    *,
    seconds: float = 5.0,
    warmup_seconds: float = 0.5,
    build_seconds: float | None = None,
    memory: bool = False,
    progress: Progress = lambda line: None,
) -> list[Result]:
    """Build, check and time `peers`, in this order; see this module's head.

    Args:
        subject: the model and the images.
        peers: names from `PEERS`.
        seconds: measuring time of all candidates together (but three rounds at least).
        warmup_seconds: of each candidate.
        build_seconds: a candidate whose building and first call take longer is given up (in the main thread).
        memory: also measure the peak memory of a call on the CPU, which builds every peer once more, in a process of
            its own; on a GPU it is measured always.
        progress: called with a line of text before each step.

    Returns:
        One `Result` a peer.

    Raises:
        ValueError: an unknown peer; a subject whose output is not finite in float64.
    """
    names = check_peers(peers, subject.training)
    device = subject.images.device
    with torch.set_grad_enabled(subject.training):
        progress("float64 reference")
        orders = (False, True) if subject.training else (False,)  # as `verify` does, and for its reasons
        own = [_outputs(build(subject), subject, order) for build in (eager, channels_last) for order in orders]
        wide = subject._replace(model=copy.deepcopy(subject.model).double(), dtype=torch.float64)
        truth = _outputs(eager(wide), wide._replace(images=subject.images.to(subject.dtype).double()))
        if not all(torch.isfinite(value).all() for value in truth.values()):
            raise ValueError("the model's output is not finite in float64 either; mend its weights or the images")

        results: dict[str, Result] = {}
        calls: dict[str, Callable[[], object]] = {}
        for name in names:
            progress(f"{name} ({PEERS[name].summary})")
            start = time.perf_counter()
            try:
                with time_limit(build_seconds):
                    form = PEERS[name].build(subject)
                    row = worst_row(_outputs(form, subject), own, truth)
            except TimeLimit:
                note = f"given up: not built within {build_seconds:.0f} s"
                results[name] = Result(name, build_seconds=build_seconds, note=note)
                continue
            except Exception as error:  # whatever a compiler or a missing library may raise
                results[name] = Result(name, note=f"absent: {_sentence(error)}")
                continue
            took = time.perf_counter() - start
            if not row.ok:
                note = f"not timed: the error of {row.name} is {row.error:.1e}, above {row.allowed:.1e}"
                results[name] = Result(name, row=row, note=note)
                continue
            calls[name] = call_of(form, subject)
            note = f"built in {took:.0f} s" if PEERS[name].lazy else ""
            peak = _peak_memory.on_gpu(calls[name], device) if device.type == "cuda" else None
            results[name] = Result(name, row=row, build_seconds=took, peak_mb=peak, note=note)

        if memory and device.type == "cpu":
            progress("peak memory, each built once more in a process of its own")
            timeout = 120 + 3 * sum(results[name].build_seconds for name in calls)
            for name, peak in _peak_memory.on_cpu(subject, calls, timeout=timeout).items():
                result = results[name]
                if isinstance(peak, str):
                    why = f"memory not measured: {_sentence(peak)}"
                    results[name] = result._replace(note="; ".join(filter(None, (result.note, why))))
                else:
                    results[name] = result._replace(peak_mb=peak)

        progress(f"timing {', '.join(calls)}")
        pause = THREADS_ASLEEP if device.type == "cpu" and torch.get_num_threads() > 1 else 0.0
        timed = dict(seconds=seconds, warmup_seconds=warmup_seconds, pause=pause, device=device)
        times = interleave(calls, **timed) if calls else {}
    for name, timing in times.items():
        ratio = times["eager"].median / timing.median if "eager" in times else None
        results[name] = results[name]._replace(timing=timing, ratio=ratio)
    if any(PEERS[name].lazy for name in names):
        calls.clear()
        torch.compiler.reset()  # its limit of recompilations counts all models of one class
    return [results[name] for name in names]


def worst_row(outputs: dict[str, Tensor], own: list[dict[str, Tensor]], truth: dict[str, Tensor]) -> ErrorRow:
    """The tolerance rule on every tensor of a candidate: the row with the largest error for what it is allowed.

    Args:
        outputs: the candidate's, by name; gradients by ``GRADIENT`` and the parameter's name.
        own: PyTorch's own results in the same dtype, one dict for each memory format.
        truth: the float64 results.

    Raises:
        ValueError: the candidate has no such output, or one of another shape.
    """
    if outputs.keys() != truth.keys():
        odd = sorted(outputs.keys() ^ truth.keys())
        raise ValueError(f"its outputs and gradients are not the model's own: {', '.join(odd[:3])} on one side only")
    rows = error_rows(outputs, own, truth)
    return max(rows, key=lambda row: (not row.ok, row.error / row.allowed if row.allowed else row.error))


def _outputs(form: Form, subject: Subject, reverse: bool = False) -> dict[str, Tensor]:
    """The outputs of one call by name, and in training the gradients; with `reverse` by the batch in reverse order."""
    dtype = subject.dtype
    if not subject.training:
        return {name: value.detach() for name, value in named_outputs(form.model(form.images)).items()}
    if dtype == torch.float64:
        form = Form(form.model.double(), form.images.double())
    if reverse:
        form = form._replace(images=form.images.flip(0))
    outputs = {name: value.detach() for name, value in call_of(form, subject, reverse)().items()}
    if reverse:
        outputs = {name: value.flip(0) for name, value in outputs.items()}
    gradients = {
        GRADIENT + name.removeprefix("_orig_mod."): parameter.grad.clone()
        for name, parameter in form.model.named_parameters()
        if parameter.grad is not None
    }
    return outputs | gradients


def _sentence(error: Exception | str) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:197]}..."


class TimeLimit(BaseException):
    """The time is over. No `Exception`: torch.compile turns those into its own, or falls back and goes on."""


@contextlib.contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Raise `TimeLimit` after `seconds` inside. Needs a signal, so it is without effect outside the main thread."""
    possible = hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()
    if seconds is None or not possible:
        yield
        return

    def expire(signum: int, frame: object) -> None:
        raise TimeLimit

    previous = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


# ------------------------------------------------------------------------------------------------- tables and rows


def table(results: list[Result]) -> str:
    """The results as text, one line a candidate; those without times say why."""
    width = max(len("candidate"), *(len(result.candidate) for result in results))
    header = f"{'candidate':<{width}}  {'median ms':>9}  {'p20 - p80':>17}  {'ratio':>5}  {'error':>7}  {'allowed':>7}"
    lines = [header + "    peak MB" * any(result.peak_mb is not None for result in results)]
    for result in results:
        line = f"{result.candidate:<{width}}"
        if result.timing is not None:
            timing = result.timing
            spread = f"{timing.p20:.2f} - {timing.p80:.2f}"
            ratio = "" if result.ratio is None else f"{result.ratio:.2f}"
            line += f"  {timing.median:9.2f}  {spread:>17}  {ratio:>5}"
            line += f"  {result.row.error:7.1e}  {result.row.allowed:7.1e}"
            line += "" if result.peak_mb is None else f"  {result.peak_mb:9.1f}"
        lines.append(f"{line}  {result.note}".rstrip())
    return "\n".join(lines)


def csv_rows(results: list[Result], subject: Subject, model: str, origin: dict[str, str]) -> list[dict[str, Any]]:
    """The results in long form, one dict a candidate, all with the same keys; `origin` is `timing.environment()`."""
    batch, _, height, width = subject.images.shape
    rows = []
    for result in results:
        timing = result.timing or Timing(None, None, None, 0)
        row = result.row
        rows.append(
            {
                "model": model,
                "mode": "training" if subject.training else "inference",
                "size": str(height) if height == width else f"{height}x{width}",
                "batch": batch,
                "dtype": str(subject.dtype).removeprefix("torch."),
                "backend": subject.backend or "auto",
                "candidate": result.candidate,
                "median_ms": _rounded(timing.median),
                "p20_ms": _rounded(timing.p20),
                "p80_ms": _rounded(timing.p80),
                "samples": timing.count,
                "ratio": _rounded(result.ratio),
                "worst": row.name if row else "",
                "error": _rounded(row.error if row else None),
                "allowed": _rounded(row.allowed if row else None),
                "build_s": _rounded(result.build_seconds),
                "peak_mb": _rounded(result.peak_mb),
                "note": result.note,
            }
            | origin
        )
    return rows


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")
