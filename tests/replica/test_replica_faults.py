"""Every fault for every provider, over a real socket; and the schedule that decides when."""

from __future__ import annotations

import json
import socket

import pytest
import requests

from marketsync.errors import ConfigurationError
from providers.replica.faults import FAULTS

PROVIDER_WORDS = {
    # fault: provider: (status, text that the body holds)
    "not_yet": {"alpaca": (404, "not found"), "tushare": (404, "404"), "nasdaq_data_link": (404, "QECx05")},
    "too_many_rows": {
        "alpaca": (422, "too many rows"),
        "tushare": (200, "超过最大行数"),
        "nasdaq_data_link": (422, "QELx06"),
    },
    "too_frequent": {
        "alpaca": (429, "too many requests."),
        "tushare": (200, "每分钟最多访问"),
        "nasdaq_data_link": (429, "QELx04"),
    },
    "hour_quota": {"alpaca": (429, "hourly"), "tushare": (200, "每小时最多访问"), "nasdaq_data_link": (429, "hourly")},
    "day_quota": {"alpaca": (429, "daily"), "tushare": (200, "每天最多访问"), "nasdaq_data_link": (429, "QELx02")},
    "wrong_argument": {
        "alpaca": (422, "invalid symbol"),
        "tushare": (200, "参数错误"),
        "nasdaq_data_link": (422, "QESx04"),
    },
    "expired_token": {"alpaca": (401, "expired"), "tushare": (200, "过期"), "nasdaq_data_link": (401, "expired")},
    "bad_key": {"alpaca": (401, "unauthorized"), "tushare": (200, "token不对"), "nasdaq_data_link": (400, "QEAx01")},
    "no_permission": {
        "alpaca": (403, "subscription does not permit"),
        "tushare": (200, "没有接口访问权限"),
        "nasdaq_data_link": (403, "QEPx04"),
    },
    "server_error": {"alpaca": (500, "internal"), "tushare": (500, "500"), "nasdaq_data_link": (500, "QEMx01")},
    "bad_gateway": dict.fromkeys(["alpaca", "tushare", "nasdaq_data_link"], (502, "<html>")),
    "unavailable": {"alpaca": (503, "unavailable"), "tushare": (503, "503"), "nasdaq_data_link": (503, "QEXx01")},
    "token_refused": {
        "alpaca": (400, "page_token"),
        "tushare": (200, "offset"),
        "nasdaq_data_link": (422, "cursor_id"),
    },
    "unknown_error": {"alpaca": (460, "unexpected"), "tushare": (200, "59999"), "nasdaq_data_link": (460, "QEZx99")},
    "html_in_200": dict.fromkeys(["alpaca", "tushare", "nasdaq_data_link"], (200, "<html>")),
}


def broken(start, fault, provider, **options):
    return start(faults=[{"fault": fault, "provider": provider, "times": 1, **options}])


@pytest.mark.parametrize("fault", sorted(PROVIDER_WORDS))
def test_a_fault_speaks_the_providers_words_once_and_is_logged(start, ask, provider, fault):
    replica = broken(start, fault, provider)
    status, words = PROVIDER_WORDS[fault][provider]
    answer = ask(replica).any(provider)
    answer.encoding = "utf-8"
    assert answer.status_code == status
    assert words in answer.text
    entry = replica.log[0]
    assert (entry["fault"], entry["verdict"], entry["status"]) == (fault, FAULTS[fault], status)
    assert entry["rows"] == 0
    assert ask(replica).any(provider).status_code == 200
    assert (replica.log[1]["fault"], replica.log[1]["verdict"]) == (None, "rows")


def test_every_fault_is_tried_here():
    here = {
        "empty",
        "no_content",
        "full_page_no_token",
        "timeout",
        "connection_reset",
        "truncated",
        "malformed",
        "slow",
    }
    assert here | set(PROVIDER_WORDS) == set(FAULTS)


def count(answer, provider):
    body = answer.json()
    if provider == "alpaca":
        return sum(map(len, body["bars"].values())), body["next_page_token"]
    if provider == "tushare":
        return len(body["data"]["items"]), body["data"]["has_more"] or None
    return len(body["datatable"]["data"]), body["meta"]["next_cursor_id"]


