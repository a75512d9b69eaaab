"""A product of rows and a weight that is read as it was stored: the projections and dense layers of checkpoints of 16 bits."""

import functools

import jax
import jax.numpy as jnp

from dlm_kernels.ops import checks, dispatch, sharding

_INPUTS = (("x", "rd"), ("weight", "df"))
MATMUL = dispatch.Leaf("matmul", "matmul", _INPUTS, ("rf",), fold="r", sharded="rf")
BACKWARD = dispatch.Leaf("matmul", "matmul_backward", (*_INPUTS, ("dout", "rf")), ("rd", "df"), fold="r", sharded=None)


def matmul(x, weight, *, implementation=None):
    """A layer's product. XLA's on a CPU widens weights of 16 bits, in memory or as it reads them, and takes longer.

        (x.astype(float32) @ weight.astype(float32)).astype(x.dtype)

    Arguments:
      x: [N, D] or [B, L, D]; weight: [D, F], one dtype, float32, bfloat16 or float16.
      implementation: "cpu", "xla" or None, which on a GPU and a TPU is XLA.

    Returns [N, F] or [B, L, F] in x's dtype; accumulates in float32. A row depends on no other. Differentiable in both: a first
    gradient, in reverse mode alone, which XLA computes.
    Raises ValueError for shapes or dtypes that do not fit, and for another implementation.
    """
    dispatch.check(implementation)
    x = checks.array("x", x)
    if x.ndim not in (2, 3):
        raise ValueError(f"x: expected shape [N, D] or [B, L, D], got {list(x.shape)}")
    x, weight = checks.floats("x", x, "ND" if x.ndim == 2 else "BLD"), checks.floats("weight", weight, "DF")
    if weight.shape[0] != x.shape[-1]:
        raise ValueError(f"weight: expected shape [{x.shape[-1]}, F], got {list(weight.shape)}")
    if weight.dtype != x.dtype:
        raise ValueError(f"weight: expected x's dtype {x.dtype}, got {weight.dtype}")
    if x.size == 0 or weight.size == 0:
        return jnp.zeros((*x.shape[:-1], weight.shape[1]), x.dtype)
    return dispatch.differentiable(_matmul, implementation, x, weight)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul(implementation, *arrays):
    return dispatch.call(MATMUL, implementation, sharding.varying_by_name(MATMUL, arrays))[0]


def _matmul_fwd(implementation, *arrays):
    return _matmul(implementation, *arrays), arrays


def _matmul_bwd(implementation, arrays, dout):
    return sharding.typed_as(arrays, dispatch.call(BACKWARD, "xla", sharding.varying_by_name(BACKWARD, (*arrays, dout))))


_matmul.defvjp(_matmul_fwd, _matmul_bwd)
