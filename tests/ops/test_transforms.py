"""The operations under jax's transformations, with the kernels that the CPU takes by default."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.extend.core import Primitive, primitives
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import dlm_kernels
from dlm_kernels import masks
from dlm_kernels.ops.soft_embedding import CHUNK


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def loss_of_attention(query, key, value):
    out, lse = dlm_kernels.attention(query, key, value, mask=masks.block_causal(24, 8), return_lse=True)
    return jnp.sum(out * out) + jnp.sum(lse)


KEY = jax.random.key(7)
EXPERT = jax.random.randint(KEY, (4, 6, 2), 0, 5)
EXPERTS = normal(8, 5, 40, 24), normal(9, 5, 40, 24), normal(10, 5, 24, 40)
WEIGHT = normal(8, 40, 24)
# Each takes arrays with the batch first; [4, ...] so that it splits over the 4 devices of conftest.py.
OPERATIONS = {
    "attention": (
        lambda q, k, v: dlm_kernels.attention(q, k, v, mask=masks.block_causal(24, 8)),
        (normal(1, 4, 24, 4, 32), normal(2, 4, 24, 2, 32), normal(3, 4, 24, 2, 32)),
    ),
    "gradient of attention": (
        jax.grad(loss_of_attention, (0, 1, 2)),
        (normal(1, 4, 24, 4, 32), normal(2, 4, 24, 2, 32), normal(3, 4, 24, 2, 32)),
    ),
    "score_tokens": (
        lambda logits: dlm_kernels.score_tokens(logits, confidence="margin", temperature=0.5, noise=jnp.zeros(logits.shape)),
        (normal(4, 4, 6, 301),),
    ),
    "unmask_step": (
        lambda logits, tokens: dlm_kernels.unmask_step(logits, tokens, mask_id=300, num_unmask=2),
        (normal(4, 4, 6, 301), jnp.full((4, 6), 300)),
    ),
    "mix_guidance": (lambda c, u: dlm_kernels.mix_guidance(c, u, 1.5), (normal(5, 4, 6, 301), normal(6, 4, 6, 301))),
    "combine_guidance": (
        lambda a, b: dlm_kernels.combine_guidance(jnp.stack([a, b]), jnp.array([1.5, -0.5])),
        (normal(5, 4, 6, 301), normal(6, 4, 6, 301)),
    ),
    "truncate_logits": (lambda x: dlm_kernels.truncate_logits(x, top_p=0.8, top_k=200, temperature=0.5), (normal(5, 4, 6, 301),)),
    "lm_head_scores": (
        lambda hidden: dlm_kernels.lm_head_scores(hidden, normal(8, 301, 40)),
        (normal(7, 4, 6, 40),),
    ),
    "lm_head_scores of a packed head": (
        lambda hidden: dlm_kernels.lm_head_scores(hidden, dlm_kernels.pack_lm_head(normal(8, 301, 40))),
        (normal(7, 4, 6, 40),),
    ),
    "masked_cross_entropy": (
        lambda hidden, targets: dlm_kernels.masked_cross_entropy(
            hidden, normal(8, 301, 40), targets, jnp.ones(targets.shape), reduction="none"
        ),
        (normal(7, 4, 6, 40), jax.random.randint(KEY, (4, 6), 0, 301)),
    ),
    "gradient of masked_cross_entropy": (
        jax.grad(
            lambda hidden, targets: dlm_kernels.masked_cross_entropy(hidden, normal(8, 301, 40), targets, jnp.ones(targets.shape))
        ),
        (normal(7, 4, 6, 40), jax.random.randint(KEY, (4, 6), 0, 301)),
    ),
    "masked_divergence": (
        lambda hidden, target: dlm_kernels.masked_divergence(
            hidden, normal(8, 301, 40), target, normal(9, 301, 24), jnp.ones(hidden.shape[:2]), reduction="none"
        ),
        (normal(7, 4, 6, 40), normal(10, 4, 6, 24)),
    ),
    "gradient of masked_divergence": (
        jax.grad(
            lambda hidden, target: dlm_kernels.masked_divergence(
                hidden, normal(8, 301, 40), target, normal(9, 301, 24), jnp.ones(hidden.shape[:2])
            )
        ),
        (normal(7, 4, 6, 40), normal(10, 4, 6, 24)),
    ),
    "matmul": (lambda x: dlm_kernels.matmul(x, WEIGHT), (normal(7, 4, 6, 40),)),
    "mix_experts": (
        lambda x, expert, weight: dlm_kernels.mix_experts(x, *EXPERTS, expert, weight),
        (normal(7, 4, 6, 40), EXPERT, normal(11, 4, 6, 2)),
    ),
    "soft_embedding": (lambda hidden: dlm_kernels.soft_embedding(hidden, normal(8, 301, 40)), (normal(7, 4, 6, 40),)),
}
every_operation = pytest.mark.parametrize("name", OPERATIONS)


def same(got, expected):
    """To the bit: the CPU kernels' rows depend on nothing but themselves."""
    jax.tree.map(np.testing.assert_array_equal, got, expected)


