"""The divergence between two LM heads, in float64; the logits exist in memory."""

import numpy as np


def masked_divergence_forward(hidden, weight, target_hidden, target_weight, active):
    """hidden [R,D]; weight [V,D]; target_hidden [R,E]; target_weight [V,E]; active bool [R].

    Returns loss, lse and target_lse [R]; float64, 0 where inactive.
    """
    loss, lse, target_lse = np.zeros((3, len(hidden)))
    for row in np.flatnonzero(active):
        q, lse[row] = _log_softmax(hidden[row], weight)
        p, target_lse[row] = _log_softmax(target_hidden[row], target_weight)
        with np.errstate(invalid="ignore"):
            loss[row] = np.where(np.exp(p) == 0, 0, np.exp(p) * (p - q)).sum()
    return loss, lse, target_lse


def masked_divergence_backward(hidden, weight, target_hidden, target_weight, active, lse, target_lse, dloss):
    """dloss [R]; lse and target_lse are computed anew. Returns dhidden [R,D], dweight [V,D], float64."""
    dhidden, dweight = np.zeros(hidden.shape), np.zeros(weight.shape)
    for row in np.flatnonzero(active):
        q, _ = _log_softmax(hidden[row], weight)
        p, _ = _log_softmax(target_hidden[row], target_weight)
        dlogits = (np.exp(q) - np.exp(p)) * float(dloss[row])
        dhidden[row] = dlogits @ np.asarray(weight, np.float64)
        dweight += np.outer(dlogits, np.asarray(hidden[row], np.float64))
    return dhidden, dweight


def _log_softmax(hidden_row, weight):
    """A row's log-probabilities [V] and their log-sum-exp."""
    logits = np.asarray(weight, np.float64) @ np.asarray(hidden_row, np.float64)
    lse = logits.max() + np.log(np.exp(logits - logits.max()).sum())
    return logits - lse, lse
