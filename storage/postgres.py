"""PostgreSQL tables: `postgresql://user@host/database`, written by COPY, read as Arrow by ADBC.

A provider is a schema, a dataset a table with its key as primary key. A batch is one transaction, the lane's `seq` in
it: rows go by COPY into the table, or into a temporary one from which `ON CONFLICT` takes what is new or differs.
Marker and schema are the table's comment. Options of the URL are libpq's (sslmode, sslrootcert, ...), and one of ours:
`partition=month` or `year` cuts tables that are made from then on by the time in their key.
"""

from __future__ import annotations

import itertools
import json
import re
import threading
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, date, datetime, timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

from marketsync.document import closest
from marketsync.errors import (
    AdoptionRefused,
    ConfigurationError,
    ForeignTable,
    QueryRefused,
    SchemaConflict,
    SchemaError,
    StoreError,
)
from marketsync.schema import INGESTED_COLUMN, SEGMENT_COLUMN, SYSTEM_COLUMNS, Column, ColumnType, Schema
from storage import (
    admission,
    adoption,
    evolution,
    filters,
    fingerprint_sql,
    fingerprints,
    lazyframes,
    location,
    statements,
)
from storage.adoption import Adoption, Wish
from storage.protocol import Batch, Capabilities, Filter, Mode, TableInfo, Writers, Written

if TYPE_CHECKING:
    import polars as pl
    import psycopg
    import pyarrow as pa
    from adbc_driver_postgresql import dbapi

CAPABILITIES = Capabilities(
    atomic=True,
    transactions=True,
    nanoseconds=False,
    nan=True,
    unsigned_64=True,
    nul=False,
    evolve=True,
    writers=Writers.MANY_PROCESSES,
    why="nanoseconds: the engine keeps microseconds; declare the column i64 to keep the count of nanoseconds. "
    "nul: the engine's text ends at a NUL character.",
)

_COMMITS = "_marketsync_commits"
_STAGE = "_marketsync_stage"
_LONGEST_NAME = 63  # bytes; the engine would cut a longer one without a word
_OWN_NAMES = {"tableoid", "ctid", "xmin", "xmax", "cmin", "cmax"}
_COPIED_ROWS = 50_000
_LISTED_SUBJECTS = 1_000
_PARTITIONS = ("none", "month", "year")
_PARTITION = re.compile(r"(.+)_p\d{4}(?:_\d\d)?")

_TYPES = {
    # bytes decide equality and order, whatever the database's locale
    ColumnType.STR: 'text COLLATE "C"',
    ColumnType.BOOL: "boolean",
    ColumnType.I32: "integer",
    ColumnType.I64: "bigint",
    ColumnType.U64: "numeric(20, 0)",
    ColumnType.F32: "real",
    ColumnType.F64: "double precision",
    ColumnType.DATE: "date",
    ColumnType.DATETIME: "timestamp with time zone",
    ColumnType.DATETIME_NS: "timestamp with time zone",
}
_SYSTEM = {SEGMENT_COLUMN: 'text COLLATE "C"', INGESTED_COLUMN: "timestamp with time zone"}
_SENT = {ColumnType.F32: "float4send", ColumnType.F64: "float8send"}
Cursor = Any  # psycopg's own takes texts that are known when the program is written, and tables have names
_UNKEPT = (
    "the database's encoding has no such character: make one that has them all (CREATE DATABASE ... ENCODING 'UTF8' "
    "TEMPLATE template0), and name that in the URL"
)
# what is wrong with the text of a query: syntax error or access rule violation, data exception
_NOT_THE_STORE = re.compile(r"42|22|0A|25006")


