"""What only the Parquet store does: the folder is plain for other tools, and a crash at any step is made good."""

from __future__ import annotations

import shutil
from datetime import timedelta
from pathlib import Path

import polars as pl
import pyarrow.dataset
import pytest
from polars.testing import assert_frame_equal
from stored_frames import BARS, START, WIDE, bars, batch, hostile

import storage.files
import storage.parquet
import storage.parts
from marketsync.errors import StoreBusy, StoreDamaged, StoreError
from storage.fingerprints import Recipe
from storage.locks import exclusive
from storage.protocol import Filter, Mode, Written
from storage.registry import open_store

NAME = "made.bars"


class Crash(BaseException):
    """The process ends here."""


@pytest.fixture
def store(tmp_path: Path):
    return open_store(f"parquet://{tmp_path}")


def plain(tmp_path: Path) -> pl.DataFrame:
    """Return the rows as a tool that knows nothing of us lists them."""
    frame = pl.scan_parquet(tmp_path / "made" / "bars").collect()
    return frame.select(BARS.names).sort("symbol", "ts")


def test_other_tools_read_the_folder_as_it_is(store, tmp_path: Path):
    store.ensure(NAME, BARS)
    store.write(batch(NAME, bars(), mode=Mode.APPEND))
    store.write(batch(NAME, bars(first=40, rows=20, add=1.0), 2))
    wanted = store.scan(NAME).collect().sort("symbol", "ts")
    assert wanted.height == 120
    assert_frame_equal(plain(tmp_path), wanted)
    arrow = pyarrow.dataset.dataset(tmp_path / "made" / "bars", partitioning="hive").to_table()
    assert arrow.num_rows == 120
    assert set(arrow["period"].to_pylist()) == {"2001-01", "2001-02"}
    assert {path.suffix for path in (tmp_path / "made").rglob("*") if path.is_file()} == {".parquet"}


def test_other_tools_see_every_type_as_it_is(store, tmp_path: Path):
    store.ensure(NAME, WIDE)
    store.write(batch(NAME, hostile(store.capabilities), schema=WIDE))
    found = pl.scan_parquet(tmp_path / "made" / "bars").select(WIDE.names).collect()
    assert_frame_equal(found.sort(WIDE.key), store.scan(NAME).collect().sort(WIDE.key))


@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize("step", range(8))
def test_a_crash_between_any_two_steps_of_a_write_is_made_good(
    store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: Mode, step: int
):
    """Steps are what changes the disk: names put in place or taken away, in the order a write does them."""
    store.ensure(NAME, BARS)
    store.write(batch(NAME, bars(), 1, mode=Mode.APPEND))
    old = store.scan(NAME, Filter(system=True)).collect().sort("symbol", "ts")
    frame = bars(first=44, rows=40, add=1.0, segment="s2") if mode is Mode.UPSERT else bars(first=48, rows=40)
    both = pl.concat([old, frame]).unique(["symbol", "ts"], keep="last").sort("symbol", "ts")

    left = iter(range(step))
    replace, unlink = storage.files.os.replace, Path.unlink

    def counted(real):
        def acting(*arguments, **options):
            if next(left, None) is None:
                raise Crash
            return real(*arguments, **options)

        return acting

    with monkeypatch.context() as patch:
        patch.setattr(storage.files.os, "replace", counted(replace))
        patch.setattr(Path, "unlink", counted(unlink))
        try:
            store.write(batch(NAME, frame, 2, mode=mode))
            crashed = False
        except Crash:
            crashed = True
    assert crashed or step >= 4

    again = open_store(store.url)
    found = again.scan(NAME, Filter(system=True)).collect().sort("symbol", "ts")
    committed = again.committed(NAME, "lane")
    assert_frame_equal(found, old if committed == 1 else both)
    assert_frame_equal(plain(tmp_path), found.select(BARS.names))
    written = again.write(batch(NAME, frame, 2, mode=mode))
    assert written.already == (committed == 2)
    assert_frame_equal(again.scan(NAME, Filter(system=True)).collect().sort("symbol", "ts"), both)
    assert_frame_equal(plain(tmp_path), both.select(BARS.names))
    assert not list((tmp_path / "_marketsync" / NAME / "new").iterdir())
    assert not (tmp_path / "_marketsync" / NAME / "pending.json").exists()


def test_a_reader_sees_the_old_rows_while_a_writer_is_in_the_middle(store, tmp_path: Path, monkeypatch):
    store.ensure(NAME, BARS)
    store.write(batch(NAME, bars(), 1))
    reader = open_store(store.url)
    save, seen = storage.parquet.ParquetStore._save, []

    def looking(self, dataset, state):
        seen.append(reader.scan(NAME).collect()["close"].max())
        save(self, dataset, state)
        seen.append(reader.scan(NAME).collect()["close"].max())

    monkeypatch.setattr(storage.parquet.ParquetStore, "_save", looking)
    store.write(batch(NAME, bars(add=1000.0), 2))
    assert seen == [104.7, 1104.7]


