"""What only the Delta store does: other programs read and write the table, and a batch touches few of its files."""

from __future__ import annotations

import json
import struct
import subprocess
import zlib
from datetime import UTC, datetime, timedelta
from pathlib import Path

import polars as pl
import pytest
from conftest import ROOT, python
from deltalake import CommitProperties, DeltaTable, QueryBuilder, write_deltalake
from polars.testing import assert_frame_equal
from stored_frames import BARS, START, WIDE, bars, batch, differences, hostile

import storage.delta
import storage.parts
from marketsync.errors import StoreError
from marketsync.schema import Column, ColumnType, Schema
from storage.adoption import Wish
from storage.protocol import Filter, Mode, Written
from storage.registry import open_store

BARS_NAME = "made.bars"


@pytest.fixture
def store(tmp_path: Path):
    return open_store(f"delta://{tmp_path}")


def folder(tmp_path: Path) -> Path:
    return tmp_path / "made" / "bars"


def files(tmp_path: Path) -> dict[str, int]:
    """Return the data files that the newest version names, each with its rows."""
    actions = pl.DataFrame(DeltaTable(folder(tmp_path)).get_add_actions(flatten=True))
    return dict(actions.select("path", "num_records").iter_rows())


def test_other_readers_see_the_same_rows(store, tmp_path: Path):
    store.ensure(BARS_NAME, BARS)
    frame = bars()
    store.write(batch(BARS_NAME, frame, mode=Mode.APPEND))
    store.write(batch(BARS_NAME, bars(first=4, rows=2, add=1.0), 2))
    wanted = store.scan(BARS_NAME, Filter(system=True)).collect().sort("symbol", "ts")
    plain = pl.read_delta(str(folder(tmp_path))).sort("symbol", "ts")
    assert_frame_equal(plain.drop("_period"), wanted)
    assert plain["_period"].unique().sort().to_list() == ["2001-01", "2001-02"]
    table = DeltaTable(folder(tmp_path))
    engine = QueryBuilder().register("bars", table).execute("SELECT count(*) AS n FROM bars WHERE symbol = 'NA'")
    assert pl.DataFrame(engine.read_all())["n"].to_list() == [48]
    assert table.to_pyarrow_table().num_rows == 96
    assert {field.name: field.metadata for field in table.schema().fields}["close"] == {"comment": "unadjusted"}


def test_other_readers_see_every_type(store, tmp_path: Path):
    store.ensure("made.bars", WIDE)
    store.write(batch("made.bars", hostile(store.capabilities), schema=WIDE, mode=Mode.APPEND))
    wanted = store.scan("made.bars").collect().sort(WIDE.key)
    plain = pl.read_delta(str(folder(tmp_path))).sort(WIDE.key)
    assert_frame_equal(plain.select(WIDE.names).cast(WIDE.polars()), wanted)  # pyright: ignore[reportArgumentType]


def test_other_programs_may_change_the_table_between_our_writes(store, tmp_path: Path):
    store.ensure(BARS_NAME, BARS)
    store.write(batch(BARS_NAME, bars(), mode=Mode.APPEND))
    foreign = bars(("foreign",), first=700).with_columns(pl.col("ts").dt.strftime("%Y-%m").alias("_period"))
    write_deltalake(folder(tmp_path), foreign, mode="append")
    assert store.count(BARS_NAME) == 144
    assert store.write(batch(BARS_NAME, bars(("foreign",), first=700, rows=50), 2)) == Written(2, 0, 48)
    DeltaTable(folder(tmp_path)).delete("symbol = 'NA'")
    assert store.count(BARS_NAME) == 98
    DeltaTable(folder(tmp_path)).optimize.compact()
    assert store.write(batch(BARS_NAME, bars(add=1.0), 3)) == Written(inserted=48, updated=48)
    assert store.count(BARS_NAME) == 146


