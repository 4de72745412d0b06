"""A stand-in for MongoDB of the tests' own: the server of the `secantusdb` wheel, on a free loopback port, with a
temporary folder for its data, ended by the process that started it. It says that it is a replica set of one, and has
transactions; `standalone` makes it say that it is a server by itself.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pymongo
import pymongo.errors

STARTS_SECONDS = 60


@contextmanager
def private_mongodb(*, standalone: bool = False, password: str = "") -> Iterator[str]:
    """Start a server and yield its URL, without a database; with a password it lets in the user `tester` alone."""
    folder = Path(tempfile.mkdtemp(prefix="mongodb-"))
    options = ["--standalone"] if standalone else []
    try:
        if password:
            with _started(folder, options) as client:
                client.admin.command("createUser", "tester", pwd=password, roles=["root"])
            options.append("--auth")
        with _started(folder, options) as client:
            yield f"mongodb://{client.address[0]}:{client.address[1]}/"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _started(folder: Path, options: list[str]) -> Iterator[pymongo.MongoClient]:
    """Yield a client of a server that answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "secantus", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--storage-path", str(folder / "data"), "--log-level", "WARNING", *options]
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(command, cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        with pymongo.MongoClient("127.0.0.1", port, serverSelectionTimeoutMS=500) as client:
            for left in reversed(range(2 * STARTS_SECONDS)):
                try:
                    client.admin.command("ping")
                    break
                except pymongo.errors.PyMongoError:
                    if not left or process.poll() is not None:
                        raise AssertionError((folder / "log").read_text(errors="replace")) from None
            yield client
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
