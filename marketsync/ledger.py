"""The ledger: what was asked, answered, sealed and delivered, and what the user wants of each plan. SQLAlchemy Core.

SQLite in WAL mode by default, PostgreSQL by URL. Only issued work is stored, never a row per possible partition. Every
write of a worker is fenced by its lease's epoch. Rates and quotas are kept elsewhere (`providers/limits.py`); rows
never come near the ledger.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import uuid
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from itertools import pairwise
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.exc import SQLAlchemyError

from marketsync.clock import Clock
from marketsync.coverage import Answer, Covered, Interval, laid, touches
from marketsync.errors import LeaseLost, MarketSyncError
from marketsync.planning import Unit
from marketsync.schema import ColumnType, Schema

LEASE_SECONDS = 60.0
VERSION = 1  # of the tables; another one is refused, never guessed at
_WRITER = 5_402_331_907  # the advisory lock that writers of a PostgreSQL ledger take
_CHUNK = 400  # values in one IN (...): below every engine's limit on parameters


class Instant(sa.TypeDecorator[datetime]):
    """An instant as ISO text of fixed width in UTC: sorts as time, and a person can read it in the file."""

    impl = sa.String(32)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Any) -> str | None:
        return None if value is None else stamp(value)

    def process_result_value(self, value: str | None, dialect: Any) -> datetime | None:
        return None if value is None else datetime.fromisoformat(value)


def stamp(value: datetime) -> str:
    """Write an instant as the ledger keeps it."""
    return value.astimezone(UTC).isoformat(timespec="microseconds")


_schema = sa.MetaData()
_store = sa.Table(
    "store",
    _schema,
    sa.Column("store_id", sa.String(128), primary_key=True),
    sa.Column("dataset", sa.String(128), primary_key=True),
    sa.Column("url_redacted", sa.Text),
    sa.Column("marker", sa.String(64)),
)
_dataset_version = sa.Table(
    "dataset_version",
    _schema,
    sa.Column("dataset", sa.String(128), primary_key=True),
    sa.Column("request_hash", sa.String(32), primary_key=True),
    sa.Column("schema_hash", sa.String(32), primary_key=True),
    sa.Column("columns", sa.Text),
    sa.Column("first_used", Instant),
)
_coverage = sa.Table(
    "coverage",
    _schema,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("store_id", sa.String(128), nullable=False),
    sa.Column("dataset", sa.String(128), nullable=False),
    sa.Column("request_hash", sa.String(32), nullable=False),
    sa.Column("subject", sa.String(255), nullable=False),
    sa.Column("start", Instant, nullable=False),
    sa.Column("end", Instant, nullable=False),
    sa.Column("answer", sa.String(16), nullable=False),
    sa.Column("final", sa.Boolean, nullable=False),
    sa.Column("asked_at", Instant, nullable=False),
    sa.Column("rows", sa.Integer),
    sa.Column("work_id", sa.String(40)),
    sa.Index("coverage_of", "store_id", "dataset", "subject", "start"),
)
_work = sa.Table(
    "work",
    _schema,
    sa.Column("work_id", sa.String(40), primary_key=True),
    sa.Column("run_id", sa.String(40)),
    sa.Column("plan", sa.String(128), nullable=False),
    sa.Column("dataset", sa.String(128), nullable=False),
    sa.Column("request_hash", sa.String(32), nullable=False),
    sa.Column("subjects", sa.Text, nullable=False),
    sa.Column("unit", sa.Text, nullable=False),
    sa.Column("start", Instant, nullable=False),
    sa.Column("end", Instant, nullable=False),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("owner", sa.String(128)),
    sa.Column("epoch", sa.Integer, nullable=False),
    sa.Column("lease_until", Instant),
    sa.Column("cursor", sa.Text),
    sa.Column("requests", sa.Integer, nullable=False, default=0),
    sa.Column("rows", sa.Integer, nullable=False, default=0),
    sa.Column("subject_rows", sa.Text),
    sa.Column("extent", sa.Text),
    sa.Column("restarted", sa.Boolean, nullable=False, default=False),
    sa.Column("chain", sa.Integer, nullable=False, default=1),  # the epoch in which its first page was asked
    sa.Column("asked_at", Instant),
    sa.Column("final_until", Instant),
    sa.Column("resume_at", Instant),
    sa.Column("label", sa.Text),
    sa.Column("error", sa.Text),
    sa.Column("changed_at", Instant),
    sa.Index("work_of", "dataset", "state"),
    sa.Index("work_run", "run_id"),
)
_segment = sa.Table(
    "segment",
    _schema,
    sa.Column("segment_id", sa.String(80), primary_key=True),
    sa.Column("run_id", sa.String(40)),
    sa.Column("dataset", sa.String(128), nullable=False),
    sa.Column("lane", sa.String(64), nullable=False),
    sa.Column("seq", sa.Integer, nullable=False),
    sa.Column("host", sa.String(255), nullable=False),
    sa.Column("path", sa.Text),
    sa.Column("rows", sa.Integer, nullable=False),
    sa.Column("fetched", sa.Integer, nullable=False),
    sa.Column("duplicates", sa.Integer, nullable=False),
    sa.Column("quarantined", sa.Integer, nullable=False),
    sa.Column("bytes", sa.Integer, nullable=False),
    sa.Column("requests", sa.Integer, nullable=False),
    sa.Column("key_min", sa.Text),
    sa.Column("key_max", sa.Text),
    sa.Column("sealed_at", Instant),
    sa.Column("removed", sa.Boolean, nullable=False, default=False),
    sa.Index("segment_lane", "lane", "seq"),
)
_part = sa.Table(
    "part",
    _schema,
    sa.Column("segment_id", sa.String(80), primary_key=True),
    sa.Column("work_id", sa.String(40), primary_key=True),
    sa.Column("chain", sa.Integer, nullable=False),
    sa.Column("rows", sa.Integer, nullable=False),
    sa.Index("part_work", "work_id"),
)
_delivery = sa.Table(
    "delivery",
    _schema,
    sa.Column("segment_id", sa.String(80), primary_key=True),
    sa.Column("store_id", sa.String(128), primary_key=True),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("inserted", sa.Integer, nullable=False, default=0),
    sa.Column("updated", sa.Integer, nullable=False, default=0),
    sa.Column("unchanged", sa.Integer, nullable=False, default=0),
    sa.Column("at", Instant),
    sa.Column("error", sa.Text),
    sa.Index("delivery_state", "store_id", "state"),
)
_run = sa.Table(
    "run",
    _schema,
    sa.Column("run_id", sa.String(40), primary_key=True),
    sa.Column("plan", sa.String(128), nullable=False),
    sa.Column("state", sa.String(32), nullable=False),
    sa.Column("started", Instant, nullable=False),
    sa.Column("ended", Instant),
    sa.Column("counts", sa.Text),
    sa.Column("config_hash", sa.String(32)),
    sa.Index("run_plan", "plan", "started"),
)
_control = sa.Table(
    "control",
    _schema,
    sa.Column("plan", sa.String(128), primary_key=True),
    sa.Column("desired", sa.String(16), nullable=False),
    sa.Column("generation", sa.Integer, nullable=False),
    sa.Column("at", Instant),
)
_version = sa.Table("version", _schema, sa.Column("version", sa.Integer, primary_key=True))
_hold = sa.Table(
    "hold",
    _schema,
    sa.Column("name", sa.String(255), primary_key=True),
    sa.Column("owner", sa.String(128), nullable=False),
    sa.Column("until", Instant, nullable=False),
)


_ADVANCED = (
    "state",
    "owner",
    "cursor",
    "requests",
    "rows",
    "subject_rows",
    "restarted",
    "extent",
    "asked_at",
    "final_until",
    "resume_at",
    "label",
    "error",
    "changed_at",
)
# One statement for all units of a segment, built once: building it anew for each cost more than running it.
_ADVANCE = (
    _work.update()
    .where(
        _work.c.work_id == sa.bindparam("b_work"),
        _work.c.owner == sa.bindparam("b_owner"),
        _work.c.epoch == sa.bindparam("b_epoch"),
    )
    .values({name: sa.bindparam(name) for name in _ADVANCED})
)


class WorkState(StrEnum):
    """Where a work unit is."""

    OWED = "owed"  # given back unfinished; its cursor says where to go on
    LEASED = "leased"
    SEALED = "sealed"  # the whole chain is in the spool
    DELIVERED = "delivered"  # every store has it
    WAITING = "waiting"  # for a quota or a long cool-down
    FAILED = "failed"
    DROPPED = "dropped"
    CANCELLED = "cancelled"
    NOT_YET = "not_yet"  # answered "not published yet": asked again next run
    SPLIT = "split"  # replaced by its halves


_FINISHED = [WorkState.DELIVERED.value, WorkState.SPLIT.value, WorkState.NOT_YET.value]
_RESUMABLE = [
    WorkState.LEASED.value,
    WorkState.OWED.value,
    WorkState.WAITING.value,
    WorkState.FAILED.value,
    WorkState.CANCELLED.value,
]


_ANY_SUBJECT = "**"
WHOLE_WINDOW = "whole window"  # stands for the work where an answer holds more than was owed


class Binding(StrEnum):
    """How a table stands to what the ledger knew of it."""

    SAME = "same"
    NEW = "new"
    CHANGED = "changed"


class Desired(StrEnum):
    """What the user wants of a plan."""

    RUN = "run"
    PAUSE = "pause"
    CANCEL = "cancel"


@dataclass(frozen=True)
class Work:
    """A leased work unit as its worker holds it."""

    work_id: str
    unit: Unit
    request_hash: str
    epoch: int
    attempt: int
    cursor: dict[str, Any] | None
    requests: int = 0
    rows: int = 0
    subject_rows: Mapping[str, int] = field(default_factory=dict)
    restarted: bool = False
    extent: Mapping[str, tuple[str, str]] = field(default_factory=dict)  # subject -> oldest, newest time sealed so far
    asked_at: datetime | None = None  # of the chain's first page
    chain: int = 1  # the epoch in which that page was asked


@dataclass(frozen=True)
class Part:
    """What one segment holds of one work unit, and how the unit stands after it."""

    work: Work
    rows: int  # in this segment
    requests: int  # in this segment
    subject_rows: Mapping[str, int]  # in this segment
    cursor: dict[str, Any] | None
    state: WorkState  # LEASED: the chain goes on
    asked_at: datetime
    final_until: datetime
    answer: Answer = Answer.ROWS
    restarted: bool = False  # rows of this unit may be in the stores already, or twice in its pages
    extent: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    resume_at: datetime | None = None
    label: str = ""
    error: str | None = None


@dataclass(frozen=True)
class Segment:
    """A sealed segment."""

    segment_id: str
    dataset: str
    lane: str
    seq: int
    host: str
    path: str | None
    rows: int
    fetched: int
    duplicates: int
    quarantined: int
    bytes: int
    requests: int
    key_min: str | None = None
    key_max: str | None = None


@dataclass(frozen=True)
class Origin:
    """Where a segment is from: each of `asked` is a subject and a span that its run asked for."""

    run_id: str
    sealed_at: datetime
    asked: list[tuple[str, Interval]]


@dataclass(frozen=True)
class Control:
    """What is wanted of a plan; `generation` grows with every word of the user."""

    desired: Desired
    generation: int


@dataclass(frozen=True)
class RunRow:
    """One run as the ledger knows it."""

    run_id: str
    plan: str
    state: str
    started: datetime
    ended: datetime | None
    counts: dict[str, Any]


@dataclass(frozen=True)
class Claims:
    """What `claim` gave: the leased work, how many of the units asked for are settled, those that are left to other
    workers that are alive, and those that were found to be too large before (their halves are to be asked)."""

    work: list[Work]
    settled: int
    elsewhere: list[Unit]
    too_large: list[Unit] = field(default_factory=list)


def this_owner() -> str:
    """Return a name for this process: host, pid and start time, so that a dead one can be told from a living one."""
    return f"{socket.gethostname()}:{os.getpid()}:{_process_start(os.getpid()) or 0}:{uuid.uuid4().hex[:8]}"


def _process_start(pid: int) -> str | None:
    try:
        with open(f"/proc/{pid}/stat", encoding="latin-1") as file:
            return file.read().rsplit(")", 1)[1].split()[19]
    except (OSError, IndexError):
        return None


def owner_is_dead(owner: str) -> bool:
    """Return whether the owner was a process of this host that is certainly gone (a killed worker's lease)."""
    host, pid, started, _ = owner.rsplit(":", 3)
    if host != socket.gethostname():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    now = _process_start(int(pid))
    return now is not None and started != "0" and now != started


def _unit_text(unit: Unit) -> str:
    return json.dumps(
        [
            unit.dataset,
            list(unit.subjects),
            [[name, list(values)] for name, values in unit.values],
            *(stamp(at) for at in (unit.start, unit.end, unit.window_start, unit.window_end)),
            unit.session.isoformat() if unit.session else None,
        ]
    )


def unit_from_text(text: str) -> Unit:
    """Read a unit as the ledger wrote it."""
    from datetime import date

    dataset, subjects, values, start, end, window_start, window_end, session = json.loads(text)
    return Unit(
        dataset,
        tuple(subjects),
        tuple((name, tuple(chosen)) for name, chosen in values),
        datetime.fromisoformat(start),
        datetime.fromisoformat(end),
        datetime.fromisoformat(window_start),
        datetime.fromisoformat(window_end),
        date.fromisoformat(session) if session else None,
    )


class Ledger:
    """The ledger of one state folder (or of several machines, in PostgreSQL). Safe to use from many threads."""

    def __init__(self, url: str, clock: Clock):
        """Open or create the ledger at an SQLAlchemy URL; MarketSyncError when it cannot be reached."""
        self._clock = clock
        self.url = sa.make_url(url).render_as_string(hide_password=True)
        self._lock = threading.RLock()
        sqlite = url.startswith("sqlite")
        if sqlite:
            self._engine = sa.create_engine(url, connect_args={"timeout": 60, "check_same_thread": False})
        else:
            # whatever a server's default is: who waited for the lock has to see what its holder wrote
            self._engine = sa.create_engine(
                url.replace("postgresql://", "postgresql+psycopg://", 1),
                connect_args={"client_encoding": "utf8"},
                pool_pre_ping=True,
                isolation_level="READ COMMITTED",
            )
        self._sqlite = sqlite
        if sqlite:
            event.listen(self._engine, "connect", _sqlite_connect)
        try:
            with self._write() as connection:
                known = sa.inspect(connection).get_table_names()
                if "control" not in known:
                    _schema.create_all(connection)
                    connection.execute(_version.insert().values(version=VERSION))
                found = connection.scalar(sa.select(_version.c.version)) if "version" in known else None
        except SQLAlchemyError as error:
            raise MarketSyncError(
                f"the ledger {self.url} cannot be opened: {error}; check the `state` folder or the `ledger` URL"
            ) from error
        if "control" in known and found != VERSION:
            self._engine.dispose()
            raise MarketSyncError(
                f"the ledger {self.url} is of version {found or 0}, this MarketSync keeps version {VERSION}: use the "
                "MarketSync that made it, or move the ledger away (rows in the stores stay; what they hold is asked "
                "again and compared, nothing is written twice)"
            )

    def close(self) -> None:
        """Close every connection."""
        self._engine.dispose()

    @contextmanager
    def _write(self) -> Iterator[sa.Connection]:
        # One writer a process at a time: SQLite would only make the others wait and retry.
        with self._lock, self._engine.connect() as connection:
            if self._sqlite:
                connection.exec_driver_sql("BEGIN IMMEDIATE")
            else:
                connection.begin()
                # What is read decides what is written (who may lease what), as under SQLite's single writer.
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_WRITER)))
            try:
                yield connection
            except BaseException:
                connection.rollback()
                raise
            connection.commit()

    @contextmanager
    def _read(self) -> Iterator[sa.Connection]:
        with self._engine.connect() as connection:
            if self._sqlite:
                connection.exec_driver_sql("BEGIN")
            yield connection
            connection.rollback()

    # ------------------------------------------------------------ runs and control

    def open_run(self, plan: str, config_hash: str = "") -> RunRow:
        """Begin a run of a plan."""
        now = self._clock.now()
        run_id = f"{now:%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:6]}"
        with self._write() as connection:
            connection.execute(
                _run.insert().values(
                    run_id=run_id, plan=plan, state="running", started=now, counts="{}", config_hash=config_hash
                )
            )
        return RunRow(run_id, plan, "running", now, None, {})

    def close_run(self, run_id: str, state: str, counts: Mapping[str, Any]) -> None:
        """End a run with its state and its report's counts."""
        with self._write() as connection:
            connection.execute(
                _run.update()
                .where(_run.c.run_id == run_id)
                .values(state=state, ended=self._clock.now(), counts=json.dumps(counts, default=str))
            )

    def runs(self, plan: str | None = None, *, run_id: str | None = None, limit: int = 20) -> list[RunRow]:
        """Return runs, the newest first."""
        query = sa.select(_run).order_by(_run.c.started.desc(), _run.c.run_id.desc()).limit(limit)
        if plan is not None:
            query = query.where(_run.c.plan == plan)
        if run_id is not None:
            query = query.where(_run.c.run_id == run_id)
        with self._read() as connection:
            return [
                RunRow(r.run_id, r.plan, r.state, r.started, r.ended, json.loads(r.counts or "{}"))
                for r in connection.execute(query)
            ]

    def control(self, plan: str) -> Control:
        """Return what is wanted of a plan."""
        with self._read() as connection:
            row = connection.execute(sa.select(_control).where(_control.c.plan == plan)).first()
        return Control(Desired(row.desired), row.generation) if row else Control(Desired.RUN, 0)

    def set_control(self, plan: str, desired: Desired) -> Control:
        """Say what is wanted of a plan; running workers hear it at their next page or inside their wait."""
        with self._write() as connection:
            row = connection.execute(sa.select(_control.c.generation).where(_control.c.plan == plan)).first()
            generation = (row.generation if row else 0) + 1
            connection.execute(_control.delete().where(_control.c.plan == plan))
            connection.execute(
                _control.insert().values(plan=plan, desired=desired, generation=generation, at=self._clock.now())
            )
        return Control(desired, generation)

    # ------------------------------------------------------------ holds

    def hold(self, name: str, owner: str, seconds: float = LEASE_SECONDS) -> bool:
        """Take or renew the hold called `name`; False when another living owner has it."""
        now = self._clock.now()
        with self._write() as connection:
            row = connection.execute(sa.select(_hold).where(_hold.c.name == name)).first()
            if row and row.owner != owner and row.until > now and not owner_is_dead(row.owner):
                return False
            connection.execute(_hold.delete().where(_hold.c.name == name))
            connection.execute(_hold.insert().values(name=name, owner=owner, until=now + timedelta(seconds=seconds)))
        return True

    def keep_hold(self, name: str, owner: str, seconds: float = LEASE_SECONDS) -> bool:
        """Renew a hold that the owner has had ever since it took it; False when it ran out and another took it since
        (who may have given it back)."""
        until = self._clock.now() + timedelta(seconds=seconds)
        with self._write() as connection:
            mine = (_hold.c.name == name) & (_hold.c.owner == owner)
            return connection.execute(_hold.update().where(mine).values(until=until)).rowcount == 1

    def let_go(self, name: str, owner: str) -> None:
        """Give a hold back."""
        with self._write() as connection:
            connection.execute(_hold.delete().where(_hold.c.name == name, _hold.c.owner == owner))

    # ------------------------------------------------------------ stores and datasets

    def bind_store(
        self,
        store_id: str,
        dataset: str,
        url: str,
        marker: str,
        has_rows: Callable[[], bool] = lambda: False,
        *,
        older: bool = False,
    ) -> Binding:
        """Note the table's marker. Where it is not the one known, the table was dropped, swapped or made anew, and
        where it is `older` it lacks what it had acknowledged: its coverage is void, and what was believed to be in it
        is delivered (while it is in the spool), copied or asked again. A table that is not known and `has_rows` is not
        trusted: nothing is ever appended to it unseen."""
        with self._read() as connection:
            if self._marker_in(connection, store_id, dataset) == marker and not older:
                return Binding.SAME
        occupied = has_rows()
        with self._write() as connection:
            known = self._marker_in(connection, store_id, dataset)
            if known == marker and not older:
                return Binding.SAME
            if known is not None:
                connection.execute(
                    _coverage.delete().where(_coverage.c.store_id == store_id, _coverage.c.dataset == dataset)
                )
                connection.execute(_store.delete().where(_store.c.store_id == store_id, _store.c.dataset == dataset))
                self._void_deliveries(connection, store_id, dataset)
            connection.execute(
                _store.insert().values(store_id=store_id, dataset=dataset, url_redacted=url, marker=marker)
            )
            if occupied:
                self._lay_in(connection, store_id, dataset, "", {_ANY_SUBJECT: [self._distrust()]})
        return Binding.NEW if known is None else Binding.CHANGED

    def marker(self, store_id: str, dataset: str) -> str | None:
        """Return the marker of the table that the ledger knows; None when it knows none."""
        with self._read() as connection:
            return self._marker_in(connection, store_id, dataset)

    def newest_delivery(self, store_id: str, dataset: str) -> tuple[str, int] | None:
        """Return lane and seq of the last rows that the store has acknowledged; None when it has none."""
        with self._read() as connection:
            row = connection.execute(
                sa.select(_segment.c.lane, _segment.c.seq)
                .join(_delivery, _delivery.c.segment_id == _segment.c.segment_id)
                .where(
                    _delivery.c.store_id == store_id,
                    _delivery.c.state == "done",
                    _segment.c.dataset == dataset,
                    _segment.c.path.is_not(None),
                )
                .order_by(_delivery.c.at.desc(), _segment.c.seq.desc())
                .limit(1)
            ).first()
        return None if row is None else (row.lane, row.seq)

    def _marker_in(self, connection: sa.Connection, store_id: str, dataset: str) -> str | None:
        return connection.execute(
            sa.select(_store.c.marker).where(_store.c.store_id == store_id, _store.c.dataset == dataset)
        ).scalar()

    def _void_deliveries(self, connection: sa.Connection, store_id: str, dataset: str) -> None:
        """Owe a table that was made anew what is still in the spool; the rest of what it was given is gone."""
        for kept, state in ((True, "owed"), (False, "void")):
            of_dataset = sa.select(_segment.c.segment_id).where(_segment.c.dataset == dataset)
            if kept:
                of_dataset = of_dataset.where(_segment.c.removed.is_(False))
            connection.execute(
                _delivery.update()
                .where(
                    _delivery.c.store_id == store_id,
                    _delivery.c.state == "done",
                    _delivery.c.segment_id.in_(of_dataset),
                )
                .values(state=state)
            )

    def distrust(self, store_id: str, dataset: str) -> None:
        """Note that keys may be anywhere in a table: nothing is ever appended to it unseen from now on."""
        self.lay(store_id, dataset, "", {_ANY_SUBJECT: [self._distrust()]})

    def _distrust(self) -> Covered:
        always = (datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC))
        return Covered(*always, Answer.PARTIAL, False, self._clock.now(), None)

    def bind_dataset(self, dataset: str, request_hash: str, schema_hash: str, columns: Mapping[str, str]) -> list[str]:
        """Note the version of a dataset that is used now; return the columns that are new since an earlier version of
        the same request (rows that are there already hold null in them)."""
        with self._write() as connection:
            known = connection.execute(
                sa.select(_dataset_version.c.schema_hash, _dataset_version.c.columns)
                .where(_dataset_version.c.dataset == dataset, _dataset_version.c.request_hash == request_hash)
                .order_by(_dataset_version.c.first_used)
            ).all()
            if any(row.schema_hash == schema_hash for row in known):
                return []
            connection.execute(
                _dataset_version.insert().values(
                    dataset=dataset,
                    request_hash=request_hash,
                    schema_hash=schema_hash,
                    columns=json.dumps(dict(columns)),
                    first_used=self._clock.now(),
                )
            )
        if not known:
            return []
        before = json.loads(known[-1].columns)
        return [name for name in columns if name not in before]

    def dataset_versions(self, dataset: str) -> list[tuple[str, str, dict[str, str]]]:
        """Return (request hash, schema hash, columns) of every version used, oldest first."""
        with self._read() as connection:
            rows = connection.execute(
                sa.select(_dataset_version)
                .where(_dataset_version.c.dataset == dataset)
                .order_by(_dataset_version.c.first_used)
            ).all()
        return [(row.request_hash, row.schema_hash, json.loads(row.columns)) for row in rows]

    # ------------------------------------------------------------ coverage

    def coverage(
        self,
        store_ids: Sequence[str],
        dataset: str,
        request_hash: str | None,
        subjects: Iterable[str] | None = None,
    ) -> dict[str, dict[str, list[Covered]]]:
        """Return store -> subject -> pieces in order of time; any request's with `request_hash` None."""
        with self._read() as connection:
            return self._coverage_in(connection, store_ids, dataset, request_hash, subjects)

    def _coverage_in(
        self,
        connection: sa.Connection,
        store_ids: Sequence[str],
        dataset: str,
        request_hash: str | None,
        subjects: Iterable[str] | None,
    ) -> dict[str, dict[str, list[Covered]]]:
        result: dict[str, dict[str, list[Covered]]] = {store: defaultdict(list) for store in store_ids}
        c = _coverage.c
        query = sa.select(
            c.store_id, c.subject, c.start, c.end, c.answer, c.final, c.asked_at, c.rows, c.work_id
        ).where(c.store_id.in_(list(store_ids)), c.dataset == dataset)
        if request_hash is not None:
            query = query.where(c.request_hash == request_hash)
        query = query.order_by(c.start)
        parts = [None] if subjects is None else list(_chunks(list(subjects)))
        for part in parts:
            chosen = query if part is None else query.where(c.subject.in_(part))
            for row in connection.execute(chosen):
                result[row[0]][row[1]].append(Covered(row[2], row[3], Answer(row[4]), row[5], row[6], row[7], row[8]))
        return result

    def lay(self, store_id: str, dataset: str, request_hash: str, pieces: Mapping[str, Sequence[Covered]]) -> None:
        """Lay new coverage over what is there."""
        with self._write() as connection:
            self._lay_in(connection, store_id, dataset, request_hash, pieces)

    def _lay_in(
        self,
        connection: sa.Connection,
        store_id: str,
        dataset: str,
        request_hash: str,
        pieces: Mapping[str, Sequence[Covered]],
    ) -> None:
        if not pieces:
            return
        now = self._clock.now()
        c = _coverage.c
        known: dict[str, list[tuple[int, Covered]]] = defaultdict(list)
        for part in _chunks(list(pieces)):
            for row in connection.execute(
                sa.select(c.id, c.subject, c.start, c.end, c.answer, c.final, c.asked_at, c.rows, c.work_id).where(
                    c.store_id == store_id,
                    c.dataset == dataset,
                    c.request_hash == request_hash,
                    c.subject.in_(part),
                )
            ):
                known[row[1]].append((row[0], Covered(row[2], row[3], Answer(row[4]), row[5], row[6], row[7], row[8])))
        gone: list[int] = []
        added: list[dict[str, Any]] = []
        for subject, new in pieces.items():
            before = dict((piece, id_) for id_, piece in known.get(subject, ()))
            after = laid(before, new, now)
            kept = set(after)
            gone.extend(id_ for piece, id_ in before.items() if piece not in kept)
            added.extend(
                {
                    "store_id": store_id,
                    "dataset": dataset,
                    "request_hash": request_hash,
                    "subject": subject,
                    "start": piece.start,
                    "end": piece.end,
                    "answer": piece.answer.value,
                    "final": piece.final,
                    "asked_at": piece.asked_at,
                    "rows": piece.rows,
                    "work_id": piece.work_id,
                }
                for piece in after
                if piece not in before
            )
        for part in _chunks(gone):
            connection.execute(_coverage.delete().where(c.id.in_(part)))
        if added:
            connection.execute(_coverage.insert(), added)

    # ------------------------------------------------------------ work

    def claim(
        self,
        *,
        run_id: str,
        plan: str,
        dataset: str,
        request_hash: str,
        candidates: Sequence[Unit],
        owner: str,
        still_owed: Callable[[Unit, Mapping[str, Sequence[Covered]]], bool],
        store_ids: Sequence[str],
        whole: Collection[str] = (),
        begun_since: datetime | None = None,
        lease_seconds: float = LEASE_SECONDS,
    ) -> Claims:
        """Lease what of the candidates is still owed and in nobody else's hands.

        `still_owed` is asked inside the transaction, with the coverage of the unit's subjects (of all the stores
        together, and of what is in the spool) as it is now. A unit that overlaps living work of another owner is left
        (`elsewhere`); one that was dropped before, or failed in this run, is settled; one that was split before is
        `too_large`, unless its id is among `whole`. Work whose lease expired, or whose worker of this host is dead,
        goes on under the next epoch from its cursor, unless no store has the pages before it or (with `begun_since`)
        its chain began before that.
        """
        now = self._clock.now()
        until = now + timedelta(seconds=lease_seconds)
        claims = Claims([], 0, [])
        settled = 0
        with self._write() as connection:
            span = Interval(min(unit.start for unit in candidates), max(unit.end for unit in candidates))
            subjects = list(dict.fromkeys(subject for unit in candidates for subject in unit.subjects))
            by_store = self._coverage_in(connection, store_ids, dataset, request_hash, subjects)
            together = self._spooled_in(connection, dataset, request_hash, span, subjects)
            for of_subject in by_store.values():
                for subject, pieces in of_subject.items():
                    together[subject].extend(pieces)
            living, dead = self._leased(connection, dataset, request_hash, owner, span)
            ids = {unit.work_id(request_hash): unit for unit in candidates}
            known: dict[str, Any] = {}
            for part in _chunks(list(ids)):
                for row in connection.execute(sa.select(_work).where(_work.c.work_id.in_(part))):
                    known[row.work_id] = row
            lost = self._chains_lost(connection, [row for row in known.values() if row.cursor and row.rows], store_ids)
            inserts: list[dict[str, Any]] = []
            for work_id, unit in ids.items():
                row = known.get(work_id)
                if not still_owed(unit, together):
                    settled += 1
                    continue
                if row is not None and row.state == WorkState.DROPPED:
                    settled += 1
                    continue
                if row is not None and row.state == WorkState.FAILED and row.run_id == run_id:
                    # Asked again by the next run only: a run of many steps must come to its end.
                    settled += 1
                    continue
                if row is not None and row.state == WorkState.SPLIT and work_id not in whole:
                    claims.too_large.append(unit)
                    continue
                if any(_overlap(unit, other) for _, other in living):
                    claims.elsewhere.append(unit)
                    continue
                for other_id, other in dead:
                    if other_id != work_id and _overlap(unit, other):
                        # Its worker may wake up again and must then find that it lost the unit.
                        self._take_away(connection, _work.c.work_id == other_id)
                work = Work(work_id, unit, request_hash, 1, 1, None)
                if row is not None:
                    work = replace(work, epoch=row.epoch + 1, attempt=row.attempt + 1, chain=row.epoch + 1)
                    resumable = row.state in _RESUMABLE and row.cursor and work_id not in lost
                    if resumable and (begun_since is None or (row.asked_at or now) >= begun_since):
                        work = replace(
                            work,
                            cursor=json.loads(row.cursor),
                            requests=row.requests,
                            rows=row.rows,
                            subject_rows=json.loads(row.subject_rows or "{}"),
                            restarted=row.restarted,
                            extent={name: (low, high) for name, (low, high) in json.loads(row.extent or "{}").items()},
                            asked_at=row.asked_at,
                            chain=row.chain,
                        )
                    elif row.rows or row.restarted:
                        # Pages of an earlier attempt are in the stores, and this one begins anew.
                        work = replace(work, restarted=True)
                claims.work.append(work)
                values = {
                    "run_id": run_id,
                    "plan": plan,
                    "dataset": dataset,
                    "request_hash": request_hash,
                    "subjects": "\n".join(unit.subjects),
                    "unit": _unit_text(unit),
                    "start": unit.start,
                    "end": unit.end,
                    "state": WorkState.LEASED.value,
                    "attempt": work.attempt,
                    "owner": owner,
                    "epoch": work.epoch,
                    "lease_until": until,
                    "cursor": None if work.cursor is None else json.dumps(work.cursor),
                    "requests": work.requests,
                    "rows": work.rows,
                    "subject_rows": json.dumps(work.subject_rows),
                    "restarted": work.restarted,
                    "chain": work.chain,
                    "extent": json.dumps(work.extent),
                    "asked_at": work.asked_at,
                    "resume_at": None,
                    "error": None,
                    "changed_at": now,
                }
                if row is None:
                    inserts.append({"work_id": work_id, **values})
                else:
                    connection.execute(_work.update().where(_work.c.work_id == work_id).values(**values))
            if inserts:
                connection.execute(_work.insert(), inserts)
        return replace(claims, settled=settled)

    def _leased(
        self, connection: sa.Connection, dataset: str, request_hash: str, owner: str, span: Interval
    ) -> tuple[list[tuple[str, Unit]], list[tuple[str, Unit]]]:
        """Return the leased units of a span that living workers have, and those of dead ones or with a lease that ran
        out; without the owner's own: a planner never yields two that overlap."""
        now = self._clock.now()
        w = _work.c
        rows = connection.execute(
            sa.select(w.work_id, w.unit, w.owner, w.lease_until).where(
                w.dataset == dataset,
                w.request_hash == request_hash,
                w.state == WorkState.LEASED.value,
                w.owner != owner,
                w.start < span.end,
                w.end > span.start,
            )
        )
        living: list[tuple[str, Unit]] = []
        dead: list[tuple[str, Unit]] = []
        for row in rows:
            alive = row.lease_until > now and not owner_is_dead(row.owner)
            (living if alive else dead).append((row.work_id, unit_from_text(row.unit)))
        return living, dead

    def _take_away(self, connection: sa.Connection, which: sa.ColumnElement[bool]) -> int:
        return connection.execute(
            _work.update()
            .where(which, _work.c.state == WorkState.LEASED)
            .values(
                state=WorkState.OWED.value,
                owner=None,
                lease_until=None,
                epoch=_work.c.epoch + 1,
                changed_at=self._clock.now(),
            )
        ).rowcount

    def _chains_lost(self, connection: sa.Connection, rows: Sequence[Any], store_ids: Sequence[str]) -> set[str]:
        """Return which unfinished chains have no store that has (or will get from the spool) all their pages so far:
        to go on from their cursors would leave the first pages out for good."""
        result: set[str] = set()
        for row in rows:
            in_chain = (_part.c.work_id == row.work_id) & (_part.c.chain == row.chain)
            parts = connection.execute(sa.select(sa.func.count()).select_from(_part).where(in_chain)).scalar() or 0
            had = connection.execute(
                sa.select(sa.func.count())
                .select_from(_part.join(_delivery, _delivery.c.segment_id == _part.c.segment_id))
                .where(in_chain, _delivery.c.store_id.in_(list(store_ids)), _delivery.c.state.in_(["owed", "done"]))
                .group_by(_delivery.c.store_id)
            ).scalars()
            if max(had, default=0) < parts:
                result.add(row.work_id)
        return result

    def _spooled_in(
        self,
        connection: sa.Connection,
        dataset: str,
        request_hash: str,
        span: Interval | None = None,
        subjects: list[str] | None = None,
    ) -> dict[str, list[Covered]]:
        query = sa.select(_work).where(
            _work.c.dataset == dataset,
            _work.c.request_hash == request_hash,
            _work.c.state == WorkState.SEALED.value,
        )
        if span is not None:
            query = query.where(_work.c.start < span.end, _work.c.end > span.start)
        queries = [query]
        if subjects is not None:
            # Each unit names its subjects in one text: those of one subject are found by it, the others one by one.
            several = _work.c.subjects.contains("\n")
            queries = [query.where(_work.c.subjects.in_(part)) for part in _chunks(subjects)] + [query.where(several)]
        result: dict[str, list[Covered]] = defaultdict(list)
        for chosen in queries:
            for row in connection.execute(chosen):
                for subject, pieces in _answers_of(row).items():
                    result[subject].extend(pieces)
        return result

    def spooled(self, dataset: str, request_hash: str) -> dict[str, list[Covered]]:
        """Return subject -> what was answered, is in the spool as a whole and not yet in every store."""
        with self._read() as connection:
            return self._spooled_in(connection, dataset, request_hash)

    def unfinished(self, dataset: str, request_hash: str) -> list[Unit]:
        """Return the units that were left in the middle of their pages and that nobody works on, the newest first."""
        now = self._clock.now()
        w = _work.c
        with self._read() as connection:
            rows = connection.execute(
                sa.select(w.unit, w.state, w.owner, w.lease_until)
                .where(
                    w.dataset == dataset,
                    w.request_hash == request_hash,
                    w.state.in_(_RESUMABLE),
                    w.cursor.is_not(None),
                )
                .order_by(w.start.desc(), w.work_id)
            ).all()
        return [
            unit_from_text(row.unit)
            for row in rows
            if row.state != WorkState.LEASED or row.lease_until <= now or owner_is_dead(row.owner)
        ]

    def renew(self, owner: str, lease_seconds: float = LEASE_SECONDS) -> int:
        """Renew every lease of the owner; return how many it holds."""
        until = self._clock.now() + timedelta(seconds=lease_seconds)
        with self._write() as connection:
            return connection.execute(
                _work.update()
                .where(_work.c.owner == owner, _work.c.state == WorkState.LEASED)
                .values(lease_until=until)
            ).rowcount

    def take_from_the_dead(self) -> int:
        """Take work from workers of this host that are certainly gone; return how many units. What they left is owed as
        before: only where others have asked for all of it meanwhile would it stay leased for good."""
        leased = sa.select(_work.c.owner).where(_work.c.state == WorkState.LEASED.value).distinct()
        with self._read() as connection:
            gone = [owner for owner in connection.execute(leased).scalars() if owner_is_dead(owner)]
        if not gone:
            return 0
        with self._write() as connection:
            return self._take_away(connection, _work.c.owner.in_(gone))

    def give_back(self, works: Sequence[Work], owner: str) -> None:
        """Give back leased work that was not begun (or whose pages are all sealed): others may take it now."""
        with self._write() as connection:
            for work in works:
                mine = (_work.c.work_id == work.work_id) & (_work.c.owner == owner) & (_work.c.epoch == work.epoch)
                connection.execute(
                    _work.update()
                    .where(mine, _work.c.state == WorkState.LEASED)
                    .values(state=WorkState.OWED.value, owner=None, lease_until=None, changed_at=self._clock.now())
                )

    def _advance(self, connection: sa.Connection, owner: str, parts: Sequence[Part]) -> None:
        """Bring units to where their parts say, all or none; LeaseLost names the first that was taken over."""
        if not parts:
            return
        now = self._clock.now()
        rows = []
        for part in parts:
            work = part.work
            totals = dict(work.subject_rows)
            for subject, count in part.subject_rows.items():
                totals[subject] = totals.get(subject, 0) + count
            held = part.state in (WorkState.LEASED, WorkState.SEALED)
            rows.append(
                {
                    "b_work": work.work_id,
                    "b_owner": owner,
                    "b_epoch": work.epoch,
                    "state": part.state.value,
                    "owner": owner if held else None,
                    "cursor": None if part.cursor is None else json.dumps(part.cursor),
                    "requests": work.requests + part.requests,
                    "rows": work.rows + part.rows,
                    "subject_rows": json.dumps(totals),
                    "restarted": work.restarted or part.restarted,
                    "extent": json.dumps(part.extent) if part.extent else "{}",
                    "asked_at": part.asked_at,
                    "final_until": part.final_until,
                    "resume_at": part.resume_at,
                    "label": part.label,
                    "error": part.error,
                    "changed_at": now,
                }
            )
        if connection.execute(_ADVANCE, rows).rowcount == len(rows):
            return
        for part in parts:
            held = connection.execute(
                sa.select(_work.c.epoch, _work.c.changed_at).where(_work.c.work_id == part.work.work_id)
            ).first()
            # What was still ours has just been changed by the update above.
            if held is None or held.epoch != part.work.epoch or held.changed_at != now:
                raise _lost(part.work)
        raise _lost(parts[0].work)

    def seal(
        self,
        run_id: str,
        owner: str,
        segment: Segment,
        parts: Sequence[Part],
        stores: Sequence[str],
    ) -> None:
        """Register a segment whose file is durable, with the new state of every unit in it, in one transaction.

        LeaseLost when any unit has been taken over: the caller drops that unit's rows and seals the rest again.
        A segment without rows needs no delivery: units that end in it are covered at once where nothing of them is on
        its way.
        """
        with self._write() as connection:
            self._advance(connection, owner, parts)
            connection.execute(
                _segment.insert().values(
                    segment_id=segment.segment_id,
                    run_id=run_id,
                    dataset=segment.dataset,
                    lane=segment.lane,
                    seq=segment.seq,
                    host=segment.host,
                    path=segment.path,
                    rows=segment.rows,
                    fetched=segment.fetched,
                    duplicates=segment.duplicates,
                    quarantined=segment.quarantined,
                    bytes=segment.bytes,
                    requests=segment.requests,
                    key_min=segment.key_min,
                    key_max=segment.key_max,
                    sealed_at=self._clock.now(),
                    removed=segment.path is None,
                )
            )
            if parts:
                connection.execute(
                    _part.insert(),
                    [
                        {
                            "segment_id": segment.segment_id,
                            "work_id": part.work.work_id,
                            "chain": part.work.chain,
                            "rows": part.rows,
                        }
                        for part in parts
                    ],
                )
            connection.execute(
                _delivery.insert(),
                [{"segment_id": segment.segment_id, "store_id": store, "state": "owed"} for store in stores],
            )
            not_yet = [part for part in parts if part.answer is Answer.NOT_YET]
            for store in stores:
                by_subject: dict[str, dict[str, list[Covered]]] = defaultdict(lambda: defaultdict(list))
                for part in not_yet:
                    for subject in part.work.unit.subjects:
                        by_subject[part.work.request_hash][subject].append(
                            Covered(
                                part.work.unit.start,
                                part.work.unit.end,
                                Answer.NOT_YET,
                                False,
                                part.asked_at,
                                0,
                            )
                        )
                for hash_, pieces in by_subject.items():
                    self._lay_in(connection, store, segment.dataset, hash_, pieces)

    def fresh(self, store_id: str, schema: Schema, segments: Sequence[Segment]) -> bool:
        """Return whether no row of the segments (of one lane) can be in the store already, so that they may be
        appended: keys hold the time and the subjects, by which coverage tells what is there or may be on its way."""
        if schema.time is None or schema.time not in schema.key:
            return False
        with self._read() as connection:
            works = self._works_of(connection, [segment.segment_id for segment in segments])
            if any(row.restarted for row in works):
                return False
            units = {row.work_id: unit_from_text(row.unit) for row in works}
            if not all(_keeps_apart(schema, unit) for unit in units.values()):
                return False
            if _meet(units[row.work_id] for row in works if row.rows):
                # The first pages of a unit that was cut, and its parts.
                return False
            subjects = list(dict.fromkeys(subject for unit in units.values() for subject in unit.subjects))
            chosen = [*subjects, _ANY_SUBJECT]
            known = self._coverage_in(connection, [store_id], segments[0].dataset, None, chosen)[store_id]
            others = connection.execute(
                sa.select(_work.c.work_id, _work.c.unit)
                .join(_part, _part.c.work_id == _work.c.work_id)
                .join(_segment, _segment.c.segment_id == _part.c.segment_id)
                .join(_delivery, _delivery.c.segment_id == _part.c.segment_id)
                .where(
                    _delivery.c.store_id == store_id,
                    _delivery.c.state == "owed",
                    _segment.c.dataset == segments[0].dataset,
                    _segment.c.lane != segments[0].lane,
                    _part.c.rows > 0,
                )
                .distinct()
            ).all()
        if known.get(_ANY_SUBJECT):
            return False
        # What another lane still owes may be there without a word of it: whoever delivers it died before he told.
        unsaid = [unit_from_text(row.unit) for row in others if row.work_id not in units]
        return not any(
            touches(known.get(subject, ()), Interval(unit.window_start, unit.window_end), work_id)
            for work_id, unit in units.items()
            for subject in unit.subjects
        ) and not any(_windows_overlap(unit, other) for unit in units.values() for other in unsaid)

    def _works_of(self, connection: sa.Connection, segment_ids: Sequence[str]) -> list[Any]:
        works: dict[str, Any] = {}
        for part in _chunks(list(segment_ids)):
            for row in connection.execute(
                sa.select(_work).join(_part, _part.c.work_id == _work.c.work_id).where(_part.c.segment_id.in_(part))
            ):
                works[row.work_id] = row
        return list(works.values())

    def owed_deliveries(self, store_id: str, dataset: str, host: str, lane: str | None = None) -> list[Segment]:
        """Return the segments of this host that the store still has to get, in the order they were sealed (within a
        lane in that of the lane)."""
        query = (
            sa.select(_segment)
            .join(_delivery, _delivery.c.segment_id == _segment.c.segment_id)
            .where(
                _delivery.c.store_id == store_id,
                _delivery.c.state == "owed",
                _segment.c.dataset == dataset,
                _segment.c.host == host,
            )
            .order_by(_segment.c.sealed_at, _segment.c.lane, _segment.c.seq)
        )
        if lane is not None:
            query = query.where(_segment.c.lane == lane)
        with self._read() as connection:
            return [_segment_of(row) for row in connection.execute(query)]

    def on_the_way(self, store_ids: Sequence[str], dataset: str) -> dict[str, list[Interval]]:
        """Return subject -> what living workers have sealed of it and still deliver to one of the stores."""
        with self._read() as connection:
            rows = connection.execute(
                sa.select(_work.c.subjects, _work.c.start, _work.c.end, _hold.c.owner)
                .join(_part, _part.c.work_id == _work.c.work_id)
                .join(_segment, _segment.c.segment_id == _part.c.segment_id)
                .join(_delivery, _delivery.c.segment_id == _part.c.segment_id)
                .join(_hold, _hold.c.name == sa.literal("lane:") + _segment.c.lane)
                .where(
                    _delivery.c.store_id.in_(list(store_ids)),
                    _delivery.c.state == "owed",
                    _segment.c.dataset == dataset,
                    _hold.c.until > self._clock.now(),
                )
                .distinct()
            ).all()
        result: dict[str, list[Interval]] = defaultdict(list)
        for row in rows:
            if not owner_is_dead(row.owner):
                for subject in row.subjects.split("\n"):
                    result[subject].append(Interval(row.start, row.end))
        return result

    def delivered(
        self, store_id: str, segments: Sequence[Segment], inserted: int, updated: int, unchanged: int
    ) -> list[str]:
        """Acknowledge a delivery: the units that are thereby whole in the store become coverage. Returns the paths of
        segment files that every store has (to be removed)."""
        now = self._clock.now()
        ids = [segment.segment_id for segment in segments]
        with self._write() as connection:
            for index, part in enumerate(_chunks(ids)):
                connection.execute(
                    _delivery.update()
                    .where(_delivery.c.segment_id.in_(part), _delivery.c.store_id == store_id)
                    .values(state="done", at=now, error=None, inserted=0, updated=0, unchanged=0)
                )
                if index == 0:
                    # The counts of a joint delivery stand with its first segment, and replace what was said of the
                    # others: a worker that was taken over while it slept acknowledges them again.
                    connection.execute(
                        _delivery.update()
                        .where(_delivery.c.segment_id == ids[0], _delivery.c.store_id == store_id)
                        .values(inserted=inserted, updated=updated, unchanged=unchanged)
                    )
            works = self._works_of(connection, ids)
            incomplete = self._incomplete(connection, store_id, [row.work_id for row in works])
            with_rows: set[str] = set()
            for part in _chunks(ids):
                held = sa.select(_part.c.work_id).where(_part.c.segment_id.in_(part), _part.c.rows > 0)
                with_rows.update(connection.scalars(held))
            pieces: dict[tuple[str, str], dict[str, list[Covered]]] = defaultdict(lambda: defaultdict(list))
            for row in works:
                unit = unit_from_text(row.unit)
                target = pieces[unit.dataset, row.request_hash]
                window = Interval(unit.window_start, unit.window_end)
                done = row.state in (WorkState.SEALED, WorkState.DELIVERED) and row.work_id not in incomplete
                if row.work_id in with_rows and (not done or window != unit.span):
                    # Rows are there of which no coverage tells: of a chain that goes on, or beside what was owed.
                    mark = WHOLE_WINDOW if done else row.work_id
                    asked_at = row.asked_at or now
                    for subject in unit.subjects:
                        target[subject].append(Covered(*window, Answer.PARTIAL, False, asked_at, None, mark))
                if done:
                    for subject, answers in _answers_of(row).items():
                        target[subject].extend(answers)
            for (dataset, request_hash), of_subject in pieces.items():
                self._lay_in(connection, store_id, dataset, request_hash, of_subject)
            self._mark_delivered(connection, [row.work_id for row in works])
            return self._finished_paths(connection, ids)

    def _incomplete(self, connection: sa.Connection, store_id: str, work_ids: Sequence[str]) -> set[str]:
        """Return which units have a page (of their chain as it is now) that the store has not."""
        result: set[str] = set()
        for part in _chunks(list(work_ids)):
            there = (_delivery.c.segment_id == _part.c.segment_id) & (_delivery.c.store_id == store_id)
            result.update(
                connection.scalars(
                    sa.select(_part.c.work_id)
                    .join(_work, (_work.c.work_id == _part.c.work_id) & (_work.c.chain == _part.c.chain))
                    .outerjoin(_delivery, there)
                    .where(_part.c.work_id.in_(part), sa.or_(_delivery.c.state.is_(None), _delivery.c.state != "done"))
                )
            )
        return result

    def _mark_delivered(self, connection: sa.Connection, work_ids: Sequence[str]) -> None:
        for part in _chunks(list(work_ids)):
            busy = (
                sa.select(_part.c.work_id)
                .join(_delivery, _delivery.c.segment_id == _part.c.segment_id)
                .where(_delivery.c.state == "owed", _part.c.work_id.in_(part))
            )
            connection.execute(
                _work.update()
                .where(
                    _work.c.work_id.in_(part),
                    _work.c.state == WorkState.SEALED,
                    _work.c.work_id.not_in(busy),
                )
                .values(state=WorkState.DELIVERED.value, changed_at=self._clock.now())
            )

    def _finished_paths(self, connection: sa.Connection, ids: Sequence[str]) -> list[str]:
        paths: list[str] = []
        for part in _chunks(list(ids)):
            busy = sa.select(_delivery.c.segment_id).where(
                _delivery.c.state == "owed", _delivery.c.segment_id.in_(part)
            )
            rows = connection.execute(
                sa.select(_segment.c.segment_id, _segment.c.path).where(
                    _segment.c.segment_id.in_(part),
                    _segment.c.segment_id.not_in(busy),
                    _segment.c.removed.is_(False),
                )
            ).all()
            paths.extend(row.path for row in rows if row.path)
        return paths

    def removed(self, paths: Sequence[str]) -> None:
        """Note that segment files are gone."""
        with self._write() as connection:
            for part in _chunks(list(paths)):
                connection.execute(_segment.update().where(_segment.c.path.in_(part)).values(removed=True))

    def spool_files(self, host: str) -> set[str]:
        """Return the paths of the segment files that this host should hold."""
        with self._read() as connection:
            return set(
                connection.scalars(
                    sa.select(_segment.c.path).where(
                        _segment.c.host == host, _segment.c.removed.is_(False), _segment.c.path.is_not(None)
                    )
                )
            )

    def finished_files(self, host: str) -> list[str]:
        """Return the paths of segment files of this host that every store has and nobody noted as removed."""
        busy = sa.select(_delivery.c.segment_id).where(_delivery.c.state == "owed")
        with self._read() as connection:
            return list(
                connection.scalars(
                    sa.select(_segment.c.path).where(
                        _segment.c.host == host,
                        _segment.c.removed.is_(False),
                        _segment.c.path.is_not(None),
                        _segment.c.segment_id.not_in(busy),
                    )
                )
            )

    def lose(self, segment_ids: Sequence[str]) -> None:
        """Note that segment files are gone before every store had them: what they held is owed again."""
        with self._write() as connection:
            works = self._works_of(connection, segment_ids)
            for part in _chunks(list(segment_ids)):
                connection.execute(
                    _delivery.update()
                    .where(_delivery.c.segment_id.in_(part), _delivery.c.state == "owed")
                    .values(state="lost", at=self._clock.now())
                )
                connection.execute(_segment.update().where(_segment.c.segment_id.in_(part)).values(removed=True))
            for part in _chunks([row.work_id for row in works]):
                connection.execute(
                    _work.update()
                    .where(_work.c.work_id.in_(part), _work.c.state.in_([WorkState.SEALED, WorkState.OWED]))
                    .values(state=WorkState.OWED.value, cursor=None, restarted=True, owner=None)
                )

    def due(self, name: str, every: timedelta) -> bool:
        """Return whether a recurring chore is due, and note it as done; it is first due `every` after it was named."""
        now = self._clock.now()
        with self._write() as connection:
            row = connection.execute(sa.select(_hold.c.until).where(_hold.c.name == name)).first()
            if row is not None and row.until > now:
                return False
            connection.execute(_hold.delete().where(_hold.c.name == name))
            connection.execute(_hold.insert().values(name=name, owner="chore", until=now + every))
        return row is not None

    def abandon_deliveries(self, store_id: str, dataset: str) -> list[str]:
        """Forget what a store still has to get (it left the plan); return paths of files nobody waits for."""
        with self._write() as connection:
            ids = list(
                connection.scalars(
                    sa.select(_delivery.c.segment_id)
                    .join(_segment, _segment.c.segment_id == _delivery.c.segment_id)
                    .where(
                        _delivery.c.store_id == store_id,
                        _delivery.c.state == "owed",
                        _segment.c.dataset == dataset,
                    )
                )
            )
            for part in _chunks(ids):
                connection.execute(
                    _delivery.update()
                    .where(_delivery.c.segment_id.in_(part), _delivery.c.store_id == store_id)
                    .values(state="abandoned", at=self._clock.now())
                )
            works = self._works_of(connection, ids)
            self._mark_delivered(connection, [row.work_id for row in works])
            return self._finished_paths(connection, ids)

    def stores_owed(self, dataset: str) -> set[str]:
        """Return the stores that still have to get segments of the dataset."""
        with self._read() as connection:
            return set(
                connection.scalars(
                    sa.select(_delivery.c.store_id)
                    .join(_segment, _segment.c.segment_id == _delivery.c.segment_id)
                    .where(_delivery.c.state == "owed", _segment.c.dataset == dataset)
                    .distinct()
                )
            )

    # ------------------------------------------------------------ looking

    def works(
        self,
        *,
        dataset: str | None = None,
        run_id: str | None = None,
        states: Sequence[WorkState] | None = None,
        plan: str | None = None,
        subject: str | None = None,
        span: Interval | None = None,
        limit: int = 1000,
    ) -> list[Any]:
        """Return rows of `work` (all its columns), the last changed first."""
        w = _work.c
        query = sa.select(_work).order_by(w.changed_at.desc()).limit(limit)
        if dataset is not None:
            query = query.where(w.dataset == dataset)
        if run_id is not None:
            query = query.where(w.run_id == run_id)
        if plan is not None:
            query = query.where(w.plan == plan)
        if states is not None:
            query = query.where(w.state.in_([state.value for state in states]))
        if span is not None:
            query = query.where(w.start < span.end, w.end > span.start)
        with self._read() as connection:
            rows = connection.execute(query).all()
        return [row for row in rows if subject is None or subject in row.subjects.split("\n")]

    def touched(self, dataset: str, run_id: str) -> list[Interval]:
        """Return the spans of the units that a run had in hand, each once."""
        query = sa.select(_work.c.start, _work.c.end).where(_work.c.dataset == dataset, _work.c.run_id == run_id)
        with self._read() as connection:
            return [Interval(row.start, row.end) for row in connection.execute(query.distinct())]

    def work_counts(self, run_id: str) -> dict[str, int]:
        """Return how many units of a run are in each state."""
        with self._read() as connection:
            rows = connection.execute(
                sa.select(_work.c.state, sa.func.count()).where(_work.c.run_id == run_id).group_by(_work.c.state)
            )
            return {row[0]: row[1] for row in rows}

    def segments_of(self, work_id: str) -> list[tuple[Segment, dict[str, tuple[str, datetime | None]]]]:
        """Return the segments that hold a unit's rows, each with store -> (delivery state, when)."""
        with self._read() as connection:
            rows = connection.execute(
                sa.select(_segment)
                .join(_part, _part.c.segment_id == _segment.c.segment_id)
                .where(_part.c.work_id == work_id)
                .order_by(_segment.c.sealed_at)
            ).all()
            result = []
            for row in rows:
                deliveries = connection.execute(
                    sa.select(_delivery.c.store_id, _delivery.c.state, _delivery.c.at).where(
                        _delivery.c.segment_id == row.segment_id
                    )
                )
                result.append((_segment_of(row), {d.store_id: (d.state, d.at) for d in deliveries}))
        return result

    def origins(self, segment_ids: Iterable[str]) -> dict[str, Origin]:
        """Return of which run segments are, when they were sealed, and what was asked for their rows."""
        found: dict[str, Origin] = {}
        s, w = _segment.c, _work.c
        query = (
            sa.select(s.segment_id, s.run_id, s.sealed_at, w.subjects, w.start, w.end)
            .join(_part, _part.c.segment_id == s.segment_id)
            .join(_work, w.work_id == _part.c.work_id)
        )
        with self._read() as connection:
            for some in _chunks(list(segment_ids)):
                for row in connection.execute(query.where(s.segment_id.in_(some))):
                    origin = found.setdefault(row.segment_id, Origin(row.run_id, row.sealed_at, []))
                    span = Interval(row.start, row.end)
                    origin.asked.extend((subject, span) for subject in row.subjects.split("\n"))
        return found

    def segment(self, segment_id: str) -> Segment | None:
        """Return one segment."""
        with self._read() as connection:
            row = connection.execute(sa.select(_segment).where(_segment.c.segment_id == segment_id)).first()
        return _segment_of(row) if row else None

    def retry(self, plan: str, dataset: str, subject: str | None = None) -> int:
        """Forget that units were dropped or failed, so that they are asked again; return how many they were."""
        rows = self.works(
            dataset=dataset,
            plan=plan,
            states=[WorkState.DROPPED, WorkState.FAILED],
            subject=subject,
            limit=1_000_000,
        )
        with self._write() as connection:
            for part in _chunks([row.work_id for row in rows]):
                connection.execute(
                    _work.update()
                    .where(_work.c.work_id.in_(part))
                    .values(state=WorkState.OWED.value, changed_at=self._clock.now())
                )
        return len(rows)

    def cancel_work(self, plan: str) -> int:
        """Mark what a plan's workers gave back or left waiting as cancelled; return how many units."""
        with self._write() as connection:
            return connection.execute(
                _work.update()
                .where(
                    _work.c.plan == plan,
                    _work.c.state.in_([WorkState.OWED.value, WorkState.WAITING.value]),
                )
                .values(state=WorkState.CANCELLED.value, changed_at=self._clock.now())
            ).rowcount

    def resume_at(self, plan: str) -> datetime | None:
        """Return the earliest instant at which waiting units of a plan may go on; None when none waits."""
        with self._read() as connection:
            text = connection.execute(
                sa.select(sa.func.min(_work.c.resume_at)).where(
                    _work.c.plan == plan, _work.c.state == WorkState.WAITING.value
                )
            ).scalar()
        return datetime.fromisoformat(text) if isinstance(text, str) else text

    def forget(self, older_than: timedelta) -> int:
        """Delete finished work, segments and runs older than this (coverage stays); return how many units went."""
        before = self._clock.now() - older_than
        with self._read() as connection:
            oldest = connection.execute(sa.select(_run.c.run_id).where(_run.c.started < before).limit(1)).first()
        if oldest is None:
            return 0
        with self._write() as connection:
            old = sa.select(_work.c.work_id).where(_work.c.state.in_(_FINISHED), _work.c.changed_at < before)
            connection.execute(_part.delete().where(_part.c.work_id.in_(old)))
            gone = connection.execute(
                _work.delete().where(
                    _work.c.state.in_(_FINISHED),
                    _work.c.changed_at < before,
                )
            ).rowcount
            orphans = sa.select(_segment.c.segment_id).where(
                _segment.c.removed.is_(True),
                _segment.c.sealed_at < before,
                _segment.c.segment_id.not_in(sa.select(_part.c.segment_id)),
            )
            connection.execute(
                _delivery.delete().where(_delivery.c.segment_id.in_(orphans), _delivery.c.state != "owed")
            )
            connection.execute(
                _segment.delete().where(
                    _segment.c.removed.is_(True),
                    _segment.c.sealed_at < before,
                    _segment.c.segment_id.not_in(sa.select(_part.c.segment_id)),
                    _segment.c.segment_id.not_in(sa.select(_delivery.c.segment_id)),
                )
            )
            connection.execute(_run.delete().where(_run.c.started < before))
        return gone


