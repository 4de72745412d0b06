"""What only MongoDB's time-series collections have: how they are made, how a row is there once where no key is unique,
whatever dies or comes at the same time, and what tells one from another of its name. The rest is in conformance. What a
real server refuses and the stand-in does not fails these tests (see timeseries_rules.py)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, date, datetime, timedelta

import polars as pl
import pymongo
import pytest
import timeseries_rules
from bson import ObjectId
from private_mongodb import mortal_mongodb, private_mongodb
from pymongo.database import Database
from pymongo.errors import OperationFailure
from stored_frames import BARS, START, bars, batch, stamped

from marketsync.errors import AdoptionRefused, ConfigurationError, ForeignTable, SchemaConflict, StoreError
from marketsync.schema import Column, ColumnType, Period, Schema
from storage import documents, mongodb_series
from storage.adoption import Wish
from storage.fingerprints import Recipe, of_rows
from storage.mongodb import MongoStore, open_url
from storage.mongodb_series import Series
from storage.protocol import Filter, Mode, Written

DATASET = "made.bars"
KEY = ["symbol", "ts"]
TICKS = Schema(
    (
        Column("symbol", ColumnType.STR),
        Column("at", ColumnType.DATETIME_NS),
        Column("number", ColumnType.U64),
        Column("price", ColumnType.F64),
    ),
    key=("symbol", "at", "number"),
    time="at",
    subject="symbol",
    period=Period.DAY,
)


def plain(url: str) -> str:
    """The URL as the driver takes it."""
    return url.replace("?timeSeries=true", "?").replace("&timeSeries=true", "")


@pytest.fixture
def store(timeseries: str) -> Iterator[MongoStore]:
    opened = open_url(timeseries, "series")
    yield opened
    opened.close()


@pytest.fixture
def other(timeseries: str) -> Iterator[MongoStore]:
    """The same place, as another process has it."""
    opened = open_url(timeseries, "other")
    yield opened
    opened.close()


@pytest.fixture
def database(timeseries: str) -> Iterator[Database]:
    """The same database as another client has it."""
    with pymongo.MongoClient(plain(timeseries)) as client:
        yield client.get_database()


def rows_of(store: MongoStore) -> pl.DataFrame:
    return store.scan(DATASET, Filter(system=True)).collect().sort(KEY)


def twins_in(database: Database, dataset: str = DATASET) -> int:
    """How many documents have the key of another one."""
    keys = Counter((row["symbol"], row["ts"]) for row in database[dataset].find())
    return sum(count - 1 for count in keys.values())


# the collection


@pytest.mark.parametrize(
    ("period", "type_", "seconds"),
    [
        (Period.DAY, ColumnType.DATETIME, 86_400),
        (Period.MONTH, ColumnType.DATETIME, 2_678_400),
        (Period.YEAR, ColumnType.DATE, 31_536_000),
        (Period.NONE, ColumnType.DATE, 31_536_000),
        (Period.NONE, ColumnType.DATETIME_NS, 2_678_400),
    ],
)
def test_a_bucket_lasts_a_period_of_its_dataset(period, type_, seconds):
    schema = Schema((Column("s", ColumnType.STR), Column("t", type_)), ("s", "t"), "t", "s", period)
    assert mongodb_series.options(schema) == {
        "timeField": "t",
        "metaField": "s",
        "bucketMaxSpanSeconds": seconds,
        "bucketRoundingSeconds": seconds,
    }


def test_a_dataset_is_a_time_series_by_its_subject_and_its_time(store, database):
    store.ensure(DATASET, BARS)
    store.write(batch(DATASET, bars(rows=2)))
    (listed,) = database.list_collections(filter={"name": DATASET})
    made = listed["options"]["timeseries"]
    assert (made["timeField"], made["metaField"]) == ("ts", "symbol")
    found = database[DATASET].find_one({"symbol": "NA", "ts": START.replace(tzinfo=None)})
    assert found.keys() == {"_id", *BARS.names, "_segment", "_ingested_at", "_ingested_at__ns"}
    assert isinstance(found["_id"], ObjectId)
    assert store.info(DATASET).location.endswith("made.bars (time series)")
    assert not store.capabilities.any_key


def test_a_dataset_without_subjects_is_one_series(store):
    schema = Schema((Column("day", ColumnType.DATE), Column("open", ColumnType.BOOL)), ("day",), "day")
    store.ensure("made.days", schema)
    days = stamped(pl.DataFrame({"day": [date(1969, 12, 31), date(2001, 1, 1)], "open": [False, True]}))
    store.write(batch("made.days", days, schema=schema))
    changed = days.with_columns(open=~pl.col("open"))
    assert store.write(batch("made.days", changed, 2, schema=schema)) == Written(updated=2)
    assert store.scan("made.days").collect().sort("day").equals(changed.select("day", "open"))
    assert store.watermarks("made.days") == {"*": date(2001, 1, 1)}


@pytest.mark.parametrize(
    ("schema", "lacks"),
    [
        (Schema(BARS.columns, ("symbol",), "ts", "symbol"), "time"),
        (Schema(BARS.columns, ("symbol",), None, "symbol"), "time"),
        (Schema(BARS.columns, ("ts",), "ts", "symbol"), "subject"),
    ],
)
def test_a_dataset_whose_key_has_no_time_or_not_its_subject_is_refused_with_the_remedy(store, schema, lacks):
    for ask in (store.unkept, store.ensure):  # a copy asks before it makes a table
        with pytest.raises(
            SchemaConflict, match=rf"made\.bars.*its {lacks} is not in its key.*leave timeSeries=true out"
        ):
            ask(DATASET, schema)
    assert store.datasets() == []


def test_a_server_that_cannot_take_a_row_out_is_refused_with_the_remedy():
    mongodb_series.check(DATASET, BARS, [7, 0, 0, 0])
    with pytest.raises(StoreError, match=r"MongoDB 6\.3.*update the server, or leave timeSeries=true out"):
        mongodb_series.check(DATASET, BARS, [6, 3, 9, 0])


def test_the_option_is_ours_and_has_two_values(timeseries):
    for value, series in (("true", True), ("false", False)):
        opened = open_url(f"mongodb://host/db?timeseries={value}&tls=true", "mongo")
        assert "eries" not in opened._address
        assert opened.capabilities.any_key is not series
    with pytest.raises(ConfigurationError, match="timeSeries='yes' is neither true nor false"):
        open_url("mongodb://host/db?timeSeries=yes", "mongo")


def test_a_table_is_used_as_it_was_made_with_the_option_and_without(mongodb):
    ordinary = open_url(mongodb, "ordinary")
    series = open_url(f"{mongodb}{'&' if '?' in mongodb else '?'}timeSeries=true", "series")
    made = {"made.ordinary": ordinary, "made.series": series}
    marks = {name: maker.ensure(name, BARS) for name, maker in made.items()}
    for seq, each in enumerate((ordinary, series), 1):
        assert each.datasets() == list(made)
        for name in made:
            assert each.ensure(name, BARS) == marks[name]
            each.write(batch(name, bars(rows=4, add=float(seq)), seq))
            assert each.scan(name).collect().sort(KEY).equals(bars(rows=4, add=float(seq)).select(BARS.names).sort(KEY))
            assert each.info(name).location.endswith(" (time series)") == (name == "made.series")
    assert ordinary.delete("made.series", Filter(["NA"])) == series.delete("made.ordinary", Filter(["NA"])) == 4
    ordinary.close()
    series.close()


def test_an_empty_collection_of_another_form_is_not_taken(store, database):
    database.create_collection("made.ordinary")
    database.create_collection("made.turned", timeseries={"timeField": "ts", "metaField": "close"})
    for name in ("made.ordinary", "made.turned"):
        with pytest.raises(ForeignTable, match="was not made by MarketSync"):
            store.ensure(name, BARS)
    database.create_collection(DATASET, timeseries={"timeField": "ts", "metaField": "symbol"})
    assert store.marker(DATASET) is None
    assert store.ensure(DATASET, BARS) == store.marker(DATASET)


def test_no_collection_is_adopted_as_a_time_series(store, database):
    database["made.ordinary"].insert_many(documents.to_documents(bars(rows=2), BARS))
    wish = Wish(at=datetime(2026, 1, 2, tzinfo=UTC), segment="adopted", table="made.ordinary")
    with pytest.raises(AdoptionRefused, match="leave timeSeries=true out"):
        store.adopt(DATASET, BARS, wish)


# how one is told from another of its name


class Views:
    """Lists collections as servers do whose time-series collections are views: with no uuid but that of the buckets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, buckets: bool = True):
        whole = Database.list_collections

        def listed(self: Database, **options: dict) -> Iterator[dict]:
            asked = options.get("filter", {}).get("name")
            wanted = set(asked["$in"]) if isinstance(asked, dict) else asked and {asked}
            for each in map(dict, whole(self)):
                shown = [each]
                if "timeseries" in each["options"] and "uuid" in each["info"]:
                    shown = [each | {"type": "timeseries", "info": {"readOnly": False}}]
                    shown += [each | {"name": f"system.buckets.{each['name']}", "type": "collection", "options": {}}]
                if not buckets:
                    shown = [one for one in shown if not one["name"].startswith("system.buckets.")]
                yield from (one for one in shown if not wanted or one["name"] in wanted)

        monkeypatch.setattr(Database, "list_collections", listed)


