"""Fingerprints as a pipeline of MongoDB: how the server writes the operations of `fingerprints.Dialect`, and the stages
that are made of them. What the numbers mean is told in `fingerprints.py`; nothing here talks to a server.

The server has no hash of a text that could be computed elsewhere, so texts are for whoever reads the documents.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from marketsync.schema import ColumnType, Period
from storage.documents import FINE, Document
from storage.fingerprints import Plan, finished, names

if TYPE_CHECKING:
    import polars as pl

_DAY_MILLIS = 86_400_000
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
Expression = Any


def possible(plan: Plan) -> bool:
    """Tell whether the server can compute it."""
    return all(column.type is not ColumnType.STR for column in plan.columns)


def pipeline(plan: Plan, query: Document) -> list[Document]:
    """Return the stages; `_id`, `rows`, `hash` and totals of their documents are for `frame`."""
    write = _Documents()
    fields = [f"v{number}" for number in range(len(plan.columns))]
    by: Document = {}
    if plan.schema.subject is not None:
        by["subject"] = f"${plan.schema.subject}"
    if plan.time is not None:
        by["segment"] = _segment(f"${plan.time.name}", plan.period)
    kept = dict.fromkeys([*by, *fields], 1)
    mixed = plan.mixed(write, [f"${field}" for field in fields])
    # a sum of 64 bits that does not fit becomes a double; a decimal has room
    totals = {field: {"$sum": {"$toDecimal": f"${field}"}} for field in fields}
    square = {"$mod": [{"$multiply": ["$x", "$x"]}, write.constant(plan.modulus)]}
    return [
        {"$match": query},
        {"$project": {"_id": 0, **by, **dict(zip(fields, plan.values(write), strict=True))}},
        {"$project": {**kept, "x": mixed}},
        {"$group": {"_id": {each: f"${each}" for each in by}, "rows": {"$sum": 1}, "hash": {"$sum": square}, **totals}},
    ]


def frame(plan: Plan, documents: Sequence[Document]) -> pl.DataFrame:
    """Return the fingerprints that the pipeline's documents are."""
    import polars as pl

    def whole(value: Any) -> int:
        return value if isinstance(value, int) else int(value.to_decimal())

    columns: dict[str, pl.Series] = {}
    for number, name in enumerate(names(plan)):
        if number < 2:
            type_ = pl.Int64() if number else pl.String()
            columns[name] = pl.Series([each["_id"].get(name) for each in documents], dtype=type_)
        else:
            field = name if number < 4 else f"v{number - 4}"
            columns[name] = pl.Series([whole(each[field]) for each in documents], dtype=pl.Int128())
    return finished(plan, pl.DataFrame(columns))


def _segment(at: str, period: Period) -> Expression:
    if period is Period.DAY:
        return {"$toLong": {"$floor": {"$divide": [_millis(at), _DAY_MILLIS]}}}
    if period is Period.YEAR:
        return {"$year": at}
    return {"$add": [{"$multiply": [{"$year": at}, 12]}, {"$month": at}, -1]}


def _millis(x: Expression) -> Expression:
    # of two dates the difference is whole everywhere; not every server converts one without a double in between
    return {"$subtract": [x, _EPOCH]}


class _Documents:
    """The operations as expressions of a pipeline. A field that is not there is null, and null in, null out."""

    def column(self, name: str, type_: ColumnType) -> Expression:
        from bson import Int64

        x = f"${name}"
        if type_ is ColumnType.BOOL:
            return {"$switch": {"branches": [_case(x, True, 1), _case(x, False, 0)], "default": None}}
        if type_ is ColumnType.DATE:
            return {"$toLong": {"$divide": [_millis(x), _DAY_MILLIS]}}
        if type_ in (ColumnType.DATETIME, ColumnType.DATETIME_NS):
            unit = 1_000 if type_ is ColumnType.DATETIME else 1  # nanoseconds
            fine = {"$toLong": {"$divide": [{"$ifNull": [x + FINE, 0]}, unit]}}
            return {"$add": [{"$multiply": [_millis(x), Int64(1_000_000 // unit)]}, fine]}
        return x

    def constant(self, number: int) -> Expression:
        from bson import Int64

        return Int64(number)

    def scaled(self, x: Expression, factor: float, add: int) -> Expression:
        number = {"$toLong": {"$floor": {"$add": [{"$multiply": [x, factor]}, 0.5]}}}
        return {"$add": [number, self.constant(add)]} if add else number

    def within(self, x: Expression, low: float, high: float) -> Expression:
        return {"$and": [{"$gte": [x, low]}, {"$lte": [x, high]}]}

    def above(self, x: Expression, bound: float) -> Expression:
        return {"$gt": [x, bound]}

    def below(self, x: Expression, bound: float) -> Expression:
        # null is less than any number here
        return {"$and": [{"$gt": [x, None]}, {"$lt": [x, bound]}]}

    def nan(self, x: Expression) -> Expression:
        return {"$eq": [x, math.nan]}

    def first(self, cases: Sequence[tuple[Expression, Expression]]) -> Expression:
        return {"$switch": {"branches": [{"case": case, "then": value} for case, value in cases], "default": None}}

    def residue(self, v: Expression, type_: ColumnType, modulus: int, null: int) -> Expression:
        rest = {"$mod": [v, self.constant(modulus)]}
        if type_ is ColumnType.U64:
            rest = {"$toLong": rest}  # of what is a decimal because it is beyond 64 bits with a sign
        return {"$ifNull": [rest, self.constant(null)]}

    def combined(self, terms: Sequence[tuple[int, Expression]], modulus: int) -> Expression:
        products = [{"$multiply": [self.constant(factor), term]} for factor, term in terms]
        return {"$mod": [{"$add": products}, self.constant(modulus)]}


def _case(x: Expression, value: bool, number: int) -> Document:
    return {"case": {"$eq": [x, value]}, "then": number}
