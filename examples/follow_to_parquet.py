"""Keep a Parquet file level with a dataset in a log (NATS, Redis): python follow_to_parquet.py URL DATASET FILE.

Each batch is put into the file by its key, the file is replaced as a whole, and only then is the batch acknowledged:
when this program is killed it goes on where it was, and a batch that comes again changes nothing. With a number of
seconds as a fourth word it ends when nothing came for so long. It is for what fits into memory; put more than that into
a database of yours, with `batch.id` in the same transaction.
"""

import os
import sys
from pathlib import Path

import polars as pl

from marketsync import follow


def main(url: str, dataset: str, file: Path, idle_seconds: float | None) -> None:
    """Follow the dataset into the file."""
    rows = pl.read_parquet(file) if file.exists() else pl.DataFrame()
    with follow(url, dataset, group=f"file-{file.stem}", idle_seconds=idle_seconds) as batches:
        for batch in batches:
            rows = batch.applied(rows)
            beside = file.with_name(f"{file.name}.new")
            rows.sort(batch.schema.key).write_parquet(beside)
            os.replace(beside, file)
            batch.ack()
            sys.stdout.write(f"{batch.id}: {batch.mode} of {batch.frame.height} rows; {rows.height} in {file}\n")


if __name__ == "__main__":
    if len(sys.argv) not in (4, 5):
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), float(sys.argv[4]) if len(sys.argv) == 5 else None)
