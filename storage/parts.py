"""Tables made of Parquet files (parts): which parts can hold a row, and which a change adds and removes.

What `delta.py` and `parquet.py` have in common; they differ in where the list of parts is kept and how a change of it
becomes durable. An upsert reads only parts whose period and statistics meet the batch and rewrites only those in which
a row changed, so that its cost follows the batch and not the table. Nothing here writes.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import MAXYEAR, date, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from marketsync.schema import Schema
from storage import classify, filters, lazyframes
from storage.periods import cut
from storage.protocol import Filter, Written

if TYPE_CHECKING:
    import polars as pl

# A part holds at most this many rows after a rewrite, which bounds what one changed row can cost.
PART_ROWS = 262_144
_ROW_GROUP_ROWS = 32_768
_MEMORY_ROWS = 4 * PART_ROWS  # so many rows at most are in memory at once while parts are rewritten
# Automatic merging: of a period's parts, those with less than 32, 1,024 and 32,768 rows are three classes; 32 parts of
# one class become one part of the next. A row is rewritten at most three times, whatever the size of its batches.
CLASS_PARTS = 32
_CLASS_ROWS = (32, 1_024, 32_768)
# Behind one write at most so many rows are merged, or 8 times the rows it brought; opening a part counts for 512 rows.
_MERGE_ROWS = 65_536
_MERGE_TIMES = 8
_OPENING_ROWS = 512
LOOK_EVERY_COMMITS = 8

_PART = "__part"


@dataclass(frozen=True)
class Part:
    """One data file; bounds are None where they are not known. `path` is relative to the table's folder, URL-quoted."""

    path: str
    size: int
    rows: int | None
    period: str | None
    since: date | datetime | None
    last: date | datetime | None
    first_subject: str | None
    last_subject: str | None


@dataclass(frozen=True)
class Change:
    """What one commit does: rows it adds by period (made one period at a time, once), parts it removes."""

    add: Iterable[tuple[str | None, pl.DataFrame]] = ()
    remove: Sequence[Part] = ()
    moves_rows: bool = True  # False for merging, which changes no row

    def pieces(self) -> Iterator[tuple[str | None, pl.DataFrame]]:
        """Yield the rows to add in pieces that become one part each."""
        for period, rows in self.add:
            for piece in rows.iter_slices(PART_ROWS):
                if piece.height:
                    yield period, piece


