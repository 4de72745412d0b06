"""The gate: rows come out in exactly the schema's types, or are set aside with the reason; nothing is lost between."""

from __future__ import annotations

import json
from datetime import UTC, date, datetime, timedelta

import polars as pl
import pytest

from marketsync.definition import Dataset, Field_
from marketsync.gate import OUTSIDE, Batch, gate, read_column, seal
from marketsync.schema import Column, ColumnType, Schema

BARS = Dataset.model_validate(
    {
        "schema": {
            "s": {"as": "symbol", "type": "str"},
            "t": {"as": "ts", "type": "datetime"},
            "o": {"as": "open", "type": "f64", "required": True},
            "v": {"as": "volume", "type": "i64"},
        },
        "key": ["symbol", "ts"],
    }
)


def bars(*rows: tuple) -> pl.DataFrame:
    return pl.DataFrame(
        list(rows),
        schema={"symbol": pl.String, "ts": pl.String, "open": pl.Float64, "volume": pl.Float64},
        orient="row",
    )


def batch(*rows: tuple, start: datetime | None = None, end: datetime | None = None) -> Batch:
    return Batch(bars(*rows), len(rows), start=start, end=end)


def at(day: int, hour: int = 0) -> str:
    return f"2024-01-{day:02d}T{hour:02d}:00:00Z"


def read(values: list, type: str, dtype: pl.DataType | None = None, **more) -> list:
    return read_column(
        pl.Series("x", values, dtype=dtype, strict=False), Field_(type=ColumnType(type), **more)
    ).to_list()


def adds_up(gated) -> None:
    assert gated.fetched == gated.kept + gated.duplicates + gated.quarantined


def test_good_rows_come_out_in_the_schema_s_types_and_order() -> None:
    gated = seal(BARS, [batch(("A", at(2), 1.5, 7.0), ("A", at(3), 2.5, None))])
    assert gated.frame.schema == BARS.stored().polars()
    assert gated.frame.row(0) == ("A", datetime(2024, 1, 2, tzinfo=UTC), 1.5, 7)
    assert gated.frame["volume"].to_list() == [7, None]
    adds_up(gated)


def test_each_kind_of_bad_row_is_set_aside_with_its_reason_and_its_raw_values() -> None:
    window = {"start": datetime(2024, 1, 1, tzinfo=UTC), "end": datetime(2024, 1, 10, tzinfo=UTC)}
    gated = seal(
        BARS,
        [
            batch(
                ("A", at(2), 1.0, 2.7),
                (None, at(2), 1.0, 1.0),
                ("A", "yesterday", 1.0, 1.0),
                ("A", at(10), 1.0, 1.0),
                ("A", at(3), None, 1.0),
                ("A", at(4), 1.0, 1.0),
                **window,
            )
        ],
    )
    assert gated.kept == 1
    reasons = dict(zip(gated.rejected["column"], gated.rejected["reason"], strict=False))
    assert "2.7 is not a whole number" in gated.rejected["reason"][0]
    assert gated.rejected["column"].to_list() == ["volume", "symbol", "ts", "ts", "open"]
    assert "no value" in reasons["symbol"]
    assert "'yesterday' is not a time" in gated.rejected["reason"][2]
    assert gated.rejected["reason"][3] == OUTSIDE
    assert json.loads(gated.rejected["raw"][0]) == {"s": "A", "t": at(2), "o": 1.0, "v": 2.7}
    adds_up(gated)


def test_a_row_with_two_faults_is_counted_once() -> None:
    gated = seal(BARS, [batch((None, "never", None, 2.5), ("A", at(2), 1.0, 1.0))])
    assert (gated.kept, gated.quarantined) == (1, 1)
    adds_up(gated)


def test_of_two_rows_with_one_key_the_later_is_kept() -> None:
    gated = seal(
        BARS,
        [batch(("A", at(2), 1.0, 1.0), ("B", at(2), 5.0, 1.0)), batch(("A", at(2), 9.0, 1.0), ("A", at(3), 1.0, 1.0))],
    )
    assert gated.duplicates == 1
    assert gated.frame.filter(symbol="A", ts=datetime(2024, 1, 2, tzinfo=UTC))["open"].to_list() == [9.0]
    adds_up(gated)


