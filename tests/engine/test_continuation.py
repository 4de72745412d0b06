"""What a run leaves for the next: each symbol goes on from its own end, a chain from its own page, a stopped run from
where it stood, and a store that is new from its sibling. The replica's log is the witness."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
from datetime import date, timedelta
from pathlib import Path

import polars as pl
import pytest
from synced_place import PATIENCE_SECONDS, Place, alpaca_by_month, asked_again, ended, environment, eventually

from tasks.workspace import Options

SYMBOLS = ["AAPL", "GOOG", "IBM", "MSFT"]
FIRST, LAST = date(2000, 3, 1), date(2013, 3, 1)
PLAN = {"datasets": ["alpaca.daily_bars"], "universe": SYMBOLS, "since": str(FIRST), "until": str(LAST)}


def starts(log: list[dict]) -> list[str]:
    """The first instant of every request."""
    return [entry["request"]["params"]["start"] for entry in log]


def firsts(log: list[dict]) -> dict[str, str]:
    """The earliest day that each symbol was asked for."""
    found: dict[str, str] = {}
    for entry in log:
        asked = entry["request"]["params"]
        for symbol in asked["symbols"].split(","):
            found[symbol] = min(asked["start"][:10], found.get(symbol, "9999"))
    return found


def test_three_symbols_that_end_on_different_days_are_each_continued_from_their_own_end(place):
    made = place()
    made.write({**PLAN, "universe": ["AAPL", "IBM", "MSFT"]})
    ends = {"AAPL": date(2003, 5, 14), "IBM": date(2009, 12, 31), "MSFT": date(2011, 7, 8)}
    for symbol, end in ends.items():
        assert made.sync_here(Options(only=(symbol,), until=end)).code == 0
    before = made.requests
    done = made.sync()
    assert done.code == 0, done.words
    assert firsts(made.log[before:]) == {symbol: str(end + timedelta(days=1)) for symbol, end in ends.items()}
    assert made.bars().equals(made.source(ends, FIRST, LAST))
    assert sum(entry["rows"] for entry in made.log) == made.bars().height, "no row is paid for twice"


def chain_of_thirty(place) -> tuple[Place, date]:
    """One symbol and one window of 300 rows in pages of 10, and its last day; a segment for each second page."""
    made = place()
    last = pl.Series([made.source(["IBM"])["ts"][299]]).cast(pl.Datetime("us", "UTC")).dt.date()[0]
    plan = {**PLAN, "universe": ["IBM"], "until": str(last), "segment": {"requests": 2}}
    definition = alpaca_by_month(10).replace("window: 1 month", "window: 5 years")
    made.write(plan, definition=definition, upstream={"tuning": {"attempts": 1}})
    return made, last


@pytest.mark.parametrize("fault", ["server_error", pytest.param("connection_reset", marks=pytest.mark.slow)])
@pytest.mark.parametrize("more_days", [0, pytest.param(14, marks=pytest.mark.slow)])
def test_a_chain_of_30_pages_that_fails_at_request_27_continues_with_request_27(place, fault, more_days):
    """Although meanwhile days may have been added to what is wanted."""
    made, last = chain_of_thirty(place)
    made.replica.set_faults([{"fault": fault, "when": {"request": 27}}])
    failed = made.sync()
    assert (failed.code, failed.state, failed.report["work"]["failed"]) == (1, "failed", 1)
    assert made.requests == 27
    later = last + timedelta(days=more_days)
    done = made.sync("--until", str(later))
    assert (done.code, done.sent) == (0, 4 + (more_days > 0)), done.words
    asked = [entry["request"]["params"].get("page_token") for entry in made.log]
    assert asked[26] is not None
    assert made.log[26]["request"] in [entry["request"] for entry in made.log[27:]]
    assert len(asked_again(made.log)) == 1, "nothing else is asked twice"
    assert made.bars().equals(made.source(["IBM"], last=later))


def test_a_chain_that_is_killed_at_request_27_continues_within_its_last_two_pages(place):
    made, last = chain_of_thirty(place)
    made.replica.set_faults([{"fault": "timeout", "when": {"request": 27}}])
    process = made.start()
    made.wait_for_requests(27, process)
    process.kill()
    process.communicate()
    done = made.sync()
    assert done.code == 0, done.words
    assert 4 <= done.sent <= 4 + 2
    assert made.bars().equals(made.source(["IBM"], last=last))


# ---------------------------------------------------------------- stopped by hand


def running(place, *, pages: int = 20) -> tuple[Place, subprocess.Popen[str]]:
    """A place with a run that has some hundred requests before it, and has sent a few."""
    made = place(delay=(0.01, 0.03))
    made.write(PLAN, definition=alpaca_by_month(10_000), upstream={"limits": [{"requests": 100_000, "per": "minute"}]})
    process = made.start()
    made.wait_for_requests(pages, process)
    return made, process


def check_rest(made: Place) -> None:
    """One more run fetches the rest, nothing twice, and then everything is there once."""
    done = made.sync()
    assert done.code == 0, done.words
    assert asked_again(made.log) == []
    assert made.bars().equals(made.source(SYMBOLS, FIRST, LAST))
    assert made.spooled() == []


@pytest.mark.parametrize("word", ["SIGTERM", "SIGINT"])
@pytest.mark.slow  # the everyday ones are in tests/test_interrupts.py
def test_a_signal_ends_a_run_at_its_next_page_with_4_and_what_was_fetched_is_kept(place, word):
    made, process = running(place)
    process.send_signal(signal.Signals[word])
    stopped = ended(process)
    assert (stopped.code, stopped.state) == (4, "paused"), stopped.words
    assert "stopping at the next page" in stopped.stderr
    assert made.requests == stopped.sent < 200
    assert made.bars().height == sum(entry["rows"] for entry in made.log) > 0
    assert made.spooled() == []
    check_rest(made)


@pytest.mark.slow
def test_a_second_signal_ends_a_run_at_once_and_nothing_durable_is_lost(place):
    made, process = running(place)
    made.replica.set_faults([{"fault": "timeout", "when": {"request": "every 1"}}])
    eventually(lambda: any(entry["fault"] == "timeout" for entry in made.log), "a request that hangs")
    process.send_signal(signal.SIGINT)
    eventually(lambda: process.stderr is not None and process.stderr.readline(), "the word that it stops")
    process.send_signal(signal.SIGINT)
    process.wait(PATIENCE_SECONDS)
    assert process.stderr is not None
    assert process.returncode == 4
    assert "Traceback" not in process.stderr.read()
    process.communicate()
    made.replica.set_faults([])
    done = made.sync()
    assert done.code == 0, done.words
    assert made.bars().equals(made.source(SYMBOLS, FIRST, LAST))


@pytest.mark.slow
def test_a_paused_plan_stops_at_its_next_page_and_sends_nothing_until_it_is_resumed(place):
    made, process = running(place)
    assert made.run("pause", "p").returncode == 0
    stopped = ended(process)
    assert (stopped.code, stopped.state) == (4, "paused"), stopped.words
    sent = made.requests
    assert sent < 400
    held = made.sync()
    assert (held.code, held.state, held.sent) == (4, "paused", 0)
    assert "marketsync resume p" in held.words
    assert made.requests == sent
    assert made.run("resume", "p").returncode == 0
    check_rest(made)


def test_a_cancelled_run_stops_at_its_next_page_and_the_next_one_asks_for_the_rest(place):
    made, process = running(place)
    assert made.run("cancel", "p").returncode == 0
    stopped = ended(process)
    assert (stopped.code, stopped.state) == (4, "cancelled"), stopped.words
    assert made.requests < 400
    check_rest(made)


def test_what_is_fetched_again_is_there_once_and_as_it_is_now(place):
    made = place()
    made.write({**PLAN, "universe": ["AAPL", "IBM"]})
    assert made.sync_here().code == 0
    row = {"symbol": "IBM", "date": date(2005, 6, 1), "open": 1.0, "high": 2.0, "low": 1.0, "close": 1.5, "volume": 7}
    made.replica.update(pl.DataFrame([row]))
    done = made.sync("--refetch")
    assert done.code == 0, done.words
    rows = done.report["rows"]
    assert (rows["inserted"], rows["updated"]) == (0, 1)
    assert rows["fetched"] == rows["unchanged"] + 1
    assert made.bars().equals(made.source(["AAPL", "IBM"], FIRST, LAST))


# ---------------------------------------------------------------- without a request


@pytest.mark.slow
def test_fetching_again_through_quotas_asks_for_everything_once_and_comes_to_an_end(place):
    here = place()
    upstream = {"limits": [{"requests": 4, "per": "3 seconds"}], "tuning": {"threads": 1, "max_wait": "1 second"}}
    here.write(
        {"datasets": ["alpaca.daily_bars"], "universe": ["IBM"], "since": "2010-01-01", "until": "2010-10-31"},
        definition=alpaca_by_month(1000),
        upstream=upstream,
    )
    assert here.sync("--wait").code == 0
    assert here.requests == 10
    process = here.start("--refetch", "--wait")
    try:
        eventually(lambda: process.poll() is not None or here.requests > 20, "the end of the run")
        assert here.requests == 20
    finally:
        process.terminate()
        run = ended(process)
    assert (run.code, run.state) == (0, "completed")
    assert sorted(starts(here.log[10:])) == sorted(starts(here.log[:10]))


@pytest.mark.slow
@pytest.mark.parametrize(("word", "state"), [("cancel", "cancelled"), ("pause", "paused")])
def test_a_run_that_is_stopped_while_it_sleeps_through_a_quota_says_by_whom_and_is_no_longer_waiting(
    place, word, state
):
    here = place()
    upstream = {"limits": [{"requests": 1, "per": "day"}], "tuning": {"threads": 1}}
    here.write(
        {"datasets": ["alpaca.daily_bars"], "universe": ["IBM"], "since": "2010-01-01", "until": "2010-03-31"},
        definition=alpaca_by_month(1000),
        upstream=upstream,
    )
    process = here.start("--wait")
    assert process.stderr is not None
    while "waiting until" not in (line := process.stderr.readline()):
        assert line, "it ended without a word"
    here.run(word, "p")
    run = ended(process)
    assert (run.code, run.state, run.report["resume_at"]) == (4, state, None)
    assert f"{state} by hand" in run.words
    (plan,) = json.loads(here.run("status", "--json").stdout)["plans"]
    assert (plan["last_state"], plan["running"]) == (state, False)
    assert "waiting" not in json.dumps(plan["datasets"]) or word == "pause"


def test_a_store_that_is_added_is_filled_from_its_sibling_without_a_request(place):
    made = place()
    made.write(PLAN)
    assert made.sync_here().code == 0
    before = made.requests
    made.write({**PLAN, "stores": ["default", "second"]}, stores={**made.stores, "second": "parquet://./second"})
    done = made.sync()
    assert (done.code, done.sent, made.requests) == (0, 0, before), done.words
    assert "copied from a sibling store" in done.words
    source = made.source(SYMBOLS, FIRST, LAST)
    assert made.bars("second").equals(source)
    assert made.bars("default").equals(source)


@pytest.mark.slow
def test_what_waits_in_the_spool_is_delivered_although_the_host_has_another_name_now(place, monkeypatch):
    """As a container's is at its next start."""
    made = place()
    made.write(PLAN)
    obstacle = made.folder / "data"
    obstacle.write_text("no folder can be made here")
    monkeypatch.setattr("socket.gethostname", lambda: "first")
    down = made.sync_here()
    assert (down.code, down.report["rows"]["inserted"]) == (1, 0)
    assert len(made.spooled()) == 1
    obstacle.unlink()
    monkeypatch.setattr("socket.gethostname", lambda: "second")
    done = made.sync_here()
    assert (done.code, done.sent) == (0, 0), done.words
    assert made.bars().equals(made.source(SYMBOLS, FIRST, LAST))
    assert made.spooled() == []


