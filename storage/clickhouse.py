"""ClickHouse tables on a server: `clickhouse://user@host:8123/`, over HTTP through clickhouse-connect.

A provider is a database, a dataset a `ReplacingMergeTree` ordered by the key and cut by the period of the time column.
Every write is an insert: a changed row is a later version of its key, a deleted row a version that says so. Reads are
`FINAL`, which shows the last version. A batch is inserted first and its lane's `seq` after it, so a batch that comes
again after a crash adds versions that say the same. Marker and schema are the table's comment.

The tables of the engine inside this process (`storage/chdb.py`) are the same, and are made and used here, too.
"""

from __future__ import annotations

import io
import json
import re
import threading
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, date, datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, unquote, urlsplit

from marketsync.errors import AdoptionRefused, ConfigurationError, ForeignTable, QueryRefused, SchemaError, StoreError
from marketsync.schema import INGESTED_COLUMN, SEGMENT_COLUMN, SYSTEM_COLUMNS, Column, ColumnType, Period, Schema
from storage import (
    admission,
    adoption,
    classify,
    evolution,
    filters,
    fingerprint_sql,
    fingerprints,
    lazyframes,
    location,
    statements,
)
from storage.adoption import Adoption, Wish
from storage.clickhouse_adoption import literal as _literal
from storage.clickhouse_adoption import quoted as _quoted
from storage.protocol import Batch, Capabilities, Filter, Mode, TableInfo, Writers, Written

if TYPE_CHECKING:
    import polars as pl
    import pyarrow as pa
    from clickhouse_connect.driver.client import Client

# what Date32 and DateTime64 reach; the engine would move a value outside to the nearest end without a word
_FIRST, _LAST = date(1900, 1, 1), date(2299, 12, 31)

CAPABILITIES = Capabilities(
    atomic=False,
    transactions=False,
    nanoseconds=True,
    nan=True,
    unsigned_64=True,
    nul=True,
    evolve=True,
    writers=Writers.MANY_PROCESSES,
    days=(_FIRST, _LAST),
    why="atomic: a batch that falls into several partitions becomes visible one partition after the other; use "
    "delta:// when others read while we write. "
    "transactions: the engine has none for several statements; a batch is repeated until it is whole. "
    "days: its times reach from 1900 to 2299; declare the column str or i64.",
)

_COMMITS = "_marketsync_commits"
# '' where the database gives its tables none
_UUID = "if(uuid = toUUIDOrZero(''), '', toString(uuid))"
_VERSION = "_version"
_DELETED = "_deleted"
# more subjects than this are looked up by their range, so that a statement stays small
_LISTED_SUBJECTS = 1_000
# a scan asks for as many partitions at once as have about this many rows
_SCAN_ROWS = 1_048_576

