"""The replica as Nasdaq Data Link: filters, cursors, CSV, the bulk export, words."""

from __future__ import annotations

import base64
import io
import json
import time
import zipfile

import polars as pl
import pytest


def table(answer) -> pl.DataFrame:
    assert answer.status_code == 200, answer.text
    found = answer.json()["datatable"]
    return pl.DataFrame(found["data"], schema=[c["name"] for c in found["columns"]], orient="row")


def everything(asker, **query):
    parts, cursor = [], None
    while True:
        answer = asker.nasdaq(**query, **({"qopts.cursor_id": cursor} if cursor else {}))
        parts.append(table(answer))
        cursor = answer.json()["meta"]["next_cursor_id"]
        if cursor is None:
            return parts


def test_all_rows_come_in_two_pages_and_equal_the_source(start, ask, source):
    parts = everything(ask(start()), **{"date.gte": "2000-01-01"})
    assert [p.height for p in parts] == [10_000, 2_154]
    got = pl.concat(parts)
    assert got["ticker"].to_list() == source["symbol"].to_list()
    assert got["date"].to_list() == source["date"].cast(pl.String).to_list()
    for column in ("open", "high", "low", "close", "adj_close"):
        assert got[column].to_list() == source[column].to_list()
    assert got["volume"].to_list() == source["volume"].cast(pl.Float64).to_list()


def test_small_pages_end_exactly_where_a_symbol_ends(start, ask):
    asker = ask(start())
    query = {"ticker": "AAPL,FB", "date.gte": "2012-05-01", "date.lte": "2012-07-31"}
    whole = table(asker.nasdaq(**query))
    aapl = whole.filter(pl.col("ticker") == "AAPL").height
    parts = everything(asker, **query, **{"qopts.per_page": aapl})
    assert parts[0]["ticker"].unique().to_list() == ["AAPL"]
    assert pl.concat(parts).equals(whole)


def test_a_page_that_is_just_full_ends_without_a_cursor(start, ask):
    page = ask(start()).nasdaq(ticker="FB", **{"qopts.per_page": 196}).json()
    assert (len(page["datatable"]["data"]), page["meta"]["next_cursor_id"]) == (196, None)


@pytest.mark.parametrize(
    ("filters", "days"),
    [
        ({"date": "2012-06-01"}, ["2012-06-01"]),
        ({"date.eq": "2012-06-01"}, ["2012-06-01"]),
        ({"date.gte": "2012-06-01", "date.lte": "2012-06-05"}, ["2012-06-01", "2012-06-04", "2012-06-05"]),
        ({"date.gt": "2012-06-01", "date.lt": "2012-06-05"}, ["2012-06-04"]),
    ],
)
def test_dates_filter_as_their_operator_says(start, ask, filters, days):
    assert table(ask(start()).nasdaq(ticker="IBM", **filters))["date"].to_list() == days


def test_columns_are_chosen_in_their_order_however_the_list_is_sent(start, ask):
    asker = ask(start())
    query = {"ticker": "IBM", "date": "2012-06-01"}
    for chosen in ({"qopts.columns": "close,date"}, {"qopts.columns[]": ["close", "date"]}):
        assert table(asker.nasdaq(**query, **chosen)).rows() == [(189.08, "2012-06-01")]
    body = {"ticker": ["IBM"], "date": "2012-06-01", "qopts.columns": ["close", "date"]}
    url = f"{asker.replica.url}/api/v3/datatables/WIKI/PRICES"
    assert table(asker.session.post(url, json=body, headers={"x-api-token": "replica-key"})).rows() == [
        (189.08, "2012-06-01")
    ]


def test_csv_carries_the_cursor_in_a_header(start, ask):
    asker = ask(start())
    path = "/api/v3/datatables/WIKI/PRICES.csv"
    query = {"ticker": "FB", "qopts.per_page": 100}
    first = asker.nasdaq(path, **query)
    second = asker.nasdaq(path, **query, **{"qopts.cursor_id": first.headers["Cursor_ID"]})
    assert "Cursor_ID" not in second.headers
    rows = pl.concat([pl.read_csv(io.BytesIO(a.content)) for a in (first, second)])
    assert rows.equals(pl.concat(pl.DataFrame(p) for p in everything(asker, ticker="FB")))


def test_csv_refuses_in_csv(start, ask):
    asker = ask(
        start(faults=[{"fault": "day_quota", "when": {"request": 1}}, {"fault": "empty", "when": {"request": 2}}])
    )
    path = "/api/v3/datatables/WIKI/PRICES.csv"
    refused = asker.nasdaq(path)
    assert (refused.status_code, refused.headers["Content-Type"]) == (429, "text/csv")
    assert refused.text == "code,message\nQELx02,You have exceeded your daily call limit as a registered user.\n"
    empty = pl.read_csv(asker.nasdaq(path).content)
    assert (empty.height, empty.columns[:2]) == (0, ["ticker", "date"])
    assert asker.nasdaq(path, colour="red").text.startswith("code,message\nQESx04,")


