"""The benchmark's command: `make bench`, or python -m benchmarks.run [--only w1,w3] [--quick] [--rounds N].

It runs the workloads one after another and writes benchmarks/out/results.md and results.json after each. Exit code 0:
all targets met (a quick run asks for none); 1: a run failed or stored wrong rows; 3: a target was missed.
"""

from __future__ import annotations

import argparse
import shutil
import sys

from benchmarks import report
from benchmarks.measure import ROOT
from benchmarks.workloads import WORKLOADS, Bench


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure MarketSync beside dlt and a plain loop.")
    parser.add_argument("--only", default=",".join(WORKLOADS), help=f"workloads: {', '.join(WORKLOADS)}")
    parser.add_argument("--quick", action="store_true", help="a tenth of the rows, one round: does it run at all?")
    parser.add_argument("--rounds", type=int, default=3, help="how often each system runs (default 3)")
    options = parser.parse_args()
    chosen = [name.strip().lower() for name in options.only.split(",")]
    if unknown := [name for name in chosen if name not in WORKLOADS]:
        parser.error(f"no workload {', '.join(unknown)}; there are {', '.join(WORKLOADS)}")

    out = ROOT / "benchmarks" / "out"
    scratch = out / "work"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    bench = Bench(scratch, 1 if options.quick else options.rounds, options.quick)
    for name in chosen:
        WORKLOADS[name](bench)
        report.write(bench, out)
    print(f"\n{(out / 'results.md').relative_to(ROOT)} and results.json hold every figure.")
    if wrong := [run for run in bench.runs if not run.right]:
        print(f"{len(wrong)} of {len(bench.runs)} runs failed or stored wrong rows:", file=sys.stderr)
        for run in wrong:
            print(f"  {run.workload} {run.system} round {run.round}: {run.note}", file=sys.stderr)
        return 1
    missed = [target for target in bench.targets if not target.met]
    if missed and not bench.quick:
        print(f"{len(missed)} of {len(bench.targets)} targets were missed.", file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
