"""From a dataset, what is asked and a cursor to one request, ready to be sent. Pure: no I/O but looking up secrets.

A definition's texts hold $names from a closed list (see `marketsync.definition.Request`); there is no other template
language. What is sent where is decided here; when, by the limiter; what the answer means, by `faults.py`.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta
from typing import Any
from urllib.parse import parse_qsl, quote, urlencode, urljoin, urlsplit

from marketsync.definition import Dataset, Definition, OAuth2, Page
from marketsync.durations import parse_span
from marketsync.errors import ConfigurationError, ProviderError
from marketsync.names import NAME
from marketsync.schema import ColumnType
from providers.secrets import Secrets
from providers.transport import HttpRequest

_LABEL_LENGTH = 400


@dataclass(frozen=True)
class Ask:
    """What one chain of requests asks for.

    `values` are those of each name of `over`; [`start`, `end`) is what is owed, in UTC; the window is the anchored one
    when a request always answers for all of it, otherwise equal to them; `session` is the day of a request by session.
    """

    dataset: str
    values: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    start: datetime | None = None
    end: datetime | None = None
    window_start: datetime | None = None
    window_end: datetime | None = None
    session: date | None = None


Value = str | int | float | bool | None


# ---------------------------------------------------------------- what the names stand for


def time_format(dataset: Dataset) -> str:
    """Return how a dataset's request writes $window and $session."""
    if dataset.request.dates:
        return dataset.request.dates
    column = dataset.time_column
    return "iso" if column is None or dataset.columns[column].type is ColumnType.DATE else "rfc3339"


def written(moment: datetime | date, form: str) -> str | int:
    """Write an instant (in UTC) or a day as a request's `dates` says; whole numbers for unix_s and unix_ms."""
    if not isinstance(moment, datetime):
        moment = datetime.combine(moment, time(), UTC)
    moment = moment.astimezone(UTC)
    if form == "iso":
        return moment.date().isoformat()
    if form == "rfc3339":
        return moment.replace(tzinfo=None).isoformat() + "Z"
    if form in ("unix_s", "unix_ms", "unix_us", "unix_ns"):
        micros = (moment - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)
        return {
            "unix_s": micros // 1_000_000,
            "unix_ms": micros // 1_000,
            "unix_us": micros,
            "unix_ns": micros * 1_000,
        }[form]
    return moment.strftime(form)


def _last(end: datetime, dataset: Dataset, form: str) -> datetime:
    """Return the last instant before `end` that the format can tell apart."""
    column = dataset.time_column
    if column is None or dataset.columns[column].type is ColumnType.DATE:
        return end - timedelta(days=1)
    if form == "unix_s" or (form.startswith("%") and "%S" in form and "%f" not in form):
        return end - timedelta(seconds=1)
    if form == "unix_ms":
        return end - timedelta(milliseconds=1)
    return end - timedelta(microseconds=1)


def names_of(dataset: Dataset, ask: Ask) -> dict[str, Value]:
    """Return what every $name stands for in this ask, but for secrets; None where it has no value."""
    form = time_format(dataset)
    values: dict[str, Value] = {
        "dataset": ask.dataset,
        "fields": ",".join(raw for raw, spec in dataset.schema_.items() if spec.value is None),
        "session": None if ask.session is None else written(ask.session, form),
    }
    for name, subjects in dataset.over.subjects.items():
        given = ask.values.get(name, ())
        if subjects.batch > 1 and (wrong := next((one for one in given if subjects.join in one), None)) is not None:
            # here and not only in `check`: symbols may come from the rows of another dataset
            raise ConfigurationError(
                f"dataset {ask.dataset}: the {name} '{wrong}' holds '{subjects.join}', which stands between those of "
                "one request, so the provider would answer for others; leave it out of the universe (`where:`), or "
                "ask with another `join`, or with `batch: 1`, in a definition of your own"
            )
        values[name] = subjects.join.join(given) if given else None
    whole = dataset.whole_windows
    start = ask.window_start if whole and ask.window_start else ask.start
    end = ask.window_end if whole and ask.window_end else ask.end
    values["window.start"] = None if start is None else written(start, form)
    values["window.end"] = None if end is None else written(end, form)
    values["window.last"] = None if end is None else written(_last(end, dataset, form), form)
    anchor = ask.window_start or start
    values["window.year"] = None if anchor is None else f"{anchor:%Y}"
    values["window.month"] = None if anchor is None else f"{anchor:%m}"
    values["window.day"] = None if anchor is None else f"{anchor:%d}"
    return values


