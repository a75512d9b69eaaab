"""Scoring tokens in one pass over the vocabulary; and unmasking, from topk.py."""

import functools

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dlm_kernels.pallas_kernels import chips, head, numerics, scores
from dlm_kernels.pallas_kernels.topk import supports_unmask_topk, unmask_topk

__all__ = ["score_tokens", "supports_score_tokens", "supports_unmask_topk", "unmask_topk"]

ROWS, COLUMNS = 64, 4096  # of a tile: a step must outlast what starting it costs


def _score_kernel(live, logits, *refs, given, confidence, tempered, soft_cap, vocabulary):
    """live: int32 [row tiles] in SMEM, 0 where no row is active. logits: [ROWS, COLUMNS].

    refs: the inputs that are `given`, as score_tokens lays them out; the four results [ROWS, 1]; scratch.
    """
    inputs = dict.fromkeys(("unconditional", "scale", "temperature", "words", "noise", "active", "banned"))
    inputs |= dict(zip(given, refs))
    token, sure, entropy, logsumexp, values, *state = refs[len(given) :]
    state, rows_tile, step = scores.State(*state), pl.program_id(0), pl.program_id(1)

    def values_of(rows):
        scale = None if inputs["scale"] is None else inputs["scale"][rows, :]

        def value_of(columns):
            value = logits[rows, columns].astype(jnp.float32)
            if scale is not None:
                value = numerics.mixed(value, inputs["unconditional"][rows, columns].astype(jnp.float32), scale)
            return numerics.capped(value, soft_cap)

        return value_of

    @pl.when(step == 0)
    def _():
        scores.start(state)

    @pl.when(live[rows_tile] != 0)
    def _():
        scores.accumulate(
            state,
            values_of,
            values,
            *(inputs[name] for name in ("temperature", "words", "noise", "banned")),
            step * logits.shape[1],
            with_second=confidence == "margin",
            vocabulary=vocabulary,
            tempered=tempered,
        )

    @pl.when(step == pl.num_programs(1) - 1)
    def _():
        scores.finish(
            state,
            *(token, sure, entropy, logsumexp),
            inputs["active"],
            vocabulary=vocabulary,
            confidence=confidence,
            sampled=inputs["temperature"] is not None,
        )


def supports_score_tokens(logits, **_):
    return chips.refuse(logits)


def score_tokens(
    logits,
    unconditional,
    guidance_scale,
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
):
    """logits, unconditional [R,V], one dtype; guidance_scale, temperature float32 [R]; key_data uint32 [R,2];
    counter_row int32 [R]; noise float32 [R,V]; active bool [R]; banned int32 [M].

    Returns token int32, confidence, entropy, logsumexp float32, each [R]. A tile of rows is not read where none is active.
    """
    r, v = logits.shape
    rows, columns = chips.tile(r, ROWS, scores.ROWS), chips.tile(v, COLUMNS, chips.LANES)

    # Of a tile that is not live the same block is asked for at each step, and so fetched once.
    by_both = pl.BlockSpec((rows, columns), lambda i, j, live: (i, j * live[i]))
    by_token = pl.BlockSpec((1, columns), lambda i, j, live: (0, j))

    def by_row(width):
        return pl.BlockSpec((rows, width), lambda i, j, live: (i, 0))

    inputs = {
        "unconditional": (unconditional, by_both),
        "scale": (None if unconditional is None else guidance_scale[:, None], by_row(1)),
        "temperature": (None if temperature is None else temperature[:, None], by_row(1)),
        "words": (None if key_data is None else scores.words(key_data, counter_row, v), by_row(4)),
        "noise": (noise, by_both),
        "active": (None if active is None else active[:, None].astype(jnp.float32), by_row(1)),
        "banned": (None if banned is None else scores.banned_row(banned, v), by_token),
    }
    given = {name: pair for name, pair in inputs.items() if pair[0] is not None}
    kernel = functools.partial(
        _score_kernel,
        given=tuple(given),
        confidence=confidence,
        tempered=tempered_confidence,
        soft_cap=logits_soft_cap,
        vocabulary=v,
    )
    results = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(pl.cdiv(r, rows), pl.cdiv(v, columns)),
            in_specs=[by_both, *(spec for _, spec in given.values())],
            out_specs=[by_row(1)] * 4,
            scratch_shapes=[pltpu.VMEM((rows, columns), jnp.float32), *scores.scratch(rows)],
        ),
        out_shape=scores.outputs(r),
        compiler_params=chips.parameters("parallel", "arbitrary"),
        name="score_tokens",
    )(head.live(active, r, rows), logits, *(array for array, _ in given.values()))
    return tuple(x[:, 0] for x in results)
