"""The rows of the stores' benchmark: python -m benchmarks.store_rows FOLDER SYMBOLS BARS LONGER.

Writes FOLDER/append/*.arrow, bars of each symbol, and FOLDER/upsert/*.arrow, as many from the middle on: the first half
of them changed, the other half new. For small updates FOLDER/small/*.arrow has batches of the newest period, half of
each changed rows, and FOLDER/history/*.arrow older bars, so many that with `append` there are LONGER times as many.
Prints, for the counts of rows that the benchmark takes, what a right table holds.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import polars as pl

BATCH_ROWS = 131_072
COUNTS = (2_000, 10_000, 20_000, 50_000, 100_000, 200_000)
SMALL_ROWS, SMALL_BATCHES = 10_000, 4
AT = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)


def bars(symbols: int, first: int, rows: int, changed: float, segment: str) -> pl.DataFrame:
    """Hourly bars of each symbol; every value follows from symbol and hour, and from `changed`."""
    grid = pl.select(n=pl.int_range(symbols, dtype=pl.Int64)).join(
        pl.select(hour=pl.int_range(first, first + rows, dtype=pl.Int64)), how="cross"
    )
    n, hour = pl.col("n"), pl.col("hour")
    start = pl.lit(datetime(2024, 1, 1, tzinfo=UTC)).cast(pl.Datetime("us", "UTC"))
    price = (100 + n + (hour * 7919 % 1000) / 100 + changed).round(2)
    return grid.select(
        symbol=pl.lit("SYM") + n.cast(pl.String).str.zfill(5),
        ts=start + pl.duration(hours=hour),
        open=price,
        high=(price + 0.5).round(2),
        low=(price - 0.5).round(2),
        close=(price + 0.25).round(2),
        volume=1000 + (hour * 104729 + n * 31) % 1_000_000,
        _segment=pl.lit(segment),
        _ingested_at=pl.lit(AT).cast(pl.Datetime("us", "UTC")),
    ).sort("symbol", "ts")


def sums(frames: Iterator[pl.DataFrame]) -> dict[str, float]:
    """Return what a table with the last of each key of these frames holds."""
    rows = pl.concat(list(frames)).unique(["symbol", "ts"], keep="last")
    return {"rows": rows.height, "volume": int(rows["volume"].sum()), "close": round(float(rows["close"].sum()), 2)}


def main(folder: Path, symbols: int, count: int, longer: int) -> dict[str, dict[str, dict[str, float]]]:
    steps = {
        "append": bars(symbols, 0, count, 0.0, "bench-000001"),
        "upsert": bars(symbols, count // 2, count, 0.25, "bench-000002"),
    }
    for step, frame in steps.items():
        _written(folder / step, frame.iter_slices(BATCH_ROWS))
    history = bars(symbols, -(longer - 1) * count, (longer - 1) * count, 0.0, "bench-000003")
    _written(folder / "history", history.iter_slices(BATCH_ROWS))
    each = min(SMALL_ROWS, symbols * count // 10) // symbols
    small = [
        bars(symbols, count + (n - 1) * (each // 2), each, 0.5 * (n + 1), "bench-000004") for n in range(SMALL_BATCHES)
    ]
    _written(folder / "small", iter(small))
    short = sums(iter([steps["append"], *small]))
    before = sums(iter([history]))
    counts = [each for each in (*COUNTS, symbols * count) if each <= symbols * count]
    return {
        "append": {str(n): sums(iter([steps["append"].head(n)])) for n in counts},
        "upsert": {str(n): sums(iter([steps["append"].head(n), steps["upsert"].head(n)])) for n in counts},
        "small": {"short": short, "long": {name: round(short[name] + before[name], 2) for name in short}},
    }


def _written(folder: Path, frames: Iterator[pl.DataFrame]) -> None:
    folder.mkdir(parents=True)
    for number, part in enumerate(frames):
        part.rechunk().write_ipc(folder / f"{number:04d}.arrow", compat_level=pl.CompatLevel.oldest())


if __name__ == "__main__":
    folder, symbols, count, longer = sys.argv[1:]
    print(json.dumps(main(Path(folder), int(symbols), int(count), int(longer))))
