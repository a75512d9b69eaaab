"""Block-parallel decoding as one jitted `lax.while_loop`: nothing returns to the host between passes."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dlm_kernels import lm_head_scores, masks, unmask_topk
from dlm_kernels.denoiser import classifier as classifiers
from dlm_kernels.denoiser import guided, limits, model
from dlm_kernels.denoiser import remask as remasking

NEVER = 1_000_000  # more passes than a block takes


class Decoded(NamedTuple):
    tokens: jax.Array  # int32 [B, L]
    revealed: jax.Array  # int32 [B, L], the pass, from 0, that last wrote the position; -1 where it was given
    confidence: jax.Array  # float32 [B, L], of that pass; 1 where the token was given
    passes: jax.Array  # int32, forward passes made


class _Static(NamedTuple):
    """What a compiled loop is specialised to."""

    config: object
    block: int
    confidence: str
    remask_rule: str
    attend: str
    cached: bool
    implementation: str | None
    on_pass: object


class _State(NamedTuple):
    """The loop's carry."""

    decoded: Decoded
    block: jax.Array  # int32, the block of the last pass
    step: jax.Array  # int32, passes made on it
    cache: list  # per layer (key, value), or empty
    other: tuple  # the unconditional stream's (hidden states of the window, cache) where it is not computed every pass, or empty


