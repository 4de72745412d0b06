"""Adopting a PostgreSQL table in place: where it is, what its types mean, and the ALTERs that make it ours, for one
transaction of `storage/postgres.py`. Rows are looked at and counted by the server, and none is copied."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from marketsync.errors import AdoptionRefused, NoTable
from marketsync.schema import INGESTED_COLUMN, SEGMENT_COLUMN, Column, ColumnType, Schema
from storage import adoption, evolution, location
from storage.adoption import WHOLE, Wish
from storage.adoption_sql import (
    DAY_TEXT,
    DAY_WORDS,
    MOST_EXACT,
    NUMBER_WORDS,
    OFFSET,
    TIME_TEXT,
    WHOLE_WORDS,
    Dialect,
    Fit,
    Index,
    Look,
    Theirs,
)

Cursor = Any
Types = Mapping[ColumnType, str]
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
# the times that Python and polars have too; the engine's begin earlier, end later, and two of them are infinite
_SPAN = {
    "date": "DATE '0001-01-01' AND DATE '9999-12-31'",
    "timestamp": "TIMESTAMP '0001-01-01' AND TIMESTAMP '9999-12-31 23:59:59.999999'",
    "timestamptz": "TIMESTAMPTZ '0001-01-01 00:00+00' AND TIMESTAMPTZ '9999-12-31 23:59:59.999999+00'",
}
_SPAN_WORDS = "are in no year from 1 to 9999"
# what adds, changes or hides rows behind a writer's back: {0} is its name, {1} the table's
_AGAINST = {
    "trigger": "its trigger {0} may change rows that are written, or leave them out: DROP TRIGGER {0} ON {1}",
    "rule": "its rule {0} may change rows that are written, or leave them out: DROP RULE {0} ON {1}",
    "partition": "it is a partition of {0}: ALTER TABLE {0} DETACH PARTITION {1}",
    "parent": "the rows of {0}, which inherits from it, are read as its own: ALTER TABLE {0} NO INHERIT {1}",
    "child": "it inherits from {0}, where its rows are read too: ALTER TABLE {1} NO INHERIT {0}",
    "index": "its unique index {0} has a collation of its own, to which texts that differ can be equal: DROP INDEX {0}",
    "deferred": "its unique constraint {0} is deferrable, and nothing can be upserted by one: ALTER TABLE {1} DROP "
    "CONSTRAINT {0}",
    "unlogged": "it is unlogged, and a crash of the server empties it: ALTER TABLE {1} SET LOGGED",
    "policy": "row-level security may hide rows of it: ALTER TABLE {1} DISABLE ROW LEVEL SECURITY",
}
_OTHERS = {"v": "a view", "m": "a materialized view", "f": "a foreign table", "p": "cut into partitions"}


def found(cursor: Cursor, dataset: str, wish: Wish) -> tuple[str, str]:
    """Return the schema and the name of the table that is meant; raises `NoTable`, or `AdoptionRefused` for what is no
    ordinary one."""
    own = location.split(dataset)
    places = [own]
    if wish.table is not None:
        space, dot, name = wish.table.partition(".")
        searched = cursor.execute("SELECT unnest(current_schemas(false))").fetchall()
        places = [(space, name)] if dot else [(each, wish.table) for (each,) in searched]
    for place in places:
        kind = _kind(cursor, *place)
        if kind is None:
            continue
        table = _table(place)
        if kind != "r":
            raise AdoptionRefused(
                table,
                [
                    f"it is {_OTHERS.get(kind, 'no ordinary table')}, which cannot be changed into ours: CREATE TABLE "
                    f"{quoted(place[1] + '_plain')} AS SELECT * FROM {table}, and adopt that by --table"
                ],
            )
        if place != own and _kind(cursor, *own) is not None:
            raise AdoptionRefused(table, [f"there is a table {_table(own)} already, which has the name it must get"])
        return place
    shown = " or ".join(".".join(place) for place in places)
    raise NoTable(f"there is no table {shown}, so there is none of {dataset} to adopt; name the one meant by --table")


def look(cursor: Cursor, place: tuple[str, str], schema: Schema, wish: Wish, types: Types) -> Look:
    """Read what the engine says of a table's columns and indexes."""
    table = _table(place)
    columns = cursor.execute(
        "SELECT a.attname, format_type(a.atttypid, a.atttypmod), CASE WHEN t.typtype = 'b' THEN t.typname ELSE '' END, "
        "a.atttypmod, l.collname, a.attnotnull, a.atthasdef OR a.attidentity <> '', a.attgenerated <> '' OR "
        "a.attidentity = 'a' FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid LEFT JOIN pg_collation l "
        "ON l.oid = a.attcollation WHERE a.attrelid = %s::regclass AND a.attnum > 0 AND NOT a.attisdropped "
        "ORDER BY a.attnum",
        [table],
    ).fetchall()
    indexes = cursor.execute(
        "SELECT c.relname, i.indisprimary, i.indimmediate AND i.indpred IS NULL AND i.indexprs IS NULL, "
        "ARRAY(SELECT a.attname::text FROM unnest(i.indkey) WITH ORDINALITY k(n, o) JOIN pg_attribute a "
        "ON a.attrelid = i.indrelid AND a.attnum = k.n WHERE k.o <= i.indnkeyatts ORDER BY k.o) "
        "FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid WHERE i.indrelid = %s::regclass AND i.indisunique",
        [table],
    ).fetchall()
    return Look(
        schema,
        wish,
        table,
        {row[0]: Theirs(*row) for row in columns},
        [Index(*row) for row in indexes],
        dialect(cursor, partial(_fit, table, types, wish.zone), table),
        against=_against(cursor, table),
    )


