"""A world in one process for the engine to live and die in: a clock that is told, a provider that is scripted, stores
in memory that keep what was committed, and a crash at any boundary between ledger, spool, store and provider.

The engine is the real one (planner, ledger on SQLite, gate, spool, deliveries), run in one thread. A crash is an
exception that nothing catches; from then on the dead process crosses no boundary any more, and the next process begins
with what was durable: the ledger's file, the spool's files, the stores' tables, the provider's memory.
"""

from __future__ import annotations

import itertools
import json
import random
import shutil
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import polars as pl
import sqlalchemy as sa

from marketsync.clock import ManualClock
from marketsync.coverage import Answer
from marketsync.definition import Verdict
from marketsync.errors import Interrupted, StoreError, WaitingForQuota
from marketsync.gate import Batch as Page
from marketsync.ledger import LEASE_SECONDS, Ledger, stamp
from marketsync.planning import day_start
from marketsync.report import RunReport
from marketsync.schema import Schema
from providers.client import Ask, Outcome
from providers.faults import Ruling
from storage.protocol import Batch, Capabilities, Filter, Mode, TableInfo, Writers, Written
from storage.spool import Spool
from tasks import steps
from tasks import workspace as workspaces
from tasks.runner import InlineRunner
from tasks.sync import begin, broken_off, describe, finish, not_started
from tasks.workspace import Options, Workspace

_COMPILED: dict[Any, Any] = {}
ROOT = Path("/dev/shm") if Path("/dev/shm").is_dir() else None
FIRST = date(2024, 3, 1)
START = day_start(FIRST)
DAY = timedelta(days=1)


class Crash(BaseException):
    """The process died here."""


class Crossings:
    """The boundaries that one process crosses, numbered from 1; it dies at number `at`, or at the first one of that
    name."""

    def __init__(self, at: int | str | None = None, turn: Callable[[], None] | None = None):
        self.at = at
        self.count = 0
        self.dead = False
        self.names: list[str] = []
        self.turn = turn

    def cross(self, name: str) -> None:
        if self.dead:
            raise Crash(name)
        if self.turn is not None:
            self.turn()
        self.count += 1
        self.names.append(name)
        if self.at is not None and self.at in (self.count, name):
            self.dead = True
            raise Crash(name)


# ---------------------------------------------------------------- kinds of datasets


@dataclass(frozen=True)
class Kind:
    """A kind of dataset: what its definition says, and which times its rows have."""

    name: str
    over: Mapping[str, Any]
    dated: bool = True
    timed: bool = True
    hours: tuple[int, ...] = (0,)
    request: Mapping[str, Any] = field(default_factory=dict)
    restates: str | None = None
    calendar: str | None = None

    def definition(self, page: int) -> dict[str, Any]:
        schema: dict[str, Any] = {"symbol": "str"}
        key = ["symbol"]
        if self.timed:
            schema["at"] = "date" if self.dated else "datetime"
            key.append("at")
        schema["value"] = {"type": "i64", "required": True}
        dataset: dict[str, Any] = {
            "over": dict(self.over),
            "request": {"path": "/rows", "query": dict(self.request)},
            "page": {"token": "next", "send": "token", "size": page, "cap": page},
            "response": {"rows": "rows"},
            "schema": schema,
            "key": key,
            "subject": "symbol",
        }
        if self.restates:
            dataset["restates"] = self.restates
        if self.calendar:
            dataset["calendar"] = self.calendar
        return {"provider": "made", "base_url": "http://127.0.0.1:1", "datasets": {"rows": dataset}}


_PART = {"symbols": "$symbol", "start": "$window.start", "end": "$window.last"}
KINDS = {
    kind.name: kind
    for kind in (
        Kind("days", {"symbol": {"universe": "$plan"}, "window": "10 days"}, request=_PART),
        Kind("batched", {"symbol": {"universe": "$plan", "batch": 2}, "window": "10 days"}, request=_PART),
        Kind(
            "restated",
            {"symbol": {"universe": "$plan", "batch": 2}, "window": "10 days"},
            request=_PART,
            restates="2 days",
        ),
        Kind(
            "ticks",
            {"symbol": {"universe": "$plan"}, "window": "1 week"},
            dated=False,
            hours=(0, 6, 12, 18),
            request=_PART,
        ),
        Kind(
            "files",
            {"symbol": {"universe": "$plan"}, "window": {"every": "1 month", "whole": True}},
            request={"symbols": "$symbol", "month": "$window.month"},
        ),
        Kind("history", {"symbol": {"universe": "$plan"}}, request={"symbols": "$symbol"}),
        Kind("listing", {"status": ["L", "D"]}, timed=False, request={"status": "$status"}),
    )
}


