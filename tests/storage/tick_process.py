"""A process that writes ticks to MarketStore, which the test kills. Usage: tick_process.py URL DATASET BATCHES.

Says `ready`, waits for a line, then says the `seq` of each batch that the store has acknowledged.
"""

from __future__ import annotations

import sys

import polars as pl
from stored_frames import batch, stamped
from writer_process import say

from marketsync.schema import Column, ColumnType, Schema
from storage.protocol import Batch, Mode
from storage.registry import open_store

TICKS = Schema(
    (
        Column("symbol", ColumnType.STR),
        Column("at", ColumnType.DATETIME_NS),
        Column("id", ColumnType.I64),
        Column("price", ColumnType.F64),
        Column("venue", ColumnType.STR),
    ),
    key=("symbol", "at", "id"),
    time="at",
    subject="symbol",
)
FIRST = 1_709_303_399_000_000_000  # 2024-03-01T14:29:59Z
ROWS = 300


def ticks(seq: int, rows: int = ROWS, symbols: tuple[str, ...] = ("AAPL", "MSFT")) -> pl.DataFrame:
    """Return ticks of batch `seq`, a third of which share their nanosecond with the one before."""
    numbers = [seq * rows + row for row in range(rows)]
    whole = pl.concat(
        pl.DataFrame(
            {
                "symbol": symbol,
                "at": [FIRST + (number - number % 3 // 2) * 7_000_001 for number in numbers],
                "id": numbers,
                "price": [100 + number / 8 for number in numbers],
                "venue": [None if number % 5 else "XNAS" for number in numbers],
            },
            schema={**TICKS.polars(), "at": pl.Int64()},
        )
        for symbol in symbols
    )
    return stamped(whole.with_columns(pl.col("at").cast(pl.Datetime("ns", "UTC"))), f"lane:{seq}")


def of(dataset: str, seq: int, mode: Mode = Mode.APPEND) -> Batch:
    return batch(dataset, ticks(seq), seq, mode=mode, schema=TICKS)


def main(url: str, dataset: str, batches: str) -> None:
    store = open_store(url)
    store.ensure(dataset, TICKS)
    say("ready")
    sys.stdin.readline()
    for seq in range(store.committed(dataset, "lane") + 1, int(batches) + 1):
        store.write(of(dataset, seq))
        say(seq)


if __name__ == "__main__":
    main(*sys.argv[1:])
