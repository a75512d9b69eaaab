"""The divergence between two LM heads in plain jax.numpy: the logits exist in memory, whole."""

import jax
import jax.numpy as jnp


def masked_divergence_forward(hidden, weight, target_hidden, target_weight, active):
    """hidden [R,D]; weight [V,D]; target_hidden [R,E]; target_weight [V,E]; active bool [R].

    Returns loss, lse and target_lse, float32 [R]; loss 0 where inactive.
    """
    logits, target = _logits(hidden, weight), _logits(target_hidden, target_weight)
    lse, target_lse = jax.nn.logsumexp(logits, axis=-1), jax.nn.logsumexp(target, axis=-1)
    p = jnp.exp(target - target_lse[:, None])
    # What the target excludes counts for nothing, where the difference is infinite too.
    gap = jnp.sum(jnp.where(p == 0, 0, p * (target - logits)), axis=-1)
    return jnp.where(active, gap + lse - target_lse, 0), lse, target_lse


def masked_divergence_backward(hidden, weight, target_hidden, target_weight, active, lse, target_lse, dloss):
    """lse, target_lse, dloss float32 [R]. Returns dhidden [R,D] and dweight [V,D] in the dtypes of hidden and weight."""
    q = jnp.exp(_logits(hidden, weight) - lse[:, None])
    p = jnp.exp(_logits(target_hidden, target_weight) - target_lse[:, None])
    dlogits = jnp.where(active[:, None], (q - p) * dloss[:, None], 0)
    # Zeros times a NaN of an inactive row would still be NaN.
    hidden_seen = jnp.where(active[:, None], hidden, 0)
    dhidden = jnp.einsum("rv,vd->rd", dlogits, weight.astype(jnp.float32))
    dweight = jnp.einsum("rv,rd->vd", dlogits, hidden_seen.astype(jnp.float32))
    return dhidden.astype(hidden.dtype), dweight.astype(weight.dtype)


def _logits(hidden, weight):
    return jnp.einsum("rd,vd->rv", hidden, weight, preferred_element_type=jnp.float32)
