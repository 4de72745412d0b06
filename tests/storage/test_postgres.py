"""What only PostgreSQL has: a server, its partitions, its passwords, its other tables. The rest is in conformance."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from datetime import UTC, date, datetime
from pathlib import Path

import polars as pl
import psycopg
import pytest
from stored_frames import BARS, SESSIONS, bars, batch, stamped

from marketsync.errors import ConfigurationError, QueryRefused, SchemaError, StoreError
from marketsync.schema import Column, ColumnType, Schema
from storage.postgres import PostgresStore, open_url
from storage.protocol import Filter, Written

DATASET = "made.bars"


@pytest.fixture
def store(postgres: str) -> Iterator[PostgresStore]:
    opened = open_url(postgres, "pg")
    yield opened
    opened.close()


def asked(url: str, sql: str) -> list[tuple]:
    with psycopg.connect(url, autocommit=True) as connection:
        found = connection.execute(sql)  # pyright: ignore[reportArgumentType, reportCallIssue]
        return found.fetchall() if found.description else []


def test_a_table_is_what_a_person_would_have_made(store, postgres):
    store.ensure(DATASET, BARS)
    columns = asked(
        postgres,
        "SELECT column_name, data_type, is_nullable FROM information_schema.columns "
        "WHERE table_schema = 'made' AND table_name = 'bars' ORDER BY ordinal_position",
    )
    assert columns == [
        ("symbol", "text", "NO"),
        ("ts", "timestamp with time zone", "NO"),
        ("close", "double precision", "YES"),
        ("volume", "bigint", "YES"),
        ("_segment", "text", "NO"),
        ("_ingested_at", "timestamp with time zone", "NO"),
    ]
    assert asked(postgres, "SELECT indexdef FROM pg_indexes WHERE tablename = 'bars'")[0][0].endswith("(symbol, ts)")


@pytest.mark.parametrize(("cut", "parts"), [("month", ["bars_p2001_01", "bars_p2001_02"]), ("year", ["bars_p2001"])])
def test_a_table_is_cut_by_the_time_in_its_key_where_the_url_says_so(postgres, cut, parts):
    store = open_url(f"{postgres}?partition={cut}", "pg")
    store.ensure(DATASET, BARS)
    assert store.write(batch(DATASET, bars(rows=96), 1)) == Written(inserted=192)
    assert store.write(batch(DATASET, bars(rows=96, add=1.0), 2)) == Written(updated=192)
    assert store.replace(DATASET, BARS, bars(("NA",), rows=96), Filter(["NA"])) == Written(updated=96)
    found = asked(postgres, "SELECT relid::text FROM pg_partition_tree('made.bars') WHERE isleaf ORDER BY 1")
    assert found == [(f"made.{part}",) for part in parts]
    assert store.info(DATASET).files == len(parts)
    store.close()
    # the URL speaks of tables that are made from now on
    again = open_url(postgres, "pg")
    assert again.datasets() == [DATASET]
    later = bars(first=24 * 400, rows=2)
    assert again.write(batch(DATASET, later, 3)) == Written(inserted=4)
    assert again.count(DATASET) == 196
    again.close()


def test_the_first_and_the_last_year_have_partitions_like_others(postgres):
    for cut in ("year", "month"):
        store = open_url(f"{postgres}?partition={cut}", "pg")
        dataset = f"made.{cut}"
        store.ensure(dataset, BARS)
        days = [datetime(year, 12, 31, tzinfo=UTC) for year in (1, 2024, 9999)]
        for seq, day in enumerate([*days, days[0].replace(day=30)], 1):
            store.write(batch(dataset, bars(rows=1).with_columns(ts=pl.lit(day, pl.Datetime("us", "UTC"))), seq))
        month = "_12" if cut == "month" else ""
        assert asked(postgres, f"SELECT relid::text FROM pg_partition_tree('{dataset}') WHERE isleaf ORDER BY 1") == [
            (f"{dataset}_p{year}{month}",) for year in ("0001", "2024", "9999")
        ]
        assert store.count(dataset) == 8
        store.close()


def test_a_partition_whose_name_would_be_cut_or_is_taken_is_refused_with_the_reason(postgres):
    store = open_url(f"{postgres}?partition=month", "pg")
    store.ensure(f"made.{'x' * 54}", BARS)
    store.write(batch(f"made.{'x' * 54}", bars(rows=96)))
    with pytest.raises(SchemaError, match=r"a partition's name 'x+_p0000_00' is longer than 63 bytes"):
        store.ensure(f"made.{'x' * 55}", BARS)
    for dataset in (DATASET, f"{DATASET}_p2001_01", "made.other"):
        store.ensure(dataset, BARS)
    with pytest.raises(
        SchemaError, match=r'needs a partition "made"\."bars_p2001_01", and another table has this name'
    ):
        store.write(batch(DATASET, bars(rows=1)))
    store.write(batch("made.other", bars(rows=1)))
    with pytest.raises(StoreError, match=r"other_p2001_01.* is a partition of another one; give .* another name"):
        store.ensure("made.other_p2001_01", BARS)
    store.close()


@pytest.mark.parametrize("cut", ["month", "year"])
def test_a_table_with_partitions_may_be_renamed_and_another_made_in_its_place(postgres, cut):
    store = open_url(f"{postgres}?partition={cut}", "pg")
    store.ensure(DATASET, BARS)
    store.write(batch(DATASET, bars()))
    asked(postgres, "ALTER TABLE made.bars RENAME TO older")
    assert store.ensure(DATASET, BARS) != store.ensure("made.older", BARS)
    for seq in (2, 3):
        assert store.write(batch("made.older", bars(add=seq), seq)) == Written(updated=96)
        assert store.write(batch(DATASET, bars(first=1000 * seq), seq)) == Written(inserted=96)
        assert store.write(batch("made.older", bars(first=10_000 * seq), seq, lane="new")) == Written(inserted=96)
    assert (store.count(DATASET), store.count("made.older")) == (192, 288)
    asked(postgres, "ALTER SCHEMA made RENAME TO moved")
    assert store.write(batch("moved.bars", bars(first=2000, add=1.0), 4)) == Written(updated=96)
    store.close()


def test_a_table_that_came_without_its_lanes_is_believed_nothing_and_written_again(store, postgres):
    for away in ("DROP TABLE made._marketsync_commits", "CREATE SCHEMA moved; ALTER TABLE made.bars SET SCHEMA moved"):
        marker = store.ensure(DATASET, BARS)
        store.write(batch(DATASET, bars(), 3))
        asked(postgres, away)
        dataset = "moved.bars" if "moved" in away else DATASET
        assert store.ensure(dataset, BARS) != marker
        assert store.committed(dataset, "lane") == 0
        assert store.write(batch(dataset, bars())) == Written(unchanged=96)
        assert store.ensure(dataset, BARS) == store.marker(dataset)


def test_a_table_is_also_cut_by_a_date(postgres):
    store = open_url(f"{postgres}?partition=year", "pg")
    store.ensure("made.sessions", SESSIONS)
    days = pl.DataFrame({"day": [date(2000, 12, 31), date(2001, 1, 1)], "open": [False, True]})
    store.write(batch("made.sessions", stamped(days), schema=SESSIONS))
    assert store.info("made.sessions").files == 2
    assert store.scan("made.sessions").collect().sort("day").equals(days)
    store.close()


def test_a_table_that_somebody_else_made_is_left_alone(store, postgres):
    asked(postgres, "CREATE SCHEMA made")
    asked(postgres, "CREATE TABLE made.bars (symbol text)")
    for act in (lambda: store.ensure(DATASET, BARS), lambda: store.marker(DATASET)):
        with pytest.raises(StoreError, match=r"was not made by MarketSync; `marketsync adopt .*; or rename it"):
            act()
    assert store.datasets() == []


@pytest.mark.parametrize("name", ["c" * 64, "é" * 32])
def test_a_name_that_the_engine_would_cut_is_refused(store, name):
    schema = Schema((*BARS.columns, Column(name, ColumnType.F64)), BARS.key, BARS.time, BARS.subject)
    with pytest.raises(SchemaError, match="longer than 63 bytes"):
        store.ensure(DATASET, schema)


def test_reserved_words_quotes_and_percent_signs_are_names_like_others(store):
    names = ["select", "User", 'odd"one', "per%cent", "%s"]
    schema = Schema(tuple(Column(name, ColumnType.I64) for name in names), ("select",))
    store.ensure("made.odd", schema)
    frame = pl.DataFrame({name: [number] for number, name in enumerate(names)})
    store.write(batch("made.odd", stamped(frame), schema=schema))
    assert store.scan("made.odd").collect().equals(frame)


def test_a_question_may_change_nothing(store, postgres):
    store.ensure(DATASET, BARS)
    store.write(batch(DATASET, bars()))
    asked(
        postgres,
        "CREATE FUNCTION public.sweep() RETURNS int LANGUAGE plpgsql AS "
        f"$$ BEGIN DELETE FROM {DATASET}; RETURN 1; END $$",
    )
    for sql in (f"WITH gone AS (DELETE FROM {DATASET} RETURNING 1) SELECT * FROM gone", "SELECT public.sweep()"):
        with pytest.raises(QueryRefused, match=r"a query only reads|read-only transaction"):
            store.query(sql)
    assert store.count(DATASET) == 96


def test_a_question_about_a_table_that_is_not_there_is_told_which_are(store):
    store.ensure(DATASET, BARS)
    with pytest.raises(QueryRefused, match=r"nothing.*Tables here: made\.bars"):
        store.query("SELECT * FROM made.nothing")


def test_what_arrow_has_no_type_for_comes_as_text(store):
    found = store.query("SELECT 12345678901234567890.5::numeric AS n, 1::int AS i, NULL::numeric AS none")
    assert found.row(0) == ("12345678901234567890.5", 1, None)


def test_a_question_may_end_with_a_comment_and_may_be_about_the_server(store):
    store.ensure(DATASET, BARS)
    assert store.query("SELECT 1 AS a -- one").item() == 1
    assert store.query("/* the */ SHOW TimeZone -- of it").columns == ["TimeZone"]
    assert "bars" in store.query(f"EXPLAIN SELECT * FROM {DATASET}").item(0, 0)
    with pytest.raises(QueryRefused, match=r"read-only transaction"):
        store.query("EXPLAIN ANALYZE SELECT lo_create(0)")
    with pytest.raises(QueryRefused, match=r"nothing.*Tables here: made\.bars"):
        store.query("EXPLAIN SELECT * FROM made.nothing")
    for sql, words in (
        ("SELECT symbol, symbol FROM made.bars", "2 columns of the name 'symbol': give each its own"),
        ("SELECT 1 AS a, now() - now() AS since", "'since' holds intervals.* as text"),
        ("SELECT ARRAY[interval '1 day'] AS waits", "'waits' holds intervals"),
        ("SELECT 12.34::money AS paid", "'paid' is money.* ::numeric"),
        ("SELECT ARRAY[12.34::money] AS paid", "'paid' is money"),
        ("SELECT NULL::date AS never UNION ALL SELECT 'infinity'", "'never' holds times that are infinite.* as text"),
        ("SELECT '-infinity'::timestamp AS never", "'never' holds times"),
        ("SELECT '9999-12-31 23:59:59.999999Z'::timestamptz, timestamptz '10000-01-01 00:00Z' AS far", "'far' holds"),
    ):
        with pytest.raises(QueryRefused, match=words):
            store.query(sql)


def test_a_lost_connection_is_told_and_the_next_call_has_another(store, postgres):
    store.ensure(DATASET, BARS)
    asked(postgres, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'marketsync'")
    with pytest.raises(StoreError, match=r"writing to made\.bars"):
        store.write(batch(DATASET, bars()))
    assert store.committed(DATASET, "lane") == 0
    assert store.write(batch(DATASET, bars())) == Written(inserted=96)


def test_what_a_database_prefers_changes_nothing_of_what_is_written_and_read(postgres):
    database = postgres.rpartition("/")[2]
    rows = bars(("é中",), rows=2)
    preferences = ("client_encoding = 'LATIN1'", "quote_all_identifiers = on", "DateStyle = 'German, DMY'")
    for number, preference in enumerate(preferences):
        asked(postgres, f"ALTER DATABASE {database} SET {preference}")
        store = open_url(postgres + "?options=-c%20statement_timeout%3D60s", "pg")
        dataset = f"made.bars{number}"
        store.ensure(dataset, BARS)
        store.write(batch(dataset, rows))
        assert store.write(batch(dataset, rows, 2)) == Written(unchanged=2), preference
        assert store.scan(dataset, Filter(["é中"])).collect().equals(rows.select(BARS.names)), preference
        assert store.watermarks(dataset) == {"é中": rows["ts"].max()}, preference
        assert store.query("SELECT current_setting('statement_timeout') AS s").item() == "1min"
        store.close()
        asked(postgres, f"ALTER DATABASE {database} RESET ALL")


def test_a_database_of_another_encoding_keeps_text_as_it_is_or_refuses_it(postgres):
    for encoding, kept in (("LATIN1", "é"), ("SQL_ASCII", "中")):
        database = f"{postgres.rpartition('/')[2]}_{encoding.lower()}"
        asked(postgres, f"CREATE DATABASE {database} ENCODING '{encoding}' TEMPLATE template0 LOCALE 'C'")
        try:
            url = f"{postgres.rpartition('/')[0]}/{database}"
            store = open_url(url, "pg")
            store.ensure(DATASET, BARS)
            store.write(batch(DATASET, bars((kept,), rows=1)))
            assert store.watermarks(DATASET) == {kept: datetime(2001, 1, 30, 9, 30, tzinfo=UTC)}
            assert store.datasets() == [DATASET]
            if encoding == "LATIN1":
                with pytest.raises(StoreError, match=r"has no such character: make one that has them all"):
                    store.write(batch(DATASET, bars(("中",), rows=1), 2))
            assert asked(f"{url}?client_encoding=utf8", f"SELECT symbol FROM {DATASET}") == [(kept,)]
            store.close()
        finally:
            asked(postgres, f"DROP DATABASE {database} WITH (FORCE)")


def test_writers_of_the_same_rows_wait_for_one_another_whatever_isolation_is_the_default(postgres):
    asked(postgres, f"ALTER DATABASE {postgres.rpartition('/')[2]} SET default_transaction_isolation = 'serializable'")
    wrong: list[Exception] = []

    def write(lane: str) -> None:
        store = open_url(postgres, "pg")
        try:
            store.ensure(DATASET, BARS)
            for seq in range(1, 9):
                store.write(batch(DATASET, bars(rows=50, add=float(seq)), seq, lane=lane))
        except StoreError as error:
            wrong.append(error)
        store.close()

    threads = [threading.Thread(target=write, args=(lane,)) for lane in ("one", "other")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_socket_is_named_by_its_folder_and_a_server_without_tls_is_told_apart(tmp_path: Path, postgres):
    store = open_url(f"postgresql:///market?host={tmp_path}", "pg")
    with pytest.raises(StoreError, match=re.escape(f'socket "{tmp_path}') + r".*user and password\?"):
        store.marker(DATASET)
    if asked(postgres, "SHOW ssl") == [("off",)]:
        store = open_url(f"{postgres}?sslmode=require", "pg")
        with pytest.raises(StoreError, match=r"the server has no TLS: turn it on there"):
            store.marker(DATASET)


def test_a_server_that_is_not_there_is_named_with_what_to_look_at_and_without_the_password():
    store = open_url("postgresql://me:pa55word@127.0.0.1:1/market?sslmode=disable", "pg")
    assert store.url == "postgresql://127.0.0.1:1/market"
    with pytest.raises(StoreError, match=re.escape("PostgreSQL postgresql://127.0.0.1:1/market")) as refused:
        store.ensure(DATASET, BARS)
    assert "is the server up" in str(refused.value)
    assert "pa55word" not in str(refused.value)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("postgresql://host", "names no database"),
        ("postgresql://host/", "names no database"),
        ("postgresql://host/db?partition=week", "'week' is none of none, month, year"),
        ("postgresql://host/db?client_encoding=latin1", "latin1: text goes to the server as UTF-8"),
        ("postgresql://host/db?sslmod=require", "sslmod is no option.*did you mean sslmode"),
    ],
)
def test_a_url_that_cannot_be_meant_is_refused_when_it_is_opened(url, words):
    with pytest.raises(ConfigurationError, match=words):
        open_url(url, "pg")


@pytest.mark.parametrize("options", ["connect_timeout=3&partition=year", "ssl=true", "options=-c%20jit%3Doff"])
def test_every_option_of_libpq_is_taken(options: str):
    assert open_url(f"postgresql://host/db?{options}", "pg").url == "postgresql://host/db"


def test_a_scan_that_is_left_holds_nothing_up(store):
    store.ensure(DATASET, BARS)
    store.write(batch(DATASET, bars(rows=2000)))
    first = next(store.arrow(DATASET))
    assert first.num_rows > 0
    store.maintain(DATASET)
    assert store.delete(DATASET, Filter(since=datetime(2001, 2, 1, tzinfo=UTC))) > 0


def test_a_table_lives_in_the_database_that_the_url_names(store, postgres, tmp_path: Path):
    store.ensure(DATASET, BARS)
    other = open_url(postgres.rsplit("/", 1)[0] + "/postgres", "other")
    assert DATASET not in other.datasets()
    other.close()
