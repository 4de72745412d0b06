"""Excel workbooks in a folder: `excel://./folder`, one workbook a dataset, `<folder>/<provider>/<dataset>.xlsx`.

For people who want to open the rows; how a value becomes a cell is in `workbook.py`. `<dataset>.marketsync.json` beside
a workbook is the table for us: marker, schema, lanes, and which workbook they go with, by its checksum. A change writes
the workbook anew. The JSON names the workbook that is to come before it takes the place of the old one, so whichever is
there says what is committed: rows and `seq` become durable together.

A workbook that somebody has saved again is taken as long as its rows, in any order, have the values that they had;
with other values it is refused until it is put back or taken away. A workbook that is not there is no table.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from marketsync.errors import StoreBusy, StoreDamaged, StoreError
from marketsync.schema import INGESTED_COLUMN, Schema
from storage import (
    admission,
    adoption,
    classify,
    evolution,
    filters,
    fingerprints,
    lazyframes,
    location,
    locks,
    workbook,
)
from storage.files import made, sync, write_whole
from storage.protocol import Batch, Capabilities, Filter, Mode, TableInfo, Writers, Written

if TYPE_CHECKING:
    import polars as pl
    import pyarrow as pa

CAPABILITIES = Capabilities(
    atomic=True,
    transactions=False,
    nanoseconds=True,
    nan=True,
    unsigned_64=True,
    nul=True,
    evolve=True,
    writers=Writers.MANY_PROCESSES,
    longest_text=workbook.LONGEST_TEXT,
    why="transactions: a batch is one step, several batches are not; use delta:// for that. "
    f"longest_text: a cell takes {workbook.LONGEST_TEXT:,} characters; use any other store for longer ones.",
)

_TABLE = ".marketsync.json"
_LOOKS = 3
_KEPT_BYTES = 64_000_000  # the next batch goes with the rows that were written for the last one, if they are no more


@dataclass(frozen=True)
class _State:
    """One table with one workbook: `rows` in it, their `content` in any order, the `digest` of the file as written."""

    version: int
    marker: str
    schema: Schema
    lanes: Mapping[str, int]
    rows: int = 0
    content: str = ""
    digest: str = ""


class ExcelStore:
    """A folder of workbooks. Safe for several threads and several processes; writers take turns per table."""

    capabilities = CAPABILITIES

    def __init__(self, url: str, name: str):
        self.url = url
        self.name = name
        self._root = location.folder(url)
        self._last: tuple[str, pl.DataFrame] | None = None  # the workbook written last, by its digest, and its rows

    # the table: creation, identity, shape

    def ensure(self, dataset: str, schema: Schema) -> str:
        import polars as pl

        evolution.check(dataset, schema)
        state = self._open(dataset)
        if state is None or state.schema != schema:
            path = self._path(dataset)
            made(path.parent)
            with self._locked(dataset):
                state = self._open(dataset)
                if state is None:
                    if path.exists():
                        raise StoreError(f"{path} is in the way of the table of {dataset}: move it elsewhere")
                    state = _State(0, uuid.uuid4().hex, schema, {})
                    state = self._exchange(dataset, None, state, pl.DataFrame(schema=schema.polars(system=True)))
                    for level in (self._root, self._root.parent):
                        sync(level)
                elif state.schema != schema:
                    new = evolution.added(dataset, state.schema, schema)
                    after, rows = replace(state, schema=schema), None
                    if schema.names != state.schema.names:
                        types = schema.polars(system=True)
                        rows = self._rows(dataset, state).with_columns(
                            pl.lit(None, types[column.name]).alias(column.name) for column in new
                        )
                        rows = rows.select(list(types))
                    state = self._exchange(dataset, state, after, rows)
        return state.marker

    def marker(self, dataset: str) -> str | None:
        state = self._open(dataset)
        return None if state is None else state.marker

    def schema(self, dataset: str) -> Schema | None:
        state = self._open(dataset)
        return None if state is None else state.schema

    def unkept(self, dataset: str, schema: Schema) -> list[admission.Unkept]:
        return workbook.unkept(schema)

    # writing

    def committed(self, dataset: str, lane: str) -> int:
        state = self._open(dataset)
        return 0 if state is None else state.lanes.get(lane, 0)

    def write(self, batch: Batch) -> Written:
        import polars as pl

        dataset = batch.dataset

        def decide(state: _State) -> tuple[_State, pl.DataFrame | None, Written]:
            if state.lanes.get(batch.lane, 0) >= batch.seq:
                return state, None, Written(already=True)
            after = replace(state, lanes={**state.lanes, batch.lane: batch.seq})
            unkept = workbook.unkept(batch.schema)
            frame = admission.admit(dataset, batch.frame, batch.schema, self.capabilities, unkept)
            frame, absent = evolution.fit(dataset, frame, batch.schema, state.schema)
            if frame.is_empty():
                return after, None, Written()
            rows = self._rows(dataset, state)
            if batch.mode is Mode.APPEND:
                return after, pl.concat([rows, frame]), Written(inserted=frame.height)
            split = classify.split(frame, rows, state.schema, absent=absent)
            written = split.written()
            return after, _changed(rows, split, None, state.schema), written

        return self._commit(dataset, decide)

    def replace(self, dataset: str, schema: Schema, frame: pl.DataFrame, span: Filter) -> Written:
        def decide(state: _State) -> tuple[_State, pl.DataFrame | None, Written]:
            put = admission.admit(dataset, frame, schema, self.capabilities, workbook.unkept(schema))
            put, absent = evolution.fit(dataset, put, schema, state.schema)
            filters.refuse_outside(dataset, put, span, state.schema)
            rows = self._rows(dataset, state)
            split = classify.split(put, rows, state.schema, absent=absent)
            gone = _of(rows, dataset, span, state.schema).join(put, on=list(state.schema.key), how="anti")
            written = split.written(deleted=gone.height)
            return state, _changed(rows, split, gone, state.schema), written

        return self._commit(dataset, decide)

    # reading

    def scan(self, dataset: str, filter: Filter = Filter()) -> pl.LazyFrame:
        state = self._table(dataset)
        names = filters.columns(dataset, filter, state.schema)
        types = state.schema.polars(system=True)
        found = lazyframes.scan(list(types), types, lambda columns, _: self._sheets(dataset, columns))
        condition = filters.expression(dataset, filter, state.schema)
        return (found if condition is None else found.filter(condition)).select(names)

    def arrow(self, dataset: str, filter: Filter = Filter()) -> Iterator[pa.RecordBatch]:
        return lazyframes.arrow(self.scan(dataset, filter))

    def watermarks(self, dataset: str) -> dict[str, datetime | date]:
        return lazyframes.watermarks(self.scan(dataset), dataset, self._table(dataset).schema)

    def count(self, dataset: str, filter: Filter = Filter()) -> int:
        if filter.subjects is None and filter.since is None and filter.until is None:
            return self._table(dataset).rows
        return lazyframes.count(self.scan(dataset, filter))

    def fingerprints(self, dataset: str, recipe: fingerprints.Recipe, filter: Filter = Filter()) -> pl.DataFrame:
        return fingerprints.by_scan(self, dataset, recipe, filter)

    # the rest

    def delete(self, dataset: str, filter: Filter) -> int:
        def decide(state: _State) -> tuple[_State, pl.DataFrame | None, Written]:
            rows = self._rows(dataset, state)
            gone = _of(rows, dataset, filter, state.schema)
            left = rows.join(gone, on=list(state.schema.key), how="anti") if gone.height else None
            return state, left, Written(deleted=gone.height)

        return self._commit(dataset, decide).deleted

    def datasets(self) -> list[str]:
        tables = self._root.glob(f"*/*{_TABLE}")
        names = (f"{path.parent.name}.{path.name.removesuffix(_TABLE)}" for path in tables)
        return sorted(name for name in names if self._path(name).exists())

    def info(self, dataset: str) -> TableInfo:
        state, path = self._table(dataset), self._path(dataset)
        return TableInfo(dataset, state.rows, path.stat().st_size, 1, state.version, str(path))

    def version(self) -> str:
        return lazyframes.library("fastexcel")

    def query(self, sql: str) -> pl.DataFrame:
        return lazyframes.query(sql, self.datasets(), self.scan)

    def maintain(self, dataset: str) -> str:
        self._table(dataset)
        with self._locked(dataset):
            state, path = self._table(dataset), self._path(dataset)
            if _digest(path) == state.digest:
                return f"{dataset}: {path} is as it was written; nothing to do"
            self._exchange(dataset, state, state, self._rows(dataset, state))
        return f"{dataset}: {path} was saved by another program, with the same values; it was written anew, in order"

    def close(self) -> None:
        self._last = None

    # how it is done

    def _path(self, dataset: str) -> Path:
        place = location.below(self._root, dataset)
        return place.with_name(f"{place.name}.xlsx")

    def _locked(self, dataset: str):
        path = self._path(dataset)
        return locks.exclusive(path.with_name(f".{path.stem}.lock"), f"the workbook of {dataset}")

    def _open(self, dataset: str) -> _State | None:
        """Return the table that goes with the workbook that is there; None when there is no table or no workbook."""
        path = self._path(dataset)
        table = path.with_name(path.stem + _TABLE)
        try:
            data = json.loads(table.read_bytes())
            of = data.get("dataset", dataset)  # earlier ones do not say it
            adoption.refuse_copy(path, of, dataset, "give it its name back")
            if data["next"] is not None and _digest(path) == data["next"]["digest"]:
                return _from_json(data["next"])
            return _from_json(data["now"]) if data["now"] is not None and path.exists() else None
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StoreError(f"{table} cannot be read: {error}; restore it, or remove it and {path.name}") from error

    def _table(self, dataset: str) -> _State:
        state = self._open(dataset)
        if state is None:
            raise location.absent("workbook", dataset, self._path(dataset).parent)
        return state

    def _sheets(self, dataset: str, columns: Sequence[str]) -> Iterator[pl.DataFrame]:
        """Yield the rows sheet by sheet, for who does not hold the lock."""
        for _ in range(_LOOKS):
            state = self._table(dataset)
            content = _bytes(self._path(dataset))
            if hashlib.sha256(content).hexdigest() == state.digest:
                yield from self._decoded(dataset, content, state, columns)
                return
        # it was exchanged each time between a look at the table and one at the file, or somebody else has saved it
        with self._locked(dataset):
            rows = self._rows(dataset, self._table(dataset))
        yield rows.select(columns)

    def _rows(self, dataset: str, state: _State) -> pl.DataFrame:
        """Return all rows of the table, for who holds the lock."""
        import polars as pl

        path = self._path(dataset)
        content = _bytes(path)
        digest, last = hashlib.sha256(content).hexdigest(), self._last
        if last is not None and last[0] == digest == state.digest:
            return last[1]
        rows = pl.concat(self._decoded(dataset, content, state, list(state.schema.polars(system=True))))
        if digest != state.digest and _content(rows, state.schema) != state.content:
            raise StoreDamaged(
                f"the rows in {path} have other values than MarketSync wrote: another program changed them; put back "
                "the workbook as it was, or move it elsewhere, and the next sync fills the table again, from a sibling "
                "store or from the provider; for work of your own, use another workbook that refers to this one"
            )
        return rows

    def _decoded(self, dataset: str, content: bytes, state: _State, columns: Sequence[str]) -> Iterator[pl.DataFrame]:
        try:
            yield from workbook.read(content, state.schema.polars(system=True), state.rows, columns)
        except ValueError as error:
            raise lazyframes.damaged(f"the workbook of {dataset}", self._path(dataset), str(error)) from error

    def _commit(self, dataset: str, decide: Callable[[_State], tuple[_State, pl.DataFrame | None, Written]]) -> Written:
        """Take the table's lock, let `decide` say what the table and its rows are to be, make it durable."""
        self._table(dataset)
        with self._locked(dataset):
            state = self._table(dataset)
            after, rows, written = decide(state)
            if rows is not None or after != state:
                self._exchange(dataset, state, after, rows)
        return written

    def _exchange(self, dataset: str, before: _State | None, after: _State, rows: pl.DataFrame | None) -> _State:
        """Make the table `after`, with a new workbook of these rows; None leaves the workbook as it is."""
        path = self._path(dataset)
        table = path.with_name(path.stem + _TABLE)
        after = replace(after, version=after.version + 1)
        if rows is not None:
            _refuse_open(path)
            rows = rows.sort(_order(after.schema))
            new = path.with_name(f".{path.name}.tmp")
            workbook.write(new, rows)
            sync(new)
            after = replace(after, rows=rows.height, content=_content(rows, after.schema), digest=_digest(new))
            write_whole(table, _to_json(dataset, before, after))
            os.replace(new, path)
            sync(path.parent)
            self._last = (after.digest, rows) if rows.estimated_size() <= _KEPT_BYTES else None
        write_whole(table, _to_json(dataset, after, None))
        return after