@dataclass(frozen=True)
class Parts:
    """The parts of one table at one moment; `types` are the columns' types inside the files."""

    dataset: str
    folder: Path
    schema: Schema
    types: Mapping[str, pl.DataType]
    parts: Sequence[Part]

    # what a write does to them

    def append(self, frame: pl.DataFrame) -> tuple[Change, Written]:
        """Return the change that adds the rows without a look at what is there."""
        return Change(cut(frame, self.schema)), Written(inserted=frame.height)

    def upsert(self, frame: pl.DataFrame, absent: Sequence[str]) -> tuple[Change, Written]:
        """Return what puts the batch in: nothing for equal rows, new parts, or parts with changed rows rewritten."""
        split = classify.split(frame, self._with_keys(frame), self.schema, absent=absent, tag=_PART)
        written = split.written()
        return self._rewritten(split.new, split.changed, set(split.tags), split.changed), written

    def replace(self, frame: pl.DataFrame, absent: Sequence[str], span: Filter) -> tuple[Change | None, Written]:
        """Return what makes the rows of the span those of the frame; None when they are.

        Raises `SchemaError` for rows of the frame outside of the span.
        """
        import polars as pl

        filters.refuse_outside(self.dataset, frame, span, self.schema)
        # a row with a key of the frame counts as well where it is outside of the span: a key exists once
        split = classify.split(frame, self._with_keys(frame), self.schema, absent=absent, tag=_PART)
        key = list(self.schema.key)
        gone = self._collected(self._found(span).select(*key, _PART)).join(frame, on=key, how="anti")
        written = split.written(deleted=gone.height)
        if not (split.put.height or gone.height):
            return None, written
        out = pl.concat([split.changed.select(key), gone.select(key)])
        return self._rewritten(split.new, split.changed, {*split.tags, *gone[_PART].unique()}, out), written

    def delete(self, filter: Filter) -> tuple[Change | None, Written]:
        """Return what deletes the rows of the filter; None when there is none."""
        gone = self._collected(self._found(filter).select(*self.schema.key, _PART))
        if gone.is_empty():
            return None, Written()
        none = self.read([]).collect()
        return self._rewritten(none, none, set(gone[_PART].unique()), gone), Written(deleted=gone.height)

    def merge_gathered(self, rows: int) -> Change | None:
        """Return what merges small parts after a write of `rows` rows (see `CLASS_PARTS`); None for too few of them."""
        budget = max(_MERGE_ROWS, _MERGE_TIMES * rows)
        groups: list[list[Part]] = []
        for parts in _by_period(self.parts).values():
            for low, high in pairwise((0, *_CLASS_ROWS)):
                small = [part for part in parts if part.rows is not None and low <= part.rows < high]
                cost = sum((part.rows or 0) + _OPENING_ROWS for part in small)
                if len(small) >= CLASS_PARTS and cost <= budget:
                    budget -= cost
                    groups.append(small)
        return self._merged(groups)

    def merge_all(self) -> Change | None:
        """Return what leaves each period with as few parts as it can have; None when it has."""
        small = [part for part in self.parts if (part.rows or 0) < PART_ROWS // 2]
        groups = [group for parts in _by_period(small).values() for group in _bounded(parts)]
        return self._merged([group for group in groups if len(group) > 1])

    # reading

    def scan(self, filter: Filter) -> pl.LazyFrame:
        """Return the rows of the filter with the schema's types."""
        import polars as pl

        names = filters.columns(self.dataset, filter, self.schema)
        types = self.schema.polars(system=True)
        return self._found(filter, tag=False).select(
            pl.col(name) if types[name] == self.types[name] else pl.col(name).cast(types[name]) for name in names
        )

    def count(self, filter: Filter) -> int:
        """Return the number of rows; without a condition none is read."""
        if filter.subjects is None and filter.since is None and filter.until is None:
            rows = [part.rows for part in self.parts]
            if None not in rows:
                return sum(row for row in rows if row is not None)
        with self.reading():
            return lazyframes.count(self._found(filter, tag=False))

    def read(self, parts: Sequence[Part], *, tag: bool = False) -> pl.LazyFrame:
        """Return all rows of the parts as the files have them; `tag` adds a column with each row's file."""
        import polars as pl

        if not parts:
            return pl.LazyFrame(schema={**self.types, _PART: pl.String()} if tag else self.types)
        return pl.scan_parquet(
            [self._there(part) for part in parts],
            schema=dict(self.types),
            missing_columns="insert",
            extra_columns="ignore",
            hive_partitioning=False,
            glob=False,
            include_file_paths=_PART if tag else None,
        )

    def _path(self, part: Part) -> Path:
        return self.folder / unquote(part.path)

    def _there(self, part: Part) -> Path:
        """Return the part's path; raises `StoreDamaged` when the file is gone or has not the size it was written with,
        which whoever collects the rows would be told in words that help nobody."""
        path = self._path(part)
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            raise lazyframes.damaged(f"the table of {self.dataset}", self.folder, f"{path} is missing") from None
        if size != part.size:
            why = f"{path} has {size:,} bytes and was written with {part.size:,}"
            raise lazyframes.damaged(f"the table of {self.dataset}", self.folder, why)
        return path

    def reading(self) -> AbstractContextManager[None]:
        """Return what turns the engine's words about a file that cannot be read into a `StoreDamaged`."""
        return lazyframes.reading(f"the table of {self.dataset}", self.folder)

    def _collected(self, rows: pl.LazyFrame) -> pl.DataFrame:
        with self.reading():
            return rows.collect()

    def _found(self, filter: Filter, *, tag: bool = True) -> pl.LazyFrame:
        rows = self.read(self._within(filter), tag=tag)
        condition = filters.expression(self.dataset, filter, self.schema)
        return rows if condition is None else rows.filter(condition)

    def _within(self, filter: Filter) -> list[Part]:
        """Return the parts that can hold a row of the filter, by period and statistics."""
        since, until = filters.bounds(self.dataset, filter, self.schema)
        first, last = filters.periods(self.dataset, filter, self.schema)
        subjects = filters.subjects(self.dataset, filter, self.schema)
        if subjects == []:
            return []
        low, high = (None, None) if subjects is None else (subjects[0], subjects[-1])
        return [
            part
            for part in self.parts
            if (first is None or part.period is None or part.period >= first)
            and (last is None or part.period is None or part.period <= last)
            and _meet(since, until, part.since, part.last)
            and _meet(low, high, part.first_subject, part.last_subject)
        ]

    def _with_keys(self, frame: pl.DataFrame) -> pl.DataFrame:
        """Return the tagged rows that have a key of the frame; only parts and row groups that can have one are read."""
        import polars as pl

        schema, parts = self.schema, self.parts
        if frame.is_empty():
            return self.read([], tag=True).collect()
        conditions: list[pl.Expr] = []
        if schema.time is not None and schema.time in schema.key:
            periods = {period for period, _ in cut(frame.select(schema.time), schema)}
            low, high = _ends(frame, schema.time)
            parts = [part for part in parts if part.period in periods and _meet(low, high, part.since, part.last)]
            conditions += [pl.col(schema.time) >= low, pl.col(schema.time) <= high]
        if schema.subject is not None and schema.subject in schema.key:
            names = frame[schema.subject].unique().sort()
            low, high = names[0], names[-1]
            parts = [part for part in parts if _meet(low, high, part.first_subject, part.last_subject)]
            conditions += [pl.col(schema.subject) >= low, pl.col(schema.subject) <= high]
            conditions.append(pl.col(schema.subject).is_in(names.implode()))
        rows = self.read(parts, tag=True)
        if conditions:
            rows = rows.filter(*conditions)
        return self._collected(rows.join(frame.lazy().select(schema.key), on=list(schema.key), how="semi"))

    def _rewritten(self, new: pl.DataFrame, changed: pl.DataFrame, touched: set[str], gone: pl.DataFrame) -> Change:
        """Return the change that takes rows with a key in `gone` out of the `touched` files and puts the others in."""
        import polars as pl

        put = dict(cut(pl.concat([new, changed]), self.schema))
        removed = [part for part in self.parts if str(self._path(part)) in touched]
        key = list(self.schema.key)
        keys = gone.lazy().select(key)

        def rows() -> Iterator[tuple[str | None, pl.DataFrame]]:
            kept = _by_period(removed)
            for period in dict.fromkeys((*put, *kept)):
                frames = [put[period]] if period in put else []
                for parts in _bounded(kept.get(period, [])):
                    frames.append(self._collected(self.read(parts).join(keys, on=key, how="anti")))
                    yield period, self._sorted(pl.concat(frames))
                    frames = []
                if frames:
                    yield period, frames[0]

        return Change(rows(), removed)

    def _merged(self, groups: list[list[Part]]) -> Change | None:
        if not groups:
            return None
        rows = ((parts[0].period, self._sorted(self._collected(self.read(parts)))) for parts in groups)
        return Change(rows, [part for parts in groups for part in parts], moves_rows=False)

    def _sorted(self, rows: pl.DataFrame) -> pl.DataFrame:
        """Return the rows by subject, time and key: neighbours compress well, and statistics skip most row groups."""
        order = [name for name in (self.schema.subject, self.schema.time, *self.schema.key) if name is not None]
        return rows.sort(list(dict.fromkeys(order)))


def encode(rows: pl.DataFrame) -> memoryview:
    """Return the rows as one Parquet file, ZSTD level 1."""
    # through memory: cheaper than files opened by polars when a batch falls into many small ones
    buffer = io.BytesIO()
    rows.write_parquet(buffer, compression="zstd", compression_level=1, row_group_size=_ROW_GROUP_ROWS)
    return buffer.getbuffer()


def describe(path: str, size: int, rows: pl.DataFrame, period: str | None, schema: Schema) -> Part:
    """Return what is known of a file with these rows."""
    return Part(path, size, rows.height, period, *_ends(rows, schema.time), *_ends(rows, schema.subject))


def _ends(rows: pl.DataFrame, name: str | None) -> tuple[Any, Any]:
    """Return the least and the greatest value; Python cuts nanoseconds to microseconds, which `_meet` allows for."""
    return (None, None) if name is None else (rows[name].min(), rows[name].max())


def _by_period(parts: Iterable[Part]) -> dict[str | None, list[Part]]:
    grouped: dict[str | None, list[Part]] = {}
    for part in parts:
        grouped.setdefault(part.period, []).append(part)
    return grouped


def _bounded(parts: Iterable[Part]) -> Iterator[list[Part]]:
    """Yield the parts in groups of at most `_MEMORY_ROWS` rows, or of one part."""
    group: list[Part] = []
    size = 0
    for part in parts:
        rows = part.rows or PART_ROWS
        if group and size + rows > _MEMORY_ROWS:
            yield group
            group, size = [], 0
        group.append(part)
        size += rows
    if group:
        yield group


def _meet(low: Any, high: Any, first: Any, last: Any) -> bool:
    """Tell whether [low, high] can meet [first, last]; None is an end that is not known."""
    if isinstance(last, datetime) and last.year < MAXYEAR:
        last += timedelta(milliseconds=1)  # nanoseconds are cut, and other writers may cut to milliseconds
    return (low is None or last is None or low <= last) and (high is None or first is None or first <= high)