def _overlap(a: Unit, b: Unit) -> bool:
    return a.start < b.end and b.start < a.end and not set(a.subjects).isdisjoint(b.subjects)


def _windows_overlap(a: Unit, b: Unit) -> bool:
    apart = a.window_start >= b.window_end or b.window_start >= a.window_end
    return not apart and not set(a.subjects).isdisjoint(b.subjects)


def _meet(units: Iterable[Unit]) -> bool:
    """Return whether two of the units may have had the same rows: one subject, and windows that overlap."""
    windows: dict[str, list[Interval]] = defaultdict(list)
    for unit in units:
        for subject in unit.subjects:
            windows[subject].append(Interval(unit.window_start, unit.window_end))
    return any(before.end > after.start for of in windows.values() for before, after in pairwise(sorted(of)))


def _keeps_apart(schema: Schema, unit: Unit) -> bool:
    """Return whether rows of different subjects and windows of such units never share a key."""
    assert schema.time is not None
    if unit.session is not None and schema[schema.time].type is not ColumnType.DATE:
        return False  # the night before a session is asked for with it
    return all(name in schema.key for name, _ in unit.values)


def _answers_of(row: Any) -> dict[str, list[Covered]]:
    """Return subject -> the coverage that a finished unit amounts to."""
    unit = unit_from_text(row.unit)
    rows_of = json.loads(row.subject_rows or "{}")
    alone = row.rows if len(unit.subjects) == 1 else 0
    return {subject: _answers(unit, row, rows_of.get(subject, alone)) for subject in unit.subjects}


