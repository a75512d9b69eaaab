"""A step that merges and ranks in one launch gives the bits of its two halves, in Triton's interpreter.

Spans are short, for they take the time; the vocabulary has two, and a row's positions are merged in several tiles.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dlm_kernels as dlm
from dlm_kernels.triton_kernels import launch, ranks, unmask

B, L, V, MASK = 3, 9, 401, 400
RULES = "num_unmask", "threshold", "factor", "entropy_budget", "edit_threshold", "candidates"
DRAWN = dict(temperature=jnp.array([0, 0.7, 1.5]), key=jax.random.key(3))
CASES = {
    "by number": dict(num_unmask=jnp.array([2, 30, 0])),
    "by threshold, of a block": dict(threshold=0.05, num_unmask=1, candidates=(jnp.array([0, 3, 7]), 8), confidence="margin"),
    "by factor, without the best token": dict(factor=jnp.array([0.5, 1, 40]), banned_tokens=[7], logits_soft_cap=20.0),
    "by entropy": dict(entropy_budget=jnp.array([2, 9, 30]), confidence="neg_entropy", **DRAWN, tempered_confidence=True),
    "edits beyond the masks": dict(num_unmask=2, edit_threshold=0.01, candidates=(jnp.array([1, 0, 3]), 8)),
    "guided": dict(num_unmask=3, threshold=0.1, confidence="margin", guidance_scale=jnp.array([1.5, 0, 2]), **DRAWN),
    "random": dict(num_unmask=3, confidence="random", key=jax.random.key(3)),
}


def drawn(seed, *shape):
    return np.array(4 * jax.random.normal(jax.random.key(seed), shape))


def inputs():
    """Logits with rows of NaN, +inf and nothing but -inf, and ties; tokens of which the last row has no mask."""
    logits = drawn(1, B, L, V)
    logits[0, 1, 5], logits[0, 2, 390], logits[1, 3] = np.nan, np.inf, -np.inf
    logits[:, 5:9] = logits[:, 5:6]
    logits[0, 7, :] = np.nan  # not active
    tokens = np.where(np.random.default_rng(0).random((B, L)) < 0.7, MASK, 7)
    tokens[0], tokens[0, 7], tokens[2] = MASK, 3, 4
    return logits, tokens


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(unmask, "_SPAN", 256)
    monkeypatch.setattr(ranks, "_MERGED", 8)
    monkeypatch.setattr(ranks, "_MOST_MERGED", 32)


@pytest.fixture
def launched(monkeypatch):
    """The names of the kernels that were launched, in their order."""
    names = []
    for name in ("_interpret", "_launch_torch"):
        original = getattr(launch, name)

        def record(call, *values, original=original):
            names.append(call.kernel.__name__)
            return original(call, *values)

        monkeypatch.setattr(launch, name, record)
    return names


def halves(logits, tokens, **options):
    rules = {name: options.pop(name) for name in RULES if name in options}
    inside, stop = np.ones(tokens.shape, bool), np.arange(tokens.shape[1])
    if "candidates" in rules:
        inside = (np.asarray(rules["candidates"][0])[:, None] <= stop) & (stop < rules["candidates"][1])
    active = inside if "edit_threshold" in rules else inside & (tokens == MASK)
    scores = dlm.score_tokens(logits, active=active, implementation="triton", **options)
    return dlm.unmask_topk(tokens, scores, mask_id=MASK, implementation="triton", **rules)


def same(got, expected):
    for mine, other in zip(got, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(mine), np.asarray(other))


@pytest.mark.parametrize("name", CASES)
def test_a_step_has_the_bits_of_its_halves(name, launched):
    (logits, tokens), options = inputs(), CASES[name]
    if "guidance_scale" in options:
        options = options | dict(unconditional=drawn(2, B, L, V))
    got = dlm.unmask_step(logits, tokens, mask_id=MASK, implementation="triton", **options)
    jax.block_until_ready(got)
    draws = ["_draw_kernel"] if "temperature" in options else []
    merges = ["_merge_kernel"] if name == "random" else []
    assert launched == ["_score_kernel", *draws, *merges, "_topk_kernel"]
    expected = halves(logits, tokens, **options)
    same(got, expected)
    assert expected.unmasked.any() and not expected.unmasked[tokens != MASK].any()
    assert ((expected.tokens != tokens) & ~expected.unmasked).any() == ("edit_threshold" in options)


def test_a_step_on_tensors(launched):
    torch = pytest.importorskip("torch", reason="the torch extra is not installed")
    from dlm_kernels.torch import native

    logits, tokens = inputs()
    options = dict(num_unmask=4, threshold=0.05, candidates=(2, 8))
    tensors = torch.tensor(logits), torch.tensor(tokens)
    expected = jax.block_until_ready(halves(logits, tokens, **options | dict(candidates=(np.full(B, 2), 8))))
    launched.clear()
    got = native.unmask_step(*tensors, mask_id=MASK, **options)
    assert launched == ["_score_kernel", "_topk_kernel"]
    same(got, expected)
    noise = torch.tensor(drawn(4, B, L, V))
    launched.clear()
    native.unmask_step(*tensors, mask_id=MASK, **options, temperature=0.5, noise=noise)
    assert launched == ["_score_kernel", "_draw_kernel", "_topk_kernel"]


def test_more_than_one_program_merges_has_a_launch_of_its_own(launched, monkeypatch):
    logits, tokens = inputs()
    step = functools.partial(dlm.unmask_step, mask_id=MASK, num_unmask=3)
    of_parts = dict(score_tokens="unmask_step", unmask_topk="unmask_step")
    assert {c.kernel: c.within.get("cuda") for c in dlm.explain(step, logits, tokens)} == of_parts
    expected = jax.block_until_ready(step(logits, tokens, implementation="triton"))
    monkeypatch.setattr(ranks, "_MOST_MERGED", 31)
    jax.clear_caches()
    launched.clear()
    assert not any(c.within for c in dlm.explain(step, logits, tokens))
    same(step(logits, tokens, implementation="triton"), expected)
    assert launched == ["_score_kernel", "_merge_kernel", "_topk_kernel"]


def test_a_step_under_vmap_is_one_step(launched):
    logits, tokens = inputs()
    step = functools.partial(dlm.unmask_step, mask_id=MASK, implementation="triton")
    got = jax.vmap(lambda x, t, n: step(x[None], t[None], num_unmask=n))(logits, tokens, jnp.arange(3))
    jax.block_until_ready(got)
    assert launched == ["_score_kernel", "_topk_kernel"]
    same([x[:, 0] for x in got], step(logits, tokens, num_unmask=jnp.arange(3)))
