"""The server as a whole: data that changes while it runs, publication, control from outside, its own process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, date, datetime
from pathlib import Path

import polars as pl
import pytest
import requests

from marketsync.clock import ManualClock
from marketsync.errors import ConfigurationError
from providers.replica import Replica

ROOT = Path(__file__).parents[2]


def closes(asker, **query):
    return {b["t"][:10]: b["c"] for b in asker.alpaca(**query).json()["bars"].get(query.get("symbols", "AAPL"), [])}


def test_a_restated_row_is_served_from_then_on_by_every_provider(start, ask, source):
    replica = start()
    asker = ask(replica)
    before = [asker.any(p).content for p in ("alpaca", "tushare", "nasdaq_data_link")]
    last = source.filter((pl.col("symbol") == "AAPL") & (pl.col("date") == pl.date(2013, 3, 1)))
    replica.update(last.with_columns(close=pl.lit(123.25)))
    after = [asker.any(p).content for p in ("alpaca", "tushare", "nasdaq_data_link")]
    assert all(b"123.25" in a and b"123.25" not in b for a, b in zip(after, before, strict=True))


def test_new_symbols_and_later_sessions_can_be_added_and_rows_removed(start, ask, source):
    replica = start()
    asker = ask(replica)
    more = source.filter(pl.col("symbol") == "IBM").tail(1)
    replica.update(more.with_columns(symbol=pl.lit("NEW")))
    replica.update(more.with_columns(date=pl.lit(date(2013, 3, 4))))
    assert list(closes(asker, symbols="NEW")) == ["2013-03-01"]
    assert list(closes(asker, symbols="IBM", start="2013-03-01", end="2013-03-09")) == ["2013-03-01", "2013-03-04"]
    replica.remove(pl.col("symbol") == "NEW")
    assert closes(asker, symbols="NEW") == {}


def test_rows_after_until_are_not_published(start, ask):
    replica = start(until="2013-02-26")
    asker = ask(replica)
    assert max(closes(asker)) == "2013-02-26"
    assert asker.tushare(trade_date="20130227").json()["data"]["items"] == []
    assert asker.nasdaq(ticker="IBM", **{"date.gte": "2013-02-27"}).json()["datatable"]["data"] == []
    replica.until = date(2013, 2, 27)
    assert max(closes(asker)) == "2013-02-27"
    replica.until = None
    assert max(closes(asker)) == "2013-03-01"


def test_until_clock_publishes_sessions_as_the_clock_advances(start, ask):
    replica = start(until="clock", clock=ManualClock(datetime(2013, 2, 27, 20, 0, tzinfo=UTC)))  # 15:00 in New York
    asker = ask(replica)
    assert max(closes(asker)) == "2013-02-26"
    replica.advance(2 * 3600)
    assert max(closes(asker)) == "2013-02-27"
    replica.advance(24 * 3600)
    assert max(closes(asker)) == "2013-02-28"


def test_without_start_and_end_alpaca_answers_for_the_present_day(start, ask):
    replica = start(clock=ManualClock(datetime(2013, 2, 27, 23, 0, tzinfo=UTC)))
    asker = ask(replica)
    assert list(closes(asker, start=None, end=None)) == ["2013-02-27"]
    replica.advance(86_400)
    assert list(closes(asker, start=None, end=None)) == ["2013-02-28"]


def test_generated_rows_cannot_be_changed_and_say_so(start, source):
    with pytest.raises(ConfigurationError, match="generated"):
        start(data="generated:100x5").update(source.head(1))


def test_delays_repeat_with_the_seed():
    def drawn(seed):
        replica = Replica(delay=(0, 1), seed=seed)
        return [replica._random.uniform(*replica.delay) for _ in range(5)]

    assert drawn(5) == drawn(5) != drawn(6)


def test_it_stops_and_starts_again_on_the_same_port(start, ask):
    replica = start()
    url = replica.url
    ask(replica).alpaca()
    replica.stop()
    replica.stop()
    with pytest.raises(requests.exceptions.ConnectionError):
        ask(replica).alpaca()
    assert replica.start() == url
    assert ask(replica).alpaca().status_code == 200
    assert len(replica.log) == 2


def test_stopping_ends_a_request_that_hangs(start, ask):
    replica = start(faults=[{"fault": "timeout"}])
    ended = threading.Event()

    def wait():
        with pytest.raises(requests.exceptions.ConnectionError):
            ask(replica).alpaca()
        ended.set()

    thread = threading.Thread(target=wait)
    thread.start()
    while not replica.log:
        time.sleep(0.01)
    replica.stop()
    thread.join(10)
    assert ended.is_set()


def test_many_connections_at_once_are_all_served(start, ask):
    replica = start(limits="unlimited", delay=(0, 0.01))

    def work(n):
        asker = ask(replica)
        return [asker.any(p).status_code for p in ("alpaca", "tushare", "nasdaq_data_link") * 5]

    with ThreadPoolExecutor(16) as pool:
        assert {status for found in pool.map(work, range(16)) for status in found} == {200}
    assert sorted(e["n"] for e in replica.log) == list(range(1, 16 * 15 + 1))


def test_a_path_that_nobody_has_is_not_found_and_logged(start):
    replica = start()
    assert requests.get(f"{replica.url}/favicon.ico", timeout=5).status_code == 404
    assert (replica.log[0]["provider"], replica.log[0]["verdict"]) == ("", "drop")


def test_pages_are_kept_within_the_memory_allowed(start, ask):
    replica = start(cache_bytes=50_000)
    asker = ask(replica)
    for year in range(2000, 2013):
        asker.alpaca(start=f"{year}-01-01", end=f"{year}-12-31")
    assert 0 < replica._pages._used <= 50_000


# ------------------------------------------------------------------------------------------------------- from outside


def test_the_clock_is_advanced_and_set_from_outside(start, ask):
    replica = start(
        limits={"tushare": [{"requests": 1, "per": "day"}]}, clock=ManualClock(datetime(2024, 3, 5, tzinfo=UTC))
    )
    asker = ask(replica)
    assert [asker.tushare().json()["code"] for _ in range(2)] == [0, 40203]
    before = replica.now()
    assert asker.control("clock", {"advance": 86_400}).json() == {"now": before + 86_400}
    assert asker.tushare().json()["code"] == 0
    asker.control("clock", {"set": "2030-01-01T00:00:00Z"})
    assert replica.now() == datetime(2030, 1, 1, tzinfo=UTC).timestamp()


def test_faults_until_delay_and_rows_are_set_from_outside(start, ask):
    replica = start()
    asker = ask(replica)
    asker.control("faults", [{"fault": "server_error", "times": 1}])
    asker.control("faults", {"add": [{"fault": "bad_gateway", "times": 1}]})
    assert [asker.alpaca().status_code for _ in range(3)] == [500, 502, 200]
    asker.control("until", {"until": "2013-02-26"})
    assert max(closes(asker)) == "2013-02-26"
    row = {"symbol": "AAPL", "date": "2013-02-26", "open": 1.5, "high": 9, "low": 1, "close": 2.5, "volume": 7}
    assert asker.control("rows", [row]).status_code == 200
    assert closes(asker)["2013-02-26"] == 2.5
    asker.control("delay", {"delay": [0.01, 0.02]})
    assert replica.delay == (0.01, 0.02)
    status = asker.session.get(f"{replica.url}/_replica/status", timeout=5).json()
    assert (status["symbols"], status["until"], status["rules"]) == (5, "2013-02-26", 2)
    log = asker.session.get(f"{replica.url}/_replica/log", params={"from": 3}, timeout=5).json()
    assert [e["n"] for e in log] == [e["n"] for e in replica.log][2:]


@pytest.mark.parametrize(
    ("verb", "content"),
    [
        ("faults", [{"fault": "nonsense"}]),
        ("until", {"until": "soon"}),
        ("delay", {"delay": [2, 1]}),
        ("clock", {}),
        ("x", {}),
    ],
)
def test_a_wrong_command_from_outside_changes_nothing_and_says_why(start, ask, verb, content):
    replica = start()
    answer = ask(replica).control(verb, content)
    assert (answer.status_code, bool(answer.json()["message"])) == (400, True)
    assert ask(replica).alpaca().status_code == 200


# --------------------------------------------------------------------------------------------------------- on its own


def process(*arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-m", "providers.replica", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment,
    )


def test_as_a_process_it_prints_its_url_serves_logs_and_ends_on_sigterm(ask, tmp_path):
    settings = tmp_path / "replica.yml"
    settings.write_text(
        "data: generated:1000x10\nlimits: {alpaca: [{requests: 2, per: day}]}\n"
        "accounts: {alpaca: {MY-OWN-KEY: {secret: s}}}\nfaults: [{fault: empty, when: {request: 1}}]\n"
    )
    log = tmp_path / "log.jsonl"
    running = process("--faults", str(settings), "--log", str(log), "--seed", "4")
    try:
        url = running.stdout.readline().strip()
        keys = {"APCA-API-KEY-ID": "MY-OWN-KEY", "APCA-API-SECRET-KEY": "s"}
        query = {"symbols": "GAAAA", "timeframe": "1Day", "start": "2000-01-01", "end": "2001-01-01"}
        sizes = []
        for _ in range(3):
            answer = requests.get(f"{url}/v2/stocks/bars", params=query, headers=keys, timeout=20)
            sizes.append((answer.status_code, len(answer.json().get("bars", {}).get("GAAAA", []))))
        assert sizes == [(200, 0), (200, 100), (429, 0)]
    finally:
        running.send_signal(signal.SIGTERM)
        _, complaints = running.communicate(timeout=20)
    assert (running.returncode, complaints) == (0, "")
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    assert [e["verdict"] for e in entries] == ["empty", "rows", "quota"]
    assert entries[0]["account"] == "MY-O…"


@pytest.mark.parametrize(
    ("arguments", "says"), [(["--data", "nonsense"], "nonsense"), (["--faults", "no/such/file"], "no/such/file")]
)
def test_a_wrong_option_ends_with_code_2_and_one_sentence(arguments, says):
    running = process(*arguments)
    _, complaints = running.communicate(timeout=30)
    assert running.returncode == 2
    assert says in complaints
    assert "Traceback" not in complaints


def test_options_given_win_over_those_in_the_file(start, tmp_path):
    file = tmp_path / "replica.yml"
    file.write_text("data: generated:100x5\ndelay: [0.5, 0.6]\nuntil: 2000-02-01\n")
    replica = start(faults=file, delay=(0, 0))
    assert (len(replica.market.symbols), replica.delay, replica.until) == (5, (0, 0), date(2000, 2, 1))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"delay": (2, 1)}, "delay"),
        ({"until": "soon"}, "until"),
        ({"limits": "gold"}, "gold"),
        ({"limits": {"polygon": "free"}}, "polygon"),
        ({"accounts": {"alpaca": {"K": {"colour": 1}}}}, "colour"),
    ],
)
def test_a_wrong_option_is_a_configuration_error(options, says):
    with pytest.raises(ConfigurationError, match=says):
        Replica(**options)


def test_a_port_in_use_is_a_configuration_error(start):
    with pytest.raises(ConfigurationError, match="give another"):
        Replica(port=start().port).start()