@pytest.mark.parametrize(
    "rows",
    [
        [("A", 2), ("A", 3), ("B", 2), ("A", 2)],  # a subject comes back later with the same time
        [("A", 3), ("A", 2), ("A", 3)],  # neither ascending nor descending
        [("A", 2), ("A", 2)],
        [("A", 3), ("A", 2), ("B", 3), ("A", 2)],  # newest first, a subject comes back
    ],
)
def test_repeated_keys_are_found_in_every_order_of_rows(rows: list) -> None:
    gated = seal(BARS, [batch(*((symbol, at(day), 1.0, 1.0) for symbol, day in rows))])
    assert gated.duplicates == 1
    adds_up(gated)


@pytest.mark.parametrize("rows", [[("A", 2), ("A", 3), ("B", 2)], [("B", 3), ("B", 2), ("A", 3)], [("A", 3), ("B", 2)]])
def test_distinct_keys_lose_nothing_in_any_order(rows: list) -> None:
    assert seal(BARS, [batch(*((symbol, at(day), 1.0, 1.0) for symbol, day in rows))]).duplicates == 0


@pytest.mark.parametrize("repeated", [False, True])
@pytest.mark.parametrize("newest_first", [False, True])
def test_keys_are_compared_between_the_pages_of_chains_that_lie_in_turn(repeated: bool, newest_first: bool) -> None:
    def page(symbol: str, first: int) -> Batch:
        hours = range(first, first + 20)
        moments = [datetime(2024, 1, 1, tzinfo=UTC) + timedelta(hours=hour) for hour in hours]
        rows = [(symbol, f"{moment:%Y-%m-%dT%H:%M:%SZ}", 1.0, 1.0) for moment in moments]
        return batch(*(rows[::-1] if newest_first else rows))

    second = 19 if repeated else 20
    gated = seal(BARS, [page("A", 0), page("B", 0), page("A", 40), page("B", 20), page("A", second)])
    assert gated.duplicates == (1 if repeated else 0)
    adds_up(gated)


def test_the_window_of_each_page_holds_for_its_own_rows_only() -> None:
    first = batch(("A", at(2), 1.0, 1.0), start=datetime(2024, 1, 2, tzinfo=UTC), end=datetime(2024, 1, 3, tzinfo=UTC))
    second = batch(
        ("A", at(3), 1.0, 1.0),
        ("A", at(2, 23), 1.0, 1.0),
        start=datetime(2024, 1, 3, tzinfo=UTC),
        end=datetime(2024, 1, 4, tzinfo=UTC),
    )
    gated = seal(BARS, [first, second])
    assert gated.frame["ts"].to_list() == [datetime(2024, 1, 2, tzinfo=UTC), datetime(2024, 1, 3, tzinfo=UTC)]
    assert gated.rejected["reason"].to_list() == [OUTSIDE]


def test_the_end_of_a_window_is_outside_and_its_start_is_inside() -> None:
    start, end = datetime(2024, 1, 2, tzinfo=UTC), datetime(2024, 1, 3, tzinfo=UTC)
    gated = seal(BARS, [batch(("A", at(2), 1.0, 1.0), ("A", at(3), 1.0, 1.0), start=start, end=end)])
    assert gated.frame["ts"].to_list() == [start]
    assert gated.quarantined == 1


def test_a_date_column_is_compared_with_the_window_by_days() -> None:
    schema = Schema((Column("day", ColumnType.DATE, False),), ("day",), time="day")
    frame = pl.DataFrame({"day": ["2024-01-01", "2024-01-02", "2024-01-03"]})
    start, end = datetime(2024, 1, 2, tzinfo=UTC), datetime(2024, 1, 2, 12, tzinfo=UTC)
    assert gate(schema, frame, start=start, end=end).frame["day"].to_list() == [date(2024, 1, 2)]


def test_pages_written_differently_are_judged_together() -> None:
    exact = Batch(bars(("A", at(3), 1.0, 1.0)).with_columns(pl.col("volume").cast(pl.String)), 1)
    gated = seal(BARS, [batch(("A", at(2), 1.0, 1.0)), exact, batch(("A", at(3), 7.0, 1.0))])
    assert gated.frame["open"].to_list() == [1.0, 7.0]
    assert gated.duplicates == 1


def test_no_pages_and_empty_pages_give_an_empty_frame_of_the_right_types() -> None:
    assert seal(BARS, []).frame.schema == BARS.stored().polars()
    assert seal(BARS, [batch()]).frame.schema == BARS.stored().polars()


def test_a_missing_column_is_null_where_it_may_be_and_a_reason_where_not() -> None:
    gated = seal(BARS, [Batch(bars(("A", at(2), 1.0, 1.0)).drop("volume"), 1)])
    assert gated.frame["volume"].to_list() == [None]
    gated = seal(BARS, [Batch(bars(("A", at(2), 1.0, 1.0)).drop("open"), 1)])
    assert gated.rejected["column"].to_list() == ["open"]


