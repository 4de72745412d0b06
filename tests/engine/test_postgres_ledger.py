"""One ledger in PostgreSQL, as several machines share it: who may do what is decided there, by a real server."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from datetime import date

import psycopg
import pytest
from synced_place import alpaca_by_month, asked_again, ended, killed

from marketsync.clock import SystemClock
from marketsync.ledger import Desired, Ledger

SINCE, UNTIL = date(2012, 3, 1), date(2013, 3, 1)


def shared(place, postgres):
    """A place whose ledger is in PostgreSQL, with some hundred small requests to make."""
    here = place(delay=(0, 0.1))
    here.write(
        {
            "datasets": ["alpaca.daily_bars"],
            "universe": ["AAPL", "FB", "GOOG", "IBM", "MSFT"],
            "since": str(SINCE),
            "until": str(UNTIL),
            "segment": {"requests": 10},
        },
        definition=alpaca_by_month(100),
        upstream={"tuning": {"threads": 3}, "limits": [{"requests": 10000, "per": "minute"}]},
    )
    settings = json.loads(here.config.read_text())
    here.config.write_text(json.dumps({**settings, "ledger": postgres}))
    return here


@pytest.mark.slow
def test_three_processes_share_the_units_of_a_ledger_in_postgres_and_each_is_asked_once(place, postgres):
    here = shared(place, postgres)
    runs = [ended(process) for process in [here.start() for _ in range(3)]]
    assert [run.code for run in runs] == [0, 0, 0], [run.words for run in runs]
    assert sum(run.sent > 0 for run in runs) > 1
    assert asked_again(here.log) == []
    assert here.bars().equals(here.source(None, SINCE, UNTIL))
    again = here.sync()
    assert (again.code, again.sent) == (0, 0)


def test_a_run_that_is_killed_goes_on_from_a_ledger_in_postgres(place, postgres):
    here = shared(place, postgres)
    process = here.start()
    here.wait_for_requests(25)
    killed(process)
    run = here.sync()
    assert run.code == 0, run.words
    assert here.bars().equals(here.source(None, SINCE, UNTIL))
    assert len(asked_again(here.log)) <= 10
    assert here.spooled() == []


def test_who_waited_for_the_lock_sees_what_its_holder_wrote_whatever_the_server_has_for_a_default(postgres):
    name = postgres.rpartition("/")[2]
    with psycopg.connect(postgres, autocommit=True) as admin:
        admin.execute(f"ALTER DATABASE {name} SET default_transaction_isolation = 'serializable'")  # pyright: ignore[reportArgumentType, reportCallIssue]
    ledgers = [Ledger(postgres, SystemClock()) for _ in range(2)]

    def hold(ledger: Ledger) -> list[bool]:
        return [ledger.hold(f"lane:{number}", f"host:{id(ledger)}:1:a") for number in range(50)]

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(hold, ledgers)
    assert [one + other for one, other in zip(first, second, strict=True)] == [1] * 50
    for ledger in ledgers:
        ledger.close()


def test_what_the_user_wants_of_a_plan_is_heard_through_postgres(postgres):
    one, other = Ledger(postgres, SystemClock()), Ledger(postgres, SystemClock())
    one.set_control("p", Desired.PAUSE)
    assert other.control("p").desired is Desired.PAUSE
    assert other.hold("lane:x", "host:1:1:a")
    assert not one.hold("lane:x", "elsewhere:2:2:b")
    one.close()
    other.close()
