"""Chooses a kernel for a call and makes it work under jit, vmap and sharding.

An operation describes its kernel once, as a `Leaf`: the name, and the axes of every operand and result in letters. The way of
score_tokens(logits [B, L, V]), whose leaf has "rv" for logits:

    ops/unmask.py      checks the arguments and calls `call(SCORE, implementation, {"logits": ..., ...})`
    `_call`            where explicit axes of a mesh split the arrays hands each device its part (sharding.py)
    `_folded`          folds [B, L, V] to [R, V], for R, rows, is what the leaf folds, and spreads the results to [B, L]
    `_run`             asks `_choose` for an implementation per platform (which `explain` tells), and `_function` for their function
    `_batched`         under vmap only: folds the mapped axis into R too, and begins anew at `call`
    partitioned        where the compiler splits arrays over devices: how, and what each runs on its part (sharding.py)
    kernel_or          on a TPU in the place of that, for there nothing asks (lowering.py)
    platform_dependent when it is lowered takes the platform's kernel
    `_kernel`          calls, on a CPU, cpu_kernels/unmask.py: score_tokens(logits [R, V], ...)

The order, `custom_vmap(custom_partitioning(platform_dependent(kernels)))`, matters: custom_partitioning has no batching rule of its
own, and a gradient (`custom_vjp`, in the operation's file) must be outside of both.
"""

import contextlib
import contextvars
import dataclasses
import functools
import importlib
import importlib.util
import math
import string

import jax

# The TPU kernels import it too, but within a trace, after which JAX 0.12 would trace and compile the same function once more.
import jax.experimental.pallas.tpu
import numpy as np
from jax.custom_batching import custom_vmap

