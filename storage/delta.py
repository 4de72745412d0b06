"""Delta Lake tables in a folder: `delta://./folder`, one table per dataset in `<folder>/<provider>/<dataset>`.

The Parquet files are written and rewritten by polars; deltalake keeps the log. One commit holds the files a batch adds,
the files it replaces and the lane's `seq` (an application transaction), so rows and `seq` become durable together.
An upsert reads only files whose period and statistics meet the batch, and rewrites only those in which a row changed.

Partition column `_period` ('2001', '2001-03', '2001-03-05') is the period of the time column; scans do not show it.
Marker and schema are table properties. Not here: pyarrow, whose import would cost more than the import of deltalake.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from marketsync.errors import SchemaError, StoreError
from marketsync.schema import INGESTED_COLUMN, SEGMENT_COLUMN, ColumnType, Period, Schema
from storage import classify, evolution, filters, gate, lazyframes, location, locks
from storage.evolution import PERIOD_COLUMN
from storage.periods import cut
from storage.protocol import Batch, Capabilities, Filter, Mode, TableInfo, Writers, Written

if TYPE_CHECKING:
    import deltalake
    import polars as pl
    import pyarrow as pa

CAPABILITIES = Capabilities(
    atomic=True,
    transactions=True,
    nanoseconds=False,
    nan=True,
    unsigned_64=False,
    evolve=True,
    writers=Writers.MANY_PROCESSES,
    why="nanoseconds: Delta timestamps are microseconds; declare the column i64 to keep finer ones. "
    "unsigned_64: Delta has no unsigned integers, values above 2**63 - 1 are refused; declare the column str.",
)

# A file holds at most this many rows after a rewrite, which bounds what one changed row can cost (about 0.1 CPU s).
FILE_ROWS = 262_144
_ROW_GROUP_ROWS = 32_768
# Automatic compaction: of a period's files, those with less than 32, 1,024 and 32,768 rows are three classes; 32 files
# of one class become one file of the next. A row is rewritten at most three times, whatever the size of its batches.
_CLASS_FILES = 32
_CLASS_ROWS = (32, 1_024, 32_768)
_LOOK_EVERY_COMMITS = 8
# Behind one write at most so many rows are rewritten, or 8 times the rows it brought; opening a file counts for 512.
_COMPACT_ROWS = 65_536
_COMPACT_TIMES = 8
_OPENING_ROWS = 512
_CHECKPOINT_EVERY_COMMITS = 10  # commits since the last checkpoint make every open and commit dearer
# A reader that opened the table this long ago can still read its files after `maintain`.
_KEEP_REMOVED_FILES = timedelta(days=1)
_ATTEMPTS = 20

_LOCK = "_marketsync.lock"
_MARKER = "marketsync.marker"
_SCHEMA = "marketsync.schema"
_FILE = "__file"

_DELTA_TYPES = {
    ColumnType.STR: "string",
    ColumnType.BOOL: "boolean",
    ColumnType.I32: "integer",
    ColumnType.I64: "long",
    ColumnType.U64: "long",
    ColumnType.F32: "float",
    ColumnType.F64: "double",
    ColumnType.DATE: "date",
    ColumnType.DATETIME: "timestamp",
    ColumnType.DATETIME_NS: "timestamp",
}


@dataclass(frozen=True)
class _File:
    """One data file of a table as the log has it; bounds are None where the log has no statistics."""

    path: str  # relative to the table's folder, as the log spells it
    size: int
    rows: int | None
    period: str | None
    since: date | datetime | None
    last: date | datetime | None
    first_subject: str | None
    last_subject: str | None


@dataclass(frozen=True)
class _Change:
    """What one commit does: rows it adds by period (made one period at a time), files it removes."""

    add: Iterable[tuple[str | None, pl.DataFrame]] = ()
    remove: Sequence[_File] = ()
    moves_rows: bool = True  # False for compaction, which changes no row


class DeltaStore:
    """A folder of Delta tables. Safe for several threads and several processes; writers take turns per table."""

    capabilities = CAPABILITIES

    def __init__(self, url: str, name: str):
        self.url = url
        self.name = name
        self._root = location.folder(url)
        # writers keep handles of their own: a commit is checked against the version that its handle has read, and a
        # reader that refreshed a shared handle in between would hide what another program committed
        self._held: dict[tuple[str, bool], tuple[deltalake.DeltaTable, tuple[int, ...]]] = {}

    # the table: creation, identity, shape

    def ensure(self, dataset: str, schema: Schema) -> str:
        evolution.check(dataset, schema)
        table = self._open(dataset)
        if table is None or _stored(table, dataset) != schema:
            folder = self._folder(dataset)
            folder.mkdir(parents=True, exist_ok=True)
            with self._locked(dataset):
                table = self._open(dataset, writing=True)
                if table is None:
                    self._create(folder, schema)
                else:
                    self._evolve(dataset, table, schema)
            table = self._table(dataset)
        return _property(table, dataset, _MARKER)

    def marker(self, dataset: str) -> str | None:
        table = self._open(dataset)
        return None if table is None else _property(table, dataset, _MARKER)

    def schema(self, dataset: str) -> Schema | None:
        table = self._open(dataset)
        return None if table is None else _stored(table, dataset)

    # writing

    def committed(self, dataset: str, lane: str) -> int:
        table = self._open(dataset)
        return 0 if table is None else table.transaction_version(lane) or 0

    def write(self, batch: Batch) -> Written:
        dataset = batch.dataset

        def decide(table: deltalake.DeltaTable, schema: Schema) -> tuple[_Change | None, Written]:
            if (table.transaction_version(batch.lane) or 0) >= batch.seq:
                return None, Written(already=True)
            frame, absent = self._admitted(dataset, batch.frame, batch.schema, schema)
            if batch.mode is Mode.APPEND:
                return _Change(cut(frame, schema)), Written(inserted=frame.height)
            return self._upsert(dataset, table, schema, frame, absent)

        return self._commit(dataset, decide, lane=batch.lane, seq=batch.seq)

    def replace(self, dataset: str, schema: Schema, frame: pl.DataFrame, span: Filter) -> Written:
        def decide(table: deltalake.DeltaTable, stored: Schema) -> tuple[_Change | None, Written]:
            put, absent = self._admitted(dataset, frame, schema, stored)
            inside = filters.expression(dataset, span, stored)
            if inside is not None and (outside := put.filter(~inside).height):
                raise SchemaError(f"{outside} of {put.height} rows to replace a span of {dataset} are outside of it")
            # a row with a key of the frame counts as well where it is outside of the span: a key exists once
            files = _files(table, stored)
            found = self._read(dataset, self._within(dataset, files, stored, span), stored, tag=True)
            found = (found if inside is None else found.filter(inside)).collect()
            moved = self._with_keys(dataset, files, stored, put)
            gone = found.join(put, on=list(stored.key), how="anti")
            split = classify.split(put, moved, stored, absent=absent, tag=_FILE)
            written = Written(split.new.height, split.changed.height, split.equal, deleted=gone.height)
            if not (split.new.height or split.changed.height or gone.height):
                return None, written
            import polars as pl

            touched = {*split.tags, *gone[_FILE].unique()}
            out = pl.concat([split.changed.select(stored.key), gone.select(stored.key)])
            return self._rewritten(dataset, files, stored, split, touched, out), written

        return self._commit(dataset, decide)

    # reading

    def scan(self, dataset: str, filter: Filter = Filter()) -> pl.LazyFrame:
        import polars as pl

        table = self._table(dataset)
        schema = _stored(table, dataset)
        names = filters.columns(dataset, filter, schema)
        frame = self._read(dataset, self._within(dataset, _files(table, schema), schema, filter), schema)
        condition = filters.expression(dataset, filter, schema)
        if condition is not None:
            frame = frame.filter(condition)
        types, physical = schema.polars(system=True), _physical(schema)
        return frame.select(pl.col(n) if types[n] == physical[n] else pl.col(n).cast(types[n]) for n in names)

    def arrow(self, dataset: str, filter: Filter = Filter()) -> Iterator[pa.RecordBatch]:
        return lazyframes.arrow(self.scan(dataset, filter))

    def watermarks(self, dataset: str) -> dict[str, datetime | date]:
        return lazyframes.watermarks(self.scan(dataset), dataset, self._schema(dataset))

    def count(self, dataset: str, filter: Filter = Filter()) -> int:
        if filter.subjects is None and filter.since is None and filter.until is None:
            table = self._table(dataset)
            rows = [file.rows for file in _files(table, _stored(table, dataset))]
            if None not in rows:
                return sum(row for row in rows if row is not None)
        return lazyframes.count(self.scan(dataset, filter))

    # the rest

    def delete(self, dataset: str, filter: Filter) -> int:
        def decide(table: deltalake.DeltaTable, schema: Schema) -> tuple[_Change | None, Written]:
            inside = filters.expression(dataset, filter, schema)
            files = _files(table, schema)
            found = self._read(dataset, self._within(dataset, files, schema, filter), schema, tag=True)
            found = (found if inside is None else found.filter(inside)).select(*schema.key, _FILE).collect()
            if found.is_empty():
                return None, Written()
            none = self._read(dataset, [], schema).collect()
            touched = set(found[_FILE].unique())
            change = self._rewritten(dataset, files, schema, classify.Split(none, none, 0, []), touched, found)
            return change, Written(deleted=found.height)

        return self._commit(dataset, decide).deleted

    def datasets(self) -> list[str]:
        logs = self._root.glob("*/*/_delta_log")
        return sorted(f"{log.parent.parent.name}.{log.parent.name}" for log in logs)

    def info(self, dataset: str) -> TableInfo:
        table = self._table(dataset)
        files = _files(table, _stored(table, dataset))
        return TableInfo(
            dataset,
            rows=self.count(dataset),
            bytes=sum(file.size for file in files),
            files=len(files),
            commits=table.version() + 1,
            location=str(self._folder(dataset)),
        )

    def query(self, sql: str) -> pl.DataFrame:
        return lazyframes.query(sql, self.datasets(), self.scan)

    def maintain(self, dataset: str) -> str:
        with self._locked(dataset):
            table = self._table(dataset, writing=True)
            schema = _stored(table, dataset)
            before = _files(table, schema)
            small = [file for file in before if (file.rows or 0) < FILE_ROWS // 2]
            groups = [files for files in _by_period(small).values() if len(files) > 1]
            self._merge(dataset, table, schema, groups)
            table.update_incremental()
            after = _files(table, schema)
            removed = table.vacuum(dry_run=False, full=True)
            table.create_checkpoint()
            self._held.clear()
        return (
            f"{dataset}: {len(before)} files became {len(after)}, {len(removed)} files that no reader "
            f"of the last {_KEEP_REMOVED_FILES.days} day can need were deleted"
        )

    def close(self) -> None:
        self._held.clear()

    # how it is done

    def _folder(self, dataset: str) -> Path:
        return self._root.joinpath(*location.split(dataset))

    def _locked(self, dataset: str):
        return locks.exclusive(self._folder(dataset) / _LOCK, f"the Delta table of {dataset}")

    def _open(self, dataset: str, *, writing: bool = False) -> deltalake.DeltaTable | None:
        """Return the table at its newest version, or None when there is none; `writing` is for under the lock."""
        from deltalake import DeltaTable
        from deltalake.exceptions import DeltaError, TableNotFoundError

        folder = self._folder(dataset)
        held = self._held.pop((dataset, writing), None)
        if not (folder / "_delta_log").is_dir():
            return None
        try:
            # a handle on a table that was dropped and made anew would commit its old version numbers into the new one
            if held is not None and _stamp(folder, held[0]) == held[1]:
                table = held[0]
                if _entry(folder, table.version() + 1).exists():
                    table.update_incremental()
            else:
                table = DeltaTable(folder)
        except TableNotFoundError:
            return None
        except (DeltaError, OSError) as error:
            raise StoreError(f"the Delta table of {dataset} in {folder} cannot be opened: {error}") from error
        protocol = table.protocol()
        if protocol.min_reader_version > 1:
            raise StoreError(
                f"the Delta table of {dataset} in {folder} was given features by another program that rewrite what its "
                f"files say ({', '.join(protocol.reader_features or []) or 'column mapping'}); restore the version "
                "before that, or drop the table and let it be filled again"
            )
        self._held[dataset, writing] = (table, _stamp(folder, table))
        return table

    def _table(self, dataset: str, *, writing: bool = False) -> deltalake.DeltaTable:
        table = self._open(dataset, writing=writing)
        if table is None:
            raise StoreError(f"there is no Delta table of {dataset} in {self._folder(dataset)}; call ensure first")
        return table

    def _schema(self, dataset: str) -> Schema:
        return _stored(self._table(dataset), dataset)

    def _admitted(
        self, dataset: str, frame: pl.DataFrame, sent: Schema, stored: Schema
    ) -> tuple[pl.DataFrame, list[str]]:
        """Return the frame, past the gate, as the data files will have it, and the columns it does not know."""
        frame = gate.admit(dataset, frame, sent, self.capabilities)
        frame, absent = evolution.fit(dataset, frame, sent, stored)
        physical = _physical(stored)
        # strict, and after the gate nothing is lost
        return (frame if frame.schema == physical else frame.cast(physical)), absent  # pyright: ignore[reportArgumentType]

    def _create(self, folder: Path, schema: Schema) -> None:
        from deltalake import DeltaTable

        DeltaTable.create(
            folder,
            _delta_schema(schema),
            partition_by=[] if schema.period is Period.NONE else [PERIOD_COLUMN],
            configuration={
                _MARKER: uuid.uuid4().hex,
                _SCHEMA: evolution.to_text(schema),
                "delta.checkpointInterval": str(_CHECKPOINT_EVERY_COMMITS),
                "delta.deletedFileRetentionDuration": f"interval {_KEEP_REMOVED_FILES.days} days",
            },
            raise_if_key_not_exists=False,
        )
        _sync(_entry(folder, 0))
        for level in (folder / "_delta_log", folder, folder.parent, folder.parent.parent):
            _sync(level)

    def _evolve(self, dataset: str, table: deltalake.DeltaTable, schema: Schema) -> None:
        stored = _stored(table, dataset)
        if stored == schema:
            return
        evolution.added(dataset, stored, schema)
        # two commits; after a crash between them the columns are there and the property is not, so look at both
        there = {column.name for column in table.schema().fields}
        new = [column for column in _delta_schema(schema).fields if column.name not in there]
        if new:
            table.alter.add_columns(new)
        table.alter.set_table_properties({_SCHEMA: evolution.to_text(schema)}, raise_if_not_exists=False)

    def _upsert(
        self, dataset: str, table: deltalake.DeltaTable, schema: Schema, frame: pl.DataFrame, absent: Sequence[str]
    ) -> tuple[_Change, Written]:
        """Return what puts the batch in: nothing for equal rows, new files, or files with changed rows rewritten."""
        files = _files(table, schema)
        split = classify.split(frame, self._with_keys(dataset, files, schema, frame), schema, absent=absent, tag=_FILE)
        written = Written(split.new.height, split.changed.height, split.equal)
        return self._rewritten(dataset, files, schema, split, set(split.tags), split.changed), written

    def _with_keys(self, dataset: str, files: Sequence[_File], schema: Schema, frame: pl.DataFrame) -> pl.DataFrame:
        """Return the rows that have a key of the frame, with `_FILE`; only files and row groups that can are read."""
        import polars as pl

        if frame.is_empty():
            return self._read(dataset, [], schema, tag=True).collect()
        conditions: list[pl.Expr] = []
        if schema.time is not None and schema.time in schema.key:
            periods = {period for period, _ in cut(frame.select(schema.time), schema)}
            low, high = frame[schema.time].min(), frame[schema.time].max()
            files = [f for f in files if f.period in periods and _overlaps(low, high, f.since, f.last)]
            conditions += [pl.col(schema.time) >= low, pl.col(schema.time) <= high]
        if schema.subject is not None and schema.subject in schema.key:
            names = frame[schema.subject].unique().sort()
            low, high = names[0], names[-1]
            files = [f for f in files if _overlaps(low, high, f.first_subject, f.last_subject)]
            conditions += [pl.col(schema.subject) >= low, pl.col(schema.subject) <= high]
            conditions.append(pl.col(schema.subject).is_in(names.implode()))
        found = self._read(dataset, files, schema, tag=True)
        if conditions:
            found = found.filter(*conditions)
        return found.join(frame.lazy().select(schema.key), on=list(schema.key), how="semi").collect()

    def _rewritten(
        self,
        dataset: str,
        files: Sequence[_File],
        schema: Schema,
        split: classify.Split,
        touched: set[str],
        gone: pl.DataFrame,
    ) -> _Change:
        """Return the change that takes the rows with a key in `gone` out of the `touched` files and puts `split` in."""
        import polars as pl

        put = dict(cut(pl.concat([split.new, split.changed]), schema))
        folder = self._folder(dataset)
        removed = [file for file in files if str(folder / unquote(file.path)) in touched]
        keys = gone.lazy().select(schema.key)

        def rows() -> Iterator[tuple[str | None, pl.DataFrame]]:
            kept = _by_period(removed)
            for period in dict.fromkeys((*put, *kept)):
                parts = [put[period]] if period in put else []
                if period in kept:
                    read = self._read(dataset, kept[period], schema)
                    parts.append(read.join(keys, on=list(schema.key), how="anti").collect())
                together = pl.concat(parts)
                yield period, _sorted(together, schema) if period in kept else together

        return _Change(rows(), removed)

    def _within(self, dataset: str, files: Sequence[_File], schema: Schema, filter: Filter) -> list[_File]:
        """Return the files that can hold a row of the filter, by period and statistics."""
        since, until = filters.bounds(dataset, filter, schema)
        first, last = filters.periods(dataset, filter, schema)
        subjects = filters.subjects(dataset, filter, schema)
        if subjects == []:
            return []
        low, high = (None, None) if subjects is None else (subjects[0], subjects[-1])
        return [
            file
            for file in files
            if (first is None or file.period is None or file.period >= first)
            and (last is None or file.period is None or file.period <= last)
            and _overlaps(since, until, file.since, file.last)
            and _overlaps(low, high, file.first_subject, file.last_subject)
        ]

    def _read(self, dataset: str, files: Sequence[_File], schema: Schema, *, tag: bool = False) -> pl.LazyFrame:
        """Return the rows of the files as the files keep them; `tag` adds the column `_FILE` with each row's file."""
        import polars as pl

        types = _physical(schema)
        if not files:
            return pl.LazyFrame(schema={**types, _FILE: pl.String()} if tag else types)
        folder = self._folder(dataset)
        return pl.scan_parquet(
            [folder / unquote(file.path) for file in files],
            schema=types,
            missing_columns="insert",
            extra_columns="ignore",
            hive_partitioning=False,
            glob=False,
            include_file_paths=_FILE if tag else None,
        )

    def _commit(
        self,
        dataset: str,
        decide: Callable[[deltalake.DeltaTable, Schema], tuple[_Change | None, Written]],
        *,
        lane: str | None = None,
        seq: int = 0,
    ) -> Written:
        """Take the table's lock, let `decide` say what to do, write the files, commit, see it on the disk.

        Our writers take turns by the lock. A foreign one does not, so a commit that would not be the very next
        version is refused by deltalake; it is then decided again from the newer version.
        """
        from deltalake import CommitProperties, Transaction
        from deltalake.exceptions import CommitFailedError

        # without `last_updated` the entry has no age, so no retention setting can make a lane forgotten
        seen = [Transaction(lane, seq)] if lane is not None else None
        if not (self._folder(dataset) / "_delta_log").is_dir():
            self._table(dataset)
        with self._locked(dataset):
            for _ in range(_ATTEMPTS):
                table = self._table(dataset, writing=True)
                schema = _stored(table, dataset)
                change, written = decide(table, schema)
                if change is None:
                    return written
                try:
                    self._put(dataset, table, schema, change, CommitProperties(None, 0, seen))
                except CommitFailedError:
                    continue
                self._tidy(dataset, schema, table.version() + 1, written.inserted + written.updated)
                return written
        raise StoreError(
            f"the Delta table of {dataset} in {self._folder(dataset)} is being changed by another program faster than "
            f"this one can follow ({_ATTEMPTS} attempts); let that program end and run again"
        )

    def _put(self, dataset: str, table: deltalake.DeltaTable, schema: Schema, change: _Change, properties: Any) -> None:
        """Write the change's files, commit them with the removals, and see everything on the disk.

        `table` stays at the version before; `_open` brings it on.
        """
        from deltalake.exceptions import CommitFailedError
        from deltalake.transaction import RemoveAction

        folder = self._folder(dataset)
        now = time.time_ns() // 1_000_000
        adds = [
            _written(folder, period, part, schema, now, moves_rows=change.moves_rows)
            for period, rows in change.add
            for part in rows.iter_slices(FILE_ROWS)
            if part.height
        ]
        paths = [folder / add.path for add in adds]
        for level in (*paths, *{path.parent for path in paths}, *([folder] if paths else [])):
            _sync(level)
        removes = [
            RemoveAction(file.path, change.moves_rows, now, file.size, _partition(file.period))
            for file in change.remove
        ]
        try:
            table.create_write_transaction(
                [*adds, *removes],
                mode="append",
                schema=table.schema(),
                partition_by=[] if schema.period is Period.NONE else [PERIOD_COLUMN],
                commit_properties=properties,
            )
        except CommitFailedError:
            for path in paths:
                path.unlink(missing_ok=True)
            raise
        _sync(_entry(folder, table.version() + 1))
        _sync(folder / "_delta_log")

    def _tidy(self, dataset: str, schema: Schema, version: int, rows: int) -> None:
        """Merge small files of a period where enough of one class have gathered (see `_CLASS_FILES`)."""
        from deltalake.exceptions import CommitFailedError

        if version % _LOOK_EVERY_COMMITS:
            return
        table = self._table(dataset, writing=True)
        budget = max(_COMPACT_ROWS, _COMPACT_TIMES * rows)
        groups: list[list[_File]] = []
        for files in _by_period(_files(table, schema)).values():
            for low, high in pairwise((0, *_CLASS_ROWS)):
                small = [file for file in files if file.rows is not None and low <= file.rows < high]
                cost = sum((file.rows or 0) + _OPENING_ROWS for file in small)
                if len(small) >= _CLASS_FILES and cost <= budget:
                    budget -= cost
                    groups.append(small)
        # when another program was faster, the next look finds the files again
        with suppress(CommitFailedError):
            self._merge(dataset, table, schema, groups)

    def _merge(self, dataset: str, table: deltalake.DeltaTable, schema: Schema, groups: list[list[_File]]) -> None:
        """Make of each group (files of one period) one file, or a few full ones, all in one commit."""
        from deltalake import CommitProperties

        if not groups:
            return
        merged = ((files[0].period, _sorted(self._read(dataset, files, schema).collect(), schema)) for files in groups)
        change = _Change(merged, [file for files in groups for file in files], moves_rows=False)
        self._put(dataset, table, schema, change, CommitProperties(None, 0))