def _against(cursor: Cursor, table: str) -> list[str]:
    """Return the reasons against a table whose rows are not only those that a writer puts there."""
    found = cursor.execute(
        "SELECT 'trigger', quote_ident(tgname) FROM pg_trigger WHERE tgrelid = %(table)s::regclass "
        "AND NOT tgisinternal "
        "UNION ALL SELECT 'rule', quote_ident(rulename) FROM pg_rewrite WHERE ev_class = %(table)s::regclass "
        "UNION ALL SELECT CASE WHEN c.relispartition THEN 'partition' ELSE 'child' END, inhparent::regclass::text "
        "FROM pg_inherits JOIN pg_class c ON c.oid = inhrelid WHERE inhrelid = %(table)s::regclass "
        "UNION ALL SELECT 'parent', inhrelid::regclass::text FROM pg_inherits WHERE inhparent = %(table)s::regclass "
        "UNION ALL SELECT DISTINCT 'index', indexrelid::regclass::text FROM pg_index i "
        "CROSS JOIN unnest(i.indkey::int2[], i.indcollation::oid[]) k(number, ordered) "
        "JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.number "
        "JOIN pg_collation l ON l.oid = k.ordered WHERE i.indrelid = %(table)s::regclass AND i.indisunique "
        "AND l.oid <> a.attcollation AND NOT l.collisdeterministic "
        "UNION ALL SELECT 'deferred', quote_ident(relname) FROM pg_index JOIN pg_class ON pg_class.oid = indexrelid "
        "WHERE indrelid = %(table)s::regclass AND indisunique AND NOT indimmediate "
        "UNION ALL SELECT 'unlogged', '' FROM pg_class WHERE oid = %(table)s::regclass AND relpersistence = 'u' "
        "UNION ALL SELECT 'policy', '' FROM pg_class WHERE oid = %(table)s::regclass AND relrowsecurity ORDER BY 1, 2",
        {"table": table},
    ).fetchall()
    return [_AGAINST[kind].format(name, table) for kind, name in found]


