"""The training loss of an LM head's logits in plain jax.numpy: the logits exist in memory, whole."""

import jax
import jax.numpy as jnp

from dlm_kernels.xla.lm_head import logits_of
from dlm_kernels.xla.soft_cap import capped


def masked_cross_entropy_forward(hidden, weight, targets, active, *, logits_soft_cap):
    """hidden [R,D]; weight [V,D]; targets int32 [R]; active bool [R]. Returns loss and lse, float32 [R]; 0 where inactive."""
    logits, _ = capped(logits_of(hidden, weight), logits_soft_cap)
    lse = jax.nn.logsumexp(logits, axis=-1)
    known = (targets >= 0) & (targets < weight.shape[0])
    chosen = jnp.take_along_axis(logits, jnp.where(known, targets, 0)[:, None], axis=-1)[:, 0]
    return jnp.where(active, jnp.where(known, lse - chosen, jnp.nan), 0), jnp.where(active, lse, 0)


def masked_cross_entropy_backward(hidden, weight, targets, active, lse, dloss, *, logits_soft_cap):
    """lse, dloss float32 [R]. Returns dhidden [R,D] and dweight [V,D] in the dtypes of hidden and weight."""
    logits, slope = capped(logits_of(hidden, weight), logits_soft_cap)
    p = jnp.exp(logits - lse[:, None])
    dlogits = (p - jax.nn.one_hot(targets, weight.shape[0], dtype=jnp.float32)) * dloss[:, None] * slope
    return gradients(hidden, weight, active, dlogits)


def gradients(hidden, weight, active, dlogits):
    """dhidden [R,D] and dweight [V,D], in the dtypes of hidden and weight, from those of the logits, float32 [R,V]."""
    dlogits = jnp.where(active[:, None], dlogits, 0)
    # Zeros times a NaN of an inactive row would still be NaN.
    hidden_seen = jnp.where(active[:, None], hidden, 0)
    dhidden = jnp.einsum("rv,vd->rd", dlogits, weight.astype(jnp.float32))
    dweight = jnp.einsum("rv,rd->vd", dlogits, hidden_seen.astype(jnp.float32))
    return dhidden.astype(hidden.dtype), dweight.astype(weight.dtype)
