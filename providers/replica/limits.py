"""Accounts, rates and quotas of the replica: who may ask, how often, and what the clock says.

A rate is a sliding window of seconds, a day's quota a counter that starts again at midnight in the provider's zone. An
account has several at once. The wording of a refusal belongs to the provider fronts; this module only decides.
"""

from __future__ import annotations

import re
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

from marketsync.errors import ConfigurationError

DAY_RESET_ZONE = {"alpaca": "America/New_York", "tushare": "Asia/Shanghai", "nasdaq_data_link": "UTC"}

TIERS: dict[str, dict[str, list[dict[str, Any]]]] = {
    "alpaca": {
        "free": [{"requests": 200, "per": "minute"}],
        "plus": [{"requests": 10_000, "per": "minute"}],
    },
    "tushare": {
        "points-120": [
            {"requests": 50, "per": "minute", "each": "api"},
            {"requests": 8_000, "per": "day", "each": "api"},
        ],
        "points-2000": [
            {"requests": 200, "per": "minute", "each": "api"},
            {"requests": 100_000, "per": "day", "each": "api"},
        ],
        "points-5000": [{"requests": 500, "per": "minute", "each": "api"}],
    },
    "nasdaq_data_link": {
        "anonymous": [{"requests": 20, "per": "10 minutes"}, {"requests": 50, "per": "day"}],
        "free": [
            {"requests": 300, "per": "10 seconds"},
            {"requests": 2_000, "per": "10 minutes"},
            {"requests": 50_000, "per": "day"},
        ],
        "premium": [{"requests": 5_000, "per": "10 minutes"}, {"requests": 720_000, "per": "day"}],
    },
}
DEFAULT_TIER = {"alpaca": "free", "tushare": "points-2000", "nasdaq_data_link": "free"}
PROVIDERS = tuple(TIERS)

ALPACA_KEY, ALPACA_SECRET = "REPLICA-KEY", "replica-secret"
TUSHARE_TOKEN = "replica-token"
NASDAQ_KEY = "replica-key"
ANONYMOUS = "anonymous"
DEFAULT_ACCOUNTS: dict[str, dict[str, dict[str, Any]]] = {
    "alpaca": {ALPACA_KEY: {"secret": ALPACA_SECRET}},
    "tushare": {TUSHARE_TOKEN: {}},
    "nasdaq_data_link": {NASDAQ_KEY: {}, ANONYMOUS: {"limits": "anonymous"}},
}


class ReplicaClock:
    """The replica's time in Unix seconds: a source that runs (or stands), moved forward by hand."""

    def __init__(self, source: Any = time.time) -> None:
        """`source`: a function that returns Unix seconds, or an object with `timestamp()`."""
        self._read: Callable[[], Any] = source if callable(source) else source.timestamp
        self._offset = 0.0

    def now(self) -> float:
        return self._read() + self._offset

    def advance(self, seconds: float) -> float:
        """Move forward (a negative number moves back); returns the new time."""
        self._offset += seconds
        return self.now()

    def set(self, unix: float) -> float:
        """Let it be `unix` now; from there it runs on with its source."""
        return self.advance(unix - self.now())


@dataclass(frozen=True)
class Window:
    """At most `requests` in any `seconds`; with `zone`, in a calendar day of that zone instead."""

    requests: int
    seconds: float
    zone: str | None = None
    each_api: bool = False

    @property
    def refusal(self) -> str:
        """Which of the provider's refusals fits: too_frequent, hour_quota or day_quota."""
        if self.zone is not None:
            return "day_quota"
        return "hour_quota" if self.seconds >= 3600 else "too_frequent"


@dataclass(frozen=True)
class Admission:
    """What the limits say to one request.

    `refused` is the window it would have exceeded. `limit`, `remaining` and `reset` describe the shortest window:
    `reset` (Unix seconds) is when all of it is free again, or, for a refusal, when the next request is let through.
    """

    refused: Window | None
    limit: int
    remaining: int
    reset: float


class Meter:
    """The windows of one account, counting admitted requests only; safe for threads."""

    def __init__(self, windows: Sequence[Window]) -> None:
        # The longest first: who has spent the day is told so, not that he is too quick.
        self.windows = sorted(windows, key=lambda w: -w.seconds)
        self._spent: dict[tuple[int, str], deque[float]] = {}
        self._days: dict[tuple[int, str], tuple[float, int]] = {}
        self._lock = threading.Lock()

    def admit(self, api: str, clock: ReplicaClock) -> tuple[float, Admission | None]:
        """Judge a request for `api` received now: (the time received, the verdict or None without limits)."""
        with self._lock:
            now = clock.now()
            if not self.windows:
                return now, None
            told = [self._look(n, window, api, now) for n, window in enumerate(self.windows)]
            for admission in told:
                if admission.refused is not None:
                    return now, admission
            for n, window in enumerate(self.windows):
                self._charge(n, window, api, now)
            shortest = told[-1]
            return now, Admission(None, shortest.limit, shortest.remaining - 1, shortest.reset)

    def _look(self, n: int, window: Window, api: str, now: float) -> Admission:
        key = (n, api if window.each_api else "")
        if window.zone is not None:
            reset, used = self._days.get(key, (0.0, 0))
            if now >= reset:
                reset, used = next_midnight(now, window.zone), 0
                self._days[key] = (reset, 0)
            refused = window if used >= window.requests else None
            return Admission(refused, window.requests, max(0, window.requests - used), reset)
        spent = self._spent.setdefault(key, deque())
        while spent and spent[0] <= now - window.seconds:
            spent.popleft()
        remaining = window.requests - len(spent)
        if remaining <= 0:
            return Admission(window, window.requests, 0, spent[0] + window.seconds)
        return Admission(None, window.requests, remaining, now + window.seconds)

    def _charge(self, n: int, window: Window, api: str, now: float) -> None:
        key = (n, api if window.each_api else "")
        if window.zone is not None:
            reset, used = self._days[key]
            self._days[key] = (reset, used + 1)
        else:
            self._spent[key].append(now)


