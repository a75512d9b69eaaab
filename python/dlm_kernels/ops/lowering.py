"""What a kernel becomes when a computation is lowered: only then is it known for which platform, and for how many devices."""

import jax
from jax.extend import core
from jax.interpreters import mlir

_either = core.Primitive("kernel_of_one_device")
_either.multiple_results = True
_either.def_abstract_eval(lambda *arrays, kernel, otherwise: kernel.out_avals)

_asked = core.Primitive("kernel_asked_for")
_asked.multiple_results = True
_asked.def_abstract_eval(lambda *arrays, kernel, **names: kernel.out_avals)


def kernel_or(kernel, otherwise):
    """kernel(*arrays) on one device, or on a device's part within a shard_map over all axes; otherwise(*arrays) elsewhere.

    For a TPU: libtpu asks no `custom_partitioning` how a kernel splits, and a kernel alone it refuses to split.
    """

    def call(*arrays):
        return tuple(_either.bind(*arrays, kernel=jax.make_jaxpr(kernel)(*arrays), otherwise=jax.make_jaxpr(otherwise)(*arrays)))

    return call


def asked(kernel, implementation, operation):
    """kernel(*arrays), or the ValueError that the caller's implementation cannot run the operation for this platform."""

    def call(*arrays):
        jaxpr = jax.make_jaxpr(kernel)(*arrays)
        return tuple(_asked.bind(*arrays, kernel=jaxpr, implementation=implementation, operation=operation))

    return call


def _lower_either(context, *operands, kernel, otherwise):
    axes = context.module_context.axis_context
    if hasattr(axes, "num_devices"):
        alone = axes.num_devices == 1
    else:
        alone = axes.manual_axes | set(axes.mesh.manual_axes) == set(axes.mesh.axis_names)
    function = core.jaxpr_as_fun(kernel if alone else otherwise)
    return mlir.lower_fun(function, multiple_results=True)(context, *operands)


def _lower_asked(context, *operands, kernel, implementation, operation):
    try:
        return mlir.lower_fun(core.jaxpr_as_fun(kernel), multiple_results=True)(context, *operands)
    except ValueError as error:
        platforms = ", ".join(context.module_context.platforms)
        raise ValueError(f"implementation={implementation!r} cannot run {operation} on {platforms}: {error}") from error


mlir.register_lowering(_either, _lower_either, platform="tpu")
mlir.register_lowering(_asked, _lower_asked)
