"""From the spool to the stores: deliveries while a run fetches, what earlier runs owe, and filling a new store.

Each store is served by itself: one that is down keeps nobody waiting but its own deliveries.
"""

from __future__ import annotations

import logging
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date, datetime, timedelta
from typing import TYPE_CHECKING, Any

from marketsync.clock import Clock
from marketsync.coverage import Answer, Covered, Interval, minus, within
from marketsync.errors import RowsRefused, SchemaError, StoreError
from marketsync.ledger import Binding, Ledger, Segment
from marketsync.planning import EVERYTHING
from marketsync.schema import INGESTED_COLUMN, SEGMENT_COLUMN, ColumnType, Schema
from storage.protocol import Batch, Filter, Mode, Store, Written
from storage.spool import Spool
from tasks.tally import Note, Tally

if TYPE_CHECKING:
    import polars as pl

log = logging.getLogger(__name__)

CACHE_BYTES = 24 << 20  # sealed frames kept in memory for the delivery; beyond it they are read from the spool
ATTEMPTS = 4
COPYING = "copying"  # stands for the work where rows come from a sibling
LINGER_SECONDS = 20.0  # a small batch is delivered when it has waited this long
HOLD_SECONDS = 600.0  # nobody else takes a lane while a batch of it is delivered; a killed process is seen at once


@dataclass(frozen=True)
class Target:
    """One store of a plan: its name in the configuration, which is its identity in the ledger, and the store."""

    store_id: str
    store: Store


def deliver_segments(
    ledger: Ledger,
    spool: Spool,
    target: Target,
    schema: Schema,
    segments: Sequence[Segment],
    frames: Sequence[pl.DataFrame | None],
    clock: Clock,
    *,
    again: bool = False,
) -> Written:
    """Write segments of one lane, in order, to one store in one commit, and acknowledge them in the ledger.

    With `again`, some of them may be in the store although nobody acknowledged it (a crash, a connection that broke
    while it committed): those it has are acknowledged only. Raises StoreError when the store cannot take them: they
    stay owed.
    """
    import polars as pl

    dataset, lane = segments[0].dataset, segments[0].lane
    there = target.store.committed(dataset, lane) if again else 0
    loaded = []
    already = refused = 0
    for segment, frame in zip(segments, frames, strict=True):
        if segment.path is None:
            continue
        if segment.seq <= there:
            aside = spool.aside(dataset, segment.segment_id, target.store_id)
            kept = segment.rows - (len(aside.read_bytes().splitlines()) if aside.exists() else 0)
            already, refused = already + kept, refused + segment.rows - kept
            continue
        rows = spool.read(segment.path) if frame is None else frame
        loaded.append(rows.with_columns(pl.lit(segment.segment_id).alias(SEGMENT_COLUMN)))
    written = Written(unchanged=already, refused=refused)
    if loaded:
        frame = pl.concat(loaded) if len(loaded) > 1 else loaded[0]
        frame = frame.with_columns(pl.lit(clock.now()).cast(pl.Datetime("us", "UTC")).alias(INGESTED_COLUMN))
        rows = frame.height
        rest = [segment for segment in segments if segment.seq > there]
        # Where rows can become durable without their lane, what was begun before may be there in part.
        certain = not again or target.store.capabilities.transactions
        mode = Mode.APPEND if certain and ledger.fresh(target.store_id, schema, rest) else Mode.UPSERT
        if mode is Mode.UPSERT and len(loaded) > 1:
            frame = frame.unique(subset=list(schema.key), keep="last", maintain_order=True)
        batch = Batch(dataset, schema, lane, segments[-1].seq, frame, mode)
        written = write_kept(spool, target, batch)
        # Rows that a crash let be written before, and rows that a later one of this delivery replaced, are there.
        others = rows - written.inserted - written.updated - written.unchanged - written.refused
        unchanged = written.unchanged + others + already
        written = replace(written, unchanged=unchanged, refused=written.refused + refused)
    finished = ledger.delivered(target.store_id, segments, written.inserted, written.updated, written.unchanged)
    if finished:
        spool.remove(finished)
        ledger.removed(finished)
    return written


