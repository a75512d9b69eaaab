"""One launcher for every Triton kernel of the package: from JAX, from torch, and in the interpreter over NumPy.

A leaf names what its kernel reads and writes and never touches a framework:

    out, lse = launch(kernel, grid, inputs={"query": query}, outputs={"out": Out(shape, dtype), ...},
                      scalars={"length": 5}, constants={"BLOCK": 64}, num_warps=4, num_stages=2)

and this file finds out who is asking. Arrays of JAX go through the launcher that jaxlib has for Triton kernels, tensors of
torch through Triton's own; NumPy arrays (and JAX arrays, through a callback) run in Triton's interpreter when
TRITON_INTERPRET=1 is set. There is no autotuning: a kernel's tiles are constants of the call.

Under JAX the scalars are constants too: a stride that is not known to be a multiple of 16 bytes costs every wide load, and JAX
compiles anew for new shapes anyway.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import triton

_MULTIPROCESSORS = {80: 108, 86: 84, 89: 128, 90: 132, 100: 148, 103: 160, 120: 170}
_DEFAULT_ARCH = 90
# Triton's names of the types that the kernels read and write.
TYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "int32": "i32", "uint32": "u32", "bool": "i1"}
# jaxlib's launcher as XLA knows it; jax.export must be told to let it through (`DisabledSafetyCheck.custom_call`).
JAX_TARGET = "triton_kernel_call_ffi"


@dataclasses.dataclass(frozen=True)
class Out:
    """An array that a kernel writes in full."""

    shape: tuple[int, ...]
    dtype: str


def dtype_name(array) -> str:
    """'float32', 'bfloat16', ... for an array of NumPy, JAX or torch."""
    return str(array.dtype).removeprefix("torch.")


def interpreting() -> bool:
    """True where kernels run in Triton's interpreter. Triton reads this once, when a kernel is decorated."""
    return triton.knobs.runtime.interpret


