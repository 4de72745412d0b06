"""The progress of a running sync: bars on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType

from cli.output import length, many, say, size
from marketsync.errors import MarketSyncError
from marketsync.ledger import RunRow

LINE_SECONDS = 5.0


class Progress:
    """Shows the figures of the run it is told of; a context manager."""

    def __init__(self, config: str, *, quiet: bool):
        self._config, self._quiet = config, quiet
        self._run: RunRow | None = None
        self._expected = 0
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self._started = time.monotonic()

    def begun(self, run: RunRow) -> None:
        """Take note of a run as it begins."""
        self._run = run
        self._started = time.monotonic()
        if not self._quiet:
            self._expected = self._estimate(run.plan)

    def _estimate(self, plan: str) -> int:
        from tasks.inquiry import estimate
        from tasks.workspace import open_workspace

        try:
            found = estimate(open_workspace(self._config), plan)
        except MarketSyncError:
            return 0  # the run itself will tell
        return 0 if found.at_least else found.requests  # a share of what is not known is no progress

    def __enter__(self) -> Progress:
        if not self._quiet:
            target = self._bars if sys.stderr.isatty() else self._lines
            self._thread = threading.Thread(target=target, name="progress", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()

    def _quota(self) -> str:
        from tasks.sync import quotas_left
        from tasks.workspace import open_workspace

        if self._run is None:
            return ""
        workspace = open_workspace(self._config)
        left = quotas_left(workspace, workspace.plan(self._run.plan).datasets)
        tightest = min(left, key=lambda quota: quota.left / max(1, quota.allowed), default=None)
        return "" if tightest is None else f"{tightest.left:,} of {tightest.limit} left"

    def _to_go(self, sent: int) -> str:
        if not sent or self._expected <= sent:
            return ""
        return length((time.monotonic() - self._started) / sent * (self._expected - sent)) + " to go"

    def _lines(self) -> None:
        from tasks.steps import progress

        while not self._over.wait(LINE_SECONDS):
            if self._run is None:
                continue
            now = progress(self._run.run_id)
            asked = f"{now.sent:,} of about {many(self._expected, 'request')}" if self._expected else ""
            rest = ", ".join(part for part in (self._quota(), self._to_go(now.sent)) if part)
            say(
                f"{self._run.plan}: {many(now.fetched, 'row')}, {asked or many(now.sent, 'request')}, {size(now.bytes)}"
                + (f", {rest}" if rest else "")
            )

    def _bars(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bars

        from tasks.steps import progress

        with Bars(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:,.0f} of {task.total:,.0f} requests"),
            TextColumn("{task.fields[rows]:,} rows"),
            TextColumn("[dim]{task.fields[rest]}"),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            transient=True,
        ) as bars:
            shown: dict[str, int] = {}
            while not self._over.wait(0.25):
                run = self._run
                if run is None:
                    continue
                now = progress(run.run_id)
                if run.run_id not in shown:
                    task = bars.add_task(run.plan, total=max(1, self._expected), rows=0, rest="")
                    shown[run.run_id] = int(task)
                total = max(self._expected, now.sent, 1)
                rest = ", ".join(part for part in (self._quota(), self._to_go(now.sent)) if part)
                bars.update(
                    bars.task_ids[list(shown).index(run.run_id)],
                    completed=now.sent,
                    total=total,
                    rows=now.fetched,
                    rest=rest,
                )
