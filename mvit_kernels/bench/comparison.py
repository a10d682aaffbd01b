# SPDX-License-Identifier: Apache-2.0
"""Compares several forms of one model: each is checked against float64 and then timed against the others.

Example:
    >>> results = compare(Subject(model, images), ["eager", "accelerated", "frozen", "compile"], seconds=10)
    >>> print(tables.table(results))
    candidate      median ms   p20 - p80        ratio    error   allowed
    eager              60.18   58.90 - 63.02     1.00  2.1e-06   5.0e-06
    ...

A candidate is timed only if its outputs (in training also all gradients) satisfy the tolerance rule of
`mvit_kernels.verification`: the speed of a wrong result is meaningless. A candidate that cannot be built, is wrong, or
takes too long to compile stays in the table, with the reason instead of times.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..rounding import RoundedArithmetic
from ..verification import GRADIENT, ErrorRow, error_rows, named_outputs
from . import peak_memory
from .device_clock import Replay, capture
from .peers import PEERS, Form, Subject, call_of, channels_last, check_peers, eager
from .profiling import launches
from .tables import Result
from .timing import THREADS_ASLEEP, Timing, interleave, synchronize

Progress = Callable[[str], None]
SAMPLE_SECONDS = 2e-3  # a sample of a shorter call consists of several calls
IMAGE_SETS = 4  # in the graph of a model; few are enough, since its own maps pass through the cache


def compare(
    subject: Subject,
    peers: Iterable[str],
    *,
    seconds: float = 5.0,
    warmup_seconds: float = 0.5,
    build_seconds: float | None = None,
    memory: bool | Collection[str] = False,
    progress: Progress = lambda line: None,
) -> list[Result]:
    """Build, check and time `peers`, as described at the top of this module.

    Args:
        subject: the model and the images; not changed.
        peers: names from `PEERS`, or "all"; "eager" is always included, and comes first.
        seconds: measuring time of all candidates together, at least three rounds.
        warmup_seconds: warm-up time of each candidate.
        build_seconds: give up a candidate whose building and first call take longer. Works in the main thread only.
        memory: also measure peak memory on the CPU, for all peers or for those named; each is built once more, in a
            fresh process. On a GPU it is always measured.
        progress: called with a line of text before each step.

    Returns:
        One `Result` per peer.

    Raises:
        ValueError: an unknown peer; in training a peer for inference only; an output that is not finite in float64.
    """
    names = check_peers(peers, subject.training)
    with torch.set_grad_enabled(subject.training):
        results, forms = prepare(subject, names, build_seconds=build_seconds, progress=progress)
        calls = {name: call_of(form, subject) for name, form in forms.items()}
        device = subject.images.device
        if memory and device.type == "cpu":
            progress("peak memory: each is built once more in its own process")
            _add_peak_memory(subject, [n for n in calls if memory is True or n in memory], results)
        progress(f"timing {', '.join(calls)}")
        replays = {} if subject.training else {name: _replay_of(name, form) for name, form in forms.items()}
        measure(results, calls, replays=replays, seconds=seconds, warmup_seconds=warmup_seconds, device=device)
    if any(PEERS[name].lazy for name in names):
        del calls, forms, replays
        torch.compiler.reset()  # the recompilation limit counts all models of one class
    return [results[name] for name in names]


def prepare(
    subject: Subject,
    names: Iterable[str],
    *,
    build_seconds: float | None = None,
    progress: Progress = lambda line: None,
) -> tuple[dict[str, Result], dict[str, Form]]:
    """Build and check the peers `names`: a `Result` without times for each, and the form of each correct one.

    The caller sets the grad mode that the subject needs. Arguments and errors are those of `compare`.
    """
    progress("float64 reference")
    checked = subject.checked
    orders = (False, True) if subject.training else (False,)  # both orders of the batch, for the reasons of `verify`
    own = [_outputs(build(checked), checked, order) for build in (eager, channels_last) for order in orders]
    wide = checked._replace(model=copy.deepcopy(subject.model).double(), dtype=torch.float64)
    truth = _outputs(eager(wide), wide._replace(images=checked.images.to(subject.dtype).double()))
    if not all(torch.isfinite(value).all() for value in truth.values()):
        raise ValueError("the model's output is not finite in float64 either; fix its weights or the images")

    @functools.cache
    def careful(seed: int) -> dict[str, Tensor]:
        with RoundedArithmetic(subject.dtype, seed):
            return _outputs(eager(wide), wide._replace(images=checked.images.to(subject.dtype).double()))

    def first_call(form: Form) -> dict[str, Tensor]:
        outputs = _outputs(form._replace(images=form.images[: len(checked.images)]), checked)
        if subject.recipe:
            call_of(form, subject)()  # compiles for the whole batch, or runs out of memory: here it is noted
        return outputs

    yardsticks = (own, truth, None if subject.dtype == torch.float64 else careful)
    results: dict[str, Result] = {}
    forms: dict[str, Form] = {}
    for name in names:
        progress(f"{name} ({PEERS[name].summary})")
        form, result = build_and_check(
            name,
            lambda name=name: PEERS[name].build(subject),
            first_call,
            build_seconds,
            lambda outputs: worst_row(outputs, *yardsticks),
        )
        if result.row is not None and result.row.ok and PEERS[name].lazy:
            result = result._replace(note=f"built in {result.build_seconds:.0f} s")
        results[name] = result
        if form is not None:
            forms[name] = form
    return results, forms


def build_and_check(
    name: str,
    build: Callable[[], object],
    check: Callable[[object], Any],
    seconds: float | None,
    judge: Callable[[Any], ErrorRow] = lambda row: row,
) -> tuple[object | None, Result]:
    """What `build` returns if it passes `check`, otherwise None; and a `Result` with the error row, or with the reason
    for a failure: an exception, or more than `seconds` spent.

    `check` gives the error row, or what `judge` makes it of. That takes none of the candidate's time: the yardsticks
    may be computed there, for all candidates.
    """
    start = time.perf_counter()
    try:
        with time_limit(seconds):
            built = build()
            found = check(built)
        took = time.perf_counter() - start
        row = judge(found)
    except TimeLimit:
        return None, Result(name, build_seconds=seconds, note=f"given up: not built within {seconds:.0f} s")
    except Exception as error:  # whatever a compiler or a missing library may raise
        return None, Result(name, note=f"absent: {_sentence(error)}")
    if not row.ok:
        note = f"not timed: the error of {row.name} is {row.error:.1e}, above {row.allowed:.1e}"
        return None, Result(name, row=row, note=note)
    return built, Result(name, row=row, build_seconds=took)


def measure(
    results: dict[str, Result],
    calls: Mapping[str, Callable[[], object]],
    *,
    replays: Mapping[str, Callable[[], Replay]] | None = None,
    device: torch.device,
    warmup_seconds: float = 0.5,
    baselines: Mapping[str, str] | None = None,
    **how_long: float,
) -> None:
    """Time `calls` in interleaved runs, by wall clock and on a GPU also by device clock; add the times to `results`.

    Args:
        results: `Result` by candidate; changed in place.
        calls: the functions to time; set the grad mode outside.
        replays: on a GPU, functions that capture a candidate's graph.
        baselines: candidate -> candidate whose median its ratio refers to; "eager" if it is not in it.
        how_long: ``seconds`` or ``rounds`` of `interleave`.
    """
    if not calls:
        return
    on_gpu = device.type == "cuda"
    pause = THREADS_ASLEEP if not on_gpu and torch.get_num_threads() > 1 else 0.0
    options = dict(warmup_seconds=warmup_seconds, device=device, **how_long)
    times = interleave(calls, sample_seconds=SAMPLE_SECONDS, pause=pause, **options)
    baselines = {name: (baselines or {}).get(name, "eager") for name in calls}
    for name, timing in times.items():
        results[name] = results[name]._replace(timing=timing, ratio=_ratio(times, baselines[name], name))
    if on_gpu:
        _measure_device(results, calls, replays or {}, baselines, device, options)


def _measure_device(results, calls, replays, baselines, device, options) -> None:
    """Measure launches, memory and device times. A failure is noted and does not affect the wall-clock times, unless
    the GPU is lost: then `synchronize` raises, and nothing on it can be trusted."""
    captured: dict[str, Replay] = {}
    for name, call in calls.items():
        try:
            peak = peak_memory.on_gpu(call, device)
            results[name] = results[name]._replace(launches=launches(call, device) or None, peak_mb=peak)
            if name in replays:
                captured[name] = replays[name]()
        except Exception as error:  # it waits for the device, or does something else that cannot be captured
            synchronize(device)
            results[name] = results[name]._replace(graph_note=f"no graph: {_sentence(error)}")
    if not captured:
        return
    try:
        times = interleave({name: one.run for name, one in captured.items()}, events=True, **options)
    except Exception as error:
        synchronize(device)
        for name in captured:
            results[name] = results[name]._replace(graph_note=f"not replayed: {_sentence(error)}")
        return
    times = {name: timing.per(captured[name].calls) for name, timing in times.items()}
    for name, timing in times.items():
        results[name] = results[name]._replace(graph=timing, graph_ratio=_ratio(times, baselines[name], name))


def _ratio(times: Mapping[str, Timing], baseline: str, name: str) -> float | None:
    return times[baseline].median / times[name].median if baseline in times else None


def _replay_of(name: str, form: Form) -> Callable[[], Replay]:
    def replay() -> Replay:
        if PEERS[name].has_graphs:
            raise ValueError("each call replays CUDA graphs of its own")
        images = [form.images, *(form.images.clone() for _ in range(IMAGE_SETS - 1))]
        return capture([lambda x=x: form.model(x) for x in images])

    return replay


def _add_peak_memory(subject: Subject, names: list[str], results: dict[str, Result]) -> None:
    timeout = 120 + 3 * sum(results[name].build_seconds for name in names)
    for name, peak in peak_memory.on_cpu(subject, names, timeout=timeout).items():
        result = results[name]
        if isinstance(peak, str):
            why = f"memory not measured: {_sentence(peak)}"
            results[name] = result._replace(note="; ".join(filter(None, (result.note, why))))
        else:
            results[name] = result._replace(peak_mb=peak)


def worst_row(
    outputs: dict[str, Tensor],
    own: list[dict[str, Tensor]],
    truth: dict[str, Tensor],
    careful: Callable[[int], dict[str, Tensor]] | None = None,
) -> ErrorRow:
    """Apply the tolerance rule to every tensor of a candidate; return the row closest to its limit, or beyond it.

    Args:
        outputs: the candidate's outputs by name; a gradient's name is ``GRADIENT`` + the parameter's name.
        own: PyTorch's own results in the same dtype, one dict per memory format and order of the batch.
        truth: the float64 results.
        careful: as in `verification.error_rows`.

    Raises:
        ValueError: an output is missing, is not one of the model's, or has another shape.
    """
    if outputs.keys() != truth.keys():
        odd = sorted(outputs.keys() ^ truth.keys())
        raise ValueError(f"its outputs and gradients differ from the model's: {', '.join(odd[:3])} on one side only")
    rows = error_rows(outputs, own, truth, careful)
    return max(rows, key=lambda row: (not row.ok, row.error / row.allowed if row.allowed else row.error))


def _outputs(form: Form, subject: Subject, reverse: bool = False) -> dict[str, Tensor]:
    """The outputs of one call by name, in training also the gradients; `reverse` runs the batch in reverse order."""
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
    """The time is over. Not an `Exception`, which torch.compile would wrap, or handle by falling back to eager."""


@contextlib.contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Raise `TimeLimit` after `seconds` inside. It uses a signal, so it has no effect outside the main thread."""
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
