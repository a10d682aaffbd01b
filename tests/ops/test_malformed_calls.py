# SPDX-License-Identifier: Apache-2.0
"""Direct calls of the raw operators with anything at all: an error or a result, and the process survives.

Each test is a process that makes calls of `gates.malformed`; one that ends it is printed as a line to paste. The calls
by ``.cuda`` run the bindings' source on the CPU, as backends/cuda/test_bindings.py does. `make sanitize` repeats the
``.cpu`` ones under AddressSanitizer and UndefinedBehaviorSanitizer.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch

from gates.malformed import Call, T, Weights, Words, inf, malformed, nan  # noqa: F401  (literals of calls)
from mvit_kernels.backends import cpu
from support.malformed_operators import _layer
from support.native import skip_without_a_compiler

skip_without_a_compiler()
assert not cpu.BACKEND.unavailable("cpu")  # this loads the library

CALLS = {"cpu": 20000, "reference": 2000, "cuda": 1500}


@pytest.mark.parametrize("backend", CALLS)
def test_malformed_calls(backend):
    command = [sys.executable, "-m", "gates.malformed", "--backend", backend]
    command += ["--count", os.environ.get("MVIT_KERNELS_MALFORMED", str(CALLS[backend]))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    assert f" calls of {backend}, " in done.stdout and " 0 ended the process" in done.stdout
    # The generator is useless if the first check refuses all calls of an operator, or if no call is wrong.
    tally = re.findall(r"^(\w+): (\d+) of (\d+) returned$", done.stdout, re.MULTILINE)
    assert len(tally) >= 5
    for operator, returned, made in tally:
        assert 0.08 < int(returned) / int(made) < 0.9, operator


def test_a_call_that_ends_the_process_is_seen():
    """The runner works: it prints the call that raises a signal, and continues after it."""
    code = (
        "import os, signal, sys, gates.malformed as m; made = m.malformed; sys.argv[1:] = ['--count', '6', '--all']\n"
    )
    code += "class Deadly(m.T):\n    def make(self): os.kill(os.getpid(), signal.SIGSEGV)\n"
    code += "deadly = m.Call('linear_residual', 'cpu', (Deadly((1,)),))\n"
    code += "m.malformed = lambda n, backend: deadly if n == 3 else made(n, backend)\nraise SystemExit(m.main())"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 1 and "SIGSEGV, call 3; PYTHONPATH=tests" in done.stdout, done.stdout + done.stderr
    assert "6 calls of cpu" in done.stdout and "1 ended the process" in done.stdout


def test_a_call_is_its_literal():
    for number in range(200):
        call = malformed(number, "cpu")
        assert repr(eval(repr(call))) == repr(call)
    assert repr(T((2, 3), dtype="bool")) == "T(shape=(2, 3), dtype='bool')"
    assert Call("linear_residual", "cpu", (T((2, 3)), T((4, 3)), None, T((2, 4))))().shape == (2, 4)


HUGE = 2**62
LAYER = _layer(None, lambda *shape: T(shape), 4, 4, 8)
OVERFLOWS = [
    ("patch_attention", (T((1, 0, 0, 12)), 2, [HUGE, HUGE], 0.3), "too many to be counted"),
    ("patch_attention", (T((0, 2, 2, HUGE)), HUGE, [1, 1], 0.3), "channels are not q, k and v of"),
    ("transformer", (T((1, 2, 2, 4)), LAYER, None, None, 0x5555555555555556, [1, 1], 1e-5), "are not q, k and v of"),
    ("transformer", (T((1, 2, 2, 4)), LAYER, None, T((4,)), 1, [1, 1], 1e-5), "without the other"),
    ("linear_residual", (T((2**40, 3)), T((4, 3)), None, T((2**40, 4))), "allocate|API call failed"),  # PyTorch's words
]


@pytest.mark.parametrize("operator, arguments, says", OVERFLOWS)
def test_numbers_that_overflow(operator, arguments, says):
    with pytest.raises(RuntimeError, match=says):
        Call(operator, "cpu", arguments)()


def test_a_dilation_beyond_the_map_costs_nothing():
    """All taps but the middle one then see zeros; the size of the memory for the rows between used to overflow."""
    weights = T((8, 3)), T((8,)), T((8, 1, 3, 3)), T((8,)), T((5, 8)), T((5,))
    near, far = (Call("inverted_residual", "cpu", (T((2, 4, 7, 3)), *weights, 1, d, False))() for d in (7, HUGE))
    right = Call("inverted_residual", "reference", (T((2, 4, 7, 3)), *weights, 1, 7, False))()
    assert torch.equal(near, far)
    torch.testing.assert_close(far, right, rtol=1e-4, atol=1e-5)


def test_gradients_of_no_elements():
    """No rows and no channels: empty memory, whose address is null."""
    for n, d in ((0, 3), (3, 0), (0, 0)):
        x, grad, statistic = T((0, d)), T((0, n)), T((0,))
        arguments = (grad, x, statistic, statistic, T((d,)), T((d,)), T((n, d)), T((n,)), "silu")
        grads = Call("layer_norm_linear_backward", "cpu", arguments)()
        assert [tuple(g.shape) for g in grads] == [(0, d), (d,), (d,), (n, d), (n,)]
        assert not any(g.any() for g in grads)