@every_operation
def test_the_cpu_kernels_are_what_runs(name):
    function, arrays = OPERATIONS[name]
    choices = dlm_kernels.explain(function, *arrays)
    assert choices and all(choice.implementations["cpu"] == "cpu" for choice in choices)


@every_operation
def test_jit(name):
    function, arrays = OPERATIONS[name]
    same(jax.jit(function)(*arrays), function(*arrays))


OWN_WORK = "combine_guidance", "score_tokens", "gradient of attention"  # the lambdas' own: a stack, noise, a square


@pytest.mark.parametrize("name", [name for name in OPERATIONS if name not in OWN_WORK])
def test_outside_of_a_program_no_step_but_the_kernel_takes_the_logits(name, monkeypatch):
    """JAX runs a reshape by itself as a copy; of logits or of a head that would take longer than the kernel."""
    function, arrays = OPERATIONS[name]
    most = max(array.size for array in arrays)

    def watched(primitive, run):
        def impl(*operands, **options):
            assert all(np.size(operand) < most for operand in operands), f"{primitive} on its own"
            return run(*operands, **options)

        return impl

    for primitive in vars(primitives).values():
        if isinstance(primitive, Primitive) and primitive.name not in ("jit", "custom_vjp_call"):
            monkeypatch.setattr(primitive, "impl", watched(primitive, primitive.impl))
    function(*arrays)


@pytest.mark.parametrize("name", ["attention", "gradient of attention", "unmask_step", "mix_guidance"])
def test_jit_with_64_bits(name):
    function, arrays = OPERATIONS[name]
    expected = function(*arrays)
    with jax.enable_x64(True):
        got = jax.jit(lambda *arrays: function(*arrays))(*arrays)
    same(got, expected)
    assert [x.dtype for x in jax.tree.leaves(got)] == [x.dtype for x in jax.tree.leaves(expected)]


@every_operation
def test_vmap(name):
    function, arrays = OPERATIONS[name]
    stacked = [jnp.stack([array, array[::-1]]) for array in arrays]
    expected = [function(*arrays), function(*(array[::-1] for array in arrays))]
    same(jax.vmap(function)(*stacked), jax.tree.map(lambda *parts: jnp.stack(parts), *expected))


@every_operation
def test_vmap_of_vmap_and_over_nothing(name):
    function, arrays = OPERATIONS[name]
    mapped = jax.vmap(jax.vmap(function))
    expected = function(*arrays)
    same(mapped(*(array[None, None] for array in arrays)), jax.tree.map(lambda x: x[None, None], expected))
    nothing = mapped(*(array[None, None][:0] for array in arrays))
    assert [x.shape for x in jax.tree.leaves(nothing)] == [(0, 1, *x.shape) for x in jax.tree.leaves(expected)]


@every_operation
def test_sharded_batch(name):
    function, arrays = OPERATIONS[name]
    mesh = Mesh(np.array(jax.devices("cpu")[:4]), ("data",))
    split = [jax.device_put(array, NamedSharding(mesh, PartitionSpec("data"))) for array in arrays]
    same(jax.jit(function)(*split), function(*arrays))
    mapped = jax.shard_map(function, mesh=mesh, in_specs=PartitionSpec("data"), out_specs=PartitionSpec("data"), check_vma=False)
    same(jax.jit(mapped)(*arrays), function(*arrays))
    checked = jax.shard_map(function, mesh=mesh, in_specs=PartitionSpec("data"), out_specs=PartitionSpec("data"))
    same(jax.jit(checked)(*arrays), function(*arrays))
    assert "not pallas: within shard_map it takes check_vma=False" in str(dlm_kernels.explain(checked, *arrays))


