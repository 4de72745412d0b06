"""The limiter: no request is sent before every declared limit has room for it, in all threads and processes of a host.

A reservation is in the durable book before the request is sent and occupies its windows until its answer came, plus
the window; one whose answer was never recorded counts as answered when its time-out ran out. The counting is in
`limit_windows.py`, the book in `limit_book.py`, estimates in `limit_forecast.py`.

The counts are a pyrate-limiter bucket (`ReservationBucket`) and are mounted through requests-ratelimiter's adapter
(`transport.py`). The waiting is ours: pyrate's own cannot be woken by a pause, adds 50 ms to each wait, reads another
clock, knows no priority, and its verdict has no place for the reservation whose answer must be recorded.
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
import logging
import math
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Self

from pyrate_limiter import AbstractBucket, Rate, RateItem
from pyrate_limiter.abstracts.algorithm import Decision

from marketsync.clock import Clock
from marketsync.definition import Learn, Limit
from marketsync.definition import Scope as Counted
from marketsync.durations import Span, Unit, parse_daily_time, parse_span
from marketsync.errors import ConfigurationError, Interrupted, MarketSyncError, WaitingForQuota
from providers.limit_book import LimitBook, Row, SqliteBook
from providers.limit_windows import (
    HOUR_MS,
    RESET_MARGIN_MS,
    Kind,
    LimitState,
    Quota,
    Refusal,
    Resets,
    Scope,
    Window,
    longest_ms,
)

__all__ = ["LimitState", "Limiter", "Reservation", "ReservationBucket", "limits_of_tier"]

_log = logging.getLogger(__name__)

_QUEUED_FOR = (Kind.WINDOW, Kind.CONCURRENT)

DEFAULT_TIMEOUT_SECONDS = 30.0
FLUSH_AFTER_SECONDS = 0.05  # answers that no reservation has carried along are written after this long
POLL_SECONDS = 0.02  # only behind a concurrency limit or another's turn: when these end cannot be computed
GHOST_MS = 500  # who waits and has not looked this long after it said it would has lost its turn
LATE_SECONDS = 1.0  # a reservation that its thread finds later than this is given back
SWEEP_EVERY = 4_096


class Permit(RateItem):
    """One request for room, as pyrate-limiter's item: `name` is the dataset, `timestamp` Unix milliseconds."""

    def __init__(
        self,
        dataset: str,
        timestamp: int,
        weight: int = 1,
        timeout_ms: int = 30_000,
        max_wait_ms: float = -1,
        priority: int = 0,
    ):
        super().__init__(dataset, timestamp, weight)
        self.timeout_ms = timeout_ms
        self.max_wait_ms = max_wait_ms
        self.order: tuple[int, int, int] = (-priority, timestamp, 0)  # the greater priority, then who came first
        self.reservation: Reservation | None = None
        self.refusal: Refusal | None = None
        self.yields = False
        self.answered = threading.Event()


