"""What a judgement says of rows in a real store: present, missing, empty, not yet, explained, before the first row."""

from __future__ import annotations

from datetime import UTC, date, datetime, time, timedelta
from itertools import pairwise
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marketsync.calendars import Calendar, load_calendar
from marketsync.coverage import Answer, Covered, Interval, laid, owed
from marketsync.definition import Dataset
from marketsync.errors import ConfigurationError
from marketsync.report import FreshState, HoleState, Judgement
from marketsync.timing import Timing, midnight
from providers.replica.market import bokeh
from storage.protocol import Batch, Mode
from storage.registry import open_store
from tasks.judge import KnownHole, KnownHoles, judge, open_spans, read_known_holes, reopened

NAME = "test.bars"
NOW = datetime(2025, 4, 1, 12, tzinfo=UTC)
HOLES = Path(__file__).parent.parent / "providers" / "replica" / "known_holes.yml"


@pytest.fixture(scope="session")
def calendars(tmp_path_factory):
    cache = tmp_path_factory.mktemp("calendars")
    return lambda name: load_calendar(name, cache, now=NOW)


@pytest.fixture(scope="session")
def new_york(calendars) -> Calendar:
    return calendars("XNYS")


def dataset(type_: str = "date", frequency: str = "session", **more) -> Dataset:
    spec = {
        "over": {"symbol": "$plan"},
        "schema": {
            "symbol": "str",
            "ts": type_,
            "open": "f64",
            "high": "f64",
            "low": "f64",
            "close": "f64",
            "volume": "i64",
        },
        "key": ["symbol", "ts"],
        "frequency": frequency,
        "calendar": "XNYS",
        **more,
    }
    return Dataset.model_validate(spec)


class Shelf:
    """A Delta store and how rows get into it and are judged."""

    def __init__(self, path: Path, calendar: Calendar):
        self.store = open_store(f"delta://{path}", "shelf")
        self.calendar = calendar
        self.seq = 0

    def put(self, spec: Dataset, rows: list[tuple], **prices: object) -> None:
        self.seq += 1
        schema = spec.stored()
        values = {"open": 10.0, "high": 12.0, "low": 9.0, "close": 11.0, "volume": 100, **prices}
        frame = pl.DataFrame(
            {"symbol": [r[0] for r in rows], "ts": [r[1] for r in rows]},
            schema={"symbol": pl.String, "ts": schema.polars()["ts"]},
        ).with_columns(pl.lit(value).cast(schema.polars()[name]).alias(name) for name, value in values.items())
        frame = frame.with_columns(_segment=pl.lit("s"), _ingested_at=pl.lit(NOW).cast(pl.Datetime("us", "UTC")))
        self.store.ensure(NAME, schema)
        self.store.write(Batch(NAME, schema, "lane", self.seq, frame, Mode.UPSERT))

    def judge(self, spec: Dataset, subjects: list[str], since: date, **more) -> Judgement:
        now = more.pop("now", NOW)
        timing = Timing.of(spec, self.calendar)
        return judge(NAME, spec, self.store, subjects, timing=timing, since=since, now=now, **more)


@pytest.fixture
def shelf(tmp_path, new_york) -> Shelf:
    return Shelf(tmp_path / "data", new_york)


MARCH = date(2025, 3, 3)  # a Monday
MONDAY = date(2025, 3, 31)  # the session before NOW


def bars(calendar: Calendar, symbol: str, first: date, stop: date, without: tuple[date, ...] = ()) -> list[tuple]:
    return [(symbol, day) for day in calendar.sessions(first, stop) if day not in without]


def covered(first: date, stop: date, answer: Answer = Answer.ROWS, final: bool = True) -> Covered:
    return Covered(midnight(first), midnight(stop), answer, final, NOW)


def told(judgement: Judgement) -> list[tuple]:
    return [(str(h.state), h.first, h.last, h.sessions, h.subjects) for h in judgement.holes]


def test_a_complete_history_has_nothing_to_tell(shelf, new_york):
    spec = dataset()
    shelf.put(spec, bars(new_york, "AAPL", MARCH, date(2025, 4, 1)))
    found = shelf.judge(spec, ["AAPL"], MARCH)
    assert (found.expected, found.present, found.missing) == (21, 21, 0)
    assert found.holes == ()
    assert found.findings == []
    assert found.completeness == 1.0