def test_a_sharded_batch_where_all_query_heads_share_one_kv_head():
    function, arrays = jax.grad(loss_of_attention, (0, 1, 2)), (normal(1, 4, 24, 4, 32), *normal(2, 2, 4, 24, 1, 32))
    mesh = Mesh(np.array(jax.devices("cpu")[:4]), ("data",))
    split = jax.device_put(arrays, NamedSharding(mesh, PartitionSpec("data")))
    same(jax.jit(function)(*split), function(*arrays))


@pytest.mark.parametrize("name", ["score_tokens", "gradient of attention"])
def test_a_shard_map_over_which_no_array_is_split(name):
    """It checks what varies, which no array of the call does."""
    function, arrays = OPERATIONS[name]
    mesh = Mesh(np.array(jax.devices("cpu")[:4]), ("data",))
    mapped = jax.shard_map(function, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec())
    same(jax.jit(mapped)(*arrays), function(*arrays))


def test_sharded_batch_with_jax_set_to_gspmd():
    """It asks after the results' sharding; where none tells, it ends the process."""
    function, arrays = OPERATIONS["score_tokens"]
    mesh = Mesh(np.array(jax.devices("cpu")[:4]), ("data",))
    split = [jax.device_put(array, NamedSharding(mesh, PartitionSpec("data"))) for array in arrays]
    jax.config.update("jax_use_shardy_partitioner", False)
    try:
        results = jax.jit(function)(*split)
    finally:
        jax.config.update("jax_use_shardy_partitioner", True)
    same(results, function(*arrays))
    assert all(x.sharding.spec[0] == "data" for x in results)


@pytest.mark.parametrize("shape", [(4,), (2, 2)])
@pytest.mark.parametrize("loss", ["masked_cross_entropy", "masked_divergence"])
def test_gradients_of_what_devices_share(loss, shape):
    """Within a shard_map over the batch, also one around arrays whose length explicit axes split."""
    hidden, weight, targets = normal(1, 4, 6, 40), normal(2, 301, 40), (jax.random.randint(KEY, (4, 6), 0, 301),)
    if loss == "masked_divergence":
        targets = normal(3, 4, 6, 24), normal(4, 301, 24)
    mesh = jax.make_mesh(shape, ("data", "length")[: len(shape)], devices=jax.devices("cpu")[:4])

    def gradients(hidden, weight, *targets):
        ones = jnp.ones(hidden.shape[:2])
        return jax.grad(lambda *x: getattr(dlm_kernels, loss)(*x, *targets, ones), (0, 1))(hidden, weight)

    arrays, whole = (hidden, weight, *targets), PartitionSpec()
    in_specs = (PartitionSpec("data"), whole, PartitionSpec("data"), whole)[: len(arrays)]
    placed = [NamedSharding(mesh, PartitionSpec(*mesh.axis_names) if spec else whole) for spec in in_specs]
    mapped = jax.shard_map(gradients, mesh=mesh, in_specs=in_specs, out_specs=in_specs[:2], axis_names={"data"})
    with jax.set_mesh(mesh):
        results = jax.jit(mapped)(*map(jax.device_put, arrays, placed))
    for got, expected in zip(results, gradients(*arrays), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@every_operation
def test_a_mesh_of_explicit_axes(name):
    """As jax.make_mesh makes it, where every array's type tells how it is split."""
    function, arrays = OPERATIONS[name]
    mesh = jax.make_mesh((4,), ("data",), devices=jax.devices("cpu")[:4])
    split = [jax.device_put(x, NamedSharding(mesh, PartitionSpec("data"))) for x in arrays]
    with jax.set_mesh(mesh):
        results = jax.jit(function)(*split)
    same(results, function(*arrays))
    if name != "soft_embedding":  # to which all positions are queries of one sequence, which is kept whole
        assert all(x.sharding.spec[0] == "data" for x in jax.tree.leaves(results))


@every_operation
@pytest.mark.parametrize("batch", [None, "batch"])
def test_a_length_split_by_explicit_axes(name, batch):
    """Alone or beside the batch: the parts of a length would be strips of the rows that a kernel sees."""
    function, arrays = OPERATIONS[name]
    mesh = jax.make_mesh((2, 2), ("batch", "length"), devices=jax.devices("cpu")[:4])
    split = jax.device_put(arrays, NamedSharding(mesh, PartitionSpec(batch, "length")))
    with jax.set_mesh(mesh):
        results = jax.jit(function)(*split)
    same(results, function(*arrays))
    if name not in ("attention", "unmask_step", "soft_embedding"):  # which need the whole sequence
        assert all(x.sharding.spec[:2] == (batch, "length") for x in jax.tree.leaves(results))


@pytest.mark.parametrize("per_row, split", [(False, ("batch", "length")), (True, (None, "length"))])
def test_a_random_confidence_is_split_as_the_scores_are(per_row, split):
    """JAX draws it whole, or as the keys are split."""
    logits, tokens, keys = normal(4, 4, 6, 301), jnp.full((4, 6), 300), jax.random.split(KEY, 4) if per_row else KEY
    mesh = jax.make_mesh((2, 2), ("batch", "length"), devices=jax.devices("cpu")[:4])

    def function(logits, tokens, keys):
        options = dict(confidence="random", key=keys)
        scores = dlm_kernels.score_tokens(logits, active=tokens == 300, **options)
        return scores, dlm_kernels.unmask_step(logits, tokens, mask_id=300, num_unmask=2, **options)

    specs = PartitionSpec(*split), PartitionSpec(*split), PartitionSpec("batch") if per_row else PartitionSpec()
    placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip((logits, tokens, keys), specs)]
    expected = function(logits, tokens, keys)
    same(function(*placed[:2], keys), expected)
    with jax.set_mesh(mesh):
        got = jax.jit(function)(*placed)
    same(got, expected)
    assert got[0].confidence.sharding.spec == specs[0]