def decode(
    config,
    params,
    tokens,
    *,
    block,
    start=0,
    first=0,
    stop=None,
    steps=None,
    threshold=None,
    factor=None,
    entropy_budget=None,
    edit_threshold=None,
    remask=None,
    remask_rule="least",
    confidence="probability",
    temperature=None,
    key=None,
    unconditional=None,
    unconditional_start=0,
    guidance_scale=None,
    guidance_final=None,
    guidance_interval=None,
    guidance_remask=None,
    guidance_refresh=None,
    banned_tokens=None,
    logit_bias=None,
    classifier=None,
    classifier_scale=None,
    stop_at=None,
    attend="all",
    cache=False,
    refresh=None,
    on_pass=None,
    implementation=None,
):
    """Replaces every mask in `tokens`, block after block, several tokens a pass.

        for begin in range(first, stop, block):
            for step in count():
                todo = positions of masks in tokens[begin : begin + block]
                if not todo: break
                logits = head(hidden_states(tokens))                            # bidirectional; masks included
                tokens = unmask_step(logits, tokens, candidates=todo, num_unmask=ceil(len(todo) / (steps - step)))

    Arguments:
      config, params: a model. tokens: int32 [B, L], prompts and holes (config.mask_id) in any order; what is not a mask stays.
      block: positions decoded together, static. Blocks are counted from column `first`; rows go through them together, and a
        row with no mask in the block waits, so that what it gives does not depend on its batch.
      start, first, stop: int or int32 [B]. Columns before start and from stop (default L) on are padding, which nobody sees.
      steps: at most this many passes a block. threshold, factor, entropy_budget: see `unmask_topk`. At least one of the four;
        with several the one that unmasks most holds, so steps with threshold is "all above it, and done in time".
      edit_threshold: also replace tokens of the block committed in an earlier pass, where the model is this sure of another.
      remask: after every pass but a block's last, mask anew this share (rounded down) of what earlier passes wrote in it, the least
        confident when written first; the passes left commit so much more. Needs steps.
      remask_rule: "least", that; or "cap", "rescale" or "confidence", where remask is the strength of ReMDM's random rules, see
        `remask.sigma`, which need a key.
      confidence: see `score_tokens`; a model of Dream's kind has that of the tempered distribution. temperature: None for greedy,
        else a scalar or [B], traced; needs key: a JAX threefry key for each row, [B].
      unconditional, guidance_scale: classifier-free guidance. unconditional: int32 [B, L], what stands in the place of the given
        tokens for the unconditional stream, from column unconditional_start on; guidance_scale: scalar, [B] or [B, L], 1 is none.
      guidance_final: the scale, scalar or [B], that a block is nearing as it fills: a mean of the two, in which guidance_scale's
        weight is the share of the block's holes that are still masked.
      guidance_interval: (low, high), each a scalar or [B]: guide only while the share of the block's holes that are still
        masked is within them, both inclusive.
      guidance_remask: adaptive guidance (A-CFG), in the place of `unconditional`: the unconditional stream keeps the given
        tokens and masks this share of the decoded ones anew, at least one, the least confident (when written) first. With a cache
        the blocks before stay, in that stream, as they were read when it last computed their keys.
      guidance_refresh: compute the unconditional stream anew in every so many passes of a block only, and keep its hidden states
        for those between. Default: every pass, in one batch with the conditional stream.
      banned_tokens: int32 [M], never chosen. The mask always is, and the pad unless it is end-of-text too.
      logit_bias: [V], added to the logits, after guidance; finite, and rounded to the parameters' dtype.
      classifier, classifier_scale: guidance towards what a `classifier.Classifier` takes for wanted, whose log p counts
        classifier_scale times, a scalar or [B]; a forward and a backward pass more, over the whole canvas. For tied embeddings.
      stop_at: a token that ends its row, or several [N]: once one and all before it are there, what follows becomes config.pad_id.
      attend: "all": every position sees the whole canvas. "blocks": its own block and those before (a block-causal model);
        with block 1 that is an autoregressive decoder.
      cache: keep keys and values, and compute the block only. Exact for "blocks": the pass that commits a block is part of the
        next block's first. For "all" the others' are stale (dual cache), computed anew every `refresh` passes of a block, by
        default in its first only.
      on_pass: called on the host with a Decoded after every pass (for a live view; the loop does not wait for it).

    steps, thresholds, temperature, scale, start, first, stop and refresh are data: changing them compiles nothing.
    Returns Decoded. Raises ValueError for arguments that do not fit.
    """
    tokens = jnp.asarray(tokens, jnp.int32)
    if tokens.ndim != 2:
        raise ValueError(f"tokens: expected shape [B, L], got {list(tokens.shape)}")
    b, length = tokens.shape
    limits.counts(block=block)
    rules = dict(threshold=threshold, factor=factor, entropy_budget=entropy_budget)
    if steps is None and all(rule is None for rule in rules.values()):
        raise ValueError("steps, threshold, factor, entropy_budget: expected at least one, got none")
    limits.numbers(1, steps=steps, guidance_refresh=guidance_refresh, refresh=refresh)
    limits.numbers(0, 1, remask=remask, guidance_remask=guidance_remask)
    limits.numbers(0, factor=factor, entropy_budget=entropy_budget, temperature=temperature)
    limits.numbers(
        threshold=threshold, edit_threshold=edit_threshold, guidance_scale=guidance_scale, guidance_final=guidance_final,
        guidance_interval=guidance_interval, classifier_scale=classifier_scale,
    )  # fmt: skip
    if remask is not None and steps is None:
        raise ValueError("remask: expected steps with it, which say when it has to end, got none")
    if remask_rule not in remasking.RULES:
        raise ValueError(f"remask_rule: expected one of {remasking.RULES}, got {remask_rule!r}")
    if remask is None and remask_rule != "least":
        raise ValueError("remask_rule: expected remask with it, got none")
    if attend not in ("all", "blocks"):
        raise ValueError(f"attend: expected 'all' or 'blocks', got {attend!r}")
    if refresh is not None and (not cache or attend == "blocks"):
        raise ValueError("refresh: expected a cache that attends to all, whose keys grow old, got none")
    if unconditional is not None and guidance_remask is not None:
        raise ValueError("unconditional, guidance_remask: expected one unconditional stream, got two")
    if (unconditional is None and guidance_remask is None) != (guidance_scale is None):
        raise ValueError("guidance_scale: expected one with `unconditional` or guidance_remask, and none without")
    further = dict(
        guidance_final=guidance_final, guidance_interval=guidance_interval, guidance_refresh=guidance_refresh
    )
    for name, value in further.items():
        if guidance_scale is None and value is not None:
            raise ValueError(f"{name}: expected a guidance_scale with it, got none")
    if unconditional is not None and jnp.shape(unconditional) != tokens.shape:
        raise ValueError(
            f"unconditional: expected tokens' shape {list(tokens.shape)}, got {list(jnp.shape(unconditional))}"
        )
    random = temperature is not None or (remask is not None and remask_rule != "least")
    if random != (key is not None):
        raise ValueError("temperature, key: expected both or neither, and a key with a random remask_rule")
    if key is not None and jnp.shape(key)[:1] != (b,):
        raise ValueError(f"key: expected a key for each of {b} rows, got shape {list(jnp.shape(key))}")
    if 0 in (b, length):
        return _untouched(config, tokens)
    columns = dict(start=start, first=first, stop=length if stop is None else stop)
    if guidance_scale is not None:
        columns["unconditional_start"] = start if unconditional is None else unconditional_start
    columns = {name: jnp.broadcast_to(jnp.asarray(x, jnp.int32), (b,)) for name, x in columns.items()}
    if (classifier is None) != (classifier_scale is None):
        raise ValueError("classifier, classifier_scale: expected both or neither")
    if classifier is not None and not config.tie_embeddings:
        raise ValueError("classifier: expected a model whose head is its embedding, got tie_embeddings=False")
    if guidance_scale is not None and jnp.shape(guidance_scale) not in ((), (b,), tokens.shape):
        raise ValueError(f"guidance_scale: expected a scalar, [{b}] or {[b, length]}, got {list(jnp.shape(guidance_scale))}")
    if logit_bias is not None and jnp.shape(logit_bias) != (config.vocab,):
        raise ValueError(f"logit_bias: expected shape [{config.vocab}], got {list(jnp.shape(logit_bias))}")
    scales = rules | dict(
        edit_threshold=edit_threshold, remask=remask, temperature=temperature, guidance_scale=guidance_scale,
        guidance_final=guidance_final, guidance_interval=guidance_interval, guidance_remask=guidance_remask,
        classifier_scale=classifier_scale, logit_bias=logit_bias,
    )  # fmt: skip
    refresh = NEVER if refresh is None else refresh
    whole = dict(steps=steps, unconditional=unconditional, guidance_refresh=guidance_refresh, stop_at=stop_at, refresh=refresh)
    data = dict(key=key, classifier=classifier, banned=banned_ids(config, banned_tokens))
    # Of one dtype: 2, 2.0 and NumPy's would each compile a loop of its own.
    data |= jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), scales)
    data |= jax.tree.map(lambda x: jnp.asarray(x, jnp.int32), whole)
    static = _Static(config, min(block, length), confidence, remask_rule, attend, bool(cache), implementation, on_pass)
    return _decode(static, params, tokens, columns, data)


