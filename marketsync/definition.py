"""The vocabulary of a provider definition: pydantic models whose fields and sentences ARE the YAML schema, the editor
help, the error messages and the reference page.

A definition says what a provider is asked and how its answers are read. What executes it is in `providers/`; what a
user wants from it (plans, stores) is in `upstream.py`. Nothing here does I/O.
"""

from __future__ import annotations

import hashlib
import json
import re
from enum import StrEnum
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from marketsync.document import closest
from marketsync.durations import FIXED_UNITS, Unit, parse_publication, parse_span, parse_span_of, parse_zone
from marketsync.schema import Column, ColumnType, Period, Schema


def _span_text(text: str) -> str:
    parse_span(text)
    return text


def _fixed_span_text(text: str) -> str:
    parse_span_of(text, FIXED_UNITS)
    return text


def _dated_span_text(text: str) -> str:
    parse_span_of(text, [unit for unit in Unit if unit is not Unit.SESSION])
    return text


_UNIX = ("unix_s", "unix_ms", "unix_us", "unix_ns")
_PATTERN = re.compile(r"%[-_0^#.:]*\d?[A-Za-z]")
_LETTERS = {"yyyy": "%Y", "yy": "%y", "mm": "%m", "dd": "%d", "hh": "%H", "ss": "%S"}


def _dates_text(text: str) -> str:
    return _time_text(text, ("iso", "rfc3339", *_UNIX))


def _format_text(text: str) -> str:
    return _time_text(text, ("iso", *_UNIX, "unix_auto"))


def _time_text(text: str, words: tuple[str, ...]) -> str:
    """Accept one of these words or a strftime pattern; other texts would be sent, or looked for, letter by letter."""
    if text in words or _PATTERN.search(text):
        return text
    meant = _as_pattern(text) or closest(text.replace("rfc3339", "iso"), list(words)) or "%Y%m%d"
    raise ValueError(
        f"'{text}' is neither a pattern with % nor one of {', '.join(words)}; did you mean "
        + (f"'{meant}'?" if "%" in meant else f"{meant}?")
    )


def _as_pattern(text: str) -> str | None:
    """Return YYYY-MM-DD, dd.mm.yyyy hh:mm:ss ... as the pattern it stands for; None when it is no such text."""
    pieces: list[str] = re.findall(r"(?i:yyyy|yy|mm|dd|hh|ss)|[TZ]|[^A-Za-z]", text)
    if "".join(pieces) != text:
        return None
    made = ""
    for piece in pieces:
        minutes = piece.lower() == "mm" and "%H" in made  # and months before an hour
        made += "%M" if minutes else _LETTERS.get(piece.lower(), piece)
    return made if "%" in made else None


def _universe_text(text: str) -> str:
    if text.startswith("$") and text != "$plan":
        raise ValueError(f"there is no {text} here; did you mean $plan? Or the name of a universe, without $")
    return text


def _wait_text(text: str) -> str:
    if not text.startswith("$"):
        try:
            _dated_span_text(text)
        except ValueError:
            remedy = "write $header.Retry-After, $match.1 or a span such as 60 seconds"
            raise ValueError(f"'{text}' does not say how long; {remedy}") from None
    return text


def _zone_text(text: str) -> str:
    parse_zone(text)
    return text


def _publication_text(text: str) -> str:
    parse_publication(text)
    return text


