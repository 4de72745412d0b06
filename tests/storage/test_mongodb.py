"""What only MongoDB has: documents that people read, its numbers and dates, a server with and without transactions,
passwords, collections of other people. The rest is in conformance. The server is a stand-in (see private_mongodb.py)
unless MARKETSYNC_TEST_MONGODB names a real one."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta

import bson
import polars as pl
import pymongo
import pytest
from bson import Decimal128
from hypothesis import given
from hypothesis import strategies as st
from private_mongodb import private_mongodb
from pymongo.database import Database
from stored_frames import BARS, START, bars, batch, stamped

from marketsync.errors import AdoptionRefused, ConfigurationError, QueryRefused, SchemaConflict, StoreError
from marketsync.schema import Column, ColumnType, Schema
from storage import documents
from storage.adoption import Wish
from storage.mongodb import MongoStore, open_url
from storage.protocol import Filter, Mode, Written

DATASET = "made.bars"
EVENTS = Schema(
    (
        Column("number", ColumnType.I64),
        Column("symbol", ColumnType.STR),
        Column("at", ColumnType.DATETIME),
        Column("price", ColumnType.F64),
    ),
    key=("number",),
    time="at",
    subject="symbol",
)


@pytest.fixture
def store(mongodb: str) -> Iterator[MongoStore]:
    opened = open_url(mongodb, "mongo")
    yield opened
    opened.close()


@pytest.fixture
def database(mongodb: str) -> Iterator[Database]:
    """The same database as another client has it."""
    with pymongo.MongoClient(mongodb, tz_aware=True) as client:
        yield client.get_database()


# documents


def test_a_row_is_a_document_that_a_person_would_have_made(store, database):
    store.ensure(DATASET, BARS)
    store.write(batch(DATASET, bars().with_columns(volume=None).cast({"volume": pl.Int64})))
    (found,) = database[DATASET].find({"symbol": "NA", "ts": datetime(2001, 1, 30, 10, 30, tzinfo=UTC)})
    assert found == {
        "_id": "NA 2001-01-30T10:30:00.000000",
        "symbol": "NA",
        "ts": datetime(2001, 1, 30, 10, 30, tzinfo=UTC),
        "close": 100.1,
        "_segment": "s1",
        "_ingested_at": datetime(2026, 1, 2, 3, 4, 5, 678000, tzinfo=UTC),
        "_ingested_at__ns": 901_000,
    }
    day = {"_id": {"$gte": "NA 2001-01-31", "$lt": "NA 2001-02-01"}}
    assert database[DATASET].count_documents(day) == 24
    assert database[DATASET].count_documents({"volume": None}) == 96


def test_the_documents_of_a_batch_are_byte_for_byte_those_of_each_row_alone():
    """What is the same in each row of a batch is made once; that must not be seen, nor an `_id` that is there."""
    one, two = bars(rows=3), bars(first=3, rows=2, segment="s2")
    late = two.with_columns(pl.col("_ingested_at").dt.truncate("1s"), close=None).cast({"close": pl.Float64})
    for frame in (one, pl.concat([one, two]), late, pl.concat([one, late]), one.head(0)):
        alone = [documents.to_documents(row, BARS)[0] for row in frame.iter_slices(1)]
        for put in (frame, documents.identified(frame, BARS)):
            assert list(map(bson.encode, documents.to_documents(put, BARS))) == list(map(bson.encode, alone))


def test_a_span_of_one_subject_is_a_range_of_ids():
    span = Filter(["A B"], START, START + timedelta(days=1))
    low, high = "A!PB 2001-01-30T09:30:00.000000", "A!PB 2001-01-31T09:30:00.000000"
    assert documents.queries(DATASET, span, BARS) == [{"_id": {"$gte": low, "$lt": high}}]
    assert documents.queries(DATASET, Filter(["A"]), BARS) == [{"_id": {"$gte": "A ", "$lt": "A!"}}]


KEYS = st.tuples(
    st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("\0\x01 !\"'#"), max_size=5),
    st.datetimes(timezones=st.just(UTC)),
    st.integers(-(2**63), 2**63 - 1) | st.integers(-3, 3),
    st.integers(0, 2**64 - 1),
    st.booleans(),
    st.dates(),
    st.text(st.sampled_from("\0 !a"), max_size=2),
)


@given(st.lists(KEYS, min_size=2, max_size=20, unique=True))
def test_ids_differ_as_keys_do_and_sort_as_they_do(keys):
    types = ("STR", "DATETIME", "I64", "U64", "BOOL", "DATE", "STR")
    columns = tuple(Column(f"c{place}", ColumnType[type_]) for place, type_ in enumerate(types))
    schema = Schema(columns, tuple(column.name for column in columns), "c1", "c0")
    frame = pl.DataFrame(keys, schema=schema.polars(), orient="row")
    ids = documents.ids(frame, schema).to_list()
    assert len(set(ids)) == len(keys)
    in_order = sorted(keys, key=lambda key: tuple(each.encode() if isinstance(each, str) else each for each in key))
    assert sorted(zip((each.encode() for each in ids), keys, strict=True)) == [
        (ids[keys.index(key)].encode(), key) for key in in_order
    ]


def test_a_time_is_a_date_to_the_millisecond_and_the_rest_is_beside_it(store, database):
    store.ensure("made.events", EVENTS)
    times = [START + timedelta(microseconds=each) for each in (0, 1, 999, 1000, 1001, 2000)]
    frame = stamped(pl.DataFrame({"number": range(6), "symbol": "A", "at": times, "price": 1.0}, EVENTS.polars()))
    store.write(batch("made.events", frame, schema=EVENTS))
    assert database["made.events"].count_documents({"at": START}) == 3
    beside = [each.get("at__ns") for each in database["made.events"].find().sort("_id")]
    assert beside == [None, 1_000, 999_000, None, 1_000, None]
    for since in times:
        for until in (*times, START + timedelta(microseconds=1500)):
            wanted = [at for at in times if since <= at < until]
            for subjects in (None, ["A"], ["A", "B"]):
                span = Filter(subjects, since, until)
                assert store.count("made.events", span) == len(wanted), span
                assert store.scan("made.events", span).collect()["at"].sort().to_list() == wanted
    assert store.watermarks("made.events") == {"A": times[-1]}


def test_the_newest_time_is_told_to_the_microsecond_where_the_ids_do_not_tell_it(store):
    store.ensure("made.events", EVENTS)
    assert store.watermarks("made.events") == {}
    times = [START, START + timedelta(microseconds=7), START + timedelta(microseconds=3), None]
    frame = pl.DataFrame(
        {"number": [1, 2, 3, 4], "symbol": ["A", "A", "B", None], "at": times, "price": 1.0}, EVENTS.polars()
    )
    store.write(batch("made.events", stamped(frame), schema=EVENTS))
    assert store.watermarks("made.events") == {"A": times[1], "B": times[2]}


def test_people_find_rows_by_subject_and_time_through_an_index_where_the_key_has_neither(store, database):
    store.ensure("made.events", EVENTS)
    indexes = [list(each["key"]) for each in database["made.events"].list_indexes()]
    assert indexes == [["_id"], ["symbol", "at"]]


def test_a_number_beyond_64_bits_with_a_sign_is_a_decimal_that_compares_as_a_number(store, database):
    schema = Schema((Column("code", ColumnType.STR), Column("n", ColumnType.U64)), ("code",))
    store.ensure("made.numbers", schema)
    numbers = [0, 2**63 - 1, 2**63, 2**64 - 1, None]
    frame = pl.DataFrame({"code": list("abcde"), "n": numbers}, schema.polars())
    store.write(batch("made.numbers", stamped(frame), schema=schema))
    assert database["made.numbers"].find_one({"_id": "d"})["n"] == Decimal128(str(2**64 - 1))
    assert database["made.numbers"].count_documents({"n": {"$gte": 2**63 - 1}}) == 3
    assert store.scan("made.numbers").collect().sort("code").equals(frame)


def test_numbers_of_several_types_are_adopted_where_each_stays_the_number_that_it_was(store, database):
    exact, beyond = 9007199254740992, 9007199254740993
    long = Decimal128("123456789.123456789012345")
    cases = [
        ([beyond, 1.5], ColumnType.F64, str(beyond)),
        ([Decimal128("0.1"), long], ColumnType.F64, str(long)),
        ([exact, 1.5, Decimal128("0.1"), Decimal128("NaN")], ColumnType.F64, [exact, 1.5, 0.1, math.nan]),
        ([beyond, 12.0, Decimal128("7.0")], ColumnType.I64, [beyond, 12, 7]),
        ([Decimal128(str(2**64 - 1)), 1], ColumnType.U64, [2**64 - 1, 1]),
    ]
    for number, (values, type_, kept) in enumerate(cases):
        name = f"made.t{number}"
        schema = Schema((Column("k", ColumnType.I64), Column("v", type_)), ("k",))
        database[name].insert_many([{"k": k, "v": v} for k, v in enumerate(values)])
        if isinstance(kept, str):
            with pytest.raises(AdoptionRefused, match=f"in 1 row, such as {re.escape(kept)}"):
                store.adopt(name, schema, Wish(segment="s", at=START))
        else:
            store.adopt(name, schema, Wish(segment="s", at=START))
            assert store.scan(name).collect().sort("k")["v"].equals(pl.Series(kept, dtype=schema.polars()["v"]))


def test_what_another_client_wrote_is_the_same_value_or_it_is_told(store, database):
    store.ensure(DATASET, BARS)
    store.write(batch(DATASET, bars(rows=2)))
    place = {"_id": "NA 2001-01-30T09:30:00.000000"}
    database[DATASET].update_one(place, {"$set": {"volume": 7.0, "close": 3, "mine": "x"}})  # as a shell writes it
    found = store.scan(DATASET, Filter(["NA"])).collect()
    assert (found["volume"][0], found["close"][0]) == (7, 3.0)
    for value in (7.5, "7"):
        database[DATASET].update_one(place, {"$set": {"volume": value}})
        with pytest.raises(StoreError, match=rf"'volume'.*'{place['_id']}' holds {value!r}, which is no i64"):
            store.scan(DATASET).collect()


@pytest.mark.parametrize("name", ["$close", "a.b", "_id", "ts__ns", "_ingested_at__ns"])
def test_a_column_that_cannot_be_a_field_is_refused(store, name):
    schema = Schema((*BARS.columns, Column(name, ColumnType.F64)), BARS.key, BARS.time, BARS.subject)
    with pytest.raises(SchemaConflict, match=re.escape(f"{name!r}")):
        store.ensure(DATASET, schema)


# whose collection it is


def test_a_collection_that_somebody_else_filled_is_left_alone(store, database):
    database[DATASET].insert_one({"symbol": "A"})
    for act in (lambda: store.ensure(DATASET, BARS), lambda: store.marker(DATASET)):
        with pytest.raises(StoreError, match=r"was not made by MarketSync.*rename it"):
            act()
    assert store.datasets() == []


def test_an_empty_collection_is_taken_and_one_that_cannot_hold_rows_by_their_id_is_not(store, database):
    database.create_collection(DATASET)
    assert store.marker(DATASET) is None
    assert store.ensure(DATASET, BARS) == store.marker(DATASET)
    database.create_collection("made.capped", capped=True, size=100_000)
    database.create_collection("made.view", viewOn=DATASET, pipeline=[])
    database.create_collection("made.loose", collation={"locale": "en", "strength": 2})
    # secantusdb lists it as an ordinary collection with that option; MongoDB gives it a type of its own
    database.create_collection("made.series", timeseries={"timeField": "ts", "metaField": "symbol"})
    for name in ("made.capped", "made.view", "made.loose", "made.series"):
        with pytest.raises(StoreError, match="was not made by MarketSync"):
            store.ensure(name, BARS)


def test_rows_that_were_restored_into_a_new_collection_are_not_believed(store, database):
    store.ensure(DATASET, BARS)
    store.write(batch(DATASET, bars(), 3))
    rows = list(database[DATASET].find())
    database[DATASET].drop()
    database[DATASET].insert_many(rows)
    with pytest.raises(StoreError, match="was restored from elsewhere"):
        store.committed(DATASET, "lane")
    assert store.datasets() == []


def test_maintenance_forgets_collections_that_were_dropped_and_no_other(store, database):
    for name in (DATASET, "made.dropped"):
        store.ensure(name, BARS)
        store.write(batch(name, bars(rows=2), 5))
    database["made.dropped"].drop()
    assert "forgot 1 collections" in store.maintain(DATASET)
    assert [each["dataset"] for each in database["_marketsync"].find()] == [DATASET]
    assert database["_marketsync_lanes"].count_documents({}) == 1
    assert store.committed(DATASET, "lane") == 5


# writing


def test_a_batch_that_was_cut_short_is_put_in_again_without_a_row_twice(store, database):
    store.ensure(DATASET, BARS)
    frame = bars(segment="whole")
    database[DATASET].insert_many(documents.to_documents(frame.sample(40, seed=1), BARS))
    assert store.write(batch(DATASET, frame, mode=Mode.APPEND)) == Written(inserted=56, unchanged=40)
    assert store.scan(DATASET, Filter(system=True)).collect().sort("symbol", "ts").equals(frame.sort("symbol", "ts"))


@pytest.mark.parametrize(
    ("subjects", "rows", "every"),
    [
        pytest.param(1, 200, 1, id="a run"),
        pytest.param(150, 2, 1, id="a session"),
        pytest.param(2, 900, 20, id="with gaps", marks=pytest.mark.slow),
    ],
)
def test_what_is_there_is_found_in_runs_in_sessions_and_across_gaps(store, subjects, rows, every):
    store.ensure(DATASET, BARS)
    names = [f"S{number}" for number in range(subjects)]
    store.write(batch(DATASET, bars(names, rows=rows), mode=Mode.APPEND))
    again = pl.concat([bars(names, rows=rows).gather_every(every), bars(names, first=rows + 5, rows=1)])
    moved = pl.col("volume") % 2 == 0
    again = again.with_columns(close=pl.when(moved).then(-1.0).otherwise("close")).sample(
        fraction=1.0, shuffle=True, seed=2
    )
    old = again.join(bars(names, rows=rows), on=["symbol", "ts"], how="semi")
    updated = old.filter(moved).height
    gone = subjects * rows - old.height
    assert store.replace(DATASET, BARS, again, Filter()) == Written(
        subjects, updated, old.height - updated, deleted=gone
    )


@pytest.mark.slow
def test_many_subjects_are_asked_for_in_groups_and_none_twice(store):
    store.ensure(DATASET, BARS)
    names = [f"S{number}" for number in range(450)]
    store.write(batch(DATASET, bars(names, rows=1), mode=Mode.APPEND))
    asked = Filter([*random.Random(4).sample(names, 430), "absent"])
    assert store.count(DATASET, asked) == store.scan(DATASET, asked).collect()["symbol"].n_unique() == 430
    assert store.scan(DATASET, asked).select(pl.len()).collect().item() == 430
    assert store.scan(DATASET, asked).head(7).collect().height == 7
    assert store.delete(DATASET, asked) == 430


def refuse(database: Database, rule: dict) -> None:
    database.command("collMod", DATASET, validator=rule)


def replacement_that_the_server_refuses(url: str) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Return the rows before and after a replacement of which the server takes some rows and refuses one."""
    store = open_url(url, "mongo")
    with pymongo.MongoClient(url) as client:
        database = client.get_database()
        store.ensure(DATASET, BARS)
        store.write(batch(DATASET, bars(("A",), rows=10)))
        before = store.scan(DATASET).collect().sort("ts")
        refuse(database, {"close": {"$lt": 1000}})
        frame = bars(("A",), first=5, rows=10, add=1.0)
        bad = frame.with_columns(close=pl.when(pl.col("volume") == 7).then(5000.0).otherwise("close"))
        with pytest.raises(StoreError, match=r"replacing rows of made\.bars"):
            store.replace(DATASET, BARS, bad, Filter(["A"]))
        after = store.scan(DATASET).collect().sort("ts")
        refuse(database, {})
    written = store.replace(DATASET, BARS, frame, Filter(["A"]))
    assert (written.inserted + written.updated + written.unchanged, written.deleted) == (10, 5)
    assert store.scan(DATASET).collect().sort("ts").equals(frame.select(BARS.names))
    store.close()
    return before, after


