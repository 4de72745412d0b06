"""One dataset of a store as one file for people: CSV, an Excel workbook or Parquet, by the file's suffix.

Rows stream from the store's scan into the file, in bounded memory; a workbook is put together in memory. The file is
written beside its place and then put there, so that nobody finds half of it. Datasets are moved between stores
elsewhere; this is for those who want rows outside.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, datetime
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from marketsync.errors import ConfigurationError, StoreDamaged
from marketsync.planning import end_with, instant
from marketsync.schema import Schema
from storage.files import sync
from storage.lazyframes import count, reading
from storage.protocol import Filter, Store
from tasks.workspace import Workspace

if TYPE_CHECKING:
    import polars as pl

SUFFIXES = (".csv", ".xlsx", ".parquet")


@dataclass(frozen=True)
class Exported:
    """What was written: `rows` of the dataset in `columns`, as `bytes` of `file`."""

    dataset: str
    store: str
    file: str
    columns: list[str]
    rows: int
    bytes: int


def export(
    workspace: Workspace,
    dataset: str,
    file: Path,
    *,
    store: str | None = None,
    symbols: Sequence[str] = (),
    since: date | datetime | None = None,
    until: date | datetime | None = None,
    columns: Sequence[str] = (),
    force: bool = False,
) -> Exported:
    """Write the dataset's rows of a store (the first one with tables by default) to the file.

    Only those of `symbols`, from `since` on, up to `until` (a day is included whole), with `columns`; empty is all.
    Raises ConfigurationError for what cannot be asked or written, SchemaError for a text that no cell of a workbook
    holds, and StoreError. A file that is there stays unless `force` is given, and as it was when something fails.
    """
    _refuse_file(file, force)
    name = workspace.readable(store)
    source = workspace.store(name)
    schema = _schema(source, name, dataset)
    wanted = _wanted(dataset, schema, symbols, since, until, columns)
    try:
        aside = TemporaryDirectory(dir=file.parent, prefix=f".{file.stem}.", ignore_cleanup_errors=True)
    except OSError as error:
        raise ConfigurationError(f"{file} cannot be written: {error.strerror}; name another place") from None
    with aside as folder:
        new, rows = _written(source, dataset, wanted, Path(folder) / file.name, schema)
        if not rows and file.exists():
            raise ConfigurationError(f"{dataset} in {name} has no such rows; {file} was left as it is")
        sync(new)
        size = new.stat().st_size
        os.replace(new, file)
        sync(file.parent)
    return Exported(dataset, name, str(file), list(columns) or schema.names, rows, size)


def _refuse_file(file: Path, force: bool) -> None:
    if file.suffix.lower() not in SUFFIXES:
        raise ConfigurationError(f"{file} does not say what it is to be: end its name with {', '.join(SUFFIXES)}")
    if file.suffix.lower() == ".xlsx" and find_spec("rustpy_xlsxwriter") is None:
        raise ConfigurationError(
            "a workbook needs the package rustpy-xlsxwriter, which is not installed; "
            "where MarketSync is checked out, run: pip install -e '.[excel]'"
        )
    if file.is_dir() or not file.parent.is_dir():
        what = "that is a folder" if file.is_dir() else f"there is no folder {file.parent}"
        raise ConfigurationError(f"{file} cannot be written: {what}; name another place")
    if file.exists() and not force:
        raise ConfigurationError(f"{file} is there already; --force writes over it, or name another file")


def _schema(source: Store, name: str, dataset: str) -> Schema:
    schema = source.schema(dataset)
    if schema is None:
        known = ", ".join(source.datasets()) or "none yet"
        raise ConfigurationError(f"store {name} has no table of {dataset}; it has: {known}")
    return schema


def _wanted(
    dataset: str,
    schema: Schema,
    symbols: Sequence[str],
    since: date | datetime | None,
    until: date | datetime | None,
    columns: Sequence[str],
) -> Filter:
    unknown = [column for column in columns if column not in schema]
    if unknown:
        raise ConfigurationError(f"{dataset} has no column {', '.join(unknown)}; it has {', '.join(schema.names)}")
    if twice := [column for column, count in Counter(columns).items() if count > 1]:
        raise ConfigurationError(f"--columns names {', '.join(twice)} more than once")
    if symbols and schema.subject is None:
        raise ConfigurationError(
            f"{dataset} has no column of symbols: leave --symbols out, or name it with `subject:` in the definition"
        )
    if (since or until) and schema.time is None:
        raise ConfigurationError(f"{dataset} has no column of times: leave --since and --until out")
    first = None if since is None else instant(since)
    end = None if until is None else end_with(until)
    if first and end and first >= end:
        raise ConfigurationError(f"--since {since} is after --until {until}: no row can be between them")
    return Filter(list(symbols) or None, first, end, list(columns) or None)


def _unknown(source: Store, dataset: str, symbols: Sequence[str], schema: Schema) -> list[str]:
    """Return those of the symbols that the table has no row of, whenever."""
    import polars as pl

    if not symbols:
        return []
    subject = schema.subject or ""
    rows = source.scan(dataset, Filter(symbols, columns=[subject]))
    known = set(rows.select(pl.col(subject).unique()).collect(engine="streaming")[subject])
    return [symbol for symbol in symbols if symbol not in known]


def _written(
    source: Store, dataset: str, wanted: Filter, file: Path, schema: Schema, looks: int = 3
) -> tuple[Path, int]:
    """Write the rows, and return where they are, and how many."""
    # each look has a file of its own: a sink that failed may go on in the background, and end its file later
    new = file.with_stem(f"{file.stem}.{looks}")
    try:
        with reading(f"the table of {dataset}", source.url):
            if unknown := _unknown(source, dataset, wanted.subjects or (), schema):
                raise ConfigurationError(
                    f"{dataset} in {source.name} has no rows of {', '.join(unknown)}; nothing was written"
                )
            return new, _write(source.scan(dataset, wanted), new, schema)
    except StoreDamaged:
        if looks == 1:
            raise
        # perhaps it is only that a writer replaced files under the scan
        return _written(source, dataset, wanted, file, schema, looks - 1)


def _write(rows: pl.LazyFrame, file: Path, schema: Schema) -> int:
    """Write the rows in the file's format, and return how many they are."""
    import polars as pl

    if file.suffix.lower() == ".parquet":
        rows.sink_parquet(file)
        return count(pl.scan_parquet(file))
    if file.suffix.lower() == ".csv":
        # with a byte order mark, or Excel takes the text for the code page of the machine
        _times_as_text(rows).sink_csv(file, include_bom=True)
        return count(pl.scan_csv(file, infer_schema=False))
    from storage import workbook

    frame = rows.collect(engine="streaming")
    order = [name for name in (schema.subject, schema.time) if name in frame.columns]
    workbook.write(file, frame.sort(order) if order else frame)
    return frame.height


def _times_as_text(rows: pl.LazyFrame) -> pl.LazyFrame:
    """Write times as Excel and pandas read them, in UTC, with as many decimals of a second as the column needs."""
    import polars as pl

    times = [name for name, type_ in rows.collect_schema().items() if isinstance(type_, pl.Datetime)]
    if not times:
        return rows
    nanos = {name: pl.col(name).dt.nanosecond() for name in times}
    finer = rows.select(
        (nanos[name] % step != 0).any().alias(f"{name} {step}") for name in times for step in (10**9, 10**6, 10**3)
    )
    found = finer.collect(engine="streaming").row(0)
    each = []
    for place, name in enumerate(times):
        digits = 3 * sum(found[3 * place : 3 * place + 3])
        text = pl.col(name).dt.strftime("%Y-%m-%d %H:%M:%S" + (f"%.{digits}f" if digits else ""))
        # a row that has come since then and is finer loses nothing either
        late = nanos[name] % 10 ** (9 - digits) != 0
        each.append(pl.when(late).then(pl.col(name).dt.strftime("%Y-%m-%d %H:%M:%S%.9f")).otherwise(text).alias(name))
    return rows.with_columns(each)
