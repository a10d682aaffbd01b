# SPDX-License-Identifier: Apache-2.0
"""Which backend serves a call: names, precedence, reasons, the log, and that the chosen kernels really run."""

import logging
import os
import subprocess
import sys

import pytest
import torch

import mvit_kernels
from mvit_kernels import backends
from mvit_kernels.backends import Call, library, use_backend
from mvit_kernels.backends.contract import REGISTRY
from support.cases import DIFFERENTIABLE, INFERENCE, SMALL, call, convert, evaluate, make, raw_arguments
from support.fake_backend import NAME, fake_backend
from support.recorder import Recorder

ATTENTION = Call("patch_attention", "cpu", torch.float32, False, (2, 4, 4, 24), (("num_heads", 2),))


def attention(backend=None, dtype=torch.float32, requires_grad=False):
    """Call patch_attention; returns which of our raw operators ran."""
    qkv = torch.randn(2, 4, 4, 24, dtype=dtype, requires_grad=requires_grad)
    with Recorder() as recorder:
        out = mvit_kernels.patch_attention(qkv, num_heads=2, patch_size=2, backend=backend)
        if requires_grad:
            out.sum().backward()
    return recorder.ours()


# ------------------------------------------------------------------------------------------------------------ routing


@pytest.mark.parametrize("operator", DIFFERENTIABLE)
@pytest.mark.parametrize("chosen_by", ["name", "use_backend", "automatically"])
def test_kernels_run_forward_and_backward(operator, chosen_by):
    tensors, settings = make(operator, SMALL[operator])
    tensors = convert(tensors, torch.float32)
    expected = evaluate(lambda t: call(operator, t, settings, "raw"), tensors, True)
    asked = {"name": NAME, "use_backend": None, "automatically": None}[chosen_by]
    with fake_backend([operator], preferred=chosen_by == "automatically"):
        with use_backend(NAME if chosen_by == "use_backend" else None), Recorder() as recorder:
            results = evaluate(lambda t: call(operator, t, settings, asked), tensors, True)
    assert recorder.ours() == [f"{operator}.{NAME}", f"{operator}_backward.{NAME}"]
    assert all(torch.equal(value, expected[name]) for name, value in results.items())


@pytest.mark.parametrize("operator", INFERENCE)
def test_kernels_for_inference_run(operator):
    tensors, settings = make(operator, SMALL[operator])
    tensors = convert(tensors, torch.float32)
    expected = call(operator, tensors, settings, "reference")
    with fake_backend([operator]), Recorder() as recorder:
        out = call(operator, tensors, settings, None)
    assert recorder.ours() == [f"{operator}.{NAME}"] and torch.equal(out, expected)


@pytest.mark.parametrize("operator", [name for name in DIFFERENTIABLE if name != "batch_norm_activation"])
def test_kernels_see_one_dtype_under_autocast(operator):
    """Autocast does not see inside raw operators: linear weights are cast first, with gradients through the casts."""
    tensors, settings = make(operator, SMALL[operator])
    tensors = convert(tensors, torch.float32)
    with fake_backend([operator]) as module:

        def by_autocast(t):
            with torch.autocast("cpu", torch.bfloat16):
                return call(operator, t, settings, None)

        def by_hand(t):
            cast = {name: v if "norm" in name else v.to(torch.bfloat16) for name, v in t.items()}
            return call(operator, cast, settings, NAME)

        ours, expected = evaluate(by_autocast, tensors, True), evaluate(by_hand, tensors, True)
        assert {asked.dtype for asked in module.asked} == {torch.bfloat16}
    assert ours["out"].dtype == torch.bfloat16
    assert all(
        value.dtype == expected[name].dtype and torch.equal(value, expected[name]) for name, value in ours.items()
    )


