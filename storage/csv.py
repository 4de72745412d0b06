"""CSV files in a folder: `csv://./folder`, one file per subject in `<folder>/<provider>/<dataset>/`, sorted by time.

A file has a header; times are ISO 8601 in UTC, numbers have as many digits as it takes to read the same number back,
NaN and infinities are `NaN`, `inf`, `-inf`; nothing between two commas is null and `""` is the empty string. A subject
of capitals, digits, `.`, `_` and `-` names its file; any other has a hash in its name, so that no two share a file
where case does not count. A table without subjects is one file.

`_schema.json` beside the files is the table for us: schema, marker, lanes, and of each file its length, its checksum
and a few marks, which are places where rows begin. New rows at the end are appended, and what is longer than recorded
was never committed. Any other change puts another end into the file, from the last mark before the first row that
changes, or writes it whole where that is most of it. (Files by period would also bound what the change of an old row
costs, but they would be dozens for a person to open, all of them listed in each commit.) What a write exchanges stands
in `_journal.json` and `_new` until it is done. Who reads a file while its end is exchanged learns it from the checksum,
and looks again.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from datetime import MAXYEAR, date, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from marketsync.errors import ForeignTable, StoreError
from marketsync.schema import INGESTED_COLUMN, ColumnType, Schema
from storage import admission, adoption, classify, evolution, filters, fingerprints, lazyframes, location, locks
from storage.adoption import Adoption, Wish
from storage.files import made, sync, write_whole
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
    nul=True,
    evolve=True,
    writers=Writers.MANY_PROCESSES,
    why="atomic: a batch for several subjects changes several files one after the other, and a reader may see some of "
    "them changed, though never half a row; use delta:// when others read while we write. "
    "transactions: a batch is one step, several batches are not; use delta:// for that.",
)

_TABLE = "_schema.json"
_JOURNAL = "_journal.json"
_LOCK = "_lock"
_NEW = "_new"
_NULL_FILE = "~null.csv"  # of rows without a subject, where it may be null
_TAILS = "_tails"  # in `_new`: other ends of files, one after the other as the journal lists them
_OLD_BASE = 256  # once, a checksum was of so many last bytes only
# so many bytes are after the last mark of a file, and after each one before it so many times more
_MARK_BYTES = 32_768
_MARK_TIMES = 4
# a file that a write looks into and then writes anew is read once, as long as so many rows of such files are held
_KEPT_ROWS = 500_000
_FILE = "__file"
_PLAIN = re.compile(r"[A-Z0-9][A-Z0-9._-]{0,99}(?<!\.)")
_DEVICES = re.compile(r"(CON|PRN|AUX|NUL|COM\d|LPT\d)(\..*)?")


class _Mark(NamedTuple):
    """Where a row begins in its file, the CRC-32 of the bytes before it, and the row's time in ISO."""

    offset: int
    crc: int
    since: str | None


_START = _Mark(0, 0, None)


@dataclass(frozen=True)
class _Entry:
    """One file as it was committed: `crc` is the CRC-32 of its bytes from `base` on, `since` and `last` are times in
    ISO, `marks` are in the order of the file."""

    subject: str | None
    size: int
    rows: int
    since: str | None
    last: str | None
    crc: int
    base: int
    marks: Sequence[_Mark]


@dataclass(frozen=True)
class _State:
    """One table as `_schema.json` has it."""

    dataset: str
    version: int
    marker: str
    schema: Schema
    lanes: Mapping[str, int]
    files: Mapping[str, _Entry]


@dataclass
class _Change:
    """Rows to put into files, and keys of rows to take out of files first."""

    put: dict[str, tuple[str | None, pl.DataFrame]] = field(default_factory=dict)
    out: dict[str, pl.DataFrame] = field(default_factory=dict)


class _Piece(NamedTuple):
    """The rows of a file from a mark on."""

    start: _Mark
    rows: pl.DataFrame


_Kept = dict[str, _Piece]  # by file, while one write holds the lock


