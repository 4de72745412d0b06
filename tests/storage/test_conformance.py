"""What every store does alike, whatever its engine; what one cannot do it declares, and the test is skipped by that."""

from __future__ import annotations

import os
import random
import re
import secrets
import subprocess
import threading
import time
from contextlib import closing
from datetime import UTC, date, datetime, timedelta
from typing import Literal

import polars as pl
import pytest
from conftest import Place, needs, python
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from polars.testing import assert_frame_equal
from stored_frames import (
    BARS,
    HOSTILE_TEXT,
    INSTRUMENTS,
    SESSIONS,
    START,
    WIDE,
    bars,
    batch,
    differences,
    hostile,
    hostile_keys,
    hostile_text,
    stamped,
    storable_day,
)
from writer_process import expected

from marketsync.errors import ConfigurationError, SchemaError, StoreBusy, StoreError
from marketsync.schema import Column, ColumnType, Period, Schema
from storage.fingerprints import Recipe, of_rows
from storage.protocol import Capabilities, Filter, Mode, Store, Writers, Written
from storage.registry import open_store
from tasks.copy import End, copy

BY_KEY = ["symbol", "ts"]
WITHOUT_SYSTEM = BARS.names
ROUNDS = 8


def rows_of(store: Store, dataset: str, filter: Filter = Filter(), key=BY_KEY) -> pl.DataFrame:
    return store.scan(dataset, filter).collect().sort(key)


def filled(store: Store, dataset: str, frame: pl.DataFrame | None = None, schema: Schema = BARS) -> pl.DataFrame:
    store.ensure(dataset, schema)
    frame = bars() if frame is None else frame
    store.write(batch(dataset, frame, mode=Mode.APPEND, schema=schema))
    return frame


# creation, identity and shape


def test_a_table_that_is_not_there_has_no_marker_no_schema_and_no_lane(store: Store, dataset: str):
    assert store.marker(dataset) is None
    assert store.schema(dataset) is None
    assert store.committed(dataset, "lane") == 0
    assert dataset not in store.datasets()
    with pytest.raises(StoreError, match=dataset):
        store.write(batch(dataset, bars()))


def test_a_created_table_keeps_its_marker_and_schema_across_openings(place: Place, dataset: str):
    first = place.open()
    marker = first.ensure(dataset, BARS)
    assert marker
    assert first.ensure(dataset, BARS) == marker
    first.close()
    second = place.open()
    assert second.marker(dataset) == second.ensure(dataset, BARS) == marker
    assert second.schema(dataset) == BARS
    assert dataset in second.datasets()
    assert second.scan(dataset).collect().schema == pl.Schema(BARS.polars())
    assert second.count(dataset) == 0
    second.close()


def test_a_table_made_anew_has_another_marker_and_forgets_its_lanes(place: Place, dataset: str):
    first = place.open()
    before = first.ensure(dataset, BARS)
    first.write(batch(dataset, bars(), 7))
    first.close()
    place.empty(dataset)
    second = place.open()
    assert second.marker(dataset) is None
    assert second.ensure(dataset, BARS) != before
    assert second.committed(dataset, "lane") == 0
    assert second.count(dataset) == 0
    second.close()


def test_a_store_that_is_open_sees_that_its_table_was_made_anew(place: Place, dataset: str):
    store = place.open()
    if needs(store).writers is not Writers.MANY_PROCESSES:
        store.close()
        pytest.skip("one process holds the store, so nobody else can make its tables anew")
    before = store.ensure(dataset, BARS)
    store.write(batch(dataset, bars(), 1))
    store.write(batch(dataset, bars(first=100), 2))
    place.empty(dataset)
    other = place.open()
    after = other.ensure(dataset, BARS)
    assert store.marker(dataset) == after != before
    assert store.committed(dataset, "lane") == 0
    assert store.write(batch(dataset, bars(), 1)) == Written(inserted=96)
    assert other.count(dataset) == 96
    store.close()
    other.close()


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        (Schema(BARS.columns, ("symbol",), "ts", "symbol", Period.MONTH), "key"),
        (Schema(BARS.columns, BARS.key, "ts", "symbol", Period.YEAR), "period"),
        (Schema(BARS.columns[:-1], BARS.key, "ts", "symbol", Period.MONTH), "'volume'"),
        (
            Schema((*BARS.columns[:-1], Column("volume", ColumnType.I32)), BARS.key, "ts", "symbol", Period.MONTH),
            "'volume'",
        ),
        (
            Schema(
                (*BARS.columns[:-1], Column("volume", ColumnType.I64, nullable=False)),
                BARS.key,
                "ts",
                "symbol",
                Period.MONTH,
            ),
            "nullable: true",
        ),
        (
            Schema(
                (*BARS.columns, Column("more", ColumnType.F64, nullable=False)), BARS.key, "ts", "symbol", Period.MONTH
            ),
            "'more'",
        ),
    ],
)
def test_a_change_that_would_lose_values_is_refused_with_what_to_do(
    store: Store, dataset: str, schema: Schema, named: str
):
    filled(store, dataset)
    with pytest.raises(SchemaError, match="a dataset name of its own") as refused:
        store.ensure(dataset, schema)
    assert named in str(refused.value)
    assert store.schema(dataset) == BARS
    assert store.count(dataset) == 96


