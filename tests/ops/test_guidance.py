"""Gradients of guidance, and what a banned token (-inf) and a stream of weight zero do to them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dlm_kernels as dlm

RNG = np.random.default_rng(3)
LOGITS = RNG.standard_normal((2, 2, 3, 37)).astype("float32")  # two streams
PULL = RNG.standard_normal((2, 3, 37)).astype("float32")
SCALE = np.array([[0, 1, 2.5], [-0.5, 1.5, 3]], np.float32)
implementations = pytest.mark.parametrize("implementation", ["cpu", "xla"])


def naive(conditional, unconditional, scale):
    return jnp.sum(PULL * (unconditional + scale[..., None] * (conditional - unconditional)))


def close(got, expected):
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@implementations
def test_gradients_are_those_of_the_naive_code(implementation):
    def mixed(*arrays):
        return jnp.sum(PULL * dlm.mix_guidance(*arrays, implementation=implementation))

    def combined(conditional, unconditional, scale):
        weights = jnp.stack([scale, 1 - scale])
        return jnp.sum(PULL * dlm.combine_guidance(jnp.stack([conditional, unconditional]), weights, implementation=implementation))

    expected = jax.grad(naive, (0, 1, 2))(*LOGITS, SCALE)
    for function in (mixed, combined):
        for got, want in zip(jax.jit(jax.grad(function, (0, 1, 2)))(*LOGITS, SCALE), expected, strict=True):
            close(got, want)
    # One scale for all: its gradient is the sum of theirs.
    close(jax.grad(mixed, 2)(*LOGITS, jnp.float32(1.5)), jax.grad(naive, 2)(*LOGITS, jnp.full((2, 3), 1.5)).sum())


def test_the_gradient_of_the_scale_is_of_the_difference_of_the_streams():
    """Much alike and far from 0, where what is left of two sums would be their rounding."""
    conditional = 20 + LOGITS[0]
    unconditional = conditional + 1e-3 * LOGITS[1]
    got = jax.grad(lambda scale: jnp.sum(PULL * dlm.mix_guidance(conditional, unconditional, scale)))(SCALE)
    expected = (np.float64(PULL) * (np.float64(conditional) - unconditional)).sum(-1)
    np.testing.assert_allclose(got, expected, rtol=1e-4)


@implementations
def test_a_banned_token_stays_banned_and_has_no_gradient(implementation):
    conditional, unconditional = np.array(LOGITS[0]), np.array(LOGITS[1])
    conditional[..., 4] = unconditional[..., 9] = -np.inf
    unconditional[0, 1] = np.nan  # its weight is zero
    out = np.asarray(dlm.mix_guidance(conditional, unconditional, SCALE, implementation=implementation))
    np.testing.assert_array_equal(out[0, 1], conditional[0, 1])
    np.testing.assert_array_equal(out[0, 0], unconditional[0, 0])
    assert np.isneginf(out[1][:, [4, 9]]).all() and np.isfinite(np.delete(out[1], [4, 9], axis=-1)).all()

    def total(conditional, unconditional, scale):
        out = dlm.mix_guidance(conditional, unconditional, scale, implementation=implementation)
        return jnp.sum(PULL[1:] * jnp.where(jnp.isneginf(out), 0, out))

    gradients = jax.grad(total, (0, 1, 2))(conditional[1:], unconditional[1:], SCALE[1:])
    assert all(np.isfinite(gradient).all() for gradient in gradients)
    assert not np.asarray(gradients[0])[..., [4, 9]].any() and not np.asarray(gradients[1])[..., [4, 9]].any()


def test_a_ban_in_a_stream_of_no_weight_hides_no_gradient():
    logits = np.array(LOGITS)
    logits[1, ..., 4] = -np.inf
    weights = np.array([2, 0], np.float32)
    gradient = jax.grad(lambda logits: jnp.sum(PULL * dlm.combine_guidance(logits, weights)))(logits)
    close(gradient, np.stack([2 * PULL, 0 * PULL]))


def test_a_scale_per_row_and_per_position():
    """Of logits without a length, and of hidden states before the head."""
    conditional, unconditional = LOGITS[:, :, 0]
    got = dlm.mix_guidance(conditional, unconditional, SCALE[:, 2])
    np.testing.assert_array_equal(got, dlm.mix_guidance(*LOGITS[:, :, :1], SCALE[:, 2])[:, 0])
    weight = RNG.standard_normal((50, 37)).astype("float32")
    scores = dlm.lm_head_scores(LOGITS[0], weight, unconditional_hidden=LOGITS[1], guidance_scale=SCALE)
    jax.tree.map(np.testing.assert_array_equal, scores, dlm.lm_head_scores(dlm.mix_guidance(*LOGITS, SCALE), weight))
