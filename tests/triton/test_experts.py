"""A mixture of experts in Triton's interpreter, beyond what tests/leaves asks of every implementation.

40 rows that have 3 of 3 experts each are 2 tiles of 32 for each expert; 150 columns are two tiles of 128, and 70 two of 64.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dlm_kernels
from dlm_kernels.reference import experts as reference
from dlm_kernels.triton_kernels import experts as kernels

N, E, K, D, F = 40, 4, 3, 150, 70


def operands(dtype="float32"):
    random = np.random.default_rng(0)
    x, gate, up, down = (
        (random.normal(size=shape) * shape[-2] ** -0.5).astype(dtype) for shape in ((N, D), (E, D, F), (E, D, F), (E, F, D))
    )
    expert = random.integers(0, E - 1, (N, K), np.int32)  # the last has none
    return x, gate, up, down, expert, random.uniform(0.1, 1, (N, K)).astype(np.float32)


def distance(got, expected):
    return np.linalg.norm(np.asarray(got, np.float64) - expected) / np.linalg.norm(expected)


def test_pairs_are_sorted_and_cut_into_tiles(monkeypatch):
    """Some turns of each loop over pairs and tiles; expert 1 has none, and of unknown ones there are two."""
    monkeypatch.setattr(kernels, "_PAIRS", 4)
    expert = np.array([[0, 3, 3], [3, -1, 3], [0, 3, 3], [3, 3, 3], [2, 3, 7]], np.int32)
    found = kernels.sort(expert, 7, 2)
    np.testing.assert_array_equal(found["order"], [0, 6, 12, 1, 2, 3, 5, 7, 8, 9, 10, 11, 13, 4, 14])
    np.testing.assert_array_equal(found["tile_expert"], [0, 2, *[3] * 5, *[-1] * 7])
    np.testing.assert_array_equal(found["tile_start"][:7], [0, 2, 3, 5, 7, 9, 11])
    np.testing.assert_array_equal(found["tile_stop"][:7], [2, 3, 5, 7, 9, 11, 13])


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_several_tiles(monkeypatch, dtype):
    """In float16 those of many pairs; among rows whose experts are unknown, which lie in no tile."""
    monkeypatch.setattr(kernels, "_COLUMNS", 128)
    own = kernels._tiles
    monkeypatch.setattr(kernels, "_tiles", lambda dtype, few_pairs: own(dtype, False))
    given = operands(dtype)
    given[4][[3, 30]], given[4][7, 1] = E, -1
    got = kernels.mix_experts(*given, activation="silu")
    expected = reference.mix_experts(*given, activation="silu")
    unknown = np.isin(np.arange(N), [3, 7, 30])
    assert got.dtype == dtype and np.isnan(got[unknown]).all()
    assert distance(got[~unknown], expected[~unknown]) < (1e-6 if dtype == "float32" else 1e-3)


def test_every_operand_is_read_by_its_own_strides():
    given = operands()
    expected = kernels.mix_experts(*given, activation="gelu")
    for odd in (0, 1):  # gate and up are never alike
        turned = [np.asfortranarray(array) if i % 2 == odd and i < 4 else array for i, array in enumerate(given)]
        np.testing.assert_array_equal(kernels.mix_experts(*turned, activation="gelu"), expected)


def test_through_the_operation_under_vmap_and_its_gradients():
    *arrays, expert, weight = map(jnp.asarray, operands())

    def loss(x, *arrays, implementation):
        each = jax.vmap(lambda x, e, w: dlm_kernels.mix_experts(x, *arrays, e, w, implementation=implementation))
        return (each(*(y.reshape(2, N // 2, -1) for y in (x, expert, weight))) ** 2).sum()

    got, expected = (
        jax.value_and_grad(lambda *x, name=name: loss(*x, implementation=name), (0, 1, 2, 3))(*arrays) for name in ("triton", "xla")
    )
    for mine, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert distance(mine, other) < 1e-5


def test_more_experts_than_are_counted():
    def choice(count):
        shapes = (1, 8), (count, 8, 8), (count, 8, 8), (count, 8, 8)
        pair = [jax.ShapeDtypeStruct((1, 1), dtype) for dtype in (jnp.int32, jnp.float32)]
        (found,) = dlm_kernels.explain(dlm_kernels.mix_experts, *(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes), *pair)
        return found

    assert choice(4095).implementations["cuda"] == "triton"
    assert choice(4096).refused["triton"] == "it counts the pairs of at most 4095 experts, not 4096"
