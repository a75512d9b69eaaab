"""How a call's arrays are split over devices, from the letters of their axes: the same letter is split alike in all of them.

There are two ways. Along a mesh's auto axes the compiler splits, and asks how (`partitioned`); along its explicit axes, which are
in the arrays' types, a shard_map around the call does (`by_parts`).
"""

import itertools
import math

import jax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec


def axis_names(axes, shapes):
    """The axes' letters, with "1" for an axis of size 1 that broadcasts: it can be neither split nor folded into."""
    size = {}
    for letters, shape in zip(axes, shapes, strict=True):
        for letter, n in zip(letters, shape, strict=True):
            size[letter] = n if size.get(letter, 1) == 1 else size[letter]
    return tuple(
        "".join("1" if n == 1 and size[letter] != 1 else letter for letter, n in zip(letters, shape))
        for letters, shape in zip(axes, shapes)
    )


def head_factors(leaf, operands):
    """Of what factors Shardy's rule takes query heads to be, where the leaf has some, and the size of those that it cannot know:
    kv heads k times g, of which it allows none of size 1 beside another.
    """
    axes = dict(leaf.operands)
    if "n" not in axes.get("query", "") or "k" not in axes.get("key", ""):
        return "k", {}
    heads, kv_heads = (operands[name].shape[axes[name].index(letter)] for name, letter in (("query", "n"), ("key", "k")))
    if heads == kv_heads:
        return "k", {}
    return ("g", {}) if kv_heads == 1 else ("(k g)", {"g": heads // kv_heads})


def partitioned(leaf, run, axes, heads):
    """`run` as a function that the compiler may split over devices, along the axes that the leaf allows."""
    function = custom_partitioning(run)

    def split(mesh, arg_shapes, terms):
        # Within a shard_map over some axes alone JAX gives shardings that tell nothing of axes.
        specs = [getattr(a.sharding, "spec", PartitionSpec()) for a in arg_shapes]
        return _split(leaf.sharded, axes, mesh, [(a.shape, spec) for a, spec in zip(arg_shapes, specs)], terms)

    def alone(*arrays):
        """One device's part, which has no mesh: the call's own may have explicit axes, of which the part knows nothing."""
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
            return run(*arrays)

    def partition(mesh, arg_shapes, result_shapes):
        return mesh, alone, split(mesh, arg_shapes, leaf.results), split(mesh, arg_shapes, axes)

    def infer(mesh, arg_shapes, result_shapes):
        """Only GSPMD asks."""
        return split(mesh, arg_shapes, leaf.results)

    function.def_partition(
        partition=partition,
        infer_sharding_from_operands=infer,
        sharding_rule=_sharding_rule(leaf, axes, heads[0]),
        **heads[1],
    )
    return function


def _sharding_rule(leaf, axes, heads):
    """Shardy's einsum-like rule; query heads n are as `head_factors` has them, and each broadcast axis gets a factor of its own."""
    unique = (f"u{i}" for i in itertools.count())
    own = {"n": heads}

    def term(names):
        return " ".join(next(unique) if letter == "1" else own.get(letter, letter) for letter in names)

    return ", ".join(map(term, axes)) + " -> " + ", ".join(map(term, leaf.results))


def by_parts(function, arrays, axes, results, sharded):
    """function(*arrays), on each device of its part where explicit axes of a mesh split any: there the compiler splits nothing.

    `axes` and `results` are the letters of the arrays and of what the function returns; those in `sharded` may be split. None: all
    may, and the compiler splits the function as along auto axes.
    """
    if (mesh := explicit_mesh(arrays)) is None:
        return function(*arrays)
    axes = axis_names(axes, [array.shape for array in arrays])
    described = [(array.shape, jax.typeof(array).sharding.spec) for array in arrays]
    may_split = "".join(axes) if sharded is None else sharded
    operands, results = (_split(may_split, axes, mesh, described, terms) for terms in (axes, results))
    if sharded is None:
        return jax.sharding.auto_axes(function, out_sharding=results)(*arrays)
    in_specs, out_specs = (tuple(x.spec for x in shardings) for shardings in (operands, results))
    of_parts = jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    # Within a shard_map that checks, the results of one that does not are known to vary over nothing.
    return varying_as(arrays, of_parts(*map(jax.sharding.reshard, arrays, operands)))


def on_whole_arrays(function, arrays):
    """function(*arrays) on every device of their mesh, where explicit axes of it split any; of a split array none can map."""
    if (mesh := explicit_mesh(arrays)) is None:
        return function(*arrays)
    spec = PartitionSpec()
    function = jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    return function(*(jax.sharding.reshard(array, NamedSharding(mesh, spec)) for array in arrays))


def whole(array, begin=0):
    """`array`, made whole along its axes from `begin` on, where explicit axes of a mesh split them."""
    kind = jax.typeof(array).sharding
    if not any(kind.spec[begin:]):
        return array
    return jax.sharding.reshard(array, NamedSharding(kind.mesh, PartitionSpec(*kind.spec[:begin])))


def _split(sharded, axes, mesh, operands, terms):
    """Shardings of arrays with these axes, given each operand's (shape, spec): each letter that may be split is, in all of them, as
    the first operand has it that splits it. The rule does not keep the others whole: an array may come split along any axis.
    """
    spec, used = {}, set()
    for names, (shape, parts) in zip(axes, operands):
        for letter, part, n in zip(names, parts, shape):
            over = part if isinstance(part, tuple) else () if part is None else (part,)
            even = n % math.prod(mesh.shape[axis] for axis in over) == 0
            if over and letter in sharded and letter not in spec and even and used.isdisjoint(over):
                spec[letter] = part
                used.update(over)
    spec["n"] = spec.get("k")
    return tuple(NamedSharding(mesh, PartitionSpec(*(spec.get(letter) for letter in names))) for names in terms)


def explicit_mesh(arrays):
    """The mesh by whose explicit axes any of these arrays is split, or None."""
    shardings = [jax.typeof(array).sharding for array in arrays]
    split = any(axis is not None for sharding in shardings for axis in sharding.spec)
    return next(sharding.mesh for sharding in shardings if not sharding.mesh.empty) if split else None


def typed_as(inputs, gradients):
    """Gradients typed as their inputs: summed over devices that shard_map knows to share one, split as explicit axes split it."""

    def typed(x, gradient):
        over = tuple(varying(gradient) - varying(x))
        gradient = jax.lax.psum(gradient, over) if over else gradient
        return split_as(x, gradient)

    return tuple(map(typed, inputs, gradients))


def split_as(other, array):
    """`array`, split as explicit axes split the other."""
    here, there = jax.typeof(array).sharding, jax.typeof(other).sharding
    mesh = here.mesh if there.mesh.empty else there.mesh
    return array if here.spec == there.spec else jax.sharding.reshard(array, NamedSharding(mesh, there.spec))


def varying(array):
    """The mesh's axes over which this array is known to vary: of what shard_map checks, which is not told of FFI calls."""
    return jax.typeof(array).manual_axis_type.varying


def checked():
    """Whether a shard_map around the call checks over which of the mesh's axes arrays vary, be it none of the call's."""
    axes = jax.sharding.get_abstract_mesh().manual_axes
    known = jax.eval_shape(lambda: jax.lax.axis_index(axes[0])).manual_axis_type if axes else None
    return known is not None and bool(known.varying)


def varying_by_name(leaf, arrays):
    """{name: array} of a leaf's operands. Within a shard_map that checks they vary alike: else the derivative in the kernel would
    be a sum over devices, and be summed over them again.
    """
    alike = varying_as(arrays, arrays)
    return {name: array for (name, _), array in zip(leaf.operands, alike, strict=True)}


def varying_as(arrays, results):
    """The results, known to vary over the axes over which the arrays do."""
    over = frozenset().union(*map(varying, arrays))
    return tuple(jax.lax.pcast(x, tuple(over - varying(x)), to="varying") if over - varying(x) else x for x in results)
