"""The fused LM head in Triton's interpreter, beyond what tests/leaves asks of every implementation.

300 tokens are three spans of 128, the last one short; 37 rows are two row tiles of float32; 40 columns divide no tile.
"""

import mmap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm_kernels import masked_cross_entropy
from dlm_kernels.reference import cross_entropy as oracle
from dlm_kernels.triton_kernels import cross_entropy, head_loss
from dlm_kernels.triton_kernels import lm_head as kernels
from dlm_kernels.xla import cross_entropy as plain_loss
from dlm_kernels.xla import lm_head as plain

R, V, D = 37, 300, 40


def operands(dtype="float32"):
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = np.array(jax.random.normal(keys[0], (R, D)).astype(dtype))
    weight = np.array((jax.random.normal(keys[1], (V, D)) / 3).astype(dtype))
    return hidden, weight, keys


@pytest.mark.parametrize("confidence", ["probability", "margin"])
@pytest.mark.parametrize("case", ["greedy", "tempered", "noise", "rounded"])
def test_scores(confidence, case):
    hidden, weight, keys = operands()
    active = np.asarray(jax.random.bernoulli(keys[2], 0.8, (R,)))
    hidden[~active] = np.nan
    temperature = key_data = counter_row = noise = None
    if case in ("tempered", "noise"):
        temperature = 0.2 + np.asarray(jax.random.uniform(keys[3], (R,)))
        temperature = np.where(np.arange(R) % 4, temperature, 0).astype(np.float32)
    if case == "tempered":
        key_data = np.asarray(jax.random.key_data(jax.random.split(keys[3], R)))
        counter_row = np.arange(R, dtype=np.int32) * 77
    if case == "noise":
        noise = np.asarray(jax.random.gumbel(keys[3], (R, V)))
    options = dict(
        confidence=confidence,
        tempered_confidence=case == "tempered",
        logits_soft_cap=5.0 if case == "greedy" else None,
        logits_dtype=jnp.dtype("float16") if case == "rounded" else None,
    )
    banned = np.array([7, -3, 299, 400], np.int32)
    arguments = (hidden, weight, temperature, key_data, counter_row, noise, active, banned)
    got = kernels.lm_head_scores(*arguments, **options)
    expected = plain.lm_head_scores(*arguments, **options)
    # Rounded logits that fall on either side of a float16 boundary differ by its spacing.
    rtol, atol = (2e-3, 1e-4) if case == "rounded" else (5e-5, 5e-6)
    np.testing.assert_array_equal(got[0], expected[0])
    for mine, other in zip(got[1:], expected[1:]):
        np.testing.assert_allclose(mine, other, rtol=rtol, atol=atol)


