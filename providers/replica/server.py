"""The replica itself: a small HTTP/1.1 server on loopback that routes to the provider fronts, delays, breaks and logs.

A thread a connection, kept alive, TCP_NODELAY; pages are kept as bytes once made, so that asking again costs little.
The server is written on sockets because half of what it must do (announce a length and send less, reset in the middle
of a body, trickle, hang) is what HTTP libraries exist to prevent.

A control interface for tests in another process, never delayed, limited or logged:

    GET  /_replica/status                 {"now", "until", "requests", "symbols", "rules"}
    GET  /_replica/log?from=N             entries from number N on, one JSON object a line
    POST /_replica/clock                  {"advance": seconds} or {"set": unix seconds or RFC 3339}
    POST /_replica/faults                 a list of rules to replace those in force; {"add": [...]} to add
    POST /_replica/until                  {"until": "2013-02-01" | "2013-02-01T21:30:00Z" | "clock" | null}
    POST /_replica/rows                   [{"symbol", "date" or "ts", "open", ...}] to insert or restate
    POST /_replica/delay                  {"delay": [least, most]} in seconds
"""

from __future__ import annotations

import json
import random
import select
import signal
import socket
import struct
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote

import polars as pl

from marketsync.errors import ConfigurationError
from providers.replica import settings
from providers.replica.alpaca import Alpaca
from providers.replica.exchange import HTML, Answer, Circumstances, Front, Pages, Request, published
from providers.replica.faults import FAULTS, Rule, Schedule
from providers.replica.journal import Entry, Journal
from providers.replica.limits import ALPACA_KEY, ALPACA_SECRET, NASDAQ_KEY, TUSHARE_TOKEN, ReplicaClock, accounts
from providers.replica.market import FrameMarket, Market, open_market
from providers.replica.nasdaq_data_link import Nasdaq
from providers.replica.tushare import Tushare

CACHE_BYTES = 256 * 1024 * 1024
LONGEST_HEAD_BYTES = 64 * 1024
LONGEST_BODY_BYTES = 64 * 1024 * 1024
TRICKLE_PIECES = 20
REASONS = {
    200: "OK",
    204: "No Content",
    400: "Bad Request",
    401: "Unauthorized",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    413: "Payload Too Large",
    422: "Unprocessable Entity",
    429: "Too Many Requests",
    500: "Internal Server Error",
    502: "Bad Gateway",
    503: "Service Unavailable",
}
BAD_GATEWAY = (
    b"<html>\r\n<head><title>502 Bad Gateway</title></head>\r\n"
    b"<body><center><h1>502 Bad Gateway</h1></center></body>\r\n</html>\r\n"
)
MAINTENANCE = (
    b"<!DOCTYPE html>\n<html><head><title>Scheduled maintenance</title></head>"
    b"<body>We will be back soon.</body></html>\n"
)


