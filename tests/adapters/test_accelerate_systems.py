# SPDX-License-Identifier: Apache-2.0
"""Accelerated models in all that users do with them: copies, files, processes, threads, compilers, exporters."""

import copy
import io
import os
import pickle
import subprocess
import sys
import threading

import onnxruntime
import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel

from mvit_kernels import accelerate, freeze, report, restore
from mvit_kernels.backends import use_backend
from support import ROOT, TESTS, models
from support.declined import classes, evaluated
from support.fake_backend import fake_backend
from support.models import LIBRARIES, accelerated, assert_same, blocks, double, fast_calls

X = models.images(1, 64, 64).double()
KERNELS = ("transformer", "patch_attention", "layer_norm_linear", "layer_norm_mlp", "linear_residual")


# ---------------------------------------------------------------------------------------------------- copies and files


def _through_a_file(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), _through_a_file])
def test_copies_are_accelerated_and_independent(library, copied):
    model = accelerated(double(library), backend="reference")
    expected = evaluated(model, X)
    twin = copied(model)
    assert classes(twin) == classes(model)
    assert "_mvit_plan" in blocks(model)[0].__dict__ and "_mvit_plan" not in blocks(twin)[0].__dict__
    with fast_calls() as calls:
        assert_same(evaluated(twin, X), expected)
    assert len(calls) == 3 and len(report(twin).accelerated) == 3
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(evaluated(model, X), expected)
    assert classes(restore(twin)) == [getattr(cls, "_mvit_original", cls) for cls in classes(model)]


