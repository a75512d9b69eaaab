"""Attention: csrc/attention.cc and csrc/attention_backward.cc."""

import jax

from dlm_kernels import cpu_kernels


def supports_attention_forward(query, key, value, bounds, dense, *, scale, logits_soft_cap):
    return None if dense is None else "it takes masks as key intervals (masks.KeyIntervals), not as a boolean array"


def attention_forward(query, key, value, bounds, dense, *, scale, logits_soft_cap):
    """query [B,T,N,H]; key, value [B,S,K,H]; bounds int32 [1|B,T,2|4] or None. Returns out [B,T,N,H] and lse float32 [B,N,T]."""
    b, t, n, _ = query.shape
    outputs = cpu_kernels.like(query), jax.ShapeDtypeStruct((b, n, t), "float32")
    options = dict(scale=cpu_kernels.number(scale), soft_cap=cpu_kernels.number(logits_soft_cap))
    return cpu_kernels.run("attention_forward", outputs, query, key, value, bounds, **options)


def supports_attention_backward(query, key, value, bounds, dense, out, lse, dout, dlse, *, scale, logits_soft_cap):
    return supports_attention_forward(query, key, value, bounds, dense, scale=scale, logits_soft_cap=logits_soft_cap)


def attention_backward(query, key, value, bounds, dense, out, lse, dout, dlse, *, scale, logits_soft_cap):
    """out, dout [B,T,N,H]; lse, dlse float32 [B,N,T]; the others as in `attention_forward`. Returns dquery, dkey, dvalue."""
    outputs = cpu_kernels.like(query), cpu_kernels.like(key), cpu_kernels.like(value)
    operands = query, key, value, bounds, out, lse, dout, dlse
    options = dict(scale=cpu_kernels.number(scale), soft_cap=cpu_kernels.number(logits_soft_cap))
    return cpu_kernels.run("attention_backward", outputs, *operands, **options)
