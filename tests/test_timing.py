"""What can be had, what is final, what is asked again: for daily bars, minute bars, futures, and without a calendar."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from marketsync.calendars import Calendar, load_calendar
from marketsync.definition import Dataset
from marketsync.timing import Timing, midnight

NOW = datetime(2026, 3, 4, 12, tzinfo=UTC)


def at(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def dataset(type_: str = "date", **timing) -> Dataset:
    return Dataset.model_validate(
        {"schema": {"symbol": "str", "ts": type_, "close": "f64"}, "key": ["symbol", "ts"], **timing}
    )


@pytest.fixture(scope="session")
def calendars(tmp_path_factory):
    cache = tmp_path_factory.mktemp("calendars")
    return lambda name: load_calendar(name, cache, now=NOW)


@pytest.fixture
def daily(calendars) -> Timing:
    spec = dataset(
        frequency="session",
        calendar="XNYS",
        published="30 minutes after close",
        settles="1 session",
        restates="5 sessions",
    )
    return Timing.of(spec, calendars("XNYS"))


def test_a_session_is_wanted_from_its_publication_on(daily):
    assert daily.wanted_until(at("2025-03-04T21:29:59")) == at("2025-03-04")
    assert daily.wanted_until(at("2025-03-04T21:30:00")) == at("2025-03-05")


def test_over_a_weekend_the_end_stays_where_friday_put_it(daily):
    for now in ("2025-03-07T21:30:00", "2025-03-08T12:00:00", "2025-03-10T20:29:59"):
        assert daily.wanted_until(at(now)) == at("2025-03-08")


def test_an_early_close_is_published_early(daily):
    assert daily.published_at(date(2025, 11, 28)) == at("2025-11-28T18:30")


def test_an_answer_is_final_once_the_settling_session_is_published(daily):
    assert daily.final_until(at("2025-03-10T20:29:59")) == at("2025-03-07")
    assert daily.final_until(at("2025-03-10T20:30:00")) == at("2025-03-08")  # Friday has settled, Monday not


def test_settling_in_hours_is_counted_from_publication(calendars):
    spec = dataset(frequency="session", calendar="XNYS", published="at close", settles="6 hours")
    timing = Timing.of(spec, calendars("XNYS"))
    assert timing.final_until(at("2025-03-08T02:59:59")) == at("2025-03-07")
    assert timing.final_until(at("2025-03-08T03:00:00")) == at("2025-03-08")


def test_the_last_five_published_sessions_are_asked_again(daily):
    assert daily.restated_since(at("2025-03-10T22:00:00")) == at("2025-03-04")
    assert daily.restated_since(at("2025-03-10T12:00:00")) == at("2025-03-03")


def test_a_hole_is_one_only_after_the_grace_period(daily, calendars):
    assert daily.hole_after(date(2025, 3, 7)) == at("2025-03-10T21:30")  # 3 days, the default
    spec = dataset(frequency="session", calendar="XNYS", published="at close", grace="2 sessions")
    assert Timing.of(spec, calendars("XNYS")).hole_after(date(2025, 3, 7)) == at("2025-03-11T20:00")


def test_a_file_published_on_the_morning_after_local_time(calendars):
    spec = dataset(frequency="session", calendar="XNYS", published="next day 11:00 America/New_York")
    timing = Timing.of(spec, calendars("XNYS"))
    assert timing.wanted_until(at("2025-03-05T15:59:59")) == at("2025-03-04")
    assert timing.wanted_until(at("2025-03-05T16:00:00")) == at("2025-03-05")


def test_shanghai_publishes_in_the_evening_of_shanghai(calendars):
    spec = dataset(frequency="session", calendar="XSHG", published="18:00 Asia/Shanghai")
    timing = Timing.of(spec, calendars("XSHG"))
    assert timing.wanted_until(at("2025-03-04T09:59")) == at("2025-03-04")
    assert timing.wanted_until(at("2025-03-04T10:00")) == at("2025-03-05")


def test_one_row_a_session_without_stated_publication_waits_for_the_close(calendars):
    timing = Timing.of(dataset(frequency="session", calendar="XNYS"), calendars("XNYS"))
    assert timing.wanted_until(at("2025-03-04T20:59")) == at("2025-03-04")
    assert timing.wanted_until(at("2025-03-04T21:00")) == at("2025-03-05")


def test_a_futures_evening_belongs_to_the_next_session_and_is_neither_wanted_nor_final(calendars):
    spec = dataset("datetime", frequency="minute", calendar="CMES", published="30 minutes after close")
    timing = Timing.of(spec, calendars("CMES"))
    now = at("2025-03-04T23:45")  # the session of the 4th closed, that of the 5th opened, at 23:00
    assert timing.wanted_until(now) == at("2025-03-04T23:00")
    assert timing.final_until(now) == at("2025-03-04T23:00")
    assert timing.wanted_until(at("2025-03-05T23:30")) == at("2025-03-05T23:00")


def test_after_hours_bars_later_than_the_asking_are_not_final(calendars):
    spec = dataset("datetime", frequency="minute", calendar="XNYS", published="30 minutes after close")
    timing = Timing.of(spec, calendars("XNYS"))
    assert timing.final_until(at("2025-03-04T21:40:30")) == at("2025-03-04T21:40")
    assert timing.final_until(at("2025-03-05T01:00")) == at("2025-03-05")


def test_minute_bars_without_publication_are_wanted_up_to_the_minute_under_way():
    timing = Timing.of(dataset("datetime", frequency="minute"))
    assert timing.wanted_until(at("2025-03-04T21:40:30")) == at("2025-03-04T21:40:00")


def test_instants_without_any_statement_are_wanted_and_final_until_now():
    timing = Timing.of(dataset("datetime"))
    now = at("2025-03-04T21:40:30")
    assert timing.wanted_until(now) == timing.final_until(now) == now
    assert timing.restated_since(now) is None


def test_days_without_a_calendar_are_final_when_over_and_restated_by_plain_days():
    timing = Timing.of(dataset(restates="30 days"))
    now = at("2025-03-04T21:40:30")
    assert timing.wanted_until(now) == at("2025-03-05")
    assert timing.final_until(now) == at("2025-03-04")
    assert timing.restated_since(now) == at("2025-02-03")


def test_a_crypto_day_ends_at_midnight(calendars):
    spec = dataset(frequency="session", calendar="24/7", published="at close", settles="2 days", restates="3 days")
    timing = Timing.of(spec, calendars("24/7"))
    assert timing.wanted_until(at("2025-03-04T23:59")) == at("2025-03-04")
    assert timing.wanted_until(at("2025-03-05T00:00")) == at("2025-03-05")
    assert timing.final_until(at("2025-03-05T00:00")) == at("2025-03-03")
    assert timing.restated_since(at("2025-03-05T00:00")) == at("2025-03-02")


def test_before_the_first_publication_nothing_is_wanted():
    calendar = Calendar.of("T", [date(2024, 1, 5)], first_day=date(2024, 1, 1), last_day=date(2024, 1, 9))
    timing = Timing.of(dataset(frequency="session", calendar="T", restates="5 sessions"), calendar)
    assert timing.wanted_until(at("2024-01-04T12:00")) == at("2024-01-01")
    assert timing.restated_since(at("2024-01-06T12:00")) == at("2024-01-01")


def test_the_last_session_a_calendar_knows_never_settles_by_sessions():
    calendar = Calendar.of("T", [date(2024, 1, 4), date(2024, 1, 5)], last_day=date(2024, 1, 31))
    timing = Timing.of(dataset(frequency="session", calendar="T", settles="1 session"), calendar)
    assert timing.settled_at(date(2024, 1, 5)) is None
    assert timing.final_until(at("2024-01-20T00:00")) == at("2024-01-05")


RULES = st.sampled_from(["at close", "30 minutes after close", "18:00 America/New_York", "2 days later 11:00 UTC"])
SETTLING = st.sampled_from([None, "1 session", "3 sessions", "5 hours", "2 days"])
WORKDAYS = [
    day for n in range(200) if (day := date(2024, 1, 1) + timedelta(days=n)).weekday() < 5 and n not in (17, 18, 45)
]
MARKET = Calendar.of("T", WORKDAYS, zone="America/New_York", last_day=date(2024, 12, 31))
MOMENTS = st.integers(0, 180 * 24 * 60).map(lambda minutes: at("2024-01-08T00:00") + timedelta(minutes=minutes))


@given(RULES, SETTLING, MOMENTS, st.integers(0, 5000), st.sampled_from(["date", "datetime"]))
def test_what_is_final_was_published_before_it_was_asked_and_stays_final(rule, settles, now, later, type_):
    frequency = "session" if type_ == "date" else "minute"
    timing = Timing.of(dataset(type_, frequency=frequency, calendar="T", published=rule, settles=settles), MARKET)
    final, wanted = timing.final_until(now), timing.wanted_until(now)
    assert final <= wanted
    assert timing.final_until(now + timedelta(minutes=later)) >= final
    for session in MARKET.sessions(date(2024, 1, 8), date(2024, 7, 1)):
        if midnight(session) < wanted:
            assert timing.published_at(session) <= now
        if midnight(session) < final:
            settled = timing.settled_at(session)
            assert settled is not None
            assert settled <= now