def test_a_replacement_is_whole_or_nothing_where_the_server_has_transactions(mongodb):
    before, after = replacement_that_the_server_refuses(mongodb)
    assert after.equals(before)


def test_a_replacement_takes_no_row_away_before_the_new_ones_are_in_where_it_has_none():
    with private_mongodb(standalone=True) as server:
        before, after = replacement_that_the_server_refuses(f"{server}market")
    assert before.join(after, on=["symbol", "ts"], how="anti").is_empty()
    assert after.height == 15


# questions


def test_a_question_about_a_table_that_is_not_there_is_told_which_are(store):
    store.ensure(DATASET, BARS)
    with pytest.raises(QueryRefused, match=r"nothing.*Tables here: made\.bars"):
        store.query("SELECT * FROM made.nothing")


# the server


def test_a_server_that_is_not_there_is_named_with_what_to_look_at_and_without_the_password():
    store = open_url("mongodb://me:pa55word@127.0.0.1:1/market?serverSelectionTimeoutMS=300", "mongo")
    assert store.url == "mongodb://127.0.0.1:1/market"
    with pytest.raises(StoreError, match=re.escape("MongoDB mongodb://127.0.0.1:1/market, making")) as refused:
        store.ensure(DATASET, BARS)
    assert "is the server up" in str(refused.value)
    assert "pa55word" not in str(refused.value)
    store.close()


