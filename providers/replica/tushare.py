"""The replica's Tushare Pro: `daily`, `trade_cal` and `stock_basic` by POST, newest first, in Tushare's own words.

Served: POST /, POST /<api_name> and POST /dataapi/<api_name> with {api_name, token, params, fields}. The answer is
HTTP 200 with {request_id, code, msg, data}, errors too. Unknown parameters are ignored, at most 6,000 rows come at
once, and `has_more` with offset and limit leads on.

A symbol S of the market is the `ts_code` "S.US". Following Tushare's units, `vol` is volume / 100 (lots) and `amount`
is vwap * volume / 1,000. The calendar is New York's, whatever `exchange` is asked for.

Bodies named "ours" in comments are not recorded from the provider: it is not known to say such a thing.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping
from datetime import UTC, date, datetime, timedelta
from functools import lru_cache
from typing import Any

import polars as pl

from providers.replica import render
from providers.replica.exchange import HTML, Answer, Circumstances, Pages, Published, Request
from providers.replica.limits import Account, Admission
from providers.replica.market import sessions

MOST_ROWS = 6_000
PATH = re.compile(r"/(?:dataapi/?)?([a-z_0-9]*)/?")
SUFFIX = ".US"
DETAILS = "权限的具体详情访问：https://tushare.pro/document/1?doc_id=108。"
CODE = {"bad_key": 40101, "wrong_argument": -2001, "unknown_api": 40001, "limit": 40203}

DAILY_FIELDS = [
    "ts_code",
    "trade_date",
    "open",
    "high",
    "low",
    "close",
    "pre_close",
    "change",
    "pct_chg",
    "vol",
    "amount",
]
CALENDAR_FIELDS = ["exchange", "cal_date", "is_open", "pretrade_date"]
STOCK_FIELDS = ["ts_code", "symbol", "name", "area", "industry", "market", "list_date", "list_status"]
FIELDS = {"daily": DAILY_FIELDS, "trade_cal": CALENDAR_FIELDS, "stock_basic": STOCK_FIELDS}

COMPANIES = {
    "AAPL": ("Apple", "Technology"),
    "FB": ("Facebook", "Internet"),
    "GOOG": ("Google", "Internet"),
    "IBM": ("International Business Machines", "Technology"),
    "MSFT": ("Microsoft", "Technology"),
}


class Refusal(Exception):
    """A request that Tushare would not accept: code, words, and the fault it amounts to."""

    def __init__(self, code: int, message: str, refused: str = "wrong_argument") -> None:
        super().__init__(message)
        self.code = code
        self.refused = refused


class Tushare:
    """See `exchange.Front`."""

    name = "tushare"

    def __init__(self, pages: Pages) -> None:
        self._pages = pages

    def owns(self, request: Request) -> bool:
        return request.method == "POST" and PATH.fullmatch(request.path) is not None

    def parameters(self, request: Request) -> dict[str, Any]:
        call = _call(request.path, request.body)
        return {"api_name": call["api_name"], "params": call["params"], "fields": call["fields"]}

    def account(self, request: Request, known: dict[str, Account]) -> tuple[str, Account | None]:
        token = _call(request.path, request.body)["token"]
        return token, known.get(token)

    def api(self, request: Request) -> str:
        return _call(request.path, request.body)["api_name"]

    def answer(self, request: Request, account: Account, seen: Published, cut: int | None = None) -> Answer:
        def made() -> Answer:
            return self._answer(_call(request.path, request.body), account, seen, cut)

        if cut is not None:
            return made()
        # The calendar reaches to the end of the present year, so the year belongs to the key.
        year = datetime.fromtimestamp(seen.now, UTC).year
        return self._pages.get((self.name, request.path, request.body, seen.key, year), made)

    def _answer(self, call: Mapping[str, Any], account: Account, seen: Published, cut: int | None) -> Answer:
        api, params = call["api_name"], call["params"]
        try:
            if api not in FIELDS:
                raise Refusal(CODE["unknown_api"], "请指定正确的接口名")
            if api in account.denied:
                raise Refusal(CODE["limit"], f"抱歉，您没有接口访问权限，{DETAILS}", "no_permission")
            offset = _whole(params, "offset", 0)
            most = min(_whole(params, "limit", MOST_ROWS) or MOST_ROWS, MOST_ROWS)
            most = min(cut or most, most)
            total, rows = {"daily": _daily, "trade_cal": _calendar, "stock_basic": _stocks}[api](
                params, seen, offset, most
            )
        except Refusal as why:
            verdict = "stop_dataset" if why.refused == "no_permission" else "drop"
            return Answer(200, _error(why.code, str(why)), verdict, refused=why.refused)
        wanted = [f.strip() for f in call["fields"].split(",") if f.strip() in rows.columns]
        rows = rows.select(wanted or FIELDS[api])
        more = total > offset + rows.height
        hidden = cut is not None and more
        body = _found(rows, more and cut is None)
        return Answer(200, body, "split" if hidden else "rows" if rows.height else "empty", rows.height)

    def with_limits(self, answer: Answer, admission: Admission | None) -> Answer:
        return answer

    def say(self, fault: str, at: Circumstances) -> Answer:
        options = at.options
        if fault == "empty":
            call = _call(at.request.path, at.request.body)
            names = FIELDS.get(call["api_name"], DAILY_FIELDS)
            wanted = [f.strip() for f in call["fields"].split(",") if f.strip() in names]
            return Answer(200, _found(pl.DataFrame(schema=wanted or names), False), "empty")
        if fault in ("not_yet", "server_error", "unavailable"):
            # Tushare answers 200 to everything; another status can only come from the gateway before it.
            status, words, verdict = {
                "not_yet": (404, "404 Not Found", "not_yet"),
                "server_error": (500, "500 Internal Server Error", "retry"),
                "unavailable": (503, "503 Service Temporarily Unavailable", "retry"),
            }[fault]
            page = f"<html>\r\n<head><title>{words}</title></head>\r\n<body><h1>{words}</h1></body>\r\n</html>\r\n"
            return Answer(status, page.encode(), verdict, content_type=HTML, refused=fault)
        api = _call(at.request.path, at.request.body)["api_name"]
        often = f"抱歉，您每分钟最多访问该接口{at.limit_per(60)}次，{DETAILS}"
        if options.get("wording") == "new":
            often = f"抱歉，您访问接口({api})频率超限({at.limit_per(60)}次/分钟)，详见文档"
        code, words, verdict = {
            "too_many_rows": (
                CODE["wrong_argument"],
                "抱歉，单次提取数据超过最大行数，请缩小查询范围。",
                "split",
            ),  # ours
            "too_frequent": (CODE["limit"], often, "cool_down"),
            "hour_quota": (CODE["limit"], f"抱歉，您每小时最多访问该接口{at.limit_per(3600)}次，{DETAILS}", "quota"),
            "day_quota": (CODE["limit"], f"抱歉，您每天最多访问该接口{at.limit}次，{DETAILS}", "quota"),
            "wrong_argument": (CODE["wrong_argument"], "参数错误", "drop"),
            "expired_token": (CODE["bad_key"], "您的token已过期，请重新获取。", "refresh_auth"),  # ours
            "bad_key": (CODE["bad_key"], "您的token不对，请确认。", "stop_provider"),
            "no_permission": (CODE["limit"], f"抱歉，您没有接口访问权限，{DETAILS}", "stop_dataset"),
            "token_refused": (CODE["wrong_argument"], "抱歉，分页offset已失效，请重新查询。", "restart"),  # ours
            "unknown_error": (59_999, "未知错误", "fail"),  # ours, on purpose undocumented
        }[fault]
        headers = (
            (("Retry-After", str(max(1, round(float(options.get("wait", 1)))))),) if options.get("retry_after") else ()
        )
        return Answer(200, _error(code, words), verdict, headers=headers, refused=fault)


@lru_cache(maxsize=1024)
def _call(path: str, body: bytes) -> Mapping[str, Any]:
    """api_name, token, params and fields of a request; what is absent or not JSON is empty."""
    try:
        call = json.loads(body)
    except ValueError:
        call = {}
    call = call if isinstance(call, dict) else {}
    named = PATH.fullmatch(path)
    params = call.get("params")
    return {
        "api_name": str(call.get("api_name") or (named[1] if named else "")),
        "token": str(call.get("token") or ""),
        "params": params if isinstance(params, dict) else {},
        "fields": str(call.get("fields") or ""),
    }


def _daily(params: Mapping[str, Any], seen: Published, offset: int, most: int) -> tuple[int, pl.DataFrame]:
    if not any(params.get(p) for p in ("ts_code", "trade_date", "start_date", "end_date")):
        raise Refusal(50_101, "必填参数, ts_code或trade_date")
    first = _day(params, "start_date", date.min)
    last = min(_day(params, "end_date", date.max), seen.last_date)
    if params.get("trade_date"):
        day = _day(params, "trade_date", date.min)
        first, last = max(first, day), min(last, day)
    chosen = seen.market.newest_first(_symbols(params, seen), first, last)
    bars = chosen.rows(offset, most)
    change = pl.col("close") - pl.col("pre_close")
    return chosen.total, bars.select(
        (pl.col("symbol") + SUFFIX).alias("ts_code"),
        pl.col("date").dt.strftime("%Y%m%d").alias("trade_date"),
        "open",
        "high",
        "low",
        "close",
        "pre_close",
        change.round(4).alias("change"),
        (change / pl.col("pre_close") * 100).round(4).alias("pct_chg"),
        (pl.col("volume") / 100).round(2).alias("vol"),
        (pl.col("vwap") * pl.col("volume") / 1000).round(3).alias("amount"),
    )


def _calendar(params: Mapping[str, Any], seen: Published, offset: int, most: int) -> tuple[int, pl.DataFrame]:
    begin, end = seen.market.span()
    year = max(end.year, datetime.fromtimestamp(seen.now, UTC).year)
    first = max(_day(params, "start_date", date.min), date(begin.year, 1, 1))
    last = min(_day(params, "end_date", date.max), date(year, 12, 31))
    # From a fortnight before, so that the first day already knows the session before it.
    along = sessions(date(begin.year - 1, 12, 15), date(year, 12, 31)).dates
    days = pl.DataFrame(
        {"cal_date": pl.date_range(first, last, eager=True) if first <= last else pl.Series([], dtype=pl.Date)}
    )
    opened = pl.DataFrame({"session": along}).with_columns(pl.col("session").alias("cal_date"))
    before = opened.with_columns(pl.col("session").alias("pretrade")).select(
        "pretrade", pl.col("cal_date") + timedelta(days=1)
    )
    table = (
        days.join(opened, on="cal_date", how="left").sort("cal_date").join_asof(before.sort("cal_date"), on="cal_date")
    )
    table = table.select(
        pl.lit(str(params.get("exchange") or "SSE")).alias("exchange"),
        "cal_date",
        pl.col("session").is_not_null().cast(pl.Int64).alias("is_open"),
        pl.col("pretrade").alias("pretrade_date"),
    )
    if params.get("is_open") not in (None, ""):
        table = table.filter(pl.col("is_open") == _whole(params, "is_open", 0))
    table = table.reverse().with_columns(pl.col("cal_date", "pretrade_date").dt.strftime("%Y%m%d"))
    return table.height, table.slice(offset, most)


def _stocks(params: Mapping[str, Any], seen: Published, offset: int, most: int) -> tuple[int, pl.DataFrame]:
    market = seen.market
    symbols = [s for s in _symbols(params, seen) if market.first_date(s) <= seen.last_date]
    if str(params.get("list_status") or "L") != "L":
        symbols = []
    shown = symbols[offset : offset + most]
    return len(symbols), pl.DataFrame(
        {
            "ts_code": [s + SUFFIX for s in shown],
            "symbol": shown,
            "name": [COMPANIES.get(s, (s, ""))[0] for s in shown],
            "area": ["US"] * len(shown),
            "industry": [COMPANIES.get(s, ("", "General"))[1] for s in shown],
            "market": ["主板"] * len(shown),
            "list_date": [market.first_date(s).strftime("%Y%m%d") for s in shown],
            "list_status": ["L"] * len(shown),
        },
        schema=dict.fromkeys(STOCK_FIELDS, pl.String),
    )


def _symbols(params: Mapping[str, Any], seen: Published) -> list[str]:
    codes = str(params.get("ts_code") or "")
    if not codes:
        return list(seen.market.symbols)
    known = set(seen.market.symbols)
    return sorted({c.strip().removesuffix(SUFFIX) for c in codes.split(",") if c.strip().endswith(SUFFIX)} & known)


def _day(params: Mapping[str, Any], name: str, usual: date) -> date:
    text = str(params.get(name) or "")
    if not text:
        return usual
    try:
        return datetime.strptime(text, "%Y%m%d").replace(tzinfo=UTC).date()
    except ValueError:
        raise Refusal(CODE["wrong_argument"], f"参数校验失败, {name}应为YYYYMMDD: {text}") from None


def _whole(params: Mapping[str, Any], name: str, usual: int) -> int:
    text = str(params.get(name) if params.get(name) is not None else "")
    if text and not text.isdecimal():
        raise Refusal(CODE["wrong_argument"], f"参数校验失败, {name}: {text}")
    return int(text or usual)


def _found(rows: pl.DataFrame, more: bool) -> bytes:
    head = {"request_id": str(uuid.uuid4()), "code": 0, "msg": "", "data": {"fields": rows.columns}}
    # `count` is no row count: the provider sends -1 (or 0) whatever the number of rows.
    tail = b',"has_more":' + (b"true" if more else b"false") + b',"count":-1}}'
    return json.dumps(head).encode()[:-2] + b',"items":' + render.arrays(rows) + tail


def _error(code: int, words: str) -> bytes:
    body = {"request_id": str(uuid.uuid4()), "code": code, "data": None, "msg": words}
    return json.dumps(body, ensure_ascii=False).encode()
