"""Several processes on one plan at once, changing over at every boundary: who holds what, who writes last, and what
becomes of one that slept for longer than its lease and then goes on as if nothing had been.

Changing over is at the same boundaries at which `test_simulator.py` lets a process die; one process runs at a time.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from dataclasses import replace
from datetime import date

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sim_world import KINDS, Settings, Source, World
from test_simulator import EVERYDAY, LIVES, brought_to_an_end

from marketsync.report import RunState

pytestmark = pytest.mark.filterwarnings("ignore")

NAPS = (61.0, 130.0)  # seconds: longer than a lease


@pytest.fixture(autouse=True, scope="module")
def _quiet():
    """A lease that is lost is the matter here: what is logged of it would only bury a failure."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


SHARED = {
    "two stores": Settings(until=date(2024, 3, 12), stores=("one", "two"), segment_rows=6),
    "one symbol a request": Settings(kind="days", until=date(2024, 3, 12), segment_rows=6, segment_requests=2),
    "stores without transactions": Settings(
        kind="days",
        until=date(2024, 3, 12),
        segment_rows=6,
        segment_requests=2,
        stores=("one", "two"),
        not_transactional=("one", "two"),
    ),
    "one request for a history": Settings(kind="history", since=date(2024, 4, 1), until=date(2024, 4, 8)),
    "instants": Settings(kind="ticks", since=date(2024, 3, 10), until=date(2024, 3, 11), segment_rows=9),
    "files by month": Settings(kind="files", since=date(2024, 3, 20), until=date(2024, 3, 28), segment_rows=12),
    "rows that are restated": Settings(
        kind="restated", since=date(2024, 3, 30), until=None, segment_rows=6, stores=("one", "two")
    ),
}


def shuffled(seed: int, processes: int, naps: float = 0.0) -> Iterator[tuple[int, float]]:
    """Yield who goes on at each of 400 boundaries, and after how many seconds: now in short turns, now in long ones."""
    chance = random.Random(seed)
    left = 400
    while left > 0:
        who, turn = chance.randrange(processes), chance.choice([1, 1, 2, 3, 8, 20])
        for _ in range(turn):
            yield who, chance.choice(NAPS) if chance.random() < naps else 0.0
        left -= turn


@pytest.mark.parametrize("seed", [1, 11])
@pytest.mark.parametrize("name", SHARED)
def test_processes_that_share_a_plan_never_ask_for_the_same_and_never_write_it_twice(name: str, seed: int):
    processes = 2 + seed % 2
    with World(replace(SHARED[name])) as world:
        reports = world.run_together(shuffled(seed, processes), processes=processes)
        world.check_always()
        assert [report and report.state for report in reports] == [RunState.COMPLETED] * processes
        assert not world.paid_twice()
        # Each waits for what the others have in hand: when one has ended, all is there.
        world.check_done()


@pytest.mark.parametrize("seed", [9, 22])
@pytest.mark.parametrize("name", SHARED)
def test_a_process_that_slept_past_its_lease_harms_nothing_when_it_goes_on(name: str, seed: int):
    processes = 2 + seed % 2
    with World(replace(SHARED[name])) as world:
        world.run_together(shuffled(seed, processes, naps=0.05), processes=processes)
        world.check_always()
        brought_to_an_end(world)


def test_a_unit_goes_on_with_the_process_that_took_it_over_and_the_sleeper_learns_of_it():
    """The first one falls asleep when it has received a page of a chain and wakes when the other has done the rest."""
    chosen = Settings(kind="history", symbols=("A",), since=date(2024, 4, 1), until=date(2024, 4, 8), page=2)
    with World(replace(chosen, segment_requests=1)) as world:

        def order() -> Iterator[tuple[int, float]]:
            while len(world.provider.log) < 3:
                yield 0, 0.0
            yield 1, 61.0
            while len(world.provider.log) < 20 and world.living == {1, 2}:
                yield 1, 0.0

        first, second = world.run_together(order())
        assert first is not None
        assert second is not None
        assert (second.state, second.work.done) == (RunState.COMPLETED, 1)
        assert (first.state, first.work.done) == (RunState.COMPLETED, 0)
        # Asked for twice is the page that was in the sleeper's hands, and the one it was about to ask for.
        assert [one.cursor for one in world.provider.log][:5] == [None, "2", "4", "4", "6"]
        assert len(world.paid_twice()) == 2
        world.check_done()


@st.composite
def sharings(draw: st.DrawFn) -> tuple[Settings, Source, list[tuple[int, float]], dict[int, int], dict[int, str], int]:
    kind = draw(st.sampled_from(sorted(set(KINDS) - {"listing"})))
    stores = draw(st.sampled_from([("one",), ("one", "two")]))
    symbols = ("A", "B", "C")[: draw(st.integers(1, 3))]
    since = date(2024, 3, 28)
    chosen = Settings(
        kind=kind,
        symbols=symbols,
        since=since,
        until=draw(st.none() | st.just(date(2024, 3, 29) if kind == "ticks" else date(2024, 4, 9))),
        page=draw(st.integers(2, 5)),
        segment_requests=draw(st.integers(1, 5)),
        segment_rows=draw(st.sampled_from([1, 5, 12, 100])),
        stores=stores,
        not_transactional=draw(st.sampled_from([(), ("one",), stores])),
    )
    processes = draw(st.integers(2, 3))
    turns = st.tuples(
        st.integers(0, processes - 1), st.integers(1, 25), st.sampled_from([0.0, 0.0, 0.0, 0.0, 20.0, *NAPS])
    )
    order = [
        (who, nap if at == 0 else 0.0)
        for who, length, nap in draw(st.lists(turns, min_size=4, max_size=50))
        for at in range(length)
    ]
    crash_at = draw(st.dictionaries(st.integers(0, processes - 1), st.integers(1, 120), max_size=processes))
    faults = st.sampled_from(["split", "cool_down", "quota", "retry", "restart", "drop", "not_yet"])
    return (
        chosen,
        Source(KINDS[kind], symbols, since),
        order,
        crash_at,
        draw(st.dictionaries(st.integers(1, 20), faults, max_size=3)),
        processes,
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
@given(sharings())
@settings(EVERYDAY, max_examples=LIVES // 2)
def test_whatever_processes_do_to_one_another_the_stores_end_up_equal_to_the_source(sharing):
    chosen, source, order, crash_at, faults, processes = sharing
    with World(chosen, source) as world:
        world.run_together(order, processes=processes, crash_at=crash_at, faults=faults)
        world.check_always()
        brought_to_an_end(world)
