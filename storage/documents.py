"""Rows as MongoDB documents: the `_id` that a key makes, the fields; a `Filter` as queries. Asks no server.

An `_id` is text: the subject, the time, then what else is in the key, with a space between. Text and not an embedded
document or bytes, because MongoDB orders text by its UTF-8 bytes (bytes by their length first), so that the rows of one
subject lie together in the order of time, a range of `_id`s is a span of time, a person can read and type one, and
there is one way only to write each key: spaces, control characters and ! in text become ! and a letter, which keeps the
order; times have a fixed width.

A BSON date counts milliseconds. A time is such a date, so that people ask for it as for any other, and what is beyond
the millisecond is a number of nanoseconds in a field beside it, `<column>__ns`, which is not there where it would be 0.
Neither are nulls.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from itertools import repeat
from typing import TYPE_CHECKING, Any

from marketsync.errors import SchemaConflict, StoreError
from marketsync.schema import SYSTEM_COLUMNS, ColumnType, Schema, polars_type
from storage import filters
from storage.protocol import Filter

if TYPE_CHECKING:
    import polars as pl

Document = dict[str, Any]

FINE = "__ns"
SUBJECTS_A_QUERY = 200
_I64_MAX = 2**63 - 1
_DECIMAL_DIGITS = 38
_AFTER = "!"  # what follows a subject's last `_id`: the character after the space
_ESCAPES = {chr(code): "!" + chr(ord("0") + code) for code in range(ord("!") + 1)}
_TABLE = str.maketrans(_ESCAPES)
_TIMES = (ColumnType.DATE, ColumnType.DATETIME, ColumnType.DATETIME_NS)
_FORMATS = {
    ColumnType.DATE: "%Y-%m-%d",
    ColumnType.DATETIME: "%Y-%m-%dT%H:%M:%S%.6f",
    ColumnType.DATETIME_NS: "%Y-%m-%dT%H:%M:%S%.9f",
}
_FINEST = {ColumnType.DATETIME: 1_000, ColumnType.DATETIME_NS: 1}  # nanoseconds in one unit of the type


def check(dataset: str, schema: Schema) -> None:
    """Raise `SchemaConflict` for a column whose name a field of a document cannot have, or one of ours has."""
    fine = {name + FINE for name in (*schema.names, *SYSTEM_COLUMNS)}
    for name in schema.names:
        if name.startswith("$") or "." in name or name == "_id" or name in fine:
            why = "is one that MarketSync gives" if name == "_id" or name in fine else "begins with $ or has a . in it"
            raise SchemaConflict(
                f"{dataset} cannot become a collection in MongoDB: the name of the field {name!r} {why}; rename the "
                "column in the definition (as: ...)"
            )


def identity(schema: Schema) -> tuple[str, ...]:
    """Return the columns of the key in the order in which the `_id` has them."""
    first = [name for name in (schema.subject, schema.time) if name in schema.key]
    return (*first, *(name for name in schema.key if name not in first))  # pyright: ignore[reportReturnType]


def ids(frame: pl.DataFrame, schema: Schema) -> pl.Series:
    """Return the `_id` of each row."""
    import polars as pl

    parts = [_written(frame[name], schema[name].type) for name in identity(schema)]
    return frame.select(pl.concat_str(parts, separator=" ").alias("_id")).to_series()


def identified(frame: pl.DataFrame, schema: Schema) -> pl.DataFrame:
    """Return the frame with the `_id` of each row, as the first column."""
    import polars as pl

    return frame if "_id" in frame.columns else frame.select(ids(frame, schema), pl.all())


def to_documents(frame: pl.DataFrame, schema: Schema) -> list[Document]:
    """Return one document a row, `_id` first, then the frame's columns in order."""
    fields: dict[str, list] = {}
    sparse = False
    for values in identified(frame, schema).iter_columns():
        name = values.name
        sparse = sparse or values.null_count() > 0
        # most batches are one segment, which came at one time: what is the same in each row is made once
        one = name in SYSTEM_COLUMNS and values.n_unique() == 1
        given, fine = _values(values.head(1) if one else values, _type(schema, name))
        fields[name] = given * frame.height if one else given
        if fine is not None:
            fields[name + FINE] = fine * frame.height if one else fine
            sparse = sparse or None in fine
    names = list(fields)
    rows = zip(*fields.values(), strict=True)
    if not sparse:
        return list(map(dict, map(zip, repeat(names), rows)))
    return [{name: value for name, value in zip(names, row, strict=True) if value is not None} for row in rows]