@pytest.mark.parametrize(
    "left",
    [
        pytest.param(0, id="nothing", marks=pytest.mark.slow),
        pytest.param(100, id="the head", marks=pytest.mark.slow),
        pytest.param(2000, id="most"),
    ],
)
def test_a_spooled_file_that_was_cut_short_is_asked_again_and_holds_nothing_else_up(place, left):
    here = place()
    plan = {**PLAN, "since": "2010-01-01", "until": "2010-12-31", "segment": {"requests": 1}}
    here.write(plan, definition=alpaca_by_month(1000), stores={"default": "parquet://./data"})
    (here.folder / "data").write_text("where the store's folder should be")
    assert here.sync().code == 1
    (here.folder / "data").unlink()
    before = here.requests
    damaged = max(here.spooled())
    damaged.write_bytes(damaged.read_bytes()[:left])
    run = here.sync()
    assert (run.code, here.requests - before) == (0, 1), run.stderr
    assert "1 segment file is damaged" in run.words
    assert here.bars().equals(here.source(SYMBOLS, date(2010, 1, 1), date(2010, 12, 31)))
    assert not here.spooled()


def test_a_table_that_turns_out_to_be_damaged_when_it_is_judged_is_an_error_of_the_run(place):
    here = place()
    here.write(PLAN)
    assert here.sync().code == 0
    min((here.folder / "data").rglob("*.parquet")).unlink()
    run = here.sync()
    assert (run.code, run.state) == (1, "failed")
    (error,) = run.report["errors"]
    assert (error["dataset"], error["subject"]) == ("alpaca.daily_bars", "default")
    assert "is missing; put the files back from a backup" in error["message"]


