"""`marketsync copy`: every row and type arrives, a kill leaves nothing twice, nothing is copied that would be changed,
and the ledger believes of the target what it knew of the source and no more. Real engines, real processes."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import polars as pl
import pytest
from polars.testing import assert_frame_equal
from synced_place import Place
from typer.testing import CliRunner, Result

import storage.delta
import storage.lazyframes
import storage.parquet
import tasks.compare
import tasks.copy
from cli.main import build
from marketsync import copy
from marketsync.errors import ConfigurationError, SchemaError, StoreError
from marketsync.schema import SYSTEM_COLUMNS, Column, ColumnType, Period, Schema
from storage.protocol import Filter
from storage.registry import open_store
from tasks.copy import Copied
from tests.storage.stored_frames import BARS, INSTRUMENTS, START, WIDE, bars, batch, differences, hostile, stamped

ROOT = Path(__file__).parents[2]
DAILY = "alpaca.daily_bars"
# copies in pieces of 500 rows, and says how far it is after each write; waits to be told to go on
SLOW_COPY = """
import sys, storage.lazyframes, tasks.copy
tasks.copy.ROWS, storage.lazyframes.ARROW_ROWS = 500, 300
from marketsync import copy
def told(one):
    print(one.read, flush=True)
    sys.stdin.readline()
