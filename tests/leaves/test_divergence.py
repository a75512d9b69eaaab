"""The divergence between two LM heads against the float64 oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm_kernels.reference import divergence as reference

# (R, D, E, V): one of each; below and above the kernels' tiles of rows and columns; and of depth, of the target alone and of both.
SHAPES = [(1, 1, 1, 1), (3, 16, 24, 50), (65, 100, 36, 1003), (250, 36, 1101, 260)]
DTYPES = ["float32", "bfloat16", "float16"]


def operands(r, d, e, v, dtype):
    keys = jax.random.split(jax.random.key(r + v), 4)
    hidden, target_hidden = (jax.random.normal(key, (r, n)).astype(dtype) for key, n in zip(keys, (d, e)))
    weight, target_weight = ((3 * n**-0.5 * jax.random.normal(key, (v, n))).astype(dtype) for key, n in zip(keys[2:], (d, e)))
    active = jnp.arange(r) % 5 != 2
    if r > 3:
        hidden, target_hidden = hidden.at[2].set(jnp.nan), target_hidden.at[2].set(jnp.nan)
    return hidden, weight, target_hidden, target_weight, active


def as_numpy(arrays):
    return [np.asarray(x) for x in arrays]


def rounding(hidden, weight):
    """How far float32 sums over the width may move a logit, as in test_lm_head."""
    magnitudes = np.abs(np.asarray(hidden, np.float64)) @ np.abs(np.asarray(weight, np.float64)).T
    return hidden.shape[1] ** 0.5 * 2**-24 * np.nanmax(magnitudes)


def takes_a_minute(leaf, interpreted, shape, dtype):
    """What tests/triton has in small."""
    return leaf == "triton" and interpreted and shape == SHAPES[3] and dtype == "float16"


@pytest.mark.leave_out(when=takes_a_minute)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_divergence_and_gradient(leaf, check_gradients, shape, dtype):
    hidden, weight, target_hidden, target_weight, active = arrays = operands(*shape, dtype)
    got = leaf("divergence", "masked_divergence_forward")(*arrays)
    expected = reference.masked_divergence_forward(*as_numpy(arrays))
    error = 2e-6 + 4 * (rounding(hidden, weight) + rounding(target_hidden, target_weight))
    for result, want in zip(got, expected, strict=True):
        np.testing.assert_array_equal(result[~np.asarray(active)], 0)
        np.testing.assert_allclose(result, want, rtol=2e-6, atol=error)
    dloss = jax.random.normal(jax.random.key(4), (shape[0],))
    more = (*arrays, *got[1:], dloss)
    wanted = reference.masked_divergence_backward(*as_numpy(more))
    got = leaf("divergence", "masked_divergence_backward")(*more)
    check_gradients(got, wanted, dloss, (weight, hidden))


def test_of_itself_it_is_nothing(leaf):
    hidden, weight, *_ = operands(7, 16, 16, 300, "float32")
    arrays = hidden, weight, hidden, weight, jnp.arange(7) != 2
    loss, lse, target_lse = leaf("divergence", "masked_divergence_forward")(*arrays)
    np.testing.assert_allclose(loss, 0, atol=2e-6)
    for gradient in leaf("divergence", "masked_divergence_backward")(*arrays, lse, target_lse, jnp.ones(7)):
        np.testing.assert_allclose(gradient, 0, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_where_every_logit_is_far_below_zero(leaf, dtype):
    """Behind the last token stands no logit of zero, which would outweigh them all beyond any float."""
    hidden, weight = jnp.full((2, 8), -5, dtype), jnp.full((3, 8), 5, dtype)
    arrays = hidden, weight, hidden, weight, jnp.ones(2, bool)
    _, *sums = leaf("divergence", "masked_divergence_forward")(*arrays)
    for gradient in leaf("divergence", "masked_divergence_backward")(*arrays, *sums, jnp.ones(2)):
        np.testing.assert_array_equal(np.asarray(gradient, np.float64), 0)


def test_what_the_target_excludes_counts_for_nothing(leaf):
    """A target of a single token, a logit of 1000 above the others: its log-probability of the model, negated."""
    model = np.random.default_rng(0).normal(size=(2, 300)).astype(np.float32)
    target = np.zeros((2, 300), np.float32)
    target[[0, 1], [7, 299]] = 1000
    identity = np.eye(300, dtype=np.float32)
    got = leaf("divergence", "masked_divergence_forward")(model, identity, target, identity, np.ones(2, bool))[0]
    np.testing.assert_allclose(got, np.log(np.exp(model).sum(1)) - model[[0, 1], [7, 299]], rtol=1e-5)


def test_it_counts_for_nothing_where_the_model_excludes_it_too(leaf):
    """A logit of -inf, beside the target's only token and far from it."""
    model, target = np.random.default_rng(0).normal(size=(300, 1)).astype(np.float32), np.zeros((300, 1), np.float32)
    model[[8, 299]], target[7] = -np.inf, 1000
    one = np.ones((1, 1), np.float32)
    got = leaf("divergence", "masked_divergence_forward")(one, model, one, target, np.ones(1, bool))[0]
    np.testing.assert_allclose(got, np.log(np.exp(model).sum()) - model[7], rtol=1e-5)


@pytest.mark.parametrize("v", [130, 256, 300])
def test_a_tile_of_columns_that_is_all_excluded(leaf, v):
    """From column 128 on every logit is -inf: of the model's head and of the target's."""
    model, target = np.random.default_rng(0).normal(size=(2, v, 2)).astype(np.float32)
    hidden, active = np.ones((1, 2), np.float32), np.ones(1, bool)
    few = [hidden, model[:128], hidden, target[:128], active]
    model[128:, 0] = target[128:, 0] = -np.inf
    many = [hidden, model, hidden, target, active]
    forward, backward = (leaf("divergence", f"masked_divergence_{way}") for way in ("forward", "backward"))
    expected, got = forward(*few), forward(*many)
    for result, wanted in zip(got, expected, strict=True):
        np.testing.assert_allclose(result, wanted, rtol=1e-5)
    dweights = [backward(*arrays, *found[1:], np.ones(1, np.float32))[1] for arrays, found in ((few, expected), (many, got))]
    np.testing.assert_allclose(dweights[1], np.pad(dweights[0], ((0, v - 128), (0, 0))), rtol=1e-5, atol=1e-7)


def test_a_row_of_nan_is_its_own_affair(leaf):
    for broken in (0, 2):
        arrays = [np.array(x) for x in operands(3, 16, 16, 50, "float32")]
        arrays[4][:] = True
        clean = leaf("divergence", "masked_divergence_forward")(*arrays)[0]
        arrays[broken][1, 3] = np.nan
        loss = leaf("divergence", "masked_divergence_forward")(*arrays)[0]
        assert np.isnan(loss[1])
        np.testing.assert_array_equal(loss[[0, 2]], clean[[0, 2]])


def test_far_above_zero_the_divergence_is_as_precise(leaf):
    """Of the target alone: what the logits have in common would multiply the rounding of its probabilities."""
    model, target = np.random.default_rng(0).normal(size=(2, 4, 300)).astype(np.float32)
    arrays = model, np.eye(300, dtype=np.float32), target + 500, np.eye(300, dtype=np.float32), np.ones(4, bool)
    loss, expected = leaf("divergence", "masked_divergence_forward")(*arrays)[0], reference.masked_divergence_forward(*arrays)[0]
    np.testing.assert_allclose(loss, expected, rtol=1e-6, atol=4 * np.spacing(np.float32(500)))
