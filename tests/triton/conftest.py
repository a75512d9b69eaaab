"""Runs the kernels in Triton's interpreter: it reads this variable when a kernel is decorated, at import."""

import os

os.environ["TRITON_INTERPRET"] = "1"
