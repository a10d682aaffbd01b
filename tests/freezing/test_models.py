# SPDX-License-Identifier: Apache-2.0
"""`freeze` and `verify` on models as users have them: shared modules, hooks, unusual tensors next to the network,
inputs that are not images yet, other default devices; and a frozen model's weights on disk."""

from __future__ import annotations

import ast
import contextlib
import copy
import pickle
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import mvit_kernels
from mvit_kernels.freezing.block import FrozenMobileViTBlock
from mvit_kernels.freezing.modules import FrozenConv2d, FrozenInvertedResidual, FrozenSequential
from support import models

IMAGES = models.images(2, 64, 64)
SMALL_IMAGES = models.images(2, 32, 32)  # for gradients
FIRST_BLOCK = (1, 5, 20)  # what `freeze` finds in `models.first_block()`


def run(model: nn.Module, x: Tensor = IMAGES) -> Tensor:
    with torch.no_grad():
        return models.output(model(x))


def assert_frozen_right(model: nn.Module, counts: tuple[int, int, int] = (3, 7, 35)) -> nn.Module:
    """The whole network is frozen, `counts` blocks, inverted residuals and convolutions, and its results are right."""
    frozen = mvit_kernels.freeze(model)
    found = frozen.freeze_report
    assert (len(found.blocks), len(found.inverted_residuals), len(found.convolutions)) == counts, found
    assert found.left == found.composed == ()
    verification = mvit_kernels.verify(frozen, IMAGES, reference=model)
    assert verification.ok, f"\n{verification}"
    return frozen


# -- one module under two names


class Twice(nn.Module):
    """A block, a unit, an inverted residual and a stage that each have a second name, called under both."""

    def __init__(self) -> None:
        super().__init__()
        self.net = models.first_block()
        self.stem, self.stage, self.residual, self.block = (self.net[0], self.net[2], self.net[2][1], self.net[3][1])
        self.also = nn.ModuleList([self.block])

    def forward(self, x: Tensor) -> Tensor:
        y = self.residual(self.stage(self.stem(x)))
        return self.net(x) + self.also[0](self.block(y.repeat(1, 2, 1, 1))).mean()


def test_shared_modules_stay_shared():
    model = Twice()
    frozen = assert_frozen_right(model, FIRST_BLOCK)
    assert isinstance(frozen.block, FrozenMobileViTBlock)
    assert frozen.block is frozen.net[3][1] is frozen.also[0]
    assert frozen.stem is frozen.net[0]
    assert frozen.stage is frozen.net[2]
    assert frozen.residual is frozen.net[2][1]


def test_shared_modules_accelerate():
    model = mvit_kernels.accelerate(Twice(), strict=True)
    assert len(mvit_kernels.report(model).accelerated) == 1
    assert mvit_kernels.verify(model, IMAGES).ok
    assert mvit_kernels.verify(model, SMALL_IMAGES, gradients=True).ok


