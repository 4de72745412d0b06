"""What an answer means: a dataset's rules, then its definition's, then the built-in ones; the first that applies wins.
Pure.

Rules are judged before any row is read. What then happens is the engine's (`tasks/`); how an answer is told apart for
a provider is data in its definition. A built-in rule never guesses that rows are there or that there are none: what
is not clear is RETRY, DROP or FAIL, and reported.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any

from marketsync.definition import Dataset, Definition, Fault, Format, Verdict
from marketsync.durations import Span, Unit, parse_span
from providers.decode import UNREAD, Opened, walk
from providers.transport import Answer, Trouble

COOL_DOWN_SECONDS = 60.0
"""How long to wait when a provider says "too frequent" and not how long."""

LEAST_WAIT_SECONDS = 1.0
"""A reset that has passed already (clocks differ) still gives the provider this long."""

BODY_BYTES_SEARCHED = 65_536
_WORDS_MOST = 300


@dataclass(frozen=True)
class Ruling:
    """What an answer means.

    `until` and `wait_seconds` say the same, as an instant and from the answer on; both are None where nothing is said
    (QUOTA: until the quota's reset). `learned_limit` is the real limit for `per`, read from the provider's words.
    `rule` is the position among the dataset's rules followed by the definition's; None for a built-in one.
    """

    verdict: Verdict
    message: str = ""
    wait_seconds: float | None = None
    until: datetime | None = None
    per: Span | None = None
    learned_limit: int | None = None
    rule: int | None = None


@dataclass(frozen=True)
class Asked:
    """What the built-in rule for 404 has to know: whether a request names a file by its session or whole window,
    until when its rows can still be late, and how it was sent."""

    by_file: bool = False
    late_until: datetime | None = None


class Rules:
    """The rules of one dataset, compiled once. Nothing changes after that; threads share it."""

    def __init__(self, definition: Definition, dataset: str):
        spec = definition.datasets[dataset]
        self._rules = [_Rule(index, fault) for index, fault in enumerate((*spec.faults, *definition.faults))]
        self._spec = spec

    def judge(self, answer: Answer, opened: Opened | None, asked: Asked = Asked()) -> Ruling:
        """Return what an answer means. `opened` is None when its body is not what the definition's format says; a
        body without rows of its own (an error) is opened all the same."""
        if answer.trouble is not None:
            return _troubled(answer)
        document = opened.document if opened is not None else None
        for rule in self._rules:
            ruling = rule.judge(answer, document)
            if ruling is not None:
                return ruling
        return _built_in(answer, document, self._spec, opened is not None, asked)


def classify(rules: Sequence[Fault], answer: Answer, document: Any, dataset: Dataset, asked: Asked = Asked()) -> Ruling:
    """Judge one answer by rules that are not compiled beforehand (`Rules` is for many answers)."""
    if answer.trouble is not None:
        return _troubled(answer)
    for index, fault in enumerate(rules):
        ruling = _Rule(index, fault).judge(answer, document)
        if ruling is not None:
            return ruling
    return _built_in(answer, document, dataset, True, asked)


# ---------------------------------------------------------------- declared rules


class _Rule:
    """One rule, compiled."""

    def __init__(self, index: int, fault: Fault):
        self._index = index
        self._fault = fault
        when = fault.when
        self._statuses = frozenset(status for status in when.status if isinstance(status, int))
        self._classes = frozenset(int(status[0]) for status in when.status if isinstance(status, str))
        self._headers = [(name.lower(), re.compile(pattern)) for name, pattern in when.header.items()]
        self._paths = [(path, _Wanted(value)) for path, value in when.path.items()]
        self._body = re.compile(when.body) if when.body is not None else None
        self._content_type = re.compile(when.content_type, re.IGNORECASE) if when.content_type is not None else None

    def judge(self, answer: Answer, document: Any) -> Ruling | None:
        """Return the ruling when all of the rule holds; the groups are those of the first pattern that has any."""
        status = answer.status
        if (self._statuses or self._classes) and status not in self._statuses and status // 100 not in self._classes:
            return None
        found: list[re.Match[str]] = []
        for path, wanted in self._paths:
            held, match = wanted.holds(walk(document, path))
            if not held:
                return None
            if match is not None:
                found.append(match)
        if self._headers or self._content_type is not None:
            headers = {name.lower(): value for name, value in answer.headers.items()}
            for name, pattern in self._headers:
                match = pattern.search(headers.get(name, ""))
                if name not in headers or match is None:
                    return None
                found.append(match)
            if self._content_type is not None and self._content_type.search(headers.get("content-type", "")) is None:
                return None
        if self._body is not None:
            match = self._body.search(answer.body[:BODY_BYTES_SEARCHED].decode("utf-8", "replace"))
            if match is None:
                return None
            found.append(match)
        return self._ruling(answer, document, next((match for match in found if match.re.groups), None))

    def _ruling(self, answer: Answer, document: Any, match: re.Match[str] | None) -> Ruling:
        fault = self._fault
        ruling = Ruling(
            fault.then,
            provider_words(answer, document, fault.say),
            per=parse_span(fault.per) if fault.per else None,
            rule=self._index,
        )
        if fault.limit is not None:
            number = _group(match, fault.limit)
            ruling = replace(ruling, learned_limit=int(number) if number is not None and number >= 1 else None)
        if fault.wait is not None:
            until = _waits_until(fault.wait, Unit(fault.unit), answer, match)
            if until is not None:
                return _waiting(ruling, until, answer)
        if fault.then is Verdict.COOL_DOWN:
            return _cooling(ruling, answer)
        return ruling


class _Wanted:
    """The value a path must have: a value, one of several, a /pattern/, `not X`, or null for absent."""

    def __init__(self, value: Any):
        self._negated = isinstance(value, str) and value.startswith("not ")
        if self._negated:
            value = value.removeprefix("not ").strip()
            self._null = value == "null"
        else:
            self._null = value is None
        self._pattern = None
        if isinstance(value, str) and len(value) > 1 and value.startswith("/") and value.endswith("/"):
            self._pattern = re.compile(value[1:-1], re.DOTALL)
        self._texts = {_plain(item) for item in (value if isinstance(value, list | tuple) else [value])}

    def holds(self, value: Any) -> tuple[bool, re.Match[str] | None]:
        """Return whether the value is the wanted one, and the match when a pattern found it."""
        if self._null:
            return (value is None) != self._negated, None
        if value is None or value is UNREAD:
            return False, None  # what is absent, or not read yet, neither is nor is not a value
        if self._pattern is not None:
            match = self._pattern.search(_plain(value))
            return (match is not None) != self._negated, None if self._negated else match
        return (_plain(value) in self._texts) != self._negated, None


def _plain(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return json.dumps(value, ensure_ascii=False)  # 40203, true, ["EAPI:Rate limit exceeded"]


# ---------------------------------------------------------------- built-in rules


def _troubled(answer: Answer) -> Ruling:
    passing = answer.trouble is not None and answer.trouble.passing
    if passing:
        return Ruling(Verdict.RETRY, answer.message)
    if answer.trouble is Trouble.TOO_LARGE:
        return Ruling(Verdict.SPLIT, answer.message)
    return Ruling(Verdict.FAIL, answer.message)


def _built_in(answer: Answer, document: Any, dataset: Dataset, readable: bool, asked: Asked) -> Ruling:
    status = answer.status
    said = provider_words(answer, document, None)
    if status == 204:
        return Ruling(Verdict.EMPTY)
    if 200 <= status < 300:
        if not readable:
            return Ruling(Verdict.RETRY, f"the answer is not valid {dataset.response.format.value.upper()}: {said}")
        if _is_page(answer):
            return Ruling(Verdict.RETRY, f"a web page came where {dataset.response.format.value.upper()} is expected")
        if not answer.body.strip() and dataset.response.format is Format.CSV:
            return Ruling(Verdict.EMPTY)
        return Ruling(Verdict.ROWS)
    if status >= 500 or status == 408:
        after = _header(answer, "retry-after")
        until = instant_of(after, answer.answered_at) if after else None
        return _waiting(Ruling(Verdict.RETRY, said), until, answer) if until else Ruling(Verdict.RETRY, said)
    if status in (418, 429):
        return _cooling(Ruling(Verdict.COOL_DOWN, said), answer)
    if status == 401:
        return Ruling(Verdict.STOP_PROVIDER, said)
    if status == 403:
        return Ruling(Verdict.STOP_DATASET, said)
    if status == 404:
        # A file that is not there yet and one that never will be look alike. Inside the grace period it may be late;
        # after it, and for any other request, it is a question the provider does not know: reported, never taken for
        # an empty answer. A definition whose 404 means "nothing that day" says so with a rule.
        late = asked.by_file and asked.late_until is not None and answer.answered_at < asked.late_until
        return Ruling(Verdict.NOT_YET if late else Verdict.DROP, said)
    if status in (400, 410, 414, 422):
        return Ruling(Verdict.DROP, said)
    if 300 <= status < 400:
        return Ruling(Verdict.FAIL, f"the answer is a redirect ({status}) that leads nowhere it may be followed")
    return Ruling(Verdict.FAIL, said)


def _is_page(answer: Answer) -> bool:
    if "html" not in (_header(answer, "content-type") or "").lower():
        return False
    return answer.body.lstrip()[:1] == b"<"


def _cooling(ruling: Ruling, answer: Answer) -> Ruling:
    """Wait as Retry-After says, else as the rate limit's window says, else a minute."""
    after = _header(answer, "retry-after")
    until = instant_of(after, answer.answered_at) if after else None
    if until is None:
        seconds = COOL_DOWN_SECONDS
        if ruling.per is not None and ruling.per.unit not in (Unit.MONTH, Unit.YEAR, Unit.SESSION):
            seconds = ruling.per.seconds
        until = answer.answered_at + timedelta(seconds=seconds)
    return _waiting(ruling, until, answer)


def _waiting(ruling: Ruling, until: datetime, answer: Answer) -> Ruling:
    seconds = max((until - answer.answered_at).total_seconds(), LEAST_WAIT_SECONDS)
    return replace(ruling, wait_seconds=seconds, until=answer.answered_at + timedelta(seconds=seconds))


# ---------------------------------------------------------------- waits


def _waits_until(wait: str, unit: Unit, answer: Answer, match: re.Match[str] | None) -> datetime | None:
    """Return the instant a rule's `wait` names; None when the answer does not say."""
    if wait.startswith("$header."):
        value = _header(answer, wait.removeprefix("$header."))
        return None if value is None else instant_of(value, answer.answered_at)
    if wait.startswith("$match."):
        number = _group(match, wait)
        if number is None:
            return None
        return _of_number(number, answer.answered_at, Span(1, unit).seconds)
    return answer.answered_at + timedelta(seconds=parse_span(wait).approximate_seconds)


def instant_of(text: str, answered_at: datetime) -> datetime | None:
    """Read Retry-After or a reset header: seconds to go, Unix seconds or milliseconds, or a date; None otherwise."""
    text = text.strip()
    try:
        return _of_number(float(text), answered_at, 1.0)
    except ValueError:
        pass
    try:
        moment = parsedate_to_datetime(text)
    except (TypeError, ValueError, IndexError):
        try:
            moment = datetime.fromisoformat(text)
        except ValueError:
            return None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).astimezone(UTC)


