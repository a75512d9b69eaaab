"""Fused attention's gradients: one kernel owns a tile of keys, one a tile of rows; a sum is always made in the same order.

Both compute the weights again, as [keys, rows], from the rows' log-sum-exp. Layout and masks: attention_tiles.py.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dlm_kernels.pallas_kernels import attention_tiles, chips
from dlm_kernels.pallas_kernels.attention_tiles import EDGE, LOG2_E, WHOLE, kind_of, tile_of
from dlm_kernels.pallas_kernels.chips import LANES


def choose_tiles(kv_heads, rows, keys, head_size, dtype):
    size, width = jnp.dtype(dtype).itemsize, chips.round_up(head_size, LANES)
    row_tile, key_tile = chips.tile(rows, 512, LANES), chips.tile(keys, 2048 // size, LANES)
    # Twice four blocks of inputs and two of results; two float32 sums.
    bytes_of_head = width * (row_tile + key_tile) * (6 * size + 4)
    heads = attention_tiles.most(kv_heads, lambda n: n <= 8 and n * bytes_of_head <= chips.chip().budget)
    unrolled = attention_tiles.most(heads, lambda n: n * row_tile * key_tile * size <= 2**20)
    row_part, key_part = map(attention_tiles.part, (row_tile, key_tile))
    order = True, attention_tiles.keys_last(head_size)
    return attention_tiles.Tiles(heads, row_tile, key_tile, row_part, key_part, unrolled, (1, 1), *order)


def _kernel(*refs, tiles, masked, shared_bounds, scale, soft_cap, of_keys):
    """Gradients of a tile of keys, summed over tiles of rows, if of_keys; else those of a tile of rows, summed over keys.

    refs, in order, with R, S and n for tiles.rows, .keys and .heads:
    schedule: int32 [.] in SMEM, if masked: per grid step a tile of rows or keys, as attention_tiles.schedule gives it
    query, dout [1, n, R, H], or [1, n, H, R] if tiles.keys_last; key, value [1, n, S, H], or [1, n, H, S]
    lse, delta float32 [1, n, 1, 1, R]; delta: sum(out * dout) - dlse
    bounds: int32 [1, 1, 2|4, R], if masked; per pair a start (inclusive) and a stop (exclusive)
    of_keys: dkey, dvalue, as key, out; float32 [n, S, H] each, or [n, H, S] if tiles.keys_last, scratch
    otherwise: dquery, as query, out; float32 [n, H, R], scratch
    """
    schedule = refs[0] if masked else None
    query, key, value, dout, lse, delta = refs[masked : masked + 6]
    bounds = refs[7] if masked else None
    results = refs[masked + 6 + masked :]
    outs, sums = results[: len(results) // 2], results[len(results) // 2 :]
    step, steps = pl.program_id(3), pl.num_programs(3)
    factor = (scale if soft_cap is None else soft_cap) * LOG2_E

    @pl.when(step == 0)
    def _():
        for ref in sums:
            ref[...] = jnp.zeros(ref.shape, jnp.float32)

    last = tiles.keys_last
    rows_of = functools.partial(attention_tiles.part_of, size=tiles.row_part, length_last=last)
    keys_of = functools.partial(attention_tiles.part_of, size=tiles.key_part, length_last=last)

    def products(head, row, at):
        axes = 2 * (int(not last),)
        logits = chips.dot(keys_of(key, head, at), rows_of(query, head, row), axes)
        return logits, chips.dot(keys_of(value, head, at), rows_of(dout, head, row), axes)

    def gradients_of_logits(head, row, at, logits, dweights, *, first):
        rows, seen = slice(row, row + tiles.row_part), None
        if soft_cap is not None:
            logits = jnp.tanh(logits * (scale / soft_cap))
        weights = jnp.exp2(logits * factor - lse[0, head, 0, :, rows] * LOG2_E)
        if first is not None:
            ends = [bounds[0, 0, i : i + 1, rows] for i in range(bounds.shape[2])]
            seen = attention_tiles.visible(ends, first + at, logits.shape, 0)
            # A row that sees nothing has lse -inf.
            weights = jnp.where(seen, weights, 0.0)
        dlogits = weights * (dweights - delta[0, head, 0, :, rows])
        if soft_cap is not None:
            dlogits *= 1 - logits * logits
        if seen is not None:
            # The value of an unseen key may be NaN, and dweights with it.
            dlogits = jnp.where(seen, dlogits, 0.0)
        return weights.astype(query.dtype), dlogits.astype(query.dtype), seen

    def add(head, row, at, weights, dlogits, seen):
        if of_keys:
            keys = slice(at, at + tiles.key_part)
            for total, gradient, of_rows in zip(sums, (dlogits, weights), (query, dout), strict=True):
                if last:
                    total[head, :, keys] += chips.dot(rows_of(of_rows, head, row), gradient, (1, 1))
                else:
                    total[head, keys] += chips.dot(gradient, rows_of(of_rows, head, row), (1, 0))
        else:
            k = keys_of(key, head, at)
            k = k if seen is None else attention_tiles.kept(k, seen, 0, last)
            sums[0][head, :, row : row + tiles.row_part] += chips.dot(k, dlogits, (int(last), 0))

    def visit(first):
        """first: the first key of the tile, or None where every row sees all of it."""
        attention_tiles.visit(tiles, products, functools.partial(gradients_of_logits, first=first), add)

    if masked:
        own, batch = pl.program_id(2), 0 if shared_bounds else pl.program_id(0)
        entry = schedule[(batch * pl.num_programs(2) + own) * steps + step]
        key_tile = own if of_keys else tile_of(entry)
        pl.when(kind_of(entry) == EDGE)(lambda: visit(key_tile * tiles.keys))
        pl.when(kind_of(entry) == WHOLE)(lambda: visit(None))
    else:
        visit(None)

    @pl.when(step == steps - 1)
    def _():
        def one_head(head, carry):
            if of_keys:
                outs[0][0, head] = (sums[0][head] * scale).astype(outs[0].dtype)
                outs[1][0, head] = sums[1][head].astype(outs[1].dtype)
            else:
                total = (sums[0][head] * scale).astype(outs[0].dtype)
                outs[0][0, head] = total if last else total.T
            return carry

        jax.lax.fori_loop(0, tiles.heads, one_head, 0)


def supports_attention_backward(query, key, value, bounds, dense, out, lse, dout, dlse, *, scale, logits_soft_cap):
    if dense is not None:
        return "it takes masks as key intervals (masks.KeyIntervals), not as a boolean array"
    (t, n, h), (s, k) = query.shape[1:], key.shape[1:3]
    tiles = choose_tiles(k, n // k * t, s, h, query.dtype)
    return chips.refuse(query) or attention_tiles.refuse_schedule(tiles, bounds, n // k * t, s)


def attention_backward(query, key, value, bounds, dense, out, lse, dout, dlse, *, scale, logits_soft_cap):
    """out, dout [B,T,N,H]; lse, dlse float32 [B,N,T]; the others as in `attention_forward`. Returns dquery, dkey, dvalue."""
    b, t, n, h = query.shape
    s, k = key.shape[1:3]
    m = n // k * t
    tiles = choose_tiles(k, m, s, h, query.dtype)
    delta = jnp.einsum("btnh,btnh->bnt", out, dout, preferred_element_type=jnp.float32, precision="highest") - dlse
    padding, last = chips.round_up(m, tiles.rows) - m, tiles.keys_last

    def padded(array, axis=2):
        """Rows of zeros past the last: they add zeros to the keys' gradients."""
        return jnp.pad(array, [(0, padding if i == axis else 0) for i in range(array.ndim)])

    query_rows, dout_rows = (padded(attention_tiles.by_head(x, k, last), 3 if last else 2) for x in (query, dout))
    per_row = [padded(x.reshape(b, k, m)).reshape(b, k, -1, 1, tiles.rows) for x in (lse, delta)]
    arrays = [query_rows, *(attention_tiles.by_head(x, k, last) for x in (key, value)), dout_rows, *per_row]
    row_tiles, key_tiles = per_row[0].shape[2], pl.cdiv(s, tiles.keys)
    masked, shared = bounds is not None or s % tiles.keys != 0, bounds is None or len(bounds) == 1
    if masked:
        ends = attention_tiles.row_bounds(bounds, n // k, t, s, tiles.rows)
        kind = attention_tiles.kinds(ends, s, tiles.keys)
        arrays.append(ends.swapaxes(2, 3))

    def call(of_keys):
        own, others = (key_tiles, row_tiles) if of_keys else (row_tiles, key_tiles)
        scalars = [attention_tiles.schedule(kind.swapaxes(1, 2) if of_keys else kind)] if masked else []

        def tile(b, i, j, schedule, mine):
            if mine:
                return i
            return tile_of(schedule[0][((0 if shared else b) * own + i) * others + j]) if schedule else j

        def rows_at(b, i, j, schedule):
            return tile(b, i, j, schedule, not of_keys)

        def keys_at(b, i, j, schedule):
            return tile(b, i, j, schedule, of_keys)

        rows, keys = (
            attention_tiles.spec(tiles.heads, size, h, lambda b, g, i, j, *x, at=at: (b, g, at(b, i, j, x)), last)
            for size, at in ((tiles.rows, rows_at), (tiles.keys, keys_at))
        )
        row = pl.BlockSpec((1, tiles.heads, 1, 1, tiles.rows), lambda b, g, i, j, *x: (b, g, rows_at(b, i, j, x), 0, 0))
        specs = [rows, keys, keys, rows, row, row]
        if masked:
            specs.append(
                pl.BlockSpec(
                    (1, 1, *arrays[-1].shape[2:]), lambda b, g, i, j, *x: (0 if shared else b, rows_at(b, i, j, x), 0, 0)
                )
            )
        of = arrays[1:3] if of_keys else arrays[:1]
        sum_of = (tiles.keys, h, last) if of_keys else (tiles.rows, h, True)
        kernel = functools.partial(
            _kernel,
            tiles=tiles,
            masked=masked,
            shared_bounds=shared,
            scale=scale,
            soft_cap=logits_soft_cap,
            of_keys=of_keys,
        )
        return pl.pallas_call(
            kernel,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=len(scalars),
                grid=(b, k // tiles.heads, own, others),
                in_specs=specs,
                out_specs=[keys, keys] if of_keys else [rows],
                scratch_shapes=[
                    pltpu.VMEM((tiles.heads, *attention_tiles.shape(*sum_of)), jnp.float32) for _ in of
                ],
            ),
            out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in of],
            compiler_params=chips.parameters("parallel", "parallel", "parallel", "arbitrary"),
            name="attention_backward_keys" if of_keys else "attention_backward_rows",
        )(*scalars, *arrays)

    (dquery,), (dkey, dvalue) = call(False), call(True)
    dquery = dquery[..., :m] if last else dquery[:, :, :m]
    return attention_tiles.from_head(dquery, n, last), *(attention_tiles.from_head(x, k, last) for x in (dkey, dvalue))
