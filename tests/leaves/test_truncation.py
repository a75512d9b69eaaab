"""What is kept of a distribution, against the sort in float64: to the bit, for each top_p lies clear of every sum."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm_kernels.reference import truncation as reference

CLEAR = 2e-5  # of float32 sums over a vocabulary, whose rounding is a tenth of this


def normal(seed, *shape, dtype="float32", spread=3.0):
    return np.array((spread * jax.random.normal(jax.random.key(seed), shape)).astype(dtype))


def between(logits, inverse, ranks):
    """For each row a top_p half-way between the sums of its `rank` and `rank` - 1 most likely, or of the next that are told apart.

    The sums are of whole groups of equal logits, which are kept together.
    """
    shares = []
    for row, scale, rank in zip(np.asarray(logits, np.float64), inverse, ranks, strict=True):
        values, counts = np.unique(row[np.isfinite(row)], return_counts=True)
        sums = np.cumsum((counts * np.exp((values - values.max()) * float(scale)))[::-1])
        sums = np.concatenate([[0], sums / sums[-1]])
        told = np.flatnonzero(np.diff(sums) > 2 * CLEAR)
        group = told[told <= rank][-1]
        shares.append((sums[group] + sums[group + 1]) / 2)
    return np.array(shares, np.float32)


def check(leaf, logits, inverse=None, top_p=None, top_k=None):
    inverse = np.ones(len(logits), np.float32) if inverse is None else np.asarray(inverse, np.float32)
    arrays = logits, inverse, top_p, None if top_k is None else np.asarray(top_k, np.int32)
    (got,) = leaf("truncation", "truncate_logits")(*arrays)
    assert got.dtype == logits.dtype
    np.testing.assert_array_equal(got, reference.truncate_logits(*arrays))
    return got


# One token, a vector of every instruction set and one token, several blocks.
@pytest.mark.parametrize("v", [1, 33, 5003])
@pytest.mark.parametrize("limits", ["top_p", "top_k", "both"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.only_reads
@pytest.mark.leave_out(when=lambda leaf, v, **_: leaf == "pallas" and v == 1)  # which to its tiles is what 33 are
def test_the_most_likely_are_kept(leaf, v, limits, dtype):
    logits, inverse = normal(v, 6, v, dtype=dtype), np.array([1, 0.5, 5, 1, 0.1, 1], np.float32)
    top_p = between(logits, inverse, [0, 2, v // 50, v // 10, v // 2, v])
    top_k = [1, v, 7, 2 * v, max(1, v // 3), 50]
    check(leaf, logits, inverse, top_p if limits != "top_k" else None, top_k if limits != "top_p" else None)


def test_a_large_vocabulary(leaf):
    logits = normal(1, 2, 126464, spread=2.0)
    logits[1, 70000] = 25
    got = check(leaf, logits, top_p=between(logits, [1, 1], [3000, 0]))
    np.testing.assert_array_equal(np.isfinite(got[1]), np.arange(126464) == 70000)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ties_are_kept_together(leaf, dtype):
    logits = np.zeros((5, 700), dtype)
    logits[1:, :10] = 1
    logits[2, 100:] = -0.0  # the same as 0
    logits[3:, [5, 600, 699]] = 3
    got = check(leaf, logits, top_p=np.array([0.3, 0.99, 0.99, 0.06, 0.3], np.float32), top_k=[5, 11, 11, 2, 700])
    np.testing.assert_array_equal(np.isfinite(got).sum(-1), [700, 700, 700, 3, 700])
    got = check(leaf, logits, top_k=[1, 1, 10, 4, 13])
    np.testing.assert_array_equal(np.isfinite(got).sum(-1), [700, 10, 10, 12, 700])


def test_banned_tokens_stay_banned(leaf):
    logits = normal(2, 3, 500)
    logits[:, ::3] = -np.inf
    logits[2, 1:] = -np.inf
    logits[2, 0] = -7
    for top_k in ([1, 400, 1], [3, 333, 500]):
        got = check(leaf, logits, top_p=np.array([1, 1, 0.5], np.float32), top_k=top_k)
        assert (np.isfinite(got) <= np.isfinite(logits)).all()


def test_rows_without_a_distribution_come_back_as_they_are(leaf):
    logits = normal(3, 6, 130)
    logits[0, 7], logits[1, 129], logits[2] = np.nan, np.inf, -np.inf
    logits[3, 0] = -np.nan
    got = check(leaf, logits, top_p=np.full(6, 1e-6, np.float32), top_k=[1] * 6)
    np.testing.assert_array_equal(np.isfinite(got).sum(-1), [129, 129, 0, 129, 1, 1])


def test_limits_past_their_bounds(leaf):
    """At least one is kept, and of equals all of them."""
    logits = normal(4, 6, 130)
    logits[5] = 2
    got = check(leaf, logits, top_p=np.array([0, -1, np.nan, 2, np.inf, 0], np.float32))
    np.testing.assert_array_equal(np.isfinite(got).sum(-1), [1, 1, 1, 130, 130, 130])
    got = check(leaf, logits, top_k=[0, -1, -(2**31), 2**31 - 1, 130, 0])
    np.testing.assert_array_equal(np.isfinite(got).sum(-1), [1, 1, 1, 130, 130, 130])


def test_more_than_all_are_all(leaf):
    """A limit just above the vocabulary, and the least numbers apart from each other in their last bits alone."""
    for logits in ([[1.0, -5.0, -5.25, -5.5, -5.75]], [5 + np.arange(8) / 100], [1 + np.arange(9) * 2.0**-23]):
        logits = np.array(logits, np.float32)
        for more in range(4):
            got = check(leaf, logits, top_k=[logits.size + more])
            np.testing.assert_array_equal(got, logits)


def test_the_whole_range_of_numbers(leaf):
    """Differences that overflow, numbers that differ in their last bits, and the smallest, but for those that XLA takes for 0."""
    logits = np.array(
        [[3e38, -3e38, 0, 1, 2e38, -1], [1, 1 + 2**-23, 1 - 2**-24, 1 + 2**-22, 0, -1], [2e-38, 3e-38, -2e-38, 0, -0.0, 4e-38]],
        np.float32,
    )
    for top_k in ([1] * 3, [2, 3, 2], [5, 4, 4]):
        check(leaf, logits, top_k=top_k)
    check(leaf, logits, [1, 1, 1], top_p=np.full(3, 0.9, np.float32))
    tiny, most = np.finfo(np.float32).tiny, np.finfo(np.float32).max
    check(leaf, logits[:2], [tiny, most], top_p=np.array([0.4, 0.999], np.float32))


@pytest.mark.leave_out(when=lambda leaf, interpreted, **_: leaf == "triton" and interpreted)  # a minute; tests/triton has it small
def test_rows_do_not_depend_on_the_batch(leaf):
    logits = normal(5, 5, 5003)
    inverse = np.linspace(0.2, 3, 5, dtype=np.float32)
    top_p = between(logits, inverse, [5, 10, 50, 100, 500])
    together = check(leaf, logits, inverse, top_p)
    for row in range(5):
        part = slice(row, row + 1)
        np.testing.assert_array_equal(check(leaf, logits[part], inverse[part], top_p[part])[0], together[row])


def test_jax_where_it_is_the_naive_sort():
    """The oracle against the code that it is named after, with ids in the place of thresholds."""
    logits = normal(6, 4, 300)
    top_p = between(logits, np.ones(4), [3, 10, 40, 100])
    order = np.argsort(-logits, kind="stable")
    p = np.asarray(jax.nn.softmax(jnp.take_along_axis(jnp.asarray(logits), order, -1)))
    removed = np.cumsum(p, -1) > top_p[:, None]
    removed = np.concatenate([np.zeros((4, 1), bool), removed[:, :-1]], -1)
    expected = np.array(logits)
    np.put_along_axis(expected, order, np.where(removed, -np.inf, np.take_along_axis(logits, order, -1)), -1)
    np.testing.assert_array_equal(reference.truncate_logits(logits, np.ones(4), top_p, None), expected)
