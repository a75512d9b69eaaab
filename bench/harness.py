"""Contenders of one case take turns in one process, on the same inputs, after their outputs were checked."""

import dataclasses
import functools
import math
import statistics
import time
import zlib
from collections.abc import Callable

import jax
import ml_dtypes
import numpy as np

from bench import machine

OURS = "dlm_kernels"
# What sampling is held against: ours without it, on the same logits. It does less, so it is no peer.
GREEDY = "ours, greedy"
# A call slower than this is timed once: a peer that takes a minute needs no median to be slow.
SLOW_SECONDS = 4.0
# Between contenders: a thread pool that has just finished still spins for a while, and would slow the next one.
REST_SECONDS = 0.003


@dataclasses.dataclass(frozen=True)
class Contender:
    """`function` of what `prepare` makes of the case's inputs; `prepare` is not timed, so it is for layout and packing only."""

    function: Callable
    prepare: Callable = lambda *inputs: inputs
    missing: str | None = None  # the reason it cannot run here
    compiles: bool = False  # for half a minute at its first call, so not in a quick run


@dataclasses.dataclass(frozen=True)
class Timed:
    """Returned by a contender that starts a program, which times itself: the start is not what is compared."""

    seconds: float
    error: float  # of what it computed, which it has to compare itself


@dataclasses.dataclass(frozen=True)
class Case:
    """One named shape. The first contender is ours; `read`, `written` and `flops` are the least that any of them must do."""

    operation: str
    name: str
    inputs: Callable  # of a numpy Generator; a tuple of jax arrays
    contenders: dict[str, Contender]
    read: int  # bytes
    written: int = 0  # bytes
    flops: int = 0
    dtype: str = "float32"  # of the products: chooses the matrix rate
    oracle: Callable | None = None  # of the inputs; else the first contender that runs is what the others must equal
    tolerance: float = 1e-4  # on `error`
    tokens: int = 0  # that one call generates, where it generates some
    sweep: tuple[str, int] | None = None  # the axis that this case is a point of, and where
    component: dict | None = None  # what part of a decoder's pass this is
    apart: dict | None = None  # what its process has to start with, see `bench.apart`; else it runs in the suite's
    sampled: Callable = lambda output: output  # the part of the output that the oracle computes, where all of it takes too long
    quick: bool = False  # in every run
    full: bool = False  # in a full run alone: too large for a CPU, or one of many alike
    headline: bool = False  # in the README


def error(output, expected):
    """The greatest difference of any array: relative Frobenius for floats, the share of unequal elements for integers."""
    worst = 0.0
    for got, want in zip(jax.tree.leaves(output), jax.tree.leaves(expected), strict=True):
        got, want = as_numpy(got), as_numpy(want)
        if got.shape != want.shape:
            return math.inf
        if np.issubdtype(want.dtype, np.floating) or want.dtype == ml_dtypes.bfloat16:
            got, want = got.astype(np.float64), want.astype(np.float64)
            # Infinities (a query that sees nothing) must be in the same places; their difference would be NaN.
            if not np.array_equal(np.isinf(got), np.isinf(want)):
                return math.inf
            got, want = np.where(np.isinf(got), 0, got), np.where(np.isinf(want), 0, want)
            gap = np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-30)
        else:
            gap = np.mean(got != want)
        worst = math.inf if math.isnan(gap) else max(worst, float(gap))
    return worst


def as_numpy(array):
    if type(array).__module__.startswith("torch"):
        array = array.detach().cpu()
        array = array.float() if array.dtype.is_floating_point else array
    return np.asarray(array)


def wait(output):
    """Until the device has finished."""
    for leaf in jax.tree.leaves(output):
        if isinstance(leaf, jax.Array):
            leaf.block_until_ready()
        elif type(leaf).__module__.startswith("torch") and leaf.is_cuda:
            import torch

            torch.cuda.synchronize()
    return output


def input_sets(case, cache_bytes):
    """Enough copies of the inputs, each with its own random data, that a set has left the caches when it comes round again."""
    rng = np.random.default_rng(zlib.crc32(f"{case.operation} {case.name}".encode()))
    first = case.inputs(rng)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(first))
    copies = min(64, max(1, math.ceil(4 * cache_bytes / max(size, 1))))
    return [first, *(case.inputs(rng) for _ in range(copies - 1))]


def measure(case, seconds, quick=False):
    """The row of `case`: times per call of each contender over `seconds` of rounds, or the reason that there are none."""
    with jax.default_matmul_precision(None if machine.platform_name() == "cpu" else machine.FULL):
        return _measure(case, seconds, quick)


