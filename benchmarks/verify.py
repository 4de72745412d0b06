"""Looks into what a run has stored: are all rows there, once, with the right values? Prints one JSON object.

    python -m benchmarks.verify FOLDER SYMBOLS ROWS START STEP_MINUTES [--newest]

It finds the Delta table (or the Parquet files) below the folder by its columns, whoever wrote it. With --newest the
market is taken to end at the newest row stored, as it does for a run that asks until now.
"""

from __future__ import annotations

import argparse
import json
from datetime import UTC, datetime
from pathlib import Path

import polars as pl

from benchmarks.market import Market, Prices

COLUMNS = {"symbol", "ts", "open", "high", "low", "close", "volume"}


def delta_tables(folder: Path) -> list[Path]:
    """Return the Delta tables of bars below the folder."""
    from deltalake import DeltaTable

    tables = sorted(log.parent for log in folder.rglob("_delta_log") if log.is_dir())
    return [path for path in tables if {field.name for field in DeltaTable(str(path)).schema().fields} >= COLUMNS]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("symbols", type=int)
    parser.add_argument("rows", type=int)
    parser.add_argument("start", type=lambda text: datetime.fromisoformat(text).replace(tzinfo=UTC))
    parser.add_argument("step_minutes", type=int)
    parser.add_argument("--newest", action="store_true")
    options = parser.parse_args()
    market = Market(options.symbols, options.rows, options.start, options.step_minutes)

    tables = delta_tables(options.folder)
    facts: dict[str, object] = {"tables": len(tables)}
    if tables:
        frame = pl.concat([pl.scan_delta(str(path)).select(sorted(COLUMNS)) for path in tables])
        logs = [log for path in tables for log in sorted((path / "_delta_log").glob("*.json"))]
        facts["commits"] = sum(int(max(path.glob("_delta_log/*.json")).stem) + 1 for path in tables)
        facts["last_commit"] = max(log.stat().st_mtime for log in logs)
    else:
        files = [
            file for file in options.folder.rglob("*.parquet") if set(pl.scan_parquet(file).collect_schema()) >= COLUMNS
        ]
        if not files:
            print(json.dumps({"tables": 0, "rows": 0, "expected": market.symbols * market.rows, "right": False}))
            return
        frame = pl.concat([pl.scan_parquet(file).select(sorted(COLUMNS)) for file in files])

    summary = frame.select(
        pl.len().alias("rows"),
        pl.col("volume").cast(pl.Int64).sum(),
        (pl.col("open") * 100).round().cast(pl.Int64).sum().alias("open_cents"),
        pl.col("ts").max().alias("newest"),
    ).collect(engine="streaming")
    found = summary.row(0, named=True)
    newest = found.pop("newest")
    until = market.rows if newest is None or not options.newest else market.index(newest.astimezone(UTC)) + 1
    expected = Prices().totals(market, until)
    facts |= {"rows": found["rows"], "expected": expected["rows"], "right": found == expected}
    if found == expected and expected["rows"] <= 5_000_000:
        distinct = frame.select("symbol", "ts").unique().select(pl.len()).collect(engine="streaming").item()
        facts["right"] = distinct == expected["rows"]
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