@pytest.mark.parametrize("lost", [2.7, 2.0**53, 1e30, -(2.0**60), float("nan"), float("inf")])
def test_a_float_that_is_no_exact_whole_number_never_becomes_one(lost: float) -> None:
    assert read([1.0, lost], "i64", pl.Float64()) == [1, None]


@pytest.mark.parametrize(("text", "value"), [("12", 12), ("12.0", 12), ("1e3", 1000), (" 7 ", 7), ("-0", 0)])
def test_whole_numbers_are_read_from_text(text: str, value: int) -> None:
    assert read([text], "i64") == [value]


@pytest.mark.parametrize("text", ["1.5", "x", "1_000", "0x10", "9007199254740993.5", "99999999999999999999"])
def test_text_that_is_no_whole_number_that_fits_is_refused(text: str) -> None:
    assert read([text], "i64") == [None]


def test_large_whole_numbers_survive_as_text() -> None:
    assert read(["9007199254740993", "9223372036854775807"], "i64") == [9007199254740993, 9223372036854775807]
    assert read(["18446744073709551615", "-1"], "u64") == [18446744073709551615, None]
    assert read([3e9], "i32", pl.Float64()) == [None]


@pytest.mark.parametrize("text", ["nan", "inf", "-Infinity", "1e400", "1,5", "1_0", "one"])
def test_a_number_that_is_not_finite_or_not_a_number_is_refused(text: str) -> None:
    assert read([text], "f64") == [None]
    schema = Schema((Column("k", ColumnType.STR, False), Column("x", ColumnType.F64)), ("k",))
    assert gate(schema, pl.DataFrame({"k": ["a"], "x": [text]})).quarantined == 1


def test_texts_that_stand_for_a_missing_value_are_null_and_not_set_aside() -> None:
    schema = Schema((Column("k", ColumnType.STR, False), Column("x", ColumnType.F64)), ("k",))
    fields = {"x": Field_(type=ColumnType.F64, nulls=(".", "-999"))}
    gated = gate(schema, pl.DataFrame({"k": ["a", "b", "c", "d"], "x": [".", "-999", "", "1"]}), fields=fields)
    assert gated.frame["x"].to_list() == [None, None, None, 1.0]
    numbers = gate(schema, pl.DataFrame({"k": ["a", "b"], "x": [-999.0, 1.0]}), fields=fields)
    assert numbers.frame["x"].to_list() == [None, 1.0]


def test_text_keeps_leading_zeros_blanks_and_the_word_NA() -> None:
    assert read(["000001", "NA", " x ", ""], "str") == ["000001", "NA", " x ", ""]


def test_scale_gives_the_nearest_price() -> None:
    assert read([12345.0, 1234567.0], "f64", pl.Float64(), scale=0.0001) == [1.2345, 123.4567]
    assert read(["3"], "f64", scale=100) == [300.0]


def test_truth_is_read_from_the_usual_spellings_only() -> None:
    assert read(["true", "False", "1", "0", "maybe", None], "bool") == [True, False, True, False, None, None]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2024-01-02T14:30:00Z", datetime(2024, 1, 2, 14, 30, tzinfo=UTC)),
        ("2024-01-02T14:30:00.25Z", datetime(2024, 1, 2, 14, 30, 0, 250_000, tzinfo=UTC)),
        ("2024-01-02T09:30:00-05:00", datetime(2024, 1, 2, 14, 30, tzinfo=UTC)),
        ("2024-01-02T09:30:00-0500", datetime(2024, 1, 2, 14, 30, tzinfo=UTC)),
        ("2024-01-02 14:30:00", datetime(2024, 1, 2, 14, 30, tzinfo=UTC)),
        ("2024-01-02 14:30", datetime(2024, 1, 2, 14, 30, tzinfo=UTC)),
        ("2024-01-02", datetime(2024, 1, 2, tzinfo=UTC)),
    ],
)
def test_iso_times_are_read_in_every_spelling_alone_and_side_by_side(text: str, expected: datetime) -> None:
    assert read([text], "datetime") == [expected]
    mixed = read(["2020-02-03T04:05:06Z", text, "no time", None], "datetime")
    assert mixed == [datetime(2020, 2, 3, 4, 5, 6, tzinfo=UTC), expected, None, None]