def _measure(case, seconds, quick):
    # JAX makes arrays while Python goes on: the first contender would wait for gigabytes of random weights.
    sets = jax.block_until_ready(input_sets(case, machine.cache_bytes()))
    expected = None if case.oracle is None else case.oracle(*sets[0])
    results, ready, calls = {}, {}, {}
    for name, contender in case.contenders.items():
        if reason := contender.missing or (quick and contender.compiles and "left out of a quick run"):
            results[name] = dict(missing=reason)
            continue
        try:
            prepared = [contender.prepare(*inputs) for inputs in sets]
            start = time.perf_counter()
            function = _compiled(contender.function, prepared[0])
            compiling = time.perf_counter() - start
            again = functools.partial(_call, function, prepared)
            queued = functools.partial(_call, function, prepared, wait=lambda output: output)
            if contender.compiles:  # within its first call
                again(0)
                compiling = time.perf_counter() - start
            start = time.perf_counter()
            output, peak = machine.peak_bytes(functools.partial(again, 0), function)
            first = time.perf_counter() - start
        except Exception as failure:  # a peer may fail in any way; its row says how
            results[name] = dict(missing=f"{type(failure).__name__}: {str(failure).strip().splitlines()[0][:200]}")
            continue
        if isinstance(output, Timed):
            first, peak, gap = output.seconds, None, output.error
        else:
            output = case.sampled(output)
            expected = output if expected is None else expected
            gap = error(output, expected)
        if gap > case.tolerance:
            results[name] = dict(missing=f"wrong: differs by {gap:.2g}, more than {case.tolerance:.2g}")
            continue
        del output
        results[name] = dict(compile=compiling, first_call=first, peak_bytes=peak, error=gap, times=[first])
        if first < SLOW_SECONDS:
            ready[name] = again if machine.platform_name() == "cpu" else queued
            # A round's share of one contender is at least 10 ms, or the clock and one hiccup decide.
            calls[name] = 1 if first > 0.5 else max(1, math.ceil(0.01 / _seconds(again, 1)))
    memory, gave = None if case.flops else machine.Memory(), []

    def between():
        if memory is not None:
            gave.append(memory.rates())

    # Of three rounds one beside a neighbour's burst is the median as often as not.
    least = 2 if quick else 7 if case.headline else 3
    for name, times in _rounds(ready, calls, seconds, least, between).items():
        results[name]["times"] = times
    return dict(
        operation=case.operation,
        case=case.name,
        read=case.read,
        written=case.written,
        flops=case.flops,
        dtype=case.dtype,
        sweep=case.sweep,
        tokens=case.tokens,
        headline=case.headline,
        component=case.component,
        memory={name: statistics.median(each[name] for each in gave) for name in ("read", "copy")} if gave else {},
        contenders=results,
    )


def _compiled(function, inputs):
    """A jitted function compiled for `inputs`, whose first call then is one of many; any other as it is."""
    return function.lower(*inputs).compile() if hasattr(function, "lower") else function


def _seconds(call, turn, times=1):
    """Of one call among so many. An accelerator has them all in its queue, as a decoder's loop keeps it: to start a call and to
    wait for it takes longer than many a kernel. On a CPU each is waited for, within `call`.
    """
    seconds, start = [], time.perf_counter()
    for i in range(times):
        output = call(turn + i)
        if isinstance(output, Timed):
            seconds.append(output.seconds)
    wait(output)
    return statistics.mean(seconds or [(time.perf_counter() - start) / times])


def _call(function, sets, i, wait=wait):
    return wait(function(*sets[i % len(sets)]))


def _rounds(ready, calls, seconds, least, between):
    """Each contender's seconds per call in every round; all of them run in every round, so times of a round compare.

    between() is called after each.
    """
    times = {name: [] for name in ready}
    began, turn, working = time.perf_counter(), 2, 0.0
    for done in range(200 if ready else 0):
        start = time.perf_counter()
        if start - began > seconds and done >= (least if working < SLOW_SECONDS else 2):
            break
        for name, call in ready.items():
            time.sleep(REST_SECONDS)
            times[name].append(_seconds(call, turn, calls[name]))
        turn += max(calls.values())
        working += time.perf_counter() - start  # without what between() takes, which on a busy machine is as long
        between()
    return times


def ours(function, **static):
    """Our kernel for this platform, and plain jax.numpy, as the first two contenders."""
    return {
        OURS: Contender(jax.jit(functools.partial(function, implementation=machine.implementation(), **static))),
        "jnp": Contender(jax.jit(functools.partial(function, implementation="xla", **static))),
    }


def with_gradients(contenders):
    """Of losses those losses and their gradients for hidden states and weight, the first two arguments."""
    return {name: Contender(jax.jit(jax.value_and_grad(each.function, argnums=(0, 1)))) for name, each in contenders.items()}


def chosen(cases, grid):
    """Those of a "quick", "main" or "full" run; each holds the one before."""
    return [case for case in cases if case.quick or grid == "full" or (grid == "main" and not case.full)]


def achieved(row):
    """{dtype: operations/s of the fastest contender}: a product's measured rate is no ceiling where somebody does better."""
    fastest = [min(result["times"]) for result in row["contenders"].values() if result.get("times")]
    return {row["dtype"]: row["flops"] / min(fastest)} if fastest else {}


def microbenchmark(cases):
    """A pytest-benchmark test of every (case, contender) of `cases()`, for a module that says

        test_attention, pytest_generate_tests = harness.microbenchmark(cases)

    pytest asks the second for the parameters; in any other run of the module nobody does.
    """

    def test(benchmark, case, name):
        import pytest

        contender = case.contenders[name]
        if contender.missing:
            pytest.skip(contender.missing)
        benchmark.group = f"{case.operation}: {case.name}"
        sets = [contender.prepare(*inputs) for inputs in input_sets(case, machine.cache_bytes())]
        turn = iter(range(1 << 62))
        benchmark(lambda: _call(contender.function, sets, next(turn)))

    def generate(metafunc):
        pairs = [(case, name) for case in chosen(cases(), "main") for name in case.contenders]
        metafunc.parametrize("case, name", pairs, ids=[f"{case.name}-{name}" for case, name in pairs])

    return test, generate
