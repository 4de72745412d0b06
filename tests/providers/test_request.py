"""From what is asked to a request: names, types, encodings, dates, credentials, paging parameters, the label."""

from __future__ import annotations

import base64
import json
from datetime import UTC, date, datetime
from pathlib import Path
from urllib.parse import parse_qs, parse_qsl, urlsplit

import pytest

from marketsync.definition import Definition
from marketsync.document import dotted
from marketsync.errors import ConfigurationError, ProviderError, SecretMissing
from marketsync.names import wrong_names
from providers.request import Ask, build, constants, same_host, token_request
from providers.secrets import Secrets

START, END = datetime(2024, 1, 1, tzinfo=UTC), datetime(2024, 2, 1, tzinfo=UTC)
SECRETS = {"KEY": "key-of-the-house", "USER": "me", "PW": "pass/word"}


def definition(dataset: dict, **more) -> Definition:
    whole = {"schema": {"symbol": "str", "ts": "datetime"}, "key": ["symbol", "ts"], **dataset}
    return Definition.model_validate(
        {"provider": "p", "base_url": "https://api.example.com/v1", "datasets": {"d": whole}, **more}
    )


@pytest.fixture
def secrets(tmp_path: Path) -> Secrets:
    return Secrets(tmp_path, environment=SECRETS, mounted=tmp_path)


def query(request) -> dict[str, str]:
    return dict(parse_qsl(urlsplit(request.url).query, keep_blank_values=True))


def ask(**more) -> Ask:
    values = {"values": {"symbol": ("AAPL", "BRK.B")}, "start": START, "end": END, **more}
    return Ask("d", **values)


BARS = {
    "over": {"symbol": {"list": ["x"], "batch": 2}, "window": "1 month"},
    "request": {
        "path": "/bars/$symbol",
        "query": {"symbols": "$symbol", "start": "$window.start", "end": "$window.end", "limit": 5, "raw": True},
    },
}


def test_names_are_filled_into_path_and_query_each_encoded_for_its_place(secrets: Secrets) -> None:
    request = build(definition(BARS), ask(values={"symbol": ("A/B", "C&D=é")}), None, secrets)
    assert request.method == "GET"
    assert urlsplit(request.url).path == "/v1/bars/A%2FB%2CC%26D%3D%C3%A9"
    assert query(request) == {
        "symbols": "A/B,C&D=é",
        "start": "2024-01-01T00:00:00Z",
        "end": "2024-02-01T00:00:00Z",
        "limit": "5",
        "raw": "true",
    }


def test_a_body_is_filled_at_any_depth_and_keeps_types(secrets: Secrets) -> None:
    dataset = {
        "over": {"code": {"list": ["1"]}, "window": "1 month"},
        "request": {
            "method": "POST",
            "dates": "unix_ms",
            "json": {
                "api": "$dataset",
                "fields": "$fields",
                "params": {"codes": ["$code", "x$code"], "from": "$window.start", "n": 5, "none": None, "flag": False},
                "price": "$$5",
            },
        },
        "schema": {
            "b": {"as": "symbol", "type": "str"},
            "a": {"as": "ts", "type": "datetime"},
            "c": {"type": "str", "value": "x"},
        },
    }
    request = build(definition(dataset), ask(values={"code": ("000001",)}), None, secrets)
    assert json.loads(request.body) == {
        "api": "d",
        "fields": "b,a",
        "params": {"codes": ["000001", "x000001"], "from": 1704067200000, "n": 5, "none": None, "flag": False},
        "price": "$5",
    }
    assert request.headers["Content-Type"] == "application/json"


def test_what_has_no_value_is_left_out_alone_and_an_error_inside_a_text(secrets: Secrets) -> None:
    dataset = {"over": {"symbol": ["x"]}, "request": {"query": {"s": "$symbol", "from": "$window.start", "k": "v"}}}
    request = build(definition(dataset), ask(values={}, start=None, end=None), None, secrets)
    assert query(request) == {"k": "v"}
    dataset["request"]["json"] = {"a": "$symbol", "b": ["$symbol", 1], "c": {"d": "$symbol"}}
    request = build(definition(dataset), ask(values={}, start=None, end=None), None, secrets)
    assert json.loads(request.body) == {"b": [1], "c": {}}
    dataset["request"] = {"path": "/bars/$symbol"}
    with pytest.raises(ConfigurationError, match=r"needs \$symbol"):
        build(definition(dataset), ask(values={}), None, secrets)


