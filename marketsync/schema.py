"""What a dataset's rows look like once they are ours: columns, types, key, time and subject columns, partition period.

The types are the small set that every store of ours can be asked to keep; `Schema.polars()` is the only place where
they become polars types. How a provider's raw field becomes a column (names, formats) is in `definition.py`.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import polars as pl

SEGMENT_COLUMN = "_segment"
INGESTED_COLUMN = "_ingested_at"
SYSTEM_COLUMNS = (SEGMENT_COLUMN, INGESTED_COLUMN)


class ColumnType(StrEnum):
    """The type of a column in every store."""

    STR = "str"
    BOOL = "bool"
    I32 = "i32"
    I64 = "i64"
    U64 = "u64"
    F32 = "f32"
    F64 = "f64"
    DATE = "date"
    DATETIME = "datetime"  # UTC, microseconds
    DATETIME_NS = "datetime_ns"  # UTC, nanoseconds


class Period(StrEnum):
    """How a table is cut into partitions by its time column; `NONE` for tables without one."""

    DAY = "day"
    MONTH = "month"
    YEAR = "year"
    NONE = "none"


@dataclass(frozen=True)
class Column:
    """One column: its name in the store, its type, whether a null is allowed, and a sentence about it."""

    name: str
    type: ColumnType
    nullable: bool = True
    description: str = ""


@dataclass(frozen=True)
class Schema:
    """The shape of one dataset's rows.

    `key` names the columns that identify a row (never null); `time` the column that windows, partitions and watermarks
    go by (None for tables such as instrument lists); `subject` the column that holds the subject (usually the symbol).
    """

    columns: tuple[Column, ...]
    key: tuple[str, ...]
    time: str | None = None
    subject: str | None = None
    period: Period = Period.NONE
    _by_name: dict[str, Column] = field(init=False, repr=False, compare=False, hash=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._by_name.update({column.name: column for column in self.columns})

    def __getitem__(self, name: str) -> Column:
        return self._by_name[name]

    def __contains__(self, name: str) -> bool:
        return name in self._by_name

    @property
    def names(self) -> list[str]:
        """The column names, in order."""
        return [column.name for column in self.columns]

    def polars(self, *, system: bool = False) -> dict[str, pl.DataType]:
        """Return the polars type of each column, in order; with `system`, `_segment` and `_ingested_at` follow."""
        types = {column.name: polars_type(column.type) for column in self.columns}
        if system:
            types[SEGMENT_COLUMN] = polars_type(ColumnType.STR)
            types[INGESTED_COLUMN] = polars_type(ColumnType.DATETIME)
        return types

    def hash(self) -> str:
        """Return 16 hex digits that change when a column, its type, the key or the partitioning changes."""
        text = json.dumps(
            [
                [[c.name, c.type, c.nullable] for c in self.columns],
                list(self.key),
                self.time,
                self.subject,
                self.period,
            ]
        )
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def polars_type(type_: ColumnType) -> pl.DataType:
    """Return the polars type that a column of this type has in memory."""
    import polars as pl

    return {
        ColumnType.STR: pl.String(),
        ColumnType.BOOL: pl.Boolean(),
        ColumnType.I32: pl.Int32(),
        ColumnType.I64: pl.Int64(),
        ColumnType.U64: pl.UInt64(),
        ColumnType.F32: pl.Float32(),
        ColumnType.F64: pl.Float64(),
        ColumnType.DATE: pl.Date(),
        ColumnType.DATETIME: pl.Datetime("us", "UTC"),
        ColumnType.DATETIME_NS: pl.Datetime("ns", "UTC"),
    }[type_]
