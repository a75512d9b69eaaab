"""Decoding without masks: of a block of random tokens a pass keeps those it is sure of and draws all others anew."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dlm_kernels import lm_head_scores, soft_embedding, unmask_topk
from dlm_kernels.denoiser import blocks, gemma, half, limits, model


class _State(NamedTuple):
    """The loop's carry; rows go through the blocks together."""

    decoded: blocks.Decoded
    at: jax.Array  # int32 [B], the window's first column
    index: jax.Array  # int32, the block
    step: jax.Array  # int32, passes made on it
    inside: jax.Array  # bool [B, block], what the block has to write
    best: jax.Array  # int32 [B, block], the likeliest tokens of the pass before
    cache: list  # per layer (key, value) of a model that has a cache, else empty
    soft: jax.Array  # [B, block, D], its soft embeddings; zeros in a block's first pass
    settled: jax.Array  # bool [B], rows whose block is done
    over: jax.Array  # bool, whether the next pass opens a block


def decode(
    config, params, tokens, *, block, key, steps=48, budget=0.1, temperature=(0.8, 0.4), calm=0.005, start=0, first=0, stop=None,
    banned_tokens=None, stop_at=None, on_pass=None, implementation=None,
):  # fmt: skip
    """Replaces every mask in `tokens`, block after block, by DiffusionGemma's rules; a committed token is never final.

        for begin in range(first, stop, block):
            canvas, soft = random tokens, zeros
            for step in range(steps):
                t = temperature[0] + (temperature[1] - temperature[0]) * step / steps
                logits = head(hidden_states(self_conditioned(canvas, soft)))    # it sees what stands before, and its own block
                sample, entropy = categorical(softmax(logits / t)), entropy(softmax(logits / t))
                accepted = the most certain, while the entropies of those before sum to at most budget
                canvas = where(accepted, sample, random tokens)
                soft = soft_embedding(...)                                      # of softmax(logits / t)
                if argmax(logits) is as in the pass before and mean(entropy) <= calm: break
            tokens = argmax(logits)

    Arguments:
      config, params: a model that has learnt from such noise: DiffusionGemma, whose encoder reads each block that is done into a
        cache and whose blocks are canvases, or one of `losses.uniform_loss`; without config.self_conditioning nothing is expected
        of `soft`, and it is not computed.
      tokens: int32 [B, L]; the masks in it are what is written. start, first, stop, block, banned_tokens, stop_at, on_pass: as in
        `sampler.decode`. key: a JAX threefry key for each row, [B].
      steps: passes a block at most. budget: in nats. temperature: of the first pass, above 0, and what it falls to. calm: in nats.

    All but block are data. A row does not depend on its batch. Returns Decoded: `revealed` is the pass that last changed the token.
    Raises ValueError for arguments that do not fit. Source: DiffusionGemma's sampler; its ports', which end by writing argmax.
    """
    tokens = limits.canvas(tokens)
    b, length = tokens.shape
    limits.counts(block=block)
    limits.whole(1, steps=steps)
    if jnp.shape(key)[:1] != (b,):
        raise ValueError(f"key: expected a key for each of {b} rows, got shape {list(jnp.shape(key))}")
    if np.shape(temperature) != (2,):
        raise ValueError(f"temperature: expected two numbers, the first pass's and the last's, got {temperature}")
    limits.numbers(0, budget=budget, temperature=temperature, calm=calm)
    limits.numbers(0, above=True, temperature=temperature[0])  # no pass reaches the other
    columns = blocks.row_columns(config, tokens, start, first, stop)
    data = dict(
        steps=jnp.asarray(steps, jnp.int32), budget=jnp.asarray(budget, jnp.float32), calm=jnp.asarray(calm, jnp.float32),
        temperature=jnp.asarray(temperature, jnp.float32), key=key, banned=blocks.banned_ids(config, banned_tokens),
        stop_at=stop_at,
    )  # fmt: skip
    return _decode((config, min(block, length), implementation, on_pass), params, tokens, columns, data)