def _as_list(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


def _regex_text(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"'{text}' is not a regular expression: {error}") from None
    return text


# Any span; one that a clock can measure; one that needs no trading calendar.
SpanText = Annotated[str, AfterValidator(_span_text)]
FixedSpanText = Annotated[str, AfterValidator(_fixed_span_text)]
DatedSpanText = Annotated[str, AfterValidator(_dated_span_text)]
ZoneText = Annotated[str, AfterValidator(_zone_text)]
Regex = Annotated[str, AfterValidator(_regex_text)]


class Model(BaseModel):
    """The root of all configuration models: unknown fields are errors, values are fixed once read."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


# ---------------------------------------------------------------- requests


class Basic(Model):
    """HTTP basic authentication."""

    user: str = Field(description="The user name; usually $secret.NAME.")
    password: str = Field(default="", description="The password; usually $secret.NAME.")


class OAuth2(Model):
    """OAuth 2 client credentials: a token is fetched, sent as a bearer token, and refreshed when it is refused."""

    token_url: str = Field(description="Where a token is asked for (POST), absolute or below base_url.")
    client_id: str = Field(description="The client id; usually $secret.NAME.")
    client_secret: str = Field(description="The client secret; usually $secret.NAME.")
    scope: str | None = Field(default=None, description="The scope to ask for, when the provider wants one.")


class Auth(Model):
    """How a request proves who asks. Every value may hold $secret.NAME; none of them is ever logged."""

    headers: dict[str, str] = Field(default={}, description="Headers added to every request.")
    query: dict[str, str] = Field(default={}, description="Query parameters added to every request.")
    body: dict[str, str] = Field(default={}, description="Fields added to the top level of every JSON body.")
    basic: Basic | None = Field(default=None, description="HTTP basic authentication.")
    oauth2: OAuth2 | None = Field(default=None, description="OAuth 2 client credentials.")


class Request(Model):
    """One request. Text may hold $names: the names of `over`, $window.start, $window.end (exclusive), $window.last
    (the last instant inside), $window.year, $window.month, $window.day, $session, $fields (the raw fields of the
    schema, comma separated), $dataset, $secret.NAME. A value that is one $name keeps its type; a query parameter or
    body field whose $name has no value is left out."""

    method: Literal["GET", "POST"] = Field(default="GET", description="The HTTP method.")
    path: str = Field(default="", description="The path below base_url, or an absolute URL on the same host.")
    query: dict[str, str | int | float | bool] = Field(default={}, description="Query parameters.")
    headers: dict[str, str] = Field(default={}, description="Headers of this dataset's requests.")
    json_body: dict[str, Any] | None = Field(
        default=None, alias="json", description="A JSON body, nested as deep as needed."
    )
    dates: Annotated[str, AfterValidator(_dates_text)] | None = Field(
        default=None,
        description="How $window and $session are written: a strftime pattern such as %Y%m%d, or iso, rfc3339, "
        "unix_s, unix_ms, unix_us, unix_ns. Default: iso for datasets whose time is a date, rfc3339 otherwise.",
    )
    timeout: FixedSpanText = Field(
        default="30 seconds", description="How long an answer may take, and each wait for its bytes."
    )
    weight: int = Field(default=1, ge=1, description="What one request costs of every limit.")


# ---------------------------------------------------------------- over


class Subjects(Model):
    """Where the values of one name of `over` come from, and how many go into one request."""

    universe: Annotated[str, AfterValidator(_universe_text)] | None = Field(
        default=None, description="$plan (the universe of the plan that syncs this dataset) or the name of a universe."
    )
    list: tuple[str, ...] | None = Field(default=None, description="The values themselves.")
    rows: str | None = Field(default=None, description="Another dataset (provider.dataset) whose rows hold the values.")
    column: str | None = Field(
        default=None, description="With `rows`: the column that holds them. Default: the same name."
    )
    batch: int = Field(default=1, ge=1, description="How many values go into one request.")
    join: str = Field(default=",", description="What stands between the values of one request.")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if sum(value is not None for value in (self.universe, self.list, self.rows)) != 1:
            raise ValueError("give exactly one of universe, list, rows")
        return self


class Window(Model):
    """How time is cut into requests. Windows are anchored to the calendar, not to a plan's `since`."""

    every: DatedSpanText = Field(description="The length: N minutes, hours, days, weeks, months or years.")
    whole: bool | None = Field(
        default=None,
        description="True where one request always answers for its whole window (a file by year); False where it can "
        "be asked for a part. Default: False when the request uses $window.start, $window.end or $window.last.",
    )


def _as_subjects(value: Any) -> Any:
    if isinstance(value, str):
        return {"universe": value}
    if isinstance(value, list):
        return {"list": [str(item) for item in value]}
    return value


def _as_window(value: Any) -> Any:
    return {"every": str(value)} if isinstance(value, str | int | float) else value


class Over(Model):
    """What a dataset is asked for, request by request: the product of named subjects, and windows or sessions.

    Any name may stand here beside `window` and `session`; the request uses it as $name.
    """

    model_config = ConfigDict(extra="allow", frozen=True)
    __pydantic_extra__: dict[str, Annotated[Subjects, BeforeValidator(_as_subjects)]]  # pyright: ignore[reportIncompatibleVariableOverride]

    window: Annotated[Window | None, BeforeValidator(_as_window)] = Field(
        default=None, description="Cut time into windows of this length (5 years; 1 month; 7 days)."
    )
    session: str | None = Field(
        default=None, description="One request a trading session of this calendar (XNYS, XSHG, 24/7 ...), as $session."
    )

    @property
    def subjects(self) -> dict[str, Subjects]:
        """The named subjects, in the order of the file."""
        return dict(self.__pydantic_extra__ or {})

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.window is not None and self.session is not None:
            raise ValueError("window and session exclude one another: a request covers a window or a session")
        for name in self.subjects:
            if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or name in ("fields", "dataset", "secret", "plan"):
                raise ValueError(f"'{name}' cannot be used as a $name; use lower-case letters, digits and _")
        if sum(subjects.batch > 1 for subjects in self.subjects.values()) > 1:
            raise ValueError("only one name can have a batch")
        return self


# ---------------------------------------------------------------- page


class Page(Model):
    """How an answer is continued. Choose one style: nothing (one page), offset, page, token, next_url or after.

    `cap` is the most rows one answer can hold: a full page with no continuation is then not believed; the window is
    halved and asked again.
    """

    offset: str | None = Field(default=None, description="Style offset: the parameter that says how many rows to skip.")
    page: str | None = Field(default=None, description="Style page number: the parameter that says which page.")
    token: str | None = Field(
        default=None, description="Style token: where the answer holds the next token (a body path, or $header.NAME)."
    )
    next_url: str | None = Field(
        default=None,
        description="Style next URL: where the answer holds the next page's URL. Its host must be base_url's.",
    )
    after: str | None = Field(
        default=None,
        description="Style last key: the column whose greatest value is sent to ask for what comes after it "
        "(a time column: paging by time).",
    )
    send: str | None = Field(default=None, description="The parameter that the token or the last key is sent in.")
    where: Literal["query", "body", "params"] = Field(
        default="query",
        description="Where paging parameters go: the query, the JSON body, or the object `params` in it.",
    )
    limit: str | None = Field(default=None, description="The parameter that asks for `size` rows a page.")
    size: int | None = Field(default=None, ge=1, description="How many rows a page is asked to hold.")
    first: int = Field(default=1, description="Style page number: the number of the first page.")
    step: int = Field(
        default=0, description="Style last key: added to the value (1 where the provider would repeat the row)."
    )
    more: str | None = Field(default=None, description="Body path of a flag that says that more follows (has_more).")
    count: str | None = Field(
        default=None, description="Body path of the total number of rows (or of pages, with `page`)."
    )
    cap: int | None = Field(default=None, ge=1, description="The most rows the provider puts into one answer.")
    split: bool = Field(
        default=True, description="Halve the window when a full page has no continuation (needs `cap`)."
    )

    @property
    def style(self) -> str:
        """Which style this is: none, offset, page, token, next_url or after."""
        return next((n for n in ("offset", "page", "token", "next_url", "after") if getattr(self, n)), "none")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        chosen = [n for n in ("offset", "page", "token", "next_url", "after") if getattr(self, n)]
        if len(chosen) > 1:
            raise ValueError(f"{' and '.join(chosen)} exclude one another; keep the one that the provider uses")
        if chosen in (["token"], ["after"]) and not self.send:
            raise ValueError(f"style {chosen[0]} needs send: the parameter that carries it")
        if chosen == ["offset"] and not self.size:
            raise ValueError("style offset needs size: the rows a page (a short page is the last)")
        if chosen == ["page"] and not (self.size or self.more or self.count):
            raise ValueError("style page needs size, more or count to know the last page")
        return self


# ---------------------------------------------------------------- response


class Format(StrEnum):
    """The format of an answer's bytes."""

    JSON = "json"
    CSV = "csv"


class Shape(StrEnum):
    """How rows lie in a JSON answer."""

    RECORDS = "records"  # [{"a": 1, "b": 2}, ...]
    TABLE = "table"  # {"fields": ["a", "b"], "items": [[1, 2], ...]}
    KEYED = "keyed"  # {"AAPL": [{...}, ...], "IBM": [...]} or {"AAPL": {...}}
    COLUMNS = "columns"  # {"a": [1, ...], "b": [2, ...]}
    ARRAYS = "arrays"  # [[1, 2], ...] with names given here


class Response(Model):
    """How an answer becomes rows. The shape follows from the fields given, unless it is stated."""

    format: Format = Field(default=Format.JSON, description="json or csv.")
    rows: str = Field(
        default="",
        description="Path to the rows, names joined by dots (data.items); empty: the whole body. "
        "A path that ends in .* holds one list (or record) a key.",
    )
    columns: str | None = Field(
        default=None, description="Shape table: path to the names (a list of texts, or of objects with a name)."
    )
    names: tuple[str, ...] | None = Field(
        default=None, description="Shape arrays, or CSV without header: the names, in order."
    )
    key_as: str | None = Field(default=None, description="Shape keyed: the raw field that the key becomes (symbol).")
    shape: Shape | None = Field(
        default=None, description="records, table, keyed, columns or arrays; found by itself if left out."
    )
    header: bool = Field(default=True, description="CSV: whether the first line names the columns.")
    delimiter: str = Field(default=",", min_length=1, max_length=1, description="CSV: what stands between values.")
    quote: str = Field(default='"', max_length=1, description="CSV: the quote character.")
    skip_lines: int = Field(default=0, ge=0, description="CSV: lines to pass over before the header or the first row.")
    encoding: Literal["utf-8", "latin-1", "gbk"] = Field(default="utf-8", description="How text is encoded.")
    unpack: Literal["none", "gzip", "zip", "auto"] = Field(
        default="auto",
        description="What the body is packed in beneath HTTP's own compression; auto looks at its first bytes.",
    )

    @property
    def found_shape(self) -> Shape:
        """The stated shape, or the one that the other fields imply."""
        if self.shape is not None:
            return self.shape
        if self.columns is not None:
            return Shape.TABLE
        if self.rows == "*" or self.rows.endswith(".*"):
            return Shape.KEYED
        return Shape.ARRAYS if self.names is not None and self.format is Format.JSON else Shape.RECORDS

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        shape = self.found_shape
        if self.format is Format.CSV:
            if not self.header and not self.names:
                raise ValueError("a CSV without header needs names")
            return self
        if shape is Shape.ARRAYS and not self.names:
            raise ValueError("shape arrays needs names")
        if shape is Shape.TABLE and not self.columns:
            raise ValueError("shape table needs columns: the path to the names")
        if shape is Shape.KEYED and not (self.rows == "*" or self.rows.endswith(".*")):
            raise ValueError("shape keyed needs rows to end in .* (bars.*)")
        return self


# ---------------------------------------------------------------- faults


class Verdict(StrEnum):
    """What an answer means; what then happens is told beside each."""

    ROWS = "rows"  # go on
    EMPTY = "empty"  # nothing there: covered as empty
    NOT_YET = "not_yet"  # not published yet: asked again next run
    SPLIT = "split"  # too much for one answer: halve the window
    COOL_DOWN = "cool_down"  # too frequent: wait
    QUOTA = "quota"  # the day's (hour's, month's) budget is spent: go on after the reset
    DROP = "drop"  # a wrong argument: report, drop the unit, go on
    REFRESH_AUTH = "refresh_auth"  # the token expired: refresh once, ask again
    STOP_PROVIDER = "stop_provider"  # a bad key: stop everything of this provider
    STOP_DATASET = "stop_dataset"  # no permission: stop this dataset, go on with others
    RETRY = "retry"  # a passing fault: back off and ask again
    RESTART = "restart"  # the page token is refused: begin the unit again from its covered part
    FAIL = "fail"  # not understood: keep the answer, stop the dataset


class When(Model):
    """What an answer must look like for a rule to apply: all that is given must hold."""

    status: Annotated[tuple[int | str, ...], BeforeValidator(_as_list)] = Field(
        default=(), description="HTTP status, or a list of them; 5xx stands for the class."
    )
    header: dict[str, Regex] = Field(
        default={}, description="Header name to a regular expression that its value must match."
    )
    path: dict[str, str | int | bool | list[str | int] | None] = Field(
        default={},
        description="Body path to the value it must have, a list of values, or /text/ for a regular expression; "
        "null means that it is absent or null. 'not 0' (any value or /text/ after not) means that it is there and is "
        "another; 'not null' that it is there. 0 and '0' are the same here.",
    )
    body: Regex | None = Field(default=None, description="A regular expression found in the body's first 64 KiB.")
    content_type: Regex | None = Field(
        default=None, description="A regular expression that the content type must match."
    )

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not (self.status or self.header or self.path or self.body or self.content_type):
            raise ValueError("a rule needs at least one of status, header, path, body, content_type")
        for status in self.status:
            if isinstance(status, str) and not re.fullmatch(r"[1-5]xx", status):
                raise ValueError(f"'{status}' is not a status; write a number or 4xx")
        for wanted in self.path.values():
            text = wanted.removeprefix("not ").strip() if isinstance(wanted, str) else ""
            if len(text) > 1 and text.startswith("/") and text.endswith("/"):
                _regex_text(text[1:-1])
        return self


class Fault(Model):
    """One rule: when an answer looks so, then this is the verdict. The first rule that applies wins."""

    when: When = Field(description="What the answer looks like.")
    then: Verdict = Field(description="The verdict.")
    wait: Annotated[str, AfterValidator(_wait_text)] | None = Field(
        default=None,
        description="cool_down and quota: how long. $header.NAME (seconds, an HTTP date or Unix time), $match.1 (a "
        "group of the regular expression: seconds, or with `unit` that unit), or a span such as 60 seconds. "
        "quota without wait: until the quota's reset.",
    )
    unit: Literal["second", "minute", "hour"] = Field(default="second", description="The unit of $match.")
    limit: str | None = Field(
        default=None,
        description="$match.N: the number in the message is the real limit for `per`; it is learned for this run.",
    )
    per: DatedSpanText | None = Field(
        default=None, description="cool_down, quota: the window that is spent (minute, hour, day)."
    )
    say: str | None = Field(default=None, description="Body path of the provider's own words for the report (message).")


# ---------------------------------------------------------------- limits


class Learn(Model):
    """Response headers that say how a limit stands; they only ever make us more careful."""

    limit: str | None = Field(default=None, description="The header that holds the limit.")
    remaining: str | None = Field(default=None, description="The header that holds what is left.")
    used: str | None = Field(default=None, description="The header that holds what is used.")
    reset: str | None = Field(
        default=None, description="The header that holds the reset (Unix seconds, or seconds to go)."
    )


class Scope(StrEnum):
    """What a limit is counted for."""

    PROVIDER = "provider"  # everything this machine asks of it (an address limit)
    ACCOUNT = "account"  # everything asked with one key
    DATASET = "dataset"  # each dataset of an account by itself


class Limit(Model):
    """One rate limit or quota. Several hold at once.

    Seconds, minutes and hours are sliding windows; a day or month with `resets` is a quota that starts anew at that
    local time.
    """

    requests: int | None = Field(
        default=None, ge=1, description="How many requests (or units of weight) in the window."
    )
    per: DatedSpanText | None = Field(
        default=None, description="The window: second, minute, 10 minutes, hour, day, month."
    )
    resets: str | None = Field(
        default=None, description="For day and month: when the quota starts anew, such as 00:00 Asia/Shanghai."
    )
    concurrent: int | None = Field(default=None, ge=1, description="How many requests may be under way at once.")
    scope: Scope = Field(default=Scope.ACCOUNT, description="provider, account or dataset: what is counted together.")
    learn: Learn | None = Field(default=None, description="Response headers to learn from.")
    tier: str | None = Field(default=None, description="The limit holds only for upstreams with this tier.")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.requests is None) != (self.per is None):
            raise ValueError("requests and per belong together: requests: 200, per: minute")
        if self.requests is None and self.concurrent is None:
            raise ValueError("a limit needs requests and per, or concurrent")
        if self.resets is not None:
            from marketsync.durations import parse_daily_time

            parse_daily_time(self.resets)
            if self.per is None or parse_span(self.per).unit not in (Unit.DAY, Unit.MONTH):
                raise ValueError("resets needs per: day or per: month")
        return self


