"""The shipped definitions: they are sound, they read what the providers send, and they tell its refusals apart.

The refusals written here are ours. Recorded bodies beside the project (../shared/data) are tried as well; they are
no part of the project, and its tests are skipped without it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import polars as pl
import pytest
import requests

from marketsync.configuration import check_file, load_configuration, load_definition, shipped_definitions
from marketsync.definition import Definition, Verdict
from marketsync.errors import ProviderError
from marketsync.gate import seal
from providers.decode import Decoder
from providers.faults import Rules, Ruling
from providers.paging import next_step
from providers.replica import Replica
from providers.request import Ask, build
from providers.secrets import Secrets
from providers.transport import Answer

NOW = datetime(2026, 3, 2, 15, 0, tzinfo=UTC)
SHIPPED = sorted(shipped_definitions())


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_definition_has_no_problem(name):
    assert check_file(shipped_definitions()[name]) == []
    assert load_definition(name).provider == name


@pytest.mark.parametrize("name", SHIPPED)
def test_every_column_of_bars_says_what_it_is(name):
    for dataset in load_definition(name).datasets.values():
        if "close" in dataset.columns:
            unexplained = [column for column, spec in dataset.columns.items() if not spec.description]
            assert set(unexplained) <= {"symbol", "date"}


# ------------------------------------------------------------ refusals


def judged(
    definition: Definition, dataset: str, status: int, body: Any, headers: dict[str, str] | None = None
) -> Ruling:
    text = body if isinstance(body, str) else json.dumps(body, ensure_ascii=False)
    answer = Answer(status, headers or {}, text.encode(), NOW - timedelta(seconds=1), NOW)
    try:
        opened = Decoder(definition.datasets[dataset]).open(answer.body)
    except ProviderError:  # a refusal need not be in the format of the rows
        opened = None
    return Rules(definition, dataset).judge(answer, opened)


ALPACA = [
    (429, {"message": "slow down please"}, Verdict.COOL_DOWN),
    (401, {"message": "no such key"}, Verdict.STOP_PROVIDER),
    (403, {"message": "forbidden."}, Verdict.STOP_PROVIDER),
    (403, {"message": "your subscription does not reach this feed"}, Verdict.STOP_DATASET),
    (422, {"message": "invalid symbol: x y"}, Verdict.DROP),
    (400, {"message": "invalid page_token"}, Verdict.RESTART),
    (500, {"message": "internal server error"}, Verdict.RETRY),
    (200, {"bars": {}, "next_page_token": None}, Verdict.ROWS),
]
TUSHARE = [
    ("抱歉，您每分钟最多访问该接口50次，权限的具体详情访问：某页", 40203, Verdict.COOL_DOWN),
    ("抱歉，您访问接口(daily)频率超限(50次/分钟)，详见文档", 40203, Verdict.COOL_DOWN),
    ("抱歉，您每小时最多访问该接口2次，权限的具体详情访问：某页", 40203, Verdict.QUOTA),
    ("抱歉，您每天最多访问该接口20次，权限的具体详情访问：某页", 40203, Verdict.QUOTA),
    ("抱歉，您没有接口访问权限，权限的具体详情访问：某页", 40203, Verdict.STOP_DATASET),
    ("权限问题", 2002, Verdict.STOP_DATASET),
    ("您的token不对，请确认。", 40101, Verdict.STOP_PROVIDER),
    ("必填参数, trade_date", 50101, Verdict.DROP),
    ("something new", 59999, Verdict.FAIL),
    ("", 0, Verdict.ROWS),
]
NASDAQ = [
    (429, "QELx01", Verdict.QUOTA),
    (429, "QELx02", Verdict.QUOTA),
    (429, "QELx03", Verdict.QUOTA),
    (429, "QELx04", Verdict.COOL_DOWN),
    (429, "QELx05", Verdict.COOL_DOWN),
    (422, "QELx06", Verdict.SPLIT),
    (414, "QELx07", Verdict.SPLIT),
    (413, "QELx08", Verdict.SPLIT),
    (400, "QEAx01", Verdict.STOP_PROVIDER),
    (403, "QEPx04", Verdict.STOP_DATASET),
    (404, "QECx02", Verdict.DROP),
    (422, "QESx04", Verdict.DROP),
    (500, "QEMx01", Verdict.RETRY),
    (503, "QEXx01", Verdict.RETRY),
]


@pytest.mark.parametrize(("status", "body", "verdict"), ALPACA)
def test_alpaca_is_understood(status, body, verdict):
    assert judged(load_definition("alpaca"), "daily_bars", status, body).verdict == verdict


def test_alpaca_is_waited_for_until_the_reset_that_it_tells():
    headers = {"X-RateLimit-Reset": str(int(NOW.timestamp()) + 40)}
    ruling = judged(load_definition("alpaca"), "daily_bars", 429, {"message": "no"}, headers)
    assert ruling.until == NOW + timedelta(seconds=40)


@pytest.mark.parametrize(("words", "code", "verdict"), TUSHARE)
def test_tushare_is_understood_by_its_words(words, code, verdict):
    data = {"fields": ["ts_code"], "items": [], "has_more": False} if code == 0 else None
    body = {"request_id": "r", "code": code, "msg": words, "data": data}
    assert judged(load_definition("tushare"), "daily", 200, body).verdict == verdict


def test_the_number_in_tushares_message_is_learned_as_the_limit_and_an_hour_is_waited_for():
    tushare = load_definition("tushare")
    minute = judged(tushare, "daily", 200, {"code": 40203, "msg": TUSHARE[0][0], "data": None})
    hour = judged(tushare, "daily", 200, {"code": 40203, "msg": TUSHARE[2][0], "data": None})
    day = judged(tushare, "daily", 200, {"code": 40203, "msg": TUSHARE[3][0], "data": None})
    assert (minute.learned_limit, str(minute.per), minute.wait_seconds) == (50, "1 minute", 60)
    assert (hour.learned_limit, str(hour.per), hour.until) == (2, "1 hour", NOW + timedelta(hours=1))
    assert (day.learned_limit, str(day.per), day.until) == (20, "1 day", None)  # until the quota's own reset


@pytest.mark.parametrize("dataset", ["wiki_prices", "wiki_prices_csv"])
@pytest.mark.parametrize(("status", "code", "verdict"), NASDAQ)
def test_nasdaq_is_understood_by_its_codes(dataset, status, code, verdict):
    body = {"quandl_error": {"code": code, "message": "words"}}
    assert judged(load_definition("nasdaq_data_link"), dataset, status, body).verdict == verdict


def test_nasdaq_is_understood_when_it_refuses_in_csv():
    ruling = judged(load_definition("nasdaq_data_link"), "wiki_prices_csv", 429, "code,message\nQELx02,words\n")
    assert ruling.verdict == Verdict.QUOTA


# ------------------------------------------------------------ recorded bodies

RECORDED = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_recorded = pytest.mark.skipif(
    not RECORDED.is_dir(), reason="no recorded traffic beside the project (../shared/data)"
)
CLASSES = {
    "too_frequent": {Verdict.COOL_DOWN},
    "too_frequent(hour)": {Verdict.QUOTA},
    "day_limit": {Verdict.QUOTA},
    "no_permission": {Verdict.STOP_DATASET},
    "bad_token": {Verdict.STOP_PROVIDER},
    "bad_argument": {Verdict.DROP, Verdict.SPLIT},
    "bad_argument(api_name)": {Verdict.DROP},
    "retry": {Verdict.RETRY},
}


@needs_recorded
@pytest.mark.parametrize(
    ("provider", "dataset"), [("alpaca", "daily_bars"), ("tushare", "daily"), ("nasdaq_data_link", "wiki_prices")]
)
def test_every_recorded_refusal_is_understood(provider, dataset):
    definition = load_definition(provider)
    entries = json.loads((RECORDED / "errors" / "error_bodies.json").read_text())[provider]
    assert len(entries) >= 4
    wrong = []
    for entry in entries:
        headers = {"X-RateLimit-Reset": str(int(NOW.timestamp()) + 5)} if entry.get("headers") else {}
        verdict = judged(definition, dataset, entry["http"], entry["body"], headers).verdict
        split = "too many rows" in json.dumps(entry["body"])
        if verdict not in CLASSES[entry["class"]] or (verdict is Verdict.SPLIT) != split:
            wrong.append((entry["body"], entry["class"], verdict))
    assert wrong == []


def read(definition: Definition, dataset: str, bodies: list[bytes]) -> pl.DataFrame:
    spec = definition.datasets[dataset]
    decoder = Decoder(spec)
    gated = seal(spec, [decoder.rows(decoder.open(body)) for body in bodies])
    assert gated.rejected.height == 0, gated.rejected
    return gated.frame


@needs_recorded
def test_recorded_pages_of_alpaca_become_rows():
    pages = [p.read_bytes() for p in sorted((RECORDED / "alpaca" / "derived_pages").glob("*.json"))]
    bars = read(load_definition("alpaca"), "daily_bars", pages)
    assert (bars.height, bars["symbol"].n_unique()) == (496, 4)
    assert bars.row(0, named=True)["open"] == 79.382858


@needs_recorded
def test_recorded_pages_of_nasdaq_become_rows():
    pages = [p.read_bytes() for p in sorted((RECORDED / "nasdaq_data_link" / "datatables").glob("*.json"))]
    prices = read(load_definition("nasdaq_data_link"), "wiki_prices", pages)
    assert prices.height == 916


@needs_recorded
@pytest.mark.parametrize(
    ("dataset", "file", "path"),
    [
        ("trades", "multisymbol_get_trades.json", "trades"),
        ("quotes", "multisymbol_quotes.json", "quotes"),
        ("cash_dividends", "get_corporate_actions_2.json", "corporate_actions.cash_dividends"),
        ("forward_splits", "get_corporate_actions.json", "corporate_actions.forward_splits"),
        ("reverse_splits", "get_corporate_actions.json", "corporate_actions.reverse_splits"),
    ],
)
def test_every_value_of_a_recorded_answer_has_a_column(dataset, file, path):
    body = json.loads((RECORDED / "alpaca" / "rest" / file).read_text())["body"]
    alpaca = load_definition("alpaca")
    rows = read(alpaca, dataset, [json.dumps(body).encode()])
    assert rows.height >= 1
    found: Any = body
    for step in path.split("."):
        found = found[step]
    first = (next(iter(found.values())) if isinstance(found, dict) else found)[0]
    unread = {name for name, value in first.items() if not isinstance(value, list)} - set(
        alpaca.datasets[dataset].schema_
    )
    assert unread == set()
    assert all(rows[name].null_count() < rows.height for name in rows.columns if name != "due_bill_redemption_date")


# ------------------------------------------------------------ the replica, over real sockets


@pytest.fixture(scope="module")
def replica() -> Iterator[Replica]:
    server = Replica(limits="unlimited")
    server.start()
    yield server
    server.stop()


def asked(replica: Replica, tmp_path: Path, upstream: str, ask: Ask) -> pl.DataFrame:
    """Ask page by page, with the definition as a user's upstream.yml would have it: by another base_url alone."""
    (tmp_path / "upstream.yml").write_text(f"upstreams: {{{upstream}: {{base_url: '{replica.url}'}}}}\n")
    definition = load_configuration(tmp_path / "upstream.yml").definitions[upstream]
    secrets = Secrets(tmp_path, environment=replica.credentials)
    spec = definition.datasets[ask.dataset]
    decoder, rules = Decoder(spec), Rules(definition, ask.dataset)
    cursor: dict[str, Any] | None = None
    pages = []
    while cursor is not None or not pages:
        request = build(definition, ask, cursor, secrets)
        reply = requests.request(
            request.method, request.url, headers=dict(request.headers), data=request.body, timeout=30
        )
        answer = Answer(reply.status_code, dict(reply.headers), reply.content, NOW, NOW)
        opened = decoder.open(answer.body)
        assert rules.judge(answer, opened).verdict in (Verdict.ROWS, Verdict.EMPTY), reply.text[:300]
        batch = decoder.rows(opened)
        pages.append(batch)
        step = next_step(spec, cursor, opened.document, answer.headers, batch, definition.base_url, request.url)
        assert step.verdict == Verdict.ROWS, step.message
        cursor = step.cursor
    gated = seal(spec, pages)
    assert gated.rejected.height == 0, gated.rejected
    assert gated.duplicates == 0
    return gated.frame