def open_url(url: str, name: str) -> ExcelStore:
    """Return the store of the URL; the folder is made when the first table is."""
    return ExcelStore(url, name)


def _of(rows: pl.DataFrame, dataset: str, filter: Filter, schema: Schema) -> pl.DataFrame:
    condition = filters.expression(dataset, filter, schema)
    return rows if condition is None else rows.filter(condition)


def _changed(
    rows: pl.DataFrame, split: classify.Split, gone: pl.DataFrame | None, schema: Schema
) -> pl.DataFrame | None:
    """Return the rows with what is new and changed and without what is gone; None when all stay as they are."""
    import polars as pl

    out = split.put if gone is None else pl.concat([split.put, gone])
    return pl.concat([rows.join(out, on=list(schema.key), how="anti"), split.put]) if out.height else None


def _order(schema: Schema) -> list[str]:
    return list(dict.fromkeys(name for name in (schema.subject, schema.time, *schema.key) if name is not None))


def _refuse_open(path: Path) -> None:
    """Refuse to exchange a workbook under the hands of who has it open: saving it would undo the exchange."""
    for sign in (f"~${path.name}", f".~lock.{path.name}#"):  # of Excel, of LibreOffice
        if path.with_name(sign).exists():
            raise StoreBusy(
                f"{path} is open in a spreadsheet; close it, and the next run delivers what waits "
                f"(if nobody has it open, remove {sign} beside it)"
            )


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise StoreError(f"{path} was taken away while it was to be read") from None


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _content(rows: pl.DataFrame, schema: Schema) -> str:
    """Return a checksum of the values that is the same for any order of rows; when a row came is not part of it, since
    its microseconds do not outlive every program that saves a workbook."""
    import polars as pl

    plain = rows.drop(INGESTED_COLUMN).sort(list(schema.key)).with_columns(pl.selectors.temporal().to_physical())
    digest = hashlib.sha256()
    for part in plain.iter_slices(lazyframes.ARROW_ROWS):
        text = io.BytesIO()
        part.write_csv(text, include_header=False)
        digest.update(text.getbuffer())
    return digest.hexdigest()


def _to_json(dataset: str, now: _State | None, new: _State | None) -> bytes:
    def plain(state: _State | None) -> dict[str, Any] | None:
        if state is None:
            return None
        return {**vars(state), "schema": json.loads(evolution.to_text(state.schema))}

    return json.dumps({"dataset": dataset, "now": plain(now), "next": plain(new)}, ensure_ascii=False).encode()


def _from_json(data: dict[str, Any]) -> _State:
    return _State(**{**data, "schema": evolution.from_text(json.dumps(data["schema"], ensure_ascii=False))})
