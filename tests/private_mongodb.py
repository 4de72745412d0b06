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

STARTS_SECONDS = 60


@contextmanager
def private_mongodb(*, standalone: bool = False) -> Iterator[str]:
    """Start a server and yield its URL, without a database; it asks nobody for a password."""
    import pymongo

    folder = Path(tempfile.mkdtemp(prefix="mongodb-"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "secantus", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--storage-path", str(folder / "data"), "--log-level", "WARNING", *(["--standalone"] * standalone)]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    url = f"mongodb://127.0.0.1:{port}/"
    try:
        with pymongo.MongoClient(url, serverSelectionTimeoutMS=500) as client:
            for left in reversed(range(2 * STARTS_SECONDS)):
                try:
                    client.admin.command("ping")
                    break
                except pymongo.errors.PyMongoError:
                    if not left or process.poll() is not None:
                        raise AssertionError((folder / "log").read_text(errors="replace")) from None
        yield url
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)
