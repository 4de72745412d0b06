"""What answers mean: rules in their order, waits in every spelling, and what holds when no rule applies."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest

from marketsync.definition import Definition, Fault, Verdict
from marketsync.durations import Span, Unit
from providers.client import _document
from providers.decode import Decoder, Malformed
from providers.faults import Asked, Rules, Ruling, classify, instant_of
from providers.transport import Answer, Trouble

NOW = datetime(2024, 1, 2, 12, tzinfo=UTC)
RECORDED = Path(__file__).resolve().parents[3] / "shared" / "data" / "errors" / "error_bodies.json"


def answer(body: Any = None, status: int = 200, trouble: Trouble | None = None, **headers: str) -> Answer:
    data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body, ensure_ascii=False).encode()
    spelled = {name.replace("_", "-"): value for name, value in headers.items()}
    return Answer(status, spelled, data, NOW, NOW, trouble, "the line broke" if trouble else "")


def definition(faults: list[dict] | None = None, own: list[dict] | None = None, **response: Any) -> Definition:
    dataset = {"schema": {"s": "str"}, "key": ["s"], "faults": own or [], "response": response or {"rows": "data"}}
    return Definition.model_validate(
        {"provider": "p", "base_url": "https://x.example", "faults": faults or [], "datasets": {"d": dataset}}
    )


def judge(spec: Definition, given: Answer, asked: Asked = Asked()) -> Ruling:
    opened = None
    if given.trouble is None:
        try:
            opened = Decoder(spec.datasets["d"]).open(given.body)
        except Malformed:
            opened = None
    if given.status >= 300:
        return classify(
            [*spec.datasets["d"].faults, *spec.faults], given, _document(given.body), spec.datasets["d"], asked
        )
    return Rules(spec, "d").judge(given, opened, asked)


def ruled(rule: dict, given: Answer) -> Ruling:
    return judge(definition([rule]), given)


# ---------------------------------------------------------------- built-in rules


@pytest.mark.parametrize(
    ("status", "verdict"),
    [
        (200, Verdict.ROWS),
        (204, Verdict.EMPTY),
        (302, Verdict.FAIL),
        (400, Verdict.DROP),
        (401, Verdict.STOP_PROVIDER),
        (403, Verdict.STOP_DATASET),
        (404, Verdict.DROP),
        (408, Verdict.RETRY),
        (418, Verdict.COOL_DOWN),
        (422, Verdict.DROP),
        (429, Verdict.COOL_DOWN),
        (451, Verdict.FAIL),
        (500, Verdict.RETRY),
        (503, Verdict.RETRY),
        (599, Verdict.RETRY),
    ],
)
def test_without_a_rule_the_status_decides(status: int, verdict: Verdict) -> None:
    assert judge(definition(), answer({"data": []}, status)).verdict is verdict


@pytest.mark.parametrize("trouble", list(Trouble))
def test_trouble_on_the_line_is_asked_again_only_where_that_can_help(trouble: Trouble) -> None:
    expected = {Trouble.REDIRECT: Verdict.FAIL, Trouble.TOO_LARGE: Verdict.SPLIT}.get(trouble, Verdict.RETRY)
    ruling = judge(definition([{"when": {"status": "2xx"}, "then": "drop"}]), answer(None, 200, trouble))
    assert ruling.verdict is expected
    assert ruling.message == "the line broke"


def test_a_file_not_found_is_not_yet_published_within_the_grace_and_a_wrong_request_after_it() -> None:
    by_file = Asked(by_file=True, late_until=NOW + timedelta(hours=1))
    assert judge(definition(), answer(None, 404), by_file).verdict is Verdict.NOT_YET
    assert judge(definition(), answer(None, 404), Asked(True, NOW)).verdict is Verdict.DROP
    assert judge(definition(), answer(None, 404), Asked(False, NOW + timedelta(hours=1))).verdict is Verdict.DROP


@pytest.mark.parametrize("body", [b'{"data": [', b"<html>busy</html>", b""])
def test_a_body_that_is_no_json_is_asked_again(body: bytes) -> None:
    assert judge(definition(), answer(body)).verdict is Verdict.RETRY


def test_a_web_page_in_place_of_csv_is_asked_again_and_no_rows() -> None:
    page = answer(b"<!DOCTYPE html><title>Maintenance</title>", 200, Content_Type="text/html; charset=utf-8")
    assert judge(definition(format="csv"), page).verdict is Verdict.RETRY
    mislabelled = answer(b"s\nx\n", 200, Content_Type="text/html")
    assert judge(definition(format="csv"), mislabelled).verdict is Verdict.ROWS


def test_an_empty_csv_is_empty() -> None:
    assert judge(definition(format="csv"), answer(b"")).verdict is Verdict.EMPTY


def test_the_providers_own_words_are_reported() -> None:
    assert judge(definition(), answer({"message": "invalid symbol: x"}, 422)).message == "invalid symbol: x"
    assert judge(definition(), answer({"quandl_error": {"code": "Q", "message": "m"}}, 422)).message.startswith("{")
    assert judge(definition(), answer(b"<html><title>Busy  now</title>", 503)).message == "Busy now"
    rule = {"when": {"status": 422}, "then": "drop", "say": "quandl_error.message"}
    assert ruled(rule, answer({"quandl_error": {"code": "Q", "message": "too many"}}, 422)).message == "too many"


# ---------------------------------------------------------------- waits


def test_too_frequent_waits_as_long_as_it_says_else_a_minute() -> None:
    ruling = judge(definition(), answer(None, 429, Retry_After="17"))
    assert (ruling.wait_seconds, ruling.until) == (17.0, NOW + timedelta(seconds=17))
    assert judge(definition(), answer(None, 429)).wait_seconds == 60.0
    assert (
        ruled({"when": {"status": 429}, "then": "cool_down", "per": "10 minutes"}, answer(None, 429)).wait_seconds
        == 600
    )


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30", 30),
        ("1.5", 1.5),
        (str(int(NOW.timestamp()) + 45), 45),
        (str(int(NOW.timestamp() * 1000) + 45_000), 45),
        (format_datetime(NOW + timedelta(seconds=90), usegmt=True), 90),
        ((NOW + timedelta(seconds=20)).isoformat(), 20),
    ],
)
def test_a_reset_is_read_in_every_spelling(text: str, seconds: float) -> None:
    assert instant_of(text, NOW) == NOW + timedelta(seconds=seconds)
    rule = {"when": {"status": 429}, "then": "cool_down", "wait": "$header.X-RateLimit-Reset"}
    ruling = ruled(rule, answer(None, 429, x_ratelimit_reset=text))
    assert ruling.wait_seconds == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["soon", "", "-5", "nan", "1e999"])
def test_a_reset_that_says_nothing_is_not_taken_for_now(text: str) -> None:
    rule = {"when": {"status": 429}, "then": "cool_down", "wait": "$header.Reset"}
    assert ruled(rule, answer(None, 429, Reset=text)).wait_seconds == 60.0


def test_a_reset_in_the_past_still_waits_a_moment() -> None:
    ruling = judge(definition(), answer(None, 429, Retry_After=str(int(NOW.timestamp()) - 100)))
    assert ruling.wait_seconds == 1.0


def test_a_number_in_the_message_is_the_wait_in_its_unit() -> None:
    rule = {
        "when": {"path": {"msg": r"/wait (\d+) min/"}},
        "then": "cool_down",
        "wait": "$match.1",
        "unit": "minute",
    }
    assert ruled(rule, answer({"msg": "please wait 3 minutes"})).wait_seconds == 180.0
    ban = {"when": {"body": r"banned until (\d+)"}, "then": "cool_down", "wait": "$match.1"}
    until = NOW + timedelta(minutes=2)
    assert ruled(ban, answer({"msg": f"banned until {int(until.timestamp() * 1000)}."})).until == until


def test_a_number_in_the_message_is_learned_as_the_limit() -> None:
    rule = {
        "when": {"path": {"msg": r"/(\d+)次\/分钟/"}},
        "then": "cool_down",
        "per": "minute",
        "limit": "$match.1",
    }
    ruling = ruled(rule, answer({"code": 40203, "msg": "频率超限(400次/分钟)"}))
    assert (ruling.learned_limit, ruling.per, ruling.wait_seconds) == (400, Span(1, Unit.MINUTE), 60.0)


def test_a_quota_without_a_wait_leaves_the_reset_to_the_limiter() -> None:
    ruling = ruled({"when": {"status": 402}, "then": "quota", "per": "day"}, answer(None, 402))
    assert (ruling.verdict, ruling.until, ruling.per) == (Verdict.QUOTA, None, Span(1, Unit.DAY))
    waits = ruled({"when": {"status": 402}, "then": "quota", "wait": "2 hours"}, answer(None, 402))
    assert waits.until == NOW + timedelta(hours=2)


def test_a_busy_server_that_says_when_is_asked_again_then() -> None:
    assert judge(definition(), answer(None, 503, Retry_After="9")).wait_seconds == 9.0
    assert judge(definition(), answer(None, 503)).wait_seconds is None


# ---------------------------------------------------------------- declared rules


def test_the_first_rule_that_applies_wins_and_the_dataset_s_come_before_the_definition_s() -> None:
    spec = definition(
        [{"when": {"status": 403}, "then": "stop_provider"}, {"when": {"status": "4xx"}, "then": "drop"}],
        [{"when": {"status": 403, "path": {"message": "/quota/"}}, "then": "quota"}],
    )
    assert judge(spec, answer({"message": "quota spent"}, 403)).rule == 0
    assert judge(spec, answer({"message": "no"}, 403)).rule == 1
    assert judge(spec, answer({"message": "no"}, 405)).rule == 2
    assert judge(spec, answer({"message": "no"}, 500)).rule is None


def test_all_that_a_rule_names_must_hold() -> None:
    rule = {
        "when": {"status": [400, 429], "header": {"X-Kind": "^limit$"}, "body": "slow", "path": {"a.b": 1}},
        "then": "cool_down",
    }
    whole = answer({"a": {"b": 1}, "note": "slow"}, 400, x_kind="limit")
    assert ruled(rule, whole).rule == 0
    assert ruled(rule, answer({"a": {"b": 1}, "note": "slow"}, 401, x_kind="limit")).rule is None
    assert ruled(rule, answer({"a": {"b": 2}, "note": "slow"}, 400, x_kind="limit")).rule is None
    assert ruled(rule, answer({"a": {"b": 1}, "note": "fast"}, 400, x_kind="limit")).rule is None
    assert ruled(rule, answer({"a": {"b": 1}, "note": "slow"}, 400, x_kind="limits")).rule is None
    assert ruled(rule, answer({"a": {"b": 1}, "note": "slow"}, 400)).rule is None


@pytest.mark.parametrize(
    ("wanted", "holding", "others"),
    [
        (0, [0, "0", 0.0], [1, None, "", False]),
        ("not 0", [1, -5, "x", False], [0, "0", None]),
        (True, [True, "true"], [False, 1, None]),
        ([1, "b"], [1, "1", "b"], [2, "a", None]),
        (None, [None], [0, "", []]),
        ("not null", [0, "", []], [None]),
        ("/rate (limit|s)/", ["over the rate limit", ["a rate s"]], ["rated", None]),
        ("not /ok/", ["error", 5], ["ok", "is ok", None]),
    ],
)
def test_a_path_has_a_value_one_of_several_a_pattern_or_another_than(wanted: Any, holding: list, others: list) -> None:
    rule = {"when": {"path": {"code": wanted}}, "then": "drop"}
    for value in holding:
        assert ruled(rule, answer({"code": value, "data": []})).rule == 0, value
    for value in others:
        assert ruled(rule, answer({"code": value, "data": []})).rule is None, value


def test_rules_judge_answers_with_status_200_before_rows_are_read() -> None:
    spec = definition([{"when": {"path": {"code": "not 0"}}, "then": "fail", "say": "msg"}])
    assert judge(spec, answer({"code": 50101, "msg": "必填参数", "data": [{"s": "x"}]})).message == "必填参数"
    assert judge(spec, answer({"code": 0, "msg": "", "data": [{"s": "x"}]})).verdict is Verdict.ROWS


def test_a_rule_can_say_that_rows_left_out_are_none() -> None:
    rule = {"when": {"path": {"data": None, "status": "OK"}}, "then": "empty"}
    assert ruled(rule, answer({"status": "OK"})).verdict is Verdict.EMPTY
    assert ruled(rule, answer({"status": "OK", "data": None})).verdict is Verdict.EMPTY
    assert ruled(rule, answer({"status": "OK", "data": [{"s": "x"}]})).verdict is Verdict.ROWS
    assert ruled(rule, answer({"status": "OK", "data": [{"s": "x"}], "n": "]"})).verdict is Verdict.ROWS


def test_rows_that_are_not_read_yet_are_neither_null_nor_any_value() -> None:
    rows = {"status": "OK", "data": [{"s": "error"}]}
    for wanted in (None, "error", "/error/", "not ok"):
        for path in ("data", "data.0.s", "data.9"):
            rule = {"when": {"path": {path: wanted}}, "then": "drop"}
            assert ruled(rule, answer(rows)).verdict is Verdict.ROWS, (path, wanted)
    assert ruled({"when": {"path": {"data": "not null"}}, "then": "drop"}, answer(rows)).verdict is Verdict.DROP


def test_plain_text_is_judged_by_its_body_within_the_first_64_kib() -> None:
    rule = {"when": {"body": "^Exceeded the daily hits limit"}, "then": "quota", "per": "day"}
    spec = definition([rule], format="csv")
    assert judge(spec, answer(b"Exceeded the daily hits limit")).verdict is Verdict.QUOTA
    late = {"when": {"body": "limit"}, "then": "quota"}
    assert (
        judge(definition([late], format="csv"), answer(b"s\n" + b"x\n" * 40_000 + b"limit\n")).verdict is Verdict.ROWS
    )


# ---------------------------------------------------------------- recorded bodies

RULES = {
    "tushare": [
        # every message about frequency ends with the words of the permission rule, and most share one code
        {"when": {"path": {"msg": "/每分钟最多访问/"}}, "then": "cool_down", "per": "minute"},
        {
            "when": {"path": {"msg": r"/频率超限\((\d+)次\/分钟\)/"}},
            "then": "cool_down",
            "per": "minute",
            "limit": "$match.1",
        },
        {"when": {"path": {"msg": "/每小时最多访问/"}}, "then": "cool_down", "per": "hour"},
        {"when": {"path": {"msg": "/每天最多访问/"}}, "then": "quota", "per": "day"},
        {"when": {"path": {"msg": "/没有接口.*访问权限/"}}, "then": "stop_dataset"},
        {"when": {"path": {"code": 2002}}, "then": "stop_dataset"},
        {"when": {"path": {"msg": "/token不对/"}}, "then": "stop_provider"},
        {"when": {"path": {"msg": "/参数|请指定正确的接口名/"}}, "then": "drop"},
        {"when": {"path": {"code": "not 0"}}, "then": "fail"},
    ],
    "nasdaq_data_link": [
        {"when": {"path": {"quandl_error.code": "/^QELx0[123]$/"}}, "then": "quota", "per": "day"},
        {"when": {"path": {"quandl_error.code": "/^QELx0[45]$/"}}, "then": "cool_down", "per": "10 minutes"},
        {"when": {"path": {"quandl_error.code": "/^QEA/"}}, "then": "stop_provider"},
        {"when": {"path": {"quandl_error.code": "/^QEP/"}}, "then": "stop_dataset"},
        {"when": {"path": {"quandl_error.code": "/^QE[LSC]/"}}, "then": "drop"},
        {"when": {"path": {"quandl_error.code": "/^QE[MX]/"}}, "then": "retry"},
    ],
    "alpaca": [{"when": {"status": 429}, "then": "cool_down", "wait": "$header.X-RateLimit-Reset"}],
    "polygon": [{"when": {"path": {"resultsCount": 0, "results": None}}, "then": "empty"}],
    "binance": [],
    "alphavantage": [
        {"when": {"path": {"Note": "/call frequency is \\d+ calls per minute/"}}, "then": "cool_down", "per": "minute"},
        {"when": {"body": r"\d+ requests per day"}, "then": "quota", "per": "day"},
        {"when": {"path": {"Error Message": "not null"}}, "then": "drop"},
    ],
    "fred": [{"when": {"status": 400, "path": {"error_message": "/api_key/"}}, "then": "stop_provider"}],
    "kraken": [
        {"when": {"path": {"error.0": "/Rate limit|lockout/"}}, "then": "cool_down"},
        {"when": {"path": {"error.0": "not null"}}, "then": "drop"},
    ],
    "sec": [
        {"when": {"body": "Rate Threshold"}, "then": "cool_down", "wait": "10 minutes"},
        {"when": {"body": "Undeclared Automated Tool"}, "then": "stop_provider"},
    ],
    "eodhd": [{"when": {"status": 402}, "then": "quota", "per": "day"}],
    "stooq": [
        {"when": {"body": "^Exceeded the daily hits limit"}, "then": "quota", "per": "day"},
        {"when": {"body": "^No data"}, "then": "empty"},
    ],
    "tiingo": [{"when": {"body": "hourly request allocation"}, "then": "cool_down", "per": "hour"}],
    "yahoo": [],
}

CLASSES = {
    "too_frequent": Verdict.COOL_DOWN,
    "day_limit": Verdict.QUOTA,
    "no_permission": Verdict.STOP_DATASET,
    "bad_token": Verdict.STOP_PROVIDER,
    "bad_argument": Verdict.DROP,
    "retry": Verdict.RETRY,
    "empty_ok": Verdict.EMPTY,
}


@pytest.mark.parametrize("provider", sorted(RULES))
def test_recorded_errors_are_told_apart(provider: str) -> None:
    if not RECORDED.exists():
        pytest.skip("the recorded error bodies are not on this machine")
    entries = json.loads(RECORDED.read_text())[provider]
    assert entries
    response = {"format": "csv"} if provider == "stooq" else {"rows": "data"}
    spec = definition(RULES[provider], **response)
    for entry in entries:
        body = entry["body"] if "body" in entry else entry["body_text"].encode()
        headers = {
            k.replace("-", "_"): v.replace("<unix seconds>", "1704197400") for k, v in entry.get("headers", {}).items()
        }
        kind = entry["class"].replace("/", "(").split("(")[0].strip()
        ruling = judge(spec, answer(body, entry["http"], **{k: v for k, v in headers.items() if "<" not in v}))
        assert ruling.verdict is CLASSES[kind], entry


def test_the_limit_in_a_recorded_message_is_learned() -> None:
    msg = "抱歉，您访问接口(stk_limit)频率超限(400次/分钟)，详见文档"
    ruling = judge(definition(RULES["tushare"]), answer({"code": 40203, "msg": msg, "data": None}))
    assert ruling.learned_limit == 400


def test_classify_without_compiling_equals_compiled_rules() -> None:
    faults = [Fault.model_validate(rule) for rule in RULES["tushare"]]
    spec = definition(RULES["tushare"])
    for document in ({"code": 1, "msg": "每天最多访问"}, {"code": 0, "data": []}):
        given = answer(document)
        assert classify(faults, given, document, spec.datasets["d"]) == judge(spec, given)
