"""All that needs an NVIDIA GPU, in the order in which it should work: the tests, and with --bench the benchmarks after them.

    python tests/on_gpu.py [--bench[="OPTIONS OF bench"]] [--only WORD]

Fetches nothing: it wants jax with its CUDA plugin, triton, jax-triton and pytest, for its part torch, and builds the package with
the pybind11 and setuptools that are there where that is not done. With pytest-xdist the tests run in several processes: compiling
is what takes their time. --only: steps whose name contains WORD. Prints last what failed; the exit status is how many steps did.
"""

import argparse
import importlib.util
import os
import shlex
import subprocess
import sys
from pathlib import Path

# Kernels run and are not interpreted; JAX and torch share the memory.
ON_GPU = {"TRITON_INTERPRET": "0", "JAX_PLATFORMS": "cuda,cpu", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
# Torch's kernels are compared with JAX on the CPU, which does not round the products of float32 to TF32.
TORCH = ON_GPU | {"JAX_PLATFORMS": "cpu"}
PYTEST = ["pytest", "-rf", "--durations=5"]
if importlib.util.find_spec("xdist") is not None:
    PYTEST += ["-n", str(min(8, os.cpu_count()))]
TESTS = {
    "kernels at the sizes of models": ([*PYTEST, "-m", "gpu", "tests/triton"], ON_GPU),
    "kernels against the oracle": ([*PYTEST, "tests/leaves", "-k", "triton"], ON_GPU),
    "kernels from torch": ([*PYTEST, "tests/torch"], TORCH),
}
BENCH = "benchmarks"
BUILD = ["pip", "install", "-q", "--no-build-isolation", "--no-deps", "-e", "."]
LOOK = "import jax, triton; print(jax.__version__, triton.__version__, *jax.devices('gpu'))"


def run(module, environment, **options):
    root = Path(__file__).resolve().parent.parent
    return subprocess.run([sys.executable, *module], cwd=root, env=os.environ | environment, **options)


def main(bench, only):
    absent = [name for name in ("jax", "triton", "jax_triton", "pytest", "numpy") if importlib.util.find_spec(name) is None]
    if absent:
        return f"{sys.executable} has no {' and no '.join(absent)}: pip install 'jax[cuda13]' triton 'jax-triton<0.4' pytest numpy"
    look = run(["-c", LOOK], ON_GPU, capture_output=True, text=True)
    if look.returncode:
        why = look.stderr.strip().splitlines()[-1:] or ["no reason given"]
        return f"JAX finds no NVIDIA GPU: it needs its driver, and pip install 'jax[cuda13]' ({why[0]})"
    print(look.stdout.strip(), flush=True)
    if run(["-c", "import dlm_kernels._cpu"], {"JAX_PLATFORMS": "cpu"}).returncode and run(["-m", *BUILD], {}).returncode:
        return "the package could not be built: pip install pybind11 'setuptools>=77', and a C++ compiler"
    steps = TESTS | ({} if bench is None else {BENCH: (["bench", *shlex.split(bench)], ON_GPU)})
    if run(["-c", "import torch; assert torch.cuda.is_available()"], {}, capture_output=True).returncode:
        del steps["kernels from torch"]
        print("no torch with CUDA: its tests are left out")
    steps = {name: step for name, step in steps.items() if only in name}
    if not steps:
        return f"--only: expected a word of {', '.join(map(repr, [*TESTS, BENCH]))}, got {only!r}"
    failed = []
    for name, (module, environment) in steps.items():
        print(f"== {name}: {' '.join(module)}", flush=True)
        if run(["-m", *module], environment).returncode:
            failed.append(name)
    print("failed: " + ", ".join(failed) if failed else f"passed: {', '.join(steps)}")
    return len(failed)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bench", metavar="OPTIONS", nargs="?", const="", help="measure too, by python -m bench OPTIONS")
    parser.add_argument("--only", metavar="WORD", default="")
    sys.exit(main(**vars(parser.parse_args())))
