"""NATS JetStream as a log of batches: `nats://user@host:4222/STREAM`.

A batch is published under `STREAM.provider.dataset.batch.LANE`, each part expecting the lane's last one: what the
server keeps as the last message of that subject says what is committed, however long ago that was, and two who believe
that a lane is theirs cannot both go on. Descriptions (marker, schemas) are in a stream beside it, `STREAM_schemas`,
which no limit of the first one empties; they name the stream that they were written for, by the time when it was made.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import logging
import os
import re
import ssl
import threading
import uuid
from collections.abc import Coroutine
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote, unquote, urlsplit

from marketsync.errors import ConfigurationError, StoreError
from storage import log, messages
from storage.log import Arrived, Described, LogStore
from storage.messages import Format, Message

if TYPE_CHECKING:
    from nats.aio.client import Client
    from nats.js.api import ConsumerConfig, RawStreamMsg, StreamConfig, StreamInfo
    from nats.js.client import JetStreamContext

CAPABILITIES = log.capabilities(Format.ARROW)

Result = TypeVar("Result")

_HEADER_BYTES = 4096  # of a message, at most: what its rows may be is that much less than a message may be
_STREAM = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_FORGOTTEN_SECONDS = 300.0  # how long the server remembers a consumer without a group that asks for nothing
_ANSWERS_SECONDS = 1.0  # how long after its time an answer may come
_CREATED = "marketsync-stream"
_EXPECTED = "Nats-Expected-Last-Subject-Sequence"
_WRONG_LAST = 10071  # the error of a publisher that expected another last message
_OPTIONS = {
    "ca_cert": str,
    "client_cert": str,
    "client_key": str,
    "creds": str,
    "discard": log.one_of("old", "new"),
    "max_age": log.seconds_of,
    "max_bytes": log.bytes_of,
    "max_messages": log.count_of,
    "max_payload": log.bytes_of,
    "replicas": log.count_of,
    "storage": log.one_of("file", "memory"),
    "timeout": log.seconds_of,
    "tls": log.switch_of,
    "token": str,
    "verify": log.switch_of,
}


@dataclass
class _Tail:
    """Where a lane ends, as far as this process knows: the place of its last message, and its last whole batch; and
    the place of the dataset's last message."""

    place: int
    committed: int
    latest: int


def _no_end_of_tls(record: logging.LogRecord) -> bool:
    """Leave out what asyncio says of the client each time that a connection with TLS ends, which changes nothing."""
    return "eof_received" not in str(record.msg)


class Loop:
    """One event loop in one thread, for a client that only speaks asyncio."""

    def __init__(self) -> None:
        logging.getLogger("asyncio").addFilter(_no_end_of_tls)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="nats", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Run a coroutine to its end, in the loop's thread."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        """End the thread."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@dataclass
