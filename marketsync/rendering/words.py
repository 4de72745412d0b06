"""How figures, sizes, times and states are said in every report. Pure; escaping is each medium's own."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from datetime import UTC, date, datetime

from marketsync.report import (
    DatasetReport,
    Freshness,
    FreshState,
    Hole,
    HoleState,
    Judgement,
    RowCounts,
    RunReport,
    RunState,
    WorkCounts,
)

STATES = {
    RunState.COMPLETED: "completed",
    RunState.COMPLETED_WITH_FINDINGS: "completed with findings",
    RunState.WAITING_FOR_QUOTA: "waiting for quota",
    RunState.WAITING_FOR_PUBLICATION: "waiting for publication",
    RunState.PAUSED: "paused",
    RunState.CANCELLED: "cancelled",
    RunState.FAILED: "failed",
}
GOOD = frozenset({RunState.COMPLETED})
BAD = frozenset({RunState.FAILED})
HOLES = {
    HoleState.MISSING: "missing",
    HoleState.NOT_YET: "not yet published",
    HoleState.EMPTY: "answered empty",
    HoleState.EXPLAINED: "explained",
}
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def clean(text: str) -> str:
    """Return the text without control characters (escape sequences, direction marks), which a provider may send."""
    return _CONTROL.sub("\ufffd", text)


def one_line(text: str, most: int = 300) -> str:
    """Return the text on one line, at most so long."""
    flat = " ".join(clean(text).split())
    return flat if len(flat) <= most else flat[: most - 1] + "…"


def many(count: int, noun: str, plural: str | None = None) -> str:
    """Return "1 row", "2,000 rows"."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def size(count: float) -> str:
    """Return bytes as a person reads them, in powers of 1,000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"


def duration(seconds: float) -> str:
    """Return seconds as a person reads them: 0.4 s, 12 s, 3 min 5 s, 2 h 10 min, 3 d 4 h."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    for big, small, factor, step in (("min", "s", 60, 1), ("h", "min", 3600, 60), ("d", "h", 86400, 3600)):
        if whole < factor * (60 if big != "h" else 24) or big == "d":
            return f"{whole // factor} {big} {whole % factor // step} {small}"
    raise AssertionError("days have no end")


def instant(value: datetime | None) -> str:
    """Return an instant in UTC to the minute; a dash for none."""
    return "-" if value is None else f"{value.astimezone(UTC):%Y-%m-%d %H:%M} UTC"


def share(value: float | None) -> str:
    """Return a share in per cent, rounded down, so that only what is whole is called 100 %; a dash for none."""
    if value is None:
        return "-"
    if value >= 1:
        return "100 %"
    return f"{math.floor(value * 10_000) / 100:.2f} %"


def days(first: date, last: date) -> str:
    """Return a day, or a range of days, both included."""
    return f"{first}" if first == last else f"{first} to {last}"


def names(subjects: Sequence[str], most: int = 5) -> str:
    """Return subjects joined by commas, and how many more there are."""
    shown = ", ".join(clean(subject) for subject in subjects[:most])
    return shown if len(subjects) <= most else f"{shown} and {len(subjects) - most:,} more"


def work(counts: WorkCounts) -> str:
    """Return "120 units: 118 done, 2 empty", leaving out what did not happen."""
    parts = [
        (counts.done, "done"),
        (counts.empty, "empty"),
        (counts.not_yet, "not yet published"),
        (counts.waiting, "waiting"),
        (counts.dropped, "dropped"),
        (counts.failed, "failed"),
        (counts.cancelled, "cancelled"),
    ]
    said = ", ".join(f"{count:,} {word}" for count, word in parts if count)
    return many(counts.units, "unit") + (f": {said}" if said else "")


def rows(counts: RowCounts) -> str:
    """Return "1,000 fetched: 990 inserted, 10 unchanged", leaving out what did not happen."""
    parts = [
        (counts.inserted, "inserted"),
        (counts.updated, "updated"),
        (counts.unchanged, "unchanged"),
        (counts.duplicates, "duplicates"),
        (counts.quarantined, "quarantined"),
    ]
    said = ", ".join(f"{count:,} {word}" for count, word in parts if count)
    return f"{counts.fetched:,} fetched" + (f": {said}" if said else "")


