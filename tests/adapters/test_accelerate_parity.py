# SPDX-License-Identifier: Apache-2.0
"""Accelerated models compute what they did before: outputs and every gradient, for all libraries, by the
tolerance rule."""

import copy

import pytest
import torch

from support import models
from support.models import LIBRARIES, fast_calls
from support.tolerance import assert_close_as_pytorch

# 224 px gives an odd map in stage 5, 250 × 270 odd maps in stages 3 to 5. Kornia only takes multiples of 64.
SIZES = {library: [(256, 256), (224, 224), (192, 192), (250, 270)] for library in LIBRARIES}
SIZES["kornia"] = [(256, 256), (192, 192), (128, 192), (320, 256)]
SMALL = {library: (64, 96) for library in LIBRARIES} | {"kornia": (64, 128)}  # 64 × 96: 2 × 3 in stage 5
NEXT = {library: (96, 160) for library in LIBRARIES} | {"kornia": (128, 192)}


def evaluated(model, x, autocast=False):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        return models.output(model(x))


def assert_evaluates_as_pytorch(library, variant, x, autocast=False):
    model = models.build(library, variant)
    with fast_calls() as calls:
        ours = evaluated(models.accelerated(model), x, autocast)
    assert len(calls) == 3
    pytorch = evaluated(model, x, autocast)
    assert_close_as_pytorch(f"{library} {variant}", ours, pytorch, evaluated(model.double(), x.double()))


def assert_trains_as_pytorch(library, variant, x, autocast=False):
    model = models.build(library, variant)
    with fast_calls() as calls:
        ours, ours_gradients = models.differentiated(models.accelerated(model), x, autocast)
    assert len(calls) == 3
    truth, true_gradients = models.differentiated(copy.deepcopy(model).double(), x.double())
    pytorch, gradients = models.differentiated(model, x, autocast)
    assert_close_as_pytorch(f"{library} {variant}", ours, pytorch, truth)
    unit = torch.finfo(torch.bfloat16 if autocast else torch.float32).eps
    models.assert_gradients_as_pytorch(ours_gradients, gradients, true_gradients, unit)


@pytest.mark.parametrize(("library", "size"), [(library, size) for library in LIBRARIES for size in SIZES[library]])
def test_evaluation_at_the_usual_sizes(library, size):
    assert_evaluates_as_pytorch(library, "xxs", models.images(1, *size))


# XXS is tested with every library. What a library keeps where does not depend on the widths: of XS and S, each library
# evaluates one and trains the other.
LARGER = [("timm", "s"), ("huggingface", "xs"), ("kornia", "s"), ("cvnets", "xs"), ("own", "s")]
TRAINED = [("timm", "xs"), ("huggingface", "s"), ("kornia", "xs"), ("cvnets", "s"), ("own", "xs")]


@pytest.mark.parametrize(("library", "variant"), LARGER)
def test_evaluation_of_the_larger_variants(library, variant):
    size = (256, 256) if variant == "s" else SMALL[library]
    assert_evaluates_as_pytorch(library, variant, models.images(1, *size))


@pytest.mark.parametrize(("library", "variant"), [*((library, "xxs") for library in LIBRARIES), *TRAINED])
def test_training(library, variant):
    assert_trains_as_pytorch(library, variant, models.images(2, *SMALL[library]))


@pytest.mark.parametrize("library", LIBRARIES)
def test_evaluation_under_autocast(library):
    assert_evaluates_as_pytorch(library, "xxs", models.images(2, *NEXT[library]), autocast=True)


@pytest.mark.parametrize(("library", "variant"), [*((library, "xxs") for library in LIBRARIES), ("huggingface", "s")])
def test_training_under_autocast(library, variant):
    assert_trains_as_pytorch(library, variant, models.images(2, *NEXT[library]), autocast=True)


@pytest.mark.parametrize("library", LIBRARIES)
def test_float64_to_the_last_digits(library):
    """The sharpest test: errors that float32's rounding would hide show here, in the output and in every gradient."""
    model = models.build(library).double()
    x = models.images(2, *SMALL[library]).double()
    ours, ours_gradients = models.differentiated(models.accelerated(model), x)
    pytorch, gradients = models.differentiated(model, x)
    models.assert_same(ours, pytorch)
    models.assert_gradients_as_pytorch(ours_gradients, gradients, gradients, unit=1e-9)


@pytest.mark.parametrize("library", LIBRARIES)
def test_channels_last(library):
    """Values and memory format are those of the model itself."""
    model = models.build(library).to(memory_format=torch.channels_last)
    x = models.images(2, *NEXT[library]).contiguous(memory_format=torch.channels_last)
    outputs = []
    for candidate in (models.accelerated(model), model):
        seen = []
        handle = models.blocks(candidate)[0].register_forward_hook(lambda _, __, y, seen=seen: seen.append(y))
        outputs.append((evaluated(candidate, x), *seen))
        handle.remove()
    (ours, our_map), (pytorch, their_map) = outputs
    assert our_map.is_contiguous(memory_format=torch.channels_last)
    assert their_map.stride() == our_map.stride()
    assert_close_as_pytorch(library, ours, pytorch, evaluated(model.double(), x.double()))


@pytest.mark.parametrize("library", LIBRARIES)
def test_batch_norm_statistics_move_as_they_would(library):
    model = models.build(library)
    ours = models.accelerated(model)
    x = models.images(2, *SMALL[library])
    with torch.no_grad():
        model.train()(x)
        ours.train()(x)
    for (name, expected), (_, value) in zip(model.named_buffers(), ours.named_buffers(), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("library", LIBRARIES)
def test_bfloat16_weights(library):
    model = models.build(library)
    x = models.images(2, *NEXT[library])
    truth = evaluated(copy.deepcopy(model).double(), x.double())
    model.to(torch.bfloat16)
    ours = evaluated(models.accelerated(model), x.bfloat16())
    assert_close_as_pytorch(library, ours, evaluated(model, x.bfloat16()), truth)
