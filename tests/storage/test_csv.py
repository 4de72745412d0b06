"""What only the CSV store does: files a person can open, appended to where possible, whole after any crash."""

from __future__ import annotations

import csv
from datetime import UTC, datetime
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from polars.testing import assert_frame_equal
from stored_frames import BARS, HOSTILE_TEXT, INSTRUMENTS, bars, batch, stamped

import storage.csv
import storage.files
from marketsync.errors import StoreError
from marketsync.schema import Schema
from storage.csv import file_name
from storage.protocol import Mode, Written
from storage.registry import open_store

NAME = "made.bars"


class Crash(BaseException):
    """The process ends here."""


@pytest.fixture
def store(tmp_path: Path):
    return open_store(f"csv://{tmp_path}")


def folder(tmp_path: Path) -> Path:
    return tmp_path / "made" / "bars"


def test_a_file_says_what_a_person_expects(store, tmp_path: Path):
    store.ensure(NAME, BARS)
    frame = bars(("000001.SZ",), rows=3)
    frame = frame.with_columns(
        pl.Series("close", [0.1, None, float("nan")]),
        pl.col("ts") + pl.Series([0, 1, 1_000_000]).cast(pl.Duration("us")),
    )
    store.write(batch(NAME, frame))
    assert (folder(tmp_path) / "000001.SZ.csv").read_text() == (
        "symbol,ts,close,volume,_segment,_ingested_at\n"
        "000001.SZ,2001-01-30T09:30:00.000000Z,0.1,0,s1,2026-01-02T03:04:05.678901Z\n"
        "000001.SZ,2001-01-30T10:30:00.000001Z,,1,s1,2026-01-02T03:04:05.678901Z\n"
        "000001.SZ,2001-01-30T11:30:01.000000Z,NaN,2,s1,2026-01-02T03:04:05.678901Z\n"
    )


def test_null_and_the_empty_string_are_told_apart_in_the_file(store, tmp_path: Path):
    store.ensure("made.instruments", INSTRUMENTS)
    frame = stamped(pl.DataFrame({"code": ["a", "b"], "name": ["", None], "lot": [1, 2]}, INSTRUMENTS.polars()))
    store.write(batch("made.instruments", frame, schema=INSTRUMENTS))
    lines = (tmp_path / "made" / "instruments" / "instruments.csv").read_text().splitlines()
    assert [line.rpartition(",s1,")[0] for line in lines[1:]] == ['a,"",1', "b,,2"]


def test_a_text_that_begins_like_a_file_with_a_mark_is_a_text(store):
    store.ensure("made.instruments", INSTRUMENTS)
    frame = stamped(pl.DataFrame({"code": ["\ufeff"], "name": ["\ufeffx"], "lot": [1]}, INSTRUMENTS.polars()))
    store.write(batch("made.instruments", frame, schema=INSTRUMENTS))
    assert store.scan("made.instruments").collect().row(0) == ("\ufeff", "\ufeffx", 1)


