"""What stores do alike with the lazy frames they scan: SQL over files, rows of a server, Arrow batches, watermarks."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from marketsync.errors import QueryRefused, SchemaError, StoreDamaged, StoreError
from marketsync.schema import Schema
from storage import statements

if TYPE_CHECKING:
    import polars as pl
    import pyarrow as pa

ARROW_ROWS = 65_536
EVERY_SUBJECT = "*"
_OF_A_FILE = ("parquet:", "csv:")  # how polars begins what it says of a file that it cannot read


def query(sql: str, datasets: Sequence[str], scan: Callable[[str], pl.LazyFrame]) -> pl.DataFrame:
    """Run one SELECT by polars; a table is written `provider.dataset`, and only tables that are named are opened.

    Polars looks a dotted name up as a whole, so a table registered under its dotted name is found and the text of the
    query stays as it is, literals included.
    """
    import polars as pl

    # either quoting is possible, so a table counts as named when both halves of its name occur
    sql = statements.question(sql)
    named = [dataset for dataset in datasets if all(half in sql for half in dataset.split("."))]
    tables = {dataset: scan(dataset) for dataset in named}
    try:
        with pl.SQLContext(tables) as context:
            return context.execute(sql, eager=True)
    except pl.exceptions.PolarsError as error:
        if str(error).startswith(_OF_A_FILE):
            raise
        why = " ".join(str(error).split("Resolved plan until failure")[0].split())
        raise QueryRefused(
            f"the query could not be run: {why}. Tables here: {', '.join(datasets) or 'none'}; "
            'a name with - in it is written "provider.dataset" in double quotes'
        ) from error


def scan(
    names: Sequence[str],
    types: Mapping[str, pl.DataType],
    read: Callable[[Sequence[str], int | None], Iterator[pl.DataFrame]],
) -> pl.LazyFrame:
    """Return what a server has as a lazy frame with the columns `names`. `read` yields frames with just the columns it
    is asked for, in the types of `types`, and need give no more rows than it is told (None: all)."""
    import polars as pl
    from polars.io.plugins import register_io_source

    def rows(
        columns: list[str] | None, predicate: pl.Expr | None, limit: int | None, _: int | None
    ) -> Iterator[pl.DataFrame]:
        given = list(names) if columns is None else columns
        asked = given if predicate is None else list(dict.fromkeys([*given, *predicate.meta.root_names()]))
        left = limit
        none_yet = True
        # polars counts rows by any column
        for frame in read(asked or names[:1], limit if predicate is None else None):
            part = frame if predicate is None else frame.filter(predicate)
            part = part.select(asked if columns is None else columns)
            if left is not None:
                part = part.head(left)
                left -= part.height
            none_yet = False
            yield part
            if left == 0:
                return
        if none_yet:  # polars wants to hear of the columns at least once
            yield pl.DataFrame(schema={name: types[name] for name in (asked if columns is None else columns)})

    return register_io_source(rows, schema=pl.Schema({name: types[name] for name in names}))


@contextmanager
def reading(what: str, place: Path | str) -> Iterator[None]:
    """Turn what polars, deltalake or the system say of files that cannot be read into a `StoreDamaged` that names the
    table, its place, and what to do. Errors of ours pass. For whoever collects what a store's `scan` returned."""
    import polars as pl

    deltalake = sys.modules.get("deltalake.exceptions")
    foreign = (deltalake.DeltaError,) if deltalake is not None else ()
    try:
        yield
    except (pl.exceptions.ComputeError, pl.exceptions.SchemaError, OSError, *foreign) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        why = "".join(one if one.isprintable() and one != "\ufffd" else "?" for one in " ".join(str(error).split()))
        if isinstance(error, pl.exceptions.ComputeError) and not why.startswith(_OF_A_FILE):
            raise StoreError(f"{what} in {place} could not be read: {why}") from error
        raise damaged(what, place, why) from error


def damaged(what: str, place: Path | str, why: str) -> StoreDamaged:
    """Return the error for a table whose files are not as they were written."""
    return StoreDamaged(
        f"{what} in {place} cannot be read: {why}; put the files back from a backup, or remove {place}: the next sync "
        "then fills the table again, from a sibling store or from the provider"
    )


def library(package: str) -> str:
    """Return an installed package and its version, for the engines that are one."""
    from importlib.metadata import version

    return f"{package} {version(package)}"


def arrow(frame: pl.LazyFrame) -> Iterator[pa.RecordBatch]:
    """Yield the frame's rows as Arrow record batches of at most `ARROW_ROWS` rows, one batch in memory at a time."""
    for part in frame.collect_batches(chunk_size=ARROW_ROWS):
        if part.height:
            yield from part.to_arrow().to_batches()


def count(frame: pl.LazyFrame) -> int:
    """Return the number of rows."""
    import polars as pl

    return int(frame.select(pl.len()).collect(engine="streaming").item())


def watermarks(frame: pl.LazyFrame, dataset: str, schema: Schema) -> dict[str, datetime | date]:
    """Return the newest time of each subject; under `*` where there is no subject column."""
    import polars as pl

    if schema.time is None:
        raise SchemaError(f"{dataset} has no time column, so it has no watermarks")
    if schema.subject is None:
        newest = frame.select(pl.col(schema.time).max()).collect(engine="streaming").item()
        return {} if newest is None else {EVERY_SUBJECT: newest}
    each = frame.group_by(schema.subject).agg(pl.col(schema.time).max()).collect(engine="streaming")
    return {subject: newest for subject, newest in each.iter_rows() if subject is not None and newest is not None}
