"""Attention and its gradient against the float64 oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm_kernels.reference import attention as reference

# (B, T, S, N, K, H, pairs of bounds, soft cap): nothing divides a tile; T below, at and above a tile's rows; every head size class.
CASES = {
    "tiny": (1, 1, 1, 1, 1, 32, 0, None),
    "queries few": (2, 3, 131, 4, 1, 64, 0, None),
    "queries many": (1, 133, 37, 2, 2, 80, 0, None),
    "grouped, one interval, cap": (2, 33, 70, 6, 2, 128, 1, 20.0),
    "two intervals": (2, 17, 150, 4, 2, 96, 2, None),
    "head 256": (1, 5, 67, 2, 1, 256, 1, None),
    "head odd": (1, 9, 21, 2, 1, 37, 2, 5.0),
}
# Softmax and sums are float32 everywhere; what remains is the rounding of p and of the result to the inputs' dtype: a few ulps
# (2^-24, 2^-9, 2^-12 of the largest element), more for float32, whose sums over S and H round too.
TOLERANCE = {"float32": 64 * 2**-24, "bfloat16": 4 * 2**-9, "float16": 4 * 2**-12}


def operands(case, dtype, seed=0):
    b, t, s, n, k, h, pairs, cap = case
    keys = jax.random.split(jax.random.key(seed), 4)
    query, dout = (jax.random.normal(key, (b, t, n, h)).astype(dtype) for key in keys[:2])
    key, value = (jax.random.normal(x, (b, s, k, h)).astype(dtype) for x in keys[2:])
    bounds = None
    if pairs:
        bounds = np.sort(np.random.default_rng(seed).integers(0, s + 1, (b, t, 2 * pairs)), -1).astype(np.int32)
        bounds[0, 0] = 0  # sees nothing
    return query, key, value, bounds, dout, dict(scale=h**-0.5, logits_soft_cap=cap)


def close(got, expected, dtype):
    """Each element within the tolerance of the array's largest."""
    got = np.asarray(got, np.float64)
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(got[~finite], expected[~finite])
    np.testing.assert_allclose(
        got[finite], expected[finite], rtol=0, atol=TOLERANCE[dtype] * max(1e-3, np.abs(expected[finite]).max(initial=0))
    )


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", CASES)
def test_forward(leaf, name, dtype):
    query, key, value, bounds, _, options = operands(CASES[name], dtype)
    out, lse = leaf("attention", "attention_forward")(query, key, value, bounds, None, **options)
    expected_out, expected_lse = reference.attention_forward(query, key, value, bounds, None, **options)
    assert out.dtype == query.dtype
    close(out, expected_out, dtype)
    close(lse, expected_lse, "float32")


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", CASES)
def test_backward(leaf, name, dtype):
    query, key, value, bounds, dout, options = operands(CASES[name], dtype)
    out, lse = reference.attention_forward(query, key, value, bounds, None, **options)
    dlse = np.where(np.isneginf(lse), 0, np.asarray(jax.random.normal(jax.random.key(9), lse.shape)))
    saved = jnp.asarray(out, dtype), jnp.asarray(lse, jnp.float32), dout, jnp.asarray(dlse, jnp.float32)
    gradients = leaf("attention", "attention_backward")(query, key, value, bounds, None, *saved, **options)
    expected = reference.attention_backward(query, key, value, bounds, None, None, None, dout, dlse, **options)
    for got, want in zip(gradients, expected, strict=True):
        assert got.dtype == query.dtype
        close(got, want, dtype)


@pytest.mark.leave_out(when=lambda leaf, interpreted, **_: leaf == "triton" and interpreted)  # a minute; tests/triton has it small
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_keys_nobody_sees_change_no_bit(leaf, dtype):
    query, key, value, _, dout, options = operands((2, 40, 150, 4, 2, 64, 0, None), dtype)
    bounds = np.zeros((2, 40, 2), np.int32)
    bounds[0], bounds[1] = (3, 101), (50, 120)
    seen = np.zeros((2, 150, 1, 1), bool)
    seen[0, 3:101], seen[1, 50:120] = True, True
    forward, backward = leaf("attention", "attention_forward"), leaf("attention", "attention_backward")
    results = []
    for poison in (0, np.nan, np.inf):
        k, v = jnp.where(seen, key, poison).astype(dtype), jnp.where(seen, value, poison).astype(dtype)
        out, lse = forward(query, k, v, bounds, None, **options)
        gradients = backward(query, k, v, bounds, None, out, lse, dout, np.zeros_like(lse), **options)
        results.append([out, lse, *gradients])
    assert all(np.isfinite(x).all() for x in results[0])
    for poisoned in results[1:]:
        for clean, got in zip(results[0], poisoned, strict=True):
            np.testing.assert_array_equal(clean, got)