def open_url(url: str, name: str) -> DeltaStore:
    """Return the store of the URL; the folder is made when the first table is."""
    return DeltaStore(url, name)


def _entry(folder: Path, version: int) -> Path:
    return folder / "_delta_log" / f"{version:020d}.json"


def _stamp(folder: Path, table: deltalake.DeltaTable) -> tuple[int, ...]:
    """Return what tells this table's newest log entry from one with the same number in a table made anew."""
    try:
        status = _entry(folder, table.version()).stat()
    except OSError:
        return ()
    return table.version(), status.st_mtime_ns, status.st_size, status.st_ino


def _property(table: deltalake.DeltaTable, dataset: str, key: str) -> str:
    value = table.metadata().configuration.get(key)
    if value is None:
        raise StoreError(
            f"the Delta table in {table.table_uri} was not made by MarketSync, so it has no {key}; "
            f"move it elsewhere, and {dataset} will be made and filled"
        )
    return value


def _stored(table: deltalake.DeltaTable, dataset: str) -> Schema:
    return evolution.from_text(_property(table, dataset, _SCHEMA))


def _delta_schema(schema: Schema) -> deltalake.Schema:
    from deltalake import Field
    from deltalake import Schema as DeltaSchema
    from deltalake.schema import PrimitiveType

    fields = [
        Field(
            column.name,
            PrimitiveType(_DELTA_TYPES[column.type]),
            nullable=column.name not in schema.key,
            metadata={"comment": column.description} if column.description else None,
        )
        for column in schema.columns
    ]
    fields += [Field(SEGMENT_COLUMN, PrimitiveType("string")), Field(INGESTED_COLUMN, PrimitiveType("timestamp"))]
    if schema.period is not Period.NONE:
        fields.append(Field(PERIOD_COLUMN, PrimitiveType("string")))
    return DeltaSchema(fields)