def test_empty_is_an_answer_with_no_rows(start, ask, provider):
    replica = broken(start, "empty", provider)
    assert count(ask(replica).any(provider), provider) == (0, None)
    assert replica.log[0]["verdict"] == "empty"


def test_no_content_is_204_without_a_body_on_a_connection_that_lives_on(start, ask, provider):
    asker = ask(broken(start, "no_content", provider))
    answer = asker.any(provider)
    assert (answer.status_code, answer.content, "Content-Length" in answer.headers) == (204, b"", False)
    assert asker.any(provider).status_code == 200


def test_a_full_page_hides_that_there_is_more(start, ask, provider):
    replica = broken(start, "full_page_no_token", provider, cap=10)
    asker = ask(replica)
    assert count(asker.any(provider), provider) == (10, None)
    assert replica.log[0]["verdict"] == "split"
    assert count(asker.any(provider), provider)[0] > 10


def test_a_full_page_at_the_limit_asked_for_hides_it_too(start, ask):
    asker = ask(broken(start, "full_page_no_token", "alpaca"))
    assert count(asker.alpaca(limit=7), "alpaca") == (7, None)
    assert count(asker.alpaca(limit=7), "alpaca")[1] is not None


def test_a_page_that_is_not_full_hides_nothing(start, ask):
    replica = broken(start, "full_page_no_token", "alpaca")
    ask(replica).alpaca()
    assert replica.log[0]["verdict"] == "rows"


def test_timeout_never_answers(start, ask, provider):
    replica = broken(start, "timeout", provider)
    with pytest.raises(requests.exceptions.ReadTimeout):
        ask(replica, patience=0.3).any(provider)
    assert (replica.log[0]["status"], replica.log[0]["answered"], replica.log[0]["verdict"]) == (None, None, "retry")


def test_a_hang_can_end_with_the_connection_closed(start, ask):
    asker = ask(broken(start, "timeout", "alpaca", seconds=0.1))
    with pytest.raises(requests.exceptions.ConnectionError):
        asker.alpaca()


def pieces(replica, target="/v2/stocks/bars?symbols=AAPL&timeframe=1Day&start=2013-01-01&end=2013-03-01"):
    """What each read from the socket brings, to the end of the connection; the last is None when it was reset."""
    got = []
    with socket.create_connection((replica.host, replica.port), timeout=20) as connection:
        connection.sendall(
            f"GET {target} HTTP/1.1\r\nHost: x\r\nAPCA-API-KEY-ID: REPLICA-KEY\r\n"
            "APCA-API-SECRET-KEY: replica-secret\r\nConnection: close\r\n\r\n".encode()
        )
        try:
            while piece := connection.recv(65_536):
                got.append(piece)
        except ConnectionResetError:
            got.append(None)
    return got


@pytest.mark.parametrize(("at", "begun"), [("start", False), ("middle", True)])
def test_a_connection_is_reset_before_or_within_the_answer(start, ask, provider, at, begun):
    replica = broken(start, "connection_reset", provider, at=at)
    with pytest.raises((requests.exceptions.ConnectionError, requests.exceptions.ChunkedEncodingError)):
        ask(replica).any(provider)
    assert (replica.log[0]["status"], replica.log[0]["verdict"]) == (None, "retry")
    replica.set_faults([{"fault": "connection_reset", "at": at}])
    *got, end = pieces(replica)
    assert end is None
    assert bool(got) == begun


def test_truncated_announces_more_than_it_sends(start, ask, provider):
    replica = broken(start, "truncated", provider)
    with pytest.raises((requests.exceptions.ChunkedEncodingError, requests.exceptions.ConnectionError)):
        ask(replica).any(provider)
    replica.set_faults([{"fault": "truncated"}])
    head, _, body = b"".join(pieces(replica)).partition(b"\r\n\r\n")
    announced = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
    assert 0 < len(body) < announced
    assert replica.log[-1]["bytes"] == len(body)


