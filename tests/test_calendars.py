"""What a calendar answers, what a user's corrections make of it, and that the library is asked once."""

from __future__ import annotations

import subprocess
import sys
from datetime import UTC, date, datetime, time, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from marketsync.calendars import Calendar, CalendarRangeError, corrected, load_calendar
from marketsync.errors import ConfigurationError
from marketsync.upstream import MarketHours

NOW = datetime(2026, 3, 4, 12, tzinfo=UTC)


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("calendars")


@pytest.fixture(scope="session")
def new_york(cache) -> Calendar:
    return load_calendar("XNYS", cache, now=NOW)


def test_new_york_knows_its_holidays_early_closes_and_the_week_it_was_shut(new_york):
    assert new_york.sessions(date(2001, 9, 10), date(2001, 9, 19)) == [
        date(2001, 9, 10),
        date(2001, 9, 17),
        date(2001, 9, 18),
    ]
    assert new_york.close(date(2025, 11, 26)) == datetime(2025, 11, 26, 21, tzinfo=UTC)
    assert new_york.close(date(2025, 11, 28)) == datetime(2025, 11, 28, 18, tzinfo=UTC)  # 13:00 after Thanksgiving
    assert new_york.open(date(2025, 7, 1)) == datetime(2025, 7, 1, 13, 30, tzinfo=UTC)  # daylight saving time
    assert not new_york.is_session(date(2025, 7, 4))


def test_the_range_reaches_from_1970_to_the_end_of_next_year_and_further_back_on_demand(new_york, cache):
    assert new_york.first_day == date(1970, 1, 1)
    assert new_york.last_day == date(2027, 12, 31)
    older = load_calendar("XNYS", cache, since=date(1962, 1, 2), now=NOW)
    assert older.sessions(date(1962, 1, 2), date(1962, 1, 4)) == [date(1962, 1, 2), date(1962, 1, 3)]


def test_shanghai_is_known_from_its_first_days_and_no_day_before_is_guessed(cache):
    shanghai = load_calendar("XSHG", cache, now=NOW)
    assert shanghai.first_day == date(1990, 12, 3)
    assert shanghai.sessions(date(2024, 2, 8), date(2024, 2, 20)) == [date(2024, 2, 8), date(2024, 2, 19)]
    with pytest.raises(CalendarRangeError, match=r"XSHG says nothing about 1985-01-01.*from 1990-12-03"):
        shanghai.sessions(date(1985, 1, 1), date(1992, 1, 1))
    with pytest.raises(CalendarRangeError, match=r"market_hours.XSHG.sessions"):
        shanghai.last_closed(datetime(2099, 1, 1, tzinfo=UTC))


def test_every_day_is_a_session_of_24_7_and_ends_at_midnight(cache):
    always = load_calendar("24/7", cache, now=NOW)
    assert len(always.sessions(date(2024, 2, 26), date(2024, 3, 4))) == 7
    assert always.close(date(2024, 2, 29)) == datetime(2024, 3, 1, tzinfo=UTC)


def test_an_alias_is_the_calendar_it_stands_for(new_york, cache):
    assert load_calendar("NASDAQ", cache, now=NOW).days == new_york.days


def test_futures_open_on_the_evening_before(cache):
    chicago = load_calendar("CMES", cache, now=NOW)
    assert chicago.open(date(2025, 3, 4)) == datetime(2025, 3, 3, 23, tzinfo=UTC)


def test_calendars_that_pandas_3_breaks_are_whole(cache):
    bombay = load_calendar("XBOM", cache, now=NOW)
    assert bombay.is_session(date(2025, 2, 1))  # the Saturday of the budget
    athens = load_calendar("ASEX", cache, now=NOW)
    assert not athens.is_session(date(2025, 4, 21))  # Orthodox Easter Monday


@pytest.mark.parametrize(("name", "near"), [("XNY", "XNYS"), ("nyse", "NYSE"), ("XSHE", "XSHG"), ("LSEE", "LSE")])
def test_an_unknown_name_is_answered_with_near_ones(name, near):
    with pytest.raises(ConfigurationError, match=f"there is no calendar '{name}': did you mean .*{near}"):
        load_calendar(name, now=NOW)


def test_frequent_names_are_known_without_pandas_and_all_of_them_are_calendars():
    code = (
        "import sys; from marketsync.calendars import _FREQUENT, instead_of;"
        "assert [instead_of(name) for name in _FREQUENT] == [None] * len(_FREQUENT); print('pandas' in sys.modules);"
        "import exchange_calendars; print(_FREQUENT - set(exchange_calendars.get_calendar_names(include_aliases=True)))"
    )
    asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert asked.stdout.splitlines() == ["False", "set()"]