@dataclass
class Source:
    """The rows of the provider: daily (or several a day) values of symbols, some days without a row.

    A row can be had from its time on; until its day is over the value of a dated row is provisional. `bad` rows come
    without a value (they belong into the quarantine), `twice` rows come twice in an answer.
    """

    kind: Kind
    symbols: tuple[str, ...]
    since: date
    absent: frozenset[tuple[str, int]] = frozenset()  # (symbol, day number from `since`)
    bad: frozenset[tuple[str, int]] = frozenset()
    twice: frozenset[tuple[str, int]] = frozenset()
    restated: dict[tuple[str, date], int] = field(default_factory=dict)

    def value(self, symbol: str, at: datetime, now: datetime) -> int:
        base = hash_of(symbol, at) + 1_000_000 * self.restated.get((symbol, at.date()), 0)
        open_day = self.kind.dated and now < day_start(at.date()) + DAY
        return base + 1_000 * (now.hour + 1) if open_day else base

    def times(self, start: datetime, end: datetime, now: datetime) -> Iterator[datetime]:
        day = max(start.date(), self.since)
        while day_start(day) < end:
            for hour in self.kind.hours:
                at = day_start(day) + timedelta(hours=hour)
                if start <= at < end and (at <= now if self.kind.dated else at < now):
                    yield at
            day += DAY

    def rows(
        self, symbols: Sequence[str], start: datetime, end: datetime, now: datetime, *, as_sent: bool = False
    ) -> list[tuple[str, datetime, int | None]]:
        """Return the rows of an answer; `as_sent` with the bad and the repeated ones."""
        found: list[tuple[str, datetime, int | None]] = []
        for symbol in symbols:
            for at in self.times(start, end, now):
                number = (at.date() - self.since).days
                if (symbol, number) in self.absent:
                    continue
                value: int | None = self.value(symbol, at, now)
                if (symbol, number) in self.bad:
                    if as_sent:
                        found.append((symbol, at, None))
                    continue
                found.append((symbol, at, value))
                if as_sent and (symbol, number) in self.twice:
                    found.append((symbol, at, value))
        return found

    def listed(self, statuses: Sequence[str], now: datetime) -> list[tuple[str, int]]:
        """Return the list as it stands: symbols move from L to D, and their value changes from day to day."""
        days = (now.date() - self.since).days
        found = []
        for number, symbol in enumerate(self.symbols):
            status = "D" if days > 2 * number + 1 else "L"
            if status in statuses:
                found.append((symbol, hash_of(symbol, START) + days))
        return found


@cache
def _empty_ledger() -> bytes:
    with tempfile.TemporaryDirectory(dir=ROOT) as folder:
        path = Path(folder) / "ledger.db"
        Ledger(f"sqlite:///{path}", ManualClock(START)).close()
        return path.read_bytes()


def hash_of(symbol: str, at: datetime) -> int:
    return sum(map(ord, symbol)) * 31 + int(at.timestamp()) // 3600 % 100_003


# ---------------------------------------------------------------- the provider


@dataclass
class Request:
    """One request as the provider remembers it."""

    symbols: tuple[str, ...]
    start: datetime | None
    end: datetime | None
    cursor: str | None
    verdict: Verdict
    rows: tuple[tuple[str, datetime], ...]
    at: datetime
    process: int


@dataclass
class Provider:
    """What outlives every process: the source, the log of requests, and what goes wrong next."""

    source: Source
    page: int
    log: list[Request] = field(default_factory=list)
    faults: dict[int, str] = field(default_factory=dict)  # number of the request -> what goes wrong
    standing: Callable[[Ask], str | None] = lambda ask: None  # goes wrong each time it is asked

    def answered(self) -> list[Request]:
        return [one for one in self.log if one.verdict in (Verdict.ROWS, Verdict.EMPTY)]


