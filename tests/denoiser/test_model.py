"""The forward pass against NumPy in float64, position by position; and the cache against the whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm_kernels import masks
from dlm_kernels.denoiser import model
from dlm_kernels.denoiser.config import DenoiserConfig

hidden_states = jax.jit(model.hidden_states, static_argnums=0)
cached_states = jax.jit(model.cached_states, static_argnums=0)


def naive(config, params, tokens, positions, visible):
    """tokens [L], positions [L], visible bool [L, L] -> [L, D]."""
    p = {name: np.asarray(x, np.float64) for name, x in params.items()}
    length, h = len(tokens), config.head_size

    def norm(x, weight):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + config.rms_norm_eps) * weight

    def turn(x, position):
        angle = position * config.rope_theta ** (-np.arange(0, h, 2) / h)
        a, b = x[: h // 2], x[h // 2 :]
        return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)])

    x = p["embed"][tokens]
    for i in range(config.layers):
        w = {name.removeprefix(f"layers.{i}."): array for name, array in p.items() if name.startswith(f"layers.{i}.")}
        y = norm(x, w["attention_norm"])
        heads = {}
        for name in ("query", "key", "value"):
            z = y @ w[name] + (w[f"{name}_bias"] if config.qkv_bias else 0)
            heads[name] = z.reshape(length, -1, h)
        if config.qk_norm:
            heads["query"] = norm(heads["query"], w["query_norm"])
            heads["key"] = norm(heads["key"], w["key_norm"])
        out = np.zeros((length, config.heads, h))
        for n in range(config.heads):
            k = n // (config.heads // config.kv_heads)
            for t in range(length):
                query = turn(heads["query"][t, n], positions[t])
                seen = np.flatnonzero(visible[t])
                logits = np.array([query @ turn(heads["key"][s, k], positions[s]) for s in seen]) / np.sqrt(h)
                weights = np.exp(logits - logits.max())
                out[t, n] = (weights / weights.sum()) @ heads["value"][seen, k]
        x = x + out.reshape(length, -1) @ w["out"]
        y = norm(x, w["ffn_norm"])
        gate = y @ w["gate"]
        x = x + (gate / (1 + np.exp(-gate)) * (y @ w["up"])) @ w["down"]
    return norm(x, p["final_norm"])


@pytest.mark.parametrize("qk_norm, qkv_bias", [(True, False), (False, True)])
def test_against_numpy(qk_norm, qkv_bias, random):
    config = DenoiserConfig(
        layers=2, d_model=24, heads=4, kv_heads=2, head_size=6, ffn=40, vocab=53, qk_norm=qk_norm, qkv_bias=qkv_bias
    )
    params = model.init(config, jax.random.key(1))
    # Ones and zeros would hide a norm or a bias that is left out.
    params = {n: x + 0.3 * jax.random.normal(jax.random.key(len(n)), x.shape) for n, x in params.items()}
    tokens = random.integers(0, 53, (2, 9)).astype(np.int32)
    positions = np.stack([np.arange(9), np.arange(9) + 5]).astype(np.int32)
    mask = masks.block_causal(9, 4)
    hidden = hidden_states(config, params, tokens, positions=positions, mask=mask)
    visible = np.asarray(mask.as_boolean(9))[0, 0]
    for row in range(2):
        expected = naive(config, params, tokens[row], positions[row], visible)
        np.testing.assert_allclose(hidden[row], expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def test_a_window_against_the_cache_is_the_whole(config, params, random):
    """Rows at different places: each window's keys must land in its own columns."""
    tokens = jnp.asarray(random.integers(0, config.vocab, (3, 20)), jnp.int32)
    mask = masks.block_causal(20, 5)
    whole = hidden_states(config, params, tokens, mask=mask)
    cache = model.empty_cache(config, 3, 20, jnp.float32)
    stale = tokens.at[:, 10:].set(config.mask_id)
    positions = jnp.arange(20, dtype=jnp.int32)[None]
    zero = jnp.zeros(3, jnp.int32)
    _, cache = cached_states(config, params, stale, cache, zero, positions=positions, mask=mask)
    for at in ([10, 10, 10], [15, 15, 15]):
        at = jnp.asarray(at, jnp.int32)
        columns = at[:, None] + jnp.arange(5, dtype=jnp.int32)
        seen = masks.KeyIntervals(jnp.zeros_like(columns), (columns // 5 + 1) * 5)
        window = model.read_window(tokens, at, 5)
        hidden, cache = cached_states(config, params, window, cache, at, positions=columns, mask=seen)
        np.testing.assert_allclose(hidden, model.read_window(whole, at, 5), atol=1e-5)


def test_windows_of_rows_at_different_columns(random):
    array = jnp.asarray(random.normal(size=(3, 7, 2)))
    window = jnp.asarray(random.normal(size=(3, 2, 2)))
    at = jnp.asarray([0, 5, 2])
    written = np.asarray(model.write_window(array, window, at))
    expected = np.array(array)
    for row, begin in enumerate([0, 5, 2]):
        expected[row, begin : begin + 2] = window[row]
    np.testing.assert_array_equal(written, expected)
    np.testing.assert_array_equal(model.read_window(jnp.asarray(expected), at, 2), window)


def test_config_says_what_is_wrong():
    with pytest.raises(ValueError, match="kv_heads: expected a divisor of heads 4, got 3"):
        DenoiserConfig(heads=4, kv_heads=3)
    with pytest.raises(ValueError, match="head_size: expected an even number"):
        DenoiserConfig(head_size=7)
    with pytest.raises(ValueError, match="mask_id: expected an id in"):
        DenoiserConfig(vocab=10, mask_id=10)
    with pytest.raises(ValueError, match="got also \\['colour'\\]"):
        DenoiserConfig.from_dict({"colour": 1})
