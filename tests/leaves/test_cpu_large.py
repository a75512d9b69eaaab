"""What only large arrays reach in the CPU kernels: outputs stored past the caches, rows whose pieces one thread takes together,
keys in several pieces, gradients of many rows and of many tokens, and offsets that 32 bits cannot hold.
"""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm_kernels.cpu_kernels import attention, cross_entropy, guidance, unmask
from dlm_kernels.reference import attention as attention_reference
from dlm_kernels.reference import cross_entropy as loss_reference


def available_bytes():
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_outputs_stored_past_the_caches(dtype):
    # 18 MiB or more in each dtype; rows of an odd length begin at any alignment.
    rows, v = 5, 1000003 if dtype == "float32" else 2000003
    rng = np.random.default_rng(0)
    streams = rng.standard_normal((2, rows, v), "float32").astype(jnp.dtype(dtype))
    streams[0, 2, 7] = streams[1, 3, v - 1] = -np.inf
    scale = np.array([0, 1, 2.5, -0.5, 1.5], np.float32)
    weights = np.stack([scale, 1 - scale])
    mixed = np.asarray(guidance.mix_guidance(*streams, scale))
    combined = np.asarray(guidance.combine_guidance(streams, weights))
    # The same rows cut into pieces small enough to be stored as usual: to the bit.
    for first in range(0, v, 400000):
        part = np.ascontiguousarray(streams[:, :, first : first + 400000])
        np.testing.assert_array_equal(mixed[:, first : first + 400000], guidance.mix_guidance(*part, scale))
        np.testing.assert_array_equal(combined[:, first : first + 400000], guidance.combine_guidance(part, weights))


def test_rows_in_several_pieces_do_not_depend_on_the_batch():
    rows, v = 50, 132000  # three pieces (csrc/unmask.cc's kPiece), of which so many rows are shared out by two, and then one
    keys = jax.random.split(jax.random.key(0))
    logits = jax.random.normal(keys[0], (rows, v), jnp.bfloat16)
    temperature = jnp.arange(rows) % 3 / 2  # one of three rows is greedy
    draws = jax.random.bits(keys[1], (rows, 2)), jnp.arange(rows, dtype=jnp.int32)
    static = dict(confidence="neg_entropy", tempered_confidence=False, logits_soft_cap=None)
    together = unmask.score_tokens(logits, None, None, temperature, *draws, None, None, None, **static)
    for row in (0, 31, 48, 49):
        part = slice(row, row + 1)
        alone = unmask.score_tokens(
            logits[part], None, None, temperature[part], *(x[part] for x in draws), None, None, None, **static
        )
        for a, b in zip(alone, together, strict=True):
            np.testing.assert_array_equal(a[0], b[row])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_keys_in_several_pieces(dtype):
    """Three (csrc/attention.cc's kSplitKeys), as few queries have them: of one, of some and of none a row sees keys."""
    s = 2 * 4096 + 301
    keys = jax.random.split(jax.random.key(0), 3)
    query = jax.random.normal(keys[0], (2, 4, 4, 16)).astype(dtype)
    key, value = (jax.random.normal(x, (2, s, 2, 16)).astype(dtype) for x in keys[1:])
    ends = [[[0, s], [5000, 6001], [4000, 8300], [7, 7]], [[8200, s], [0, 0], [3, 4097], [4096, 8192]]]
    options = dict(scale=0.3, logits_soft_cap=None)
    for bounds in (None, np.array(ends, np.int32)):
        out, lse = attention.attention_forward(query, key, value, bounds, None, **options)
        expected, expected_lse = attention_reference.attention_forward(query, key, value, bounds, None, **options)
        np.testing.assert_allclose(np.asarray(out, np.float64), expected, rtol=0, atol=1e-6 if dtype == "float32" else 4e-3)
        np.testing.assert_allclose(lse, expected_lse, rtol=1e-6)


# More rows than a product takes at once of a depth (csrc/tiles.h's kHeadDepth, in pairs), and more tokens than 16 threads' tiles.
@pytest.mark.parametrize("shape", [(1100, 20, 40), (5, 20, 4200)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_of_many_rows_and_of_many_tokens(shape, dtype):
    rows, d, v = shape
    keys = jax.random.split(jax.random.key(0), 4)
    hidden, weight = (jax.random.normal(key, (n, d)).astype(dtype) for key, n in zip(keys, (rows, v)))
    targets, active = jax.random.randint(keys[2], (rows,), 0, v), jnp.arange(rows) != 3
    _, lse = cross_entropy.masked_cross_entropy_forward(hidden, weight, targets, active, logits_soft_cap=None)
    arrays = hidden, weight, targets, active, lse, jax.random.normal(keys[3], (rows,))
    got = cross_entropy.masked_cross_entropy_backward(*arrays, logits_soft_cap=None)
    wanted = loss_reference.masked_cross_entropy_backward(*map(np.asarray, arrays), logits_soft_cap=None)
    for result, want in zip(got, wanted, strict=True):
        tolerance = (2e-5 if dtype == "float32" else 2**-7) * np.abs(want).max()
        np.testing.assert_allclose(np.asarray(result, np.float64), want, rtol=0, atol=tolerance)


def test_offsets_past_2_to_the_31():
    rows, v = 9, 262144000  # bfloat16: 4.7 GB, of which all but two rows are not read
    if available_bytes() < 6 << 30:
        pytest.skip("needs 6 GiB of free memory")
    logits = np.zeros((rows, v), jnp.bfloat16)  # untouched pages take no memory until they are read
    logits[8, [5, v - 1]] = 3, 20
    active = np.zeros(rows, bool)
    active[[0, 8]] = True
    static = dict(confidence="probability", tempered_confidence=False, logits_soft_cap=None)
    token, sure, entropy, logsumexp = unmask.score_tokens(logits, *[None] * 6, active, None, **static)
    np.testing.assert_array_equal(token, [0, *[-1] * 7, v - 1])
    total = np.exp(20.0) + np.exp(3.0) + v - 2
    np.testing.assert_allclose(logsumexp[8], np.log(total), rtol=1e-6)
    np.testing.assert_allclose(sure[8], np.exp(20.0) / total, rtol=1e-5)
    np.testing.assert_allclose(entropy[0], np.log(v), rtol=1e-6)
