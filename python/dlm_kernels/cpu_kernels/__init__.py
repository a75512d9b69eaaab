"""CPU kernels in C++, one file per operation here as in csrc/. This file alone knows how they reach XLA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

TARGETS = "dlm_kernels_"  # before a handler's name; bench/tune.py has others beside these


@functools.cache
def unavailable() -> str | None:
    """None where the kernels can be called, else the sentence that says why not.

    Raises ValueError where DLM_KERNELS_ISA names an instruction set that is unknown or not to be had here.
    """
    try:
        from dlm_kernels import _cpu
    except ImportError as error:
        return f"the extension dlm_kernels._cpu cannot be imported ({error})"
    # Else a DLM_KERNELS_ISA that this machine cannot honour would be found out only inside XLA.
    _cpu.isa()
    return None


def targets():
    """The names by which XLA knows the kernels: {name: handler}, empty where there are none."""
    try:
        from dlm_kernels import _cpu
    except ImportError:  # `unavailable` says so where a kernel is wanted
        return {}
    return {TARGETS + name: handler for name, handler in _cpu.ffi_handlers().items()}


def register():
    """Makes the kernels known to XLA, on import: a program compiled or exported by another process asks for them by name."""
    for name, handler in targets().items():
        jax.ffi.register_ffi_target(name, handler, platform="cpu")


def isa() -> str:
    """The instruction set that the kernels use on this machine: "portable", "avx2", "avx512" or "avx512_bf16"."""
    if reason := unavailable():
        raise RuntimeError(reason)
    from dlm_kernels import _cpu

    return _cpu.isa()


def run(name, outputs, *operands, **attributes):
    """Calls a handler of csrc/handlers.cc. An operand that is None goes as an array with no elements, an attribute as a scalar."""
    if reason := unavailable():
        raise RuntimeError(reason)
    target = jax.ffi.ffi_call(TARGETS + name, outputs)
    arrays = [jnp.zeros(0, jnp.int32) if operand is None else operand for operand in operands]
    return target(*arrays, **attributes)


def like(array):
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


def vector(n, dtype="float32"):
    return jax.ShapeDtypeStruct((n,), dtype)


def number(value):
    """A float attribute; kernels take 0 for a soft cap that is absent."""
    return np.float32(0 if value is None else value)
