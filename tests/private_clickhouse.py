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
    with tempfile.TemporaryDirectory(prefix="clickhouse-") as folder:
        front = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("clickhouse_front.py")), folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert front.stdin is not None
        assert front.stdout is not None
        try:
            port = front.stdout.readline().strip()
            assert port, "the front of chDB did not start"
            yield f"clickhouse://127.0.0.1:{port}/"
        finally:
            front.stdin.close()
            try:
                front.wait(30)
            except subprocess.TimeoutExpired:
                front.kill()
                front.wait()
