"""The replica as Alpaca: order, paging, tokens, bounds, words."""

from __future__ import annotations

import base64
import json

import polars as pl
import pytest


def pages(asker, **query):
    """All pages of a request, following the token with the original parameters."""
    found = []
    token = None
    while True:
        answer = asker.alpaca(**query, page_token=token)
        assert answer.status_code == 200, answer.text
        found.append(answer.json())
        token = found[-1]["next_page_token"]
        if token is None:
            return found


def rows(found):
    return [(symbol, bar) for page in found for symbol, bars in page["bars"].items() for bar in bars]


def test_pages_go_by_symbol_then_time_and_count_rows_over_all_symbols(start, ask, source):
    found = pages(ask(start()), symbols="MSFT,AAPL,FB", start="2012-05-01", end="2012-08-31", limit=100)
    sizes = [sum(map(len, page["bars"].values())) for page in found]
    assert sizes[:-1] == [100] * (len(sizes) - 1)
    assert list(found[0]["bars"]) == ["AAPL", "FB"]
    want = source.filter(
        pl.col("symbol").is_in(["AAPL", "FB", "MSFT"])
        & pl.col("date").is_between(pl.date(2012, 5, 1), pl.date(2012, 8, 31))
    )
    got = [(s, bar["t"][:10], bar["o"], bar["h"], bar["l"], bar["c"], bar["v"]) for s, bar in rows(found)]
    assert got == [(s, str(d), *prices) for s, d, *prices in want.drop("adj_close").rows()]


def test_daily_bars_start_at_new_york_midnight_in_winter_and_summer(start, ask):
    bars = ask(start()).alpaca(start="2012-03-09", end="2012-03-13").json()["bars"]["AAPL"]
    assert [bar["t"] for bar in bars] == ["2012-03-09T05:00:00Z", "2012-03-12T04:00:00Z", "2012-03-13T04:00:00Z"]


def test_a_page_that_is_just_full_ends_without_a_token(start, ask):
    page = ask(start()).alpaca(symbols="AAPL,IBM", limit=82).json()
    assert (sum(map(len, page["bars"].values())), page["next_page_token"]) == (82, None)


def test_the_token_names_the_last_bar_of_the_page(start, ask):
    page = ask(start()).alpaca(limit=3).json()
    last = page["bars"]["AAPL"][-1]["t"].replace("Z", ".000000000Z")
    assert base64.b64decode(page["next_page_token"]).decode() == f"AAPL|D|{last}"


def test_a_token_is_refused_with_other_parameters(start, ask):
    replica = start()
    token = ask(replica).alpaca(limit=3).json()["next_page_token"]
    assert ask(replica).alpaca(limit=3, page_token=token).status_code == 200
    refused = ask(replica).alpaca(limit=3, page_token=token, end="2013-02-27")
    assert (refused.status_code, refused.json()) == (400, {"message": "invalid page_token"})
    assert replica.log[-1]["verdict"] == "restart"


@pytest.mark.parametrize("token", ["nonsense", base64.b64encode(b"AAPL|M|2013-01-02T05:00:00Z").decode()])
def test_a_token_that_was_never_given_is_refused(start, ask, token):
    assert ask(start()).alpaca(page_token=token).status_code == 400


def test_sort_desc_pages_backwards_in_time_within_each_symbol(start, ask):
    asker = ask(start())
    forwards = rows(pages(asker, symbols="AAPL,IBM", limit=1000))
    backwards = rows(pages(asker, symbols="AAPL,IBM", limit=7, sort="desc"))
    assert [s for s, _ in backwards] == [s for s, _ in forwards]
    assert [b for s, b in backwards if s == "IBM"] == [b for s, b in forwards if s == "IBM"][::-1]


def test_both_ends_are_inclusive_as_dates_and_as_instants(start, ask):
    asker = ask(start())
    for begin, end in (("2013-02-28", "2013-03-01"), ("2013-02-28T05:00:00Z", "2013-03-01T00:00:00-05:00")):
        bars = asker.alpaca(start=begin, end=end).json()["bars"]["AAPL"]
        assert [bar["t"][:10] for bar in bars] == ["2013-02-28", "2013-03-01"]
    bars = asker.alpaca(start="2013-02-28T05:00:00.000000001Z", end="2013-03-01T04:59:59Z").json()["bars"]
    assert [bar["t"][:10] for bar in bars["AAPL"]] == ["2013-02-28"]  # as microseconds see it


def test_one_symbol_can_be_asked_for_by_path(start, ask):
    asker = ask(start())
    one = asker.alpaca("/v2/stocks/AAPL/bars", symbols=None).json()
    assert one["symbol"] == "AAPL"
    assert one["bars"] == asker.alpaca().json()["bars"]["AAPL"]
    assert asker.alpaca("/v2/stocks/ZZZ/bars", symbols=None).json()["bars"] is None


