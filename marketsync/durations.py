"""Spans and moments as people write them in YAML: "5 years", "30 minutes after close", "19:00 America/New_York".

Pure parsing and arithmetic; what needs a trading calendar takes its sessions from the caller.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from enum import StrEnum
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError


class Unit(StrEnum):
    """A unit a span can be counted in. Sessions are counted on a calendar."""

    MILLISECOND = "millisecond"
    SECOND = "second"
    MINUTE = "minute"
    HOUR = "hour"
    DAY = "day"
    WEEK = "week"
    MONTH = "month"
    YEAR = "year"
    SESSION = "session"


_SECONDS = {
    Unit.MILLISECOND: 0.001,
    Unit.SECOND: 1.0,
    Unit.MINUTE: 60.0,
    Unit.HOUR: 3600.0,
    Unit.DAY: 86400.0,
    Unit.WEEK: 604800.0,
}
# What can be measured with a clock; months, years and sessions differ in length.
FIXED_UNITS = tuple(_SECONDS)
_SPAN = re.compile(r"^\s*(?:(\d+)\s*)?(millisecond|second|minute|hour|day|week|month|year|session|ms|s|min|h|d)s?\s*$")
_ALIAS = {"ms": "millisecond", "s": "second", "min": "minute", "h": "hour", "d": "day"}


@dataclass(frozen=True)
class Span:
    """A count of units, such as 5 years."""

    count: int
    unit: Unit

    def __str__(self) -> str:
        return f"{self.count} {self.unit}{'' if self.count == 1 else 's'}"

    @property
    def seconds(self) -> float:
        """The length in seconds; ValueError for months, years and sessions, whose length varies."""
        if self.unit not in _SECONDS:
            raise ValueError(f"'{self}' has no fixed length; use days, hours, minutes or seconds")
        return self.count * _SECONDS[self.unit]

    @property
    def approximate_seconds(self) -> float:
        """The length in seconds, with 30.44-day months, 365.25-day years and 1.45-day sessions."""
        rough = {Unit.MONTH: 2_629_800.0, Unit.YEAR: 31_557_600.0, Unit.SESSION: 125_280.0}
        return self.count * (_SECONDS.get(self.unit) or rough[self.unit])


def parse_span(text: str) -> Span:
    """Read "5 years", "day", "500 ms"; ValueError says what is valid."""
    found = _SPAN.match(text.lower())
    if not found or found.group(1) == "0":
        raise ValueError(
            f"'{text}' is not a span of time; write a positive number and a unit: "
            "milliseconds, seconds, minutes, hours, days, weeks, months, years or sessions"
        )
    unit = found.group(2)
    return Span(int(found.group(1) or 1), Unit(_ALIAS.get(unit, unit)))


def parse_span_of(text: str, units: Collection[Unit]) -> Span:
    """Read a span of one of these units; ValueError says which there are."""
    span = parse_span(text)
    if span.unit not in units:
        *several, last = (f"{unit}s" for unit in units)
        raise ValueError(f"'{text}' cannot be counted here; write {', '.join(several)} or {last}")
    return span


def parse_zone(text: str) -> ZoneInfo:
    """Read an IANA time zone name; ValueError names the remedy."""
    try:
        return ZoneInfo(text)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise ValueError(f"'{text}' is not a time zone; use an IANA name such as America/New_York or UTC") from None


@dataclass(frozen=True)
class DailyTime:
    """A time of day in a zone, such as 19:00 America/New_York."""

    at: time
    zone: ZoneInfo

    def on(self, day: date) -> datetime:
        """Return that time on that local day, as an instant in UTC."""
        return datetime.combine(day, self.at, self.zone).astimezone(UTC)

    def next_after(self, instant: datetime) -> datetime:
        """Return the first such time strictly after the instant, in UTC."""
        day = instant.astimezone(self.zone).date()
        for ahead in (0, 1, 2):
            moment = self.on(day + timedelta(days=ahead))
            if moment > instant:
                return moment
        raise AssertionError("a daily time comes at least every other day")


_DAILY = re.compile(r"^\s*(\d{1,2}):(\d{2})(?::(\d{2}))?\s+(\S+)\s*$")


def parse_daily_time(text: str) -> DailyTime:
    """Read "19:00 America/New_York"."""
    found = _DAILY.match(text)
    if not found:
        raise ValueError(f"'{text}' is not a time of day with a zone; write for example 19:00 America/New_York")
    hour, minute, second = int(found.group(1)), int(found.group(2)), int(found.group(3) or 0)
    if hour > 23 or minute > 59 or second > 59:
        raise ValueError(f"'{text}' is not a time of day")
    return DailyTime(time(hour, minute, second), parse_zone(found.group(4)))


@dataclass(frozen=True)
class Publication:
    """When a session's rows can be had: `delay` after its close, or at a daily time `days` days after it."""

    delay: Span | None = None
    daily: DailyTime | None = None
    days: int = 0

    def of(self, session: date, close: datetime) -> datetime:
        """Return the instant at which the rows of a session that closes at `close` are published."""
        if self.daily is not None:
            return self.daily.on(session + timedelta(days=self.days))
        return close + timedelta(seconds=self.delay.seconds if self.delay else 0)


