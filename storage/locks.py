"""Locks between processes on one machine: one writer at a time in a folder, with a name for whoever holds it.

The operating system drops the lock of a process that dies, so a lock is never stale; the `.owner` file beside it only
says who held it last, for the message.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from marketsync.errors import StoreBusy, StoreError

if TYPE_CHECKING:
    from filelock import FileLock

WAIT_SECONDS = 300.0
_POLL_SECONDS = 0.01


@contextmanager
def exclusive(path: Path, what: str, wait_seconds: float = WAIT_SECONDS) -> Iterator[None]:
    """Hold the lock file for the block; raises `StoreBusy` naming the holder after `wait_seconds`, and `StoreError` for
    what the operating system refuses in the block. Not re-entrant."""
    lock = take(path, what, wait_seconds)
    try:
        yield
    except OSError as error:
        raise StoreError(f"{what} cannot be written: {error}; is its disk full, or its folder not writable?") from error
    finally:
        lock.release()


def take(path: Path, what: str, wait_seconds: float) -> FileLock:
    """Return the lock, held until its `release()` or the end of the process; raises `StoreBusy`, and `StoreError` where
    no lock can be taken."""
    from filelock import FileLock, Timeout

    lock = FileLock(path, thread_local=False)
    try:
        lock.acquire(timeout=wait_seconds, poll_interval=_POLL_SECONDS)
    except Timeout as error:
        raise StoreBusy(
            f"{what} is held by {holder(path)}; wait for it to end, or run this where that process runs"
        ) from error
    except OSError as error:
        raise StoreError(
            f"{what} cannot be locked: {error}; the lock is a file there, so the folder has to be writable"
        ) from error
    with suppress(OSError):  # only a name for a message
        _owner(path).write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
    return lock


def holder(path: Path) -> str:
    """Return who took the lock last, in words."""
    try:
        return _owner(path).read_text(encoding="utf-8") or "another process"
    except OSError:
        return "another process"


def _owner(path: Path) -> Path:
    return path.with_name(path.name + ".owner")
