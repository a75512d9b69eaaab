"""The LM head with scoring, in float64; the logits exist in memory."""

import numpy as np

from dlm_kernels.reference import unmask


def lm_head_scores(
    hidden,
    weight,
    temperature,
    key_data,
    counter_row,
    noise,
    active,
    banned,
    *,
    confidence,
    tempered_confidence,
    logits_soft_cap,
    logits_dtype,
):
    """hidden [R,D]; weight [V,D]; logits_dtype None or a dtype to round to; the rest and the result as in `score_tokens`."""
    logits = np.asarray(hidden, np.float64) @ np.asarray(weight, np.float64).T
    if logits_dtype is not None:
        logits = logits.astype(np.float32).astype(logits_dtype)
    sampling = temperature, key_data, counter_row, noise, active, banned
    options = dict(confidence=confidence, tempered_confidence=tempered_confidence, logits_soft_cap=logits_soft_cap)
    return unmask.score_tokens(logits, None, None, *sampling, **options)
