"""`marketsync export` through the real command: files that Excel, pandas and polars read, and what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import openpyxl
import pandas as pd
import polars as pl
import pytest
from polars.testing import assert_frame_equal

import tasks.export
from cli.main import main
from marketsync import export
from marketsync.errors import ConfigurationError, StoreError
from marketsync.schema import Column, ColumnType, Schema
from storage.protocol import Batch, Mode
from storage.registry import open_store
from tasks.workspace import close_workspaces

ROOT = Path(__file__).parents[2]
START = datetime(2024, 3, 1, 9, 30, tzinfo=UTC)
SCHEMA = Schema(
    (
        Column("symbol", ColumnType.STR),
        Column("ts", ColumnType.DATETIME),
        Column("close", ColumnType.F64),
        Column("note", ColumnType.STR),
        Column("day", ColumnType.DATE),
        Column("trade", ColumnType.I64),
    ),
    ("symbol", "ts"),
    "ts",
    "symbol",
)
LISTED = Schema((Column("code", ColumnType.STR), Column("name", ColumnType.STR)), ("code",))
NOTES = ["", None, "中文", '"quoted", with\na line', "=1+1", "000001"]
HOURS = 30


def rows() -> pl.DataFrame:
    hours = range(HOURS)
    return pl.concat(
        pl.DataFrame(
            {
                "symbol": [symbol] * HOURS,
                "ts": [START + timedelta(hours=hour) for hour in hours],
                "close": [float("nan") if hour == 1 else None if hour == 2 else 100 + hour / 10 for hour in hours],
                "note": [NOTES[hour % len(NOTES)] for hour in hours],
                "day": [date(2024, 3, 1)] * HOURS,
                "trade": [2**60 + hour for hour in hours],
            },
            schema=SCHEMA.polars(),
        )
        for symbol in ("000001", "IBM")
    )


def stamped(frame: pl.DataFrame) -> pl.DataFrame:
    return frame.with_columns(
        pl.lit("s1").alias("_segment"), pl.lit(START).cast(pl.Datetime("us", "UTC")).alias("_ingested_at")
    )


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A folder with a configuration, two stores and their rows; the second holds a list and one symbol of bars."""
    (tmp_path / "upstream.yml").write_text("stores:\n  default: delta://./data\n  second: csv://./second\n")
    for url, frame in (("delta://data", rows()), ("csv://second", rows().filter(pl.col("symbol") == "IBM"))):
        store = open_store(url.replace("://", f"://{tmp_path}/"))
        store.ensure("made.bars", SCHEMA)
        store.write(Batch("made.bars", SCHEMA, "lane", 1, stamped(frame), Mode.APPEND))
    store.ensure("made.list", LISTED)
    store.write(
        Batch(
            "made.list",
            LISTED,
            "lane",
            1,
            stamped(pl.DataFrame({"code": ["a"], "name": [None]}, LISTED.polars())),
            Mode.APPEND,
        )
    )
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    close_workspaces()