class FakeClient:
    """Stands where `providers.client.Client` does."""

    def __init__(self, provider: Provider, clock: ManualClock, crossings: Crossings, process: int):
        self._provider, self._clock, self._crossings, self._process = provider, clock, crossings, process

    def describe(self, ask: Ask, cursor: Mapping[str, Any] | None = None) -> str:
        return f"GET /rows {ask.values} {ask.start} {cursor}"

    def ask(
        self,
        ask: Ask,
        cursor: Mapping[str, Any] | None = None,
        max_wait_seconds: float = 600.0,
        wake: threading.Event | None = None,
        priority: int = 0,
    ) -> Outcome:
        if wake is not None and wake.is_set():
            raise Interrupted("woken")
        self._crossings.cross("send a request")
        outcome = self._answer(ask, cursor, max_wait_seconds)
        self._crossings.cross("receive an answer")
        return outcome

    def _answer(self, ask: Ask, cursor: Mapping[str, Any] | None, max_wait: float) -> Outcome:
        provider, now = self._provider, self._clock.now()
        wrong = provider.faults.pop(len(provider.log) + 1, None) or provider.standing(ask)
        if wrong == "restart" and cursor is None:
            wrong = None
        if wrong == "no room":
            raise WaitingForQuota("the day's quota is spent", now + timedelta(hours=2))
        if wrong is None or wrong == "leave out the cursor":
            return self._rows(ask, cursor, now)
        verdict = Verdict("cool_down" if wrong == "long cool_down" else wrong)
        seconds = {"cool_down": 5.0, "long cool_down": 7200.0}.get(wrong)
        until = now + timedelta(hours=3) if verdict is Verdict.QUOTA else None
        if seconds is not None:
            until = now + timedelta(seconds=seconds)
            if seconds <= max_wait:
                self._clock.sleep(seconds)
        self._remember(ask, cursor, verdict, ())
        ruling = Ruling(verdict, f"the provider says {wrong}", seconds, until)
        return Outcome(verdict, ruling, self.describe(ask, cursor), now, self._clock.now(), 400, 10, raw="{}")

    def _rows(self, ask: Ask, cursor: Mapping[str, Any] | None, now: datetime) -> Outcome:
        source, kind = self._provider.source, self._provider.source.kind
        names = next(iter(ask.values.values())) if ask.values else source.symbols
        if kind.timed:
            start, end = ask.window_start or ask.start, ask.window_end or ask.end
            if kind.name == "history":
                start, end = day_start(source.since), now + DAY
            assert start is not None
            assert end is not None
            rows: list[tuple[Any, ...]] = list(source.rows(names, start, end, now, as_sent=True))
        else:
            rows = [(symbol, START, value) for symbol, value in source.listed(names, now)]
        offset = int((cursor or {}).get("token", 0))
        part = rows[offset : offset + self._provider.page]
        more = offset + self._provider.page < len(rows)
        frame = pl.DataFrame(
            [(symbol, at.date() if kind.dated else at, value) for symbol, at, value in part],
            schema={"symbol": pl.String, "at": pl.Date if kind.dated else pl.Datetime("us", "UTC"), "value": pl.Int64},
            orient="row",
        )
        if not kind.timed:
            frame = frame.drop("at")
        verdict = Verdict.ROWS if part else Verdict.EMPTY
        self._remember(ask, cursor, verdict, tuple((symbol, at) for symbol, at, _ in part))
        bounds = (None, None) if kind.name == "listing" else (ask.window_start, ask.window_end)
        return Outcome(
            verdict,
            Ruling(verdict),
            self.describe(ask, cursor),
            now,
            self._clock.now(),
            200,
            100,
            len(part),
            Page(frame, len(part), start=bounds[0], end=bounds[1]),
            {"token": str(offset + self._provider.page)} if more else None,
        )

    def _remember(
        self, ask: Ask, cursor: Mapping[str, Any] | None, verdict: Verdict, rows: tuple[tuple[str, datetime], ...]
    ) -> None:
        symbols = tuple(next(iter(ask.values.values()))) if ask.values else ("*",)
        token = (cursor or {}).get("token")
        self._provider.log.append(
            Request(symbols, ask.start, ask.end, token, verdict, rows, self._clock.now(), self._process)
        )


# ---------------------------------------------------------------- stores


@dataclass
class Table:
    marker: str
    schema: Schema
    rows: dict[tuple[Any, ...], dict[str, Any]] = field(default_factory=dict)
    lanes: dict[str, int] = field(default_factory=dict)


@dataclass
class Disk:
    """What outlives every process of one store. `transactional` says whether rows and lane become durable together;
    `down` lists what the next writes meet: '' (nothing), 'before' or 'after' (the commit, whose success the caller then
    cannot know)."""

    name: str
    transactional: bool = True
    tables: dict[str, Table] = field(default_factory=dict)
    down: list[str] = field(default_factory=list)
    always_down: bool = False
    wrong: list[str] = field(default_factory=list)  # what no caller may ever do
    appended: int = 0
    _markers: Iterator[int] = field(default_factory=itertools.count)

    def new_marker(self) -> str:
        return f"{self.name}-{next(self._markers)}"


