"""Delta Lake tables in a folder: `delta://./folder`, one table per dataset in `<folder>/<provider>/<dataset>`.

The Parquet files are written by polars as `parts.py` decides; deltalake keeps the log. One commit holds the files a
batch adds, the files it replaces and the lane's `seq` (an application transaction), so rows and `seq` become durable
together, and a reader sees all of a batch or nothing.

Partition column `_period` ('2001', '2001-03', '2001-03-05') is the period of the time column; scans do not show it.
Marker and schema are table properties. Not here: pyarrow, whose import would cost more than the import of deltalake.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from marketsync.errors import ForeignTable, StoreError
from marketsync.schema import INGESTED_COLUMN, SEGMENT_COLUMN, ColumnType, Period, Schema
from storage import admission, adoption, evolution, fingerprints, lazyframes, location, locks
from storage.adoption import Adoption, Wish
from storage.evolution import PERIOD_COLUMN
from storage.files import made, sync
from storage.parts import LOOK_EVERY_COMMITS, Change, Part, Parts, describe, encode
from storage.protocol import Batch, Capabilities, Filter, Mode, TableInfo, Writers, Written

if TYPE_CHECKING:
    import deltalake
    import polars as pl
    import pyarrow as pa
    from deltalake.transaction import AddAction

CAPABILITIES = Capabilities(
    atomic=True,
    transactions=True,
    nanoseconds=False,
    nan=True,
    unsigned_64=False,
    nul=True,
    evolve=True,
    writers=Writers.MANY_PROCESSES,
    why="nanoseconds: Delta timestamps are microseconds; declare the column i64 to keep finer ones. "
    "unsigned_64: Delta has no unsigned integers, values above 2**63 - 1 are refused; declare the column str.",
)

_CHECKPOINT_EVERY_COMMITS = 10  # commits since the last checkpoint make every open and commit dearer
# A reader that opened the table this long ago can still read its files after `maintain`.
_KEEP_REMOVED_FILES = timedelta(days=1)
_ATTEMPTS = 20

_LOCK = "_marketsync.lock"
_MARKER = "marketsync.marker"
_DATASET = "marketsync.dataset"  # earlier tables do not say it before they are made sure of
_SCHEMA = "marketsync.schema"

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
        if table is None or _stored(table, dataset) != schema or not _is_told(table):
            folder = made(self._folder(dataset))
            with self._locked(dataset):
                table = self._open(dataset, writing=True)
                if table is None:
                    self._create(folder, dataset, schema)
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

        def decide(table: deltalake.DeltaTable, schema: Schema) -> tuple[Change | None, Written]:
            if (table.transaction_version(batch.lane) or 0) >= batch.seq:
                return None, Written(already=True)
            frame, absent = self._admitted(dataset, batch.frame, batch.schema, schema)
            parts = self._parts(dataset, table, schema, listed=batch.mode is not Mode.APPEND)
            return parts.append(frame) if batch.mode is Mode.APPEND else parts.upsert(frame, absent)

        return self._commit(dataset, decide, lane=batch.lane, seq=batch.seq)

    def replace(self, dataset: str, schema: Schema, frame: pl.DataFrame, span: Filter) -> Written:
        def decide(table: deltalake.DeltaTable, stored: Schema) -> tuple[Change | None, Written]:
            put, absent = self._admitted(dataset, frame, schema, stored)
            return self._parts(dataset, table, stored).replace(put, absent, span)

        return self._commit(dataset, decide)

    # reading

    def scan(self, dataset: str, filter: Filter = Filter()) -> pl.LazyFrame:
        return self._now(dataset).scan(filter)

    def arrow(self, dataset: str, filter: Filter = Filter()) -> Iterator[pa.RecordBatch]:
        parts = self._now(dataset)
        with parts.reading():
            yield from lazyframes.arrow(parts.scan(filter))

    def watermarks(self, dataset: str) -> dict[str, datetime | date]:
        parts = self._now(dataset)
        with parts.reading():
            return lazyframes.watermarks(parts.scan(Filter()), dataset, parts.schema)

    def count(self, dataset: str, filter: Filter = Filter()) -> int:
        return self._now(dataset).count(filter)

    def fingerprints(self, dataset: str, recipe: fingerprints.Recipe, filter: Filter = Filter()) -> pl.DataFrame:
        with self._now(dataset).reading():
            return fingerprints.by_scan(self, dataset, recipe, filter)

    # the rest

    def delete(self, dataset: str, filter: Filter) -> int:
        def decide(table: deltalake.DeltaTable, schema: Schema) -> tuple[Change | None, Written]:
            return self._parts(dataset, table, schema).delete(filter)

        return self._commit(dataset, decide).deleted

    def datasets(self) -> list[str]:
        logs = self._root.glob("*/*/_delta_log")
        return sorted(f"{log.parent.parent.name}.{log.parent.name}" for log in logs)

    def info(self, dataset: str) -> TableInfo:
        table = self._table(dataset)
        parts = self._parts(dataset, table, _stored(table, dataset))
        return TableInfo(
            dataset,
            rows=parts.count(Filter()),
            bytes=sum(part.size for part in parts.parts),
            files=len(parts.parts),
            commits=table.version() + 1,
            location=str(parts.folder),
        )

    def version(self) -> str:
        return lazyframes.library("deltalake")

    def query(self, sql: str) -> pl.DataFrame:
        with lazyframes.reading("a table that the query names", self._root):
            return lazyframes.query(sql, self.datasets(), self.scan)

    def maintain(self, dataset: str) -> str:
        from deltalake import CommitProperties

        with self._locked(dataset):
            table = self._table(dataset, writing=True)
            schema = _stored(table, dataset)
            before = self._parts(dataset, table, schema)
            if (change := before.merge_all()) is not None:
                self._put(dataset, table, schema, change, CommitProperties(None, 0))
                table.update_incremental()
            after = self._parts(dataset, table, schema)
            removed = table.vacuum(dry_run=False, full=True)
            table.create_checkpoint()
            self._held.clear()
        return (
            f"{dataset}: {len(before.parts)} files became {len(after.parts)}, {len(removed)} files that no reader "
            f"of the last {_KEEP_REMOVED_FILES.days} day can need were deleted"
        )

    def close(self) -> None:
        self._held.clear()

    def adopt(self, dataset: str, schema: Schema, wish: Wish) -> Adoption:
        """Copy a Delta table into one of ours (see `storage/adoption.py`): ours is cut by period, with files that have
        our columns only, so that a change can rewrite a few of them."""
        from deltalake import DeltaTable
        from deltalake.exceptions import DeltaError

        from storage import adoption_copies as copies

        with suppress(ForeignTable):
            if self.marker(dataset) is not None:
                return copies.already(self, dataset, schema, wish, str(self._folder(dataset)))
        place = self._folder(dataset) if wish.table is None else self._root / Path(wish.table).expanduser()
        if not DeltaTable.is_deltatable(str(place)):
            raise copies.none_there(self._root, dataset, [place], "no Delta table")
        self._held.clear()
        with copies.reading(place, DeltaError):
            return copies.copied(
                dataset,
                schema,
                wish,
                copies.files_source(str(place), _foreign(place)),
                self.capabilities,
                lambda frames: copies.exchanged(
                    self._root,
                    dataset,
                    schema,
                    place,
                    lambda at: DeltaStore(f"delta://{at}", ""),
                    ["/".join(location.split(dataset))],
                    frames,
                ),
            )

    # how it is done

    def _folder(self, dataset: str) -> Path:
        return location.below(self._root, dataset)

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
            _property(table, dataset, _MARKER)
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
            raise location.absent("Delta table", dataset, self._folder(dataset))
        return table

    def _now(self, dataset: str) -> Parts:
        table = self._table(dataset)
        return self._parts(dataset, table, _stored(table, dataset))

    def _parts(self, dataset: str, table: deltalake.DeltaTable, schema: Schema, *, listed: bool = True) -> Parts:
        return Parts(
            dataset, self._folder(dataset), schema, _physical(schema), _listed(table, schema) if listed else ()
        )

    def _admitted(
        self, dataset: str, frame: pl.DataFrame, sent: Schema, stored: Schema
    ) -> tuple[pl.DataFrame, list[str]]:
        """Return the frame, admitted, as the data files will have it, and the columns it does not know."""
        frame = admission.admit(dataset, frame, sent, self.capabilities)
        frame, absent = evolution.fit(dataset, frame, sent, stored)
        physical = _physical(stored)
        # strict, and after admission nothing is lost
        return (frame if frame.schema == physical else frame.cast(physical)), absent  # pyright: ignore[reportArgumentType]

    def _create(self, folder: Path, dataset: str, schema: Schema) -> None:
        from deltalake import DeltaTable

        DeltaTable.create(
            folder,
            _delta_schema(schema),
            partition_by=[] if schema.period is Period.NONE else [PERIOD_COLUMN],
            configuration={
                _MARKER: uuid.uuid4().hex,
                _DATASET: dataset,
                _SCHEMA: evolution.to_text(schema),
                "delta.checkpointInterval": str(_CHECKPOINT_EVERY_COMMITS),
                "delta.deletedFileRetentionDuration": f"interval {_KEEP_REMOVED_FILES.days} days",
            },
            raise_if_key_not_exists=False,
        )
        sync(_entry(folder, 0))
        for level in (folder / "_delta_log", folder, folder.parent, folder.parent.parent):
            sync(level)

    def _evolve(self, dataset: str, table: deltalake.DeltaTable, schema: Schema) -> None:
        stored = _stored(table, dataset)
        if stored == schema and _is_told(table):
            return
        evolution.added(dataset, stored, schema)
        # two commits; after a crash between them the columns are there and the property is not, so look at both
        there = {column.name for column in table.schema().fields}
        new = [column for column in _delta_schema(schema).fields if column.name not in there]
        if new:
            table.alter.add_columns(new)
        properties = {_DATASET: dataset, _SCHEMA: evolution.to_text(schema)}
        table.alter.set_table_properties(properties, raise_if_not_exists=False)

    def _commit(
        self,
        dataset: str,
        decide: Callable[[deltalake.DeltaTable, Schema], tuple[Change | None, Written]],
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

    def _put(self, dataset: str, table: deltalake.DeltaTable, schema: Schema, change: Change, properties: Any) -> None:
        """Write the change's files, commit them with the removals, and see everything on the disk.

        `table` stays at the version before; `_open` brings it on.
        """
        from deltalake.exceptions import CommitFailedError
        from deltalake.transaction import RemoveAction

        folder = self._folder(dataset)
        now = time.time_ns() // 1_000_000
        adds = [_written(folder, period, rows, schema, now, change.moves_rows) for period, rows in change.pieces()]
        paths = [folder / add.path for add in adds]
        for level in (*paths, *{path.parent for path in paths}, *([folder] if paths else [])):
            sync(level)
        removes = [
            RemoveAction(part.path, change.moves_rows, now, part.size, _partition(part.period))
            for part in change.remove
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
        sync(_entry(folder, table.version() + 1))
        sync(folder / "_delta_log")

    def _tidy(self, dataset: str, schema: Schema, version: int, rows: int) -> None:
        from deltalake import CommitProperties
        from deltalake.exceptions import CommitFailedError

        if version % LOOK_EVERY_COMMITS:
            return
        table = self._table(dataset, writing=True)
        change = self._parts(dataset, table, schema).merge_gathered(rows)
        # when another program was faster, the next look finds the parts again
        if change is not None:
            with suppress(CommitFailedError):
                self._put(dataset, table, schema, change, CommitProperties(None, 0))


def open_url(url: str, name: str) -> DeltaStore:
    """Return the store of the URL; the folder is made when the first table is."""
    return DeltaStore(url, name)


def _foreign(place: Path) -> pl.LazyFrame:
    """Return the rows of a table that another program made, of any version that polars can read."""
    import polars as pl
    from deltalake import DeltaTable

    class Table(DeltaTable):
        """polars takes for paths what deltalake says: of a file with the folder as in a URL (`a%20b`), and of a list of
        deleted rows with all of the file as in a URL, where it would not find the list."""

        def file_uris(self, *args: Any, **options: Any) -> list[str]:
            root = urlsplit(self.table_uri).path
            found = super().file_uris(*args, **options)
            return [f"{unquote(root)}{each.removeprefix(root)}" if each.startswith(root) else each for each in found]

        def deletion_vectors(self) -> Any:
            found = pl.DataFrame(super().deletion_vectors())
            files = [unquote(urlsplit(each).path) for each in found["filepath"]]
            return found.with_columns(pl.Series("filepath", files, pl.String()))

    return pl.scan_delta(Table(place))


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
    properties = table.metadata().configuration
    adoption.refuse_copy(table.table_uri, properties.get(_DATASET, dataset), dataset)
    value = properties.get(key)
    if value is None:
        raise ForeignTable(
            f"the Delta table in {table.table_uri} was not made by MarketSync, so it has no {key}: "
            f"{adoption.remedy(dataset)}; or move it elsewhere, and {dataset} will be made and filled"
        )
    return value


def _is_told(table: deltalake.DeltaTable) -> bool:
    return _DATASET in table.metadata().configuration


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


def _listed(table: deltalake.DeltaTable, schema: Schema) -> list[Part]:
    """Return the table's files, with the statistics that the log has of them."""
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
    return [Part(*row) for row in zip(*columns, strict=True)]


