"""No store changes a value: whatever a frame has in it comes back bit for bit, or is refused with nothing changed."""

from __future__ import annotations

import os
from dataclasses import replace

import polars as pl
import pytest
from conftest import needs
from hostile_frames import Maker, Row, Table, frame_of, moment, plain, rows_of
from stored_frames import batch

from marketsync.errors import SchemaError
from marketsync.schema import Column, Schema
from storage.protocol import Filter, Mode, Store, Written

FRAMES = int(os.environ.get("MARKETSYNC_TEST_FRAMES", "20"))  # of each store, in the slow test


class Life:
    """The life of one table with hostile contents, beside the dictionary that it must equal."""

    def __init__(self, store: Store, dataset: str, seed: int):
        self.store, self.dataset, self.seed = store, dataset, seed
        able = store.capabilities
        self.makers = [Maker(seed, able, wild=True), Maker(seed, able), Maker(seed, able, far=False)]
        self.mild = self.makers[-1]
        self.chance = self.mild.chance
        if seed % 3:
            self.makers = self.makers[1:] if seed % 3 == 1 else [self.mild]
        self.seq = 0
        self.refused = self.kept = 0

    def run(self) -> None:
        schema = self.made()
        if schema is None:
            return
        self.table = Table(schema, self.store.capabilities)
        self.put(Mode.APPEND, lambda maker: maker.rows(schema, self.chance.choice((0, 1, 2, 9))))
        self.check()
        self.put(Mode.UPSERT, lambda maker: self.mixed(maker, schema))
        self.check()
        if self.store.capabilities.evolve:
            wider = self.evolved(schema)
            self.table.evolve(wider)
            self.check()
            if self.chance.random() < 0.5:  # a batch that was made before
                self.put(Mode.UPSERT, lambda maker: self.mixed(maker, schema), schema)
            self.put(Mode.UPSERT, lambda maker: self.mixed(maker, wider))
            self.check()
        if self.chance.random() < 0.3:
            self.store.maintain(self.dataset)
            self.check()
        self.replace()
        self.check()
        gone = self.mild.span(self.table)
        assert self.store.delete(self.dataset, gone) == self.table.delete(gone)
        self.check()
        self.read()

    def made(self) -> Schema | None:
        """Make the table; where the names are refused, with others, and None where its types are."""
        schema = self.drawn()
        try:
            self.store.ensure(self.dataset, schema)
        except SchemaError:
            assert self.store.marker(self.dataset) is None
            assert self.dataset not in self.store.datasets()
            plain = {name: f"c{number}" for number, name in enumerate(schema.names)}
            if len(set(plain)) < len(schema.columns):
                schema = Schema(schema.columns[:1], schema.names[:1])  # pyright: ignore
            schema = Schema(
                tuple(Column(plain[c.name], c.type, c.nullable) for c in schema.columns),
                tuple(plain[name] for name in schema.key),
                plain[schema.time] if schema.time else None,
                plain[schema.subject] if schema.subject else None,
                schema.period,
            )
            try:
                self.store.ensure(self.dataset, schema)
            except SchemaError:
                assert self.store.marker(self.dataset) is None
                return None
        assert self.store.schema(self.dataset) == schema
        return schema

    def drawn(self) -> Schema:
        """Draw a schema, with time and subject in its key where the store can have no other."""
        schema = self.mild.schema()
        if self.store.capabilities.any_key:
            return schema
        while schema.time is None:
            schema = self.mild.schema()
        named = [name for name in (schema.subject, schema.time) if name is not None]
        return replace(schema, key=tuple(dict.fromkeys([*schema.key, *named])))

    def evolved(self, schema: Schema) -> Schema:
        """Add columns; where their names are refused, with others."""
        marker, wider = self.store.marker(self.dataset), self.mild.wider(schema)
        try:
            assert self.store.ensure(self.dataset, wider) == marker
        except SchemaError:
            assert self.store.schema(self.dataset) == schema
            columns = [c if c.name in schema else replace(c, name=f"x{n}") for n, c in enumerate(wider.columns)]
            wider = replace(wider, columns=tuple(columns))
            assert self.store.ensure(self.dataset, wider) == marker
        return wider

    def mixed(self, maker: Maker, schema: Schema) -> list[Row]:
        """Rows that are new, rows that are there with other values, and rows that are there as they are."""
        new = maker.rows(schema, self.chance.choice((0, 1, 5)))
        there = {self.key(row, schema): row for row in self.last if set(schema.names) <= row.keys()}
        again = maker.changed(maker.chance.sample(list(there.values()), len(there) // 2), schema)
        found = {self.key(row, schema): row for row in (*there.values(), *again, *new)}
        return maker.chance.sample(list(found.values()), len(found))

    def key(self, row: Row, schema: Schema) -> tuple:
        return tuple(str(row[name]).replace("-0.0", "0.0") if row[name] == 0 else str(row[name]) for name in schema.key)

    def put(self, mode: Mode, draw, schema: Schema | None = None) -> None:
        """Write rows, wild ones first, then such as the engine says it keeps, then such as every engine keeps."""
        schema = schema or self.table.schema
        self.seq += 1
        segment = f"s{self.seq}"
        for maker in self.makers:
            rows = draw(maker)
            frame = frame_of(rows, schema, segment)
            try:
                written = self.store.write(batch(self.dataset, frame, self.seq, mode=mode, schema=schema))
            except SchemaError:
                assert maker is not self.mild, "what every engine keeps was refused"
                self.refused += 1
                assert self.store.committed(self.dataset, "lane") == self.seq - 1
                self.check()
                continue
            assert written == self.table.upsert(frame, schema)
            again = batch(self.dataset, frame, self.seq, mode=mode, schema=schema)
            assert self.store.write(again) == Written(already=True)
            self.last = rows
            self.kept += 1
            return

    def replace(self) -> None:
        schema = self.table.schema
        span = self.mild.span(self.table)
        inside = Table(schema, self.store.capabilities)
        drawn = [*self.mild.changed([r for r in self.last if set(schema.names) <= r.keys()], schema)]
        whole = frame_of(drawn, schema, "replaced")
        inside.rows = inside.taken(whole, schema)
        kept = inside.within(span)
        places = [place for place, key in enumerate(inside.taken(whole, schema)) if key in kept]
        frame = whole[places]
        assert self.store.replace(self.dataset, schema, frame, span) == self.table.replace(frame, span)

    def check(self, filter: Filter = Filter(system=True)) -> None:
        """The store has what the dictionary has."""
        found = self.store.scan(self.dataset, filter).collect()
        assert found.schema == pl.Schema(self.table.schema.polars(system=True))
        self.equal(found, self.table.within(filter), filter)
        assert self.store.count(self.dataset, filter) == len(self.table.within(filter)), filter

    def equal(self, found: pl.DataFrame, wanted: dict[tuple, Row], what: object) -> None:
        schema = self.table.schema
        there = Table(schema, self.store.capabilities).taken(found, schema)
        assert found.height == len(there), f"{found.height} rows, {len(there)} keys: {what}"
        for key in (*wanted, *there):
            assert there.get(key) == wanted.get(key), f"{key}: {what}"

    def read(self) -> None:
        """Every way to read gives the same."""
        table, schema = self.table, self.table.schema
        if schema.subject is not None:
            for subject in {row[schema.subject] for row in table.rows.values()} - {None}:
                self.check(Filter([str(subject)], system=True))
            self.check(Filter(["no such", "abc"], system=True))
        if schema.time is not None:
            type_ = schema[schema.time].type
            for at in sorted({row[schema.time] for row in table.rows.values()} - {None}):  # pyright: ignore
                bound = moment(at, type_)  # pyright: ignore
                self.check(Filter(since=bound, system=True))
                self.check(Filter(until=bound, system=True))
            newest = {subject: moment(at, type_) for subject, at in table.newest().items()}
            assert self.store.watermarks(self.dataset) == newest
        parts = [pl.DataFrame(pl.from_arrow(part)) for part in self.store.arrow(self.dataset, Filter(system=True))]
        if parts:
            arrow = pl.concat(parts).cast(schema.polars(system=True))  # pyright: ignore
            self.equal(arrow, table.rows, "arrow")
        for name in schema.names:
            one = self.store.scan(self.dataset, Filter(columns=[name])).collect()
            assert one.schema == pl.Schema({name: schema.polars()[name]})
            some = sorted(str(plain(row[name], self.store.capabilities)) for row in rows_of(one, schema))
            if name not in schema.key:
                assert some == sorted(str(row[name]) for row in table.rows.values()), name


def live(store: Store, numbers: range) -> list[Life]:
    needs(store, subjects=None)
    lives = []
    for seed in numbers:
        life = Life(store, f"hostile.d{seed}", seed)
        try:
            life.run()
        except BaseException as error:
            error.add_note(f"frame {seed}: {store.schema(life.dataset)}")
            raise
        lives.append(life)
    return lives


def test_a_few_hostile_frames_come_back_bit_for_bit_or_are_refused_whole(store: Store):
    live(store, range(2))


@pytest.mark.slow
def test_many_hostile_frames_come_back_bit_for_bit_or_are_refused_whole(store: Store):
    lives = live(store, range(2, 2 + FRAMES))
    assert sum(life.refused for life in lives) <= sum(life.kept for life in lives)
    assert sum(life.kept > 0 for life in lives) > len(lives) / 2
