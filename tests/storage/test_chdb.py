"""What only the ClickHouse store inside a process does: one owner, one folder, versions instead of changes."""

from __future__ import annotations

import json
import math
import os
import re
import signal
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import polars as pl
import pytest
from polars.testing import assert_frame_equal
from stored_frames import BARS, START, bars, batch, stamped

import storage.chdb
import storage.clickhouse
from marketsync.errors import AdoptionRefused, ForeignTable, SchemaError, StoreBusy, StoreError
from marketsync.schema import Column, ColumnType, Period, Schema
from storage.adoption import Wish
from storage.clickhouse_adoption import literal
from storage.protocol import Filter, Mode, Written
from storage.registry import open_store

NAME = "made.bars"


@pytest.fixture
def store(tmp_path: Path):
    opened = open_store(f"chdb://{tmp_path / 'a'}")
    yield opened
    opened.close()


def test_stores_of_one_folder_share_the_engine_until_the_last_is_closed(store, tmp_path: Path):
    second = open_store(f"chdb://{tmp_path / 'b' / '..' / 'a'}")
    store.ensure(NAME, BARS)
    store.write(batch(NAME, bars()))
    assert second.count(NAME) == 96
    store.close()
    assert second.count(NAME) == 96
    with pytest.raises(StoreError, match="was closed"):
        store.count(NAME)
    store.close()
    assert second.count(NAME) == 96
    second.close()
    other = open_store(f"chdb://{tmp_path / 'other'}")
    assert other.datasets() == []
    other.close()


def test_a_second_folder_is_refused_by_naming_the_first(store, tmp_path: Path):
    with pytest.raises(StoreBusy, match=f"this process has the chDB store {tmp_path / 'a'} open"):
        open_store(f"chdb://{tmp_path / 'b'}")


def test_a_fork_is_told_so_instead_of_hanging(store, tmp_path: Path):
    store.ensure(NAME, BARS)
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(20)  # a child that hangs after all must not hold the tests up
        code = 1
        try:
            with pytest.raises(StoreError, match="spawn method"):
                store.count(NAME)
            with pytest.raises(StoreError, match="spawn method"):
                open_store(f"chdb://{tmp_path / 'a'}")
            store.close()
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert store.count(NAME) == 0


def test_a_plain_select_final_shows_the_same_rows(store):
    store.ensure(NAME, BARS)
    store.write(batch(NAME, bars(), 1, mode=Mode.APPEND))
    store.write(batch(NAME, bars(rows=5, add=1.0), 2))
    store.delete(NAME, Filter(["NA"], until=START + timedelta(hours=3)))
    found = store.query("SELECT symbol, ts, close, volume FROM made.bars FINAL")
    assert_frame_equal(found.sort("symbol", "ts"), store.scan(NAME).collect().sort("symbol", "ts"))
    assert store.query("SELECT count() AS n FROM made.bars")["n"].to_list() == [93]


def test_only_what_reads_is_a_query(store):
    store.ensure(NAME, BARS)
    for sql in ("DROP TABLE made.bars", " insert into made.bars select * from made.bars", "ALTER TABLE made.bars"):
        with pytest.raises(StoreError, match="does not begin with"):
            store.query(sql)
    assert store.marker(NAME)


@pytest.mark.parametrize("day", [date(1899, 12, 31), date(2300, 1, 1)])
def test_times_that_the_engine_would_move_are_refused(store, day: date):
    schema = Schema((Column("day", ColumnType.DATE), Column("seen", ColumnType.DATE)), ("day",), "day")
    store.ensure("made.days", schema)
    good = {"day": [date(2001, 1, 1), date(2001, 1, 2)], "seen": [date(1900, 1, 1), date(2299, 12, 31)]}
    store.write(batch("made.days", stamped(pl.DataFrame(good)), schema=schema))
    with pytest.raises(SchemaError, match=r"'seen'.*cannot keep .before 1900"):
        store.write(
            batch("made.days", stamped(pl.DataFrame({"day": [date(2001, 1, 3)], "seen": [day]})), 2, schema=schema)
        )
    assert store.scan("made.days").collect().sort("day").rows() == list(zip(*good.values(), strict=True))
    assert store.count("made.days", Filter(since=day)) == (2 if day.year == 1899 else 0)
    assert store.count("made.days", Filter(until=day)) == (0 if day.year == 1899 else 2)


def test_deleted_rows_stay_deleted_in_whatever_version_they_had(store):
    schema = Schema((Column("code", ColumnType.STR), Column("at", ColumnType.DATE)), ("code",), "at", None, Period.YEAR)
    store.ensure("made.listed", schema)
    for seq, year in enumerate((1999, 2004), 1):
        frame = stamped(pl.DataFrame({"code": ["a"], "at": [date(year, 1, 1)]}))
        store.write(batch("made.listed", frame, seq, schema=schema))
    assert store.delete("made.listed", Filter(since=date(2001, 1, 1))) == 1
    assert store.count("made.listed") == 0
    assert store.watermarks("made.listed") == {}
    store.maintain("made.listed")
    assert store.count("made.listed") == 0
    store.write(
        batch("made.listed", stamped(pl.DataFrame({"code": ["a"], "at": [date(1998, 1, 1)]})), 3, schema=schema)
    )
    assert store.watermarks("made.listed") == {"*": date(1998, 1, 1)}