def test_a_server_that_ends_is_told_and_so_is_a_store_that_was_closed():
    with private_mongodb() as server:
        store = open_url(f"{server}market?serverSelectionTimeoutMS=300", "mongo")
        store.ensure(DATASET, BARS)
    with pytest.raises(StoreError, match=r"writing to made\.bars.*is the server up"):
        store.write(batch(DATASET, bars()))
    store.close()
    with pytest.raises(StoreError, match="was closed"):
        store.datasets()


@pytest.mark.slow
def test_a_password_opens_the_database_and_a_wrong_one_is_told_without_it():
    with private_mongodb(password="s3cret/word") as server:
        url = server.replace("//", "//tester:s3cret%2Fword@") + "market?authSource=admin"
        store = open_url(url, "mongo")
        assert store.ensure(DATASET, BARS)
        assert "s3cret" not in store.info(DATASET).location
        store.close()
        wrong = open_url(url.replace("s3cret", "wr0ng"), "mongo")
        with pytest.raises(StoreError, match="are user and password right") as refused:
            wrong.datasets()
        assert "wr0ng" not in str(refused.value)
        wrong.close()


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("mongodb://host", "names no database: write mongodb://"),
        ("mongodb+srv://me:pa55word@host/?tls=true", r"names no database: write mongodb\+srv://"),
        ("mongodb://me:pa55word@host/db?w=0", "w=0"),
        ("mongodb://me:pa55word@host:port/db", "is no URL of MongoDB"),
        ("mongodb://me:pa55word@host/db?tlss=true", "tlss"),
        ("mongodb://me:pa55:word@host/db", "is no URL of MongoDB"),
    ],
)
def test_a_url_that_cannot_be_meant_is_refused_when_it_is_opened(url, words):
    with pytest.raises(ConfigurationError, match=words) as refused:
        open_url(url, "mongo")
    assert "pa55" not in str(refused.value)