def truth(replica: Replica, symbol: str, first: date, last: date) -> pl.DataFrame:
    series = replica.market.series(symbol, "1Day")
    assert series is not None
    return series.frame(0, len(series)).filter(pl.col("date").is_between(first, last))


SPAN = (datetime(2005, 1, 1, tzinfo=UTC), datetime(2010, 1, 1, tzinfo=UTC))
SYMBOLS = ("AAPL", "GOOG", "IBM", "MSFT")


@pytest.mark.parametrize(
    ("upstream", "dataset"),
    [
        ("alpaca", "daily_bars"),
        ("nasdaq_data_link", "wiki_prices"),
        ("nasdaq_data_link", "wiki_prices_csv"),
    ],
)
def test_bars_by_window_come_as_they_are_at_the_provider(replica, tmp_path, upstream, dataset):
    ask = Ask(dataset, {"symbol": SYMBOLS}, *SPAN, *SPAN)
    rows = asked(replica, tmp_path, upstream, ask)
    for symbol in SYMBOLS:
        expected = truth(replica, symbol, date(2005, 1, 1), date(2009, 12, 31))
        mine = rows.filter(pl.col("symbol") == symbol)
        assert mine.height == expected.height > 1200
        for name in ("open", "high", "low", "close"):
            assert mine[name].to_list() == expected[name].to_list()
        assert mine["volume"].cast(pl.Int64).to_list() == expected["volume"].cast(pl.Int64).to_list()


