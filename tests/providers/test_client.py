"""The client against a server on a real socket, with a real limiter: chains, verdicts, tokens, and no secret told."""

from __future__ import annotations

import itertools
import json
import threading
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

import pytest
from loopback import Loopback, Received, answer

from marketsync.clock import SystemClock
from marketsync.configuration import load_definition
from marketsync.definition import Definition, Limit, Verdict
from marketsync.errors import ConfigurationError, Interrupted, SecretMissing, WaitingForQuota
from marketsync.gate import OUTSIDE, seal
from marketsync.upstream import Upstream
from providers import client as client_module
from providers.client import Ask, Client, Outcome
from providers.limits import Limiter
from providers.secrets import Secrets
from providers.transport import HttpTransport

KEY = "key-of-the-house-0123"
START, END = datetime(2024, 1, 1, tzinfo=UTC), datetime(2024, 2, 1, tzinfo=UTC)
SCHEMA = {
    "s": {"as": "symbol", "type": "str"},
    "t": {"as": "ts", "type": "datetime"},
    "c": {"as": "close", "type": "f64"},
}


@pytest.fixture
def server():
    running = Loopback()
    yield running
    running.close()


class House:
    """One provider on the loopback server, and what it takes to ask it."""

    def __init__(self, server: Loopback, folder: Path, dataset: dict, **definition):
        whole = {
            "over": {"symbol": {"list": ["x"], "batch": 10}, "window": "1 month"},
            "request": {"path": "/bars", "query": {"symbols": "$symbol", "start": "$window.start"}},
            "response": {"rows": "rows"},
            "schema": SCHEMA,
            "key": ["symbol", "ts"],
            **dataset,
        }
        made = {"provider": "house", "base_url": server.url, "datasets": {"bars": whole}, **definition}
        self.server = server
        self.definition = Definition.model_validate(made)
        self.clock = SystemClock()
        limits = self.definition.limits or (Limit(requests=1000, per="minute"),)
        self.limiter = Limiter(
            folder,
            "house",
            "main",
            limits,
            self.clock,
            dataset_limits={"bars": self.definition.datasets["bars"].limits},
        )
        self.transport = HttpTransport(self.clock)
        secrets = Secrets(folder, environment={"KEY": KEY}, mounted=folder)
        self.client = Client("house", self.definition, Upstream(), self.transport, self.limiter, secrets, self.clock)

    def says(self, *answers: bytes, path: str = "/bars") -> None:
        """Answer with these, one after another; the last one from then on."""
        left = list(answers)

        def serve(connection, request):
            connection.sendall(left.pop(0) if len(left) > 1 else left[0])

        self.server.routes[path] = serve

    def ask(self, cursor: dict | None = None, **more) -> Outcome:
        values = {"values": {"symbol": ("A",)}, "start": START, "end": END, **more}
        return self.client.ask(Ask("bars", **values), cursor, max_wait_seconds=0.2)

    def chain(self) -> list[Outcome]:
        """Follow the chain as the engine does, with the cursor through JSON each time."""
        outcomes, cursor = [], None
        while len(outcomes) < 50:
            outcomes.append(self.ask(cursor))
            if outcomes[-1].cursor is None:
                return outcomes
            cursor = json.loads(json.dumps(outcomes[-1].cursor))
        raise AssertionError("the chain does not end")

    def close(self) -> None:
        self.transport.close()
        self.limiter.close()


@pytest.fixture
def house(server, tmp_path):
    made = []

    def make(dataset: dict | None = None, **definition) -> House:
        made.append(House(server, tmp_path / str(len(made)), dataset or {}, **definition))
        return made[-1]

    (tmp_path / "0").mkdir()
    (tmp_path / "1").mkdir()
    yield make
    for one in made:
        one.close()


def row(day: int, symbol: str = "A", close: object = 1.5) -> dict:
    return {"s": symbol, "t": f"2024-01-{day:02d}T00:00:00Z", "c": close}


def body(*rows: dict, **more) -> bytes:
    return answer(json.dumps({"rows": list(rows), **more}).encode(), Content_Type="application/json")


def asked(request: Received) -> dict[str, str]:
    return dict(parse_qsl(urlsplit(request.path).query))


# ---------------------------------------------------------------- rows


def test_rows_come_with_their_counts_times_and_label(house) -> None:
    here = house()
    here.says(body(row(2), row(3)))
    outcome = here.ask()
    assert (outcome.verdict, outcome.rows, outcome.status, outcome.cursor) == (Verdict.ROWS, 2, 200, None)
    assert outcome.bytes > 50
    assert outcome.sent_at <= outcome.answered_at <= datetime.now(UTC)
    assert outcome.label == "house.bars: GET /bars?symbols=A&start=2024-01-01T00:00:00Z"
    assert seal(here.definition.datasets["bars"], [outcome.batch]).frame["close"].to_list() == [1.5, 1.5]


