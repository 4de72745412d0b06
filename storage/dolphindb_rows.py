"""How a schema and its rows are said to DolphinDB: names, types, the script that makes a table, values on their way in
and out. Nothing here connects.

The engine's null is the least number of a type, and the client reads a whole number next to a null as a float, which
loses digits from 2^53 on. So whole numbers, times and truth are asked for without their nulls, which come beside them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, date, datetime, time, timedelta
from typing import TYPE_CHECKING, Any

from marketsync.errors import SchemaError
from marketsync.schema import INGESTED_COLUMN, SEGMENT_COLUMN, ColumnType, Period, Schema
from storage import evolution, filters
from storage.admission import Unkept
from storage.protocol import Filter

if TYPE_CHECKING:
    import pandas as pd
    import polars as pl

NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
TYPES = {
    ColumnType.STR: "STRING",
    ColumnType.BOOL: "BOOL",
    ColumnType.I32: "INT",
    ColumnType.I64: "LONG",
    ColumnType.U64: "LONG",
    ColumnType.F32: "FLOAT",
    ColumnType.F64: "DOUBLE",
    ColumnType.DATE: "DATE",
    ColumnType.DATETIME: "NANOTIMESTAMP",
    ColumnType.DATETIME_NS: "NANOTIMESTAMP",
}
# a column's name begins with a letter there
_SYSTEM = {SEGMENT_COLUMN: "segment_", INGESTED_COLUMN: "ingested_at_"}
_FILLER = "row_"  # always 0: the last column that a table is sorted by must be a number or a time
_LONGEST_TEXT = 65_535  # bytes; the engine cuts a longer one
_FIRST, _LAST = date(1677, 9, 22), date(2262, 4, 10)  # whole days that 64 bits of nanoseconds reach
# Times outside of these years are in one partition before and one after: a question that no condition confines counts
# every partition that there could be, and the server answers none about more than 65,536 (maxPartitionNumPerQuery).
_CUT_FROM, _CUT_TO = 1970, 2100
_MONTHS = {Period.YEAR: 12, Period.MONTH: 1, Period.DAY: 1, Period.NONE: 1}
_BUCKETS = {Period.YEAR: 4, Period.MONTH: 8, Period.DAY: 32, Period.NONE: 4}
_INSTANTS = (ColumnType.DATETIME, ColumnType.DATETIME_NS)
_UNSORTED = (ColumnType.F32, ColumnType.F64, ColumnType.BOOL)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_DAY = timedelta(days=1)
_WORDS = """and any as asc assert between break by case cgroup class context continue contextby csort def defg delete
desc distinct do drop else end exec except exists false for from full go group having if import in include inner insert
interval into is join kill left like limit map module not null on or order outer pivot return right row select set share
static switch table then timer top true try undef union update use values when where while with"""


def check(dataset: str, schema: Schema) -> None:
    """Raise `SchemaError` for names that the engine has no place for, and for keys that it cannot sort by."""

    def refuse(why: str) -> None:
        raise SchemaError(f"{dataset} cannot become a table in DolphinDB: {why}")

    for name in schema.names:
        if not NAME.fullmatch(name) or name.lower() in _WORDS.split() or name in (*_SYSTEM.values(), _FILLER):
            refuse(
                f"a column cannot be called {name!r} there (letters, digits and _, a letter first, no word of its "
                "language); rename it in the definition (as: ...)"
            )
    types = {name: schema[name].type for name in schema.key}
    for name, type_ in types.items():
        if type_ in _UNSORTED:
            refuse(f"its key column {name!r} is {type_}, which the engine cannot sort by; declare it str or i64")
    if sum(type_ in _INSTANTS for type_ in types.values()) > 1:
        refuse("its key has several times of day, and the engine sorts by one; declare the others str or i64")


def creation(path: str, name: str, schema: Schema) -> str:
    """Return the script that makes the table, and its database where it is not there; the comment is a variable."""
    names, types = list(schema.names), [TYPES[column.type] for column in schema.columns]
    names += [*_SYSTEM.values(), _FILLER]
    types += ["STRING", "NANOTIMESTAMP", "INT"]
    levels, by = _levels(schema)
    scheme = f"partitionType={levels[0][0]}, partitionScheme={levels[0][1]}"
    if len(levels) > 1:
        parts = ", ".join(f'database("", {kind}, {cut})' for kind, cut in levels)
        scheme = f"partitionType=COMPO, partitionScheme=[{parts}]"
    return (
        f'if(!existsDatabase("{path}")) {{ database(directory="{path}", {scheme}, engine="TSDB", atomic="TRANS") }}\n'
        f'marketsync_made = createPartitionedTable(dbHandle=database("{path}"), '
        f"table=table(1:0, {_listed(names)}, [{', '.join(types)}]), "
        f'tableName="{name}", partitionColumns={_listed(by)}, sortColumns={_listed(_sorted(schema))}, '
        "keepDuplicates=LAST, softDelete=true)\n"
        "setTableComment(marketsync_made, marketsync_comment)"
    )


def _levels(schema: Schema) -> tuple[list[tuple[str, str]], list[str]]:
    """Return how the table is cut, (kind, scheme) each, and by which columns: only by those of the key, since the
    engine looks for the last row of a key within a partition."""
    levels: list[tuple[str, str]] = []
    by: list[str] = []
    plain = [name for name in schema.key if schema[name].type not in _INSTANTS]
    cut = schema.time if schema.time in schema.key and schema.period is not Period.NONE else None
    if cut is None and not plain:
        cut = schema.key[0]
    if cut is not None:
        step = _MONTHS[schema.period]
        # a partition is made when it gets its first row
        cuts = f"{_CUT_FROM}.01M + {step} * (0..{12 * (_CUT_TO - _CUT_FROM) // step})"
        levels.append(("RANGE", f"({_FIRST.year}.01M join ({cuts})) join {_LAST.year + 1}.01M"))
        by.append(cut)
    hashed = schema.subject if schema.subject in schema.key else next((name for name in plain if name != cut), None)
    if hashed is not None:
        levels.append(("HASH", f"[{TYPES[schema[hashed].type]}, {_BUCKETS[schema.period]}]"))
        by.append(hashed)
    return levels, by


def _sorted(schema: Schema) -> list[str]:
    """Return the key in the order that the engine can sort by: a time last, or else a number, or else the filler. A
    column alone may be anything but a time of day."""
    if len(schema.key) == 1:
        return [_FILLER, *schema.key] if schema[schema.key[0]].type in _INSTANTS else list(schema.key)

    def rank(name: str) -> int:
        type_ = schema[name].type
        return 3 if type_ in _INSTANTS else 2 if type_ is ColumnType.DATE else int(type_ is not ColumnType.STR)

    ordered = sorted(schema.key, key=rank)
    return ordered if rank(ordered[-1]) else [*ordered, _FILLER]


# values on their way in


def unkept(schema: Schema) -> list[Unkept]:
    """Return what the engine would cut or lose: texts beyond its bytes, times that 64 bits of nanoseconds do not reach,
    and days that no partition has."""
    import polars as pl

    kinds: list[Unkept] = []
    for column in schema.columns:
        value = pl.col(column.name)
        if column.type is ColumnType.STR:
            what = f"longer than {_LONGEST_TEXT} bytes, to which DolphinDB would cut them"
            remedy = "have them shortened, or use another store"
            kinds.append(Unkept(column.name, value.str.len_bytes() > _LONGEST_TEXT, what, remedy))
        day = column.type is ColumnType.DATE and column.name in (*schema.key, schema.time)
        if column.type in _INSTANTS or day:
            far = ~value.cast(pl.Date).is_between(_FIRST, _LAST)
            remedy = "declare the column str or i64, or use another store"
            kinds.append(Unkept(column.name, far, f"before {_FIRST} or after {_LAST}", remedy))
    return kinds


def encoded(frame: pl.DataFrame, order: Sequence[str]) -> pd.DataFrame:
    """Return the rows as the client takes them, with the columns in this order: it sends them by position."""
    import polars as pl

    ours = {there: here for here, there in _SYSTEM.items()}
    own = {SEGMENT_COLUMN: pl.lit("marketsync"), INGESTED_COLUMN: pl.lit(0).cast(pl.Datetime("ns"))}
    columns = []
    for there in order:
        here = ours.get(there, there)
        value = own.get(here, pl.lit(0, pl.Int32)) if here not in frame.columns else pl.col(here)
        if isinstance(frame.schema.get(here), pl.Datetime):
            value = value.dt.replace_time_zone(None).cast(pl.Datetime("ns"))
        elif frame.schema.get(here) == pl.UInt64:
            value = value.cast(pl.Int64)
        columns.append(value.alias(there))
    return frame.select(columns).to_pandas(use_pyarrow_extension_array=True)


# conditions: texts in them are variables, so that none of a row is ever read as a script


def where(dataset: str, schema: Schema, filter: Filter) -> tuple[list[str], dict[str, Any]]:
    """Return the conditions that a row of the filter meets, and the variables in them."""
    since, until = filters.bounds(dataset, filter, schema)
    wanted = filters.subjects(dataset, filter, schema)
    conditions = [] if since is None else [f"{schema.time} >= {_bound(since)}"]
    if until is not None:
        conditions.append(f"{schema.time} < {_bound(until)}")
        if schema.time not in _never_null(schema):  # null is less than anything there
            conditions.append(f"isValid({schema.time})")
    if wanted is None:
        return conditions, {}
    # an empty text is null there, and no row of ours has it
    wanted = [each for each in wanted if each]
    if not wanted:
        return ["1 = 0"], {}
    return [*conditions, f"{schema.subject} in marketsync_subjects"], {"marketsync_subjects": wanted}


def around(schema: Schema, frame: pl.DataFrame) -> tuple[list[str], dict[str, Any]]:
    """Return the conditions that every row with a key of the frame meets, and not many others."""
    subject = schema.subject if schema.subject in schema.key else None
    time = schema.time if schema.time in schema.key else None
    first = subject or (None if time else schema.key[0])
    conditions: list[str] = []
    values: dict[str, Any] = {}
    if time is not None:
        counted = frame[time].to_physical()
        low, high = (_literal(schema[time].type, end) for end in (counted.min(), counted.max()))
        conditions += [f"{time} >= {low}", f"{time} <= {high}"]
    if first is not None:
        conditions.append(f"{first} in marketsync_first")
        values["marketsync_first"] = _vector(frame[first].unique())
    return conditions, values


def keyed(schema: Schema, frame: pl.DataFrame, shared: Sequence[str], last: str) -> tuple[list[str], dict[str, Any]]:
    """Return the conditions for the rows with the keys of the frame, which are alike in their `shared` columns."""
    conditions = [f"{last} in marketsync_last"]
    values: dict[str, Any] = {"marketsync_last": _vector(frame[last])}
    for number, name in enumerate(shared):
        if schema[name].type is ColumnType.STR:
            values[f"marketsync_{number}"] = frame[name][0]
            conditions.append(f"{name} = marketsync_{number}")
        else:
            conditions.append(f"{name} = {_literal(schema[name].type, frame[name].to_physical()[0])}")
    return conditions, values


def _vector(values: pl.Series) -> Any:
    import polars as pl

    if isinstance(values.dtype, pl.Datetime):
        return values.dt.replace_time_zone(None).cast(pl.Datetime("ns")).to_numpy()
    if values.dtype == pl.UInt64:
        values = values.cast(pl.Int64)
    return values.to_list() if values.dtype == pl.String else values.to_numpy()


def _bound(bound: date | datetime) -> str:
    """Return a bound of the time column, within what the engine reaches: no row is outside of that."""
    if not isinstance(bound, datetime):
        return f"{min(max(bound, _FIRST), _LAST + _DAY):%Y.%m.%d}"
    first, last = (datetime.combine(day, time.min, UTC) for day in (_FIRST, _LAST + _DAY))
    return _literal(ColumnType.DATETIME, (min(max(bound, first), last) - _EPOCH) // timedelta(microseconds=1))


def _literal(type_: ColumnType, counted: Any) -> str:
    """Return a number, or the day or instant that the number counts, as the engine's language writes it."""
    if type_ is ColumnType.DATE:
        return f"{date(1970, 1, 1) + timedelta(days=counted):%Y.%m.%d}"
    if type_ not in _INSTANTS:
        return f"{counted}l" if type_ in (ColumnType.I64, ColumnType.U64) else str(counted)
    seconds, nanos = divmod(counted if type_ is ColumnType.DATETIME_NS else counted * 1000, 10**9)
    return f"{_EPOCH + timedelta(seconds=seconds):%Y.%m.%dT%H:%M:%S}.{nanos:09d}"


