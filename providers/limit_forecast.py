"""How long a number of requests will take under the limits: when they are done, and which limit is to blame.

Pure arithmetic on how the limits stand (`Limiter.state`). Quotas are exact; windows and speed are estimates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from providers.limit_windows import Kind, LimitState, Resets, hold_ms, longest_ms


@dataclass(frozen=True)
class Forecast:
    """When the requests are done. `binding` is the limit that costs most of the time (None: only the answers take
    time); `periods` is in how many days (or months) of the quotas requests are sent (0 without quotas)."""

    requests: int
    seconds: float
    done_at: datetime
    binding: LimitState | None
    periods: int


def plan_ahead(
    states: Sequence[LimitState],
    requests: int,
    *,
    now: datetime,
    weight: int = 1,
    seconds_per_request: float = 0.2,
    threads: int = 4,
) -> Forecast | None:
    """Return when `requests` of `weight` units each are done; None when a limit is smaller than one request.

    Parameters
    ----------
    states : how each limit stands at `now`.
    seconds_per_request : from sending to the last byte, a guess or a measurement.
    threads : how many are under way at once, where no concurrency limit says less.
    """
    if any(state.limit < weight for state in states if state.kind is not Kind.CONCURRENT):
        return None
    now = now.astimezone(UTC)
    quotas = [_Budget(state, weight, now) for state in states if state.kind is Kind.QUOTA]
    speed = _Speed(states, weight, seconds_per_request, threads)
    blame = _Blame()
    left, since, sent, periods = requests, now, 0, 0  # `sent` requests in the stretch of work that began at `since`
    while True:
        room = min([left, *(quota.left for quota in quotas)])
        boundary = min((quota.ends for quota in quotas), default=None)
        count = room if boundary is None else speed.count((boundary - since).total_seconds(), sent, room)
        periods += bool(quotas and count)
        if count == left or boundary is None:
            blame.stretch(speed, sent + count)
            done_at = since + timedelta(seconds=speed.seconds(sent + count))
            return Forecast(requests, (done_at - now).total_seconds(), done_at, blame.worst(), periods)
        left -= count
        sent += count
        for quota in quotas:
            quota.left -= count
        if count == room:  # a quota is spent: nothing is sent until the boundary
            blame.stretch(speed, sent)
            spent = max((quota for quota in quotas if quota.left == 0), key=lambda quota: quota.ends)
            blame.add(spent.state, (boundary - since).total_seconds() - speed.seconds(sent))
            since, sent = boundary, 0
            speed.rested()
        for quota in quotas:
            if quota.ends <= boundary:
                quota.renew()


class _Budget:
    """A quota on its way through its periods; `left` counts requests."""

    def __init__(self, state: LimitState, weight: int, now: datetime):
        if state.per is None or state.resets is None:
            raise ValueError(f"the quota {state.name} does not say when it resets")
        self.state = state
        self.left = state.remaining // weight
        self._all = state.limit // weight
        self._resets = Resets(state.per.unit, state.resets)
        self.ends = state.resets_at or self._end_after(now)

    def renew(self) -> None:
        self.left = self._all
        self.ends = self._end_after(self.ends)

    def _end_after(self, instant: datetime) -> datetime:
        return datetime.fromtimestamp(self._resets.period(int(instant.timestamp() * 1000))[1] / 1000, UTC)


class _Speed:
    """How many requests a stretch of uninterrupted work gets through, and what holds them up."""

    def __init__(self, states: Sequence[LimitState], weight: int, seconds_per_request: float, threads: int):
        concurrent = [state for state in states if state.kind is Kind.CONCURRENT]
        self.narrow = min(concurrent, key=lambda state: state.limit, default=None)
        if self.narrow is not None and self.narrow.limit >= threads:
            self.narrow = None
        self.free_seconds = seconds_per_request / threads  # for each request, when nothing holds it up
        self._each = seconds_per_request / (self.narrow.limit if self.narrow else threads)
        self._windows: list[tuple[LimitState, int, int, float]] = []  # state, at once, in each turn, seconds of a turn
        for state in states:
            if state.kind is Kind.WINDOW and state.per is not None:
                turn = hold_ms(longest_ms(state.per)) / 1000 + seconds_per_request
                self._windows.append((state, state.remaining // weight, state.limit // weight, turn))

    def rested(self) -> None:
        """A pause has emptied the windows."""
        self._windows = [(state, turn, turn, seconds) for state, _, turn, seconds in self._windows]

    def by_cause(self, requests: int) -> dict[LimitState | None, float]:
        """Return what each cause alone would make the requests take, in seconds."""
        causes: dict[LimitState | None, float] = {self.narrow: requests * self._each}
        for state, at_once, in_turn, turn_seconds in self._windows:
            causes[state] = math.ceil(max(0, requests - at_once) / in_turn) * turn_seconds
        return causes

    def seconds(self, requests: int) -> float:
        return max(self.by_cause(requests).values())

    def count(self, seconds: float, sent: int, most: int) -> int:
        """Return how many more than `sent` are done within the stretch's first `seconds`, at most `most`."""
        low, high = 0, most
        while low < high:
            middle = (low + high + 1) // 2
            if self.seconds(sent + middle) <= seconds:
                low = middle
            else:
                high = middle - 1
        return low


class _Blame:
    def __init__(self) -> None:
        self._seconds: dict[LimitState, float] = {}

    def add(self, state: LimitState, seconds: float) -> None:
        self._seconds[state] = self._seconds.get(state, 0.0) + seconds

    def stretch(self, speed: _Speed, requests: int) -> None:
        causes = speed.by_cause(requests)
        state = max(causes, key=lambda cause: causes[cause])
        if state is not None:
            self.add(state, causes[state] - requests * speed.free_seconds)

    def worst(self) -> LimitState | None:
        return max(self._seconds, key=lambda state: self._seconds[state], default=None)
