"""What NATS and Redis do alike as logs: exactly once into the stream, whole batches out of it, whoever is killed when.

Much of it is what every store does: those tests are taken from the shared suite, with the log read as the table that a
follower makes of its batches. A batch in a log is published as it is, so nothing is asked here of how many rows it
changed.
"""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta

import polars as pl
import pytest
import test_conformance
from conftest import python
from followed_logs import LogPlace, batches
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from polars.testing import assert_frame_equal
from stored_frames import BARS, HOSTILE_TEXT, INSTRUMENTS, START, WIDE, bars, batch, differences, hostile, stamped
from test_conformance import (  # noqa: F401 - collected here, with the fixtures of this file
    test_a_change_that_would_lose_values_is_refused_with_what_to_do,
    test_a_created_table_keeps_its_marker_and_schema_across_openings,
    test_a_frame_that_does_not_fit_is_refused_whole,
    test_a_name_that_is_no_dataset_is_refused_before_it_becomes_a_path,
    test_a_null_in_a_column_declared_without_is_refused,
    test_a_store_that_is_open_sees_that_its_table_was_made_anew,
    test_a_table_made_anew_has_another_marker_and_forgets_its_lanes,
    test_a_table_that_is_not_there_has_no_marker_no_schema_and_no_lane,
    test_a_value_that_the_engine_would_change_is_refused_or_kept,
    test_columns_go_by_name_in_whatever_order_they_come,
    test_columns_that_change_places_in_the_definition_keep_their_values,
    test_four_processes_that_create_one_table_at_once_get_the_same_table,
    test_lanes_and_datasets_count_for_themselves,
    test_rows_outside_of_the_span_they_replace_are_refused,
    test_threads_share_a_store,
    test_two_processes_write_their_lanes_into_one_table_or_the_second_is_told_who_is_first,
    test_watermarks_are_the_newest_time_of_each_subject,
)

from marketsync.errors import CapabilityError, ConfigurationError, StoreError
from marketsync.schema import Column, ColumnType, Period, Schema
from storage.fingerprints import Recipe
from storage.following import follow
from storage.log import LogStore
from storage.protocol import Filter, Mode, Written
from storage.registry import open_store

IN_PARTS = "compression=none&max_payload=8KB"


def joined(url: str, options: str) -> str:
    return f"{url}{'&' if '?' in url else '?'}{options}" if options else url


def place_of(request: pytest.FixtureRequest) -> LogPlace:
    engine, _, options = request.param.partition(" ")
    return LogPlace(joined(request.getfixturevalue(engine), options))


@pytest.fixture(params=["nats", "redis format=json"])
def place(request: pytest.FixtureRequest) -> LogPlace:
    return place_of(request)


@pytest.fixture(params=["nats", "nats format=json", "redis", "redis format=json"])
def format(request: pytest.FixtureRequest) -> LogPlace:
    """A place of each engine and format: for what they may not change."""
    return place_of(request)


@pytest.fixture
def store(place: LogPlace) -> Iterator[object]:
    opened = place.open()
    yield opened
    opened.close()


@pytest.fixture(params=["nats", "redis"])
def engine(request: pytest.FixtureRequest) -> LogPlace:
    """A place of each engine, in Arrow: for what the format has no part in."""
    return LogPlace(request.getfixturevalue(request.param))


@pytest.fixture
def log(engine: LogPlace) -> Iterator[LogStore]:
    opened = engine.log()
    yield opened
    opened.close()


def published(store: LogStore, dataset: str, count: int, **options) -> None:
    store.ensure(dataset, BARS)
    for seq in range(1, count + 1):
        store.write(batch(dataset, bars(first=seq * 100, rows=2), seq, **options))


def ids(url: str, dataset: str, **options) -> list[str]:
    return [each.id for each in batches(url, dataset, **options)]


# what goes in comes out


@pytest.mark.parametrize("mode", list(Mode))
def test_hostile_values_are_followed_as_they_were_published(format: LogPlace, dataset: str, mode: Mode):
    store = format.log()
    store.ensure(dataset, WIDE)
    frame = hostile(store.capabilities).with_columns(text=pl.concat_str("text", pl.lit("\0\u2028")))
    assert store.write(batch(dataset, frame, mode=mode, schema=WIDE)) == Written(inserted=len(HOSTILE_TEXT))
    (found,) = batches(format.url, dataset, system=True)
    assert (found.mode, found.id, found.schema) == (mode, "lane:1", WIDE)
    assert not differences(found.frame, frame, WIDE.key)
    (plain,) = batches(format.url, dataset)
    assert plain.frame.columns == WIDE.names
    store.close()


