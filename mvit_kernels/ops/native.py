# SPDX-License-Identifier: Apache-2.0
"""Fakes of the raw operators with a single backend and no public function: those that frozen networks run on the CPU
(`mvit_kernels.freezing.network`), a LayerNorm in backward there, and the launches behind ``transformer.cuda`` and
``inverted_residual.cuda``."""

from __future__ import annotations

import torch

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


@register_native_fake("pack_network.cpu")
def _pack_network(program, weights):
    # How long they are depends on the program's words and the processor.
    words, size = torch.library.get_ctx().new_dynamic_size(), torch.library.get_ctx().new_dynamic_size()
    return program.new_empty(words), weights.new_empty(size)


@register_native_fake("transformer_packed.cuda")
def _transformer_packed(x, packed, *settings_and_out):
    return None


@register_native_fake("inverted_residual_packed.cuda")
def _inverted_residual_packed(x, packed, version, hidden_features, stride, residual, half_filter, out):
    return None
