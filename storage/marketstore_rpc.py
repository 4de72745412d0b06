"""MarketStore's own protocol: msgpack JSON-RPC over HTTP, and what its answers leave out to be said.

A bucket is named `Symbol/Timeframe/AttributeGroup`; rows pass as numpy columns by name. The server answers errors with
HTTP 200, lists only what failed, matches columns by name but stores them by position, and reads a whole year's file
where no range is given: so errors are raised here, every answer is checked, columns are put into the bucket's own order
(`write` takes it from `Bucket.names`), and there is no query without a range. What a dataset is in buckets is no
business of this file.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from marketsync.errors import StoreError

if TYPE_CHECKING:
    import numpy as np
    import requests

Columns = dict[str, "np.ndarray[Any, Any]"]

EPOCH = "Epoch"  # i8, seconds UTC: in every row
NANOSECONDS = "Nanoseconds"  # i4, of the second: in the rows of a variable bucket, where they are sent and answered
VARIABLE = 1  # what the server calls the record type of ticks; 0 is that of bars
# by the numbers that the server gives them; what is skipped is no type of a column
_TYPES = dict(enumerate(("f4", "i4", "f8", "i8", "i8", "i1", "?", "?", "?", "i2", "u1", "u2", "u4", "u8", "U16")))
_SUFFIX = ":Symbol/Timeframe/AttributeGroup"
_NOTHING = "no files returned from query parse"  # said of a bucket that there is not
_CONNECT_SECONDS = 10.0
_SHOWN_CHARACTERS = 300


class Refused(StoreError):
    """The server answered that it could not: nothing, or a part of what was sent, has been done."""


@dataclass(frozen=True)
class Bucket:
    """What the server says of a bucket: its columns and their types in the order of their places, ticks or bars."""

    types: dict[str, str]
    variable: bool
    seconds: int  # of the timeframe

    @property
    def names(self) -> list[str]:
        return list(self.types)


@dataclass(frozen=True)
class Range:
    """Rows of one bucket from `start` to `end`, seconds UTC, both included; `columns` (empty: all) beside the time.

    With `last` only the newest row of the range is given.
    """

    key: str
    start: int
    end: int
    columns: Sequence[str] = ()
    last: bool = False


@dataclass(frozen=True)
class Found:
    """What ranges hold, in their order (None: there is no such bucket), and the time zone the server works in."""

    rows: list[Columns | None]
    timezone: str | None


@dataclass
class Client:
    """One server. Threads may share it: each has a connection of its own, which is kept open."""

    endpoint: str  # of the RPC, without credentials
    timeout_seconds: float = 60.0
    auth: tuple[str, str] | None = field(default=None, repr=False)
    verify: bool | str = True
    _local: threading.local = field(default_factory=threading.local, repr=False)
    _sessions: list[requests.Session] = field(default_factory=list, repr=False)
    _ids: itertools.count[int] = field(default_factory=lambda: itertools.count(1), repr=False)
    _closed: bool = False

    def version(self) -> str:
        """Return the version that the server says it has: that of its source."""
        # whatever the status: only the header says anything
        answer = self._sent("asking for the version", "HEAD", None, again=True)
        return answer.headers.get("Marketstore-Version", "")

    def listed(self) -> list[str]:
        """Return the names of all buckets, sorted."""
        return sorted(self._call("ListSymbols", {"format": "tbk"}, again=True).get("Results") or [])

    def buckets(self, keys: Sequence[str]) -> list[Bucket | None]:
        """Return what the buckets are; None for one that there is not."""
        if not keys:
            return []
        answers = self._answers("GetInfo", [{"key": key} for key in keys], again=True)
        if len(answers) != len(keys):
            raise StoreError(f"MarketStore {self.endpoint} described {len(answers)} of {len(keys)} buckets")
        found = [_bucket(answer) for answer in answers]
        if None in found:
            # an error is taken for "there is none" only where the list says so too: ticks would be sent again
            there = set(self.listed())
            for key, bucket, answer in zip(keys, found, answers, strict=True):
                if bucket is None and key in there:
                    said = (answer.get("ServerResp") or {}).get("error") or "nothing"
                    raise StoreError(f"MarketStore {self.endpoint} says of its bucket {key}: {_short(said)}")
        return found

    def query(self, ranges: Sequence[Range]) -> Found:
        """Return the rows of each range, by time; raises `Refused`."""
        if not ranges:
            return Found([], None)
        try:
            answer = self._call("Query", {"requests": [_question(each) for each in ranges]}, again=True)
        except Refused as error:
            if _NOTHING not in str(error).lower():
                raise
            if len(ranges) == 1:
                return Found([None], None)
            # of several it says so for one: which of them it is, only asking one by one tells
            each = [self.query([one]) for one in ranges]
            zones = [found.timezone for found in each if found.timezone is not None]
            return Found([found.rows[0] for found in each], zones[0] if zones else None)
        answers = answer.get("responses") or []
        if len(answers) != len(ranges):
            raise StoreError(f"MarketStore {self.endpoint} answered {len(answers)} of {len(ranges)} questions")
        rows = [self._columns(one.key, said) for one, said in zip(ranges, answers, strict=True)]
        return Found(rows, answer.get("timezone"))

    def write(self, rows: Mapping[str, Columns], *, variable: bool) -> None:
        """Write rows to buckets of one shape (key: columns, which stand in the order that those buckets have).

        Not atomic: after `Refused` some of several buckets may have their rows, and nobody can say which; after any
        other error so may the one.
        """
        import numpy as np

        rows = {key: columns for key, columns in rows.items() if len(columns[EPOCH])}
        if not rows:
            return
        first = next(iter(rows.values()))
        lengths = {key: len(columns[EPOCH]) for key, columns in rows.items()}
        starts = dict(zip(lengths, itertools.accumulate(lengths.values(), initial=0), strict=False))
        if any(list(columns) != list(first) for columns in rows.values()):
            raise ValueError("the buckets of one write have their columns in one order")
        together = {name: np.concatenate([columns[name] for columns in rows.values()]) for name in first}
        dataset = {
            "types": [_type(column) for column in together.values()],
            "names": list(together),
            "data": [np.ascontiguousarray(column).tobytes() for column in together.values()],
            "length": sum(lengths.values()),
            "startindex": starts,
            "lengths": lengths,
        }
        self._failures("Write", [{"dataset": dataset, "is_variable_length": variable}], ", ".join(list(rows)[:3]))

    def destroy(self, key: str) -> None:
        """Remove a bucket with the rows of all its years; raises `Refused`, also where there is none."""
        self._failures("Destroy", [{"key": key}], key)

    def close(self) -> None:
        """Close the connections."""
        self._closed = True
        while self._sessions:
            self._sessions.pop().close()

    # how it is done

    def _failures(self, method: str, requests: list[dict[str, Any]], what: str) -> None:
        """Call what answers nothing, or one line a request: each that says an error is one."""
        for answer in self._answers(method, requests):
            if why := answer.get("error"):
                raise Refused(f"MarketStore {self.endpoint} refused {method} of {what}: {_short(why)}{_remedy(why)}")

    def _answers(self, method: str, requests: list[dict[str, Any]], *, again: bool = False) -> list[dict[str, Any]]:
        return self._call(method, {"requests": requests}, again=again).get("responses") or []

    def _columns(self, key: str, answer: dict[str, Any]) -> Columns | None:
        import numpy as np

        result = answer.get("result")
        if result is None:
            return None
        lengths = {name.removesuffix(_SUFFIX): length for name, length in (result.get("lengths") or {}).items()}
        if key not in lengths:
            return None
        start = {name.removesuffix(_SUFFIX): at for name, at in result["startindex"].items()}[key]
        chosen = slice(start, start + lengths[key])
        columns: Columns = {}
        for name, type_, data in zip(result["names"], result["types"], result["data"] or [], strict=False):
            column = np.frombuffer(data, f"<{type_}")[chosen]
            if len(column) != lengths[key]:
                raise StoreError(f"MarketStore {self.endpoint} answered a part of column {name!r} of {key}; ask again")
            columns[name] = column
        if lengths[key] and EPOCH not in columns:
            raise StoreError(f"MarketStore {self.endpoint} answered rows of {key} without their time")
        return columns

    def _call(self, method: str, params: dict[str, Any], *, again: bool = False) -> dict[str, Any]:
        import msgpack

        number = str(next(self._ids))
        request = {"jsonrpc": "2.0", "method": f"DataService.{method}", "params": params, "id": number}
        answer = self._sent(f"calling {method}", "POST", msgpack.packb(request), again=again)
        if answer.status_code != HTTPStatus.OK:
            raise StoreError(
                f"MarketStore {self.endpoint}, calling {method}: HTTP {answer.status_code} {answer.reason}"
            )
        try:
            reply = msgpack.unpackb(answer.content, strict_map_key=False)
            said, result, back = reply.get("error"), reply.get("result"), str(reply.get("id"))
        except (ValueError, AttributeError, msgpack.UnpackException) as error:
            raise StoreError(
                f"{self.endpoint} does not answer as a MarketStore; does the URL name its host and port?"
            ) from error
        if said:
            why = said.get("message", said) if isinstance(said, dict) else said
            raise Refused(f"MarketStore {self.endpoint} refused {method}: {_short(str(why))}{_remedy(str(why))}")
        if result is None or back != number:
            raise StoreError(f"MarketStore {self.endpoint} answered {method} with nothing, or another question")
        return result

    def _sent(self, what: str, verb: str, body: bytes | None, *, again: bool = False) -> requests.Response:
        """Send; what only reads is sent once more over a new connection when the server had closed the old one."""
        import requests

        for last in (not again, True):
            session = self._session()
            try:
                return session.request(
                    verb,
                    self.endpoint,
                    data=body,
                    headers={"Content-Type": "application/x-msgpack"},
                    timeout=(_CONNECT_SECONDS, self.timeout_seconds),
                    allow_redirects=False,
                )
            except requests.ConnectionError as error:
                if last or isinstance(error, requests.ConnectTimeout):
                    raise StoreError(
                        f"MarketStore {self.endpoint}, {what}: {_short(str(error))}; is the server up, and does the "
                        "URL name its host and port?"
                    ) from error
                continue
            except requests.RequestException as error:
                raise StoreError(
                    f"MarketStore {self.endpoint}, {what}: {_short(str(error))}; ?timeout=SECONDS in the URL gives "
                    "it longer"
                ) from error
        raise AssertionError("unreachable")

    def _session(self) -> requests.Session:
        import requests

        if self._closed:
            raise StoreError(f"the store {self.endpoint} was closed; open it again")
        session = getattr(self._local, "session", None)
        if session is None:
            session = self._local.session = requests.Session()
            session.auth, session.verify = self.auth, self.verify
            session.trust_env = False  # a proxy of the environment is for the providers
            self._sessions.append(session)
        return session


def _bucket(answer: dict[str, Any]) -> Bucket | None:
    shapes = answer.get("DSV")
    if (answer.get("ServerResp") or {}).get("error") or not shapes:
        return None
    types = {shape["Name"]: _TYPES.get(shape["Type"], "?") for shape in shapes if shape["Name"] != NANOSECONDS}
    return Bucket(types, answer["RecordType"] == VARIABLE, answer["TimeFrame"] // 1_000_000_000)


def _question(one: Range) -> dict[str, Any]:
    said: dict[str, Any] = {"destination": one.key, "epoch_start": one.start, "epoch_end": one.end}
    # the end is included, and so is the last nanosecond of its second
    said["epoch_end_nanos"] = 999_999_999
    if one.columns:
        said["columns"] = [EPOCH, *one.columns]
    if one.last:
        said["limit_record_count"] = 1
    return said


def _type(column: np.ndarray[Any, Any]) -> str:
    said = column.dtype.str.lstrip("<|=")
    if said not in _TYPES.values():
        raise ValueError(f"MarketStore has no type for {column.dtype}")
    return said


def _short(text: str) -> str:
    words = " ".join(text.split())
    return words if len(words) <= _SHOWN_CHARACTERS else words[: _SHOWN_CHARACTERS - 3] + "..."


def _remedy(why: str) -> str:
    if "not allowed on replica" in why:
        return "; name the replica's master in the URL: what is written there reaches the replica"
    return ""