class PostgresStore:
    """Tables of one database. Threads share one connection for writing, one after the other; each scan has its own."""

    capabilities = CAPABILITIES

    def __init__(self, url: str, name: str, address: str, partition: str):
        self.url = url
        self.name = name
        self._address = address
        self._partition = partition
        self._lock = threading.RLock()
        self._open: psycopg.Connection | None = None
        self._closed = False
        self._quoting: bool | None = None  # known when the server was asked

    # the table: creation, identity, shape

    def ensure(self, dataset: str, schema: Schema) -> str:
        evolution.check(dataset, schema)
        self._refuse_names(dataset, schema)
        with self._transaction(f"making the table of {dataset}") as cursor:
            # two processes that create one table at once would each find it missing
            cursor.execute("SELECT pg_advisory_xact_lock(hashtextextended(%s, 0))", [f"marketsync:{dataset}"])
            found = self._described(cursor, dataset)
            if found is None:
                marker = uuid.uuid4().hex
                self._create(cursor, dataset, schema, marker)
                return marker
            marker, stored = self._rooted(cursor, dataset, *found)
            if stored != schema:
                self._evolve(cursor, dataset, stored, schema, marker)
            return marker

    def marker(self, dataset: str) -> str | None:
        with self._transaction(f"looking for {dataset}") as cursor:
            found = self._described(cursor, dataset)
        return None if found is None else found[0]

    def schema(self, dataset: str) -> Schema | None:
        with self._transaction(f"looking for {dataset}") as cursor:
            found = self._described(cursor, dataset)
        return None if found is None else found[1]

    def unkept(self, dataset: str, schema: Schema) -> list[admission.Unkept]:
        self._refuse_names(dataset, schema)
        return []

    # writing

    def committed(self, dataset: str, lane: str) -> int:
        with self._transaction(f"reading the lanes of {dataset}") as cursor:
            found = self._described(cursor, dataset)
            return 0 if found is None else _committed(cursor, dataset, found[0], lane)

    def write(self, batch: Batch) -> Written:
        dataset = batch.dataset
        with self._transaction(f"writing to {dataset}") as cursor:
            marker, schema = self._table(cursor, dataset)
            if _committed(cursor, dataset, marker, batch.lane) >= batch.seq:
                return Written(already=True)
            frame, absent = self._admitted(dataset, batch.frame, batch.schema, schema)
            written = Written()
            if frame.height:
                self._make_partitions(cursor, dataset, schema, frame)
                if batch.mode is Mode.APPEND and not _triggers(cursor, dataset):
                    self._copy(cursor, _table_name(dataset), frame)
                    written = Written(inserted=frame.height)
                else:
                    self._stage(cursor, dataset, frame, schema.key)
                    written = self._upsert(cursor, dataset, schema, frame.height, absent)
            _commit(cursor, dataset, marker, batch.lane, batch.seq)
            return written

    def replace(self, dataset: str, schema: Schema, frame: pl.DataFrame, span: Filter) -> Written:
        with self._transaction(f"replacing rows of {dataset}") as cursor:
            _, stored = self._table(cursor, dataset)
            put, absent = self._admitted(dataset, frame, schema, stored)
            filters.refuse_outside(dataset, put, span, stored)
            self._make_partitions(cursor, dataset, stored, put)
            self._stage(cursor, dataset, put, stored.key)
            cursor.execute(f"ANALYZE {_STAGE}")
            same = " AND ".join(f"s.{_quoted(name)} = t.{_quoted(name)}" for name in stored.key)
            gone = [*self._where(dataset, stored, span), f"NOT EXISTS (SELECT FROM {_STAGE} s WHERE {same})"]
            deleted = cursor.execute(f"DELETE FROM {_table_name(dataset)} t {_all(gone)}").rowcount
            written = self._upsert(cursor, dataset, stored, put.height, absent)
            return written + Written(deleted=deleted)

    def delete(self, dataset: str, filter: Filter) -> int:
        with self._transaction(f"deleting rows of {dataset}") as cursor:
            _, schema = self._table(cursor, dataset)
            where = self._where(dataset, schema, filter)
            return cursor.execute(f"DELETE FROM {_table_name(dataset)} {_all(where)}").rowcount

    # reading

    def scan(self, dataset: str, filter: Filter = Filter()) -> pl.LazyFrame:
        with self._transaction(f"reading {dataset}") as cursor:
            _, schema = self._table(cursor, dataset)
        types = schema.polars(system=True)
        names = filters.columns(dataset, filter, schema)
        where = self._where(dataset, schema, filter)

        def read(shown: Sequence[str], most: int | None) -> Iterator[pl.DataFrame]:
            said = f"SELECT {', '.join(map(_quoted, shown))} FROM {_table_name(dataset)} {_all(where)}"
            if most is not None:
                said += f" LIMIT {most}"
            for frame in self._frames(said, f"reading {dataset}"):
                yield _typed(frame, {name: types[name] for name in shown})

        return lazyframes.scan(names, types, read)

    def arrow(self, dataset: str, filter: Filter = Filter()) -> Iterator[pa.RecordBatch]:
        return lazyframes.arrow(self.scan(dataset, filter))

    def watermarks(self, dataset: str) -> dict[str, datetime | date]:
        with self._transaction(f"reading the watermarks of {dataset}") as cursor:
            _, schema = self._table(cursor, dataset)
            if schema.time is None:
                raise SchemaError(f"{dataset} has no time column, so it has no watermarks")
            table, time = _table_name(dataset), _quoted(schema.time)
            if schema.subject is None:
                newest = cursor.execute(f"SELECT max({time}) FROM {table}").fetchone()
                return {} if newest is None or newest[0] is None else {lazyframes.EVERY_SUBJECT: _utc(newest[0])}
            subject = _quoted(schema.subject)
            if tuple(schema.key[:2]) == (schema.subject, schema.time):
                # one probe of the primary key for each subject, however many rows it has
                said = (
                    f"WITH RECURSIVE each AS ((SELECT {subject} AS s FROM {table} ORDER BY 1 LIMIT 1) UNION ALL "
                    f"SELECT (SELECT {subject} FROM {table} WHERE {subject} > each.s ORDER BY 1 LIMIT 1) FROM each "
                    f"WHERE each.s IS NOT NULL) SELECT s, (SELECT max({time}) FROM {table} WHERE {subject} = each.s) "
                    "FROM each WHERE s IS NOT NULL"
                )
            else:
                said = f"SELECT {subject}, max({time}) FROM {table} GROUP BY {subject}"
            return {
                each: _utc(newest) for each, newest in cursor.execute(said) if each is not None and newest is not None
            }

    def count(self, dataset: str, filter: Filter = Filter()) -> int:
        with self._transaction(f"counting the rows of {dataset}") as cursor:
            _, schema = self._table(cursor, dataset)
            where = self._where(dataset, schema, filter)
            return _one(cursor, f"SELECT count(*) FROM {_table_name(dataset)} {_all(where)}")

    def fingerprints(self, dataset: str, recipe: fingerprints.Recipe, filter: Filter = Filter()) -> pl.DataFrame:
        import polars as pl

        with self._transaction(f"reading {dataset}") as cursor:
            _, schema = self._table(cursor, dataset)
        plan = fingerprints.plan(dataset, recipe, schema)
        where = _all(self._where(dataset, schema, filter))
        said = fingerprint_sql.postgres(_quoted).statement(plan, _table_name(dataset), where)
        return fingerprints.finished(plan, pl.concat(self._frames(said, f"computing fingerprints of {dataset}")))

    # the rest

    def datasets(self) -> list[str]:
        with self._transaction("listing the tables") as cursor:
            found = cursor.execute(
                "SELECT n.nspname, c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace "
                "WHERE c.relkind IN ('r', 'p') AND obj_description(c.oid, 'pg_class') LIKE '{\"marketsync\":%%' "
                "ORDER BY 1, 2"
            )
            return [f"{provider}.{name}" for provider, name in found]

    def info(self, dataset: str) -> TableInfo:
        rows = self.count(dataset)
        with self._transaction(f"measuring {dataset}") as cursor:
            found = cursor.execute(
                "SELECT sum(pg_total_relation_size(relid))::bigint, count(*) FILTER (WHERE isleaf) "
                "FROM pg_partition_tree(%s::regclass)",
                [_table_name(dataset)],
            ).fetchone()
            size, parts = found or (None, 0)
            if size is None:
                size = _one(cursor, "SELECT pg_total_relation_size(%s::regclass)", [_table_name(dataset)])
        return TableInfo(
            dataset,
            rows=rows,
            bytes=int(size),
            files=max(1, int(parts)),
            commits=None,
            location=f"{self.url}: {_table_name(dataset)}",
        )

    def version(self) -> str:
        with self._transaction("asking for the version") as cursor:
            said = cursor.execute("SHOW server_version").fetchone()
        return f"PostgreSQL {said[0].partition(' ')[0]}"

    def query(self, sql: str) -> pl.DataFrame:
        import polars as pl
        import pyarrow as pa

        said = statements.question(sql)
        try:
            if re.match(r"(--[^\n]*\n|/\*.*?\*/|\s)*(SHOW|EXPLAIN)\b", said, re.IGNORECASE | re.DOTALL):
                return self._shown(said)
            # the driver puts it into brackets, which a comment at its end would take in
            found = list(self._frames(f"{said}\n", "a query", read_only=True))
        except StoreError as error:
            state = getattr(error.__cause__, "sqlstate", None) or ""
            if _NOT_THE_STORE.match(state) or isinstance(error.__cause__, pa.ArrowInvalid):
                raise QueryRefused(f"{error}. Tables here: {', '.join(self.datasets()) or 'none'}") from error
            raise
        answer = pl.concat(found) if found else pl.DataFrame()
        _refuse_far(answer)
        return answer

    def adopt(self, dataset: str, schema: Schema, wish: Wish) -> Adoption:
        """Make a table that is there ours in place, in one transaction (see `storage/adoption.py`)."""
        import psycopg

        from storage import postgres_adoption as taking
        from storage.adoption_sql import already

        evolution.check(dataset, schema)
        self._refuse_names(dataset, schema)
        with self._transaction(f"adopting the table of {dataset}") as cursor:
            cursor.execute("SELECT pg_advisory_xact_lock(hashtextextended(%s, 0))", [f"marketsync:{dataset}"])
            with suppress(ForeignTable):
                if (found := self._described(cursor, dataset)) is not None:
                    if not wish.dry:
                        found = self._rooted(cursor, dataset, *found)
                    table = _table_name(dataset)
                    ask = taking.dialect(cursor, None, table)
                    return already(ask, table, dataset, schema, wish, *found)
            place = taking.found(cursor, dataset, wish)
            look = taking.look(cursor, place, schema, wish, _TYPES)
            if not wish.dry:
                cursor.execute(f"LOCK TABLE {look.table} IN ACCESS EXCLUSIVE MODE")
            try:
                look.refuse()
                counts = look.counts()
                marker = None if wish.dry else uuid.uuid4().hex
                done = taking.statements(look, place, dataset, _TYPES, _SYSTEM)
                if marker is not None:
                    self._make_room(cursor, dataset)
                    for statement in done:
                        cursor.execute(statement)
                    self._describe(cursor, dataset, schema, marker)
            except (psycopg.DataError, psycopg.NotSupportedError) as error:  # the latter: a view has such a column
                raise AdoptionRefused(look.table, [" ".join(str(error).split())]) from error
            return Adoption(look.table, marker, counts, done, look.notes(adoption.STAYS), look.names.extra)

    def maintain(self, dataset: str) -> str:
        with self._lock, self._told(f"vacuuming {dataset}"):
            with self._transaction(f"vacuuming {dataset}") as cursor:
                self._table(cursor, dataset)
            connection = self._connection()
            connection.autocommit = True
            try:
                cursor: Cursor = connection.cursor()
                cursor.execute(f"VACUUM (ANALYZE) {_table_name(dataset)}")
            finally:
                connection.autocommit = False
        return f"{dataset}: vacuumed and analysed"

    def close(self) -> None:
        with self._lock:
            self._closed = True
            if self._open is not None:
                self._open.close()
                self._open = None

    # how it is done

    def _connection(self) -> psycopg.Connection:
        import psycopg

        if self._closed:
            raise StoreError(f"the store {self.url} was closed; open it again")
        if self._open is None or self._open.closed or self._open.broken:
            self._open = psycopg.connect(self._address)
            # writers wait for one another, and then see what the other has done
            self._open.isolation_level = psycopg.IsolationLevel.READ_COMMITTED
            said = self._open.execute(
                "SELECT set_config('TimeZone', 'UTC', false), set_config('standard_conforming_strings', 'on', false), "
                "set_config('DateStyle', 'ISO, YMD', false), current_setting('quote_all_identifiers')"
            ).fetchone()
            # ADBC asks the server for the names of its types, and knows none in quotes
            self._quoting = said is not None and said[3] == "on"
            self._open.commit()
        return self._open

    @contextmanager
    def _told(self, what: str) -> Iterator[None]:
        """Turn what the driver raises into a `StoreError` that says what was being done, and where."""
        import psycopg

        try:
            yield
        except psycopg.Error as error:
            why = " ".join(str(error).split())
            raise StoreError(f"PostgreSQL {self.url}, {what}: {why}{_remedy(error, why)}") from error
        except UnicodeError as error:
            raise StoreError(f"PostgreSQL {self.url}, {what}: {error}; {_UNKEPT}") from error

    @contextmanager
    def _transaction(self, what: str) -> Iterator[Cursor]:
        with self._lock, self._told(what):
            connection = self._connection()
            with connection.transaction(), connection.cursor() as cursor:
                yield cursor

    def _frames(self, sql: str, what: str, *, read_only: bool = False) -> Iterator[pl.DataFrame]:
        """Yield the rows of a statement as they come from the server, in batches."""
        import pyarrow as pa
        from adbc_driver_manager import Error

        if self._quoting is None:
            with self._lock, self._told(what):
                self._connection()
        try:
            with _adbc(self._address, quoting=bool(self._quoting)) as connection, connection.cursor() as cursor:
                if read_only:
                    cursor.execute("SET default_transaction_read_only = on")
                    connection.commit()
                cursor.execute(sql)
                reader = cursor.fetch_record_batch()
                if read_only:
                    _refuse_odd(reader.schema)
                given = False
                for part in reader:
                    given = True
                    yield _plain(pa.Table.from_batches([part]))
                if not given:
                    yield _plain(reader.schema.empty_table())
        except (Error, pa.ArrowException) as error:  # the latter while rows are coming
            why = " ".join(str(error).split())
            raise StoreError(f"PostgreSQL {self.url}, {what}: {why}") from error

    def _shown(self, sql: str) -> pl.DataFrame:
        """Return what SHOW and EXPLAIN say, as texts: they are no queries to COPY, by which ADBC reads."""
        import polars as pl
        import psycopg

        with self._told("a query"), psycopg.connect(self._address) as connection:
            connection.read_only = True
            cursor: Cursor = connection.execute(sql)  # pyright: ignore[reportArgumentType, reportCallIssue]
            answer = cursor.pgresult
            columns = {
                answer.fname(at).decode(): [
                    None if (said := answer.get_value(row, at)) is None else said.decode()
                    for row in range(answer.ntuples)
                ]
                for at in range(answer.nfields)
            }
            return pl.DataFrame(columns, schema=dict.fromkeys(columns, pl.String()))

    def _described(self, cursor: Cursor, dataset: str) -> tuple[str, Schema] | None:
        """Return the table's marker and schema; None when there is no table."""
        found = cursor.execute(
            "SELECT obj_description(c.oid, 'pg_class'), c.relispartition FROM pg_class c "
            "JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = %s AND c.relname = %s",
            location.split(dataset),
        ).fetchone()
        if found is None:
            return None
        try:
            comment = json.loads(found[0])
            return comment["marketsync"], evolution.from_text(json.dumps(comment["schema"], ensure_ascii=False))
        except (ValueError, KeyError, TypeError) as error:
            if found[1]:
                raise ForeignTable(
                    f"the table {_table_name(dataset)} in {self.url} is a partition of another one; give {dataset} "
                    "another name in its definition, or a database of its own"
                ) from error
            raise ForeignTable(
                f"the table {_table_name(dataset)} in {self.url} was not made by MarketSync; "
                f"{adoption.remedy(dataset)}; or rename it (ALTER TABLE ... RENAME TO ...), and {dataset} will be made "
                "and filled"
            ) from error

    def _table(self, cursor: Cursor, dataset: str) -> tuple[str, Schema]:
        found = self._described(cursor, dataset)
        if found is None:
            raise location.absent("table", dataset, self.url)
        return found

    def _refuse_names(self, dataset: str, schema: Schema) -> None:
        if own := sorted(_OWN_NAMES & set(schema.names)):
            raise SchemaError(
                f"{dataset} cannot become a table in PostgreSQL: the engine has a column {own[0]!r} in every table; "
                "rename it in the definition (as: ...)"
            )
        for name in (*location.split(dataset), *schema.names):
            _refuse_long(dataset, name)

    def _create(self, cursor: Cursor, dataset: str, schema: Schema, marker: str) -> None:
        must = evolution.required(schema)
        columns = [_column(column, column.name in must) for column in schema.columns]
        columns += [f"{_quoted(name)} {type_} NOT NULL" for name, type_ in _SYSTEM.items()]
        key = ", ".join(map(_quoted, schema.key))
        cut = ""
        if self._partition != "none" and schema.time is not None and schema.time in schema.key:
            cut = f"PARTITION BY RANGE ({_quoted(schema.time)})"
            part = location.split(dataset)[1] + ("_p0000" if self._partition == "year" else "_p0000_00")
            _refuse_long(dataset, part, "a partition's name")
        self._make_room(cursor, dataset)
        cursor.execute(f"CREATE TABLE {_table_name(dataset)} ({', '.join(columns)}, PRIMARY KEY ({key})) {cut}")
        self._describe(cursor, dataset, schema, marker)

    def _make_room(self, cursor: Cursor, dataset: str) -> None:
        """Make the schema that tables of the provider are in, and the table of what was delivered."""
        provider, _ = location.split(dataset)
        cursor.execute("SELECT pg_advisory_xact_lock(hashtextextended(%s, 0))", [f"marketsync:{provider}"])
        cursor.execute(f"CREATE SCHEMA IF NOT EXISTS {_quoted(provider)}")
        cursor.execute(
            f"CREATE TABLE IF NOT EXISTS {_quoted(provider)}.{_COMMITS} "
            '(marker text NOT NULL, lane text COLLATE "C" NOT NULL, seq bigint NOT NULL, PRIMARY KEY (marker, lane))'
        )

    def _rooted(self, cursor: Cursor, dataset: str, marker: str, stored: Schema) -> tuple[str, Schema]:
        """Return the table's marker and schema; a table that came without the lanes of what was delivered to it (moved
        or restored by itself) gets a new marker, by which nothing is believed of it."""
        provider, _ = location.split(dataset)
        if not _one(cursor, "SELECT count(to_regclass(%s))", [f"{_quoted(provider)}.{_COMMITS}"]):
            marker = uuid.uuid4().hex
            self._make_room(cursor, dataset)
            self._describe(cursor, dataset, stored, marker)
        return marker, stored

    def _describe(self, cursor: Cursor, dataset: str, schema: Schema, marker: str) -> None:
        comment = f'{{"marketsync": {json.dumps(marker)}, "schema": {evolution.to_text(schema)}}}'
        cursor.execute(f"COMMENT ON TABLE {_table_name(dataset)} IS {_literal(comment)}")

    def _evolve(self, cursor: Cursor, dataset: str, stored: Schema, schema: Schema, marker: str) -> None:
        table = _table_name(dataset)
        for column in evolution.added(dataset, stored, schema):
            cursor.execute(f"ALTER TABLE {table} ADD COLUMN {_column(column, False)}")
        now = evolution.required(schema)
        for name in evolution.required(stored):
            if name not in now:
                cursor.execute(f"ALTER TABLE {table} ALTER COLUMN {_quoted(name)} DROP NOT NULL")
        self._describe(cursor, dataset, schema, marker)

    def _admitted(
        self, dataset: str, frame: pl.DataFrame, sent: Schema, stored: Schema
    ) -> tuple[pl.DataFrame, list[str]]:
        return evolution.fit(dataset, admission.admit(dataset, frame, sent, self.capabilities), sent, stored)

    def _make_partitions(self, cursor: Cursor, dataset: str, schema: Schema, frame: pl.DataFrame) -> None:
        """Make the partitions that the frame's rows belong to, where the table is cut."""
        if schema.time is None or frame.is_empty() or not _partitioned(cursor, dataset):
            return
        import polars as pl

        provider, _ = location.split(dataset)
        made = _partitions(cursor, dataset)
        # a table that was cut by month stays so, whatever the URL says now
        yearly = any(re.search(r"_p\d{4}$", each) for each in made) or not (made or self._partition == "month")
        starts = frame.select(pl.col(schema.time).cast(pl.Date).dt.truncate("1y" if yearly else "1mo").unique().sort())

        def named_by(stem: str) -> dict[str, date]:
            # years are written out: strftime leaves zeros away
            return {
                f"{stem}_p{start.year:04}" + ("" if yearly else f"_{start.month:02}"): start
                for start in starts.to_series().to_list()
            }

        if made and named_by(_stem(cursor, dataset, made)).keys() <= made:
            return
        # two writers of a new month would each find it missing
        cursor.execute("SELECT pg_advisory_xact_lock(hashtextextended(%s, 0))", [f"marketsync:{dataset}"])
        made = _partitions(cursor, dataset)
        parts = named_by(_stem(cursor, dataset, made))
        zone = "" if schema[schema.time].type is ColumnType.DATE else " 00:00+00"
        for part, start in parts.items():
            if part in made:
                continue
            _refuse_long(dataset, part, "a partition's name")
            named = f"{_quoted(provider)}.{_quoted(part)}"
            if _one(cursor, "SELECT count(to_regclass(%s))", [named]):
                raise SchemaConflict(
                    f"{dataset} needs a partition {named}, and another table has this name: rename that table (in "
                    "its definition, where it is a dataset's), or keep one of both in another database"
                )
            after = _later(start, years=yearly)
            until = "MAXVALUE" if after is None else f"'{after}{zone}'"
            cursor.execute(
                f"CREATE TABLE {named} PARTITION OF {_table_name(dataset)} "
                f"FOR VALUES FROM ('{start}{zone}') TO ({until})"
            )

    def _stage(self, cursor: Cursor, dataset: str, frame: pl.DataFrame, key: Sequence[str]) -> None:
        """Put the rows into a table of the session's own, in the order of the key, in which it is read: two writers
        of the same rows wait for one another and never both."""
        names = ", ".join(map(_quoted, frame.columns))
        cursor.execute(f"DROP TABLE IF EXISTS {_STAGE}")
        cursor.execute(
            f"CREATE TEMPORARY TABLE {_STAGE} ON COMMIT DROP AS SELECT {names} FROM {_table_name(dataset)} WITH NO DATA"
        )
        self._copy(cursor, _STAGE, frame.sort(key))

    def _copy(self, cursor: Cursor, table: str, frame: pl.DataFrame) -> None:
        names = ", ".join(map(_quoted, frame.columns))
        with cursor.copy(f"COPY {table} ({names}) FROM STDIN (FORMAT csv)") as copy:
            for part in frame.iter_slices(_COPIED_ROWS):
                copy.write(
                    part.write_csv(
                        include_header=False, quote_style="non_numeric", datetime_format="%Y-%m-%d %H:%M:%S%.6f+00"
                    ).encode()
                )
        if cursor.rowcount != frame.height:
            raise StoreError(
                f"PostgreSQL {self.url} took {cursor.rowcount:,} of {frame.height:,} rows for {table}, and said "
                "nothing of the others: is there a trigger on it? Nothing was written; drop what takes rows away"
            )

    def _upsert(self, cursor: Cursor, dataset: str, schema: Schema, rows: int, absent: Sequence[str]) -> Written:
        """Take from the stage what is new or differs; rows that are equal stay as they are."""
        known = [column for column in schema.columns if column.name not in absent]
        names = [*(column.name for column in known), *SYSTEM_COLUMNS]
        listed = ", ".join(map(_quoted, names))
        values = [column for column in known if column.name not in schema.key]
        key = ", ".join(map(_quoted, schema.key))
        if values:
            changes = ", ".join(
                f"{_quoted(name)} = EXCLUDED.{_quoted(name)}" for name in names if name not in schema.key
            )
            action = f"DO UPDATE SET {changes} WHERE {' OR '.join(map(_differs, values))}"
        else:
            action = "DO NOTHING"
        put = (
            f"INSERT INTO {_table_name(dataset)} AS t ({listed}) SELECT {listed} FROM {_STAGE} "
            f"ON CONFLICT ({key}) {action}"
        )
        if _partitioned(cursor, dataset):
            cursor.execute(f"ANALYZE {_STAGE}")
            # what tells a new row from a changed one cannot be asked of a table with partitions
            same = " AND ".join(f"s.{_quoted(name)} = t.{_quoted(name)}" for name in schema.key)
            inserted = _one(
                cursor,
                f"SELECT count(*) FROM {_STAGE} s WHERE NOT EXISTS (SELECT FROM {_table_name(dataset)} t WHERE {same})",
            )
            updated = max(0, cursor.execute(put).rowcount - inserted)
        else:
            found = cursor.execute(
                f"WITH put AS ({put} RETURNING (xmax = 0) AS fresh) "
                "SELECT count(*) FILTER (WHERE fresh), count(*) FILTER (WHERE NOT fresh) FROM put"
            ).fetchone()
            inserted, updated = found or (0, 0)
        self._refuse_changed(cursor, dataset, schema, values)
        return Written(inserted, updated, rows - inserted - updated)

    def _refuse_changed(self, cursor: Cursor, dataset: str, schema: Schema, values: Sequence[Column]) -> None:
        """Raise `StoreError` where rows of the stage are not in the table as they were sent: a trigger that somebody
        has made since may leave rows out, or change them."""
        if not (triggers := _triggers(cursor, dataset)):
            return
        table = _table_name(dataset)
        same = " AND ".join(f"s.{_quoted(name)} = t.{_quoted(name)}" for name in schema.key)
        other = " OR ".join([f"t.{_quoted(schema.key[0])} IS NULL", *(_differs(column, "s") for column in values)])
        lost = _one(cursor, f"SELECT count(*) FROM {_STAGE} s LEFT JOIN {table} t ON {same} WHERE {other}")
        if lost:
            raise StoreError(
                f"{lost:,} rows for {table} in PostgreSQL {self.url} would not be there as they were sent, nothing was "
                f"written: triggers of the table leave rows out or change them; DROP TRIGGER {triggers[0]} ON {table}"
                + "".join(f", or {each}" for each in triggers[1:])
            )

    def _where(self, dataset: str, schema: Schema, filter: Filter) -> list[str]:
        since, until = filters.bounds(dataset, filter, schema)
        subjects = filters.subjects(dataset, filter, schema)
        where: list[str] = []
        if since is not None:
            where.append(f"{_quoted(schema.time)} >= {_instant(since, schema)}")
        if until is not None:
            where.append(f"{_quoted(schema.time)} < {_instant(until, schema)}")
        if subjects is not None:
            listed = ", ".join(_literal(each) for each in subjects if "\0" not in each)
            where.append(f"{_quoted(schema.subject)} IN ({listed})" if listed else "false")
        return where


