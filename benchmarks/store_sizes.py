"""How long a store takes, and how much memory, by the rows of its table: python -m benchmarks.store_sizes excel://./tmp.

For each of `--rows`, in a process of its own and a folder of its own under the URL's: append that many bars in one
delivery, deliver 100 rows again of which 60 changed and 40 are new, read all. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
from datetime import UTC, datetime

import polars as pl

from marketsync.schema import Column, ColumnType, Schema
from storage.protocol import Batch, Mode
from storage.registry import open_store

SYMBOLS = 20
PRICES = ("open", "high", "low", "close")
SCHEMA = Schema(
    (
        Column("symbol", ColumnType.STR),
        Column("ts", ColumnType.DATETIME),
        *(Column(name, ColumnType.F64) for name in PRICES),
        Column("volume", ColumnType.I64),
    ),
    ("symbol", "ts"),
    "ts",
    "symbol",
)


def bars(first: int, rows: int) -> pl.DataFrame:
    """Minutes from `first` on, for each of the symbols."""
    minute = pl.col("minute")
    at = pl.lit(datetime(2020, 1, 1, tzinfo=UTC)) + pl.duration(minutes=minute)
    return pl.concat(
        pl.DataFrame({"minute": range(first, first + rows)}).select(
            pl.lit(f"S{symbol:03}").alias("symbol"),
            at.cast(pl.Datetime("us", "UTC")).alias("ts"),
            *((minute % 977 * 0.01 + symbol + place).round(4).alias(name) for place, name in enumerate(PRICES)),
            (minute * 100).alias("volume"),
            pl.lit("segment").alias("_segment"),
            pl.lit(datetime.now(UTC)).cast(pl.Datetime("us", "UTC")).alias("_ingested_at"),
        )
        for symbol in range(SYMBOLS)
    )


def measure(url: str, rows: int) -> None:
    each = rows // SYMBOLS
    store = open_store(f"{url}/{rows}")
    store.ensure("sizes.bars", SCHEMA)
    changed = bars(each - 3, 5).with_columns(pl.col("close") + 1)
    seconds = []
    for act in (
        lambda: store.write(Batch("sizes.bars", SCHEMA, "lane", 1, bars(0, each), Mode.APPEND)),
        lambda: store.write(Batch("sizes.bars", SCHEMA, "lane", 2, changed, Mode.UPSERT)),
        lambda: store.scan("sizes.bars").collect(),
    ):
        start = time.perf_counter()
        act()
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    size = store.info("sizes.bars").bytes / 1e6
    print(f"| {rows:,} | {' | '.join(f'{one:.1f} s' for one in seconds)} | {size:.1f} MB | {peak:.0f} MB |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure a store of files by the rows of its table.")
    parser.add_argument("url", help="a store in a folder that is empty, such as excel://./tmp")
    parser.add_argument("--rows", default="20000,100000,500000", help="sizes to try (default %(default)s)")
    options = parser.parse_args()
    print(
        "| rows | append all | upsert 100 | read all | on disk | peak memory |\n|--:|--:|--:|--:|--:|--:|", flush=True
    )
    for rows in map(int, options.rows.split(",")):
        process = multiprocessing.get_context("spawn").Process(target=measure, args=(options.url, rows))
        process.start()
        process.join()


if __name__ == "__main__":
    main()
