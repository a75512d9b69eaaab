"""Masks against their definitions, position by position, in Python loops."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dlm_kernels import masks

settings.register_profile("masks", deadline=None, max_examples=40)
settings.load_profile("masks")


def dense(mask, key_length):
    return np.asarray(mask.as_boolean(key_length))[:, 0]


def from_bounds(bounds, key_length):
    """What a kernel sees: every key counts as often as an interval holds it."""
    keys = np.arange(key_length)
    runs = [(bounds[..., i, None] <= keys) & (keys < bounds[..., i + 1, None]) for i in range(0, bounds.shape[-1], 2)]
    return np.sum(runs, axis=0)


ends = st.lists(st.tuples(*[st.integers(-3, 12)] * 4), min_size=1, max_size=6)


@given(ends, st.integers(1, 9))
@example([(5, 3, 7, 9), (0, 9, 2, 4), (3, 5, 4, 2)], 9)  # the first empty, the second within the first, the second empty
def test_bounds_show_each_key_once_and_keep_the_mask(rows, key_length):
    mask = masks.KeyIntervals(*(jnp.array([column]) for column in zip(*rows)))
    bounds = np.asarray(masks.bounds(mask, key_length))
    np.testing.assert_array_equal(from_bounds(bounds, key_length), dense(mask, key_length).astype(int))
    start, stop, start2, stop2 = np.moveaxis(bounds, -1, 0)
    assert (0 <= start).all() and (start <= stop).all() and (stop2 <= key_length).all() and (start2 <= stop2).all()
    assert (stop <= start2).all(), "the two are in order and do not overlap"
    assert ((stop > start) | (stop2 == start2)).all(), "the second is empty where the first is"


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(side):
    lengths = np.array([0, 3, 7])
    got = dense(masks.padding(jnp.array(lengths), 4, 7, side=side), 7)
    for b, n in enumerate(lengths):
        real = range(7 - n, 7) if side == "left" else range(n)
        np.testing.assert_array_equal(got[b], np.tile([k in real for k in range(7)], (4, 1)))


def test_packed_sees_its_own_document_and_padding_sees_nothing():
    ids = np.array([[0, 0, 0, 1, 2, 2, -1, -1], [5, 5, 5, 5, 5, 5, 5, 5]])
    got = dense(masks.packed(jnp.array(ids)), 8)
    np.testing.assert_array_equal(got, (ids[:, :, None] == ids[:, None]) & (ids[:, :, None] >= 0))


@given(st.integers(1, 17), st.integers(1, 20), st.integers(0, 9), st.integers(0, 8))
def test_block_causal(query_length, block_size, offset, extra):
    key_length = query_length + offset + extra
    got = dense(masks.block_causal(query_length, block_size, key_length=key_length, offset=offset), key_length)[0]
    q, k = np.arange(query_length)[:, None] + offset, np.arange(key_length)
    np.testing.assert_array_equal(got, q // block_size >= k // block_size)


def test_block_causal_of_block_one_is_causal_and_of_the_length_is_full():
    np.testing.assert_array_equal(dense(masks.block_causal(6, 1), 6)[0], np.tril(np.ones((6, 6), bool)))
    assert dense(masks.block_causal(6, 6), 6).all()


def test_block_causal_counts_blocks_from_each_packed_document():
    ids = np.array([[0, 0, 0, 0, 0, 1, 1, 1, -1]])
    got = dense(masks.block_causal(9, 2, segment_ids=jnp.array(ids)), 9)[0]
    within = np.array([0, 1, 2, 3, 4, 0, 1, 2, 0])
    expected = (within[:, None] // 2 >= within // 2) & (ids[0][:, None] == ids[0]) & (ids[0][:, None] >= 0)
    np.testing.assert_array_equal(got, expected)


@given(st.integers(1, 12), st.integers(1, 5))
def test_block_diffusion_is_bd3lms_mask(length, block_size):
    got = dense(masks.block_diffusion(length, block_size), 2 * length)[0]
    index = np.arange(2 * length)
    block, noisy = index % length // block_size, index < length
    q, k = block[:, None], block
    q_noisy, k_noisy = noisy[:, None], noisy
    expected = np.where(q_noisy, (k_noisy & (q == k)) | (~k_noisy & (q > k)), ~k_noisy & (q >= k))
    np.testing.assert_array_equal(got, expected)


def test_cache_with_a_block_has_two_runs_per_row():
    mask = masks.cache(2, jnp.array([3, 5]), start=1, block_start=6, block_stop=8)
    got = dense(mask, 9)
    for b, stop in enumerate((3, 5)):
        seen = [1 <= k < stop or 6 <= k < 8 for k in range(9)]
        np.testing.assert_array_equal(got[b], [seen, seen])


@given(st.integers(1, 9), st.integers(0, 4), st.integers(0, 4), st.integers(0, 5))
def test_sliding_window(length, left, right, offset):
    key_length = length + offset
    got = dense(masks.sliding_window(length, left, right, key_length=key_length, offset=offset), key_length)[0]
    q, k = np.arange(length)[:, None] + offset, np.arange(key_length)
    np.testing.assert_array_equal(got, (q - left <= k) & (k <= q + right))


def test_an_offset_per_row():
    for build in (masks.block_causal, lambda t, size, **options: masks.sliding_window(t, 1, size, **options)):
        got = dense(build(5, 2, key_length=9, offset=jnp.array([0, 3])), 9)
        for b, offset in enumerate((0, 3)):
            np.testing.assert_array_equal(got[b], dense(build(5, 2, key_length=9, offset=offset), 9)[0])


def test_intersection_and_its_limit():
    two = masks.block_diffusion(4, 2)
    one = masks.padding(jnp.array([5]), 8)
    np.testing.assert_array_equal(dense(two & one, 8), dense(two, 8) & dense(one, 8))
    np.testing.assert_array_equal(dense(one & two, 8), dense(two, 8) & dense(one, 8))
    with pytest.raises(ValueError, match="single interval"):
        two & two


def test_masks_are_built_under_jit_from_traced_sizes():
    build = jax.jit(lambda block, offset: masks.block_causal(5, block, key_length=9, offset=offset))
    np.testing.assert_array_equal(dense(build(2, 3), 9), dense(masks.block_causal(5, 2, key_length=9, offset=3), 9))


def test_the_greatest_int_is_every_key():
    all_keys = 2**31 - 1
    np.testing.assert_array_equal(dense(masks.sliding_window(3, all_keys, all_keys, key_length=9, offset=4), 9), True)
    np.testing.assert_array_equal(dense(masks.sliding_window(3, all_keys, 2, key_length=9, offset=-2), 9)[0].sum(-1), [1, 2, 3])
    ids = np.array([[0, 0, 1, 1, 1]])
    got = dense(masks.block_causal(5, all_keys, segment_ids=ids), 5)
    np.testing.assert_array_equal(got, ids[:, :, None] == ids[:, None])


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint32"])
def test_ends_of_dtypes_that_do_not_hold_the_keys(dtype):
    most = jnp.iinfo(dtype).max  # of uint32 beyond any int32
    mask = masks.KeyIntervals(jnp.zeros((1, 2), dtype), jnp.array([[100, most]], dtype))
    np.testing.assert_array_equal(masks.bounds(mask, 300)[0], [[0, 100], [0, min(most, 300)]])


@pytest.mark.parametrize("second", [{}, dict(start2=jnp.full((1, 3), 5), stop2=jnp.full((1, 3), 6))])
def test_ends_of_one_row_stand_for_all_rows(second):
    mask = masks.KeyIntervals(jnp.zeros((1, 3), int), jnp.array([[1, 2, 3], [4, 0, 2]]), **second)
    whole = masks.KeyIntervals(*(None if x is None else jnp.broadcast_to(x, (2, 3)) for x in dataclasses.astuple(mask)))
    np.testing.assert_array_equal(masks.bounds(mask, 7), masks.bounds(whole, 7))
