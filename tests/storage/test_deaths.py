"""kill -9 of a writer and of the server it writes to, in the middle of everything that is done to a table. Afterwards
each deed that was acknowledged has left its rows once, and of the one that was under way all or nothing is there, where
the store says that it is atomic; where it does not, each row is as it was before or as it is after."""

from __future__ import annotations

import os
import random
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from conftest import python
from doomed_writer import CYCLE, Rows, left_by, schema_of, what
from mortal_server import Server
from stored_frames import BARS

from storage.protocol import Filter, Store
from storage.registry import open_store

KILLS = int(os.environ.get("MARKETSYNC_TEST_KILLS", "30"))  # of each store, in the slow tests
DATASET = "made.doomed"
DEEDS = sorted(set(CYCLE))
FOLDERS = ("delta", "parquet", "csv", "chdb")
SERVERS = ("clickhouse", "mongodb", "mongodb-timeseries", "mysql", "postgresql")
ROWS = {"mongodb": 40, "mongodb-timeseries": 40, "clickhouse": 150}  # of a deed, where a stand-in is slow; else:
USUAL_ROWS = 400


def server_of(engine: str) -> AbstractContextManager[Server]:
    if engine == "postgresql":
        from private_postgres import mortal_postgres

        return mortal_postgres()
    if engine == "mysql":
        from private_mariadb import installed, mortal_mariadb

        if not installed():
            pytest.skip("there is no MariaDB")
        return mortal_mariadb()
    if engine.startswith("mongodb"):
        from private_mongodb import mortal_mongodb

        return mortal_mongodb("--sync-on-commit")  # else the stand-in forgets what it has acknowledged
    from private_clickhouse import mortal_clickhouse

    return mortal_clickhouse()


def url_of(engine: str, server: Server) -> str:
    """The URL of a store on the server."""
    if engine == "mysql":
        from private_mariadb import asked

        asked(server.url, "CREATE DATABASE doomed")
        return f"{server.url}/doomed"
    if engine.startswith("mongodb"):
        series = "&timeSeries=true" if engine.endswith("-timeseries") else ""
        return f"{server.url}doomed?serverSelectionTimeoutMS=500{series}"
    return server.url


