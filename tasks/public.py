"""A run, and the questions about it, as functions for a notebook or a script: names and a path in, values out.

`from marketsync import sync, estimate, ...` leads here. They mirror the commands of the same names; printing, progress
and exit codes are the command line's, and rows are read with `storage/reader.py`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from datetime import date, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from marketsync.durations import parse_when, within_reach
from marketsync.errors import ConfigurationError
from marketsync.planning import end_with, instant
from marketsync.report import RunReport
from storage.protocol import Filter
from tasks import inquiry
from tasks.copy import Copied, open_end
from tasks.copy import copy as copy_rows
from tasks.export import Exported
from tasks.export import export as write_file
from tasks.inquiry import Estimate, Explanation, Status
from tasks.stores import SECONDS, StoreState
from tasks.stores import stores as look_at_stores
from tasks.sync import kept
from tasks.sync import sync as sync_plans
from tasks.watch import interrupt_all
from tasks.workspace import Options, Workspace, close_workspaces, open_workspace

if TYPE_CHECKING:
    import polars as pl

Day = date | datetime | str

_LOOK_SECONDS = 0.2
_lock = threading.Lock()
_syncing = 0


def sync(
    plan: str,
    config: str | Path = "upstream.yml",
    *,
    since: Day | None = None,
    until: Day | None = None,
    only: str | Sequence[str] = (),
    retry_failed: bool = False,
    refetch: bool = False,
    wait: bool = False,
) -> RunReport:
    """Fetch what a plan still owes, deliver it to its stores, judge it; return the report of the run.

    `since` and `until` (that day included) stand in for the plan's; `only` names symbols. A run that could not do all
    (a spent quota, failures, a pause) returns a report as well: `report.state` and `report.errors` say so. With `wait`
    it sleeps through quotas. Ctrl-C, or a notebook's stop button, ends it at its next page with what it has: the report
    then says paused, and the next sync goes on from there.

    Raises ConfigurationError when upstream.yml is wrong or has no such plan, when `only` names a symbol that the plan
    does not ask for, when `since` is after `until`, and when a table cannot follow its definition; MarketSyncError
    when the ledger or the state folder cannot be used.
    """
    options = _options(since, until, only, retry_failed=retry_failed, refetch=refetch)
    reports: list[RunReport] = []
    failures: list[BaseException] = []
    ended = threading.Event()

    def run() -> None:
        try:
            workspace = open_workspace(config)
            inquiry.refuse_nothing(workspace, [plan], options)
            inquiry.refuse_conflicts(workspace, [plan])
            reports.extend(sync_plans(config, [plan], options, wait=wait))
        except BaseException as error:  # noqa: BLE001 - raised below, in the caller's thread
            failures.append(error)
        finally:
            ended.set()

    with _workspaces():
        # In a thread of its own: an interrupt reaches the caller's, which then asks the run to end well.
        threading.Thread(target=run, name=f"sync-{plan}", daemon=True).start()
        asked = False
        while not ended.is_set():  # and not join(), which takes a thread for dead when it is interrupted (gh-90882)
            try:
                ended.wait(_LOOK_SECONDS)
                if asked:
                    interrupt_all()  # again, since a run hears it only once it fetches
            except KeyboardInterrupt:
                if asked:
                    raise
                asked = True
    if failures:
        raise failures[0]
    return reports[0]


def estimate(
    plan: str,
    config: str | Path = "upstream.yml",
    *,
    since: Day | None = None,
    until: Day | None = None,
    only: str | Sequence[str] = (),
    requests: int = 0,
) -> Estimate:
    """Say how many requests a sync would send, how long it takes, when it is done and which limit decides that.

    Sends nothing. `requests` lists so many of the first requests. Where the number of pages is not known before they
    are asked (ticks), `at_least` is true, and the figures are the least.
    """
    with _opened(config) as workspace:
        options = _options(since, until, only)
        inquiry.refuse_nothing(workspace, [plan], options)
        return inquiry.estimate(workspace, plan, options, requests=requests)


def status(plan: str, config: str | Path = "upstream.yml", *, owed: bool = False) -> Status:
    """Say how a plan stands: covered until when, what is owed, what waits; `owed` lists the first units owed."""
    with _opened(config) as workspace:
        return inquiry.status(workspace, plan, owed=owed)


def read_report(run: str | None = None, config: str | Path = "upstream.yml") -> RunReport:
    """Return the report of a run that has ended, or of the last one; ConfigurationError when there is none."""
    with _opened(config) as workspace:
        found = kept(workspace, run)
        if found is None:
            which = f"run {run}" if run else "any run"
            raise ConfigurationError(f"there is no report of {which} in {workspace.state}; a sync makes one")
        return found


def explain(
    dataset: str, symbol: str, day: date | str | None = None, config: str | Path = "upstream.yml"
) -> Explanation:
    """Say why the rows of a symbol and day are, or are not, in the stores; `lines` holds the sentences.

    The rows of a dataset without a time column are a list as it stands; they need no day.
    """
    with _opened(config) as workspace:
        return inquiry.explain(workspace, dataset, symbol, None if day is None else _day(day))


def query(sql: str, config: str | Path = "upstream.yml", *, store: str | None = None) -> pl.DataFrame:
    """Run a SELECT over the tables (`upstream.dataset`) of a store of upstream.yml (the first with tables)."""
    with _opened(config) as workspace:
        return workspace.store(workspace.readable(store)).query(sql)


def export(
    dataset: str,
    file: str | Path,
    config: str | Path = "upstream.yml",
    *,
    store: str | None = None,
    symbols: str | Sequence[str] = (),
    since: Day | None = None,
    until: Day | None = None,
    columns: Sequence[str] = (),
    force: bool = False,
) -> Exported:
    """Write a dataset's rows of a store of upstream.yml (the first one by default) to one .csv, .xlsx or .parquet file.

    Only the rows of `symbols`, from `since` on, up to `until` (that day included), with `columns`; all where none is
    given. A file that is there is kept unless `force` is given. Times are in UTC.

    Raises ConfigurationError for what is wrong in these arguments or cannot be written, SchemaError for a text that
    no cell of a workbook holds, StoreError when the store cannot be read.
    """
    first, last = (None if day is None else _when(name, day) for name, day in (("since", since), ("until", until)))
    names = (symbols,) if isinstance(symbols, str) else tuple(symbols)
    with _opened(config) as workspace:
        return write_file(
            workspace,
            dataset,
            Path(file),
            store=store,
            symbols=names,
            since=first,
            until=last,
            columns=columns,
            force=force,
        )


def stores(config: str | Path = "upstream.yml", *, seconds: float = SECONDS) -> list[StoreState]:
    """Say of every store of upstream.yml whether it answers (within so many seconds), its engine's version and its
    tables; what is wrong with one is its `problem`."""
    with _opened(config) as workspace:
        return look_at_stores(workspace, seconds=seconds)


def copy(
    source: str,
    target: str,
    datasets: str | Sequence[str] = (),
    config: str | Path = "upstream.yml",
    *,
    symbols: str | Sequence[str] = (),
    since: Day | None = None,
    until: Day | None = None,
    dry_run: bool = False,
    told: Callable[[Copied], None] = lambda _: None,
) -> list[Copied]:
    """Copy rows between two stores, each named as in upstream.yml or by a URL; return what was done for each dataset.

    `until` is included where it is a day. Rows of the target are inserted and updated, never deleted; a copy that was
    broken off goes on when it is made again. At the end both stores are compared by fingerprints: where `agree` is
    false, `differences` and `problems` say what is not there as it is in the source. `told` hears how far a dataset is
    after each write.

    Raises SchemaError, before anything is moved, with what the target cannot keep; ConfigurationError for stores,
    datasets and symbols that there are not; StoreError when a store fails.
    """
    path = Path(config).resolve()
    first = None if since is None else instant(_when("since", since))
    last = None if until is None else end_with(_when("until", until))
    if first is not None and last is not None and first >= last:
        raise ConfigurationError(f"since {since} is not before until {until}: there is nothing between them")
    names = (symbols,) if isinstance(symbols, str) else tuple(symbols)
    span = Filter(names or None, first, last)
    with ExitStack() as opened:
        workspace = None
        if "://" not in source or "://" not in target:
            workspace = opened.enter_context(closing(Workspace(path)))
        ends = open_end(source, workspace, path), open_end(target, workspace, path)
        for end in ends:
            if end.store_id is None:
                opened.callback(end.store.close)
        chosen = [datasets] if isinstance(datasets, str) else datasets
        return copy_rows(*ends, chosen, span, workspace=workspace, dry_run=dry_run, told=told)


def _opened(config: str | Path) -> closing[Workspace]:
    # Opened for one question: a file that was edited in between counts, and no store stays held by a notebook.
    return closing(Workspace(Path(config).resolve()))


@contextmanager
def _workspaces() -> Iterator[None]:
    """Close what the runs of this process have opened when the last of them has ended, for the same two reasons."""
    global _syncing
    with _lock:
        _syncing += 1
    try:
        yield
    finally:
        with _lock:
            _syncing -= 1
            if not _syncing:
                close_workspaces()


def _options(
    since: Day | None,
    until: Day | None,
    only: str | Sequence[str],
    *,
    retry_failed: bool = False,
    refetch: bool = False,
) -> Options:
    names = (only,) if isinstance(only, str) else tuple(only)
    return Options(
        None if since is None else _when("since", since),
        None if until is None else _when("until", until),
        names,
        retry_failed,
        refetch,
    )


def _day(value: date | str) -> date:
    found = _when("day", value)
    return found.date() if isinstance(found, datetime) else found


def _when(name: str, value: Day) -> date | datetime:
    try:
        if isinstance(value, str):
            return parse_when(value)
        within_reach(value)
        return value
    except ValueError as error:
        raise ConfigurationError(f"{name}: {error}") from None
