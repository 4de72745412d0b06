"""A process that writes to a store as a run does; the tests start several of it, or kill it at any instant.

Usage: writer_process.py create|write URL DATASET LANE BATCHES. Says `ready`, waits for a line, then says a line for
each thing done: the table's marker, or the `seq` of the batch that the store has acknowledged.
"""

from __future__ import annotations

import sys
from importlib import import_module

import polars as pl
from stored_frames import BARS, bars, batch

from marketsync.errors import StoreBusy
from storage.protocol import Mode
from storage.registry import ENGINES, open_store

ROWS = 24
SUBJECTS = ("A", "b", "B")


def frame_of(lane: str, seq: int) -> pl.DataFrame:
    """Return batch `seq` of the lane: each third one goes back over rows of the batch before, with other values."""
    subjects = [f"{lane}-{subject}" for subject in SUBJECTS]
    again = seq % 3 == 0
    first = (seq - 1 if again else seq) * ROWS
    return bars(subjects, first, ROWS * (2 if again else 1), add=seq if again else 0.0, segment=f"{lane}-{seq}")


def mode_of(seq: int) -> Mode:
    return Mode.UPSERT if seq % 3 == 0 else Mode.APPEND


def expected(lane: str, last: int) -> pl.DataFrame:
    """Return the rows that batches 1 to `last` of the lane leave."""
    frames = [frame_of(lane, seq).drop("_ingested_at", "_segment") for seq in range(1, last + 1)]
    return pl.concat(frames).unique(["symbol", "ts"], keep="last")


def say(text: object) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def main(what: str, url: str, dataset: str, lane: str, batches: int) -> None:
    for module in ENGINES[url.partition(":")[0]][:2]:
        import_module(module)  # so that several processes start from the same line
    say("ready")
    sys.stdin.readline()
    try:
        store = open_store(url)
        marker = store.ensure(dataset, BARS)
    except StoreBusy as error:
        say(f"busy {error}")
        return
    if what == "create":
        say(marker)
        sys.stdin.readline()
    else:
        for seq in range(store.committed(dataset, lane) + 1, batches + 1):
            store.write(batch(dataset, frame_of(lane, seq), seq, lane=lane, mode=mode_of(seq)))
            say(seq)
    store.close()


if __name__ == "__main__":
    main(*sys.argv[1:5], int(sys.argv[5]))
