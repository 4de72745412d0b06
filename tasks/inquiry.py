"""Questions about a plan that send no request: what would be asked and how long it takes, how things stand, why a row
is or is not here, what an edit would change.
"""

from __future__ import annotations

import shlex
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from marketsync.coverage import Answer, Covered, Interval, minus, within
from marketsync.document import closest, dotted, read_document
from marketsync.errors import ConfigurationError, ForeignTable, Problem, SchemaError, StoreError
from marketsync.ledger import Desired, RunRow, WorkState, owner_is_dead
from marketsync.planning import EVERYTHING, Unit, day_start, instant
from storage.lazyframes import reading
from storage.protocol import Filter
from tasks import quarantine
from tasks.fetch import ask_of
from tasks.workspace import Options, Scope, Workspace, expected_rows

if TYPE_CHECKING:
    from providers.limit_forecast import Forecast

SHOWN_WORK = 20  # requests that `explain` lists
MOST_ROWS = 10  # rows that it shows
JUST_BEGUN = timedelta(seconds=30)  # a run prepares before it leases work
GONE = "left by a process that is gone"  # leases that the next run takes over
BROKEN_OFF = "not ended"  # the state of a run that was killed (or that judges still, when all is fetched)


@dataclass(frozen=True)
class DatasetEstimate:
    """What one dataset would ask for. `at_least`: how many pages an answer has is not known before it is there (ticks,
    a page size that the definition does not tell), so `requests`, `seconds` and `done_at` are what is certain.
    """

    dataset: str
    units: int
    requests: int
    rows: int | None
    subjects: int
    since: datetime | None
    until: datetime | None
    done_at: datetime | None
    seconds: float | None
    binding: str | None  # the limit that decides how long it takes
    periods: int = 0  # quota periods (days) in which requests are sent
    impossible: str = ""
    at_least: bool = False
    not_known_yet: str = ""  # why its subjects are not known before another dataset's rows are here


@dataclass(frozen=True)
class Estimate:
    """A plan's estimate: its datasets, and the first requests when they were asked for; `at_least` as of a dataset."""

    plan: str
    datasets: tuple[DatasetEstimate, ...]
    requests: int
    seconds: float | None
    done_at: datetime | None
    first_requests: tuple[str, ...] = ()
    at_least: bool = False


def scopes(workspace: Workspace, plan: str, options: Options | None = None) -> list[Scope]:
    """Open a plan's datasets for looking; nothing is begun."""
    now = workspace.clock.now()
    return [Scope(workspace, plan, dataset, "", now, options or Options()) for dataset in workspace.plan(plan).datasets]


def _unknown_subjects(scope: Scope) -> str:
    """Return why a dataset's subjects are not known yet (its parent's rows are not here); empty when they are."""
    try:
        scope.subjects  # noqa: B018 - resolved and kept
    except (ConfigurationError, StoreError) as error:
        if not _dynamic(scope):
            raise
        return str(error)
    return ""


def _dynamic(scope: Scope) -> bool:
    """Return whether what a dataset is asked for are the rows of another one."""
    named = scope.workspace.loaded.configuration.universes
    for spec in scope.spec.over.subjects.values():
        universe = scope.plan.universe if spec.universe == "$plan" else spec.universe
        if spec.rows is not None or (isinstance(universe, str) and universe in named and named[universe].rows):
            return True
    return False


