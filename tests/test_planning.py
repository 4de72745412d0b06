"""Which units come of what is owed: every owed day is asked for each subject that owes it, once, and no other is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from datetime import date, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from marketsync.coverage import Interval
from marketsync.definition import Dataset
from marketsync.planning import Unit, day_start, halves, subjects_in_two, subjects_of, units

FIRST = date(2023, 11, 1)
DAYS = 150
DAY = timedelta(days=1)


def dataset(over: dict, *, whole: bool = False, session: bool = False) -> Dataset:
    query = {"of": "$symbol"}
    if session:
        query["day"] = "$session"
    elif "window" in over and not whole:
        query |= {"from": "$window.start", "to": "$window.end"}
    return Dataset.model_validate(
        {
            "over": over,
            "request": {"path": "/bars", "query": query},
            "response": {"rows": "bars"},
            "schema": {"symbol": "str", "date": "date", "close": "f64"},
            "key": ["symbol", "date"],
        }
    )


def day(number: int) -> datetime:
    return day_start(FIRST + number * DAY)


@st.composite
def intervals(draw: st.DrawFn) -> Interval:
    start = draw(st.integers(0, DAYS - 1))
    return Interval(day(start), day(draw(st.integers(start + 1, DAYS))))


symbols = [f"S{number}" for number in range(7)]
owing = st.fixed_dictionaries({name: st.lists(intervals(), max_size=3) for name in symbols})


def weekdays(start: datetime, end: datetime) -> Iterable[date]:
    at = start.date() if start == day_start(start.date()) else start.date() + DAY
    while day_start(at) < end:
        if at.weekday() < 5:
            yield at
        at += DAY


def asked(found: Iterable[Unit]) -> Counter[tuple[str, date]]:
    counted: Counter[tuple[str, date]] = Counter()
    for unit in found:
        assert unit.window_start <= unit.start < unit.end <= unit.window_end
        at = unit.start.date()
        while day_start(at) < unit.end:
            counted.update((subject, at) for subject in unit.subjects)
            at += DAY
    return counted


def owed_days(owed: dict[str, list[Interval]]) -> set[tuple[str, date]]:
    return {
        (name, FIRST + number * DAY)
        for name, spans in owed.items()
        for number in range(DAYS)
        if any(start <= day(number) < end for start, end in spans)
    }


def planned(data: Dataset, owed: dict[str, list[Interval]], sessions=None) -> list[Unit]:
    return list(units("x.bars", data, subjects_of(data, {"symbol": symbols}), owed.__getitem__, sessions=sessions))


@given(owing, st.sampled_from(["1 day", "10 days", "1 month", "1 year"]), st.integers(1, 4))
def test_each_owed_day_is_asked_once_for_each_subject_and_nothing_beyond(owed, every, batch):
    data = dataset({"symbol": {"universe": "any", "batch": batch}, "window": every})
    found = planned(data, owed)
    counted = asked(found)
    assert set(counted) == owed_days(owed)
    assert set(counted.values()) <= {1}
    assert all(len(unit.subjects) <= batch and dict(unit.values)["symbol"] == unit.subjects for unit in found)


@given(owing, st.integers(1, 4))
def test_sessions_are_asked_one_by_one_and_days_without_one_are_not(owed, batch):
    data = dataset({"symbol": {"universe": "any", "batch": batch}, "session": "XNYS"}, session=True)
    found = planned(data, owed, weekdays)
    assert set(asked(found)) == {(name, at) for name, at in owed_days(owed) if at.weekday() < 5}
    assert all(unit.session == unit.start.date() and unit.end - unit.start == DAY for unit in found)


@given(owing)
def test_what_reaches_the_newest_rows_comes_first_and_the_rest_in_the_order_of_time(owed):
    found = planned(dataset({"symbol": "any", "window": "1 month"}), owed)
    newest = max((unit.end for unit in found), default=None)
    reaches = [unit.end == newest for unit in found]
    assert reaches == sorted(reaches, reverse=True)
    starts = [unit.start for unit in found if unit.end != newest]
    assert starts == sorted(starts)


@given(owing)
def test_windows_are_anchored_to_the_calendar_and_a_whole_one_is_asked_whole(owed):
    for unit in planned(dataset({"symbol": "any", "window": "1 month"}, whole=True), owed):
        assert unit.window_start.day == 1
        assert unit.window_end.day == 1
        assert unit.window_end == (unit.window_start + 32 * DAY).replace(day=1)


def test_a_laggard_does_not_widen_the_request_of_another():
    owed = {name: [Interval(day(10), day(20))] for name in symbols}
    owed["S3"] = [Interval(day(0), day(20))]
    found = planned(dataset({"symbol": {"universe": "any", "batch": 100}, "window": "1 year"}), owed)
    assert {(unit.subjects, unit.span) for unit in found} == {
        (("S3",), Interval(day(0), day(20))),
        (tuple(name for name in symbols if name != "S3"), Interval(day(10), day(20))),
    }


def test_subjects_are_the_product_of_the_names_and_batches_keep_to_one_value_of_the_others():
    data = dataset({"exchange": ["SSE", "SZSE"], "symbol": {"universe": "any", "batch": 3}, "window": "1 year"})
    subjects = subjects_of(data, {"exchange": ["SSE", "SZSE"], "symbol": ["A", "B", "A", "C", "D"]})
    assert [subject.name for subject in subjects] == [f"{e}|{s}" for e in ("SSE", "SZSE") for s in "ABCD"]
    found = list(units("x.bars", data, subjects, lambda _: [Interval(day(70), day(80))]))
    assert [dict(unit.values) for unit in found] == [
        {"exchange": ("SSE",), "symbol": ("A", "B", "C")},
        {"exchange": ("SSE",), "symbol": ("D",)},
        {"exchange": ("SZSE",), "symbol": ("A", "B", "C")},
        {"exchange": ("SZSE",), "symbol": ("D",)},
    ]


def one(start: int, end: int, names: tuple[str, ...] = ("A",)) -> Unit:
    return Unit("x.bars", names, (("symbol", names),), day(start), day(end), day(start), day(end))


@given(st.integers(0, 50), st.integers(1, 80), st.integers(1, 10))
def test_halves_are_the_whole_and_meet_at_a_midnight(start, length, smallest):
    unit = one(start, start + length, ("A", "B"))
    parts = halves(dataset({"symbol": "any", "window": "1 year"}), unit, smallest=smallest * DAY)
    assert parts is not None
    a, b = parts
    if a.subjects == unit.subjects:
        assert (a.start, a.end, b.end) == (unit.start, b.start, unit.end)
        assert a.start < a.end < b.end
        assert a.end == day_start(a.end.date())
    else:
        assert length < 2 * smallest
        assert (a.subjects, b.subjects, a.span, b.span) == (("A",), ("B",), unit.span, unit.span)


def test_a_unit_of_one_subject_that_cannot_be_cut_in_time_cannot_be_cut():
    whole = dataset({"symbol": "any", "window": "1 year"}, whole=True)
    assert halves(whole, one(0, 60), smallest=DAY) is None
    assert subjects_in_two(one(0, 60)) is None
    session = dataset({"symbol": "any", "session": "XNYS"}, session=True)
    assert halves(session, one(0, 1), smallest=timedelta(minutes=1)) is None


def test_a_unit_is_known_by_its_request_its_subjects_and_its_span():
    same = one(0, 5).work_id("hash")
    assert one(0, 5).work_id("hash") == same
    assert len({same, one(0, 5).work_id("other"), one(0, 6).work_id("hash"), one(0, 5, ("B",)).work_id("hash")}) == 4


def test_without_sessions_a_dataset_that_is_asked_by_session_cannot_be_planned():
    with pytest.raises(ValueError, match="sessions are needed"):
        planned(
            dataset({"symbol": "any", "session": "XNYS"}, session=True),
            {name: [Interval(day(0), day(1))] for name in symbols},
        )
