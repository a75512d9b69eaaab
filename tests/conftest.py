"""Runs JAX on the CPU with four devices, so that sharding is tested where there is one machine, and Triton in its interpreter."""

import gc
import os
import pathlib

import jax
import pytest

jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS", "cpu"))
jax.config.update("jax_num_cpu_devices", 4)

# Triton reads it when a kernel is decorated, at import, of whichever test comes first. `make test-gpu` sets 0.
os.environ.setdefault("TRITON_INTERPRET", "1")

# To trace a program makes many objects and leaves few cycles: every 700 objects, Python would look for them a tenth of the time.
gc.set_threshold(200_000, 20, 100)


@pytest.fixture(scope="module", autouse=True)
def quick_compilation(request):
    """Tests compile for seconds and compute for milliseconds. What these compare, and a GPU, XLA optimises as it does for users."""
    optimised = request.path.stem == "test_properties" or request.path.parent.name == "torch"
    optimised |= os.environ.get("TRITON_INTERPRET") == "0"
    jax.config.update("jax_disable_most_optimizations", not optimised)


@pytest.fixture(scope="module", autouse=True)
def few_programs():
    """XLA maps memory for each program that it keeps, and with more than 65530 mappings Linux lets the process crash."""
    yield
    mappings = pathlib.Path("/proc/self/maps")
    if mappings.exists() and mappings.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()
