"""One request, one answer: HTTP over requests, inside the limits, inside a deadline, inside a size.

What a request says is made elsewhere, and so is what its answer means: a provider's misbehaviour is never raised here
but told in `Answer.trouble`. A simulator takes the place of `HttpTransport` by having its `send` (`Transport`).

requests-ratelimiter's adapter is where requests meets the limiter. Its own `send` always weighs 1, stamps a request
when it is asked for, and fills its bucket at each 429; ours passes the weight and leaves the reservation to be
answered when the last byte has come.
"""

from __future__ import annotations

import logging
import os
import socket
import ssl
import threading
import time
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from http.client import IncompleteRead
from typing import Any, Protocol
from urllib.parse import urljoin, urlsplit

import pyrate_limiter
import requests
import urllib3
from requests.adapters import HTTPAdapter
from requests.structures import CaseInsensitiveDict
from requests_ratelimiter import LimiterAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from marketsync.clock import Clock
from marketsync.errors import ConfigurationError
from providers.limits import Limiter, Reservation
from providers.redaction import RequestLogFilter, redact

MAX_BODY_BYTES = 512 << 20
MAX_REDIRECTS = 5
CHUNK_BYTES = 1 << 20
WATCH_SECONDS = 0.2  # how much later than its deadline a request is cut off at most
CONNECTIONS = 64  # kept open to one host
_EXPANSION = 1032  # deflate cannot make more of a byte; what might outgrow the bound is read in pieces

logging.getLogger("urllib3.connectionpool").addFilter(RequestLogFilter())


class Trouble(StrEnum):
    """Why there is no whole answer. The first four may pass when asked again; the others will not."""

    TIMEOUT = "timeout"  # not whole by the deadline
    CONNECTION = "connection"  # refused, reset, not resolved, no TLS
    TRUNCATED = "truncated"  # fewer bytes than announced
    MALFORMED_ENCODING = "malformed_encoding"  # not what Content-Encoding says
    REDIRECT = "redirect"  # to another host (credentials stay here), or in circles
    TOO_LARGE = "too_large"  # more bytes than are kept in memory

    @property
    def passing(self) -> bool:
        """Whether asking again may help."""
        return self not in (Trouble.REDIRECT, Trouble.TOO_LARGE)


@dataclass(frozen=True)
class HttpRequest:
    """One request, ready to be sent: credentials are in it, so only `label` may be shown.

    `url` is percent-encoded; `timeout_seconds` is for the whole answer from the reservation on.
    """

    method: str
    url: str = field(repr=False)
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    body: bytes | None = field(default=None, repr=False)
    timeout_seconds: float = 30.0
    weight: int = 1
    dataset: str = ""
    label: str = ""


@dataclass(frozen=True)
class Answer:
    """What came back. With `trouble`, `message` tells a person, `body` is empty, and `status` is 0 if none came."""

    status: int
    headers: Mapping[str, str] = field(repr=False)
    body: bytes = field(repr=False)
    sent_at: datetime
    answered_at: datetime
    trouble: Trouble | None = None
    message: str = ""


class Transport(Protocol):
    """Whatever sends a request and brings its answer."""

    def send(
        self,
        request: HttpRequest,
        limiter: Limiter,
        *,
        max_wait_seconds: float = 600.0,
        wake: threading.Event | None = None,
        priority: int = 0,
    ) -> Answer:
        """Wait for room in the limits, send, return the answer; raises only what `Limiter.reserve` raises."""
        ...


