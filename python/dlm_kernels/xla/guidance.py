"""Guidance mixing in plain jax.numpy."""

import jax.numpy as jnp


def mix_guidance(conditional, unconditional, scale):
    """conditional, unconditional [R,V]; scale float32 [R]. Returns [R,V] in conditional's dtype."""
    return mix(conditional, unconditional, scale).astype(conditional.dtype)


def mix(conditional, unconditional, scale):
    """The same in float32, not yet rounded."""
    c, u, s = conditional.astype(jnp.float32), unconditional.astype(jnp.float32), scale[:, None]
    banned = jnp.isneginf(c) | jnp.isneginf(u)
    # The inner choice keeps the product apart from the sum: fused in one place and not in another, the greatest logit would be at
    # a distance from itself, of which a low temperature makes an infinite exponential.
    mixed = jnp.where(banned, -jnp.inf, u + jnp.where(banned, 0, s * (c - u)))
    return jnp.where(s == 1, c, jnp.where(s == 0, u, mixed))


def combine_guidance(logits, weights):
    """logits [C,R,V]; weights float32 [C,R]. Returns [R,V] in the dtype of logits."""
    total = 0.0
    banned = False
    for stream, weight in zip(logits.astype(jnp.float32), weights[:, :, None]):
        total += jnp.where(weight == 0, 0, weight * stream)
        banned |= (weight != 0) & jnp.isneginf(stream)
    return jnp.where(banned, -jnp.inf, total).astype(logits.dtype)