def test_a_file_read_by_another_process(tmp_path):
    """A model saved whole runs accelerated in a process that never called `accelerate`. Of cvnets, which imports
    nothing but torch: timm would add two to five seconds."""
    model = accelerated(double("cvnets"))
    torch.save({"model": model, "x": X, "y": evaluated(model, X)}, tmp_path / "model.pt")
    code = """
import sys, torch
import support.cvnets
assert "mvit_kernels" not in sys.modules
saved = torch.load(sys.argv[1], weights_only=False)
from mvit_kernels.adapters import _block, report
calls, original = [], _block.transformer_on_map
_block.transformer_on_map = lambda *a, **k: calls.append(1) or original(*a, **k)
torch.testing.assert_close(saved["model"](saved["x"]), saved["y"])
print(len(calls), len(report(saved["model"]).accelerated))
"""
    command = [sys.executable, "-c", code, str(tmp_path / "model.pt")]
    paths = os.pathsep.join(path for path in (str(TESTS), os.environ.get("PYTHONPATH")) if path)
    environment = {**os.environ, "PYTHONPATH": paths}
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["3", "3"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_moving_to_another_dtype(dtype):
    model = accelerated(models.build("timm"))
    evaluated(model, X.float())
    assert evaluated(model.to(dtype), X.to(dtype)).dtype == dtype


def test_loading_a_state_dict_into_an_accelerated_model():
    source, model = double(), accelerated(models.sensible(models.build("timm"), seed=9).double())
    before = evaluated(model, X)
    assert not torch.allclose(before, evaluated(source, X))
    model.load_state_dict(source.state_dict(), strict=True)
    assert_same(evaluated(model, X), evaluated(source, X))


def test_functional_calls_and_averaged_models():
    """Parameters substituted for one call, and the deep copy that a moving average makes."""
    model = accelerated(double())
    evaluated(model, X)
    other = {name: value * 1.01 for name, value in model.state_dict().items() if value.is_floating_point()}
    with torch.no_grad(), fast_calls() as calls:
        ours = torch.func.functional_call(model, other, (X,))
    assert len(calls) == 3
    assert_same(ours, torch.func.functional_call(restore(copy.deepcopy(model)), other, (X,)).detach())
    average = torch.optim.swa_utils.AveragedModel(model)
    average.update_parameters(model)
    assert_same(evaluated(average.eval(), X), evaluated(model, X))


def test_gradients_for_each_image():
    """torch.func's transforms only see into PyTorch's own operators: under them a block runs its original forward."""
    model = accelerated(models.build("timm", num_classes=3)).double()
    parameters, buffers = (dict(values) for values in (model.named_parameters(), model.named_buffers()))
    x = models.images(2, 64, 64).double()

    def loss(parameters, image):
        return torch.func.functional_call(model, (parameters, buffers), (image[None],)).square().sum()

    ours = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for index, image in enumerate(x):
        expected = torch.autograd.grad(loss(parameters, image), list(parameters.values()))
        for name, value in zip(parameters, expected, strict=True):
            torch.testing.assert_close(ours[name][index], value, rtol=1e-7, atol=1e-9)


# ----------------------------------------------------------------------------------------------- processes and threads


@pytest.mark.parametrize("library", ["timm", "huggingface"])
def test_distributed_data_parallel(library, process_group):
    model = double(library)
    x = models.images(2, 64, 96).double()
    expected, expected_gradients = models.differentiated(copy.deepcopy(model), x)
    parallel = DistributedDataParallel(accelerated(model))
    with fast_calls() as calls:
        ours, gradients = models.differentiated(parallel, x)
    assert len(calls) == 3
    assert_same(ours, expected)
    gradients = {name.removeprefix("module."): value for name, value in gradients.items()}
    models.assert_gradients_as_pytorch(gradients, expected_gradients, expected_gradients, unit=1e-9)


@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`")
@pytest.mark.parametrize("library", ["timm", "huggingface"])
def test_fully_sharded_blocks_by_class(library, process_group):
    """Policies name the library's class; our blocks are instances of it."""
    model = double(library)
    x = models.images(2, 64, 96).double()
    expected, expected_gradients = models.differentiated(copy.deepcopy(model), x)
    policy = ModuleWrapPolicy({type(blocks(model)[0])})
    sharded = FullyShardedDataParallel(
        accelerated(model), auto_wrap_policy=policy, device_id=torch.device("cpu"), use_orig_params=True
    )
    assert sum(isinstance(module, FullyShardedDataParallel) for module in sharded.modules()) == 4
    with fast_calls() as calls:
        ours, gradients = models.differentiated(sharded, x)
    assert len(calls) == 3
    assert_same(ours, expected)
    gradients = {name.replace("_fsdp_wrapped_module.", ""): value for name, value in gradients.items()}
    models.assert_gradients_as_pytorch(gradients, expected_gradients, expected_gradients, unit=1e-9)


def test_fully_shard(process_group):
    """It derives a class of its own from ours, which stays fast; but not when inner modules are sharded, whose hooks
    must run."""
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    model = double()
    x = models.images(2, 64, 96).double()
    expected, _ = models.differentiated(copy.deepcopy(model), x)
    sharded = accelerated(model)
    first, second, _ = blocks(sharded)
    fully_shard(first, mesh=mesh)
    for layer in second.transformer:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    assert [block.accelerated for block in report(sharded).blocks] == [True, False, True]
    reasons = "; ".join(report(sharded).blocks[1].reasons)
    assert "FSDPBlock" in reasons and "carries a hook" in reasons
    with fast_calls() as calls:
        ours, gradients = models.differentiated(sharded, x)
    assert len(calls) == 2 and all(value is not None for value in gradients.values())
    assert_same(ours, expected)
    accelerate(sharded)  # nothing new
    assert type(first).__name__ == "FSDPMobileVitBlock"
    with pytest.raises(ValueError, match="restore: stages.2.1 has become a FSDPMobileVitBlock"):
        restore(sharded)
    assert [block.accelerated for block in report(sharded).blocks] == [True, False, True]

    later = fully_shard(blocks(double())[0], mesh=mesh)
    accelerate(later)
    assert "it is a FSDPMobileVitBlock, derived from MobileVitBlock" in str(report(later))


def test_replicas_use_their_own_modules():
    """DataParallel's replicas are made from a copy of each module's __dict__, including what we keep in it."""
    model = accelerated(double())
    block = blocks(model)[0]
    x = torch.randn(1, 48, 8, 8, dtype=torch.float64)
    expected = block(x).detach()
    replica = block._replicate_for_data_parallel()
    for name, child in block._modules.items():
        replica._modules[name] = copy.deepcopy(child)
    with torch.no_grad():
        replica.transformer[0].attn.qkv.weight.mul_(2)
    with fast_calls() as calls:
        ours = replica(x).detach()
    assert len(calls) == 1 and not torch.equal(ours, expected)
    assert torch.equal(block(x).detach(), expected)


def test_two_threads_call_one_model():
    model = accelerated(models.build("huggingface"))
    inputs = [models.images(1, 64, 64 + 32 * (i % 2), seed=i) for i in range(8)]
    expected = [evaluated(model, x) for x in inputs]
    for block in blocks(model):  # both threads make the plan, for different sizes
        block.__dict__.pop("_mvit_plan")
    outputs, errors = {}, []

    def work(offset):
        try:
            for index in range(offset, len(inputs), 2):
                for _ in range(3):
                    outputs[index] = evaluated(model, inputs[index])
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(offset,)) for offset in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert all(torch.equal(outputs[index], value) for index, value in enumerate(expected))


# --------------------------------------------------------------------------------------------- compilers and exporters


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_compiled_blocks(fresh_compiler):
    """One graph each, like timm's in ops/test_compile.py; a block that declines compiles in its original form."""
    for library in ("huggingface", "kornia", "cvnets"):
        block = blocks(accelerated(double(library)))[0]
        x = torch.randn(1, 24 if library == "huggingface" else 48, 8, 8, dtype=torch.float64)
        expected = block(x).detach()
        compiled = torch.compile(lambda x, block=block: block(x), fullgraph=True, backend="eager")
        with torch.no_grad():
            assert_same(compiled(x), expected)
    declining = blocks(accelerated(double()))[0]
    declining.transformer[0].mlp.act = nn.GELU()
    with torch.no_grad(), fast_calls() as calls:
        ours = torch.compile(lambda x: declining(x), fullgraph=True, backend="eager")(x)
        assert not calls
        assert_same(ours, restore(declining)(x))


def test_a_compiled_block_sees_new_weights_and_modules(fresh_compiler):
    block = blocks(accelerated(double()))[0]
    x = torch.randn(1, 48, 8, 8, dtype=torch.float64)
    compiled = torch.compile(lambda x: block(x), backend="eager")
    with torch.no_grad():
        compiled(x)
        block.transformer[0].attn.qkv.weight.mul_(2)
        assert_same(compiled(x), block(x))
        block.transformer[1].mlp.fc2 = nn.Linear(128, 64).double()
        assert_same(compiled(x), block(x))
        block.transformer[1].mlp.act = nn.GELU()
        assert_same(compiled(x), block(x))


@pytest.mark.parametrize("library", ["timm", "huggingface"])
def test_export_is_plain_pytorch(library):
    """Whichever backend would run in eager mode: here one that serves everything."""
    model = accelerated(double(library))
    expected = evaluated(model, X)
    with fake_backend(KERNELS):
        exported = torch.export.export(model, (X,))
    targets = [str(node.target) for node in exported.graph.nodes]
    assert not [target for target in targets if "mvit" in target]
    assert "aten.scaled_dot_product_attention.default" in targets
    assert_same(evaluated(exported.module(), X), expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("library", ["timm", "huggingface", "own"])
def test_trace(library):
    model, x = accelerated(models.build(library)), X.float()
    with fake_backend(KERNELS), torch.no_grad():
        expected = evaluated(model, x)
        traced = torch.jit.trace(model, x, strict=False, check_trace=False)
    y = traced(x)
    torch.testing.assert_close((y["logits"] if isinstance(y, dict) else y).detach(), expected)
    assert not [node for node in traced.inlined_graph.nodes() if node.kind().startswith("mvit")]


def test_onnx():
    """Of the network up to its first block, whose export takes a third of the time."""
    model, x = accelerated(models.first_block()), X.float()
    program = torch.onnx.export(model, (x,), dynamo=True)
    assert not [node for node in program.model.graph if "mvit" in node.domain]
    torch.testing.assert_close(program(x)[0], evaluated(model, x), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("library, made", [("timm", accelerated), ("huggingface", accelerated), ("own", freeze)])
def test_onnx_of_a_trace(library, made):
    """The older exporter, at 224 px, where the last block's map of 7 × 7 is resized; the batch size stays dynamic."""
    model = models.build(library)

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = made(model)

        def forward(self, x):
            return models.output(self.model(x))

    file, axes = io.BytesIO(), {"x": {0: "batch"}, "y": {0: "batch"}}
    names = dict(input_names=["x"], output_names=["y"], dynamic_axes=axes)
    torch.onnx.export(Logits().eval(), (models.images(1, 224, 224),), file, dynamo=False, **names)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        x = models.images(batch, 224, 224, seed=batch)
        expected = evaluated(model, x)
        (y,) = session.run(None, {"x": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(y), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_training_step_lowers_the_loss():
    """A whole step: autocast, gradients, clipping, AdamW, with live dropout."""
    model = accelerated(models.build("huggingface", hidden_dropout_prob=0.1)).train()
    x, labels = models.images(4, 64, 96), torch.arange(4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    losses = []
    for _ in range(4):
        with torch.autocast("cpu", torch.bfloat16), fast_calls() as calls, use_backend("reference"):
            loss = model(x, labels=labels).loss
        assert len(calls) == 3
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1
