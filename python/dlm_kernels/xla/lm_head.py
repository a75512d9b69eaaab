"""The LM head and what follows it in plain jax.numpy: the logits exist in memory, whole."""

import jax
import jax.numpy as jnp

from dlm_kernels.xla import unmask


def lm_head_scores(
    hidden,
    weight,
    temperature,
    key_data,
    counter_row,
    noise,
    active,
    banned,
    *,
    confidence,
    tempered_confidence,
    logits_soft_cap,
    logits_dtype,
    vocabulary=None,
):
    """hidden [R,D]; weight [V,D], or as the CPU's kernel has it packed, then with V = vocabulary; the rest and the result as in
    `unmask.score_tokens`.
    """
    if vocabulary is not None:
        panels, steps, panel, together = weight.shape
        rows = weight.transpose(0, 2, 1, 3).reshape(panels * panel, steps * together)
        weight = rows[:vocabulary, : hidden.shape[1]]
    logits = logits_of(hidden, weight)
    if logits_dtype is not None:
        # XLA may drop a pair of casts; this it keeps.
        format = jnp.finfo(logits_dtype)
        logits = jax.lax.reduce_precision(logits, exponent_bits=format.nexp, mantissa_bits=format.nmant)
    return unmask.score_tokens(
        logits,
        None,
        None,
        temperature,
        key_data,
        counter_row,
        noise,
        active,
        banned,
        confidence=confidence,
        tempered_confidence=tempered_confidence,
        logits_soft_cap=logits_soft_cap,
    )


def masked_cross_entropy_forward(hidden, weight, targets, active, *, logits_soft_cap):
    """hidden [R,D]; weight [V,D]; targets int32 [R]; active bool [R]. Returns loss and lse, float32 [R]; loss 0 where inactive."""
    logits, _ = _capped(logits_of(hidden, weight), logits_soft_cap)
    lse = jax.nn.logsumexp(logits, axis=-1)
    known = (targets >= 0) & (targets < weight.shape[0])
    chosen = jnp.take_along_axis(logits, jnp.where(known, targets, 0)[:, None], axis=-1)[:, 0]
    return jnp.where(active, jnp.where(known, lse - chosen, jnp.nan), 0), lse


def masked_cross_entropy_backward(hidden, weight, targets, active, lse, dloss, *, logits_soft_cap):
    """lse, dloss float32 [R]. Returns dhidden [R,D] and dweight [V,D] in the dtypes of hidden and weight."""
    logits, slope = _capped(logits_of(hidden, weight), logits_soft_cap)
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


def logits_of(hidden, weight):
    return jnp.einsum("rd,vd->rv", hidden, weight, preferred_element_type=jnp.float32)


def _capped(logits, logits_soft_cap):
    """The capped logits and the slope of the cap at them."""
    if logits_soft_cap is None:
        return logits, 1.0
    bent = jnp.tanh(logits / logits_soft_cap)
    return logits_soft_cap * bent, 1 - bent * bent
