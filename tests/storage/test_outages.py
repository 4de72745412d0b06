"""A server that refuses in the middle of a run: its user, a write, more room. The store says so in a `StoreError`, has
written nothing, and goes on when the server does. (One that dies is in `test_deaths.py`.)"""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import pytest
from private_clickhouse import clickhouse_client, mortal_clickhouse
from private_mongodb import mortal_mongodb
from stored_frames import BARS, bars, batch

from marketsync.errors import StoreError
from storage.protocol import Filter, Mode, Store, Written
from storage.registry import open_store

DATASET = "made.bars"
SECRET = "s3cret/word"
MUCH = 120_000  # rows of a delivery for which there is no room


@dataclass(frozen=True)
class Trouble:
    """Something that a server's owner, or its disk, does to a store, and how it ends; what the store then says."""

    begin: Callable[[], object]
    end: Callable[[], object]
    says: str
    reads_too: bool = False
    rows: int = 48


def assert_survived(store: Store, trouble: Trouble) -> None:
    """The store works, then it does not and says why, then it works, as if nothing had been."""
    store.ensure(DATASET, BARS)
    assert store.write(batch(DATASET, bars(), 1)) == Written(inserted=96)
    more = bars(first=40, rows=trouble.rows, add=1.0)
    deeds: list[Callable[[], object]] = [
        lambda: store.write(batch(DATASET, more, 2)),
        lambda: store.write(batch(DATASET, more.filter(more["ts"] > bars()["ts"].max()), 2, mode=Mode.APPEND)),
    ]
    if trouble.rows < MUCH:
        deeds.append(lambda: store.replace(DATASET, BARS, more, Filter(since=more["ts"].min())))  # pyright: ignore
    if trouble.reads_too:
        deeds.append(lambda: store.count(DATASET))
        deeds.append(lambda: store.scan(DATASET).collect())
        deeds.append(lambda: store.committed(DATASET, "lane"))
    trouble.begin()
    try:
        for deed in deeds:
            with pytest.raises(StoreError, match=trouble.says) as told:
                deed()
            assert SECRET not in str(told.value)
            assert quote(SECRET, safe="") not in str(told.value)
        if not trouble.reads_too:
            assert store.count(DATASET) == 96
            assert store.committed(DATASET, "lane") == 1
    finally:
        trouble.end()
    assert store.write(batch(DATASET, more, 2)) == Written(inserted=2 * trouble.rows - 16, updated=16)
    assert store.committed(DATASET, "lane") == 2
    assert store.count(DATASET) == 80 + 2 * trouble.rows
    store.close()


# PostgreSQL


@pytest.fixture
def as_owner(postgres: str) -> Iterator[Callable[[str], None]]:
    """Statements of another user of the database, who may do anything."""
    import psycopg

    def say(sql: str) -> None:
        with psycopg.connect(postgres, autocommit=True) as connection:
            connection.execute(sql)  # pyright: ignore

    name = urlsplit(postgres).path[1:]
    say(f"CREATE ROLE u_{name} LOGIN")
    say(f"GRANT ALL ON DATABASE {name} TO u_{name}")
    yield say
    say(f"DROP OWNED BY u_{name} CASCADE")
    say(f"DROP ROLE u_{name}")


def ended_connections(name: str) -> str:
    return f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'u_{name}'"


def test_a_user_who_may_not_log_in_any_more(postgres, as_owner):
    name = urlsplit(postgres).path[1:]
    store = open_store(postgres.replace("market@", f"u_{name}@"))

    def begin() -> None:
        as_owner(f"ALTER ROLE u_{name} NOLOGIN")
        as_owner(ended_connections(name))
        with pytest.raises(StoreError, match=r"terminating|closed"):  # the connection that there was
            store.count(DATASET)

    end = lambda: as_owner(f"ALTER ROLE u_{name} LOGIN")  # noqa: E731
    assert_survived(store, Trouble(begin, end, "not permitted to log in", reads_too=True))


def test_a_database_that_may_only_be_read(postgres, as_owner):
    name = urlsplit(postgres).path[1:]
    store = open_store(postgres.replace("market@", f"u_{name}@"))

    def say(only: str) -> None:
        as_owner(f"ALTER ROLE u_{name} SET default_transaction_read_only = {only}")
        as_owner(ended_connections(name))
        with pytest.raises(StoreError):
            store.count(DATASET)

    assert_survived(store, Trouble(lambda: say("on"), lambda: say("off"), "read-only transaction"))


