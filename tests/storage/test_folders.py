"""What stores that are folders do alike with folders that somebody moved, copied, or gave no right to write to."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import filelock
import pytest
from stored_frames import BARS, START, bars, batch

import storage.delta
from marketsync.errors import ConfigurationError, ForeignTable, StoreError
from storage.adoption import Wish
from storage.protocol import Written
from storage.registry import open_store

ENGINES = ("csv", "delta", "excel", "parquet")


@pytest.mark.parametrize("engine", ENGINES)
def test_a_folder_that_was_moved_without_its_empty_folders_is_written_and_a_copied_table_is_refused(engine, tmp_path):
    store = open_store(f"{engine}://{tmp_path}/made")
    store.ensure("made.bars", BARS)
    store.write(batch("made.bars", bars()))
    store.close()
    for folder, _, _ in os.walk(tmp_path / "made", topdown=False):
        if not os.listdir(folder):
            os.rmdir(folder)  # as git, zip and what keeps folders alike leave them out
    shutil.move(tmp_path / "made", tmp_path / "moved")
    store = open_store(f"{engine}://{tmp_path}/moved")
    assert store.count("made.bars") == 96
    assert store.write(batch("made.bars", bars(add=1.0), 2)) == Written(updated=96)
    assert store.write(batch("made.bars", bars(first=100), 3)) == Written(inserted=96)

    for path in [*(tmp_path / "moved").rglob("*bars*")]:
        if path.parent.name in ("made", "_marketsync"):
            to = path.with_name(path.name.replace("bars", "copy"))
            (shutil.copytree if path.is_dir() else shutil.copy)(path, to)
    with pytest.raises(ForeignTable, match=r"is the table of made\.bars, copied or moved"):
        store.write(batch("made.copy", bars(first=500), 3))
    with pytest.raises(ForeignTable):
        store.ensure("made.copy", BARS)
    assert store.query("SELECT count(*) AS n FROM made.bars")["n"].item() == 192
    if engine != "excel":
        assert store.adopt("made.copy", BARS, Wish(segment="s", at=START)).rows == 192  # pyright: ignore[reportAttributeAccessIssue]
        assert store.marker("made.copy") != store.marker("made.bars")
        assert store.write(batch("made.copy", bars(first=500), 3)) == Written(inserted=96)
    store.close()


def test_a_delta_table_of_an_earlier_version_learns_whose_it_is(tmp_path, monkeypatch):
    with monkeypatch.context() as earlier:
        earlier.setattr(storage.delta, "_DATASET", "marketsync.note")
        store = open_store(f"delta://{tmp_path}")
        marker = store.ensure("made.bars", BARS)
        store.write(batch("made.bars", bars()))
    store = open_store(f"delta://{tmp_path}")
    assert store.ensure("made.bars", BARS) == marker
    assert store.ensure("made.bars", BARS) == marker
    assert store.info("made.bars").commits == 3
    shutil.copytree(tmp_path / "made" / "bars", tmp_path / "made" / "copy")
    with pytest.raises(ForeignTable, match=r"is the table of made\.bars, copied or moved"):
        store.ensure("made.copy", BARS)
    assert store.write(batch("made.bars", bars(), 2)) == Written(unchanged=96)


@pytest.mark.parametrize("engine", ENGINES)
def test_what_the_operating_system_refuses_is_told_in_our_words(engine, tmp_path: Path, monkeypatch):
    store = open_store(f"{engine}://{tmp_path}/made")
    with pytest.raises(ConfigurationError, match="has 265 characters"):
        store.ensure("made." + "x" * 260, BARS)
    store.ensure("made.bars", BARS)

    def refuse(*given: object, **named: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "mkdir", refuse)
        with pytest.raises(StoreError, match=r"cannot be made: .*Read-only"):
            store.ensure("other.bars", BARS)
    with monkeypatch.context() as patched:
        patched.setattr(filelock.FileLock, "acquire", refuse)
        with pytest.raises(StoreError, match=r"cannot be locked: .*Read-only"):
            store.write(batch("made.bars", bars()))
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", refuse)
        with pytest.raises(StoreError, match=r"cannot be written: .*Read-only"):
            store.write(batch("made.bars", bars()))
    assert store.write(batch("made.bars", bars())) == Written(inserted=96)
    store.close()
