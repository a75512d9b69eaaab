"""Attention in plain jax.numpy: the logits exist in memory, whole."""

import jax.numpy as jnp

from dlm_kernels.xla.soft_cap import bent, capped


def attention_forward(query, key, value, bounds, dense, *, scale, logits_soft_cap):
    """query [B,T,N,H], key and value [B,S,K,H], bounds int32 [1|B,T,2|4] or dense bool [1|B,1|N,1|T,S] or neither.

    Returns out [B,T,N,H] in query's dtype and lse float32 [B,N,T].
    """
    if scale <= 0:
        # Logits are compared before they are scaled.
        query, scale = (-query, -scale) if scale else (query * 0, 1.0)
    b, t, n, h = query.shape
    grouped = query.reshape(b, t, key.shape[2], -1, h)
    visible = _visible(bounds, dense, key.shape)
    key, value = (_without_unseen(x, visible) for x in (key, value))
    logits = jnp.einsum("btkgh,bskh->bkgts", grouped, key, preferred_element_type=jnp.float32)
    logits, factor = (logits, scale) if logits_soft_cap is None else bent(logits * scale, logits_soft_cap)
    if visible is not None:
        logits = jnp.where(visible, logits, -jnp.inf)
    greatest = logits.max(-1, keepdims=True)
    none = jnp.isneginf(greatest)  # a row that sees no key; -inf - -inf would be NaN
    weights = jnp.exp((logits - jnp.where(none, 0, greatest)) * factor)
    total = jnp.where(none, 1, weights.sum(-1, keepdims=True))
    lse = jnp.log(total) + greatest * factor
    weights = weights / total
    out = jnp.einsum("bkgts,bskh->btkgh", weights.astype(value.dtype), value, preferred_element_type=jnp.float32)
    return out.reshape(b, t, n, h).astype(query.dtype), lse.reshape(b, n, t)


def attention_backward(query, key, value, bounds, dense, out, lse, dout, dlse, *, scale, logits_soft_cap):
    """out, dout [B,T,N,H]; lse, dlse float32 [B,N,T]. Returns dquery, dkey, dvalue in the dtypes of query, key, value."""
    b, t, n, h = query.shape
    k, g = key.shape[2], n // key.shape[2]
    visible = _visible(bounds, dense, key.shape)
    seen_key, seen_value = (_without_unseen(x, visible).astype(jnp.float32) for x in (key, value))
    q, o, do = (x.reshape(b, t, k, g, h).astype(jnp.float32) for x in (query, out, dout))
    lse, dlse = lse.reshape(b, k, g, t, 1), dlse.reshape(b, k, g, t, 1)
    logits, slope = capped(jnp.einsum("btkgh,bskh->bkgts", q, seen_key) * scale, logits_soft_cap)
    if visible is not None:
        logits = jnp.where(visible, logits, -jnp.inf)
    # No weight is above 1, but huge logits round by hundreds, and here otherwise than for lse.
    weights = jnp.exp(jnp.minimum(logits - jnp.where(jnp.isneginf(lse), 0, lse), 0))
    dvalue = jnp.einsum("bkgts,btkgh->bskh", weights, do)
    dweights = jnp.einsum("btkgh,bskh->bkgts", do, seen_value)
    delta = jnp.einsum("btkgh,btkgh->bkgt", do, o)[..., None] - dlse
    dlogits = weights * (dweights - delta) * slope * scale
    dquery = jnp.einsum("bkgts,bskh->btkgh", dlogits, seen_key).reshape(query.shape)
    dkey = jnp.einsum("bkgts,btkgh->bskh", dlogits, q)
    return dquery.astype(query.dtype), dkey.astype(key.dtype), dvalue.astype(value.dtype)


def _visible(bounds, dense, key_shape):
    """bool that broadcasts to [B,K,G,T,S], or None where every query sees every key."""
    _, s, k, _ = key_shape
    if dense is not None:
        b, n, t, _ = dense.shape
        return dense.reshape(b, *((k, n // k) if n > 1 else (1, 1)), t, s)
    if bounds is None:
        return None
    keys = jnp.arange(s)
    visible = jnp.zeros((*bounds.shape[:2], s), bool)
    for i in range(0, bounds.shape[-1], 2):
        visible |= (bounds[..., i, None] <= keys) & (keys < bounds[..., i + 1, None])
    return visible[:, None, None]


def _without_unseen(array, visible):
    """[B,S,K,H] with zeros for keys that no query of their kv head sees: their NaN would survive a weight of zero."""
    if visible is None:
        return array
    seen = visible.any(axis=(2, 3))  # [1|B, 1|K, S]
    return jnp.where(seen.swapaxes(1, 2)[..., None], array, 0)
