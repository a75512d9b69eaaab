"""GPU kernels in Triton, one file per operation. `launch.py` alone knows how a kernel reaches a framework.

Importing this package imports neither Triton nor a framework; `unavailable()` says whether its modules can be.
"""

import importlib.util


def unavailable() -> str | None:
    """None where the kernels can be traced and compiled, else the sentence that says what to install."""
    if importlib.util.find_spec("triton") is None:
        return "the Triton kernels need the triton package, 3.6 or newer: pip install 'dlm_kernels[gpu]'"
    return None