@pytest.mark.parametrize(
    ("time", "dates", "start", "end", "last"),
    [
        ("datetime", None, "2024-01-01T00:00:00Z", "2024-02-01T00:00:00Z", "2024-01-31T23:59:59.999999Z"),
        ("date", None, "2024-01-01", "2024-02-01", "2024-01-31"),
        ("datetime", "iso", "2024-01-01", "2024-02-01", "2024-01-31"),
        ("date", "%Y%m%d", "20240101", "20240201", "20240131"),
        ("datetime", "%Y-%m-%d %H:%M:%S", "2024-01-01 00:00:00", "2024-02-01 00:00:00", "2024-01-31 23:59:59"),
        ("datetime", "unix_s", "1704067200", "1706745600", "1706745599"),
        ("datetime", "unix_ms", "1704067200000", "1706745600000", "1706745599999"),
        ("date", "unix_s", "1704067200", "1706745600", "1706659200"),
    ],
)
def test_window_ends_are_exclusive_and_last_is_the_last_instant_inside(
    secrets: Secrets, time: str, dates: str | None, start: str, end: str, last: str
) -> None:
    dataset = {
        "over": {"window": "1 month"},
        "request": {"dates": dates, "query": {"a": "$window.start", "b": "$window.end", "c": "$window.last"}},
        "schema": {"symbol": "str", "ts": time},
    }
    request = build(definition(dataset), ask(), None, secrets)
    assert query(request) == {"a": start, "b": end, "c": last}


def test_a_whole_window_is_asked_for_by_its_anchor_and_not_by_what_is_owed(secrets: Secrets) -> None:
    dataset = {"over": {"window": "1 month"}, "request": {"path": "/$window.year/$window.month/$window.day.csv"}}
    owed = ask(start=datetime(2024, 3, 15, tzinfo=UTC), window_start=datetime(2024, 3, 1, tzinfo=UTC), window_end=END)
    assert build(definition(dataset), owed, None, secrets).url == "https://api.example.com/v1/2024/03/01.csv"


def test_sessions_are_written_as_dates_says_and_a_dot_ends_a_name(secrets: Secrets) -> None:
    dataset = {
        "over": {"session": "XNYS"},
        "request": {"path": "/files/$session.csv.gz", "dates": "%Y/%m/%d", "query": {"x": "$dataset-1"}},
    }
    request = build(definition(dataset), ask(values={}, session=date(2024, 1, 2)), None, secrets)
    assert urlsplit(request.url).path == "/v1/files/2024%2F01%2F02.csv.gz"
    assert query(request) == {"x": "d-1"}


def test_unknown_names_are_told_with_the_choice_before_anything_is_asked() -> None:
    wrong = definition(
        {
            "over": {"symbol": ["x"], "window": "1 month"},
            "request": {"path": "/$symbl", "json": {"a": [{"b": "x $session"}]}, "query": {"ok": "$secret.ANY"}},
            "schema": {"symbol": "str", "ts": "datetime", "v": {"type": "str", "value": "$venue"}},
        },
        auth={"headers": {"X": "$KEY"}},
    )
    found = [f"{dotted(path)}: {message} {remedy}" for path, message, remedy in wrong_names(wrong)]
    for name, place in (("$symbl", "path"), ("$session", "json"), ("$venue", "schema.v.value"), ("$KEY", "auth")):
        assert any(name in line and place in line for line in found), (name, found)
    assert len(found) == 4
    assert "$symbol" in found[0]
    assert list(wrong_names(definition(BARS))) == []


def test_a_value_from_a_batch_of_subjects_is_refused_since_rows_could_not_be_told_apart() -> None:
    schema = {"symbol": {"type": "str", "value": "$symbol"}, "ts": "datetime"}
    ((_, message, _),) = wrong_names(definition({**BARS, "schema": schema}))
    assert "could not be told apart" in message


