"""Two processes that write the same rows at the same time, and one that reads them meanwhile."""

from __future__ import annotations

import subprocess

import polars as pl
import pytest
from conftest import Place, needs, python
from rival_writer import SHARES, frame_of, value_of
from stored_frames import BARS

from marketsync.errors import StoreError
from storage.protocol import Store, Writers

BATCHES = 8
ROWS = 400
# where a stand-in is slow
FEWER_ROWS = {"mongodb": 80}


def rivals(place: Place, dataset: str, batches: int, rows: int) -> list[subprocess.Popen[str]]:
    started = [
        subprocess.Popen(
            python("rival_writer.py", place.url, dataset, rival, batches, rows),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rival in SHARES
    ]
    for process in started:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n", process.communicate()
    return started


def ended(processes: list[subprocess.Popen[str]]) -> list[int]:
    """How many rows each rival was the first to put in."""
    said = [process.communicate(timeout=200) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    return [int(out) for out, _ in said]


def shares_of(found: pl.DataFrame, rows: int) -> list[pl.DataFrame]:
    """The rows of the first rival alone, of both, of the second alone."""
    first, second = (frame_of(rival, 1, rows).select(BARS.key) for rival in SHARES)
    both = first.join(second, on=BARS.key, how="semi")
    alone = (each.join(both, on=BARS.key, how="anti") for each in (first, second))
    one, other = (found.join(each, on=BARS.key, how="semi") for each in alone)
    return [one, found.join(both, on=BARS.key, how="semi"), other]


def seen_whole(found: pl.DataFrame, rows: int) -> None:
    """Fail unless the rows are those that a series of whole batches has left."""
    assert (found["close"] == found["volume"]).all()
    for share in shares_of(found, rows):
        assert share["volume"].n_unique() <= 1, share["volume"].value_counts()
    one, both, other = shares_of(found, rows)
    assert one.height in (0, rows // 4)
    assert other.height in (0, rows // 4)
    assert both.height == (rows // 2 if one.height or other.height else 0)
    # who wrote the common rows last has its own rows from the same batch
    newest = {share["volume"][0] for share in (one, other) if share.height}
    assert not both.height or both["volume"][0] in newest


def test_two_processes_that_write_the_same_rows_end_as_if_one_had_come_after_the_other(place: Place, dataset: str):
    rows = FEWER_ROWS.get(place.scheme, ROWS)
    store = place.open()
    able = needs_many(store)
    store.ensure(dataset, BARS)
    processes = rivals(place, dataset, BATCHES, rows)
    looks = 0
    try:
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        while any(process.poll() is None for process in processes):
            looks += 1
            try:
                found = store.scan(dataset).collect()
            except (OSError, StoreError):
                assert not able.atomic  # files may be exchanged under a reader's eyes, who is told so
                continue
            assert found.select(BARS.key).is_unique().all()
            if able.atomic:
                seen_whole(found, rows)
        inserted = ended(processes)
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    found = store.scan(dataset).collect()
    assert found.height == store.count(dataset) == rows
    assert found.select(BARS.key).is_unique().all()
    one, both, other = shares_of(found, rows)
    last = [value_of(rival, BATCHES) for rival in SHARES]
    assert set(one["volume"]) == {last[0]}
    assert set(other["volume"]) == {last[1]}
    assert set(both["volume"]) <= set(last)
    assert looks > 0
    assert [store.committed(dataset, f"rival {rival}") for rival in SHARES] == [BATCHES, BATCHES]
    if able.atomic:
        seen_whole(found, rows)
        assert sum(inserted) == rows
    store.close()


def needs_many(store: Store):
    if store.capabilities.writers is not Writers.MANY_PROCESSES:
        store.close()
        pytest.skip("one process holds the store")
    return needs(store)
