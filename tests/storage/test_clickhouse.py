"""What only ClickHouse over the network has: a server that may be gone, options, several writers. Its tables are those
of chDB, and tried with it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from private_clickhouse import clickhouse_client
from stored_frames import BARS, bars, batch

from marketsync.errors import ConfigurationError, QueryRefused, StoreError
from storage.clickhouse import ClickHouseStore, open_url
from storage.protocol import Written

DATASET = "made.bars"


@pytest.fixture
def store(clickhouse: str) -> Iterator[ClickHouseStore]:
    opened = open_url(clickhouse, "ch")
    yield opened
    opened.close()


def test_two_stores_write_one_table_and_the_later_write_wins_although_it_knows_nothing_of_the_other(store, clickhouse):
    other = open_url(clickhouse, "other")
    assert store.ensure(DATASET, BARS) == other.ensure(DATASET, BARS)
    for seq in range(1, 4):
        assert store.write(batch(DATASET, bars(add=seq), seq, lane="a")).unchanged == 0
        assert other.write(batch(DATASET, bars(add=-seq), seq, lane="b")) == Written(updated=96)
        assert (
            store.scan(DATASET).collect().sort("symbol", "ts")["close"].to_list()
            == bars(add=-seq).sort("symbol", "ts")["close"].to_list()
        )
    other.close()


def test_a_question_may_change_nothing_and_the_next_write_may(store):
    store.ensure(DATASET, BARS)
    store.write(batch(DATASET, bars()))
    with pytest.raises(QueryRefused):
        store.query(f"DROP TABLE {DATASET}")
    with pytest.raises(StoreError, match="READONLY"):
        store._frame(f"DROP TABLE {DATASET}", reads=True)
    assert store.query(f"SELECT count() AS n FROM {DATASET}")["n"][0] == 96
    assert store.write(batch(DATASET, bars(first=100), 2)) == Written(inserted=96)


def test_what_a_profile_of_the_user_would_leave_out_is_read_all_the_same(clickhouse):
    client = clickhouse_client(clickhouse)
    for name, value in (("limit", 7), ("max_result_rows", 7), ("result_overflow_mode", "break")):
        client.set_client_setting(name, value)
    client.command("SELECT 1")  # with it they stay with the front, as those of a profile do with a server
    client.close()
    store = open_url(clickhouse, "ch")
    store.ensure(DATASET, BARS)
    store.write(batch(DATASET, bars()))
    assert store.scan(DATASET).collect().height == 96
    assert store.write(batch(DATASET, bars(), 2)) == Written(unchanged=96)
    store.close()


def test_a_table_that_somebody_else_made_is_left_alone(store, clickhouse):
    client = clickhouse_client(clickhouse)
    client.command("CREATE DATABASE made")
    client.command("CREATE TABLE made.bars (a Int32) ENGINE = MergeTree ORDER BY a")
    client.close()
    with pytest.raises(StoreError, match="was not made by MarketSync"):
        store.ensure(DATASET, BARS)


def test_a_server_that_is_not_there_is_named_with_what_to_look_at_and_without_the_password():
    store = open_url("clickhouse://me:pa55word@127.0.0.1:1/?connect_timeout=2", "ch")
    assert store.url == "clickhouse://127.0.0.1:1/"
    told = r"clickhouse://127\.0\.0\.1:1: [^:]*refused; is it up, and are host, port"
    with pytest.raises(StoreError, match=told) as refused:
        store.ensure(DATASET, BARS)
    assert "pa55word" not in str(refused.value)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("clickhouse:///", "without a database"),
        ("clickhouse://host/market", "without a database"),
        ("clickhouse://host/?sslmode=require", "no option 'sslmode'; options: ca_cert"),
        ("clickhouse://host/?secure=perhaps", "'perhaps'"),
        ("clickhouse://host:http/", "port"),
    ],
)
def test_a_url_that_cannot_be_meant_is_refused_when_it_is_opened(url, words):
    with pytest.raises(ConfigurationError, match=words):
        open_url(url, "ch")


def test_a_store_that_was_closed_says_so(store):
    store.close()
    with pytest.raises(StoreError, match="was closed"):
        store.datasets()
