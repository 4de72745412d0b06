"""Plain Parquet files in a folder: `parquet://./folder`, in `<folder>/<provider>/<dataset>/period=2001/*.parquet`.

Any tool reads the folder of a dataset as a hive-partitioned table; nothing but Parquet is in it. What we know of a
table (marker, schema, lanes, the list of its parts) is beside it, in `<folder>/_marketsync/<provider>.<dataset>/`.

`state.json` there is the table for us: it is replaced in one step after the new parts are durable, so our readers see
all of a batch or nothing, and rows and `seq` become durable together. `pending.json` names what a write puts into and
takes out of the folder; after a crash the next opening finishes that, so that other tools see no row twice for long.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import astuple, dataclass, replace
from datetime import date, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import unquote

from marketsync.errors import ForeignTable, StoreDamaged, StoreError
from marketsync.schema import ColumnType, Schema
from storage import admission, adoption, evolution, fingerprints, lazyframes, location, locks
from storage.adoption import Adoption, Wish
from storage.files import made, sync, write_whole
from storage.parts import LOOK_EVERY_COMMITS, Change, Part, Parts, describe, encode
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
    why="atomic: our own scans see all of a batch or nothing, but another tool that lists the folder while a write is "
    "applied can see old and new files together, and files that an upsert replaced are gone for a scan that was made "
    "before and is collected after; use delta:// when others read while we write. "
    "transactions: a batch is one step, several batches are not; use delta:// for that.",
)

_OURS = "_marketsync"
_STATE = "state.json"
_PENDING = "pending.json"
_TEMPORARY = "new"
_LOOKS = 3

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class _State:
    """One table as `state.json` has it."""

    dataset: str
    version: int
    marker: str
    schema: Schema
    lanes: dict[str, int]
    parts: tuple[Part, ...]


class ParquetStore:
    """A folder of Parquet tables. Safe for several threads and several processes; writers take turns per table."""

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
            made(self._ours(dataset))
            with self._locked(dataset):
                state = self._open(dataset, locked=True)
                if state is None:
                    state = _State(dataset, 0, uuid.uuid4().hex, schema, {}, ())
                    shutil.rmtree(self._ours(dataset) / _TEMPORARY, ignore_errors=True)
                    (self._ours(dataset) / _TEMPORARY).mkdir()
                    folder = self._folder(dataset)
                    folder.mkdir(parents=True, exist_ok=True)
                    self._refuse_foreign(dataset)
                    for level in (self._ours(dataset).parent, folder, folder.parent, self._root, self._root.parent):
                        sync(level)
                elif state.schema != schema:
                    evolution.added(dataset, state.schema, schema)
                    state = replace(state, version=state.version + 1, schema=schema)
                self._save(dataset, state)
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
        def decide(state: _State) -> tuple[Change | None, Written]:
            if state.lanes.get(batch.lane, 0) >= batch.seq:
                return None, Written(already=True)
            frame = admission.admit(batch.dataset, batch.frame, batch.schema, self.capabilities)
            frame, absent = evolution.fit(batch.dataset, frame, batch.schema, state.schema)
            parts = self._parts(batch.dataset, state)
            return parts.append(frame) if batch.mode is Mode.APPEND else parts.upsert(frame, absent)

        return self._commit(batch.dataset, decide, lane=batch.lane, seq=batch.seq)

    def replace(self, dataset: str, schema: Schema, frame: pl.DataFrame, span: Filter) -> Written:
        def decide(state: _State) -> tuple[Change | None, Written]:
            put = admission.admit(dataset, frame, schema, self.capabilities)
            put, absent = evolution.fit(dataset, put, schema, state.schema)
            return self._parts(dataset, state).replace(put, absent, span)

        return self._commit(dataset, decide)

    # reading

    def scan(self, dataset: str, filter: Filter = Filter()) -> pl.LazyFrame:
        return self._undisturbed([dataset], lambda: self._now(dataset).scan(filter))

    def arrow(self, dataset: str, filter: Filter = Filter()) -> Iterator[pa.RecordBatch]:
        def opened() -> tuple[Parts, Iterator[pa.RecordBatch], pa.RecordBatch | None]:
            parts = self._now(dataset)
            with parts.reading():
                batches = lazyframes.arrow(parts.scan(filter))
                return parts, batches, next(batches, None)

        before = self._versions([dataset])
        parts, batches, first = self._undisturbed([dataset], opened)
        if first is not None:
            yield first
        try:
            with parts.reading():
                yield from batches
        except StoreDamaged as error:
            if self._versions([dataset]) == before:
                raise
            raise StoreError(
                f"the table of {dataset} in {parts.folder} was rewritten while it was read, and files that were to "
                "come are gone; read it again when its writer is done, or keep it in delta://, where readers and "
                "writers do not meet"
            ) from error

    def watermarks(self, dataset: str) -> dict[str, datetime | date]:
        def newest() -> dict[str, datetime | date]:
            parts = self._now(dataset)
            with parts.reading():
                return lazyframes.watermarks(parts.scan(Filter()), dataset, parts.schema)

        return self._undisturbed([dataset], newest)

    def count(self, dataset: str, filter: Filter = Filter()) -> int:
        return self._undisturbed([dataset], lambda: self._now(dataset).count(filter))

    def fingerprints(self, dataset: str, recipe: fingerprints.Recipe, filter: Filter = Filter()) -> pl.DataFrame:
        def made() -> pl.DataFrame:
            with self._now(dataset).reading():
                return fingerprints.by_scan(self, dataset, recipe, filter)

        return self._undisturbed([dataset], made)

    # the rest

    def delete(self, dataset: str, filter: Filter) -> int:
        return self._commit(dataset, lambda state: self._parts(dataset, state).delete(filter)).deleted

    def datasets(self) -> list[str]:
        return sorted(state.parent.name for state in (self._root / _OURS).glob(f"*/{_STATE}"))

    def info(self, dataset: str) -> TableInfo:
        state = self._table(dataset)
        return TableInfo(
            dataset,
            rows=sum(part.rows or 0 for part in state.parts),
            bytes=sum(part.size for part in state.parts),
            files=len(state.parts),
            commits=state.version + 1,
            location=str(self._folder(dataset)),
        )

    def version(self) -> str:
        return lazyframes.library("polars")

    def query(self, sql: str) -> pl.DataFrame:
        def answered() -> pl.DataFrame:
            with lazyframes.reading("a table that the query names", self._root):
                return lazyframes.query(sql, self.datasets(), self.scan)

        return self._undisturbed(self.datasets(), answered)

    def maintain(self, dataset: str) -> str:
        with self._locked(dataset):
            before = self._table(dataset, locked=True)
            change = self._parts(dataset, before).merge_all()
            after = before if change is None else self._apply(dataset, before, change, uuid.uuid4().hex)
        return f"{dataset}: {len(before.parts)} files became {len(after.parts)}"

    def close(self) -> None:
        self._held.clear()

    def adopt(self, dataset: str, schema: Schema, wish: Wish) -> Adoption:
        """Copy Parquet files into a table of ours (see `storage/adoption.py`)."""
        import polars as pl

        from storage import adoption_copies as copies

        with suppress(ForeignTable):
            if self._open(dataset) is not None:
                return copies.already(self, dataset, schema, wish, str(self._folder(dataset)))
        place, files = copies.found(self._root, dataset, wish, ".parquet")
        parts = [f"{_OURS}/{dataset}", "/".join(location.split(dataset))]

        def read(files: list[Path], hive: Sequence[str]) -> pl.LazyFrame:
            return pl.scan_parquet(
                files,
                # what a folder's name says is text: 000001 would be the number 1
                hive_schema=dict.fromkeys(hive, pl.String()) if hive else None,
                hive_partitioning=bool(hive),
                include_file_paths=adoption.FILE_COLUMN,
                glob=False,
            ).with_columns(copies.stem(adoption.FILE_COLUMN))

        with copies.reading(place):
            # polars takes the types of the first file for those of all, times without a zone for times with its zone
            alike: dict[tuple[Sequence[str], frozenset[str]], list[Path]] = {}
            for file in files:
                folders = file.relative_to(place).parts[:-1]
                hive = tuple(sorted({part.partition("=")[0] for part in folders if "=" in part}))
                columns = frozenset(f"{name} {type_!r}" for name, type_ in pl.read_parquet_schema(file).items())
                alike.setdefault((hive, columns), []).append(file)
            return copies.copied(
                dataset,
                schema,
                wish,
                copies.files_source(str(place), *(read(some, hive) for (hive, _), some in alike.items())),
                self.capabilities,
                lambda frames: copies.exchanged(
                    self._root, dataset, schema, place, lambda at: ParquetStore(f"parquet://{at}", ""), parts, frames
                ),
            )

    # how it is done

    def _folder(self, dataset: str) -> Path:
        return location.below(self._root, dataset)

    def _ours(self, dataset: str) -> Path:
        location.below(self._root, dataset)
        return self._root / _OURS / dataset

    def _locked(self, dataset: str):
        return locks.exclusive(self._ours(dataset) / "lock", f"the Parquet table of {dataset}")

    def _open(self, dataset: str, *, locked: bool = False) -> _State | None:
        """Return the table as it is, or None when there is none; finishes what a writer that died left half done."""
        ours = self._ours(dataset)
        if locked:
            state = self._load(dataset)
            if state is not None:
                self._finish(dataset, state)
            return state
        if (ours / _PENDING).exists():
            try:
                with locks.exclusive(ours / "lock", f"the Parquet table of {dataset}", wait_seconds=0):
                    return self._open(dataset, locked=True)
            except StoreError:
                pass  # its writer lives and will finish, or nobody can write here; the state is whole at every instant
        return self._load(dataset)

    def _load(self, dataset: str) -> _State | None:
        path = self._ours(dataset) / _STATE
        try:
            # compared whole: within one tick of the clock, time, size and even inode of two states can be the same
            text = path.read_bytes()
            held = self._held.get(dataset)
            if held is None or held[1] != text:
                held = (_from_json(text, dataset), text)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StoreError(f"{path} cannot be read: {error}; restore it, or drop the table") from error
        # who drops a table by hand removes its folder, and may not know of ours
        folder, state = self._folder(dataset), held[0]
        adoption.refuse_copy(folder, state.dataset, dataset)
        if not folder.is_dir():
            return None
        if dataset not in self._held and state.parts and not (folder / unquote(state.parts[-1].path)).exists():
            if path.read_bytes() != held[1]:
                return self._load(dataset)  # its writer replaced the part between the two looks
            raise StoreError(
                f"{folder} is not the folder that {path} describes: {state.parts[-1].path} is missing; put the folder "
                "back, or remove both and let the table be filled again"
            )
        self._held[dataset] = held
        return state

    def _refuse_foreign(self, dataset: str) -> None:
        folder = self._folder(dataset)
        if (foreign := next(folder.rglob("*.parquet"), None)) is not None:
            raise ForeignTable(
                f"{foreign} is in the way of the Parquet table of {dataset}: no table of ours lists it; "
                f"{adoption.remedy(dataset)}; or move {folder} elsewhere"
            )

    def _table(self, dataset: str, *, locked: bool = False) -> _State:
        state = self._open(dataset, locked=locked)
        if state is None:
            raise location.absent("Parquet table", dataset, self._folder(dataset))
        return state

    def _versions(self, datasets: Sequence[str]) -> list[tuple[str, int] | None]:
        def version(dataset: str) -> tuple[str, int] | None:
            with suppress(ForeignTable):  # one that nobody asks for, or who does is told
                state = self._open(dataset)
                return None if state is None else (state.marker, state.version)

        return [version(dataset) for dataset in datasets]

    def _undisturbed(self, datasets: Sequence[str], ask: Callable[[], Answer]) -> Answer:
        """Return what `ask` reads of the tables: it is asked again when a writer took files away under it, and at last
        with their writers kept out."""
        for _ in range(_LOOKS):
            before = self._versions(datasets)
            try:
                return ask()
            except StoreDamaged:
                if self._versions(datasets) == before:
                    raise
        with ExitStack() as stack:
            for dataset in sorted(datasets):
                stack.enter_context(self._locked(dataset))
            return ask()

    def _now(self, dataset: str) -> Parts:
        return self._parts(dataset, self._table(dataset))

    def _parts(self, dataset: str, state: _State) -> Parts:
        return Parts(dataset, self._folder(dataset), state.schema, state.schema.polars(system=True), state.parts)

    def _commit(
        self,
        dataset: str,
        decide: Callable[[_State], tuple[Change | None, Written]],
        *,
        lane: str | None = None,
        seq: int = 0,
    ) -> Written:
        """Take the table's lock, let `decide` say what to do, and do it."""
        self._table(dataset)
        with self._locked(dataset):
            state = self._table(dataset, locked=True)
            change, written = decide(state)
            if change is None:
                return written
            stem = uuid.uuid4().hex
            if lane is not None:
                # a batch that is written again has the same names and overwrites what its first try may have left
                stem = f"{hashlib.sha256(lane.encode()).hexdigest()[:12]}-{seq}"
                state = replace(state, lanes={**state.lanes, lane: seq})
            state = self._apply(dataset, state, change, stem)
            if state.version % LOOK_EVERY_COMMITS == 0:
                merge = self._parts(dataset, state).merge_gathered(written.inserted + written.updated)
                if merge is not None:
                    self._apply(dataset, state, merge, uuid.uuid4().hex)
        return written

    def _apply(self, dataset: str, state: _State, change: Change, stem: str) -> _State:
        """Make the parts, put them into the folder, make the new state the table, take replaced parts out."""
        folder, ours = self._folder(dataset), self._ours(dataset)
        new: dict[Path, Part] = {}
        for number, (period, rows) in enumerate(change.pieces()):
            name = f"{stem}-{number}.parquet"
            content = encode(rows)
            temporary = ours / _TEMPORARY / name
            temporary.write_bytes(content)
            path = name if period is None else f"period={period}/{name}"
            new[temporary] = describe(path, len(content), rows, period, state.schema)
        for temporary in new:
            sync(temporary)
        after = replace(
            state,
            version=state.version + 1,
            parts=(*(part for part in state.parts if part not in set(change.remove)), *new.values()),
        )
        if new or change.remove:
            put, out = [part.path for part in new.values()], [part.path for part in change.remove]
            write_whole(ours / _PENDING, json.dumps([*put, *out]).encode())
            for temporary, part in new.items():
                (folder / part.path).parent.mkdir(exist_ok=True)
                os.replace(temporary, folder / part.path)
            for level in {(folder / part.path).parent for part in new.values()} | {folder}:
                sync(level)
        self._save(dataset, after)
        self._finish(dataset, after)
        return after

    def _save(self, dataset: str, state: _State) -> None:
        write_whole(self._ours(dataset) / _STATE, _to_json(state))

    def _finish(self, dataset: str, state: _State) -> None:
        """Take out of the folder what the last write named and the table does not have: old parts, or half a write."""
        ours, folder = self._ours(dataset), self._folder(dataset)
        (ours / _TEMPORARY).mkdir(exist_ok=True)  # what takes files from place to place may leave empty folders out
        for leftover in (ours / _TEMPORARY).iterdir():
            leftover.unlink()
        pending = ours / _PENDING
        if pending.exists():
            kept = {part.path for part in state.parts}
            for path in json.loads(pending.read_bytes()):
                if path not in kept:
                    (folder / unquote(path)).unlink(missing_ok=True)
            pending.unlink()


