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
SHORT_WAIT_SECONDS = 1.0  # not worth a word


class Progress:
    """Shows the figures of the run it is told of; a context manager."""

    def __init__(self, config: str, *, quiet: bool):
        self._config, self._quiet = config, quiet
        self._run: RunRow | None = None
        self._expected = 0
        self._bound_seconds = 0.0  # how long the limits alone make the run
        self._waited = self._looked = 0.0
        self._sent = -1
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self._started = time.monotonic()

    def begun(self, run: RunRow) -> None:
        """Take note of a run as it begins."""
        self._run = run
        self._started = self._looked = time.monotonic()
        self._waited = 0.0
        if not self._quiet:
            self._expected, self._bound_seconds = self._estimate(run.plan)

    def _estimate(self, plan: str) -> tuple[int, float]:
        from tasks.inquiry import estimate
        from tasks.workspace import open_workspace

        try:
            found = estimate(open_workspace(self._config), plan)
        except MarketSyncError:
            return 0, 0.0  # the run itself will tell
        if found.at_least:
            return 0, 0.0  # a share of what is not known is no progress
        return found.requests, max((one.seconds or 0.0 for one in found.datasets if one.binding), default=0.0)

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

    def _waits(self) -> str:
        """Return what the run waits for and until when; empty where it waits for nothing, or only for a moment."""
        from tasks.workspace import open_workspace

        if self._run is None:
            return ""
        workspace = open_workspace(self._config)
        plan = workspace.plan(self._run.plan)
        found = []
        for upstream in dict.fromkeys(dataset.partition(".")[0] for dataset in plan.datasets):
            wait = workspace.limiter(upstream).waits()
            if wait is not None and (wait[0] - workspace.clock.now()).total_seconds() >= SHORT_WAIT_SECONDS:
                found.append(wait)
        if not found:
            return ""
        until, why = min(found)
        return f"waits until {until:%H:%M:%S} UTC for {why}"

    def _rest(self, sent: int) -> str:
        """Return what a line ends with: quotas, and what it waits for, or how long it still takes."""
        now = time.monotonic()
        waits = self._waits() if sent == self._sent else ""
        self._sent = sent
        if waits:
            self._waited += now - self._looked  # no measure of how fast the provider answers
        self._looked = now
        return ", ".join(part for part in (self._quota(), waits or self._to_go(sent, now)) if part)

    def _to_go(self, sent: int, now: float) -> str:
        left = self._expected - sent
        if not sent or left <= 0:
            return ""
        since = now - self._started
        pace = max(0.0, since - self._waited) / sent
        return length(max(pace * left, self._bound_seconds - since)) + " to go"

    def _lines(self) -> None:
        from tasks.steps import progress

        while not self._over.wait(LINE_SECONDS):
            if self._run is None:
                continue
            now = progress(self._run.run_id)
            asked = f"{now.sent:,} of about {many(self._expected, 'request')}" if self._expected else ""
            rest = self._rest(now.sent)
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
                rest = self._rest(now.sent)
                bars.update(
                    bars.task_ids[list(shown).index(run.run_id)],
                    completed=now.sent,
                    total=total,
                    rows=now.fetched,
                    rest=rest,
                )
