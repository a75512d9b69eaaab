"""Scoring tokens and unmasking: csrc/scoring.h and csrc/unmask.cc."""

from dlm_kernels import cpu_kernels


def scores(rows):
    """What a handler that scores returns: token, confidence, entropy, logsumexp."""
    return cpu_kernels.vector(rows, "int32"), *(cpu_kernels.vector(rows) for _ in range(3))


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
    """logits, unconditional [R,V], one dtype; guidance_scale, temperature float32 [R]; key_data uint32 [R,2];
    counter_row int32 [R]; noise float32 [R,V]; active bool [R]; banned int32 [M].

    Returns token int32, confidence, entropy, logsumexp float32, each [R].
    """
    arrays = logits, unconditional, guidance_scale, temperature, key_data, counter_row, noise, active, banned
    return cpu_kernels.run(
        "score_tokens",
        scores(logits.shape[0]),
        *arrays,
        confidence=confidence,
        tempered_confidence=tempered_confidence,
        soft_cap=cpu_kernels.number(logits_soft_cap),
    )


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
    """tokens, proposal int32, confidence, entropy float32, eligible, editable bool, each [B,L]; the rules [B], num_unmask int32,
    the others float32. Returns tokens int32 [B,L], unmasked bool [B,L], count int32 [B].
    """
    rules = num_unmask, threshold, factor, entropy_budget, edit_threshold
    outputs = cpu_kernels.like(tokens), cpu_kernels.like(eligible), cpu_kernels.vector(tokens.shape[0], "int32")
    return cpu_kernels.run("unmask_topk", outputs, tokens, proposal, confidence, entropy, eligible, editable, *rules)