def test_watermarks_do_not_count_deleted_rows(store):
    store.ensure(NAME, BARS)
    store.write(batch(NAME, bars(("A", "B")), mode=Mode.APPEND))
    store.delete(NAME, Filter(["A"], since=START + timedelta(hours=10)))
    store.delete(NAME, Filter(["B"]))
    assert store.watermarks(NAME) == {"A": START + timedelta(hours=9)}


def test_a_later_write_wins_when_the_clock_was_set_back(store, monkeypatch: pytest.MonkeyPatch):
    store.ensure(NAME, BARS)
    store.write(batch(NAME, bars(), 1))
    store.close()
    again = open_store(store.url)
    monkeypatch.setattr(storage.chdb.time, "time_ns", lambda: 0)
    assert again.write(batch(NAME, bars(add=1.0), 2)) == Written(updated=96)
    assert again.scan(NAME).select(pl.col("close").min()).collect().item() == 1.0
    again.close()


def test_a_later_write_of_older_rows_wins_when_the_clock_was_set_back(store, monkeypatch: pytest.MonkeyPatch):
    store.ensure(NAME, BARS)
    store.write(batch(NAME, bars(), 1))
    store.close()
    again = open_store(store.url)
    monkeypatch.setattr(storage.chdb.time, "time_ns", lambda: 0)
    assert again.write(batch(NAME, bars(first=5000, add=1.0), 2)) == Written(inserted=96)
    assert again.write(batch(NAME, bars(add=1.0), 3)) == Written(updated=96)
    assert again.scan(NAME).select(pl.col("close").min()).collect().item() == 1.0
    again.close()


