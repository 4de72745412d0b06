"""What follows a page: every style to its end, and every way a chain could lose rows or never end."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marketsync.definition import Dataset, Verdict
from marketsync.gate import Batch
from providers.paging import Step, next_step

BASE = "https://api.example.com/v1"


def dataset(page: dict, schema: dict | None = None, dates: str | None = None) -> Dataset:
    return Dataset.model_validate(
        {
            "page": page,
            "request": {"dates": dates},
            "schema": schema or {"s": "str", "t": {"type": "datetime", "format": "unix_ms"}},
            "key": ["s"],
        }
    )


def batch(rows: int, **columns: list) -> Batch:
    return Batch(pl.DataFrame(columns) if columns else pl.DataFrame({"s": ["x"] * rows}), rows)


def step(page: dict, rows: int, document: Any = None, cursor: dict | None = None, headers: dict | None = None) -> Step:
    found = next_step(
        dataset(page), cursor, document, headers or {}, batch(rows), BASE, f"{BASE}/bars?x=1", ("apiKey",)
    )
    json.dumps(found.cursor)  # a cursor is kept in the ledger
    return found


# ---------------------------------------------------------------- one page


def test_without_a_style_a_page_is_the_whole_answer() -> None:
    assert step({}, 5000) == Step()


def test_a_full_page_without_continuation_is_split_and_not_believed() -> None:
    assert step({"cap": 1000}, 999) == Step()
    assert step({"cap": 1000}, 1000).verdict is Verdict.SPLIT
    assert step({"cap": 1000, "split": False}, 1000) == Step()


def test_an_answer_that_counts_more_rows_than_it_holds_is_split() -> None:
    assert step({"count": "n"}, 10, {"n": 10}) == Step()
    assert step({"count": "n"}, 10, {"n": 11}).verdict is Verdict.SPLIT
    assert step({"more": "more"}, 10, {"more": True}).verdict is Verdict.SPLIT
    assert step({"more": "more", "split": False}, 10, {"more": True}).verdict is Verdict.FAIL
    assert step({"cap": 10, "more": "more"}, 10, {"more": False}) == Step()


# ---------------------------------------------------------------- offset and page number

OFFSET = {"offset": "offset", "size": 100}


@pytest.mark.parametrize(
    ("page", "rows", "document", "cursor", "following"),
    [
        ({}, 100, None, None, {"offset": 100}),
        ({}, 100, None, {"offset": 200}, {"offset": 300}),
        ({}, 99, None, {"offset": 200}, None),
        ({}, 0, None, {"offset": 200}, None),
        ({"more": "data.has_more"}, 100, {"data": {"has_more": False}}, None, None),
        ({"more": "data.has_more"}, 60, {"data": {"has_more": True}}, None, {"offset": 60}),
        ({"more": "has_more"}, 100, {}, None, {"offset": 100}),
        ({"count": "count"}, 100, {"count": 150}, None, {"offset": 100}),
        ({"count": "count"}, 50, {"count": 150}, {"offset": 100}, None),
        ({"count": "count"}, 100, {"count": 100}, None, None),
        ({"count": "count"}, 60, {"count": 150}, None, {"offset": 60}),  # a short page that is not the last
        ({"count": "count"}, 100, {"count": -1}, None, {"offset": 100}),  # a count that counts nothing
        ({"cap": 50}, 50, None, None, {"offset": 50}),  # the provider gives less than was asked for
    ],
)
def test_offset_ends_at_a_short_page_a_flag_or_a_count(
    page: dict, rows: int, document: Any, cursor: dict | None, following: dict | None
) -> None:
    assert step({**OFFSET, **page}, rows, document, cursor) == Step(following)


def test_more_rows_promised_and_none_given_is_an_error_and_no_endless_chain() -> None:
    for page, document in (({"more": "m"}, {"m": True}), ({"count": "c"}, {"c": 500})):
        found = step({**OFFSET, **page}, 0, document, {"offset": 100})
        assert found.verdict is Verdict.FAIL
        assert "offset 100" in found.message
    assert step({"page": "p", "more": "m"}, 0, {"m": True}, {"page": 3}).verdict is Verdict.FAIL


@pytest.mark.parametrize(
    ("page", "rows", "document", "cursor", "following"),
    [
        ({"size": 10}, 10, None, None, {"page": 2}),
        ({"size": 10}, 9, None, {"page": 2}, None),
        ({"size": 10, "first": 0}, 10, None, None, {"page": 1}),
        ({"count": "pages"}, 10, {"pages": 3}, {"page": 2}, {"page": 3}),
        ({"count": "pages"}, 10, {"pages": 3}, {"page": 3}, None),
        ({"count": "pages", "first": 0}, 10, {"pages": 3}, {"page": 2}, None),
        ({"more": "m"}, 10, {"m": "true"}, None, {"page": 2}),
        ({"more": "m"}, 10, {"m": "false"}, None, None),
    ],
)
def test_page_numbers_end_at_a_short_page_a_flag_or_the_number_of_pages(
    page: dict, rows: int, document: Any, cursor: dict | None, following: dict | None
) -> None:
    assert step({"page": "p", **page}, rows, document, cursor) == Step(following)


# ---------------------------------------------------------------- tokens and URLs

TOKEN = {"token": "meta.next", "send": "cursor"}


def test_a_token_is_followed_until_there_is_none_even_over_empty_and_full_pages() -> None:
    first = step(TOKEN, 10, {"meta": {"next": "a"}})
    assert first.cursor is not None
    assert first.cursor["token"] == "a"
    assert step(TOKEN, 0, {"meta": {"next": "b"}}, first.cursor).cursor is not None
    for nothing in (None, "", False):
        assert step(TOKEN, 10, {"meta": {"next": nothing}}, first.cursor) == Step()
    assert step(TOKEN, 3, {}, first.cursor) == Step()


@pytest.mark.parametrize("style", [TOKEN, {"next_url": "meta.next"}])
def test_a_first_page_at_the_cap_that_leads_nowhere_is_split_and_not_believed(style: dict) -> None:
    capped = {**style, "cap": 10}
    found = step(capped, 10, {})
    assert found.verdict is Verdict.SPLIT
    assert "10 rows, a page holds 10" in found.message
    assert step(capped, 9, {}) == Step()
    # where pages are asked to hold less than the provider allows, a full one is as full as it was asked to be
    assert step({**style, "size": 10, "cap": 100}, 10, {}).verdict is Verdict.SPLIT
    assert step({**style, "size": 100, "cap": 10}, 10, {}).verdict is Verdict.SPLIT
    assert step({**style, "size": 10}, 10, {}) == Step()
    assert step({**capped, "split": False}, 10, {}) == Step()
    assert step({**capped, "more": "more"}, 10, {"more": False}) == Step()


def test_a_later_page_at_the_cap_that_leads_nowhere_is_the_end() -> None:
    assert step({**TOKEN, "cap": 10}, 10, {}, {"token": "a", "pages": 1}) == Step()
    assert step({"next_url": "n", "cap": 10}, 10, {}, {"next_url": "/a", "pages": 1}) == Step()


def test_a_page_of_an_offset_chain_at_the_cap_is_looked_behind_although_it_says_it_is_the_last() -> None:
    page = {"offset": "o", "size": 10, "cap": 10, "more": "more"}
    assert step(page, 10, {"more": False}) == Step({"offset": 10})
    assert step(page, 0, {"more": False}, {"offset": 10}) == Step()
    assert step(page, 9, {"more": False}) == Step()
    assert step({**page, "split": False}, 10, {"more": False}) == Step()


def test_a_token_can_be_in_a_header() -> None:
    found = step({"token": "$header.CB-AFTER", "send": "after"}, 3, None, None, {"cb-after": "17"})
    assert found.cursor is not None
    assert found.cursor["token"] == "17"


def test_a_token_that_comes_again_is_an_error() -> None:
    first = step(TOKEN, 5, {"meta": {"next": "a"}})
    found = step(TOKEN, 5, {"meta": {"next": "a"}}, first.cursor)
    assert found.verdict is Verdict.FAIL
    assert "in a circle" in found.message


def test_more_promised_without_a_token_is_an_error() -> None:
    assert step({**TOKEN, "more": "m"}, 5, {"m": True}).verdict is Verdict.FAIL
    assert step({**TOKEN, "more": "m"}, 5, {"m": False, "meta": {"next": "a"}}) == Step()


@given(st.integers(0, 40), st.integers(1, 40))
@settings(max_examples=100)
def test_every_circle_of_tokens_is_found(lead: int, circle: int) -> None:
    cursor: dict | None = None
    for page in range(20 * (lead + circle) + 10):
        token = page if page < lead else lead + (page - lead) % circle
        found = step(TOKEN, 1, {"meta": {"next": f"t{token}"}}, cursor)
        if found.verdict is Verdict.FAIL:
            assert page >= lead + circle
            assert page <= 4 * (lead + circle) + 2
            return
        cursor = json.loads(json.dumps(found.cursor))
    raise AssertionError("the circle was never found")


@given(st.integers(1, 60))
@settings(max_examples=30)
def test_distinct_tokens_are_never_taken_for_a_circle(pages: int) -> None:
    cursor: dict | None = None
    for page in range(pages):
        cursor = step(TOKEN, 1, {"meta": {"next": f"t{page}"}}, cursor).cursor
        assert cursor is not None


URL = {"next_url": "next_url"}


def test_a_next_url_is_kept_without_the_key_and_made_absolute() -> None:
    found = step(URL, 5, {"next_url": f"{BASE}/bars?cursor=abc&apiKey=secret&x=2"})
    assert found.cursor is not None
    assert found.cursor["next_url"] == f"{BASE}/bars?cursor=abc&x=2"
    relative = step(URL, 5, {"next_url": "/v1/bars?cursor=d"})
    assert relative.cursor is not None
    assert relative.cursor["next_url"] == f"{BASE}/bars?cursor=d"
    assert step(URL, 5, {}, found.cursor) == Step()


def test_a_next_url_can_be_in_a_link_header() -> None:
    link = f'<{BASE}/bars?page=1>; rel="prev", <{BASE}/bars?page=3>; rel="next"'
    found = step({"next_url": "$header.Link"}, 5, None, None, {"Link": link})
    assert found.cursor is not None
    assert found.cursor["next_url"] == f"{BASE}/bars?page=3"
    assert step({"next_url": "$header.Link"}, 5, None, None, {"Link": f'<{BASE}>; rel="prev"'}) == Step()


@pytest.mark.parametrize(
    "target", ["https://evil.example.net/v1/bars", "http://api.example.com/v1/bars", "//evil.example.net/x"]
)
def test_a_next_url_on_another_host_is_an_error_that_names_it(target: str) -> None:
    found = step(URL, 5, {"next_url": target})
    assert found.verdict is Verdict.FAIL
    assert "another host" in found.message


# ---------------------------------------------------------------- after the last key


def after(
    values: list,
    cursor: dict | None = None,
    *,
    page: dict | None = None,
    spec: dict | None = None,
    dates: str | None = None,
    document: Any = None,
) -> Step:
    schema = {"s": "str", "t": spec or {"type": "datetime", "format": "unix_ms"}}
    made = dataset({"after": "t", "send": "startTime", "size": len(values), **(page or {})}, schema, dates)
    frame = {"s": ["x"] * len(values), "t": values}
    found = next_step(made, cursor, document, {}, batch(len(values), **frame), BASE)
    json.dumps(found.cursor)
    return found


def test_the_greatest_value_is_sent_whatever_the_order_of_rows() -> None:
    assert after([3.0, 9.0, 5.0]).cursor == {"after": 9, "reached": 9_000}
    assert after(["3", "10", "9"], page={"step": 1}).cursor == {"after": "11", "reached": 10_000}


def test_text_is_sent_as_the_provider_wrote_it_so_that_nanoseconds_survive() -> None:
    texts = ["2024-01-02T00:00:00.123456789Z", "2024-01-02T00:00:00.123456788Z"]
    assert after(texts, spec={"type": "datetime_ns"}).cursor["after"] == texts[0]  # type: ignore[index]


@pytest.mark.parametrize(
    ("spec", "values", "dates", "sent"),
    [
        ({"type": "date", "format": "%Y%m%d"}, ["20240130", "20240131"], "%Y%m%d", "20240201"),
        ({"type": "date", "format": "%Y%m%d"}, [20240130, 20240131], "%Y%m%d", "20240201"),
        ({"type": "date"}, ["2024-01-31"], None, "2024-02-01"),
        ({"type": "datetime"}, ["2024-01-31T23:59:59Z"], "rfc3339", "2024-02-01T00:00:00Z"),
        ({"type": "i64"}, [7.0, 8.0], None, 9),
    ],
)
def test_step_adds_one_of_the_unit_it_is_written_in(spec: dict, values: list, dates: str | None, sent: Any) -> None:
    assert after(values, page={"step": 1}, spec=spec, dates=dates).cursor["after"] == sent  # type: ignore[index]


def test_a_short_or_empty_page_is_the_last() -> None:
    assert after([1.0], page={"size": 2}) == Step()
    assert next_step(dataset({"after": "t", "send": "a"}), None, None, {}, batch(0), BASE) == Step()


def test_a_full_page_that_does_not_advance_is_an_error() -> None:
    found = after([9.0, 9.0], {"after": 9, "reached": 9_000})
    assert found.verdict is Verdict.FAIL
    assert "fill more than a page" in found.message.replace("\n", " ")


def test_without_a_size_a_page_that_only_repeats_the_last_row_is_the_end() -> None:
    assert after([9.0], {"after": 9, "reached": 9_000}, page={"size": None}) == Step()
    assert after([9.0], {"after": 8, "reached": 8_000}, page={"size": None}).cursor is not None


def test_values_that_cannot_be_read_cannot_be_continued_from() -> None:
    found = after(["x", "y"], spec={"type": "datetime"})
    assert found.verdict is Verdict.FAIL


# ---------------------------------------------------------------- whole chains


def follow(page: dict, serve: Callable[[dict | None], tuple[int, Any]]) -> tuple[int, int]:
    """Follow a chain as the engine does, the cursor through JSON each time; return (rows, pages)."""
    cursor: dict | None = None
    rows = pages = 0
    while pages < 1000:
        count, document = serve(cursor)
        found = step(page, count, document, cursor)
        assert found.verdict is Verdict.ROWS, found.message
        rows, pages = rows + count, pages + 1
        if found.cursor is None:
            return rows, pages
        cursor = json.loads(json.dumps(found.cursor))
    raise AssertionError("the chain does not end")


@given(st.integers(0, 500), st.integers(1, 60), st.sampled_from(["short", "more", "count"]))
@settings(max_examples=100)
def test_offset_chains_fetch_every_row_once(total: int, size: int, rule: str) -> None:
    def serve(cursor: dict | None) -> tuple[int, Any]:
        offset = (cursor or {}).get("offset", 0)
        count = max(0, min(size, total - offset))
        return count, {"more": offset + count < total, "count": total}

    page: dict[str, Any] = {"offset": "o", "size": size}
    if rule != "short":
        page[rule] = rule
    rows, pages = follow(page, serve)
    assert rows == total
    assert pages <= total // size + 1


@given(st.integers(0, 500), st.integers(1, 60))
@settings(max_examples=50)
def test_token_chains_fetch_every_row_once(total: int, size: int) -> None:
    def serve(cursor: dict | None) -> tuple[int, Any]:
        offset = int((cursor or {}).get("token", 0))
        count = max(0, min(size, total - offset))
        more = offset + count < total
        return count, {"meta": {"next": str(offset + count) if more else None}}

    assert follow(TOKEN, serve)[0] == total