class CsvStore:
    """A folder of CSV tables. Safe for several threads and several processes; writers take turns per table."""

    capabilities = CAPABILITIES

    def __init__(self, url: str, name: str):
        self.url = url
        self.name = name
        self._root = location.folder(url)
        self._held: dict[str, tuple[_State, bytes]] = {}

    # the table: creation, identity, shape

    def ensure(self, dataset: str, schema: Schema) -> str:
        evolution.check(dataset, schema)
        state = self._open(dataset)
        if state is None or state.schema != schema:
            folder = made(self._folder(dataset))
            with self._locked(dataset):
                state = self._open(dataset, locked=True)
                if state is None:
                    self._refuse_foreign(dataset)
                    (folder / _NEW).mkdir(exist_ok=True)
                    state = _State(dataset, 0, uuid.uuid4().hex, schema, {}, {})
                    write_whole(folder / _TABLE, _to_json(state))
                    for level in (folder, folder.parent, self._root, self._root.parent):
                        sync(level)
                elif state.schema != schema:
                    evolution.added(dataset, state.schema, schema)
                    # the header is in every file, so other columns, or another order of them, is every file anew
                    again = state.files if schema.names != state.schema.names else {}
                    whole = {name: (entry.subject, None) for name, entry in again.items()}
                    state = self._exchange(dataset, state, replace(state, schema=schema), whole)
        return state.marker

    def marker(self, dataset: str) -> str | None:
        state = self._open(dataset)
        return None if state is None else state.marker

    def schema(self, dataset: str) -> Schema | None:
        state = self._open(dataset)
        if state is None:
            self._refuse_foreign(dataset)
            return None
        return state.schema

    # writing

    def committed(self, dataset: str, lane: str) -> int:
        state = self._open(dataset)
        return 0 if state is None else state.lanes.get(lane, 0)

    def write(self, batch: Batch) -> Written:
        dataset = batch.dataset

        def decide(state: _State, kept: _Kept) -> tuple[_Change | None, Written]:
            if state.lanes.get(batch.lane, 0) >= batch.seq:
                return None, Written(already=True)
            frame = admission.admit(dataset, batch.frame, batch.schema, self.capabilities)
            frame, absent = evolution.fit(dataset, frame, batch.schema, state.schema)
            if batch.mode is Mode.APPEND:
                return _Change(_by_file(dataset, frame, state.schema)), Written(inserted=frame.height)
            there = self._with_keys(dataset, state, frame, kept)
            split = classify.split(frame, there, state.schema, absent=absent, tag=_FILE)
            written = split.written()
            return _change(dataset, state.schema, split, split.changed, split.tags), written

        return self._commit(dataset, decide, lane=batch.lane, seq=batch.seq)

    def replace(self, dataset: str, schema: Schema, frame: pl.DataFrame, span: Filter) -> Written:
        import polars as pl

        def decide(state: _State, kept: _Kept) -> tuple[_Change | None, Written]:
            put = admission.admit(dataset, frame, schema, self.capabilities)
            put, absent = evolution.fit(dataset, put, schema, state.schema)
            filters.refuse_outside(dataset, put, span, state.schema)
            there = self._with_keys(dataset, state, put, kept)
            split = classify.split(put, there, state.schema, absent=absent, tag=_FILE)
            key = list(state.schema.key)
            gone = self._found(dataset, state, span, kept).select(*key, _FILE).join(put, on=key, how="anti")
            written = split.written(deleted=gone.height)
            if not (split.put.height or gone.height):
                return None, written
            out = pl.concat([split.changed.select(key), gone.select(key)])
            return _change(dataset, state.schema, split, out, {*split.tags, *gone[_FILE].unique()}), written

        return self._commit(dataset, decide)

    # reading

    def scan(self, dataset: str, filter: Filter = Filter()) -> pl.LazyFrame:
        import polars as pl
        from polars.io.plugins import register_io_source

        state = self._table(dataset)
        names = filters.columns(dataset, filter, state.schema)
        types = state.schema.polars(system=True)
        condition = filters.expression(dataset, filter, state.schema)
        files = self._within(dataset, state, filter)
        since, _ = filters.bounds(dataset, filter, state.schema)

        def rows(
            columns: list[str] | None, predicate: pl.Expr | None, limit: int | None, _: int | None
        ) -> Iterator[pl.DataFrame]:
            # a file is read when its turn comes, as it is committed then
            left = limit
            for name in files:
                frame = self._rows(dataset, name, state.schema, since)
                if condition is not None:
                    frame = frame.filter(condition)
                if predicate is not None:
                    frame = frame.filter(predicate)
                frame = frame.select(columns) if columns is not None else frame
                if left is not None:
                    frame = frame.head(left)
                    left -= frame.height
                yield frame
                if left == 0:
                    return

        return register_io_source(rows, schema=pl.Schema(types)).select(names)

    def arrow(self, dataset: str, filter: Filter = Filter()) -> Iterator[pa.RecordBatch]:
        return lazyframes.arrow(self.scan(dataset, filter))

    def watermarks(self, dataset: str) -> dict[str, datetime | date]:
        state = self._table(dataset)
        if state.schema.time is None:
            return lazyframes.watermarks(self.scan(dataset), dataset, state.schema)
        newest: dict[str, datetime | date] = {}
        for entry in state.files.values():
            subject = lazyframes.EVERY_SUBJECT if state.schema.subject is None else entry.subject
            if entry.last is not None and subject is not None:
                newest[subject] = _moment(entry.last, state.schema)
        return newest

    def count(self, dataset: str, filter: Filter = Filter()) -> int:
        if filter.subjects is None and filter.since is None and filter.until is None:
            return sum(entry.rows for entry in self._table(dataset).files.values())
        return lazyframes.count(self.scan(dataset, filter))

    def fingerprints(self, dataset: str, recipe: fingerprints.Recipe, filter: Filter = Filter()) -> pl.DataFrame:
        return fingerprints.by_scan(self, dataset, recipe, filter)

    # the rest

    def delete(self, dataset: str, filter: Filter) -> int:
        def decide(state: _State, kept: _Kept) -> tuple[_Change | None, Written]:
            gone = self._found(dataset, state, filter, kept).select(*state.schema.key, _FILE)
            if gone.is_empty():
                return None, Written()
            out = _out(dataset, state.schema, gone, gone[_FILE].unique())
            return _Change(out=out), Written(deleted=gone.height)

        return self._commit(dataset, decide).deleted

    def datasets(self) -> list[str]:
        return sorted(f"{path.parent.parent.name}.{path.parent.name}" for path in self._root.glob(f"*/*/{_TABLE}"))

    def info(self, dataset: str) -> TableInfo:
        state = self._table(dataset)
        return TableInfo(
            dataset,
            rows=sum(entry.rows for entry in state.files.values()),
            bytes=sum(entry.size for entry in state.files.values()),
            files=len(state.files),
            commits=state.version + 1,
            location=str(self._folder(dataset)),
        )

    def version(self) -> str:
        return lazyframes.library("polars")

    def query(self, sql: str) -> pl.DataFrame:
        return lazyframes.query(sql, self.datasets(), self.scan)

    def maintain(self, dataset: str) -> str:
        with self._locked(dataset):
            state = self._table(dataset, locked=True)
            cut = sum(_cut(self._folder(dataset) / name, entry) for name, entry in state.files.items())
        return f"{dataset}: {len(state.files)} files looked at, {cut} bytes of writes that never ended cut off"

    def close(self) -> None:
        self._held.clear()

    def adopt(self, dataset: str, schema: Schema, wish: Wish) -> Adoption:
        """Copy CSV files into a table of ours (see `storage/adoption.py`): every value is a text that must say what its
        column's type is."""
        import polars as pl

        from storage import adoption_copies as copies

        with suppress(ForeignTable):
            if self._open(dataset) is not None:
                return copies.already(self, dataset, schema, wish, str(self._folder(dataset)))
        place, files = copies.found(self._root, dataset, wish, ".csv")
        with copies.reading(place):
            rows = pl.concat(
                [
                    pl.scan_csv(file, infer_schema=False, glob=False, include_file_paths=adoption.FILE_COLUMN)
                    for file in files
                ],
                how="diagonal",
            ).with_columns(copies.stem(adoption.FILE_COLUMN))
            return copies.copied(
                dataset,
                schema,
                wish,
                copies.files_source(str(place), rows),
                self.capabilities,
                lambda frames: copies.exchanged(
                    self._root,
                    dataset,
                    schema,
                    place,
                    lambda at: CsvStore(f"csv://{at}", ""),
                    ["/".join(location.split(dataset))],
                    frames,
                ),
            )

    # how it is done

    def _folder(self, dataset: str) -> Path:
        return location.below(self._root, dataset)

    def _locked(self, dataset: str):
        return locks.exclusive(self._folder(dataset) / _LOCK, f"the CSV table of {dataset}")

    def _open(self, dataset: str, *, locked: bool = False) -> _State | None:
        """Return the table as it is, or None when there is none; finishes what a writer that died left half done."""
        folder = self._folder(dataset)
        if locked:
            self._finish(dataset)
        elif (folder / _JOURNAL).exists():
            try:
                with locks.exclusive(folder / _LOCK, f"the CSV table of {dataset}", wait_seconds=0):
                    self._finish(dataset)
            except StoreError:
                pass  # its writer lives and will finish, or nobody can write here
        path = folder / _TABLE
        try:
            # compared whole: within one tick of the clock, time, size and even inode of two states can be the same
            text = path.read_bytes()
            held = self._held.get(dataset)
            if held is None or held[1] != text:
                first = held is None
                state = _from_json(text, dataset)
                adoption.refuse_copy(folder, state.dataset, dataset)
                held = self._held[dataset] = (state, text)
                if first:
                    self._cut_all(dataset, held[0], locked=locked)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StoreError(f"{path} cannot be read: {error}; restore it, or drop the table") from error
        return held[0]

    def _cut_all(self, dataset: str, state: _State, *, locked: bool) -> None:
        """Cut off, once per opening, what a writer that died left at the end of files, for other tools' sake."""
        folder = self._folder(dataset)
        if locked:
            for name, entry in state.files.items():
                _cut(folder / name, entry)
        elif any(_size(folder / name) > entry.size for name, entry in state.files.items()):
            try:
                with locks.exclusive(folder / _LOCK, f"the CSV table of {dataset}", wait_seconds=0):
                    self._finish(dataset)  # its writer may have died since we looked
                    current = _from_json((folder / _TABLE).read_bytes(), dataset)
                    if current.version == state.version:
                        self._cut_all(dataset, current, locked=True)
            except StoreError:
                pass  # it is being written, or cannot be

    def _refuse_foreign(self, dataset: str) -> None:
        folder = self._folder(dataset)
        if (foreign := next(folder.glob("*.csv"), None)) is not None:
            raise ForeignTable(
                f"{foreign} is in the way of the CSV table of {dataset}: no table of ours lists it; "
                f"{adoption.remedy(dataset)}; or move {folder} elsewhere"
            )

    def _table(self, dataset: str, *, locked: bool = False) -> _State:
        state = self._open(dataset, locked=locked)
        if state is None:
            raise location.absent("CSV table", dataset, self._folder(dataset))
        return state

    def _rows(self, dataset: str, name: str, schema: Schema, since: Any = None) -> pl.DataFrame:
        """Return the rows of one file as it is committed now, at least those from `since` on (None: all); none when
        the table does not have the file any more."""
        path = self._folder(dataset) / name
        for _ in range(2):
            entry = self._table(dataset).files.get(name)
            if entry is None:
                return _empty(schema)
            content = _content(path, entry, _mark_before(since, entry, schema))
            if content is not None:
                return _decoded(content, schema, path)
        # between our look at the table and at the file a writer changed the file: let it end
        with self._locked(dataset):
            state = self._table(dataset, locked=True)
            return self._own_rows(dataset, state, name, since).rows if name in state.files else _empty(schema)

    def _own_rows(self, dataset: str, state: _State, name: str, since: Any = None, kept: _Kept | None = None) -> _Piece:
        """Return the rows of one file of the table, at least those from `since` on (None: all), for who holds the
        lock, and has `kept` some since."""
        start = _mark_before(since, state.files[name], state.schema)
        if kept is not None and name in kept and kept[name].start == start:
            return kept[name]
        path = self._folder(dataset) / name
        content = _content(path, state.files[name], start)
        if content is None:
            raise _foreign(path)
        piece = _Piece(start, _decoded(content, state.schema, path))
        if kept is not None and sum(one.rows.height for one in kept.values()) + piece.rows.height <= _KEPT_ROWS:
            kept[name] = piece
        return piece

    def _within(self, dataset: str, state: _State, filter: Filter) -> list[str]:
        """Return the files that can hold a row of the filter."""
        since, until = filters.bounds(dataset, filter, state.schema)
        subjects = filters.subjects(dataset, filter, state.schema)
        wanted = None if subjects is None else set(subjects)
        return [
            name
            for name, entry in state.files.items()
            if (wanted is None or entry.subject in wanted) and _meets(since, until, entry, state.schema)
        ]

    def _found(self, dataset: str, state: _State, filter: Filter, kept: _Kept) -> pl.DataFrame:
        """Return the rows of the filter, with the name of each row's file."""
        condition = filters.expression(dataset, filter, state.schema)
        names = self._within(dataset, state, filter)
        since, _ = filters.bounds(dataset, filter, state.schema)

        def wanted(name: str) -> pl.DataFrame:
            rows = self._own_rows(dataset, state, name, since, kept).rows
            return rows if condition is None else rows.filter(condition)

        return self._tagged(state, names, wanted)

    def _with_keys(self, dataset: str, state: _State, frame: pl.DataFrame, kept: _Kept) -> pl.DataFrame:
        """Return the rows that have a key of the frame, with the name of each row's file."""
        schema = state.schema
        names, keys = list(state.files), frame.select(schema.key)
        of: dict[str | None, pl.DataFrame] | None = None
        if schema.subject is not None and schema.subject in schema.key:
            of = {subject: part for (subject,), part in keys.partition_by(schema.subject, as_dict=True).items()}
            names = [name for name in names if state.files[name].subject in of]
        if schema.time is not None and schema.time in schema.key and frame.height:
            low, high = frame[schema.time].min(), frame[schema.time].max()
            names = [name for name in names if _meets(low, high, state.files[name], schema)]

        def wanted(name: str) -> pl.DataFrame:
            # a file's rows meet the keys of its subject only, and not each file's those of the whole batch
            asked = keys if of is None else of[state.files[name].subject]
            rows = self._own_rows(dataset, state, name, _earliest(schema, [asked]), kept).rows
            return rows.join(asked, on=schema.key, how="semi")

        return self._tagged(state, names, wanted)

    def _tagged(self, state: _State, names: list[str], wanted: Callable[[str], pl.DataFrame]) -> pl.DataFrame:
        import polars as pl

        found = [_empty(state.schema).with_columns(pl.lit("").alias(_FILE))]
        return pl.concat(found + [wanted(name).with_columns(pl.lit(name).alias(_FILE)) for name in names])

    def _commit(
        self,
        dataset: str,
        decide: Callable[[_State, _Kept], tuple[_Change | None, Written]],
        *,
        lane: str | None = None,
        seq: int = 0,
    ) -> Written:
        """Take the table's lock, let `decide` say what to do, append or write anew, make it durable."""
        self._table(dataset)
        with self._locked(dataset):
            state = self._table(dataset, locked=True)
            kept: _Kept = {}
            change, written = decide(state, kept)
            if change is None:
                return written
            after = state if lane is None else replace(state, lanes={**state.lanes, lane: seq})
            whole: dict[str, tuple[str | None, pl.DataFrame | None]] = {}
            files, texts = dict(state.files), _Texts()
            for name, (subject, rows) in change.put.items():
                if name not in change.out and _follows(rows, state.files.get(name), state.schema):
                    files[name] = _appended(self._folder(dataset) / name, files[name], rows, state.schema, texts)
                else:
                    whole[name] = (subject, rows)
            for name in change.out:
                whole.setdefault(name, (state.files[name].subject, None))
            self._exchange(dataset, state, replace(after, files=files), whole, change.out, kept, texts)
        return written

    def _exchange(
        self,
        dataset: str,
        state: _State,
        after: _State,
        whole: Mapping[str, tuple[str | None, pl.DataFrame | None]],
        out: Mapping[str, pl.DataFrame] | None = None,
        kept: _Kept | None = None,
        texts: _Texts | None = None,
    ) -> _State:
        """Write each file of `whole` anew (its rows, without the keys in `out`, with the rows to put), and commit."""
        import polars as pl

        folder, key, texts = self._folder(dataset), list(after.schema.key), texts or _Texts()
        types = after.schema.polars(system=True)
        same = state.schema.names == after.schema.names
        files, put, drop, tails = dict(after.files), [], [], []
        (folder / _NEW).mkdir(exist_ok=True)  # what takes files from place to place may leave empty folders out
        for name, (subject, rows) in whole.items():
            gone = (out or {}).get(name)
            frames = [] if rows is None else [rows]
            start, left, old = _START, 0, state.files.get(name)
            if old is not None:
                since = _earliest(after.schema, [*frames, *([] if gone is None else [gone])]) if same else None
                start, there = self._own_rows(dataset, state, name, since, kept)
                left = old.rows - there.height
                if gone is not None:
                    there = there.join(gone, on=key, how="anti")
                if not same:
                    there = there.select(
                        pl.col(column) if column in there.columns else pl.lit(None, type_).alias(column)
                        for column, type_ in types.items()
                    )
                frames.append(there)
            together = _in_order(pl.concat(frames), after.schema)
            if together.is_empty():  # and so is the file: the row at a mark is earlier than any that goes
                drop.append(name)
                files.pop(name, None)
                continue
            content = _encoded(together, texts, header=start is _START)
            if start is _START:
                (folder / _NEW / name).write_bytes(content)
                sync(folder / _NEW / name)
                put.append(name)
            else:
                with open(folder / _NEW / _TAILS, "ab") as file:
                    file.write(content)
                tails.append([name, start.offset, len(content)])
            new = _entry(subject, start, content, together, after.schema, [] if old is None else old.marks)
            if old is not None and start is not _START:
                new = replace(new, rows=left + new.rows, since=old.since, base=old.base)
            files[name] = new
        after = replace(after, version=state.version + 1, files=files)
        if put or drop or tails:
            if tails:
                sync(folder / _NEW / _TAILS)
            sync(folder / _NEW)
            journal = {"put": put, "drop": drop, "tails": tails, "table": json.loads(_to_json(after))}
            write_whole(folder / _JOURNAL, json.dumps(journal, ensure_ascii=False).encode())
            self._finish(dataset)
        else:
            write_whole(folder / _TABLE, _to_json(after))
        return after

    def _finish(self, dataset: str) -> None:
        """Do what the journal says, as often as it takes; without a journal, forget files that were never committed."""
        folder = self._folder(dataset)
        journal = folder / _JOURNAL
        if journal.exists():
            plan = json.loads(journal.read_bytes())
            for name in plan["put"]:
                if (folder / _NEW / name).exists():
                    os.replace(folder / _NEW / name, folder / name)
            for name in plan["drop"]:
                (folder / name).unlink(missing_ok=True)
            if plan.get("tails"):
                with open(folder / _NEW / _TAILS, "rb") as tails:
                    for name, offset, length in plan["tails"]:
                        _end_with(folder / name, offset, tails.read(length))
            sync(folder)
            write_whole(folder / _TABLE, json.dumps(plan["table"], ensure_ascii=False).encode())
            for name, _, _ in plan.get("tails", ()):  # not before: until here, readers had to wait
                if (folder / name).exists():
                    sync(folder / name)
            journal.unlink()
            sync(folder)  # before anything that this journal would be wrong for
        if (folder / _NEW).is_dir():
            for leftover in (folder / _NEW).iterdir():
                leftover.unlink()


