"""python -m bench [--quick | --full] [--only NAME] | report FILE | readme | compare A B | tune | tpu-schedule"""

import argparse
import math
import sys
from pathlib import Path

from bench.tpu_hardware import HARDWARE  # everything else when a command asks for it: importing JAX may start a TPU


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    grid = parser.add_mutually_exclusive_group()
    grid.add_argument("--quick", action="store_const", dest="grid", const="quick", help="the first cases alone, in 2 minutes")
    grid.add_argument(
        "--full", action="store_const", dest="grid", const="full", help="every shape, in an hour; else a CPU leaves out large ones"
    )
    parser.add_argument(
        "--only", metavar="NAME", help="cases whose operation or name contains NAME; others keep their rows"
    )
    parser.add_argument("--minutes", type=minutes, help="time to aim for; cases that would begin after it are left out")
    parser.add_argument("--out", type=results_file, help="default: bench/results/<device>.json, -quick.json with --quick")
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("report", help="table and plots of a results file").add_argument("file", type=results_file)
    commands.add_parser("readme", help="rewrite the results in README.md from bench/results/*.json")
    compare = commands.add_parser("compare", help="what became slower or faster beyond noise; status 1 if slower, 3 if unknown")
    compare.add_argument(
        "--least", type=share, help="a change is one that is by more than this share; default: 0.5, for runs of one commit differ"
    )
    compare.add_argument("before", type=Path)
    compare.add_argument("after", type=Path)
    tuning = commands.add_parser("tune", help="time other sizes of the kernels' tiles and write the fastest into the sources")
    tuning.add_argument("--build", action="store_true", help="only compile what the next run times")
    part = "sizes whose name contains NAME; on a GPU kernels and cases"
    tuning.add_argument("--only", metavar="NAME", dest="part", help=part)
    static = commands.add_parser("tpu-schedule", help="static cycles of the TPU kernels and their peers, by libtpu, without a TPU")
    static.add_argument("--chip", choices=[*HARDWARE, "all"], default="all")
    pallas = "Pallas kernels alone: XLA takes minutes for a transposition on v6e and 7x"
    static.add_argument("--pallas", action="store_true", help=pallas)
    static.add_argument("--only", metavar="NAME", dest="part", help="cases whose name contains NAME; others keep their rows")
    chosen = parser.parse_args(arguments)
    for option in ("grid", "only", "minutes", "out") if chosen.command else ():
        if (value := getattr(chosen, option)) is not None:
            option = value if option == "grid" else option
            parser.error(f"--{option}: {chosen.command} takes none before its name")
    from bench import report

    try:
        return run(chosen)
    except report.Unusable as error:
        parser.exit(2, f"{parser.prog}: {error}\n")


def run(chosen):
    from bench import comparison, machine, report

    if chosen.command == "report":
        print(report.write(chosen.file))
    elif chosen.command == "readme":
        report.rewrite_readme()
    elif chosen.command == "compare":
        least = comparison.LEAST_CHANGE if chosen.least is None else chosen.least
        text, status = comparison.compare(report.load(chosen.before), report.load(chosen.after), least)
        print(text, comparison.note(least), sep="\n")
        return status
    elif chosen.command == "tpu-schedule":
        from bench import tpu_schedule

        return tpu_schedule.main(chosen.chip, chosen.part, chosen.pallas)
    elif chosen.command == "tune":
        if machine.platform_name() == "cuda":
            from bench import tune_triton

            return tune_triton.run(chosen.part)
        for package in ("pybind11", "setuptools"):  # which build the kernels
            if reason := machine.why_missing(package):
                raise report.Unusable(f"tune: {reason}")
        from bench import tune

        tune.run(chosen.part, chosen.build)
    else:
        from bench import suite

        return suite.run(chosen.grid, chosen.only, chosen.minutes, chosen.out)
    return 0


def minutes(text):
    if not 0 < (value := float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"expected more than 0, got {text}")
    return value


def share(text):
    if not 0 <= (value := float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"expected a share of at least 0, got {text}")
    return value


def results_file(text):
    if Path(text).suffix != ".json":  # the table and the plots are written beside it, under its name without that
        raise argparse.ArgumentTypeError(f"expected a name that ends in .json, got {text!r}")
    return Path(text)


if __name__ == "__main__":
    sys.exit(main())