def test_a_request_is_described_without_being_sent(house) -> None:
    here = house(auth={"query": {"apikey": "$secret.KEY"}})
    label = here.client.describe(Ask("bars", {"symbol": ("A", "B")}, START, END))
    assert label == "house.bars: GET /bars?symbols=A,B&start=2024-01-01T00:00:00Z"
    assert here.server.received == []


def test_no_rows_are_empty_and_rows_outside_the_window_are_set_aside(house) -> None:
    here = house()
    here.says(body(), body(row(2), {**row(2), "t": "2024-02-01T00:00:00Z"}))
    assert here.ask().verdict is Verdict.EMPTY
    outcome = here.ask()
    gated = seal(here.definition.datasets["bars"], [outcome.batch])
    assert gated.rejected["reason"].to_list() == [OUTSIDE]
    assert outcome.rows == gated.fetched == gated.kept + gated.quarantined


def test_rows_of_a_whole_window_may_be_older_than_what_is_owed(house) -> None:
    here = house({"request": {"path": "/$window.year.json"}})
    here.says(body(row(2)), path="/2024.json")
    outcome = here.ask(start=datetime(2024, 1, 20, tzinfo=UTC), window_start=START, window_end=END)
    assert seal(here.definition.datasets["bars"], [outcome.batch]).kept == 1


def test_the_times_of_a_session_may_be_of_the_evening_before(house) -> None:
    here = house({"over": {"session": "XSHG"}, "request": {"path": "/bars", "query": {"d": "$session"}}})
    here.says(body({**row(2), "t": "2024-01-05T13:00:00Z"}))
    day = datetime(2024, 1, 8, tzinfo=UTC)
    outcome = here.ask(values={}, start=day, end=day + timedelta(days=1), session=date(2024, 1, 8))
    assert seal(here.definition.datasets["bars"], [outcome.batch]).kept == 1


def test_constants_are_in_the_rows(house) -> None:
    here = house(
        {"schema": {**SCHEMA, "s": {"as": "symbol", "type": "str", "value": "$symbol"}}, "over": {"symbol": ["x"]}}
    )
    here.says(body({"t": "2024-01-02T00:00:00Z", "c": 1}))
    gated = seal(here.definition.datasets["bars"], [here.ask().batch])
    assert gated.frame["symbol"].to_list() == ["A"]


def test_base_url_of_the_upstream_is_where_requests_go(house, server, tmp_path) -> None:
    here = house(base_url="https://api.example.com")
    moved = Client(
        "house",
        here.definition,
        Upstream(base_url=server.url),
        here.transport,
        here.limiter,
        Secrets(tmp_path),
        here.clock,
    )
    here.says(body(row(2)))
    assert moved.ask(Ask("bars", {"symbol": ("A",)}, START, END)).rows == 1


# ---------------------------------------------------------------- chains


def test_a_token_chain_is_followed_to_its_end_by_a_cursor_that_json_can_hold(house) -> None:
    here = house({"page": {"token": "next", "send": "page_token"}})
    here.says(body(row(2), next="one"), body(next="two"), body(row(3), next=None))
    outcomes = here.chain()
    assert [outcome.verdict for outcome in outcomes] == [Verdict.ROWS, Verdict.EMPTY, Verdict.ROWS]
    assert [asked(request).get("page_token") for request in here.server.received] == [None, "one", "two"]
    assert {asked(request)["symbols"] for request in here.server.received} == {"A"}
    gated = seal(here.definition.datasets["bars"], [outcome.batch for outcome in outcomes])
    assert gated.kept == 2


def test_another_process_goes_on_where_the_cursor_says(house) -> None:
    page = {"page": {"token": "next", "send": "page_token"}}
    first, second = house(page), house(page)
    first.says(body(row(2), next="one"))
    cursor = json.loads(json.dumps(first.ask().cursor))
    second.says(body(row(3)))
    assert second.ask(cursor).cursor is None
    assert asked(second.server.received[-1])["page_token"] == "one"


def test_a_chain_that_goes_in_a_circle_fails_instead_of_never_ending(house) -> None:
    here = house({"page": {"token": "next", "send": "page_token"}})
    here.says(body(row(2), next="one"), body(row(3), next="two"), body(row(4), next="one"), body(row(5), next="two"))
    outcomes = here.chain()
    assert outcomes[-1].verdict is Verdict.FAIL
    assert outcomes[-1].batch is None
    assert "in a circle" in outcomes[-1].message


