"""The divergence between two LM heads in plain jax.numpy: the logits exist in memory, whole."""

import jax
import jax.numpy as jnp

from dlm_kernels.xla.cross_entropy import gradients
from dlm_kernels.xla.lm_head import logits_of


def masked_divergence_forward(hidden, weight, target_hidden, target_weight, active):
    """hidden [R,D]; weight [V,D]; target_hidden [R,E]; target_weight [V,E]; active bool [R].

    Returns loss, lse and target_lse, float32 [R]; 0 where inactive.
    """
    (logits, top), (target, target_top) = _from_the_greatest(hidden, weight), _from_the_greatest(target_hidden, target_weight)
    lse, target_lse = jax.nn.logsumexp(logits, axis=-1), jax.nn.logsumexp(target, axis=-1)
    p = jnp.exp(target - target_lse[:, None])
    # What the target excludes counts for nothing, where the difference is infinite too.
    gap = jnp.sum(jnp.where(p == 0, 0, p * (target - logits)), axis=-1)
    return tuple(jnp.where(active, x, 0) for x in (gap + lse - target_lse, lse + top, target_lse + target_top))


def _from_the_greatest(hidden, weight):
    """Logits less the greatest of their row, and that one: by as much as a row is above zero the rounding of p would count."""
    logits = logits_of(hidden, weight)
    top = logits.max(-1)
    top = jnp.where(jnp.isfinite(top), top, 0)
    return logits - top[:, None], top


def masked_divergence_backward(hidden, weight, target_hidden, target_weight, active, lse, target_lse, dloss):
    """lse, target_lse, dloss float32 [R]. Returns dhidden [R,D] and dweight [V,D] in the dtypes of hidden and weight."""
    q = jnp.exp(logits_of(hidden, weight) - lse[:, None])
    p = jnp.exp(logits_of(target_hidden, target_weight) - target_lse[:, None])
    return gradients(hidden, weight, active, (q - p) * dloss[:, None])
