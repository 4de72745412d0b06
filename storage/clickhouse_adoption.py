"""Adopting a ClickHouse table: where it is and what its types mean. The server copies its rows into a table of ours,
since a table's engine and order cannot be changed; it is the server, too, that looks at values and counts."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from marketsync.errors import AdoptionRefused, NoTable
from marketsync.schema import Column, ColumnType, Schema
from storage import adoption, location
from storage.adoption import WHOLE, Wish
from storage.adoption_sql import (
    DAY_WORDS,
    NUMBER_WORDS,
    OFFSET,
    TIME_TEXT,
    WHOLE_WORDS,
    Dialect,
    Fit,
    Look,
    Theirs,
)

if TYPE_CHECKING:
    import polars as pl

Ask = Callable[[str], "pl.DataFrame"]
_INTS = re.compile(r"U?Int(8|16|32|64|128|256)")
_LAST_VERSIONS = re.compile(r"(Replacing|Collapsing|Summing|Aggregating|Coalescing)\w*MergeTree")
_WRAPPED = re.compile(r"(?:Nullable|LowCardinality)\((.*)\)")
_COPIED = "copied"  # every value is said anew
_ENGINE = {ColumnType.I32: "Int32", ColumnType.I64: "Int64", ColumnType.U64: "UInt64"}
_NO_TIMES = "are no times in ISO 8601"
_CLOCK_SET = "are no times in {} (a clock was set forward or back)"


@dataclass(frozen=True)
class Place:
    """A table: its database, its name, and what to select its rows from."""

    database: str
    name: str
    rows: str


def found(ask: Ask, dataset: str, wish: Wish) -> Place:
    """Return the table that is meant; raises `NoTable`, or `AdoptionRefused` for what is no table."""
    own = location.split(dataset)
    place = own
    if wish.table is not None:
        database, dot, name = wish.table.partition(".")
        place = (database, name) if dot else ("default", wish.table)
    engine = _engine(ask, *place)
    if engine is None:
        raise NoTable(
            f"there is no table {'.'.join(place)}, so there is none of {dataset} to adopt; name the one that is "
            "meant by --table"
        )
    table = named(*place)
    if "View" in engine:
        raise AdoptionRefused(table, ["it is a view: name the table that it shows by --table, or make one of it"])
    if place != own and _engine(ask, *own) is not None:
        raise AdoptionRefused(table, [f"there is a table {named(*own)} already, which has the name it must get"])
    return Place(*place, f"{table} FINAL" if _LAST_VERSIONS.search(engine) else table)


def look(ask: Ask, place: Place, schema: Schema, wish: Wish) -> Look:
    """Read what the engine says of a table's columns."""
    columns = ask(
        f"SELECT name, type FROM system.columns WHERE database = {literal(place.database)} "
        f"AND table = {literal(place.name)} AND default_kind NOT IN ('EPHEMERAL') ORDER BY position"
    )
    table = named(place.database, place.name)
    theirs = {name: Theirs(name, type_, _bare(type_)) for name, type_ in columns.select("name", "type").iter_rows()}
    return Look(schema, wish, table, theirs, (), dialect(ask, partial(_fit, wish.zone)), rows=place.rows)


def dialect(ask: Ask, fit: Callable[[Column, Theirs], Fit] | None = None) -> Dialect:
    """Return how ClickHouse is asked."""
    return Dialect(
        quoted,
        lambda value: f"toValidUTF8(toString({value}))",
        _bucket,
        lambda sql: ask(sql).rows(),
        fit or partial(_fit, None),
        "",
        "",
        "",
    )


def _bucket(at: str, seconds: int) -> str:
    micros = f"toUnixTimestamp64Micro({at})"
    return f"fromUnixTimestamp64Micro({micros} - positiveModulo({micros}, {seconds}000000), 'UTC')"


def selected(look: Look) -> tuple[Sequence[str], Sequence[str]]:
    """Return the columns of ours that the table has, and the values that they get."""
    return list(look.fits), [fit.value for fit in look.fits.values()]


def _engine(ask: Ask, database: str, name: str) -> str | None:
    found = ask(f"SELECT engine FROM system.tables WHERE database = {literal(database)} AND name = {literal(name)}")
    return None if found.is_empty() else found["engine"][0]


