"""The `marketsync` command in the process of the tests: what it does, prints and ends with, without the second that a
process of its own takes to start. What a process alone has (signals, closed streams, what it imports, its death) is
tested with one."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import chdir, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

from cli.main import main
from tasks.workspace import close_workspaces


def run(folder: Path, *arguments: str, environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess:
    """Run `marketsync ARGUMENTS` in a folder, with more variables in its environment; return what a process would."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    close_workspaces()
    code: object = 0
    with chdir(folder), _process(arguments, environment or {}), redirect_stdout(out), redirect_stderr(err):
        try:
            main()
        except SystemExit as ended:
            code = ended.code or 0
        finally:
            close_workspaces()
    said, told = (stream.buffer.getvalue().decode() for stream in (out, err))
    assert isinstance(code, int), code
    assert "Traceback" not in said + told, said + told
    return subprocess.CompletedProcess(arguments, code, said, told)


@contextmanager
def _process(arguments: tuple[str, ...], environment: Mapping[str, str]) -> Iterator[None]:
    """Give what a process of its own would have: arguments, environment; its signals stay those of the tests."""
    known = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
    with (
        mock.patch.dict(os.environ, {**known, "COLUMNS": "200", **environment}, clear=True),
        mock.patch.object(sys, "argv", ["marketsync", *arguments]),
        mock.patch.object(signal, "signal"),
    ):
        yield
