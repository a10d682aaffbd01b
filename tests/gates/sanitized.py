# SPDX-License-Identifier: Apache-2.0
"""The C++ operators under AddressSanitizer and UndefinedBehaviorSanitizer.

    python -m gates.sanitized            # every operator's own cases and frozen networks, on every instruction set
    python -m gates.sanitized pytest …   # the operators' tests of the C++ backend, on every instruction set

Both need the library that ``MVIT_KERNELS_SANITIZE=1 python setup.py build_native --inplace`` leaves in
``build/sanitized``, and start processes of their own on it. An error ends such a process with the sanitizer's report.
`make sanitize` runs both; `make test` has no time for a second build of the library.

PyTorch's own memory comes from malloc, which AddressSanitizer replaces: a kernel that reads or writes outside a
tensor is seen, and so is one outside its scratch memory, which has the exact size in this build (csrc/cpu/scratch.cpp).
A kernel that strays from one part of its scratch memory into another is not seen.
"""

from __future__ import annotations

import importlib
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from support import ROOT, TESTS
from support.native import instruction_sets

LIBRARIES = ROOT / "build" / "sanitized"
UNSUPPORTED = 3  # exit code of a process whose instruction set this processor does not have


class NoSanitizer(Exception):
    """This machine's compiler has no sanitizers; the message says what is missing."""


def environment(**more: str) -> dict[str, str]:
    """The variables for a Python that loads the sanitized library.

    Raises:
        NoSanitizer: no compiler, or one without AddressSanitizer's library.
    """
    compiler = shlex.split(os.environ.get("CXX", ""))
    compiler = compiler or [name for name in ("c++", "g++", "clang++") if shutil.which(name)][:1]
    if not compiler:
        raise NoSanitizer("no C++ compiler")
    preload = []
    for name in ("libasan.so", "libstdc++.so.6"):  # without the second, AddressSanitizer does not know C++ exceptions
        command = [*compiler, f"-print-file-name={name}"]
        path = Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
        if not path.is_absolute():
            raise NoSanitizer(f"{shlex.join(compiler)} has no {name}")
        preload.append(str(path.resolve()))
    python_path = os.pathsep.join(filter(None, (str(ROOT), str(TESTS), os.environ.get("PYTHONPATH"))))
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith("MVIT_KERNELS_")},
        "PYTHONPATH": python_path,
        "LD_PRELOAD": ":".join(preload),
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",  # Python leaks on purpose
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "MVIT_KERNELS_LIBRARIES": str(LIBRARIES),
        **more,
    }


def run_cases(isa: str) -> None:
    """Every operator's cases (``CASES`` of its test file) in every dtype and frozen networks, on `isa`; exit code
    `UNSUPPORTED` if the processor does not have it. Other tests judge the values."""
    os.environ["MVIT_KERNELS_CPU_ISA"] = isa
    import torch

    import mvit_kernels
    from mvit_kernels import backends
    from mvit_kernels.backends import cpu
    from support.cases import DIFFERENTIABLE, call, convert, evaluate, make
    from support.layouts import lay_out_all
    from support.networks import called

    if cpu.instruction_set() != isa:
        sys.exit(cpu.BACKEND.unavailable("cpu")[0] if cpu.BACKEND.unavailable("cpu") else UNSUPPORTED)
    torch.set_num_threads(2)
    for operator in backends.operators("cpu"):
        done = 0
        for index, sizes in enumerate(importlib.import_module(f"ops.test_{operator}").CASES):
            tensors, settings = make(operator, sizes)
            for dtype in (torch.float32, torch.bfloat16, torch.float64):
                layout = ("contiguous", "offset", "expanded")[index % 3]
                laid_out = lay_out_all(convert(tensors, dtype), layout)
                inputs = {name: view for name, (view, _) in laid_out.items()}
                try:
                    evaluate(lambda t: call(operator, t, settings, "cpu"), inputs, operator in DIFFERENTIABLE)  # noqa: B023
                    done += 1
                except mvit_kernels.BackendError:
                    pass  # refused, as the tests of values see
        print(f"{isa}: {operator}, {done} calls", flush=True)
        if done == 0:
            sys.exit(f"{operator}: the C++ backend refused every case")
    for size in ((64, 64), (72, 40)):
        for dtype in (torch.float32, torch.bfloat16):
            model = mvit_kernels.freeze(mvit_kernels.MobileViT("xxs").eval(), dtype=dtype)
            with torch.inference_mode():
                model(torch.rand(2, 3, *size, dtype=dtype))
            assert called(model)
    print(f"{isa}: frozen networks", flush=True)


def run_all_cases() -> None:
    """`run_cases` on every instruction set, each in a fork of this process, since loading PyTorch takes longest.

    The tests' files are imported in the fork: they ask which backends serve, which settles the instruction set.
    """
    import torch  # noqa: F401

    for isa in instruction_sets():
        child = os.fork()
        if child == 0:
            try:
                run_cases(isa)
            except SystemExit as leaving:
                if isinstance(leaving.code, str):
                    print(leaving.code, file=sys.stderr, flush=True)
                os._exit(leaving.code if isinstance(leaving.code, int) else 1)
            except BaseException:
                sys.excepthook(*sys.exc_info())
                sys.stderr.flush()
                os._exit(1)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code == UNSUPPORTED:
            print(f"{isa}: not on this processor", flush=True)
        elif code:
            sys.exit(f"{isa}: FAILED, exit code {code}")


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["here"]:  # in the process that has the sanitizers
        run_all_cases()
        return 0
    if arguments[:1] != ["pytest"]:
        return subprocess.run([sys.executable, "-m", "gates.sanitized", "here"], env=environment()).returncode
    from mvit_kernels import backends

    files = [f"ops/test_{operator}.py" for operator in backends.operators("cpu")]
    files += ["freezing/test_network.py", "freezing/test_network_changes.py"]
    pytest = [sys.executable, "-m", "pytest", "-q", "-k", "cpu or network", "-p", "no:cacheprovider"]
    pytest += ["-p", "no:faulthandler"]  # its stack would be printed before the sanitizer's
    pytest += ["--capture=sys"]  # otherwise the report of a process that it ends is lost with pytest's file
    pytest += [str(TESTS / file) for file in files]
    for isa in instruction_sets():
        variables = environment(MVIT_KERNELS_CPU_ISA=isa)
        probe = "from mvit_kernels.backends import cpu; "
        probe += f"raise SystemExit({UNSUPPORTED} * (cpu.instruction_set() != {isa!r}))"
        code = subprocess.run([sys.executable, "-c", probe], env=variables).returncode
        if code == UNSUPPORTED:
            print(f"{isa}: not on this processor", flush=True)
            continue
        print(f"{isa}:", flush=True)
        code = code or subprocess.run([*pytest, *arguments[1:]], env=variables).returncode
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
