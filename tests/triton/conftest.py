"""Runs the kernels in Triton's interpreter: it reads this variable when a kernel is decorated, at import.

`make test-gpu` sets it to 0.
"""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