@pytest.mark.parametrize("operator", SMALL)
def test_what_a_backend_is_told(operator):
    tensors, settings = make(operator, SMALL[operator])
    tensors = convert(tensors, torch.bfloat16)
    with fake_backend([operator]) as module:
        call(operator, tensors, settings, None)
        asked = module.asked[-1]
        assert (asked.operator, asked.device_type, asked.dtype) == (operator, "cpu", torch.bfloat16)
        assert asked.shape == tuple(next(iter(tensors.values())).shape)
        assert asked.needs_grad is False
        for key, value in settings.items():
            if key in dict(asked.facts):
                assert asked.fact(key) == value
        list(tensors.values())[-1].requires_grad_()
        if operator in DIFFERENTIABLE:
            call(operator, tensors, settings, None)
            assert module.asked[-1].needs_grad is True
            with torch.no_grad():
                assert call(operator, tensors, settings, None).requires_grad is False


@pytest.mark.parametrize("operator", SMALL)
def test_a_backend_for_inference_leaves_training_to_the_reference(operator):
    tensors, settings = make(operator, SMALL[operator])
    tensors = convert(tensors, torch.float32)
    with fake_backend([operator], refuses=lambda call: ["it is for inference"] * call.needs_grad):
        with Recorder() as recorder:
            results = evaluate(lambda t: call(operator, t, settings, None), tensors, True)
        assert recorder.ours() == []
        assert len(results) == 1 + len(tensors)
        with torch.no_grad(), Recorder() as recorder:
            call(operator, tensors, settings, None)
        assert recorder.ours() == [f"{operator}.{NAME}"]
        with pytest.raises(mvit_kernels.BackendError, match="it is for inference"):
            evaluate(lambda t: call(operator, t, settings, NAME), tensors, True)


@pytest.mark.parametrize("operator", INFERENCE)
def test_no_gradient_is_lost_where_a_kernel_has_none(operator):
    """Even if a backend forgets to declare that it has no backward."""
    tensors, settings = make(operator, SMALL[operator])
    with fake_backend([operator]):
        results = evaluate(lambda t: call(operator, t, settings, None), convert(tensors, torch.float32), True)
    assert len(results) == 1 + len(tensors)


# ---------------------------------------------------------------------------------------------------- names, precedence


def test_unknown_names():
    for ask in (lambda: use_backend("fast").__enter__(), lambda: attention(backend="fast")):
        with pytest.raises(
            ValueError, match="unknown backend 'fast'; choose one of reference, cpu, triton, cuda, or 'auto'"
        ):
            ask()


def test_the_strongest_wins():
    """backend= of the call, then use_backend, then the automatic choice."""
    with fake_backend(["patch_attention"]):
        assert attention() == [f"patch_attention.{NAME}"]
        with use_backend("reference"):
            assert attention() == []
            assert attention(backend=NAME) == [f"patch_attention.{NAME}"]
            assert attention(backend="auto") == [f"patch_attention.{NAME}"]
            with use_backend(NAME):
                assert attention() == [f"patch_attention.{NAME}"]
                assert attention(backend="reference") == []
            assert attention() == []
            for automatic in ("auto", None, ""):
                with use_backend(automatic):
                    assert attention() == [f"patch_attention.{NAME}"]
            assert attention() == []
        assert attention() == [f"patch_attention.{NAME}"]


def test_use_backend_ends_with_an_exception():
    with fake_backend(["patch_attention"]):
        with pytest.raises(RuntimeError, match="stop"), use_backend("reference"):
            raise RuntimeError("stop")
        assert attention() == [f"patch_attention.{NAME}"]


def test_a_wrong_name_changes_nothing():
    with use_backend("reference"):
        with pytest.raises(ValueError), use_backend("fast"):
            pytest.fail("was entered")
        assert backends._override == "reference"