@functools.partial(jax.jit, static_argnums=0)
def _decode(static, params, tokens, columns, data):
    config, block, implementation, on_pass = static
    b, length = tokens.shape
    hole = blocks.holes(config, tokens, columns)
    head = model.head_weight(config, params)
    encoded = not config.learnt_masks
    soft_cap = config.soft_cap if encoded else None

    def unwritten(decoded):
        return hole & (decoded.tokens == config.mask_id)

    def noise(index, step, stream):
        """Random tokens [B, block], of the row, the block and the step alone."""
        keys = blocks.row_keys(data["key"], index, step, stream)
        return keys, jax.vmap(lambda k: jax.random.randint(k, (block,), 0, config.vocab))(keys)

    def read(tokens, cache, known, to):
        """The cache, where the encoder wrote the columns from `known` to before `to`, both int32 [B], and those behind at will."""

        def a_window(carry):
            known, cache = carry
            at = jnp.minimum(known, length - block)
            window = model.read_window(tokens, at, block)
            cache = gemma.encoded(config, params, window, cache, at, start=columns["start"], implementation=implementation)
            return known + block, cache

        return jax.lax.while_loop(lambda carry: (carry[0] < to).any(), a_window, (known, cache))[1]

    def opened(state):
        """The next block that has masks, filled with noise."""
        todo = unwritten(state.decoded)
        index = blocks.next_block(todo, columns["first"], block).min()
        at, inside = blocks.window(todo, columns["first"], block, index)
        # From the block before on, whose keys and values there are a canvas's.
        cache = read(state.decoded.tokens, state.cache, state.at, at) if encoded else []
        canvas = jnp.where(inside, noise(index, 0, 0)[1], model.read_window(state.decoded.tokens, at, block))
        return state._replace(
            decoded=state.decoded._replace(tokens=model.write_window(state.decoded.tokens, canvas, at)),
            at=at, index=index, step=jnp.int32(0), inside=inside, best=jnp.full_like(state.best, -1),
            cache=cache, soft=jnp.zeros_like(state.soft), settled=~inside.any(1),
        )  # fmt: skip

    def states(state):
        """The block's hidden states, [B, block, D], and the cache."""
        # What follows the block is not there yet.
        end = jnp.minimum(columns["stop"], columns["first"] + (state.index + 1) * block)
        if encoded:
            canvas = model.read_window(state.decoded.tokens, state.at, block)
            return gemma.canvas_states(
                config, params, canvas, state.soft, state.cache, state.at, start=columns["start"], end=end,
                implementation=implementation,
            )  # fmt: skip
        embedded = half.look_up(params["embed"], state.decoded.tokens)
        if config.self_conditioning:
            window = model.read_window(embedded, state.at, block)
            window = model.self_conditioned(config, params, window, state.soft, implementation)
            embedded = model.write_window(embedded, window, state.at)
        hidden = model.hidden_states(
            config, params, state.decoded.tokens, embedded=embedded, **model.within(columns["start"], end, length),
            implementation=implementation,
        )  # fmt: skip
        return model.read_window(hidden, state.at, block), state.cache

    def one_pass(state):
        state = jax.lax.cond(state.over, opened, lambda state: state, state)
        decoded, at, inside, step = state.decoded, state.at, state.inside, state.step
        hidden, cache = states(state)
        warm, cool = data["temperature"]
        t = warm + (cool - warm) * step / data["steps"]
        # Samples and likeliest tokens at once: the head is read once for both.
        keys = jnp.tile(noise(state.index, step, 1)[0], 2)
        both = lm_head_scores(
            jnp.tile(hidden, (2, 1, 1)), head, temperature=jnp.repeat(jnp.stack([t, jnp.zeros_like(t)]), b), key=keys,
            tempered_confidence=True, active=jnp.tile(inside, (2, 1)), banned_tokens=data["banned"], logits_soft_cap=soft_cap,
            implementation=implementation,
        )  # fmt: skip
        sampled, likeliest = jax.tree.map(lambda x: x[:b], both), jax.tree.map(lambda x: x[b:], both)
        accepted = unmask_topk(
            jnp.where(inside, config.mask_id, 0), sampled, mask_id=config.mask_id, entropy_budget=data["budget"],
            candidates=inside, implementation=implementation,
        ).unmasked  # fmt: skip
        count = jnp.maximum(inside.sum(1), 1)
        stable = ((likeliest.token == state.best) | ~inside).all(1)
        settled = state.settled | (stable & (jnp.where(inside, sampled.entropy, 0).sum(1) / count <= data["calm"]))
        over = settled.all() | (step >= data["steps"] - 1)
        canvas = jnp.where(accepted, sampled.token, noise(state.index, step, 2)[1])
        canvas = jnp.where((settled | over)[:, None], likeliest.token, canvas)
        # A row that settled earlier keeps what it had then.
        old = model.read_window(decoded.tokens, at, block)
        changing = inside & ~state.settled[:, None]
        canvas = jnp.where(changing, canvas, old)

        decoded = blocks.Decoded(
            blocks.put(decoded.tokens, canvas, changing, at),
            blocks.put(decoded.revealed, decoded.passes, changing & (canvas != old), at),
            blocks.put(decoded.confidence, likeliest.confidence, changing, at),
            decoded.passes + 1,
        )
        ended = blocks.end_rows(config, data["stop_at"], decoded.tokens, hole)
        decoded = decoded._replace(tokens=jnp.where(over, ended, decoded.tokens))
        soft = state.soft
        if config.self_conditioning:

            def softened():
                return soft_embedding(
                    hidden, head, embedding=params["embed"], temperature=t, logits_soft_cap=soft_cap, implementation=implementation
                )

            soft = jax.lax.cond(over, lambda: state.soft, softened)  # the next block begins without
        if on_pass is not None:
            jax.debug.callback(lambda *fields: on_pass(blocks.Decoded(*fields)), *decoded, ordered=True)
        return _State(decoded, at, state.index, step + 1, inside, likeliest.token, cache, soft, settled, over)

    nothing, dtype = jnp.zeros((b, block), bool), params["embed"].dtype
    before = _State(
        blocks.untouched(tokens), columns["start"], jnp.int32(0), jnp.int32(0), nothing, jnp.zeros((b, block), jnp.int32),
        gemma.empty_cache(config, b, length, dtype) if encoded else [],
        jnp.zeros((b, block, config.d_model), dtype), jnp.zeros(b, bool), jnp.bool_(True),
    )  # fmt: skip
    return jax.lax.while_loop(lambda state: ~state.over | unwritten(state.decoded).any(), one_pass, before).decoded
