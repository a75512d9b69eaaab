"""What is given to the denoiser: each check raises a ValueError that names the argument, what was expected and what came."""

import jax
import jax.numpy as jnp
import numpy as np

MOST = np.finfo(np.float32).max  # more is infinite once it is cast


def numbers(low=-np.inf, high=np.inf, *, above=False, **given):
    """Finite in float32 and from low, or `above` it, to high: numbers, arrays or pairs of them. None and JAX's own arrays, not read
    here, pass.
    """
    if high < np.inf:
        expected = f"a number {f'above {low} and at most {high}' if above else f'in [{low}, {high}]'}"
    else:
        expected = f"{'above' if above else 'at least'} {low}" if low > -np.inf else "a finite number"
    for name, value in given.items():
        for part in value if isinstance(value, (tuple, list)) else (value,):
            if part is None or isinstance(part, jax.Array):
                continue
            array = np.asarray(part)
            known = jnp.issubdtype(array.dtype, jnp.number)
            if not known or not ((low <= array) & (array <= high) & (abs(array) <= MOST)).all() or (above and (array == low).any()):
                raise ValueError(f"{name}: expected {expected}, got {value}")


def ordered(**given):
    """Pairs (low, high) of numbers or arrays. None and JAX's own arrays, not read here, pass."""
    for name, pair in given.items():
        known = pair is not None and not any(isinstance(end, jax.Array) for end in pair)
        if known and (np.asarray(pair[0]) > np.asarray(pair[1])).any():
            raise ValueError(f"{name}: expected low at most high, got {pair}")


def whole(low, high=None, **given):
    """`numbers` without a fraction; by default no more than int32 holds."""
    numbers(low, np.inf if high is None else high, **given)
    most = 2**31 - 1 if high is None else high
    for name, value in given.items():
        if value is None or isinstance(value, jax.Array):
            continue
        array = np.asarray(value)
        if not np.issubdtype(array.dtype, np.integer) or (array > most).any():
            raise ValueError(f"{name}: expected a whole number of at most {most}, got {value}")


def counts(least=1, **given):
    """Whole numbers that int32 holds, and that are never traced."""
    for name, value in given.items():
        if not isinstance(value, (int, np.integer)) or value < least:
            raise ValueError(f"{name}: expected an int of at least {least}, got {value!r}")
        whole(least, **{name: value})


def ids(vocab, **given):
    """Iterables of token ids."""
    for name, tokens in given.items():
        if not np.iterable(tokens):
            raise ValueError(f"{name}: expected token ids in [0, {vocab}), got {tokens!r}")
        for token in tokens:
            if not isinstance(token, (int, np.integer)) or not 0 <= token < vocab:
                raise ValueError(f"{name}: expected token ids in [0, {vocab}), got {token!r}")


def texts(**given):
    """Lists of texts. One text alone would be taken for a list of its characters."""
    for name, value in given.items():
        if not isinstance(value, (list, tuple)) or not all(isinstance(text, str) for text in value):
            raise ValueError(f"{name}: expected a list of texts, got {value!r:.80}")


def canvas(tokens):
    """`tokens` as int32 [B, L]. Raises ValueError for another shape, and where it holds nothing."""
    tokens = jnp.asarray(tokens, jnp.int32)
    if tokens.ndim != 2 or 0 in tokens.shape:
        raise ValueError(f"tokens: expected shape [B, L] with neither zero, got {list(tokens.shape)}")
    return tokens