def open_url(url: str, name: str) -> CsvStore:
    """Return the store of the URL; the folder is made when the first table is."""
    return CsvStore(url, name)


def file_name(dataset: str, subject: str | None) -> str:
    """Return the name of a subject's file (None: of the only file of a table without subjects)."""
    if subject is None:
        return f"{location.split(dataset)[1]}.csv"
    if _PLAIN.fullmatch(subject) and not _DEVICES.fullmatch(subject):
        return f"{subject}.csv"
    readable = re.sub(r"[^A-Za-z0-9.-]+", "_", subject)[:40].strip("._")
    return f"{readable}~{hashlib.sha256(subject.encode()).hexdigest()[:16]}.csv"


def _by_file(dataset: str, frame: pl.DataFrame, schema: Schema) -> dict[str, tuple[str | None, pl.DataFrame]]:
    if frame.is_empty():
        return {}
    if schema.subject is None:
        return {file_name(dataset, None): (None, frame)}
    parts = frame.partition_by(schema.subject, maintain_order=True, as_dict=True)
    return {
        _NULL_FILE if subject is None else file_name(dataset, str(subject)): (subject, rows)
        for (subject,), rows in parts.items()
    }


def _change(dataset: str, schema: Schema, split: classify.Split, out: pl.DataFrame, files: Iterable[str]) -> _Change:
    return _Change(_by_file(dataset, split.put, schema), _out(dataset, schema, out, files))