def test_next_urls_are_followed_on_the_same_host_with_the_key_and_kept_without_it(house, server) -> None:
    here = house({"page": {"next_url": "next_url"}}, auth={"query": {"apiKey": "$secret.KEY"}})
    here.says(body(row(2), next_url=f"{server.url}/bars?cursor=abc&apiKey={KEY}"), body(row(3)))
    outcomes = here.chain()
    assert len(outcomes) == 2
    assert KEY not in json.dumps(outcomes[0].cursor)
    assert asked(server.received[1]) == {"cursor": "abc", "apiKey": KEY}


def test_a_next_url_on_another_host_is_never_asked(house, server) -> None:
    here = house({"page": {"next_url": "next_url"}}, auth={"headers": {"X-Key": "$secret.KEY"}})
    other = Loopback()
    try:
        here.says(body(row(2), next_url=f"{other.url}/bars"))
        outcome = here.ask()
        assert outcome.verdict is Verdict.FAIL
        assert "another host" in outcome.message
        assert other.received == []
    finally:
        other.close()


def test_paging_by_time_fetches_every_row_of_a_server_that_serves_by_time(house, server) -> None:
    times = [1704067200000 + 60_000 * n for n in range(25)]
    here = house(
        {
            "request": {"path": "/klines", "dates": "unix_ms", "query": {"startTime": "$window.start", "limit": 10}},
            "over": {"symbol": ["x"], "window": "1 month"},
            "page": {"after": "ts", "send": "startTime", "step": 1, "size": 10},
            "response": {"names": ["t", "c"]},
            "schema": {
                "s": {"as": "symbol", "type": "str", "value": "$symbol"},
                "t": {"as": "ts", "type": "datetime", "format": "unix_ms"},
                "c": {"as": "close", "type": "f64"},
            },
        }
    )

    def serve(connection, request):
        start = int(asked(request)["startTime"])
        found = [[t, "1.25"] for t in times if t >= start][:10]
        connection.sendall(answer(json.dumps(found).encode()))

    server.routes["/klines"] = serve
    outcomes = here.chain()
    assert [outcome.rows for outcome in outcomes] == [10, 10, 5]
    gated = seal(here.definition.datasets["bars"], [outcome.batch for outcome in outcomes])
    assert (gated.kept, gated.duplicates) == (25, 0)
    assert gated.frame["close"].to_list() == [1.25] * 25


def test_a_full_page_without_continuation_asks_for_a_split(house) -> None:
    here = house({"page": {"cap": 2}})
    here.says(body(row(2), row(3)))
    outcome = here.ask()
    assert (outcome.verdict, outcome.batch, outcome.rows) == (Verdict.SPLIT, None, 0)


def test_an_empty_rule_on_one_page_does_not_end_a_token_chain(house) -> None:
    here = house({"page": {"token": "next", "send": "t"}}, faults=[{"when": {"path": {"rows": None}}, "then": "empty"}])
    here.says(answer(b'{"next": "one"}'), body(row(2)))
    assert [outcome.verdict for outcome in here.chain()] == [Verdict.EMPTY, Verdict.ROWS]


# ---------------------------------------------------------------- answers that are no rows


@pytest.mark.parametrize(
    ("said", "verdict"),
    [
        (answer(b'{"message": "unauthorized"}', "401 Unauthorized"), Verdict.STOP_PROVIDER),
        (answer(b'{"message": "no"}', "403 Forbidden"), Verdict.STOP_DATASET),
        (answer(b'{"message": "bad"}', "422 Unprocessable"), Verdict.DROP),
        (answer(b"busy", "503 Busy"), Verdict.RETRY),
        (answer(b'{"rows": [{"s": "A"'), Verdict.RETRY),
        (answer(b"<html></html>", Content_Type="text/html"), Verdict.RETRY),
        (answer(b'{"rows": {"no": "list"}}'), Verdict.FAIL),
        (answer(b'{"other": []}'), Verdict.FAIL),
        (answer(b'{"rows": [{"symbol": "A"}]}'), Verdict.FAIL),
        (answer(b"", "204 No Content"), Verdict.EMPTY),
    ],
)
def test_each_answer_without_rows_has_its_verdict(house, said: bytes, verdict: Verdict) -> None:
    here = house()
    here.says(said)
    outcome = here.ask()
    assert outcome.verdict is verdict
    assert outcome.cursor is None
    if verdict is Verdict.EMPTY:
        assert (outcome.rows, outcome.batch.fetched) == (0, 0)
    else:
        assert outcome.batch is None
        assert outcome.message
        assert outcome.raw is not None


