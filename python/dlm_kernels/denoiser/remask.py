"""Which committed tokens are masked anew after a pass: the least confident share of them, or at random by ReMDM's rules."""

import jax
import jax.numpy as jnp

from dlm_kernels.denoiser import blocks, guided, model

RULES = ("least", "cap", "rescale", "confidence")


def sigma(rule, strength, before, after):
    """The probability that a committed token is masked anew, where a share `before`, then `after`, of the block is committed.

        most = min(1, (1 - after) / before)                                     # more would leave too few in expectation
        "cap": min(strength, most); "rescale" and "confidence": strength * most

    Source: ReMDM (Wang et al. 2025).
    """
    most = jnp.minimum((1 - after) / jnp.maximum(before, 1e-6), 1.0)
    return jnp.minimum(strength, most) if rule == "cap" else strength * most


def remask(config, rule, data, decoded, inside, at, index, step):
    """Masks anew some of what earlier passes wrote in the block, unless this was its last pass.

    inside: bool [B, block], the block's holes; at: int32 [B], the window's first column. "least": the share data["remask"] of the
    tokens, rounded down, the least confident when written. The others draw: with `sigma`, and under "confidence" times
    softmax(-confidence) over the tokens, so that a block loses less than one a pass.
    """
    block = inside.shape[1]
    tokens, revealed, confidence = (model.read_window(x, at, block) for x in decoded[:3])
    known = inside & (tokens != config.mask_id) & (revealed < decoded.passes - 1)
    strength, steps = data["remask"], jnp.asarray(data["steps"], jnp.float32)
    if rule == "least":
        count = jnp.where(step < data["steps"] - 1, jnp.floor(strength * known.sum(1)), 0)
        chosen = guided.least_confident(known, confidence, count)
    else:
        p = sigma(rule, strength, step / steps, (step + 1) / steps) * known
        if rule == "confidence":
            doubt = jnp.where(known, -jnp.nan_to_num(confidence, nan=0.0), -jnp.inf)
            weights = jnp.exp(doubt - jnp.where(known.any(1), doubt.max(1), 0)[:, None])
            p *= weights / jnp.maximum(weights.sum(1, keepdims=True), 1e-30)
        # 1 sets these draws apart from the samples'.
        keys = blocks.row_keys(data["key"], index, step, 1)
        chosen = jax.vmap(lambda key: jax.random.uniform(key, (block,)))(keys) < p
    tokens = jnp.where(chosen & known, config.mask_id, tokens)
    return decoded._replace(tokens=model.write_window(decoded.tokens, tokens, at))
