"""Chooses a kernel for a call and makes it work under jit, vmap and sharding.

An operation describes its kernel once, as a `Leaf`: the name, and the axes of every operand and result in letters.
`call` then nests `custom_vmap(custom_partitioning(platform_dependent(kernels)))`, without the middle one on a TPU (one_device.py).
The order matters: custom_partitioning has no batching rule of its own, and a gradient (`custom_vjp`, in the operation's file) must
be outside of both.
"""

import contextlib
import contextvars
import dataclasses
import functools
import importlib
import importlib.util
import math

import jax

# The TPU kernels import it too, but within a trace, after which JAX 0.12 would trace and compile the same function once more.
import jax.experimental.pallas.tpu
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dlm_kernels import triton_kernels
from dlm_kernels.ops import one_device

PACKAGES = {
    "cpu": "cpu_kernels",
    "triton": "triton_kernels",
    "cudnn": "cudnn",
    "pallas": "pallas_kernels",
    "xla": "xla",
}
PLATFORM_KERNELS = {"cpu": "cpu", "cuda": "triton", "tpu": "pallas"}


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A kernel's contract, the same in every package that implements it.

    `operands` and `results` give each array's axes as letters; the same letter is the same size, or 1 in an operand that
    broadcasts. A batched axis is folded into `fold`; the axes in `sharded` may be split over devices, the others may not.
    """

    module: str
    name: str
    operands: tuple[tuple[str, str], ...]
    results: tuple[str, ...]
    fold: str
    sharded: str


@dataclasses.dataclass(frozen=True, repr=False)
class Choice:
    """Which implementation a call takes on each platform, and why not the others."""

    kernel: str
    implementations: dict[str, str]
    refused: dict[str, str]

    def __repr__(self):
        lines = [f"{self.kernel}: " + ", ".join(f"{i} on {p}" for p, i in self.implementations.items())]
        lines += [f"  not {name}: {reason}" for name, reason in self.refused.items()]
        return "\n".join(lines)


_recorder: contextvars.ContextVar[list | None] = contextvars.ContextVar("recorder", default=None)
_traced_for = jax.make_user_context(None)


@contextlib.contextmanager
def recording():
    """Collects the `Choice` of every kernel call made inside."""
    token = _recorder.set(choices := [])
    try:
        # Part of the keys of JAX's caches: what was traced before has no calls left to see.
        with _traced_for(object()):
            yield choices
    finally:
        _recorder.reset(token)


def call(leaf, implementation, operands, **static):
    """Runs `leaf` on `operands` (name -> array or None) with the chosen implementation; returns a tuple of arrays.

    What `leaf.fold` is in the kernel may be several axes here, [B, L, V] for "rv", and then is in the results.
    """
    arguments = leaf, implementation, operands, tuple(static.items())
    if (choices := _recorder.get()) is None:
        return _call(*arguments)
    recorded = len(choices)
    with _traced_for(object()):  # a call like an earlier one is seen too
        results = _call(*arguments)
    # Under vmap the call for all entries has recorded itself too, and in a vmap around that one another: the last is what runs.
    choices[recorded:] = choices[recorded:][-1:]
    return results


# One program: outside of any, JAX would copy the logits to reshape them, which takes longer than the kernel.
@functools.partial(jax.jit, static_argnums=(0, 1, 3))
def _call(leaf, implementation, operands, static):
    name, letters = leaf.operands[0]
    begin, extra = letters.index(leaf.fold), operands[name].ndim - len(letters)
    several = operands[name].shape[begin : begin + extra + 1]

    def merge(letters, array):
        at = letters.find(leaf.fold)
        if array is None or at < 0 or not extra:
            return array
        return array.reshape(*array.shape[:at], math.prod(several), *array.shape[at + extra + 1 :])

    def spread(letters, array):
        at = letters.find(leaf.fold)
        return array if at < 0 or not extra else array.reshape(*array.shape[:at], *several, *array.shape[at + 1 :])

    operands = {name: merge(letters, operands[name]) for name, letters in leaf.operands}
    return tuple(map(spread, leaf.results, _run(leaf, implementation, operands, dict(static))))


def _run(leaf, implementation, operands, static):
    choice = _choose(leaf, implementation, operands, static)
    if (choices := _recorder.get()) is not None:
        choices.append(choice)
    present = tuple(name for name, array in operands.items() if array is not None)
    arrays = [operands[name] for name in present]
    axes = _axis_names([dict(leaf.operands)[name] for name in present], [array.shape for array in arrays])
    function = _compiled(
        leaf,
        implementation,
        tuple(choice.implementations.items()),
        present,
        axes,
        _groups(leaf, operands),
        tuple(static.items()),
    )
    if (mesh := _explicit_mesh(arrays)) is not None:
        operands = [(array.shape, jax.typeof(array).sharding.spec) for array in arrays]
        function = _mapped(function, *(_split(leaf, axes, mesh, operands, terms) for terms in (axes, leaf.results)))
    return function(*arrays)


def _explicit_mesh(arrays):
    """The mesh by whose explicit axes any of these arrays is split, or None."""
    shardings = [jax.typeof(array).sharding for array in arrays]
    split = any(axis is not None for sharding in shardings for axis in sharding.spec)
    return next(sharding.mesh for sharding in shardings if not sharding.mesh.empty) if split else None


def typed_as(inputs, gradients):
    """Gradients typed as their inputs: summed over devices that shard_map knows to share one, split as explicit axes split it."""

    def typed(x, gradient):
        over = tuple(_varying(gradient) - _varying(x))
        gradient = jax.lax.psum(gradient, over) if over else gradient
        here, there = jax.typeof(gradient).sharding, jax.typeof(x).sharding
        return gradient if here.spec == there.spec else jax.sharding.reshard(gradient, there)

    return tuple(map(typed, inputs, gradients))


def check(implementation):
    """Raises for a name that none has, which `call` does too: for operations that may have nothing to call."""
    if implementation is not None and not (isinstance(implementation, str) and implementation in PACKAGES):
        raise ValueError(f"implementation: expected one of {sorted(PACKAGES)} or None, got {implementation!r}")


def _choose(leaf, implementation, operands, static):
    check(implementation)
    if implementation is not None:
        if reason := _refusal(leaf, implementation, operands, static):
            raise ValueError(f"implementation={implementation!r} cannot run {leaf.name}: {reason}")
        return Choice(leaf.name, {"default": implementation}, {})
    implementations, refused = {}, {}
    for platform, name in PLATFORM_KERNELS.items():
        if reason := _refusal(leaf, name, operands, static):
            refused[name] = reason
        else:
            implementations[platform] = name
    return Choice(leaf.name, implementations | {"default": "xla"}, refused)


def _refusal(leaf, implementation, operands, static):
    """The reason this implementation cannot run the call, or None."""
    if implementation == "xla":
        return None
    if implementation == "triton" and (reason := triton_kernels.unavailable()):
        return reason
    if implementation == "pallas" and any(_varying(x) for x in operands.values() if x is not None):
        return "within shard_map it takes check_vma=False"
    if not _installed(f"dlm_kernels.{PACKAGES[implementation]}.{leaf.module}"):
        return f"{PACKAGES[implementation]} has no {leaf.module}"
    module = _module(implementation, leaf.module)
    if not hasattr(module, leaf.name):
        return f"{PACKAGES[implementation]}.{leaf.module} has no {leaf.name}"
    return getattr(module, f"supports_{leaf.name}")(**operands, **static)


def _varying(array):
    """The mesh's axes over which this array is known to vary: of what shard_map checks, which is not told of FFI calls."""
    return jax.typeof(array).manual_axis_type.varying