def open_url(url: str, name: str) -> PostgresStore:
    """Open `postgresql://user:password@host:port/database`; raises `ConfigurationError` for a URL that names none."""
    parts = urlsplit(url)
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    partition = options.pop("partition", "none")
    if partition not in _PARTITIONS:
        raise ConfigurationError(f"the store {name}: partition={partition!r} is none of {', '.join(_PARTITIONS)}")
    if not parts.path.strip("/"):
        raise ConfigurationError(f"the store {name} names no database: write postgresql://user@host:5432/database")
    if options:
        _refuse_unknown(options, name)
    if options.get("client_encoding", "utf8").lower() not in ("utf8", "utf-8"):
        raise ConfigurationError(
            f"the store {name}: client_encoding={options['client_encoding']}: text goes to the server as UTF-8, "
            "whatever its database keeps; leave the option out"
        )
    # whatever a role, a database or PGCLIENTENCODING says
    options["client_encoding"] = "utf8"
    options.setdefault("connect_timeout", "10")
    options.setdefault("application_name", "marketsync")
    # with // also where there is no host, but a socket (?host=/run/postgresql)
    address = f"postgresql://{parts.netloc}{parts.path}?{urlencode(options, quote_via=quote)}"
    host = parts.netloc.rpartition("@")[2]
    return PostgresStore(f"postgresql://{host}{parts.path}", name, address, partition)


