"""The providers' own clients, reading every row of the source through the replica: what proves that it is faithful.

They are among the test requirements; a client that is not installed is skipped by name.
"""

from __future__ import annotations

import zipfile
from datetime import UTC, datetime

import polars as pl
import pytest

SYMBOLS = ["AAPL", "FB", "GOOG", "IBM", "MSFT"]
PRICES = ["open", "high", "low", "close"]


def same_prices(got: dict[str, list], want: pl.DataFrame) -> None:
    for column in PRICES:
        assert got[column] == want[column].to_list()


def test_alpaca_py_reads_every_bar_through_two_pages(start, source):
    pytest.importorskip("alpaca", reason="alpaca-py is not installed: see requirements/test.in")
    from alpaca.data.historical import StockHistoricalDataClient
    from alpaca.data.requests import StockBarsRequest
    from alpaca.data.timeframe import TimeFrame

    replica = start()
    client = StockHistoricalDataClient("REPLICA-KEY", "replica-secret", url_override=replica.url)
    asked = StockBarsRequest(
        symbol_or_symbols=SYMBOLS,
        timeframe=TimeFrame.Day,
        start=datetime(2000, 1, 1, tzinfo=UTC),
        end=datetime(2013, 12, 31, tzinfo=UTC),
    )
    bars = [bar for symbol in SYMBOLS for bar in client.get_stock_bars(asked).data[symbol]]
    assert [(b.symbol, b.timestamp.date()) for b in bars] == source.select("symbol", "date").rows()
    same_prices({c: [getattr(b, c) for b in bars] for c in PRICES}, source)
    assert [int(b.volume) for b in bars] == source["volume"].to_list()
    assert [e["rows"] for e in replica.log[:2]] == [10_000, 2_154]


def test_alpaca_py_retries_when_it_was_too_frequent_and_raises_the_message(start):
    pytest.importorskip("alpaca", reason="alpaca-py is not installed: see requirements/test.in")
    from alpaca.common.exceptions import APIError
    from alpaca.data.historical import StockHistoricalDataClient
    from alpaca.data.requests import StockBarsRequest
    from alpaca.data.timeframe import TimeFrame

    replica = start(
        faults=[{"fault": "too_frequent", "when": {"request": 1}}, {"fault": "no_permission", "when": {"request": 3}}]
    )
    client = StockHistoricalDataClient("REPLICA-KEY", "replica-secret", url_override=replica.url)
    client._retry_wait = 0
    asked = StockBarsRequest(
        symbol_or_symbols="FB",
        timeframe=TimeFrame.Day,
        start=datetime(2013, 1, 1, tzinfo=UTC),
        end=datetime(2013, 2, 1, tzinfo=UTC),
    )
    assert len(client.get_stock_bars(asked).data["FB"]) == 21
    with pytest.raises(APIError, match="subscription does not permit"):
        client.get_stock_bars(asked)
    assert [e["verdict"] for e in replica.log] == ["cool_down", "rows", "stop_dataset"]


def tushare_client(replica, token="replica-token"):
    tushare = pytest.importorskip("tushare", reason="tushare is not installed: see requirements/test.in")
    client = tushare.pro_api(token)
    client._DataApi__http_url = replica.url
    return client


def test_tushare_reads_every_bar_by_offset(start, source):
    client = tushare_client(start())
    parts = []
    while not parts or len(parts[-1]) == 6000:
        parts.append(client.daily(ts_code=",".join(f"{s}.US" for s in SYMBOLS), offset=sum(map(len, parts))))
    columns = {c: [v for part in parts for v in part[c].tolist()] for c in parts[0].columns}
    got = pl.DataFrame({"symbol": columns["ts_code"], "day": columns["trade_date"], "n": range(len(columns["vol"]))})
    order = got.sort("symbol", "day")["n"].to_list()
    assert got.sort("symbol", "day").select("symbol", "day").rows() == [
        (f"{s}.US", f"{d:%Y%m%d}") for s, d in source.select("symbol", "date").rows()
    ]
    same_prices({c: [columns[c][n] for n in order] for c in PRICES}, source)
    assert [round(columns["vol"][n] * 100) for n in order] == source["volume"].to_list()


