"""What the contenders must compute, in float64 NumPy; whole arrays, since a benchmark's shapes are too large for loops."""

import numpy as np


def attention(query, key, value, visible=None):
    """query [B, T, N, H], key and value [B, S, K, H], visible bool [T, S] or None -> [B, T, N, H]."""
    batch, _, heads, size = query.shape
    groups = heads // key.shape[2]
    out = np.empty(query.shape)
    for b in range(batch):
        for n in range(heads):
            q, k, v = (np.asarray(x[b, :, i], np.float64) for x, i in ((query, n), (key, n // groups), (value, n // groups)))
            logits = q @ k.T / np.sqrt(size)
            if visible is not None:
                logits[~visible] = -np.inf
            weights = np.exp(logits - logits.max(-1, keepdims=True))
            out[b, :, n] = weights @ v / weights.sum(-1, keepdims=True)
    return out


def mix(conditional, unconditional, scale):
    c, u = (np.asarray(x, np.float64) for x in (conditional, unconditional))
    return u + scale * (c - u)


def scores(logits):
    """logits [..., V] -> token, confidence, entropy, log-sum-exp [...]."""
    # A few rows at a time: in float64 all of a large model's would not fit.
    parts = [_scores(np.asarray(rows, np.float64)) for rows in _pieces(logits.reshape(-1, logits.shape[-1]), 64)]
    return tuple(np.concatenate(part).reshape(logits.shape[:-1]) for part in zip(*parts))


def _pieces(rows, size):
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def _scores(logits):
    top = logits.max(-1, keepdims=True)
    p = np.exp(logits - top)
    total = p.sum(-1, keepdims=True)
    p /= total
    logsumexp = (top + np.log(total))[..., 0]
    return logits.argmax(-1).astype(np.int32), p.max(-1), logsumexp - (p * logits).sum(-1), logsumexp


def unmask(logits, tokens, mask_id, *, num_unmask=0, threshold=np.inf):
    """logits [L, V] of tokens [L]: the `num_unmask` most confident masks, or all above the threshold and at least one."""
    proposal, sure, *_ = scores(logits)
    sure = np.where(tokens == mask_id, sure, -np.inf)
    n = min(max(num_unmask, (sure > threshold).sum(), 1), (tokens == mask_id).sum())
    chosen = np.argsort(-sure, kind="stable")[:n]
    tokens = np.array(tokens)
    tokens[chosen] = proposal[chosen]
    return tokens


def head(hidden, weight):
    """hidden float64 [1, R, D] @ weight [V, D].T; the weight, which is large, in parts."""
    return np.concatenate([hidden @ np.asarray(part, np.float64).T for part in np.array_split(weight, 32)], axis=-1)


def cross_entropy(hidden, weight, targets, weights):
    """The sum over rows of weights * cross-entropy; hidden [1, R, D], targets and weights [1, R]."""
    rows = weights[0] != 0
    logits = head(np.asarray(hidden[:, rows], np.float64), weight)[0]
    loss = scores(logits)[3] - logits[np.arange(len(logits)), targets[0, rows]]
    return (weights[0, rows] * loss).sum()


def divergence(hidden, weight, target_hidden, target_weight, weights):
    """The sum over rows of weights * KL(target || model); hidden states [1, R, D], weights [1, R]."""
    rows = weights[0] != 0
    log_q, log_p = (
        logits - scores(logits)[3][:, None]
        for logits in (
            head(np.asarray(hidden[:, rows], np.float64), weight)[0],
            head(np.asarray(target_hidden[:, rows], np.float64), target_weight)[0],
        )
    )
    return (weights[0, rows] * (np.exp(log_p) * (log_p - log_q)).sum(-1)).sum()
