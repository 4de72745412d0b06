"""Three processes, one account, a real server that takes its time: its own log shows no window above its limit."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

LIMIT, WINDOW_SECONDS = 20, 2.0
SLOWEST_SECONDS = 0.3

PROCESS = f"""
import sys, threading
from pathlib import Path
from marketsync.clock import SystemClock
from marketsync.definition import Limit
from providers.limits import Limiter
from providers.transport import HttpRequest, HttpTransport

state, url, threads, name = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
limits = [Limit(requests={LIMIT}, per="{int(WINDOW_SECONDS)} seconds"), Limit(requests=65, per="8 seconds")]
limiter, transport = Limiter(state, "acme", "main", limits, SystemClock()), HttpTransport(SystemClock())

def ask():
    while True:
        transport.send(HttpRequest("GET", f"{{url}}/{{name}}", timeout_seconds=3, dataset="daily"), limiter)

for _ in range(threads):
    threading.Thread(target=ask, daemon=True).start()
sys.stdin.read()  # until the test closes it
limiter.close()
"""


class CountingServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        self.received: list[tuple[float, str]] = []
        self.sent: list[float] = []
        self.chance = random.Random(7)
        super().__init__(("127.0.0.1", 0), Counting)

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing of processes that end with a request under way."""


class Counting(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: CountingServer

    def do_GET(self) -> None:
        self.server.received.append((time.monotonic(), self.path))
        time.sleep(self.server.chance.random() * SLOWEST_SECONDS)
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.server.sent.append(time.monotonic())
        self.wfile.write(b"{}")

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def server():
    running = CountingServer()
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    yield running
    running.shutdown()
    running.server_close()


def most_in(stamps: list[float], span: float) -> int:
    stamps, most, first = sorted(stamps), 0, 0
    for last, at in enumerate(stamps):
        while stamps[first] < at - span:
            first += 1
        most = max(most, last - first + 1)
    return most


@pytest.mark.slow
def test_three_processes_and_a_killed_one_never_exceed_a_window_in_the_servers_log(server, tmp_path):
    def start(name: str) -> subprocess.Popen:
        url = f"http://127.0.0.1:{server.server_port}"
        command = [sys.executable, "-c", PROCESS, str(tmp_path), url, "4", name]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def by_process(name: str) -> int:
        return sum(path == f"/{name}" for _, path in list(server.received))

    def wait_for(requests: int, *names: str) -> None:
        began = time.monotonic()
        while len(server.received) < requests or min(by_process(name) for name in names) < 5:
            assert time.monotonic() - began < 120, f"{len(server.received)} requests only"
            time.sleep(0.02)

    processes = {name: start(name) for name in ("a", "b", "c")}
    try:
        wait_for(50, "a", "b", "c")
        processes["b"].send_signal(signal.SIGKILL)  # with requests under way and answers that nobody records
        processes["b"].wait()
        processes["d"] = start("d")
        wait_for(130, "d")
    finally:
        errors = {}
        for name, process in processes.items():
            if process.poll() is None:
                process.stdin.close()
            process.wait(60)
            errors[name] = process.stderr.read()
            for pipe in (process.stdin, process.stderr):
                pipe.close()
    assert [error for error in errors.values() if error] == []
    assert [processes[name].returncode for name in "acd"] == [0, 0, 0]
    received = [at for at, _ in server.received]
    for stamps in (received, server.sent):
        assert most_in(stamps, WINDOW_SECONDS) <= LIMIT
        assert most_in(stamps, 8.0) <= 65
    # and the limit was really used (by everybody, or this test had not come so far)
    assert most_in(received, WINDOW_SECONDS) >= 0.75 * LIMIT


def test_processes_of_one_host_share_a_place_at_once(server, tmp_path):
    program = PROCESS.replace("Limit(requests=65", "Limit(concurrent=2), Limit(requests=65")
    under_way, most, guard = [0], [0], threading.Lock()

    class Watching(Counting):
        def do_GET(self) -> None:
            with guard:
                under_way[0] += 1
                most[0] = max(most[0], under_way[0])
            try:
                time.sleep(0.05)
                self.server.received.append((time.monotonic(), self.path))
            finally:
                with guard:
                    under_way[0] -= 1
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

    server.RequestHandlerClass = Watching
    url = f"http://127.0.0.1:{server.server_port}"
    processes = [
        subprocess.Popen([sys.executable, "-c", program, str(tmp_path), url, "3", name], stdin=subprocess.PIPE)
        for name in ("a", "b")
    ]
    try:
        began = time.monotonic()
        while len(server.received) < 30:
            assert time.monotonic() - began < 120
            time.sleep(0.02)
    finally:
        for process in processes:
            process.stdin.close()
            process.wait(60)
    assert most == [2]
    assert {path for _, path in server.received} == {"/a", "/b"}