def test_a_missing_session_is_named_with_its_day(shelf, new_york):
    spec = dataset()
    gone = (date(2025, 3, 6), date(2025, 3, 7), date(2025, 3, 10), date(2025, 3, 20))
    shelf.put(spec, bars(new_york, "AAPL", MARCH, date(2025, 4, 1), gone) + bars(new_york, "IBM", MARCH, NOW.date()))
    found = shelf.judge(spec, ["AAPL", "IBM"], MARCH)
    assert told(found) == [
        ("missing", date(2025, 3, 6), date(2025, 3, 10), 3, ("AAPL",)),  # over a weekend: consecutive sessions
        ("missing", date(2025, 3, 20), date(2025, 3, 20), 1, ("AAPL",)),
    ]
    assert found.findings == ["test.bars: 4 sessions missing of 42 expected"]
    assert found.months is not None
    assert found.months.expected == ((21,), (21,))
    assert found.months.present == ((17,), (21,))
    assert found.months.rows == (38,)


def test_subjects_with_the_same_hole_share_it(shelf, new_york):
    spec = dataset()
    day = date(2025, 3, 12)
    shelf.put(spec, [row for s in "ABC" for row in bars(new_york, s, MARCH, NOW.date(), (day,))])
    found = shelf.judge(spec, list("ABC"), MARCH)
    assert told(found) == [("missing", day, day, 1, ("A", "B", "C"))]


def test_days_before_the_first_row_are_not_expected_and_a_holiday_is_no_hole(shelf, new_york):
    spec = dataset()
    shelf.put(spec, bars(new_york, "NEW", date(2025, 1, 6), NOW.date()))
    found = shelf.judge(spec, ["NEW"], date(2024, 12, 30))
    assert found.missing == 0
    assert found.before_first == 4
    assert found.subjects[0].first == date(2025, 1, 6)
    assert found.holidays == (date(2025, 1, 1), date(2025, 1, 9), date(2025, 1, 20), date(2025, 2, 17))


def test_what_was_never_asked_is_missing_even_before_the_first_row(shelf, new_york):
    spec = dataset()
    shelf.put(spec, bars(new_york, "AAPL", date(2025, 3, 17), NOW.date()))
    found = shelf.judge(spec, ["AAPL"], MARCH, coverage={"AAPL": [covered(date(2025, 3, 10), NOW.date())]})
    assert told(found) == [("missing", MARCH, date(2025, 3, 7), 5, ("AAPL",))]
    assert found.holes[0].reason == "not asked yet"
    assert found.before_first == 5


def test_answered_empty_is_not_missing(shelf, new_york):
    spec = dataset()
    shelf.put(spec, bars(new_york, "GONE", MARCH, date(2025, 3, 10)))
    coverage = {
        "GONE": [covered(MARCH, date(2025, 3, 10)), covered(date(2025, 3, 10), NOW.date(), Answer.EMPTY)],
        "NEVER": [covered(MARCH, NOW.date(), Answer.EMPTY)],
    }
    found = shelf.judge(
        spec, ["GONE", "NEVER"], MARCH, coverage=coverage, now=NOW + timedelta(days=5), until=NOW.date()
    )
    assert (found.missing, found.empty) == (0, 16 + 21)
    assert told(found) == [
        ("empty", MARCH, date(2025, 3, 31), 21, ("NEVER",)),
        ("empty", date(2025, 3, 10), date(2025, 3, 31), 16, ("GONE",)),
    ]
    assert found.findings == []


def split_at(late: date, answer: Answer) -> list[Covered]:
    return [covered(MARCH, late), covered(late, NOW.date(), answer)]


