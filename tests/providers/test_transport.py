"""What becomes of one request over a real socket, however the other side behaves."""

from __future__ import annotations

import contextlib
import gzip
import logging
import os
import shutil
import socket
import ssl
import subprocess
import threading
import time
import zlib
from datetime import UTC, datetime, timedelta

import pytest
from loopback import Loopback, answer

from marketsync.clock import ManualClock, SystemClock
from marketsync.definition import Limit
from marketsync.errors import ConfigurationError, Interrupted, WaitingForQuota
from providers.limits import Limiter
from providers.redaction import hide
from providers.transport import HttpRequest, HttpTransport, Trouble

SECRET = "s3cr3t/with+signs"


@pytest.fixture
def server():
    running = Loopback()
    yield running
    running.close()


@pytest.fixture
def limiter(tmp_path):
    with Limiter(
        tmp_path, "acme", "main", [Limit(requests=1000, per="hour"), Limit(concurrent=50)], SystemClock()
    ) as it:
        yield it


@pytest.fixture
def transport():
    it = HttpTransport(SystemClock(), max_body_bytes=4 << 20)
    yield it
    it.close()


def sends(data: bytes):
    return lambda connection, request: connection.sendall(data)


def used(limiter: Limiter) -> dict[str, int]:
    return {state.kind.value: state.used for state in limiter.state()}


# ---------------------------------------------------------------- answers


def test_an_answer_has_status_headers_in_any_case_body_and_times(server, transport, limiter):
    server.routes["/rows"] = sends(answer(b'{"rows": []}', "429 Too Many", Retry_After="7"))
    before = datetime.now(UTC)
    got = transport.send(HttpRequest("GET", f"{server.url}/rows?a=1"), limiter)
    assert (got.status, got.body, got.trouble, got.message) == (429, b'{"rows": []}', None, "")
    assert got.headers["retry-after"] == got.headers["Retry-After"] == "7"
    assert before <= got.sent_at <= got.answered_at <= datetime.now(UTC)
    assert used(limiter) == {"window": 1, "concurrent": 0}


def test_a_body_method_headers_and_weight_go_out_as_given(server, transport, limiter):
    server.routes["/ask"] = sends(answer())
    request = HttpRequest("POST", f"{server.url}/ask", {"X-Key": SECRET, "user-agent": "me"}, b'{"x": 1}', weight=3)
    transport.send(request, limiter)
    (received,) = server.received
    assert (received.method, received.body, received.headers["x-key"]) == ("POST", b'{"x": 1}', SECRET)
    assert (received.headers["user-agent"], received.headers["content-length"]) == ("me", "8")
    assert used(limiter)["window"] == 3


def test_a_connection_is_kept_and_used_again_by_any_thread(server, transport, limiter):
    server.routes["/rows"] = sends(answer(b"x" * 1000))
    for _ in range(3):
        transport.send(HttpRequest("GET", f"{server.url}/rows"), limiter)
    thread = threading.Thread(target=transport.send, args=(HttpRequest("GET", f"{server.url}/rows"), limiter))
    thread.start()
    thread.join()
    assert {received.connection for received in server.received} == {1}


def test_threads_get_their_own_answers(server, transport, limiter):
    def echo(connection, request):
        time.sleep(0.002)
        connection.sendall(answer(request.path.encode() * 100))

    for number in range(8):
        server.routes[f"/{number}"] = echo
    wrong = []

    def ask(number):
        for _ in range(20):
            got = transport.send(HttpRequest("GET", f"{server.url}/{number}"), limiter)
            if got.body != f"/{number}".encode() * 100:
                wrong.append(got)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(server.received) == 160
    assert len({received.connection for received in server.received}) <= 8
    assert used(limiter) == {"window": 160, "concurrent": 0}


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "identity"])
def test_packed_answers_are_unpacked(server, transport, limiter, encoding):
    rows = b'{"close": 1.5}' * 5000
    packed = {"gzip": gzip.compress(rows), "deflate": zlib.compress(rows), "identity": rows}[encoding]
    server.routes["/rows"] = sends(answer(packed, Content_Encoding=encoding))
    got = transport.send(HttpRequest("GET", f"{server.url}/rows"), limiter)
    assert (got.body, got.trouble) == (rows, None)
    assert "gzip" in server.received[0].headers["accept-encoding"]


