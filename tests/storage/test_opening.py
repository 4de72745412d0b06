"""Opening a store by its URL, and reading it as a notebook does."""

from __future__ import annotations

import subprocess
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pytest
from conftest import python
from stored_frames import BARS, START, bars, batch

import storage.registry
from marketsync.errors import ConfigurationError
from storage.reader import open_reader
from storage.registry import open_store


@pytest.mark.parametrize("url", ["kafka://host/db", "delta", "", "Delta://x", "/some/folder"])
def test_an_unknown_scheme_is_answered_with_the_known_ones(url: str):
    with pytest.raises(ConfigurationError, match="chdb://, clickhouse://, csv://, delta://, "):
        open_store(url)


def test_a_password_is_in_no_message(tmp_path: Path):
    with pytest.raises(ConfigurationError) as refused:
        open_store("clickhouse://me:pa55word@host/db")
    assert "pa55word" not in str(refused.value)


SERVERS = ("clickhouse", "dolphindb", "marketstore", "mongodb", "mysql", "nats", "postgresql", "redis", "rediss")


@pytest.mark.parametrize("scheme", SERVERS)
@pytest.mark.parametrize("character", [*"/?#@ []", "%zz"])
def test_a_password_that_a_url_cannot_carry_is_refused_and_no_part_of_it_told(scheme: str, character: str):
    url = f"{scheme}://user:12S3cr{character}etPw@127.0.0.1:9/made"
    for each in (url, url + "?option=1", url.replace("12S3cr", "12")):
        with pytest.raises(ConfigurationError, match="write each of @ / ") as refused:
            open_store(each)
        assert not any(part in str(refused.value) for part in ("S3cr", "etPw"))
        assert refused.value.__cause__ is None


@pytest.mark.parametrize("url", ["delta://", "csv://./a?x=1", "parquet://a#b"])
def test_a_url_that_names_no_folder_is_refused(url: str):
    with pytest.raises(ConfigurationError, match="absolute"):
        open_store(url)


@pytest.mark.parametrize("scheme", ["delta", "parquet", "csv", "excel"])
def test_a_folder_is_relative_absolute_or_at_home(scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for url, place in (
        (f"{scheme}://./a b/ü", tmp_path / "a b" / "ü"),
        (f"{scheme}://c", tmp_path / "c"),
        (f"{scheme}://{tmp_path}/d", tmp_path / "d"),
        (f"{scheme}://~/e", tmp_path / "home" / "e"),
    ):
        store = open_store(url)
        assert (store.name, store.url) == (url, url)
        store.ensure("made.bars", BARS)
        store.write(batch("made.bars", bars()))
        assert list((place / "made").glob("bars*"))
        assert open_store(url, "mine").name == "mine"
        assert open_store(url).count("made.bars") == 96


def test_an_engine_that_is_not_installed_is_answered_with_how_to_install_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(storage.registry.ENGINES, "odd", ("storage.odd", "no_such_package", "[odd]"))
    with pytest.raises(ConfigurationError, match=r"pip install -e '\.\[odd\]'"):
        open_store("odd://x")


def test_importing_the_registry_imports_no_engine():
    script = (
        "import sys, storage.registry, storage.reader, storage.protocol\n"
        "print({'polars', 'deltalake', 'chdb', 'clickhouse_connect', 'pyarrow', 'filelock'} & set(sys.modules))"
    )
    start = python("unused.py")[:2]
    found = subprocess.run(
        [*start, f"import sys; sys.path.insert(0, {str(Path(storage.registry.__file__).parents[1])!r})\n{script}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == "set()"


def test_a_reader_takes_dates_as_people_write_them(tmp_path: Path):
    url = f"delta://{tmp_path}"
    store = open_store(url)
    store.ensure("made.bars", BARS)
    store.write(batch("made.bars", bars(("A", "B"), rows=48)))
    with open_reader(url) as reader:
        assert reader.datasets() == ["made.bars"]
        assert reader.schema("made.bars") == BARS
        day = date(2001, 1, 31)
        midnight = datetime(2001, 1, 31, tzinfo=UTC)
        for since in (day, midnight, "2001-01-31", "2001-01-31T00:00:00Z", "2001-01-31 00:00", "20010131"):
            assert reader.scan("made.bars", since=since).collect().height == 66, since
            assert sum(part.num_rows for part in reader.arrow("made.bars", until=since)) == 30
        assert reader.scan("made.bars", since=midnight.replace(tzinfo=None)).collect().height == 66
        one = reader.scan("made.bars", symbols="A", columns=["close"], system=True).collect()
        assert one.columns == ["close", "_segment", "_ingested_at"]
        assert one.height == 48
        assert reader.scan("made.bars", symbols=["A", "B"]).collect().height == 96
        assert reader.watermarks("made.bars")["B"] == START + timedelta(hours=47)
        assert reader.query("SELECT count(*) AS n FROM made.bars")["n"].to_list() == [96]
        with pytest.raises(ConfigurationError, match="since='yesterday'"):
            reader.scan("made.bars", since="yesterday")