class _Absent(Exception):
    """A text holds a $name that has no value."""

    def __init__(self, name: str):
        self.name = name
        super().__init__(name)


def _fill(
    text: str, values: Mapping[str, Value], secrets: Secrets, encode: Callable[[str], str] | None = None
) -> Value:
    """Return the text with its $names replaced; a text that is one $name keeps the value's type. Raises `_Absent`."""

    def value_of(name: str) -> Value:
        if name.startswith("secret."):
            return secrets.get(name.removeprefix("secret."))
        if name not in values:
            known = ", ".join(f"${one}" for one in values)
            raise ConfigurationError(f"the request uses ${name}, which is unknown; use one of {known}, $secret.NAME")
        value = values[name]
        if value is None:
            raise _Absent(name)
        return value

    whole = NAME.fullmatch(text)
    if whole is not None and whole[2]:
        value = value_of(whole[2])
        return encode(_shown(value)) if encode else value
    return NAME.sub(
        lambda found: "$" if found[1] else (encode or str)(_shown(value_of(found[2]))),
        text,
    )


def _shown(value: Value) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value)


_LEFT_OUT = object()


def _fill_body(value: Any, values: Mapping[str, Value], secrets: Secrets) -> Any:
    if isinstance(value, str):
        try:
            return _fill(value, values, secrets)
        except _Absent as absent:
            if value == f"${absent.name}":
                return _LEFT_OUT
            raise
    if isinstance(value, Mapping):
        filled = {name: _fill_body(item, values, secrets) for name, item in value.items()}
        return {name: item for name, item in filled.items() if item is not _LEFT_OUT}
    if isinstance(value, list | tuple):
        return [item for each in value if (item := _fill_body(each, values, secrets)) is not _LEFT_OUT]
    return value


# ---------------------------------------------------------------- the request


@dataclass(frozen=True)
class Prepared:
    """What all pages of a chain share: the request but for its paging parameters, with secrets in it."""

    dataset: Dataset
    name: str
    base: str
    url: str = field(repr=False)
    query: Mapping[str, str] = field(repr=False)
    headers: Mapping[str, str] = field(repr=False)
    body: Mapping[str, Any] | None = field(repr=False)
    private: Mapping[str, str] = field(repr=False)  # query parameters that prove who asks
    encoded: str = field(repr=False)
    timeout_seconds: float = 30.0
    label: str = ""

    def page(self, cursor: Mapping[str, Any] | None, bearer: str | None = None) -> HttpRequest:
        """Return the request of one page (None: the first). `bearer` is the token of OAuth 2."""
        url, encoded = self.url, self.encoded
        extra = _paging(self.dataset.page, cursor)
        where = self.dataset.page.where
        body = self.body
        if cursor is not None and "next_url" in cursor:
            url, query = _continued(self.base, str(cursor["next_url"]))
            encoded = _encoded({**query, **self.private})
        elif extra and where == "query":
            if self.query.keys().isdisjoint(extra):
                own = _encoded({name: _shown(value) for name, value in extra.items()})
                encoded = f"{encoded}&{own}" if encoded else own
            else:
                encoded = _encoded({**self.query, **{name: _shown(value) for name, value in extra.items()}})
        elif extra and where == "params":
            body = {**(body or {}), "params": {**((body or {}).get("params") or {}), **extra}}
        elif extra:
            body = {**(body or {}), **extra}
        headers = dict(self.headers)
        if bearer is not None:
            headers["Authorization"] = f"Bearer {bearer}"
        payload = None
        if body is not None:
            payload = json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()
            headers.setdefault("Content-Type", "application/json")
        spec = self.dataset.request
        return HttpRequest(
            spec.method,
            (f"{url}{'&' if '?' in url else '?'}{encoded}") if encoded else url,
            headers,
            payload,
            self.timeout_seconds,
            spec.weight,
            self.name,
            self.label + _page_label(cursor),
        )