class FakeStore:
    """A store in memory; `Disk` is its disk."""

    def __init__(self, disk: Disk, crossings: Crossings):
        self.name = disk.name
        self.url = f"memory://{disk.name}"
        self._disk, self._crossings = disk, crossings
        self.capabilities = Capabilities(
            atomic=disk.transactional,
            transactions=disk.transactional,
            nanoseconds=True,
            nan=True,
            nul=True,
            unsigned_64=True,
            evolve=True,
            writers=Writers.MANY_PROCESSES,
        )

    def _reached(self) -> None:
        if self._disk.always_down:
            raise StoreError(f"store {self.name} cannot be reached")

    def ensure(self, dataset: str, schema: Schema) -> str:
        self._reached()
        if dataset not in self._disk.tables:
            self._crossings.cross(f"{self.name}: create a table")
            self._disk.tables.setdefault(dataset, Table(self._disk.new_marker(), schema))
            self._crossings.cross(f"{self.name}: created a table")
        return self._disk.tables[dataset].marker

    def marker(self, dataset: str) -> str | None:
        self._reached()
        table = self._disk.tables.get(dataset)
        return table.marker if table else None

    def schema(self, dataset: str) -> Schema | None:
        table = self._disk.tables.get(dataset)
        return table.schema if table else None

    def committed(self, dataset: str, lane: str) -> int:
        self._reached()
        return self._disk.tables[dataset].lanes.get(lane, 0)

    def write(self, batch: Batch) -> Written:
        self._reached()
        self._crossings.cross(f"{self.name}: write")
        trouble = self._disk.down.pop(0) if self._disk.down else ""
        if trouble == "before":
            raise StoreError(f"store {self.name} cannot be reached")
        table = self._disk.tables[batch.dataset]
        if table.lanes.get(batch.lane, 0) >= batch.seq:
            return Written(already=True)
        rows = batch.frame.to_dicts()
        keys = [tuple(row[name] for name in batch.schema.key) for row in rows]
        if len(set(keys)) != len(keys):
            self._disk.wrong.append(f"{batch.lane}:{batch.seq} has a key twice")
        present = [key for key in keys if key in table.rows]
        if batch.mode is Mode.APPEND:
            self._disk.appended += 1
            if present:
                self._disk.wrong.append(f"{batch.lane}:{batch.seq} appends keys that are there: {present[:3]}")
        inserted = updated = unchanged = 0
        for number, (key, row) in enumerate(zip(keys, rows, strict=True)):
            if not self._disk.transactional and number == len(rows) // 2:
                self._crossings.cross(f"{self.name}: half of the rows are written")
            before = table.rows.get(key)
            if before is None:
                inserted += 1
            elif any(before[name] != row[name] for name in batch.schema.names):
                updated += 1
            else:
                unchanged += 1
                continue
            table.rows[key] = row
        if not self._disk.transactional:
            self._crossings.cross(f"{self.name}: rows are written, the lane is not")
        table.lanes[batch.lane] = batch.seq
        self._crossings.cross(f"{self.name}: committed")
        if trouble == "after":
            raise StoreError(f"store {self.name}: the connection broke while it committed")
        return Written(inserted, updated, unchanged)

    def arrow(self, dataset: str, filter: Filter = Filter()):
        self._reached()
        frame = self.scan(dataset, filter).collect()
        yield from frame.to_arrow().to_batches()

    def scan(self, dataset: str, filter: Filter = Filter()) -> pl.LazyFrame:
        table = self._disk.tables[dataset]
        schema = dict(table.schema.polars())
        rows = [{name: row[name] for name in schema} for row in table.rows.values()]
        frame = pl.DataFrame(rows, schema=schema)
        if filter.subjects is not None and table.schema.subject is not None:
            frame = frame.filter(pl.col(table.schema.subject).is_in(list(filter.subjects)))
        if table.schema.time is not None:
            if filter.since is not None:
                frame = frame.filter(pl.col(table.schema.time) >= filter.since)
            if filter.until is not None:
                frame = frame.filter(pl.col(table.schema.time) < filter.until)
        return frame.lazy()

    def count(self, dataset: str, filter: Filter = Filter()) -> int:
        self._reached()
        return len(self._disk.tables[dataset].rows)

    def info(self, dataset: str) -> TableInfo:
        return TableInfo(dataset, self.count(dataset), 0, 0, 0, self.url)

    def close(self) -> None:
        pass


# ---------------------------------------------------------------- ledger and spool with boundaries

_WRITES = {
    "abandon_deliveries", "bind_dataset", "bind_store", "cancel_work", "claim", "close_run", "delivered",
    "distrust", "forget", "give_back", "hold", "keep_hold", "lay", "let_go", "open_run", "removed", "renew",
    "retry", "seal", "set_control", "split",
}  # fmt: skip


class BoundedLedger:
    """A ledger each of whose writes has a boundary before it and one after it."""

    def __init__(self, ledger: Ledger, crossings: Crossings):
        self._ledger, self._crossings = ledger, crossings

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._ledger, name)
        if name not in _WRITES:
            return found

        def write(*args: Any, **options: Any) -> Any:
            self._crossings.cross(f"ledger: {name}")
            result = found(*args, **options)
            self._crossings.cross(f"ledger: {name} done")
            return result

        return write


