"""A table that the user made by hand, with other columns, order and types, becomes a dataset's in every engine that can
adopt one: each value is what it was, and whatever is done to a table of ours can be done to it. What would lose a value
is refused with its reason, and then nothing is changed."""

from __future__ import annotations

import math
import os
import re
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import made_by_hand
import polars as pl
import pytest
from polars.testing import assert_frame_equal
from stored_frames import BARS, bars, batch, differences, stamped

import storage.adoption_copies
from marketsync.errors import AdoptionRefused, ForeignTable, NoTable, SchemaError, StoreError
from marketsync.schema import Column, ColumnType, Period, Schema
from storage.adoption import Wish
from storage.protocol import Filter, Mode, Written
from storage.registry import open_store

SHAPE = Schema(
    (
        Column("symbol", ColumnType.STR, nullable=False),
        Column("ts", ColumnType.DATETIME, nullable=False),
        Column("open", ColumnType.F64),
        Column("close", ColumnType.F64),
        Column("volume", ColumnType.I64),
        Column("day", ColumnType.DATE),
        Column("venue", ColumnType.STR),
        Column("later", ColumnType.F64, description="of which the user has nothing"),
    ),
    key=("symbol", "ts"),
    time="ts",
    subject="symbol",
    period=Period.MONTH,
)
THEIRS = {
    "note": "text",
    "volume": "int",
    "day": "date",
    "close": "single",
    "venue": "text",
    "ts": "naive",
    "symbol": "text",
    "open": "double",
}
FIRST = datetime(2024, 1, 30, 14, 30)  # noqa: DTZ001 - as the user has them
WISH = Wish("adopted:2026-11-21", datetime(2026, 11, 21, 12, tzinfo=UTC), zone="UTC")


def rows(hours: int = 60) -> list[tuple]:
    return [
        (
            f"checked {hour}",
            None if hour % 7 == 3 else hour * 1000,
            date(2024, 1, 30) + timedelta(days=hour),
            hour / 4,  # exact in 24 bits
            None if hour % 5 == 1 else "XNYS",
            FIRST + timedelta(hours=hour),
            symbol,
            hour / 10,
        )
        for hour in range(hours)
        for symbol in ("000001", "BRK.B")
    ]


def expected(given: list[tuple]) -> pl.DataFrame:
    frame = pl.DataFrame(
        given,
        schema={name: made_by_hand.POLARS[type_] for name, type_ in THEIRS.items()},
        orient="row",
    )
    types = SHAPE.polars()
    return frame.select(
        pl.lit(None, types[name]).alias(name)
        if name not in frame.columns
        else pl.col(name).dt.replace_time_zone("UTC").cast(types[name])
        if name == "ts"
        else pl.col(name).cast(types[name])
        for name in SHAPE.names
    )


@pytest.fixture
def adopting(place):
    """The place, where its engine can adopt a table."""
    store = place.open()
    able = hasattr(store, "adopt") and "timeSeries=true" not in place.url
    store.close()
    if not able:
        pytest.skip(f"{place.scheme} adopts no tables")
    return place