def _bare(type_: str) -> str:
    while inner := _WRAPPED.fullmatch(type_):
        type_ = inner[1]
    return type_


def _fit(zone: str | None, column: Column, theirs: Theirs) -> Fit:
    """Return how a column of theirs becomes one of ours."""
    type_, name, of = column.type, quoted(theirs.name), theirs.of
    fit = None
    if type_ is ColumnType.STR:
        if of.startswith("FixedString"):
            # as long as it is, filled up
            fit = Fit(f"replaceRegexpOne(toString({name}), '\\\\x00+$', '')", _COPIED, *_no_text(name))
        elif of == "String":
            fit = Fit(name, _COPIED, *_no_text(name))
        elif of.startswith(("Enum", "UUID")):
            fit = Fit(f"toString({name})", _COPIED)
    elif type_ is ColumnType.BOOL:
        if of == "Bool":
            fit = Fit(name, _COPIED)
        elif _INTS.fullmatch(of):
            fit = Fit(f"toBool({name})", _COPIED, f"{name} NOT IN (0, 1)", "are neither 0 nor 1")
    elif type_ in WHOLE:
        fit = _whole(_ENGINE[type_], of, name)
    elif type_ in (ColumnType.F32, ColumnType.F64):
        fit = _float("Float32" if type_ is ColumnType.F32 else "Float64", theirs, name)
    elif type_ is ColumnType.DATE:
        fit = _date(of, name, zone or "UTC")
    else:
        fit = _instant(9 if type_ is ColumnType.DATETIME_NS else 6, theirs, name, zone)
    refusal = (
        f"column {theirs.name!r} is {theirs.shown}, and the dataset's is {type_}; nobody knows what its values mean: "
        "make a table in which they are such (INSERT INTO ... SELECT), and adopt that by --table"
    )
    return fit or Fit(name, refusal=refusal)


def _no_text(name: str) -> tuple[str, str]:
    """Return what holds for bytes that are no text, with which no row could be read, and that in words."""
    return f"NOT isValidUTF8({name})", "are no text in UTF-8 (see convertCharset)"


def _whole(target: str, of: str, name: str) -> Fit | None:
    if _INTS.fullmatch(of) or of in ("Float32", "Float64"):
        value = f"accurateCastOrNull({name}, '{target}')"
        return Fit(value, _COPIED, f"{value} IS NULL", WHOLE_WORDS)
    if of.startswith("Decimal"):
        value = f"accurateCastOrNull({name}, '{target}')"
        return Fit(value, _COPIED, f"{value} IS NULL OR {name} != trunc({name})", WHOLE_WORDS)
    if of == "String":
        value = f"to{target}OrNull({name})"
        return Fit(value, _COPIED, f"{value} IS NULL", WHOLE_WORDS)
    return None


def _float(target: str, theirs: Theirs, name: str) -> Fit | None:
    of, value = theirs.of, f"to{target}({name})"
    if of == "Float32":
        return Fit(value, _COPIED, note="" if target == of else f"column {theirs.name!r} {adoption.SINGLE}")
    if of == "Float64":
        loses = f"toFloat64(toFloat32({name})) != {name} AND NOT isNaN({name})" if target == "Float32" else None
        return Fit(value, _COPIED, loses, NUMBER_WORDS)
    if _INTS.fullmatch(of):
        cast = f"accurateCastOrNull({name}, '{target}')"
        return Fit(cast, _COPIED, f"{cast} IS NULL", NUMBER_WORDS)
    if of.startswith("Decimal"):
        return Fit(value, _COPIED, f"toString({value}) != toString({name})", NUMBER_WORDS)
    if of == "String":
        value, double = f"to{target}OrNull({name})", f"toFloat64OrNull({name})"
        loses = f"{value} IS NULL OR isInfinite({value}) AND NOT match({name}, '(?i)inf')"
        if target == "Float32":  # 0.1 is what Float32 shows of the nearest that it has
            shown = f"toFloat64OrNull(toString({value}))"
            loses += f" OR {value} != {double} AND {shown} != {double} AND NOT isNaN({value})"
        return Fit(value, _COPIED, loses, NUMBER_WORDS)
    return None