@functools.cache
def _installed(name):
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # its package is missing
        return False


def _module(implementation, module):
    return importlib.import_module(f"dlm_kernels.{PACKAGES[implementation]}.{module}")


def _groups(leaf, operands):
    """Query heads per kv head, where the leaf has both; 1 elsewhere."""
    axes = dict(leaf.operands)
    if "n" not in axes.get("query", "") or "k" not in axes.get("key", ""):
        return 1
    return operands["query"].shape[axes["query"].index("n")] // operands["key"].shape[axes["key"].index("k")]


def _axis_names(axes, shapes):
    """The axes' letters, with "1" for an axis of size 1 that broadcasts: it can be neither split nor folded into."""
    size = {}
    for letters, shape in zip(axes, shapes, strict=True):
        for letter, n in zip(letters, shape, strict=True):
            size[letter] = n if size.get(letter, 1) == 1 else size[letter]
    return tuple(
        "".join("1" if n == 1 and size[letter] != 1 else letter for letter, n in zip(letters, shape))
        for letters, shape in zip(axes, shapes)
    )


@functools.cache
def _compiled(leaf, implementation, implementations, present, axes, groups, static):
    """The jitted, batchable, partitionable function of the `present` operands; cached, or each call would compile anew."""
    kernels = {platform: _kernel(leaf, name, present, static) for platform, name in implementations}
    default = kernels.pop("default")
    tpu = one_device.kernel_or(kernels.pop("tpu"), default) if "tpu" in kernels else default

    def run(*arrays):
        return jax.lax.platform_dependent(*arrays, **kernels, default=default) if kernels else default(*arrays)

    partitioned = _partitioned(leaf, run, axes, groups)

    def anywhere(*arrays):
        return jax.lax.platform_dependent(*arrays, tpu=tpu, default=partitioned)

    return jax.jit(_batched(leaf, implementation, anywhere, present, static))


