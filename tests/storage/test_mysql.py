"""What only MySQL and MariaDB have: a server, its warnings, its deadlocks, its names with a dot, its TLS. The rest is
in conformance."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, date, datetime
from decimal import Decimal

import polars as pl
import pytest
from private_mariadb import asked, mortal_mariadb
from stored_frames import BARS, HOSTILE_TEXT, WIDE, bars, batch, differences, hostile, stamped

from marketsync.errors import (
    AdoptionRefused,
    ConfigurationError,
    ForeignTable,
    QueryRefused,
    SchemaConflict,
    SchemaError,
    StoreError,
)
from marketsync.schema import Column, ColumnType, Schema
from storage.adoption import Wish
from storage.mysql import MySQLStore, longest_key, open_url
from storage.mysql_rows import named
from storage.protocol import Filter, Mode, Written

DATASET = "made.bars"
WISH = Wish("adopted", datetime(2026, 11, 22, tzinfo=UTC), zone="UTC")
COLUMNS = "symbol VARCHAR(20) NOT NULL, ts DATETIME(6) NOT NULL, close DOUBLE"


@pytest.fixture
def store(mysql: str) -> Iterator[MySQLStore]:
    opened = open_url(mysql, "my")
    yield opened
    opened.close()


def connections_of(store: MySQLStore, mysql: str) -> list[int]:
    """The server's numbers of the connections to the store's database, that of the question left out."""
    database = mysql.rpartition("/")[2]
    found = asked(
        mysql, f"SELECT id FROM information_schema.processlist WHERE db = '{database}' AND id <> CONNECTION_ID()"
    )
    return [number for (number,) in found]


@contextmanager
def another_client(mysql: str) -> Iterator[Callable[[str], object]]:
    """A client in a transaction, which is rolled back."""
    import pymysql

    place = open_url(mysql, "other")._place
    with pymysql.connect(**place, charset="utf8mb4") as connection, connection.cursor() as cursor:
        yield lambda sql: cursor.execute(sql, None)
        connection.rollback()


# tables


def test_a_table_is_what_a_person_would_have_made(store, mysql):
    store.ensure(DATASET, BARS)
    assert asked(mysql, "SHOW TABLES LIKE 'made%'") == [("made.bars",)]
    columns = asked(
        mysql,
        "SELECT column_name, column_type, is_nullable, column_key FROM information_schema.columns "
        "WHERE table_schema = DATABASE() AND table_name = 'made.bars' ORDER BY ordinal_position",
    )
    assert columns == [
        ("symbol", "varchar(255)", "NO", "PRI"),
        ("ts", "datetime(6)", "NO", "PRI"),
        ("close", "double", "YES", ""),
        ("volume", "bigint(20)", "YES", ""),
        ("_segment", "varchar(255)", "NO", ""),
        ("_ingested_at", "datetime(6)", "NO", ""),
    ]


def test_a_user_who_has_rights_in_one_database_only_can_do_everything(mysql):
    rest, _, database = mysql.rpartition("/")
    place = rest.rpartition("@")[2]
    user = f"u{database[-12:]}"
    rights = "SELECT, INSERT, UPDATE, DELETE, CREATE, ALTER, CREATE TEMPORARY TABLES"
    asked(mysql, f"CREATE USER '{user}'@'127.0.0.1' IDENTIFIED BY 'pw'")
    asked(mysql, f"GRANT {rights} ON `{database}`.* TO '{user}'@'127.0.0.1'")
    store = open_url(f"mysql://{user}:pw@{place}/{database}", "my")
    try:
        store.ensure(DATASET, BARS)
        store.write(batch(DATASET, bars(), mode=Mode.APPEND))
        assert store.write(batch(DATASET, bars(first=24), 2)) == Written(inserted=48, unchanged=48)
        assert store.replace(DATASET, BARS, bars(("000001",)), Filter(["000001"])) == Written(unchanged=48, deleted=24)
        wider = Schema((*BARS.columns, Column("note", ColumnType.STR)), BARS.key, "ts", "symbol", BARS.period)
        store.ensure(DATASET, wider)
        assert store.query(f"SELECT COUNT(*) AS n FROM {DATASET}").item() == 120
        with pytest.raises(QueryRefused, match=r"mysql\.user|denied"):
            store.query("SELECT * FROM mysql.user")
        asked(mysql, f"CREATE TABLE prices ({COLUMNS}, volume BIGINT, PRIMARY KEY (symbol, ts))")
        dry = store.adopt("made.more", BARS, replace(WISH, table="prices", dry=True))
        assert "this user may not see whether there is one: SHOW TRIGGERS LIKE 'prices'" in dry.notes[-1]
        with pytest.raises(StoreError, match=f"GRANT DROP ON `{database}`.* TO '{user}'@'127.0.0.1'"):
            store.adopt("made.more", BARS, replace(WISH, table="prices"))
    finally:
        store.close()
        asked(mysql, f"DROP USER '{user}'@'127.0.0.1'")


def test_a_table_that_somebody_else_made_is_left_alone(store, mysql):
    asked(mysql, "CREATE TABLE `made.bars` (symbol text)")
    for act in (lambda: store.ensure(DATASET, BARS), lambda: store.marker(DATASET)):
        with pytest.raises(StoreError, match=r"was not made by MarketSync; `marketsync adopt .*; or rename it"):
            act()
    assert store.datasets() == []


def test_a_table_whose_schema_was_thrown_away_is_told(store, mysql):
    store.ensure(DATASET, BARS)
    asked(mysql, "DELETE FROM _marketsync_schemas")
    with pytest.raises(StoreError, match=r"put that table's rows back from a backup, or drop `made\.bars`"):
        store.ensure(DATASET, BARS)


@pytest.mark.parametrize("written", [False, True])
def test_a_change_of_shape_that_broke_off_is_as_if_it_had_not_begun(store, mysql, monkeypatch, written):
    store.ensure(DATASET, BARS)
    store.write(batch(DATASET, bars()))
    wider = Schema((*BARS.columns, Column("note", ColumnType.STR)), BARS.key, "ts", "symbol", BARS.period)
    note = store._comment

    def broken(*arguments):
        if written:
            note(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(store, "_comment", broken)
        with pytest.raises(KeyboardInterrupt):
            store.ensure(DATASET, wider)
    assert store.schema(DATASET) == BARS
    assert store.write(batch(DATASET, bars(first=24), 2)) == Written(inserted=48, unchanged=48)
    store.ensure(DATASET, wider)
    assert store.scan(DATASET).collect()["note"].null_count() == 144


def test_a_table_whose_making_broke_off_is_made_by_the_next_one(store, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(store, "_system", lambda: ["no column at all"])
        with pytest.raises(StoreError, match=r"making the table of made\.bars"):
            store.ensure(DATASET, BARS)
    assert store.datasets() == []
    assert store.ensure(DATASET, BARS) == store.marker(DATASET)
    assert store.write(batch(DATASET, bars())) == Written(inserted=96)


def test_a_lock_that_nobody_gives_back_is_told_with_its_holder(store, mysql, monkeypatch):
    monkeypatch.setattr("storage.mysql._LOCK_SECONDS", 0)
    with store._alone(store._connection().cursor()):
        other = open_url(mysql, "other")
        with pytest.raises(StoreError, match=rf"connection {store._open.thread_id()} .*has been making a table"):
            other.ensure(DATASET, BARS)
        other.close()


@pytest.mark.parametrize(
    ("names", "words"),
    [(["c" * 65], "longer than 64 characters"), (["\U0001f4c8"], "has a character that names .* cannot have")],
)
def test_a_name_that_the_engine_would_not_take_is_refused(store, names, words):
    more = tuple(Column(name, ColumnType.F64) for name in names)
    with pytest.raises(SchemaError, match=words):
        store.ensure(DATASET, Schema((*BARS.columns, *more), BARS.key, BARS.time, BARS.subject))
    with pytest.raises(SchemaError, match="longer than 64"):
        store.ensure(f"made.{'d' * 60}", BARS)


def test_reserved_words_quotes_and_percent_signs_are_names_like_others(store):
    names = ["select", "User", 'odd"one', "back`tick", "it's", "per%cent", "%s", "back\\slash"]
    schema = Schema(tuple(Column(name, ColumnType.I64) for name in names), ("select",))
    store.ensure("made.odd", schema)
    frame = pl.DataFrame({name: [number] for number, name in enumerate(names)})
    store.write(batch("made.odd", stamped(frame), schema=schema))
    changed = frame.with_columns(pl.lit(99).cast(pl.Int64).alias("%s"))
    assert store.write(batch("made.odd", stamped(changed), 2, schema=schema)) == Written(updated=1)
    assert store.scan("made.odd").collect().equals(changed)


def test_a_copy_of_a_table_is_none_of_ours_and_one_that_was_set_aside_comes_back(store, mysql):
    marker = store.ensure(DATASET, BARS)
    store.write(batch(DATASET, bars(), 5))
    asked(mysql, "CREATE TABLE `made.copy` LIKE `made.bars`")
    assert store.datasets() == [DATASET]
    for act in (lambda: store.ensure("made.copy", BARS), lambda: store.write(batch("made.copy", bars()))):
        with pytest.raises(ForeignTable, match=r"has the mark of made\.bars, of which it is a copy.*marketsync adopt"):
            act()
    assert store.adopt("made.copy", BARS, WISH).marker != marker
    assert store.write(batch("made.copy", bars())) == Written(inserted=96)

    asked(mysql, "RENAME TABLE `made.bars` TO `made.aside`")
    assert store.marker(DATASET) is None
    assert store.ensure(DATASET, BARS) != marker
    asked(mysql, "DROP TABLE `made.bars`")
    asked(mysql, "RENAME TABLE `made.aside` TO `made.bars`")
    assert store.ensure(DATASET, BARS) == marker
    assert (store.committed(DATASET, "lane"), store.count(DATASET)) == (5, 96)


@pytest.mark.slow
def test_a_server_that_takes_capitals_for_small_letters_in_names_keeps_the_names_of_datasets():
    with mortal_mariadb("--lower-case-table-names=1") as server:
        asked(server.url, "CREATE DATABASE made")
        url = f"{server.url}/made"
        store = open_url(url, "my")
        assert store.ensure("Made.Bars", BARS) == store.ensure("Made.Bars", BARS)
        assert store.write(batch("Made.Bars", bars())) == Written(inserted=96)
        with pytest.raises(ForeignTable, match=r"has the mark of Made\.Bars"):
            store.ensure("made.bars", BARS)
        for table in ("Prices", "Made.Own"):
            asked(url, f"CREATE TABLE `{table}` ({COLUMNS}, volume BIGINT, PRIMARY KEY (symbol, ts))")
            store.adopt("Made.Own" if table == "Made.Own" else "Made.More", BARS, replace(WISH, table=table))
        assert store.datasets() == ["Made.Bars", "Made.More", "Made.Own"]
        assert store.write(batch("Made.Own", bars())) == Written(inserted=96)
        assert (store.maintain("Made.Bars"), store.info("Made.Bars").bytes) == ("Made.Bars: analysed", 16384)
        store.close()


# adoption


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (
            "version INT NOT NULL DEFAULT 1, PRIMARY KEY (symbol, ts), UNIQUE one (symbol, version)",
            "'one' over symbol, ver",
        ),
        ("PRIMARY KEY (symbol, ts), UNIQUE begins (symbol(3), ts)", r"'begins' over symbol\(3\), ts would refuse"),
        (
            "day DATE AS (CAST(ts AS DATE)) STORED, PRIMARY KEY (symbol, ts), UNIQUE d (symbol, day)",
            "'d' over symbol, day",
        ),
        ("PRIMARY KEY (symbol(3), ts)", r"'PRIMARY' over symbol\(3\), ts .*DROP INDEX `PRIMARY`"),
        ("PRIMARY KEY (symbol, ts)", "the trigger 'floor' could change the rows .*DROP TRIGGER `floor`"),
    ],
)
def test_a_table_that_would_take_one_row_for_another_or_change_it_is_not_adopted(store, mysql, more, words):
    asked(mysql, f"CREATE TABLE `made.bars` ({COLUMNS}, volume BIGINT, {more})")
    if "trigger" in words:
        asked(
            mysql, "CREATE TRIGGER `floor` BEFORE INSERT ON `made.bars` FOR EACH ROW SET NEW.close = FLOOR(NEW.close)"
        )
    for dry in (True, False):
        with pytest.raises(AdoptionRefused, match=words):
            store.adopt(DATASET, BARS, replace(WISH, dry=dry))


def test_days_that_are_none_are_not_adopted(store, mysql):
    columns = {"d": "DATE", "m": "DATE", "t": "DATETIME", "of_t": "DATETIME", "of_d": "DATE", "text": "VARCHAR(20)"}
    types = (ColumnType.DATE, ColumnType.DATE, ColumnType.DATETIME, ColumnType.DATE, *[ColumnType.DATETIME] * 2)
    shape = (Column("n", ColumnType.I64, nullable=False), *map(Column, columns, types))
    asked(mysql, f"CREATE TABLE `made.days` (n BIGINT, {', '.join(f'{name} {of}' for name, of in columns.items())})")
    values = ["2024-03-00", "2024-00-10", "2024-03-00 09:30:00", "2024-03-00 00:00:00", "2024-03-00", "2024-03-00"]
    with another_client(mysql) as say:
        for said in ("SET sql_mode = ''", f"INSERT INTO `made.days` VALUES {(1, *values)}", "COMMIT"):
            say(said)
    with pytest.raises(AdoptionRefused) as refused:
        store.adopt("made.days", Schema(shape, ("n",)), WISH)
    assert [value in reason for value, reason in zip(values, refused.value.reasons, strict=True)] == [True] * 6


def test_what_a_column_did_by_itself_it_does_no_longer_once_it_is_adopted(store, mysql):
    moving = "DEFAULT CURRENT_TIMESTAMP(6) ON UPDATE CURRENT_TIMESTAMP(6)"
    own = "id INT AUTO_INCREMENT UNIQUE, isin VARCHAR(12) UNIQUE, UNIQUE (ts, close, symbol), _ingested_at DATETIME"
    columns = COLUMNS.replace("ts DATETIME(6) NOT NULL", f"ts DATETIME(6) NOT NULL {moving}")
    asked(mysql, f"CREATE TABLE `made.bars` ({columns}, volume BIGINT DEFAULT 7, {own}, PRIMARY KEY (symbol, ts))")
    store.adopt(DATASET, BARS, WISH)
    store.write(batch(DATASET, bars(rows=2)))
    assert store.write(batch(DATASET, bars(rows=2, add=1.0), 2)) == Written(updated=4)
    found = store.scan(DATASET, Filter(system=True)).collect()
    assert not differences(found, bars(rows=2, add=1.0).select(found.columns), BARS.key)
    older = Schema(BARS.columns[:3], BARS.key, "ts", "symbol", BARS.period)
    store.write(batch(DATASET, bars(("OLD",), rows=1).drop("volume"), 3, schema=older))
    assert store.scan(DATASET, Filter(["OLD"])).collect()["volume"].to_list() == [None]

    numbered = Schema((Column("n", ColumnType.I64, nullable=False), Column("v", ColumnType.F32)), ("n",))
    asked(mysql, "CREATE TABLE `made.numbered` (n BIGINT AUTO_INCREMENT PRIMARY KEY, v DOUBLE)")
    asked(mysql, "INSERT INTO `made.numbered` VALUES (1, 0.25), (2, -3.4028234663852886e38), (3, NULL)")
    store.adopt("made.numbered", numbered, WISH)
    frame = stamped(pl.DataFrame({"n": [0, 9], "v": [0.1, 0.5]}, schema=numbered.polars()))
    for seq, written in enumerate((Written(inserted=2), Written(unchanged=2)), 1):
        assert store.write(batch("made.numbered", frame, seq, schema=numbered)) == written
    assert store.scan("made.numbered").collect()["n"].sort().to_list() == [0, 1, 2, 3, 9]
    for value in ("0.1", "1e300"):
        asked(mysql, "CREATE OR REPLACE TABLE `made.wide` (n BIGINT PRIMARY KEY, v DOUBLE)")
        asked(mysql, f"INSERT INTO `made.wide` VALUES (1, {value})")
        with pytest.raises(
            AdoptionRefused, match=f"cannot become f32: .*not be the same number, in 1 row, such as {value}"
        ):
            store.adopt("made.wide", numbered, WISH)


# keys


def test_rows_that_a_later_index_takes_for_others_are_refused(store, mysql):
    store.ensure(DATASET, BARS)
    frame = bars(("NA",), rows=2)
    asked(mysql, "ALTER TABLE `made.bars` ADD UNIQUE later (close)")
    with pytest.raises(StoreError, match=r"as they were sent, nothing was written: .*index, `later`, by which"):
        store.write(batch(DATASET, frame.with_columns(close=pl.lit(1.0))))
    assert (store.count(DATASET), store.committed(DATASET, "lane")) == (0, 0)
    assert store.write(batch(DATASET, frame)) == Written(inserted=2)
    asked(mysql, "ALTER TABLE `made.bars` DROP PRIMARY KEY")
    with pytest.raises(StoreError, match=r"no unique index over its key any more.*ADD PRIMARY KEY \(`symbol`, `ts`\)"):
        store.write(batch(DATASET, frame, 2))
    assert store.count(DATASET) == 2
    asked(mysql, "ALTER TABLE `made.bars` ADD PRIMARY KEY (symbol, ts)")
    asked(mysql, "CREATE TRIGGER `floor` BEFORE INSERT ON `made.bars` FOR EACH ROW SET NEW.close = FLOOR(NEW.close)")
    for mode in Mode:
        with pytest.raises(StoreError, match=r"trigger that changes rows, `floor`: DROP .* by which rows with other"):
            store.write(batch(DATASET, bars(("B",), first=105, rows=2), 2, mode=mode))
        assert store.write(batch(DATASET, frame, 2, lane=mode)).unchanged == 2
    store.ensure("made.alike", BARS)
    asked(mysql, "ALTER TABLE `made.alike` CONVERT TO CHARACTER SET utf8mb4 COLLATE utf8mb4_general_ci")
    with pytest.raises(StoreError, match=r"takes unlike texts of symbol for one.*nothing was written: ALTER TABLE"):
        store.write(batch("made.alike", bars(("a", "A"), rows=1)))
    assert store.count("made.alike") == 0


def test_a_key_that_is_longer_than_an_index_takes_is_refused_and_not_cut(store):
    store.ensure(DATASET, BARS)
    assert store.write(batch(DATASET, bars(("é" * 255,), rows=1), 1)) == Written(inserted=1)
    with pytest.raises(SchemaError, match=r"'symbol'.*1 values.*255 characters.*take the column out"):
        store.write(batch(DATASET, bars(("é" * 256,), rows=1), 2))
    assert store.committed(DATASET, "lane") == 1


def test_many_texts_in_a_key_share_what_an_index_takes(store):
    texts = tuple(Column(f"t{n}", ColumnType.STR) for n in range(4))
    schema = Schema((*texts, Column("at", ColumnType.DATETIME)), ("t0", "t1", "t2", "t3", "at"), "at")
    longest = longest_key("made.long", schema)
    assert longest == 191
    store.ensure("made.long", schema)
    at = pl.Series("at", [datetime(2001, 1, 1, tzinfo=UTC)], pl.Datetime("us", "UTC"))
    frame = pl.DataFrame({**{column.name: ["é" * longest] for column in texts}, "at": at})
    assert store.write(batch("made.long", stamped(frame), schema=schema)) == Written(inserted=1)
    longer = frame.with_columns(t2=pl.lit("é" * (longest + 1)))
    with pytest.raises(SchemaError, match=r"'t2'.*191 characters"):
        store.write(batch("made.long", stamped(longer), 2, schema=schema))
    many = tuple(Column(f"c{n}", ColumnType.I64) for n in range(17))
    with pytest.raises(SchemaError, match="its key has 17 columns"):
        store.ensure("made.many", Schema(many, tuple(column.name for column in many)))


# values


def test_minus_zero_is_zero_and_equal_to_it(store):
    store.ensure(DATASET, BARS)
    minus, plus = (bars(("X",), rows=1).with_columns(close=pl.lit(zero)) for zero in (-0.0, 0.0))
    store.write(batch(DATASET, minus, 1))
    assert str(store.scan(DATASET).collect()["close"][0]) == "0.0"
    assert store.write(batch(DATASET, plus, 2)) == Written(unchanged=1)
    assert store.write(batch(DATASET, minus, 3)) == Written(unchanged=1)


@pytest.mark.parametrize("mode", list(Mode))
def test_a_value_that_the_engine_would_only_warn_of_is_refused_with_its_words(store, mysql, mode):
    store.ensure(DATASET, BARS)
    asked(mysql, "ALTER TABLE `made.bars` MODIFY volume SMALLINT, MODIFY symbol VARCHAR(3)")
    frame = bars(("NA",), rows=3)
    store.write(batch(DATASET, frame, 1, mode=mode))
    for spoilt in (frame.with_columns(volume=pl.lit(70_000, pl.Int64)), frame.with_columns(symbol=pl.lit("long"))):
        later = spoilt.with_columns(ts=pl.col("ts") + pl.duration(days=9))
        with pytest.raises((SchemaError, StoreError), match=r"[Oo]ut of range|too long|truncated"):
            store.write(batch(DATASET, later, 2, mode=mode))
        assert store.count(DATASET) == 3
        assert store.committed(DATASET, "lane") == 1


def test_rows_that_were_said_to_be_new_and_are_not_are_refused_with_the_first(store):
    store.ensure(DATASET, BARS)
    store.write(batch(DATASET, bars(("NA",), rows=3), 1))
    with pytest.raises(StoreError, match=r"nothing was written: Duplicate entry 'NA-2001-01-30 11:30:00"):
        store.write(batch(DATASET, bars(("NA",), first=2, rows=3), 2, mode=Mode.APPEND))
    assert store.count(DATASET) == 3
    assert store.committed(DATASET, "lane") == 1


@pytest.mark.parametrize("mode", list(Mode))
def test_a_server_that_loads_no_local_files_gets_the_same_rows(mysql, mode):
    (was,) = asked(mysql, "SELECT @@global.local_infile")[0]
    asked(mysql, "SET GLOBAL local_infile = 0")
    try:
        store = open_url(mysql, "my")
        store.ensure("made.wide", WIDE)
        frame = hostile(store.capabilities)
        assert store.write(batch("made.wide", frame, mode=mode, schema=WIDE)) == Written(inserted=len(HOSTILE_TEXT))
        assert not differences(store.scan("made.wide", Filter(system=True)).collect(), frame, WIDE.key)
        assert store.write(batch("made.wide", frame, 2, schema=WIDE)) == Written(unchanged=len(HOSTILE_TEXT))
        store.ensure(DATASET, BARS)
        assert store.write(batch(DATASET, bars(rows=6_000), mode=mode)) == Written(inserted=12_000)
        assert store.count(DATASET) == 12_000
        store.close()
    finally:
        asked(mysql, f"SET GLOBAL local_infile = {was}")


def test_days_and_instants_of_every_year_come_back(store):
    schema = Schema(
        (Column("n", ColumnType.I64), Column("day", ColumnType.DATE), Column("at", ColumnType.DATETIME)), ("n",), "at"
    )
    years = [1, 9, 68, 69, 70, 99, 100, 999, 1000, 1582, 1969, 1970, 2038, 2039, 9999]
    frame = pl.DataFrame(
        {
            "n": range(len(years)),
            "day": [date(year, 12, 31) for year in years],
            "at": [datetime(year, 12, 31, 23, 59, 59, 999999, tzinfo=UTC) for year in years],
        },
        schema=schema.polars(),
    )
    store.ensure("made.years", schema)
    store.write(batch("made.years", stamped(frame), schema=schema))
    assert store.scan("made.years").collect().sort("n").equals(frame)
    assert store.count("made.years", Filter(since=date(69, 1, 1), until=date(101, 1, 1))) == 4


def test_texts_that_are_longer_than_a_packet_are_kept(store):
    schema = Schema((Column("n", ColumnType.I64), Column("text", ColumnType.STR)), ("n",))
    store.ensure("made.long", schema)
    frame = pl.DataFrame({"n": [1, 2, 3], "text": ["é" * 10_000_000, None, ""]})
    store.write(batch("made.long", stamped(frame), schema=schema))
    assert store.scan("made.long").collect().sort("n").equals(frame)
    assert store.write(batch("made.long", stamped(frame), 2, schema=schema)) == Written(unchanged=3)


# questions


def test_names_of_tables_are_found_where_they_are_names():
    tables = ["made.bars", "made.odd-one"]
    for asks, sent in (
        ("SELECT * FROM made.bars", "SELECT * FROM `made.bars`"),
        ("SELECT made.bars.close FROM made . bars", "SELECT `made.bars`.close FROM `made.bars`"),
        ("SELECT 1 FROM `made`.`odd-one`,`made.odd-one`", "SELECT 1 FROM `made.odd-one`,`made.odd-one`"),
        ("SELECT 'made.bars', \"made.bars\"", "SELECT 'made.bars', \"made.bars\""),
        ("SELECT 'it''s \\' made.bars' FROM x", "SELECT 'it''s \\' made.bars' FROM x"),
        ("SELECT 1 -- made.bars\nFROM made.bars", "SELECT 1 -- made.bars\nFROM `made.bars`"),
        ("SELECT 1 # made.bars", "SELECT 1 # made.bars"),
        ("SELECT 1 /* made.bars */", "SELECT 1 /* made.bars */"),
        ("SELECT * FROM other.made.bars, made.barsx", "SELECT * FROM other.made.bars, made.barsx"),
    ):
        assert named(asks, tables) == sent


def test_a_question_may_change_nothing(store, mysql):
    store.ensure(DATASET, BARS)
    store.write(batch(DATASET, bars()))
    asked(
        mysql,
        "CREATE FUNCTION sweep() RETURNS INT DETERMINISTIC BEGIN DELETE FROM `made.bars`; RETURN 1; END",
    )
    for sql in (
        f"DELETE FROM {DATASET}",
        "SELECT sweep()",
        f"SELECT 1--1 FROM {DATASET}; DELETE FROM `made.bars`",
        "SELECT 1 /*! INTO OUTFILE '/tmp/marketsync-test' */",
        "SELECT 1; DROP TABLE `made.bars`",
        "SELECT 1 INTO DUMPFILE '/tmp/marketsync-test'",
        "SELECT 1 # a\nINTO # b\n OUTFILE '/tmp/marketsync-test'",
        "SELECT 1 # '\nINTO OUTFILE '/tmp/marketsync-test' # '",
        "SELECT 1--1 INTO OUTFILE '/tmp/marketsync-test'",
        "SELECT 1 --\nINTO OUTFILE '/tmp/marketsync-test'",
        "EXPLAIN SELECT 1 INTO OUTFILE '/tmp/marketsync-test'",
    ):
        with pytest.raises(QueryRefused):
            store.query(sql)
    assert store.count(DATASET) == 96
    assert (
        store.query(f"SELECT 1--1 AS two, '# INTO OUTFILE' AS text FROM {DATASET} LIMIT 1 # it's; one").row(0)[0] == 2
    )


def test_a_question_about_a_table_that_is_not_there_is_told_which_are(store):
    store.ensure(DATASET, BARS)
    with pytest.raises(QueryRefused, match=r"nothing.*Tables here: made\.bars"):
        store.query("SELECT * FROM made.nothing")


def test_answers_have_the_types_of_the_engine(store):
    store.ensure("made.wide", WIDE)
    store.write(batch("made.wide", hostile(store.capabilities), schema=WIDE))
    found = store.query("SELECT name, day, huge, `double`, at FROM made.wide WHERE name = 'NA'")
    wanted = store.scan("made.wide", Filter(["NA"])).collect().select(found.columns)
    assert found.drop("huge").equals(wanted.drop("huge"))
    assert found["huge"].to_list() == wanted["huge"].to_list()
    sums = store.query(
        "SELECT 12345678901234567890.5 AS a, NULL AS b, 1 AS c, 1 AS c, 18446744073709551615 AS d, x'00ff' AS e, "
        "CAST('01:00:00' AS TIME) AS f, 1e0 AS g"
    )
    assert sums.row(0)[:4] == (Decimal("12345678901234567890.5"), None, 1, 1)
    assert sums.columns[2:4] == ["c", "c_2"]
    assert sums["d"].item() == 2**64 - 1
    assert sums["e"].item() == b"\x00\xff"
    assert sums.schema["f"] == pl.Duration("us")
    nothing = store.query("SELECT day, at, huge FROM made.wide WHERE name = 'no such'")
    assert (nothing.height, nothing.schema["at"]) == (0, pl.Datetime("us", "UTC"))
    assert store.query("SHOW TABLES LIKE 'made%'").height == 1


# connections


def test_what_a_server_has_set_for_everybody_neither_cuts_answers_nor_stops_work(store, mysql):
    settings = {"sql_select_limit": 7, "sql_safe_updates": 1, "max_join_size": 50}
    try:
        for name, value in settings.items():
            asked(mysql, f"SET GLOBAL {name} = {value}")
        store.ensure(DATASET, BARS)
        assert store.write(batch(DATASET, bars())) == Written(inserted=96)
        assert store.write(batch(DATASET, bars(add=1.0), 2)) == Written(updated=96)
        assert store.scan(DATASET).collect().height == store.query(f"SELECT * FROM {DATASET}").height == 96
        assert store.delete(DATASET, Filter()) == 96
    finally:
        for name in settings:
            asked(mysql, f"SET GLOBAL {name} = DEFAULT")


def test_a_connection_that_the_server_ended_meanwhile_is_replaced_unseen(store, mysql):
    store.ensure(DATASET, BARS)
    for number in connections_of(store, mysql):
        asked(mysql, f"KILL {number}")
    assert store.write(batch(DATASET, bars())) == Written(inserted=96)


def test_a_connection_that_breaks_in_the_middle_of_a_delivery_is_told_and_leaves_nothing(store, mysql):
    store.ensure(DATASET, BARS)
    store.write(batch(DATASET, bars(), 1))
    told: list[BaseException] = []

    def write() -> None:
        try:
            store.write(batch(DATASET, bars(add=1.0, rows=60), 2))
        except BaseException as error:  # noqa: BLE001 - told by the test's own thread
            told.append(error)

    with another_client(mysql) as other:
        other("SELECT * FROM `made.bars` WHERE symbol = 'NA' FOR UPDATE")
        thread = threading.Thread(target=write)
        thread.start()
        waiting = (
            f"SELECT id FROM information_schema.processlist WHERE db = '{mysql.rpartition('/')[2]}' "
            "AND info LIKE 'INSERT INTO%'"
        )
        while not (found := asked(mysql, waiting)):
            assert thread.is_alive(), told
        asked(mysql, f"KILL {found[0][0]}")
        thread.join()
    assert isinstance(told[0], StoreError)
    assert "writing to made.bars" in str(told[0])
    assert store.committed(DATASET, "lane") == 1
    assert store.count(DATASET) == 96
    assert store.write(batch(DATASET, bars(add=1.0, rows=60), 2)) == Written(inserted=24, updated=96)


def test_a_delivery_that_the_engine_chose_to_end_a_deadlock_is_done_again(store, mysql):
    store.ensure(DATASET, BARS)
    store.write(batch(DATASET, bars(("A", "B")), 1))
    store.ensure("made.other", BARS)
    store.write(batch("made.other", bars(rows=500), 1))
    count = "SELECT variable_value FROM information_schema.global_status WHERE variable_name = 'Innodb_deadlocks'"
    before = int(asked(mysql, count)[0][0])
    written: list[object] = []
    with another_client(mysql) as other:
        other("UPDATE `made.other` SET close = -1")  # so much that the engine would rather undo the store's work
        other("UPDATE `made.bars` SET close = -1 WHERE symbol = 'B'")
        thread = threading.Thread(
            target=lambda: written.append(store.write(batch(DATASET, bars(("A", "B"), add=1), 2)))
        )
        thread.start()
        waiting = "SELECT COUNT(*) FROM information_schema.innodb_trx WHERE trx_state = 'LOCK WAIT'"
        while not asked(mysql, waiting)[0][0]:
            assert thread.is_alive()
            time.sleep(0.15)  # who asks again within 0.1 s gets the answer of before, for ever
        other("UPDATE `made.bars` SET close = -1 WHERE symbol = 'A'")
        other("ROLLBACK")
        thread.join()
    assert int(asked(mysql, count)[0][0]) == before + 1
    assert written == [Written(updated=96)]


def test_stores_that_write_the_same_rows_at_once_leave_each_of_them_once(mysql):
    stores = [open_url(mysql, f"s{number}") for number in range(3)]
    stores[0].ensure(DATASET, BARS)
    counted: list[Written] = []
    failed: list[BaseException] = []

    def write(number: int) -> None:
        try:
            for seq in range(1, 6):
                counted.append(stores[number].write(batch(DATASET, bars(rows=200), seq, lane=f"lane {number}")))
        except BaseException as error:  # noqa: BLE001 - told by the test's own thread
            failed.append(error)

    threads = [threading.Thread(target=write, args=[number]) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert sum(counted, Written()) == Written(inserted=400, unchanged=400 * 14)
    assert stores[0].count(DATASET) == 400
    for store in stores:
        store.close()


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_a_scan_that_is_left_holds_nothing_up(store, mysql, monkeypatch):
    monkeypatch.setattr("storage.mysql._READ_ROWS", 1_000)
    store.ensure(DATASET, BARS)
    store.write(batch(DATASET, bars(rows=40_000), mode=Mode.APPEND))
    assert store.scan(DATASET).filter(pl.col("volume") > 5).head(3).collect().height == 3
    parts = store.arrow(DATASET)
    assert next(parts).num_rows > 0
    del parts
    store.maintain(DATASET)
    wider = Schema((*BARS.columns, Column("note", ColumnType.STR)), BARS.key, "ts", "symbol", BARS.period)
    store.ensure(DATASET, wider)
    assert store.delete(DATASET, Filter(since=datetime(2001, 2, 1, tzinfo=UTC))) > 0
    while len(connections_of(store, mysql)) > 1:
        pass


@pytest.mark.slow
def test_a_table_that_is_mostly_empty_is_built_anew(store):
    store.ensure(DATASET, BARS)
    store.write(batch(DATASET, bars(rows=120_000), mode=Mode.APPEND))
    assert store.maintain(DATASET) == "made.bars: analysed"
    size = store.info(DATASET).bytes
    store.delete(DATASET, Filter(since=datetime(2001, 2, 1, tzinfo=UTC)))
    while "built anew" not in store.maintain(DATASET):  # the engine frees what was deleted when it comes to it
        pass
    assert store.info(DATASET).bytes < size / 4


def test_a_server_that_is_not_there_is_named_with_what_to_look_at_and_without_the_password():
    store = open_url("mysql://me:pa55word@127.0.0.1:1/market?connect_timeout=2", "my")
    assert store.url == "mysql://127.0.0.1:1/market"
    with pytest.raises(StoreError, match=re.escape("MySQL mysql://127.0.0.1:1/market")) as refused:
        store.ensure(DATASET, BARS)
    assert "is the server up" in str(refused.value)
    assert "pa55word" not in str(refused.value)


def test_a_wrong_password_and_a_database_that_is_not_there_are_told(mysql):
    server, _, database = mysql.rpartition("/")
    place = server.rpartition("@")[2]
    for url, words in (
        (f"mysql://market:pa55word@{place}/{database}", "Access denied"),
        (f"{server}/no_such_database", "no_such_database"),
    ):
        store = open_url(url, "my")
        with pytest.raises(StoreError, match=words) as refused:
            store.datasets()
        assert "does the URL name its host, database, user and password" in str(refused.value)
        assert "pa55word" not in str(refused.value)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("mysql://host", "names no database"),
        ("mysql://host/", "names no database"),
        ("mysql://host/a/b", "names no database"),
        ("mysql://host:port/db", "Port could not be cast"),
        ("mysql://host/db?sslmood=require", "sslmood is no option.*ssl_ca"),
        ("mysql://host/db?ssl_verify_cert=perhaps", "ssl_verify_cert='perhaps' is neither true nor false"),
        ("mysql://host/db?read_timeout=soon", "read_timeout='soon' is no number of seconds"),
    ],
)
def test_a_url_that_cannot_be_meant_is_refused_when_it_is_opened(url, words):
    with pytest.raises(ConfigurationError, match=words):
        open_url(url, "my")


def test_a_database_may_have_a_slash_in_its_name():
    assert open_url("mysql://host/a%2Fb", "my")._place["database"] == "a/b"


def test_a_server_is_verified_as_the_url_says(mysql, tmp_path):
    ((authority,),) = asked(mysql, "SELECT @@ssl_ca")
    if not authority.startswith("/"):
        pytest.skip("the server that MARKETSYNC_TEST_MYSQL names has no certificates of the tests' own")
    elsewhere = mysql.replace("@127.0.0.1:", "@localhost:")

    def said(url: str) -> str:
        store = open_url(url, "my")
        try:
            return store.query("SHOW SESSION STATUS LIKE 'Ssl_cipher'").row(0)[1]
        finally:
            store.close()

    assert said(f"{mysql}?ssl_ca={authority}&ssl_verify_identity=true")
    assert said(f"{elsewhere}?ssl_ca={authority}")
    assert said(f"{mysql}?ssl_verify_cert=false")
    assert said(f"{mysql}?ssl_disabled=true") == ""
    for refused, words in (
        (f"{elsewhere}?ssl_ca={authority}&ssl_verify_identity=true", "Hostname mismatch"),
        (f"{mysql}?ssl_verify_identity=true", "self-signed|unable to get"),
        (f"{mysql}?ssl_verify_cert=true", "self-signed|unable to get"),
    ):
        with pytest.raises(StoreError, match=words):
            said(refused)
    with pytest.raises(ConfigurationError, match=r"cannot be used \(ssl_cert=.*none\.pem\)"):
        said(f"{mysql}?ssl_ca={authority}&ssl_cert={tmp_path / 'none.pem'}")


def test_a_table_lives_in_the_database_that_the_url_names(store, mysql):
    store.ensure(DATASET, BARS)
    other_url = f"{mysql}_other"
    asked(mysql, f"CREATE DATABASE {other_url.rpartition('/')[2]}")
    try:
        other = open_url(other_url, "other")
        assert other.datasets() == []
        assert other.ensure(DATASET, BARS) != store.marker(DATASET)
        other.close()
    finally:
        asked(mysql, f"DROP DATABASE {other_url.rpartition('/')[2]}")


def test_a_shape_that_the_table_cannot_follow_is_a_conflict(store):
    store.ensure(DATASET, BARS)
    with pytest.raises(SchemaConflict):
        store.ensure(DATASET, Schema(BARS.columns, ("symbol",), "ts", "symbol", BARS.period))
