"""What the machine is, what it can do at best, and how much memory a call takes."""

import ctypes
import functools
import importlib
import importlib.metadata
import importlib.util
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

PACKAGES = ("dlm_kernels", "jax", "jaxlib", "numpy", "torch", "triton", "jax_triton", "tokamax", "gguf")
M_ARENA_MAX = -8  # of glibc's mallopt
MOST_L2 = 128 << 20  # of a GPU's so far, for where nobody tells
# Accelerators' float32 products as the CPU and torch compute them: by default XLA would round their operands to fewer bits.
FULL, TF32 = "highest", "default"
ROOT = Path(__file__).resolve().parent.parent
if platform.libc_ver()[0] == "glibc":
    # malloc_trim, which `peak_bytes` needs, gives all of the main arena back, but of the threads' own arenas only parts.
    ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)


@functools.cache
def platform_name():
    return {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())


def implementation():
    """Our implementation for this platform."""
    return {"cuda": "triton", "tpu": "pallas"}.get(platform_name(), "cpu")


def device_name():
    """A file name for the device: its model, and on a CPU the threads and the widest vectors."""
    if platform_name() != "cpu":
        words = jax.devices()[0].device_kind
    else:
        flags = set(_cpuinfo("flags").split())
        isa = next((name for name in ("avx512_bf16", "avx512f", "avx2") if name in flags), platform.machine())
        words = f"{_cpu()} {len(processors())} threads {isa}"
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


def processors():
    """Those that this process may use, as under taskset."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count()))


def _cpu():
    """Its model; ARM's have numbers in the place of a name."""
    if name := _cpuinfo("model name"):
        return name
    numbers = [f"{field} {value}" for field in ("implementer", "part") if (value := _cpuinfo(f"CPU {field}"))]
    return " ".join([platform.machine(), *numbers])


def first_line(failure):
    """What an exception is, and the beginning of what it says, if it says anything."""
    said = str(failure).strip().splitlines()
    return f"{type(failure).__name__}{f': {said[0][:200]}' if said else ''}"


def describe():
    """For the head of a results file."""
    from bench import llama_cpp

    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    versions["llama.cpp"] = llama_cpp.version()
    return dict(
        device=device_name(),
        kind=_cpu() if platform_name() == "cpu" else jax.devices()[0].device_kind,
        devices=len(jax.devices()),
        threads=len(processors()),
        cache_bytes=cache_bytes(),
        versions=versions,
    )


@functools.cache
def why_missing(package):
    """None where the Python package can be imported, and torch, which shares arrays with JAX, works on JAX's device."""
    if importlib.util.find_spec(package) is None:
        return f"the Python package {package} is not installed"
    try:
        module = importlib.import_module(package)
    except ImportError as error:  # as where a package that it needs is missing
        return f"the Python package {package} cannot be imported: {error}"
    if package == "torch" and platform_name() != "cpu" and not (platform_name() == "cuda" and module.cuda.is_available()):
        return f"this torch, {module.__version__}, does not work on the {platform_name().upper()} that JAX is on"
    return None


def installed(package):
    return why_missing(package) is None


def commit():
    """The commit measured, with -dirty where the tree holds changes to code."""
    if shutil.which("git") is None:
        return "unknown"
    git = functools.partial(subprocess.run, cwd=ROOT, capture_output=True, text=True)
    name = git(["git", "rev-parse", "--short=12", "HEAD"]).stdout.strip() or "unknown"
    changed = git(["git", "status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results", ":!README.md"])
    return name + ("-dirty" if changed.stdout.strip() else "")


def _cpuinfo(field):
    path = Path("/proc/cpuinfo")
    found = re.search(rf"^{field}\s*: (.*)$", path.read_text() if path.exists() else "", re.MULTILINE)
    return found.group(1) if found else ""


@functools.cache
def cache_bytes():
    """Of the last cache level: L3 on a CPU, L2 on a GPU."""
    if platform_name() == "cuda":
        if not installed("torch"):  # JAX does not tell
            return MOST_L2
        return importlib.import_module("torch").cuda.get_device_properties(0).L2_cache_size
    return _last_caches(Path("/sys/devices/system/cpu"), processors()) or 32 << 20


def _last_caches(folder, processors):
    """Bytes of all caches of the last level that any of `processors` reads through: a large chip has several."""
    levels = {}
    for processor in processors:
        for index in (folder / f"cpu{processor}/cache").glob("index*"):
            level, shared, size = ((index / name).read_text().strip() for name in ("level", "shared_cpu_list", "size"))
            number, unit = re.fullmatch(r"(\d+)([KM]?)", size).groups()
            levels.setdefault(int(level), {})[shared] = int(number) << {"": 0, "K": 10, "M": 20}[unit]
    return sum(levels[max(levels)].values()) if levels else 0


