"""GPU kernels in Triton, one file per operation. `launch.py` alone knows how a kernel reaches a framework.

Importing this package imports neither Triton nor a framework; `unavailable()` says whether its modules can be used from JAX.
"""

import importlib.util


def without_triton() -> str | None:
    """None where Triton is there, else the sentence that says what to install."""
    need = "the Triton kernels need the triton package, 3.6 or newer"
    if importlib.util.find_spec("triton") is None:
        return f"{need}: pip install 'dlm_kernels[gpu]'"
    import triton

    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 6):
        return f"{need}, and {triton.__version__} is installed: pip install 'dlm_kernels[gpu]'"
    return None


def unavailable() -> str | None:
    """None where JAX can lower the kernels for a GPU or interpret them, else the sentence that says what to install."""
    if reason := without_triton():
        return reason
    import triton

    if triton.knobs.runtime.interpret:
        return None
    if importlib.util.find_spec("jax_triton") is None:
        return "the Triton kernels need the jax-triton package, 0.3.1 or newer: pip install 'dlm_kernels[gpu]'"
    from jaxlib import gpu_triton

    # Without JAX's CUDA plugin the module is there, and empty.
    if not hasattr(gpu_triton, "get_compute_capability"):
        return "the Triton kernels need JAX's CUDA plugin: pip install 'jax[cuda13]'"
    return None