def _kernel(leaf, implementation, present, static):
    function = getattr(_module(implementation, leaf.module), leaf.name)
    absent = {name: None for name, _ in leaf.operands if name not in present}

    def kernel(*arrays):
        # With 64 bits Python's numbers within a Pallas kernel would have them, which a TPU has not.
        with jax.enable_x64(False) if implementation == "pallas" else contextlib.nullcontext():
            result = function(**dict(zip(present, arrays)), **absent, **dict(static))
        results = tuple(result) if isinstance(result, (tuple, list)) else (result,)
        over = frozenset().union(*map(_varying, arrays))
        return tuple(jax.lax.pcast(x, tuple(over - _varying(x)), to="varying") if over - _varying(x) else x for x in results)

    return kernel


def _batched(leaf, implementation, function, present, static):
    axes = [dict(leaf.operands)[name] for name in present]
    batched_function = custom_vmap(function)

    @batched_function.def_vmap
    def rule(size, batched, *arrays):
        every_result = tuple(True for _ in leaf.results)
        if size == 0:
            one = jax.eval_shape(function, *(jax.ShapeDtypeStruct(x.shape[b:], x.dtype) for x, b in zip(arrays, batched)))
            return tuple(jax.numpy.zeros((0, *x.shape), x.dtype) for x in one), every_result
        foldable = all(leaf.fold in letters for letters in leaf.results)
        if not foldable or any(b and leaf.fold not in letters for b, letters in zip(batched, axes)):
            # Each entry has, say, its own LM head or its own weight gradient: one kernel call cannot hold them all.
            def one_by_one(*arrays):
                return jax.lax.map(
                    lambda mapped: batched_function(*_merge(batched, mapped, arrays)),  # which a vmap around this one maps too
                    [array for array, b in zip(arrays, batched) if b],
                )

            return _on_whole_arrays(one_by_one, arrays), every_result
        rows = max(
            x.shape[letters.index(leaf.fold) + b]
            for x, letters, b in zip(arrays, axes, batched)
            if leaf.fold in letters
        )
        folded = [_fold(x, letters.find(leaf.fold), b, size, rows) for x, letters, b in zip(arrays, axes, batched)]
        operands = {name: None for name, _ in leaf.operands} | dict(zip(present, folded))
        results = call(leaf, implementation, operands, **dict(static))
        return tuple(
            _unfold(x, letters.index(leaf.fold), size, rows) for x, letters in zip(results, leaf.results)
        ), every_result

    return batched_function


def _on_whole_arrays(function, arrays):
    """function(*arrays) on every device of their mesh, where explicit axes of it split any; of a split array none can map."""
    if (mesh := _explicit_mesh(arrays)) is None:
        return function(*arrays)
    explicit = {name for name, kind in zip(mesh.axis_names, mesh.axis_types) if kind == AxisType.Explicit}
    whole = PartitionSpec()
    function = jax.shard_map(function, mesh=mesh, in_specs=whole, out_specs=whole, axis_names=explicit, check_vma=False)
    return function(*(jax.sharding.reshard(array, NamedSharding(mesh, whole)) for array in arrays))


