"""A store that is a log of batches: what NATS and Redis do alike behind the `Store` protocol.

A delivery is published, whole and once, under its lane and seq; it is followed (`storage/following.py`) and not read as
a table: what the log says of a key is the sum of all of its batches, of which the server may have dropped the oldest,
so scanning, counting and SQL are refused with that reason. Engines are journals: what each keeps, and in what.
"""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import date, datetime
from typing import TYPE_CHECKING, Any, NoReturn, Protocol
from urllib.parse import parse_qsl

from marketsync.durations import FIXED_UNITS, parse_span_of
from marketsync.errors import CapabilityError, ConfigurationError, StoreError
from marketsync.schema import Schema
from storage import admission, evolution, filters, location, messages
from storage.messages import Envelope, Format, Message
from storage.protocol import Batch, Capabilities, Filter, TableInfo, Writers, Written

if TYPE_CHECKING:
    import polars as pl
    import pyarrow as pa

    from storage.fingerprints import Recipe

NOT_A_TABLE = (
    "table: a log of batches is followed (`marketsync follow`, `from marketsync import follow`) and not read as a "
    "table; ask a store that has tables."
)
_NO_NAN = " nan: JSON has no word for it; map NaN to null in the definition, or use ?format=arrow."
_TIMES_TO_TRY = 20  # how often a description is written anew because another process wrote it first
_COMPRESSIONS: dict[str, messages.Compression] = {"zstd": "zstd", "lz4": "lz4", "none": "uncompressed"}


def capabilities(format: Format) -> Capabilities:
    """Return what a log in this format promises."""
    arrow = format is Format.ARROW
    return Capabilities(
        atomic=True,  # nobody is given a batch before it is whole
        transactions=True,  # its lane's seq is the batch's own
        nanoseconds=True,
        nan=arrow,
        unsigned_64=True,
        nul=True,
        evolve=True,
        writers=Writers.MANY_PROCESSES,
        table=False,
        why=NOT_A_TABLE + ("" if arrow else _NO_NAN),
    )


@dataclass(frozen=True)
class Described:
    """What a journal has written down about a dataset, and by what it tells that nobody has written since."""

    text: str | None  # None: nothing yet, or of a log that is no more
    version: str


@dataclass(frozen=True)
class Arrived:
    """One message as a follower gets it: where it is in the log, and what acknowledges it. `gap`: the server has
    dropped some that came before it and were not given to this follower, or its group."""

    place: str
    receipt: str
    message: Message
    gap: bool = False


class Cursor(Protocol):
    """A place in the log of one dataset that moves on as messages are acknowledged. One at a time is out."""

    def next(self, seconds: float) -> Arrived | None:
        """Wait up to `seconds` for the next message; None when there is none, or another of the group has one."""
        ...

    def fetch(self, place: str) -> Message | None:
        """Return the message at a place; None when the server has dropped it."""
        ...

    def done(self, arrived: Arrived) -> None:
        """Acknowledge a message: nobody of the group gets it again, and the next one is given out."""
        ...

    def hold(self, arrived: Arrived) -> None:
        """Say that a message is still being worked on."""
        ...

    def close(self, out: Arrived | None) -> None:
        """Let go; `out`, which was not acknowledged, is given at once to whoever of the group asks next."""
        ...


class Journal(Protocol):
    """What an engine does for a log. Every method raises `StoreError` that says what was being done, and where."""

    @property
    def most(self) -> int:
        """The bytes that the rows of a message may have."""
        ...

    def described(self, dataset: str) -> Described:
        """Return what was written down about a dataset."""
        ...

    def describe(self, dataset: str, text: str, version: str) -> bool:
        """Write down what there is to know about a dataset, and make its log where there is none; False when somebody
        else has written since `version`."""
        ...

    def committed(self, dataset: str, lane: str) -> int:
        """Return the seq of the lane's last whole batch; 0 when it has none."""
        ...

    def publish(self, dataset: str, lane: str, seq: int, parts: list[Message]) -> bool:
        """Publish the parts after the lane's last batch; False when that is at or past `seq`."""
        ...

    def datasets(self) -> list[str]:
        """Return the datasets that something was written down about."""
        ...

    def kept(self, dataset: str) -> tuple[int, int]:
        """Return how many messages of a dataset the server has, and the bytes that they take (0: not told apart)."""
        ...

    def version(self) -> str:
        """Return the server's name and version."""
        ...

    def cursor(self, dataset: str, group: str | None, start: datetime | str, takeover_seconds: float) -> Cursor:
        """Return a cursor that begins at `start` (all, new, or an instant), or where its group is already."""
        ...

    def close(self) -> None:
        """Let go of connections and threads."""
        ...