def _memory():
    """(bytes of an array that no cache holds, every way at hand to read it, and to copy it): a ceiling is what the machine can do,
    whoever gets it out.
    """
    on_cpu = platform_name() == "cpu"
    # Of an array four times the cache some is still found there, and reading it goes twice as fast as memory does.
    length = (8 * cache_bytes() if on_cpu else 1 << 31) // 4
    array = jnp.ones((length,), jnp.float32)
    total, successor = jax.jit(jnp.sum), jax.jit(lambda x: x + 1)
    read, copy = [lambda: total(array)], [lambda: successor(array)]
    if installed("torch"):
        import torch

        tensor = torch.from_dlpack(array)
        target = torch.empty_like(tensor)
        read.append(tensor.sum)
        copy.append(lambda: target.copy_(tensor))
    if on_cpu:
        halves = np.array_split(np.ones(length, np.float32), len(processors()))
        targets = [np.empty_like(half) for half in halves]
        pool = ThreadPoolExecutor(len(halves))
        read.append(lambda: list(pool.map(np.max, halves)))
        read.append(lambda: list(pool.map(np.dot, halves, halves)))
        copy.append(lambda: list(pool.map(np.copyto, targets, halves)))
    return 4 * length, read, copy


def rates(seconds=0.15):
    """The best seen of bytes/s read and copied, and of floating-point operations/s in a product by dtype; each way for so long."""
    size, read, copy = _memory()
    result = {name: min(_fastest(way, seconds) for way in ways) for name, ways in (("read", read), ("copy", copy))}
    result = {"read": size / result["read"], "copy": 2 * size / result["copy"]}
    del read, copy  # with their arrays
    shapes = [(512, 4096, 8192), (2048, 2048, 2048)] if platform_name() == "cpu" else [(8192, 8192, 8192)]
    products = {"float32": [(_jnp_product, jnp.float32)], "bfloat16": [(_jnp_product, jnp.bfloat16)]}
    if installed("torch"):
        import torch

        for dtype in products:
            products[dtype].append((_torch_product, getattr(torch, dtype)))
    for dtype, makers in products.items():
        result[dtype] = max(
            2 * math.prod(shape) / _fastest(make(shape, kind), seconds) for make, kind in makers for shape in shapes
        )
    if platform_name() == "cuda":
        # Ours multiply float32 numbers as three products of TF32, in units that IEEE's product does not reach.
        product = _jnp_product(shapes[0], jnp.float32, TF32)
        result["float32"] = max(result["float32"], 2 * math.prod(shapes[0]) / _fastest(product, seconds) / 3)
    # Where bfloat16 has no instructions of its own, the physical limit is to convert it and multiply in float32.
    result["bfloat16"] = max(result["bfloat16"], result["float32"])
    return result


# Of random numbers: a GPU that multiplies ones takes less power, and so runs faster than it does on any model's.
def _jnp_product(shape, dtype, precision=FULL):
    m, k, n = shape
    a, b = (jax.random.normal(jax.random.key(i), sizes, dtype) for i, sizes in enumerate(((m, k), (n, k))))
    product = jax.jit(lambda a, b: jnp.matmul(a, b.T, precision=precision))
    return lambda: product(a, b)


def _torch_product(shape, dtype):
    import torch

    m, k, n = shape
    device = "cuda" if platform_name() == "cuda" else "cpu"
    a, b = (torch.randn(sizes, dtype=dtype, device=device) for sizes in ((m, k), (n, k)))
    return lambda: a @ b.T


def _fastest(function, seconds):
    from bench.harness import wait

    wait(function())
    times, end = [], time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        start = time.perf_counter()
        wait(function())
        times.append(time.perf_counter() - start)
    return min(times)


def peak_bytes(call, function=None):
    """(what `call` returns, the most memory that it held at one time beyond what was held before; None where unknown).

    Linux keeps the peak of the resident size and lets a process reset it. What earlier calls have freed is given back first, or
    an array that fits into it would seem to take nothing. On a GPU or TPU XLA says what the compiled `function` takes, and torch's
    allocator what it gave.
    """
    if platform_name() != "cpu":
        torch = sys.modules.get("torch")
        if hasattr(function, "memory_analysis"):
            sizes = function.memory_analysis()
            return call(), sizes.temp_size_in_bytes + sizes.output_size_in_bytes
        if torch is None or not torch.cuda.is_available():
            return call(), None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        return call(), torch.cuda.max_memory_allocated() - before
    if not Path("/proc/self/clear_refs").exists():
        return call(), None
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    result = call()
    return result, max(0, _status("VmHWM") - before)


def give_back():
    """To the GPU what torch's allocator has kept, which JAX could not take."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _status(field):
    found = re.search(rf"^{field}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(found.group(1)) << 10
