"""Adopting a PostgreSQL table in place: what its columns, keys and indexes say, which ALTERs make it ours, in one
transaction of `storage/postgres.py`. Rows are looked at and counted by the server, and none is copied."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from marketsync.errors import AdoptionRefused, NoTable
from marketsync.schema import INGESTED_COLUMN, SEGMENT_COLUMN, Column, ColumnType, Schema
from storage import adoption, evolution, location
from storage.adoption import WHOLE, Adoption, Names, Wish

if TYPE_CHECKING:
    import polars as pl

Cursor = Any
_TEXTS = ("text", "varchar", "bpchar", "name", "citext")
_INTS = {"int2": 15, "int4": 31, "int8": 63}
_BITS = {ColumnType.I32: 31, ColumnType.I64: 63, ColumnType.U64: 64}
_PLAIN = {
    ColumnType.BOOL: "bool",
    ColumnType.I32: "int4",
    ColumnType.I64: "int8",
    ColumnType.F32: "float4",
    ColumnType.F64: "float8",
    ColumnType.DATE: "date",
}
_DAY_TEXT = r"^\d{4}-?\d\d-?\d\d( 00:00:00)?$"
_OFFSET = r"(Z|[+-]\d\d(:?\d\d)?)$"
_TIME_TEXT = r"^\d{4}-\d\d-\d\d([T ]\d\d:\d\d(:\d\d(\.\d{1,6})?)?"
_MOST_EXACT = 2**53  # the last whole number up to which doubles have all
_FETCHED_ROWS = 100_000


@dataclass(frozen=True)
class _Theirs:
    """One column as it is."""

    name: str
    shown: str  # the type as DDL has it
    type: str
    kind: str  # b, d (domain), e (enum) ...
    modifier: int
    required: bool
    filled: bool  # a default, an identity
    generated: bool  # nobody else may give it a value
    collation: str | None


@dataclass(frozen=True)
class _Fit:
    """How a column becomes ours: the values as ours, the type to alter it to (None: it is), which rows would lose."""

    value: str
    type: str | None = None
    loses: str | None = None
    what: str = ""
    note: str = ""
    refusal: str = ""


@dataclass(frozen=True)
class _Index:
    name: str
    primary: bool
    immediate: bool
    plain: bool
    columns: list[str]


@dataclass
class Taker:
    """One table on its way to a dataset: `look` finds every reason against it, `statements` say what is to be done."""

    cursor: Cursor
    dataset: str
    schema: Schema
    wish: Wish
    types: dict[ColumnType, str]
    system: dict[str, str]
    space: str = ""
    name: str = ""
    columns: dict[str, _Theirs] = field(default_factory=dict)
    names: Names = field(default_factory=lambda: Names({}, (), ()))
    fits: dict[str, _Fit] = field(default_factory=dict)
    indexes: list[_Index] = field(default_factory=list)

    @property
    def table(self) -> str:
        return f"{quoted(self.space)}.{quoted(self.name)}"

    def find(self) -> None:
        """Find the table; raises `NoTable`, or `AdoptionRefused` for what is no ordinary one."""
        own = location.split(self.dataset)
        given = self.wish.table
        space, dot, name = (given or "").partition(".")
        places = [own] if given is None else [(space, name)] if dot else []
        if given is not None and not dot:
            found = self.cursor.execute("SELECT unnest(current_schemas(false))").fetchall()
            places = [(each, given) for (each,) in found]
        for place in places:
            kind = self._kind(*place)
            if kind is None:
                continue
            self.space, self.name = place
            if kind != "r":
                what = {"v": "a view", "m": "a materialized view", "f": "a foreign table", "p": "cut into partitions"}
                raise AdoptionRefused(
                    self.table,
                    [
                        f"it is {what.get(kind, 'no ordinary table')}, which cannot be taken as it is: CREATE TABLE "
                        f"{quoted(self.name + '_plain')} AS SELECT * FROM {self.table}, and adopt that by --table"
                    ],
                )
            if place != own and self._kind(*own) is not None:
                raise AdoptionRefused(
                    self.table, [f"there is a table {'.'.join(map(quoted, own))} already, which has the name it must get"]
                )
            return
        shown = " or ".join(".".join(place) for place in places) or given
        raise NoTable(f"there is no table {shown}, so there is none of {self.dataset} to adopt; name one by --table")

    def _kind(self, space: str, name: str) -> str | None:
        found = self.cursor.execute(
            "SELECT c.relkind::text FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace "
            "WHERE n.nspname = %s AND c.relname = %s AND c.relkind IN ('r', 'p', 'v', 'm', 'f')",
            [space, name],
        ).fetchone()
        return None if found is None else found[0]

    def look(self) -> None:
        """Raise `AdoptionRefused` with every reason there is."""
        self._read()
        reasons: list[str] = []
        self.names = adoption.matched(self.schema, list(self.columns), self.wish, reasons)
        must = evolution.required(self.schema)
        for ours, theirs in self.names.theirs.items():
            column = self.columns[theirs]
            fit = self._fit(self.schema[ours], column)
            self.fits[ours] = fit
            if fit.refusal:
                reasons.append(fit.refusal)
            if column.generated:
                reasons.append(
                    f"column {theirs!r} is generated, and nobody else may give it a value: ALTER TABLE {self.table} "
                    f"ALTER COLUMN {quoted(theirs)} DROP EXPRESSION (DROP IDENTITY where it is one)"
                )
        for name in self.names.extra:
            column = self.columns[name]
            if column.required and not column.filled and not column.generated:
                reasons.append(
                    f"your column {name!r} may not be null and has no default, so no row could be added: ALTER TABLE "
                    f"{self.table} ALTER COLUMN {quoted(name)} DROP NOT NULL"
                )
        ours_of = {theirs: ours for ours, theirs in self.names.theirs.items()}
        for index in self.indexes:
            known = [ours_of[name] for name in index.columns if name in ours_of]
            if index.columns and len(known) == len(index.columns) and not set(self.schema.key) <= set(known):
                drop = f"ALTER TABLE {self.table} DROP CONSTRAINT {quoted(index.name)} (or DROP INDEX)"
                reasons.append(
                    f"the unique index {index.name!r} over {', '.join(index.columns)} would refuse rows that the key "
                    f"({', '.join(self.schema.key)}) tells apart: {drop}"
                )
        reasons += self._lost(must)
        adoption.refuse(self.table, reasons)
        adoption.refuse(self.table, self._twins())

    def _read(self) -> None:
        found = self.cursor.execute(
            "SELECT a.attname, format_type(a.atttypid, a.atttypmod), t.typname, t.typtype::text, a.atttypmod, "
            "a.attnotnull, a.atthasdef OR a.attidentity <> '', a.attgenerated <> '' OR a.attidentity = 'a', l.collname "
            "FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid LEFT JOIN pg_collation l ON l.oid = a.attcollation "
            "WHERE a.attrelid = %s::regclass AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum",
            [self.table],
        )
        self.columns = {row[0]: _Theirs(*row) for row in found}
        found = self.cursor.execute(
            "SELECT c.relname, i.indisprimary, i.indimmediate, i.indpred IS NULL AND i.indexprs IS NULL, "
            "ARRAY(SELECT a.attname::text FROM unnest(i.indkey) WITH ORDINALITY k(n, o) JOIN pg_attribute a "
            "ON a.attrelid = i.indrelid AND a.attnum = k.n WHERE k.o <= i.indnkeyatts ORDER BY k.o) "
            "FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid WHERE i.indrelid = %s::regclass AND i.indisunique",
            [self.table],
        )
        self.indexes = [_Index(*row) for row in found]

    def _lost(self, must: Sequence[str]) -> list[str]:
        """Ask, in one reading of the table, for values that would be lost and for nulls where none may be."""
        asked: list[str] = []
        told: list[Callable[[list[Any]], str]] = []
        for ours, fit in self.fits.items():
            theirs = self.columns[self.names.theirs[ours]]
            name = quoted(theirs.name)
            if fit.loses and not fit.refusal:
                where = f"FILTER (WHERE {name} IS NOT NULL AND ({fit.loses}))"
                asked += [f"count(*) {where}", f"min({name}::text) {where}"]
                told.append(
                    lambda two, ours=ours, theirs=theirs, fit=fit: adoption.lossy(
                        theirs.name, theirs.shown, self.schema[ours].type, two[0], two[1], fit.what, self._by_hand(ours)
                    )
                )
            if ours in must:
                asked += [f"count(*) FILTER (WHERE {name} IS NULL)", "NULL::text"]
                told.append(lambda two, theirs=theirs, ours=ours: adoption.has_nulls(ours, self.schema, two[0]))
        if not asked:
            return []
        found = self.cursor.execute(f"SELECT {', '.join(asked)} FROM {self.table}").fetchone()
        pairs = [list(found[at : at + 2]) for at in range(0, len(found), 2)]
        return [tell(pair) for tell, pair in zip(told, pairs, strict=True) if pair[0]]

    def _twins(self) -> list[str]:
        """Ask for keys that are there more than once; an index that is unique has said that there are none."""
        if self._keyed() is not None and all(self.fits[name].type is None for name in self.schema.key):
            return []
        key = [self.fits[name].value for name in self.schema.key]
        places = ", ".join(str(at) for at in range(1, len(key) + 1))
        groups = (
            f"SELECT {', '.join(f'({each})::text AS k{at}' for at, each in enumerate(key))}, count(*) AS n "
            f"FROM {self.table} GROUP BY {places} HAVING count(*) > 1"
        )
        count, rows = self.cursor.execute(f"SELECT count(*), sum(n)::bigint FROM ({groups}) g").fetchone()
        if not count:
            return []
        first = self.cursor.execute(f"{groups} ORDER BY {places} LIMIT 1").fetchone()
        return [adoption.has_twins(self.schema, count, rows, first[:-1])]

    def counts(self) -> pl.DataFrame:
        """Return how many rows each subject has at each time, as the server counts them."""
        return counted(self.cursor, self.table, self.schema, self.wish, {n: fit.value for n, fit in self.fits.items()})

    def notes(self) -> list[str]:
        """Return what is worth knowing."""
        found = adoption.sentences(self.names, self.schema)
        found += [fit.note for fit in self.fits.values() if fit.note]
        if self.names.extra:
            found.append(f"columns of yours, which stay and which nothing here reads: {', '.join(self.names.extra)}")
        return found

    def statements(self) -> list[str]:
        """Return what makes the table ours, but for its comment."""
        own = location.split(self.dataset)
        said = [
            f"ALTER TABLE {self.table} RENAME COLUMN {quoted(theirs)} TO {quoted(ours)}"
            for ours, theirs in self.names.theirs.items()
            if ours != theirs
        ]
        changes: list[str] = []
        must = evolution.required(self.schema)
        primary = next((index.columns for index in self.indexes if index.primary), [])
        for ours, fit in self.fits.items():
            column = self.columns[self.names.theirs[ours]]
            name = quoted(ours)
            if fit.type is not None:
                # the values are said by the name that the column has by then
                using = fit.value.replace(quoted(column.name), name)
                changes.append(f"ALTER COLUMN {name} TYPE {fit.type} USING {using}")
            if ours in must and not column.required:
                changes.append(f"ALTER COLUMN {name} SET NOT NULL")
            if ours not in must and column.required and column.name not in primary:
                changes.append(f"ALTER COLUMN {name} DROP NOT NULL")
        changes += [f"ADD COLUMN {quoted(each.name)} {self.types[each.type]}" for each in self.names.absent]
        values = {SEGMENT_COLUMN: _literal(self.wish.segment), INGESTED_COLUMN: f"'{self.wish.at.isoformat()}'"}
        new = [name for name in self.system if name not in self.columns]
        changes += [f"ADD COLUMN {quoted(n)} {self.system[n]} NOT NULL DEFAULT {values[n]}" for n in new]
        if self._keyed() is None:
            key = ", ".join(map(quoted, self.schema.key))
            changes.append(f"ADD {'UNIQUE' if primary else 'PRIMARY KEY'} ({key})")
        if changes:
            said.append(f"ALTER TABLE {self.table} {', '.join(changes)}")
        if new:
            said.append(f"ALTER TABLE {self.table} {', '.join(f'ALTER COLUMN {quoted(n)} DROP DEFAULT' for n in new)}")
        if self.space != own[0]:
            said.append(f"ALTER TABLE {self.table} SET SCHEMA {quoted(own[0])}")
        if self.name != own[1]:
            said.append(f"ALTER TABLE {quoted(own[0])}.{quoted(self.name)} RENAME TO {quoted(own[1])}")
        return said

    def _keyed(self) -> _Index | None:
        """Return the index that shows that keys are unique."""
        key = {self.names.theirs[name] for name in self.schema.key}
        return next((i for i in self.indexes if i.immediate and i.plain and set(i.columns) == key), None)

    def _by_hand(self, ours: str, using: str = "...") -> str:
        name = quoted(self.names.theirs[ours])
        type_ = self.types[self.schema[ours].type]
        return f"decide what those are: ALTER TABLE {self.table} ALTER COLUMN {name} TYPE {type_} USING {using}"

    def _fit(self, column: Column, theirs: _Theirs) -> _Fit:
        """Return how a column of theirs becomes one of ours."""
        type_, name = column.type, quoted(theirs.name)
        as_it_is = _Fit(name)
        of = theirs.type if theirs.kind == "b" else ""
        if type_ is ColumnType.STR and of in _TEXTS:
            return as_it_is if of == "text" and theirs.collation == "C" else _Fit(f"{name}::text", self.types[type_])
        if of == _PLAIN.get(type_):
            return as_it_is
        fit = None
        if type_ in WHOLE:
            fit = self._whole(type_, of, name, theirs)
        elif type_ in (ColumnType.F32, ColumnType.F64):
            fit = self._float(type_, of, name, theirs)
        elif type_ is ColumnType.DATE:
            fit = self._date(of, name)
        elif type_ in (ColumnType.DATETIME, ColumnType.DATETIME_NS):
            fit = self._instant(column, of, name, theirs)
        return fit or self._refused(column, theirs, f"{name}::{self.types[type_].split(' COLLATE')[0]}")

    def _refused(self, column: Column, theirs: _Theirs, using: str) -> _Fit:
        alter = f"ALTER TABLE {self.table} ALTER COLUMN {quoted(theirs.name)} TYPE {self.types[column.type]} USING {using}"
        return _Fit(
            quoted(theirs.name),
            refusal=f"column {theirs.name!r} is {theirs.shown}, and the dataset's is {column.type}; nobody can know what "
            f"its values mean: {alter}",
        )

    def _whole(self, type_: ColumnType, of: str, name: str, theirs: _Theirs) -> _Fit | None:
        low, high = WHOLE[type_]
        sql = self.types[type_]
        what = f"hold no whole number that fits into {type_}"
        if of in _INTS:
            fits = _INTS[of] <= _BITS[type_] and low < 0
            return _Fit(f"{name}::{sql}", sql, None if fits else f"{name} NOT BETWEEN {low} AND {high}", what)
        if of == "numeric":
            if theirs.shown == "numeric(20,0)" and type_ is ColumnType.U64:
                sql_type = None
            else:
                sql_type = sql
            return _Fit(
                f"{name}::{sql}", sql_type, f"{name} NOT BETWEEN {low} AND {high} OR {name} <> trunc({name})", what
            )
        if of in ("float4", "float8"):
            if type_ is ColumnType.U64:
                low, high = 0, 10**15 - 1  # beyond, the engine rounds a double that becomes numeric
            double = f"{name}::float8"
            inside = f"{double} >= ({low})::float8 AND {double} < {high + 1}::numeric::float8"
            return _Fit(f"{name}::{sql}", sql, f"NOT ({inside}) OR {double} <> trunc({double})", what)
        return None

    def _float(self, type_: ColumnType, of: str, name: str, theirs: _Theirs) -> _Fit | None:
        sql = self.types[type_]
        what = f"would not be the same number in {type_}"
        if type_ is ColumnType.F64:
            if of == "float4":
                return _Fit(f"{name}::float8", sql, note=f"column {theirs.name!r} {adoption.SINGLE}")
            if of in _INTS:
                return _Fit(f"{name}::float8", sql, f"abs({name}::numeric) > {_MOST_EXACT}" if of == "int8" else None, what)
            if of == "numeric":
                return _Fit(f"{name}::float8", sql, f"{name}::float8::numeric <> {name}", what)
        elif of == "float8":
            fits = f"abs({name}) <= 3.4028234663852886e38 OR abs({name}) = 'Infinity' OR {name} = 'NaN'"
            loses = f"CASE WHEN {fits} THEN {name}::float4::float8 <> {name} ELSE true END"
            return _Fit(f"{name}::float4", sql, loses, what)
        elif of == "int2":
            return _Fit(f"{name}::float4", sql)
        return None

    def _date(self, of: str, name: str) -> _Fit | None:
        what = "are no days"
        zone = _literal(self.wish.zone or "UTC")
        if of == "timestamp":
            return _Fit(f"{name}::date", "date", f"{name} <> date_trunc('day', {name})", "are not at midnight")
        if of == "timestamptz":
            local = f"({name} AT TIME ZONE {zone})"
            loses = f"{local} <> date_trunc('day', {local})"
            return _Fit(f"{local}::date", "date", loses, f"are not at midnight in {zone} (see --zone)")
        if of in (*_TEXTS, "int4", "int8"):
            return _Fit(f"{name}::text::date", "date", f"{name}::text !~ '{_DAY_TEXT}'", what)
        return None

    def _instant(self, column: Column, of: str, name: str, theirs: _Theirs) -> _Fit | None:
        sql, zone = self.types[column.type], self.wish.zone
        if of == "timestamptz":
            return _Fit(name, None if theirs.modifier in (-1, 6) else sql)
        if of in ("timestamp", "date"):
            if zone is None:
                return _Fit(name, refusal=f"column {theirs.name!r} is {theirs.shown}: {adoption.NO_ZONE}")
            local = f"{name}::timestamp"
            moved = f"({local} AT TIME ZONE {_literal(zone)})"
            loses = f"{moved} AT TIME ZONE {_literal(zone)} <> {local}"
            return _Fit(moved, sql, loses, f"are no times in {zone}, where a clock was set forward")
        if of in _TEXTS:
            text = f"{name}::text"
            if zone is None:
                what = f"are no times in ISO 8601 with their zone ({adoption.NO_ZONE})"
                return _Fit(f"{text}::timestamptz", sql, f"{text} !~ '{_TIME_TEXT}){_OFFSET}'", what)
            value = (
                f"CASE WHEN {text} ~ '{_TIME_TEXT}){_OFFSET}' THEN {text}::timestamptz "
                f"ELSE {text}::timestamp AT TIME ZONE {_literal(zone)} END"
            )
            return _Fit(value, sql, f"{text} !~ '{_TIME_TEXT})?(Z|[+-]\\d\\d(:?\\d\\d)?)?$'", "are no times in ISO 8601")
        if of in ("int8", "numeric", "float8"):
            return self._refused(column, theirs, f"to_timestamp({name} / 1000.0)")
        return None


def counted(cursor: Cursor, table: str, schema: Schema, wish: Wish, values: dict[str, str]) -> pl.DataFrame:
    """Count the rows by subject and time; `values` are the columns as the schema has them."""
    import polars as pl

    none = adoption.empty_counts(schema)
    subject = _literal(adoption.EVERY_SUBJECT) if schema.subject is None else values[schema.subject]
    at = "NULL::date" if schema.time is None else values[schema.time]
    if wish.every is not None and none.schema["at"] != pl.Date():
        seconds = int(wish.every.total_seconds())
        at = f"to_timestamp(floor(extract(epoch FROM {at}) / {seconds}) * {seconds})"
    cursor.execute(f"SELECT ({subject})::text, {at}, count(*) FROM {table} GROUP BY 1, 2")
    parts = [none]
    while rows := cursor.fetchmany(_FETCHED_ROWS):
        parts.append(pl.DataFrame(rows, schema=none.schema, orient="row"))
    return pl.concat(parts)


def quoted(name: str) -> str:
    """Return the name as an identifier."""
    escaped = name.replace('"', '""')
    return f'"{escaped}"'


def _literal(text: str) -> str:
    escaped = text.replace("'", "''")
    return f"'{escaped}'"
