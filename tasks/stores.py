"""What stands behind each store of a configuration: whether it answers, what it runs on, which tables it has. All are
asked at once, and none is waited for longer than it is given."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import date, datetime
from importlib import import_module
from typing import Any

from marketsync.errors import ExitCode, MarketSyncError, StoreError, gravest
from storage.protocol import Filter, Store, Writers
from storage.registry import ENGINES
from tasks.workspace import Workspace

SECONDS = 15.0


@dataclass(frozen=True)
class TableState:
    """One table as it stands; `known` says whether the ledger knows it: None where it has never met one, False where
    it has met another one under this name, whose coverage is void."""

    dataset: str
    rows: int = 0
    bytes: int = 0
    subjects: int | None = None
    newest: datetime | date | None = None
    known: bool | None = None
    problem: str = ""
    messages: int | None = None  # of a log, whose rows nobody counts


@dataclass
class StoreState:
    """One store as it stands; `problem` says why it, or some of it, could not be looked at."""

    name: str
    engine: str
    url: str  # without credentials
    version: str = ""
    reachable: bool = False
    tables: list[TableState] = field(default_factory=list)
    problem: str = ""
    exit_code: int = int(ExitCode.DONE)

    @property
    def rows(self) -> int:
        return sum(table.rows for table in self.tables)

    @property
    def bytes(self) -> int:
        return sum(table.bytes for table in self.tables)


def stores(workspace: Workspace, *, seconds: float = SECONDS) -> list[StoreState]:
    """Look at every store of the file; what has not answered after `seconds` is told as such, with what it has said
    until then."""
    states = [_begun(name, spec.url) for name, spec in workspace.loaded.configuration.stores.items()]
    workspace.ledger  # noqa: B018 - opened once, before threads ask for it
    # an engine inside this process serves one folder at a time, so its stores wait for one another
    queues: dict[str, list[StoreState]] = {}
    for state in states:
        queues.setdefault(state.engine if _alone(state.engine) else state.name, []).append(state)
    ended: set[str] = set()
    threads = [
        threading.Thread(target=_look_at_each, args=(workspace, queue, ended), name=f"stores-{name}", daemon=True)
        for name, queue in queues.items()
    ]
    for thread in threads:
        thread.start()
    until = time.monotonic() + seconds
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))
    return [state if state.name in ended else _late(state, seconds) for state in states]


def code_of(states: Sequence[StoreState]) -> ExitCode:
    """Return the exit code for what was found: the gravest of the stores'."""
    return gravest(*(ExitCode(state.exit_code) for state in states))


def _begun(name: str, url: str) -> StoreState:
    scheme, _, place = url.partition("://")
    return StoreState(name, scheme, f"{scheme}://{place.rpartition('@')[2].partition('?')[0]}")


def _alone(scheme: str) -> bool:
    return scheme in ENGINES and import_module(ENGINES[scheme][0]).CAPABILITIES.writers is Writers.ONE_PROCESS


def _late(state: StoreState, seconds: float) -> StoreState:
    seen = f"; {len(state.tables)} of its tables were seen" if state.reachable else "; is it up, or busy?"
    why = f"has not answered within {seconds:g} s{seen}"
    return replace(state, tables=list(state.tables), problem=why, exit_code=int(ExitCode.FAILED))


def _look_at_each(workspace: Workspace, states: Sequence[StoreState], ended: set[str]) -> None:
    for state in states:
        try:
            store = workspace.opened(state.name)
            try:
                _look(workspace, store, state)
            finally:
                store.close()
        except Exception as error:  # noqa: BLE001 - told by the thread that asks, beside what the others say
            state.problem, state.exit_code = _told(workspace, error)
        ended.add(state.name)


def _look(workspace: Workspace, store: Store, state: StoreState) -> None:
    state.url = store.url
    state.version = store.version()
    datasets = store.datasets()
    state.reachable = True
    for dataset in datasets:
        try:
            table = _table(workspace, store, state.name, dataset)
        except Exception as error:  # noqa: BLE001 - one table that cannot be read hides no other
            problem, code = _told(workspace, error)
            table = TableState(dataset, problem=problem)
            state.exit_code = int(gravest(ExitCode(state.exit_code), ExitCode(code)))
        state.tables.append(table)


def _table(workspace: Workspace, store: Store, name: str, dataset: str) -> TableState:
    import polars as pl

    info, schema = store.info(dataset), store.schema(dataset)
    if schema is None:
        raise StoreError(f"the table of {dataset} went away while it was looked at")
    bound = workspace.ledger.marker(name, dataset)
    known = None if bound is None else bound == store.marker(dataset)
    if not store.capabilities.table:
        return TableState(dataset, bytes=info.bytes, known=known, messages=info.rows)
    newest: dict[str, Any] = {} if schema.time is None else store.watermarks(dataset)
    subjects = len(newest) if schema.time is not None and schema.subject is not None else None
    if schema.time is None and schema.subject is not None:
        each = store.scan(dataset, Filter(columns=[schema.subject]))
        subjects = int(each.select(pl.col(schema.subject).n_unique()).collect(engine="streaming").item())
    return TableState(
        dataset,
        info.rows,
        info.bytes,
        subjects,
        max(newest.values(), default=None),
        known,
    )


def _told(workspace: Workspace, error: Exception) -> tuple[str, int]:
    """Return what to say of an error, and the exit code that it stands for."""
    code = error.exit_code if isinstance(error, MarketSyncError) else ExitCode.FAILED
    said = " ".join(str(error).split())
    if not isinstance(error, MarketSyncError):
        said = f"{type(error).__name__}: {said}"
    return workspace.secrets.redact(said), int(code)
