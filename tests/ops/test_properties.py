"""What must hold of the operations whatever the numbers: relations between calls, each for the kernels and the plain version.

Shapes are drawn small, so that edges (one query, one key, one token) come up often, and from few values, for each is compiled,
which is what takes the time here; the kernels' tiles have 192 keys, 192 rows and 128 columns, so the largest of each list is in
several. Only what must hold to the bit is tried in a second dtype. The examples are the same in every run.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dlm_kernels
from dlm_kernels import masks
from dlm_kernels.reference import attention as reference

SEEDS = st.integers(0, 2**31 - 1)
DTYPES = st.sampled_from(["float32", "bfloat16"])
# Two computations of one thing in float32, whose sums over keys and head size round each in their order.
TOLERANCE = 64 * 2**-24

examples = settings(max_examples=6, deadline=None, derandomize=True, database=None)
attention = jax.jit(dlm_kernels.attention, static_argnames=("return_lse", "implementation"))
score_tokens = jax.jit(
    dlm_kernels.score_tokens, static_argnames=("confidence", "tempered_confidence", "logits_soft_cap", "implementation")
)
lm_head_scores = jax.jit(dlm_kernels.lm_head_scores, static_argnames=("confidence", "implementation"))
unmask_topk = jax.jit(dlm_kernels.unmask_topk, static_argnames=("mask_id", "implementation"))
unmask_step = jax.jit(dlm_kernels.unmask_step, static_argnames=("mask_id", "implementation"))

implementations = pytest.mark.parametrize("implementation", ["xla", "cpu"])


def normal(seed, *shape, dtype="float32", spread=1.0):
    return (spread * np.random.default_rng(seed).standard_normal(shape)).astype(jnp.dtype(dtype))


def attention_inputs(seed, b, t, s, n, k, h, dtype="float32"):
    """query, key and value, in NumPy: what is done to them here need not be compiled."""
    parts = normal(seed, b, t * n * h + 2 * s * k * h, dtype=dtype)
    query, key, value = np.split(parts, [t * n * h, t * n * h + s * k * h], axis=1)
    return query.reshape(b, t, n, h), key.reshape(b, s, k, h), value.reshape(b, s, k, h)


def close(got, expected):
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(got[~finite], expected[~finite])
    scale = max(1, np.abs(expected[finite]).max(initial=0))
    np.testing.assert_allclose(got[finite], expected[finite], rtol=0, atol=TOLERANCE * scale)


def same(got, expected):
    """To the bit."""
    jax.tree.map(np.testing.assert_array_equal, got, expected)


# (T, S, N, K, H)
attention_shapes = st.sampled_from([(1, 1, 1, 1, 32), (5, 37, 4, 2, 64), (70, 133, 6, 2, 40), (2, 300, 2, 1, 37)])


@implementations
@given(seed=SEEDS, shape=attention_shapes)
@examples
def test_the_order_of_keys_does_not_matter(implementation, seed, shape):
    query, key, value = attention_inputs(seed, 2, *shape)
    order = np.random.default_rng(seed).permutation(shape[1])
    out, lse = attention(query, key, value, return_lse=True, implementation=implementation)
    permuted = attention(query, key[:, order], value[:, order], return_lse=True, implementation=implementation)
    close(permuted[0], out)
    close(permuted[1], lse)


@implementations
@given(seed=SEEDS, split=st.sampled_from([0, 1, 64, 129, 300]))
@examples
def test_parts_merged_by_lse_are_the_whole(implementation, seed, split):
    query, key, value = attention_inputs(seed, 2, 7, 300, 4, 2, 40)
    out, lse = attention(query, key, value, return_lse=True, implementation=implementation)
    parts = [
        attention(query, key, value, mask=masks.cache(7, stop, start=start), return_lse=True, implementation=implementation)
        for start, stop in ((0, split), (split, 300))
    ]
    outs, lses = (np.stack(x).astype(np.float64) for x in zip(*parts))
    close(np.logaddexp(*lses), lse)
    # An empty part has lse -inf, and so weight 0.
    merged = (outs * np.exp(lses - lse).transpose(0, 1, 3, 2)[..., None]).sum(0)
    close(merged, out)


@implementations
@given(seed=SEEDS, lengths=st.sampled_from([(1,), (17, 3, 130), (130, 0, 17)]))
@examples
def test_packed_documents_are_as_alone(implementation, seed, lengths):
    query, key, value = attention_inputs(seed, 1, sum(lengths), sum(lengths), 4, 2, 40)
    ids = np.repeat(np.arange(len(lengths)), lengths)[None]
    packed = attention(query, key, value, mask=masks.packed(ids), return_lse=True, implementation=implementation)
    first = 0
    for length in lengths:
        rows = slice(first, first + length)
        first += length
        alone = attention(query[:, rows], key[:, rows], value[:, rows], return_lse=True, implementation=implementation)
        close(np.asarray(packed[0])[:, rows], alone[0])
        close(np.asarray(packed[1])[:, :, rows], alone[1])


@implementations
@given(seed=SEEDS, length=st.sampled_from([1, 9, 200]))
@examples
def test_blocks_of_one_are_causal(implementation, seed, length):
    inputs = attention_inputs(seed, 2, length, length, 4, 2, 40)
    mask = masks.block_causal(length, 1)
    out, lse = attention(*inputs, mask=mask, return_lse=True, implementation=implementation)
    causal = np.tril(np.ones((1, 1, length, length), bool))
    expected = reference.attention_forward(*inputs, None, causal, scale=40**-0.5, logits_soft_cap=None)
    close(out, expected[0])
    close(lse, expected[1])


@implementations
@given(seed=SEEDS, length=st.sampled_from([1, 9, 200]))
@examples
def test_one_block_is_full(implementation, seed, length):
    inputs = attention_inputs(seed, 2, length, length, 4, 2, 40)
    full = attention(*inputs, return_lse=True, implementation=implementation)
    block = attention(*inputs, mask=masks.block_causal(length, length), return_lse=True, implementation=implementation)
    close(block[0], full[0])
    close(block[1], full[1])


@implementations
@given(seed=SEEDS, shape=attention_shapes)
@examples
def test_grouped_heads_are_repeated_heads(implementation, seed, shape):
    t, s, n, k, _ = shape
    query, key, value = attention_inputs(seed, 2, *shape)
    mask = masks.padding(np.array([s, s // 2]), t, s)
    grouped = attention(query, key, value, mask=mask, return_lse=True, implementation=implementation)
    key, value = (np.repeat(x, n // k, axis=2) for x in (key, value))
    repeated = attention(query, key, value, mask=mask, return_lse=True, implementation=implementation)
    close(grouped[0], repeated[0])
    close(grouped[1], repeated[1])


@implementations
@given(seed=SEEDS, shape=attention_shapes, dtype=DTYPES, poison=st.sampled_from([np.nan, np.inf, -np.inf]))
@examples
def test_keys_nobody_sees_change_no_bit(implementation, seed, shape, dtype, poison):
    t, s = shape[:2]
    query, key, value = attention_inputs(seed, 2, *shape, dtype=dtype)
    ends = np.sort(np.random.default_rng(seed).integers(0, s + 1, (4, 2, t)), axis=0).astype(np.int32)
    mask = masks.KeyIntervals(*ends)
    start, stop, start2, stop2 = ends[..., None]
    keys = np.arange(s)
    seen = ((start <= keys) & (keys < stop)) | ((start2 <= keys) & (keys < stop2))
    seen = seen.any(1)[:, :, None, None]
    clean = attention(query, key, value, mask=mask, return_lse=True, implementation=implementation)
    key, value = (np.where(seen, x, np.asarray(poison, x.dtype)) for x in (key, value))
    same(attention(query, key, value, mask=mask, return_lse=True, implementation=implementation), clean)


@given(seed=SEEDS, shape=attention_shapes, dtype=DTYPES)
@examples
def test_a_row_of_attention_alone_is_as_in_a_batch(seed, shape, dtype):
    """The kernels', to the bit. Of XLA's products the shape decides the order."""
    inputs = attention_inputs(seed, 3, *shape, dtype=dtype)
    together = attention(*inputs, return_lse=True, implementation="cpu")
    same(attention(*inputs, return_lse=True, implementation="cpu"), together)
    for b in range(3):
        alone = attention(*(x[b : b + 1] for x in inputs), return_lse=True, implementation="cpu")
        same(alone, tuple(np.asarray(x)[b : b + 1] for x in together))


VOCABULARIES = st.sampled_from([1, 37, 1003, 17001])
TEMPERATURES = st.sampled_from([0.3, 1.0, 2.5])


def scores_close(got, expected, rtol=3e-5):
    np.testing.assert_array_equal(got.token, expected.token)
    for a, b in zip(got[1:], expected[1:]):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-6)


@implementations
@given(seed=SEEDS, v=VOCABULARIES, temperature=TEMPERATURES, per_row=st.booleans())
@examples
def test_noise_is_jax_random_gumbel(implementation, seed, v, temperature, per_row):
    logits, key = normal(seed, 3, 2, v, spread=2.0), jax.random.key(seed ^ 1)
    if per_row:
        key = jax.random.split(key, 3)
        noise = jax.vmap(lambda k: jax.random.gumbel(k, (2, v)))(key)
    else:
        noise = jax.random.gumbel(key, logits.shape)
    drawn = score_tokens(logits, temperature=temperature, key=key, implementation=implementation)
    given_ = score_tokens(logits, temperature=temperature, noise=noise, implementation=implementation)
    # -log(-log(u)) rounds as the logarithm at hand does; a tie within that is the only excuse for another token.
    total = np.asarray(logits, np.float64) / temperature + np.asarray(noise, np.float64)
    best = np.argmax(total, -1)
    lost = total.max(-1) - np.take_along_axis(total, np.asarray(drawn.token)[..., None], -1)[..., 0]
    assert (lost <= 1e-4).all()
    np.testing.assert_array_equal(given_.token, best)
    same(drawn.logsumexp, given_.logsumexp)


@given(
    seed=SEEDS,
    v=VOCABULARIES,
    confidence=st.sampled_from(["probability", "margin", "neg_entropy", "random"]),
    tempered=st.booleans(),
    dtype=DTYPES,
)
@examples
def test_a_row_of_scores_alone_is_as_in_a_batch(seed, v, confidence, tempered, dtype):
    """The kernels', to the bit, greedy and sampled. Of XLA's sums the shape decides the order."""
    logits, unconditional = normal(seed, 4, 3, v, dtype=dtype), normal(seed ^ 1, 4, 3, v, dtype=dtype)
    arrays = dict(
        unconditional=unconditional,
        guidance_scale=np.array([1.0, 0.0, 2.5, -0.5], np.float32),
        temperature=np.array([0.0, 1.0, 0.3, 2.0], np.float32),
        key=np.random.default_rng(seed).integers(0, 2**32, (4, 2), np.uint32),
        active=normal(seed ^ 2, 4, 3) < 1,
    )
    static = dict(confidence=confidence, tempered_confidence=tempered, implementation="cpu")
    together = score_tokens(logits, **arrays, **static)
    same(score_tokens(logits, **arrays, **static), together)
    for b in range(4):
        alone = score_tokens(logits[b : b + 1], **{name: array[b : b + 1] for name, array in arrays.items()}, **static)
        same(tuple(alone), tuple(np.asarray(x)[b : b + 1] for x in together))


@implementations
@given(seed=SEEDS, v=VOCABULARIES, dtype=DTYPES)
@examples
def test_rows_that_are_not_active_change_no_bit(implementation, seed, v, dtype):
    logits = normal(seed, 2, 3, v, dtype=dtype)
    active = np.array([[True, False, True], [False, False, True]])
    sampling = dict(temperature=np.array([0.0, 0.7], np.float32), key=jax.random.key(seed), active=active)
    clean = score_tokens(logits, **sampling, implementation=implementation)
    poisoned = np.where(active[..., None], logits, np.asarray(np.nan, logits.dtype))
    same(score_tokens(poisoned, **sampling, implementation=implementation), clean)


@implementations
@given(seed=SEEDS, v=st.sampled_from([1, 37, 300]), confidence=st.sampled_from(["probability", "margin", "neg_entropy"]))
@examples
def test_lm_head_scores_are_the_scores_of_the_product(implementation, seed, v, confidence):
    # Multiples of 1/16 of a small range: products and sums are exact in any order, so tokens and ties are the same.
    rng = np.random.default_rng(seed)
    hidden = rng.integers(-9, 10, (2, 5, 70)).astype(np.float32)
    weight = rng.integers(-9, 10, (v, 70)).astype(np.float32) / 128
    sampling = dict(temperature=np.array([0.0, 0.8], np.float32), key=jax.random.key(seed))
    sampling["active"] = np.arange(10).reshape(2, 5) % 4 != 2
    fused = lm_head_scores(hidden, weight, confidence=confidence, **sampling, implementation=implementation)
    scores_close(fused, score_tokens(hidden @ weight.T, confidence=confidence, **sampling, implementation=implementation))


@implementations
@given(
    seed=SEEDS,
    length=st.sampled_from([1, 37, 300]),
    rule=st.sampled_from(["num_unmask", "threshold", "factor", "entropy_budget"]),
    edits=st.booleans(),
)
@examples
def test_unmask_topk_commits_the_best_eligible_positions(implementation, seed, length, rule, edits):
    rng, b, mask_id = np.random.default_rng(seed), 4, 0
    tokens = rng.integers(0, 2, (b, length)).astype(np.int32) * rng.integers(1, 50, (b, length)).astype(np.int32)
    candidates = rng.random((b, length)) < 0.8
    tokens[1], candidates[2] = mask_id, False
    proposal = rng.integers(1, 50, (b, length)).astype(np.int32)
    confidence = rng.random((b, length)).round(1).astype(np.float32)  # full of ties
    entropy = rng.random((b, length)).round(1).astype(np.float32)
    scores = dlm_kernels.TokenScores(proposal, confidence, entropy, confidence)
    value = dict(num_unmask=[0, 5, 3, 999], threshold=[0.5, 0.9, 1, 0], factor=[0.5, 1, 2, 2], entropy_budget=[0, 1, 2, 99])[rule]
    rules = {rule: np.array(value), "edit_threshold": np.full(b, 0.55, np.float32) if edits else None}
    result = unmask_topk(tokens, scores, mask_id=mask_id, candidates=candidates, **rules, implementation=implementation)
    new, unmasked, count = map(np.asarray, result)
    eligible = (tokens == mask_id) & candidates

    assert not (unmasked & ~eligible).any()
    np.testing.assert_array_equal(count, unmasked.sum(1))
    np.testing.assert_array_equal(new[unmasked], proposal[unmasked])
    edited = ~unmasked & candidates & (tokens != mask_id) & (confidence > 0.55) if edits else np.zeros_like(unmasked)
    np.testing.assert_array_equal(new[edited], proposal[edited])
    untouched = ~unmasked & ~edited
    np.testing.assert_array_equal(new[untouched], tokens[untouched])

    assert (count <= eligible.sum(1)).all()
    if rule == "num_unmask":
        np.testing.assert_array_equal(count, np.minimum(value, eligible.sum(1)))
    else:
        assert (count[eligible.any(1)] >= 1).all()
    rank = -entropy if rule == "entropy_budget" else confidence
    for row in range(b):
        chosen, left = np.flatnonzero(unmasked[row]), np.flatnonzero(eligible[row] & ~unmasked[row])
        # Ties go to the lower position.
        if len(chosen) and len(left):
            worst = min((rank[row, i], -i) for i in chosen)
            assert worst > max((rank[row, i], -i) for i in left)


@implementations
@given(seed=SEEDS, v=VOCABULARIES, temperature=st.sampled_from([0.0, 0.7]))
@examples
def test_unmask_step_is_its_two_halves(implementation, seed, v, temperature):
    mask_id = v - 1
    logits = normal(seed, 2, 9, v)
    tokens = np.where(normal(seed ^ 1, 2, 9) < 0.3, np.int32(mask_id), np.int32(0))
    sampling = dict(temperature=temperature, key=jax.random.key(seed ^ 2), implementation=implementation)
    step = unmask_step(logits, tokens, mask_id=mask_id, num_unmask=3, threshold=0.5, **sampling)
    scores = score_tokens(logits, active=tokens == mask_id, **sampling)
    halves = unmask_topk(tokens, scores, mask_id=mask_id, num_unmask=3, threshold=0.5, implementation=implementation)
    same(step, halves)