def dialect(cursor: Cursor, fit: Any, table: str) -> Dialect:
    """Return how PostgreSQL is asked."""
    return Dialect(
        quoted,
        lambda value: f"CAST({value} AS text)",
        lambda at, seconds: f"to_timestamp(floor(extract(epoch FROM {at}) / {seconds}) * {seconds})",
        lambda sql: cursor.execute(sql).fetchall(),
        fit,
        f"ALTER TABLE {table} ALTER COLUMN {{}} DROP NOT NULL",
        f"ALTER TABLE {table} ALTER COLUMN {{}} DROP EXPRESSION (DROP IDENTITY where it is one)",
        f"ALTER TABLE {table} DROP CONSTRAINT {{}} (DROP INDEX where it is only one)",
    )


def statements(look: Look, place: tuple[str, str], dataset: str, types: Types, system: Mapping[str, str]) -> list[str]:
    """Return what makes the table ours, but for its comment."""
    own = location.split(dataset)
    schema, wish = look.schema, look.wish
    said = [
        f"ALTER TABLE {look.table} RENAME COLUMN {quoted(theirs)} TO {quoted(ours)}"
        for ours, theirs in look.names.theirs.items()
        if ours != theirs
    ]
    changes: list[str] = []
    must = evolution.required(schema)
    primary = next((index.columns for index in look.indexes if index.primary), ())
    for ours, fit in look.fits.items():
        column = look.columns[look.names.theirs[ours]]
        name = quoted(ours)
        if column.filled:
            # a batch of a schema without the column leaves it out, and has no value for it
            changes += [f"ALTER COLUMN {name} DROP IDENTITY IF EXISTS", f"ALTER COLUMN {name} DROP DEFAULT"]
        if fit.type is not None:
            # the values are said by the name that the column has by then
            changes.append(f"ALTER COLUMN {name} TYPE {fit.type} USING {fit.value.replace(quoted(column.name), name)}")
        if ours in must and not column.required:
            changes.append(f"ALTER COLUMN {name} SET NOT NULL")
        if ours not in must and column.required and column.name not in primary:
            changes.append(f"ALTER COLUMN {name} DROP NOT NULL")
    changes += [f"ADD COLUMN {quoted(each.name)} {types[each.type]}" for each in look.names.absent]
    values = {SEGMENT_COLUMN: _literal(wish.segment), INGESTED_COLUMN: f"'{wish.at.isoformat()}'"}
    new = [name for name in system if name not in look.columns]
    changes += [f"ADD COLUMN {quoted(name)} {system[name]} NOT NULL DEFAULT {values[name]}" for name in new]
    if look.keyed() is None:
        key = ", ".join(map(quoted, schema.key))
        changes.append(f"ADD {'UNIQUE' if primary else 'PRIMARY KEY'} ({key})")
    if changes:
        said.append(f"ALTER TABLE {look.table} {', '.join(changes)}")
    if new:
        said.append(f"ALTER TABLE {look.table} {', '.join(f'ALTER COLUMN {quoted(n)} DROP DEFAULT' for n in new)}")
    if place[0] != own[0]:
        said.append(f"ALTER TABLE {look.table} SET SCHEMA {quoted(own[0])}")
    if place[1] != own[1]:
        said.append(f"ALTER TABLE {_table((own[0], place[1]))} RENAME TO {quoted(own[1])}")
    return said


def _kind(cursor: Cursor, space: str, name: str) -> str | None:
    found = cursor.execute(
        "SELECT c.relkind::text FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace "
        "WHERE n.nspname = %s AND c.relname = %s AND c.relkind IN ('r', 'p', 'v', 'm', 'f')",
        [space, name],
    ).fetchone()
    return None if found is None else found[0]