def _physical(schema: Schema) -> dict[str, pl.DataType]:
    """Return the polars type of each column in the data files: Delta has neither unsigned integers nor nanoseconds."""
    import polars as pl

    types = schema.polars(system=True)
    for column in schema.columns:
        if column.type is ColumnType.U64:
            types[column.name] = pl.Int64()
        elif column.type is ColumnType.DATETIME_NS:
            types[column.name] = pl.Datetime("us", "UTC")
    return types


def _sorted(rows: pl.DataFrame, schema: Schema) -> pl.DataFrame:
    """Return the rows by subject, time and key: neighbours compress well, and statistics then skip most row groups."""
    order = [name for name in (schema.subject, schema.time, *schema.key) if name is not None]
    return rows.sort(list(dict.fromkeys(order)))


def _files(table: deltalake.DeltaTable, schema: Schema) -> list[_File]:
    import polars as pl

    actions = pl.DataFrame(table.get_add_actions(flatten=True))

    def values(name: str) -> Iterable[Any]:
        return actions[name].to_list() if name in actions.columns else [None] * actions.height

    columns = [
        values("path"),
        values("size_bytes"),
        values("num_records"),
        values(f"partition.{PERIOD_COLUMN}"),
        values(f"min.{schema.time}"),
        values(f"max.{schema.time}"),
        values(f"min.{schema.subject}"),
        values(f"max.{schema.subject}"),
    ]
    return [_File(*row) for row in zip(*columns, strict=True)]


