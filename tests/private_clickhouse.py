"""A ClickHouse of the tests' own, over HTTP: chDB behind `clickhouse_front.py`, in a process that is ended with us."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mortal_server import Server, free_port


def clickhouse_client(url: str) -> Any:
    """A client as anybody would open it."""
    import clickhouse_connect

    parts = urlsplit(url)
    return clickhouse_connect.get_client(
        host=parts.hostname, port=parts.port, username=parts.username, password=parts.password or ""
    )


@contextmanager
def private_clickhouse() -> Iterator[str]:
    """Start the front with an empty folder and yield the URL of a store on it."""
    with mortal_clickhouse() as server:
        yield server.url


@contextmanager
def mortal_clickhouse() -> Iterator[Server]:
    """Start a front that can be killed and started again."""
    port = free_port()
    running: list[subprocess.Popen] = []
    with tempfile.TemporaryDirectory(prefix="clickhouse-") as folder:

        def start() -> None:
            front = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("clickhouse_front.py")), folder, str(port)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            running.append(front)
            assert front.stdout is not None
            assert front.stdout.readline().strip(), "the front of chDB did not start"

        def kill() -> None:
            running[-1].kill()
            running[-1].communicate()

        try:
            start()
            yield Server(f"clickhouse://127.0.0.1:{port}/", start, kill)
        finally:
            front = running[-1]
            if front.poll() is None:
                try:
                    front.communicate(timeout=30)
                except subprocess.TimeoutExpired:
                    kill()