def prepare(definition: Definition, ask: Ask, secrets: Secrets, *, base_url: str | None = None) -> Prepared:
    """Return what all pages of an ask share. ConfigurationError: a $name is unknown, or has no value where one must
    be; SecretMissing: a secret has none."""
    dataset = definition.datasets[ask.dataset]
    spec, auth = dataset.request, definition.auth
    base = base_url or definition.base_url
    values = names_of(dataset, ask)
    try:
        path = str(_fill(spec.path, values, secrets, lambda text: quote(text, safe="")))
        url = _joined_url(base, path)
        query = _filled_query(spec.query, values, secrets)
        body = None if spec.json_body is None else _fill_body(spec.json_body, values, secrets)
        headers = {name: str(_fill(text, values, secrets)) for name, text in spec.headers.items()}
    except _Absent as absent:
        raise ConfigurationError(
            f"dataset {ask.dataset}: the request needs ${absent.name}, and this ask gives it no value"
        ) from None
    label = _label(definition, ask, url, query, body, secrets)
    private = {name: secrets.fill(text) for name, text in auth.query.items()}
    query.update(private)
    for name, text in auth.headers.items():
        headers[name] = secrets.fill(text)
    if auth.body:
        body = {**(body or {}), **{name: secrets.fill(text) for name, text in auth.body.items()}}
    if auth.basic is not None:
        pair = f"{secrets.fill(auth.basic.user)}:{secrets.fill(auth.basic.password)}"
        headers["Authorization"] = "Basic " + base64.b64encode(pair.encode()).decode()
    return Prepared(
        dataset,
        ask.dataset,
        base,
        url,
        query,
        headers,
        body,
        private,
        _encoded(query),
        parse_span(spec.timeout).seconds,
        label,
    )


def build(
    definition: Definition,
    ask: Ask,
    cursor: Mapping[str, Any] | None,
    secrets: Secrets,
    *,
    base_url: str | None = None,
    bearer: str | None = None,
) -> HttpRequest:
    """Return the request for this ask at this cursor, with its label for people (see `prepare`)."""
    return prepare(definition, ask, secrets, base_url=base_url).page(cursor, bearer)


def _label(
    definition: Definition,
    ask: Ask,
    url: str,
    query: Mapping[str, str],
    body: Mapping[str, Any] | None,
    secrets: Secrets,
) -> str:
    """Return a line that tells a person which request this is, without secrets."""
    parts = urlsplit(url)
    shown = "&".join(part for part in (parts.query, _encoded(query)) if part)
    text = f"{definition.datasets[ask.dataset].request.method} {parts.path or '/'}" + (f"?{shown}" if shown else "")
    if body is not None:
        text += " " + json.dumps(body, ensure_ascii=False)
    if len(text) > _LABEL_LENGTH:
        text = text[: _LABEL_LENGTH - 3] + "..."
    return secrets.redact(f"{definition.provider}.{ask.dataset}: {text}")


def _page_label(cursor: Mapping[str, Any] | None) -> str:
    """Tell which page; never a token, which may be as good as a key."""
    if not cursor:
        return ""
    if "pages" in cursor:
        return f" (page {int(cursor['pages']) + 1})"
    return "".join(f" ({name} {cursor[name]})" for name in ("offset", "page", "after") if name in cursor)


def _encoded(query: Mapping[str, str]) -> str:
    return urlencode(query, quote_via=quote, safe=",:")


