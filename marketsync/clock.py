"""The one source of time: everything that reads or waits for time takes a `Clock`, so that tests can own it."""

from __future__ import annotations

import threading
import time
from datetime import UTC, datetime, timedelta
from typing import Protocol


class Clock(Protocol):
    """Wall-clock time in UTC and a wait that can be woken."""

    def now(self) -> datetime:
        """Return the present instant, aware, in UTC."""
        ...

    def timestamp(self) -> float:
        """Return the present instant in Unix seconds (what `now()` says, cheaper)."""
        ...

    def sleep(self, seconds: float, wake: threading.Event | None = None) -> bool:
        """Wait `seconds` (none when <= 0) or until `wake` is set; return True when it was woken early."""
        ...


class SystemClock:
    """The machine's own clock."""

    def now(self) -> datetime:
        return datetime.now(UTC)

    def timestamp(self) -> float:
        return time.time()

    def sleep(self, seconds: float, wake: threading.Event | None = None) -> bool:
        if wake is not None:
            return wake.wait(max(0.0, seconds))
        if seconds > 0:
            time.sleep(seconds)
        return False


class ManualClock:
    """A clock that stands still until it is told to move; `sleep` moves it. For tests and the simulator."""

    def __init__(self, start: datetime):
        self._now = start.astimezone(UTC)
        self._lock = threading.Lock()

    def now(self) -> datetime:
        return self._now

    def timestamp(self) -> float:
        return self._now.timestamp()

    def advance(self, by: timedelta | float) -> None:
        """Move the clock forward by a timedelta or by seconds."""
        with self._lock:
            self._now += by if isinstance(by, timedelta) else timedelta(seconds=by)

    def sleep(self, seconds: float, wake: threading.Event | None = None) -> bool:
        if wake is not None and wake.is_set():
            return True
        if seconds > 0:
            self.advance(seconds)
        return False