# ---------------------------------------------------------------- columns


class Field_(Model):
    """One column: the raw field's name is the key in `schema`, the rest stands here (a bare type is short for it)."""

    type: ColumnType = Field(description="str, bool, i32, i64, u64, f32, f64, date, datetime or datetime_ns.")
    as_: str | None = Field(
        default=None, alias="as", description="The column's name in the stores. Default: the raw name."
    )
    value: str | None = Field(default=None, description="A value not in the answer: $symbol, $session or a text.")
    format: Annotated[str, AfterValidator(_format_text)] | None = Field(
        default=None,
        description="How dates and times are written: a strptime pattern (%Y%m%d), iso, unix_s, unix_ms, unix_us, "
        "unix_ns, or unix_auto (by magnitude). Default: iso.",
    )
    zone: ZoneText = Field(default="UTC", description="The zone of times written without one.")
    nulls: tuple[str, ...] = Field(default=(), description="Texts that stand for a missing value, such as '.'.")
    required: bool = Field(default=False, description="Whether a row without it is set aside (key columns always are).")
    scale: float | None = Field(default=None, description="Multiply numbers by this (0.0001 for prices x 10,000).")
    description: str = Field(default="", description="What it is, and its unit.")


def _as_field(value: Any) -> Any:
    return {"type": value} if isinstance(value, str) else value