_TYPES = {
    ColumnType.STR: ("String", "ZSTD(1)"),
    ColumnType.BOOL: ("Bool", "ZSTD(1)"),
    ColumnType.I32: ("Int32", "T64, ZSTD(1)"),
    ColumnType.I64: ("Int64", "T64, ZSTD(1)"),
    ColumnType.U64: ("UInt64", "T64, ZSTD(1)"),
    ColumnType.F32: ("Float32", "Gorilla, ZSTD(1)"),
    ColumnType.F64: ("Float64", "Gorilla, ZSTD(1)"),
    ColumnType.DATE: ("Date32", "DoubleDelta, ZSTD(1)"),
    ColumnType.DATETIME: ("DateTime64(6, 'UTC')", "DoubleDelta, ZSTD(1)"),
    ColumnType.DATETIME_NS: ("DateTime64(9, 'UTC')", "DoubleDelta, ZSTD(1)"),
}
_SYSTEM = (
    f"`{SEGMENT_COLUMN}` LowCardinality(String) CODEC(ZSTD(1))",
    f"`{INGESTED_COLUMN}` DateTime64(6, 'UTC') CODEC(DoubleDelta, ZSTD(1))",
    f"`{_VERSION}` UInt64 CODEC(DoubleDelta, ZSTD(1))",
    f"`{_DELETED}` UInt8 CODEC(ZSTD(1))",
)
_PARTITION = {Period.DAY: "toYYYYMMDD", Period.MONTH: "toYYYYMM", Period.YEAR: "toYear"}
_DURABLE = "fsync_after_insert = 1, fsync_part_directory = 1"
_LIMITED = ("read", "timeout", "result", "set", "join", "transfer", "group_by", "sort", "distinct")
SETTINGS = {
    # a user's profile may say otherwise, and then some of the rows, or old ones, would look like all of them
    **dict.fromkeys(("limit", "offset", "max_result_rows", "use_query_cache"), 0),
    **dict.fromkeys((f"{what}_overflow_mode" for what in _LIMITED), "throw"),
    "async_insert": 0,
    "max_partitions_per_insert_block": 0,
    "max_query_size": 64 * 1024 * 1024,
    "output_format_arrow_string_as_string": 1,
    # a batch has each key once, so nothing of it needs to be replaced before it is written
    "optimize_on_insert": 0,
}
# 2: the engine itself allows reading only, and settings of a statement's own
READING_SETTINGS = {**SETTINGS, "final": 1, "readonly": 2}
_TRUTH = {"true": True, "1": True, "false": False, "0": False}
_OPTIONS = {
    "secure": lambda text: _TRUTH[text.lower()],
    "verify": lambda text: _TRUTH[text.lower()],
    "ca_cert": str,
    "client_cert": str,
    "client_cert_key": str,
    "server_host_name": str,
    "connect_timeout": int,
    "send_receive_timeout": int,
}
# what is wrong with the text of a query, as the engine names it
_NOT_THE_STORE = re.compile(
    r"SYNTAX_ERROR|UNKNOWN_(?:TABLE|DATABASE|IDENTIFIER|FUNCTION)|READONLY|TYPE_MISMATCH|NOT_AN_AGGREGATE|"
    r"ILLEGAL_TYPE_OF_ARGUMENT|NO_COMMON_TYPE|NUMBER_OF_ARGUMENTS_DOESNT_MATCH"
)


class Server:
    """A ClickHouse that is reached over HTTP. Connects when it is first asked; `guard` lets one thread at a time decide
    what to insert, and insert it."""

    def __init__(self, place: str, options: dict[str, Any]):
        self.place = place  # as messages call it
        self.guard = threading.RLock()
        # dataset: the last version that was written here or found, and the time since which it was looked for, or None
        self.versions: dict[str, tuple[int, Any]] = {}
        self._options = options
        self._connecting = threading.Lock()
        self._clients: dict[bool, Client] = {}
        self._closed = False

    def client(self, *, reads: bool = False) -> Client:
        """Return the client, or the one that `reads` only; raises `StoreError` when the store was closed."""
        with self._connecting:
            if self._closed:
                raise StoreError(f"the store {self.place} was closed; open it again")
            if reads not in self._clients:
                import clickhouse_connect

                settings = READING_SETTINGS if reads else SETTINGS
                look = "is it up, and are host, port and user those of the URL?"
                with told(f"a connection to {self.place}", look):
                    self._clients[reads] = clickhouse_connect.get_client(**self._options, settings=settings)
            return self._clients[reads]

    def insert(self, table: str, rows: pl.DataFrame) -> None:
        """Insert the rows, all of which the engine has when this returns."""
        import polars as pl

        buffer = io.BytesIO()
        rows.write_ipc_stream(buffer, compat_level=pl.CompatLevel.oldest())
        with told("an insert"):
            self.client().raw_insert(
                table, column_names=rows.columns, insert_block=buffer.getvalue(), fmt="ArrowStream"
            )

    def microseconds(self) -> int:
        """Return the time on the server's clock, which all of its writers share."""
        with told("to tell the time"):
            said: Any = self.client().command("SELECT toUnixTimestamp64Micro(now64(6))")
        return int(said)

    def close(self) -> None:
        """Let go of the connections."""
        with self._connecting:
            self._closed = True
            for client in self._clients.values():
                client.close()
            self._clients.clear()