def test_an_added_column_is_null_in_old_rows_and_kept_in_new_ones(store: Store, dataset: str):
    needs(store, evolve=True)
    old = filled(store, dataset)
    more = (Column("vwap", ColumnType.F64), Column("note", ColumnType.STR), Column("n", ColumnType.I64))
    wider = Schema((*BARS.columns[:2], more[0], *BARS.columns[2:], *more[1:]), BARS.key, "ts", "symbol", Period.MONTH)
    marker = store.marker(dataset)
    assert store.ensure(dataset, wider) == marker
    assert store.schema(dataset) == wider
    found = rows_of(store, dataset)
    assert found.columns == wider.names
    assert found["vwap"].null_count() == found["note"].null_count() == found.height == old.height
    assert_frame_equal(found.select(WITHOUT_SYSTEM), old.select(WITHOUT_SYSTEM), check_row_order=False)
    new = bars(first=40).with_columns(vwap=pl.lit(1.5), note=pl.lit(" "), n=pl.lit(2**60))
    assert store.write(batch(dataset, new, 2, schema=wider)) == Written(80, 16)
    found = rows_of(store, dataset, Filter(since=START + timedelta(hours=40)))
    assert_frame_equal(found, new.select(wider.names).sort(BY_KEY))
    assert store.count(dataset) == 176


def test_columns_that_change_places_in_the_definition_keep_their_values(store: Store, dataset: str):
    filled(store, dataset)
    turned = Schema(tuple(reversed(BARS.columns)), BARS.key, "ts", "symbol", Period.MONTH)
    store.ensure(dataset, turned)
    store.write(batch(dataset, bars(first=48, rows=2), 2, schema=turned))
    found = rows_of(store, dataset)
    assert found.columns == turned.names
    wanted = pl.concat([bars(), bars(first=48, rows=2)]).select(turned.names)
    assert_frame_equal(found, wanted.sort(BY_KEY))


def test_a_batch_made_before_a_column_was_added_leaves_that_column_alone(store: Store, dataset: str):
    needs(store, evolve=True)
    store.ensure(dataset, BARS)
    wider = Schema((*BARS.columns, Column("note", ColumnType.STR)), BARS.key, "ts", "symbol", Period.MONTH)
    store.ensure(dataset, wider)
    store.write(batch(dataset, bars().with_columns(note=pl.lit("kept")), 1, schema=wider))
    late = bars(first=24, add=1.0)
    assert store.write(batch(dataset, late, 2, schema=BARS)) == Written(48, 48)
    notes = rows_of(store, dataset)["note"]
    assert notes.to_list().count("kept") == 96
    assert notes.null_count() == 48


@pytest.mark.parametrize("name", ["tushare", "a.b.c", "../up.x", "a./b", ".a", "a b.c", "a.b\0", ""])
def test_a_name_that_is_no_dataset_is_refused_before_it_becomes_a_path(store: Store, name: str):
    with pytest.raises(ConfigurationError, match=r"provider\.name"):
        store.ensure(name, BARS)


# writing


def test_appended_rows_are_there_in_every_column(store: Store, dataset: str):
    frame = filled(store, dataset)
    found = rows_of(store, dataset, Filter(system=True))
    assert_frame_equal(found, frame.sort(BY_KEY))
    assert store.count(dataset) == 96
    assert store.info(dataset).rows == 96
    assert store.info(dataset).bytes > 0


def test_an_upsert_counts_what_it_inserted_updated_and_left(store: Store, dataset: str):
    filled(store, dataset)
    changed = bars(("000001",), first=40, rows=4, add=0.25)
    equal = bars(("000001",), first=44, rows=4)
    new = bars(("000001", "new"), first=48, rows=10)
    both = pl.concat([new, changed, equal], how="vertical").sample(fraction=1.0, shuffle=True, seed=3)
    assert store.write(batch(dataset, both, 2)) == Written(inserted=20, updated=4, unchanged=4)
    found = rows_of(store, dataset)
    assert found.height == 116
    wanted = pl.concat([bars(), changed, new]).select(WITHOUT_SYSTEM).unique(BY_KEY, keep="last")
    assert_frame_equal(found, wanted.sort(BY_KEY))


def test_an_upsert_tells_null_from_nan_from_zero_and_zero_from_minus_zero(store: Store, dataset: str):
    values = [None, 0.0, 1.5]
    if store.capabilities.negative_zero:
        values += [-0.0]
    if store.capabilities.nan:
        values += [float("nan"), float("inf")]
    count = len(values)
    pairs = [(old, new) for old in values for new in values]
    before = bars(("X",), rows=count * count).with_columns(pl.Series("close", [old for old, _ in pairs]))
    after = bars(("X",), rows=count * count).with_columns(pl.Series("close", [new for _, new in pairs]))
    store.ensure(dataset, BARS)
    assert store.write(batch(dataset, before, 1)) == Written(inserted=count * count)
    assert store.write(batch(dataset, after, 2)) == Written(updated=count * count - count, unchanged=count)
    assert not differences(rows_of(store, dataset), after.select(WITHOUT_SYSTEM), BY_KEY)


def test_equal_rows_keep_the_segment_that_brought_them(store: Store, dataset: str):
    filled(store, dataset)
    again = pl.concat([bars(rows=8, segment="s2"), bars(first=8, rows=1, add=1.0, segment="s2")])
    assert store.write(batch(dataset, again, 2)) == Written(updated=2, unchanged=16)
    segments = store.scan(dataset, Filter(system=True)).collect().group_by("_segment").len().sort("_segment").rows()
    assert segments == [("s1", 94), ("s2", 2)]


@pytest.mark.parametrize("mode", list(Mode))
def test_a_batch_that_comes_again_changes_nothing(store: Store, dataset: str, mode: Mode):
    store.ensure(dataset, BARS)
    for seq in (1, 2, 5):
        assert store.write(batch(dataset, bars(first=seq * 100), seq, mode=mode)) == Written(inserted=96)
    for seq in (5, 4, 2, 1):
        assert store.write(batch(dataset, bars(first=seq * 100, add=9.0), seq, mode=mode)) == Written(already=True)
    assert store.committed(dataset, "lane") == 5
    assert store.count(dataset) == 288
    assert store.scan(dataset).select(pl.col("close").max()).collect().item() < 200


