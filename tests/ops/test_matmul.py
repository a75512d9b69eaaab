"""The product of rows and a weight through the API: axes, gradients, memory, platforms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import dlm_kernels


def operands(dtype="float32", lead=(3, 4)):
    random = np.random.default_rng(0)
    return [jnp.asarray(random.normal(size=shape), dtype) for shape in ((*lead, 24), (24, 40))]


def test_a_batch_of_sequences():
    x, weight = operands()
    flat = dlm_kernels.matmul(x.reshape(12, 24), weight)
    np.testing.assert_array_equal(dlm_kernels.matmul(x, weight), flat.reshape(3, 4, 40))


@pytest.mark.parametrize("lead", [(5,), (3, 4)])
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 2**-7)])
def test_gradients(lead, dtype, tolerance):
    """Of the product as jnp has it, in float32."""
    x, weight = operands(dtype, lead)

    def slopes(product, *given):
        out, back = jax.vjp(product, *given)
        return back(jnp.cos(jnp.arange(out.size).reshape(out.shape)).astype(out.dtype))

    found = slopes(dlm_kernels.matmul, x, weight)
    expected = slopes(jnp.matmul, *(array.astype(jnp.float32) for array in (x, weight)))
    for got, wanted in zip(found, expected, strict=True):
        assert got.dtype == x.dtype
        np.testing.assert_allclose(got.astype(jnp.float32), wanted, rtol=tolerance, atol=tolerance * jnp.abs(wanted).max())


def test_gradients_where_devices_share_a_weight():
    """Within a shard_map that checks it, the weight's is their sum."""
    x, weight = operands(lead=(8,))
    mesh = jax.make_mesh((4,), ("data",), (AxisType.Auto,), devices=jax.devices("cpu")[:4])
    rows = PartitionSpec("data")
    shared = jax.shard_map(dlm_kernels.matmul, mesh=mesh, in_specs=(rows, PartitionSpec()), out_specs=rows)

    def loss(product, x, weight):
        return (product(x, weight) ** 2).sum()

    found, expected = (jax.grad(loss, (1, 2))(product, x, weight) for product in (shared, jnp.matmul))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-3), found, expected)


@pytest.mark.parametrize("axis", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("specs", [(("all", None), (None, None)), ((None, None), (None, "all")), ((None, "all"), ("all", None))])
def test_on_a_mesh(axis, specs):
    """Split along rows, columns or the depth, which is gathered; with gradients."""
    given = operands(lead=(8,))
    mesh = jax.make_mesh((4,), ("all",), (axis,), devices=jax.devices("cpu")[:4])
    placed = [jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec))) for array, spec in zip(given, specs)]

    @jax.jit
    def run(*given):
        out, back = jax.vjp(dlm_kernels.matmul, *given)
        return out, *back(out)

    expected = run(*given)
    with jax.set_mesh(mesh):
        found = run(*placed)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-4), found, expected)
        assert found[0].sharding.is_fully_replicated == (specs[0][1] is not None)


@pytest.mark.parametrize("implementation", ["cpu", "xla"])
@pytest.mark.parametrize("rows", [1, 2])
def test_a_weight_of_16_bits_is_not_widened(implementation, rows):
    x, weight = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((rows, 256), (256, 512)))
    compiled = jax.jit(functools.partial(dlm_kernels.matmul, implementation=implementation)).lower(x, weight).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 256 * 512 * 2


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_elsewhere_it_is_xla_with_all_bits_of_float32(platform):
    given = operands()
    (choice,) = dlm_kernels.explain(dlm_kernels.matmul, *given)
    assert choice.implementations == {"cpu": "cpu", "default": "xla"}
    exported = export.export(jax.jit(dlm_kernels.matmul), platforms=[platform], disabled_checks=dlm_kernels.export_checks())(*given)
    products = [line for line in exported.mlir_module().splitlines() if "stablehlo.dot_general" in line]
    assert products and all("precision = [HIGHEST, HIGHEST]" in line for line in products)