def test_constants_follow_the_column_and_not_the_request(secrets: Secrets) -> None:
    spec = definition(
        {
            "over": {"symbol": ["x"], "session": "XSHG"},
            "request": {"dates": "%Y%m%d", "query": {"s": "$symbol", "d": "$session"}},
            "schema": {
                "symbol": {"type": "str", "value": "$symbol"},
                "day": {"type": "date", "value": "$session"},
                "at": {"type": "date", "format": "%d.%m.%Y", "value": "$session"},
                "source": {"type": "str", "value": "p"},
            },
            "key": ["symbol", "day"],
            "time": "day",
        }
    )
    found = constants(spec.datasets["d"], ask(values={"symbol": ("A",)}, session=date(2024, 1, 2)), secrets)
    assert found == {"symbol": "A", "day": "2024-01-02", "at": "02.01.2024", "source": "p"}


# ---------------------------------------------------------------- credentials


def test_credentials_go_into_headers_query_and_body_and_not_into_the_label(secrets: Secrets) -> None:
    spec = definition(
        {**BARS, "request": {**BARS["request"], "method": "POST", "json": {"a": 1}}},
        auth={
            "headers": {"X-Key": "$secret.KEY"},
            "query": {"apikey": "$secret.KEY"},
            "body": {"token": "$secret.KEY"},
        },
    )
    request = build(spec, ask(), None, secrets)
    assert request.headers["X-Key"] == SECRETS["KEY"]
    assert query(request)["apikey"] == SECRETS["KEY"]
    assert json.loads(request.body) == {"a": 1, "token": SECRETS["KEY"]}
    assert SECRETS["KEY"] not in request.label
    assert SECRETS["KEY"] not in repr(request)
    assert "AAPL,BRK.B" in request.label


def test_a_secret_in_the_path_or_a_parameter_is_not_in_the_label(secrets: Secrets) -> None:
    spec = definition(
        {"request": {"path": "/$secret.KEY/x", "query": {"k": "$secret.PW"}, "json": {"p": "$secret.KEY"}}}
    )
    request = build(spec, ask(), None, secrets)
    assert SECRETS["KEY"] in request.url
    assert SECRETS["KEY"] not in request.label
    assert "pass" not in request.label


def test_basic_and_bearer(secrets: Secrets) -> None:
    spec = definition(BARS, auth={"basic": {"user": "$secret.USER", "password": "$secret.PW"}})
    header = build(spec, ask(), None, secrets).headers["Authorization"]
    assert base64.b64decode(header.removeprefix("Basic ")) == b"me:pass/word"
    assert build(definition(BARS), ask(), None, secrets, bearer="tok").headers["Authorization"] == "Bearer tok"


def test_a_missing_secret_stops_the_request(tmp_path: Path) -> None:
    spec = definition(BARS, auth={"headers": {"X": "$secret.ABSENT"}})
    with pytest.raises(SecretMissing, match="ABSENT"):
        build(spec, ask(), None, Secrets(tmp_path, environment={}, mounted=tmp_path))


def test_a_token_is_asked_for_by_client_credentials(secrets: Secrets) -> None:
    oauth2 = {"token_url": "/oauth/token", "client_id": "$secret.USER", "client_secret": "$secret.PW", "scope": "md"}
    spec = definition(BARS, auth={"oauth2": oauth2})
    assert spec.auth.oauth2 is not None
    request = token_request(spec, spec.auth.oauth2, secrets)
    assert (request.method, request.url) == ("POST", "https://api.example.com/v1/oauth/token")
    assert parse_qs(request.body.decode()) == {
        "grant_type": ["client_credentials"],
        "client_id": ["me"],
        "client_secret": ["pass/word"],
        "scope": ["md"],
    }
    assert "pass" not in request.label


# ---------------------------------------------------------------- paging parameters


@pytest.mark.parametrize(
    ("page", "cursor", "expected"),
    [
        ({"offset": "offset", "limit": "limit", "size": 100}, None, {"offset": "0", "limit": "100"}),
        ({"offset": "offset", "limit": "limit", "size": 100}, {"offset": 300}, {"offset": "300", "limit": "100"}),
        ({"page": "p", "size": 10}, None, {"p": "1"}),
        ({"page": "p", "size": 10, "first": 0}, None, {"p": "0"}),
        ({"page": "p", "size": 10}, {"page": 4}, {"p": "4"}),
        ({"token": "next", "send": "page_token"}, None, {}),
        ({"token": "next", "send": "page_token"}, {"token": "a b&c"}, {"page_token": "a b&c"}),
        ({"after": "ts", "send": "start"}, {"after": "2024-01-05"}, {"start": "2024-01-05"}),
    ],
)
def test_each_style_puts_its_parameters_into_the_query(
    secrets: Secrets, page: dict, cursor: dict | None, expected: dict
) -> None:
    spec = definition({"over": {"window": "1 month"}, "request": {"query": {"start": "$window.start"}}, "page": page})
    found = query(build(spec, ask(), cursor, secrets))
    assert found == {"start": "2024-01-01T00:00:00Z", **expected}