def test_a_table_whose_folder_was_removed_is_no_table(store, tmp_path: Path):
    before = store.ensure(NAME, BARS)
    store.write(batch(NAME, bars(), 5))
    shutil.rmtree(tmp_path / "made" / "bars")
    assert store.marker(NAME) is None
    assert store.ensure(NAME, BARS) != before
    assert (store.committed(NAME, "lane"), store.count(NAME)) == (0, 0)


def test_a_folder_that_is_not_the_one_described_is_refused(store, tmp_path: Path):
    store.ensure(NAME, BARS)
    store.write(batch(NAME, bars(), 5))
    for path in (tmp_path / "made" / "bars").rglob("*.parquet"):
        path.rename(path.with_name("other.parquet"))
    with pytest.raises(StoreError, match="put the folder back"):
        open_store(store.url).marker(NAME)
    shutil.rmtree(tmp_path / "_marketsync")
    with pytest.raises(StoreError, match=r"other\.parquet is in the way"):
        open_store(store.url).ensure(NAME, BARS)


def test_an_upsert_touches_only_the_parts_in_which_a_row_changes(store, tmp_path: Path):
    store.ensure(NAME, BARS)
    for seq, subject in enumerate("ABC", 1):
        store.write(batch(NAME, bars((subject,), rows=100), seq, mode=Mode.APPEND))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.parquet")}
    assert len(before) == 6
    changed = bars(("B",), first=98, rows=4, add=1.0)
    assert store.write(batch(NAME, changed, 4)) == Written(inserted=2, updated=2)
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.parquet")}
    assert len(after) == 6
    assert len(set(before.items()) - set(after.items())) == 1
    assert store.count(NAME, Filter(["B"], since=START + timedelta(hours=98))) == 4


ASKED = {
    "count": lambda store: store.count(NAME, Filter(since=START)),
    "watermarks": lambda store: store.watermarks(NAME),
    "fingerprints": lambda store: store.fingerprints(NAME, Recipe(b"seed")).height,
    "query": lambda store: store.query(f"SELECT close FROM {NAME} ORDER BY close DESC LIMIT 1").item(),
    "arrow": lambda store: sum(part.num_rows for part in store.arrow(NAME)),
    "scan": lambda store: store.scan(NAME).collect().height,
}


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("busy", [False, True])
def test_a_reader_whose_files_a_writer_takes_away_looks_again(
    store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str, busy: bool
):
    store.ensure(NAME, BARS)
    store.write(batch(NAME, bars(), 1))
    store.close()
    before = ASKED[asked](store)
    writer = open_store(f"parquet://{tmp_path}")
    there, seq = storage.parts.Parts._there, [1]

    def rewritten(parts, part):
        """A writer in the midst of each look, or of the first: until it is kept out."""
        if busy or seq[0] == 1:
            seq[0] += 1
            with monkeypatch.context() as calm:
                calm.setattr(storage.parts.Parts, "_there", there)
                calm.setattr(writer, "_locked", lambda name: exclusive(store._ours(name) / "lock", "it", 0))
                try:
                    writer.write(batch(NAME, bars(add=float(seq[0])), seq[0]))
                except StoreBusy:
                    seq[0] -= 1
        return there(parts, part)

    monkeypatch.setattr(storage.parts.Parts, "_there", rewritten)
    after = ASKED[asked](store)
    assert seq[0] > 1
    if asked not in ("fingerprints", "query"):
        assert after == before


def test_a_part_that_is_gone_for_good_is_still_damage(store, tmp_path: Path):
    store.ensure(NAME, BARS)
    store.write(batch(NAME, bars(), 1))
    for file in tmp_path.rglob("*.parquet"):
        file.unlink()
    for asked in ASKED.values():
        with pytest.raises(StoreDamaged, match="is missing"):
            asked(store)


def test_the_first_look_at_a_table_may_meet_a_writer(store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store.ensure(NAME, BARS)
    store.write(batch(NAME, bars(), 1))
    reader = open_store(f"parquet://{tmp_path}")
    made = storage.parquet._from_json

    def late(*given: str | bytes):
        with monkeypatch.context() as calm:
            calm.setattr(storage.parquet, "_from_json", made)
            store.write(batch(NAME, bars(add=1.0), 2))
        monkeypatch.setattr(storage.parquet, "_from_json", made)
        return made(*given)

    monkeypatch.setattr(storage.parquet, "_from_json", late)
    assert reader.count(NAME) == 96
