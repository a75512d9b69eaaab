"""What the losses of an LM head's logits share: statistics over the vocabulary, and the gradients by hidden states and weight.

A tile's logits are made anew wherever they are needed.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dlm_kernels.pallas_kernels import chips, head, numerics
from dlm_kernels.pallas_kernels.chips import LANES


def over_groups(rows, body):
    """body(part) for slices of as many of `rows` as have their statistics in registers at once."""
    head.slices(rows, math.gcd(rows, 64), body)


def past_the_vocabulary(values, first, vocabulary, fill):
    """Overwrites what the tile `values` [ROWS, COLUMNS], of the tokens from `first` on, has of no token."""
    rows, columns = values.shape
    if vocabulary % columns == 0:
        return

    @pl.when(first + columns > vocabulary)
    def _():
        token = first + jax.lax.broadcasted_iota(jnp.int32, (1, columns), 1)

        def clear(part):
            values[part, :] = jnp.where(token < vocabulary, values[part, :], fill)

        over_groups(rows, clear)


def to_gradient(values, first, vocabulary, dloss, of_rows):
    """Sets `values` [ROWS, COLUMNS], of the tokens from `first` on, to dloss [ROWS, 1] times of_rows(part)(columns, token), for
    parts of the rows and 128 columns at a time.
    """

    def over_columns(part):
        gradient = of_rows(part)
        scale = jnp.broadcast_to(dloss[part, :], (part.size, LANES))
        for chunk in range(values.shape[1] // LANES):
            lanes = pl.ds(chunk * LANES, LANES)
            token = first + chunk * LANES + jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
            # Rows that are not active, whose hidden state is zeros here, are NaN times a weight that is infinite.
            values[part, lanes] = jnp.where(scale == 0, 0.0, gradient(lanes, token) * scale)

    over_groups(values.shape[0], over_columns)
    past_the_vocabulary(values, first, vocabulary, 0.0)


def statistics(name, kernel, count, hidden, weight, active, of_rows=(), beside=()):
    """`count` arrays, float32 [R, cores * LANES], that `kernel` sums up over the vocabulary, of which each core takes a part.

    kernel: of these operands, the statistics [ROWS, LANES], which it writes, and scratch [ROWS, COLUMNS] for each head's logits.
    of_rows, beside: as in `gradients`.
    """
    (r, d), v, itemsize = hidden.shape, weight.shape[0], hidden.dtype.itemsize
    others = [x.shape[1] for x in beside[1:]]
    rows, columns = head.tiles(r, v, d, itemsize, *head.streamed(itemsize, *others))
    tiles, cores = pl.cdiv(v, columns), chips.chip().cores
    steps = pl.cdiv(tiles, cores)

    def tile(i, part, step, live):
        return jnp.minimum(part * steps + step, tiles - 1) * live[i]

    def of_head(width):
        return [
            head.resident((rows, width), lambda i, part, step, live: (i, 0)),
            pl.BlockSpec((columns, width), lambda *at: (tile(*at), 0)),
        ]

    column = pl.BlockSpec((rows, 1), lambda i, part, step, live: (i, 0))
    return pl.pallas_call(
        functools.partial(kernel, tiles=tiles, vocabulary=v),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(pl.cdiv(r, rows), cores, steps),
            in_specs=[*of_head(d), *[column] * len(of_rows), *(spec for width in others for spec in of_head(width))],
            out_specs=[pl.BlockSpec((rows, LANES), lambda i, part, step, live: (i, part))] * count,
            scratch_shapes=[pltpu.VMEM((rows, columns), jnp.float32)] * (1 + len(others)),
        ),
        out_shape=[jax.ShapeDtypeStruct((r, cores * LANES), jnp.float32)] * count,
        compiler_params=chips.parameters("arbitrary", "parallel", "arbitrary"),
        name=name,
    )(head.live(active, r, rows), hidden, weight, *(x[:, None] for x in of_rows), *beside)


def logsumexp(top, total):
    """float32 [R] of the statistics [R, LANES]: of each lane the greatest logit and the sum of exp(logit - top)."""
    greatest = jnp.max(top, axis=1)
    base = jnp.where(greatest == -jnp.inf, 0.0, greatest)
    return base + jnp.log(jnp.sum(total * jnp.exp(top - base[:, None]), axis=1))


def _product(gradient, factor, contracted):
    """Their float32 product. A bfloat16 gradient would cost as much accuracy as the result's rounding: it goes as a sum of two."""
    if factor.dtype == jnp.float32:
        return chips.dot(gradient, factor, contracted)
    high = numerics.rounded(gradient, factor.dtype)
    halves = high.astype(factor.dtype), (gradient - high).astype(factor.dtype)
    return chips.dot(halves[0], factor, contracted) + chips.dot(halves[1], factor, contracted)


def _dhidden_kernel(
    live,  # int32 [row tiles] in SMEM, 0 where no row is active
    hidden,  # [ROWS, D], finite
    weight,  # [COLUMNS, D]
    *refs,  # `count` inputs of `dlogits`; dhidden [ROWS, D], out; float32 scratch: [ROWS, D], [ROWS, COLUMNS] for each head
    count,
    dlogits,
    vocabulary,
):
    inputs, (dhidden, total, values, *others) = refs[:count], refs[count:]
    step = pl.program_id(1)
    first = step * weight.shape[0]

    @pl.when(step == 0)
    def _():
        total[...] = jnp.zeros(total.shape, jnp.float32)

    @pl.when(live[pl.program_id(0)] != 0)
    def _():
        head.products(hidden, weight, values)
        dlogits(values, first, vocabulary, *inputs, *others)
        factor = weight[...]
        if vocabulary % weight.shape[0]:
            # Zero times what lies past the vocabulary may be NaN.
            row = first + jax.lax.broadcasted_iota(jnp.int32, (weight.shape[0], 1), 0)
            factor = jnp.where(row < vocabulary, factor, jnp.zeros_like(factor))

        def product(part):
            total[part, :] += _product(values[part, :], factor, (1, 0))

        head.over_parts(hidden.shape[0], product)

    @pl.when(step == pl.num_programs(1) - 1)
    def _():
        dhidden[...] = total[...].astype(dhidden.dtype)