class LogStore:
    """Logs of one server, a dataset each. Threads share one connection for publishing, one after the other."""

    def __init__(self, url: str, name: str, journal: Journal, format: Format, compression: str):
        self.url = url
        self.name = name
        self.capabilities = capabilities(format)
        self.journal = journal
        self._format = format
        self._compression = compression
        self._lock = threading.RLock()

    # the log: creation, identity, shape

    def ensure(self, dataset: str, schema: Schema) -> str:
        location.split(dataset)
        evolution.check(dataset, schema)
        with self._lock:
            for _ in range(_TIMES_TO_TRY):
                found = self.journal.described(dataset)
                marker, now, shapes = _read(found) or (uuid.uuid4().hex, None, {})
                if now == schema:
                    return marker
                if now is not None:
                    evolution.added(dataset, now, schema)
                shapes = {**shapes, schema.hash(): evolution.to_text(schema)}
                said = json.dumps({"marker": marker, "schema": schema.hash(), "schemas": shapes})
                if self.journal.describe(dataset, said, found.version):
                    return marker
        raise StoreError(f"the log of {dataset} in {self.url} is being described by others again and again; try later")

    def marker(self, dataset: str) -> str | None:
        known = self._known(dataset)
        return None if known is None else known[0]

    def schema(self, dataset: str) -> Schema | None:
        known = self._known(dataset)
        return None if known is None else known[1]

    def schemas(self, dataset: str) -> dict[str, Schema]:
        """Return every schema that batches of the log were made by, by its hash."""
        known = self._known(dataset)
        return {} if known is None else {each: evolution.from_text(text) for each, text in known[2].items()}

    # writing

    def committed(self, dataset: str, lane: str) -> int:
        with self._lock:
            return 0 if self._known(dataset) is None else self.journal.committed(dataset, lane)

    def write(self, batch: Batch) -> Written:
        """As every store does; a log does not look at rows that are there, so all of the batch's count as inserted."""
        with self._lock:
            stored = self._log(batch.dataset)
            if self.journal.committed(batch.dataset, batch.lane) >= batch.seq:
                return Written(already=True)
            frame = self._admitted(batch.dataset, batch.frame, batch.schema, stored)
            done = self._publish(batch.dataset, batch.schema, batch.lane, batch.seq, frame, batch.mode)
            return Written(inserted=frame.height) if done else Written(already=True)

    def replace(self, dataset: str, schema: Schema, frame: pl.DataFrame, span: Filter) -> Written:
        """Publish that the rows of a span are exactly these; how many others that deletes only a follower can tell."""
        with self._lock:
            stored = self._log(dataset)
            put = self._admitted(dataset, frame, schema, stored)
            filters.refuse_outside(dataset, put, span, stored)
            self._publish(dataset, schema, _own_lane(messages.REPLACE), 1, put, messages.REPLACE, span)
            return Written(inserted=put.height)

    def delete(self, dataset: str, filter: Filter) -> int:
        """Publish that the rows of a span are deleted; returns 0, since how many they are only a follower can tell."""
        import polars as pl

        with self._lock:
            stored = self._log(dataset)
            filters.expression(dataset, filter, stored)  # refuses what the schema has no columns for
            none = pl.DataFrame(schema=stored.polars(system=True))
            self._publish(dataset, stored, _own_lane(messages.DELETE), 1, none, messages.DELETE, filter)
            return 0

    # what a log cannot be asked

    def scan(self, dataset: str, filter: Filter = Filter()) -> pl.LazyFrame:
        self._refuse("be scanned")

    def arrow(self, dataset: str, filter: Filter = Filter()) -> Iterator[pa.RecordBatch]:
        self._refuse("be scanned")

    def watermarks(self, dataset: str) -> dict[str, datetime | date]:
        self._refuse("be asked for the newest rows")

    def count(self, dataset: str, filter: Filter = Filter()) -> int:
        self._refuse("be asked how many rows it has")

    def fingerprints(self, dataset: str, recipe: Recipe, filter: Filter = Filter()) -> pl.DataFrame:
        self._refuse("be compared by fingerprints")

    def query(self, sql: str) -> pl.DataFrame:
        self._refuse("be asked in SQL")

    # the rest

    def datasets(self) -> list[str]:
        with self._lock:
            return sorted(self.journal.datasets())

    def info(self, dataset: str) -> TableInfo:
        """Return what the server has of the log; `rows` counts its messages, and 0 bytes stand for: not told apart."""
        with self._lock:
            self._log(dataset)
            kept, size = self.journal.kept(dataset)
        return TableInfo(dataset, rows=kept, bytes=size, files=1, commits=None, location=f"{self.url}: {dataset}")

    def version(self) -> str:
        with self._lock:
            return self.journal.version()

    def maintain(self, dataset: str) -> str:
        self._log(dataset)
        return f"{dataset}: a log needs no maintenance; the limits of the server say what it drops"

    def close(self) -> None:
        with self._lock:
            self.journal.close()

    # how it is done

    def _known(self, dataset: str) -> tuple[str, Schema, dict[str, str]] | None:
        location.split(dataset)
        with self._lock:
            return _read(self.journal.described(dataset))

    def _log(self, dataset: str) -> Schema:
        known = self._known(dataset)
        if known is None:
            raise location.absent("log", dataset, self.url)
        return known[1]

    def _admitted(self, dataset: str, frame: pl.DataFrame, sent: Schema, stored: Schema) -> pl.DataFrame:
        admitted = admission.admit(dataset, frame, sent, self.capabilities)
        evolution.fit(dataset, admitted, sent, stored)  # for what it refuses: a batch is published as it was made
        return admitted

    def _publish(
        self,
        dataset: str,
        schema: Schema,
        lane: str,
        seq: int,
        frame: pl.DataFrame,
        mode: str,
        span: Filter | None = None,
    ) -> bool:
        said = Envelope(dataset, schema.hash(), lane, seq, str(mode), frame.height, self._format, span)
        data = list(messages.payloads(frame, self._format, self.journal.most, _COMPRESSIONS[self._compression]))
        heads = messages.headers(said, len(data))
        return self.journal.publish(
            dataset, lane, seq, [Message(head, part) for head, part in zip(heads, data, strict=True)]
        )

    def _refuse(self, what: str) -> NoReturn:
        raise CapabilityError(
            f"the store {self.name} is a log of batches and cannot {what}: it is followed (`marketsync follow "
            f"{self.name} DATASET`, or `from marketsync import follow`); ask a store of the plan that has tables"
        )


