# SPDX-License-Identifier: Apache-2.0
"""Time the CPU path over the scale of its inputs, 1e-3 to 1e4; exit with 1 if one takes 10 % longer than at scale 1.

    python benchmarks/scales.py [--only inverted_residual] [--dtypes float32] [--variant xxs] [--seconds 0.5]

Values must not decide the time. They did: an instruction that makes or reads a subnormal number takes an Intel core
150 cycles, and the exponentials of attention and of SiLU made them, so a frozen inverted residual took 5 times as long
when its input was 300 times larger, and attention 55 times when its scores were 100 times larger.

What is scaled are the maps and, since a LayerNorm makes all scales alike, the norms' weights and biases. Scales take
turns in random order on one thread. A line has the time at scale 1 in ms, and of each scale the ratio to it, of 20th
percentiles. One with a slow scale is measured up to twice more, and longer, since the machine may have been busy.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Mapping

import torch

import mvit_kernels
from mvit_kernels.bench.suites.operands import operands, stages
from mvit_kernels.bench.timing import interleave

SCALES = (1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2, 3e2, 1e3, 1e4)
MOST = 1.10
FORWARD = ("layer_norm_linear", "layer_norm_mlp", "patch_attention", "inverted_residual", "transformer", "frozen")
TRAINED = ("layer_norm_linear", "layer_norm_mlp", "patch_attention")  # with backward
Calls = Mapping[float, Callable[[], object]]  # by scale


def operator_calls(name: str, variant: str, dtype: torch.dtype, trained: bool = False) -> Calls:
    """The C++ operator at stage 3 of `variant` for one image of 256 px; layer_norm_linear with SiLU."""
    case = operands(name, stages([variant], 256, 1)[0]).to(dtype=dtype)
    scaled = [i for i, tensor in enumerate(case.names) if "norm" in tensor or i in case.activations]
    function = case.public
    if name == "layer_norm_linear":
        function = functools.partial(function, activation="silu")
    function = functools.partial(function, backend="cpu")

    def at(scale: float) -> Callable[[], object]:
        tensors = [t * scale if i in scaled else t for i, t in enumerate(case.tensors)]
        if not trained:
            return functools.partial(function, *tensors)
        tensors = [t.requires_grad_() for t in tensors]
        grad_out = torch.ones_like(function(*tensors))
        return lambda: torch.autograd.grad(function(*tensors), tensors, grad_out)

    return {scale: at(scale) for scale in SCALES}


def frozen_calls(variant: str, dtype: torch.dtype) -> Calls:
    """The whole frozen network, one image of 256 px."""
    torch.manual_seed(0)
    model = mvit_kernels.freeze(mvit_kernels.MobileViT(variant, num_classes=1000).eval(), dtype=dtype)
    images = torch.randn(1, 3, 256, 256)

    def at(scale: float) -> Callable[[], object]:
        return functools.partial(model, (images * scale).to(dtype, memory_format=torch.channels_last))

    return {scale: at(scale) for scale in SCALES}


def ratios(calls: Calls, seconds: float) -> tuple[float, dict[float, float]]:
    """Milliseconds at scale 1, and the time at each scale divided by that."""
    times = interleave(
        {str(scale): call for scale, call in calls.items()},
        seconds=seconds,
        warmup_seconds=0.02,
        sample_seconds=0.005,
    )
    one = times["1.0"].p20
    return one, {scale: times[str(scale)].p20 / one for scale in calls}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--only", choices=FORWARD, nargs="*", help="these forwards, without backwards")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--variant", choices=("xxs", "xs", "s"), default="s")
    parser.add_argument("--seconds", type=float, default=0.5, help="for each line")
    parser.add_argument("--most", type=float, default=MOST, help="the largest ratio that passes")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cases = [(name, False) for name in args.only or FORWARD] + [(name, True) for name in TRAINED if not args.only]
    print(f"{'':40}{'ms':>9}" + "".join(f"{scale:>8g}" for scale in SCALES))
    failed = False
    for dtype in args.dtypes:
        for name, trained in cases:
            kind = getattr(torch, dtype)
            with torch.set_grad_enabled(trained):
                if name == "frozen":
                    calls = frozen_calls(args.variant, kind)
                else:
                    calls = operator_calls(name, args.variant, kind, trained)
                one, found = ratios(calls, args.seconds)
                for longer in (3, 5):
                    if max(found.values()) > args.most:
                        one, found = ratios(calls, longer * args.seconds)
            slow = max(found.values()) > args.most
            failed |= slow
            label = f"{name}{', trained' if trained else ''}, {args.variant}, {dtype}"
            print(f"{label:40}{one:9.3f}" + "".join(f"{found[scale]:8.2f}" for scale in SCALES) + "  slow" * slow)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
