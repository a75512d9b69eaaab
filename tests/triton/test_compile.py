"""Every kernel and configuration compiles for Ampere, Hopper and Blackwell, with no GPU: what ptxas says of it.

A GPU runs nothing here; what this catches is a kernel that does not compile, spills registers, asks for more shared memory than
the chip has, or misses its tensor cores.
"""

import json
import os
import pathlib
import subprocess
import sys

import pytest

# sm_86 and sm_89 have the least, 99 KB, and take the tiles of sm_80.
SHARED = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}


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
        assert not row["stack"], row
    # What the scores of logits are bound by: 85% of an H200's bandwidth leaves 14 instructions for a bfloat16, and a thread has 64.
    (score,) = [row for row in rows if row["case"] == "score bfloat16" and row["kernel"] == "_score_kernel"]
    assert 0 < score["instructions"] <= 14 * 64, score
    if arch == 90:
        heads = "_scores_kernel", "_loss_kernel", "_dlogits_kernel", "_divergence_kernel", "_divergence_dlogits_kernel"
        for kernel in ("_forward_kernel", *heads, "_product_kernel", "_hidden_kernel", "_down_kernel"):
            halves = [row for row in rows if row["kernel"] == kernel and "float32" not in row["case"]]
            assert halves and all(row["tensor_core"] == "wgmma" for row in halves), halves
        # Two programs of the plain scores share a multiprocessor.
        (scores,) = [row for row in rows if row["case"] == "head bfloat16 R=128" and row["kernel"] == "_scores_kernel"]
        assert scores["registers"] <= 128, scores
