"""Attention and its gradient in float64, one head and one query at a time."""

import numpy as np


def seen_keys(bounds, dense, b, head, t, s):
    """bool [S]: the keys that query t of this batch entry and head sees."""
    seen = np.ones(s, bool)
    if bounds is not None:
        ends = bounds[b if len(bounds) > 1 else 0, t]
        seen[:] = False
        for start, stop in zip(ends[::2], ends[1::2]):
            seen[max(start, 0) : max(stop, 0)] = True
    if dense is not None:
        # An axis of size 1 stands for all.
        seen &= dense[b % dense.shape[0], head % dense.shape[1], t % dense.shape[2]]
    return seen


def _rows(query, key, value, bounds, dense, scale, logits_soft_cap):
    """Yields for every query that sees a key: its place, what it sees, logits [seen], the slope of the cap at them, and their
    log-sum-exp.
    """
    b, t, n, _ = query.shape
    groups = n // key.shape[2]
    for batch, row, head in np.ndindex(b, t, n):
        seen = np.flatnonzero(seen_keys(bounds, dense, batch, head, row, key.shape[1]))
        if len(seen) == 0:
            continue
        logits = key[batch, seen, head // groups] @ query[batch, row, head] * scale
        slope = np.ones_like(logits)
        if logits_soft_cap is not None:
            bent = np.tanh(logits / logits_soft_cap)
            logits, slope = logits_soft_cap * bent, 1 - bent**2
        top = logits.max()
        yield (batch, row, head), seen, logits, slope, top + np.log(np.exp(logits - top).sum())


def attention_forward(query, key, value, bounds, dense, *, scale, logits_soft_cap):
    """query [B,T,N,H]; key, value [B,S,K,H]; bounds int [1|B,T,2|4] of [start, stop) pairs or None; dense bool [1|B,1|N,1|T,S] or
    None. Returns out [B,T,N,H] and lse [B,N,T], float64; zeros and -inf for a query that sees no key.
    """
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    b, t, n, _ = query.shape
    groups = n // key.shape[2]
    out, lse = np.zeros_like(query), np.full((b, n, t), -np.inf)
    for (batch, row, head), seen, logits, _, total in _rows(query, key, value, bounds, dense, scale, logits_soft_cap):
        lse[batch, head, row] = total
        out[batch, row, head] = np.exp(logits - total) @ value[batch, seen, head // groups]
    return out, lse


def attention_backward(query, key, value, bounds, dense, out, lse, dout, dlse, *, scale, logits_soft_cap):
    """dout [B,T,N,H]; dlse [B,N,T]; the others as in `attention_forward`; out and lse are computed anew. Returns dquery, dkey,
    dvalue, float64.
    """
    query, key, value, dout = (np.asarray(x, np.float64) for x in (query, key, value, dout))
    groups = query.shape[2] // key.shape[2]
    dquery, dkey, dvalue = np.zeros_like(query), np.zeros_like(key), np.zeros_like(value)
    for (batch, row, head), seen, logits, slope, total in _rows(query, key, value, bounds, dense, scale, logits_soft_cap):
        p, kv = np.exp(logits - total), head // groups
        dp = value[batch, seen, kv] @ dout[batch, row, head]
        # out moves by p * (dp - p.dp), lse by p.
        dlogits = p * (dp - p @ dp + dlse[batch, head, row]) * slope * scale
        dquery[batch, row, head] = dlogits @ key[batch, seen, kv]
        dkey[batch, seen, kv] += np.outer(dlogits, query[batch, row, head])
        dvalue[batch, seen, kv] += np.outer(p, dout[batch, row, head])
    return dquery, dkey, dvalue
