"""What a user of one limiter sees: windows, weights, quotas, concurrency, pauses, priorities, learning."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import pyrate_limiter
import pytest

from marketsync.clock import ManualClock, SystemClock
from marketsync.definition import Learn, Limit
from marketsync.durations import parse_span
from marketsync.errors import ConfigurationError, Interrupted, MarketSyncError, WaitingForQuota
from providers.limits import Limiter

NOON = datetime(2026, 3, 4, 12, tzinfo=UTC)


def seconds_since(start: datetime, clock) -> float:
    return (clock.now() - start).total_seconds()


@pytest.fixture
def clock():
    return ManualClock(NOON)


@pytest.fixture
def limiter(tmp_path, clock):
    """Makes limiters that share one state folder, as processes do; `limiter(limits...)`."""
    opened = []

    def make(*limits, account="main", provider="acme", clock=clock, **others) -> Limiter:
        opened.append(Limiter(tmp_path, provider, account, limits, clock, **others))
        return opened[-1]

    yield make
    for one in opened:
        one.close()


def spend(limiter: Limiter, times: int, dataset: str = "daily", **how) -> None:
    for _ in range(times):
        limiter.reserve(dataset, **how).answered()


# ---------------------------------------------------------------- windows


def test_the_window_counts_from_the_answer_not_from_the_request(limiter, clock):
    one = limiter(Limit(requests=1, per="10 seconds"))
    reservation = one.reserve("daily")
    clock.advance(3)
    reservation.answered()
    one.reserve("daily")
    assert 13.0 < seconds_since(NOON, clock) < 13.1


def test_every_window_is_kept_at_once(limiter, clock):
    one = limiter(Limit(requests=2, per="1 second"), Limit(requests=5, per="minute"))
    spend(one, 5)
    assert 2.0 < seconds_since(NOON, clock) < 2.1
    spend(one, 1)
    assert 60.0 < seconds_since(NOON, clock) < 60.2


def test_weight_is_counted_of_every_limit(limiter, clock):
    one = limiter(Limit(requests=10, per="minute"))
    spend(one, 2, weight=4)
    spend(one, 1, weight=2)
    assert clock.now() == NOON
    spend(one, 1, weight=1)
    assert seconds_since(NOON, clock) > 60


def test_a_request_heavier_than_its_limit_is_an_error_that_says_so(limiter):
    one = limiter(Limit(requests=10, per="minute"))
    with pytest.raises(ConfigurationError, match=r"weighs 11.*10 per 1 minute"):
        one.reserve("daily", weight=11)


def test_an_answer_that_is_never_recorded_counts_from_the_time_out(limiter, clock):
    one = limiter(Limit(requests=1, per="10 seconds"))
    one.reserve("daily", timeout_seconds=7)
    one.reserve("daily", timeout_seconds=7)
    assert 17.0 < seconds_since(NOON, clock) < 17.1


def test_a_reservation_that_was_never_sent_gives_its_room_back(limiter, clock):
    one = limiter(Limit(requests=1, per="minute"), Limit(requests=2, per="day", resets="00:00 UTC"))
    one.reserve("daily").unsent()
    spend(one, 1)
    assert clock.now() == NOON
    assert [state.used for state in one.state()] == [1, 1]


def test_leaving_the_block_of_a_reservation_records_the_answer(limiter, clock):
    one = limiter(Limit(requests=1, per="10 seconds"))
    with one.reserve("daily"):
        clock.advance(1)
    one.reserve("daily")
    assert 11.0 < seconds_since(NOON, clock) < 11.1


def test_dataset_limits_are_counted_for_each_dataset_by_itself(limiter, clock):
    one = limiter(Limit(requests=1, per="minute", scope="dataset"))
    spend(one, 1, "daily")
    spend(one, 1, "weekly")
    assert clock.now() == NOON
    spend(one, 1, "weekly")
    assert seconds_since(NOON, clock) > 60


def test_a_limit_of_one_dataset_leaves_others_alone(limiter, clock):
    one = limiter(dataset_limits={"minutes": [Limit(requests=1, per="minute")]})
    spend(one, 5, "daily")
    spend(one, 1, "minutes")
    assert clock.now() == NOON
    spend(one, 1, "minutes")
    assert seconds_since(NOON, clock) > 60


def test_accounts_share_a_provider_limit_and_nothing_else(limiter, clock):
    limits = (Limit(requests=3, per="minute", scope="provider"), Limit(requests=2, per="minute"))
    mine, yours, elsewhere = limiter(*limits), limiter(*limits, account="other"), limiter(*limits, provider="zeta")
    spend(mine, 2)
    spend(yours, 1)
    spend(elsewhere, 2)
    assert clock.now() == NOON
    spend(yours, 1)
    assert seconds_since(NOON, clock) > 60


def test_a_tier_chooses_its_limits_and_no_tier_means_all(limiter):
    limits = (Limit(requests=5, per="minute", tier="free"), Limit(requests=500, per="minute", tier="paid"))
    assert [state.limit for state in limiter(*limits, tier="paid", account="a").state()] == [500]
    assert [state.limit for state in limiter(*limits, account="b").state()] == [5]


def test_a_session_is_no_unit_of_a_limit():
    with pytest.raises(ValueError, match="'session' cannot be counted here; write milliseconds"):
        Limit(requests=1, per="session")


# ---------------------------------------------------------------- restarts and sharing


def test_a_restart_forgets_nothing(limiter, clock):
    limits = (Limit(requests=2, per="minute"), Limit(requests=3, per="day", resets="00:00 UTC"))
    first = limiter(*limits)
    first.reserve("daily").answered()
    first.reserve("daily", timeout_seconds=10)  # under way when the process ends
    first.close()
    second = limiter(*limits)
    assert [state.used for state in second.state()] == [2, 2]
    second.reserve("daily")
    assert 60.0 < seconds_since(NOON, clock) < 60.2
    with pytest.raises(WaitingForQuota):
        second.reserve("daily", max_wait_seconds=3600)


def test_what_one_process_sends_the_other_counts(limiter, clock):
    here, there = limiter(Limit(requests=2, per="minute")), limiter(Limit(requests=2, per="minute"))
    spend(here, 1)
    spend(there, 1)
    assert clock.now() == NOON
    here.flush()
    there.flush()
    spend(here, 1)
    assert 60.0 < seconds_since(NOON, clock) < 60.2


def test_an_idle_process_writes_its_last_answers_by_itself(limiter):
    clock = SystemClock()
    busy, other = (limiter(Limit(requests=10, per="hour"), clock=clock) for _ in range(2))
    busy.reserve("daily", timeout_seconds=5000).answered()
    for _ in range(100):
        resets_at = other.state()[0].resets_at
        if resets_at - clock.now() < timedelta(hours=1, seconds=30):  # counted from the answer, not the time-out
            break
        time.sleep(0.05)
    else:
        pytest.fail("the answer was not written within 5 seconds")


def test_a_dataset_seen_late_is_counted_from_what_the_book_holds(limiter, clock):
    here, there = (limiter(Limit(requests=2, per="minute", scope="dataset")) for _ in range(2))
    spend(here, 2)
    here.flush()
    there.reserve("daily")
    assert seconds_since(NOON, clock) > 60


def test_a_clock_set_back_neither_blocks_for_long_nor_forgets(limiter, tmp_path):
    limit = Limit(requests=1, per="10 seconds")
    before = limiter(limit, clock=ManualClock(NOON + timedelta(days=30)))
    spend(before, 1)
    before.close()
    clock = ManualClock(NOON)
    limiter(limit, clock=clock).reserve("daily")
    assert 10.0 < seconds_since(NOON, clock) < 10.1


def test_old_reservations_are_swept_from_the_file_and_the_last_place_is_never_reused(limiter, clock):
    one, other = (limiter(Limit(requests=1000, per="second")) for _ in range(2))
    for _ in range(5):
        spend(one, 1000)
        clock.advance(2)
    one.bucket.leak()
    (rows,) = one.bucket.book._execute("SELECT count(*) FROM reservation").fetchone()
    assert rows <= 2
    spend(other, 1)
    assert one.state()[0].used == 1


def test_a_full_disk_or_a_closed_book_is_told_and_nothing_is_granted(limiter):
    one = limiter(Limit(requests=5, per="minute"))
    spend(one, 1)
    one.bucket.book._sqlite.execute("PRAGMA max_page_count = 1")
    with pytest.raises(MarketSyncError, match="was not sent"):
        spend(one, 4, "a dataset with a name that fills pages " * 1000)
    one.bucket.book._sqlite.execute("PRAGMA max_page_count = 1000000")
    assert one.state()[0].used < 5


def test_a_forked_child_shares_the_limits_of_its_parent(tmp_path):
    program = """
