"""Every kernel and configuration compiles for Hopper and Blackwell, with no GPU: what ptxas says of registers and shared memory.

A GPU runs nothing here; what this catches is a kernel that does not compile, asks for more shared memory than the chip has,
misses its tensor cores, or begins to spill.
"""

import json
import os
import pathlib
import subprocess
import sys

import pytest

SHARED = {90: 227 * 1024, 100: 227 * 1024}
# Bytes a thread keeps in local memory. These still spill a little; nothing else may.
STACK = {
    90: {"_forward_kernel": 128, "_dq_kernel": 104},
    100: {"_forward_kernel": 144, "_dq_kernel": 104, "_scores_kernel": 40},
}


@pytest.mark.parametrize("arch", SHARED)
def test_compiles(arch):
    script = pathlib.Path(__file__).with_name("compile_kernels.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, script, str(arch)], capture_output=True, text=True, env=environment | {"JAX_PLATFORMS": "cpu"}
    )
    assert run.returncode == 0, run.stderr[-2000:]
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(rows) > 50
    for row in rows:
        assert "error" not in row, row
        assert row["shared"] <= SHARED[arch], row
        assert row["warps"] and not row["scratch"], row
        assert row["stack"] <= STACK[arch].get(row["kernel"], 0), row
    if arch == 90:
        for kernel in ("_forward_kernel", "_scores_kernel", "_loss_kernel", "_dlogits_kernel", "_product_kernel"):
            halves = [row for row in rows if row["kernel"] == kernel and "float32" not in row["case"]]
            assert halves and all(row["tensor_core"] == "wgmma" for row in halves), halves