class Reservation:
    """Room for one request in every limit. Say when its answer came; unsaid, it counts until its time-out.

    As a context manager it says so when the block ends.
    """

    __slots__ = ("_bucket", "_said", "charges", "dataset", "number", "place", "sent_at", "until_ms", "weight")

    def __init__(
        self, bucket: ReservationBucket, number: int, place: int, dataset: str, weight: int, sent_at: float, until: int
    ):
        self._bucket = bucket
        self._said = False
        self.number = number
        self.place = place
        self.dataset = dataset
        self.weight = weight
        self.sent_at = sent_at  # Unix seconds
        self.until_ms = until
        self.charges: list[tuple[str, Quota, int]] = []  # (scope, quota, start of the period it was counted in)

    @property
    def deadline(self) -> float:
        """Unix seconds after which the request must not be under way any more."""
        return self.until_ms / 1000

    def answered(self, at: float | None = None) -> None:
        """Say that the last byte of the answer came at this instant (Unix seconds; now, if left out)."""
        if not self._said:
            self._said = True
            self._bucket.say(self, math.ceil((self._bucket.clock.timestamp() if at is None else at) * 1000), False)

    def unsent(self) -> None:
        """Say that the request was never sent: its room is given back."""
        if not self._said:
            self._said = True
            self._bucket.say(self, math.floor(self._bucket.clock.timestamp() * 1000), True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.answered()


class ReservationBucket(AbstractBucket):
    """All limits of one account at one provider as one pyrate-limiter bucket: an item fits all of them or none.

    `put` makes one attempt and never waits. Thread-safe; processes share the book.
    """

    is_async = False

    def __init__(
        self,
        open_book: Callable[[], LimitBook],
        clock: Clock,
        provider: str,
        account: str,
        limits: Sequence[Limit],
        dataset_limits: Mapping[str, Sequence[Limit]],
    ):
        self.clock = clock
        self.provider = provider
        self.account = account
        self.provider_key = f"provider {provider}"
        self.account_key = f"account {provider}/{account}"
        self.learners: dict[str, list[tuple[Learn, Window | Quota]]] = {}
        self.cool: dict[str, tuple[int, str]] = {}
        self._limits = tuple(limits)
        self._dataset_limits = {name: tuple(of) for name, of in dataset_limits.items()}
        self._open_book = open_book
        self._renew()
        self._scopes: dict[str, Scope] = {}
        self._routes: dict[str, tuple[Scope, ...]] = {}
        for key, counted in ((self.provider_key, Counted.PROVIDER), (self.account_key, Counted.ACCOUNT)):
            self._build(key, [limit for limit in self._limits if limit.scope is counted])
        # every rule is read now, so that a wrong one is told before the first request
        everything = [*self._limits, *itertools.chain.from_iterable(self._dataset_limits.values())]
        sliding = [counter for limit in everything if isinstance(counter := _counter(limit), Window)]
        self.learns = any(limit.learn is not None for limit in everything)
        self._rates = sorted((Rate(window.limit, window.span_ms) for window in sliding), key=lambda rate: rate.interval)
        with self.transaction():
            self.book.keep(max((window.hold_ms for window in sliding), default=0))

    def _renew(self) -> None:
        self.lock = threading.Lock()
        self.book: LimitBook = self._open_book()
        self.answers: deque[tuple[Reservation, int, bool]] = deque()
        self._stale = True
        self._since_sweep = 0
        self._dead: dict[int, tuple[bool, int]] = {}
        self._queued: dict[str, tuple[int, int, int]] = {}  # scope: (-priority, since, look) as the book has it
        self._others: dict[str, list[tuple[int, int, int, int]]] = {}

    def after_fork(self) -> None:
        """Begin anew in a child process: neither a lock nor a SQLite connection survives a fork."""
        _ABANDONED.append(self.book)  # closing it here would disturb the parent's
        self._renew()

    # ------------------------------------------------------------ scopes

    def _build(self, key: str, limits: Sequence[Limit]) -> Scope | None:
        windows: dict[int, Window] = {}
        quotas: dict[str, Quota] = {}
        concurrent: int | None = None
        learners: list[tuple[Learn, Window | Quota]] = []
        for limit in limits:
            if limit.concurrent is not None:
                concurrent = min(limit.concurrent, concurrent or limit.concurrent)
            counter = _counter(limit)
            if isinstance(counter, Window):
                kept = windows.setdefault(counter.span_ms, counter)
            elif isinstance(counter, Quota):
                kept = quotas.setdefault(counter.rule, counter)
            else:
                continue
            kept.limit = min(kept.limit, counter.limit)
            if limit.learn is not None:
                learners.append((limit.learn, kept))
        if not (windows or quotas or concurrent):
            return None
        scope = self._scopes[key] = Scope(key, list(windows.values()), list(quotas.values()), concurrent)
        if learners:
            self.learners[key] = learners
        return scope

    def dataset_key(self, dataset: str) -> str:
        """The name of what is counted for one dataset of the account."""
        return f"dataset {self.provider}/{self.account}/{dataset}"

    def route(self, dataset: str) -> tuple[Scope, ...]:
        """Everything a request for the dataset ("": for none in particular) counts in. Inside a transaction only."""
        found = self._routes.get(dataset)
        if found is None and not dataset:
            keys = (self.provider_key, self.account_key)
            return tuple(self._scopes[key] for key in keys if key in self._scopes)
        if found is None:
            own = self._dataset_limits.get(dataset, ())
            shared_key = f"dataset {self.provider}/*/{dataset}"
            shared = [limit for limit in own if limit.scope is Counted.PROVIDER]
            single = [limit for limit in own if limit.scope is not Counted.PROVIDER]
            single += [limit for limit in self._limits if limit.scope is Counted.DATASET]
            for key, limits in ((shared_key, shared), (self.dataset_key(dataset), single)):
                if key not in self._scopes and self._build(key, limits) is not None:
                    self._fill(key, dataset)
            keys = (self.provider_key, self.account_key, shared_key, self.dataset_key(dataset))
            found = self._routes[dataset] = tuple(self._scopes[key] for key in keys if key in self._scopes)
        return found

    def has_route(self, dataset: str) -> bool:
        """Whether `route` can answer outside a transaction."""
        return not dataset or dataset in self._routes

    def _fill(self, key: str, dataset: str) -> None:
        """Count in a new scope what the book already holds of it."""
        now_ms = self.now()
        scope = self._scopes[key]
        for row in self.book.rows(dataset):
            if row.account == self.account or key != self.dataset_key(dataset):
                _count(scope, row, now_ms)
        self._reread(now_ms)

    def add_window(self, key: str, dataset: str | None, window: Window) -> None:
        """Add a learned window to a scope, with what the book still knows of it. Inside a transaction only."""
        scope = self._scopes.get(key)
        if scope is None:
            scope = self._scopes[key] = Scope(key, [], [], None)
            self._routes.clear()
        scope.windows.append(window)
        self.book.keep(window.hold_ms)
        self._stale = True
        self._catch_up(True)

    def _reload(self, now_ms: int) -> None:
        """Read everything from the book: at the beginning, and after a write that failed."""
        for key, old in list(self._scopes.items()):
            for window in old.windows:
                window.slots.clear()
                window.answered = 0
            self._scopes[key] = Scope(key, old.windows, old.quotas, old.concurrent)
        self._routes.clear()
        for row in self.book.rows():
            self._apply(row, now_ms)
        self._reread(now_ms)
        self._stale = False

    def _apply(self, row: Row, now_ms: int) -> None:
        keys = [self.provider_key, f"dataset {self.provider}/*/{row.dataset}"]
        if row.account == self.account:
            keys += (self.account_key, self.dataset_key(row.dataset))
        for key in keys:
            if (scope := self._scopes.get(key)) is not None:
                _count(scope, row, now_ms)

    def _reread(self, now_ms: int) -> None:
        quotas, foreign = self.book.quotas(), self.book.foreign(now_ms)
        self.cool = self.book.cool_downs(now_ms)
        self._others = self.book.waiting(now_ms - GHOST_MS)
        for scope in self._scopes.values():
            for quota in scope.quotas:
                quota.used = quotas.get((scope.key, quota.rule), {})
            for window in scope.windows:
                window.set_foreign(foreign.get((scope.key, window.span_ms), ()))

    # ------------------------------------------------------------ transactions

    def _catch_up(self, changed: bool) -> int:
        """Take over what others wrote and write what was answered; return now in Unix milliseconds."""
        now_ms = self.now()
        book = self.book
        if self._stale:
            self._reload(now_ms)
        elif changed:
            for row in book.changes():
                self._apply(row, now_ms)
            self._reread(now_ms)
        answers = self.answers
        while answers:
            reservation, at_ms, unsent = answers.popleft()
            if reservation.place:
                book.end(reservation.place, at_ms, unsent=unsent)
                for scope in self.route(reservation.dataset):
                    scope.end(reservation.number, min(at_ms, now_ms), 0 if unsent else reservation.weight)
            for key, quota, starts_ms in reservation.charges:
                if unsent or at_ms + RESET_MARGIN_MS < starts_ms:  # answered well before that period began
                    self._charge(key, quota, starts_ms, -reservation.weight)
        return now_ms

    @contextlib.contextmanager
    def transaction(self) -> Iterator[int]:
        """Hold the book alone and up to date; yields now in Unix milliseconds. Nothing of it remains on an error."""
        with self.lock:
            changed = self._begin()
            try:
                yield self._catch_up(changed)
                self.book.commit()
            except BaseException as error:
                self._undo(error)
                raise

    def _begin(self) -> bool:
        try:
            return self.book.begin()
        except self.book.errors as error:
            raise self._failed(error) from error

    def _undo(self, error: BaseException) -> None:
        self._stale = True
        self._queued = {}
        with contextlib.suppress(*self.book.errors):
            self.book.rollback()
        if isinstance(error, self.book.errors):
            raise self._failed(error) from error

    def _failed(self, error: BaseException) -> MarketSyncError:
        return MarketSyncError(
            f"Counting a request of {self.provider}/{self.account} in the book of rate limits failed: {error}. "
            "The request was not sent. Check that the state folder has free space and can be written."
        )

    def attempt(self, permits: Sequence[Permit]) -> None:
        """Give room to each permit, in order, or say in its `refusal` why not. The lock must be held.

        One that is refused keeps those after it from overtaking in the scope that refused it (`yields`).
        """
        changed = self._begin()
        granted: list[Permit] = []
        try:
            now_ms = self._catch_up(changed)
            blocked: set[str] = set()
            for permit in permits:
                if permit.reservation is None:
                    permit.reservation = self._give(permit, now_ms, blocked)
                    if permit.reservation is not None:
                        granted.append(permit)
            if self._queued or len(granted) < len(permits):
                self._queue(permits, now_ms)
            if self._since_sweep >= SWEEP_EVERY:
                self._since_sweep = 0
                self.book.sweep(now_ms)
            self.book.commit()
        except BaseException as error:
            for permit in granted:
                permit.reservation = None
            self._undo(error)
            raise

    def _give(self, permit: Permit, now_ms: int, blocked: set[str]) -> Reservation | None:
        dataset, weight = permit.name, permit.weight
        until_ms = now_ms + permit.timeout_ms
        scopes = self.route(dataset)
        refusal = self._cooling(dataset, now_ms) if self.cool else None
        for scope in scopes:
            scope.expire(now_ms)
            refused = scope.refusal(now_ms, until_ms, weight)
            if refused is not None and refused.kind is Kind.CONCURRENT and self._bury(scope, now_ms):
                refused = scope.refusal(now_ms, until_ms, weight)
            if refused is not None and (refusal is None or refused.free_ms > refusal.free_ms):
                refusal = refused
        permit.yields = refusal is None and (
            any(scope.key in blocked for scope in scopes)
            or bool(self._others and self._is_behind(permit, scopes, now_ms))
        )
        permit.refusal = refusal
        if refusal is not None:
            blocked.add(refusal.scope)
            return None
        if permit.yields:
            return None
        number = place = 0
        if scopes:
            number, place = self.book.add(self.account, dataset, weight, now_ms, until_ms)
            self._since_sweep += 1
        given = Reservation(self, number, place, dataset, weight, now_ms / 1000, until_ms)
        for scope in scopes:
            scope.begin(number, until_ms, weight, self.book.holder)
            for quota in scope.quotas:
                for starts_ms, _ in quota.periods(now_ms, until_ms):
                    self._charge(scope.key, quota, starts_ms, weight)
                    given.charges.append((scope.key, quota, starts_ms))
        return given

    def _is_behind(self, permit: Permit, scopes: Sequence[Scope], now_ms: int) -> bool:
        """Whether another process has waited longer, or with a higher priority, for room in the same scope."""
        priority, since_ms, _ = permit.order
        mine = (priority, since_ms, self.book.holder)
        return any(
            other[:3] < mine and other[3] + GHOST_MS > now_ms and not self._is_dead(other[2], now_ms)
            for scope in scopes
            for other in self._others.get(scope.key, ())
        )

    def _queue(self, permits: Sequence[Permit], now_ms: int) -> None:
        """Tell other processes for what this one waits, so that it gets its turn."""
        wanted: dict[str, tuple[int, int, int]] = {}
        for permit in permits:
            refusal = permit.refusal
            if permit.reservation is not None or refusal is None or refusal.kind not in _QUEUED_FOR:
                continue
            if refusal.free_ms - now_ms <= permit.max_wait_ms:
                look_ms = now_ms + 1000 if refusal.kind is Kind.CONCURRENT else refusal.free_ms
                entry = (permit.order[0], permit.order[1], look_ms)
                wanted[refusal.scope] = min(entry, wanted.get(refusal.scope, entry))
        for scope, (priority, since_ms, look_ms) in wanted.items():
            written = self._queued.get(scope)
            if written is None or written[:2] != (priority, since_ms) or look_ms > written[2] + GHOST_MS:
                self.book.wait(scope, -priority, since_ms, look_ms)
                self._queued[scope] = (priority, since_ms, look_ms)
        for scope in [scope for scope in self._queued if scope not in wanted]:
            self.book.wait_no_more(scope)
            del self._queued[scope]

    def leave(self, others: Sequence[Permit]) -> None:
        """Someone stopped waiting without having got room: give its turn to the others. The lock must be held."""
        if self._queued:
            self.attempt(others)

    def _charge(self, key: str, quota: Quota, starts_ms: int, weight: int) -> None:
        self.book.add_use(key, quota.rule, starts_ms, weight)
        quota.used[starts_ms] = max(0, quota.used.get(starts_ms, 0) + weight)

    def charge(self, key: str, quota: Quota, now_ms: int, weight: int) -> None:
        """Add use that is not ours to a quota's current period. Inside a transaction only."""
        self._charge(key, quota, quota.resets.period(now_ms)[0], weight)

    def _cooling(self, dataset: str, now_ms: int) -> Refusal | None:
        for key in (self.account_key, self.dataset_key(dataset)):
            until_ms, why = self.cool.get(key, (0, ""))
            if until_ms > now_ms:
                return Refusal(Kind.COOL_DOWN, why, key, until_ms, until_ms)
        return None

    def _bury(self, scope: Scope, now_ms: int) -> bool:
        """Take requests of dead processes out of those under way; their room in windows stays taken."""
        found = False
        for reservation, holder in list(scope.under_way.items()):
            if holder != self.book.holder and self._is_dead(holder, now_ms):
                del scope.under_way[reservation]
                found = True
        return found

    def _is_dead(self, holder: int, now_ms: int) -> bool:
        dead, asked_ms = self._dead.get(holder, (False, 0))
        if not dead and abs(now_ms - asked_ms) > 1000 * POLL_SECONDS:
            dead = self.book.holder_is_dead(holder)
            self._dead[holder] = (dead, now_ms)
        return dead

    def say(self, reservation: Reservation, at_ms: int, unsent: bool) -> None:
        """Take note of an answer; the next transaction writes it."""
        self.answers.append((reservation, at_ms, unsent))
        self.on_answer()

    on_answer: Callable[[], None] = staticmethod(lambda: None)

    # ------------------------------------------------------------ pyrate-limiter's contract

    def now(self) -> int:
        """Unix milliseconds of our clock."""
        return math.floor(self.clock.timestamp() * 1000)

    def put(self, item: RateItem) -> bool:
        """Reserve room for the item now, or refuse it."""
        permit = item if isinstance(item, Permit) else Permit(item.name, item.timestamp, item.weight)
        with self.lock:
            self.attempt((permit,))
        refusal = permit.refusal
        if refusal is None:
            return self._record(item, Decision())
        wait_ms = max(1, refusal.free_ms - self.now(), int(POLL_SECONDS * 1000) * (refusal.kind is Kind.CONCURRENT))
        return self._record(item, Decision(Rate(1, wait_ms), wait_ms))

    def waiting(self, item: RateItem) -> int:
        """Milliseconds until the item refused last may fit."""
        return self._recorded_wait(item) or 0

    def leak(self, current_timestamp: int | None = None) -> int:
        """Forget what no longer counts; return how many units that were."""
        with self.transaction() as now_ms:
            before = self._units()
            for scope in self._scopes.values():
                scope.expire(now_ms)
            self.book.sweep(now_ms)
            return before - self._units()

    def flush(self) -> None:
        """Refuse: what was sent was sent, and forgetting it would exceed the provider's limits."""
        raise MarketSyncError("The rate limits' record cannot be emptied: the provider has counted what it holds.")

    def count(self) -> int:
        """Units that count now, in the window that counts most."""
        with self.transaction() as now_ms:
            for scope in self._scopes.values():
                scope.expire(now_ms)
            return self._units()

    def _units(self) -> int:
        return max(
            (window.used(scope.pending_weight) for scope in self._scopes.values() for window in scope.windows),
            default=0,
        )

    def peek(self, index: int) -> RateItem | None:
        """Return None: answers are kept as totals, not one by one."""
        return None

    def close(self) -> None:
        """Write what was answered and let go of the book."""
        if self.answers or self._queued:
            with contextlib.suppress(MarketSyncError), self.transaction():
                for scope in self._queued:
                    self.book.wait_no_more(scope)
        self.book.close()


class Limiter:
    """Keeps every limit of one account at one provider, over threads, processes and restarts.

    `tier` chooses among limits that name one; without it all of them hold, since the least one may be the user's.
    `dataset_limits` are the limits of single datasets beside `limits`.
    """

    def __init__(
        self,
        state_dir: Path,
        provider: str,
        account: str,
        limits: Sequence[Limit],
        clock: Clock,
        tier: str | None = None,
        dataset_limits: Mapping[str, Sequence[Limit]] | None = None,
    ):
        self.clock = clock
        self.name = f"{provider}/{account}"
        self.bucket = ReservationBucket(
            lambda: SqliteBook(Path(state_dir), provider, math.floor(clock.timestamp() * 1000)),
            clock,
            provider,
            account,
            limits_of_tier(limits, tier),
            {dataset: limits_of_tier(of, tier) for dataset, of in (dataset_limits or {}).items()},
        )
        self._tickets = itertools.count()
        self._waiting: list[Permit] = []
        self._flush_due = threading.Event()
        self._flusher: threading.Thread | None = None
        self._closed = False
        self.bucket.on_answer = self._on_answer
        weakref.finalize(self, self._flush_due.set)
        _LIVE.add(self)

    # ------------------------------------------------------------ reserving

    def reserve(
        self,
        dataset: str,
        weight: int = 1,
        timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS,
        max_wait_seconds: float = 600.0,
        wake: threading.Event | None = None,
        priority: int = 0,
    ) -> Reservation:
        """Wait until all limits have room for `weight` units and take it; send within `timeout_seconds` after.

        Raises
        ------
        WaitingForQuota
            A limit has no room for longer than `max_wait_seconds`; `resume_at` says until when.
        Interrupted
            `wake` was set.
        ConfigurationError
            The weight is greater than a limit.
        """
        if wake is not None and wake.is_set():
            raise self._interrupted(dataset)
        permit = Permit(
            dataset, self.bucket.now(), weight, math.ceil(timeout_seconds * 1000), max_wait_seconds * 1000, priority
        )
        lock = self.bucket.lock
        with lock:
            if not self._waiting:
                self.bucket.attempt((permit,))
                if permit.reservation is not None:
                    return permit.reservation
            permit.order = (-priority, permit.timestamp, next(self._tickets))
            bisect.insort(self._waiting, permit, key=lambda waiting: waiting.order)
        try:
            while True:
                with lock:
                    permit.answered.clear()
                    if permit.reservation is None and self._is_due(permit):
                        self.bucket.attempt(self._waiting)
                    if permit.reservation is not None:
                        if self.clock.timestamp() - permit.reservation.sent_at < LATE_SECONDS:
                            return permit.reservation
                        # given by another thread while this one overslept: too little of its time may be left
                        permit.reservation.unsent()
                        permit.reservation = permit.refusal = None
                        continue
                self._sleep(permit, max_wait_seconds, wake)
        except BaseException:
            if permit.reservation is not None:  # given by another thread while this one was leaving
                permit.reservation.unsent()
            raise
        finally:
            with lock, contextlib.suppress(ValueError, MarketSyncError):
                self._waiting.remove(permit)
                if permit.reservation is None:
                    self.bucket.leave(self._waiting)

    def _is_due(self, permit: Permit) -> bool:
        # Whoever wakes first asks for all, in order; the others then know their next instant without asking again.
        refusal = permit.refusal
        return refusal is None or refusal.kind is Kind.CONCURRENT or refusal.free_ms <= self.bucket.now()

    def _sleep(self, permit: Permit, max_wait_seconds: float, wake: threading.Event | None) -> None:
        refusal = permit.refusal
        if refusal is None or refusal.kind is Kind.CONCURRENT:
            # it is another's turn, or all places are taken: an answer here tells at once, one elsewhere does not
            self.clock.sleep(POLL_SECONDS, permit.answered)
            woken = wake is not None and wake.is_set()
        else:
            self._check_weight(permit)
            wait_seconds = refusal.free_ms / 1000 - self.clock.timestamp()
            grace_seconds = RESET_MARGIN_MS / 1000 if refusal.kind is Kind.QUOTA else 0.0
            if wait_seconds > max_wait_seconds + grace_seconds:
                raise self._no_room(refusal)
            woken = self.clock.sleep(max(0.001, wait_seconds), wake)
        if woken:
            raise self._interrupted(permit.name)

    def _check_weight(self, permit: Permit) -> None:
        with self.bucket.lock:
            for scope in self.bucket.route(permit.name):
                for counter in (*scope.windows, *scope.quotas):
                    if permit.weight > counter.limit:
                        raise ConfigurationError(
                            f"A request for {permit.name} weighs {permit.weight}, but {scope.key} is allowed "
                            f"{counter.limit} per {counter.per}: it can never be sent. Lower the request's weight or "
                            "its batch, or correct the limit."
                        )

    def _interrupted(self, dataset: str) -> Interrupted:
        return Interrupted(
            f"Waiting to ask {self.name} for {dataset} was interrupted before the request was sent. "
            "Run it again to go on; nothing is fetched twice."
        )

    def _no_room(self, refusal: Refusal) -> WaitingForQuota:
        resume_at = _instant(refusal.resume_ms)
        if refusal.kind is Kind.COOL_DOWN:
            why = f"{self.name} is to be left alone until {resume_at:%Y-%m-%d %H:%M:%S} UTC ({refusal.what})"
        elif refusal.kind is Kind.QUOTA:
            why = f"The quota of {refusal.scope}, {refusal.what}, is spent until {resume_at:%Y-%m-%d %H:%M:%S} UTC"
        else:
            why = f"The limit of {refusal.scope}, {refusal.what}, has no room until {resume_at:%Y-%m-%d %H:%M:%S} UTC"
        return WaitingForQuota(f"{why}. Run it again then; nothing is fetched twice.", resume_at)

    def waits(self) -> tuple[datetime, str] | None:
        """Return until when the requests of this process wait for room, and for what; None where none does (or only
        for one of its own to be answered)."""
        with self.bucket.lock:
            refusals = [one.refusal for one in self._waiting if one.refusal and one.refusal.kind is not Kind.CONCURRENT]
        if not refusals:
            return None
        first = min(refusals, key=lambda refusal: refusal.free_ms)
        if first.kind is Kind.COOL_DOWN:
            return _instant(first.free_ms), f"the pause that {self.name} asked for ({first.what})"
        return _instant(first.free_ms), f"the limit of {first.what}"

    # ------------------------------------------------------------ answers

    def _on_answer(self) -> None:
        if self._waiting:
            for permit in tuple(self._waiting):
                permit.answered.set()
        if not self._flush_due.is_set():
            self._flush_due.set()
            if self._flusher is None and not self._closed:
                self._flusher = threading.Thread(
                    target=_flush_answers, args=(weakref.ref(self), self._flush_due), name="limits", daemon=True
                )
                self._flusher.start()

    def flush(self) -> None:
        """Write the answers that no reservation has carried along yet, so that other processes see them."""
        if self.bucket.answers and not self._closed:
            with self.bucket.transaction():
                pass

    def close(self) -> None:
        """Write the answers and let go of the book."""
        if not self._closed:
            self._closed = True
            self._flush_due.set()
            self.bucket.close()
            _LIVE.discard(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _after_fork(self) -> None:
        self._waiting = []
        self._flush_due = threading.Event()
        self._flusher = None
        self.bucket.after_fork()

    # ------------------------------------------------------------ what the provider says

    def cool_down(
        self, until: datetime, dataset: str | None = None, why: str = "the provider asked for a pause"
    ) -> None:
        """Let nobody, in any process, ask for this dataset (None: for anything of the account) before `until`."""
        key = self.bucket.account_key if dataset is None else self.bucket.dataset_key(dataset)
        with self.bucket.transaction() as now_ms:
            self._set_cool_down(key, math.ceil(until.timestamp() * 1000), why, now_ms)

    def _set_cool_down(self, key: str, until_ms: int, why: str, now_ms: int) -> None:
        self.bucket.book.set_cool_down(key, until_ms, why)
        self.bucket.cool = self.bucket.book.cool_downs(now_ms)

    def spent(self, per: Span | None = None, dataset: str | None = None) -> datetime:
        """The provider said that the quota of `per` is spent: count it as used up; return when to ask again.

        Without a declared limit for `per` (None: without any of an hour or longer) everything waits a minute, an hour,
        or until the next midnight (Monday, first of the month) in UTC, and a warning says so.
        """
        with self.bucket.transaction() as now_ms:
            scopes = [*self.bucket.route(dataset or "")][::-1]  # the narrowest first
            quota = _fitting_quota(scopes, per)
            if quota is not None:
                key, counter = quota
                start, end = counter.resets.period(now_ms)
                missing = counter.limit - counter.used.get(start, 0)
                if missing > 0:
                    self.bucket.charge(key, counter, now_ms, missing)
                return _instant(end)
            window = _fitting_window(scopes, per)
            if window is not None:
                scope, counter = window
                self._fill_window(scope, counter, counter.limit, now_ms + counter.hold_ms, now_ms)
                return _instant(counter.free_at(now_ms, scope.pending_weight, 1) or now_ms)
            until, chosen = _undeclared_reset(_instant(now_ms), per or Span(1, Unit.DAY))
            why = f"the provider says that its quota per {per or 'day'} is spent"
            _log.warning(
                "%s: %s, but none is declared; asking again at %s UTC (%s). Declare it under limits to be exact.",
                self.name, why, f"{until:%Y-%m-%d %H:%M:%S}", chosen,
            )  # fmt: skip
            key = self.bucket.account_key if dataset is None else self.bucket.dataset_key(dataset)
            self._set_cool_down(key, math.ceil(until.timestamp() * 1000), f"{why}; {chosen}", now_ms)
            return until

    def _fill_window(self, scope: Scope, window: Window, used: int, until_ms: int, now_ms: int) -> None:
        """Count foreign use until the window holds at least `used` units."""
        scope.expire(now_ms)
        missing = used - window.used(scope.pending_weight)
        if missing > 0 and until_ms > now_ms:
            self.bucket.book.add_foreign(scope.key, window.span_ms, until_ms, missing)
            window.set_foreign([*window.foreign, (until_ms, missing)])

    def learn(self, headers: Mapping[str, str], at: datetime | float, dataset: str | None = None) -> None:
        """Read an answer's headers where a limit says which to learn from; they only ever make us more careful.

        `headers` may be spelled in any case; `at` is when the answer came.
        """
        if not self.bucket.learns:
            return
        at_ms = math.ceil((at.timestamp() if isinstance(at, datetime) else at) * 1000)
        lower = {name.lower(): value for name, value in headers.items()}
        with self.bucket.lock:
            known = self.bucket.has_route(dataset or "")
            if known and next(self._news(lower, at_ms, dataset), None) is None:
                return  # no need to ask the book: what others use could only leave less
        with self.bucket.transaction() as now_ms:
            for scope, counter, limit, used, reset_ms in list(self._news(lower, at_ms, dataset)):
                if limit is not None:
                    counter.limit = limit
                if used is None:
                    continue
                if isinstance(counter, Quota):
                    missing = used - counter.used.get(counter.resets.period(now_ms)[0], 0)
                    if missing > 0:
                        self.bucket.charge(scope.key, counter, now_ms, missing)
                else:
                    latest = now_ms + counter.hold_ms
                    self._fill_window(scope, counter, used, min(reset_ms or latest, latest), now_ms)

    def _news(
        self, headers: Mapping[str, str], at_ms: int, dataset: str | None
    ) -> Iterator[tuple[Scope, Window | Quota, int | None, int | None, int | None]]:
        """Yield what the headers say that is more careful than what we count: (scope, counter, limit, used, reset)."""
        now_ms = self.bucket.now()
        for scope in self.bucket.route(dataset or ""):
            for learn, counter in self.bucket.learners.get(scope.key, ()):
                told = _number(headers, learn.limit)
                limit = told if told is not None and 0 < told < counter.limit else None
                used = _number(headers, learn.used)
                remaining = _number(headers, learn.remaining)
                if remaining is not None:
                    used = max(used or 0, (limit or counter.limit) - max(0, remaining))
                reset_ms = _reset(headers, learn.reset, at_ms)
                if isinstance(counter, Quota):
                    start, _ = counter.resets.period(now_ms)
                    known = counter.used.get(start, 0) if at_ms >= start else counter.limit
                else:
                    known = counter.used(scope.pending_weight)
                    if reset_ms is not None and reset_ms <= now_ms:
                        used = None
                if used is not None and used <= known:
                    used = None
                if limit is not None or used is not None:
                    yield scope, counter, limit, used, reset_ms

    def learn_limit(self, per: Span, number: int, dataset: str | None = None) -> None:
        """The provider said in words that `number` per `per` is the real limit: keep it for this run, if it is lower.

        With `dataset` it holds for that dataset alone.
        """
        if number < 1:
            return
        span_ms = longest_ms(per)
        key = self.bucket.account_key if dataset is None else self.bucket.dataset_key(dataset)
        with self.bucket.transaction():
            scope = next((scope for scope in self.bucket.route(dataset or "") if scope.key == key), None)
            window = next((w for w in scope.windows if w.span_ms == span_ms), None) if scope else None
            if window is not None:
                window.limit = min(window.limit, number)
            else:
                self.bucket.add_window(key, dataset, Window(number, span_ms, per))

    # ------------------------------------------------------------ how it stands

    def state(self, dataset: str | None = None) -> list[LimitState]:
        """Return how every limit stands that holds for the dataset (None: those of provider and account)."""
        states = []
        with self.bucket.transaction() as now_ms:
            for scope in self.bucket.route(dataset or ""):
                if dataset is None and scope.key.startswith("dataset "):
                    continue
                scope.expire(now_ms)
                for window in scope.windows:
                    used = window.used(scope.pending_weight)
                    next_ms = window.free_at(now_ms, scope.pending_weight, window.limit - used + 1) if used else None
                    states.append(
                        LimitState(
                            f"{window.limit} per {window.per}", scope.key, Kind.WINDOW, window.limit, used, window.per,
                            None, None if next_ms is None else _instant(next_ms),
                        )
                    )  # fmt: skip
                for quota in scope.quotas:
                    start, end = quota.resets.period(now_ms)
                    states.append(
                        LimitState(
                            f"{quota.limit} per {quota.per}", scope.key, Kind.QUOTA, quota.limit,
                            quota.used.get(start, 0), quota.per, quota.resets.daily, _instant(end),
                        )
                    )  # fmt: skip
                if scope.concurrent is not None:
                    under_way = len(scope.under_way)
                    states.append(
                        LimitState(
                            f"{scope.concurrent} at once", scope.key, Kind.CONCURRENT, scope.concurrent, under_way
                        )
                    )
        return states


def limits_of_tier(limits: Sequence[Limit], tier: str | None) -> tuple[Limit, ...]:
    """Return the limits that hold for a tier; all of them when no tier is named."""
    return tuple(limit for limit in limits if tier is None or limit.tier is None or limit.tier == tier)


def _counter(limit: Limit) -> Window | Quota | None:
    if limit.requests is None or limit.per is None:
        return None
    per = parse_span(limit.per)
    if limit.resets is None:
        return Window(limit.requests, longest_ms(per), per)
    if per.count == 1:
        return Quota(limit.requests, per, Resets(per.unit, parse_daily_time(limit.resets)))
    # where a quota of several days begins is not known; a window of that length (and a clock change) holds wherever
    return Window(limit.requests, longest_ms(per) + HOUR_MS, per)


def _count(scope: Scope, row: Row, now_ms: int) -> None:
    if row.answered_ms is None:
        # the clock may have been set back since
        scope.begin(row.reservation, min(row.until_ms, now_ms + row.until_ms - row.sent_ms), row.weight, row.holder)
    else:
        scope.end(row.reservation, min(row.answered_ms, now_ms), row.weight)


def _instant(at_ms: int) -> datetime:
    return datetime.fromtimestamp(at_ms / 1000, UTC)


def _fitting_quota(scopes: Sequence[Scope], per: Span | None) -> tuple[str, Quota] | None:
    fitting = [(scope.key, quota) for scope in scopes for quota in scope.quotas if per in (None, quota.per)]
    return min(fitting, key=lambda found: found[1].per.approximate_seconds, default=None)


def _fitting_window(scopes: Sequence[Scope], per: Span | None) -> tuple[Scope, Window] | None:
    if per is not None:
        fitting = [(scope, window) for scope in scopes for window in scope.windows if window.per == per]
        return fitting[0] if fitting else None
    quotas = [(scope, window) for scope in scopes for window in scope.windows if window.span_ms >= HOUR_MS]
    return max(quotas, key=lambda found: found[1].span_ms, default=None)


def _undeclared_reset(now: datetime, per: Span) -> tuple[datetime, str]:
    midnight = now.replace(hour=0, minute=0, second=0, microsecond=0)
    if per.unit is Unit.MONTH:
        return (midnight.replace(day=1) + timedelta(days=32)).replace(day=1), "the first of the next month in UTC"
    if per.unit is Unit.WEEK:
        return midnight + timedelta(days=7 - now.weekday()), "the next Monday in UTC"
    if per.unit in (Unit.DAY, Unit.SESSION, Unit.YEAR):
        return midnight + timedelta(days=1), "the next midnight in UTC"
    return now + timedelta(seconds=per.seconds), f"{per} from now"


def _number(headers: Mapping[str, str], name: str | None) -> int | None:
    text = headers.get(name.lower()) if name else None
    if text is None:
        return None
    try:
        return int(float(text.split(",")[0].split(";")[0]))
    except (ValueError, OverflowError):
        return None


def _reset(headers: Mapping[str, str], name: str | None, at_ms: int) -> int | None:
    """Read a reset: Unix seconds or milliseconds, seconds to go, or a date; Unix milliseconds."""
    text = headers.get(name.lower()) if name else None
    if text is None:
        return None
    try:
        number = float(text)
    except ValueError:
        for parse in (datetime.fromisoformat, parsedate_to_datetime):
            with contextlib.suppress(ValueError):
                moment = parse(text)
                return math.ceil((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() * 1000)
        return None
    if not math.isfinite(number) or number < 0:
        return None
    if number > 1e11:
        return math.ceil(number)
    return math.ceil(number * 1000) + (0 if number > 1e8 else at_ms)


# ---------------------------------------------------------------- the process


_LIVE: weakref.WeakSet[Limiter] = weakref.WeakSet()
_ABANDONED: list[LimitBook] = []


def _flush_answers(limiter: weakref.ref[Limiter], due: threading.Event) -> None:
    """Write answers that no reservation carried along. Waits in real time: what is written is never judged by when."""
    pause = threading.Event()
    while True:
        due.wait()
        pause.wait(FLUSH_AFTER_SECONDS)
        due.clear()
        alive = limiter()
        if alive is None or alive._closed:
            return
        try:
            alive.flush()
        except MarketSyncError as error:
            _log.warning("%s", error)  # an answer that is not written only occupies its window longer
        del alive


def _renew_after_fork() -> None:
    for limiter in list(_LIVE):
        limiter._after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_after_fork)
