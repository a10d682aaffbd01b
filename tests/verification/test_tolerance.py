# SPDX-License-Identifier: Apache-2.0
"""The instruments of the operators' tests: that they see what they are meant to see."""

import pytest
import torch
import torch.nn.functional as F

from mvit_kernels.rounding import RUNS, careful_error
from support.cases import poisoned
from support.layouts import LAYOUTS, lay_out
from support.oracle import depthwise, resize
from support.tolerance import DRAWS, Compared, assert_close_as_pytorch, assert_close_over_draws

TRUTH = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)


def test_the_rule():
    """PyTorch is off by 1e-3, the band is 2 units: 2 · (1e-3 + band) is the most allowed."""
    pytorch = (TRUTH + torch.tensor([0.0, 1e-3, 0.0])).float()
    bound = 2 * ((pytorch.double() - TRUTH).abs().max().item() + 2 * torch.finfo(torch.float32).eps)
    for off in (0.0, 0.99 * bound):
        assert_close_as_pytorch("near", (TRUTH + off).float(), pytorch, TRUTH)
    with pytest.raises(AssertionError, match=r"far: error .* is over .* worst at \(1,\): -1.9"):
        assert_close_as_pytorch("far", (TRUTH + torch.tensor([0.0, 1.02 * bound, 0.0])).float(), pytorch, TRUTH)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_fails(bad):
    ours = TRUTH.float().clone()
    ours[2] = bad
    with pytest.raises(AssertionError, match=r"worst at \(2,\)"):
        assert_close_as_pytorch("ours", ours, TRUTH.float(), TRUTH)
    with pytest.raises(AssertionError, match="the case says nothing"):
        assert_close_as_pytorch("PyTorch", TRUTH.float(), ours, TRUTH)


def test_shape_and_dtype_count():
    with pytest.raises(AssertionError, match=r"shape \(1, 3\), not \(3,\)"):
        assert_close_as_pytorch("ours", TRUTH.float()[None], TRUTH.float(), TRUTH)
    with pytest.raises(AssertionError, match="torch.bfloat16, while PyTorch gives torch.float32"):
        assert_close_as_pytorch("ours", TRUTH.bfloat16(), TRUTH.float(), TRUTH)
    with pytest.raises(AssertionError, match="not float64"):
        assert_close_as_pytorch("ours", TRUTH.float(), TRUTH.float(), TRUTH.float())
    empty = TRUTH[:0]
    assert_close_as_pytorch("empty", empty.float(), empty.float(), empty)


def test_one_unlucky_draw_passes_and_a_habit_does_not():
    def draw(habit):
        def of(seed):
            pytorch = (TRUTH + (1e-3 if seed else 1e-6)).float()  # lucky the first time
            return {"out": Compared((TRUTH + habit).float(), pytorch, TRUTH)}

        return of

    assert_close_over_draws(draw(1.5e-3))
    with pytest.raises(AssertionError, match=f"out over {DRAWS} draws"):
        assert_close_over_draws(draw(3e-3))
    with pytest.raises(AssertionError, match="nan"):
        assert_close_over_draws(draw(float("nan")))


def test_careful_arithmetic_decides_where_pytorch_is_too_exact_or_garbage():
    """Off by 1e-5, like careful arithmetic: right whether PyTorch is exact or gives 1e36."""

    def careful(seed):
        return TRUTH + torch.tensor([1e-5, 0.0, -1e-5], dtype=torch.float64)

    ours = (TRUTH + torch.tensor([0.0, 1e-5, 0.0])).float()
    for pytorch in (TRUTH.float(), TRUTH.float() * 1e36, TRUTH.float() * torch.nan):
        assert_close_as_pytorch("ours", ours, pytorch, TRUTH, careful)
        with pytest.raises(AssertionError, match="careful arithmetic's"):
            assert_close_as_pytorch("far", (TRUTH + 9e-5).float(), pytorch, TRUTH, careful)
        with pytest.raises(AssertionError):
            assert_close_as_pytorch("nan", ours * torch.nan, pytorch, TRUTH, careful)
    with pytest.raises(AssertionError, match="nan"):  # garbage that hides nothing: it is decided over the draws
        assert_close_over_draws(lambda seed: {"x": Compared(ours * torch.nan, TRUTH.float(), TRUTH, careful)})
    garbage = TRUTH.float() * 1e36
    with pytest.raises(AssertionError, match="careful arithmetic's"):
        assert_close_over_draws(lambda seed: {"x": Compared((TRUTH + 9e-5).float(), garbage, TRUTH, careful)})


