"""Weights of 16 bits, which XLA on a CPU would widen, all of them at once and in front of a loop, where it is not kept from it."""

import jax
import jax.numpy as jnp

from dlm_kernels import mix_experts


def product(x, weight):
    """x @ weight. Of 16 bits on a CPU the sum is float32 by name: else XLA there widens all weights, and keeps them for a loop."""
    if x.dtype == jnp.float32:
        return x @ weight

    def on_a_cpu(x, weight):
        rows = x.shape[-2]
        # Of a single row XLA widens all weights once more, of two it does not.
        x = jnp.concatenate([x, x], axis=-2) if rows == 1 else x
        return jnp.matmul(x, weight, preferred_element_type=jnp.float32)[..., :rows, :].astype(x.dtype)

    return jax.lax.platform_dependent(x, weight, cpu=on_a_cpu, default=jnp.matmul)


def gated(x, gate, up, down, *, activation="silu", implementation=None):
    """(act(x @ gate) * (x @ up)) @ down, by name as in `mix_experts`. Of 16 bits on a CPU a mixture of one expert, whose kernel
    reads the weights as they are.
    """

    def dense(x, gate, up, down):
        act = {"silu": jax.nn.silu, "gelu": jax.nn.gelu}[activation]
        return product(act(product(x, gate)) * product(x, up), down)

    def mixture(x, *weights):
        one = jnp.zeros((*x.shape[:-1], 1), jnp.int32)
        matrices = (weight[None] for weight in weights)
        return mix_experts(x, *matrices, one, one + 1, activation=activation, implementation=implementation)

    if x.dtype == jnp.float32 or implementation not in (None, "cpu"):
        return dense(x, gate, up, down)
    return jax.lax.platform_dependent(x, gate, up, down, cpu=mixture, default=dense)


def look_up(table, tokens):
    """table[tokens], the embeddings [..., d_model]. Of 16 bits on a CPU as integers: XLA there widens a table of floats."""
    if table.dtype == jnp.float32:
        return table[tokens]
    return jax.lax.platform_dependent(table, tokens, cpu=_look_up_half, default=lambda table, tokens: table[tokens])


@jax.custom_jvp
def _look_up_half(table, tokens):
    return jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(table, jnp.uint16)[tokens], table.dtype)


@_look_up_half.defjvp
def _look_up_half_jvp(given, slopes):
    """Linear in the table; backward, of a float32 one, so that the slopes of a token that comes often are summed in float32."""
    return _look_up_half(*given), slopes[0].astype(jnp.float32)[given[1]].astype(given[0].dtype)