def test_paging_parameters_go_into_the_body_or_its_params_where_told(secrets: Secrets) -> None:
    request = {"method": "POST", "json": {"api_name": "daily", "params": {"trade_date": "x"}}}
    page = {"offset": "offset", "limit": "limit", "size": 5, "where": "params"}
    body = json.loads(build(definition({"request": request, "page": page}), ask(), {"offset": 5}, secrets).body)
    assert body == {"api_name": "daily", "params": {"trade_date": "x", "offset": 5, "limit": 5}}
    page["where"] = "body"
    body = json.loads(build(definition({"request": request, "page": page}), ask(), {"offset": 5}, secrets).body)
    assert body == {"api_name": "daily", "params": {"trade_date": "x"}, "offset": 5, "limit": 5}


def test_a_next_url_is_taken_whole_and_gets_the_key_again(secrets: Secrets) -> None:
    spec = definition({**BARS, "page": {"next_url": "next"}}, auth={"query": {"apiKey": "$secret.KEY"}})
    request = build(
        spec, ask(), {"next_url": "https://api.example.com/v1/bars?cursor=ab%3D&limit=2", "pages": 1}, secrets
    )
    assert query(request) == {"cursor": "ab=", "limit": "2", "apiKey": SECRETS["KEY"]}
    assert request.label.endswith("(page 2)")
    with pytest.raises(ProviderError, match="another host"):
        build(spec, ask(), {"next_url": "https://evil.example.com/v1/bars"}, secrets)


@pytest.mark.parametrize(
    ("url", "same"),
    [
        ("https://api.example.com/x", True),
        ("https://api.example.com:443/x", True),
        ("https://api.example.com:8443/x", False),
        ("http://api.example.com/x", False),
        ("http://api.example.com:443/x", False),
        ("https://api.example.com.evil.net/x", False),
        ("https://api.example.com@evil.net/x", False),
        ("https://api.example.com:no/x", False),
        ("ftp://api.example.com/x", False),
        ("/relative", False),
    ],
)
def test_only_the_definition_s_own_host_and_port_are_the_same_host(url: str, same: bool) -> None:
    assert same_host("https://api.example.com/v1", url) is same


def test_the_upstream_s_base_url_replaces_the_definition_s(secrets: Secrets) -> None:
    request = build(definition(BARS), ask(), None, secrets, base_url="http://127.0.0.1:8080")
    assert request.url.startswith("http://127.0.0.1:8080/bars/")


def test_timeout_weight_and_dataset_are_handed_to_the_limiter(secrets: Secrets) -> None:
    spec = definition({**BARS, "request": {**BARS["request"], "timeout": "2 minutes", "weight": 3}})
    request = build(spec, ask(), None, secrets)
    assert (request.timeout_seconds, request.weight, request.dataset) == (120.0, 3, "d")


def test_all_pages_of_a_chain_ask_for_the_same_but_for_the_page(secrets: Secrets) -> None:
    spec = definition({**BARS, "page": {"token": "t", "send": "page_token", "limit": "limit", "size": 7}})
    first, second = build(spec, ask(), None, secrets), build(spec, ask(), {"token": "T", "pages": 1}, secrets)
    assert query(second) == {**query(first), "page_token": "T"}
    assert query(first)["limit"] == "7"  # the page's size replaces what the query says
    assert "T" not in second.label.partition("(page")[2]


def test_a_value_that_holds_what_joins_values_is_never_sent(secrets: Secrets) -> None:
    spec = definition({**BARS, "over": {"symbol": {"universe": "$plan", "batch": 3}, "window": "1 month"}})
    with pytest.raises(ConfigurationError, match="'A,B' holds ','"):
        build(spec, ask(values={"symbol": ("A,B",)}), None, secrets)