def _merge(batched, mapped, arrays):
    mapped = iter(mapped)
    return [next(mapped) if b else array for b, array in zip(batched, arrays)]


def _fold(array, axis, batched, size, rows):
    """Merges the mapped axis (0 if batched) into `axis`, which has `rows` entries or 1 that stands for all."""
    if axis < 0 or (not batched and array.shape[axis] == 1 and rows > 1):
        return array
    if not batched:
        array = jax.numpy.broadcast_to(array[None], (size, *array.shape))
    if array.shape[axis + 1] != rows:
        array = jax.numpy.broadcast_to(array, (*array.shape[: axis + 1], rows, *array.shape[axis + 2 :]))
    array = jax.numpy.moveaxis(array, 0, axis)
    return array.reshape(*array.shape[:axis], size * rows, *array.shape[axis + 2 :])


def _unfold(array, axis, size, rows):
    array = array.reshape(*array.shape[:axis], size, rows, *array.shape[axis + 1 :])
    return jax.numpy.moveaxis(array, axis, 0)


def _partitioned(leaf, run, axes, groups):
    function = custom_partitioning(run)
    rule, factors = _sharding_rule(leaf, axes, groups)
    def split(mesh, arg_shapes, terms):
        # Within a shard_map over some axes alone JAX gives shardings that tell nothing of axes.
        specs = [getattr(a.sharding, "spec", PartitionSpec()) for a in arg_shapes]
        return _split(leaf, axes, mesh, [(a.shape, spec) for a, spec in zip(arg_shapes, specs)], terms)

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
        sharding_rule=rule,
        need_replication_factors=tuple(f for f in factors if f not in leaf.sharded),
        **({"g": groups} if groups > 1 else {}),
    )
    return function


def _split(leaf, axes, mesh, operands, terms):
    """Shardings of arrays with these axes, given each operand's (shape, spec): each letter that may be split is, in all of them, as
    the first operand has it that splits it. The rule does not keep the others whole: an array may come split along any axis.
    """
    spec, used = {}, set()
    for names, (shape, parts) in zip(axes, operands):
        for letter, part, n in zip(names, parts, shape):
            over = part if isinstance(part, tuple) else () if part is None else (part,)
            even = n % math.prod(mesh.shape[axis] for axis in over) == 0
            if over and letter in leaf.sharded and letter not in spec and even and used.isdisjoint(over):
                spec[letter] = part
                used.update(over)
    spec["n"] = spec.get("k")
    return tuple(NamedSharding(mesh, PartitionSpec(*(spec.get(letter) for letter in names))) for names in terms)


@functools.cache
def _mapped(function, operands, results):
    """`function` of each device's part, for arrays of a mesh with explicit axes, split as these shardings say."""

    def call(*arrays):
        in_specs, out_specs = (tuple(x.spec for x in shardings) for shardings in (operands, results))
        # Made anew for each trace: it keeps the axes of the first, and in a vmap over a split axis there are fewer.
        of_parts = jax.shard_map(function, mesh=operands[0].mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
        return of_parts(*map(jax.sharding.reshard, arrays, operands))

    return jax.jit(call)


def _sharding_rule(leaf, axes, groups):
    """Shardy's einsum-like rule; query heads n are kv heads k times g, and each broadcast axis gets a factor of its own."""
    unique = iter(f"u{i}" for i in range(100))
    factors = []

    def term(names):
        parts = []
        for letter in names:
            parts.append(
                {"n": "(k g)" if groups > 1 else "k"}.get(letter) or (next(unique) if letter == "1" else letter)
            )
        factors.extend(p for part in parts for p in part.strip("()").split())
        return " ".join(parts)

    rule = ", ".join(term(names) for names in axes) + " -> " + ", ".join(term(names) for names in leaf.results)
    return rule, tuple(dict.fromkeys(factors))
