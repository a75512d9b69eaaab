"""The kernels on a real NVIDIA GPU, through the public operations: `make test-gpu`.

Sizes are those of models, so that every tile has neighbours.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm_kernels import (
    attention,
    explain,
    lm_head_scores,
    masked_cross_entropy,
    masked_divergence,
    masks,
    mix_experts,
    score_tokens,
    unmask_step,
)
from dlm_kernels.triton_kernels.launch import multiplies_by_warp

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("t, s, h", [(300, 1000, 128), (32, 4100, 64), (130, 260, 256), (130, 2100, 512)])
def test_attention_and_its_gradients(dtype, t, s, h):
    if dtype == jnp.float32 and h > 256 and multiplies_by_warp():
        pytest.skip("this GPU's shared memory does not hold the gradient's tiles")
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(2, t, 8, h), (2, s, 2, h), (2, s, 2, h), (2, t, 8, h)]
    query, key, value, dout = (jax.random.normal(k, shape).astype(dtype) for k, shape in zip(keys, shapes))
    stop = jnp.linspace(0, s, t).astype(jnp.int32)[None]
    mask = masks.KeyIntervals(stop // 3, stop)

    def run(name, *arrays):
        return jax.vjp(lambda *x: attention(*x, mask=mask, implementation=name), *arrays)

    def results(name, *arrays):
        out, back = run(name, *arrays)
        return (out, *back(dout.astype(out.dtype)))

    with jax.default_matmul_precision("highest"):
        exact = results("xla", *(x.astype(jnp.float32) for x in (query, key, value)))
    mine, plain = (results(name, query, key, value) for name in ("triton", "xla"))
    for got, other, truth in zip(mine, plain, exact):
        size = np.linalg.norm(truth)
        error = [np.linalg.norm(np.asarray(x, np.float32) - truth) / size for x in (got, other)]
        assert error[0] <= max(1.5 * error[1], 4e-6)


@pytest.mark.parametrize("heads", [(32, 32), (32, 8)])
def test_a_block_against_a_long_cache_is_within_the_plain_error_and_repeats_its_bits(heads):
    n, k = heads
    keys = jax.random.split(jax.random.key(0), 3)
    query, key, value = (
        jax.random.normal(x, (1, t, m, 128)).astype(jnp.bfloat16) for x, t, m in zip(keys, (128, 8192, 8192), (n, k, k))
    )
    exact = attention(*(x.astype(jnp.float32) for x in (query, key, value)), implementation="triton")
    mine, again, plain = (attention(query, key, value, implementation=name) for name in ("triton", "triton", "xla"))
    np.testing.assert_array_equal(np.asarray(mine, np.float32), np.asarray(again, np.float32))
    error = [np.linalg.norm(np.asarray(x, np.float32) - exact) for x in (mine, plain)]
    assert error[0] <= 1.5 * error[1]


def test_logits_whose_rounding_is_more_than_exp_can_bear():
    query, key = (3e5 * jax.random.normal(jax.random.key(i), (1, 64, 2, 64)) for i in range(2))
    assert np.isfinite(attention(query, key, key, scale=1.0, implementation="triton")).all()


def test_cudnn_where_it_is_asked_for():
    query = jax.random.normal(jax.random.key(0), (2, 256, 4, 128)).astype(jnp.bfloat16)
    assert "cudnn" in str(explain(attention, query, query, query, implementation="cudnn"))
    mine, cudnn = (attention(query, query, query, implementation=name) for name in ("triton", "cudnn"))
    np.testing.assert_allclose(np.asarray(mine, np.float32), np.asarray(cudnn, np.float32), rtol=2e-2, atol=1e-2)


def test_a_step_commits_what_the_plain_one_commits():
    logits = 4 * jax.random.normal(jax.random.key(1), (2, 128, 126464))
    tokens = jnp.where(jnp.arange(128) % 3 == 0, 5, 126336) + jnp.zeros((2, 1), jnp.int32)
    options = dict(mask_id=126336, num_unmask=8, threshold=0.9, candidates=(16, 112))
    got, expected = (unmask_step(logits, tokens, implementation=name, **options) for name in ("triton", "xla"))
    for mine, other in zip(got, expected):
        np.testing.assert_array_equal(mine, other)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_scores_of_a_large_vocabulary(dtype, temperature):
    logits = (4 * jax.random.normal(jax.random.key(1), (2, 40, 126464))).astype(dtype)
    options = dict(temperature=temperature, key=jax.random.key(2))
    got, expected = (score_tokens(logits, implementation=name, **options) for name in ("triton", "xla"))
    # A draw's logarithms round differently: one token in eighty may.
    assert np.mean(np.asarray(got.token) != np.asarray(expected.token)) <= 1 / 80
    same = np.asarray(got.token) == np.asarray(expected.token)
    for mine, other in zip(got[1:], expected[1:]):
        np.testing.assert_allclose(np.asarray(mine)[same], np.asarray(other)[same], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", [200, 9000])  # of 512 float32s, 8192 rows are a group of those that stay in L2
def test_the_head_and_the_loss(rows):
    hidden = jax.random.normal(jax.random.key(3), (1, rows, 512))
    weight = jax.random.normal(jax.random.key(4), (20000, 512)) / 16
    targets = jax.random.randint(jax.random.key(5), (1, rows), 0, 20000)
    weights = jnp.ones((1, rows))
    with jax.default_matmul_precision("highest"):
        got, expected = (lm_head_scores(hidden, weight, implementation=name) for name in ("triton", "xla"))
        np.testing.assert_array_equal(got.token, expected.token)
        np.testing.assert_allclose(got.logsumexp, expected.logsumexp, rtol=1e-5)
        loss = jax.grad(lambda h, name: masked_cross_entropy(h, weight, targets, weights, implementation=name))
        np.testing.assert_allclose(loss(hidden, "triton"), loss(hidden, "xla"), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("rows", [40, 300])  # below and above the 64 that the smaller tiles are for
def test_the_divergence_and_its_gradients(dtype, rows):
    keys = jax.random.split(jax.random.key(6), 4)
    shapes = (1, rows, 512), (20000, 512), (1, rows, 768), (20000, 768)
    arrays = [(jax.random.normal(key, shape) / (16 if len(shape) == 2 else 1)).astype(dtype) for key, shape in zip(keys, shapes)]
    weights = jnp.where(jnp.arange(rows) % 3 == 1, 0, 1.0)[None]

    def results(name, hidden, weight, *target):
        def loss(hidden, weight):
            each = masked_divergence(hidden, weight, *target, weights, reduction="none", implementation=name)
            return jnp.sum(each), each

        gradients, each = jax.grad(loss, (0, 1), has_aux=True)(hidden, weight)
        return each, *gradients

    with jax.default_matmul_precision("highest"):
        exact = results("xla", *(x.astype(jnp.float32) for x in arrays))
    mine, again, plain = (results(name, *arrays) for name in ("triton", "triton", "xla"))
    for got, repeated, other, truth in zip(mine, again, plain, exact):
        np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(repeated, np.float32))
        error = [np.linalg.norm(np.asarray(x, np.float32) - truth) / np.linalg.norm(truth) for x in (got, other)]
        # The logits' gradients are rounded too, to be multiplied.
        assert error[0] <= max(2 * error[1], 2e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("rows", [40, 1500])  # with 2 experts each: the smaller tiles are for 2048 pairs
def test_a_mixture_of_experts(dtype, rows):
    keys = jax.random.split(jax.random.key(7), 6)
    shapes = (rows, 1024), (16, 1024, 352), (16, 1024, 352), (16, 352, 1024)
    arrays = [(jax.random.normal(key, shape) * shape[-2] ** -0.5).astype(dtype) for key, shape in zip(keys, shapes)]
    arrays[0] *= rows**0.5
    expert, weight = jax.random.randint(keys[4], (rows, 2), 0, 16), jax.random.uniform(keys[5], (rows, 2))

    def run(name, *arrays, some=slice(None)):
        x, *matrices = arrays
        return mix_experts(x[some], *matrices, expert[some], weight[some], implementation=name)

    with jax.default_matmul_precision("highest"):
        exact = run("xla", *(x.astype(jnp.float32) for x in arrays))
        mine, again, plain = (np.asarray(run(name, *arrays), np.float32) for name in ("triton", "triton", "xla"))
        alone = np.asarray(run("triton", *arrays, some=slice(7, 9)), np.float32)
    np.testing.assert_array_equal(mine, again)
    np.testing.assert_array_equal(mine[7:9], alone)
    error = [np.linalg.norm(x - exact) / np.linalg.norm(exact) for x in (mine, plain)]
    assert error[0] <= max(1.5 * error[1], 4e-6)
