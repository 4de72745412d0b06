"""The invariants of the engine, in a world where anything may break at any instant.

A scenario is a list of events that hypothesis chooses: runs that die at the n-th boundary, answers of every kind,
stores that are down or break while they commit, time that passes, stores that are added and tables that are dropped.
After every event `check_always` must hold; when the trouble is over, a few runs must leave every store equal to the
source, the spool empty, and nothing to ask.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field, replace
from datetime import date, timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, event, given, settings
from hypothesis import strategies as st
from sim_world import KINDS, START, Settings, Source, World

from marketsync.report import RunState
from tasks.workspace import Options

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True, scope="module")
def _quiet():
    """Faults are the matter here: what they log would only bury a failure."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


LIVES = int(os.environ.get("MARKETSYNC_TEST_LIVES", "400"))  # in the slow tests

# A failure is told as it was found: shrinking a world of runs takes many minutes (add Phase.shrink to have it done).
EVERYDAY = settings(
    derandomize=True,
    database=None,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
)

# ---------------------------------------------------------------- one crash, everywhere

CRASHING = {
    "one store": Settings(until=date(2024, 3, 12)),
    "two stores, small segments": Settings(until=date(2024, 3, 12), stores=("one", "two"), segment_rows=6),
    "a store without transactions": Settings(
        until=date(2024, 3, 12), stores=("one", "two"), not_transactional=("one", "two"), segment_rows=12
    ),
    "files by month": Settings(kind="files", since=date(2024, 3, 20), until=date(2024, 3, 28), segment_rows=12),
    "one request for a history": Settings(kind="history", since=date(2024, 4, 1), until=date(2024, 4, 8)),
    "lists without time": Settings(kind="listing", stores=("one", "two")),
    "instants": Settings(kind="ticks", since=date(2024, 3, 10), until=date(2024, 3, 11), segment_rows=9),
}


def crashed_and_run_again(chosen: Settings, crash_at: int) -> bool:
    """Crash at a boundary, run again, check all; return whether there was such a boundary."""
    with World(replace(chosen)) as world:
        if world.run(crash_at=crash_at) is not None:
            return False
        world.check_always()
        report = world.run()
        assert report is not None
        assert report.state is RunState.COMPLETED, (world.lost, report)
        world.check_done()
        assert len(world.paid_twice()) <= chosen.segment_requests, world.lost
        assert len(world.provider.answered()) - len(world.paid_twice()) > 0
        again = world.run()
        assert again is not None
        # A list is final when its day is over; until then every run asks for it.
        assert (again.state, again.requests.sent) == (RunState.COMPLETED, 2 if chosen.kind == "listing" else 0)
        world.check_done()
    return True


@pytest.mark.parametrize("name", CRASHING)
def test_a_crash_at_a_boundary_loses_nothing_and_repeats_at_most_a_segment_of_requests(name: str):
    every = 13
    first = 1 + list(CRASHING).index(name) % every
    tried = 0
    while crashed_and_run_again(CRASHING[name], first + tried * every):
        tried += 1
    assert tried > 3


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", CRASHING)
def test_a_crash_at_every_single_boundary_loses_nothing(name: str):
    at = 1
    while crashed_and_run_again(CRASHING[name], at):
        at += 1
    assert at > 40


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_second_crash_in_the_recovery_from_the_first_loses_nothing():
    chosen = Settings(until=date(2024, 3, 8), symbols=("A", "B"), stores=("one", "two"), segment_rows=5)
    first = 1
    while True:
        second = 1
        while True:
            with World(replace(chosen)) as world:
                if world.run(crash_at=first) is not None:
                    assert first > 40
                    return
                if world.run(crash_at=second) is not None:
                    break
                world.check_always()
                report = world.run()
                assert report is not None
                assert report.state is RunState.COMPLETED
                world.check_done()
                assert len(world.paid_twice()) <= 2 * chosen.segment_requests, world.lost
            second += 7
        first += 11


# ---------------------------------------------------------------- anything, in any order

FAULTS = (
    "not_yet", "split", "cool_down", "long cool_down", "quota", "no room", "drop", "retry", "restart", "stop_provider",
    "stop_dataset", "fail", "refresh_auth",
)  # fmt: skip
BEGIN_ANEW = {"not_yet", "split", "drop", "restart"}  # a chain in the middle of which this is said is asked anew


@dataclass(frozen=True)
class Run:
    """One run: where it dies, what its n-th requests meet, how long a fetching step may take, which writes fail."""

    crash_at: int | None = None
    faults: dict[int, str] = field(default_factory=dict)
    seconds: float | None = None
    down: dict[str, list[str]] = field(default_factory=dict)
    refetch: bool = False


@dataclass(frozen=True)
class Pass:
    """Time passes."""

    hours: int


@dataclass(frozen=True)
class Add:
    """A store is added to the plan."""

    name: str = "late"


@dataclass(frozen=True)
class Drop:
    """A store's table is dropped."""

    store: str


@dataclass(frozen=True)
class Down:
    """A store cannot be reached, or can again."""

    store: str


@dataclass(frozen=True)
class Restate:
    """The provider corrects the values of the last two days."""


def runs(stores: tuple[str, ...]) -> st.SearchStrategy[Run]:
    return st.builds(
        Run,
        crash_at=st.none() | st.integers(1, 160),
        faults=st.dictionaries(st.integers(1, 25), st.sampled_from(FAULTS), max_size=4),
        seconds=st.none() | st.sampled_from([0.0, 1.0]),
        down=st.dictionaries(
            st.sampled_from(stores),
            st.lists(st.sampled_from(["", "before", "after"]), min_size=1, max_size=7),
            max_size=2,
        ),
        refetch=st.integers(0, 7).map(lambda n: n == 0),
    )


