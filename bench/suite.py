"""Runs the cases of every operation on the present device and keeps the results."""

import datetime
import gc
import json
import os
import signal
import sys
import tempfile
import time
from unittest import mock

from bench import (
    apart,
    attention,
    cross_entropy,
    divergence,
    end_to_end,
    experts,
    guidance,
    harness,
    lm_head,
    machine,
    matmul,
    report,
    scale,
    truncation,
    unmask,
)

OPERATIONS = (attention, unmask, lm_head, matmul, experts, guidance, truncation, cross_entropy, divergence, scale, end_to_end)
# Measurements of the ceilings in every run, however few its cases: of one alone, somebody else's burst would be the ceiling.
LOOKS = 4
# To aim for. None is the device's usual run: a CPU leaves out what is too large for it, the others leave out nothing.
MINUTES = {"quick": 2, None: 14, "full": 60}


def run(grid, only, minutes, out):
    """Writes the results file, its table and its plots; the exit status is 1 where our own kernel gave no valid time, or anybody
    computed what the others did not: without an oracle it may be ours that is wrong, and a peer's wrong code is no peer.
    """
    path = out or report.RESULTS / f"{machine.device_name()}{'-quick' * (grid == 'quick')}.json"
    _try_to_write(path)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        # What compilers kept from other runs would be the first call's time otherwise.
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as kept:
            caches = {name: f"{kept}/{name}" for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
            with mock.patch.dict(os.environ, caches):
                failed = _run(grid, only, minutes, path)
    except (KeyboardInterrupt, SystemExit):
        if path.exists():  # so that the table and the plots hold what has been measured
            report.write(path)
        raise
    print(f"{path}\n{report.write(path)}")
    if failed:
        print(f"\nFAILED, {len(failed)}:", *failed, sep="\n")
    return int(bool(failed))


def _try_to_write(path):
    """Before minutes are spent on what nobody will see."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            path.open("ab").close()
        tempfile.TemporaryFile(dir=path.parent).close()  # the file whole is written beside it, and then named
    except OSError as error:
        raise report.Unusable(f"--out: {path}: {error.strerror}") from None


def _run(grid, only, minutes, path):
    """Writes the results file after every case; what failed."""
    end = time.monotonic() + 60 * (minutes or MINUTES[grid])
    grid = grid or ("main" if machine.platform_name() == "cpu" else "full")
    every = [case for module in OPERATIONS for case in module.cases()]
    whole = harness.chosen(every, grid)
    cases = [case for case in whole if (only or "").lower() in f"{case.operation} {case.name}".lower()]
    if not cases:
        raise report.Unusable(f"--only: expected a part of a case's operation and name, got {only!r}")
    # Those of the README first, then other shapes, points of curves, and the largest, in case the time is up before.
    cases.sort(key=lambda case: (not (case.headline or case.quick), case.full, case.sweep is not None))
    # A part of a run takes its part of the run's time, unless it was given time of its own.
    left_out = 0 if minutes else len(whole) - len(cases)
    # Until a case has run anew its row of before stays, so that a run that is stopped loses nothing.
    known = {(case.operation, case.name) for case in every}
    rows = [row for row in report.load(path)["rows"] if key(row) in known] if path.exists() else []
    ran, rates, setup, failed, looks = [], {}, 0.0, [], 0

    def keep():
        measured = [dict(rates=rates) | each for each in ran]  # those with ceilings of their own keep them
        _write(path, [row for row in rows if key(row) not in map(key, ran)] + measured)

    about = dict(commit=machine.commit(), run=f"{datetime.datetime.now():%Y-%m-%d %H:%M}", versions=machine.describe()["versions"])
    for i, case in enumerate(cases):
        if time.monotonic() > end:
            print(f"{case.operation}: {case.name}: left out, the time is up", flush=True)
            continue
        # The ceilings move with whatever else the machine does, so they are measured again and again, and the best one holds.
        if i % 30 == 0 or looks < LOOKS:
            rates, looks = harness.greatest(machine.rates(), rates), looks + 1
        # What is left goes into rounds, but for what compiling, checking and making inputs took of a case so far; and not all of
        # it, for heavier cases may follow.
        seconds = max(0.5, 0.3 * ((end - time.monotonic()) / (left_out + len(cases) - i) - setup / max(1, i)))
        began = time.monotonic()
        try:
            measure = harness.measure if case.apart is None else apart.measure
            row = measure(case, seconds, grid == "quick") | about
        except (MemoryError, RuntimeError) as failure:  # as for inputs that do not fit
            failed.append(f"{case.operation}: {case.name}: {type(failure).__name__}: {str(failure)[:200]}")
            print(failed[-1], flush=True)
            continue
        setup += max(0, time.monotonic() - began - seconds)
        if "rates" not in row:
            rates = harness.greatest(harness.achieved(row), rates)
        ran.append(row)
        keep()
        failed += _failures(row)
        print(f"{report.line(row, row.get('rates', rates))} [{time.monotonic() - began:.1f} s]", flush=True)
        gc.collect()
        machine.give_back()
    if ran and looks < LOOKS:
        for _ in range(LOOKS - looks):
            rates = harness.greatest(machine.rates(), rates)
        keep()
    return failed


def _failures(row):
    for name, result in row["contenders"].items():
        missing = result.get("missing", "")
        # Arguments that our kernel says it does not take are none of its failures.
        if missing.startswith(harness.WRONG) or (name == harness.OURS and missing and "cannot run" not in missing):
            yield f"{row['operation']}: {row['case']}: {name}: {missing}"


def key(row):
    return row["operation"], row["case"]


def _write(path, rows):
    result = dict(machine=machine.describe(), rows=sorted(rows, key=_order))
    path.parent.mkdir(parents=True, exist_ok=True)
    report.replace(path, json.dumps(_rounded(result), indent=1) + "\n")


def _order(row):
    return [module.__name__.split(".")[-1] for module in OPERATIONS].index(row["operation"])


def _rounded(value):
    """Four digits: the rest is noise, and would make every run's file look all different."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, list | tuple) else value