def constants(dataset: Dataset, ask: Ask, secrets: Secrets) -> dict[str, str | None]:
    """Return the text of each column that has a `value`; None where its $name has none.

    Sessions and windows are written as the column's own format reads them, whatever the request's `dates` says.
    """
    result: dict[str, str | None] = {}
    for name, spec in dataset.columns.items():
        if spec.value is None:
            continue
        values = names_of(dataset, ask)
        form = spec.format or "iso"
        if form == "iso" and spec.type not in (ColumnType.DATE, ColumnType.STR):
            form = "rfc3339"
        for moment, at in (("session", ask.session), ("window.start", ask.window_start or ask.start)):
            if at is not None and not form.startswith("unix_auto"):
                values[moment] = written(at, form)
        try:
            filled = _fill(spec.value, values, secrets)
            result[name] = None if filled is None else _shown(filled)
        except _Absent:
            result[name] = None
    return result


def _filled_query(query: Mapping[str, Any], values: Mapping[str, Value], secrets: Secrets) -> dict[str, str]:
    filled = {name: _fill_body(value, values, secrets) for name, value in query.items()}
    return {name: _shown(value) for name, value in filled.items() if value is not _LEFT_OUT}


def _paging(page: Page, cursor: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the paging parameters of a page."""
    extra: dict[str, Any] = {}
    if page.limit and page.size:
        extra[page.limit] = page.size
    cursor = cursor or {}
    if page.offset:
        extra[page.offset] = int(cursor.get("offset", 0))
    elif page.page:
        extra[page.page] = int(cursor.get("page", page.first))
    elif page.token and page.send and cursor.get("token") is not None:
        extra[page.send] = cursor["token"]
    elif page.after and page.send and cursor.get("after") is not None:
        extra[page.send] = cursor["after"]
    return extra


def _joined_url(base: str, path: str) -> str:
    if "://" in path:
        if not same_host(base, path):
            raise ConfigurationError(f"the path {path!r} is on another host than base_url {base}; keep to one host")
        return path
    if not path:
        return base
    return base.rstrip("/") + "/" + path.lstrip("/")


def _continued(base: str, next_url: str) -> tuple[str, dict[str, str]]:
    """Return the next page's address without its query, and the query; its host must be the definition's."""
    target = urljoin(base.rstrip("/") + "/", next_url)
    if not same_host(base, target):
        raise ProviderError(f"the next page is on another host ({urlsplit(target).netloc}), where no key may go")
    parts = urlsplit(target)
    return parts._replace(query="", fragment="").geturl(), dict(parse_qsl(parts.query, keep_blank_values=True))


def same_host(base: str, url: str) -> bool:
    """Return whether a URL is on the base URL's host and port, and not in plain text where that is encrypted."""
    try:
        first, second = urlsplit(base), urlsplit(url)
        ports = [part.port or {"https": 443, "http": 80}.get(part.scheme) for part in (first, second)]
    except ValueError:
        return False
    return (
        second.scheme in ("http", "https")
        and first.hostname == second.hostname
        and ports[0] == ports[1]
        and not (first.scheme == "https" and second.scheme == "http")
    )


def token_request(definition: Definition, oauth2: OAuth2, secrets: Secrets, base_url: str | None = None) -> HttpRequest:
    """Return the request that fetches an OAuth 2 token by client credentials (RFC 6749, section 4.4)."""
    base = base_url or definition.base_url
    url = oauth2.token_url if "://" in oauth2.token_url else _joined_url(base, oauth2.token_url)
    form = {
        "grant_type": "client_credentials",
        "client_id": secrets.fill(oauth2.client_id),
        "client_secret": secrets.fill(oauth2.client_secret),
    }
    if oauth2.scope:
        form["scope"] = oauth2.scope
    return HttpRequest(
        "POST",
        url,
        {"Content-Type": "application/x-www-form-urlencoded", "Accept": "application/json"},
        urlencode(form).encode(),
        dataset="",
        label=f"{definition.provider}: POST {urlsplit(url).path} (token)",
    )