class BoundedSpool(Spool):
    """A spool whose writes and removals are boundaries; a death in the middle leaves half a file."""

    def __init__(self, root: Path, crossings: Crossings):
        super().__init__(root)
        self._crossings = crossings

    def write(self, lane: str, seq: int, frame: pl.DataFrame) -> tuple[str, int]:
        folder = self.root / "spool" / lane
        folder.mkdir(parents=True, exist_ok=True)
        half = folder / f"{seq:08d}.part"
        half.write_bytes(b"half a segment")
        self._crossings.cross("spool: half written")
        half.unlink(missing_ok=True)  # swept away, when its writer slept too long
        result = super().write(lane, seq, frame)
        self._crossings.cross("spool: written")
        return result

    def remove(self, paths) -> None:
        for path in list(paths):
            self._crossings.cross("spool: remove")
            super().remove([path])
        self._crossings.cross("spool: removed")

    def set_aside(self, dataset: str, segment_id: str, rejected: pl.DataFrame) -> str:
        self._crossings.cross("spool: set aside")
        return super().set_aside(dataset, segment_id, rejected)


# ---------------------------------------------------------------- the world


class OneThread(InlineRunner):
    """Runs each step in the calling thread, and lets the fetching step start none of its own."""

    def submit(self, step: Callable[..., Any], *args: Any, after: Any = (), name: str = "") -> Any:
        if step is steps.fetch:
            task, seconds = args
            return super().submit(step, task, seconds, False, after=after, name=name)
        return super().submit(step, *args, after=after, name=name)


@dataclass
class Settings:
    """What stands in the world's upstream.yml."""

    kind: str = "batched"
    symbols: tuple[str, ...] = ("A", "B", "C")
    since: date = FIRST
    until: date | None = date(2024, 3, 25)
    page: int = 3
    segment_requests: int = 4
    segment_rows: int = 50
    stores: tuple[str, ...] = ("one",)
    not_transactional: tuple[str, ...] = ()
    attempts: int = 3


