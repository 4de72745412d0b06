"""Rows of MySQL as texts: what LOAD DATA and INSERT are given, what a SELECT over a table gives back, and the names in
a person's query. Connections and transactions are in `mysql.py`; nothing here talks to a server.

A row is read as one field, a line with numbers, times and short texts between commas (`line`, `parsed`), because the
client spends its time on fields; only texts that may be long are fields of their own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from datetime import UTC, date, datetime
from typing import IO, TYPE_CHECKING, Any

from marketsync.errors import StoreError

if TYPE_CHECKING:
    import polars as pl

_TIMES = "%Y-%m-%d %H:%M:%S%.6f"
_DAYS = "%Y-%m-%d"
_INSERTED_ROWS = 5_000  # in a statement
_INSERTED_SHARE = 4  # of the longest packet that a server takes, a statement with rows fills one in so many


def loading(table: str, file: IO[bytes], frame: pl.DataFrame) -> str:
    """Write the rows into an open file and return the statement that loads it."""
    frame.write_csv(file, include_header=False, quote_style="non_numeric", null_value="NULL", datetime_format=_TIMES)
    file.seek(0)
    names = ", ".join(map(quoted, frame.columns))
    return (
        f"LOAD DATA LOCAL INFILE '/dev/fd/{file.fileno()}' INTO TABLE {table} CHARACTER SET utf8mb4 "
        f"FIELDS TERMINATED BY ',' OPTIONALLY ENCLOSED BY '\"' ESCAPED BY '' LINES TERMINATED BY '\\n' ({names})"
    )


def insertions(table: str, frame: pl.DataFrame, packet: int) -> Iterator[str]:
    """Yield the rows as INSERT statements that a server takes whose longest packet has so many bytes."""
    import polars as pl

    names = ", ".join(map(quoted, frame.columns))
    values = []
    for name, type_ in frame.schema.items():
        value = pl.col(name)
        if isinstance(type_, pl.String):
            for found, written in (("\\", "\\\\"), ("'", "''"), ("\0", "\\0")):
                value = value.str.replace_all(found, written, literal=True)
            value = pl.concat_str(pl.lit("'"), value, pl.lit("'"))
        elif isinstance(type_, pl.Datetime):
            value = value.dt.strftime(f"'{_TIMES}'")
        elif isinstance(type_, pl.Date):
            value = value.dt.strftime(f"'{_DAYS}'")
        else:
            value = value.cast(pl.String)
        values.append(value.fill_null("NULL"))
    row = pl.concat_str(pl.lit("("), pl.concat_str(*values, separator=","), pl.lit(")"))
    for part in frame.iter_slices(_INSERTED_ROWS):
        rows = part.select(row.alias("row")).to_series()
        share = rows.str.len_bytes().cum_sum() // max(1, packet // _INSERTED_SHARE)
        for each in (
            rows.to_frame().group_by(share.alias("share"), maintain_order=True).agg(pl.col("row").str.join(",")).rows()
        ):
            yield f"INSERT INTO {table} ({names}) VALUES {each[1]}"


def selected(types: dict[str, pl.DataType], long: Sequence[str], short: Sequence[str]) -> str:
    """Return what to select for `parsed`: a line, then the `long` texts; `short` ones are never null."""
    parts = [
        f"HEX({quoted(name)})" if name in short else f"IFNULL({quoted(name)}, '')" for name in types if name not in long
    ]
    # a second part, so that a line is never empty
    parts = [*parts, "''"] if len(parts) == 1 else parts
    line = ", ',', ".join(parts)
    return ", ".join([*([f"CONCAT({line})"] if parts else []), *map(quoted, long)])


def parsed(
    rows: Sequence[Sequence[Any]], types: dict[str, pl.DataType], long: Sequence[str], short: Sequence[str]
) -> pl.DataFrame:
    """Return rows of what `selected` has asked for, with the schema's types."""
    import polars as pl

    fields = list(zip(*rows, strict=True))
    lined = {name: type_ for name, type_ in types.items() if name not in long}
    frame = _lines(fields.pop(0), lined, short) if lined else pl.DataFrame()
    texts = [pl.Series(name, values, pl.String) for name, values in zip(long, fields, strict=True)]
    return pl.DataFrame([*frame.get_columns(), *texts]).select(list(types))


