"""A small classifier on the model's hidden states, and the guidance that it gives: towards what it takes for wanted."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from dlm_kernels.denoiser import checkpoint, data, half, limits, losses, model

TOKENS = 2**14  # whose hidden states `fit` and `accuracy` have in memory at once, or one row's


class Classifier(NamedTuple):
    """log p(wanted | tokens) = log_sigmoid(mean(hidden_states(tokens)) @ weight + bias), of the tokens that are no padding."""

    weight: jax.Array  # float32 [D]
    bias: jax.Array  # float32, scalar


def mean_state(hidden, seen):
    """float32 [B, D] of hidden [B, L, D]: the mean over the positions `seen`, bool [B, L]."""
    weights = seen / jnp.maximum(seen.sum(1, keepdims=True), 1)
    return jnp.einsum("bld,bl->bd", hidden.astype(jnp.float32), weights.astype(jnp.float32))


def log_p(classifier, hidden, seen):
    """log p(wanted), float32 [B]."""
    return jax.nn.log_sigmoid(mean_state(hidden, seen) @ classifier.weight + classifier.bias)


def direction(config, params, classifier, tokens, seen, **options):
    """What guidance adds to the hidden states, [B, L, D]: the gradient of log p(wanted) by the embedding at each position.

        ratio[v] = log p(wanted | tokens with v at l) - log p(wanted | tokens)  # one pass for every v and l: too many
        ratio[v] = (embed[v] - embed[tokens[l]]) @ gradient[l]                  # to first order
        logits[l, v] += scale * ratio[v]                                        # head(hidden + scale * gradient), plus a constant

    The head has to be the embedding, transposed. options go to `model.hidden_states`. Source: Schiff et al. 2025, D-CBG to
    first order.
    """

    def total(embedded):
        hidden = model.hidden_states(config, params, tokens, embedded=embedded, **options)
        return log_p(classifier, hidden, seen).sum()

    return jax.grad(total)(half.look_up(params["embed"], tokens))


def fit(loaded, wanted, unwanted, *, length=64, maskings=4, strength=1e-2, seed=0, implementation=None):
    """A Classifier between two lists of texts: ridge-regularised logistic regression, by Newton's method.

    loaded: (config, params, tokenizer). Each text is cut into rows of `length` tokens, each masked `maskings` times at ratios
    spread evenly over 0-100%, because decoding asks of half-masked rows. Returns (classifier, the share of the rows it gets
    right). Raises ValueError where a list has less than one row.
    """
    x, y = _features(loaded, wanted, unwanted, length, maskings, seed, implementation)
    share = len(y) / np.bincount(y)[y] / 2  # both classes weigh alike
    w = np.zeros(x.shape[1])
    penalty = strength * len(x) * np.diag([1.0] * (len(w) - 1) + [0.0])
    for _ in range(20):
        p = 1 / (1 + np.exp(-x @ w))
        curvature = (x * (share * p * (1 - p))[:, None]).T @ x + penalty
        # The bias has no penalty, and no curvature either once every row is certain.
        w -= np.linalg.solve(curvature + 1e-9 * np.eye(len(w)), x.T @ (share * (p - y)) + penalty @ w)
    right = float(np.mean((x @ w > 0) == (y == 1)))
    return Classifier(jnp.asarray(w[:-1], jnp.float32), jnp.asarray(w[-1], jnp.float32)), right


def accuracy(loaded, classifier, wanted, unwanted, *, length=64, maskings=4, seed=0, implementation=None):
    """The share of the rows of other texts, cut and masked as in `fit`, that it gets right: the mean of both lists' shares."""
    x, y = _features(loaded, wanted, unwanted, length, maskings, seed, implementation)
    right = (x @ np.append(classifier.weight, classifier.bias) > 0) == (y == 1)
    return float(np.mean([right[y == label].mean() for label in (0, 1)]))


def _features(loaded, wanted, unwanted, length, maskings, seed, implementation):
    """Mean states of the masked rows, and a 1 after each: float64 [N, D + 1]; and which are wanted, [N] of 0 and 1."""
    limits.counts(length=length)
    config, params, tokenizer = loaded
    cut = []
    for name, texts in (("unwanted", unwanted), ("wanted", wanted)):
        stream = data.stream(tokenizer, texts, config.eos_id) if texts else np.zeros(0, np.int32)
        cut.append(stream[: len(stream) // length * length].reshape(-1, length))
        if not len(cut[-1]):
            raise ValueError(f"{name}: expected at least {length} tokens, got {len(stream)}")
    features, labels, together = [], [], max(1, TOKENS // length)
    for label, rows in enumerate(cut):
        for draw in range(maskings):
            key = jax.random.fold_in(jax.random.key(seed), draw)
            masked = _masked(rows, key, config.mask_id)
            for first in range(0, len(rows), together):
                states = _mean_states(config, implementation, params, masked[first : first + together])
                features.append(np.asarray(states, np.float64))
            labels.append(np.full(len(rows), label))
    x = np.concatenate(features)
    return np.concatenate([x, np.ones((len(x), 1))], axis=1), np.concatenate(labels)


@functools.partial(jax.jit, static_argnums=2)
def _masked(rows, key, mask_id):
    return losses.corrupt(rows, key, mask_id, rows.shape[1])[0]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _mean_states(config, implementation, params, tokens):
    return mean_state(model.hidden_states(config, params, tokens, implementation=implementation), jnp.ones(tokens.shape, bool))


def save(path, classifier):
    arrays = {name: np.asarray(array).reshape(-1) for name, array in classifier._asdict().items()}
    checkpoint.write_atomic(path, safetensors.numpy.save(arrays))


def load(path, config):
    """Raises ValueError where the file holds no classifier, or that of a model of another width."""
    arrays = checkpoint.read(path)
    found = {name: list(array.shape) for name, array in arrays.items()}
    if found != {"bias": [1], "weight": [config.d_model]}:
        raise ValueError(f"{path}: expected a bias and a weight of shape [{config.d_model}], got {found}")
    return Classifier(jnp.asarray(arrays["weight"]), jnp.asarray(arrays["bias"][0]))