def chunked(*pieces: bytes, end: bool = True, **headers: str) -> bytes:
    head = answer(b"", Transfer_Encoding="chunked", **headers).replace(b"Content-Length: 0\r\n", b"")
    return head + b"".join(b"%x\r\n%s\r\n" % (len(p), p) for p in pieces) + (b"0\r\n\r\n" if end else b"")


def test_chunked_answers_are_joined_and_the_connection_is_kept(server, transport, limiter):
    server.routes["/rows"] = sends(chunked(b"abc", b"d" * 70_000, gzip.compress(b"z")))
    for _ in range(2):
        got = transport.send(HttpRequest("GET", f"{server.url}/rows"), limiter)
        assert (got.body, got.trouble) == (b"abc" + b"d" * 70_000 + gzip.compress(b"z"), None)
    assert server.received[1].connection == 1


def test_an_answer_without_length_ends_with_its_connection(server, transport, limiter):
    def until_closed(connection, request):
        connection.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nall of it")
        return False

    server.routes["/rows"] = until_closed
    assert transport.send(HttpRequest("GET", f"{server.url}/rows"), limiter).body == b"all of it"


def test_an_answer_without_body_is_an_answer(server, transport, limiter):
    server.routes["/none"] = sends(b"HTTP/1.1 204 No Content\r\n\r\n")
    got = transport.send(HttpRequest("GET", f"{server.url}/none"), limiter)
    assert (got.status, got.body, got.trouble) == (204, b"", None)


def test_a_large_answer_comes_whole(server, transport, limiter):
    body = bytes(range(256)) * (15 << 10)  # 3.75 MiB
    server.routes["/rows"] = sends(answer(body))
    assert transport.send(HttpRequest("GET", f"{server.url}/rows"), limiter).body == body


def test_an_address_with_other_letters_is_encoded(server, transport, limiter):
    server.routes["/%E6%97%A5"] = sends(answer(b"day"))
    assert transport.send(HttpRequest("GET", f"{server.url}/日"), limiter).body == b"day"


# ---------------------------------------------------------------- trouble


def test_fewer_bytes_than_announced_are_truncated(server, transport, limiter):
    def half(connection, request):
        connection.sendall(answer(b"x" * 1000)[:-400])
        return False

    server.routes["/rows"] = half
    got = transport.send(HttpRequest("GET", f"{server.url}/rows", label="rows"), limiter)
    assert (got.trouble, got.body, got.status) == (Trouble.TRUNCATED, b"", 200)
    assert "rows ended before all of its bytes" in got.message
    assert used(limiter) == {"window": 1, "concurrent": 0}


@pytest.mark.parametrize(
    "data",
    [
        chunked(b"abc", b"def", end=False),
        answer(gzip.compress(b"z" * 1000)[:-12], Content_Encoding="gzip"),
        chunked(gzip.compress(b"z" * 100_000)[:-12], Content_Encoding="gzip"),
        b"HTTP/1.1 200 OK\r\nServer: acme\r\nContent-Le",
    ],
    ids=["no last chunk", "a packed stream without its end", "the same in chunks", "cut in its headers"],
)
def test_a_body_that_stops_early_in_other_ways_is_truncated_too(server, transport, limiter, data):
    server.routes["/rows"] = lambda connection, request: bool(connection.sendall(data))  # False: hangs up
    got = transport.send(HttpRequest("GET", f"{server.url}/rows"), limiter)
    assert (got.trouble, got.body) == (Trouble.TRUNCATED, b"")


def test_a_body_that_is_not_packed_as_announced_is_malformed(server, transport, limiter):
    server.routes["/rows"] = sends(answer(b"plain text", Content_Encoding="gzip"))
    got = transport.send(HttpRequest("GET", f"{server.url}/rows"), limiter)
    assert (got.trouble, got.body) == (Trouble.MALFORMED_ENCODING, b"")