def test_more_subjects_than_a_statement_lists_are_found(store, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(storage.clickhouse, "_LISTED_SUBJECTS", 10)
    store.ensure(NAME, BARS)
    subjects = [f"S{n:03d}" for n in range(50)]
    store.write(batch(NAME, bars(subjects, rows=2), 1))
    assert store.write(batch(NAME, bars(subjects, rows=3), 2)) == Written(inserted=50, unchanged=100)


def test_a_scan_in_several_pieces_has_all_rows_once(store, monkeypatch: pytest.MonkeyPatch):
    store.ensure(NAME, BARS)
    frame = bars(rows=5000)
    store.write(batch(NAME, frame))
    whole = store.scan(NAME).collect().sort("symbol", "ts")
    monkeypatch.setattr(storage.clickhouse, "_SCAN_ROWS", 1500)
    statements: list[str] = []
    real = storage.clickhouse.ClickHouseStore._frame

    def told(self, sql: str, **settings: int) -> pl.DataFrame:
        statements.append(sql)
        return real(self, sql, **settings)

    monkeypatch.setattr(storage.clickhouse.ClickHouseStore, "_frame", told)
    assert_frame_equal(store.scan(NAME).collect().sort("symbol", "ts"), whole)
    assert sum("_partition_id" in sql for sql in statements) == 7
    statements.clear()
    assert store.scan(NAME).filter(pl.col("volume") == 7).select("close").head(1).collect().height == 1
    assert not any("symbol" in sql for sql in statements)
    assert_frame_equal(store.scan(NAME).select(pl.len()).collect(), pl.DataFrame({"len": [10_000]}).cast(pl.UInt32))


def test_a_table_that_is_not_ours_is_left_alone(store):
    store._command("CREATE DATABASE made")
    store._command("CREATE TABLE made.bars (a Int32) ENGINE = MergeTree ORDER BY a COMMENT 'mine'")
    with pytest.raises(StoreError, match="not made by MarketSync"):
        store.ensure(NAME, BARS)
    assert store.datasets() == []


def test_a_copy_of_a_table_is_no_table_of_ours_until_it_is_adopted_and_a_renamed_one_stays_ours(store):
    marker = store.ensure(NAME, BARS)
    store.write(batch(NAME, bars(), 5))
    store._command("CREATE TABLE made.copy CLONE AS made.bars")
    store._command("CREATE TABLE made.empty AS made.bars")
    assert store.datasets() == [NAME]
    with pytest.raises(ForeignTable, match=re.escape("marketsync adopt made.copy")):
        store.write(batch("made.copy", bars(), 5))
    assert store.adopt("made.copy", BARS, Wish(segment="s", at=START)).rows == store.count("made.copy") == 96
    assert store.marker("made.copy") != marker
    store._command("EXCHANGE TABLES made.bars AND made.empty")
    with pytest.raises(ForeignTable):
        store.ensure(NAME, BARS)
    store._command("RENAME TABLE made.empty TO made.renamed")
    assert store.ensure("made.renamed", BARS) == marker
    before = json.loads(store._frame("SELECT comment FROM system.tables WHERE name = 'renamed'")["comment"][0])
    del before["table"]
    store._command(f"ALTER TABLE made.renamed MODIFY COMMENT '{json.dumps(before)}'")
    assert store.ensure("made.renamed", BARS) == marker  # as tables were that an earlier MarketSync made


def test_a_table_of_an_earlier_version_learns_which_one_it_is(store):
    marker = store.ensure("made.bars", BARS)
    store.write(batch("made.bars", bars()))
    earlier = storage.clickhouse._comment(marker, BARS)
    store._command(f"ALTER TABLE made.bars MODIFY COMMENT {storage.clickhouse._literal(earlier)}")
    assert store.ensure("made.bars", BARS) == marker
    store._command("CREATE TABLE made.copy CLONE AS made.bars")
    with pytest.raises(ForeignTable, match=re.escape("marketsync adopt made.copy")):
        store.ensure("made.copy", BARS)
    assert store.count("made.bars") == 96


def test_a_provider_whose_commits_were_dropped_gets_new_ones_and_its_tables_other_markers(store):
    markers = {name: store.ensure(name, BARS) for name in (NAME, "made.other")}
    store.write(batch(NAME, bars(), 5))
    store._command("DROP TABLE made._marketsync_commits SYNC")
    assert store.ensure(NAME, BARS) != markers[NAME]
    assert store.ensure("made.other", BARS) != markers["made.other"]
    assert store.committed(NAME, "lane") == 0
    assert store.write(batch(NAME, bars(), 5)) == Written(unchanged=96)
    assert store.committed(NAME, "lane") == 5


@pytest.mark.parametrize("of", ["String", "FixedString(4)", "LowCardinality(Nullable(String))"])
def test_bytes_that_are_no_text_are_not_adopted(store, of: str):
    store._command(f"CREATE TABLE names (k Int64, v {of}) ENGINE = MergeTree ORDER BY k")
    store._command("INSERT INTO names SELECT 1, unhex('CBF7C4E1')")  # a name in GBK
    schema = Schema((Column("k", ColumnType.I64), Column("v", ColumnType.STR)), ("k",))
    wish = Wish(segment="s", at=START, table="names")
    with pytest.raises(AdoptionRefused, match=r"are no text in UTF-8 .* in 1 row"):
        store.adopt("made.names", schema, wish)
    if of == "String":
        convert = "UPDATE v = convertCharset(v, 'gbk', 'utf8') WHERE 1 SETTINGS mutations_sync = 1"
        store._command(f"ALTER TABLE names {convert}")
        store.adopt("made.names", schema, wish)
        assert store.scan("made.names").collect()["v"].to_list() == ["索尼"]


def test_values_that_adopting_would_change_are_refused_and_others_are_as_they_were(store):
    new_york, times = "America/New_York", ColumnType.DATETIME
    autumn = ["2024-11-03 00:59", "2024-11-03 01:30-05:00", "2024-11-03 02:00", "2024-11-02"]
    hours = [(3, 4, 59), (3, 6, 30), (3, 7), (2, 4)]
    cases = [
        ("String", ["2024-03-10 02:30:00"], times, new_york, None),
        ("String", ["2024-11-03 01:30"], times, new_york, None),
        ("Date", ["2017-10-15"], times, "America/Sao_Paulo", None),
        ("String", ["2024-02-01T25:61:00Z"], times, None, None),
        ("String", ["-1e400"], ColumnType.F64, None, None),
        ("String", ["16777217"], ColumnType.F32, None, None),
        ("String", ["1e39"], ColumnType.F32, None, None),
        ("String", ["inf", "0.5"], ColumnType.F32, None, [math.inf, 0.5]),
        ("FixedString(5)", ["a\0b", ""], ColumnType.STR, None, ["a\0b", ""]),
        ("Nullable(Date32)", ["2024-11-04", None], times, new_york, [datetime(2024, 11, 4, 5, tzinfo=UTC), None]),
        ("String", autumn, times, new_york, [datetime(2024, 11, *at, tzinfo=UTC) for at in hours]),
    ]
    store._command("CREATE DATABASE made")
    for number, (of, values, type_, zone, kept) in enumerate(cases):
        table, schema = f"made.t{number}", Schema((Column("k", ColumnType.I64), Column("v", type_)), ("k",))
        rows = ", ".join(f"({k}, {'NULL' if v is None else literal(v)})" for k, v in enumerate(values))
        store._command(f"CREATE TABLE {table} (k Int64, v {of}) ENGINE = MergeTree ORDER BY k")
        store._command(f"INSERT INTO {table} VALUES {rows}")
        wish = Wish(segment="s", at=START, zone=zone)
        if kept is None:
            with pytest.raises(AdoptionRefused, match=re.escape(f"'v' ({of})")):
                store.adopt(table, schema, wish)
        else:
            store.adopt(table, schema, wish)
            assert store.scan(table).collect().sort("k")["v"].to_list() == kept, values
