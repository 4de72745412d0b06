"""What a copy proves between any two engines: one that is as it should be never raises an alarm, and a value that was
changed, a row that was lost and a row too many are found wherever they are. Rows and schemas are drawn at random, from
what both engines say they keep."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from contextlib import ExitStack, closing
from datetime import UTC, datetime
from typing import Any

import polars as pl
import pytest
from conftest import Place
from hostile_frames import Maker, frame_of
from stored_frames import BARS, bars, batch

from marketsync.errors import SchemaError
from marketsync.schema import Column, ColumnType, Period, Schema
from storage.admission import unkept_by
from storage.protocol import Capabilities, Filter, Store
from tasks.compare import Comparison, compare
from tasks.copy import Copied, End, copy

COPIES = int(os.environ.get("MARKETSYNC_TEST_COPIES", "5"))  # of each pair, in the slow test
T = ColumnType
EVERY_DAY = [("postgresql", "csv"), ("delta", "chdb")]
PAIRS = [
    *EVERY_DAY,
    ("parquet", "postgresql"),
    ("csv", "delta"),
    ("chdb", "excel"),
    ("postgresql", "clickhouse"),
    ("clickhouse", "mysql"),
    ("mysql", "mongodb"),
    ("mongodb", "dolphindb"),
    ("dolphindb", "delta"),
    ("mysql", "postgresql"),
]


def both(one: Capabilities, other: Capabilities) -> Capabilities:
    """Return what both of two engines keep."""
    able: dict[str, Any] = {}
    for name, value in vars(one).items():
        there = getattr(other, name)
        if isinstance(value, bool):
            able[name] = value and there
        elif name.startswith("longest"):
            able[name] = min((each for each in (value, there) if each is not None), default=None)
        else:
            able[name] = value if value is not None else there
    return Capabilities(**able)


class Pair:
    """Two stores, and a table of random rows that is in the first."""

    def __init__(self, source: Store, target: Store, dataset: str, seed: int):
        self.source, self.target, self.dataset = source, target, dataset
        able = both(source.capabilities, target.capabilities)
        self.chance = random.Random(seed)
        self.maker = Maker(seed, able, far=seed % 2 == 1)
        self.schema = self.made()
        try:
            self.fill(1)
        except SchemaError:  # times that one of both does not reach
            assert target.marker(dataset) is None
            source.delete(dataset, Filter())
            self.maker = Maker(seed, able, far=False)
            self.fill(2)

    def made(self) -> Schema:
        while True:
            drawn = self.maker.schema()
            named = {name: f"c{number}" for number, name in enumerate(drawn.names)}
            if len(named) < len(drawn.columns):
                continue
            schema = Schema(
                tuple(Column(named[c.name], c.type, c.nullable) for c in drawn.columns),
                tuple(named[name] for name in drawn.key),
                drawn.time and named[drawn.time],
                drawn.subject and named[drawn.subject],
                drawn.period,
            )
            try:
                unkept_by(self.target, self.dataset, schema)
                self.source.ensure(self.dataset, schema)
            except SchemaError:  # a key that one of both cannot have
                continue
            return schema

    def fill(self, seq: int) -> None:
        rows = self.maker.rows(self.schema, self.chance.choice((1, 9, 60)))
        self.source.write(batch(self.dataset, frame_of(rows, self.schema, "s1"), seq, schema=self.schema))
        (done,) = self.copied()
        assert (done.agree, done.problems, done.remarks, done.late) == (True, [], [], 0)
        assert done.inserted == done.rows == done.there

    def copied(self) -> list[Copied]:
        return copy(End(self.source), End(self.target), [self.dataset], Filter())

    def compared(self) -> Comparison:
        return compare(self.source, self.target, self.dataset, self.schema, Filter(), datetime.now(UTC))

    def put(self, rows: pl.DataFrame) -> None:
        """Make these the rows of the target."""
        self.target.replace(self.dataset, self.schema, rows, Filter())

    def tamper(self) -> None:
        """Change, lose and add a row of the target, one after the other, and see that each is found."""
        whole = self.target.scan(self.dataset, Filter(system=True)).collect()
        place = self.chance.randrange(whole.height)
        subject = "*" if self.schema.subject is None else whole[self.schema.subject][place]
        if values := [
            column for column in self.schema.columns if column.name not in (*self.schema.key, self.schema.subject)
        ]:
            column = self.chance.choice(values)
            changed = whole.with_columns(other(whole[column.name], place, column, self.schema))
            self.put(changed)
            (found,) = self.compared().differences.values()
            assert (found.subject, found.changed, found.missing, found.unread) == (subject, 1, 0, 0), column
            assert column.name in found.example
        self.put(pl.concat([whole[:place], whole[place + 1 :]]))
        seen = self.compared()
        (found,) = seen.differences.values()
        assert (found.subject, found.missing, found.changed, found.unread) == (subject, 1, 0, 0)
        (again,) = self.copied()
        assert (again.inserted, again.updated, again.agree, again.problems) == (1, 0, True, [])
        added = frame_of(self.maker.rows(self.schema, 1), self.schema, "more")
        if self.target.write(batch(self.dataset, added, schema=self.schema)).inserted:
            seen = self.compared()
            assert (seen.there, seen.besides, seen.differences) == (whole.height + 1, 1, {})
        else:  # it had the key of another one
            self.copied()
            assert not self.compared().differences


def other(values: pl.Series, place: int, column: Column, schema: Schema) -> pl.Series:
    """Return the column with another value at a place, or null there."""
    value = values[place]
    must = not column.nullable or (schema.period is not Period.NONE and column.name == schema.time)
    if value is None:
        counted = {T.STR: "x", T.BOOL: True, T.F32: 0.5, T.F64: 0.5}.get(column.type, 1_000)
    elif not must and place % 3 == 0:
        counted = None
    else:
        counted = changed(values.to_physical()[place], column.type)
    new = pl.Series([counted], dtype=values.to_physical().dtype).cast(values.dtype).alias(values.name)
    return pl.concat([values[:place], new, values[place + 1 :]])


def changed(value: Any, type_: ColumnType) -> Any:
    if type_ is T.STR:
        return "y" if value == "x" else "x"
    if type_ is T.BOOL:
        return not value
    if type_ in (T.F32, T.F64):
        return 0.5 if not abs(value) < 10 else value + 1
    step = 1_000 if type_ is T.DATETIME_NS else 1
    return value - step if value > 0 else value + step


def prove(place_of: Callable[[str], Place], dataset: str, engines: tuple[str, str], seeds: range) -> None:
    with ExitStack() as opened:
        source, target = (opened.enter_context(closing(place_of(each).open())) for each in engines)
        for seed in seeds:
            try:
                Pair(source, target, f"{dataset}_{seed}", seed).tamper()
            except BaseException as error:
                error.add_note(f"copy {seed}")
                raise


@pytest.mark.parametrize("engines", EVERY_DAY, ids="-".join)
def test_a_copy_agrees_and_whatever_is_changed_lost_or_added_is_found(place_of, dataset: str, engines: tuple[str, str]):
    prove(place_of, dataset, engines, range(2))


@pytest.mark.slow
@pytest.mark.parametrize("engines", PAIRS, ids="-".join)
def test_many_copies_agree_and_whatever_is_changed_lost_or_added_is_found(
    place_of, dataset: str, engines: tuple[str, str]
):
    prove(place_of, dataset, engines, range(2, 2 + COPIES))


@pytest.mark.slow
@pytest.mark.parametrize("engines", [("delta", "marketstore"), ("marketstore", "delta")], ids="-".join)
def test_bars_that_buckets_can_hold_agree_and_a_change_among_them_is_found(place_of, dataset, engines: tuple[str, str]):
    source, target = (place_of(each).open() for each in engines)
    rows = bars(("A", "B-C"), rows=900)
    rows = rows.with_columns(pl.when(pl.col("volume") % 7 > 0).then("volume").alias("volume"), -pl.col("close"))
    source.ensure(dataset, BARS)
    source.write(batch(dataset, rows))
    (done,) = copy(End(source), End(target), [dataset], Filter())
    assert (done.agree, done.inserted, done.problems) == (True, 1_800, [])
    target.write(batch(dataset, rows[1_000:1_001].with_columns(close=pl.lit(None, pl.Float64)), 2))
    (found,) = compare(source, target, dataset, BARS, Filter(), datetime.now(UTC)).differences.values()
    assert (found.subject, found.changed, found.first) == ("B-C", 1, rows["ts"][1_000])
    for store in (source, target):
        store.close()