class ClickHouseStore:
    """Tables in one engine, a server or `storage.chdb`. Safe for several threads."""

    def __init__(self, url: str, name: str, engine: Server, capabilities: Capabilities = CAPABILITIES):
        self.url = url
        self.name = name
        self.capabilities = capabilities
        self._engine = engine

    # the table: creation, identity, shape

    def ensure(self, dataset: str, schema: Schema) -> str:
        evolution.check(dataset, schema)
        self._refuse_own_names(dataset, schema)
        provider, _ = location.split(dataset)
        with self._engine.guard:
            found = self._described(dataset)
            if found is None:
                self._create(dataset, schema, uuid.uuid4().hex)
                found = self._table(dataset)
            elif not self._has_commits(provider):
                self._begin_anew(provider)
                found = self._table(dataset)
            marker, stored = found
            if stored != schema:
                self._evolve(dataset, stored, schema, marker)
            elif not self._is_noted(dataset):
                self._note(dataset, marker, stored)
            return marker

    def marker(self, dataset: str) -> str | None:
        found = self._described(dataset)
        return None if found is None else found[0]

    def schema(self, dataset: str) -> Schema | None:
        found = self._described(dataset)
        return None if found is None else found[1]

    def unkept(self, dataset: str, schema: Schema) -> list[admission.Unkept]:
        self._refuse_own_names(dataset, schema)
        return []

    # writing

    def committed(self, dataset: str, lane: str) -> int:
        found = self._described(dataset)
        return 0 if found is None else self._committed(dataset, found[0], lane)

    def write(self, batch: Batch) -> Written:
        dataset = batch.dataset
        with self._engine.guard:
            marker, schema = self._table(dataset)
            if self._committed(dataset, marker, batch.lane) >= batch.seq:
                return Written(already=True)
            frame, absent = self._admitted(dataset, batch.frame, batch.schema, schema)
            if batch.mode is Mode.APPEND:
                rows, written = frame, Written(inserted=frame.height)
            else:
                split = classify.split(frame, self._with_keys(dataset, schema, frame), schema, absent=absent)
                rows, written = split.put, split.written()
            self._insert(dataset, schema, rows)
            self._commit(dataset, marker, batch.lane, batch.seq)
            return written

    def replace(self, dataset: str, schema: Schema, frame: pl.DataFrame, span: Filter) -> Written:
        with self._engine.guard:
            _, stored = self._table(dataset)
            put, absent = self._admitted(dataset, frame, schema, stored)
            filters.refuse_outside(dataset, put, span, stored)
            split = classify.split(put, self._with_keys(dataset, stored, put), stored, absent=absent)
            there = self._select(dataset, stored, [*stored.names, *SYSTEM_COLUMNS], self._where(dataset, stored, span))
            gone = there.join(put, on=list(stored.key), how="anti")
            self._insert(dataset, stored, split.put)
            self._insert(dataset, stored, gone, deleted=True)
            return split.written(deleted=gone.height)

    # reading

    def scan(self, dataset: str, filter: Filter = Filter()) -> pl.LazyFrame:
        import polars as pl
        from polars.io.plugins import register_io_source

        _, schema = self._table(dataset)
        types = schema.polars(system=True)
        names = filters.columns(dataset, filter, schema)
        where = self._where(dataset, schema, filter)

        def rows(
            columns: list[str] | None, predicate: pl.Expr | None, limit: int | None, _: int | None
        ) -> Iterator[pl.DataFrame]:
            asked = list(columns) if columns is not None else names
            if predicate is not None:
                asked = list(dict.fromkeys([*asked, *predicate.meta.root_names()]))
            left = limit
            for part in self._partitions(dataset, schema):
                frame = self._select(dataset, schema, asked, [*where, *part])
                if predicate is not None:
                    frame = frame.filter(predicate)
                if columns is not None:
                    frame = frame.select(columns)
                if left is not None:
                    frame = frame.head(left)
                    left -= frame.height
                yield frame
                if left == 0:
                    return

        return register_io_source(rows, schema=pl.Schema({name: types[name] for name in names}))

    def arrow(self, dataset: str, filter: Filter = Filter()) -> Iterator[pa.RecordBatch]:
        return lazyframes.arrow(self.scan(dataset, filter))

    def watermarks(self, dataset: str) -> dict[str, datetime | date]:
        _, schema = self._table(dataset)
        if schema.time is None:
            return lazyframes.watermarks(self.scan(dataset), dataset, schema)
        table, newest = _table_name(dataset), f"max({_quoted(schema.time)}) AS newest"
        deleted = self._frame(f"SELECT count() AS n FROM {table} WHERE {_DELETED} = 1")["n"][0]
        # versions of one key say the same of what is in the key, so the last version need not be looked for
        final = "FINAL" if deleted or not {schema.time, schema.subject} - {None} <= set(schema.key) else ""
        if schema.subject is None:
            rows, at = self._frame(f"SELECT count() AS n, {newest} FROM {table} {final}").row(0)
            return {lazyframes.EVERY_SUBJECT: at} if rows and at is not None else {}
        subject = _quoted(schema.subject)
        found = self._frame(f"SELECT {subject} AS subject, {newest} FROM {table} {final} GROUP BY {subject}")
        return {
            each: at
            for each, at in found.select("subject", "newest").iter_rows()
            if each is not None and at is not None
        }

    def count(self, dataset: str, filter: Filter = Filter()) -> int:
        _, schema = self._table(dataset)
        where = self._where(dataset, schema, filter)
        return int(self._frame(f"SELECT count() AS n FROM {_table_name(dataset)} FINAL {_all(where)}")["n"][0])

    def fingerprints(self, dataset: str, recipe: fingerprints.Recipe, filter: Filter = Filter()) -> pl.DataFrame:
        _, schema = self._table(dataset)
        plan = fingerprints.plan(dataset, recipe, schema)
        where = _all(self._where(dataset, schema, filter))
        said = fingerprint_sql.clickhouse(_quoted).statement(plan, f"{_table_name(dataset)} FINAL", where)
        # else the engine computes every case of every value, and takes one of them then
        said += " SETTINGS short_circuit_function_evaluation = 'force_enable'"
        return fingerprints.finished(plan, self._frame(said))

    # the rest

    def delete(self, dataset: str, filter: Filter) -> int:
        with self._engine.guard:
            _, schema = self._table(dataset)
            names = [*schema.names, *SYSTEM_COLUMNS]
            gone = self._select(dataset, schema, names, self._where(dataset, schema, filter))
            self._insert(dataset, schema, gone, deleted=True)
            return gone.height

    def datasets(self) -> list[str]:
        found = self._frame(
            "SELECT database, name FROM system.tables WHERE comment LIKE '{\"marketsync\":%' "
            f"AND ({_UUID} = '' OR JSONExtractString(comment, 'table') IN ('', {_UUID})) ORDER BY database, name"
        )
        return [f"{database}.{name}" for database, name in found.iter_rows()]

    def info(self, dataset: str) -> TableInfo:
        rows = self.count(dataset)
        found = self._frame(
            f"SELECT sum(bytes_on_disk) AS bytes, count() AS parts FROM system.parts WHERE active AND {_named(dataset)}"
        )
        return TableInfo(
            dataset,
            rows=rows,
            bytes=int(found["bytes"][0]),
            files=int(found["parts"][0]),
            commits=None,
            location=f"{self._engine.place}: {_table_name(dataset)}",
        )

    def version(self) -> str:
        return f"ClickHouse {self._frame('SELECT version() AS version')['version'][0]}"

    def query(self, sql: str) -> pl.DataFrame:
        try:
            return self._frame(statements.question(sql), reads=True)
        except StoreError as error:
            if _NOT_THE_STORE.search(str(error.__cause__ or error)):
                raise QueryRefused(f"{error}. Tables here: {', '.join(self.datasets()) or 'none'}") from error
            raise

    def adopt(self, dataset: str, schema: Schema, wish: Wish) -> Adoption:
        """Have the server copy a table that is there into one of ours (see `storage/adoption.py`), which then takes its
        name in one step."""
        from storage import clickhouse_adoption as taking
        from storage.adoption_sql import already

        evolution.check(dataset, schema)
        self._refuse_own_names(dataset, schema)
        with self._engine.guard, suppress(ForeignTable):
            if (found := self._described(dataset)) is not None:
                table, ask = _table_name(dataset), taking.dialect(self._frame)
                return already(ask, table, dataset, schema, wish, *found, rows=f"{table} FINAL")
        with self._engine.guard:
            place = taking.found(self._frame, dataset, wish)
            look = taking.look(self._frame, place, schema, wish)
            look.refuse()
            counts, notes = look.counts(), look.notes(adoption.LEFT)
            rows = int(counts["n"].sum())
            done = [f"{rows:,} rows are copied into a table of ours by the server; the original is kept"]
            if wish.dry:
                return Adoption(look.table, None, counts, done, notes, look.names.extra)
            marker, kept = uuid.uuid4().hex, look.table
            new = f"{dataset}__adopting"
            self._command(f"DROP TABLE IF EXISTS {_table_name(new)} SYNC")
            self._create(new, schema, marker)
            columns = [*look.fits, *SYSTEM_COLUMNS, _VERSION]
            at = f"toDateTime64('{wish.at:%Y-%m-%d %H:%M:%S.%f}', 6, 'UTC')"
            values = [*(fit.value for fit in look.fits.values()), _literal(wish.segment), at]
            values.append(str(self._engine.microseconds()))
            self._command(
                f"INSERT INTO {_table_name(new)} ({', '.join(map(_quoted, columns))}) "
                f"SELECT {', '.join(values)} FROM {place.rows}"
            )
            if (copied := self.count(new)) != rows:
                self._command(f"DROP TABLE {_table_name(new)} SYNC")
                raise AdoptionRefused(
                    look.table, [f"it had {rows:,} rows and then {copied:,}: somebody writes into it; let that end"]
                )
            renamed = f"{_table_name(new)} TO {_table_name(dataset)}"
            if look.table == _table_name(dataset):
                kept = _table_name(f"{dataset}_before_{wish.at:%Y%m%d_%H%M%S}")
                renamed = f"{look.table} TO {kept}, {renamed}"
            self._command(f"RENAME TABLE {renamed}")
            return Adoption(look.table, marker, counts, done, notes, look.names.extra, kept)

    def maintain(self, dataset: str) -> str:
        with self._engine.guard:
            self._table(dataset)
            before = self.info(dataset).files
            self._command(f"OPTIMIZE TABLE {_table_name(dataset)} FINAL SETTINGS optimize_skip_merged_partitions = 1")
            return f"{dataset}: {before} parts became {self.info(dataset).files}, with one version of each row"

    def close(self) -> None:
        self._engine.close()

    # how it is done

    def _command(self, sql: str) -> None:
        with told("a statement"):
            self._engine.client().command(sql)

    def _frame(self, sql: str, *, reads: bool = False) -> pl.DataFrame:
        import polars as pl

        with told("a query"):
            content = self._engine.client(reads=reads).raw_query(sql, fmt="ArrowStream")
        return pl.read_ipc_stream(content)

    def _described(self, dataset: str) -> tuple[str, Schema] | None:
        """Return the table's marker and schema; None when there is no table."""
        found = self._frame(f"SELECT comment, {_UUID} AS uuid FROM system.tables WHERE {_named(dataset, 'name')}")
        if found.is_empty():
            return None
        text, table = found.row(0)
        try:
            comment = json.loads(text)
            # a table made before uuids were noted has none in its comment
            if table and comment.get("table", table) != table:
                raise ValueError(f"the comment is that of the table {comment['table']}, and this is {table}")
            return comment["marketsync"], evolution.from_text(json.dumps(comment["schema"], ensure_ascii=False))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ForeignTable(
                f"the table {_table_name(dataset)} in {self._engine.place} was not made by MarketSync, or is a copy of "
                f"one that was; {adoption.remedy(dataset)}; or move it elsewhere (RENAME TABLE), and {dataset} will be "
                "made and filled"
            ) from error

    def _table(self, dataset: str) -> tuple[str, Schema]:
        found = self._described(dataset)
        if found is None:
            raise location.absent("ClickHouse table", dataset, self._engine.place)
        return found

    def _refuse_own_names(self, dataset: str, schema: Schema) -> None:
        taken = [name for name in schema.names if name.lower() in (_VERSION, _DELETED)]
        if taken:
            raise SchemaError(
                f"the schema of {dataset} cannot become a table: the column name {taken[0]!r} is reserved"
            )

    def _create(self, dataset: str, schema: Schema, marker: str) -> None:
        provider, _ = location.split(dataset)
        columns = [_column(column, schema) for column in schema.columns]
        key = ", ".join(_quoted(name) for name in schema.key)
        cut = ""
        # versions of one key must meet in one partition, so a table is cut only by what its key has
        if schema.period is not Period.NONE and schema.time in schema.key:
            cut = f"PARTITION BY {_PARTITION[schema.period]}({_quoted(schema.time)})"
        self._command(f"CREATE DATABASE IF NOT EXISTS {_quoted(provider)}")
        self._create_commits(provider)
        self._command(
            # who comes second finds the table of who came first
            f"CREATE TABLE IF NOT EXISTS {_table_name(dataset)} ({', '.join((*columns, *_SYSTEM))}) "
            f"ENGINE = ReplacingMergeTree({_VERSION}, {_DELETED}) {cut} ORDER BY ({key}) "
            f"SETTINGS {_DURABLE} COMMENT {_literal(_comment(marker, schema))}"
        )
        marker, schema = self._table(dataset)
        self._note(dataset, marker, schema)

    def _create_commits(self, provider: str) -> None:
        self._command(
            f"CREATE TABLE IF NOT EXISTS {_quoted(provider)}.{_COMMITS} (marker String, lane String, seq UInt64) "
            f"ENGINE = ReplacingMergeTree(seq) ORDER BY (marker, lane) SETTINGS {_DURABLE}"
        )

    def _has_commits(self, provider: str) -> bool:
        where = f"database = {_literal(provider)} AND name = {_literal(_COMMITS)}"
        return not self._frame(f"SELECT name FROM system.tables WHERE {where}").is_empty()

    def _begin_anew(self, provider: str) -> None:
        """Give the tables of a provider whose commits somebody dropped other markers, since nobody knows any more which
        batches they have."""
        for dataset in self.datasets():
            if location.split(dataset)[0] == provider:
                self._note(dataset, uuid.uuid4().hex, self._table(dataset)[1])
        self._create_commits(provider)

    def _is_noted(self, dataset: str) -> bool:
        """Return whether the table's comment says which one it is; one that was made before uuids were noted does not,
        nor one whose making broke off."""
        where = f"({_UUID} = '' OR JSONHas(comment, 'table')) AND {_named(dataset, 'name')}"
        return not self._frame(f"SELECT name FROM system.tables WHERE {where}").is_empty()

    def _note(self, dataset: str, marker: str, schema: Schema) -> None:
        """Write into the table's comment what it is, with its uuid: it keeps that when it is renamed, and a copy, which
        gets the same comment, has another one."""
        found = self._frame(f"SELECT {_UUID} AS uuid FROM system.tables WHERE {_named(dataset, 'name')}")
        comment = _comment(marker, schema, found["uuid"][0])
        self._command(f"ALTER TABLE {_table_name(dataset)} MODIFY COMMENT {_literal(comment)}")

    def _evolve(self, dataset: str, stored: Schema, schema: Schema, marker: str) -> None:
        new = {column.name for column in evolution.added(dataset, stored, schema)}
        before, now = set(evolution.required(stored)), set(evolution.required(schema))
        previous = "FIRST"
        for column in schema.columns:
            if column.name in new:
                self._command(
                    f"ALTER TABLE {_table_name(dataset)} ADD COLUMN IF NOT EXISTS {_column(column, schema)} {previous}"
                )
            elif column.name in before and column.name not in now:
                self._command(f"ALTER TABLE {_table_name(dataset)} MODIFY COLUMN {_column(column, schema)}")
            previous = f"AFTER {_quoted(column.name)}"
        # the comment last: until it is there, the columns are added again, which does nothing
        self._note(dataset, marker, schema)

    def _admitted(
        self, dataset: str, frame: pl.DataFrame, sent: Schema, stored: Schema
    ) -> tuple[pl.DataFrame, list[str]]:
        return evolution.fit(dataset, admission.admit(dataset, frame, sent, self.capabilities), sent, stored)

    def _with_keys(self, dataset: str, schema: Schema, frame: pl.DataFrame) -> pl.DataFrame:
        """Return at least the rows that have a key of the frame, by its subjects and its range of times, without the
        system columns, which nobody compares."""
        where: list[str] = []
        if frame.is_empty():
            where.append("0")
        elif schema.time is not None and schema.time in schema.key:
            where += _between(schema, frame[schema.time].min(), frame[schema.time].max())
        if schema.subject is not None and schema.subject in schema.key and frame.height:
            subjects = frame[schema.subject].unique().sort().to_list()
            name = _quoted(schema.subject)
            if len(subjects) <= _LISTED_SUBJECTS:
                where.append(_among(name, subjects))
            else:
                where.append(f"{name} >= {_literal(subjects[0])} AND {name} <= {_literal(subjects[-1])}")
        return self._select(dataset, schema, schema.names, where)

    def _where(self, dataset: str, schema: Schema, filter: Filter) -> list[str]:
        since, until = filters.bounds(dataset, filter, schema)
        subjects = filters.subjects(dataset, filter, schema)
        where: list[str] = []
        if since is not None and _day(since) >= _FIRST:
            where.append("0" if _day(since) > _LAST else f"{_quoted(schema.time)} >= {_instant(since, schema)}")
        if until is not None and _day(until) <= _LAST:
            where.append("0" if _day(until) < _FIRST else f"{_quoted(schema.time)} < {_instant(until, schema)}")
        if subjects is not None:
            where.append(_among(_quoted(schema.subject), subjects) if subjects else "0")
        return where

    def _partitions(self, dataset: str, schema: Schema) -> list[list[str]]:
        """Return conditions that together mean the whole table, each for partitions of about `_SCAN_ROWS` rows."""
        if schema.period is Period.NONE or schema.time not in schema.key:
            return [[]]
        found = self._frame(
            f"SELECT partition_id, sum(rows) AS n FROM system.parts WHERE active AND {_named(dataset)} "
            "GROUP BY partition_id ORDER BY partition_id"
        )
        groups: list[list[str]] = [[]]
        size = 0
        for partition, rows in found.select("partition_id", "n").iter_rows():
            if size and size + rows > _SCAN_ROWS:
                groups.append([])
                size = 0
            groups[-1].append(partition)
            size += rows
        return [[_among("_partition_id", group)] for group in groups] if len(groups) > 1 else [[]]

    def _select(self, dataset: str, schema: Schema, names: Sequence[str], where: Sequence[str]) -> pl.DataFrame:
        import polars as pl

        types = schema.polars(system=True)
        if not names:
            count = self._frame(f"SELECT count() AS n FROM {_table_name(dataset)} FINAL {_all(where)}")["n"][0]
            return pl.DataFrame(height=int(count))
        columns = ", ".join(_quoted(name) for name in names)
        found = self._frame(f"SELECT {columns} FROM {_table_name(dataset)} FINAL {_all(where)}")
        return found.cast({name: types[name] for name in names})  # pyright: ignore[reportArgumentType]

    def _insert(self, dataset: str, schema: Schema, rows: pl.DataFrame, *, deleted: bool = False) -> None:
        import polars as pl

        if rows.is_empty():
            return
        last, since = self._last_version(dataset, schema, rows)
        # later than every version before, also when the clock was set back
        version = max(self._engine.microseconds(), last + 1)
        self._engine.versions[dataset] = version, since
        rows = rows.with_columns(
            pl.lit(version, pl.UInt64()).alias(_VERSION), pl.lit(int(deleted), pl.UInt8()).alias(_DELETED)
        )
        self._engine.insert(_table_name(dataset), rows)

    def _last_version(self, dataset: str, schema: Schema, rows: pl.DataFrame) -> tuple[int, Any]:
        """Return the last version that a key of these rows can have, and since which time it was looked for: since
        theirs, where the time is part of the key, so that new rows cost no more the more old ones there are."""
        last, since = self._engine.versions.get(dataset, (-1, None))
        where, first = [], None
        if schema.time is not None and schema.time in schema.key:
            first = rows[schema.time].min()
            where = _between(schema, first, since)
        if last >= 0 and (first is None or first >= since):
            return last, since
        found = self._frame(f"SELECT max({_VERSION}) AS last FROM {_table_name(dataset)} {_all(where)}")["last"][0]
        return max(int(found or 0), last), first

    def _commit(self, dataset: str, marker: str, lane: str, seq: int) -> None:
        provider, _ = location.split(dataset)
        self._command(
            f"INSERT INTO {_quoted(provider)}.{_COMMITS} (marker, lane, seq) "
            f"SELECT {_literal(marker)}, {_literal(lane)}, {seq}"
        )

    def _committed(self, dataset: str, marker: str, lane: str) -> int:
        provider, _ = location.split(dataset)
        found = self._frame(
            f"SELECT max(seq) AS seq FROM {_quoted(provider)}.{_COMMITS} "
            f"WHERE marker = {_literal(marker)} AND lane = {_literal(lane)}"
        )
        return int(found["seq"][0] or 0)