def _lines(lines: Sequence[str | None], types: dict[str, pl.DataType], short: Sequence[str]) -> pl.DataFrame:
    import polars as pl

    if None in lines:
        raise StoreError("a row has a value that is longer than the server's max_allowed_packet, and cannot be read")
    read: dict[str, Any] = {}
    casts = []
    for name, type_ in types.items():
        if name in short:
            read[name] = type_
            casts.append(pl.col(name).fill_null("").str.decode("hex").cast(type_))
        elif isinstance(type_, pl.Datetime):
            read[name] = pl.String()
            instant = pl.col(name).str.to_datetime(_TIMES, time_unit="us", time_zone="UTC")
            casts.append(instant.cast(type_))
        elif isinstance(type_, pl.Date):
            read[name] = pl.String()
            casts.append(pl.col(name).str.to_date(_DAYS))
        elif isinstance(type_, pl.Boolean):
            read[name] = pl.Int8()
            casts.append(pl.col(name).cast(type_))
        elif isinstance(type_, pl.Float32):
            read[name] = pl.Float64()
            casts.append(pl.col(name).cast(type_))
        else:
            read[name] = type_
    if len(read) == 1:
        read[""] = pl.String()  # the part that `selected` adds; no column has this name
    text = "\n".join(lines).encode()  # pyright: ignore[reportArgumentType, reportCallIssue]
    frame = pl.read_csv(text, has_header=False, schema=read, quote_char=None)
    return frame.with_columns(casts).select(list(types))


def answer(rows: Sequence[Sequence[Any]], described: Sequence[Sequence[Any]]) -> pl.DataFrame:
    """Return rows of a query with the types that the engine gives their columns."""
    import polars as pl
    from pymysql.constants import FIELD_TYPE

    whole = (FIELD_TYPE.TINY, FIELD_TYPE.SHORT, FIELD_TYPE.INT24, FIELD_TYPE.LONG, FIELD_TYPE.LONGLONG, FIELD_TYPE.YEAR)
    decimal = (FIELD_TYPE.DECIMAL, FIELD_TYPE.NEWDECIMAL)
    columns: dict[str, pl.Series] = {}
    for index, field in enumerate(described):
        name, kind, scale = field[0], field[1], field[5]
        values = [row[index] for row in rows]
        if kind in whole:
            type_ = pl.UInt64() if any(value is not None and value > 2**63 - 1 for value in values) else pl.Int64()
        elif kind in (FIELD_TYPE.FLOAT, FIELD_TYPE.DOUBLE):
            type_ = pl.Float64()
        elif kind in decimal:
            fits = all(value is None or len(value.as_tuple().digits) <= 38 for value in values)
            type_ = pl.Decimal(38, scale) if fits and scale <= 38 else pl.String()
            values = values if isinstance(type_, pl.Decimal) else [None if v is None else str(v) for v in values]
        elif kind in (FIELD_TYPE.DATETIME, FIELD_TYPE.TIMESTAMP):
            type_ = pl.Datetime("us", "UTC")
            values = [None if value is None else utc(value) for value in values]
        elif kind in (FIELD_TYPE.DATE, FIELD_TYPE.NEWDATE):
            type_ = pl.Date()
        elif kind == FIELD_TYPE.TIME:
            type_ = pl.Duration("us")
        else:
            type_ = pl.Binary() if any(isinstance(value, bytes) for value in values) else pl.String()
        columns[_fresh(name, columns)] = pl.Series(values, dtype=type_)
    return pl.DataFrame(columns)


def _fresh(name: str, taken: dict[str, Any]) -> str:
    """Return the name, with a number where a column of the answer has it already."""
    number, fresh = 1, name
    while fresh in taken:
        number += 1
        fresh = f"{name}_{number}"
    return fresh


# texts and comments, which are left alone, and names, of which two may have a dot between
_SAID = re.compile(
    r"'(?:[^'\\]|\\.|'')*'|\"(?:[^\"\\]|\\.|\"\")*\"|--(?=\s)[^\n]*|#[^\n]*|/\*.*?\*/|"
    r"(?P<first>`[^`]+`|[\w$]+)\s*\.\s*(?P<second>`[^`]+`|[\w$]+)|`[^`]*`|[\w$]+",
    re.DOTALL,
)


def named(sql: str, datasets: Sequence[str]) -> str:
    """Return the query with every `provider.dataset` that has a table here as the one name that the engine has."""

    def one(found: re.Match[str]) -> str:
        if found["first"] is None:
            return found[0]
        name = ".".join(half.strip("`") for half in (found["first"], found["second"]))
        return quoted(name) if name in datasets else found[0]

    return _SAID.sub(one, sql)


def quoted(name: str | None) -> str:
    """Return the name as an identifier."""
    escaped = (name or "").replace("`", "``")
    return f"`{escaped}`"


def literal(text: str) -> str:
    """Return the text as a literal, where a backslash escapes."""
    escaped = text.replace("\\", "\\\\").replace("'", "''").replace("\0", "\\0")
    return f"'{escaped}'"


def utc(value: Any) -> date | datetime:
    """Return what the driver gives for a time, as an aware one."""
    return value.replace(tzinfo=UTC) if isinstance(value, datetime) else value
