"""Token scores and unmasking in Triton's interpreter, beyond what tests/leaves asks of every implementation.

The interpreter runs a program at a time, so the grid is small; the vocabulary of 8500 crosses one span's edge (8192), the other
fits within one. float16 stands for the half types: the interpreter's bfloat16 is wrong.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from triton.runtime import interpreter

from dlm_kernels import score_tokens
from dlm_kernels.reference import threefry
from dlm_kernels.reference import unmask as reference
from dlm_kernels.triton_kernels import unmask as kernels
from dlm_kernels.xla import unmask as plain

R = 5


def scored(module, logits, *, unconditional=None, scale=None, temperature=None, noise=None, active=None, banned=None,
           counters=True, confidence="probability", tempered=False, cap=None):  # fmt: skip
    keys = None
    rows = None
    if temperature is not None and counters:
        keys = np.asarray(jax.random.key_data(jax.random.split(jax.random.key(7), logits.shape[0])))
        # A row this far into the draw passes 2**32 elements.
        rows = np.array([0, 1, 900_000, 3, 4], np.int32)
    return [
        np.asarray(x)
        for x in module.score_tokens(
            logits, unconditional, scale, temperature, keys, rows, noise, active, banned,
            confidence=confidence, tempered_confidence=tempered, logits_soft_cap=cap,
        )
    ]  # fmt: skip


def logits_of(seed, v, dtype):
    return np.array(4 * jax.random.normal(jax.random.key(seed), (R, v), jnp.float32).astype(dtype))


def assert_same(got, expected):
    np.testing.assert_array_equal(got[0], expected[0])
    for mine, other in zip(got[1:], expected[1:]):
        np.testing.assert_allclose(mine, other, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("tempered", [False, True])
@pytest.mark.parametrize("v", [37, 8500])
def test_everything_at_once(tempered, v):
    options = dict(
        unconditional=logits_of(1, v, "float32"), scale=np.array([0, 1, 2.5, 0.5, -1], np.float32), cap=20.0,
        temperature=np.array([0, 0.7, 1.5, 0.2, 1], np.float32), active=np.array([1, 1, 1, 0, 1], bool),
        banned=np.array([3, v + 5, -1, v - 1], np.int32), tempered=tempered,
    )  # fmt: skip
    logits = logits_of(2, v, "float32")
    assert_same(scored(kernels, logits, **options), scored(plain, logits, **options))


def test_noise_from_outside():
    logits = logits_of(3, 8300, "float32")
    noise = np.array(jax.random.gumbel(jax.random.key(4), logits.shape)) * 30  # beyond any bound of a true draw
    noise[::2, 8250] = 500  # which wins for a span that does not have the greatest logit
    options = dict(temperature=np.full(R, 0.9, np.float32), noise=noise, counters=False)
    assert_same(scored(kernels, logits, **options), scored(plain, logits, **options))


def test_samples_are_jax_own():
    """Through the public operation, from a key, under jit."""
    logits = jax.random.normal(jax.random.key(5), (2, 3, 8200))
    key = jax.random.key(6)
    drawn = jnp.argmax(logits / 0.8 + jax.random.gumbel(key, logits.shape), axis=-1)
    scores = jax.jit(lambda x: score_tokens(x, temperature=0.8, key=key, implementation="triton"))(logits)
    np.testing.assert_array_equal(scores.token, drawn)


def test_a_draw_far_below_the_first_of_another_span_is_found():
    """Rows of a draw in which a token wins that trails by 6, after the temperature, as one in fifty does."""
    v = 8200
    logits = np.full((R, v), -np.inf, np.float32)
    logits[:, 0], logits[:, 8192:] = 0, -24
    key = np.asarray(jax.random.key_data(jax.random.key(1)))
    rows = np.arange(1000, dtype=np.int32)
    drawn = np.argmax(logits[0] / 4 + threefry.gumbel(np.tile(key, (1000, 1)), rows, v), axis=1)
    rows = rows[drawn >= 8192][:R]
    assert len(rows) == R
    token = kernels.score_tokens(
        logits, None, None, np.full(R, 4, np.float32), np.tile(key, (R, 1)), rows, None, None, None,
        confidence="probability", tempered_confidence=False, logits_soft_cap=None,
    )[0]  # fmt: skip
    np.testing.assert_array_equal(token, drawn[rows])


def test_a_cap_far_above_the_logits_keeps_their_digits():
    logits = logits_of(9, 37, "float32")
    for mine, other in zip(scored(kernels, logits, cap=1e4), scored(plain, logits, cap=1e4)):
        np.testing.assert_allclose(mine, other, rtol=2e-6)


def test_a_spoilt_row_says_so_and_spoils_no_other():
    logits = logits_of(8, 8300, "float32")
    clean = scored(kernels, logits)
    for row, (value, where) in enumerate([(np.nan, 8250), (np.inf, 3), (-np.inf, slice(None))]):
        logits[row, where] = value
    token, confidence, entropy, _ = scored(kernels, logits)
    assert np.isnan(confidence[:3]).all() and np.isnan(entropy[:3]).all()
    assert ((0 <= token) & (token < 8300)).all()
    np.testing.assert_array_equal(confidence[3:], clean[1][3:])


def test_ties_go_to_the_lowest_id():
    logits = np.zeros((R, 8398), np.float32)
    logits[:, [8391, 8200, 50]] = 3
    token, margin, _, _ = scored(kernels, logits, confidence="margin")
    assert (token == 50).all() and (margin == 0).all()
    logits[:, [8391, 8200]] = 0
    logits[:, 60] = 3  # two of one span
    logits[1, [50, 51, 60]] = 0, 3, 3
    logits[2, [49, 51]] = 3  # several of one group that is read again
    logits[3:, 8397] = 4  # the last of all, in a group that the vocabulary does not fill
    token, margin, _, _ = scored(kernels, logits, confidence="margin")
    np.testing.assert_array_equal(token, [50, 51, 49, 8397, 8397])
    assert (margin[:3] == 0).all() and (margin[3:] > 0).all()


def test_every_operand_is_read_by_its_own_strides():
    logits, unconditional, noise = (logits_of(seed, 50, "float32") for seed in (1, 2, 3))
    options = dict(scale=np.full(R, 1.5, np.float32), temperature=np.ones(R, np.float32), counters=False)
    wide = np.zeros((R, 120), np.float32)[:, ::2][:, :50]
    wide[...] = unconditional
    got = scored(kernels, np.asfortranarray(logits), unconditional=wide, noise=noise[:, ::-1].copy()[:, ::-1], **options)
    for mine, other in zip(got, scored(kernels, logits, unconditional=unconditional, noise=noise, **options)):
        np.testing.assert_array_equal(mine, other)


@pytest.mark.parametrize("ulps", [-2, -1, 0, 1, 2])
def test_a_confidence_on_the_bound_of_a_factor_where_quotients_are_rough(monkeypatch, ulps):
    """As a GPU's are. In each row one confidence is on its rank's bound, or is the number below; those before it are 1."""
    exact = interpreter.InterpreterBuilder.create_fdiv

    def rough(self, a, b):
        made = exact(self, a, b)
        made.data = made.data + (ulps * np.spacing(made.data)).astype(made.data.dtype)
        return made

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fdiv", rough)
    factor = np.random.default_rng(0).uniform(0.2, 0.9, 40).astype(np.float32)
    rank, position = np.arange(40)[:, None] % 8 + 1, np.arange(10)
    bound, ones = 1 - factor[:, None] / (rank + 2).astype(np.float32), np.ones((40, 10), np.int32)
    for sure, most in ((bound, rank), (np.nextafter(bound, np.float32(0)), rank - 1)):
        confidence = np.where(position < rank, 1, np.where(position == rank, sure, 0)).astype(np.float32)
        made = kernels.unmask_topk(0 * ones, ones, confidence, None, ones != 0, None, None, None, factor, None, None)
        np.testing.assert_array_equal(made[0], position <= most)


@pytest.mark.parametrize("rule", ["num_unmask", "threshold", "factor", "entropy_budget"])
@pytest.mark.parametrize("length", [1, 21])
def test_ranks_among_ties_and_nans(rule, length):
    """Confidences and entropies of few values, NaN and infinity among them, and bounds that some of them equal."""
    rng = np.random.default_rng(length)
    b, shape = 24, (24, length)
    tokens, proposal = np.zeros(shape, np.int32), np.arange(1, length + 1, dtype=np.int32) + np.zeros((b, 1), np.int32)
    confidence = rng.choice(np.array([0.25, 0.5, 1, np.nan, np.nan, -np.inf, -np.inf], np.float32), shape)
    entropy = rng.choice(np.array([0, 0.25, 1, np.nan, np.inf], np.float32), shape)
    eligible = rng.random(shape) < np.linspace(0, 1, b)[:, None]
    bounds = dict(num_unmask=[0, 1, 3, 99], threshold=[0.25, 0.5, 1, 2], factor=[0, 0.5, 1, 4], entropy_budget=[0, 0.25, 2, 9])
    rules = dict.fromkeys(bounds)
    rules[rule] = np.resize(bounds[rule], b).astype(np.int32 if rule == "num_unmask" else np.float32)
    edit = np.full(b, 0.5, np.float32)
    arguments = (tokens, proposal, confidence, entropy, eligible, ~eligible, *rules.values(), edit)
    for mine, other in zip(kernels.unmask_topk(*arguments), reference.unmask_topk(*arguments)):
        np.testing.assert_array_equal(mine, other)
