"""Error correction of given text: tokens that the model rejects are replaced, pass after pass, until it has none left."""

import functools
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dlm_kernels import lm_head_scores, unmask_topk
from dlm_kernels.denoiser import limits, model
from dlm_kernels.denoiser.text import encoding

KEEP = re.compile(r"<keep>(.*?)</keep>", re.DOTALL)


class Corrected(NamedTuple):
    tokens: jax.Array  # int32 [B, L]
    changed: jax.Array  # bool [B, L], where they differ from what was given
    passes: jax.Array  # int32, forward passes made


def correct(config, params, tokens, *, threshold=0.9, passes=8, editable=None, start=0, stop=None, implementation=None):
    """Replaces every token where the model is surer than `threshold` of another one, until nothing changes.

        for _ in range(passes):
            p = softmax(head(hidden_states(tokens)))                            # of each token, which it sees
            tokens = where(editable & (p.max(-1) > threshold), p.argmax(-1), tokens)

    tokens int32 [B, L] without masks to fill (they stay); editable: bool [B, L], default everything but masks and padding;
    start, stop: int or int32 [B], outside of which is padding. passes, threshold are data. The model must have learnt from errors
    (`losses.with_errors`): another knows nothing about tokens that it sees. Returns Corrected. Source: LLaDA2.1's editing.
    """
    tokens = limits.canvas(tokens)
    if editable is None:
        editable = jnp.ones(tokens.shape, bool)
    if jnp.shape(editable) != tokens.shape:
        raise ValueError(f"editable: expected tokens' shape {list(tokens.shape)}, got {list(jnp.shape(editable))}")
    limits.numbers(threshold=threshold)
    limits.whole(0, passes=passes)
    b, length = tokens.shape
    start, stop = (jnp.broadcast_to(jnp.asarray(x, jnp.int32), (b,)) for x in (start, length if stop is None else stop))
    threshold, passes = jnp.asarray(threshold, jnp.float32), jnp.asarray(passes, jnp.int32)
    return _correct(config, implementation, params, tokens, jnp.asarray(editable), start, stop, threshold, passes)


def correct_text(loaded, text, **options):
    """(the corrected text, [(what stood there, what replaces it), ...], passes) of one text.

    loaded: (config, params, tokenizer) as `checkpoint.load` gives. Tokens with a character between `<keep>` and `</keep>`
    are frozen; options go to `correct`. Raises ValueError for a text without a token, or with the mask or the pad in it.
    """
    config, params, tokenizer = loaded
    text, kept = _unmarked(text)
    encoded = encoding(config, tokenizer, "text", text)
    ids = np.array(encoded.ids, np.int32)
    if not ids.size:
        raise ValueError("text: expected at least one token, got none")
    editable = np.array([not any(kept[begin:end]) for begin, end in encoded.offsets])
    made = correct(config, params, ids[None], editable=editable[None], **options)
    new = np.asarray(made.tokens[0])
    changes = [(tokenizer.decode([a]), tokenizer.decode([b])) for a, b in zip(ids.tolist(), new.tolist()) if a != b]
    return tokenizer.decode(new.tolist()), changes, int(made.passes)


def _unmarked(text):
    """(text without the marks, whether each of its characters is kept): encoded piece by piece it would have other tokens."""
    pieces = KEEP.split(text)
    return "".join(pieces), [i % 2 == 1 for i, piece in enumerate(pieces) for _ in piece]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _correct(config, implementation, params, tokens, editable, start, stop, threshold, passes):
    column = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    editable &= (start[:, None] <= column) & (column < stop[:, None]) & (tokens != config.mask_id)
    where = model.within(start, stop, tokens.shape[1])
    none = jnp.zeros(tokens.shape[0], jnp.int32)
    given = tokens

    def one_pass(state):
        tokens, _, done = state
        hidden = model.hidden_states(config, params, tokens, **where, implementation=implementation)
        scores = lm_head_scores(
            hidden,
            model.head_weight(config, params),
            active=editable,
            banned_tokens=jnp.asarray([config.mask_id, config.pad_id, config.eos_id]),
            implementation=implementation,
        )
        edited = unmask_topk(
            tokens, scores, mask_id=config.mask_id, num_unmask=none, candidates=editable,
            edit_threshold=jnp.broadcast_to(threshold, none.shape), implementation=implementation,
        ).tokens  # fmt: skip
        return edited, (edited != tokens).any(), done + 1

    before = (tokens, jnp.bool_(True), jnp.int32(0))
    tokens, _, done = jax.lax.while_loop(lambda state: state[1] & (state[2] < passes), one_pass, before)
    return Corrected(tokens, tokens != given, done)
