"""Adopting a table: the store takes it over (`storage/adoption.py`), and coverage is built anew from the rows that are
in it, so that the next sync asks only for what is missing.

What is believed is what rows prove. A session of a dataset that has one row a session is there when its row is; one of
minute bars when it has a row for every minute. Where nothing is proven (ticks, lists, requests that answer for all
symbols at once) everything is asked again, unless the user says that what lies between rows is whole. Nothing outside
of a subject's rows is believed, nor what may still settle or be late.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date, datetime, timedelta
from typing import TYPE_CHECKING

from marketsync.coverage import Answer, Covered, Interval, merged, minus
from marketsync.errors import ConfigurationError, NoTable
from marketsync.planning import EVERYTHING
from marketsync.schema import ColumnType
from marketsync.timing import Timing, midnight
from storage.adoption import Adoption, Adopts, Wish
from storage.protocol import Store
from tasks.deliver import bind, is_known
from tasks.inquiry import pages_of, scopes
from tasks.judge import rows_by_day
from tasks.workspace import Scope, Workspace

if TYPE_CHECKING:
    import polars as pl

    from marketsync.calendars import Calendar

ADOPTED = "adopted"  # stands for the work where rows came with the table
SHOWN_SPANS = 10
_DAY = timedelta(days=1)
_BUCKET = timedelta(minutes=15)
_EPOCH = date(1970, 1, 1).toordinal()
_PASSED_BY = "the dataset has that table of ours, so the one that --table names was not looked at"


@dataclass(frozen=True)
class Asked:
    """What the user said beyond the dataset; see `marketsync adopt --help`."""

    store: str | None = None
    table: str | None = None
    rename: tuple[tuple[str, str], ...] = ()  # theirs, ours
    zone: str | None = None
    believe_spans: bool = False
    dry: bool = False


@dataclass(frozen=True)
class Span:
    """What is believed of some subjects: from `first` up to and excluding `end`."""

    subjects: tuple[str, ...]
    start: datetime
    end: datetime


@dataclass(frozen=True)
class Adopted:
    """What became of one dataset: the table, what was believed of it, what stays owed."""

    dataset: str
    store: str
    table: str
    dry: bool
    already: bool
    rows: int
    kept: str
    done: tuple[str, ...]
    notes: tuple[str, ...]
    subjects: int  # that the plans ask for
    believed_subjects: int
    complete: int  # sessions, summed over subjects
    incomplete: int  # sessions that have rows, and not provably all
    spans: tuple[Span, ...]
    owed_units: int
    owed_requests: int
    owed_at_least: bool


@dataclass(frozen=True)
class Belief:
    """What rows prove, by subject, and how many sessions with rows were believed and not."""

    spans: Mapping[str, Sequence[Interval]]
    complete: int = 0
    incomplete: int = 0
    notes: tuple[str, ...] = ()


def adopt(workspace: Workspace, name: str, asked: Asked = Asked()) -> list[Adopted]:
    """Adopt the table of a dataset (`upstream.dataset`), or those of a plan as far as they are there.

    Raises ConfigurationError for a name that is neither, NoTable when no table is there, AdoptionRefused with the
    reasons why a table cannot be taken; then nothing was changed.
    """
    found = []
    missing: NoTable | None = None
    chosen = _scopes(workspace, name)
    if len(chosen) > 1 and (asked.table is not None or asked.rename):
        raise ConfigurationError(
            f"plan {name} has several datasets ({', '.join(chosen)}), and --table and --rename are about one: name the "
            "dataset instead of the plan"
        )
    for group in chosen.values():
        try:
            found.append(_adopted(workspace, group, asked))
        except NoTable as error:
            missing = error
    if not found and missing is not None:
        raise missing
    return found


def _scopes(workspace: Workspace, name: str) -> dict[str, list[Scope]]:
    """Return the scopes of each dataset that is meant: those of all plans that ask for it."""
    plans = workspace.loaded.configuration.plans
    if name in plans:
        return {scope.dataset: [scope] for scope in scopes(workspace, name)}
    every = [scope for plan in plans for scope in scopes(workspace, plan) if scope.dataset == name]
    if not every:
        known = sorted({dataset for plan in plans.values() for dataset in plan.datasets})
        raise ConfigurationError(
            f"{name!r} is neither a plan nor a dataset of a plan in {workspace.path}; plans: {', '.join(plans)}; "
            f"datasets: {', '.join(known)}. A table is adopted for a plan, which says what is wanted of it: marketsync "
            "plan add"
        )
    return {name: every}


def _adopted(workspace: Workspace, group: Sequence[Scope], asked: Asked) -> Adopted:
    scope = group[0]
    store_id = asked.store or scope.workspace.loaded.with_tables(scope.store_ids)[0]
    store = workspace.store(store_id)
    group = [one for one in group if store_id in one.store_ids]
    if not group:
        raise ConfigurationError(
            f"no plan delivers {scope.dataset} to the store {store_id}; its stores: {', '.join(scope.store_ids)}"
        )
    take = getattr(store, "adopt", None)
    if take is None:
        raise ConfigurationError(
            f"the store {store_id} ({store.url}) cannot adopt tables; let the dataset be filled there from a sibling "
            "store that can, or from the provider"
        )
    taker: Adopts = store  # pyright: ignore[reportAssignmentType] - it has the method
    now = workspace.clock.now()
    wish = Wish(
        f"{ADOPTED}:{now:%Y-%m-%d}",
        now,
        asked.table,
        dict(asked.rename),
        asked.zone,
        _fineness(scope),
        asked.dry,
    )
    adoption = taker.adopt(scope.dataset, scope.schema, wish)
    known = _known(scope, store_id, store, adoption)
    names = list(dict.fromkeys(subject.name for one in group for subject in one.subjects))
    belief = believed(scope, names, adoption.counts, now, spans=asked.believe_spans)
    pieces: dict[str, list[Covered]] = {}
    for subject, spans in belief.spans.items():
        covered = [
            Interval(piece.start, piece.end)
            for piece in known.get(subject, ())
            if piece.answer in (Answer.ROWS, Answer.EMPTY)
        ]
        new = [Covered(*span, Answer.ROWS, True, now, None, ADOPTED) for span in minus(spans, covered)]
        if new:
            pieces[subject] = new
    if not asked.dry and adoption.marker is not None:
        ledger = workspace.ledger
        # keys may be anywhere in it: nothing is ever appended to it unseen
        bind(store_id, store, scope.dataset, adoption.marker, ledger, trusted=False)
        ledger.lay(store_id, scope.dataset, scope.request_hash, pieces)
    thought = {name: [*known.get(name, ()), *pieces.get(name, ())] for name in names} if asked.dry else None
    units, requests, at_least = _owed(group, store_id, thought)
    return Adopted(
        scope.dataset,
        store_id,
        adoption.table,
        asked.dry,
        adoption.already,
        adoption.rows,
        adoption.kept,
        tuple(adoption.done),
        (*adoption.notes, *([_PASSED_BY] if adoption.already and asked.table else []), *belief.notes),
        len(names),
        len(belief.spans),
        belief.complete,
        belief.incomplete,
        _shared(pieces),
        units,
        requests,
        at_least,
    )


def _fineness(scope: Scope) -> timedelta | None:
    """Return how fine the times of rows must be known."""
    if scope.spec.frequency == "session" and scope.calendar is not None:
        return None
    return _BUCKET if scope.spec.frequency == "minute" else _DAY


def _known(scope: Scope, store_id: str, store: Store, adoption: Adoption) -> Mapping[str, Sequence[Covered]]:
    """Return what the ledger knows of this very table, as it is."""
    if not adoption.already or not is_known(store_id, store, scope.dataset, scope.ledger):
        return {}
    return scope.ledger.coverage([store_id], scope.dataset, scope.request_hash)[store_id]


def _owed(
    group: Sequence[Scope], assumed_in: str | None = None, assumed: Mapping[str, Sequence[Covered]] | None = None
) -> tuple[int, int, bool]:
    """Return how many units and requests the plans still owe, and whether they are at least so many: as it is, or as if
    a store had what is `assumed` and nothing else."""
    units = requests = 0
    at_least = False
    for scope in group:
        if assumed is not None:
            scope = replace(scope, assumed=assumed)
            scope.store_ids = [store for store in scope.store_ids if store != assumed_in]
        for unit in scope.plan_units():
            pages, certain = pages_of(scope, unit)
            units, requests, at_least = units + 1, requests + pages, at_least or not certain
    return units, requests, at_least


def _shared(pieces: Mapping[str, Sequence[Covered]]) -> tuple[Span, ...]:
    """Return the spans, those with the most subjects first."""
    alike: dict[Interval, list[str]] = {}
    for subject, laid in pieces.items():
        for piece in laid:
            alike.setdefault(Interval(piece.start, piece.end), []).append(subject)
    return tuple(
        Span(tuple(sorted(names)), *span)
        for span, names in sorted(alike.items(), key=lambda one: (-len(one[1]), one[0]))
    )


# ---------------------------------------------------------------- what rows prove


def believed(scope: Scope, names: Sequence[str], counts: pl.DataFrame, now: datetime, *, spans: bool = False) -> Belief:
    """Return what the rows of a table, counted by subject and time, prove of the subjects that are asked for.

    With `spans`, what lies between a subject's rows is taken as whole where rows alone prove nothing; where there is a
    calendar, that is every session that has a row.
    """
    import polars as pl

    if scope.schema.time is None:
        return Belief({}, notes=("a list without times is asked anew: no row says that none is missing",))
    together = list(names) == [EVERYTHING]
    if not together and not scope.told_apart:
        return Belief({}, notes=("its rows do not say which request they answer, so everything is asked again",))
    if together:
        counts = counts.group_by("at").agg(pl.col("n").sum()).with_columns(pl.lit(EVERYTHING).alias("subject"))
    strangers = counts.filter(~pl.col("subject").is_in(names))
    notes = []
    if strangers.height:
        notes.append(
            f"{int(strangers['n'].sum()):,} rows are of {strangers['subject'].n_unique():,} subjects that no plan asks "
            "for; they stay as they are"
        )
    counts = counts.filter(pl.col("subject").is_in(names))
    bound = _settled(scope.timing, now)
    if scope.calendar is None or scope.spec.frequency == "irregular":
        if not spans:
            return Belief({}, notes=(*notes, _unproven("nothing says how many rows there should be")))
        return Belief(_between(scope, counts, bound), notes=(*notes, _TAKEN))
    days = _days(scope, counts)
    if spans:
        proven = days.with_columns(pl.lit(True).alias("whole"))
        notes.append("every session that has a row was taken for complete, as you said (--believe-spans)")
    elif together:
        proven = days.with_columns(pl.lit(False).alias("whole"))
        notes.append(_unproven("a request answers for all symbols of a session, and nothing says how many those are"))
    elif scope.spec.frequency == "minute":
        proven = _minutes_whole(scope, counts, days)
        notes.append(
            "a session of minute bars is believed when it has one for each of its minutes; bars before the opening and "
            "after the close are taken as they are there"
        )
    else:
        proven = days.with_columns(pl.lit(True).alias("whole"))
    return replace(_runs(scope, proven, bound), notes=tuple(notes))


_TAKEN = (
    "what lies between the first and the last row of a subject was taken for complete, as you said (--believe-spans)"
)


def _unproven(why: str) -> str:
    return (
        f"{why}, so no session was taken for complete, and all is asked again (rows that are equal stay as they are); "
        "if you know that what is there has no holes, adopt it with --believe-spans"
    )


def _settled(timing: Timing, now: datetime) -> datetime:
    """Return the end of what can be believed now: what may still settle, or come late, is asked again."""
    end = timing.final_until(now)
    calendar = timing.calendar
    if calendar is None:
        return end
    for session in calendar.sessions(end.date() - timedelta(days=60), end.date() + _DAY):
        if timing.hole_after(session) > now:
            return min(end, midnight(session) if timing.by_date else calendar.open(session))
    return end


def _between(scope: Scope, counts: pl.DataFrame, bound: datetime) -> dict[str, list[Interval]]:
    """Return the span of each subject's rows, to the day."""
    import polars as pl

    found: dict[str, list[Interval]] = {}
    days = counts.with_columns(pl.col("at").cast(pl.Date)).group_by("subject")
    for subject, first, last in days.agg(pl.col("at").min().alias("a"), pl.col("at").max().alias("b")).rows():
        # the last day may have been fetched while it was under way
        spans = merged([Interval(midnight(first), min(midnight(last), bound))])
        if spans:
            found[subject] = spans
    return found


