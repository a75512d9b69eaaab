"""What `jax.export` has to be told of the kernels."""

from jax import export

from dlm_kernels import cpu_kernels


def export_checks():
    """The `disabled_checks` with which `jax.export.export` takes programs of these operations.

        exported = jax.export.export(jax.jit(function), disabled_checks=dlm_kernels.export_checks())(*arguments)

    JAX exports no custom call of which it cannot say that later versions have it. Those of a CPU are this package's, of the version
    that exported: the program runs in processes that have imported it. Those of Triton's kernels are jax-triton's, and hold
    the kernels themselves; Pallas' need no check disabled.

    Returns a list of DisabledSafetyCheck, of all platforms.
    """
    return [export.DisabledSafetyCheck.custom_call(name) for name in (*cpu_kernels.targets(), "triton_kernel_call")]