def _refuse_unknown(options: Iterable[str], name: str) -> None:
    """Raise `ConfigurationError` for an option that libpq does not have, before a run fetches in vain."""
    from psycopg.pq import Conninfo

    known = {"ssl", *(each.keyword.decode() for each in Conninfo.get_defaults())}  # ?ssl=true is libpq's own alias
    for option in options:
        if option not in known:
            meant = closest(option, sorted(known | {"partition"}))
            hint = f"did you mean {meant}? " if meant else ""
            raise ConfigurationError(
                f"the store {name}: {option} is no option of a postgresql:// store; {hint}options: partition, and "
                "libpq's, such as sslmode, sslrootcert, connect_timeout, options"
            )


def _adbc(address: str, *, quoting: bool) -> dbapi.Connection:
    from adbc_driver_postgresql import dbapi

    if quoting:  # only then: a pooler between us and the server may take no options
        place, _, query = address.partition("?")
        options = dict(parse_qsl(query, keep_blank_values=True))
        options["options"] = f"{options.get('options', '')} -c quote_all_identifiers=off".strip()
        address = f"{place}?{urlencode(options, quote_via=quote)}"
    return dbapi.connect(address, autocommit=False)


def _remedy(error: psycopg.Error, why: str) -> str:
    """Return what to do about an error, after its words; nothing where they say it."""
    import psycopg

    if error.sqlstate == "22P05":
        return f"; {_UNKEPT}"
    if not isinstance(error, psycopg.OperationalError) or error.sqlstate is not None:
        return ""
    if "does not support SSL" in why:
        return "; the server has no TLS: turn it on there (ssl = on), or write sslmode=prefer or disable into the URL"
    if "SSL" in why:
        return "; is the server's certificate one of the authority in sslrootcert, and made for this host?"
    return "; is the server up, and does the URL name its host, database, user and password?"


