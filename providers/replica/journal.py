"""What the replica was asked and what it answered: the in-memory log, its file, and proofs read out of a log.

An entry is a dict that JSON can hold:

    n         number of the request, from 1, in the order received
    sent      when the request had arrived at the socket (Unix seconds by the replica's clock, as all times here)
    received  when the simulated network had carried it to the provider; limits count by this
    answered  when the answer was handed to the network; null when it never was
    provider  "alpaca", "tushare" or "nasdaq_data_link"; "" when no provider has such a path
    account   the key it was made with (in the file: its first four characters and an ellipsis)
    request   {"method", "path", "params"}: parameters without credentials; for Tushare api_name, params and fields
    status    HTTP status, null when nothing was answered
    rows      rows in the answer
    bytes     length of the body sent
    fault     name of the injected fault, or null
    refused   why the replica itself refused ("too_frequent", "day_quota", "bad_key", ...), or null
    verdict   what the answer should provoke: rows, empty, not_yet, split, cool_down, quota, drop, refresh_auth,
              stop_provider, stop_dataset, retry, restart, fail
"""

from __future__ import annotations

import json
import os
import threading
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

Entry = dict[str, Any]


class Journal:
    """Entries in memory and, with `path`, in a file of one JSON object a line, each written whole at once."""

    def __init__(self, path: str | Path | None = None) -> None:
        self.entries: list[Entry] = []
        self._numbering = threading.Lock()
        self._count = 0
        self._file = None
        if path is not None:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def number(self) -> int:
        """The next request's number."""
        with self._numbering:
            self._count += 1
            return self._count

    def write(self, entry: Entry) -> None:
        """Append one entry; the line is with the operating system when this returns."""
        self.entries.append(entry)
        if self._file is not None:
            line = json.dumps({**entry, "account": redacted(entry["account"])}, ensure_ascii=False) + "\n"
            os.write(self._file, line.encode())

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


def redacted(account: str | None) -> str | None:
    """The first four characters of a key and an ellipsis."""
    return None if account is None else account[:4] + "…"


def read(path: str | Path) -> list[Entry]:
    """The entries of a log file; a last line that is still being written is left out."""
    text = Path(path).read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def chosen(log: Iterable[Entry], provider: str | None = None, account: str | None = None) -> list[Entry]:
    """Entries of a provider and an account (in full, or as redacted in a file), in the order received."""
    found = [
        entry
        for entry in log
        if (provider is None or entry["provider"] == provider)
        and (account is None or entry["account"] in (account, redacted(account)))
    ]
    return sorted(found, key=lambda entry: entry["received"])


def violations(
    log: Iterable[Entry],
    limit: int,
    window_seconds: float,
    by: str = "received",
    provider: str | None = None,
    account: str | None = None,
) -> int:
    """How many requests came when the `window_seconds` up to and including them held more than `limit` requests.

    Every request counts, also a refused one. `by` is "received" (what a provider sees) or "sent". Two requests exactly
    `window_seconds` apart do not share a window.
    """
    if by not in ("received", "sent"):
        raise ValueError(f"violations are counted by 'received' or 'sent', not by {by!r}")
    times = sorted(entry[by] for entry in chosen(log, provider, account))
    return sum(n + 1 - bisect_right(times, t - window_seconds, hi=n) > limit for n, t in enumerate(times))


def most_at_once(log: Iterable[Entry], provider: str | None = None, account: str | None = None) -> int:
    """The most requests that were on their way at one time, from `sent` to `answered`; one never answered stays so."""
    changes: list[tuple[float, int]] = []
    for entry in chosen(log, provider, account):
        changes.append((entry["sent"], 1))
        if entry["answered"] is not None:
            changes.append((entry["answered"], -1))
    most = now = 0
    for _, change in sorted(changes):  # at one instant an answer comes before the next request
        now += change
        most = max(most, now)
    return most


def repeated(log: Iterable[Entry], verdicts: Iterable[str] | None = None) -> list[tuple[Mapping[str, Any], int]]:
    """Requests asked more than once, as (request, times), most often first.

    Equal means provider, account, method, path and parameters. With `verdicts`, only entries of those count: give
    ("rows", "empty") to learn what was paid for twice and leave honest retries out.
    """
    wanted = None if verdicts is None else set(verdicts)
    counted: dict[str, tuple[Mapping[str, Any], int]] = {}
    for entry in log:
        if wanted is not None and entry["verdict"] not in wanted:
            continue
        key = json.dumps([entry["provider"], entry["account"], entry["request"]], sort_keys=True)
        counted[key] = (entry["request"], counted.get(key, (None, 0))[1] + 1)
    return sorted((found for found in counted.values() if found[1] > 1), key=lambda found: -found[1])
