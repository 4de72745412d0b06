"""Is it all there, is it sound, is it in time: one dataset in one store against its calendar.

Every session of every subject is rows, empty, not yet, missing, explained or before its first row (holidays are no
sessions); DESIGN's invariant that these are different answers is kept here. Only the subject and time columns and the
few that sanity needs are read, a partition's span at a time, so memory is bounded by one year of (subject, session)
pairs whatever the table holds; a nightly run judges its own `spans` only. What is found is a `Judgement`
(`marketsync/report.py`); what to do about it is the run's business.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING
from zoneinfo import ZoneInfo

from marketsync.coverage import Answer, Covered, Interval, Refused, merged
from marketsync.definition import Dataset
from marketsync.document import read_document
from marketsync.durations import parse_daily_time
from marketsync.errors import ConfigurationError, Problem
from marketsync.planning import EVERYTHING
from marketsync.report import (
    Freshness,
    FreshState,
    Hole,
    HoleState,
    Judgement,
    MonthCoverage,
    SubjectCoverage,
    Unexpected,
    Unsound,
)
from marketsync.schema import ColumnType, Schema
from marketsync.timing import Timing, midnight
from storage.protocol import Filter, Store

if TYPE_CHECKING:
    import polars as pl

_DAY = timedelta(days=1)
_UNEXPECTED_SHOWN = 100
_EXAMPLES = 5
_MOST_CELLS = 200_000
_WORST_SUBJECTS = 150
_SUBJECTS_PUSHED_DOWN = 500
_LOOK_BACK_DAYS = 92
_IDLE_SESSIONS = 5


ABSENT = "not in the provider's answer"
ABSENT_OR_SET_ASIDE = "not in the provider's answer, or among the rows that were set aside"


# ---------------------------------------------------------------- known holes


@dataclass(frozen=True)
class KnownHole:
    """Days whose absence is explained, both included; None: from the beginning, or for good."""

    first: date | None
    last: date | None
    reason: str


@dataclass(frozen=True)
class KnownHoles:
    """Explained holes by subject; those under `*` hold for every subject."""

    by_subject: Mapping[str, tuple[KnownHole, ...]] = field(default_factory=dict)

    def of(self, subject: str) -> tuple[KnownHole, ...]:
        """Return the holes of one subject and those of all."""
        return self.by_subject.get(subject, ()) + (self.by_subject.get(EVERYTHING, ()) if subject != EVERYTHING else ())


def read_known_holes(path: Path) -> KnownHoles:
    """Read {SYMBOL: {DAYS: reason}}; DAYS is 2012-10-29, a range 2012-10-29..2012-10-30, or open at one end:
    ..2012-05-17 (not listed before) or 2015-03-01.. (delisted). Raises `ConfigurationError` with every problem."""
    document = read_document(path)
    problems: list[Problem] = []
    holes: dict[str, tuple[KnownHole, ...]] = {}
    remedy = "write SYMBOL: {2012-10-29: reason}"
    if not isinstance(document.value, dict):
        raise ConfigurationError([Problem(document.name, 1, "", "known holes are listed by symbol", remedy)])
    for subject, days in document.value.items():
        if not isinstance(days, dict):
            line = document.line((subject,))
            problems.append(Problem(document.name, line, str(subject), "this is no list of days and reasons", remedy))
            continue
        found = []
        for text, reason in days.items():
            try:
                first, last = _days(str(text))
                found.append(KnownHole(first, last, str(reason or "").strip()))
                if not reason:
                    raise ValueError("a known hole needs a reason")
            except ValueError as error:
                line = document.line((subject, text))
                problems.append(Problem(document.name, line, f"{subject}.{text}", str(error), remedy))
        holes[str(subject)] = tuple(found)
    if problems:
        raise ConfigurationError(problems)
    return KnownHoles(holes)


def _days(text: str) -> tuple[date | None, date | None]:
    found = re.fullmatch(r"(\d{4}-\d\d-\d\d)?(\.\.)?(\d{4}-\d\d-\d\d)?", text.strip())
    if not found or not (found.group(1) or found.group(3)) or (found.group(3) and not found.group(2)):
        raise ValueError(f"'{text}' is no day and no range of days; write 2012-10-29 or 2012-10-29..2012-10-30")
    first, dots, last = found.groups()
    begins = date.fromisoformat(first) if first else None
    ends = date.fromisoformat(last) if last else None if dots else begins
    if begins and ends and ends < begins:
        raise ValueError(f"'{text}' ends before it begins")
    return begins, ends


# ---------------------------------------------------------------- judging


def open_spans(judgement: Judgement) -> list[Interval]:
    """Return what a judgement left open (missing or not yet), as intervals to judge again after the next run."""
    return merged(
        Interval(midnight(hole.first), midnight(hole.last) + _DAY)
        for hole in judgement.holes
        if hole.state in (HoleState.MISSING, HoleState.NOT_YET)
    )


def reopened(
    judgement: Judgement, coverage: Mapping[str, Sequence[Covered]], timing: Timing
) -> dict[str, list[Covered]]:
    """Return what of the coverage (of one store, by subject) is not final although it says so: answers that lack what
    is not a hole yet. A provider that is late is asked again until the grace period is over."""
    calendar = timing.calendar
    result: dict[str, list[Covered]] = {}
    if calendar is None:
        return result
    late: dict[str, list[Interval]] = defaultdict(list)
    for hole in judgement.holes:
        if hole.state is HoleState.NOT_YET:
            first = min(midnight(hole.first), calendar.open(hole.first))
            last = max(midnight(hole.last) + _DAY, calendar.close(hole.last))
            for subject in hole.subjects:
                late[subject].append(Interval(first, last))
    for name, pieces in coverage.items():
        spans = merged(late.get(name.split("|")[0], ()))
        found = [
            replace(piece, start=max(piece.start, start), end=min(piece.end, end), final=False, rows=None)
            for piece in pieces
            if piece.final
            for start, end in spans
            if piece.start < end and start < piece.end
        ]
        if found:
            result[name] = found
    return result


def judge(
    dataset: str,
    spec: Dataset,
    store: Store,
    subjects: Sequence[str],
    *,
    timing: Timing,
    since: date,
    now: datetime,
    until: date | None = None,
    coverage: Mapping[str, Sequence[Covered]] | None = None,
    refused: Mapping[str, Sequence[Refused]] | None = None,
    known: KnownHoles = KnownHoles(),
    fresh_by: str | None = None,
    allowed_missing: float = 0.0,
    spans: Sequence[Interval] | None = None,
    firsts: Mapping[str, date] | None = None,
    set_aside: bool = False,
) -> Judgement:
    """Judge what the plan wants of `dataset` (as the store names it) from `since` up to and excluding `until`.

    `subjects` are the planner's (`*`: any row of a session will do); `timing` carries the calendar. Only sessions
    that are published at `now` are expected. With `spans` only their days are judged, and freshness.

    `coverage` is the ledger's, by subject. It tells what was asked: an absent session that was answered empty for good
    is empty, one never asked is missing even before the first row (with the provider's words where it is in `refused`),
    one answered with rows and still absent is missing;
    without coverage every absence after the first row is missing. Sessions before a subject's first row are not
    expected, unless a known hole that is open at its beginning says when it was listed. With `spans`, a subject that
    lacks sessions is looked up in the quarter before them (and in `firsts`: first dates known from elsewhere), so that
    a gap in the midst of a history is not taken for a listing. `set_aside`: rows of the dataset are in quarantine, and
    an absent session may be one of them.

    Reads the store and raises its errors. For `irregular` datasets, and without a calendar, only soundness is judged.
    """
    schema = spec.stored()
    expects = spec.frequency != "irregular" and schema.time is not None
    calendar = timing.calendar if expects else None
    remarks = ["without a calendar no session is expected"] if expects and calendar is None else []
    last: date | None = now.date()
    if calendar is not None:
        last = timing.last_published(now)
        if since < calendar.first_day:
            remarks.append(f"calendar {calendar.name} is known from {calendar.first_day}; what is older is not judged")
            since = calendar.first_day
    end = last + _DAY if last else since
    end = end if until is None else min(end, until)
    due = _last_due(timing, fresh_by, since, end, now) if fresh_by and calendar else None
    ranges = _ranges(since, end, spans, due)

    days = _Days.of(timing, ranges, now) if calendar else None
    tally = _Tally(list(dict.fromkeys(name.split("|")[0] for name in subjects)))
    _read_ranges(dataset, spec, store, schema, timing, tally, days, ranges)
    judgement = Judgement(
        dataset=dataset,
        store=store.name,
        calendar=calendar.name if calendar else None,
        frequency=spec.frequency,
        since=since,
        until=end,
        full=spans is None,
        allowed_missing=allowed_missing,
        rows=tally.rows_read,
        unsound=tuple(
            Unsound(rule=rule, rows=count, examples=tuple(tally.examples[rule]))
            for rule, count in tally.unsound.items()
        ),
        remarks=tuple(remarks),
    )
    if days is None:
        return judgement
    asked = None if coverage is None else _by_column(coverage)
    denied: dict[str, list[Refused]] = defaultdict(list)
    for name, pieces in (refused or {}).items():
        denied[name.split("|")[0]] += pieces
    existed = {name for name, first in (firsts or {}).items() if ranges and first < ranges[0][0]}
    if spans is not None and ranges:
        existed |= _lately(
            dataset,
            store,
            schema,
            [name for name, gaps in tally.gaps.items() if gaps and name not in existed],
            ranges[0][0],
        )
    verdicts = {
        name: list(
            _verdicts(
                name,
                days,
                tally,
                None if asked is None else asked.get(name, []),
                known.of(name),
                name in existed,
                denied.get(name, ()),
                ABSENT_OR_SET_ASIDE if set_aside else ABSENT,
            )
        )
        for name in tally.names
    }
    covered = [
        _covered_subject(
            name,
            days,
            tally,
            verdicts[name],
            next((hole.reason for hole in known.of(name) if hole.first is None), ""),
        )
        for name in tally.names
    ]
    return replace(
        judgement,
        sessions=len(days.days),
        holidays=_holidays(ranges, days),
        expected=sum(c.expected for c in covered),
        present=sum(c.present for c in covered),
        missing=sum(c.missing for c in covered),
        empty=sum(c.empty for c in covered),
        not_yet=sum(c.not_yet for c in covered),
        explained=sum(c.explained for c in covered),
        before_first=sum(c.before_first for c in covered),
        subjects=tuple(covered),
        holes=_holes(days, verdicts),
        unexpected=tuple(tally.unexpected),
        unexpected_rows=tally.unexpected_rows,
        freshness=_freshness(timing, fresh_by, due, days, tally, verdicts, now) if fresh_by else None,
        months=_months(days, tally, verdicts, covered),
    )


def _holidays(ranges: Sequence[tuple[date, date]], days: _Days) -> tuple[date, ...]:
    sessions = set(days.ordinals)
    return tuple(
        date.fromordinal(day)
        for first, stop in ranges
        for day in range(first.toordinal(), stop.toordinal())
        if day not in sessions and date.fromordinal(day).weekday() < 5
    )


# ---------------------------------------------------------------- the sessions that are judged


@dataclass(frozen=True)
class _Days:
    """The judged sessions by index; the index runs over the gaps between ranges, `begins` says where a range does."""

    days: list[date]
    ordinals: list[int]
    starts: list[datetime]  # what coverage must hold for the session to be covered
    ends: list[datetime]
    begins: frozenset[int]
    months: list[str]
    month_of: list[int]
    graceful: int  # from this index on, absence is not a hole yet

    @classmethod
    def of(cls, timing: Timing, ranges: Sequence[tuple[date, date]], now: datetime) -> _Days:
        calendar = timing.calendar
        assert calendar is not None
        days: list[date] = []
        begins = set()
        for first, stop in ranges:
            begins.add(len(days))
            days += calendar.sessions(first, stop)
        graceful = len(days)
        while graceful and timing.hole_after(days[graceful - 1]) > now:
            graceful -= 1
        months = sorted({f"{day:%Y-%m}" for day in days})
        place = {month: at for at, month in enumerate(months)}
        return cls(
            days,
            [day.toordinal() for day in days],
            [midnight(day) if timing.by_date else calendar.open(day) for day in days],
            [midnight(day) + _DAY if timing.by_date else calendar.close(day) for day in days],
            frozenset(begins),
            months,
            [place[f"{day:%Y-%m}"] for day in days],
            graceful,
        )

    def on_or_after(self, day: date) -> int:
        """The index of the first session on or after the day."""
        return bisect_left(self.ordinals, day.toordinal())


def _ranges(start: date, end: date, spans: Sequence[Interval] | None, due: date | None) -> list[tuple[date, date]]:
    """The days to judge, as disjoint half-open ranges; that of freshness is always among them."""
    if start >= end:
        return []
    if spans is None:
        return [(start, end)]
    wanted = [Interval(max(a, midnight(start)), min(b, midnight(end))) for a, b in spans]
    if due is not None:
        wanted.append(Interval(midnight(due), midnight(due) + _DAY))
    whole = [
        Interval(midnight(a.date()), midnight((b - timedelta(microseconds=1)).date()) + _DAY) for a, b in merged(wanted)
    ]
    return [(a.date(), b.date()) for a, b in merged(whole)]


def _chunks(ranges: Iterable[tuple[date, date]], *, monthly: bool) -> Iterator[tuple[date, date]]:
    """Cut ranges at the bounds of months or years, which are those of partitions."""
    for first, stop in ranges:
        while first < stop:
            if monthly:
                after = date(first.year + first.month // 12, first.month % 12 + 1, 1)
            else:
                after = date(first.year + 1, 1, 1)
            yield first, min(after, stop)
            first = after


# ---------------------------------------------------------------- reading


@dataclass
class _Tally:
    """What was read so far. A gap is a range of consecutive judged sessions (both included) without rows."""

    names: list[str]
    gaps: dict[str, list[tuple[int, int]]] = field(default_factory=lambda: defaultdict(list))
    first: dict[str, date] = field(default_factory=dict)
    last: dict[str, date] = field(default_factory=dict)
    rows: Counter[str] = field(default_factory=Counter)
    rows_read: int = 0
    unexpected: list[Unexpected] = field(default_factory=list)
    unexpected_rows: int = 0
    unsound: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    month_rows: Counter[int] = field(default_factory=Counter)


def _read_ranges(
    dataset: str,
    spec: Dataset,
    store: Store,
    schema: Schema,
    timing: Timing,
    tally: _Tally,
    days: _Days | None,
    ranges: Sequence[tuple[date, date]],
) -> None:
    if store.marker(dataset) is None:
        for first, stop in ranges if days is not None else ():
            assert days is not None
            begin, end = days.on_or_after(first), days.on_or_after(stop)
            for name in tally.names if begin < end else ():
                tally.gaps[name].append((begin, end - 1))
        return
    whole = [(date.min, date.max)]
    chunks = whole if schema.time is None else _chunks(ranges, monthly=spec.frequency == "minute")
    for first, stop in chunks:
        _read(dataset, store, schema, timing, spec, tally, days, first, stop)


def _read(
    dataset: str,
    store: Store,
    schema: Schema,
    timing: Timing,
    spec: Dataset,
    tally: _Tally,
    days: _Days | None,
    first: date,
    stop: date,
) -> None:
    """Read the days from `first` up to and excluding `stop`: who has rows on which day, and which rows are unsound."""
    import polars as pl

    rules = _rules(schema)
    if days is None and not rules:
        return
    by_subject = schema.subject is not None and tally.names != [EVERYTHING]
    time, dated = schema.time, schema.time is not None and schema[schema.time].type is ColumnType.DATE
    columns = [name for name in (schema.subject if by_subject else None, time) if name]
    columns += [name for name in _PRICES if rules and name in schema and name not in columns]
    # The rows of a session may lie on the UTC day beside it; they are sorted out below.
    reach = timedelta() if dated or days is None else _DAY
    bounded = time is not None
    rows = store.scan(
        dataset,
        Filter(
            subjects=tally.names if by_subject and len(tally.names) <= _SUBJECTS_PUSHED_DOWN else None,
            since=_bound(first - reach, dated) if bounded else None,
            until=_bound(stop + reach, dated) if bounded else None,
            columns=columns,
        ),
    )
    if by_subject and len(tally.names) > _SUBJECTS_PUSHED_DOWN:
        rows = rows.filter(pl.col(schema.subject or "").is_in(tally.names))
    within = rows
    if bounded:
        within = rows.filter((pl.col(time or "") >= _bound(first, dated)) & (pl.col(time or "") < _bound(stop, dated)))
    figures = within.select(pl.len().alias("rows"), *(rule.sum().alias(name) for name, rule in rules.items()))
    if days is None:
        broken = figures.collect(engine="streaming").row(0, named=True)
    else:
        subject = pl.col(schema.subject) if by_subject and schema.subject else pl.lit(EVERYTHING)
        pairs, counted = pl.collect_all(
            [rows_by_day(rows, subject.alias("subject"), time or "", timing, spec.frequency, dated), figures],
            engine="streaming",
        )
        broken = counted.row(0, named=True)
        _take(pairs, tally, days, first, stop)
    tally.rows_read += broken.pop("rows")
    for name, count in broken.items():
        if count:
            tally.unsound[name] += count
            wanted = _EXAMPLES - len(tally.examples[name])
            if wanted > 0:
                for row in within.filter(rules[name]).head(wanted).collect().iter_rows(named=True):
                    tally.examples[name].append(_told(row, columns))


_PRICES = ("open", "high", "low", "close", "volume", "vol")


def _rules(schema: Schema) -> dict[str, pl.Expr]:
    """What no sound bar does, by name, as far as the columns are there; a missing value breaks no rule."""
    import polars as pl

    prices = [name for name in ("open", "high", "low", "close") if name in schema]
    rules: dict[str, pl.Expr] = {}
    for name, worse in (("high", pl.Expr.lt), ("low", pl.Expr.gt)):
        others = [other for other in prices if other != name]
        if name in prices and others:
            broken = [worse(pl.col(name), pl.col(other)) for other in others]
            text = f"{name} {'below' if name == 'high' else 'above'} {', '.join(others[:-1])} or {others[-1]}"
            rules[text if len(others) > 1 else text.replace(" or ", "").replace(", ", "")] = pl.any_horizontal(broken)
    for name in ("volume", "vol"):
        if name in schema:
            rules[f"{name} below zero"] = pl.col(name) < 0
    return rules


def _told(row: Mapping[str, object], columns: Sequence[str]) -> str:
    return " ".join(
        f"{name} {row[name]:g}"
        if isinstance(row[name], float)
        else f"{row[name]}"
        if name not in _PRICES
        else f"{name} {row[name]}"
        for name in columns
    )


def _lately(dataset: str, store: Store, schema: Schema, names: Sequence[str], before: date) -> set[str]:
    """Return who of `names` has rows in the quarter before a day: so a gap that begins there is no listing."""
    import polars as pl

    if not names or schema.time is None or store.marker(dataset) is None:
        return set()
    dated = schema[schema.time].type is ColumnType.DATE
    by_subject = schema.subject is not None and list(names) != [EVERYTHING]
    rows = store.scan(
        dataset,
        Filter(
            subjects=names if by_subject and len(names) <= _SUBJECTS_PUSHED_DOWN else None,
            since=_bound(before - timedelta(days=_LOOK_BACK_DAYS), dated),
            until=_bound(before, dated),
            columns=[schema.subject if by_subject and schema.subject else schema.time],
        ),
    )
    if not by_subject:
        return {EVERYTHING} if rows.head(1).collect().height else set()
    seen = rows.select(pl.col(schema.subject or "").unique()).collect(engine="streaming").to_series()
    return set(names) & set(seen)


def _bound(day: date, dated: bool) -> date | datetime:
    return day if dated else midnight(day)


def rows_by_day(
    rows: pl.LazyFrame,
    subject: pl.Expr,
    time: str,
    timing: Timing,
    frequency: str,
    dated: bool,
    count: pl.Expr | None = None,
) -> pl.LazyFrame:
    """Return subject, day, n: how many rows a subject has on each day, as sessions count days (see `timing.py`).

    `count` says how many rows a row stands for, where they were counted before (None: one).
    """
    import polars as pl

    calendar = timing.calendar
    assert calendar is not None
    count = pl.len() if count is None else count
    if dated:
        return rows.group_by(subject, pl.col(time).alias("day")).agg(count.alias("n"))
    instant = pl.col(time).dt.cast_time_unit("us")
    if frequency == "session":
        local = instant.dt.convert_time_zone(calendar.zone).dt.date()
        at_midnight = instant.dt.time() == datetime.min.time()
        day = pl.when(at_midnight).then(instant.dt.date()).otherwise(local)
        return rows.group_by(subject, day.alias("day")).agg(count.alias("n"))
    # Bars are counted by quarters of an hour first (zones differ by no less), so that few instants are converted.
    crossing = _crosses_midnight(timing)
    bucket = instant.dt.truncate("1m" if crossing else "15m").alias("instant")
    counted = rows.group_by(subject, bucket).agg(count.alias("n"))
    day = pl.col("instant").dt.convert_time_zone(calendar.zone).dt.date()
    if crossing:
        sessions = pl.LazyFrame(
            {
                "opens": [calendar.opens[at] * 1_000_000 for at in range(len(calendar))],
                "closes": [calendar.closes[at] * 1_000_000 for at in range(len(calendar))],
                "session": [ordinal - _EPOCH for ordinal in calendar.days],
            },
            schema={"opens": pl.Int64, "closes": pl.Int64, "session": pl.Int32},
        ).with_columns(pl.col("opens", "closes").cast(pl.Datetime("us", "UTC")), pl.col("session").cast(pl.Date))
        counted = counted.sort("instant").join_asof(
            sessions.sort("opens"), left_on="instant", right_on="opens", strategy="backward"
        )
        day = pl.when(pl.col("instant") < pl.col("closes")).then(pl.col("session")).otherwise(day)
    return counted.group_by("subject", day.alias("day")).agg(pl.col("n").sum())


_EPOCH = date(1970, 1, 1).toordinal()


def _crosses_midnight(timing: Timing) -> bool:
    """Whether sessions open on the local day before their date, as those of futures do."""
    calendar = timing.calendar
    if calendar is None or not calendar.days:
        return False
    zone = ZoneInfo(calendar.zone)
    return datetime.fromtimestamp(calendar.opens[-1], zone).date().toordinal() != calendar.days[-1]


def _take(pairs: pl.DataFrame, tally: _Tally, days: _Days, first: date, stop: date) -> None:
    """Take the days of one chunk into the tally."""
    import polars as pl

    begin, end = days.on_or_after(first), days.on_or_after(stop)
    index = pl.DataFrame(
        {"day": days.days[begin:end], "at": range(begin, end)}, schema={"day": pl.Date, "at": pl.Int32}
    )
    pairs = pairs.filter((pl.col("day") >= first) & (pl.col("day") < stop))
    strange = pairs.join(index, on="day", how="anti")
    if strange.height:
        tally.unexpected_rows += int(strange["n"].sum())
        room = _UNEXPECTED_SHOWN - len(tally.unexpected)
        for subject, day, n in strange.sort("day", "subject").head(max(0, room)).select("subject", "day", "n").rows():
            tally.unexpected.append(Unexpected(subject=subject, day=day, rows=n))
    there = pairs.join(index, on="day").sort("subject", "at")
    before = pl.col("at").shift(1).over("subject").fill_null(begin - 1)
    gaps = there.select("subject", (before + 1).alias("first"), (pl.col("at") - 1).alias("last"))
    gaps = gaps.filter(pl.col("first") <= pl.col("last"))
    ends = there.group_by("subject").agg(
        pl.col("at").max(), pl.col("day").min().alias("first"), pl.col("day").max().alias("last"), pl.col("n").sum()
    )
    inner: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for subject, gap_first, gap_last in gaps.iter_rows():
        inner[subject].append((gap_first, gap_last))
    reached: dict[str, int] = {}
    for subject, at, oldest, newest, n in ends.select("subject", "at", "first", "last", "n").iter_rows():
        reached[subject] = at
        tally.first.setdefault(subject, oldest)
        tally.last[subject] = newest
        tally.rows[subject] += n
    for name in tally.names:
        tally.gaps[name] += inner.get(name, ())
        after = reached.get(name, begin - 1) + 1
        if after < end:
            tally.gaps[name].append((after, end - 1))
    for at, n in there.group_by("at").agg(pl.col("n").sum()).iter_rows():
        tally.month_rows[days.month_of[at]] += n


# ---------------------------------------------------------------- what an absence means


@dataclass(frozen=True)
class _Verdict:
    """Consecutive absent sessions of one subject that mean the same; state None: before its first row."""

    first: int
    last: int
    state: HoleState | None
    reason: str
    empty: bool = False  # the provider said, for now or for good, that there is nothing

    @property
    def sessions(self) -> int:
        return self.last - self.first + 1


def _by_column(coverage: Mapping[str, Sequence[Covered]]) -> dict[str, list[Covered]]:
    """Coverage by the value of the subject column: of `AAPL|1Day` by `AAPL`."""
    found: dict[str, list[Covered]] = defaultdict(list)
    for name, pieces in coverage.items():
        found[name.split("|")[0]] += [piece for piece in pieces if piece.answer is not Answer.PARTIAL]
    return found


def _verdicts(
    name: str,
    days: _Days,
    tally: _Tally,
    pieces: Sequence[Covered] | None,
    known: Sequence[KnownHole],
    existed: bool,
    refused: Sequence[Refused],
    absent: str,
) -> Iterator[_Verdict]:
    """Yield what each absence of one subject means: its gaps, cut where the answer changes."""
    gaps = tally.gaps.get(name, [])
    first = tally.first.get(name)
    born = None if first is None else days.on_or_after(first)  # expected from here on
    listed = max((days.on_or_after(hole.last + _DAY) for hole in known if hole.first is None and hole.last), default=0)
    if existed:
        born = 0
    explained = [
        (days.on_or_after(hole.first), days.on_or_after(hole.last + _DAY) if hole.last else len(days.days), hole.reason)
        for hole in known
        if hole.first is not None
    ]
    answered = [
        (bisect_left(days.starts, piece.start), bisect_right(days.ends, piece.end), piece) for piece in pieces or ()
    ]
    denied = [
        (bisect_left(days.starts, one.span.start), bisect_right(days.ends, one.span.end), _denial(one))
        for one in sorted(refused, key=lambda one: one.at, reverse=True)
    ]
    cuts = {days.graceful, listed, *([] if born is None else [born])}
    cuts.update(edge for begin, end, _ in denied for edge in (begin, end))
    cuts.update(edge for begin, end, _ in explained for edge in (begin, end))
    cuts.update(edge for begin, end, _ in answered for edge in (begin, end))
    inside = sorted(cuts)
    for low, high in gaps:
        edges = [low, *inside[bisect_right(inside, low) : bisect_right(inside, high)], high + 1]
        for begin, end in pairwise(edges):
            yield _Verdict(
                begin,
                end - 1,
                *_meaning(begin, days, born, listed, explained, answered, pieces is not None, denied, absent),
            )


def _meaning(
    at: int,
    days: _Days,
    born: int | None,
    listed: int,
    explained: Sequence[tuple[int, int, str]],
    answered: Sequence[tuple[int, int, Covered]],
    asked_known: bool,
    denied: Sequence[tuple[int, int, str]],
    absent: str,
) -> tuple[HoleState | None, str, bool]:
    if at < listed:
        return None, "", False
    for begin, end, reason in explained:
        if begin <= at < end:
            return HoleState.EXPLAINED, reason, False
    piece = next((piece for begin, end, piece in answered if begin <= at < end), None)
    young = at >= days.graceful
    if piece is None and asked_known:
        why = next((words for begin, end, words in denied if begin <= at < end), "not asked yet")
        return (HoleState.NOT_YET if young else HoleState.MISSING), why, False
    if not listed and born is not None and at < born:
        return None, "", False
    if piece is not None and piece.answer is Answer.EMPTY:
        if piece.final and not young:
            return HoleState.EMPTY, "the provider answered that there is nothing", True
        if young:
            return HoleState.NOT_YET, "answered empty, within the grace period; the next run asks again", True
        return HoleState.MISSING, "answered empty before it had settled; the next run asks again", True
    if young:
        return HoleState.NOT_YET, "within the grace period; the next run asks again", False
    if piece is None:
        return HoleState.MISSING, "", False
    if piece.answer is Answer.NOT_YET:
        return HoleState.MISSING, "not published although the grace period is over", False
    return HoleState.MISSING, absent, False


def _denial(one: Refused) -> str:
    said = f": {one.words}" if one.words else ""
    if one.dropped:
        return f"refused as a wrong request on {one.at:%Y-%m-%d}{said}; not asked again without --retry-failed"
    return f"failed on {one.at:%Y-%m-%d}{said}; the next run asks again"


# ---------------------------------------------------------------- the judgement


def _covered_subject(name: str, days: _Days, tally: _Tally, verdicts: Sequence[_Verdict], note: str) -> SubjectCoverage:
    counts: Counter[HoleState | None] = Counter()
    for verdict in verdicts:
        counts[verdict.state] += verdict.sessions
    expected = len(days.days) - counts[None]
    absent = sum(counts[state] for state in HoleState)
    return SubjectCoverage(
        subject=name,
        first=tally.first.get(name),
        last=tally.last.get(name),
        expected=expected,
        present=expected - absent,
        missing=counts[HoleState.MISSING],
        empty=counts[HoleState.EMPTY],
        not_yet=counts[HoleState.NOT_YET],
        explained=counts[HoleState.EXPLAINED],
        before_first=counts[None],
        rows=tally.rows[name],
        note=note,
    )


def _holes(days: _Days, verdicts: Mapping[str, Sequence[_Verdict]]) -> tuple[Hole, ...]:
    """The holes, oldest first within missing, not yet, empty, explained; subjects with the same hole share it."""
    shared: dict[tuple[HoleState, int, int, str], list[str]] = defaultdict(list)
    for name, found in verdicts.items():
        joined: list[_Verdict] = []
        for verdict in found:
            last = joined[-1] if joined else None
            alike = last is not None and (last.state, last.reason) == (verdict.state, verdict.reason)
            if last is not None and alike and last.last + 1 == verdict.first and verdict.first not in days.begins:
                joined[-1] = replace(last, last=verdict.last)
            else:
                joined.append(verdict)
        for verdict in joined:
            if verdict.state is not None:
                shared[verdict.state, verdict.first, verdict.last, verdict.reason].append(name)
    order = [HoleState.MISSING, HoleState.NOT_YET, HoleState.EMPTY, HoleState.EXPLAINED]
    return tuple(
        Hole(
            state=state,
            first=days.days[first],
            last=days.days[last],
            sessions=last - first + 1,
            subjects=tuple(sorted(names)),
            reason=reason,
        )
        for (state, first, last, reason), names in sorted(
            shared.items(), key=lambda item: (order.index(item[0][0]), item[0][1], item[0][2], item[1])
        )
    )


def _months(
    days: _Days, tally: _Tally, verdicts: Mapping[str, Sequence[_Verdict]], covered: Sequence[SubjectCoverage]
) -> MonthCoverage:
    whole = Counter(days.month_of)
    width = len(days.months)
    lines: dict[str, tuple[list[int], list[int], list[int]]] = {}
    for name in tally.names:
        expected = [whole[at] for at in range(width)]
        present = expected[:]
        excused = [0] * width
        for verdict in verdicts[name]:
            at = verdict.first
            while at <= verdict.last:
                month = days.month_of[at]
                until = min(verdict.last + 1, bisect_right(days.month_of, month))
                present[month] -= until - at
                if verdict.state in (None, HoleState.NOT_YET):
                    expected[month] -= until - at
                elif verdict.state is not HoleState.MISSING:
                    excused[month] += until - at
                at = until
        lines[name] = (expected, present, excused)
    shown, others = list(lines), 0
    if len(shown) * width > _MOST_CELLS:
        worst = sorted(covered, key=lambda c: (-c.missing, c.subject))[:_WORST_SUBJECTS]
        shown = sorted(c.subject for c in worst)
        rest = [lines[name] for name in lines if name not in set(shown)]
        others = len(rest)
        lines[_OTHERS] = tuple([sum(column) for column in zip(*part, strict=True)] for part in zip(*rest, strict=True))  # type: ignore[assignment]
        shown.append(_OTHERS)
    return MonthCoverage(
        months=tuple(days.months),
        subjects=tuple(shown),
        expected=tuple(tuple(lines[name][0]) for name in shown),
        present=tuple(tuple(lines[name][1]) for name in shown),
        explained=tuple(tuple(lines[name][2]) for name in shown),
        rows=tuple(tally.month_rows[at] for at in range(width)),
        others=others,
    )


_OTHERS = "all others"


# ---------------------------------------------------------------- freshness


def _due(timing: Timing, fresh_by: str, session: date) -> datetime:
    """The promise for a session: the first such time of day after its rows are published."""
    return parse_daily_time(fresh_by).next_after(timing.published_at(session) - timedelta(microseconds=1))


def _last_due(timing: Timing, fresh_by: str, start: date, end: date, now: datetime) -> date | None:
    """The last session from `start` up to and excluding `end` whose rows should be there."""
    calendar = timing.calendar
    assert calendar is not None
    for session in reversed(calendar.sessions(max(start, end - timedelta(days=30)), end)):
        if _due(timing, fresh_by, session) <= now:
            return session
    return None


def _freshness(
    timing: Timing,
    fresh_by: str,
    session: date | None,
    days: _Days,
    tally: _Tally,
    verdicts: Mapping[str, Sequence[_Verdict]],
    now: datetime,
) -> Freshness:
    calendar = timing.calendar
    assert calendar is not None
    newest = max(tally.last.values(), default=None)
    upcoming = next(
        (due for day in calendar.sessions(*_ahead(timing, session, now)) if (due := _due(timing, fresh_by, day)) > now),
        None,
    )
    if session is None:
        return Freshness(promise=fresh_by, state=FreshState.NOT_DUE, next_due=upcoming, newest=newest)
    at = days.on_or_after(session)
    idle_before = days.days[max(0, at - _IDLE_SESSIONS)]
    behind = sorted(
        name
        for name, found in verdicts.items()
        if any(
            v.first <= at <= v.last
            and v.state in (HoleState.MISSING, HoleState.NOT_YET)
            # A delisted symbol is answered empty every night and never again has a row: it breaks no promise.
            and not (v.empty and tally.last.get(name, date.min) < idle_before)
            for v in found
        )
    )
    due = _due(timing, fresh_by, session)
    return Freshness(
        promise=fresh_by,
        state=FreshState.LATE if behind else FreshState.ON_TIME,
        session=session,
        due=due,
        next_due=upcoming,
        newest=newest,
        behind=tuple(behind),
        late_seconds=(now - due).total_seconds() if behind else 0.0,
    )


def _ahead(timing: Timing, session: date | None, now: datetime) -> tuple[date, date]:
    calendar = timing.calendar
    assert calendar is not None
    start = session + _DAY if session else max(calendar.first_day, now.date() - timedelta(days=30))
    return start, max(start, min(calendar.last_day, now.date() + timedelta(days=15)))
