"""What a process works with: one configuration opened once (ledger, spool, stores, clients, calendars), and the scope
of one dataset of one plan in one run.

Steps name a workspace by the path of its upstream.yml, so that their arguments stay small; a process keeps each open.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

from marketsync.calendars import Calendar, load_calendar
from marketsync.clock import Clock, SystemClock
from marketsync.configuration import Loaded, load_configuration
from marketsync.coverage import Covered, Interval, Refused, merged, minus, owed, within
from marketsync.definition import Dataset, Definition, Verdict, request_hash
from marketsync.errors import ConfigurationError
from marketsync.gate import Batch, Gated, seal
from marketsync.ledger import Ledger, WorkState, this_owner
from marketsync.planning import Subject, Unit, day_start, end_with, halves, instant, subjects_in_two, subjects_of, units
from marketsync.schema import ColumnType, Schema
from marketsync.timing import Timing
from marketsync.upstream import Plan, Tuning, Upstream
from storage.protocol import Filter, Store
from storage.spool import Spool
from tasks.deliver import Target

if TYPE_CHECKING:
    from providers.client import Client
    from providers.limits import Limiter
    from tasks.fetch import Halt

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options:
    """What a run was asked to do beyond its plan; small and picklable."""

    since: date | datetime | None = None
    until: date | datetime | None = None
    only: tuple[str, ...] = ()
    retry_failed: bool = False
    refetch: bool = False


class Workspace:
    """One upstream.yml, opened. Parts are made when first used and shared by the threads of the process."""

    def __init__(
        self,
        path: Path,
        *,
        clock: Clock | None = None,
        open_store: Callable[[str, str], Store] | None = None,
        make_client: Callable[[Workspace, str], Client] | None = None,
    ):
        self.path = path
        self.clock: Clock = clock or SystemClock()
        self.loaded: Loaded = load_configuration(path)
        self.base = self.loaded.base.resolve()
        self.state = self.base / self.loaded.configuration.state
        self.owner = this_owner()
        self._open_store = open_store
        self._make_client = make_client
        self._lock = threading.RLock()
        self._stores: dict[str, Store] = {}
        self._clients: dict[str, Client] = {}
        self._limiters: dict[str, Limiter] = {}
        self._calendars: dict[str, Calendar] = {}
        self.halts: dict[tuple[str, str], Halt] = {}  # (run id, upstream) -> why nothing more is asked

    @cached_property
    def ledger(self) -> Ledger:
        """The ledger, opened at first use."""
        url = self.loaded.configuration.ledger
        if url is None:
            self._make_state()
            url = f"sqlite:///{self.state / 'ledger.db'}"
        else:
            url = self.secrets.fill_url(url)
        return Ledger(url, self.clock)

    @cached_property
    def secrets(self):
        """Where `$secret.NAME` is looked up."""
        from providers.secrets import Secrets

        return Secrets(self.base, place=self.loaded.secret_place)

    @cached_property
    def spool(self) -> Spool:
        """The spool of this host."""
        self._make_state()
        return Spool(self.state)

    @property
    def host(self) -> str:
        """Whose segments this process delivers: those of its own spool."""
        return self.spool.name

    def _make_state(self) -> None:
        try:
            self.state.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigurationError(f"the state folder {self.state} cannot be made: {error}; see `state`") from error

    def store(self, name: str) -> Store:
        """Return a store of the configuration, opened once."""
        with self._lock:
            if name not in self._stores:
                self._stores[name] = self.opened(name)
            return self._stores[name]

    def opened(self, name: str) -> Store:
        """Open a store of the configuration anew; whoever asks closes it."""
        url = self.store_url(name)
        if self._open_store is not None:
            return self._open_store(url, name)
        from storage.registry import open_store

        return open_store(url, name)

    def store_url(self, name: str) -> str:
        """Return the URL of a store of the configuration, secrets and all."""
        if name not in self.loaded.configuration.stores:
            known = ", ".join(self.loaded.configuration.stores)
            if "://" in name:  # and perhaps a password in it
                raise ConfigurationError(
                    f"a store is named here as in {self.path} ({known}); its URL is taken by copy and follow alone"
                )
            raise ConfigurationError(f"there is no store '{name}' in {self.path}; stores: {known}")
        return self.secrets.fill_url(self.loaded.store_url(name))

    def readable(self, name: str | None = None) -> str:
        """Return the store of that name, or the first one that has tables."""
        tables = self.loaded.with_tables()
        if name is None and not tables:
            raise ConfigurationError(f"no store in {self.path} has tables; add one, such as default: delta://./data")
        return name or tables[0]

    def definition(self, upstream: str) -> Definition:
        """Return the definition of an upstream."""
        return self.loaded.definitions[upstream]

    def upstream(self, name: str) -> Upstream:
        """Return an upstream's settings."""
        return self.loaded.upstream(name)

    def limiter(self, upstream: str) -> Limiter:
        """Return the limiter of an upstream's account."""
        with self._lock:
            if upstream not in self._limiters:
                from providers.limits import Limiter

                self._make_state()
                definition, settings = self.definition(upstream), self.upstream(upstream)
                self._limiters[upstream] = Limiter(
                    self.state,
                    definition.provider,
                    self.loaded.account(upstream),
                    definition.limits,
                    self.clock,
                    tier=settings.tier,
                    dataset_limits={name: spec.limits for name, spec in definition.datasets.items() if spec.limits},
                )
            return self._limiters[upstream]

    def client(self, upstream: str) -> Client:
        """Return the client of an upstream."""
        with self._lock:
            if upstream not in self._clients:
                if self._make_client is not None:
                    self._clients[upstream] = self._make_client(self, upstream)
                else:
                    from providers.client import Client
                    from providers.transport import HttpTransport

                    self._clients[upstream] = Client(
                        upstream,
                        self.definition(upstream),
                        self.upstream(upstream),
                        HttpTransport(self.clock),
                        self.limiter(upstream),
                        self.secrets,
                        self.clock,
                        partial(self.loaded.place, upstream),
                    )
            return self._clients[upstream]

    def calendar(self, name: str) -> Calendar:
        """Return a trading calendar with the user's corrections."""
        with self._lock:
            if name not in self._calendars:
                hours = self.loaded.configuration.market_hours.get(name)
                self._calendars[name] = load_calendar(name, self.state / "calendars", hours)
            return self._calendars[name]

    def plan(self, name: str) -> Plan:
        """Return a plan; ConfigurationError lists the plans when there is none of that name."""
        return self.loaded.plan(name)

    def in_maintenance(self) -> bool:
        """Return whether upstream.yml says `maintenance: true` now (read again when the file has changed)."""
        try:
            changed = self.path.stat().st_mtime_ns
        except OSError:
            return False
        if changed != self._seen:
            self._seen = changed
            try:
                self._maintenance = load_configuration(self.path).configuration.maintenance
            except ConfigurationError:
                # A file that is being edited says nothing.
                return self._maintenance
        return self._maintenance

    _seen = 0
    _maintenance = False

    def close(self) -> None:
        """Close stores and ledger."""
        with self._lock:
            for store in self._stores.values():
                store.close()
            self._stores.clear()
            if "ledger" in self.__dict__:
                self.ledger.close()


