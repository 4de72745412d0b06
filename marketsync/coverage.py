"""What has been asked and answered, as half-open intervals, and what therefore is still owed. Pure arithmetic.

Positions are aware UTC datetimes; a session or a calendar day d is the interval from d 00:00Z to d+1 00:00Z. Where
coverage is kept is the ledger's business.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from enum import StrEnum
from typing import NamedTuple

# Neighbouring pieces of coverage whose askings are all older than this are joined; younger ones stay apart, since
# "asked since this run began" must be told of each.
_JOIN_AFTER = timedelta(days=2)


class Interval(NamedTuple):
    """Half-open: from `start` up to and excluding `end`."""

    start: datetime
    end: datetime


class Answer(StrEnum):
    """What the provider said of an interval."""

    ROWS = "rows"
    EMPTY = "empty"
    NOT_YET = "not_yet"
    PARTIAL = "partial"  # some pages of an unfinished chain were delivered: rows are there, nothing is covered


@dataclass(frozen=True)
class Covered:
    """One piece of coverage of one subject in one store."""

    start: datetime
    end: datetime
    answer: Answer
    final: bool
    asked_at: datetime
    rows: int | None = None
    work_id: str | None = None


@dataclass(frozen=True)
class Refused:
    """What the provider would not answer (`dropped`: as a wrong request, which is not asked again by itself), or could
    not although it was asked again and again; in its own words."""

    span: Interval
    dropped: bool
    at: datetime
    words: str


def merged(intervals: Iterable[Interval]) -> list[Interval]:
    """Return the union, sorted, with touching intervals joined and empty ones left out."""
    result: list[Interval] = []
    for start, end in sorted(interval for interval in intervals if interval[0] < interval[1]):
        if result and start <= result[-1].end:
            if end > result[-1].end:
                result[-1] = Interval(result[-1].start, end)
        else:
            result.append(Interval(start, end))
    return result


def minus(intervals: Iterable[Interval], taken: Iterable[Interval]) -> list[Interval]:
    """Return what of `intervals` no interval of `taken` holds, sorted and merged."""
    result: list[Interval] = []
    holes = merged(taken)
    first = 0
    for start, end in merged(intervals):
        while first < len(holes) and holes[first].end <= start:
            first += 1
        at = start
        for index in range(first, len(holes)):
            hole = holes[index]
            if hole.start >= end:
                break
            if hole.start > at:
                result.append(Interval(at, hole.start))
            at = max(at, hole.end)
        if at < end:
            result.append(Interval(at, end))
    return result


def within(intervals: Iterable[Interval], bounds: Iterable[Interval]) -> list[Interval]:
    """Return the intersection of two unions, sorted and merged."""
    left, right = merged(intervals), merged(bounds)
    result: list[Interval] = []
    i = j = 0
    while i < len(left) and j < len(right):
        start, end = max(left[i].start, right[j].start), min(left[i].end, right[j].end)
        if start < end:
            result.append(Interval(start, end))
        if left[i].end < right[j].end:
            i += 1
        else:
            j += 1
    return result


def owed(
    wanted: Sequence[Interval],
    covered: Iterable[Covered],
    *,
    run_started: datetime,
    restated_since: datetime | None = None,
    refetch: bool = False,
) -> list[Interval]:
    """Return what of `wanted` must be asked in a run that began at `run_started`.

    A piece that was asked since the run began is not owed again, whatever its answer. Otherwise a piece settles what
    is wanted when it is final, younger rows than `restated_since` excepted; with `refetch` nothing older settles.
    """
    settled: list[Interval] = []
    for piece in covered:
        if piece.answer is Answer.PARTIAL:
            continue
        if piece.asked_at >= run_started:
            settled.append(Interval(piece.start, piece.end))
        elif not refetch and piece.final:
            end = piece.end if restated_since is None else min(piece.end, restated_since)
            if piece.start < end:
                settled.append(Interval(piece.start, end))
    return minus(wanted, settled)


def laid(existing: Iterable[Covered], new: Sequence[Covered], now: datetime) -> list[Covered]:
    """Return the coverage after `new` pieces were laid over `existing` ones: what they hide is cut away.

    A partial piece hides nothing but other partial pieces of the same work, and "not yet" nothing but an older "not
    yet": what is covered stays covered, and rows that are there stay known.
    """
    pieces = list(existing)
    for piece in new:
        kept: list[Covered] = []
        for old in pieces:
            if old.end <= piece.start or old.start >= piece.end:
                kept.append(old)
            elif not _hides(piece, old):
                kept.append(old)
            else:
                if old.start < piece.start:
                    kept.append(replace(old, end=piece.start, rows=None))
                if old.end > piece.end:
                    kept.append(replace(old, start=piece.end, rows=None))
        kept.append(piece)
        pieces = kept
    pieces.sort(key=lambda p: (p.start, p.end))
    joined: list[Covered] = []
    for piece in pieces:
        last = joined[-1] if joined else None
        if last is not None and _joinable(last, piece, now):
            rows = None if last.rows is None or piece.rows is None else last.rows + piece.rows
            joined[-1] = replace(last, end=piece.end, asked_at=min(last.asked_at, piece.asked_at), rows=rows)
        else:
            joined.append(piece)
    return joined


def _hides(new: Covered, old: Covered) -> bool:
    if new.answer is Answer.PARTIAL:
        return old.answer is Answer.PARTIAL and old.work_id == new.work_id
    return new.answer is not Answer.NOT_YET or old.answer is Answer.NOT_YET


def _joinable(a: Covered, b: Covered, now: datetime) -> bool:
    if a.end != b.start or a.answer is not b.answer or a.final != b.final or a.answer is Answer.PARTIAL:
        return False
    return a.asked_at == b.asked_at or max(a.asked_at, b.asked_at) < now - _JOIN_AFTER


def touches(covered: Iterable[Covered], span: Interval, work_id: str) -> bool:
    """Return whether rows of the span may be in the store already, other than those this work put there."""
    return any(
        piece.start < span.end
        and piece.end > span.start
        and piece.answer is not Answer.NOT_YET
        and not (piece.answer is Answer.PARTIAL and piece.work_id == work_id)
        for piece in covered
    )
