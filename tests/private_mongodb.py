"""A stand-in for MongoDB of the tests' own: the server of the `secantusdb` wheel, on a free loopback port, with a
temporary folder for its data, ended by the process that started it. It says that it is a replica set of one, and has
transactions; `standalone` makes it say that it is a server by itself.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pymongo
import pymongo.errors
from mortal_server import Server, free_port

STARTS_SECONDS = 60


@contextmanager
def private_mongodb(*, standalone: bool = False, password: str = "") -> Iterator[str]:
    """Start a server and yield its URL, without a database; with a password it lets in the user `tester` alone."""
    with mortal_mongodb(*(["--standalone"] if standalone else []), password=password) as server:
        yield server.url


@contextmanager
def mortal_mongodb(*options: str, password: str = "") -> Iterator[Server]:
    """Start a server that can be killed and started again; `options` are further ones of its command line."""
    folder = Path(tempfile.mkdtemp(prefix="mongodb-"))
    port = free_port()
    command = [sys.executable, "-m", "secantus", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--storage-path", str(folder / "data"), "--log-level", "WARNING", *options]
    running: list[subprocess.Popen] = []

    def start() -> None:
        with (folder / "log").open("ab") as log:
            running.append(subprocess.Popen(command, cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log))
        _wait(running[-1], port, folder / "log")

    def end() -> None:
        running[-1].terminate()
        try:
            running[-1].wait(10)
        except subprocess.TimeoutExpired:
            kill()

    def kill() -> None:
        running[-1].kill()
        running[-1].wait()

    try:
        start()
        if password:
            with pymongo.MongoClient("127.0.0.1", port) as client:
                client.admin.command("createUser", "tester", pwd=password, roles=["root"])
            end()
            command.append("--auth")
            start()
        yield Server(f"mongodb://127.0.0.1:{port}/", start, kill)
    finally:
        if running:
            end()
        shutil.rmtree(folder, ignore_errors=True)


def _wait(process: subprocess.Popen, port: int, log: Path) -> None:
    """Return when the server answers."""
    with pymongo.MongoClient("127.0.0.1", port, serverSelectionTimeoutMS=500) as client:
        for left in reversed(range(2 * STARTS_SECONDS)):
            try:
                client.admin.command("ping")
                return
            except pymongo.errors.PyMongoError:
                if not left or process.poll() is not None:
                    raise AssertionError(log.read_text(errors="replace")) from None
