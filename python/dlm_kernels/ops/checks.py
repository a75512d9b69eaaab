"""Checks that the operations share. Each raises a ValueError that names the argument, what was expected and what came."""

from numbers import Real

import jax
import jax.numpy as jnp
import numpy as np

FLOATS = (jnp.float32, jnp.bfloat16, jnp.float16)
MOST = float(jnp.finfo(jnp.float32).max)


def array(name, value):
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        raise ValueError(f"{name}: expected an array, got {type(value).__name__}")
    return _as_array(name, value, "an array of numbers")


def _as_array(name, value, expected):
    try:
        return value if isinstance(value, jax.Array) else jnp.asarray(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # JAX's own message does not know the argument, nor torch's
        raise ValueError(f"{name}: expected {expected}, got {shown(value)}") from None


def _on_host(name, value, expected):
    """What Python or NumPy holds as NumPy's array, for JAX takes as long to make one of its own as a small kernel to run; others
    as JAX's.
    """
    if not isinstance(value, (Real, np.ndarray, np.generic)):
        return _as_array(name, value, expected)
    held = np.asarray(value)
    if held.dtype == object:
        raise ValueError(f"{name}: expected {expected}, got {shown(value)}")
    with np.errstate(over="ignore"):  # what float32 does not hold is infinite
        return held.astype(np.float32) if held.dtype == np.float64 else held


def library(array):
    """What computes where the array is: jax.numpy, or of NumPy's arrays numpy."""
    return jnp if isinstance(array, jax.Array) else np


def broadcast(value, shape):
    """Of NumPy's arrays NumPy's, unless a size is symbolic."""
    known = all(isinstance(n, int) for n in shape)
    return (library(value) if known else jnp).broadcast_to(value, shape)


def arange(n):
    """int32 [n], NumPy's unless n is symbolic."""
    return np.arange(n, dtype=np.int32) if isinstance(n, int) else jnp.arange(n, dtype=jnp.int32)


def _of_32_bits(value):
    """An array's integers as int32, what 32 bits do not hold as the nearest that they do: wrapped, it would be another token, or a
    small count in the place of all. Other values as they are.
    """
    if hasattr(value, "is_floating_point") and not value.is_floating_point():  # torch's, whose 64 bits JAX would wrap
        value = value.numpy(force=True)
    if not isinstance(value, (jax.Array, np.ndarray, np.generic)) or not jnp.issubdtype(value.dtype, jnp.integer):
        return value
    given, least, most = jnp.iinfo(value.dtype), -(2**31), 2**31 - 1
    if given.max > most:
        value = library(value).clip(value, max(least, given.min), most)
    return value if value.dtype == np.int32 else value.astype(np.int32)


def shown(value):
    """`value` in an error, where an array's numbers would fill the screen."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{type(value).__name__} of {value.dtype}, shape {list(value.shape)}"
    return repr(value)


def floats(name, value, axes):
    """A float32, bfloat16 or float16 array with one axis per letter of `axes`."""
    value = array(name, value)
    if value.dtype not in FLOATS:
        raise ValueError(f"{name}: expected dtype float32, bfloat16 or float16, got {value.dtype}")
    return ranked(name, value, axes)


def ints(name, value, axes):
    value = array(name, _of_32_bits(value))
    if not jnp.issubdtype(value.dtype, jnp.integer):
        raise ValueError(f"{name}: expected an integer dtype, got {value.dtype}")
    return ranked(name, value, axes)


def ids(name, value):
    """Token ids [M]: an array, or a list or tuple of integers."""
    if isinstance(value, (list, tuple)) and all(type(x) is int or isinstance(x, np.integer) for x in value):
        value = np.array([max(-1, min(x, 2**31 - 1)) for x in value], np.int32)  # as in _of_32_bits; below 0 nothing is a token
    return ints(name, value, "M")


def bools(name, value, axes):
    value = array(name, value)
    if value.dtype != jnp.bool_:
        raise ValueError(f"{name}: expected dtype bool, got {value.dtype}")
    return ranked(name, value, axes)


def ranked(name, value, axes):
    if value.ndim != len(axes):
        raise ValueError(f"{name}: expected shape [{', '.join(axes)}], got {list(value.shape)}")
    return value


def shaped(name, value, shape, meaning):
    if tuple(value.shape) != tuple(shape):
        raise ValueError(f"{name}: expected shape {list(shape)} ({meaning}), got {list(value.shape)}")
    return value


def one_of(name, value, choices):
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")
    return value


def per_row(name, value, batch, length=None, dtype=jnp.float32):
    """A scalar, [B], or where `length` is given [B, L], as [B] or [B, L]; traced or not, so that schedules are data."""
    value = integers(name, value) if dtype == jnp.int32 else numbers(name, value)
    if length is None:
        if value.shape not in ((), (batch,)):
            raise ValueError(f"{name}: expected a scalar or shape [{batch}] (batch), got {list(value.shape)}")
        return broadcast(value, (batch,))
    if value.shape not in ((), (batch,), (batch, length)):
        raise ValueError(
            f"{name}: expected a scalar, shape [{batch}] (batch) or [{batch}, {length}] (batch, length), got {list(value.shape)}"
        )
    if value.ndim == 1:
        value = value[:, None]
    return broadcast(value, (batch, length))


def numbers(name, value):
    """A number or an array of them, traced or not, as float32."""
    value = _on_host(name, value, "a number or an array of numbers")
    if not (jnp.issubdtype(value.dtype, jnp.floating) or jnp.issubdtype(value.dtype, jnp.integer)):
        raise ValueError(f"{name}: expected a number or an array of numbers, got dtype {value.dtype}")
    return value if value.dtype == np.float32 else value.astype(np.float32)


def not_negative(name, value):
    """Of numbers alone: those of an array are not looked at."""
    if isinstance(value, Real) and not value >= 0:
        raise ValueError(f"{name}: expected 0 or more, got {value}")


def integers(name, value, expected="an integer or an array of integers"):
    """Traced or not, as int32."""
    # Without 64 bits JAX raises for such a number of Python's, with them it would take it.
    if isinstance(value, int) and not -(2**31) <= value < 2**31:
        raise ValueError(f"{name}: expected {expected}, got {value}")
    value = np.int32(value) if type(value) is int else _on_host(name, _of_32_bits(value), expected)
    if not jnp.issubdtype(value.dtype, jnp.integer):
        raise ValueError(f"{name}: expected {expected}, got dtype {value.dtype}")
    return _of_32_bits(value)


def integer(name, value):
    """A single one, traced or not, as int32."""
    value = integers(name, value, "a single integer")
    if value.ndim != 0:
        raise ValueError(f"{name}: expected a single integer, got shape {list(value.shape)}")
    return value


def size(name, value):
    """How many positions an axis has, as an int."""
    if not isinstance(value, (int, np.integer)) or value < 0:
        raise ValueError(f"{name}: expected an integer of at least 0, not traced, got {value!r}")
    return int(value)


def number(name, value):
    """A number that kernels are compiled for, finite in float32, as a float."""
    try:
        if not isinstance(value, (str, bytes)) and abs(float(value)) <= MOST:
            return float(value)
    except (TypeError, ValueError, OverflowError):  # of a traced value too
        pass
    raise ValueError(f"{name}: expected a finite number, not traced, got {shown(value)}")


def head(name, hidden, weight_name, shape, dtype):
    """That a weight of this shape and dtype is an LM head's for hidden states [B, L, D]."""
    v, d = shape
    if hidden.shape[-1] == 0:
        raise ValueError(f"{name}: expected a width of at least 1, got shape {list(hidden.shape)}")
    if v == 0 or d != hidden.shape[-1]:
        raise ValueError(f"{weight_name}: expected shape [V, {hidden.shape[-1]}] with V of at least 1, got {[v, d]}")
    if dtype != hidden.dtype:
        raise ValueError(f"{weight_name}: expected {name}'s dtype {hidden.dtype}, got {dtype}")


def soft_cap(value):
    # Beyond these bounds float32 would lose what is divided by it and multiplied again.
    if value is not None and not 1e-30 <= number("logits_soft_cap", value) <= 1e30:
        raise ValueError(f"logits_soft_cap: expected None or a number from 1e-30 to 1e30, got {value!r}")
    return None if value is None else float(value)


def float_dtype(name, value):
    """None, or one of FLOATS as a dtype."""
    if value is None:
        return None
    try:
        dtype = jnp.dtype(value)
    except (TypeError, ValueError):
        dtype = None
    if dtype not in [jnp.dtype(x) for x in FLOATS]:
        raise ValueError(f"{name}: expected float32, bfloat16, float16 or None, got {value}")
    return dtype