def test_a_convolution_shared_with_a_sequential_keeps_its_own_value():
    """Under its second name it runs without the batch norm that follows it under the first."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unit = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.SiLU())
            self.unit[1].running_mean.fill_(2.0)
            self.alone = self.unit[0]

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat((self.unit(x), self.alone(x)))

    model = Model().double().eval()
    torch.testing.assert_close(
        run(mvit_kernels.freeze(model), IMAGES.double()), run(model, IMAGES.double()), rtol=1e-12, atol=1e-12
    )


# -- what else a model may contain


class Beside(nn.Module):
    """A network, and something that is none of ours."""

    def __init__(self, add) -> None:
        super().__init__()
        self.net = models.first_block()
        self.before = nn.Identity()
        add(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.before(x))


def _script(model: nn.Module) -> None:
    model.before = torch.jit.script(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.SiLU()).eval())


BESIDE = {
    "Conv3d": lambda m: setattr(m, "video", nn.Conv3d(3, 8, 3)),
    "ScriptModule": _script,
    "sparse": lambda m: m.register_buffer("graph", torch.eye(3).to_sparse()),
    "compressed sparse": lambda m: m.register_buffer("graph", torch.eye(3).to_sparse_csr()),
    "fp8": lambda m: m.register_buffer("scale", torch.ones(3).to(torch.float8_e4m3fn)),
    "meta": lambda m: m.register_buffer("later", torch.empty(3, device="meta")),
    "complex": lambda m: m.register_buffer("spectrum", torch.ones(3, dtype=torch.complex64)),
    "an attention mask": lambda m: m.register_buffer("mask", torch.full((3, 3), float("-inf")).triu(1)),
    "empty Sequential": lambda m: setattr(m, "before", nn.Sequential()),
}


@pytest.mark.parametrize("case", BESIDE)
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script. is deprecated:DeprecationWarning")
def test_only_what_is_mobilevits_is_touched(case):
    model = Beside(BESIDE[case]).eval()
    frozen = assert_frozen_right(model, FIRST_BLOCK)
    expected = run(model)
    for dtype, tolerance in ((torch.bfloat16, 0.1), (torch.float64, 1e-4)):
        # a scripted convolution takes its own dtype only, frozen or not
        images = IMAGES.to(dtype) if case == "ScriptModule" else IMAGES
        other = mvit_kernels.freeze(model, dtype=dtype)
        ours = run(other, images)
        assert ours.dtype == dtype
        assert (ours - expected).abs().max() <= tolerance * expected.abs().max()
        for name in ("graph", "scale", "later", "spectrum", "mask"):
            if hasattr(model, name):
                kept, original = getattr(other, name), getattr(model, name)
                assert (kept.layout, kept.device) == (original.layout, original.device)
                assert kept.dtype == (original.dtype if name in ("scale", "spectrum") else dtype)
    assert isinstance(frozen.before, type(model.before))
    assert mvit_kernels.verify(mvit_kernels.accelerate(model), IMAGES).ok


class Packed(Tensor):
    """A weight whose values are stored elsewhere, like quantised ones: a subclass with ``__torch_dispatch__``."""

    @staticmethod
    def __new__(cls, values: Tensor):
        return Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype, device=values.device)

    def __init__(self, values: Tensor) -> None:
        self.values = values

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        plain = torch.utils._pytree.tree_map(lambda v: v.values if isinstance(v, Packed) else v, (args, kwargs or {}))
        result = func(*plain[0], **plain[1])
        if func in (torch.ops.aten.detach.default, torch.ops.aten.clone.default, torch.ops.aten.alias.default):
            return cls(result)
        return result


def _pack(module: nn.Module) -> None:
    module.weight = nn.Parameter(Packed(module.weight.detach()), requires_grad=False)


def test_weights_of_a_tensor_subclass_are_left():
    model = models.build("timm")
    _pack(model.stages[2][1].transformer[0].mlp.fc1)
    _pack(model.stem.conv)
    _pack(model.stages[4][1].conv_1x1)
    expected = run(models.build("timm"))
    frozen = mvit_kernels.freeze(model)
    left = dict(frozen.freeze_report.left)
    assert left.keys() == {"stages.2.1", "stem", "stages.4.1.conv_1x1"}
    assert all("Packed" in reason for reason in left.values())
    assert "transformer.0.mlp.fc1.weight" in left["stages.2.1"]
    torch.testing.assert_close(run(frozen), expected, rtol=1e-3, atol=1e-4)


# -- hooks


def test_full_backward_hooks_are_kept():
    """Class activation maps use the gradient of a map; in a frozen model they get the same one."""
    gradients = {}
    for name, make in (("frozen", mvit_kernels.freeze), ("stock", copy.deepcopy)):
        model, seen = models.build("timm"), []
        for module in (model.stem, model.stages[1][1], model.stages[2][1], model.stages[3], model.final_conv):
            module.register_full_backward_hook(lambda _, __, outs, seen=seen: seen.append(outs[0]))
            module.register_full_backward_pre_hook(lambda _, outs, seen=seen: seen.append(outs[0]))
        copied = make(model)
        copied(IMAGES.clone().requires_grad_()).square().sum().backward()
        gradients[name] = seen
    assert len(gradients["frozen"]) == len(gradients["stock"]) == 10
    for ours, stock in zip(gradients["frozen"], gradients["stock"], strict=True):
        torch.testing.assert_close(ours, stock, rtol=1e-3, atol=1e-4 * stock.abs().max().item())


def test_forward_hooks_are_kept_whole():
    """Those with keyword arguments, and those that are called even after an error."""
    model, calls = models.build("timm"), []
    model.stem.register_forward_hook(lambda m, args, kwargs, y: calls.append(kwargs), with_kwargs=True)
    model.stem.register_forward_pre_hook(lambda m, args, kwargs: calls.append(kwargs), with_kwargs=True)
    model.stages[0][0].register_forward_hook(lambda *_: calls.append("always"), always_call=True)
    frozen = mvit_kernels.freeze(model)
    run(frozen)
    assert calls == [{}, {}, "always"]
    with pytest.raises(RuntimeError):
        frozen.stages[0][0](torch.ones(1, 5, 8, 8))
    assert calls[3:] == ["always"]


def test_a_hook_on_a_block_is_called_once_where_the_librarys_own_block_serves_the_call():
    model, calls = models.build("cvnets"), []
    for block in models.blocks(model):
        block.register_forward_hook(lambda *_: calls.append(1))
    run(mvit_kernels.freeze(model), models.images(1, 128, 128))  # stage 3: 64 patches of 64 channels
    assert len(calls) == 3


def test_state_dict_hooks_that_are_lost_are_said():
    model = models.build("timm")
    model.stem.conv.register_state_dict_pre_hook(lambda *_: None)
    model.stages[2][1].register_load_state_dict_post_hook(lambda *_: None)
    model.head.register_state_dict_post_hook(lambda *_: None)
    found = mvit_kernels.freeze(model).freeze_report
    assert found.unhooked == ("stem.conv", "stages.2.1")  # the head is still there
    assert "2 × lost their state-dict hooks (stem.conv, stages.2.1)" in str(found)


# -- inputs


def _frozen_parts() -> dict[str, tuple[nn.Module, int]]:
    frozen = mvit_kernels.freeze(models.build("timm"))
    return {
        "model": (frozen, 3),
        "convolution": (frozen.stem, 3),
        "stages": (frozen.stages, 16),
        "block": (frozen.stages[2][1], 48),
        "inverted residual": (frozen.stages[1][1], 24),
    }


NO_IMAGES = (torch.uint8, torch.int8, torch.int32, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn)


@pytest.mark.parametrize("part", ["model", "convolution", "stages", "block", "inverted residual"])
def test_what_stock_refuses_is_refused(part):
    """Integers cast without a scale would give another class, and complex numbers would lose their imaginary part."""
    module, channels = _frozen_parts()[part]
    kinds = (FrozenConv2d, FrozenSequential, FrozenMobileViTBlock, FrozenInvertedResidual)
    assert part == "model" or isinstance(module, kinds)
    for dtype in NO_IMAGES:
        x = torch.ones(1, channels, 32, 32).to(dtype)
        for context in (contextlib.nullcontext(), mvit_kernels.use_backend("reference")):
            with context, pytest.raises(TypeError, match=rf"Frozen\w+: x is {dtype}; .*x\.float\(\) / 255"):
                run(module, x)
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        assert run(module, torch.ones(1, channels, 32, 32).to(dtype)).dtype == torch.float32


def test_a_convolution_that_adds_refuses_it_too():
    project = mvit_kernels.freeze(models.build("timm")).stages[1][1].project
    x, residual = torch.ones(1, project.in_channels, 8, 8), torch.ones(1, 24, 8, 8)
    with pytest.raises(TypeError, match="x is torch.uint8"):
        project(x.byte(), residual)
    with pytest.raises(TypeError, match="x is ndarray; a torch.Tensor is wanted"):
        project(x.numpy())
    assert project(x, residual).shape == residual.shape


def test_an_image_without_a_batch_goes_through_a_bare_convolution():
    conv = nn.Conv2d(3, 8, 3)
    torch.testing.assert_close(run(mvit_kernels.freeze(conv), IMAGES[0]), run(conv, IMAGES[0]), rtol=1e-4, atol=1e-5)


def test_a_tuple_is_still_video():
    block = models.blocks(models.build("cvnets"))[0]
    frame, previous = torch.randn(1, 48, 6, 8), torch.randn(4, 12, 64)
    with torch.no_grad():
        for ours, expected in zip(mvit_kernels.freeze(block)((frame, previous)), block((frame, previous)), strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


# -- other default devices


@contextlib.contextmanager
def meta_by_default():
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


def meta_inside():
    return torch.device("meta")


@pytest.mark.parametrize(
    "library, elsewhere", [*((library, meta_inside) for library in models.LIBRARIES), ("timm", meta_by_default)]
)
def test_where_tensors_are_made_on_another_device_by_default(library, elsewhere):
    model = models.build(library)
    expected = run(mvit_kernels.freeze(model))
    with elsewhere():
        frozen = mvit_kernels.freeze(model)
        assert frozen.freeze_report.composed == ()
        assert torch.equal(run(frozen), expected)
        with mvit_kernels.use_backend("reference"):
            torch.testing.assert_close(run(frozen), expected, rtol=1e-3, atol=1e-4)
        accelerated = mvit_kernels.accelerate(copy.deepcopy(model), strict=True)
        for ours in (accelerated, mvit_kernels.restore(copy.deepcopy(accelerated))):
            torch.testing.assert_close(run(ours), expected, rtol=1e-3, atol=1e-4)


def test_models_are_verified_where_tensors_are_made_on_another_device_by_default():
    model = models.first_block()
    with meta_inside():
        assert mvit_kernels.verify(mvit_kernels.freeze(model), IMAGES, reference=model).ok
        report = mvit_kernels.verify(mvit_kernels.accelerate(copy.deepcopy(model)), SMALL_IMAGES, gradients=True)
        assert report.ok, f"\n{report}"


def test_every_tensor_is_made_on_a_device_that_is_named():
    """Otherwise it would be made on the user's default device."""
    factories = "zeros ones empty full arange linspace tensor as_tensor eye rand randn randint randperm empty_strided"
    package, found = Path(mvit_kernels.__file__).parent, []
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not re.fullmatch(r"torch\.\w+", ast.unparse(node.func)):
                continue
            if node.func.attr in factories.split():
                found.append((f"{path.name}:{node.lineno}", any(keyword.arg == "device" for keyword in node.keywords)))
    assert len(found) > 20
    assert [place for place, named in found if not named] == []