def _refuse_long(dataset: str, name: str, what: str = "the name") -> None:
    """Raise `SchemaError` for a name that the engine would cut."""
    if len(name.encode()) > _LONGEST_NAME:
        raise SchemaError(
            f"{dataset} cannot become a table in PostgreSQL: {what} {name!r} is longer than {_LONGEST_NAME} bytes, "
            "to which the engine would cut it; rename it in the definition (as: ...)"
        )


def _partitions(cursor: Cursor, dataset: str) -> set[str]:
    """Return the names of the table's partitions."""
    found = cursor.execute(
        "SELECT c.relname FROM pg_inherits JOIN pg_class c ON c.oid = inhrelid WHERE inhparent = %s::regclass",
        [_table_name(dataset)],
    )
    return {name for (name,) in found}


def _triggers(cursor: Cursor, dataset: str) -> list[str]:
    """Return the names of the triggers of the table and its partitions, for a statement."""
    found = cursor.execute(
        "SELECT DISTINCT quote_ident(tgname) FROM pg_trigger WHERE NOT tgisinternal AND tgenabled <> 'D' "
        "AND tgrelid IN (SELECT %(table)s::regclass UNION SELECT relid FROM pg_partition_tree(%(table)s::regclass)) "
        "ORDER BY 1",
        {"table": _table_name(dataset)},
    )
    return [name for (name,) in found]


