"""What the commands print with: a console for people, plain lines where there is no terminal, JSON on stdout alone."""

from __future__ import annotations

import json
import math
import sys
from datetime import date, datetime
from pathlib import Path
from typing import Any

from marketsync.errors import ConfigurationError


def say(text: str = "") -> None:
    """Print a line for people on stderr, so that stdout stays clean for results."""
    sys.stderr.write(text + "\n")


def put(text: str) -> None:
    """Print a result on stdout."""
    sys.stdout.write(text if text.endswith("\n") else text + "\n")


def make_folder(folder: Path) -> None:
    """Make a folder that a person named; ConfigurationError when it cannot be one."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(f"{folder} cannot be made a folder: {error.strerror}; name another one") from None


answered = False  # whether the one object of --json is printed, or being printed


def put_json(value: Any) -> None:
    """Print one JSON object on stdout and nothing else. JSON has no NaN and no infinity: they are null."""
    try:
        text = json.dumps(value, indent=2, default=plain, ensure_ascii=False, allow_nan=False)
    except ValueError:
        text = json.dumps(_finite(value), indent=2, default=plain, ensure_ascii=False)
    put_object(text)


def put_object(text: str) -> None:
    """Print the one JSON object of a command, given as text. From here on a signal no longer cuts it short."""
    global answered
    answered = True
    put(text)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return value


def plain(value: Any) -> Any:
    """Return what JSON has no word for as text."""
    if isinstance(value, datetime):
        return value.isoformat().replace("+00:00", "Z")
    if isinstance(value, date):
        return value.isoformat()
    return str(value)


def many(count: int, noun: str) -> str:
    """Return a count with its noun: 1 request, 2,000 requests."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def size(count: float) -> str:
    """Return bytes as a person reads them."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def length(seconds: float) -> str:
    """Return seconds as a person reads them."""
    if seconds < 90:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = seconds / 60
    if minutes < 90:
        return f"{minutes:.0f} min"
    hours = minutes / 60
    return f"{hours:.1f} h" if hours < 48 else f"{hours / 24:.1f} days"


def program() -> str:
    """Return how this command is called here: by its name when that is on the PATH, else by its path."""
    import os
    import shutil

    found = shutil.which("marketsync")
    here = sys.argv[0]
    if found and os.path.realpath(found) == os.path.realpath(here):
        return "marketsync"
    near = os.path.relpath(here)
    return here if near.startswith("..") else near
