"""What the checks make of arguments: to put a number on a device takes as long as a small kernel, so it is left to the program."""

import warnings

import jax.numpy as jnp
import numpy as np
import pytest

from dlm_kernels.ops import checks


@pytest.mark.parametrize("given", [2, 2.5, np.float64(2.5), np.float16(2.5), np.arange(3.0), np.arange(3), True + 1])
def test_numbers_of_python_and_numpy_stay_on_the_host(given):
    rows = checks.per_row("scale", given, 3, 4)
    assert isinstance(rows, np.ndarray) and rows.dtype == np.float32
    np.testing.assert_array_equal(rows, np.broadcast_to(np.reshape(given, (-1, 1)), (3, 4)))
    assert not isinstance(checks.per_row("scale", jnp.float32(2), 3), np.ndarray)


def test_what_float32_does_not_hold_is_infinite_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert checks.per_row("scale", 1e300, 2).tolist() == [np.inf] * 2
        assert checks.numbers("scale", np.array([-1e300, 1.0])).tolist() == [-np.inf, 1]


@pytest.mark.parametrize("given", [2**40, np.int64(2**40), np.array([2**40])])
def test_counts_beyond_32_bits_are_the_greatest_or_refused(given):
    if isinstance(given, np.ndarray | np.generic):
        assert checks.per_row("num_unmask", given, 1, dtype=jnp.int32).tolist() == [2**31 - 1]
    else:
        with pytest.raises(ValueError, match="num_unmask: expected an integer or an array of integers, got 1099511627776"):
            checks.per_row("num_unmask", given, 1, dtype=jnp.int32)


def test_a_number_beyond_every_dtype_says_so():
    with pytest.raises(ValueError, match="scale: expected a number or an array of numbers, got 1180591620717411303424"):
        checks.numbers("scale", 2**70)
