"""Stores whose files were lost, cut short or overwritten: every question says what, which, why and what next."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from stored_frames import BARS, bars, batch

from marketsync.errors import QueryRefused, StoreDamaged, StoreError
from storage.protocol import Filter
from storage.reader import open_reader
from storage.registry import open_store

NAME = "made.bars"
QUESTIONS = {
    "scan": lambda store: store.scan(NAME).collect(),
    "arrow": lambda store: list(store.arrow(NAME)),
    "watermarks": lambda store: store.watermarks(NAME),
    "count": lambda store: store.count(NAME, Filter(["NA"])),
    "query": lambda store: store.query(f"SELECT sum(close) FROM {NAME}"),
    "upsert": lambda store: store.write(batch(NAME, bars(add=1.0), 9)),
    "delete": lambda store: store.delete(NAME, Filter(["NA"])),
}


def gone(part: Path) -> None:
    part.unlink()


def cut_short(part: Path) -> None:
    part.write_bytes(part.read_bytes()[:-100])


def overwritten(part: Path) -> None:
    part.write_bytes(os.urandom(part.stat().st_size))


@pytest.fixture(params=["delta", "parquet"])
def filled(request, tmp_path):
    store = open_store(f"{request.param}://{tmp_path / 'data'}", "shelf")
    store.ensure(NAME, BARS)
    store.write(batch(NAME, bars(), 1))
    yield request.param, store, max((tmp_path / "data").rglob("*.parquet"), key=lambda path: path.stat().st_size)
    store.close()


@pytest.mark.parametrize("asked", QUESTIONS)
@pytest.mark.parametrize("harm", [gone, cut_short], ids=lambda harm: harm.__name__)
def test_a_file_that_is_gone_or_cut_short_is_named_with_the_table_and_the_way_out(filled, asked, harm):
    scheme, _, part = filled
    harm(part)
    root = next(folder for folder in part.parents if folder.name == "data")
    with pytest.raises(StoreError) as caught:
        QUESTIONS[asked](open_store(f"{scheme}://{root}", "again"))
    said = str(caught.value)
    assert part.name in said
    assert NAME.partition(".")[2] in said
    assert "remove" in said
    if harm is cut_short:
        assert isinstance(caught.value, StoreDamaged)
        assert "was written with" in said


@pytest.mark.parametrize("asked", [name for name in QUESTIONS if name != "scan"])
def test_a_file_that_is_overwritten_is_told_as_damage_and_not_as_the_querys_fault(filled, asked):
    _, store, part = filled
    overwritten(part)
    with pytest.raises(StoreDamaged, match="cannot be read") as caught:
        QUESTIONS[asked](store)
    assert "put the files back from a backup" in str(caught.value)


def test_a_log_that_cannot_be_read_is_told_with_its_table(tmp_path):
    store = open_store(f"delta://{tmp_path}", "shelf")
    store.ensure(NAME, BARS)
    store.write(batch(NAME, bars(), 1))
    log = sorted((tmp_path / "made" / "bars" / "_delta_log").glob("*.json"))
    for harm in (lambda path: path.write_text("{"), lambda path: path.unlink()):
        harm(log[0])
        with pytest.raises(StoreError, match=r"made\.bars"):
            open_store(f"delta://{tmp_path}", "again").scan(NAME).collect()


@pytest.mark.parametrize("scheme", ["delta", "parquet", "csv", "chdb"])
def test_only_what_reads_is_a_question(scheme, tmp_path):
    pytest.importorskip("chdb" if scheme == "chdb" else "polars")
    with open_reader(f"{scheme}://{tmp_path / 'data'}") as reader:
        reader.store.ensure(NAME, BARS)
        reader.store.write(batch(NAME, bars(), 1))
        for sql in (
            f"DROP TABLE {NAME}",
            f"insert into {NAME} select * from {NAME}",
            f"/* SELECT */ DELETE FROM {NAME}",
            f"SELECT 1; DROP TABLE {NAME}",
            f"CREATE TABLE x AS SELECT * FROM {NAME}",
            f"SELECT * FROM {NAME} INTO OUTFILE 'x.csv'",
            f"WITH a AS (SELECT 1) INSERT INTO {NAME} SELECT * FROM a",
            f"TRUNCATE TABLE {NAME}",
            "",
        ):
            with pytest.raises(QueryRefused) as caught:
                reader.query(sql)
            assert int(caught.value.exit_code) == 2
        quoted = f"-- one\nSELECT 'a; DROP TABLE b' AS said, count(*) AS n FROM {NAME};\n"
        assert reader.query(quoted).rows() == [("a; DROP TABLE b", len(bars()))]
        with pytest.raises(QueryRefused, match="nope"):
            reader.query(f"SELECT nope FROM {NAME}")


def test_opening_chdb_says_nothing(tmp_path, caplog):
    pytest.importorskip("chdb")
    with caplog.at_level("WARNING"), open_reader(f"chdb://{tmp_path / 'data'}") as reader:
        assert reader.datasets() == []
    assert caplog.records == []
