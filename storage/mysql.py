"""MySQL and MariaDB tables: `mysql://user:password@host:3306/database`, written by LOAD DATA, all through PyMySQL.

A schema of MySQL is a database, and a URL names one database, so all of a store is inside it, and two stores on one
server share nothing: a dataset is the table `provider.dataset`, the dot being part of its name. Its user needs rights
within that database only. In a query the name is written as everywhere, and is put into backticks before it is sent.

A batch is one transaction, the lane's `seq` in it. Rows go by LOAD DATA LOCAL (by INSERT where the server allows no
local files) into the table, or into a temporary one, from which ON DUPLICATE KEY UPDATE takes what is new or differs.
The comment of a table holds its marker and says which of the texts in `_marketsync_schemas` is its schema, so that a
table is never there without them, although every CREATE and ALTER commits at once.

connectorx would read faster than PyMySQL, but keeps what its reader has not taken yet in memory, knows no TLS and
panics when a connection breaks; how rows are read instead is told in `mysql_rows.py`.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import ssl
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from datetime import UTC, date, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import parse_qsl, unquote, urlsplit

from marketsync.errors import (
    AdoptionRefused,
    ConfigurationError,
    ForeignTable,
    MarketSyncError,
    QueryRefused,
    SchemaError,
    StoreBusy,
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
from storage.mysql_rows import answer, insertions, literal, loading, named, parsed, quoted, selected, utc
from storage.protocol import Batch, Capabilities, Filter, Mode, TableInfo, Writers, Written

if TYPE_CHECKING:
    import polars as pl
    import pyarrow as pa

_LONGEST_KEY = 255

CAPABILITIES = Capabilities(
    atomic=True,
    transactions=True,
    nanoseconds=False,
    nan=False,
    unsigned_64=True,
    nul=True,
    evolve=True,
    writers=Writers.MANY_PROCESSES,
    negative_zero=False,
    longest_key=_LONGEST_KEY,
    why="nanoseconds: the engine keeps microseconds; declare the column i64 to keep the count of nanoseconds. "
    "nan: the engine has neither NaN nor infinities; map them to null in the definition. "
    "negative_zero: the engine turns -0.0 into 0.0, which compares as equal. "
    "longest_key: an index takes 3072 bytes of a row; take longer texts out of the key.",
)

_COMMITS = "`_marketsync_commits`"
_SCHEMAS = "`_marketsync_schemas`"
_STAGE = "`_marketsync_stage`"
_LONGEST_NAME = 64  # characters
_INDEX_BYTES = 3072
_UTF8_BYTES = 4  # what an index reckons a character to be
_PORT = 3306
_READ_ROWS = 65_536
_SPARE_BYTES = 16 << 20  # what the engine keeps free in any table, generously
_LOCK_SECONDS = 60
_PATIENCE_SECONDS = 3600  # with a reader that is busy with what it has got, before the server ends its connection
_ATTEMPTS = 6
_STEP_SECONDS = 0.05  # the longest pause before the first repetition; each next one is twice as long
# a deadlock, a lock that did not come free, rows or a table that changed between two statements: all rolled back
_AGAIN = (1213, 1205, 1020, 1412)
_LOST = (0, 2006, 2013, 2014, 2055, 4031)
_DUPLICATE = 1062
# values that an ALTER would not keep: duplicates, wrong, too long or too large; an index that is; foreign keys
_NOT_KEPT = (_DUPLICATE, 1138, 1264, 1265, 1292, 1366, 1406, 1071, 1170, 1832, 1833)
_SAME_NAME = 1060
# what fails for reasons that are not in the text of a query: connections, rights to enter, memory, disks, locks, time
_NOT_THE_QUERY = {*_AGAIN, *_LOST, 1021, 1037, 1038, 1040, 1041, 1043, 1044, 1045, 1053, 1129, 1130, 1158, 1159, 1160}
_NOT_THE_QUERY |= {1161, 1203, 1226, 1317, 1969, 2002, 2003, 2005, 2026, 3024}
_COLLATIONS = ("utf8mb4_nopad_bin", "utf8mb4_0900_bin")  # of MariaDB and of MySQL: bytes decide, the last space too
_MOST = 2**64 - 1
# what a server may have set otherwise for everybody: answers that end early, statements that are refused
_SESSION = (
    "SET time_zone = '+00:00', sql_mode = 'STRICT_ALL_TABLES,NO_ENGINE_SUBSTITUTION,NO_AUTO_VALUE_ON_ZERO', "
    f"lock_wait_timeout = {_LOCK_SECONDS}, net_write_timeout = {_PATIENCE_SECONDS}, "
    f"sql_select_limit = {_MOST}, sql_safe_updates = 0, max_join_size = {_MOST}, sql_big_selects = 1, "
    "unique_checks = 1"
)

_TYPES = {
    ColumnType.STR: "LONGTEXT",
    ColumnType.BOOL: "BOOLEAN",
    ColumnType.I32: "INT",
    ColumnType.I64: "BIGINT",
    ColumnType.U64: "BIGINT UNSIGNED",
    # a FLOAT is shown with six digits to everybody who asks, and equals no number that can be written down
    ColumnType.F32: "DOUBLE",
    ColumnType.F64: "DOUBLE",
    ColumnType.DATE: "DATE",
    # TIMESTAMP ends in 2038
    ColumnType.DATETIME: "DATETIME(6)",
    ColumnType.DATETIME_NS: "DATETIME(6)",
}
_KEY_BYTES = {ColumnType.BOOL: 1, ColumnType.I32: 4, ColumnType.DATE: 3}  # the others: 8

_TEXTS = {"unix_socket", "ssl_ca", "ssl_cert", "ssl_key", "ssl_key_password"}
_NUMBERS = {"connect_timeout", "read_timeout", "write_timeout"}
_SWITCHES = {"ssl_disabled", "ssl_verify_cert", "ssl_verify_identity"}
_WORDS = {"true": True, "1": True, "false": False, "0": False}

_DENIED = re.compile(r"([A-Z][A-Z, ]*) command denied to user ('.*?'@'.*?') for table (?:`(.*?)`\.)?")

Connection = Any  # pymysql.connections.Connection; its cursors say nothing of what they return
Cursor = Any
Result = TypeVar("Result")


class MySQLStore:
    """Tables of one database. Threads share one connection for writing, one after the other; each scan has its own."""

    capabilities = CAPABILITIES

    def __init__(self, url: str, name: str, place: dict[str, Any]):
        self.url = url
        self.name = name
        self._place = place
        self._lock = threading.RLock()
        self._open: Connection | None = None
        self._closed = False
        self._collation = ""
        self._loads = False
        self._fold: Callable[[str], str] = str

    # the table: creation, identity, shape

    def ensure(self, dataset: str, schema: Schema) -> str:
        evolution.check(dataset, schema)
        _refuse_names(dataset, schema)
        longest_key(dataset, schema)

        def act(cursor: Cursor) -> str:
            found = self._described(cursor, dataset)
            if found is not None and found[1] == schema:
                return found[0]
            # two processes that create one table at once would each find it missing
            with self._alone(cursor):
                found = self._described(cursor, dataset)
                if found is None:
                    marker = uuid.uuid4().hex
                    self._create(cursor, dataset, schema, marker)
                    return marker
                marker, stored = found
                if stored != schema:
                    self._evolve(cursor, dataset, stored, schema, marker)
                return marker

        return self._done(f"making the table of {dataset}", act)

    def marker(self, dataset: str) -> str | None:
        found = self._done(f"looking for {dataset}", lambda cursor: self._described(cursor, dataset))
        return None if found is None else found[0]

    def schema(self, dataset: str) -> Schema | None:
        found = self._done(f"looking for {dataset}", lambda cursor: self._described(cursor, dataset))
        return None if found is None else found[1]

    def unkept(self, dataset: str, schema: Schema) -> list[admission.Unkept]:
        _refuse_names(dataset, schema)
        longest = longest_key(dataset, schema)
        return admission.long_keys(schema, longest) if longest < _LONGEST_KEY else []

    # writing

    def committed(self, dataset: str, lane: str) -> int:
        def act(cursor: Cursor) -> int:
            found = self._described(cursor, dataset)
            return 0 if found is None else _committed(cursor, found[0], lane)

        return self._done(f"reading the lanes of {dataset}", act)

    def write(self, batch: Batch) -> Written:
        dataset = batch.dataset

        def act(cursor: Cursor) -> Written:
            marker, schema = self._table(cursor, dataset)
            if _committed(cursor, marker, batch.lane) >= batch.seq:
                return Written(already=True)
            frame, known = self._admitted(dataset, batch.frame, batch.schema, schema)
            written = Written()
            if frame.height:
                if batch.mode is Mode.APPEND and not _triggers(cursor, dataset):
                    self._send(cursor, dataset, quoted(dataset), frame)
                    written = Written(inserted=frame.height)
                else:
                    self._stage(cursor, dataset, schema, frame)
                    written = self._upsert(cursor, dataset, schema, known, frame.height)
            _commit(cursor, marker, batch.lane, batch.seq)
            return written

        return self._transaction(f"writing to {dataset}", act)

    def replace(self, dataset: str, schema: Schema, frame: pl.DataFrame, span: Filter) -> Written:
        def act(cursor: Cursor) -> Written:
            _, stored = self._table(cursor, dataset)
            put, known = self._admitted(dataset, frame, schema, stored)
            filters.refuse_outside(dataset, put, span, stored)
            self._stage(cursor, dataset, stored, put)
            same = " AND ".join(f"s.{quoted(name)} = t.{quoted(name)}" for name in stored.key)
            gone = [*_where(dataset, stored, span, "t."), f"s.{quoted(stored.key[0])} IS NULL"]
            deleted = cursor.execute(
                f"DELETE t FROM {quoted(dataset)} t LEFT JOIN {_STAGE} s ON {same} {_all(gone)}", None
            )
            written = self._upsert(cursor, dataset, stored, known, put.height)
            return written + Written(deleted=deleted)

        return self._transaction(f"replacing rows of {dataset}", act)

    def delete(self, dataset: str, filter: Filter) -> int:
        def act(cursor: Cursor) -> int:
            _, schema = self._table(cursor, dataset)
            return cursor.execute(f"DELETE FROM {quoted(dataset)} {_all(_where(dataset, schema, filter))}", None)

        return self._transaction(f"deleting rows of {dataset}", act)

    # reading

    def scan(self, dataset: str, filter: Filter = Filter()) -> pl.LazyFrame:
        _, schema = self._done(f"reading {dataset}", lambda cursor: self._table(cursor, dataset))
        types = schema.polars(system=True)
        names = filters.columns(dataset, filter, schema)
        where = _where(dataset, schema, filter)

        def read(shown: Sequence[str], most: int | None) -> Iterator[pl.DataFrame]:
            yield from self._frames(dataset, schema, {name: types[name] for name in shown}, where, most)

        return lazyframes.scan(names, types, read)

    def arrow(self, dataset: str, filter: Filter = Filter()) -> Iterator[pa.RecordBatch]:
        return lazyframes.arrow(self.scan(dataset, filter))

    def watermarks(self, dataset: str) -> dict[str, datetime | date]:
        def act(cursor: Cursor) -> dict[str, datetime | date]:
            _, schema = self._table(cursor, dataset)
            if schema.time is None:
                raise SchemaError(f"{dataset} has no time column, so it has no watermarks")
            table, newest = quoted(dataset), f"MAX({quoted(schema.time)})"
            if schema.subject is None:
                cursor.execute(f"SELECT {newest} FROM {table}", None)
                found = [(lazyframes.EVERY_SUBJECT, at) for (at,) in cursor.fetchall()]
            else:
                # where the key begins with both, the engine jumps from subject to subject in it
                subject = quoted(schema.subject)
                cursor.execute(f"SELECT {subject}, {newest} FROM {table} GROUP BY {subject}", None)
                found = cursor.fetchall()
            return {each: utc(at) for each, at in found if each is not None and at is not None}

        return self._done(f"reading the watermarks of {dataset}", act)

    def count(self, dataset: str, filter: Filter = Filter()) -> int:
        def act(cursor: Cursor) -> int:
            _, schema = self._table(cursor, dataset)
            where = _all(_where(dataset, schema, filter))
            return int(_one(cursor, f"SELECT COUNT(*) FROM {quoted(dataset)} {where}"))

        return self._done(f"counting the rows of {dataset}", act)

    def fingerprints(self, dataset: str, recipe: fingerprints.Recipe, filter: Filter = Filter()) -> pl.DataFrame:
        _, schema = self._done(f"reading {dataset}", lambda cursor: self._table(cursor, dataset))
        plan = fingerprints.plan(dataset, recipe, schema)
        where = _all(_where(dataset, schema, filter))
        said = fingerprint_sql.mysql(quoted).statement(plan, quoted(dataset), where)
        with self._told(f"computing fingerprints of {dataset}"), self._apart() as connection:
            cursor: Cursor = connection.cursor()
            cursor.execute(said, None)
            return fingerprints.finished(plan, answer(cursor.fetchall(), cursor.description))

    # the rest

    def datasets(self) -> list[str]:
        def act(cursor: Cursor) -> list[str]:
            if not (marked := _marked(cursor)):
                return []
            cursor.execute(f"SELECT marker, shape, dataset FROM {_SCHEMAS}", None)
            datasets = {_mark(marker, shape): dataset for marker, shape, dataset in cursor.fetchall()}
            found = [(name, datasets.get(comment, "")) for name, comment in marked]
            return sorted(dataset for name, dataset in found if self._fold(name) == self._fold(dataset))

        return self._done("listing the tables", act)

    def info(self, dataset: str) -> TableInfo:
        rows = self.count(dataset)

        def act(cursor: Cursor) -> int:
            cursor.execute(
                "SELECT TABLE_NAME, DATA_LENGTH + INDEX_LENGTH FROM information_schema.TABLES "
                "WHERE TABLE_SCHEMA = DATABASE() AND TABLE_NAME = %s",
                [dataset],
            )
            sizes = {self._fold(name): int(size or 0) for name, size in cursor.fetchall()}
            return sizes.get(self._fold(dataset), 0)

        return TableInfo(
            dataset,
            rows=rows,
            bytes=self._done(f"measuring {dataset}", act),
            files=1,
            commits=None,
            location=f"{self.url}: {quoted(dataset)}",
        )

    def version(self) -> str:
        said = self._done("asking for the version", lambda cursor: _one(cursor, "SELECT VERSION()"))
        return f"{'MariaDB' if 'MariaDB' in said else 'MySQL'} {said.partition('-')[0]}"

    def query(self, sql: str) -> pl.DataFrame:
        import polars as pl
        import pymysql
        from pymysql.cursors import SSCursor

        said = statements.question(sql, statements.MYSQL_SILENT)
        if "/*!" in said or "/*M!" in said:
            raise QueryRefused(
                "a comment that the engine would run (/*! ... */) is no part of a question; leave it out"
            )
        datasets = self.datasets()
        found: list[pl.DataFrame] = []
        try:
            with self._told("a query"), self._apart() as connection:
                connection.query("SET SESSION TRANSACTION READ ONLY")
                cursor: Cursor = connection.cursor(SSCursor)
                cursor.execute(named(said, datasets), None)
                described = cursor.description or ()
                while rows := cursor.fetchmany(_READ_ROWS):
                    found.append(answer(rows, described))
                if not found:
                    found.append(answer([], described))
        except StoreError as error:
            cause = error.__cause__
            if isinstance(cause, pymysql.MySQLError) and _code(cause) not in _NOT_THE_QUERY:
                raise QueryRefused(f"{error}. Tables here: {', '.join(datasets) or 'none'}") from error
            raise
        return pl.concat(found, how="vertical_relaxed")

    def adopt(self, dataset: str, schema: Schema, wish: Wish) -> Adoption:
        """Make a table that is there ours in place, in one ALTER (see `storage/adoption.py`)."""
        from storage import mysql_adoption as taking
        from storage.adoption_sql import already

        evolution.check(dataset, schema)
        _refuse_names(dataset, schema)

        def act(cursor: Cursor) -> Adoption:
            with suppress(ForeignTable):
                if (found := self._described(cursor, dataset)) is not None:
                    table = quoted(dataset)
                    ask = taking.dialect(cursor, None, table)
                    return already(ask, table, dataset, schema, wish, *found)
            name = taking.found(cursor, dataset, wish, self._fold)
            longest, uniques, triggers = longest_key(dataset, schema), _uniques(cursor, name), _triggers(cursor, name)
            look = taking.look(cursor, name, schema, wish, _TYPES, self._collation, longest, uniques, triggers)
            look.refuse()
            counts = look.counts()
            marker = uuid.uuid4().hex
            comment = "COMMENT='...'" if wish.dry else ""
            if not wish.dry:
                self._make_room(cursor, dataset)
                comment = f"COMMENT={self._comment(cursor, dataset, schema, marker)}"
            done = taking.statements(
                look,
                name,
                dataset,
                lambda column, required: self._column(schema, column, required),
                self._system(),
                f"ENGINE=InnoDB, ROW_FORMAT=DYNAMIC, {comment}",
            )
            for statement in () if wish.dry else done:
                try:
                    cursor.execute(statement, None)
                except pymysql.MySQLError as error:
                    if _code(error) not in _NOT_KEPT:
                        raise
                    raise AdoptionRefused(look.table, [str(error.args[-1])]) from error
            notes = [*look.notes(adoption.STAYS), *taking.unseen(cursor, name if wish.dry else dataset)]
            return Adoption(look.table, None if wish.dry else marker, counts, done, notes, look.names.extra)

        import pymysql

        def alone(cursor: Cursor) -> Adoption:
            if wish.dry:
                return act(cursor)
            with self._alone(cursor):
                return act(cursor)

        return self._done(f"adopting the table of {dataset}", alone)

    def maintain(self, dataset: str) -> str:
        def act(cursor: Cursor) -> str:
            self._table(cursor, dataset)
            cursor.execute(
                "SELECT TABLE_NAME, DATA_FREE, DATA_LENGTH FROM information_schema.TABLES "
                "WHERE TABLE_SCHEMA = DATABASE() AND TABLE_NAME = %s",
                [dataset],
            )
            sizes = {self._fold(name): (int(free or 0), int(used or 0)) for name, free, used in cursor.fetchall()}
            free, used = sizes.get(self._fold(dataset), (0, 0))
            # to build a table anew takes as long as to fill it: only where a third of it is empty
            rebuild = free > _SPARE_BYTES and free * 3 > free + used
            cursor.execute(f"{'OPTIMIZE' if rebuild else 'ANALYZE'} TABLE {quoted(dataset)}", None)
            for _, _, kind, words in cursor.fetchall():
                if str(kind).lower() == "error":
                    raise StoreError(f"MySQL {self.url}, maintaining {dataset}: {words}")
            return f"{dataset}: {'built anew and analysed' if rebuild else 'analysed'}"

        return self._done(f"maintaining {dataset}", act)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._let_go()

    # connections and transactions

    def _connection(self) -> Connection:
        """Return the connection for writing, made anew when there is none."""
        if self._closed:
            raise StoreError(f"the store {self.url} was closed; open it again")
        if self._open is None or not self._open.open:
            # only this connection lets the server ask for files: for the one that a LOAD DATA has named
            connection = _connect(self._place, local_infile=True)
            try:
                cursor: Cursor = connection.cursor()
                cursor.execute("SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED")
                self._loads = bool(_one(cursor, "SELECT @@local_infile"))
                self._fold = str.lower if _one(cursor, "SELECT @@lower_case_table_names") else str
                cursor.execute(
                    "SELECT COLLATION_NAME FROM information_schema.COLLATIONS WHERE COLLATION_NAME IN (%s, %s)",
                    _COLLATIONS,
                )
                known = [name for (name,) in cursor.fetchall()]
                self._collation = next((name for name in _COLLATIONS if name in known), "")
                if not self._collation:
                    raise StoreError(
                        f"the server of {self.url} has no collation that tells all texts apart "
                        f"({' or '.join(_COLLATIONS)}); MariaDB has one since 10.2, MySQL since 8.0.17"
                    )
            except BaseException:
                connection.close()
                raise
            self._open = connection
        return self._open

    def _let_go(self) -> None:
        import pymysql

        if self._open is not None:
            with suppress(pymysql.MySQLError, OSError):
                self._open.close()
            self._open = None

    @contextmanager
    def _apart(self) -> Iterator[Connection]:
        """Open a connection for reading, and close it, however much of an answer has been read."""
        connection = _connect(self._place)
        try:
            yield connection
        finally:
            # to close a cursor would mean to read what is left of its answer, which may be all of a table
            if (result := connection._result) is not None:
                result.unbuffered_active = False
                result.connection = None
            connection.close()

    @contextmanager
    def _told(self, what: str) -> Iterator[None]:
        """Turn what the driver raises into a `StoreError` that says what was being done, and where."""
        import pymysql

        try:
            yield
        except (pymysql.MySQLError, OSError) as error:
            said = error.args[-1] if isinstance(error, pymysql.MySQLError) and error.args else error
            why = " ".join(str(said).split()) or type(error).__name__
            remedy = ""
            if isinstance(error, pymysql.OperationalError) and _code(error) in (1045, 1049, 2003, 2005):
                remedy = "; is the server up, and does the URL name its host, database, user and password?"
            here = self._place["database"]
            if (denied := _DENIED.match(why)) and denied[3] in (None, here):
                remedy = f"; let somebody who may say: GRANT {denied[1]} ON {quoted(here)}.* TO {denied[2]}"
            if _code(error) == _SAME_NAME:  # the engine takes A, a and á for one letter
                raise SchemaError(
                    f"MySQL {self.url}, {what}: {why}; to this engine two names are one: rename a column in the "
                    "definition (as: ...)"
                ) from error
            raise StoreError(f"MySQL {self.url}, {what}: {why}{remedy}") from error

    def _done(self, what: str, act: Callable[[Cursor], Result]) -> Result:
        """Do what needs no transaction, once more where the connection had been lost before."""
        return self._tried(what, act, transaction=False)

    def _transaction(self, what: str, act: Callable[[Cursor], Result]) -> Result:
        """Do `act` in a transaction, all over again after a deadlock."""
        return self._tried(what, act, transaction=True)

    def _tried(self, what: str, act: Callable[[Cursor], Result], *, transaction: bool) -> Result:
        import pymysql

        with self._lock, self._told(what):
            for attempt in range(_ATTEMPTS):
                if attempt:
                    time.sleep(random.uniform(0, _STEP_SECONDS * 2**attempt))
                connection = self._begun(transaction)
                try:
                    with closing(connection.cursor()) as cursor:
                        result = act(cursor)
                    if transaction:
                        connection.commit()
                    return result
                except pymysql.MySQLError as error:
                    self._undo(connection)
                    if _code(error) not in _AGAIN or attempt == _ATTEMPTS - 1:
                        raise
                except MarketSyncError:
                    self._undo(connection)
                    raise
                except BaseException:
                    # an answer may be on its way, which would be taken for that of the next statement
                    self._let_go()
                    raise
        raise AssertionError("unreachable")

    def _begun(self, transaction: bool) -> Connection:
        import pymysql

        begin = "START TRANSACTION" if transaction else "DO 0"
        connection = self._connection()
        try:
            connection.query(begin)
        except pymysql.MySQLError as error:
            if _code(error) not in _LOST:
                raise
            # servers end connections that nobody used for a while, and nothing was under way in this one
            self._let_go()
            connection = self._connection()
            connection.query(begin)
        return connection

    def _undo(self, connection: Connection) -> None:
        import pymysql

        try:
            connection.rollback()
        except (pymysql.MySQLError, OSError):
            self._let_go()

    @contextmanager
    def _alone(self, cursor: Cursor) -> Iterator[None]:
        """Hold the one lock that those take who make or change tables of this database."""
        import pymysql

        place = hashlib.sha256(str(_one(cursor, "SELECT DATABASE()")).encode()).hexdigest()[:32]
        name = f"marketsync:{place}"
        if _one(cursor, f"SELECT GET_LOCK('{name}', {_LOCK_SECONDS})") != 1:
            holder = _one(cursor, f"SELECT IS_USED_LOCK('{name}')")
            raise StoreBusy(
                f"connection {holder} to {self.url} has been making a table for more than {_LOCK_SECONDS} s; try again"
            )
        try:
            yield
        finally:
            with suppress(pymysql.MySQLError):
                cursor.execute(f"DO RELEASE_LOCK('{name}')", None)

    # tables

    def _described(self, cursor: Cursor, dataset: str) -> tuple[str, Schema] | None:
        """Return the table's marker and schema; None when there is no table."""
        location.split(dataset)
        cursor.execute(
            "SELECT TABLE_NAME, TABLE_COMMENT FROM information_schema.TABLES "
            "WHERE TABLE_SCHEMA = DATABASE() AND TABLE_NAME = %s",
            [dataset],
        )
        # the comparison takes A for a, the names of tables may not
        comments = {self._fold(name): comment for name, comment in cursor.fetchall()}
        found = comments.get(self._fold(dataset))
        if found is None:
            return None
        try:
            comment = json.loads(found)
            marker, shape = str(comment["marketsync"]), str(comment["schema"])
        except (ValueError, KeyError, TypeError) as error:
            raise ForeignTable(
                f"the table {quoted(dataset)} in {self.url} was not made by MarketSync; "
                f"{adoption.remedy(dataset)}; or rename it (RENAME TABLE ... TO ...), and {dataset} will be made "
                "and filled"
            ) from error
        cursor.execute(f"SELECT dataset, text FROM {_SCHEMAS} WHERE marker = %s AND shape = %s", [marker, shape])
        kept = cursor.fetchone()
        if kept is None:
            raise StoreError(
                f"the schema of {quoted(dataset)} in {self.url} is no longer in {_SCHEMAS}: put that "
                f"table's rows back from a backup, or drop {quoted(dataset)}, and it will be made and filled again"
            )
        if kept[0] != dataset:
            raise ForeignTable(
                f"the table {quoted(dataset)} in {self.url} has the mark of {kept[0]}, of which it is a copy, or whose "
                f"name it had: {adoption.remedy(dataset)}; or rename it, and {dataset} will be made and filled"
            )
        return marker, evolution.from_text(kept[1])

    def _table(self, cursor: Cursor, dataset: str) -> tuple[str, Schema]:
        found = self._described(cursor, dataset)
        if found is None:
            raise location.absent("table", dataset, self.url)
        return found

    def _create(self, cursor: Cursor, dataset: str, schema: Schema, marker: str) -> None:
        self._make_room(cursor, dataset)
        comment = self._comment(cursor, dataset, schema, marker)
        must = evolution.required(schema)
        columns = [self._column(schema, column, column.name in must) for column in schema.columns]
        columns += self._system()
        key = ", ".join(map(quoted, schema.key))
        cursor.execute(
            f"CREATE TABLE {quoted(dataset)} ({', '.join(columns)}, PRIMARY KEY ({key})) {self._made()} "
            f"COMMENT={comment}",
            None,
        )

    def _make_room(self, cursor: Cursor, dataset: str) -> None:
        """Make the tables of what was delivered and of schemas, without what is left of a table that is gone."""
        made = self._made()
        cursor.execute(
            f"CREATE TABLE IF NOT EXISTS {_COMMITS} (marker CHAR(32) NOT NULL, lane VARCHAR(255) NOT NULL, "
            f"seq BIGINT NOT NULL, PRIMARY KEY (marker, lane)) {made}",
            None,
        )
        cursor.execute(
            f"CREATE TABLE IF NOT EXISTS {_SCHEMAS} (marker CHAR(32) NOT NULL, shape CHAR(64) NOT NULL, "
            f"dataset VARCHAR(64) NOT NULL, text LONGTEXT NOT NULL, PRIMARY KEY (marker, shape)) {made}",
            None,
        )
        # what is left of tables of this name that somebody dropped; one that was set aside may come back
        there = " ".join(comment for _, comment in _marked(cursor))
        cursor.execute(f"SELECT DISTINCT marker FROM {_SCHEMAS} WHERE dataset = %s", [dataset])
        for marker in [marker for (marker,) in cursor.fetchall() if marker not in there]:
            for table in (_COMMITS, _SCHEMAS):
                cursor.execute(f"DELETE FROM {table} WHERE marker = %s", [marker])

    def _evolve(self, cursor: Cursor, dataset: str, stored: Schema, schema: Schema, marker: str) -> None:
        changes = [f"ADD COLUMN {self._column(schema, c, False)}" for c in evolution.added(dataset, stored, schema)]
        now = evolution.required(schema)
        changes += [
            f"MODIFY COLUMN {self._column(schema, schema[name], False)}"
            for name in evolution.required(stored)
            if name not in now
        ]
        # columns and comment change in one statement, or not at all
        changes.append(f"COMMENT={self._comment(cursor, dataset, schema, marker)}")
        cursor.execute(f"ALTER TABLE {quoted(dataset)} {', '.join(changes)}", None)

    def _comment(self, cursor: Cursor, dataset: str, schema: Schema, marker: str) -> str:
        """Write the schema down, and return the comment that names it."""
        text = evolution.to_text(schema)
        shape = hashlib.sha256(text.encode()).hexdigest()
        cursor.execute(
            f"INSERT IGNORE INTO {_SCHEMAS} (marker, shape, dataset, text) VALUES (%s, %s, %s, %s)",
            [marker, shape, dataset, text],
        )
        return literal(_mark(marker, shape))

    def _made(self) -> str:
        return f"ENGINE=InnoDB ROW_FORMAT=DYNAMIC DEFAULT CHARACTER SET utf8mb4 COLLATE {self._collation}"

    def _column(self, schema: Schema, column: Column, required: bool) -> str:
        type_ = _TYPES[column.type]
        if column.type is ColumnType.STR:
            if column.name in schema.key:
                type_ = f"VARCHAR({longest_key('', schema)})"
            type_ += f" CHARACTER SET utf8mb4 COLLATE {self._collation}"
        return f"{quoted(column.name)} {type_} {'NOT NULL' if required else 'NULL'}"

    def _system(self) -> list[str]:
        return [
            f"{quoted(SEGMENT_COLUMN)} VARCHAR(255) CHARACTER SET utf8mb4 COLLATE {self._collation} NOT NULL",
            f"{quoted(INGESTED_COLUMN)} DATETIME(6) NOT NULL",
        ]

    # rows on their way in

    def _admitted(
        self, dataset: str, frame: pl.DataFrame, sent: Schema, stored: Schema
    ) -> tuple[pl.DataFrame, list[Column]]:
        """Return the rows in the form in which they are sent, and the columns that the batch knows."""
        import polars as pl

        admitted = admission.admit(dataset, frame, sent, self.capabilities, self.unkept(dataset, stored))
        frame, absent = evolution.fit(dataset, admitted, sent, stored)
        known = [column for column in stored.columns if column.name not in absent]
        casts = []
        for column in known:
            if column.type in (ColumnType.F32, ColumnType.F64):
                casts.append(pl.col(column.name).cast(pl.Float64))
            elif column.type is ColumnType.BOOL:
                casts.append(pl.col(column.name).cast(pl.Int8))
        # -0.0 becomes 0.0 in MariaDB anyway, not in MySQL, and to both they are equal
        sent_as = admission.without_signs(frame.drop(absent).with_columns(casts))
        return sent_as.sort(stored.key), known  # in the order of the key, in which the engine keeps them

    def _stage(self, cursor: Cursor, dataset: str, schema: Schema, frame: pl.DataFrame) -> None:
        must = evolution.required(schema)
        columns = [self._column(schema, c, c.name in must) for c in schema.columns if c.name in frame.columns]
        columns += self._system()
        key = ", ".join(map(quoted, schema.key))
        cursor.execute(f"DROP TEMPORARY TABLE IF EXISTS {_STAGE}", None)
        cursor.execute(
            f"CREATE TEMPORARY TABLE {_STAGE} ({', '.join(columns)}, PRIMARY KEY ({key})) {self._made()}", None
        )
        if frame.height:
            self._send(cursor, dataset, _STAGE, frame)

    def _send(self, cursor: Cursor, dataset: str, table: str, frame: pl.DataFrame) -> None:
        """Put rows that are not there yet into a table; raises where the engine would leave out or change one."""
        if not self._loads:
            for said in insertions(table, frame, int(_one(cursor, "SELECT @@max_allowed_packet"))):
                cursor.execute(said, None)
            return
        # a file without a name, so that a process that is killed leaves nothing behind
        with tempfile.TemporaryFile() as file:
            loaded = cursor.execute(loading(table, file, frame), None)
        # however strict the engine is: of a local file it leaves rows out and changes values, and only warns
        if cursor.warning_count or loaded != frame.height:
            cursor.execute("SHOW WARNINGS LIMIT 3", None)
            told = cursor.fetchall()
            words = "; ".join(str(each[2]) for each in told) or f"{loaded} of {frame.height} rows were loaded"
            kind = StoreError if any(each[1] == _DUPLICATE for each in told) else SchemaError
            raise kind(f"MySQL {self.url} would not keep rows for {dataset} as they are, nothing was written: {words}")

    def _upsert(self, cursor: Cursor, dataset: str, schema: Schema, known: Sequence[Column], rows: int) -> Written:
        """Take from the stage what is new or differs; rows that are equal stay as they are."""
        table = quoted(dataset)
        names = [*(column.name for column in known), *SYSTEM_COLUMNS]
        listed = ", ".join(map(quoted, names))
        values = [column.name for column in known if column.name not in schema.key]
        differs = " OR ".join(f"NOT ({table}.{quoted(name)} <=> s.{quoted(name)})" for name in values)
        if values:
            # one after the other, each seeing what those before it have set: so the values come last
            changes = [f"{quoted(n)} = IF({differs}, s.{quoted(n)}, {table}.{quoted(n)})" for n in SYSTEM_COLUMNS]
            changes += [f"{quoted(name)} = s.{quoted(name)}" for name in values]
        else:
            changes = [f"{quoted(schema.key[0])} = {table}.{quoted(schema.key[0])}"]
        # in the order of the key, so that two writers of the same rows wait for one another and seldom both
        selected = ", ".join(f"s.{quoted(name)}" for name in names)
        key = ", ".join(f"s.{quoted(name)}" for name in schema.key)
        affected = cursor.execute(
            f"INSERT INTO {table} ({listed}) SELECT {selected} FROM {_STAGE} s ORDER BY {key} "
            f"ON DUPLICATE KEY UPDATE {', '.join(changes)}",
            None,
        )
        updated = _updated(cursor)
        absent = f"{table}.{quoted(schema.key[0])} IS NULL"
        self._refuse_overwritten(cursor, dataset, schema, f"{absent} OR {differs}" if values else absent)
        cursor.execute(f"DROP TEMPORARY TABLE {_STAGE}", None)
        # a row that was updated counts twice
        inserted = affected - 2 * updated
        return Written(inserted, updated, rows - inserted - updated)

    def _refuse_overwritten(self, cursor: Cursor, dataset: str, schema: Schema, absent: str) -> None:
        """Raise `StoreError` where a row of the stage is `absent` from the table after all: the engine takes a row for
        another by any unique index, and a text by the collation that its column has now, and a trigger changes rows."""
        cursor.execute(
            "SELECT COLUMN_NAME FROM information_schema.COLUMNS WHERE TABLE_SCHEMA = DATABASE() AND TABLE_NAME = %s "
            "AND COLLATION_NAME <> %s",
            [dataset, self._collation],
        )
        if alike := [name for (name,) in cursor.fetchall() if name in schema]:
            must = evolution.required(schema)
            columns = ", ".join(f"MODIFY COLUMN {self._column(schema, schema[n], n in must)}" for n in alike)
            raise StoreError(
                f"{quoted(dataset)} in {self.url} takes unlike texts of {', '.join(alike)} for one, as somebody has "
                f"changed its collation; nothing was written: ALTER TABLE {quoted(dataset)} {columns}"
            )
        uniques = _uniques(cursor, dataset)
        others = [name for name, columns in uniques.items() if set(columns) != set(schema.key)]
        key = ", ".join(map(quoted, schema.key))
        table = quoted(dataset)
        if len(others) == len(uniques):
            raise StoreError(
                f"{table} in {self.url} has no unique index over its key any more, nothing was written: "
                f"ALTER TABLE {table} ADD PRIMARY KEY ({key})"
            )
        triggers = _triggers(cursor, dataset)
        if not (others or triggers):  # as nearly always; to look for each row costs a tenth of the write
            return
        if lost := _one(cursor, f"SELECT COUNT(*) FROM {_STAGE} s LEFT JOIN {table} USING ({key}) WHERE {absent}"):
            why = []
            if triggers:
                why.append(f"a trigger that changes rows, {' or '.join(map(quoted, triggers))}: DROP TRIGGER ...")
            if others:
                names = " or ".join(map(quoted, others))
                why.append(
                    f"beside that of its key a unique index, {names}, by which rows with other keys are the same: "
                    f"ALTER TABLE {table} DROP INDEX ..."
                )
            raise StoreError(
                f"{lost} rows for {table} in {self.url} would not be there as they were sent, nothing was written: "
                f"the table has {'; or '.join(why)}"
            )

    # rows on their way out

    def _frames(
        self, dataset: str, schema: Schema, types: dict[str, pl.DataType], where: Sequence[str], limit: int | None
    ) -> Iterator[pl.DataFrame]:
        """Yield the rows of a table as they come from the server, a bounded number at a time."""
        import polars as pl
        from pymysql.cursors import SSCursor

        texts = [name for name, type_ in types.items() if isinstance(type_, pl.String)]
        short = [name for name in texts if name in schema.key or name == SEGMENT_COLUMN]
        long = [name for name in texts if name not in short]
        said = f"SELECT {selected(types, long, short)} FROM {quoted(dataset)} {_all(where)}"
        if limit is not None:
            said += f" LIMIT {limit}"
        with self._told(f"reading {dataset}"), self._apart() as connection:
            cursor: Cursor = connection.cursor(SSCursor)
            cursor.execute(said, None)
            while rows := cursor.fetchmany(_READ_ROWS):
                yield parsed(rows, types, long, short)


