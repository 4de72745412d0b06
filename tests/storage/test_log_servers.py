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

import pytest
from followed_logs import batches
from private_nats import PrivateServer, private_nats
from private_redis import private_redis
from private_tls import made_certificates, tls_front
from redis import Redis
from stored_frames import BARS, bars, batch

from marketsync.errors import StoreError
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
    store = log_at(f"{url}?compression=none&max_payload=8KB&max_messages=4")
    publish(store, 1, 1)
    store.write(batch("made.bars", bars(rows=600), 2))
    publish(store, 3, 3)
    with follow(url, "made.bars", idle_seconds=0) as following:
        assert [each.id for each in following] == ["lane:3"]
        assert following.lost == 1
    assert "lane:2 is lost" in caplog.text
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
