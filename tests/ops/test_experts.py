"""The mixture of experts through the API: ranks, gradients, memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import dlm_kernels
from dlm_kernels.reference import experts as reference
from dlm_kernels.xla import experts as xla


def operands(rows=9, experts=4, chosen=2, d=8, f=12):
    random = np.random.default_rng(0)
    x, gate, up, down = (
        random.normal(size=shape).astype(np.float32) for shape in ((rows, d), (experts, d, f), (experts, d, f), (experts, f, d))
    )
    expert = np.array([random.permutation(experts)[:chosen] for _ in range(rows)], np.int32)
    return x, gate, up, down, expert, random.uniform(0.1, 1, (rows, chosen)).astype(np.float32)


@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_a_batch_of_sequences(activation):
    x, gate, up, down, expert, weight = operands(12)
    flat = dlm_kernels.mix_experts(x, gate, up, down, expert, weight, activation=activation)
    of_sequences = (array.reshape(3, 4, -1) for array in (x, expert, weight))
    x, expert, weight = of_sequences
    folded = dlm_kernels.mix_experts(x, gate, up, down, expert, weight, activation=activation)
    np.testing.assert_array_equal(folded, flat.reshape(x.shape))


@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_gradients(activation):
    """Against the slope of the loop in float64, in a random direction; one row's expert is unknown and has no part in it."""
    *arrays, expert, weight = operands()
    expert[3, 1] = 4
    known = np.arange(9) != 3

    def loss(*given):
        out = dlm_kernels.mix_experts(*given[:4], expert, given[4], activation=activation)
        return (jnp.where(known[:, None], out, 0) ** 2).sum()

    gradients = jax.jit(jax.grad(loss, (0, 1, 2, 3, 4)))(*arrays, weight)
    assert all(np.isfinite(x).all() for x in gradients) and not gradients[0][3].any()
    random = np.random.default_rng(1)

    def moved(i, step):
        *given, share = (a + step if i == j else a for j, a in enumerate((*arrays, weight)))
        return (reference.mix_experts(*given, expert, share, activation=activation)[known] ** 2).sum()

    for i, ours in enumerate(gradients):
        direction = random.normal(size=ours.shape)
        slope = (moved(i, 1e-5 * direction) - moved(i, -1e-5 * direction)) / 2e-5
        assert abs((np.asarray(ours, np.float64) * direction).sum() - slope) < 1e-4 * abs(slope)


@pytest.mark.parametrize("unknown", [[-1, -1], [0, 4]])
def test_padding_with_nan_in_it_has_no_part_in_the_gradients(unknown):
    """A row with no expert or with some, whatever is in it: zeros times a NaN would still be NaN."""
    x, gate, up, down, expert, weight = operands()
    expert[3] = unknown

    def gradients(x, weight):
        arrays = x, gate, up, down, weight
        return jax.grad(lambda *a: (dlm_kernels.mix_experts(*a[:4], expert, a[4])[np.arange(9) != 3] ** 2).sum(), range(5))(*arrays)

    wrong = [np.where(np.arange(9)[:, None] == 3, np.nan, array) for array in (x, weight)]
    jax.tree.map(np.testing.assert_array_equal, gradients(*wrong), gradients(x, weight))


def test_gradients_under_vmap():
    *arrays, expert, weight = operands()

    def gradient(x, gate):
        return jax.grad(lambda *given: (dlm_kernels.mix_experts(*given, *arrays[2:], expert, weight) ** 2).sum(), (0, 1))(x, gate)

    x = jnp.stack([arrays[0], arrays[0][::-1]])
    got = jax.vmap(gradient, (0, None))(x, arrays[1])
    for i in range(2):
        expected = gradient(x[i], arrays[1])
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-4), [g[i] for g in got], list(expected))


def test_gradients_where_devices_share_rows_and_experts():
    """Each has some of the experts for some of the rows: an id that is not its own is moved to an expert with no weight."""
    x, gate, up, down, expert, weight = operands(8)
    mesh = jax.make_mesh((2, 2), ("data", "model"), (AxisType.Auto,) * 2, devices=jax.devices("cpu")[:4])

    def part(x, gate, up, down, expert, weight):
        own = expert - 2 * jax.lax.axis_index("model")
        here = (own >= 0) & (own < 2)
        mixed = dlm_kernels.mix_experts(x, gate, up, down, jnp.where(here, own, 0), jnp.where(here, weight, 0))
        return jax.lax.psum(mixed, "model")

    rows, experts = PartitionSpec("data"), PartitionSpec("model")
    shared = jax.shard_map(part, mesh=mesh, in_specs=(rows, *[experts] * 3, rows, rows), out_specs=rows)

    def loss(function, *given):
        return (function(*given[:4], expert, given[4]) ** 2).sum()

    got, expected = (
        jax.jit(jax.value_and_grad(functools.partial(loss, function), (0, 1, 2, 3, 4)))(x, gate, up, down, weight)
        for function in (shared, dlm_kernels.mix_experts)
    )
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-3), got, expected)


@pytest.mark.parametrize("axis", [AxisType.Auto, AxisType.Explicit])
def test_devices_share_the_work_of_the_gradients(axis):
    """Whichever of the rows and of the experts is split over them, in the layer's own axes and not in a shard_map."""
    given = operands(16)
    gradients = jax.jit(jax.grad(lambda *given: (dlm_kernels.mix_experts(*given) ** 2).sum(), (0, 1, 2, 3, 5)))
    mesh = jax.make_mesh((4,), ("all",), (axis,), devices=jax.devices("cpu")[:4])
    whole, split = PartitionSpec(), PartitionSpec("all")
    expected = gradients(*given)
    for rows, experts in ((split, whole), (whole, split)):
        specs = rows, *[experts] * 3, rows, rows
        placed = [jax.device_put(array, NamedSharding(mesh, spec)) for array, spec in zip(given, specs)]
        with jax.set_mesh(mesh):
            compiled = gradients.lower(*placed).compile()
        assert compiled.cost_analysis()["flops"] < gradients.lower(*given).compile().cost_analysis()["flops"] / 2
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), compiled(*placed), expected)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_gradients_of_float32_have_all_its_bits(platform):
    *arrays, expert, weight = map(jnp.asarray, operands())
    mixed = functools.partial(dlm_kernels.mix_experts, implementation="xla")
    gradients = jax.jit(jax.value_and_grad(lambda *a: mixed(*a[:4], expert, a[4]).sum(), (0, 1, 2, 3, 4)))
    exported = export.export(gradients, platforms=[platform])(*arrays, weight)
    products = [line for line in exported.mlir_module().splitlines() if "stablehlo.dot_general" in line]
    assert products and all("precision = [HIGHEST, HIGHEST]" in line for line in products)


def test_half_precision_is_not_widened_in_memory():
    """A 16-bit layer's weights as float32 would be twice their bytes; XLA's loop on a CPU holds those of one expert at a time."""
    shapes = [(32, 64), (16, 64, 128), (16, 64, 128), (16, 128, 64)]
    given = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    given += [jax.ShapeDtypeStruct((32, 4), dtype) for dtype in (jnp.int32, jnp.float32)]
    computed = jax.jit(functools.partial(xla.mix_by_tiles, activation="silu"))
    held = computed.lower(*given).compile().memory_analysis().temp_size_in_bytes
    assert held < sum(x.size for x in given[1:4]) / 2