def test_malformed_has_the_right_length_and_cut_json(start, ask, provider):
    replica = broken(start, "malformed", provider)
    answer = ask(replica).any(provider)
    assert answer.status_code == 200
    with pytest.raises(json.JSONDecodeError):
        json.loads(answer.content)
    assert replica.log[0]["verdict"] == "retry"


def test_slow_trickles_a_whole_answer(start, ask, provider):
    replica = broken(start, "slow", provider, seconds=0.2)
    asker = ask(replica)
    slow = asker.any(provider)
    assert count(slow, provider) == count(asker.any(provider), provider)
    assert (replica.log[0]["fault"], replica.log[0]["verdict"]) == ("slow", "rows")
    replica.set_faults([{"fault": "slow", "seconds": 0.2}])
    assert len(pieces(replica)) > 5
    replica.set_faults([])
    assert len(pieces(replica)) <= 2


def test_too_frequent_says_how_long_where_the_provider_can(start, ask):
    replica = start(clock=lambda: 1000.0)
    asker = ask(replica)
    replica.set_faults([{"fault": "too_frequent", "wait": 7}])
    answer = asker.alpaca()
    assert (answer.headers["X-RateLimit-Reset"], "Retry-After" in answer.headers) == ("1007", False)
    replica.set_faults([{"fault": "too_frequent", "wait": 7, "retry_after": True, "reset_header": False}])
    answer = asker.alpaca()
    assert (answer.headers["Retry-After"], "X-RateLimit-Reset" in answer.headers) == ("7", False)
    assert asker.nasdaq().headers["Retry-After"] == "7"
    replica.set_faults([{"fault": "too_frequent", "limit": 77}])
    assert "最多访问该接口77次" in asker.tushare().json()["msg"]
    replica.set_faults([{"fault": "too_frequent", "limit": 400, "wording": "new"}])
    assert "接口(daily)频率超限(400次/分钟)" in asker.tushare().json()["msg"]


def test_unavailable_may_send_retry_after(start, ask, provider):
    answer = ask(broken(start, "unavailable", provider, wait=9, retry_after=True)).any(provider)
    assert answer.headers["Retry-After"] == "9"


def test_words_are_those_recorded(start, ask, recorded):
    """Where a real error body is known, ours is equal to it in every field that is not a number or an id."""
    known = json.loads((recorded / "errors/error_bodies.json").read_text())
    real = {
        "tushare": {
            ("too_frequent", 200): 0,
            ("day_quota", 5): 3,
            ("no_permission", 0): 4,
            ("bad_key", 0): 5,
            ("wrong_argument", 0): 6,
        },
        "nasdaq_data_link": {
            ("day_quota", 0): 1,
            ("too_frequent", 0): 3,
            ("too_many_rows", 0): 5,
            ("no_permission", 0): 6,
            ("bad_key", 0): 7,
            ("wrong_argument", 0): 9,
            ("unavailable", 0): 10,
        },
        "alpaca": {("too_frequent", 0): 0, ("bad_key", 0): 1, ("no_permission", 0): 2, ("wrong_argument", 0): 3},
    }
    for provider, table in real.items():
        bodies = known[provider]
        for (fault, limit), number in table.items():
            replica = start(faults=[{"fault": fault, "limit": limit}])
            answer = ask(replica).any(provider)
            want, got = bodies[number]["body"], answer.json()
            for body in (want, got):
                body.pop("request_id", None)
            assert got.keys() == want.keys(), (provider, fault)
            if (provider, fault) != ("alpaca", "wrong_argument"):  # which symbol is the request's affair
                assert got == want
            assert answer.status_code == bodies[number]["http"]


# ----------------------------------------------------------------------------------------------------- the schedule


def faults_seen(replica):
    return [entry["fault"] for entry in replica.log]


@pytest.mark.parametrize(
    ("request_", "hit"), [(2, [2]), ([1, 4], [1, 4]), ("every 3", [3, 6]), (None, [1, 2, 3, 4, 5, 6])]
)
def test_a_rule_chooses_requests_by_number(start, ask, request_, hit):
    replica = start(faults=[{"fault": "server_error", "when": {"request": request_}}])
    asker = ask(replica)
    for _ in range(6):
        asker.alpaca()
    assert [e["n"] for e in replica.log if e["fault"]] == hit


