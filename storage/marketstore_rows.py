"""How a dataset's rows become MarketStore's: bars or ticks, at which timeframe, which values cannot be kept, and the
numpy columns of a bucket. Pure functions; nothing here asks a server.

A row's subject is its bucket's symbol and its time the `Epoch` (and `Nanoseconds`); every other column is one of the
bucket's. A bucket has no null: `_nulls` holds a bit for each column, by its place, that says that the value is none.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from marketsync.errors import CapabilityError, SchemaConflict
from marketsync.schema import INGESTED_COLUMN, Column, ColumnType, Schema
from storage.admission import Unkept
from storage.marketstore_rpc import EPOCH, NANOSECONDS, Columns

if TYPE_CHECKING:
    import numpy as np
    import polars as pl

Times = TypeVar("Times", "pl.Series", "pl.Expr")

TICK = "tick"
SECONDS = {
    "1Sec": 1,
    "10Sec": 10,
    "30Sec": 30,
    "1Min": 60,
    "5Min": 300,
    "15Min": 900,
    "30Min": 1800,
    "1H": 3600,
    "2H": 7200,
    "1D": 86400,
}  # the timeframes that can be read again; 4H, 1W and 7Min take rows and never give them back
TEXT_CHARACTERS = 16
LANE_COLUMN, SEQ_COLUMN = "_lane", "_seq"  # together the row's `_segment`
_NULLS = "_nulls"
_NULLS_BITS = 63
_SYSTEM = {LANE_COLUMN: "i8", SEQ_COLUMN: "i8", INGESTED_COLUMN: "i8"}
_LONGEST_NAME = 31  # bytes: the file's header cuts the rest off without a word
_MOST_COLUMNS = 1000
_EVERY = "_all"  # the symbol of rows without a subject
# of up to 64 characters (65 with a dot in front are too long for a key); polars and Python both have to read it
SYMBOL = r"\.?[A-Za-z0-9_^=+&@$#~!-](?:[A-Za-z0-9_.^=+&@$#~! -]{0,62}[A-Za-z0-9_.^=+&@$#~!-])?"
_LAST_STORED_NANOSECOND = 999_999_995  # from here on to the end of a second a tick comes back a second later
_LAST_SECOND = 9_214_646_400  # 2262-01-01: the engine counts nanoseconds in 64 bits

_TYPES = {
    ColumnType.STR: "U16",
    ColumnType.BOOL: "i4",
    ColumnType.I32: "i4",
    ColumnType.I64: "i8",
    ColumnType.U64: "u8",
    ColumnType.F32: "f4",
    ColumnType.F64: "f8",
    ColumnType.DATE: "i4",
    ColumnType.DATETIME: "i8",
    ColumnType.DATETIME_NS: "i8",
}
_PER_SECOND = {ColumnType.DATETIME: 1_000_000, ColumnType.DATETIME_NS: 1_000_000_000}


@dataclass(frozen=True)
class Layout:
    """What the buckets of a dataset look like. It follows from the schema that the table was made with, for ever."""

    schema: Schema
    timeframe: str
    ticks: bool

    @cached_property
    def values(self) -> tuple[Column, ...]:
        """The columns beside time and subject."""
        return tuple(c for c in self.schema.columns if c.name not in (self.schema.time, self.schema.subject))

    @cached_property
    def types(self) -> dict[str, str]:
        """The bucket's columns and their types, in order."""
        masks = {_mask(place): "i8" for place in range(0, len(self.values), _NULLS_BITS)}
        return {EPOCH: "i8", **{c.name: _TYPES[c.type] for c in self.values}, **masks, **_SYSTEM}

    @property
    def seconds(self) -> int:
        return SECONDS[self.timeframe]

    @property
    def width(self) -> int:
        """The bytes of a row."""
        return sum(4 * TEXT_CHARACTERS if each == "U16" else int(each[1]) for each in self.types.values())

    def symbol(self, subject: str) -> str:
        return _EVERY if self.schema.subject is None else subject

    def needed(self, names: Sequence[str]) -> list[str]:
        """Return the bucket's columns from which the schema's (and the system's) columns `names` are made."""
        places = [place for place, column in enumerate(self.values) if column.name in names]
        wanted = {self.values[place].name for place in places} | {_mask(place) for place in places}
        wanted |= set(_SYSTEM) if any(name not in self.schema for name in names) else {SEQ_COLUMN}
        return [*(name for name in self.types if name in wanted), *([NANOSECONDS] if self.ticks else [])]


