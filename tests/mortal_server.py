"""A server of the tests' own that can die in the middle of its work, and come back on its port with its data."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Server:
    """A server that runs; `kill` is kill -9 of all of its processes, `start` returns when it answers again."""

    url: str
    start: Callable[[], None]
    kill: Callable[[], None]


def free_port() -> int:
    """Return a port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def kill_family(process: int) -> None:
    """kill -9 of a process and its children, and wait until they are gone."""
    os.kill(process, signal.SIGSTOP)  # so that it has no further child
    everybody = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
    family = [process, *(each for each in everybody if _state(each)[1:2] == [str(process)])]
    for each in family:
        with suppress(ProcessLookupError):
            os.kill(each, signal.SIGKILL)
    while any(_state(each)[:1] not in ([], ["Z"]) for each in family):
        time.sleep(0.01)


def _state(process: int) -> list[str]:
    """Return the state of a process, its parent and so on; nothing when there is no such process."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
