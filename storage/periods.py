"""Partitions by time: the name of a period ('2001', '2001-03', '2001-03-05') and a frame cut into periods.

Names compare as text in the order of time. Which rows a `Filter` means is in `filters.py`.
"""

from __future__ import annotations

from datetime import date, datetime
from typing import TYPE_CHECKING

from marketsync.schema import ColumnType, Period, Schema

if TYPE_CHECKING:
    import polars as pl

_LENGTH = {Period.YEAR: 4, Period.MONTH: 7, Period.DAY: 10}


def name_of(instant: date | datetime, period: Period) -> str:
    """Return the name of the period that the instant is in."""
    return instant.isoformat()[: _LENGTH[period]]


def cut(frame: pl.DataFrame, schema: Schema) -> list[tuple[str | None, pl.DataFrame]]:
    """Return (period, its rows in the order they had) for each period of the frame; (None, frame) when not cut."""
    import polars as pl

    if schema.period is Period.NONE or schema.time is None:
        return [(None, frame)]
    if frame.is_empty():
        return []
    period = schema.period
    low, high = (name_of(instant, period) for instant in _ends(frame[schema.time]))
    if low == high:
        return [(low, frame)]
    time = pl.col(schema.time)
    if period is Period.YEAR:
        start = time.dt.year()
    elif period is Period.MONTH:
        start = time.dt.truncate("1mo")
    else:
        start = time if schema[schema.time].type is ColumnType.DATE else time.dt.date()
    parts = frame.with_columns(start.alias("__start")).partition_by(
        "__start", maintain_order=True, include_key=False, as_dict=True
    )
    named: list[tuple[str | None, pl.DataFrame]] = [
        (f"{at:04d}" if isinstance(at, int) else name_of(at, period), part) for (at,), part in parts.items()
    ]
    return sorted(named, key=lambda pair: pair[0] or "")


def _ends(times: pl.Series) -> tuple[date, date]:
    return times.min(), times.max()  # pyright: ignore[reportReturnType]