def test_a_reset_is_lost_connection(server, transport, limiter):
    server.routes["/rows"] = lambda connection, request: server.reset(connection)
    got = transport.send(HttpRequest("GET", f"{server.url}/rows", label="rows"), limiter)
    assert (got.trouble, got.status) == (Trouble.CONNECTION, 0)
    assert got.message.startswith("The connection for rows failed: ")
    assert used(limiter) == {"window": 1, "concurrent": 0}


def test_hanging_up_and_nonsense_are_lost_connections(server, transport, limiter):
    server.routes["/gone"] = lambda connection, request: False
    server.routes["/nonsense"] = sends(b"+OK POP3 ready\r\n\r\n")
    for path in ("/gone", "/nonsense"):
        got = transport.send(HttpRequest("GET", server.url + path), limiter)
        assert got.trouble is Trouble.CONNECTION
    assert transport.send(HttpRequest("GET", f"{server.url}/404"), limiter).status == 404


def test_a_refused_connection_gives_its_room_back(transport, limiter):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    got = transport.send(HttpRequest("GET", f"http://127.0.0.1:{port}/rows"), limiter)
    assert got.trouble is Trouble.CONNECTION
    assert "refused" in got.message
    assert used(limiter) == {"window": 0, "concurrent": 0}


def test_a_host_that_does_not_exist_is_a_lost_connection(transport, limiter):
    got = transport.send(HttpRequest("GET", "http://no-such-host.invalid/rows"), limiter)
    assert got.trouble is Trouble.CONNECTION


def serve_once(listener: socket.socket, data: bytes) -> None:
    with contextlib.suppress(OSError):
        connection, _ = listener.accept()
        with connection:
            connection.recv(4096)
            connection.sendall(data)


def test_tls_that_is_none_is_a_lost_connection(transport, limiter):
    with socket.create_server(("127.0.0.1", 0)) as plain:
        threading.Thread(target=serve_once, args=(plain, b"HTTP/1.1 400 Bad Request\r\n\r\n"), daemon=True).start()
        got = transport.send(HttpRequest("GET", f"https://127.0.0.1:{plain.getsockname()[1]}/rows"), limiter)
    assert (got.trouble, got.status) == (Trouble.CONNECTION, 0)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes its certificate with the openssl command")
def test_certificates_are_verified_with_the_bundle_of_the_environment(tmp_path, limiter, monkeypatch):
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = (
        "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=127.0.0.1 -addext subjectAltName=IP:127.0.0.1"
    )
    subprocess.run([*command.split(), "-keyout", key, "-out", certificate], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    answers = []
    for bundle in (None, certificate):
        if bundle:
            monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(bundle))
        with context.wrap_socket(socket.create_server(("127.0.0.1", 0)), server_side=True) as listener:
            threading.Thread(target=serve_once, args=(listener, answer(b"over TLS")), daemon=True).start()
            transport = HttpTransport(SystemClock())
            request = HttpRequest("GET", f"https://127.0.0.1:{listener.getsockname()[1]}/rows", label="rows")
            answers.append(transport.send(request, limiter))
            transport.close()
    refused, accepted = answers
    assert refused.trouble is Trouble.CONNECTION
    assert "The certificate of the server for rows is not trusted (self" in refused.message
    assert used(limiter)["window"] == 1  # the first was never sent
    assert (accepted.body, accepted.trouble) == (b"over TLS", None)


def silent(server):
    return lambda connection, request: server.wait(60)


def trickling(server, start: bytes):
    def trickle(connection, request):
        connection.sendall(start)
        for _ in range(600):
            connection.sendall(b"x")
            server.trickled += 1
            server.wait(0.1)

    return trickle


