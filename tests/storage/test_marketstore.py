"""What only MarketStore has: buckets, ticks, no deletion, and the many ways in which it would lose or move a value."""

from __future__ import annotations

import random
import re
import socket
import subprocess
import threading
import time
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import polars as pl
import pytest
from conftest import python
from marketstore_buckets import client, keys
from marketstore_double import private_marketstore
from polars.testing import assert_frame_equal
from stored_frames import BARS, START, WIDE, bars, batch, differences, hostile, stamped
from tick_process import TICKS, of, ticks
from writer_process import expected

import storage.marketstore
from marketsync.errors import CapabilityError, ConfigurationError, SchemaConflict, SchemaError, StoreError
from marketsync.schema import Column, ColumnType, Period, Schema
from storage.marketstore import MarketStore
from storage.marketstore_rpc import Client, Range, Refused
from storage.protocol import Filter, Mode, Written
from storage.registry import open_store

DAILY = Schema(
    (Column("symbol", ColumnType.STR), Column("day", ColumnType.DATE), Column("close", ColumnType.F64)),
    key=("symbol", "day"),
    time="day",
    subject="symbol",
    period=Period.YEAR,
)
BY_TICK = list(TICKS.key)
HOUR = timedelta(hours=1)


def opened(url: str) -> MarketStore:
    store = open_store(url)
    assert isinstance(store, MarketStore)
    return store


def daily(*days: date, symbol: str = "AAPL") -> pl.DataFrame:
    closes = [float(day.toordinal()) for day in days]
    return stamped(pl.DataFrame({"symbol": symbol, "day": days, "close": closes}, DAILY.polars()))


def all_ticks(store: MarketStore, dataset: str) -> pl.DataFrame:
    return store.scan(dataset, Filter(system=True)).collect().sort(BY_TICK)


def expected_ticks(last: int) -> pl.DataFrame:
    return pl.concat([ticks(seq) for seq in range(1, last + 1)]).sort(BY_TICK)


# what others see


def test_the_official_client_finds_bars_by_symbol_timeframe_and_dataset(marketstore, dataset):
    pymarketstore = pytest.importorskip("pymarketstore", reason="pymarketstore is not installed")
    store = opened(marketstore)
    store.ensure(dataset, BARS)
    store.write(batch(dataset, bars(("AAPL", "MSFT"), rows=5)))
    group = f"{urlsplit(marketstore).path.strip('/')}.{dataset}"
    asked = pymarketstore.Client(f"http://{urlsplit(marketstore).netloc}/rpc")
    frame = asked.query(pymarketstore.Params("MSFT", "1Min", group)).first().df()
    assert frame["close"].tolist() == [100.0, 100.1, 100.2, 100.3, 100.4]
    assert str(frame.index[0]) == "2001-01-30 09:30:00+00:00"
    every = asked.query(pymarketstore.Params("*", "1Min", group)).all()
    assert sorted(every) == [f"AAPL/1Min/{group}", f"MSFT/1Min/{group}"]


def test_a_bucket_whose_columns_stand_in_another_order_gets_each_value_into_its_own(marketstore, dataset):
    store = opened(marketstore)
    store.ensure(dataset, BARS)
    store.write(batch(dataset, bars(("A",), rows=2), 1))
    (key,) = (key for key in keys(marketstore, f"{urlsplit(marketstore).path.strip('/')}.{dataset}") if key[0] == "A")
    asked = client(marketstore)
    row = asked.query([Range(key, 1, 10**9)]).rows[0]
    assert row is not None
    asked.destroy(key)
    asked.write(
        {key: {"Epoch": row["Epoch"], **{name: row[name] for name in reversed(row) if name != "Epoch"}}}, variable=False
    )
    store.write(batch(dataset, bars(("A",), rows=48), 2))
    assert_frame_equal(store.scan(dataset).collect().sort("ts"), bars(("A",)).select(BARS.names))


