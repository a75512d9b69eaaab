"""The operations on torch tensors give what they give on JAX arrays. Needs the `torch` extra."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dlm_kernels
from dlm_kernels import masks

torch = pytest.importorskip("torch", reason="the torch extra is not installed")
adapter = importlib.import_module("dlm_kernels.torch")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_on_a_transposed_tensor_with_a_mask(dtype):
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, n, 9, 16).to(dtype).transpose(1, 2) for n in (4, 2, 2))
    stop = torch.tensor([[3] * 9, [9] * 9])
    out = adapter.attention(query, key, value, mask=masks.KeyIntervals(torch.zeros_like(stop), stop))
    assert out.dtype == dtype
    arrays = [jnp.asarray(x.float().numpy()).astype(str(dtype).removeprefix("torch.")) for x in (query, key, value)]
    bounds = jnp.asarray(stop.numpy(), jnp.int32)
    expected = dlm_kernels.attention(*arrays, mask=masks.KeyIntervals(jnp.zeros_like(bounds), bounds))
    np.testing.assert_array_equal(out.float().numpy(), np.asarray(expected, np.float32))


def test_a_step_with_a_key():
    logits = torch.randn(2, 7, 31, generator=torch.Generator().manual_seed(1))
    tokens = torch.full((2, 7), 30)
    options = dict(mask_id=30, num_unmask=3, temperature=0.7, key=jax.random.key(3))
    got = adapter.unmask_step(logits, tokens, **options)
    expected = dlm_kernels.unmask_step(jnp.asarray(logits.numpy()), jnp.full((2, 7), 30), **options)
    assert got.unmasked.dtype == torch.bool
    for mine, other in zip(got, expected):
        np.testing.assert_array_equal(mine.numpy(), other)


def test_a_tensor_that_wants_a_gradient_is_refused():
    query = torch.randn(1, 2, 1, 8, requires_grad=True)
    with pytest.raises(ValueError, match="requires_grad"):
        adapter.attention(query, query, query)


def test_float64_is_refused_and_not_rounded_unasked():
    hidden, targets = torch.randn(1, 2, 8), torch.zeros(1, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match="weight: expected dtype float32, bfloat16 or float16, got float64"):
        adapter.lm_head_scores(hidden, torch.randn(9, 8).double())
    # Weights of a loss may be any numbers.
    weights = torch.ones(1, 2)
    mine, other = (adapter.masked_cross_entropy(hidden, hidden[0], targets, x) for x in (weights.double(), weights))
    assert mine.dtype == torch.float32 and mine == other


def test_torch_compile_breaks_its_graph_around_an_operation():
    def step(logits, tokens):
        return adapter.unmask_step(2 * logits, tokens, mask_id=30, num_unmask=3).tokens + 1

    logits, tokens = torch.randn(2, 7, 31), torch.full((2, 7), 30)
    np.testing.assert_array_equal(torch.compile(step, backend="eager")(logits, tokens), step(logits, tokens))
