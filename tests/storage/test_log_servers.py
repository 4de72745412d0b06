"""Logs and their servers: killed and started again, forgetful, limited, out of reach, with TLS and passwords."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any
from urllib.parse import urlsplit

import pytest
from followed_logs import batches
from private_nats import PrivateServer, free_port, private_nats
from private_redis import private_redis
from private_tls import made_certificates, tls_front
from redis import Redis
from stored_frames import BARS, bars, batch

from marketsync.errors import ConfigurationError, StoreError
from storage.following import follow
from storage.log import LogStore
from storage.protocol import Filter
from storage.registry import open_store

Started = Callable[..., tuple[str, PrivateServer]]


@pytest.fixture
def started() -> Iterator[Started]:
    """Start a server of one's own and return the URL of a log on it, and the server."""
    with ExitStack() as stack:

        def start(engine: str, *options: str) -> tuple[str, PrivateServer]:
            if engine == "nats":
                url, server = stack.enter_context(private_nats("\n".join(options)))
                return f"{url}/MARKET", server
            url, server = stack.enter_context(private_redis(*options))
            return f"{url}/0", server

        yield start


def publish(store: LogStore, first: int, last: int) -> None:
    store.ensure("made.bars", BARS)
    for seq in range(first, last + 1):
        store.write(batch("made.bars", bars(first=seq * 100, rows=3), seq))


def log_at(url: str) -> LogStore:
    store = open_store(url)
    assert isinstance(store, LogStore)
    return store


def ids(url: str, **options) -> list[str]:
    return [each.id for each in batches(url, "made.bars", **options)]


@pytest.mark.parametrize("engine", ["nats", "redis"])
def test_a_killed_server_comes_back_with_all_that_it_acknowledged_and_is_followed_on(engine: str, started: Started):
    url, server = started(engine)
    store = log_at(f"{url}?timeout=2s")
    publish(store, 1, 5)
    marker = store.marker("made.bars")
    with follow(f"{url}?timeout=2s", "made.bars", group="g", takeover_seconds=1.0) as following:
        for _ in range(3):
            next(following).ack()
        for round_ in range(2):
            server.kill()
            with pytest.raises(StoreError, match=r"is the server up|did not answer"):
                store.write(batch("made.bars", bars(), 99))
            threading.Timer(0.5, server.start).start()
            found = [next(following)]
            found[-1].ack()
            assert found[-1].id == f"lane:{4 + round_}"
    assert (store.marker("made.bars"), store.committed("made.bars", "lane")) == (marker, 5)
    publish(store, 1, 7)
    assert ids(url, group="g", takeover_seconds=1.0) == ["lane:6", "lane:7"]
    assert ids(url) == [f"lane:{seq}" for seq in range(1, 8)]
    store.close()


@pytest.mark.parametrize("engine", ["nats", "redis"])
def test_a_follower_waits_for_its_server_whatever_it_asks_of_it(
    engine: str, started: Started, monkeypatch: pytest.MonkeyPatch
):
    def away_once(cursor: object, what: str) -> None:
        ask, left = getattr(cursor, what), [what]

        def asked(*given: object) -> object:
            if left:
                raise StoreError(f"the server is away as {left.pop()} is asked for")
            return ask(*given)

        monkeypatch.setattr(cursor, what, asked)

    url, _ = started(engine)
    url += "?compression=none&max_payload=8KB"
    store = log_at(url)
    publish(store, 1, 1)
    store.write(batch("made.bars", bars(rows=300), 2))
    with follow(url, "made.bars", group="g") as following:
        first = next(following)
        away_once(following._cursor, "done")
        first.ack()
        away_once(following._cursor, "done")
        away_once(following._cursor, "fetch")
        monkeypatch.setattr(following, "_parts", Forgotten())
        second = next(following)
        second.ack()
        assert (first.id, second.id, second.frame.height) == ("lane:1", "lane:2", 600)
    assert ids(url, group="g") == []
    store.close()


class Forgotten(dict):
    """Parts that another member of the group was given."""

    def pop(self, *_: object) -> dict:
        return {}


def test_what_a_publisher_left_behind_belongs_to_no_batch(started: Started):
    class Dies(list):
        def __iter__(self):
            yield from list.__iter__(self[:3])
            raise RuntimeError("killed")

    url, _ = started("nats")
    url += "?compression=none&max_payload=8KB"
    store = log_at(url)
    publish(store, 1, 1)
    publish_whole = store.journal.publish
    store.journal.publish = lambda dataset, lane, seq, parts: publish_whole(dataset, lane, seq, Dies(parts))  # pyright: ignore[reportAttributeAccessIssue]
    for rows in (600, 500):
        with pytest.raises(RuntimeError, match="killed"):
            store.write(batch("made.bars", bars(rows=rows), 2))
    assert store.info("made.bars").rows == 7
    assert ids(url) == ids(url, group="g") == ["lane:1"]
    after = log_at(url)
    assert after.committed("made.bars", "lane") == 1
    after.write(batch("made.bars", bars(rows=400), 3))
    assert [(each.id, each.frame.height) for each in batches(url, "made.bars")] == [("lane:1", 6), ("lane:3", 800)]
    assert ids(url, group="g") == ["lane:3"]
    store.close()
    after.close()