import os, sys
from datetime import UTC, datetime
from marketsync.clock import ManualClock
from marketsync.definition import Limit
from providers.limits import Limiter
clock = ManualClock(datetime(2026, 3, 4, tzinfo=UTC))
one = Limiter(sys.argv[1], "acme", "main", [Limit(requests=5, per="minute")], clock)
one.reserve("daily").answered()
child = os.fork()
one.reserve("daily").answered()
if child:
    assert os.waitpid(child, 0)[1] == 0
    print(one.state()[0].used)
else:
    one.close()
    os._exit(0)
"""
    ran = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (ran.stdout.strip(), ran.returncode) == ("3", 0), ran.stderr


# ---------------------------------------------------------------- quotas


def at(zone: str, *when: int) -> datetime:
    return datetime(*when, tzinfo=ZoneInfo(zone)).astimezone(UTC)


def resume_of(limiter: Limiter, **how) -> datetime:
    with pytest.raises(WaitingForQuota) as raised:
        limiter.reserve("daily", **how)
    assert "nothing is fetched twice" in str(raised.value)
    return raised.value.resume_at


def test_a_spent_day_quota_resumes_at_midnight_in_its_zone(limiter):
    clock = ManualClock(at("Asia/Shanghai", 2026, 3, 4, 22))
    one = limiter(Limit(requests=3, per="day", resets="00:00 Asia/Shanghai"), clock=clock)
    spend(one, 3)
    resume_at = resume_of(one)
    assert resume_at == at("Asia/Shanghai", 2026, 3, 5) == datetime(2026, 3, 4, 16, tzinfo=UTC)
    clock.advance(resume_at - clock.now())
    spend(one, 3)  # waits the two seconds that clocks may differ, even when told to wait for nothing
    assert clock.now() - resume_at <= timedelta(seconds=2.1)
    assert resume_of(one) == at("Asia/Shanghai", 2026, 3, 6)


def test_a_quota_that_resets_within_the_longest_wait_is_waited_for(limiter):
    clock = ManualClock(at("Asia/Shanghai", 2026, 3, 4, 23, 55))
    one = limiter(Limit(requests=1, per="day", resets="00:00 Asia/Shanghai"), clock=clock)
    spend(one, 2, max_wait_seconds=600)
    assert clock.now() >= at("Asia/Shanghai", 2026, 3, 5)


@pytest.mark.parametrize(
    ("start", "reset", "hours"),
    [
        (at("America/New_York", 2026, 3, 8, 0, 30), at("America/New_York", 2026, 3, 9), 22.5),
        (at("America/New_York", 2026, 11, 1, 0, 30), at("America/New_York", 2026, 11, 2), 24.5),
    ],
    ids=["a day of 23 hours", "a day of 25 hours"],
)
def test_a_day_quota_follows_the_clock_changes_of_its_zone(limiter, start, reset, hours):
    clock = ManualClock(start)
    one = limiter(Limit(requests=1, per="day", resets="00:00 America/New_York"), clock=clock)
    spend(one, 1)
    assert resume_of(one) == reset == start + timedelta(hours=hours)


def test_a_month_quota_resumes_on_the_first(limiter):
    clock = ManualClock(datetime(2026, 12, 30, 12, tzinfo=UTC))
    one = limiter(Limit(requests=2, per="month", resets="00:00 Europe/Berlin"), clock=clock)
    spend(one, 2)
    assert resume_of(one) == at("Europe/Berlin", 2027, 1, 1)


def test_a_month_quota_that_resets_at_noon_counts_the_first_morning_to_the_month_before(limiter):
    clock = ManualClock(datetime(2026, 5, 1, 8, tzinfo=UTC))
    one = limiter(Limit(requests=1, per="month", resets="12:00 UTC"), clock=clock)
    spend(one, 1)
    assert resume_of(one) == datetime(2026, 5, 1, 12, tzinfo=UTC)


def test_a_request_under_way_over_midnight_counts_on_both_days(limiter):
    clock = ManualClock(datetime(2026, 3, 4, 23, 59, 50, tzinfo=UTC))
    one = limiter(Limit(requests=1, per="day", resets="00:00 UTC"), clock=clock)
    over = one.reserve("daily", timeout_seconds=30)
    clock.advance(11)
    over.answered()
    clock.advance(10)
    assert resume_of(one) == datetime(2026, 3, 6, tzinfo=UTC)


def test_a_request_answered_well_before_midnight_counts_on_its_day_only(limiter):
    clock = ManualClock(datetime(2026, 3, 4, 23, 59, 50, tzinfo=UTC))
    one = limiter(Limit(requests=1, per="day", resets="00:00 UTC"), clock=clock)
    one.reserve("daily", timeout_seconds=30).answered()
    clock.advance(20)
    one.reserve("daily")
    assert clock.now() == datetime(2026, 3, 5, 0, 0, 10, tzinfo=UTC)


def test_a_day_without_reset_is_a_sliding_window_of_24_hours(limiter, clock):
    one = limiter(Limit(requests=1, per="day"))
    spend(one, 1)
    assert timedelta(hours=24) < resume_of(one) - NOON < timedelta(hours=24, minutes=2)


def test_quotas_are_shared_by_processes(limiter):
    here, there = (limiter(Limit(requests=3, per="day", resets="00:00 UTC")) for _ in range(2))
    spend(here, 2)
    spend(there, 1)
    for one in (here, there):
        assert resume_of(one) == datetime(2026, 3, 5, tzinfo=UTC)


def test_a_window_that_stays_full_for_longer_than_the_longest_wait_says_when_to_resume(limiter, clock):
    one = limiter(Limit(requests=1, per="hour"))
    spend(one, 1)
    resume_at = resume_of(one, max_wait_seconds=60)
    assert clock.now() == NOON
    assert timedelta(hours=1) < resume_at - NOON < timedelta(hours=1, seconds=6)
    clock.advance(resume_at - NOON)
    one.reserve("daily", max_wait_seconds=0)


# ---------------------------------------------------------------- concurrency, priority, interruption


def in_thread(work) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def test_no_more_than_so_many_requests_are_under_way_at_once(limiter):
    one = limiter(Limit(concurrent=2), clock=SystemClock())
    guard, now, most = threading.Lock(), [0], [0]

    def ask():
        for _ in range(5):
            reservation = one.reserve("daily")
            with guard:
                now[0] += 1
                most[0] = max(most[0], now[0])
            time.sleep(0.005)
            with guard:
                now[0] -= 1
            reservation.answered()

    threads = [in_thread(ask) for _ in range(6)]
    for thread in threads:
        thread.join(60)
    assert most == [2]
    assert one.state()[0].used == 0


def test_another_process_request_under_way_counts_until_its_answer(limiter):
    here, there = (limiter(Limit(concurrent=1), clock=SystemClock()) for _ in range(2))
    held, got = here.reserve("daily"), threading.Event()
    thread = in_thread(lambda: (there.reserve("daily").answered(), got.set()))
    assert not got.wait(0.3)
    held.answered()
    assert got.wait(10)
    thread.join()


def test_a_dead_process_holds_no_place_among_those_at_once_but_keeps_its_room_in_windows(limiter, tmp_path):
    program = """
