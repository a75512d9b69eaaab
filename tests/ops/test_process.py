"""What the CPU kernels do in a process of their own: without memory, and with a program that another process compiled."""

import os
import subprocess
import sys

import pytest


def run(script, **environment):
    command = [sys.executable, "-c", script]
    return subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment, timeout=300
    )


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not hold a process to a size")
def test_too_little_memory_is_an_error_and_not_the_end_of_the_process():
    """Of a gradient whose threads find none for their sums, while XLA finds enough for its arrays."""
    done = run("""
import resource
import jax, jax.numpy as jnp
import dlm_kernels

def shaped(n):
    return jnp.ones((2, 4096, n, 256))

def loss(query, key, value):
    return dlm_kernels.attention(query, key, value, mask=dlm_kernels.masks.packed(jnp.arange(4096)[None] // 8)).sum()

arrays = shaped(8), shaped(1), shaped(1)
gradient = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*arrays).compile()
with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * resource.getpagesize()
for room in range(512, 128, -16):
    resource.setrlimit(resource.RLIMIT_AS, (used + room * 2**20, -1))
    try:
        jax.block_until_ready(gradient(*arrays))
        print("enough")
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        print(error)
""")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "enough" in done.stdout and "RESOURCE_EXHAUSTED" in done.stdout


def test_a_program_compiled_by_another_process_runs(tmp_path):
    write = f"""
import pickle
import jax, jax.numpy as jnp
from jax.experimental import serialize_executable
import dlm_kernels
compiled = jax.jit(lambda x: dlm_kernels.mix_guidance(x, -x, 2.0)).lower(jnp.ones((1, 2, 9))).compile()
pickle.dump(serialize_executable.serialize(compiled), open({str(tmp_path / "program")!r}, "wb"))
"""
    read = f"""
import pickle
import jax, jax.numpy as jnp
from jax.experimental import serialize_executable
import dlm_kernels
program = serialize_executable.deserialize_and_load(*pickle.load(open({str(tmp_path / "program")!r}, "rb")))
assert (program(jnp.ones((1, 2, 9))) == 3).all()
"""
    for script in (write, read):
        # What XLA has from JAX's cache it does not write whole.
        done = run(script, JAX_ENABLE_COMPILATION_CACHE="false")
        assert done.returncode == 0, done.stderr[-2000:]