def test_a_bucket_that_somebody_else_made_is_left_alone(marketstore, dataset):
    store = opened(marketstore)
    store.ensure(dataset, BARS)
    key = f"A/1Min/{urlsplit(marketstore).path.strip('/')}.{dataset}"
    theirs = {"Epoch": np.array([10**9 + 20]), "close": np.array([1.5])}
    client(marketstore).write({key: theirs}, variable=False)
    with pytest.raises(StoreError, match="not made by MarketSync"):
        store.write(batch(dataset, bars(("A", "B"))))
    assert not any(key.startswith("B/") for key in keys(marketstore, urlsplit(marketstore).path.strip("/")))


def test_two_stores_of_one_server_keep_their_datasets_apart(marketstore):
    first, second = opened(marketstore), opened(marketstore + "-b")
    first.ensure("made.bars", BARS)
    second.ensure("made.bars", DAILY)
    first.write(batch("made.bars", bars()))
    assert (first.count("made.bars"), second.count("made.bars")) == (96, 0)
    assert first.datasets() == second.datasets() == ["made.bars"]
    for key in keys(marketstore, urlsplit(marketstore).path.strip("/") + "-b"):
        client(marketstore).destroy(key)


# what it would lose


def spoiled(**values) -> pl.DataFrame:
    return bars(("A",), rows=1).with_columns(
        **{name: pl.lit(value, BARS.polars()[name]) for name, value in values.items()}
    )


@pytest.mark.parametrize(
    ("frame", "says"),
    [
        (spoiled(ts=datetime(1969, 12, 31, 23, 59, tzinfo=UTC)), "'ts'.*1970"),
        (spoiled(ts=datetime(1970, 1, 1, tzinfo=UTC)), "'ts'.*1970"),
        (spoiled(ts=datetime(2262, 1, 1, tzinfo=UTC)), "'ts'.*2261"),
        (spoiled(ts=datetime(2024, 1, 2, 9, 30, 30, tzinfo=UTC)), "'ts'.*bucket of 1Min.*timeframe"),
        (spoiled(ts=datetime(2024, 1, 2, 9, 30, 0, 1, tzinfo=UTC)), "'ts'.*bucket of 1Min.*timeframe"),
        (spoiled(symbol="BTC/USD"), "'symbol'.*1 values.*BTC-USD for BTC/USD"),
        (spoiled(symbol="A,B"), "'symbol'"),
        (spoiled(symbol="*"), "'symbol'"),
        (spoiled(symbol=".."), "'symbol'"),
        (spoiled(symbol="A\n"), "'symbol'"),
        (spoiled(symbol="a:b"), "'symbol'"),
        (spoiled(symbol=""), "'symbol'"),
        (spoiled(symbol="A" * 65), "'symbol'"),
    ],
)
@pytest.mark.parametrize("mode", list(Mode))
def test_a_row_that_would_be_lost_or_moved_is_refused_before_anything_is_sent(marketstore, dataset, frame, says, mode):
    store = opened(marketstore)
    store.ensure(dataset, BARS)
    before = keys(marketstore, urlsplit(marketstore).path.strip("/"))
    with pytest.raises(SchemaError, match=says):
        store.write(batch(dataset, pl.concat([bars(), frame]), mode=mode))
    assert keys(marketstore, urlsplit(marketstore).path.strip("/")) == before
    assert store.committed(dataset, "lane") == 0


def test_text_that_has_no_room_is_refused(marketstore, dataset):
    store = opened(marketstore)
    store.ensure(dataset, TICKS)
    fits, long = (ticks(1).with_columns(venue=pl.lit(text)) for text in ("ß" * 16, "ß" * 17))
    with pytest.raises(SchemaError, match=r"'venue' of .* has 600 values .*16 characters"):
        store.write(batch(dataset, long, schema=TICKS))
    store.write(batch(dataset, fits, schema=TICKS))
    assert_frame_equal(all_ticks(store, dataset), fits.sort(BY_TICK))


def test_a_symbol_may_have_64_characters_and_no_more(marketstore, dataset):
    store = opened(marketstore)
    store.ensure(dataset, BARS)
    longest = ("A" * 64, "." + "A" * 63)
    store.write(batch(dataset, bars(longest, rows=2)))
    assert store.scan(dataset).collect()["symbol"].unique().sort().to_list() == sorted(longest)
    for symbol in ("A" * 65, "." + "A" * 64):
        with pytest.raises(SchemaError, match="64"):
            store.write(batch(dataset, bars((symbol,), rows=2), 2))


