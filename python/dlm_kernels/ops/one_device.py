"""A TPU kernel where one device runs it, XLA's code where the compiler splits a computation over several.

libtpu asks no `custom_partitioning` how a kernel splits, and a kernel alone it refuses. How many devices there are is known when a
computation is lowered, and not while it is traced.
"""

import jax
from jax.extend import core
from jax.interpreters import mlir

_either = core.Primitive("kernel_of_one_device")
_either.multiple_results = True
_either.def_abstract_eval(lambda *arrays, kernel, otherwise: kernel.out_avals)


def kernel_or(kernel, otherwise):
    """kernel(*arrays) on one device, or on a device's part within a shard_map over all axes; otherwise(*arrays) elsewhere."""

    def call(*arrays):
        return tuple(_either.bind(*arrays, kernel=jax.make_jaxpr(kernel)(*arrays), otherwise=jax.make_jaxpr(otherwise)(*arrays)))

    return call


def _lower(context, *operands, kernel, otherwise):
    axes = context.module_context.axis_context
    if hasattr(axes, "num_devices"):
        alone = axes.num_devices == 1
    else:
        alone = axes.manual_axes | set(axes.mesh.manual_axes) == set(axes.mesh.axis_names)
    function = core.jaxpr_as_fun(kernel if alone else otherwise)
    return mlir.lower_fun(function, multiple_results=True)(context, *operands)


mlir.register_lowering(_either, _lower, platform="tpu")