@contextmanager
def small_files(bytes_: int) -> Iterator[None]:
    """Processes that start meanwhile cannot write files longer than this, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.slow
def test_a_postgres_without_room(tmp_path: Path):
    from private_postgres import mortal_postgres

    with mortal_postgres() as server:
        store = open_store(server.url)

        def begin() -> None:
            server.kill()
            with small_files(17 << 20):  # a piece of the log has 16 MiB
                server.start()
            with pytest.raises(StoreError):
                store.count(DATASET)

        def end() -> None:
            server.kill()
            server.start()
            with pytest.raises(StoreError):
                store.count(DATASET)

        assert_survived(store, Trouble(begin, end, "File too large|No space", rows=MUCH))


# MySQL


@pytest.fixture
def guest(mysql: str) -> Iterator[tuple[Store, str, Callable[[str], list]]]:
    """The store of a user with rights in one database, the user, and the statements of one who may do anything."""
    from private_mariadb import asked

    parts = urlsplit(mysql)
    user = f"'g{parts.path[-8:]}'@'127.0.0.1'"
    asked(mysql, f"CREATE USER {user} IDENTIFIED BY '{SECRET}'")
    asked(mysql, f"GRANT ALL ON `{parts.path[1:]}`.* TO {user}")
    url = f"mysql://g{parts.path[-8:]}:{quote(SECRET, safe='')}@{parts.hostname}:{parts.port}{parts.path}"
    yield open_store(url), user, lambda sql: asked(mysql, sql)
    asked(mysql, f"DROP USER {user}")


def test_a_password_that_is_another_one_now(guest):
    store, user, say = guest

    def begin() -> None:
        say(f"ALTER USER {user} IDENTIFIED BY 'other'")
        say(f"KILL USER {user.partition('@')[0]}")

    end = lambda: say(f"ALTER USER {user} IDENTIFIED BY '{SECRET}'")  # noqa: E731
    assert_survived(store, Trouble(begin, end, "Access denied.*password", reads_too=True))


def test_a_mysql_that_may_only_be_read(guest):
    store, _, say = guest
    begin, end = (lambda on=on: say(f"SET GLOBAL read_only = {on}") for on in (1, 0))
    assert_survived(store, Trouble(begin, end, "read-only"))


@pytest.mark.slow
def test_a_mysql_without_room():
    from private_mariadb import asked, installed, mortal_mariadb

    if not installed():
        pytest.skip("there is no MariaDB")
    small = ("--innodb-file-per-table=0", "--innodb-data-file-path=ibdata1:12M:autoextend:max:24M")
    with mortal_mariadb(*small) as server:
        asked(server.url, "CREATE DATABASE small")
        store = open_store(f"{server.url}/small")
        store.ensure(DATASET, BARS)
        store.write(batch(DATASET, bars(), 1))
        for mode in Mode:
            with pytest.raises(StoreError, match="is full"):
                store.write(batch(DATASET, bars(first=100, rows=MUCH), 2, mode=mode))
            assert store.count(DATASET) == 96
            assert store.committed(DATASET, "lane") == 1
        assert store.delete(DATASET, Filter(["NA"])) == 48
        assert store.write(batch(DATASET, bars(add=1.0), 2)) == Written(inserted=48, updated=48)
        store.close()


# ClickHouse, which has no users here


@pytest.mark.slow
def test_a_clickhouse_without_room():
    with mortal_clickhouse() as server:
        store = open_store(server.url)
        client = clickhouse_client(server.url)
        setting = "min_free_disk_bytes_to_perform_insert"
        begin = lambda: client.command(f"ALTER TABLE made.bars MODIFY SETTING {setting} = {1 << 60}")  # noqa: E731
        end = lambda: client.command(f"ALTER TABLE made.bars RESET SETTING {setting}")  # noqa: E731
        assert_survived(store, Trouble(begin, end, "NOT_ENOUGH_SPACE|space"))
        client.close()


# MongoDB


@pytest.mark.slow
def test_a_mongodb_user_who_has_another_password_or_may_only_read():
    import pymongo

    with mortal_mongodb("--sync-on-commit", password=SECRET) as server:
        owner = server.url.replace("//", f"//tester:{quote(SECRET, safe='')}@")
        with pymongo.MongoClient(owner) as client:

            def say(command: str, **more: Any) -> None:
                client["market"].command(command, "guest", **more)

            def anew() -> None:
                server.kill()
                server.start()

            say("createUser", pwd=SECRET, roles=["readWrite"])
            store = open_store(owner.replace("tester", "guest") + "market?serverSelectionTimeoutMS=1000")
            wrong = Trouble(
                lambda: (say("updateUser", pwd="other"), anew()),
                lambda: (say("updateUser", pwd=SECRET), anew()),
                "are user and password right",
                reads_too=True,
            )
            assert_survived(store, wrong)
