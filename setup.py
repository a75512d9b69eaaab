"""Places python/ and pallas_kernels/ into one package, and builds csrc/ into dlm_kernels._cpu.

Each kernel source is compiled once per instruction set, into namespace dlm::<set>; the table of the best one is chosen when
the module is first used. XLA's headers come from the jaxlib that the build runs with, which pyproject.toml pins to the oldest
supported.
"""

import os
import platform
from concurrent.futures import ThreadPoolExecutor
from glob import glob

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

KERNELS = ["attention", "attention_backward", "guidance", "truncation", "unmask", "lm_head", "cross_entropy", "divergence"]
KERNELS += ["experts", "matmul", "table"]
COMMON = ["dispatch", "handlers", "module"]
# Rounding may differ between instruction sets (a fused multiply-add rounds once), never between calls.
# -g0: Python's own flags, which come first, may ask for debugging symbols, which make the module eight times as large.
FLAGS = ["-std=c++20", "-O3", "-g0", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", "-Wall"]
INSTRUCTION_SETS = {"portable": []}
if platform.machine() in ("x86_64", "AMD64"):
    avx2 = ["-mavx2", "-mfma", "-mf16c"]
    INSTRUCTION_SETS["avx2"] = avx2
    INSTRUCTION_SETS["avx512"] = [*avx2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
    # GCC 12 warns of its own AVX-512 header.
    INSTRUCTION_SETS["avx512"] += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
    INSTRUCTION_SETS["avx512_bf16"] = [*INSTRUCTION_SETS["avx512"], "-mavx512bf16"]
# Set by DLM_KERNELS_SANITIZE ("portable": that instruction set alone). After FLAGS, so that -O1 wins, and -g, by which a report
# names lines. XLA's and pybind11's templates are left out: they would take minutes and only hand arrays over.
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g", "-O1"]
SANITIZED = {*KERNELS, "dispatch"}


class BuildKernels(build_ext):
    def build_extension(self, extension):
        wanted = os.environ.get("DLM_KERNELS_SANITIZE")
        sanitize = SANITIZE if wanted else []
        sets = ["portable"] if wanted == "portable" else [*INSTRUCTION_SETS]
        only = [("DLM_ISA", "portable")] if sets == ["portable"] else []

        def compile_for(isa, name):
            flags = [*FLAGS, *INSTRUCTION_SETS.get(isa, []), *(sanitize if name in SANITIZED else [])]
            return self.compiler.compile(
                [f"csrc/{name}.cc"],
                output_dir=os.path.join(self.build_temp, isa),
                macros=[("DLM_ISA", isa)] if isa != "common" else only,
                include_dirs=["csrc"],
                extra_postargs=[*flags, *_system_includes()],
                depends=extension.depends,
            )

        jobs = [("common", name) for name in COMMON] + [(isa, name) for isa in sets for name in KERNELS]
        with ThreadPoolExecutor(_processors()) as pool:
            objects = [path for paths in pool.map(lambda job: compile_for(*job), jobs) for path in paths]
        self.compiler.link_shared_object(
            objects, self.get_ext_fullpath(extension.name), extra_postargs=sanitize, target_lang="c++"
        )


def _processors():
    """Those that this process may use: in a container fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _system_includes():
    """As system headers, for their warnings are not ours to mend."""
    import jax.ffi
    import pybind11

    return [flag for path in (jax.ffi.include_dir(), pybind11.get_include()) for flag in ("-isystem", path)]


setup(
    packages=[*find_packages("python"), "dlm_kernels.pallas_kernels"],
    package_dir={"": "python", "dlm_kernels.pallas_kernels": "pallas_kernels"},
    ext_modules=[
        Extension("dlm_kernels._cpu", [f"csrc/{name}.cc" for name in KERNELS + COMMON], depends=sorted(glob("csrc/*.h")))
    ],
    cmdclass={"build_ext": BuildKernels},
)