class Doom:
    """One store, the deeds that were acknowledged, and what they must have left."""

    def __init__(self, engine: str, url: str, folder: Path, seed: int):
        self.url = url
        self.rows_a_deed = ROWS.get(engine, USUAL_ROWS)
        self.log = folder / "acknowledged"
        self.log.touch()
        self.chance = random.Random(seed)
        self.done = -1  # the last deed that was acknowledged
        self.rows: Rows = {}
        self.met: Counter[str] = Counter()  # what was killed in the middle of it, or just after
        self.lasts: dict[str, float] = {}

    def writer(self) -> subprocess.Popen[str]:
        command = python("doomed_writer.py", self.url, DATASET, self.done + 1, self.rows_a_deed, self.log)
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.hear(process, "ready")
        self.tell(process)
        return process

    def tell(self, process: subprocess.Popen[str]) -> None:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()

    def hear(self, process: subprocess.Popen[str], *begins: str) -> str:
        """Return the next line that begins so."""
        assert process.stdout is not None
        while line := process.stdout.readline():
            if line.startswith(begins):
                return line
        assert process.stderr is not None
        raise AssertionError(process.stderr.read())

    def wait_for(self, process: subprocess.Popen[str], deed: str) -> None:
        """Return at some instant of the deed, which is chosen from all of its time."""
        downs = 0
        while not (line := self.hear(process, "begin", "down")).endswith(f" {deed}\n"):
            if line.startswith("down"):  # a second connection of the store's may find out later
                downs += 1
                assert downs < 3, line
                self.tell(process)
        if deed not in self.lasts:
            began = time.monotonic()
            self.hear(process, "begin")
            self.lasts[deed] = time.monotonic() - began
            self.wait_for(process, deed)
            return
        time.sleep(self.chance.uniform(0, self.lasts[deed]))
        self.met[deed] += 1

    def acknowledge(self) -> None:
        """Do with the dictionary what the log says was done with the store."""
        said = [int(line) for line in self.log.read_text().split()]
        for number in said[self.done + 1 :]:
            assert number == self.done + 1
            self.rows = left_by(number, self.rows_a_deed, self.rows)
            self.done = number

    def look(self) -> None:
        """Fail when something is lost, twice, or half there."""
        self.acknowledge()
        store = open_store(self.url)
        try:
            try:
                self.judge(store)
            except AssertionError:
                time.sleep(1)  # a server may end, between two of our looks, what a dead writer has asked it for
                self.judge(store)
        finally:
            store.close()

    def judge(self, store: Store) -> None:
        next_one = self.done + 1
        schemas = [schema_of(self.done) if self.done >= 0 else BARS, schema_of(next_one)]
        schema = store.schema(DATASET)
        assert schema in schemas
        seqs = [each + 1 for each in range(next_one + 1) if what(each) in ("append", "upsert")]
        last = max([seq for seq in seqs if seq <= self.done + 1], default=0)
        assert store.committed(DATASET, "lane") in (last, max(seqs, default=0))
        found = store.scan(DATASET, Filter()).collect()
        there = {(row["symbol"], row["ts"]): row for row in found.iter_rows(named=True)}
        assert len(there) == found.height, "a row is there twice"
        assert store.count(DATASET) == found.height
        after = left_by(next_one, self.rows_a_deed, self.rows)
        empty = dict.fromkeys(schema.names)
        old, new = ({key: {**empty, **row} for key, row in rows.items()} for rows in (self.rows, after))
        new = {key: {name: row[name] for name in schema.names} for key, row in new.items()}
        if store.capabilities.atomic:
            assert there in (old, new), self.told(there, old, new)
        else:
            for key in {*there, *old, *new}:
                assert there.get(key) in (old.get(key), new.get(key)), f"{what(next_one)}: {key}"

    def told(self, there: Rows, old: Rows, new: Rows) -> str:
        lacks = [sum(there.get(key) != row for key, row in rows.items()) for rows in (old, new)]
        return f"deed {self.done + 1}, {what(self.done + 1)}: {len(there)} rows; {lacks} are not as before or after"

    def end(self) -> None:
        """After a last writer that nobody kills, all is as if nobody had been."""
        process = self.writer()
        try:
            until = self.done + len(CYCLE) + 2
            while f" {until} " not in self.hear(process, "begin"):
                pass
        finally:
            process.kill()
            process.communicate()
        self.look()


@pytest.fixture
def doom(engine: str, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[tuple[Doom, Server | None]]:
    if engine in FOLDERS:
        yield Doom(engine, f"{engine}://{tmp_path / 'store'}", tmp_path, 1), None
        return
    with server_of(engine) as server:
        yield Doom(engine, url_of(engine, server), tmp_path, 2), server


def kill_writers(doom: Doom, kills: int) -> None:
    for number in range(kills):
        process = doom.writer()
        try:
            doom.wait_for(process, DEEDS[number % len(DEEDS)])
        finally:
            process.kill()
            process.communicate()
        doom.look()
    doom.end()


def kill_servers(doom: Doom, server: Server, kills: int) -> None:
    """The writer lives on: its store finds the server again."""
    process = doom.writer()
    try:
        for number in range(kills):
            doom.wait_for(process, DEEDS[number % len(DEEDS)])
            server.kill()
            down = doom.hear(process, "down")
            assert down.split()[2] in ("StoreError", "StoreBusy"), down
            server.start()
            doom.look()
            doom.tell(process)
    finally:
        process.kill()
        process.communicate()
    doom.look()
    doom.end()


@pytest.mark.parametrize("engine", ["delta"])
def test_a_writer_that_dies_in_the_middle_loses_and_doubles_nothing(doom: tuple[Doom, Server | None]):
    kill_writers(doom[0], 2)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("engine", [*FOLDERS, *SERVERS])
def test_writers_that_die_in_everything_they_do_lose_and_double_nothing(doom: tuple[Doom, Server | None]):
    kill_writers(doom[0], KILLS)


@pytest.mark.parametrize("engine", ["postgresql"])
def test_a_server_that_dies_in_the_middle_loses_and_doubles_nothing(doom: tuple[Doom, Server]):
    kill_servers(*doom, 2)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("engine", SERVERS)
def test_servers_that_die_in_everything_they_do_lose_and_double_nothing(doom: tuple[Doom, Server]):
    kill_servers(*doom, KILLS)
    print(doom[0].met)
