"""A mixture of experts against the loop over tokens, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm_kernels.reference import experts as reference
from dlm_kernels.xla import experts as xla

WAYS = {"tiles": xla.mix_by_tiles, "all": xla.mix_by_all}
# (rows, experts, of each row, D, F): one row; lists of no row, of a part of a tile and of more; odd widths; a panel and a rest.
SHAPES = [(1, 5, 2, 16, 8), (7, 16, 1, 17, 9), (20, 4, 3, 48, 40)]


def operands(rows, experts, chosen, d, f, dtype="float32", seed=0):
    random = np.random.default_rng(seed)
    x, gate, up, down = (
        np.array(jnp.asarray(random.normal(size=shape) * shape[-2] ** -0.5 * scale, dtype))
        for shape, scale in (((rows, d), rows**0.5), ((experts, d, f), 1), ((experts, d, f), 1), ((experts, f, d), 1))
    )
    expert = np.array([random.permutation(experts)[:chosen] for _ in range(rows)], np.int32)
    return x, gate, up, down, expert, random.uniform(0.1, 1, (rows, chosen)).astype(np.float32)


def error(got, given, activation="silu"):
    expected = reference.mix_experts(*given, activation=activation)
    assert got.dtype == given[0].dtype and got.shape == expected.shape
    return np.linalg.norm(got.astype(np.float64) - expected) / np.linalg.norm(expected)


def is_the_same_in_any_tile(leaf, shape, dtype, activation, **_):
    """What a dtype or an activation is to a mixture that these kernels have in one tile anyway."""
    return leaf in ("triton", "pallas") and shape in SHAPES[:2] and (dtype, activation) != ("float32", "silu")


@pytest.mark.leave_out(when=is_the_same_in_any_tile)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("activation", ["silu", "gelu"])
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-6), ("bfloat16", 8e-3), ("float16", 1e-3)])
def test_against_a_loop(leaf, shape, activation, dtype, tolerance):
    given = operands(*shape, dtype)
    (got,) = leaf("experts", "mix_experts")(*given, activation=activation)
    assert error(got, given, activation) < tolerance


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", [*SHAPES, (33, 4, 3, 8, 12), (700, 2, 2, 8, 12)])
def test_both_ways_of_xla(way, shape):
    """Of 33 rows none chooses expert 1; 700 pairs of 2 experts are tiles of 256."""
    given = operands(*shape)
    if shape[0] == 33:
        given[4][:, 0], given[4][:, 1:] = 2, [[0, 3]]
    assert error(np.asarray(jax.jit(WAYS[way], static_argnames="activation")(*given, activation="silu")), given) < 1e-6


@pytest.mark.parametrize("way", WAYS)
def test_both_ways_of_xla_sum_in_float32(way):
    given = operands(20, 8, 4, 8, 12, "bfloat16")
    assert error(np.asarray(jax.jit(WAYS[way], static_argnames="activation")(*given, activation="silu")), given) < 8e-3


@pytest.mark.parametrize("leaf", ["cpu"], indirect=True)
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-6), ("bfloat16", 8e-3)])
def test_rows_do_not_depend_on_the_batch(leaf, dtype, tolerance):
    """To the bit. The 1300 rows are two slices; one expert has several groups of them, and both widths are more than a tile."""
    x, gate, up, down, expert, weight = given = operands(1300, 5, 2, 530, 521, dtype)
    run = leaf("experts", "mix_experts")
    (got,) = run(*given, activation="silu")
    rows = np.array([3, 1023, 1024, 1299])
    assert error(got[rows], [array[rows] if len(array) == 1300 else array for array in given]) < tolerance
    for row in rows:
        (alone,) = run(x[[row]], gate, up, down, expert[[row]], weight[[row]], activation="silu")
        np.testing.assert_array_equal(got[row], alone[0])


def test_an_expert_that_comes_twice_counts_twice(leaf):
    given = operands(6, 4, 3, 16, 8)
    given[4][:, 2] = given[4][:, 0]
    (got,) = leaf("experts", "mix_experts")(*given, activation="silu")
    assert error(got, given) < 1e-6


def test_what_an_expert_makes_of_others_rows_does_not_count(leaf):
    """Experts that would overflow on the rows that are not their own."""
    x, gate, up, down, expert, weight = operands(6, 2, 1, 16, 8)
    x[1:] *= 1e30
    expert[:] = 1
    expert[0], gate[1], up[0] = 0, 0, 1e30
    (got,) = leaf("experts", "mix_experts")(x, gate, up, down, expert, weight, activation="silu")
    assert np.isfinite(got).all() and np.abs(got[0]).max() > 0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_row_that_is_not_finite_touches_no_other(leaf, bad):
    given = operands(9, 4, 2, 16, 8)
    run = leaf("experts", "mix_experts")
    (expected,) = run(*given, activation="silu")
    given[0][4, 3] = bad
    (got,) = run(*given, activation="silu")
    assert not np.isfinite(got[4]).any()
    np.testing.assert_array_equal(np.delete(got, 4, 0), np.delete(expected, 4, 0))


LOW = [("float32", -1.0, 3e38), ("float16", -300.0, 300.0)]  # a product past all float16; (dtype, x, gate)


def far_below_zero(dtype, x, gate):
    """A row of one number, and experts that each are one."""
    one = np.ones((1, 1, 1), dtype)
    return np.full((1, 1), x, dtype), gate * one, one, one, np.zeros((1, 1), np.int32), np.ones((1, 1), np.float32)


@pytest.mark.parametrize("dtype, x, gate", LOW)
@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_nothing_is_left_of_what_is_far_below_zero(leaf, activation, dtype, x, gate):
    """What is float32 until it is past the activation; gelu has its third power, of which float32 holds that of float16 alone."""
    given = far_below_zero(dtype, x, gate if dtype == "float16" or activation == "silu" else 1e12)
    (got,) = leaf("experts", "mix_experts")(*given, activation=activation)
    assert got == 0


@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_all_at_once_nothing_is_left_of_it_either(activation):
    given = far_below_zero(*LOW[1])
    assert xla.mix_by_all(*given, activation=activation) == 0
    assert all(np.isfinite(x).all() for x in xla.mix_experts_backward(*given, given[0], activation=activation))


def test_experts_that_nobody_chose_are_not_read(leaf):
    given = operands(5, 6, 2, 16, 8)
    given[4][:] = [1, 4]
    run = leaf("experts", "mix_experts")
    (expected,) = run(*given, activation="silu")
    for matrices in given[1:4]:
        matrices[[0, 2, 3, 5]] = np.nan
    np.testing.assert_array_equal(run(*given, activation="silu")[0], expected)


def test_an_unknown_expert_makes_its_row_nan(leaf):
    given = operands(6, 4, 3, 16, 8)
    run = leaf("experts", "mix_experts")
    (expected,) = run(*given, activation="silu")
    for wrong in (-1, 4, 2**31 - 1, -(2**31)):
        given[4][2, 1] = wrong
        (got,) = run(*given, activation="silu")
        assert np.isnan(got[2]).all()
        np.testing.assert_array_equal(np.delete(got, 2, 0), np.delete(expected, 2, 0))
    given[4][:] = 7  # nothing is left to compute
    assert np.isnan(run(*given, activation="silu")[0]).all()
