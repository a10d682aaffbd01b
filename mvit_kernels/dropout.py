# SPDX-License-Identifier: Apache-2.0
"""Dropout and drop-path of a transformer layer in training: probabilities, PyTorch's masks, and masks from a seed.

Example:
    >>> dropout = LayerDropout(projection=0.1, mlp=0.1)
    >>> (seed,) = draw_seeds(1, x.device)
    >>> factor = branch_factor(seed, MLP_BRANCH, x.shape, dropout.mlp, dropout.path2, (2, 2), True)

Plain PyTorch draws its masks as it runs and keeps them for backward (`dropped`). Kernels store no mask: they compute it
in forward, and again in backward, from a seed drawn by PyTorch's generator; `branch_factor` is the formula. So
``torch.manual_seed`` governs both, gradient checkpointing gets the same mask again, and a CUDA graph draws a new one at
each replay.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class LayerDropout(NamedTuple):
    """The dropout and drop-path probabilities of one layer, 0 by default. Published recipes use `projection` and `mlp`.

    Example:
        >>> dropout = LayerDropout(projection=0.1, mlp=0.1)

    Each is the probability of dropping, from 0 to 1; the operators raise ValueError for any other value.
    """

    attention: float = 0.0  # on the attention weights
    projection: float = 0.0  # after the out-projection
    activation: float = 0.0  # after SiLU
    mlp: float = 0.0  # after fc2
    path1: float = 0.0  # drop-path on the attention branch, as in timm: one draw per (image, patch position) sequence
    path2: float = 0.0  # drop-path on the MLP branch
    path_scale: bool = True  # drop-path divides what it keeps by the probability of keeping


# ------------------------------------------------------------------------------------------------- drawn by PyTorch


def dropped(
    branch: Tensor, probability: float, path: float, patch_size: tuple[int, int], path_scale: bool = True
) -> Tensor:
    """A residual branch after dropout and drop-path, with masks drawn by PyTorch.

    Args:
        branch: (B, H, W, d), of any floating dtype.
        probability: of dropping an element.
        path, patch_size, path_scale: as `probability`, `patch_size` and `scale_by_keep` of `drop_path`.

    Returns:
        (B, H, W, d), in the branch's dtype.
    """
    branch = F.dropout(branch, probability) if probability else branch
    return drop_path(branch, path, patch_size, path_scale)


def drop_path(x: Tensor, probability: float, patch_size: tuple[int, int], scale_by_keep: bool = True) -> Tensor:
    """Stochastic depth (Huang et al. 2016, arXiv:1603.09382) of a residual branch on a token-major map, always live.

    Example:
        >>> rows = rows + drop_path(branch, 0.1, (2, 2))

    There is one draw per (image, patch position) sequence, as in timm, whose blocks have one batch entry per sequence.

    Args:
        x: (B, H, W, d), of any floating dtype.
        probability: of dropping a sequence's branch.
        patch_size: (ph, pw); H and W are multiples of it.
        scale_by_keep: divide what is kept by the probability of keeping.

    Returns:
        (B, H, W, d), in x's dtype; x itself where `probability` is 0.
    """
    if not probability:
        return x
    (b, h, w, d), (ph, pw), keep = x.shape, patch_size, 1.0 - probability
    mask = x.new_empty((b, 1, ph, 1, pw, 1))
    mask.bernoulli_(keep)
    if scale_by_keep and keep > 0.0:
        mask.div_(keep)
    return (x.reshape(b, h // ph, ph, w // pw, pw, d) * mask).reshape(b, h, w, d)


# ------------------------------------------------------------------------------------------------ computed from a seed

ATTENTION_BRANCH, MLP_BRANCH = 0, 1


def draw_seeds(count: int, device: torch.device) -> tuple[Tensor, ...]:
    """`count` seeds, each (2,) int64 and 16-byte aligned, drawn in one launch by PyTorch's generator of the device."""
    return torch.randint(2**63 - 1, (count, 2), device=device).unbind(0)


def philox(key: Tensor, counter: tuple[Tensor | int, ...]) -> tuple[Tensor, ...]:
    """Philox-4x32-10: four random 32-bit numbers from a 64-bit key and four 32-bit counters, all held in int64.

    Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3.3.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key & 0xFFFFFFFF, (key >> 32) & 0xFFFFFFFF
    for _ in range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # all 64 bits are right, though the top one is read as a sign
        c0, c1 = ((b >> 32) & 0xFFFFFFFF) ^ c1 ^ k0, b & 0xFFFFFFFF
        c2, c3 = ((a >> 32) & 0xFFFFFFFF) ^ c3 ^ k1, a & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3  # type: ignore[return-value] # tensors: the key is one


def threshold(probability: float) -> int:
    """The smallest 32-bit random number that is kept: smaller ones are dropped."""
    return min(round(probability * 2**32), 2**32 - 1)


def keep_scale(probability: float) -> float:
    """The factor that keeps the mean: 1 / (1 − probability), or 0 where nothing is kept."""
    return 1 / (1 - probability) if probability < 1 else 0.0


def branch_factor(
    seed: Tensor,
    branch: int,
    shape: tuple[int, ...],
    probability: float,
    path: float,
    patch_size: tuple[int, int],
    path_scale: bool,
) -> Tensor:
    """The factor, in float64, by which dropout (`probability`) and drop-path (`path`) multiply a residual branch.

    seed[0] is Philox's key, seed[1] the upper half of its counter. The lower half is (channel // 4, token) for four
    adjacent channels of a token, and (2³¹, sequence) for an (image, patch position) sequence; bit 30 of its first word
    is `branch`. The result does not depend on how a kernel tiles the map.

    Args:
        seed: (2,) int64, from `draw_seeds`.
        branch: `ATTENTION_BRANCH` or `MLP_BRANCH`.
        shape: (B, H, W, d), the branch's.
        probability: of dropping an element.
        path: of dropping a sequence.
        patch_size: (ph, pw); H and W are multiples of it.
        path_scale: drop-path divides what it keeps by the probability of keeping.

    Returns:
        A tensor of `shape` on the seed's device.
    """
    (b, h, w, d), (ph, pw), device = shape, patch_size, seed.device
    high = (seed[1] & 0xFFFFFFFF, (seed[1] >> 32) & 0xFFFFFFFF)
    factor = torch.ones(shape, dtype=torch.float64, device=device)
    if probability:
        fours = torch.arange(-(-d // 4), device=device) + (branch << 30)
        tokens = torch.arange(b * h * w, device=device).unsqueeze(1)
        numbers = torch.stack(philox(seed[0], (fours, tokens, *high)), -1).flatten(1)[:, :d].reshape(shape)
        factor = factor * (numbers >= threshold(probability)) * keep_scale(probability)
    if path:
        i, j = torch.arange(h, device=device) % ph, torch.arange(w, device=device) % pw
        images = torch.arange(b, device=device)[:, None, None]
        sequences = images * (ph * pw) + i[:, None] * pw + j
        kept = philox(seed[0], ((2 + branch) << 30, sequences, *high))[0] >= threshold(path)
        factor = factor * kept.unsqueeze(-1) * (keep_scale(path) if path_scale else 1.0)
    return factor
