"""How each system is told to do the same work: MarketSync through its own files and command, the peers through theirs.

What is measured of it is in `workloads.py`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

from benchmarks.measure import ROOT
from scripts import environment

MARKETSYNC = Path(sys.executable).with_name("marketsync")


@dataclass(frozen=True)
class Job:
    """Rows to fetch from a page server: so many symbols with so many bars each, so many a page."""

    symbols: int
    rows: int
    page_rows: int
    start: date = date(2024, 1, 1)
    step_minutes: int = 1
    latency_ms: float = 0
    threads: int | None = None  # None: the product's default
    until_now: bool = False  # a plan without end, for a market that goes on today
    look_back: str | None = None  # rows this young are asked again every run
    period: str | None = None  # how the table is partitioned; None: the product's default

    @property
    def total(self) -> int:
        """All rows."""
        return self.symbols * self.rows

    @property
    def requests(self) -> int:
        """How many pages hold all rows."""
        return self.symbols * -(-self.rows // self.page_rows)

    def server_arguments(self) -> list[str]:
        """Return the page server's command line."""
        return [
            *("--symbols", str(self.symbols), "--rows", str(self.rows), "--start", self.start.isoformat()),
            *("--step-minutes", str(self.step_minutes), "--latency-ms", str(self.latency_ms)),
        ]

    def verify_arguments(self) -> list[str]:
        """Return the command line of `verify.py` after the folder."""
        newest = ["--newest"] if self.until_now else []
        return [str(self.symbols), str(self.rows), self.start.isoformat(), str(self.step_minutes), *newest]


DEFINITION = """\
provider: bench
base_url: {url}
limits: # declared and accounted for, but never reached
  - {{requests: 3000, per: second}}
  - {{requests: 100000, per: minute}}
datasets:
  bars:
    over: {{symbol: $plan, window: 10 years}}
    request: {{path: /bars, query: {{symbol: $symbol, start: $window.start, end: $window.end}}}}
    page: {{token: next_page_token, send: page_token, limit: limit, size: {page_rows}}}
    response: {{rows: data}}
    schema: {{symbol: str, ts: datetime, open: f64, high: f64, low: f64, close: f64, volume: i64}}
    key: [symbol, ts]
{extra}"""

UPSTREAM = """\
upstreams:
  bench: {{definition: ./bench.yml, tuning: {{{tuning}}}}}
universes:
  all: {{file: symbols.txt}}
stores:
  default: delta://./data
plans:
  all: {{datasets: [bench.bars], universe: all, since: {since}{until}}}
"""


def marketsync(job: Job, url: str, folder: Path) -> list[str | Path]:
    """Writes the definition, the symbols and upstream.yml into the folder; returns the command that syncs them.

    Written into a folder that has been synced, only the page server's address changes.
    """
    extra = f"    restates: {job.look_back}\n" if job.look_back else ""
    extra += f"    period: {job.period}\n" if job.period else ""
    last = datetime.combine(job.start, datetime.min.time(), UTC) + timedelta(minutes=job.rows * job.step_minutes - 1)
    upstream = UPSTREAM.format(
        tuning=f"threads: {job.threads}" if job.threads else "",
        since=job.start.isoformat(),
        until="" if job.until_now else f", until: {last.date().isoformat()}",
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bench.yml").write_text(DEFINITION.format(url=url, page_rows=job.page_rows, extra=extra))
    (folder / "symbols.txt").write_text("".join(f"SYM{number:05d}\n" for number in range(job.symbols)))
    (folder / "upstream.yml").write_text(upstream)
    return [MARKETSYNC, "sync", "-c", folder / "upstream.yml", "--local", "--json"]


def naive(job: Job, url: str, folder: Path, kind: str) -> list[str | Path]:
    """Return the command of the plain loop."""
    arguments = [url, str(job.symbols), str(job.page_rows), folder / "out", kind]
    return [sys.executable, ROOT / "benchmarks" / "peers" / "naive.py", *arguments]


def dlt(job: Job, url: str, folder: Path, kind: str) -> list[str | Path]:
    """Return the command of dlt's rest_api source, in dlt's own environment."""
    python = ROOT / ".venvs" / "dlt" / "bin" / "python"
    arguments = [url, str(job.symbols), str(job.page_rows), folder, kind]
    return [python, ROOT / "benchmarks" / "peers" / "dlt_rest.py", *arguments]


def prepare_dlt() -> None:
    """Builds dlt's environment when it is not there or its lock has changed."""
    venv = ROOT / ".venvs" / "dlt"
    lock = ROOT / "benchmarks" / "requirements-dlt.txt"
    stamp = venv / "lock-digest"
    wanted = environment.digest(lock)
    if stamp.exists() and stamp.read_text() == wanted:
        return
    venv.parent.mkdir(exist_ok=True)
    environment.install(environment.create(venv), venv, lock)
    stamp.write_text(wanted)