def test_lanes_and_datasets_count_for_themselves(store: Store, dataset: str):
    other = f"{dataset}-b"
    for each in (dataset, other):
        store.ensure(each, BARS)
    store.write(batch(dataset, bars(), 3, lane="a"))
    store.write(batch(dataset, bars(first=100), 1, lane="b/ö"))
    assert [store.committed(dataset, lane) for lane in ("a", "b/ö", "c")] == [3, 1, 0]
    assert store.committed(other, "a") == 0
    assert store.count(dataset) == 192
    assert store.count(other) == 0


def test_a_batch_of_equal_rows_or_of_none_still_moves_the_lane(place: Place, dataset: str):
    store = place.open()
    filled(store, dataset)
    assert store.write(batch(dataset, bars(), 2)) == Written(unchanged=96)
    assert store.write(batch(dataset, bars().clear(), 3)) == Written()
    assert store.write(batch(dataset, bars().clear(), 4, mode=Mode.APPEND)) == Written()
    store.close()
    again = place.open()
    assert again.committed(dataset, "lane") == 4
    assert again.count(dataset) == 96
    again.close()


def test_columns_go_by_name_in_whatever_order_they_come(store: Store, dataset: str):
    store.ensure(dataset, BARS)
    frame = bars()
    store.write(batch(dataset, frame.select(sorted(frame.columns, reverse=True))))
    assert_frame_equal(rows_of(store, dataset), frame.select(WITHOUT_SYSTEM).sort(BY_KEY))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda f: f.drop("close"), "missing: close"),
        (lambda f: f.with_columns(extra=1), "unknown: extra"),
        (lambda f: f.with_columns(pl.col("volume").cast(pl.Int32)), "'volume'.*Int32.*Int64"),
        (lambda f: f.with_columns(pl.col("ts").dt.replace_time_zone(None)), "'ts'"),
        (lambda f: pl.concat([f, f.head(2)]), "4 of 98 rows.*symbol=000001"),
        (lambda f: f.with_columns(symbol=pl.lit(None, pl.String)), "'symbol'.*null in 96"),
        (
            lambda f: f.with_columns(ts=pl.when(pl.col("volume") == 5).then(None).otherwise(pl.col("ts"))),
            "'ts'.*null in 1 ",
        ),
        (lambda f: f.with_columns(pl.lit(2**62).cast(pl.Datetime("us", "UTC")).alias("ts")).head(1), "'ts'.*years"),
    ],
)
@pytest.mark.parametrize("mode", list(Mode))
def test_a_frame_that_does_not_fit_is_refused_whole(store: Store, dataset: str, spoil, says: str, mode: Mode):
    store.ensure(dataset, BARS)
    with pytest.raises(SchemaError, match=says):
        store.write(batch(dataset, spoil(bars()), mode=mode))
    assert store.count(dataset) == 0
    assert store.committed(dataset, "lane") == 0


def test_a_null_in_a_column_declared_without_is_refused(store: Store, dataset: str):
    needs(store, any_key=True)
    store.ensure(dataset, INSTRUMENTS)
    frame = stamped(pl.DataFrame({"code": ["a", "b"], "name": [None, "x"], "lot": [1, None]}, INSTRUMENTS.polars()))
    with pytest.raises(SchemaError, match=r"'lot'.*null in 1 of 2"):
        store.write(batch(dataset, frame, schema=INSTRUMENTS))


@pytest.mark.parametrize(
    ("column", "value", "type_", "capability", "remedy"),
    [
        ("huge", 2**63, pl.UInt64(), "unsigned_64", "declare the column str"),
        ("text", "cut\0here", pl.String(), "nul", "use another store"),
        ("at_ns", 1, pl.Int64(), "nanoseconds", "declare the column datetime or i64"),
        ("double", float("nan"), pl.Float64(), "nan", "map them to null"),
        ("single", float("-inf"), pl.Float32(), "nan", "map them to null"),
        ("text", "", pl.String(), "empty_text", "map it to null"),
        ("text", "x\r", pl.String(), "final_return", "have it stripped"),
        ("small", -(2**31), pl.Int32(), "least", "map it to null"),
        ("large", -(2**63), pl.Int64(), "least", "map it to null"),
        ("single", -3.4028234663852886e38, pl.Float32(), "least", "map it to null"),
        ("double", -1.7976931348623157e308, pl.Float64(), "least", "map it to null"),
    ],
)
def test_a_value_that_the_engine_would_change_is_refused_or_kept(
    store: Store, dataset: str, column: str, value, type_: pl.DataType, capability: str, remedy: str
):
    store.ensure(dataset, WIDE)
    frame = hostile(store.capabilities).head(1)
    frame = frame.with_columns(pl.lit(value, type_).cast(frame.schema[column]).alias(column))
    if getattr(store.capabilities, capability):
        store.write(batch(dataset, frame, schema=WIDE))
        assert not differences(store.scan(dataset).collect(), frame.select(WIDE.names), WIDE.key)
    else:
        with pytest.raises(SchemaError, match=remedy) as refused:
            store.write(batch(dataset, frame, schema=WIDE))
        assert column in str(refused.value)
        assert column != "at_ns" or ".000000001" in str(refused.value), "what is too fine is shown"
        assert capability in store.capabilities.why


@pytest.mark.parametrize("mode", list(Mode))
def test_hostile_values_of_every_type_come_back_as_they_went(store: Store, dataset: str, mode: Mode):
    store.ensure(dataset, WIDE)
    frame = hostile(store.capabilities)
    assert store.write(batch(dataset, frame, mode=mode, schema=WIDE)).inserted == len(HOSTILE_TEXT)
    found = store.scan(dataset, Filter(system=True)).collect()
    assert not differences(found, frame, WIDE.key)
    assert store.write(batch(dataset, frame, 2, schema=WIDE)) == Written(unchanged=len(HOSTILE_TEXT))
    for name in hostile_keys(store.capabilities):
        assert store.count(dataset, Filter(subjects=[name])) == 1, name
    tables = list(store.arrow(dataset))
    assert sum(table.num_rows for table in tables) == len(HOSTILE_TEXT)
    arrow = pl.concat([pl.DataFrame(pl.from_arrow(table)) for table in tables])
    assert not differences(arrow.cast(WIDE.polars()), frame.select(WIDE.names), WIDE.key)