def banned_ids(config, more=None):
    """int32: what no model here may write, and `more`. Where one id is pad and end-of-text at once it is banned as neither."""
    own = [config.mask_id] + [config.pad_id] * (config.pad_id != config.eos_id)
    return jnp.concatenate([jnp.asarray(own, jnp.int32), jnp.asarray([] if more is None else more, jnp.int32)])


def _untouched(config, tokens):
    return Decoded(
        tokens, jnp.full(tokens.shape, -1, jnp.int32), jnp.ones(tokens.shape, jnp.float32), jnp.zeros((), jnp.int32)
    )


@functools.partial(jax.jit, static_argnums=0)
def _decode(static, params, tokens, columns, data):
    config, block = static.config, static.block
    b, length = tokens.shape
    position = jnp.arange(length, dtype=jnp.int32)[None]
    hole = (tokens == config.mask_id) & (columns["start"][:, None] <= position) & (position < columns["stop"][:, None])
    apart = data["guidance_refresh"] is not None
    dtype = params["embed"].dtype

    def empty(rows):
        return model.empty_cache(config, rows, length, dtype) if static.cached else []

    together = data["guidance_scale"] is not None and not apart
    cache = empty(2 * b if together else b)
    other = (jnp.zeros((b, block, config.d_model), dtype), empty(b)) if apart else ()

    def masked(state):
        return hole & (state.decoded.tokens == config.mask_id)

    def one_pass(state):
        # The first block, over all rows, that still has a mask.
        index = jnp.where(masked(state), (position - columns["first"][:, None]) // block, length)
        index = index.min()
        step = jnp.where(index == state.block, state.step + 1, 0)
        begin = columns["first"] + index * block
        # The window that is computed; at the canvas's edge it reaches back before `begin`.
        at = jnp.clip(begin, 0, length - block)
        hidden, cache, other = _both_streams(static, params, columns, data, state, hole, index, step, at)
        if data["classifier"] is not None:
            towards = _towards_wanted(static, params, columns, data, state.decoded.tokens, at)
            # To both streams: their weights add up to 1.
            hidden += jnp.tile(towards, (hidden.shape[0] // b, 1, 1)).astype(hidden.dtype)
        inside = at[:, None] + jnp.arange(block)
        inside = (begin[:, None] <= inside) & (inside < begin[:, None] + block)
        inside &= model.read_window(hole, at, block)
        # A row that waits for others must not be edited or masked anew meanwhile.
        todo = inside & (model.read_window(state.decoded.tokens, at, block) == config.mask_id)
        inside &= todo.any(1, keepdims=True)
        decoded = _commit(static, params, data, state.decoded, hidden, inside, at, index, step)
        if data["remask"] is not None:
            decoded = remasking.remask(config, static.remask_rule, data, decoded, inside, at, index, step)
        decoded = end_rows(config, data["stop_at"], decoded, hole)
        if static.on_pass is not None:
            jax.debug.callback(lambda *fields: static.on_pass(Decoded(*fields)), *decoded, ordered=True)
        return _State(decoded, index, step, cache, other)

    before = _State(_untouched(config, tokens), jnp.int32(-length - 1), jnp.int32(0), cache, other)
    return jax.lax.while_loop(lambda state: masked(state).any(), one_pass, before).decoded


def _commit(static, params, data, decoded, hidden, inside, at, index, step):
    """Scores the window's hidden states [B, block, D] and writes what is sure enough. inside: bool [B, block], may change."""
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
    sampling = {}
    if data["temperature"] is not None:
        # From the block and its step alone: a row draws the same in any batch.
        keys = jax.vmap(lambda k: jax.random.fold_in(jax.random.fold_in(k, index), step))(data["key"])
        sampling = dict(temperature=data["temperature"], key=keys)
    scores = lm_head_scores(
        hidden[:b],
        head,
        confidence=static.confidence,
        tempered_confidence=config.shifted,  # as in Dream's own code; LLaDA's has none
        active=todo if data["edit_threshold"] is None else inside,
        banned_tokens=data["banned"],
        implementation=implementation,
        **guidance,
        **sampling,
    )
    quota = None
    if data["steps"] is not None:
        # The rest spread evenly over the passes left, so that none of them is idle.
        left = jnp.maximum(jnp.asarray(data["steps"], jnp.int32) - step, 1)
        quota = -(-todo.sum(-1) // left)
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

    def put(array, values):
        return model.write_window(array, jnp.where(changed, values, model.read_window(array, at, block)), at)

    return Decoded(
        put(decoded.tokens, result.tokens),
        put(decoded.revealed, decoded.passes),
        put(decoded.confidence, scores.confidence),
        decoded.passes + 1,
    )


def end_rows(config, stop_at, decoded, hole):
    """Pads what follows a row's first stop token, once nothing before that token is masked."""
    if stop_at is None:
        return decoded
    ends = hole & jnp.isin(decoded.tokens, stop_at)
    open_before = jnp.cumsum(hole & (decoded.tokens == config.mask_id), axis=1) > 0
    ended = jnp.cumsum(ends & ~open_before, axis=1) - (ends & ~open_before) > 0
    return decoded._replace(tokens=jnp.where(ended & hole, config.pad_id, decoded.tokens))


def _both_streams(static, params, columns, data, state, hole, index, step, at):
    """Hidden states of the window at `at` [B], under guidance of both streams: [B or 2B, block, D]; both states of the carry."""
    tokens, start, stop, first = state.decoded.tokens, columns["start"], columns["stop"], columns["first"]
    window = functools.partial(_window_states, static, params, data, state.block, index, step)
    if data["guidance_scale"] is None:
        return *window(state.cache, tokens, start, first, stop, at), ()
    if data["guidance_remask"] is not None:
        other = guided.without_doubtful(static.config, data["guidance_remask"], state.decoded, hole)
    else:
        other = jnp.where(hole, tokens, data["unconditional"])
    if data["guidance_refresh"] is None:
        rows = (tokens, other), (start, columns["unconditional_start"]), (first, first), (stop, stop), (at, at)
        return *window(state.cache, *map(jnp.concatenate, rows)), ()
    hidden, cache = window(state.cache, tokens, start, first, stop, at)
    # A block's first pass is always one of these, so the cache of a block-causal model misses no block.
    kept = jax.lax.cond(
        step % data["guidance_refresh"] == 0,
        lambda kept: window(kept[1], other, columns["unconditional_start"], first, stop, at),
        lambda kept: kept,
        state.other,
    )
    return jnp.concatenate([hidden, kept[0]]), cache, kept


def _towards_wanted(static, params, columns, data, tokens, at):
    """What classifier guidance adds to the window's hidden states, [B, block, D]."""
    column = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    start, stop = (jnp.broadcast_to(columns[name][:, None], tokens.shape) for name in ("start", "stop"))
    towards = classifiers.direction(
        static.config, params, data["classifier"], tokens, (start <= column) & (column < stop), positions=column - start,
        mask=masks.KeyIntervals(start, stop), implementation=static.implementation,
    )  # fmt: skip
    scale = jnp.asarray(data["classifier_scale"], jnp.float32)[..., None, None]
    return model.read_window(towards, at, static.block) * scale


def _window_states(static, params, data, before, index, step, cache, tokens, starts, first, stop, at):
    """Hidden states [rows, block, D] of the window at `at` [rows], and the cache. before: int32, the block of the last pass."""
    config, block, implementation = static.config, static.block, static.implementation
    length = tokens.shape[1]

    def where(begin, size):
        """Positions (a row's start is 0) and mask of the columns [begin, begin + size)."""
        column = begin[:, None] + jnp.arange(size, dtype=jnp.int32)
        end = jnp.broadcast_to(stop[:, None], column.shape)
        if static.attend == "blocks":
            end = jnp.minimum(end, first[:, None] + ((column - first[:, None]) // block + 1) * block)
        begin = jnp.broadcast_to(starts[:, None], column.shape)
        return dict(positions=column - begin, mask=masks.KeyIntervals(begin, end), implementation=implementation)

    if not static.cached:
        hidden = model.hidden_states(config, params, tokens, **where(jnp.zeros_like(at), length))
        return model.read_window(hidden, at, block), []

    def window(size):
        """Computes `size` columns up to the end of the window."""
        size = min(size + config.shifted, length)

        def run(cache):
            begin = jnp.clip(at + block - size, 0, length - size)
            part = model.read_window(tokens, begin, size)
            hidden, cache = model.cached_states(config, params, part, cache, begin, **where(begin, size))
            return model.read_window(hidden, at - begin, block), cache

        return run

    if static.attend == "all":
        return jax.lax.cond(step % data["refresh"] == 0, window(length), window(block), cache)
    # A block's first pass also commits the block before it, whose keys were last computed with masks among its tokens. What
    # lies further back is in the cache already, unless given blocks were skipped: then as at the very start, everything.
    way = jnp.where(index == before, 0, jnp.where(index == before + 1, 1, 2))
    return jax.lax.switch(way, [window(block), window(2 * block), window(length)], cache)