class HttpTransport:
    """Sends over real sockets. Thread-safe; keeps connections open; proxies and TLS as the environment says."""

    def __init__(self, clock: Clock, max_body_bytes: int = MAX_BODY_BYTES):
        self.clock = clock
        self.max_body_bytes = max_body_bytes
        self._sessions: dict[int, _Session] = {}
        self._settings: dict[str, Mapping[str, Any]] = {}
        self._lock = threading.Lock()
        _live.add(self)

    def forget(self) -> object:
        """Leave every connection open and to others, and begin anew; return what was left."""
        left, self._sessions, self._lock = self._sessions, {}, threading.Lock()
        return left

    def send(
        self,
        request: HttpRequest,
        limiter: Limiter,
        *,
        max_wait_seconds: float = 600.0,
        wake: threading.Event | None = None,
        priority: int = 0,
    ) -> Answer:
        """Send one request (and, on the same host, what it is redirected to; each reserves its own room).

        Raises
        ------
        WaitingForQuota, Interrupted, ConfigurationError
            As `Limiter.reserve` does. Nothing that the provider or the network does is raised.
        """
        session = self._sessions.get(id(limiter)) or self._open(limiter)
        method, url, body = request.method, request.url, request.body
        redirects = 0
        while True:
            asked = _Asked(method, url, request, body, max_wait_seconds, wake, priority)
            answer, location = self._once(session, asked)
            if location is None:
                return answer
            redirects += 1
            if redirects > MAX_REDIRECTS:
                return _troubled(
                    answer,
                    Trouble.REDIRECT,
                    f"{request.label or request.method} was redirected {redirects} times over.",
                )
            target = _target(url, location)
            if target is None or not _same_host(url, target):
                host = urlsplit(target).netloc.rpartition("@")[2] if target else "an address that is none"
                return _troubled(
                    answer,
                    Trouble.REDIRECT,
                    f"{request.label or request.method} was redirected to another host ({redact(host)}), where its "
                    "credentials must not go. Correct base_url if the provider has moved.",
                )
            if answer.status == 303 or (answer.status in (301, 302) and method == "POST"):
                method, body = "GET", None
            url = target

    def close(self) -> None:
        """Close every connection."""
        with self._lock:
            for session in self._sessions.values():
                session.close()
            self._sessions.clear()

    def _open(self, limiter: Limiter) -> _Session:
        with self._lock:
            if id(limiter) not in self._sessions:
                self._sessions[id(limiter)] = _Session(limiter)
            return self._sessions[id(limiter)]

    def _environment(self, session: requests.Session, url: str) -> Mapping[str, Any]:
        """Proxies, certificates and TLS verification for the URL's host, read from the environment once."""
        scheme, _, rest = url.partition("://")
        origin = f"{scheme}://{rest.partition('/')[0].partition('?')[0]}"
        settings = self._settings.get(origin)
        if settings is None:
            merged = session.merge_environment_settings(origin, {}, True, None, None)
            settings = self._settings[origin] = dict(merged)
        return settings

    def _once(self, session: _Session, asked: _Asked) -> tuple[Answer, str | None]:
        """Send once; return the answer and, for a redirect, where to."""
        trouble: Trouble | None = None
        message, status, body = "", 0, b""
        headers: Mapping[str, str] = {}
        try:
            url = asked.prepare_address()
            response = session.get_adapter(url).send(asked, **self._environment(session, url))
            status, headers = response.status_code, response.headers
            body = _read(response.raw, self.max_body_bytes)
            if asked.watched is not None and asked.watched.expired:
                raise _Overdue  # http.client takes the end of a connection for the end of headers, or of a body
            if not body and 200 <= status < 300 and _ends_with_its_connection(response.raw, status):
                raise IncompleteRead(b"")
        except _ANTICIPATED as error:
            if asked.reservation is None and not isinstance(error, _Overdue):
                asked.never_sent = True
            trouble, message = _explain(error, asked)
            body = b""
        finally:
            reservation, at = asked.reservation, self.clock.timestamp()
            if asked.watched is not None:
                asked.watched.done()
            if reservation is not None and trouble is not Trouble.TIMEOUT:
                # after a time-out the provider may still be at it: the room stays taken until the time-out's instant
                if asked.never_sent:
                    reservation.unsent()
                else:
                    reservation.answered(at)
        answered_at = datetime.fromtimestamp(at, UTC)
        sent_at = answered_at if asked.sent_at is None else datetime.fromtimestamp(asked.sent_at, UTC)
        answer = Answer(status, headers, body, sent_at, answered_at, trouble, message)
        moved = status in (301, 302, 303, 307, 308) and trouble is None
        return answer, headers.get("location") if moved else None


# ---------------------------------------------------------------- requests, and requests-ratelimiter


