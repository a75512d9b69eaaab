"""The LM head and the scores of its logits in one pass over the weight.

The weight goes through VMEM in tiles of whole rows, contiguous in HBM, while the hidden rows stay. A tile's logits are there for
one step only: the same step adds them to statistics per lane, as scores.py has them.
"""

import functools

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dlm_kernels.pallas_kernels import chips, head, numerics, scores


def _stream_kernel(live, hidden, weight, *refs, given, tiles, confidence, tempered, soft_cap, logits_dtype, vocabulary):
    """live: int32 [row tiles] in SMEM, 0 where no row is active. hidden: [ROWS, D]. weight: [COLUMNS, D].

    refs: the inputs that are `given`, as lm_head_scores lays them out; the state, [6, ROWS, 128] and [ROWS, 128], out; float32
    [ROWS, COLUMNS], scratch.
    """
    inputs = dict.fromkeys(("temperature", "words", "noise", "banned"))
    inputs |= dict(zip(given, refs))
    floats, token, values = refs[len(given) :]
    state, step = scores.stacked(floats, token), pl.program_id(2)
    tile = pl.program_id(1) * pl.num_programs(2) + step

    @pl.when(step == 0)
    def _():
        scores.start(state)

    # The last part may have fewer tiles than the others.
    @pl.when((live[pl.program_id(0)] != 0) & (tile < tiles))
    def _():
        head.products(hidden, weight, values)
        scores.accumulate(
            state,
            lambda rows: lambda columns: numerics.capped(numerics.rounded(values[rows, columns], logits_dtype), soft_cap),
            values,
            *inputs.values(),
            tile * weight.shape[0],
            with_second=confidence == "margin",
            vocabulary=vocabulary,
            tempered=tempered,
        )


def _finish_kernel(*refs, confidence, sampled, masked, vocabulary):
    """refs: the state, [6, ROWS, parts * 128] and [ROWS, parts * 128]; active float32 [ROWS, 1], if masked; results [ROWS, 1]."""
    state, refs = scores.stacked(*refs[:2]), refs[2:]
    active = refs[0] if masked else None
    scores.finish(state, *refs[-4:], active, vocabulary=vocabulary, confidence=confidence, sampled=sampled)


def supports_lm_head_scores(hidden, weight, **_):
    if len(weight.shape) != 2:
        return "it takes the weight as [V, D], not packed"
    return chips.refuse(hidden) or head.refuse(weight, *head.streamed(weight.dtype.itemsize))


def lm_head_scores(
    hidden,
    weight,
    temperature,
    key_data,
    counter_row,
    noise,
    active,
    banned,
    *,
    confidence,
    tempered_confidence,
    logits_soft_cap,
    logits_dtype,
):
    """hidden [R,D], weight [V,D], one dtype; the rest and the result as in `unmask.score_tokens`.

    The weight is read once for as many rows as VMEM holds (`head.tiles`), and not at all for rows of which none is active.
    """
    (r, d), v = hidden.shape, weight.shape[0]
    rows, columns = head.tiles(r, v, d, hidden.dtype.itemsize, *head.streamed(hidden.dtype.itemsize))
    row_tiles, tiles, parts = pl.cdiv(r, rows), pl.cdiv(v, columns), chips.chip().cores
    steps = pl.cdiv(tiles, parts)

    def tile(i, part, step, live):
        # Of rows that are not live the same block is asked for at each step, and so fetched once.
        return jnp.minimum(part * steps + step, tiles - 1) * live[i]

    def by_row(width):
        return pl.BlockSpec((rows, width), lambda i, part, step, live: (i, 0))

    inputs = {
        "temperature": (None if temperature is None else temperature[:, None], by_row(1)),
        "words": (None if key_data is None else scores.words(key_data, counter_row, v), by_row(4)),
        "noise": (noise, pl.BlockSpec((rows, columns), lambda i, *at: (i, tile(i, *at)))),
        "banned": (
            None if banned is None else scores.banned_row(banned, v),
            pl.BlockSpec((1, columns), lambda *at: (0, tile(*at))),
        ),
    }
    given = {name: pair for name, pair in inputs.items() if pair[0] is not None}
    state = pl.pallas_call(
        functools.partial(
            _stream_kernel,
            given=tuple(given),
            tiles=tiles,
            confidence=confidence,
            tempered=tempered_confidence,
            soft_cap=logits_soft_cap,
            logits_dtype=logits_dtype,
            vocabulary=v,
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(row_tiles, parts, steps),
            in_specs=[
                head.resident((rows, d), lambda i, part, step, live: (i, 0)),
                pl.BlockSpec((columns, d), lambda *at: (tile(*at), 0)),
                *(spec for _, spec in given.values()),
            ],
            out_specs=[
                pl.BlockSpec((6, rows, chips.LANES), lambda i, part, step, live: (0, i, part)),
                pl.BlockSpec((rows, chips.LANES), lambda i, part, step, live: (i, part)),
            ],
            scratch_shapes=[pltpu.VMEM((rows, columns), jnp.float32)],
        ),
        out_shape=scores.lanes(r, parts),
        # Each core takes a part of the vocabulary: as a split of the rows it would read the whole weight.
        compiler_params=chips.parameters("arbitrary", "parallel", "arbitrary"),
        name="lm_head_scores",
    )(head.live(active, r, rows), hidden, weight, *(array for array, _ in given.values()))

    rows = chips.tile(r, 128, scores.ROWS)
    states = [pl.BlockSpec((6, rows, parts * chips.LANES), lambda i: (0, i, 0))]
    states += [pl.BlockSpec((rows, parts * chips.LANES), lambda i: (i, 0))]
    column = pl.BlockSpec((rows, 1), lambda i: (i, 0))
    masks = [] if active is None else [active[:, None].astype(jnp.float32)]
    results = pl.pallas_call(
        functools.partial(
            _finish_kernel,
            confidence=confidence,
            sampled=temperature is not None,
            masked=active is not None,
            vocabulary=v,
        ),
        grid=(pl.cdiv(r, rows),),
        in_specs=states + [column] * len(masks),
        out_specs=[column] * 4,
        out_shape=scores.outputs(r),
        compiler_params=chips.parameters("parallel"),
        name="lm_head_scores_finish",
    )(*state, *masks)
    return tuple(x[:, 0] for x in results)