copy(sys.argv[1], sys.argv[2], told=told)
"""


def filled(url: str, frame: pl.DataFrame, dataset: str = "made.bars", schema: Schema = BARS) -> str:
    with closing(open_store(url)) as store:
        store.ensure(dataset, schema)
        store.write(batch(dataset, frame, schema=schema))
    return url


def rows_of(url: str, dataset: str = "made.bars") -> pl.DataFrame:
    with closing(open_store(url)) as store:
        found = store.scan(dataset, Filter(system=True)).collect()
        return found.sort(found.columns[:2])


@pytest.fixture
def source(tmp_path: Path) -> str:
    """A Delta folder with three months of hourly bars of three symbols."""
    frame = bars(("A", "B", "C"), rows=2_000)
    late = frame["ts"] > START + timedelta(hours=900)
    stamps = frame.with_columns(pl.when(late).then(pl.lit("s2")).otherwise(pl.lit("s1")).alias("_segment"))
    return filled(f"delta://{tmp_path}/source", stamps)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(tasks.copy, "ROWS", 500)
    monkeypatch.setattr(storage.lazyframes, "ARROW_ROWS", 300)


def target_of(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> str:
    return (
        f"{kind}://{tmp_path}/target" if kind in ("csv", "delta", "excel", "parquet") else request.getfixturevalue(kind)
    )


@pytest.mark.parametrize("kind", ["postgres", pytest.param("clickhouse", marks=pytest.mark.slow)])
def test_every_row_arrives_with_the_segment_that_brought_it_and_a_second_copy_changes_nothing(
    kind: str, source: str, tmp_path: Path, request: pytest.FixtureRequest
):
    target = target_of(kind, tmp_path, request)
    (first,) = copy(source, target)
    assert (first.rows, first.read, first.inserted, first.there) == (6_000, 6_000, 6_000, 6_000)
    assert (first.problems, first.remarks) == ([], [])
    assert_frame_equal(rows_of(target), rows_of(source))
    (second,) = copy(source, target)
    assert (second.inserted, second.updated, second.unchanged, second.resumed) == (0, 0, 6_000, False)
    (back,) = copy(target, f"csv://{tmp_path}/back")
    assert back.inserted == 6_000
    assert_frame_equal(rows_of(f"csv://{tmp_path}/back"), rows_of(source))


def test_values_of_every_type_go_through_and_come_back_as_they_were(tmp_path: Path, postgres: str, monkeypatch):
    with closing(open_store(postgres)) as store:
        rows = hostile(store.capabilities)
    monkeypatch.setattr(tasks.copy, "ROWS", 7)
    home = filled(f"parquet://{tmp_path}/home", rows, "made.wide", WIDE)
    copy(home, postgres)
    copy(postgres, f"csv://{tmp_path}/back")
    assert not differences(rows_of(f"csv://{tmp_path}/back", "made.wide"), rows, WIDE.key)


@pytest.mark.parametrize("kind", ["delta", pytest.param("postgres", marks=pytest.mark.slow)])
def test_a_killed_copy_goes_on_where_it_was_and_leaves_no_row_twice(
    kind: str, source: str, tmp_path: Path, request: pytest.FixtureRequest, small
):
    target = target_of(kind, tmp_path, request)
    done = 0
    for writes in (1, 6):
        process = subprocess.Popen(
            [sys.executable, "-c", SLOW_COPY, source, target],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        for number in range(writes):
            assert process.stdout.readline().strip(), "the copy has ended"
            if number < writes - 1:
                process.stdin.write("\n")
                process.stdin.flush()
        process.send_signal(signal.SIGKILL)
        process.communicate()
        with closing(open_store(target)) as store:
            there = store.count("made.bars")
        assert there > done
        done = there
    (last,) = copy(source, target)
    assert last.resumed
    assert last.read < 6_000
    assert not last.problems
    assert_frame_equal(rows_of(target), rows_of(source))


def test_a_copy_that_was_broken_off_begins_again_where_the_source_has_changed(source: str, tmp_path: Path, small):
    target = f"parquet://{tmp_path}/target"

    def break_off(one) -> None:
        if one.read > 1_500:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        copy(source, target, told=break_off)
    # a row that the first copy has taken is another one now
    changed = bars(("A",), rows=1, add=7.0).with_columns(pl.lit(datetime.now(UTC)).alias("_ingested_at"))
    with closing(open_store(source)) as store:
        store.write(batch("made.bars", changed, 2))
    (again,) = copy(source, target)
    assert not again.resumed
    assert again.updated == 1
    assert_frame_equal(rows_of(target), rows_of(source))


def test_two_copies_at_once_do_not_take_one_anothers_rows_for_their_own(source: str, tmp_path: Path, small):
    target = f"parquet://{tmp_path}/target"

    def another(_) -> None:
        copy(source, target)

    with pytest.raises(StoreError, match=r"another copy of made\.bars .* is under way"):
        copy(source, target, told=another)
    assert_frame_equal(rows_of(target), rows_of(source))


def test_what_the_target_would_change_is_told_by_column_and_count_before_a_row_is_moved(tmp_path: Path, postgres: str):
    at = [datetime(2020, 1, day, tzinfo=UTC) for day in (1, 2, 3)]
    rows = pl.DataFrame({"name": ["a", "b", "c\0"], "day": [one.date() for one in at]}).with_columns(
        *(pl.lit(None, dtype=type_).alias(name) for name, type_ in WIDE.polars().items() if name not in WIDE.key),
    )
    nanos = pl.Series("at_ns", [1, 2_000, 3]).cast(pl.Datetime("ns", "UTC"))
    huge = pl.Series("huge", [2**64 - 1, 1, None], dtype=pl.UInt64())
    rows = stamped(rows.with_columns(nanos, huge))
    home = filled(f"parquet://{tmp_path}/home", rows, "made.wide", WIDE)
    filled(home, bars(), "made.bars")
    with pytest.raises(SchemaError) as refused:
        copy(home, postgres)
    told = str(refused.value)
    assert "column 'at_ns' of made.wide has 2 values" in told
    assert "column 'name' of made.wide has 1 values that this store cannot keep (text with a NUL" in told
    assert "huge" not in told
    with closing(open_store(postgres)) as store:
        assert store.datasets() == []
    with pytest.raises(SchemaError, match=r"'huge' of made\.wide has 1 values"):
        copy(home, f"delta://{tmp_path}/delta", dry_run=True)


def test_rows_that_were_deleted_from_the_target_are_copied_again_where_the_last_chunk_has_none(
    tmp_path: Path, small, monkeypatch
):
    monkeypatch.setattr(tasks.copy, "_GROUP", 1)
    late, early = bars(("A",), first=24 * 400, rows=5), bars(("A", "Z"), rows=5)
    source = filled(f"delta://{tmp_path}/source", pl.concat([early, late]))
    target = f"delta://{tmp_path}/target"
    copy(source, target)
    with closing(open_store(target)) as store:
        assert store.delete("made.bars", Filter(subjects=["A"])) == 10
    (again,) = copy(source, target)
    assert (again.inserted, again.problems) == (10, [])
    assert_frame_equal(rows_of(target), rows_of(source))


def test_a_table_that_is_cut_otherwise_takes_the_rows_and_one_of_other_types_does_not(source: str, tmp_path: Path):
    by_year = replace(BARS, period=Period.YEAR, columns=(*BARS.columns, *WIDE.columns[2:3]))
    target = filled(
        f"delta://{tmp_path}/years", bars(("A",), rows=1, add=5.0).with_columns(text=pl.lit("kept")), schema=by_year
    )
    (done,) = copy(source, target)
    assert (done.inserted, done.updated) == (5_999, 1)
    found = rows_of(target)
    assert_frame_equal(found.drop("text"), rows_of(source))
    assert found["text"].drop_nulls().to_list() == ["kept"]
    other = replace(
        BARS, columns=(*BARS.columns[:2], replace(BARS.columns[2], type=BARS.columns[3].type), BARS.columns[3])
    )
    made = filled(f"delta://{tmp_path}/other", bars(rows=1).with_columns(pl.col("close").cast(pl.Int64)), schema=other)
    with pytest.raises(SchemaError, match="'close' was i64 and is now f64"):
        copy(source, made)


def test_symbols_and_days_bound_what_is_copied_and_what_is_there_besides_is_told(source: str, tmp_path: Path):
    target = filled(f"parquet://{tmp_path}/target", bars(("A", "Z"), rows=2_000))
    day = (START + timedelta(days=30)).date()
    (found,) = copy(source, target, symbols=["A", "B"], since=day, until=day, dry_run=True)
    assert (found.rows, found.there) == (48, 24)
    (done,) = copy(source, target, symbols=["A", "B"], since=day, until=day)
    assert (done.inserted, done.unchanged, done.remarks) == (24, 24, [])
    (whole,) = copy(source, target)
    assert whole.remarks == [f"parquet://{tmp_path}/target has 2,000 rows besides, which {source} has not"]
    with pytest.raises(ConfigurationError, match="has no rows of NOSUCH"):
        copy(source, target, symbols="NOSUCH")
    with pytest.raises(ConfigurationError, match=r"no table of made\.none; it has made\.bars"):
        copy(source, target, "made.none")
    with pytest.raises(ConfigurationError, match="are one store"):
        copy(source, source)


def test_a_backup_of_a_store_is_another_store_and_another_name_of_it_is_not(source: str, tmp_path: Path):
    shutil.copytree(tmp_path / "source", tmp_path / "backup")
    with closing(open_store(source)) as store:
        store.write(batch("made.bars", bars(("D",), rows=7), 2))
    backup, link = f"delta://{tmp_path}/backup", tmp_path / "link"
    (dry,) = copy(source, backup, dry_run=True)
    assert (dry.rows, dry.there) == (6_007, 6_000)
    (done,) = copy(source, backup)
    assert (done.inserted, done.unchanged, done.agree) == (7, 6_000, True)
    link.symlink_to(tmp_path / "source")
    with pytest.raises(ConfigurationError, match="are one store"):
        copy(source, f"delta://{link}")


def test_a_backup_of_a_table_beside_it_is_told_with_the_way_to_copy_the_others(source: str, tmp_path: Path):
    shutil.copytree(tmp_path / "source" / "made" / "bars", tmp_path / "source" / "made" / "bars_backup")
    target = f"delta://{tmp_path}/target"
    with pytest.raises(
        SchemaError, match=r"(?s)made\.bars_backup cannot be copied .*Name the datasets to copy only those"
    ):
        copy(source, target)
    (done,) = copy(source, target, "made.bars")
    assert done.agree


def test_a_table_that_came_without_its_lanes_is_copied_into(source: str, postgres: str):
    import psycopg

    copy(source, postgres)
    with psycopg.connect(postgres, autocommit=True) as connection:
        connection.execute("DROP TABLE made._marketsync_commits")
    (done,) = copy(source, postgres)
    assert (done.unchanged, done.agree) == (6_000, True)


def test_tables_without_times_are_copied_too(tmp_path: Path):
    rows = stamped(
        pl.DataFrame({"code": ["a", "b"], "name": ["one", None], "lot": [1, 2]}, schema=INSTRUMENTS.polars())
    )
    home = filled(f"csv://{tmp_path}/home", rows, "made.codes", INSTRUMENTS)
    (done,) = copy(home, f"delta://{tmp_path}/target")
    assert done.inserted == 2
    assert_frame_equal(rows_of(f"delta://{tmp_path}/target", "made.codes"), rows_of(home, "made.codes"))


# ---------------------------------------------------------------- what is proven


def meddle(url: str, frame: pl.DataFrame | None = None, span: Filter | None = None) -> Callable[[Copied], None]:
    """Return what writes a frame to a store, or removes a span from it, once all rows have been copied."""

    def meddled(one: Copied) -> None:
        if one.read == one.rows:
            with closing(open_store(url)) as store:
                if span is not None:
                    store.delete("made.bars", span)
                if frame is not None:
                    store.write(batch("made.bars", frame, 9, lane="somebody"))

    return meddled


def test_one_value_that_is_another_in_the_target_is_named_and_the_next_copy_puts_it_right(source: str, postgres: str):
    changed = bars(("B",), first=700, rows=1, add=0.01)
    (done,) = copy(source, postgres, told=meddle(postgres, changed))
    assert (done.agree, done.rows, done.there) == (False, 6_000, 6_000)
    (found,) = done.differences
    at = changed["ts"][0]
    assert (found.subject, found.changed, found.missing, found.first, found.last) == ("B", 1, 0, at, at)
    assert found.example == f"ts {at}: close is 70.01 there, and 170.0 here"
    with closing(open_store(postgres)) as store:
        url = store.url
    assert done.problems == [
        f"1 rows of 1 subjects are not in {url} as they are in {source}: B (1 changed, at {at}; {found.example}). Run "
        f"the same copy again while nothing else writes to {url}; if it says this again, do not rely on {url}, which "
        "does not keep what it is given"
    ]
    (again,) = copy(source, postgres)
    assert (again.agree, again.updated, again.problems, again.differences) == (True, 1, [], [])


def test_a_lost_row_is_found_though_another_one_keeps_the_count_and_the_newest_times_agree(source: str, tmp_path: Path):
    target = f"parquet://{tmp_path}/target"
    lost = START + timedelta(hours=500)
    more = bars(("Z",), rows=1)
    (done,) = copy(source, target, told=meddle(target, more, Filter(["C"], lost, lost + timedelta(hours=1))))
    assert (done.rows, done.there, done.agree) == (6_000, 6_000, False)
    (found,) = done.differences
    assert (found.subject, found.missing, found.first, found.last) == ("C", 1, lost, lost)
    assert done.remarks == [f"{target} has 1 rows besides, which {source} has not"]


def test_where_little_differs_in_much_only_that_is_read_and_rows_besides_are_no_alarm(
    source: str, tmp_path: Path, monkeypatch
):
    target = filled(f"delta://{tmp_path}/target", bars(("A", "Q"), first=2_000, rows=300))
    monkeypatch.setattr(tasks.compare, "FEW", 30)
    reads: list[tuple[list[str], int]] = []
    pairs = tasks.compare._pairs

    def noted(sides, read):
        reads.append((sorted(read.subjects), read.most))
        return pairs(sides, read)

    monkeypatch.setattr(tasks.compare, "_pairs", noted)
    (done,) = copy(source, target)
    assert (done.agree, done.problems) == (True, [])
    assert done.remarks == [f"{target} has 600 rows besides, which {source} has not"]
    # the last day of A, where the rows of both meet
    assert reads == [(["A"], 24)]
    reads.clear()
    (done,) = copy(source, target, told=meddle(target, bars(("C",), first=100, rows=1, add=1.0)))
    assert [(one.subject, one.changed) for one in done.differences] == [("C", 1)]
    assert sorted(reads) == [(["A"], 24), (["C"], 24)]


def test_of_much_that_differs_the_first_rows_are_told_and_of_the_rest_the_spans(
    source: str, tmp_path: Path, monkeypatch
):
    target = f"delta://{tmp_path}/target"
    monkeypatch.setattr(tasks.compare, "FEW", 30)
    monkeypatch.setattr(tasks.compare, "ROWS", 20)
    monkeypatch.setattr(tasks.compare, "ENOUGH", 40)
    (done,) = copy(source, target, told=meddle(target, bars(("B",), rows=2_000, add=1.0)))
    (found,) = done.differences
    assert (found.subject, found.missing, found.changed + found.unread) == ("B", 0, 2_000)
    assert 40 <= found.changed < 100
    assert found.first == START
    assert done.remarks == []


@pytest.mark.parametrize("subject", ["code", None])
def test_a_table_without_times_is_compared_by_its_rows(tmp_path: Path, monkeypatch, subject: str | None):
    monkeypatch.setattr(tasks.compare, "ROWS", 30)
    monkeypatch.setattr(tasks.compare, "FEW", 10)
    schema = replace(INSTRUMENTS, subject=subject)
    codes = [f"c{number:03d}" for number in range(100)]
    rows = pl.DataFrame({"code": codes, "name": None, "lot": range(100)}, schema=INSTRUMENTS.polars())
    home = filled(f"csv://{tmp_path}/home", stamped(rows), "made.bars", schema)
    target = f"parquet://{tmp_path}/target"
    copy(home, target)
    with closing(open_store(target)) as store:
        other = stamped(rows[41:42].with_columns(name=pl.lit("x")))
        store.write(batch("made.bars", other, 7, schema=schema))
        seen = tasks.compare.compare(open_store(home), store, "made.bars", schema, Filter(), datetime.now(UTC))
    (found,) = seen.differences.values()
    assert (found.changed, found.missing, found.example) == (1, 0, "code 'c041': name is 'x' there, and None here")


def test_rows_that_come_to_the_source_meanwhile_are_told_and_are_no_difference(source: str, tmp_path: Path):
    target = f"parquet://{tmp_path}/target"
    now = pl.lit(datetime.now(UTC)).cast(pl.Datetime("us", "UTC")).alias("_ingested_at")
    late = pl.concat([bars(("A",), first=2_000, rows=3), bars(("B",), rows=1, add=1.0)]).with_columns(now)
    (done,) = copy(source, target, told=meddle(source, late))
    assert (done.agree, done.late, done.differences, done.problems) == (True, 4, [], [])
    assert done.remarks == [
        f"{source} changed while it was copied (6,000 rows before, 6,003 after): 4 rows that came meanwhile are not "
        "there yet; run the same copy again"
    ]
    (again,) = copy(source, target)
    assert (again.inserted, again.updated, again.late, again.remarks) == (3, 1, 0, [])
    assert_frame_equal(rows_of(target), rows_of(source))


def test_a_source_that_was_changed_with_old_stamps_is_named_as_the_reason(source: str, tmp_path: Path):
    target = f"parquet://{tmp_path}/target"
    old = pl.lit(datetime(2020, 1, 1, tzinfo=UTC)).cast(pl.Datetime("us", "UTC")).alias("_ingested_at")
    (done,) = copy(source, target, told=meddle(source, bars(("B",), rows=1, add=1.0).with_columns(old)))
    assert (done.agree, [one.changed for one in done.differences]) == (False, [1])
    assert done.problems[0] == (
        f"{source} changed while it was copied (6,000 rows before, 6,000 after); run the same copy again"
    )


def test_the_command_says_that_fingerprints_agree_and_what_does_not(source: str, tmp_path: Path, monkeypatch):
    target = f"parquet://{tmp_path}/target"

    def run(*more: str) -> Result:
        return CliRunner().invoke(build(), ["copy", "--from", source, "--to", target, *more])

    done = run()
    assert (done.exit_code, done.stdout) == (
        0,
        "made.bars: 6,000 rows read: 6,000 inserted, 0 updated, 0 unchanged; fingerprints agree (6,000 rows)\n",
    )
    write = storage.parquet.ParquetStore.write

    def losing(store, one):
        return write(store, replace(one, frame=one.frame.filter(pl.col("symbol") != "B")))

    monkeypatch.setattr(storage.parquet.ParquetStore, "write", losing)
    with closing(open_store(target)) as store:
        store.delete("made.bars", Filter(["B"]))
    failed = run()
    assert failed.exit_code == 1
    assert "agree" not in failed.stdout
    assert "B (1,000 missing, " in failed.stdout or "B (2,000 missing, " in failed.stdout
    told = json.loads(run("--json").stdout)["datasets"][0]
    assert (told["agree"], [one["subject"] for one in told["differences"]]) == (False, ["B"])


# ---------------------------------------------------------------- what cannot be kept, told beforehand


DAILY_BARS = replace(BARS, columns=(BARS.columns[0], replace(BARS.columns[1], type=ColumnType.DATE), *BARS.columns[2:]))
NOTES = replace(BARS, columns=(*BARS.columns, Column("note", ColumnType.STR)))


def noted(text: str) -> pl.DataFrame:
    return bars(("A",), rows=3).with_columns(note=pl.Series(["fine", text, None])).select(*NOTES.names, *SYSTEM_COLUMNS)


def days(*on: date) -> pl.DataFrame:
    rows = {"symbol": ["A"] * len(on), "ts": on, "close": 1.0, "volume": 1}
    return stamped(pl.DataFrame(rows, schema=DAILY_BARS.polars()))


def test_a_place_without_tables_is_told_and_a_source_that_gives_less_than_it_has_is_not_copied(
    source: str, tmp_path: Path, monkeypatch
):
    target = f"delta://{tmp_path}/target"
    for empty in (f"parquet://{tmp_path}/nothere", f"delta://{tmp_path}"):
        told = CliRunner().invoke(build(), ["copy", "--from", empty, "--to", target, "--dry-run"])
        assert isinstance(told.exception, ConfigurationError)
        assert "has no table that could be copied" in str(told.exception)
    scan = storage.delta.DeltaStore.scan
    monkeypatch.setattr(storage.delta.DeltaStore, "scan", lambda *asked: scan(*asked).head(7))
    with pytest.raises(StoreError, match="has 6,000 rows, and gives 7 of them when it is read: look for a limit"):
        copy(source, target)


@pytest.mark.parametrize(
    ("kind", "schema", "frame", "says"),
    [
        (
            "marketstore",
            BARS,
            bars(("A", "B/C"), rows=2),
            r"'symbol' .* has 2 values .*the first: symbol 'B/C', ts 2001",
        ),
        (
            "marketstore",
            BARS,
            bars(("A",), rows=2).with_columns(pl.col("ts").dt.offset_by("1s")),
            "has 2 .*bucket of 1Min",
        ),
        ("marketstore", DAILY_BARS, days(date(1999, 1, 1), date(1999, 1, 2)), "has 1 .*1 January.*ts 1999-01-01"),
        ("marketstore", DAILY_BARS, days(date(1969, 1, 3), date(1999, 1, 2)), "has 1 .*before 1970.*ts 1969-01-03"),
        ("marketstore", INSTRUMENTS, None, "time is not in the key"),
        ("dolphindb", NOTES, noted("é" * 32_768), r"'note' .* has 1 values .*65535 bytes"),
        ("dolphindb", NOTES, noted(""), r"'note' .* has 1 values .*empty text.*ts 2001-01-30 10:30"),
        ("dolphindb", DAILY_BARS, days(date(1600, 1, 3), date(1999, 1, 2)), "has 1 .*before 1677"),
        ("dolphindb", replace(BARS, columns=(*BARS.columns, Column("select", ColumnType.STR))), None, "'select'"),
        ("excel", NOTES, noted("\r" * 20_000), r"'note' .* has 1 values .*32767 characters"),
        ("postgres", replace(BARS, columns=(*BARS.columns, Column("ctid", ColumnType.STR))), None, "'ctid'"),
    ],
)
def test_what_the_target_refuses_in_one_dataset_is_told_before_a_row_of_any_is_moved(
    kind: str,
    schema: Schema,
    frame: pl.DataFrame | None,
    says: str,
    tmp_path: Path,
    request: pytest.FixtureRequest,
):
    target = target_of(kind, tmp_path, request)
    home = filled(f"parquet://{tmp_path}/home", bars(rows=2), "made.fine")
    filled(home, pl.DataFrame(schema=schema.polars(system=True)) if frame is None else frame, "made.odd", schema)
    for dry in (True, False):
        with pytest.raises(SchemaError, match=says):
            copy(home, target, dry_run=dry)
    with closing(open_store(target)) as store:
        assert store.datasets() == []
    (done,) = copy(home, target, "made.fine")
    assert done.agree


def test_nulls_that_the_table_there_does_not_take_are_counted_beforehand(tmp_path: Path):
    strict = replace(BARS, columns=(*BARS.columns[:2], *(replace(one, nullable=False) for one in BARS.columns[2:])))
    target = filled(f"delta://{tmp_path}/target", bars(rows=1), schema=strict)
    holed = bars().with_columns(pl.when(pl.col("volume") > 40).then("volume").alias("volume"))
    home = filled(f"parquet://{tmp_path}/home", holed)
    with pytest.raises(SchemaError, match=r"'volume' of made\.bars has 41 values .*null where the table has none"):
        copy(home, target)
    with closing(open_store(target)) as store:
        assert store.count("made.bars") == 2


# ---------------------------------------------------------------- coverage

SPAN = {"datasets": [DAILY], "universe": ["AAPL", "IBM"], "since": "2010-01-01", "until": "2012-12-31"}
STORES = {"default": "delta://./data", "second": "parquet://./second"}


@pytest.fixture
def synced(place: Callable[..., Place]) -> Place:
    """A place whose first store was synced, and whose plan then names the second one."""
    made = place()
    made.write({**SPAN, "stores": ["default"]}, stores=STORES)
    assert made.sync_here().code == 0
    made.write({**SPAN, "stores": ["second"]}, stores=STORES)
    return made


def test_what_was_copied_is_not_asked_of_the_provider_again(synced: Place):
    before = synced.requests
    (done,) = copy("default", "second", DAILY, synced.config)
    assert (done.covered, done.problems) == (2, [])
    after = synced.sync_here()
    assert (after.code, synced.requests) == (0, before)
    assert_frame_equal(synced.bars("second"), synced.bars())


def test_a_subject_whose_rows_came_meanwhile_is_not_handed_on_until_the_next_copy(synced: Place):
    def delivered(one: Copied) -> None:
        with closing(open_store(synced.url("default"))) as store:
            rows = store.scan(DAILY, Filter(["IBM"], system=True)).head(1).collect()
            schema = store.schema(DAILY)
            assert schema is not None
            now = pl.lit(datetime.now(UTC)).cast(pl.Datetime("us", "UTC")).alias("_ingested_at")
            later = rows.with_columns(pl.col("volume") + 1, now)
            store.write(batch(DAILY, later, 99, lane="somebody", schema=schema))

    (done,) = copy("default", "second", DAILY, synced.config, told=delivered)
    assert (done.agree, done.late, done.covered) == (True, 1, 1)
    (again,) = copy("default", "second", DAILY, synced.config)
    assert (again.late, again.updated, again.covered) == (0, 1, 1)
    before = synced.requests
    assert synced.sync_here().code == 0
    assert synced.requests == before


def test_what_was_not_copied_is_asked_as_before(synced: Place):
    (done,) = copy("default", "second", DAILY, synced.config, symbols="AAPL", until=date(2011, 6, 30))
    assert done.covered == 1
    before = synced.requests
    assert synced.sync_here().code == 0
    assert synced.requests > before
    assert_frame_equal(synced.bars("second"), synced.bars())


def test_coverage_of_a_table_that_the_ledger_does_not_know_is_not_handed_on(synced: Place):
    with closing(open_store(synced.url("default"))) as store:
        schema = store.schema(DAILY)
        few = store.scan(DAILY, Filter(system=True)).collect().head(3)
    assert schema is not None
    shutil.rmtree(synced.folder / "data" / "alpaca")
    filled(synced.url("default"), few, DAILY, schema)
    (done,) = copy("default", "second", DAILY, synced.config)
    assert (done.inserted, done.covered) == (3, 0)
    before = synced.requests
    assert synced.sync_here().code == 0
    assert synced.requests > before
    assert synced.bars("second").height > 1_000