class NatsJournal:
    """One stream of one server or cluster; a connection that broke is made anew by the next call."""

    url: str
    servers: list[str]
    stream: str
    said: dict[str, Any]
    _loop: Loop | None = None
    _client: Client | None = None
    _lock: threading.RLock = field(default_factory=threading.RLock)
    _tails: dict[tuple[str, str], _Tail] = field(default_factory=dict)
    _closed: bool = False
    _process: int = field(default_factory=os.getpid)
    _last_error: BaseException | None = None

    # descriptions

    def described(self, dataset: str) -> Described:
        return self.run(self._described(dataset), f"looking for {dataset}")

    async def _described(self, dataset: str) -> Described:
        last = await self._last(self._schemas, f"{self._schemas}.{dataset}")
        if last is None:
            return Described(None, "0")
        # asked afterwards: before, the stream of a description that is there may not have been made yet
        live = (last.headers or {}).get(_CREATED) == await self._made()
        return Described((last.data or b"").decode() if live else None, str(last.seq))

    def describe(self, dataset: str, text: str, version: str) -> bool:
        return self.run(self._describe(dataset, text, version), f"describing {dataset}")

    async def _describe(self, dataset: str, text: str, version: str) -> bool:
        from nats.js.errors import APIError

        made = await self._make()
        heads = {_EXPECTED: version, _CREATED: made}
        try:
            await self.jet.publish(f"{self._schemas}.{dataset}", text.encode(), headers=heads, stream=self._schemas)
        except APIError as error:
            if error.err_code == _WRONG_LAST:
                return False
            raise
        return True

    async def _made(self) -> str | None:
        """Return when the stream was made, by which it is told from another of its name; None when there is none."""
        from nats.js.errors import NotFoundError

        try:
            return _when(await self.jet.stream_info(self.stream))
        except NotFoundError:
            return None

    async def _make(self) -> str:
        """Make the two streams where they are not there; refuse one that would lose batches."""
        from nats.js.api import StorageType, StreamConfig
        from nats.js.errors import BadRequestError, NotFoundError

        said = self.said
        storage = StorageType(said.get("storage", "file"))
        subjects = [f"{self.stream}.*.*.batch.*"]
        wanted = StreamConfig(
            name=self.stream,
            subjects=subjects,
            storage=storage,
            num_replicas=said.get("replicas", 1),
            max_age=said.get("max_age"),
            max_bytes=said.get("max_bytes"),
            max_msgs=said.get("max_messages"),
            discard=said.get("discard", "old"),
        )
        beside = StreamConfig(
            name=self._schemas,
            subjects=[f"{self._schemas}.*.*"],
            storage=storage,
            num_replicas=said.get("replicas", 1),
            max_msgs_per_subject=1,
        )
        made = ""
        for config in (beside, wanted):
            try:
                found = await self.jet.stream_info(str(config.name))
            except NotFoundError:
                try:
                    found = await self.jet.add_stream(config)
                except BadRequestError:  # made by another process in between, with other options
                    found = await self.jet.stream_info(str(config.name))
            self._refuse_losing(found.config, config)
            made = _when(found)
        return made

    def _refuse_losing(self, found: StreamConfig, wanted: StreamConfig) -> None:
        wrong = []
        if str(found.retention) not in ("limits", "RetentionPolicy.LIMITS"):
            wrong.append(f"its retention is {found.retention}, so that what was delivered is forgotten; make it limits")
        kept = found.max_msgs_per_subject
        if wanted.max_msgs_per_subject != kept and (kept or -1) > 0:
            wrong.append(f"it keeps only {kept} messages a subject; take max_msgs_per_subject away")
        if not any(_covers(subject, str((wanted.subjects or [""])[0])) for subject in found.subjects or ()):
            wrong.append(f"it does not take {', '.join(wanted.subjects or ())}; add that to its subjects")
        if wrong:
            raise StoreError(f"the stream {found.name} in {self.url} cannot be a store: {'; '.join(wrong)}")

    # batches

    @property
    def most(self) -> int:
        """The bytes that the rows of a message may have."""
        allowed = self.run(self._payload(), "connecting")
        return max(1024, min(allowed, self.said.get("max_payload", allowed)) - _HEADER_BYTES - 64)

    async def _payload(self) -> int:
        return self.client.max_payload

    def committed(self, dataset: str, lane: str) -> int:
        with self._lock:
            tail = self.run(self._tail(dataset, lane), f"reading the lanes of {dataset}")
            self._tails[dataset, lane] = tail
            return tail.committed

    async def _tail(self, dataset: str, lane: str) -> _Tail:
        subject = self._subject(dataset, lane)
        last = await self._last(self.stream, self.subjects(dataset))
        latest = 0 if last is None else int(last.seq or 0)
        if last is not None and last.subject != subject:
            last = await self._last(self.stream, subject)
        if last is None:
            return _Tail(0, 0, latest)
        said = messages.envelope(Message(last.headers or {}, b""))
        return _Tail(int(last.seq or 0), said.seq if said.last else said.before, latest)

    def publish(self, dataset: str, lane: str, seq: int, parts: list[Message]) -> bool:
        log.refuse_beyond(self.said, dataset, parts)
        with self._lock:
            tail = self._tails.pop((dataset, lane), None)
            if tail is None:
                tail = self.run(self._tail(dataset, lane), f"reading the lanes of {dataset}")
            if tail.committed >= seq:
                return False
            place = self.run(self._publish(dataset, lane, tail, parts), f"publishing to {dataset}")
            self._tails[dataset, lane] = _Tail(place, seq, place)
            return True

    async def _publish(self, dataset: str, lane: str, tail: _Tail, parts: list[Message]) -> int:
        from nats.js.errors import APIError

        subject, token = self._subject(dataset, lane), uuid.uuid4().hex
        place, previous = tail.place, ""
        for part in parts:
            heads = {
                **part.headers,
                "before": str(tail.committed),
                "previous": previous,
                "after": str(tail.latest),
                _EXPECTED: str(place),
                "Nats-Msg-Id": f"{token}.{part.headers['part']}",
            }
            self._refuse_long(dataset, heads)
            try:
                place = (await self.jet.publish(subject, part.data, headers=heads, stream=self.stream)).seq
            except APIError as error:
                if error.err_code == _WRONG_LAST:
                    raise StoreError(
                        f"NATS {self.url}: another process has published to lane {lane} of {dataset} since this one "
                        "looked; what is committed is to be read again before the lane goes on"
                    ) from error
                raise
            previous = str(place)
        return place

    def _refuse_long(self, dataset: str, heads: dict[str, str]) -> None:
        if sum(len(name) + len(value) + 4 for name, value in heads.items()) > _HEADER_BYTES:
            raise StoreError(
                f"what is said about a batch of {dataset} is longer than the headers of a message may be: name fewer "
                "subjects at once"
            )

    async def _last(self, stream: str, subject: str) -> RawStreamMsg | None:
        """Return the last message of a subject; None when there is none."""
        from nats.js.errors import NotFoundError

        try:
            return await self.jet.get_last_msg(stream, subject)
        except NotFoundError:
            return None

    # the rest

    def datasets(self) -> list[str]:
        return self.run(self._datasets(), "listing the logs")

    async def _datasets(self) -> list[str]:
        from nats.js.errors import NotFoundError

        try:
            found = await self.jet.stream_info(self._schemas, subjects_filter=">")
        except NotFoundError:
            return []
        names = [subject.partition(".")[2] for subject in found.state.subjects or {}]
        return [name for name in names if (await self._described(name)).text is not None]

    def kept(self, dataset: str) -> tuple[int, int]:
        return self.run(self._kept(dataset), f"measuring {dataset}")

    async def _kept(self, dataset: str) -> tuple[int, int]:
        found = await self.jet.stream_info(self.stream, subjects_filter=f"{self.stream}.{dataset}.>")
        alone = len({tuple(subject.split(".")[1:3]) for subject in found.state.subjects or {}}) == 1
        counted = sum((found.state.subjects or {}).values())
        return counted, found.state.bytes if alone and counted == found.state.messages else 0

    def version(self) -> str:
        return self.run(self._version(), "asking for the version")

    async def _version(self) -> str:
        said = self.client.connected_server_version
        return f"NATS {said.major}.{said.minor}.{said.patch}"

    def cursor(self, dataset: str, group: str | None, start: datetime | str, takeover_seconds: float) -> NatsCursor:
        return NatsCursor(self, dataset, group, start, takeover_seconds)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._leave_parent()
            if self._loop is None:
                return
            if self._client is not None and not self._client.is_closed:
                self._loop.run(self._client.close())
            self._loop.close()
            self._loop = None

    # how it is done

    @property
    def _schemas(self) -> str:
        return f"{self.stream}_schemas"

    def subjects(self, dataset: str) -> str:
        """Return the subjects of all lanes of a dataset."""
        return f"{self.stream}.{dataset}.batch.*"

    def _subject(self, dataset: str, lane: str) -> str:
        return f"{self.stream}.{dataset}.batch.{quote(lane, safe='').replace('.', '%2E')}"

    @property
    def client(self) -> Client:
        """The connection, for what `run` runs."""
        assert self._client is not None
        return self._client

    @property
    def jet(self) -> JetStreamContext:
        """What streams and consumers are asked by, for what `run` runs."""
        return self.client.jetstream(timeout=self.seconds)

    @property
    def seconds(self) -> float:
        """How long the server may take to answer."""
        return self.said.get("timeout", 10.0)

    def run(self, work: Coroutine[Any, Any, Result], what: str) -> Result:
        """Run what asks the server; raises `StoreError` that says what was being done, where, and why it failed."""
        import nats.errors

        try:
            try:
                with self._lock:
                    loop = self._connected()
            except BaseException:
                work.close()
                raise
            return loop.run(work)
        except (nats.errors.Error, OSError, TimeoutError, concurrent.futures.CancelledError) as error:
            why = self._why(error)
            raise StoreError(f"NATS {self.url}, {what}: {why}") from error

    def _leave_parent(self) -> None:
        """Forget the thread and the connection of the process that this one was forked from: the thread is not here."""
        if self._process != os.getpid():
            self._process, self._loop, self._client = os.getpid(), None, None

    def _connected(self) -> Loop:
        if self._closed:
            raise StoreError(f"the store {self.url} was closed; open it again")
        self._leave_parent()
        if self._loop is None:
            self._loop = Loop()
        if self._client is None or not self._client.is_connected:
            self._tails.clear()
            self._last_error = None
            self._client = self._loop.run(self._connect())
        return self._loop

    async def _connect(self) -> Client:
        import nats

        said = self.said
        given: dict[str, Any] = {name: said[name] for name in ("user", "password", "token") if name in said}
        if "creds" in said:
            given["user_credentials"] = said["creds"]
        if (context := self._tls()) is not None:
            given["tls"] = context
        return await nats.connect(
            self.servers,
            name="marketsync",
            error_cb=self._hear,
            allow_reconnect=False,
            max_reconnect_attempts=1,
            reconnect_time_wait=0.1,  # pyright: ignore[reportArgumentType]
            connect_timeout=self.seconds,
            **given,
        )

    async def _hear(self, error: Exception) -> None:
        self._last_error = error

    def _tls(self) -> ssl.SSLContext | None:
        said = self.said
        if not said.get("tls", any(option in said for option in ("ca_cert", "client_cert", "verify"))):
            return None
        context = ssl.create_default_context(cafile=said.get("ca_cert"))
        if "client_cert" in said:
            context.load_cert_chain(said["client_cert"], said.get("client_key"))
        if not said.get("verify", True):
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return context

    def _why(self, error: BaseException) -> str:
        import nats.errors
        import nats.js.errors

        if isinstance(error, nats.js.errors.ServiceUnavailableError | nats.js.errors.NoStreamResponseError):
            return (
                "nothing answers for the stream; is JetStream on (nats-server -js), is the stream there, and may this "
                "user ask for it?"
            )
        if isinstance(error, nats.js.errors.APIError):
            return f"{error.description} (error {error.err_code})"
        cause = self._last_error if isinstance(error, nats.errors.NoServersError) and self._last_error else error
        said = " ".join(str(cause).split()) or type(cause).__name__
        if isinstance(cause, nats.errors.AuthorizationError) or "uthorization" in said:
            return f"{said}; are user and password (or token, or creds) those that the server knows?"
        if isinstance(cause, ssl.SSLError) or "TLS" in said:
            return f"{said}; see tls, ca_cert, client_cert and verify in the URL"
        if isinstance(cause, TimeoutError):
            return "the server did not answer in time; see timeout in the URL"
        return f"{said}; is the server up, and does the URL name its host and port?"