def write_kept(spool: Spool, target: Target, batch: Batch) -> Written:
    """Write what the store would give back of a batch; what it refuses is set aside for it, durably, before that.

    One row that an engine cannot keep would otherwise hold up all that come after it, for ever.
    """
    import polars as pl

    aside: list[pl.DataFrame] = []
    frame = batch.frame
    while True:
        try:
            written = target.store.write(replace(batch, frame=frame))
            return replace(written, refused=batch.frame.height - frame.height)
        except RowsRefused as error:
            key = list(batch.schema.key)
            gone = frame.join(error.rows.select(key), on=key, how="semi", maintain_order="left")
            if gone.is_empty():
                raise
            frame = frame.join(gone.select(key), on=key, how="anti", maintain_order="left")
            raw = pl.struct(batch.schema.names).struct.json_encode().alias("raw")
            told = [pl.lit(None, pl.String()).alias("column"), pl.lit(str(error)).alias("reason"), raw]
            aside.append(gone.select(SEGMENT_COLUMN, *told))
            for (segment_id,), rows in pl.concat(aside).partition_by(SEGMENT_COLUMN, as_dict=True).items():
                spool.set_aside(batch.dataset, str(segment_id), rows.drop(SEGMENT_COLUMN), target.store_id)


class Deliverer:
    """Serves one store while a run fetches; a context manager that delivers the rest at its end."""

    def __init__(
        self,
        ledger: Ledger,
        spool: Spool,
        target: Target,
        schema: Schema,
        *,
        owner: str,
        clock: Clock,
        tally: Tally,
        batch_rows: int,
        threaded: bool = True,
    ):
        self._ledger, self._spool, self._target, self._schema = ledger, spool, target, schema
        self._clock, self._tally, self._batch_rows = clock, tally, batch_rows
        self._owner, self._threaded = owner, threaded
        self._waiting: list[tuple[Segment, pl.DataFrame | None]] = []
        self._rows = 0
        self._since = 0.0
        self._cached = 0
        self._changed = threading.Condition()
        self._over = False
        self._busy = False
        self._flush = False
        self.down: str | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Deliverer:
        if self._threaded:
            name = f"deliver-{self._target.store_id}"
            self._thread = threading.Thread(target=self._work, name=name, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._changed:
            self._over = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
        elif kind is None:
            self._deliver_waiting()

    def put(self, segment: Segment, frame: pl.DataFrame | None) -> None:
        """Take a sealed segment in."""
        with self._changed:
            size = frame.estimated_size() if frame is not None else 0
            if self._cached + size > CACHE_BYTES:
                frame, size = None, 0
            self._cached += int(size)
            if not self._waiting:
                self._since = self._clock.timestamp()
            self._waiting.append((segment, frame))
            self._rows += segment.rows
            self._changed.notify_all()
        if not self._threaded and self._rows >= self._batch_rows:
            self._deliver_waiting()

    def flush(self) -> None:
        """Deliver what waits and return when the store has it (or is down)."""
        if not self._threaded:
            self._deliver_waiting()
            return
        with self._changed:
            self._flush = True
            self._changed.notify_all()
            while (self._waiting or self._busy) and self.down is None:
                self._changed.wait(0.2)
            self._flush = False

    def _due(self) -> bool:
        return bool(self._waiting) and (
            self._over
            or self._flush
            or self._rows >= self._batch_rows
            or self._clock.timestamp() - self._since >= LINGER_SECONDS
        )

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._due():
                    if self._over:
                        return
                    self._changed.wait(1.0)
                self._busy = True
            self._deliver_waiting()
            with self._changed:
                self._busy = False
                self._changed.notify_all()

    def _deliver_waiting(self) -> None:
        with self._changed:
            waiting, self._waiting = self._waiting, []
            self._rows = 0
            self._cached = 0
        if not waiting or self.down is not None:
            return
        for first in _batches(waiting, self._batch_rows):
            if not self._deliver([item[0] for item in first], [item[1] for item in first]):
                return

    def _deliver(self, segments: list[Segment], frames: list[pl.DataFrame | None]) -> bool:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                taken = self._was_taken(segments[0].lane)
                written = deliver_segments(
                    self._ledger,
                    self._spool,
                    self._target,
                    self._schema,
                    segments,
                    frames,
                    self._clock,
                    again=taken or attempt > 1,
                )
            except StoreError as error:
                if attempt < ATTEMPTS:
                    self._clock.sleep(0.5 * 2**attempt)
                    continue
                self._fail(segments[0].dataset, str(error))
                return False
            except SchemaError as error:
                self._fail(segments[0].dataset, str(error))
                return False
            except Exception as error:
                log.exception("delivery to %s", self._target.store_id)
                self._fail(segments[0].dataset, f"{type(error).__name__}: {error}")
                return False
            self._tally.wrote(self._target.store_id, written)
            return True
        return False

    def _was_taken(self, lane: str) -> bool:
        """Make sure that nobody else delivers the lane; return whether another may have delivered some of it, because
        this process slept for longer than its hold."""
        hold = f"lane:{lane}"
        if self._ledger.keep_hold(hold, self._owner):
            return False
        log.warning("lane %s was taken over while this process slept; going on after what was delivered", lane)
        until = self._clock.timestamp() + HOLD_SECONDS
        while not self._ledger.hold(hold, self._owner):
            if self._clock.timestamp() > until:
                raise StoreError(f"another process delivers lane {lane} to store {self._target.store_id}")
            self._clock.sleep(1.0)
        return True

    def _fail(self, dataset: str, message: str) -> None:
        with self._changed:
            self.down = message
            self._changed.notify_all()
        self._tally.note(
            Note("store", dataset, self._target.store_id, f"{message}; its rows wait in the spool for the next run")
        )


def _batches(waiting: Sequence[tuple[Segment, Any]], batch_rows: int) -> list[list[tuple[Segment, Any]]]:
    result: list[list[tuple[Segment, Any]]] = []
    rows = 0
    for item in waiting:
        if not result or rows + item[0].rows > max(batch_rows, 1) * 3 // 2 or item[0].lane != result[-1][-1][0].lane:
            result.append([])
            rows = 0
        result[-1].append(item)
        rows += item[0].rows
    return result


def deliver_owed(
    ledger: Ledger,
    spool: Spool,
    target: Target,
    dataset: str,
    schema: Schema,
    *,
    host: str,
    owner: str,
    clock: Clock,
    tally: Tally,
    batch_rows: int,
) -> int:
    """Deliver what earlier runs of this host left in the spool for a store; return how many rows.

    Older lanes go first, so that what was asked later has the last word. Lanes whose process is alive are left to it.
    """
    lanes = dict.fromkeys(segment.lane for segment in ledger.owed_deliveries(target.store_id, dataset, host))
    delivered = 0
    for lane in lanes:
        hold = f"lane:{lane}"
        if not ledger.hold(hold, owner, HOLD_SECONDS):
            continue
        try:
            # Read again under the hold: its former owner may have delivered meanwhile.
            segments = ledger.owed_deliveries(target.store_id, dataset, host, lane)
            troubles = {s.segment_id: _trouble(spool, s.path) for s in segments if s.path is not None}
            for trouble in ("gone from", "damaged in"):
                lost = [segment for segment in segments if troubles.get(segment.segment_id) == trouble]
                if lost:
                    ledger.lose([segment.segment_id for segment in lost])
                    spool.remove([segment.path for segment in lost if segment.path is not None])
                    files = "1 segment file is" if len(lost) == 1 else f"{len(lost)} segment files are"
                    words = f"{files} {trouble} {spool.root}; what was in it is asked again"
                    tally.note(Note("lost", dataset, target.store_id, words))
            segments = [segment for segment in segments if not troubles.get(segment.segment_id)]
            pairs: list[tuple[Segment, None]] = [(segment, None) for segment in segments]
            for batch in _batches(pairs, batch_rows):
                if not ledger.keep_hold(hold, owner, HOLD_SECONDS):
                    break  # taken over while this process slept: whoever did delivers the rest
                chosen = [segment for segment, _ in batch]
                frames = [None] * len(chosen)
                written = deliver_segments(ledger, spool, target, schema, chosen, frames, clock, again=True)
                tally.wrote(target.store_id, written)
                delivered += sum(segment.rows for segment in chosen)
        finally:
            ledger.let_go(hold, owner)
    return delivered


def _trouble(spool: Spool, path: str) -> str:
    """Return what keeps a segment file from being read: that it is gone, or damaged; nothing when it can be read."""
    import polars as pl

    if not spool.has(path):
        return "gone from"
    if not (spool.root / path).stat().st_size:
        return "damaged in"
    try:
        spool.read(path)
    except pl.exceptions.PolarsError as error:
        log.warning("segment %s cannot be read: %s", path, error)
        return "damaged in"
    return ""


def fill_from_siblings(
    ledger: Ledger,
    spool: Spool,
    targets: Sequence[Target],
    target: Target,
    dataset: str,
    schema: Schema,
    request_hash: str,
    subjects: Sequence[str],
    *,
    clock: Clock,
    tally: Tally,
    batch_rows: int,
    told_apart: bool = True,
    margin: timedelta = timedelta(),
) -> int:
    """Copy to a store what its siblings have and it has not (no request is sent); return how many rows.

    What was answered to a sibling is copied, with the sibling's own answer and time of asking. `told_apart` says
    whether subjects stand in the rows, `margin` how far the times of rows may be outside of what covers them; what is
    copied beyond need is there already and stays as it is.
    """
    import uuid

    others = [other for other in targets if other.store_id != target.store_id and other.store.capabilities.table]
    if not others:
        return 0
    known = ledger.coverage([t.store_id for t in targets], dataset, request_hash, subjects)
    mine = known[target.store_id]
    # Asked for after what the siblings have: whatever of it another worker is still writing here is then seen.
    coming = ledger.on_the_way([target.store_id], dataset)
    copied = 0
    lane = f"copy-{uuid.uuid4().hex[:12]}"
    seq = 0
    for other in others:
        wanted: dict[tuple[Interval, ...], list[str]] = defaultdict(list)
        for subject in subjects:
            theirs = answered(known[other.store_id].get(subject, ()))
            missing = minus(theirs, [*answered(mine.get(subject, ())), *coming.get(subject, ())])
            if missing:
                wanted[tuple(missing)].append(subject)
        for intervals, group in wanted.items():
            noted = False
            for interval in intervals:
                around = Interval(interval.start - margin, interval.end + margin)
                chosen = group if told_apart else [EVERYTHING]
                for frame in _rows_of(other.store, dataset, schema, chosen, around, batch_rows):
                    seq += 1
                    if not noted:
                        # From now on rows may be there of which no coverage tells, should this break off.
                        begun = begun_copies(intervals, clock.now())
                        ledger.lay(target.store_id, dataset, request_hash, dict.fromkeys(group, begun))
                        noted = True
                    if not target.store.capabilities.table:
                        frame = frame.sort(list(schema.key))  # whoever follows is shown each batch in order
                    stamped = frame.with_columns(_literals(f"{lane}:{seq}", clock.now()))
                    written = write_kept(spool, target, Batch(dataset, schema, lane, seq, stamped, Mode.UPSERT))
                    tally.add(copied=frame.height)
                    tally.wrote(target.store_id, written)
                    copied += frame.height
            pieces: dict[str, list[Covered]] = {}
            for subject in group:
                pieces[subject] = inherited(known[other.store_id].get(subject, ()), intervals)
            ledger.lay(target.store_id, dataset, request_hash, pieces)
            for subject, laid in pieces.items():
                mine[subject] = [*mine.get(subject, []), *laid]
    return copied


def answered(pieces: Iterable[Covered]) -> list[Interval]:
    """Return what was asked and answered, with rows or with none."""
    return [Interval(piece.start, piece.end) for piece in pieces if piece.answer in (Answer.ROWS, Answer.EMPTY)]


def begun_copies(intervals: Iterable[Interval], now: datetime) -> list[Covered]:
    """Return what a store's coverage says while rows of these intervals are copied to it: that there may be some."""
    return [Covered(*span, Answer.PARTIAL, False, now, None, COPYING) for span in intervals]


def inherited(pieces: Iterable[Covered], intervals: Sequence[Interval]) -> list[Covered]:
    """Return the coverage that a store has of these intervals once another one's rows were copied to it: the other's
    own answers and times of asking."""
    return [
        Covered(span.start, span.end, piece.answer, piece.final, piece.asked_at, None)
        for piece in pieces
        if piece.answer in (Answer.ROWS, Answer.EMPTY)
        for span in within([Interval(piece.start, piece.end)], intervals)
    ]


def _literals(segment_id: str, now: datetime) -> list[pl.Expr]:
    import polars as pl

    return [
        pl.lit(segment_id).alias(SEGMENT_COLUMN),
        pl.lit(now).cast(pl.Datetime("us", "UTC")).alias(INGESTED_COLUMN),
    ]


def _rows_of(
    store: Store, dataset: str, schema: Schema, subjects: Sequence[str], interval: Interval, batch_rows: int
) -> Iterator[pl.DataFrame]:
    since: datetime | date | None = None
    until: datetime | date | None = None
    if schema.time is not None:
        since, until = bounds_for(schema, interval)
    chosen = None if schema.subject is None or list(subjects) == [EVERYTHING] else tuple(dict.fromkeys(subjects))
    if schema.subject is not None and chosen is not None and any("|" in subject for subject in chosen):
        chosen = None
    return frames(store, dataset, Filter(chosen, since, until), schema.polars(), batch_rows)


def frames(
    store: Store, dataset: str, filter: Filter, types: Mapping[str, pl.DataType], batch_rows: int
) -> Iterator[pl.DataFrame]:
    """Yield a store's rows as frames of about `batch_rows` rows, in the types given."""
    import polars as pl

    held: list[pl.DataFrame] = []
    rows = 0
    for batch in store.arrow(dataset, filter):
        frame = pl.DataFrame(pl.from_arrow(batch))
        held.append(frame)
        rows += frame.height
        if rows >= batch_rows:
            yield pl.concat(held).cast(dict(types))  # type: ignore[arg-type]
            held, rows = [], 0
    if rows:
        yield pl.concat(held).cast(dict(types))  # type: ignore[arg-type]


def bounds_for(schema: Schema, interval: Interval) -> tuple[datetime | date, datetime | date]:
    """Return an interval's bounds as the time column has them: dates for a date column, else datetimes."""
    if schema.time is not None and schema[schema.time].type is ColumnType.DATE:
        return interval.start.date(), interval.end.date()
    return interval.start, interval.end


def check_target(target: Target, dataset: str, schema: Schema, ledger: Ledger) -> bool:
    """Make sure the table is there and is the one the ledger knows, as it was; False when its coverage is void."""
    try:
        marker = target.store.ensure(dataset, schema)
    except OSError as error:
        raise StoreError(f"store {target.store_id} ({target.store.url}) cannot be opened: {error}") from error
    return bind(target.store_id, target.store, dataset, marker, ledger) is not Binding.CHANGED


def bind(store_id: str, store: Store, dataset: str, marker: str, ledger: Ledger, *, trusted: bool = True) -> Binding:
    """Note in the ledger which table the store has; of one that is not `trusted`, or has rows that the ledger does not
    know, keys may be anywhere."""
    # a log is never asked for its rows, and what is appended to it is taken as it is
    return ledger.bind_store(
        store_id,
        dataset,
        store.url,
        marker,
        lambda: not trusted or (store.capabilities.table and store.count(dataset) > 0),
        older=_is_older(store_id, store, dataset, ledger),
    )


def is_known(store_id: str, store: Store, dataset: str, ledger: Ledger) -> bool:
    """Return whether the store's table is the one that the ledger knows, and has what it acknowledged last."""
    marker = ledger.marker(store_id, dataset)
    return marker == store.marker(dataset) and not _is_older(store_id, store, dataset, ledger)


def _is_older(store_id: str, store: Store, dataset: str, ledger: Ledger) -> bool:
    """Return whether a table lacks what it acknowledged last: it was restored from a backup, or its server went over to
    one that had not got that yet. Of a log, which may drop what is old, nobody can tell."""
    newest = ledger.newest_delivery(store_id, dataset) if store.capabilities.table else None
    return newest is not None and store.committed(dataset, newest[0]) < newest[1]
