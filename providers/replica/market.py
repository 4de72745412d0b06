"""The market behind the replica: which symbols there are, and their bars, as polars frames addressed by position.

Three sources share one shape. `FrameMarket` holds rows in memory (the five stocks packaged with bokeh-sampledata, or
rows a test hands in). `GeneratedMarket` computes any number of bars from their index and holds none. Both answer in
two orders: one symbol through time (`Series`) and all symbols newest first (`newest_first`). Nothing in here knows a
provider, a request or a clock.

Every frame has the columns of `COLUMNS`: symbol, ts (microseconds since 1970 UTC: the bar's start, for a daily bar New
York midnight), date (the session), open, high, low, close (currency units), volume (shares), adj (factor from raw to
adjusted price), adj_close, trades (count), vwap (currency units), pre_close (the close before, null for the first).
"""

from __future__ import annotations

import gzip
import importlib.util
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from functools import cache, cached_property
from pathlib import Path
from typing import Protocol
from zoneinfo import ZoneInfo

import polars as pl

DAILY, MINUTE = "1Day", "1Min"
COLUMNS = [
    "symbol",
    "ts",
    "date",
    "open",
    "high",
    "low",
    "close",
    "volume",
    "adj",
    "adj_close",
    "trades",
    "vwap",
    "pre_close",
]
NEW_YORK = "America/New_York"
MINUTE_US = 60_000_000
END_OF_TIME = 2**62
GENERATED_START = {DAILY: date(2000, 1, 3), MINUTE: date(2020, 1, 2)}
MOST_DAILY_BARS_A_SYMBOL = 12_000


class Series(Protocol):
    """The bars of one symbol in one timeframe, oldest first; positions count from 0."""

    def __len__(self) -> int: ...

    def position(self, ts: int, after: bool = False) -> int:
        """The first position whose bar starts at or after `ts` (microseconds); strictly after it with `after`."""
        ...

    def frame(self, first: int, last: int) -> pl.DataFrame:
        """Bars [first, last) with `COLUMNS`."""
        ...


class Market(Protocol):
    """What the provider fronts read. A market never changes: a restatement is a new market."""

    @property
    def symbols(self) -> Sequence[str]:
        """In alphabetical order."""
        ...

    @property
    def grain(self) -> str:
        """The timeframe of the rows themselves, "1Day" or "1Min"; daily bars are folded from minutes."""
        ...

    def series(self, symbol: str, timeframe: str) -> Series | None:
        """None for a symbol, or a timeframe, that the market does not have."""
        ...

    def newest_first(self, symbols: Sequence[str], first: date, last: date) -> Selection:
        """Daily bars of `symbols` with first <= date <= last, by date descending then symbol."""
        ...

    def first_date(self, symbol: str) -> date: ...

    def span(self) -> tuple[date, date]:
        """First and last session of the whole market."""
        ...


@dataclass(frozen=True)
class Selection:
    """Rows chosen but not yet computed: how many, and a window of them."""

    total: int
    rows: Callable[[int, int], pl.DataFrame]  # (offset, limit)


def open_market(data: str | pl.DataFrame | Market) -> Market:
    """The market named by `data`: "bokeh", "generated:ROWS[xSYMBOLS][:1Day|1Min][:START]", a frame, or a market.

    A frame needs symbol, date (or ts: aware datetimes, the start of the bar), open, high, low, close, volume, and may
    have adj_close, trades, vwap. Raises ValueError for anything else, saying what is accepted.
    """
    if isinstance(data, pl.DataFrame):
        return FrameMarket(data)
    if not isinstance(data, str):
        return data
    if data == "bokeh":
        return bokeh()
    if data.startswith("generated:"):
        return generated(data)
    raise ValueError(
        f"replica data {data!r} is unknown: give 'bokeh', 'generated:ROWS[xSYMBOLS][:1Day|1Min][:YYYY-MM-DD]', "
        "or, in Python, a polars frame"
    )


