"""`marketsync copy`: every row and type arrives, a kill leaves nothing twice, nothing is copied that would be changed,
and the ledger believes of the target what it knew of the source and no more. Real engines, real processes."""

from __future__ import annotations

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

import storage.lazyframes
import tasks.copy
from marketsync import copy
from marketsync.errors import ConfigurationError, SchemaError, StoreError
from marketsync.schema import Period, Schema
from storage.protocol import Filter
from storage.registry import open_store
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
    return f"{kind}://{tmp_path}/target" if kind in ("csv", "delta", "parquet") else request.getfixturevalue(kind)


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


def test_tables_without_times_are_copied_too(tmp_path: Path):
    rows = stamped(
        pl.DataFrame({"code": ["a", "b"], "name": ["one", None], "lot": [1, 2]}, schema=INSTRUMENTS.polars())
    )
    home = filled(f"csv://{tmp_path}/home", rows, "made.codes", INSTRUMENTS)
    (done,) = copy(home, f"delta://{tmp_path}/target")
    assert done.inserted == 2
    assert_frame_equal(rows_of(f"delta://{tmp_path}/target", "made.codes"), rows_of(home, "made.codes"))


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
