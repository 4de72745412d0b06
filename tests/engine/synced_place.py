"""A place to run the real `marketsync` in: a replica, an upstream.yml that asks it, its stores, and what came of a run.

Runs are processes of their own (those of `sync_here` and `typed` excepted), so that a test never shares a lock, a cache
or a mistake with the run that it looks at.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import command_here
import polars as pl
import pytest

from marketsync import open_store
from marketsync.configuration import shipped_definitions
from providers.replica import Replica
from tasks.sync import as_json, exit_code, sync
from tasks.workspace import Options, close_workspaces

PATIENCE_SECONDS = 120  # after which a process is taken to hang
BARS = ["symbol", "ts", "open", "high", "low", "close", "volume", "trades", "vwap"]
READ = """
import sys
from marketsync import open_store
open_store(sys.argv[1]).scan(sys.argv[2]).collect().write_parquet(sys.argv[3])
"""


@dataclass(frozen=True)
class Ended:
    """How a command ended; `report` is the object that it printed."""

    code: int
    report: dict[str, Any]
    stderr: str

    @property
    def state(self) -> str:
        return self.report["state"]

    @property
    def sent(self) -> int:
        return self.report["requests"]["sent"]

    @property
    def words(self) -> str:
        """Everything that the report tells a person."""
        return "\n".join(one["message"] for one in (*self.report["errors"], *self.report["remarks"]))


SERVERS = (
    "clickhouse",
    "marketstore",
    "mongodb",
    "mysql",
    "nats",
    "postgresql",
    "redis",
)  # whose URLs name no folder


@dataclass
class Place:
    """A folder with an upstream.yml, and the replica that it asks."""

    folder: Path
    replica: Replica
    stores: dict[str, str] = field(default_factory=dict)

    @property
    def config(self) -> Path:
        return self.folder / "upstream.yml"

    # ------------------------------------------------------------ configuration

    def write(
        self,
        plan: Mapping[str, Any],
        *,
        upstream: Mapping[str, Any] | None = None,
        name: str = "alpaca",
        definition: str | None = None,
        stores: Mapping[str, str] | None = None,
    ) -> None:
        """Write upstream.yml with one plan, `p`, of one upstream; `definition` is the text of one to use."""
        self.folder.mkdir(parents=True, exist_ok=True)
        settings: dict[str, Any] = {"base_url": self.replica.url, **(upstream or {})}
        if definition is not None:
            (self.folder / "own.yml").write_text(definition, encoding="utf-8")
            settings["definition"] = "./own.yml"
        secrets = self.folder / ".secrets"
        secrets.mkdir(exist_ok=True)
        for secret, value in self.replica.credentials.items():
            (secrets / secret).write_text(value, encoding="utf-8")
        self.stores = dict(stores or {"default": "delta://./data"})
        whole = {"upstreams": {name: settings}, "stores": self.stores, "plans": {"p": plan}}
        self.config.write_text(json.dumps(whole, indent=1), encoding="utf-8")  # JSON is YAML

    # ------------------------------------------------------------ commands

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "cli", *arguments, "-c", str(self.config)]

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Start `marketsync sync p`; whoever starts it ends it (`ended`, or a signal and `wait`)."""
        return subprocess.Popen(
            self.command("sync", "p", "--local", "--json", *arguments),
            cwd=Path(__file__).parents[2],
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def sync(self, *arguments: str) -> Ended:
        """Run `marketsync sync p` to its end."""
        return ended(self.start(*arguments))

    def sync_here(self, options: Options = Options()) -> Ended:
        """The same in this process."""
        close_workspaces()
        reports = sync(self.config, ["p"], options)
        close_workspaces()
        return Ended(int(exit_code(reports)), json.loads(as_json(reports)), "")

    def typed(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run any command on this configuration, in this process."""
        return command_here.run(self.folder, *arguments, "-c", str(self.config))

    def sync_typed(self, *arguments: str) -> Ended:
        """Run `marketsync sync p` in this process, with what a person types behind it."""
        done = self.typed("sync", "p", "--local", "--json", *arguments)
        return Ended(done.returncode, json.loads(done.stdout), done.stderr)

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run any other command on this configuration."""
        return subprocess.run(
            self.command(*arguments),
            cwd=Path(__file__).parents[2],
            env=environment(),
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
            check=False,
        )

    # ------------------------------------------------------------ what there is

    @property
    def log(self) -> list[dict[str, Any]]:
        """The replica's log so far."""
        return list(self.replica.log)

    @property
    def requests(self) -> int:
        return len(self.replica.log)

    def stored_here(self, dataset: str, store: str = "default") -> pl.DataFrame:
        """All rows of a store, read in this process."""
        return open_store(self.url(store)).scan(dataset).collect()

    def url(self, store: str) -> str:
        """A store's URL as any process can open it."""
        scheme, _, place = self.stores[store].partition("://")
        if scheme in SERVERS:
            return self.stores[store]
        return f"{scheme}://{(self.folder / place).resolve()}"

    def stored(self, dataset: str = "alpaca.daily_bars", store: str = "default") -> pl.DataFrame:
        """All rows of a store, as a process of its own reads them."""
        file = self.folder / "stored.parquet"
        done = subprocess.run(
            [sys.executable, "-c", READ, self.url(store), dataset, str(file)],
            cwd=Path(__file__).parents[2],
            env=environment(),
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return pl.read_parquet(file)

    def bars(self, store: str = "default") -> pl.DataFrame:
        """Alpaca's daily bars in a store, in the form and order of `source`."""
        # An embedded engine can be open once in a process, at one place; files need no process to be read.
        read = self.stored if self.url(store).startswith("chdb:") else self.stored_here
        rows = read("alpaca.daily_bars", store)
        return rows.select(*BARS).with_columns(pl.col("ts").dt.epoch("us")).sort("symbol", "ts")

    def source(self, symbols: Iterable[str] | None = None, first: date = date.min, last: date = date.max):
        """The same bars as the replica's market has them."""
        parts = []
        for symbol in symbols or self.replica.market.symbols:
            series = self.replica.market.series(symbol, "1Day")
            assert series is not None, symbol
            parts.append(series.frame(0, len(series)))
        rows = pl.concat(parts).filter(pl.col("date").is_between(first, last))
        return rows.select(BARS).sort("symbol", "ts")

    def spooled(self) -> list[Path]:
        """What is left in the spool: segments that some store lacks."""
        return [path for path in (self.folder / ".marketsync" / "spool").rglob("*") if path.is_file()]

    def wait_for_requests(self, count: int, process: subprocess.Popen[str] | None = None) -> None:
        """Return when the replica has that many requests in its log; fail when the process that sends them ends."""

        def over() -> bool:
            return self.requests >= count or (process is not None and process.poll() is not None)

        eventually(over, f"{count} requests")
        if process is not None and self.requests < count:
            pytest.fail(f"the run ended after {self.requests} requests: {process.communicate()[1]}")


def environment() -> dict[str, str]:
    """The environment of a command: that of the tests, without what would change how it runs."""
    gone = ("PREFECT_API_URL", "PYTHONDONTWRITEBYTECODE")
    return {name: value for name, value in os.environ.items() if name not in gone}


def ended(process: subprocess.Popen[str]) -> Ended:
    """Wait for the end of a run; the object it printed must be all that is on stdout."""
    try:
        out, err = process.communicate(timeout=PATIENCE_SECONDS * 3)
    except BaseException:
        process.kill()
        process.communicate()
        raise
    assert "Traceback" not in err, err
    return Ended(process.returncode, json.loads(out), err)


def killed(process: subprocess.Popen[str]) -> None:
    """kill -9."""
    process.send_signal(signal.SIGKILL)
    process.communicate()


def eventually(found: Callable[[], Any], what: str, seconds: float = PATIENCE_SECONDS) -> Any:
    """Return what `found` returns once it is true; fail when it does not come to be."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if result := found():
            return result
        time.sleep(0.01)
    pytest.fail(f"waited {seconds} s in vain for {what}")


def alpaca_by_month(page_rows: int) -> str:
    """The shipped definition with a chain of small pages for each symbol and month in place of large answers."""
    text = shipped_definitions()["alpaca"].read_text(encoding="utf-8")
    changed = text.replace("{universe: $plan, batch: 100}", "{universe: $plan}")
    changed = changed.replace("window: 5 years", "window: 1 month").replace("10000, cap: 10000", f"{page_rows}")
    assert changed.count("window: 1 month") > text.count("window: 1 month")
    assert f"size: {page_rows}}}" in changed
    return changed


def asked_again(log: Sequence[Mapping[str, Any]]) -> list[tuple[int, int]]:
    """For every request of a log that had been asked before: where in the log it now is, and where it was last."""
    last: dict[str, int] = {}
    found = []
    for place, entry in enumerate(log):
        key = json.dumps([entry["provider"], entry["account"], entry["request"]], sort_keys=True)
        if key in last:
            found.append((place, last[key]))
        last[key] = place
    return found