def _date(of: str, name: str, zone: str) -> Fit | None:
    if of in ("Date", "Date32"):
        return Fit(f"toDate32({name})", _COPIED)
    if of.startswith("DateTime"):
        local = f"toTimeZone({name}, {literal(zone)})"
        loses = f"toDateTime64({local}, 6) != toDateTime64(toStartOfDay({local}), 6)"
        return Fit(f"toDate32({local})", _COPIED, loses, f"are not at midnight in {zone} (see --zone)")
    if of == "String" or _INTS.fullmatch(of):
        day = f"replaceRegexpOne(toString({name}), '^([0-9]{{4}})-?([0-9]{{2}})-?([0-9]{{2}})$', '\\\\1-\\\\2-\\\\3')"
        value = f"toDate32OrNull({day})"
        loses = (
            f"NOT match({day}, '^[0-9]{{4}}-[0-9]{{2}}-[0-9]{{2}}$') OR {value} IS NULL OR toString({value}) != {day}"
        )
        return Fit(value, _COPIED, loses, DAY_WORDS)
    return None


def _instant(scale: int, theirs: Theirs, name: str, zone: str | None) -> Fit | None:
    of = theirs.of
    if of.startswith("DateTime"):  # an instant, whatever zone it is shown in
        value = f"toTimeZone(toDateTime64({name}, {scale}), 'UTC')"
        precision = re.match(r"DateTime64\((\d)", of)
        finer = precision is not None and int(precision[1]) > scale
        loses = f"toDateTime64({value}, 9) != toDateTime64({name}, 9)" if finer else None
        return Fit(value, _COPIED, loses, "are finer than a microsecond")
    if of in ("Date", "Date32"):
        if zone is None:
            return Fit(name, refusal=f"column {theirs.name!r} is {theirs.shown}: {adoption.NO_ZONE}")
        shown = f"concat(toString({name}), ' 00:00:00'), {scale}"
        value = f"toTimeZone(toDateTime64OrNull({shown}, {literal(zone)}), 'UTC')"
        return Fit(value, _COPIED, _moved(value, f"toDateTime64OrNull({shown}, 'UTC')", zone), _CLOCK_SET.format(zone))
    if of == "String":
        parsed = f"parseDateTime64BestEffortOrNull({name}, {scale}, {{}})"
        value, zoned = f"toTimeZone({parsed.format(literal(zone or 'UTC'))}, 'UTC')", f"{TIME_TEXT}{OFFSET}$"
        if zone is None:
            loses, what = f"NOT match({name}, {literal(zoned)})", f"{_NO_TIMES} with their zone ({adoption.NO_ZONE})"
        else:
            moved = _moved(value, parsed.format("'UTC'"), zone)
            loses = f"NOT match({name}, {literal(f'{TIME_TEXT}?{OFFSET}?$')}) "
            loses += f"OR NOT match({name}, {literal(zoned)}) AND ({moved})"
            what = f"{_NO_TIMES}, or {_CLOCK_SET.format(zone)}"
        return Fit(value, _COPIED, f"{loses} OR {value} IS NULL", what)
    return None


def _moved(value: str, shown: str, zone: str) -> str:
    """Return the condition for an instant that the zone's clocks never showed as `shown`, which is said in UTC, or
    showed twice: whose clock was set forward or back."""

    def offset(instant: str) -> str:
        return f"timeZoneOffset(toTimeZone({instant}, {literal(zone)}))"

    back = f"({offset(f'subtractDays({value}, 1)')} - {offset(f'addDays({value}, 1)')})"
    first = f"{offset(f'addSeconds({value}, {back})')} = {offset(value)} - {back}"
    second = f"{offset(f'subtractSeconds({value}, {back})')} = {offset(value)} + {back}"
    return f"addSeconds({value}, {offset(value)}) != {shown} OR {back} != 0 AND ({first} OR {second})"


def named(database: str, name: str) -> str:
    """Return the table as a statement names it."""
    return f"{quoted(database)}.{quoted(name)}"


def quoted(name: str | None) -> str:
    """Return the name as an identifier."""
    escaped = (name or "").replace("\\", "\\\\").replace("`", "\\`")
    return f"`{escaped}`"


def literal(text: str) -> str:
    """Return the text as a literal."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\0", "\\0")
    return f"'{escaped}'"