def _partition(period: str | None) -> dict[str, str | None]:
    return {} if period is None else {PERIOD_COLUMN: period}


def _written(
    folder: Path, period: str | None, rows: pl.DataFrame, schema: Schema, now: int, moves_rows: bool
) -> AddAction:
    """Write one data file and return the log's entry for it, with the statistics that scans and upserts prune by."""
    from deltalake.transaction import AddAction

    path = f"part-{uuid.uuid4().hex}.parquet"
    if period is not None:
        path = f"{PERIOD_COLUMN}={period}/{path}"
        (folder / path).parent.mkdir(exist_ok=True)
    content = encode(rows)
    (folder / path).write_bytes(content)
    part = describe(path, len(content), rows, period, schema)
    ends = {schema.time: (part.since, part.last), schema.subject: (part.first_subject, part.last_subject)}
    known = {name: pair for name, pair in ends.items() if name is not None and pair[0] is not None}
    statistics = {
        "numRecords": rows.height,
        "minValues": {name: _statistic(first) for name, (first, _) in known.items()},
        "maxValues": {name: _statistic(last) for name, (_, last) in known.items()},
        "nullCount": {name: rows[name].null_count() for name in ends if name is not None},
    }
    return AddAction(path, part.size, _partition(period), now, moves_rows, json.dumps(statistics, ensure_ascii=False))


def _statistic(value: Any) -> str:
    if isinstance(value, datetime):
        return value.isoformat(timespec="microseconds").replace("+00:00", "Z")
    return value.isoformat() if isinstance(value, date) else value