def _out(dataset: str, schema: Schema, keys: pl.DataFrame, files: Iterable[str]) -> dict[str, pl.DataFrame]:
    """Return for each of these files, in which all of the keys are, those that can be in it."""
    if schema.subject is not None and schema.subject not in schema.key:
        return dict.fromkeys(files, keys)
    of = _by_file(dataset, keys, schema)
    return {name: of[name][1] for name in files}


def _earliest(schema: Schema, frames: Iterable[pl.DataFrame]) -> Any:
    """Return the earliest time of rows or keys; None where rows with these keys may have another time."""
    if schema.time is None or schema.time not in schema.key:
        return None
    times: list[Any] = [frame[schema.time].min() for frame in frames if frame.height]
    return min(times, default=None)


def _in_order(rows: pl.DataFrame, schema: Schema) -> pl.DataFrame:
    """Return the rows of one file by time, then by the rest of the key."""
    one_each = set(schema.key) <= {schema.time, schema.subject}  # row of a file at a time
    if one_each and schema.time is not None and rows[schema.time].is_sorted():
        return rows
    return rows.sort(list(dict.fromkeys(name for name in (schema.time, *schema.key) if name is not None)))


def _follows(rows: pl.DataFrame, entry: _Entry | None, schema: Schema) -> bool:
    """Tell whether all rows are later than the last one of the file, so that they can be appended to it."""
    if entry is None or schema.time is None or entry.last is None:
        return False
    first: Any = rows[schema.time].min()
    return first is not None and not rows[schema.time].has_nulls() and first > _moment(entry.last, schema)