def test_what_another_program_commits_under_our_feet_is_taken_into_account(store, tmp_path: Path, monkeypatch):
    store.ensure(BARS_NAME, BARS)
    store.write(batch(BARS_NAME, bars(), mode=Mode.APPEND))
    written = storage.delta._written
    foreign = bars(first=48, rows=2).with_columns(pl.col("ts").dt.strftime("%Y-%m").alias("_period"))
    rivals = [
        lambda: write_deltalake(folder(tmp_path), foreign, mode="append"),
        lambda: DeltaTable(folder(tmp_path)).delete("symbol = 'NA' AND volume < 1045"),
    ]

    def interrupted(*arguments, **options):
        # between the decision of this writer and its commit, another program adds, then deletes, rows of the batch
        if rivals:
            rivals.pop(0)()
        return written(*arguments, **options)

    monkeypatch.setattr(storage.delta, "_written", interrupted)
    frame = pl.concat([bars(first=40, rows=5, add=0.5), bars(first=45, rows=10)])
    assert store.write(batch(BARS_NAME, frame, 2)) == Written(inserted=15, updated=5, unchanged=10)
    assert not rivals
    found = store.scan(BARS_NAME).collect()
    assert found.height == 55 + 15
    assert found.select("symbol", "ts").is_unique().all()
    assert store.committed(BARS_NAME, "lane") == 2


def test_statistics_that_another_writer_cut_to_milliseconds_hide_no_row(store, monkeypatch):
    late = bars(("A",), rows=1).with_columns(pl.col("ts") + timedelta(microseconds=456))
    monkeypatch.setattr(storage.delta, "_statistic", lambda value: str(value.isoformat("T", "milliseconds")[:23] + "Z"))
    narrow = Schema(BARS.columns, BARS.key, "ts", None, BARS.period)
    store.ensure("made.narrow", narrow)
    store.write(batch("made.narrow", late, 1, schema=narrow))
    assert store.write(batch("made.narrow", late, 2, schema=narrow)) == Written(unchanged=1)


def test_a_lane_is_not_forgotten_when_the_table_expires_transactions(store, tmp_path: Path):
    store.ensure(BARS_NAME, BARS)
    DeltaTable(folder(tmp_path)).alter.set_table_properties(
        {"delta.setTransactionRetentionDuration": "interval 0 seconds"}
    )
    store.write(batch(BARS_NAME, bars(), 4, mode=Mode.APPEND))
    store.maintain(BARS_NAME)
    again = open_store(store.url)
    assert again.committed(BARS_NAME, "lane") == 4
    assert again.write(batch(BARS_NAME, bars(), 4, mode=Mode.APPEND)) == Written(already=True)


def test_a_table_that_is_not_ours_is_left_alone(store, tmp_path: Path):
    write_deltalake(folder(tmp_path), bars())
    with pytest.raises(StoreError, match="not made by MarketSync"):
        store.ensure(BARS_NAME, BARS)
    assert DeltaTable(folder(tmp_path)).version() == 0


def test_a_table_with_features_that_hide_rows_of_its_files_is_refused(store, tmp_path: Path):
    store.ensure(BARS_NAME, BARS)
    from deltalake import TableFeatures

    DeltaTable(folder(tmp_path)).alter.add_feature(TableFeatures.DeletionVectors, True)
    with pytest.raises(StoreError, match="deletionVectors"):
        open_store(store.url).scan(BARS_NAME)


def test_a_table_of_another_program_is_adopted_whole_wherever_it_is_and_without_the_rows_that_it_has_deleted(tmp_path):
    place = tmp_path / "Märkte & more" / "made" / "bars"
    theirs = bars(("BRK B",), rows=4).select(BARS.names)
    write_deltalake(place, theirs, partition_by=["symbol"])
    delete_by_vector(place, 1)
    store = open_store(f"delta://{place.parents[1]}")
    adopted = store.adopt(BARS_NAME, BARS, Wish("adopted:2026-11-21", datetime(2026, 11, 21, tzinfo=UTC)))
    assert adopted.rows == 3
    assert differences(store.scan(BARS_NAME).collect(), theirs[[0, 2, 3]], BARS.key) == []