class World:
    """Everything, and the processes that come and go in it. Use as a context manager."""

    def __init__(
        self,
        settings: Settings,
        source: Source | None = None,
        now: datetime = START + timedelta(days=40),
        seed: int = 0,
    ):
        self.settings = settings
        self.kind = KINDS[settings.kind]
        self.clock = BeatingClock(now, self._beat, self._next_turn)
        self.source = source or Source(self.kind, settings.symbols, settings.since)
        self.provider = Provider(self.source, settings.page)
        self.disks: dict[str, Disk] = {}
        self.folder = Path(tempfile.mkdtemp(prefix="world-", dir=ROOT))
        self.processes = itertools.count(1)
        self.living: set[int] = set()
        self.current = threading.local()
        self.crashes = 0
        self.lost: list[str] = []  # what the processes were about to do when they died
        self.opened: list[Ledger] = []
        self._owners = itertools.count(1)
        self._chance = random.Random(seed)
        (self.folder / ".marketsync").mkdir()
        self._patches = [
            patch("tasks.steps.this_owner", self._owner),
            patch("tasks.workspace.this_owner", self._owner),
            patch("marketsync.ledger.owner_is_dead", self._is_dead),
            # Lanes and runs have random names, by which some things are sorted: the same ones each time.
            patch("uuid.uuid4", lambda: uuid.UUID(int=self._chance.getrandbits(128), version=4)),
        ]

    def __enter__(self) -> World:
        for one in self._patches:
            one.start()
        self.write_configuration()
        return self

    def __exit__(self, *_: object) -> None:
        for one in self._patches:
            one.stop()
        for ledger in self.opened:
            ledger.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _owner(self) -> str:
        return f"sim:{self.current.process}:0:{next(self._owners)}"

    def _is_dead(self, owner: str) -> bool:
        return int(owner.split(":")[1]) not in self.living

    def write_configuration(self, name: str = "upstream.yml") -> Path:
        s = self.settings
        (self.folder / "made.yml").write_text(json.dumps(self.kind.definition(s.page), default=str))
        for store in s.stores:
            self.disks.setdefault(store, Disk(store, store not in s.not_transactional))
        plan: dict[str, Any] = {
            "datasets": ["made.rows"],
            "since": s.since,
            "stores": list(s.stores),
            "segment": {"requests": s.segment_requests, "rows": s.segment_rows},
        }
        if s.until is not None:
            plan["until"] = s.until
        if "symbol" in self.kind.over:
            plan["universe"] = list(s.symbols)
        content = {
            "upstreams": {
                "made": {"definition": "made.yml", "tuning": {"attempts": s.attempts, "back_off": "1 second"}}
            },
            "stores": {store: f"delta://./{store}" for store in s.stores},
            "plans": {"p": plan},
        }
        path = self.folder / name
        path.write_text(json.dumps(content, default=str))
        return path

    # ------------------------------------------------------------ processes

    def process(
        self, crash_at: int | str | None = None, turn: Callable[[], None] | None = None, config: str = "upstream.yml"
    ) -> Process:
        return Process(self, next(self.processes), Crossings(crash_at, turn), self.folder / config)

    def run(
        self,
        *,
        crash_at: int | str | None = None,
        options: Options = Options(),
        seconds: float | None = None,
        faults: Mapping[int, str] = {},
    ) -> RunReport | None:
        """Run the plan in a new process; None when it died. `faults` by number of the request within this run."""
        before = len(self.provider.log)
        self.clock.advance(1.0)
        self.provider.faults = {before + number: fault for number, fault in faults.items()}
        process = self.process(crash_at)
        try:
            return process.run(options, seconds)
        except Crash as crash:
            self.crashes += 1
            self.lost.append(str(crash))
            return None
        finally:
            process.end()
            self.provider.faults = {}

    def run_together(
        self,
        order: Iterable[tuple[int, float]],
        *,
        processes: int = 2,
        crash_at: Mapping[int, int | str] = {},
        options: Options = Options(),
        seconds: float | None = None,
        faults: Mapping[int, str] = {},
    ) -> list[RunReport | None]:
        """Run the plan in several processes at once; return the report of each, None where it died.

        At every boundary the next of `order` says which process goes on and how many seconds passed before it does: a
        process that is not chosen for long is alive and asleep, and its leases run out. When `order` is at its end,
        they take turns. `crash_at` and `faults` are by the number of the process and of the request.
        """
        self.clock.advance(1.0)
        before = len(self.provider.log)
        self.provider.faults = {before + number: fault for number, fault in faults.items()}
        baton = Baton(self.clock, order)
        together = []
        for number in range(processes):
            config = self.write_configuration(f"upstream-{number}.yml")
            together.append(
                self.process(crash_at.get(number), lambda number=number: baton.pass_on(number), config.name)
            )
        reports: list[RunReport | None] = [None] * processes
        failures: list[BaseException] = []

        def live(number: int, process: Process) -> None:
            self.current.process = process.number
            self.current.turn = process.crossings.turn
            baton.wait(number)
            try:
                reports[number] = process.run(options, seconds)
            except Crash as crash:
                self.crashes += 1
                self.lost.append(str(crash))
            except BaseException as error:  # noqa: BLE001 - raised below, in the thread of the test
                failures.append(error)
            finally:
                process.end()
                baton.leave(number)

        threads = [threading.Thread(target=live, args=item) for item in enumerate(together)]
        for number, thread in enumerate(threads):
            baton.join(number)
            thread.start()
        baton.begin()
        for thread in threads:
            thread.join()
        self.provider.faults = {}
        if failures:
            raise failures[0]
        return reports

    def _beat(self, before: datetime) -> None:
        """Let the hearts of the other processes beat while one sleeps (its own threads would, outside of here)."""
        if len(self.living) < 2:
            return
        until, before_text = stamp(self.clock.now() + timedelta(seconds=LEASE_SECONDS)), stamp(before)
        with self.ledger()._write() as connection:
            for table, column in (("work", "lease_until"), ("hold", "until")):
                connection.execute(
                    sa.text(f"UPDATE {table} SET {column} = :until WHERE {column} > :before AND {column} < :until"),
                    {"until": until, "before": before_text},
                )

    def _next_turn(self) -> None:
        turn = getattr(self.current, "turn", None)
        if turn is not None:
            turn()

    def ledger(self) -> Ledger:
        """A look into the ledger from outside."""
        if not self.opened:
            self.opened.append(self.open_ledger())
        return self.opened[0]

    def open_ledger(self) -> Ledger:
        """Open the ledger's file anew, as a new process does. Making its tables, and building the text of a statement,
        cost more than all the rest here: both are done once."""
        path = self.folder / ".marketsync" / "ledger.db"
        if not path.exists():
            path.write_bytes(_empty_ledger())
        ledger = Ledger(f"sqlite:///{path}", self.clock)
        dialect = ledger._engine.dialect
        ledger._engine.dialect = _COMPILED.setdefault("dialect", dialect)
        ledger._engine = ledger._engine.execution_options(compiled_cache=_COMPILED)
        return ledger

    def sql(self, text: str) -> list[Any]:
        with self.ledger()._engine.connect() as connection:
            return list(connection.execute(sa.text(text)))

    # ------------------------------------------------------------ truth

    def truth(self) -> dict[tuple[Any, ...], int]:
        """The rows that every store should have: key -> value."""
        now, s = self.clock.now(), self.settings
        if not self.kind.timed:
            return {(symbol,): value for symbol, value in self.source.listed(("L", "D"), now)}
        end = day_start(s.until or now.date()) + DAY
        start = day_start(s.since)
        rows = self.source.rows(s.symbols, start, end, now)
        return {
            (symbol, at.date() if self.kind.dated else at): value for symbol, at, value in rows if value is not None
        }

    def stored(self, store: str) -> dict[tuple[Any, ...], int]:
        table = self.disks[store].tables.get("made.rows")
        found = {} if table is None else {key: row["value"] for key, row in table.rows.items()}
        if self.kind.name in ("files", "history") and self.settings.until is not None:
            # One answer holds more than was wanted of it; what was wanted is what is compared.
            found = {
                key: value
                for key, value in found.items()
                if self.settings.since <= (key[1] if self.kind.dated else key[1].date()) <= self.settings.until
            }
        return found

    # ------------------------------------------------------------ what must always hold

    def check_always(self) -> None:
        """What holds at every instant, also just after a crash."""
        for disk in self.disks.values():
            assert not disk.wrong, f"{disk.name}: {disk.wrong}"
        self._coverage_is_true()
        self._cursors_are_not_ahead()

    def _coverage_is_true(self) -> None:
        if not self.kind.timed:
            return
        ledger = self.ledger()
        names = list(self.disks)
        for store, of_subject in ledger.coverage(names, "made.rows", None).items():
            table = self.disks[store].tables.get("made.rows")
            if table is not None and self._is_bound(store, table.marker):
                for subject, pieces in of_subject.items():
                    for piece in pieces:
                        if piece.answer not in (Answer.ROWS, Answer.EMPTY):
                            continue
                        for symbol, at, _ in self.source.rows([subject], piece.start, piece.end, piece.asked_at):
                            key = (symbol, at.date() if self.kind.dated else at)
                            assert key in table.rows, f"{store} is said to cover {piece}, and has no {key}"
                            if piece.final:
                                final = self.source.value(symbol, at, at + 2 * DAY)
                                assert table.rows[key]["value"] in (final, *self._older(symbol, at)), (
                                    f"{store} is said to cover {piece} for good, and has an old {key}"
                                )

    def _older(self, symbol: str, at: datetime) -> list[int]:
        """Values of a row before it was restated."""
        return [hash_of(symbol, at) + 1_000_000 * n for n in range(self.source.restated.get((symbol, at.date()), 0))]

    def _is_bound(self, store: str, marker: str) -> bool:
        found = self.sql(f"SELECT marker FROM store WHERE store_id = '{store}' AND dataset = 'made.rows'")
        return bool(found) and found[0][0] == marker

    def _cursors_are_not_ahead(self) -> None:
        """The pages before a cursor are in a store or in the spool for it; files that the ledger promises are there."""
        for (path,) in self.sql(
            "SELECT DISTINCT path FROM segment JOIN delivery USING (segment_id) "
            "WHERE state = 'owed' AND path IS NOT NULL"
        ):
            assert (self.folder / ".marketsync" / path).exists(), f"the ledger promises {path}"
        for work_id, rows in self.sql("SELECT work_id, rows FROM work WHERE cursor IS NOT NULL AND rows > 0"):
            parts = self.sql(
                f"SELECT sum(rows) FROM part WHERE work_id = '{work_id}'",
            )
            assert (parts[0][0] or 0) >= rows, f"the cursor of {work_id} is past {rows} rows, {parts} are durable"

    def check_done(self) -> None:
        """What holds when a run has completed with every store up."""
        self.check_always()
        truth = self.truth()
        for store in self.settings.stores:
            stored = self.stored(store)
            if not self.kind.timed:
                stored = {key: value for key, value in stored.items() if key in truth}
            assert stored == truth, f"{store}: {difference(stored, truth)}"
        self.check_accounts()
        left = [str(path) for path in (self.folder / ".marketsync" / "spool").glob("*/*.arrow")]
        assert not left, f"every store has all, and {left} are still in the spool"
        stuck = self.sql(
            "SELECT work_id, state, subjects, start, \"end\" FROM work WHERE state IN ('leased', 'sealed')"
        )
        assert not stuck, f"work that nobody does: {stuck}"

    def check_accounts(self) -> None:
        """In every segment and store, fetched = inserted + updated + unchanged + duplicates + quarantined."""
        for segment, rows, fetched, duplicates, quarantined in self.sql(
            "SELECT segment_id, rows, fetched, duplicates, quarantined FROM segment"
        ):
            assert fetched == rows + duplicates + quarantined, segment
        for store in self.settings.stores:
            for lane, rows, told in self.sql(
                "SELECT lane, sum(rows), sum(inserted + updated + unchanged) FROM segment JOIN delivery "
                f"USING (segment_id) WHERE store_id = '{store}' AND delivery.state = 'done' GROUP BY lane"
            ):
                assert rows == told, f"{store}: lane {lane} was given {rows} rows and accounts for {told}"

    def paid_twice(self) -> list[Request]:
        """Requests that were answered (with rows, or as empty) for what an earlier request was answered."""
        seen: set[Any] = set()
        again = []
        for one in self.provider.answered():
            marks: list[Any] = list(set(one.rows)) or [(one.symbols, one.start, one.end, one.cursor)]
            if any(mark in seen for mark in marks):
                again.append(one)
            seen.update(marks)
        return again