def layout(dataset: str, schema: Schema, timeframe: str | None) -> Layout:
    """Return the layout of a table to be made; `timeframe` (None: by the type of the time) is the URL's.

    Rows that subject and time identify are bars, unless the time is in nanoseconds; other rows are ticks. Raises
    `SchemaConflict` for what no bucket can be.
    """

    def refuse(why: str) -> None:
        raise SchemaConflict(f"{dataset} cannot be kept in MarketStore: {why}")

    if schema.time is None or schema.time not in schema.key:
        refuse("a bucket's rows are found by their time, and the time is not in the key; use another store for it")
    time = schema[schema.time or ""].type
    rest = [name for name in schema.key if name not in (schema.time, schema.subject)]
    if schema.subject is not None and schema.subject not in schema.key:
        refuse(f"its subject {schema.subject!r} names the bucket and is not in the key; add it to the key")
    ticks = timeframe == TICK or bool(rest) or time is ColumnType.DATETIME_NS
    reserved = {name.lower() for name in (EPOCH, NANOSECONDS, LANE_COLUMN, SEQ_COLUMN)}
    for name in schema.names:
        if name.lower() in reserved or name.lower().startswith(_NULLS):
            refuse(f"the name {name!r} is that of a column of every bucket; rename it in the definition (as: ...)")
        if len(name.encode()) > _LONGEST_NAME:
            refuse(
                f"the name {name!r} is longer than {_LONGEST_NAME} bytes, to which the engine would cut it; rename "
                "it in the definition (as: ...)"
            )
    if len(schema.columns) > _MOST_COLUMNS:
        refuse(f"it has more than {_MOST_COLUMNS} columns")
    if ticks:
        return Layout(schema, "1Sec", True)
    chosen = "1D" if time is ColumnType.DATE and SECONDS.get(timeframe or "", 0) < SECONDS["1H"] else timeframe
    return Layout(schema, chosen or "1Min", False)


def refuse_zone(dataset: str, shape: Layout, timezone: str) -> None:
    """Raise `CapabilityError` when a server that cuts its buckets in this time zone would move the rows."""
    if timezone.upper() in ("UTC", "ETC/UTC", ""):
        return
    whose = f"the MarketStore server works in the time zone {timezone!r}, in which"
    remedy = "set `timezone: UTC` in its mkts.yml before it has rows"
    if shape.ticks or shape.timeframe == "1D":
        other = "" if shape.ticks else ", or keep the dataset at ?timeframe=1H"
        raise CapabilityError(f"{dataset}: {whose} {shape.timeframe} buckets begin at other instants; {remedy}{other}")
    try:
        zone = ZoneInfo(timezone)
    except (ZoneInfoNotFoundError, ValueError) as error:
        raise CapabilityError(f"{dataset}: {whose} nobody here knows when buckets begin; {remedy}") from error
    for year in range(1970, 2038):
        offset = datetime(year, 1, 1, tzinfo=zone).utcoffset()
        if offset is None or offset.total_seconds() % max(shape.seconds, SECONDS["1H"]):
            raise CapabilityError(f"{dataset}: {whose} {shape.timeframe} buckets begin at other instants; {remedy}")


def unkept(shape: Layout) -> list[Unkept]:
    """Return the kinds of times that the engine would lose, move or cut."""
    import polars as pl

    time = shape.schema.time or ""
    seconds, nanos = _instants(pl.col(time), shape)
    other = "use another store for these rows"
    kinds = [Unkept(time, seconds >= _LAST_SECOND, "after 2261", other)]
    if shape.ticks:
        late = "in the last 5 ns of a second, so they would come back a second later"
        kinds.append(Unkept(time, nanos >= _LAST_STORED_NANOSECOND, late, other))
    else:
        moved = f"not at the beginning of a bucket of {shape.timeframe}, to which they would be moved"
        remedy = "make the table anew in a store whose URL has a shorter ?timeframe=, or ?timeframe=tick"
        kinds.append(Unkept(time, (seconds % shape.seconds != 0) | (nanos != 0), moved, remedy))
    if shape.timeframe == "1D":
        day = pl.col(time).cast(pl.Date)
        first = (day.dt.month() == 1) & (day.dt.day() == 1)
        remedy = "make the table anew in a store whose URL has ?timeframe=1H"
        kinds.append(Unkept(time, first, "a daily bar on 1 January, which the engine loses", remedy))
    return kinds


