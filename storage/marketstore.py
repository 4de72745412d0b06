"""MarketStore buckets: `marketstore://host:5993/`, written and read over its RPC (`marketstore_rpc.py`).

A dataset is an attribute group of its name, a subject a symbol: `AAPL/1D/alpaca.daily_bars`. Rows that subject and time
identify are bars at one timeframe (1D for dates, else 1Min or the URL's `?timeframe=`); other rows, and times in
nanoseconds, are ticks at 1Sec, where they keep their nanosecond. What the engine would lose, move or cut is refused
before anything is sent (`marketstore_rows.py`). Marker, schema, lanes and the hours that have rows are in three buckets
of ours (`marketstore_notes.py`).

There are no transactions: hours are noted, then rows go in and are read back, then the lane. Bars that are sent again
overwrite themselves. Ticks would be appended once more: so what is there is read first, and only what is missing is
sent. The server removes no rows, only whole buckets: with `?rewrite=true` a bucket from which rows
have to go is copied aside, checked, removed and written again; without it that is refused.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import replace as changed
from datetime import UTC, date, datetime
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, unquote, urlsplit

from marketsync.errors import CapabilityError, ConfigurationError, SchemaConflict, StoreError
from marketsync.schema import SEGMENT_COLUMN, Schema
from storage import admission, classify, evolution, filters, fingerprints, lazyframes, location
from storage import marketstore_rows as rows_of
from storage.marketstore_notes import GROUP, LOG_TIMEFRAME, Notes
from storage.marketstore_rows import LANE_COLUMN, SECONDS, SEQ_COLUMN, TICK, Layout
from storage.marketstore_rpc import EPOCH, NANOSECONDS, Client, Columns, Range, Refused
from storage.protocol import Batch, Capabilities, Filter, Mode, TableInfo, Writers, Written

if TYPE_CHECKING:
    import polars as pl
    import pyarrow as pa

CAPABILITIES = Capabilities(
    atomic=False,
    transactions=False,
    nanoseconds=True,
    nan=True,
    unsigned_64=True,
    nul=False,
    evolve=False,
    writers=Writers.MANY_PROCESSES,
    longest_key=64,
    longest_text=rows_of.TEXT_CHARACTERS,
    subjects=rows_of.SYMBOL,
    any_key=False,
    earliest=datetime(1970, 1, 1, 0, 0, 1, tzinfo=UTC),
    new_year=False,
    why="atomic, transactions: the server has none; the lane moves after its rows, and what was cut short is put in "
    "again: bars overwrite, ticks are read back first. nul: its text ends at a NUL character. evolve: a bucket's "
    "columns are fixed; give the new shape a dataset name of its own. longest_text: text is 16 characters wide. "
    "longest_key, subjects: a symbol is a folder's name. any_key: a row without a time has no bucket. earliest, "
    "new_year: rows before 1970, and daily bars of 1 January, would be lost; ?timeframe=1H keeps the latter.",
)

_PORT = 5993
_ROWS_AT_ONCE = 65_536
_KEYS_AT_ONCE = 64
_TICK_KEYS_AT_ONCE = 8
_MERGED_BUCKETS = 10_000  # empty ones between two hours with rows: to read over them is cheaper than to ask twice
_READ_ROWS = 262_144
_TICK_SECONDS = (60, 86_400)  # that are asked for at once, at least and at most
_FIRST_SECOND, _LAST_SECOND = 1, 9_214_646_399
_LAYOUT = "timeframe"
_REWRITE = "rewrite: "


@dataclass(frozen=True)
class _Table:
    """A dataset that is here."""

    dataset: str
    group: str
    marker: str
    schema: Schema
    layout: Layout
    notes: Notes

    def key(self, symbol: str) -> str:
        return f"{symbol}/{self.layout.timeframe}/{self.group}"


class MarketStore:
    """The buckets of one server. Threads write one after the other; other processes may write beside them."""

    capabilities = CAPABILITIES

    def __init__(self, url: str, name: str, client: Client, prefix: str, timeframe: str | None, rewrite: bool):
        self.url = url
        self.name = name
        self._client = client
        self._prefix = prefix
        self._timeframe = timeframe
        self._rewrite = rewrite
        self._lock = threading.RLock()
        self._notes: dict[str, Notes] = {}  # by marker: what is known of a table is not known of the next one

    # the table: creation, identity, shape

    def ensure(self, dataset: str, schema: Schema) -> str:
        evolution.check(dataset, schema)
        with self._lock:
            table = self._described(dataset) or self._create(dataset, schema)
            self._recover(table)
            if table.schema != schema:
                self._refuse_new(table, schema)
                table.notes.append({"schema": evolution.to_text(schema)})
            return table.marker

    def marker(self, dataset: str) -> str | None:
        table = self._described(dataset)
        return None if table is None else table.marker

    def schema(self, dataset: str) -> Schema | None:
        table = self._described(dataset)
        return None if table is None else table.schema

    def unkept(self, dataset: str, schema: Schema) -> list[admission.Unkept]:
        table = self._described(dataset)
        if table is not None:
            self._refuse_new(table, schema)
            return rows_of.unkept(table.layout)
        # the server tells its time zone with rows only, so that one is judged once there is a table
        return rows_of.unkept(rows_of.layout(dataset, schema, self._timeframe))

    # writing

    def committed(self, dataset: str, lane: str) -> int:
        table = self._described(dataset)
        return 0 if table is None else table.notes.seq(lane)

    def write(self, batch: Batch) -> Written:
        with self._lock:
            table = self._table(batch.dataset)
            if table.notes.seq(batch.lane) >= batch.seq:
                return Written(already=True)
            frame = self._admitted(table, batch.frame, batch.schema)
            written = self._put(table, frame, batch.mode)
            table.notes.note(batch.lane, batch.seq)
            return written

    def replace(self, dataset: str, schema: Schema, frame: pl.DataFrame, span: Filter) -> Written:
        with self._lock:
            table = self._table(dataset)
            put = self._admitted(table, frame, schema)
            filters.refuse_outside(dataset, put, span, table.schema)
            key = list(table.schema.key)
            gone = self.scan(dataset, span).collect().join(put, on=key, how="anti")
            self._refuse_removal(table, gone)
            written = self._put(table, put, Mode.UPSERT)
            self._remove(table, gone)
            return written + Written(deleted=gone.height)

    def delete(self, dataset: str, filter: Filter) -> int:
        with self._lock:
            table = self._table(dataset)
            gone = self.scan(dataset, filter).collect()
            self._refuse_removal(table, gone)
            self._remove(table, gone)
            return gone.height

    # reading

    def scan(self, dataset: str, filter: Filter = Filter()) -> pl.LazyFrame:
        table = self._table(dataset)
        names = filters.columns(dataset, filter, table.schema)
        inside = filters.expression(dataset, changed(filter, subjects=None), table.schema)
        wanted = filters.subjects(dataset, filter, table.schema)
        start, end = _seconds(*filters.bounds(dataset, filter, table.schema))

        def read(shown: Sequence[str], most: int | None) -> Iterator[pl.DataFrame]:
            asked = list(shown)
            if inside is not None and table.schema.time not in asked:
                asked.append(table.schema.time or "")
            for part in self._frames(table, self._subjects(table, wanted), start, end, asked):
                yield (part if inside is None else part.filter(inside)).select(shown)

        return lazyframes.scan(names, table.schema.polars(system=True), read)

    def arrow(self, dataset: str, filter: Filter = Filter()) -> Iterator[pa.RecordBatch]:
        return lazyframes.arrow(self.scan(dataset, filter))

    def watermarks(self, dataset: str) -> dict[str, datetime | date]:
        table = self._table(dataset)
        schema = table.schema
        columns = table.layout.needed([schema.time or ""])
        newest: dict[str, datetime | date] = {}
        hours = table.notes.noted_hours(_FIRST_SECOND, _LAST_SECOND)
        subjects = self._subjects(table, None) if hours else {}
        for some in filters.groups(list(subjects.items()), _KEYS_AT_ONCE):
            whole = [
                Range(table.key(symbol), max(hours[0] * 3600, _FIRST_SECOND), hours[-1] * 3600 + 3599, columns, True)
                for _, symbol in some
            ]
            for (subject, _), found in zip(some, self._client.query(whole).rows, strict=True):
                if found is not None and len(found.get(EPOCH, ())):
                    times = rows_of.decode(subject, found, table.layout, [schema.time or ""], {})
                    newest[subject] = times[schema.time or ""].max()  # pyright: ignore[reportArgumentType]
        return newest

    def count(self, dataset: str, filter: Filter = Filter()) -> int:
        return lazyframes.count(self.scan(dataset, filter))

    def fingerprints(self, dataset: str, recipe: fingerprints.Recipe, filter: Filter = Filter()) -> pl.DataFrame:
        return fingerprints.by_scan(self, dataset, recipe, filter)

    # the rest

    def datasets(self) -> list[str]:
        ends = f"/{LOG_TIMEFRAME}/{GROUP}"
        groups = [key.removesuffix(ends) for key in self._client.listed() if key.endswith(ends)]
        names = [group.removeprefix(self._prefix) for group in groups if group.startswith(self._prefix)]
        return sorted(name for name in names if location.is_dataset(name))

    def info(self, dataset: str) -> TableInfo:
        table = self._table(dataset)
        rows = self.count(dataset)
        return TableInfo(
            dataset,
            rows=rows,
            bytes=rows
            * table.layout.width,  # of its rows: nothing tells the size of the server's files, most of which are holes
            files=len(self._subjects(table, None)),
            commits=None,
            location=f"{self.url}: */{table.layout.timeframe}/{table.group}",
        )

    def version(self) -> str:
        return f"MarketStore {self._client.version()}"

    def query(self, sql: str) -> pl.DataFrame:
        return lazyframes.query(sql, self.datasets(), self.scan)

    def maintain(self, dataset: str) -> str:
        with self._lock:
            ended = self._recover(self._table(dataset))
        said = f"; ended {ended} rewrites that had been cut short" if ended else ""
        return f"{dataset}: MarketStore's files have nothing to compact{said}"

    def close(self) -> None:
        self._client.close()

    # how it is done: the table

    def _described(self, dataset: str) -> _Table | None:
        location.split(dataset)
        group = self._prefix + dataset
        texts, timezone = Notes(self._client, group).texts()
        if not texts:
            return None
        try:
            marker, timeframe = texts[0]["marker"], texts[0][_LAYOUT]
            made = evolution.from_text(texts[0]["schema"])
            newest = evolution.from_text(texts[-1]["schema"])
        except (KeyError, ValueError) as error:
            raise StoreError(f"the notes on {dataset} in {self.url} were not made by MarketSync") from error
        shape = rows_of.layout(dataset, made, timeframe)
        rows_of.refuse_zone(dataset, shape, timezone or "UTC")
        notes = self._notes.setdefault(marker, Notes(self._client, group))
        return _Table(dataset, group, marker, newest, shape, notes)

    def _table(self, dataset: str) -> _Table:
        table = self._described(dataset)
        if table is None:
            raise location.absent("table", dataset, self.url)
        return table

    def _refuse_new(self, table: _Table, schema: Schema) -> None:
        if new := evolution.added(table.dataset, table.schema, schema):
            raise SchemaConflict(
                f"the table of {table.dataset} in {self.url} cannot follow its definition: the column {new[0].name!r} "
                "is new, and the columns of MarketStore's buckets are fixed; give the new shape a dataset name of its "
                "own, or remove its buckets and let them be filled again"
            )

    def _create(self, dataset: str, schema: Schema) -> _Table:
        shape = rows_of.layout(dataset, schema, self._timeframe)
        timeframe = TICK if shape.ticks else shape.timeframe
        notes = Notes(self._client, self._prefix + dataset)
        notes.append({"marker": uuid.uuid4().hex, _LAYOUT: timeframe, "schema": evolution.to_text(schema)})
        try:
            return self._table(dataset)  # of another process, if it was faster
        except CapabilityError:
            self._client.destroy(notes.log_key)
            raise

    def _subjects(self, table: _Table, wanted: Collection[str] | None) -> dict[str, str]:
        """Return the symbols of the buckets that there are, by subject; of all, or of the wanted ones."""
        if table.schema.subject is None:
            wanted = [lazyframes.EVERY_SUBJECT]
        if wanted is not None and len(wanted) <= _KEYS_AT_ONCE:
            symbols = {subject: table.layout.symbol(subject) for subject in wanted}
            symbols = {subject: symbol for subject, symbol in symbols.items() if rows_of.is_symbol(symbol)}
            there = self._client.buckets([table.key(symbol) for symbol in symbols.values()])
            return {each: symbol for (each, symbol), one in zip(symbols.items(), there, strict=True) if one is not None}
        ends = table.key("")
        symbols = [key.removesuffix(ends) for key in self._client.listed() if key.endswith(ends)]
        return {symbol: symbol for symbol in symbols if wanted is None or symbol in wanted}

    # how it is done: writing

    def _admitted(self, table: _Table, frame: pl.DataFrame, sent: Schema) -> pl.DataFrame:
        frame = admission.admit(table.dataset, frame, sent, self.capabilities, rows_of.unkept(table.layout))
        frame, _ = evolution.fit(table.dataset, frame, sent, table.schema)
        return frame

    def _put(self, table: _Table, frame: pl.DataFrame, mode: Mode) -> Written:
        """Put in what is new or differs."""
        if frame.is_empty():
            return Written()
        # bars that are appended overwrite themselves, and need not be looked for
        there = self._beside(table, frame if mode is Mode.UPSERT or table.layout.ticks else frame.clear())
        split = classify.split(frame, there, table.schema)
        if not table.layout.ticks:
            self._send(table, split.put)
            self._check_bars(table, split.put, there)
            return split.written()
        if split.changed.height:
            # a tick is never overwritten: the old one has to go
            self._refuse_removal(table, split.changed)
            self._send(table, split.new)
            self._remove(table, split.changed, split.changed)
        else:
            self._send(table, split.put)
        self._check_ticks(table, frame)
        return split.written()

    def _beside(self, table: _Table, frame: pl.DataFrame) -> pl.DataFrame:
        """Return the rows that are there of the frame's subjects, from its first instant of each to its last."""
        import polars as pl

        names = table.schema.names
        found = [pl.DataFrame(schema=table.schema.polars())]
        for some in filters.groups(list(self._parts(table, frame).items()), _KEYS_AT_ONCE):
            spans = {subject: _seconds(*_ends(part, table.schema)) for subject, part in some}
            there = self._subjects(table, list(spans))
            found += self._frames(table, there, *_around(spans.values()), names, spans=spans)
        return pl.concat(found)

    def _check_bars(self, table: _Table, sent: pl.DataFrame, before: pl.DataFrame) -> None:
        """Raise `StoreError` for bars that are not there, or still as they were `before`: the server acknowledges as
        well what it could not write to its disk. What is there and neither is of another writer, who came after."""
        now = self._beside(table, sent)
        split = classify.split(sent, now, table.schema)
        old = before.join(split.changed, on=list(table.schema.key), how="semi")
        if lost := split.new.height + classify.split(old, now, table.schema).equal:
            raise StoreError(
                f"{lost} of {sent.height} bars of {table.dataset} are not in {self.url}, though it took them: is its "
                "disk full (see its log)? They stay owed"
            )

    def _check_ticks(self, table: _Table, frame: pl.DataFrame) -> None:
        """Raise `StoreError` unless each tick of the frame is there once."""
        split = classify.split(frame, self._beside(table, frame), table.schema)
        if split.equal != frame.height:
            raise StoreError(
                f"{split.put.height} of {frame.height} ticks of {table.dataset} are not in {self.url} once, as they "
                "were sent: is its disk full (see its log), or another process writing the same rows? They stay owed; "
                "with ?rewrite=true in the store's URL the next delivery puts such a bucket right"
            )

    def _parts(self, table: _Table, frame: pl.DataFrame) -> dict[str, pl.DataFrame]:
        """Return the rows of each subject, by time."""
        frame = frame.sort(table.schema.time or "", maintain_order=True)
        if table.schema.subject is None:
            return {lazyframes.EVERY_SUBJECT: frame}
        parts = frame.partition_by(table.schema.subject, as_dict=True, maintain_order=True)
        return {str(subject): part for (subject,), part in parts.items()}

    def _send(self, table: _Table, frame: pl.DataFrame, group: str | None = None) -> None:
        """Send rows, none of which is there if they are ticks; `group` is another attribute group than the table's."""
        if frame.is_empty():
            return
        segments = table.notes.segments(frame[SEGMENT_COLUMN].unique().to_list())
        ready: dict[str, Columns] = {}
        rows = 0
        for subject, part in self._parts(table, frame).items():
            key = table.key(table.layout.symbol(subject))
            if group is not None:
                key = key.removesuffix(table.group) + group
            for piece in part.iter_slices(_ROWS_AT_ONCE):
                if key in ready or rows + piece.height > _ROWS_AT_ONCE:
                    self._write(table, ready)
                    ready, rows = {}, 0
                ready[key] = rows_of.encode(piece, table.layout, segments)
                rows += piece.height
        self._write(table, ready)

    def _write(self, table: _Table, ready: dict[str, Columns]) -> None:
        """Write the rows of several buckets at once, each in the order that its bucket has its columns."""
        table.notes.note_hours(hour for each in ready.values() for hour in set((each[EPOCH] // 3600).tolist()))
        orders: dict[tuple[str, ...], dict[str, Columns]] = {}
        # asked each time: with the order of a bucket that was made anew meanwhile, values would change their columns
        for (key, columns), bucket in zip(ready.items(), self._client.buckets(list(ready)), strict=True):
            order = list(table.layout.types)
            if bucket is not None:
                wrong = bucket.types != table.layout.types or bucket.variable != table.layout.ticks
                if wrong or bucket.seconds != table.layout.seconds:
                    raise StoreError(
                        f"the bucket {key} in {self.url} has other columns than those of {table.dataset}: it was not "
                        "made by MarketSync; give the store a name of its own in its URL (marketstore://host:5993/name)"
                    )
                order = bucket.names
            order += [NANOSECONDS] if table.layout.ticks else []
            orders.setdefault(tuple(order), {})[key] = {name: columns[name] for name in order}
        for some in orders.values():
            try:
                self._client.write(some, variable=table.layout.ticks)
            except Refused as error:
                self._write_each(table, some, error)

    def _write_each(self, table: _Table, ready: dict[str, Columns], error: Refused) -> None:
        """Write bucket by bucket after the server refused several at once, of which it may have written any."""
        if len(ready) == 1:
            raise error
        failed: list[Refused] = []
        for key, columns in ready.items():
            try:
                left = self._missing(key, columns) if table.layout.ticks else columns
                self._client.write({key: left}, variable=table.layout.ticks)
            except Refused as one:
                failed.append(one)
        if failed:
            raise StoreError(f"{len(failed)} of {len(ready)} buckets: {failed[0]}") from failed[0]

    def _missing(self, key: str, columns: Columns) -> Columns:
        """Return the ticks that are not there: of ticks that are all new, a bucket has every one or none."""
        span = Range(key, int(columns[EPOCH].min()), int(columns[EPOCH].max()), [LANE_COLUMN, SEQ_COLUMN, NANOSECONDS])
        found = self._client.query([span]).rows[0]

        def marks(rows: Columns) -> list[tuple[int, ...]]:
            names = (EPOCH, NANOSECONDS, LANE_COLUMN, SEQ_COLUMN)
            return list(zip(*(rows[name].tolist() for name in names), strict=True))

        there = set(marks(found)) if found is not None and len(found.get(EPOCH, ())) else set()
        keep = [mark not in there for mark in marks(columns)]
        return {name: values[keep] for name, values in columns.items()}

    # how it is done: removing

    def _refuse_removal(self, table: _Table, gone: pl.DataFrame) -> None:
        if gone.height and not self._rewrite:
            raise CapabilityError(
                f"{gone.height} rows of {table.dataset} in {self.url} would have to go, and MarketStore removes no "
                "rows, only whole buckets; add ?rewrite=true to the store's URL to let it copy such a bucket aside, "
                "remove it and write it again"
            )

    def _remove(self, table: _Table, gone: pl.DataFrame, instead: pl.DataFrame | None = None) -> None:
        """Take the rows with these keys out of their buckets, and put others in instead."""
        import polars as pl

        if gone.is_empty():
            return
        key = list(table.schema.key)
        others = {} if instead is None else self._parts(table, instead)
        for subject, part in self._parts(table, gone).items():
            there = self._all(table, subject)
            kept = there.join(part, on=key, how="anti")
            self._made_anew(table, subject, pl.concat([kept, others[subject]]) if subject in others else kept)

    def _all(self, table: _Table, subject: str) -> pl.DataFrame:
        import polars as pl

        types = table.schema.polars(system=True)
        symbols = {subject: table.layout.symbol(subject)}
        found = self._frames(table, symbols, _FIRST_SECOND, _LAST_SECOND, list(types))
        return pl.concat([pl.DataFrame(schema=types), *found])

    def _made_anew(self, table: _Table, subject: str, rows: pl.DataFrame) -> None:
        """Make a bucket hold these rows: they are aside, checked and noted as such, before the bucket is removed."""
        symbol = table.layout.symbol(subject)
        if rows.is_empty():
            self._client.destroy(table.key(symbol))
            return
        aside = changed(table, group=self._aside(table))
        if self._client.buckets([aside.key(symbol)])[0] is not None:
            self._client.destroy(aside.key(symbol))
        self._send(table, rows, aside.group)
        self._same(aside, subject, rows)
        table.notes.note(_REWRITE + symbol, 1)
        self._moved_back(table, subject, rows)

    def _moved_back(self, table: _Table, subject: str, rows: pl.DataFrame) -> None:
        symbol = table.layout.symbol(subject)
        if self._client.buckets([table.key(symbol)])[0] is not None:
            self._client.destroy(table.key(symbol))
        self._send(table, rows)
        self._same(table, subject, rows)
        table.notes.note(_REWRITE + symbol, 0)
        self._client.destroy(f"{symbol}/{table.layout.timeframe}/{self._aside(table)}")

    def _recover(self, table: _Table) -> int:
        """End the rewrites that were cut short; return how many they were."""
        aside = changed(table, group=self._aside(table))
        ended = 0
        for subject, symbol in self._subjects(aside, None).items():
            if table.notes.seq(_REWRITE + symbol):
                self._moved_back(table, subject, self._all(aside, subject))
                ended += 1
            else:  # the bucket itself is whole
                self._client.destroy(aside.key(symbol))
        return ended

    def _same(self, table: _Table, subject: str, rows: pl.DataFrame) -> None:
        found = self._all(table, subject)
        if found.height != rows.height or classify.split(rows, found, table.schema).equal != rows.height:
            raise StoreError(
                f"the rows of {subject} of {table.dataset} did not come back from {table.group} in {self.url} as they "
                "were written: is another process writing them? Nothing is lost: run it again"
            )

    def _aside(self, table: _Table) -> str:
        return f"{GROUP}-rewrite.{self._prefix}{table.dataset}"

    # how it is done: reading

    def _frames(
        self,
        table: _Table,
        subjects: Mapping[str, str],
        start: int,
        end: int,
        names: Sequence[str],
        *,
        spans: Mapping[str, tuple[int, int]] | None = None,
    ) -> Iterator[pl.DataFrame]:
        """Yield the rows of the subjects (with their symbols) in the hours that have any from second to second, both
        included; `spans` narrows that down for each subject."""
        import polars as pl

        if not subjects:
            return
        needed = table.layout.needed(names)
        within = _windows(table.notes.noted_hours(start, end), start, end, table.layout)
        for some in filters.groups(list(subjects.items()), _TICK_KEYS_AT_ONCE if table.layout.ticks else _KEYS_AT_ONCE):
            pace = _Pace(table.layout, len(some))
            for first, last in pace.cut(within):
                asked = [
                    (subject, Range(table.key(symbol), max(first, low), min(last, high), needed))
                    for subject, symbol in some
                    for low, high in [(spans or {}).get(subject, (first, last))]
                    if max(first, low) <= min(last, high)
                ]
                found = self._client.query([each for _, each in asked]).rows
                parts = [
                    rows_of.decode(subject, rows, table.layout, names, self._segments(table, rows, names))
                    for (subject, _), rows in zip(asked, found, strict=True)
                    if rows is not None and len(rows.get(EPOCH, ()))
                ]
                pace.met(sum(part.height for part in parts))
                if parts:
                    yield pl.concat(parts)

    def _segments(self, table: _Table, rows: Columns, names: Sequence[str]) -> dict[tuple[int, int], str]:
        if SEGMENT_COLUMN not in names:
            return {}
        pairs = set(zip(rows[LANE_COLUMN].tolist(), rows[SEQ_COLUMN].tolist(), strict=True))
        return table.notes.named(pairs)


def open_url(url: str, name: str) -> MarketStore:
    """Open `marketstore://host:5993/`; raises `ConfigurationError` for a URL that names no host or another option.

    A path is the beginning of the attribute groups of this store; `marketstores://`, or `?secure=true`, is TLS.
    """
    parts = urlsplit(url)
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    known = {"timeframe": "", "timeout": "60", "secure": "false", "ca": "", "rewrite": "false"}
    if unknown := sorted(options.keys() - known.keys()):
        raise ConfigurationError(f"the store {name}: {unknown[0]!r} is no option; there are {', '.join(sorted(known))}")
    options = known | options
    for option in ("secure", "rewrite"):
        if options[option] not in ("true", "false"):
            raise ConfigurationError(f"the store {name}: {option}={options[option]!r} is neither true nor false")
    timeframe = options["timeframe"] or None
    if timeframe not in (None, TICK, *SECONDS):
        raise ConfigurationError(
            f"the store {name}: timeframe={timeframe!r} cannot be read back from MarketStore; take one of "
            f"{', '.join(SECONDS)}, {TICK}"
        )
    try:
        port, timeout = parts.port or _PORT, float(options["timeout"])
    except ValueError as error:
        raise ConfigurationError(f"the store {name}: {error}") from error
    if not parts.hostname or timeout <= 0:
        raise ConfigurationError(
            f"the store {name} names no host, or no time: write marketstore://host:5993/?timeout=60"
        )
    prefix = parts.path.strip("/")
    if prefix and not rows_of.is_symbol(prefix):
        raise ConfigurationError(f"the store {name}: {prefix!r} cannot begin the name of a folder")
    secure = parts.scheme == "marketstores" or options["secure"] == "true"
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    auth = (unquote(parts.username), unquote(parts.password or "")) if parts.username else None
    endpoint = f"{'https' if secure else 'http'}://{host}:{port}/rpc"
    client = Client(endpoint, timeout, auth, options["ca"] or True)
    shown = f"{parts.scheme}://{host}:{port}/{prefix}"
    return MarketStore(shown, name, client, f"{prefix}." if prefix else "", timeframe, options["rewrite"] == "true")


def _seconds(since: date | datetime | None, until: date | datetime | None) -> tuple[int, int]:
    """Return the first and the last second that times between the bounds can be in."""
    return (
        _FIRST_SECOND if since is None else max(_second(since), _FIRST_SECOND),
        _LAST_SECOND if until is None else min(_second(until), _LAST_SECOND),
    )


def _second(time: date | datetime) -> int:
    if isinstance(time, datetime):
        since = time - datetime(1970, 1, 1, tzinfo=UTC)
        return since.days * 86400 + since.seconds
    return (time.toordinal() - date(1970, 1, 1).toordinal()) * 86400


def _ends(part: pl.DataFrame, schema: Schema) -> tuple[date | datetime, date | datetime]:
    times = part[schema.time or ""]
    return times.min(), times.max()  # pyright: ignore[reportReturnType]


def _around(spans: Collection[tuple[int, int]]) -> tuple[int, int]:
    return min(first for first, _ in spans), max(last for _, last in spans)


def _windows(hours: Sequence[int], start: int, end: int, layout: Layout) -> list[tuple[int, int]]:
    """Return the spans of seconds that cover the hours, without long runs of empty buckets."""
    merged: list[tuple[int, int]] = []
    for hour in hours:
        first, last = max(hour * 3600, start), min(hour * 3600 + 3599, end)
        first -= 0 if layout.ticks else first % layout.seconds  # the bar around an instant is given as well: once
        if merged and first - merged[-1][1] <= _MERGED_BUCKETS * layout.seconds:
            merged[-1] = (merged[-1][0], last)
        else:
            merged.append((first, last))
    return merged


class _Pace:
    """Cuts spans to what one answer may hold: of bars that is known, of ticks it is told by the answers before."""

    def __init__(self, layout: Layout, keys: int):
        self._ticks = layout.ticks
        self._seconds = 3600 if layout.ticks else max(1, _READ_ROWS // keys) * layout.seconds

    def cut(self, windows: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
        for first, last in windows:
            while first <= last:
                end = min(last, first + self._seconds - 1)
                yield first, end
                first = end + 1

    def met(self, rows: int) -> None:
        if self._ticks and rows > _READ_ROWS:
            self._seconds = max(self._seconds // 2, _TICK_SECONDS[0])
        elif self._ticks and rows < _READ_ROWS // 16:
            self._seconds = min(self._seconds * 2, _TICK_SECONDS[1])
