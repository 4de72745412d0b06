"""The steps of a run as plain functions with small picklable arguments: prepare, fetch. Judging is in `judge.py`.

A step names its workspace by the path of upstream.yml, so that threads, Prefect and Dask can all run it.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from marketsync.coverage import Covered, within
from marketsync.errors import SchemaError, StoreError
from marketsync.ledger import this_owner
from storage.protocol import Written
from tasks.deliver import check_target, deliver_owed, fill_from_siblings
from tasks.fetch import Fetched, Fetcher
from tasks.tally import Counts, Note, Tally
from tasks.watch import Watch
from tasks.workspace import Options, Scope, Workspace, open_workspace


@dataclass(frozen=True)
class Task:
    """What a step is about."""

    config: str
    plan: str
    dataset: str
    run_id: str
    run_started: datetime
    options: Options = field(default_factory=Options)

    def scope(self, workspace: Workspace | None = None) -> Scope:
        """Open the scope in this process."""
        return Scope(
            workspace or open_workspace(self.config),
            self.plan,
            self.dataset,
            self.run_id,
            self.run_started,
            self.options,
        )


@dataclass
class Prepared:
    """What stood between the last run and this one, and was done."""

    dataset: str
    counts: Counts = field(default_factory=Counts)
    notes: list[Note] = field(default_factory=list)
    stores: dict[str, Written] = field(default_factory=dict)
    drained: int = 0  # rows that were still in the spool
    copied: int = 0  # rows that a store got from its sibling
    void: list[str] = field(default_factory=list)  # stores whose table is not the one we knew, or an older state of it
    new_columns: list[str] = field(default_factory=list)
    stores_down: dict[str, str] = field(default_factory=dict)


KEEP_HISTORY = timedelta(days=90)  # of work, segments and runs in the ledger; coverage is kept for good

_tallies: dict[str, list[Tally]] = {}
_tallies_lock = threading.Lock()


def tally_of(run_id: str) -> Tally:
    """Make a tally that the progress display of this process can see."""
    tally = Tally()
    with _tallies_lock:
        _tallies.setdefault(run_id, []).append(tally)
    return tally


def progress(run_id: str) -> Counts:
    """Return the figures of a run of this process as they are now."""
    with _tallies_lock:
        tallies = list(_tallies.get(run_id, ()))
    total = Counts()
    for tally in tallies:
        total = total.plus(tally.counts)
    return total


def forget_progress(run_id: str) -> None:
    """Drop the figures of a run that has ended."""
    with _tallies_lock:
        _tallies.pop(run_id, None)


def prepare(task: Task) -> Prepared:
    """Make the tables, deliver what earlier runs left in the spool, fill stores from their siblings."""
    scope = task.scope()
    tally = tally_of(task.run_id)
    result = Prepared(task.dataset, tally.counts, tally.notes, tally.stores)
    columns = {column.name: str(column.type) for column in scope.schema.columns}
    result.new_columns = scope.ledger.bind_dataset(task.dataset, scope.request_hash, scope.schema.hash(), columns)
    ready = []
    for target in scope.targets:
        try:
            if not check_target(target, task.dataset, scope.schema, scope.ledger):
                result.void.append(target.store_id)
            ready.append(target)
        except StoreError as error:
            result.stores_down[target.store_id] = str(error)
    owner = this_owner()
    for target in ready:
        try:
            result.drained += deliver_owed(
                scope.ledger,
                scope.spool,
                target,
                task.dataset,
                scope.schema,
                host=scope.host,
                owner=owner,
                clock=scope.clock,
                tally=tally,
                batch_rows=scope.plan.segment.rows,
            )
        except (StoreError, SchemaError) as error:
            result.stores_down[target.store_id] = str(error)
    configured = set(scope.workspace.loaded.configuration.stores)
    for store_id in scope.ledger.stores_owed(task.dataset) - configured:
        # The store is gone from upstream.yml: nobody will ever ask for these deliveries.
        paths = scope.ledger.abandon_deliveries(store_id, task.dataset)
        scope.spool.remove(paths)
        scope.ledger.removed(paths)
    ready = [target for target in ready if target.store_id not in result.stores_down]
    for target in ready:
        try:
            result.copied += fill_from_siblings(
                scope.ledger,
                scope.spool,
                ready,
                target,
                task.dataset,
                scope.schema,
                scope.request_hash,
                [subject.name for subject in scope.subjects],
                clock=scope.clock,
                tally=tally,
                batch_rows=scope.plan.segment.rows,
                told_apart=scope.told_apart,
                margin=scope.margin,
            )
        except (StoreError, SchemaError) as error:
            result.stores_down[target.store_id] = str(error)
    for note in still_dropped(scope):
        tally.note(note)
    for store_id, message in result.stores_down.items():
        tally.note(Note("store", task.dataset, store_id, message))
    return result


def still_dropped(scope: Scope) -> list[Note]:
    """Return what earlier runs dropped and the plan still wants: it is a hole until it is asked again."""
    refused = {name: [one for one in found if one.dropped] for name, found in scope.refused().items()}
    mine = [subject.name for subject in scope.subjects if refused.get(subject.name)]
    if not mine:
        return []
    known = scope.ledger.coverage(scope.store_ids, scope.dataset, scope.request_hash, mine)
    together: dict[str, list[Covered]] = defaultdict(list)
    for of_subject in known.values():
        for name, pieces in of_subject.items():
            together[name].extend(pieces)
    words: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name in mine:
        owing = scope.owed_of(name, together[name])
        newest = max((one for one in refused[name] if within(owing, [one.span])), key=lambda one: one.at, default=None)
        if newest is not None:
            words[f"{newest.at:%Y-%m-%d}", newest.words].append(name)
    return [
        Note(
            "still_dropped",
            scope.dataset,
            ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else ""),
            f"refused as a wrong request on {day} and not asked again since"
            + (f" — {scope.upstream_name} said: {said}" if said else ""),
        )
        for (day, said), names in words.items()
    ]


def fetch(task: Task, seconds: float | None = None, threaded: bool = True) -> Fetched:
    """Fetch what is owed, for at most about `seconds`; what is then still owed is told by `more`."""
    scope = task.scope()
    if scope.halt is not None:
        return Fetched(task.dataset, halt=scope.halt)
    tally = tally_of(task.run_id)
    with Watch(
        scope.ledger,
        task.plan,
        this_owner(),
        scope.clock,
        in_maintenance=scope.workspace.in_maintenance,
        threaded=threaded,
    ) as watch:
        return Fetcher(scope, watch, tally, seconds=seconds, threaded=threaded).run()


def sweep(config: str) -> int:
    """Remove segment files that every store has or of which no ledger row speaks and nobody alive will (a crash between
    the two), and what the ledger knows of work that was done long ago; return how many files. Work that dead workers
    of this host have is owed again."""
    workspace = open_workspace(config)
    workspace.ledger.take_from_the_dead()
    workspace.ledger.forget(KEEP_HISTORY)
    ledger, spool, host = workspace.ledger, workspace.spool, workspace.host
    swept = ledger.finished_files(host)
    if swept:
        spool.remove(swept)
        ledger.removed(swept)
    owner = this_owner()
    for lane, paths in spool.strangers(ledger.spool_files(host)).items():
        hold = f"lane:{lane}"
        if not ledger.hold(hold, owner):
            continue  # who writes it lives, and will tell the ledger
        try:
            # Read again under the hold: it may have been told meanwhile.
            known = ledger.spool_files(host)
            orphans = [path for path in paths if path not in known]
            spool.remove(orphans)
            swept.extend(orphans)
        finally:
            ledger.let_go(hold, owner)
    return len(swept)