def _stem(cursor: Cursor, dataset: str, made: Iterable[str]) -> str:
    """Return what the names of the table's partitions begin with: its own name when the first one was made, with a
    number where partitions of a table that was renamed since have that name."""
    for part in made:
        if found := _PARTITION.fullmatch(part):
            return found[1]
    provider, name = location.split(dataset)
    others = cursor.execute(
        "SELECT c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace "
        "WHERE n.nspname = %s AND c.relispartition",
        [provider],
    )
    taken = {found[1] for (part,) in others if (found := _PARTITION.fullmatch(part))}
    return next(each for number in itertools.count(1) if (each := name + f"_{number}" * (number > 1)) not in taken)


def _partitioned(cursor: Cursor, dataset: str) -> bool:
    kind = cursor.execute("SELECT relkind FROM pg_class WHERE oid = %s::regclass", [_table_name(dataset)]).fetchone()
    return kind is not None and kind[0] == "p"


def _committed(cursor: Cursor, dataset: str, marker: str, lane: str) -> int:
    provider, _ = location.split(dataset)
    found = cursor.execute(
        f"SELECT seq FROM {_quoted(provider)}.{_COMMITS} WHERE marker = %s AND lane = %s", [marker, lane]
    ).fetchone()
    return 0 if found is None else int(found[0])