def test_a_query_whose_logits_are_infinite_sees_keys(leaf):
    query, key, value, _, _, options = operands((1, 3, 70, 2, 2, 64, 0, None), "float32")
    out, lse = leaf("attention", "attention_forward")(query.at[0, 1].set(jnp.inf), jnp.ones_like(key), value, None, None, **options)
    assert np.isfinite(lse[..., [0, 2]]).all() and not np.isfinite(lse[..., 1]).any() and not np.isneginf(lse).any()
    assert np.isnan(out[:, 1]).all()


def test_nan_in_a_key_that_is_seen_is_not_lost(leaf):
    """Neither in the maximum nor in the weights, nor in the gradient; of the other head nothing is."""
    query, key, value, _, dout, options = operands((1, 3, 70, 2, 2, 64, 0, None), "float32")
    key = key.at[0, 41, 1, 5].set(jnp.nan)
    out, lse = leaf("attention", "attention_forward")(query, key, value, None, None, **options)
    saved = out, lse, dout, np.zeros_like(lse)
    gradients = leaf("attention", "attention_backward")(query, key, value, None, None, *saved, **options)
    for array in (out, np.moveaxis(lse, 1, 2), *gradients):
        assert np.isfinite(array[:, :, 0]).all() and np.isnan(array[:, :, 1]).all()


def test_nan_in_a_query_is_in_its_lse_and_gradient(leaf):
    """Where out is NaN and lse is not, merging parts by their lse would take it for a number."""
    query, key, value, _, dout, options = operands((1, 3, 70, 2, 2, 64, 0, None), "float32")
    query = query.at[0, 1].set(jnp.nan)
    out, lse = leaf("attention", "attention_forward")(query, key, value, None, None, **options)
    dquery, *_ = leaf("attention", "attention_backward")(
        query, key, value, None, None, out, lse, dout, np.zeros_like(lse), **options
    )
    for result in (out, lse.transpose(0, 2, 1), dquery):
        assert np.isnan(result[:, 1]).all() and np.isfinite(result[:, [0, 2]]).all()


@pytest.mark.parametrize("queries", [3, 133])
def test_no_query_sees_a_key(leaf, queries):
    query, key, value, _, _, options = operands((2, queries, 70, 2, 2, 64, 0, None), "float32")
    bounds = np.zeros((2, queries, 2), np.int32)
    bounds[1] = 30, 60
    out, lse = leaf("attention", "attention_forward")(query, key, value, bounds, None, **options)
    assert not np.any(out[0]) and np.all(np.isneginf(lse[0]))
    assert np.all(np.isfinite(lse[1]))


@pytest.mark.leave_out(when=lambda leaf, interpreted, **_: leaf == "triton" and interpreted)  # a minute; tests/triton has it small
def test_rows_do_not_depend_on_the_batch(leaf):
    if leaf.package == "xla":
        pytest.skip("XLA chooses its own products' order")
    query, key, value, bounds, _, options = operands((3, 33, 300, 4, 2, 64, 1, None), "float32")
    forward = leaf("attention", "attention_forward")
    together = forward(query, key, value, bounds, None, **options)
    for b in range(3):
        alone = forward(query[b : b + 1], key[b : b + 1], value[b : b + 1], bounds[b : b + 1], None, **options)
        for one, all_rows in zip(alone, together, strict=True):
            np.testing.assert_array_equal(one[0], all_rows[b])
    for again in (forward(query, key, value, bounds, None, **options) for _ in range(3)):
        np.testing.assert_array_equal(again[0], together[0])


# Logits of zero for the keys that are seen; the order of the logits turned around.
@pytest.mark.parametrize("scale", [0.0, -0.3])
@pytest.mark.parametrize("queries", [3, 133])
def test_a_scale_not_above_zero(leaf, queries, scale):
    query, key, value, _, _, _ = operands((1, queries, 70, 2, 1, 64, 0, None), "float32")
    bounds = np.zeros((1, queries, 2), np.int32)
    bounds[:, :-1] = 30, 60  # the last sees nothing
    for cap in (None, 5.0):
        options = dict(scale=scale, logits_soft_cap=cap)
        out, lse = leaf("attention", "attention_forward")(query, key, value, bounds, None, **options)
        expected_out, expected_lse = reference.attention_forward(query, key, value, bounds, None, **options)
        close(out, expected_out, "float32")
        close(lse, expected_lse, "float32")