def test_a_table_made_by_hand_is_taken_over_and_written_to_like_any_other(adopting, dataset):
    given = rows()
    made_by_hand.make(adopting, dataset, THEIRS, given)
    store = adopting.open()
    with pytest.raises(ForeignTable, match=f"`marketsync adopt {dataset}` takes it over"):
        store.ensure(dataset, SHAPE)
    with pytest.raises(ForeignTable, match=f"`marketsync adopt {dataset}` takes it over"):
        store.schema(dataset)

    dry = store.adopt(dataset, SHAPE, replace(WISH, dry=True))
    assert (dry.rows, dry.marker) == (len(given), None)
    with pytest.raises(ForeignTable):
        store.ensure(dataset, SHAPE)
    adopted = store.adopt(dataset, SHAPE, WISH)
    assert adopted.counts.sort("subject", "at").equals(dry.counts.sort("subject", "at"))
    assert adopted.counts.group_by("subject").agg(pl.col("n").sum()).sort("subject").rows() == [
        ("000001", 60),
        ("BRK.B", 60),
    ]
    assert list(adopted.extra) == ["note"]
    assert store.ensure(dataset, SHAPE) == adopted.marker == store.marker(dataset)
    assert dataset in store.datasets()

    want = expected(given)
    assert differences(store.scan(dataset).collect(), want, SHAPE.key) == []
    system = store.scan(dataset, Filter(system=True)).select("_segment", "_ingested_at").unique().collect()
    assert system.rows() == [(WISH.segment, WISH.at)]
    assert store.watermarks(dataset)["000001"] == FIRST.replace(tzinfo=UTC) + timedelta(hours=59)

    # equal rows stay, one is changed, some are new
    changed = want.with_columns(
        close=pl.when((pl.col("symbol") == "BRK.B") & (pl.col("ts") == want["ts"][0])).then(99.5).otherwise("close")
    )
    new = expected(rows(70)).filter(pl.col("ts") > want["ts"].max()).with_columns(later=pl.lit(1.5))
    batch_of = stamped(pl.concat([changed, new]), "fetched")
    written = store.write(batch(dataset, batch_of, schema=SHAPE, mode=Mode.UPSERT))
    assert (written.inserted, written.updated, written.unchanged) == (20, 1, 119)
    after = pl.concat([changed, new])
    assert differences(store.scan(dataset).collect(), after, SHAPE.key) == []
    assert store.write(batch(dataset, batch_of, schema=SHAPE)).already

    span = Filter(
        subjects=["BRK.B"], since=FIRST.replace(tzinfo=UTC), until=FIRST.replace(tzinfo=UTC) + timedelta(hours=4)
    )
    two = after.filter(pl.col("symbol") == "BRK.B").sort("ts").head(2)
    replaced = store.replace(dataset, SHAPE, stamped(two, "repair"), span)
    assert (replaced.deleted, replaced.unchanged) == (2, 2)
    assert store.count(dataset, span) == 2
    assert store.delete(dataset, Filter(subjects=["BRK.B"])) == 68
    store.maintain(dataset)
    assert differences(store.scan(dataset).collect(), after.filter(symbol="000001"), SHAPE.key) == []

    again = store.adopt(dataset, SHAPE, WISH)
    assert (again.already, again.marker, again.rows) == (True, adopted.marker, 70)
    store.close()


def test_a_second_adoption_changes_nothing(adopting, dataset):
    made_by_hand.make(adopting, dataset, THEIRS, rows(5))
    store = adopting.open()
    first = store.adopt(dataset, SHAPE, WISH)
    before = store.scan(dataset, Filter(system=True)).collect().sort(SHAPE.key)
    second = store.adopt(dataset, SHAPE, replace(WISH, segment="adopted:later"))
    assert (second.already, second.marker, second.rows, list(second.done)) == (True, first.marker, 10, [])
    assert store.scan(dataset, Filter(system=True)).collect().sort(SHAPE.key).equals(before)
    store.close()


def test_a_table_and_columns_of_other_names_are_taken_when_they_are_named(adopting, dataset):
    types = {("Close" if name == "close" else name): type_ for name, type_ in THEIRS.items()}
    given = rows(6)
    made_by_hand.make(adopting, dataset, types, given, name="prices")
    store = adopting.open()
    with pytest.raises(NoTable, match="--table"):
        store.adopt(dataset, SHAPE, WISH)
    wish = replace(WISH, table="prices")
    with pytest.raises(AdoptionRefused, match=r"by its case only.*--rename Close=close"):
        store.adopt(dataset, SHAPE, wish)
    store.adopt(dataset, SHAPE, replace(wish, rename={"Close": "close"}))
    assert differences(store.scan(dataset).collect(), expected(given), SHAPE.key) == []
    store.close()


