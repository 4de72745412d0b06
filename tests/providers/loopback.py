"""A server on a real socket that answers exactly the bytes a test tells it to, as slowly and as wrongly as told."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Received:
    """One request as the server saw it."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    connection: int
    at: float = field(default_factory=time.monotonic)


def answer(body: bytes = b"{}", status: str = "200 OK", **headers: str) -> bytes:
    """A whole answer; header names are written with _ for -."""
    lines = {"Content-Length": str(len(body)), **{name.replace("_", "-"): text for name, text in headers.items()}}
    head = "".join(f"{name}: {text}\r\n" for name, text in lines.items())
    return f"HTTP/1.1 {status}\r\n{head}\r\n".encode("latin-1") + body


class Loopback:
    """`routes[path]` is called with (socket, request); it sends what it likes and returns False to hang up."""

    def __init__(self) -> None:
        self.routes: dict[str, Callable[[socket.socket, Received], bool | None]] = {}
        self.received: list[Received] = []
        self.trickled = 0
        self._closing = threading.Event()
        self._open: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        number = 0
        while not self._closing.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._open.add(connection)
            number += 1
            threading.Thread(target=self._serve, args=(connection, number), daemon=True).start()

    def _serve(self, connection: socket.socket, number: int) -> None:
        with connection, connection.makefile("rb") as reader:
            try:
                while (line := reader.readline()).count(b" ") >= 2:
                    method, path, _ = line.decode("latin-1").split(" ", 2)
                    headers = {}
                    while (header := reader.readline()).strip():
                        name, _, text = header.decode("latin-1").partition(":")
                        headers[name.strip().lower()] = text.strip()
                    body = reader.read(int(headers.get("content-length", 0)))
                    request = Received(method, path, headers, body, number)
                    self.received.append(request)
                    route = self.routes.get(path.partition("?")[0])
                    if route is None:
                        connection.sendall(answer(b"no route", "404 Not Found"))
                    elif route(connection, request) is False:
                        return
            except OSError:
                return
            finally:
                self._open.discard(connection)

    def reset(self, connection: socket.socket) -> bool:
        """Hang up with a TCP reset."""
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.shutdown(socket.SHUT_RD)
        connection.close()
        return False

    def wait(self, seconds: float) -> None:
        """Be slow, but not beyond the end of the test."""
        self._closing.wait(seconds)

    def close(self) -> None:
        self._closing.set()
        self._listener.close()
        for connection in list(self._open):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue
