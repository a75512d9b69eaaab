"""The soft embedding, the mean under the LM head's distribution: for self-conditioning, with no probabilities in memory."""

import functools
import numbers

import jax
import jax.numpy as jnp
import numpy as np

from dlm_kernels.ops import checks, dispatch, sharding
from dlm_kernels.ops.attention import attention

LEAST = float(jnp.finfo(jnp.float32).min)  # the maximum before the first chunk: of -inf the temperature's gradient would be NaN
CHUNK = 4096  # vocabulary entries whose logits exist at a time, where attention does not serve
HEAD_SIZE = 256  # the greatest that the attention kernels of every platform, their gradients too, take in every dtype


def soft_embedding(hidden, weight, *, embedding=None, temperature=1.0, logits_soft_cap=None, implementation=None):
    """What a model expects of the embedding at each position.

        logits = jnp.einsum("bld,vd->blv", hidden, weight)
        logits = logits_soft_cap * jnp.tanh(logits / logits_soft_cap)           # with a cap
        return jnp.einsum("blv,ve->ble", softmax(logits / temperature), embedding)

    Arguments:
      hidden: [B, L, D]; weight: [V, D]; embedding: [V, E], default weight (tied); one dtype, float32, bfloat16 or float16.
      temperature: a scalar above 0, traced or not.
      implementation: as in `attention`, which with hidden as queries and the vocabulary as keys and values computes this where D
        and E are equal, at most 256; where they are not, and for "xla", the vocabulary is streamed in chunks, by plain XLA.

    Returns [B, L, E] in hidden's dtype; accumulates in float32. Differentiable, in reverse and once, as `attention` is. Raises
    ValueError for arguments that do not fit, and where an explicit `implementation` cannot run the call.
    Source: DiffusionGemma's self-conditioning.
    """
    dispatch.check(implementation)
    hidden, weight = checks.floats("hidden", hidden, "BLD"), checks.floats("weight", weight, "VD")
    embedding = weight if embedding is None else checks.floats("embedding", embedding, "VE")
    (b, length, _), (v, e) = hidden.shape, embedding.shape
    checks.head("hidden", hidden, "weight", weight.shape, weight.dtype)
    if v != weight.shape[0]:
        raise ValueError(f"embedding: expected shape [{weight.shape[0]}, E], as many entries as weight, got {[v, e]}")
    if embedding.dtype != hidden.dtype:
        raise ValueError(f"embedding: expected hidden's dtype {hidden.dtype}, got {embedding.dtype}")
    if not isinstance(temperature, numbers.Real):
        temperature = checks.shaped("temperature", checks.numbers("temperature", temperature), (), "a scalar")
    elif not np.float32(temperature) > 0:
        raise ValueError(f"temperature: expected a number above 0, got {temperature}")
    soft_cap = checks.soft_cap(logits_soft_cap)
    if hidden.size == 0:
        return jnp.zeros((b, length, e), hidden.dtype)
    reason = attention_cannot(hidden, e, temperature, soft_cap)
    if reason is None and implementation != "xla":
        if isinstance(temperature, numbers.Real):
            scale, soft_cap = float(1 / temperature), None if soft_cap is None else soft_cap / temperature
        else:
            hidden, scale = hidden / temperature, 1.0
        return _by_attention(hidden, weight, embedding, scale, soft_cap, implementation)
    if implementation not in (None, "xla"):
        raise ValueError(f"implementation={implementation!r} cannot run soft_embedding: {reason}")
    return _by_chunks(hidden, weight, embedding, jnp.asarray(temperature, jnp.float32), soft_cap)


def attention_cannot(hidden, e, temperature, soft_cap):
    """Why attention does not compute the call, or None. hidden: an array, or a tensor of torch."""
    d = hidden.shape[-1]
    if d != e or d > HEAD_SIZE:
        return f"it takes equal widths of at most {HEAD_SIZE}, got {d} and {e}"
    if isinstance(temperature, numbers.Real):
        factors = 1 / temperature, 1 if soft_cap is None else soft_cap / temperature
        fits = all(1e-30 <= factor <= 1e30 for factor in factors)
        return None if fits else f"at temperature {temperature} it would multiply by numbers beyond float32"
    if soft_cap is not None:
        return "with a soft cap it takes a temperature that is a Python number"
    # The queries have to be divided by it, which rounds them once more.
    return None if hidden.dtype == jnp.float32 else "for a temperature that is an array it takes float32"


def last_factor(xp, temperature, soft_cap):
    """Of the soft cap and the temperature, what the differences of logits are multiplied by, after the greatest is subtracted:
    before, their rounding would be multiplied too. A normal number even for the least temperature and for infinity, as in
    `truncation.inverse`. xp: jax.numpy, or torch.
    """
    bounds = xp.finfo(xp.float32)
    return xp.clip((1 if soft_cap is None else soft_cap) / temperature, bounds.tiny, bounds.max)


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _by_attention(hidden, weight, embedding, scale, soft_cap, implementation):
    # The batch stays split: on several TPUs attention takes its kernel only for arrays that explicit axes split.
    rows = sharding.whole(hidden, 1).reshape(-1, hidden.shape[-1])
    query, key, value = (x[None, :, None] for x in (rows, weight, embedding))
    out = attention(query, key, value, scale=scale, logits_soft_cap=soft_cap, implementation=implementation)
    return out[0, :, 0].reshape(hidden.shape)


@functools.partial(jax.jit, static_argnums=4)
def _by_chunks(hidden, weight, embedding, temperature, soft_cap):
    """[B, L, E] of hidden [B, L, D], with a running maximum over chunks of the vocabulary."""
    hidden, weight, embedding = sharding.whole(hidden, 2), sharding.whole(weight), sharding.whole(embedding)
    v, factor = embedding.shape[0], last_factor(jnp, temperature, soft_cap)

    # The backward pass makes a chunk's logits anew; keeping them all would be the matrix that this avoids.
    @functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=(2,))
    def add(state, begin, size):
        most, total, mean = state
        # Behind the barrier: of 16 bits XLA on a CPU would widen all of them, in front of the loop.
        *matrices, begin = jax.lax.optimization_barrier((weight, embedding, begin))
        keys, values = (jax.lax.dynamic_slice_in_dim(x, begin, size) for x in matrices)
        logits = jnp.einsum("bld,vd->blv", hidden, keys, preferred_element_type=jnp.float32)
        logits = logits if soft_cap is None else jnp.tanh(logits / soft_cap)
        new = jax.lax.stop_gradient(jnp.maximum(most, logits.max(-1)))
        p, keep = jnp.exp((logits - new[..., None]) * factor), jnp.exp((most - new) * factor)
        added = jnp.einsum("blv,ve->ble", p, values.astype(jnp.float32))
        return new, total * keep + p.sum(-1), mean * keep[..., None] + added

    # The first chunk, the smaller one, makes the state that the scan carries: explicit axes split it as they split hidden.
    first = v % CHUNK or CHUNK
    state = add((LEAST, 0.0, 0.0), 0, first)
    if v > CHUNK:
        state, _ = jax.lax.scan(lambda s, begin: (add(s, begin, CHUNK), None), state, jnp.arange(first, v, CHUNK))
    _, total, mean = state
    return (mean / total[..., None]).astype(hidden.dtype)