def test_tushare_reads_the_calendar_and_raises_the_message(start):
    replica = start()
    client = tushare_client(replica)
    days = client.trade_cal(exchange="", start_date="20121224", end_date="20121226")
    assert days["is_open"].tolist() == [1, 0, 1]
    assert client.stock_basic()["symbol"].tolist() == SYMBOLS
    with pytest.raises(Exception, match="token不对"):
        tushare_client(replica, "guess").daily(ts_code="FB.US")
    replica.set_faults([{"fault": "day_quota", "limit": 5}])
    with pytest.raises(Exception, match="每天最多访问该接口5次"):
        client.daily(ts_code="FB.US")


@pytest.fixture
def link(monkeypatch):
    """nasdaq-data-link, pointed at a replica; its settings are global and are put back."""
    client = pytest.importorskip("nasdaqdatalink", reason="nasdaq-data-link is not installed: see requirements/test.in")

    def pointed(replica, key="replica-key"):
        monkeypatch.setattr(client.ApiConfig, "api_base", f"{replica.url}/api/v3")
        monkeypatch.setattr(client.ApiConfig, "api_key", key)
        monkeypatch.setattr(client.ApiConfig, "use_retries", False)
        return client

    return pointed


def test_nasdaq_data_link_reads_every_row_by_cursor(start, link, source):
    replica = start()
    rows = link(replica).get_table("WIKI/PRICES", ticker=SYMBOLS, paginate=True, qopts={"per_page": 5000})
    assert rows["ticker"].tolist() == source["symbol"].to_list()
    assert [d.date() for d in rows["date"]] == source["date"].to_list()
    same_prices({c: rows[c].tolist() for c in PRICES}, source)
    assert rows["adj_close"].tolist() == source["adj_close"].to_list()
    assert rows["volume"].tolist() == source["volume"].cast(pl.Float64).to_list()
    assert [e["rows"] for e in replica.log] == [5000, 5000, 2154]


def test_nasdaq_data_link_posts_when_the_filter_is_long(start, link, source):
    replica = start()
    tickers = SYMBOLS + [f"NONE{n:04}" for n in range(1000)]
    rows = link(replica).get_table(
        "WIKI/PRICES", ticker=tickers, date={"gte": "2013-02-28"}, qopts={"columns": ["ticker", "close"]}
    )
    assert replica.log[0]["request"]["method"] == "POST"
    want = source.filter(pl.col("date") >= pl.date(2013, 2, 28))
    assert rows["close"].tolist() == want["close"].to_list()


def test_nasdaq_data_link_waits_for_the_export_and_unpacks_it(start, link, source, tmp_path, monkeypatch):
    client = link(start(export_polls=2))
    from nasdaqdatalink.model.datatable import Datatable

    monkeypatch.setattr(Datatable, "WAIT_GENERATION_INTERVAL", 0.05)
    client.export_table("WIKI/PRICES", ticker="FB", filename=str(tmp_path / "export.zip"))
    with zipfile.ZipFile(tmp_path / "export.zip") as packed:
        rows = pl.read_csv(packed.read(packed.namelist()[0]))
    same_prices({c: rows[c].to_list() for c in PRICES}, source.filter(pl.col("symbol") == "FB"))


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ("day_quota", "LimitExceededError"),
        ("too_frequent", "LimitExceededError"),
        ("bad_key", "AuthenticationError"),
        ("no_permission", "ForbiddenError"),
        ("wrong_argument", "InvalidRequestError"),
        ("token_refused", "InvalidRequestError"),
        ("server_error", "InternalServerError"),
        ("unavailable", "ServiceUnavailableError"),
    ],
)
def test_nasdaq_data_link_reads_the_errors_as_its_own(start, link, fault, error):
    client = link(start(faults=[{"fault": fault}]))
    with pytest.raises(getattr(client, error)):
        client.get_table("WIKI/PRICES", ticker="FB")
