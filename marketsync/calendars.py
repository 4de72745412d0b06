"""Trading calendars: which days have a session, when each opens and closes, and the user's corrections to that.

Sessions are computed by exchange-calendars (ISO 10383 names such as XNYS and XSHG, 24/7, and aliases such as NASDAQ)
once, and kept in a small file: the library imports pandas, 1.7 s of CPU that no process should pay twice. What a
dataset's publication and settling make of a calendar is in `timing.py`.
"""

from __future__ import annotations

import difflib
import os
import tempfile
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING
from zoneinfo import ZoneInfo

from marketsync.errors import ConfigurationError

if TYPE_CHECKING:
    from marketsync.upstream import MarketHours

LIBRARY = "exchange-calendars"
EARLIEST_YEAR = 1970  # asked of the library unless a plan's `since` is older
_HOURS_LEARNED_FROM_SESSIONS = 21
_FREQUENT = {"24/5", "24/7", "XETR", "XHKG", "XKRX", "XLON", "XNAS", "XNYS", "XPAR", "XSHG", "XTKS", "XTSE"}


class CalendarRangeError(ConfigurationError):
    """A day was asked for that the calendar says nothing about; the message names the days it knows."""


@dataclass(frozen=True)
class Calendar:
    """The sessions of one market, oldest first, with the instants at which each opens and closes.

    Days are proleptic ordinals (`date.toordinal`), instants Unix seconds. The calendar answers for every day from
    `first_day` to `last_day`, both included; asking about another day raises `CalendarRangeError`, because "no
    session" would be a guess.
    """

    name: str
    zone: str
    first_day: date
    last_day: date
    days: tuple[int, ...]
    opens: tuple[int, ...]
    closes: tuple[int, ...]

    @classmethod
    def of(
        cls,
        name: str,
        sessions: Iterable[date],
        *,
        zone: str = "UTC",
        opens_at: time = time(9, 30),
        closes_at: time = time(16),
        first_day: date | None = None,
        last_day: date | None = None,
    ) -> Calendar:
        """Make a calendar from a list of days that all have the same local hours."""
        days = sorted(set(sessions))
        if not days and (first_day is None or last_day is None):
            raise ValueError("a calendar without sessions needs first_day and last_day")
        tz = ZoneInfo(zone)
        return cls(
            name,
            zone,
            first_day or days[0],
            last_day or days[-1],
            tuple(day.toordinal() for day in days),
            tuple(int(datetime.combine(day, opens_at, tz).timestamp()) for day in days),
            tuple(int(datetime.combine(day, closes_at, tz).timestamp()) for day in days),
        )

    def __len__(self) -> int:
        return len(self.days)

    def sessions(self, start: date, end: date) -> list[date]:
        """Return the sessions from `start` up to and excluding `end`."""
        if start >= end:
            return []
        self.require(start)
        self.require(end - timedelta(days=1))
        first, last = bisect_left(self.days, start.toordinal()), bisect_left(self.days, end.toordinal())
        return [date.fromordinal(day) for day in self.days[first:last]]

    def is_session(self, day: date) -> bool:
        """Tell whether the day has a session."""
        self.require(day)
        at = bisect_left(self.days, day.toordinal())
        return at < len(self.days) and self.days[at] == day.toordinal()

    def open(self, session: date) -> datetime:
        """Return the instant (UTC) at which the session opens; for futures it may be on the day before."""
        return datetime.fromtimestamp(self.opens[self._index(session)], UTC)

    def close(self, session: date) -> datetime:
        """Return the instant (UTC) at which the session closes."""
        return datetime.fromtimestamp(self.closes[self._index(session)], UTC)

    def minutes(self, sessions: Sequence[date]) -> int:
        """Return how many minutes these consecutive sessions last together, breaks at noon included."""
        if not sessions:
            return 0
        first, after = self._index(sessions[0]), self._index(sessions[-1]) + 1
        return (sum(self.closes[first:after]) - sum(self.opens[first:after])) // 60

    def session_after(self, day: date) -> date:
        """Return the first session after the day (which need not be one)."""
        return self.following(day, 1)

    def session_before(self, day: date) -> date:
        """Return the last session before the day (which need not be one)."""
        return self.previous(day, 1)

    def previous(self, day: date, count: int) -> date:
        """Return the `count`-th session before the day; 0 is the last session on or before it."""
        self.require(day)
        at = (bisect_right if count == 0 else bisect_left)(self.days, day.toordinal()) - max(count, 1)
        if at < 0:
            raise self._outside(f"has no {count} sessions before {day}")
        return date.fromordinal(self.days[at])

    def following(self, day: date, count: int) -> date:
        """Return the `count`-th session after the day; 0 is the first session on or after it."""
        self.require(day)
        at = (bisect_left if count == 0 else bisect_right)(self.days, day.toordinal()) + max(count, 1) - 1
        if at >= len(self.days):
            raise self._outside(f"has no {count} sessions after {day}")
        return date.fromordinal(self.days[at])

    def last_closed(self, now: datetime) -> date:
        """Return the last session that has closed at `now`."""
        self.require(now.astimezone(ZoneInfo(self.zone)).date())
        at = bisect_right(self.closes, now.timestamp()) - 1
        if at < 0:
            raise self._outside(f"has no session that closed by {now:%Y-%m-%d %H:%M} UTC")
        return date.fromordinal(self.days[at])

    def next_session(self, now: datetime) -> date:
        """Return the first session that opens after `now`."""
        self.require(now.astimezone(ZoneInfo(self.zone)).date())
        at = bisect_right(self.opens, now.timestamp())
        if at >= len(self.days):
            raise self._outside(f"has no session that opens after {now:%Y-%m-%d %H:%M} UTC")
        return date.fromordinal(self.days[at])

    def is_open(self, now: datetime) -> bool:
        """Tell whether a session is under way (its breaks count as open)."""
        at = bisect_right(self.opens, now.timestamp()) - 1
        return at >= 0 and now.timestamp() < self.closes[at]

    def _index(self, session: date) -> int:
        self.require(session)
        at = bisect_left(self.days, session.toordinal())
        if at == len(self.days) or self.days[at] != session.toordinal():
            raise ValueError(f"{session} is not a session of {self.name}")
        return at

    def require(self, day: date) -> None:
        """Raise `CalendarRangeError` for a day that the calendar says nothing about."""
        if not self.first_day <= day <= self.last_day:
            raise self._outside(f"says nothing about {day}")

    def _outside(self, what: str) -> CalendarRangeError:
        return CalendarRangeError(
            f"calendar {self.name} {what}: it is known from {self.first_day} to {self.last_day}; begin the plan later, "
            f"upgrade {LIBRARY}, or list the sessions under market_hours.{self.name}.sessions in upstream.yml"
        )