class BeatingClock(ManualClock):
    """A clock that tells when somebody slept, and since when; then it may be another's turn."""

    def __init__(self, start: datetime, slept: Callable[[datetime], None], turn: Callable[[], None]):
        super().__init__(start)
        self._slept, self._turn = slept, turn

    def sleep(self, seconds: float, wake: threading.Event | None = None) -> bool:
        before = self.now()
        woken = super().sleep(seconds, wake)
        self._slept(before)
        self._turn()
        return woken


class Baton:
    """Lets one of several threads run at a time: `order` says which goes on at a boundary, after how many seconds."""

    def __init__(self, clock: ManualClock, order: Iterable[tuple[int, float]]):
        self._clock, self._order = clock, iter(order)
        self._gates: dict[int, threading.Semaphore] = {}

    def join(self, number: int) -> None:
        self._gates[number] = threading.Semaphore(0)

    def wait(self, number: int) -> None:
        self._gates[number].acquire()

    def begin(self) -> None:
        self._gates[self._next(0)].release()

    def pass_on(self, number: int) -> None:
        chosen = self._next(number)
        if chosen != number:
            gate = self._gates[number]
            self._gates[chosen].release()
            gate.acquire()

    def leave(self, number: int) -> None:
        del self._gates[number]
        if self._gates:
            self._gates[self._next(number)].release()

    def _next(self, current: int) -> int:
        chosen, seconds = next(self._order, (None, 0.0))
        if seconds:
            self._clock.advance(seconds)
        alive = sorted(self._gates)
        if chosen is None:
            # In turn: one that waits for another's work must not wait until its lease runs out.
            return next((number for number in alive if number > current), alive[0])
        return alive[chosen % len(alive)]


