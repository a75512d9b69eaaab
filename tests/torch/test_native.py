"""What runs on CUDA tensors, here on CPU tensors in Triton's interpreter, gives what the JAX operations give, gradients too.

`make test-gpu` runs it on CUDA tensors. The kernels are tested elsewhere; these tests are of what lies between torch and them:
layouts, masks, scalars, keys, autograd.
"""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dlm_kernels
from dlm_kernels import masks

DEVICE = "cpu" if os.environ.setdefault("TRITON_INTERPRET", "1") == "1" else "cuda"
torch = pytest.importorskip("torch", reason="the torch extra is not installed")

B, L, V, D = 2, 5, 40, 16


@pytest.fixture
def native():
    from dlm_kernels.torch import native

    with torch.device(DEVICE):
        yield native


def draw(seed, *shape):
    return np.array(jax.random.normal(jax.random.key(seed), shape))


def same(got, expected):
    for mine, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(mine.detach().cpu().numpy(), other, rtol=2e-5, atol=2e-6)


def test_attention_and_its_gradients_with_overlapping_intervals(native):
    arrays = [draw(0, B, 4, L, 16), draw(1, B, 2, 9, 16), draw(2, B, 2, 9, 16)]
    ends = np.random.default_rng(0).integers(-2, 12, (4, B, L))
    ends[:, 0, 0] = 0  # sees nothing
    expected, back = jax.vjp(
        lambda *x: dlm_kernels.attention(
            *(y.swapaxes(1, 2) for y in x), mask=masks.KeyIntervals(*jnp.asarray(ends)), return_lse=True, implementation="xla"
        ),
        *map(jnp.asarray, arrays),
    )
    tensors = [torch.tensor(x, requires_grad=True) for x in arrays]
    mask = masks.KeyIntervals(*torch.tensor(ends))
    out, lse = native.attention(*(x.transpose(1, 2) for x in tensors), mask=mask, return_lse=True)
    same((out, lse), expected)
    cotangent = draw(3, *out.shape), np.where(np.isneginf(expected[1]), 0, draw(4, *lse.shape))
    torch.autograd.backward((out, lse), tuple(map(torch.tensor, cotangent)))
    same([x.grad for x in tensors], back(tuple(map(jnp.asarray, cotangent))))


def test_the_loss_and_its_gradients(native):
    arrays = [draw(0, B, L, D), draw(1, V, D), np.array([[0, 1, 2, 0, 1], [0.5] * 5], np.float32)]
    targets = np.random.default_rng(0).integers(0, V, (B, L))

    def loss(hidden, weight, weights):
        return dlm_kernels.masked_cross_entropy(
            hidden, weight, jnp.asarray(targets), weights, logits_soft_cap=9, implementation="xla"
        )

    expected, gradients = jax.value_and_grad(loss, (0, 1, 2))(*map(jnp.asarray, arrays))
    hidden, weight, weights = (torch.tensor(x, requires_grad=True) for x in arrays)
    got = native.masked_cross_entropy(hidden, weight, torch.tensor(targets), weights, logits_soft_cap=9)
    got.backward()
    same([got, hidden.grad, weight.grad, weights.grad], [expected, *gradients])


@pytest.mark.parametrize("keys", ["one", "per row"])
def test_scores_at_a_temperature_with_guidance(native, keys):
    key = jax.random.key(5) if keys == "one" else jax.random.split(jax.random.key(5), B)
    logits, unconditional = draw(0, B, L, V), draw(1, B, L, V)
    active = np.arange(B * L).reshape(B, L) % 3 != 1
    options = dict(guidance_scale=1.5, temperature=0.7, key=key, confidence="margin")
    got = native.score_tokens(
        torch.tensor(logits), unconditional=torch.tensor(unconditional), active=torch.tensor(active),
        banned_tokens=torch.tensor([3, 99]), **options,
    )  # fmt: skip
    expected = dlm_kernels.score_tokens(
        jnp.asarray(logits), unconditional=jnp.asarray(unconditional), active=jnp.asarray(active),
        banned_tokens=jnp.array([3, 99]), **options, implementation="xla",
    )  # fmt: skip
    same(got, expected)


def test_the_head_with_guidance_and_random_confidence(native):
    hidden, other, weight = draw(0, B, L, D), draw(1, B, L, D), draw(2, V, D)
    options = dict(guidance_scale=2.0, confidence="random", key=jax.random.key(1))
    got = native.lm_head_scores(torch.tensor(hidden), torch.tensor(weight), unconditional_hidden=torch.tensor(other), **options)
    expected = dlm_kernels.lm_head_scores(
        jnp.asarray(hidden), jnp.asarray(weight), unconditional_hidden=jnp.asarray(other), **options, implementation="xla"
    )
    same(got, expected)


def test_a_step_on_a_block_with_edits(native):
    logits = draw(0, B, L, V)
    tokens = np.array([[39, 39, 7, 39, 3], [39, 1, 39, 39, 39]])
    options = dict(mask_id=39, num_unmask=[1, 2], candidates=(0, 4), edit_threshold=0.01)
    got = native.unmask_step(torch.tensor(logits), torch.tensor(tokens), **options)
    options["num_unmask"] = jnp.array([1, 2])
    expected = dlm_kernels.unmask_step(jnp.asarray(logits), jnp.asarray(tokens), **options, implementation="xla")
    same(got, expected)


def test_streams_with_a_weight_per_row(native):
    logits, weights = draw(0, 3, B, L, V), draw(1, 3, B)
    got = native.combine_guidance(torch.tensor(logits), torch.tensor(weights))
    same([got], [dlm_kernels.combine_guidance(jnp.asarray(logits), jnp.asarray(weights), implementation="xla")])


def test_bad_arguments_are_told_as_jax_tells_them(native):
    query = torch.zeros(1, 3, 4, 16)
    with pytest.raises(ValueError, match="key: expected a number of heads that divides"):
        native.attention(query, query[:, :, :3], query[:, :, :3])
    with pytest.raises(ValueError, match="implementation: expected 'triton' or None"):
        native.attention(query, query, query, implementation="cpu")
    with pytest.raises(ValueError, match="key intervals only"):
        native.attention(query, query, query, mask=torch.ones(3, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="requires_grad"):
        native.mix_guidance(query[0].requires_grad_(), query[0], 1.0)
