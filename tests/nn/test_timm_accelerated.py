# SPDX-License-Identifier: Apache-2.0
"""`accelerated_mobilevit_*` in timm's registry, and both families of names in what timm's `train.py` is made of."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import timm
import torch
from timm.data import create_dataset, create_loader
from timm.optim import create_optimizer_v2
from timm.utils import CheckpointSaver

import mvit_kernels
from mvit_kernels.nn import register_timm_models
from support import ROOT
from support.examples import image_folder
from support.models import fast_calls

register_timm_models()
NAMES = ("accelerated_mobilevit_xxs", "mvit_kernels_mobilevit_xxs")


@pytest.mark.parametrize("mode", ["xxs", "xs", "s"])
def test_it_is_timms_model_accelerated(mode):
    torch.manual_seed(0)
    model = timm.create_model(f"accelerated_mobilevit_{mode}", num_classes=3, in_chans=4, drop_path_rate=0.1)
    torch.manual_seed(0)
    stock = timm.create_model(f"mobilevit_{mode}", num_classes=3, in_chans=4, drop_path_rate=0.1)
    assert len(mvit_kernels.report(model).accelerated) == 3 and not mvit_kernels.report(stock).accelerated
    assert list(model.state_dict()) == list(stock.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), stock.parameters(), strict=True))
    assert repr(mvit_kernels.restore(model)) == repr(stock)
    assert model.pretrained_cfg == stock.pretrained_cfg and model.pretrained_cfg["architecture"] == f"mobilevit_{mode}"


def test_weights_from_a_file_features_and_a_backend(tmp_path):
    stock = timm.create_model("mobilevit_xxs", num_classes=3)
    torch.save(stock.state_dict(), tmp_path / "weights.pth")
    overlay = {"file": str(tmp_path / "weights.pth"), "num_classes": 3}
    for options in (
        {"checkpoint_path": tmp_path / "weights.pth"},
        {"pretrained": True, "pretrained_cfg_overlay": overlay},
    ):
        model = timm.create_model("accelerated_mobilevit_xxs", num_classes=3, **options)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), stock.parameters(), strict=True))
    features = timm.create_model("accelerated_mobilevit_xxs.cvnets_in1k", features_only=True)
    with fast_calls() as calls:
        assert [y.shape[1] for y in features(torch.rand(1, 3, 64, 64))] == [16, 24, 48, 64, 320]
    assert len(calls) == 3
    with pytest.raises(ValueError, match="nonsense"):
        timm.create_model("accelerated_mobilevit_xxs", backend="nonsense")
    chosen = timm.create_model("accelerated_mobilevit_xxs", backend="reference")
    assert {block._mvit_backend for block in chosen.modules() if hasattr(block, "_mvit_backend")} == {"reference"}


def test_a_model_that_cannot_be_accelerated_is_refused():
    """It must not train as plain timm under this name."""
    with pytest.raises(ValueError, match="only SiLU is fused"):
        timm.create_model("accelerated_mobilevit_xxs", act_layer="gelu")


def test_timms_names_stay_as_they_are():
    assert timm.list_models("*mobilevit_xxs*") == sorted([*NAMES, "mobilevit_xxs"])
    assert timm.models.model_entrypoint("mobilevit_xxs").__module__ == "timm.models.mobilevit"


@pytest.mark.parametrize("name", NAMES)
def test_trained_by_what_train_py_is_made_of(name, tmp_path):
    """Its task, EMA, optimizer groups, loader of several sizes, autocast, checkpointing and saver."""
    pytest.importorskip("timm.task", reason="timm before 1.0.31 has no tasks")
    from timm.task import ClassificationTask

    torch.manual_seed(0)
    data = create_dataset("", root=str(image_folder(tmp_path / "data")))
    sizes = dict(input_size_choices=[(3, 64, 64), (3, 96, 96)], batch_size_choices=[4, 2])
    loader = create_loader(
        data,
        (3, 64, 64),
        4,
        is_training=True,
        num_workers=0,
        device=torch.device("cpu"),
        persistent_workers=False,
        **sizes,
    )
    model = timm.create_model(name, num_classes=2)
    model.set_grad_checkpointing(True)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.01)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.01]
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    task = ClassificationTask(model, criterion_kwargs=dict(smoothing=0.1), device=torch.device("cpu"))
    task.setup_ema(decay=0.9)
    average = task.get_trainable_module(ema=True).module
    assert len(mvit_kernels.report(average).accelerated) == 3

    before = {key: value.clone() for key, value in average.state_dict().items()}
    steps, seen = 0, set()
    with fast_calls() as calls:
        for images, target in loader:
            with torch.autocast("cpu", torch.bfloat16):
                loss = task(images, target)["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            task.update_ema()
            assert loss.isfinite()
            steps += 1
            seen.add(tuple(images.shape))
    assert len(calls) == 2 * 3 * steps  # with the recomputation in backward
    assert seen <= {(4, 3, 64, 64), (2, 3, 96, 96)} and steps >= 2
    assert any(not torch.equal(value, before[key]) for key, value in average.state_dict().items())

    saver = CheckpointSaver(
        model, optimizer, model_ema=task.get_trainable_module(ema=True), checkpoint_dir=str(tmp_path)
    )
    saver.save_checkpoint(0, 50.0)
    (path,) = tmp_path.glob("model_best.pth.tar")
    plain = mvit_kernels.restore(
        timm.create_model(name.replace("accelerated_", ""), num_classes=2, checkpoint_path=path)
    )
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(plain.eval()(x), average.eval()(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_train_py_itself(name, tmp_path):
    script = os.environ.get("MVIT_KERNELS_TIMM_TRAIN")
    if not script:
        pytest.skip("timm's package has no train.py; set MVIT_KERNELS_TIMM_TRAIN to the file of timm >= 1.0.31")
    images = image_folder(tmp_path / "data" / "train")
    (tmp_path / "data" / "validation").symlink_to(images)
    options = f"""--device-modules mvit_kernels.nn --model {name} --num-classes 2 --device cpu --img-size 64 -b 4 -j 0
        --train-img-sizes 64 96 --train-batch-sizes 4 2 --epochs 1 --warmup-epochs 0 --cooldown-epochs 0 --opt adamw
        --lr 1e-3 --weight-decay 0.01 --smoothing 0.1 --amp --amp-dtype bfloat16 --model-ema --grad-checkpointing"""
    command = [sys.executable, script, str(tmp_path / "data"), *options.split(), "--output", str(tmp_path / "out")]
    settings = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | settings)
    assert result.returncode == 0, result.stderr
    (best,) = (tmp_path / "out").glob("*/model_best.pth.tar")
    timm.create_model(name.replace("accelerated_", ""), num_classes=2, checkpoint_path=best)
