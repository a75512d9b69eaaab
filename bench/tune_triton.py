"""On a GPU: times the Triton kernels with other tiles, and writes the fastest to their table."""

import dataclasses
import functools
import itertools
import math
import multiprocessing
import os
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from unittest import mock

import jax
import numpy as np

import dlm_kernels
from bench import attention, experts, harness, lm_head, machine, report
from bench.harness import OURS, Contender, Patched
from dlm_kernels.triton_kernels import launch, tiles

OWN = "own"  # the kernel's own choice
TABLE = machine.ROOT / "python/dlm_kernels/triton_kernels/tiles.py"


@dataclasses.dataclass(frozen=True)
class Kernel:
    name: str
    cases: Callable  # () -> the cases that choose, one at least for each kind of arguments
    constants: dict[str, tuple[int, ...]]  # tried, in the place of the kernel's own
    warps: tuple[int, ...] = (4, 8)
    stages: tuple[int, ...] = (1, 2)

    def candidates(self):
        """(constants, warps, stages) of all that may fit."""
        constants = [dict(zip(self.constants, values)) for values in itertools.product(*self.constants.values())]
        return [each for each in itertools.product(constants, self.warps, self.stages) if _may_fit(*each)]


def _may_fit(constants, warps, stages):
    """False where attention's accumulators spill, and where its stages are more than Hopper's shared memory at heads of 128."""
    m, n = constants.get("BLOCK_M", 0), constants.get("BLOCK_N", 0)
    return m * n <= 2048 * warps and n * stages <= 384


def _attention(dtype):
    shapes = [("LLaDA-8B", 1024, 1024), ("LLaDA-8B", 32, 2048), ("MDLM", 1024, 1024)]
    shapes += [("DiffusionGemma local", 256, 1280), ("DiffusionGemma global", 256, 2048)]
    return [attention.case(*shape, dtype, mask) for shape in shapes for mask in (None, "padded", "BD3 16")]


def _backward(dtype):
    return [attention.case(model, 1024, 1024, dtype, backward=True) for model in ("LLaDA-8B", "MDLM", "DiffusionGemma local")]


def _head(dtype):
    cases = [lm_head.case("LLaDA-8B", rows, 4096, 126464, dtype) for rows in (32, 128, 1024)]
    return [*cases, *map(_drawn, cases[:2])]


def _drawn(case):
    """With noise, which is the same whatever the tiles: what all must equal is what the kernel's own draw."""

    def scores(hidden, weight):
        how = dict(temperature=1.0, key=jax.random.key(7), implementation=machine.implementation())
        return tuple(dlm_kernels.lm_head_scores(hidden, weight, **how))

    contenders = {OURS: Contender(jax.jit(scores))}
    return dataclasses.replace(case, name=f"{case.name}, temperature 1", contenders=contenders, oracle=None)


def _experts(dtype):
    return [experts.case("LLaDA2-mini", rows, 2048, 512, 256, 8, dtype) for rows in (32, 8192)]


def _kernels(dtype, forward, backward, head, mixture, stages):
    return [
        Kernel("attention_forward", functools.partial(_attention, dtype), forward, stages=stages),
        Kernel("attention_backward", functools.partial(_backward, dtype), backward, stages=stages),
        Kernel("lm_head", functools.partial(_head, dtype), head, stages=stages),
        Kernel("experts", functools.partial(_experts, dtype), mixture, stages=stages),
    ]


KERNELS = _kernels(
    "bfloat16",
    {"BLOCK_M": (64, 128), "BLOCK_N": (32, 64, 128)},
    {"BLOCK_M": (32, 64, 128), "BLOCK_N": (32, 64, 128)},
    # 32 rows would be multiplied by another instruction than 128 are on Hopper: a row's bits would depend on how many there are.
    {"BLOCK_R": (64, 128), "BLOCK_D": (32, 64, 128)},
    {"BLOCK_M": (64, 128), "BLOCK_N": (32, 64, 128)},
    stages=(1, 2, 3, 4),
) + _kernels(
    "float32",  # as products of two parts, which take twice the registers
    {"BLOCK_M": (16, 32, 64), "BLOCK_N": (16, 32)},
    {"BLOCK_M": (16, 32), "BLOCK_N": (16, 32)},
    # The parts' products are added up for each BLOCK_D, so another would round a row otherwise than at another number of rows.
    {"BLOCK_R": (16, 32)},
    {"BLOCK_M": (16, 32), "BLOCK_N": (32, 64)},
    stages=(1, 2),
)


class Table(dict):
    """A table that has `candidate`'s constants, warps and stages for one kernel, and keeps for which kind it was asked."""

    def __init__(self, known, kernel, candidate):
        super().__init__(known)
        self.kernel, self.candidate, self.asked = kernel, candidate, None

    def get(self, key, own):
        if key[0] != self.kernel:
            return super().get(key, own)
        self.asked = key
        return self.candidate or own


