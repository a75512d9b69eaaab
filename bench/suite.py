"""Runs the cases of every operation on the present device and keeps the results."""

import gc
import json
import time

from bench import attention, cross_entropy, end_to_end, guidance, harness, lm_head, machine, peers, report, unmask

OPERATIONS = (attention, unmask, lm_head, guidance, cross_entropy, end_to_end)


def run(quick, only, minutes, out):
    """Writes the results file, its table and its plots; the exit status is 1 where our own kernel gave no valid time."""
    path = out or report.RESULTS / f"{machine.device_name()}{'-quick' * quick}.json"
    cases = [case for module in OPERATIONS for case in module.cases(quick)]
    if only:
        cases = [case for case in cases if only.lower() in f"{case.operation} {case.name}".lower()]
    kept = report.load(path)["rows"] if only and path.exists() else []
    ran, rates, failed = [], {}, False
    end = time.monotonic() + 60 * minutes
    for i, case in enumerate(cases):
        # The ceilings move with whatever else the machine does, so they are measured again and again, and the best one holds.
        if i % 8 == 0:
            rates = _greatest(machine.rates(), rates)
        # Half of the time left goes into rounds; compiling, checking and making inputs take the other half.
        seconds = max(0.5, 0.5 * (end - time.monotonic()) / (len(cases) - i))
        row = harness.measure(case, seconds, quick) | dict(commit=machine.commit())
        ran = [dict(each, rates=rates) for each in [*ran, row]]
        # After every case: what was measured must not be lost with what comes next.
        _write(path, kept, ran)
        failed |= "missing" in row["contenders"][harness.OURS]
        print(report.line(row, rates), flush=True)
        gc.collect()
    print(f"{path}\n{report.write(path)}")
    return int(failed)


def _write(path, kept, ran):
    names = {(row["operation"], row["case"]) for row in ran}
    rows = [row for row in kept if (row["operation"], row["case"]) not in names] + ran
    result = dict(machine=machine.describe(), missing=_missing(), rows=sorted(rows, key=_order))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_rounded(result), indent=1) + "\n")


def _order(row):
    return [module.__name__.split(".")[-1] for module in OPERATIONS].index(row["operation"])


def _greatest(new, old):
    return {name: max(rate, old.get(name, 0)) for name, rate in new.items()}


def _missing():
    return {name: reason for name, reason in peers.WHY_MISSING.items() if not peers.installed(name)}


def _rounded(value):
    """Four digits: the rest is noise, and would make every run's file look all different."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, list | tuple) else value
