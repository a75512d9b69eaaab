"""python -m bench [--quick | --full] [--only NAME] | report FILE | readme | compare A B | tune | tpu-schedule"""

import argparse
import sys
from pathlib import Path

from bench import comparison, machine, report, suite, tpu_schedule


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
    parser.add_argument("--minutes", type=float, help="time to aim for; cases that would begin after it are left out")
    parser.add_argument("--out", type=Path, help="default: bench/results/<device>.json, -quick.json with --quick")
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("report", help="table and plots of a results file").add_argument("file", type=Path)
    commands.add_parser("readme", help="rewrite the results in README.md from bench/results/*.json")
    compare = commands.add_parser("compare", help="what became slower or faster beyond noise; exit status 1 if slower")
    compare.add_argument("before", type=Path)
    compare.add_argument("after", type=Path)
    tuning = commands.add_parser("tune", help="time other sizes of the kernels' tiles and write the fastest into the sources")
    tuning.add_argument("--build", action="store_true", help="only compile what the next run times")
    tuning.add_argument("--only", metavar="NAME", help="sizes whose name contains NAME")
    static = commands.add_parser("tpu-schedule", help="static cycles of the TPU kernels and their peers, by libtpu, without a TPU")
    static.add_argument("--chip", choices=[*tpu_schedule.HARDWARE, "all"], default="all")
    help = "Pallas kernels alone: XLA takes minutes for a transposition on v6e and 7x"
    static.add_argument("--pallas", action="store_true", help=help)
    static.add_argument("--only", metavar="NAME", help="cases whose name contains NAME; others keep their rows")
    chosen = parser.parse_args(arguments)
    if chosen.command == "report":
        print(report.write(chosen.file))
    elif chosen.command == "tpu-schedule":
        return tpu_schedule.main(chosen.chip, chosen.only, chosen.pallas)
    elif chosen.command == "tune":
        if machine.platform_name() == "cuda":
            from bench import tune_triton

            return tune_triton.run(chosen.only)
        from bench import tune  # needs what builds the kernels: pybind11 and a compiler

        tune.run(chosen.only, chosen.build)
    elif chosen.command == "readme":
        report.rewrite_readme()
    elif chosen.command == "compare":
        text, slower = comparison.compare(report.load(chosen.before), report.load(chosen.after))
        print(text)
        return int(slower)
    else:
        return suite.run(chosen.grid, chosen.only, chosen.minutes, chosen.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