def pages_of(scope: Scope, unit: Unit) -> tuple[int, bool]:
    """Return how many requests a unit takes, and whether that is known: False says that they are at least so many."""
    page = scope.spec.page
    size = page.size or page.cap
    if page.style == "none" and not page.cap:
        return 1, True
    rows = expected_rows(scope, unit)
    if rows is None or size is None:
        return 1, False
    return max(1, -(-rows // size)), True


def refuse_nothing(workspace: Workspace, plans: Sequence[str], options: Options) -> None:
    """Raise ConfigurationError when what a run is asked to do beside its plans can only come to nothing: `since` after
    `until` or in the future, or a symbol of `only` that none of the plans asks for."""
    now = workspace.clock.now()
    spans = []
    for name in plans:
        plan = workspace.plan(name)
        since, until = options.since or plan.since, options.until or plan.until
        spans.append((name, since, until, bool(since and until and instant(since) > instant(until))))
    if (options.since or options.until) and spans and all(reversed_ for *_, reversed_ in spans):
        name, since, until, _ = spans[0]
        whose = "" if options.since and options.until else f" of plan {name}"
        ours = " (--since)" if options.since and not options.until else ""
        theirs = " (--until)" if options.until and not options.since else ""
        raise ConfigurationError(
            f"since {since}{ours or whose} is after until {until}{theirs or whose}, so nothing would be asked; "
            + ("swap them" if not whose else "choose a day within the plan, or change the plan")
        )
    if options.since and instant(options.since) > now + timedelta(days=1):
        raise ConfigurationError(
            f"since {options.since} is in the future (now {now:%Y-%m-%d %H:%M} UTC), so nothing would be asked; "
            "choose an earlier day"
        )
    if options.only:
        _refuse_unknown(workspace, plans, options.only)


def _refuse_unknown(workspace: Workspace, plans: Sequence[str], only: Sequence[str]) -> None:
    missing, known, together = list(dict.fromkeys(only)), [], []
    for name in plans:
        for scope in scopes(workspace, name):
            if _unknown_subjects(scope):
                return  # it may be among them
            if not scope.spec.over.subjects:
                together.append(scope.dataset)
            known += [subject.name for subject in scope.subjects if scope.spec.over.subjects]
            values = {value for subject in scope.subjects for value in (subject.name, *subject.values)}
            missing = [one for one in missing if one not in values]
    if not missing:
        return
    near = closest(missing[0], known) if len(known) < 50_000 else None
    remedy = f"did you mean {near}? " if near else ""
    if together:
        remedy += f"{', '.join(dict.fromkeys(together))} is asked for all symbols at once, which --only cannot part; "
    remedy += "see the plan's universe with `marketsync plan list`, or add the symbol to it"
    which = f"plan {plans[0]}" if len(plans) == 1 else f"the plans {', '.join(plans)}"
    raise ConfigurationError(
        f"{which} does not ask for {', '.join(missing)}, so --only would ask for nothing; {remedy}"
    )


def conflicts(workspace: Workspace, plan: str) -> list[tuple[str, str, str]]:
    """Return (dataset, store, what is wrong and what to do) for each table that cannot follow its definition as it is
    now. A store that cannot be read now, or has no such table, is passed over."""
    from storage import evolution

    found = []
    for name in workspace.plan(plan).datasets:
        upstream, _, short = name.partition(".")
        schema = workspace.definition(upstream).datasets[short].stored()
        for store_id in dict.fromkeys(workspace.plan(plan).stores):
            try:
                evolution.check(name, schema)
                stored = workspace.store(store_id).schema(name)
                if stored is not None:
                    evolution.added(name, stored, schema)
            except SchemaError as error:
                told = "key" if ": key was" in str(error) else "schema"
                place = workspace.loaded.place(upstream, ("datasets", short, told))
                found.append((name, store_id, f"{error} (the definition: {place})"))
            except ForeignTable as error:
                found.append((name, store_id, str(error)))
            except StoreError:
                continue
    return found


def refuse_conflicts(workspace: Workspace, plans: Sequence[str]) -> None:
    """Raise ConfigurationError, before anything is asked, when a table cannot follow its definition as it is now."""
    found = [
        f"plan {plan}: store {store_id}: {message}"
        for plan in plans
        for _, store_id, message in conflicts(workspace, plan)
    ]
    if found:
        raise ConfigurationError([Problem("", None, "", one) for one in found])


def store_problems(path: Path) -> list[Problem]:
    """Return what `check` says of the URLs of an upstream.yml: those that no store can be opened by.

    Connects to nothing and makes nothing; passes over a URL whose secret has no value yet.
    """
    from storage.location import folder
    from storage.registry import open_store

    found = []
    with closing(Workspace(path)) as workspace:
        document = read_document(path)
        for name in workspace.loaded.configuration.stores:
            try:
                url = workspace.store_url(name)
            except ConfigurationError:
                continue
            try:
                if url.startswith("chdb:"):  # to open it is to have the engine
                    folder(url)
                else:
                    open_store(url, name).close()
            except ConfigurationError as error:
                place = ("stores", name)
                what, _, remedy = str(error).partition("; ")
                found.append(Problem(str(path), document.line(place), dotted(place), what, remedy))
            except StoreError:
                continue  # as it stands now; a sync will say it
    return found


def table_problems(path: Path) -> list[Problem]:
    """Return what `check` says of an upstream.yml whose tables exist: those that cannot follow their definitions.

    Opens only stores whose folder is there, makes nothing, and passes over what cannot be opened now.
    """
    from storage.location import folder

    found = []
    with closing(Workspace(path)) as workspace:
        if not workspace.state.is_dir():
            return []
        document = read_document(path)
        for plan, spec in workspace.loaded.configuration.plans.items():
            try:
                if not all(folder(workspace.loaded.store_url(store)).is_dir() for store in spec.stores):
                    continue
                wrong = conflicts(workspace, plan)
            except (ConfigurationError, OSError):
                continue
            for dataset, store_id, message in wrong:
                given = document.value["plans"][plan].get("datasets")
                place = (
                    "plans",
                    plan,
                    "datasets",
                    *((spec.datasets.index(dataset),) if isinstance(given, list) else ()),
                )
                what, _, remedy = message.partition("; ")
                found.append(
                    Problem(str(path), document.line(place), dotted(place), f"store {store_id}: {what}", remedy)
                )
    return found


def estimate(
    workspace: Workspace,
    plan: str,
    options: Options | None = None,
    *,
    seconds_per_request: float = 0.3,
    requests: int = 0,
) -> Estimate:
    """Say how many requests a sync would send now, how long it takes under the limits and quotas as they stand, on
    which day it is done, and which limit binds. `requests` lists so many of the first."""
    from providers.limit_forecast import plan_ahead

    found: list[DatasetEstimate] = []
    shown: list[str] = []
    before: Counter[str] = Counter()  # requests of datasets of the same upstream that go first
    for scope in scopes(workspace, plan, options):
        if problem := _unknown_subjects(scope):
            found.append(
                DatasetEstimate(
                    scope.dataset, 0, 0, None, 0, None, None, None, None, None, at_least=True, not_known_yet=problem
                )
            )
            continue
        units = asked = rows = 0
        unknown = at_least = False
        for unit in scope.plan_units():
            units += 1
            pages, certain = pages_of(scope, unit)
            asked += pages
            at_least = at_least or not certain
            expected = expected_rows(scope, unit)
            unknown = unknown or expected is None
            rows += expected or 0
            if len(shown) < requests:
                shown.append(scope.client.describe(ask_of(scope, unit)))
        weight = scope.spec.request.weight
        upstream = scope.upstream_name
        forecast: Forecast | None = plan_ahead(
            workspace.limiter(upstream).state(scope.dataset_name),
            before[upstream] + asked,
            now=scope.run_started,
            weight=weight,
            seconds_per_request=seconds_per_request,
            threads=scope.threads,
        )
        before[upstream] += asked
        wanted = scope.wanted
        found.append(
            DatasetEstimate(
                dataset=scope.dataset,
                units=units,
                requests=asked,
                rows=None if unknown else rows,
                subjects=len(scope.subjects),
                since=wanted[0].start if wanted else None,
                until=wanted[-1].end if wanted else None,
                done_at=forecast.done_at if forecast and asked else None,
                seconds=forecast.seconds if forecast and asked else 0.0 if not asked else None,
                binding=forecast.binding.name if forecast and forecast.binding and asked else None,
                periods=forecast.periods if forecast and asked else 0,
                impossible="" if forecast else "one request weighs more than a limit allows",
                at_least=at_least,
            )
        )
    times = [one.done_at for one in found if one.done_at is not None]
    lengths = [one.seconds for one in found if one.seconds is not None]
    return Estimate(
        plan,
        tuple(found),
        sum(one.requests for one in found),
        max(lengths, default=None),
        max(times, default=None),
        tuple(shown),
        any(one.at_least for one in found),
    )


# ---------------------------------------------------------------- status


@dataclass(frozen=True)
class DatasetStatus:
    """How one dataset of a plan stands."""

    dataset: str
    store: str
    subjects: int
    covered_until: datetime | None  # every subject (but for those `uncovered`) is covered to here
    watermark: str | None  # the newest row
    rows: int | None
    owed_units: int
    owed_requests: int
    spooled_rows: int
    states: dict[str, int] = field(default_factory=dict)
    problem: str = ""
    owed_at_least: bool = False  # how many pages the answers have is not known
    uncovered: int = 0  # subjects that were never answered for; `covered_until` is about the others
    set_aside: int = 0  # rows in quarantine that were not asked for again since


@dataclass(frozen=True)
class Status:
    """How a plan stands."""

    plan: str
    desired: str
    last_run: str | None
    last_state: str | None
    last_ended: datetime | None
    resume_at: datetime | None
    running: bool
    datasets: tuple[DatasetStatus, ...]
    owed: tuple[dict[str, Any], ...] = ()


def status(workspace: Workspace, plan: str, *, owed: bool = False, most: int = 100) -> Status:
    """Return how a plan stands, without asking the provider; with `owed`, the first units still to be asked."""
    ledger = workspace.ledger
    rows: list[DatasetStatus] = []
    listed: list[dict[str, Any]] = []
    for scope in scopes(workspace, plan):
        if problem := _unknown_subjects(scope):
            rows.append(DatasetStatus(scope.dataset, scope.store_ids[0], 0, None, None, None, 0, 0, 0, {}, problem))
            continue
        units = list(scope.plan_units())
        pages = [pages_of(scope, unit) for unit in units]
        states = Counter(
            GONE if row.state == WorkState.LEASED and owner_is_dead(row.owner) else str(row.state)
            for row in ledger.works(dataset=scope.dataset, plan=plan, limit=100_000)
            if row.state not in (WorkState.DELIVERED, WorkState.SPLIT, WorkState.NOT_YET)
        )
        for unit in units[: most - len(listed)] if owed else ():
            listed.append(
                {
                    "dataset": unit.dataset,
                    "subjects": list(unit.subjects[:5]),
                    "more_subjects": max(0, len(unit.subjects) - 5),
                    "start": unit.start,
                    "end": unit.end,
                }
            )
        known = ledger.coverage(scope.store_ids, scope.dataset, scope.request_hash)
        for store_id in scope.store_ids:
            spooled = sum(s.rows for s in ledger.owed_deliveries(store_id, scope.dataset, workspace.host))
            problem, watermark, count = "", None, None
            covered_until, uncovered = _covered_until(scope, known[store_id])
            try:
                store = workspace.store(store_id)
                if store.capabilities.table and store.marker(scope.dataset) is not None:
                    count = store.count(scope.dataset)
                    marks = store.watermarks(scope.dataset) if scope.schema.time is not None else {}
                    watermark = max((mark.isoformat() for mark in marks.values()), default=None)
            except Exception as error:  # noqa: BLE001 - a store that is down is part of the answer
                problem = str(error)
            rows.append(
                DatasetStatus(
                    dataset=scope.dataset,
                    store=store_id,
                    subjects=len(scope.subjects),
                    covered_until=covered_until,
                    uncovered=uncovered,
                    watermark=watermark,
                    rows=count,
                    owed_units=len(units),
                    owed_requests=sum(count for count, _ in pages),
                    spooled_rows=spooled,
                    states=dict(states),
                    problem=problem,
                    owed_at_least=not all(certain for _, certain in pages),
                    set_aside=quarantine.rows_standing(scope, store_id),
                )
            )
    runs = ledger.runs(plan, limit=1)
    last = runs[0] if runs else None
    running = bool(last and last.ended is None and _alive(workspace, last))
    return Status(
        plan=plan,
        desired=str(ledger.control(plan).desired),
        last_run=last.run_id if last else None,
        last_state=(BROKEN_OFF if last.ended is None and not running else last.state) if last else None,
        last_ended=last.ended if last else None,
        resume_at=ledger.resume_at(plan),
        running=running,
        datasets=tuple(rows),
        owed=tuple(listed),
    )


def _alive(workspace: Workspace, run: RunRow) -> bool:
    """Return whether a run that has not ended can be under way: it began just now, or a living worker has its work."""
    now = workspace.clock.now()
    leased = workspace.ledger.works(run_id=run.run_id, states=[WorkState.LEASED], limit=1_000)
    if now - run.started < JUST_BEGUN:
        return not leased or not all(owner_is_dead(row.owner) for row in leased)
    return any(row.lease_until and row.lease_until > now and not owner_is_dead(row.owner) for row in leased)


def _covered_until(scope: Scope, known: dict[str, list[Covered]]) -> tuple[datetime | None, int]:
    """Return up to where subjects have been asked and answered, without a gap from the plan's beginning, and how many
    have not been at all."""
    if not scope.wanted or not scope.subjects:
        return None, 0
    start = scope.wanted[0].start
    least: datetime | None = None
    uncovered = 0
    for subject in scope.subjects:
        pieces = [
            Interval(piece.start, piece.end)
            for piece in known.get(subject.name, ())
            if piece.answer in (Answer.ROWS, Answer.EMPTY)
        ]
        gaps = minus([scope.wanted[0]], pieces)
        until = gaps[0].start if gaps else scope.wanted[0].end
        if until <= start:
            uncovered += 1
        else:
            least = until if least is None else min(least, until)
    return least, uncovered


# ---------------------------------------------------------------- explain


@dataclass(frozen=True)
class Explanation:
    """Why rows of a subject and day are, or are not, in the stores: sentences, the last one is the conclusion."""

    dataset: str
    subject: str
    day: date | None  # None where rows have no time
    lines: tuple[str, ...]
    rows: dict[str, list[dict[str, Any]]]


def explain(workspace: Workspace, dataset: str, subject: str, day: date | None = None) -> Explanation:
    """Follow a row from the calendar over request, answer, segment and delivery to the stores.

    The rows of a dataset without a time column are a list as it stands: `day` is not looked at and may be left out.
    Raises ConfigurationError for a dataset that there is not or that no plan syncs, and for a missing day.
    """
    spec = workspace.loaded.dataset(dataset)
    if not subject.strip():
        raise ConfigurationError(f"name a symbol of {dataset}, or {EVERYTHING} for all of its rows")
    plans = [name for name, plan in workspace.loaded.configuration.plans.items() if dataset in plan.datasets]
    if not plans:
        raise ConfigurationError(f"no plan of {workspace.path} syncs {dataset}; see `marketsync plan list`")
    if spec.time_column is None:
        day = None
    elif day is None:
        raise ConfigurationError(f"the rows of {dataset} have a time: say which day, such as 2024-01-31")
    lines: list[str] = []
    found: dict[str, list[dict[str, Any]]] = {}
    if day is None:
        lines.append(f"{dataset} is a list without dates: this is how it stands, whatever the day.")
    if spec.subject_column is None:
        lines.append(
            f"{dataset} has no column for a symbol (`subject:` in its definition names one): what is told here is true "
            "of all its rows."
        )
    looked_at = [Scope(workspace, plan, dataset, "", workspace.clock.now()) for plan in plans]
    askers = [scope for scope in looked_at if not _unknown_subjects(scope) and _asked_as(scope, subject) is not None]
    for scope in sorted(looked_at, key=lambda scope: scope in askers):  # the conclusion is of a plan that asks for it
        _explain_in(scope, subject, day, lines, found, askers[0].plan_name if askers else None)
    return Explanation(dataset, subject, day, tuple(lines), found)


def _asked_as(scope: Scope, subject: str) -> str | None:
    """Return as which of a plan's subjects a symbol is asked for; None when it is not."""
    names = {one.name for one in scope.subjects}
    if subject in names:
        return subject
    joined = next((name for name in names if subject in name.split("|")), None)
    return EVERYTHING if joined is None and (EVERYTHING in names or subject == EVERYTHING) else joined


def _explain_in(
    scope: Scope,
    subject: str,
    day: date | None,
    lines: list[str],
    found: dict[str, list[dict[str, Any]]],
    asker: str | None,
) -> None:
    """Add what one plan's part of the story is; `asker` is a plan that asks for the symbol."""
    plan, ledger = scope.plan_name, scope.ledger
    span = None if day is None else Interval(day_start(day), day_start(day + timedelta(days=1)))
    reason = ""  # why a row is not to be expected, whatever was asked
    if day is not None:
        lines.extend(_calendar_lines(scope, day))
        if scope.calendar is not None and not scope.calendar.is_session(day):
            reason = f"as expected: {day} is no session of {scope.calendar.name}"
    asked_as: str | None = None
    if problem := _unknown_subjects(scope):
        lines.append(f"plan {plan}: what it asks for is not known yet: {problem}.")
        reason = f"{scope.dataset} has not been asked yet: {problem}"
    else:
        asked_as = _asked_as(scope, subject)
        if asked_as is None and asker is not None:
            lines.append(f"plan {plan}: {subject} is not in its universe; plan {asker} asks for it.")
            return
        if asked_as is None:
            lines.append(f"plan {plan}: {subject} is not in its universe, so it is never asked for.")
            reason = f"{subject} is not in the universe of plan {plan}; add it there, and run the plan"
    if span is not None and not within(scope.wanted, [span]):
        reach = f"{scope.wanted[0].start:%F} to {scope.wanted[-1].end:%F}" if scope.wanted else "nothing yet"
        lines.append(f"plan {plan}: the day is not wanted yet or not at all (wanted: {reach}, end excluded).")
        reason = reason or f"plan {plan} does not want {day} (wanted: {reach}, end excluded)"
    works = [] if asked_as is None else ledger.works(dataset=scope.dataset, subject=asked_as, span=span, limit=100_000)
    for row in works[:SHOWN_WORK]:
        lines.extend(_work_lines(scope, row))
    for store_id in scope.store_ids:
        pieces: list[Covered] = []
        if asked_as is not None:
            known = ledger.coverage([store_id], scope.dataset, scope.request_hash, [asked_as])[store_id]
            pieces = [
                piece
                for piece in known.get(asked_as, ())
                if span is None or (piece.start < span.end and piece.end > span.start)
            ]
        # a list without dates is asked once a day; how it stands is what was said last
        for piece in pieces if span is not None else sorted(pieces, key=lambda one: one.asked_at)[-1:]:
            lines.append(
                f"coverage in {store_id}: {piece.answer}, {'final' if piece.final else 'not final'}, "
                f"{piece.start:%F} to {piece.end:%F}, asked {piece.asked_at:%F %T} UTC"
            )
        try:
            if not scope.workspace.store(store_id).capabilities.table:
                lines.append(f"{store_id} is a log of batches, in which no row can be looked up.")
                continue
            rows = _rows(scope, store_id, subject, day)
        except StoreError as error:
            lines.append(f"{store_id} cannot be read now: {error}")
            continue
        found[store_id] = rows
        if rows:
            of = f" of {subject}" if scope.spec.subject_column is not None else ""
            on = "" if day is None else f" on {day}"
            lines.append(f"{store_id} has {_many(rows)}{of}{on}; the first came with segment {rows[0]['_segment']}.")
        else:
            about = subject if day is None else f"{subject} for {day}"
            why = reason or _why_none(scope, store_id, about, asked_as, pieces, works)
            lines.append(f"{store_id} has none: {why}.")


def _many(rows: Sequence[Any]) -> str:
    if len(rows) == MOST_ROWS:
        return f"{MOST_ROWS} rows or more"
    return "1 row" if len(rows) == 1 else f"{len(rows)} rows"


def _work_lines(scope: Scope, row: Any) -> Iterable[str]:
    asked = f", asked {row.asked_at:%F %T} UTC" if row.asked_at else ""
    requests = "1 request" if row.requests == 1 else f"{row.requests} requests"
    yield (
        f"request: {row.label or 'not sent yet'} — {row.start:%F} to {row.end:%F}, {requests}, "
        f"{row.rows} rows, state {row.state}{asked}"
    )
    if row.error:
        yield f"  answer: {row.error}"
    for segment, deliveries in scope.ledger.segments_of(row.work_id):
        where = ", ".join(
            f"{store}: {state}{f' at {at:%F %T} UTC' if at else ''}" for store, (state, at) in deliveries.items()
        )
        yield (
            f"  segment {segment.segment_id}: {segment.rows} rows, {segment.duplicates} duplicates, "
            f"{segment.quarantined} set aside; delivered to {where}"
        )
        if segment.quarantined:
            yield f"  set aside rows are in {scope.spool.quarantine(scope.dataset)}"
        for store in deliveries:
            if (file := scope.spool.aside(scope.dataset, segment.segment_id, store)).exists():
                yield f"  what {store} alone cannot keep was set aside, in {file}"


def _why_none(
    scope: Scope,
    store_id: str,
    about: str,
    asked_as: str | None,
    pieces: Sequence[Covered],
    works: Sequence[Any],
) -> str:
    """Return why a store has no row that was wanted: what was answered, or what became of the request."""
    answers = {piece.answer for piece in pieces}
    if Answer.ROWS in answers or Answer.EMPTY in answers:
        segments = {
            segment.segment_id: segment for row in works for segment, _ in scope.ledger.segments_of(row.work_id)
        }
        if aside := sum(segment.quarantined for segment in segments.values()):
            return (
                f"the provider was asked, and gave no row of {about} unless it is among the {aside:,} that were set "
                f"aside, in {scope.spool.quarantine(scope.dataset)} with the reason"
            )
        files = [scope.spool.aside(scope.dataset, segment_id, store_id) for segment_id in segments]
        if there := [str(file) for file in files if file.exists()]:
            return (
                f"the provider was asked, and what {store_id} cannot keep of its answer was set aside, with the "
                f"reason, in {', '.join(there)}"
            )
        return f"the provider was asked and gave no row of {about}"
    if Answer.NOT_YET in answers:
        return "it was not published when it was asked for; the next run asks again"
    sync = f"marketsync sync {scope.plan_name}"
    # what was split lives on in its halves, and another request's work is another story
    last = next((one for one in works if one.request_hash == scope.request_hash and one.state != WorkState.SPLIT), None)
    if last is None:
        return f"it has not been asked for yet; run `{sync}`"
    when = f"{last.changed_at:%F %T} UTC"
    words = f": {last.error}" if last.error else ""
    only = "" if asked_as in (None, EVERYTHING) else f" --only {shlex.quote(str(asked_as).partition('|')[0])}"
    if last.state == WorkState.DROPPED:
        return (
            f"the provider refused the request, and it was dropped on {when}{words}; it is not asked again by itself: "
            f"mend the cause, then run `{sync} --retry-failed{only}`"
        )
    if last.state == WorkState.FAILED:
        return f"the request failed on {when}{words}; run `{sync}` to ask again"
    if last.state == WorkState.WAITING:
        until = f" until {last.resume_at:%F %T} UTC" if last.resume_at else ""
        return f"the request waits{until}{words}; run `{sync}` then"
    if last.state == WorkState.CANCELLED:
        return f"the request was cancelled by hand on {when}; run `{sync}` to ask anew"
    if last.state == WorkState.LEASED:
        return f"it is being asked for ({last.owner} took it on {when}); if no run is under way, run `{sync}`"
    if last.state == WorkState.SEALED:
        return f"its answer is in the spool and not yet in {store_id}; run `{sync}`, which delivers it first"
    if last.state == WorkState.DELIVERED:
        return f"it was asked for, and {store_id} has not got it; run `{sync}`, which fills it from its sibling or asks"
    return f"the chain of pages that would hold it is not finished; run `{sync}`"


def _calendar_lines(scope: Scope, day: date) -> list[str]:
    if scope.calendar is None:
        return []
    if not scope.calendar.is_session(day):
        return [f"{scope.calendar.name}: {day} is no session (weekend or holiday), so no row is expected."]
    published = scope.timing.published_at(day)
    return [
        f"{scope.calendar.name}: {day} is a session, closed {scope.calendar.close(day):%F %T} UTC, "
        f"rows published from {published:%F %T} UTC."
    ]


def _rows(scope: Scope, store_id: str, subject: str, day: date | None) -> list[dict[str, Any]]:
    import polars as pl

    store = scope.workspace.store(store_id)
    if store.marker(scope.dataset) is None:
        return []
    from tasks.deliver import bounds_for

    since = until = None
    if day is not None:
        since, until = bounds_for(scope.schema, Interval(day_start(day), day_start(day + timedelta(days=1))))
    chosen = (subject,) if scope.schema.subject is not None and subject != EVERYTHING else None
    with reading(f"the table of {scope.dataset}", "/".join((store.url.rstrip("/"), *scope.dataset.split(".")))):
        frame = store.scan(scope.dataset, Filter(chosen, since, until, system=True)).head(MOST_ROWS).collect()
    return pl.DataFrame(frame).to_dicts()


# ---------------------------------------------------------------- plan diff


@dataclass(frozen=True)
class DatasetDiff:
    """What the configuration as it stands would newly ask for in a dataset, and what it would leave."""

    dataset: str
    new_subjects: tuple[str, ...]
    gone_subjects: tuple[str, ...]
    owed: dict[str, int]  # why -> units
    requests: int
    copies: dict[str, int]  # store -> subjects that a sibling fills, at no request
    left: int  # subjects whose coverage is untouched
    new_request: bool
    new_columns: tuple[str, ...]
    at_least: bool = False  # of `requests`: how many pages the answers have is not known
    not_known_yet: str = ""  # why its subjects are not known before another dataset's rows are here
    conflicts: dict[str, str] = field(default_factory=dict)  # store -> why its table cannot follow the definition


def diff(workspace: Workspace, plan: str) -> list[DatasetDiff]:
    """Say what an edit of the plan, a universe or a definition means: what would newly be asked, and what is left."""
    result = []
    wrong: dict[str, dict[str, str]] = defaultdict(dict)
    for dataset, store_id, message in conflicts(workspace, plan):
        wrong[dataset][store_id] = message
    for scope in scopes(workspace, plan):
        if problem := _unknown_subjects(scope):
            unknown = DatasetDiff(scope.dataset, (), (), {}, 0, {}, 0, False, (), True, problem, wrong[scope.dataset])
            result.append(unknown)
            continue
        known = workspace.ledger.coverage(scope.store_ids, scope.dataset, scope.request_hash)
        together: dict[str, list[Covered]] = defaultdict(list)
        for of_subject in known.values():
            for subject, pieces in of_subject.items():
                together[subject].extend(piece for piece in pieces if piece.answer is not Answer.PARTIAL)
        names = [subject.name for subject in scope.subjects]
        versions = workspace.ledger.dataset_versions(scope.dataset)
        same = [version for version in versions if version[0] == scope.request_hash]
        new_columns = ()
        if same:
            new_columns = tuple(column.name for column in scope.schema.columns if column.name not in same[-1][2])
        why: Counter[str] = Counter()
        asked = 0
        at_least = False
        units = list(scope.plan_units())
        for unit in units:
            pages, certain = pages_of(scope, unit)
            asked += pages
            at_least = at_least or not certain
            why[_reason(unit, together, bool(versions) and not same)] += 1
        copies: dict[str, int] = {}
        for store_id in scope.store_ids:
            lacking = sum(
                1
                for name in names
                if minus(
                    [Interval(p.start, p.end) for p in together.get(name, ())],
                    [Interval(p.start, p.end) for p in known[store_id].get(name, ()) if p.answer is not Answer.PARTIAL],
                )
            )
            if lacking:
                copies[store_id] = lacking
        owing = {subject for unit in units for subject in unit.subjects}
        result.append(
            DatasetDiff(
                dataset=scope.dataset,
                new_subjects=tuple(name for name in names if name not in together),
                gone_subjects=tuple(sorted(set(together) - set(names))),
                owed=dict(why),
                requests=asked,
                copies=copies,
                left=sum(1 for name in names if name in together and name not in owing),
                new_request=bool(versions) and not same,
                new_columns=new_columns,
                at_least=at_least,
                conflicts=wrong[scope.dataset],
            )
        )
    return result


def _reason(unit: Unit, known: dict[str, list[Covered]], new_request: bool) -> str:
    if new_request:
        return "the request changed"
    if all(subject not in known for subject in unit.subjects):
        return "new subject"
    pieces = [piece for subject in unit.subjects for piece in known.get(subject, ())]
    if any(p.start < unit.end and p.end > unit.start and not p.final for p in pieces):
        return "answered before it was final"
    if any(p.start < unit.end and p.end > unit.start for p in pieces):
        return "young enough to be restated"
    if pieces and unit.start >= max(piece.end for piece in pieces):
        return "time has passed"
    return "not asked yet"


def listed_units(workspace: Workspace, plan: str, most: int) -> list[Unit]:
    """Return the first units a sync would ask for."""
    result: list[Unit] = []
    for scope in scopes(workspace, plan):
        result.extend(islice(scope.plan_units(), most - len(result)))
    return result


def set_desired(workspace: Workspace, plan: str, desired: Desired) -> str:
    """Tell a plan to run, pause or cancel; returns a sentence."""
    workspace.plan(plan)
    before = workspace.ledger.control(plan).desired
    workspace.ledger.set_control(plan, desired)
    if desired is Desired.PAUSE:
        return f"{plan} is paused: running workers stop at their next page, schedules wait until `resume {plan}`"
    if desired is Desired.CANCEL:
        cancelled = workspace.ledger.cancel_work(plan)
        return (
            f"{plan}: running workers stop at their next page; {cancelled} waiting units cancelled "
            f"(what is in the spool is still delivered; `sync {plan}` starts anew)"
        )
    return f"{plan} may run again" if before is not Desired.RUN else f"{plan} was not paused"
