"""The workloads of `make bench`, and what is asked of each: one function a workload, which runs it and notes figures.

A figure that misses its target is noted like any other. How the systems are told what to do is in `systems.py`, how a
run is measured in `measure.py`, how results are written in `report.py`.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from benchmarks import systems
from benchmarks.measure import ROOT, PageServer, environment, page_server, run
from benchmarks.systems import Job


@dataclass
class Run:
    """One measured run of one system."""

    workload: str
    system: str
    round: int
    rows: int  # rows that it had to fetch; 0 where a run brought next to nothing
    wall_seconds: float
    cpu_seconds: float
    peak_mb: float
    load: float
    exit_code: int
    right: bool  # exit code 0, and exactly the expected rows in the destination
    requests: int
    commits: int | None = None
    request_to_commit_seconds: float | None = None  # from the first request to the last commit
    note: str = ""

    @property
    def us_per_row(self) -> float:
        """Processor microseconds a row."""
        return self.cpu_seconds / self.rows * 1e6 if self.rows else 0.0


@dataclass
class Target:
    """A figure and what it is asked to be."""

    workload: str
    claim: str
    asked: str
    figure: float | None  # None: it could not be measured
    met: bool


@dataclass
class Bench:
    """What has been run and found so far."""

    folder: Path  # scratch space, on the disk that is measured
    rounds: int
    quick: bool
    runs: list[Run] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)
    say: Callable[[str], None] = print

    def measure(
        self,
        workload: str,
        system: str,
        job: Job,
        server: PageServer,
        round_: int = 1,
        kind: str = "delta",
        *,
        folder: Path | None = None,
        rows: int | None = None,
    ) -> Run:
        """Runs a system on a job in an empty folder (or the given one, which is kept) and checks what it stored."""
        kept = folder is not None
        folder = folder or self.folder / f"{workload}-{system}".replace(" ", "-")
        if not kept:
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        if system == "MarketSync":
            command, output = systems.marketsync(job, server.url, folder), folder / "data"
        elif system.startswith("dlt"):
            command, output = systems.dlt(job, server.url, folder, kind), folder / "out"
        else:
            command, output = systems.naive(job, server.url, folder, kind), folder / "out"
        log = self.folder / f"{workload}-{system}-{round_}.log".replace(" ", "-")
        server.stats(reset=True)
        cost = run(command, folder, log)
        stats = server.stats()
        facts = self._verify(job, output) if cost.exit_code == 0 else {}
        words = log.read_text(errors="replace").strip().splitlines()
        note = "" if cost.exit_code == 0 else f"exit code {cost.exit_code}: {(words or ['no message'])[-1][:300]}"
        if facts and not facts["right"]:
            note = f"holds {facts['rows']} rows, {facts['expected']} expected" if "rows" in facts else facts["note"]
        done = Run(
            workload=workload,
            system=system,
            round=round_,
            rows=job.total if rows is None else rows,
            wall_seconds=cost.wall_seconds,
            cpu_seconds=cost.cpu_seconds,
            peak_mb=cost.peak_mb,
            load=cost.load,
            exit_code=cost.exit_code,
            right=bool(facts.get("right")),
            requests=int(stats["requests"]),
            commits=facts.get("commits"),
            request_to_commit_seconds=(
                facts["last_commit"] - stats["first_request"] if stats["requests"] and "last_commit" in facts else None
            ),
            note=note,
        )
        self.runs.append(done)
        self.say(
            f"{workload:14} {system:14} round {round_}: {done.us_per_row:7.2f} us/row  {done.cpu_seconds:7.2f} CPU s  "
            f"{done.wall_seconds:7.2f} s  {done.peak_mb:5.0f} MB  {done.requests} requests  {done.note}"
        )
        if not kept:
            shutil.rmtree(folder, ignore_errors=True)
        return done

    def _verify(self, job: Job, output: Path) -> dict:
        command = [sys.executable, "-m", "benchmarks.verify", str(output), *job.verify_arguments()]
        looked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment(), check=False)
        if looked.returncode != 0:
            return {"right": False, "note": f"cannot be read: {looked.stderr.strip().splitlines()[-1][:300]}"}
        return json.loads(looked.stdout)

    def ask(
        self, workload: str, claim: str, figure: float | None, *, at_most: float | None = None, at_least: float = 0.0
    ) -> None:
        """Notes a figure beside what is asked of it; a figure that is missing has missed."""
        asked = f"<= {at_most:g}" if at_most is not None else f">= {at_least:g}"
        met = figure is not None and (figure <= at_most if at_most is not None else figure >= at_least)
        self.targets.append(Target(workload, claim, asked, figure, met))
        shown = "not measured" if figure is None else f"{figure:.3g}"
        self.say(f"{workload:14} {claim}: {shown} (asked: {asked}) {'met' if met else 'MISSED'}")

    def median(self, workload: str, system: str, value: Callable[[Run], float | None]) -> float | None:
        """Return the median of a value over the right runs, or None when there is none."""
        runs = [run for run in self.runs if (run.workload, run.system) == (workload, system) and run.right]
        values = [number for run in runs if (number := value(run)) is not None]
        return statistics.median(values) if values else None

    def ratio(self, workload: str, system: str) -> float | None:
        """Return the median over rounds of how many times less processor time MarketSync took than the system."""
        cost = {(r.system, r.round): r.cpu_seconds for r in self.runs if r.workload == workload and r.right}
        ratios = [
            cost[system, round_] / cost["MarketSync", round_]
            for round_ in range(1, self.rounds + 1)
            if (system, round_) in cost and ("MarketSync", round_) in cost
        ]
        return statistics.median(ratios) if ratios else None


def bulk(bench: Bench) -> None:
    """W1: two million minute bars of 20 symbols into Delta, beside dlt and the plain loop; then 20 million."""
    systems.prepare_dlt()
    rows = 10_000 if bench.quick else 100_000
    for page_rows, us_per_row, times in ((5_000, 2.3, 15), (1_000, 3.0, 12)):
        workload = f"w1-{page_rows}"
        job = Job(symbols=20, rows=rows, page_rows=page_rows)
        with page_server(job.server_arguments()) as server:
            for round_ in range(1, bench.rounds + 1):
                bench.measure(workload, "MarketSync", job, server, round_)
                bench.measure(workload, "naive delta", job, server, round_, "delta")
                bench.measure(workload, "naive parquet", job, server, round_, "parquet")
                bench.measure(workload, "dlt parquet", job, server, round_, "parquet")
                if round_ == 1:
                    bench.measure(workload, "dlt delta", job, server, round_, "delta")
        cost = bench.median(workload, "MarketSync", lambda run: run.us_per_row)
        bench.ask(workload, "CPU microseconds a row", cost, at_most=us_per_row)
        bench.ask(workload, "times dlt's rows per CPU second", bench.ratio(workload, "dlt parquet"), at_least=times)
        faster = bench.ratio(workload, "naive delta")
        bench.ask(workload, "times the plain loop's rows per CPU second", faster, at_least=1.0)
        walls = [bench.median(workload, name, lambda run: run.wall_seconds) for name in ("naive delta", "MarketSync")]
        bench.ask(
            workload,
            "times as fast as the plain loop, by the clock",
            walls[0] / walls[1] if walls[0] and walls[1] else None,
            at_least=1.0,
        )
        memory = bench.median(workload, "MarketSync", lambda run: run.peak_mb)
        bench.ask(workload, "peak MB", memory, at_most=400)
    job = Job(symbols=20, rows=10 * rows, page_rows=5_000)
    with page_server(job.server_arguments()) as server:
        large = bench.measure("w1-memory", "MarketSync", job, server)
    bench.ask("w1-memory", f"peak MB at {job.total:,} rows", large.peak_mb if large.right else None, at_most=400)


def wide(bench: Bench) -> None:
    """W2: 5,000 symbols with a year of daily bars each, one page a symbol; batches have to cross symbols."""
    job = Job(symbols=500 if bench.quick else 5_000, rows=250, page_rows=1_000, step_minutes=1440, period="year")
    with page_server(job.server_arguments()) as server:
        for round_ in range(1, bench.rounds + 1):
            bench.measure("w2", "MarketSync", job, server, round_)
            bench.measure("w2", "naive delta", job, server, round_, "delta")
    bench.ask("w2", "CPU microseconds a row", bench.median("w2", "MarketSync", lambda run: run.us_per_row), at_most=7)
    bench.ask("w2", "commits in the Delta log", bench.median("w2", "MarketSync", lambda run: run.commits), at_most=20)


def latency(bench: Bench) -> None:
    """W3: every request takes 20 ms longer; ten threads have to hide that."""
    job = Job(symbols=20, rows=10_000 if bench.quick else 100_000, page_rows=1_000, latency_ms=20, threads=10)
    ideal = job.requests * job.latency_ms / 1000 / 10
    with page_server(job.server_arguments()) as server:
        for round_ in range(1, bench.rounds + 1):
            bench.measure("w3", "MarketSync", job, server, round_)
    taken = bench.median("w3", "MarketSync", lambda run: run.request_to_commit_seconds)
    bench.ask(
        "w3",
        "first request to last commit, over requests x latency / threads",
        taken / ideal if taken else None,
        at_most=1.3,
    )


def nightly(bench: Bench) -> None:
    """W4: a look-back of about 10,000 rows into 10 and then 50 million, which a first sync has stored."""
    today = datetime.now(UTC).date()
    costs: list[float | None] = []
    for millions in (1, 5) if bench.quick else (10, 50):
        days = millions * 1_000_000 // 20 // 1440
        whole = Job(
            symbols=20,
            rows=(days + 2) * 1440,  # goes on for two days more, so that now is always inside
            page_rows=5_000,
            start=today - timedelta(days=days),
            until_now=True,
            look_back="500 minutes",
        )
        workload = f"w4-{millions}m"
        folder = bench.folder / workload
        shutil.rmtree(folder, ignore_errors=True)
        with page_server(whole.server_arguments()) as server:
            filled = 20 * int(
                (datetime.now(UTC) - datetime.combine(whole.start, datetime.min.time(), UTC)).total_seconds() // 60
            )
            first = bench.measure(f"{workload}-fill", "MarketSync", whole, server, folder=folder, rows=filled)
            if first.right:
                for round_ in range(1, bench.rounds + 1):
                    bench.measure(
                        workload,
                        "MarketSync",
                        replace(whole, page_rows=1_000),
                        server,
                        round_,
                        folder=folder,
                        rows=10_000,
                    )
        shutil.rmtree(folder, ignore_errors=True)
        costs.append(bench.median(workload, "MarketSync", lambda run: run.cpu_seconds))
        if len(costs) == 1:
            bench.ask(workload, "CPU seconds of the whole run", costs[0], at_most=1.0)
    growth = costs[1] / costs[0] if costs[0] and costs[1] else None
    bench.ask("w4", "CPU of a nightly run, over that at a fifth of the history", growth, at_most=1.1)


WORKLOADS: dict[str, Callable[[Bench], None]] = {"w1": bulk, "w2": wide, "w3": latency, "w4": nightly}


def as_json(bench: Bench) -> dict:
    """Return everything measured as plain data."""
    runs = [asdict(run) | {"us_per_row": run.us_per_row} for run in bench.runs]
    return {"quick": bench.quick, "rounds": bench.rounds, "runs": runs, "targets": [asdict(t) for t in bench.targets]}