@pytest.mark.parametrize("text", ["2024-02-30T00:00:00Z", "2024-01-02T25:00:00Z", "2024-01-02T14:30:00Z tail", "0"])
def test_times_that_do_not_exist_are_refused(text: str) -> None:
    assert read([text], "datetime") == [None]


def test_times_without_a_zone_are_in_the_column_s_zone_and_clock_changes_are_never_guessed() -> None:
    texts = ["2024-06-01T10:00:00", "2024-03-10T02:30:00", "2024-11-03T01:30:00"]
    read_ = read(texts, "datetime", zone="America/New_York")
    assert read_ == [datetime(2024, 6, 1, 14, tzinfo=UTC), None, None]
    schema = Schema((Column("t", ColumnType.DATETIME, False),), ("t",), time="t")
    fields = {"t": Field_(type=ColumnType.DATETIME, zone="America/New_York")}
    gated = gate(schema, pl.DataFrame({"t": texts}), fields=fields)
    assert gated.quarantined == 2
    assert "clocks change" in gated.rejected["reason"][0]


def test_a_date_taken_from_an_instant_is_the_day_in_the_column_s_zone() -> None:
    assert read(["2024-01-02T05:00:00Z"], "date", zone="America/New_York") == [date(2024, 1, 2)]
    assert read(["2024-01-02T04:59:59Z"], "date", zone="America/New_York") == [date(2024, 1, 1)]
    assert read([1704171600000.0], "date", pl.Float64(), format="unix_ms", zone="Asia/Shanghai") == [date(2024, 1, 2)]


@pytest.mark.parametrize("raw", [["20240102", "20240230"], [20240102, 20240230], [20240102.0, 20240230.0]])
def test_dates_by_pattern_are_read_from_text_and_from_numbers(raw: list) -> None:
    assert read(raw, "date", format="%Y%m%d") == [date(2024, 1, 2), None]


@pytest.mark.parametrize("quoted", [True, False])
@pytest.mark.parametrize(("form", "number"), [("unix_s", 1), ("unix_ms", 1000), ("unix_us", 10**6), ("unix_ns", 10**9)])
def test_unix_times_are_read_from_numbers_and_from_text(form: str, number: int, quoted: bool) -> None:
    moment = datetime(2024, 1, 2, 14, 30, tzinfo=UTC)
    value = int(moment.timestamp()) * number
    assert read([str(value) if quoted else value], "datetime", format=form) == [moment]
    assert read([str(value) if quoted else value], "datetime", format="unix_auto") == [moment]


def test_unix_auto_tells_each_value_by_its_size() -> None:
    values = [1_704_205_800, 1_704_205_800_000, 1_704_205_800_000_000]
    assert set(read(values, "datetime", format="unix_auto")) == {datetime(2024, 1, 2, 14, 30, tzinfo=UTC)}


def test_nanoseconds_survive_in_text_and_numbers() -> None:
    texts = ["2024-01-02T14:30:00.123456789Z"]
    column = read_column(pl.Series("x", texts), Field_(type=ColumnType.DATETIME_NS))
    assert column.dt.nanosecond().to_list() == [123_456_789]
    column = read_column(pl.Series("x", ["1704205800.123456789"]), Field_(type=ColumnType.DATETIME_NS, format="unix_s"))
    assert column.dt.nanosecond().to_list() == [123_456_789]


def test_instants_that_the_type_cannot_hold_are_refused_instead_of_wrapping_around() -> None:
    assert read(["3000-01-01T00:00:00Z"], "datetime_ns") == [None]
    assert read([1e15], "datetime", pl.Float64(), format="unix_s") == [None]
    assert read(["99999999999999"], "datetime", format="unix_s") == [None]
    assert read(["0001-01-01"], "date") == [date(1, 1, 1)]


def test_gate_takes_frames_that_are_typed_already() -> None:
    schema = Schema(
        (
            Column("ts", ColumnType.DATETIME, False),
            Column("day", ColumnType.DATE),
            Column("n", ColumnType.I32),
            Column("x", ColumnType.F32),
        ),
        ("ts",),
        time="ts",
    )
    moment = datetime(2024, 1, 2, 3, tzinfo=UTC)
    frame = pl.DataFrame({"extra": [1], "n": [5], "x": [0.5], "ts": [moment], "day": [moment + timedelta(days=1)]})
    gated = gate(schema, frame)
    assert gated.frame.schema == schema.polars()
    assert gated.frame.row(0) == (moment, date(2024, 1, 3), 5, 0.5)
