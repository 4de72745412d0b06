"""Every engine as a fixture: a place of its own for each test, or one shared place where opening a place is dear."""

from __future__ import annotations

import itertools
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import timeseries_rules

from storage.protocol import Capabilities, Store
from storage.registry import ENGINES, open_store

ROOT = Path(__file__).parents[2]
FOLDER = "MARKETSYNC_DOLPHINDB_DOUBLE"
_numbers = itertools.count(1)


@dataclass(frozen=True)
class Place:
    """One empty place for a store of one engine."""

    scheme: str
    folder: Path
    address: str = ""  # of a server

    @property
    def url(self) -> str:
        return self.address or f"{self.scheme}://{self.folder}"

    def open(self) -> Store:
        return open_store(self.url)

    def empty(self, dataset: str) -> None:
        """Take the dataset's table away behind the store's back."""
        if self.address:
            drop_table(self.address, dataset)
        else:
            shutil.rmtree(self.folder)

    def beside(self, number: int) -> Place:
        """Another place of the same engine; on a server the same one, where datasets of other names are others."""
        return self if self.address else Place(self.scheme, self.folder / str(number))


def drop_table(address: str, dataset: str) -> None:
    """Drop a table as any client could."""
    provider, name = dataset.split(".")
    if address.startswith("clickhouse:"):
        from private_clickhouse import clickhouse_client

        client = clickhouse_client(address)
        client.command(f"DROP TABLE `{provider}`.`{name}` SYNC")
        client.close()
        return
    if address.startswith("dolphindb:"):
        drop_dolphindb(address, dataset)
        return
    if address.startswith("marketstore:"):
        from marketstore_buckets import destroy

        destroy(address, urlsplit(address).path.strip("/") + "." + dataset)
        return
    if address.startswith("mongodb:"):
        import pymongo

        with pymongo.MongoClient(address.replace("timeSeries=true", "")) as client:
            client.get_database().drop_collection(dataset)
        return
    if address.startswith("mysql:"):
        from private_mariadb import asked

        asked(address, f"DROP TABLE `{dataset}`")
        return
    import psycopg

    with psycopg.connect(address, autocommit=True) as connection:
        connection.execute(f'DROP TABLE "{provider}"."{name}"')  # pyright: ignore[reportArgumentType]


def drop_dolphindb(address: str, dataset: str) -> None:
    import dolphindb

    store = open_store(address)
    path = store.info(dataset).location.rpartition(": ")[2]
    store.close()
    if FOLDER in os.environ:
        from dolphindb_double import drop

        drop(path)
        return
    place = urlsplit(address)
    session = dolphindb.Session(
        place.hostname, place.port, unquote(place.username or ""), unquote(place.password or "")
    )
    session.run(f'dropDatabase("{path}")')
    session.close()


# not every day for more than one of the stores of files and one of the servers
LONG = (
    "test_any_frame_comes_back_as_it_went_with_the_fingerprints_of_any_other_store",
    "test_any_sequence_of_writes_ends_where_a_dictionary_would",
    "test_acknowledged_rows_survive_a_kill_at_any_instant_exactly_once",
    "test_a_change_after_maintenance_finds_the_rows_as_before",
    "test_two_processes_that_write_the_same_rows_end_as_if_one_had_come_after_the_other",
)
LONG_DAILY = ("delta", "postgresql")

# start processes, which takes a second each: not every day for more than files, a server, and an engine of one process
STARTED = (
    "test_four_processes_that_create_one_table_at_once_get_the_same_table",
    "test_two_processes_write_their_lanes_into_one_table_or_the_second_is_told_who_is_first",
)
STARTED_DAILY = ("chdb", "delta", "postgresql")


