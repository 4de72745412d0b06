"""Questions about a plan that send no request: what would be asked and how long it takes, how things stand, why a row
is or is not here, what an edit would change.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from itertools import islice
from typing import TYPE_CHECKING, Any

from marketsync.coverage import Answer, Covered, Interval, minus, within
from marketsync.errors import ConfigurationError
from marketsync.ledger import Desired, WorkState
from marketsync.planning import Unit, day_start
from storage.protocol import Filter
from tasks.fetch import ask_of
from tasks.workspace import Options, Scope, Workspace, expected_rows

if TYPE_CHECKING:
    from providers.limit_forecast import Forecast

PAGE_ROWS = 1000  # assumed where a definition does not say how many rows a page holds


@dataclass(frozen=True)
class DatasetEstimate:
    """What one dataset would ask for."""

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


@dataclass(frozen=True)
class Estimate:
    """A plan's estimate: its datasets, and the first requests when they were asked for."""

    plan: str
    datasets: tuple[DatasetEstimate, ...]
    requests: int
    seconds: float | None
    done_at: datetime | None
    first_requests: tuple[str, ...] = ()


def scopes(workspace: Workspace, plan: str, options: Options | None = None) -> list[Scope]:
    """Open a plan's datasets for looking; nothing is begun."""
    now = workspace.clock.now()
    return [Scope(workspace, plan, dataset, "", now, options or Options()) for dataset in workspace.plan(plan).datasets]


def _unknown_subjects(scope: Scope) -> str:
    """Return why a dataset's subjects are not known yet (its parent's rows are not here); empty when they are."""
    try:
        scope.subjects  # noqa: B018 - resolved and kept
    except ConfigurationError as error:
        return str(error)
    return ""


def pages_of(scope: Scope, unit: Unit) -> int:
    """Return about how many requests a unit takes."""
    if scope.spec.page.style == "none":
        return 1
    rows = expected_rows(scope, unit)
    size = scope.spec.page.size or scope.spec.page.cap or PAGE_ROWS
    return 1 if not rows else -(-rows // size)


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
            found.append(DatasetEstimate(scope.dataset, 0, 0, None, 0, None, None, None, None, None, 0, problem))
            continue
        units = asked = rows = 0
        unknown = False
        for unit in scope.plan_units():
            units += 1
            asked += pages_of(scope, unit)
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
    )


# ---------------------------------------------------------------- status


