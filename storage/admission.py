"""What a frame must be before a store may write it: the schema's columns, types, unique non-null keys, storable values.

The gate in front of the spool judges rows and quarantines the bad ones; this one trusts nothing and raises, so that no
engine ever gets a chance to change a value silently. It repairs nothing but the order of columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from typing import TYPE_CHECKING, Any, Protocol

from marketsync.errors import RowsRefused, SchemaError
from marketsync.schema import Column, ColumnType, Schema
from storage.evolution import required

if TYPE_CHECKING:
    import polars as pl

    from storage.protocol import Capabilities, Store

_I64_MAX = 2**63 - 1
_LEAST = {
    ColumnType.I32: -(2**31),
    ColumnType.I64: -(2**63),
    ColumnType.F32: -3.4028234663852886e38,
    ColumnType.F64: -1.7976931348623157e308,
}
_FLOATS = (ColumnType.F32, ColumnType.F64)
_EPOCH = date(1970, 1, 1).toordinal()
_DAY = {  # what one day counts
    ColumnType.DATE: 1,
    ColumnType.DATETIME: 86_400_000_000,
    ColumnType.DATETIME_NS: 86_400_000_000_000,
}
_ALL_YEARS = (1, 9999)
_YEARS = {ColumnType.DATETIME_NS: (1678, 2261)}  # the whole ones that 64 bits reach
_SHOWN = 40  # characters of a value


@dataclass(frozen=True)
class Unkept:
    """A kind of value that a store would not give back: the column, which rows have one there (the condition may be
    null), what it is, the remedy."""

    column: str
    where: pl.Expr
    what: str
    remedy: str


class Refuses(Protocol):
    """A store that refuses more than its capabilities tell."""

    def unkept(self, dataset: str, schema: Schema) -> Sequence[Unkept]:
        """Return what else `write` would refuse in rows for a table of this schema; raises `SchemaError` where `ensure`
        would refuse the schema. Nothing is made."""
        ...


def unkept_by(store: Store, dataset: str, schema: Schema) -> list[Unkept]:
    """Return every kind of value that the store would refuse in rows for a table of this schema, before there is one;
    raises `SchemaError` for a schema that the store would refuse."""
    ask = getattr(store, "unkept", None)  # of a store that `Refuses`
    return [*_unkept(schema, store.capabilities), *([] if ask is None else ask(dataset, schema))]


def nulls(names: Iterable[str]) -> list[Unkept]:
    """Return as a kind the nulls in columns that are to have none."""
    import polars as pl

    remedy = "fill them in, or declare the column nullable in the definition of the table"
    return [Unkept(name, pl.col(name).is_null(), "null where the table has none", remedy) for name in names]


def long_keys(schema: Schema, longest: int) -> list[Unkept]:
    """Return as a kind the texts in the key that have more characters."""
    import polars as pl

    what = f"longer than the {longest} characters that its index takes"
    remedy = "take the column out of the key, have the data corrected, or use another store"
    texts = [name for name in schema.key if schema[name].type is ColumnType.STR]
    return [Unkept(name, pl.col(name).str.len_chars() > longest, what, remedy) for name in texts]


def admit(
    dataset: str, frame: pl.DataFrame, schema: Schema, capabilities: Capabilities, more: Sequence[Unkept] = ()
) -> pl.DataFrame:
    """Return the frame with the schema's columns and the system columns, in order.

    Raises `SchemaError` that names the column and the count for: a missing or unknown column, another type, a null
    in a key or non-nullable column, a key that occurs twice, a time outside the years 1 to 9999 (1678 to 2261 in
    nanoseconds); and `RowsRefused`, with the rows, for NaN in a key and for values that the engine's capabilities, or
    `more`, say it would not give back.
    """
    types = schema.polars(system=True)
    _columns(dataset, frame, types)
    frame = frame.select(list(types))
    if frame.is_empty():
        return frame
    _nulls(dataset, frame, schema)
    _years(dataset, frame, schema)
    kinds = [*_unkept(schema, capabilities), *more]
    if told := refusals(dataset, frame.lazy(), schema, kinds):
        import polars as pl

        raise RowsRefused(
            "; ".join(told), frame.filter(pl.any_horizontal(kind.where.fill_null(False) for kind in kinds))
        )
    _keys(dataset, frame, schema)
    return frame


def without_signs(frame: pl.DataFrame) -> pl.DataFrame:
    """Return the frame with 0.0 for -0.0, for an engine that does not promise to keep them apart."""
    import polars as pl

    floats = pl.col(pl.Float32, pl.Float64)
    return frame.with_columns(pl.when(floats == 0).then(0.0).otherwise(floats).name.keep())  # polars leaves `+ 0.0` out


def refusals(dataset: str, rows: pl.LazyFrame, schema: Schema, kinds: Sequence[Unkept]) -> list[str]:
    """Return a sentence for each kind that the rows have: which column, how many values, the first of them, the remedy.
    Reads only columns that may have one, once, and what is wrong once more."""
    if not kinds:
        return []
    counted = rows.select(kind.where.sum().alias(str(number)) for number, kind in enumerate(kinds))
    counts = counted.collect(engine="streaming").row(0)
    return [
        f"column {kind.column!r} of {dataset} has {count} values that this store cannot keep ({kind.what}; the first: "
        f"{_first(rows, schema, kind)}); {kind.remedy}"
        for count, kind in zip(counts, kinds, strict=True)
        if count
    ]


def _first(rows: pl.LazyFrame, schema: Schema, kind: Unkept) -> str:
    import polars.selectors as cs

    names = list(dict.fromkeys([*schema.key, kind.column]))
    found = rows.filter(kind.where).select(names).head(1).collect(engine="streaming")
    found = found.with_columns(cs.datetime("ns").dt.to_string())  # a datetime of Python has no nanoseconds
    return ", ".join(f"{name} {shown(value)}" for name, value in found.row(0, named=True).items())


def shown(value: Any) -> str:
    """Return a value as a message has room for it."""
    text = str(value) if isinstance(value, date) else repr(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."


def _columns(dataset: str, frame: pl.DataFrame, types: dict[str, pl.DataType]) -> None:
    missing = [name for name in types if name not in frame.columns]
    unknown = [name for name in frame.columns if name not in types]
    if missing or unknown:
        parts = [f"{word}: {', '.join(names)}" for word, names in (("missing", missing), ("unknown", unknown)) if names]
        raise SchemaError(f"a frame for {dataset} does not have the columns of its schema ({'; '.join(parts)})")
    for name, type_ in types.items():
        if frame.schema[name] != type_:
            raise SchemaError(
                f"column {name!r} of a frame for {dataset} is {frame.schema[name]} and must be {type_}; "
                "cast it strictly before it is delivered"
            )


def _nulls(dataset: str, frame: pl.DataFrame, schema: Schema) -> None:
    for name in required(schema):
        if count := frame[name].null_count():
            role = "key column" if name in schema.key else "non-nullable column"
            raise SchemaError(
                f"{role} {name!r} of a frame for {dataset} is null in {count} of {frame.height} rows; "
                "quarantine those rows, or declare the column nullable"
            )


def _years(dataset: str, frame: pl.DataFrame, schema: Schema) -> None:
    for column in schema.columns:
        if column.type not in _DAY:
            continue
        counted = frame[column.name].to_physical()
        low, high = counted.min(), counted.max()
        if low is None or high is None:
            continue
        day = _DAY[column.type]
        since, last = _YEARS.get(column.type, _ALL_YEARS)
        first_day, last_day = (each.toordinal() - _EPOCH for each in (date(since, 1, 1), date(last, 12, 31)))
        if int(low) // day < first_day or int(high) // day > last_day:  # pyright: ignore[reportArgumentType]
            raise SchemaError(
                f"column {column.name!r} of a frame for {dataset} has times outside of the years {since} to {last}; "
                "check the unit that the definition gives it (s, ms, us, ns)"
            )


def _unkept(schema: Schema, able: Capabilities) -> list[Unkept]:
    """Return the kinds of values that a store of these capabilities would not give back."""
    kinds = [Unkept(column.name, *kind) for column in schema.columns for kind in _of_column(column, schema, able)]
    return kinds if able.longest_key is None else [*kinds, *long_keys(schema, able.longest_key)]


def _of_column(column: Column, schema: Schema, able: Capabilities) -> Iterator[tuple[pl.Expr, str, str]]:
    import polars as pl

    value = pl.col(column.name)
    if column.type is ColumnType.U64 and not able.unsigned_64:
        yield value > _I64_MAX, f"greater than {_I64_MAX}", "declare the column str or f64, or use another store"
    if column.type is ColumnType.DATETIME_NS and not able.nanoseconds:
        finer = value.to_physical() % 1000 != 0
        yield (
            finer,
            "finer than a microsecond",
            "declare the column datetime or i64, or use another store",
        )
    if column.type in _FLOATS and not able.nan:
        yield ~value.is_finite(), "NaN or infinite", "map them to null in the definition, or use another store"
    if column.type in _FLOATS and column.name in schema.key:
        what = "NaN in the key, which equals nothing, so that no such row would ever be found again"
        yield value.is_nan(), what, "quarantine those rows, or take the column out of the key"
    if column.type in _DAY.keys() | {ColumnType.DATETIME_NS} and able.days is not None:
        first, last = able.days
        day = value if column.type is ColumnType.DATE else value.dt.date()
        outside = (day < first) | (day > last)
        yield outside, f"before {first} or after {last}", "declare the column str or i64, or use another store"
    if column.name == schema.time and able.earliest is not None:
        # a date stands for its midnight
        early = value <= able.earliest.date() if column.type is ColumnType.DATE else value < able.earliest
        yield early, f"before {able.earliest:%Y-%m-%d %H:%M:%S} UTC", "use another store for these rows"
    if column.type is ColumnType.STR and not able.nul:
        nul = value.str.contains("\0", literal=True)
        yield nul, "text with a NUL character", "have the provider's data corrected, or use another store"
    if column.type is ColumnType.STR and not able.empty_text:
        yield value == "", "empty text", "map it to null in the definition, or use another store"
    if column.type is ColumnType.STR and not able.final_return:
        yield value.str.ends_with("\r"), "text that ends in a carriage return", "have it stripped, or use another store"
    if column.type in _LEAST and not able.least:
        least = value == _LEAST[column.type]
        yield least, "the least of its type", "map it to null in the definition, or use another store"
    if column.name == schema.subject and able.subjects is not None:
        odd = ~value.str.contains(f"^(?:{able.subjects})$")
        what = "no name that it can give a place, which has to match " + able.subjects
        yield odd, what, "write it another way in the definition, BTC-USD for BTC/USD, or use another store"
    if column.type is ColumnType.STR and able.longest_text is not None and column.name != schema.subject:
        wider = value.str.len_chars() > able.longest_text
        yield wider, f"longer than {able.longest_text} characters", "leave the column out, or use another store"


def _keys(dataset: str, frame: pl.DataFrame, schema: Schema) -> None:
    import polars as pl

    key = list(schema.key)
    # most batches are whole runs of one subject in the order of time, where a look at each neighbour is the proof
    rises, ties = pl.lit(False), pl.lit(True)
    for name in key:
        rises = rises | (ties & (pl.col(name) > pl.col(name).shift()))
        ties = ties & (pl.col(name) == pl.col(name).shift())
    if frame.select(rises.slice(1).all()).item():
        return
    # else 64-bit hashes that are all different prove that the keys are, at less than half the cost of comparing keys
    hashes = pl.struct(key) if len(key) > 1 else pl.col(key)
    if frame.select(hashes.hash().n_unique()).item() == frame.height:
        return
    twice = frame.filter(frame.select(schema.key).is_duplicated())
    if not twice.is_empty():
        first = ", ".join(f"{name}={value}" for name, value in twice.select(schema.key).row(0, named=True).items())
        raise SchemaError(
            f"{twice.height} of {frame.height} rows of a frame for {dataset} share a key with another row "
            f"(the first: {first}); keep the last of each before it is delivered"
        )