@dataclass
class NatsCursor:
    """A consumer that is asked for each message; one at a time is out. It is a durable one of the group's name, or one
    of its own."""

    journal: NatsJournal
    dataset: str
    group: str | None
    start: datetime | str
    takeover_seconds: float
    _consumer: str = ""  # as the server knows it
    _after: int = 0

    def next(self, seconds: float) -> Arrived | None:
        try:
            return self.journal.run(self._next(seconds), f"following {self.dataset}")
        except StoreError:
            self._consumer = ""  # it may be gone, and what it gave out on its way here is lost without a group
            raise

    async def _next(self, seconds: float) -> Arrived | None:
        from nats.errors import TimeoutError as NothingCame
        from nats.js import JetStreamContext
        from nats.js.errors import APIError

        if not self._consumer:
            self._consumer = await self._subscribed()
        asked = {"batch": 1, "expires": int(seconds * 1e9)} if seconds > 0 else {"batch": 1, "no_wait": True}
        where = f"$JS.API.CONSUMER.MSG.NEXT.{self.journal.stream}.{self._consumer}"
        client, text = self.journal.client, json.dumps(asked).encode()
        try:
            # in the old style: what comes has the subject that it was published under, not that of an inbox
            found = await client.request(where, text, timeout=seconds + _ANSWERS_SECONDS, old_style=True)
        except NothingCame:
            # While another member of the group has a message the server does not say that there is none.
            await client.flush(int(self.journal.seconds))
            if self.group is None:
                self._consumer = ""  # it may have given something out on the way here
            return None
        if (status := JetStreamContext.is_status_msg(found)) is not None:
            if status in ("404", "408"):
                return None
            raise APIError.from_msg(found)
        heads, place = found.headers or {}, found.metadata.sequence.stream
        gap = await self._gap(int(heads.get("after", 0)))
        self._after = place
        return Arrived(str(place), found.reply, Message(heads, found.data), gap)

    async def _gap(self, after: int) -> bool:
        """Tell whether the message at this place, which came before, was not given to this follower, or its group."""
        if after <= self._after:
            return False
        if self.group is None:
            return self._after > 0
        known = (await self.journal.jet.consumer_info(self.journal.stream, self._consumer)).ack_floor
        return known is not None and known.consumer_seq > 0 and after > known.stream_seq

    async def _subscribed(self) -> str:
        from nats.js.errors import NotFoundError

        jet, stream = self.journal.jet, self.journal.stream
        if self.group is None:
            return (await jet.add_consumer(stream, self._config(f"follow-{uuid.uuid4().hex}"))).name
        name = f"{self.group}-{self.dataset.replace('.', '-')}"
        try:
            config = (await jet.consumer_info(stream, name)).config
            if config.filter_subject != self.journal.subjects(self.dataset):
                raise ConfigurationError(
                    f"NATS {self.journal.url}: the consumer {name} follows {config.filter_subject}, and would be that "
                    f"of the group {self.group} and {self.dataset} as well: give the group another name"
                )
            config.ack_wait = self.takeover_seconds
        except NotFoundError:
            config = self._config(name)
        await jet.add_consumer(stream, config)
        return name

    def _config(self, name: str) -> ConsumerConfig:
        from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy

        config = ConsumerConfig(name=name, filter_subject=self.journal.subjects(self.dataset))
        if self.group is None and self._after:
            config.deliver_policy, config.opt_start_seq = DeliverPolicy.BY_START_SEQUENCE, self._after + 1
        elif isinstance(self.start, datetime):
            config.deliver_policy, config.opt_start_time = DeliverPolicy.BY_START_TIME, self.start
        elif self.start == "new":
            config.deliver_policy = DeliverPolicy.NEW
        if self.group is None:
            config.ack_policy, config.inactive_threshold = AckPolicy.NONE, _FORGOTTEN_SECONDS
        else:
            config.durable_name, config.ack_wait = name, self.takeover_seconds
            config.max_ack_pending = 1  # which keeps the order, whoever of the group has it
        return config

    def fetch(self, place: str) -> Message | None:
        return self.journal.run(self._fetch(int(place)), f"following {self.dataset}")

    async def _fetch(self, place: int) -> Message | None:
        from nats.js.errors import NotFoundError

        try:
            found = await self.journal.jet.get_msg(self.journal.stream, place)
        except NotFoundError:
            return None
        return Message(found.headers or {}, found.data or b"")

    def done(self, arrived: Arrived) -> None:
        if self.group is not None:
            self.journal.run(self._told(arrived.receipt, b"+ACK"), f"acknowledging a batch of {self.dataset}")

    def hold(self, arrived: Arrived) -> None:
        if self.group is not None:
            self.journal.run(self._said(arrived.receipt, b"+WPI"), f"following {self.dataset}")

    def close(self, out: Arrived | None) -> None:
        """Give back what is out; the server forgets a consumer without a group by itself."""
        if self.group is not None and out is not None:
            self.journal.run(self._said(out.receipt, b"-NAK"), f"giving back a batch of {self.dataset}")

    async def _told(self, receipt: str, word: bytes) -> None:
        await self.journal.client.request(receipt, word, timeout=self.journal.seconds)

    async def _said(self, receipt: str, word: bytes) -> None:
        await self.journal.client.publish(receipt, word)
        await self.journal.client.flush()