@pytest.mark.parametrize(("engine", "limit"), [("nats", "max_messages=4"), ("redis", "max_messages=1")])
def test_a_limit_drops_the_oldest_and_no_lane_is_published_again(engine: str, limit: str, started: Started):
    url, _ = started(engine, *(() if engine == "nats" else ("--stream-node-max-entries", "2")))
    store = log_at(f"{url}?{limit}")
    publish(store, 1, 9)
    found = ids(url)
    assert found[-1] == "lane:9"
    assert len(found) < 6
    assert store.write(batch("made.bars", bars(), 9)).already
    assert store.committed("made.bars", "lane") == 9
    store.close()


def test_a_batch_of_which_the_server_dropped_a_part_is_told_as_lost(started: Started, caplog):
    url, _ = started("nats")
    store = log_at(f"{url}?compression=none&max_payload=8KB&max_messages=40")
    publish(store, 1, 1)
    store.write(batch("made.bars", bars(rows=600), 2))
    publish(store, 3, 7)
    with follow(url, "made.bars", idle_seconds=0) as following:
        assert [each.id for each in following] == [f"lane:{seq}" for seq in range(3, 8)]
        assert following.lost == 1
    assert "lane:2 is lost" in caplog.text
    store.close()


SHORT = {"nats": (), "redis": ("--stream-node-max-entries", "1")}  # a redis cuts whole nodes of its streams


@pytest.mark.parametrize("engine", ["nats", "redis"])
def test_a_follower_that_was_too_slow_is_told_that_whole_batches_are_gone(engine: str, started: Started, caplog):
    url, _ = started(engine, *SHORT[engine])
    store = log_at(f"{url}?max_messages=4")
    publish(store, 1, 6)
    assert ids(url) == ids(url, group="late") == [f"lane:{seq}" for seq in range(3, 7)]
    assert caplog.text == "", "what was gone before they came is not lost to them"
    for group, first in ((None, 7), ("g", 17)):
        with follow(url, "made.bars", group=group, idle_seconds=0) as following:
            for last, lost in ((first - 1, 0), (first + 1, 0), (first + 8, 1)):
                publish(store, 1, last)
                found = [each.id for each in following if each.ack() is None]
                assert (found[-1], following.lost) == (f"lane:{last}", lost)
        publish(store, 1, 16)
    other = log_at(f"{url}?max_messages=4")
    for seq in range(1, 6):
        other.write(batch("made.bars", bars(first=seq * 100, rows=3), seq, lane="another"))
    with follow(url, "made.bars", group="g", idle_seconds=0) as following:
        found = next(following)
        assert (found.id, following.lost) == ("another:2", 1)
        found.ack()
    assert "made.bars: batches before another:2 are lost here" in caplog.text
    caplog.clear()
    for lane, seq in (("lane", 26), ("another", 6), ("third", 1)):  # whichever lane comes
        other.write(batch("made.bars", bars(rows=3), seq, lane=lane))
        ids(url, group="g")
    assert caplog.text == ""
    for each in (store, other):
        each.close()


@pytest.mark.parametrize("engine", ["nats", "redis"])
def test_a_batch_that_the_limits_would_cut_as_it_is_published_is_refused(engine: str, started: Started):
    url, _ = started(engine)
    limits = ["max_messages=3"] if engine == "redis" else ["max_messages=3", "max_bytes=20KB"]
    for limit in limits:
        store = log_at(f"{url}?compression=none&max_payload=8KB&{limit}")
        publish(store, 1, 1)
        with pytest.raises(StoreError, match=rf"{limit.partition('=')[0]}=\d+ in the URL has no room for it"):
            store.write(batch("made.bars", bars(rows=600), 2))
        assert store.committed("made.bars", "lane") == 1
        assert ids(url) == ["lane:1"]
        store.close()


def test_a_redis_cuts_by_age_as_its_own_clock_has_it(started: Started, monkeypatch: pytest.MonkeyPatch):
    url, _ = started("redis", *SHORT["redis"])
    store = log_at(f"{url}?max_age=1h")
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 7200)
    publish(store, 1, 3)
    assert len(ids(url)) == 3
    store.close()
    short = log_at(f"{url}?max_age=1s")
    time.sleep(1.1)
    publish(short, 4, 4)
    assert ids(url) == ["lane:4"]
    short.close()


