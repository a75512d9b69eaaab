"""Weights of 16 bits, which XLA on a CPU would widen, all of them at once and in front of a loop, where it is not kept from it."""

import jax
import jax.numpy as jnp


def product(x, weight):
    """x @ weight. Of 16 bits on a CPU the sum is float32 by name: else XLA there widens all weights, and keeps them for a loop."""
    if x.dtype == jnp.float32:
        return x @ weight

    def on_a_cpu(x, weight):
        return jnp.matmul(x, weight, preferred_element_type=jnp.float32).astype(x.dtype)

    return jax.lax.platform_dependent(x, weight, cpu=on_a_cpu, default=jnp.matmul)


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
