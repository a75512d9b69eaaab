"""Guidance on logits, in float64."""

import numpy as np


def mix_guidance(conditional, unconditional, scale):
    """conditional, unconditional [R, V]; scale [R]. Returns float64 [R, V]: u + s * (c - u)."""
    return combine_guidance(np.stack([conditional, unconditional]), np.stack([scale, 1 - np.asarray(scale)]))


def combine_guidance(logits, weights):
    """logits [C, R, V]; weights [C, R]. Returns float64 [R, V]: the weighted sum of the streams whose weight is not 0; -inf
    where one of those is -inf.
    """
    total = np.zeros(logits.shape[1:])
    banned = np.zeros(logits.shape[1:], bool)
    for stream, weight in zip(np.asarray(logits, np.float64), np.asarray(weights, np.float64)):
        for row in np.flatnonzero(weight):
            closed = np.isneginf(stream[row])
            banned[row] |= closed
            total[row] += weight[row] * np.where(closed, 0, stream[row])
    return np.where(banned, -np.inf, total)
