"""What attention's kernels, forward and backward, share: which program has which tile, and the keys that its rows see."""

import triton
import triton.language as tl


@triton.jit
def tile_of_attention(
    tiles,  # int32, how many of a head
    heads,  # int32, how many of a batch row
):  # fmt: skip
    """This program's tile, head (int64), and what remains: all along the grid's first axis, for CUDA ends the others at 65535."""
    program = tl.program_id(0)
    return program % tiles, (program // tiles % heads).to(tl.int64), program // tiles // heads


@triton.jit
def intervals(
    bounds,  # int32, of rows that lie 2 * PAIRS apart
    at_bounds,  # int64 [BLOCK_M], where the rows' are
    pair,  # which of PAIRS
    real,  # bool [BLOCK_M], False for rows past the last
    length,  # S
    PAIRS: tl.constexpr,
):  # fmt: skip
    """The keys that rows see by one pair of their bounds, each from a start (inclusive) to a stop (exclusive): each row's, int32
    [BLOCK_M]; from the first to the last that any row sees; and those that every row sees.
    """
    if PAIRS > 0:
        start = tl.load(bounds + at_bounds + 2 * pair, mask=real, other=0)
        stop = tl.load(bounds + at_bounds + 2 * pair + 1, mask=real, other=0)
        some = start < stop
        first = tl.min(tl.where(some, start, length), 0)
        last = tl.max(tl.where(some, stop, 0), 0)
        inner_first = tl.max(tl.where(real, start, 0), 0)
        inner_last = tl.min(tl.where(real, stop, length), 0)
    else:
        start = tl.zeros(real.shape, tl.int32)
        stop = tl.zeros(real.shape, tl.int32) + length
        first = 0
        last = length
        inner_first = 0
        inner_last = length
    return start, stop, first, last, inner_first, inner_last


def bounds_stride(bounds) -> int:
    """How far one batch row's bounds are from the next: 0 where one row serves all."""
    return 0 if bounds is None or bounds.shape[0] == 1 else bounds.shape[1] * bounds.shape[2]


def refuse(dense) -> str | None:
    """Why no kernel takes the call, or None."""
    return None if dense is None else "it takes masks as key intervals only, not as a boolean array"
