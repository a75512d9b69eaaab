"""The divergence in Triton's interpreter, beyond what tests/leaves asks of every implementation.

300 tokens are three spans of 128, or chunks of the gradients, the last one short; 37 rows are two row tiles of float32, and 5 one.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm_kernels import masked_divergence
from dlm_kernels.reference import divergence as oracle
from dlm_kernels.triton_kernels import divergence as kernels
from dlm_kernels.triton_kernels import head_loss
from dlm_kernels.xla import divergence as plain

R, V, D, E = 37, 300, 40, 72


def operands():
    keys = jax.random.split(jax.random.key(0), 6)
    shapes = (R, D), (V, D), (R, E), (V, E)
    hidden, weight, target_hidden, target_weight = (np.array(jax.random.normal(*x)) / 3 for x in zip(keys, shapes))
    active = np.asarray(jax.random.bernoulli(keys[4], 0.6, (R,)))
    return (3 * hidden, weight, 3 * target_hidden, target_weight, active), np.array(jax.random.normal(keys[5], (R,)))


@pytest.mark.parametrize("chunk", [16384, 128])
def test_an_inactive_row_is_neither_read_nor_written_whatever_the_weights(chunk, monkeypatch):
    monkeypatch.setattr(head_loss, "CHUNK", chunk)
    arrays, dloss = operands()
    hidden, weight, target_hidden, target_weight, active = arrays
    expected = plain.masked_divergence_forward(*arrays)
    want = plain.masked_divergence_backward(*arrays, *expected[1:], dloss)
    hidden[~active], target_hidden[~active], dloss[~active] = np.nan, np.inf, np.nan
    got = kernels.masked_divergence_forward(*arrays)
    for mine, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(mine[active], other[active], rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(mine[~active], 0)
    lse, target_lse = (np.where(active, x, np.nan) for x in got[1:])
    for mine, other in zip(kernels.masked_divergence_backward(*arrays, lse, target_lse, dloss), want, strict=True):
        assert np.linalg.norm(mine - other) <= 2e-6 * np.linalg.norm(other)
    # A weight that is infinite spoils its own token of rows that have a loss, and no other row.
    target_weight[299] = -np.inf
    dhidden, _ = kernels.masked_divergence_backward(*arrays, lse, target_lse, dloss)
    np.testing.assert_array_equal(dhidden[~active], 0)


def test_float16_gradients_within_one_and_a_half_times_the_plain_error():
    """Of the weights of a mean: the gradient of the logits is below float16's least number."""
    arrays, dloss = operands()
    arrays, dloss = (*(x.astype("float16") for x in arrays[:4]), np.ones(R, bool)), np.full(R, 1 / 4096, np.float32)
    arguments = (*arrays, *map(np.asarray, plain.masked_divergence_forward(*arrays)[1:]), dloss)
    exact = oracle.masked_divergence_backward(*arguments)
    mine, other = (x.masked_divergence_backward(*arguments) for x in (kernels, plain))
    for want, *found in zip(exact, mine, other):
        error = [np.linalg.norm(np.asarray(x, np.float64) - want) for x in found]
        assert error[0] <= 1.5 * error[1]


def test_the_operation_differentiates_and_batches():
    (hidden, weight, target_hidden, target_weight, active), _ = operands()
    rows = hidden[:6].reshape(2, 1, 3, D), target_hidden[:6].reshape(2, 1, 3, E)
    weights = jnp.asarray([[[1.5, 0, -1]], [[0, 0, 2.0]]])

    def loss(hidden, weight, implementation):
        each = jax.vmap(lambda h, t, w: masked_divergence(h, weight, t, target_weight, w, implementation=implementation))
        return jnp.sum(each(hidden, rows[1], weights))

    got, expected = (jax.grad(loss, (0, 1))(rows[0], weight, name) for name in ("triton", "xla"))
    for mine, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-4, atol=1e-5)