def test_a_cursor_is_refused_with_other_filters(start, ask):
    replica = start()
    asker = ask(replica)
    cursor = asker.nasdaq(ticker="FB", **{"qopts.per_page": 5}).json()["meta"]["next_cursor_id"]
    refused = asker.nasdaq(ticker="FB,IBM", **{"qopts.per_page": 5, "qopts.cursor_id": cursor})
    assert refused.status_code == 422
    assert "cursor" in refused.json()["quandl_error"]["message"]
    assert replica.log[-1]["verdict"] == "restart"
    assert asker.nasdaq(ticker="FB", **{"qopts.cursor_id": "nonsense"}).status_code == 422


def test_nothing_found_keeps_the_columns(start, ask):
    replica = start()
    answer = ask(replica).nasdaq(ticker="ZZZ").json()
    assert (answer["datatable"]["data"], answer["meta"]) == ([], {"next_cursor_id": None})
    assert len(answer["datatable"]["columns"]) == 14
    assert replica.log[-1]["verdict"] == "empty"


def test_the_key_may_be_sent_in_the_query_and_none_means_anonymous(start, ask):
    replica = start()
    asker = ask(replica)
    assert asker.nasdaq(key=None, ticker="FB", api_key="replica-key").status_code == 200
    assert asker.nasdaq(key=None).status_code == 200
    assert [e["account"] for e in replica.log] == ["replica-key", "anonymous"]
    assert "api_key" not in replica.log[0]["request"]["params"]
    unknown = asker.nasdaq(key="guess")
    assert (unknown.status_code, unknown.json()["quandl_error"]["code"]) == (400, "QEAx01")


@pytest.mark.parametrize(
    ("query", "status", "code"),
    [
        ({"colour": "red"}, 422, "QESx04"),
        ({"qopts.columns": "colour"}, 422, "QESx04"),
        ({"qopts.per_page": "10001"}, 422, "QESx04"),
        ({"date.gte": "June"}, 422, "QESx04"),
    ],
)
def test_a_wrong_argument_is_refused(start, ask, query, status, code):
    answer = ask(start()).nasdaq(**query)
    assert (answer.status_code, answer.json()["quandl_error"]["code"]) == (status, code)


def test_an_unknown_table_is_not_found(start, ask):
    answer = ask(start()).nasdaq("/api/v3/datatables/NO/TABLE.json")
    assert (answer.status_code, answer.json()["quandl_error"]["code"]) == (404, "QECx02")


def exported(asker, **query):
    """Statuses until the export is fresh, and its link."""
    seen = []
    for _ in range(200):
        file = asker.nasdaq(**query, **{"qopts.export": "true"}).json()["datatable_bulk_download"]["file"]
        seen.append(file["status"])
        if file["status"] == "fresh":
            return seen, file["link"]
        assert file["link"] is None
        time.sleep(0.02)
    raise AssertionError(f"never fresh: {seen[-1]}")


def test_the_bulk_export_is_made_then_fetched_without_a_key(start, ask, source):
    replica = start(export_polls=9)
    asker = ask(replica)
    seen, link = exported(asker, **{"date.lte": "2012-12-31"})
    assert seen[:9] == ["creating"] * 9
    with zipfile.ZipFile(io.BytesIO(asker.session.get(link, timeout=20).content)) as packed:
        (name,) = packed.namelist()
        rows = pl.read_csv(packed.read(name))
    want = source.filter(pl.col("date") <= pl.date(2012, 12, 31))
    assert rows["close"].to_list() == want["close"].to_list()
    assert (replica.log[-1]["rows"], replica.log[-1]["verdict"]) == (want.height, "rows")


def test_an_export_of_restated_rows_is_made_again(start, ask, source):
    replica = start(export_polls=1)
    asker = ask(replica)
    assert exported(asker, ticker="FB")[0][0] == "creating"
    replica.update(source.filter(pl.col("symbol") == "FB").tail(1).with_columns(close=pl.lit(1.0)))
    seen, link = exported(asker, ticker="FB")
    assert seen[0] == "regenerating"
    with zipfile.ZipFile(io.BytesIO(asker.session.get(link, timeout=20).content)) as packed:
        assert pl.read_csv(packed.read(packed.namelist()[0]))["close"][-1] == 1.0


def test_shapes_are_those_recorded(start, ask, recorded):
    folder = recorded / "nasdaq_data_link"
    real = json.loads((folder / "datatables/WIKI_PRICES_page1.json").read_text())
    ours = ask(start()).nasdaq(ticker="AAPL", **{"qopts.per_page": 5}).json()
    assert ours["datatable"]["columns"] == real["datatable"]["columns"]
    assert set(ours) == set(real)
    assert [type(v) for v in ours["datatable"]["data"][0]] == [type(v) for v in real["datatable"]["data"][0]]
    for cursor in (ours["meta"]["next_cursor_id"], real["meta"]["next_cursor_id"]):
        assert base64.b64decode(cursor).startswith(b"v1_")
    status = ask(start()).nasdaq(ticker="FB", **{"qopts.export": "true"}).json()["datatable_bulk_download"]
    known = json.loads((folder / "export_status_creating.json").read_text())["datatable_bulk_download"]
    assert set(status) == set(known)
    assert status["file"] == known["file"]
    with zipfile.ZipFile(folder / "bulk/QUANDL_ARCHIVE.zip") as packed:
        header = packed.read(packed.namelist()[0]).split(b"\n")[0].decode().strip()
    csv = ask(start()).nasdaq("/api/v3/datatables/WIKI/PRICES.csv", ticker="FB").text
    assert csv.split("\n")[0] == header
