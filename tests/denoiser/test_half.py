"""Weights of 16 bits on a CPU: as precise as elsewhere, and not widened."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm_kernels.denoiser import half, model, sampler
from dlm_kernels.denoiser.config import DenoiserConfig

D, F = 48, 200


def weights(dtype, *shapes):
    random = np.random.default_rng(0)
    return [jnp.asarray(random.normal(size=shape) * shape[-2] ** -0.5, dtype) for shape in shapes]


@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_a_gated_layer_by_matmul(rows, activation):
    x, *matrices = weights(jnp.bfloat16, (rows, D), (D, F), (D, F), (F, D))
    x = (x * rows**0.5).reshape(1, rows, D)  # as many axes as there may be
    layer = jax.jit(half.gated, static_argnames=("activation", "implementation"))
    wide = layer(*(array.astype(jnp.float32) for array in (x, *matrices)), activation=activation)
    for implementation in (None, "cpu", "xla", "triton"):
        found = layer(x, *matrices, activation=activation, implementation=implementation)
        assert found.dtype == x.dtype and found.shape == x.shape
        assert jnp.linalg.norm(found.astype(jnp.float32) - wide) < 2**-6 * jnp.linalg.norm(wide)


@pytest.mark.parametrize("dtype, implementation, kernels", [("bfloat16", None, 3), ("bfloat16", "xla", 0), ("float32", None, 0)])
def test_who_multiplies(dtype, implementation, kernels):
    given = weights(dtype, (1, 5, D), (D, F), (D, F), (F, D))
    compiled = jax.jit(half.gated, static_argnames="implementation").lower(*given, implementation=implementation).compile()
    assert compiled.as_text().count('custom_call_target="dlm_kernels_matmul"') == kernels


def test_bfloat16_stays_so():
    """A loop in which XLA widened all weights would hold them twice over; it has a copy of the embeddings, as they are."""
    config = DenoiserConfig(layers=2, d_model=256, heads=4, kv_heads=4, head_size=64, ffn=1024, vocab=8192)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model.init(config, jax.random.key(0)))
    tokens = jnp.full((1, 16), config.mask_id, jnp.int32)
    compiled = jax.jit(lambda params: sampler.decode(config, params, tokens, block=16, steps=4)).lower(params).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 1.2 * params["embed"].nbytes


def test_the_gradient_of_embeddings_of_16_bits():
    table = jax.random.normal(jax.random.key(0), (7, 5)).astype(jnp.bfloat16)
    tokens, slope = jnp.array([[1, 3, 1], [0, 6, 1]]), jax.random.normal(jax.random.key(1), (2, 3, 5))
    found, back = jax.vjp(lambda table: half.look_up(table, tokens).astype(jnp.float32), table)
    expected, wide = jax.vjp(lambda table: table[tokens], table.astype(jnp.float32))
    np.testing.assert_array_equal(found, expected)
    # Sums of bfloat16 slopes, rounded once more.
    (gradient,) = back(slope)
    np.testing.assert_allclose(gradient.astype(jnp.float32), wide(slope)[0], rtol=2**-7, atol=2**-8)
    # Of a table that devices share, within a shard_map that checks it, the same; and forward.
    rows = jax.P("data")
    mesh = jax.make_mesh((2,), ("data",), (jax.sharding.AxisType.Auto,), devices=jax.devices("cpu")[:2])
    part = jax.shard_map(lambda *given: half.look_up(*given), mesh=mesh, in_specs=(jax.P(), rows), out_specs=rows)
    (shared,) = jax.vjp(lambda table: part(table, tokens).astype(jnp.float32), table)[1](slope)
    np.testing.assert_allclose(shared.astype(jnp.float32), gradient.astype(jnp.float32), rtol=2**-7, atol=2**-8)
    np.testing.assert_array_equal(jax.jvp(lambda table: half.look_up(table, tokens), (table,), (table,))[1], expected)
