"""Adopting a table of MySQL or MariaDB in place: where it is, what its types mean, and the one ALTER that makes it
ours, all or nothing. Rows are looked at and counted by the server, and none is copied."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from marketsync.errors import AdoptionRefused, NoTable
from marketsync.schema import Column, ColumnType, Schema
from storage import adoption, evolution
from storage.adoption import WHOLE, Wish
from storage.adoption_sql import (
    DAY_TEXT,
    DAY_WORDS,
    MOST_EXACT,
    NUMBER_WORDS,
    TIME_TEXT,
    WHOLE_WORDS,
    Dialect,
    Fit,
    Index,
    Look,
    Theirs,
)
from storage.mysql_rows import literal, quoted

Cursor = Any
_TEXTS = ("char", "varchar", "tinytext", "text", "mediumtext", "longtext", "enum")
_SHORT_INTS = ("tinyint", "smallint", "mediumint")  # of which a single has all
_INTS = (*_SHORT_INTS, "int", "bigint")
_LARGEST_SINGLE = "3.4028234663852886e38"
_PLAIN = {
    ColumnType.I32: ("int", False),
    ColumnType.I64: ("bigint", False),
    ColumnType.U64: ("bigint", True),
}
_UTC = ("UTC", "Etc/UTC", "GMT", "Etc/GMT", "Zulu")
_ALTERED = "altered"  # the column is defined anew, as `MySQLStore` would define it
_FIRST = "TIMESTAMP'1970-01-01 00:00:00'"


def found(cursor: Cursor, dataset: str, wish: Wish, fold: Callable[[str], str]) -> str:
    """Return the name of the table that is meant; raises `NoTable`, or `AdoptionRefused` for what is none. Names are
    one to the server that are one by `fold`."""
    name = wish.table or dataset
    name = dataset if fold(name) == fold(dataset) else name
    known = {fold(each): kind for each, kind in _kinds(cursor, (name, dataset)).items()}
    kinds = {each: known[fold(each)] for each in (name, dataset) if fold(each) in known}
    if name not in kinds:
        raise NoTable(
            f"there is no table {name}, so there is none of {dataset} to adopt; name the one meant by --table"
        )
    if kinds[name] != "BASE TABLE":
        raise AdoptionRefused(
            quoted(name),
            [
                f"it is a {kinds[name].lower()}, which cannot be changed into ours: CREATE TABLE "
                f"{quoted(name + '_plain')} AS SELECT * FROM {quoted(name)}, and adopt that by --table"
            ],
        )
    if name != dataset and dataset in kinds:
        raise AdoptionRefused(
            quoted(name), [f"there is a table {quoted(dataset)} already, which has the name it must get"]
        )
    return name


def look(
    cursor: Cursor,
    name: str,
    schema: Schema,
    wish: Wish,
    types: Mapping[ColumnType, str],
    collation: str,
    longest: int,
    uniques: Mapping[str, Sequence[str]],
    triggers: Sequence[str],
) -> Look:
    """Read what the engine says of a table's columns; `types` are those that a table of ours has, `longest` is how long
    a text in the key may be, `uniques` are its unique indexes."""
    table = quoted(name)
    generated = "IFNULL(GENERATION_EXPRESSION, '') <> ''"
    counting = "EXTRA LIKE '%%auto_increment%%'"
    # MariaDB says the word NULL where there is no default
    default = "(COLUMN_DEFAULT IS NOT NULL AND NOT (COLUMN_DEFAULT = 'NULL' AND VERSION() LIKE '%%MariaDB%%'))"
    cursor.execute(
        "SELECT COLUMN_NAME, COLUMN_TYPE, DATA_TYPE, IFNULL(DATETIME_PRECISION, CHARACTER_MAXIMUM_LENGTH), "
        f"COLLATION_NAME, IS_NULLABLE = 'NO', {default} OR {counting}, {generated}, EXTRA LIKE '%%on update%%', "
        f"{counting} OR NOT (IS_NULLABLE = 'NO' OR {default} OR {generated}) FROM information_schema.COLUMNS "
        "WHERE TABLE_SCHEMA = DATABASE() AND TABLE_NAME = %s ORDER BY ORDINAL_POSITION",
        [name],
    )
    columns = {row[0]: Theirs(row[0], row[1], str(row[2]).lower(), *row[3:]) for row in cursor.fetchall()}
    indexes = [Index(index, index == "PRIMARY", True, parts) for index, parts in uniques.items()]
    fit = partial(_fit, table, types, collation, longest, schema.key, wish.zone)
    against = [
        f"the trigger {each!r} could change the rows that are written: DROP TRIGGER {quoted(each)}" for each in triggers
    ]
    return Look(schema, wish, table, columns, indexes, dialect(cursor, fit, table), against=against, overwrites=True)


def unseen(cursor: Cursor, name: str) -> list[str]:
    """Return what is worth knowing where the user may not see whether a table has triggers."""
    cursor.execute("SHOW GRANTS", None)
    if any(re.search("TRIGGER|ALL PRIVILEGES", str(grant)) for (grant,) in cursor.fetchall()):
        return []
    return [
        f"a trigger could change what is written, and this user may not see whether there is one: SHOW TRIGGERS LIKE "
        f"{literal(name)}, as one who may"
    ]


def dialect(cursor: Cursor, fit: Any, table: str) -> Dialect:
    """Return how MySQL is asked."""

    def ask(sql: str) -> list[Any]:
        cursor.execute(sql, None)
        return list(cursor.fetchall())

    return Dialect(
        quoted,
        lambda value: f"CAST({value} AS CHAR)",
        lambda at, seconds: (
            f"TIMESTAMPADD(SECOND, FLOOR(TIMESTAMPDIFF(SECOND, {_FIRST}, {at}) / {seconds}) * {seconds}, {_FIRST})"
        ),
        ask,
        fit,
        f"ALTER TABLE {table} MODIFY COLUMN {{}} ... NULL",
        f"ALTER TABLE {table} MODIFY COLUMN {{}} ... without its expression",
        f"ALTER TABLE {table} DROP INDEX {{}}",
    )


def statements(
    look: Look,
    name: str,
    dataset: str,
    defined: Callable[[Column, bool], str],
    system: Sequence[str],
    end: str,
) -> list[str]:
    """Return what makes the table ours. `defined` says a column as ours is, `system` are those of ours as they are
    defined, `end` is the comment and the engine."""
    schema, wish = look.schema, look.wish
    must = evolution.required(schema)
    changes: list[str] = []
    for ours, fit in look.fits.items():
        theirs = look.columns[look.names.theirs[ours]]
        # what a definition says beside its type, it would go on doing: a default, a count, a time of the change
        more = theirs.filled or theirs.moving
        if fit.type is not None or theirs.required != (ours in must) or theirs.name != ours or more:
            changes.append(f"CHANGE COLUMN {quoted(theirs.name)} {defined(schema[ours], ours in must)}")
    changes += [f"ADD COLUMN {defined(column, False)}" for column in look.names.absent]
    at = wish.at.replace(tzinfo=None).isoformat(" ", "microseconds")
    values = (literal(wish.segment), f"'{at}'")
    new = [(each, value) for each, value in zip(system, values, strict=True) if each.split("`")[1] not in look.columns]
    changes += [f"MODIFY COLUMN {each}" for each in system if each.split("`")[1] in look.columns]
    changes += [f"ADD COLUMN {each} DEFAULT {value}" for each, value in new]
    if look.keyed() is None:
        key = ", ".join(map(quoted, schema.key))
        primary = any(index.primary for index in look.indexes)
        changes.append(f"ADD UNIQUE KEY ({key})" if primary else f"ADD PRIMARY KEY ({key})")
    changes.append(end)
    if name != dataset:
        changes.append(f"RENAME TO {quoted(dataset)}")
    said = [f"ALTER TABLE {look.table} {', '.join(changes)}"]
    if new:
        dropped = ", ".join(f"ALTER COLUMN `{each.split('`')[1]}` DROP DEFAULT" for each, _ in new)
        said.append(f"ALTER TABLE {quoted(dataset)} {dropped}")
    return said


def _kinds(cursor: Cursor, names: Sequence[str]) -> dict[str, str]:
    cursor.execute(
        "SELECT TABLE_NAME, TABLE_TYPE FROM information_schema.TABLES WHERE TABLE_SCHEMA = DATABASE() "
        "AND TABLE_NAME IN (%s, %s)",
        list(names),
    )
    return dict(cursor.fetchall())


def _fit(
    table: str,
    types: Mapping[ColumnType, str],
    collation: str,
    longest: int,
    key: Sequence[str],
    zone: str | None,
    column: Column,
    theirs: Theirs,
) -> Fit:
    """Return how a column of theirs becomes one of ours."""
    type_, name, of = column.type, quoted(theirs.name), theirs.of
    fit = None
    if type_ is ColumnType.STR and of in _TEXTS:
        value = f"CONVERT({name} USING utf8mb4) COLLATE {collation}"
        if column.name not in key:
            return Fit(value, None if of == "longtext" and theirs.collation == collation else _ALTERED)
        what = f"are longer than the {longest} characters that an index takes"
        same = theirs.shown.lower() == f"varchar({longest})" and theirs.collation == collation
        return Fit(value, None if same else _ALTERED, f"CHAR_LENGTH({name}) > {longest}", what)
    if type_ is ColumnType.BOOL and of in _INTS:
        same = theirs.shown.lower() == "tinyint(1)"
        return Fit(name, None if same else _ALTERED, f"{name} NOT IN (0, 1)", "are neither 0 nor 1")
    if type_ in WHOLE:
        fit = _whole(type_, theirs, name)
    elif type_ is ColumnType.F32:
        fit = _single(of, name)
    elif type_ is ColumnType.F64:
        fit = _float(theirs, name)
    elif type_ is ColumnType.DATE:
        fit = _date(of, name)
    elif type_ in (ColumnType.DATETIME, ColumnType.DATETIME_NS):
        fit = _instant(table, theirs, name, zone)
    refusal = (
        f"column {theirs.name!r} is {theirs.shown}, and the dataset's is {type_}: ALTER TABLE {table} MODIFY COLUMN "
        f"{name} {types[type_]}, after an UPDATE that makes its values such"
    )
    return fit or Fit(name, refusal=refusal)


def _whole(type_: ColumnType, theirs: Theirs, name: str) -> Fit | None:
    low, high = WHOLE[type_]
    of, unsigned = theirs.of, "unsigned" in theirs.shown.lower()
    value = f"CAST({name} AS {'UNSIGNED' if type_ is ColumnType.U64 else 'SIGNED'})"
    outside = f"{name} NOT BETWEEN {low} AND {high}"
    if of in _INTS:
        same = (of, unsigned) == _PLAIN[type_]
        return Fit(name if same else value, None if same else _ALTERED, None if same else outside, WHOLE_WORDS)
    if of == "decimal":
        return Fit(value, _ALTERED, f"{name} <> TRUNCATE({name}, 0) OR {outside}", WHOLE_WORDS)
    if of in ("float", "double"):
        loses = f"{name} <> TRUNCATE({name}, 0) OR ABS({name}) > {MOST_EXACT} OR {outside}"
        return Fit(value, _ALTERED, loses, WHOLE_WORDS)
    return None


def _single(of: str, name: str) -> Fit | None:
    if of == "double":
        loses = f"CASE WHEN ABS({name}) > {_LARGEST_SINGLE} THEN TRUE ELSE CAST({name} AS FLOAT) <> {name} END"
        return Fit(name, _ALTERED, loses, NUMBER_WORDS)
    return Fit(name, _ALTERED) if of in ("float", *_SHORT_INTS) else None


def _float(theirs: Theirs, name: str) -> Fit | None:
    of = theirs.of
    if of == "double":
        return Fit(name, None if theirs.shown.lower() == "double" else _ALTERED)
    if of == "float":
        return Fit(name, _ALTERED, note=f"column {theirs.name!r} {adoption.SINGLE}")
    if of in _INTS:
        return Fit(name, _ALTERED, f"ABS({name}) > {MOST_EXACT}" if of == "bigint" else None, NUMBER_WORDS)
    if of == "decimal":
        return Fit(name, _ALTERED, f"CAST(CAST({name} AS DOUBLE) AS DECIMAL(65, 30)) <> {name}", NUMBER_WORDS)
    return None


def _date(of: str, name: str) -> Fit | None:
    value = f"CAST({name} AS DATE)"
    if of == "date":
        return Fit(name, None, _partial(name), DAY_WORDS)
    if of in ("datetime", "timestamp"):
        return Fit(value, _ALTERED, f"TIME({name}) <> 0 OR {_partial(name)}", "are not at midnight (in UTC)")
    if of in (*_TEXTS, "int", "bigint"):
        loses = f"{name} NOT REGEXP '{DAY_TEXT}' OR {value} IS NULL OR {_partial(value)}"
        return Fit(value, _ALTERED, loses, DAY_WORDS)
    return None


def _instant(table: str, theirs: Theirs, name: str, zone: str | None) -> Fit | None:
    of = theirs.of
    if of == "timestamp":  # it is kept in UTC, and said in UTC to our connection
        return Fit(name, _ALTERED, _partial(name), "are no times")
    if of not in ("datetime", "date", *_TEXTS):
        return None
    if zone is None:
        return Fit(name, refusal=f"column {theirs.name!r} is {theirs.shown}: {adoption.NO_ZONE}")
    if zone not in _UTC:
        wider = "" if of == "datetime" else f"ALTER TABLE {table} MODIFY COLUMN {name} DATETIME(6), then "
        return Fit(
            name,
            refusal=f"column {theirs.name!r} is {theirs.shown} in {zone}, and is to be in UTC, which is done by an "
            f"UPDATE only: {wider}UPDATE {table} SET {name} = CONVERT_TZ({name}, {literal(zone)}, '+00:00'), and "
            "adopt it with --zone UTC",
        )
    if of == "datetime":
        return Fit(name, None if theirs.size == 6 else _ALTERED, _partial(name), "are no times")
    value = f"CAST({name} AS DATETIME(6))"
    if of == "date":
        return Fit(value, _ALTERED, _partial(name), DAY_WORDS)
    loses = f"{name} NOT REGEXP '{TIME_TEXT}?$' OR {value} IS NULL OR {_partial(value)}"
    return Fit(value, _ALTERED, loses, "are no times in ISO 8601 without a zone")


def _partial(value: str) -> str:
    """Return what holds for a day such as 2024-03-00, which the engine keeps where its `sql_mode` was not strict."""
    return f"0 IN (YEAR({value}), MONTH({value}), DAY({value}))"