def _appended(path: Path, entry: _Entry, rows: pl.DataFrame, schema: Schema, texts: _Texts) -> _Entry:
    """Append the rows to the file, durably; they are committed when the table says that it is so long."""
    content = _encoded(_in_order(rows, schema), texts, header=False)
    _cut(path, entry)
    if _size(path) != entry.size:
        raise _foreign(path)
    with open(path, "r+b") as file:
        if not _as_left(file, entry):
            raise _foreign(path)
        file.seek(entry.size)
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    end = _Mark(entry.size, entry.crc, None)
    new = _entry(entry.subject, end, content, rows, schema, entry.marks)
    return replace(new, rows=entry.rows + rows.height, since=entry.since, base=entry.base)


def _end_with(path: Path, offset: int, content: bytes) -> None:
    """Put the content in the place of all that stands in the file from the offset on."""
    with suppress(FileNotFoundError), open(path, "r+b") as file:  # who reads it is told that it is gone
        file.seek(offset)
        file.write(content)
        file.truncate()


def _entry(
    subject: str | None, start: _Mark, content: bytes, rows: pl.DataFrame, schema: Schema, marks: Sequence[_Mark]
) -> _Entry:
    """Return the entry of a file whose content from `start` on is this, these rows, and that had these marks."""
    size, time = start.offset + len(content), schema.time
    if time is None:
        return _Entry(subject, size, rows.height, None, None, zlib.crc32(content, start.crc), 0, ())
    marks, crc, at, view = [mark for mark in marks if mark.offset < start.offset], start.crc, 0, memoryview(content)
    for begin in _beginnings(content, header=start is _START):
        crc, at = zlib.crc32(view[at:begin], crc), begin
        if since := _field(content, begin, schema.names.index(time)):
            marks.append(_Mark(start.offset + begin, crc, since))
    since, last = _instant(rows[time].min()), _instant(rows[time].max())
    return _Entry(subject, size, rows.height, since, last, zlib.crc32(view[at:], crc), 0, _thinned(marks, size))