MASKS = {
    "packed": lambda lengths, ids: masks.packed(ids),
    "block_causal": lambda lengths, ids: masks.block_causal(12, 4, segment_ids=ids),
    "cache": lambda lengths, ids: masks.cache(12, lengths),
    "two runs": lambda lengths, ids: masks.cache(12, lengths, block_start=8, block_stop=12) & masks.sliding_window(12, 4, 4),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks_of_what_explicit_axes_split(name):
    """Beside ends that are the same for all rows, which are not split."""
    lengths, ids = jnp.array([3, 12, 0, 7]), jnp.arange(48).reshape(4, 12) // 5
    mesh = jax.make_mesh((2, 2), ("batch", "length"), devices=jax.devices("cpu")[:4])
    split = jax.device_put((lengths, ids), tuple(NamedSharding(mesh, PartitionSpec(*x)) for x in (["batch"], ["batch", "length"])))

    def bounds(lengths, ids):
        return masks.bounds(MASKS[name](lengths, ids), 12)

    expected = bounds(lengths, ids)
    same(bounds(*split), expected)
    with jax.set_mesh(mesh):
        got = jax.jit(bounds)(*split)
    same(got, expected)
    assert got.sharding.spec[0] == "batch"


TARGETS = jax.random.randint(KEY, (4, 6), 0, 300)
SUMS = {
    "masked_cross_entropy": lambda x, head, weights: dlm_kernels.masked_cross_entropy(x, head, TARGETS, weights),
    "masked_divergence": lambda x, head, weights: dlm_kernels.masked_divergence(x, head, x[..., :24], head[:, :24], weights),
    "mix_guidance": lambda x, head, weights: jnp.sum(dlm_kernels.mix_guidance(x, x[..., ::-1], weights) ** 2),
    "soft_embedding": lambda x, head, weights: jnp.sum(weights[..., None] * dlm_kernels.soft_embedding(x, head)),
    "soft_embedding by chunks": lambda x, head, weights: jnp.sum(
        weights[..., None] * dlm_kernels.soft_embedding(x, head, implementation="xla")
    ),
}


@pytest.mark.parametrize("name", SUMS)
def test_gradients_where_explicit_axes_split_batch_and_length(name):
    """With weights that are split alike, which JAX multiplies by no results that are split otherwise, and a head split too."""
    # Logits of about one: of greater ones float32 rounds more than the tolerance.
    arrays = normal(7, 4, 6, 40) * 40**-0.5, normal(8, CHUNK + 4, 40), normal(9, 4, 6)
    value_and_gradients = jax.jit(jax.value_and_grad(SUMS[name], (0, 1, 2)))
    mesh = jax.make_mesh((2, 2), ("batch", "length"), devices=jax.devices("cpu")[:4])
    rows, head = (NamedSharding(mesh, PartitionSpec(*spec)) for spec in (("batch", "length"), ("length",)))
    with jax.set_mesh(mesh):
        got = value_and_gradients(*jax.device_put(arrays, (rows, head, rows)))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), got, value_and_gradients(*arrays))
    assert [x.sharding.spec[0] for x in got[1]] == ["batch", "length", "batch"]


