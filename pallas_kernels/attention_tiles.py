"""What attention's forward and backward share: how rows and keys are laid out and cut, and which tiles of keys a tile of rows sees.

A kv head's G query heads are the rows of one matrix [M, H], M = G * T, row g * T + t, so that a key is read once for all of them.
Arrays are taken head by head, [B, heads, length, H], or [B, heads, H, length] (`keys_last`). That transposition is no copy inside
a jitted model: XLA gives a projection, a rotation and a cache in a loop's carry this layout from the start. Blocks of [B, T, N, H]
as it lies would hold 8 heads' rows interleaved, and separating them in VMEM takes 12 vector operations a register; [B, T, N * H] is
another tiling of memory, for which XLA copies a cache whole at every step.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from dlm_kernels.pallas_kernels import chips
from dlm_kernels.pallas_kernels.chips import LANES

LOG2_E = math.log2(math.e)
MOST_TILES = 250_000  # of a schedule: a core has 1 MiB of scalar memory, and the compiler takes some of it
DEAD, EDGE, WHOLE = 0, 1, 2  # of a tile of keys: no row sees any of it; some row does not see all of it; every row sees all


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How a call is cut. A grid step takes `rows` rows and `keys` keys of each of `heads` kv heads, in parts of row_part rows and
    key_part keys, of `unrolled` heads at once.
    """

    heads: int
    rows: int
    keys: int
    row_part: int
    key_part: int
    unrolled: int
    # How many parts later than its products a part's weights are computed, and how many later still they are used.
    behind: tuple[int, int]
    # A part's logits are [keys, rows]: the maximum over keys then runs down the sublanes, without the cross-lane unit. Few rows
    # would leave most lanes empty: then they are [rows, keys].
    keys_first: bool
    # Blocks of keys and values are [H, keys], and so are those of rows where keys_first: `keys_last`.
    keys_last: bool

    @property
    def rows_last(self):
        return self.keys_last and self.keys_first


def keys_last(head_size):
    """Whether arrays are taken as [B, heads, H, length].

    As [B, heads, length, H] a head size below the lanes would be padded to them in HBM. XLA has such arrays in the other layout
    from the start, and would copy them around the kernel. In a cache of that layout it is writing a block that takes longer.
    """
    return head_size < LANES and head_size % 16 == 0


def most(total, fits):
    """The largest divisor of `total` that fits; 1 always does."""
    return max(n for n in range(1, total + 1) if total % n == 0 and (n == 1 or fits(n)))


def part(tile):
    return next((size for size in (256, LANES) if tile % size == 0), tile)


