"""GPU kernels in Triton, one file per operation. `launch.py` alone knows how a kernel reaches a framework.

Importing this package imports neither Triton nor a framework; `unavailable()` says whether its modules can be used from JAX.
"""

import functools
import importlib
import importlib.util
import re

_NEED = "the Triton kernels need the {}"
_INSTALL = "pip install 'dlm_kernels[gpu]'"


def without_triton() -> str | None:
    """None where Triton is there, else the sentence that says what to install."""
    need = _NEED.format("triton package, 3.6 or newer")
    if importlib.util.find_spec("triton") is None:
        return f"{need}: {_INSTALL}"
    if failure := _failure("triton"):
        return f"{need}, and what is installed does not load ({failure}): {_INSTALL}"
    # A folder of this name is a module too, without a version.
    version = getattr(importlib.import_module("triton"), "__version__", "none")
    if [*map(int, re.findall(r"\d+", version)[:2])] < [3, 6]:
        return f"{need}, and {version} is installed: {_INSTALL}"
    return None


def unavailable() -> str | None:
    """None where JAX can lower the kernels for a GPU or interpret them, else the sentence that says what to install."""
    if reason := without_triton():
        return reason
    import triton

    if triton.knobs.runtime.interpret:
        return None
    need = _NEED.format("jax-triton package, 0.3.1 or newer")
    if importlib.util.find_spec("jax_triton") is None:
        return f"{need}: {_INSTALL}"
    from jaxlib import gpu_triton

    # Without JAX's CUDA plugin the module is there, and empty.
    if not hasattr(gpu_triton, "get_compute_capability"):
        return _NEED.format("CUDA plugin of JAX") + ": pip install 'jax[cuda13]'"
    if failure := _failure("dlm_kernels.triton_kernels.launch", "jax_triton"):
        return f"{need}, and what is installed does not load ({failure}): {_INSTALL}"
    return None


@functools.cache  # a module that fails would be imported anew by every call
def _failure(module: str, loader: str | None = None) -> str | None:
    """Why the module, or a function of it that loads another, fails: a call that does not need it must not fail too."""
    try:
        loaded = importlib.import_module(module)
        if loader is not None:
            getattr(loaded, loader)()
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None