def test_a_gradient_of_guidance_whose_streams_are_split_differently():
    mesh = jax.make_mesh((2, 2), ("batch", "length"), devices=jax.devices("cpu")[:4])
    arrays = normal(1, 4, 6, 9), normal(2, 4, 6, 9), normal(3, 4, 6)
    specs = (None, "length"), ("batch",), ()
    function = jax.grad(lambda *x: jnp.sum(dlm_kernels.mix_guidance(*x) ** 2), (0, 1, 2))
    with jax.set_mesh(mesh):
        got = jax.jit(function)(*(jax.device_put(x, PartitionSpec(*spec)) for x, spec in zip(arrays, specs)))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6), got, function(*arrays))


@every_operation
@pytest.mark.parametrize("split", [(None, "data"), ("data", None), ("data", "other")])
def test_vmap_over_arrays_of_explicit_axes(name, split):
    """In all but the first the mapped axis itself is split over devices."""
    function, arrays = OPERATIONS[name]
    mesh = jax.make_mesh((2, 2), ("data", "other"), devices=jax.devices("cpu")[:4])
    stacked = [jnp.stack([array, array[::-1]]) for array in arrays]
    placed = [jax.device_put(x, NamedSharding(mesh, PartitionSpec(*split))) for x in stacked]
    same(jax.jit(jax.vmap(function))(*placed), jax.vmap(function)(*stacked))


@every_operation
def test_shard_map_over_some_axes(name):
    """Over the others the arrays are split too, which is left to the compiler."""
    function, arrays = OPERATIONS[name]
    mesh = Mesh(np.array(jax.devices("cpu")[:4]).reshape(2, 2), ("data", "other"))
    split = [jax.device_put(x, NamedSharding(mesh, PartitionSpec(("data", "other")))) for x in arrays]
    specs = dict(in_specs=PartitionSpec("data"), out_specs=PartitionSpec("data"))
    mapped = jax.shard_map(function, mesh=mesh, axis_names={"data"}, check_vma=False, **specs)
    same(jax.jit(mapped)(*split), function(*arrays))


@every_operation
@pytest.mark.parametrize("axis", [1, 2, 3])
def test_arrays_split_along_any_axis(name, axis):
    """Also along those that a kernel needs whole, such as the length or the vocabulary."""
    function, arrays = OPERATIONS[name]
    mesh = Mesh(np.array(jax.devices("cpu")[:4]).reshape(2, 2), ("data", "other"))
    spec = ["data", *[None] * (axis - 1), "other"]
    split = [
        jax.device_put(x, NamedSharding(mesh, PartitionSpec(*(spec if x.ndim > axis and x.shape[axis] % 2 == 0 else spec[:1]))))
        for x in arrays
    ]
    same(jax.jit(function)(*split), function(*arrays))


@pytest.mark.parametrize("axis", [AxisType.Auto, AxisType.Explicit])
def test_arrays_split_over_one_axis_of_the_mesh_each_along_another(axis):
    function, (query, key, value) = OPERATIONS["attention"]
    mesh = jax.make_mesh((2,), ("data",), axis_types=(axis,), devices=jax.devices("cpu")[:2])
    batch, heads = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec(None, None, "data"))
    split = jax.device_put((query, key, value), (batch, heads, heads))
    same(jax.jit(function)(*split), function(query, key, value))


