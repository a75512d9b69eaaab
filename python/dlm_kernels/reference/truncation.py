"""The most likely tokens alone, by a sort, in float64."""

import numpy as np


def truncate_logits(logits, inverse_temperature, top_p, top_k):
    """logits [R, V]; inverse_temperature [R]; top_p [R] or None; top_k int [R] or None.

    Returns logits with -inf for what is not kept. A row with NaN or +inf, or of -inf alone, comes back as it is.
    """
    out = np.array(logits)
    for row, given in enumerate(np.asarray(logits, np.float64)):
        if np.isnan(given).any() or np.isposinf(given).any() or np.isneginf(given).all():
            continue
        ranked = np.sort(given)[::-1]
        n = len(ranked)
        if top_p is not None and not top_p[row] >= 1:
            p = np.exp((ranked - ranked[0]) * float(inverse_temperature[row]))
            reached = np.cumsum(p) >= float(top_p[row]) * p.sum()
            n = 1 + int(reached.argmax()) if top_p[row] > 0 else 1
        if top_k is not None:
            n = min(n, max(1, int(top_k[row])))
        out[row, given < ranked[n - 1]] = -np.inf
    return out
