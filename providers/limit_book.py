"""The durable book of reservations, quotas and cool-downs that all processes of one host share.

One SQLite file (`limits.db` in the state folder; WAL) behind one blocking file lock, readable with any SQLite shell
(see the view `readable`). What survives a kill is what was committed; nothing waits for a disk. What the numbers
mean is in `limit_windows.py`, who waits is in `limits.py`. A book for several hosts needs the methods of `LimitBook`.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sqlite3
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, Protocol

from marketsync.errors import MarketSyncError

try:
    import fcntl
except ImportError:  # a platform without it: SQLite's own lock holds, with its polling
    fcntl = None

_VERSION = 1
_SUMS = 4_000  # into about how many instants what was answered is summed when it is read at the start
_SCHEMA = """
CREATE TABLE holder (holder INTEGER PRIMARY KEY AUTOINCREMENT, host TEXT NOT NULL, pid INTEGER NOT NULL,
    opened_ms INTEGER NOT NULL);
CREATE TABLE provider (provider TEXT PRIMARY KEY, keep_ms INTEGER NOT NULL);
CREATE TABLE reservation (seq INTEGER PRIMARY KEY, reservation INTEGER NOT NULL, provider TEXT NOT NULL,
    account TEXT NOT NULL, dataset TEXT NOT NULL, weight INTEGER NOT NULL, holder INTEGER NOT NULL,
    sent_ms INTEGER NOT NULL, until_ms INTEGER NOT NULL, answered_ms INTEGER);
CREATE TABLE quota (scope TEXT NOT NULL, rule TEXT NOT NULL, starts_ms INTEGER NOT NULL, used INTEGER NOT NULL,
    PRIMARY KEY (scope, rule, starts_ms)) WITHOUT ROWID;
CREATE TABLE foreign_use (scope TEXT NOT NULL, span_ms INTEGER NOT NULL, until_ms INTEGER NOT NULL,
    weight INTEGER NOT NULL);