def test_arrays_split_over_different_axes_of_the_mesh_are_split_as_the_first():
    function, (query, key, value) = OPERATIONS["attention"]
    mesh = jax.make_mesh((2, 2), ("data", "other"), devices=jax.devices("cpu")[:4])
    data, other = (NamedSharding(mesh, PartitionSpec(axis)) for axis in ("data", "other"))
    out = function(*jax.device_put((query, key, value), (data, other, other)))
    same(out, function(query, key, value))
    assert out.sharding.spec[0] == "data"


def test_an_array_of_no_mesh_beside_some_of_explicit_axes():
    function, (query, key, value) = OPERATIONS["attention"]
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices("cpu")[:2])
    split = jax.device_put((key, value), NamedSharding(mesh, PartitionSpec("data")))
    same(function(query, *split), function(query, key, value))


UNCHECKED = dlm_kernels.export_checks()


@every_operation
def test_export(name):
    function, arrays = OPERATIONS[name]
    exported = export.export(jax.jit(function), disabled_checks=UNCHECKED)(*arrays)
    assert "dlm_kernels_" in exported.mlir_module()
    assert exported.platforms == ("cpu",)
    same(jax.tree.leaves(exported.call(*arrays)), jax.tree.leaves(function(*arrays)))


@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda"])
def test_symbolic_sizes_are_exported(platform):
    """By the CPU's kernels; the others' tiles are chosen for sizes that are known, so that XLA's code is exported there."""
    rows, length = export.symbolic_shape("rows, length")

    def denoise(logits, query, tokens, x, expert):
        attended = dlm_kernels.attention(query, query, query)
        mixed, back = jax.vjp(lambda x: dlm_kernels.mix_experts(x, *EXPERTS, expert, jnp.ones(expert.shape)), x)
        return attended, dlm_kernels.unmask_step(logits, tokens, mask_id=3, num_unmask=2), mixed, back(x)

    shapes = ((rows, length, 9), jnp.float32), ((rows, length, 2, 16), jnp.float32), ((rows, length), jnp.int32)
    shapes += ((rows, length, 40), jnp.float32), ((rows, length, 2), jnp.int32)
    sizes = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    exported = export.export(jax.jit(denoise), platforms=[platform], disabled_checks=UNCHECKED)(*sizes)
    assert ("dlm_kernels_attention" in exported.mlir_module()) == (platform == "cpu")
    arrays = normal(1, 2, 5, 9), normal(2, 2, 5, 2, 16), jnp.full((2, 5), 3), normal(7, 2, 5, 40), EXPERT[:2, :5]
    if platform == "cpu":
        same(jax.tree.leaves(exported.call(*arrays)), jax.tree.leaves(denoise(*arrays)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_packed_head_is_an_argument(dtype):
    hidden, weight = normal(7, 2, 6, 40).astype(dtype), normal(8, 301, 40).astype(dtype)
    expected = dlm_kernels.lm_head_scores(hidden, weight)
    same(jax.jit(dlm_kernels.lm_head_scores)(hidden, jax.jit(dlm_kernels.pack_lm_head)(weight)), expected)
    rows = dlm_kernels.pack_lm_head(weight, implementation="xla")
    assert rows.array is weight
    same(dlm_kernels.lm_head_scores(hidden, rows), expected)
    # One head for each entry: none of them may be read as another's.
    heads = jax.vmap(dlm_kernels.pack_lm_head)(jnp.stack([weight, -weight]))
    got = jax.vmap(dlm_kernels.lm_head_scores)(jnp.stack([hidden, -hidden]), heads)
    same(got, jax.tree.map(lambda x: jnp.stack([x, x]), expected))


@pytest.mark.parametrize("wrt", range(3))
def test_gradient_of_attention_by_finite_differences(wrt):
    query, key, value = (x.astype(jnp.float32) for x in (normal(1, 1, 5, 2, 8), normal(2, 1, 7, 1, 8), normal(3, 1, 7, 1, 8)))
    mask = masks.padding(jnp.array([6]), 5, 7)

    def loss(*arrays):
        out, lse = dlm_kernels.attention(*arrays, mask=mask, return_lse=True, logits_soft_cap=5.0)
        return jnp.sum(out * normal(9, *out.shape)) + jnp.sum(lse * normal(10, *lse.shape))

    arrays = [query, key, value]
    direction = normal(11, *arrays[wrt].shape)
    slope = jnp.vdot(jax.grad(loss, wrt)(*arrays), direction)
    step = 1e-2  # float32 differences: rounding 1e-7 / 1e-2, curvature 1e-4
    ends = [loss(*(a + sign * step * direction if i == wrt else a for i, a in enumerate(arrays))) for sign in (1, -1)]
    np.testing.assert_allclose((ends[0] - ends[1]) / (2 * step), slope, rtol=2e-2, atol=2e-3)


def test_gradient_under_jit_and_vmap():
    hidden, weight, targets = normal(1, 3, 2, 5, 16), normal(2, 50, 16), jax.random.randint(KEY, (3, 2, 5), 0, 50)

    def loss(hidden, weight, targets):
        return dlm_kernels.masked_cross_entropy(hidden, weight, targets, jnp.ones(targets.shape))

    gradient = jax.jit(jax.vmap(jax.grad(loss, (0, 1)), in_axes=(0, None, 0)))(hidden, weight, targets)
    for i in range(3):
        alone = jax.grad(loss, (0, 1))(hidden[i], weight, targets[i])
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6), [g[i] for g in gradient], list(alone))


