"""Faults on schedule: which request is to be answered wrongly, and with which fault.

A schedule is a list of rules, as Python dicts or in a YAML or JSON file:

    - fault: too_frequent            # a name from FAULTS
      provider: tushare              # default: any
      when:
        request: 3                   # the 3rd that matches; or [1, 4]; or every 5; default: each
        probability: 0.1             # of those, this share (by the replica's seed)
        match: {path: bars, query: symbols=IBM, body: daily}    # substrings, all of them
        account: replica-token
      times: 2                       # at most so often; default: without end
      wait: 3                        # any further field is an option of the fault, see OPTIONS

Each rule counts the requests that its provider, match and account fit, also those that another rule answers. The
first rule that fires wins. What a fault sounds like is the provider fronts' business.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from marketsync.errors import ConfigurationError
from providers.replica.exchange import Request
from providers.replica.limits import PROVIDERS

# Each fault and the verdict that it should provoke; "" for the verdict of the answer itself.
FAULTS = {
    "empty": "empty",
    "no_content": "empty",
    "not_yet": "not_yet",
    "full_page_no_token": "split",
    "too_many_rows": "split",
    "too_frequent": "cool_down",
    "hour_quota": "quota",
    "day_quota": "quota",
    "wrong_argument": "drop",
    "expired_token": "refresh_auth",
    "bad_key": "stop_provider",
    "no_permission": "stop_dataset",
    "timeout": "retry",
    "connection_reset": "retry",
    "server_error": "retry",
    "bad_gateway": "retry",
    "unavailable": "retry",
    "truncated": "retry",
    "malformed": "retry",
    "html_in_200": "retry",
    "token_refused": "restart",
    "unknown_error": "fail",
    "slow": "",
}

OPTIONS = {
    "wait": "too_frequent, unavailable: seconds until it may be asked again (default 1); in headers, never enforced",
    "retry_after": "too_frequent, hour_quota, day_quota, unavailable: send Retry-After (default false)",
    "reset_header": "too_frequent, hour_quota, day_quota of Alpaca: send X-RateLimit-Reset (default true)",
    "limit": "too_frequent, hour_quota, day_quota: the number in the message",
    "wording": "too_frequent of Tushare: 'new' for its newer message",
    "seconds": "timeout: how long the connection hangs (default 3600); slow: how long the body takes (default 1)",
    "at": "connection_reset: 'start' (default, before any byte) or 'middle' (of the body)",
    "cap": "full_page_no_token: rows of the cut page (default: the limit asked for)",
}


@dataclass
class Rule:
    """One rule and how often it was met; `options` are for the provider's words and the server."""

    fault: str
    provider: str | None = None
    account: str | None = None
    match: Mapping[str, str] = field(default_factory=dict)
    requests: frozenset[int] | None = None
    every: int | None = None
    probability: float = 1.0
    times: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    seen: int = 0
    fired: int = 0

    def fits(self, provider: str, account: str, request: Request) -> bool:
        texts = {"path": request.path, "query": request.target.partition("?")[2], "body": ""}
        if "body" in self.match:
            texts["body"] = request.body.decode("utf-8", "replace")
        return (
            self.provider in (None, provider)
            and self.account in (None, account)
            and all(text in texts[where] for where, text in self.match.items())
        )

    def due(self) -> bool:
        """Whether the request just counted is one of those chosen."""
        if self.times is not None and self.fired >= self.times:
            return False
        if self.requests is not None:
            return self.seen in self.requests
        return self.every is None or self.seen % self.every == 0


class Schedule:
    """The rules in force; safe for threads and for change while the replica runs."""

    def __init__(self, rules: Sequence[Mapping[str, Any]], seed: int) -> None:
        self._rules = [rule(spec) for spec in rules]
        self._random = random.Random(seed)
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._rules)

    def put(self, rules: Sequence[Mapping[str, Any]], add: bool = False) -> None:
        """Replace the rules (or `add` to them); nothing changes when one of them is wrong."""
        read = [rule(spec) for spec in rules]
        with self._lock:
            self._rules = [*self._rules, *read] if add else read

    def choose(self, provider: str, account: str, request: Request) -> Rule | None:
        """The rule that answers this request, if any; counts the request in every rule it fits."""
        if not self._rules:
            return None
        with self._lock:
            found = None
            for candidate in self._rules:
                if not candidate.fits(provider, account, request):
                    continue
                candidate.seen += 1
                if found is None and candidate.due() and self._random.random() < candidate.probability:
                    candidate.fired += 1
                    found = candidate
            return found


def rule(spec: Mapping[str, Any]) -> Rule:
    """One rule from a mapping. Raises ConfigurationError naming the field and what would be right."""
    if not isinstance(spec, Mapping):
        raise ConfigurationError(f"replica fault {spec!r}: give a mapping with at least `fault`")
    spec = dict(spec)
    name, provider, times = spec.pop("fault", None), spec.pop("provider", None), spec.pop("times", None)
    when = spec.pop("when", None) or {}
    if name not in FAULTS:
        raise ConfigurationError(f"replica fault {name!r} is unknown; known are {', '.join(FAULTS)}")
    if provider is not None and provider not in PROVIDERS:
        raise ConfigurationError(f"replica fault {name}: provider {provider!r} is not one of {', '.join(PROVIDERS)}")
    if unknown := set(spec) - set(OPTIONS):
        raise ConfigurationError(
            f"replica fault {name}: unknown fields {sorted(unknown)}; known are fault, provider, when, times, "
            f"{', '.join(OPTIONS)}"
        )
    if unknown := set(when) - {"request", "probability", "match", "account"}:
        raise ConfigurationError(
            f"replica fault {name}: `when` has unknown fields {sorted(unknown)}; "
            "known are request, probability, match, account"
        )
    match = when.get("match") or {}
    if not isinstance(match, Mapping) or set(match) - {"path", "query", "body"}:
        raise ConfigurationError(f"replica fault {name}: `match` takes path, query and body, got {match!r}")
    requests, every = _which(name, when.get("request"))
    return Rule(
        fault=name,
        provider=provider,
        account=when.get("account"),
        match={where: str(text) for where, text in match.items()},
        requests=requests,
        every=every,
        probability=float(when.get("probability", 1.0)),
        times=times,
        options=spec,
    )


def _which(name: str, text: Any) -> tuple[frozenset[int] | None, int | None]:
    if text is None:
        return None, None
    if isinstance(text, int):
        return frozenset([text]), None
    if isinstance(text, Sequence) and not isinstance(text, str) and all(isinstance(n, int) for n in text):
        return frozenset(text), None
    words = text.split() if isinstance(text, str) else []
    if len(words) == 2 and words[0] == "every" and words[1].isdecimal() and int(words[1]) > 0:
        return None, int(words[1])
    raise ConfigurationError(f"replica fault {name}: `request` is {text!r}; give 3, [1, 4] or 'every 5'")
