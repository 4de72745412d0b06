"""The spool: sealed segments as Arrow IPC files on this host's disk, and the rows that were set aside (quarantine).

A segment is whole and durable (fsynced, renamed into place) before anybody is told of it. Which segments there are,
and who still has to get them, is in the ledger; nothing here knows a store or a provider.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid
from collections.abc import Collection, Iterable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from marketsync.errors import MarketSyncError
from storage.files import write_whole

if TYPE_CHECKING:
    import polars as pl

_folders = threading.Lock()  # a lane's folder is taken away by nobody in this process who lets another put a file there
_TRIES, _TRY_SECONDS = 50, 0.01  # to put one there while another process takes it away


class Spool:
    """The segment files below one folder."""

    def __init__(self, root: Path):
        self.root = root
        self._segments = root / "spool"
        self._quarantine = root / "quarantine"
        self._segments.mkdir(parents=True, exist_ok=True)

    @cached_property
    def name(self) -> str:
        """What the ledger calls this spool; it stays with the folder, while a container's host name changes."""
        file = self.root / "spool.name"
        if not file.exists():
            fresh = self.root / f"spool.{uuid.uuid4().hex}"
            fresh.write_text(f"{socket.gethostname()}-{uuid.uuid4().hex[:8]}", encoding="utf-8")
            try:
                os.link(fresh, file)  # unlike a rename, it never replaces the name that another process has given
            except FileExistsError:
                pass
            except OSError:  # no links on this file system
                fresh.replace(file)
            fresh.unlink(missing_ok=True)
        return file.read_text(encoding="utf-8")

    def write(self, lane: str, seq: int, frame: pl.DataFrame) -> tuple[str, int]:
        """Write a segment durably; return its path below the root and its size in bytes."""
        folder = self._segments / lane
        path = folder / f"{seq:08d}.arrow"
        part = path.with_suffix(".part")
        try:
            with _opened(part) as file:
                frame.write_ipc(file, compression="uncompressed")
                file.flush()
                os.fsync(file.fileno())
                size = file.tell()
            part.replace(path)
            _sync_folder(folder)
        except OSError as error:
            raise MarketSyncError(
                f"segment {path} cannot be written: {error}; free space or move `state`, then run again "
                "(what is not sealed is asked again)"
            ) from error
        return str(path.relative_to(self.root)), size

    def has(self, path: str) -> bool:
        """Return whether a segment file is there."""
        return (self.root / path).exists()

    def read(self, path: str) -> pl.DataFrame:
        """Read a segment back (memory-mapped)."""
        import polars as pl

        try:
            return pl.read_ipc(self.root / path)
        except FileNotFoundError as error:
            raise MarketSyncError(
                f"segment {self.root / path} is gone although it was not delivered everywhere; "
                "`sync --refetch` asks for its rows again"
            ) from error

    def remove(self, paths: Iterable[str]) -> None:
        """Delete segment files; ones that are gone already are fine."""
        folders = set()
        for path in paths:
            file = self.root / path
            file.unlink(missing_ok=True)
            folders.add(file.parent)
        for folder in folders:
            try:
                with _folders:
                    folder.rmdir()
            except OSError:
                # Other segments of the lane are still there.
                continue

    def strangers(self, known: Collection[str]) -> dict[str, list[str]]:
        """Return the paths of files (whole or half written) that are not among the known ones, by lane."""
        found: dict[str, list[str]] = {}
        for file in self._segments.glob("*/*"):
            path = str(file.relative_to(self.root))
            if path not in known:
                found.setdefault(file.parent.name, []).append(path)
        return found

    def set_aside(self, dataset: str, segment_id: str, rejected: pl.DataFrame, store_id: str = "") -> str:
        """Keep rejected rows (with their reason) durably as JSON lines that a person can read; return the file's path.
        `store_id` names the one store that refused them; else no store has them."""
        path = self.aside(dataset, segment_id, store_id)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, rejected.write_ndjson().encode())
        return str(path)

    def aside(self, dataset: str, segment_id: str, store_id: str = "") -> Path:
        """Return the file of a segment's rows that were set aside, which is there when some were."""
        return self.quarantine(dataset, store_id) / f"{segment_id.replace(':', '-')}.jsonl"

    def quarantine(self, dataset: str, store_id: str = "") -> Path:
        """Return the folder of a dataset's rows that were set aside, or of those of one store alone."""
        return self._quarantine / dataset / store_id

    def quarantined(self, dataset: str, store_id: str = "") -> dict[str, Path]:
        """Return the quarantine files of a dataset by segment id (those of one store alone when it is named), the
        oldest first."""
        files = sorted(self.quarantine(dataset, store_id).glob("*.jsonl"), key=lambda file: file.stat().st_mtime)
        return {":".join(file.stem.rsplit("-", 1)): file for file in files}


def _opened(part: Path) -> BinaryIO:
    """Open a file anew in its folder, which a thread or process may be taking away that has removed the last segment of
    the lane."""
    left = _TRIES
    while True:
        try:
            with _folders:
                part.parent.mkdir(parents=True, exist_ok=True)
                return part.open("wb")
        except (FileNotFoundError, FileExistsError):
            left -= 1
            if not left:
                raise
        time.sleep(_TRY_SECONDS)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
