"""When a dataset's rows can be had, when an answer is final, what is asked again: its timing on its calendar. Pure.

Positions are aware UTC datetimes; a session (or a calendar day) d is the interval from d 00:00Z to d+1 00:00Z.

Which session a row belongs to. Where rows go by date (a date column, or one row a session), a row belongs to its
date: of a datetime, the UTC date when it is exactly midnight UTC, else the local date on the calendar. Where rows are
instants within sessions (minute bars, trades), a row belongs to the window that holds its UTC time. A session that
crosses UTC midnight (futures, Sydney) then lies in two windows, so for instants nothing later than the asking is ever
wanted or final: what a session adds after the asking is owed by the next run.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from zoneinfo import ZoneInfo

from marketsync.calendars import Calendar, CalendarRangeError
from marketsync.definition import Dataset
from marketsync.durations import Publication, Span, Unit, parse_publication, parse_span
from marketsync.schema import ColumnType

_DAY = timedelta(days=1)
_GRACE = Span(3, Unit.DAY)


@dataclass(frozen=True)
class Timing:
    """What a dataset says about publication, settling, restating and grace, with its calendar.

    `by_date`: rows go by session date or calendar day; otherwise they are instants. `minutes`: they are minute bars,
    of which the one under way is never wanted.
    """

    calendar: Calendar | None = None
    published: Publication | None = None
    settles: Span | None = None
    restates: Span | None = None
    grace: Span = _GRACE
    by_date: bool = True
    minutes: bool = False

    @classmethod
    def of(cls, dataset: Dataset, calendar: Calendar | None = None) -> Timing:
        """Read the timing of a dataset; one row a session without a stated publication is published at the close."""
        column = dataset.time_column
        dated = column is None or dataset.columns[column].type is ColumnType.DATE
        sessions = dataset.frequency == "session"
        published = parse_publication(dataset.published) if dataset.published else None
        return cls(
            calendar,
            published or (Publication() if sessions and calendar is not None else None),
            parse_span(dataset.settles) if dataset.settles else None,
            parse_span(dataset.restates) if dataset.restates else None,
            parse_span(dataset.grace),
            dated or sessions,
            dataset.frequency == "minute",
        )

    def published_at(self, session: date) -> datetime:
        """Return the instant from which the rows of a session can be had (its close where nothing is stated).

        Without a calendar a day's rows can be had when the day is over.
        """
        if self.calendar is None:
            return midnight(session) + _DAY
        close = self.calendar.close(session)
        return self.published.of(session, close) if self.published else close

    def settled_at(self, session: date) -> datetime | None:
        """Return the instant from which an answer about a session is final; None when the calendar ends before it."""
        if self.settles is None:
            return self.published_at(session)
        if self.settles.unit is not Unit.SESSION:
            return self.published_at(session) + _length(self.settles)
        if self.calendar is None:
            return self.published_at(session) + timedelta(days=self.settles.count)
        after = self._following(session, self.settles.count)
        return None if after is None else self.published_at(after)

    def hole_after(self, session: date) -> datetime:
        """Return the instant from which the absence of a session's rows is a hole: publication plus grace."""
        if self.grace.unit is Unit.SESSION and self.calendar is not None:
            after = self._following(session, self.grace.count)
            if after is not None:
                return self.published_at(after)
        return self.published_at(session) + _length(self.grace)

    def wanted_until(self, now: datetime) -> datetime:
        """Return the end (exclusive) of what can be had: that of the last session whose rows are published.

        Where nothing is stated: `now` for instants, the end of the day that is under way for rows by date.
        """
        if self.published is not None and self.calendar is not None:
            last = self.last_published(now)
            return midnight(self.calendar.first_day) if last is None else self._end(last, now)
        return midnight(self._today(now)) + _DAY if self.by_date else self._clamped(now)

    def final_until(self, asked_at: datetime) -> datetime:
        """Return the end (exclusive) of what an answer given at `asked_at` settles for good.

        That is the end of the last session that was published, and had settled, when it was asked about. Where
        nothing is stated, the instant of asking less the time to settle, and of rows by date the days then over.
        """
        calendar = self.calendar
        in_sessions = self.settles is not None and self.settles.unit is Unit.SESSION
        if calendar is not None and (self.published is not None or in_sessions):
            last = self._last(asked_at, self.settled_at)
            return midnight(calendar.first_day) if last is None else self._end(last, asked_at)
        settled = asked_at - (_length(self.settles) if self.settles else timedelta())
        return midnight(self._today(settled)) if self.by_date else self._clamped(settled)

    def restated_since(self, now: datetime) -> datetime | None:
        """Return the start of the rows that every run asks again: the last N published sessions, or the last N days
        (hours, minutes ...) of what is wanted; None when the dataset does not restate."""
        if self.restates is None:
            return None
        calendar = self.calendar
        if self.restates.unit is Unit.SESSION and calendar is not None:
            last = self._last(now, self.published_at)
            if last is None:
                return midnight(calendar.first_day)
            try:
                first = calendar.previous(last, self.restates.count - 1)
            except CalendarRangeError:
                return midnight(calendar.first_day)
            return midnight(first) if self.by_date else min(midnight(first), calendar.open(first))
        since = self.wanted_until(now) - _length(self.restates)
        return midnight(since.date()) if self.by_date else since

    def last_published(self, now: datetime) -> date | None:
        """Return the last session whose rows can be had at `now`; None when there is none (or no calendar)."""
        return self._last(now, self.published_at)

    def _last(self, now: datetime, due: Callable[[date], datetime | None]) -> date | None:
        if self.calendar is None:
            return None
        days = self.calendar.days
        today = self._today(now)
        self.calendar.require(today)
        for at in range(bisect_right(days, today.toordinal()) - 1, -1, -1):
            session = date.fromordinal(days[at])
            moment = due(session)
            if moment is not None and moment <= now:
                return session
        return None

    def _end(self, session: date, now: datetime) -> datetime:
        end = midnight(session) + _DAY
        if self.by_date or self.calendar is None:
            return end
        after = self._following(session, 1)
        if after is not None:
            # The evening of a futures day belongs to the next session, which is not published.
            end = min(end, self.calendar.open(after))
        return self._clamped(min(end, now))

    def _clamped(self, now: datetime) -> datetime:
        now = now.astimezone(UTC)
        return now.replace(second=0, microsecond=0) if self.minutes else now

    def _following(self, session: date, count: int) -> date | None:
        assert self.calendar is not None
        try:
            return self.calendar.following(session, count)
        except CalendarRangeError:
            return None

    def _today(self, now: datetime) -> date:
        return now.astimezone(ZoneInfo(self.calendar.zone) if self.calendar else UTC).date()


def midnight(day: date) -> datetime:
    """Return midnight UTC of a day: the position of a session date."""
    return datetime.combine(day, time(), UTC)


def _length(span: Span) -> timedelta:
    """Months, years and (without a calendar) sessions have their average length."""
    return timedelta(days=span.count) if span.unit is Unit.SESSION else timedelta(seconds=span.approximate_seconds)
