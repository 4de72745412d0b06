"""The replica as Tushare Pro: envelope, order, paging, units, the calendar, words inside HTTP 200."""

from __future__ import annotations

from datetime import date

import polars as pl
import pytest
import yaml


def table(answer) -> pl.DataFrame:
    body = answer.json()
    assert (answer.status_code, body["code"]) == (200, 0), body
    data = body["data"]
    return pl.DataFrame(data["items"], schema=data["fields"], orient="row", infer_schema_length=None)


def everything(asker, api="daily", limit=None, **params):
    """All rows, following has_more with offset."""
    parts, offset = [], 0
    while True:
        answer = asker.tushare(api, **params, offset=offset, **({"limit": limit} if limit else {}))
        parts.append(table(answer))
        offset += parts[-1].height
        if not answer.json()["data"]["has_more"]:
            return parts


def test_daily_is_the_source_newest_first_in_lots(start, ask, source):
    parts = everything(ask(start()), start_date="20000101", end_date="20131231")
    assert [p.height for p in parts] == [6000, 6000, 154]
    got = pl.concat(parts, how="vertical_relaxed")
    want = source.sort(["date", "symbol"], descending=[True, False])
    assert got["ts_code"].to_list() == (want["symbol"] + ".US").to_list()
    assert got["trade_date"].to_list() == want["date"].dt.strftime("%Y%m%d").to_list()
    for column in ("open", "high", "low", "close"):
        assert got[column].cast(pl.Float64).to_list() == want[column].to_list()
    assert (got["vol"] * 100).round().cast(pl.Int64).to_list() == want["volume"].to_list()


def test_change_is_against_the_close_before_and_null_for_the_first_bar(start, ask):
    rows = table(ask(start()).tushare(ts_code="FB.US")).reverse()
    assert rows.row(0, named=True)["pre_close"] is None
    first, second = rows.row(0, named=True), rows.row(1, named=True)
    assert second["pre_close"] == first["close"]
    assert second["change"] == round(second["close"] - first["close"], 4)


def test_the_same_call_is_served_at_all_three_paths(start, ask):
    asker = ask(start())
    want = table(asker.tushare()).rows()
    for path in ("/daily", "/dataapi/daily", "/dataapi"):
        assert table(asker.tushare(path=path)).rows() == want


def test_fields_choose_columns_in_their_order_and_unknown_parameters_are_ignored(start, ask):
    rows = table(ask(start()).tushare(fields="close,ts_code,nonsense", trade_date="20120601", ts_type_name="x"))
    assert rows.columns == ["close", "ts_code"]
    assert rows["ts_code"].to_list() == ["AAPL.US", "FB.US", "GOOG.US", "IBM.US", "MSFT.US"]


def test_several_codes_and_small_pages_lose_and_repeat_nothing(start, ask):
    asker = ask(start())
    codes = {"ts_code": "IBM.US,AAPL.US,ZZZ.US", "start_date": "20130101"}
    whole = table(asker.tushare(**codes)).rows()
    assert [r for part in everything(asker, limit=7, **codes) for r in part.rows()] == whole
    assert len(whole) == len(set(whole)) == 2 * 41


def test_no_call_brings_more_than_six_thousand_rows(start, ask):
    answer = ask(start()).tushare(start_date="20000101", limit=9000)
    assert (table(answer).height, answer.json()["data"]["has_more"]) == (6000, True)


def test_nothing_found_is_code_zero_with_no_items(start, ask):
    replica = start()
    body = ask(replica).tushare(trade_date="20120602").json()
    assert (body["code"], body["data"]["items"], body["data"]["has_more"]) == (0, [], False)
    assert replica.log[-1]["verdict"] == "empty"


def test_the_calendar_knows_holidays_and_the_session_before(start, ask):
    rows = table(ask(start()).tushare("trade_cal", start_date="20121221", end_date="20121227", exchange="SSE"))
    assert rows.select("cal_date", "is_open", "pretrade_date").rows() == [
        ("20121227", 1, "20121226"),
        ("20121226", 1, "20121224"),
        ("20121225", 0, "20121224"),
        ("20121224", 1, "20121221"),
        ("20121223", 0, "20121221"),
        ("20121222", 0, "20121221"),
        ("20121221", 1, "20121220"),
    ]


