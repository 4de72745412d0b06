"""`kill -9` of a running `marketsync sync` at random instants: afterwards one more run makes every store equal to the
source, and the provider's own log shows how little was asked twice."""

from __future__ import annotations

import itertools
import math
import os
import random
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import date, timedelta

import polars as pl
import pytest
from synced_place import Place, alpaca_by_month, asked_again, ended, killed

from marketsync.clock import SystemClock
from marketsync.ledger import Ledger, this_owner

SYMBOLS = 12
PAGE_ROWS = 10
KILLS = int(os.environ.get("MARKETSYNC_TEST_KILLS", "50"))  # of each store, in the slow tests
UNSEALED_REQUESTS = 50  # the default of segment.requests
NETWORK_SECONDS = 0.01


def quarters() -> Iterator[date]:
    """The last days of quarters since 2000."""
    for year in itertools.count(2000):
        for next_year, month in ((year, 4), (year, 7), (year, 10), (year + 1, 1)):
            yield date(next_year, month, 1) - timedelta(days=1)


def requests_for(place: Place, last: date) -> int:
    """How many requests all bars until a day take: a chain of pages for each symbol and month."""
    months = place.source(last=last).group_by("symbol", pl.from_epoch("ts", "us").dt.truncate("1mo")).len()
    return sum(math.ceil(rows / PAGE_ROWS) for rows in months["len"])


def kill_often(place: Place, kills: int, seed: int) -> dict[str, int]:
    """Kill that many runs, each at an instant chosen from all of its life, and let a last one finish; return how many
    kills met a run before its first request, while it fetched, and after its last request.

    There is a quarter more to fetch whenever everything has been asked for, so that every run has work to do.
    """
    chance = random.Random(seed)
    ends = quarters()
    lasts = 0.0
    for _ in range(2):  # the first warms the machine's caches up, the second tells how long a run lasts
        until, began = next(ends), time.monotonic()
        assert place.sync("--until", str(until)).code == 0
        lasts = time.monotonic() - began
    owed = requests_for(place, until)
    assert place.requests == owed
    begun: list[int] = []  # where in the log each run begins
    met: Counter[str] = Counter()
    while met.total() < kills:
        log = place.log
        if len(log) - len(asked_again(log)) == owed:
            until = next(ends)
            owed = requests_for(place, until)
        begun.append(len(log))
        process = place.start("--until", str(until))
        try:
            process.wait(chance.uniform(0, lasts))
        except subprocess.TimeoutExpired:
            killed(process)
        else:
            assert ended(process).code == 0
            continue
        time.sleep(NETWORK_SECONDS * 5)  # what was on its way gets into the log
        log = place.log
        if len(log) == begun[-1]:
            met["starting"] += 1
        elif len(log) - len(asked_again(log)) < owed:
            met["fetching"] += 1
        else:
            met["delivering or judging"] += 1
    begun.append(place.requests)

    last = place.sync("--until", str(until))

    assert (last.code, last.state) == (0, "completed"), last.words
    for store in place.stores:
        assert_equal(place.bars(store), place.source(last=until))
    assert place.spooled() == []
    repeated: Counter[int] = Counter()
    for at, before in asked_again(place.log):
        run, run_before = (max(n for n, first in enumerate(begun) if first <= where) for where in (at, before))
        assert run > run_before, "no run asks the same twice by itself"
        repeated[run_before] += 1
    assert max(repeated.values(), default=0) <= UNSEALED_REQUESTS, repeated
    assert place.sync("--until", str(until)).sent == 0
    return met


def assert_equal(stored: pl.DataFrame, source: pl.DataFrame) -> None:
    """Fail with the first rows that differ."""
    lost, strange = (one.join(other, on=one.columns, how="anti") for one, other in ((source, stored), (stored, source)))
    assert (lost.height, strange.height) == (0, 0), f"lost:\n{lost.head()}\nstrange:\n{strange.head()}"
    assert stored.equals(source), f"{stored.height} rows stored, {source.height} in the source: some are there twice"


def killable(place: Callable[..., Place], store: str, quarters: int) -> Place:
    """A place whose runs deliver several times each."""
    rows = quarters * 70 * SYMBOLS
    made = place(data=f"generated:{rows}x{SYMBOLS}:1Day", delay=(0, NETWORK_SECONDS))
    made.write(
        {
            "datasets": ["alpaca.daily_bars"],
            "universe": list(made.replica.market.symbols),
            "since": "2000-01-01",
            "segment": {"rows": 250},
        },
        definition=alpaca_by_month(PAGE_ROWS),
        upstream={"limits": [{"requests": 1_000_000, "per": "minute"}]},
        stores={"default": store if "://" in store else f"{store}://./data"},
    )
    return made


@pytest.mark.slow
def test_a_sync_that_is_killed_three_times_loses_no_row_and_repeats_at_most_a_segment(place):
    kill_often(killable(place, "delta", 10), kills=3, seed=1)


def test_what_a_killed_writer_left_half_done_is_swept_by_the_next_run_and_what_a_living_one_writes_is_not(place):
    made = killable(place, "delta", 4)
    assert made.sync("--until", "2000-01-31").code == 0
    spool = made.folder / ".marketsync" / "spool"
    for lane in ("of-a-dead-writer", "of-a-living-writer"):
        (spool / lane).mkdir()
        (spool / lane / "00000001.arrow").write_bytes(b"rows that no ledger knows yet")
    ledger = Ledger(f"sqlite:///{made.folder / '.marketsync' / 'ledger.db'}", SystemClock())
    ledger.hold("lane:of-a-living-writer", this_owner())
    ledger.close()
    assert made.sync("--until", "2000-01-31").code == 0
    assert [path.parent.name for path in made.spooled()] == ["of-a-living-writer"]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("store", "seed"), [("delta", 11), ("parquet", 12), ("csv", 13), ("chdb", 14)])
def test_a_sync_that_is_killed_fifty_times_loses_no_row_and_repeats_at_most_a_segment_each_time(place, store, seed):
    assert_every_phase(kill_often(killable(place, store, 60), kills=KILLS, seed=seed))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("server", "seed"), [("postgres", 15), ("mysql", 16), ("marketstore", 17)])
def test_so_it_is_with_a_store_that_is_a_server(place, request, server, seed):
    store = request.getfixturevalue(server)
    assert_every_phase(kill_often(killable(place, store, 60), kills=KILLS, seed=seed))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_so_it_is_with_a_stand_in_for_mongodb_that_is_killed_less_often_for_it_is_slow(place, mongodb):
    kill_often(killable(place, mongodb, 30), kills=min(10, KILLS), seed=16)


def assert_every_phase(met: dict[str, int]) -> None:
    if sum(met.values()) >= 50:  # fewer may leave one out
        assert min(met[when] for when in ("starting", "fetching", "delivering or judging")) > 0, met
