"""Control over what is written: phrases that must come, and the bias of single tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from dlm_kernels import lm_head_scores
from dlm_kernels.denoiser import limits, model


def require(config, params, tokens, required, *, start, later=(), implementation=None):
    """`tokens` with `required` written into each row's holes where the model finds it likeliest; decoding leaves it there.

        log_p = log_softmax(head(hidden_states(tokens)))
        at = argmax over begin of sum(log_p[begin + i, required[i]] for i)      # where begin, begin + 1, ... are all holes
        tokens[at : at + len(required)] = required

    tokens int32 [B, L], required: token ids, start int32 [B], each row's first column that is not padding. later: the lengths of
    phrases that are to be written after this one, for all of which it leaves room. Ties go to the lower column. Raises ValueError
    where a row has no such place.
    """
    tokens, required = np.array(tokens, np.int32), np.asarray(required, np.int32)
    if required.ndim != 1 or not len(required):
        raise ValueError(f"required: expected at least one token id, got shape {list(required.shape)}")
    log_p = np.asarray(_log_p(config, params, tokens, required, np.asarray(start, np.int32), implementation), np.float64)
    places = tokens.shape[1] - len(required) + 1
    if places < 1:
        raise ValueError(f"required: expected at most {tokens.shape[1]} tokens, got {len(required)}")
    holes = tokens == config.mask_id
    fits = np.all([holes[:, i : i + places] for i in range(len(required))], axis=0)
    total = np.where(fits, sum(log_p[:, i : i + places, i] for i in range(len(required))), -np.inf)
    for row in range(len(tokens)):
        for at in np.argsort(-total[row], kind="stable")[: fits[row].sum()]:
            written = tokens[row].copy()
            written[at : at + len(required)] = required
            if _room(_runs(written == config.mask_id), tuple(sorted(later, reverse=True))):
                break
        else:
            rest = f", and after it of {list(later)}" if later else ""
            raise ValueError(f"required: expected a run of {len(required)} holes in every row{rest}, got none in row {row}")
        tokens[row] = written
    return tokens


def _runs(holes):
    """The lengths of the runs of True in bool [L]."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], holes, [0]])))
    return tuple((edges[1::2] - edges[::2]).tolist())


@functools.lru_cache(2**18)
def _room(runs, lengths):
    """Whether phrases of these lengths, which fall, find places in runs of holes, none over another."""
    if not lengths:
        return True
    first, *others = lengths
    # In order, and without those too short for any, most ways to fill the runs leave the same, which is asked once.
    runs = tuple(sorted(run for run in runs if run >= lengths[-1]))
    if sum(runs) < sum(lengths) or sum(run // lengths[-1] for run in runs) < len(lengths):
        return False
    if first == lengths[-1]:
        return True
    last = {run: i for i, run in enumerate(runs) if run >= first}
    return any(_room((*runs[:i], *runs[i + 1 :], run - first), tuple(others)) for run, i in last.items())


@functools.partial(jax.jit, static_argnums=(0, 5))
def _log_p(config, params, tokens, ids, start, implementation):
    """log p of each of `ids` [n] at every position: float32 [B, L, n]."""
    length = tokens.shape[1]
    where = model.within(start, jnp.full_like(start, length), length)
    hidden = model.hidden_states(config, params, tokens, **where, implementation=implementation)
    head = model.head_weight(config, params)
    total = lm_head_scores(hidden, head, implementation=implementation).logsumexp
    return (hidden @ head[ids].T).astype(jnp.float32) - total[..., None]


def logit_bias(config, biases):
    """float32 [V] of {token id: bias}, for `sampler.decode`. Raises ValueError for what is no id or no finite number."""
    if not isinstance(biases, dict):
        raise ValueError(f"logit_bias: expected a dict from token ids to numbers, got {biases!r}")
    limits.ids(config.vocab, logit_bias=biases)
    array = np.zeros(config.vocab, np.float32)
    for token, bias in biases.items():
        if not isinstance(bias, (int, float, np.number)) or not abs(bias) <= limits.MOST:
            raise ValueError(f"logit_bias: expected finite numbers, got {bias!r} for token {token}; banned excludes a token")
        array[token] = bias
    return array
