"""Generated bars, rows handed in, and what is published when."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta

import polars as pl
import pytest

from providers.replica.exchange import Published, published
from providers.replica.market import DAILY, MINUTE, FrameMarket, generated, open_market


def frame(market, timeframe):
    parts = []
    for symbol in market.symbols:
        series = market.series(symbol, timeframe)
        parts.append(series.frame(0, len(series)))
    return pl.concat(parts)


@pytest.mark.parametrize(
    ("spec", "symbols", "grain"),
    [
        ("generated:2000", 20, DAILY),
        ("generated:1003x10", 10, DAILY),
        ("generated:30_007x3", 3, MINUTE),
        ("generated:500x5:1Min", 5, MINUTE),
        ("generated:90x3:1Day:2020-02-03", 3, DAILY),
    ],
)
def test_generated_rows_are_as_many_as_asked_and_obey_ohlc(spec, symbols, grain):
    market = generated(spec)
    rows = frame(market, grain)
    assert rows.height == int(spec.split(":")[1].split("x")[0])
    assert (len(market.symbols), market.grain) == (symbols, grain)
    assert list(market.symbols) == sorted(set(market.symbols))
    assert rows.select("symbol", "ts").is_unique().all()
    low, high = pl.min_horizontal("open", "close"), pl.max_horizontal("open", "close")
    assert rows.filter((pl.col("low") > low) | (pl.col("high") < high) | (pl.col("low") <= 0)).height == 0
    assert rows.filter(pl.col("volume") <= 0).height == 0
    assert rows.select((pl.col("close") / pl.col("pre_close") - 1).abs().max() < 0.1).item()


def test_a_generated_bar_is_the_same_wherever_it_is_asked_from_and_prices_are_whole_cents():
    series = generated("generated:5000x5").series("GAAAC", DAILY)
    whole = series.frame(0, len(series))
    assert generated("generated:5000x5").series("GAAAC", DAILY).frame(321, 400).equals(whole.slice(321, 79))
    for column in ("open", "high", "low", "close"):
        assert all(price == round(price, 2) for price in whole[column])
    assert whole["close"].shift(1).to_list() == whole["pre_close"].to_list()


def test_generated_days_are_sessions_of_new_york_and_minutes_lie_within_them():
    days = frame(generated("generated:300x1"), DAILY)["date"].to_list()
    assert days[0] == date(2000, 1, 3)
    assert date(2000, 1, 17) not in days  # Martin Luther King
    assert date(2000, 12, 25) not in days
    minutes = frame(generated("generated:120000x1:1Min"), MINUTE)
    sizes = dict(minutes.group_by("date", maintain_order=True).len().rows())
    assert sizes[date(2020, 11, 25)] == 390
    assert sizes[date(2020, 11, 27)] == 210  # the day after Thanksgiving closes at 13:00
    there = minutes.select(pl.from_epoch("ts", time_unit="us").dt.replace_time_zone("UTC"))
    clock = there.select(pl.col("ts").dt.convert_time_zone("America/New_York").dt.time())["ts"]
    assert (str(clock.min()), str(clock.max())) == ("09:30:00", "15:59:00")


@pytest.mark.parametrize("spec", ["generated:1003x10", "generated:2500x2:1Min"])
def test_positions_find_the_bar_at_or_after_an_instant(spec):
    market = generated(spec)
    for timeframe in {market.grain, DAILY}:
        series = market.series(market.symbols[0], timeframe)
        starts = series.frame(0, len(series))["ts"].to_list()
        for n in (0, 1, len(starts) // 2, len(starts) - 1):
            assert series.position(starts[n]) == n
            assert series.position(starts[n], after=True) == n + 1
            assert series.position(starts[n] - 1) == n
            assert series.position(starts[n] + 1) == n + 1
        assert series.position(-1) == 0
        assert series.position(2**62) == len(starts)


def test_size_does_not_cost_memory():
    market = generated("generated:400000000x4000:1Min")
    series = market.series(market.symbols[3999], MINUTE)
    assert len(series) == 100_000
    assert series.frame(99_990, 100_000).height == 10


@pytest.mark.parametrize(
    "data",
    ["nonsense", "generated:", "generated:0", "generated:5x10", "generated:1000000x1:1Day", "generated:5x1:1Week"],
)
def test_data_that_cannot_be_is_refused_with_a_reason(data):
    with pytest.raises(ValueError, match=r"replica|bars a symbol"):
        open_market(data)


ROWS = pl.DataFrame(
    {
        "symbol": ["B", "A", "A", "A"],
        "date": [date(2024, 1, 2), date(2024, 1, 3), date(2024, 1, 2), date(2024, 1, 3)],
        "open": [1.0, 2.0, 3.0, 4.0],
        "high": [9.0] * 4,
        "low": [0.5] * 4,
        "close": [2.0, 3.0, 4.0, 5.0],
        "volume": [10, 20, 30, 40],
    }
)


def test_rows_handed_in_are_sorted_and_the_last_of_equal_keys_counts():
    market = FrameMarket(ROWS)
    assert market.symbols == ["A", "B"]
    assert frame(market, DAILY).select("symbol", "open").rows() == [("A", 3.0), ("A", 4.0), ("B", 1.0)]


def test_rows_are_restated_added_and_taken_away():
    market = FrameMarket(ROWS).with_rows(
        pl.DataFrame(
            {
                **dict.fromkeys(("open", "high", "low", "close"), 7.0),
                "symbol": "A",
                "date": date(2024, 1, 2),
                "volume": 1,
            }
        )
    )
    assert frame(market, DAILY)["open"].to_list() == [7.0, 4.0, 1.0]
    assert frame(market, DAILY)["adj_close"].to_list() == [7.0, 5.0, 2.0]
    assert frame(market.without(pl.col("symbol") == "A"), DAILY)["open"].to_list() == [1.0]


def test_rows_with_a_column_missing_or_naive_times_are_refused():
    with pytest.raises(ValueError, match="volume"):
        FrameMarket(ROWS.drop("volume"))
    naive = ROWS.rename({"date": "ts"}).with_columns(pl.col("ts").cast(pl.Datetime("us")))
    with pytest.raises(ValueError, match="time zone"):
        FrameMarket(naive)


def seen(until, now=0.0) -> Published:
    return published(FrameMarket(ROWS), until, now)


def test_until_an_instant_publishes_days_after_the_close_and_minutes_when_over():
    before = datetime(2024, 1, 3, 21, 29, tzinfo=UTC)  # 16:29 in New York
    assert seen(before).last_date == date(2024, 1, 2)
    assert seen(before + timedelta(minutes=1)).last_date == date(2024, 1, 3)
    assert seen(before).last_ts == (before - timedelta(minutes=1)).timestamp() * 1_000_000
    assert seen("clock", before.timestamp()).last_date == date(2024, 1, 2)
    assert seen(date(2024, 1, 2)).last_date == date(2024, 1, 2)