_open: dict[Path, Workspace] = {}
_opening = threading.Lock()


def open_workspace(path: str | Path) -> Workspace:
    """Return the workspace of an upstream.yml, opened once a process."""
    key = Path(path).resolve()
    with _opening:
        if key not in _open:
            _open[key] = Workspace(key)
        return _open[key]


def state_folders() -> list[Path]:
    """Return the state folders of the process's open workspaces, as far as there are any."""
    return [workspace.state for workspace in _open.values() if workspace.state.is_dir()]


def close_workspaces() -> None:
    """Close every workspace of the process."""
    with _opening:
        for workspace in _open.values():
            workspace.close()
        _open.clear()


@dataclass
class Scope:
    """One dataset of one plan in one run: what is wanted, of whom, where it goes."""

    workspace: Workspace
    plan_name: str
    dataset: str  # upstream.dataset
    run_id: str
    run_started: datetime
    options: Options = field(default_factory=Options)
    assumed: Mapping[str, Sequence[Covered]] = field(default_factory=dict)  # coverage that is only thought of

    def __post_init__(self) -> None:
        self.upstream_name, _, self.dataset_name = self.dataset.partition(".")
        self.plan: Plan = self.workspace.plan(self.plan_name)
        self.definition: Definition = self.workspace.definition(self.upstream_name)
        self.spec: Dataset = self.definition.datasets[self.dataset_name]
        self.schema: Schema = self.spec.stored()
        self.request_hash = request_hash(self.definition, self.dataset_name)
        self.clock = self.workspace.clock
        self.ledger = self.workspace.ledger
        self.spool = self.workspace.spool
        self.host = self.workspace.host
        self.store_ids = list(dict.fromkeys(self.plan.stores))
        self.tuning: Tuning = self.workspace.upstream(self.upstream_name).tuning
        self.threads = self.plan.tuning.get("threads", self.tuning.threads)

    @cached_property
    def targets(self) -> list[Target]:
        """The plan's stores."""
        return [Target(name, self.workspace.store(name)) for name in self.store_ids]

    @cached_property
    def calendar(self) -> Calendar | None:
        """The dataset's trading calendar."""
        name = self.spec.calendar_name
        return None if name is None else self.workspace.calendar(name)

    @cached_property
    def timing(self) -> Timing:
        """What the dataset says about publication and settling."""
        return Timing.of(self.spec, self.calendar)

    @cached_property
    def client(self) -> Client:
        """The client of the upstream."""
        return self.workspace.client(self.upstream_name)

    @cached_property
    def grain(self) -> timedelta:
        """The smallest piece of time a request can be split to."""
        column = self.schema.time
        dated = column is None or self.schema[column].type is ColumnType.DATE or self.spec.frequency == "session"
        return timedelta(days=1) if dated else timedelta(minutes=1)

    @cached_property
    def subjects(self) -> list[Subject]:
        """Everything the plan asks about, in the order of its universe."""
        values = {name: self._values(name) for name in self.spec.over.subjects}
        return [s for s in subjects_of(self.spec, values) if not self.options.only or self._chosen(s)]

    def _chosen(self, subject: Subject) -> bool:
        return subject.name in self.options.only or bool(set(subject.values) & set(self.options.only))

    def _values(self, name: str) -> Sequence[str]:
        spec = self.spec.over.subjects[name]
        if spec.list is not None:
            return spec.list
        if spec.rows is not None:
            return self._column_of(spec.rows, spec.column or name, {})
        universe = spec.universe
        if universe == "$plan":
            if self.plan.universe is None:
                raise ConfigurationError(
                    f"plan {self.plan_name}: {self.dataset} asks over the plan's universe, and the plan has none; "
                    "add `universe:` to it"
                )
            if not isinstance(self.plan.universe, str):
                return self.plan.universe
            universe = self.plan.universe
        named = self.workspace.loaded.configuration.universes.get(str(universe))
        if named is not None and named.rows is not None:
            return self._column_of(named.rows, named.column or "symbol", named.where)
        return self.workspace.loaded.universe(str(universe))

    def _column_of(self, dataset: str, column: str, where: Mapping[str, str]) -> list[str]:
        """Return the distinct values of a column of another dataset's rows, sorted."""
        import polars as pl

        store_id = self.workspace.loaded.with_tables(self.store_ids)[0]
        store = self.workspace.store(store_id)
        if store.schema(dataset) is None:
            raise ConfigurationError(
                f"{self.dataset} asks over the rows of {dataset}, and store {store_id} does not have it yet; "
                f"sync {dataset} first (in one plan, it goes first by itself)"
            )
        rows = store.scan(dataset, Filter(columns=tuple(dict.fromkeys([column, *where]))))
        for name, value in where.items():
            rows = rows.filter(pl.col(name).cast(pl.String) == value)
        found = rows.select(pl.col(column).cast(pl.String).drop_nulls().unique()).collect()
        return sorted(found.to_series().to_list())

    @property
    def told_apart(self) -> bool:
        """Whether the rows of one subject can be told from another's."""
        return told_apart(self.spec)

    @property
    def margin(self) -> timedelta:
        """How far the times of rows can be outside of the session that they were asked with."""
        return margin(self.spec)

    @cached_property
    def wanted(self) -> list[Interval]:
        """The interval the plan wants of every subject, as far as it is published."""
        now = self.run_started
        if not (self.spec.over.window or self.spec.over.session) and self.schema.time is None:
            # A list as it stands today: asked once a day.
            today = datetime.combine(now.date(), time(), UTC)
            return [Interval(today, today + timedelta(days=1))]
        since = self.options.since or self.plan.since
        if since is None:
            raise ConfigurationError(
                f"plan {self.plan_name}: {self.dataset} is asked over time, and the plan has no `since`; add it"
            )
        end = self.timing.wanted_until(now)
        until = self.options.until or self.plan.until
        if until is not None:
            end = min(end, end_with(until))
        return merged([Interval(instant(since), end)])

    @cached_property
    def restated_since(self) -> datetime | None:
        """Rows from here on are asked again every run."""
        return self.timing.restated_since(self.run_started)

    @cached_property
    def failed_spans(self) -> dict[str, list[Interval]]:
        """With `retry_failed`: what failed or was dropped, by subject; also where it was asked again and had to wait or
        was not come to."""
        result: dict[str, list[Interval]] = {}
        states = [WorkState.FAILED, WorkState.DROPPED, WorkState.OWED, WorkState.WAITING]
        for row in self.ledger.works(dataset=self.dataset, plan=self.plan_name, states=states, limit=1_000_000):
            for subject in row.subjects.split("\n"):
                result.setdefault(subject, []).append(Interval(row.start, row.end))
        return result

    def owed_of(self, subject: str, covered: Iterable[Covered]) -> list[Interval]:
        """Return what a subject owes in this run, given its coverage in all of the plan's stores together."""
        result = owed(
            self.wanted,
            covered,
            run_started=self.run_started,
            restated_since=self.restated_since,
            refetch=self.options.refetch,
        )
        if self.options.retry_failed:
            return within(result, self.failed_spans.get(subject, ()))
        return result

    def still_owed(self, unit: Unit, covered: Mapping[str, Sequence[Covered]]) -> bool:
        """Return whether any subject of the unit still owes any of its span."""
        span = [unit.span]
        return any(within(self.owed_of(subject, covered.get(subject, ())), span) for subject in unit.subjects)

    def coverage(self) -> dict[str, list[Covered]]:
        """Return the coverage of each subject in all of the plan's stores, and in the spool, together."""
        together: dict[str, list[Covered]] = {}
        names = None if len(self.subjects) > 2000 else [subject.name for subject in self.subjects]
        known = self.ledger.coverage(self.store_ids, self.dataset, self.request_hash, names)
        for of_subject in (*known.values(), self.ledger.spooled(self.dataset, self.request_hash), self.assumed):
            for subject, pieces in of_subject.items():
                together.setdefault(subject, []).extend(pieces)
        return together

    def refused(self) -> dict[str, list[Refused]]:
        """Return, by subject, what the provider would not or could not answer: what it dropped as a wrong request is
        not asked again before somebody says so (`--retry-failed`), what failed is asked by the next run."""
        result: dict[str, list[Refused]] = {}
        states = [WorkState.DROPPED, WorkState.FAILED]
        for row in self.ledger.works(dataset=self.dataset, states=states, limit=1_000_000):
            if row.request_hash == self.request_hash:
                dropped = row.state == WorkState.DROPPED
                one = Refused(Interval(row.start, row.end), dropped, row.changed_at, row.error or "")
                for subject in row.subjects.split("\n"):
                    result.setdefault(subject, []).append(one)
        return result

    def plan_units(self) -> Iterator[Unit]:
        """Yield the units that ask for everything owed, by the coverage as it is now: chains that were left in the
        middle go on first, as long as all of what they ask for is still owed."""
        known = self.coverage()
        refused = self.refused()
        owed_by = {
            subject.name: minus(
                self.owed_of(subject.name, known.get(subject.name, ())),
                [one.span for one in refused.get(subject.name, ()) if one.dropped],
            )
            for subject in self.subjects
        }
        for unit in () if self.options.refetch else self.ledger.unfinished(self.dataset, self.request_hash):
            if all(within(owed_by.get(subject, ()), [unit.span]) == [unit.span] for subject in unit.subjects):
                for subject in unit.subjects:
                    owed_by[subject] = minus(owed_by[subject], [unit.span])
                yield unit
        yield from units(
            self.dataset, self.spec, self.subjects, lambda subject: owed_by[subject], sessions=self.sessions
        )

    def sessions(self, start: datetime, end: datetime) -> list[date]:
        """Return the sessions whose midnight lies in [start, end)."""
        if self.calendar is None:
            raise ConfigurationError(f"{self.dataset}: sessions need a calendar")
        first = start.date() if start == day_start(start.date()) else start.date() + timedelta(days=1)
        last = end.date() if end == day_start(end.date()) else end.date() + timedelta(days=1)
        return self.calendar.sessions(first, last)

    def halves(self, unit: Unit) -> tuple[Unit, Unit] | None:
        """Return the two units that together ask for what one answer cannot hold; None when it cannot be cut."""
        return halves(self.spec, unit, smallest=self.grain)

    def apart(self, unit: Unit) -> tuple[Unit, Unit] | None:
        """Return the unit as two with half of its subjects each, to find the one that the provider refuses; None when
        there is but one."""
        return subjects_in_two(unit)

    @cached_property
    def has_quota(self) -> bool:
        """Whether the provider gives so many requests a day (or hour, or month): what comes first then matters."""
        from providers.limit_windows import Kind

        states = self.workspace.limiter(self.upstream_name).state(self.dataset_name)
        return any(
            state.kind is Kind.QUOTA
            or (state.kind is Kind.WINDOW and state.per is not None and state.per.approximate_seconds >= 3600)
            for state in states
        )

    def recent(self, unit: Unit) -> bool:
        """Whether a unit asks for the newest of what is wanted."""
        return bool(self.wanted) and unit.end >= self.wanted[-1].end

    def priority(self, unit: Unit) -> int:
        """Return how urgent a unit is: today's sessions before any backfill, then by the plan's priority."""
        return self.plan.priority + (1_000_000 if self.recent(unit) else 0)

    def gate(self, batches: Sequence[Batch]) -> Gated:
        """Pass the pages of a segment through the gate before the spool."""
        return seal(self.spec, batches)

    def keep_answer(self, work_id: str, raw: str) -> str:
        """Keep a (redacted) answer that nobody understood beside the run; return its path."""
        folder = self.workspace.state / "answers" / self.run_id
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{work_id}.txt"
        path.write_text(raw, encoding="utf-8")
        return str(path)

    @property
    def halt(self) -> Halt | None:
        """Why nothing more is to be asked of this upstream in this run, as far as this process knows."""
        return self.workspace.halts.get((self.run_id, self.upstream_name))

    def halted(self, halt: Halt) -> bool:
        """Tell the run's other datasets of this upstream that nothing more is to be asked of it; return whether they
        had not been told yet."""
        if halt.verdict not in (Verdict.STOP_PROVIDER, Verdict.QUOTA, Verdict.RETRY):
            return True
        return self.workspace.halts.setdefault((self.run_id, self.upstream_name), halt) is halt

    def config_hash(self) -> str:
        """Return 16 hex digits over the plan as it stands."""
        return hashlib.sha256(self.plan.model_dump_json().encode()).hexdigest()[:16]


def told_apart(spec: Dataset) -> bool:
    """Return whether the rows of one subject that is asked about can be told from another's."""
    return list(spec.over.subjects) == [spec.stored().subject]


def margin(spec: Dataset) -> timedelta:
    """Return how far the times of rows can be outside of the session that they were asked with."""
    schema = spec.stored()
    dated = schema.time is None or schema[schema.time].type is ColumnType.DATE
    return timedelta() if dated or not spec.over.session else timedelta(days=4)


def expected_rows(scope: Scope, unit: Unit) -> int | None:
    """Return about how many rows a unit's answer holds; None where nothing is known."""
    if scope.spec.over.session:
        return None
    frequency = scope.spec.frequency
    if scope.calendar is None or frequency == "irregular":
        return None
    sessions = scope.sessions(unit.start, unit.end)
    bars = len(sessions) if frequency == "session" else scope.calendar.minutes(sessions)
    return bars * len(unit.subjects)
