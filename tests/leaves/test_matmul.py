"""A product of rows and a weight against float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from dlm_kernels.reference.matmul import matmul as reference

has_it = pytest.mark.parametrize("leaf", ["cpu", "xla"], indirect=True)
dtypes = pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-6), ("bfloat16", 4e-3), ("float16", 5e-4)])


def operands(rows, d, f, dtype):
    random = np.random.default_rng(0)
    return [np.array(jnp.asarray(random.normal(size=shape), dtype)) for shape in ((rows, d), (d, f))]


def error(got, x, weight):
    expected = reference(x, weight)
    assert got.dtype == x.dtype and got.shape == expected.shape
    return np.linalg.norm(got.astype(np.float64) - expected) / np.linalg.norm(expected)


# One row; some, of odd sizes; as many as have panels laid out, whose last is a part of one; two blocks, of several tiles of columns
# and more than one depth; rows of a weight that lie a page apart in 16 bits, and in 32.
@has_it
@dtypes
@pytest.mark.parametrize("rows, d, f", [(1, 16, 8), (7, 17, 9), (30, 33, 41), (100, 1030, 1041), (25, 9, 2048), (26, 9, 1024)])
def test_against_float64(leaf, rows, d, f, dtype, tolerance):
    x, weight = operands(rows, d, f, dtype)
    (got,) = leaf("matmul", "matmul")(x, weight)
    assert error(got, x, weight) < tolerance


@pytest.mark.parametrize("leaf", ["cpu"], indirect=True)
@pytest.mark.parametrize("f", [1000, 2048])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_rows_do_not_depend_on_the_batch(leaf, f, dtype):
    """To the bit: a row is multiplied by a weight that is laid out, or where it lies."""
    x, weight = operands(200, 1030, f, dtype)
    run = leaf("matmul", "matmul")
    (got,) = run(x, weight)
    for rows in ([3], [66, 67], [*range(100, 120)]):
        (alone,) = run(x[rows], weight)
        np.testing.assert_array_equal(got[rows], alone)


@has_it
def test_what_is_not_finite_stays_in_its_row_and_column(leaf):
    x, weight = operands(20, 24, 50, "float32")
    x[4, 5], weight[7, 33] = np.nan, np.inf
    (got,) = leaf("matmul", "matmul")(x, weight)
    finite = np.isfinite(got)
    assert not finite[4].any() and not finite[:, 33].any() and finite.sum() == 19 * 49
