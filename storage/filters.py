"""What a `Filter` means for one schema: bounds in the type of the time column, one polars expression, the columns.

Half-open: `since` is in, `until` is out. A date stands for its midnight in UTC.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, date, datetime, time, timedelta
from functools import reduce
from operator import and_
from typing import TYPE_CHECKING, TypeVar

from marketsync.errors import SchemaError
from marketsync.schema import SYSTEM_COLUMNS, ColumnType, Period, Schema
from storage.periods import name_of
from storage.protocol import Filter

if TYPE_CHECKING:
    import polars as pl

_Item = TypeVar("_Item")

# admission lets in the years between these
_FIRST_NANO = datetime(1678, 1, 1, tzinfo=UTC)
_LAST_NANO = datetime(2262, 1, 1, tzinfo=UTC)


def bounds(dataset: str, filter: Filter, schema: Schema) -> tuple[date | datetime | None, date | datetime | None]:
    """Return (since, until) as the time column has them: dates for a date column, else aware datetimes in UTC.

    Raises `SchemaError` for a naive datetime and for bounds on a table without a time column.
    """
    if filter.since is None and filter.until is None:
        return None, None
    if schema.time is None:
        raise SchemaError(f"{dataset} has no time column, so its rows cannot be filtered by since or until")
    fit = {ColumnType.DATE: _day, ColumnType.DATETIME_NS: _nano}.get(schema[schema.time].type, _instant)
    return (
        None if filter.since is None else fit(filter.since),
        None if filter.until is None else fit(filter.until),
    )


def groups(items: Sequence[_Item], size: int) -> Iterator[Sequence[_Item]]:
    """Yield the items, as many at once as an engine takes in one question."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def subjects(dataset: str, filter: Filter, schema: Schema) -> list[str] | None:
    """Return the subjects that rows are limited to; None for all. `*` means all where there is no subject column."""
    if filter.subjects is None:
        return None
    if schema.subject is None:
        if list(filter.subjects) == ["*"]:
            return None
        raise SchemaError(
            f"{dataset} has no subject column, so its rows cannot be filtered by subject; `subject:` in its definition "
            "names the column"
        )
    return sorted(set(filter.subjects))


def expression(dataset: str, filter: Filter, schema: Schema) -> pl.Expr | None:
    """Return the condition that a row of the filter meets; None when every row does."""
    import polars as pl

    conditions: list[pl.Expr] = []
    since, until = bounds(dataset, filter, schema)
    if since is not None:
        conditions.append(pl.col(schema.time or "") >= since)
    if until is not None:
        conditions.append(pl.col(schema.time or "") < until)
    wanted = subjects(dataset, filter, schema)
    if wanted is not None:
        conditions.append(pl.col(schema.subject or "").is_in(wanted))
    # joined by `&`: a horizontal `all` would hide the conditions from the statistics of the files
    return reduce(and_, conditions) if conditions else None


def periods(dataset: str, filter: Filter, schema: Schema) -> tuple[str | None, str | None]:
    """Return the names of the first and the last period that rows of the filter can be in; None for unbounded."""
    if schema.period is Period.NONE:
        return None, None
    since, until = bounds(dataset, filter, schema)
    return (
        None if since is None else name_of(since, schema.period),
        None if until is None else name_of(until, schema.period),
    )


def columns(dataset: str, filter: Filter, schema: Schema) -> list[str]:
    """Return the columns to give back, in order; raises `SchemaError` for one that the table does not have."""
    wanted = schema.names if filter.columns is None else list(filter.columns)
    unknown = [name for name in wanted if name not in schema]
    if unknown:
        raise SchemaError(f"{dataset} has no column {', '.join(unknown)}; it has {', '.join(schema.names)}")
    return [*wanted, *SYSTEM_COLUMNS] if filter.system else wanted


def _day(bound: date | datetime) -> date:
    # a date column's row stands for its midnight, so an instant within a day excludes that day from the left
    if not isinstance(bound, datetime):
        return bound
    moment = _instant(bound)
    if moment.time() == time.min:
        return moment.date()
    if moment.date() == date.max:
        raise _beyond(bound)
    return moment.date() + timedelta(days=1)


def _nano(bound: date | datetime) -> datetime:
    # no row can be outside of what 64 bits of nanoseconds reach, and a bound that is would overflow in a comparison
    return min(max(_instant(bound), _FIRST_NANO), _LAST_NANO)


def _instant(bound: date | datetime) -> datetime:
    if not isinstance(bound, datetime):
        return datetime.combine(bound, time.min, UTC)
    if bound.tzinfo is None:
        raise SchemaError(f"the bound {bound.isoformat()} has no time zone; give an aware datetime (UTC) or a date")
    try:
        return bound.astimezone(UTC)
    except OverflowError:
        raise _beyond(bound) from None


def _beyond(bound: datetime) -> SchemaError:
    return SchemaError(f"the bound {bound.isoformat()} is beyond the first or the last day there is; leave it out")


def refuse_outside(dataset: str, frame: pl.DataFrame, span: Filter, schema: Schema) -> None:
    """Raise `SchemaError` for rows that are to replace a span and are not all inside of it."""
    inside = expression(dataset, span, schema)
    if inside is not None and (outside := frame.filter(~inside).height):
        raise SchemaError(f"{outside} of {frame.height} rows to replace a span of {dataset} are outside of that span")
