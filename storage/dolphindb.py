"""DolphinDB tables: `dolphindb://user:password@host:8848/database`, in the TSDB engine, through the official client.

A dataset is a DFS database of its own with one table, cut by time and by a hash of the subject, and sorted by the key
with `keepDuplicates=LAST`: a write appends what is new or differs, and the engine shows the last row of each key. The
lane's `seq` follows its rows, so a batch that comes again after a crash says the same again. The marker is in the
table's comment; schemas and lanes are in two tables of our own. How columns are named, sent and read is in
`dolphindb_rows.py`. Options of the URL: `ssl`, `compress`, `timeout` (seconds).
"""

from __future__ import annotations

import hashlib
import json
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, unquote, urlsplit

from marketsync.errors import ConfigurationError, SchemaError, StoreError
from marketsync.schema import Column, ColumnType, Schema
from storage import admission, classify, evolution, filters, fingerprints, lazyframes, location
from storage import dolphindb_rows as rows
from storage.protocol import Batch, Capabilities, Filter, Mode, TableInfo, Writers, Written

if TYPE_CHECKING:
    import polars as pl
    import pyarrow as pa

CAPABILITIES = Capabilities(
    atomic=False,
    transactions=False,
    nanoseconds=True,
    nan=False,
    unsigned_64=False,
    nul=False,
    evolve=True,
    writers=Writers.MANY_PROCESSES,
    negative_zero=False,
    empty_text=False,
    final_return=False,
    least=False,
    why="atomic, transactions: the engine commits each append and each delete by itself, so the lane moves after its "
    "rows and a replaced span is for a moment both; use postgresql:// or delta:// where a reader must never see that. "
    "nan: the engine takes NaN for null; map it to null in the definition. "
    "unsigned_64: the engine's whole numbers are signed; declare the column str. "
    "nul: the engine's text ends at a NUL character. "
    "negative_zero: not promised by the engine. "
    "empty_text: an empty text is the engine's null; map it to null in the definition. "
    "final_return: the engine's client drops it when it reads; have it stripped. "
    "least: the engine's null is the least number of each type; map it to null in the definition.",
)

_PORT = 8848
_TABLE = "rows"
_OWN = "marketsync"  # the database of our own tables, after the store's
_SCHEMAS = Schema(
    tuple(Column(name, ColumnType.STR, nullable=False) for name in ("marker", "shape", "dataset", "text")),
    key=("marker", "shape"),
)
_LANES = Schema(
    (
        Column("marker", ColumnType.STR, nullable=False),
        Column("lane", ColumnType.STR, nullable=False),
        Column("seq", ColumnType.I64, nullable=False),
    ),
    key=("marker", "lane"),
)
_BLOCK_ROWS = 65_536  # in memory at once while reading
_LISTED_VALUES = 10_000  # in one condition
_CREATED_SECONDS = 10.0  # within which who creates a table has said whose it is
# another transaction has the partition; the engine does not wait
_TAKEN = ("<ChunkInTransaction>", "has been owned by transaction")
_TRIES = 40
_WAIT_SECONDS = 0.25
_MOST_FILES = 1024 - 8  # the client waits by select(), which has no room for a descriptor of 1024 or above
_WORDS = {"true": True, "1": True, "false": False, "0": False}


@dataclass(frozen=True)
class _Place:
    """A server, and who is asking."""

    host: str
    port: int
    user: str
    password: str
    ssl: bool
    compress: bool
    timeout_seconds: int


@dataclass(frozen=True)
class _Table:
    """A table of ours: where it is, whose, and its shape."""

    path: str
    name: str
    marker: str
    schema: Schema

    @property
    def loaded(self) -> str:
        return _loaded(self.path, self.name)