def refuse_beyond(said: Mapping[str, Any], dataset: str, parts: list[Message]) -> None:
    """Raise `StoreError` for a batch that the limits in the URL would cut as it is published."""
    if not {"max_messages", "max_bytes"} & said.keys():
        return
    size = sum(len(part.data) for part in parts)
    for option, needed in (("max_messages", len(parts)), ("max_bytes", size)):
        if needed > said.get(option, needed):
            raise StoreError(
                f"a batch of {dataset} is {len(parts)} messages, {size:,} bytes together, and {option}={said[option]} "
                "in the URL has no room for it, so that nobody would ever be given it; raise that"
            )


def options(name: str, scheme: str, query: str, known: Mapping[str, Callable[[str], Any]]) -> dict[str, Any]:
    """Return the options of a URL as `known` reads them; `ConfigurationError` for one that there is not, or a value
    that cannot be meant."""
    known = {**known, "format": Format, "compression": _compression}
    found: dict[str, Any] = {}
    for option, value in parse_qsl(query, keep_blank_values=True):
        if option not in known:
            said = ", ".join(sorted(known))
            raise ConfigurationError(f"the store {name}: {option} is no option of a {scheme}:// store; options: {said}")
        try:
            found[option] = known[option](value)
        except ValueError as error:
            raise ConfigurationError(f"the store {name}: {option}={value!r}: {error}") from error
    return found


def count_of(text: str) -> int:
    """Read a count of one or more, as an option has it."""
    if not text.isdigit() or not int(text):
        raise ValueError("write a whole number of one or more")
    return int(text)


def bytes_of(text: str) -> int:
    """Read a size such as 500000, 64KB, 2MB or 10GB."""
    units = {"kb": 1 << 10, "mb": 1 << 20, "gb": 1 << 30}
    number, unit = (text[:-2], units[text[-2:].lower()]) if text[-2:].lower() in units else (text, 1)
    try:
        return count_of(number) * unit
    except ValueError:
        raise ValueError("write a size such as 500000, 64KB, 2MB or 10GB") from None


def seconds_of(text: str) -> float:
    """Read a span such as 30days, 12h or 10s."""
    return parse_span_of(text, FIXED_UNITS).seconds


def switch_of(text: str) -> bool:
    """Read true or false."""
    if text.lower() not in ("true", "false"):
        raise ValueError("write true or false")
    return text.lower() == "true"


def one_of(*words: str) -> Callable[[str], str]:
    """Return what reads one of these words."""

    def read(text: str) -> str:
        if text not in words:
            raise ValueError(f"write one of {', '.join(words)}")
        return text

    return read


_compression = one_of(*_COMPRESSIONS)


def _read(found: Described) -> tuple[str, Schema, dict[str, str]] | None:
    """Return marker, schema, and the text of every schema by its hash."""
    if found.text is None:
        return None
    said = json.loads(found.text)
    return said["marker"], evolution.from_text(said["schemas"][said["schema"]]), said["schemas"]


def _own_lane(what: str) -> str:
    return f"{what}-{uuid.uuid4().hex}"