def requests(report: RunReport) -> str:
    """Return "245 sent, 3 retried, 1 cool-down"."""
    counts = report.requests
    text = f"{counts.sent:,} sent"
    if counts.retried:
        text += f", {counts.retried:,} retried"
    if counts.cool_downs:
        text += f", {many(counts.cool_downs, 'cool-down')}"
    return text


def hole(hole: Hole) -> str:
    """Return "AAPL, IBM: 2012-10-29 to 2012-10-30, 2 sessions each missing (not asked yet)"."""
    each = " each" if len(hole.subjects) > 1 else ""
    reason = f" ({one_line(hole.reason)})" if hole.reason else ""
    when = days(hole.first, hole.last)
    return f"{names(hole.subjects)}: {when}, {many(hole.sessions, 'session')}{each} {HOLES[hole.state]}{reason}"


def fresh(freshness: Freshness | None) -> str:
    """Return "on time", "late", "not due" or a dash."""
    if freshness is None:
        return "-"
    return {FreshState.ON_TIME: "on time", FreshState.LATE: "late", FreshState.NOT_DUE: "not due"}[freshness.state]


def promise(freshness: Freshness) -> str:
    """Return the promise and how it stands, as a sentence."""
    text = f"Promised by {freshness.promise}: {fresh(freshness)}"
    if freshness.state is FreshState.LATE:
        late = duration(freshness.late_seconds)
        text += f" by {late} for {freshness.session}; behind: {names(freshness.behind)}"
    elif freshness.state is FreshState.ON_TIME:
        text += f" for {freshness.session}"
    return text + (f"; next due {instant(freshness.next_due)}." if freshness.next_due else ".")


def coverage(judgement: Judgement) -> str:
    """Return what became of the expected sessions, as a sentence."""
    if judgement.calendar is None or not judgement.sessions:
        return f"{many(judgement.rows, 'row')} looked at; no session is expected of it."
    parts = [
        (judgement.missing, "missing"),
        (judgement.not_yet, "not yet published"),
        (judgement.empty, "answered empty"),
        (judgement.explained, "explained"),
    ]
    said = "".join(f", {count:,} {word}" for count, word in parts if count)
    of = f" of {many(len(judgement.subjects), 'subject')}" if len(judgement.subjects) > 1 else ""
    expected = f"{many(judgement.expected, 'session')}{of} expected on {judgement.calendar}"
    text = f"{expected}: {judgement.present:,} there{said}."
    if judgement.before_first:
        text += f" {judgement.before_first:,} before a first row are not expected."
    if judgement.holidays:
        text += f" {many(len(judgement.holidays), 'weekday')} of the calendar had no session."
    return text


def scope(judgement: Judgement) -> str:
    """Return which days were judged."""
    from datetime import timedelta

    if judgement.since is None or judgement.until is None or judgement.since >= judgement.until:
        return "no day is due yet"
    whole = days(judgement.since, judgement.until - timedelta(days=1))
    return whole if judgement.full else f"the spans of this run within {whole}"


def standing(part: DatasetReport) -> str:
    """Return the size of a table: rows, bytes, files."""
    if part.log:
        return "A log of batches, which is followed and not judged"
    if part.size is None:
        return "-"
    text = f"{many(part.size.rows, 'row')}, {size(part.size.bytes)}, {many(part.size.files, 'file')}"
    return text + (f", {many(part.size.commits, 'commit')}" if part.size.commits is not None else "")


def time_span(report: RunReport) -> str:
    """Return when the run was, to the second it took."""
    if report.started is None:
        return duration(report.seconds)
    end = f" to {instant(report.ended)}" if report.ended is not None else ""
    return f"{instant(report.started)}{end}, {duration(report.seconds)}"


def headline(report: RunReport) -> str:
    """Return "nightly: completed in 12 s"."""
    verb = "after" if report.state not in (RunState.COMPLETED, RunState.COMPLETED_WITH_FINDINGS) else "in"
    return f"{clean(report.plan)}: {STATES[report.state]} {verb} {duration(report.seconds)}"


def newest(part: DatasetReport) -> str:
    """Return the newest day or instant in the table."""
    mark = part.newest
    return "-" if mark is None or mark.newest is None else mark.newest[:16].replace("T", " ")