def _of_number(number: float, answered_at: datetime, unit_seconds: float) -> datetime | None:
    """A number beyond 2001 in Unix seconds is an instant (beyond 1e11: in milliseconds), a smaller one is to go."""
    try:
        if number >= 1e11:
            return datetime.fromtimestamp(number / 1000, UTC)
        if number >= 1e9:
            return datetime.fromtimestamp(number, UTC)
        return answered_at + timedelta(seconds=max(0.0, number) * unit_seconds) if number >= 0 else None
    except (OverflowError, ValueError, OSError):
        return None


def _group(match: re.Match[str] | None, name: str) -> float | None:
    if match is None:
        return None
    try:
        text = match.group(int(name.removeprefix("$match.")))
        return None if text is None else float(text.replace(",", ""))
    except (IndexError, ValueError):
        return None


# ---------------------------------------------------------------- the provider's words


_USUAL_WORDS = ("message", "msg", "error", "error_message", "detail", "Information", "Note", "Error Message", "errors")


def provider_words(answer: Answer, document: Any, say: str | None) -> str:
    """Return what the provider says, for the report: at `say`, or where messages usually are; not redacted."""
    value = walk(document, say) if say else None
    if value is None and isinstance(document, Mapping):
        value = next((document[name] for name in _USUAL_WORDS if document.get(name)), None)
    if isinstance(value, Mapping):
        value = next((value[name] for name in _USUAL_WORDS if value.get(name)), value)
    if value is None and answer.status >= 400:
        value = _first_line(answer.body)
    if not isinstance(value, str):
        value = "" if value is None or value is UNREAD else json.dumps(value, ensure_ascii=False, default=str)
    text = " ".join(value.split())
    return text if len(text) <= _WORDS_MOST else text[: _WORDS_MOST - 3] + "..."


def _first_line(body: bytes) -> str | None:
    text = body[:2_000].decode("utf-8", "replace")
    if text.lstrip()[:1] == "<":  # of a web page, its title or its words
        title = re.search(r"<title[^>]*>(.*?)</title>", text, re.IGNORECASE | re.DOTALL)
        text = title[1] if title else re.sub(r"<[^>]*>", " ", text)
    return text.strip() or None


def _header(answer: Answer, name: str) -> str | None:
    name = name.lower()
    return next((value for key, value in answer.headers.items() if key.lower() == name), None)