def compile_all(cases):
    """Every candidate of all (kernel, case), on all processors, into Triton's cache on disk, where the measurement finds it."""
    numbers = {}  # of the cases of each kernel, for a case's functions cannot be sent to a process
    work = []
    for kernel, case in cases:
        at = numbers.setdefault(id(kernel), [each.name for each in kernel.cases()]).index(case.name)
        work += [(kernel, at, candidate) for candidate in kernel.candidates()]
    # They need no GPU, whose memory is the measurement's.
    environment = {"JAX_PLATFORMS": "cpu", "DLM_KERNELS_CUDA_ARCH": str(launch.arch())}
    spawn = multiprocessing.get_context("spawn")
    with mock.patch.dict(os.environ, environment), ProcessPoolExecutor(os.cpu_count(), spawn) as pool:
        try:
            list(pool.map(_compile, *zip(*work)))
        except BrokenProcessPool as failure:  # what is left the measurement compiles
            print(f"compiling beforehand: {failure}", flush=True)


def _compile(kernel, at, candidate):
    """Lowers one candidate for a GPU, which compiles its kernels; what cannot be compiled is the measurement's to report."""
    with (
        mock.patch.object(machine, "platform_name", lambda: "cuda"),
        mock.patch.object(tiles, "MEASURED", Table(tiles.MEASURED, kernel.name, candidate)),
        harness.precision((case := kernel.cases()[at]).dtype),
    ):
        shapes = jax.eval_shape(lambda: case.inputs(np.random.default_rng(0)))
        jax.clear_caches()  # of what was traced with another candidate
        try:
            case.contenders[OURS].function.trace(*shapes).lower(lowering_platforms=("cuda",))
        except Exception:
            pass


def measured(kernel, case):
    """(key of the table, {candidate's number, or OWN: seconds} of those that ran)."""
    contender = case.contenders[OURS]

    def tried_with(table):
        return Contender(Patched(contender.function, tiles, "MEASURED", table), contender.prepare)

    own = Table(tiles.MEASURED, kernel.name, None)
    contenders = {OWN: tried_with(own)}
    for i, candidate in enumerate(kernel.candidates()):
        contenders[i] = tried_with(Table(tiles.MEASURED, kernel.name, candidate))
    # What does not fit the chip's memory or registers fails, and is missing from the row.
    row = harness.measure(dataclasses.replace(case, contenders=contenders), seconds=5.0)
    times = {name: statistics.median(result["times"]) for name, result in row["contenders"].items() if "times" in result}
    if not times:
        raise RuntimeError(f"{case.name}: {row['contenders'][OWN]['missing']}")
    return own.asked, times


def fastest(kernel, times):
    """(constants, warps, stages) of the least geometric mean over `times`, one dict of `measured` for each case of a key; None: the
    kernel's own.
    """
    ran = set(times[0]).intersection(*times)  # in every case
    means = {name: statistics.geometric_mean([each[name] for each in times]) for name in ran}
    best = min(means, key=means.get, default=OWN)
    # The kernel's own may not fit this chip.
    return kernel.candidates()[best] if best != OWN and means[best] < 0.98 * means.get(OWN, math.inf) else None


def run(only=None):
    cases = [(kernel, case) for kernel in KERNELS for case in kernel.cases()]
    cases = [(kernel, case) for kernel, case in cases if (only or "").lower() in f"{kernel.name} {case.name}".lower()]
    if not cases:
        names = ", ".join(dict.fromkeys(kernel.name for kernel in KERNELS))
        raise report.Unusable(f"--only: expected a part of one of {names} and a case's name, got {only!r}")
    compile_all(cases)
    table, times = dict(tiles.MEASURED), {}
    for kernel, case in cases:
        key, seconds = measured(kernel, case)
        times.setdefault(key, []).append(seconds)  # several cases may be of one key
        found = fastest(kernel, times[key])
        table.pop(key, None)
        if found is not None:
            table[key] = found
        print(f"{key}: {found or 'its own'}", flush=True)
        TABLE.write_text(text(table))
    print(TABLE)


def text(table):
    lines = [f"    {key!r}: {value!r}," for key, value in sorted(table.items())]
    about = "all others are the kernels' own" if lines else "none has been measured yet"
    return "\n".join(
        [
            f'"""The fastest tiles, written by `python -m bench tune` on GPUs; {about}."""',
            "",
            "# (kernel, compute capability, the arguments of the kernel's own choice): (constants, warps, stages).",
            *("MEASURED = {", *lines, "}", ""),
        ]
    )