class Replica:
    """A running stand-in for the three providers; use as a context manager, or `start` and `stop`.

    Parameters
    ----------
    port: 0 for a free one. It stays the same when the replica is stopped and started again.
    data: "bokeh" (five stocks, daily, 2000-2013), "generated:ROWS[xSYMBOLS][:1Day|1Min][:START]", a polars frame
        (symbol, date or ts, open, high, low, close, volume; see `market.open_market`) or a market.
    faults: rules (see `faults`), or the path of a file with rules or with any of these options (see `settings`); an
        option given here wins over the file.
    log: file to which each request is appended as a line of JSON.
    limits: a tier's name for every provider ("unlimited"), or {provider: tier or [{requests, per, zone, each}]}.
        Default: `limits.DEFAULT_TIER`.
    accounts: {provider: {key: {secret, limits, denied}}} in place of a provider's default accounts; see `credentials`.
    delay: (least, most) seconds that the network adds to each answer, uniformly, part of it before the request is
        received.
    seed: of the delays and of the faults' probabilities.
    clock: a function returning Unix seconds, or an object with `timestamp()`; `advance` moves the replica's time on.
    until: rows after this are not published yet: a date (or its ISO text), an aware datetime, "clock" for the
        replica's own time (daily bars at 16:30 New York, minute bars when their minute is over), None for all rows.
    cache_bytes: most memory for finished pages.
    export_polls: how often the bulk export of Nasdaq says "creating" before it is ready.
    host: the address to listen on.

    Raises ConfigurationError when an option is wrong.
    """

    def __init__(
        self,
        port: int = 0,
        data: str | pl.DataFrame | Market | None = None,
        faults: Sequence[Mapping[str, Any]] | str | Path | None = None,
        log: str | Path | None = None,
        limits: str | Mapping[str, Any] | None = None,
        delay: tuple[float, float] | None = None,
        seed: int | None = None,
        clock: Any = time.time,
        accounts: Mapping[str, Mapping[str, Any]] | None = None,
        until: date | datetime | str | None = None,
        cache_bytes: int | None = None,
        export_polls: int | None = None,
        host: str = "127.0.0.1",
    ) -> None:
        stated: dict[str, Any] = {"faults": faults}
        if isinstance(faults, (str, Path)):
            stated = settings.read(faults)

        def option(name: str, given: Any, usual: Any = None) -> Any:
            return given if given is not None else stated.get(name, usual)

        self.clock = ReplicaClock(clock)
        self.host = host
        self.port = port
        self.delay = _delay(option("delay", delay, (0.0, 0.0)))
        self.until = option("until", until)
        self._market = _market(option("data", data, "bokeh"))
        seeded = option("seed", seed, 0)
        self._random = random.Random(seeded)
        self._random_lock = threading.Lock()
        self._schedule = Schedule(stated.get("faults") or [], seeded + 1)
        self._accounts = _accounts(option("limits", limits), option("accounts", accounts))
        self._journal = Journal(log)
        self._pages = Pages(option("cache_bytes", cache_bytes, CACHE_BYTES))
        self._nasdaq = Nasdaq(self._pages, option("export_polls", export_polls, 1))
        self._fronts: list[Front] = [Alpaca(self._pages), self._nasdaq, Tushare(self._pages)]
        self._stopping = threading.Event()
        self._listener: socket.socket | None = None
        self._connections: set[socket.socket] = set()
        self._connections_lock = threading.Lock()
        self._changing = threading.Lock()

    # ------------------------------------------------------------------------------------------------ for its users

    @property
    def url(self) -> str:
        """http://HOST:PORT; the base of Alpaca and Tushare, and with /api/v3 that of Nasdaq Data Link."""
        return f"http://{self.host}:{self.port}"

    @property
    def log(self) -> list[Entry]:
        """Every request so far; see `journal` for the fields. A request is in here before its answer leaves."""
        return self._journal.entries

    @property
    def credentials(self) -> dict[str, str]:
        """The default accounts, by the names that the shipped definitions look for in the environment."""
        return {
            "ALPACA_KEY_ID": ALPACA_KEY,
            "ALPACA_SECRET_KEY": ALPACA_SECRET,
            "TUSHARE_TOKEN": TUSHARE_TOKEN,
            "NASDAQ_DATA_LINK_API_KEY": NASDAQ_KEY,
        }

    @property
    def market(self) -> Market:
        """What is served now; `series(symbol, "1Day").frame(0, n)` is the truth to compare with."""
        return self._market

    @property
    def until(self) -> date | datetime | str | None:
        return self._until

    @until.setter
    def until(self, value: date | datetime | str | None) -> None:
        self._until = _until(value)

    def start(self) -> str:
        """Listen and serve in threads of its own; returns the URL."""
        if self._listener is not None:
            return self.url
        self._stopping.clear()
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((self.host, self.port))
        except OSError as why:
            listener.close()
            raise ConfigurationError(
                f"replica: cannot listen on {self.host}:{self.port}: {why.strerror}; "
                "give another --port, or 0 for a free one"
            ) from why
        listener.listen(256)
        self.port = listener.getsockname()[1]
        self._listener = listener
        threading.Thread(target=self._accept, args=(listener,), name="replica-accept", daemon=True).start()
        return self.url

    def stop(self) -> None:
        """Close every connection and the port; safe to call twice."""
        listener, self._listener = self._listener, None
        if listener is None:
            return
        self._stopping.set()
        listener.shutdown(socket.SHUT_RDWR)  # wakes accept()
        listener.close()
        with self._connections_lock:
            for connection in self._connections:
                _shut(connection)
        self._nasdaq.close()

    def __enter__(self) -> Replica:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._journal.close()

    def serve_forever(self) -> None:
        """Serve until SIGTERM, SIGINT or `stop` from another thread."""
        self.start()
        if threading.current_thread() is threading.main_thread():
            # As an exception, since setting the event in a signal handler could meet the lock that wait() holds.
            signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            # In short waits: a signal that another thread took ends no endless one.
            while not self._stopping.wait(0.5):
                continue
        except KeyboardInterrupt:
            pass
        finally:
            self.stop()
            self._journal.close()

    def now(self) -> float:
        """The replica's time in Unix seconds."""
        return self.clock.now()

    def advance(self, seconds: float) -> float:
        """Move the replica's time on: windows slide, days begin, rows get published. Returns the new time."""
        return self.clock.advance(seconds)

    def set_faults(self, rules: Sequence[Mapping[str, Any]]) -> None:
        """Replace the rules in force; an empty list ends all faults."""
        self._schedule.put(rules)

    def add_faults(self, *rules: Mapping[str, Any]) -> None:
        self._schedule.put(rules, add=True)

    def update(self, rows: pl.DataFrame) -> None:
        """Restate rows, or add them: new sessions, new symbols. For rows held in memory only."""
        with self._changing:
            self._market = self._held().with_rows(rows)
            self._pages.clear()

    def remove(self, condition: pl.Expr) -> None:
        """Take away the rows for which a polars expression over symbol, date (or ts) and prices is true."""
        with self._changing:
            self._market = self._held().without(condition)
            self._pages.clear()

    def replace(self, data: str | pl.DataFrame | Market) -> None:
        """Serve something else from now on."""
        with self._changing:
            self._market = _market(data)
            self._pages.clear()

    def _held(self) -> FrameMarket:
        if not isinstance(self._market, FrameMarket):
            raise ConfigurationError("replica: generated rows cannot be changed; serve 'bokeh' or a frame instead")
        return self._market

    # ------------------------------------------------------------------------------------------------- connections

    def _accept(self, listener: socket.socket) -> None:
        while not self._stopping.is_set():
            try:
                connection, _ = listener.accept()
            except OSError:  # closed by stop()
                return
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._connections_lock:
                self._connections.add(connection)
            threading.Thread(target=self._converse, args=(connection,), name="replica", daemon=True).start()

    def _converse(self, connection: socket.socket) -> None:
        """Requests on one connection, one after another, until either side closes it."""
        left = b""
        try:
            while not self._stopping.is_set():
                request, left = _receive(connection, left)
                if request is None or not self._exchange(connection, request):
                    return
        except OSError:  # the client went away, or stop() closed the socket: nobody is left to answer
            return
        finally:
            with self._connections_lock:
                self._connections.discard(connection)
            connection.close()

    def _exchange(self, connection: socket.socket, request: Request) -> bool:
        """Answer one request; False when the connection is to be closed."""
        if request.path.startswith("/_replica/"):
            return self._send(connection, request, self._control(request))
        sent = self.clock.now()
        with self._random_lock:
            delay = self._random.uniform(*self.delay)
            before = delay * self._random.random()
        self._stopping.wait(before)
        entry, answer = self._answer(request, sent)
        if answer.manner == "hang":
            self._journal.write(entry)
            _until_closed(connection, answer.seconds, self._stopping)
            return False
        self._stopping.wait(delay - before)
        entry["answered"] = self.clock.now()
        self._journal.write(entry)
        return self._send(connection, request, answer)

    def _answer(self, request: Request, sent: float) -> tuple[Entry, Answer]:
        front = next((f for f in self._fronts if f.owns(request)), None)
        if front is None:
            received = self.clock.now()
            answer = Answer(404, b'{"message":"the replica serves nothing here"}', "drop", refused="wrong_argument")
            provider, key, parameters, rule = "", None, request.query, None
        else:
            provider, parameters = front.name, front.parameters(request)
            key, account = front.account(request, self._accounts[provider])
            rule = self._schedule.choose(provider, key, request)
            received, admission = self.clock.now(), None
            if account is not None:
                received, admission = account.meter.admit(front.api(request), self.clock)
            seen = published(self._market, self._until, received)
            if rule is not None:
                limit = rule.options.get("limit", admission.limit if admission else 200)
                tier = account.tier if account else None
                at = Circumstances(request, received, int(limit), tier=tier, options=rule.options)

                def own(cut: int | None = None) -> Answer:
                    return front.say("bad_key", at) if account is None else front.answer(request, account, seen, cut)

                answer = _broken(rule, front, at, own)
            elif account is None:
                answer = front.say("bad_key", Circumstances(request, received))
            elif admission is not None and admission.refused is not None:
                window = admission.refused
                words = Circumstances(request, received, window.requests, window.seconds, admission.reset, account.tier)
                answer = front.say(window.refusal, words)
            else:
                answer = front.answer(request, account, seen)
            if answer.manner == "whole":
                answer = front.with_limits(answer, admission)
        hung = answer.manner in ("hang", "reset")
        entry: Entry = {
            "n": self._journal.number(),
            "sent": sent,
            "received": received,
            "answered": None,
            "provider": provider,
            "account": key,
            "request": {"method": request.method, "path": request.path, "params": parameters},
            "status": None if hung else answer.status,
            "rows": answer.rows,
            "bytes": 0 if hung else len(answer.body) // (2 if answer.manner == "truncate" else 1),
            "fault": rule.fault if rule else None,
            "refused": None if rule else answer.refused,
            "verdict": answer.verdict,
        }
        return entry, answer

    def _send(self, connection: socket.socket, request: Request, answer: Answer) -> bool:
        if answer.manner == "reset":
            if answer.seconds:  # in the middle: the head and half of the body first
                connection.sendall(_head(answer, keep=True) + answer.body[: len(answer.body) // 2])
                time.sleep(0.05)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return False
        if answer.manner == "truncate":
            connection.sendall(_head(answer, keep=False) + answer.body[: len(answer.body) // 2])
            return False
        keep = request.headers.get("connection", "").lower() != "close"
        head = _head(answer, keep)
        if answer.manner == "trickle":
            piece = max(1, len(answer.body) // TRICKLE_PIECES)
            connection.sendall(head)
            for start in range(0, len(answer.body), piece):
                self._stopping.wait(answer.seconds / TRICKLE_PIECES)
                connection.sendall(answer.body[start : start + piece])
        elif len(answer.body) < 16_384:
            connection.sendall(head + answer.body)
        else:
            connection.sendall(head)
            connection.sendall(answer.body)
        return keep

    # ------------------------------------------------------------------------------------------------------ control

    def _control(self, request: Request) -> Answer:
        try:
            given = json.loads(request.body) if request.body else None
            return Answer(200, json.dumps(self._controlled(request, given)).encode() + b"\n", "")
        except (ConfigurationError, ValueError, TypeError, KeyError, pl.exceptions.PolarsError) as why:
            return Answer(400, json.dumps({"message": f"{request.path}: {why}"}).encode() + b"\n", "")

    def _controlled(self, request: Request, given: Any) -> Any:
        verb = request.path.removeprefix("/_replica/")
        if request.method == "GET" and verb == "status":
            return {
                "now": self.now(),
                "until": None if self._until is None else str(self._until),
                "requests": len(self.log),
                "symbols": len(self._market.symbols),
                "rules": len(self._schedule),
            }
        if request.method == "GET" and verb == "log":
            first = int(request.query.get("from", 1))
            return [entry for entry in list(self.log) if entry["n"] >= first]
        if request.method != "POST":
            raise ValueError("GET serves status and log; POST serves clock, faults, until, rows and delay")
        if verb == "clock" and "advance" in given:
            self.advance(float(given["advance"]))
        elif verb == "clock":
            self.clock.set(_unix(given["set"]))
        elif verb == "faults" and isinstance(given, Mapping):
            self.add_faults(*given["add"])
        elif verb == "faults":
            self.set_faults(given or [])
        elif verb == "until":
            self.until = given["until"]
        elif verb == "rows":
            self.update(_rows(given))
        elif verb == "delay":
            self.delay = _delay(given["delay"])
        else:
            raise ValueError("POST serves clock, faults, until, rows and delay")
        return {"now": self.now()}


def _broken(rule: Rule, front: Front, at: Circumstances, own: Any) -> Answer:
    """The answer that `rule` wants; `own()` is what the provider would have said, `own(n)` cut to n rows."""
    fault, options = rule.fault, rule.options
    verdict = FAULTS[fault]
    if fault == "slow":
        return replace(own(), manner="trickle", seconds=float(options.get("seconds", 1)))
    if fault == "timeout":
        return Answer(0, b"", verdict, manner="hang", seconds=float(options.get("seconds", 3600)))
    if fault == "connection_reset":
        middle = options.get("at", "start") == "middle"
        return replace(own(), verdict=verdict, rows=0, manner="reset", seconds=float(middle))
    if fault == "truncated":
        return replace(own(), verdict=verdict, rows=0, manner="truncate")
    if fault == "malformed":
        whole = own()
        return replace(whole, body=whole.body[: len(whole.body) // 2], verdict=verdict, rows=0)
    if fault == "full_page_no_token":
        return own(int(options.get("cap", 0)))
    if fault == "no_content":
        return Answer(204, b"", verdict)
    if fault == "bad_gateway":
        return Answer(502, BAD_GATEWAY, verdict, content_type=HTML)
    if fault == "html_in_200":
        return Answer(200, MAINTENANCE, verdict, content_type=HTML)
    answer = front.say(fault, at)
    if fault == "unavailable" and options.get("retry_after"):
        answer = answer.with_headers(("Retry-After", str(max(1, round(float(options.get("wait", 1)))))))
    return answer


def _head(answer: Answer, keep: bool) -> bytes:
    lines = [f"HTTP/1.1 {answer.status} {REASONS.get(answer.status, 'Unknown')}"]
    if answer.status != 204:
        lines += [f"Content-Type: {answer.content_type}", f"Content-Length: {len(answer.body)}"]
    lines += [f"{name}: {value}" for name, value in answer.headers]
    if not keep:
        lines.append("Connection: close")
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def _receive(connection: socket.socket, data: bytes) -> tuple[Request | None, bytes]:
    """The next request on the connection and what was read beyond it; None at its end, or when it is not HTTP."""
    while (end := data.find(b"\r\n\r\n")) < 0:
        more = connection.recv(65_536)
        if not more or len(data) > LONGEST_HEAD_BYTES:
            return None, b""
        data += more
    first, *rest = data[:end].decode("latin-1").split("\r\n")
    words = first.split(" ")
    if len(words) != 3:
        return None, b""
    headers: dict[str, str] = {}
    for line in rest:
        name, _, value = line.partition(":")
        headers[name.lower()] = value.strip()
    length = headers.get("content-length", "0")
    if not length.isdecimal() or int(length) > LONGEST_BODY_BYTES or "transfer-encoding" in headers:
        connection.sendall(b"HTTP/1.1 413 Payload Too Large\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        return None, b""
    if headers.get("expect", "").lower() == "100-continue":
        connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
    body, data = data[end + 4 :], b""
    while len(body) < int(length):
        more = connection.recv(1_048_576)
        if not more:
            return None, b""
        body += more
    body, data = body[: int(length)], body[int(length) :]
    path, _, query = words[1].partition("?")
    parsed: dict[str, str] = {}
    for name, value in parse_qsl(query, keep_blank_values=True):
        parsed[name] = f"{parsed[name]},{value}" if name in parsed else value
    return Request(words[0], words[1], unquote(path), parsed, headers, body), data


def _until_closed(connection: socket.socket, seconds: float, stopping: threading.Event) -> None:
    """Wait until the client closes, `seconds` have passed or the replica stops."""
    end = time.monotonic() + seconds
    while not stopping.is_set() and (left := end - time.monotonic()) > 0:
        readable, _, _ = select.select([connection], [], [], min(left, 0.25))
        if readable and not connection.recv(65_536):
            return


def _shut(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:  # the client was quicker
        return


def _market(data: Any) -> Market:
    try:
        return open_market(data)
    except ValueError as why:
        raise ConfigurationError(str(why)) from why


def _accounts(limits: Any, given: Any) -> dict[str, dict[str, Any]]:
    return accounts(limits, given)


def _delay(bounds: Any) -> tuple[float, float]:
    try:
        least, most = (float(b) for b in bounds)
    except (TypeError, ValueError):
        least, most = -1.0, -1.0
    if not 0 <= least <= most:
        raise ConfigurationError(f"replica: delay is {bounds!r}; give two numbers of seconds, least and most")
    return least, most


def _until(value: Any) -> date | datetime | str | None:
    if value is None or value == "clock":
        return value
    if isinstance(value, str):
        try:
            value = date.fromisoformat(value) if len(value) == 10 else datetime.fromisoformat(value)
        except ValueError:
            value = None
    if isinstance(value, datetime) and value.tzinfo is not None:
        return value
    if isinstance(value, date) and not isinstance(value, datetime):
        return value
    raise ConfigurationError(
        "replica: `until` takes a date, a datetime with a time zone (or their ISO texts), 'clock' or None"
    )


def _unix(value: Any) -> float:
    if isinstance(value, (int, float)):
        return float(value)
    there = datetime.fromisoformat(value)
    return (there if there.tzinfo else there.replace(tzinfo=UTC)).timestamp()


def _rows(given: Any) -> pl.DataFrame:
    rows = pl.DataFrame(given, infer_schema_length=None)
    if "ts" in rows.columns:
        return rows.with_columns(pl.col("ts").str.to_datetime(time_zone="UTC", time_unit="us"))
    return rows.with_columns(pl.col("date").str.to_date())
