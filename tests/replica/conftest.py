"""What the replica's tests share: replicas that get stopped, small requests, and the rows of the source itself."""

from __future__ import annotations

import gzip
import importlib.util
import json
from pathlib import Path

import polars as pl
import pytest
import requests

from providers.replica.server import Replica

KEYS = {"APCA-API-KEY-ID": "REPLICA-KEY", "APCA-API-SECRET-KEY": "replica-secret"}


@pytest.fixture
def start():
    """Start a replica with any options; all are stopped at the end of the test."""
    running: list[Replica] = []

    def started(**options) -> Replica:
        replica = Replica(**options)
        running.append(replica)
        replica.start()
        return replica

    yield started
    for replica in running:
        replica.stop()


@pytest.fixture(scope="session")
def source() -> pl.DataFrame:
    """The packaged stocks read without the replica: symbol, date, open, high, low, close, volume, adj_close."""
    found = importlib.util.find_spec("bokeh_sampledata")
    with gzip.open(Path(next(iter(found.submodule_search_locations))) / "_data" / "stocks.csv.gz") as file:
        rows = pl.read_csv(file.read(), try_parse_dates=True)
    rows.columns = ["symbol", "date", "open", "high", "low", "close", "volume", "adj_close"]
    return rows.sort("symbol", "date")


@pytest.fixture(scope="session")
def recorded() -> Path:
    """The folder of recorded provider traffic beside the project, where there is one."""
    folder = Path(__file__).parents[3] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no recorded traffic beside the project (../shared/data)")
    return folder


class Asker:
    """Plain requests to one replica, each provider in its own form."""

    def __init__(self, replica: Replica, patience: float = 20) -> None:
        self.replica = replica
        self.patience = patience
        self.session = requests.Session()

    def alpaca(self, path: str = "/v2/stocks/bars", keys: dict | None = None, **query) -> requests.Response:
        usual = {"symbols": "AAPL", "timeframe": "1Day", "start": "2013-01-01", "end": "2013-03-01"}
        query = {k: v for k, v in {**usual, **query}.items() if v is not None}
        return self.session.get(self.replica.url + path, params=query, headers=keys or KEYS, timeout=self.patience)

    def tushare(
        self, api: str = "daily", token: str = "replica-token", fields: str = "", path: str = "/", **params
    ) -> requests.Response:
        if api == "daily" and not params:
            params = {"ts_code": "AAPL.US", "start_date": "20130101"}
        body = {"api_name": api, "token": token, "params": params, "fields": fields}
        return self.session.post(self.replica.url + path, json=body, timeout=self.patience)

    def nasdaq(self, path: str = "/api/v3/datatables/WIKI/PRICES.json", key: str | None = "replica-key", **query):
        query = query or {"ticker": "AAPL", "date.gte": "2013-01-01"}
        headers = {"x-api-token": key} if key else {}
        return self.session.get(self.replica.url + path, params=query, headers=headers, timeout=self.patience)

    def any(self, provider: str) -> requests.Response:
        """A small request that has rows."""
        return getattr(self, provider.removesuffix("_data_link"))()

    def control(self, verb: str, content: object) -> requests.Response:
        return self.session.post(f"{self.replica.url}/_replica/{verb}", data=json.dumps(content), timeout=self.patience)


@pytest.fixture
def ask():
    return Asker


PROVIDERS = ["alpaca", "tushare", "nasdaq_data_link"]


@pytest.fixture(params=PROVIDERS)
def provider(request) -> str:
    return request.param