def quickstart(folder: Path) -> str:
    """Run `marketsync quickstart`, which must end with 0; return all that it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "cli", "quickstart", "--directory", str(folder)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


NOTHING = "Everything was here already: no request was sent."


@pytest.mark.slow
def test_a_quickstart_that_is_run_again_sends_no_request(tmp_path):
    first = quickstart(tmp_path / "q")
    assert NOTHING not in first
    assert "12,154" in first
    assert NOTHING in quickstart(tmp_path / "q")


def test_a_quickstart_whose_port_is_taken_names_the_port_that_its_configuration_asks(tmp_path):
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            taken.bind(("127.0.0.1", 8740))
            taken.listen()
        except OSError:
            pass  # by another: it is taken either way
        said = quickstart(tmp_path / "q")
    (asked,) = re.findall(r"base_url: http://127\.0\.0\.1:(\d+)", (tmp_path / "q" / "upstream.yml").read_text())
    assert asked != "8740"
    assert f"replica --port {asked} &" in said


@pytest.mark.slow
def test_a_quickstart_leaves_an_upstream_file_that_was_edited_alone_and_says_so(tmp_path):
    config = tmp_path / "q" / "upstream.yml"
    quickstart(tmp_path / "q")
    edited = config.read_text().replace("five: [AAPL, ", "five: [")
    config.write_text(edited)
    said = quickstart(tmp_path / "q")
    assert config.read_text() == edited
    assert f"{config} was edited, and stays as it is" in said
    config.write_text(edited.replace("five: [", "five: [AAPL, ").replace(":8740", ":8999"))
    assert "was edited" not in quickstart(tmp_path / "q")  # another port is our own doing