def _fit(table: str, types: Types, zone: str | None, column: Column, theirs: Theirs) -> Fit:
    """Return how a column of theirs becomes one of ours."""
    type_, name, of = column.type, quoted(theirs.name), theirs.of
    sql = types[type_]

    def by_hand(using: str) -> str:
        return f"ALTER TABLE {table} ALTER COLUMN {name} TYPE {sql} USING {using}"

    fit = None
    using = f"{name}::{sql.split(' COLLATE')[0]}"
    if type_ is ColumnType.STR and of in _TEXTS:
        return Fit(name) if of == "text" and theirs.collation == "C" else Fit(f"{name}::text", sql)
    if type_ is ColumnType.DATE and of == "date":
        return Fit(name, None, _outside("date", name), _SPAN_WORDS, then=by_hand("..."))
    if of == _PLAIN.get(type_):
        return Fit(name)
    if type_ is ColumnType.U64 and theirs.shown == "numeric(20,0)":
        low, high = WHOLE[type_]
        return Fit(name, None, f"{name} NOT BETWEEN {low} AND {high}", WHOLE_WORDS, then=by_hand("..."))
    if type_ in WHOLE:
        fit = _whole(type_, sql, of, name, by_hand("..."))
    elif type_ in (ColumnType.F32, ColumnType.F64):
        fit = _float(type_, sql, theirs, name, by_hand("..."))
    elif type_ is ColumnType.DATE:
        fit = _date(of, name, zone or "UTC", by_hand("..."))
    elif type_ in (ColumnType.DATETIME, ColumnType.DATETIME_NS):
        fit = _instant(sql, theirs, name, zone, by_hand("..."))
        using = f"to_timestamp({name} / 1000.0)"
    elif type_ is ColumnType.BOOL:
        using = f"{name} <> 0" if of in _INTS else f"{name}::text::boolean"
    refusal = f"column {theirs.name!r} is {theirs.shown}, and the dataset's is {type_}: {by_hand(using)}"
    return fit or Fit(name, refusal=refusal)


def _whole(type_: ColumnType, sql: str, of: str, name: str, then: str) -> Fit | None:
    low, high = WHOLE[type_]
    if of in _INTS:
        fits = _INTS[of] <= _BITS[type_] and low < 0
        return Fit(
            f"{name}::{sql}", sql, None if fits else f"{name} NOT BETWEEN {low} AND {high}", WHOLE_WORDS, then=then
        )
    if of == "numeric":
        loses = f"{name} NOT BETWEEN {low} AND {high} OR {name} <> trunc({name})"
        return Fit(f"{name}::{sql}", sql, loses, WHOLE_WORDS, then=then)
    if of in ("float4", "float8"):
        if type_ is ColumnType.U64:
            high = 10**15 - 1  # beyond, the engine rounds a double that becomes numeric
        double = f"{name}::float8"
        inside = f"{double} >= ({low})::float8 AND {double} < {high + 1}::numeric::float8"
        return Fit(f"{name}::{sql}", sql, f"NOT ({inside}) OR {double} <> trunc({double})", WHOLE_WORDS, then=then)
    return None


def _float(type_: ColumnType, sql: str, theirs: Theirs, name: str, then: str) -> Fit | None:
    of = theirs.of
    if type_ is ColumnType.F64:
        value = f"{name}::float8"
        if of == "float4":
            return Fit(value, sql, note=f"column {theirs.name!r} {adoption.SINGLE}")
        if of in _INTS:
            loses = f"abs({name}::numeric) > {MOST_EXACT}" if of == "int8" else None
            return Fit(value, sql, loses, NUMBER_WORDS, then=then)
        if of == "numeric":
            return Fit(value, sql, f"{value}::numeric <> {name}", NUMBER_WORDS, then=then)
    elif of == "float8":
        fits = f"abs({name}) <= 3.4028234663852886e38 OR abs({name}) = 'Infinity' OR {name} = 'NaN'"
        loses = f"CASE WHEN {fits} THEN {name}::float4::float8 <> {name} ELSE true END"
        return Fit(f"{name}::float4", sql, loses, NUMBER_WORDS, then=then)
    elif of == "int2":
        return Fit(f"{name}::float4", sql)
    return None


