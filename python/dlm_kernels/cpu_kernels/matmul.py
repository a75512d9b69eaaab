"""A product of rows and a weight: csrc/matmul.cc."""

import jax

from dlm_kernels import cpu_kernels


def matmul(x, weight):
    """x [R,D]; weight [D,F], one dtype. Returns [R,F]."""
    return cpu_kernels.run("matmul", jax.ShapeDtypeStruct((x.shape[0], weight.shape[1]), x.dtype), x, weight)