@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("chunk", [16384, 128])
def test_loss_and_gradients(cap, chunk, monkeypatch):
    monkeypatch.setattr(head_loss, "CHUNK", chunk)
    hidden, weight, keys = operands()
    active = np.asarray(jax.random.bernoulli(keys[2], 0.6, (R,)))
    hidden[~active] = np.nan
    targets = np.array(jax.random.randint(keys[3], (R,), 0, V, jnp.int32))
    targets[~active] = -7
    dloss = np.asarray(jax.random.normal(keys[1], (R,)))
    loss, lse = cross_entropy.masked_cross_entropy_forward(hidden, weight, targets, active, logits_soft_cap=cap)
    expected, expected_lse = plain_loss.masked_cross_entropy_forward(hidden, weight, targets, active, logits_soft_cap=cap)
    np.testing.assert_allclose(loss, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(lse[active], expected_lse[active], rtol=1e-6)
    got = cross_entropy.masked_cross_entropy_backward(hidden, weight, targets, active, lse, dloss, logits_soft_cap=cap)
    safe = np.where(active[:, None], hidden, 0)
    want = plain_loss.masked_cross_entropy_backward(safe, weight, targets, active, lse, dloss, logits_soft_cap=cap)
    for mine, other in zip(got, want):
        assert np.linalg.norm(mine - other) <= 2e-6 * np.linalg.norm(other)


@pytest.mark.parametrize("size", [1 / 4096, 1e5])
def test_float16_gradients_within_one_and_a_half_times_the_plain_error(size):
    """Of the weights of a mean, and of those that a loss scale multiplies: the gradient of the logits leaves float16's range."""
    hidden, weight, keys = operands("float16")
    hidden, weight = (hidden / 10 if size > 1 else hidden + 1).astype("float16"), (weight / 8).astype("float16")
    targets, active = np.arange(R, dtype=np.int32), np.ones(R, bool)
    dloss, options = np.full(R, size, np.float32), dict(logits_soft_cap=None)
    _, lse = plain_loss.masked_cross_entropy_forward(hidden, weight, targets, active, **options)
    arguments = hidden, weight, targets, active, np.asarray(lse), dloss
    exact = oracle.masked_cross_entropy_backward(*arguments, **options)
    mine, other = (x.masked_cross_entropy_backward(*arguments, **options) for x in (cross_entropy, plain_loss))
    for want, *found in zip(exact, mine, other):
        error = [np.linalg.norm(np.asarray(x, np.float64) - want) for x in found]
        assert error[0] <= 1.5 * error[1] < np.inf


def test_a_target_outside_gives_nan_and_the_loss_differentiates():
    hidden, weight, keys = operands()
    hidden, weight = jnp.asarray(hidden)[None], jnp.asarray(weight)
    targets = jax.random.randint(keys[3], (1, R), 0, V, jnp.int32)
    weights = jnp.where(jnp.arange(R) % 3 == 0, 0, 1.5)[None]

    def loss(hidden, weight, implementation):
        return masked_cross_entropy(hidden, weight, targets, weights, implementation=implementation)

    got = jax.grad(loss, (0, 1))(hidden, weight, "triton")
    expected = jax.grad(loss, (0, 1))(hidden, weight, "xla")
    for mine, other in zip(got, expected):
        np.testing.assert_allclose(mine, other, rtol=1e-4, atol=1e-5)
    spoilt = masked_cross_entropy(hidden, weight, targets.at[0, 1].set(V), weights, reduction="none", implementation="triton")
    assert np.isnan(spoilt[0, 1]) and np.isfinite(spoilt[0, 2:]).all()


def test_every_operand_is_read_by_its_own_strides():
    hidden, weight, keys = operands()
    noise, ones = np.array(jax.random.gumbel(keys[2], (R, V))), np.ones(R, np.float32)
    targets, active = np.arange(R, dtype=np.int32), np.ones(R, bool)
    options = dict(confidence="probability", tempered_confidence=False, logits_soft_cap=None, logits_dtype=None)

    def run(hidden, weight, noise):
        scores = kernels.lm_head_scores(hidden, weight, ones, None, None, noise, None, None, **options)
        loss, lse = cross_entropy.masked_cross_entropy_forward(hidden, weight, targets, active, logits_soft_cap=None)
        gradients = cross_entropy.masked_cross_entropy_backward(hidden, weight, targets, active, lse, ones, logits_soft_cap=None)
        return (*scores, loss, *gradients)

    for mine, other in zip(run(*map(np.asfortranarray, (hidden, weight, noise))), run(hidden, weight, noise)):
        np.testing.assert_array_equal(mine, other)


def test_columns_that_lie_more_elements_apart_than_32_bits_count():
    """As a transposed weight of torch has them. Zeros lie before the first column, where an offset that wraps around would read."""
    step, reserve = 2**24, getattr(mmap, "MAP_NORESERVE", 0x4000)
    size = 2 * (2**31 + 160 * step)
    memory = np.frombuffer(mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | reserve), np.float16)
    right = np.lib.stride_tricks.as_strided(memory[2**31 :], (16, 160), (2, 2 * step))
    right[...] = 1
    left = np.ones((16, 16), np.float16)
    np.testing.assert_array_equal(head_loss._product(left, (16, 1), right, None, None, 16, 160, 16, "float32"), 16)