def typed(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command as a person does."""
    return subprocess.run(
        [sys.executable, "-m", "cli", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


def ended(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Run the command in this process, and return its exit code."""
    monkeypatch.setattr(sys, "argv", ["marketsync", *arguments])
    with pytest.raises(SystemExit) as exit:
        main()
    return int(exit.value.code or 0)


BY_KEY = ["symbol", "ts"]


def test_a_csv_is_read_by_pandas_and_by_excel(place: Path):
    said = typed(place, "export", "made.bars", "bars.csv")
    assert said.returncode == 0, said.stderr
    assert said.stdout.startswith("60 rows of made.bars from default written to bars.csv (")
    content = (place / "bars.csv").read_bytes()
    assert content.startswith(b"\xef\xbb\xbfsymbol,ts,close,note,day,trade\n"), "Excel knows UTF-8 by its mark"
    assert '000001,2024-03-01 09:30:00,100.0,"",2024-03-01,1152921504606846976\n' in content.decode()
    found = pd.read_csv("bars.csv", dtype={"symbol": str}, parse_dates=["ts", "day"]).sort_values(BY_KEY)
    assert found["ts"].dtype == "datetime64[ns]"
    assert found["trade"].tolist() == rows()["trade"].to_list()
    assert found["note"][2] == "中文"
    assert found["note"][3] == NOTES[3]


def test_a_workbook_has_real_dates_and_keeps_what_is_no_number(place: Path):
    said = typed(place, "export", "made.bars", "bars.xlsx", "--json")
    told = json.loads(said.stdout)
    assert told == {
        "dataset": "made.bars",
        "store": "default",
        "file": "bars.xlsx",
        "columns": SCHEMA.names,
        "rows": 60,
        "bytes": (place / "bars.xlsx").stat().st_size,
    }
    sheet = openpyxl.load_workbook("bars.xlsx").active
    assert sheet is not None
    assert sheet.freeze_panes == "A2"
    found = list(sheet.iter_rows(min_row=2, values_only=True))
    assert [row[:2] for row in found] == [
        (symbol, (START + timedelta(hours=hour)).replace(tzinfo=None))
        for symbol in ("000001", "IBM")
        for hour in range(HOURS)
    ]
    assert [row[2] for row in found[:4]] == [100, "nan", None, 100.3]
    assert found[4][3] == "=1+1"
    assert found[0][5] == str(2**60)


def test_parquet_is_the_rows_themselves(place: Path):
    said = typed(place, "export", "made.bars", "bars.parquet", "--store", "default")
    assert said.returncode == 0, said.stderr
    assert_frame_equal(pl.read_parquet("bars.parquet").sort(BY_KEY), rows().sort(BY_KEY))


def test_symbols_days_and_columns_choose_rows(place: Path, monkeypatch: pytest.MonkeyPatch):
    chosen = ("--symbols", "IBM", "--since", "2024-03-01", "--until", "2024-03-01", "--columns", "close,ts")
    assert ended(monkeypatch, "export", "made.bars", "day.parquet", *chosen, "--json") == 0
    frame = pl.read_parquet("day.parquet")
    assert frame.columns == ["close", "ts"]
    assert frame.height == 15, "the hours from 9:30 to 23:30: the last day is included"
    until = ("--until", "2024-03-01T10:30:00Z")
    assert ended(monkeypatch, "export", "made.bars", "hour.csv", "--store", "second", *until) == 0
    assert pl.read_csv("hour.csv").height == 1


def test_nothing_to_write_is_a_file_with_a_header(place: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    for suffix in ("csv", "xlsx", "parquet"):
        assert ended(monkeypatch, "export", "made.bars", f"none.{suffix}", "--since", "2030-01-01") == 0
        assert "0 rows of made.bars" in capsys.readouterr().out
    assert (place / "none.csv").read_text(encoding="utf-8-sig") == "symbol,ts,close,note,day,trade\n"
    assert pl.read_parquet("none.parquet").schema == pl.Schema(SCHEMA.polars())
    sheet = openpyxl.load_workbook("none.xlsx").active
    assert sheet is not None
    assert [cell.value for cell in sheet[1]] == SCHEMA.names


def test_nothing_takes_the_place_of_no_file_and_a_symbol_without_rows_is_told(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    (place / "bars.csv").write_text("mine")
    for asked, told in (
        (("--since", "2030-01-01"), "made.bars in default has no such rows; bars.csv was left as it is"),
        (("--symbols", "000001,nobody,NONE"), "made.bars in default has no rows of nobody, NONE; nothing was written"),
        (("--columns", "close,ts,close"), "--columns names close more than once"),
    ):
        assert ended(monkeypatch, "export", "made.bars", "bars.csv", "--force", *asked) == 2
        assert told in capsys.readouterr().err
    assert (place / "bars.csv").read_text() == "mine"
    assert sorted(file.name for file in place.glob("*.csv")) == ["bars.csv"]


def test_a_file_that_is_there_is_kept_unless_it_is_forced(place: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    (place / "bars.csv").write_text("mine")
    assert ended(monkeypatch, "export", "made.bars", "bars.csv") == 2
    assert "bars.csv is there already; --force" in capsys.readouterr().err
    assert (place / "bars.csv").read_text() == "mine"
    assert ended(monkeypatch, "export", "made.bars", "bars.csv", "--force") == 0
    assert pl.read_csv("bars.csv").height == 60


@pytest.mark.parametrize("suffix", ["csv", "parquet", "xlsx"])
def test_a_file_is_there_whole_or_as_it_was(place: Path, monkeypatch: pytest.MonkeyPatch, suffix: str):
    (place / f"bars.{suffix}").write_text("before")
    part = next((place / "data").rglob("*.parquet"))
    part.write_bytes(part.read_bytes()[:-200])
    with pytest.raises(StoreError, match=r"made\.bars"):
        export("made.bars", f"bars.{suffix}", force=True)
    assert (place / f"bars.{suffix}").read_text() == "before"
    assert not list(place.glob(".bars*"))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["made.bars", "bars.ods"], "end its name with .csv, .xlsx, .parquet"),
        (["made.bars", "nowhere/bars.csv"], "there is no folder nowhere"),
        (["made.nope", "a.csv"], "store default has no table of made.nope; it has: made.bars"),
        (["made.bars", "a.csv", "--store", "third"], "there is no store 'third'"),
        (["made.bars", "a.csv", "--store", "delta://./data"], "its URL is taken by copy and follow alone"),
        (["made.bars", "a.csv", "--columns", "ts,clsoe"], "has no column clsoe; it has symbol, ts"),
        (["made.bars", "a.csv", "--since", "yesterday"], "--since: 'yesterday' is no date"),
        (["made.bars", "a.csv", "--since", "2024-03-02", "--until", "2024-03-01"], "is after --until"),
        (["made.list", "a.csv", "--store", "second", "--since", "2024-03-02"], "no column of times"),
        (["made.list", "a.csv", "--store", "second", "--symbols", "a"], "no column of symbols"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_a_file_is_made(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys, arguments: list[str], says: str
):
    before = sorted(place.iterdir())
    assert ended(monkeypatch, "export", *arguments) == 2
    assert says in capsys.readouterr().err
    assert sorted(place.iterdir()) == before


def test_decimals_of_a_second_are_as_many_as_a_column_needs(place: Path):
    schema = Schema((Column("at", ColumnType.DATETIME_NS), Column("ms", ColumnType.DATETIME)), ("at",), "at")
    stamps = pl.DataFrame({"at": [1, 10**9], "ms": [1_000, None]}).cast(
        {"at": pl.Datetime("ns", "UTC"), "ms": pl.Datetime("us", "UTC")}
    )
    store = open_store(f"csv://{place}/second")
    store.ensure("made.ticks", schema)
    store.write(Batch("made.ticks", schema, "lane", 1, stamped(stamps), Mode.APPEND))
    written = export("made.ticks", "ticks.csv", store="second")
    assert (written.rows, written.store, written.bytes) == (2, "second", (place / "ticks.csv").stat().st_size)
    assert (place / "ticks.csv").read_text(encoding="utf-8-sig").splitlines() == [
        "at,ms",
        "1970-01-01 00:00:00.000000001,1970-01-01 00:00:00.001",
        "1970-01-01 00:00:01.000000000,",
    ]


def test_python_gets_the_same_errors_as_exceptions(place: Path):
    assert export("made.bars", "a.parquet", symbols="IBM", until=date(2024, 3, 1)).rows == 15
    with pytest.raises(ConfigurationError, match="--force"):
        export("made.bars", place / "a.parquet")
    with pytest.raises(ConfigurationError, match="until: 'soon' is no date"):
        export("made.bars", "b.csv", until="soon")


def test_a_workbook_without_its_package_says_how_to_install_it(place: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tasks.export, "find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r"pip install -e '\.\[excel\]'"):
        export("made.bars", "a.xlsx")
    assert export("made.bars", "a.csv").rows == 60


def test_a_parquet_table_that_is_written_meanwhile_is_exported_whole(place: Path, monkeypatch: pytest.MonkeyPatch):
    (place / "upstream.yml").write_text("stores:\n  default: parquet://./files\n")
    store = open_store(f"parquet://{place}/files")
    store.ensure("made.bars", SCHEMA)
    store.write(Batch("made.bars", SCHEMA, "lane", 1, stamped(rows()), Mode.APPEND))
    changed = rows().with_columns(pl.lit("changed").alias("note"))
    write, seq = tasks.export._write, [1]
    late = []

    def meanwhile(found: pl.LazyFrame, file: Path, schema: Schema) -> int:
        if seq[0] < 3:
            seq[0] += 1
            late.append(file.open("wb"))
            batch = stamped(changed.with_columns(pl.lit(float(seq[0])).alias("close")))
            store.write(Batch("made.bars", SCHEMA, "lane", seq[0], batch, Mode.UPSERT))
            return write(found, file, schema)
        count = write(found, file, schema)
        for sink in late:  # what failed before ends in its own time
            sink.truncate(0)
            sink.close()
        return count

    monkeypatch.setattr(tasks.export, "_write", meanwhile)
    assert ended(monkeypatch, "export", "made.bars", "bars.parquet") == 0
    assert pl.read_parquet("bars.parquet")["close"].to_list() == [3.0] * 60
