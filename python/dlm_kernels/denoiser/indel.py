"""Edits that move tokens: a model that has learnt it may delete a token of a block, or insert one, as LLaDA2.2 does."""

import jax.numpy as jnp


def apply(config, tokens, before, inside, *moved):
    """`tokens` with their deletions and insertions made, and the arrays `moved` in which each place is that of its token.

        for i in places of the block, in order:
            if tokens[i] == delete_id: continue
            if tokens[i] == insert_id: made += [mask_id, before[i]]
            else: made += [tokens[i]]
        block[:] = (made + [mask_id, mask_id, ...])[: len(block)]

    tokens, before: int32 [B, T], after a pass and before it; inside: bool [B, T], the block's places, of which a row writes these
    alone. moved: pairs (array [B, T], what a mask that comes new has). Returns (tokens, *arrays), all [B, T]. What is pushed over
    the block's end is lost. Source: `_apply_edit_operations_with_tracking` of LLaDA2.2's modeling_llada2_moe.py.
    """
    length = tokens.shape[1]
    deleted, inserting = (inside & (tokens == i) for i in (config.delete_id, config.insert_id))
    size = jnp.where(inside, 1 + inserting - deleted, 0)  # what each place becomes
    # Of each place of the block, counted among those inside, what stands there and where it comes from.
    begin = jnp.cumsum(size, axis=1) - size
    own = jnp.where(inside & ~deleted, begin + inserting, length)  # behind the mask that it inserts
    column = jnp.broadcast_to(jnp.arange(length), tokens.shape)
    row = jnp.arange(len(tokens))[:, None]
    comes_from = jnp.full(tokens.shape, length).at[row, own].set(column, mode="drop")
    place = jnp.cumsum(inside, axis=1) - 1

    def made(array, new):
        padded = jnp.concatenate([array, jnp.full((len(array), 1), new, array.dtype)], axis=1)
        of_place = jnp.take_along_axis(padded, comes_from, axis=1)
        return jnp.where(inside, jnp.take_along_axis(of_place, jnp.maximum(place, 0), axis=1), array)

    return made(jnp.where(inserting, before, tokens), config.mask_id), *(made(array, new) for array, new in moved)
