"""Following a log: its batches one after the other, each whole, for a program that keeps up with a dataset.

`from marketsync import follow` leads here. What a log is made of is in `messages.py`, the servers are in `nats.py` and
`redis.py`; a store with tables is read instead (`reader.py`).
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

from marketsync.errors import ConfigurationError, StoreError
from marketsync.schema import Schema
from storage import filters, messages
from storage.log import Arrived, Cursor, LogStore
from storage.messages import Envelope
from storage.protocol import Filter, Mode
from storage.registry import open_store

if TYPE_CHECKING:
    import polars as pl

log = logging.getLogger(__name__)

Answer = TypeVar("Answer")

STARTS = ("all", "new")
TAKEOVER_SECONDS = 30.0
RECONNECT_SECONDS = 600.0  # how long a server may be away before a follower gives up
_LISTEN_SECONDS = 1.0
_GROUP = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


@dataclass
class Followed:
    """One batch of a dataset. Once its effects are safe, `ack()` it: then it does not come again.

    `mode` is append (no key of it was there before), upsert, replace (the rows of `span` are exactly these) or delete
    (those of `span` are gone). `id` is unique in the log: who keeps it with the effects has each of them once, whatever
    dies when. A batch comes again, with the same id, when its follower died before it had acknowledged it.
    """

    dataset: str
    id: str
    mode: str
    frame: pl.DataFrame
    schema: Schema
    span: Filter | None
    _following: Following = field(repr=False)
    _arrived: Arrived = field(repr=False)

    def ack(self) -> None:
        """Say that this batch is done with; waits for a server that is away, as asking for the next one does."""
        self._following._acknowledge(self._arrived)

    def applied(self, rows: pl.DataFrame) -> pl.DataFrame:
        """Return a table's rows (one a key; an empty frame to begin with) as they are after this batch.

        Doing it twice changes nothing. A column that the table has gained since the batch was made is left alone.
        """
        import polars as pl

        if not rows.width:
            return self.frame
        key, new = list(self.schema.key), self.frame
        if self.span is not None:
            gone = filters.expression(self.dataset, self.span, self.schema)
            rows = rows.clear() if gone is None else rows.filter(~gone.fill_null(value=False))
        rows = rows.with_columns(pl.lit(None, new.schema[name]).alias(name) for name in new.columns if name not in rows)
        if later := [name for name in rows.columns if name not in new]:
            new = new.join(rows.select(*key, *later), on=key, how="left")
        kept = rows.join(new, on=key, how="anti")
        names = [*self.frame.columns, *later]
        return pl.concat([kept.select(names), new.select(names)])


class Following:
    """Yields batches as they come; a context manager that closes the connection. With a group one batch is out at a
    time: it is acknowledged before the next one is asked for."""

    def __init__(
        self,
        store: LogStore,
        dataset: str,
        group: str | None,
        start: datetime | str,
        *,
        system: bool,
        idle_seconds: float | None,
        takeover_seconds: float,
    ):
        self.lost = 0  # how often the server had dropped batches, or parts of one, before they were read here
        self._store, self._dataset, self._group = store, dataset, group
        self._system, self._idle_seconds, self._takeover = system, idle_seconds, takeover_seconds
        self._parts: dict[str, dict[str, messages.Message]] = {}  # by lane, those of the batch that is on its way
        self._seen: dict[str, int] = {}  # the newest batch of each lane that was acknowledged here
        self._out: tuple[Arrived, Envelope] | None = None
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._marker = store.marker(dataset)
        if self._marker is None:
            there = ", ".join(store.datasets()) or "none yet"
            raise StoreError(
                f"there is no log of {dataset} in {store.url}: the first sync of a plan with that store makes it; "
                f"logs there: {there}"
            )
        self._schemas = store.schemas(dataset)
        self._cursor: Cursor = store.journal.cursor(dataset, group, start, takeover_seconds)
        if group is not None:
            threading.Thread(target=self._hold, name=f"hold-{dataset}", daemon=True).start()

    def __enter__(self) -> Following:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __iter__(self) -> Iterator[Followed]:
        return self

    def __next__(self) -> Followed:
        """Wait for the next whole batch; ends when none came for `idle_seconds` (0: when there is none now).

        Raises StoreError when the last one was not acknowledged, when the log was deleted or made anew, and when the
        server was away for longer than `RECONNECT_SECONDS`.
        """
        if self._out is not None:
            raise StoreError(
                f"the batch {self._out[1].id} of {self._dataset} was not acknowledged: call its ack() when its effects "
                "are safe, before the next one is asked for"
            )
        since = time.monotonic()
        while not self._ended.is_set():
            left = _LISTEN_SECONDS
            if self._idle_seconds is not None:
                left = min(left, self._idle_seconds - (time.monotonic() - since))
            try:
                arrived = self._asked(partial(self._cursor.next, max(0.0, left)))
            except StoreError:
                if self._ended.is_set():
                    break
                raise
            if arrived is None:
                if left <= 0:
                    break
                self._refuse_another()  # some servers are only silent about a log that is no more
                continue
            since = time.monotonic()
            found = self._whole(arrived)
            if found is not None:
                return found
        raise StopIteration

    def close(self) -> None:
        """Let go of the connection; a batch that was not acknowledged comes again to whoever follows next."""
        if self._ended.is_set():
            return
        self._ended.set()
        with self._lock:
            out = None if self._out is None else self._out[0]
        try:
            self._cursor.close(out)
        except StoreError as error:
            log.warning("%s", error)
        self._store.close()

    def _asked(self, ask: Callable[[], Answer]) -> Answer:
        """Ask the server, through its absence."""
        gone_at: float | None = None
        while True:
            try:
                return ask()
            except StoreError as error:
                if gone_at is None:
                    gone_at = time.monotonic()
                    log.warning("%s; trying again for %g minutes", error, RECONNECT_SECONDS / 60)
                if time.monotonic() - gone_at > RECONNECT_SECONDS:
                    raise
                self._refuse_another()
                if self._ended.wait(1.0):
                    raise

    def _refuse_another(self) -> None:
        """Raise when the server is there and the log is not the one that was followed."""
        try:
            now = self._store.marker(self._dataset)
        except StoreError:
            return
        if now != self._marker:
            what = "was deleted" if now is None else "was made anew"
            raise StoreError(f"the log of {self._dataset} in {self._store.url} {what}; follow it from its beginning")

    def _whole(self, arrived: Arrived) -> Followed | None:
        """Return the batch that is whole with this message; else keep the part, or drop what is there already."""
        said = messages.envelope(arrived.message)
        if arrived.gap:
            self._lose(f"batches before {said.id} are lost here: the server has dropped them")
        if said.seq <= self._seen.get(said.lane, 0):
            self._done(arrived)
            return None
        if not said.last:
            if not said.previous:
                self._parts[said.lane] = {}
            self._parts.setdefault(said.lane, {})[arrived.place] = arrived.message
            self._done(arrived)
            return None
        kept = self._parts.pop(said.lane, {})
        data = self._chain(arrived.message, said, kept)
        if data is None or (not said.rows and said.mode in tuple(Mode)):
            self._done(arrived)
            self._seen[said.lane] = said.seq
            return None
        schema = self._schema(said.schema)
        frame = messages.rows(data, said.format, schema)
        shown = frame if self._system else frame.select(schema.names)
        with self._lock:
            self._out = (arrived, said) if self._group is not None else None
        if self._group is None:
            self._seen[said.lane] = said.seq
        return Followed(self._dataset, said.id, said.mode, shown, schema, said.span, self, arrived)

    def _chain(self, last: messages.Message, said: Envelope, kept: dict[str, messages.Message]) -> list[bytes] | None:
        """Return the rows of all parts up to the last one; None when the server has dropped some of them."""
        data, place = [last.data], said.previous
        while place:
            message = kept.get(place) or self._asked(partial(self._cursor.fetch, place))
            if message is None:
                self._lose(f"the batch {said.id} is lost here: the server has dropped a part of it")
                return None
            data.append(message.data)
            place = messages.envelope(message).previous
        return data[::-1]

    def _lose(self, what: str) -> None:
        self.lost += 1
        log.warning(
            "%s: %s (see max_age, max_bytes and max_messages of the store); a follower that needs them begins anew "
            "from a store with tables",
            self._dataset,
            what,
        )

    def _schema(self, hash: str) -> Schema:
        if hash not in self._schemas:
            self._schemas = self._asked(partial(self._store.schemas, self._dataset))
        if hash not in self._schemas:
            raise StoreError(f"{self._store.url} has a batch of {self._dataset} and not its schema {hash}")
        return self._schemas[hash]

    def _acknowledge(self, arrived: Arrived) -> None:
        with self._lock:
            out = self._out
        if out is None or out[0] is not arrived:
            return  # it was, already, or nobody remembers what this follower has
        self._done(arrived)
        with self._lock:
            self._out = None
        self._seen[out[1].lane] = out[1].seq

    def _done(self, arrived: Arrived) -> None:
        self._asked(partial(self._cursor.done, arrived))

    def _hold(self) -> None:
        """While a batch is being worked on, tell the server, so that nobody else of the group is given it."""
        while not self._ended.wait(self._takeover / 3):
            with self._lock:
                out = self._out
            if out is not None:
                try:
                    self._cursor.hold(out[0])
                except StoreError as error:
                    log.warning("%s", error)


def follow(
    url: str,
    dataset: str,
    *,
    group: str | None = None,
    start: datetime | date | str = "all",
    system: bool = False,
    idle_seconds: float | None = None,
    takeover_seconds: float = TAKEOVER_SECONDS,
) -> Following:
    """Return the batches of a dataset in a store that is a log (nats://, redis://), as they come, in order.

    A `group` is a name by which the server remembers what was acknowledged: a follower that comes back goes on there,
    and of several with one name one gets a batch at a time, the next one when it has been acknowledged, or when its
    follower has been silent for `takeover_seconds`. Without one everything from `start` on comes: all that the server
    has, new (what is published from now on), or since a day or a time (of publication). A group begins there too, once.
    `system` adds `_segment` and `_ingested_at` to the rows. It ends when nothing came for `idle_seconds` (0: when there
    is nothing now; None: never).

    Raises ConfigurationError for what cannot be meant, StoreError when the server cannot be reached or has no such log.
    """
    if group is not None and not _GROUP.fullmatch(group):
        raise ConfigurationError(f"{group!r} is not the name of a group: write letters, digits, _ and -")
    begin = _start(start)
    store = open_store(url)
    if not isinstance(store, LogStore):
        store.close()
        raise ConfigurationError(
            f"{store.url} has tables, which are read and not followed: see `marketsync query`, or open_store in Python"
        )
    try:
        return Following(
            store,
            dataset,
            group,
            begin,
            system=system,
            idle_seconds=idle_seconds,
            takeover_seconds=takeover_seconds,
        )
    except BaseException:
        store.close()
        raise


def _start(start: datetime | date | str) -> datetime | str:
    if isinstance(start, str) and start not in STARTS:
        try:
            start = datetime.fromisoformat(start)
        except ValueError:
            raise ConfigurationError(
                f"start={start!r} is neither all nor new nor a time; write it like 2001-03-05 or 2001-03-05T09:30:00Z"
            ) from None
    if isinstance(start, date) and not isinstance(start, datetime):
        start = datetime(start.year, start.month, start.day, tzinfo=UTC)
    if isinstance(start, datetime) and start.tzinfo is None:
        start = start.replace(tzinfo=UTC)
    return start