def test_a_table_without_time_and_subject_is_kept_by_its_key(store: Store, dataset: str):
    needs(store, any_key=True)
    store.ensure(dataset, INSTRUMENTS)
    frame = stamped(pl.DataFrame({"code": ["a", "b"], "name": ["A", None], "lot": [1, 100]}, INSTRUMENTS.polars()))
    store.write(batch(dataset, frame, schema=INSTRUMENTS))
    changed = frame.with_columns(lot=pl.col("lot") * 2).tail(1)
    assert store.write(batch(dataset, changed, 2, schema=INSTRUMENTS)) == Written(updated=1)
    assert rows_of(store, dataset, key="code").rows() == [("a", "A", 1), ("b", None, 200)]
    assert store.count(dataset, Filter(subjects=["*"])) == 2
    with pytest.raises(SchemaError, match="no time column"):
        store.count(dataset, Filter(since=date(2001, 1, 1)))
    with pytest.raises(SchemaError, match="no subject column"):
        store.count(dataset, Filter(subjects=["a"]))
    with pytest.raises(SchemaError, match="no time column"):
        store.watermarks(dataset)


def test_a_row_whose_time_is_not_in_the_key_moves_to_its_new_period(store: Store, dataset: str):
    needs(store, any_key=True)
    schema = Schema(
        (Column("code", ColumnType.STR), Column("listed", ColumnType.DATE)), ("code",), "listed", None, Period.YEAR
    )
    store.ensure(dataset, schema)
    first = stamped(pl.DataFrame({"code": ["a", "b"], "listed": [date(1999, 1, 1), date(1999, 5, 5)]}))
    store.write(batch(dataset, first, schema=schema))
    moved = stamped(pl.DataFrame({"code": ["a", "c"], "listed": [date(2004, 2, 2), date(1999, 6, 6)]}))
    assert store.write(batch(dataset, moved, 2, schema=schema)) == Written(inserted=1, updated=1)
    assert rows_of(store, dataset, key="code").rows() == [
        ("a", date(2004, 2, 2)),
        ("b", date(1999, 5, 5)),
        ("c", date(1999, 6, 6)),
    ]
    assert store.count(dataset, Filter(since=date(2004, 1, 1))) == 1


def test_a_span_is_replaced_by_exactly_these_rows(store: Store, dataset: str):
    filled(store, dataset)
    since, until = START + timedelta(hours=10), START + timedelta(hours=20)
    span = Filter(subjects=["NA"], since=since, until=until)
    frame = pl.concat(
        [
            bars(("000001", "NA"), first=10, rows=3).filter(pl.col("symbol") == "NA"),
            bars(("000001", "NA"), first=15, rows=2, add=5.0).filter(pl.col("symbol") == "NA"),
        ]
    )
    assert store.replace(dataset, BARS, frame, span) == Written(updated=2, unchanged=3, deleted=5)
    assert_frame_equal(rows_of(store, dataset, span), frame.select(WITHOUT_SYSTEM).sort(BY_KEY))
    assert store.count(dataset) == 91
    assert store.replace(dataset, BARS, frame, span) == Written(unchanged=5)
    gap = bars(("000001", "NA"), first=13, rows=1).filter(pl.col("symbol") == "NA")
    together = pl.concat([frame, gap])
    assert store.replace(dataset, BARS, together, span) == Written(inserted=1, unchanged=5)
    assert store.replace(dataset, BARS, frame.clear(), span) == Written(deleted=6)
    assert store.count(dataset) == 86
    assert store.count(dataset, Filter(subjects=["000001"])) == 48


def test_rows_outside_of_the_span_they_replace_are_refused(store: Store, dataset: str):
    filled(store, dataset)
    with pytest.raises(SchemaError, match="48 of 96 rows"):
        store.replace(dataset, BARS, bars(), Filter(subjects=["NA"]))
    assert store.count(dataset) == 96


def test_deleted_rows_are_gone_and_counted(store: Store, dataset: str):
    filled(store, dataset)
    assert store.delete(dataset, Filter(subjects=["NA"], until=START + timedelta(hours=20))) == 20
    assert store.delete(dataset, Filter(subjects=["NA"], until=START + timedelta(hours=20))) == 0
    assert store.delete(dataset, Filter(subjects=["no such"])) == 0
    assert store.count(dataset) == 76
    assert store.count(dataset, Filter(subjects=["000001"])) == 48
    assert store.delete(dataset, Filter()) == 76
    assert store.count(dataset) == 0
    assert store.committed(dataset, "lane") == 1


# reading


def test_a_scan_gives_the_subjects_times_and_columns_that_are_asked_for(store: Store, dataset: str):
    frame = filled(store, dataset, bars(("000001", "NA", "z"), rows=72))
    since, until = START + timedelta(hours=10), START + timedelta(hours=60)
    inside = (pl.col("ts") >= since) & (pl.col("ts") < until)
    found = rows_of(store, dataset, Filter(["z", "NA", "absent"], since, until))
    assert_frame_equal(
        found, frame.filter(inside & pl.col("symbol").is_in(["z", "NA"])).select(WITHOUT_SYSTEM).sort(BY_KEY)
    )
    assert store.count(dataset, Filter(["z", "NA", "absent"], since, until)) == 100
    assert store.scan(dataset, Filter(columns=["volume", "symbol"])).collect().columns == ["volume", "symbol"]
    system = store.scan(dataset, Filter(columns=["volume"], system=True)).collect()
    assert system.columns == ["volume", "_segment", "_ingested_at"]
    assert store.count(dataset, Filter(subjects=[])) == 0
    assert store.scan(dataset, Filter(subjects=[])).collect().schema == pl.Schema(BARS.polars())
    assert sum(each.num_rows for each in store.arrow(dataset, Filter(since=since, until=until))) == 150
    with pytest.raises(SchemaError, match="no column nope"):
        store.scan(dataset, Filter(columns=["nope"]))