class DolphinStore:
    """Tables of one server. Threads share one session for writing, one after the other; each scan has its own."""

    capabilities = CAPABILITIES

    def __init__(self, url: str, name: str, place: _Place, database: str):
        self.url = url
        self.name = name
        self._place = place
        self._database = database
        self._lock = threading.RLock()
        self._open: Any = None
        self._closed = False
        self._shapes: dict[tuple[str, str], Schema] = {}  # schemas never change once they are written down

    # the table: creation, identity, shape

    def ensure(self, dataset: str, schema: Schema) -> str:
        evolution.check(dataset, schema)
        rows.check(dataset, schema)
        with self._asking(f"making the table of {dataset}"):
            table = self._described(dataset) or self._create(dataset, schema)
            if table.schema != schema:
                self._evolve(dataset, table, schema)
            return table.marker

    def marker(self, dataset: str) -> str | None:
        with self._asking(f"looking for {dataset}"):
            found = self._described(dataset)
        return None if found is None else found.marker

    def schema(self, dataset: str) -> Schema | None:
        with self._asking(f"looking for {dataset}"):
            found = self._described(dataset)
        return None if found is None else found.schema

    def unkept(self, dataset: str, schema: Schema) -> list[admission.Unkept]:
        rows.check(dataset, schema)
        return rows.unkept(schema)

    # writing

    def committed(self, dataset: str, lane: str) -> int:
        with self._asking(f"reading the lanes of {dataset}"):
            found = self._described(dataset)
            return 0 if found is None else self._seq(found.marker, lane)

    def write(self, batch: Batch) -> Written:
        dataset = batch.dataset
        with self._asking(f"writing to {dataset}"):
            table = self._table(dataset)
            if self._seq(table.marker, batch.lane) >= batch.seq:
                return Written(already=True)
            frame, absent = self._admitted(dataset, batch.frame, batch.schema, table.schema)
            put, written = frame, Written(inserted=frame.height)
            if batch.mode is Mode.UPSERT:
                split = classify.split(frame, self._with_keys(table, frame), table.schema, absent=absent)
                put = split.put
                written = split.written()
            self._append(table, put)
            self._commit(table.marker, batch.lane, batch.seq)
            return written

    def replace(self, dataset: str, schema: Schema, frame: pl.DataFrame, span: Filter) -> Written:
        import polars as pl

        with self._asking(f"replacing rows of {dataset}"):
            table = self._table(dataset)
            put, absent = self._admitted(dataset, frame, schema, table.schema)
            filters.refuse_outside(dataset, put, span, table.schema)
            split = classify.split(put, self._with_keys(table, put), table.schema, absent=absent)
            where, values = rows.where(dataset, table.schema, span)
            there = pl.concat(self._blocks(self._open, table, table.schema.key, where, values))
            gone = there.join(put, on=list(table.schema.key), how="anti")
            # last, so that a row is never missing that is to stay
            self._append(table, split.put)
            self._remove(table, gone)
            return split.written(deleted=gone.height)

    def delete(self, dataset: str, filter: Filter) -> int:
        with self._asking(f"deleting rows of {dataset}"):
            table = self._table(dataset)
            where, values = rows.where(dataset, table.schema, filter)
            found = self._count(table, where, values)
            if found:
                self._patiently(lambda: self._run(f"delete from {table.loaded}{_all(where)}", values))
            return found

    # reading

    def scan(self, dataset: str, filter: Filter = Filter()) -> pl.LazyFrame:
        with self._asking(f"reading {dataset}"):
            table = self._table(dataset)
        types = table.schema.polars(system=True)
        where, values = rows.where(dataset, table.schema, filter)

        def read(shown: Sequence[str], most: int | None) -> Iterator[pl.DataFrame]:
            return self._frames(table, shown, where, values, most)

        return lazyframes.scan(filters.columns(dataset, filter, table.schema), types, read)

    def arrow(self, dataset: str, filter: Filter = Filter()) -> Iterator[pa.RecordBatch]:
        return lazyframes.arrow(self.scan(dataset, filter))

    def watermarks(self, dataset: str) -> dict[str, datetime | date]:
        with self._asking(f"reading the watermarks of {dataset}"):
            table = self._table(dataset)
            schema = table.schema
            if schema.time is None:
                raise SchemaError(f"{dataset} has no time column, so it has no watermarks")
            subject = "" if schema.subject is None else f"{schema.subject}, "
            by = "" if schema.subject is None else f" group by {schema.subject}"
            newest = f"select max({schema.time}) as {schema.time} from {table.loaded}{by}"
            seen = self._run(f"select {subject}{rows.sent_for(schema, schema.time)} from ({newest})", {})
        if seen is not None:  # the newest time of no row is null, whatever the column may be
            seen = seen.dropna(subset=[schema.time])
        names = [schema.time] if schema.subject is None else [schema.subject, schema.time]
        frame = rows.decoded(schema, names, seen)
        each = frame.iter_rows() if schema.subject else ((lazyframes.EVERY_SUBJECT, at) for (at,) in frame.iter_rows())
        return {name: at for name, at in each if name is not None and at is not None}

    def count(self, dataset: str, filter: Filter = Filter()) -> int:
        with self._asking(f"counting the rows of {dataset}"):
            table = self._table(dataset)
            return self._count(table, *rows.where(dataset, table.schema, filter))

    def fingerprints(self, dataset: str, recipe: fingerprints.Recipe, filter: Filter = Filter()) -> pl.DataFrame:
        return fingerprints.by_scan(self, dataset, recipe, filter)

    # the rest

    def datasets(self) -> list[str]:
        with self._asking("listing the tables"):
            if not self._exists(self._own, "schemas"):
                return []
            named = set(map(str, self._run(f"exec dataset from {_loaded(self._own, 'schemas')}", {})))
            return sorted(name for name in named if self._described(name) is not None)

    def info(self, dataset: str) -> TableInfo:
        rows_ = self.count(dataset)
        with self._asking(f"measuring {dataset}"):
            path = self._path(dataset)
            parts = self._run(f'getTabletsMeta("{path.removeprefix("dfs:/")}/%", "%", true, -1)', {})
        return TableInfo(
            dataset,
            rows=rows_,
            bytes=int(parts["diskUsage"].sum()),
            files=max(1, len(parts)),
            commits=None,
            location=f"{self.url}: {path}",
        )

    def version(self) -> str:
        with self._asking("asking for the version"):
            return f"DolphinDB {str(self._run('version()', {})).partition(' ')[0]}"

    def query(self, sql: str) -> pl.DataFrame:
        return lazyframes.query(sql, self.datasets(), self.scan)

    def maintain(self, dataset: str) -> str:
        with self._asking(f"compacting {dataset}"):
            path = self._table(dataset).path.removeprefix("dfs:/")
            self._run("flushTSDBCache()", {})
            chunks = self._run(f'exec chunkId from getChunksMeta("{path}/%", -1) where type=1', {})
            for chunk in map(str, chunks):
                self._run("triggerTSDBCompaction(marketsync_chunk)", {"marketsync_chunk": chunk})
        return f"{dataset}: the server was told to merge the files of {len(chunks)} partitions"

    def close(self) -> None:
        with self._lock:
            self._closed = True
            if self._open is not None:
                self._open.close()
                self._open = None

    # how it is done: the session

    def _connect(self) -> Any:
        import dolphindb
        from dolphindb.logger import default_logger

        default_logger.disable_stdout_sink()
        place = self._place
        with socket.socket() as next_one:
            if next_one.fileno() >= _MOST_FILES:
                raise StoreError(
                    f"no connection to DolphinDB at {place.host}:{place.port}: this process has {_MOST_FILES} files "
                    "and connections open, and DolphinDB's client crashes or waits for ever with more; close some, or "
                    "use a process of its own for this store"
                )
        wait = timedelta(seconds=place.timeout_seconds)
        # who listens there and never answers is found by a session that waits so long; a script may take longer
        for answer in (wait, None):
            session = dolphindb.Session(enableSSL=place.ssl, compress=place.compress, show_output=False)
            session.msg_logger.disable_stdout_sink()
            if not session.connect(place.host, place.port, place.user, place.password, netTimeout=wait, timeout=answer):
                raise StoreError(
                    f"no connection to DolphinDB at {place.host}:{place.port}; is the server up, and does the URL name "
                    "its host and port?"
                )
            if answer:
                session.close()
        return session

    @contextmanager
    def _asking(self, what: str) -> Iterator[None]:
        """One thread at a time; what the client raises becomes a `StoreError` that says what was being done, where."""
        with self._lock, self._told(what):
            if self._closed:
                raise StoreError(f"the store {self.url} was closed; open it again")
            if self._open is None:
                self._open = self._connect()
            try:
                yield
            except RuntimeError:
                # it may have been cut off; the next question gets another one
                self._open.close()
                self._open = None
                raise

    @contextmanager
    def _told(self, what: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # the client has no class of its own for what a server says
            why = " ".join(str(error).split())
            raise StoreError(f"DolphinDB {self.url}, {what}: {why}") from error

    def _run(self, script: str, values: dict[str, Any]) -> Any:
        if values:
            self._open.upload(values)
        return self._open.run(script)

    def _patiently(self, act: Callable[[], Any]) -> Any:
        """Do it, and again when another writer has a partition of it: the engine then has done nothing of it."""
        for left in reversed(range(_TRIES)):
            try:
                return act()
            except RuntimeError as error:
                if not left or not any(word in str(error) for word in _TAKEN):
                    raise
                time.sleep(_WAIT_SECONDS)

    # how it is done: tables

    @property
    def _own(self) -> str:
        return f"dfs://{self._database}_{_OWN}"

    def _path(self, dataset: str) -> str:
        """Return the dataset's database: as readable as a name of letters, digits and _ can be, and no other's."""
        location.split(dataset)
        plain = dataset.replace(".", "_").replace("-", "_")
        return f"dfs://{self._database}_{plain}_{hashlib.sha256(dataset.encode()).hexdigest()[:8]}"

    def _exists(self, path: str, name: str) -> bool:
        return bool(self._run(f'existsTable("{path}", "{name}")', {}))

    def _said(self, path: str, name: str) -> str:
        """Return the table's comment."""
        return str(self._run(f'schema({_loaded(path, name)})["tableComment"]', {}) or "")

    def _described(self, dataset: str) -> _Table | None:
        path = self._path(dataset)
        if not self._exists(path, _TABLE):
            return None
        if not (said := self._said(path, _TABLE)):  # somebody is making it
            return None
        try:
            comment = json.loads(said)
            marker, shape = comment["marketsync"], comment["schema"]
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(
                f"the table {_TABLE} in {path} was not made by MarketSync; move it elsewhere (renameTable), and "
                f"{dataset} will be made and filled"
            ) from error
        return _Table(path, _TABLE, marker, self._written(path, marker, shape))

    def _table(self, dataset: str) -> _Table:
        found = self._described(dataset)
        if found is None:
            raise location.absent("DolphinDB table", dataset, self.url)
        return found

    def _written(self, path: str, marker: str, shape: str) -> Schema:
        """Return the schema of that marker and shape."""
        if (marker, shape) not in self._shapes:
            found = self._run(
                f"exec text from {_loaded(self._own, 'schemas')} "
                "where marker = marketsync_marker and shape = marketsync_shape",
                {"marketsync_marker": marker, "marketsync_shape": shape},
            )
            if not len(found):
                raise StoreError(
                    f"the table {_TABLE} in {path} names a schema that {self._own} does not have: one was restored "
                    "without the other. Drop the table, and it is filled again"
                )
            self._shapes[marker, shape] = evolution.from_text(str(found[0]))
        return self._shapes[marker, shape]

    def _create(self, dataset: str, schema: Schema) -> _Table:
        for name, own in (("schemas", _SCHEMAS), ("lanes", _LANES)):
            if not self._exists(self._own, name):
                self._make(self._own, name, own, {"marketsync": name})
        path = self._path(dataset)
        self._make(path, _TABLE, schema, self._comment(dataset, schema, uuid.uuid4().hex))
        return self._table(dataset)

    def _make(self, path: str, name: str, schema: Schema, comment: dict[str, str]) -> None:
        """Create a table and say whose it is; where somebody else is first, wait until that one has said it."""
        try:
            self._run(rows.creation(path, name, schema), {"marketsync_comment": json.dumps(comment)})
        except RuntimeError:
            ends = time.monotonic() + _CREATED_SECONDS
            while not (self._exists(path, name) and self._said(path, name)):
                if time.monotonic() > ends:
                    raise
                time.sleep(_WAIT_SECONDS / 5)

    def _comment(self, dataset: str, schema: Schema, marker: str) -> dict[str, str]:
        """Write the schema down, and return the comment that names it."""
        import polars as pl

        text = evolution.to_text(schema)
        shape = hashlib.sha256(text.encode()).hexdigest()
        frame = pl.DataFrame({"marker": [marker], "shape": [shape], "dataset": [dataset], "text": [text]})
        if told := admission.refusals(dataset, frame.lazy(), _SCHEMAS, rows.unkept(_SCHEMAS)):
            raise SchemaError("; ".join(told))
        self._append(_Table(self._own, "schemas", "", _SCHEMAS), frame)
        return {"marketsync": marker, "schema": shape}

    def _evolve(self, dataset: str, table: _Table, schema: Schema) -> None:
        new = evolution.added(dataset, table.schema, schema)
        there = self._columns(table)
        for column in new:
            # who was interrupted, or comes second, finds the column there
            if column.name not in there:
                kind = rows.TYPES[column.type]
                self._run(f'addColumn({table.loaded}, "{column.name}", {kind})', {})
        comment = json.dumps(self._comment(dataset, schema, table.marker))
        self._run(f"setTableComment({table.loaded}, marketsync_comment)", {"marketsync_comment": comment})

    # how it is done: rows

    def _seq(self, marker: str, lane: str) -> int:
        found = self._run(
            f"exec seq from {_loaded(self._own, 'lanes')} where marker = marketsync_marker and lane = marketsync_lane",
            {"marketsync_marker": marker, "marketsync_lane": lane},
        )
        return max(map(int, found), default=0)

    def _commit(self, marker: str, lane: str, seq: int) -> None:
        import polars as pl

        frame = pl.DataFrame({"marker": [marker], "lane": [lane], "seq": [seq]})
        self._append(_Table(self._own, "lanes", "", _LANES), frame)

    def _admitted(
        self, dataset: str, frame: pl.DataFrame, sent: Schema, stored: Schema
    ) -> tuple[pl.DataFrame, list[str]]:
        frame = admission.admit(dataset, frame, sent, self.capabilities, rows.unkept(sent))
        return evolution.fit(dataset, admission.without_signs(frame), sent, stored)

    def _columns(self, table: _Table) -> list[str]:
        """Return the columns in the order that the table has them, which is the order of an append."""
        return [str(name) for name in self._run(f"exec name from schema({table.loaded}).colDefs", {})]

    def _append(self, table: _Table, frame: pl.DataFrame) -> None:
        import dolphindb

        if frame.is_empty():
            return
        sent = rows.encoded(frame, self._columns(table))
        appender = dolphindb.TableAppender(db_path=table.path, table_name=table.name, conn=self._open)
        done = self._patiently(lambda: appender.append(sent))
        if done != frame.height:
            raise StoreError(f"DolphinDB {self.url} took {done} of {frame.height} rows for {table.path}; run it again")

    def _with_keys(self, table: _Table, frame: pl.DataFrame) -> pl.DataFrame:
        """Return the rows that may have a key of the frame: by its subjects, and by its range of times."""
        import polars as pl

        if frame.is_empty():
            return pl.DataFrame(schema=table.schema.polars())
        return pl.concat(self._blocks(self._open, table, table.schema.names, *rows.around(table.schema, frame)))

    def _remove(self, table: _Table, gone: pl.DataFrame) -> None:
        """Delete the rows of these keys: a statement for all that share the first columns of the key."""
        *shared, last = table.schema.key
        for part in gone.partition_by(shared) if shared else [gone]:
            for some in part.iter_slices(_LISTED_VALUES):
                where, values = rows.keyed(table.schema, some, shared, last)
                script = f"delete from {table.loaded}{_all(where)}"
                self._patiently(lambda script=script, values=values: self._run(script, values))

    def _count(self, table: _Table, where: Sequence[str], values: dict[str, Any]) -> int:
        return int(self._run(f"exec count(*) from {table.loaded}{_all(where)}", values))

    def _frames(
        self, table: _Table, shown: Sequence[str], where: Sequence[str], values: dict[str, Any], most: int | None
    ) -> Iterator[pl.DataFrame]:
        with self._told(f"reading {table.path}"):
            session = self._connect()
            try:
                yield from self._blocks(session, table, shown, where, values, most)
            finally:
                session.close()

    @staticmethod
    def _blocks(
        session: Any,
        table: _Table,
        shown: Sequence[str],
        where: Sequence[str],
        values: dict[str, Any],
        most: int | None = None,
    ) -> Iterator[pl.DataFrame]:
        """Yield the rows as they come from the server, a bounded number at a time; at least one frame."""
        if values:
            session.upload(values)
        listed = ", ".join(rows.sent_for(table.schema, name) for name in shown)
        limit = "" if most is None else f" limit {most}"
        blocks = session.run(f"select {listed} from {table.loaded}{_all(where)}{limit}", fetchSize=_BLOCK_ROWS)
        yield rows.decoded(table.schema, shown, None)
        while blocks.has_next:
            yield rows.decoded(table.schema, shown, blocks.read())


def open_url(url: str, name: str) -> DolphinStore:
    """Open `dolphindb://user:password@host:8848/database`; raises `ConfigurationError` for what cannot be meant."""
    parts = urlsplit(url)

    def refuse(why: str) -> None:
        raise ConfigurationError(f"the store {name}: {why}; write dolphindb://user@host:{_PORT}/database")

    try:
        port = parts.port or _PORT
    except ValueError as error:
        raise ConfigurationError(f"the store {name}: {error}; write dolphindb://user@host:{_PORT}/database") from error
    database = unquote(parts.path[1:])
    if not rows.NAME.fullmatch(database):
        refuse(f"{database!r} is no name of a database (letters, digits and _, a letter first)")
    said = {"ssl": "false", "compress": "false", "timeout": "30", **dict(parse_qsl(parts.query, True))}
    for option, value in said.items():
        if option not in ("ssl", "compress", "timeout"):
            refuse(f"{option} is no option of a dolphindb:// store; options: compress, ssl, timeout")
        if option == "timeout" and not (value.isdigit() and int(value)):
            refuse(f"timeout={value!r} is no number of seconds")
        if option != "timeout" and value.lower() not in _WORDS:
            refuse(f"{option}={value!r} is neither true nor false")
    place = _Place(
        parts.hostname or "127.0.0.1",
        port,
        unquote(parts.username or ""),
        unquote(parts.password or ""),
        ssl=_WORDS[said["ssl"].lower()],
        compress=_WORDS[said["compress"].lower()],
        timeout_seconds=int(said["timeout"]),
    )
    return DolphinStore(f"dolphindb://{parts.netloc.rpartition('@')[2]}{parts.path}", name, place, database)


def _loaded(path: str, name: str) -> str:
    return f'loadTable("{path}", "{name}")'


def _all(conditions: Sequence[str]) -> str:
    return f" where {' and '.join(conditions)}" if conditions else ""
