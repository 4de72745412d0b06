"""What a limit counts, in memory: sliding windows, requests under way, calendar quotas, and when there is room again.

Pure arithmetic on integers (Unix milliseconds, units of weight): no clock, no file, no lock. What makes the counts
durable is in `limit_book.py`; what waits for room is in `limits.py`.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from enum import StrEnum

from marketsync.durations import DailyTime, Span, Unit

# A window is held a little longer than it is: the provider may read its clock a moment after the answer reached us,
# and two clocks may run 200 millionths apart (12 ms in a minute, 17 s in a day).
MARGIN_MS = 10
CLOCK_DRIFT = 200e-6
# The provider's midnight and ours may lie this far apart: a request this near to a reset is counted on both sides.
RESET_MARGIN_MS = 2_000
# A window remembers at most about this many answer times; later ones are rounded up into them.
SLOTS_PER_WINDOW = 1_000
HOUR_MS = 3_600_000


class Kind(StrEnum):
    """What refused a request."""

    WINDOW = "window"
    QUOTA = "quota"
    CONCURRENT = "concurrent"
    COOL_DOWN = "cool_down"


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why there is no room now. `free_ms` is the earliest instant there can be room; `resume_ms` what to tell a
    person (a quota's reset without the margin). A concurrency limit has no known instant: `free_ms` is now."""

    kind: Kind
    what: str
    scope: str
    free_ms: int
    resume_ms: int


@dataclass(frozen=True)
class LimitState:
    """How one limit stands. `used` counts what is under way; `resets_at` is when the next unit comes free (a window,
    None if all are free) or when the quota starts anew. A concurrency limit has no `per`."""

    name: str
    scope: str
    kind: Kind
    limit: int
    used: int
    per: Span | None = None
    resets: DailyTime | None = None
    resets_at: datetime | None = None

    @property
    def remaining(self) -> int:
        """What is left, never below zero."""
        return max(0, self.limit - self.used)


def longest_ms(per: Span) -> int:
    """Return the longest that a span can be, in milliseconds: a month is 31 days, a year 366."""
    longest = {Unit.MONTH: 31 * 24 * HOUR_MS, Unit.YEAR: 366 * 24 * HOUR_MS}
    return per.count * longest[per.unit] if per.unit in longest else round(per.seconds * 1000)


def hold_ms(span_ms: int) -> int:
    """Return how long after its answer a request counts in a window of this length."""
    return span_ms + MARGIN_MS + int(span_ms * CLOCK_DRIFT)