def test_bounds_are_half_open_and_a_date_is_its_midnight(store: Store, dataset: str):
    filled(store, dataset, bars(("X",), rows=48))
    midnight = datetime(2001, 1, 31, tzinfo=UTC)
    assert store.count(dataset, Filter(since=START, until=START + timedelta(hours=1))) == 1
    assert store.count(dataset, Filter(since=START + timedelta(microseconds=1))) == 47
    assert store.count(dataset, Filter(until=START)) == 0
    for bound in (midnight, date(2001, 1, 31)):
        assert store.count(dataset, Filter(since=bound)) == 33
        assert store.count(dataset, Filter(until=bound)) == 15
    with pytest.raises(SchemaError, match="time zone"):
        store.count(dataset, Filter(since=START.replace(tzinfo=None)))


def test_nanoseconds_of_a_time_column_neither_hide_nor_double_a_row(store: Store, dataset: str):
    schema = Schema(
        (Column("at", ColumnType.DATETIME_NS), Column("price", ColumnType.F64)), ("at",), "at", None, Period.MONTH
    )
    store.ensure(dataset, schema)
    step = 1 if store.capabilities.nanoseconds else 1000
    epoch = datetime(1970 if store.capabilities.earliest is None else 2001, 1, 1, tzinfo=UTC)
    # some engines cannot keep the last nanoseconds before a whole second
    counted = [n * step for n in (-1 if store.capabilities.earliest is None else -7, 0, 1, 2, 1001, 10**12)]
    stamps = (pl.Series("at", counted) + int(epoch.timestamp()) * 10**9).cast(pl.Datetime("ns", "UTC"))
    frame = stamped(pl.DataFrame({"at": stamps, "price": [float(n) for n in range(6)]}))
    assert store.write(batch(dataset, frame, 1, schema=schema)) == Written(inserted=6)
    assert store.write(batch(dataset, frame.slice(1, 4), 2, schema=schema)) == Written(unchanged=4)
    changed = frame.slice(4, 1).with_columns(price=pl.lit(9.0))
    assert store.write(batch(dataset, changed, 3, schema=schema)) == Written(updated=1)
    assert store.count(dataset, Filter(since=epoch)) == 5
    assert store.count(dataset, Filter(until=epoch)) == 1
    assert store.count(dataset, Filter(since=date(1, 1, 1), until=date(9999, 1, 1))) == 6
    assert rows_of(store, dataset, key="at")["price"].to_list() == [0.0, 1.0, 2.0, 3.0, 9.0, 5.0]


def test_bounds_within_a_day_exclude_that_day_from_a_table_of_days(store: Store, dataset: str):
    first = date(1969, 12, 30) if store.capabilities.earliest is None else date(2001, 2, 26)
    days = [first + timedelta(days=n) for n in range(5)]
    frame = stamped(pl.DataFrame({"day": days, "open": [True, False, None, True, False]}))
    filled(store, dataset, frame, SESSIONS)
    noon = datetime.combine(days[2], datetime.min.time(), UTC) + timedelta(hours=12)
    assert rows_of(store, dataset, Filter(since=noon), key="day")["day"].to_list() == days[3:]
    assert rows_of(store, dataset, Filter(until=noon), key="day")["day"].to_list() == days[:3]
    assert rows_of(store, dataset, Filter(since=days[1], until=days[3]), key="day")["open"].to_list() == [False, None]
    assert store.watermarks(dataset) == {"*": days[-1]}


def test_watermarks_are_the_newest_time_of_each_subject(store: Store, dataset: str):
    store.ensure(dataset, BARS)
    assert store.watermarks(dataset) == {}
    store.write(batch(dataset, bars(("a", "b"), rows=48), 1))
    store.write(batch(dataset, bars(("b",), first=40, rows=1000), 2))
    store.write(batch(dataset, bars(("c", "A"), rows=1), 3))
    assert store.watermarks(dataset) == {
        "a": START + timedelta(hours=47),
        "b": START + timedelta(hours=1039),
        "c": START,
        "A": START,
    }


def test_a_table_without_subjects_has_one_watermark_or_none(store: Store, dataset: str):
    needs(store, any_key=True)
    schema = Schema((Column("at", ColumnType.DATETIME), Column("close", ColumnType.F64)), key=("at",), time="at")
    frame = bars(("a",), rows=3).rename({"ts": "at"}).drop("symbol", "volume")
    store.ensure(dataset, schema)
    assert store.watermarks(dataset) == {}
    store.write(batch(dataset, frame, schema=schema))
    assert store.watermarks(dataset) == {"*": START + timedelta(hours=2)}
    store.delete(dataset, Filter())
    assert store.watermarks(dataset) == {}


def test_rows_that_are_copied_into_a_store_and_out_again_are_what_they_were(store: Store, dataset: str, tmp_path):
    with closing(open_store(f"csv://{tmp_path}/home")) as home, closing(open_store(f"csv://{tmp_path}/back")) as back:
        rows = filled(home, dataset)
        (there,) = copy(End(home), End(store), [dataset], Filter())
        (again,) = copy(End(home), End(store), [dataset], Filter())
        assert ([there.inserted, there.problems], [again.unchanged, again.problems]) == ([96, []], [96, []])
        copy(End(store), End(back), [dataset], Filter())
        assert_frame_equal(rows_of(back, dataset, Filter(system=True)), rows.sort(BY_KEY))


def test_a_store_names_its_engine_and_the_version(store: Store):
    assert re.fullmatch(r"[A-Za-z]+ \w[\w.]*", store.version())


