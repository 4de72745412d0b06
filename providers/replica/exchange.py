"""What passes between the server and the provider fronts: a request, an answer, what is published, a cache of pages."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime, timedelta
from typing import Any, Protocol
from zoneinfo import ZoneInfo

from providers.replica.limits import Account, Admission
from providers.replica.market import END_OF_TIME, NEW_YORK, Market

JSON = "application/json; charset=utf-8"
HTML = "text/html"

DAILY_BARS_PUBLISHED_MINUTE = 16 * 60 + 30  # minute of the New York day at which `until="clock"` publishes daily bars


@dataclass(frozen=True)
class Request:
    """One HTTP request; header names are lower case."""

    method: str
    target: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes = b""


@dataclass(frozen=True)
class Answer:
    """One HTTP answer and what a reader should make of it.

    `manner` says how it leaves: "whole", "hang" (never), "reset" (connection reset), "truncate" (the length is
    announced and half is sent) or "trickle" (slowly, over `seconds`).
    """

    status: int
    body: bytes
    verdict: str
    rows: int = 0
    content_type: str = JSON
    headers: tuple[tuple[str, str], ...] = ()
    refused: str | None = None
    manner: str = "whole"
    seconds: float = 0.0

    def with_headers(self, *more: tuple[str, str]) -> Answer:
        return replace(self, headers=(*self.headers, *more))


@dataclass(frozen=True)
class Published:
    """The market as far as it is published: sessions up to `last_date`, minute bars starting up to `last_ts`."""

    market: Market
    last_date: date
    last_ts: int
    now: float

    @property
    def key(self) -> Hashable:
        return self.market, self.last_date, self.last_ts


def published(market: Market, until: date | datetime | str | None, now: float) -> Published:
    """`market` seen at `now` (Unix seconds) with `until`: None (all), a date, an instant, or "clock" (now)."""
    if until is None:
        return Published(market, date.max, END_OF_TIME, now)
    if until == "clock":
        # By whole minutes, since nothing is published between two of them and pages can be kept for one.
        until = datetime.fromtimestamp(now // 60 * 60, UTC)
    if isinstance(until, datetime):
        there = until.astimezone(ZoneInfo(NEW_YORK))
        out = there.hour * 60 + there.minute >= DAILY_BARS_PUBLISHED_MINUTE
        day = there.date() if out else there.date() - timedelta(days=1)
        return Published(market, day, int((until.timestamp() - 60) * 1_000_000), now)
    if isinstance(until, date):
        end = datetime(until.year, until.month, until.day, tzinfo=ZoneInfo(NEW_YORK)) + timedelta(days=1)
        return Published(market, until, int(end.timestamp()) * 1_000_000 - 1, now)
    raise ValueError(f"until={until!r}: give a date, an aware datetime, 'clock' or None")


@dataclass(frozen=True)
class Circumstances:
    """What a provider's words may mention: numbers for a refusal, and the options of an injected fault.

    `limit` requests in `per_seconds`, or in whatever unit the words speak of; `reset` in Unix seconds.
    """

    request: Request
    now: float
    limit: int = 200
    per_seconds: float | None = None
    reset: float | None = None
    tier: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def limit_per(self, unit_seconds: float) -> int:
        """The limit told in another unit, as words that know only "a minute" or "an hour" must."""
        return self.limit if self.per_seconds is None else max(1, round(self.limit * unit_seconds / self.per_seconds))


class Front(Protocol):
    """One provider: who asks, which API, the answer, and how it says what went wrong."""

    name: str

    def owns(self, request: Request) -> bool:
        """Whether the path is this provider's."""
        ...

    def parameters(self, request: Request) -> dict[str, Any]:
        """What the log keeps of a request: everything but credentials."""
        ...

    def account(self, request: Request, known: dict[str, Account]) -> tuple[str, Account | None]:
        """The key that was sent ("" for none) and its account; None when the provider does not know it."""
        ...

    def api(self, request: Request) -> str:
        """The API whose limits the request falls under."""
        ...

    def answer(self, request: Request, account: Account, seen: Published, cut: int | None = None) -> Answer:
        """The provider's own answer.

        With `cut`: a page of at most `cut` rows (0: as many as asked) that hides that there are more.
        """
        ...

    def say(self, fault: str, at: Circumstances) -> Answer:
        """The provider's words for `fault`."""
        ...

    def with_limits(self, answer: Answer, admission: Admission | None) -> Answer:
        """`answer` with the provider's rate headers."""
        ...


class Pages:
    """The most recently used bodies up to `most_bytes`; safe for threads."""

    def __init__(self, most_bytes: int) -> None:
        self._kept: OrderedDict[Hashable, Answer] = OrderedDict()
        self._most = most_bytes
        self._used = 0
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], Answer]) -> Answer:
        with self._lock:
            if (found := self._kept.get(key)) is not None:
                self._kept.move_to_end(key)
                return found
        made = make()
        with self._lock:
            if key not in self._kept and len(made.body) <= self._most:
                self._kept[key] = made
                self._used += len(made.body)
                while self._used > self._most:
                    _, old = self._kept.popitem(last=False)
                    self._used -= len(old.body)
        return made

    def clear(self) -> None:
        with self._lock:
            self._kept.clear()
            self._used = 0


class Tokens:
    """Continuation tokens handed out, with what they continue; the oldest are forgotten."""

    MOST = 200_000

    def __init__(self) -> None:
        self._issued: OrderedDict[str, set[Hashable]] = OrderedDict()
        self._lock = threading.Lock()

    def issue(self, token: str, of: Hashable) -> None:
        with self._lock:
            self._issued.setdefault(token, set()).add(of)
            if len(self._issued) > self.MOST:
                self._issued.popitem(last=False)

    def fits(self, token: str, of: Hashable) -> bool:
        """False when the token was handed out, but never for a request with these parameters."""
        with self._lock:
            return token not in self._issued or of in self._issued[token]