import sys, time
from marketsync.clock import SystemClock
from marketsync.definition import Limit
from providers.limits import Limiter
one = Limiter(sys.argv[1], "acme", "main", [Limit(concurrent=1), Limit(requests=5, per="hour")], SystemClock())
one.reserve("daily", timeout_seconds=3000)
print("reserved", flush=True)
time.sleep(600)
"""
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "reserved\n"
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
    one = limiter(Limit(concurrent=1), Limit(requests=5, per="hour"), clock=SystemClock())
    assert {state.kind: state.used for state in one.state()} == {"window": 1, "concurrent": 1}
    one.reserve("daily")  # at once, not after the 50 minutes of the time-out
    assert {state.kind: state.used for state in one.state()} == {"window": 2, "concurrent": 1}


def test_higher_priority_goes_first_and_equals_in_their_order(limiter):
    one = limiter(Limit(requests=1, per="200 ms"), clock=SystemClock())
    spend(one, 1)
    order, threads = [], []
    for name, priority in (("backfill 1", 0), ("backfill 2", 0), ("today", 5)):

        def ask(name=name, priority=priority):
            with one.reserve("daily", priority=priority):
                order.append(name)

        threads.append(in_thread(ask))
        while len(one._waiting) < len(threads):
            time.sleep(0.001)
    for thread in threads:
        thread.join(60)
    assert order == ["today", "backfill 1", "backfill 2"]


def test_a_light_request_does_not_starve_a_heavy_one_that_came_first(limiter):
    one = limiter(Limit(requests=4, per="500 ms"), clock=SystemClock())
    spend(one, 1, weight=2)
    order = []

    def ask(name, weight):
        one.reserve("daily", weight=weight).answered()
        order.append(name)

    heavy = in_thread(lambda: ask("heavy", 4))
    while not one._waiting:
        time.sleep(0.001)
    light = in_thread(lambda: ask("light", 1))
    heavy.join(60)
    light.join(60)
    assert order == ["heavy", "light"]


@pytest.mark.parametrize(
    ("limit", "weight"),
    [(Limit(concurrent=1), 1), (Limit(requests=4, per="100 ms"), 4)],
    ids=["a place among those at once", "a heavy request among light ones"],
)
def test_a_busy_process_lets_another_have_its_turn(limiter, limit, weight):
    busy, other = (limiter(limit, clock=SystemClock()) for _ in range(2))
    most, count, got_at = (4000 if limit.concurrent else 80), itertools.count(), []

    def hurry():
        while next(count) < most:
            busy.reserve("daily").answered()

    def ask():
        other.reserve("daily", weight=weight, timeout_seconds=1).answered()
        got_at.append(next(count))

    hurrying = [in_thread(hurry) for _ in range(3)]
    while next(count) < 20:
        time.sleep(0.001)
    asking = in_thread(ask)
    for thread in (asking, *hurrying):
        thread.join(120)
    assert got_at[0] < most / 2


def test_a_wait_for_one_dataset_does_not_hold_up_another(limiter):
    limits = (Limit(requests=1, per="hour", scope="dataset"), Limit(requests=100, per="hour"))
    one, wake = limiter(*limits, clock=SystemClock()), threading.Event()
    spend(one, 1, "minutes")

    def ask():
        with pytest.raises(Interrupted):
            one.reserve("minutes", max_wait_seconds=10_000, wake=wake, priority=9)

    waiting = in_thread(ask)
    while not one._waiting:
        time.sleep(0.001)
    spend(one, 1, "daily", max_wait_seconds=0)
    assert len(one._waiting) == 1
    wake.set()
    waiting.join(60)
    assert not waiting.is_alive()


@pytest.mark.parametrize("limit", [Limit(requests=1, per="hour"), Limit(concurrent=1)], ids=["window", "concurrent"])
def test_a_wait_is_interrupted_by_its_event_and_takes_nothing(limiter, limit):
    one, wake, raised = limiter(limit, clock=SystemClock()), threading.Event(), []
    held = one.reserve("daily")

    def ask():
        try:
            one.reserve("daily", max_wait_seconds=10_000, wake=wake)
        except Interrupted as error:
            raised.append(error)

    thread = in_thread(ask)
    while not one._waiting:
        time.sleep(0.001)
    wake.set()
    thread.join(60)
    assert len(raised) == 1
    assert one.state()[0].used == 1
    assert one._waiting == []
    held.answered()


def test_an_event_that_is_set_already_interrupts_before_anything_is_taken(limiter):
    one, wake = limiter(Limit(requests=5, per="hour")), threading.Event()
    wake.set()
    with pytest.raises(Interrupted):
        one.reserve("daily", wake=wake)
    assert one.state()[0].used == 0


# ---------------------------------------------------------------- what the provider says


def test_a_cool_down_is_kept_by_all_processes_and_survives_a_restart(limiter, clock):
    here, there = limiter(), limiter(Limit(requests=100, per="minute"))
    spend(there, 1)
    here.cool_down(NOON + timedelta(seconds=30), why="429")
    spend(there, 1)
    assert clock.now() == NOON + timedelta(seconds=30)
    there.cool_down(NOON + timedelta(hours=2))
    there.close()
    assert resume_of(limiter()) == NOON + timedelta(hours=2)


def test_what_is_waited_for_and_until_when_can_be_asked(limiter):
    one = limiter(Limit(requests=5, per="minute"), clock=SystemClock())
    assert one.waits() is None
    until = SystemClock().now() + timedelta(seconds=60)
    one.cool_down(until, None, "too fast")
    wake = threading.Event()

    def wait() -> None:
        with contextlib.suppress(Interrupted):
            one.reserve("daily", max_wait_seconds=600, wake=wake)

    waiting = threading.Thread(target=wait)
    waiting.start()
    while one.waits() is None:
        time.sleep(0.01)
    found, why = one.waits()
    assert abs((found - until).total_seconds()) < 1
    assert why == "the pause that acme/main asked for (too fast)"
    wake.set()
    waiting.join()
    assert one.waits() is None


def test_a_cool_down_of_one_dataset_lets_others_go_on_and_never_gets_shorter(limiter, clock):
    one = limiter(Limit(requests=100, per="minute"))
    one.cool_down(NOON + timedelta(seconds=30), dataset="minutes")
    one.cool_down(NOON + timedelta(seconds=10), dataset="minutes")
    spend(one, 1, "daily")
    assert clock.now() == NOON
    spend(one, 1, "minutes")
    assert clock.now() == NOON + timedelta(seconds=30)


def test_a_quota_that_the_provider_calls_spent_is_spent_until_its_reset(limiter):
    limits = (Limit(requests=100, per="day", resets="00:00 Asia/Shanghai"), Limit(requests=50, per="minute"))
    here, there = limiter(*limits), limiter(*limits)
    spend(here, 1)
    reset = datetime(2026, 3, 4, 16, tzinfo=UTC)
    assert here.spent(parse_span("day")) == reset
    assert resume_of(here) == resume_of(there) == reset
    assert next(state for state in there.state() if state.kind == "quota").remaining == 0


def test_a_window_that_the_provider_calls_spent_is_filled(limiter, clock):
    one = limiter(Limit(requests=50, per="hour"))
    spend(one, 1)
    clock.advance(600)
    resume_at = one.spent(parse_span("hour"))
    assert resume_of(one) == resume_at
    assert timedelta(minutes=60) < resume_at - NOON < timedelta(minutes=61)  # our own oldest request leaves first


@pytest.mark.parametrize(
    ("per", "until"),
    [
        (None, datetime(2026, 3, 5, tzinfo=UTC)),
        ("day", datetime(2026, 3, 5, tzinfo=UTC)),
        ("month", datetime(2026, 4, 1, tzinfo=UTC)),
        ("week", datetime(2026, 3, 9, tzinfo=UTC)),
        ("hour", NOON + timedelta(hours=1)),
    ],
)
def test_a_spent_quota_that_nobody_declared_gets_a_reset_and_a_warning(limiter, caplog, per, until):
    one = limiter(Limit(requests=50, per="minute"))
    assert one.spent(parse_span(per) if per else None) == until
    assert "none is declared" in caplog.text
    assert resume_of(one) == until


def test_remaining_in_a_header_counts_what_others_used_until_the_reset(limiter, clock):
    learn = Learn(remaining="X-RateLimit-Remaining", reset="X-RateLimit-Reset", limit="X-RateLimit-Limit")
    here, there = (limiter(Limit(requests=200, per="minute", learn=learn)) for _ in range(2))
    spend(here, 1)
    reset = str(int(NOON.timestamp()) + 40)
    here.learn({"x-ratelimit-remaining": "150", "X-RateLimit-Reset": reset, "X-RateLimit-Limit": "200"}, NOON)
    assert here.state()[0].used == there.state()[0].used == 50
    here.learn({"x-ratelimit-remaining": "180", "X-RateLimit-Reset": reset}, NOON)
    assert here.state()[0].used == 50  # only ever more careful
    here.learn({"x-ratelimit-remaining": "0", "X-RateLimit-Reset": reset}, NOON)
    spend(there, 1)
    assert seconds_since(NOON, clock) == pytest.approx(40, abs=0.01)


def test_a_lower_limit_in_a_header_is_kept_and_a_higher_one_is_not_believed(limiter, clock):
    learn = Learn(limit="Limit", used="Used")
    one = limiter(Limit(requests=10, per="minute", learn=learn))
    one.learn({"limit": "1000", "used": "nonsense"}, NOON)
    assert one.state()[0].limit == 10
    one.learn({"limit": "3", "used": "2"}, clock.timestamp())
    assert (one.state()[0].limit, one.state()[0].used) == (3, 2)
    spend(one, 2)
    assert seconds_since(NOON, clock) > 60


def test_used_in_a_header_is_taken_over_into_a_day_quota(limiter):
    one = limiter(Limit(requests=100, per="day", resets="00:00 UTC", learn=Learn(remaining="left")))
    spend(one, 3)
    one.learn({"Left": "2"}, NOON)
    assert one.state()[0].used == 98
    spend(one, 2)
    assert resume_of(one) == datetime(2026, 3, 5, tzinfo=UTC)


def test_headers_older_than_the_reset_are_not_learned_from(limiter):
    learn = Learn(remaining="left", reset="reset")
    one = limiter(
        Limit(requests=100, per="minute", learn=learn), Limit(requests=9, per="day", resets="00:00 UTC", learn=learn)
    )
    one.learn({"left": "0", "reset": str(NOON.timestamp() - 1)}, NOON - timedelta(days=1))
    assert [state.used for state in one.state()] == [0, 0]


def test_a_limit_told_in_a_message_holds_for_its_dataset_in_this_run(limiter, clock):
    one = limiter(Limit(requests=200, per="minute"))
    spend(one, 2, "minutes")
    one.learn_limit(parse_span("minute"), 2, dataset="minutes")
    spend(one, 10, "daily")
    assert clock.now() == NOON
    spend(one, 1, "minutes")
    assert seconds_since(NOON, clock) > 60
    one.learn_limit(parse_span("minute"), 500, dataset="minutes")
    assert [state.limit for state in one.state("minutes")] == [200, 2]


def test_a_limit_told_for_the_account_only_lowers(limiter):
    one = limiter(Limit(requests=200, per="minute"))
    one.learn_limit(parse_span("minute"), 300)
    one.learn_limit(parse_span("minute"), 50)
    one.learn_limit(parse_span("hour"), 70)
    assert [state.limit for state in one.state()] == [50, 70]
    one.close()


def test_the_state_says_what_is_used_what_is_left_and_when_more_comes(limiter):
    one = limiter(
        Limit(requests=10, per="minute"), Limit(requests=100, per="day", resets="00:00 UTC"), Limit(concurrent=3)
    )
    one.reserve("daily", weight=4)
    spend(one, 1)
    window, quota, at_once = one.state()
    assert (window.name, window.scope, window.used, window.remaining) == ("10 per 1 minute", "account acme/main", 5, 5)
    assert NOON + timedelta(minutes=1) < window.resets_at < NOON + timedelta(minutes=1, seconds=1)
    assert (quota.used, quota.remaining, quota.resets_at) == (5, 95, datetime(2026, 3, 5, tzinfo=UTC))
    assert (at_once.name, at_once.used, at_once.remaining) == ("3 at once", 1, 2)


# ---------------------------------------------------------------- pyrate-limiter


def test_the_bucket_is_one_that_pyrate_limiter_itself_can_use(limiter, clock):
    one = limiter(Limit(requests=5, per="minute"))
    stock = pyrate_limiter.Limiter(pyrate_limiter.SingleBucketFactory(one.bucket, schedule_leak=False))
    assert stock.try_acquire("daily", weight=4, blocking=False)
    assert not stock.try_acquire("daily", weight=2, blocking=False)
    assert one.bucket.count() == 4
    refused = pyrate_limiter.RateItem("daily", one.bucket.now(), weight=2)
    assert not one.bucket.put(refused)
    assert 60_000 <= one.bucket.waiting(refused) < 61_000
    assert stock.try_acquire("daily", weight=1, blocking=False)
    clock.advance(95)  # the time-out of what was never answered, and the window
    assert one.bucket.leak() == 5
    assert one.bucket.count() == 0
    with pytest.raises(MarketSyncError, match="cannot be emptied"):
        one.bucket.flush()


def test_the_file_can_be_read_by_a_person(limiter, tmp_path: Path):
    one = limiter(Limit(requests=5, per="minute"), Limit(requests=9, per="day", resets="00:00 UTC"))
    spend(one, 1, weight=2)
    one.flush()
    import sqlite3

    book = sqlite3.connect(tmp_path / "limits.db")
    (row,) = book.execute("SELECT provider, account, dataset, weight, pid, sent, answered FROM readable").fetchall()
    assert row == ("acme", "main", "daily", 2, os.getpid(), "2026-03-04T12:00:00.000Z", "2026-03-04T12:00:00.000Z")
    quotas = book.execute("SELECT scope, rule, starts, used FROM readable_quota").fetchall()
    assert quotas == [("account acme/main", "day 00:00:00 UTC", "2026-03-04T00:00Z", 2)]
    book.close()