def test_a_window_of_tushare_comes_in_pages_of_offset(replica, tmp_path):
    span = (datetime(2000, 1, 1, tzinfo=UTC), datetime(2014, 1, 1, tzinfo=UTC))
    one = asked(replica, tmp_path, "tushare", Ask("daily_by_symbol", {"symbol": ("IBM.US",)}, *span, *span))
    expected = truth(replica, "IBM", date(2000, 1, 1), date(2013, 12, 31))
    assert sorted(one["date"].to_list()) == expected["date"].to_list()
    assert one.sort("date")["close"].to_list() == expected["close"].to_list()


def test_a_session_of_tushare_comes_for_all_shares_at_once(replica, tmp_path):
    day = datetime(2008, 7, 1, tzinfo=UTC)
    rows = asked(replica, tmp_path, "tushare", Ask("daily", {}, day, day + timedelta(days=1), session=day.date()))
    assert sorted(rows["symbol"].to_list()) == ["AAPL.US", "GOOG.US", "IBM.US", "MSFT.US"]
    assert rows["date"].unique().to_list() == [date(2008, 7, 1)]


def test_tushares_calendar_and_list_of_shares(replica, tmp_path):
    span = (datetime(2008, 1, 1, tzinfo=UTC), datetime(2009, 1, 1, tzinfo=UTC))
    days = asked(replica, tmp_path, "tushare", Ask("trade_cal", {"exchange": ("SSE",)}, *span, *span))
    assert (days.height, days["is_open"].sum()) == (366, 253)
    shares = asked(replica, tmp_path, "tushare", Ask("stock_basic", {"list_status": ("L",)}))
    assert "AAPL.US" in shares["symbol"].to_list()
    assert shares["list_date"].null_count() == 0


def test_a_session_with_nothing_is_no_row_and_no_error(replica, tmp_path):
    day = datetime(2008, 7, 4, tzinfo=UTC)
    rows = asked(replica, tmp_path, "tushare", Ask("daily", {}, day, day + timedelta(days=1), session=day.date()))
    assert rows.height == 0


def test_the_token_of_tushare_is_in_the_body_and_never_in_what_is_shown(tmp_path):
    tushare = load_definition("tushare")
    request = build(
        tushare,
        Ask("daily", {}, session=date(2024, 1, 2)),
        None,
        Secrets(tmp_path, environment={"TUSHARE_TOKEN": "hunter22"}),
    )
    body = msgspec.json.decode(request.body or b"")
    assert body["token"] == "hunter22"
    assert body["api_name"] == "daily"
    assert body["params"] == {"trade_date": "20240102", "offset": 0, "limit": 5000}
    assert body["fields"].startswith("ts_code,trade_date,open")
    assert "hunter22" not in request.label + request.url + repr(request)