def _days(scope: Scope, counts: pl.DataFrame) -> pl.DataFrame:
    """Return subject, at (the index of a session), n: the sessions that have rows."""
    import polars as pl

    calendar = scope.calendar
    assert calendar is not None
    dated = scope.schema[scope.schema.time or ""].type is ColumnType.DATE
    found = rows_by_day(
        counts.lazy(), pl.col("subject"), "at", scope.timing, scope.spec.frequency, dated, pl.col("n").sum()
    ).collect()
    return found.join(_sessions(calendar), on="day").select("subject", "day", "at", "n")


def _sessions(calendar: Calendar) -> pl.DataFrame:
    import polars as pl

    days = pl.Series([day - _EPOCH for day in calendar.days], dtype=pl.Int32).cast(pl.Date)
    instants = {"opens": list(calendar.opens), "closes": list(calendar.closes)}
    return pl.DataFrame({"day": days, "at": range(len(calendar)), **instants}).with_columns(
        (pl.col("opens", "closes") * 1_000_000).cast(pl.Datetime("us", "UTC"))
    )


def _minutes_whole(scope: Scope, counts: pl.DataFrame, days: pl.DataFrame) -> pl.DataFrame:
    """Return the days with `whole`: whether there are as many bars between opening and close as there are minutes."""
    import polars as pl

    calendar = scope.calendar
    assert calendar is not None
    sessions = _sessions(calendar)
    inside = (
        counts.sort("at")
        .join_asof(sessions.drop("at").sort("opens"), left_on="at", right_on="opens", strategy="backward")
        .filter(pl.col("at") < pl.col("closes"))
        .group_by("subject", "day")
        .agg(pl.col("n").sum().alias("inside"))
    )
    # a bucket may not stand across an opening or a close
    quarter = int(_BUCKET.total_seconds())
    aligned = (pl.col("opens").dt.epoch("s") % quarter == 0) & (pl.col("closes").dt.epoch("s") % quarter == 0)
    minutes = (pl.col("closes") - pl.col("opens")).dt.total_minutes()
    wanted = sessions.select("day", pl.when(aligned).then(minutes).alias("wanted"))
    whole = (pl.col("inside") >= pl.col("wanted")).fill_null(False)
    return (
        days.join(inside, on=["subject", "day"], how="left")
        .join(wanted, on="day", how="left")
        .with_columns(whole.alias("whole"))
    )


def _runs(scope: Scope, days: pl.DataFrame, bound: datetime) -> Belief:
    """Return the runs of neighbouring sessions that are whole, up to the bound."""
    import polars as pl

    calendar, timing = scope.calendar, scope.timing
    assert calendar is not None
    whole = days.filter(pl.col("whole")).sort("subject", "at")
    run = (pl.col("at") - pl.int_range(pl.len(), dtype=pl.Int64).over("subject")).alias("run")
    runs = (
        whole.with_columns(run)
        .group_by("subject", "run")
        .agg(pl.col("day").min().alias("first"), pl.col("day").max().alias("last"))
    )
    spans: dict[str, list[Interval]] = {}
    for subject, first, last in runs.select("subject", "first", "last").sort("subject", "first").iter_rows():
        start = calendar.open(first)
        if timing.by_date:  # days before it that are no sessions have no rows
            start = midnight(calendar.session_before(first) + _DAY if first.toordinal() > calendar.days[0] else first)
        end = midnight(last) + _DAY if timing.by_date else calendar.close(last)
        if start < min(end, bound):
            spans.setdefault(subject, []).append(Interval(start, min(end, bound)))
    return Belief(spans, whole.height, days.height - whole.height)
