"""The hidden states of the window that a pass decodes: of one stream or two, with a cache or without, and what steers them."""

import functools

import jax
import jax.numpy as jnp

from dlm_kernels import masks
from dlm_kernels.denoiser import classifier as classifiers
from dlm_kernels.denoiser import guided, model


def both(static, params, columns, data, state, hole, index, step, at):
    """Hidden states of the window at `at` [B], under guidance of both streams: [B or 2B, block, D]; both states of the carry."""
    tokens, start, stop, first = state.decoded.tokens, columns["start"], columns["stop"], columns["first"]
    window = functools.partial(_window_states, static, params, data, state.index, index, step)
    every = data["guidance_refresh"]
    if data["guidance_scale"] is None:
        return *window(1, state.cache, tokens, start, first, stop, at), ()
    if data["guidance_remask"] is not None:
        other = guided.without_doubtful(static.config, data["guidance_remask"], state.decoded, hole)
    else:
        other = jnp.where(hole, tokens, data["unconditional"])
    if every is None:
        rows = (tokens, other), (start, columns["unconditional_start"]), (first, first), (stop, stop), (at, at)
        return *window(1, state.cache, *map(jnp.concatenate, rows)), ()
    hidden, cache = window(1, state.cache, tokens, start, first, stop, at)
    # A block's first pass is always one of these, so the cache of a block-causal model misses no block.
    kept = jax.lax.cond(
        step % every == 0,
        lambda kept: window(every, kept[1], other, columns["unconditional_start"], first, stop, at),
        lambda kept: kept,
        state.other,
    )
    return jnp.concatenate([hidden, kept[0]]), cache, kept


def towards_wanted(static, params, columns, data, tokens, at):
    """What classifier guidance adds to the window's hidden states, [B, block, D]."""
    start, stop, length = columns["start"], columns["stop"], tokens.shape[1]
    column = jnp.arange(length, dtype=jnp.int32)
    seen = (start[:, None] <= column) & (column < stop[:, None])
    towards = classifiers.direction(
        static.config, params, data["classifier"], tokens, seen, **model.within(start, stop, length),
        implementation=static.implementation,
    )  # fmt: skip
    return model.read_window(towards, at, static.block) * data["classifier_scale"][..., None, None]


def _window_states(static, params, data, before, index, step, every, cache, tokens, starts, first, stop, at):
    """Hidden states [rows, block, D] of the window at `at` [rows], and the cache.

    before: int32, the block of the last pass; every: the stream is computed in every so many passes of a block.
    """
    config, block, seen, implementation = static.config, static.block, static.seen, static.implementation
    length = tokens.shape[1]

    def where(begin, size):
        """Positions (a row's start is 0) and mask of the columns [begin, begin + size)."""
        column = begin[:, None] + jnp.arange(size, dtype=jnp.int32)
        end = jnp.broadcast_to(stop[:, None], column.shape)
        if seen is not None and config.block_size is None:  # else `model` sees to it
            end = jnp.minimum(end, first[:, None] + ((column - first[:, None]) // seen + 1) * seen)
        begin = jnp.broadcast_to(starts[:, None], column.shape)
        return dict(positions=column - begin, mask=masks.KeyIntervals(begin, end), implementation=implementation)

    if not static.cached:
        hidden = model.hidden_states(config, params, tokens, **where(jnp.zeros_like(at), length))
        return model.read_window(hidden, at, block), []

    def computed(size, end):
        """Computes `size` columns up to `end` [rows]."""
        size = min(size + config.shifted, length)

        def run(cache):
            begin = jnp.clip(end - size, 0, length - size)
            part = model.read_window(tokens, begin, size)
            hidden, cache = model.cached_states(config, params, part, cache, begin, **where(begin, size))
            return model.read_window(hidden, at - begin, block), cache

        return run

    if seen is None:
        # Whether a renewal was due in this pass, or in one that the stream was not computed in.
        end = at + block
        return jax.lax.cond(step % data["refresh"] < every, computed(length, end), computed(block, end), cache)
    # What is decoded at once may be a part of a block that attends to itself: all of that is computed, for its keys change with it.
    index, before = (i // max(seen // block, 1) for i in (index, before))
    end = jnp.minimum(first + (index + 1) * seen, length)
    # A block's first pass also commits the block before it, whose keys were last computed with masks among its tokens. What
    # lies further back is in the cache already, unless given blocks were skipped: then as at the very start, everything.
    way = jnp.where(index == before, 0, jnp.where(index == before + 1, 1, 2))
    return jax.lax.switch(way, [computed(seen, end), computed(2 * seen, end), computed(length, end)], cache)
