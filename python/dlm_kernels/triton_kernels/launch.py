"""One launcher for every Triton kernel of the package: from JAX, from torch, and in the interpreter over NumPy.

A leaf names what its kernel reads and writes and never touches a framework:

    out, lse = launch(kernel, grid, inputs={"query": query}, outputs={"out": Out(shape, dtype), ...},
                      scalars={"length": 5}, constants={"BLOCK": 64}, num_warps=4, num_stages=2)

and this file finds out who is asking. Arrays of JAX go through a primitive that compiles at lowering and
leaves a custom call that jaxlib itself executes; tensors of torch go through Triton's own launcher; NumPy
arrays (and JAX arrays, through a callback) run in Triton's interpreter when TRITON_INTERPRET=1 is set.
There is no autotuning: a kernel's tiles are constants of the call.
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

try:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
except ImportError as error:
    raise ImportError(
        "the Triton kernels need the triton package, 3.6 or newer: pip install 'dlm_kernels[gpu]'"
    ) from error

# Triton's names of the element types a kernel argument may point to.
_TRITON_TYPES = {
    "float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "int32": "i32", "uint32": "u32", "int64": "i64", "bool": "i1",
}  # fmt: skip
_MULTIPROCESSORS = {80: 108, 86: 84, 89: 128, 90: 132, 100: 148, 103: 160, 120: 170}
_DEFAULT_ARCH = 90


@dataclasses.dataclass(frozen=True)
class Out:
    """An array that a kernel writes in full. With `alias`, it starts as that input's memory instead of empty."""

    shape: tuple[int, ...]
    dtype: str
    alias: str | None = None


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
            if device.platform == "gpu":
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

    Every parameter of the kernel must be named exactly once. An input may be None: the kernel sees a constant None.
    """
    given = [*inputs, *outputs, *scalars, *constants]
    if sorted(given) != sorted(kernel.arg_names):
        wrong = sorted(set(given) ^ set(kernel.arg_names)) or sorted(name for name in given if given.count(name) > 1)
        raise ValueError(f"launch of {kernel.__name__}: parameters missing, unknown or named twice: {wrong}")
    arrays = {name: value for name, value in inputs.items() if value is not None}
    wanted = {name: value for name, value in outputs.items() if value is not None}
    absent = {name: None for name in (*inputs, *outputs) if name not in arrays and name not in wanted}
    fixed = {**constants, **absent}
    call = _Call(
        kernel, grid, tuple(arrays), tuple(wanted.items()), tuple(scalars.items()), tuple(fixed.items()),
        num_warps, num_stages, arch(),
    )  # fmt: skip
    values = list(arrays.values())
    torch = sys.modules.get("torch")
    if torch is not None and any(isinstance(value, torch.Tensor) for value in values):
        results = _launch_torch(call, values, torch)
    elif all(isinstance(value, np.ndarray) for value in values):
        results = _interpret(call, *values)
    else:
        results = _launch_jax(call, values)
    found = dict(zip(wanted, results))
    return tuple(found.get(name) for name in outputs)


@dataclasses.dataclass(frozen=True)
class _Call:
    """All of a launch but its arrays: hashable, so that it can be a parameter of a JAX primitive."""

    kernel: Any
    grid: tuple[int, ...]
    inputs: tuple[str, ...]
    outputs: tuple[tuple[str, Out], ...]
    scalars: tuple[tuple[str, int | float], ...]
    constants: tuple[tuple[str, Any], ...]
    num_warps: int
    num_stages: int
    arch: int


def compile_call(call: _Call, dtypes: Mapping[str, str]):
    """Compiles a launch for `call.arch` with no GPU needed; Triton caches the result on disk between processes.

    dtypes: element type of every array parameter, inputs and outputs. Returns Triton's compiled kernel.
    """
    scalars, constants = dict(call.scalars), dict(call.constants)
    # As Triton's own launcher does: a stride of 1 must be known, or no load is wider than one element.
    constants |= {name: value for name, value in scalars.items() if _is_one(value)}
    signature, attributes = {}, {}
    for position, name in enumerate(call.kernel.arg_names):
        if name in dtypes:
            signature[name] = "*" + _TRITON_TYPES[dtypes[name]]
            # XLA aligns every buffer to far more than the 16 bytes that a vector load wants.
            attributes[(position,)] = [["tt.divisibility", 16]]
        elif name in constants:
            signature[name] = "constexpr"
        else:
            signature[name] = _scalar_type(scalars[name])
            if isinstance(scalars[name], int) and scalars[name] % 16 == 0:
                attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(call.kernel, signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": call.num_warps, "num_stages": call.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", call.arch, 32), options=options)


def _is_one(value: int | float) -> bool:
    return isinstance(value, int) and value == 1


def _scalar_type(value: int | float) -> str:
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


# --- JAX ---------------------------------------------------------------------------------------------------------


def _launch_jax(call: _Call, values: list) -> list:
    import jax

    if interpreting():
        shapes = [jax.ShapeDtypeStruct(out.shape, out.dtype) for _, out in call.outputs]
        return jax.pure_callback(lambda *arrays: _interpret(call, *map(np.asarray, arrays)), shapes, *values)
    return _primitive().bind(*values, call=call)


@functools.cache
def _primitive():
    import jax
    from jax.extend.core import Primitive
    from jax.interpreters import mlir

    primitive = Primitive("dlm_kernels_triton")
    primitive.multiple_results = True
    primitive.def_abstract_eval(
        lambda *_, call: [jax.core.ShapedArray(out.shape, np.dtype(out.dtype)) for _, out in call.outputs]
    )

    @functools.lru_cache(maxsize=1024)
    def jitted(call):
        return jax.jit(lambda *values: primitive.bind(*values, call=call))

    primitive.def_impl(lambda *values, call: jitted(call)(*values))
    mlir.register_lowering(primitive, _lower, platform="cuda")
    mlir.register_lowering(primitive, _refuse_lowering)
    return primitive


def _refuse_lowering(context, *_, call: _Call):
    platforms = ", ".join(context.module_context.platforms)
    raise RuntimeError(
        f"the Triton kernel {call.kernel.__name__} runs on NVIDIA GPUs, and this computation is for {platforms}; "
        "set TRITON_INTERPRET=1 before the first call to run it in Triton's interpreter"
    )


def _lower(context, *operands, call: _Call):
    import jax

    try:
        # The module registers the custom call when it is imported, and is empty without JAX's CUDA plugin.
        from jaxlib import gpu_triton

        gpu_triton.TritonKernel  # noqa: B018
    except (ImportError, AttributeError) as error:
        raise RuntimeError(
            "lowering a Triton kernel for cuda needs JAX's CUDA plugin: pip install 'jax[cuda13]'"
        ) from error
    avals = {**dict(zip(call.inputs, context.avals_in)), **dict(zip(dict(call.outputs), context.avals_out))}
    compiled = compile_call(call, {name: str(aval.dtype) for name, aval in avals.items()})
    metadata = compiled.metadata
    if metadata.num_warps != call.num_warps or getattr(metadata, "global_scratch_size", 0):
        # jaxlib launches the warps it is told and passes no scratch; such a kernel would hang or write to null.
        raise RuntimeError(f"{metadata.name}: Triton asks for warps or scratch memory that jaxlib cannot provide")
    kernel = gpu_triton.TritonKernel(
        metadata.name, call.num_warps, metadata.num_ctas, metadata.shared, compiled.asm["ptx"], compiled.asm["ttir"],
        call.arch,
    )  # fmt: skip
    scalars = dict(call.scalars)
    # XLA hands over operands, then results; the kernel's own parameters must be in that order, with scalars between
    # them wherever they stand. An aliased result shares its operand's memory.
    parameters = []
    for name in call.kernel.arg_names:
        if name in avals:
            parameters.append(gpu_triton.create_array_parameter(0, 16))
        elif name in scalars and not _is_one(scalars[name]):
            parameters.append(gpu_triton.create_scalar_parameter(scalars[name], _scalar_type(scalars[name])))
    order = [name for name in call.kernel.arg_names if name in avals]
    if order != list(avals):
        raise ValueError(f"launch of {metadata.name}: expected inputs and outputs in the order {order}")
    grid = (*call.grid, 1, 1)[:3]
    proto = gpu_triton.TritonKernelCall(kernel, *grid, parameters).to_proto(metadata.name, b"")
    aliases = {call.inputs.index(out.alias): i for i, (_, out) in enumerate(call.outputs) if out.alias}
    rule = jax.ffi.ffi_lowering(
        "triton_kernel_call_ffi", api_version=2, backend_config=zlib.compress(proto), operand_output_aliases=aliases
    )
    return rule(context, *operands)


# --- torch -------------------------------------------------------------------------------------------------------


def _launch_torch(call: _Call, values: list, torch) -> list:
    inputs = dict(zip(call.inputs, values))
    if not interpreting() and not values[0].is_cuda:
        raise ValueError(f"launch of {call.kernel.__name__}: expected CUDA tensors, given one on {values[0].device}")
    results = {}
    for name, out in call.outputs:
        if out.alias:
            results[name] = inputs[out.alias]
        else:
            results[name] = torch.empty(out.shape, dtype=getattr(torch, out.dtype), device=values[0].device)
    arguments = {**inputs, **results, **dict(call.scalars), **dict(call.constants)}
    if interpreting():
        call.kernel[call.grid](**arguments)
        return list(results.values())
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device(values[0].device):
        call.kernel[call.grid](**arguments, num_warps=call.num_warps, num_stages=call.num_stages)
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
    inputs = dict(zip(call.inputs, values))
    results = {}
    for name, out in call.outputs:
        if out.alias:
            results[name] = np.array(inputs[out.alias])
        else:
            # Poison, so that an element which the kernel forgets is seen.
            floating = out.dtype in ("float32", "float16", "bfloat16")
            results[name] = np.full(out.shape, np.nan if floating else 77, dtype=np.dtype(out.dtype))
    memory = {name: _Memory(array) for name, array in {**inputs, **results}.items()}
    with np.errstate(all="ignore"):
        call.kernel[call.grid](**memory, **dict(call.scalars), **dict(call.constants))
    return list(results.values())
