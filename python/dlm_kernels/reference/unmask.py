"""Scoring tokens and unmasking, in float64, one row at a time."""

import math

import numpy as np

from dlm_kernels.reference import guidance, threefry


def score_tokens(
    logits,
    unconditional,
    guidance_scale,
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
):
    """logits, unconditional [R,V]; guidance_scale, temperature [R]; key_data uint32 [R,2]; counter_row int [R]; noise [R,V]; active
    bool [R]; banned int [M]. Returns token int64 and confidence, entropy, logsumexp float64, each [R].
    """
    r, v = logits.shape
    if unconditional is not None:
        logits = guidance.mix_guidance(logits, unconditional, guidance_scale)
    if noise is None and temperature is not None:
        noise = threefry.gumbel(key_data, counter_row, v)
    token = np.full(r, -1)
    sure, entropy, logsumexp = np.full(r, -np.inf), np.full(r, np.inf), np.full(r, -np.inf)
    for row in range(r):
        if active is not None and not active[row]:
            continue
        line = np.array(logits[row], np.float64)
        if logits_soft_cap is not None:
            line = logits_soft_cap * np.tanh(line / logits_soft_cap)
        for banned_token in () if banned is None else banned:
            if 0 <= banned_token < v:
                line[banned_token] = -np.inf
        if np.isnan(line).any() or np.isposinf(line).any() or np.isneginf(line).all():
            # No distribution: any token of the vocabulary, and nothing to be sure of.
            token[row], sure[row], entropy[row], logsumexp[row] = 0, np.nan, np.nan, np.nan
            continue
        sampled = line
        if temperature is not None and temperature[row] > 0:
            sampled = line / temperature[row] + noise[row]
            line = line / temperature[row] if tempered_confidence else line
        token[row] = np.argmax(sampled)
        weights = np.exp(line - line.max())
        logsumexp[row] = line.max() + np.log(weights.sum())
        p = weights / weights.sum()  # of the greatest numbers logsumexp is no more than the greatest
        entropy[row] = -sum(x * math.log(x) for x in p if x > 0)
        best = np.sort(p)[::-1]
        sure[row] = {
            "probability": p[token[row]],
            "margin": best[0] - (best[1] if v > 1 else 0),
            "neg_entropy": -entropy[row],
        }[confidence]
    return token, sure, entropy, logsumexp


def unmask_topk(
    tokens,
    proposal,
    confidence,
    entropy,
    eligible,
    editable,
    num_unmask,
    threshold,
    factor,
    entropy_budget,
    edit_threshold,
):
    """tokens, proposal int, confidence, entropy float, eligible, editable bool, each [B,L]; the rules [B], or None.

    Returns tokens [B,L], unmasked bool [B,L], count [B]. Each rule gives a number of positions; the greatest counts.
    """
    tokens, unmasked = np.array(tokens), np.zeros(tokens.shape, bool)
    for b in range(tokens.shape[0]):
        sure = [-math.inf if math.isnan(c) else float(c) for c in confidence[b]]
        places = [i for i in range(tokens.shape[1]) if eligible[b, i]]
        if entropy_budget is None:
            places.sort(key=lambda i: (-sure[i], i))
        else:
            places.sort(key=lambda i: (math.inf if math.isnan(entropy[b, i]) else entropy[b, i], i))
        n = 0
        if num_unmask is not None:
            n = max(n, int(num_unmask[b]))
        if threshold is not None:
            n = max(n, 1, sum(sure[i] > threshold[b] for i in places))
        if factor is not None:
            leading = 1
            # Fast-dLLM: n positions at once are safe while (n + 1) * (1 - confidence) stays below the factor.
            while leading < len(places) and sure[places[leading]] >= np.float32(1) - factor[b] / np.float32(leading + 2):
                leading += 1
            n = max(n, leading)
        if entropy_budget is not None:
            leading, spent = 1, 0.0
            while leading < len(places) and spent + entropy[b, places[leading - 1]] <= entropy_budget[b]:
                spent += entropy[b, places[leading - 1]]
                leading += 1
            n = max(n, leading)
        for i in places[:n]:
            unmasked[b, i] = True
        for i in range(tokens.shape[1]):
            if unmasked[b, i] or (editable is not None and editable[b, i] and confidence[b, i] > edit_threshold[b]):
                tokens[b, i] = proposal[b, i]
    return tokens, unmasked, unmasked.sum(-1)
