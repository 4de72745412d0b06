"""What the ledger promises its callers, one transaction at a time, in SQLite and in a real PostgreSQL."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta

import pytest

from marketsync.clock import ManualClock
from marketsync.coverage import Answer, Covered, Interval, owed
from marketsync.errors import LeaseLost, MarketSyncError
from marketsync.ledger import Binding, Claims, Desired, Ledger, Part, Segment, Work, WorkState, this_owner
from marketsync.planning import Unit, day_start
from marketsync.schema import Column, ColumnType, Schema

NOW = datetime(2024, 6, 3, 12, tzinfo=UTC)
FIRST = day_start(date(2024, 1, 1))
DATASET, HASH, PLAN = "x.bars", "hash", "plan"
# processes of other hosts: nobody can tell whether they live
A, B = "host-a:1:1:a", "host-b:1:1:b"
BARS = Schema(
    (Column("symbol", ColumnType.STR, False), Column("date", ColumnType.DATE, False)),
    ("symbol", "date"),
    "date",
    "symbol",
)


def day(number: int) -> datetime:
    return FIRST + timedelta(days=number)


def unit(start: int, end: int, *subjects: str) -> Unit:
    names = subjects or ("A",)
    return Unit(DATASET, names, (("symbol", names),), day(start), day(end), day(start), day(end))


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(NOW)


@pytest.fixture(params=["sqlite", "postgres"])
def url(request, tmp_path) -> str:
    return f"sqlite:///{tmp_path}/ledger.db" if request.param == "sqlite" else request.getfixturevalue("postgres")


@pytest.fixture
def ledger(url, clock) -> Iterator[Ledger]:
    opened = Ledger(url, clock)
    yield opened
    opened.close()


def claim(ledger: Ledger, *units: Unit, owner: str = A, run: str = "run", stores=("s",), **more) -> Claims:
    def still_owed(of: Unit, covered) -> bool:
        return any(owed([of.span], covered.get(name, ()), run_started=NOW) for name in of.subjects)

    return ledger.claim(
        run_id=run,
        plan=PLAN,
        dataset=DATASET,
        request_hash=HASH,
        candidates=units,
        owner=owner,
        still_owed=still_owed,
        store_ids=stores,
        **more,
    )


def part(work: Work, rows: int, state: WorkState = WorkState.SEALED, **more) -> Part:
    values = {
        "requests": 1,
        "subject_rows": {work.unit.subjects[0]: rows},
        "cursor": None,
        "asked_at": NOW,
        "final_until": work.unit.end,
    } | more
    return Part(work=work, rows=rows, state=state, **values)


def segment(number: int, rows: int, lane: str = "lane") -> Segment:
    return Segment(
        f"{lane}-{number}", DATASET, lane, number, "spool", f"{lane}-{number}.arrow", rows, rows, 0, 0, 100, 1
    )


def covered(ledger: Ledger, store: str = "s", subject: str = "A") -> list[tuple[datetime, datetime, Answer]]:
    found = ledger.coverage([store], DATASET, HASH)[store].get(subject, [])
    return [(piece.start, piece.end, piece.answer) for piece in found]


def state_of(ledger: Ledger, work: Work) -> str:
    return next(row.state for row in ledger.works(dataset=DATASET) if row.work_id == work.work_id)


def test_a_unit_is_in_one_worker_s_hands_and_so_is_what_overlaps_it(ledger):
    (mine,) = claim(ledger, unit(0, 10, "A", "B")).work
    assert mine.epoch == 1
    theirs = claim(ledger, unit(0, 10, "A", "B"), unit(5, 20, "B"), unit(5, 20, "C"), unit(10, 20, "A"), owner=B)
    assert [work.unit for work in theirs.work] == [unit(5, 20, "C"), unit(10, 20, "A")]
    assert theirs.elsewhere == [unit(0, 10, "A", "B"), unit(5, 20, "B")]


def test_what_was_given_back_can_be_had_at_once(ledger):
    given = claim(ledger, unit(0, 10)).work
    ledger.give_back(given, A)
    (again,) = claim(ledger, unit(0, 10), owner=B).work
    assert again.epoch == 2


def test_a_lease_that_ran_out_goes_on_elsewhere_from_its_cursor_and_who_slept_can_write_nothing(ledger, clock):
    (mine,) = claim(ledger, unit(0, 10)).work
    first = part(mine, 5, WorkState.LEASED, cursor={"token": "page 2"})
    ledger.seal("run", A, segment(1, 5), [first], ["s"])
    ledger.delivered("s", [segment(1, 5)], 5, 0, 0)
    clock.advance(61)
    (theirs,) = claim(ledger, unit(0, 10), owner=B).work
    assert (theirs.epoch, theirs.cursor, theirs.rows, theirs.requests) == (2, {"token": "page 2"}, 5, 1)
    with pytest.raises(LeaseLost, match="another worker"):
        ledger.seal("run", A, segment(2, 7), [part(mine, 7)], ["s"])
    assert ledger.segment("lane-2") is None
    ledger.seal("run", B, segment(2, 7), [part(theirs, 7)], ["s"])
    assert state_of(ledger, theirs) == WorkState.SEALED


def test_what_a_dead_worker_of_this_host_had_is_owed_and_what_others_have_is_theirs(ledger):
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        pass
    gone = f"{socket.gethostname()}:{process.pid}:1:a"
    (left,) = claim(ledger, unit(0, 10), owner=gone).work
    ledger.seal("run", gone, segment(1, 5), [part(left, 5, WorkState.LEASED, cursor={"token": "page 2"})], ["s"])
    (alive,) = claim(ledger, unit(10, 20), owner=this_owner()).work
    (elsewhere,) = claim(ledger, unit(20, 30), owner=A).work
    assert (ledger.take_from_the_dead(), ledger.take_from_the_dead()) == (1, 0)
    assert [state_of(ledger, work) for work in (left, alive, elsewhere)] == ["owed", "leased", "leased"]
    (again,) = claim(ledger, unit(0, 10), owner=B).work
    assert (again.cursor, again.rows) == ({"token": "page 2"}, 5)


def test_a_renewed_lease_does_not_run_out(ledger, clock):
    claim(ledger, unit(0, 10), unit(10, 20))
    clock.advance(50)
    assert ledger.renew(A) == 2
    clock.advance(50)
    assert claim(ledger, unit(0, 10), owner=B).work == []


def test_of_a_segment_with_a_lost_unit_nothing_is_registered(ledger, clock):
    one, other = claim(ledger, unit(0, 10), unit(10, 20)).work
    clock.advance(61)
    claim(ledger, unit(10, 20), owner=B)
    with pytest.raises(LeaseLost) as lost:
        ledger.seal("run", A, segment(1, 4), [part(one, 2), part(other, 2)], ["s"])
    assert lost.value.work_id == other.work_id
    ledger.seal("run", A, segment(1, 2), [part(one, 2)], ["s"])
    assert ledger.segment("lane-1").rows == 2


def test_only_what_a_store_acknowledged_is_covered_and_only_there(ledger):
    (work,) = claim(ledger, unit(0, 10), stores=("s", "t")).work
    first, second = segment(1, 5), segment(2, 7)
    ledger.seal("run", A, first, [part(work, 5, WorkState.LEASED, cursor={"token": "2"})], ["s", "t"])
    after = replace(work, rows=5, requests=1, cursor={"token": "2"})
    ledger.seal("run", A, second, [part(after, 7)], ["s", "t"])
    assert covered(ledger) == []
    assert ledger.delivered("s", [first], 5, 0, 0) == []
    assert covered(ledger) == [(day(0), day(10), Answer.PARTIAL)]
    assert ledger.delivered("s", [second], 7, 0, 0) == []
    assert covered(ledger) == [(day(0), day(10), Answer.ROWS)]
    assert covered(ledger, "t") == []
    assert state_of(ledger, work) == WorkState.SEALED
    assert ledger.stores_owed(DATASET) == {"t"}
    assert set(ledger.delivered("t", [first, second], 12, 0, 0)) == {first.path, second.path}
    assert covered(ledger, "t") == [(day(0), day(10), Answer.ROWS)]
    assert state_of(ledger, work) == WorkState.DELIVERED
    assert claim(ledger, unit(0, 10), stores=("s", "t")).settled == 1


def test_deliveries_are_owed_in_the_order_of_their_lane(ledger, clock):
    works = claim(ledger, *(unit(10 * n, 10 * n + 10) for n in range(4))).work
    for number, work in enumerate(works, 1):
        ledger.seal("run", A, segment(number, 1), [part(work, 1)], ["s"])
        clock.advance(1)
    ledger.delivered("s", [segment(1, 1)], 1, 0, 0)
    assert [found.seq for found in ledger.owed_deliveries("s", DATASET, "spool")] == [2, 3, 4]
    assert ledger.owed_deliveries("s", DATASET, "another spool") == []


def test_an_answer_is_final_up_to_where_it_has_settled_and_owed_again_beyond(ledger):
    (work,) = claim(ledger, unit(0, 10)).work
    ledger.seal("run", A, segment(1, 3), [part(work, 3, final_until=day(7))], ["s"])
    ledger.delivered("s", [segment(1, 3)], 3, 0, 0)
    pieces = ledger.coverage(["s"], DATASET, HASH)["s"]["A"]
    assert [(piece.start, piece.end, piece.final) for piece in pieces] == [
        (day(0), day(7), True),
        (day(7), day(10), False),
    ]
    assert owed([Interval(day(0), day(10))], pieces, run_started=NOW + timedelta(days=1)) == [Interval(day(7), day(10))]


def test_dropped_work_is_settled_until_it_is_retried(ledger):
    (work,) = claim(ledger, unit(0, 10)).work
    ledger.seal("run", A, segment(1, 0), [part(work, 0, WorkState.DROPPED, error="no such symbol")], ["s"])
    assert claim(ledger, unit(0, 10), run="next").settled == 1
    assert ledger.retry(PLAN, DATASET, "B") == 0
    assert ledger.retry(PLAN, DATASET, "A") == 1
    assert len(claim(ledger, unit(0, 10), run="next").work) == 1


def test_failed_work_is_asked_again_by_the_next_run_and_not_by_the_same(ledger):
    (work,) = claim(ledger, unit(0, 10)).work
    ledger.seal("run", A, segment(1, 0), [part(work, 0, WorkState.FAILED, error="HTTP 500")], ["s"])
    assert claim(ledger, unit(0, 10)).settled == 1
    (again,) = claim(ledger, unit(0, 10), run="next").work
    assert again.attempt == 2


def test_waiting_work_tells_when_it_may_go_on(ledger):
    works = claim(ledger, unit(0, 10), unit(10, 20)).work
    for number, work in enumerate(works, 1):
        at = NOW + timedelta(hours=number)
        ledger.seal("run", A, segment(number, 0), [part(work, 0, WorkState.WAITING, resume_at=at)], ["s"])
    assert ledger.resume_at(PLAN) == NOW + timedelta(hours=1)
    assert ledger.resume_at("another") is None
    assert ledger.cancel_work(PLAN) == 2
    assert ledger.resume_at(PLAN) is None
    assert ledger.work_counts("run") == {"cancelled": 2}


def test_pages_that_are_lost_before_every_store_has_them_are_owed_again(ledger):
    (work,) = claim(ledger, unit(0, 10)).work
    ledger.seal("run", A, segment(1, 5), [part(work, 5)], ["s"])
    ledger.lose(["lane-1"])
    assert ledger.owed_deliveries("s", DATASET, "spool") == []
    (again,) = claim(ledger, unit(0, 10), owner=B).work
    assert (again.cursor, again.restarted) == (None, True)


def test_a_table_that_was_made_anew_is_believed_to_hold_nothing(ledger):
    assert ledger.bind_store("s", DATASET, "delta://x", "marker") is Binding.NEW
    (work,) = claim(ledger, unit(0, 10)).work
    ledger.seal("run", A, segment(1, 5), [part(work, 5)], ["s"])
    ledger.removed(ledger.delivered("s", [segment(1, 5)], 5, 0, 0))
    assert ledger.bind_store("s", DATASET, "delta://x", "marker") is Binding.SAME
    assert covered(ledger) == [(day(0), day(10), Answer.ROWS)]
    assert ledger.bind_store("s", DATASET, "delta://x", "another marker") is Binding.CHANGED
    assert covered(ledger) == []
    assert len(claim(ledger, unit(0, 10)).work) == 1


def test_rows_are_appended_only_where_no_row_of_theirs_can_be(ledger):
    first, again = claim(ledger, unit(0, 10), unit(20, 30)).work
    ledger.seal("run", A, segment(1, 5), [part(first, 5)], ["s"])
    assert ledger.fresh("s", BARS, [segment(1, 5)])
    ledger.delivered("s", [segment(1, 5)], 5, 0, 0)
    ledger.seal("run", A, segment(2, 5), [part(again, 5)], ["s"])
    assert ledger.fresh("s", BARS, [segment(2, 5)])
    ledger.lay("s", DATASET, HASH, {"A": [Covered(day(29), day(31), Answer.ROWS, False, NOW, 1)]})
    assert not ledger.fresh("s", BARS, [segment(2, 5)])


def test_nothing_is_appended_to_a_table_whose_rows_came_from_elsewhere(ledger):
    ledger.bind_store("s", DATASET, "delta://x", "marker", lambda: True)
    (work,) = claim(ledger, unit(0, 10)).work
    ledger.seal("run", A, segment(1, 5), [part(work, 5)], ["s"])
    assert not ledger.fresh("s", BARS, [segment(1, 5)])


def test_a_hold_has_one_owner_and_can_be_taken_when_it_ran_out(ledger, clock):
    assert ledger.hold("lane", A)
    assert not ledger.hold("lane", B)
    assert ledger.keep_hold("lane", A)
    clock.advance(61)
    assert ledger.hold("lane", B)
    assert not ledger.keep_hold("lane", A)
    ledger.let_go("lane", A)
    assert not ledger.hold("lane", A)
    ledger.let_go("lane", B)
    assert ledger.hold("lane", A)


def test_each_word_of_the_user_is_of_a_new_generation(ledger):
    assert ledger.control(PLAN).desired is Desired.RUN
    assert ledger.set_control(PLAN, Desired.PAUSE).generation == 1
    assert ledger.set_control(PLAN, Desired.RUN).generation == 2
    assert (ledger.control(PLAN).desired, ledger.control(PLAN).generation) == (Desired.RUN, 2)


def test_old_finished_work_is_forgotten_and_its_coverage_is_not(ledger, clock):
    run = ledger.open_run(PLAN)
    done, waits = claim(ledger, unit(0, 10), unit(10, 20), run=run.run_id).work
    ledger.seal(run.run_id, A, segment(1, 5), [part(done, 5)], ["s"])
    ledger.seal(run.run_id, A, segment(2, 0), [part(waits, 0, WorkState.WAITING, resume_at=NOW)], ["s"])
    ledger.removed(ledger.delivered("s", [segment(1, 5)], 5, 0, 0))
    ledger.close_run(run.run_id, "completed", {})
    clock.advance(timedelta(days=100))
    assert ledger.forget(timedelta(days=90)) == 1
    assert [row.work_id for row in ledger.works(dataset=DATASET)] == [waits.work_id]
    assert ledger.segment("lane-1") is None
    assert covered(ledger) == [(day(0), day(10), Answer.ROWS)]
    assert ledger.runs(PLAN) == []


def test_a_chore_is_due_once_in_its_time_and_first_after_it_was_named(ledger, clock):
    week = timedelta(days=7)
    assert not ledger.due("tidy", week)
    clock.advance(week + timedelta(seconds=1))
    assert ledger.due("tidy", week)
    assert not ledger.due("tidy", week)


def test_a_ledger_of_another_version_is_refused(url, clock):
    import sqlalchemy as sa

    Ledger(url, clock).close()
    engine = sa.create_engine(url.replace("postgresql://", "postgresql+psycopg://"))
    with engine.begin() as connection:
        connection.execute(sa.text("UPDATE version SET version = 99"))
    engine.dispose()
    with pytest.raises(MarketSyncError, match="is of version 99"):
        Ledger(url, clock)