def test_the_first_of_january_is_refused_from_day_buckets_and_kept_in_hours(marketstore, dataset):
    turn = [date(2023, 12, 31), date(2024, 1, 1), date(2024, 1, 2)]
    store = opened(marketstore)
    store.ensure(dataset, DAILY)
    with pytest.raises(SchemaError, match=r"1 January.*timeframe=1H"):
        store.write(batch(dataset, daily(*turn), schema=DAILY))
    store.write(batch(dataset, daily(turn[0], turn[2]), schema=DAILY))
    assert store.scan(dataset).collect()["day"].to_list() == [turn[0], turn[2]]
    hours = opened(f"{marketstore}?timeframe=1H")
    hours.ensure(f"{dataset}-h", DAILY)
    hours.write(batch(f"{dataset}-h", daily(*turn), schema=DAILY))
    assert hours.scan(f"{dataset}-h").collect()["day"].to_list() == turn
    assert hours.watermarks(f"{dataset}-h") == {"AAPL": turn[2]}


def test_ticks_keep_every_nanosecond_but_those_that_would_come_a_second_later(marketstore, dataset):
    store = opened(marketstore)
    store.ensure(dataset, TICKS)
    second = 1_704_067_199_000_000_000  # the last one of 2023
    chance = random.Random(7)
    kept = sorted({0, 1, 999_999_994, *(chance.randrange(999_999_995) for _ in range(500))})
    nanos = [*kept, *(10**9 + nano for nano in kept)]
    frame = ticks(1, rows=len(nanos), symbols=("A",))
    frame = frame.with_columns(pl.Series("at", [second + nano for nano in nanos]).cast(pl.Datetime("ns", "UTC")))
    store.write(batch(dataset, frame, schema=TICKS))
    assert_frame_equal(all_ticks(store, dataset), frame.sort(BY_TICK))
    for nano in range(999_999_995, 10**9):
        late = frame.head(1).with_columns(pl.lit(second + nano).cast(pl.Datetime("ns", "UTC")).alias("at"))
        with pytest.raises(SchemaError, match=r"'at'.*last 5 ns"):
            store.write(batch(dataset, late, 2, schema=TICKS))


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        (Schema(BARS.columns, ("symbol",), None, "symbol"), "time is not in the key"),
        (Schema(BARS.columns, ("ts",), "ts", "symbol"), "'symbol' names the bucket"),
        (Schema((*BARS.columns, Column("Epoch", ColumnType.I64)), BARS.key, "ts", "symbol"), "'Epoch'"),
        (Schema((*BARS.columns, Column("_nulls1", ColumnType.I64)), BARS.key, "ts", "symbol"), "'_nulls1'"),
        (Schema((*BARS.columns, Column("x" * 32, ColumnType.I64)), BARS.key, "ts", "symbol"), "31 bytes"),
    ],
)
def test_a_table_that_no_bucket_can_be_is_refused(marketstore, schema: Schema, says: str):
    with pytest.raises(SchemaConflict, match=says):
        opened(marketstore).ensure("made.odd", schema)
    assert keys(marketstore, urlsplit(marketstore).path.strip("/")) == []


def test_a_column_that_is_added_is_refused_with_what_to_do(marketstore, dataset):
    store = opened(marketstore)
    store.ensure(dataset, BARS)
    wider = Schema((*BARS.columns, Column("more", ColumnType.F64)), BARS.key, "ts", "symbol", Period.MONTH)
    with pytest.raises(SchemaConflict, match=r"'more'.*a dataset name of its own"):
        store.ensure(dataset, wider)


def test_many_columns_have_room_for_their_nulls(marketstore, dataset):
    more = tuple(Column(f"c{number}", ColumnType.I32) for number in range(150))
    schema = Schema((*BARS.columns[:2], *more), BARS.key, "ts", "symbol", Period.MONTH)
    values = {f"c{number}": [number if number % 5 else None, None] for number in range(150)}
    key = bars(("A",), rows=2).select("symbol", "ts")
    frame = stamped(key.with_columns(pl.Series(name, each, pl.Int32()) for name, each in values.items()))
    store = opened(marketstore)
    store.ensure(dataset, schema)
    store.write(batch(dataset, frame, schema=schema))
    assert not differences(store.scan(dataset).collect(), frame.select(schema.names), schema.key)


