"""What only DolphinDB has: its names, keys and limits, partitions that are taken, a client that prints."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from datetime import UTC, date, datetime
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit, urlunsplit

import polars as pl
import pytest
from conftest import ROOT
from stored_frames import BARS, bars, batch, stamped

from marketsync.errors import ConfigurationError, SchemaError, StoreError
from marketsync.schema import Column, ColumnType, Period, Schema
from storage import dolphindb as engine
from storage.protocol import Filter, Mode, Store, Written
from storage.registry import open_store


@pytest.fixture
def store(dolphindb: str) -> Store:
    return open_store(dolphindb)


def test_a_negative_zero_is_the_zero_that_is_there(store: Store):
    store.ensure("made.bars", BARS)
    frame = bars(("a",), rows=2)
    store.write(batch("made.bars", frame.with_columns(close=pl.Series([0.0, 2.0])), 1))
    again = batch("made.bars", frame.with_columns(close=pl.Series([-0.0, 2.0])), 2, mode=Mode.UPSERT)
    assert store.write(again) == Written(unchanged=2)


def test_a_symbol_is_never_read_as_a_part_of_a_script(store: Store):
    evil = 'x" or 1=1; dropDatabase("dfs://made_made_bars"); "'
    store.ensure("made.bars", BARS)
    store.write(batch("made.bars", bars(("a", evil), rows=4), 1))
    assert store.write(batch("made.bars", bars(("a", evil), rows=4, add=1.0), 2, lane='l"')) == Written(updated=8)
    assert store.count("made.bars", Filter([evil])) == 4
    assert store.delete("made.bars", Filter([evil])) == 4
    assert store.count("made.bars") == 4
    assert store.committed("made.bars", 'l"') == 2


@pytest.mark.parametrize(
    ("key", "others"),
    [
        (("index", "code"), {}),
        (("ts",), {"ts": ColumnType.DATETIME}),
        (("at",), {"at": ColumnType.DATETIME_NS}),
        (("day",), {"day": ColumnType.DATE}),
        (("ts", "code"), {"ts": ColumnType.DATETIME}),
        (("code", "day", "ts"), {"day": ColumnType.DATE, "ts": ColumnType.DATETIME_NS}),
        (("number", "code"), {"number": ColumnType.U64}),
        (("day", "number"), {"day": ColumnType.DATE, "number": ColumnType.I32}),
    ],
)
def test_any_key_that_the_engine_can_sort_by_is_kept_once(
    store: Store, key: tuple[str, ...], others: dict[str, ColumnType]
):
    columns = tuple(Column(name, others.get(name, ColumnType.STR)) for name in key)
    schema = Schema((*columns, Column("close", ColumnType.F64)), key)
    values = {
        ColumnType.STR: ["a", "b", "b", "c"],
        ColumnType.DATE: [date(2001, 1, 1), date(2001, 1, 2), date(2001, 1, 3), date(1999, 1, 1)],
        ColumnType.DATETIME: [datetime(2001, 1, day, tzinfo=UTC) for day in (1, 2, 3, 4)],
        ColumnType.DATETIME_NS: [datetime(2001, 1, day, tzinfo=UTC) for day in (1, 2, 3, 4)],
        ColumnType.U64: [1, 2, 3, 2**63 - 1],
        ColumnType.I32: [1, 2, 3, -(2**31) + 1],
    }
    made = {name: values[schema[name].type] for name in key} | {"close": [1.0, 2.0, None, 4.0]}
    if not others:
        made["code"] = ["x", "x", "y", "z"]
    frame = stamped(pl.DataFrame(made, schema=schema.polars()))
    store.ensure("made.keys", schema)
    assert store.write(batch("made.keys", frame.head(3), 1, schema=schema)) == Written(inserted=3)
    changed = frame.with_columns(pl.col("close") * 2)
    assert store.write(batch("made.keys", changed, 2, schema=schema)) == Written(1, 2, 1)
    assert store.scan("made.keys").collect().sort(key).equals(changed.select(schema.names).sort(key))
    assert store.replace("made.keys", schema, changed.head(1), Filter()) == Written(unchanged=1, deleted=3)
    assert store.count("made.keys") == 1


@pytest.mark.parametrize("period", list(Period))
def test_a_table_cut_by_any_period_is_asked_as_a_whole_and_has_rows_of_all_times(store: Store, period: Period):
    schema = Schema(BARS.columns, BARS.key, "ts", "symbol", period)
    years = (1677, 1899, 1969, 1970, 2024, 2099, 2100, 2262)
    times = [datetime(year, 12 if year == 1677 else 1, 1, tzinfo=UTC) for year in years]
    frame = bars(("a",), rows=len(times)).with_columns(ts=pl.Series(times, dtype=pl.Datetime("us", "UTC")))
    store.ensure("made.bars", schema)
    store.write(batch("made.bars", frame, 1, schema=schema))
    store.write(batch("made.bars", frame, 2, schema=schema, mode=Mode.UPSERT))
    assert store.count("made.bars") == len(times)
    assert store.scan("made.bars").collect()["ts"].sort().to_list() == times


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        (Schema((Column("select", ColumnType.STR),), ("select",)), "'select'.*rename it"),
        (Schema((Column("1st", ColumnType.STR),), ("1st",)), "'1st'.*rename it"),
        (Schema((Column("segment_", ColumnType.STR),), ("segment_",)), "'segment_'.*rename it"),
        (Schema((Column("price", ColumnType.F64),), ("price",)), "'price'.*cannot sort by"),
        (
            Schema((Column("a", ColumnType.DATETIME), Column("b", ColumnType.DATETIME_NS)), ("a", "b")),
            "several times of day",
        ),
    ],
)
def test_names_and_keys_that_the_engine_has_no_place_for_are_refused(store: Store, schema: Schema, says: str):
    with pytest.raises(SchemaError, match=says):
        store.ensure("made.odd", schema)
    assert store.datasets() == []


def test_a_text_that_the_engine_would_cut_and_a_time_that_it_cannot_count_are_refused(store: Store):
    schema = Schema((Column("code", ColumnType.STR), Column("at", ColumnType.DATETIME)), ("code",))
    store.ensure("made.limits", schema)
    longest = stamped(pl.DataFrame({"code": ["é" * 32_767], "at": [None]}, schema=schema.polars()))
    assert store.write(batch("made.limits", longest, 1, schema=schema)) == Written(inserted=1)
    longer = longest.with_columns(code=pl.col("code") + "éé")
    with pytest.raises(SchemaError, match=r"'code'.*65535 bytes"):
        store.write(batch("made.limits", longer, 2, schema=schema))
    far = stamped(pl.DataFrame({"code": ["a"], "at": [datetime(2300, 1, 1, tzinfo=UTC)]}, schema=schema.polars()))
    with pytest.raises(SchemaError, match=r"'at'.*2262"):
        store.write(batch("made.limits", far, 2, schema=schema))
    assert store.count("made.limits") == 1


def test_rows_without_a_time_are_before_no_bound(store: Store):
    schema = Schema((Column("code", ColumnType.STR), Column("listed", ColumnType.DATE)), ("code",), "listed")
    frame = stamped(pl.DataFrame({"code": ["a", "b"], "listed": [None, date(2001, 1, 1)]}, schema=schema.polars()))
    store.ensure("made.listed", schema)
    store.write(batch("made.listed", frame, schema=schema))
    assert store.count("made.listed", Filter(until=date(2100, 1, 1))) == 1
    assert store.count("made.listed", Filter(since=date(1700, 1, 1))) == 1
    assert store.watermarks("made.listed") == {"*": date(2001, 1, 1)}


def test_more_rows_than_a_block_are_read_while_the_store_answers_others(store: Store):
    rows = 40_000
    store.ensure("made.long", BARS)
    store.write(batch("made.long", bars(("a", "b"), rows=rows), mode=Mode.APPEND))
    parts = store.arrow("made.long")
    first = next(parts)
    assert store.count("made.long") == 2 * rows
    assert first.num_rows + sum(part.num_rows for part in parts) == 2 * rows
    assert store.scan("made.long").head(7).collect().height == 7


def test_a_partition_that_another_writer_has_is_waited_for(
    store: Store, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
):
    if not request.getfixturevalue("dolphindb").endswith("/made"):
        pytest.skip("nobody can be made to hold a partition of a real server")
    from dolphindb_double import _Table

    store.ensure("made.taken", BARS)
    path = store.info("made.taken").location.rpartition(": ")[2]
    taken, free = threading.Event(), threading.Event()
    waits: list[float] = []

    def hold() -> None:
        with _Table(path, "rows").transaction():
            taken.set()
            free.wait(30)

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 60:
            free.set()
            other.join()

    monkeypatch.setattr(engine, "time", SimpleNamespace(sleep=sleep, monotonic=time.monotonic))
    other = threading.Thread(target=hold)
    other.start()
    taken.wait(30)
    with pytest.raises(StoreError, match=r"made\.taken.*has been owned by transaction"):
        store.write(batch("made.taken", bars()))
    assert 9 < sum(waits) < 11
    assert store.write(batch("made.taken", bars())) == Written(inserted=96)
    assert len(waits) == 60


def test_a_session_that_was_cut_off_is_opened_again(store: Store):
    store.ensure("made.cut", BARS)
    store._open.close()  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(StoreError, match=r"counting the rows of made\.cut"):
        store.count("made.cut")
    assert store.count("made.cut") == 0
    store.close()
    with pytest.raises(StoreError, match="was closed"):
        store.count("made.cut")


def test_a_wrong_password_is_told_without_it(dolphindb: str):
    place = urlsplit(dolphindb)
    wrong = place._replace(netloc=f"{place.username}:letmein@{place.hostname}:{place.port}")
    store = open_store(urlunsplit(wrong))
    with pytest.raises(StoreError, match="password is incorrect") as told:
        store.datasets()
    assert "letmein" not in str(told.value) + store.url + store.name


# in a process of its own, since this one may have so many files open that the client cannot be used here
OPENED = """
import os, sys
from pathlib import Path
from marketsync.errors import StoreError
from storage.registry import open_store