def _date(of: str, name: str, zone: str, then: str) -> Fit | None:
    if of in ("timestamp", "timestamptz"):
        local = name if of == "timestamp" else f"({name} AT TIME ZONE {_literal(zone)})"
        where = "" if of == "timestamp" else f" in {zone} (see --zone)"
        loses = f"{local} <> date_trunc('day', {local}) OR {_outside('timestamp', local)}"
        return Fit(f"{local}::date", "date", loses, f"are not at midnight{where}, or {_SPAN_WORDS}", then=then)
    if of in (*_TEXTS, "int4", "int8"):
        return Fit(f"{name}::text::date", "date", f"{name}::text !~ '{DAY_TEXT}'", DAY_WORDS, then=then)
    return None


def _instant(sql: str, theirs: Theirs, name: str, zone: str | None, then: str) -> Fit | None:
    of, text = theirs.of, f"{name}::text"
    if of == "timestamptz":
        kept = None if theirs.size in (-1, 6) else sql
        return Fit(name, kept, _outside(of, name), _SPAN_WORDS, then=then)
    if of in ("timestamp", "date"):
        if zone is None:
            return Fit(name, refusal=f"column {theirs.name!r} is {theirs.shown}: {adoption.NO_ZONE}")
        local = f"{name}::timestamp"
        what = f"are no times in {zone} (a clock was set forward or back), or {_SPAN_WORDS}"
        return Fit(_moved(local, zone), sql, _unclear(local, zone), what, then=then)
    if of not in _TEXTS:
        return None
    zoned, instant = f"{text} ~ '{TIME_TEXT}{OFFSET}$'", f"{text}::timestamptz"
    without, value = "true", instant
    what = f"are no times in ISO 8601 with their zone ({adoption.NO_ZONE})"
    if zone is not None:
        local = f"{text}::timestamp"
        value = f"CASE WHEN {zoned} THEN {instant} ELSE {_moved(local, zone)} END"
        without = f"CASE WHEN {text} !~ '{TIME_TEXT}?{OFFSET}?$' THEN true ELSE {_unclear(local, zone)} END"
        what = f"are no times in ISO 8601, or none in {zone} (a clock was set forward or back)"
    loses = f"CASE WHEN {zoned} THEN {_outside('timestamptz', instant)} ELSE {without} END"
    return Fit(value, sql, loses, what, then=then)


def _outside(of: str, value: str) -> str:
    return f"{value} NOT BETWEEN {_SPAN[of]}"


def _moved(local: str, zone: str) -> str:
    return f"({local} AT TIME ZONE {_literal(zone)})"


def _unclear(local: str, zone: str) -> str:
    """Return what holds for a time that clocks of the zone never showed, or showed twice, or out of the span."""
    in_zone, moved = f"AT TIME ZONE {_literal(zone)}", _moved(local, zone)
    # an instant that looks the same has the offset that clocks had a day earlier, or have a day later
    others = []
    for near in (f"({moved} - interval '24 hours')", f"({moved} + interval '24 hours')"):
        other = f"(({local} - (({near} {in_zone}) - ({near} AT TIME ZONE 'UTC'))) AT TIME ZONE 'UTC')"
        others.append(f"({other} <> {moved} AND {other} {in_zone} = {local})")
    wrong = " OR ".join((_outside("timestamptz", moved), f"{moved} {in_zone} <> {local}", *others))
    return f"CASE WHEN {_outside('timestamp', local)} THEN true ELSE {wrong} END"


def _table(place: tuple[str, str]) -> str:
    return ".".join(map(quoted, place))


def quoted(name: str) -> str:
    """Return the name as an identifier."""
    escaped = name.replace('"', '""')
    return f'"{escaped}"'


def _literal(text: str) -> str:
    escaped = text.replace("'", "''")
    return f"'{escaped}'"
