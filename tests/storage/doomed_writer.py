"""A process that does to one table everything a run does, again and again, and writes down what was acknowledged.

Usage: doomed_writer.py URL DATASET FIRST ROWS LOG. Says `begin NUMBER WHAT` before each deed; when it has returned, the
number goes into the file LOG, which is on the disk before the next one begins. Where the store raises `StoreError` it
says `down NUMBER WHY`, waits for a line, and does the same deed again. What each deed leaves is computed here, too, for
who looks at the store afterwards.
"""

from __future__ import annotations

import os
import sys
from datetime import datetime, timedelta

import polars as pl
from stored_frames import BARS, START, batch, stamped

from marketsync.errors import StoreError
from marketsync.schema import Column, ColumnType, Schema
from storage.protocol import Filter, Mode, Store
from storage.registry import open_store

CYCLE = (
    *("append", "append", "upsert", "replace", "evolve", "upsert"),
    *("append", "maintain", "replace", "upsert", "delete", "append"),
)
BEFORE = {2: 1, 3: 1, 5: 1, 8: 6, 9: 6}  # the append of the same cycle over whose rows these go again
COLUMNS = 6  # so many are added, one in each cycle

Rows = dict[tuple[str, datetime], dict[str, object]]


def what(number: int) -> str:
    """Return what the deed is."""
    return CYCLE[number % len(CYCLE)]


def schema_of(number: int) -> Schema:
    """Return the table's schema when the deed is done."""
    evolved = sum(what(each) == "evolve" for each in range(number % len(CYCLE) + 1)) + number // len(CYCLE)
    more = tuple(Column(f"x{each}", ColumnType.F64) for each in range(min(evolved, COLUMNS)))
    return Schema((*BARS.columns, *more), BARS.key, BARS.time, BARS.subject, BARS.period)


def hour(number: int, rows: int, row: int = 0) -> datetime:
    return START + timedelta(hours=number * rows + row)


def earlier(number: int) -> int:
    return number - number % len(CYCLE) + BEFORE[number % len(CYCLE)]


def frame_of(number: int, rows: int) -> pl.DataFrame:
    """Return the rows of the deed; none for one that has none."""
    kind, schema = what(number), schema_of(number)
    places: list[tuple[int, int]] = []
    if kind == "append":
        places = [(number, row) for row in range(rows)]
    elif kind == "upsert":
        places = [(earlier(number), row) for row in range(rows // 2, rows)] + [
            (number, row) for row in range(rows // 2)
        ]
    elif kind == "replace":
        places = [(earlier(number), row) for row in range(0, rows, 2)]
    values: dict[str, list] = {
        "symbol": [f"S{deed % 3}" for deed, _ in places],
        "ts": [hour(deed, rows, row) for deed, row in places],
        "close": [row + number / 1000 for _, row in places],
        "volume": [number] * len(places),
    }
    values |= {name: [float(number)] * len(places) for name in schema.names if name not in values}
    return stamped(pl.DataFrame(values, schema=schema.polars()), f"s{number}")


def span_of(number: int, rows: int) -> Filter:
    """Return the span that a deed replaces or deletes: in each cycle, all rows from before it."""
    if what(number) == "delete":
        return Filter(until=hour(number - number % len(CYCLE), rows))
    deed = earlier(number)
    return Filter([f"S{deed % 3}"], hour(deed, rows), hour(deed + 1, rows))


def left_by(number: int, rows: int, before: Rows) -> Rows:
    """Return the rows that there are when the deed is done, of those before it."""
    after = dict(before)
    if what(number) in ("replace", "delete"):
        span = span_of(number, rows)
        for key in before:
            inside = span.subjects is None or key[0] in span.subjects
            if inside and (span.since is None or key[1] >= span.since) and (span.until is None or key[1] < span.until):
                del after[key]
    for row in frame_of(number, rows).drop("_segment", "_ingested_at").iter_rows(named=True):
        after[row["symbol"], row["ts"]] = row
    return after


def do(store: Store, dataset: str, number: int, rows: int) -> None:
    """Do the deed."""
    kind, schema = what(number), schema_of(number)
    if kind == "evolve":
        store.ensure(dataset, schema)
    elif kind == "maintain":
        store.maintain(dataset)
    elif kind == "delete":
        store.delete(dataset, span_of(number, rows))
    elif kind == "replace":
        store.replace(dataset, schema, frame_of(number, rows), span_of(number, rows))
    else:
        mode = Mode.APPEND if kind == "append" else Mode.UPSERT
        store.write(batch(dataset, frame_of(number, rows), number + 1, mode=mode, schema=schema))


def say(text: object) -> None:
    sys.stdout.write(f"{' '.join(str(text).split())}\n")
    sys.stdout.flush()


def main(url: str, dataset: str, first: int, rows: int, log: str) -> None:
    done = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    store = open_store(url)
    if store.schema(dataset) is None:
        store.ensure(dataset, BARS)
    say("ready")
    sys.stdin.readline()
    number = first
    while True:
        say(f"begin {number} {what(number)}")
        try:
            do(store, dataset, number, rows)
        except StoreError as error:
            say(f"down {number} {type(error).__name__} {error}")
            sys.stdin.readline()
            continue
        os.write(done, f"{number}\n".encode())
        os.fsync(done)
        number += 1


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
