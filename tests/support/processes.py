# SPDX-License-Identifier: Apache-2.0
"""Two processes at once, for what needs two ranks."""

import multiprocessing
from collections.abc import Callable


def in_two_processes(method: str, function: Callable, arguments: list[tuple]) -> None:
    """Run `function` with each of two tuples of arguments, in a process begun by `method`, "fork" or "spawn". Both must
    end within five minutes, which a busy machine may take for seconds of work."""
    context = multiprocessing.get_context(method)
    ranks = [context.Process(target=function, args=each) for each in arguments]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(300)
        process.kill()
    assert [process.exitcode for process in ranks] == [0, 0]
