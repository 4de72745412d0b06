"""A provider whose pages never end: its unit is given up and told of, the others are fetched."""

from __future__ import annotations

import itertools
import json

import pytest

from marketsync.report import RunState
from tasks import fetch
from tasks.sync import sync
from tasks.workspace import close_workspaces
from tests.providers.loopback import Loopback, answer

DEFINITION = """\
provider: acme
base_url: {url}
datasets:
  rows:
    over: {{symbol: {{universe: $plan}}}}
    request: {{path: /rows, query: {{s: $symbol}}}}
    page: {{token: next, send: cursor}}
    response: {{rows: rows}}
    schema: {{symbol: {{type: str, value: $symbol}}, id: i64}}
    key: [symbol, id]
"""
UPSTREAM = """\
upstreams: {acme: {definition: ./acme.yml, tuning: {threads: 1}}}
stores: {default: delta://./data}
plans: {p: {datasets: [acme.rows], universe: [A, B]}}
"""
MOST = 60  # requests after which the provider ends the chain itself, so that a run without a limit ends too


@pytest.fixture
def server():
    running = Loopback()
    yield running
    close_workspaces()
    running.close()


def test_a_chain_of_empty_pages_without_end_is_given_up_and_holds_nothing_else_up(tmp_path, server, monkeypatch):
    monkeypatch.setattr(fetch, "EMPTY_PAGES", 20)
    number = itertools.count(1)

    def rows(connection, request) -> None:
        if "s=B" in request.path:
            body = {"rows": [{"id": 1}], "next": None}
        else:
            at = next(number)
            body = {"rows": [], "next": f"c{at}" if at < MOST else None}
        connection.sendall(answer(json.dumps(body).encode()))

    server.routes["/rows"] = rows
    (tmp_path / "acme.yml").write_text(DEFINITION.format(url=server.url))
    (tmp_path / "upstream.yml").write_text(UPSTREAM)
    (report,) = sync(tmp_path / "upstream.yml")
    assert report.state is RunState.FAILED
    assert next(number) == 21
    assert (report.work.failed, report.work.done, report.rows.inserted) == (1, 1, 1)
    assert "20 pages in a row held no row" in report.errors[0].message