def test_samples_are_drawn_until_one_allows_the_error():
    """A later sample can only add to what is allowed."""
    drawn = []

    def careful(seed):
        drawn.append(seed)
        return TRUTH + 1e-5 * (seed + 1)

    for times, samples in ((1, 1), (5, 3), (15, RUNS), (30, RUNS)):  # 30: of four root mean squares, 20e-5
        drawn.clear()
        assert_close_as_pytorch("ours", (TRUTH + 1e-5 * times).float(), TRUTH.float(), TRUTH, careful)
        assert drawn == list(range(samples)), times
    with pytest.raises(AssertionError, match="careful arithmetic's"):
        assert_close_as_pytorch("far", (TRUTH + 50e-5).float(), TRUTH.float(), TRUTH, careful)


@pytest.mark.parametrize("values", [1, 3, 16, 256])
def test_careful_arithmetic_hardly_ever_misses(values):
    """A right operator's errors are at most 1.3 times the careful ones (test_exactness.py); normal errors, drawn as
    `assert_close_over_draws` draws them and without its bands, and PyTorch exact, exceed the rule in none of a million
    draws, or of what 2^26 errors are enough for."""
    generator = torch.Generator().manual_seed(values)
    sample = DRAWS * values
    trials = min(1_000_000, 2**26 // ((RUNS + 1) * sample))
    misses = 0
    for _ in range(10):
        careful = torch.randn(trials // 10, RUNS * sample, generator=generator)
        expected = torch.maximum(careful.abs().amax(1), 4 * careful.square().mean(1).sqrt())
        ours = 1.3 * torch.randn(trials // 10, sample, generator=generator).abs().amax(1)
        misses += (ours > 2 * expected).sum().item()
    assert misses == 0
    errors = careful[0].reshape(RUNS, sample).double()
    assert careful_error(list(errors), torch.zeros(sample).double()) == pytest.approx(expected[0].item())


def test_poison():
    with poisoned():
        assert torch.empty(5).isnan().all() and torch.empty(5).new_empty(3, dtype=torch.bfloat16).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (3, 5), (5,), (0, 3, 4, 5)])
def test_layouts_keep_values_and_change_strides(shape, layout):
    t = torch.randn(shape)
    view, buffer = lay_out(t, layout)
    expected = t[:1].expand(shape) if layout == "expanded" and shape[0] else t
    assert torch.equal(view, expected)
    if layout in ("permuted", "transposed", "strided") and t.dim() == 4 and t.numel():
        assert not view.is_contiguous()
    if buffer is not None:
        assert (buffer == 42).sum() == buffer.numel() - t.numel()
        assert view.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()


def test_the_oracle_resizes_and_convolves_as_pytorch_does():
    x = torch.randn(2, 3, 5, 7, dtype=torch.float64)
    for size in ((6, 8), (5, 7), (4, 3), (1, 12)):
        expected = F.interpolate(x, size, mode="bilinear", align_corners=False)
        torch.testing.assert_close(resize(x, *size), expected, rtol=1e-13, atol=1e-13)
    weight, bias = torch.randn(3, 1, 3, 3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    for stride, dilation in ((1, 1), (2, 1), (1, 2), (2, 3)):
        expected = F.conv2d(x, weight, bias, stride, dilation, dilation, groups=3).permute(0, 2, 3, 1)
        ours = depthwise(x.permute(0, 2, 3, 1), weight, bias, stride, dilation)
        torch.testing.assert_close(ours, expected, rtol=1e-13, atol=1e-13)
