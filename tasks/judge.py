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
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING
from zoneinfo import ZoneInfo

from marketsync.coverage import Answer, Covered, Interval, merged
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
    known: KnownHoles = KnownHoles(),
    fresh_by: str | None = None,
    allowed_missing: float = 0.0,
    spans: Sequence[Interval] | None = None,
    firsts: Mapping[str, date] | None = None,
) -> Judgement:
    """Judge what the plan wants of `dataset` (as the store names it) from `since` up to and excluding `until`.

    `subjects` are the planner's (`*`: any row of a session will do); `timing` carries the calendar. Only sessions
    that are published at `now` are expected. With `spans` only their days are judged, and freshness.

    `coverage` is the ledger's, by subject. It tells what was asked: an absent session that was answered empty for good
    is empty, one never asked is missing even before the first row, one answered with rows and still absent is missing;
    without coverage every absence after the first row is missing. Sessions before a subject's first row are not
    expected, unless a known hole that is open at its beginning says when it was listed. `firsts` are first dates known
    from elsewhere, for spans that begin in the midst of a history.

    Reads the store and raises its errors. For `irregular` datasets, and without a calendar, only soundness is judged.
    """
    schema = spec.stored()
    calendar = timing.calendar
    remarks: list[str] = []
    if calendar is None or spec.frequency == "irregular" or schema.time is None:
        if spec.frequency != "irregular":
            remarks.append("without a calendar no session is expected")
        return _only_soundness(dataset, spec, store, schema, since, until, spans, allowed_missing, remarks)

    last = timing.last_published(now)
    end = last + _DAY if last else since
    if until is not None:
        end = min(end, until)
    start = since
    if start < calendar.first_day:
        remarks.append(f"calendar {calendar.name} is known from {calendar.first_day}; what is older is not judged")
        start = calendar.first_day
    due = _last_due(timing, fresh_by, start, end, now) if fresh_by else None
    ranges = _ranges(start, end, spans, due)
    days = _Days.of(timing, ranges, now)
    columns = {name.split("|")[0]: None for name in subjects}
    names = list(columns)
    found = _Found(names)
    for first, stop in _chunks(ranges, "month" if spec.frequency == "minute" else "year"):
        found.add(days, *_read(dataset, store, schema, timing, spec.frequency == "session", names, first, stop))
    judged = _Verdicts(days, timing, known, _by_column(coverage), now, dict(firsts or {}), start)
    return _judgement(dataset, spec, store, timing, judged, found, ranges, start, end, spans, allowed_missing).finish(
        fresh_by, due, now, remarks
    )
