"""Rates and quotas: sliding windows, days with a zone, several at once, each in the provider's words."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import pytest

from marketsync.clock import ManualClock
from marketsync.errors import ConfigurationError
from providers.replica.journal import violations
from providers.replica.limits import Meter, ReplicaClock, Window, duration, windows

NOON = datetime(2024, 3, 5, 12, tzinfo=UTC)


def only(provider, *limits):
    return {"limits": {provider: list(limits)}, "clock": ManualClock(NOON)}


def verdicts(replica):
    return [entry["verdict"] for entry in replica.log]


def test_a_rate_lets_through_what_it_says_and_slides(start, ask, provider):
    replica = start(**only(provider, {"requests": 3, "per": "minute"}))
    asker = ask(replica)
    for _ in range(2):
        asker.any(provider)
    replica.advance(40)
    for _ in range(2):
        asker.any(provider)
    assert verdicts(replica) == ["rows", "rows", "rows", "cool_down"]
    replica.advance(20)  # the first two are a minute old, the third is not
    for _ in range(3):
        asker.any(provider)
    assert verdicts(replica)[4:] == ["rows", "rows", "cool_down"]
    # Three came too many: the refused ones, and one that was let through only because refusals cost nothing.
    assert violations(replica.log, 3, 60) == 3


def test_alpaca_says_when_to_come_back(start, ask):
    replica = start(**only("alpaca", {"requests": 2, "per": "minute"}))
    asker = ask(replica)
    now = NOON.timestamp()
    first = asker.alpaca()
    replica.advance(10)
    last, refused = asker.alpaca(), asker.alpaca()
    told = [[int(a.headers[f"X-RateLimit-{h}"]) for h in ("Limit", "Remaining", "Reset")] for a in (first, last)]
    assert told == [[2, 1, now + 60], [2, 0, now + 70]]  # when the whole window is free again
    assert refused.status_code == 429
    assert refused.json() == {"message": "too many requests."}
    assert refused.headers["X-RateLimit-Reset"] == str(int(now) + 60)  # when the next request is let through
    replica.advance(50)
    assert asker.alpaca().status_code == 200


def test_tushare_counts_each_api_apart_and_names_its_rate_by_the_minute(start, ask):
    replica = start(**only("tushare", {"requests": 1, "per": "2 s", "each": "api"}))
    asker = ask(replica)
    asker.tushare()
    assert asker.tushare("stock_basic").json()["code"] == 0
    refused = asker.tushare().json()
    assert refused["code"] == 40203
    assert "每分钟最多访问该接口30次" in refused["msg"]


@pytest.mark.parametrize(
    ("per", "words", "verdict"),
    [("hour", "每小时最多访问该接口2次", "quota"), ("day", "每天最多访问该接口2次", "quota")],
)
def test_tushare_words_for_hours_and_days(start, ask, per, words, verdict):
    replica = start(**only("tushare", {"requests": 2, "per": per}))
    asker = ask(replica)
    answers = [asker.tushare().json() for _ in range(3)]
    assert words in answers[-1]["msg"]
    assert verdicts(replica)[-1] == verdict


@pytest.mark.parametrize(
    ("key", "per", "code", "verdict"),
    [
        ("replica-key", "10 minutes", "QELx04", "cool_down"),
        ("replica-key", "day", "QELx02", "quota"),
        (None, "day", "QELx01", "quota"),
    ],
)
def test_nasdaq_tells_the_day_from_ten_minutes_by_its_code(start, ask, key, per, code, verdict):
    tier = "anonymous" if key is None else [{"requests": 1, "per": per}]
    name = key or "anonymous"
    replica = start(accounts={"nasdaq_data_link": {name: {"limits": tier}}}, clock=ManualClock(NOON))
    asker = ask(replica)
    for _ in range(60):
        answer = asker.nasdaq(key=key)
        if answer.status_code != 200 and (per != "day" or "Lx04" not in answer.text):
            break
        replica.advance(31 if per == "day" else 0)
    assert (answer.status_code, answer.json()["quandl_error"]["code"]) == (429, code)
    assert verdicts(replica)[-1] == verdict


@pytest.mark.parametrize(
    ("provider", "midnight"),
    [
        ("tushare", "2024-03-05T16:00:00+00:00"),  # midnight in Shanghai
        ("nasdaq_data_link", "2024-03-06T00:00:00+00:00"),
        ("alpaca", "2024-03-06T05:00:00+00:00"),  # midnight in New York, in winter
    ],
)
def test_a_day_begins_again_at_midnight_where_the_provider_lives(start, ask, provider, midnight):
    replica = start(**only(provider, {"requests": 2, "per": "day"}))
    asker = ask(replica)
    for _ in range(3):
        asker.any(provider)
    replica.clock.set(datetime.fromisoformat(midnight).timestamp() - 1)
    asker.any(provider)
    replica.advance(1)
    asker.any(provider)
    assert verdicts(replica) == ["rows", "rows", "quota", "quota", "rows"]


def test_the_zone_of_a_day_can_be_set(start, ask):
    replica = start(**only("nasdaq_data_link", {"requests": 1, "per": "day", "zone": "America/New_York"}))
    asker = ask(replica)
    asker.nasdaq()
    replica.clock.set(datetime(2024, 3, 6, 4, 59, tzinfo=UTC).timestamp())
    asker.nasdaq()
    replica.clock.set(datetime(2024, 3, 6, 5, 0, tzinfo=UTC).timestamp())
    asker.nasdaq()
    assert verdicts(replica) == ["rows", "quota", "rows"]


def test_all_windows_hold_at_once_and_a_refusal_costs_nothing(start, ask):
    replica = start(**only("alpaca", {"requests": 2, "per": "second"}, {"requests": 5, "per": "minute"}))
    asker = ask(replica)
    for _ in range(4):
        for _ in range(3):
            asker.alpaca()
        replica.advance(1)
    assert (
        verdicts(replica) == ["rows", "rows", "cool_down"] * 2 + ["rows", "cool_down", "cool_down"] + ["cool_down"] * 3
    )


def test_a_spent_day_is_said_before_a_spent_second(start, ask):
    replica = start(**only("tushare", {"requests": 1, "per": "second"}, {"requests": 1, "per": "day"}))
    asker = ask(replica)
    asker.tushare()
    assert "每天" in asker.tushare().json()["msg"]


def test_accounts_have_their_own_windows(start, ask):
    accounts = {"tushare": {"one": {"limits": [{"requests": 1, "per": "hour"}]}, "two": {"limits": "unlimited"}}}
    replica = start(accounts=accounts)
    asker = ask(replica)
    codes = [asker.tushare(token=token).json()["code"] for token in ("one", "one", "two", "two", "replica-token")]
    assert codes == [0, 40203, 0, 0, 40101]


def test_the_default_tiers_are_the_providers_own(start):
    replica = start()
    told = {
        provider: [(w.requests, w.seconds) for w in accounts[next(iter(accounts))].meter.windows]
        for provider, accounts in replica._accounts.items()
    }
    assert told == {
        "alpaca": [(200, 60)],
        "tushare": [(100_000, 86_400), (200, 60)],
        "nasdaq_data_link": [(50_000, 86_400), (2_000, 600), (300, 10)],
    }


def test_unlimited_sends_no_rate_headers(start, ask):
    assert "X-RateLimit-Limit" not in ask(start(limits="unlimited")).alpaca().headers


def test_under_concurrency_and_delay_exactly_the_limit_is_admitted_in_every_window(start, ask):
    replica = start(limits={"alpaca": [{"requests": 10, "per": 0.5}]}, delay=(0.0, 0.1), seed=3)

    def hammer(_):
        asker = ask(replica)
        for _ in range(15):
            asker.alpaca()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(hammer, range(8)))
    assert len(replica.log) == 120
    admitted = [e for e in replica.log if e["verdict"] == "rows"]
    assert len(admitted) < 120
    assert violations(admitted, 10, 0.5) == 0
    # Each refusal was right: the window before it was full.
    for refused in (e for e in replica.log if e["verdict"] == "cool_down"):
        before = [e for e in admitted if refused["received"] - 0.5 < e["received"] <= refused["received"]]
        assert len(before) == 10


class Hesitant(Meter):
    """Looks, waits, charges: where threads would overtake one another, were the two not one step."""

    def _charge(self, *arguments):
        time.sleep(0.0005)
        super()._charge(*arguments)


def test_the_meter_admits_the_limit_once_however_many_threads_ask():
    clock = ReplicaClock(lambda: 1000.0)
    meter = Hesitant([Window(50, 60.0), Window(70, 86_400, "UTC")])
    barrier = threading.Barrier(8)

    def ask(_):
        barrier.wait()
        return sum(meter.admit("x", clock)[1].refused is None for _ in range(40))

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(ask, range(8))) == 50


@pytest.mark.parametrize(
    ("text", "seconds"),
    [(5, 5), ("minute", 60), ("10 minutes", 600), ("10 s", 10), ("1.5 hours", 5400), ("2 days", 172_800)],
)
def test_durations_read_as_people_write_them(text, seconds):
    assert duration(text) == seconds


@pytest.mark.parametrize(
    "limits", ["gold", [{"requests": 1}], [{"requests": 1, "per": "blink"}], [{"requests": 1, "per": 1, "x": 1}]]
)
def test_a_wrong_limit_is_a_configuration_error_that_says_so(limits):
    with pytest.raises(ConfigurationError, match=r"replica|gold|blink"):
        windows("alpaca", limits)
