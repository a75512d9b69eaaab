"""Benchmarks: how far each kernel is from the physical limit, and from what one would use instead."""

import os

# OpenMP's threads (torch's) spin after their work is done, by default: that slows whoever has the next turn, and on a machine
# that others use too, it slows torch itself tenfold. Read when the library is loaded, so before any import of torch.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# JAX and torch share a GPU here; JAX would take three quarters of its memory at its first call.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