@pytest.mark.parametrize(
    "pieces",
    [
        pytest.param([covered(MARCH, NOW.date())], id="in one answer"),
        pytest.param(split_at(MONDAY, Answer.ROWS), id="with rows"),
        pytest.param(split_at(MONDAY, Answer.EMPTY), id="empty"),
    ],
)
def test_an_answer_without_the_newest_session_is_not_final_before_the_grace_is_over(shelf, new_york, pieces):
    spec = dataset()
    timing = Timing.of(spec, new_york)
    shelf.put(spec, bars(new_york, "AAPL", MARCH, MONDAY))
    found = shelf.judge(spec, ["AAPL"], MARCH, coverage={"AAPL": pieces})
    assert told(found) == [("not_yet", MONDAY, MONDAY, 1, ("AAPL",))]
    after = {"AAPL": laid(pieces, reopened(found, {"AAPL": pieces}, timing)["AAPL"], NOW)}
    wanted = [Interval(midnight(MARCH), midnight(NOW.date()))]
    assert owed(wanted, after["AAPL"], run_started=NOW + timedelta(days=1)) == [
        Interval(midnight(MONDAY), midnight(NOW.date()))
    ]
    assert reopened(found, after, timing) == {}
    later = shelf.judge(spec, ["AAPL"], MARCH, coverage={"AAPL": pieces}, now=NOW + timedelta(days=5), until=NOW.date())
    assert reopened(later, {"AAPL": pieces}, timing) == {}


def test_an_answer_with_rows_but_not_this_one_leaves_a_hole(shelf, new_york):
    spec = dataset()
    day = date(2025, 3, 12)
    shelf.put(spec, bars(new_york, "AAPL", MARCH, NOW.date(), (day,)))
    found = shelf.judge(spec, ["AAPL"], MARCH, coverage={"AAPL": [covered(MARCH, NOW.date())]})
    assert [(h.first, h.reason) for h in found.holes] == [(day, "not in the provider's answer")]


def test_empty_before_it_had_settled_is_a_hole_once_the_grace_is_over(shelf, new_york):
    spec = dataset()
    shelf.put(spec, bars(new_york, "AAPL", MARCH, date(2025, 3, 27)))
    coverage = {
        "AAPL": [covered(MARCH, date(2025, 3, 27)), covered(date(2025, 3, 27), NOW.date(), Answer.EMPTY, False)]
    }
    found = shelf.judge(spec, ["AAPL"], MARCH, coverage=coverage, now=NOW)
    assert told(found) == [
        ("missing", date(2025, 3, 27), date(2025, 3, 28), 2, ("AAPL",)),
        ("not_yet", date(2025, 3, 31), date(2025, 3, 31), 1, ("AAPL",)),
    ]
    assert open_spans(found) == [
        Interval(midnight(date(2025, 3, 27)), midnight(date(2025, 3, 29))),
        Interval(midnight(date(2025, 3, 31)), midnight(date(2025, 4, 1))),
    ]


def test_a_session_that_is_not_published_is_not_expected(shelf, new_york):
    spec = dataset(published="30 minutes after close")
    shelf.put(spec, bars(new_york, "AAPL", MARCH, date(2025, 3, 31)))
    before = shelf.judge(spec, ["AAPL"], MARCH, now=datetime(2025, 3, 31, 20, 29, tzinfo=UTC))
    after = shelf.judge(spec, ["AAPL"], MARCH, now=datetime(2025, 3, 31, 20, 30, tzinfo=UTC))
    assert (before.expected, before.not_yet) == (20, 0)
    assert (after.expected, after.not_yet) == (21, 1)
    assert after.findings == []


def test_known_holes_are_shown_with_their_reason_and_not_counted(shelf, new_york):
    spec = dataset()
    halted, missed = date(2025, 3, 12), date(2025, 3, 13)
    shelf.put(spec, bars(new_york, "AAPL", MARCH, NOW.date(), (halted, missed)))
    known = KnownHoles({"AAPL": (KnownHole(halted, halted, "halted"),)})
    found = shelf.judge(spec, ["AAPL"], MARCH, known=known)
    assert (found.missing, found.explained) == (1, 1)
    assert [(str(h.state), h.reason) for h in found.holes] == [("missing", ""), ("explained", "halted")]


def test_a_known_listing_makes_sessions_expected_before_the_first_row(shelf, new_york):
    spec = dataset()
    shelf.put(spec, bars(new_york, "FB", date(2025, 3, 12), NOW.date()))
    known = KnownHoles({"FB": (KnownHole(None, date(2025, 3, 9), "listed on 2025-03-10"),)})
    found = shelf.judge(spec, ["FB"], MARCH, known=known)
    assert told(found) == [("missing", date(2025, 3, 10), date(2025, 3, 11), 2, ("FB",))]
    assert found.before_first == 5
    assert found.subjects[0].note == "listed on 2025-03-10"


