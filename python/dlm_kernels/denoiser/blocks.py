"""What the decoders share: a canvas of given tokens and holes, which are filled block after block, from left to right."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dlm_kernels.denoiser import model


class Decoded(NamedTuple):
    tokens: jax.Array  # int32 [B, L]
    revealed: jax.Array  # int32 [B, L], the pass, from 0, that last wrote the position; -1 where it was given
    confidence: jax.Array  # float32 [B, L], of that pass; 1 where the token was given
    passes: jax.Array  # int32, forward passes made


def untouched(tokens):
    """A Decoded before the first pass."""
    return Decoded(
        tokens, jnp.full(tokens.shape, -1, jnp.int32), jnp.ones(tokens.shape, jnp.float32), jnp.zeros((), jnp.int32)
    )


def row_columns(config, tokens, start, first, stop, **more):
    """{name: int32 [B]}: a row is [start, stop) and its blocks are counted from `first`; stop None is the canvas's end.

    Where the model attends by blocks `first` moves to the beginning of the one that it is in.
    """
    if config.block_size is not None:
        first = jnp.asarray(first) - (jnp.asarray(first) - jnp.asarray(start)) % config.block_size
    given = dict(start=start, first=first, stop=tokens.shape[1] if stop is None else stop, **more)
    return {name: jnp.broadcast_to(jnp.asarray(x, jnp.int32), tokens.shape[:1]) for name, x in given.items()}


def whole_apart(config, begin, end):
    """Whether known columns lie whole blocks of the model's apart, as all do without any. JAX's own arrays, not read here, pass."""
    if config.block_size is None or any(isinstance(column, jax.Array) for column in (begin, end)):
        return True
    return not ((np.asarray(end) - np.asarray(begin)) % config.block_size).any()


def holes(config, tokens, columns):
    """bool [B, L]: what a decoder has to write."""
    column = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    return (tokens == config.mask_id) & (columns["start"][:, None] <= column) & (column < columns["stop"][:, None])


def next_block(todo, first, block):
    """int32 [B]: each row's first block with anything `todo`, bool [B, L]; L in a row without."""
    length = todo.shape[1]
    return jnp.where(todo, (jnp.arange(length, dtype=jnp.int32) - first[:, None]) // block, length).min(1)


def window(todo, first, block, index):
    """The window [B, block] of columns that holds the block `index`, [] or [B]: its first column `at`, int32 [B], and what in it
    is `todo`, bool [B, L], and of that block. At the canvas's edge it reaches back before the block.
    """
    begin = first + index * block
    at = jnp.clip(begin, 0, todo.shape[1] - block)
    column = at[:, None] + jnp.arange(block)
    return at, (begin[:, None] <= column) & (column < begin[:, None] + block) & model.read_window(todo, at, block)


def opened(config, start, at, todo, inside):
    """`inside`, or where the token that begins a block of a shifted model is still `todo`, both bool [B, block], that one alone.

    Its state is the last of the block before, which is finished, and sees nothing of its own block; all others there see it.
    Source: Fast-dLLM v2, whose pass that commits a block also writes the first token of the next.
    """
    if not leads(config):
        return inside
    position = at[:, None] - start[:, None] + jnp.arange(todo.shape[1])
    begins = todo & (position % config.block_size == 0)
    return jnp.where(begins.any(1, keepdims=True), begins, inside)


def leads(config):
    """Whether `opened` has anything to say."""
    return config.shifted and config.block_size is not None


def put(array, values, where, at):
    """array [B, L] with `values` [B, block] in the window at `at` [B], `where` that is true."""
    return model.write_window(array, jnp.where(where, values, model.read_window(array, at, where.shape[1])), at)


def row_keys(keys, *numbers):
    """A key for each row [B], of its own and these numbers alone: a row draws the same in any batch."""
    return jax.vmap(lambda key: functools.reduce(jax.random.fold_in, numbers, key))(keys)


def banned_ids(config, more=None, *, moves=False):
    """int32: what no model here may write, and `more`. Where one id is pad and end-of-text at once it is banned as neither.

    moves: what deletes and inserts tokens may be chosen.
    """
    own = [config.mask_id] + [config.pad_id] * (config.pad_id != config.eos_id)
    if config.delete_id is not None and not moves:
        own += [config.delete_id, config.insert_id]
    return jnp.concatenate([jnp.asarray(own, jnp.int32), jnp.asarray([] if more is None else more, jnp.int32)])


def end_rows(config, stop_at, tokens, hole):
    """`tokens`, padded behind each row's first stop token once nothing before that token is masked."""
    if stop_at is None:
        return tokens
    ends = hole & jnp.isin(tokens, stop_at)
    open_before = jnp.cumsum(hole & (tokens == config.mask_id), axis=1) > 0
    ended = jnp.cumsum(ends & ~open_before, axis=1) - (ends & ~open_before) > 0
    return jnp.where(ended & hole, config.pad_id, tokens)
