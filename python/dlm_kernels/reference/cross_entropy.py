"""The training loss of an LM head's logits, in float64."""

import numpy as np


def masked_cross_entropy_forward(hidden, weight, targets, active, *, logits_soft_cap):
    """hidden [R,D]; weight [V,D]; targets int [R]; active bool [R]. Returns loss [R], NaN for a target outside [0, V), and lse
    [R]; float64, 0 where inactive.
    """
    loss, lse = np.zeros((2, len(hidden)))
    for row in np.flatnonzero(active):
        logits, _ = _capped_logits(hidden[row], weight, logits_soft_cap)
        lse[row] = logits.max() + np.log(np.exp(logits - logits.max()).sum())
        loss[row] = lse[row] - logits[targets[row]] if 0 <= targets[row] < len(weight) else np.nan
    return loss, lse


def masked_cross_entropy_backward(hidden, weight, targets, active, lse, dloss, *, logits_soft_cap):
    """dloss [R]; lse is computed anew; the others as in the forward. Returns dhidden [R,D], dweight [V,D], float64."""
    dhidden, dweight = np.zeros(hidden.shape), np.zeros(weight.shape)
    for row in np.flatnonzero(active):
        logits, slope = _capped_logits(hidden[row], weight, logits_soft_cap)
        dlogits = np.exp(logits - logits.max())
        dlogits /= dlogits.sum()
        if 0 <= targets[row] < len(weight):
            dlogits[targets[row]] -= 1
        dlogits *= slope * float(dloss[row])
        dhidden[row] = dlogits @ np.asarray(weight, np.float64)
        dweight += np.outer(dlogits, np.asarray(hidden[row], np.float64))
    return dhidden, dweight


def _capped_logits(hidden_row, weight, logits_soft_cap):
    """The logits [V] of a row, and the slope of the soft cap at them."""
    logits = np.asarray(weight, np.float64) @ np.asarray(hidden_row, np.float64)
    if logits_soft_cap is None:
        return logits, np.ones_like(logits)
    bent = np.tanh(logits / logits_soft_cap)
    return logits_soft_cap * bent, 1 - bent**2
