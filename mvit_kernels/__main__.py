# SPDX-License-Identifier: Apache-2.0
"""Entry point of ``mvit-kernels`` and of ``python -m mvit_kernels``."""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from . import __version__
from .cli import COMMANDS

_EXAMPLES = """\
examples:
  mvit-kernels info                                  versions, device, and which backend can run here
  mvit-kernels verify --model mobilevit_s            check the numerical errors
  mvit-kernels bench --model apple/mobilevit-small   measure the speedup
  mvit-kernels classify cat.jpg --checkpoint my.pth

MVIT_KERNELS_BACKEND requests one backend everywhere; MVIT_KERNELS_DEBUG=1, like --debug, shows tracebacks.
"""
_ERRORS = (ValueError, TypeError, OSError, ImportError, RuntimeError, MemoryError)  # BackendError is a RuntimeError


class _Parser(argparse.ArgumentParser):
    """Reports usage errors as all other errors are: by an exception that `main` prints."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see {self.prog} --help")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = _Parser(
        prog="mvit-kernels",
        description="Fused kernels for MobileViT: inspect, verify and benchmark them on your model.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"mvit-kernels {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name in COMMANDS:
        importlib.import_module(f"mvit_kernels.cli.{name}").add_arguments(commands)
    for each in (parser, *commands.choices.values()):
        each.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: command-line arguments; None for those of the process.

    Returns:
        The exit code: 0, 1 if a verification failed, 2 for an error, 130 after Ctrl-C.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a character that the encoding lacks must not lose the result
            stream.reconfigure(errors="backslashreplace")
    debug = "--debug" in argv or os.environ.get("MVIT_KERNELS_DEBUG", "0") not in ("", "0")
    try:
        args = build_parser().parse_args(argv)
        code = args.run(args)
        sys.stdout.flush()  # inside the try, which catches a closed pipe
        return code
    except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
    except _ERRORS as error:
        if debug:
            raise
        print(f"mvit-kernels: error: {_sentence(error)}", file=sys.stderr)
        return 2


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    first_line = str(error).strip().partition("\n")[0]
    return first_line or f"{type(error).__name__}; --debug shows where"


if __name__ == "__main__":
    sys.exit(main())
