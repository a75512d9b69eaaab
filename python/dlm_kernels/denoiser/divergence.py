"""The divergence between the vocabulary distributions of two models, from hidden states: no [R, V] array in memory."""

import functools

import jax
import jax.numpy as jnp

CHUNK = 256  # rows whose logits exist at a time: 4 MB each for a vocabulary of 4096


def divergence(hidden, weight, target_hidden, target_weight, weights, *, reverse=False):
    """Forward KL divergence KL(target || model), or with `reverse` KL(model || target), summed over rows.

        p = log_softmax(target_hidden @ target_weight.T)
        q = log_softmax(hidden @ weight.T)
        return sum(weights * sum(exp(p) * (p - q), axis=-1))                    # reverse: exp(q) * (q - p)

    hidden, target_hidden: [R, D]; weight, target_weight: [V, D]; weights: float32 [R], rows with 0 count for nothing. Float32
    inside. The gradient is with respect to hidden and weight alone; both passes make the logits of `CHUNK` rows at a time, of those
    that count.
    """
    r = hidden.shape[0]
    if target_hidden.shape[0] != r or weights.shape != (r,):
        raise ValueError(
            f"target_hidden, weights: expected {r} rows as hidden has, got {target_hidden.shape[0]} and {weights.shape}"
        )
    if weight.shape[0] != target_weight.shape[0]:
        raise ValueError(f"target_weight: expected {weight.shape[0]} entries, got {target_weight.shape[0]}")
    chunks = -(-r // CHUNK)
    counts = jnp.argsort(weights == 0)
    rows = [x[counts] for x in (hidden, jax.lax.stop_gradient(target_hidden), jax.lax.stop_gradient(weights))]
    rows = [jnp.pad(x, [(0, chunks * CHUNK - r)] + [(0, 0)] * (x.ndim - 1)) for x in rows]
    rows = [x.reshape(chunks, CHUNK, *x.shape[1:]) for x in rows]
    target_weight = jax.lax.stop_gradient(target_weight)

    # The backward pass makes a chunk's logits anew instead of keeping them.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def chunk_sum(h, t, w):
        q = jax.nn.log_softmax((h @ weight.T).astype(jnp.float32))
        p = jax.nn.log_softmax((t @ target_weight.T).astype(jnp.float32))
        kl = jnp.sum(jnp.exp(q) * (q - p) if reverse else jnp.exp(p) * (p - q), axis=-1)
        return jnp.sum(w * kl)

    def one_chunk(total, chunk):
        return total + jax.lax.cond(jnp.any(chunk[2] != 0), chunk_sum, lambda *_: jnp.float32(0), *chunk), None

    return jax.lax.scan(one_chunk, jnp.float32(0), rows)[0]
