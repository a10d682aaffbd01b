# SPDX-License-Identifier: Apache-2.0
"""What Triton's compiler makes of the frozen networks' kernels: every convolution of xxs, xs and s at 256 px.

Example:
    $ python -m gates.triton_networks                          # write tests/data/triton_networks.csv
    $ python -m gates.triton_networks --arch 90 --only s --dry

Like `gates.triton_gate`, whose columns its table has. The shapes are those of a forward pass of the model on meta
tensors, for one image and for 256.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import nn

from gates import table
from gates.triton_gate import ARCHITECTURES, COLUMNS, build, describe
from support import TESTS

TABLE = TESTS / "data" / "triton_networks.csv"
SIZES = ("xxs", "xs", "s")
BATCHES = (1, 256)
ALL_SIZES_ON = 90  # elsewhere less: a variant of a kernel takes a second or two to compile, and all would be 800
SIDE = 256


class Layer(NamedTuple):
    """A convolution and what follows it."""

    name: str
    channels: int
    out: int
    kernel: int
    stride: int
    depthwise: bool
    side: int  # of its input
    activation: str | None
    residual: bool


@lru_cache
def layers(size: str, side: int = SIDE) -> list[Layer]:
    """The convolutions of a MobileViT in the order in which they run, for images of `side` pixels."""
    from mvit_kernels.nn import MobileViT

    with torch.device("meta"):
        model = MobileViT(size).eval()
    found: list[Layer] = []

    def note(name: str):
        def hook(conv: nn.Conv2d, arguments: tuple, result: torch.Tensor) -> None:
            (x,) = arguments
            plain = name.endswith(("project.conv", "conv_in"))
            block, is_project, _ = name.partition(".project.conv")
            residual = bool(is_project) and model.get_submodule(block).residual
            found.append(
                Layer(
                    *(name, x.shape[1], result.shape[1], conv.kernel_size[0], conv.stride[0], conv.groups > 1),
                    *(x.shape[2], None if plain else "silu", residual),
                )
            )

        return hook

    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(note(name))
    with torch.no_grad():
        model(torch.empty(1, 3, side, side, device="meta"))
    return found


def rows_of(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, device="meta", dtype=dtype)


def launch_of(layer: Layer, batch: int, dtype: torch.dtype):
    """The launch of a layer; the first layer reads a contiguous (B, 3, H, W) image."""
    from mvit_kernels.backends.triton import convolution, depthwise_convolution

    side = -(-layer.side // layer.stride)
    x = rows_of(batch, layer.side, layer.side, layer.channels, dtype=dtype)
    if layer.channels == 3:
        x = rows_of(batch, 3, layer.side, layer.side, dtype=dtype).permute(0, 2, 3, 1)
    out, bias = rows_of(batch, side, side, layer.out, dtype=dtype), rows_of(layer.out, dtype=dtype)
    weight = rows_of(layer.out, 1 if layer.depthwise else layer.channels, layer.kernel, layer.kernel, dtype=dtype)
    settings = {"stride": layer.stride, "activation": layer.activation}
    if layer.depthwise:
        return depthwise_convolution.launch(x, depthwise_convolution.packed(weight), bias, out, **settings)
    residual = out if layer.residual else None
    return convolution.launch(x, convolution.packed(weight), bias, residual, out, **settings)


def others(dtype: torch.dtype) -> Iterator[tuple[str, object]]:
    """The mean, the resizing, and what no published network has: dilation, ReLU, other filters, views of odd strides,
    widths of odd numbers."""
    from mvit_kernels.backends.triton import convolution, depthwise_convolution, mean, resize

    def t(*shape: int) -> torch.Tensor:
        return rows_of(*shape, dtype=dtype)

    yield "mean", mean.launch(t(256, 8, 8, 640), t(256, 1, 1, 640))
    yield "mean", mean.launch(t(256, 9, 9, 640)[:, :7, :7], t(256, 1, 1, 640))
    yield "resize", resize.launch(t(64, 15, 15, 144), t(64, 16, 16, 144))
    more = {"dilation": 2, "activation": "relu"}
    x = t(64, 32, 32, 96)
    yield "3×3 dilated", convolution.launch(x, convolution.packed(t(64, 96, 3, 3)), None, None, x[..., :64], **more)
    yield "depthwise dilated", depthwise_convolution.launch(x, t(96, 1, 3, 3), None, x, **more)
    yield "1×1 odd", convolution.launch(t(64, 9, 9, 49)[:, :, :, 2:], t(65, 47, 1, 1), t(65), None, t(64, 9, 9, 65))


def of_stacks(dtype: torch.dtype) -> Iterator[tuple[str, object]]:
    """What a stack of s adds to the operators' launches. Of one image, whose rows are few: the projection with the
    MLP's first half, its second half with the next layer's first product or, at the end, the convolution behind the
    last norm, into a part of a map; and for many rows that convolution with the norm alone."""
    from mvit_kernels.backends.triton import layer_norm_linear, projection_norm_linear

    def t(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
        return rows_of(*shape, dtype=of)

    for side, d, out in ((32, 144, 96), (16, 192, 128), (8, 240, 160)):
        rows, hidden, norm = t(1, side, side, d), t(1, side, side, 2 * d), (t(d), t(d))
        last = t(out, d), t(out, of=torch.float32)
        part = t(1, side, side, 2 * out)[..., out:]
        proj, fc2 = (rows, t(d, d), t(d), rows), (hidden, t(d, 2 * d), t(d), rows)
        first, following = (t(2 * d, d), t(2 * d), rows, hidden), (t(3 * d, d), t(3 * d), rows, t(1, side, side, 3 * d))
        yield f"s {d} few rows", projection_norm_linear.launch(*proj, *norm, *first, 1e-5, "silu")
        yield f"s {d} few rows", projection_norm_linear.launch(*fc2, *norm, *following, 1e-5)
        yield f"s {d} few rows", projection_norm_linear.launch(*fc2, *norm, *last, None, part, 1e-5, "silu")
        many, parts = t(256, side, side, d), t(256, side, side, 2 * out)[..., out:]
        vectors = t(256 * side * side, of=torch.float32)
        yield f"s {d} last norm", layer_norm_linear.launch(many, *norm, *last, parts, vectors, vectors, 1e-5, "silu")


def cases(target: int, sizes: tuple[str, ...] | None = None) -> Iterator[tuple[str, object]]:
    """(name, launch) of every layer of all sizes for 256 images in bfloat16, and of `others`; of s for one image too,
    and of its last layers in float16 and float32. Elsewhere than on ALL_SIZES_ON: s for 256 images, and `others`."""
    from mvit_kernels.backends.triton._launch import watching

    everything = target == ALL_SIZES_ON
    before = torch.get_float32_matmul_precision()
    try:
        with watching(target):
            for size in sizes or (SIZES if everything else ("s",)):
                for layer in layers(size):
                    for batch in BATCHES if size == "s" and everything else BATCHES[-1:]:
                        yield f"{size} {layer.name} ×{batch}", launch_of(layer, batch, torch.bfloat16)
            yield from others(torch.bfloat16)
            yield from of_stacks(torch.bfloat16)
            for dtype, precision in ((torch.float16, "highest"), (torch.float32, "high"), (torch.float32, "highest")):
                torch.set_float32_matmul_precision(precision)
                if dtype == torch.float16:
                    yield from of_stacks(dtype)
                for layer in layers("s")[-5:] if everything else layers("s")[-2:]:
                    yield f"s {layer.name} ×256", launch_of(layer, 256, dtype)
                yield from others(dtype) if everything else ()
    finally:
        torch.set_float32_matmul_precision(before)


def different(arch: int, sizes: tuple[str, ...] | None = None) -> list[tuple[dict[str, object], object]]:
    """One launch for each variant of each kernel, with the columns that are known before compiling."""
    found = {}
    for case, launch in cases(arch, sizes):
        row = describe(case, launch, arch)
        variant = tuple(None if t is None else t.dtype for t in launch.tensors)
        found.setdefault((row["kernel"], row["tile"], variant), (row, launch))
    return list(found.values())


def rows(arch: int, sizes: tuple[str, ...] | None, share: tuple[int, int] = (0, 1)) -> list[dict[str, object]]:
    """The table's rows of an architecture, every n-th from the i-th."""
    return [row | build(launch, arch) for row, launch in different(arch, sizes)[share[0] :: share[1]]]


def main() -> None:
    parser = table.parser(__doc__, ARCHITECTURES)
    parser.add_argument("--only", nargs="*", choices=SIZES)
    arguments = parser.parse_args()
    sizes = tuple(arguments.only or ()) or None
    with ProcessPoolExecutor(arguments.jobs) as pool:
        jobs = [pool.submit(rows, arch, sizes, (i, 8)) for arch in arguments.arch for i in range(8)]
        found = [row for job in jobs for row in job.result()]
    found.sort(key=lambda row: (row["kernel"], row["dtype"], row["case"], row["tile"], int(row["arch"])))
    table.publish(found, TABLE, COLUMNS, dry=arguments.dry)


if __name__ == "__main__":
    main()
