"""The soft cap of logits, c * tanh(logits / c), in plain jax.numpy."""

import jax.numpy as jnp


def bent(logits, logits_soft_cap):
    """What lacks only a factor of the capped logits, and the factor.

    Multiplied early, XLA fuses the product with what is subtracted from it. Then the greatest logit is no longer at zero distance
    from itself, and at a low temperature the exponential of what is left is infinite.
    """
    return (logits, 1.0) if logits_soft_cap is None else (jnp.tanh(logits / logits_soft_cap), logits_soft_cap)


def capped(logits, logits_soft_cap):
    """The capped logits and the slope of the cap at them."""
    if logits_soft_cap is None:
        return logits, 1.0
    bent_logits, factor = bent(logits, logits_soft_cap)
    return factor * bent_logits, 1 - bent_logits * bent_logits