def test_waiting_and_durability_are_ours_unless_the_url_says_otherwise():
    options = pymongo.uri_parser.parse_uri(open_url("mongodb://host/db", "mongo")._address)["options"]
    assert (options["serverSelectionTimeoutMS"], options["w"], options["journal"]) == (10, "majority", True)
    given = open_url("mongodb://host/db?W=2&serverselectiontimeoutms=5", "mongo")._address
    options = pymongo.uri_parser.parse_uri(given)["options"]
    assert (options["serverSelectionTimeoutMS"], options["w"]) == (0.005, 2)


def test_a_table_lives_in_the_database_that_the_url_names(store, mongodb):
    store.ensure(DATASET, BARS)
    other = open_url(mongodb.replace("/test_", "/other_"), "other")
    assert other.datasets() == []
    other.close()


def test_a_day_of_a_table_of_days_is_the_same_day_everywhere(store, database):
    schema = Schema((Column("day", ColumnType.DATE), Column("open", ColumnType.BOOL)), ("day",), "day")
    store.ensure("made.days", schema)
    days = pl.DataFrame({"day": [date(1969, 12, 31), date(2001, 1, 1)], "open": [False, True]})
    store.write(batch("made.days", stamped(days), schema=schema))
    assert database["made.days"].find_one({"day": datetime(1969, 12, 31, tzinfo=UTC)})["_id"] == "1969-12-31"
    assert store.scan("made.days").collect().sort("day").equals(days)