def test_a_redis_that_drops_keys_when_its_memory_is_full_is_refused(started: Started):
    url, _ = started("redis", "--maxmemory", "50mb", "--maxmemory-policy", "allkeys-lru")
    for more in ("", "?durable=false"):
        store = log_at(url + more)
        with pytest.raises(StoreError, match=r"is a cache: .*maxmemory-policy allkeys-lru\): set that to noeviction"):
            store.ensure("made.bars", BARS)
        store.close()
    url, _ = started("redis", "--maxmemory", "50mb", "--maxmemory-policy", "volatile-lru")
    store = log_at(url)
    publish(store, 1, 1)
    store.close()


@pytest.mark.slow
def test_a_redis_that_is_one_of_a_cluster_is_told_with_what_to_do(started: Started):
    urls, buses = [], [free_port(), free_port()]
    for bus in buses:
        urls.append(started("redis", "--cluster-enabled", "yes", "--cluster-port", str(bus))[0])
    with Redis.from_url(urls[0]) as one, Redis.from_url(urls[1]) as other:
        other.execute_command("CLUSTER ADDSLOTSRANGE 0 16383")
        one.execute_command(f"CLUSTER MEET 127.0.0.1 {urlsplit(urls[1]).port} {buses[1]}")
        until = time.monotonic() + 20
        said = b""
        while b"cluster_state:ok" not in said and time.monotonic() < until:
            time.sleep(0.05)
            said = bytes(one.execute_command("CLUSTER", "INFO") or b"")
    store = log_at(urls[0])
    with pytest.raises(StoreError, match="one of a cluster, which MarketSync cannot use"):
        store.marker("made.bars")
    store.close()


def test_two_datasets_whose_consumers_would_have_one_name_are_not_mixed_up(started: Started):
    url, _ = started("nats")
    store = log_at(url)
    for dataset in ("made.bars-old", "made-bars.old"):
        store.ensure(dataset, BARS)
        store.write(batch(dataset, bars(rows=2), 1, lane=dataset))
    (found,) = batches(url, "made.bars-old", group="g")
    assert found.id == "made.bars-old:1"
    with pytest.raises(ConfigurationError, match=r"follows MARKET\.made\.bars-old\..*give the group another name"):
        list(batches(url, "made-bars.old", group="g"))
    (found,) = batches(url, "made-bars.old", group="other")
    assert found.id == "made-bars.old:1"
    store.close()


def test_a_redis_that_forgets_is_refused_unless_that_is_accepted(started: Started):
    url, _ = started("redis", "--appendonly", "no")
    with pytest.raises(StoreError, match=r"appendonly yes\), or accept that with \?durable=false"):
        log_at(url).ensure("made.bars", BARS)
    store = log_at(f"{url}?durable=false")
    publish(store, 1, 2)
    assert ids(url) == ["lane:1", "lane:2"]
    store.close()


def test_replicas_that_are_not_there_are_told(started: Started):
    url, _ = started("redis")
    store = log_at(f"{url}?replicas=1&timeout=1s")
    with pytest.raises(StoreError, match="on its disk, or on 1 replicas, within 1 s"):
        store.ensure("made.bars", BARS)
    url, _ = started("nats")
    with pytest.raises(StoreError, match="replicas"):
        log_at(f"{url}?replicas=3").ensure("made.bars", BARS)


def test_a_stream_that_would_lose_batches_is_refused_and_one_that_fits_is_used(started: Started):
    url, _ = started("nats")

    async def make(**options) -> None:
        import nats

        client = await nats.connect(url.rpartition("/")[0])
        await client.jetstream().add_stream(**options)
        await client.close()

    asyncio.run(make(name="QUEUE", subjects=["QUEUE.>"], retention="workqueue"))
    asyncio.run(make(name="LAST", subjects=["LAST.>"], max_msgs_per_subject=1))
    asyncio.run(make(name="OTHER", subjects=["OTHER.one"]))
    asyncio.run(make(name="MARKET", subjects=["MARKET.>"], max_age=3600))
    for name, why in (("QUEUE", "make it limits"), ("LAST", "max_msgs_per_subject"), ("OTHER", "does not take")):
        with pytest.raises(StoreError, match=f"{name} .* cannot be a store: .*{why}"):
            log_at(f"{url.rpartition('/')[0]}/{name}").ensure("made.bars", BARS)
    store = log_at(url)
    publish(store, 1, 1)
    assert ids(url) == ["lane:1"]
    store.close()


