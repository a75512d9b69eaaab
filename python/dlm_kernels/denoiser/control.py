"""Control over what is written: phrases that must come, and the bias of single tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from dlm_kernels import lm_head_scores, masks
from dlm_kernels.denoiser import model


def require(config, params, tokens, phrase, *, start, implementation=None):
    """`tokens` with `phrase` written into each row's holes where the model finds it likeliest; decoding leaves it there.

        log_p = log_softmax(head(hidden_states(tokens)))
        at = argmax over begin of sum(log_p[begin + i, phrase[i]] for i)        # where begin, begin + 1, ... are all holes
        tokens[at : at + len(phrase)] = phrase

    tokens int32 [B, L], phrase: token ids, start int32 [B], each row's first column that is not padding. Ties go to the lower
    column. Raises ValueError where a row has no run of holes that is long enough.
    """
    tokens, phrase = np.array(tokens, np.int32), np.asarray(phrase, np.int32)
    if phrase.ndim != 1 or not len(phrase):
        raise ValueError(f"phrase: expected at least one token id, got shape {list(phrase.shape)}")
    log_p = np.asarray(_log_p(config, params, tokens, phrase, np.asarray(start, np.int32), implementation), np.float64)
    places = tokens.shape[1] - len(phrase) + 1
    if places < 1:
        raise ValueError(f"phrase: expected at most {tokens.shape[1]} tokens, got {len(phrase)}")
    holes = tokens == config.mask_id
    fits = np.all([holes[:, i : i + places] for i in range(len(phrase))], axis=0)
    if not fits.any(1).all():
        raise ValueError(f"phrase: expected a run of {len(phrase)} holes in every row, got none in row {fits.any(1).argmin()}")
    total = sum(log_p[:, i : i + places, i] for i in range(len(phrase)))
    for row, at in enumerate(np.where(fits, total, -np.inf).argmax(1)):
        tokens[row, at : at + len(phrase)] = phrase
    return tokens


@functools.partial(jax.jit, static_argnums=(0, 5))
def _log_p(config, params, tokens, ids, start, implementation):
    """log p of each of `ids` [n] at every position: float32 [B, L, n]."""
    column = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    begin = jnp.broadcast_to(start[:, None], tokens.shape)
    seen = masks.KeyIntervals(begin, jnp.full_like(begin, tokens.shape[1]))
    hidden = model.hidden_states(
        config, params, tokens, positions=column - begin, mask=seen, implementation=implementation
    )
    head = model.head_weight(config, params)
    total = lm_head_scores(hidden, head, implementation=implementation).logsumexp
    return (hidden @ head[ids].T).astype(jnp.float32) - total[..., None]


def logit_bias(config, biases):
    """float32 [V] of {token id: bias}, for `sampler.decode`. Raises ValueError for what is no id or no finite number."""
    array = np.zeros(config.vocab, np.float32)
    for token, bias in biases.items():
        if not 0 <= token < config.vocab:
            raise ValueError(f"logit_bias: expected token ids in [0, {config.vocab}), got {token}")
        if not np.isfinite(bias):
            raise ValueError(f"logit_bias: expected finite numbers, got {bias} for token {token}; banned excludes a token")
        array[token] = bias
    return array
