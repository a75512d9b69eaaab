"""Attention in Triton's interpreter, beyond what tests/leaves asks of every implementation.

70 keys and 45 queries divide no tile; 3 query heads per kv head are packed; a head of 24 is padded to 32; 1100 keys take the
split path. The interpreter runs a program at a time, so there is one shape of each kind.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm_kernels import attention, masks
from dlm_kernels.reference import attention as oracle
from dlm_kernels.triton_kernels import attention as kernels
from dlm_kernels.xla import attention as plain

B, T, S, K, G, H = 2, 45, 70, 2, 3, 24


def inputs(t=T, s=S, g=G, h=H, dtype="float32"):
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = [(B, t, K * g, h), (B, s, K, h), (B, s, K, h), (B, t, K * g, h), (B, K * g, t)]
    return [np.array(jax.random.normal(k, shape).astype(dtype)) for k, shape in zip(keys, shapes)]


def intervals(pairs, t, s):
    """Random disjoint runs in order, some empty; the last batch row's queries 3 and 4 see nothing."""
    ends = np.sort(np.random.default_rng(1).integers(0, s + 1, (B, t, 2 * pairs)), axis=-1).astype(np.int32)
    ends[:, 0] = np.array([0, s, s, s])[: 2 * pairs]
    ends[1, 3:5] = 0
    return ends


@pytest.mark.parametrize("pairs", [0, 1, 2])
@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("t, s, g", [(1, S, 1), (3, 1100, G)])
def test_forward_and_backward(pairs, cap, t, s, g):
    query, key, value, dout, dlse = inputs(t, s, g)
    bounds = intervals(pairs, t, s) if pairs else None
    if pairs:
        dlse[1, :, 3:5] = 0
    options = dict(scale=0.3, logits_soft_cap=cap)
    out, lse = kernels.attention_forward(query, key, value, bounds, None, **options)
    expected, expected_lse = plain.attention_forward(query, key, value, bounds, None, **options)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=2e-6)
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-5, atol=2e-6)
    if s > 1000:
        return
    arguments = (query, key, value, bounds, None, out, lse, dout, dlse)
    got = kernels.attention_backward(*arguments, **options)
    for mine, other in zip(got, plain.attention_backward(*arguments, **options)):
        assert np.linalg.norm(mine - other) <= 3e-6 * np.linalg.norm(other)


@pytest.mark.parametrize("h", [64, 96, 128, 256, 320, 512])
def test_every_head_size(h):
    query, key, value, dout, dlse = inputs(2, 34, 1, h)
    bounds = intervals(1, 2, 34)
    options = dict(scale=h**-0.5, logits_soft_cap=None)
    out, lse = kernels.attention_forward(query, key, value, bounds, None, **options)
    np.testing.assert_allclose(out, plain.attention_forward(query, key, value, bounds, None, **options)[0], rtol=1e-4, atol=2e-6)
    arguments = (query, key, value, bounds, None, out, lse, dout, dlse)
    got = kernels.attention_backward(*arguments, **options)
    for mine, other in zip(got, plain.attention_backward(*arguments, **options)):
        assert np.linalg.norm(mine - other) <= 3e-6 * np.linalg.norm(other)


@pytest.mark.parametrize("h, t, s, seen, cap", [(320, 43, 40, (0, 40), 2.0), (512, 5, 520, (230, 290), None)])
def test_two_programs_share_the_columns_of_a_head_beyond_256(h, t, s, seen, cap):
    """In half precision on Hopper: 256 columns each, the second 64 of 320's; in one pass, and split at key 256."""
    query, key, value, _, _ = inputs(t, s, G, h, "float16")
    arrays = query, key, value, np.clip(intervals(1, t, s), *seen), None
    options = dict(scale=h**-0.5, logits_soft_cap=cap)
    exact, exact_lse = oracle.attention_forward(*arrays, **options)
    (out, lse), (other, _) = (x.attention_forward(*arrays, **options) for x in (kernels, plain))
    assert (out[1, 3:5] == 0).all() and np.isneginf(lse[1, :, 3:5]).all()
    np.testing.assert_allclose(lse, exact_lse, rtol=1e-5, atol=2e-6)
    error = [np.linalg.norm(np.asarray(x, np.float64) - exact) for x in (out, other)]
    assert error[0] <= 1.5 * error[1]