def strides(array, names: str) -> dict[str, int]:
    """{'name_b': stride of axis 0, ...} in elements, for names such as 'query_b query_t query_n query_h'."""
    names = names.split()
    if hasattr(array, "stride"):
        steps = array.stride()
    elif isinstance(array, np.ndarray):
        steps = [step // array.itemsize for step in array.strides]
    else:
        steps = [int(np.prod(array.shape[axis + 1 :], dtype=np.int64)) for axis in range(len(array.shape))]
    if len(names) != len(steps):
        raise ValueError(f"strides: expected {len(names)} axes for {names}, given shape {tuple(array.shape)}")
    return dict(zip(names, map(int, steps)))


def concatenate(arrays: list):
    """Arrays of one framework, joined along axis 0."""
    if len(arrays) == 1:
        return arrays[0]
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(arrays[0], torch.Tensor):
        return torch.cat(arrays)
    if isinstance(arrays[0], np.ndarray):
        return np.concatenate(arrays)
    import jax

    return jax.numpy.concatenate(arrays)


@functools.cache
def arch() -> int:
    """The compute capability that kernels are compiled for, such as 90.

    `DLM_KERNELS_CUDA_ARCH` says so where no GPU is present (export on a CPU host); otherwise the first GPU's.
    """
    if value := os.environ.get("DLM_KERNELS_CUDA_ARCH"):
        return int(value)
    if (torch := sys.modules.get("torch")) is not None and torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        return 10 * major + minor
    if (jax := sys.modules.get("jax")) is not None:
        for device in jax.local_devices():
            if device.platform in ("gpu", "cuda"):
                return int(str(device.compute_capability).replace(".", ""))
    return _DEFAULT_ARCH


def multiprocessors() -> int:
    """How many programs run at once, for choosing split counts from shapes alone."""
    return _MULTIPROCESSORS.get(arch(), 132)


def launch(
    kernel,
    grid: tuple[int, ...],
    *,
    inputs: Mapping[str, Any],
    outputs: Mapping[str, Out | None],
    scalars: Mapping[str, int | float],
    constants: Mapping[str, Any],
    num_warps: int = 4,
    num_stages: int = 2,
) -> tuple:
    """Runs `kernel` over `grid`; returns its outputs in the order given, None where None was asked for.

    The kernel's parameters are the inputs, the outputs, the scalars and the constants, each group in the order given and named
    exactly once. An input may be None where the kernel has a constant HAS_... of its name, which is set here, or reads it under
    another constant's condition.
    """
    asked = {name: inputs[name[4:].lower()] is not None for name in kernel.arg_names if name.startswith("HAS_")}
    given = [*inputs, *outputs, *scalars, *asked, *constants]
    if sorted(given) != sorted(kernel.arg_names):
        wrong = sorted(set(given) ^ set(kernel.arg_names)) or sorted(name for name in given if given.count(name) > 1)
        raise ValueError(f"launch of {kernel.__name__}: parameters missing, unknown or named twice: {wrong}")
    arrays = [*inputs, *outputs]
    if kernel.arg_names[: len(arrays)] != arrays:
        raise ValueError(f"launch of {kernel.__name__}: expected its parameters to begin with {arrays}")
    present = {name: value for name, value in inputs.items() if value is not None}
    call = _Call(
        kernel, grid, tuple(inputs), tuple(present), tuple(outputs.items()), tuple(scalars.items()),
        tuple({**asked, **constants}.items()), num_warps, num_stages, arch(),
    )  # fmt: skip
    values = list(present.values())
    torch = sys.modules.get("torch")
    if torch is not None and any(isinstance(value, torch.Tensor) for value in values):
        results = _launch_torch(call, values, torch)
    elif all(isinstance(value, np.ndarray) for value in values):
        results = _interpret(call, *values)
    else:
        results = _launch_jax(call, values)
    found = dict(zip(call.wanted, results))
    return tuple(found.get(name) for name in outputs)


@dataclasses.dataclass(frozen=True)
class _Call:
    """All of a launch but its arrays."""

    kernel: Any
    grid: tuple[int, ...]
    inputs: tuple[str, ...]
    present: tuple[str, ...]  # the inputs that are not None
    outputs: tuple[tuple[str, Out | None], ...]
    scalars: tuple[tuple[str, int | float], ...]
    constants: tuple[tuple[str, Any], ...]
    num_warps: int
    num_stages: int
    arch: int

    @property
    def wanted(self) -> dict[str, Out]:
        """The outputs that are not None."""
        return {name: out for name, out in self.outputs if out is not None}

    @property
    def options(self) -> dict[str, int | bool]:
        """For Triton's compiler. Multiplications and additions fuse; Triton is about to change its default."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}

    @property
    def absent(self) -> dict[str, None]:
        """The inputs and outputs that are None."""
        return {name: None for name in (*self.inputs, *dict(self.outputs)) if name not in (*self.present, *self.wanted)}


# --- JAX ---------------------------------------------------------------------------------------------------------


def _launch_jax(call: _Call, values: list) -> list:
    import jax

    if interpreting():
        shapes = [jax.ShapeDtypeStruct(out.shape, out.dtype) for out in call.wanted.values()]
        return jax.pure_callback(lambda *arrays: _interpret(call, *map(np.asarray, arrays)), shapes, *values)
    return _primitive().bind(*values, call=call)


@functools.cache
def _primitive():
    """A launch as a JAX primitive: its kernel is compiled on lowering, so for no platform that does not run it."""
    import jax
    from jax.extend.core import Primitive
    from jax.interpreters import mlir, xla

    primitive = Primitive("triton_launch")
    primitive.multiple_results = True
    primitive.def_impl(functools.partial(xla.apply_primitive, primitive))
    primitive.def_abstract_eval(
        lambda *_, call: [jax.core.ShapedArray(out.shape, np.dtype(out.dtype)) for out in call.wanted.values()]
    )
    mlir.register_lowering(primitive, _refuse_lowering)
    mlir.register_lowering(primitive, _lower, platform="cuda")
    return primitive


def _lower(context, *operands, call: _Call):
    """Calls jaxlib's own launcher of Triton kernels, which takes the PTX and how to launch it as a compressed protocol buffer."""
    import jax
    from jaxlib import gpu_triton

    kernel = compiled(call, tuple(dtype_name(array) for array in context.avals_in))
    metadata = kernel.metadata
    if metadata.global_scratch_size:
        raise ValueError(f"launch of {kernel.name}: expected a kernel without scratch memory, for JAX gives it none")
    found = gpu_triton.TritonKernel(
        kernel.name, metadata.num_warps, metadata.num_ctas, metadata.shared, kernel.asm["ptx"], "", call.arch
    )
    arrays = [gpu_triton.create_array_parameter(0, 16)] * (len(context.avals_in) + len(context.avals_out))
    launched = gpu_triton.TritonKernelCall(found, *call.grid, *(1,) * (3 - len(call.grid)), arrays)
    opaque = zlib.compress(launched.to_proto(kernel.name, b""))
    return jax.ffi.ffi_lowering(JAX_TARGET)(context, *operands, opaque=opaque)


def _refuse_lowering(context, *_, call: _Call):
    platforms = ", ".join(context.module_context.platforms)
    raise RuntimeError(
        f"the Triton kernel {call.kernel.__name__} runs on NVIDIA GPUs, and this computation is for {platforms}; "
        "set TRITON_INTERPRET=1 before the first call to run it in Triton's interpreter"
    )


@functools.cache
def compiled(call: _Call, dtypes: tuple[str, ...]):
    """What Triton makes of a launch on inputs of these dtypes, from its cache on disk (TRITON_CACHE_DIR) where it made it before.

    Arrays begin at multiples of 16 bytes, as XLA's do, and the scalars are constants.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    dtypes = {**dict(zip(call.present, dtypes)), **{name: out.dtype for name, out in call.wanted.items()}}
    constants = {**call.absent, **dict(call.scalars), **dict(call.constants)}
    names = call.kernel.arg_names
    source = ASTSource(
        call.kernel,
        {name: "*" + TYPES[dtypes[name]] if name in dtypes else "constexpr" for name in names},
        constexprs=constants,
        attrs={(position,): [["tt.divisibility", 16]] for position, name in enumerate(names) if name in dtypes},
    )
    return triton.compile(source, target=GPUTarget("cuda", call.arch, 32), options=call.options)


# --- torch -------------------------------------------------------------------------------------------------------


def _launch_torch(call: _Call, values: list, torch) -> list:
    if not interpreting() and not values[0].is_cuda:
        raise ValueError(f"launch of {call.kernel.__name__}: expected CUDA tensors, given one on {values[0].device}")
    device = values[0].device
    results = {
        name: torch.empty(out.shape, dtype=getattr(torch, out.dtype), device=device) for name, out in call.wanted.items()
    }
    arguments = {**call.absent, **dict(zip(call.present, values)), **results, **dict(call.scalars), **dict(call.constants)}
    if interpreting():
        _let_numpy_count()
        call.kernel[call.grid](**arguments)
        return list(results.values())
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device(device):
        call.kernel[call.grid](**arguments, **call.options)
    return list(results.values())


# --- The interpreter ---------------------------------------------------------------------------------------------


class _Memory:
    """A NumPy array as the little of torch's tensor that the interpreter looks at; it writes through data_ptr."""

    def __init__(self, array: np.ndarray):
        self.array, self.dtype = array, array.dtype

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def untyped_storage(self):
        return self

    new_empty = set_ = copy_ = cpu = lambda self, *_, **__: self
    storage_offset = size = stride = lambda self: 0


@functools.cache
def _let_numpy_count():
    """Triton's interpreter makes loop bounds of arrays of one element, which NumPy 2.4 no longer turns into integers."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


def _interpret(call: _Call, *values: np.ndarray) -> list[np.ndarray]:
    if not interpreting():
        raise ValueError(f"launch of {call.kernel.__name__}: NumPy arrays need Triton's interpreter, TRITON_INTERPRET=1")
    _let_numpy_count()
    results = {}
    for name, out in call.wanted.items():
        # Poison, so that an element which the kernel forgets is seen.
        floating = out.dtype in ("float32", "float16", "bfloat16")
        results[name] = np.full(out.shape, np.nan if floating else 77, dtype=np.dtype(out.dtype))
    memory = {name: _Memory(array) for name, array in {**dict(zip(call.present, values)), **results}.items()}
    with np.errstate(all="ignore"):
        call.kernel[call.grid](**call.absent, **memory, **dict(call.scalars), **dict(call.constants))
    return list(results.values())
