# SPDX-License-Identifier: Apache-2.0
"""``mvit-kernels bench``: its arguments, and which of them belong together; `measuring` does what they ask for.

There are five ways to use it: one model, one operator at a shape, suites, two sets of results, and two commits. What is
given to one that another takes is an error that says to which it belongs: nothing is ignored.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

from .._utils.freed_memory import keep_freed_memory
from . import add_command, add_result_arguments, measuring, output_file
from .models import add_model_arguments, positive

_EXAMPLES = """\
  mvit-kernels bench --model mobilevit_s
  mvit-kernels bench --model apple/mobilevit-small --batch 8 --peers eager,accelerated,frozen,compile
  mvit-kernels bench --model own/xxs --train --output training.csv --plot training.png
  mvit-kernels bench --operator patch_attention --shape 8,32,32,144 --heads 4 --dtype bfloat16 --train
  mvit-kernels bench --operator layer_norm_linear --shape 4096,144 --out-features 432 --json > rows.json
  mvit-kernels bench --suite all --budget 30
  mvit-kernels bench --suite operators --operator transformer --stage s/3 --dtype float32 --dry-run
  mvit-kernels bench --suite operators --device cuda --budget 3 --results here --resume
  mvit-kernels bench --compare old.csv here --plot changes.png
  mvit-kernels bench --compare-commits HEAD~1 . --suite operators --operator patch_attention --budget 5