def test_it_is_told_from_another_of_its_name_by_the_uuid_of_its_buckets(store, other, database, monkeypatch):
    Views(monkeypatch)
    before = store.ensure(DATASET, BARS)
    store.write(batch(DATASET, bars(rows=2), 3))
    assert (other.marker(DATASET), other.committed(DATASET, "lane"), other.datasets()) == (before, 3, [DATASET])
    assert "forgot" not in other.maintain(DATASET)
    rows = list(database[DATASET].find())
    database[DATASET].drop()
    assert store.marker(DATASET) is None
    assert store.ensure(DATASET, BARS) == other.marker(DATASET) != before
    assert store.committed(DATASET, "lane") == 0
    assert "forgot 1 collections" in store.maintain(DATASET)
    database[DATASET].drop()
    database.create_collection(DATASET, timeseries={"timeField": "ts", "metaField": "symbol"})
    database[DATASET].insert_many(rows)
    with pytest.raises(ForeignTable, match="was restored from elsewhere"):
        store.committed(DATASET, "lane")


def test_it_is_not_believed_where_nothing_tells_it_from_another(store, monkeypatch):
    store.ensure(DATASET, BARS)
    Views(monkeypatch, buckets=False)
    with pytest.raises(StoreError, match="gives no uuid"):
        store.committed(DATASET, "lane")


