"""A process that upserts the same rows again and again, beside another one that does so with half of them.

Usage: rival_writer.py URL DATASET RIVAL BATCHES ROWS. Says `ready`, waits for a line, then says how many rows it has
put in for the first time. Every row of a batch has the batch's number in all of its values.
"""

from __future__ import annotations

import random
import sys
from datetime import timedelta
from importlib import import_module

import polars as pl
from stored_frames import BARS, START, batch, stamped

from storage.protocol import Written
from storage.registry import ENGINES, open_store

# the first half of the rows is the first rival's own, the last is the second's, and both write those between
SHARES = {"1": (0.0, 0.75), "2": (0.25, 1.0)}


def value_of(rival: str, seq: int) -> int:
    return int(rival) * 1000 + seq


def frame_of(rival: str, seq: int, rows: int) -> pl.DataFrame:
    """Return the batch, its rows in an order of its own, so that two rivals come to the same rows from other sides."""
    first, last = (int(share * rows) for share in SHARES[rival])
    places = list(range(first, last))
    random.Random(f"{rival} {seq}").shuffle(places)
    value = value_of(rival, seq)
    return stamped(
        pl.DataFrame(
            {
                "symbol": [f"S{place % 5}" for place in places],
                "ts": [START + timedelta(hours=7 * place) for place in places],
                "close": [float(value)] * len(places),
                "volume": [value] * len(places),
            },
            schema=BARS.polars(),
        ),
        f"{rival}-{seq}",
    )


def main(url: str, dataset: str, rival: str, batches: int, rows: int) -> None:
    import_module(ENGINES[url.partition(":")[0]][0])
    store = open_store(url)
    print("ready", flush=True)
    sys.stdin.readline()
    written = Written()
    for seq in range(1, batches + 1):
        written += store.write(batch(dataset, frame_of(rival, seq, rows), seq, lane=f"rival {rival}"))
    print(written.inserted, flush=True)
    store.close()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
