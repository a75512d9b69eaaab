"""`explain` tells of every kernel call of a function, once."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dlm_kernels as dlm

QUERY = jnp.ones((2, 4, 2, 32))
HIDDEN, WEIGHT = jnp.ones((2, 3, 8)), jnp.ones((7, 8))


def attend(query):
    return dlm.attention(query, query, query)


def kernels(function, *args, **kwargs):
    return [choice.kernel for choice in dlm.explain(function, *args, **kwargs)]


def test_what_was_traced_before_is_explained_again():
    function = jax.jit(attend)
    function(QUERY)
    for _ in range(2):
        assert kernels(function, QUERY) == ["attention_forward"]


def test_a_call_under_vmap_is_one_call():
    mapped = jax.vmap(attend)
    assert kernels(mapped, QUERY[None]) == kernels(jax.jit(mapped), QUERY[None]) == ["attention_forward"]
    assert kernels(jax.vmap(mapped), QUERY[None, None]) == ["attention_forward"]


def test_a_name_is_no_operation():
    with pytest.raises(ValueError, match="explain: expected an operation itself, .* got 'attention'"):
        dlm.explain("attention", QUERY, QUERY, QUERY)


def test_calls_in_their_order():
    loss = jax.grad(lambda query: attend(attend(query)).sum())
    assert kernels(loss, QUERY) == ["attention_forward"] * 2 + ["attention_backward"] * 2
    tokens, logits = jnp.zeros((2, 3), jnp.int32), jax.ShapeDtypeStruct((2, 3, 7), jnp.float32)
    assert kernels(dlm.unmask_step, logits, tokens, mask_id=0, num_unmask=1) == ["score_tokens", "unmask_topk"]


@pytest.mark.parametrize("number", [np.float32, np.float64, jnp.float32])
def test_numbers_that_are_arrays_stay_numbers(number):
    assert kernels(dlm.attention, QUERY, QUERY, QUERY, scale=number(0.5), logits_soft_cap=number(9)) == ["attention_forward"]


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16, "float16"])
def test_a_dtype_is_no_array(dtype):
    assert kernels(dlm.lm_head_scores, HIDDEN, WEIGHT, logits_dtype=dtype) == ["lm_head_scores"]


def test_it_prints_what_is_taken_and_why_not_the_others():
    text = str(dlm.explain(dlm.attention, QUERY, QUERY, QUERY, mask=jnp.ones((4, 4), bool)))
    assert text.startswith("[attention_forward: xla on default\n  not cpu: it takes masks as key intervals")


def test_the_first_call_is_traced_once():
    """In a process of its own: what the kernels import then must not change how JAX keys what it has traced."""
    code = """
import jax, dlm_kernels
traces = []
def attend(query):
    traces.append(query)
    return dlm_kernels.attention(query, query, query)
attend = jax.jit(attend)
for _ in range(2):
    attend(jax.numpy.ones((1, 2, 1, 8)))
print(len(traces))
"""
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "1\n"