def test_symbols_it_does_not_have_are_left_out(start, ask):
    replica = start()
    assert ask(replica).alpaca(symbols="ZZZ").json() == {"bars": {}, "next_page_token": None}
    assert replica.log[-1]["verdict"] == "empty"
    assert list(ask(replica).alpaca(symbols="ZZZ,IBM").json()["bars"]) == ["IBM"]


@pytest.mark.parametrize(
    ("wrong", "status"),
    [
        ({"symbols": "aapl"}, 422),
        ({"symbols": None}, 400),
        ({"timeframe": "1Fortnight"}, 400),
        ({"limit": 10_001}, 400),
        ({"limit": 0}, 400),
        ({"start": "yesterday"}, 400),
        ({"start": "2013-03-02"}, 400),
        ({"feed": "bloomberg"}, 400),
        ({"sort": "sideways"}, 400),
        ({"colour": "red"}, 400),
    ],
)
def test_a_wrong_argument_is_refused_with_a_message(start, ask, wrong, status):
    replica = start()
    answer = ask(replica).alpaca(**wrong)
    assert answer.status_code == status
    assert answer.json()["message"]
    assert (replica.log[-1]["verdict"], replica.log[-1]["refused"]) == ("drop", "wrong_argument")


def test_a_key_it_does_not_know_or_a_wrong_secret_is_unauthorized(start, ask):
    replica = start()
    for keys in ({"APCA-API-KEY-ID": "X"}, {"APCA-API-KEY-ID": "REPLICA-KEY", "APCA-API-SECRET-KEY": "guess"}):
        answer = ask(replica).alpaca(keys=keys)
        assert (answer.status_code, answer.json()) == (401, {"message": "unauthorized"})
        assert replica.log[-1]["verdict"] == "stop_provider"


def test_what_an_account_is_denied_is_forbidden(start, ask):
    accounts = {"alpaca": {"REPLICA-KEY": {"secret": "replica-secret", "denied": ["sip"]}}}
    replica = start(accounts=accounts)
    assert ask(replica).alpaca(feed="sip").status_code == 403
    assert replica.log[-1]["verdict"] == "stop_dataset"
    assert ask(replica).alpaca(feed="iex").status_code == 200


def test_adjusted_prices_carry_the_factor_of_the_source(start, ask, source):
    bar = ask(start()).alpaca(start="2000-03-01", end="2000-03-01", adjustment="all").json()["bars"]["AAPL"][0]
    assert bar["c"] == round(source.row(0, named=True)["adj_close"], 4)


def test_minute_bars_are_paged_and_folded_into_daily_ones(start, ask):
    replica = start(data="generated:3000x3:1Min")
    asker = ask(replica)
    query = {"symbols": "GAAAA,GAAAB", "start": "2020-01-02", "end": "2020-01-06"}
    minutes = rows(pages(asker, timeframe="1Min", limit=500, **query))
    assert len(minutes) == 2 * 1000  # all that these two symbols have
    assert minutes[390][1]["t"] == "2020-01-03T14:30:00Z"
    first = [bar for symbol, bar in minutes if symbol == "GAAAA"][:390]
    day = asker.alpaca(**query).json()["bars"]["GAAAA"][0]
    assert (day["o"], day["c"]) == (first[0]["o"], first[-1]["c"])
    assert day["h"] == max(bar["h"] for bar in first)
    assert day["l"] == min(bar["l"] for bar in first)
    assert day["v"] == sum(bar["v"] for bar in first)


def test_shapes_are_those_recorded(start, ask, recorded):
    page = ask(start()).alpaca(symbols="AAPL,IBM", limit=40).json()
    for name in ("alpaca/derived_pages/bars_page1.json", "alpaca/rest/get_bars.json"):
        real = json.loads((recorded / name).read_text())
        real = real.get("body", real)
        assert set(page) == set(real)
        ours, theirs = page["bars"]["AAPL"][0], real["bars"]["AAPL"][0]
        assert list(ours) == list(theirs)
        assert len(ours["t"]) == len(theirs["t"])
        parts = [base64.b64decode(p["next_page_token"]).decode().split("|") for p in (page, real)]
        assert [len(p) for p in parts[0]][2] == [len(p) for p in parts[1]][2]
        assert parts[0][1] == parts[1][1]
    empty = json.loads((recorded / "alpaca/rest/get_bars_multi_empty_response.json").read_text())["body"]
    assert ask(start()).alpaca(symbols="ZZZ").json() == empty
