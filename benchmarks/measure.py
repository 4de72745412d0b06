"""Runs one program from start to end and says what it cost: wall clock, processor time, peak memory.

Everything counts: the interpreter's start, the imports, and every process that the program itself waited for. What is
run, and what is asked of the figures, is in `workloads.py`. This module and `run.py` import the standard library only:
Linux counts the memory of the process that starts a program as the program's own peak, so the starter stays small.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT_SECONDS = 1800  # nothing measured takes as long; what does has hung


@dataclass(frozen=True)
class Cost:
    """What one run of a program cost, and how it ended."""

    exit_code: int
    wall_seconds: float
    cpu_seconds: float  # user and system
    peak_mb: float
    load: float  # the machine's load average of one minute, before the run
    output: str  # standard output


def run(command: Sequence[str | Path], cwd: Path, log: Path) -> Cost:
    """Runs a program to its end; its standard error goes to the end of `log`."""
    load = os.getloadavg()[0]
    output = log.with_suffix(".out")
    with log.open("ab") as errors, output.open("wb") as out:
        began = time.perf_counter()
        arguments = [str(part) for part in command]
        try:
            child = subprocess.Popen(arguments, cwd=cwd, stdout=out, stderr=errors, env=environment())
        except FileNotFoundError as error:
            errors.write(f"{error}\n".encode())
            return Cost(127, 0.0, 0.0, 0.0, load, "")
        watchdog = threading.Timer(TIMEOUT_SECONDS, child.kill)
        watchdog.daemon = True  # an interrupted benchmark waits for nobody
        watchdog.start()
        _, status, usage = os.wait4(child.pid, 0)
        wall = time.perf_counter() - began
        watchdog.cancel()
    child.returncode = os.waitstatus_to_exitcode(status)
    return Cost(
        child.returncode,
        wall,
        usage.ru_utime + usage.ru_stime,
        usage.ru_maxrss / 1024,
        load,
        output.read_text(errors="replace"),
    )


def environment() -> dict[str, str]:
    """Return the environment of every measured program: nothing reports to anybody, loopback is not proxied."""
    quiet = {"DO_NOT_TRACK": "1", "NO_PROXY": "127.0.0.1"}
    return {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"} | quiet


@dataclass(frozen=True)
class PageServer:
    """A running page server."""

    url: str

    def stats(self, *, reset: bool = False) -> dict[str, float]:
        """Return what it has answered since the last reset: requests, rows, first_request, last_answer (Unix times)."""
        with urllib.request.urlopen(f"{self.url}/{'reset' if reset else 'stats'}", timeout=30) as answer:
            return json.load(answer)


@contextmanager
def page_server(arguments: Sequence[str]) -> Iterator[PageServer]:
    """Starts a page server in a process of its own, and stops it."""
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.page_server", *arguments],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        port = process.stdout.readline().strip()
        if not port:
            raise RuntimeError(f"The page server did not start: exit code {process.wait()}.")
        yield PageServer(f"http://127.0.0.1:{port}")
    finally:
        process.stdin.close()
        process.wait(timeout=30)