def _beginnings(content: bytes, *, header: bool) -> Iterator[int]:
    """Yield where rows begin: the first one, if no header is before it, and those that are about as far from the end as
    marks are to be."""
    if not header:
        yield 0
    places, after = [], _MARK_BYTES
    while after < len(content):
        places.append(len(content) - after)
        after *= _MARK_TIMES
    at = 0
    for place in reversed(places):
        if at <= place and (at := _past(content, b"\n", at, place)) < len(content):
            yield at


def _field(content: bytes, at: int, number: int) -> str:
    """Return a field of the row that begins there; one that is never quoted and not the last one."""
    for _ in range(number):
        at = _past(content, b",", at, at)
    return content[at : content.index(b",", at)].decode()


def _past(content: bytes, separator: bytes, at: int, place: int) -> int:
    """Return where the first separator ends that is at the place or later and not within quotation marks, of which
    none is open at `at`."""
    inside = False
    while at <= place or inside:
        end = content.index(separator, max(at, place)) + 1
        inside ^= content.count(b'"', at, end) % 2 == 1
        at = end
    return at


def _thinned(marks: Sequence[_Mark], size: int) -> list[_Mark]:
    """Return as many of the marks as it takes for each row to have one before it that is not much farther from the
    end."""
    kept: list[_Mark] = []
    after = 0
    for number in reversed(range(len(marks))):
        farther = size - (marks[number - 1].offset if number else 0)
        if farther > max(_MARK_BYTES, _MARK_TIMES * after):
            kept.append(marks[number])
            after = size - marks[number].offset
    return kept[::-1]


