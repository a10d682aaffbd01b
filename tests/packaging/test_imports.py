# SPDX-License-Identifier: Apache-2.0
"""What an import costs: nothing is loaded before it is used."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import torch

from mvit_kernels._utils.compiling import assume_constant_result
from mvit_kernels._utils.imports import after_import

# Each takes 0.1 s and more.
HEAVY = "torch._dynamo torch._inductor torch.utils.flop_counter sympy triton torchvision timm transformers kornia PIL"


def loaded(code: str) -> list[str]:
    """Those of `HEAVY` that are loaded in a new process after `code`."""
    script = f"import sys\n{code}\nimport json\nprint(json.dumps([n for n in {HEAVY.split()} if n in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_names_load_nothing_heavy():
    """torch._dynamo with sympy took 1.6 s of 2.2 beyond torch, Triton for the FLOP counter another 0.4."""
    names = "m.accelerate, m.restore, m.report, m.freeze, m.verify, m.patch_attention, m.MobileViT, m.load_checkpoint"
    assert loaded(f"import mvit_kernels as m; {names}") == []  # nor does torch load any


def test_nor_do_calls():
    code = """
import torch, mvit_kernels as m
model = m.MobileViT("xxs").eval()
x = torch.rand(1, 3, 32, 32)
print(m.report(m.accelerate(model)), m.verify(model, x))
with torch.no_grad():
    m.freeze(model)(x)
model.train()(torch.cat((x, x))).sum().backward()
"""
    # torch loads Triton and the others itself where it looks for a GPU or opens a stream of random numbers
    assert not {"torch._dynamo", "sympy", "torch.utils.flop_counter", "torchvision"} & set(loaded(code))


def test_constants_of_a_trace_are_marked_as_pytorch_marks_them():
    def one():
        return 1

    def other():
        return 1

    assert assume_constant_result(one) is one
    assert vars(one) == vars(torch.compiler.assume_constant_result(other)) != {}


def test_after_import(tmp_path, monkeypatch):
    (tmp_path / "seldom_used.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    finders, seen = list(sys.meta_path), []
    after_import("seldom_used", lambda: seen.append(sys.modules["seldom_used"].value))
    after_import("seldom_used", lambda: seen.append("second"))
    assert importlib.util.find_spec("seldom_used") is not None and seen == []  # a search is no import
    import seldom_used

    assert seen == [1, "second"] and sys.meta_path == finders
    after_import("seldom_used", lambda: seen.append("at once"))
    assert seen[2:] == ["at once"] and seldom_used.__spec__.name == "seldom_used"
    del sys.modules["seldom_used"]
