"""Every TPU kernel compiles for every chip at the shapes of real models, with no TPU: the compiler refuses too much VMEM."""

import importlib.util
import json
import pathlib
import subprocess
import sys

import pytest

from dlm_kernels.pallas_kernels import chips


@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs libtpu, the TPU's compiler: pip install libtpu")
@pytest.mark.parametrize("kind", chips.CHIPS)
def test_compiles(kind):
    script = pathlib.Path(__file__).with_name("compile_kernels.py")
    run = subprocess.run([sys.executable, script, kind], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(rows) >= 16
    for row in rows:
        assert "error" not in row, row
        assert (row["kernels"] == 0) == ("AxisType.Auto" in row["case"]), row
