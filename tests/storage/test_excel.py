"""What only the Excel store does: workbooks for people to read, and maybe to save again: openpyxl is that person."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import openpyxl
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from polars.testing import assert_frame_equal
from stored_frames import BARS, START, bars, batch, differences, stamped

import storage.files
from marketsync.errors import RowsRefused, SchemaError, StoreBusy, StoreDamaged, StoreError
from marketsync.schema import Column, ColumnType, Schema
from storage import workbook
from storage.protocol import Filter, Mode, Written
from storage.registry import open_store

NAME = "made.bars"
BY_KEY = ["symbol", "ts"]
EMOJI = "\U0001f4c8"


class Crash(BaseException):
    """The process ends here."""


@pytest.fixture
def store(tmp_path: Path):
    return open_store(f"excel://{tmp_path}")


def book(tmp_path: Path) -> Path:
    return tmp_path / "made" / "bars.xlsx"


def saved_again(path: Path, change: Callable[[Any], None]) -> None:
    opened = openpyxl.load_workbook(path)
    change(opened)
    opened.save(path)


def there_and_back(values: pl.Series, path: Path) -> pl.Series:
    frame = values.to_frame("x").with_row_index("n").cast({"n": pl.Int64})  # a row is never empty: it has a key
    workbook.write(path, frame)
    return pl.concat(workbook.read(path.read_bytes(), dict(frame.schema), frame.height, frame.columns))["x"]


# what a person sees


def test_a_person_sees_a_frozen_header_real_dates_and_real_numbers(store, tmp_path: Path):
    schema = Schema(
        (*BARS.columns, Column("day", ColumnType.DATE), Column("traded", ColumnType.BOOL)), BARS.key, "ts", "symbol"
    )
    store.ensure(NAME, schema)
    frame = bars(("000001",), rows=3).with_columns(
        pl.Series("close", [0.1, None, 3.5]), day=pl.col("ts").dt.date(), traded=pl.Series([True, False, None])
    )
    store.write(batch(NAME, frame, schema=schema))
    sheet = openpyxl.load_workbook(book(tmp_path)).active
    assert sheet is not None
    assert sheet.freeze_panes == "A2"
    assert sheet.auto_filter.ref == "A1:H4"
    header, first, second, _ = sheet.iter_rows()
    assert [cell.value for cell in header] == [*schema.names, "_segment", "_ingested_at"]
    assert all(cell.font.b for cell in header)
    notes = {cell.value: cell.comment.text for cell in header if cell.comment}
    assert notes == dict.fromkeys(("ts", "_ingested_at"), "MarketSync:\nin UTC")
    assert [cell.value for cell in first[:6]] == [
        "000001",
        datetime(2001, 1, 30, 9, 30),  # noqa: DTZ001 - Excel knows no zone
        0.1,
        0,
        datetime(2001, 1, 30),  # noqa: DTZ001
        True,
    ]
    assert [cell.data_type for cell in first[:6]] == ["s", "d", "n", "n", "d", "b"]
    formats = [cell.number_format for cell in first[:5]]
    assert formats == ["@", "yyyy-mm-dd hh:mm:ss", "General", "General", "yyyy-mm-dd"]
    assert [cell.value for cell in second[2:6]] == [None, 1, datetime(2001, 1, 30), False]  # noqa: DTZ001
    assert sheet.column_dimensions["B"].width > len("2001-01-30 09:30:00")


@pytest.mark.parametrize(
    ("texts", "letters"),
    [(["x" * 30, "y"], 31), (["贵州茅台酒股份有限公司"], 23), (["a", None], 9), (["z" * 1000], 60), ([None], 9)],
    ids=["letters", "characters as wide as two", "short", "long", "none"],
)
def test_a_column_of_texts_is_as_wide_as_its_texts_within_limits(tmp_path: Path, texts: list, letters: int):
    values = pl.Series(texts, dtype=pl.String)
    frame = pl.DataFrame({"x": values, "a_long_name_of_a_column": pl.Series([None] * len(texts), dtype=pl.String)})
    workbook.write(tmp_path / "a.xlsx", frame)
    sheet = openpyxl.load_workbook(tmp_path / "a.xlsx").active
    assert sheet is not None
    assert letters <= sheet.column_dimensions["A"].width < letters + 1
    assert sheet.column_dimensions["B"].width > len("a_long_name_of_a_column")


def test_rows_stand_by_symbol_and_time_however_they_came(store, tmp_path: Path):
    store.ensure(NAME, BARS)
    store.write(batch(NAME, bars(("B",), first=5, rows=3), 1))
    store.write(batch(NAME, bars(("A", "B"), first=3, rows=4).sample(fraction=1.0, shuffle=True, seed=1), 2))
    sheet = openpyxl.load_workbook(book(tmp_path)).active
    assert sheet is not None
    keys = [row[:2] for row in sheet.iter_rows(min_row=2, values_only=True)]
    assert keys == sorted(keys)  # pyright: ignore[reportArgumentType]
    assert len(keys) == 4 + 5


NANOS = pl.Datetime("ns", "UTC")
MICROS = pl.Datetime("us", "UTC")


@pytest.mark.parametrize(
    ("values", "cells"),
    [
        (
            pl.Series([10**15, 10**15 + 1, 2**53 + 1, -(2**63)]),
            [10**15, str(10**15 + 1), str(2**53 + 1), str(-(2**63))],
        ),
        (pl.Series([2**64 - 1, 1], dtype=pl.UInt64), [str(2**64 - 1), 1]),
        (pl.Series([math.nan, math.inf, -math.inf, -0.0, 5e-324, 0.0]), ["nan", "inf", "-inf", "-0.0", "5e-324", 0]),
        (pl.Series([0.1, -0.0, 16777217.0], dtype=pl.Float32), [0.1, "-0.0", 16777216]),
        (pl.Series([date(1, 1, 1), date(1900, 2, 28)]), ["0001-01-01", "1900-02-28"]),
        (pl.Series([date(1900, 3, 1), date(9999, 12, 31)]), [datetime(1900, 3, 1), datetime(9999, 12, 31)]),  # noqa: DTZ001
        (pl.Series([0, -2_300_000_000_000_000]).cast(MICROS), [datetime(1970, 1, 1), "1897-02-11T15:06:40.000000Z"]),  # noqa: DTZ001
        (pl.Series([1, 10**9]).cast(NANOS), ["1970-01-01T00:00:00.000000001Z", datetime(1970, 1, 1, 0, 0, 1)]),  # noqa: DTZ001
        (pl.Series(["", None, '"', 'say "a"', '"a"']), ['""', None, r'"\""', 'say "a"', r'"\"a\""']),
        (pl.Series(["a\r\nb", "\0", "\x1b", "\ufffe"]), [r'"a\r\nb"', r'"\u0000"', r'"\u001b"', r'"\ufffe"']),
        (pl.Series(["=1+1", "000001", "1e5", " a ", "a\n\tb", "@x"]), ["=1+1", "000001", "1e5", " a ", "a\n\tb", "@x"]),
    ],
    ids=lambda value: str(value.dtype) if isinstance(value, pl.Series) else "",
)
def test_what_a_plain_cell_would_change_is_text_and_comes_back(values: pl.Series, cells: list, tmp_path: Path):
    assert not differences(
        there_and_back(values, tmp_path / "a.xlsx").to_frame().with_row_index(),
        values.to_frame("x").with_row_index(),
        ["index"],
    )
    sheet = openpyxl.load_workbook(tmp_path / "a.xlsx").active
    assert sheet is not None
    shown = [row[1] for row in sheet.iter_rows(min_row=2)]
    assert [cell.value for cell in shown] == cells
    assert not any(cell.data_type == "f" for cell in shown)
    if values.dtype.is_integer():  # longer than what a plain format shows in full
        assert {cell.number_format for cell in shown} == {"0"}


def test_sheets_of_plain_cells_and_of_several_kinds_stand_in_one_workbook(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(workbook, "SHEET_ROWS", 3)
    monkeypatch.setattr(workbook, "_AT_ONCE_ROWS", 2)
    numbers = [1.5, None, 3.0, 4.0, math.nan, 5.0, -0.0, None, math.inf, None]
    values = pl.Series("x", numbers)
    assert there_and_back(values, tmp_path / "a.xlsx").equals(values, null_equal=True)
    book = openpyxl.load_workbook(tmp_path / "a.xlsx")
    cells = [[row[1] for row in sheet.iter_rows(min_row=2, values_only=True)] for sheet in book]
    assert cells == [[1.5, None, 3], [4, "nan", 5], ["-0.0", None, "inf"], [None]]


def test_when_a_row_came_is_a_date_whatever_its_microseconds(store, tmp_path: Path):
    """3 us beside a whole millisecond another program would lose; here that is no harm, and all cells stay plain."""
    store.ensure(NAME, BARS)
    came = datetime(2026, 1, 2, 3, 4, 5, 678_003, UTC)
    store.write(batch(NAME, bars().with_columns(pl.lit(came, MICROS).alias("_ingested_at"))))
    sheet = openpyxl.load_workbook(book(tmp_path)).active
    assert sheet is not None
    assert {cell.data_type for (cell,) in sheet.iter_rows(min_row=2, min_col=6, max_col=6)} == {"d"}
    assert store.scan(NAME, Filter(system=True)).collect()["_ingested_at"].unique().to_list() == [came]


def test_a_text_that_looks_like_an_escape_is_escaped_as_excel_does_it(tmp_path: Path):
    values = pl.Series(["_x0041_", "_x000D_", "_x005F_x0041_", "_xZZZZ_"])
    assert there_and_back(values, tmp_path / "a.xlsx").to_list() == values.to_list()


@given(
    st.lists(st.integers(-62_135_596_800_000_000, 253_402_300_799_999_999), min_size=1),
    st.lists(st.text(st.sampled_from("_x0041aF\r\n\t\" \\\x01\ufffe\x7f\u0085&<]中\u2028='"), max_size=12), min_size=1),
)
@settings(max_examples=25)
def test_any_microsecond_and_any_text_comes_back(tmp_path_factory, instants: list[int], texts: list[str]):
    path = tmp_path_factory.mktemp("any") / "a.xlsx"
    times = pl.Series(instants).cast(MICROS)
    assert there_and_back(times, path).to_list() == times.to_list()
    assert there_and_back(pl.Series(texts), path).to_list() == texts


def test_microseconds_are_real_dates_in_our_days(tmp_path: Path):
    """A day-fraction tells microseconds apart until 2079; openpyxl sees dates, though it rounds them."""
    times = pl.Series([datetime(2024, 3, 1, 14, 30, 0, n, UTC) for n in (123_456, 7, 999_994, 500_250)]).cast(MICROS)
    assert there_and_back(times, tmp_path / "a.xlsx").to_list() == times.to_list()
    sheet = openpyxl.load_workbook(tmp_path / "a.xlsx").active
    assert sheet is not None
    assert {cell.data_type for (cell,) in sheet.iter_rows(min_row=2, min_col=2)} == {"d"}
    assert sheet["B3"].number_format == "yyyy-mm-dd hh:mm:ss.000"


@pytest.mark.parametrize("text", ["x" * 32_768, EMOJI * 16_384, "\r" * 20_000], ids=["long", "emoji", "escaped"])
def test_a_text_that_no_cell_can_hold_is_refused_with_the_reason(store, text: str):
    store.ensure(NAME, BARS)
    store.write(batch(NAME, bars(rows=2), 1))
    with pytest.raises(SchemaError, match=r"32767.*use another store"):
        store.write(batch(NAME, bars((text,), rows=1), 2))
    assert store.committed(NAME, "lane") == 1
    assert store.count(NAME) == 4
    assert "longest_text" in store.capabilities.why
    longest = text[: len(text) * 32_767 // 32_768] if "\r" not in text else "\r" * 16_000
    assert store.write(batch(NAME, bars((longest,), rows=1), 2)) == Written(inserted=1)
    assert store.count(NAME, Filter([longest])) == 1


# sheets


def test_rows_go_on_in_another_sheet_where_one_is_full(store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(workbook, "SHEET_ROWS", 10)
    store.ensure(NAME, BARS)
    store.write(batch(NAME, bars(("A", "B"), rows=13), 1))
    sheets = openpyxl.load_workbook(book(tmp_path)).worksheets
    assert [(sheet.title, sheet.max_row, sheet.freeze_panes) for sheet in sheets] == [
        ("rows", 11, "A2"),
        ("rows 2", 11, "A2"),
        ("rows 3", 7, "A2"),
    ]
    assert all(sheet["A1"].value == "symbol" for sheet in sheets)
    frame = bars(("A", "B"), rows=13)
    assert_frame_equal(store.scan(NAME).collect().sort(BY_KEY), frame.select(BARS.names).sort(BY_KEY))
    assert store.write(batch(NAME, bars(("A", "B"), first=12, rows=4, add=1.0), 2)) == Written(6, 2)
    assert store.delete(NAME, Filter(until=START + timedelta(hours=11))) == 22
    assert [sheet.title for sheet in openpyxl.load_workbook(book(tmp_path)).worksheets] == ["rows"]
    assert store.count(NAME) == store.scan(NAME).collect().height == 10


def test_a_sheet_is_as_long_as_excel_allows():
    assert workbook.sheet_names(1_048_575) == ["rows"]
    assert workbook.sheet_names(1_048_576) == ["rows", "rows 2"]


# somebody else's hands


def by_close(opened) -> None:
    sheet = opened.active
    rows = sorted(sheet.iter_rows(min_row=2, values_only=True), key=lambda row: -row[2])
    for number, row in enumerate(rows, 2):
        for column, value in enumerate(row, 1):
            sheet.cell(number, column).value = value
    sheet.column_dimensions["A"].width = 40


def swapped(opened) -> None:
    """Columns C and D change places, headers and all."""
    for cells in opened.active.iter_rows(min_col=3, max_col=4):
        cells[0].value, cells[1].value = cells[1].value, cells[0].value


@pytest.mark.parametrize("change", [lambda opened: None, by_close, swapped], ids=["saved", "sorted", "columns moved"])
def test_a_workbook_that_was_saved_with_the_same_values_is_taken(store, tmp_path: Path, change):
    store.ensure(NAME, BARS)
    frame = bars()
    store.write(batch(NAME, frame, 1))
    before = book(tmp_path).read_bytes()
    saved_again(book(tmp_path), change)
    assert book(tmp_path).read_bytes() != before
    assert_frame_equal(store.scan(NAME).collect().sort(BY_KEY), frame.select(BARS.names).sort(BY_KEY))
    assert store.write(batch(NAME, frame, 2)) == Written(unchanged=96)
    assert "saved by another program, with the same values" in store.maintain(NAME)
    assert "nothing to do" in store.maintain(NAME)
    sheet = openpyxl.load_workbook(book(tmp_path)).active
    assert sheet is not None
    keys = [row[:2] for row in sheet.iter_rows(min_row=2, values_only=True)]
    assert keys == sorted(keys)  # pyright: ignore[reportArgumentType]
    saved_again(book(tmp_path), change)
    assert store.write(batch(NAME, bars(first=47, rows=2), 3)) == Written(inserted=2, unchanged=2)
    assert open_store(store.url).count(NAME, Filter(["NA"])) == 49


def test_a_batch_goes_with_the_rows_of_the_last_one_only_while_the_file_is_as_it_was_written(
    store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    store.ensure(NAME, BARS)
    store.write(batch(NAME, bars(), 1))
    reads: list[int] = []
    real = workbook.read
    monkeypatch.setattr(workbook, "read", lambda *given: reads.append(1) or real(*given))
    assert store.write(batch(NAME, bars(first=40), 2)) == Written(inserted=80, unchanged=16)
    assert not reads
    open_store(store.url).write(batch(NAME, bars(("Z",), rows=3), 3))  # as another process does
    assert len(reads) == 1
    assert store.write(batch(NAME, bars(("Z",), rows=4), 4)) == Written(inserted=1, unchanged=3)
    assert len(reads) == 2
    saved_again(book(tmp_path), other_value)
    with pytest.raises(StoreDamaged):
        store.write(batch(NAME, bars(first=100), 5))


def other_value(opened) -> None:
    opened.active["C5"].value = 7.25


def other_whole_number(opened) -> None:
    opened.active["D5"].value += 0.5


def other_day(opened) -> None:
    opened.active["B5"].value += timedelta(hours=1)


def cleared(opened) -> None:
    opened.active["C5"].value = None


def text_for_a_number(opened) -> None:
    opened.active["D5"].value = "about 5"


def row_away(opened) -> None:
    opened.active.delete_rows(4)


def row_more(opened) -> None:
    opened.active.append(["Z", datetime(2001, 1, 1), 1.0, 2, "s1", datetime(2026, 1, 2)])  # noqa: DTZ001


def column_more(opened) -> None:
    opened.active["G1"].value = "my notes"


def column_away(opened) -> None:
    opened.active.delete_cols(3)


def sheet_more(opened) -> None:
    opened.create_sheet("pivot")


CHANGES = [
    other_value,
    other_whole_number,
    other_day,
    cleared,
    text_for_a_number,
    row_away,
    row_more,
    column_more,
    column_away,
    sheet_more,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_workbook_that_was_changed_by_hand_is_refused_until_it_is_put_back(store, tmp_path: Path, change):
    store.ensure(NAME, BARS)
    store.write(batch(NAME, bars(), 1))
    before = book(tmp_path).read_bytes()
    saved_again(book(tmp_path), change)
    after = book(tmp_path).read_bytes()
    for asked in (
        lambda: store.scan(NAME).collect(),
        lambda: store.query(f"SELECT count(*) FROM {NAME}"),
        lambda: store.write(batch(NAME, bars(first=48), 2)),
        lambda: store.delete(NAME, Filter(["NA"])),
        lambda: store.maintain(NAME),
    ):
        with pytest.raises(StoreDamaged, match=r"bars\.xlsx.*(put back|put the files back).*the next sync") as refused:
            asked()
        assert str(book(tmp_path)) in str(refused.value)
    assert book(tmp_path).read_bytes() == after, "nothing of what a person wrote is overwritten"
    book(tmp_path).write_bytes(before)
    assert store.write(batch(NAME, bars(first=48), 2)) == Written(inserted=96)


@pytest.mark.parametrize("damage", [lambda data: data[:-100], lambda data: b"no workbook", lambda data: b""])
def test_a_file_that_is_no_workbook_any_more_is_told_as_damage(store, tmp_path: Path, damage):
    store.ensure(NAME, BARS)
    store.write(batch(NAME, bars(), 1))
    book(tmp_path).write_bytes(damage(book(tmp_path).read_bytes()))
    for asked in (lambda: store.scan(NAME).collect(), lambda: store.write(batch(NAME, bars(first=48), 2))):
        with pytest.raises(StoreDamaged, match=r"made\.bars.*bars\.xlsx cannot be read"):
            asked()


def test_a_workbook_that_was_taken_away_is_a_table_that_is_to_be_filled_anew(store, tmp_path: Path):
    marker = store.ensure(NAME, BARS)
    store.write(batch(NAME, bars(), 5))
    book(tmp_path).rename(tmp_path / "mine.xlsx")
    assert store.marker(NAME) is None
    assert store.datasets() == []
    with pytest.raises(StoreError, match="there is no workbook of"):
        store.scan(NAME)
    assert store.ensure(NAME, BARS) != marker
    assert store.committed(NAME, "lane") == 0
    assert store.write(batch(NAME, bars(), 1)) == Written(inserted=96)


def test_a_workbook_that_is_not_ours_is_not_overwritten(store, tmp_path: Path):
    book(tmp_path).parent.mkdir()
    openpyxl.Workbook().save(book(tmp_path))
    before = book(tmp_path).read_bytes()
    with pytest.raises(StoreError, match=r"bars\.xlsx is in the way.*move it elsewhere"):
        store.ensure(NAME, BARS)
    assert book(tmp_path).read_bytes() == before


@pytest.mark.parametrize("sign", ["~$bars.xlsx", ".~lock.bars.xlsx#"])
def test_a_workbook_that_is_open_in_a_spreadsheet_is_read_but_not_exchanged(store, tmp_path: Path, sign: str):
    store.ensure(NAME, BARS)
    store.write(batch(NAME, bars(), 1))
    book(tmp_path).with_name(sign).touch()
    assert store.scan(NAME).collect().height == 96
    assert store.write(batch(NAME, bars(), 2)) == Written(unchanged=96)
    with pytest.raises(StoreBusy, match=r"bars\.xlsx is open in a spreadsheet; close it"):
        store.write(batch(NAME, bars(first=48), 3))
    book(tmp_path).with_name(sign).unlink()
    assert store.write(batch(NAME, bars(first=48), 3)) == Written(inserted=96)


# crashes


@pytest.mark.parametrize("step", range(5))
def test_a_crash_between_any_two_steps_leaves_the_old_rows_or_the_new_ones(
    store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
):
    """Three names are put in place: the table with what is to come, the workbook, the table as it then is."""
    store.ensure(NAME, BARS)
    store.write(batch(NAME, bars(), 1, mode=Mode.APPEND))
    old = store.scan(NAME).collect().sort(BY_KEY)
    frame = bars(first=40, add=1.0)
    both = pl.concat([old, frame.select(BARS.names)]).unique(BY_KEY, keep="last").sort(BY_KEY)
    left, real = iter(range(step)), storage.files.os.replace

    def counted(*names) -> None:
        if next(left, None) is None:
            raise Crash
        real(*names)

    with monkeypatch.context() as patch:
        patch.setattr(storage.files.os, "replace", counted)
        try:
            store.write(batch(NAME, frame, 2))
            crashed = False
        except Crash:
            crashed = True
    assert crashed == (step < 3)
    again = open_store(store.url)
    committed = again.committed(NAME, "lane")
    assert committed == (1 if step < 2 else 2)
    assert_frame_equal(again.scan(NAME).collect().sort(BY_KEY), old if committed == 1 else both)
    assert again.write(batch(NAME, frame, 2)).already == (committed == 2)
    assert_frame_equal(again.scan(NAME).collect().sort(BY_KEY), both)


def test_a_workbook_that_cannot_be_written_is_an_error_that_names_it(tmp_path: Path):
    with pytest.raises(StoreError, match=r"gone/a\.xlsx could not be written"):
        workbook.write(tmp_path / "gone" / "a.xlsx", stamped(pl.DataFrame({"a": [1]})))


@pytest.mark.parametrize("wide", [EMOJI * 16_384, "\x00" * 5_462, '"' + EMOJI * 3_000 + '"', "x" * 32_768])
def test_a_row_with_a_text_that_no_cell_holds_is_told_from_the_others(store, wide: str):
    store.ensure(NAME, BARS)
    frame = bars(("A", wide, "B"), rows=2)
    with pytest.raises(RowsRefused, match=r"32,?767") as refused:
        store.write(batch(NAME, frame, 1))
    for error in (refused.value, pickle.loads(pickle.dumps(refused.value))):
        assert error.rows["symbol"].to_list() == [wide] * 2
    rest = frame.filter(pl.col("symbol") != wide)
    assert store.write(batch(NAME, rest, 1)) == Written(inserted=4)
