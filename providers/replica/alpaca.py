"""The replica's Alpaca Market Data v2: stock bars by symbol and time, paged by token, in Alpaca's own words.

Served: GET /v2/stocks/bars and GET /v2/stocks/{symbol}/bars, timeframes 1Day and 1Min. Rows are sorted by symbol, then
time; `limit` counts rows over all symbols. A daily bar starts at New York midnight. `adjustment` other than raw applies
the source's single factor of adjusted to raw close, rounded to four places. `n` and `vw` are derived where the source
has neither (shares / 100; the typical price).

Bodies named "ours" in comments are not recorded from the provider: it is not known to say such a thing.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import re
from datetime import UTC, date, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import polars as pl

from providers.replica import render
from providers.replica.exchange import Answer, Circumstances, Pages, Published, Request, Tokens
from providers.replica.limits import Account, Admission
from providers.replica.market import DAILY, END_OF_TIME, MINUTE, NEW_YORK, Series, new_york_day

MOST_ROWS = 10_000
USUAL_ROWS = 1_000
TIMEFRAMES = {"1Day": DAILY, "1D": DAILY, "Day": DAILY, "1Min": MINUTE, "1T": MINUTE, "Min": MINUTE}
FEEDS = {"sip", "iex", "otc", "boats", "overnight", "delayed_sip"}
ADJUSTMENTS = {"raw", "split", "dividend", "spin-off", "all"}
PARAMETERS = {
    "symbols",
    "timeframe",
    "start",
    "end",
    "limit",
    "adjustment",
    "feed",
    "sort",
    "page_token",
    "asof",
    "currency",
}
SYMBOL = re.compile(r"[A-Z][A-Z0-9.\-]{0,11}")
BARS_OF_ONE = re.compile(r"/v2/stocks/([^/]+)/bars")
STAMP = re.compile(r"(\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?(Z|z|[+-]\d\d:\d\d)")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Refusal(Exception):
    """A request that Alpaca would not accept; `status` and the words."""

    def __init__(self, status: int, message: str, refused: str = "wrong_argument") -> None:
        super().__init__(message)
        self.status = status
        self.refused = refused


class Alpaca:
    """See `exchange.Front`."""

    name = "alpaca"

    def __init__(self, pages: Pages) -> None:
        self._pages = pages
        self._tokens = Tokens()

    def owns(self, request: Request) -> bool:
        return request.path.startswith("/v2/")

    def parameters(self, request: Request) -> dict[str, Any]:
        return request.query

    def account(self, request: Request, known: dict[str, Account]) -> tuple[str, Account | None]:
        key = request.headers.get("apca-api-key-id", "")
        secret = request.headers.get("apca-api-secret-key", "")
        scheme, _, word = request.headers.get("authorization", "").partition(" ")
        if not key and scheme.lower() == "basic":
            try:
                key, _, secret = base64.b64decode(word).decode().partition(":")
            except (binascii.Error, UnicodeDecodeError):
                return "", None
        found = known.get(key)
        return key, found if found is not None and found.secret in (None, secret) else None

    def api(self, request: Request) -> str:
        return "bars"

    def answer(self, request: Request, account: Account, seen: Published, cut: int | None = None) -> Answer:
        # Without both ends the answer depends on the time of day, so it is not kept.
        if cut is None and "start" in request.query and "end" in request.query:
            kept = (self.name, account.key, request.target, seen.key)
            return self._pages.get(kept, lambda: self._answer(request, account, seen, cut))
        return self._answer(request, account, seen, cut)

    def _answer(self, request: Request, account: Account, seen: Published, cut: int | None) -> Answer:
        try:
            return self._bars(request, account, seen, cut)
        except Refusal as why:
            verdict = {"token_refused": "restart", "no_permission": "stop_dataset"}.get(why.refused, "drop")
            return Answer(why.status, _message(str(why)), verdict, refused=why.refused)

    def _bars(self, request: Request, account: Account, seen: Published, cut: int | None) -> Answer:
        single = BARS_OF_ONE.fullmatch(request.path)
        if request.method != "GET" or not (single or request.path == "/v2/stocks/bars"):
            raise Refusal(404, "endpoint not found")
        query = request.query
        if unknown := set(query) - PARAMETERS:
            raise Refusal(400, f"unexpected parameter(s): {', '.join(sorted(unknown))}")
        symbols = _symbols(single[1] if single else query.get("symbols", ""))
        timeframe = TIMEFRAMES.get(query.get("timeframe", ""))
        if timeframe is None:
            raise Refusal(400, f"invalid timeframe: {query.get('timeframe', '')}")
        limit = _limit(query.get("limit", str(USUAL_ROWS)))
        backwards = _one_of(query, "sort", "asc", {"asc", "desc"}) == "desc"
        adjusted = _one_of(query, "adjustment", "raw", ADJUSTMENTS, several=True) != "raw"
        feed = _one_of(query, "feed", "sip", FEEDS)
        if account.denied & {feed, timeframe, request.path}:
            raise Refusal(403, "subscription does not permit querying recent SIP data", "no_permission")
        today, _ = new_york_day(seen.now)
        start = _instant(query.get("start", today.isoformat()), "start", end_of_day=False)
        end = _instant(query["end"], "end", end_of_day=True) if "end" in query else int(seen.now * 1_000_000)
        if end < start:
            raise Refusal(400, "end should not be before start")
        last = _last(seen, timeframe)
        parameters = tuple(sorted((k, v) for k, v in query.items() if k not in ("page_token", "limit")))
        after = self._continuation(query.get("page_token"), (request.path, parameters), symbols, timeframe)

        room = min(cut or limit, limit)
        parts: list[tuple[str, pl.DataFrame]] = []
        token = None
        for symbol in symbols:
            series = seen.market.series(symbol, timeframe)
            if series is None or (after and symbol < after[0]):
                continue
            first, stop = _range(
                series, start, end, last, after[1] if after and symbol == after[0] else None, backwards
            )
            if first >= stop:
                continue
            if room == 0:  # more follows the full page
                previous, bars = parts[-1]
                token = _token(previous, timeframe, bars.item(-1, "ts"))
                break
            taken = min(room, stop - first)
            bars = series.frame(stop - taken, stop).reverse() if backwards else series.frame(first, first + taken)
            parts.append((symbol, bars))
            room -= taken
            if taken < stop - first:
                token = _token(symbol, timeframe, bars.item(-1, "ts"))
                break
        rows = sum(bars.height for _, bars in parts)
        hidden = cut is not None and token is not None
        token = None if cut is not None else token
        if token is not None:
            self._tokens.issue(token, (request.path, parameters))
        body = _envelope(single[1] if single else None, [(s, _rows(bars, adjusted)) for s, bars in parts], token)
        return Answer(200, body, "split" if hidden else "rows" if rows else "empty", rows)

    def _continuation(
        self, token: str | None, of: object, symbols: list[str], timeframe: str
    ) -> tuple[str, int] | None:
        if not token:
            return None
        try:
            symbol, letter, stamp = base64.b64decode(token, validate=True).decode().split("|")
            ts = _instant(stamp, "page_token", end_of_day=False)
        except (ValueError, Refusal):
            raise Refusal(400, "invalid page_token", "token_refused") from None
        if symbol not in symbols or letter != timeframe[1] or not self._tokens.fits(token, of):
            raise Refusal(400, "invalid page_token", "token_refused")
        return symbol, ts

    def with_limits(self, answer: Answer, admission: Admission | None) -> Answer:
        if admission is None or answer.refused in ("too_frequent", "hour_quota", "day_quota"):
            return answer  # a refusal carries its own
        return answer.with_headers(*_rate(admission.limit, admission.remaining, admission.reset))

    def say(self, fault: str, at: Circumstances) -> Answer:
        options = at.options
        reset = at.reset if at.reset is not None else at.now + float(options.get("wait", 1))
        if fault in ("too_frequent", "hour_quota", "day_quota"):
            # Alpaca states no hour or day quota: those two texts are ours.
            words = {"too_frequent": "too many requests.", "hour_quota": "too many requests: hourly limit exceeded"}
            verdict = "cool_down" if fault == "too_frequent" else "quota"
            headers = _rate(at.limit, 0, reset) if options.get("reset_header", True) else ()
            if options.get("retry_after"):
                headers = (*headers, ("Retry-After", str(max(1, math.ceil(reset - at.now)))))
            body = _message(words.get(fault, "too many requests: daily limit exceeded"))
            return Answer(429, body, verdict, headers=headers, refused=fault)
        if fault == "empty":
            return Answer(200, b'{"bars":{},"next_page_token":null}', "empty")
        asked = at.request.query.get("symbols", "").split(",")[0].lower() or "?"
        status, words, verdict = {
            "not_yet": (404, "data not found", "not_yet"),  # ours
            "too_many_rows": (422, "too many rows requested, narrow the time range", "split"),  # ours
            "wrong_argument": (422, f"invalid symbol: {asked}", "drop"),
            "expired_token": (401, "access token expired", "refresh_auth"),  # ours
            "bad_key": (401, "unauthorized", "stop_provider"),
            "no_permission": (403, "subscription does not permit querying recent SIP data", "stop_dataset"),
            "server_error": (500, "internal server error", "retry"),
            "unavailable": (503, "service unavailable", "retry"),
            "token_refused": (400, "invalid page_token", "restart"),
            "unknown_error": (460, "account is in an unexpected state", "fail"),  # ours, on purpose undocumented
        }[fault]
        return Answer(status, _message(words), verdict, refused=fault)


def _message(words: str) -> bytes:
    return json.dumps({"message": words}).encode()


def _rate(limit: int, remaining: int, reset: float) -> tuple[tuple[str, str], ...]:
    return (
        ("X-RateLimit-Limit", str(limit)),
        ("X-RateLimit-Remaining", str(remaining)),
        ("X-RateLimit-Reset", str(math.ceil(reset))),
    )


def _symbols(text: str) -> list[str]:
    if not text:
        raise Refusal(400, "symbols is required")
    for symbol in (found := sorted(set(text.split(",")))):
        if not SYMBOL.fullmatch(symbol):
            raise Refusal(422, f"invalid symbol: {symbol}")
    return found


def _limit(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= MOST_ROWS:
        raise Refusal(400, f"invalid limit: {text}: it should be between 1 and {MOST_ROWS}")
    return int(text)


def _one_of(query: dict[str, str], name: str, usual: str, known: set[str], several: bool = False) -> str:
    value = query.get(name) or usual
    if not set(value.split(",") if several else [value]) <= known:
        raise Refusal(400, f"invalid {name}: {value}")
    return value


def _instant(text: str, name: str, end_of_day: bool) -> int:
    """Microseconds since 1970 of a date (its start in New York, or its last instant) or an RFC 3339 time."""
    try:
        if form := STAMP.fullmatch(text):
            there = datetime.fromisoformat(form[1] + (form[3].upper().replace("Z", "+00:00")))
            return (there - _EPOCH) // timedelta(microseconds=1) + int((form[2] or "0").ljust(9, "0")) // 1000
        day = date.fromisoformat(text) + timedelta(days=end_of_day)
    except (ValueError, OverflowError):
        raise Refusal(400, f"invalid {name}: {text}: it should be RFC-3339 or YYYY-MM-DD") from None
    midnight = datetime(day.year, day.month, day.day, tzinfo=ZoneInfo(NEW_YORK))
    return int(midnight.timestamp()) * 1_000_000 - end_of_day


def _last(seen: Published, timeframe: str) -> int:
    """Start of the newest bar that may be shown."""
    if timeframe == MINUTE or seen.last_date == date.max:
        return seen.last_ts
    return _instant(seen.last_date.isoformat(), "until", end_of_day=True)


def _range(series: Series, start: int, end: int, last: int, after: int | None, backwards: bool) -> tuple[int, int]:
    """Positions [first, stop) asked for; `after` is the bar that the page before ended with."""
    first = series.position(start)
    stop = series.position(min(end, last, END_OF_TIME), after=True)
    if after is not None and backwards:
        stop = min(stop, series.position(after))
    elif after is not None:
        first = max(first, series.position(after, after=True))
    return first, stop


def _token(symbol: str, timeframe: str, ts: int) -> str:
    stamp = (_EPOCH + timedelta(microseconds=ts)).strftime("%Y-%m-%dT%H:%M:%S.000000000Z")
    return base64.b64encode(f"{symbol}|{timeframe[1]}|{stamp}".encode()).decode()


def _rows(bars: pl.DataFrame, adjusted: bool) -> bytes:
    """The bars as a JSON array of objects."""
    prices = {"o": "open", "h": "high", "l": "low", "c": "close"}
    shown = bars.select(
        pl.from_epoch("ts", time_unit="us").dt.strftime("%Y-%m-%dT%H:%M:%SZ").alias("t"),
        *((pl.col(c) * pl.col("adj")).round(4).alias(k) if adjusted else pl.col(c).alias(k) for k, c in prices.items()),
        pl.col("volume").alias("v"),
        pl.col("trades").alias("n"),
        ((pl.col("vwap") * pl.col("adj")).round(6) if adjusted else pl.col("vwap")).alias("vw"),
    )
    return render.objects(shown)


def _envelope(one: str | None, parts: list[tuple[str, bytes]], token: str | None) -> bytes:
    end = b',"next_page_token":' + json.dumps(token).encode() + b"}"
    if one is not None:
        return b'{"bars":' + (parts[0][1] if parts else b"null") + b',"symbol":' + json.dumps(one).encode() + end
    return b'{"bars":{' + b",".join(json.dumps(s).encode() + b":" + rows for s, rows in parts) + b"}" + end
