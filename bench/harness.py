"""Contenders of one case take turns in one process, on the same inputs, after their outputs were checked."""

import dataclasses
import functools
import math
import statistics
import sys
import time
import zlib
from collections.abc import Callable
from unittest import mock

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from bench import machine

OURS = "dlm_kernels"
# The package's plain XLA path; what the others must equal where no oracle can be computed.
PLAIN = "jnp"
# What sampling is held against: ours without it, on the same logits. It does less.
GREEDY = "ours, greedy"
# Ours on a weight laid out before, which a user may do once for many calls.
PACKED = "ours, packed"
# The operation of `dlm_kernels.torch`, called as a user of torch calls it.
FROM_TORCH = "ours, from torch"
# Ours in other circumstances: no peers, so none of them is who is faster than ours.
NO_PEERS = (GREEDY, PACKED, FROM_TORCH)
# A call slower than this is timed once: a peer that takes a minute needs no median to be slow.
SLOW_SECONDS = 4.0
# Rounds of every case: of fewer a rank test cannot tell two files apart, see `bench.comparison`.
LEAST_ROUNDS = 7
# Who has taken so long leaves after the first round if another peer was twice as fast, or after the second if one was 1.5 times:
# as fast but for noise, it might be the first in the next run.
LONG_SECONDS = 0.5
LEAVES = {1: 2.0, 2: 1.5}
# Copies of inputs so small that more would take longer to make than all calls: a cache holds them in a decoder, too.
MOST_SETS = 4096
# A prime, so that no two rows of a matrix are equal.
PERIOD = 4194301
# Numbers whose difference is taken at one time: so few that BLAS wakes no threads for their product.
PART = 1 << 13
# Between contenders: a thread pool that has just finished still spins for a while, and would slow the next one.
REST_SECONDS = 0.003


@dataclasses.dataclass(frozen=True)
class Contender:
    """`function` of what `prepare` makes of the case's inputs; `prepare` is not timed, so it is for what costs a user nothing, as
    another library's view of an array, or what the row tells beside the times: `once`.
    """

    function: Callable
    prepare: Callable = lambda *inputs: inputs
    missing: str | None = None  # the reason it cannot run here
    compiles: bool = False  # for half a minute at its first call, so not in a quick run
    once: bool = False  # what `prepare` makes is kept for many calls, at a cost in time and memory that the row tells
    # (output, *inputs) -> its error, where what it computes is not what the others must equal, as draws of another generator.
    check: Callable | None = None


WRONG = "wrong:"  # begins the reason of a row whose contender computed something else


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
    oracle: Callable | None = None  # of the inputs; else what all must equal is PLAIN's, or where that fails another peer's
    tolerance: float = 1e-4  # on `error`
    tokens: int = 0  # that one call generates, where it generates some
    sweep: tuple[str, int] | None = None  # the axis that this case is a point of, and where
    component: dict | None = None  # what part of a decoder's pass this is
    apart: dict | None = None  # what its process has to start with, see `bench.apart`; else it runs in the suite's
    sampled: Callable = lambda output: output  # the part of the output that the oracle computes, where all of it takes too long
    quick: bool = False  # in every run
    full: bool = False  # in a full run alone: too large for a CPU, or one of many alike
    headline: bool = False  # in the README


def is_ours(name):
    """Whether it is our kernel that runs, as such or in other circumstances."""
    return name == OURS or str(name).startswith("ours,")


def error(output, expected):
    """The greatest difference of any array: relative Frobenius for floats, the share of unequal elements for integers."""
    worst = 0.0
    for got, want in zip(jax.tree.leaves(output), jax.tree.leaves(expected), strict=True):
        got, want = as_numpy(got), as_numpy(want)
        if got.shape != want.shape:
            return math.inf
        if np.issubdtype(want.dtype, np.floating) or want.dtype == ml_dtypes.bfloat16:
            gap = _distance(got.ravel(), want.ravel())
        else:
            gap = np.mean(got != want)
        worst = math.inf if math.isnan(gap) else max(worst, float(gap))
    return worst


def _distance(got, want):
    """||got - want|| / ||want|| in float64, of parts that a cache holds: whole copies of a head's gradient are gigabytes."""
    apart = size = 0.0
    for at in range(0, len(want), PART):
        a, b = (x[at : at + PART].astype(np.float64) for x in (got, want))
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            # Infinities (a query that sees nothing) must be in the same places; their difference would be NaN.
            infinite = np.isinf(a)
            if not np.array_equal(infinite, np.isinf(b)):
                return math.inf
            a[infinite] = b[infinite] = 0
        a -= b
        apart, size = apart + np.dot(a, a), size + np.dot(b, b)
    return math.sqrt(apart) / max(math.sqrt(size), 1e-30)


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
    copies = min(MOST_SETS, max(1, math.ceil(4 * cache_bytes / max(size, 1))))
    return [first, *(case.inputs(rng) for _ in range(copies - 1))]


