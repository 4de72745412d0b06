"""Three processes sync one plan at once, on one account with a rate and a day's quota, against a provider that takes
its time: its own log shows no limit exceeded, every row arrives once, and the next day asks only for what is owed."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta

import pytest
from synced_place import Ended, Place, alpaca_by_month, asked_again, ended

from providers.replica import violations
from providers.replica.limits import next_midnight

SYMBOLS = ["AAPL", "GOOG", "IBM", "MSFT"]
DELAY_SECONDS = (0.0, 0.3)
NEW_YORK = "America/New_York"


def sync_three(place: Place) -> list[Ended]:
    """Run the plan in three processes side by side."""
    processes = [place.start() for _ in range(3)]
    return [ended(process) for process in processes]


def two_days(
    place: Callable[..., Place],
    *,
    rate: int,
    window_seconds: int,
    quota: int,
    months: int,
    day_seconds: int,
    max_wait_seconds: int,
) -> list[Ended]:
    """Sync through the end of a provider's day that is `day_seconds` away, and check all that must hold; return how
    the runs of the first day ended.

    The replica's clock is set so that its midnight comes then; the user's file says when that is by their own clock.
    A run waits for the rate, but not for the day (`max_wait_seconds`).
    """
    midnight = datetime.fromtimestamp(int(time.time()) + day_seconds, UTC)
    ahead = next_midnight(time.time(), NEW_YORK) - midnight.timestamp()
    first = date(2000, 3, 1)
    last = date(2000 + (2 + months) // 12, (2 + months) % 12 + 1, 1) - timedelta(days=1)
    made = place(
        limits={"alpaca": [{"requests": rate, "per": window_seconds}, {"requests": quota, "per": "day"}]},
        delay=DELAY_SECONDS,
        clock=lambda: time.time() + ahead,
    )
    made.write(
        {"datasets": ["alpaca.daily_bars"], "universe": SYMBOLS, "since": str(first), "until": str(last)},
        definition=alpaca_by_month(10_000),
        upstream={
            "limits": [
                {"requests": rate, "per": f"{window_seconds} seconds"},
                {"requests": quota, "per": "day", "resets": f"{midnight:%H:%M:%S} UTC"},
            ],
            "tuning": {"max_wait": f"{max_wait_seconds} seconds"},
        },
    )
    needed = len(SYMBOLS) * months
    assert quota < needed

    today = sync_three(made)

    assert time.time() < midnight.timestamp(), "this machine took too long for the day that the test gave it"
    assert [(one.code, one.state) for one in today] == [(75, "waiting_for_quota")] * 3, [one.words for one in today]
    assert {datetime.fromisoformat(one.report["resume_at"]) for one in today} == {midnight}
    assert made.requests == sum(one.sent for one in today) == quota

    time.sleep(max(0.0, midnight.timestamp() - time.time()))
    tomorrow = sync_three(made)

    assert {one.code for one in tomorrow} <= {0, 3}, [one.words for one in tomorrow]
    assert sum(one.sent for one in tomorrow) == needed - quota
    log = made.log
    assert len(log) == needed
    assert asked_again(log) == []
    assert [entry for entry in log if entry["verdict"] not in ("rows", "empty")] == []
    there = midnight.timestamp() + ahead  # the replica's midnight by its own clock
    for by in ("sent", "received"):
        assert violations(log, rate, window_seconds, by=by) == 0, by
        before = sum(entry[by] < there for entry in log)
        assert (before, len(log) - before) == (quota, needed - quota), by
    assert made.bars().equals(made.source(SYMBOLS, first, last))
    assert made.spooled() == []
    again = made.sync()
    assert (again.code, again.sent) == (0, 0), again.words
    return today


@pytest.mark.slow
def test_three_processes_share_a_rate_and_a_quota_and_go_on_the_next_day_with_what_is_owed(place):
    two_days(place, rate=20, window_seconds=2, quota=70, months=22, day_seconds=25, max_wait_seconds=4)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_three_processes_share_200_requests_a_minute_and_500_a_day(place):
    today = two_days(place, rate=200, window_seconds=60, quota=500, months=140, day_seconds=205, max_wait_seconds=65)
    assert min(one.sent for one in today) > 0, "every process has had its part"
