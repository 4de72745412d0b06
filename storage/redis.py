"""Redis Streams (or Valkey) as a log of batches: `redis://user@host:6379/0`, `rediss://` for TLS.

A dataset is three keys: `marketsync:{provider.dataset}` is the stream, with `:lanes` behind it a hash with the seq of
each lane, with `:about` one with the description. One script looks at the lane's seq, moves it, and adds all parts of a
batch: the server does that whole or not at all, and the seq stays when the stream is cut to a length. A delivery waits
until the server's append-only file is on its disk.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from marketsync.errors import ConfigurationError, StoreError
from storage import log
from storage.log import Arrived, Described, LogStore
from storage.messages import Format, Message

if TYPE_CHECKING:
    import redis

CAPABILITIES = log.capabilities(Format.ARROW)

_PAYLOAD = 8 << 20  # bytes of a message's rows, unless the URL says otherwise
_LOOK_SECONDS = 0.5  # how long a follower listens before it looks again
_GIVEN_UP_MS = 10**10
_DATA = "data"
_OPTIONS = {
    "ca_cert": str,
    "client_cert": str,
    "client_key": str,
    "durable": log.switch_of,
    "max_age": log.seconds_of,
    "max_messages": log.count_of,
    "max_payload": log.bytes_of,
    "prefix": str,
    "replicas": log.count_of,
    "timeout": log.seconds_of,
    "verify": log.switch_of,
}

# stream, lanes, about; lane, seq, MAXLEN or MINID or '', entries or milliseconds, how many parts; for each: how many
# texts, the texts. Ages are counted by the server's clock, as the entries are.
_PUBLISH = """
if redis.call('EXISTS', KEYS[1]) == 0 or redis.call('EXISTS', KEYS[3]) == 0 then return {'gone'} end
local before = redis.call('HGET', KEYS[2], ARGV[1]) or '0'
if tonumber(before) >= tonumber(ARGV[2]) then return {'already'} end
local most = ARGV[4]
if ARGV[3] == 'MINID' then
  local now = redis.call('TIME')
  most = string.format('%.0f', math.max(0, now[1] * 1000 + math.floor(now[2] / 1000) - ARGV[4]))
