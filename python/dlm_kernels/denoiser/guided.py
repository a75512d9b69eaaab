"""Classifier-free guidance while decoding: how strong it is where, and what the unconditional stream reads."""

import jax.numpy as jnp

from dlm_kernels.denoiser import model


def scale(data, todo, inside, at):
    """The guidance scale of every position of the window, float32 [B, block]; 1 outside of the interval.

    todo: what is still masked of `inside`, the block's holes, both bool [B, block]; at: the window's first column, int32 [B].
    """
    given = data["guidance_scale"]
    scale = model.read_window(given, at, todo.shape[1]) if given.ndim == 2 else given[..., None]
    scale = jnp.broadcast_to(scale, todo.shape)
    share = (todo.sum(1) / jnp.maximum(inside.sum(1), 1))[:, None]
    if data["guidance_final"] is not None:
        final = data["guidance_final"][..., None]
        scale = final + (scale - final) * share
    if data["guidance_interval"] is not None:
        low, high = (x[..., None] for x in data["guidance_interval"])
        scale = jnp.where((low <= share) & (share <= high), scale, 1.0)
    return scale


def least_confident(known, confidence, count):
    """bool [B, L]: the count [B] least confident of the positions `known`, the first of equals; NaN is no confidence at all."""
    sure = jnp.where(known, jnp.where(jnp.isnan(confidence), -jnp.inf, confidence), jnp.inf)
    position = jnp.arange(sure.shape[1])
    before = (sure[:, None, :] < sure[:, :, None]) | (
        (sure[:, None, :] == sure[:, :, None]) & (position < position[:, None])
    )
    return known & (before.sum(-1) < count[:, None])


def without_doubtful(config, share, decoded, hole):
    """The tokens, the least confident `share` of those decoded so far (at least one, if any) masked anew."""
    known = hole & (decoded.tokens != config.mask_id)
    count = jnp.maximum(jnp.floor(share * known.sum(1)), 1)
    return jnp.where(least_confident(known, decoded.confidence, count), config.mask_id, decoded.tokens)
