"""Ctrl-C, as a person presses it: before anything is under way, once while a run asks, and twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from marketsync.errors import ExitCode
from tests.providers.loopback import Loopback, answer

ROOT = Path(__file__).parent.parent
PATIENCE_SECONDS = 60
DEFINITION = """\
provider: acme
base_url: {url}
datasets:
  bars:
    over: {{symbol: {{universe: $plan}}}}
    request: {{path: /bars, query: {{s: $symbol}}, timeout: 60 seconds}}
    schema: {{symbol: {{type: str, value: $symbol}}, name: str}}
    key: [symbol]
"""
UPSTREAM = """\
upstreams: {acme: {definition: ./acme.yml, tuning: {threads: 1}}}
stores: {default: delta://./data}
plans: {bars: {datasets: acme.bars, universe: [A, B, C]}}
"""


class Slow:
    """A provider that holds every answer back until `let_go` is set, and tells when it was asked."""

    def __init__(self) -> None:
        self.server = Loopback()
        self.asked, self.let_go = threading.Event(), threading.Event()
        self.server.routes["/bars"] = self._bars

    def _bars(self, connection, request) -> None:
        self.asked.set()
        self.let_go.wait(PATIENCE_SECONDS)
        connection.sendall(answer(b'[{"name": "one"}]'))


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[Slow]:
    slow = Slow()
    (tmp_path / "acme.yml").write_text(DEFINITION.format(url=slow.server.url))
    (tmp_path / "upstream.yml").write_text(UPSTREAM)
    yield slow
    slow.let_go.set()
    slow.server.close()


def started(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "cli", *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "HOME": str(folder)},
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    try:
        out, said = process.communicate(timeout=PATIENCE_SECONDS)
    finally:
        process.kill()
    return process.returncode, out, said


def until(process: subprocess.Popen[str], words: str) -> None:
    assert process.stderr is not None
    while words not in (line := process.stderr.readline()):
        assert line, "it ended without a word"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_command_that_is_stopped_before_anything_is_under_way_says_so_and_ends_with_4(tmp_path, number):
    # reading a pipe is where it is caught: the pipe opens when the command does, and nothing is ever written
    os.mkfifo(tmp_path / "upstream.yml")
    process = started(tmp_path, "check", "upstream.yml")
    with open(tmp_path / "upstream.yml", "wb"):
        process.send_signal(number)
        assert ended(process) == (int(ExitCode.PAUSED), "", "stopped\n")


@pytest.mark.parametrize(
    "number", [signal.SIGINT, *(pytest.param(each, marks=pytest.mark.slow) for each in (signal.SIGTERM, signal.SIGHUP))]
)
def test_one_signal_ends_a_run_at_its_next_page_with_4_and_what_it_has(tmp_path, slow, number):
    if signal.getsignal(number) is signal.SIG_IGN:
        pytest.skip(f"{number.name} is ignored by whoever started these tests (nohup), and so by what they start")
    process = started(tmp_path, "sync", "--json")
    assert slow.asked.wait(PATIENCE_SECONDS)
    process.send_signal(number)
    until(process, "stopping at the next page")
    slow.let_go.set()
    code, out, _ = ended(process)
    report = json.loads(out)
    assert (code, report["state"], report["rows"]["inserted"]) == (int(ExitCode.PAUSED), "paused", 1)


def test_a_second_signal_ends_it_at_once_with_4_and_a_later_run_goes_on(tmp_path, slow):
    process = started(tmp_path, "sync", "--json")
    assert slow.asked.wait(PATIENCE_SECONDS)
    process.send_signal(signal.SIGINT)
    until(process, "again to stop at once")
    process.send_signal(signal.SIGINT)
    code, out, said = ended(process)
    assert code == int(ExitCode.PAUSED)
    assert said == "stopped at once; what was sealed is kept, and the next run goes on from there\n"
    assert json.loads(out) == {"state": "paused", "errors": [{"message": "stopped by a signal"}]}
    slow.let_go.set()
    code, out, _ = ended(started(tmp_path, "sync", "--json"))
    assert (code, json.loads(out)["rows"]["inserted"]) == (0, 3)


def test_signals_that_come_while_the_object_is_printed_neither_cut_it_short_nor_add_another(tmp_path):
    # nobody reads: the pipe is full, and the command is in the middle of its object
    (tmp_path / "upstream.yml").write_text("plans:\n" + "".join(f"  p{n}: {{since: x}}\n" for n in range(600)))
    process = started(tmp_path, "check", "--json")
    assert process.stdout is not None
    first = os.read(process.stdout.fileno(), 1)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    code, out, _ = ended(process)
    assert len(json.loads(first.decode() + out)["files"][0]["problems"]) > 600
    assert code == int(ExitCode.CONFIGURATION)


def test_a_run_under_nohup_is_not_ended_by_a_closed_terminal(tmp_path, slow):
    process = subprocess.Popen(
        ["nohup", sys.executable, "-m", "cli", "sync", "--json"],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)},
    )
    assert slow.asked.wait(PATIENCE_SECONDS)
    process.send_signal(signal.SIGHUP)
    slow.let_go.set()
    code, out, _ = ended(process)
    assert (code, json.loads(out)["rows"]["inserted"]) == (0, 3)


def test_ending_a_replica_by_hand_is_its_proper_end(tmp_path):
    process = started(tmp_path, "replica", "--port", "0")
    until(process, "Ctrl-C ends it")
    process.send_signal(signal.SIGINT)
    assert ended(process)[0] == 0