end
local at, previous, after = 6, '', redis.call('HGET', KEYS[3], 'last') or ''
for part = 1, tonumber(ARGV[5]) do
  local call = {'XADD', KEYS[1]}
  if ARGV[3] ~= '' then
    call[#call + 1] = ARGV[3]
    call[#call + 1] = '~'
    call[#call + 1] = most
  end
  call[#call + 1] = '*'
  local count = tonumber(ARGV[at])
  for field = at + 1, at + count do call[#call + 1] = ARGV[field] end
  at = at + count + 1
  for _, said in ipairs({'before', before, 'previous', previous, 'after', after}) do call[#call + 1] = said end
  previous = redis.call(unpack(call))
end
redis.call('HSET', KEYS[2], ARGV[1], ARGV[2])
redis.call('HSET', KEYS[3], 'last', previous)
return {'done', previous}
"""

# stream, lanes, about; the lane, whose seq is written once more, so that there is something to wait for
_AGAIN = """
local seq = redis.call('HGET', KEYS[2], ARGV[1])
if seq then redis.call('HSET', KEYS[2], ARGV[1], seq) end
return seq
"""

# stream, lanes, about; the text, the version that it follows on
_DESCRIBE = """
local live = redis.call('EXISTS', KEYS[1]) == 1 and redis.call('EXISTS', KEYS[3]) == 1
local version = live and redis.call('HGET', KEYS[3], 'version') or '0'
if version ~= ARGV[2] then return 0 end
if not live then
  redis.call('DEL', KEYS[1], KEYS[2], KEYS[3])
  redis.call('XGROUP', 'CREATE', KEYS[1], 'marketsync-makes', '$', 'MKSTREAM')
  redis.call('XGROUP', 'DESTROY', KEYS[1], 'marketsync-makes')
end
redis.call('HSET', KEYS[3], 'text', ARGV[1], 'version', tonumber(version) + 1)
return 1
"""

# stream; group, member, milliseconds after which a message is taken over. One message is out at a time, which keeps the
# order, whoever of the group has it.
_NEXT = """
local out = redis.call('XPENDING', KEYS[1], ARGV[1], '-', '+', 1)
if #out > 0 then
  local id, owner, idle = out[1][1], out[1][2], out[1][3]
  if owner ~= ARGV[2] and idle < tonumber(ARGV[3]) then return {'wait'} end
  local taken = redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, id)
  if taken[1] then return {'one', taken[1][1], taken[1][2], ''} end
  redis.call('XACK', KEYS[1], ARGV[1], id)
  return {'again'}
end
local before = ''
for _, group in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do
  local said = {}
  for field = 1, #group, 2 do said[group[field]] = group[field + 1] end
  if said['name'] == ARGV[1] then before = said['last-delivered-id'] end
end
local read = redis.call('XREADGROUP', 'GROUP', ARGV[1], ARGV[2], 'COUNT', 1, 'STREAMS', KEYS[1], '>')
if not read then return {'none'} end
return {'one', read[1][2][1][1], read[1][2][1][2], before}
"""


@dataclass
class RedisJournal:
    """Streams of one database of one server. Threads share the connections of one pool."""

    url: str
    place: dict[str, Any]
    said: dict[str, Any]
    _client: redis.Redis | None = None
    _lock: threading.RLock = field(default_factory=threading.RLock)
    _keeps: bool = False  # the server was looked at, and does
    _settled: dict[tuple[str, str], int] = field(default_factory=dict)  # the seq of each lane that is on the disk
    _closed: bool = False

    @property
    def most(self) -> int:
        """The bytes that the rows of a message may have."""
        return self.said.get("max_payload", _PAYLOAD)

    @property
    def _durable(self) -> bool:
        return self.said.get("durable", True)

    # descriptions

    def described(self, dataset: str) -> Described:
        stream, _, about = self.keys(dataset)
        with self.asked(f"looking for {dataset}") as client:
            both: Any = client.pipeline(transaction=True)
            both.exists(stream)
            both.hgetall(about)
            there, said = both.execute()
        if not there or not said:
            return Described(None, "0")
        return Described(said[b"text"].decode(), said[b"version"].decode())

    def describe(self, dataset: str, text: str, version: str) -> bool:
        self._refuse_forgetful()
        with self.asked(f"describing {dataset}") as client:
            done = self._durably(client, _DESCRIBE, dataset, [text, version])
        return bool(done)

    # batches

    def committed(self, dataset: str, lane: str) -> int:
        with self.asked(f"reading the lanes of {dataset}") as client:
            found: Any = client.hget(self.keys(dataset)[1], lane)
            if found and self._settled.get((dataset, lane)) != int(found):
                # it may be of a batch that the server took and nobody saw on its disk, and it is acknowledged by this
                self._refuse_forgetful()
                found = self._durably(client, _AGAIN, dataset, [lane])
                self._settled[dataset, lane] = int(found or 0)
        return int(found or 0)

    def publish(self, dataset: str, lane: str, seq: int, parts: list[Message]) -> bool:
        log.refuse_beyond(self.said, dataset, parts)
        self._refuse_forgetful()
        given: list[Any] = [lane, seq, *self._cut(), len(parts)]
        for part in parts:
            fields = [text for pair in part.headers.items() for text in pair]
            given += [len(fields) + 2, *fields, _DATA, part.data]
        with self.asked(f"publishing to {dataset}") as client:
            said = self._durably(client, _PUBLISH, dataset, given)
        if said[0] == b"gone":
            raise StoreError(f"Redis {self.url}: the log of {dataset} was deleted; the next run makes it anew")
        if said[0] == b"done":
            self._settled[dataset, lane] = seq
        return said[0] == b"done"

    def _cut(self) -> tuple[str, str]:
        """Return by what the stream is cut with each message."""
        if "max_messages" in self.said:
            return "MAXLEN", str(self.said["max_messages"])
        if "max_age" in self.said:
            return "MINID", str(int(self.said["max_age"] * 1000))
        return "", ""

    def _durably(self, client: redis.Redis, script: str, dataset: str, given: list[Any]) -> Any:
        """Run a script, and wait on the same connection until what it did is on the server's disk and its replicas'."""
        replicas = self.said.get("replicas", 0)
        most = int(1000 * self.said.get("timeout", 10.0))
        pipeline = client.pipeline(transaction=False)
        pipeline.eval(script, 3, *self.keys(dataset), *given)
        if self._durable:
            pipeline.execute_command("WAITAOF", 1, replicas, most)
        elif replicas:
            pipeline.execute_command("WAIT", replicas, most)
        did, *waited = pipeline.execute()
        local, others = waited[0] if self._durable else (0, waited[0] if waited else 0)
        if (self._durable and local < 1) or others < replicas:
            raise StoreError(
                f"Redis {self.url}: the server took a batch of {dataset} and has not put it on its disk, or on "
                f"{replicas} replicas, within {most / 1000:g} s; it is asked again what it has"
            )
        return did

    def _refuse_forgetful(self) -> None:
        """Refuse a server that would forget what it has acknowledged: on its way down, or when its memory is full."""
        if self._keeps:
            return
        with self.asked("asking whether it keeps what it is given") as client:
            said: Any = {**client.info("persistence"), **client.info("memory")}  # pyright: ignore[reportGeneralTypeIssues]
        if self._durable and not said.get("aof_enabled"):
            raise StoreError(
                f"Redis {self.url} keeps its data in memory alone or in snapshots, and would forget batches that it "
                "has acknowledged: turn its append-only file on (appendonly yes), or accept that with ?durable=false"
            )
        policy = str(said.get("maxmemory_policy", ""))
        if int(said.get("maxmemory", 0)) and policy.startswith("allkeys"):
            raise StoreError(
                f"Redis {self.url} is a cache: when its memory is full it drops whole logs, with batches that it has "
                f"acknowledged (maxmemory-policy {policy}): set that to noeviction, or use another server"
            )
        self._keeps = True

    # the rest

    def datasets(self) -> list[str]:
        before, after = self.keys("\0")[2].split("\0")
        with self.asked("listing the logs") as client:
            keys = [key.decode() for key in client.scan_iter(match=f"{_escaped(before)}*{after}", count=1000)]
        names = [key[len(before) : -len(after)] for key in keys]
        return [name for name in names if self.described(name).text is not None]

    def kept(self, dataset: str) -> tuple[int, int]:
        stream = self.keys(dataset)[0]
        with self.asked(f"measuring {dataset}") as client:
            count: Any = client.xlen(stream)
            size: Any = client.memory_usage(stream)
        return int(count), int(size or 0)

    def version(self) -> str:
        with self.asked("asking for the version") as client:
            said: Any = client.info("server")
        found = said.get("valkey_version")
        return f"Valkey {found}" if found else f"Redis {said['redis_version']}"

    def cursor(self, dataset: str, group: str | None, start: datetime | str, takeover_seconds: float) -> RedisCursor:
        return RedisCursor(self, dataset, group, start, takeover_seconds)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            if self._client is not None:
                self._client.close()
                self._client = None

    # how it is done

    def keys(self, dataset: str) -> tuple[str, str, str]:
        """Return the keys of a dataset: the stream, its lanes, what was written down about it."""
        stream = f"{self.said.get('prefix', 'marketsync')}:{{{dataset}}}"  # braces keep them on one node of a cluster
        return stream, f"{stream}:lanes", f"{stream}:about"

    @contextmanager
    def asked(self, what: str) -> Iterator[redis.Redis]:
        """Yield the client; what it raises becomes a `StoreError` that says what was being done, where, and why."""
        import redis

        try:
            yield self._connected()
        except (redis.RedisError, OSError) as error:
            raise StoreError(f"Redis {self.url}, {what}: {_why(error)}") from error

    def _connected(self) -> redis.Redis:
        import redis
        from redis.backoff import NoBackoff
        from redis.retry import Retry

        with self._lock:
            if self._closed:
                raise StoreError(f"the store {self.url} was closed; open it again")
            if self._client is None:
                # A batch that may have been taken is asked for before it is sent again, so nothing is repeated here.
                never = Retry(NoBackoff(), 0)
                self._client = redis.Redis(**self.place, retry=never, protocol=2, client_name="marketsync")
            return self._client


@dataclass
class RedisCursor:
    """A consumer group, of whose stream one message at a time is out, or a place that only this follower knows."""

    journal: RedisJournal
    dataset: str
    group: str | None
    start: datetime | str
    takeover_seconds: float
    _member: str = field(default_factory=lambda: uuid.uuid4().hex)
    _after: str = ""
    _given: bool = False  # whether anything was, to this follower or its group
    _dropped: bool = False  # a message that a member of the group had not acknowledged
    _joined: bool = False

    def next(self, seconds: float) -> Arrived | None:
        with self.journal.asked(f"following {self.dataset}") as client:
            until = time.monotonic() + seconds
            while True:
                found = self._take(client) if self.group is not None else self._read(client)
                if found is not None:
                    return found
                left = until - time.monotonic()
                if left <= 0:
                    return None
                self._listen(client, min(left, _LOOK_SECONDS))

    def _take(self, client: redis.Redis) -> Arrived | None:
        stream = self.journal.keys(self.dataset)[0]
        if not self._joined:
            self._join(client, stream)
        while True:
            wait = int(self.takeover_seconds * 1000)
            said: Any = client.eval(_NEXT, 1, stream, self.group or "", self._member, str(wait))
            if said[0] == b"one":
                found = _arrived(said[1], dict(zip(said[2][::2], said[2][1::2], strict=True)))
                return self._after_gap(found, said[3].decode())
            if said[0] == b"wait":
                time.sleep(min(_LOOK_SECONDS, self.takeover_seconds) / 5)
            if said[0] != b"again":
                return None
            self._dropped = True

    def _join(self, client: redis.Redis, stream: str) -> None:
        import redis

        try:
            client.xgroup_create(stream, self.group or "", self._begin(client, stream))
        except redis.ResponseError as error:
            if not str(error).startswith("BUSYGROUP"):
                raise
            self._given = True
        self._joined = True

    def _after_gap(self, found: Arrived, before: str) -> Arrived:
        """Tell by the place of what was given before whether anything between is gone."""
        after = found.message.headers.get("after", "")
        known = self._given and before not in ("", "0-0")
        gap = self._dropped or (known and bool(after) and _order(after) > _order(before))
        self._given, self._dropped = True, False
        return replace(found, gap=gap)

    def _begin(self, client: redis.Redis, stream: str) -> str:
        """Return the id after which the first message is wanted."""
        if isinstance(self.start, datetime):
            since = int(self.start.timestamp() * 1000)
            return f"{since - 1}-18446744073709551615" if since > 0 else "0-0"
        if self.start != "new":
            return "0-0"
        said: Any = client.xinfo_stream(stream)
        return said["last-generated-id"].decode()

    def _read(self, client: redis.Redis) -> Arrived | None:
        stream = self.journal.keys(self.dataset)[0]
        if not self._after:
            self._after = self._begin(client, stream)
        said: Any = client.xread({stream: self._after}, count=1)
        if not said:
            return None
        ((place, fields),) = said[0][1]
        found = self._after_gap(_arrived(place, fields), self._after)
        self._after = found.place
        return found

    def _listen(self, client: redis.Redis, seconds: float) -> None:
        """Return when something is published, or the time is over."""
        stream = self.journal.keys(self.dataset)[0]
        client.xread(
            {stream: "$" if self.group is not None else self._after}, count=1, block=max(1, int(seconds * 1000))
        )

    def fetch(self, place: str) -> Message | None:
        with self.journal.asked(f"following {self.dataset}") as client:
            found: Any = client.xrange(self.journal.keys(self.dataset)[0], place, place)
        return _arrived(*found[0]).message if found else None

    def done(self, arrived: Arrived) -> None:
        if self.group is not None:
            with self.journal.asked(f"acknowledging a batch of {self.dataset}") as client:
                client.xack(self.journal.keys(self.dataset)[0], self.group, arrived.receipt)

    def hold(self, arrived: Arrived) -> None:
        if self.group is not None:
            with self.journal.asked(f"following {self.dataset}") as client:
                stream = self.journal.keys(self.dataset)[0]
                client.xclaim(stream, self.group, self._member, 0, [arrived.receipt], justid=True)

    def close(self, out: Arrived | None) -> None:
        """Leave the group; a message that is out stays this member's, and is as good as given up."""
        if self.group is None or not self._joined:
            return
        with self.journal.asked(f"leaving the group {self.group}") as client:
            stream = self.journal.keys(self.dataset)[0]
            if out is not None:
                client.xclaim(stream, self.group, self._member, 0, [out.receipt], idle=_GIVEN_UP_MS, justid=True)
            else:
                client.xgroup_delconsumer(stream, self.group, self._member)


def open_url(url: str, name: str) -> LogStore:
    """Open `redis://user:password@host:port/number`; raises `ConfigurationError` for a URL that cannot be meant."""
    parts = urlsplit(url)
    example = f"{parts.scheme}://user@host:6379/0"
    number = parts.path.strip("/") or "0"
    try:
        port = parts.port or 6379
    except ValueError as error:
        raise ConfigurationError(f"the store {name}: {error}; write {example}") from error
    if not parts.hostname or not number.isdigit():
        raise ConfigurationError(f"the store {name} names no host, or a database that is no number: write {example}")
    said = log.options(name, parts.scheme, parts.query, _OPTIONS)
    seconds = said.get("timeout", 10.0)
    place: dict[str, Any] = {"host": parts.hostname, "port": port, "db": int(number)}
    place |= {"socket_connect_timeout": seconds, "socket_timeout": 2 * seconds + _LOOK_SECONDS}
    if parts.username:
        place["username"] = unquote(parts.username)
    if parts.password is not None:
        place["password"] = unquote(parts.password)
    if parts.scheme == "rediss":
        place |= {"ssl": True, "ssl_ca_certs": said.get("ca_cert")}
        place |= {"ssl_certfile": said.get("client_cert"), "ssl_keyfile": said.get("client_key")}
        if not said.get("verify", True):
            place |= {"ssl_cert_reqs": "none", "ssl_check_hostname": False}
    shown = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}/{number}"
    journal = RedisJournal(shown, place, said)
    return LogStore(shown, name, journal, said.get("format", Format.ARROW), said.get("compression", "zstd"))


def _arrived(place: bytes, fields: dict[bytes, bytes]) -> Arrived:
    at = place.decode()
    heads = {name.decode(): value.decode() for name, value in fields.items() if name != _DATA.encode()}
    return Arrived(at, at, Message(heads, fields[_DATA.encode()]))


def _order(place: str) -> tuple[int, ...]:
    """Return a place as what it is sorted by."""
    return tuple(map(int, place.split("-")))


def _escaped(text: str) -> str:
    return "".join(f"\\{each}" if each in "*?[]\\^-" else each for each in text)


def _why(error: Exception) -> str:
    import redis.exceptions

    said = " ".join(str(error).split()).rstrip(".")
    if isinstance(error, redis.exceptions.AuthenticationError):
        return f"{said}; are user and password those that the server knows?"
    if "CERTIFICATE" in said or "SSL" in said:
        return f"{said}; see ca_cert, client_cert and verify in the URL"
    if isinstance(error, redis.exceptions.OutOfMemoryError):
        return f"{said}; give the server more memory, or cut the streams with max_messages or max_age in the URL"
    if isinstance(error, redis.exceptions.MovedError) or "cluster mode" in said:
        return f"{said}; it is one of a cluster, which MarketSync cannot use: name a server of its own"
    if isinstance(error, redis.ConnectionError | redis.TimeoutError | OSError):
        return f"{said}; is the server up, and does the URL name its host, port and user?"
    return said
