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
        kept = jnp.finfo(logits_dtype)
        normal = jax.lax.reduce_precision(logits, exponent_bits=kept.nexp, mantissa_bits=kept.nmant)
        # Below the least normal it gives 0, and a sum with this has the step of what is there.
        coarse = float(kept.smallest_subnormal) * 2**23
        small = jnp.abs(logits) < float(kept.smallest_normal)
        logits = jnp.where(small, (logits + coarse) - coarse, normal) if kept.nexp < 8 else normal
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


def logits_of(hidden, weight):
    return jnp.einsum("rd,vd->rv", hidden, weight, preferred_element_type=jnp.float32)