def _mark_before(since: Any, entry: _Entry, schema: Schema) -> _Mark:
    """Return the last mark before all rows of the time or later; the file's beginning for None and where the mark
    would not save half of the file."""
    if since is not None:
        for mark in reversed(entry.marks):
            if 2 * mark.offset < entry.size:
                break
            # earlier, not at: rows before the mark may have the time of the row at it
            if mark.since is not None and _moment(mark.since, schema) < since:
                return mark
    return _START


def _instant(value: Any) -> str | None:
    return None if value is None else value.isoformat()


def _moment(text: str, schema: Schema) -> Any:
    days = schema.time is not None and schema[schema.time].type is ColumnType.DATE
    return date.fromisoformat(text) if days else datetime.fromisoformat(text)


def _meets(low: Any, high: Any, entry: _Entry, schema: Schema) -> bool:
    """Tell whether a row of the file can be within [low, high]; None is no bound."""
    if entry.since is None or entry.last is None:
        return True
    since, last = _moment(entry.since, schema), _moment(entry.last, schema)
    if isinstance(last, datetime) and last.year < MAXYEAR:
        last += timedelta(microseconds=1)  # Python cuts nanoseconds
    return (low is None or low <= last) and (high is None or since <= high)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return -1


def _cut(path: Path, entry: _Entry) -> int:
    """Cut off what was never committed, and return how many bytes; leaves a file alone that is not as we left it."""
    extra = _size(path) - entry.size
    if extra <= 0:
        return 0
    with open(path, "r+b") as file:
        if not _as_left(file, entry):
            return 0
        file.truncate(entry.size)
        os.fsync(file.fileno())
    return extra


def _as_left(file: BinaryIO, entry: _Entry) -> bool:
    """Tell, by the last committed bytes, whether the file is the one that the entry describes."""
    return _read(file, entry, entry.marks[-1] if entry.marks else _Mark(entry.base, 0, None)) is not None


def _content(path: Path, entry: _Entry, start: _Mark) -> bytes | None:
    """Return the header and the committed bytes from `start` on; None when the file is another than the entry
    describes."""
    try:
        with open(path, "rb") as file:
            header = file.readline() if start.offset else b""
            content = _read(file, entry, start)
            return None if content is None else header + content
    except FileNotFoundError:
        return None


def _read(file: BinaryIO, entry: _Entry, start: _Mark) -> bytes | None:
    """Return the committed bytes from `start` on; None when they are not those that the entry describes."""
    file.seek(start.offset)
    content = file.read(entry.size - start.offset)
    summed = memoryview(content)[max(0, entry.base - start.offset) :]
    whole = len(content) == entry.size - start.offset
    return content if whole and zlib.crc32(summed, start.crc) == entry.crc else None