FieldSpec = Annotated[Field_, BeforeValidator(_as_field)]

# ---------------------------------------------------------------- dataset, definition


class Dataset(Model):
    """One kind of rows: what to ask (over, request), how to continue (page), how to read (response, schema)."""

    title: str = Field(default="", description="One line about it.")
    over: Over = Field(
        default_factory=lambda: Over.model_validate({}), description="What it is asked for, request by request."
    )
    request: Request = Field(
        default=Request(), description="The request; what is left out comes from the definition's."
    )
    page: Page = Field(default=Page(), description="How an answer is continued; replaces the definition's.")
    response: Response = Field(default=Response(), description="How an answer becomes rows; replaces the definition's.")
    schema_: dict[str, FieldSpec] = Field(alias="schema", description="Raw field to column.", min_length=1)
    key: tuple[str, ...] = Field(description="The columns that identify a row.", min_length=1)
    time: str | None = Field(
        default=None,
        description="The column that windows and coverage go by. Default: the only date or datetime in the key.",
    )
    subject: str | None = Field(
        default=None,
        description="The column that holds the subject. Default: the column named as the first name of `over`.",
    )
    frequency: Literal["session", "minute", "irregular"] = Field(
        default="irregular",
        description="session: one row a session and subject; minute: bars within sessions; irregular: none expected.",
    )
    calendar: str | None = Field(default=None, description="The trading calendar (ISO 10383: XNYS, XSHG; or 24/7).")
    published: Annotated[str, AfterValidator(_publication_text)] | None = Field(
        default=None, description="When a session's rows can be had: 30 minutes after close; 18:00 Asia/Shanghai."
    )
    settles: SpanText | None = Field(
        default=None, description="An answer asked before publication plus this is not final."
    )
    restates: SpanText | None = Field(default=None, description="Rows this young are asked again every run.")
    grace: SpanText = Field(default="3 days", description="Not published this long after publication: a hole.")
    period: Period | None = Field(
        default=None,
        description="How tables are partitioned. Default: year for dates and sessions, month for other times.",
    )
    faults: tuple[Fault, ...] = Field(default=(), description="Rules tried before the definition's.")
    limits: tuple[Limit, ...] = Field(default=(), description="Limits of this dataset, beside the definition's.")

    @property
    def time_column(self) -> str | None:
        """The column windows go by, stated or found."""
        if self.time:
            return self.time
        temporal = [
            name
            for name in self.key
            if (column := self.columns.get(name))
            and column.type in (ColumnType.DATE, ColumnType.DATETIME, ColumnType.DATETIME_NS)
        ]
        return temporal[0] if len(temporal) == 1 else None

    @property
    def columns(self) -> dict[str, Field_]:
        """Column name (in the stores) to its field."""
        return {spec.as_ or raw: spec for raw, spec in self.schema_.items()}

    @property
    def raw_of(self) -> dict[str, str]:
        """Column name to the raw field it is read from."""
        return {spec.as_ or raw: raw for raw, spec in self.schema_.items()}

    @property
    def subject_column(self) -> str | None:
        """The column that holds the subject, stated or found."""
        if self.subject:
            return self.subject
        return next((name for name in self.over.subjects if name in self.columns), None)

    @property
    def whole_windows(self) -> bool:
        """Whether a request always answers for its whole window."""
        window = self.over.window
        if window is None:
            return False
        if window.whole is not None:
            return window.whole
        text = self.request.model_dump_json()
        return not any(name in text for name in ("$window.start", "$window.end", "$window.last"))

    def stored(self) -> Schema:
        """Return the schema of the rows in a store."""
        time = self.time_column
        columns = tuple(
            Column(name, spec.type, not (spec.required or name in self.key), spec.description)
            for name, spec in self.columns.items()
        )
        period = self.period
        if period is None:
            if time is None:
                period = Period.NONE
            elif self.columns[time].type is ColumnType.DATE or self.frequency == "session":
                period = Period.YEAR
            else:
                period = Period.MONTH
        return Schema(columns, self.key, time, self.subject_column, period)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        columns = self.columns
        if len(columns) != len(self.schema_):
            twice = next(name for name in columns if sum((f.as_ or raw) == name for raw, f in self.schema_.items()) > 1)
            raws = [raw for raw, spec in self.schema_.items() if (spec.as_ or raw) == twice]
            raise ValueError(
                f"schema: {' and '.join(raws)} become the same column '{twice}'; give one of them another `as`"
            )
        for name in self.key:
            if name not in columns:
                raise ValueError(f"key names {name!r}, which is not a column; columns: {', '.join(columns)}")
        if self.time and self.time not in columns:
            raise ValueError(f"time names {self.time!r}, which is not a column; columns: {', '.join(columns)}")
        if self.subject and self.subject not in columns:
            raise ValueError(f"subject names {self.subject!r}, which is not a column; columns: {', '.join(columns)}")
        if (self.over.window or self.over.session) and self.time_column is None:
            raise ValueError("over has a window or session, so the rows need a time: name the column with `time`")
        if self.frequency == "session" and not (self.calendar or self.over.session):
            raise ValueError("frequency session needs a calendar")
        if (self.published or self.settles) and not (self.calendar or self.over.session):
            raise ValueError("published and settles need a calendar (24/7 is one)")
        if self.page.after and self.page.after not in columns:
            raise ValueError(
                f"page.after names {self.page.after!r}, which is not a column; columns: {', '.join(columns)}"
            )
        for name in columns:
            if name.startswith("_") or not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]{0,62}", name):
                raise ValueError(
                    f"column {name!r}: use letters, digits and _, at most 63, beginning with a letter (see `as`)"
                )
        if len({name.lower() for name in columns}) != len(columns):
            raise ValueError(
                "two columns differ only in case, which some stores cannot keep apart; rename one with `as`"
            )
        return self

    @property
    def calendar_name(self) -> str | None:
        """The calendar of the rows: the stated one, or that of the sessions they are asked by."""
        return self.calendar or self.over.session


