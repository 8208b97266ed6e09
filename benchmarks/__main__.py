"""Command line: ``python -m benchmarks list | run [case ...] [--quick] | plot``."""

import argparse
import json
import sys
from pathlib import Path

from benchmarks import harness


def main(arguments: list[str] | None = None) -> int:
    """Run the command; the exit status is 1 if a case failed or crashed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="print the names of all cases")
    run = commands.add_parser("run", help="measure cases, one JSON each")
    run.add_argument("case", nargs="*", help="names or their beginnings; default: all")
    one = commands.add_parser("measure", help="measure one case in this process, print its JSON")
    one.add_argument("case")
    for command in (run, one):
        command.add_argument("--quick", action="store_true", help="small sizes, three repeats")
        command.add_argument("--seed", type=int, default=0)
    plot = commands.add_parser("plot", help="draw figures from the JSON files alone")
    plot.add_argument("--quick", action="store_true", help="of quick runs")
    plot.add_argument("--figures", type=Path, default=harness.FIGURES)
    for command in (run, plot):
        command.add_argument("--results", type=Path, default=harness.RESULTS)
    chosen = parser.parse_args(arguments)

    if chosen.command == "list":
        print("\n".join(harness.cases()))
        return 0
    if chosen.command == "measure":
        (case,) = harness.select([chosen.case])
        print(json.dumps(harness.measure(case, quick=chosen.quick, seed=chosen.seed)))
        return 0
    if chosen.command == "plot":
        for path in harness.plot(chosen.results, chosen.figures, quick=chosen.quick):
            print(path.name)
        return 0
    bad = 0
    for case in harness.select(chosen.case):
        record = harness.run_case(case.name, quick=chosen.quick, seed=chosen.seed)
        # An exception's text may name places; a missing peer is no result.
        if record["status"] not in ("crashed", "not installed"):
            harness.write(record, chosen.results)
        print(harness.line(record), flush=True)
        bad += record["status"] not in ("ok", "not installed")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