def _commit(cursor: Cursor, dataset: str, marker: str, lane: str, seq: int) -> None:
    provider, _ = location.split(dataset)
    cursor.execute(
        f"INSERT INTO {_quoted(provider)}.{_COMMITS} AS t (marker, lane, seq) VALUES (%s, %s, %s) "
        "ON CONFLICT (marker, lane) DO UPDATE SET seq = EXCLUDED.seq WHERE t.seq < EXCLUDED.seq",
        [marker, lane, seq],
    )


def _plain(table: pa.Table) -> pl.DataFrame:
    """Return Arrow rows for polars: what Arrow has no type for (numeric among it) comes as text."""
    import polars as pl
    import pyarrow as pa

    for index, field in enumerate(table.schema):
        if isinstance(field.type, pa.BaseExtensionType):
            column = table.column(index)
            plain = pa.chunked_array([chunk.storage for chunk in column.chunks], type=field.type.storage_type)
            table = table.set_column(index, field.name, plain)
    return pl.DataFrame(pl.from_arrow(table))


def _refuse_odd(answer: pa.Schema) -> None:
    """Raise `QueryRefused` for columns that a frame cannot have."""
    for field in answer:
        times = answer.names.count(field.name)
        if times > 1:
            raise QueryRefused(
                f"the answer has {times} columns of the name {field.name!r}: give each its own (SELECT ... AS other)"
            )
        if "interval" in str(field.type):
            raise QueryRefused(
                f"column {field.name!r} holds intervals, which a frame does not have: ask for it as text (... ::text)"
            )
        if (field.metadata or {}).get(b"POSTGRESQL:type", b"").endswith(b"money"):  # the driver gives its hundredths
            raise QueryRefused(f"column {field.name!r} is money, whose unit is lost: ask for a number (... ::numeric)")