def test_a_lost_connection_is_asked_again_and_told(house, server) -> None:
    here = house()
    server.routes["/bars"] = lambda connection, request: server.reset(connection)
    outcome = here.ask()
    assert (outcome.verdict, outcome.status) == (Verdict.RETRY, 0)
    assert outcome.message


def test_a_secret_in_an_answer_is_in_nothing_that_is_told(house) -> None:
    here = house(auth={"query": {"apikey": "$secret.KEY"}, "headers": {"X-Key": "$secret.KEY"}})
    said = json.dumps({"message": f"your key {KEY} is over its limit"}).encode()
    here.says(answer(said, "403 Forbidden"))
    outcome = here.ask()
    assert KEY not in repr(outcome)
    assert "is over its limit" in outcome.message
    assert outcome.raw is not None
    assert "is over its limit" in outcome.raw


def test_too_frequent_holds_everyone_back_and_tells_until_when(house) -> None:
    here = house()
    here.says(answer(b"{}", "429 Too Many", Retry_After="30"))
    outcome = here.ask()
    assert outcome.verdict is Verdict.COOL_DOWN
    assert outcome.wait_seconds == 30
    with pytest.raises(WaitingForQuota) as held:
        here.ask()
    assert abs((held.value.resume_at - outcome.until).total_seconds()) < 1
    assert len(here.server.received) == 1


def test_a_limit_counted_by_dataset_holds_back_that_dataset_only(server, tmp_path) -> None:
    own = House(server, tmp_path, {"limits": [{"requests": 50, "per": "minute"}]})
    try:
        own.says(answer(b"{}", "429 Too Many", Retry_After="30"))
        own.ask()
        own.limiter.reserve("other", max_wait_seconds=0.1).unsent()
        with pytest.raises(WaitingForQuota):
            own.limiter.reserve("bars", max_wait_seconds=0.1)
    finally:
        own.close()


def test_a_spent_quota_tells_the_reset_of_the_declared_limit(house) -> None:
    limits = [{"requests": 100, "per": "day", "resets": "00:00 Asia/Shanghai"}]
    here = house(limits=limits, faults=[{"when": {"path": {"msg": "/每天/"}}, "then": "quota", "per": "day"}])
    here.says(answer(json.dumps({"msg": "每天最多访问该接口5次"}).encode()))
    outcome = here.ask()
    assert outcome.verdict is Verdict.QUOTA
    assert outcome.until.astimezone(UTC).strftime("%H:%M") == "16:00"
    with pytest.raises(WaitingForQuota):
        here.ask()


def test_a_limit_in_the_message_is_kept_from_then_on(house) -> None:
    rule = {
        "when": {"body": r"(\d+) a minute"},
        "then": "cool_down",
        "wait": "1 second",
        "per": "minute",
        "limit": "$match.1",
    }
    here = house(faults=[rule], limits=[{"requests": 500, "per": "minute"}])
    here.says(answer(b'{"m": "no more than 7 a minute"}'))
    here.ask()
    assert min(state.limit for state in here.limiter.state("bars")) == 7
    assert [state.limit for state in here.limiter.state("another")] == [500]


def test_a_wake_up_ends_the_wait(house) -> None:
    here = house()
    here.says(answer(b"{}", "429 Too Many", Retry_After="30"))
    here.ask()
    wake = threading.Event()
    wake.set()
    with pytest.raises(Interrupted):
        here.client.ask(Ask("bars", {"symbol": ("A",)}, START, END), wake=wake)


# ---------------------------------------------------------------- configuration


def test_what_cannot_be_asked_is_a_configuration_error_and_sends_nothing(house, server, tmp_path) -> None:
    here = house()
    with pytest.raises(ConfigurationError, match="no dataset 'trades'"):
        here.client.ask(Ask("trades"))
    with pytest.raises(ConfigurationError, match=r"\$wndow"):
        house({"request": {"path": "/$wndow"}})
    locked = Client(
        "house",
        Definition.model_validate(
            {**here.definition.model_dump(by_alias=True), "auth": {"headers": {"X": "$secret.NO"}}}
        ),
        Upstream(),
        here.transport,
        here.limiter,
        Secrets(tmp_path, environment={}, mounted=tmp_path),
        here.clock,
    )
    with pytest.raises(SecretMissing):
        locked.ask(Ask("bars", {"symbol": ("A",)}, START, END))
    assert server.received == []


@pytest.mark.parametrize("name", ["alpaca"])
def test_shipped_definitions_can_be_executed(name: str, house, tmp_path) -> None:
    here = house()
    definition = load_definition(name)
    Client(name, definition, Upstream(), here.transport, here.limiter, Secrets(tmp_path), here.clock)


