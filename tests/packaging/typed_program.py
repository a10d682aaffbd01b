# SPDX-License-Identifier: Apache-2.0
"""A user's program, which mypy checks in `make lint` and nobody runs: the types of the public calls.

Each `type: ignore` stands where the call is wrong; one that is not needed is an error (warn_unused_ignores).
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from typing_extensions import assert_type

import mvit_kernels
from mvit_kernels import (
    AccelerationReport,
    CudaGraphs,
    ExportReport,
    LayerDropout,
    MobileViT,
    MobileViTDeepLabV3,
    MobileViTSSDLite,
    MultiScaleSampler,
    TransformerLayerWeights,
    VerificationReport,
    accelerate,
    export,
    freeze,
    load_checkpoint,
    report,
    restore,
    use_backend,
    verify,
)
from mvit_kernels.freezing import FreezeReport
from mvit_kernels.nn import SSDOutput, register_timm_models
from mvit_kernels.ops import transformer_on_map
from mvit_kernels.training.sized import SizedDataset, TimmTransforms, timm_transforms
from mvit_kernels.zoo import load, logits


def models(images: Tensor) -> None:
    model = accelerate(MobileViT("s", num_classes=10), backend="cpu", strict=True)
    assert_type(model, MobileViT)
    assert_type(restore(model), MobileViT)
    assert_type(freeze(model, dtype=torch.bfloat16), MobileViT)
    assert_type(freeze(model, cuda_graph=CudaGraphs(shapes=2, more="run")), MobileViT)
    assert_type(freeze(model, example=[images, images]), MobileViT)
    assert_type(load_checkpoint(model, Path("weights.pth")), MobileViT)
    assert_type(load_checkpoint(model, {"classifier.weight": images}), MobileViT)
    assert_type(model.forward_features(images), Tensor)
    assert_type(model.feature_maps(images, [2, 3]), list[Tensor])
    assert_type(mvit_kernels.convert_state_dict(model.state_dict(), to="timm"), dict[str, Tensor])
    assert_type(report(model), AccelerationReport)
    assert_type(report(model).blocks[0].reasons, tuple[str, ...])
    assert_type(verify(model, images, gradients=True), VerificationReport)
    assert_type(verify(model, images).ok, bool)
    assert_type(export(model, "model.onnx", sizes=[224, (192, 256)], batch="dynamic"), ExportReport)
    assert_type(export(model, Path("model.pt2"), sizes="dynamic", dtype=torch.float16).ok, bool)
    assert_type(accelerate(nn.Sequential(model)), nn.Sequential)
    assert_type(load("mobilevit_s", device="cpu"), nn.Module)
    assert_type(logits(model(images)), Tensor)
    with use_backend("reference"):
        register_timm_models()
    accelerate("mobilevit_s")  # type: ignore[type-var]
    accelerate(model, backends="cpu")  # type: ignore[call-arg]
    freeze(model, dtype="bfloat16")  # type: ignore[arg-type]
    freeze(images)  # type: ignore[type-var]
    export(model)  # type: ignore[call-arg]
    export(model, "model.onnx", sizes="large")  # type: ignore[arg-type]
    verify(model)  # type: ignore[call-arg]
    load_checkpoint("weights.pth", model)  # type: ignore[type-var, arg-type]
    mvit_kernels.convert_state_dict(model.state_dict(), to="keras")  # type: ignore[arg-type]
    mvit_kernels.acelerate(model)  # type: ignore[attr-defined]


def heads(images: Tensor) -> None:
    detector = freeze(accelerate(MobileViTSSDLite("xs", num_classes=9)))
    assert_type(detector, MobileViTSSDLite)
    output = detector.forward(images)
    assert_type(output, SSDOutput)
    assert_type(detector.detect(output, (320, 320), score=0.5), list[dict[str, Tensor]])
    segmenter = freeze(MobileViTDeepLabV3("xs", num_classes=9))
    assert_type(segmenter.segment(segmenter.forward(images), (512, 512)), Tensor)
    detector.detect(output, 320)  # type: ignore[arg-type]


def operators(x: Tensor, weight: Tensor, bias: Tensor, layer: TransformerLayerWeights) -> None:
    assert_type(mvit_kernels.layer_norm(x, weight, bias), Tensor)
    assert_type(mvit_kernels.linear_residual(x, weight, None, x, backend="cpu"), Tensor)
    assert_type(mvit_kernels.layer_norm_linear(x, weight, bias, weight, None, activation="silu"), Tensor)
    assert_type(mvit_kernels.patch_attention(x, num_heads=4, patch_size=(2, 2)), Tensor)
    assert_type(mvit_kernels.transformer(x, [layer], (weight, bias), num_heads=4, patch_size=2), Tensor)
    dropped = LayerDropout(projection=0.1)
    assert_type(transformer_on_map(x, [layer], None, num_heads=4, patch_size=2, dropout=[dropped]), Tensor)
    mvit_kernels.patch_attention(x, 4, (2, 2))  # type: ignore[call-arg]
    mvit_kernels.patch_attention(x, num_heads="4", patch_size=2)  # type: ignore[arg-type]
    mvit_kernels.transformer(x, layer, num_heads=4, patch_size=2)  # type: ignore[arg-type]


def training(photos: Dataset[tuple[Tensor, int]], count: int) -> None:
    assert_type(timm_transforms(is_training=True), TimmTransforms)
    samples = SizedDataset(photos, timm_transforms(is_training=True))
    sampler = MultiScaleSampler(samples, 128, rank=0, world_size=2)
    assert_type(sampler.steps, int)
    DataLoader(samples, batch_sampler=sampler)
    MultiScaleSampler(samples, "128")  # type: ignore[arg-type]


def reports(frozen: FreezeReport) -> None:
    assert_type(frozen.left, tuple[tuple[str, str], ...])
    assert_type(mvit_kernels.keep_freed_memory(), bool)
