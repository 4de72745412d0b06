"""When a number of requests is done under the limits, and which limit is to blame."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marketsync.clock import ManualClock
from marketsync.definition import Limit
from marketsync.durations import parse_daily_time, parse_span
from marketsync.errors import WaitingForQuota
from providers.limit_forecast import plan_ahead
from providers.limit_windows import Kind, LimitState
from providers.limits import Limiter

NOW = datetime(2026, 3, 4, 12, tzinfo=UTC)


def window(limit: int, per: str, used: int = 0) -> LimitState:
    return LimitState(f"{limit} per {per}", "account a", Kind.WINDOW, limit, used, parse_span(per))


def quota(limit: int, used: int = 0, per: str = "day", resets: str = "00:00 UTC") -> LimitState:
    return LimitState(
        f"{limit} per {per}", "account a", Kind.QUOTA, limit, used, parse_span(per), parse_daily_time(resets)
    )


def at_once(limit: int) -> LimitState:
    return LimitState(f"{limit} at once", "account a", Kind.CONCURRENT, limit, 0)


def test_without_limits_only_the_answers_take_time():
    forecast = plan_ahead([], 100, now=NOW, seconds_per_request=0.2, threads=4)
    assert (forecast.seconds, forecast.binding, forecast.periods) == (pytest.approx(5), None, 0)


def test_1100_requests_at_500_a_day_with_120_used_are_done_on_the_third_day():
    day = quota(500, 120)
    forecast = plan_ahead([day], 1100, now=NOW)  # 380 today, 500 tomorrow, 220 the day after
    assert forecast.done_at.date() == datetime(2026, 3, 6, tzinfo=UTC).date()
    assert (forecast.periods, forecast.binding) == (3, day)
    assert forecast.seconds == pytest.approx((datetime(2026, 3, 6, tzinfo=UTC) - NOW).total_seconds() + 220 * 0.05)


@pytest.mark.parametrize(("requests", "days"), [(380, 1), (381, 2), (880, 2), (881, 3), (0, 0)])
def test_the_day_changes_at_exactly_the_quota(requests, days):
    assert plan_ahead([quota(500, 120)], requests, now=NOW).periods == days


def test_weight_divides_a_quota_and_what_is_left_over_is_not_carried():
    assert plan_ahead([quota(10)], 4, weight=4, now=NOW).periods == 2  # two a day, not two and a half


def test_a_month_quota_stops_what_a_day_quota_would_let_through():
    month, day = quota(30, 20, "month"), quota(6)
    forecast = plan_ahead([day, month], 14, now=NOW)  # 6 + 4 in March, then 4 on the first of April
    assert forecast.done_at.date() == datetime(2026, 4, 1, tzinfo=UTC).date()
    assert forecast.binding == month


def test_a_quota_resets_in_its_own_zone():
    forecast = plan_ahead([quota(5, 5, resets="00:00 Asia/Shanghai")], 1, now=NOW, seconds_per_request=0)
    assert forecast.done_at == datetime(2026, 3, 4, 16, tzinfo=UTC)


def test_a_full_window_costs_its_length_for_every_turn():
    minute = window(50, "minute", used=50)
    forecast = plan_ahead([minute], 100, now=NOW, seconds_per_request=0.1, threads=10)
    assert forecast.seconds == pytest.approx(120, abs=1)
    assert forecast.binding == minute


def test_a_window_that_speed_never_fills_binds_nothing():
    forecast = plan_ahead([window(1000, "minute")], 100, now=NOW, seconds_per_request=1, threads=1)
    assert (forecast.seconds, forecast.binding) == (pytest.approx(100), None)


def test_a_concurrency_limit_below_the_threads_binds():
    one = at_once(1)
    forecast = plan_ahead([one, at_once(50)], 100, now=NOW, seconds_per_request=1, threads=4)
    assert (forecast.seconds, forecast.binding) == (pytest.approx(100), one)


def test_slow_work_goes_on_over_midnight_into_the_next_quota():
    forecast = plan_ahead([quota(100_000)], 60_000, now=NOW, seconds_per_request=1, threads=1)
    assert (forecast.seconds, forecast.binding, forecast.periods) == (pytest.approx(60_000), None, 2)


def test_a_limit_smaller_than_one_request_is_never_done():
    assert plan_ahead([window(5, "minute")], 1, weight=6, now=NOW) is None


@settings(max_examples=30)
@given(
    requests=st.integers(1, 60),
    used=st.integers(0, 5),
    per_day=st.integers(5, 20),
    per_minute=st.integers(2, 9),
    hour=st.integers(0, 23),
)
def test_the_limiter_itself_needs_as_many_days_as_forecast(tmp_path_factory, requests, used, per_day, per_minute, hour):
    clock = ManualClock(NOW.replace(hour=hour))
    limits = [Limit(requests=per_day, per="day", resets="00:00 Asia/Tokyo"), Limit(requests=per_minute, per="minute")]
    with Limiter(tmp_path_factory.mktemp("state"), "acme", "main", limits, clock) as limiter:
        for _ in range(used):
            limiter.reserve("daily").answered()
        began = clock.now()
        forecast = plan_ahead(limiter.state(), requests, now=began, seconds_per_request=0.5, threads=1)
        days = set()
        for _ in range(requests):
            try:
                reservation = limiter.reserve("daily", max_wait_seconds=300)
            except WaitingForQuota as spent:
                clock.advance(spent.resume_at - clock.now())
                reservation = limiter.reserve("daily", max_wait_seconds=300)
            days.add((clock.now() + timedelta(hours=9)).date())
            clock.advance(0.5)
            reservation.answered()
    assert forecast.periods == len(days)
    turn = 61
    assert abs((clock.now() - forecast.done_at).total_seconds()) <= turn * (1 + len(days))
