"""How a table's schema is written down beside its rows, and which changes of it a table with rows can follow.

Pure functions over `Schema`; each store keeps the text where its engine keeps such things and applies the new columns.
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import TYPE_CHECKING

from marketsync.errors import SchemaConflict
from marketsync.schema import SYSTEM_COLUMNS, Column, ColumnType, Period, Schema

if TYPE_CHECKING:
    import polars as pl

PERIOD_COLUMN = "_period"
TIME_TYPES = (ColumnType.DATE, ColumnType.DATETIME, ColumnType.DATETIME_NS)
_REMEDY = "give the new shape a dataset name of its own, or drop the table and let it be filled again"


def to_text(schema: Schema) -> str:
    """Return the schema as one line of JSON that `from_text` reads."""
    return json.dumps(
        {
            "columns": [[c.name, c.type.value, c.nullable, c.description] for c in schema.columns],
            "key": list(schema.key),
            "time": schema.time,
            "subject": schema.subject,
            "period": schema.period.value,
        },
        ensure_ascii=False,
    )


@lru_cache(maxsize=256)
def from_text(text: str) -> Schema:
    """Return the schema that `to_text` wrote."""
    data = json.loads(text)
    return Schema(
        tuple(Column(name, ColumnType(type_), nullable, why) for name, type_, nullable, why in data["columns"]),
        tuple(data["key"]),
        data["time"],
        data["subject"],
        Period(data["period"]),
    )


def check(dataset: str, schema: Schema) -> None:
    """Raise `SchemaConflict` when the schema contradicts itself or uses a name that the system columns have."""

    def refuse(why: str) -> None:
        raise SchemaConflict(f"the schema of {dataset} cannot become a table: {why}")

    seen: dict[str, str] = {}
    for name in schema.names:
        # two underscores are how the columns begin that stores add while they work
        if not name or name in (*SYSTEM_COLUMNS, PERIOD_COLUMN) or name.startswith("__"):
            refuse(f"the column name {name!r} is reserved; rename the column in the definition (as: ...)")
        if any(character in name for character in " ,;{}()\n\t=\0"):
            refuse(f"the column name {name!r} has a space or one of ,;{{}}()= in it; rename it in the definition")
        if name == "*" or (name.startswith("^") and name.endswith("$")):
            refuse(f"the column name {name!r} would be read as a pattern for names; rename it in the definition")
        if name.lower() in seen:
            refuse(f"columns {seen[name.lower()]!r} and {name!r} differ only by case; rename one in the definition")
        seen[name.lower()] = name
    if not schema.key:
        refuse("it has no key; name the columns that identify a row")
    for role, names in (("key", schema.key), ("time", [schema.time]), ("subject", [schema.subject])):
        for name in names:
            if name is not None and name not in schema:
                refuse(f"its {role} column {name!r} is not among the columns {', '.join(schema.names)}")
    if schema.time is not None and schema[schema.time].type not in TIME_TYPES:
        refuse(f"its time column {schema.time!r} is {schema[schema.time].type}, not a date or datetime")
    if schema.subject is not None and schema[schema.subject].type is not ColumnType.STR:
        refuse(f"its subject column {schema.subject!r} is {schema[schema.subject].type}; declare it str")
    if schema.period is not Period.NONE and schema.time is None:
        refuse(f"it is cut by {schema.period} but has no time column")


def required(schema: Schema) -> list[str]:
    """Return the columns in which a null is refused: the key, the declared ones, and the time that rows are cut by."""
    cut = (schema.time,) if schema.period is not Period.NONE else ()
    return [c.name for c in schema.columns if not c.nullable or c.name in schema.key or c.name in cut]


def added(dataset: str, stored: Schema, wanted: Schema) -> list[Column]:
    """Return the columns that `wanted` adds to `stored`; raises `SchemaConflict` with the remedy for any other change.

    A column may also become nullable. Descriptions are free to change.
    """

    def refuse(what: str) -> None:
        raise SchemaConflict(f"the table of {dataset} cannot follow its definition: {what}; {_REMEDY}")

    for role in ("key", "time", "subject", "period"):
        old, new = getattr(stored, role), getattr(wanted, role)
        if old != new:
            refuse(f"{role} was {_named(old)} and is now {_named(new)}")
    must = required(stored)
    for column in stored.columns:
        if column.name not in wanted:
            refuse(f"column {column.name!r} is in the table and no longer in the definition (keep it there, nullable)")
        now = wanted[column.name]
        if now.type is not column.type:
            refuse(f"column {column.name!r} was {column.type} and is now {now.type}")
        if not now.nullable and column.name not in must:
            refuse(f"column {column.name!r} may hold nulls in the table and is now declared without (nullable: true)")
    new = [column for column in wanted.columns if column.name not in stored]
    for column in new:
        if not column.nullable:
            refuse(f"the new column {column.name!r} is not nullable, and the rows that are there have no value for it")
    return new


def fit(dataset: str, frame: pl.DataFrame, sent: Schema, stored: Schema) -> tuple[pl.DataFrame, list[str]]:
    """Return `frame` with the columns that the table has gained since it was made (null), and the names of those.

    Raises `SchemaConflict` when the batch knows more than the table: `ensure` comes before `write`.
    """
    if sent.names == stored.names and sent.hash() == stored.hash():
        return frame, []
    if added(dataset, sent, stored):
        import polars as pl

        absent = [name for name in stored.names if name not in sent]
        types = stored.polars()
        frame = frame.with_columns(pl.lit(None, dtype=types[name]).alias(name) for name in absent)
        return frame.select(*stored.names, *SYSTEM_COLUMNS), absent
    return frame.select(*stored.names, *SYSTEM_COLUMNS), []


def _named(value: object) -> str:
    if isinstance(value, tuple):
        return "(" + ", ".join(map(str, value)) + ")"
    return "none" if value is None else str(value)