def test_sql_finds_tables_by_the_name_they_have_everywhere(store: Store, dataset: str):
    filled(store, dataset)
    found = store.query(
        f"SELECT symbol, count(*) AS n, max(close) AS top, '{dataset}' AS name FROM {dataset} "
        "WHERE symbol = 'NA' GROUP BY symbol"
    )
    assert found.rows() == [("NA", 48, 104.7, dataset)]
    joined = store.query(
        f"SELECT a.ts, b.close - a.close AS gap FROM {dataset} a JOIN {dataset} b ON a.ts = b.ts "
        "WHERE a.symbol = '000001' AND b.symbol = 'NA' ORDER BY a.ts LIMIT 3"
    )
    assert joined["gap"].to_list() == [100.0, 100.0, 100.0]
    assert joined["ts"].dtype == pl.Datetime("us", "UTC")
    with pytest.raises(StoreError, match="no_such"):
        store.query("SELECT * FROM made.no_such")
    with pytest.raises(StoreError):
        store.query(f"SELEC * FROM {dataset}")
    assert store.write(batch(dataset, bars(first=1000), 99)) == Written(inserted=96)


def test_a_change_after_maintenance_finds_the_rows_as_before(store: Store, dataset: str):
    store.ensure(dataset, BARS)
    for seq in range(1, 41):
        store.write(batch(dataset, bars(first=seq * 40, rows=40, segment=f"s{seq}"), seq, mode=Mode.APPEND))
    before = rows_of(store, dataset, Filter(system=True))
    assert before.height == 40 * 80
    files = store.info(dataset).files
    assert dataset in store.maintain(dataset)
    assert store.info(dataset).files <= files
    assert_frame_equal(rows_of(store, dataset, Filter(system=True)), before)
    assert store.committed(dataset, "lane") == 40
    assert store.write(batch(dataset, bars(first=60, rows=40), 41)) == Written(unchanged=80)
    assert store.write(batch(dataset, bars(first=60, rows=10, add=1.0), 42)) == Written(updated=20)


# fingerprints


def expected_fingerprints(frame: pl.DataFrame, recipe: Recipe, schema: Schema = BARS) -> pl.DataFrame:
    return of_rows(frame.lazy(), "any.frame", schema, recipe)


@pytest.mark.parametrize("columns", [None, [name for name in WIDE.names if name != "text"]], ids=["all", "no texts"])
def test_hostile_rows_have_the_fingerprints_that_they_have_in_every_other_store(
    store: Store, dataset: str, columns: list[str] | None
):
    frame = filled(store, dataset, hostile(store.capabilities), WIDE)
    for period in Period if columns else [Period.MONTH]:
        recipe = Recipe(secrets.token_bytes(16), period, columns, {"single": 10_000})
        wanted = expected_fingerprints(frame, recipe, WIDE)
        assert_frame_equal(store.fingerprints(dataset, recipe), wanted)


def test_fingerprints_are_of_the_rows_as_they_are_now_and_of_those_asked_for(store: Store, dataset: str):
    recipe = Recipe(secrets.token_bytes(16))
    store.ensure(dataset, BARS)
    assert store.fingerprints(dataset, recipe).is_empty()
    filled(store, dataset)
    assert_frame_equal(store.fingerprints(dataset, recipe), expected_fingerprints(bars(), recipe))
    store.write(batch(dataset, bars(first=40, add=1.0, segment="s2"), 2))
    since, until = START + timedelta(hours=70), START + timedelta(hours=80)
    store.delete(dataset, Filter(["NA"], since, until))
    rows = rows_of(store, dataset)
    assert_frame_equal(store.fingerprints(dataset, recipe), expected_fingerprints(rows, recipe))
    one = rows.filter(pl.col("symbol") == "NA", pl.col("ts") < until)
    found = store.fingerprints(dataset, recipe, Filter(["NA"], until=until, columns=["close"]))
    assert_frame_equal(found, expected_fingerprints(one, recipe))
    with pytest.raises(SchemaError, match="'clse'"):
        store.fingerprints(dataset, Recipe(b"seed", columns=["clse"]))


def test_a_table_without_subject_or_time_has_fingerprints(store: Store, dataset: str):
    needs(store, any_key=True)
    recipe = Recipe(secrets.token_bytes(16), Period.MONTH)
    codes = stamped(pl.DataFrame({"code": ["a", "b"], "name": ["A", None], "lot": [1, 100]}, INSTRUMENTS.polars()))
    filled(store, dataset, codes, INSTRUMENTS)
    assert_frame_equal(store.fingerprints(dataset, recipe), expected_fingerprints(codes, recipe, INSTRUMENTS))
    days = [date(1969, 12, 31), date(1970, 1, 1), date(2001, 2, 28), date(2001, 3, 1)]
    sessions = stamped(pl.DataFrame({"day": days, "open": [True, False, None, True]}, SESSIONS.polars()))
    filled(store, f"{dataset}s", sessions, SESSIONS)
    assert_frame_equal(store.fingerprints(f"{dataset}s", recipe), expected_fingerprints(sessions, recipe, SESSIONS))


# more than one process, and death at any instant