class Window:
    """A sliding window: how many units were answered in the last `span_ms`, kept as a running total.

    Answer times are rounded up to a thousandth of the window, so 50,000 answers cost no more than 1,000.
    """

    __slots__ = ("answered", "foreign", "foreign_total", "grain_ms", "hold_ms", "limit", "per", "slots", "span_ms")

    def __init__(self, limit: int, span_ms: int, per: Span):
        self.limit = limit
        self.span_ms = span_ms
        self.per = per
        self.hold_ms = hold_ms(span_ms)
        self.grain_ms = max(1, span_ms // SLOTS_PER_WINDOW)
        self.slots: deque[list[int]] = deque()  # [latest answer in the slot, units], ascending
        self.answered = 0
        self.foreign: list[tuple[int, int]] = []  # (counts until, units), ascending: use that is not ours
        self.foreign_total = 0

    def add(self, answered_ms: int, weight: int) -> None:
        """Count units answered at this instant (not later than now)."""
        slot = -(-answered_ms // self.grain_ms) * self.grain_ms
        if self.slots and self.slots[-1][0] >= slot:
            self.slots[-1][1] += weight
        else:
            self.slots.append([slot, weight])
        self.answered += weight

    def expire(self, now_ms: int) -> None:
        """Forget what no longer counts."""
        slots = self.slots
        while slots and slots[0][0] + self.hold_ms <= now_ms:
            self.answered -= slots.popleft()[1]
        if slots and slots[-1][0] > now_ms + self.grain_ms:
            self._restamp(now_ms)
        while self.foreign and self.foreign[0][0] <= now_ms:
            self.foreign_total -= self.foreign.pop(0)[1]

    def _restamp(self, now_ms: int) -> None:
        # The clock was set back. Everything here has been answered, so none of it is younger than now.
        late = 0
        while self.slots and self.slots[-1][0] > now_ms:
            late += self.slots.pop()[1]
        self.slots.append([now_ms, late])

    def set_foreign(self, entries: Iterable[tuple[int, int]]) -> None:
        """Replace the use that is not ours: (counts until, units)."""
        self.foreign = sorted(entries)
        self.foreign_total = sum(weight for _, weight in self.foreign)

    def used(self, pending: int) -> int:
        """The units that count now, given those under way."""
        return self.answered + self.foreign_total + pending

    def free_at(self, now_ms: int, pending: int, weight: int) -> int | None:
        """Return None when `weight` units fit now, else the earliest instant at which they can."""
        excess = self.answered + self.foreign_total + pending + weight - self.limit
        if excess <= 0:
            return None
        frees: Iterable[tuple[int, int]] = ((end + self.hold_ms, units) for end, units in self.slots)
        if self.foreign:
            frees = heapq.merge(frees, self.foreign)
        for free_ms, units in frees:
            excess -= units
            if excess <= 0:
                return max(free_ms, now_ms + 1)
        return now_ms + self.hold_ms  # what is under way is answered now at the earliest


class Resets:
    """When a day or month quota starts anew: every local day (or every first of a month) at a time in a zone."""

    def __init__(self, unit: Unit, daily: DailyTime):
        self.unit = unit
        self.daily = daily
        self._span = (1, 0)

    def __str__(self) -> str:
        return f"{self.unit} {self.daily.at:%H:%M:%S} {self.daily.zone.key}"

    def period(self, at_ms: int) -> tuple[int, int]:
        """Return start and end (exclusive) of the period that holds the instant, in Unix milliseconds."""
        start, end = self._span
        if not start <= at_ms < end:
            start, end = self._span = self._find(at_ms)
        return start, end

    def _find(self, at_ms: int) -> tuple[int, int]:
        instant = datetime.fromtimestamp(at_ms // 1000, UTC)
        local = instant.astimezone(self.daily.zone).date()
        steps = [self.daily.on(_step(local, ahead, self.unit)) for ahead in (-2, -1, 0, 1, 2)]
        before = max(step for step in steps if step <= instant)
        after = min(step for step in steps if step > instant)
        return int(before.timestamp() * 1000), int(after.timestamp() * 1000)


def _step(day: date, ahead: int, unit: Unit) -> date:
    if unit is Unit.DAY:
        return day + timedelta(days=ahead)
    months = day.year * 12 + day.month - 1 + ahead
    return date(months // 12, months % 12 + 1, 1)


class Quota:
    """A budget that starts anew at a reset. `used` maps a period's start to the units spent in it."""

    __slots__ = ("limit", "per", "resets", "rule", "used")

    def __init__(self, limit: int, per: Span, resets: Resets):
        self.limit = limit
        self.per = per
        self.resets = resets
        self.rule = str(resets)
        self.used: dict[int, int] = {}

    def periods(self, from_ms: int, until_ms: int) -> list[tuple[int, int]]:
        """Return the periods (start, end) in which a provider may count a request under way between the instants."""
        found = [self.resets.period(from_ms - RESET_MARGIN_MS)]
        while found[-1][1] <= until_ms + RESET_MARGIN_MS:
            found.append(self.resets.period(found[-1][1]))
        return found

    def free_at(self, now_ms: int, until_ms: int, weight: int) -> tuple[int, int] | None:
        """Return None when `weight` units fit, else (earliest instant, reset to tell a person)."""
        for start, end in self.periods(now_ms, until_ms):
            if self.used.get(start, 0) + weight > self.limit:
                # A full next period is no reason to wait for its end: wait until this request is wholly inside it,
                # or, if that is where we are, for its end.
                reset = start if start > now_ms else end
                return reset + RESET_MARGIN_MS, reset
        return None


class Scope:
    """Everything counted together (a provider, an account, a dataset): its limits, and what is under way."""

    __slots__ = ("_ends", "concurrent", "key", "pending", "pending_weight", "quotas", "under_way", "windows")

    def __init__(self, key: str, windows: list[Window], quotas: list[Quota], concurrent: int | None):
        self.key = key
        self.windows = windows
        self.quotas = quotas
        self.concurrent = concurrent
        self.pending: dict[int, tuple[int, int, int]] = {}  # reservation: (counts as answered at, units, holder)
        self.pending_weight = 0
        self.under_way: dict[int, int] = {}  # reservation: holder; without those of dead processes
        self._ends: list[tuple[int, int]] = []

    def begin(self, reservation: int, until_ms: int, weight: int, holder: int) -> None:
        """Count a request as under way; it counts as answered at `until_ms` if nobody says otherwise."""
        self.pending[reservation] = (until_ms, weight, holder)
        self.pending_weight += weight
        self.under_way[reservation] = holder
        heapq.heappush(self._ends, (until_ms, reservation))

    def end(self, reservation: int, answered_ms: int, weight: int) -> None:
        """Count a request as answered. One that is not known to be under way is counted all the same."""
        begun = self.pending.pop(reservation, None)
        if begun is not None:
            self.pending_weight -= begun[1]
            self.under_way.pop(reservation, None)
        if weight:
            if self._ends and self._ends[0][0] < answered_ms:
                self._end_overdue(answered_ms)  # in order, so that none is rounded up to a later one
            for window in self.windows:
                window.add(answered_ms, weight)

    def _end_overdue(self, now_ms: int) -> None:
        ends = self._ends
        while ends and ends[0][0] <= now_ms:
            until_ms, reservation = heapq.heappop(ends)
            begun = self.pending.get(reservation)
            if begun is not None and begun[0] == until_ms:
                self.end(reservation, until_ms, begun[1])

    def expire(self, now_ms: int) -> None:
        """Count the overdue as answered, and forget what windows no longer hold."""
        self._end_overdue(now_ms)
        ends = self._ends
        if len(ends) > 64 and len(ends) > 4 * len(self.pending):
            self._ends = [(begun[0], reservation) for reservation, begun in self.pending.items()]
            heapq.heapify(self._ends)
        for window in self.windows:
            window.expire(now_ms)

    def refusal(self, now_ms: int, until_ms: int, weight: int) -> Refusal | None:
        """Return None when there is room for a request, else the limit that makes it wait longest."""
        worst: Refusal | None = None
        for window in self.windows:
            if (free_ms := window.free_at(now_ms, self.pending_weight, weight)) is not None and (
                worst is None or free_ms > worst.free_ms
            ):
                worst = Refusal(Kind.WINDOW, f"{window.limit} per {window.per}", self.key, free_ms, free_ms)
        for quota in self.quotas:
            if (free := quota.free_at(now_ms, until_ms, weight)) is not None and (
                worst is None or free[0] > worst.free_ms
            ):
                what = f"{quota.limit} per {quota.per}, resets {quota.resets.daily.at:%H:%M} {quota.resets.daily.zone}"
                worst = Refusal(Kind.QUOTA, what, self.key, *free)
        if worst is None and self.concurrent is not None and len(self.under_way) >= self.concurrent:
            return Refusal(Kind.CONCURRENT, f"{self.concurrent} at once", self.key, now_ms, now_ms)
        return worst
