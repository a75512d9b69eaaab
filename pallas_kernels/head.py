"""What the LM head's scores and its losses share: the tiles of hidden rows and of the weight, and their products."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from dlm_kernels.pallas_kernels import chips
from dlm_kernels.pallas_kernels.chips import LANES

MOST_ROWS, MOST_COLUMNS = 1024, 1024
PART = 256  # rows multiplied at a time, for the code of a product grows with its rows
# Of a tile of the weight: a step must outlast what starting it and a copy costs.
TILE_BYTES, STREAMED_TILE_BYTES = 4 * chips.MIB, 6 * chips.MIB


def tiles(r, v, d, itemsize, row_bytes, column_bytes, tile_bytes=TILE_BYTES, beside=(), least=1):
    """(rows, columns): hidden rows held at a time and rows of the weight in a tile, as many as the chip's VMEM holds.

    row_bytes, column_bytes: what a kernel keeps for each element of a hidden row, and of a row of the weight.
    beside: (d, row_bytes, column_bytes) of each other head that goes through in the same tiles.
    least: tiles of rows that there are to be, where each can have as many rows as are multiplied at a time.
    """
    heads = [(d, row_bytes, column_bytes), *beside]
    depth, wide = sum(chips.round_up(width, LANES) for width, *_ in heads), chips.chip().mxu
    columns = tile_bytes // (depth * itemsize) // wide * wide
    columns = chips.tile(v, min(max(columns, wide), MOST_COLUMNS), wide)

    def split(count):
        """Rows of each of `count` tiles, a multiple of what is multiplied at a time."""
        rows = pl.cdiv(r, count)
        parts = pl.cdiv(rows, PART)
        return parts * chips.round_up(pl.cdiv(rows, parts), 16)

    def fits(rows):
        # Besides the two: the logits, and up to seven statistics twice.
        return _bytes(heads, rows, columns) + 4 * rows * (len(heads) * columns + 14 * LANES) <= chips.chip().budget

    count = max(pl.cdiv(r, MOST_ROWS), min(least, r // PART))
    while not fits(split(count)) and split(count) > 16:
        count += 1
    return split(count), columns


def streamed(itemsize, *beside):
    """row_bytes, column_bytes, tile_bytes and `beside` where hidden rows stay and the weight goes by: one block, and two.

    beside: the width of each other head.
    """
    return itemsize, 2 * itemsize, STREAMED_TILE_BYTES, [(width, itemsize, 2 * itemsize) for width in beside]


def resident(shape, index):
    """A block that stays for many steps: a second one, for the next to be copied meanwhile, would take VMEM and save little."""
    return pl.BlockSpec(shape, index, pipeline_mode=pl.Buffered(1))


def _bytes(heads, rows, columns):
    """Of so many rows of hidden states and of the weight, of all heads."""
    return sum(
        chips.round_up(width, LANES) * (rows * row_bytes + columns * column_bytes) for width, row_bytes, column_bytes in heads
    )


def refuse(weight, row_bytes, column_bytes, tile_bytes=TILE_BYTES, beside=()):
    """Why no kernel takes this weight, or None."""
    v, d = weight.shape
    rows, columns = tiles(1, v, d, weight.dtype.itemsize, row_bytes, column_bytes, tile_bytes, beside)
    if _bytes([(d, row_bytes, column_bytes), *beside], rows, columns) > chips.chip().budget:
        return f"VMEM holds no {columns} rows of a weight of width {d}" + "".join(f" and of one of {e}" for e, *_ in beside)
    return None


def slices(rows, size, body):
    """body(part) for slices of `size` that make up `rows`."""
    if size == rows:
        body(pl.ds(0, size))
        return

    def step(i, carry):
        body(pl.ds(pl.multiple_of(i * size, size), size))
        return carry

    jax.lax.fori_loop(0, rows // size, step, 0)


def over_parts(rows, body):
    """body(part) for slices of at most PART that make up `rows`."""
    slices(rows, rows // pl.cdiv(rows, PART), body)


def products(
    hidden,  # [ROWS, D]
    weight,  # [COLUMNS, D]
    out,  # float32 [ROWS, COLUMNS]
):
    def product(part):
        out[part, :] = chips.dot(hidden[part, :], weight[...], (1, 1))

    over_parts(hidden.shape[0], product)


def live(active, r, rows):
    """int32 [row tiles]: 0 where no row of the tile is active (bool [R] or None)."""
    row_tiles = pl.cdiv(r, rows)
    if active is None:
        return jnp.ones(row_tiles, jnp.int32)
    return jnp.pad(active, (0, row_tiles * rows - r)).reshape(row_tiles, rows).any(axis=1).astype(jnp.int32)
