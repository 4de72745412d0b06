"""What comes after a page: the next cursor, the end of the chain, or why the chain cannot be trusted. Pure.

A cursor is a small dict that JSON can hold: it is kept in the ledger, and another process goes on from it days later.
Every cursor either moves forward or is an error; there is no endless chain.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any
from urllib.parse import urljoin, urlsplit

from marketsync.definition import Dataset, Page, Verdict
from marketsync.gate import Batch, read_column
from marketsync.schema import ColumnType
from providers.decode import walk
from providers.request import same_host, time_format, written

_LINK = re.compile(r"<([^>]*)>([^<]*)")

Cursor = dict[str, Any]


@dataclass(frozen=True)
class Step:
    """Where the chain goes: `cursor` None is its end. A verdict other than ROWS stops it (SPLIT, FAIL) and says why."""

    cursor: Cursor | None = None
    verdict: Verdict = Verdict.ROWS
    message: str = ""


def next_step(
    dataset: Dataset,
    cursor: Mapping[str, Any] | None,
    document: Any,
    headers: Mapping[str, str],
    batch: Batch,
    base_url: str,
    url: str = "",
    private: Collection[str] = (),
) -> Step:
    """Return what follows the page that was asked for with `cursor`.

    `document` is the answer without its rows, `batch` its rows, `url` the address that answered (a relative next URL
    is below it). `private` names the query parameters that hold credentials: a cursor never keeps them.
    """
    page = dataset.page
    rows = batch.fetched
    more = _flag(walk(document, page.more)) if page.more else None
    count = _number(walk(document, page.count)) if page.count else None
    if count is not None and page.style != "page" and count < rows:
        count = None  # 0 or -1 beside rows counts nothing
    if page.style == "offset":
        return _offset(page, cursor, rows, more, count)
    if page.style == "page":
        return _page(page, cursor, rows, more, count)
    if page.style == "token":
        return _token(page, cursor, _found(page.token or "", document, headers), rows, more)
    if page.style == "next_url":
        return _next_url(
            page, cursor, _found(page.next_url or "", document, headers), rows, more, base_url, url, private
        )
    if page.style == "after":
        return _after(dataset, cursor, batch, more)
    return _single(page, rows, more, count)


def _single(page: Page, rows: int, more: bool | None, count: int | None) -> Step:
    if more is False or (count is not None and count <= rows):
        return Step()
    if more or (count is not None and count > rows):
        known = f"{rows} of {count} rows" if count is not None else f"{rows} rows and says that more follow"
        return _cut(page, f"the answer holds {known}, and the dataset has no way to ask for the rest")
    if page.cap is not None and rows >= page.cap and page.split:
        return _cut(page, f"the answer is full ({rows} rows, the cap is {page.cap}), so rows may be missing")
    return Step()


def _cut(page: Page, message: str) -> Step:
    if page.split:
        return Step(verdict=Verdict.SPLIT, message=message)
    return Step(verdict=Verdict.FAIL, message=f"{message}; give `page` a style, or let windows be halved (split: true)")


def _ended(page: Page, cursor: Mapping[str, Any] | None, rows: int) -> Step:
    """The end of a chain whose answers say where it goes on. One that leads nowhere although its first page is as full
    as the provider makes them is not believed; later on, the provider has shown that it says so when more follows."""
    full = _full(page)
    if cursor is None and page.split and page.cap is not None and full is not None and rows >= full:
        where = page.token or page.next_url
        return _cut(
            page,
            f"the answer is full ({rows} rows, a page holds {full}) and has nothing at {where}, so rows may be missing",
        )
    return Step()


def _full(page: Page) -> int | None:
    """Return how many rows a full page holds: what was asked for, or less where the provider allows less."""
    sizes = [size for size in (page.size, page.cap) if size is not None]
    return min(sizes) if sizes else None


def _offset(page: Page, cursor: Mapping[str, Any] | None, rows: int, more: bool | None, count: int | None) -> Step:
    offset = int((cursor or {}).get("offset", 0)) + rows
    # That nothing follows a page as full as the provider makes them is not believed but looked at: one more request.
    full = _full(page)
    doubtful = more is False and page.split and page.cap is not None and full is not None and 0 < full <= rows
    if (more is False and not doubtful) or (more is None and count is not None and offset >= count):
        return Step()
    if rows == 0:
        if more or count is not None:
            said = "says that more follows" if more else f"counts {count} rows"
            return Step(verdict=Verdict.FAIL, message=f"the answer {said} and holds none at offset {offset}")
        return Step()
    if more is None and count is None and full is not None and rows < full:
        return Step()
    return Step({"offset": offset})


def _page(page: Page, cursor: Mapping[str, Any] | None, rows: int, more: bool | None, count: int | None) -> Step:
    number = int((cursor or {}).get("page", page.first))
    if more is False or (count is not None and more is None and number - page.first + 1 >= count):
        return Step()
    if rows == 0:
        if more or count is not None:
            said = "says that more follows" if more else f"counts {count} pages"
            return Step(verdict=Verdict.FAIL, message=f"the answer {said} and page {number} holds no rows")
        return Step()
    full = _full(page)
    if more is None and count is None and full is not None and rows < full:
        return Step()
    return Step({"page": number + 1})


def _token(page: Page, cursor: Mapping[str, Any] | None, token: Any, rows: int, more: bool | None) -> Step:
    if token in (None, "", False) or more is False:
        if more:
            return Step(verdict=Verdict.FAIL, message=f"the answer says that more follows, but has no {page.token}")
        return Step() if more is False else _ended(page, cursor, rows)
    if not isinstance(token, str | int | float):
        return Step(verdict=Verdict.FAIL, message=f"the next token at {page.token} is not a text: {token!r:.80}")
    return _moved(cursor, "token", token, f"the token at {page.token}")


def _next_url(
    page: Page,
    cursor: Mapping[str, Any] | None,
    target: Any,
    rows: int,
    more: bool | None,
    base_url: str,
    url: str,
    private: Collection[str],
) -> Step:
    if target in (None, "", False) or more is False:
        return Step() if more is False else _ended(page, cursor, rows)
    if not isinstance(target, str):
        return Step(verdict=Verdict.FAIL, message=f"the next URL at {page.next_url} is not a text")
    absolute = urljoin(url or base_url.rstrip("/") + "/", target)
    if not same_host(base_url, absolute):
        host = absolute.split("://")[-1].split("/")[0].rpartition("@")[2]
        return Step(
            verdict=Verdict.FAIL,
            message=f"the next page is said to be at another host, {host}, where the key must not go; "
            "set base_url to that host if it is the provider's",
        )
    parts = urlsplit(absolute)
    kept = [part for part in parts.query.split("&") if part.partition("=")[0] not in private]
    stripped = parts._replace(netloc=parts.netloc.rpartition("@")[2], query="&".join(kept), fragment="").geturl()
    return _moved(cursor, "next_url", stripped, f"the URL at {page.next_url}")


def _moved(cursor: Mapping[str, Any] | None, name: str, value: Any, what: str) -> Step:
    """Return the cursor with the new value, unless the chain goes in a circle.

    The value of every 1st, 2nd, 4th, 8th ... page is kept to compare with (Brent's cycle finding), so any circle is
    found with one kept value.
    """
    before = dict(cursor or {})
    if value in (before.get(name), before.get("mark")):
        return Step(
            verdict=Verdict.FAIL,
            message=f"{what} comes again, so the pages would go in a circle; rows may be missing after it",
        )
    pages = int(before.get("pages", 0)) + 1
    following: Cursor = {name: value, "pages": pages}
    mark = value if pages & (pages - 1) == 0 else before.get("mark")
    if mark is not None:
        following["mark"] = mark
    return Step(following)


def _after(dataset: Dataset, cursor: Mapping[str, Any] | None, batch: Batch, more: bool | None) -> Step:
    page = dataset.page
    name = page.after or ""
    rows = batch.fetched
    if rows == 0 or more is False:
        if rows == 0 and more:
            return Step(verdict=Verdict.FAIL, message="the answer says that more follows and holds no rows")
        return Step()
    full = _full(page)
    if more is None and full is not None and rows < full:
        return Step()
    greatest = _greatest(dataset, batch)
    if greatest is None:
        return Step(verdict=Verdict.FAIL, message=f"no row of a full page has a {name}, by which the next is asked for")
    sent, reached = greatest
    before = (cursor or {}).get("reached")
    if before is not None and not _beyond(reached, before):
        if full is None and not more:  # an answer that only repeats the last row is the end
            return Step()
        return Step(
            verdict=Verdict.FAIL,
            message=f"a full page ends at the same {name} ({reached}) as the page before it: rows with one {name} fill "
            "more than a page, so the next cannot be asked for",
        )
    return Step({"after": sent, "reached": reached})


def _beyond(value: Any, before: Any) -> bool:
    try:
        return value > before
    except TypeError:
        return str(value) > str(before)


def _greatest(dataset: Dataset, batch: Batch) -> tuple[str | int | float, str | int | float] | None:
    """Return the greatest value of the `after` column: as it is to be sent, and as it can be compared.

    What is sent is the provider's own writing (nanoseconds survive), unless `step` has to be added to it.
    """
    page, name = dataset.page, dataset.page.after or ""
    spec = dataset.columns[name]
    if name not in batch.frame.columns or not batch.frame.height:
        return None
    raw = batch.frame[name]
    typed = read_column(raw, spec)
    at = typed.arg_max()
    if at is None or typed[at] is None:
        return None
    value, sent = typed[at], raw[at]
    if isinstance(sent, float) and sent.is_integer():
        sent = int(sent)
    if isinstance(value, datetime | date):
        instant = value if isinstance(value, datetime) else datetime(value.year, value.month, value.day, tzinfo=UTC)
        if page.step:
            if (spec.format or "").startswith("unix_"):
                sent = sent + page.step if isinstance(sent, int | float) else str(int(sent) + page.step)
            else:
                unit = timedelta(days=1) if spec.type is ColumnType.DATE else timedelta(seconds=1)
                sent = written(instant + page.step * unit, time_format(dataset))
        reached = typed.to_physical()[at]
        return sent, reached
    if page.step and isinstance(value, int | float):
        return value + page.step, value
    return (sent if isinstance(sent, str | int | float) else str(sent)), value


def _found(where: str, document: Any, headers: Mapping[str, str]) -> Any:
    if not where.startswith("$header."):
        return walk(document, where)
    name = where.removeprefix("$header.").lower()
    value = next((value for key, value in headers.items() if key.lower() == name), None)
    if value is not None and name == "link":  # RFC 8288: <https://...?page=2>; rel="next"
        for target, parameters in _LINK.findall(value):
            if re.search(r"rel\s*=\s*\"?[^\"]*\bnext\b", parameters):
                return target
        return None
    return value


def _flag(value: Any) -> bool | None:
    """Read a has_more flag; None where it is absent."""
    if value is None:
        return None
    if isinstance(value, str):
        return value.strip().lower() in ("true", "1", "yes", "y")
    return bool(value)


def _number(value: Any) -> int | None:
    try:
        return None if value is None or isinstance(value, bool) else int(value)
    except (TypeError, ValueError):
        return None
