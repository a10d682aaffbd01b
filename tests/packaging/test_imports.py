# SPDX-License-Identifier: Apache-2.0
"""What an import costs and needs: nothing is loaded before it is used, and other libraries may be absent."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mvit_kernels._utils.compiling import assume_constant_result
from mvit_kernels._utils.imports import after_import
from support.builds import python

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


def test_import_is_cheap_and_pulls_in_nothing(bare: Path) -> None:
    printed = python(
        """
import pathlib, sys, time, torch
before, start = set(sys.modules), time.process_time()
import mvit_kernels
seconds = time.process_time() - start
assert pathlib.Path(mvit_kernels.__file__).parent == pathlib.Path.cwd() / "mvit_kernels"
loaded = {name.partition(".")[0] for name in set(sys.modules) - before}
assert not loaded & {"triton", "timm", "transformers", "kornia", "torchvision", "safetensors", "PIL"}, loaded
assert not torch.cuda.is_initialized()
print(seconds)
""",
        bare,
    )
    assert float(printed) < 0.5  # 1 ms as written; torch's own import is a second


def test_everything_public_resolves_with_nothing_compiled_and_nobody_else_installed(bare: Path) -> None:
    printed = python(
        """
import sys
for name in ("triton", "timm", "transformers", "kornia", "torchvision", "safetensors", "matplotlib", "PIL"):
    sys.modules[name] = None
import mvit_kernels, torch
for name in mvit_kernels.__all__:
    assert getattr(mvit_kernels, name) is not None, name
model = mvit_kernels.MobileViT(mode="xxs").eval()
with torch.no_grad():
    print(tuple(mvit_kernels.accelerate(model)(torch.rand(1, 3, 64, 64)).shape))
assert not torch.cuda.is_initialized()
""",
        bare,
    )
    assert printed.splitlines()[-1] == "(1, 320, 2, 2)"


# -- The neighbours --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["timm", "transformers", "kornia"])
def test_missing_neighbour_is_told_in_one_sentence(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from mvit_kernels._utils import third_party

    monkeypatch.setitem(sys.modules, name, None)
    sentence = rf"^{name} is not installed: pip install 'mvit_kernels\[\w+\]'$"
    with pytest.raises(ImportError, match=sentence) as error:
        getattr(third_party, f"import_{name}")()
    assert error.value.name == name


def fake_torchvision(folder: Path, body: str) -> None:
    (folder / "torchvision").mkdir()
    (folder / "torchvision" / "part.py").write_text("")
    (folder / "torchvision" / "__init__.py").write_text(f"from . import part\nimport torch\n{body}\n")


TELL = """
import sys, torch
import mvit_kernels
declared = lambda: hasattr(torch.ops.torchvision, "nms")
try:
    mvit_kernels.prepare_torchvision()
    mvit_kernels.prepare_torchvision()
except RuntimeError as error:
    print("raised:", error)
print("torchvision" in sys.modules, declared())
"""


@pytest.mark.parametrize(
    ("body", "told"),
    [
        pytest.param("", "True False", id="whole"),
        pytest.param('torch.library.register_fake("torchvision::nms", print)', "True True", id="uncompiled"),
        pytest.param('raise RuntimeError("bad luck")', "raised: bad luck\nFalse False", id="broken"),
    ],
)
def test_torchvision_schemas_are_declared_only_where_missing(bare: Path, body: str, told: str) -> None:
    fake_torchvision(bare, body)
    assert python(TELL, bare) == told
