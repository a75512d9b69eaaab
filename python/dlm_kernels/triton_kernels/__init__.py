"""GPU kernels in Triton, one file per operation. `launch.py` alone knows how a kernel reaches a framework.

Importing this package imports neither Triton nor a framework; `unavailable()` says whether its modules can be used from JAX.
"""

import importlib.util


def unavailable() -> str | None:
    """None where JAX can lower the kernels for a GPU or interpret them, else the sentence that says what to install."""
    if importlib.util.find_spec("triton") is None:
        return "the Triton kernels need the triton package, 3.6 or newer: pip install 'dlm_kernels[gpu]'"
    import triton

    if triton.knobs.runtime.interpret:
        return None
    from jaxlib import gpu_triton

    # Without JAX's CUDA plugin the module is there, and empty.
    if not hasattr(gpu_triton, "get_compute_capability"):
        return "the Triton kernels need JAX's CUDA plugin: pip install 'jax[cuda13]'"
    return None
