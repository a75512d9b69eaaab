"""A row's statistics over its vocabulary, tile by tile, kept per lane: lane j holds those of the tokens j, j + 128, ...

Reducing over lanes is what a TPU does slowest, so it is done once, after the last tile.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dlm_kernels.pallas_kernels import numerics
from dlm_kernels.pallas_kernels.chips import LANES

ROWS = 16  # of a bfloat16 tile; tiles of logits have a multiple of it
GROUP = 32  # rows at most whose statistics are in registers at once
# Chunks of a group that are laid out one after the other, so that the latency of one hides behind the others.
UNROLLED = 32
LEAST = -200.0  # of any distance below it the weight is 0; to the least number, by which some ban tokens, it may be -inf


class State(NamedTuple):
    """VMEM [ROWS, 128], float32 unless said."""

    top: jax.Array  # the greatest value
    second: jax.Array  # the value after the greatest, which equals it on a tie
    total: jax.Array  # the sum of exp(value - top)
    moment: jax.Array  # the sum of (value - top) * exp(value - top)
    sampled_score: jax.Array  # the greatest of what is drawn from: the value, or value / temperature + noise
    sampled_logit: jax.Array  # the value of that token
    token: jax.Array  # int32, that token


def unroll(steps, most):
    """The greatest number of at most `most` that divides a loop's steps."""
    return max(n for n in range(1, most + 1) if steps % n == 0)


def scratch(rows):
    return [pltpu.VMEM((rows, LANES), jnp.float32) for _ in range(6)] + [pltpu.VMEM((rows, LANES), jnp.int32)]


def start(state):
    for ref in (state.top, state.second, state.sampled_score, state.sampled_logit):
        ref[...] = jnp.full(ref.shape, -jnp.inf, jnp.float32)
    for ref in (state.total, state.moment):
        ref[...] = jnp.zeros(ref.shape, jnp.float32)
    state.token[...] = jnp.zeros(state.token.shape, jnp.int32)