@dataclass(frozen=True)
class Account:
    """A key that a provider knows, what it may not do, and its meter."""

    key: str
    secret: str | None
    denied: frozenset[str]
    tier: str | None
    meter: Meter = field(compare=False)


def next_midnight(now: float, zone: str) -> float:
    """The next start of a day in `zone` after `now`, both in Unix seconds."""
    there = datetime.fromtimestamp(now, ZoneInfo(zone))
    tomorrow = (there + timedelta(days=1)).date()
    return datetime(tomorrow.year, tomorrow.month, tomorrow.day, tzinfo=ZoneInfo(zone)).timestamp()


def windows(provider: str, limits: Any) -> list[Window]:
    """The windows meant by a tier's name, "unlimited", None (the default tier), or a list of {requests, per, ...}.

    `per` is seconds, or "minute", "10 minutes", "10 s", "hour", "day"; a day is a calendar day of `zone` (default: the
    provider's own). `each: api` counts every API apart. Raises ConfigurationError naming what is wrong.
    """
    if limits is None:
        limits = DEFAULT_TIER[provider]
    if limits == "unlimited":
        return []
    if isinstance(limits, str):
        if limits not in TIERS[provider]:
            known = ", ".join([*TIERS[provider], "unlimited"])
            raise ConfigurationError(f"replica: {provider} has no tier {limits!r}; it has {known}")
        limits = TIERS[provider][limits]
    return [_window(provider, spec) for spec in limits]


def _window(provider: str, spec: Mapping[str, Any]) -> Window:
    if not isinstance(spec, Mapping) or "requests" not in spec or "per" not in spec:
        raise ConfigurationError(f"replica: a limit of {provider} needs `requests` and `per`, got {spec!r}")
    if unknown := set(spec) - {"requests", "per", "zone", "each"}:
        raise ConfigurationError(f"replica: a limit of {provider} has unknown fields {sorted(unknown)}: {dict(spec)!r}")
    each = spec.get("each") == "api"
    if spec["per"] == "day":
        return Window(int(spec["requests"]), 86_400, spec.get("zone", DAY_RESET_ZONE[provider]), each)
    return Window(int(spec["requests"]), duration(spec["per"]), None, each)


def duration(text: Any) -> float:
    """Seconds in a number, or in "minute", "10 minutes", "10 s", "1.5 hours"."""
    if isinstance(text, (int, float)) and text > 0:
        return float(text)
    form = re.fullmatch(r"(\d+(?:\.\d+)?)?\s*(s|seconds?|min|minutes?|hours?|days?)", str(text).strip())
    if form is None:
        raise ConfigurationError(f"replica: {text!r} is no duration; write 10, 'minute', '10 minutes', '2 hours'")
    unit = {"s": 1, "m": 60, "h": 3600, "d": 86_400}[form[2][0]]
    return float(form[1] or 1) * unit


def accounts(limits: Any = None, given: Mapping[str, Mapping[str, Any]] | None = None) -> dict[str, dict[str, Account]]:
    """Accounts by provider and key.

    `limits`: a tier's name for all, or {provider: tier or list of windows} for the accounts that say nothing else.
    `given`: {provider: {key: {secret, limits, denied}}}, in place of that provider's default accounts.
    """
    if isinstance(limits, str):
        limits = dict.fromkeys(PROVIDERS, limits)
    for name, by_provider in (("limits", limits), ("accounts", given)):
        if unknown := set(by_provider or {}) - set(PROVIDERS):
            raise ConfigurationError(f"replica: {name} for {sorted(unknown)}, but it plays {', '.join(PROVIDERS)} only")
    found: dict[str, dict[str, Account]] = {}
    for provider in PROVIDERS:
        stated = (given or {}).get(provider, DEFAULT_ACCOUNTS[provider])
        found[provider] = {}
        for key, options in stated.items():
            options = options or {}
            if unknown := set(options) - {"secret", "limits", "denied"}:
                raise ConfigurationError(f"replica: account {key[:4]}… of {provider} has unknown {sorted(unknown)}")
            wanted = options.get("limits", (limits or {}).get(provider))
            if key == ANONYMOUS and (limits or {}).get(provider) == "unlimited":
                wanted = "unlimited"
            found[provider][key] = Account(
                key,
                options.get("secret"),
                frozenset(options.get("denied", ())),
                wanted if isinstance(wanted, str) else None,
                Meter(windows(provider, wanted)),
            )
    return found