def delete_by_vector(place: Path, row: int) -> None:
    """Delete a row of the table's one file as Spark does: by a list of rows beside it."""
    first = place / "_delta_log" / f"{0:020d}.json"
    actions = [json.loads(line) for line in first.read_text().splitlines()]
    (added,) = (action["add"] for action in actions if "add" in action)
    for action in actions:
        if "protocol" in action:
            features = ["deletionVectors"]
            action["protocol"] = {"minReaderVersion": 3, "minWriterVersion": 7}
            action["protocol"] |= {"readerFeatures": features, "writerFeatures": features}
    first.write_text("\n".join(map(json.dumps, actions)))
    bitmap = struct.pack("<IQI", 1681511377, 1, 0) + struct.pack("<IIHHIH", 12346, 1, 0, 0, 16, row)
    file = place / "rows.bin"
    file.write_bytes(b"\1" + struct.pack(">I", len(bitmap)) + bitmap + struct.pack(">I", zlib.crc32(bitmap)))
    vector = {"storageType": "p", "pathOrInlineDv": file.as_uri(), "offset": 1, "sizeInBytes": len(bitmap)}
    removed = {name: added[name] for name in ("path", "partitionValues", "size")}
    removed |= {"deletionTimestamp": 1, "dataChange": True, "extendedFileMetadata": True}
    changes = [{"remove": removed}, {"add": {**added, "deletionVector": {**vector, "cardinality": 1}}}]
    (place / "_delta_log" / f"{1:020d}.json").write_text("\n".join(map(json.dumps, changes)))


def test_equal_rows_rewrite_nothing_and_changed_rows_only_the_file_they_are_in(store, tmp_path: Path):
    store.ensure(BARS_NAME, BARS)
    for seq, subject in enumerate(("A", "B", "C"), 1):
        store.write(batch(BARS_NAME, bars((subject,), rows=100), seq, mode=Mode.APPEND))
    before = files(tmp_path)
    assert sorted(before.values()) == [39, 39, 39, 61, 61, 61]
    again = pl.concat([bars((subject,), rows=100, segment="s2") for subject in "AB"])
    assert store.write(batch(BARS_NAME, again, 4)) == Written(unchanged=200)
    assert files(tmp_path) == before
    one = bars(("B",), first=99, rows=1, add=1.0)
    assert store.write(batch(BARS_NAME, one, 5)) == Written(updated=1)
    after = files(tmp_path)
    gone, new = set(before) - set(after), set(after) - set(before)
    assert len(gone) == len(new) == 1
    assert gone.pop().startswith("_period=2001-02/")
    assert store.write(batch(BARS_NAME, bars(("B",), first=100, rows=1), 6)) == Written(inserted=1)
    assert set(after) < set(files(tmp_path))


def test_files_outside_of_the_batch_are_not_even_opened(store, tmp_path: Path):
    store.ensure(BARS_NAME, BARS)
    for seq, (subject, first) in enumerate([("A", 0), ("M", 0), ("A", 24), ("Z", 24), ("M", 24), ("M", 2000)], 1):
        store.write(batch(BARS_NAME, bars((subject,), first=first, rows=10), seq, mode=Mode.APPEND))
    rows_at = START + timedelta(hours=24)
    kept = store.scan(BARS_NAME, Filter(subjects=["M"], since=rows_at, until=rows_at + timedelta(hours=10))).collect()
    assert kept.height == 10
    for path in folder(tmp_path).rglob("*.parquet"):
        frame = pl.read_parquet(path, hive_partitioning=False)
        if not (frame["symbol"][0] == "M" and frame["ts"].min() == rows_at):
            path.write_bytes(b"not parquet")
    assert store.write(batch(BARS_NAME, bars(("M",), first=24, rows=10), 7)) == Written(unchanged=10)
    assert store.write(batch(BARS_NAME, bars(("M",), first=24, rows=12, add=1.0), 8)) == Written(2, 10)
    assert store.count(BARS_NAME, Filter(["M"], rows_at, rows_at + timedelta(hours=12))) == 12
    assert store.delete(BARS_NAME, Filter(["M"], rows_at, rows_at + timedelta(hours=1))) == 1
    with pytest.raises(Exception, match="parquet"):
        store.scan(BARS_NAME, Filter(["A"])).collect()