def accumulate(
    state,  # State of ROWS rows; changed
    values_of,  # rows -> columns -> float32 [<= GROUP, 128], a part of the tile: logits after guidance and cap
    values,  # float32 [ROWS, COLUMNS], scratch
    temperature,  # float32 [ROWS, 1] | None
    words,  # int32 [ROWS, 4] | None, see numerics.gumbel
    noise,  # float32 [ROWS, COLUMNS] | None, instead of words
    banned,  # float32 [1, COLUMNS] | None, not 0 where the token is banned
    first,  # int32, the tile's first token
    *,
    with_second,  # State.second is wanted
    vocabulary,  # V; tokens from there on (exclusive) do not exist
    tempered,  # take statistics of value / temperature
):
    """Adds a tile of COLUMNS tokens to the statistics."""
    rows_all, columns_all = values.shape
    # A group draws where one of its rows may: the fewer rows, the fewer draws for nothing.
    together = math.gcd(rows_all, GROUP if temperature is None else ROWS)
    chunks, groups = columns_all // LANES, rows_all // together
    unrolled = unroll(chunks, UNROLLED)
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1)

    def part(chunk):
        return pl.ds(pl.multiple_of(chunk * LANES, LANES), LANES)

    def over_rows(group, carry):
        rows = pl.ds(pl.multiple_of(group * together, together), together)
        if temperature is not None:
            hot = temperature[rows, :] > 0
            divisor = jnp.where(hot, temperature[rows, :], 1.0)

        value_of = values_of(rows)

        def greatest(chunk, carry):
            top, second, token = carry
            value = value_of(part(chunk))
            index = first + chunk * LANES + lane
            if banned is not None:
                value = jnp.where(banned[:, part(chunk)] != 0, -jnp.inf, value)
            if vocabulary % columns_all:
                value = jnp.where(index < vocabulary, value, -jnp.inf)
            if tempered and temperature is not None:
                value = value / divisor
            values[rows, part(chunk)] = value
            if with_second:
                second = jnp.maximum(second, jnp.minimum(top, value))
            # Not >=: of equal values the lowest token counts.
            token = jnp.where(value > top, index, token)
            return jnp.maximum(top, value), second, token

        old_top = state.top[rows, :]
        carried = old_top, state.second[rows, :], state.token[rows, :]
        top, second, token = jax.lax.fori_loop(0, chunks, greatest, carried, unroll=unrolled)
        base = jnp.where(top == -jnp.inf, 0.0, top)

        def sums(chunk, carry):
            total, moment = carry
            distance = values[rows, part(chunk)] - base
            weight = jnp.exp(distance)
            # Of -inf the product would be NaN.
            return total + weight, moment + jnp.maximum(distance, LEAST) * weight

        total, moment = state.total[rows, :], state.moment[rows, :]
        shift = jnp.where(old_top == -jnp.inf, 0.0, jnp.maximum(old_top - base, LEAST))
        shrink = jnp.exp(shift)
        moment = (moment + shift * total) * shrink
        total, moment = jax.lax.fori_loop(0, chunks, sums, (total * shrink, moment), unroll=unrolled)
        state.top[rows, :], state.second[rows, :] = top, second
        state.total[rows, :], state.moment[rows, :] = total, moment
        if temperature is None:
            state.token[rows, :] = token
            return carry

        def draw(chunk, carry):
            sampled_score, sampled_logit, token = carry
            value = values[rows, part(chunk)]
            index = first + chunk * LANES + lane
            draws = numerics.gumbel(words[rows, :], index) if noise is None else noise[rows, part(chunk)]
            scaled = value if tempered else value / divisor
            # A banned token stays so, and those past the end have no noise.
            score = jnp.where(hot & (value != -jnp.inf), scaled + draws, scaled)
            better = score > sampled_score
            token, sampled_logit = jnp.where(better, index, token), jnp.where(better, value, sampled_logit)
            return jnp.where(better, score, sampled_score), sampled_logit, token

        def draw_all():
            carry = state.sampled_score[rows, :], state.sampled_logit[rows, :], state.token[rows, :]
            sampled_score, sampled_logit, token = jax.lax.fori_loop(0, chunks, draw, carry)
            state.sampled_score[rows, :], state.sampled_logit[rows, :], state.token[rows, :] = sampled_score, sampled_logit, token

        if noise is None:
            # What no noise can lift above the best so far needs none: most tiles of a row.
            reach = (top if tempered else top / divisor) + jnp.where(hot, numerics.GREATEST_GUMBEL, 0.0)
            best = jnp.max(state.sampled_score[rows, :], axis=1, keepdims=True)
            pl.when(jnp.max(jnp.where(reach > best, 1.0, 0.0)) > 0)(draw_all)
        else:
            draw_all()
        return carry

    # Those of a draw would be code that most tiles skip.
    jax.lax.fori_loop(0, groups, over_rows, 0, unroll=unroll(groups, max(1, UNROLLED // chunks)) if temperature is None else 1)


def finish(
    state,  # State of ROWS rows
    token,  # int32 [ROWS, 1], out; the others float32
    sure,
    entropy,
    logsumexp,
    active,  # float32 [ROWS, 1] | None, 0 where the row has no result
    *,
    vocabulary,
    confidence,
    sampled,
):
    """Reduces over lanes and writes what is asked for."""
    lane_top = state.top[...]
    top = jnp.max(lane_top, axis=1, keepdims=True)
    base = jnp.where(top == -jnp.inf, 0.0, top)
    # A lane of nothing but -inf has total 0.
    shift = jnp.where(lane_top == -jnp.inf, 0.0, jnp.maximum(lane_top - base, LEAST))
    shrink = jnp.exp(shift)
    total = jnp.sum(state.total[...] * shrink, axis=1, keepdims=True)
    moment = jnp.sum((state.moment[...] + shift * state.total[...]) * shrink, axis=1, keepdims=True)

    drawn = state.sampled_score[...] if sampled else lane_top
    tokens = jnp.where(drawn == jnp.max(drawn, axis=1, keepdims=True), state.token[...], jnp.int32(2**31 - 1))
    chosen = jnp.min(tokens, axis=1, keepdims=True)
    value = top
    if sampled:
        value = jnp.max(jnp.where(tokens == chosen, state.sampled_logit[...], -jnp.inf), axis=1, keepdims=True)

    log_total = jnp.log(total)
    h = log_total - moment / total
    if confidence == "probability":
        c = jnp.exp(value - base) / total
    elif confidence == "margin":
        winner = lane_top == top
        after = jnp.max(jnp.where(winner, state.second[...], lane_top), axis=1, keepdims=True)
        after = jnp.where(jnp.sum(jnp.where(winner, 1.0, 0.0), axis=1, keepdims=True) > 1, top, after)
        c = (1 - jnp.exp(after - base)) / total
    else:
        c = -h
    defined = (top > -jnp.inf) & (top < jnp.inf) & (total > 0)
    c, h = jnp.where(defined, c, jnp.nan), jnp.where(defined, h, jnp.nan)
    chosen = jnp.minimum(jnp.maximum(chosen, 0), vocabulary - 1)
    lse = base + log_total
    if active is not None:
        on = active[...] != 0
        chosen, c = jnp.where(on, chosen, -1), jnp.where(on, c, -jnp.inf)
        h, lse = jnp.where(on, h, jnp.inf), jnp.where(on, lse, -jnp.inf)
    token[...], sure[...], entropy[...], logsumexp[...] = chosen, c, h, lse


def words(key_data, counter_row, vocabulary):
    """int32 [R, 4]: each row's key, and the 64-bit counter of its token 0, counter_row * V, as its low and its high word."""
    a, b = counter_row.astype(jnp.uint32), vocabulary
    a_low, a_high, b_low, b_high = a & 0xFFFF, a >> 16, jnp.uint32(b & 0xFFFF), jnp.uint32(b >> 16)
    low, cross, other = a_low * b_low, a_low * b_high, a_high * b_low
    middle = (low >> 16) + (cross & 0xFFFF) + (other & 0xFFFF)
    high = a_high * b_high + (cross >> 16) + (other >> 16) + (middle >> 16)
    words = jnp.stack([key_data[:, 0], key_data[:, 1], (low & 0xFFFF) | (middle << 16), high], axis=1)
    return jax.lax.bitcast_convert_type(words, jnp.int32)


def banned_row(banned, vocabulary):
    """float32 [1, V]: 1 where the token is banned. An id below zero would count from the end, one past it is ignored."""
    places = jnp.where(banned < 0, vocabulary, banned)
    return jnp.zeros((1, vocabulary), jnp.float32).at[0, places].set(1.0, mode="drop")


def lanes(rows, parts):
    """Shapes of the state of each part of a vocabulary, side by side: more lanes to `finish` over."""
    shape = rows, parts * LANES
    return [jax.ShapeDtypeStruct((6, *shape), jnp.float32), jax.ShapeDtypeStruct(shape, jnp.int32)]


def stacked(floats, token):
    """The State in two arrays, as `lanes` has them: each array that a kernel gives costs it scalar work at every step."""
    return State(*(floats.at[i] for i in range(6)), token)


def outputs(rows):
    return [jax.ShapeDtypeStruct((rows, 1), jnp.int32)] + [jax.ShapeDtypeStruct((rows, 1), jnp.float32)] * 3
