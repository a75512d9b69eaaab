"""One launcher for every Triton kernel of the package: from JAX, from torch, and in the interpreter over NumPy.

A leaf names what its kernel reads and writes and never touches a framework:

    out, lse = launch(kernel, grid, inputs={"query": query}, outputs={"out": Out(shape, dtype), ...},
                      scalars={"length": 5}, constants={"BLOCK": 64}, num_warps=4, num_stages=2)

and this file finds out who is asking. Arrays of JAX go through jax-triton, tensors of torch through Triton's own
launcher; NumPy arrays (and JAX arrays, through a callback) run in Triton's interpreter when TRITON_INTERPRET=1 is set.
There is no autotuning: a kernel's tiles are constants of the call, see `tuned`.

Under JAX the scalars are constants too: jax-triton tells the compiler nothing about a scalar, and a stride that is not
known to be a multiple of 16 bytes costs every wide load. JAX compiles anew for new shapes anyway.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import sys
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
import triton

from dlm_kernels.triton_kernels import tiles

_MULTIPROCESSORS = {80: 108, 86: 84, 89: 128, 90: 132, 100: 148, 103: 160, 120: 170}
_DEFAULT_ARCH = 90
_MOST_PROGRAMS = 65535  # of CUDA, along any axis but the first


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


def strides(array, names: str, **tile: int) -> dict[str, int]:
    """{'name_b': stride of axis 0, ...} in elements, for names such as 'query_b query_t query_n query_h'.

    tile: of the axes along which a kernel computes a tile's offsets in 32 bits, how many elements a tile has. Tensors of torch come
    with any strides: a key's may be 2**31 / 128 and more, where those offsets would wrap around.
    """
    names = names.split()
    if hasattr(array, "stride"):
        steps = array.stride()
    elif isinstance(array, np.ndarray):
        steps = [step // array.itemsize for step in array.strides]
    else:
        steps = [int(np.prod(array.shape[axis + 1 :], dtype=np.int64)) for axis in range(len(array.shape))]
    if len(names) != len(steps):
        raise ValueError(f"strides: expected {len(names)} axes for {names}, given shape {tuple(array.shape)}")
    found = dict(zip(names, map(int, steps)))
    # Of an axis of one element the stride means nothing, and may be anything.
    sizes = {name: size for name, size in zip(names, array.shape) if size > 1}
    if sum(min(tile[name], sizes[name]) * abs(found[name]) for name in tile if name in sizes) >= 2**31:
        raise ValueError(
            f"{names[0].rpartition('_')[0]}: expected strides with which a tile's offsets are below 2**31 elements, got "
            f"{tuple(found.values())} of shape {tuple(array.shape)}; a contiguous copy has such strides"
        )
    return found


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


def multiplies_by_warp() -> bool:
    """True where a warp is what multiplies: Ampere and Ada, and sm_120. On Hopper and the larger Blackwell four do as one."""
    return not 90 <= arch() < 120


def multiprocessors() -> int:
    """How many programs run at once, for choosing split counts from shapes alone."""
    return _MULTIPROCESSORS.get(arch(), 132)


def tuned(kernel: str):
    """Decorates a kernel's choice of tiles: the fastest where `python -m bench tune` has measured this kind of arguments on this
    architecture, else the choice itself.
    """

    def decorate(own):
        @functools.wraps(own)
        def choose(*kind):
            constants, num_warps, num_stages = own(*kind)
            found = tiles.MEASURED.get((kernel, arch(), *kind), ({}, num_warps, num_stages))
            return constants | found[0], *found[1:]

        return choose

    return decorate


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
        raise ValueError(f"launch of {_name(kernel)}: parameters missing, unknown or named twice: {wrong}")
    arrays = [*inputs, *outputs]
    if kernel.arg_names[: len(arrays)] != arrays:
        raise ValueError(f"launch of {_name(kernel)}: expected its parameters to begin with {arrays}")
    if any(programs > _MOST_PROGRAMS for programs in grid[1:]):
        raise ValueError(f"launch of {_name(kernel)}: expected at most {_MOST_PROGRAMS} programs along axes 1 and 2, got {grid}")
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


def _name(kernel) -> str:
    """As errors, profiles and exported programs have it."""
    return kernel.__name__.strip("_")


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
    def absent(self) -> dict[str, None]:
        """The inputs and outputs that are None."""
        return {name: None for name in (*self.inputs, *dict(self.outputs)) if name not in (*self.present, *self.wanted)}


def _launch_jax(call: _Call, values: list) -> list:
    import jax

    if interpreting():
        shapes = [jax.ShapeDtypeStruct(out.shape, out.dtype) for out in call.wanted.values()]
        return jax.pure_callback(lambda *arrays: _interpret(call, *map(np.asarray, arrays)), shapes, *values)
    present = dict(zip(call.present, values))
    # jax-triton takes arrays by position: one that is absent needs a stand-in, which the kernel does not touch.
    outputs = {name: out or Out((1,), "float32") for name, out in call.outputs}
    results = jax_triton().triton_call(
        *(present.get(name, values[0]) for name in call.inputs),
        kernel=call.kernel,
        out_shape=[jax.ShapeDtypeStruct(out.shape, out.dtype) for out in outputs.values()],
        grid=call.grid,
        name=_name(call.kernel),
        num_warps=call.num_warps,
        num_stages=call.num_stages,
        compute_capability=call.arch,
        **dict(call.scalars),
        **dict(call.constants),
    )
    return [result for name, result in zip(outputs, results) if name in call.wanted]


@functools.cache
def jax_triton():
    """The package of this name, made to keep what it compiles and to say on which platform its kernels run."""
    from jax.interpreters import mlir

    # Its import, and one before ours, empties this variable: Triton's cache on disk would be lost, to torch too.
    kept = os.environ.get("TRITON_CACHE_DIR")
    import jax_triton
    from jax_triton import triton_lib

    os.environ.pop("TRITON_CACHE_DIR", None)
    if kept:
        os.environ["TRITON_CACHE_DIR"] = kept
    mlir.register_lowering(triton_lib.triton_kernel_call_p, _refuse_lowering)
    triton_lib.compile_ttir_inplace = _kept_on_disk(triton_lib.compile_ttir_inplace, triton_lib.CompilationResult)
    return jax_triton


def _kept_on_disk(compile_ttir, result_type):
    """jax-triton's compiler keeps what it makes for the process only; this one also in Triton's cache (TRITON_CACHE_DIR)."""
    from jax_triton import __version__
    from triton.runtime.cache import get_cache_manager, triton_key

    def compile_or_find(ttir, backend, options, compute_capability, platform):
        made_of = (str(ttir), options.hash(), backend.hash(), compute_capability, platform, triton_key(), __version__)
        cache = get_cache_manager(hashlib.sha256("\0".join(map(str, made_of)).encode()).hexdigest())
        if (path := cache.get_file("jax_triton.json")) is not None:
            return result_type(**json.loads(pathlib.Path(path).read_text()))
        result = compile_ttir(ttir, backend, options, compute_capability, platform)
        cache.put(json.dumps(dataclasses.asdict(result)), "jax_triton.json", binary=False)
        return result

    return compile_or_find


def _refuse_lowering(context, *_, fn, **parameters):
    platforms = ", ".join(context.module_context.platforms)
    raise ValueError(
        f"the Triton kernel {_name(fn)} runs on NVIDIA GPUs, and this computation is for {platforms}; "
        "set TRITON_INTERPRET=1 before the first call to run it in Triton's interpreter"
    )


def _launch_torch(call: _Call, values: list, torch) -> list:
    if not interpreting() and not values[0].is_cuda:
        raise ValueError(f"launch of {_name(call.kernel)}: expected CUDA tensors, given one on {values[0].device}")
    device = values[0].device
    for name, value in zip(call.present, values):
        if value.device != device:
            raise ValueError(f"{name}: expected a tensor on {device}, as {call.present[0]} is, got one on {value.device}")
    results = {
        name: torch.empty(out.shape, dtype=getattr(torch, out.dtype), device=device) for name, out in call.wanted.items()
    }
    arguments = {**call.absent, **dict(zip(call.present, values)), **results, **dict(call.scalars), **dict(call.constants)}
    if interpreting():
        _let_numpy_count()
        with _INTERPRETER:
            call.kernel[call.grid](**arguments)
        return list(results.values())
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device(device):
        # Multiplications and additions fuse, as jax-triton asks for; Triton is about to change its default.
        options = {"num_warps": call.num_warps, "num_stages": call.num_stages, "enable_fp_fusion": True}
        call.kernel[call.grid](**arguments, **options)
    return list(results.values())


_INTERPRETER = threading.Lock()  # which has one grid, and JAX a thread for each device, torch as many as call


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
        raise ValueError(f"launch of {_name(call.kernel)}: NumPy arrays need Triton's interpreter, TRITON_INTERPRET=1")
    _let_numpy_count()
    results = {}
    for name, out in call.wanted.items():
        # Poison, so that an element which the kernel forgets is seen.
        floating = out.dtype in ("float32", "float16", "bfloat16")
        results[name] = np.full(out.shape, np.nan if floating else 77, dtype=np.dtype(out.dtype))
    memory = {name: _Memory(array) for name, array in {**dict(zip(call.present, values)), **results}.items()}
    with _INTERPRETER, np.errstate(all="ignore"):
        call.kernel[call.grid](**call.absent, **memory, **dict(call.scalars), **dict(call.constants))
    return list(results.values())
