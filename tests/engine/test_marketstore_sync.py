"""A plan that keeps bars in MarketStore: synced, judged there, asked by SQL; it fills other stores and is filled."""

from __future__ import annotations

from datetime import date

from marketsync import open_store

FIVE = ["AAPL", "FB", "GOOG", "IBM", "MSFT"]
PLAN = {"datasets": ["alpaca.daily_bars"], "since": "2012-01-01", "until": "2013-03-01", "universe": FIVE}


def test_bars_reach_marketstore_are_judged_there_and_fill_the_store_beside_it(place, marketstore):
    here = place()
    source = here.source(FIVE, date(2012, 1, 1), date(2013, 3, 1))
    here.write(PLAN, stores={"default": marketstore})
    run = here.sync_here()
    assert (run.code, run.state) == (0, "completed"), run.words
    judged = run.report["datasets"][0]["judgement"]
    assert judged["holes"] == []
    assert here.bars().equals(source)
    again = here.sync_here()
    assert (again.code, again.sent) == (0, 0)

    sql = "SELECT symbol, count(*) AS bars FROM alpaca.daily_bars GROUP BY symbol ORDER BY symbol"
    counts = source.group_by("symbol").len().sort("symbol").rows()
    assert open_store(here.url("default")).query(sql).rows() == counts

    both = {"default": marketstore, "files": "parquet://./files"}
    here.write({**PLAN, "stores": list(both)}, stores=both)
    filled = here.sync_here()
    assert (filled.code, filled.sent) == (0, 0), filled.words
    assert here.bars("files").equals(source)


def test_a_marketstore_that_is_added_later_is_filled_from_files_without_a_request(place, marketstore):
    here = place()
    here.write(PLAN, stores={"default": "delta://./data"})
    assert here.sync_here().code == 0
    both = {"default": "delta://./data", "beside": marketstore}
    here.write({**PLAN, "stores": list(both)}, stores=both)
    filled = here.sync_here()
    assert (filled.code, filled.sent) == (0, 0), filled.words
    assert here.bars("beside").equals(here.bars())
