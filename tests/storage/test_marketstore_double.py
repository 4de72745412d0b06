"""The tests' MarketStore, asked by the engine's own client: it answers like one, and has its traps. Against a server of
yours (MARKETSYNC_TEST_MARKETSTORE) the same tests say whether that one has them."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from marketstore_buckets import client as raw
from marketstore_double import private_marketstore

pymarketstore = pytest.importorskip("pymarketstore", reason="pymarketstore is not installed: make env-test installs it")

T0 = 1_704_205_800  # 2024-01-02T14:30:00Z
OHLC = [("Epoch", "i8"), ("Open", "f4"), ("High", "f4")]
TICK = [("Epoch", "i8"), ("Price", "f8"), ("Nanoseconds", "i4")]


def client(url: str):
    return pymarketstore.Client(f"http://{urlsplit(url).netloc}/rpc")


def call(url: str, method: str, **params):
    from pymarketstore.jsonrpc import MsgpackRpcClient

    return MsgpackRpcClient(f"http://{urlsplit(url).netloc}/rpc").call(f"DataService.{method}", **params)


def group(url: str) -> str:
    return urlsplit(url).path.strip("/")


def written(url: str, key: str, rows: list, dtype=None, *, ticks: bool = False):
    return client(url).write(np.array(rows, dtype or (TICK if ticks else OHLC)), key, isvariablelength=ticks)


def read(url: str, symbol: str, timeframe: str, **wanted):
    parameters = pymarketstore.Params(symbol, timeframe, group(url), **wanted)
    return client(url).query(parameters)


def rows(url: str, symbol: str, timeframe: str, **wanted) -> list[tuple]:
    return read(url, symbol, timeframe, **wanted).first().array.tolist()


def test_what_the_official_client_writes_it_reads_lists_and_destroys(marketstore):
    key = f"AAPL/1Min/{group(marketstore)}"
    said = written(marketstore, key, [(T0, 1, 3), (T0 + 60, 2, 4)])
    assert said == {"responses": None}
    assert rows(marketstore, "AAPL", "1Min") == [(T0, 1, 3), (T0 + 60, 2, 4)]
    frame = read(marketstore, "AAPL", "1Min").first().df()
    assert str(frame.index[0]) == "2024-01-02 14:30:00+00:00"
    assert "AAPL" in client(marketstore).list_symbols()
    from pymarketstore.params import ListSymbolsFormat

    assert key in client(marketstore).list_symbols(ListSymbolsFormat.TBK)
    assert client(marketstore).server_version()
    assert client(marketstore).destroy(key)["responses"][0]["error"] == ""
    with pytest.raises(Exception, match="no files returned from query parse"):
        read(marketstore, "AAPL", "1Min")
    assert "removal of catalog entry failed" in client(marketstore).destroy(key)["responses"][0]["error"]


def test_bars_of_one_bucket_are_one_and_an_unaligned_time_is_floored(marketstore):
    key = f"A/1Min/{group(marketstore)}"
    written(marketstore, key, [(T0, 1, 1), (T0, 2, 2), (T0 + 150, 3, 3)])
    written(marketstore, key, [(T0 + 125, 4, 4)])
    assert rows(marketstore, "A", "1Min") == [(T0, 2, 2), (T0 + 120, 4, 4)]


def test_columns_are_checked_by_name_and_stored_by_position(marketstore):
    key = f"A/1Min/{group(marketstore)}"
    written(marketstore, key, [(T0, 1, 2)])
    said = written(marketstore, key, [(T0 + 60, 2, 1)], [("Epoch", "i8"), ("High", "f4"), ("Open", "f4")])
    assert said == {"responses": None}
    assert rows(marketstore, "A", "1Min")[1] == (T0 + 60, 2, 1)  # Open, High: swapped, and nobody said so
    said = written(marketstore, key, [(T0, 1, 2)], [("Epoch", "i8"), ("Open", "f4"), ("Low", "f4")])
    assert "unable to match data columns" in said["responses"][0]["error"]


def test_numbers_take_the_type_of_the_bucket_without_a_word(marketstore):
    key = f"A/1Min/{group(marketstore)}"
    written(marketstore, key, [(T0, 1, 2)])
    written(marketstore, key, [(T0, 0.1, 2)], [("Epoch", "i8"), ("Open", "f8"), ("High", "f8")])
    assert rows(marketstore, "A", "1Min") == [(T0, float(np.float32(0.1)), 2)]


def test_ticks_that_come_again_are_there_twice_and_late_ones_at_their_place(marketstore):
    key = f"A/1Sec/{group(marketstore)}"
    for _ in range(2):
        written(marketstore, key, [(T0 + 5, 1.5, 7), (T0 + 5, 2.5, 7)], ticks=True)
    written(marketstore, key, [(T0 + 5, 9.5, 3), (T0 + 4, 8.5, 0)], ticks=True)
    assert rows(marketstore, "A", "1Sec") == [
        (T0 + 4, 8.5, 0),
        (T0 + 5, 9.5, 3),
        *[(T0 + 5, 1.5, 7), (T0 + 5, 2.5, 7)] * 2,
    ]


def test_ticks_keep_32_bits_of_their_bucket(marketstore):
    for timeframe in ("1Sec", "1Min"):
        times = [(T0 + 3, 0.0, 0), (T0 + 3, 1.0, 123_456_789), (T0 + 3, 2.0, 999_999_999)]
        written(marketstore, f"A/{timeframe}/{group(marketstore)}", times, ticks=True)
    assert [(at - T0, nanos) for at, _, nanos in rows(marketstore, "A", "1Sec")] == [
        (3, 0),
        (3, 123_456_789),
        (4, 999_999_999),  # a second later than it was sent
    ]
    at, _, nanos = rows(marketstore, "A", "1Min")[0]
    assert (at - T0, nanos) == (2, 999_999_989)


def test_a_daily_bar_of_the_first_of_january_and_rows_before_1970_are_lost(marketstore):
    key = f"A/1D/{group(marketstore)}"
    first = 1_704_067_200  # 2024-01-01
    assert written(marketstore, key, [(first, 1, 1), (first + 86400, 2, 2)]) == {"responses": None}
    written(marketstore, f"A/1Min/{group(marketstore)}", [(-60, 1, 1), (0, 2, 2), (60, 3, 3)])
    assert [at for at, *_ in rows(marketstore, "A", "1D")] == [first + 86400]
    assert [at for at, *_ in rows(marketstore, "A", "1Min")] == [60]


@pytest.mark.parametrize("timeframe", ["4H", "1W", "7Min"])
def test_some_timeframes_are_written_and_never_read(marketstore, timeframe):
    assert written(marketstore, f"A/{timeframe}/{group(marketstore)}", [(T0, 1, 1)]) == {"responses": None}
    with pytest.raises(Exception, match="no files returned"):
        read(marketstore, "A", timeframe)


def test_ranges_include_both_ends_and_the_bar_around_their_start(marketstore):
    written(marketstore, f"A/1Min/{group(marketstore)}", [(T0 + 60 * n, n, n) for n in range(5)])

    def times(**wanted):
        return [(at - T0) // 60 for at, *_ in rows(marketstore, "A", "1Min", **wanted)]

    assert times(start=T0 + 60, end=T0 + 180) == [1, 2, 3]
    assert times(start=T0 + 61, end=T0 + 180) == [1, 2, 3]
    assert times(limit=2) == [3, 4]
    assert times(limit=2, limit_from_start=True) == [0, 1]
    assert rows(marketstore, "A", "1Min", start=T0 + 6000, end=T0 + 7000) == []


def test_of_several_symbols_those_that_are_not_there_are_left_out(marketstore):
    for symbol in ("A", "B"):
        written(marketstore, f"{symbol}/1Min/{group(marketstore)}", [(T0, 1, 2)])
    found = read(marketstore, ["A", "absent", "B"], "1Min").all()
    assert sorted(key.partition("/")[0] for key in found) == ["A", "B"]
    written(marketstore, f"C/1Min/{group(marketstore)}", [(T0, 1)], [("Epoch", "i8"), ("Other", "f4")])
    with pytest.raises(Exception, match="same data type"):
        read(marketstore, ["A", "C"], "1Min")


def test_a_type_that_it_does_not_have_is_an_answer_and_no_error(marketstore):
    said = written(marketstore, f"A/1Min/{group(marketstore)}", [(T0, True)], [("Epoch", "i8"), ("Open", "?")])
    assert "unsupported type string b1" in said["responses"][0]["error"]


def test_of_several_buckets_some_are_written_and_nobody_says_which(marketstore):
    name = group(marketstore)
    written(marketstore, f"bad/1Min/{name}", [(T0, 1)], [("Epoch", "i8"), ("Other", "f4")])
    counts = set()
    for round_ in range(20):
        keys = [f"r{round_}-{n}/1Min/{name}" for n in range(4)] + [f"bad/1Min/{name}"]
        dataset = {
            "types": ["i8", "f4", "f4"],
            "names": ["Epoch", "Open", "High"],
            "data": [np.full(5, T0, "<i8").tobytes(), np.ones(5, "<f4").tobytes(), np.ones(5, "<f4").tobytes()],
            "length": 5,
            "startindex": {key: at for at, key in enumerate(keys)},
            "lengths": dict.fromkeys(keys, 1),
        }
        said = call(marketstore, "Write", requests=[{"dataset": dataset}])
        assert len(said["responses"]) == 1
        counts.add(sum(f"r{round_}-{n}/1Min/{name}" in raw(marketstore).listed() for n in range(4)))
    assert len(counts) > 1


def test_a_bucket_that_its_client_creates_for_ticks_is_one_of_bars(marketstore):
    key = f"A/1Sec/{group(marketstore)}"
    client(marketstore).create(key, [("Epoch", "i8"), ("Price", "f8")], isvariablelength=True)
    (bucket,) = raw(marketstore).buckets([key])
    assert bucket is not None
    assert (bucket.variable, bucket.types, bucket.seconds) == (False, {"Epoch": "i8", "Price": "f8"}, 1)


def test_a_method_that_it_does_not_have_is_named(marketstore):
    with pytest.raises(Exception, match="can't find method"):
        call(marketstore, "ServerVersion")


def test_a_double_that_is_killed_has_what_it_acknowledged(tmp_path: Path):
    with private_marketstore(folder=tmp_path) as (url, process):
        written(url, "A/1Min/kept", [(T0, 1, 2)])
        written(url, "A/1Sec/kept", [(T0, 1.5, 3), (T0, 1.5, 3)], ticks=True)
        written(url, "B/1Min/kept", [(T0, 1, 2)])
        client(url).destroy("B/1Min/kept")
        process.kill()
        process.wait()
    with (tmp_path / "journal").open("ab") as journal:
        journal.write(b"\xff\0\0\0\0\0\0\0half a record")
    with private_marketstore(folder=tmp_path) as (url, _):
        found = client(url).query(pymarketstore.Params("A", "1Sec", "kept")).first().array.tolist()
        assert found == [(T0, 1.5, 3)] * 2
        assert raw(url).listed() == ["A/1Min/kept", "A/1Sec/kept"]
        assert re.fullmatch(r"[0-9a-f]+", raw(url).version())