@given(data=st.data())
@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_any_frame_is_followed_as_it_was_published(format: LogPlace, data: st.DataObject):
    store, name = format.log(), "any.frame"
    each = test_conformance.columns_of(store.capabilities)
    days = data.draw(st.lists(st.dates(date(1905, 1, 1), date(2149, 1, 1)), min_size=1, max_size=6, unique=True))
    drawn = {
        column: data.draw(st.lists(st.none() | values, min_size=len(days), max_size=len(days)))
        for column, values in each.items()
    }
    whole = pl.DataFrame({"name": "n", "day": days, **drawn}, schema={**WIDE.polars(), "at_ns": pl.Int64()})
    frame = stamped(whole.with_columns(pl.col("at_ns").cast(pl.Datetime("ns", "UTC"))))
    store.ensure(name, WIDE)
    store.write(batch(name, frame, store.committed(name, "any") + 1, lane="any", schema=WIDE))
    *_, last = batches(format.url, name, system=True)
    assert not differences(last.frame, frame, WIDE.key)
    store.close()


def test_a_batch_beyond_the_greatest_message_is_followed_whole(engine: LogPlace, dataset: str):
    store = engine.log(joined(engine.url, IN_PARTS)[len(engine.url) :])
    store.ensure(dataset, BARS)
    frame = bars(("A", "B", "C"), rows=700)
    store.write(batch(dataset, frame, 1))
    assert store.info(dataset).rows > 10
    (found,) = batches(engine.url, dataset, system=True)
    assert_frame_equal(found.frame, frame)
    row = bars(("x" * 9000,), rows=1)
    with pytest.raises(StoreError, match=r"a row of 1\d,\d+ bytes is longer"):
        store.write(batch(dataset, row, 2))
    assert store.committed(dataset, "lane") == 1
    store.close()


def test_a_batch_made_before_a_column_was_added_leaves_that_column_alone(store, dataset: str):
    wider = Schema((*BARS.columns, Column("note", ColumnType.STR)), BARS.key, "ts", "symbol", Period.MONTH)
    store.ensure(dataset, BARS)
    store.write(batch(dataset, bars(), 1))
    marker = store.marker(dataset)
    assert store.ensure(dataset, wider) == marker
    store.write(batch(dataset, bars().with_columns(note=pl.lit("kept")), 2, schema=wider))
    store.write(batch(dataset, bars(first=24, add=1.0), 3, schema=BARS))
    found = store.scan(dataset).collect()
    assert found.columns == wider.names
    assert found["note"].to_list().count("kept") == 96
    assert found["note"].null_count() == 48
    assert [each.schema for each in batches(store.address, dataset)] == [BARS, wider, BARS]


def test_replacements_and_deletions_are_followed_with_their_span(store, dataset: str):
    store.ensure(dataset, BARS)
    store.write(batch(dataset, bars(), 1))
    span = Filter(["NA"], START + timedelta(hours=10), START + timedelta(hours=20))
    two = bars(("000001", "NA"), first=15, rows=2, add=5.0).filter(pl.col("symbol") == "NA")
    assert store.replace(dataset, BARS, two, span) == Written(inserted=2)
    assert store.count(dataset) == 88
    assert store.delete(dataset, Filter(["000001"], until=date(2001, 1, 31))) == 0
    assert store.count(dataset, Filter(["000001"])) == 33
    modes = [(each.mode, each.span) for each in batches(store.address, dataset)]
    assert modes == [
        ("upsert", None),
        ("replace", span),
        ("delete", Filter(["000001"], None, date(2001, 1, 31))),
    ]
    store.ensure(f"{dataset}-list", INSTRUMENTS)
    store.delete(f"{dataset}-list", Filter())
    assert [each.mode for each in batches(store.address, f"{dataset}-list")] == ["delete"]


def test_a_batch_of_no_rows_moves_its_lane_and_is_not_followed(engine: LogPlace, log: LogStore, dataset: str):
    published(log, dataset, 1)
    assert log.write(batch(dataset, bars().clear(), 2)) == Written()
    assert log.committed(dataset, "lane") == 2
    assert ids(engine.url, dataset) == ["lane:1"]


def test_what_a_log_cannot_be_asked_is_refused_with_what_to_do(log: LogStore, dataset: str):
    published(log, dataset, 1)
    assert not log.capabilities.table
    assert "followed" in log.capabilities.why

    def compared(name: str) -> object:
        return log.fingerprints(name, Recipe(b"seed"))

    for ask in (log.scan, log.arrow, log.watermarks, log.count, log.query, compared):
        with pytest.raises(CapabilityError, match=r"marketsync follow .* a store of the plan that has tables"):
            ask(dataset)
    assert log.info(dataset).rows == 1
    assert dataset in log.maintain(dataset)
    assert log.version().split()[0] in ("NATS", "Valkey", "Redis")


