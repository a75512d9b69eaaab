"""Weights of 16 bits, which XLA on a CPU would widen, all of them at once and in front of a loop, where it is not kept from it."""

import functools

import jax
import jax.numpy as jnp

from dlm_kernels import matmul


def product(x, weight, implementation=None):
    """x @ weight, of 16 bits on a CPU by `matmul`; implementation: by name as there, another platform's is XLA."""
    if x.dtype == jnp.float32:
        return x @ weight
    on_a_cpu = functools.partial(matmul, implementation=implementation if implementation in (None, "cpu") else "xla")
    return jax.lax.platform_dependent(x, weight, cpu=on_a_cpu, default=jnp.matmul)


def gated(x, gate, up, down, *, activation="silu", implementation=None):
    """(act(x @ gate) * (x @ up)) @ down; activation by name as in `mix_experts`, implementation as in `product`."""
    act = {"silu": jax.nn.silu, "gelu": jax.nn.gelu}[activation]
    times = functools.partial(product, implementation=implementation)
    return times(act(times(x, gate)) * times(x, up), down)


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
