"""What becomes of rows that one store of a plan cannot keep: they hold up nothing, and nothing is silent about them."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import datetime

import polars as pl
from polars.testing import assert_frame_equal
from synced_place import Place

import storage.delta
from marketsync import explain, status
from marketsync.configuration import shipped_definitions
from tasks.workspace import Options

BARS = "alpaca.minute_bars"
PLAN = {"datasets": [BARS], "universe": ["GAAAA"], "since": "2012-03-01", "until": "2012-03-04"}
MARKET = "generated:1000x1:1Min:2012-03-01"


def rows(here: Place, store: str) -> pl.DataFrame:
    return here.stored_here(BARS, store).sort("symbol", "ts")


def full_hours(bars: pl.DataFrame) -> pl.DataFrame:
    return bars.filter(pl.col("ts").dt.minute() == 0)


def set_aside(here: Place, store: str) -> pl.DataFrame:
    folder = here.folder / ".marketsync" / "quarantine" / BARS / store
    return pl.concat([pl.read_ndjson(file) for file in folder.glob("*.jsonl")])


def test_what_a_store_cannot_keep_is_set_aside_for_it_and_the_rest_delivered_everywhere(place, marketstore):
    here: Place = place(data=MARKET)
    stores = {"files": "parquet://./files", "hourly": marketstore + "?timeframe=1H"}
    here.write({**PLAN, "stores": list(stores)}, stores=stores)
    run = here.sync_here()
    assert (run.code, run.state) == (3, "completed_with_findings"), run.words
    bars = rows(here, "files")
    kept = full_hours(bars)
    assert 0 < kept.height < bars.height
    assert_frame_equal(rows(here, "hourly"), kept)
    aside = set_aside(here, "hourly")
    assert aside.height == bars.height - kept.height
    assert {json.loads(raw)["symbol"] for raw in aside["raw"]} == {"GAAAA"}
    assert "not at the beginning of a bucket of 1H" in aside["reason"][0]
    assert f"{aside.height:,} rows were set aside for store hourly alone" in run.words
    counts = {part["store"]: part["rows"] for part in run.report["datasets"]}
    assert (counts["hourly"]["inserted"], counts["hourly"]["quarantined"]) == (kept.height, aside.height)
    assert (counts["files"]["inserted"], counts["files"]["quarantined"]) == (bars.height, 0)
    assert here.spooled() == []
    told = explain(BARS, "GAAAA", "2012-03-01", here.config)
    assert "what hourly alone cannot keep was set aside, in" in "\n".join(told.lines)
    again = here.sync_here()
    assert again.sent == 0


def test_the_newest_time_of_a_table_that_is_too_large_to_read_is_that_of_what_the_run_touched(place, monkeypatch):
    here: Place = place(data=MARKET)
    here.write(PLAN)
    info = storage.delta.DeltaStore.info
    monkeypatch.setattr(storage.delta.DeltaStore, "info", lambda *asked: replace(info(*asked), rows=10**10))
    run = here.sync_here()
    newest = here.stored_here(BARS)["ts"].max()
    assert isinstance(newest, datetime)
    assert [mark["newest"] for mark in run.report["datasets"][0]["watermarks"]] == [newest.isoformat()]


def test_a_store_added_later_is_filled_with_all_that_it_can_keep(place, marketstore):
    here: Place = place(data=MARKET)
    stores = {"files": "parquet://./files", "hourly": marketstore + "?timeframe=1H"}
    here.write({**PLAN, "stores": ["files"]}, stores=stores)
    assert here.sync_here().code == 0
    here.write({**PLAN, "stores": list(stores)}, stores=stores)
    run = here.sync_here()
    assert (run.code, run.sent) == (3, 0), run.words
    assert_frame_equal(rows(here, "hourly"), full_hours(rows(here, "files")))
    assert set_aside(here, "hourly").height == rows(here, "files").height - rows(here, "hourly").height


def test_where_no_row_is_expected_what_was_set_aside_is_told_until_it_is_asked_for_again_or_deleted(place, marketstore):
    here: Place = place(data=MARKET)
    stores = {"files": "parquet://./files", "hourly": marketstore + "?timeframe=1H"}
    shipped = shipped_definitions()["alpaca"].read_text(encoding="utf-8")
    expecting = shipped[shipped.index("    frequency: minute\n") : shipped.index("\n  trades:")]
    irregular = shipped.replace(expecting, "    frequency: irregular\n")
    here.write({**PLAN, "stores": list(stores)}, stores=stores, definition=irregular)
    assert here.sync_here().code == 3
    count = set_aside(here, "hourly").height
    told = f"{count:,} rows were set aside for store hourly alone by earlier runs and not asked for again since"
    for _ in range(2):
        again = here.sync_here()
        assert (again.code, again.sent) == (3, 0), again.words
        assert told in again.words
        assert "not at the beginning of a bucket of 1H" in again.words
    assert [(part.store, part.set_aside) for part in status("p", here.config).datasets] == [
        ("files", 0),
        ("hourly", count),
    ]
    refetched = here.sync_here(Options(refetch=True))
    assert refetched.code == 3
    assert f"{count:,} rows were set aside for store hourly alone, which cannot keep them" in refetched.words
    assert set_aside(here, "hourly").height == 2 * count
    assert told in here.sync_here().words, "only the newest of both answers stands"
    for file in (here.folder / ".marketsync" / "quarantine" / BARS / "hourly").glob("*.jsonl"):
        file.unlink()
    done = here.sync_here()
    assert (done.code, done.state) == (0, "completed"), done.words
