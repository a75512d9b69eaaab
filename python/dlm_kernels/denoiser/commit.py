"""What a pass writes: its hidden states are scored, and what is sure enough takes the place of masks, or of other tokens."""

import jax
import jax.numpy as jnp

from dlm_kernels import lm_head_scores, mix_guidance, score_tokens, truncate_logits, unmask_topk
from dlm_kernels.denoiser import blocks, guided, indel, model


def commit(static, params, data, decoded, hidden, inside, original, last, at, index, step):
    """Scores the window's hidden states [B, block, D] and writes what is sure enough. inside: bool [B, block], may change.

    original: bool [B, block], the masks inside, where tokens move those alone that no edit has put there; last: bool [B], rows that
    are to be left without masks. Returns Decoded, and `original` where its masks are then.
    """
    config, block, implementation = static.config, static.block, static.implementation
    b = decoded.tokens.shape[0]
    window = model.read_window(decoded.tokens, at, block)
    todo = inside & (window == config.mask_id)
    head = model.head_weight(config, params)
    if data["logit_bias"] is not None:
        # One more column of the head, which every state reads with weight 1: exact under guidance too, whose weights add up to 1.
        head = jnp.concatenate([head, data["logit_bias"].astype(head.dtype)[:, None]], axis=1)
        hidden = jnp.concatenate([hidden, jnp.ones_like(hidden[..., :1])], axis=2)
    guidance = {}
    if data["guidance_scale"] is not None:
        guidance = dict(unconditional_hidden=hidden[b:], guidance_scale=guided.scale(data, todo, inside, at))
    sampling = {} if data["temperature"] is None else dict(temperature=data["temperature"])
    if data["key"] is not None:
        sampling["key"] = blocks.row_keys(data["key"], index, step)
    scoring = dict(
        confidence=static.confidence,
        tempered_confidence=config.shifted or config.block_size is not None,  # as in all their own code but LLaDA's
        active=todo if data["edit_threshold"] is None else inside,
        implementation=implementation,
        **sampling,
    )

    def scored(banned):
        if data["top_p"] is None and data["top_k"] is None:
            return lm_head_scores(hidden[:b], head, banned_tokens=banned, **guidance, **scoring)
        return score_tokens(_most_likely(static, data, banned, hidden[:b], head, **guidance), **scoring)

    scores, quota = scored(data["banned"]), None
    if data["steps"] is not None:
        # The rest spread evenly over the passes left, so that none of them is idle.
        left = jnp.maximum(data["steps"] - step, 1)
        quota = -(-original.sum(-1) // left)
    if static.moves:
        if quota is None:
            quota = original.any(-1).astype(jnp.int32)
        quota = jnp.where(last, todo.sum(-1), quota + (todo & ~original).sum(-1))
        # Of the last pass no edit may leave a mask behind.
        moving = jnp.asarray([config.delete_id, config.insert_id])
        unfit = inside & last[:, None] & jnp.isin(scores.token, moving)

        def settled():
            return jnp.where(unfit, scored(jnp.concatenate([data["banned"], moving])).token, scores.token)

        scores = scores._replace(token=jax.lax.cond(unfit.any(), settled, lambda: scores.token))
    rules = {name: data[name] for name in ("threshold", "factor", "entropy_budget", "edit_threshold")}
    result = unmask_topk(
        window,
        scores,
        mask_id=config.mask_id,
        num_unmask=quota,
        candidates=inside,
        implementation=implementation,
        **rules,
    )
    changed = result.tokens != window
    made = blocks.Decoded(
        blocks.put(decoded.tokens, result.tokens, changed, at),
        blocks.put(decoded.revealed, decoded.passes, changed, at),
        blocks.put(decoded.confidence, scores.confidence, changed, at),
        decoded.passes + 1,
    )
    if static.moves:
        revealed, sure = (model.read_window(x, at, block) for x in (made.revealed, made.confidence))
        moved = (revealed, -1), (sure, 1.0), (original, False)
        *arrays, original = indel.apply(config, result.tokens, window, inside, *moved)
        made = blocks.Decoded(*(blocks.put(x, new, inside, at) for x, new in zip(made, arrays)), made.passes)
    return made, original


def _most_likely(static, data, banned, hidden, head, unconditional_hidden=None, guidance_scale=None):
    """float32 logits [B, block, V] of hidden [B, block, D], -inf for all but the most likely that may be written."""
    implementation = static.implementation
    if guidance_scale is not None:
        hidden = mix_guidance(hidden, unconditional_hidden, guidance_scale, implementation=implementation)
    # Two axes, not three, of which XLA's CPU compiler copies the head of 16 bits.
    rows = hidden.reshape(-1, hidden.shape[-1])
    logits = jnp.einsum("rd,vd->rv", rows, head, preferred_element_type=jnp.float32).reshape(*hidden.shape[:2], -1)
    # Before the truncation: else what is left of a row might be banned, all of it.
    is_banned = jnp.isin(jnp.arange(head.shape[0]), banned)
    return truncate_logits(
        jnp.where(is_banned, -jnp.inf, logits),
        top_p=data["top_p"],
        top_k=data["top_k"],
        temperature=1.0 if data["temperature"] is None else data["temperature"],
        implementation=implementation,
    )