# the rest of MongoDB's time-series collections is not for every day: the store is that of the ordinary ones, and the
# stand-in is slow
DAILY = (
    "test_a_batch_that_comes_again_changes_nothing",
    "test_a_span_is_replaced_by_exactly_these_rows",
    "test_an_upsert_counts_what_it_inserted_updated_and_left",
    "test_deleted_rows_are_gone_and_counted",
    "test_fingerprints_are_of_the_rows_as_they_are_now_and_of_those_asked_for",
    "test_hostile_values_of_every_type_come_back_as_they_went",
    "test_nanoseconds_of_a_time_column_neither_hide_nor_double_a_row",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        # its tables are those of chDB, which runs all of it every day; the network path has tests of its own
        if item.path.name == "test_conformance.py" and "[clickhouse" in item.name:
            item.add_marker(pytest.mark.slow)
        adopts = item.path.name == "test_adoption.py" and "[" in item.name
        whole = item.name.startswith("test_a_table_made_by_hand") and "[chdb]" not in item.name
        if adopts and "place" in item.fixturenames and not whole and "[postgresql" not in item.name:
            item.add_marker(pytest.mark.slow)
        if "[mongodb-timeseries" in item.name and not item.name.startswith(DAILY):
            item.add_marker(pytest.mark.slow)
        name, _, parameters = item.name.partition("[")
        engine = parameters.rstrip("]")
        if (name in STARTED and engine not in STARTED_DAILY) or (name in LONG and engine not in LONG_DAILY):
            item.add_marker(pytest.mark.slow)


# scheme: the fixture that gives an empty database
SERVERS = {
    "clickhouse": "clickhouse",
    "dolphindb": "dolphindb",
    "marketstore": "marketstore",
    "mongodb": "mongodb",
    "mongodb-timeseries": "timeseries",
    "mysql": "mysql",
    "postgresql": "postgres",
}
PERMITTED = {"marketstore": "?rewrite=true"}  # what an engine does only when its URL allows it
ALIASES = {"marketstores", "mongodb+srv"}  # schemes of an engine that has another one
LOGS = {"nats", "redis", "rediss"}  # have no tables: see test_logs.py


@pytest.fixture(params=sorted({*ENGINES, *SERVERS} - ALIASES - LOGS))
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    return _place(request, request.param, tmp_path / "store")


@pytest.fixture
def place_of(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str], Place]:
    """Return an empty place of the engine that is named."""
    return lambda scheme: _place(request, scheme, tmp_path / scheme)


def _place(request: pytest.FixtureRequest, scheme: str, folder: Path) -> Place:
    server = SERVERS.get(scheme)
    address = request.getfixturevalue(server) + PERMITTED.get(scheme, "") if server else ""
    return Place(scheme.partition("-")[0], folder, address)


@pytest.fixture
def store(place: Place) -> Iterator[Store]:
    opened = place.open()
    yield opened
    opened.close()


@pytest.fixture
def dataset() -> str:
    return f"made.d{next(_numbers)}"


def needs(store: Store, **wanted: object) -> Capabilities:
    """Skip the test, by the store's own words, when it does not declare these capabilities."""
    for name, value in wanted.items():
        if getattr(store.capabilities, name) != value:
            pytest.skip(f"{store.url.partition(':')[0]} declares {name}={getattr(store.capabilities, name)}")
    return store.capabilities


def python(script: str, *arguments: object) -> list[str]:
    """Return the command line that runs a script beside this file with our packages importable."""
    folders = [str(folder) for folder in (ROOT, ROOT / "tests", Path(__file__).parent)]
    start = f"import sys; sys.path[:0] = {folders}; import runpy; "
    if timeseries_rules.FILE in os.environ:
        start += "import timeseries_rules; timeseries_rules.install(); "
    if "MARKETSYNC_DOLPHINDB_DOUBLE" in os.environ:
        start += "import dolphindb_double; dolphindb_double.install(); "
    return [
        sys.executable,
        "-c",
        start + f"runpy.run_path({str(Path(__file__).parent / script)!r}, run_name='__main__')",
        *map(str, arguments),
    ]