_PUBLISHED = re.compile(r"^\s*(?:(next day|\d+ days? later)\s+)?(\d{1,2}:\d{2}(?::\d{2})?\s+\S+)\s*$")


def parse_publication(text: str) -> Publication:
    """Read "at close", "30 minutes after close", "18:00 Asia/Shanghai", "next day 11:00 America/New_York"."""
    plain = text.strip().lower()
    if plain == "at close":
        return Publication()
    if plain.endswith("after close"):
        return Publication(delay=parse_span_of(plain.removesuffix("after close").strip(), FIXED_UNITS))
    found = _PUBLISHED.match(text)
    if found:
        lead = found.group(1)
        days = 0 if not lead else 1 if lead == "next day" else int(lead.split()[0])
        return Publication(daily=parse_daily_time(found.group(2)), days=days)
    raise ValueError(
        f"'{text}' does not say when rows are published; write 'at close', '30 minutes after close', "
        "'18:00 Asia/Shanghai' or 'next day 11:00 America/New_York'"
    )


_EPOCH_YEAR = 1970
# Where market data can be: what every store keeps, and arithmetic with windows does not leave the calendar.
FIRST_DAY, LAST_DAY = date(1700, 1, 1), date(2261, 12, 31)


def within_reach(value: date | datetime | None) -> date | datetime | None:
    """Return the value when its day can hold market data; raises ValueError with the days that can."""
    if value is not None and not FIRST_DAY.year <= value.year <= LAST_DAY.year:
        raise ValueError(
            f"{value} is out of reach; choose a day from {FIRST_DAY} to {LAST_DAY} (leave it out for none)"
        )
    return value


def parse_when(text: str) -> date | datetime:
    """Read a day (2024-01-31) or an instant (2024-01-31T12:00:00Z); raises ValueError with what would be right."""
    try:
        value = date.fromisoformat(text) if len(text) <= len("2024-01-31") else datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(f"'{text}' is no date; write 2024-01-31 or 2024-01-31T12:00:00Z") from None
    within_reach(value)
    return value


def window_floor(instant: datetime, every: Span) -> datetime:
    """Return the start of the anchored window that holds the instant.

    Years and months are anchored to January 1970, days and weeks to Thursday 1 January 1970 (weeks to Monday),
    shorter units to the epoch; so the same instant is in the same window whatever a plan's `since` says.
    """
    instant = instant.astimezone(UTC)
    if every.unit is Unit.YEAR:
        year = _EPOCH_YEAR + (instant.year - _EPOCH_YEAR) // every.count * every.count
        return datetime(year, 1, 1, tzinfo=UTC)
    if every.unit is Unit.MONTH:
        months = (instant.year - _EPOCH_YEAR) * 12 + instant.month - 1
        months = months // every.count * every.count
        return datetime(_EPOCH_YEAR + months // 12, months % 12 + 1, 1, tzinfo=UTC)
    step = timedelta(seconds=every.seconds)
    origin = datetime(1969, 12, 29, tzinfo=UTC) if every.unit is Unit.WEEK else datetime(1970, 1, 1, tzinfo=UTC)
    return origin + (instant - origin) // step * step


def window_after(start: datetime, every: Span) -> datetime:
    """Return the end (exclusive) of the anchored window that starts at `start`."""
    if every.unit is Unit.YEAR:
        return datetime(start.year + every.count, 1, 1, tzinfo=UTC)
    if every.unit is Unit.MONTH:
        months = (start.year * 12 + start.month - 1) + every.count
        return datetime(months // 12, months % 12 + 1, 1, tzinfo=UTC)
    return start + timedelta(seconds=every.seconds)