# A tile of keys of which no row sees more than one is not skipped; that one's value is the result, whatever the logits.
@pytest.mark.parametrize("queries", [3, 133])
def test_each_row_sees_one_key(leaf, queries):
    query, key, value, _, dout, options = operands((1, queries, 200, 2, 1, 64, 0, None), "float32")
    seen = np.arange(queries) + 60
    bounds = np.stack([seen, seen + 1], -1)[None].astype(np.int32)
    out, lse = leaf("attention", "attention_forward")(query, key, value, bounds, None, **options)
    close(out, np.broadcast_to(value[:, seen], out.shape).astype(np.float64), "float32")
    saved = out, lse, dout, np.zeros_like(lse)
    dquery, dkey, dvalue = leaf("attention", "attention_backward")(query, key, value, bounds, None, *saved, **options)
    wanted = np.zeros(value.shape)
    wanted[:, seen] = np.asarray(dout, np.float64).sum(2, keepdims=True)
    close(dvalue, wanted, "float32")
    # A softmax of one logit does not change with it.
    assert max(np.abs(dquery).max(), np.abs(dkey).max()) < 1e-5


# What one row sees whole another may see in part, and a third not at all.
@pytest.mark.parametrize("queries, order", [(3, 1), (133, -1)])
def test_one_row_sees_all_keys(leaf, queries, order):
    query, key, value, _, dout, options = operands((1, queries, 256, 1, 1, 64, 0, None), "float32")
    bounds = np.full((1, queries, 2), (5, 77), np.int32)
    bounds[:, 0], bounds[:, -1] = (0, 256), 0
    bounds = bounds[:, ::order]
    out, lse = leaf("attention", "attention_forward")(query, key, value, bounds, None, **options)
    expected_out, expected_lse = reference.attention_forward(query, key, value, bounds, None, **options)
    close(out, expected_out, "float32")
    close(lse, expected_lse, "float32")
    saved = out, lse, dout, np.zeros_like(lse)
    gradients = leaf("attention", "attention_backward")(query, key, value, bounds, None, *saved, **options)
    expected = reference.attention_backward(query, key, value, bounds, None, None, None, *saved[2:], **options)
    for got, want in zip(gradients, expected, strict=True):
        close(got, want, "float32")


# The greatest logit's own exponent must be 0 whatever its size: of what 6e9 loses to rounding, no exponential is finite.
@pytest.mark.parametrize("queries", [3, 133])
@pytest.mark.parametrize("spread, scale", [(1e10, 1.0), (1e30, 1.0), (1.0, 3e10)])
def test_huge_logits(leaf, queries, spread, scale):
    query, key, value, best = huge_logits(queries, spread)
    out, lse = leaf("attention", "attention_forward")(query, key, value, None, None, scale=scale, logits_soft_cap=None)
    np.testing.assert_array_equal(out, value[:, best])
    np.testing.assert_allclose(lse[0, 0], np.abs(key[0, best, 0, 0]) * np.float32(scale), rtol=2**-22)


# With a scale that is no power of two the weights' logits are rounded otherwise than those that lse was made of.
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_gradients_of_huge_logits(leaf, scale):
    if leaf.package not in ("cpu_kernels", "xla"):
        pytest.skip("elsewhere the exponential of what is lost to rounding may be infinite")
    query, key, value, best = huge_logits(133, 1e10)
    dout = jnp.round(4 * jax.random.normal(jax.random.key(3), query.shape))
    options = dict(scale=scale, logits_soft_cap=None)
    out, lse = leaf("attention", "attention_forward")(query, key, value, None, None, **options)
    saved = out, lse, dout, np.zeros_like(lse)
    dquery, dkey, dvalue = leaf("attention", "attention_backward")(query, key, value, None, None, *saved, **options)
    np.testing.assert_array_equal(out, value[:, best])
    assert all(np.isfinite(x).all() for x in (dquery, dkey, dvalue))
    if scale == 1:
        wanted = np.zeros(value.shape)
        np.add.at(wanted[0], best, np.asarray(dout[0], np.float64))
        close(dvalue, wanted, "float32")
        assert not dquery.any() and not dkey.any()


def huge_logits(queries, spread):
    """query, key, value [1,.,1,1], and of each query the one key that counts. Logits are exact, and values whole numbers."""
    key, value = (4 * jax.random.normal(jax.random.key(i), (1, 200, 1, 1)) for i in range(2))
    best = np.full(queries, np.argmax(key))
    best[0] = np.argmin(key)
    return jnp.ones((1, queries, 1, 1)).at[:, 0].set(-1), spread * key, jnp.round(value), best