class _Asked(requests.PreparedRequest):
    """A request on its way, ready for an adapter, and what became of it."""

    def __init__(
        self,
        method: str,
        url: str,
        request: HttpRequest,
        body: bytes | None,
        max_wait_seconds: float,
        wake: threading.Event | None,
        priority: int,
    ):
        super().__init__()
        self.request = request
        self.max_wait_seconds, self.wake, self.priority = max_wait_seconds, wake, priority
        self.reservation: Reservation | None = None
        self.watched: _Watched | None = None
        self.sent_at: float | None = None
        self.never_sent = False
        self.method = method
        self.url = url
        headers = {"User-Agent": "marketsync", "Accept": "*/*", "Accept-Encoding": _ENCODINGS, **request.headers}
        for name, value in headers.items():
            if not (value.isprintable() and (value.isascii() or _is_latin(value))):
                raise ConfigurationError(
                    f"The header {name} of {request.label or method} holds a line break or another character that "
                    "headers cannot hold, so the request was not sent. Does a secret's file or variable end in one?"
                )
        self.headers = CaseInsensitiveDict(headers)
        self.body = body
        if body is not None:
            self.headers["Content-Length"] = str(len(body))
        elif method in ("POST", "PUT", "PATCH"):
            self.headers["Content-Length"] = "0"

    def prepare_address(self) -> str:
        """Return the URL as it is sent; requests.RequestException when it cannot be."""
        url = self.url or ""
        if not url.isascii() or " " in url:
            self.prepare_url(url, None)
        return self.url or ""


_ENCODINGS = "gzip, deflate"  # how much these can expand is known


def _is_latin(text: str) -> bool:
    try:
        text.encode("latin-1")
    except UnicodeEncodeError:
        return False
    return True


class _Overdue(Exception):
    """The time for the answer ran out before the request was sent."""


class _Adapter(LimiterAdapter):
    """requests-ratelimiter's adapter, with our reservations in place of its acquiring."""

    def __init__(self, limiter: Limiter):
        self.reserving = limiter
        bucket = pyrate_limiter.SingleBucketFactory(limiter.bucket, schedule_leak=False)
        super().__init__(
            limiter=pyrate_limiter.Limiter(bucket),
            per_host=False,
            bucket_name=limiter.name,
            max_retries=urllib3.Retry(0, read=False),
            pool_connections=CONNECTIONS,
            pool_maxsize=CONNECTIONS,
        )

    def init_poolmanager(self, *args: Any, **options: Any) -> None:
        super().init_poolmanager(*args, **options)
        self.poolmanager.pool_classes_by_scheme = {"http": _HttpPool, "https": _HttpsPool}

    def proxy_manager_for(self, proxy: str, **options: Any) -> Any:
        manager = super().proxy_manager_for(proxy, **options)
        if getattr(manager, "pool_classes_by_scheme", {}).get("http") is HTTPConnectionPool:
            manager.pool_classes_by_scheme = {"http": _HttpPool, "https": _HttpsPool}
        return manager

    def send(self, request: requests.PreparedRequest, **settings: Any) -> requests.Response:
        """Reserve room, then send; the answer's time is for the caller to record, when the body has been read."""
        if not isinstance(request, _Asked):
            raise TypeError("only HttpTransport sends through this adapter: it says what a request weighs")
        what = request.request
        limiter = self.reserving
        reservation = limiter.reserve(
            what.dataset, what.weight, what.timeout_seconds, request.max_wait_seconds, request.wake, request.priority
        )
        request.reservation = reservation
        request.sent_at = limiter.clock.timestamp()
        remaining = reservation.deadline - request.sent_at
        if remaining <= 0:
            request.never_sent = True
            raise _Overdue
        request.watched = _Watched(remaining)
        settings["timeout"] = urllib3.Timeout(total=remaining)
        return HTTPAdapter.send(self, request, **settings)

    def build_response(self, req: requests.PreparedRequest, resp: Any) -> requests.Response:
        """Return what is needed of a response: no cookie is ever kept."""
        response = requests.Response()
        response.status_code = resp.status
        response.headers = CaseInsensitiveDict(resp.headers)
        response.raw = resp
        return response


class _Session(requests.Session):
    """A session with one limiter's adapter mounted; nothing in it changes once it is made, so threads share it."""

    def __init__(self, limiter: Limiter):
        super().__init__()
        self.limiter = limiter  # kept alive: sessions are found by its identity
        adapter = _Adapter(limiter)
        self.mount("https://", adapter)
        self.mount("http://", adapter)


def _target(url: str, location: str) -> str | None:
    """Return where a Location header leads, or None where that is no address."""
    try:
        target = urljoin(url, location.encode("latin-1").decode("utf-8", "replace"))
        urlsplit(target).port  # noqa: B018 - reading it is what checks it
    except (ValueError, UnicodeError):
        return None
    return target