def encode(frame: pl.DataFrame, shape: Layout, lanes: Mapping[str, tuple[int, int]]) -> Columns:
    """Return the numpy columns of rows of one or more buckets; `lanes` tells lane and seq of each `_segment`."""
    import numpy as np
    import polars as pl

    seconds, nanos = _instants(frame[shape.schema.time or ""], shape)
    columns: Columns = {EPOCH: seconds.to_numpy().astype("<i8")}
    masks = {name: np.zeros(frame.height, "<i8") for name in shape.types if name.startswith(_NULLS)}
    for place, column in enumerate(shape.values):
        values = frame[column.name]
        none = values.is_null().to_numpy()
        masks[_mask(place)] |= none.astype("<i8") << (place % _NULLS_BITS)
        columns[column.name] = _array(values, column.type)
    columns |= masks
    for name, part in ((LANE_COLUMN, 0), (SEQ_COLUMN, 1)):
        old = list(lanes)
        new = [lanes[segment][part] for segment in old]
        ids = frame["_segment"].replace_strict(old, new, return_dtype=pl.Int64)
        columns[name] = ids.to_numpy().astype("<i8")
    columns[INGESTED_COLUMN] = frame[INGESTED_COLUMN].to_physical().to_numpy().astype("<i8")
    if shape.ticks:
        columns[NANOSECONDS] = nanos.to_numpy().astype("<i4")
    return columns


def decode(
    subject: str, columns: Columns, shape: Layout, names: Sequence[str], segments: Mapping[tuple[int, int], str]
) -> pl.DataFrame:
    """Return the rows of one bucket with the columns `names`, in the schema's types."""
    import polars as pl

    types = shape.schema.polars(system=True)
    height = len(columns[EPOCH])
    made: dict[str, pl.Series] = {}
    places = {column.name: place for place, column in enumerate(shape.values)}
    for name in names:
        if name == shape.schema.subject:
            made[name] = pl.repeat(subject, height, dtype=pl.String(), eager=True)
        elif name == shape.schema.time:
            made[name] = _times(columns, shape)
        elif name in places:
            place = places[name]
            none = (columns[_mask(place)] >> (place % _NULLS_BITS)) & 1
            values = _series(columns[name], shape.schema[name].type, types[name])
            made[name] = values.set(pl.Series(none.astype(bool)), None) if none.any() else values
        elif name == INGESTED_COLUMN:
            made[name] = pl.Series(columns[name]).cast(types[name])
        else:
            pairs = zip(columns[LANE_COLUMN].tolist(), columns[SEQ_COLUMN].tolist(), strict=True)
            made[name] = pl.Series([segments[pair] for pair in pairs], dtype=pl.String())
    return pl.DataFrame(made, schema={name: types[name] for name in names})


def is_symbol(text: str) -> bool:
    """Return whether the text can name a folder of the server's, and is nothing else in a question to it."""
    return re.fullmatch(SYMBOL, text) is not None


def _mask(place: int) -> str:
    return f"{_NULLS}{place // _NULLS_BITS or ''}"


def _instants(times: Times, shape: Layout) -> tuple[Times, Times]:
    """Return the seconds since 1970 and the nanoseconds beside them of each time."""
    import polars as pl

    type_ = shape.schema[shape.schema.time or ""].type
    counted = times.to_physical().cast(pl.Int64)
    if type_ is ColumnType.DATE:
        return counted * 86400, counted * 0
    unit = _PER_SECOND[type_]
    seconds = counted // unit
    return seconds, (counted - seconds * unit) * (1_000_000_000 // unit)


def _times(columns: Columns, shape: Layout) -> pl.Series:
    import polars as pl

    schema = shape.schema
    type_ = schema[schema.time or ""].type
    target = schema.polars()[schema.time or ""]
    seconds = columns[EPOCH].astype("<i8")
    if type_ is ColumnType.DATE:
        return pl.Series((seconds // 86400).astype("<i4")).cast(target)
    unit = _PER_SECOND[type_]
    counted = seconds * unit
    if shape.ticks:
        # the engine keeps parts of 0.23 ns: what is a whole microsecond comes back within a nanosecond of it
        step = 1_000_000_000 // unit
        counted = counted + (columns[NANOSECONDS].astype("<i8") + step // 2) // step
    return pl.Series(counted).cast(target)


def _array(values: pl.Series, type_: ColumnType) -> np.ndarray[Any, Any]:
    import numpy as np
    import polars as pl

    if type_ is ColumnType.STR:
        return np.array(values.fill_null("").to_list(), f"<U{TEXT_CHARACTERS}")
    if type_ is ColumnType.BOOL:
        values = values.cast(pl.Int32)
    return values.to_physical().fill_null(0).to_numpy().astype(f"<{_TYPES[type_]}")


def _series(values: np.ndarray[Any, Any], type_: ColumnType, target: pl.DataType) -> pl.Series:
    import polars as pl

    if type_ is ColumnType.STR:
        return pl.Series(values.tolist(), dtype=pl.String())
    return pl.Series(values != 0) if type_ is ColumnType.BOOL else pl.Series(values).cast(target)