# ---------------------------------------------------------------- OAuth 2

OAUTH = {"oauth2": {"token_url": "/token", "client_id": "$secret.KEY", "client_secret": "$secret.KEY"}}


@pytest.fixture
def oauth_house(house, server):
    here = house(auth=OAUTH)
    numbers = itertools.count(1)
    valid = set()

    def token(connection, request):
        value = f"token-number-{next(numbers)}"
        valid.add(value)
        connection.sendall(answer(json.dumps({"access_token": value, "expires_in": 3600}).encode()))

    def bars(connection, request):
        if request.headers.get("authorization", "").removeprefix("Bearer ") in valid:
            connection.sendall(body(row(2)))
        else:
            connection.sendall(answer(b"{}", "401 Unauthorized"))

    server.routes |= {"/token": token, "/bars": bars}
    here.valid = valid
    return here


def test_a_token_is_fetched_once_and_used_by_all(oauth_house, server) -> None:
    outcomes = [oauth_house.ask() for _ in range(3)]
    assert [outcome.verdict for outcome in outcomes] == [Verdict.ROWS] * 3
    assert [outcome.requests for outcome in outcomes] == [2, 1, 1]
    assert [request.path.partition("?")[0] for request in server.received].count("/token") == 1


def test_a_refused_token_is_renewed_once_within_the_same_ask(oauth_house, server) -> None:
    oauth_house.ask()
    oauth_house.valid.clear()
    outcome = oauth_house.ask()
    assert (outcome.verdict, outcome.requests) == (Verdict.ROWS, 3)


def test_a_token_that_is_refused_when_fresh_is_told_and_not_asked_for_ever(oauth_house, server) -> None:
    server.routes["/bars"] = lambda connection, request: connection.sendall(answer(b"{}", "401 Unauthorized"))
    outcome = oauth_house.ask()
    assert outcome.verdict is Verdict.REFRESH_AUTH
    assert outcome.requests == 4


def test_an_expired_token_is_renewed_before_it_is_refused(oauth_house, server, monkeypatch) -> None:
    monkeypatch.setattr(client_module, "TOKEN_MARGIN", timedelta(hours=2))
    oauth_house.ask()
    oauth_house.ask()
    assert [request.path.partition("?")[0] for request in server.received] == ["/token", "/bars"] * 2


@pytest.mark.parametrize(("status", "verdict"), [("400 Bad", Verdict.STOP_PROVIDER), ("503 Busy", Verdict.RETRY)])
def test_no_token_is_told(oauth_house, server, status: str, verdict: Verdict) -> None:
    said = answer(b'{"error": "invalid_client", "error_description": "who are you"}', status)
    server.routes["/token"] = lambda connection, request: connection.sendall(said)
    outcome = oauth_house.ask()
    assert outcome.verdict is verdict
    assert "who are you" in outcome.message
    assert KEY not in repr(outcome)


def test_many_threads_fetch_one_token(oauth_house, server) -> None:
    outcomes: list[Outcome] = []
    threads = [threading.Thread(target=lambda: outcomes.append(oauth_house.ask())) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [outcome.verdict for outcome in outcomes] == [Verdict.ROWS] * 6
    assert [request.path.partition("?")[0] for request in server.received].count("/token") == 1


# ---------------------------------------------------------------- what an error points at


def test_an_answer_without_the_rows_points_at_the_field_that_names_them(server, tmp_path):
    house = House(server, tmp_path, {"response": {"rows": "data.items"}})
    house.says(answer(b'{"data": {"rows": []}}'))
    outcome = house.client.ask(Ask("bars", {"symbol": ("x",)}, START, END))
    assert outcome.verdict is Verdict.FAIL
    assert outcome.message.startswith("datasets.bars.response.rows: the answer holds no 'data.items'")


def test_a_refused_key_is_told_with_the_secrets_that_were_sent_and_where_they_came_from(server, tmp_path):
    (tmp_path / "OTHER").write_text("other-key-of-the-house")
    house = House(server, tmp_path, {}, auth={"headers": {"Key": "$secret.KEY", "Other": "$secret.OTHER"}})
    house.says(answer(b'{"message": "who are you?"}', status=401))
    outcome = house.client.ask(Ask("bars", {"symbol": ("x",)}, START, END))
    assert outcome.verdict is Verdict.STOP_PROVIDER
    assert outcome.message == (
        f"who are you? [sent were the secrets KEY, from the environment variable KEY, and OTHER, from {tmp_path}/OTHER]"
    )
    assert KEY not in outcome.message