def test_the_standard_library_reads_hostile_texts_as_they_are(store, tmp_path: Path):
    store.ensure("made.instruments", INSTRUMENTS)
    texts = [text for text in HOSTILE_TEXT if text]
    frame = stamped(pl.DataFrame({"code": texts, "name": texts[::-1], "lot": range(len(texts))}, INSTRUMENTS.polars()))
    store.write(batch("made.instruments", frame, schema=INSTRUMENTS))
    with open(tmp_path / "made" / "instruments" / "instruments.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["code"]: row["name"] for row in rows} == dict(zip(texts, texts[::-1], strict=True))


def test_subjects_that_differ_only_by_case_have_files_that_differ_by_more(store, tmp_path: Path):
    store.ensure(NAME, BARS)
    subjects = ("ABC", "abc", "Abc", "CON", "a/b", "..", "BTC/USDT", "", "NA", "x" * 300, "A.", "_schema")
    store.write(batch(NAME, bars(subjects, rows=2)))
    names = [path.name.lower() for path in folder(tmp_path).glob("*.csv")]
    assert len(set(names)) == len(subjects)
    assert {"abc.csv", "na.csv"} <= set(names)
    assert set(store.watermarks(NAME)) == set(subjects)
    assert store.count(NAME) == 2 * len(subjects)


@given(st.sets(st.text(max_size=8), min_size=2))
def test_no_two_subjects_share_a_file_where_case_does_not_count(subjects: set[str]):
    names = [file_name(NAME, subject) for subject in subjects]
    assert len({name.lower() for name in names}) == len(subjects)
    assert all(name == Path(name).name and name[0] not in "_." and name.endswith(".csv") for name in names)


def test_later_rows_are_appended_and_earlier_ones_put_in_their_place(store, tmp_path: Path):
    store.ensure(NAME, BARS)
    store.write(batch(NAME, bars(("A", "B"), first=10, rows=5), 1, mode=Mode.APPEND))
    before = {path.name: path.stat().st_ino for path in folder(tmp_path).glob("*.csv")}
    assert store.write(batch(NAME, bars(("A", "B"), first=15, rows=5), 2)) == Written(inserted=10)
    assert {path.name: path.stat().st_ino for path in folder(tmp_path).glob("*.csv")} == before
    store.write(batch(NAME, bars(("A",), first=0, rows=3), 3, mode=Mode.APPEND))
    after = {path.name: path.stat().st_ino for path in folder(tmp_path).glob("*.csv")}
    assert after["B.csv"] == before["B.csv"]
    times = pl.read_csv(folder(tmp_path) / "A.csv")["ts"]
    assert times.is_sorted()
    assert len(times) == 13
    assert store.scan(NAME).collect().height == 23


@pytest.mark.parametrize("held", [0, 10, 1000])
def test_an_upsert_of_many_files_holds_only_so_many_of_their_rows(store, monkeypatch: pytest.MonkeyPatch, held: int):
    monkeypatch.setattr("storage.csv._KEPT_ROWS", held)
    read: list[str] = []
    decoded = storage.csv._decoded

    def counted(content: bytes, schema: Schema, path: Path) -> pl.DataFrame:
        read.append(path.stem)
        return decoded(content, schema, path)

    store.ensure(NAME, BARS)
    store.write(batch(NAME, bars(("A", "B", "C"), rows=10)))
    monkeypatch.setattr("storage.csv._decoded", counted)
    changed = bars(("A", "B", "C"), first=5, rows=10).with_columns(close=pl.lit(1.5))
    assert store.write(batch(NAME, changed, 2)) == Written(inserted=15, updated=15)
    assert len(read) == 6 - min(held // 10, 3)  # a file that was not held is read twice
    assert store.scan(NAME).collect()["close"].value_counts().filter(close=1.5)["count"].item() == 30


@pytest.mark.parametrize("step", range(10))
@pytest.mark.parametrize("torn", [False, True])
def test_a_crash_between_any_two_steps_of_a_write_is_made_good(
    store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, torn: bool
):
    """One batch that appends to A, changes B, and makes C; steps are names put in place or taken away."""
    store.ensure(NAME, BARS)
    store.write(batch(NAME, bars(("A", "B")), 1, mode=Mode.APPEND))
    old = store.scan(NAME).collect().sort("symbol", "ts")
    frame = pl.concat([bars(("A",), first=48, rows=3), bars(("B",), first=40, rows=3), bars(("C",), rows=3)])
    both = pl.concat([old, frame.select(BARS.names)]).unique(["symbol", "ts"], keep="last").sort("symbol", "ts")

    left = iter(range(step))
    real, unlink = storage.files.os.replace, Path.unlink

    def counted(act):
        def acting(*arguments, **options):
            if next(left, None) is None:
                raise Crash
            return act(*arguments, **options)

        return acting

    with monkeypatch.context() as patch:
        patch.setattr(storage.files.os, "replace", counted(real))
        patch.setattr(Path, "unlink", counted(unlink))
        try:
            store.write(batch(NAME, frame, 2))
            crashed = False
        except Crash:
            crashed = True
    assert crashed == (step < 5)
    if torn and step == 0:
        with open(folder(tmp_path) / "A.csv", "r+b") as file:
            file.truncate((folder(tmp_path) / "A.csv").stat().st_size - 7)

    again = open_store(store.url)
    committed = again.committed(NAME, "lane")
    assert committed == (1 if step == 0 else 2)
    found = again.scan(NAME).collect().sort("symbol", "ts")
    assert_frame_equal(found, old if committed == 1 else both)
    plain = pl.concat([pl.read_csv(path).select("symbol", "ts") for path in folder(tmp_path).glob("*.csv")])
    assert plain.height == found.height
    assert again.write(batch(NAME, frame, 2)).already == (committed == 2)
    assert_frame_equal(again.scan(NAME).collect().sort("symbol", "ts"), both)
    assert not list((folder(tmp_path) / "_new").iterdir())


def test_a_reader_never_sees_half_a_row_of_a_writer_that_is_appending(store, tmp_path: Path):
    store.ensure(NAME, BARS)
    store.write(batch(NAME, bars(("A",)), 1))
    reader = open_store(store.url)
    lazy = reader.scan(NAME)
    with open(folder(tmp_path) / "A.csv", "ab") as file:
        file.write(b"A,2001-02-01T09:30:00.000000Z,12")
    assert lazy.collect().height == 48
    assert open_store(store.url).scan(NAME).collect().height == 48
    assert store.write(batch(NAME, bars(("A",), first=48, rows=1), 2)) == Written(inserted=1)
    assert lazy.collect().height == 49


def test_a_file_that_was_edited_by_hand_is_neither_misread_nor_cut(store, tmp_path: Path):
    store.ensure(NAME, BARS)
    store.write(batch(NAME, bars(("A", "B")), 1))
    path = folder(tmp_path) / "A.csv"
    edited = path.read_text().replace("s1", "by-hand", 20)
    path.write_text(edited)
    again = open_store(store.url)
    with pytest.raises(StoreError, match=r"A\.csv is not as MarketSync left it"):
        again.write(batch(NAME, bars(("A",), first=30, rows=2), 2))
    with pytest.raises(StoreError, match=r"A\.csv is not as MarketSync left it"):
        again.write(batch(NAME, bars(("A",), first=48, rows=2), 2, mode=Mode.APPEND))
    with pytest.raises(Exception, match=r"A\.csv is not as MarketSync left it"):
        again.scan(NAME).collect()
    assert path.read_text() == edited
    assert again.scan(NAME, storage.protocol.Filter(["B"])).collect().height == 48


def test_bounds_open_only_files_that_can_hold_such_rows(store, tmp_path: Path):
    store.ensure(NAME, BARS)
    store.write(batch(NAME, pl.concat([bars(("A",), rows=10), bars(("B",), first=5000, rows=10)]), 1))
    (folder(tmp_path) / "A.csv").write_text("spoilt")
    since = datetime(2001, 5, 1, tzinfo=UTC)
    assert store.scan(NAME, storage.protocol.Filter(since=since)).collect().height == 10