The exit code is 1 if the error of one of our candidates is more than allowed, 2 for any other error, 130 after
Ctrl-C: --resume then goes on with a suite."""

_FILTERS = "operator model stage dtype batch size train".split()
_TABLE = "output json plot".split()
_MACHINE = "device threads".split()


class _Use(NamedTuple):
    """One way to use the command."""

    option: str  # that selects it
    what: str  # in messages
    takes: tuple[str, ...]


_USES = {
    "model": _Use(
        "--model",
        "one model",
        (
            *("model", "pretrained", "checkpoint", "size", "batch", "dtype", "backend", "peers", "train"),
            *("seconds", "build_seconds", "no_memory", *_TABLE, *_MACHINE),
        ),
    ),
    "operator": _Use(
        "--operator with --shape",
        "one operator",
        (
            *("operator", "shape", *measuring.SIZES, "dtype", "backend", "peers", "train", "seconds", "build_seconds"),
            *(*_TABLE, *_MACHINE),
        ),
    ),
    "suite": _Use(
        "--suite",
        "a suite",
        (
            *("suite", "budget", "results", "resume", "dry_run", *_FILTERS, "backend", "seconds", "no_memory"),
            *("json", *_MACHINE),
        ),
    ),
    "compare": _Use(
        "--compare", "a comparison", ("compare", "absolute", "least", "all", "results", *_FILTERS, *_TABLE)
    ),
    "commits": _Use(
        "--compare-commits",
        "a comparison of commits",
        (
            *("compare_commits", "suite", "budget", "rounds", "results", "seconds", "absolute", "least", "all"),
            *(*_FILTERS, *_TABLE, *_MACHINE),
        ),
    ),
}
_WHY_NOT = {  # what a suite does not take, and what to do
    "pretrained": "suites measure random weights, which take as long",
    "checkpoint": "suites measure random weights, which take as long",
    "peers": "each suite has its candidates, so that its rows can be compared",
    "output": "the rows are appended to FOLDER/<suite>.csv; choose the folder by --results",
    "plot": "draw what has changed with --compare OLD NEW --plot FILE",
    "build_seconds": "torch.compile gets at most two fifths of --budget",
}


def add_arguments(subparsers: argparse._SubParsersAction) -> None:
    parser = add_command(
        subparsers,
        "bench",
        run,
        summary="speedup over PyTorch, in milliseconds per call",
        description="Times a model, or an operator, in several forms. Each is first compared with float64, and\n"
        "not timed if its error is more than twice PyTorch's own plus a band for rounding. Then all take turns in one\n"
        "process; times are medians with the 20th and 80th percentile, ratios are to eager: above 1 is\n"
        "faster. In a model's training, --dtype bfloat16 and float16 mean autocast, else weights of that dtype.",
        examples=_EXAMPLES,
    )
    add_model_arguments(parser)
    # What was not given must be known, since no other use than that of one model has these defaults.
    parser.set_defaults(size=None, batch=None, dtype=None, device=None, backend=None)
    _add_measuring(parser.add_argument_group("what is measured, and what is written"))
    _add_operator(parser.add_argument_group("one operator at a shape of your own, beside PyTorch and torch.compile"))
    _add_suites(
        parser.add_argument_group(
            "suites: --operator, --model, --stage, --dtype, --batch, --size and --train select among their cases"
        )
    )
    _add_comparing(parser.add_argument_group("comparing results, or commits"))


def _add_measuring(what: argparse._ArgumentGroup) -> None:
    what.add_argument(
        "--peers",
        metavar="A,B,…",
        default=None,
        help="the candidates; eager is always included "
        f"(default: {measuring.DEFAULT_PEERS}, without frozen in training). "
        "Known are eager, channels_last, accelerated, frozen, runtime, compile, compile_channels_last, "
        "compile_reduce_overhead, compile_max_autotune, "
        "compile_freezing, compile_accelerated, onnxruntime, openvino, onnxruntime_exported, openvino_exported, "
        "openvino_by_image, ncnn, litert, executorch, or all; "
        "of an operator those that its table shows, by default all",
    )
    what.add_argument("--train", action="store_true", help="measure forward and backward instead of inference")
    what.add_argument(
        "--seconds",
        type=_number,
        metavar="S",
        help="measuring time of all candidates of a table (default: 10)",
    )
    what.add_argument(
        "--build-seconds",
        type=_number,
        metavar="S",
        help="give up a candidate that takes longer to be built or compiled (default: never)",
    )
    what.add_argument(
        "--no-memory",
        action="store_true",
        help="do not measure peak memory; on the CPU, measuring it builds each candidate once more",
    )
    add_result_arguments(what, "the table")
    what.add_argument("--plot", type=_plot_file, metavar="FILE", help="draw the table into FILE, .png, .svg or .pdf")


def _add_operator(operator: argparse._ArgumentGroup) -> None:
    operator.add_argument(
        "--operator",
        type=_names,
        metavar="NAME",
        help="batch_norm_activation, inverted_residual, layer_norm, layer_norm_linear, layer_norm_mlp, "
        "linear_residual, patch_attention, transformer or transformer_layer; several, with commas, to select in suites",
    )
    operator.add_argument(
        "--shape",
        type=_shape,
        metavar="B,H,W,C",
        help="of the map, channels last (q, k and v of patch_attention have C each); rows alone for what works on rows",
    )
    operator.add_argument(
        *("--heads", "--num-heads"), dest="num_heads", type=positive, metavar="N", help="of attention (default: 4)"
    )
    operator.add_argument("--patch-size", type=_patch, metavar="N|HxW", help="of attention (default: 2)")
    operator.add_argument("--inner", type=positive, metavar="N", help="channels of attention in a layer (default: C)")
    operator.add_argument(
        "--hidden", type=positive, metavar="N", help="of an MLP (default: 2·C), or of inverted_residual (4·C)"
    )
    operator.add_argument(
        "--out-features", type=positive, metavar="N", help="channels of the result (default: C, layer_norm_linear: 3·C)"
    )
    operator.add_argument("--layers", type=positive, metavar="N", help="of the transformer (default: 2)")
    operator.add_argument("--stride", type=int, choices=(1, 2), help="of inverted_residual (default: 1)")
    operator.add_argument("--dilation", type=positive, metavar="N", help="of inverted_residual (default: 1)")
    operator.add_argument("--residual", action="store_true", help="inverted_residual adds its input")
    operator.add_argument(
        "--activation",
        choices=("silu", "none"),
        help="of layer_norm_linear (default: none) or batch_norm_activation (silu)",
    )


def _add_suites(suites: argparse._ArgumentGroup) -> None:
    suites.add_argument(
        "--suite",
        type=_names,
        metavar="A,B,…",
        help="operators, blocks, models, training, mobile (MobileNetV2 and MobileViT, 100 runs at batch 1), or all",
    )
    suites.add_argument(
        "--stage", type=_names, metavar="A,B,…", help="stages: s/3, or 3 in each variant, or s for all of S"
    )
    suites.add_argument(
        "--budget",
        type=_number,
        metavar="MIN",
        help="minutes for all suites together, the most valuable cases first (default: 10)",
    )
    suites.add_argument(
        "--results",
        type=Path,
        metavar="FOLDER",
        help="append the rows to FOLDER/<suite>.csv (default: benchmarks/results/<device>, in the current folder)",
    )
    suites.add_argument("--resume", action="store_true", help="skip what the files already have from this commit")
    suites.add_argument("--dry-run", action="store_true", help="list the cases in their order without measuring")


def _add_comparing(comparing: argparse._ArgumentGroup) -> None:
    comparing.add_argument(
        "--compare",
        nargs=2,
        metavar=("OLD", "NEW"),
        help="list what changed beyond the noise between two sets of rows, each a CSV file, a folder of them, or a "
        "commit whose rows are in benchmarks/results (or --results)",
    )
    comparing.add_argument(
        "--compare-commits",
        nargs=2,
        metavar=("OLD", "NEW"),
        help="build two commits of this checkout ('.' is the checkout as it is), measure --suite (default: operators) "
        "in turns, and compare; works in build/commits (or --results)",
    )
    comparing.add_argument(
        "--rounds", type=positive, metavar="N", help="how often each commit measures a case (default: 5)"
    )
    comparing.add_argument("--absolute", action="store_true", help="compare times as they are, not relative to eager's")
    comparing.add_argument("--least", type=_number, metavar="PERCENT", help="ignore changes below this (default: 3)")
    comparing.add_argument("--all", action="store_true", help="also list what did not change")


# ------------------------------------------------------------------------------------------------------------- running


def run(args: argparse.Namespace) -> int:
    use = _use(args)
    _refuse_what_does_not_belong(args, use)
    if args.plot:  # before any work is done
        from ..bench.plots import import_matplotlib

        import_matplotlib()
    keep_freed_memory()  # for all candidates alike; rows say so
    return getattr(measuring, f"run_{use}")(args)


def _use(args: argparse.Namespace) -> str:
    """Which of `_USES` is meant."""
    if args.compare:
        return "compare"
    if args.compare_commits:
        return "commits"
    if args.suite is not None:
        return "suite"
    if args.shape and not args.operator:
        raise ValueError("--shape is that of an operator's map; name the operator with --operator")
    if args.operator and not args.shape:
        raise ValueError(
            "--operator alone says not what to measure: give --shape B,H,W,C for one call of it, or --suite operators "
            "for its cases there"
        )
    return "operator" if args.operator else "model"


def _refuse_what_does_not_belong(args: argparse.Namespace, use: str) -> None:
    for name, value in vars(args).items():
        if value in (None, False, []) or name in ("run", "debug", *_USES[use].takes):
            continue
        option = "--heads" if name == "num_heads" else "--" + name.replace("_", "-")
        if use in ("suite", "commits") and name in _WHY_NOT:
            raise ValueError(f"{option} is not for {_USES[use].what}: {_WHY_NOT[name]}")
        owners = [one.option for one in _USES.values() if name in one.takes]
        raise ValueError(f"{option} is not for {_USES[use].what}; it belongs to {', '.join(owners)}")


# ------------------------------------------------------------------------------------------------------ argument types


def _number(text: str) -> float:
    """Argument type: a positive finite number."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return value


def _names(text: str) -> tuple[str, ...]:
    """Argument type: names with commas between them."""
    names = tuple(filter(None, text.split(",")))
    if not names:
        raise argparse.ArgumentTypeError(f"{text!r} names nothing")
    return names


def _shape(text: str) -> tuple[int, ...]:
    """Argument type: the numbers of a shape, ``8,32,32,144`` or ``8x32x32x144``."""
    numbers = text.lower().replace("×", "x").replace("x", ",").split(",")
    if not all(number.isdecimal() and 1 <= int(number) < 2**31 for number in numbers):
        raise argparse.ArgumentTypeError(f"{text!r} is not a shape such as 8,32,32,144")
    return tuple(map(int, numbers))


def _patch(text: str) -> tuple[int, int]:
    """Argument type: the size of a patch, ``2`` or ``2x4``."""
    shape = _shape(text)
    if len(shape) > 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not the size of a patch, such as 2 or 2x4")
    return shape[0], shape[-1]


def _plot_file(text: str) -> Path:
    """Argument type: a file for a plot."""
    path = output_file(text)
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise argparse.ArgumentTypeError(f"{text!r} ends in none of .png, .svg and .pdf, which say how it is drawn")
    return path