class Definition(Model):
    """One provider: where it is, how to prove who asks, what it allows, how it says no, and its datasets."""

    provider: str = Field(pattern=r"^[a-z][a-z0-9_]*$", description="The provider's short name.")
    title: str = Field(default="", description="The provider's name for people.")
    documentation: str = Field(default="", description="Where the provider documents its API.")
    base_url: str = Field(pattern=r"^https?://[^\s]+$", description="The URL that paths are below.")
    auth: Auth = Field(default=Auth(), description="How a request proves who asks.")
    request: Request = Field(default=Request(), description="Defaults for every dataset's request.")
    page: Page = Field(default=Page(), description="Default for every dataset's page.")
    response: Response = Field(default=Response(), description="Default for every dataset's response.")
    limits: tuple[Limit, ...] = Field(default=(), description="What the provider allows.")
    faults: tuple[Fault, ...] = Field(
        default=(), description="How the provider says no, tried in order; then built-in rules."
    )
    attempts: int = Field(
        default=5, ge=1, le=20, description="How often a request with a passing fault is tried in all."
    )
    datasets: dict[Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")], Dataset] = Field(
        description="The datasets by name.", min_length=1
    )

    @model_validator(mode="before")
    @classmethod
    def _inherit(cls, data: Any) -> Any:
        """Let every dataset inherit request (field by field), page and response (whole, when it has none)."""
        if not isinstance(data, dict) or not isinstance(data.get("datasets"), dict):
            return data
        datasets = {}
        for name, dataset in data["datasets"].items():
            if isinstance(dataset, dict):
                dataset = dict(dataset)
                for part in ("page", "response"):
                    if part not in dataset and isinstance(data.get(part), dict):
                        dataset[part] = data[part]
                shared = data.get("request")
                if isinstance(shared, dict) and isinstance(dataset.get("request", {}), dict):
                    dataset["request"] = _merged(shared, dataset.get("request", {}))
            datasets[name] = dataset
        return {**data, "datasets": datasets}


def _merged(shared: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    merged = dict(shared)
    for name, value in own.items():
        both = isinstance(value, dict) and isinstance(merged.get(name), dict)
        merged[name] = _merged(merged[name], value) if both else value
    return merged


def request_hash(definition: Definition, dataset: str) -> str:
    """Return 16 hex digits over what decides which rows come back: coverage under another hash is another coverage.

    Host, account, limits, faults, paging, timing and columns are left out: changing them asks nothing again (what a
    changed column means for rows that are there already is `marketsync plan diff`'s to tell).
    """
    spec = definition.datasets[dataset]
    text = json.dumps(
        {
            "request": spec.request.model_dump(mode="json", exclude={"timeout", "weight", "headers"}),
            "over": sorted(spec.over.subjects),
            "response": spec.response.model_dump(mode="json", exclude={"unpack", "encoding"}),
            "key": spec.key,
        },
        sort_keys=True,
    )
    return hashlib.sha256(text.encode()).hexdigest()[:16]