def open_url(url: str, name: str) -> ClickHouseStore:
    """Open `clickhouse://user:password@host:8123/`; options of the query are those of clickhouse-connect, as `secure`,
    `verify`, `ca_cert`, `connect_timeout`. Raises `ConfigurationError` for a URL or an option that cannot be meant."""
    parts = urlsplit(url)
    options: dict[str, Any] = dict(parse_qsl(parts.query, keep_blank_values=True))
    if unknown := sorted(set(options) - set(_OPTIONS)):
        raise ConfigurationError(
            f"the store {name}: there is no option {unknown[0]!r}; options: {', '.join(sorted(_OPTIONS))}"
        )
    if not parts.hostname or parts.path.strip("/"):
        raise ConfigurationError(
            f"the store {name} is written clickhouse://user:password@host:8123/, without a database: each provider "
            "becomes one"
        )
    try:
        options = {option: _OPTIONS[option](text) for option, text in options.items()}
        port = parts.port
    except (ValueError, KeyError) as error:
        raise ConfigurationError(
            f"the store {name}: {error.args[0]!r} is not what an option or a port can be"
        ) from error
    options |= {"host": parts.hostname, "username": unquote(parts.username or "default"), "port": port}
    options |= {"password": unquote(parts.password or ""), "autogenerate_session_id": False, "compress": False}
    place = f"clickhouse://{parts.netloc.rpartition('@')[2]}"
    at = place if port else f"{place}:{8443 if options.get('secure') else 8123}"
    return ClickHouseStore(f"{place}/", name, Server(at, {"connect_timeout": 10, **options}))