@cache
def bokeh() -> FrameMarket:
    """AAPL, FB, GOOG, IBM and MSFT, daily, 2000-03-01 to 2013-03-01 (12,154 bars), read from the packaged file."""
    found = importlib.util.find_spec("bokeh_sampledata")
    if found is None or not found.submodule_search_locations:
        raise ValueError("data 'bokeh' needs the package bokeh-sampledata: install it, or use 'generated:ROWS'")
    packed = Path(next(iter(found.submodule_search_locations))) / "_data" / "stocks.csv.gz"
    with gzip.open(packed) as file:
        frame = pl.read_csv(file.read(), try_parse_dates=True)
    names = {"Ticker": "symbol", "Adj Close": "adj_close"}
    return FrameMarket(frame.rename({c: names.get(c, c.lower()) for c in frame.columns}))


# --------------------------------------------------------------------------------------------- rows held in memory


class FrameMarket:
    """Bars held in a frame, sorted by symbol and time, the last of equal keys kept."""

    def __init__(self, rows: pl.DataFrame) -> None:
        """`rows`: see `open_market`. Raises ValueError when a column is missing."""
        self.grain = MINUTE if "ts" in rows.columns else DAILY
        self._bars = _complete(rows, self.grain)
        self.rows = rows
        self.symbols: list[str] = self._bars.get_column("symbol").unique().sort().to_list()

    def with_rows(self, rows: pl.DataFrame) -> FrameMarket:
        """A market where `rows` replace the rows of equal symbol and time, or are new."""
        key = ["symbol", "ts" if self.grain == MINUTE else "date"]
        if missing := [c for c in key if c not in rows.columns]:
            raise ValueError(f"rows to put into a {self.grain} market need {key}; missing: {missing}")
        kept = self.rows.join(rows.select(key), on=key, how="anti")
        return FrameMarket(pl.concat([kept, rows], how="diagonal_relaxed"))

    def without(self, condition: pl.Expr) -> FrameMarket:
        """A market without the rows for which `condition` (over the columns handed in) is true."""
        return FrameMarket(self.rows.filter(~condition.fill_null(False)))

    @cached_property
    def _daily(self) -> pl.DataFrame:
        return self._bars if self.grain == DAILY else daily_of(self._bars)

    @cached_property
    def _newest_first(self) -> pl.DataFrame:
        return self._daily.sort(["date", "symbol"], descending=[True, False])

    @cached_property
    def _series(self) -> dict[tuple[str, str], FrameSeries]:
        found: dict[tuple[str, str], FrameSeries] = {}
        for timeframe, bars in {self.grain: self._bars, DAILY: self._daily}.items():
            for (symbol,), part in bars.partition_by("symbol", as_dict=True).items():
                found[str(symbol), timeframe] = FrameSeries(part)
        return found

    def series(self, symbol: str, timeframe: str) -> FrameSeries | None:
        return self._series.get((symbol, timeframe))

    def newest_first(self, symbols: Sequence[str], first: date, last: date) -> Selection:
        chosen = self._newest_first.filter(pl.col("symbol").is_in(symbols) & pl.col("date").is_between(first, last))
        return Selection(chosen.height, lambda offset, limit: chosen.slice(offset, limit))

    def first_date(self, symbol: str) -> date:
        return self._series[symbol, DAILY].frame(0, 1).item(0, "date")

    def span(self) -> tuple[date, date]:
        dates = self._bars.get_column("date")
        today = datetime.now(UTC).date()
        return dates.min() or today, dates.max() or today  # type: ignore[return-value]


class FrameSeries:
    """A slice of a frame of one symbol."""

    def __init__(self, bars: pl.DataFrame) -> None:
        self._bars = bars
        self._starts: list[int] = bars.get_column("ts").to_list()

    def __len__(self) -> int:
        return len(self._starts)

    def position(self, ts: int, after: bool = False) -> int:
        return bisect_right(self._starts, ts) if after else bisect_left(self._starts, ts)

    def frame(self, first: int, last: int) -> pl.DataFrame:
        return self._bars.slice(first, max(0, last - first))


