"""Cases that were once wrong, or nearly, each in the smallest world that shows it; and what every answer leads to."""

from __future__ import annotations

import logging
from dataclasses import replace
from datetime import date, timedelta

import pytest
from sim_world import DAY, KINDS, START, FakeClient, Settings, Source, World

from marketsync.coverage import Answer
from marketsync.definition import Verdict
from marketsync.errors import ExitCode
from marketsync.ledger import Desired
from marketsync.report import RunReport, RunState
from tasks.workspace import Options

ONE = Settings(symbols=("A",), kind="days", until=date(2024, 3, 7), segment_requests=1)


@pytest.fixture(autouse=True, scope="module")
def _quiet():
    """What the engine warns of is what these tests bring about."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def ran(world: World, **how) -> RunReport:
    report = world.run(**how)
    assert report is not None, world.lost
    world.check_always()
    return report


def completed(world: World, **how) -> RunReport:
    report = ran(world, **how)
    assert report.state is RunState.COMPLETED, report
    return report


def requests_of(world: World, before: int = 0) -> list[tuple[tuple[str, ...], str | None]]:
    """Who was asked, and with which page token, since request number `before`."""
    return [(one.symbols, one.cursor) for one in world.provider.log[before:]]


# ---------------------------------------------------------------- chains


def test_a_chain_of_thirty_pages_that_fails_at_request_27_goes_on_with_request_27():
    thirty = Settings(kind="history", symbols=("A",), since=START.date(), until=date(2024, 3, 30), page=1,
                      segment_requests=2, attempts=1)  # fmt: skip
    with World(thirty, now=START + timedelta(days=29, hours=12)) as world:
        report = ran(world, faults={27: "retry"})
        assert report.state is RunState.FAILED
        assert len(world.provider.log) == 27
        report = completed(world)
        assert requests_of(world, 27) == [(("A",), str(token)) for token in (26, 27, 28, 29)]
        world.check_done()
        assert not world.paid_twice()


def test_a_chain_that_a_quota_cuts_goes_on_the_next_day_where_it_stood_although_a_day_was_added():
    settings = Settings(kind="days", symbols=("A",), until=None, since=date(2024, 3, 8), page=1, segment_requests=1)
    with World(settings, now=START + timedelta(days=15, hours=12)) as world:
        report = ran(world, faults={6: "quota"})
        assert report.state is RunState.WAITING_FOR_QUOTA
        assert report.state.exit_code == ExitCode.WAITING
        assert report.resume_at == world.provider.log[5].at + timedelta(hours=3)
        world.clock.advance(DAY)
        completed(world)
        assert requests_of(world, 6)[0] == (("A",), "5")
        world.clock.advance(DAY)
        completed(world)
        world.check_done()
        asked = [one for one in world.paid_twice() if any(at < START + timedelta(days=15) for _, at in one.rows)]
        assert not asked, "days that were over when they were asked for are asked for once"


def test_a_refused_page_token_begins_the_chain_again_and_leaves_no_row_twice():
    with World(replace(ONE, page=2)) as world:
        report = completed(world, faults={3: "restart"})
        assert requests_of(world)[:4] == [(("A",), None), (("A",), "2"), (("A",), "4"), (("A",), None)]
        assert report.requests.retried == 1
        world.check_done()


def test_a_token_that_is_refused_for_ever_fails_the_unit_instead_of_asking_for_ever():
    with World(replace(ONE, page=2)) as world:
        world.provider.standing = lambda ask: "restart"
        report = ran(world)
        assert report.state is RunState.FAILED
        assert len(world.provider.log) < 10


# ---------------------------------------------------------------- splits


def test_the_halves_of_a_split_unit_are_asked_although_the_run_died_before_it_asked_them():
    with World(replace(ONE, page=3, segment_requests=4)) as world:
        died = world.run(faults={1: "split"}, crash_at="ledger: seal done")
        assert died is None
        assert world.sql("SELECT state FROM work") == [("split",)], world.lost
        completed(world)
        assert len({(one.start, one.end) for one in world.provider.log}) == 3
        world.check_done()


def test_a_split_unit_is_asked_in_halves_when_it_is_fetched_again():
    with World(replace(ONE, page=3, segment_requests=4)) as world:
        completed(world, faults={1: "split"})
        before = len(world.provider.log)
        world.source.restated["A", date(2024, 3, 4)] = 1
        completed(world, options=Options(refetch=True))
        assert len({(one.start, one.end) for one in world.provider.log[before:]}) == 2
        world.check_done()


def test_the_halves_of_a_unit_that_was_split_behind_its_first_page_are_not_appended_beside_that_page():
    with World(replace(ONE, page=3, segment_requests=4)) as world:
        completed(world, faults={2: "split"})
        assert [one.verdict for one in world.provider.log][:2] == [Verdict.ROWS, Verdict.SPLIT]
        world.check_done()


def test_an_answer_that_cannot_be_made_smaller_fails_at_once():
    with World(Settings(kind="history", symbols=("A",), until=date(2024, 3, 7))) as world:
        report = ran(world, faults={1: "split"})
        assert (report.state, report.work.failed, len(world.provider.log)) == (RunState.FAILED, 1, 1)
        assert "cannot be made smaller" in report.errors[0].message


# ---------------------------------------------------------------- stores


def test_a_store_that_is_added_while_a_chain_is_unfinished_gets_its_first_pages_too():
    with World(replace(ONE, page=1, stores=("one",))) as world:
        ran(world, faults={5: "quota"})
        world.settings = replace(world.settings, stores=("one", "two"))
        world.write_configuration()
        completed(world)
        completed(world)
        world.check_done()
        assert not world.paid_twice()


def test_a_store_that_is_added_later_is_filled_without_a_request():
    with World(Settings()) as world:
        completed(world)
        world.settings = replace(world.settings, stores=("one", "two"))
        world.write_configuration()
        report = completed(world)
        assert report.requests.sent == 0
        world.check_done()


@pytest.mark.parametrize("crash_at", range(5, 40, 3))
def test_a_copy_that_breaks_off_leaves_no_row_twice_when_its_source_leaves_the_plan(crash_at: int):
    with World(Settings(until=date(2024, 3, 12), segment_rows=8)) as world:
        completed(world)
        world.settings = replace(world.settings, stores=("one", "two"))
        world.write_configuration()
        world.run(crash_at=crash_at)
        world.check_always()
        world.settings = replace(world.settings, stores=("two",))
        world.write_configuration()
        completed(world)
        world.check_done()


def test_a_table_that_is_dropped_is_filled_again():
    with World(Settings()) as world:
        completed(world)
        world.disks["one"].tables.clear()
        report = completed(world)
        assert [remark.kind for remark in report.remarks] == ["void"]
        world.check_done()


def test_a_table_that_is_dropped_while_a_chain_is_unfinished_gets_its_first_pages_again():
    with World(replace(ONE, page=1)) as world:
        ran(world, faults={5: "quota"})
        world.disks["one"].tables.clear()
        completed(world)
        world.check_done()


def test_a_table_that_has_rows_the_ledger_does_not_know_is_never_appended_to():
    with World(Settings()) as world:
        completed(world)
        for file in (world.folder / ".marketsync").glob("ledger.db*"):
            file.unlink()
        completed(world)
        world.check_done()


def test_a_store_that_is_down_holds_back_nothing_but_itself_even_over_days():
    settings = Settings(kind="restated", until=None, stores=("one", "two"), since=date(2024, 3, 28))
    with World(settings, now=START + timedelta(days=40, hours=12)) as world:
        for _ in range(3):
            world.disks["two"].always_down = True
            report = ran(world)
            assert report.state is RunState.FAILED
            assert any(remark.kind == "store" for remark in report.errors)
            assert world.stored("one") == world.truth()
            world.clock.advance(DAY)
        world.disks["two"].always_down = False
        completed(world)
        world.check_done()


def test_what_was_asked_later_has_the_last_word_in_a_store_that_was_down():
    settings = Settings(kind="restated", until=None, stores=("one", "two"), since=date(2024, 3, 28))
    for seed in range(4):  # lanes have random names: their order must not decide
        with World(settings, now=START + timedelta(days=40, hours=12), seed=seed) as world:
            completed(world)
            for count in range(1, 4):
                # It goes down while the run delivers, so that the rows are sealed for it.
                world.disks["two"].down = ["before"] * 40
                for symbol in settings.symbols:
                    world.source.restated[symbol, world.clock.now().date()] = count
                ran(world)
                world.clock.advance(timedelta(hours=1))
            world.disks["two"].down = []
            world.run(options=Options(until=date(2024, 3, 29)))
            one, two = (world.disks[name].tables["made.rows"].rows for name in ("one", "two"))
            assert {key: row["value"] for key, row in two.items()} == {key: row["value"] for key, row in one.items()}


def test_a_store_that_breaks_while_it_commits_gets_no_row_twice():
    with World(Settings(stores=("one", "two"), segment_rows=6, not_transactional=("two",))) as world:
        for disk in world.disks.values():
            disk.down = ["after", "", "after", "before", "after"]
        completed(world)
        world.check_done()


# ---------------------------------------------------------------- answers and coverage


def test_rows_stay_known_when_they_are_asked_again_and_the_answer_is_not_yet():
    settings = Settings(kind="days", symbols=("A",), until=None, since=date(2024, 4, 8))
    with World(settings, now=START + timedelta(days=40, hours=12)) as world:
        completed(world)  # the day that is under way is covered, and not for good
        world.clock.advance(timedelta(hours=2))
        report = ran(world, faults={1: "not_yet"})
        assert report.state is RunState.WAITING_FOR_PUBLICATION
        world.clock.advance(timedelta(hours=24))
        completed(world)
        world.check_done()


def test_a_list_without_time_is_asked_every_day_and_replaces_what_it_was():
    with World(Settings(kind="listing", symbols=("A", "B", "C", "D")), now=START + timedelta(hours=1)) as world:
        for _ in range(6):
            completed(world)
            world.check_done()
            world.clock.advance(DAY)


def test_rows_of_a_symbol_that_was_not_asked_for_are_kept_once(monkeypatch: pytest.MonkeyPatch):
    """A provider that knows B as the new name of A answers for both with rows of B."""
    rows = Source.rows

    def renamed(self, symbols, start, end, now, *, as_sent=False):
        return rows(self, ["B" for _ in symbols], start, end, now, as_sent=as_sent)

    monkeypatch.setattr(Source, "rows", renamed)
    with World(replace(ONE, symbols=("A", "B"))) as world:
        completed(world)
        assert not world.disks["one"].wrong
        assert {key[0] for key in world.disks["one"].tables["made.rows"].rows} == {"B"}


def test_an_answer_that_holds_more_than_was_owed_is_never_appended_twice():
    """A file by month is asked for its last days, then (another `since`) for its first: both answers hold all of it."""
    settings = Settings(kind="files", symbols=("A",), since=date(2024, 3, 20), until=date(2024, 3, 25))
    with World(settings, Source(KINDS["files"], ("A",), date(2024, 2, 1))) as world:
        completed(world)
        world.settings = replace(world.settings, since=date(2024, 3, 2))
        world.write_configuration()
        completed(world)
        world.check_done()
        # A shorter window: another unit, whose answer lies beside what was covered and inside of what is there.
        KINDS["weeks"] = replace(KINDS["files"], name="files", over={**KINDS["files"].over, "window": {
            "every": "1 week", "whole": True}})  # fmt: skip
        world.kind = KINDS.pop("weeks")
        world.settings = replace(world.settings, since=date(2024, 2, 27))
        world.write_configuration()
        completed(world)
        world.check_always()


def test_a_whole_history_that_is_asked_for_its_newest_day_is_neither_appended_twice_nor_set_aside():
    with World(Settings(kind="history", symbols=("A",), since=date(2024, 4, 1), until=date(2024, 4, 5))) as world:
        completed(world)
        world.settings = replace(world.settings, until=date(2024, 4, 8))
        world.write_configuration()
        report = completed(world)
        assert report.rows.quarantined == 0
        world.check_done()


def test_bad_and_repeated_rows_are_accounted_for_and_set_aside():
    settings = Settings(symbols=("A", "B"), until=date(2024, 3, 12), stores=("one", "two"))
    source = Source(
        KINDS["batched"],
        settings.symbols,
        settings.since,
        bad=frozenset({("A", 2), ("B", 7)}),
        twice=frozenset({("A", 3), ("A", 4)}),
    )
    with World(settings, source) as world:
        report = ran(world)
        assert report.state is RunState.COMPLETED_WITH_FINDINGS
        assert "2 rows were set aside" in next(one.message for one in report.remarks if one.kind == "quarantined")
        assert (report.rows.fetched, report.rows.inserted) == (26, 22)
        assert (report.rows.duplicates, report.rows.quarantined) == (2, 2)
        world.check_done()
        kept = [line for file in (world.folder / ".marketsync/quarantine/made.rows").iterdir() for line in file.open()]
        assert len(kept) == 2
        assert all("reason" in line for line in kept)


def test_three_symbols_that_end_on_different_days_are_each_continued_from_their_own_end():
    settings = Settings(kind="days", symbols=("A", "B", "C"), until=date(2024, 3, 20))
    with World(settings) as world:
        for symbol, until in (("A", date(2024, 3, 5)), ("B", date(2024, 3, 12)), ("C", date(2024, 3, 18))):
            completed(world, options=Options(only=(symbol,), until=until))
        before = len(world.provider.log)
        completed(world)
        first = {}
        for one in world.provider.log[before:]:
            first[one.symbols[0]] = min(one.start, first.get(one.symbols[0], one.start))
        assert {symbol: at.date() for symbol, at in first.items()} == {
            "A": date(2024, 3, 6),
            "B": date(2024, 3, 13),
            "C": date(2024, 3, 19),
        }
        assert not world.paid_twice()
        world.check_done()


def test_coverage_of_an_empty_answer_is_final_only_for_days_that_are_over():
    settings = Settings(kind="days", symbols=("A",), since=date(2024, 4, 8), until=None)
    absent = frozenset({("A", 0), ("A", 1), ("A", 2)})
    with World(settings, Source(KINDS["days"], ("A",), settings.since, absent)) as world:
        world.clock.advance(timedelta(hours=12))
        completed(world)
        pieces = world.ledger().coverage(["one"], "made.rows", None)["one"]["A"]
        assert [(piece.answer, piece.final, (piece.end - piece.start).days) for piece in pieces] == [
            (Answer.EMPTY, True, 2),
            (Answer.EMPTY, False, 1),
        ]


# ---------------------------------------------------------------- what each answer leads to

TABLE = {
    # fault: (state of the run, state of the unit, words in the report, requests until the run ends)
    "not_yet": (RunState.WAITING_FOR_PUBLICATION, "not_yet", "not published yet", 2),
    "cool_down": (RunState.COMPLETED, "delivered", "", 3),
    "long cool_down": (RunState.WAITING_FOR_QUOTA, "waiting", "asks to wait longer", 1),
    "quota": (RunState.WAITING_FOR_QUOTA, "waiting", "the quota is spent", 1),
    "no room": (RunState.WAITING_FOR_QUOTA, "waiting", "the day's quota is spent", 0),
    "drop": (RunState.COMPLETED_WITH_FINDINGS, "dropped", "wrong request", 2),
    "retry": (RunState.COMPLETED, "delivered", "", 3),
    "stop_provider": (RunState.FAILED, "failed", "the key of made is refused", 1),
    "refresh_auth": (RunState.FAILED, "failed", "refused even when it is fresh", 1),
    "stop_dataset": (RunState.FAILED, "failed", "no permission for made.rows", 1),
    "fail": (RunState.FAILED, "failed", "does not explain; it is kept in", 1),
}


@pytest.mark.parametrize("fault", TABLE)
def test_each_answer_leads_to_what_the_design_says(fault: str):
    state, unit, words, requests = TABLE[fault]
    two = Settings(kind="days", symbols=("A", "B"), until=date(2024, 3, 7), page=20)
    with World(two) as world:
        report = ran(world, faults={1: fault})
        told = [remark.message for remark in (*report.errors, *report.remarks)]
        assert report.state is state, told
        assert len(world.provider.log) == requests
        assert any(words in message for message in told) or not words, told
        if words and fault != "no room":
            assert any(f"the provider says {fault}" in message for message in told), told
        states = dict(world.sql("SELECT subjects, state FROM work WHERE subjects = 'A'"))
        assert states == {"A": unit}
        if fault == "fail":
            kept = list((world.folder / ".marketsync" / "answers").glob("*/*.txt"))
            assert [file.read_text() for file in kept] == ["{}"]
        if fault == "drop":
            report = ran(world)
            assert report.requests.sent == 0, "what was dropped is not asked again by itself"
            completed(world, options=Options(retry_failed=True))
        completed(world)
        world.check_done()


def test_a_unit_that_fails_for_good_is_asked_once_a_run_even_when_steps_are_short():
    with World(Settings(kind="days", symbols=("A", "B", "C"), until=date(2024, 3, 7), page=20)) as world:
        world.provider.standing = lambda ask: "retry" if ask.values["symbol"] == ("B",) else None
        report = ran(world, seconds=0.0)
        assert report.state is RunState.FAILED
        assert [one.symbols for one in world.provider.log].count(("B",)) == world.settings.attempts
        assert (report.work.failed, report.work.done) == (1, 2)


def test_a_spent_failure_budget_leaves_the_provider_alone():
    settings = Settings(kind="days", symbols=tuple("ABCDEFGHIJ"), until=date(2024, 3, 7), page=20, attempts=1)
    with World(settings) as world:
        world.provider.standing = lambda ask: "retry"
        report = ran(world)
        assert (report.state, report.work.failed, len(world.provider.log)) == (RunState.FAILED, 5, 5)


# ---------------------------------------------------------------- pauses


class Talkative(FakeClient):
    """Says something to the plan while its n-th request is under way."""


@pytest.mark.parametrize(("word", "state"), [(Desired.PAUSE, RunState.PAUSED), (Desired.CANCEL, RunState.CANCELLED)])
def test_a_pause_stops_at_the_next_page_and_nothing_is_asked_twice(word: Desired, state: RunState):
    with World(Settings(kind="days", symbols=tuple("ABCDEF"), until=date(2024, 3, 7), page=2)) as world:
        process = world.process()
        process.crossings.turn = lambda: world.ledger().set_control("p", word) if len(world.provider.log) == 8 else None
        report = process.run()
        process.end()
        assert (report.state, report.state.exit_code) == (state, ExitCode.PAUSED)
        # One thread listens between units only; threads of a real run listen all the time.
        assert 8 <= len(world.provider.log) <= 8 + 5
        if word is Desired.PAUSE:
            refused = ran(world)
            assert (refused.state, refused.requests.sent) == (RunState.PAUSED, 0)
            world.ledger().set_control("p", Desired.RUN)
        completed(world)
        world.check_done()
        assert not world.paid_twice()


def test_a_pause_that_comes_while_a_run_prepares_is_heard():
    with World(Settings(until=date(2024, 3, 12))) as world:
        process = world.process()
        said = []

        def turn() -> None:
            if process.crossings.names[-1:] == ["ledger: bind_dataset done"] and not said:
                said.append(world.ledger().set_control("p", Desired.PAUSE))

        process.crossings.turn = turn
        report = process.run()
        process.end()
        assert said
        assert (report.state, report.requests.sent) == (RunState.PAUSED, 0)
