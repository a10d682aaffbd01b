# SPDX-License-Identifier: Apache-2.0
"""The schema of every raw operator, the weights in them, and the loading of the compiled libraries.

A raw operator is named ``mvit_kernels::<operator>.<backend>``: one overload per backend, all with one schema. So an
operator has the same name in Python, C++, CUDA and Triton, and several backends can serve one device. Backends only
*implement* these schemas (C++ through LibTorch's stable ABI: ``m.impl("patch_attention.cpu", ...)``). The shapes of the
results come from the one fake of each schema, registered by the operator's file in ``ops/``.

What a forward operator returns beside its result (``mean``, ``rstd``, ``logsumexp``) is what its backward needs.
Statistics are float32, or float64 for float64 inputs.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .building import PACKAGE, how_to_build, why_not_built

BACKENDS = ("reference", "cpu", "triton", "cuda")

SCHEMAS = {
    # LayerNorm over the last axis; mean and rstd have the shape of x without its last axis
    "layer_norm": "(Tensor x, Tensor norm_weight, Tensor norm_bias, float eps) -> (Tensor out, Tensor mean, "
    "Tensor rstd)",
    "layer_norm_backward": "(Tensor grad_out, Tensor x, Tensor mean, Tensor rstd, Tensor norm_weight) -> "
    "(Tensor grad_x, Tensor grad_norm_weight, Tensor grad_norm_bias)",
    # act(BN(x)) by the statistics of the batch, x (N, C, H, W); activation is "" or "silu"; mean, rstd and the unbiased
    # variance, for the running statistics, are (C,)
    "batch_norm_activation": "(Tensor x, Tensor weight, Tensor bias, float eps, str activation) -> (Tensor out, "
    "Tensor mean, Tensor rstd, Tensor variance)",
    "batch_norm_activation_backward": "(Tensor grad_out, Tensor x, Tensor mean, Tensor rstd, Tensor weight, "
    "Tensor bias, str activation) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
    # act(LN(x) Wᵀ + b); activation is "" or "silu"; mean and rstd have the shape of x without its last axis
    "layer_norm_linear": "(Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor weight, Tensor? bias, float eps, "
    "str activation) -> (Tensor out, Tensor mean, Tensor rstd)",
    "layer_norm_linear_backward": "(Tensor grad_out, Tensor x, Tensor mean, Tensor rstd, Tensor norm_weight, "
    "Tensor norm_bias, Tensor weight, Tensor? bias, str activation) -> (Tensor grad_x, Tensor grad_norm_weight, "
    "Tensor grad_norm_bias, Tensor grad_weight, Tensor grad_bias)",
    # qkv (B, H, W, 3·inner) -> out (B, H, W, inner); logsumexp (B, ph·pw, heads, N) of the scaled scores
    "patch_attention": "(Tensor qkv, int num_heads, int[2] patch_size, float scale) -> (Tensor out, Tensor logsumexp)",
    "patch_attention_backward": "(Tensor grad_out, Tensor qkv, Tensor out, Tensor logsumexp, int num_heads, "
    "int[2] patch_size, float scale) -> Tensor",
    # residual + x Wᵀ + b; the gradient of the residual is grad_out itself
    "linear_residual": "(Tensor x, Tensor weight, Tensor? bias, Tensor residual) -> Tensor",
    "linear_residual_backward": "(Tensor grad_out, Tensor x, Tensor weight) -> (Tensor grad_x, Tensor grad_weight, "
    "Tensor grad_bias)",
    # x + fc2(silu(fc1(LN(x))))
    "layer_norm_mlp": "(Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor fc1_weight, Tensor fc1_bias, "
    "Tensor fc2_weight, Tensor fc2_bias, float eps) -> (Tensor out, Tensor mean, Tensor rstd)",
    "layer_norm_mlp_backward": "(Tensor grad_out, Tensor x, Tensor mean, Tensor rstd, Tensor norm_weight, "
    "Tensor norm_bias, Tensor fc1_weight, Tensor fc1_bias, Tensor fc2_weight) -> (Tensor grad_x, "
    "Tensor grad_norm_weight, Tensor grad_norm_bias, Tensor grad_fc1_weight, Tensor grad_fc1_bias, "
    "Tensor grad_fc2_weight, Tensor grad_fc2_bias)",
    # one pre-norm layer, x (B, H, W, d); dropout: the probabilities (projection, path1, mlp, path2) of `LayerDropout`.
    # Masks are a function of seed, two int64 numbers (see dropout.py), or None where all four are 0. It returns, beside
    # out, what backward needs; middle is the rows between attention and MLP. Backward recomputes qkv, which would be
    # half of what is kept
    "transformer_layer": "(Tensor x, Tensor norm1_weight, Tensor norm1_bias, Tensor qkv_weight, Tensor? qkv_bias, "
    "Tensor proj_weight, Tensor proj_bias, Tensor norm2_weight, Tensor norm2_bias, Tensor fc1_weight, Tensor fc1_bias, "
    "Tensor fc2_weight, Tensor fc2_bias, Tensor? seed, int num_heads, int[2] patch_size, float eps, float[4] dropout, "
    "bool path_scale) -> (Tensor out, Tensor mean1, Tensor rstd1, Tensor attended, Tensor logsumexp, "
    "Tensor middle, Tensor mean2, Tensor rstd2)",
    "transformer_layer_backward": "(Tensor grad_out, Tensor x, Tensor mean1, Tensor rstd1, Tensor attended, "
    "Tensor logsumexp, Tensor middle, Tensor mean2, Tensor rstd2, Tensor norm1_weight, Tensor norm1_bias, "
    "Tensor qkv_weight, Tensor? qkv_bias, Tensor proj_weight, Tensor norm2_weight, Tensor norm2_bias, "
    "Tensor fc1_weight, Tensor fc1_bias, Tensor fc2_weight, Tensor? seed, int num_heads, int[2] patch_size, float eps, "
    "float[4] dropout, bool path_scale) -> (Tensor grad_x, Tensor grad_norm1_weight, Tensor grad_norm1_bias, "
    "Tensor grad_qkv_weight, Tensor grad_qkv_bias, Tensor grad_proj_weight, Tensor grad_proj_bias, "
    "Tensor grad_norm2_weight, Tensor grad_norm2_bias, Tensor grad_fc1_weight, Tensor grad_fc1_bias, "
    "Tensor grad_fc2_weight, Tensor grad_fc2_bias)",
    # x (B, H, W, C); depthwise_weight (hidden, 1, 3, 3)
    "inverted_residual": "(Tensor x, Tensor expand_weight, Tensor expand_bias, Tensor depthwise_weight, "
    "Tensor depthwise_bias, Tensor project_weight, Tensor project_bias, int stride, int dilation, bool residual) "
    "-> Tensor",
    # weights: the TransformerLayerWeights of all layers, flattened (twelve a layer; zeros for an absent qkv bias)
    "transformer": "(Tensor x, Tensor[] weights, Tensor? final_norm_weight, Tensor? final_norm_bias, int num_heads, "
    "int[2] patch_size, float eps) -> Tensor",
}


class TransformerLayerWeights(NamedTuple):
    """The weights of one pre-norm transformer layer, as ``nn.Linear`` and ``nn.LayerNorm`` keep them.

    Example:
        >>> layer = TransformerLayerWeights(norm1.weight, norm1.bias, qkv.weight, qkv.bias, proj.weight, proj.bias,
        ...                                 norm2.weight, norm2.bias, fc1.weight, fc1.bias, fc2.weight, fc2.bias)

    The shapes below are for rows of width d, an MLP of width hidden, and ``inner = num_heads × head_dim`` (d in the
    paper, 32 in Kornia). Outside autocast, operators expect the linear layers' tensors in the dtype of x, and
    LayerNorm's in that or in float32.
    """

    norm1_weight: Tensor  # (d,)
    norm1_bias: Tensor  # (d,)
    qkv_weight: Tensor  # (3·inner, d): the rows of query, key and value
    qkv_bias: Tensor | None  # (3·inner,); None in Kornia
    proj_weight: Tensor  # (d, inner)
    proj_bias: Tensor  # (d,)
    norm2_weight: Tensor  # (d,)
    norm2_bias: Tensor  # (d,)
    fc1_weight: Tensor  # (hidden, d)
    fc1_bias: Tensor  # (hidden,)
    fc2_weight: Tensor  # (d, hidden)
    fc2_bias: Tensor  # (d,)


def flatten(
    layers: Sequence[TransformerLayerWeights], dtype: torch.dtype | None = None, zeros: bool = True
) -> list[Tensor]:
    """The weights as the raw operator takes them: one list, twelve tensors a layer.

    Args:
        layers: the weights of each layer.
        dtype: to cast the linear layers' tensors to, if given; LayerNorm's are never cast.
        zeros: replace an absent qkv bias by zeros, else by a tensor without elements.
    """
    flat = []
    for layer in layers:
        if layer.qkv_bias is None:
            size = layer.qkv_weight.shape[0] if zeros else 0
            layer = layer._replace(qkv_bias=layer.qkv_weight.new_zeros(size))
        for name, value in layer._asdict().items():
            flat.append(value if dtype is None or "norm" in name or value.dtype == dtype else value.to(dtype))
    return flat


LIBRARY = torch.library.Library("mvit_kernels", "FRAGMENT")
for _name, _schema in SCHEMAS.items():
    for _backend in BACKENDS:
        # Exact strides: Inductor must give a kernel the layout that was traced, channels-last maps above all.
        LIBRARY.define(
            f"{_name}.{_backend}{_schema}", tags=(torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag)
        )


# On the CPU a frozen model runs a list of steps with their packed weights, made by mvit_kernels.freezing.network, which
# has no other backend: x (B, C, H, W) -> (B, H', W', out_channels), each side halved `halvings` times, rounding up.
NATIVE_SCHEMAS = {
    # LayerNorm again in backward, for operators that are composed of PyTorch's products (backends/cpu/composed.py)
    "layer_norm_from_statistics.cpu": "(Tensor x, Tensor mean, Tensor rstd, Tensor norm_weight, Tensor norm_bias) "
    "-> Tensor",
    "network.cpu": "(Tensor x, Tensor weights, Tensor program, int out_channels, int halvings) -> Tensor",
    # a network as mvit_kernels.freezing.program stores it, for any processor -> program and weights for this one
    "pack_network.cpu": "(Tensor program, Tensor weights) -> (Tensor, Tensor)",
    # What `transformer.cuda` launches; mvit_kernels.backends.cuda.transformer packs the weights and makes the plan.
    # `out`, of this one and the next, may be part of a larger map.
    "transformer_packed.cuda": "(Tensor x, Tensor packed, int version, int num_layers, int head_dim, "
    "int hidden_features, bool final_norm, int[2] patch_size, float eps, int tiles, int sequences_of_a_block, "
    "int slot, Tensor(a!) out) -> ()",
    # What `inverted_residual.cuda` launches; mvit_kernels.backends.cuda.inverted_residual packs the weights.
    "inverted_residual_packed.cuda": "(Tensor x, Tensor packed, int version, int hidden_features, int stride, "
    "bool residual, bool half_filter, Tensor(a!) out) -> ()",
}
for _name, _schema in NATIVE_SCHEMAS.items():
    LIBRARY.define(_name + _schema, tags=(torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag))


def register_fake(name: str) -> Callable[[Callable], Callable]:
    """Register the decorated function as the fake of operator `name`, for all of its backends."""

    def register(function: Callable) -> Callable:
        for backend in BACKENDS:
            register_native_fake(f"{name}.{backend}")(function)
        return function

    return register


def register_native_fake(name: str) -> Callable[[Callable], Callable]:
    """Register the decorated function as the fake of the one raw operator ``mvit_kernels::<name>``."""

    def register(function: Callable) -> Callable:
        torch.library.register_fake(f"mvit_kernels::{name}", _on_one_device(name, function), lib=LIBRARY)
        return function

    return register


def _on_one_device(name: str, function: Callable) -> Callable:
    """The fake, which also checks that all tensors are on one device. A call that mixes meta tensors with others runs
    the fake too, and the tensor that it allocates on the other device would never be written."""

    @functools.wraps(function)
    def fake(*arguments):
        flat = [
            t for a in arguments for t in (a if isinstance(a, list | tuple) else (a,)) if isinstance(t, torch.Tensor)
        ]
        for other in flat[1:]:
            if other.device != flat[0].device:
                raise ValueError(
                    f"mvit_kernels::{name}: tensors are on {flat[0].device} and {other.device}; move all to one device "
                    "with .to(device)"
                )
        return function(*arguments)

    return fake


def register_reference(name: str) -> Callable[[Callable], Callable]:
    """Register the decorated function as ``mvit_kernels::<name>.reference``, for every device."""

    def register(function: Callable) -> Callable:
        LIBRARY.impl(f"{name}.reference", function, "CompositeExplicitAutograd")
        return function

    return register


def raw(name: str, backend: str) -> torch._ops.OpOverload:
    """The raw operator ``mvit_kernels::<name>.<backend>``.

    Raises:
        AttributeError: there is none of that name.
    """
    return getattr(getattr(torch.ops.mvit_kernels, name), backend)


# The variable selects another folder, such as that of a sanitizer build.
LIBRARY_DIRECTORY = Path(os.environ.get("MVIT_KERNELS_LIBRARIES") or PACKAGE / "lib")
loaded_paths: dict[str, Path] = {}  # backend -> its library, once loaded
_loaded: dict[str, str] = {}  # backend -> "" when its library is loaded, else why it could not be


def load(backend: str) -> str:
    """Load the compiled library of `backend` ("cpu" or "cuda"), once; return "", or why it cannot be used."""
    if backend not in _loaded:
        path = LIBRARY_DIRECTORY / f"libmvit_kernels_{backend}.so"
        if not path.exists():
            why = why_not_built(backend, LIBRARY_DIRECTORY)
            why = f"({why})" if why else f"(there is none in {LIBRARY_DIRECTORY})"
            _loaded[backend] = f"its library {path.name} was not built {why}; {how_to_build(backend)}"
        else:
            try:
                torch.ops.load_library(str(path))
                _loaded[backend] = ""
                loaded_paths[backend] = path
            except OSError as error:
                _loaded[backend] = f"its library {path} does not load: {error}"
    return _loaded[backend]