def test_rows_on_days_without_a_session_are_listed(shelf, new_york):
    spec = dataset()
    shelf.put(spec, [*bars(new_york, "AAPL", MARCH, NOW.date()), ("AAPL", date(2025, 3, 8))])
    found = shelf.judge(spec, ["AAPL"], MARCH)
    assert [(u.subject, u.day, u.rows) for u in found.unexpected] == [("AAPL", date(2025, 3, 8), 1)]
    assert found.findings == ["test.bars: 1 row on days without a session"]


def test_spans_judge_their_days_only_and_what_existed_before_is_expected(shelf, new_york):
    spec = dataset()
    shelf.put(spec, bars(new_york, "AAPL", MARCH, date(2025, 3, 27), (date(2025, 3, 12), date(2025, 3, 26))))
    span = [Interval(midnight(date(2025, 3, 25)), midnight(date(2025, 3, 29)))]
    found = shelf.judge(spec, ["AAPL", "IBM"], MARCH, spans=span, firsts={"AAPL": MARCH})
    assert not found.full
    assert found.sessions == 4
    assert [h for h in told(found) if "AAPL" in h[4]] == [
        ("missing", date(2025, 3, 26), date(2025, 3, 28), 3, ("AAPL",))
    ]
    alone = shelf.judge(spec, ["AAPL"], MARCH, spans=span)
    assert told(alone) == told(found)[1:]
    by_coverage = shelf.judge(spec, ["AAPL"], MARCH, spans=span, coverage={"AAPL": [covered(MARCH, NOW.date())]})
    assert by_coverage.missing == 3


def test_a_gap_at_the_beginning_of_a_span_is_a_hole_when_there_were_rows_before(shelf, new_york):
    spec = dataset()
    gone = (date(2025, 3, 25), date(2025, 3, 26))
    shelf.put(spec, bars(new_york, "AAPL", MARCH, NOW.date(), gone))
    span = [Interval(midnight(date(2025, 3, 25)), midnight(NOW.date()))]
    found = shelf.judge(spec, ["AAPL"], MARCH, spans=span)
    assert told(found) == [("missing", *gone, 2, ("AAPL",))]
    assert found.before_first == 0


def test_a_listing_within_a_span_is_no_hole_although_its_windows_were_answered(shelf, new_york):
    spec = dataset()
    listed = date(2025, 3, 26)
    shelf.put(spec, bars(new_york, "NEW", listed, NOW.date()))
    span = [Interval(midnight(date(2025, 3, 24)), midnight(NOW.date()))]
    coverage = {"NEW": [covered(date(2025, 3, 20), NOW.date())]}  # asked for days, the answer had rows of the last
    found = shelf.judge(spec, ["NEW"], MARCH, spans=span, coverage=coverage)
    assert (found.missing, found.before_first, found.present) == (0, 2, 4)


def test_a_delisted_symbol_that_is_answered_empty_every_night_breaks_no_promise(shelf, new_york):
    spec = dataset(settles="1 session")
    shelf.put(spec, bars(new_york, "LIVE", MARCH, date(2025, 4, 1)) + bars(new_york, "GONE", MARCH, date(2025, 3, 10)))
    coverage = {
        "LIVE": [covered(MARCH, NOW.date())],
        "GONE": [
            covered(MARCH, date(2025, 3, 10)),
            covered(date(2025, 3, 10), date(2025, 3, 29), Answer.EMPTY),
            covered(date(2025, 3, 29), NOW.date(), Answer.EMPTY, final=False),
        ],
    }
    promise = {"fresh_by": "19:00 America/New_York", "coverage": coverage}
    for spans in (None, [Interval(midnight(date(2025, 3, 25)), midnight(NOW.date()))]):
        found = shelf.judge(spec, ["LIVE", "GONE"], MARCH, spans=spans, **promise)
        assert found.freshness is not None
        assert found.freshness.state is FreshState.ON_TIME
        assert (found.missing, found.not_yet) == (0, 1)
    # one that had a row the day before does
    shelf.put(spec, bars(new_york, "GONE", date(2025, 3, 10), date(2025, 3, 31)))
    late = shelf.judge(spec, ["LIVE", "GONE"], MARCH, **promise).freshness
    assert late is not None
    assert late.behind == ("GONE",)


