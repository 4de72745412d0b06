"""What a running worker listens to: the user's word for its plan, the maintenance flag, signals; and its heartbeat.

One thread a run renews the leases and polls; everything that waits or loops looks at `Watch.wake`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from enum import StrEnum

from marketsync.clock import Clock
from marketsync.errors import Interrupted
from marketsync.ledger import LEASE_SECONDS, Desired, Ledger

POLL_SECONDS = 0.5
_watches: set[Watch] = set()
_syncs: set[Sync] = set()


class Sync:
    """A command that runs one step after the other, of which not each watches: a signal that meets it between two
    of them is heard by the next. A context manager; `interrupted` says whether there was one."""

    interrupted = False

    def __enter__(self) -> Sync:
        _syncs.add(self)
        return self

    def __exit__(self, *_: object) -> None:
        _syncs.discard(self)


def interrupt_all() -> bool:
    """Ask every run of this process to stop at its next page (SIGTERM, Ctrl-C, a Prefect cancellation); return
    whether there was any."""
    asked = bool(_watches or _syncs)
    for sync in list(_syncs):
        sync.interrupted = True
    for watch in list(_watches):
        watch.request(Stop.SIGNAL)
    return asked


class Stop(StrEnum):
    """Why a run is asked to stop."""

    PAUSE = "paused"
    CANCEL = "cancelled"
    MAINTENANCE = "maintenance"
    SIGNAL = "interrupted"


class Watch:
    """The heartbeat of one run; a context manager."""

    def __init__(
        self,
        ledger: Ledger,
        plan: str,
        owner: str,
        clock: Clock,
        *,
        in_maintenance: Callable[[], bool] = lambda: False,
        threaded: bool = True,
    ):
        self.wake = threading.Event()
        self.stop: Stop | None = None
        self.owner = owner
        self._ledger, self._plan, self._owner, self._clock = ledger, plan, owner, clock
        self._holds: set[str] = set()
        self._in_maintenance = in_maintenance
        self._over = threading.Event()
        self._renewed = clock.timestamp()
        self._threaded = threaded
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Watch:
        _watches.add(self)
        if any(sync.interrupted for sync in _syncs):
            self.request(Stop.SIGNAL)
        if self._threaded:
            self.look()
            self._thread = threading.Thread(target=self._beat, name=f"watch-{self._plan}", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        _watches.discard(self)
        self._over.set()
        if self._thread is not None:
            self._thread.join()

    def _beat(self) -> None:
        while not self._over.wait(POLL_SECONDS):
            self.look()

    def look(self) -> None:
        """Poll once: renew leases when a third of their time is over, hear the user's word."""
        now = self._clock.timestamp()
        if now - self._renewed > LEASE_SECONDS / 3:
            self._ledger.renew(self._owner)
            for name in list(self._holds):
                # Never taken anew: whoever uses it must learn that another had it meanwhile.
                self._ledger.keep_hold(name, self._owner)
            self._renewed = now
        if self.stop is None:
            # A run only begins when it may run: what else is desired was said since, if only while it prepared.
            desired = self._ledger.control(self._plan).desired
            if desired is not Desired.RUN:
                self.request(Stop.PAUSE if desired is Desired.PAUSE else Stop.CANCEL)
            elif self._in_maintenance():
                self.request(Stop.MAINTENANCE)

    def keep(self, hold: str) -> None:
        """Renew a hold of this owner with the leases, from now on."""
        self._holds.add(hold)

    def release(self, hold: str) -> None:
        """Give a hold back."""
        self._holds.discard(hold)
        self._ledger.let_go(hold, self._owner)

    def request(self, stop: Stop) -> None:
        """Ask the run to stop at its next page."""
        if self.stop is None:
            self.stop = stop
        self.wake.set()

    def check(self) -> None:
        """Raise Interrupted when the run was asked to stop."""
        if not self._threaded:
            self.look()
        if self.stop is not None:
            raise Interrupted(f"plan {self._plan}: {self.stop}")