def _refuse_far(answer: pl.DataFrame) -> None:
    """Raise `QueryRefused` for times that polars can hold and not show: infinite ones are the last that it has."""
    import polars as pl

    for column in answer.select(pl.col(pl.Date, pl.Datetime)):
        kind = date if column.dtype == pl.Date else datetime
        span = pl.Series([kind.min, kind.max]).to_physical()
        if not column.to_physical().is_between(span[0], span[1]).all():
            raise QueryRefused(
                f"column {column.name!r} holds times that are infinite, or in no year from 1 to 9999: ask for it as "
                "text (... ::text)"
            )


def _typed(frame: pl.DataFrame, types: dict[str, pl.DataType]) -> pl.DataFrame:
    """Return the frame with the schema's types: numbers beyond 64 bits come as text, times in the session's zone."""
    import polars as pl

    casts = []
    for name, type_ in types.items():
        if isinstance(type_, pl.Datetime) and isinstance(frame.schema[name], pl.Datetime):
            casts.append(pl.col(name).dt.convert_time_zone("UTC").cast(type_))
        else:
            casts.append(pl.col(name).cast(type_))
    return frame.select(casts)


def _differs(column: Column, of: str = "EXCLUDED") -> str:
    old, new = f"t.{_quoted(column.name)}", f"{of}.{_quoted(column.name)}"
    said = f"{old} IS DISTINCT FROM {new}"
    if send := _SENT.get(column.type):
        # to the engine 0.0 and -0.0 are equal; their bytes are not
        said = f"({said} OR ({new} = 0 AND {send}({old}) <> {send}({new})))"
    return said


def _column(column: Column, required: bool) -> str:
    return f"{_quoted(column.name)} {_TYPES[column.type]}{' NOT NULL' if required else ''}"


def _table_name(dataset: str) -> str:
    return ".".join(_quoted(part) for part in location.split(dataset))


def _quoted(name: str | None) -> str:
    escaped = (name or "").replace('"', '""')
    return f'"{escaped}"'


def _literal(text: str) -> str:
    escaped = text.replace("'", "''")
    return f"'{escaped}'"


def _all(conditions: Sequence[str]) -> str:
    return f"WHERE {' AND '.join(conditions)}" if conditions else ""


def _one(cursor: Cursor, sql: str, values: Sequence[Any] = ()) -> int:
    found = cursor.execute(sql, values or None).fetchone()
    return 0 if found is None or found[0] is None else int(found[0])


def _later(start: date, *, years: bool) -> date | None:
    """Return the first day after the year or month; None where there is none."""
    if start.year == date.max.year and (years or start.month == 12):
        return None
    if years:
        return date(start.year + 1, 1, 1)
    return (start.replace(day=28) + timedelta(days=4)).replace(day=1)


def _utc(value: Any) -> date | datetime:
    return value.astimezone(UTC) if isinstance(value, datetime) else value


def _instant(value: date | datetime, schema: Schema) -> str:
    if schema[schema.time or ""].type is ColumnType.DATE:
        return f"DATE '{value.isoformat()}'"
    assert isinstance(value, datetime)
    return f"TIMESTAMPTZ '{value.astimezone(UTC).replace(tzinfo=None).isoformat(' ', 'microseconds')}+00'"