@contextmanager
def told(what: str, look: str = "") -> Iterator[None]:
    """Turn what the engine raises into a `StoreError` that says what to `look` at, without its stack trace, and of
    trouble with the network only what the system says."""
    from clickhouse_connect.driver.exceptions import ClickHouseError

    try:
        yield
    except ClickHouseError as error:
        first: BaseException = error
        while first.__cause__ is not None:
            first = first.__cause__
        why = next(iter(str(first).splitlines()), type(first).__name__)
        raise StoreError(f"ClickHouse refused {what}: {why}{look and f'; {look}'}") from error


def _comment(marker: str, schema: Schema, table: str = "") -> str:
    noted = f'"table": {json.dumps(table)}, ' if table else ""
    return f'{{"marketsync": {json.dumps(marker)}, {noted}"schema": {evolution.to_text(schema)}}}'


def _column(column: Column, schema: Schema) -> str:
    type_, codec = _TYPES[column.type]
    if column.name not in evolution.required(schema):
        type_ = f"Nullable({type_})"
    if column.name == schema.subject:
        type_ = f"LowCardinality({type_})"
    return f"{_quoted(column.name)} {type_} CODEC({codec})"


def _table_name(dataset: str) -> str:
    return ".".join(_quoted(part) for part in location.split(dataset))