WHOLE = {"symbol": "text", "ts": "instant", "close": "double", "volume": "long"}
GOOD = [("AAPL", FIRST, 1.5, 10), ("IBM", FIRST, 2.5, 20)]
REFUSALS = {
    "a missing key column": ({"ts": "instant", "close": "double"}, [(FIRST, 1.0)], r"key column 'symbol' is missing"),
    "a key that is there twice": (
        WHOLE,
        [*GOOD, GOOD[1]],
        r"1 key is there more than once \(2 rows; the first: symbol=IBM",
    ),
    "a null in the key": (WHOLE, [*GOOD, (None, FIRST, 3.5, 30)], r"key column 'symbol' is null in 1 row"),
    "fractions in whole numbers": (
        {**WHOLE, "volume": "double"},
        [("AAPL", FIRST, 1.5, 10.0), ("IBM", FIRST, 2.5, 20.25)],
        r"'volume' .* cannot become i64: .*in 1 row, such as 20\.25",
    ),
    "texts that are no times": (
        {**WHOLE, "ts": "text"},
        [("AAPL", "2024-01-30T14:30:00Z", 1.5, 10), ("IBM", "yesterday", 2.5, 20)],
        r"'ts' .*no times.*in 1 row, such as yesterday",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_would_lose_a_value_is_refused_with_its_reason_and_changes_nothing(adopting, dataset, case):
    types, given, words = REFUSALS[case]
    if case == "texts that are no times" and adopting.scheme == "mysql":
        types, given = {**types}, [(s, at.replace("Z", ""), *rest) for s, at, *rest in given]
    made_by_hand.make(adopting, dataset, types, given)
    store = adopting.open()
    wish = replace(WISH, zone="UTC" if adopting.scheme in ("mysql", "csv") else None)
    for dry in (True, False):
        with pytest.raises(AdoptionRefused, match=words):
            store.adopt(dataset, BARS, replace(wish, dry=dry))
    with pytest.raises(ForeignTable):
        store.ensure(dataset, BARS)
    store.close()


def test_times_without_a_zone_are_asked_for_theirs(adopting, dataset):
    if adopting.scheme in ("clickhouse", "chdb", "mongodb"):
        pytest.skip("every time of this engine is an instant")
    made_by_hand.make(adopting, dataset, {**WHOLE, "ts": "naive"}, GOOD)
    store = adopting.open()
    with pytest.raises(AdoptionRefused, match="--zone UTC or --zone America/New_York"):
        store.adopt(dataset, BARS, replace(WISH, zone=None))
    if adopting.scheme == "mysql":
        with pytest.raises(AdoptionRefused, match="CONVERT_TZ"):
            store.adopt(dataset, BARS, replace(WISH, zone="America/New_York"))
        return
    store.adopt(dataset, BARS, replace(WISH, zone="America/New_York"))
    assert store.scan(dataset).collect()["ts"].unique().to_list() == [datetime(2024, 1, 30, 19, 30, tzinfo=UTC)]
    store.close()


def test_days_become_the_midnights_of_a_zone(adopting, dataset):
    if adopting.scheme == "mongodb":
        pytest.skip("a date of BSON is an instant")
    zone = "UTC" if adopting.scheme == "mysql" else "America/New_York"
    made_by_hand.make(adopting, dataset, {**WHOLE, "ts": "date"}, [(s, FIRST.date(), *rest) for s, _, *rest in GOOD])
    store = adopting.open()
    store.adopt(dataset, BARS, replace(WISH, zone=zone))
    midnight = datetime(2024, 1, 30, 0 if zone == "UTC" else 5, tzinfo=UTC)
    assert store.scan(dataset).collect()["ts"].unique().to_list() == [midnight]
    store.close()


def test_rows_from_before_1970_are_counted_on_their_own_days(adopting, dataset):
    closes = [datetime(1969, 12, day, 21) for day in (30, 31)]  # noqa: DTZ001 - as the user has them
    types = {**WHOLE, "ts": "naive"} if adopting.scheme == "mysql" else WHOLE  # whose instants begin in 1970
    made_by_hand.make(adopting, dataset, types, [("IBM", at, 1.5, 10) for at in closes])
    store = adopting.open()
    days = [datetime(1969, 12, day, tzinfo=UTC) for day in (30, 31)]
    for _ in range(2):  # as a table of the user's, and as one of ours
        counts = store.adopt(dataset, BARS, replace(WISH, every=timedelta(days=1))).counts
        assert counts.sort("at").rows() == [("IBM", day, 1) for day in days]
    store.close()


@pytest.mark.parametrize(("type_", "value"), [("single", 0.25), ("decimal", 12.34), ("int", 7)])
def test_a_narrower_number_becomes_as_wide_as_the_dataset_has_it(adopting, dataset, type_, value):
    made_by_hand.make(adopting, dataset, {**WHOLE, "close": type_}, [(s, at, value, v) for s, at, _, v in GOOD])
    store = adopting.open()
    store.adopt(dataset, BARS, WISH)
    assert store.scan(dataset).collect()["close"].to_list() == [value, value]
    wider = bars(("AAPL",), rows=1).with_columns(close=pl.lit(1 / 3), volume=pl.lit(2**40))
    store.write(batch(dataset, wider))
    assert store.scan(dataset, Filter(since=BARS_START)).filter(volume=2**40).collect()["close"].to_list() == [1 / 3]
    store.close()


BARS_START = datetime(2001, 1, 1, tzinfo=UTC)


def test_an_extra_column_that_no_row_could_be_added_without_is_refused_with_what_to_type(adopting, dataset):
    if adopting.scheme not in ("postgresql", "mysql"):
        pytest.skip("the rows are copied, and that column stays in the original")
    made_by_hand.make(adopting, dataset, {**WHOLE, "desk": "varchar(9) NOT NULL"}, [(*row, "rates") for row in GOOD])
    store = adopting.open()
    with pytest.raises(AdoptionRefused, match=r"'desk' may not be null and has no default.*ALTER TABLE"):
        store.adopt(dataset, BARS, WISH)
    store.close()


@pytest.mark.parametrize("scheme", ["postgresql", "mysql"])
def test_columns_keys_and_defaults_of_the_user_stay_through_later_writes(place_of, scheme, dataset):
    place = place_of(scheme)
    number = "serial PRIMARY KEY" if scheme == "postgresql" else "int AUTO_INCREMENT PRIMARY KEY"
    types = {**WHOLE, "desk": "varchar(9) DEFAULT 'rates' NOT NULL"}
    made_by_hand.make(place, dataset, types, [(*row, "equity") for row in GOOD])
    table = f"`{dataset}`" if scheme == "mysql" else '"{}"."{}"'.format(*dataset.split("."))
    made_by_hand.run(place, [f"ALTER TABLE {table} ADD COLUMN id {number}"])
    store = place.open()
    store.adopt(dataset, BARS, WISH)
    have = store.scan(dataset).collect()
    store.write(batch(dataset, stamped(have.with_columns(pl.col("close") * 2)), 1))
    store.write(batch(dataset, bars(("NEW",), rows=1), 2))
    told = store.query(f"SELECT t.symbol, t.desk, t.close FROM {dataset} AS t ORDER BY t.id").rows()
    assert told == [("AAPL", "equity", 3.0), ("IBM", "equity", 5.0), ("NEW", "rates", 0.0)]
    store.close()


@pytest.mark.parametrize(
    ("text", "at"),
    [
        ("2024-01-30T14:30:00Z", datetime(2024, 1, 30, 14, 30, tzinfo=UTC)),
        ("2024-01-30 09:30:00.250-0500", datetime(2024, 1, 30, 14, 30, 0, 250_000, tzinfo=UTC)),
        ("2024-01-30 09:30", datetime(2024, 1, 30, 14, 30, tzinfo=UTC)),
        ("2024-01-30", datetime(2024, 1, 30, 5, tzinfo=UTC)),
        ("2024-01-30T14:30:00.123456789Z", None),  # finer than the dataset's times
        ("2024-11-03 01:30:00", None),  # twice in New York
        ("2024-03-10 02:30:00", None),  # never
        ("2024-13-01 09:30:00", None),
        ("2024-02-01T23:59:60Z", None),
        ("2024-02-01T24:00:00Z", None),
        ("1706625000", None),
    ],
)
def test_a_time_in_a_file_of_texts_is_what_it_says_or_refused(place_of, text, at):
    place = place_of("csv")
    folder = place.folder / "made" / "bars"
    folder.mkdir(parents=True)
    (folder / "mine.csv").write_text(f"volume,ts,close,symbol\n100.0,{text},0.1,000001\n", encoding="utf-8")
    store = place.open()
    wish = replace(WISH, zone="America/New_York")
    if at is None:
        with pytest.raises(AdoptionRefused, match=f"'ts' .*in 1 row, such as {text}"):
            store.adopt("made.bars", BARS, wish)
    else:
        store.adopt("made.bars", BARS, wish)
        assert store.scan("made.bars").collect().rows() == [("000001", at, 0.1, 100)]
    store.close()


def test_a_number_in_a_file_of_texts_is_what_it_says_or_refused(place_of):
    columns = (Column("k", ColumnType.I64), Column("double", ColumnType.F64), Column("single", ColumnType.F32))
    schema = Schema(columns, key=("k",))
    place = place_of("csv")
    folder = place.folder / "made"
    folder.mkdir(parents=True)
    (folder / "bad.csv").write_text("k,double,single\n1,1e400,16777217\n2,-1e5,1e39\n3,0.1,0.1\n", encoding="utf-8")
    (folder / "good.csv").write_text("k,double,single\n1,Infinity,-inf\n2,1e5,0.1\n3,NaN,1.5\n", encoding="utf-8")
    store = place.open()
    with pytest.raises(AdoptionRefused) as refused:
        store.adopt("made.bad", schema, WISH)
    assert "in 1 row, such as 1e400" in str(refused.value)
    assert "in 2 rows, such as 16777217" in str(refused.value)
    store.adopt("made.good", schema, WISH)
    found = store.scan("made.good").collect()
    assert found["double"].equals(pl.Series([math.inf, 1e5, math.nan]))
    assert found["single"].equals(pl.Series([-math.inf, 0.1, 1.5], dtype=pl.Float32))
    store.close()


def test_each_file_of_a_symbol_can_say_whose_it_is(place_of):
    for scheme in ("csv", "parquet"):
        place = place_of(scheme)
        folder = place.folder / "made" / "bars"
        folder.mkdir(parents=True)
        for symbol in ("AAPL", "BRK.B"):
            one = bars((symbol,), rows=3).select("ts", "volume", "close")
            getattr(one, f"write_{scheme}")(folder / f"{symbol}.{scheme}")
        store = place.open()
        with pytest.raises(AdoptionRefused, match="--rename _file=symbol when each file is one symbol's"):
            store.adopt("made.bars", BARS, WISH)
        done = store.adopt("made.bars", BARS, replace(WISH, rename={"_file": "symbol"}))
        want = pl.concat([bars((symbol,), rows=3) for symbol in ("AAPL", "BRK.B")]).select(BARS.names)
        assert differences(store.scan("made.bars").collect(), want, BARS.key) == []
        assert sorted(path.name for path in (place.folder / "_adopted" / "made" / "bars").glob("*.*")) == [
            f"AAPL.{scheme}",
            f"BRK.B.{scheme}",
        ]
        assert done.kept == str(place.folder / "_adopted" / "made" / "bars")
        store.close()


def test_each_file_of_a_table_is_read_with_the_types_that_it_has_itself(place_of):
    place = place_of("parquet")
    folder = place.folder / "made" / "bars"
    folder.mkdir(parents=True)
    plain = bars(("AAPL",), rows=6).select(BARS.names)
    new_york = pl.col("ts").dt.convert_time_zone("America/New_York")
    plain[:2].with_columns(new_york.dt.replace_time_zone(None)).write_parquet(folder / "1.parquet")
    plain[2:4].with_columns(pl.col("volume").cast(pl.Int32)).write_parquet(folder / "2.parquet")
    plain[4:].with_columns(new_york, pl.lit("me").alias("who")).write_parquet(folder / "3.parquet")
    store = place.open()
    with pytest.raises(AdoptionRefused, match=r"have no zone .* in 2 rows"):
        store.adopt("made.bars", BARS, replace(WISH, zone=None))
    done = store.adopt("made.bars", BARS, replace(WISH, zone="America/New_York"))
    assert differences(store.scan("made.bars").collect(), plain, BARS.key) == []
    assert done.extra == ["who"]
    store.close()


def test_a_view_a_wrong_name_and_an_index_that_is_too_strict_are_refused(place_of, dataset):
    place = place_of("postgresql")
    made_by_hand.make(place, dataset, WHOLE, GOOD, name="public.prices")
    made_by_hand.run(place, ["CREATE VIEW shown AS SELECT * FROM prices"])
    store = place.open()
    with pytest.raises(AdoptionRefused, match=r"is a view.*CREATE TABLE"):
        store.adopt(dataset, BARS, replace(WISH, table="shown"))
    with pytest.raises(SchemaError, match="there is no column 'closs'; did you mean close"):
        store.adopt(dataset, BARS, replace(WISH, table="prices", rename={"closs": "close"}))
    made_by_hand.run(place, ["CREATE UNIQUE INDEX one_each ON prices (symbol)"])
    with pytest.raises(AdoptionRefused, match="unique index 'one_each' over symbol would refuse rows"):
        store.adopt(dataset, BARS, replace(WISH, table="prices"))
    store.close()


NO_TIMES = {
    "never": ("timestamp", "2024-03-10 02:30:00", ColumnType.DATETIME),
    "twice": ("timestamp", "2024-11-03 01:30:00", ColumnType.DATETIME),
    "never_text": ("varchar", "2024-03-10 02:30:00", ColumnType.DATETIME),
    "twice_text": ("varchar", "2024-11-03T01:30:00", ColumnType.DATETIME),
    "sixty": ("varchar", "2024-02-01T23:59:60Z", ColumnType.DATETIME),
    "twenty_four": ("varchar", "2024-02-01T24:00:00Z", ColumnType.DATETIME),
    "endless": ("timestamptz", "infinity", ColumnType.DATETIME),
    "endless_local": ("timestamp", "-infinity", ColumnType.DATETIME),
    "before": ("timestamptz(3)", "0044-03-15 00:00:00+00 BC", ColumnType.DATETIME),
    "after": ("varchar", "9999-12-31T23:30:00-05", ColumnType.DATETIME),
    "endless_day": ("date", "infinity", ColumnType.DATE),
    "late_day": ("timestamp", "10000-01-01 00:00:00", ColumnType.DATE),
    "below": ("numeric(20, 0)", "-1", ColumnType.U64),
    "above": ("numeric(20, 0)", "18446744073709551616", ColumnType.U64),
}


def test_what_a_column_of_ours_could_not_give_back_is_refused_by_postgresql(place_of, dataset):
    place = place_of("postgresql")
    columns = tuple(Column(name, type_) for name, (_, _, type_) in NO_TIMES.items())
    schema = Schema((Column("k", ColumnType.I64, nullable=False), *columns), ("k",))
    types = {"k": "bigint", **{name: of for name, (of, _, _) in NO_TIMES.items()}}
    made_by_hand.make(place, dataset, types, [(1, *(value for _, value, _ in NO_TIMES.values()))])
    store: Any = place.open()
    with pytest.raises(AdoptionRefused) as refused:
        store.adopt(dataset, schema, replace(WISH, zone="America/New_York"))
    for (name, (_, value, _)), reason in zip(NO_TIMES.items(), refused.value.reasons, strict=True):
        assert re.search(rf"'{name}' .*in 1 row, such as {re.escape(value)}; ALTER TABLE", reason)
    store.close()


# of a server that was built without ICU, the catalog is told so
LOOSE = """DO $$ BEGIN
CREATE COLLATION loose (provider = icu, locale = 'und-u-ks-level2', deterministic = false);
EXCEPTION WHEN feature_not_supported THEN
CREATE COLLATION loose FROM "POSIX";
UPDATE pg_collation SET collisdeterministic = false WHERE collname = 'loose';
END $$"""


def test_a_table_whose_rows_are_not_only_those_that_are_written_is_refused(place_of, dataset):
    place = place_of("postgresql")
    made_by_hand.make(place, dataset, WHOLE, GOOD, name="public.prices")
    made_by_hand.run(
        place,
        [
            "CREATE TABLE more () INHERITS (prices)",
            "CREATE TABLE above (symbol varchar(20))",
            "ALTER TABLE prices INHERIT above",
            "CREATE FUNCTION gone() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'",
            "CREATE TRIGGER away BEFORE INSERT ON prices FOR EACH ROW EXECUTE FUNCTION gone()",
            "CREATE RULE nothing AS ON DELETE TO prices DO INSTEAD NOTHING",
            "ALTER TABLE prices ENABLE ROW LEVEL SECURITY",
            LOOSE,
            "CREATE UNIQUE INDEX alike ON prices (symbol COLLATE loose, ts)",
            "ALTER TABLE prices SET UNLOGGED",
            "ALTER TABLE prices ADD CONSTRAINT late UNIQUE (symbol, ts) DEFERRABLE",
        ],
    )
    store: Any = place.open()
    wish = replace(WISH, table="prices")
    remedies = []
    for dry in (True, False):
        with pytest.raises(AdoptionRefused) as refused:
            store.adopt(dataset, BARS, replace(wish, dry=dry))
        remedies = [reason.rpartition(": ")[2] for reason in refused.value.reasons]
        assert [" ".join(remedy.split()[:3]) for remedy in remedies] == [
            'ALTER TABLE "public"."prices"',
            'ALTER TABLE "public"."prices"',
            "DROP INDEX alike",
            "ALTER TABLE more",
            'ALTER TABLE "public"."prices"',
            "DROP RULE nothing",
            "DROP TRIGGER away",
            'ALTER TABLE "public"."prices"',
        ]
    made_by_hand.run(place, [*remedies, "CREATE VIEW mine AS SELECT symbol FROM prices"])
    with pytest.raises(AdoptionRefused, match=r"(?s)nothing was changed.* used by a view .* depends on column"):
        store.adopt(dataset, BARS, wish)
    made_by_hand.run(place, ["DROP VIEW mine"])
    store.adopt(dataset, BARS, wish)
    store.close()


@pytest.mark.parametrize("options", ["", "?partition=month"])
def test_rows_that_a_later_trigger_leaves_out_or_changes_are_refused_by_postgresql(place_of, dataset, options):
    place = place_of("postgresql")
    store: Any = open_store(place.url + options)
    store.ensure(dataset, BARS)
    trigger = f"CREATE OR REPLACE TRIGGER mine BEFORE INSERT OR UPDATE ON {dataset} FOR EACH ROW EXECUTE FUNCTION"
    for number, body in enumerate(("RETURN NULL;", "NEW.volume := 7; RETURN NEW;")):
        function = f"CREATE FUNCTION f{number}() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN {body} END'"
        made_by_hand.run(place, [function, f"{trigger} f{number}()"])
        for seq, mode in enumerate(Mode, 1):
            with pytest.raises(StoreError, match=r"as they were sent, nothing was written: .*DROP TRIGGER mine ON"):
                store.write(batch(dataset, bars(), seq, mode=mode))
    assert (store.count(dataset), store.committed(dataset, "lane")) == (0, 0)
    harmless = "CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN NOTIFY bars; RETURN NEW; END'"
    made_by_hand.run(place, [harmless, f"{trigger} note()"])
    assert store.write(batch(dataset, bars(), 1, mode=Mode.APPEND)) == Written(inserted=96)
    assert store.write(batch(dataset, bars(add=1.0), 2)) == Written(updated=96)
    store.close()


def test_a_default_of_the_user_is_no_value_of_a_row_that_has_none(place_of, dataset):
    place = place_of("postgresql")
    types = {**WHOLE, "close": "real DEFAULT 7", "volume": "int GENERATED BY DEFAULT AS IDENTITY"}
    made_by_hand.make(place, dataset, types, GOOD)
    store: Any = place.open()
    store.adopt(dataset, BARS, WISH)
    older = Schema(tuple(c for c in BARS.columns if c.name in BARS.key), BARS.key, BARS.time, BARS.subject, BARS.period)
    for seq, mode in enumerate(Mode, 1):
        rows = bars((f"NEW{seq}",), rows=1).drop("close", "volume")
        store.write(batch(dataset, rows, seq, mode=mode, schema=older))
    assert (
        store.scan(dataset).filter(pl.col("close").is_not_null() | pl.col("volume").is_not_null()).collect().height == 2
    )
    store.close()


class Crash(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("where", ["made/bars", "elsewhere/bars"])
@pytest.mark.parametrize("scheme", ["parquet", "csv", "delta"])
def test_a_crash_before_or_between_the_moves_of_an_adoption_leaves_all_rows_to_be_adopted(
    scheme: str, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    frame = bars(rows=5).select(BARS.names).sort("symbol", "ts")
    for moves in range(4):
        root = tmp_path / str(moves)
        original = root / where
        original.mkdir(parents=True)
        if scheme == "delta":
            frame.write_delta(original)
        else:
            getattr(frame, f"write_{scheme}")(original / f"rows.{scheme}")

        def move(source: Path, target: Path, left=[moves]) -> None:  # noqa: B006 - counts down for one adoption
            left[0] -= 1
            if left[0] < 0:
                raise Crash
            os.replace(source, target)

        wish = replace(WISH, table=None if where == "made/bars" else where)
        store: Any = open_store(f"{scheme}://{root}")
        with monkeypatch.context() as dying, suppress(Crash):
            dying.setattr(storage.adoption_copies, "os", SimpleNamespace(replace=move))
            store.adopt("made.bars", BARS, wish)
            return  # every crash was tried
        store: Any = open_store(f"{scheme}://{root}")
        try:
            store.adopt("made.bars", BARS, wish)
        except NoTable as error:
            where_then = str(error).rpartition("--table ")[2]
            store.adopt("made.bars", BARS, replace(wish, table=where_then))
        found = store.scan("made.bars").collect().sort("symbol", "ts")
        assert_frame_equal(found, frame)
    pytest.fail("an adoption never came to its end")