def _answers(unit: Unit, row: Any, count: int) -> list[Covered]:
    answer = Answer.ROWS if count else Answer.EMPTY
    boundary = min(max(row.final_until, unit.start), unit.end)
    pieces = []
    if unit.start < boundary:
        pieces.append(Covered(unit.start, boundary, answer, True, row.asked_at, count))
    if boundary < unit.end:
        pieces.append(
            Covered(boundary, unit.end, answer, False, row.asked_at, count if boundary == unit.start else None)
        )
    if pieces and len(pieces) == 2:
        pieces[0] = replace(pieces[0], rows=None)
    return pieces


def _lost(work: Work) -> LeaseLost:
    return LeaseLost(
        work.work_id,
        f"{work.unit.dataset} {', '.join(work.unit.subjects[:3])}: another worker has taken this unit over "
        f"(epoch {work.epoch} is past); its pages that are not sealed are thrown away here",
    )


def _segment_of(row: Any) -> Segment:
    return Segment(
        row.segment_id,
        row.dataset,
        row.lane,
        row.seq,
        row.host,
        row.path,
        row.rows,
        row.fetched,
        row.duplicates,
        row.quarantined,
        row.bytes,
        row.requests,
        row.key_min,
        row.key_max,
    )


def _chunks(values: list[Any]) -> Iterator[list[Any]]:
    for first in range(0, len(values), _CHUNK):
        yield values[first : first + _CHUNK]


def _sqlite_connect(connection: Any, record: Any) -> None:
    # Transactions are begun by us (BEGIN IMMEDIATE), never by the driver.
    connection.isolation_level = None
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute("PRAGMA busy_timeout=60000")
