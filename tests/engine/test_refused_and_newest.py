"""What one wrong symbol costs the others, how long a refused request stays in sight, and what a small quota is spent on
first."""

from __future__ import annotations

from datetime import date

import pytest
from synced_place import alpaca_by_month

FIVE = ["AAPL", "FB", "GOOG", "IBM", "MSFT"]
PLAN = {"datasets": ["alpaca.daily_bars"], "since": "2010-01-01", "until": "2013-03-01"}


def symbols_asked(log):
    return [one["request"]["params"]["symbols"] for one in log]


def test_a_symbol_that_the_provider_refuses_is_found_and_costs_the_others_of_its_batch_nothing(place):
    here = place()
    here.write({**PLAN, "universe": ["AAPL", "FB", "IB$M", "GOOG", "IBM", "MSF#T", "MSFT"]})
    run = here.sync_typed()
    assert (run.code, run.state) == (3, "completed_with_findings")
    assert here.bars().equals(here.source(FIVE, date(2010, 1, 1), date(2013, 3, 1)))
    work = run.report["work"]
    assert work["dropped"] == 2
    assert work["units"] == sum(count for kind, count in work.items() if kind != "units")
    assert "invalid symbol: IB$M" in run.words
    assert "invalid symbol: MSF#T" in run.words
    holes = {tuple(hole["subjects"]): hole["reason"] for hole in run.report["datasets"][0]["judgement"]["holes"]}
    assert "invalid symbol: IB$M" in holes["IB$M",]


@pytest.mark.slow
def test_what_was_refused_stays_a_finding_is_not_asked_again_by_itself_and_is_when_told(place):
    here = place()
    here.write({**PLAN, "universe": ["AAPL", "IB$M"]})
    here.sync_typed()
    before = here.requests
    again = here.sync_typed()
    assert (again.code, again.sent, here.requests) == (3, 0, before)
    assert [one["kind"] for one in again.report["remarks"]] == ["still_dropped"]
    assert "invalid symbol: IB$M" in again.words
    assert "marketsync sync p --retry-failed" in [step["command"] for step in again.report["next_steps"]]
    told = here.sync_typed("--retry-failed")
    assert (told.code, symbols_asked(here.log[before:])) == (3, ["IB$M"])

    here.write({**PLAN, "universe": ["AAPL"]})
    assert here.sync_typed().code == 0


def test_only_those_refused_symbols_that_are_named_are_asked_again_then_or_later(place):
    here = place()
    here.write({**PLAN, "universe": ["AAPL", "IB$M", "MSF#T", "GO+OG"]})
    assert here.sync_typed().report["work"]["dropped"] == 3
    before = here.requests
    here.sync_typed("--retry-failed", "--only", "IB$M", "--only", "MSF#T")
    assert set(",".join(symbols_asked(here.log[before:])).split(",")) == {"IB$M", "MSF#T"}
    before = here.requests
    assert (here.sync_typed().sent, here.requests) == (0, before)


def test_a_refusal_that_means_every_request_is_not_asked_for_each_symbol(place):
    here = place(data="generated:100x64:1Day")
    names = list(here.replica.market.symbols)
    wrong = alpaca_by_month(100).replace("timeframe: 1Day", "timeframe: 1Dya").replace(
        "{universe: $plan}", "{universe: $plan, batch: 100}"
    )  # fmt: skip
    here.write({**PLAN, "since": "2013-02-10", "universe": names}, definition=wrong)
    run = here.sync_typed()
    assert run.code == 3
    assert 10 < run.sent < 30
    assert run.report["work"]["dropped"] > 0


def test_a_small_quota_is_spent_on_the_newest_before_the_history_is_touched(place):
    here = place()
    definition = alpaca_by_month(5)
    upstream = {"limits": [{"requests": 6, "per": "day"}], "tuning": {"threads": 4}}
    here.write(
        {**PLAN, "universe": ["IBM"], "until": "2013-02-28"},
        definition=definition,
        upstream=upstream,
    )
    run = here.sync_typed()
    assert (run.code, run.state, run.sent) == (75, "waiting_for_quota", 6)
    # February has 19 sessions: four pages of five, asked one after the other; only then the oldest month is begun.
    assert [one["request"]["params"]["start"][:7] for one in here.log[:4]] == ["2013-02"] * 4
    assert {one["request"]["params"]["start"][:4] for one in here.log[4:]} == {"2010"}
