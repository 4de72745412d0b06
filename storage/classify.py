"""Which rows of a batch are new to a table, which differ from the row with their key, and which are equal to it.

Equality is exact and over every column but the system ones: NaN equals NaN, null equals null, 0.0 and -0.0 differ.
One join and one vectorised comparison; nothing here reads or writes a table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from marketsync.schema import ColumnType, Schema
from storage.protocol import Written

if TYPE_CHECKING:
    import polars as pl

_OLD = "__old_"
_ROW = "__row"
_SAME = "__same"
_HASH = "__hash"


@dataclass(frozen=True)
class Split:
    """The batch's rows by what a table must do with them: `put` those that it does not have, in the order of the batch,
    of which the `added` ones have a new key. `tags` are those of the rows that `changed` replaces."""

    put: pl.DataFrame
    added: pl.Series
    equal: int
    tags: list

    @cached_property
    def new(self) -> pl.DataFrame:
        return self.put.filter(self.added)

    @cached_property
    def changed(self) -> pl.DataFrame:
        return self.put.filter(~self.added)

    def written(self, deleted: int = 0) -> Written:
        """Return what a write did that put these rows in, and took so many others out."""
        added = int(self.added.sum())
        return Written(added, self.put.height - added, self.equal, deleted=deleted)


def split(
    batch: pl.DataFrame,
    existing: pl.DataFrame,
    schema: Schema,
    *,
    absent: Sequence[str] = (),
    tag: str | None = None,
    by: Sequence[str] = (),
) -> Split:
    """Classify `batch` (unique keys) against `existing`, which holds at least every row that has one of its keys.

    `absent` names columns that the batch cannot know: they are not compared, and a changed row keeps the old value.
    `tag` names a column of `existing` (say, the file a row is in) whose values for replaced rows come back as `tags`.
    `by` names columns of both that stand for the key. A key that `existing` holds more than once counts as changed, so
    that writing it heals the table.
    """
    import polars as pl

    key = list(by or schema.key)
    compared = [name for name in schema.names if name not in schema.key and name not in absent]
    pairs = _pairs(batch.select(key), existing.select(key), key)
    same = pl.all_horizontal(_equal(name, schema[name].type) for name in compared) if compared else pl.lit(True)
    pairs = pairs.with_columns(
        *(batch[name].gather(pairs[_ROW]) for name in compared),
        *(existing[name].gather(pairs[_OLD]).alias(_OLD + name) for name in compared),
    ).select(_ROW, _OLD, same.alias(_SAME))
    if pairs[_ROW].n_unique() < pairs.height:
        pairs = pairs.with_columns(pl.col(_SAME) & ~pl.col(_ROW).is_duplicated())
    tags = existing[tag].gather(pairs.filter(~pl.col(_SAME))[_OLD]).unique().to_list() if tag else []
    there = pl.repeat(None, batch.height, dtype=pl.UInt32, eager=True).scatter(pairs[_ROW], pairs[_OLD])
    put = batch.with_columns(existing[name].gather(there) for name in absent)
    added, equal = there.is_null(), int(pairs[_SAME].sum())
    if equal:
        different = pl.repeat(True, batch.height, eager=True).scatter(pairs.filter(_SAME)[_ROW], False)
        put, added = put.filter(different), added.filter(different)
    return Split(put, added, equal, tags)


def _pairs(now: pl.DataFrame, old: pl.DataFrame, key: list[str]) -> pl.DataFrame:
    """Return the numbers of the rows of both frames that have the same key, in the order of `now`."""
    import polars as pl

    if now.dtypes == old.dtypes:
        hashes = [pl.col(name).hash(number) for number, name in enumerate(key)]
        hashed = pl.reduce(lambda one, other: one ^ other, hashes).alias(_HASH)
        pairs = _joined(now.select(hashed), old.select(hashed), [_HASH])
        # hashes meet at half the cost of keys; only of keys that are not the same can some come together by chance
        if all(now[name].gather(pairs[_ROW]).equals(old[name].gather(pairs[_OLD])) for name in key):
            return pairs
    return _joined(now, old, key)


def _joined(now: pl.DataFrame, old: pl.DataFrame, on: list[str]) -> pl.DataFrame:
    return (
        now.with_row_index(_ROW)
        .join(old.with_row_index(_OLD), on=on, how="inner", maintain_order="left")
        .select(_ROW, _OLD)
    )


def _equal(name: str, type_: ColumnType) -> pl.Expr:
    import polars as pl

    now, old = pl.col(name), pl.col(_OLD + name)
    equal = now.eq_missing(old)
    if type_ in (ColumnType.F32, ColumnType.F64):
        # 0.0 and -0.0 compare equal; their reciprocals do not
        equal = equal & (now.ne_missing(pl.lit(0.0)) | (1.0 / now).eq_missing(1.0 / old))
    return equal
