"""Writes what was measured as JSON, for programs, and as Markdown, for people. Nothing is measured here."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from benchmarks.measure import ROOT
from benchmarks.workloads import Bench, as_json

PACKAGES = ("polars", "deltalake", "pyarrow", "requests", "requests-ratelimiter", "pyrate-limiter")


def machine() -> dict[str, str]:
    """Return what the figures were measured on and with."""
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    found = {
        "processor": f"{len(os.sched_getaffinity(0))} x {cpu}",
        "python": sys.version.split()[0],
        "system": f"{platform.system()} {platform.release()}",
        "commit": commit.stdout.strip(),
    }
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    dlt = ROOT / ".venvs" / "dlt" / "bin" / "python"
    if dlt.exists():
        asked = [str(dlt), "-c", "from importlib.metadata import version; print(version('dlt'))"]
        found["dlt"] = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    return found


def markdown(bench: Bench, on: dict[str, str]) -> str:
    """Return the report as Markdown: targets, medians, every run."""
    lines = [
        "# Benchmark",
        "",
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC; {bench.rounds} rounds, systems alternated within each. "
        "Whole processes, start-up and imports included; CPU is user and system time; ratios are medians of the ratios "
        "within a round.",
        "",
        ", ".join(f"{name} {value}" for name, value in on.items()),
        "",
    ]
    if bench.quick:
        lines += ["**A quick run: a tenth of the rows, so that start-up weighs most. Its targets are not meant.**", ""]
    lines += ["## Targets", "", "| workload | figure | measured | asked | |", "|---|---|--:|--:|---|"]
    for target in bench.targets:
        measured = "not measured" if target.figure is None else f"{target.figure:.3g}"
        met = "met" if target.met else "**missed**"
        lines.append(f"| {target.workload} | {target.claim} | {measured} | {target.asked} | {met} |")
    lines += [
        "",
        "## Medians",
        "",
        "| workload | system | rows | us CPU/row | rows/s | wall s | CPU s | peak MB | requests | commits | right |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for workload, system in dict.fromkeys((run.workload, run.system) for run in bench.runs):
        runs = [run for run in bench.runs if (run.workload, run.system) == (workload, system)]
        if not any(run.right for run in runs):
            lines.append(f"| {workload} | {system} | {runs[0].rows:,} | | | | | | | | 0 of {len(runs)} |")
            continue
        wall = bench.median(workload, system, lambda run: run.wall_seconds) or 0.0
        cells = [
            f"{runs[0].rows:,}",
            f"{bench.median(workload, system, lambda run: run.us_per_row):.2f}",
            f"{runs[0].rows / wall:,.0f}",
            f"{wall:.2f}",
            f"{bench.median(workload, system, lambda run: run.cpu_seconds):.2f}",
            f"{bench.median(workload, system, lambda run: run.peak_mb):.0f}",
            f"{bench.median(workload, system, lambda run: run.requests):.0f}",
            f"{commits:.0f}" if (commits := bench.median(workload, system, lambda run: run.commits)) else "",
            f"{sum(run.right for run in runs)} of {len(runs)}",
        ]
        lines.append(f"| {workload} | {system} | {' | '.join(cells)} |")
    lines += [
        "",
        "## Every run",
        "",
        "| workload | system | round | CPU s | wall s | first request to commit s | peak MB | load before | note |",
        "|---|---|--:|--:|--:|--:|--:|--:|---|",
    ]
    for run in bench.runs:
        span = "" if run.request_to_commit_seconds is None else f"{run.request_to_commit_seconds:.2f}"
        note = run.note.replace("|", "\\|")
        lines.append(
            f"| {run.workload} | {run.system} | {run.round} | {run.cpu_seconds:.2f} | {run.wall_seconds:.2f} | {span} "
            f"| {run.peak_mb:.0f} | {run.load:.1f} | {note} |"
        )
    return "\n".join(lines) + "\n"


def write(bench: Bench, folder: Path) -> None:
    """Writes results.json and results.md into the folder."""
    on = machine()
    (folder / "results.json").write_text(json.dumps({"machine": on, **as_json(bench)}, indent=1))
    (folder / "results.md").write_text(markdown(bench, on))