def _complete(rows: pl.DataFrame, grain: str) -> pl.DataFrame:
    time = "ts" if grain == MINUTE else "date"
    if missing := [c for c in ("symbol", time, "open", "high", "low", "close", "volume") if c not in rows.columns]:
        raise ValueError(f"replica rows miss {missing}; they need symbol, date or ts, open, high, low, close, volume")
    if grain == MINUTE:
        stamp = rows.get_column("ts").dtype
        if not (isinstance(stamp, pl.Datetime) and stamp.time_zone):
            raise ValueError(f"replica rows need `ts` as datetimes with a time zone, not {stamp}")
        rows = rows.with_columns(
            pl.col("ts").dt.convert_time_zone("UTC").dt.epoch("us"),
            pl.col("ts").dt.convert_time_zone(NEW_YORK).dt.date().alias("date"),
        )
    else:
        rows = rows.with_columns(pl.col("date").cast(pl.Date)).with_columns(new_york_midnight("date").alias("ts"))
    prices = [pl.col(c).cast(pl.Float64) for c in ("open", "high", "low", "close")]
    rows = rows.with_columns(*prices, pl.col("volume").cast(pl.Int64))

    def given_or(column: str, kind: type[pl.DataType], otherwise: pl.Expr) -> pl.Expr:
        known = pl.col(column).cast(kind) if column in rows.columns else pl.lit(None, kind)
        return pl.coalesce(known, otherwise.cast(kind)).alias(column)

    rows = rows.with_columns(
        given_or("adj_close", pl.Float64, pl.col("close")),
        given_or("trades", pl.Int64, pl.col("volume") // 100),
        # Neither source knows the traded average; the typical price stands for it so that the field is never absent.
        given_or("vwap", pl.Float64, ((pl.col("high") + pl.col("low") + pl.col("close")) / 3).round(6)),
    ).with_columns((pl.col("adj_close") / pl.col("close")).alias("adj"))
    rows = rows.unique(["symbol", "ts"], keep="last").sort("symbol", "ts")
    return rows.with_columns(pl.col("close").shift(1).over("symbol").alias("pre_close")).select(COLUMNS)


def new_york_midnight(column: str) -> pl.Expr:
    """The instant (microseconds since 1970 UTC) at which the date in `column` begins in New York."""
    return pl.col(column).cast(pl.Datetime("us")).dt.replace_time_zone(NEW_YORK).dt.epoch("us")


def daily_of(minutes: pl.DataFrame) -> pl.DataFrame:
    """Minute bars (with `COLUMNS`) folded to one bar a session."""
    folded = minutes.group_by("symbol", "date", maintain_order=True).agg(
        pl.first("open"),
        pl.max("high"),
        pl.min("low"),
        pl.last("close"),
        pl.sum("volume"),
        pl.last("adj", "adj_close"),
        pl.sum("trades"),
        ((pl.col("vwap") * pl.col("volume")).sum() / pl.col("volume").sum()).round(6).alias("vwap"),
        pl.first("pre_close"),
    )
    return folded.with_columns(new_york_midnight("date").alias("ts")).select(COLUMNS)


# ----------------------------------------------------------------------------------------------- bars from an index


def generated(spec: str) -> GeneratedMarket:
    """`generated:ROWS[xSYMBOLS][:1Day|1Min][:START]`; 20 symbols; daily up to 5,000 bars a symbol, else 1-minute."""
    form = re.fullmatch(r"generated:(\d[\d_]*)(?:x(\d+))?(?::(1Day|1Min))?(?::(\d{4}-\d\d-\d\d))?", spec)
    if form is None:
        raise ValueError(f"replica data {spec!r} does not read as generated:ROWS[xSYMBOLS][:1Day|1Min][:YYYY-MM-DD]")
    rows, symbols = int(form[1]), int(form[2] or 20)
    if rows < 1 or not 1 <= symbols <= rows:
        raise ValueError(f"replica data {spec!r}: need at least one row for each of at least one symbol")
    grain = form[3] or (DAILY if rows / symbols <= 5000 else MINUTE)
    start = date.fromisoformat(form[4]) if form[4] else GENERATED_START[grain]
    return GeneratedMarket(rows, symbols, grain, start)


@dataclass(frozen=True)
class Sessions:
    """Trading sessions of New York: dates, and for each the first minute (microseconds UTC) and how many minutes."""

    dates: list[date]
    opens: list[int]
    minutes: list[int]


@cache
def sessions(start: date, end: date) -> Sessions:
    """Sessions of the New York Stock Exchange with start <= date <= end."""
    import exchange_calendars  # it imports pandas: a second that a replica of packaged rows need not pay

    calendar = exchange_calendars.get_calendar("XNYS", start=start.isoformat(), end=end.isoformat())
    table = calendar.schedule
    opens = [int(t.timestamp()) * 1_000_000 for t in table["open"]]
    closes = [int(t.timestamp()) * 1_000_000 for t in table["close"]]
    lengths = [(close - first) // MINUTE_US for first, close in zip(opens, closes, strict=True)]
    return Sessions([t.date() for t in table.index], opens, lengths)


class GeneratedMarket:
    """Bars computed from (symbol number, bar number) with integers, so equal on every machine; none are kept.

    `rows` in total over `count` symbols along the sessions of New York from `start`; where they do not divide evenly
    the first symbols have one bar more.
    """

    def __init__(self, rows: int, count: int, grain: str, start: date) -> None:
        self.grain = grain
        self.symbols = _tickers(count)
        self._each, self._more = divmod(rows, count)
        longest = self._each + (self._more > 0)
        need = longest if grain == DAILY else longest // 200 + 2
        if need > MOST_DAILY_BARS_A_SYMBOL:
            raise ValueError(
                f"{longest} {grain} bars a symbol would need {need} sessions, more than {MOST_DAILY_BARS_A_SYMBOL}: "
                "ask for more symbols (generated:ROWSxSYMBOLS)" + (" or 1Min bars" if grain == DAILY else "")
            )
        along = sessions(start, start + timedelta(days=int(need * 1.5) + 30))
        self.dates = along.dates
        midnight = pl.DataFrame({"date": self.dates}).select(new_york_midnight("date"))
        self._midnights: list[int] = midnight.to_series().to_list()
        self._opens = along.opens
        self._before = [0]
        for minutes in along.minutes:
            self._before.append(self._before[-1] + minutes)
        self._number = {symbol: n for n, symbol in enumerate(self.symbols)}
        # The same as polars series, made once: every frame looks its dates and names up in them.
        self._columns = {
            "date": pl.Series(self.dates, dtype=pl.Date),
            "midnight": pl.Series(self._midnights, dtype=pl.Int64),
            "open_us": pl.Series(self._opens, dtype=pl.Int64),
            "before": pl.Series(self._before, dtype=pl.Int64),
            "symbol": pl.Series(self.symbols, dtype=pl.String),
        }

    def number(self, symbol: str) -> int:
        return self._number[symbol]

    def length(self, symbol: str) -> int:
        """Bars of `symbol` in the market's own grain."""
        return self._each + (self._number[symbol] < self._more)

    def series(self, symbol: str, timeframe: str) -> Series | None:
        if symbol not in self._number or (timeframe == MINUTE and self.grain == DAILY):
            return None
        return GeneratedSeries(self, symbol, timeframe)

    def sessions_of(self, symbol: str) -> int:
        """How many sessions `symbol` has bars in."""
        length = self.length(symbol)
        return length if self.grain == DAILY else bisect_left(self._before, length)

    def newest_first(self, symbols: Sequence[str], first: date, last: date) -> Selection:
        wanted = [s for s in self.symbols if s in set(symbols)]
        low, high = bisect_left(self.dates, first), bisect_right(self.dates, last)
        # Symbols differ by one session at most, and those with more come first in the alphabet.
        most = max((self.sessions_of(s) for s in wanted), default=0)
        high = min(high, most)
        if low >= high:
            return Selection(0, lambda offset, limit: self.bars([], []))
        newest = [s for s in wanted if self.sessions_of(s) >= high]
        total = len(newest) + (high - 1 - low) * len(wanted)

        def window(offset: int, limit: int) -> pl.DataFrame:
            where: list[tuple[str, int]] = []
            for n in range(max(0, offset), min(total, offset + limit)):
                if n < len(newest):
                    where.append((newest[n], high - 1))
                else:
                    back, of = divmod(n - len(newest), len(wanted))
                    where.append((wanted[of], high - 2 - back))
            if self.grain == DAILY:
                return self.bars([self._number[s] for s, _ in where], [i for _, i in where])
            parts = [GeneratedSeries(self, s, DAILY).frame(i, i + 1) for s, i in where]
            return pl.concat(parts) if parts else self.bars([], [])

        return Selection(total, window)

    def first_date(self, symbol: str) -> date:
        return self.dates[0]

    def span(self) -> tuple[date, date]:
        return self.dates[0], self.dates[self.sessions_of(self.symbols[0]) - 1]

    def start_of(self, bar: int) -> int:
        """When bar number `bar` of the market's own grain starts."""
        if self.grain == DAILY:
            return self._midnights[bar] if bar < len(self._midnights) else END_OF_TIME
        session = bisect_right(self._before, bar) - 1
        if session >= len(self._opens):
            return END_OF_TIME
        return self._opens[session] + (bar - self._before[session]) * MINUTE_US

    def bar_at(self, ts: int, after: bool) -> int:
        """The first bar of the market's own grain that starts at or after `ts` (strictly after, with `after`)."""
        if self.grain == DAILY:
            return bisect_right(self._midnights, ts) if after else bisect_left(self._midnights, ts)
        session = max(0, bisect_right(self._opens, ts) - 1)
        into, rest = divmod(ts - self._opens[session], MINUTE_US)
        into += 1 if rest or after else 0
        return self._before[session] + min(max(0, into), self._before[session + 1] - self._before[session])

    def minutes_before(self, session: int) -> int:
        """Minute bars in the sessions before number `session`."""
        return self._before[min(session, len(self._before) - 1)]

    def midnight(self, session: int) -> int:
        return self._midnights[session]

    def session_at(self, ts: int, after: bool) -> int:
        """The first session whose New York midnight is at or after `ts` (strictly after, with `after`)."""
        return bisect_right(self._midnights, ts) if after else bisect_left(self._midnights, ts)

    def bars(self, symbols: Iterable[int], numbers: Iterable[int]) -> pl.DataFrame:
        """The bars for pairs of symbol number and bar number, with `COLUMNS`."""
        at = pl.DataFrame({"s": symbols, "i": numbers}, schema={"s": pl.Int64, "i": pl.Int64})
        columns = self._columns
        if self.grain == DAILY:
            ts = columns["midnight"].gather(at.get_column("i"))
            session = at.get_column("i")
        else:
            session = columns["before"].search_sorted(at.get_column("i"), side="right").cast(pl.Int64) - 1
            into = at.get_column("i") - columns["before"].gather(session)
            ts = columns["open_us"].gather(session) + into * MINUTE_US
        at = at.with_columns(
            ts.alias("ts"),
            columns["date"].gather(session).alias("date"),
            columns["symbol"].gather(at.get_column("s")).alias("symbol"),
            _noise(5).alias("lots"),
            *_walk(1 if self.grain == DAILY else 20),
        )
        return at.select(
            "symbol",
            "ts",
            "date",
            # Rounded because polars divides by a constant through its reciprocal: 4848 / 100 is 48.480000000000004.
            *((pl.col(c) / 100).round(2).alias(c) for c in ("open", "high", "low", "close")),
            (100 + 100 * (pl.col("lots") % 50_000)).alias("volume"),
            pl.lit(1.0).alias("adj"),
            (pl.col("close") / 100).round(2).alias("adj_close"),
            (1 + pl.col("lots") % 50_000).alias("trades"),
            ((pl.col("high") + pl.col("low") + pl.col("close")) * 100 // 3 / 10_000).round(4).alias("vwap"),
            pl.when(pl.col("i") > 0).then((pl.col("previous") / 100).round(2)).alias("pre_close"),
        )


class GeneratedSeries:
    """One symbol of a generated market; daily bars of a 1-minute market are folded when asked for."""

    def __init__(self, market: GeneratedMarket, symbol: str, timeframe: str) -> None:
        self._market = market
        self._symbol = symbol
        self._number = market.number(symbol)
        self._fold = timeframe == DAILY and market.grain == MINUTE

    def __len__(self) -> int:
        return self._market.sessions_of(self._symbol) if self._fold else self._market.length(self._symbol)

    def position(self, ts: int, after: bool = False) -> int:
        found = self._market.session_at(ts, after) if self._fold else self._market.bar_at(ts, after)
        return min(found, len(self))

    def frame(self, first: int, last: int) -> pl.DataFrame:
        last = max(first, min(last, len(self)))
        if not self._fold:
            return self._bars(first, last)
        start = self._market.minutes_before(first)
        end = min(self._market.minutes_before(last), self._market.length(self._symbol))
        return daily_of(self._bars(start, end))

    def _bars(self, first: int, last: int) -> pl.DataFrame:
        return self._market.bars([self._number] * (last - first), range(first, last))


def _tickers(count: int) -> list[str]:
    """`count` distinct tickers of capital letters in alphabetical order: GAAAA, GAAAB, ..."""
    if count > 26**4:
        raise ValueError(f"{count} generated symbols are too many: at most {26**4}")
    return ["G" + "".join(chr(65 + n // 26**place % 26) for place in (3, 2, 1, 0)) for n in range(count)]


def _noise(salt: int, shift: int = 0) -> pl.Expr:
    """An integer in [0, 2**31 - 1) from the symbol and bar number; no state, no floats."""
    prime = 2_147_483_647
    mixed = ((pl.col("i") + shift) * 48_271 + pl.col("s") * 69_621 + salt * 40_692 + 12_345) % prime
    return (mixed * mixed % prime * 16_807) % prime


def _walk(calm: int) -> list[pl.Expr]:
    """Prices in whole cents: slow waves and noise, with open near the bar before and low <= open, close <= high.

    `calm` divides what a single bar moves: minutes are calmer than days.
    """
    floor = 2_000 + pl.col("s") * 7_919 % 48_000
    jitter = floor // (100 * calm) + 1

    def level(shift: int) -> pl.Expr:
        i = pl.col("i") + shift
        phase = i + pl.col("s") * 31
        waves = [
            (phase % (2 * period * calm) - period * calm).abs() * (floor // part) // (period * calm)
            for period, part in ((97, 10), (1009, 3), (7001, 1))
        ]
        return floor + waves[0] + waves[1] + waves[2] + _noise(1, shift) % jitter

    close, previous = level(0), level(-1)
    opened = previous + _noise(2) % jitter - jitter // 2
    return [
        close.alias("close"),
        previous.alias("previous"),
        opened.alias("open"),
        (pl.max_horizontal(opened, close) + _noise(3) % jitter).alias("high"),
        (pl.min_horizontal(opened, close) - _noise(4) % jitter).alias("low"),
    ]


def new_york_day(unix: float) -> tuple[date, int]:
    """Date and minute of the day in New York at `unix` seconds."""
    there = datetime.fromtimestamp(unix, ZoneInfo(NEW_YORK))
    return there.date(), there.hour * 60 + there.minute