# once


class Died(Exception):
    """What a process would not have raised."""


def dies(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """Let whoever comes to this part of a write, and has anything to do in it, come no further."""

    def die(_: Series, what: pl.DataFrame | list | int, *__: object) -> None:
        if isinstance(what, int) or len(what):
            raise Died

    monkeypatch.setattr(Series, method, die)


def half_corrected(store: MongoStore, seq: int = 2) -> pl.DataFrame:
    """Leave each row twice, as a writer does that dies before it has taken the old ones out; return the new ones."""
    store.ensure(DATASET, BARS)
    store.write(batch(DATASET, bars(rows=10), 1))
    new = bars(rows=10, add=1.0, segment="s2")
    with pytest.MonkeyPatch.context() as patch:
        dies(patch, "_take_out")
        with pytest.raises(Died):
            store.write(batch(DATASET, new, seq))
    return new.sort(KEY)


def test_what_was_cut_short_is_read_once_counted_once_and_ended_when_it_comes_again(store, other, database):
    new = half_corrected(store)
    assert twins_in(database) == 20
    recipe = Recipe(b"seed")
    for each in (store, other):
        assert rows_of(each).equals(new)
        assert each.scan(DATASET, Filter(["NA"], columns=["close"])).collect().height == 10
        assert each.count(DATASET) == 20
        assert each.fingerprints(DATASET, recipe).equals(of_rows(new.lazy(), DATASET, BARS, recipe))
    assert other.write(batch(DATASET, new, 2)) == Written(unchanged=20)
    assert twins_in(database) == 0
    assert rows_of(other).equals(new)


def test_what_was_cut_short_is_ended_even_if_less_of_it_comes_again(store, other, database):
    new = half_corrected(store)
    assert other.write(batch(DATASET, new.head(3), 2)) == Written(unchanged=3)
    assert twins_in(database) == 0
    assert rows_of(other).equals(new)


def test_rows_that_a_dead_writer_left_twice_go_before_others_go_instead(store, other, database):
    new = half_corrected(store)
    assert other.delete(DATASET, Filter(["NA"])) == 10
    assert twins_in(database) == 0
    assert rows_of(other).equals(new.filter(pl.col("symbol") != "NA"))


def test_a_replacement_counts_rows_that_were_there_twice_once(store, other, database):
    new = half_corrected(store)
    frame = new.filter(pl.col("symbol") == "NA").head(4)
    assert other.replace(DATASET, BARS, frame, Filter(["NA"])) == Written(unchanged=4, deleted=6)
    assert twins_in(database) == 0
    assert other.count(DATASET) == 14


def test_maintenance_ends_what_a_writer_left_who_does_not_come_again(store, other, database):
    half_corrected(store)
    assert "left twice" not in other.maintain(DATASET)  # it may be alive
    long_ago = datetime.now(UTC) - timedelta(hours=2)
    database["_marketsync"].update_one({"dataset": DATASET}, {"$set": {"writing.0.at": long_ago}})
    assert "took out 20 rows that dead writers had left twice" in other.maintain(DATASET)
    assert twins_in(database) == 0
    assert database["_marketsync"].find_one({"dataset": DATASET})["writing"] == []


def test_a_batch_of_which_a_part_is_there_is_put_in_without_a_row_twice(store, database):
    store.ensure(DATASET, BARS)
    frame = bars(segment="whole")
    with pytest.MonkeyPatch.context() as patch:
        whole = Series._insert
        patch.setattr(Series, "_insert", lambda self, part, instead: whole(self, part.head(40), instead))
        dies(patch, "_joined")
        with pytest.raises(Died):
            store.write(batch(DATASET, frame, mode=Mode.APPEND))
    assert database[DATASET].count_documents({}) == 40
    assert store.write(batch(DATASET, frame, mode=Mode.APPEND)) == Written(inserted=56, unchanged=40)
    assert rows_of(store).equals(frame.sort(KEY))


def test_no_row_goes_before_the_one_instead_of_it_is_there(store):
    store.ensure(DATASET, BARS)
    store.write(batch(DATASET, bars(rows=10)))
    with pytest.MonkeyPatch.context() as patch:
        dies(patch, "_insert")
        with pytest.raises(Died):
            store.write(batch(DATASET, bars(rows=10, add=1.0), 2))
    assert rows_of(store).equals(bars(rows=10).sort(KEY))


@pytest.mark.parametrize("corrects", [False, True], ids=["new rows", "rows that are there"])
def test_of_two_who_put_in_the_same_keys_at_once_one_is_the_later(store, other, database, monkeypatch, corrects):
    store.ensure(DATASET, BARS)
    if corrects:
        store.write(batch(DATASET, bars(rows=6), 1))
    mine, theirs = (
        bars(rows=6, add=add, segment=segment).sort(KEY) for add, segment in ((1.0, "mine"), (2.0, "theirs"))
    )
    insert, between = Series._insert, []

    def interrupted(self: Series, frame: pl.DataFrame, instead: list) -> None:
        if not between:
            between.append(True)
            other.write(batch(DATASET, theirs, 1, lane="theirs"))
        insert(self, frame, instead)

    monkeypatch.setattr(Series, "_insert", interrupted)
    store.write(batch(DATASET, mine, 2))
    assert twins_in(database) == 0
    found = rows_of(store)
    assert found.select(KEY).equals(mine.select(KEY))
    either = pl.concat([mine, theirs])
    assert found.join(either, on=either.columns, how="semi").height == found.height
    assert database["_marketsync"].find_one({"dataset": DATASET})["writing"] == []


def test_a_correction_counts_whatever_the_clock_of_who_wrote_before_it_said(store, database):
    store.ensure(DATASET, BARS)
    frame = bars(("A",), rows=2)
    ahead = int(datetime(2090, 1, 1, tzinfo=UTC).timestamp()).to_bytes(4, "big")
    rows = documents.to_documents(frame, BARS)
    database[DATASET].insert_many(
        [row | {"_id": ObjectId(ahead + bytes([number] * 8))} for number, row in enumerate(rows)]
    )
    new = bars(("A",), rows=2, add=1.0)
    with pytest.MonkeyPatch.context() as patch:
        dies(patch, "_take_out")
        with pytest.raises(Died):
            store.write(batch(DATASET, new))
    assert rows_of(store).equals(new)
    assert store.write(batch(DATASET, new)) == Written(unchanged=2)
    assert twins_in(database) == 0


def test_a_negative_zero_is_the_zero_that_is_there(store):
    store.ensure(DATASET, BARS)
    frame = bars(("A",), rows=2)
    store.write(batch(DATASET, frame.with_columns(close=pl.Series([0.0, 2.0]))))
    assert store.write(batch(DATASET, frame.with_columns(close=pl.Series([-0.0, 2.0])), 2)) == Written(unchanged=2)


def test_a_document_that_is_there_twice_under_one_id_is_written_anew(store, database):
    store.ensure(DATASET, BARS)
    frame = bars(("A",), rows=2)
    database[DATASET].insert_many(2 * documents.to_documents(frame, BARS))
    assert store.write(batch(DATASET, frame)) == Written(updated=2)
    assert database[DATASET].count_documents({}) == 2
    assert rows_of(store).equals(frame)


def test_ticks_of_one_instant_are_told_apart_by_what_else_is_in_their_key(store, other):
    store.ensure("made.ticks", TICKS)
    at = pl.Series([0, 0, 1, 999_999, 1_002_000]).cast(pl.Datetime("ns", "UTC"))
    frame = pl.DataFrame(
        {"symbol": "A", "at": at, "number": [1, 2**64 - 1, 2, 2, 2], "price": [0.0, 4.0, 1.0, 2.0, 3.0]},
        schema={**TICKS.polars()},
    )
    store.write(batch("made.ticks", stamped(frame), schema=TICKS))
    new = frame.with_columns(price=pl.col("price") + 1.0)
    with pytest.MonkeyPatch.context() as patch:
        dies(patch, "_take_out")
        with pytest.raises(Died):
            store.write(batch("made.ticks", stamped(new), 2, schema=TICKS))
    assert other.scan("made.ticks").collect().sort(TICKS.key).equals(new.sort(TICKS.key))
    assert other.count("made.ticks") == 5
    assert other.count("made.ticks", Filter(since=datetime(1970, 1, 1, 0, 0, 0, 1, tzinfo=UTC))) == 2
    assert other.watermarks("made.ticks") == {"A": datetime(1970, 1, 1, 0, 0, 0, 1002, tzinfo=UTC)}
    assert other.write(batch("made.ticks", stamped(new), 2, schema=TICKS)) == Written(unchanged=5)


@pytest.mark.parametrize(
    ("subjects", "rows", "every"), [(1, 200, 1), (150, 2, 1), (2, 900, 20)], ids=["a run", "a session", "with gaps"]
)
@pytest.mark.slow
def test_what_is_there_is_found_in_runs_in_sessions_and_across_gaps(store, subjects, rows, every):
    store.ensure(DATASET, BARS)
    names = [f"S{number}" for number in range(subjects)]
    store.write(batch(DATASET, bars(names, rows=rows), mode=Mode.APPEND))
    again = pl.concat([bars(names, rows=rows).gather_every(every), bars(names, first=rows + 5, rows=1)])
    moved = pl.col("volume") % 2 == 0
    again = again.with_columns(close=pl.when(moved).then(-1.0).otherwise("close"))
    again = again.sample(fraction=1.0, shuffle=True, seed=2)
    old = again.join(bars(names, rows=rows), on=KEY, how="semi")
    updated = old.filter(moved).height
    wanted = Written(subjects, updated, old.height - updated, deleted=subjects * rows - old.height)
    assert store.replace(DATASET, BARS, again, Filter()) == wanted
    assert store.scan(DATASET).collect().sort(KEY).equals(again.select(BARS.names).sort(KEY))


# reading meanwhile


def corrected_while_read(store: MongoStore, monkeypatch: pytest.MonkeyPatch) -> pl.DataFrame:
    """Read rows a few at a time, and have them all corrected after the first of them."""
    monkeypatch.setattr(mongodb_series, "_ROWS_AT_ONCE", 7)
    store.ensure(DATASET, BARS)
    store.write(batch(DATASET, bars(rows=20), 1))
    series = store._series_of(DATASET, store._table(DATASET))
    found: list[dict] = []
    for part in series.found([{}], documents.projection(BARS.names, BARS)):
        if not found:
            store.write(batch(DATASET, bars(rows=20, add=1.0), 2))
        found += part
    return documents.from_documents(found, BARS.names, BARS)


def test_rows_are_read_as_they_were_at_one_instant_where_the_server_is_a_replica_set(store, database, monkeypatch):
    if "setName" not in database.client.admin.command("hello"):
        pytest.skip("the server is none")
    found = corrected_while_read(store, monkeypatch)
    assert found.sort(KEY).equals(bars(rows=20).select(BARS.names).sort(KEY))


@pytest.mark.slow
def test_no_row_is_read_twice_where_the_server_has_no_instants(monkeypatch):
    with private_mongodb(standalone=True) as server:
        store = open_url(f"{server}market?timeSeries=true", "series")
        found = corrected_while_read(store, monkeypatch)
        assert found.select(KEY).is_unique().all()
        assert rows_of(store)["close"].to_list() == bars(rows=20, add=1.0).sort(KEY)["close"].to_list()
        store.close()


@pytest.mark.slow
@pytest.mark.parametrize("code", [43, 239])
def test_reading_goes_on_where_it_was_when_the_server_forgets_the_instant(monkeypatch, code):
    monkeypatch.setattr(mongodb_series, "_ROWS_AT_ONCE", 7)
    with mortal_mongodb("--enable-test-commands") as server, pymongo.MongoClient(server.url) as client:
        store = open_url(f"{server.url}market?timeSeries=true", "series")
        store.ensure(DATASET, BARS)
        store.write(batch(DATASET, bars(rows=20)))
        fail = {"failCommands": ["getMore"], "errorCode": code}
        client.admin.command("configureFailPoint", "failCommand", mode={"times": 2}, data=fail)
        assert rows_of(store).equals(bars(rows=20).sort(KEY))
        client.admin.command(
            "configureFailPoint", "failCommand", mode={"times": 1}, data=fail | {"failCommands": ["aggregate"]}
        )
        assert store.count(DATASET) == 40
        client.admin.command("configureFailPoint", "failCommand", mode="alwaysOn", data=fail)
        with pytest.raises(StoreError, match=r"reading made\.bars"):
            rows_of(store)
        client.admin.command("configureFailPoint", "failCommand", mode="off")
        store.close()


# what a real server refuses


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("insert", {"insert": "c", "autocommit": False}),
        ("update", {"updates": [{"q": {}, "u": {"$set": {"x": 1}}, "upsert": True, "multi": True}]}),
        ("update", {"updates": [{"q": {}, "u": {"$set": {"x": 1}}, "multi": True}]}),
        ("findAndModify", {"query": {}}),
        ("delete", {"deletes": [{"q": {}, "limit": 1}]}),
        ("delete", {"deletes": [{"q": {}, "limit": 0}], "autocommit": False}),
        ("createIndexes", {"indexes": [{"key": {"x": 1}, "unique": True}]}),
        ("collMod", {"validator": {}}),
        ("create", {"create": "c"}),
        ("aggregate", {"pipeline": [{"$merge": {"into": "c"}}]}),
    ],
)
def test_what_a_real_server_refuses_is_known(name, command):
    assert timeseries_rules.breach(name, command)


def test_what_a_real_server_takes_is_not_held_against_anybody(store, database, tmp_path):
    store.ensure(DATASET, BARS)
    store.write(batch(DATASET, bars(rows=3)))
    told = tmp_path / "refused by MongoDB"
    assert not told.exists()
    with suppress(OperationFailure):
        database[DATASET].update_one({"symbol": "A"}, {"$set": {"close": 1.0}}, upsert=True)
    assert "update of made.bars: it is an upsert" in told.read_text()
    told.unlink()