files = [os.open(os.devnull, os.O_RDONLY) for _ in range(int(sys.argv[2]))]
try:
    open_store(sys.argv[1]).datasets()
except StoreError as failed:
    Path(sys.argv[3]).write_text(str(failed))
"""


def told_by_the_client(url: str, told: Path, *, open_files: int = 0) -> str:
    """What the store says when it is opened with the real client; asserts that nothing is printed."""
    pytest.importorskip("dolphindb")
    command = [sys.executable, "-c", OPENED, url, str(open_files), str(told)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
    return told.read_text()


@pytest.mark.parametrize("silent", [False, True], ids=["nobody", "somebody who never answers"])
def test_a_server_that_is_not_there_is_told_and_nothing_is_printed(silent: bool, tmp_path: Path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        if silent:
            taken.listen()
        port = taken.getsockname()[1]
        told = told_by_the_client(f"dolphindb://market:secret@127.0.0.1:{port}/market?timeout=2", tmp_path / "told")
    assert f"127.0.0.1:{port}; is the server up" in told


def test_where_the_client_would_crash_for_open_files_it_is_not_asked(tmp_path: Path):
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 1200:
        pytest.skip("no process may have so many files open here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 1200), hard))
    try:
        told = told_by_the_client("dolphindb://127.0.0.1:9/market?timeout=2", tmp_path / "told", open_files=1100)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert "1016 files and connections open" in told


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("dolphindb://host", "'' is no name of a database"),
        ("dolphindb://host/a-b", "'a-b' is no name of a database"),
        ("dolphindb://host:x/a", "write dolphindb://"),
        ("dolphindb://host/a?tls=true", "tls is no option.*compress, ssl, timeout"),
        ("dolphindb://host/a?ssl=perhaps", "ssl='perhaps' is neither true nor false"),
        ("dolphindb://host/a?timeout=0", "timeout='0' is no number of seconds"),
    ],
)
def test_a_url_that_cannot_be_meant_is_refused(url: str, says: str):
    with pytest.raises(ConfigurationError, match=says):
        open_store(url)


def test_what_the_table_is_made_of_follows_the_schema():
    from storage.dolphindb_rows import creation

    made = creation("dfs://x", "rows", BARS)
    assert 'partitionColumns=["ts", "symbol"], sortColumns=["symbol", "ts"], keepDuplicates=LAST' in made
    yearly = creation("dfs://x", "rows", Schema(BARS.columns, BARS.key, "ts", "symbol", Period.YEAR))
    assert "RANGE, (1677.01M join (1970.01M + 12 * (0..130))) join 2263.01M)" in yearly