def test_a_deletion_that_names_too_many_subjects_is_refused(started: Started):
    store = log_at(started("nats")[0])
    publish(store, 1, 1)
    with pytest.raises(StoreError, match="name fewer subjects"):
        store.delete("made.bars", Filter([f"SYMBOL-{n}" for n in range(1000)]))
    store.close()


@pytest.mark.parametrize(
    ("engine", "options", "who", "words"),
    [
        ("nats", ("authorization: {user: me, password: pa55word}",), "me:wr0ng", "user and password"),
        ("redis", ("--requirepass", "pa55word"), ":wr0ng", "user and password"),
    ],
)
def test_wrong_credentials_are_told_without_showing_them(engine, options, who, words, started: Started):
    url, _ = started(engine, *options)
    scheme, _, rest = url.partition("://")
    store = log_at(f"{scheme}://{who}@{rest}")
    with pytest.raises(StoreError, match=words) as refused:
        store.ensure("made.bars", BARS)
    assert "wr0ng" not in str(refused.value)
    store.close()
    right = log_at(f"{scheme}://{who.replace('wr0ng', 'pa55word')}@{rest}")
    publish(right, 1, 1)
    assert "pa55word" not in right.url + right.name
    right.close()


@pytest.mark.parametrize("url", ["nats://127.0.0.1:9/MARKET", "redis://127.0.0.1:9/0"])
def test_a_server_that_is_not_there_is_named_with_what_to_look_at(url: str):
    store = log_at(url)
    with pytest.raises(StoreError, match=r"127\.0\.0\.1:9.*looking for made\.bars: .*is the server up"):
        store.marker("made.bars")
    store.close()
    with pytest.raises(StoreError, match="closed"):
        store.marker("made.bars")


def test_a_nats_without_jetstream_is_told(started: Started):
    _, server = started("nats")
    server.kill()
    (server.folder / "nats.conf").write_text(f"listen: 127.0.0.1:{server.port}\n")
    server.start()
    store = log_at(f"nats://127.0.0.1:{server.port}/MARKET")
    with pytest.raises(StoreError, match="is JetStream on"):
        store.ensure("made.bars", BARS)
    store.close()


@pytest.mark.parametrize("engine", ["nats", "redis"])
def test_a_connection_is_encrypted_and_its_server_verified(engine: str, started: Started, tmp_path, caplog):
    made = made_certificates(tmp_path)
    with ExitStack() as stack:
        if engine == "nats":
            url, _ = started("nats", f'tls {{ cert_file: "{made / "server.pem"}", key_file: "{made / "server.key"}" }}')
        else:  # the wheel's server does not speak TLS
            _, server = started("redis")
            url = f"rediss://127.0.0.1:{stack.enter_context(tls_front(server.port, made))}/0"
        ours = f"{url}?ca_cert={made / 'ca.pem'}"
        store = log_at(ours)
        publish(store, 1, 1)
        assert ids(ours) == ids(f"{url}?verify=false") == ["lane:1"]
        store.close()
        stranger = log_at(f"{url}?verify=true")
        with pytest.raises(StoreError, match="ca_cert, client_cert and verify"):
            stranger.marker("made.bars")
        stranger.close()
    assert caplog.text == ""


def test_a_batch_that_redis_took_and_nobody_saw_on_its_disk_is_waited_for_before_it_counts(redis: str):
    store, seen = log_at(redis), log_at(redis)
    publish(store, 1, 1)

    def waits() -> int:
        with Redis.from_url(redis.partition("?")[0]) as client:
            said: Any = client.info("commandstats")
        return int(said.get("cmdstat_waitaof", {}).get("calls", 0))

    before = waits()
    assert store.committed("made.bars", "lane") == 1
    assert waits() == before, "this process has seen it on the disk itself"
    assert [seen.committed("made.bars", "lane") for _ in range(2)] == [1, 1]
    assert waits() == before + 1
    assert seen.committed("made.bars", "another") == 0


@pytest.mark.parametrize("engine", ["nats", "redis"])
def test_a_store_goes_on_in_a_process_that_was_forked_and_in_its_parent(engine: str, request: pytest.FixtureRequest):
    store = log_at(request.getfixturevalue(engine))
    publish(store, 1, 1)
    child = os.fork()
    if not child:
        try:
            right = store.committed("made.bars", "lane") == 1
            store.close()
            os._exit(0 if right else 1)
        except BaseException:  # noqa: BLE001 - the tests go on in the parent alone
            os._exit(2)
    until = time.monotonic() + 20
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < until:
        time.sleep(0.02)
    if ended == (0, 0):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert ended == (child, 0)
    publish(store, 2, 2)
    assert store.committed("made.bars", "lane") == 2
    store.close()
