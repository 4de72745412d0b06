"""Whatever is asked, answered, lost and restarted: no window of any limit ever holds more than it may.

One model judges the limiter by itself (safe, and not later than it must be); one simulated server with random delays
judges it by the server's own log, with two processes sharing a state folder and answers that are never recorded.
"""

from __future__ import annotations

import heapq
import itertools
import random
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

from hypothesis import given, settings
from hypothesis import strategies as st

from marketsync.clock import ManualClock
from marketsync.definition import Limit
from marketsync.errors import WaitingForQuota
from providers.limits import Limiter

START = datetime(2026, 3, 4, 12, tzinfo=UTC)
EPOCH = START.timestamp()


def limits_of(windows: list[tuple[int, int]]) -> list[Limit]:
    return [Limit(requests=limit, per=f"{span_ms} ms") for limit, span_ms in windows]


windows_of_limits = st.lists(st.tuples(st.integers(2, 9), st.integers(200, 5000)), min_size=1, max_size=3)


def earliest(begun: list[list], windows: list[tuple[int, int]], now: float, weight: int) -> float:
    """The latest instant at which a limiter that is as slow as it may be has room."""
    candidates = [now]
    for limit, span_ms in windows:
        hold = span_ms / 1000 * (1 + 200e-6) + 0.010 + 0.002  # margin, and rounding to milliseconds
        grain = span_ms / 1_000_000
        frees = sorted((end + hold + grain, units) for _, end, units in begun)
        room = limit - sum(units for free, units in frees if free > now)
        for free, units in frees:
            if free <= now:
                continue
            if room >= weight:
                break
            room += units
            candidates.append(free)
    return max(candidates)


@settings(max_examples=150)
@given(
    windows=windows_of_limits,
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("reserve"), st.integers(1, 2)),
            st.tuples(st.just("answer"), st.integers(0, 9)),
            st.tuples(st.just("advance"), st.integers(1, 3000)),
            st.tuples(st.just("restart"), st.just(0)),
        ),
        max_size=60,
    ),
)
def test_a_limiter_grants_no_sooner_and_no_later_than_the_model(windows, steps):
    clock, timeout = ManualClock(START), 2.0
    begun: list[list] = []  # [sent, end, units]; end is the answer, or the time-out
    under_way: list[tuple[object, list]] = []
    with TemporaryDirectory() as state:
        limiter = Limiter(Path(state), "acme", "main", limits_of(windows), clock)
        for step, value in steps:
            now = clock.timestamp()
            if step == "advance":
                clock.advance(value / 1000)
            elif step == "restart":
                limiter.close()
                limiter = Limiter(Path(state), "acme", "main", limits_of(windows), clock)
                under_way.clear()  # their answers are never recorded
            elif step == "answer" and under_way:
                reservation, entry = under_way.pop(value % len(under_way))
                if now < entry[1]:
                    entry[1] = now
                    reservation.answered(now)
            elif step == "reserve":
                latest = earliest(begun, windows, now, value)
                reservation = limiter.reserve("daily", value, timeout, 1e9)
                granted = clock.timestamp()
                assert granted <= latest + 0.003
                for limit, span_ms in windows:
                    live = sum(units for _, end, units in begun if end + span_ms / 1000 > granted)
                    assert live + value <= limit, f"{live + value} in {span_ms} ms, {limit} are allowed"
                entry = [granted, granted + timeout, value]
                begun.append(entry)
                under_way.append((reservation, entry))
        limiter.close()


def worst(stamps: list[tuple[float, int]], span: float) -> int:
    """The most units in any window of this length, both ends included."""
    stamps = sorted(stamps)
    most = units = first = 0
    for at, weight in stamps:
        units += weight
        while stamps[first][0] < at - span:
            units -= stamps[first][1]
            first += 1
        most = max(most, units)
    return most


@settings(max_examples=40)
@given(
    windows=windows_of_limits,
    seed=st.integers(0, 2**32),
    slowest=st.sampled_from([0.0, 0.05, 0.5, 3.0]),
    lost=st.sampled_from([0.0, 0.2]),
)
def test_the_log_of_a_slow_server_shows_no_window_above_its_limit(windows, seed, slowest, lost):
    chance, clock, timeout = random.Random(seed), ManualClock(START), 4.0
    sent, received = [], []
    with TemporaryDirectory() as state:
        processes = [Limiter(Path(state), "acme", "main", limits_of(windows), clock) for _ in range(2)]
        ticket = itertools.count()
        events = [(EPOCH + chance.random(), next(ticket), "ask", worker, None) for worker in range(6)]
        heapq.heapify(events)
        asked = 0
        while events and asked < 120:
            at, _, what, worker, reservation = heapq.heappop(events)
            if at > clock.timestamp():
                clock.advance(at - clock.timestamp())
            now = clock.timestamp()
            if what == "answer":
                reservation.answered(now)
                heapq.heappush(events, (now, next(ticket), "ask", worker, None))
                continue
            weight = chance.choice([1, 1, 1, 2])
            try:
                reservation = processes[worker % 2].reserve("daily", weight, timeout, max_wait_seconds=0)
            except WaitingForQuota as full:
                heapq.heappush(events, (full.resume_at.timestamp(), next(ticket), "ask", worker, None))
                continue
            asked += 1
            there, back = chance.random() * slowest / 2, chance.random() * slowest / 2
            sent.append((now, weight))
            received.append((now + there, weight))
            if chance.random() < lost:  # the process dies: nobody records the answer, another begins in its place
                processes[worker % 2].close()
                processes[worker % 2] = Limiter(Path(state), "acme", "main", limits_of(windows), clock)
                heapq.heappush(events, (now, next(ticket), "ask", worker, None))
            else:
                heapq.heappush(events, (now + there + back, next(ticket), "answer", worker, reservation))
        for one in processes:
            one.close()
    assert asked == 120
    for limit, span_ms in windows:
        assert worst(sent, span_ms / 1000) <= limit
        assert worst(received, span_ms / 1000) <= limit


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32),
    limit=st.integers(1, 6),
    zone=st.sampled_from(["UTC", "Asia/Shanghai", "America/New_York"]),
    skew=st.floats(-1.9, 1.9),
)
def test_a_provider_whose_midnight_is_a_little_off_never_counts_more_than_the_quota(seed, limit, zone, skew):
    from datetime import timedelta
    from zoneinfo import ZoneInfo

    chance = random.Random(seed)
    midnight = datetime(2026, 3, 8, tzinfo=ZoneInfo(zone)).astimezone(UTC)
    clock = ManualClock(midnight - timedelta(seconds=20))
    counted: dict = {}
    with (
        TemporaryDirectory() as state,
        Limiter(
            Path(state), "acme", "main", [Limit(requests=limit, per="day", resets=f"00:00 {zone}")], clock
        ) as limiter,
    ):
        for _ in range(40):
            clock.advance(chance.random() * 1.5)
            try:
                reservation = limiter.reserve("daily", 1, 30, max_wait_seconds=0)
            except WaitingForQuota:
                continue
            took = chance.choice([0.01, 0.01, 5.0])
            stamp = clock.now() + timedelta(seconds=took * chance.random() + skew)
            day = stamp.astimezone(ZoneInfo(zone)).date()
            counted[day] = counted.get(day, 0) + 1
            clock.advance(took)
            reservation.answered()
    assert max(counted.values()) <= limit
