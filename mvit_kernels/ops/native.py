# SPDX-License-Identifier: Apache-2.0
"""Fakes of the raw operators with a single backend and no public function: those that frozen networks run on the CPU
(`mvit_kernels.freezing.network`), a LayerNorm in backward there, and the launch behind ``transformer.cuda``."""

from __future__ import annotations

import torch

from ..backends import cpu
from ..backends.library import register_native_fake


@register_native_fake("layer_norm_from_statistics.cpu")
def _layer_norm_from_statistics(x, mean, rstd, norm_weight, norm_bias):
    return x.new_empty(x.shape)


@register_native_fake("network.cpu")
def _network(x, weights, program, out_channels, halvings):
    b, _, h, w = x.shape
    return x.new_empty((b, _halved(h, halvings), _halved(w, halvings), out_channels))


def _halved(side, times):
    return (side - 1) // 2**times + 1


@register_native_fake("pack_convolution.cpu")
def _pack_convolution(weight, bias):
    out, width, kernel, _ = weight.shape
    if _on_tiles(weight):
        panels = _tiles(out, kernel if width <= 4 else kernel * kernel * _steps(width))
    else:
        panels = _panels(weight, out, kernel * kernel * width)
    return weight.new_empty(panels + _vector(out), dtype=torch.uint8)


@register_native_fake("pack_inverted_residual.cpu")
def _pack_inverted_residual(expand, expand_bias, depthwise, depthwise_bias, project, project_bias):
    hidden, width, out = expand.shape[0], expand.shape[1], project.shape[0]
    if _on_tiles(expand):
        panels = _tiles(_steps(hidden) * 32, _steps(width)) + _tiles(out, _steps(hidden))
        hidden = _steps(hidden) * 32
    else:
        panels = _panels(expand, hidden, width) + _panels(project, out, hidden)
    taps = _aligned(9 * 4 * _whole_vectors(hidden))
    return expand.new_empty(panels + taps + 2 * _vector(hidden) + _vector(out), dtype=torch.uint8)


@register_native_fake("pack_matrix.cpu")
def _pack_matrix(weight, parts):
    rows, width = weight.shape
    if _on_tiles(weight):
        return weight.new_empty(parts * _tiles(rows // parts, _steps(width)), dtype=torch.uint8)
    return weight.new_empty(rows * width * weight.element_size(), dtype=torch.uint8)


# Bytes, as csrc/cpu/convolution_kernel.cpp, inverted_residual_kernel.cpp, tile_pixels.h and tile_weights.h count them:
# parts start on multiples of 64.


def _on_tiles(weight):
    return weight.dtype == torch.bfloat16 and cpu.multiplies_on_tiles()


def _tiles(columns, steps):
    """Bytes of a matrix for tiles: 1 KB for 16 columns and a step of 32."""
    return 1024 * ((columns + 15) // 16) * steps


def _steps(depth):
    return (depth + 31) // 32


def _panels(weight, columns, depth):
    """Bytes of a matrix: four an element, which is a float32 number or a pair of bfloat16."""
    rows = (depth + 1) // 2 if weight.dtype == torch.bfloat16 else depth
    return _aligned(4 * _whole_vectors(columns) * rows)


def _vector(size):
    return _aligned(4 * _whole_vectors(size))


def _whole_vectors(count):
    lanes = cpu.vector_lanes()
    return (count + lanes - 1) // lanes * lanes


def _aligned(size):
    return (size + 63) // 64 * 64


@register_native_fake("transformer_packed.cuda")
def _transformer_packed(x, packed, *settings):
    return x.new_empty(x.shape)