# kv heads and groups of LLaDA-8B, SDAR-4B, LLaDA2-mini, Dream-7B.
@pytest.mark.parametrize("kv_heads, groups", [(32, 1), (8, 4), (4, 4), (4, 7)])
@pytest.mark.parametrize("queries", [32, 128, 256, 1024])
@pytest.mark.parametrize("length", [4096, 32768])
def test_a_short_block_against_a_long_cache_keeps_every_multiprocessor_busy(kv_heads, groups, queries, length):
    block = kernels._tiles("bfloat16", 128, queries * groups <= 64, 1)[0]["BLOCK_M"]
    programs = -(-queries * groups // block) * kv_heads
    split, parts = kernels._split(programs, length)
    assert (parts - 1) * split < length <= parts * split
    # Hopper's 132; the least cache of the fewest heads has 64 runs of keys to give.
    assert programs * parts >= (64 if kv_heads * length <= 4 * 4096 else 0.8 * 132)
    # Parts are float32 [programs * parts, block, 128].
    assert parts == 1 or programs * parts * block * 128 * 4 <= 18e6


def test_unseen_keys_change_no_bit():
    query, key, value, dout, dlse = inputs()
    bounds = np.zeros((1, T, 4), np.int32)
    bounds[:, :] = [3, 20, 40, 61]
    options = dict(scale=0.2, logits_soft_cap=None)

    def run(key, value):
        out, lse = kernels.attention_forward(query, key, value, bounds, None, **options)
        return (out, lse, *kernels.attention_backward(
            query, key, value, bounds, None, out, lse, dout, dlse, **options
        ))  # fmt: skip

    clean = run(key, value)
    for array in (key, value):
        array[:, :3] = array[:, 20:40] = np.nan
        array[:, 61:] = np.inf
    for mine, other in zip(run(key, value), clean):
        np.testing.assert_array_equal(mine, other)


def test_a_row_does_not_depend_on_its_batch():
    query, key, value, _, _ = inputs(3, 1100)
    bounds = intervals(2, 3, 1100)
    options = dict(scale=0.2, logits_soft_cap=None)
    both = kernels.attention_forward(query, key, value, bounds, None, **options)
    alone = kernels.attention_forward(query[1:], key[1:], value[1:], bounds[1:], None, **options)
    np.testing.assert_array_equal(both[0][1:], alone[0])


def test_half_precision_within_one_and_a_half_times_the_plain_error():
    half = inputs(dtype="float16")[:3]
    exact = plain.attention_forward(*[x.astype("float32") for x in half], None, None, scale=0.2, logits_soft_cap=None)[0]
    options = dict(scale=0.2, logits_soft_cap=None)
    mine = kernels.attention_forward(*half, None, None, **options)[0]
    other = plain.attention_forward(*half, None, None, **options)[0]
    assert mine.dtype == np.float16
    error = [np.linalg.norm(np.asarray(x, np.float32) - exact) for x in (mine, other)]
    assert error[0] <= 1.5 * error[1]


@pytest.mark.parametrize("h", [H, 512])
def test_float16_gradients_within_one_and_a_half_times_the_plain_error(h):
    """Of a mean's loss: the gradient of the logits is below float16's least number."""
    query, key, value, dout, dlse = inputs(17, S, 1, h, dtype="float16")
    dout, dlse = (1e-4 * (1 + dout)).astype("float16"), np.zeros(dlse.shape, np.float32)
    options = dict(scale=0.2, logits_soft_cap=None)
    out, lse = plain.attention_forward(query, key, value, None, None, **options)
    arguments = [np.asarray(x) if x is not None else None for x in (query, key, value, None, None, out, lse, dout, dlse)]
    exact = oracle.attention_backward(*arguments, **options)
    mine, other = (x.attention_backward(*arguments, **options) for x in (kernels, plain))
    for want, *found in zip(exact, mine, other):
        error = [np.linalg.norm(np.asarray(x, np.float64) - want) for x in found]
        assert error[0] <= 1.5 * error[1]


def test_through_the_operation_under_vmap_and_grad():
    query, key, value, dout, _ = (jnp.asarray(x) for x in inputs(9, 20, 1, 16))
    mask = masks.KeyIntervals(jnp.zeros((1, 9), jnp.int32), jnp.arange(9, dtype=jnp.int32)[None] * 2)

    def loss(q, implementation):
        run = jax.vmap(lambda q: attention(q, key, value, mask=mask, implementation=implementation))
        return jnp.sum(run(jnp.stack([q, 2 * q])) * dout)

    got, expected = (jax.grad(loss)(query, name) for name in ("triton", "xla"))
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kv_heads", [1, 3])
def test_offsets_beyond_32_bits(kv_heads):
    """Heads 2**30 elements apart, as those of long sequences in [B, N, T, H] are: a sparse array, and the third head's wraps."""
    # From the middle, where an offset that wraps around finds zeros and nobody else's memory.
    middle = np.zeros(2**32 + 4096, np.float16)[2**31 :]
    far = iter(middle[i * 1024 :] for i in range(4))

    def apart(array):
        _, t, n, h = array.shape
        view = np.lib.stride_tricks.as_strided(next(far), array.shape, [2 * step for step in (1, h, 2**30, 1)])
        view[...] = array
        return view

    query, key, value, dout = (x.reshape(1, 4, 3, 16) for x in inputs(3, 3, 1, 16, "float16")[:4])
    arrays = query, key[:, :, :kv_heads], value[:, :, :kv_heads], dout
    options = dict(scale=0.3, logits_soft_cap=None)

    def run(query, key, value, dout):
        out, lse = kernels.attention_forward(query, key, value, None, None, **options)
        return (out, lse, *kernels.attention_backward(query, key, value, None, None, out, lse, dout, lse, **options))

    for mine, other in zip(run(*map(apart, arrays)), run(*arrays)):
        np.testing.assert_array_equal(mine, other)


def test_every_operand_is_read_by_its_own_strides():
    arrays = inputs(5, 40)[:4]
    orders = [(0, 2, 1, 3), (1, 0, 2, 3), (3, 2, 0, 1), (2, 3, 1, 0)]
    apart = [np.ascontiguousarray(x.transpose(order)).transpose(np.argsort(order)) for x, order in zip(arrays, orders)]
    options = dict(scale=0.3, logits_soft_cap=None)

    def run(query, key, value, dout):
        out, lse = kernels.attention_forward(query, key, value, None, None, **options)
        back = [np.asfortranarray(out), lse, dout, lse]
        return (out, lse, *kernels.attention_backward(query, key, value, None, None, *back, **options))

    for mine, other in zip(run(*apart), run(*arrays)):
        np.testing.assert_array_equal(mine, other)


def test_a_query_that_sees_no_key_of_a_long_cache():
    query, key, value, _, _ = inputs(2, 1100, 1)
    bounds = np.array([[[0, 1100], [7, 7]]], np.int32)
    out, lse = kernels.attention_forward(query, key, value, bounds, None, scale=0.3, logits_soft_cap=None)
    assert (out[:, 1] == 0).all() and np.isneginf(lse[:, :, 1]).all() and np.isfinite(lse[:, :, 0]).all()
