"""The LM head's scores and loss against the float64 oracle."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm_kernels.cpu_kernels.lm_head import pack
from dlm_kernels.reference import cross_entropy as loss_reference
from dlm_kernels.reference import lm_head as reference

# (R, D, V): one of each; below and above the kernels' tiles of rows and columns; and of depth, with more rows than a tile has that
# have a loss. None divides.
SHAPES = [(1, 1, 1), (3, 16, 50), (65, 100, 1003), (200, 300, 260), (250, 1101, 40)]
DTYPES = ["float32", "bfloat16", "float16"]


def operands(r, d, v, dtype):
    keys = jax.random.split(jax.random.key(r + v), 3)
    hidden = jax.random.normal(keys[0], (r, d)).astype(dtype)
    weight = (3 * d**-0.5 * jax.random.normal(keys[1], (v, d))).astype(dtype)
    targets = jax.random.randint(keys[2], (r,), 0, v)
    return hidden, weight, targets


def rounding(hidden, weight):
    """How far float32 sums over D may move a logit: D roundings of partial sums, each up to the sum of magnitudes, at random."""
    magnitudes = np.abs(np.asarray(hidden, np.float64)) @ np.abs(np.asarray(weight, np.float64)).T
    return hidden.shape[1] ** 0.5 * 2**-24 * np.nanmax(magnitudes)


def as_numpy(arrays):
    return [None if x is None else np.asarray(x) for x in arrays]


def is_the_same_of_any_product(leaf, interpreted, shape, confidence, **_):
    """What the margin or the entropy is, of more rows or more depth. The CPU kernels share these out, and a GPU runs them all."""
    return leaf != "cpu" and interpreted and shape in SHAPES[3:] and confidence != "probability"


@pytest.mark.leave_out(when=is_the_same_of_any_product)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("confidence", ["probability", "margin", "neg_entropy"])
@pytest.mark.parametrize("every_option", [False, True])
def test_scores(leaf, shape, dtype, confidence, every_option):
    hidden, weight, _ = operands(*shape, dtype)
    r, _, v = shape
    static = dict(confidence=confidence, tempered_confidence=every_option, logits_soft_cap=None, logits_dtype=None)
    arrays = [None] * 6
    if every_option:
        static["logits_soft_cap"] = 15.0
        bits = jax.random.bits(jax.random.key(2), (r, 2))
        arrays = [
            jnp.linspace(0, 1.5, r),
            bits,
            jnp.arange(r, dtype=jnp.int32),
            None,
            jnp.arange(r) % 4 != 1,
            jnp.array([v // 2, -1, v], jnp.int32) if v > 1 else None,
        ]
    got = leaf("lm_head", "lm_head_scores")(hidden, weight, *arrays, **static)
    expected = reference.lm_head_scores(*as_numpy((hidden, weight, *arrays)), **static)
    np.testing.assert_array_equal(got[0], expected[0])
    error = rounding(hidden, weight)
    for result, wanted in zip(got[1:], expected[1:]):
        np.testing.assert_allclose(result, wanted, rtol=3e-5 + 2 * error, atol=1e-6 + error)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_packed_weight_changes_nothing(leaf, shape, dtype):
    hidden, weight, _ = operands(*shape, dtype)
    static = dict(confidence="margin", tempered_confidence=False, logits_soft_cap=None, logits_dtype=None)
    if leaf.package not in ("cpu_kernels", "xla"):
        supports = importlib.import_module(f"dlm_kernels.{leaf.package}.lm_head").supports_lm_head_scores
        names = ("temperature", "key_data", "counter_row", "noise", "active", "banned")
        assert "not packed" in supports(hidden=hidden, weight=pack(weight), **dict.fromkeys(names), **static)
        return
    scores = leaf("lm_head", "lm_head_scores")
    got = scores(hidden, pack(weight), *[None] * 6, **static, vocabulary=shape[2])
    expected = scores(hidden, weight, *[None] * 6, **static)
    for result, wanted in zip(got, expected, strict=True):
        if leaf.package == "cpu_kernels":
            np.testing.assert_array_equal(result, wanted)
        else:  # XLA multiplies what it has unpacked in an order of its own
            np.testing.assert_allclose(result, wanted, rtol=3e-5, atol=1e-5)


def test_ties_take_the_lowest_token(leaf):
    """Of all tiles of columns, greedy and drawn."""
    static = dict(confidence="margin", tempered_confidence=False, logits_soft_cap=None, logits_dtype=None)
    arrays = jnp.zeros((2, 8)), jnp.zeros((300, 8)), jnp.array([0.0, 1]), None, None, jnp.zeros((2, 300)), None, None
    token, sure, *_ = leaf("lm_head", "lm_head_scores")(*arrays, **static)
    assert not token.any() and not sure.any()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_logits_of_nan_stay_so_when_rounded(leaf, dtype):
    """Also NaN of all bits set, which a plain rounding turns into zero."""
    hidden = np.full((1, 8), 0x7FFFFFFF, np.uint32).view(np.float32)
    static = dict(confidence="probability", tempered_confidence=False, logits_soft_cap=None, logits_dtype=jnp.dtype(dtype))
    _, *scores = leaf("lm_head", "lm_head_scores")(hidden, np.ones((33, 8), np.float32), *[None] * 6, **static)
    assert np.isnan(scores).all()


@pytest.mark.parametrize("cap", [None, 100.0])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_logits_rounded_to_a_dtype(leaf, dtype, cap):
    # Multiples of 1/16: exact sums, so that rounding them has one right result.
    rng = np.random.default_rng(0)
    hidden = rng.integers(-9, 10, (5, 40)).astype(np.float32)
    weight = rng.integers(-9, 10, (300, 40)).astype(np.float32) / 16
    static = dict(confidence="probability", tempered_confidence=False, logits_soft_cap=cap, logits_dtype=jnp.dtype(dtype))
    got = leaf("lm_head", "lm_head_scores")(hidden, weight, *[None] * 6, **static)
    expected = reference.lm_head_scores(hidden, weight, *[None] * 6, **static)
    np.testing.assert_array_equal(got[0], expected[0])
    for result, wanted in zip(got[1:], expected[1:]):
        np.testing.assert_allclose(result, wanted, rtol=3e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("cap", [None, 15.0])
def test_loss_and_gradient(leaf, check_gradients, shape, dtype, cap):
    hidden, weight, targets = operands(*shape, dtype)
    active = jnp.arange(shape[0]) % 5 != 2
    if shape[0] > 3:
        targets = targets.at[0].set(shape[2]).at[1:3].set(-1)  # NaN, twice; ignored, for row 2 is not active
        hidden = hidden.at[2].set(jnp.nan)
    arrays = hidden, weight, targets, active
    loss, lse = leaf("cross_entropy", "masked_cross_entropy_forward")(*arrays, logits_soft_cap=cap)
    expected, expected_lse = loss_reference.masked_cross_entropy_forward(*as_numpy(arrays), logits_soft_cap=cap)
    error = 1e-6 + 2 * rounding(hidden, weight)
    np.testing.assert_allclose(loss, expected, rtol=1e-6, atol=error)
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-6, atol=error)
    np.testing.assert_array_equal(lse[~np.asarray(active)], 0)
    dloss = jax.random.normal(jax.random.key(4), (shape[0],))
    wanted = loss_reference.masked_cross_entropy_backward(*as_numpy((*arrays, lse, dloss)), logits_soft_cap=cap)
    got = leaf("cross_entropy", "masked_cross_entropy_backward")(*arrays, lse, dloss, logits_soft_cap=cap)
    check_gradients(got, wanted, dloss, (weight, hidden))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_where_every_logit_is_far_below_zero(leaf, dtype):
    """Behind the last token stands no logit of zero, which would outweigh them all beyond any float."""
    hidden, weight = jnp.full((2, 8), -5, dtype), jnp.full((3, 8), 5, dtype)
    arrays = hidden, weight, jnp.zeros(2, jnp.int32), jnp.ones(2, bool)
    _, lse = leaf("cross_entropy", "masked_cross_entropy_forward")(*arrays, logits_soft_cap=None)
    more = (*arrays, lse, jnp.ones(2))
    got = leaf("cross_entropy", "masked_cross_entropy_backward")(*more, logits_soft_cap=None)
    wanted = loss_reference.masked_cross_entropy_backward(*as_numpy(more), logits_soft_cap=None)
    for result, want in zip(got, wanted, strict=True):
        np.testing.assert_allclose(np.asarray(result, np.float64), want, rtol=2**-7, atol=0.05)


@pytest.mark.parametrize("v", [130, 256, 300])
def test_the_loss_where_a_tile_of_columns_is_all_excluded(leaf, v):
    weight = np.random.default_rng(0).normal(size=(v, 2)).astype(np.float32)
    hidden, targets, active = np.ones((1, 2), np.float32), np.array([7], np.int32), np.ones(1, bool)
    few = hidden, weight[:128].copy(), targets, active
    weight[128:, 0] = -np.inf
    many = hidden, weight, targets, active
    forward, backward = (leaf("cross_entropy", f"masked_cross_entropy_{way}") for way in ("forward", "backward"))
    (loss, lse), (wanted, wanted_lse) = (forward(*arrays, logits_soft_cap=None) for arrays in (many, few))
    np.testing.assert_allclose([loss, lse], [wanted, wanted_lse], rtol=1e-6)
    got, expected = (backward(*x, lse, np.ones(1, np.float32), logits_soft_cap=None)[1] for x in (many, few))
    np.testing.assert_allclose(got, np.pad(expected, ((0, v - 128), (0, 0))), rtol=1e-5, atol=1e-7)