def normal(rng, shape, dtype, scale=1.0):
    """Normal numbers times `scale`; a large array's recur, since gigabytes of others take longer than what is measured."""
    numbers = rng.standard_normal(min(math.prod(shape), PERIOD), "float32") * np.float32(scale)
    return _repeated(jnp.asarray(numbers, dtype), shape)


_repeated = jax.jit(jnp.resize, static_argnums=1)


def measure(case, seconds, quick=False):
    """The row of `case`: times per call of each contender over `seconds` of rounds, or the reason that there are none."""
    with precision(case.dtype):
        return _measure(case, seconds, quick)


def precision(dtype):
    """Products of float32 numbers in full, as a CPU's are; torch may have been told otherwise.

    JAX's are left as they are where `dtype`, the case's, is another: asked for any precision, XLA keeps its Triton products from
    bfloat16 numbers too, and its code would be slower than a user's.
    """
    if torch := sys.modules.get("torch"):
        torch.set_float32_matmul_precision(machine.FULL)
    in_full = dtype == "float32" and machine.platform_name() != "cpu"
    return jax.default_matmul_precision(machine.FULL if in_full else None)


def _measure(case, seconds, quick):
    # JAX makes arrays while Python goes on: the first contender would wait for gigabytes of random weights.
    sets = jax.block_until_ready(input_sets(case, machine.cache_bytes()))
    expected = None if case.oracle is None else case.oracle(*sets[0])
    results, ready, calls = {}, {}, {}
    on_cpu = machine.platform_name() == "cpu"
    for name in checking_order(case):
        contender = case.contenders[name]
        if reason := contender.missing or (quick and contender.compiles and "left out of a quick run"):
            results[name] = dict(missing=reason)
            continue
        try:
            prepared, once = _prepared(contender, sets)
            start = time.perf_counter()
            function = _compiled(contender.function, prepared[0])
            compiling = time.perf_counter() - start
            again = functools.partial(_call, function, prepared)
            queued = functools.partial(_call, function, prepared, wait=lambda output: output)
            # Within its first call: a compiler, or on an accelerator whatever loads libraries and kernels then.
            if contender.compiles or not on_cpu:
                again(0)
                compiling = time.perf_counter() - start
            (output, first), peak = machine.peak_bytes(functools.partial(_timed, again), function)
        except Exception as failure:  # a peer may fail in any way; its row says how
            results[name] = dict(missing=machine.first_line(failure))
            continue
        if isinstance(output, Timed):
            first, peak = output.seconds, None
        reason, gap, expected = verify(case, name, output, expected, sets[0])
        if reason:
            results[name] = dict(missing=reason)
            continue
        del output
        if peak is not None:
            peak += once.get("once_bytes", 0)
        results[name] = dict(compile=compiling, first_call=first, peak_bytes=peak, error=gap, times=[first]) | once
        if first < SLOW_SECONDS:
            ready[name] = again if on_cpu else queued
            # A round's share of one contender is at least 10 ms, or the clock and one hiccup decide. The first call of what was not
            # compiled before it says less of the others.
            slow = 0.5 if on_cpu and function is contender.function else 0.1
            calls[name] = 1 if first > slow else max(1, math.ceil(0.01 / _seconds(again, 1)))
            if not on_cpu:
                results[name]["start"] = _start(queued)
    in_turn = {name: ready[name] for name in case.contenders if name in ready}
    for name, times in _rounds(in_turn, calls, seconds).items():
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
        contenders={name: results[name] for name in case.contenders},
    )


def checking_order(case):
    """Without an oracle whoever comes first is what the others must equal: never ours, or a wrong kernel would make everyone else
    wrong.
    """
    if case.oracle is not None:
        return list(case.contenders)
    return sorted(case.contenders, key=lambda name: (name != PLAIN, is_ours(name)))


def verify(case, name, output, expected, inputs):
    """(why the output of contender `name` is none to time, or None; its error; what the next must equal)."""
    check = case.contenders[name].check
    if isinstance(output, Timed):
        gap = output.error
    elif check is not None:
        gap = check(output, *inputs)
    else:
        output = case.sampled(output)
        if expected is None and is_ours(name):
            return "unchecked: nobody else ran, and there is no oracle", None, None
        expected = output if expected is None else expected
        gap = error(output, expected)
    wrong = not gap <= case.tolerance
    return f"{WRONG} differs by {gap:.2g}, more than {case.tolerance:.2g}" if wrong else None, gap, expected