# values on their way out


def sent_for(schema: Schema, name: str) -> str:
    """Return what to select for a column: one expression, or two where nulls come beside the values."""
    there = _SYSTEM.get(name, name)
    type_ = _type(schema, name)
    if type_ in (ColumnType.STR, ColumnType.F32, ColumnType.F64):
        return there
    counted = f"long({there})" if type_ is not ColumnType.DATE else f"long(int({there}))"
    if name in _never_null(schema):
        return f"{counted} as {there}"
    return f"nullFill({counted}, 0l) as {there}, isNull({there}) as {there}_absent"


def decoded(schema: Schema, names: Sequence[str], seen: pd.DataFrame | None) -> pl.DataFrame:
    """Return the rows that `sent_for` asked for, in the types of the schema; none for None."""
    import polars as pl

    types = schema.polars(system=True)
    if seen is None or not len(seen):
        return pl.DataFrame(schema={name: types[name] for name in names})
    columns: list[pl.Series] = []
    for name in names:
        there, type_ = _SYSTEM.get(name, name), types[name]
        values = seen[there]
        if type_ == pl.String:
            # the engine has no other null for texts
            texts = [text if isinstance(text, str) and text else None for text in values.tolist()]
            columns.append(pl.Series(name, texts, pl.String))
            continue
        column = pl.Series(name, values.to_numpy())
        if type_.is_float():
            columns.append(column.cast(type_).fill_nan(None))
            continue
        if isinstance(type_, pl.Datetime):
            column = column.cast(pl.Datetime("ns")).dt.cast_time_unit(type_.time_unit).dt.replace_time_zone("UTC")
        elif type_ == pl.Date:
            column = column.cast(pl.Int32).cast(pl.Date)
        else:
            column = column.cast(type_)
        if name not in _never_null(schema):
            absent = pl.Series(seen[f"{there}_absent"].to_numpy(), dtype=pl.Boolean)
            column = pl.select(pl.when(~absent).then(column).alias(name)).to_series()
        columns.append(column)
    return pl.DataFrame(columns)


def _type(schema: Schema, name: str) -> ColumnType:
    return {SEGMENT_COLUMN: ColumnType.STR, INGESTED_COLUMN: ColumnType.DATETIME}.get(name) or schema[name].type


def _never_null(schema: Schema) -> list[str]:
    return [*evolution.required(schema), INGESTED_COLUMN]


def _listed(names: Sequence[str]) -> str:
    return "[" + ", ".join(f'"{name}"' for name in names) + "]"