def load_calendar(
    name: str,
    cache_dir: Path | None = None,
    market_hours: MarketHours | None = None,
    *,
    since: date | None = None,
    now: datetime | None = None,
) -> Calendar:
    """Return the calendar, with the user's corrections, known from 1970 (or `since`) to the end of next year.

    Where the library knows less (XSHG begins in December 1990), so does the calendar; of United States holidays before
    1970 it knows few. `cache_dir` is where computed
    sessions are kept; None computes them anew in each process. Raises `ConfigurationError` for an unknown name, with
    the near ones.
    """
    now = now or datetime.now(UTC)
    first_year = min(EARLIEST_YEAR, since.year if since else EARLIEST_YEAR)
    calendar = _computed(name, cache_dir, first_year, now.year + 1)
    return corrected(calendar, market_hours) if market_hours else calendar


def corrected(calendar: Calendar, market_hours: MarketHours) -> Calendar:
    """Return the calendar without the further holidays and with the further sessions.

    A further session gets the hours that most of the sessions around it have, and extends the days the calendar
    knows when it lies beyond them.
    """
    holidays = {day.toordinal() for day in market_hours.holidays}
    rows = {
        day: (opens, closes)
        for day, opens, closes in zip(calendar.days, calendar.opens, calendar.closes, strict=True)
        if day not in holidays
    }
    for session in market_hours.sessions:
        if session.toordinal() not in rows:
            rows[session.toordinal()] = _usual_hours(calendar, session)
    days = tuple(sorted(rows))
    return Calendar(
        calendar.name,
        calendar.zone,
        min([calendar.first_day, *market_hours.sessions]),
        max([calendar.last_day, *market_hours.sessions]),
        days,
        tuple(rows[day][0] for day in days),
        tuple(rows[day][1] for day in days),
    )