def test_a_loss_of_weights_below_zero():
    hidden, weight, targets, weights = normal(1, 2, 5, 16), normal(2, 50, 16), jnp.zeros((2, 5), int), normal(5, 2, 5)
    loss = dlm_kernels.masked_cross_entropy(hidden, weight, targets, weights, reduction="none")
    same(loss, weights * dlm_kernels.masked_cross_entropy(hidden, weight, targets, jnp.ones((2, 5)), reduction="none"))


@pytest.mark.parametrize("wrt", range(5))
def test_gradient_of_divergence(wrt):
    """Against automatic differentiation of the naive code: of the model and the weights; the target is a constant."""
    hidden, weight, target, target_weight = normal(1, 2, 5, 16), normal(2, 50, 16), normal(3, 2, 5, 24), normal(4, 50, 24)
    # Of one sign: of both the terms, 91 in all, would cancel to 0.8, and with them the digits that can agree.
    weights = jnp.abs(normal(5, 2, 5)).at[0, 3].set(0)

    def naive(hidden, weight, target, target_weight, weights):
        p, q = (jax.nn.log_softmax(jnp.einsum("bld,vd->blv", h, w)) for h, w in ((target, target_weight), (hidden, weight)))
        kl = jnp.where(weights == 0, 0, jnp.sum(jnp.exp(p) * (p - q), -1))
        return jnp.sum(weights * kl)

    arrays = hidden, weight, target, target_weight, weights
    np.testing.assert_allclose(dlm_kernels.masked_divergence(*arrays), naive(*arrays), rtol=1e-5)
    got, expected = (jax.grad(function, wrt)(*arrays) for function in (dlm_kernels.masked_divergence, naive))
    np.testing.assert_allclose(got, jnp.zeros_like(got) if wrt in (2, 3) else expected, rtol=1e-4, atol=1e-5)


def test_what_has_no_derivative_says_so_and_how_to_do_without():
    logits, tokens = normal(4, 2, 6, 301), jnp.full((2, 6), 300)

    def sure(logits):
        return dlm_kernels.score_tokens(logits).confidence.sum()

    def of_committed(logits):
        """Differentiable beside the step, whose results are integers."""
        scores = dlm_kernels.TokenScores(tokens, *(logits[..., i] for i in range(3)))
        return jnp.sum(logits[..., 0] * dlm_kernels.unmask_topk(tokens, scores, mask_id=300, num_unmask=2).unmasked)

    refused = "has no derivative: put jax.lax.stop_gradient around its arguments"
    with pytest.raises(ValueError, match=f"score_tokens {refused}"):
        jax.grad(sure)(logits)
    assert not jax.grad(lambda x: x.sum() * 0 + sure(jax.lax.stop_gradient(x)))(logits).any()
    assert jax.jit(jax.grad(of_committed))(logits).sum() == 4
    query = normal(1, 1, 5, 2, 8)
    gradient = jax.grad(lambda q: dlm_kernels.attention(q, query, query).sum())
    with pytest.raises(ValueError, match=f"the gradient of attention {refused}"):
        jax.grad(lambda q: gradient(q).sum())(query)
