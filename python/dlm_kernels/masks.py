"""Key intervals: every attention mask a diffusion language model uses, in one representation.

Full, padded, packed, block-causal, prefix or dual KV cache, sliding window and BD3-LM's training mask have in common that
the keys which one query sees form at most two runs. A mask here is those runs' ends, and all kernels implement just that.
All helpers are plain jax.numpy: they work under jit, and their array arguments may be traced. `dlm_kernels.torch.masks` runs them
with NumPy in its place, so they keep to what both have.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import cummax

from dlm_kernels.ops import checks, sharding


@functools.partial(jax.tree_util.register_dataclass, data_fields=["start", "stop", "start2", "stop2"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class KeyIntervals:
    """Query t of row b sees the keys in [start[b, t], stop[b, t]) and in [start2[b, t], stop2[b, t]).

        keys = jnp.arange(key_length)
        visible = (start[..., None] <= keys) & (keys < stop[..., None])
        visible |= (start2[..., None] <= keys) & (keys < stop2[..., None])

    int32 [B or 1, T] each; starts are inclusive, stops exclusive. start2 and stop2 come together or not at all. An interval
    with start >= stop is empty; ends outside the keys are clipped; a key in both intervals counts once. Ends may be torch tensors,
    for `dlm_kernels.torch`.
    """

    start: jax.Array
    stop: jax.Array
    start2: jax.Array | None = None
    stop2: jax.Array | None = None

    def as_boolean(self, key_length):
        """The same mask as bool [B or 1, 1, T, key_length], True where the query sees the key."""
        keys = self.start.new_ones(key_length).cumsum(0) - 1 if self._of_torch() else jnp.arange(key_length)
        visible = (self.start[..., None] <= keys) & (keys < self.stop[..., None])
        if self.start2 is not None:
            visible |= (self.start2[..., None] <= keys) & (keys < self.stop2[..., None])
        return visible[:, None]

    def __and__(self, other):
        """The keys that both masks show. Defined where `other` has one interval; more could need more than two runs."""
        if not isinstance(other, KeyIntervals):
            raise ValueError(f"mask & mask: expected KeyIntervals on both sides, got {type(other).__name__}")
        if other.start2 is not None:
            if self.start2 is not None:
                raise ValueError("mask & mask: expected a single interval on at least one side, got two on both")
            return other & self
        if self._of_torch() != other._of_torch():
            got = f"{type(self.start).__name__} and {type(other.start).__name__}"
            raise ValueError(f"mask & mask: expected torch tensors on both sides or on neither, got {got}")
        xp = type(self.start) if self._of_torch() else jnp
        start, stop = xp.maximum(self.start, other.start), xp.minimum(self.stop, other.stop)
        if self.start2 is None:
            return KeyIntervals(start, stop)
        return KeyIntervals(start, stop, xp.maximum(self.start2, other.start), xp.minimum(self.stop2, other.stop))

    def _of_torch(self):
        return hasattr(self.start, "new_ones")


def bounds(mask, key_length):
    """`mask` as the kernels want it: int32 [B or 1, T, 2 or 4], clipped, disjoint, in order, empty ones as stop == start."""
    ends = (mask.start, mask.stop, mask.start2, mask.stop2)
    return _bounds(key_length, *(checks.ints("mask", end, "BT") for end in ends if end is not None))


@functools.partial(jax.jit, static_argnums=0)  # in a program alone an array of no mesh can be split
def _bounds(key_length, *ends):
    ends = jnp.broadcast_arrays(*(end.clip(0, key_length) for end in ends))
    # Ends of the caller's may be split by explicit axes where others, that are the same for all rows, are not.
    split = next((end for end in ends if any(jax.typeof(end).sharding.spec)), ends[0])
    return jnp.stack(in_order(jnp, *(sharding.split_as(split, end) for end in ends)), axis=-1)


def in_order(xp, start, stop, start2=None, stop2=None):
    """The ends as `bounds` has them, of arrays of one shape; xp: jax.numpy, or torch."""
    stop = xp.maximum(start, stop)
    if start2 is None:
        return start, stop
    stop2 = xp.maximum(start2, stop2)
    swap = (start2 < stop2) & ((start == stop) | (start2 < start))
    pairs = (start, start2), (stop, stop2), (start2, start), (stop2, stop)
    start, stop, start2, stop2 = (xp.where(swap, other, own) for own, other in pairs)
    merge = start2 <= stop
    last = xp.maximum(stop, stop2)
    return start, xp.where(merge, last, stop), xp.where(merge, last, start2), xp.where(merge, last, stop2)


def padding(lengths, query_length, key_length=None, *, side="right"):
    """Rows of different lengths in one array: a query of row b sees that row's `lengths[b]` real keys.

        visible[b, q, k] = k < lengths[b]                                       # side "right"
        visible[b, q, k] = k >= key_length - lengths[b]                         # side "left"

    lengths int [B]. side "right": the padding is on the right, the real keys are [0, length); "left": [S - length, S).
    """
    query_length, key_length = _sizes(query_length, key_length)
    lengths = checks.ranked("lengths", checks.integers("lengths", lengths), "B")[:, None]
    checks.one_of("side", side, ("left", "right"))
    start = jnp.zeros_like(lengths) if side == "right" else key_length - lengths
    start = jnp.broadcast_to(start, (lengths.shape[0], query_length))
    return KeyIntervals(start, start + lengths)


def packed(segment_ids):
    """Documents packed into one row: a query sees the keys of its own document.

        visible[b, q, k] = segment_ids[b, q] == segment_ids[b, k] >= 0

    segment_ids int [B, L], each document one run of equal ids; a negative id is padding, which sees and shows nothing.
    """
    segment_ids = _segment_ids(segment_ids)
    start, stop = _runs(segment_ids)
    return KeyIntervals(start, jnp.where(segment_ids < 0, start, stop))


def block_causal(query_length, block_size, *, key_length=None, offset=0, segment_ids=None):
    """A query sees its own block, whole, and all blocks before it (SDAR, LLaDA2, Fast-dLLM v2).

        visible[q, k] = (q + offset) // block_size >= k // block_size

    block_size is an int or a traced scalar: 1 is causal, the sequence length is full. offset (an int, a scalar or int [B])
    is the position of the first query, for queries that continue a cache. With segment_ids int [B, L] (packed documents,
    offset 0) blocks are counted from each document's start and stay within it.
    """
    block_size, query_length = _block_size(block_size), checks.size("query_length", query_length)
    position = jnp.arange(query_length, dtype=jnp.int32)[None, :]
    if segment_ids is not None:
        segment_ids = _segment_ids(segment_ids)
        checks.shaped("segment_ids", segment_ids, (segment_ids.shape[0], query_length), "batch, query_length")
        for name, value, absent in (("offset", offset, 0), ("key_length", key_length, None)):
            if not (value is absent or isinstance(value, (int, np.integer)) and value == absent):
                got = checks.shown(value)
                raise ValueError(f"{name}: expected {absent} with segment_ids, which start at a document, got {got}")
        first, last = _runs(segment_ids)
        stop = first + jnp.minimum(((position - first) // block_size + 1) * block_size, last - first)
        return KeyIntervals(first, jnp.where(segment_ids < 0, first, stop))
    position = position + _per_row("offset", offset)
    stop = (position // block_size + 1) * block_size
    if key_length is not None:
        stop = jnp.minimum(stop, checks.size("key_length", key_length))
    return KeyIntervals(jnp.zeros_like(stop), stop)


def block_diffusion(length, block_size):
    """BD3-LM's training mask over [noisy; clean], 2 * length positions on both sides.

        q, k = query % length // block_size, key % length // block_size
        visible[query, key] = q == k if query and key are noisy, q > k if only query is, q >= k if neither is, else False

    A noisy query sees its own noisy block and the clean blocks before it; a clean query sees the clean blocks up to and with
    its own. block_size is an int or a traced scalar. Source: BD3-LM (Arriola et al. 2025), block_diff_mask.
    """
    block_size, length = _block_size(block_size), checks.size("length", length)
    block = jnp.arange(length, dtype=jnp.int32) // block_size
    own, after = block * block_size, jnp.minimum((block + 1) * block_size, length)
    start = jnp.concatenate([own, jnp.full_like(own, length)])
    stop = jnp.concatenate([after, length + after])
    start2 = jnp.full_like(start, length)
    stop2 = jnp.concatenate([length + own, jnp.full_like(own, length)])
    return KeyIntervals(start[None], stop[None], start2[None], stop2[None])


def cache(query_length, stop, *, start=0, block_start=None, block_stop=None):
    """Queries against a KV cache: its valid keys, and with block_* (a dual cache) also those of a block behind them.

        visible[b, q, k] = (start[b] <= k < stop[b]) | (block_start[b] <= k < block_stop[b])

    Each end is an int, a traced scalar or int [B] (rows of different lengths).
    """
    if (block_start is None) != (block_stop is None):
        raise ValueError("block_start, block_stop: expected both or neither")
    ends = dict(start=start, stop=stop) | ({} if block_start is None else dict(block_start=block_start, block_stop=block_stop))
    ends = {name: _per_row(name, end) for name, end in ends.items()}
    query_length = checks.size("query_length", query_length)
    rows = max(end.shape[0] for end in ends.values())
    for name, end in ends.items():
        if end.shape[0] not in (1, rows):
            raise ValueError(f"{name}: expected a scalar or shape [{rows}], as long as the other ends, got [{end.shape[0]}]")
    return KeyIntervals(*(jnp.broadcast_to(end, (rows, query_length)) for end in ends.values()))


def sliding_window(query_length, left, right, *, key_length=None, offset=0):
    """A query sees `left` keys before its position, the one there, and `right` after.

        visible[b, q, k] = q + offset[b] - left <= k <= q + offset[b] + right

    left, right: an int or a traced scalar each. offset: an int, a traced scalar or int [B], the position of the first query.
    """
    left, right = checks.integer("left", left), checks.integer("right", right)
    query_length, key_length = _sizes(query_length, key_length)
    position = jnp.arange(query_length, dtype=jnp.int32)[None, :] + _per_row("offset", offset)
    # Not the greater of two starts, nor the lesser of two stops: what means every key may be the greatest int.
    return KeyIntervals(position - jnp.minimum(left, position), position + 1 + jnp.minimum(right, key_length - 1 - position))


def _sizes(query_length, key_length):
    query_length = checks.size("query_length", query_length)
    return query_length, query_length if key_length is None else checks.size("key_length", key_length)


def _block_size(value):
    if isinstance(value, (int, np.integer)) and value < 1:
        raise ValueError(f"block_size: expected at least 1, got {value}")
    return checks.integer("block_size", value)


def _per_row(name, value):
    """int32 [B or 1, 1] of an int, a traced scalar or int [B]."""
    value = checks.integers(name, value)
    if value.ndim > 1:
        raise ValueError(f"{name}: expected a scalar or shape [B], got {list(value.shape)}")
    return value.reshape(-1, 1)


def _segment_ids(value):
    """int [B, L], of which explicit axes split no row: a run does not end where a device's part does."""
    return sharding.whole(checks.ints("segment_ids", value, "BL"), 1)


def _runs(segment_ids):
    """For each position the first (inclusive) and last (exclusive) position of its run of equal ids; int32 [B, L] both."""
    return _firsts(segment_ids), segment_ids.shape[1] - _firsts(segment_ids[:, ::-1])[:, ::-1]


def _firsts(segment_ids):
    position = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
    edge = jnp.ones_like(segment_ids[:, :1], bool)  # split as they are
    starts = jnp.concatenate([edge, segment_ids[:, 1:] != segment_ids[:, :-1]], 1)
    return cummax(jnp.where(starts, position, 0), axis=1)
