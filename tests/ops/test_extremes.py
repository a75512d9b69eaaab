"""Numbers at the edges of what float32 holds, and NaN where nobody looks, by every implementation that a CPU can run."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dlm_kernels
from dlm_kernels import masks
from dlm_kernels.reference import unmask as reference

IMPLEMENTATIONS = "cpu", "xla"


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("head", [False, True])
def test_no_temperature_chooses_what_is_banned(head, implementation):
    """Infinite, every other token is as likely; near 0 it is the likeliest, whatever the noise."""
    logits = 3 * jax.random.normal(jax.random.key(0), (2, 64, 12))
    options = dict(banned_tokens=[3], key=jax.random.key(1), implementation=implementation)

    def scores(temperature, **more):
        if head:
            return dlm_kernels.lm_head_scores(logits, jnp.eye(12), temperature=temperature, **options, **more)
        return dlm_kernels.score_tokens(logits, temperature=temperature, **options, **more)

    likeliest = scores(0.0).token
    even = scores(np.inf, tempered_confidence=True)
    assert {*np.asarray(even.token).flat} == {*range(12)} - {3}
    np.testing.assert_allclose(even.confidence, 1 / 11, rtol=1e-6)
    np.testing.assert_allclose(even.entropy, np.log(11), rtol=1e-6)
    for temperature in (1e-35, 2e-38, jnp.full((2, 64), 5e-38)):
        sharp = scores(temperature, tempered_confidence=True)
        np.testing.assert_array_equal(sharp.token, likeliest)
        np.testing.assert_array_equal(sharp.confidence, 1)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_equal_tokens_share_a_probability_however_cold(implementation):
    """Logits so great that their logsumexp is no more than the greatest of them."""
    logits = jnp.zeros((1, 1, 9)).at[..., :4].set(3.0)
    options = dict(key=jax.random.key(0), tempered_confidence=True, implementation=implementation)
    for temperature in (1e-6, 1e-15, 1e-16, 1e-20):
        for confidence, expected in (("probability", 0.25), ("margin", 0.0)):
            found = dlm_kernels.score_tokens(logits, temperature=temperature, confidence=confidence, **options).confidence
            np.testing.assert_allclose(found, expected, rtol=1e-6)


# A constant of the program: XLA multiplies by its inverse, and fuses the product with what is subtracted from it.
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "confidence, guided, soft_cap",
    [("probability", False, None), ("neg_entropy", True, None), ("margin", False, 30.0), ("neg_entropy", True, 30.0)],
)
def test_scores_at_a_temperature_that_is_compiled_in(confidence, guided, soft_cap, implementation):
    random = np.random.default_rng(4)
    logits, unconditional = (jnp.asarray(3 * random.normal(size=(2, 3, 300)), jnp.float32) for _ in range(2))
    noise = jnp.asarray(random.gumbel(size=logits.shape), jnp.float32)
    guidance = dict(unconditional=unconditional, guidance_scale=1.7) if guided else {}
    options = dict(confidence=confidence, tempered_confidence=True, logits_soft_cap=soft_cap)
    for temperature in (0.7, 1e-10, 1e-30):
        named = dict(temperature=temperature, noise=noise, implementation=implementation, **guidance, **options)
        found = jax.jit(functools.partial(dlm_kernels.score_tokens, **named))(logits)
        rows = [np.asarray(x, np.float64).reshape(6, 300) for x in (logits, unconditional, noise)]
        scale, temperatures = (np.full(6, x, np.float32) for x in (1.7, temperature))
        streams = (*rows[:2], scale) if guided else (rows[0], None, None)
        wanted = reference.score_tokens(*streams, temperatures, None, None, rows[2], None, None, **options)
        np.testing.assert_array_equal(found.token.reshape(-1), wanted[0])
        for mine, other in zip(found[1:], wanted[1:]):
            np.testing.assert_allclose(mine.reshape(-1), other, rtol=3e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_row_of_no_token_has_no_random_confidence_either(implementation):
    logits = jnp.zeros((1, 3, 5)).at[0, 1].set(jnp.nan)
    options = dict(confidence="random", key=jax.random.key(0), implementation=implementation)
    np.testing.assert_array_equal(jnp.isnan(dlm_kernels.score_tokens(logits, **options).confidence), [[False, True, False]])
    found = dlm_kernels.unmask_step(logits, jnp.full((1, 3), 4), mask_id=4, num_unmask=2, **options)
    np.testing.assert_array_equal(found.unmasked, [[True, False, True]])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_strict_promotion_and_no_jit(implementation):
    logits, tokens = jax.random.normal(jax.random.key(0), (1, 4, 9)), jnp.full((1, 4), 8)
    with jax.numpy_dtype_promotion("strict"):
        dlm_kernels.unmask_step(logits, tokens, mask_id=8, factor=1.0, implementation=implementation)
        dlm_kernels.lm_head_scores(logits, jnp.eye(9), logits_dtype=jnp.float16, implementation=implementation)
    expected = dlm_kernels.truncate_logits(logits, top_k=3, implementation=implementation)
    with jax.disable_jit():
        np.testing.assert_array_equal(dlm_kernels.truncate_logits(logits, top_k=3, implementation=implementation), expected)


def test_random_confidence_is_of_threefry_and_float32():
    """Whatever JAX's default generator and width are."""
    logits = jax.random.normal(jax.random.key(0), (2, 5, 7))
    options = dict(confidence="random", key=jax.random.key(1, impl="threefry2x32"))
    expected = dlm_kernels.score_tokens(logits, **options).confidence
    with jax.default_prng_impl("rbg"), jax.enable_x64(True):
        found = dlm_kernels.score_tokens(logits, **options).confidence
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("implementation, dense", [("cpu", False), ("xla", False), ("xla", True)])
def test_nan_at_a_query_that_sees_nothing_reaches_no_gradient(implementation, dense):
    random = np.random.default_rng(0)
    query, key, value, pull = (jnp.asarray(random.normal(size=(1, 5, 2, 8)), jnp.float32) for _ in range(4))
    mask = masks.KeyIntervals(jnp.zeros((1, 5), jnp.int32), jnp.array([[5, 3, 0, 1, 5]]))
    mask = mask.as_boolean(5) if dense else mask

    def gradients(query, pull, pull_lse):
        out, back = jax.vjp(
            lambda *x: dlm_kernels.attention(*x, mask=mask, return_lse=True, implementation=implementation), query, key, value
        )
        assert (out[0][0, 2] == 0).all() and jnp.isneginf(out[1][0, :, 2]).all()
        return back((pull, pull_lse))

    pull_lse = jnp.ones((1, 2, 5))
    expected = gradients(query, pull, pull_lse)
    nan = query.at[0, 2].set(jnp.nan), pull.at[0, 2].set(jnp.nan), pull_lse.at[0, :, 2].set(jnp.nan)
    for mine, other in zip(gradients(*nan), expected):
        np.testing.assert_array_equal(mine, other)
    assert (expected[0][0, 2] == 0).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_logits_rounded_to_float16_keep_what_is_below_its_least_normal(implementation):
    hidden = jnp.array([[[1e-5, 3e-5, 2e-5, 6.2e-5, -3e-8]]])
    scores = dlm_kernels.lm_head_scores(hidden, jnp.eye(5), logits_dtype=jnp.float16, implementation=implementation)
    rounded = np.float16(hidden[0, 0]).astype(np.float64)
    assert scores.token == 3
    hidden = hidden.at[0, 0, 3].set(0)
    assert dlm_kernels.lm_head_scores(hidden, jnp.eye(5), logits_dtype=jnp.float16, implementation=implementation).token == 1
    np.testing.assert_allclose(scores.logsumexp[0, 0], np.log(np.exp(rounded).sum()), rtol=1e-6)