def _named(dataset: str, column: str = "table") -> str:
    provider, name = location.split(dataset)
    return f"database = {_literal(provider)} AND {column} = {_literal(name)}"


def _among(expression: str, values: Sequence[str]) -> str:
    return f"{expression} IN ({', '.join(map(_literal, values))})"


def _all(conditions: Sequence[str]) -> str:
    return f"WHERE {' AND '.join(conditions)}" if conditions else ""


def _day(bound: date | datetime) -> date:
    return bound.date() if isinstance(bound, datetime) else bound


def _between(schema: Schema, first: Any, last: Any) -> list[str]:
    """Return the conditions for times from the first to the last, without an end for None."""
    time = _quoted(schema.time)
    where = [f"{time} >= {_instant(first, schema)}"]
    # Python cuts nanoseconds, so the end is one microsecond later
    return where if last is None else [*where, f"{time} <= {_instant(last, schema, later=True)}"]


def _instant(value: Any, schema: Schema, *, later: bool = False) -> str:
    """Return the value as a literal of the time column's type."""
    type_ = schema[schema.time or ""].type
    if type_ is ColumnType.DATE:
        return f"toDate32('{value.isoformat()}')"
    scale = 9 if type_ is ColumnType.DATETIME_NS else 6
    text = value.astimezone(UTC).replace(tzinfo=None).isoformat(" ", "microseconds")
    if scale == 9:
        text += "999" if later else "000"
    return f"toDateTime64('{text}', {scale}, 'UTC')"