def projection(names: Sequence[str], schema: Schema) -> dict[str, int]:
    """Return what a query asks for so that `from_documents` has these columns."""
    fine = [name + FINE for name in names if _type(schema, name) in _FINEST]
    return {"_id": 1, **dict.fromkeys([*names, *fine], 1)}


def from_documents(documents: Sequence[Document], names: Sequence[str], schema: Schema) -> pl.DataFrame:
    """Return the columns with the schema's types; raises `StoreError` for a value that is none of its column's type."""
    import polars as pl

    return pl.DataFrame({name: _column(documents, name, _type(schema, name)) for name in names})


def instant(document: Document, name: str, schema: Schema) -> date | datetime:
    """Return the document's time as the column has it."""
    moment: datetime = document[name]
    if schema[name].type is ColumnType.DATE:
        return moment.date()
    return moment.replace(tzinfo=UTC) + timedelta(microseconds=document.get(name + FINE, 0) // 1_000)


def times(frame: pl.DataFrame, schema: Schema) -> pl.Series:
    """Return the time of each row as its date, in milliseconds."""
    import polars as pl

    name = schema.time or ""
    return pl.Series(name, _values(frame[name], schema[name].type)[0], pl.Datetime("ms"))


def queries(dataset: str, filter: Filter, schema: Schema) -> list[Document]:
    """Return queries whose results together are the filter's rows, none of them twice."""
    since, until = filters.bounds(dataset, filter, schema)
    subjects = filters.subjects(dataset, filter, schema)
    order = identity(schema)
    low, high = (None if bound is None else _bound(bound, schema) for bound in (since, until))
    if subjects is None:
        if order[0] == schema.time:
            return [{"_id": span} if (span := _between(low, high)) else {}]
        return [_all(_within(schema, since, until))]
    if order[0] != schema.subject:
        return by_fields(dataset, filter, schema)
    groups = filters.groups(subjects, SUBJECTS_A_QUERY)
    if len(order) == 1:
        named = [[_escaped(each) for each in group] for group in groups]
        return [_all([{"_id": {"$in": group}}, *_within(schema, since, until)]) for group in named]
    timed = order[1] == schema.time
    found = []
    for group in groups:
        spans: list[Document] = []
        for subject in map(_escaped, group):
            last = f"{subject} {high}" if timed and high else subject + _AFTER
            spans.append({"_id": {"$gte": f"{subject} {low if timed and low else ''}", "$lt": last}})
        either = spans[0] if len(spans) == 1 else {"$or": spans}
        found.append(_all([either, *([] if timed else _within(schema, since, until))]))
    return found


def by_fields(dataset: str, filter: Filter, schema: Schema) -> list[Document]:
    """Return such queries where the `_id` says nothing of the key: they ask by the fields of subject and time."""
    within = _within(schema, *filters.bounds(dataset, filter, schema))
    subjects = filters.subjects(dataset, filter, schema)
    if subjects is None:
        return [_all(within)]
    groups = filters.groups(subjects, SUBJECTS_A_QUERY)
    return [_all([{schema.subject or "": {"$in": group}}, *within]) for group in groups]


def before(subject: str) -> str:
    """Return the text that is after the `_id`s of all subjects before this one, and before all of its own."""
    return _escaped(subject) + " "


def _type(schema: Schema, name: str) -> ColumnType:
    if name in schema:
        return schema[name].type
    return ColumnType.STR if name in ("_id", SYSTEM_COLUMNS[0]) else ColumnType.DATETIME


def _written(values: pl.Series, type_: ColumnType) -> pl.Series:
    """Return values of a key as text that sorts as they do (but floats), each in one way only."""
    import polars as pl

    if type_ is ColumnType.STR:
        if values.str.contains(r"[\x00-!]").any():
            values = values.str.replace_many(list(_ESCAPES), list(_ESCAPES.values()))
        return values
    if type_ in _FORMATS:
        return values.dt.strftime(_FORMATS[type_])
    if type_ is ColumnType.BOOL:
        return values.cast(pl.Int8).cast(pl.String)
    if type_ in (ColumnType.F32, ColumnType.F64):
        return values.set(values == 0, 0.0).cast(pl.String)  # 0.0 and -0.0 are one key
    if type_ is ColumnType.U64:
        return values.cast(pl.String).str.zfill(20)
    n = pl.col("n")
    below = pl.concat_str(pl.lit("-"), (n + _I64_MAX + 1).cast(pl.String).str.zfill(19))
    text = pl.when(n < 0).then(below).otherwise(n.cast(pl.String).str.zfill(19))
    return values.cast(pl.Int64).to_frame("n").select(text.alias(values.name)).to_series()


def _escaped(subject: str) -> str:
    return subject.translate(_TABLE)


def _values(values: pl.Series, type_: ColumnType) -> tuple[list, list | None]:
    """Return the values as BSON takes them, and what their times have beyond the millisecond where any has."""
    import polars as pl

    if type_ is ColumnType.DATE:
        return values.cast(pl.Datetime("ms")).to_list(), None
    if type_ in _FINEST:
        per_milli = 1_000_000 // _FINEST[type_]
        counted = values.to_physical()
        millis = counted // per_milli
        fine = counted - millis * per_milli
        given = None
        if (fine != 0).any():
            given = (fine * _FINEST[type_]).replace(0, None).to_list()
        return millis.cast(pl.Datetime("ms")).to_list(), given
    if type_ is ColumnType.U64 and (values > _I64_MAX).any():
        from bson import Decimal128

        # the only number of BSON with room for these; it compares with the others as a number
        return [Decimal128(str(each)) if each is not None and each > _I64_MAX else each for each in values], None
    return values.to_list(), None


def _column(documents: Sequence[Document], name: str, type_: ColumnType) -> pl.Series:
    import polars as pl

    values = [document.get(name) for document in documents]
    stored = {ColumnType.F32: pl.Float64(), **dict.fromkeys(_TIMES, pl.Datetime("ms"))}
    as_stored = stored.get(type_) or polars_type(type_)
    if type_ is ColumnType.U64:
        values = [_whole(each) for each in values]
    try:
        series = pl.Series(name, values, as_stored)
    except (TypeError, OverflowError):
        series = _series_of_others(documents, name, type_, as_stored)
    if type_ in _FINEST:
        per_milli = 1_000_000 // _FINEST[type_]
        counted = series.to_physical() * per_milli
        fine = [document.get(name + FINE) for document in documents]
        if any(fine):
            counted += pl.Series(fine, dtype=pl.Int64).fill_null(0) // _FINEST[type_]
        series = counted
    return series.cast(polars_type(type_))


def _series_of_others(documents: Sequence[Document], name: str, type_: ColumnType, as_stored: pl.DataType) -> pl.Series:
    """Return what another client wrote, where it is the same value in another type of number."""
    import polars as pl

    numbers = (ColumnType.I32, ColumnType.I64, ColumnType.U64)
    values = []
    for document in documents:
        value = document.get(name)
        value = _whole(value) if type_ in numbers else value
        try:
            pl.Series([value], dtype=as_stored)
        except (TypeError, OverflowError) as error:
            raise StoreError(
                f"the field {name!r} of the document with the _id {document.get('_id')!r} holds {value!r}, which is no "
                f"{type_}; correct or delete that document"
            ) from error
        values.append(value)
    return pl.Series(name, values, as_stored)


def _whole(value: Any) -> Any:
    """Return a whole number as an int: beyond 64 bits it is a decimal, and JavaScript writes doubles."""
    from bson import Decimal128

    if isinstance(value, Decimal128):
        number = value.to_decimal()
        return int(number) if number.is_finite() and number == number.to_integral_value() else value
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _bound(bound: date | datetime, schema: Schema) -> str:
    """Return a bound of the time column as the `_id` has it."""
    if not isinstance(bound, datetime):
        return bound.isoformat()
    text = bound.astimezone(UTC).replace(tzinfo=None).isoformat(timespec="microseconds")
    return text + ("000" if schema[schema.time or ""].type is ColumnType.DATETIME_NS else "")


def _between(low: str | None, high: str | None) -> Document:
    return {sign: bound for sign, bound in (("$gte", low), ("$lt", high)) if bound is not None}


def _within(schema: Schema, since: date | datetime | None, until: date | datetime | None) -> list[Document]:
    """Return the conditions on the time's own fields."""
    name = schema.time or ""
    found: list[Document] = []
    if since is not None:
        milli, fine = _split(since)
        found.append(
            {"$or": [{name: {"$gt": milli}}, {name: milli, name + FINE: {"$gte": fine}}]}
            if fine
            else {name: {"$gte": milli}}
        )
    if until is not None:
        milli, fine = _split(until)
        found.append(
            {"$or": [{name: {"$lt": milli}}, {name: milli, name + FINE: {"$not": {"$gte": fine}}}]}
            if fine
            else {name: {"$lt": milli}}
        )
    return found


def _split(bound: date | datetime) -> tuple[datetime, int]:
    """Return the bound to the millisecond below it, and the nanoseconds beyond that."""
    if not isinstance(bound, datetime):
        return datetime(bound.year, bound.month, bound.day), 0  # noqa: DTZ001 - as the driver has dates: in UTC
    moment = bound.astimezone(UTC).replace(tzinfo=None)
    beyond = moment.microsecond % 1_000
    return moment - timedelta(microseconds=beyond), beyond * 1_000


def _all(conditions: Iterable[Document]) -> Document:
    given = [condition for condition in conditions if condition]
    if len(given) < 2:
        return given[0] if given else {}
    return {"$and": given}


def foreign(documents: Sequence[Document], names: Sequence[str]) -> pl.DataFrame:
    """Return fields of documents that somebody else made, each column with the type that its values have; what has no
    type of a column, or several that are not all numbers, is bytes, which nothing is made of."""
    import polars as pl

    columns = []
    for name in names:
        values = _foreign(name, [document.get(name) for document in documents])
        fine = [document.get(name + FINE) for document in documents]
        if isinstance(values.dtype, pl.Datetime) and any(fine):  # a collection of ours that was restored from a dump
            counted = values.cast(pl.Datetime("ns", "UTC")).to_physical() + pl.Series(fine, dtype=pl.Int64).fill_null(0)
            values = counted.cast(pl.Datetime("ns", "UTC")).alias(name)
        columns.append(values)
    return pl.DataFrame(columns)


def _foreign(name: str, values: list[Any]) -> pl.Series:
    import polars as pl
    from bson import Decimal128

    kinds = {type(value) for value in values if value is not None}
    if not kinds:
        return pl.Series(name, values, pl.Null)
    if kinds == {bool}:
        return pl.Series(name, values, pl.Boolean)
    if kinds == {datetime}:
        return pl.Series(name, values, pl.Datetime("ms")).dt.replace_time_zone("UTC")  # as BSON has every date
    if kinds == {str}:
        return pl.Series(name, values, pl.String)
    if bool not in kinds and all(issubclass(kind, int | float | Decimal128) for kind in kinds):
        if all(issubclass(kind, int) for kind in kinds):
            return pl.Series(name, values, pl.Int64)
        if all(issubclass(kind, float) for kind in kinds):
            return pl.Series(name, values, pl.Float64)
        return _numbers(name, [None if value is None else Decimal(str(value)) for value in values])
    return pl.Series(name, [None if value is None else repr(value).encode() for value in values], pl.Binary)


def _numbers(name: str, values: list[Decimal | None]) -> pl.Series:
    """Return numbers of several types of BSON in a type that has each of them as it is: doubles, then whole numbers,
    then decimals; bytes where there is none."""
    import polars as pl

    there = [value for value in values if value is not None]
    if all(not value.is_finite() or Decimal(repr(float(value))) == value for value in there):
        return pl.Series(name, [None if value is None else float(value) for value in values], pl.Float64)
    finite = all(value.is_finite() for value in there)
    if finite and all(value == value.to_integral_value() and abs(value) < 2**127 for value in there):
        return pl.Series(name, [None if value is None else int(value) for value in values], pl.Int128)
    scale = max(0, *(-int(value.as_tuple().exponent) for value in there)) if finite else 0
    if finite and all(value.adjusted() + 1 + scale <= _DECIMAL_DIGITS for value in there):
        return pl.Series(name, values, pl.Decimal(_DECIMAL_DIGITS, scale))
    return pl.Series(name, [None if value is None else str(value).encode() for value in values], pl.Binary)