from dlm_kernels import cpu_kernels, triton_kernels
from dlm_kernels.ops import lowering, sharding

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
    broadcasts. A batched axis is folded into `fold`; the axes in `sharded` may be split over devices, the others may not. None:
    XLA alone implements it, and splits its own code.
    """

    module: str
    name: str
    operands: tuple[tuple[str, str], ...]
    results: tuple[str, ...]
    fold: str
    sharded: str | None


def operation(kernel):
    """What the caller knows a kernel of this name as."""
    name = kernel.removesuffix("_forward")
    return f"the gradient of {name.removesuffix('_backward')}" if name.endswith("_backward") else name


@dataclasses.dataclass(frozen=True, repr=False)
class Choice:
    """Which implementation a call takes on each platform, and why not the others; within: where it is part of another kernel."""

    kernel: str
    implementations: dict[str, str]
    refused: dict[str, str]
    within: dict[str, str] = dataclasses.field(default_factory=dict)

    def __repr__(self):
        within = {platform: f" (in {kernel})" for platform, kernel in self.within.items()}
        lines = [f"{self.kernel}: " + ", ".join(f"{i} on {p}{within.get(p, '')}" for p, i in self.implementations.items())]
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


def call_fused(leaf, parts, implementation, operands, **static):
    """`call` where an implementation has this leaf, which is several in one; elsewhere parts(implementation, operands, **static),
    which calls them one by one.
    """
    check(implementation)
    if implementation is not None:
        if _refusal(leaf, implementation, operands, static):
            return parts(implementation, operands, **static)
        return call(leaf, implementation, operands, **static)
    fused = {platform: name for platform, name in PLATFORM_KERNELS.items() if not _refusal(leaf, name, operands, static)}
    # Under vmap JAX cannot choose by platform between functions of arrays that explicit axes split.
    if not fused or sharding.explicit_mesh([array for array in operands.values() if array is not None]):
        return parts(None, operands, **static)
    if (choices := _recorder.get()) is None:
        return _call_fused(leaf, parts, tuple(fused.items()), operands, tuple(static.items()))
    recorded = len(choices)
    results = parts(None, operands, **static)
    within = dict.fromkeys(fused, leaf.name)
    choices[recorded:] = [dataclasses.replace(choice, within=within) for choice in choices[recorded:]]
    return results


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 4))
def _call_fused(leaf, parts, fused, operands, static):
    static = dict(static)
    kernels = {platform: functools.partial(call, leaf, name, **static) for platform, name in fused}
    present = tuple(name for name, array in operands.items() if array is not None)

    def run(*arrays):
        chosen = operands | dict(zip(present, arrays))
        return jax.lax.platform_dependent(chosen, **kernels, default=functools.partial(parts, None, **static))

    anew = functools.partial(call_fused, leaf, parts, None, **static)
    return _batched(leaf, anew, run, present)(*(operands[name] for name in present))


# One program: outside of any, JAX would copy the logits to reshape them, which takes longer than the kernel.
@functools.partial(jax.jit, static_argnums=(0, 1, 3))
def _call(leaf, implementation, operands, static):
    name, letters = leaf.operands[0]
    several = leaf.fold + string.ascii_uppercase[: operands[name].ndim - len(letters)]

    def unfolded(letters):
        return letters.replace(leaf.fold, several)

    present = {name: unfolded(letters) for name, letters in leaf.operands if operands[name] is not None}

    def of_part(*arrays):
        return _folded(leaf, implementation, operands | dict(zip(present, arrays)), len(several), dict(static))

    # Split before they are folded: the parts of a length would be strips of the rows.
    arrays = [operands[name] for name in present]
    results, sharded = map(unfolded, leaf.results), leaf.sharded and unfolded(leaf.sharded)
    return sharding.by_parts(of_part, arrays, present.values(), results, sharded)


def _folded(leaf, implementation, operands, several, static):
    """`_run`, with the `several` axes that are `leaf.fold` here folded into one, and in the results spread again."""
    name, letters = leaf.operands[0]
    begin = letters.index(leaf.fold)
    sizes = operands[name].shape[begin : begin + several]

    def merge(letters, array):
        at = letters.find(leaf.fold)
        if array is None or at < 0:
            return array
        return array.reshape(*array.shape[:at], math.prod(array.shape[at : at + several]), *array.shape[at + several :])

    def spread(letters, array):
        at = letters.find(leaf.fold)
        return array if at < 0 else array.reshape(*array.shape[:at], *sizes, *array.shape[at + 1 :])

    operands = {name: merge(letters, operands[name]) for name, letters in leaf.operands}
    return tuple(map(spread, leaf.results, _run(leaf, implementation, operands, static)))


def _run(leaf, implementation, operands, static):
    choice = _choose(leaf, implementation, operands, static)
    if (choices := _recorder.get()) is not None:
        choices.append(choice)
    present = tuple(name for name, array in operands.items() if array is not None)
    arrays = [operands[name] for name in present]
    axes = sharding.axis_names([dict(leaf.operands)[name] for name in present], [array.shape for array in arrays])
    heads = sharding.head_factors(leaf, operands)
    return _function(leaf, implementation, choice.implementations, present, axes, heads, static)(*arrays)


def differentiable(function, static, *arrays):
    """function(static, *arrays), a custom_vjp."""
    # Outside of any trace custom_vjp asks for signatures in each call, which takes longer than a small kernel. Within one it stays
    # as it is: a program would be traced once for itself and once for its gradient, and `explain` would count both.
    traced = any(isinstance(array, jax.core.Tracer) for array in arrays)
    return (function if traced else _program(function))(static, *arrays)


@functools.cache
def _program(function):
    return jax.jit(function, static_argnums=0)


def check(implementation, known=PACKAGES):
    """Raises for a name that none has, which `call` does too: for operations that may have nothing to call."""
    if implementation is not None and not (isinstance(implementation, str) and implementation in known):
        raise ValueError(f"implementation: expected one of {sorted(known)} or None, got {implementation!r}")


def _choose(leaf, implementation, operands, static):
    check(implementation)
    if implementation is not None:
        if reason := _refusal(leaf, implementation, operands, static):
            raise ValueError(f"implementation={implementation!r} cannot run {operation(leaf.name)}: {reason}")
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
    built = {"cpu": cpu_kernels, "triton": triton_kernels}.get(implementation)
    if built and (reason := built.unavailable()):
        return reason
    if implementation == "pallas" and sharding.checked():
        return "within shard_map it takes check_vma=False"
    if not _installed(f"dlm_kernels.{PACKAGES[implementation]}.{leaf.module}"):
        return f"{PACKAGES[implementation]} has no {leaf.module}"
    module = _module(implementation, leaf.module)
    if not hasattr(module, leaf.name):
        return f"{PACKAGES[implementation]}.{leaf.module} has no {leaf.name}"
    shapes = (operand.shape for operand in operands.values() if operand is not None)
    if implementation in ("triton", "pallas") and not all(isinstance(size, int) for shape in shapes for size in shape):
        return "its tiles want sizes that are known, not symbolic ones"
    supports = getattr(module, f"supports_{leaf.name}", None)  # missing where the kernel runs everything
    return supports and supports(**operands, **static)


@functools.cache
def _installed(name):
    return importlib.util.find_spec(name) is not None


def _module(implementation, module):
    return importlib.import_module(f"dlm_kernels.{PACKAGES[implementation]}.{module}")


def _function(leaf, implementation, implementations, present, axes, heads, static):
    """The batchable, partitionable function of the `present` operands."""
    kernels = {platform: _kernel(leaf, name, present, static) for platform, name in implementations.items()}
    default = kernels.pop("default")
    if implementation in ("triton", "pallas"):
        default = lowering.asked(default, implementation, operation(leaf.name))
    tpu = lowering.kernel_or(kernels.pop("tpu"), default) if "tpu" in kernels else default

    def run(*arrays):
        return jax.lax.platform_dependent(*arrays, **kernels, default=default) if kernels else default(*arrays)

    partitioned = run if leaf.sharded is None else sharding.partitioned(leaf, run, axes, heads)

    def anywhere(*arrays):
        return jax.lax.platform_dependent(*arrays, tpu=tpu, default=partitioned)

    anew = functools.partial(call, leaf, implementation, **static)
    return _without_derivative(leaf, _batched(leaf, anew, anywhere, present))


def _kernel(leaf, implementation, present, static):
    function = getattr(_module(implementation, leaf.module), leaf.name)
    absent = {name: None for name, _ in leaf.operands if name not in present}

    def kernel(*arrays):
        # With 64 bits Python's numbers within a Pallas kernel would have them, which a TPU has not.
        with jax.enable_x64(False) if implementation == "pallas" else contextlib.nullcontext():
            result = function(**dict(zip(present, arrays)), **absent, **static)
        results = tuple(result) if isinstance(result, (tuple, list)) else (result,)
        return sharding.varying_as(arrays, results)

    return kernel


def _without_derivative(leaf, function):
    """As `function`, which is differentiated only where its results are integers, that have no derivative."""
    function = jax.custom_jvp(function)

    @function.defjvp
    def rule(primals, tangents):
        results = function(*primals)
        if any(jax.numpy.issubdtype(x.dtype, jax.numpy.floating) for x in results):
            raise ValueError(
                f"{operation(leaf.name)} has no derivative: put jax.lax.stop_gradient around its arguments; attention, the losses, "
                "soft_embedding, mix_experts and matmul have a first gradient, in reverse mode alone"
            )
        return results, tuple(np.zeros(x.shape, jax.dtypes.float0) for x in results)

    return function


def _batched(leaf, anew, function, present):
    """`function` of the `present` operands under vmap: for all entries at once it calls anew(operands)."""
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

            return sharding.on_whole_arrays(one_by_one, arrays), every_result
        rows = max(
            x.shape[letters.index(leaf.fold) + b]
            for x, letters, b in zip(arrays, axes, batched)
            if leaf.fold in letters
        )
        folded = [_fold(x, letters.find(leaf.fold), b, size, rows) for x, letters, b in zip(arrays, axes, batched)]
        operands = {name: None for name, _ in leaf.operands} | dict(zip(present, folded))
        results = anew(operands)
        return tuple(
            _unfold(x, letters.index(leaf.fold), size, rows) for x, letters in zip(results, leaf.results)
        ), every_result

    return batched_function


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
