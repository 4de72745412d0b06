"""A plan that publishes to a log beside a store with tables: what is judged, filled, looked up and followed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
from polars.testing import assert_frame_equal
from synced_place import Place

from marketsync import copy, explain, follow, open_store, query, status, stores
from marketsync.configuration import shipped_definitions
from marketsync.errors import CapabilityError, ConfigurationError

ROOT = Path(__file__).parents[2]
PLAN = {
    "datasets": ["alpaca.daily_bars"],
    "universe": ["AAPL", "IBM"],
    "since": "2012-01-03",
    "until": "2012-03-30",
}
BARS = "alpaca.daily_bars"


@pytest.fixture(params=["nats", pytest.param("redis", marks=pytest.mark.slow)])
def log(request: pytest.FixtureRequest) -> str:
    return request.getfixturevalue(request.param)


def said(place: Place, *arguments: str, code: int = 0) -> str:
    ended = place.typed(*arguments)
    assert ended.returncode == code, ended.stdout + ended.stderr
    return ended.stdout or ended.stderr


def table(place: Place) -> pl.DataFrame:
    return open_store(f"delta://{place.folder}/data").scan(BARS).collect().sort("symbol", "ts")


def example(url: str, file: Path) -> str:
    command = [sys.executable, str(ROOT / "examples" / "follow_to_parquet.py"), url, BARS, str(file), "0"]
    ended = subprocess.run(
        command, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_a_plan_is_judged_by_its_table_and_followed_by_its_log(place, log: str):
    here: Place = place()
    here.write({**PLAN, "stores": ["queue", "default"]}, stores={"queue": log, "default": "delta://./data"})
    report = json.loads(said(here, "sync", "--json"))
    queue, default = report["datasets"]
    assert report["rows"]["inserted"] == 124
    assert (queue["log"], queue["size"], queue["judgement"]) == (True, None, None)
    assert default["judgement"]["full"]
    assert default["size"]["rows"] == 124
    stands = {part.store: part for part in status("p", here.config).datasets}
    assert (stands["queue"].rows, stands["default"].rows, stands["queue"].problem) == (None, 124, "")
    assert stands["queue"].covered_until == stands["default"].covered_until
    told = explain(BARS, "IBM", "2012-02-01", here.config)
    assert "queue is a log of batches, in which no row can be looked up." in told.lines
    assert list(told.rows) == ["default"]
    assert query(f"SELECT count(*) AS n FROM {BARS}", here.config).item() == 124
    with pytest.raises(CapabilityError, match="marketsync follow queue"):
        query("SELECT 1", here.config, store="queue")
    with open_store(log) as reader, pytest.raises(CapabilityError, match="marketsync follow"):
        reader.scan(BARS)

    (seen,) = (each for each in stores(here.config) if each.name == "queue")
    assert [(each.dataset, each.messages, each.known) for each in seen.tables] == [(BARS, 1, True)]
    with pytest.raises(ConfigurationError, match="is a log of batches, which is neither read nor compared"):
        copy("queue", "default", config=here.config)

    lines = said(here, "follow", "queue", BARS, "--group", "pipe", "--idle", "0").splitlines()
    assert len(lines) == 124
    first = json.loads(lines[0])
    assert (first["_mode"], first["symbol"], first["ts"]) == ("append", "AAPL", "2012-01-03T05:00:00+00:00")
    assert said(here, "follow", log, BARS, "--group", "pipe", "--idle", "0", "--format", "table") == ""

    file = here.folder / "bars.parquet"
    assert "append of 124 rows; 124 in" in example(log, file)
    said(here, "sync", "--refetch", "--since", "2012-03-01")
    assert "upsert of 44 rows; 124 in" in example(log, file)
    assert_frame_equal(pl.read_parquet(file), table(here))


@pytest.mark.slow
def test_a_log_that_is_added_later_is_filled_from_the_table_without_a_request(place, log: str):
    here: Place = place()
    stores = {"default": "delta://./data", "queue": log}
    here.write({**PLAN, "stores": ["default"]}, stores=stores)
    said(here, "sync")
    here.write({**PLAN, "stores": ["default", "queue"]}, stores=stores)
    report = json.loads(said(here, "sync", "--json"))
    assert report["requests"]["sent"] == 0
    with follow(log, BARS, idle_seconds=0) as batches:
        (copied,) = batches
    assert copied.mode == "upsert"
    assert_frame_equal(copied.frame, table(here))


def test_a_plan_of_a_log_alone_is_refused_with_the_remedy(place, log: str):
    here: Place = place()
    here.write({**PLAN, "stores": ["queue"]}, stores={"queue": log, "bars": "delta://./data"})
    told = said(here, "sync", code=2)
    assert "plans.p.stores: nothing of the plan could be read: queue is a log" in told
    assert "stores: [bars, queue]" in told
    here.write({**PLAN, "stores": ["queue"]}, stores={"queue": log})
    assert "add one with tables to this file's stores" in said(here, "sync", code=2)


@pytest.mark.slow
def test_a_log_that_is_asked_as_a_table_is_a_wrong_command(place, log: str):
    here: Place = place()
    here.write({**PLAN, "stores": ["default", "queue"]}, stores={"default": "delta://./data", "queue": log})
    said(here, "sync")
    for asked in (["query", "SELECT 1", "--store", "queue"], ["export", BARS, "bars.csv", "--store", "queue"]):
        assert "is followed (`marketsync follow queue DATASET`" in said(here, *asked, code=2)


def test_rows_that_were_set_aside_are_told_once_where_a_calendar_misses_them(place, log: str):
    here: Place = place()
    shipped = shipped_definitions()["alpaca"].read_text(encoding="utf-8")
    damaged = shipped.replace("n: {as: trades, type: i64,", "n: {as: trades, type: bool,")
    stores = {"queue": log, "default": "delta://./data"}
    here.write({**PLAN, "stores": list(stores)}, stores=stores, definition=damaged)
    first, again = here.sync_here(), here.sync_here()
    assert "124 rows were set aside" in first.words
    assert (again.code, "set aside" in again.words) == (3, False), again.words
    (default,) = [one for one in again.report["datasets"] if one["store"] == "default"]
    assert "set aside" in default["judgement"]["holes"][0]["reason"]
