"""The log: what an entry holds, the file, and the proofs that are read out of it."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from providers.replica import journal
from providers.replica.journal import most_at_once, repeated, violations


def test_an_entry_tells_when_who_what_and_how_it_ended(start, ask):
    replica = start(delay=(0.02, 0.05))
    answer = ask(replica).alpaca(symbols="AAPL,IBM", limit=5)
    (entry,) = replica.log
    assert entry["sent"] < entry["received"] <= entry["answered"]
    assert entry["answered"] - entry["sent"] >= 0.02
    assert entry == {
        **{name: entry[name] for name in ("sent", "received", "answered")},
        "n": 1,
        "provider": "alpaca",
        "account": "REPLICA-KEY",
        "request": {
            "method": "GET",
            "path": "/v2/stocks/bars",
            "params": {
                "symbols": "AAPL,IBM",
                "timeframe": "1Day",
                "start": "2013-01-01",
                "end": "2013-03-01",
                "limit": "5",
            },
        },
        "status": 200,
        "rows": 5,
        "bytes": len(answer.content),
        "fault": None,
        "refused": None,
        "verdict": "rows",
    }


def test_the_file_holds_whole_lines_from_many_threads_and_no_credential(start, ask, tmp_path):
    path = tmp_path / "deep" / "replica.jsonl"
    replica = start(log=path, limits="unlimited")

    def work(_):
        asker = ask(replica)
        for _ in range(10):
            asker.alpaca()
            asker.tushare()
            asker.nasdaq(ticker="FB", api_key="replica-key")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    text = path.read_text(encoding="utf-8")
    entries = [json.loads(line) for line in text.splitlines()]
    assert sorted(e["n"] for e in entries) == list(range(1, 121))
    assert {e["account"] for e in entries} == {"REPL…", "repl…"}
    for secret in ("REPLICA-KEY", "replica-secret", "replica-token", "replica-key"):
        assert secret not in text
    assert {e["n"]: e["verdict"] for e in journal.read(path)} == {e["n"]: e["verdict"] for e in replica.log}


def test_a_line_is_in_the_file_when_the_answer_arrives(start, ask, tmp_path):
    path = tmp_path / "log"
    asker = ask(start(log=path))
    for n in range(1, 6):
        asker.alpaca()
        assert len(journal.read(path)) == n


def test_a_file_is_appended_to_by_the_next_replica(start, ask, tmp_path):
    path = tmp_path / "log"
    for _ in range(2):
        ask(start(log=path)).alpaca()
    assert [e["n"] for e in journal.read(path)] == [1, 1]


def entry(t, **more):
    usual = {"provider": "alpaca", "account": "REPLICA-KEY", "verdict": "rows", "request": {"params": {"t": t}}}
    return {"sent": t - 0.1, "received": t, **usual, **more}


@pytest.mark.parametrize(
    ("times", "limit", "window", "count"),
    [
        ([0, 1, 2, 3], 2, 1.0, 0),  # exactly a window apart is not in one window
        ([0, 0.5, 0.9], 2, 1.0, 1),
        ([0, 0.5, 0.9, 0.95], 2, 1.0, 2),
        ([0.9, 0, 0.5], 2, 1.0, 1),  # in any order
        ([0, 0.5, 1.0, 1.5], 2, 1.0, 0),
        ([], 1, 1.0, 0),
    ],
)
def test_violations_count_requests_that_overfill_the_window_behind_them(times, limit, window, count):
    assert violations([entry(t) for t in times], limit, window) == count


def test_violations_can_look_at_one_provider_one_account_and_the_sending(start):
    log = [entry(0), entry(0.1, provider="nasdaq_data_link"), entry(0.2, account="other"), entry(0.3, sent=5.0)]
    assert violations(log, 1, 1.0) == 3
    assert violations(log, 1, 1.0, provider="alpaca") == 2
    assert violations(log, 1, 1.0, provider="alpaca", account="REPLICA-KEY") == 1
    assert violations(log, 1, 1.0, by="sent", provider="alpaca", account="REPLICA-KEY") == 0
    assert violations([entry(0, account="REPL…"), entry(0)], 1, 1.0, account="REPLICA-KEY") == 1
    with pytest.raises(ValueError, match="answered"):
        violations(log, 1, 1.0, by="answered")


def test_repeated_names_requests_asked_more_than_once(start, ask):
    replica = start(faults=[{"fault": "server_error", "when": {"request": 1}}])
    asker = ask(replica)
    for symbol in ("AAPL", "IBM", "AAPL", "FB", "FB", "FB"):
        asker.alpaca(symbols=symbol)
    assert [(r["params"]["symbols"], times) for r, times in repeated(replica.log)] == [("FB", 3), ("AAPL", 2)]
    paid = repeated(replica.log, verdicts=("rows", "empty"))
    assert [(r["params"]["symbols"], times) for r, times in paid] == [("FB", 3)]


def test_most_at_once_counts_requests_from_sent_to_answered(start, ask):
    log = [{**entry(t), "sent": t, "answered": end} for t, end in ((0, 2), (1, 3), (2, 4), (5, None), (6, 7))]
    assert most_at_once(log) == 2
    assert most_at_once(log, provider="tushare") == 0
    replica = start(delay=(0.05, 0.05))
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda _: ask(replica).alpaca(), range(3)))
    assert most_at_once(replica.log) == 3
