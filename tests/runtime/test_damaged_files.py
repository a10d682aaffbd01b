# SPDX-License-Identifier: Apache-2.0
"""Damaged files; `make sanitize` reads ten thousand under AddressSanitizer (tests/gates/under_sanitizers.py)."""

import os
import re
import subprocess
import sys

from support import ROOT, TESTS
from support.native import skip_without_a_compiler

skip_without_a_compiler()


def test_damaged_files_end_no_process():
    path = os.pathsep.join(filter(None, (str(ROOT), str(TESTS), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "gates.damaged_files", "--count", "4000"]
    run = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=600, cwd=TESTS
    )
    assert run.returncode == 0, run.stdout[-200:] + run.stderr[-4000:]
    told = re.search(r"4000 damaged files: (\d+) refused, (\d+) refused when called, (\d+) run", run.stdout)
    assert told and all(int(count) > 20 for count in told.groups()), run.stdout[-200:]