@pytest.mark.parametrize(
    "how", ["silent", "a trickling body", "a trickling body without end", "a trickling chunk", "a trickling header"]
)
def test_an_answer_that_is_not_whole_by_its_deadline_is_a_time_out(server, transport, limiter, how):
    server.routes["/slow"] = {
        "silent": silent(server),
        "a trickling body": trickling(server, answer(b"x" * 600)[:-600]),
        "a trickling body without end": trickling(server, b"HTTP/1.1 200 OK\r\n\r\n"),
        "a trickling chunk": trickling(server, chunked(end=False) + b"258\r\n"),
        "a trickling header": trickling(server, b"HTTP/1.1 200 OK\r\nX-Slow: "),
    }[how]
    got = transport.send(HttpRequest("GET", f"{server.url}/slow", timeout_seconds=0.7, label="slow rows"), limiter)
    assert got.trouble is Trouble.TIMEOUT
    assert got.message == "No whole answer to slow rows came within 0.7 s; it is asked again."
    assert server.trickled < 600  # it was cut off, not waited for to the end
    assert used(limiter)["window"] == 1


def test_after_a_time_out_the_connection_is_not_used_again(server, transport, limiter):
    server.routes["/slow"] = silent(server)
    server.routes["/rows"] = sends(answer(b"right"))
    transport.send(HttpRequest("GET", f"{server.url}/slow", timeout_seconds=0.3), limiter)
    got = transport.send(HttpRequest("GET", f"{server.url}/rows"), limiter)
    assert (got.body, server.received[1].connection) == (b"right", 2)