def _partition(period: str | None) -> dict[str, str | None]:
    return {} if period is None else {PERIOD_COLUMN: period}


def _by_period(files: Iterable[_File]) -> dict[str | None, list[_File]]:
    grouped: dict[str | None, list[_File]] = {}
    for file in files:
        grouped.setdefault(file.period, []).append(file)
    return grouped


def _overlaps(low: Any, high: Any, first: Any, last: Any) -> bool:
    """Tell whether [low, high] can meet [first, last]; None is an end that is not known."""
    if isinstance(last, datetime):
        last += timedelta(milliseconds=1)  # the format lets a writer cut statistics to milliseconds
    return (low is None or last is None or low <= last) and (high is None or first is None or first <= high)


def _written(
    folder: Path, period: str | None, rows: pl.DataFrame, schema: Schema, now: int, *, moves_rows: bool
) -> Any:
    """Write one data file and return the log's entry for it, with the statistics that scans and upserts prune by."""
    import io

    from deltalake.transaction import AddAction

    path = f"part-{uuid.uuid4().hex}.parquet"
    if period is not None:
        path = f"{PERIOD_COLUMN}={period}/{path}"
        (folder / path).parent.mkdir(exist_ok=True)
    # through memory: cheaper than a file opened by polars when a batch falls into many small files
    buffer = io.BytesIO()
    rows.write_parquet(buffer, compression="zstd", compression_level=1, row_group_size=_ROW_GROUP_ROWS)
    content = buffer.getbuffer()
    (folder / path).write_bytes(content)
    pruned = [name for name in (schema.subject, schema.time) if name is not None]
    statistics = {
        "numRecords": rows.height,
        "minValues": {name: _statistic(rows[name].min()) for name in pruned},
        "maxValues": {name: _statistic(rows[name].max()) for name in pruned},
        "nullCount": {name: rows[name].null_count() for name in pruned},
    }
    for side in ("minValues", "maxValues"):
        statistics[side] = {name: value for name, value in statistics[side].items() if value is not None}
    return AddAction(
        path,
        len(content),
        _partition(period),
        now,
        moves_rows,
        json.dumps(statistics, ensure_ascii=False),
    )


def _statistic(value: Any) -> str | None:
    if isinstance(value, datetime):
        return value.isoformat(timespec="microseconds").replace("+00:00", "Z")
    return value.isoformat() if isinstance(value, date) else value


def _sync(path: Path) -> None:
    """Wait until the file's content, or the folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