def test_spans_apart_make_holes_apart(shelf, new_york):
    spec = dataset()
    shelf.put(spec, bars(new_york, "AAPL", MARCH, date(2025, 3, 6)))
    spans = [
        Interval(midnight(date(2025, 3, 6)), midnight(date(2025, 3, 8))),
        Interval(midnight(date(2025, 3, 20)), midnight(date(2025, 3, 22))),
    ]
    found = shelf.judge(spec, ["AAPL"], MARCH, spans=spans, firsts={"AAPL": MARCH})
    assert [(h.first, h.last) for h in found.holes] == [
        (date(2025, 3, 6), date(2025, 3, 7)),
        (date(2025, 3, 20), date(2025, 3, 21)),
    ]


def test_a_hole_over_new_year_is_one_hole(shelf, new_york):
    spec = dataset()
    rows = bars(new_york, "A", date(2024, 12, 2), date(2024, 12, 27)) + bars(
        new_york, "A", date(2025, 1, 6), NOW.date()
    )
    shelf.put(spec, rows)
    found = shelf.judge(spec, ["A"], date(2024, 12, 2))
    assert told(found) == [("missing", date(2024, 12, 27), date(2025, 1, 3), 5, ("A",))]


def test_a_table_that_is_not_there_is_missing_altogether(shelf):
    found = shelf.judge(dataset(), ["AAPL"], date(2025, 3, 24), coverage={})
    assert told(found)[0] == ("missing", date(2025, 3, 24), date(2025, 3, 28), 5, ("AAPL",))
    assert found.present == 0


def test_unsound_bars_are_counted_with_examples(shelf, new_york):
    spec = dataset()
    days = bars(new_york, "AAPL", MARCH, NOW.date())
    shelf.put(spec, days)
    shelf.put(spec, [("AAPL", date(2025, 3, 5))], high=10.5, close=11.0)
    shelf.put(spec, [("AAPL", date(2025, 3, 6))], volume=-1)
    shelf.put(spec, [("AAPL", date(2025, 3, 7))], low=11.5, high=None)
    found = shelf.judge(spec, ["AAPL"], MARCH)
    assert {u.rule: u.rows for u in found.unsound} == {
        "high below open, low or close": 1,
        "low above open, high or close": 1,
        "volume below zero": 1,
    }
    assert found.unsound[0].examples == ("AAPL 2025-03-05 open 10 high 10.5 low 9 close 11 volume 100",)
    assert found.rows == 21


def test_freshness_is_late_only_after_the_promised_time(shelf, new_york):
    spec = dataset(published="30 minutes after close")
    shelf.put(spec, bars(new_york, "AAPL", MARCH, date(2025, 4, 1)) + bars(new_york, "IBM", MARCH, date(2025, 3, 29)))
    promise = {"fresh_by": "19:00 America/New_York"}

    def fresh(now: datetime):
        state = shelf.judge(spec, ["AAPL", "IBM"], MARCH, now=now, **promise).freshness
        assert state is not None
        return state

    waiting = fresh(datetime(2025, 3, 31, 22, 59, tzinfo=UTC))
    assert (waiting.state, waiting.session) == (FreshState.ON_TIME, date(2025, 3, 28))
    assert waiting.next_due == datetime(2025, 3, 31, 23, tzinfo=UTC)
    late = fresh(datetime(2025, 4, 1, 1, tzinfo=UTC))
    assert (late.state, late.session, late.behind) == (FreshState.LATE, date(2025, 3, 31), ("IBM",))
    assert late.late_seconds == 7200


def test_freshness_before_the_first_promise_is_not_due(shelf, new_york):
    spec = dataset()
    found = shelf.judge(
        spec,
        ["AAPL"],
        date(2025, 3, 31),
        now=datetime(2025, 3, 31, 21, tzinfo=UTC),
        fresh_by="19:00 America/New_York",
    )
    assert found.freshness is not None
    assert found.freshness.state is FreshState.NOT_DUE


def test_freshness_is_judged_although_the_spans_lie_elsewhere(shelf, new_york):
    spec = dataset()
    shelf.put(spec, bars(new_york, "AAPL", MARCH, date(2025, 3, 27)))
    found = shelf.judge(
        spec,
        ["AAPL"],
        MARCH,
        spans=[Interval(midnight(MARCH), midnight(date(2025, 3, 5)))],
        fresh_by="19:00 America/New_York",
    )
    assert found.freshness is not None
    assert found.freshness.state is FreshState.LATE


