"""Scores of tokens and unmasking against the float64 oracle."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm_kernels.reference import guidance, threefry
from dlm_kernels.reference import unmask as reference

# Sums over V of float32 exponentials, each a few ulps off; logits are exact in every dtype, as they are upcast.
RELATIVE = 3e-5
NOTHING = dict(
    unconditional=None,
    guidance_scale=None,
    temperature=None,
    key_data=None,
    counter_row=None,
    noise=None,
    active=None,
    banned=None,
)
PLAIN = dict(confidence="probability", tempered_confidence=False, logits_soft_cap=None)


def normal(seed, *shape, dtype="float32", spread=3.0):
    return (spread * jax.random.normal(jax.random.key(seed), shape)).astype(dtype)


def sampling(rows, seed=5):
    bits = jax.random.bits(jax.random.key(seed), (rows, 2))
    return dict(key_data=bits, counter_row=(jnp.arange(rows) * 7 + 3).astype(jnp.int32))


def check(leaf, logits, static, **operands):
    operands = NOTHING | operands
    names = list(NOTHING)
    arrays = logits, *(operands[name] for name in names)
    got = leaf("unmask", "score_tokens")(*arrays, **static)
    expected = reference.score_tokens(*(None if x is None else np.asarray(x) for x in arrays), **static)
    assert [x.dtype for x in got] == [np.int32] + [np.float32] * 3
    undefined = np.isnan(expected[1])
    assert ((got[0] >= 0) & (got[0] < logits.shape[1]))[undefined].all()
    np.testing.assert_array_equal(got[0][~undefined], expected[0][~undefined])
    for result, wanted in zip(got[1:3], expected[1:3]):
        np.testing.assert_allclose(result, wanted, rtol=RELATIVE, atol=1e-6)
    np.testing.assert_allclose(got[3][~undefined], expected[3][~undefined], rtol=RELATIVE, atol=1e-6)
    return got


# One element, below, at and above a vector of every instruction set, and above a chunk. The largest vocabulary has several pieces.
@pytest.mark.parametrize("v", [1, 2, 15, 64, 1003, 17001])
@pytest.mark.parametrize("confidence", ["probability", "margin", "neg_entropy"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.only_reads
def test_greedy(leaf, v, confidence, dtype):
    check(leaf, normal(1, 5, v, dtype=dtype), PLAIN | dict(confidence=confidence))


@pytest.mark.parametrize("confidence, tempered", [*itertools.product(["probability", "margin", "neg_entropy"], [False, True])])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.only_reads
def test_every_option(leaf, confidence, tempered, dtype):
    options = dict(confidence=confidence, tempered_confidence=tempered, logits_soft_cap=20.0)
    operands = dict(
        unconditional=normal(3, 6, 2100, dtype=dtype),
        guidance_scale=jnp.array([0, 1, 2.5, -0.5, 1.5, 3]),
        temperature=jnp.array([0, 1, 0.3, 1.5, 0.7, 1]),
        active=jnp.array([True, True, False, True, True, True]),
        banned=jnp.array([5, 5, -1, 2100, 2**31 - 1, 0], jnp.int32),
        **sampling(6),
    )
    check(leaf, normal(2, 6, 2100, dtype=dtype), options, **operands)


def test_the_largest_vocabulary(leaf):
    check(leaf, normal(4, 2, 262144), PLAIN, temperature=jnp.array([1.0, 0.5]), **sampling(2))


def test_counters_past_32_bits(leaf):
    rows = jnp.array([2**31 - 1, 40000], jnp.int32)
    operands = dict(temperature=jnp.ones(2), key_data=sampling(2)["key_data"], counter_row=rows)
    check(leaf, normal(4, 2, 126464, spread=1.0), PLAIN, **operands)


def test_counters_past_32_bits_where_the_greatest_logit_often_wins(leaf):
    rows = jnp.arange(2**31 - 16, 2**31, dtype=jnp.int32)
    check(leaf, normal(4, 16, 3, spread=1.0), PLAIN, temperature=jnp.ones(16), key_data=sampling(16)["key_data"], counter_row=rows)


def test_counters_whose_low_word_wraps_around(leaf):
    rows = jnp.full(8, 2**32 // 100000, jnp.int32)  # at column 67296
    operands = dict(temperature=jnp.ones(8), key_data=sampling(8)["key_data"], counter_row=rows)
    check(leaf, normal(4, 8, 100000, spread=1.0), PLAIN, **operands)


def test_noise_is_jax_random_gumbel():
    key = jax.random.key(3)
    drawn = jax.random.gumbel(key, (4, 1003), jnp.float32)
    data = np.tile(np.asarray(jax.random.key_data(key)), (4, 1))
    ours = threefry.gumbel(data, np.arange(4), 1003)
    np.testing.assert_allclose(ours, drawn, rtol=1e-4, atol=1e-6)
    uniform = jax.random.uniform(key, (4, 1003), minval=jnp.finfo(jnp.float32).tiny)
    np.testing.assert_array_equal(threefry.uniform(data, np.arange(4), 1003), uniform)


def test_given_noise(leaf):
    noise = jax.random.gumbel(jax.random.key(8), (3, 777))
    check(leaf, normal(6, 3, 777), PLAIN, temperature=jnp.array([1, 0.0, 2]), noise=noise)


@pytest.mark.parametrize("tempered", [False, True])
def test_a_temperature_not_above_zero_is_greedy(leaf, tempered):
    options = PLAIN | dict(tempered_confidence=tempered)
    check(leaf, normal(6, 5, 777), options, temperature=jnp.array([-1, jnp.nan, -jnp.inf, 0, 1]), **sampling(5))


@pytest.mark.parametrize("confidence", ["probability", "margin", "neg_entropy"])
def test_rows_without_a_distribution(leaf, confidence):
    logits = np.array(normal(7, 6, 40))
    logits[0, 3] = np.nan
    logits[1, 39] = np.inf
    logits[2] = -np.inf
    logits[3, :39] = -np.inf  # one token left: certain
    logits[4, 0] = np.nan
    check(leaf, jnp.asarray(logits), PLAIN | dict(confidence=confidence))


def test_far_from_zero_the_confidence_is_as_precise(leaf):
    logits = normal(9, 4, 1000) + 300
    sure = check(leaf, logits, PLAIN)[1]
    expected = np.exp(np.asarray(logits, float) - np.asarray(logits, float).max(-1, keepdims=True))
    np.testing.assert_allclose(sure, 1 / expected.sum(-1), rtol=2e-6)


def test_tokens_banned_by_the_least_number(leaf):
    logits = normal(3, 1, 700).at[0, :600].set(jnp.finfo(jnp.float32).min)
    check(leaf, logits, PLAIN | dict(confidence="neg_entropy"))


@pytest.mark.parametrize("confidence", ["probability", "margin", "neg_entropy"])
def test_equal_tokens_share_a_probability_however_great_their_logits(leaf, confidence):
    logits = np.full((1, 37), -3e38, np.float32)
    logits[0, 5:9] = 3e38
    _, sure, entropy, _ = check(leaf, jnp.asarray(logits), PLAIN | dict(confidence=confidence))
    expected = dict(probability=0.25, margin=0, neg_entropy=-np.log(4))[confidence]
    np.testing.assert_allclose([sure[0], entropy[0]], [expected, np.log(4)], rtol=1e-6)


def test_ties_take_the_lowest_token(leaf):
    logits = np.zeros((3, 5000), np.float32)
    logits[1, [70, 71, 4999]] = 2
    logits[2, [4097, 4999]] = 1
    for drawn in ({}, dict(temperature=jnp.ones(3), noise=jnp.zeros(logits.shape))):
        token = check(leaf, jnp.asarray(logits), PLAIN | dict(confidence="margin"), **drawn)[0]
        np.testing.assert_array_equal(token, [0, 70, 4097])


def test_the_greatest_noise_wins(leaf):
    """A logit far below another that wins, by 0.05, with the greatest draw there is: 15.94, at this key and counter."""
    key_data, row, column = np.array([[0, 7]], np.uint32), np.array([129646], np.int32), 49
    noise = threefry.gumbel(key_data, row, 64)[0]
    assert noise[column] > 15.9
    logits = np.full((1, 64), -40, np.float32)
    logits[0, 5] = 0
    logits[0, column] = noise[5] - noise[column] + 0.05
    token = check(leaf, jnp.asarray(logits), PLAIN, temperature=jnp.ones(1), key_data=key_data, counter_row=row)[0]
    assert token == column


@pytest.mark.parametrize("banned", [2047, 2048])
def test_a_ban_at_the_edge_of_a_chunk(leaf, banned):
    logits = normal(3, 1, 2100).at[0, banned].set(20)
    check(leaf, logits, PLAIN, banned=jnp.array([banned], jnp.int32))


def test_one_logit_far_above_those_before_it(leaf):
    check(leaf, jnp.zeros((1, 1003)).at[0, 300].set(200), PLAIN)


def test_banning_every_token_leaves_no_distribution(leaf):
    check(leaf, normal(7, 2, 3), PLAIN, banned=jnp.arange(3, dtype=jnp.int32))


def test_inactive_rows(leaf):
    logits = jnp.full((2, 100), jnp.nan).at[1].set(normal(9, 100))
    token, sure, entropy, logsumexp = check(leaf, logits, PLAIN, active=jnp.array([False, True]))
    assert (token[0], sure[0], entropy[0], logsumexp[0]) == (-1, -np.inf, np.inf, -np.inf)


@pytest.mark.leave_out(when=lambda leaf, interpreted, **_: leaf == "triton" and interpreted)  # a minute; tests/triton has it small
def test_rows_do_not_depend_on_the_batch(leaf):
    if leaf.package == "xla":
        pytest.skip("XLA chooses its own reductions' order")
    logits, draws = normal(11, 7, 40000), sampling(7)
    static, temperature = PLAIN | dict(confidence="neg_entropy"), jnp.linspace(0, 1.5, 7)
    together = check(leaf, logits, static, temperature=temperature, **draws)
    for row in range(7):
        part = slice(row, row + 1)
        one = {name: array[part] for name, array in draws.items()}
        alone = check(leaf, logits[part], static, temperature=temperature[part], **one)
        for a, b in zip(alone, together, strict=True):
            np.testing.assert_array_equal(a[0], b[row])


RULES = ["num_unmask", "threshold", "factor", "entropy_budget"]


@pytest.mark.parametrize("rules", [(), *((rule,) for rule in RULES), tuple(RULES[:3]), tuple(RULES)], ids="-".join)
@pytest.mark.parametrize("length", [1, 37, 300])
@pytest.mark.parametrize("edits", [False, True])
def test_unmask_topk(leaf, rules, length, edits):
    keys, b = jax.random.split(jax.random.key(length), 5), 5
    # One decimal: full of ties.
    sure = jnp.round(jax.random.uniform(keys[0], (b, length)), 1).at[1, length // 2].set(jnp.nan).at[2].set(-jnp.inf)
    # Multiples of 1/64: sums are exact in any order, and some meet the budget exactly.
    entropy = jnp.round(jax.random.uniform(keys[1], (b, length)) * 64) / 64
    eligible = jax.random.bernoulli(keys[2], 0.6, (b, length)).at[3].set(False)
    # A block of a canvas, at its beginning and at its end.
    eligible = eligible.at[1, 2 * length // 3 :].set(False).at[4, : 2 * length // 3].set(False)
    proposal = jax.random.randint(keys[3], (b, length), 1, 50)
    tokens = jax.random.randint(keys[4], (b, length), 1, 50)
    values = dict(
        num_unmask=jnp.array([0, 1, 5, 9, 999], jnp.int32),
        threshold=jnp.array([0.5, 0.9, 0.9, 0.1, 0.75]),
        factor=jnp.array([0.5, 1, 2, 2, 0.25]),
        entropy_budget=jnp.array([0, 0.125, 1.75, 1, 1000]),
    )
    chosen = [values[rule] if rule in rules else None for rule in RULES]
    editable, edit_threshold = (~eligible, jnp.array([0.5, 0.55, 0.25, 0.5, 0.75])) if edits else (None, None)
    arrays = tokens, proposal, sure, entropy if "entropy_budget" in rules else None, eligible, editable, *chosen, edit_threshold
    got = leaf("unmask", "unmask_topk")(*arrays)
    expected = reference.unmask_topk(*(None if x is None else np.asarray(x) for x in arrays))
    for result, wanted in zip(got, expected, strict=True):
        np.testing.assert_array_equal(result, wanted)


@pytest.mark.parametrize("rule", ["threshold", "factor", "entropy_budget"])
def test_a_rule_that_is_nan_commits_one(leaf, rule):
    places = jnp.array([[0.2, 0.9, 0.4]])
    rules = [jnp.array([jnp.nan]) if name == rule else None for name in RULES]
    entropy = 1 - places if rule == "entropy_budget" else None
    arrays = jnp.zeros((1, 3), jnp.int32), jnp.ones((1, 3), jnp.int32), places, entropy, places > 0, None, *rules, None
    np.testing.assert_array_equal(leaf("unmask", "unmask_topk")(*arrays)[1], [[False, True, False]])


def test_an_infinite_factor_commits_all(leaf):
    """Those whose confidence is NaN too, which counts as -inf."""
    sure, ones = jnp.array([[0.2, jnp.nan, -jnp.inf]]), jnp.ones((1, 3), jnp.int32)
    arrays = 0 * ones, ones, sure, None, ones != 0, None, None, None, jnp.array([jnp.inf]), None, None
    np.testing.assert_array_equal(leaf("unmask", "unmask_topk")(*arrays)[1], [[True, True, True]])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("v", [1, 33, 5003])
def test_guidance(leaf, v, dtype):
    streams = np.array(normal(12, 3, 6, v, dtype=dtype))
    streams[0, 1, 0] = streams[1, 2, v // 2] = streams[2, :, v - 1] = -np.inf
    streams[0, 4, v // 2], streams[1, 4, v // 2] = -np.inf, np.nan  # banned all the same
    scale = np.array([0, 1, 2.5, -0.5, 1.5, 3], np.float32)
    weights = np.array(jax.random.normal(jax.random.key(3), (3, 6)))
    weights[0, 1] = weights[2, :4] = 0
    # One rounding to the dtype; float32 sums of up to 3 terms that may cancel.
    relative = {"float32": 2**-23, "bfloat16": 2**-8, "float16": 2**-10}[dtype]
    for got, expected in [
        (leaf("guidance", "mix_guidance")(streams[0], streams[1], scale), guidance.mix_guidance(*streams[:2], scale)),
        (leaf("guidance", "combine_guidance")(streams, weights), guidance.combine_guidance(streams, weights)),
    ]:
        assert got[0].dtype == streams.dtype
        np.testing.assert_allclose(np.asarray(got[0], np.float64), expected, rtol=relative, atol=2e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_numbers_of_16_bits_come_in_and_out_as_ieee_has_it(leaf, dtype):
    """All there are, and the special ones once more behind the last whole vector; at weights that make ties and overflows."""
    special = {
        "bfloat16": [0x7FC0, 0xFFFF, 0x7F80, 0xFF80, 0x7F7F, 0x8000],
        "float16": [0x7E00, 0xFFFF, 0x7C00, 0xFC00, 0x7BFF, 0x8000, 1, 0x3FF, 0x83FF],
    }[dtype]
    numbers = np.concatenate([np.arange(2**16), special]).astype(np.uint16).view(jnp.dtype(dtype))
    weights = np.array([[1, 1.5, 0.5]], np.float32)
    got = leaf("guidance", "combine_guidance")(np.tile(numbers, (1, 3, 1)), weights)[0]
    with np.errstate(all="ignore"):
        expected = (numbers.astype(np.float32) * weights.T).astype(numbers.dtype)
    # What float32 has no normal number for may be zero: of bfloat16 alone.
    np.testing.assert_allclose(got.astype(np.float64), expected.astype(np.float64), rtol=0, atol=2**-125)
