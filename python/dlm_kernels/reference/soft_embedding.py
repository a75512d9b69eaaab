"""The soft embedding, in float64; the probabilities exist in memory."""

import numpy as np


def soft_embedding(hidden, weight, embedding, temperature, *, logits_soft_cap):
    """hidden [R,D]; weight [V,D]; embedding [V,E]; temperature a number above 0. Returns float64 [R,E]."""
    logits = np.asarray(hidden, np.float64) @ np.asarray(weight, np.float64).T
    if logits_soft_cap is not None:
        logits = logits_soft_cap * np.tanh(logits / logits_soft_cap)
    p = np.exp((logits - logits.max(-1, keepdims=True)) / temperature)
    return p / p.sum(-1, keepdims=True) @ np.asarray(embedding, np.float64)
