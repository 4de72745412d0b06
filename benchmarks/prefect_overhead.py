"""What Prefect adds to a run: the same plan from the same replica on threads and as a flow, in turn.

    python -m benchmarks.prefect_overhead [--seconds 60] [--pairs 3]

The replica answers after a delay that makes a run last about `--seconds`. Timed is what a caller waits for: the call of
`tasks.sync.run_once`, and the call of the flow from its entry to its exit (its artifacts and states written), against a
server that is there already. The share of one is what orchestration costs a run of that length. CPU seconds are of this
process (which also is the replica's) and of the server. Not part of `make bench`: nothing is compared with others here.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import flows  # noqa: F401 - before prefect, whose settings it gives
from providers.replica.server import Replica

THREADS = 4
REQUESTS = 785  # five symbols, a month each from March 2000 to March 2013
CONFIGURATION = """\
upstreams:
  alpaca:
    definition: ./monthly.yml
    base_url: {url}
    limits: []
    tuning: {{threads: {threads}}}
universes:
  five: [AAPL, FB, GOOG, IBM, MSFT]
plans:
  five:
    datasets: [alpaca.daily_bars]
    universe: five
    since: 2000-03-01
    until: 2013-03-01
"""


@dataclass(frozen=True)
class Measured:
    """One run: what a caller waited for, and the processor time it took, in seconds."""

    wall: float
    cpu: float
    server_cpu: float


def main() -> None:
    """Measure pairs of runs and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="about how long a run lasts")
    parser.add_argument("--pairs", type=int, default=3, help="how often each way is measured")
    options = parser.parse_args()
    delay = options.seconds * THREADS / REQUESTS
    threads: list[Measured] = []
    prefect: list[Measured] = []
    with Replica(data="bokeh", limits="unlimited", delay=(0.0, 0.0)) as replica, server() as server_pid:
        for way in (on_threads, as_flow):  # imports, calendars and the first contact with the server
            measured(way, replica, server_pid)
        replica.delay = (delay, delay)
        for number in range(options.pairs):
            pair = [(on_threads, threads), (as_flow, prefect)]
            for way, into in pair if number % 2 == 0 else reversed(pair):
                into.append(measured(way, replica, server_pid))
                print(f"{way.__name__:10} {into[-1].wall:7.2f} s", flush=True)
    print(f"\n{'':10} {'wall s':>8} {'(least to most)':>18} {'CPU s':>7} {'server CPU s':>13}")
    for name, runs in (("threads", threads), ("Prefect", prefect)):
        walls = [run.wall for run in runs]
        print(
            f"{name:10} {statistics.median(walls):8.2f} {f'{min(walls):.2f} to {max(walls):.2f}':>18} "
            f"{statistics.median(run.cpu for run in runs):7.2f} "
            f"{statistics.median(run.server_cpu for run in runs):13.2f}"
        )
    before, after = (statistics.median(run.wall for run in runs) for runs in (threads, prefect))
    print(f"Prefect adds {after - before:.2f} s, {after / before - 1:.1%}")


def measured(way, replica: Replica, server_pid: int) -> Measured:
    """Run a plan of its own folder once and time it."""
    from tasks.workspace import close_workspaces

    folder = Path(tempfile.mkdtemp(prefix="overhead-"))
    try:
        config = write(folder, replica)
        sent = len(replica.log)
        cpu, server_cpu, began = time.process_time(), cpu_seconds(server_pid), time.perf_counter()
        rows = way(config)
        wall = time.perf_counter() - began
        result = Measured(wall, time.process_time() - cpu, cpu_seconds(server_pid) - server_cpu)
        if rows != 12_154 or len(replica.log) - sent != REQUESTS:
            raise SystemExit(f"{way.__name__}: {rows} rows of {len(replica.log) - sent} requests: not what was asked")
        return result
    finally:
        close_workspaces()
        shutil.rmtree(folder)


def on_threads(config: Path) -> int:
    """Run the plan as `marketsync sync --local` does; return the rows inserted."""
    from tasks.sync import run_once
    from tasks.workspace import Options

    return run_once(str(config), "five", Options()).rows.inserted


def as_flow(config: Path) -> int:
    """Run the plan as `marketsync sync --prefect` does; return the rows inserted."""
    from flows.sync import run_from_command_line
    from tasks.workspace import Options

    return run_from_command_line(config, "five", Options()).rows.inserted


def write(folder: Path, replica: Replica) -> Path:
    """Write a configuration whose definition asks for each symbol and month by itself."""
    from marketsync.configuration import shipped_definitions

    text = shipped_definitions()["alpaca"].read_text(encoding="utf-8")
    text = text.replace("{universe: $plan, batch: 100}", "{universe: $plan}").replace("5 years", "1 month")
    (folder / "monthly.yml").write_text(text, encoding="utf-8")
    (folder / ".secrets").mkdir()
    for name, value in replica.credentials.items():
        (folder / ".secrets" / name).write_text(value, encoding="utf-8")
    config = folder / "upstream.yml"
    config.write_text(CONFIGURATION.format(url=replica.url, threads=THREADS), encoding="utf-8")
    return config


@contextmanager
def server() -> Iterator[int]:
    """Start a Prefect server with an empty database for the flows of this process; give its process id."""
    from prefect.server.api.server import SubprocessASGIServer
    from prefect.testing.utilities import prefect_test_harness

    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "WARNING")
    with prefect_test_harness(server_startup_timeout=180):
        process = SubprocessASGIServer().server_process
        if process is None:
            raise SystemExit("the Prefect server did not start")
        yield process.pid


def cpu_seconds(pid: int) -> float:
    """Return the processor time a process has taken so far."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="latin-1").rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