def _usual_hours(calendar: Calendar, session: date) -> tuple[int, int]:
    zone = ZoneInfo(calendar.zone)
    at = bisect_left(calendar.days, session.toordinal())
    near = slice(max(0, at - _HOURS_LEARNED_FROM_SESSIONS), at + _HOURS_LEARNED_FROM_SESSIONS)

    def most_common(instants: Sequence[int]) -> int:
        def offset(day: int, instant: int) -> tuple[int, time]:
            local = datetime.fromtimestamp(instant, zone)
            return local.date().toordinal() - day, local.time()

        pairs = zip(calendar.days[near], instants[near], strict=True)
        found = Counter(offset(day, instant) for day, instant in pairs).most_common(1)
        days, clock = found[0][0] if found else (0, time(0))
        return int(datetime.combine(session + timedelta(days=days), clock, zone).timestamp())

    return most_common(calendar.opens), most_common(calendar.closes)


# ---------------------------------------------------------------- the library and the file


def instead_of(name: str) -> str | None:
    """Return what to write instead of a name that no calendar has, or None when one has it.

    The library, which knows all names and aliases, takes half a second to load: the frequent ones go without it.
    """
    if name in _FREQUENT:
        return None
    import exchange_calendars

    by_upper = {one.upper(): one for one in exchange_calendars.get_calendar_names(include_aliases=True)}
    if name in by_upper.values():
        return None
    if near := difflib.get_close_matches(name.upper(), list(by_upper), n=4, cutoff=0.5):
        return f"did you mean {', '.join(by_upper[one] for one in near)}?"
    return "calendars go by ISO 10383: XNYS, XNAS, XSHG, XHKG, XLON, XTKS ...; 24/7 for markets that never close"


@lru_cache(maxsize=64)
def _computed(name: str, cache_dir: Path | None, first_year: int, last_year: int) -> Calendar:
    if cache_dir is None:
        return _ask_library(name, first_year, last_year)
    from importlib.metadata import version

    # Of pandas, too: with pandas 3 the library loses sessions (XBOM, XKRX, XMOS) and five calendars altogether.
    versions = f"{version(LIBRARY)}-pandas{version('pandas')}"
    file = cache_dir / f"{name.replace('/', '-')}-{versions}-{first_year}-{last_year}.json"
    calendar = _read(file)
    if calendar is None:
        calendar = _ask_library(name, first_year, last_year)
        _write(file, calendar)
    return calendar


def _read(file: Path) -> Calendar | None:
    import msgspec

    try:
        return msgspec.json.decode(file.read_bytes(), type=Calendar)
    except (OSError, msgspec.DecodeError):
        return None  # not there, or not whole: it is computed again


def _write(file: Path, calendar: Calendar) -> None:
    import msgspec

    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=file.name, suffix=".part")
        with os.fdopen(handle, "wb") as out:
            out.write(msgspec.json.encode(calendar))
        os.replace(temporary, file)
    except OSError:
        return  # a folder that cannot be written costs time at the next start, nothing else


def _ask_library(name: str, first_year: int, last_year: int) -> Calendar:
    import exchange_calendars
    import pandas
    from exchange_calendars.calendar_utils import global_calendar_dispatcher as dispatcher

    if (remedy := instead_of(name)) is not None:
        raise ConfigurationError(f"there is no calendar '{name}': {remedy}")
    try:
        factory = dispatcher._calendar_factories[dispatcher.resolve_alias(name)]
        least, most = factory.bound_min(), factory.bound_max()
        first, last = date(first_year, 1, 1), date(last_year, 12, 31)
        first = max(first, date(least.year, least.month, least.day)) if least is not None else first
        last = min(last, date(most.year, most.month, most.day)) if most is not None else last
        computed = factory(start=first.isoformat(), end=last.isoformat())
    except (ValueError, NotImplementedError, ArithmeticError) as error:
        raise ConfigurationError(
            f"calendar {name} cannot be computed for {first_year} to {last_year} by {LIBRARY} "
            f"{exchange_calendars.__version__} with pandas {pandas.__version__}: {str(error)[:200]} (install the "
            "versions that requirements/ names, or choose another calendar)"
        ) from error
    schedule = computed.schedule
    stamps = schedule[["open", "close"]].apply(lambda column: column.dt.as_unit("s").astype("int64"))
    return Calendar(
        name,
        str(computed.tz),
        first,
        last,
        tuple(day.date().toordinal() for day in schedule.index),
        tuple(int(stamp) for stamp in stamps["open"]),
        tuple(int(stamp) for stamp in stamps["close"]),
    )
