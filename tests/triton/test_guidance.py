"""Guidance in Triton's interpreter; a vocabulary of 2100 crosses one block's edge, and some tokens are banned."""

import jax
import numpy as np
import pytest

from dlm_kernels.triton_kernels import guidance as kernels
from dlm_kernels.xla import guidance as plain

R, V = 4, 2100


def streams(count, dtype):
    logits = np.array(jax.random.normal(jax.random.key(0), (count, R, V)).astype(dtype))
    for c in range(count):
        logits[c, :, c * 7 : 2100 : 97] = -np.inf
    return logits


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_two_streams(dtype):
    c, u = streams(2, dtype)
    scale = np.array([0, 1, 3.5, -0.5], np.float32)
    got = kernels.mix_guidance(c, u, scale)
    assert got.dtype == c.dtype
    np.testing.assert_allclose(got, plain.mix_guidance(c, u, scale), rtol=1e-3 if dtype == "float16" else 1e-5)
    np.testing.assert_array_equal(got[1], c[1])
    np.testing.assert_array_equal(got[0], u[0])


@pytest.mark.parametrize("count", [1, 3])
def test_any_number_of_streams(count):
    logits = streams(count, "float32")
    weights = np.array([[1, 0, 0.5, 2], [0.3, 1, -2, 0], [0, 0.5, 1, -1]], np.float32)[:count]
    got = kernels.combine_guidance(logits, weights)
    np.testing.assert_allclose(got, plain.combine_guidance(logits, weights), rtol=1e-5, atol=1e-6)


def test_a_row_apart_in_memory_is_read_by_its_strides():
    c, u = streams(2, "float32")
    scale = np.full(R, 1.5, np.float32)
    apart = np.asfortranarray(c)
    np.testing.assert_array_equal(kernels.mix_guidance(apart, u, scale), kernels.mix_guidance(c, u, scale))
    streams_apart = np.asfortranarray(np.stack([c, u]))
    weights = np.ones((2, R), np.float32)
    np.testing.assert_array_equal(
        kernels.combine_guidance(streams_apart, weights), kernels.combine_guidance(np.stack([c, u]), weights)
    )
