"""Fused attention over key intervals, forward: online softmax in base 2. attention_tiles.py has the layout and the masks."""

import functools
import itertools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dlm_kernels.pallas_kernels import attention_tiles, chips
from dlm_kernels.pallas_kernels.attention_backward import attention_backward, supports_attention_backward
from dlm_kernels.pallas_kernels.attention_tiles import DEAD, EDGE, LOG2_E, WHOLE, kind_of, tile_of
from dlm_kernels.pallas_kernels.chips import LANES

__all__ = ["attention_backward", "attention_forward", "supports_attention_backward", "supports_attention_forward"]

# So many rows and fewer are the sublanes of their logits; more are the lanes. By static cycles on v5e and v6e.
MOST_ROWS_FIRST = 64


def choose_tiles(kv_heads, rows, keys, head_size, dtype, bounded):
    """Not by the batch: a row's result must not depend on it. bounded: whether rows see some of the keys only."""
    size, width = jnp.dtype(dtype).itemsize, chips.round_up(head_size, LANES)
    keys_first = rows > MOST_ROWS_FIRST
    row_tile = chips.even_tile(rows, 2048 // size, LANES if keys_first else 16)
    # A tile is skipped or computed whole.
    most_keys = (8192 if keys_first and not bounded else 4096) // size
    key_tile = chips.even_tile(keys, max(most_keys * LANES // width, LANES), LANES)
    # Key, value, query and result blocks are there twice; the sums are float32.
    bytes_of_head = 4 * width * (key_tile * size + row_tile * (size + 1))
    heads = attention_tiles.most(kv_heads, lambda n: n <= 8 and n * bytes_of_head <= chips.chip().budget)
    row_part, behind = attention_tiles.part(row_tile), chips.chip().behind
    if keys_first:
        key_part = LANES if row_part > LANES else min(attention_tiles.part(key_tile), chips.chip().mxu)
        # Of half the parts twice as many.
        behind = tuple(n * 2 * LANES**2 // (row_part * key_part) for n in behind)
    else:
        key_part = key_tile  # one reduction over lanes for all of them
    # The code of a head grows with what it multiplies, and with the passes of its products, of which float32 takes six.
    multiplied = pl.cdiv(max(row_tile, LANES) * key_tile, 2 * LANES**2)
    unrolled = attention_tiles.most(heads, lambda n: n * multiplied * size**2 <= 64 * 2**2)
    order = keys_first, attention_tiles.keys_last(head_size)
    return attention_tiles.Tiles(heads, row_tile, key_tile, row_part, key_part, unrolled, behind, *order)


def _forward_kernel(*refs, tiles, masked, shared_bounds, steps, scale, soft_cap):
    """refs, in order, with R, S and n for tiles.rows, .keys and .heads:

    schedule: int32 [.] in SMEM, if masked: per grid step a tile of keys, as attention_tiles.schedule gives it
    query [1, n, R, H], or [1, n, H, R] if tiles.rows_last; key, value [1, n, S, H], or [1, n, H, S] if tiles.keys_last
    bounds: int32 [1, 1, 2|4, R], if masked; [1, 1, R, 2|4] where not tiles.keys_first; per pair start (inclusive), stop (exclusive)
    out, as query; lse float32 [1, n, 1, R], natural
    best, total, sums: float32 scratch, each row's greatest logit, the sum of its weights in 8 parts, and that of weight times
        value: [n, 1, R], [n, 8, R], [n, H, R]; where not tiles.keys_first [n, R, 1], [n, R, 128] in 128 parts, [n, R, H]

    scale is positive. shared_bounds: one batch row's serve all. steps: tiles of keys; of one, rows begin and end in the same pass.
    """
    schedule = refs[0] if masked else None
    query, key, value = refs[masked : masked + 3]
    bounds = refs[4] if masked else None
    out, lse, best, total, sums = refs[-5:]
    keys_axis = 0 if tiles.keys_first else 1
    step = pl.program_id(3)
    # Logits are kept without their last factor, the scale or the cap; the exponential's base takes it.
    factor = (scale if soft_cap is None else soft_cap) * LOG2_E

    if steps > 1:

        @pl.when(step == 0)
        def _():
            best[...] = jnp.full(best.shape, -jnp.inf, jnp.float32)
            total[...] = jnp.zeros(total.shape, jnp.float32)
            sums[...] = jnp.zeros(sums.shape, jnp.float32)

    def of_rows(head, row):
        """Where in best, total and sums a part's rows are."""
        rows = slice(row, row + tiles.row_part)
        return (head, slice(None), rows) if tiles.keys_first else (head, rows, slice(None))

    def logits_of(head, row, at):
        q = attention_tiles.part_of(query, head, row, tiles.row_part, tiles.rows_last)
        k = attention_tiles.part_of(key, head, at, tiles.key_part, tiles.keys_last)
        q_axis, k_axis = int(not tiles.rows_last), int(not tiles.keys_last)
        logits = chips.dot(k, q, (k_axis, q_axis)) if tiles.keys_first else chips.dot(q, k, (q_axis, k_axis))
        return (logits if soft_cap is None else jnp.tanh(logits * (scale / soft_cap)),)

    def weights_of(head, row, at, logits, *, first):
        part, seen = of_rows(head, row), None
        if first is not None:
            rows = slice(row, row + tiles.row_part)
            places = [(i, rows) if tiles.keys_first else (rows, i) for i in map(_only, range(bounds.shape[2 + keys_axis]))]
            seen = attention_tiles.visible([bounds[0, 0, *place] for place in places], first + at, logits.shape, keys_axis)
            logits = jnp.where(seen, logits, -jnp.inf)
        new, begins = logits.max(keys_axis, keepdims=True), steps == 1 and at == 0
        if not begins:
            old = best[part]
            new = jnp.maximum(old, new)
        # A row that has seen nothing yet: -inf - -inf would be NaN.
        base = jnp.where(new == -jnp.inf, 0.0, new)
        weights = jnp.exp2((logits - base) * factor)
        if tiles.keys_first:
            pieces = [weights[i : i + 8] for i in range(0, tiles.key_part, 8)]
        else:
            pieces = [weights[:, i : i + LANES] for i in range(0, tiles.key_part, LANES)]
        weight, shrink = sum(pieces[1:], pieces[0]), None
        if not begins:
            shrink = jnp.exp2((old - base) * factor)
            weight += total[part] * shrink
        best[part], total[part] = new, weight
        return weights.astype(value.dtype), shrink, seen

    def add_values(head, row, at, weights, shrink, seen):
        part, v_axis = of_rows(head, row), int(tiles.keys_last)
        v = attention_tiles.part_of(value, head, at, tiles.key_part, tiles.keys_last)
        if seen is not None:
            v = attention_tiles.kept(v, seen, keys_axis, tiles.keys_last)
        product = chips.dot(v, weights, (v_axis, 0)) if tiles.keys_first else chips.dot(weights, v, (1, v_axis))
        if shrink is not None:
            product += sums[part] * shrink
        if steps == 1 and at + tiles.key_part == tiles.keys:
            finish(head, row, product)
        else:
            sums[part] = product

    def finish(head, row, values):
        """values: what `sums` has at last."""
        part, rows = of_rows(head, row), slice(row, row + tiles.row_part)
        weight = total[part].sum(keys_axis, keepdims=True)
        none = weight == 0
        weight = jnp.where(none, 1.0, weight)
        log = jnp.where(none, -jnp.inf, best[part] * (factor / LOG2_E) + jnp.log(weight))
        # Not sums / weight: a division for each row is few, for each element many.
        result = values * (1 / weight)
        result = (result.T if tiles.keys_first and not tiles.rows_last else result).astype(out.dtype)
        if tiles.rows_last:
            out[0, head, :, rows] = result
        else:
            out[0, head, rows] = result
        lse[0, head, :, rows] = log if tiles.keys_first else jnp.broadcast_to(log, (tiles.row_part, LANES)).T[:1]

    def attend(first):
        """first: the first key of the tile, or None where every row sees all of it."""

        attention_tiles.visit(tiles, logits_of, functools.partial(weights_of, first=first), add_values)

    if masked:
        row = pl.program_id(2) if shared_bounds else pl.program_id(0) * pl.num_programs(2) + pl.program_id(2)
        entry = schedule[row * steps + step]
        pl.when(kind_of(entry) == EDGE)(lambda: attend(tile_of(entry) * tiles.keys))
        pl.when(kind_of(entry) == WHOLE)(lambda: attend(None))
        if steps == 1:

            @pl.when(kind_of(entry) == DEAD)
            def _():
                out[...], lse[...] = jnp.zeros(out.shape, out.dtype), jnp.full(lse.shape, -jnp.inf, jnp.float32)

    else:
        attend(None)

    if steps > 1:

        @pl.when(step == steps - 1)
        def _():
            # Not a loop: a transposition's latency is that of several.
            for head, row in itertools.product(range(tiles.heads), range(0, tiles.rows, tiles.row_part)):
                finish(head, row, sums[of_rows(head, row)])


def _only(i):
    return slice(i, i + 1)


def supports_attention_forward(query, key, value, bounds, dense, *, scale, logits_soft_cap):
    if dense is not None:
        return "it takes masks as key intervals (masks.KeyIntervals), not as a boolean array"
    (t, n, h), (s, k) = query.shape[1:], key.shape[1:3]
    tiles = choose_tiles(k, n // k * t, s, h, query.dtype, bounds is not None)
    return chips.refuse(query) or attention_tiles.refuse_schedule(tiles, bounds, n // k * t, s)


def attention_forward(query, key, value, bounds, dense, *, scale, logits_soft_cap):
    """query [B,T,N,H]; key, value [B,S,K,H]; bounds int32 [1|B,T,2|4] or None. Returns out [B,T,N,H] and lse float32 [B,N,T]."""
    b, t, n, h = query.shape
    s, k = key.shape[1:3]
    m = n // k * t
    tiles = choose_tiles(k, m, s, h, query.dtype, bounds is not None)
    if scale <= 0:
        # Logits are compared before they are scaled; and zero times the -inf of a key that is not seen would be NaN.
        query, scale = (-query, -scale) if scale else (query * 0, 1.0)
    grid = b, k // tiles.heads, pl.cdiv(m, tiles.rows), pl.cdiv(s, tiles.keys)
    masked, shared = bounds is not None or s % tiles.keys != 0, bounds is None or len(bounds) == 1
    arrays = [attention_tiles.by_head(query, k, tiles.rows_last)]
    arrays += [attention_tiles.by_head(x, k, tiles.keys_last) for x in (key, value)]
    scalars, specs = [], []

    def at_rows(b, g, i, j, *_):
        return b, g, i

    def at_keys(b, g, i, j, *schedule):
        # A dead step asks for the block that is there already.
        row = (i if shared else b * grid[2] + i) * grid[3] + j
        return b, g, tile_of(schedule[0][row]) if schedule else j

    if masked:
        ends = attention_tiles.row_bounds(bounds, n // k, t, s, tiles.rows)
        scalars = [attention_tiles.schedule(attention_tiles.kinds(ends, s, tiles.keys))]
        arrays.append(ends.swapaxes(2, 3) if tiles.keys_first else ends)
        specs = [pl.BlockSpec((1, 1, *arrays[-1].shape[2:]), lambda b, g, i, j, *_: (0 if shared else b, i, 0, 0))]
    rows = attention_tiles.spec(tiles.heads, tiles.rows, h, at_rows, tiles.rows_last)
    keys = attention_tiles.spec(tiles.heads, tiles.keys, h, at_keys, tiles.keys_last)
    wide = (8, tiles.rows) if tiles.keys_first else (tiles.rows, LANES)
    thin, deep = ((1, tiles.rows), (h, tiles.rows)) if tiles.keys_first else ((tiles.rows, 1), (tiles.rows, h))
    out, lse = pl.pallas_call(
        functools.partial(
            _forward_kernel, tiles=tiles, masked=masked, shared_bounds=shared, steps=grid[3], scale=scale, soft_cap=logits_soft_cap
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=grid,
            in_specs=[rows, keys, keys, *specs],
            out_specs=[rows, pl.BlockSpec((1, tiles.heads, 1, tiles.rows), lambda b, g, i, j, *_: (b, g, 0, i))],
            scratch_shapes=[pltpu.VMEM((tiles.heads, *shape), jnp.float32) for shape in (thin, wide, deep)],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((b, k, *attention_tiles.shape(m, h, tiles.rows_last)), query.dtype),
            jax.ShapeDtypeStruct((b, k, 1, grid[2] * tiles.rows), jnp.float32),
        ],
        compiler_params=chips.parameters("parallel", "parallel", "parallel", "arbitrary"),
        name="attention_forward",
    )(*scalars, *arrays)
    return attention_tiles.from_head(out, n, tiles.rows_last), lse[..., :m].reshape(b, n, t)