def test_daily_bars_stamped_at_local_midnight_belong_to_the_local_day(tmp_path, calendars):
    shanghai = calendars("XSHG")
    shelf = Shelf(tmp_path, shanghai)
    spec = dataset("datetime", calendar="XSHG")
    sessions = shanghai.sessions(MARCH, date(2025, 4, 1))
    shelf.put(spec, [("600000", midnight(day) - timedelta(hours=8)) for day in sessions])
    found = shelf.judge(spec, ["600000"], MARCH)
    assert (found.missing, found.present, found.unexpected_rows) == (0, 21, 0)


def test_daily_bars_stamped_at_utc_midnight_belong_to_that_date(shelf, new_york):
    spec = dataset("datetime")
    shelf.put(spec, [("A", midnight(day)) for day in new_york.sessions(MARCH, date(2025, 4, 1))])
    found = shelf.judge(spec, ["A"], MARCH)
    assert (found.missing, found.present, found.unexpected_rows) == (0, 21, 0)


def test_minute_bars_lack_a_session_only_when_it_has_no_row_at_all(shelf, new_york):
    spec = dataset("datetime", "minute")
    opens = [new_york.open(day) for day in new_york.sessions(MARCH, date(2025, 4, 1)) if day != date(2025, 3, 12)]
    shelf.put(spec, [("A", start + timedelta(minutes=m)) for start in opens for m in (0, 1, 380)])
    found = shelf.judge(spec, ["A"], MARCH)
    assert told(found) == [("missing", date(2025, 3, 12), date(2025, 3, 12), 1, ("A",))]
    assert found.months is not None
    assert found.months.rows == (60,)


def test_after_hours_bars_past_utc_midnight_belong_to_the_day_that_ends(shelf):
    spec = dataset("datetime", "minute")
    shelf.put(spec, [("A", datetime(2025, 3, 4, 0, 30, tzinfo=UTC))])  # Monday the 3rd, 19:30 in New York
    found = shelf.judge(spec, ["A"], MARCH, until=date(2025, 3, 4))
    assert (found.present, found.missing, found.unexpected_rows) == (1, 0, 0)


def test_the_evening_of_futures_belongs_to_the_next_session(tmp_path, calendars):
    chicago = calendars("CMES")
    shelf = Shelf(tmp_path, chicago)
    spec = dataset("datetime", "minute", calendar="CMES")
    evenings = [datetime(2025, 3, day, 23, 30, tzinfo=UTC) for day in (2, 3, 4)]  # Sunday to Tuesday
    shelf.put(spec, [("ES", moment) for moment in evenings])
    found = shelf.judge(spec, ["ES"], MARCH, until=date(2025, 3, 7))
    assert (found.present, found.unexpected_rows) == (3, 0)
    assert told(found) == [("missing", date(2025, 3, 6), date(2025, 3, 6), 1, ("ES",))]


def test_a_dataset_asked_for_all_symbols_at_once_is_judged_by_session(shelf, new_york):
    spec = dataset(over={"session": "XNYS"})
    shelf.put(spec, [("A", MARCH), ("B", date(2025, 3, 4)), ("A", date(2025, 3, 6))])
    found = shelf.judge(spec, ["*"], MARCH, until=date(2025, 3, 7))
    assert told(found) == [("missing", date(2025, 3, 5), date(2025, 3, 5), 1, ("*",))]


def test_many_symbols_get_the_worst_lines_and_one_for_the_others(shelf, new_york):
    spec = dataset()
    names = [f"S{n:03d}" for n in range(700)]
    first = date(2000, 1, 3)
    shelf.put(spec, [(name, day) for name in names for day in (first, date(2025, 3, 31)) if name != "S500"])
    found = shelf.judge(spec, names, first)
    assert found.months is not None
    assert found.months.others == 550
    assert found.months.subjects[-1] == "all others"
    assert len(found.months.subjects) == 151
    assert sum(sum(line) for line in found.months.expected) == found.expected - found.not_yet


def test_without_a_calendar_only_soundness_is_judged(tmp_path):
    spec = dataset("datetime", "irregular", calendar=None)
    shelf = Shelf(tmp_path, None)  # type: ignore[arg-type]
    shelf.put(spec, [("A", datetime(2025, 3, 4, 12, tzinfo=UTC))], low=13.0, high=None)
    found = shelf.judge(spec, ["A"], MARCH)
    assert (found.expected, found.rows, [u.rule for u in found.unsound]) == (0, 1, ["low above open, high or close"])