def difference(stored: Mapping[Any, Any], truth: Mapping[Any, Any]) -> str:
    missing = sorted(set(truth) - set(stored))
    extra = sorted(set(stored) - set(truth))
    other = sorted(key for key in set(truth) & set(stored) if truth[key] != stored[key])
    return (
        f"missing {missing[:5]} ({len(missing)}), too many {extra[:5]} ({len(extra)}), other {other[:5]} ({len(other)})"
    )


class Process:
    """One process: a workspace of its own on the world's state folder."""

    def __init__(self, world: World, number: int, crossings: Crossings, config: Path):
        self.world, self.number, self.crossings, self.config = world, number, crossings, config
        world.living.add(number)
        world.current.process = number
        self.workspace = Workspace(
            config,
            clock=world.clock,
            open_store=lambda url, name: FakeStore(world.disks[name], crossings),  # type: ignore[arg-type,return-value]
            make_client=lambda _, __: FakeClient(world.provider, world.clock, crossings, number),  # type: ignore[arg-type,return-value]
        )
        self.workspace._make_state()
        self._ledger = world.open_ledger()
        self.workspace.__dict__["ledger"] = BoundedLedger(self._ledger, crossings)
        self.workspace.__dict__["spool"] = BoundedSpool(self.workspace.state, crossings)
        workspaces._open[config.resolve()] = self.workspace

    def run(self, options: Options = Options(), seconds: float | None = None, plan: str = "p") -> RunReport:
        """What `tasks.sync.run_once` does, in one thread and without judging."""
        config = str(self.config)
        steps.sweep(config)
        run, state = begin(config, plan)
        if state is not None:
            return not_started(config, plan, run, state)
        try:
            outcomes = describe(config, plan, run, options, OneThread(), seconds=seconds, judge_step=lambda task: [])
            return finish(config, plan, run, outcomes)
        except Exception as error:
            broken_off(config, run, error)
            raise

    def end(self) -> None:
        """The process is gone, well or not."""
        self.crossings.dead = True
        self.world.living.discard(self.number)
        workspaces._open.pop(self.config.resolve(), None)
        self._ledger.close()