def _same_host(here: str, there: str) -> bool:
    """Whether credentials for `here` may go to `there`: the same host and port, and never from TLS to plain text."""
    old, new = urlsplit(here), urlsplit(there)
    try:
        same = (old.scheme, old.hostname, _port(old)) == (new.scheme, new.hostname, _port(new))
        upgraded = (old.scheme, _port(old), new.scheme, _port(new)) == ("http", 80, "https", 443)
    except ValueError:  # a port that is none
        return False
    return new.scheme in ("http", "https") and (same or (upgraded and old.hostname == new.hostname))


def _port(url: Any) -> int:
    return url.port or (443 if url.scheme == "https" else 80)


# ---------------------------------------------------------------- reading


class _TooLarge(Exception):
    pass


def _read(raw: Any, most: int) -> bytes:
    """Read and unpack a whole body of at most `most` bytes."""
    length, encoding = raw.length_remaining, raw.headers.get("content-encoding")
    expansion = 1 if encoding is None else _EXPANSION if encoding in ("gzip", "deflate") else None
    if length is not None and expansion is not None and length * expansion <= most:
        body = raw.read(decode_content=True)
    else:
        pieces, size = [], length if length is not None and length > most else 0
        while size <= most and (piece := raw.read(CHUNK_BYTES, decode_content=True)):
            size += len(piece)
            pieces.append(piece)
        if size > most:
            raw.close()
            raw.release_conn()
            raise _TooLarge
        body = b"".join(pieces)
    if encoding is not None:
        # urllib3 takes the end of the message for the end of what was packed in it
        unpacking = getattr(getattr(raw, "_decoder", None), "_obj", None)
        if body and getattr(unpacking, "eof", True) is False:
            raise IncompleteRead(b"")
    return body or b""


def _ends_with_its_connection(raw: Any, status: int) -> bool:
    """Whether only the connection's end marked the body's: an empty body may then be an answer cut in its headers."""
    framed = raw.length_remaining is not None or getattr(raw, "chunked", False)
    return status != 204 and not framed and raw.headers.get("content-length") is None


# ---------------------------------------------------------------- what can go wrong

_ANTICIPATED = (
    requests.RequestException,
    urllib3.exceptions.HTTPError,
    IncompleteRead,
    OSError,
    UnicodeError,
    _Overdue,
    _TooLarge,
)


def _explain(error: Exception, asked: _Asked) -> tuple[Trouble, str]:
    """Return what an exception means, and a sentence without any secret."""
    label = asked.request.label or asked.request.method
    chain = list(_causes(error))
    seconds = f"{asked.request.timeout_seconds:g} s"
    if isinstance(error, _TooLarge):
        return Trouble.TOO_LARGE, (
            f"The answer to {label} is larger than the bound on one answer. Ask for less at once (a smaller window, "
            "page or batch)."
        )
    unconnected = any(
        isinstance(cause, urllib3.exceptions.NewConnectionError | urllib3.exceptions.ConnectTimeoutError)
        for cause in chain
    )
    asked.never_sent = asked.never_sent or unconnected
    overdue = asked.watched is not None and asked.watched.expired
    timed_out = any(
        isinstance(cause, _TIMEOUTS) and not isinstance(cause, urllib3.exceptions.NewConnectionError) for cause in chain
    )
    if isinstance(error, _Overdue) or overdue or (timed_out and not unconnected):
        return Trouble.TIMEOUT, f"No whole answer to {label} came within {seconds}; it is asked again."
    if any(isinstance(cause, urllib3.exceptions.DecodeError) for cause in chain):
        return Trouble.MALFORMED_ENCODING, f"The answer to {label} is not packed as its Content-Encoding says."
    if any(isinstance(cause, IncompleteRead) for cause in chain):
        return Trouble.TRUNCATED, f"The answer to {label} ended before all of its bytes had come; it is asked again."
    if timed_out:
        return Trouble.CONNECTION, f"No connection for {label} could be made within {seconds}; it is tried again."
    distrusted = next((cause for cause in chain if isinstance(cause, ssl.SSLCertVerificationError)), None)
    if distrusted is not None:
        asked.never_sent = True
        return Trouble.CONNECTION, (
            f"The certificate of the server for {label} is not trusted ({distrusted.verify_message}), so nothing was "
            "sent. Behind a proxy that signs for others, name its certificate in REQUESTS_CA_BUNDLE."
        )
    last = chain[-1]
    why = (last.strerror if isinstance(last, OSError) and last.strerror else None) or f"{last}" or type(last).__name__
    return Trouble.CONNECTION, f"The connection for {label} failed: {_without_url(redact(why), asked)}."