def _foreign(path: Path) -> StoreError:
    return StoreError(
        f"{path} is not as MarketSync left it: another program changed it; restore it, or delete the table's folder "
        "and let it be filled again"
    )


class _Texts:
    """Times as text, which take longer to write than all else of a row, where the files of a commit often have the same
    ones: those of the last column that was not among them are kept."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[pl.Series, pl.Series]] = {}

    def of(self, times: pl.Series, form: str) -> pl.Series:
        numbers = times.to_physical()
        if times.has_nulls() or not times.len():
            return times.dt.strftime(form)
        if numbers.min() == numbers.max():
            return times.head(1).dt.strftime(form).new_from_index(0, times.len())
        if (found := self._found(numbers, form)) is not None:
            return found.alias(times.name)
        runs = times.rle_id()
        if runs[-1] <= times.len() // 4:
            return times.filter(runs.diff().fill_null(1) != 0).dt.strftime(form).gather(runs).alias(times.name)
        texts = times.dt.strftime(form)
        if numbers.is_sorted():
            self._known[form] = numbers, texts
        return texts

    def _found(self, numbers: pl.Series, form: str) -> pl.Series | None:
        if form not in self._known:
            return None
        known, texts = self._known[form]
        first = known.search_sorted(numbers[0])
        same = known.slice(first, numbers.len()).equals(numbers)
        return texts.slice(first, numbers.len()) if same else None


def _encoded(rows: pl.DataFrame, texts: _Texts, *, header: bool) -> bytes:
    import polars as pl

    forms: dict[pl.DataType, str] = {
        pl.Datetime("us", "UTC"): "%Y-%m-%dT%H:%M:%S%.6fZ",
        pl.Datetime("ns", "UTC"): "%Y-%m-%dT%H:%M:%S%.9fZ",
    }
    buffer = io.BytesIO()
    rows.with_columns(
        texts.of(rows[name], forms[type_]) for name, type_ in rows.schema.items() if type_ in forms
    ).write_csv(buffer, include_header=header)
    return buffer.getvalue()


def _decoded(content: bytes, schema: Schema, path: Path) -> pl.DataFrame:
    import polars as pl

    times = {c.name: c.type for c in schema.columns if c.type in (ColumnType.DATETIME, ColumnType.DATETIME_NS)}
    times[INGESTED_COLUMN] = ColumnType.DATETIME
    types = {name: pl.String() if name in times else type_ for name, type_ in schema.polars(system=True).items()}
    try:
        there = {name: types.get(name, pl.String()) for name in _header(content)}
        # skip_rows and not skip_lines, after which polars takes a first text of U+FEFF for the mark of a file
        rows = pl.read_csv(content, has_header=False, skip_rows=1, schema=there)
        return rows.select(
            pl.col(name)
            if name not in times
            else pl.col(name)
            .str.head(-1)
            .str.to_datetime(
                "%Y-%m-%dT%H:%M:%S%.f", time_unit="us" if times[name] is ColumnType.DATETIME else "ns", strict=True
            )
            .dt.replace_time_zone("UTC")
            for name in types
        )
    except pl.exceptions.PolarsError as error:
        raise StoreError(f"{path} cannot be read as the table's schema says: {error}") from error


def _header(content: bytes) -> list[str]:
    """Return the names of a file's columns; polars would give a quotation mark in a name back doubled."""
    return next(csv.reader([content[: content.index(b"\n")].decode()]))


def _empty(schema: Schema) -> pl.DataFrame:
    import polars as pl

    return pl.DataFrame(schema=schema.polars(system=True))


def _to_json(state: _State) -> bytes:
    return json.dumps(
        {
            "dataset": state.dataset,
            "version": state.version,
            "marker": state.marker,
            "schema": json.loads(evolution.to_text(state.schema)),
            "lanes": dict(state.lanes),
            "files": {
                name: [*(getattr(entry, field.name) for field in fields(entry))] for name, entry in state.files.items()
            },
        },
        ensure_ascii=False,
    ).encode()


def _from_json(text: bytes, dataset: str) -> _State:
    data = json.loads(text)
    of = data.get("dataset", dataset)  # earlier ones do not say it
    schema = evolution.from_text(json.dumps(data["schema"], ensure_ascii=False))
    files = {name: _entry_of(*values) for name, values in data["files"].items()}
    return _State(of, data["version"], data["marker"], schema, data["lanes"], files)


def _entry_of(
    subject: str | None,
    size: int,
    rows: int,
    since: str | None,
    last: str | None,
    crc: int,
    base: int | None = None,
    marks: Sequence[Sequence[Any]] = (),
) -> _Entry:
    base = max(0, size - _OLD_BASE) if base is None else base
    return _Entry(subject, size, rows, since, last, crc, base, [_Mark(*mark) for mark in marks])