def open_url(url: str, name: str) -> LogStore:
    """Open `nats://user:password@host:port/STREAM`; raises `ConfigurationError` for a URL that cannot be meant."""
    parts = urlsplit(url)
    who, _, hosts = parts.netloc.rpartition("@")
    stream = unquote(parts.path[1:])
    if not hosts or not _STREAM.fullmatch(stream):
        raise ConfigurationError(
            f"the store {name} names no stream: write nats://user@host:4222/STREAM, with letters, digits, _ and - in it"
        )
    said = log.options(name, "nats", parts.query, _OPTIONS)
    if who:
        user, colon, password = who.partition(":")
        said |= {"user": unquote(user), "password": unquote(password)} if colon else {"token": unquote(user)}
    servers = [f"nats://{host}" for host in hosts.split(",")]
    shown = f"nats://{hosts}/{stream}"
    journal = NatsJournal(shown, servers, stream, said)
    return LogStore(shown, name, journal, said.get("format", Format.ARROW), said.get("compression", "zstd"))


def _when(info: StreamInfo) -> str:
    return "" if info.created is None else info.created.isoformat()


def _covers(subject: str, wanted: str) -> bool:
    """Tell whether a subject with wildcards takes all that another one takes."""
    theirs, ours = subject.split("."), wanted.split(".")
    for place, token in enumerate(theirs):
        if token == ">":
            return len(ours) > place
        if place >= len(ours) or (token not in ("*", ours[place])):
            return False
    return len(theirs) == len(ours)