def test_times_ends_a_rule(start, ask):
    replica = start(faults=[{"fault": "server_error", "times": 2}])
    asker = ask(replica)
    for _ in range(4):
        asker.alpaca()
    assert faults_seen(replica) == ["server_error", "server_error", None, None]


def test_a_rule_counts_only_what_it_fits(start, ask):
    rule = {"fault": "no_permission", "provider": "alpaca", "when": {"request": 2, "match": {"query": "symbols=IBM"}}}
    replica = start(faults=[rule])
    asker = ask(replica)
    for symbol in ("IBM", "AAPL", "AAPL", "IBM", "IBM"):
        asker.alpaca(symbols=symbol)
        asker.tushare()
    assert [e["fault"] for e in replica.log if e["provider"] == "alpaca"] == [None, None, None, "no_permission", None]
    assert {e["fault"] for e in replica.log if e["provider"] == "tushare"} == {None}


def test_rules_match_path_and_body_and_account(start, ask):
    accounts = {"tushare": {"one": {}, "two": {}}}
    replica = start(
        accounts=accounts,
        faults=[
            {"fault": "empty", "when": {"match": {"body": "trade_cal"}}},
            {"fault": "bad_gateway", "when": {"match": {"path": "/daily"}}},
            {"fault": "bad_key", "when": {"account": "two"}},
        ],
    )
    asker = ask(replica)
    asker.tushare("trade_cal", token="one")
    asker.tushare(token="one", path="/daily")
    asker.tushare(token="two")
    asker.tushare(token="one")
    assert faults_seen(replica) == ["empty", "bad_gateway", "bad_key", None]


def test_the_first_rule_that_fires_wins_and_the_others_still_count(start, ask):
    replica = start(
        faults=[{"fault": "empty", "when": {"request": 1}}, {"fault": "server_error", "when": {"request": [1, 2]}}]
    )
    asker = ask(replica)
    for _ in range(3):
        asker.alpaca()
    assert faults_seen(replica) == ["empty", "server_error", None]


def test_probability_is_a_share_and_repeats_with_the_seed(start, ask):
    def run(seed):
        replica = start(faults=[{"fault": "server_error", "when": {"probability": 0.3}}], seed=seed, limits="unlimited")
        asker = ask(replica)
        for _ in range(200):
            asker.alpaca()
        return faults_seen(replica)

    first = run(1)
    assert 30 < first.count("server_error") < 90
    assert run(1) == first != run(2)


def test_a_fault_outranks_limits_and_unknown_keys_but_is_charged(start, ask):
    replica = start(limits={"alpaca": [{"requests": 1, "per": "hour"}]}, faults=[{"fault": "empty", "times": 1}])
    asker = ask(replica)
    asker.alpaca()
    asker.alpaca()
    assert [e["verdict"] for e in replica.log] == ["empty", "quota"]


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        ({"fault": "earthquake"}, "earthquake"),
        ({"fault": "empty", "provider": "polygon"}, "polygon"),
        ({"fault": "empty", "when": {"request": "often"}}, "often"),
        ({"fault": "empty", "when": {"weather": "rain"}}, "weather"),
        ({"fault": "empty", "when": {"match": {"header": "x"}}}, "header"),
        ({"fault": "empty", "colour": "red"}, "colour"),
        ("empty", "empty"),
    ],
)
def test_a_wrong_rule_is_a_configuration_error_naming_it(start, rule, says):
    with pytest.raises(ConfigurationError, match=says):
        start(faults=[rule])


def test_rules_come_from_a_yaml_file(start, ask, tmp_path):
    file = tmp_path / "faults.yml"
    file.write_text("- fault: too_frequent\n  provider: tushare\n  when: {request: [1, 2]}\n  limit: 50\n")
    asker = ask(start(faults=file))
    assert [asker.tushare().json()["code"] for _ in range(3)] == [40203, 40203, 0]