# exactly once into the stream


def test_a_batch_that_comes_again_is_in_the_stream_once(place: LogPlace, dataset: str):
    for _ in range(3):
        store = place.log()
        store.ensure(dataset, BARS)
        for seq in (1, 2, 5):
            store.write(batch(dataset, bars(first=seq * 100), seq))
        assert store.write(batch(dataset, bars(), 4)) == Written(already=True)
        store.close()
    assert ids(place.url, dataset) == ["lane:1", "lane:2", "lane:5"]


def test_of_two_who_believe_that_a_lane_is_theirs_each_batch_is_there_once(engine: LogPlace, dataset: str):
    stores = [engine.log(), engine.log()]
    published(stores[0], dataset, 1)

    def write(store: LogStore) -> None:
        for seq in range(2, 30):
            for _ in range(10):
                try:
                    store.write(batch(dataset, bars(first=seq * 100, rows=2), seq))
                    break
                except StoreError as error:
                    assert "another process has published" in str(error)  # noqa: PT017 - any number of times

    threads = [threading.Thread(target=write, args=[store]) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ids(engine.url, dataset) == [f"lane:{seq}" for seq in range(1, 30)]
    for store in stores:
        store.close()


def test_a_publisher_whose_lane_went_on_without_it_is_refused(nats: str, dataset: str, monkeypatch: pytest.MonkeyPatch):
    stale, other = (LogPlace(nats).log() for _ in range(2))
    published(stale, dataset, 1)
    known = stale.journal.committed(dataset, "lane")
    other.write(batch(dataset, bars(first=200), 2))
    # it looked before the other one had published
    monkeypatch.setattr(stale.journal, "committed", lambda dataset, lane: known)
    with pytest.raises(StoreError, match="another process has published to lane lane"):
        stale.write(batch(dataset, bars(first=200), 2))
    monkeypatch.undo()
    assert stale.write(batch(dataset, bars(first=200), 2)) == Written(already=True)
    assert ids(nats, dataset) == ["lane:1", "lane:2"]
    for store in (stale, other):
        store.close()


def kill_publishers(place: LogPlace, name: str, kills: range) -> None:
    """Kill a publisher of batches in several parts, again and again on one lane, and go on where it was."""
    url = joined(place.url, f"{IN_PARTS}&format=json")
    parted = LogPlace(url)
    last = 0
    for seed in kills:
        last += test_conformance.kill_and_replay(parted, f"{name}{seed}", seed)  # pyright: ignore[reportArgumentType]
        dataset = f"{name}{seed}"
        followed = list(batches(url, dataset))
        store = place.log()
        assert [each.id for each in followed] == [f"lane:{n}" for n in range(1, store.committed(dataset, "lane") + 1)]
        store.close()
        from writer_process import frame_of

        for seq, each in enumerate(followed, 1):
            assert_frame_equal(each.frame, frame_of("lane", seq).select(BARS.names))
    assert last > 0


def test_acknowledged_batches_survive_a_kill_of_the_publisher_whole_and_once(engine: LogPlace):
    kill_publishers(engine, "made.killed", range(1, 2))


@pytest.mark.slow
def test_acknowledged_batches_survive_thirty_more_kills_of_the_publisher(engine: LogPlace):
    kill_publishers(engine, "made.more", range(5, 5 + min(30, int(os.environ.get("MARKETSYNC_TEST_KILLS", "30")))))


# following


def test_a_group_goes_on_after_what_it_has_acknowledged(engine: LogPlace, log: LogStore, dataset: str):
    published(log, dataset, 4)
    with follow(engine.url, dataset, group="g", idle_seconds=0) as following:
        for expected in ("lane:1", "lane:2"):
            found = next(following)
            assert found.id == expected
            found.ack()
            found.ack()
        assert next(following).id == "lane:3"
        with pytest.raises(StoreError, match=r"lane:3 .* ack\(\)"):
            next(following)
    assert ids(engine.url, dataset, group="g") == ["lane:3", "lane:4"]
    assert ids(engine.url, dataset, group="g") == []
    assert ids(engine.url, dataset, group="another") == ["lane:1", "lane:2", "lane:3", "lane:4"]
    assert ids(engine.url, dataset) == ["lane:1", "lane:2", "lane:3", "lane:4"]


def test_a_follower_begins_where_it_is_told_to(engine: LogPlace, log: LogStore, dataset: str):
    published(log, dataset, 2)
    time.sleep(0.02)
    now = datetime.now(UTC)
    time.sleep(0.02)
    log.write(batch(dataset, bars(first=300), 3))
    assert ids(engine.url, dataset, start=now) == ["lane:3"]
    assert ids(engine.url, dataset, start=now, group="g") == ["lane:3"]
    assert len(ids(engine.url, dataset, start=date(2001, 2, 3))) == 3
    assert len(ids(engine.url, dataset, start="2001-02-03")) == 3
    assert len(ids(engine.url, dataset, start="1970-01-01")) == len(ids(engine.url, dataset, start="0001-01-01")) == 3
    for group in (None, "new"):
        with follow(engine.url, dataset, start="new", group=group, idle_seconds=20) as following:
            waiting = threading.Timer(0.3, lambda seq=4 if group is None else 5: log.write(batch(dataset, bars(), seq)))
            waiting.start()
            found = next(following)
            found.ack()
            assert found.id == ("lane:4" if group is None else "lane:5")
            waiting.join()


def test_members_of_a_group_take_turns_and_keep_the_order(engine: LogPlace, log: LogStore, dataset: str):
    published(log, dataset, 24)
    got: list[str] = []

    def member() -> None:
        for each in batches(engine.url, dataset, group="g", idle_seconds=0.5):
            got.append(each.id)
            time.sleep(0.01)

    threads = [threading.Thread(target=member) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == [f"lane:{seq}" for seq in range(1, 25)]


FOLLOWER = """
import sys, time
from storage.following import follow
for each in follow(sys.argv[1], sys.argv[2], group="g", takeover_seconds=0.5):
    print(each.id, flush=True)
    if each.id == "lane:3":
        time.sleep(60)
    each.ack()
"""


def test_what_a_killed_follower_had_not_acknowledged_comes_again_and_first(
    engine: LogPlace, log: LogStore, dataset: str
):
    published(log, dataset, 4)
    start = python("unused.py")[2].partition("import runpy")[0]
    command = [*python("unused.py")[:2], start + FOLLOWER, engine.url, dataset]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert [process.stdout.readline().strip() for _ in range(3)] == ["lane:1", "lane:2", "lane:3"]
    process.kill()
    process.communicate()
    with follow(engine.url, dataset, group="g", takeover_seconds=0.5) as following:
        for expected in ("lane:3", "lane:4"):
            found = next(following)
            assert found.id == expected
            found.ack()


def test_a_slow_follower_keeps_its_batch(engine: LogPlace, log: LogStore, dataset: str):
    published(log, dataset, 2)
    brief = {"group": "g", "takeover_seconds": 0.4}
    with follow(engine.url, dataset, **brief) as slow:
        first = next(slow)
        assert ids(engine.url, dataset, **brief, idle_seconds=1.2) == []
        first.ack()
    assert ids(engine.url, dataset, **brief) == ["lane:2"]


def test_a_follower_is_told_that_its_log_was_made_anew(engine: LogPlace, log: LogStore, dataset: str):
    published(log, dataset, 1)
    for group in (None, "g"):
        with follow(engine.url, dataset, group=group) as following:
            next(following).ack()
            engine.empty(dataset)
            published(log, dataset, 1)
            engine.empty(dataset)
            with pytest.raises(StoreError, match="was deleted"):
                next(following)
            published(log, dataset, 1)


def test_what_cannot_be_followed_is_refused_in_words(engine: LogPlace, log: LogStore, tmp_path):
    log.ensure("made.there", BARS)
    with pytest.raises(StoreError, match=r"no log of made\.not .* logs there: made\.there"):
        follow(engine.url, "made.not")
    with pytest.raises(ConfigurationError, match="name of a group"):
        follow(engine.url, "made.there", group="a b")
    with pytest.raises(ConfigurationError, match="neither all nor new nor a time"):
        follow(engine.url, "made.there", start="yesterday")
    with pytest.raises(ConfigurationError, match="read and not followed"):
        follow(f"delta://{tmp_path}", "made.there")


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("nats://host", "names no stream"),
        ("nats://host/a.b", "names no stream"),
        ("nats://me:pa55word@host/S?colour=red", "colour is no option of a nats:// store; options: .*max_age"),
        ("nats://host/S?max_age=soon", "max_age='soon'"),
        ("nats://host/S?max_bytes=lots", "write a size such as"),
        ("nats://host/S?format=xml", "format='xml'"),
        ("redis://host/one", "no number"),
        ("redis://host:port/0", "redis://user@host:6379/0"),
        ("rediss://me:pa55word@host/0?durable=perhaps", "write true or false"),
        ("redis://host/0?replicas=0", "one or more"),
    ],
)
def test_a_url_that_cannot_be_meant_is_refused_when_it_is_opened(url: str, words: str):
    with pytest.raises(ConfigurationError, match=words) as refused:
        open_store(url)
    assert "pa55word" not in str(refused.value)
