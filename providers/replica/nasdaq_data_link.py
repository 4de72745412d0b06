"""The replica's Nasdaq Data Link: the datatable WIKI/PRICES by cursor, as JSON or CSV, and its bulk export.

Served: GET or POST /api/v3/datatables/WIKI/PRICES(.json|.csv) with filters ticker and date (.gte, .gt, .lte, .lt,
.eq), qopts.columns, qopts.per_page (at most 10,000), qopts.cursor_id and qopts.export. Rows come by ticker, then date.
The CSV form sends the next cursor in the header Cursor_ID and refuses in CSV. The source holds no dividends and no
splits: ex-dividend is always 0.0 and split_ratio 1.0, while adj_* carry the source's factor of adjusted to raw close.

Bodies named "ours" in comments are not recorded from the provider: it is not known to say such a thing.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import re
import tempfile
import threading
import zipfile
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl

from providers.replica import render
from providers.replica.exchange import Answer, Circumstances, Pages, Published, Request, Tokens
from providers.replica.limits import ANONYMOUS, Account, Admission, Meter
from providers.replica.market import DAILY, Series

MOST_ROWS = 10_000
EXPORT_ROWS_AT_ONCE = 100_000
TABLE = re.compile(r"/api/v3/datatables/([A-Za-z0-9_]+/[A-Za-z0-9_]+?)(\.json|\.csv)?")
BULK = re.compile(r"/api/v3/bulk/([0-9a-f]{16})/[^/]+\.zip")
PRICES = "WIKI/PRICES"
DECIMAL = "BigDecimal(34,12)"
CSV = "text/csv"
COLUMN_TYPES = {
    "ticker": "String",
    "date": "Date",
    "open": DECIMAL,
    "high": DECIMAL,
    "low": DECIMAL,
    "close": DECIMAL,
    "volume": "BigDecimal(37,15)",
    "ex-dividend": DECIMAL,
    "split_ratio": DECIMAL,
    "adj_open": DECIMAL,
    "adj_high": DECIMAL,
    "adj_low": DECIMAL,
    "adj_close": DECIMAL,
    "adj_volume": DECIMAL,
}
SYNTAX = "You have submitted incorrect query parameters. Please check your API call syntax and try again."
EXPORTED = Account("", None, frozenset(), None, Meter([]))  # a finished export is fetched without a key


class Refusal(Exception):
    """A request that the provider would not accept: status, code, words, and the fault it amounts to."""

    def __init__(self, status: int, code: str, message: str, refused: str = "wrong_argument") -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.refused = refused


@dataclass(frozen=True)
class Query:
    """What rows a request asks for: tickers (None for all) and dates, inclusive."""

    tickers: tuple[str, ...] | None
    first: date
    last: date
    columns: tuple[str, ...]


@dataclass
class Export:
    """A zip being made or ready; `asked` counts the answers given about it."""

    path: Path
    started: float
    again: bool
    asked: int = 0
    rows: int = 0
    ready: threading.Event = field(default_factory=threading.Event)


class Nasdaq:
    """See `exchange.Front`."""

    name = "nasdaq_data_link"

    def __init__(self, pages: Pages, export_polls: int) -> None:
        self._pages = pages
        self._tokens = Tokens()
        self._export_polls = export_polls
        self._exports: dict[str, Export] = {}
        self._names: dict[Hashable, str] = {}
        self._exported: set[Query] = set()
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._lock = threading.Lock()

    def close(self) -> None:
        """Delete the exports."""
        with self._lock:
            if self._folder is not None:
                self._folder.cleanup()
            self._folder = None
            self._exports.clear()

    def owns(self, request: Request) -> bool:
        return request.path.startswith("/api/v3/")

    def parameters(self, request: Request) -> dict[str, Any]:
        return {k: v for k, v in _arguments(request).items() if k not in ("api_key", "auth_token")}

    def account(self, request: Request, known: dict[str, Account]) -> tuple[str, Account | None]:
        if BULK.fullmatch(request.path):
            return "", EXPORTED
        key = request.headers.get("x-api-token") or _arguments(request).get("api_key") or ANONYMOUS
        return key, known.get(key)

    def api(self, request: Request) -> str:
        return "datatables"

    def answer(self, request: Request, account: Account, seen: Published, cut: int | None = None) -> Answer:
        return _in_form(request, self._answer(request, account, seen, cut))

    def _answer(self, request: Request, account: Account, seen: Published, cut: int | None) -> Answer:
        try:
            if bulk := BULK.fullmatch(request.path):
                return self._download(bulk[1])
            table = TABLE.fullmatch(request.path)
            if table is None or table[1] != PRICES:
                words = "You have submitted an incorrect Quandl code. Please check your Quandl codes and try again."
                raise Refusal(404, "QECx02", words)
            if PRICES in account.denied:
                return self._say("no_permission", Circumstances(request, seen.now))
            if request.method not in ("GET", "POST"):
                raise Refusal(405, "QESx04", SYNTAX)
            arguments = _arguments(request)
            if arguments.get("qopts.export") == "true":
                return self._export(request, _query(arguments, seen), seen)
            if cut is not None:
                return self._page(arguments, table[2] == ".csv", seen, cut)
            key = (self.name, request.path, tuple(sorted(self.parameters(request).items())), seen.key)
            return self._pages.get(key, lambda: self._page(arguments, table[2] == ".csv", seen, None))
        except Refusal as why:
            verdict = "restart" if why.refused == "token_refused" else "drop"
            return Answer(why.status, _error(why.code, str(why)), verdict, refused=why.refused)

    def _page(self, arguments: dict[str, str], as_csv: bool, seen: Published, cut: int | None) -> Answer:
        query = _query(arguments, seen)
        size = arguments.get("qopts.per_page", str(MOST_ROWS))
        if not size.isdecimal() or not 1 <= int(size) <= MOST_ROWS:
            raise Refusal(422, "QESx04", SYNTAX)
        room = min(cut or int(size), int(size))
        after = self._continuation(arguments.get("qopts.cursor_id"), query)
        parts: list[pl.DataFrame] = []
        cursor = None
        for series, first, stop in _ranges(query, seen, after):
            taken = min(room, stop - first)
            if taken:
                parts.append(series.frame(first, first + taken))
                room -= taken
            if taken < stop - first:
                cursor = _cursor(parts[-1].item(-1, "symbol"), parts[-1].item(-1, "date"))
                break
        rows = _prices(pl.concat(parts)) if parts else _prices(_nothing(seen))
        rows = rows.select(query.columns)
        hidden = cut is not None and cursor is not None
        cursor = None if cut is not None else cursor
        if cursor is not None:
            self._tokens.issue(cursor, query)
        verdict = "split" if hidden else "rows" if rows.height else "empty"
        if as_csv:
            headers = (("Cursor_ID", cursor),) if cursor else ()
            return Answer(200, rows.write_csv().encode(), verdict, rows.height, CSV, headers)
        return Answer(200, _table(rows, cursor), verdict, rows.height)

    def _continuation(self, cursor: str | None, query: Query) -> tuple[str, date] | None:
        if not cursor:
            return None
        # No recorded body for a cursor that is refused: the words are ours.
        refusal = Refusal(
            422, "QESx04", "You have submitted an incorrect cursor_id. Please start again.", "token_refused"
        )
        try:
            version, rest = base64.b64decode(cursor, validate=True).decode().split("_", 1)
            symbol, day = rest.rsplit("_", 1)
            last = date(int(day[:4]), int(day[4:6]), int(day[6:]))
        except (ValueError, binascii.Error):
            raise refusal from None
        if version != "v1" or not self._tokens.fits(cursor, query) or (query.tickers and symbol not in query.tickers):
            raise refusal
        return symbol, last

    def _export(self, request: Request, query: Query, seen: Published) -> Answer:
        with self._lock:
            name = self._names.setdefault((query, seen.last_date, seen.market), f"{len(self._names) + 1:016x}")
            export = self._exports.get(name)
            if export is None:
                if self._folder is None:
                    self._folder = tempfile.TemporaryDirectory(prefix="marketsync-replica-")
                path = Path(self._folder.name) / f"{name}.zip"
                export = self._exports[name] = Export(path, seen.now, query in self._exported)
                self._exported.add(query)
                threading.Thread(target=_pack, args=(export, query, seen), name="replica-export", daemon=True).start()
            export.asked += 1
            fresh = export.ready.is_set() and export.asked > self._export_polls
        snapshot = datetime.fromtimestamp(export.started, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        host = request.headers.get("host", "localhost")
        link = f"http://{host}/api/v3/bulk/{name}/{PRICES.replace('/', '_')}.zip"
        file = {
            "link": link if fresh else None,
            "status": "fresh" if fresh else "regenerating" if export.again else "creating",
            "data_snapshot_time": snapshot if fresh else None,
        }
        body = {"datatable_bulk_download": {"file": file, "datatable": {"last_refreshed_time": snapshot}}}
        return Answer(200, json.dumps(body).encode(), "rows" if fresh else "not_yet")

    def _download(self, name: str) -> Answer:
        export = self._exports.get(name)
        if export is None or not export.ready.is_set():
            raise Refusal(404, "QECx02", "This export does not exist.")
        return Answer(200, export.path.read_bytes(), "rows" if export.rows else "empty", export.rows, "application/zip")

    def with_limits(self, answer: Answer, admission: Admission | None) -> Answer:
        if admission is None or answer.refused in ("too_frequent", "hour_quota", "day_quota"):
            return answer
        return answer.with_headers(*_rate(admission.limit, admission.remaining))

    def say(self, fault: str, at: Circumstances) -> Answer:
        return _in_form(at.request, self._say(fault, at))

    def _say(self, fault: str, at: Circumstances) -> Answer:
        options = at.options
        if fault == "empty":
            none = pl.DataFrame(schema=dict.fromkeys(COLUMN_TYPES, pl.Float64))
            if at.request.path.endswith(".csv"):
                return Answer(200, none.write_csv().encode(), "empty", content_type=CSV)
            return Answer(200, _table(none, None), "empty")
        tier = at.tier
        daily = {
            ANONYMOUS: (
                "QELx01",
                f"You have exceeded the anonymous user limit of {at.limit} calls per day. To make more calls today, "
                "please register for a free Quandl account and then include your API key with your requests.",
            ),
            "premium": ("QELx03", "You have exceeded your daily call limit as a subscriber."),
        }.get(str(tier), ("QELx02", "You have exceeded your daily call limit as a registered user."))
        often = ("QELx04", "You have exceeded your 10-minute call limit as a registered user.")
        if tier == "premium":
            often = ("QELx05", "You have exceeded your 10-minute call limit as a subscriber.")
        status, (code, words), verdict = {
            "not_yet": (404, ("QECx05", "There is no data for this date yet."), "not_yet"),  # ours
            "too_many_rows": (422, ("QELx06", "You have requested too many rows of data."), "split"),
            "too_frequent": (429, often, "cool_down"),
            "hour_quota": (429, ("QELx02", "You have exceeded your hourly call limit."), "quota"),  # ours
            "day_quota": (429, daily, "quota"),
            "wrong_argument": (422, ("QESx04", SYNTAX), "drop"),
            "expired_token": (401, ("QEAx02", "Your API token has expired."), "refresh_auth"),  # ours
            "bad_key": (
                400,
                ("QEAx01", "We could not recognize your API key. Please check your API key and try again."),
                "stop_provider",
            ),
            "no_permission": (
                403,
                (
                    "QEPx04",
                    "You do not have permission to view this dataset. Please subscribe to this database to get access.",
                ),
                "stop_dataset",
            ),
            "server_error": (500, ("QEMx01", "Something went wrong. Please try again."), "retry"),
            "unavailable": (503, ("QEXx01", "Service temporarily unavailable."), "retry"),
            "token_refused": (
                422,
                ("QESx04", "You have submitted an incorrect cursor_id. Please start again."),  # ours
                "restart",
            ),
            "unknown_error": (
                460,
                ("QEZx99", "Something unforeseen happened."),
                "fail",
            ),  # ours, on purpose undocumented
        }[fault]
        headers: tuple[tuple[str, str], ...] = ()
        if fault in ("too_frequent", "hour_quota", "day_quota"):
            headers = _rate(at.limit, 0)
            if options.get("retry_after"):
                reset = at.reset if at.reset is not None else at.now + float(options.get("wait", 1))
                headers = (*headers, ("Retry-After", str(max(1, math.ceil(reset - at.now)))))
        return Answer(status, _error(code, words), verdict, headers=headers, refused=fault)


def _rate(limit: int, remaining: int) -> tuple[tuple[str, str], ...]:
    return (("X-RateLimit-Limit", str(limit)), ("X-RateLimit-Remaining", str(remaining)))


def _arguments(request: Request) -> dict[str, str]:
    """Query and JSON body as one mapping; lists, however sent, joined by commas."""
    given = {name.removesuffix("[]"): value for name, value in request.query.items()}
    if request.method == "POST" and request.body:
        try:
            sent = json.loads(request.body)
        except ValueError:
            sent = {}
        for name, value in sent.items() if isinstance(sent, dict) else ():
            given[name.removesuffix("[]")] = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    return given


def _query(arguments: dict[str, str], seen: Published) -> Query:
    first, last = date.min, seen.last_date
    tickers = None
    for name, value in arguments.items():
        column, _, operator = name.partition(".")
        if column in ("api_key", "auth_token") or name in (
            "qopts.columns",
            "qopts.per_page",
            "qopts.cursor_id",
            "qopts.export",
        ):
            continue
        if column == "ticker" and operator in ("", "eq"):
            tickers = tuple(sorted(set(value.split(","))))
        elif column == "date" and operator in ("", "eq", "gte", "gt", "lte", "lt"):
            try:
                day = date.fromisoformat(value)
            except ValueError:
                raise Refusal(422, "QESx04", SYNTAX) from None
            if operator in ("", "eq", "gte", "gt"):
                first = max(first, day + timedelta(days=operator == "gt"))
            if operator in ("", "eq", "lte", "lt"):
                last = min(last, day - timedelta(days=operator == "lt"))
        else:
            raise Refusal(422, "QESx04", SYNTAX)
    columns = tuple(c for c in arguments.get("qopts.columns", "").split(",") if c) or tuple(COLUMN_TYPES)
    if not set(columns) <= set(COLUMN_TYPES):
        raise Refusal(422, "QESx04", SYNTAX)
    return Query(tickers, first, last, columns)


def _ranges(query: Query, seen: Published, after: tuple[str, date] | None) -> Iterator[tuple[Series, int, int]]:
    """(bars, first, stop) for each symbol that has rows to show, in order."""
    wanted = query.tickers if query.tickers is not None else seen.market.symbols
    for symbol in wanted:
        if after and symbol < after[0]:
            continue
        series = seen.market.series(symbol, DAILY)
        if series is None:
            continue
        first = query.first
        if after and symbol == after[0]:
            first = max(first, after[1] + timedelta(days=1))
        start, stop = series.position(_start(first)), series.position(_start(query.last), after=True)
        # The last day's bar starts at New York midnight, some hours after that of UTC.
        if query.last < date.max:
            stop = series.position(_start(query.last + timedelta(days=1)))
        if start < stop:
            yield series, start, stop


def _start(day: date) -> int:
    """An instant (microseconds) between the daily bar of the day before and that of `day`."""
    return (day - date(1970, 1, 1)).days * 86_400_000_000


def _prices(bars: pl.DataFrame) -> pl.DataFrame:
    def adjusted(column: str) -> pl.Expr:
        return (pl.col(column) * pl.col("adj")).round(12).alias(f"adj_{column}")

    return bars.select(
        pl.col("symbol").alias("ticker"),
        "date",
        "open",
        "high",
        "low",
        "close",
        pl.col("volume").cast(pl.Float64),
        pl.lit(0.0).alias("ex-dividend"),
        pl.lit(1.0).alias("split_ratio"),
        *(adjusted(column) for column in ("open", "high", "low")),
        "adj_close",
        pl.col("volume").cast(pl.Float64).alias("adj_volume"),
    )


def _nothing(seen: Published) -> pl.DataFrame:
    return seen.market.newest_first([], date.min, date.min).rows(0, 0)


def _cursor(symbol: str, last: date) -> str:
    return base64.b64encode(f"v1_{symbol}_{last:%Y%m%d}".encode()).decode()


def _table(rows: pl.DataFrame, cursor: str | None) -> bytes:
    columns = json.dumps([{"name": c, "type": COLUMN_TYPES[c]} for c in rows.columns]).encode()
    meta = json.dumps({"next_cursor_id": cursor}).encode()
    return b'{"datatable":{"data":' + render.arrays(rows) + b',"columns":' + columns + b'},"meta":' + meta + b"}"


def _error(code: str, words: str) -> bytes:
    return json.dumps({"quandl_error": {"code": code, "message": words}}).encode()


def _in_form(request: Request, answer: Answer) -> Answer:
    """A refusal in the form asked for: CSV says in CSV what it refuses."""
    if not request.path.endswith(".csv") or answer.refused is None:
        return answer
    said = json.loads(answer.body)["quandl_error"]
    lines = pl.DataFrame({"code": [said["code"]], "message": [said["message"]]}).write_csv()
    return replace(answer, body=lines.encode(), content_type=CSV)


def _pack(export: Export, query: Query, seen: Published) -> None:
    """Write the export: a zip with one CSV."""
    member = f"{PRICES.replace('/', '_')}_{export.path.stem}.csv"
    with (
        zipfile.ZipFile(export.path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as packed,
        packed.open(member, "w", force_zip64=True) as file,
    ):
        file.write((",".join(query.columns) + "\n").encode())
        for series, first, stop in _ranges(query, seen, None):
            for start in range(first, stop, EXPORT_ROWS_AT_ONCE):
                rows = _prices(series.frame(start, min(stop, start + EXPORT_ROWS_AT_ONCE))).select(query.columns)
                file.write(rows.write_csv(include_header=False).encode())
                export.rows += rows.height
    export.ready.set()