@st.composite
def scenarios(draw: st.DrawFn) -> tuple[Settings, Source, list[Any]]:
    kind = draw(st.sampled_from(sorted(KINDS)))
    stores = draw(st.sampled_from([("one",), ("one", "two")]))
    symbols = ("A", "B", "C")[: draw(st.integers(1, 3))]
    days = 3 if kind == "ticks" else 14
    since = date(2024, 3, 28) + timedelta(days=draw(st.integers(0, 10)))
    chosen = Settings(
        kind=kind,
        symbols=symbols,
        since=since,
        until=draw(st.none() | st.just(since + timedelta(days=days))),
        page=draw(st.integers(2, 5)),
        segment_requests=draw(st.integers(1, 6)),
        segment_rows=draw(st.sampled_from([1, 5, 12, 100])),
        stores=stores,
        not_transactional=draw(st.sampled_from([(), ("one",), stores])),
    )
    cells = st.frozensets(st.tuples(st.sampled_from(symbols), st.integers(0, 16)), max_size=6)
    source = Source(KINDS[kind], symbols, since, draw(cells), draw(cells), draw(cells))
    events = st.one_of(
        runs(stores),
        runs(stores),
        st.builds(Pass, st.integers(1, 40)),
        st.just(Add()),
        st.builds(Drop, st.sampled_from(stores)),
        st.builds(Down, st.sampled_from(stores)),
        st.just(Restate()),
    )
    return chosen, source, draw(st.lists(events, min_size=1, max_size=7))


def lived_through(world: World, events: list[Any]) -> None:
    """Let the events happen, checking after each what must always hold."""
    for one in events:
        if isinstance(one, Run):
            for store, troubles in one.down.items():
                world.disks[store].down = list(troubles)
            world.run(
                crash_at=one.crash_at, options=Options(refetch=one.refetch), seconds=one.seconds, faults=one.faults
            )
            for disk in world.disks.values():
                disk.down = []
        elif isinstance(one, Pass):
            world.clock.advance(timedelta(hours=one.hours))
        elif isinstance(one, Add):
            if one.name not in world.settings.stores:
                world.settings = replace(world.settings, stores=(*world.settings.stores, one.name))
                world.write_configuration()
        elif isinstance(one, Drop):
            world.disks[one.store].tables.clear()
        elif isinstance(one, Down):
            disk = world.disks[one.store]
            disk.always_down = not disk.always_down
        elif isinstance(one, Restate) and world.settings.kind == "restated":
            newest = world.clock.now().date()
            for symbol in world.settings.symbols:
                for day in (newest, newest - timedelta(days=1)):
                    count = world.source.restated.get((symbol, day), 0)
                    world.source.restated[symbol, day] = count + 1
            # Corrections are asked for within two days: a run must come before they are older.
            world.run()
        world.check_always()


def brought_to_an_end(world: World) -> None:
    """The trouble is over: a few runs must leave nothing to do."""
    for disk in world.disks.values():
        disk.always_down = False
    # In the middle of an hour, so that no provisional value changes while the runs wait.
    world.clock.advance(timedelta(minutes=90 - world.clock.now().minute))
    world.run(options=Options(retry_failed=True))
    for _ in range(4):
        report = world.run()
        assert report is not None
        world.check_always()
        # a row that the provider gives in a wrong form is set aside whenever it is asked for, and that is a finding
        good = RunState.COMPLETED_WITH_FINDINGS if report.rows.quarantined else RunState.COMPLETED
        if report.state is good and (not report.requests.sent or world.settings.kind == "listing"):
            break
    assert report is not None
    assert report.state is good, report
    world.check_done()


@given(scenarios())
@settings(EVERYDAY, max_examples=14)
def test_whatever_happens_the_stores_end_up_equal_to_the_source(scenario: tuple[Settings, Source, list[Any]]):
    live_and_end(*scenario)


@pytest.mark.slow
@pytest.mark.timeout(900)
@given(scenarios())
@settings(EVERYDAY, max_examples=LIVES)
def test_whatever_happens_very_often_the_stores_end_up_equal_to_the_source(
    scenario: tuple[Settings, Source, list[Any]],
):
    live_and_end(*scenario)


def live_and_end(chosen: Settings, source: Source, events: list[Any]) -> None:
    with World(chosen, source) as world:
        lived_through(world, events)
        event(f"{world.crashes} crashes")
        brought_to_an_end(world)
        quiet = not any(isinstance(one, Drop | Restate | Add | Pass | Down) for one in events)
        refetched = any(isinstance(one, Run) and (one.refetch or one.down) for one in events)
        if chosen.until is not None and chosen.kind != "listing" and quiet and not refetched:
            # Everything asked is final: what is asked twice was lost by a crash, or the provider broke a chain.
            anew = sum(fault in BEGIN_ANEW for one in events if isinstance(one, Run) for fault in one.faults.values())
            longest = 200 // chosen.page + 1
            most = world.crashes * chosen.segment_requests + anew * longest
            if since_is_over(chosen):
                assert len(world.paid_twice()) <= most, world.lost


def since_is_over(chosen: Settings) -> bool:
    """Whether all that the plan wants was over when the world began."""
    return chosen.until is not None and chosen.until < (START + timedelta(days=40)).date()
