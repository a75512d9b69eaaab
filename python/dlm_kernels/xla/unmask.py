"""Scoring tokens and unmasking in plain jax.numpy: several passes over the vocabulary."""

import jax
import jax.numpy as jnp
from jax.extend.random import threefry2x32_p

from dlm_kernels.xla import guidance
from dlm_kernels.xla.soft_cap import bent


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
    """logits, unconditional [R,V]; guidance_scale, temperature float32 [R]; key_data uint32 [R,2]; counter_row int32 [R];
    noise float32 [R,V]; active bool [R]; banned int32 [M]. Returns token int32, confidence, entropy, logsumexp float32, each [R].
    """
    v = logits.shape[1]
    if unconditional is not None:
        logits = guidance.mix(logits, unconditional, guidance_scale)
    logits, factor = bent(logits.astype(jnp.float32), logits_soft_cap)
    if banned is not None:
        # An id below zero would count from the end.
        logits = logits.at[:, jnp.where(banned < 0, v, banned)].set(-jnp.inf, mode="drop")
    sampled, divisor = factor * logits, 1.0
    if temperature is not None:
        hot = (temperature > 0)[:, None]
        heat = jnp.where(hot, temperature[:, None], 1)
        divisor = heat if tempered_confidence else divisor
        noise = gumbel(key_data, counter_row, v) if noise is None else noise
        sampled = jnp.where(hot, sampled / heat + noise, sampled)
    token = jnp.argmax(sampled, axis=-1).astype(jnp.int32)
    greatest = logits.max(-1, keepdims=True)
    # Less the greatest, and not less logsumexp: far from zero that is rounded coarsely. In a row that is all -inf it would be NaN.
    base = jnp.where(jnp.isneginf(greatest), 0, greatest)
    scale = factor / divisor
    away = (logits - base) * scale
    weights = jnp.exp(away)
    total = weights.sum(-1, keepdims=True)
    logsumexp = jnp.where(jnp.isposinf(greatest), greatest, base * scale + jnp.log(total))[:, 0]
    log_p, p = away - jnp.log(total), weights / total
    entropy = -jnp.where(p == 0, 0, p * log_p).sum(-1)
    if confidence == "probability":
        sure = jnp.take_along_axis(p, token[:, None], axis=-1)[:, 0]
    elif confidence == "margin":
        best = jax.lax.top_k(p, min(2, v))[0]
        sure = best[:, 0] - (best[:, 1] if v > 1 else 0)
    else:
        sure = -entropy
    # Also where the row is all -inf: then 0 / 0, there is no distribution to be sure of.
    undefined = jnp.isnan(logsumexp) | jnp.isposinf(logsumexp) | jnp.isneginf(logsumexp)
    sure, entropy = (jnp.where(undefined, jnp.nan, x) for x in (sure, entropy))
    if active is not None:
        token, sure = jnp.where(active, token, -1), jnp.where(active, sure, -jnp.inf)
        entropy, logsumexp = jnp.where(active, entropy, jnp.inf), jnp.where(active, logsumexp, -jnp.inf)
    return token, sure, entropy, logsumexp


def gumbel(key_data, counter_row, v):
    """float32 [R,V]: row r is row counter_row[r] of jax.random.gumbel(key_data[r], [any, V])."""
    index = jnp.arange(v, dtype=jnp.uint32)
    # 64-bit row * V + v in two 32-bit words, which JAX has without x64.
    low, high = _multiply(counter_row.astype(jnp.uint32), v)
    words_low = low[:, None] + index
    words_high = high[:, None] + (words_low < index).astype(jnp.uint32)
    draw = threefry2x32_p.bind
    shape = words_low.shape
    keys = [jnp.broadcast_to(key_data[:, i, None], shape) for i in (0, 1)]
    first, second = draw(*keys, words_high, words_low)
    mantissa = ((first ^ second) >> 9) | jnp.uint32(0x3F800000)
    tiny = jnp.finfo(jnp.float32).tiny
    uniform = jax.lax.bitcast_convert_type(mantissa, jnp.float32) - 1
    uniform = jnp.maximum(tiny, uniform * (1 - tiny) + tiny)
    return -jnp.log(-jnp.log(uniform))


def _multiply(a, b):
    """uint32 [R] times an int below 2**31, as (low, high) words."""
    low_half, high_half = a & 0xFFFF, a >> 16
    b_low, b_high = jnp.uint32(b & 0xFFFF), jnp.uint32(b >> 16)
    lower, middle = low_half * b_low, low_half * b_high
    carry = (lower >> 16) + (middle & 0xFFFF) + ((high_half * b_low) & 0xFFFF)
    high = high_half * b_high + (middle >> 16) + ((high_half * b_low) >> 16) + (carry >> 16)
    return (lower & 0xFFFF) | (carry << 16), high


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
    the others float32.

    Returns tokens int32 [B,L], unmasked bool [B,L], count int32 [B].
    """
    sure = jnp.where(jnp.isnan(confidence), -jnp.inf, confidence)
    order = sure if entropy_budget is None else -jnp.where(jnp.isnan(entropy), jnp.inf, entropy)
    position = jnp.arange(tokens.shape[1])
    mine, other = order[:, :, None], order[:, None, :]
    before = (other > mine) | ((other == mine) & (position[None, None, :] < position[None, :, None]))
    before &= eligible[:, None, :]
    rank = before.sum(-1)
    n = jnp.zeros(tokens.shape[:1], jnp.int32)
    if num_unmask is not None:
        n = jnp.maximum(n, num_unmask)
    if threshold is not None:
        n = jnp.maximum(n, jnp.maximum(1, (eligible & (sure > threshold[:, None])).sum(-1)))
    if factor is not None:
        failed = eligible & (rank > 0) & ~(sure >= 1 - factor[:, None] / (rank + 2).astype(jnp.float32))
        n = jnp.maximum(n, jnp.where(failed, rank, tokens.shape[1]).min(-1))
    if entropy_budget is not None:
        spent = jnp.where(before, entropy[:, None, :], 0).sum(-1)
        failed = eligible & (rank > 0) & ~(spent <= entropy_budget[:, None])
        n = jnp.maximum(n, jnp.where(failed, rank, tokens.shape[1]).min(-1))
    unmasked = eligible & (rank < n[:, None])
    changed = unmasked
    if editable is not None:
        changed |= editable & (confidence > edit_threshold[:, None])
    return jnp.where(changed, proposal, tokens), unmasked, unmasked.sum(-1).astype(jnp.int32)
