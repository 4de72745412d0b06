"""Files that survive a power cut: written whole or not at all, and waited for until they are on the disk."""

from __future__ import annotations

import os
from pathlib import Path

from marketsync.errors import StoreError


def made(folder: Path) -> Path:
    """Make the folder where there is none; raises `StoreError` where that is refused."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"the folder {folder} cannot be made: {error}; is its disk there, and writable?") from error
    return folder


def sync(path: Path) -> None:
    """Wait until the file's content, or the folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """Put the content under the name in one step, durably; a reader sees the old file or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync(path.parent)
