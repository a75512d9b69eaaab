"""Block-parallel decoding as one jitted `lax.while_loop`: nothing returns to the host between passes."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dlm_kernels.denoiser import blocks, commit, experts, limits, model, streams
from dlm_kernels.denoiser import remask as remasking

NEVER = 1_000_000  # more passes than a block takes, and more blocks than a canvas has


class _Static(NamedTuple):
    """What a compiled loop is specialised to."""

    config: object
    block: int
    confidence: str
    remask_rule: str
    seen: int | None  # size of the blocks that see nothing behind them, None where all see all
    cached: bool
    moves: bool  # whether tokens may be deleted and inserted
    implementation: str | None
    on_pass: object


class _State(NamedTuple):
    """The loop's carry."""

    decoded: blocks.Decoded
    index: jax.Array  # int32, the block of the last pass
    step: jax.Array  # int32, passes made on it
    cache: list  # per layer (key, value), or empty
    other: tuple  # the unconditional stream's (hidden states of the window, cache) where it is not computed every pass, or empty
    edits: jax.Array  # int32 [B], passes that may still edit that block; 0 where it is done, or has not been begun
    original: jax.Array  # bool [B, L], masks that no edit has put there; of size 0 where nothing moves


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
    edit_passes=None,
    remask=None,
    remask_rule="least",
    confidence="probability",
    temperature=None,
    top_p=None,
    top_k=None,
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
        row with no mask in the block waits, so that what it gives does not depend on its batch. Where the model has a block_size,
        a part of it or a multiple, counted from the beginning of the model's own block that `first` is in.
      start, first, stop: int or int32 [B]. Columns before start and from stop (default L) on are padding, which nobody sees.
      steps: at most this many passes a block, 1 being 2 where its first token has one of its own, see `blocks.opened`.
      threshold, factor, entropy_budget: see `unmask_topk`. At least one of the four;
        with several the one that unmasks most holds, so steps with threshold is "all above it, and done in time".
      edit_threshold: also replace tokens of the block committed in an earlier pass, where the model is this sure of another.
      edit_passes: at most so many passes more over a block that is full, which only edit, until one changes nothing, as LLaDA2.1's
        max_post_steps. Default: none. With them a model that has a delete_id and an insert_id may move tokens within the block,
        see `indel.apply`, unless it is remasked too: the masks that this leaves are filled in the next pass, and the last one
        moves nothing. So many passes after as many as the block has places it ends in any case.
      remask: after every pass but a block's last, mask anew this share (rounded down) of what earlier passes wrote in it, the least
        confident when written first; the passes left commit so much more. Needs steps.
      remask_rule: "least", that; or "cap", "rescale" or "confidence", where remask is the strength of ReMDM's random rules, see
        `remask.sigma`, which need a key.
      confidence: see `score_tokens`; models with shifted logits or a block_size have that of the tempered distribution.
      temperature: None for greedy, else a scalar or [B], traced. key: a JAX threefry key for each row, [B], for a temperature, a
        random remask_rule or confidence "random".
      top_p, top_k: choose among the most likely tokens alone: truncate_logits(logits, top_p=, top_k=, temperature=) of the logits
        after guidance, bias and banned tokens, in the place of them all. Confidences and entropies are of these, at temperature 0
        too. Scalars or [B]. The logits, else fused with the head, are in memory then.
      unconditional, guidance_scale: classifier-free guidance. unconditional: int32 [B, L], what stands in the place of the given
        tokens for the unconditional stream, from column unconditional_start on; guidance_scale: scalar, [B] or [B, L], 1 is none.
      guidance_final: the scale, scalar or [B], that a block is nearing as it fills: a mean of the two, in which guidance_scale's
        weight is the share of the block's holes that are still masked.
      guidance_interval: (low, high), each a scalar or [B]: guide only while the share of the block's holes that are still
        masked is within them, both inclusive.
      guidance_remask: adaptive guidance (A-CFG), in the place of `unconditional`: the unconditional stream keeps the given
        tokens and masks this share of the decoded ones anew, at least one, the least confident (when written) first. With a cache
        the blocks before stay, in that stream, as they were read when it last computed their keys. With attend "blocks" it computes
        them anew after a block that the whole batch skips: there a row in which whole blocks are given depends on its batch.
      guidance_refresh: compute the unconditional stream anew in every so many passes of a block only, and keep its hidden states
        for those between. Default: every pass, in one batch with the conditional stream. A renewal of its cache that falls due
        between waits for the next of them.
      banned_tokens: int32 [M], never chosen. The mask always is, and the pad unless it is end-of-text too.
      logit_bias: [V], added to the logits, after guidance; finite, and rounded to the parameters' dtype.
      classifier, classifier_scale: guidance towards what a `classifier.Classifier` takes for wanted, whose log p counts
        classifier_scale times, a scalar or [B]; a forward and a backward pass more, over the whole canvas. For tied embeddings.
      stop_at: a token that ends its row, or several [N]: once one and all before it are there, what follows becomes config.pad_id;
        with edit_passes not before its block has had them.
      attend: "all": every position sees the whole canvas. "blocks": its own block and those before (a block-causal model);
        with block 1 that is an autoregressive decoder. A model with a block_size attends by its own blocks either way.
      cache: keep keys and values, and compute the block only. Exact for "blocks" and a model's own: the pass that commits a block
        is part of the next block's first. The blocks of an unconditional stream have to be the conditional one's. For "all" the
        others' are stale (dual cache), computed anew every `refresh` passes of a block, by default in its first only.
      on_pass: called on the host with a Decoded after every pass (for a live view; the loop does not wait for it).

    steps, thresholds, temperature, top_p, top_k, scale, start, first, stop and refresh are data: changing them compiles nothing.
    Returns Decoded. Raises ValueError for arguments that do not fit.
    """
    tokens = jnp.asarray(tokens, jnp.int32)
    rules = dict(threshold=threshold, factor=factor, entropy_budget=entropy_budget)
    other_start = start if unconditional is None else unconditional_start
    _check(
        config, tokens, rules, block=block, steps=steps, edit_threshold=edit_threshold, edit_passes=edit_passes, remask=remask,
        remask_rule=remask_rule, confidence=confidence, temperature=temperature, top_p=top_p, top_k=top_k, key=key,
        logit_bias=logit_bias, classifier=classifier, classifier_scale=classifier_scale, attend=attend, cache=cache,
        refresh=refresh, start=start, stop=stop,
    )  # fmt: skip
    _check_guidance(
        config, tokens, start=start, cache=cache, unconditional=unconditional, other_start=other_start,
        guidance_scale=guidance_scale, guidance_final=guidance_final, guidance_interval=guidance_interval,
        guidance_remask=guidance_remask, guidance_refresh=guidance_refresh,
    )  # fmt: skip
    if tokens.size == 0:
        return blocks.untouched(tokens)
    length, own = tokens.shape[1], config.block_size
    seen = max(own or 0, min(block, length)) if own or attend == "blocks" else None
    columns = blocks.row_columns(config, tokens, start, first, stop, unconditional_start=other_start)
    moves = config.delete_id is not None and edit_passes is not None and remask is None
    # Each of one dtype: 2, 2.0 and NumPy's would each compile a loop of its own. What is None is not in the loop at all.
    real, whole = (functools.partial(jax.tree.map, lambda x, to=to: jnp.asarray(x, to)) for to in (jnp.float32, jnp.int32))
    data = dict(
        steps=whole(steps),  # []
        refresh=whole(NEVER if refresh is None else refresh),  # []
        guidance_refresh=whole(guidance_refresh),  # []
        stop_at=whole(stop_at),  # [] or [N]
        unconditional=whole(unconditional),  # [B, L]
        banned=blocks.banned_ids(config, banned_tokens, moves=moves),  # int32 [M]
        key=key,  # keys [B]
        classifier=classifier,  # a `classifier.Classifier`
        classifier_scale=real(classifier_scale),  # [] or [B]
        logit_bias=real(logit_bias),  # [V]
        temperature=real(temperature),  # [] or [B]
        top_p=real(top_p),  # [] or [B]
        top_k=whole(top_k),  # [] or [B]
        remask=real(remask),  # []
        edit_threshold=real(edit_threshold),  # [] or [B]
        edit_passes=whole(edit_passes),  # []
        guidance_scale=real(guidance_scale),  # [], [B] or [B, L]
        guidance_final=real(guidance_final),  # [] or [B]
        guidance_interval=real(guidance_interval),  # a pair, each [] or [B]
        guidance_remask=real(guidance_remask),  # []
        **real(rules),  # threshold, factor, entropy_budget: each [] or [B]
    )
    static = _Static(config, min(block, length), confidence, remask_rule, seen, bool(cache), moves, implementation, on_pass)
    return _decode(static, params, tokens, columns, data)


def _check(
    config, tokens, rules, *, block, steps, edit_threshold, edit_passes, remask, remask_rule, confidence, temperature, top_p, top_k,
    key, logit_bias, classifier, classifier_scale, attend, cache, refresh, start, stop,
):  # fmt: skip
    """Raises ValueError for arguments of `decode` that do not fit, but those of guidance. rules: those of `unmask_topk`."""
    if tokens.ndim != 2:
        raise ValueError(f"tokens: expected shape [B, L], got {list(tokens.shape)}")
    limits.counts(block=block)
    if steps is None and all(rule is None for rule in rules.values()):
        raise ValueError("steps, threshold, factor, entropy_budget: expected at least one, got none")
    limits.whole(1, steps=steps, edit_passes=edit_passes, refresh=refresh, top_k=top_k)
    limits.numbers(0, 1, remask=remask)
    limits.numbers(0, 1, above=True, top_p=top_p)
    limits.numbers(0, factor=rules["factor"], entropy_budget=rules["entropy_budget"], temperature=temperature)
    limits.numbers(threshold=rules["threshold"], edit_threshold=edit_threshold, classifier_scale=classifier_scale)
    if edit_passes is not None and edit_threshold is None:
        raise ValueError("edit_passes: expected an edit_threshold with it, got none")
    if remask is not None and steps is None:
        raise ValueError("remask: expected steps with it, which say when it has to end, got none")
    if remask_rule not in remasking.RULES:
        raise ValueError(f"remask_rule: expected one of {remasking.RULES}, got {remask_rule!r}")
    if remask is None and remask_rule != "least":
        raise ValueError("remask_rule: expected remask with it, got none")
    if attend not in ("all", "blocks"):
        raise ValueError(f"attend: expected 'all' or 'blocks', got {attend!r}")
    own = config.block_size
    if own is not None and own % block and block % own:
        raise ValueError(f"block: expected a divisor or a multiple of the model's block_size {own}, got {block}")
    if experts.together(config.experts):
        end = tokens.shape[1] if stop is None else stop
        if not blocks.whole_apart(config, start, end):
            where = f"whole blocks of {own} between them, whose tokens choose experts together"
            raise ValueError(f"start, stop: expected {where}, got {start} and {end}")
    if refresh is not None and (not cache or own or attend == "blocks"):
        got = f"cache={cache}, attend={attend!r}"
        raise ValueError(f"refresh: expected a cache of keys that grow old, cache=True with attend='all', got {got}")
    random = temperature is not None or remask_rule != "least" or confidence == "random"
    if random != (key is not None):
        raise ValueError("temperature, key: expected both or neither, and a key with a random remask_rule or confidence")
    b = tokens.shape[0]
    if key is not None and jnp.shape(key)[:1] != (b,):
        raise ValueError(f"key: expected a key for each of {b} rows, got shape {list(jnp.shape(key))}")
    if (classifier is None) != (classifier_scale is None):
        raise ValueError("classifier, classifier_scale: expected both or neither")
    if classifier is not None and not config.tie_embeddings:
        raise ValueError("classifier: expected a model whose head is its embedding, got tie_embeddings=False")
    if logit_bias is not None and jnp.shape(logit_bias) != (config.vocab,):
        raise ValueError(f"logit_bias: expected shape [{config.vocab}], got {list(jnp.shape(logit_bias))}")


def _check_guidance(
    config, tokens, *, start, cache, unconditional, other_start, guidance_scale, guidance_final, guidance_interval, guidance_remask,
    guidance_refresh,
):  # fmt: skip
    """Raises ValueError for arguments of classifier-free guidance that do not fit. other_start: of the unconditional stream."""
    limits.whole(1, guidance_refresh=guidance_refresh)
    limits.numbers(0, 1, guidance_remask=guidance_remask)
    limits.numbers(guidance_scale=guidance_scale, guidance_final=guidance_final, guidance_interval=guidance_interval)
    if unconditional is not None and guidance_remask is not None:
        raise ValueError("unconditional, guidance_remask: expected one unconditional stream, got two")
    if guidance_interval is not None and not (isinstance(guidance_interval, (tuple, list)) and len(guidance_interval) == 2):
        raise ValueError(f"guidance_interval: expected a pair (low, high), got {guidance_interval!r}")
    limits.ordered(guidance_interval=guidance_interval)
    if (unconditional is None and guidance_remask is None) != (guidance_scale is None):
        raise ValueError("guidance_scale: expected one with `unconditional` or guidance_remask, and none without")
    further = dict(guidance_final=guidance_final, guidance_interval=guidance_interval, guidance_refresh=guidance_refresh)
    for name, value in further.items():
        if guidance_scale is None and value is not None:
            raise ValueError(f"{name}: expected a guidance_scale with it, got none")
    if unconditional is not None and jnp.shape(unconditional) != tokens.shape:
        raise ValueError(
            f"unconditional: expected tokens' shape {list(tokens.shape)}, got {list(jnp.shape(unconditional))}"
        )
    b, length = tokens.shape
    if guidance_scale is not None and jnp.shape(guidance_scale) not in ((), (b,), tokens.shape):
        raise ValueError(f"guidance_scale: expected a scalar, [{b}] or {[b, length]}, got {list(jnp.shape(guidance_scale))}")
    if cache and not blocks.whole_apart(config, start, other_start):
        where = f"a multiple of the block_size {config.block_size} from start {start}"
        raise ValueError(f"unconditional_start: expected {where}, for a cache holds whole blocks, got {other_start}")


@functools.partial(jax.jit, static_argnums=0)
def _decode(static, params, tokens, columns, data):
    config, block = static.config, static.block
    b, length = tokens.shape
    hole = blocks.holes(config, tokens, columns)
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
        # The first block, over all rows, that still has a mask or is being edited.
        following = blocks.next_block(masked(state), columns["first"], block)
        index = jnp.where(state.edits > 0, state.index, following).min()
        step = jnp.where(index == state.index, state.step + 1, 0)
        at, inside = blocks.window(hole, columns["first"], block, index)
        hidden, cache, other = streams.both(static, params, columns, data, state, hole, index, step, at)
        if data["classifier"] is not None:
            towards = streams.towards_wanted(static, params, columns, data, state.decoded.tokens, at)
            # To both streams: their weights add up to 1.
            hidden += jnp.tile(towards, (hidden.shape[0] // b, 1, 1)).astype(hidden.dtype)
        # A row that waits for others must not be edited or masked anew meanwhile.
        todo = inside & (model.read_window(state.decoded.tokens, at, block) == config.mask_id)
        begun = todo.any(1)
        inside &= (begun | (state.edits > 0))[:, None]
        may = blocks.opened(config, columns["start"], at, todo, inside)
        original, last = todo, None
        if static.moves:
            original &= model.read_window(state.original, at, block)
            last = jnp.where(original.any(1), step >= block + data["edit_passes"], state.edits <= 1)
        decoded, left = commit.commit(static, params, data, state.decoded, hidden, may, original, last, at, index, step)
        if data["remask"] is not None:
            decoded = remasking.remask(config, static.remask_rule, data, decoded, inside, at, index, step)
        edits, ended = state.edits, blocks.end_rows(config, data["stop_at"], decoded.tokens, hole)
        if data["edit_passes"] is not None:
            changed = (decoded.tokens != state.decoded.tokens).any(1)
            edits = jnp.where(original.any(1), data["edit_passes"], (changed | begun) * (edits - 1))
            if static.moves:
                edits = jnp.where(last, 0, edits)
            # An end may still be edited, and what stands behind it move and come before it.
            ended = jnp.where((edits > 0)[:, None], decoded.tokens, ended)
        decoded = decoded._replace(tokens=ended)
        if static.on_pass is not None:
            jax.debug.callback(lambda *fields: static.on_pass(blocks.Decoded(*fields)), *decoded, ordered=True)
        original = blocks.put(state.original, left, inside, at) if static.moves else state.original
        return _State(decoded, index, step, cache, other, edits, original)

    # No block is the next after that.
    edits, original = jnp.zeros(b, jnp.int32), hole if static.moves else jnp.zeros((b, 0), bool)
    before = _State(blocks.untouched(tokens), jnp.int32(-NEVER), jnp.int32(0), cache, other, edits, original)
    return jax.lax.while_loop(lambda state: masked(state).any() | (state.edits > 0).any(), one_pass, before).decoded
