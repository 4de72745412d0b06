"""ClickHouse's HTTP interface in front of chDB, so that the way over the network can be tried with the real engine.

    python clickhouse_front.py FOLDER PORT   says on stdout that it listens (loopback), and serves until its stdin ends

Statements come in the body, or in `query` with the rows of an INSERT as the body; other parameters are settings. One
statement at a time; no users, sessions, compression or external data.
"""

from __future__ import annotations

import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import clickhouse_connect
from clickhouse_connect.driver.exceptions import ClickHouseError

# parameters of the request, and what is said of the transport and not of the statement
NOT_SETTINGS = re.compile(
    r"query|database|query_id|session_\w+|default_format|client_protocol_version|buffer_size|wait_end_of_query|"
    r"compress|decompress|enable_http_compression|\w+_progress_\w+|role|quota_key"
)
INSERT = re.compile(
    rb"(?is)\s*INSERT\s+INTO\s+(?P<table>.+?)\s*(?:\((?P<columns>.*)\))?\s*FORMAT\s+(?P<format>\w+)\s*$"
)
FORMAT = re.compile(r"(?is)^(.*)\bFORMAT\s+(\w+)\s*$")


def main(folder: str, port: int) -> None:
    writing = clickhouse_connect.get_client(interface="chdb", path=folder)
    # a setting of one statement stays with chDB's connection when it is the one that forbids to change settings
    reading = clickhouse_connect.get_client(interface="chdb", path=folder, settings={"readonly": 2})
    applied: dict[Any, dict[str, str]] = {writing: {}, reading: {}}
    one_at_a_time = threading.Lock()

    class Front(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # head and body in one packet: the second of two waits for the first to be acknowledged

        def do_GET(self) -> None:
            self.answer(200, b"Ok.\n")

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Transfer-Encoding") == "chunked":
                body = self.chunks()
            asked = dict(parse_qsl(urlsplit(self.path).query, keep_blank_values=True))
            settings = {name: value for name, value in asked.items() if not NOT_SETTINGS.fullmatch(name)}
            try:
                with one_at_a_time:
                    answer = self.run(asked.get("query"), body, settings)
            except ClickHouseError as error:
                found = re.search(r"Code: (\d+)", str(error))
                self.answer(500, str(error).encode(), {"X-ClickHouse-Exception-Code": found[1] if found else "1"})
            else:
                self.answer(200, answer)

        def run(self, query: str | None, body: bytes, settings: dict[str, str]) -> bytes:
            client = reading if settings.pop("readonly", "0") != "0" else writing
            for name, value in settings.items():
                # every request of a client brings its settings along, and to put them back each time takes long
                if applied[client].get(name) != value:
                    client.command(f"SET {name} = '{value}'")
                    applied[client][name] = value
            said, rows = (query.encode(), body) if query is not None else (body, b"")
            head, newline, rest = said.partition(b"\n")
            # the first line first: a look through all of the rows takes time that grows with their square
            insert = (INSERT.fullmatch(head) if newline else None) or INSERT.fullmatch(said)
            if insert:
                columns = re.findall(r"`((?:[^`\\]|\\.)*)`", (insert["columns"] or b"").decode())
                client.raw_insert(
                    insert["table"].decode(),
                    column_names=[re.sub(r"\\(.)", r"\1", name) for name in columns] or None,
                    insert_block=rows or rest,
                    fmt=insert["format"].decode(),
                )
                return b""
            text = said.decode()
            formatted = FORMAT.match(text)
            kind = formatted[2] if formatted else self.headers.get("X-ClickHouse-Format") or "TabSeparated"
            return bytes(client.raw_query(formatted[1] if formatted else text, fmt=kind))

        def chunks(self) -> bytes:
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def answer(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", port), Front)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_address[1], flush=True)
    sys.stdin.read()
    server.shutdown()
    reading.close()
    writing.close()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
