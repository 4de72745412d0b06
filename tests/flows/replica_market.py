"""A market for the tests of the flows: a replica of Alpaca, a configuration that asks it, and waiting."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from providers.replica.server import Replica

CONFIGURATION = """\
upstreams:
  alpaca:
    base_url: {url}
{upstream}
universes:
  five: [AAPL, FB, GOOG, IBM, MSFT]
plans:
  five:
    datasets: [alpaca.daily_bars]
    universe: five
    since: 2000-03-01
    until: 2013-03-01
"""
ALL_ROWS = 12154  # daily bars of the five symbols that the replica has between those days
ROWS_OF_IBM = 3270
SPARE_SECONDS = 180  # after which a test that waits for something gives up


@dataclass
class Market:
    """A configuration whose provider is a replica, and what came of it."""

    config: Path
    replica: Replica

    @property
    def rows(self) -> int:
        """Rows in the plan's store, read with nothing of ours."""
        import deltalake

        table = self.config.parent / "data" / "alpaca" / "daily_bars"
        return deltalake.DeltaTable(str(table)).to_pyarrow_dataset().count_rows() if table.exists() else 0

    @property
    def requests(self) -> int:
        """Requests that the replica has answered."""
        return len(self.replica.log)

    @property
    def ledger(self) -> Any:
        """The ledger of the configuration, as this process has it open."""
        from tasks.workspace import open_workspace

        return open_workspace(self.config).ledger


def monthly_definition() -> str:
    """Return the shipped definition with a request for each symbol and month: a run of some hundred requests."""
    from marketsync.configuration import shipped_definitions

    text = shipped_definitions()["alpaca"].read_text(encoding="utf-8")
    changed = text.replace("{universe: $plan, batch: 100}", "{universe: $plan}").replace(
        "window: 5 years", "window: 1 month"
    )
    assert changed.count("window: 1 month") > text.count("window: 1 month")
    return changed


def eventually(found: Callable[[], Any], what: str, seconds: float = SPARE_SECONDS) -> Any:
    """Return what `found` returns once it is true; fail when it does not come to be."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if result := found():
            return result
        time.sleep(0.1)
    pytest.fail(f"waited {seconds} s in vain for {what}")