def test_the_second_process_loads_the_sessions_without_pandas(tmp_path):
    code = (
        "import sys; from datetime import UTC, datetime; from pathlib import Path;"
        "from marketsync.calendars import load_calendar;"
        f"c = load_calendar('XNYS', Path({str(tmp_path)!r}), now=datetime(2026, 3, 4, tzinfo=UTC));"
        "print(len(c), 'pandas' in sys.modules)"
    )
    first, second = (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
        for _ in range(2)
    )
    assert first == ["14623", "True"]
    assert second == ["14623", "False"]


def test_a_damaged_file_is_computed_again(tmp_path, new_york):
    load_calendar("XNYS", tmp_path, now=NOW)
    (file,) = tmp_path.glob("XNYS-*.json")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    code = (
        "from datetime import UTC, datetime; from pathlib import Path;"
        "from marketsync.calendars import load_calendar;"
        f"print(len(load_calendar('XNYS', Path({str(tmp_path)!r}), now=datetime(2026, 3, 4, tzinfo=UTC))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == len(new_york)
    assert file.read_bytes() == whole


def test_further_holidays_go_and_further_sessions_come_with_the_usual_hours(new_york):
    hours = MarketHours(holidays=(date(2025, 3, 4),), sessions=(date(2025, 11, 29), date(2025, 3, 8)))
    mine = corrected(new_york, hours)
    assert mine.sessions(date(2025, 3, 3), date(2025, 3, 10)) == [
        date(2025, 3, 3),
        date(2025, 3, 5),
        date(2025, 3, 6),
        date(2025, 3, 7),
        date(2025, 3, 8),
    ]
    assert mine.open(date(2025, 3, 8)) == datetime(2025, 3, 8, 14, 30, tzinfo=UTC)
    # beside an early close, the usual hours are still the usual ones
    assert mine.close(date(2025, 11, 29)) == datetime(2025, 11, 29, 21, tzinfo=UTC)


def test_sessions_written_down_by_the_user_extend_what_a_calendar_knows(cache):
    shanghai = load_calendar("XSHG", cache, now=NOW)
    beyond = shanghai.last_day + timedelta(days=4)
    longer = load_calendar("XSHG", cache, MarketHours(sessions=(beyond,)), now=NOW)
    assert longer.last_day == beyond
    assert longer.is_session(beyond)
    assert longer.close(beyond).hour == 7


def test_a_futures_session_added_by_hand_opens_on_the_evening_before(cache):
    chicago = corrected(load_calendar("CMES", cache, now=NOW), MarketHours(sessions=(date(2025, 3, 8),)))
    assert chicago.open(date(2025, 3, 8)) == datetime(2025, 3, 7, 23, tzinfo=UTC)


def test_a_session_under_way_has_not_closed(new_york):
    monday = date(2025, 3, 3)
    assert new_york.last_closed(datetime(2025, 3, 3, 20, 59, 59, tzinfo=UTC)) == date(2025, 2, 28)
    assert new_york.last_closed(datetime(2025, 3, 3, 21, tzinfo=UTC)) == monday
    assert new_york.is_open(datetime(2025, 3, 3, 20, 59, tzinfo=UTC))
    assert not new_york.is_open(datetime(2025, 3, 3, 21, tzinfo=UTC))
    assert new_york.next_session(datetime(2025, 3, 3, 14, 29, tzinfo=UTC)) == monday
    assert new_york.next_session(datetime(2025, 3, 3, 14, 30, tzinfo=UTC)) == date(2025, 3, 4)


def test_what_is_no_session_has_no_close(new_york):
    with pytest.raises(ValueError, match="2025-03-08 is not a session of XNYS"):
        new_york.close(date(2025, 3, 8))


DAYS = st.sets(st.dates(date(2020, 1, 1), date(2020, 12, 31)), min_size=3, max_size=60)


@given(DAYS, st.dates(date(2020, 1, 1), date(2020, 12, 31)), st.integers(1, 5))
def test_counting_sessions_back_and_forth_agrees_with_the_list(days, day, count):
    calendar = Calendar.of("T", days, first_day=date(2020, 1, 1), last_day=date(2020, 12, 31))
    before, after = sorted(d for d in days if d < day), sorted(d for d in days if d > day)
    if len(before) >= count:
        assert calendar.previous(day, count) == before[-count]
    else:
        with pytest.raises(CalendarRangeError):
            calendar.previous(day, count)
    if len(after) >= count:
        assert calendar.following(day, count) == after[count - 1]
    if day in days:
        assert calendar.previous(day, 0) == calendar.following(day, 0) == day
    assert calendar.is_session(day) == (day in days)


def test_a_calendar_can_be_made_from_a_list():
    calendar = Calendar.of("T", [date(2024, 1, 2), date(2024, 1, 1)], zone="Asia/Tokyo", closes_at=time(15))
    assert calendar.close(date(2024, 1, 2)) == datetime(2024, 1, 2, 6, tzinfo=UTC)
    assert calendar.session_after(date(2024, 1, 1)) == date(2024, 1, 2)
    assert calendar.session_before(date(2024, 1, 2)) == date(2024, 1, 1)
