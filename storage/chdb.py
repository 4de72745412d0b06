"""ClickHouse inside this process: `chdb://./folder`, through clickhouse-connect and chDB. The tables are those of
`storage/clickhouse.py`.

chDB serves one process, and in it one folder at a time: the stores of a folder in this process are counted, and an
owner lock in the folder names the process that has it. Nothing of this works in a fork of that process.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from marketsync.errors import StoreBusy, StoreError
from storage import clickhouse, location, locks
from storage.clickhouse import ClickHouseStore, Server
from storage.clickhouse_adoption import literal, quoted
from storage.files import made
from storage.protocol import Writers

if TYPE_CHECKING:
    import polars as pl
    from clickhouse_connect.driver.client import Client
    from filelock import FileLock

CAPABILITIES = replace(
    clickhouse.CAPABILITIES,
    writers=Writers.ONE_PROCESS,
    why=f"{clickhouse.CAPABILITIES.why} "
    "writers: the engine inside a process has its folder for itself; use one process, delta://, or a server.",
)

_LOCK = "_marketsync.lock"
_OWNER_SECONDS = 1.0  # whoever has just taken it has yet to write down its name, or is about to end
# inserts of as many rows leave the engine with memory that is worth giving back
_MANY_ROWS = 250_000


class _Engine(Server):
    """The engine of this process, with how many stores use it."""

    def __init__(self, folder: Path, owner: FileLock):
        super().__init__(str(folder), {"interface": "chdb", "path": str(folder)})
        self.folder = folder
        self.owner = owner
        self.process = os.getpid()
        self.stores = 0
        self._inserted = 0  # rows, since the engine gave memory back

    def client(self, *, reads: bool = False) -> Client:
        if self.process != os.getpid():
            raise StoreError(
                f"the chDB store {self.folder} was opened before this process was forked, and its engine does not "
                "survive a fork; start processes with the spawn method and open the store in each"
            )
        return super().client(reads=reads)

    def insert(self, table: str, rows: pl.DataFrame) -> None:
        import polars as pl

        columns = ", ".join(map(quoted, rows.columns))
        # the engine reads a file in any case; the client would be given the bytes to write them to one
        with tempfile.NamedTemporaryFile(suffix=".arrow") as file, clickhouse.told("an insert"):
            rows.write_ipc_stream(file.name, compat_level=pl.CompatLevel.oldest())
            self.client().command(
                f"INSERT INTO {table} ({columns}) FROM INFILE {literal(file.name)} FORMAT ArrowStream"
            )
        self._inserted += rows.height
        if self._inserted >= _MANY_ROWS:
            self._inserted = 0
            # else the engine keeps for some seconds what it let go of, beside what the next batches need
            with clickhouse.told("to give memory back"):
                self.client().command("SYSTEM JEMALLOC PURGE")

    def microseconds(self) -> int:
        return time.time_ns() // 1000


_engine: _Engine | None = None
_engine_lock = threading.Lock()


class ChdbStore(ClickHouseStore):
    """Tables in the engine of this process, which ends with the last store that is closed."""

    def __init__(self, url: str, name: str, engine: _Engine):
        super().__init__(url, name, engine, CAPABILITIES)
        self._held: _Engine | None = engine

    def close(self) -> None:
        held, self._held = self._held, None
        if held is not None:
            self._engine = Server(str(held.folder), {})
            self._engine.close()
            _leave(held)


def open_url(url: str, name: str) -> ChdbStore:
    """Return the store of the URL; raises `StoreBusy` when another process, or another folder, has the engine."""
    return ChdbStore(url, name, _enter(location.folder(url)))


def _enter(folder: Path) -> _Engine:
    global _engine
    with _engine_lock:
        if _engine is not None:
            if _engine.process != os.getpid():
                raise StoreError(
                    f"this process was forked from one that has the chDB store {_engine.folder} open, and the engine "
                    "does not survive a fork; start processes with the spawn method"
                )
            if _engine.folder != folder:
                raise StoreBusy(
                    f"this process has the chDB store {_engine.folder} open, and the engine inside a process serves "
                    f"one folder at a time; close that store before {folder} is opened, or use one folder for both"
                )
        else:
            made(folder)
            owner = locks.take(folder / _LOCK, f"the chDB store {folder}", _OWNER_SECONDS)
            opened = _Engine(folder, owner)
            try:
                opened.client()
            except BaseException:
                owner.release()
                raise
            _engine = opened
        _engine.stores += 1
        return _engine


def _leave(engine: _Engine) -> None:
    global _engine
    with _engine_lock:
        engine.stores -= 1
        if engine.stores or engine.process != os.getpid():
            return
        engine.close()
        engine.owner.release()
        if _engine is engine:
            _engine = None