def test_a_deadline_cuts_off_its_own_request_only(server, transport, limiter):
    def slowly(connection, request):
        server.wait(1.0)
        connection.sendall(answer(b"late but whole"))

    server.routes["/slow"], server.routes["/patient"] = silent(server), slowly
    answers = {}

    def ask(path, seconds):
        answers[path] = transport.send(HttpRequest("GET", server.url + path, timeout_seconds=seconds), limiter)

    threads = [threading.Thread(target=ask, args=of) for of in (("/slow", 0.3), ("/patient", 30))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers["/slow"].trouble is Trouble.TIMEOUT
    assert answers["/patient"].body == b"late but whole"


@pytest.mark.parametrize("how", ["announced", "chunked", "packed", "packed and chunked", "without length"])
def test_more_bytes_than_the_bound_are_not_kept(server, transport, limiter, how):
    zeros = bytes(5 << 20)
    data = {
        "announced": answer(zeros),
        "chunked": chunked(*[bytes(1 << 20)] * 5),
        "packed": answer(gzip.compress(zeros), Content_Encoding="gzip"),
        "packed and chunked": chunked(gzip.compress(zeros), Content_Encoding="gzip"),
        "without length": b"HTTP/1.1 200 OK\r\n\r\n" + zeros,
    }[how]
    server.routes["/rows"] = lambda connection, request: bool(connection.sendall(data))
    got = transport.send(HttpRequest("GET", f"{server.url}/rows", label="rows"), limiter)
    assert (got.trouble, got.body) == (Trouble.TOO_LARGE, b"")
    assert not got.trouble.passing
    assert "rows is larger than the bound" in got.message


def test_a_forked_child_opens_connections_of_its_own(server, transport, limiter):
    server.routes["/rows"] = sends(answer(b"rows"))
    transport.send(HttpRequest("GET", f"{server.url}/rows"), limiter)
    child = os.fork()
    if child == 0:
        got = transport.send(HttpRequest("GET", f"{server.url}/rows", timeout_seconds=10), limiter)
        os._exit(0 if got.body == b"rows" else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert transport.send(HttpRequest("GET", f"{server.url}/rows"), limiter).body == b"rows"
    assert [received.connection for received in server.received] == [1, 2, 1]
    assert used(limiter)["window"] == 3


# ---------------------------------------------------------------- redirects


def test_a_redirect_on_the_same_host_is_followed_and_every_step_is_counted(server, transport, limiter):
    server.routes["/old"] = sends(answer(b"", "301 Moved", Location="/new?x=1"))
    server.routes["/new"] = sends(answer(b"here"))
    got = transport.send(HttpRequest("GET", f"{server.url}/old", {"X-Key": SECRET}), limiter)
    assert got.body == b"here"
    assert [received.headers["x-key"] for received in server.received] == [SECRET, SECRET]
    assert used(limiter)["window"] == 2


@pytest.mark.parametrize(("status", "method", "body"), [(303, "GET", b""), (302, "GET", b""), (307, "POST", b"{}")])
def test_a_redirected_post_keeps_or_loses_its_body_as_http_says(server, transport, limiter, status, method, body):
    server.routes["/old"] = sends(answer(b"", f"{status} Moved", Location=f"{server.url}/new"))
    server.routes["/new"] = sends(answer())
    transport.send(HttpRequest("POST", f"{server.url}/old", body=b"{}"), limiter)
    assert (server.received[1].method, server.received[1].body) == (method, body)


@pytest.mark.parametrize("form", ["{scheme}://{host}/x", "//{host}/x", "{scheme}://user:pw@{host}/x"])
def test_a_redirect_to_another_host_is_not_followed(server, transport, limiter, form):
    foreign = Loopback()
    try:
        location = form.format(scheme="http", host=f"127.0.0.1:{foreign.port}")
        server.routes["/old"] = sends(answer(b"secret page", "302 Found", Location=location))
        got = transport.send(HttpRequest("GET", f"{server.url}/old?token={SECRET}", label="old"), limiter)
        assert foreign.received == []
        assert (got.trouble, got.status, got.body) == (Trouble.REDIRECT, 302, b"")
        assert f"127.0.0.1:{foreign.port}" in got.message
        assert "pw@" not in got.message
        assert not got.trouble.passing
    finally:
        foreign.close()


@pytest.mark.parametrize("location", ["ftp://127.0.0.1/x", "http://[bad/x", "http://127.0.0.1:port/"])
def test_a_redirect_to_no_address_is_not_followed(server, transport, limiter, location):
    server.routes["/old"] = sends(answer(b"", "302 Found", Location=location))
    assert transport.send(HttpRequest("GET", f"{server.url}/old"), limiter).trouble is Trouble.REDIRECT


def test_redirects_in_circles_end(server, transport, limiter):
    server.routes["/round"] = sends(answer(b"", "302 Found", Location="/round"))
    assert transport.send(HttpRequest("GET", f"{server.url}/round"), limiter).trouble is Trouble.REDIRECT
    assert len(server.received) == 6


def test_a_redirect_without_address_is_an_answer(server, transport, limiter):
    server.routes["/odd"] = sends(answer(b"choose", "300 Multiple Choices"))
    server.routes["/bare"] = sends(answer(b"where?", "302 Found"))
    for path, body in (("/odd", b"choose"), ("/bare", b"where?")):
        assert transport.send(HttpRequest("GET", server.url + path), limiter).body == body


# ---------------------------------------------------------------- limits


def test_a_request_waits_for_its_limits_before_it_is_sent(server, tmp_path, transport):
    server.routes["/rows"] = sends(answer())
    with Limiter(tmp_path, "acme", "main", [Limit(requests=1, per="300 ms")], SystemClock()) as limiter:
        for _ in range(3):
            transport.send(HttpRequest("GET", f"{server.url}/rows"), limiter)
    gaps = [later.at - earlier.at for earlier, later in zip(server.received, server.received[1:], strict=False)]
    assert min(gaps) >= 0.3


def test_what_the_limiter_raises_is_raised_and_nothing_is_sent(server, tmp_path, transport):
    with Limiter(tmp_path, "acme", "main", [Limit(requests=1, per="hour")], SystemClock()) as limiter:
        wake = threading.Event()
        wake.set()
        with pytest.raises(Interrupted):
            transport.send(HttpRequest("GET", f"{server.url}/rows"), limiter, wake=wake)
        limiter.reserve("").answered()
        with pytest.raises(WaitingForQuota):
            transport.send(HttpRequest("GET", f"{server.url}/rows"), limiter, max_wait_seconds=1)
    assert server.received == []


def test_the_reservation_is_in_the_book_while_the_request_is_under_way(server, tmp_path, transport):
    limits = [Limit(requests=5, per="hour")]
    seen = []

    def look(connection, request):
        with Limiter(tmp_path, "acme", "main", limits, SystemClock()) as other:
            seen.extend(other.bucket.book._execute("SELECT dataset, weight, answered_ms FROM reservation").fetchall())
        connection.sendall(answer())

    server.routes["/rows"] = look
    with Limiter(tmp_path, "acme", "main", limits, SystemClock()) as limiter:
        transport.send(HttpRequest("GET", f"{server.url}/rows", dataset="daily", weight=2), limiter)
    assert seen == [("daily", 2, None)]


def test_a_reservation_that_ran_out_before_sending_is_a_time_out(server, tmp_path, transport):
    start = datetime(2026, 3, 4, tzinfo=UTC)

    class Sleepy(ManualClock):
        """A machine that sleeps between the reservation and the sending."""

        def timestamp(self):
            now = super().timestamp()
            self.advance(timedelta(seconds=20))
            return now

    with Limiter(tmp_path, "acme", "main", [Limit(requests=5, per="hour")], Sleepy(start)) as limiter:
        got = transport.send(HttpRequest("GET", f"{server.url}/rows", timeout_seconds=5), limiter)
    assert got.trouble is Trouble.TIMEOUT
    assert server.received == []


# ---------------------------------------------------------------- secrets, environment


def test_no_secret_is_in_a_message_a_representation_or_a_log(server, transport, limiter, caplog):
    caplog.set_level(logging.DEBUG)
    caplog.set_level(logging.DEBUG, "urllib3")  # which the command line, run in this process, keeps quiet
    hide([SECRET])
    server.routes["/ok"] = sends(answer())
    server.routes["/echo"] = lambda connection, request: bool(
        connection.sendall(f"NOT HTTP {request.path} {request.headers}\r\n\r\n".encode())
    )
    request = HttpRequest(
        "GET", f"{server.url}/ok?token={SECRET}&x=1", {"Authorization": f"Bearer {SECRET}"}, label="ok"
    )
    shown = [repr(request), repr(transport.send(request, limiter))]
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    for url in (f"{server.url}/echo?token={SECRET}", f"http://127.0.0.1:{port}/{SECRET}?apikey={SECRET}"):
        got = transport.send(HttpRequest("GET", url, {"X-Key": SECRET}), limiter)
        assert got.trouble is Trouble.CONNECTION
        shown.append(repr(got))
    everything = "\n".join(shown) + caplog.text
    assert "urllib3" in caplog.text
    for spelling in (SECRET, "s3cr3t%2Fwith%2Bsigns", "s3cr3t/with%2Bsigns", "with+signs"):
        assert spelling not in everything


def test_a_header_with_a_line_break_is_told_by_its_name_and_never_sent(server, transport, limiter):
    for text in (f"{SECRET}\n", "日本"):
        with pytest.raises(ConfigurationError, match="The header X-Key of rows") as raised:
            transport.send(HttpRequest("GET", f"{server.url}/rows", {"X-Key": text}, label="rows"), limiter)
        assert SECRET not in str(raised.value)
    assert server.received == []


def test_the_proxy_of_the_environment_is_used(server, transport, limiter, monkeypatch):
    monkeypatch.setenv("http_proxy", server.url)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    server.routes["http://data.example/rows"] = sends(answer(b"through the proxy"))
    assert transport.send(HttpRequest("GET", "http://data.example/rows"), limiter).body == b"through the proxy"
    server.routes["http://data.example/slow"] = trickling(server, b"HTTP/1.1 200 OK\r\nX-Slow: ")
    slow = HttpRequest("GET", "http://data.example/slow", timeout_seconds=0.5)
    assert transport.send(slow, limiter).trouble is Trouble.TIMEOUT


def test_cookies_are_not_kept(server, transport, limiter):
    server.routes["/rows"] = sends(answer(Set_Cookie="session=1; Path=/"))
    for _ in range(2):
        transport.send(HttpRequest("GET", f"{server.url}/rows"), limiter)
    assert "cookie" not in server.received[1].headers
