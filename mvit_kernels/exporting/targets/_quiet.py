# SPDX-License-Identifier: Apache-2.0
"""Converters of other libraries talk: progress bars, versions they were not tested with, parts for a Mac alone."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet(*loggers: str) -> Iterator[None]:
    """Without warnings, Python's output, and what `loggers` say below an error; exceptions pass.

    Args:
        loggers: names, such as "coremltools".
    """
    levels = {name: logging.getLogger(name).level for name in loggers}
    for name in loggers:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            with contextlib.redirect_stderr(io.StringIO()):
                warnings.simplefilter("ignore")
                yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