_TIMEOUTS = (TimeoutError, requests.Timeout, urllib3.exceptions.TimeoutError)


def _causes(error: BaseException) -> Any:
    """Yield the exception and what lies beneath it, as requests and urllib3 wrap it."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        inner = getattr(current, "reason", None)
        if not isinstance(inner, BaseException):
            inner = next((arg for arg in current.args if isinstance(arg, BaseException)), None)
        current = inner or current.__cause__


def _without_url(text: str, asked: _Asked) -> str:
    url = asked.url or ""
    for part in (url, url.partition("://")[2].partition("/")[2], urlsplit(url).query):
        if part:
            text = text.replace(part, "...")
    return text.rstrip(".")


def _troubled(answer: Answer, trouble: Trouble, message: str) -> Answer:
    return Answer(answer.status, answer.headers, b"", answer.sent_at, answer.answered_at, trouble, message)


# ---------------------------------------------------------------- deadlines


class _Watched:
    """A request with a deadline: its connection is shut down when the time has run out.

    A socket's own time-out starts anew with every byte, so a server that trickles would never meet it. Watching costs
    a request two dictionary operations; one thread looks at all of them five times a second while there are any.
    """

    __slots__ = ("connection", "deadline", "expired", "sock")

    def __init__(self, seconds: float):
        self.deadline = time.monotonic() + seconds
        self.connection: HTTPConnection | None = None
        self.sock: socket.socket | None = None
        self.expired = False
        _watch.add(self)
        _current.watched = self

    def done(self) -> None:
        """Watch no more."""
        _watch.remove(self)
        _current.watched = None
        self.connection = self.sock = None


class _Watch:
    def __init__(self) -> None:
        self._watched: dict[int, _Watched] = {}
        self._any = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def add(self, watched: _Watched) -> None:
        self._watched[id(watched)] = watched
        if not self._any.is_set():
            with self._lock:
                if self._thread is None or not self._thread.is_alive():
                    self._thread = threading.Thread(target=self._run, name="deadlines", daemon=True)
                    self._thread.start()
                self._any.set()

    def remove(self, watched: _Watched) -> None:
        self._watched.pop(id(watched), None)

    def _run(self) -> None:
        while True:
            self._any.wait()
            time.sleep(WATCH_SECONDS)
            now = time.monotonic()
            for watched in list(self._watched.values()):
                if watched.deadline <= now:
                    self._cut(watched)
            if not self._watched:
                self._any.clear()
                if self._watched:  # added between the two lines above
                    self._any.set()

    def _cut(self, watched: _Watched) -> None:
        connection = watched.connection
        sock = watched.sock or getattr(connection, "sock", None)
        if sock is None or getattr(connection, "watched", None) is not watched:
            return  # not connected yet, or back in the pool and already another request's
        watched.expired = True
        try:
            sock.shutdown(socket.SHUT_RDWR)
        except (OSError, ValueError):
            return  # closed meanwhile


_watch = _Watch()
_live: weakref.WeakSet[HttpTransport] = weakref.WeakSet()


def _renew_after_fork() -> None:
    """Let a child process open its own connections: two processes that share one would read each other's answers."""
    global _watch
    _watch = _Watch()
    for transport in list(_live):
        _abandoned.append(transport.forget())


_abandoned: list[object] = []  # closing them in the child would end TLS for the parent too
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_after_fork)
_current = threading.local()


def _announce(connection: HTTPConnection) -> None:
    watched = getattr(_current, "watched", None)
    if watched is not None:
        watched.connection = connection
        watched.sock = connection.sock  # http.client forgets it when only the connection's end will end the body
        connection.watched = watched  # pyright: ignore[reportAttributeAccessIssue]


class _HttpConnection(HTTPConnection):
    def connect(self) -> None:
        _announce(self)
        super().connect()
        _announce(self)

    def request(self, *args: Any, **options: Any) -> None:
        _announce(self)
        super().request(*args, **options)


class _HttpsConnection(HTTPSConnection):
    def connect(self) -> None:
        _announce(self)
        super().connect()
        _announce(self)

    def request(self, *args: Any, **options: Any) -> None:
        _announce(self)
        super().request(*args, **options)


class _HttpPool(HTTPConnectionPool):
    ConnectionCls = _HttpConnection  # pyright: ignore[reportAssignmentType]


class _HttpsPool(HTTPSConnectionPool):
    ConnectionCls = _HttpsConnection  # pyright: ignore[reportAssignmentType]
