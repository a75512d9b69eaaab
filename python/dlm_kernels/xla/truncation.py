"""The most likely tokens alone, in plain jax.numpy: a bisection for the least that is kept, a bit of its key at a time."""

import jax
import jax.numpy as jnp


def truncate_logits(logits, inverse_temperature, top_p, top_k):
    """logits [R,V]; inverse_temperature, top_p float32 [R]; top_k int32 [R]. Returns [R,V] in the dtype of logits."""
    key, bits = ordered(logits)
    top = logits.max(-1, keepdims=True).astype(jnp.float32)
    if top_p is not None:
        mass = jnp.exp((logits.astype(jnp.float32) - top) * inverse_temperature[:, None])
        wanted = jnp.where(top_p >= 1, jnp.inf, top_p * mass.sum(-1))

    def kept(least):
        """Whether a token of this key is kept: [R]. Of a greater key all are."""
        above = key > least[:, None]
        enough = jnp.ones(least.shape, bool)
        if top_p is not None:
            enough &= jnp.where(above, mass, 0).sum(-1) < wanted
        if top_k is not None:
            enough &= above.sum(-1, dtype=jnp.int32) < top_k
        return enough

    def step(i, least):
        """`least` is 0 in the bits that are not known yet; where its next bit may be 0, all keys with that one 0 are above it."""
        bit = (jnp.array(1, key.dtype) << jnp.asarray(bits - 1 - i, key.dtype)).astype(key.dtype)
        return jnp.where(kept(least | (bit - 1)), least, least | bit)

    least = jax.lax.fori_loop(0, bits, step, jnp.zeros_like(key[:, 0]))
    least = jnp.minimum(least, key.max(-1))  # the most likely is kept whatever top_p and top_k are
    undefined = ~(top < jnp.inf) | (top == -jnp.inf)
    return jnp.where((key >= least[:, None]) | undefined, logits, -jnp.inf)


def ordered(logits):
    """(Unsigned integers that are ordered as the numbers are, of as many bits; how many bits.) 0 and -0 are the same."""
    bits = 8 * logits.dtype.itemsize
    unsigned = jnp.dtype(f"uint{bits}")
    raw = jax.lax.bitcast_convert_type(jnp.where(logits == 0, 0, logits), unsigned)
    sign = jnp.array(1 << (bits - 1), unsigned)
    return jnp.where(raw & sign != 0, ~raw, raw | sign), bits
