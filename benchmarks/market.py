"""An invented market of minute or daily bars, any row of which can be written without the rows before it.

A row depends on its symbol and its number only, so every page size, restart and look-back sees the same rows, and a
store can be checked for exactly what it should hold. How pages are served is in `page_server.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import numpy as np

ROW = (
    b'{"symbol":"SYM00000","ts":"2024-01-01T00:00:00Z",'
    b'"open":000.00,"high":000.00,"low":000.00,"close":000.00,"volume":000000},'
)
_SYMBOL = slice(ROW.index(b"SYM"), ROW.index(b"SYM") + 8)
_DAY = slice(ROW.index(b"2024"), ROW.index(b"2024") + 10)
_TIME = slice(_DAY.stop + 1, _DAY.stop + 6)
POOL = 65_521  # different price rows; a prime, so that symbols and days do not line up with it
LARGEST_PAGE = 10_000
_STRIDE = 7_919  # how far apart in the pool two neighbouring symbols begin


def symbol_name(number: int) -> str:
    """Return the symbol of this number, eight characters."""
    return f"SYM{number:05d}"


@dataclass(frozen=True)
class Market:
    """So many symbols with so many bars each, `step_minutes` apart from `start` (a UTC midnight) on."""

    symbols: int
    rows: int
    start: datetime
    step_minutes: int = 1

    @property
    def end(self) -> datetime:
        """The first instant after the last bar."""
        return self.start + timedelta(minutes=self.rows * self.step_minutes)

    def names(self) -> list[str]:
        """All symbols."""
        return [symbol_name(number) for number in range(self.symbols)]

    def index(self, instant: datetime) -> int:
        """Return the number of the first bar at or after the instant, within 0..rows."""
        minutes = -((self.start - instant.astimezone(UTC)) // timedelta(minutes=self.step_minutes))
        return min(max(minutes, 0), self.rows)


class Prices:
    """The price rows that all symbols share, as text for the pages and as numbers for checking."""

    def __init__(self) -> None:
        draw = np.random.default_rng(20240101)
        walk = np.cumsum(draw.integers(-40, 41, POOL))
        close = 50_000 + (walk - walk.min()) % 40_000  # cents
        opened = np.roll(close, 1)
        high = np.maximum(opened, close) + draw.integers(0, 60, POOL)
        low = np.minimum(opened, close) - draw.integers(0, 60, POOL)
        self.open_cents = opened
        self.volume = draw.integers(100_000, 1_000_000, POOL)

        rows = np.tile(np.frombuffer(ROW, np.uint8), (POOL, 1))
        for name, cents in ((b"open", opened), (b"high", high), (b"low", low), (b"close", close)):
            at = ROW.index(b'"' + name + b'":') + len(name) + 3
            self._write(rows[:, at : at + 3], cents // 100)
            self._write(rows[:, at + 4 : at + 6], cents % 100)
        at = ROW.index(b'"volume":') + 9
        self._write(rows[:, at : at + 6], self.volume)
        self._rows = np.concatenate([rows, rows[:LARGEST_PAGE]])
        self._times = np.array([list(b"%02d:%02d" % divmod(minute, 60)) for minute in range(1440)], np.uint8)
        self._days: dict[tuple[datetime, int], np.ndarray] = {}

    @staticmethod
    def _write(into: np.ndarray, numbers: np.ndarray) -> None:
        """Writes whole numbers as decimal digits, one column of `into` a digit, with leading zeros."""
        for column in range(into.shape[1] - 1, -1, -1):
            into[:, column] = numbers % 10 + ord("0")
            numbers = numbers // 10

    def page(self, market: Market, symbol: int, first: int, count: int) -> bytes:
        """Return `count` rows of a symbol as JSON objects joined by commas, from row number `first` on."""
        if count == 0:
            return b""
        begin = (symbol * _STRIDE + first) % POOL
        rows = self._rows[begin : begin + count].copy()
        minutes = np.arange(first, first + count) * market.step_minutes
        rows[:, _SYMBOL] = np.frombuffer(symbol_name(symbol).encode(), np.uint8)
        rows[:, _DAY] = self._calendar(market)[minutes // 1440]
        rows[:, _TIME] = self._times[minutes % 1440]
        return rows.tobytes()[:-1]

    def _calendar(self, market: Market) -> np.ndarray:
        known = (market.start, market.rows * market.step_minutes // 1440 + 1)
        if known not in self._days:
            days = np.datetime64(market.start.date()) + np.arange(known[1])
            self._days[known] = np.frombuffer(days.astype("S10").tobytes(), np.uint8).reshape(-1, 10)
        return self._days[known]

    def totals(self, market: Market, until: int | None = None) -> dict[str, int]:
        """Return what a store with every row must hold: rows, and the sums of their volumes and opens (in cents)."""
        rows = market.rows if until is None else until
        whole, rest = divmod(rows, POOL)
        sums = {"rows": market.symbols * rows, "volume": 0, "open_cents": 0}
        for name, column in (("volume", self.volume), ("open_cents", self.open_cents)):
            running = np.concatenate([[0], np.cumsum(np.concatenate([column, column]))])
            for symbol in range(market.symbols):
                begin = symbol * _STRIDE % POOL
                sums[name] += int(whole * running[POOL] + running[begin + rest] - running[begin])
        return sums
