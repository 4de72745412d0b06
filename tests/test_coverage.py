"""The arithmetic of intervals and coverage, beside a model that looks at each day by itself."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from marketsync.coverage import Answer, Covered, Interval, laid, merged, minus, owed, touches, within

FIRST = datetime(2024, 1, 1, tzinfo=UTC)
DAYS = 14
NOW = FIRST + timedelta(days=60)
RUN = NOW - timedelta(hours=1)


def day(number: int) -> datetime:
    return FIRST + timedelta(days=number)


@st.composite
def intervals(draw: st.DrawFn, empty: bool = True) -> Interval:
    start = draw(st.integers(0, DAYS - 1))
    end = draw(st.integers(0 if empty else start + 1, DAYS))
    return Interval(day(start), day(end))


lists = st.lists(intervals(), max_size=6)


def days_of(found: list[Interval]) -> set[int]:
    return {number for number in range(DAYS) for start, end in found if start <= day(number) < end}


def is_normal(found: list[Interval]) -> bool:
    return all(start < end for start, end in found) and all(a.end < b.start for a, b in pairwise(found))


@given(lists, lists)
def test_unions_differences_and_intersections_are_those_of_the_days(a: list[Interval], b: list[Interval]) -> None:
    for found, expected in (
        (merged(a), days_of(a)),
        (minus(a, b), days_of(a) - days_of(b)),
        (within(a, b), days_of(a) & days_of(b)),
    ):
        assert days_of(found) == expected
        assert is_normal(found)


@st.composite
def pieces(draw: st.DrawFn) -> Covered:
    span = draw(intervals(empty=False))
    answer = draw(st.sampled_from(list(Answer)))
    final = answer in (Answer.ROWS, Answer.EMPTY) and draw(st.booleans())
    asked_at = draw(
        st.sampled_from([NOW, RUN, RUN - timedelta(days=1), RUN - timedelta(days=9), RUN - timedelta(days=8)])
    )
    work = draw(st.sampled_from(["a", "b"])) if answer is Answer.PARTIAL else None
    return Covered(span.start, span.end, answer, final, asked_at, draw(st.integers(0, 3)), work)


def over(covered: list[Covered], number: int) -> list[tuple]:
    """What is said of one day, oldest first."""
    return [_said(piece) for piece in covered if piece.start <= day(number) < piece.end]


def _said(piece: Covered) -> tuple:
    return piece.answer, piece.final, piece.asked_at, piece.work_id


def modelled(said: list[tuple], new: Covered) -> list[tuple]:
    """What is said of one day after `new` was laid over it."""
    if new.answer is Answer.PARTIAL:
        kept = [s for s in said if not (s[0] is Answer.PARTIAL and s[3] == new.work_id)]
    elif new.answer is Answer.NOT_YET:
        kept = [s for s in said if s[0] is not Answer.NOT_YET]
    else:
        kept = []
    return [*kept, _said(new)]


def coarse(said: list[tuple]) -> set[tuple]:
    """Without the exact time of askings that are old enough to be joined: those of a joined piece are its oldest."""
    return {(a, final, at if at >= NOW - timedelta(days=2) else "old", work) for a, final, at, work in said}


@given(st.lists(pieces(), max_size=8))
def test_what_is_laid_later_hides_what_it_must_on_each_day_and_nothing_else(given: list[Covered]) -> None:
    covered: list[Covered] = []
    model: list[list[tuple]] = [[] for _ in range(DAYS)]
    for piece in given:
        covered = laid(covered, [piece], NOW)
        for number in range(DAYS):
            if piece.start <= day(number) < piece.end:
                model[number] = modelled(model[number], piece)
    for number in range(DAYS):
        assert coarse(over(covered, number)) == coarse(model[number])
    assert laid(covered, [], NOW) == covered


@given(st.lists(pieces(), max_size=8))
def test_laying_all_at_once_is_laying_one_after_the_other(given: list[Covered]) -> None:
    one_by_one: list[Covered] = []
    for piece in given:
        one_by_one = laid(one_by_one, [piece], NOW)
    together = laid([], given, NOW)
    for number in range(DAYS):
        assert coarse(over(together, number)) == coarse(over(one_by_one, number))


def test_rows_are_counted_in_a_joined_piece_and_unknown_in_a_cut_one() -> None:
    old = RUN - timedelta(days=9)
    a = Covered(day(0), day(2), Answer.ROWS, True, old, 5)
    b = Covered(day(2), day(4), Answer.ROWS, True, old - timedelta(days=1), 7)
    assert laid([a], [b], NOW) == [replace(a, end=day(4), rows=12, asked_at=b.asked_at)]
    over_the_middle = Covered(day(1), day(3), Answer.EMPTY, True, old)
    cut = laid([replace(a, end=day(4), rows=12)], [over_the_middle], NOW)
    assert [(piece.start, piece.end, piece.rows) for piece in cut] == [
        (day(0), day(1), None),
        (day(1), day(3), None),
        (day(3), day(4), None),
    ]


def test_young_neighbours_stay_apart_so_that_each_can_be_told_to_be_of_this_run() -> None:
    before = Covered(day(0), day(1), Answer.ROWS, True, RUN - timedelta(hours=2), 1)
    since = Covered(day(1), day(2), Answer.ROWS, True, RUN, 1)
    assert len(laid([before], [since], NOW)) == 2
    assert owed([Interval(day(0), day(2))], [before, since], run_started=RUN, refetch=True) == [
        Interval(day(0), day(1))
    ]


@given(lists, st.lists(pieces(), max_size=8), st.integers(0, DAYS) | st.none(), st.booleans())
def test_a_day_is_owed_unless_it_was_asked_in_this_run_or_an_older_answer_is_final(
    wanted: list[Interval], given: list[Covered], restated: int | None, refetch: bool
) -> None:
    covered = laid([], given, NOW)
    found = owed(
        wanted,
        covered,
        run_started=RUN,
        restated_since=None if restated is None else day(restated),
        refetch=refetch,
    )
    expected = set()
    for number in days_of(wanted):
        settles = False
        for answer, final, asked_at, _ in over(covered, number):
            if answer is Answer.PARTIAL:
                continue
            older = final and not refetch and (restated is None or number < restated)
            settles = settles or asked_at >= RUN or older
        if not settles:
            expected.add(number)
    assert days_of(found) == expected
    assert is_normal(found)


@pytest.mark.parametrize(
    ("piece", "found"),
    [
        (Covered(day(1), day(3), Answer.ROWS, False, NOW, 1), True),
        (Covered(day(1), day(3), Answer.EMPTY, True, NOW), True),
        (Covered(day(1), day(3), Answer.NOT_YET, False, NOW), False),
        (Covered(day(1), day(3), Answer.PARTIAL, False, NOW, None, "mine"), False),
        (Covered(day(1), day(3), Answer.PARTIAL, False, NOW, None, "another"), True),
        (Covered(day(4), day(6), Answer.ROWS, True, NOW, 1), False),
        (Covered(day(0), day(2), Answer.ROWS, True, NOW, 1), False),
    ],
)
def test_rows_of_others_may_be_in_a_span_that_anything_but_not_yet_touches(piece: Covered, found: bool) -> None:
    assert touches([piece], Interval(day(2), day(4)), "mine") is found
