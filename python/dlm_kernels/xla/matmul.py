"""A product of rows and a weight in plain jax.numpy."""

import jax
import jax.numpy as jnp


def matmul(x, weight):
    """x [R,D]; weight [D,F], one dtype. Returns [R,F]."""

    def on_a_cpu(x, weight):
        # Of a single row XLA widens a weight of 16 bits, of two it does not.
        twice = jnp.concatenate([x, x]) if x.shape[0] == 1 else x
        return of_rows(twice, weight)[: x.shape[0]]

    def of_rows(x, weight):
        return product("rd,df->rf", x, weight).astype(x.dtype)

    return jax.lax.platform_dependent(x, weight, cpu=on_a_cpu, default=of_rows)


def matmul_backward(x, weight, dout):
    """dout [R,F]. Returns dx and dweight in the dtype of x."""
    dx, dweight = product("rf,df->rd", dout, weight), product("rd,rf->df", x, dout)
    return dx.astype(x.dtype), dweight.astype(x.dtype)


def product(formula, a, b):
    """The einsum, summed in float32 by name: else XLA on a CPU widens all weights of 16 bits, and keeps them for a loop; and of
    float32 factors a TPU and a GPU would take some of the bits.
    """
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(formula, a, b, precision=precision, preferred_element_type=jnp.float32)