def start(place: Place, what: str, dataset: str, lane: str, batches: int = 0) -> subprocess.Popen:
    process = subprocess.Popen(
        python("writer_process.py", what, place.url, dataset, lane, batches),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    return process


def tell(process: subprocess.Popen) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def heard(process: subprocess.Popen) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_four_processes_that_create_one_table_at_once_get_the_same_table(place: Place, dataset: str):
    processes = [start(place, "create", dataset, f"p{n}") for n in range(4)]
    try:
        assert [heard(process) for process in processes] == ["ready"] * 4
        for process in processes:
            tell(process)
        markers = [heard(process) for process in processes]
        busy = [marker for marker in markers if marker.startswith("busy")]
        if busy:
            (holder,) = (process for process, marker in zip(processes, markers, strict=True) if marker not in busy)
            assert all(f"process {holder.pid} on " in marker for marker in busy)
        for process, marker in zip(processes, markers, strict=True):
            if marker not in busy:
                tell(process)
        assert [process.wait(60) for process in processes] == [0] * 4
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    store = place.open()
    one = store.capabilities.writers is Writers.ONE_PROCESS
    assert set(markers) - set(busy) == {store.marker(dataset)}
    assert len(busy) == (3 if one else 0)
    store.close()


def test_two_processes_write_their_lanes_into_one_table_or_the_second_is_told_who_is_first(place: Place, dataset: str):
    processes = [start(place, "write", dataset, lane, 12) for lane in "ab"]
    try:
        assert [heard(process) for process in processes] == ["ready"] * 2
        for process in processes:
            tell(process)
        said = [process.communicate(timeout=120)[0].split("\n") for process in processes]
        assert [process.returncode for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    store = place.open()
    done = [lane for lane, lines in zip("ab", said, strict=True) if not lines[0].startswith("busy")]
    if store.capabilities.writers is Writers.MANY_PROCESSES:
        assert done == ["a", "b"]
    assert done
    wanted = pl.concat([expected(lane, 12) for lane in done])
    assert_frame_equal(rows_of(store, dataset), wanted.sort(BY_KEY))
    assert [store.committed(dataset, lane) for lane in done] == [12] * len(done)
    store.close()


def settled(store: Store, dataset: str) -> tuple[int, pl.DataFrame]:
    """Return what is committed, and the rows that are there then: a server may still end what a dead writer sent."""
    while True:
        committed = store.committed(dataset, "lane")
        found = rows_of(store, dataset, Filter(system=True))
        if store.committed(dataset, "lane") == committed:
            return committed, found


def kill_and_replay(place: Place, dataset: str, seed: int) -> int:
    """Kill a writer at a random instant; check what it acknowledged; replay. Return the last acknowledged seq."""
    chance = random.Random(seed)
    process = start(place, "write", dataset, "lane", 1_000)
    assert heard(process) == "ready"
    tell(process)
    acknowledged = 0
    for _ in range(chance.randint(0, 4)):
        acknowledged = int(heard(process))
    time.sleep(chance.uniform(0, 0.04))
    process.kill()
    assert process.stdout is not None
    rest = process.stdout.read().split()  # `communicate` does not see what was read ahead of the last line
    process.communicate()
    acknowledged = max([acknowledged, *map(int, rest)])

    store = place.open()
    try:
        store.ensure(dataset, BARS)
        committed, found = settled(store, dataset)
        # the batch after the last one that was acknowledged may have become durable before the process could say so
        assert committed in (acknowledged, acknowledged + 1)
        if store.capabilities.atomic:
            wanted = expected("lane", committed) if committed else bars().clear().select(WITHOUT_SYSTEM)
            assert_frame_equal(found.select(WITHOUT_SYSTEM), wanted.sort(BY_KEY))
        else:
            assert found.select(BY_KEY).is_unique().all()
            missing = expected("lane", acknowledged) if acknowledged else bars().clear()
            assert missing.join(found, on=BY_KEY, how="anti").is_empty()
        from writer_process import frame_of, mode_of

        for seq in range(max(1, acknowledged - 1), acknowledged + 3):
            store.write(batch(dataset, frame_of("lane", seq), seq, lane="lane", mode=mode_of(seq)))
        wanted = expected("lane", acknowledged + 2).sort(BY_KEY)
        assert_frame_equal(rows_of(store, dataset), wanted)
        assert store.committed(dataset, "lane") == acknowledged + 2
        assert store.count(dataset) == wanted.height
    finally:
        store.close()
    return acknowledged


def test_acknowledged_rows_survive_a_kill_at_any_instant_exactly_once(place: Place):
    last = [kill_and_replay(place.beside(n), f"made.killed{n}", seed=n) for n in range(ROUNDS)]
    assert max(last) > 0


@pytest.mark.slow
def test_acknowledged_rows_survive_thirty_more_kills(place: Place):
    for n in range(ROUNDS, ROUNDS + min(30, int(os.environ.get("MARKETSYNC_TEST_KILLS", "30")))):
        kill_and_replay(place.beside(n), f"made.killed{n}", seed=n)


def test_a_dead_holder_does_not_keep_the_next_process_out(place: Place, dataset: str):
    process = start(place, "create", dataset, "p")
    assert heard(process) == "ready"
    tell(process)
    marker = heard(process)
    store = place.open() if needs_nothing_of(place) else None
    if store is None:
        with pytest.raises(StoreBusy, match=f"process {process.pid} on "):
            place.open()
    else:
        store.close()
    process.kill()
    process.communicate()
    store = place.open()
    assert store.ensure(dataset, BARS) == marker
    store.close()


def test_threads_share_a_store(store: Store, dataset: str):
    store.ensure(dataset, BARS)
    failed: list[BaseException] = []

    def write(number: int) -> None:
        try:
            for seq in range(1, 5):
                frame = bars((f"S{number}",), first=seq * 100, segment=f"{number}-{seq}")
                store.write(batch(dataset, frame, seq, lane=f"lane {number}"))
                assert store.scan(dataset, Filter([f"S{number}"])).collect().height == seq * 48
        except BaseException as error:  # noqa: BLE001 - told by the test's own thread
            failed.append(error)

    threads = [threading.Thread(target=write, args=[number]) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert store.count(dataset) == 4 * 4 * 48


def needs_nothing_of(place: Place) -> bool:
    """Tell whether the engine lets several processes in."""
    from importlib import import_module

    from storage.registry import ENGINES

    module = import_module(ENGINES[place.scheme][0])
    return module.CAPABILITIES.writers is Writers.MANY_PROCESSES


# anything at all


def texts(able: Capabilities) -> st.SearchStrategy[str]:
    character = st.characters(exclude_categories=["Cs"], exclude_characters="" if able.nul else "\0")
    longest = min(12, able.longest_text or 12)
    drawn = st.one_of(st.sampled_from(hostile_text(able)), st.text(character, max_size=longest))
    return drawn.filter(lambda text: (able.empty_text or text) and (able.final_return or not text.endswith("\r")))


def subjects_of(able: Capabilities) -> st.SearchStrategy[str]:
    if able.subjects is not None:
        return st.sampled_from(hostile_keys(able)) | st.from_regex(r"[A-Za-z0-9][A-Za-z0-9.^=-]{0,11}", fullmatch=True)
    return texts(able).map(lambda text: text[: able.longest_key])


def columns_of(able: Capabilities) -> dict[str, st.SearchStrategy]:
    def floats(width: Literal[32, 64]) -> st.SearchStrategy[float]:
        least = {32: -3.4028234663852886e38, 64: -1.7976931348623157e308}[width]
        drawn = st.floats(width=width, allow_nan=able.nan, allow_infinity=able.nan)
        drawn = drawn if able.least else drawn.filter(lambda value: value != least)
        return drawn if able.negative_zero else drawn.map(lambda value: value + 0.0)

    since, until = (datetime(year, 1, 1, tzinfo=UTC).replace(tzinfo=None) for year in (1902, 2200))
    times = st.datetimes(since, until, timezones=st.just(UTC))
    nano = st.integers(-(2**60), 2**60)
    return {
        "text": texts(able),
        "flag": st.booleans(),
        "small": st.integers(-(2**31) + (not able.least), 2**31 - 1),
        "large": st.integers(-(2**63) + (not able.least), 2**63 - 1),
        "huge": st.integers(0, 2**64 - 1 if able.unsigned_64 else 2**63 - 1),
        "single": floats(32),
        "double": floats(64),
        "date": st.dates(since.date(), until.date()),
        "at": times,
        "at_ns": nano if able.nanoseconds else nano.map(lambda value: value // 1000 * 1000),
    }


@given(data=st.data())
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_any_frame_comes_back_as_it_went_with_the_fingerprints_of_any_other_store(store: Store, data: st.DataObject):
    able = store.capabilities
    each = columns_of(able)
    days = st.dates(date(1905, 1, 1), date(2149, 1, 1)).map(lambda day: storable_day(able, day))
    key = st.tuples(subjects_of(able), days)
    keys = data.draw(st.lists(key, min_size=1, max_size=8, unique=True))
    frame = pl.DataFrame(
        {
            "name": [name for name, _ in keys],
            "day": [day for _, day in keys],
            **{
                column: data.draw(st.lists(st.none() | values, min_size=len(keys), max_size=len(keys)))
                for column, values in each.items()
            },
        },
        schema={**WIDE.polars(), "at_ns": pl.Int64()},
    )
    frame = stamped(frame.with_columns(pl.col("at_ns").cast(pl.Datetime("ns", "UTC"))))
    dataset = "any.frame"
    store.ensure(dataset, WIDE)
    store.delete(dataset, Filter())
    seq = store.committed(dataset, "any")
    half = data.draw(st.integers(0, len(keys)))
    store.write(batch(dataset, frame.head(half), seq + 1, lane="any", mode=Mode.APPEND, schema=WIDE))
    assert store.write(batch(dataset, frame, seq + 2, lane="any", schema=WIDE)) == Written(
        inserted=len(keys) - half, unchanged=half
    )
    found = store.scan(dataset, Filter(system=True)).collect()
    assert not differences(found, frame, WIDE.key)
    scales = {"double": data.draw(st.sampled_from([1, 1e8, 3.7e11])), "single": 1e15}
    for columns in (None, [name for name in WIDE.names if name != "text"]):
        recipe = Recipe(
            data.draw(st.binary(min_size=1, max_size=4)), data.draw(st.sampled_from(Period)), columns, scales
        )
        assert_frame_equal(store.fingerprints(dataset, recipe), expected_fingerprints(frame, recipe, WIDE))


@st.composite
def steps(draw: st.DrawFn) -> list[tuple[str, str, int, int]]:
    """Draw what is done, to which subject, from which hour on, for how many hours."""
    acts = st.sampled_from(["upsert", "upsert", "upsert", "replace", "delete", "maintain"])
    step = st.tuples(acts, st.sampled_from("ABC"), st.integers(0, 40), st.integers(1, 60))
    return draw(st.lists(step, min_size=2, max_size=8))


@given(steps())
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_any_sequence_of_writes_ends_where_a_dictionary_would(store: Store, steps: list[tuple[str, str, int, int]]):
    dataset = "any.steps"
    store.ensure(dataset, BARS)
    store.delete(dataset, Filter())
    model: dict[tuple, tuple] = {}
    for number, (act, subject, first, hours) in enumerate(steps):
        frame = bars((subject,), first=first, rows=hours, add=float(number % 2))
        rows = {row[:2]: row[2:4] for row in frame.iter_rows()}
        inserted = sum(key not in model for key in rows)
        updated = sum(key in model and model[key] != values for key, values in rows.items())
        counts = {"inserted": inserted, "updated": updated, "unchanged": len(rows) - inserted - updated}
        since, until = START + timedelta(hours=first), START + timedelta(hours=first + hours + number)
        gone = [key for key in model if key[0] == subject and since <= key[1] < until]
        if act == "upsert":
            seq = store.committed(dataset, "lane") + 1
            assert store.write(batch(dataset, frame, seq)) == Written(**counts)
            model |= rows
        elif act == "replace":
            out = [key for key in gone if key not in rows]
            written = store.replace(dataset, BARS, frame, Filter([subject], since, until))
            assert written == Written(**counts, deleted=len(out))
            for key in out:
                del model[key]
            model |= rows
        elif act == "delete":
            assert store.delete(dataset, Filter([subject], since, until)) == len(gone)
            for key in gone:
                del model[key]
        else:
            store.maintain(dataset)
        assert store.count(dataset) == len(model)
    assert {row[:2]: row[2:] for row in store.scan(dataset).collect().iter_rows()} == model
    newest: dict[str, datetime] = {}
    for subject, at in model:
        newest[subject] = max(at, newest.get(subject, at))
    assert store.watermarks(dataset) == newest