WINDOW = [date(2025, 3, 3) + timedelta(days=n) for n in range(26)]


@settings(max_examples=25)
@given(st.sets(st.sampled_from(WINDOW)), st.sets(st.integers(0, 25), max_size=6), st.booleans())
def test_every_session_gets_exactly_one_verdict(tmp_path_factory, days, edges, with_coverage):
    calendar = Calendar.of("T", [d for d in WINDOW if d.weekday() < 5], last_day=date(2025, 12, 31), closes_at=time(16))
    shelf = Shelf(tmp_path_factory.mktemp("store"), calendar)
    spec = dataset(calendar="T")
    shelf.put(spec, [("A", day) for day in sorted(days)])
    coverage = None
    if with_coverage:
        cut = sorted(edges)
        answers = [Answer.ROWS, Answer.EMPTY, Answer.NOT_YET]
        coverage = {
            "A": [covered(WINDOW[a], WINDOW[b], answers[i % 3], i % 2 == 0) for i, (a, b) in enumerate(pairwise(cut))]
        }
    found = shelf.judge(spec, ["A"], WINDOW[0], coverage=coverage, now=datetime(2025, 3, 30, tzinfo=UTC))
    sessions = [d for d in WINDOW if d.weekday() < 5]
    assert found.sessions == len(sessions) == found.expected + found.before_first
    assert found.present == len([d for d in sessions if d in days])
    told_days = [d for h in found.holes for d in sessions if h.first <= d <= h.last]
    assert len(told_days) == len(set(told_days)) == found.missing + found.empty + found.not_yet + found.explained
    assert not set(told_days) & days
    assert found.unexpected_rows == len([d for d in days if d.weekday() >= 5])
    assert found.expected == found.present + len(told_days)


# ---------------------------------------------------------------- known holes, and the sample's


def test_known_holes_are_read_as_days_ranges_and_open_ranges(tmp_path):
    file = tmp_path / "holes.yml"
    file.write_text(
        "AAPL: {2012-10-29: storm, 2012-11-01..2012-11-02: halted}\n"
        "FB:\n  ..2012-05-17: listed on 2012-05-18\n  2022-06-09..: renamed META\n",
        encoding="utf-8",
    )
    known = read_known_holes(file)
    assert known.of("AAPL")[1] == KnownHole(date(2012, 11, 1), date(2012, 11, 2), "halted")
    assert known.of("FB") == (
        KnownHole(None, date(2012, 5, 17), "listed on 2012-05-18"),
        KnownHole(date(2022, 6, 9), None, "renamed META"),
    )


def test_a_wrong_day_in_the_file_is_told_with_its_line(tmp_path):
    file = tmp_path / "holes.yml"
    file.write_text("AAPL:\n  2012-10-29: storm\n  last tuesday: forgot\n  2012-11-05:\n", encoding="utf-8")
    with pytest.raises(ConfigurationError) as caught:
        read_known_holes(file)
    assert [problem.line for problem in caught.value.problems] == [3, 4]
    assert "'last tuesday' is no day and no range of days" in str(caught.value)


def test_the_sample_market_is_complete_from_each_listing_on(shelf, new_york):
    spec = dataset()
    market = bokeh()
    rows = pl.concat(market.series(s, "1Day").frame(0, 9999) for s in market.symbols)  # type: ignore[union-attr]
    shelf.put(spec, rows.select("symbol", "date").rows())
    known = read_known_holes(HOLES)
    found = shelf.judge(
        spec, list(market.symbols), date(2000, 3, 1), until=date(2013, 3, 2), known=known, allowed_missing=0.0
    )
    assert (found.missing, found.unexpected_rows, found.holes) == (0, 0, ())
    assert found.present == len(rows) == 12_154
    notes = {c.subject: (c.first, c.before_first, bool(c.note)) for c in found.subjects}
    assert notes["FB"] == (date(2012, 5, 18), 3074, True)
    assert notes["GOOG"] == (date(2004, 8, 19), 1122, True)
    assert notes["IBM"] == (date(2000, 3, 1), 0, False)
    assert found.expected == found.present
    assert HoleState.MISSING not in {h.state for h in found.holes}
