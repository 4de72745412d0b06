"""How the rows of a batch are told apart from those of a table, where no engine is needed to see it."""

from __future__ import annotations

import polars as pl
import pytest
from polars.testing import assert_frame_equal
from stored_frames import BARS, bars

from storage import classify

NAN = float("nan")


@pytest.fixture(params=[False, True], ids=["hashes-differ", "hashes-are-all-the-same"])
def hashes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys meet by their hashes, which two keys may share by chance."""
    if request.param:
        monkeypatch.setattr(pl.Expr, "hash", lambda self, *_: pl.when(self.is_null()).then(0).otherwise(0))


def test_new_changed_and_equal_rows_are_told_apart_and_stay_in_order(hashes):
    there, batch = bars(rows=8), bars(first=4, rows=8).sample(fraction=1, shuffle=True, seed=3)
    changed = (pl.col("symbol") == "NA") & pl.col("volume").is_between(1004, 1005)
    batch = batch.with_columns(pl.when(changed).then(NAN).otherwise("close").alias("close"))
    split = classify.split(batch, there, BARS)
    assert_frame_equal(split.changed, batch.filter(changed))
    assert_frame_equal(split.new, batch.filter(pl.col("volume") % 1000 >= 8))
    assert_frame_equal(split.put, batch.filter((pl.col("volume") % 1000 >= 8) | changed))
    assert split.equal == 6
    assert classify.split(batch, batch, BARS).equal == 16


def test_a_key_that_is_there_twice_is_changed_once_and_each_of_its_places_is_told(hashes):
    batch = bars(("A", "B"), rows=3)
    there = pl.concat([batch.with_columns(file=pl.lit("one")), batch.head(1).with_columns(file=pl.lit("two"))])
    split = classify.split(batch, there, BARS, tag="file")
    assert_frame_equal(split.changed, batch.head(1))
    assert sorted(split.tags) == ["one", "two"]
    assert (split.new.height, split.equal) == (0, 5)


def test_a_changed_row_keeps_what_the_batch_cannot_know(hashes):
    there, batch = bars(rows=2), bars(rows=3, add=1.0).with_columns(volume=pl.lit(None, pl.Int64))
    split = classify.split(batch, there, BARS, absent=["volume"])
    assert split.changed["volume"].to_list() == there["volume"].to_list()
    assert split.new["volume"].to_list() == [None, None]