def visit(tiles, *stages):
    """Runs three stages on every part of a step: stage(head, row, at, *what the stage before returned), row and at from the tile's
    first.

    The stages of several parts alternate, so that the compiler has products for the matrix units while the vector units are busy
    with another part's weights, and the other way round. A row's parts follow one another, so that its results leave meanwhile too.
    """

    def some_heads(group, carry):
        parts = [
            (group * tiles.unrolled + head, row, at)
            for row in range(0, tiles.rows, tiles.row_part)
            for at in range(0, tiles.keys, tiles.key_part)
            for head in range(tiles.unrolled)
        ]
        results = dict.fromkeys(range(len(parts)), ())
        delays = 0, tiles.behind[0], sum(tiles.behind)
        for i in range(len(parts) + delays[-1]):
            for stage, delay in zip(stages, delays):
                if i - delay in results:
                    results[i - delay] = stage(*parts[i - delay], *results[i - delay])
        return carry

    jax.lax.fori_loop(0, tiles.heads // tiles.unrolled, some_heads, 0)


def by_head(array, kv_heads, length_last):
    """[B, T, N, H] -> [B, K, N / K * T, H], or [B, K, H, N / K * T] if length_last."""
    b, t, n, h = array.shape
    array = jnp.swapaxes(array, 1, 2).reshape(b, kv_heads, n // kv_heads * t, h)
    return jnp.swapaxes(array, 2, 3) if length_last else array


def from_head(array, heads, length_last):
    """What `by_head` takes, from what it gives."""
    array = jnp.swapaxes(array, 2, 3) if length_last else array
    b, k, m, h = array.shape
    return jnp.swapaxes(array.reshape(b, heads, k * m // heads, h), 1, 2)


def shape(length, head_size, length_last):
    return (head_size, length) if length_last else (length, head_size)


def spec(heads, length, head_size, index, length_last):
    """Of a block of `length` rows or keys of so many heads; index: the grid's place -> its batch row, heads and place in length."""

    def place(*at):
        b, g, i = index(*at)
        return b, g, *shape(i, 0, length_last)

    return pl.BlockSpec((1, heads, *shape(length, head_size, length_last)), place)


def part_of(block, head, start, size, length_last):
    at = slice(start, start + size)
    return block[0, head, :, at] if length_last else block[0, head, at]


def row_bounds(bounds, groups, queries, keys, tile):
    """int32 [1|B, row tiles, tile, 2|4]: the interval ends of each row; rows past the last are as the last."""
    if bounds is None:
        start = jnp.zeros((1, queries, 1), jnp.int32)
        bounds = jnp.concatenate([start, start + keys], axis=-1)
    rows = jnp.tile(bounds, (1, groups, 1))
    padding = chips.round_up(rows.shape[1], tile) - rows.shape[1]
    rows = jnp.pad(rows, ((0, 0), (0, padding), (0, 0)), mode="edge")
    return rows.reshape(rows.shape[0], -1, tile, rows.shape[-1])


def kinds(ends, keys, tile):
    """int32 [1|B, row tiles, key tiles]: DEAD, EDGE or WHOLE. ends: as `row_bounds` gives them; tile: of keys."""
    first = jnp.arange(pl.cdiv(keys, tile), dtype=jnp.int32) * tile
    inside = jnp.clip(ends[..., None] - first, 0, tile)
    seen = (inside[..., 1::2, :] - inside[..., ::2, :]).sum(-2)  # [1|B, row tiles, rows, key tiles]
    return jnp.where((seen == tile).all(2), WHOLE, jnp.where((seen > 0).any(2), EDGE, DEAD))


def entry_of(tile, kind):
    """A tile's index and its kind in one number of a schedule."""
    return tile * 4 + kind


def tile_of(entry):
    return entry >> 2


def kind_of(entry):
    return entry & 3


def schedule(kind):
    """int32 [rows of `kind` * tiles]: for each of `kind`'s rows the tiles to visit, as `entry_of` has them.

    kind: int32 [..., tiles]. Live tiles come first, in order; then the last of them is repeated, as DEAD, so that nothing is
    fetched for it.
    """
    tile = jnp.arange(kind.shape[-1], dtype=jnp.int32)
    live = kind != DEAD
    place = jnp.where(live, jnp.cumsum(live, axis=-1) - 1, -1)
    entry = jnp.where(place[..., None, :] == tile[:, None], entry_of(tile, kind)[..., None, :], -1).max(-1)
    last = jnp.where(live, tile, 0).max(-1, keepdims=True)
    return jnp.where(entry < 0, entry_of(last, DEAD), entry).astype(jnp.int32).reshape(-1)


def refuse_schedule(tiles, bounds, rows, keys):
    """Why a kernel cannot visit the tiles of so many rows and keys, or None."""
    if bounds is None and keys % tiles.keys == 0:
        return None
    count = (1 if bounds is None else len(bounds)) * pl.cdiv(rows, tiles.rows) * pl.cdiv(keys, tiles.keys)
    return f"its schedule has {count} tiles, and scalar memory holds {MOST_TILES}" if count > MOST_TILES else None


def visible(ends, first, shape, keys_axis):
    """bool `shape`: which keys, `first` and those after it along keys_axis, each row sees.

    ends: int32 [1, rows] or [rows, 1] each: start (inclusive), stop (exclusive), perhaps twice.
    """
    key = first + jax.lax.broadcasted_iota(jnp.int32, shape, keys_axis)
    seen = (key >= ends[0]) & (key < ends[1])
    if len(ends) == 4:
        seen |= (key >= ends[2]) & (key < ends[3])
    return seen


def kept(array, seen, keys_axis, keys_last):
    """array [keys, H], or [H, keys] if keys_last, with zeros for keys that no row sees: zero times their NaN would be NaN.

    seen: as `visible` gives it.
    """
    some = jnp.where(seen, 1.0, 0.0).max(1 - keys_axis, keepdims=True)
    if keys_axis == 1 and not keys_last:
        some = jnp.broadcast_to(some, (LANES, some.size)).T[:, :1]
    elif keys_axis == 0 and keys_last:
        some = jnp.broadcast_to(some, (some.size, LANES)).T[:1]
    return jnp.where(some > 0, array.astype(jnp.float32), 0.0).astype(array.dtype)
