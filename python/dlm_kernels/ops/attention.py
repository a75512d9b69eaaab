"""Non-causal fused attention: checks, masks, gradient."""

import functools

import jax
import jax.numpy as jnp

from dlm_kernels import masks
from dlm_kernels.ops import checks, dispatch, sharding

_INPUTS = (("query", "btnh"), ("key", "bskh"), ("value", "bskh"), ("bounds", "bti"), ("dense", "bnts"))
FORWARD = dispatch.Leaf("attention", "attention_forward", _INPUTS, ("btnh", "bnt"), fold="b", sharded="bk")
BACKWARD = dispatch.Leaf(
    "attention",
    "attention_backward",
    (*_INPUTS, ("out", "btnh"), ("lse", "bnt"), ("dout", "btnh"), ("dlse", "bnt")),
    ("btnh", "bskh", "bskh"),
    fold="b",
    sharded="bk",
)


def attention(query, key, value, *, mask=None, scale=None, logits_soft_cap=None, return_lse=False, implementation=None):
    """Scaled dot-product attention of every query to all keys that it may see.

        logits = jnp.einsum("btnh,bsnh->bnts", query, repeat(key, N // K)) * scale
        logits = logits_soft_cap * jnp.tanh(logits / logits_soft_cap)           # if given
        weights = softmax(where(mask, logits, -inf))                            # float32
        out = jnp.einsum("bnts,bsnh->btnh", weights, repeat(value, N // K))

    Arguments:
      query: [B, T, N, H]; key, value: [B, S, K, H]; float32, bfloat16 or float16, all of one dtype. N is a multiple of K:
        query head n reads kv head n // (N // K). H is at most 512.
      mask: None (every query sees every key), a `masks.KeyIntervals`, or a boolean array that broadcasts to [B, N, T, S],
        True where the query sees the key. Intervals cost in proportion to the keys seen; a boolean array is computed by
        the "xla" implementation.
      scale: a number, default H ** -0.5.
      logits_soft_cap: None, or the bound c of c * tanh(logits / c).
      return_lse: also return the natural log-sum-exp of the masked logits.
      implementation: "cpu", "triton", "pallas", "xla", or None to take the one for the platform the call is lowered to; or
        "cudnn", on a GPU, without mask and without gradient, whose lse is as precise as query's dtype.

    Returns [B, T, N, H] in query's dtype, and with return_lse also float32 [B, N, T]. Accumulates in float32. A query that sees no
    key gives zeros and lse -inf, with zero gradients. NaN or infinity in a key or value that no query may see has no effect.
    Differentiable in query, key and value, through lse as well: a first gradient, in reverse mode alone.

    Raises ValueError for shapes, dtypes or masks that do not fit, and where `implementation` cannot run the call.
    Layout and names follow jax.nn.dot_product_attention.
    """
    dispatch.check(implementation)
    query = checks.floats("query", query, "BTNH")
    key, value = checks.floats("key", key, "BSKH"), checks.floats("value", value, "BSKH")
    b, t, n, h = query.shape
    s, k = key.shape[1:3]
    checks.shaped("key", key, (b, s, k, h), f"query's batch and head size; {query.shape=}")
    checks.shaped("value", value, key.shape, "key's shape")
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(f"key, value: expected query's dtype {query.dtype}, got {key.dtype} and {value.dtype}")
    if k == 0 or n % k:
        raise ValueError(f"key: expected a number of heads that divides query's {n}, got {k}")
    if not 0 < h <= 512:
        raise ValueError(f"query: expected a head size from 1 to 512, got {h}")
    scale = h**-0.5 if scale is None else checks.number("scale", scale)
    soft_cap = checks.soft_cap(logits_soft_cap)
    bounds, dense = _canonical_mask(mask, b, n, t, s)
    if 0 in (b, t, n, s):
        out, lse = jnp.zeros_like(query), jnp.full((b, n, t), -jnp.inf, jnp.float32)
    else:
        static = (scale, soft_cap, implementation)
        out, lse = dispatch.differentiable(_attention, static, query, key, value, bounds, dense)
    return (out, lse) if return_lse else out


def _canonical_mask(mask, b, n, t, s):
    """The mask as kernels take it: (bounds int32 [1|B,T,2|4], None), (None, bool [1|B,1|N,1|T,S]) or (None, None)."""
    if mask is None:
        return None, None
    if isinstance(mask, masks.KeyIntervals):
        ends = {}
        for name in ("start", "stop") if mask.start2 is mask.stop2 is None else ("start", "stop", "start2", "stop2"):
            ends[name] = checks.ints(f"mask.{name}", getattr(mask, name), "BT")
            if ends[name].shape not in ((1, t), (b, t)):
                raise ValueError(
                    f"mask.{name}: expected shape [{b} or 1, {t}] (batch, queries), got {list(ends[name].shape)}"
                )
        return masks.bounds(masks.KeyIntervals(**ends), s), None
    dense = checks.array("mask", mask)
    if dense.dtype != jnp.bool_:
        raise ValueError(f"mask: expected masks.KeyIntervals or a boolean array, got dtype {dense.dtype}")
    if dense.ndim > 4 or any(m not in (1, f) for m, f in zip(dense.shape[::-1], (s, t, n, b))):
        raise ValueError(
            f"mask: expected a shape that broadcasts to [{b}, {n}, {t}, {s}] (B, N, T, S), got {list(dense.shape)}"
        )
    dense = dense.reshape((1,) * (4 - dense.ndim) + dense.shape)
    return None, jnp.broadcast_to(dense, (*dense.shape[:3], s))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static, query, key, value, bounds, dense):
    scale, soft_cap, implementation = static
    operands = dict(query=query, key=key, value=value, bounds=bounds, dense=dense)
    return dispatch.call(FORWARD, implementation, operands, scale=scale, logits_soft_cap=soft_cap)


def _attention_fwd(static, query, key, value, bounds, dense):
    out, lse = _attention(static, query, key, value, bounds, dense)
    return (out, lse), (query, key, value, bounds, dense, out, lse)


def _attention_bwd(static, residuals, cotangents):
    scale, soft_cap, implementation = static
    query, key, value, bounds, dense, out, lse = residuals
    dout, dlse = cotangents
    if bounds is not None or dense is not None:
        # Of a query that sees nothing not even NaN may reach the gradients, where 0 times it would.
        seen = lse > -jnp.inf
        query, dout = (jnp.where(seen.swapaxes(1, 2)[..., None], x, 0) for x in (query, dout))
        dlse = jnp.where(seen, dlse, 0)
    operands = dict(
        query=query, key=key, value=value, bounds=bounds, dense=dense, out=out, lse=lse, dout=dout, dlse=dlse
    )
    gradients = dispatch.call(BACKWARD, implementation, operands, scale=scale, logits_soft_cap=soft_cap)
    return (*sharding.typed_as((query, key, value), gradients), None, None)


_attention.defvjp(_attention_fwd, _attention_bwd)