CREATE TABLE cool_down (scope TEXT PRIMARY KEY, until_ms INTEGER NOT NULL, why TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE waiting (scope TEXT NOT NULL, holder INTEGER NOT NULL, priority INTEGER NOT NULL,
    since_ms INTEGER NOT NULL, look_ms INTEGER NOT NULL, PRIMARY KEY (scope, holder)) WITHOUT ROWID;
CREATE VIEW readable AS SELECT reservation, provider, account, dataset, weight, pid,
    strftime('%Y-%m-%dT%H:%M:%fZ', sent_ms / 1000.0, 'unixepoch') AS sent,
    strftime('%Y-%m-%dT%H:%M:%fZ', answered_ms / 1000.0, 'unixepoch') AS answered,
    CASE WHEN answered_ms IS NULL THEN strftime('%Y-%m-%dT%H:%M:%fZ', until_ms / 1000.0, 'unixepoch') END
        AS counts_as_answered FROM reservation LEFT JOIN holder USING (holder);
CREATE VIEW readable_quota AS SELECT scope, rule,
    strftime('%Y-%m-%dT%H:%MZ', starts_ms / 1000.0, 'unixepoch') AS starts, used FROM quota;
"""
_COLUMNS = "reservation, account, dataset, weight, holder, sent_ms, until_ms, answered_ms"


class Row(NamedTuple):
    """One reservation as the book holds it; `answered_ms` is None while it is under way."""

    reservation: int
    account: str
    dataset: str
    weight: int
    holder: int
    sent_ms: int
    until_ms: int
    answered_ms: int | None


class LimitBook(Protocol):
    """What a limiter needs of a book. Everything but `begin` is called between `begin` and `commit` or `rollback`."""

    holder: int
    errors: tuple[type[Exception], ...]  # what its methods raise when the book cannot be read or written

    def begin(self) -> bool:
        """Take the book for oneself alone; True when another holder wrote since this one's last time."""
        ...

    def commit(self) -> None:
        """Make everything since `begin` visible to all holders, for good, and give the book back."""
        ...

    def rollback(self) -> None:
        """Forget everything since `begin`, and give the book back."""
        ...

    def rows(self, dataset: str | None = None) -> list[Row]:
        """Every reservation of the provider (or of one dataset) that is still kept: those under way, then the others
        by their answers.

        Answered ones may come as a few sums, each at its latest answer.
        """
        ...

    def changes(self) -> list[Row]:
        """The provider's reservations that others made or ended since the last look."""
        ...

    def add(self, account: str, dataset: str, weight: int, sent_ms: int, until_ms: int) -> tuple[int, int]:
        """Write a reservation; return (its number, where it stands)."""
        ...

    def end(self, place: int, answered_ms: int, *, unsent: bool = False) -> None:
        """Write that the reservation at this place was answered, or (weighing nothing) never sent."""
        ...

    def add_use(self, scope: str, rule: str, starts_ms: int, weight: int) -> None:
        """Add to (or take from) what is used of a quota's period."""
        ...

    def quotas(self) -> dict[tuple[str, str], dict[int, int]]:
        """(scope, rule) to {start of the period: used}."""
        ...

    def add_foreign(self, scope: str, span_ms: int, until_ms: int, weight: int) -> None:
        """Write use of a window that is not ours."""
        ...

    def foreign(self, now_ms: int) -> dict[tuple[str, int], list[tuple[int, int]]]:
        """(scope, window) to [(counts until, units)]."""
        ...

    def set_cool_down(self, scope: str, until_ms: int, why: str) -> None:
        """Write that nothing of the scope is sent before then (never earlier than already written)."""
        ...

    def cool_downs(self, now_ms: int) -> dict[str, tuple[int, str]]:
        """Scope to (until, why)."""
        ...

    def wait(self, scope: str, priority: int, since_ms: int, look_ms: int) -> None:
        """Write that this holder waits for room in the scope since then and looks again at `look_ms`."""
        ...

    def wait_no_more(self, scope: str) -> None:
        """Write that this holder does not wait there any more."""
        ...

    def waiting(self, since_ms: int) -> dict[str, list[tuple[int, int, int, int]]]:
        """Scope to [(-priority, since, holder, looks again at)] of other holders that look after `since_ms`."""
        ...

    def keep(self, keep_ms: int) -> None:
        """Write how long answered reservations of the provider matter; the longest any holder said holds."""
        ...

    def sweep(self, now_ms: int) -> None:
        """Delete what matters no more."""
        ...

    def holder_is_dead(self, holder: int) -> bool:
        """Whether the holder's process is known to have ended."""
        ...

    def close(self) -> None:
        """Let go of the book."""
        ...


class SqliteBook:
    """A `LimitBook` in one SQLite file for all processes of this host.

    Not thread-safe: the limiter's lock guards it.
    """

    errors: tuple[type[Exception], ...] = (sqlite3.Error, OSError)

    def __init__(self, state_dir: Path, provider: str, now_ms: int):
        self.path = Path(state_dir) / "limits.db"
        self.provider = provider
        self.holder = 0
        self._seen = 0
        self._version = -1
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock_file = os.open(self.path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            self._sqlite = sqlite3.connect(self.path, timeout=30, isolation_level=None, check_same_thread=False)
            self._execute = self._sqlite.execute
            self._prepare(now_ms)
        except (OSError, sqlite3.Error) as error:
            raise MarketSyncError(
                f"Opening the book of rate limits {self.path} failed: {error}. Without it no request can be counted, "
                "so none is sent. Check that the folder is on a local disk and can be written; a damaged file may be "
                "deleted (what was used of today's quotas is then forgotten)."
            ) from error

    def _prepare(self, now_ms: int) -> None:
        self._lock()
        try:
            version = self._execute("PRAGMA user_version").fetchone()[0]
            if version not in (0, _VERSION):
                raise MarketSyncError(
                    f"{self.path} was written by another version of MarketSync (format {version}, this one reads "
                    f"{_VERSION}). Use that version, or delete the file once its quotas have been reset."
                )
            self._execute("PRAGMA journal_mode = WAL")
            self._execute("PRAGMA synchronous = NORMAL")  # what a kill leaves is whole; a power cut may lose the last
            self._execute("PRAGMA wal_autocheckpoint = 4000")
            self._execute("BEGIN IMMEDIATE")
            if version == 0:
                for statement in _SCHEMA.split(";\n"):
                    self._execute(statement)
                self._execute(f"PRAGMA user_version = {_VERSION}")
            inserted = self._execute(
                "INSERT INTO holder (host, pid, opened_ms) VALUES (?, ?, ?)", (_this_host(), os.getpid(), now_ms)
            )
            assert inserted.lastrowid is not None
            self.holder = inserted.lastrowid
            self._sweep_all(now_ms)
            self._execute("COMMIT")
        finally:
            if self._sqlite.in_transaction:
                self._execute("ROLLBACK")
            self._unlock()

    def _lock(self) -> None:
        if fcntl is not None:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX)

    def _unlock(self) -> None:
        if fcntl is not None:
            fcntl.flock(self._lock_file, fcntl.LOCK_UN)

    def begin(self) -> bool:
        self._lock()
        try:
            if self._sqlite.in_transaction:  # an interrupt came between two steps of an earlier one
                self._execute("ROLLBACK")
            self._execute("BEGIN IMMEDIATE")
            version = self._execute("PRAGMA data_version").fetchone()[0]
        except BaseException:
            self.rollback()
            raise
        changed = version != self._version
        self._version = version
        return changed

    def commit(self) -> None:
        self._execute("COMMIT")
        self._unlock()

    def rollback(self) -> None:
        try:
            if self._sqlite.in_transaction:
                self._execute("ROLLBACK")
        finally:
            self._version = -1
            self._unlock()

    def rows(self, dataset: str | None = None) -> list[Row]:
        self._seen = self._execute("SELECT max(seq) FROM reservation").fetchone()[0] or 0
        keep = self._execute("SELECT keep_ms FROM provider WHERE provider = ?", (self.provider,)).fetchone()
        which = "FROM reservation WHERE provider = ? AND (? IS NULL OR dataset = ?)"
        values = (self.provider, dataset, dataset)
        answered = self._execute(
            "SELECT max(reservation), account, dataset, sum(weight), 0, 0, 0, max(answered_ms) AS answered "
            f"{which} AND answered_ms IS NOT NULL GROUP BY account, dataset, answered_ms / ? ORDER BY answered",
            (*values, max(1, (keep[0] if keep else 0) // _SUMS)),
        ).fetchall()
        under_way = self._execute(f"SELECT {_COLUMNS} {which} AND answered_ms IS NULL ORDER BY until_ms", values)
        return [Row(*row) for row in (*under_way, *answered)]

    def changes(self) -> list[Row]:
        found = self._execute(
            f"SELECT seq, provider, {_COLUMNS} FROM reservation WHERE seq > ? ORDER BY seq", (self._seen,)
        ).fetchall()
        if found:
            self._seen = found[-1][0]
        return [Row(*row[2:]) for row in found if row[1] == self.provider]

    def add(self, account: str, dataset: str, weight: int, sent_ms: int, until_ms: int) -> tuple[int, int]:
        self._seen = seq = self._seen + 1
        self._execute(
            "INSERT INTO reservation VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, NULL)",
            (seq, seq, self.provider, account, dataset, weight, self.holder, sent_ms, until_ms),
        )
        return seq, seq

    def end(self, place: int, answered_ms: int, *, unsent: bool = False) -> None:
        # A changed row moves to the end, so that others find it by reading on from where they were.
        self._seen += 1
        self._execute(
            "UPDATE reservation SET seq = ?, answered_ms = ?, weight = weight * ? WHERE seq = ?",
            (self._seen, answered_ms, 0 if unsent else 1, place),
        )

    def add_use(self, scope: str, rule: str, starts_ms: int, weight: int) -> None:
        self._execute(
            "INSERT INTO quota VALUES (?, ?, ?, max(0, ?)) ON CONFLICT DO UPDATE SET used = max(0, used + ?)",
            (scope, rule, starts_ms, weight, weight),
        )

    def quotas(self) -> dict[tuple[str, str], dict[int, int]]:
        found: dict[tuple[str, str], dict[int, int]] = {}
        for scope, rule, starts_ms, used in self._execute("SELECT scope, rule, starts_ms, used FROM quota"):
            found.setdefault((scope, rule), {})[starts_ms] = used
        return found

    def add_foreign(self, scope: str, span_ms: int, until_ms: int, weight: int) -> None:
        self._execute("INSERT INTO foreign_use VALUES (?, ?, ?, ?)", (scope, span_ms, until_ms, weight))

    def foreign(self, now_ms: int) -> dict[tuple[str, int], list[tuple[int, int]]]:
        found: dict[tuple[str, int], list[tuple[int, int]]] = {}
        for scope, span_ms, until_ms, weight in self._execute(
            "SELECT scope, span_ms, until_ms, weight FROM foreign_use WHERE until_ms > ?", (now_ms,)
        ):
            found.setdefault((scope, span_ms), []).append((until_ms, weight))
        return found

    def set_cool_down(self, scope: str, until_ms: int, why: str) -> None:
        self._execute(
            "INSERT INTO cool_down VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET until_ms = excluded.until_ms, "
            "why = excluded.why WHERE excluded.until_ms > until_ms",
            (scope, until_ms, why),
        )

    def cool_downs(self, now_ms: int) -> dict[str, tuple[int, str]]:
        found = self._execute("SELECT scope, until_ms, why FROM cool_down WHERE until_ms > ?", (now_ms,))
        return {scope: (until_ms, why) for scope, until_ms, why in found}

    def wait(self, scope: str, priority: int, since_ms: int, look_ms: int) -> None:
        self._execute(
            "INSERT OR REPLACE INTO waiting VALUES (?, ?, ?, ?, ?)", (scope, self.holder, priority, since_ms, look_ms)
        )

    def wait_no_more(self, scope: str) -> None:
        self._execute("DELETE FROM waiting WHERE scope = ? AND holder = ?", (scope, self.holder))

    def waiting(self, since_ms: int) -> dict[str, list[tuple[int, int, int, int]]]:
        found: dict[str, list[tuple[int, int, int, int]]] = {}
        for scope, *entry in self._execute(
            "SELECT scope, -priority, since_ms, holder, look_ms FROM waiting WHERE look_ms > ? AND holder <> ?",
            (since_ms, self.holder),
        ):
            found.setdefault(scope, []).append((entry[0], entry[1], entry[2], entry[3]))
        return found

    def keep(self, keep_ms: int) -> None:
        self._execute(
            "INSERT INTO provider VALUES (?, ?) ON CONFLICT DO UPDATE SET keep_ms = max(keep_ms, excluded.keep_ms)",
            (self.provider, keep_ms),
        )

    def sweep(self, now_ms: int) -> None:
        keep_ms = self._execute("SELECT keep_ms FROM provider WHERE provider = ?", (self.provider,)).fetchone()[0]
        # the last row stays: the place after it must never be given twice
        self._execute(
            "DELETE FROM reservation WHERE ifnull(answered_ms, until_ms) < ? AND provider = ? "
            "AND seq < (SELECT max(seq) FROM reservation)",
            (now_ms - keep_ms, self.provider),
        )
        self._execute("DELETE FROM foreign_use WHERE until_ms <= ?", (now_ms,))
        self._execute("DELETE FROM cool_down WHERE until_ms <= ?", (now_ms,))
        self._execute("DELETE FROM waiting WHERE look_ms < ?", (now_ms - 60_000,))

    def _sweep_all(self, now_ms: int) -> None:
        self._execute(
            "DELETE FROM reservation WHERE ifnull(answered_ms, until_ms) < ? - ifnull("
            "(SELECT keep_ms FROM provider WHERE provider.provider = reservation.provider), 0) "
            "AND seq < (SELECT max(seq) FROM reservation)",
            (now_ms,),
        )
        self._execute("DELETE FROM quota WHERE starts_ms < ?", (now_ms - 70 * 86_400_000,))
        host = _this_host()
        holders = self._execute(
            "SELECT holder, pid FROM holder WHERE host = ? AND holder NOT IN (SELECT holder FROM reservation)", (host,)
        )
        self._execute_many(
            "DELETE FROM holder WHERE holder = ?",
            [(holder,) for holder, pid in holders.fetchall() if holder != self.holder and not _is_alive(pid)],
        )

    def _execute_many(self, statement: str, values: Iterable[tuple]) -> None:
        self._sqlite.executemany(statement, values)

    def holder_is_dead(self, holder: int) -> bool:
        found = self._execute("SELECT host, pid FROM holder WHERE holder = ?", (holder,)).fetchone()
        return found is not None and found[0] == _this_host() and not _is_alive(found[1])

    def close(self) -> None:
        self._sqlite.close()
        with contextlib.suppress(OSError):
            os.close(self._lock_file)


def _this_host() -> str:
    """Name the set of processes among which a process id means one process (a container has its own)."""
    try:
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
