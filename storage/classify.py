"""Which rows of a batch are new to a table, which differ from the row with their key, and which are equal to it.

Equality is exact and over every column but the system ones: NaN equals NaN, null equals null, 0.0 and -0.0 differ.
One join and one vectorised comparison; nothing here reads or writes a table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from marketsync.schema import ColumnType, Schema

if TYPE_CHECKING:
    import polars as pl

_OLD = "__old_"
_THERE = "__there"
_SAME = "__same"


@dataclass(frozen=True)
class Split:
    """The batch's rows by what a table must do with them; `tags` are those of the rows that `changed` replaces."""

    new: pl.DataFrame
    changed: pl.DataFrame
    equal: int
    tags: list


def split(
    batch: pl.DataFrame, existing: pl.DataFrame, schema: Schema, *, absent: Sequence[str] = (), tag: str | None = None
) -> Split:
    """Classify `batch` (unique keys) against `existing`, which holds at least every row that has one of its keys.

    `absent` names columns that the batch cannot know: they are not compared, and a changed row keeps the old value.
    `tag` names a column of `existing` (say, the file a row is in) whose values for replaced rows come back as `tags`.
    A key that `existing` holds more than once counts as changed, so that writing it heals the table.
    """
    import polars as pl

    key = list(schema.key)
    compared = [name for name in schema.names if name not in key and name not in absent]
    old = existing.select(
        *key,
        *(pl.col(name).alias(_OLD + name) for name in (*compared, *absent)),
        *([pl.col(tag).alias(_OLD)] if tag else []),
        pl.lit(True).alias(_THERE),
    )
    joined = batch.join(old, on=key, how="left", maintain_order="left")
    same = pl.all_horizontal(_equal(name, schema[name].type) for name in compared) if compared else pl.lit(True)
    joined = joined.with_columns(same.alias(_SAME), pl.col(_THERE).fill_null(False))
    if joined.height > batch.height:
        joined = joined.with_columns(pl.col(_SAME) & ~pl.struct(key).is_duplicated())
    changed = joined.filter(pl.col(_THERE) & ~pl.col(_SAME))
    tags = changed[_OLD].unique().to_list() if tag else []
    if joined.height > batch.height:
        changed = changed.unique(key, keep="first", maintain_order=True)
    changed = changed.with_columns(pl.col(_OLD + name).alias(name) for name in absent)
    new = joined.filter(~pl.col(_THERE))
    return Split(
        new.select(batch.columns), changed.select(batch.columns), batch.height - new.height - changed.height, tags
    )


def _equal(name: str, type_: ColumnType) -> pl.Expr:
    import polars as pl

    now, old = pl.col(name), pl.col(_OLD + name)
    equal = now.eq_missing(old)
    if type_ in (ColumnType.F32, ColumnType.F64):
        # 0.0 and -0.0 compare equal; their reciprocals do not
        equal = equal & (now.ne_missing(pl.lit(0.0)) | (1.0 / now).eq_missing(1.0 / old))
    return equal
