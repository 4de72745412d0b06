"""The provider of the benchmarks: one process on loopback that answers /bars with pages of an invented market.

    python -m benchmarks.page_server --symbols 20 --rows 100000 [--step-minutes 1] [--start 2024-01-01] [--latency-ms 0]

    GET /bars?symbol=SYM00003&limit=1000[&start=..&end=..][&page_token=..]
                  {"data":[{...},...],"next_page_token":"1000"}, the token null on the last page
    GET /stats    requests and rows answered, and the Unix times of the first request and the last answer
    GET /reset    the same, then counts from nothing

It prints its port and serves until its standard input ends. A page costs it about a tenth of a millisecond, far less
than any client needs for it, and no memory beyond one pool of rows. It is benchmark equipment: it speaks just enough
HTTP/1.1 (GET, keep-alive) for clients that behave.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
import sys
import time
from datetime import UTC, datetime
from urllib.parse import parse_qsl

from benchmarks.market import LARGEST_PAGE, Market, Prices

_OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
_BAD = b"HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"


class Answers:
    """What is answered, and the count of it."""

    def __init__(self, market: Market) -> None:
        self.market = market
        self.prices = Prices()
        self.reset()

    def reset(self) -> None:
        """Begins the count anew."""
        self.requests = self.rows = 0
        self.first_request = self.last_answer = 0.0

    def stats(self) -> dict[str, float]:
        """Return the count."""
        return {
            "requests": self.requests,
            "rows": self.rows,
            "first_request": self.first_request,
            "last_answer": self.last_answer,
        }

    def bars(self, query: dict[str, str]) -> bytes:
        """Return the body of one page; ValueError or KeyError for a request that makes no sense."""
        symbol = int(query["symbol"].removeprefix("SYM"))
        if not 0 <= symbol < self.market.symbols:
            raise ValueError(f"no symbol {query['symbol']}")
        limit = min(int(query.get("limit", "1000")), LARGEST_PAGE)
        first = self._row(query["start"]) if "start" in query else 0
        end = self._row(query["end"]) if "end" in query else self.market.rows
        if "page_token" in query:
            first = int(query["page_token"])
        count = max(min(limit, end - first), 0)
        following = b'"%d"' % (first + count) if first + count < end else b"null"
        self.rows += count
        rows = self.prices.page(self.market, symbol, first, count)
        return b'{"data":[' + rows + b'],"next_page_token":' + following + b"}"

    def _row(self, text: str) -> int:
        instant = datetime.fromisoformat(text)
        return self.market.index(instant if instant.tzinfo else instant.replace(tzinfo=UTC))


class Connection(asyncio.Protocol):
    """One client connection."""

    def __init__(self, answers: Answers, latency_seconds: float) -> None:
        self.answers = answers
        self.latency_seconds = latency_seconds
        self.received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        # a page goes into the kernel at once, so that nothing is copied to be sent later
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 << 20)

    def data_received(self, data: bytes) -> None:
        self.received += data
        while b"\r\n\r\n" in self.received:
            head, _, self.received = self.received.partition(b"\r\n\r\n")
            path, _, query = head.split(b" ", 2)[1].decode().partition("?")
            if path != "/bars":
                stats = json.dumps(self.answers.stats()).encode()
                if path == "/reset":
                    self.answers.reset()
                self.transport.write(_OK % len(stats) + stats)
                continue
            if not self.answers.requests:
                self.answers.first_request = time.time()
            self.answers.requests += 1
            if self.latency_seconds:
                asyncio.get_running_loop().call_later(self.latency_seconds, self.answer, query)
            else:
                self.answer(query)

    def answer(self, query: str) -> None:
        """Sends the answer to one request."""
        try:
            body, status = self.answers.bars(dict(parse_qsl(query))), _OK
        except (ValueError, KeyError) as error:
            body, status = json.dumps({"error": str(error)}).encode(), _BAD
        if not self.transport.is_closing():
            self.transport.write(status % len(body) + body)
            self.answers.last_answer = time.time()


async def serve(answers: Answers, latency_seconds: float) -> None:
    """Serves on a free port of the loopback interface, which is printed, until standard input ends."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(answers, latency_seconds), "127.0.0.1", 0, backlog=256)
    print(server.sockets[0].getsockname()[1], flush=True)
    async with server:
        await loop.run_in_executor(None, sys.stdin.read)


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve pages of an invented market on loopback.")
    parser.add_argument("--symbols", type=int, default=20)
    parser.add_argument("--rows", type=int, default=100_000, help="bars a symbol")
    parser.add_argument("--start", default="2024-01-01", help="the UTC day of the first bar")
    parser.add_argument("--step-minutes", type=int, default=1)
    parser.add_argument("--latency-ms", type=float, default=0.0)
    options = parser.parse_args()
    start = datetime.fromisoformat(options.start).replace(tzinfo=UTC)
    market = Market(options.symbols, options.rows, start, options.step_minutes)
    asyncio.run(serve(Answers(market), options.latency_ms / 1000))


if __name__ == "__main__":
    main()
