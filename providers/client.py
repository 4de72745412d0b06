"""One request, one answer, one outcome: the client of one account at one provider.

Everything a provider is made of is data (its definition); this strings the parts together: `request.py` builds,
the transport sends inside the limits, `faults.py` judges, `decode.py` reads rows, `paging.py` says what comes next.
It never loops over pages and never retries: the engine (`tasks/`) does, since it knows what is durable.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

import msgspec

from marketsync.clock import Clock
from marketsync.definition import Definition, Scope, Verdict
from marketsync.document import FieldPath, dotted
from marketsync.durations import Span, Unit, parse_span
from marketsync.errors import ConfigurationError
from marketsync.gate import Batch
from marketsync.names import wrong_names
from marketsync.schema import ColumnType
from marketsync.upstream import Upstream
from providers.decode import Decoder, Malformed, Opened, Unexpected
from providers.faults import Asked, Rules, Ruling, provider_words
from providers.limits import Limiter
from providers.paging import next_step
from providers.redaction import hide
from providers.request import Ask, Prepared, constants, prepare, token_request
from providers.secrets import SECRET, Secrets
from providers.transport import Answer, HttpRequest, Transport

__all__ = ["Ask", "Client", "Outcome"]

RAW_BYTES = 4_096
TOKEN_MARGIN = timedelta(seconds=30)  # a token is renewed this long before it expires

_NIGHT_SESSION = timedelta(days=4)  # a session's first rows can be of the evening before a weekend and a holiday
_AFTER_SESSION = timedelta(days=1)


@dataclass(frozen=True)
class Outcome:
    """What one request came to.

    `batch` holds the rows (verdicts ROWS and EMPTY only) for `marketsync.gate.seal`; `rows` counts them as answered;
    `cursor` is the next page's, None at the end of the chain. `label` tells a person which request it was; `raw` is
    the beginning of an answer that had no rows. Neither holds a secret. `requests` counts what was sent.
    """

    verdict: Verdict
    ruling: Ruling
    label: str
    sent_at: datetime
    answered_at: datetime
    status: int = 0
    bytes: int = 0
    rows: int = 0
    batch: Batch | None = None
    cursor: dict[str, Any] | None = None
    raw: str | None = None
    requests: int = 1

    @property
    def message(self) -> str:
        """What the provider, or we, have to say about it."""
        return self.ruling.message

    @property
    def wait_seconds(self) -> float | None:
        """How long after the answer nothing may be asked."""
        return self.ruling.wait_seconds

    @property
    def until(self) -> datetime | None:
        """Until when nothing may be asked."""
        return self.ruling.until


@dataclass(frozen=True)
class _Token:
    value: str
    expires: datetime | None


class _Refused(Exception):
    """No token came; what the answer to asking for it means."""

    def __init__(self, ruling: Ruling, request: HttpRequest, answer: Answer):
        super().__init__(ruling.message)
        self.ruling, self.request, self.answer = ruling, request, answer


_tokens: dict[tuple[str, str, str, str | None], _Token] = {}
_tokens_lock = threading.Lock()


class Client:
    """Asks one account at one provider. Thread-safe.

    `place` tells a person where a field of the definition stands (its file and line, where they are known).
    ConfigurationError from the constructor: the definition uses $names that do not exist.
    """

    def __init__(
        self,
        name: str,
        definition: Definition,
        upstream: Upstream,
        transport: Transport,
        limiter: Limiter,
        secrets: Secrets,
        clock: Clock,
        place: Callable[[FieldPath], str] = dotted,
    ):
        wrong = [f"{dotted(path)}: {message} ({remedy})" for path, message, remedy in wrong_names(definition)]
        if wrong:
            raise ConfigurationError(f"the definition of {name} cannot be used: {'; '.join(wrong)}")
        self.name = name
        self.definition = definition
        self.base_url = upstream.base_url or definition.base_url
        self._transport, self._limiter, self._secrets, self._clock = transport, limiter, secrets, clock
        self._decoders: dict[str, Decoder] = {}
        self._rules: dict[str, Rules] = {}
        self._grace = {name: parse_span(spec.grace).approximate_seconds for name, spec in definition.datasets.items()}
        self._place = place
        self._token_lock = threading.Lock()
        self._last = threading.local()

    def ask(
        self,
        ask: Ask,
        cursor: Mapping[str, Any] | None = None,
        max_wait_seconds: float = 600.0,
        wake: threading.Event | None = None,
        priority: int = 0,
    ) -> Outcome:
        """Send one request (a second one when a token had to be renewed) and tell what its answer means.

        Raises
        ------
        WaitingForQuota
            A limit has no room for longer than `max_wait_seconds`.
        Interrupted
            `wake` was set while waiting.
        ConfigurationError
            The request cannot be built, or a secret has no value (SecretMissing).
        """

        def send(request: HttpRequest) -> Answer:
            return self._transport.send(
                request, self._limiter, max_wait_seconds=max_wait_seconds, wake=wake, priority=priority
            )

        if ask.dataset not in self.definition.datasets:
            known = ", ".join(self.definition.datasets)
            raise ConfigurationError(f"{self.name} has no dataset '{ask.dataset}'; datasets: {known}")
        sent = 0
        bearer: str | None = None
        renewed = False
        while True:
            try:
                if self.definition.auth.oauth2 is not None:
                    bearer, asked = self._bearer(bearer, send)
                    sent += asked
            except _Refused as refused:
                return self._without_rows(refused.ruling, refused.request, refused.answer, sent + 1)
            request = self._prepared(ask).page(cursor, bearer)
            answer = send(request)
            sent += 1
            self._limiter.learn(answer.headers, answer.answered_at, ask.dataset)
            opened, ruling = self._judge(ask, answer)
            if ruling.verdict is Verdict.STOP_PROVIDER and ruling.rule is None and bearer is not None:
                ruling = replace(ruling, verdict=Verdict.REFRESH_AUTH)  # 401 to a token: it may only have expired
            if ruling.verdict is Verdict.REFRESH_AUTH and bearer is not None and not renewed:
                renewed = True
                continue
            return self._outcome(ask, cursor, request, answer, opened, ruling, sent)

    def _prepared(self, ask: Ask) -> Prepared:
        """Return what the pages of a chain share; a thread follows one chain at a time, so one is kept for each."""
        last = getattr(self._last, "prepared", None)
        if last is None or last[0] is not ask:
            last = (ask, prepare(self.definition, ask, self._secrets, base_url=self.base_url))
            self._last.prepared = last
        return last[1]

    def describe(self, ask: Ask, cursor: Mapping[str, Any] | None = None) -> str:
        """Return the request as a person reads it, without sending it."""
        return self._prepared(ask).page(cursor).label

    # ------------------------------------------------------------ judging

    def _decoder(self, dataset: str) -> Decoder:
        if dataset not in self._decoders:
            self._decoders[dataset] = Decoder(self.definition.datasets[dataset])
            self._rules[dataset] = Rules(self.definition, dataset)
        return self._decoders[dataset]

    def _judge(self, ask: Ask, answer: Answer) -> tuple[Opened | None, Ruling]:
        decoder = self._decoder(ask.dataset)
        opened: Opened | None = None
        trouble = ""
        if answer.trouble is None:
            if 200 <= answer.status < 300:
                try:
                    opened = decoder.open(answer.body)
                except Malformed as error:
                    trouble = str(error)
                except Unexpected as error:
                    return None, self._unexpected(ask, error)
            else:
                opened = Opened(_document(answer.body), (), False, answer.body)
        end = ask.window_end or ask.end
        dataset = self.definition.datasets[ask.dataset]
        asked = Asked(
            by_file=ask.session is not None or dataset.whole_windows,
            late_until=None if end is None else end + timedelta(seconds=self._grace[ask.dataset]),
        )
        ruling = self._rules[ask.dataset].judge(answer, opened, asked)
        if trouble and ruling.rule is None and ruling.verdict is Verdict.RETRY:
            ruling = replace(ruling, message=trouble)
        return opened, ruling

    def _outcome(
        self,
        ask: Ask,
        cursor: Mapping[str, Any] | None,
        request: HttpRequest,
        answer: Answer,
        opened: Opened | None,
        ruling: Ruling,
        sent: int,
    ) -> Outcome:
        if ruling.verdict in (Verdict.STOP_PROVIDER, Verdict.REFRESH_AUTH) or answer.status == 401:
            ruling = replace(ruling, message=f"{ruling.message}{self._credentials(ask)}".strip())
        if ruling.verdict not in (Verdict.ROWS, Verdict.EMPTY):
            return self._without_rows(self._heeded(ask, ruling), request, answer, sent)
        dataset = self.definition.datasets[ask.dataset]
        decoder = self._decoder(ask.dataset)
        document = opened.document if opened is not None else None
        try:
            if ruling.verdict is Verdict.EMPTY or opened is None:
                batch = decoder.nothing()
            else:
                batch = decoder.rows(opened, constants(dataset, ask, self._secrets), *self._bounds(ask))
        except Malformed as error:
            return self._without_rows(Ruling(Verdict.RETRY, str(error)), request, answer, sent)
        except Unexpected as error:
            return self._without_rows(self._unexpected(ask, error), request, answer, sent)
        if ruling.verdict is Verdict.EMPTY and dataset.page.style not in ("token", "next_url"):
            following, stopped = None, None
        else:
            step = next_step(
                dataset,
                cursor,
                document,
                answer.headers,
                batch,
                self.base_url,
                request.url,
                tuple(self.definition.auth.query),
            )
            following, stopped = step.cursor, step if step.verdict is not Verdict.ROWS else None
        if stopped is not None:
            return self._without_rows(Ruling(stopped.verdict, stopped.message), request, answer, sent)
        return Outcome(
            Verdict.ROWS if batch.fetched else Verdict.EMPTY,
            ruling,
            request.label,
            answer.sent_at,
            answer.answered_at,
            answer.status,
            len(answer.body),
            batch.fetched,
            batch,
            following,
            None,
            sent,
        )

    def _unexpected(self, ask: Ask, error: Unexpected) -> Ruling:
        """Return the ruling on an answer that is not what the dataset says, with the field that says it."""
        return Ruling(Verdict.FAIL, f"{self._place(('datasets', ask.dataset, *error.field.split('.')))}: {error}")

    def _credentials(self, ask: Ask) -> str:
        """Return which secrets the requests of a dataset send, and where each was found; never what they are."""
        asked = self.definition.datasets[ask.dataset].request.model_dump_json()
        names = dict.fromkeys(SECRET.findall(self.definition.auth.model_dump_json() + asked))
        found = [f"{name}, from {origin}" for name in names if (origin := self._secrets.origin(name))]
        plural = "were the secrets" if len(found) > 1 else "was the secret"
        return f" [sent {plural} {', and '.join(found)}]" if found else ""

    def _bounds(self, ask: Ask) -> tuple[datetime | None, datetime | None]:
        """Return what the times of the rows must be within.

        A session's rows with times can be of another day in UTC, and a night session's of days before; those with
        dates cannot.
        """
        start, end = ask.window_start or ask.start, ask.window_end or ask.end
        if ask.session is not None:
            dataset = self.definition.datasets[ask.dataset]
            time = dataset.time_column
            if time is not None and dataset.columns[time].type is not ColumnType.DATE:
                return (
                    None if start is None else start - _NIGHT_SESSION,
                    None if end is None else end + _AFTER_SESSION,
                )
        return start, end

    def _without_rows(self, ruling: Ruling, request: HttpRequest, answer: Answer, sent: int) -> Outcome:
        ruling = replace(ruling, message=self._secrets.redact(ruling.message))
        return Outcome(
            ruling.verdict,
            ruling,
            request.label,
            answer.sent_at,
            answer.answered_at,
            answer.status,
            len(answer.body),
            raw=self._secrets.redact(answer.body[:RAW_BYTES].decode("utf-8", "replace")),
            requests=sent,
        )

    # ------------------------------------------------------------ what limits learn from an answer

    def _heeded(self, ask: Ask, ruling: Ruling) -> Ruling:
        """Let the limiter hold every thread and process back as the answer says; fill in a quota's reset."""
        if ruling.verdict not in (Verdict.COOL_DOWN, Verdict.QUOTA):
            return ruling
        dataset = ask.dataset if self._is_counted_by_dataset(ask.dataset, ruling.per) else None
        why = ruling.message or "the provider asked for a pause"
        if ruling.learned_limit is not None:
            # said in answer to this dataset: others may be allowed far more
            self._limiter.learn_limit(ruling.per or Span(1, Unit.MINUTE), ruling.learned_limit, ask.dataset)
        if ruling.until is not None:
            self._limiter.cool_down(ruling.until, dataset, self._secrets.redact(why))
        elif ruling.verdict is Verdict.QUOTA:
            ruling = replace(ruling, until=self._limiter.spent(ruling.per, ask.dataset))
        return ruling

    def _is_counted_by_dataset(self, dataset: str, per: Span | None) -> bool:
        """Whether what is spent is counted for this dataset by itself, so that others may go on."""
        spec = self.definition.datasets[dataset]
        own = [*spec.limits, *(limit for limit in self.definition.limits if limit.scope is Scope.DATASET)]
        return any(limit.per is not None and (per is None or parse_span(limit.per) == per) for limit in own)

    # ------------------------------------------------------------ OAuth 2

    def _bearer(self, refused: str | None, send: Any) -> tuple[str, int]:
        """Return a token other than the refused one, and how many requests that took."""
        oauth2 = self.definition.auth.oauth2
        assert oauth2 is not None
        key = (self.base_url, oauth2.token_url, self._secrets.fill(oauth2.client_id), oauth2.scope)
        with self._token_lock:  # one thread fetches, the others then use what it got
            with _tokens_lock:
                token = _tokens.get(key)
            fresh = token is not None and (token.expires is None or self._clock.now() < token.expires)
            if token is not None and fresh and token.value != refused:
                return token.value, 0
            request = token_request(self.definition, oauth2, self._secrets, self.base_url)
            answer = send(request)
            token = self._read_token(request, answer)
            with _tokens_lock:
                _tokens[key] = token
            return token.value, 1

    def _read_token(self, request: HttpRequest, answer: Answer) -> _Token:
        document = _document(answer.body)
        value = document.get("access_token") if isinstance(document, Mapping) else None
        if answer.trouble is None and 200 <= answer.status < 300 and isinstance(value, str) and value:
            hide([value])
            try:
                lasts = timedelta(seconds=float(document["expires_in"])) - TOKEN_MARGIN
            except (KeyError, TypeError, ValueError, OverflowError):
                return _Token(value, None)
            return _Token(value, answer.answered_at + max(lasts, timedelta(0)))
        words = provider_words(answer, document, "error_description") or answer.message or f"HTTP {answer.status}"
        passing = (
            answer.trouble.passing
            if answer.trouble is not None
            else answer.status >= 500 or answer.status in (408, 429)
        )
        verdict = Verdict.RETRY if passing else Verdict.STOP_PROVIDER
        raise _Refused(Ruling(verdict, f"no token could be had: {words}"), request, answer)


def _document(body: bytes) -> Any:
    """Return an error's body when it is JSON, else None."""
    if body.lstrip()[:1] not in (b"{", b"["):
        return None
    try:
        return msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