# ticks, once


def test_ticks_that_come_again_are_not_appended_again(marketstore, dataset):
    store = opened(marketstore)
    store.ensure(dataset, TICKS)
    assert store.write(of(dataset, 1)) == Written(inserted=600)
    again = ticks(1).head(450)
    for mode in Mode:
        assert store.write(batch(dataset, again, 2, lane=mode, mode=mode, schema=TICKS)) == Written(unchanged=450)
    half = pl.concat([ticks(1).tail(10), ticks(2)])
    assert store.write(batch(dataset, half, 2, mode=Mode.APPEND, schema=TICKS)) == Written(600, 0, 10)
    assert_frame_equal(all_ticks(store, dataset), expected_ticks(2))


def test_a_tick_that_changed_needs_leave_to_rewrite_its_bucket(marketstore, dataset):
    store = opened(marketstore)
    store.ensure(dataset, TICKS)
    store.write(of(dataset, 1))
    other = ticks(1).head(1).with_columns(price=pl.lit(1.0))
    with pytest.raises(CapabilityError, match="rewrite=true"):
        store.write(batch(dataset, other, 2, schema=TICKS))
    assert_frame_equal(all_ticks(store, dataset), expected_ticks(1))
    allowed = opened(f"{marketstore}?rewrite=true")
    assert allowed.write(batch(dataset, other, 2, schema=TICKS)) == Written(updated=1)
    wanted = pl.concat([other, ticks(1).filter(pl.struct(BY_TICK) != other.select(pl.struct(BY_TICK)).item())])
    assert_frame_equal(all_ticks(store, dataset), wanted.sort(BY_TICK))


def test_ticks_that_somebody_else_doubled_are_told_and_put_right(marketstore, dataset):
    store = opened(marketstore)
    store.ensure(dataset, TICKS)
    store.write(of(dataset, 1))
    (key,) = (key for key in keys(marketstore, urlsplit(marketstore).path.strip("/")) if key.startswith("AAPL/"))
    asked = client(marketstore)
    found = asked.query([Range(key, 1, 2 * 10**9)]).rows[0]
    assert found is not None
    asked.write({key: {name: column[:5] for name, column in found.items()}}, variable=True)
    with pytest.raises(CapabilityError, match="5 rows"):
        store.write(batch(dataset, ticks(1), 2, schema=TICKS))
    allowed = opened(f"{marketstore}?rewrite=true")
    assert allowed.write(batch(dataset, ticks(1), 2, schema=TICKS)).updated == 5
    assert_frame_equal(all_ticks(store, dataset), expected_ticks(1))


