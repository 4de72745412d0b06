"""What a flow run shows of a run in Prefect's user interface: its progress while it lasts, then tables and the report.

Artifacts are a view: the report itself is kept beside the ledger, so a server that refuses one ends no run. How a
report reads is in `marketsync/rendering`; what it says is in `marketsync/report.py`.
"""

from __future__ import annotations

import logging
import re
import threading
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
)
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import ArtifactUpdate
from prefect.exceptions import PrefectException

from marketsync.ledger import RunRow
from marketsync.rendering.html import html
from marketsync.rendering.markdown import markdown
from marketsync.rendering.words import STATES, many, newest, share
from marketsync.report import DatasetReport, RunReport, RunState
from tasks.inquiry import Estimate
from tasks.steps import progress
from tasks.sync import full
from tasks.workspace import Workspace

PROGRESS_SECONDS = 5.0
LONGEST_MARKDOWN_CHARACTERS = 200_000
REFUSED = (PrefectException, httpx.HTTPError)

log = logging.getLogger(__name__)


def key_of(kind: str, plan: str) -> str:
    """Return an artifact's key, by which Prefect shows its history: lower-case letters, digits and dashes."""
    return f"{kind}-{re.sub(r'[^a-z0-9]+', '-', plan.lower()).strip('-')}"


class ProgressDisplay:
    """A progress artifact that follows a run of this process; a context manager.

    The share is requests sent of requests expected; it stays below 100 % until the run says how it ended.
    """

    def __init__(self, run: RunRow, estimate: Estimate | None):
        self._run = run
        self._expected = 0 if estimate is None else estimate.requests
        self._until = "" if estimate is None or estimate.done_at is None else f"{estimate.done_at:%Y-%m-%d %H:%M} UTC"
        self._over = threading.Event()
        self._id: UUID | None = None
        self._thread = threading.Thread(target=self._follow, name="progress-artifact", daemon=True)

    def __enter__(self) -> ProgressDisplay:
        try:
            made = create_progress_artifact(0.0, key_of("progress", self._run.plan), self._said())
        except REFUSED as error:
            log.warning("the progress of run %s is not shown: %s", self._run.run_id, error)
        else:
            assert isinstance(made, UUID)  # a coroutine only where an event loop runs
            self._id = made
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._id is not None:
            self._thread.join()

    def ended(self, report: RunReport) -> None:
        """Show how the run ended."""
        self.__exit__()
        if self._id is None:
            return
        done = report.state in (RunState.COMPLETED, RunState.COMPLETED_WITH_FINDINGS)
        share = 100.0 if done else self._share(report.requests.sent)
        with get_client(sync_client=True) as client:
            self._update(client, share, f"Run {report.run}, {STATES[report.state]}: {sentence(report)}")

    def _follow(self) -> None:
        with get_client(sync_client=True) as client:  # one for all: making it costs ten times what a request does
            while not self._over.wait(PROGRESS_SECONDS):
                self._update(client, self._share(progress(self._run.run_id).sent), self._said())

    def _share(self, sent: int) -> float:
        return 0.0 if not self._expected else min(99.0, round(100 * sent / self._expected, 1))

    def _said(self) -> str:
        now = progress(self._run.run_id)
        of = f" of about {self._expected:,}" if self._expected else ""
        until = f"; done at about {self._until}" if self._until else ""
        return f"Run {self._run.run_id}: {now.sent:,}{of} requests, {now.fetched:,} rows fetched{until}"

    def _update(self, client: SyncPrefectClient, share: float, description: str) -> None:
        assert self._id is not None
        try:
            client.update_artifact(self._id, ArtifactUpdate(data=share, description=description))
        except REFUSED as error:
            log.warning("the progress of run %s is not shown: %s", self._run.run_id, error)


def sentence(report: RunReport) -> str:
    """Return what came of a run in one sentence, for states and artifacts."""
    rows, work = report.rows, report.work
    if not report.requests.sent and not work.units:
        done = report.state in (RunState.COMPLETED, RunState.COMPLETED_WITH_FINDINGS)
        return "nothing is owed: no request was sent" if done else "no request was sent"
    parts = [f"{many(rows.fetched, 'row')} of {many(report.requests.sent, 'request')}"]
    parts.extend(
        f"{count:,} {word}"
        for count, word in ((rows.inserted, "inserted"), (rows.updated, "updated"), (rows.quarantined, "quarantined"))
        if count
    )
    parts.extend(
        f"{many(count, 'unit')} {word}"
        for count, word in (
            (work.waiting, "waiting"),
            (work.not_yet, "not published yet"),
            (work.failed, "failed"),
            (work.dropped, "dropped"),
        )
        if count
    )
    return ", ".join(parts)


def table(datasets: tuple[DatasetReport, ...]) -> list[dict[str, Any]]:
    """Return the rows of the table artifact: a line for each dataset and store, what the run did and how it stands."""
    lines = []
    some_say = any(part.state for part in datasets)
    for part in datasets:
        judged, laggard = part.judgement, part.laggard
        lines.append(
            {
                "dataset": part.dataset,
                "store": part.store,
                "rows": None if part.size is None else part.size.rows,
                "inserted": part.rows.inserted,
                "updated": part.rows.updated,
                "complete": share(None if judged is None else judged.completeness),
                "missing": None if judged is None else judged.missing,
                "newest": newest(part),
                "furthest behind": "-" if laggard is None else f"{laggard.subject} {(laggard.newest or '-')[:10]}",
            }
            | ({"store says": part.state or "-"} if some_say else {})
        )
    return lines


def show(
    workspace: Workspace, report: RunReport, *, html_folder: Path | None = None, html_address: str | None = None
) -> None:
    """Make the artifacts of a run that has ended: a table of its datasets, the report in Markdown and, where a folder
    is given, a link to the report written there as HTML."""
    about = f"Run {report.run} of {report.plan}"
    try:
        if report.datasets:
            create_table_artifact(table(report.datasets), key_of("datasets", report.plan), f"{about}: its datasets")
        text = markdown(report)
        if len(text) > LONGEST_MARKDOWN_CHARACTERS:
            text = f"{text[:LONGEST_MARKDOWN_CHARACTERS]}\n\n(cut off here; `marketsync report {report.run}` shows all)"
        create_markdown_artifact(text, key_of("report", report.plan), f"{about}: the report")
        if html_folder is not None:
            path = written(workspace, report, html_folder)
            link = f"{html_address.rstrip('/')}/{path.name}" if html_address else path.as_uri()
            create_link_artifact(link, path.name, key_of("html", report.plan), f"{about}: the report with its figures")
    except REFUSED as error:
        log.warning("the report of run %s is not shown (it is kept beside the ledger): %s", report.run, error)


def written(workspace: Workspace, report: RunReport, folder: Path) -> Path:
    """Write a report as HTML, with every dataset judged from end to end, into a folder and return the file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder.resolve() / f"{report.plan}-{report.run}.html"
    path.write_text(html(full(workspace, report)), encoding="utf-8")
    return path