def test_the_calendar_holds_every_session_of_the_source(start, ask, source):
    found = table(ask(start()).tushare("trade_cal", start_date="20000301", end_date="20130301", is_open=1))
    assert set(found["cal_date"]) == set(source["date"].dt.strftime("%Y%m%d"))


def test_stock_basic_lists_every_symbol_with_its_first_day(start, ask):
    rows = table(ask(start()).tushare("stock_basic", fields="ts_code,symbol,list_date,list_status"))
    assert rows.row(1) == ("FB.US", "FB", "20120518", "L")
    assert rows.height == 5
    assert table(ask(start()).tushare("stock_basic", list_status="D")).height == 0
    assert table(ask(start(until=date(2001, 1, 1))).tushare("stock_basic"))["symbol"].to_list() == [
        "AAPL",
        "IBM",
        "MSFT",
    ]


@pytest.mark.parametrize(
    ("call", "code", "words", "verdict"),
    [
        ({"token": "x"}, 40101, "您的token不对，请确认。", "stop_provider"),
        ({"api": "nonsense"}, 40001, "请指定正确的接口名", "drop"),
        ({"trade_date": "2012-06-01"}, -2001, "参数校验失败", "drop"),
        ({"offset": "x", "trade_date": "20120601"}, -2001, "参数校验失败", "drop"),
        ({"offset": 1}, 50101, "必填参数", "drop"),
    ],
)
def test_refusals_come_as_http_200(start, ask, call, code, words, verdict):
    replica = start()
    answer = ask(replica).tushare(**call)
    body = answer.json()
    assert (answer.status_code, body["code"], body["data"]) == (200, code, None)
    assert words in body["msg"]
    assert replica.log[-1]["verdict"] == verdict


def test_a_denied_api_says_so_with_the_code_of_a_rate(start, ask):
    replica = start(accounts={"tushare": {"replica-token": {"denied": ["daily"]}}})
    body = ask(replica).tushare().json()
    assert body["code"] == 40203
    assert "没有接口访问权限" in body["msg"]
    assert replica.log[-1]["verdict"] == "stop_dataset"


def test_the_log_keeps_the_call_without_its_token(start, ask):
    replica = start()
    ask(replica).tushare(fields="close", ts_code="IBM.US")
    assert replica.log[-1]["request"] == {
        "method": "POST",
        "path": "/",
        "params": {"api_name": "daily", "params": {"ts_code": "IBM.US"}, "fields": "close"},
    }
    assert replica.log[-1]["account"] == "replica-token"


def test_generated_symbols_page_across_sessions_that_not_all_of_them_have(start, ask):
    replica = start(data="generated:1003x10")  # the first three symbols have one session more
    parts = everything(ask(replica), limit=17, start_date="20000101")
    got = [(r["trade_date"], r["ts_code"]) for p in parts for r in p.rows(named=True)]
    assert len(got) == len(set(got)) == 1003
    assert got == sorted(got, key=lambda r: (-int(r[0]), r[1]))
    assert [code for day, code in got if day == got[0][0]] == ["GAAAA.US", "GAAAB.US", "GAAAC.US"]


def test_columns_are_those_of_the_hand_checked_schemas(start, ask, recorded):
    for api in ("daily", "trade_cal", "stock_basic"):
        known = yaml.safe_load((recorded / f"docs/ground_truth/tushare_schema/{api}.yaml").read_text())
        names = {column["name"] for column in known["columns"]}
        found = table(ask(start()).tushare(api, **({"ts_code": "IBM.US"} if api == "daily" else {"limit": 5})))
        assert set(found.columns) <= names
        assert set(known["primary_key"]) <= set(found.columns)
        if api == "daily":
            assert set(found.columns) == names
