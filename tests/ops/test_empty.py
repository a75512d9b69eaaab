"""Arrays with no rows, no batch, no queries or no keys, and vocabularies of one token and of 262144."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dlm_kernels as dlm
from dlm_kernels import masks

implementations = pytest.mark.parametrize("implementation", ["cpu", "xla", None])
# (batch, length): no rows of a batch, no batch, neither.
EMPTY = [(2, 0), (0, 3), (0, 0)]


@implementations
@pytest.mark.parametrize("b, t, s", [(0, 3, 5), (2, 0, 5), (2, 3, 0), (0, 0, 0)])
def test_attention(implementation, b, t, s):
    query, key = jnp.ones((b, t, 4, 8)), jnp.ones((b, s, 2, 8))

    def run(query, key, value):
        mask = masks.block_causal(t, 2, key_length=s)
        return dlm.attention(query, key, value, mask=mask, return_lse=True, implementation=implementation)

    out, lse = jax.jit(run)(query, key, key)
    assert out.shape == query.shape and (out == 0).all()
    assert lse.shape == (b, 4, t) and (lse == -jnp.inf).all()
    gradients = jax.grad(lambda *arrays: run(*arrays)[0].sum(), (0, 1, 2))(query, key, key)
    for gradient, array in zip(gradients, (query, key, key), strict=True):
        assert gradient.shape == array.shape and (gradient == 0).all()


@implementations
def test_attention_of_no_heads(implementation):
    query, key = jnp.ones((2, 3, 0, 8)), jnp.ones((2, 5, 2, 8))
    assert dlm.attention(query, key, key, implementation=implementation).shape == query.shape


@implementations
@pytest.mark.parametrize("b, length", EMPTY)
def test_scores_and_unmasking(implementation, b, length):
    logits, tokens, hidden = jnp.ones((b, length, 7)), jnp.zeros((b, length), jnp.int32), jnp.ones((b, length, 8))
    sampling = dict(temperature=0.5, key=jax.random.key(0), confidence="random", implementation=implementation)
    scores = dlm.score_tokens(logits, active=tokens == 0, **sampling)
    for found in (scores, dlm.lm_head_scores(hidden, jnp.ones((7, 8)), active=tokens == 0, **sampling)):
        assert [x.shape for x in found] == [(b, length)] * 4
    step = dlm.unmask_step(logits, tokens, mask_id=0, num_unmask=1, implementation=implementation)
    for found in (step, dlm.unmask_topk(tokens, scores, mask_id=0, threshold=0.5, implementation=implementation)):
        assert found.tokens.shape == found.unmasked.shape == (b, length)
        np.testing.assert_array_equal(found.count, np.zeros(b, np.int32))


@implementations
@pytest.mark.parametrize("b, length", EMPTY)
def test_guidance_truncation_loss_and_soft_embedding(implementation, b, length):
    logits, targets, weight = jnp.ones((b, length, 7)), jnp.zeros((b, length), jnp.int32), jnp.ones((9, 7))
    assert dlm.mix_guidance(logits, logits, jnp.ones((b, length)), implementation=implementation).shape == logits.shape
    assert dlm.combine_guidance(jnp.stack([logits] * 2), jnp.ones(2), implementation=implementation).shape == logits.shape
    assert dlm.truncate_logits(logits, top_p=0.5, top_k=3, implementation=implementation).shape == logits.shape
    assert dlm.soft_embedding(logits, weight, implementation=implementation).shape == logits.shape

    def mixed(x, chosen=2):
        expert, matrices = jnp.zeros((b, length, chosen), jnp.int32), (jnp.ones((3, *shape)) for shape in ((7, 5), (7, 5), (5, 7)))
        return dlm.mix_experts(x, *matrices, expert, expert, implementation=implementation)

    assert dlm.matmul(logits, weight.T, implementation=implementation).shape == (b, length, 9)
    assert mixed(logits).shape == jax.grad(lambda x: mixed(x).sum())(logits).shape == logits.shape

    def loss(hidden, weight, reduction="sum"):
        ones = jnp.ones((b, length))
        return dlm.masked_cross_entropy(hidden, weight, targets, ones, reduction=reduction, implementation=implementation)

    assert loss(logits, weight) == 0 and loss(logits, weight, "none").shape == (b, length)
    assert (jax.grad(loss, 1)(logits, weight) == 0).all()

    def divergence(hidden, weight, reduction="sum"):
        ones = jnp.ones((b, length))
        return dlm.masked_divergence(hidden, weight, logits, weight, ones, reduction=reduction, implementation=implementation)

    assert divergence(logits, weight) == 0 and divergence(logits, weight, "none").shape == (b, length)
    assert (jax.grad(divergence, 1)(logits, weight) == 0).all()


@implementations
def test_a_product_over_nothing(implementation):
    for x, weight in ((jnp.ones((3, 0)), jnp.ones((0, 5))), (jnp.ones((3, 5)), jnp.ones((5, 0)))):
        out = dlm.matmul(x, weight, implementation=implementation)
        np.testing.assert_array_equal(out, np.zeros((3, weight.shape[1])))


@implementations
def test_no_experts(implementation):
    x, none = jnp.ones((2, 3, 8)), jnp.ones((2, 3, 0))
    mixed = dlm.mix_experts(x, *(jnp.ones((4, 8, 8)),) * 3, none.astype(int), none, implementation=implementation)
    np.testing.assert_array_equal(mixed, jnp.zeros_like(x))


@implementations
def test_no_streams_and_no_active_rows(implementation):
    nothing = dlm.combine_guidance(jnp.ones((0, 2, 3, 7)), jnp.ones(0), implementation=implementation)
    np.testing.assert_array_equal(nothing, np.zeros((2, 3, 7)))
    scores = dlm.score_tokens(jnp.full((2, 3, 7), jnp.nan), active=jnp.zeros((2, 3), bool), implementation=implementation)
    np.testing.assert_array_equal(scores.token, np.full((2, 3), -1))
    hidden, weight = jnp.full((2, 3, 8), jnp.nan), jnp.ones((7, 8))

    def loss(hidden, weight):
        zeros = jnp.zeros((2, 3))
        return dlm.masked_cross_entropy(hidden, weight, zeros.astype(int) - 1, zeros, implementation=implementation)

    def divergence(hidden, weight):
        return dlm.masked_divergence(hidden, weight, hidden, weight, jnp.zeros((2, 3)), implementation=implementation)

    for function in (loss, divergence):
        value, gradients = jax.value_and_grad(function, (0, 1))(hidden, weight)
        assert value == 0 and all((gradient == 0).all() for gradient in gradients)


@implementations
@pytest.mark.parametrize("v", [1, 262144])
def test_smallest_and_largest_vocabulary(implementation, v):
    rng = np.random.default_rng(v)
    hidden, weight = rng.standard_normal((1, 2, 8)).astype("float32"), rng.standard_normal((v, 8)).astype("float32")
    logits = hidden.astype(float) @ weight.T.astype(float)
    total = np.log(np.exp(logits - logits.max()).sum(-1)) + logits.max()
    best = logits.argmax(-1)
    tokens = np.full((1, 2), 3, np.int32)
    for scores in (
        dlm.score_tokens(jnp.asarray(logits, jnp.float32), implementation=implementation),
        dlm.lm_head_scores(hidden, weight, implementation=implementation),
        dlm.lm_head_scores(hidden, dlm.pack_lm_head(weight), implementation=implementation),
    ):
        np.testing.assert_array_equal(scores.token, best)
        np.testing.assert_allclose(scores.logsumexp, total, rtol=1e-6, atol=1e-6)
        done = dlm.unmask_topk(tokens, scores, mask_id=3, num_unmask=2, implementation=implementation)
        np.testing.assert_array_equal(done.tokens, best)
    loss = dlm.masked_cross_entropy(hidden, weight, best, np.ones((1, 2)), reduction="none", implementation=implementation)
    np.testing.assert_allclose(loss, total - logits.max(-1), rtol=1e-5, atol=1e-5)
    even = dlm.masked_divergence(
        hidden, weight, hidden, 0 * weight, np.ones((1, 2)), reduction="none", implementation=implementation
    )
    np.testing.assert_allclose(even, total - logits.mean(-1) - np.log(v), rtol=1e-5, atol=1e-5)
    mixed = dlm.mix_guidance(jnp.asarray(logits, jnp.float32), jnp.zeros((1, 2, v)), 2.0, implementation=implementation)
    np.testing.assert_allclose(mixed, 2 * logits, rtol=1e-6, atol=1e-6)
    for limit in (dict(top_k=1), dict(top_p=1e-9)):
        best_alone = dlm.truncate_logits(mixed, **limit, implementation=implementation)
        np.testing.assert_array_equal(best_alone, np.where(np.arange(v) == best[..., None], mixed, -np.inf))


def test_an_unknown_implementation_is_refused():
    logits, tokens, hidden, weight = jnp.ones((2, 0, 7)), jnp.zeros((2, 0), jnp.int32), jnp.ones((2, 0, 8)), jnp.ones((7, 8))
    query, scores = jnp.ones((2, 0, 4, 8)), dlm.score_tokens(logits)
    for call in (
        lambda name: dlm.attention(query, query, query, implementation=name),
        lambda name: dlm.mix_guidance(logits, logits, 2.0, implementation=name),
        lambda name: dlm.combine_guidance(logits[None], jnp.ones(1), implementation=name),
        lambda name: dlm.truncate_logits(logits, implementation=name),
        lambda name: dlm.score_tokens(logits, implementation=name),
        lambda name: dlm.unmask_topk(tokens, scores, mask_id=0, num_unmask=1, implementation=name),
        lambda name: dlm.unmask_step(logits, tokens, mask_id=0, num_unmask=1, implementation=name),
        lambda name: dlm.lm_head_scores(hidden, weight, implementation=name),
        lambda name: dlm.masked_cross_entropy(hidden, weight, tokens, jnp.ones((2, 0)), implementation=name),
        lambda name: dlm.masked_divergence(hidden, weight, hidden, weight, jnp.ones((2, 0)), implementation=name),
        lambda name: dlm.soft_embedding(hidden, weight, implementation=name),
        lambda name: dlm.matmul(hidden, weight.T, implementation=name),
        lambda name: dlm.mix_experts(hidden, *(weight[None, :, :7],) * 3, *(tokens[..., None],) * 2, implementation=name),
    ):
        with pytest.raises(ValueError, match="implementation: expected one of"):
            call("cuda")