@dataclass(frozen=True)
class DatasetStatus:
    """How one dataset of a plan stands."""

    dataset: str
    store: str
    subjects: int
    covered_until: datetime | None  # every subject is covered to here
    watermark: str | None  # the newest row
    rows: int | None
    owed_units: int
    owed_requests: int
    spooled_rows: int
    states: dict[str, int] = field(default_factory=dict)
    problem: str = ""


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
        states = Counter(
            row.state
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
            try:
                store = workspace.store(store_id)
                if store.marker(scope.dataset) is not None:
                    marks = store.watermarks(scope.dataset)
                    watermark = max((mark.isoformat() for mark in marks.values()), default=None)
                    count = store.count(scope.dataset)
            except Exception as error:  # noqa: BLE001 - a store that is down is part of the answer
                problem = str(error)
            rows.append(
                DatasetStatus(
                    dataset=scope.dataset,
                    store=store_id,
                    subjects=len(scope.subjects),
                    covered_until=_covered_until(scope, known[store_id]),
                    watermark=watermark,
                    rows=count,
                    owed_units=len(units),
                    owed_requests=sum(pages_of(scope, unit) for unit in units),
                    spooled_rows=spooled,
                    states=dict(states),
                    problem=problem,
                )
            )
    runs = ledger.runs(plan, limit=1)
    last = runs[0] if runs else None
    return Status(
        plan=plan,
        desired=str(ledger.control(plan).desired),
        last_run=last.run_id if last else None,
        last_state=last.state if last else None,
        last_ended=last.ended if last else None,
        resume_at=ledger.resume_at(plan),
        running=bool(last and last.ended is None and last.state == "running"),
        datasets=tuple(rows),
        owed=tuple(listed),
    )


def _covered_until(scope: Scope, known: dict[str, list[Covered]]) -> datetime | None:
    """Return up to where every subject has been asked and answered, without a gap from the plan's beginning."""
    if not scope.wanted or not scope.subjects:
        return None
    start = scope.wanted[0].start
    least: datetime | None = None
    for subject in scope.subjects:
        pieces = [
            Interval(piece.start, piece.end)
            for piece in known.get(subject.name, ())
            if piece.answer in (Answer.ROWS, Answer.EMPTY)
        ]
        gaps = minus([scope.wanted[0]], pieces)
        until = gaps[0].start if gaps else scope.wanted[0].end
        if until <= start:
            return None
        least = until if least is None else min(least, until)
    return least


# ---------------------------------------------------------------- explain


@dataclass(frozen=True)
class Explanation:
    """Why rows of a subject and day are, or are not, in the stores: sentences, the last one is the conclusion."""

    dataset: str
    subject: str
    day: date
    lines: tuple[str, ...]
    rows: dict[str, list[dict[str, Any]]]


def explain(workspace: Workspace, dataset: str, subject: str, day: date) -> Explanation:
    """Follow a row from the calendar over request, answer, segment and delivery to the stores."""
    plans = [name for name, plan in workspace.loaded.configuration.plans.items() if dataset in plan.datasets]
    if not plans:
        raise ConfigurationError(f"no plan of {workspace.path} syncs {dataset}; see `marketsync plan list`")
    lines: list[str] = []
    found: dict[str, list[dict[str, Any]]] = {}
    span = Interval(day_start(day), day_start(day + timedelta(days=1)))
    for plan in plans:
        scope = Scope(workspace, plan, dataset, "", workspace.clock.now())
        lines.extend(_calendar_lines(scope, day))
        names = {s.name for s in scope.subjects}
        asked_as = subject if subject in names else next((n for n in names if subject in n.split("|")), "*")
        if asked_as not in names:
            lines.append(f"plan {plan}: {subject} is not in its universe, so it is never asked for.")
        wanted = within(scope.wanted, [span])
        if not wanted:
            reach = f"{scope.wanted[0].start:%F} to {scope.wanted[-1].end:%F}" if scope.wanted else "nothing"
            lines.append(f"plan {plan}: the day is not wanted yet or not at all (wanted: {reach}, end excluded).")
        for row in workspace.ledger.works(dataset=dataset, subject=asked_as, span=span, limit=20):
            lines.append(
                f"request: {row.label or 'not sent yet'} — {row.start:%F} to {row.end:%F}, {row.requests} requests, "
                f"{row.rows} rows, state {row.state}" + (f", asked {row.asked_at:%F %T} UTC" if row.asked_at else "")
            )
            if row.error:
                lines.append(f"  answer: {row.error}")
            for segment, deliveries in workspace.ledger.segments_of(row.work_id):
                where = ", ".join(
                    f"{store}: {state}{f' at {at:%F %T} UTC' if at else ''}"
                    for store, (state, at) in deliveries.items()
                )
                lines.append(
                    f"  segment {segment.segment_id}: {segment.rows} rows, {segment.duplicates} duplicates, "
                    f"{segment.quarantined} set aside; delivered to {where}"
                )
                if segment.quarantined:
                    lines.append(f"  set aside rows are in {scope.workspace.state}/quarantine/{dataset}/")
        for store_id in scope.store_ids:
            known = workspace.ledger.coverage([store_id], dataset, scope.request_hash, [asked_as])[store_id]
            pieces = [p for p in known.get(asked_as, ()) if p.start < span.end and p.end > span.start]
            for piece in pieces:
                lines.append(
                    f"coverage in {store_id}: {piece.answer}, {'final' if piece.final else 'not final'}, "
                    f"{piece.start:%F} to {piece.end:%F}, asked {piece.asked_at:%F %T} UTC"
                )
            rows = _rows(scope, store_id, subject, day)
            found[store_id] = rows
            lines.append(_conclusion(store_id, subject, day, rows, pieces))
    return Explanation(dataset, subject, day, tuple(lines), found)


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


def _rows(scope: Scope, store_id: str, subject: str, day: date) -> list[dict[str, Any]]:
    import polars as pl

    store = scope.workspace.store(store_id)
    if store.marker(scope.dataset) is None:
        return []
    from tasks.deliver import bounds_for

    since = until = None
    if scope.schema.time is not None:
        since, until = bounds_for(scope.schema, Interval(day_start(day), day_start(day + timedelta(days=1))))
    chosen = (subject,) if scope.schema.subject is not None else None
    frame = store.scan(scope.dataset, Filter(chosen, since, until, system=True)).head(10).collect()
    return pl.DataFrame(frame).to_dicts()


def _conclusion(
    store_id: str, subject: str, day: date, rows: Sequence[dict[str, Any]], pieces: Sequence[Covered]
) -> str:
    if rows:
        segment = rows[0]["_segment"]
        return f"{store_id} has {len(rows)} row(s) of {subject} on {day}; the first came with segment {segment}."
    answers = {piece.answer for piece in pieces}
    if Answer.ROWS in answers or Answer.EMPTY in answers:
        return f"{store_id} has none: the provider was asked and gave no row of {subject} for {day}."
    if Answer.NOT_YET in answers:
        return f"{store_id} has none: it was not published when it was asked for; the next run asks again."
    if Answer.PARTIAL in answers:
        return f"{store_id} has none so far: the chain of pages that would hold it is not finished; run the plan again."
    return f"{store_id} has none: it has not been asked for yet; run the plan."


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


def diff(workspace: Workspace, plan: str) -> list[DatasetDiff]:
    """Say what an edit of the plan, a universe or a definition means: what would newly be asked, and what is left."""
    result = []
    for scope in scopes(workspace, plan):
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
        units = list(scope.plan_units())
        for unit in units:
            asked += pages_of(scope, unit)
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