@pytest.mark.parametrize("library", models.LIBRARIES)
def test_a_model_on_meta_freezes(library):
    frozen = mvit_kernels.freeze(models.build(library).to("meta"))
    assert len(frozen.freeze_report.convolutions) == 35
    assert run(frozen, IMAGES.to("meta")).shape == run(models.build(library)).shape


# -- on disk


@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
@pytest.mark.parametrize("library", models.LIBRARIES)
def test_a_frozen_state_dict_goes_through_safetensors(library, assign, tmp_path):
    """Dense values, each stored once. Where a library's own block serves some calls, it too has the loaded weights."""
    safetensors = pytest.importorskip("safetensors.torch")
    model = models.build(library)
    frozen = mvit_kernels.freeze(model)
    safetensors.save_file(frozen.state_dict(), tmp_path / "frozen.safetensors")
    other = mvit_kernels.freeze(models.sensible(models.build(library), seed=5))
    # Cloned: with SSE, MKL multiplies weights at the odd addresses of a file's memory in another order.
    loaded = {name: value.clone() for name, value in safetensors.load_file(tmp_path / "frozen.safetensors").items()}
    other.load_state_dict(loaded, assign=assign)
    # cvnets: 64 patches of 64 channels at stage 3, which its own block serves
    for x in (IMAGES, models.images(1, 128, 128)):
        assert torch.equal(run(other, x), run(frozen, x))
        torch.testing.assert_close(run(other, x), run(model, x), rtol=1e-3, atol=1e-4)


def test_save_pretrained_says_why_not(tmp_path):
    """from_pretrained would skip the frozen weights, and initialise others."""
    model = models.build("huggingface")
    frozen = mvit_kernels.freeze(model)
    for candidate in (frozen, copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen)), frozen.mobilevit):
        with pytest.raises(RuntimeError, match=r"this model is frozen.*freeze it again after"):
            candidate.save_pretrained(tmp_path / "frozen")
    assert not (tmp_path / "frozen").exists()
    model.save_pretrained(tmp_path / "stock")
    assert torch.equal(run(type(model).from_pretrained(tmp_path / "stock").eval()), run(model))
