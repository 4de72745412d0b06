"""What only the CSV store does: files a person can open, appended to where possible, whole after any crash."""

from __future__ import annotations

import csv
import io
import json
import threading
import zlib
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from polars.testing import assert_frame_equal
from stored_frames import BARS, HOSTILE_TEXT, INSTRUMENTS, START, bars, batch, stamped

import storage.csv
import storage.files
from marketsync.errors import StoreError
from marketsync.schema import Column, ColumnType, Schema
from storage.csv import file_name
from storage.protocol import Filter, Mode, Written
from storage.registry import open_store

NAME = "made.bars"


class Crash(BaseException):
    """The process ends here."""


NAMES = ((storage.files.os, "replace"), (Path, "unlink"))  # what gives and takes names


def crashes(patch: pytest.MonkeyPatch, step: int, act: Callable, steps: Iterable[tuple[object, str]]) -> bool:
    """Do it until so many steps are done, and tell whether there was one more, in the middle of which it ends."""
    left = iter(range(step))

    def doomed(real: Callable) -> Callable:
        def acting(*arguments, **options):
            if next(left, None) is None:
                if real.__name__ == "_end_with":
                    path, offset, content = arguments
                    real(path, offset, content[: len(content) // 2])
                raise Crash
            return real(*arguments, **options)

        return acting

    for owner, name in steps:
        patch.setattr(owner, name, doomed(getattr(owner, name)))
    try:
        act()
    except Crash:
        return True
    return False


@pytest.fixture
def store(tmp_path: Path):
    return open_store(f"csv://{tmp_path}")


def folder(tmp_path: Path) -> Path:
    return tmp_path / "made" / "bars"


def hour(number: int) -> datetime:
    """The time of that row of `bars`."""
    return START + timedelta(hours=number)


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


def test_a_change_of_the_newest_rows_reads_and_writes_no_more_of_a_long_file(
    store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    touched: list[int] = []
    decoded, end_with = storage.csv._decoded, storage.csv._end_with

    def read(content: bytes, schema: Schema, path: Path) -> pl.DataFrame:
        touched.append(len(content))
        return decoded(content, schema, path)

    def written(path: Path, offset: int, content: bytes) -> None:
        touched.append(len(content))
        end_with(path, offset, content)

    store.ensure(NAME, BARS)
    store.write(batch(NAME, bars(("A",), rows=6000), 1, mode=Mode.APPEND))
    path = folder(tmp_path) / "A.csv"
    before, inode = path.read_bytes(), path.stat().st_ino
    monkeypatch.setattr("storage.csv._decoded", read)
    monkeypatch.setattr("storage.csv._end_with", written)
    for seq, act in enumerate(
        (
            lambda: store.write(batch(NAME, bars(("A",), first=5990, rows=20, add=1.0), 2)),
            lambda: store.replace(NAME, BARS, bars(("A",), first=6000, rows=9), Filter(["A"], hour(6000))),
            lambda: store.delete(NAME, Filter(["A"], hour(6008))),
        )
    ):
        touched.clear()
        act()
        assert 0 < sum(touched) < 4 * storage.csv._MARK_BYTES < len(before) // 3, seq
    assert path.stat().st_ino == inode
    assert path.read_bytes()[: len(before) // 2] == before[: len(before) // 2]
    found = store.scan(NAME, Filter(since=hour(5980))).collect()
    assert len(touched) == 3  # what a span is read from is found by marks, too
    wanted = pl.concat([bars(("A",), first=5980, rows=10), bars(("A",), first=5990, rows=10, add=1.0)])
    assert_frame_equal(found, pl.concat([wanted, bars(("A",), first=6000, rows=8)]).select(BARS.names))
    assert store.watermarks(NAME) == {"A": hour(6007)}
    assert store.count(NAME) == 6008


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

    with monkeypatch.context() as patch:
        crashed = crashes(patch, step, lambda: store.write(batch(NAME, frame, 2)), NAMES)
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
    assert again.scan(NAME, Filter(["B"])).collect().height == 48


def test_bounds_open_only_files_that_can_hold_such_rows(store, tmp_path: Path):
    store.ensure(NAME, BARS)
    store.write(batch(NAME, pl.concat([bars(("A",), rows=10), bars(("B",), first=5000, rows=10)]), 1))
    (folder(tmp_path) / "A.csv").write_text("spoilt")
    since = datetime(2001, 5, 1, tzinfo=UTC)
    assert store.scan(NAME, Filter(since=since)).collect().height == 10


def test_a_crash_at_any_step_of_a_change_in_place_is_made_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """One batch that changes the ends of A and B, appends to C, and writes D anew; the crash is in the middle of what
    is put at an end, and before anything else is done to a file or waited for."""
    monkeypatch.setattr("storage.csv._MARK_BYTES", 200)
    changed = [
        (bars(("A", "B"), first=45, rows=6, add=0.5)),
        bars(("C",), first=48, rows=3),
        bars(("D",), rows=1, add=2),
    ]
    frame = pl.concat(changed)
    met: set[int] = set()
    crashed, step = True, -1
    while crashed:
        step += 1
        store = open_store(f"csv://{tmp_path}/{step}")
        store.ensure(NAME, BARS)
        store.write(batch(NAME, bars(("A", "B", "C", "D")), 1, mode=Mode.APPEND))
        old = store.scan(NAME).collect().sort("symbol", "ts")
        new = pl.concat([old, frame.select(BARS.names)]).unique(["symbol", "ts"], keep="last").sort("symbol", "ts")
        with monkeypatch.context() as patch:
            write = partial(store.write, batch(NAME, frame, 2))
            crashed = crashes(patch, step, write, (*NAMES, (storage.csv, "_end_with"), (storage.csv, "sync")))
        again = open_store(store.url)
        committed = again.committed(NAME, "lane")
        met.add(committed)
        assert_frame_equal(again.scan(NAME).collect().sort("symbol", "ts"), old if committed == 1 else new)
        assert again.write(batch(NAME, frame, 2)).already == (committed == 2)
        assert_frame_equal(again.scan(NAME).collect().sort("symbol", "ts"), new)
        plain = pl.concat([pl.read_csv(path).select("symbol", "ts") for path in (tmp_path / str(step)).rglob("*.csv")])
        assert plain.height == new.height
        assert not list((tmp_path / str(step)).rglob("_new/*"))
    assert met == {1, 2}
    assert step > 12


def test_a_writer_that_dies_while_another_process_looks_keeps_the_rows_it_has_appended(
    store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    store.ensure(NAME, BARS)
    store.write(batch(NAME, bars(("A", "B")), 1, mode=Mode.APPEND))
    frame = pl.concat([bars(("A",), first=48, rows=3), bars(("B",), rows=1, add=1.0)])
    with monkeypatch.context() as patch:  # the journal has its name, and nothing is done yet
        assert crashes(patch, 1, lambda: store.write(batch(NAME, frame, 2)), NAMES)
    journal, exists = folder(tmp_path) / "_journal.json", Path.exists
    assert journal.exists()
    not_yet = iter([journal])
    monkeypatch.setattr(Path, "exists", lambda path: not (path == journal and next(not_yet, None)) and exists(path))
    again = open_store(store.url)
    assert again.committed(NAME, "lane") in (1, 2)  # whatever it was when we looked
    assert again.committed(NAME, "lane") == 2
    assert again.scan(NAME).collect().height == 99


def test_a_reader_never_sees_a_file_that_is_half_changed(store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Every row has as many bytes as before, and the last row stays, so that nothing but the content tells."""
    monkeypatch.setattr("storage.csv._MARK_BYTES", 200)
    end_with = storage.csv._end_with
    half, looked = threading.Event(), threading.Event()

    def slowly(path: Path, offset: int, content: bytes) -> None:
        with open(path, "r+b") as file:
            file.seek(offset)
            file.write(content[: len(content) // 2])
        half.set()
        assert looked.wait(60)
        end_with(path, offset, content)

    def frame(value: float) -> pl.DataFrame:
        return bars(("A",)).with_columns(close=pl.when(pl.int_range(48) < 47).then(value).otherwise(0.5))

    store.ensure(NAME, BARS)
    store.write(batch(NAME, frame(1.5), 1))
    reader = open_store(store.url)
    assert reader.scan(NAME).collect().height == 48
    opened = storage.csv._content

    def seen(path: Path, *arguments) -> bytes | None:
        content = opened(path, *arguments)
        if half.is_set():
            looked.set()  # the writer goes on when the reader has seen its half
        return content

    writer = threading.Thread(target=store.write, args=[batch(NAME, frame(2.5).tail(8), 2)])
    with monkeypatch.context() as patch:
        patch.setattr("storage.csv._end_with", slowly)
        patch.setattr("storage.csv._content", seen)
        writer.start()
        assert half.wait(60)
        found = reader.scan(NAME).collect()
        writer.join()
    assert looked.is_set()
    assert found["close"].to_list() == [1.5] * 40 + [2.5] * 7 + [0.5]


def test_a_table_from_before_there_were_marks_goes_on_and_gains_them(
    store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("storage.csv._MARK_BYTES", 200)
    store.ensure(NAME, BARS)
    store.write(batch(NAME, bars(("A",), rows=40), 1))
    path, table = folder(tmp_path) / "A.csv", folder(tmp_path) / "_schema.json"
    said = json.loads(table.read_bytes())
    said["files"]["A.csv"] = [*said["files"]["A.csv"][:5], zlib.crc32(path.read_bytes()[-256:])]
    table.write_text(json.dumps(said))

    again = open_store(store.url)
    assert again.scan(NAME).collect().height == 40
    assert again.write(batch(NAME, bars(("A",), first=40, rows=40), 2)) == Written(inserted=40)
    inode = path.stat().st_ino
    assert again.write(batch(NAME, bars(("A",), first=75, rows=10, add=1.0), 3)) == Written(inserted=5, updated=5)
    assert path.stat().st_ino == inode
    assert again.write(batch(NAME, bars(("A",), first=1, rows=1, add=1.0), 4)) == Written(updated=1)
    found = open_store(store.url).scan(NAME).collect()["close"].to_list()
    wanted = bars(("A",), rows=85)["close"].to_list()
    assert found == [value + (hour == 1 or hour >= 75) for hour, value in enumerate(wanted)]


NOTES = Schema(
    (Column("text", ColumnType.STR), Column("at", ColumnType.DATETIME_NS), Column("by", ColumnType.STR)),
    key=("at", "by"),
    time="at",
)
NOTED = 981_000_000_000_000_000  # nanoseconds since 1970


def notes(first: int, texts: list[str | None]) -> pl.DataFrame:
    """Three notes at each time, and several times in each microsecond."""
    places = range(first, first + len(texts))
    frame = pl.DataFrame(
        {
            "text": texts,
            "at": [NOTED + place // 3 * 400 for place in places],
            "by": [f'"{place % 3}\n' for place in places],
        },
        schema={"text": pl.String(), "at": pl.Int64(), "by": pl.String()},
    )
    return stamped(frame.with_columns(pl.col("at").cast(pl.Datetime("ns", "UTC"))))


def told(frame: pl.DataFrame) -> dict[tuple[int, str], str | None]:
    return {(at, by): text for text, at, by in frame.select("text", pl.col("at").to_physical(), "by").iter_rows()}


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["upsert", "upsert", "upsert", "replace", "delete"]),
            st.integers(0, 60),
            st.lists(st.none() | st.sampled_from(HOSTILE_TEXT) | st.text('",\n\ra', max_size=30), max_size=30),
        ),
        min_size=2,
        max_size=8,
    )
)
@settings(max_examples=15)
def test_whatever_rows_hold_marks_are_where_they_begin(steps: list[tuple[str, int, list[str | None]]]):
    name = "made.notes"
    with TemporaryDirectory() as place, pytest.MonkeyPatch.context() as patch:
        patch.setattr("storage.csv._MARK_BYTES", 40)
        store = open_store(f"csv://{place}")
        store.ensure(name, NOTES)
        model: dict[tuple[int, str], str | None] = {}
        for seq, (act, first, texts) in enumerate(steps, 1):
            frame = notes(first, texts)
            since = NOTED // 1000 + (first + 2) // 3 * 400 // 1000
            span = Filter(since=datetime.fromtimestamp(0, UTC) + timedelta(microseconds=since))
            if act == "upsert":
                store.write(batch(name, frame, seq, schema=NOTES))
            elif act == "delete":
                store.delete(name, span)
            else:
                frame = frame.filter(pl.col("at").to_physical() >= since * 1000)
                store.replace(name, NOTES, frame, span)
            if act != "upsert":
                model = {key: text for key, text in model.items() if key[0] < since * 1000}
            if act != "delete":
                model |= told(frame)
            assert told(store.scan(name).collect()) == model
            within = {key: text for key, text in model.items() if key[0] >= since * 1000}
            assert told(store.scan(name, span).collect()) == within
        at_the_end(Path(place, "made", "notes"), model)


def at_the_end(table: Path, model: dict[tuple[int, str], str | None]) -> None:
    """Look with other eyes whether the file is sorted and its marks are true."""
    files = json.loads((table / "_schema.json").read_text())["files"]
    assert len(files) == (len(model) > 0)
    for name, (*_, crc, base, marks) in files.items():
        content = (table / name).read_bytes()
        assert base == 0
        assert zlib.crc32(content) == crc
        rows = [row["at"] for row in csv.DictReader(io.StringIO(content.decode(), newline=""))]
        assert rows == sorted(rows)
        for offset, before, since in marks:
            assert zlib.crc32(content[:offset]) == before
            after = [row[1] for row in csv.reader(io.StringIO(content[offset:].decode(), newline=""))]
            assert after == rows[-len(after) :]
            assert after[0] == since


@settings(max_examples=40)
@given(st.lists(st.lists(st.integers(0, 12), min_size=1, unique=True), min_size=2, max_size=6))
def test_each_symbol_has_its_own_times_whichever_of_them_the_others_have(hours: list[list[int]]):
    """The files of a commit share the texts of times, and rows come in any order."""
    every = bars([f"S{number}" for number in range(len(hours))], rows=13)
    wanted = pl.concat(
        every.filter(pl.col("symbol") == f"S{number}", pl.col("ts").is_in([hour(each) for each in some]))
        for number, some in enumerate(hours)
    )
    with TemporaryDirectory() as name:
        store = open_store(f"csv://{name}")
        store.ensure(NAME, BARS)
        store.write(batch(NAME, wanted.reverse(), mode=Mode.APPEND))
        found = store.scan(NAME).collect().sort("symbol", maintain_order=True)  # each file by time
        assert_frame_equal(found, wanted.sort("symbol", "ts").select(BARS.names))
