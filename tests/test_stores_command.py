"""`marketsync stores`: every store is a line, the ones that cannot be reached too, and nothing hangs."""

from __future__ import annotations

import json
import socket
import time
from contextlib import closing
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cli.main import build
from marketsync import stores
from storage.registry import open_store
from tasks.workspace import Workspace, close_workspaces
from tests.storage.stored_frames import BARS, INSTRUMENTS, bars, batch


@pytest.fixture
def silent():
    """A port that takes connections and never answers."""
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        yield server.getsockname()[1]


@pytest.fixture
def closed():
    """A port that nobody else can get, and that takes no connection."""
    with closing(socket.socket()) as server:
        server.bind(("127.0.0.1", 0))
        yield server.getsockname()[1]


def written(folder: Path, stores: dict[str, str]) -> Path:
    close_workspaces()
    path = folder / "upstream.yml"
    path.write_text(json.dumps({"upstreams": {}, "stores": stores}))
    return path


def filled(url: str) -> None:
    with closing(open_store(url)) as store:
        store.ensure("made.bars", BARS)
        store.write(batch("made.bars", bars(("a", "b"))))
        store.ensure("made.codes", INSTRUMENTS)


def test_each_store_says_its_engine_its_tables_and_their_newest_times(tmp_path: Path, postgres: str):
    for url in (f"delta://{tmp_path}/data", f"chdb://{tmp_path}/one", f"chdb://{tmp_path}/two", postgres):
        filled(url)
    path = written(
        tmp_path, {"files": "delta://./data", "one": "chdb://./one", "two": "chdb://./two", "server": postgres}
    )
    found = {one.name: one for one in stores(path)}
    assert [one.version.split()[0] for one in found.values()] == ["deltalake", "ClickHouse", "ClickHouse", "PostgreSQL"]
    for one in found.values():
        assert (one.problem, one.reachable, one.exit_code) == ("", True, 0)
        bars_there, codes = one.tables
        assert (bars_there.dataset, bars_there.rows, bars_there.subjects) == ("made.bars", 96, 2)
        assert bars_there.newest == bars(("a",))["ts"].max()
        assert bars_there.bytes > 0
        assert (codes.dataset, codes.rows, codes.newest) == ("made.codes", 0, None)
        assert bars_there.known is None


def test_a_store_that_cannot_be_reached_hides_no_other_and_ends_with_1(tmp_path: Path, closed: int, silent: int):
    filled(f"delta://{tmp_path}/data")
    (tmp_path / ".secrets").mkdir()
    (tmp_path / ".secrets" / "PW").write_text("hidden-word")
    path = written(
        tmp_path,
        {
            "files": "delta://./data",
            "gone": f"postgresql://me:$secret.PW@127.0.0.1:{closed}/market",
            "deaf": f"mysql://me:$secret.PW@127.0.0.1:{silent}/market",
        },
    )
    began = time.monotonic()
    done = CliRunner().invoke(build(["stores"]), ["stores", "-c", str(path), "--seconds", "3"])
    assert done.exit_code == 1
    assert time.monotonic() - began < 60
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"files: delta://{tmp_path}/data, deltalake ")
    assert lines[1].startswith("  made.bars: 96 rows, 2 symbols, newest 2001-02-01 08:30:00+00:00, ")
    assert lines[1].endswith("not in the ledger")
    assert "gone: postgresql://127.0.0.1:" in done.stdout
    assert "refused" in done.stdout
    assert "deaf: mysql://127.0.0.1:" in done.stdout
    assert "has not answered within 3 s" in done.stdout
    assert "hidden-word" not in done.output
    shown = json.loads(
        CliRunner().invoke(build(["stores"]), ["stores", "-c", str(path), "--seconds", "3", "--json"]).stdout
    )
    assert [one["reachable"] for one in shown["stores"]] == [True, False, False]
    assert shown["stores"][0]["rows"] == 96


def test_a_secret_that_is_missing_is_the_configurations_fault(tmp_path: Path):
    path = written(tmp_path, {"a": "postgresql://me:$secret.NOT_THERE@127.0.0.1/market", "b": "delta://./data"})
    first, second = stores(path)
    assert (first.exit_code, second.exit_code) == (2, 0)
    assert "NOT_THERE" in first.problem
    assert second.reachable


def test_the_ledgers_word_on_a_table_and_a_table_that_cannot_be_read(tmp_path: Path):
    path = written(tmp_path, {"files": "delta://./data", "parts": "parquet://./parts"})
    for url in (f"delta://{tmp_path}/data", f"parquet://{tmp_path}/parts"):
        filled(url)
    with closing(Workspace(path)) as workspace, closing(open_store(f"delta://{tmp_path}/data")) as store:
        marker = store.marker("made.bars") or ""
        workspace.ledger.bind_store("files", "made.bars", store.url, marker)
        workspace.ledger.bind_store("files", "made.codes", store.url, "another")
    (tmp_path / "parts" / "_marketsync" / "made.bars" / "state.json").write_text("{")
    files, parts = stores(path)
    assert [table.known for table in files.tables] == [True, False]
    broken, sound = parts.tables
    assert broken.problem
    assert not sound.problem
    assert parts.exit_code == 1