def test_parts_larger_than_memory_allows_are_rewritten_in_groups(store, tmp_path: Path, monkeypatch):
    store.ensure(BARS_NAME, BARS)
    for seq in range(1, 6):
        store.write(batch(BARS_NAME, bars(("A",), first=48 + 10 * seq, rows=10), seq, mode=Mode.APPEND))
    monkeypatch.setattr(storage.parts, "_MEMORY_ROWS", 20)
    changed = bars(("A",), first=58, rows=50, add=1.0).gather_every(10)
    assert store.write(batch(BARS_NAME, changed, 6)) == Written(updated=5)
    assert sorted(files(tmp_path).values()) == [9, 18, 23]
    store.maintain(BARS_NAME)
    assert sorted(files(tmp_path).values()) == [9, 18, 23]
    monkeypatch.undo()
    store.maintain(BARS_NAME)
    assert list(files(tmp_path).values()) == [50]
    found = store.scan(BARS_NAME).collect().sort("ts")
    assert_frame_equal(found.gather_every(10), changed.select(BARS.names))
    assert found["ts"].is_unique().all()


def test_small_files_are_merged_as_they_gather(store, tmp_path: Path):
    store.ensure(BARS_NAME, BARS)
    hours = 24 * 27
    for seq in range(1, 100):
        store.write(batch(BARS_NAME, bars(("A",), first=48 + seq % hours, rows=1, segment=f"s{seq}"), seq))
    counts = list(files(tmp_path).values())
    assert sum(counts) == 99
    assert len(counts) <= 2 * storage.parts.CLASS_PARTS
    assert store.committed(BARS_NAME, "lane") == 99
    assert store.scan(BARS_NAME, Filter(system=True)).collect()["_segment"].n_unique() == 99


def test_maintenance_deletes_files_that_no_version_of_the_last_day_names(store, tmp_path: Path):
    import os
    import time

    store.ensure(BARS_NAME, BARS)
    store.write(batch(BARS_NAME, bars(rows=10), 1))
    orphan = folder(tmp_path) / "_period=2001-01" / "part-of-a-writer-that-died.parquet"
    orphan.write_bytes(b"half")
    store.maintain(BARS_NAME)
    assert orphan.exists()  # it may belong to a writer that is about to commit it
    two_days_ago = time.time() - 2 * 86_400
    os.utime(orphan, (two_days_ago, two_days_ago))
    assert "1 files that no reader" in store.maintain(BARS_NAME)
    assert not orphan.exists()
    assert (folder(tmp_path) / storage.delta._LOCK).exists()
    assert store.count(BARS_NAME) == 20


def test_a_key_that_the_table_holds_twice_is_healed_when_it_comes_again(store, tmp_path: Path):
    store.ensure(BARS_NAME, BARS)
    store.write(batch(BARS_NAME, bars(), 1, mode=Mode.APPEND))
    store.write(batch(BARS_NAME, bars(rows=5), 2, mode=Mode.APPEND))
    assert store.count(BARS_NAME) == 106
    assert store.write(batch(BARS_NAME, bars(rows=6), 3)) == Written(updated=10, unchanged=2)
    assert store.count(BARS_NAME) == 96


def test_a_crash_between_the_two_commits_of_a_new_column_is_made_good(store, tmp_path: Path):
    store.ensure(BARS_NAME, BARS)
    wider = Schema((*BARS.columns, Column("more", ColumnType.F64)), BARS.key, "ts", "symbol", BARS.period)
    (more,) = (f for f in storage.delta._delta_schema(wider).fields if f.name == "more")
    DeltaTable(folder(tmp_path)).alter.add_columns([more], commit_properties=CommitProperties())
    assert store.schema(BARS_NAME) == BARS
    store.ensure(BARS_NAME, wider)
    assert store.schema(BARS_NAME) == wider
    store.write(batch(BARS_NAME, bars().with_columns(more=pl.lit(1.0)), schema=wider))
    assert store.scan(BARS_NAME).collect()["more"].sum() == 96


def test_writing_imports_neither_pyarrow_nor_pandas(tmp_path: Path):
    script = tmp_path / "imports.py"
    script.write_text(
        "import sys\n"
        "from stored_frames import BARS, bars, batch\n"
        "from storage.registry import open_store\n"
        f"store = open_store('delta://{tmp_path}/store')\n"
        "store.ensure('a.b', BARS)\n"
        "store.write(batch('a.b', bars(), 1))\n"
        "store.write(batch('a.b', bars(add=1.0), 2))\n"
        "store.scan('a.b').collect()\n"
        "print(sorted({'pyarrow', 'pandas', 'numpy'} & set(sys.modules)))\n"
    )
    found = subprocess.run(python(str(script)), capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout.strip() == "[]", found.stderr