def _dweight_kernel(
    live,  # int32 [row tiles] in SMEM, 0 where no row is active
    hidden,  # [ROWS, D], finite
    weight,  # [COLUMNS, D]
    *refs,  # `count` inputs of `dlogits`; dweight [COLUMNS, D], out; float32 scratch: [COLUMNS, D], [ROWS, COLUMNS] for each head
    count,
    dlogits,
    vocabulary,
):
    inputs, (dweight, total, values, *others) = refs[:count], refs[count:]
    step = pl.program_id(1)
    first = pl.program_id(0) * weight.shape[0]

    @pl.when(step == 0)
    def _():
        total[...] = jnp.zeros(total.shape, jnp.float32)

    @pl.when(live[step] != 0)
    def _():
        head.products(hidden, weight, values)
        dlogits(values, first, vocabulary, *inputs, *others)

        def product(part):
            total[...] += _product(values[part, :], hidden[part, :], (0, 0))

        head.over_parts(hidden.shape[0], product)

    @pl.when(step == pl.num_programs(1) - 1)
    def _():
        dweight[...] = total[...].astype(dweight.dtype)


def _kept(by_weight, itemsize, beside):
    """row_bytes, column_bytes, tile_bytes and `beside` of head.tiles: two blocks of what is read, and of the result two and a sum.

    beside: the width of each other head, of which there is no result.
    """
    read, result = 2 * itemsize, 2 * itemsize + 4
    others = [(width, read, read) for width in beside]
    return read + result * (not by_weight), read + result * by_weight, head.TILE_BYTES, others


def refuse(weight, beside=()):
    """Why `gradients` does not take this weight, beside others of such widths, or None."""
    kept = [_kept(by_weight, weight.dtype.itemsize, beside) for by_weight in (False, True)]
    return head.refuse(weight, *kept[0]) or head.refuse(weight, *kept[1])


def gradients(name, dlogits, hidden, weight, active, of_rows, beside=()):
    """dhidden [R,D] and dweight [V,D] of a loss, in the dtypes of hidden and weight.

    dlogits(values, first, vocabulary, *of_rows, *beside), within a kernel, turns the logits `values` of a tile, its first token
    `first`, into the loss's gradient by them, as `to_gradient` does.
    of_rows: arrays [R], of which it has [ROWS, 1]. beside: hidden states [R,E] and weight [V,E] of another head, or nothing; with
    them dlogits also has scratch for that head's logits of the tile.

    Each of the two is summed in VMEM and written once, by a pass of its own: over the weight for each tile of rows, over the rows
    for each tile of the weight.
    """
    (r, d), v, itemsize = hidden.shape, weight.shape[0], hidden.dtype.itemsize
    by_row, by_token = [hidden, *(x[:, None] for x in of_rows), *beside[:1]], [weight, *beside[1:]]
    # Zero times a NaN of an inactive row would be NaN.
    by_row = [jnp.where(active[:, None], x, jnp.zeros_like(x)) for x in by_row]

    def gradient(of, kernel, by_weight):
        # The cores share the tiles of what is summed.
        least = 1 if by_weight else chips.chip().cores
        kept = _kept(by_weight, itemsize, [x.shape[1] for x in by_token[1:]])
        rows, columns = head.tiles(r, v, d, itemsize, *kept, least=least)
        row_tiles, tiles = pl.cdiv(r, rows), pl.cdiv(v, columns)
        padded = [jnp.pad(x, ((0, row_tiles * rows - r), (0, 0))) for x in by_row]
        at_row = (lambda i, j, live: (j, 0)) if by_weight else (lambda i, j, live: (i, 0))
        at_token = (lambda i, j, live: (i, 0)) if by_weight else (lambda i, j, live: (j * live[i], 0))
        row_specs = [pl.BlockSpec((rows, x.shape[1]), at_row) for x in by_row]
        token_specs = [pl.BlockSpec((columns, x.shape[1]), at_token) for x in by_token]
        result, size, at = (columns, v, at_token) if by_weight else (rows, row_tiles * rows, at_row)
        return pl.pallas_call(
            functools.partial(kernel, count=len(by_row) + len(by_token) - 2, dlogits=dlogits, vocabulary=v),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=1,
                grid=(tiles, row_tiles) if by_weight else (row_tiles, tiles),
                in_specs=[row_specs[0], token_specs[0], *row_specs[1:], *token_specs[1:]],
                out_specs=pl.BlockSpec((result, d), at),
                scratch_shapes=[pltpu.VMEM(x, jnp.float32) for x in ((result, d), *[(rows, columns)] * len(by_token))],
            ),
            out_shape=jax.ShapeDtypeStruct((size, d), hidden.dtype),
            compiler_params=chips.parameters("parallel", "arbitrary"),
            name=f"{name}_{of}",
        )(head.live(active, r, rows), padded[0], weight, *padded[1:], *by_token[1:])

    return gradient("hidden", _dhidden_kernel, False)[:r], gradient("weight", _dweight_kernel, True)
