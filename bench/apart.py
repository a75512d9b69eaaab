"""Measures one case in a process of its own, whose processors or number of devices are settled when it starts."""

import json
import os
import subprocess
import sys

from bench import harness, machine

PROCESSORS = machine.processors()
# {number of processors: what so few reach at best}, not what all do: the ceilings of their cases, measured with the first of them.
RATES = {}


def measure(case, seconds, quick=False):
    """`harness.measure` of a case of `bench.scale`. apart["processors"]: it runs on so many, and every library makes as many
    threads; apart["devices"]: XLA divides the CPU into so many devices.
    """
    processors, devices = (case.apart.get(name) for name in ("processors", "devices"))
    environment = dict(os.environ)
    if devices:
        environment["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    # Before anything is imported: some libraries make their threads then.
    confine = f"import os; os.sched_setaffinity(0, {PROCESSORS[:processors]}); " if processors else ""
    part = bool(processors) and processors < len(PROCESSORS)
    ceilings = part and processors not in RATES
    program = f"{confine}from bench import apart; apart.main({case.name!r}, {seconds!r}, {quick!r}, {ceilings!r})"
    made = subprocess.run([sys.executable, "-c", program], cwd=machine.ROOT, env=environment, capture_output=True, text=True)
    if made.returncode:
        raise RuntimeError(f"its process ended with {made.returncode}: {made.stderr.strip()[-500:]}")
    row = json.loads(made.stdout.splitlines()[-1])
    if part:
        RATES.setdefault(processors, row.get("rates"))
        row["rates"] = RATES[processors] = harness.greatest(harness.achieved(row), RATES[processors])
    return row


def main(name, seconds, quick, ceilings):
    """ceilings: the row is to hold what this process's processors reach at best."""
    from bench import scale

    case = next(case for case in scale.cases() if case.name == name)
    row = harness.measure(case, seconds, quick)
    if ceilings:
        row["rates"] = machine.rates()
    print(json.dumps(row))