def open_url(url: str, name: str) -> MySQLStore:
    """Open `mysql://user:password@host:port/database`; raises `ConfigurationError` for a URL that cannot be meant."""
    parts = urlsplit(url)
    try:
        port = parts.port or _PORT
    except ValueError as error:
        raise ConfigurationError(f"the store {name}: {error}; write mysql://user@host:3306/database") from error
    database = unquote(parts.path[1:])
    if not database or "/" in parts.path[1:]:
        raise ConfigurationError(f"the store {name} names no database: write mysql://user@host:3306/database")
    options = _options(name, dict(parse_qsl(parts.query, keep_blank_values=True)))
    place: dict[str, Any] = {"host": parts.hostname or "127.0.0.1", "port": port, "database": database, **options}
    if parts.username is not None:
        place["user"] = unquote(parts.username)
    if parts.password is not None:
        place["password"] = unquote(parts.password).encode()
    host = parts.netloc.rpartition("@")[2]
    return MySQLStore(f"mysql://{host}{parts.path}", name, place)


def longest_key(dataset: str, schema: Schema) -> int:
    """Return how many characters a text in the key of this schema may have; raises `SchemaError` when none."""
    types = [schema[name].type for name in schema.key]
    texts = types.count(ColumnType.STR)
    others = sum(_KEY_BYTES.get(type_, 8) for type_ in types if type_ is not ColumnType.STR)
    longest = min(_LONGEST_KEY, (_INDEX_BYTES - others) // (_UTF8_BYTES * max(texts, 1)))
    if longest < 1 or len(types) > 16:
        raise SchemaError(
            f"{dataset} cannot become a table in MySQL: its key has {len(types)} columns, and the engine's index takes "
            f"16 columns and {_INDEX_BYTES} bytes; take columns out of the key"
        )
    return longest


def _options(name: str, given: dict[str, str]) -> dict[str, Any]:
    """Return what PyMySQL is told beside the place, from the options of a URL."""

    def refuse(why: str) -> None:
        raise ConfigurationError(f"the store {name}: {why}")

    said: dict[str, Any] = {"connect_timeout": 10}
    for option, value in given.items():
        if option in _TEXTS:
            said[option] = value
        elif option in _NUMBERS:
            if not value.isdigit() or not int(value):
                refuse(f"{option}={value!r} is no number of seconds")
            said[option] = int(value)
        elif option in _SWITCHES:
            if value.lower() not in _WORDS:
                refuse(f"{option}={value!r} is neither true nor false")
            said[option] = _WORDS[value.lower()]
        else:
            known = ", ".join(sorted(_TEXTS | _NUMBERS | _SWITCHES))
            refuse(f"{option} is no option of a mysql:// store; options: {known}")
    return said


def _tls(said: dict[str, Any]) -> dict[str, Any]:
    """Return the options with those of TLS made one context: PyMySQL by itself checks no host name without `ssl_ca`."""
    plain = {option: value for option, value in said.items() if not option.startswith("ssl_")}
    if said.get("ssl_disabled"):
        return {**plain, "ssl_disabled": True}
    if not any(option.startswith("ssl_") for option in said):
        return plain  # as well as the server can: encrypted if it knows how to
    try:
        context = ssl.create_default_context(cafile=said.get("ssl_ca"))
        if "ssl_cert" in said:
            context.load_cert_chain(said["ssl_cert"], said.get("ssl_key"), said.get("ssl_key_password"))
    except OSError as error:
        given = [f"{name}={said[name]}" for name in ("ssl_ca", "ssl_cert", "ssl_key") if name in said]
        missing = [each for each in given if not Path(each.partition("=")[2]).exists()]
        raise ConfigurationError(
            f"the certificates that a mysql:// URL names cannot be used ({', '.join(missing or given)}): {error}"
        ) from error
    context.check_hostname = said.get("ssl_verify_identity", False)
    if not (context.check_hostname or said.get("ssl_verify_cert", "ssl_ca" in said)):
        context.verify_mode = ssl.CERT_NONE
    return {**plain, "ssl": context}


def _connect(place: dict[str, Any], **more: Any) -> Connection:
    import pymysql

    try:
        return pymysql.connect(
            **_tls(place),
            charset="utf8mb4",
            autocommit=True,
            init_command=_SESSION,
            program_name="marketsync",
            **more,
        )
    except RuntimeError as error:  # a way to log in that needs a package which is not installed
        raise pymysql.OperationalError(1045, str(error)) from error


def _code(error: BaseException) -> int:
    return error.args[0] if error.args and isinstance(error.args[0], int) else -1


def _refuse_names(dataset: str, schema: Schema) -> None:
    location.split(dataset)
    for name in (dataset, *schema.names):
        why = ""
        if len(name) > _LONGEST_NAME:
            why = f"is longer than {_LONGEST_NAME} characters"
        elif any(ord(character) > 0xFFFF for character in name):
            why = "has a character that names in this engine cannot have"
        if why:
            raise SchemaError(
                f"{dataset} cannot become a table in MySQL: the name {name!r} {why}; "
                "rename it in the definition (as: ...)"
            )


def _committed(cursor: Cursor, marker: str, lane: str) -> int:
    cursor.execute(f"SELECT seq FROM {_COMMITS} WHERE marker = %s AND lane = %s", [marker, lane])
    found = cursor.fetchone()
    return 0 if found is None else int(found[0])


def _commit(cursor: Cursor, marker: str, lane: str, seq: int) -> None:
    cursor.execute(
        f"INSERT INTO {_COMMITS} (marker, lane, seq) VALUES (%s, %s, %s) "
        "ON DUPLICATE KEY UPDATE seq = GREATEST(seq, %s)",
        [marker, lane, seq, seq],
    )


def _updated(cursor: Cursor) -> int:
    """Return how many rows the last `INSERT ... SELECT ... ON DUPLICATE KEY UPDATE` has changed: the engine says it in
    `Records: 5  Duplicates: 1  Warnings: 0`, in words of its own language."""
    said = (cursor._result.message or b"").decode("utf-8", "replace")
    numbers = re.findall(r":\s*(\d+)", said)
    if len(numbers) != 3:
        raise StoreError(f"the server does not say how many rows it has changed: {said!r}; nothing was written")
    return int(numbers[1])


def _where(dataset: str, schema: Schema, filter: Filter, of: str = "") -> list[str]:
    since, until = filters.bounds(dataset, filter, schema)
    subjects = filters.subjects(dataset, filter, schema)
    where: list[str] = []
    if since is not None:
        where.append(f"{of}{quoted(schema.time)} >= {_instant(since)}")
    if until is not None:
        where.append(f"{of}{quoted(schema.time)} < {_instant(until)}")
    if subjects is not None:
        listed = ", ".join(map(literal, subjects))
        where.append(f"{of}{quoted(schema.subject)} IN ({listed})" if listed else "FALSE")
    return where


def _instant(value: date | datetime) -> str:
    if isinstance(value, datetime):
        return f"TIMESTAMP'{value.astimezone(UTC).replace(tzinfo=None).isoformat(' ', 'microseconds')}'"
    return f"DATE'{value.isoformat()}'"


def _all(conditions: Sequence[str]) -> str:
    return f"WHERE {' AND '.join(conditions)}" if conditions else ""


def _mark(marker: str, shape: str) -> str:
    return json.dumps({"marketsync": marker, "schema": shape})


def _marked(cursor: Cursor) -> list[tuple[str, str]]:
    """Return the names and comments of the tables that have a mark of ours, be it a copied one."""
    cursor.execute(
        "SELECT TABLE_NAME, TABLE_COMMENT FROM information_schema.TABLES WHERE TABLE_SCHEMA = DATABASE() "
        "AND TABLE_COMMENT LIKE '{\"marketsync\":%'",
        None,
    )
    return list(cursor.fetchall())


def _uniques(cursor: Cursor, table: str) -> dict[str, list[str]]:
    """Return the unique indexes with their columns; one of which only the beginning counts is `symbol(3)`."""
    cursor.execute(
        "SELECT INDEX_NAME, CONCAT(IFNULL(COLUMN_NAME, '(expression)'), IFNULL(CONCAT('(', SUB_PART, ')'), '')) "
        "FROM information_schema.STATISTICS WHERE TABLE_SCHEMA = DATABASE() AND TABLE_NAME = %s AND NON_UNIQUE = 0 "
        "ORDER BY INDEX_NAME, SEQ_IN_INDEX",
        [table],
    )
    found: dict[str, list[str]] = {}
    for index, column in cursor.fetchall():
        found.setdefault(index, []).append(column)
    return found


def _triggers(cursor: Cursor, table: str) -> list[str]:
    """Return the table's triggers, as far as the user may see them."""
    cursor.execute(
        "SELECT TRIGGER_NAME FROM information_schema.TRIGGERS "
        "WHERE EVENT_OBJECT_SCHEMA = DATABASE() AND EVENT_OBJECT_TABLE = %s",
        [table],
    )
    return [name for (name,) in cursor.fetchall()]


def _one(cursor: Cursor, sql: str) -> Any:
    cursor.execute(sql, None)
    found = cursor.fetchone()
    return None if found is None else found[0]