def _prepared(contender, sets):
    """(each set as the contender takes it, what that costs a user once)."""
    start = time.perf_counter()
    prepared = [contender.prepare(*sets[0])]
    once = {}
    if contender.once:
        jax.block_until_ready(prepared)
        given = {id(leaf) for leaf in jax.tree.leaves(sets[0])}
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(prepared) if id(leaf) not in given)
        once = dict(once=time.perf_counter() - start, once_bytes=size)
    return [*prepared, *(contender.prepare(*inputs) for inputs in sets[1:])], once


def _timed(call):
    """(what the first call gives, its seconds)."""
    start = time.perf_counter()
    return call(0), time.perf_counter() - start


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


def _start(call, times=16):
    """Seconds until a call is in an accelerator's queue: a kernel that takes less is timed as its start. Of a few calls, for
    where the queue is full a call waits for another's end.
    """
    start = time.perf_counter()
    for i in range(times):
        output = call(i)
    seconds = (time.perf_counter() - start) / times
    wait(output)
    return seconds


def _call(function, sets, i, wait=wait):
    return wait(function(*sets[i % len(sets)]))


def _rounds(ready, calls, seconds):
    """Each contender's seconds per call in every round, of LEAST_ROUNDS at least, on the same inputs, so times of a round compare.

    Only ours and the fastest others, who are those that it is compared with, always stay to the end: the list of another, whose
    calls take long, is shorter.
    """
    times = {name: [] for name in ready}
    spent = dict.fromkeys(ready, 0.0)
    began, turn = time.perf_counter(), 2
    ready, stay = dict(ready), set(ready)
    for done in range(200 if ready else 0):
        if done >= LEAST_ROUNDS and time.perf_counter() - began > seconds:
            break
        if done in LEAVES and OURS in ready:
            others = {name: sum(times[name]) / len(times[name]) for name in ready if not is_ours(name)}
            stay = {OURS, *NO_PEERS, *(name for name in others if others[name] < LEAVES[done] * min(others.values()))}
        for name, call in list(ready.items()):
            if name not in stay and spent[name] > LONG_SECONDS:
                del ready[name]  # for good: the n-th times of two lists are of one round
                continue
            time.sleep(REST_SECONDS)
            times[name].append(_seconds(call, turn, calls[name]))
            spent[name] += times[name][-1] * calls[name]
        turn += max(calls.values())
    return times


def ours(function, **static):
    """Our kernel for this platform, and the package's plain XLA path, as the first two contenders."""
    return {
        OURS: Contender(jax.jit(functools.partial(function, implementation=machine.implementation(), **static))),
        PLAIN: Contender(jax.jit(functools.partial(function, implementation="xla", **static))),
    }


def with_gradients(contenders):
    """Of losses those losses and their gradients for hidden states and weight, the first two arguments."""
    return {name: Contender(jax.jit(jax.value_and_grad(each.function, argnums=(0, 1)))) for name, each in contenders.items()}


def chosen(cases, grid):
    """Those of a "quick", "main" or "full" run; each holds the one before."""
    return [case for case in cases if case.quick or grid == "full" or (grid == "main" and not case.full)]


class Patched:
    """A jitted function that compiles while `name` of `module` is `value`; what was compiled before is forgotten."""

    def __init__(self, function, module, name, value):
        self.function, self.patch = function, (module, name, value)

    def lower(self, *inputs):
        jax.clear_caches()  # which know nothing of it
        with mock.patch.object(*self.patch):
            return self.function.lower(*inputs)


def achieved(row):
    """{dtype: operations/s of the fastest contender}: a product's measured rate is no ceiling where somebody does better."""
    fastest = [min(result["times"]) for result in row["contenders"].values() if result.get("times")]
    return {row["dtype"]: row["flops"] / min(fastest)} if fastest else {}


def greatest(new, old):
    return old | {name: max(rate, old.get(name, 0)) for name, rate in new.items()}


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
        with precision(case.dtype):
            inputs = input_sets(case, machine.cache_bytes())
            sets = [contender.prepare(*each) for each in inputs]
            reason, *_ = verify(case, name, _call(contender.function, sets, 0), _expected(case, name, inputs[0]), inputs[0])
            assert reason is None, reason
            turn = iter(range(1 << 62))
            benchmark(lambda: _call(contender.function, sets, next(turn)))

    def generate(metafunc):
        pairs = [(case, name) for case in chosen(cases(), "main") for name in case.contenders]
        metafunc.parametrize("case, name", pairs, ids=[f"{case.name}-{name}" for case, name in pairs])

    return test, generate


def _expected(case, name, inputs):
    """What the output of contender `name` must equal; None where it is what the others must."""
    if case.oracle is not None:
        return case.oracle(*inputs)
    plain = case.contenders[PLAIN]
    return None if name == PLAIN else case.sampled(wait(plain.function(*plain.prepare(*inputs))))