def _python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_environment_variable():
    """Read when the package is imported, refused when unknown, weaker than use_backend and backend=."""
    code = """
import os, torch, mvit_kernels
try:
    mvit_kernels.patch_attention
except ValueError as error:
    print(error)
os.environ["MVIT_KERNELS_BACKEND"] = "cuda"
qkv = torch.ones(1, 2, 2, 12)
print(mvit_kernels.patch_attention(qkv, num_heads=2, patch_size=2, backend="reference").shape)
with mvit_kernels.use_backend("auto"):
    print(mvit_kernels.patch_attention(qkv, num_heads=2, patch_size=2).shape)
try:
    mvit_kernels.patch_attention(qkv, num_heads=2, patch_size=2)
except mvit_kernels.BackendError as error:
    print(error)
"""
    path = os.pathsep.join(p for p in sys.path if p)
    environment = {**os.environ, "PYTHONPATH": path, "MVIT_KERNELS_BACKEND": "fast"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    unknown, by_name, inside, refusal = done.stdout.splitlines()
    assert (
        unknown == "MVIT_KERNELS_BACKEND: unknown backend 'fast'; choose one of reference, cpu, triton, cuda, or 'auto'"
    )
    assert by_name == inside == "torch.Size([1, 2, 2, 4])"
    assert refusal.startswith("patch_attention: backend 'cuda' was requested but cannot serve this call")


# ---------------------------------------------------------------------------------------------------- reasons, the log


def test_asking_by_name_raises_with_every_reason():
    with fake_backend(
        ["patch_attention"],
        refuses=lambda call: ["heads of 4 are too small", "it is Sunday"],
        unavailable=["there is no GPU"],
    ):
        with pytest.raises(mvit_kernels.BackendError) as raised:
            attention(backend=NAME)
        message = str(raised.value)
        assert message.startswith(f"patch_attention: backend {NAME!r} was requested but cannot serve this call")
        for part in (
            "there is no GPU",
            "heads of 4 are too small",
            "it is Sunday",
            "(2, 4, 4, 24)",
            "torch.float32",
            "num_heads=2",
        ):
            assert part in message
        with use_backend(NAME), pytest.raises(mvit_kernels.BackendError, match="it is Sunday"):
            attention()


def test_an_operator_that_a_backend_lacks():
    with fake_backend(["patch_attention"]):
        x, w = torch.randn(3, 4), torch.randn(3, 4)
        with pytest.raises(mvit_kernels.BackendError, match="it has no linear_residual"):
            mvit_kernels.linear_residual(x, w, None, torch.zeros(3, 3), backend=NAME)
        mvit_kernels.linear_residual(x, w, None, torch.zeros(3, 3))


def test_a_backend_without_a_module(monkeypatch):
    monkeypatch.delitem(REGISTRY, "cuda", raising=False)
    with pytest.raises(mvit_kernels.BackendError, match="this version of mvit_kernels has no cuda kernels"):
        attention(backend="cuda")
    assert backends.operators("cuda") == ()


def test_the_automatic_choice_falls_back_and_says_so_once(caplog):
    with (
        fake_backend(["patch_attention"], refuses=lambda call: ["it is Sunday"]),
        caplog.at_level(logging.INFO, "mvit_kernels"),
    ):
        assert attention() == []
        backends._choices.clear()
        assert attention() == []
        assert attention(dtype=torch.float64) == []
    said = [record.getMessage() for record in caplog.records]
    assert said == [f"patch_attention: not on backend {NAME!r}: it is Sunday"]
    assert all(record.levelno == logging.INFO for record in caplog.records)


def test_nothing_is_printed_or_warned(capfd, recwarn):
    with fake_backend(["patch_attention"], refuses=lambda call: ["it is Sunday"]):
        attention()
    assert capfd.readouterr() == ("", "") and not recwarn.list


def test_a_backend_that_refuses_one_dtype():
    with fake_backend(["patch_attention"], refuses=lambda call: ["no double"] * (call.dtype == torch.float64)):
        assert attention() == [f"patch_attention.{NAME}"]
        assert attention(dtype=torch.float64) == []
        assert attention(dtype=torch.bfloat16) == [f"patch_attention.{NAME}"]


def test_serves():
    with fake_backend(["patch_attention"], refuses=lambda call: ["no double"] * (call.dtype == torch.float64)):
        double = ATTENTION._replace(dtype=torch.float64)
        assert backends.serves("patch_attention", ATTENTION) and not backends.serves("patch_attention", double)
        assert backends.serves("patch_attention", ATTENTION, NAME)
        assert not backends.serves("patch_attention", double, NAME)
        assert not backends.serves("patch_attention", ATTENTION, "reference")
        assert backends.serves("patch_attention", ATTENTION, "auto")
        with use_backend("reference"):
            assert not backends.serves("patch_attention", ATTENTION)
            assert backends.serves("patch_attention", ATTENTION, "auto")


# --------------------------------------------------------------------------------------------------- the choice is kept


def test_a_backend_is_asked_once_for_each_kind_of_call():
    with fake_backend(["patch_attention"]) as module:
        for _ in range(3):
            attention()
        assert len(module.asked) == 1
        attention(dtype=torch.bfloat16)
        attention(requires_grad=True)
        assert len(module.asked) == 3


def test_choices_do_not_grow_without_end():
    with fake_backend(["patch_attention"]):
        for height in range(5000):
            backends.choose(ATTENTION._replace(shape=(1, height, 4, 24)))
        assert len(backends._choices) <= 4097


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_tracing_and_exporting_choose_plain_pytorch():
    """Whatever ran before in eager mode, and without effect on what runs after."""

    class Attention(torch.nn.Module):
        def forward(self, qkv):
            return mvit_kernels.patch_attention(qkv, num_heads=2, patch_size=(2, 2))

    qkv = torch.randn(2, 4, 4, 24)
    with fake_backend(["patch_attention"]):
        for _ in range(2):
            assert attention() == [f"patch_attention.{NAME}"]
            traced = torch.jit.trace(Attention(), (qkv,), check_trace=False)
            assert "mvit_kernels::" not in str(traced.inlined_graph)
            exported = torch.export.export(Attention(), (qkv,))
            assert "mvit_kernels." not in str(exported.graph)
            torch.testing.assert_close(traced(qkv), exported.module()(qkv))


# ----------------------------------------------------------------------------------------------- the compiled libraries


def test_a_library_that_was_not_built(tmp_path, monkeypatch):
    monkeypatch.setattr(library, "LIBRARY_DIRECTORY", tmp_path)
    monkeypatch.setattr(library, "_loaded", {})
    why = library.load("cpu")
    assert f"libmvit_kernels_cpu.so was not built (there is none in {tmp_path}); to build it, " in why
    assert backends.unavailable("cpu", "cpu") == (why,)
    backends._choices.clear()
    with pytest.raises(mvit_kernels.BackendError, match="was not built"):
        attention(backend="cpu")
    assert attention() == []
    backends._choices.clear()


def test_a_library_that_does_not_load(tmp_path, monkeypatch):
    monkeypatch.setattr(library, "LIBRARY_DIRECTORY", tmp_path)
    monkeypatch.setattr(library, "_loaded", {})
    (tmp_path / "libmvit_kernels_cpu.so").write_bytes(b"\x7fELF, but cut off")
    why = library.load("cpu")
    assert "libmvit_kernels_cpu.so does not load" in why
    assert library.load("cpu") is why, "it was tried twice"


def test_the_cpu_backend_is_for_the_cpu():
    assert any("the tensors are on cuda" in reason for reason in backends.unavailable("cpu", "cuda"))


@pytest.mark.parametrize("operator", library.SCHEMAS)
def test_every_backend_has_its_place(operator):
    """One overload for each backend, all of one schema, which keeps the strides it was traced with."""
    schemas = set()
    for backend in library.BACKENDS:
        overload = library.raw(operator, backend)
        schemas.add(str(overload._schema).partition("(")[2])
        assert torch.Tag.needs_exact_strides in overload.tags
        assert torch.Tag.pt2_compliant_tag in overload.tags
    assert len(schemas) == 1


@pytest.mark.parametrize("operator", SMALL)
def test_every_backend_has_a_fake(operator):
    """Shapes and dtypes for torch.compile, even for backends whose library is not there."""
    tensors, settings = make(operator, SMALL[operator])
    arguments = raw_arguments(operator, convert(tensors, torch.float32), settings)
    expected = library.raw(operator, "reference")(*arguments)
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = [
            [mode.from_tensor(t) for t in a]
            if isinstance(a, list)
            else mode.from_tensor(a)
            if isinstance(a, torch.Tensor)
            else a
            for a in arguments
        ]
        for backend in library.BACKENDS:
            out = library.raw(operator, backend)(*fakes)
            for fake, real in zip(*((r,) if isinstance(r, torch.Tensor) else r for r in (out, expected)), strict=True):
                assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


def test_public_functions_are_those_of_the_schemas():
    assert set(SMALL) == {name for name in library.SCHEMAS if not name.endswith("_backward")}
    assert set(SMALL) <= set(mvit_kernels.__all__)
