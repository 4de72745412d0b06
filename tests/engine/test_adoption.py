"""A table that the user made by hand becomes the plan's: the next sync asks only for what is missing in it."""

from __future__ import annotations

import json
from datetime import date

import polars as pl
import pytest

SYMBOLS = ["AAPL", "FB", "IBM", "MSFT"]
PLAN = {"datasets": ["alpaca.daily_bars"], "universe": SYMBOLS, "since": "2012-01-01", "until": "2013-02-28"}
FIRST, LAST = date(2012, 1, 1), date(2013, 2, 28)


def by_hand(here, first: date = FIRST, last: date = LAST) -> pl.DataFrame:
    """What the user has of AAPL, IBM and MSFT: other names, order and types, a column of their own, a hole in IBM."""
    rows = here.source(["AAPL", "IBM", "MSFT"], first, last)
    rows = rows.filter(~((pl.col("symbol") == "IBM") & pl.from_epoch("ts", "us").dt.date().is_between(date(2012, 6, 4), date(2012, 6, 8))))
    return rows.select(
        pl.lit("checked").alias("note"),
        pl.col("volume").cast(pl.Int32).alias("Volume"),
        "close",
        pl.col("high", "low", "open"),
        pl.from_epoch("ts", "us").dt.replace_time_zone("UTC").dt.convert_time_zone("America/New_York").alias("ts"),
        pl.col("symbol").cast(pl.Categorical),
        "vwap",
        "trades",
    )


def test_files_made_by_hand_are_taken_over_and_only_what_is_missing_is_asked(place):
    here = place()
    here.write(PLAN, stores={"default": "parquet://./data"})
    folder = here.folder / "data" / "alpaca" / "daily_bars"
    folder.mkdir(parents=True)
    by_hand(here, last=date(2012, 12, 31)).write_parquet(folder / "mine.parquet")

    run = here.sync()
    assert run.code == 2
    assert "`marketsync adopt alpaca.daily_bars` takes it over" in run.stderr
    assert here.requests == 0
    done = here.run("adopt", "alpaca.daily_bars")
    print(done.stdout, done.stderr)
    assert done.returncode == 2
    done = here.run("adopt", "alpaca.daily_bars", "--rename", "Volume=volume", "--dry-run")
    print(done.stdout, done.stderr)
    done = here.run("adopt", "p", "--rename", "Volume=volume")
    print(done.stdout, done.stderr)
    assert done.returncode == 0
    again = here.run("adopt", "p")
    print(again.stdout, again.stderr)
    run = here.sync()
    for one in here.log: print(one["request"]["params"])
    assert run.code == 0, run.words
    assert here.bars().equals(here.source(SYMBOLS, FIRST, LAST))
    assert 0