def kill_among_ticks(url: str, dataset: str, seed: int) -> None:
    """Kill a writer of ticks, deliver what it had begun once more, and find every tick once."""
    chance = random.Random(seed)
    process = subprocess.Popen(
        python("tick_process.py", url, dataset, 1000), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.stdin.write("\n")
    process.stdin.flush()
    acknowledged = 0
    for _ in range(chance.randint(0, 3)):
        acknowledged = int(process.stdout.readline())
    time.sleep(chance.uniform(0, 0.06))
    process.kill()
    acknowledged = max([acknowledged, *map(int, process.stdout.read().split())])
    process.communicate()
    time.sleep(0.1)  # what was on its way arrives
    store = opened(url)
    assert store.ensure(dataset, TICKS)
    assert store.committed(dataset, "lane") in (acknowledged, acknowledged + 1)
    there = all_ticks(store, dataset)
    assert there.select(BY_TICK).is_unique().all()
    assert expected_ticks(max(acknowledged, 1)).join(there, on=BY_TICK, how="anti").height in (
        0,
        600 if not acknowledged else 0,
    )
    for seq in range(max(acknowledged - 1, 1), acknowledged + 3):
        store.write(of(dataset, seq))
    assert_frame_equal(all_ticks(store, dataset), expected_ticks(acknowledged + 2))


def test_ticks_are_there_once_after_a_writer_was_killed_among_them(marketstore):
    for seed in range(2):
        kill_among_ticks(marketstore, f"made.killed{seed}", seed)


@pytest.mark.slow
def test_ticks_are_there_once_after_many_more_kills(marketstore):
    for seed in range(2, 22):
        kill_among_ticks(marketstore, f"made.killed{seed}", seed)


# rows that have to go


def test_no_row_goes_without_leave(marketstore, dataset):
    store = opened(marketstore)
    store.ensure(dataset, BARS)
    store.write(batch(dataset, bars()))
    span = Filter(["NA"], START, START + 3 * HOUR)
    with pytest.raises(CapabilityError, match=r"3 rows.*rewrite=true"):
        store.delete(dataset, span)
    with pytest.raises(CapabilityError, match="1 rows"):
        store.replace(dataset, BARS, bars(rows=2).filter(pl.col("symbol") == "NA"), span)
    assert store.count(dataset) == 96
    assert store.delete(dataset, Filter(["absent"])) == 0
    same = bars(rows=3, add=1.0).filter(pl.col("symbol") == "NA")
    assert store.replace(dataset, BARS, same, span) == Written(updated=3)


class Cut(Exception):
    """The process ended here."""


@pytest.mark.parametrize("schema", [BARS, TICKS], ids=["bars", "ticks"])
def test_a_rewrite_that_is_cut_short_anywhere_leaves_all_rows_or_what_was_wanted(marketstore, schema, monkeypatch):
    frame = bars(("A", "B")) if schema is BARS else ticks(1, rows=50, symbols=("A", "B"))
    key = list(schema.key)
    half = schema.time, frame[schema.time].sort()[frame.height // 4]
    span = Filter(["A"], since=half[1])
    rest = frame.filter((pl.col("symbol") != "A") | (pl.col(half[0]) < half[1])).sort(key)
    whole = frame.sort(key)
    met = set()
    for last in range(1, 100):
        dataset = f"made.cut{last}"
        store = opened(f"{marketstore}?rewrite=true")
        store.ensure(dataset, schema)
        store.write(batch(dataset, frame, schema=schema))
        left = iter(range(last))

        def cut(method, left=left):
            def instead(*arguments, **named):
                if next(left, None) is None:
                    raise Cut
                return method(*arguments, **named)

            return instead

        with monkeypatch.context() as patched:
            for name in ("write", "destroy"):
                patched.setattr(Client, name, cut(getattr(Client, name)))
            try:
                store.delete(dataset, span)
                done = True
            except Cut:
                done = False
        again = opened(marketstore)  # what was allowed is ended without leave
        again.ensure(dataset, schema)
        found = again.scan(dataset, Filter(system=True)).collect().sort(key)
        met.add("rest" if found.equals(rest) else "whole" if found.equals(whole) else found)
        if done:
            break
    assert done
    assert last >= 6
    assert met == {"rest", "whole"}
    assert not [key for key in keys(marketstore, urlsplit(marketstore).path.strip("/")) if "rewrite" in key]


# a server that refuses, or is away


def test_what_was_refused_together_is_written_bucket_by_bucket(marketstore, dataset, monkeypatch):
    for schema, frame in ((BARS, bars(tuple("ABCDEFGH"))), (TICKS, ticks(1, symbols=tuple("ABCDEFGH")))):
        name = f"{dataset}-{len(schema.columns)}"
        store = opened(marketstore)
        store.ensure(name, schema)
        group = f"{urlsplit(marketstore).path.strip('/')}.{name}"
        theirs = {"Epoch": np.array([10**9 + 20]), "other": np.array([1.5])}
        bad = f"D/{'1Min' if schema is BARS else '1Sec'}/{group}"
        with monkeypatch.context() as patched:
            # made by somebody between the look at it and the write
            patched.setattr(Client, "buckets", lambda _, asked: [None] * len(asked))
            client(marketstore).write({bad: theirs}, variable=False)
            with pytest.raises(StoreError, match=r"1 of 8 buckets.*unable to match"):
                store.write(batch(name, frame, mode=Mode.APPEND, schema=schema))
        client(marketstore).destroy(bad)
        rest = frame.filter(pl.col("symbol") != "D")
        assert_frame_equal(store.scan(name, Filter(system=True)).collect().sort(schema.key), rest.sort(schema.key))
        assert store.committed(name, "lane") == 0
        store.write(batch(name, frame, schema=schema))
        assert_frame_equal(store.scan(name, Filter(system=True)).collect().sort(schema.key), frame.sort(schema.key))


@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize("lost", ["AAPL/1Min", "1H/_marketsync-hours"])
def test_what_a_server_acknowledges_and_does_not_keep_stays_owed(marketstore, dataset, monkeypatch, mode, lost: str):
    write = Client.write

    def full(self: Client, rows: dict, *, variable: bool) -> None:
        write(self, {key: columns for key, columns in rows.items() if lost not in key}, variable=variable)

    store = opened(marketstore)
    store.ensure(dataset, BARS)
    rows = batch(dataset, bars(("AAPL", "IBM"), rows=4), 1, mode=mode)
    monkeypatch.setattr(Client, "write", full)
    with pytest.raises(StoreError, match=r"of 8 bars of .* are not in .*, though it took them: is its disk full"):
        store.write(rows)
    assert store.committed(dataset, "lane") == 0
    monkeypatch.undo()
    again = opened(marketstore)
    again.write(rows)
    assert again.count(dataset) == 8
    store.close()
    again.close()


def test_a_change_that_a_server_acknowledges_and_does_not_keep_stays_owed_and_another_writers_is_none(
    marketstore, dataset, monkeypatch
):
    write, rows = Client.write, bars(("AAPL", "IBM"), rows=4)

    def closing_at(value: float) -> pl.DataFrame:
        return rows.with_columns(close=pl.lit(value))

    def full(self: Client, rows: dict, *, variable: bool) -> None:
        kept = {key: columns for key, columns in rows.items() if not key.startswith("AAPL/1Min")}
        write(self, kept, variable=variable)

    def rival(self: Client, rows: dict, *, variable: bool) -> None:
        write(self, rows, variable=variable)
        if any(key.startswith("AAPL/1Min") for key in rows):
            changed = {key: {**columns, "close": columns["close"] + 1} for key, columns in rows.items()}
            write(self, changed, variable=variable)

    store = opened(marketstore)
    store.ensure(dataset, BARS)
    store.write(batch(dataset, closing_at(1.0)))
    monkeypatch.setattr(Client, "write", full)
    with pytest.raises(StoreError, match=r"4 of 8 bars of .*, though it took them"):
        store.write(batch(dataset, closing_at(2.0), 2))
    monkeypatch.setattr(Client, "write", rival)
    store.write(batch(dataset, closing_at(2.0), 2))
    assert store.committed(dataset, "lane") == 2
    found = store.scan(dataset).collect().group_by("symbol").agg(pl.col("close").unique()).sort("symbol")
    assert found.rows() == [("AAPL", [3.0]), ("IBM", [2.0])]
    store.close()


def test_a_replica_says_where_to_write_instead():
    with private_marketstore(replica=True) as (url, _), pytest.raises(StoreError, match="name the replica's master"):
        opened(url).ensure("made.bars", BARS)


def test_a_server_that_is_away_or_is_none_is_told_as_such(marketstore, dataset):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        with pytest.raises(StoreError, match="is the server up"):
            opened(f"marketstore://127.0.0.1:{port}/").ensure(dataset, BARS)
        taken.listen()
        with pytest.raises(StoreError, match="timeout=SECONDS"):
            opened(f"marketstore://127.0.0.1:{port}/?timeout=0.2").ensure(dataset, BARS)

        def answer() -> None:
            connection, _ = taken.accept()
            connection, _ = taken.accept()
            connection.recv(65536)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello")
            connection.close()

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(StoreError, match="does not answer as a MarketStore"):
            opened(f"marketstore://127.0.0.1:{port}/").ensure(dataset, BARS)
        thread.join()


def test_a_server_that_was_killed_is_found_again_by_a_store_that_is_open(tmp_path: Path):
    with private_marketstore(folder=tmp_path) as (url, process):
        store = opened(url)
        store.ensure("made.bars", BARS)
        store.write(batch("made.bars", bars(), 1))
        process.kill()
        process.wait()
        with pytest.raises(StoreError, match="is the server up"):
            store.write(batch("made.bars", bars(first=100), 2))
        with private_marketstore(folder=tmp_path, port=urlsplit(url).port):
            assert store.write(batch("made.bars", bars(), 1)) == Written(already=True)
            assert store.write(batch("made.bars", bars(first=100), 2)) == Written(inserted=96)
            assert store.count("made.bars") == 192


def test_an_error_about_a_bucket_is_not_taken_for_its_absence(marketstore, dataset, monkeypatch):
    store = opened(marketstore)
    store.ensure(dataset, TICKS)
    store.write(of(dataset, 1))
    answers = Client._answers

    def ill(self, method, requests, *, again=False):
        if method == "GetInfo":
            return [{"DSV": None, "ServerResp": {"error": "server is not queryable"}} for _ in requests]
        return answers(self, method, requests, again=again)

    monkeypatch.setattr(Client, "_answers", ill)
    with pytest.raises(StoreError, match="not queryable"):
        store.write(batch(dataset, ticks(1), 2, schema=TICKS))
    monkeypatch.undo()
    assert_frame_equal(all_ticks(store, dataset), expected_ticks(1))


# time zones


def test_two_servers_in_different_time_zones_hold_the_same_minutes():
    found = []
    for timezone in ("UTC", "America/New_York"):
        with private_marketstore(timezone) as (url, _):
            store = opened(url)
            store.ensure("made.bars", BARS)
            turn = datetime(2023, 12, 31, 20, tzinfo=UTC) - START
            frame = bars(rows=24).with_columns(pl.col("ts") + turn - timedelta(minutes=30))
            store.write(batch("made.bars", frame))
            assert store.write(batch("made.bars", frame, 2)) == Written(unchanged=48)
            found.append(store.scan("made.bars").collect().sort(BARS.key))
            assert_frame_equal(found[-1], frame.select(BARS.names).sort(BARS.key))
    assert_frame_equal(*found)


@pytest.mark.parametrize(
    ("timezone", "schema", "options"),
    [
        ("America/New_York", DAILY, ""),
        ("America/New_York", TICKS, ""),
        ("America/New_York", BARS, "?timeframe=2H"),
        ("Asia/Kolkata", BARS, ""),
    ],
)
def test_buckets_that_begin_at_other_instants_there_are_refused(timezone: str, schema: Schema, options: str):
    with private_marketstore(timezone) as (url, _):
        with pytest.raises(CapabilityError, match=re.escape(repr(timezone)) + ".*timezone: UTC"):
            opened(url + options).ensure("made.bars", schema)
        assert client(url).listed() == []


# questions


def test_no_question_is_without_a_range_and_none_is_about_years_without_rows(marketstore, dataset, monkeypatch):
    store = opened(marketstore)
    store.ensure(dataset, TICKS)
    store.write(of(dataset, 1))
    far = ticks(2).with_columns((pl.col("at") - pl.duration(days=3000)).cast(pl.Datetime("ns", "UTC")))
    store.write(batch(dataset, far, 2, schema=TICKS))
    asked: list[Range] = []
    query = Client.query
    monkeypatch.setattr(Client, "query", lambda self, ranges: asked.extend(ranges) or query(self, ranges))
    assert store.count(dataset) == 1200
    assert store.watermarks(dataset)["AAPL"] == ticks(1).filter(pl.col("symbol") == "AAPL")["at"].max()
    data = [each for each in asked if each.key.startswith(("AAPL/", "MSFT/")) and not each.last]
    assert data
    assert max(each.end - each.start for each in data) < 86_400
    assert len(data) <= 8


def test_more_rows_than_one_request_takes_arrive_in_several(marketstore, dataset, monkeypatch):
    monkeypatch.setattr(storage.marketstore, "_ROWS_AT_ONCE", 100)
    monkeypatch.setattr(storage.marketstore, "_KEYS_AT_ONCE", 3)
    store = opened(marketstore)
    sizes = []
    write = Client.write

    def counted(self, rows, *, variable):
        sizes.append(sum(len(columns["Epoch"]) for columns in rows.values()))
        write(self, rows, variable=variable)

    monkeypatch.setattr(Client, "write", counted)
    for schema, frame, most in (
        (BARS, bars(tuple("ABCDEFG"), rows=150), 6000),
        (TICKS, ticks(1, symbols=tuple("ABCDEFG")), 60),
    ):
        monkeypatch.setattr(storage.marketstore, "_READ_ROWS", most)
        name = f"{dataset}-{len(schema.columns)}"
        store.ensure(name, schema)
        store.write(batch(name, frame.sample(fraction=1.0, shuffle=True, seed=1), schema=schema))
        found = store.scan(name, Filter(system=True)).collect().sort(schema.key)
        assert_frame_equal(found, frame.sort(schema.key))
        since, until = frame[schema.time].sort()[40], frame[schema.time].sort()[frame.height // 2]
        inside = frame.filter(pl.col(schema.time).is_between(since, until, closed="left"))
        assert store.count(name, Filter(since=since, until=until)) == inside.height
        odd = since + timedelta(seconds=7)
        assert store.count(name, Filter(since=odd)) == frame.filter(pl.col(schema.time) >= odd).height
    assert max(sizes) <= 100


def test_wide_rows_come_back_over_the_official_types(marketstore, dataset):
    """Each type of ours is one that the server has; none is coerced on the way."""
    store = opened(marketstore)
    store.ensure(dataset, WIDE)
    frame = hostile(store.capabilities)
    store.write(batch(dataset, frame, schema=WIDE))
    (bucket,) = client(marketstore).buckets(
        [next(key for key in keys(marketstore, urlsplit(marketstore).path.strip("/")) if "/1D/" in key)]
    )
    assert bucket is not None
    assert set(bucket.types.values()) == {"i8", "i4", "u8", "f4", "f8", "U16"}


# its URL


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("marketstore://", "names no host"),
        ("marketstore://host/?timeframe=4H", "4H.*read back"),
        ("marketstore://host/?timeframe=1W", "1W"),
        ("marketstore://host/?timeframe=7Min", "7Min"),
        ("marketstore://host/?rewrite=yes", "rewrite"),
        ("marketstore://host/?timeout=soon", "soon"),
        ("marketstore://host/?timeout=0", "timeout=60"),
        ("marketstore://host/?retries=1", "'retries' is no option"),
        ("marketstore://host/a,b", "a,b"),
        ("marketstore://host:99999/", "Port"),
    ],
)
def test_a_url_that_cannot_be_is_told_what_is_wrong(url: str, says: str):
    with pytest.raises(ConfigurationError, match=says):
        open_store(url)


def test_a_url_names_host_port_name_and_encryption():
    plain = opened("marketstore://me:pa55@host/desk?timeout=5")
    assert plain.url == "marketstore://host:5993/desk"
    assert (plain._client.endpoint, plain._client.timeout_seconds) == ("http://host:5993/rpc", 5.0)
    assert "pa55" not in repr(plain._client)
    for url in ("marketstores://host:1/", "marketstore://host:1/?secure=true"):
        assert opened(url)._client.endpoint == "https://host:1/rpc"


def test_bars_of_a_killed_writer_are_those_that_a_dictionary_would_have(marketstore, dataset):
    """What the kill tests of the conformance suite ask of bars, once more over a server that lost a request."""
    store = opened(marketstore)
    store.ensure(dataset, BARS)
    write, calls = Client.write, []

    def lost(self, rows, *, variable):
        write(self, rows, variable=variable)
        calls.append(rows)
        if len(calls) % 4 == 0:
            raise Refused("the answer was lost")

    Client.write = lost
    try:
        from writer_process import frame_of, mode_of

        for seq in range(1, 8):
            for _ in range(10):
                try:
                    store.write(batch(dataset, frame_of("lane", seq), seq, lane="lane", mode=mode_of(seq)))
                    break
                except StoreError:
                    continue
    finally:
        Client.write = write
    assert len(calls) > 20
    assert_frame_equal(store.scan(dataset).collect().sort(BARS.key), expected("lane", 7).sort(BARS.key))