def open_url(url: str, name: str) -> ParquetStore:
    """Return the store of the URL; the folder is made when the first table is."""
    return ParquetStore(url, name)


def _to_json(state: _State) -> bytes:
    def plain(value: Any) -> Any:
        return value.isoformat() if isinstance(value, date) else value

    return json.dumps(
        {
            "dataset": state.dataset,
            "version": state.version,
            "marker": state.marker,
            "schema": json.loads(evolution.to_text(state.schema)),
            "lanes": state.lanes,
            "parts": [[plain(value) for value in astuple(part)] for part in state.parts],
        },
        ensure_ascii=False,
    ).encode()


def _from_json(text: bytes, dataset: str) -> _State:
    data = json.loads(text)
    of = data.get("dataset", dataset)  # earlier ones do not say it
    schema = evolution.from_text(json.dumps(data["schema"], ensure_ascii=False))
    days = schema.time is not None and schema[schema.time].type is ColumnType.DATE
    moment = date.fromisoformat if days else datetime.fromisoformat

    def part(path, size, rows, period, since, last, first_subject, last_subject) -> Part:
        since, last = (None if at is None else moment(at) for at in (since, last))
        return Part(path, size, rows, period, since, last, first_subject, last_subject)

    parts = tuple(part(*fields) for fields in data["parts"])
    return _State(of, data["version"], data["marker"], schema, data["lanes"], parts)
