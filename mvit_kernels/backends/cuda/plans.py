# SPDX-License-Identifier: Apache-2.0
"""How launches are cut: literal tables, and what follows from shape and GPU.

The numbers come from arithmetic (instruction counts, shared memory, bytes). Whether one launch is used for a stack at
all is decided by measurements: `mvit_kernels.backends.preference`.
"""

from __future__ import annotations

from typing import NamedTuple

WIDTHS = (64, 80, 96, 120, 144, 192, 240)
SHORT_HEAD = 8  # Kornia's head dim; in the other models it is a quarter of the width
MOST_WARPS = 8  # in a block, at up to 255 registers a thread
# Warps of 32 rows read weights from shared memory half as often as warps of 16, and up to this width registers suffice.
WIDEST_FOR_32_ROWS = 192
HIDDEN_CHUNK = 32
MOST_SLOT = 64 * 1024  # bytes of weights copied at once; what is longer is not there when it is needed

# Shapes of inverted residuals that have a kernel, (channels in, channels out, stride), with the least shared memory, in
# bytes, that its block needs: kInvertedResiduals in csrc/cuda/inverted_residual.h has their tiles, and a test compares.
INVERTED_RESIDUALS = {
    (16, 16, 1): 43968,
    (16, 32, 1): 46016,
    (16, 24, 2): 73728,
    (24, 24, 1): 57792,
    (24, 48, 2): 97280,
    (32, 48, 2): 97280,
    (32, 64, 2): 99328,
    (48, 48, 1): 94400,
    (48, 64, 2): 70848,
    (64, 64, 1): 69504,
    (64, 80, 2): 84672,
    (64, 96, 2): 86720,
    (80, 96, 2): 98496,
    (96, 128, 2): 74624,
    (128, 160, 2): 93056,
}

# Those of which the kernels that filter in float16 are compiled as well; has_half_filter in that file is the same.
HALF_FILTERS = frozenset(shape for shape in INVERTED_RESIDUALS if shape[2] == 1 or shape[0] <= 32)


class Layout:
    """Sizes of the packed weights and of shared memory; TransformerLayout in csrc/cuda/transformer.h is its twin."""

    def __init__(self, width: int, head_dim: int) -> None:
        self.width, self.head_dim = width, head_dim
        self.tiles = -(-width // 16)
        self.padded = 16 * self.tiles
        self.head = -(-head_dim // 8) * 8
        self.mlp_chunk = 4 * self.padded * HIDDEN_CHUNK + 8 * HIDDEN_CHUNK
        most = max(self.mlp_chunk, 24576)
        self.kv_parts = self._parts(lambda parts: self.padded // parts * 4 * self.head + 16 * self.head, most)
        self.kv_chunk = self.padded // self.kv_parts * 4 * self.head + 16 * self.head
        self.q_chunk = self.padded * self.head * 2 + 8 * self.head
        proj_tile = 4 * self.head * 32 + 64
        self.proj_parts = self._parts(lambda parts: self.tiles // parts * proj_tile, most)
        self.proj_chunk = self.tiles // self.proj_parts * proj_tile

        joint = self.kv_parts == 1 and self.kv_chunk + self.q_chunk <= 26624
        head_chunk = self.kv_chunk + (self.q_chunk if joint else 0)
        slot = max(self.mlp_chunk, head_chunk, self.q_chunk, self.proj_chunk)
        self.least_slot = -(-slot // 128) * 128

    def shared_bytes(self, rows: int, slot: int = 0) -> int:
        """The shared memory, in bytes, of a block with that many rows: the rows, their means and deviations, keys and
        values of one head, and two slots for chunks of weights, the least or of `slot` bytes."""
        value_stride = 16 * (self.head // 8 | 1)
        return rows * (2 * self.padded + 8 + 2 * self.head + value_stride) + 2 * (slot or self.least_slot)

    def largest_slot(self, rows: int, shared_bytes: int) -> int:
        """The bytes of a slot that are of use beside that many rows: of several chunks of the MLP, of all parts of key
        and value or of the out-projection, which are one barrier instead of many."""
        most = min(MOST_SLOT, self.least_slot + (shared_bytes - self.shared_bytes(rows)) // 2)
        mlp = most // self.mlp_chunk * self.mlp_chunk
        sizes = (mlp, self.kv_parts * self.kv_chunk, self.proj_parts * self.proj_chunk)
        largest = max((size for size in sizes if size <= most // 128 * 128), default=0)
        return max(self.least_slot, -(-largest // 128) * 128)

    def _parts(self, chunk, most: int) -> int:
        return next(p for p in range(1, self.tiles + 1) if self.tiles % p == 0 and chunk(p) <= most)

    def packed_bytes(self, layers: int, hidden: int) -> int:
        """The size in bytes of all packed weights of a stack."""
        layer = 4 * (self.kv_parts * self.kv_chunk + self.q_chunk) + self.proj_parts * self.proj_chunk
        layer += -(-hidden // HIDDEN_CHUNK) * self.mlp_chunk
        return layers * layer + (layers + 2) * self.padded * 4


class TransformerPlan(NamedTuple):
    """How many tiles of 16 rows a warp has, all of one sequence, how many sequences a block has, and how many bytes of
    weights are copied at once (twice of them lie in shared memory)."""

    tiles: int
    sequences_of_a_block: int
    slot: int


def is_compiled(width: int, head_dim: int) -> bool:
    """Whether there are kernels for rows and heads of these widths."""
    return width in WIDTHS and head_dim in (width // 4, SHORT_HEAD)


def plan_transformer(
    width: int, head_dim: int, tokens: int, sequences: int, processors: int, shared_bytes: int
) -> TransformerPlan | str:
    """The plan of the one-launch transformer, or why there is none.

    Args:
        width, head_dim: elements of a row, and of a head.
        tokens: of a sequence.
        sequences: of the call.
        processors: multiprocessors of the GPU.
        shared_bytes: of shared memory that a block may have.
    """
    if width not in WIDTHS:
        return f"rows of {width} are not supported; {', '.join(map(str, WIDTHS))} are"
    if not is_compiled(width, head_dim):
        return f"heads of {head_dim} are not supported for rows of {width}; {width // 4} and {SHORT_HEAD} are"
    wide = width > WIDEST_FOR_32_ROWS
    tiles = 1 if wide or (tokens <= 16 and head_dim != SHORT_HEAD) else 2
    warps = max(1, -(-tokens // (16 * tiles)))
    if warps > MOST_WARPS:
        return (
            f"sequences of {tokens} tokens are too long for one launch; up to {16 * tiles * MOST_WARPS} tokens are "
            f"supported for rows of {width}"
        )
    layout = Layout(width, head_dim)
    most = MOST_WARPS // warps
    while most and layout.shared_bytes(most * warps * 16 * tiles) > shared_bytes:
        most -= 1
    if most == 0:
        return (
            f"a sequence of {tokens} tokens needs {layout.shared_bytes(warps * 16 * tiles)} bytes of shared memory; "
            f"this GPU has {shared_bytes} per block"
        )
    # Not so many sequences a block that multiprocessors are left idle.
    of_a_block = max(1, min(most, -(-sequences // processors)))
    slot = layout.largest_slot(of_a_block * warps * 16 * tiles, shared_bytes)
    return TransformerPlan(tiles, of_a_block, slot)
