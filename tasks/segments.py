"""From pages to sealed segments: gather, gate, set aside, write to the spool, register in the ledger.

One `SegmentWriter` a fetch step. It bounds what a crash can cost: requests whose rows are not sealed yet take a permit
each, and there are no more permits than the plan's `segment.requests`.
"""

from __future__ import annotations

import logging
import threading
import uuid
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date, datetime
from typing import TYPE_CHECKING, Any

from marketsync.clock import Clock
from marketsync.coverage import Answer
from marketsync.errors import LeaseLost
from marketsync.gate import Batch, Gated
from marketsync.ledger import Ledger, Part, Segment, Work, WorkState
from marketsync.schema import Schema
from marketsync.upstream import Segmenting
from storage.spool import Spool
from tasks.tally import Tally
from tasks.watch import Watch

if TYPE_CHECKING:
    import polars as pl

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PageRows:
    """One answer of a chain on its way into a segment (or a word about the unit that comes without rows)."""

    work: Work
    state: WorkState  # LEASED while the chain goes on
    cursor: dict[str, Any] | None
    asked_at: datetime
    batch: Batch | None = None
    rows: int = 0
    bytes: int = 0
    requests: int = 0
    answer: Answer = Answer.ROWS
    restarted: bool = False
    resume_at: datetime | None = None
    label: str = ""
    error: str | None = None


Gate = Callable[[Sequence[Batch]], Gated]


@dataclass
class _Open:
    """What is gathered for the next segment."""

    number: int = 1
    pages: list[PageRows] = field(default_factory=list)
    rows: int = 0
    bytes: int = 0
    requests: int = 0
    since: float = 0.0


class SegmentWriter:
    """Gathers pages of many units and seals them; a context manager that seals the rest at its end."""

    def __init__(
        self,
        *,
        ledger: Ledger,
        spool: Spool,
        schema: Schema,
        gate: Gate,
        segmenting: Segmenting,
        dataset: str,
        run_id: str,
        owner: str,
        host: str,
        stores: Sequence[str],
        watch: Watch,
        clock: Clock,
        tally: Tally,
        final_until: Callable[[datetime], datetime],
        sealed: Callable[[Segment, pl.DataFrame | None], None],
        threads: int,
        threaded: bool = True,
    ):
        self.lane = f"{dataset}-{uuid.uuid4().hex[:12]}"
        self._ledger, self._spool, self._schema, self._gate = ledger, spool, schema, gate
        self._segmenting, self._dataset, self._run_id = segmenting, dataset, run_id
        self._owner, self._host, self._stores = owner, host, list(stores)
        self._watch, self._clock, self._tally = watch, clock, tally
        self._final_until, self._sealed = final_until, sealed
        self._threaded = threaded
        # Half of the permits are for the segment being sealed, half for the one being gathered.
        self._seal_at_requests = max(1, (segmenting.requests - threads) // 2) if threaded else segmenting.requests
        self._open = _Open()
        self._unsealed = 0
        self._seq = 0
        self._running: dict[str, Work] = {}  # work_id -> the unit as the ledger has it after its last seal
        self._lost: set[str] = set()
        self._distrusted = False
        self._changed = threading.Condition()
        self._over = False
        self._done = 0  # the number of the last that was gathered and is durable
        self._wanted = 0  # the highest number that somebody waits for
        self._failure: BaseException | None = None
        self._thread: threading.Thread | None = None

    # ------------------------------------------------------------ for the fetching threads

    def __enter__(self) -> SegmentWriter:
        self._ledger.hold(f"lane:{self.lane}", self._owner)
        if self._threaded:
            self._thread = threading.Thread(target=self._work, name=f"seal-{self._dataset}", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        with self._changed:
            self._over = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
        elif kind is None or self._failure is None:
            self._seal_open()
        if kind is None and self._failure is not None:
            raise self._failure

    def admit(self) -> None:
        """Wait for a permit to send one request; Interrupted when the run is asked to stop."""
        while True:
            with self._changed:
                self._raise_failure()
                if self._unsealed < self._segmenting.requests:
                    self._unsealed += 1
                    return
                if self._threaded:
                    self._changed.wait(0.2)
            if not self._threaded:
                self._seal_open()
            self._watch.check()

    def forgo(self) -> None:
        """Give a permit back: the request brought no rows."""
        with self._changed:
            self._unsealed -= 1
            self._changed.notify_all()

    def add(self, page: PageRows) -> None:
        """Take one page in; LeaseLost when its unit was taken over."""
        with self._changed:
            self._raise_failure()
            if page.work.work_id in self._lost:
                self._unsealed -= page.requests
                raise LeaseLost(
                    page.work.work_id, f"{page.work.unit.dataset}: this unit was taken over by another worker"
                )
            if not self._open.pages:
                self._open.since = self._clock.timestamp()
            self._open.pages.append(page)
            self._open.rows += page.rows
            self._open.bytes += page.bytes
            self._open.requests += page.requests
            if self._full():
                self._changed.notify_all()
        if not self._threaded and self._full():
            self._seal_open()

    def flush(self) -> None:
        """Seal what is gathered and return when it is durable."""
        if not self._threaded:
            self._seal_open()
            return
        with self._changed:
            # What others gather in the meantime is not waited for: it may be long until they want it sealed.
            mine = self._open.number if self._open.pages else self._open.number - 1
            self._wanted = max(self._wanted, mine)
            self._changed.notify_all()
            while self._done < mine and self._failure is None:
                self._changed.wait(0.2)
            self._raise_failure()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _full(self) -> bool:
        bounds, gathered = self._segmenting, self._open
        return bool(gathered.pages) and (
            gathered.rows >= bounds.rows
            or gathered.bytes >= bounds.bytes
            or gathered.requests >= self._seal_at_requests
            or self._clock.timestamp() - gathered.since >= bounds.seconds
        )

    # ------------------------------------------------------------ sealing

    def _work(self) -> None:
        try:
            while True:
                with self._changed:
                    while not (self._over or self._full() or self._wanted >= self._open.number):
                        self._changed.wait(min(1.0, self._segmenting.seconds))
                    if self._over and not self._open.pages:
                        return
                self._seal_open()
        except BaseException as error:  # noqa: BLE001 - every fetching thread must hear of it
            with self._changed:
                self._failure = error
                self._changed.notify_all()

    def _seal_open(self) -> None:
        with self._changed:
            gathered = self._open
            if not gathered.pages:
                return
            self._open = _Open(gathered.number + 1)
        pages = gathered.pages
        try:
            while pages:
                try:
                    self._seal(pages)
                    break
                except LeaseLost as lost:
                    log.warning("%s", lost)
                    self._lost.add(lost.work_id)
                    pages = [page for page in pages if page.work.work_id != lost.work_id]
            with self._changed:
                self._done = gathered.number
        finally:
            with self._changed:
                self._unsealed -= gathered.requests
                self._changed.notify_all()

    def _seal(self, pages: Sequence[PageRows]) -> None:
        gated = self._gate([page.batch for page in pages if page.batch is not None])
        frame, rejected, duplicates = gated.frame, gated.rejected, gated.duplicates
        if not self._distrusted and self._has_strangers(pages, frame):
            for store in self._stores:
                self._ledger.distrust(store, self._dataset)
            self._distrusted = True
        seq = self._seq + 1
        segment_id = f"{self.lane}:{seq}"
        parts = self._parts(pages, frame)
        path, size = None, 0
        if frame.height:
            path, size = self._spool.write(self.lane, seq, frame)
        set_aside = rejected.height
        if set_aside:
            self._spool.set_aside(self._dataset, segment_id, rejected)
        kept = frame.height
        low, high = self._bounds(frame)
        segment = Segment(
            segment_id=segment_id,
            dataset=self._dataset,
            lane=self.lane,
            seq=seq,
            host=self._host,
            path=path,
            rows=kept,
            fetched=kept + duplicates + set_aside,
            duplicates=duplicates,
            quarantined=set_aside,
            bytes=size,
            requests=sum(page.requests for page in pages),
            key_min=low,
            key_max=high,
        )
        try:
            self._ledger.seal(self._run_id, self._owner, segment, parts, self._stores)
        except LeaseLost:
            if path is not None:
                self._spool.remove([path])
            raise
        self._seq = seq
        for part in parts:
            work = part.work
            rows_of = dict(work.subject_rows)
            for subject, rows in part.subject_rows.items():
                rows_of[subject] = rows_of.get(subject, 0) + rows
            if part.state is WorkState.LEASED:
                self._running[work.work_id] = replace(
                    work,
                    cursor=part.cursor,
                    requests=work.requests + part.requests,
                    rows=work.rows + part.rows,
                    subject_rows=rows_of,
                    restarted=work.restarted or part.restarted,
                    extent=part.extent,
                    asked_at=part.asked_at,
                )
            else:
                self._running.pop(work.work_id, None)
        self._tally.sealed(segment)
        self._sealed(segment, frame)

    def _parts(self, pages: Sequence[PageRows], frame: pl.DataFrame) -> list[Part]:
        by_work: dict[str, list[PageRows]] = defaultdict(list)
        for page in pages:
            by_work[page.work.work_id].append(page)
        works = {work_id: self._running.get(work_id, of_work[0].work) for work_id, of_work in by_work.items()}
        chained = {
            work_id
            for work_id, of_work in by_work.items()
            if works[work_id].rows or of_work[-1].state is not WorkState.SEALED
        }
        extents = self._extents(frame) if chained else {}
        parts = []
        for work_id, of_work in by_work.items():
            work, last = works[work_id], of_work[-1]
            asked_at = work.asked_at or of_work[0].asked_at
            rows = sum(page.rows for page in of_work)
            extent: dict[str, tuple[str, str]] = dict(work.extent)
            again = any(page.restarted for page in of_work)
            if work_id in chained and rows:
                extent, overlaps = self._widened(work, extents)
                again = again or overlaps
            parts.append(
                Part(
                    work=work,
                    rows=rows,
                    requests=sum(page.requests for page in of_work),
                    subject_rows=self._subject_rows(of_work),
                    cursor=last.cursor,
                    state=last.state,
                    asked_at=asked_at,
                    final_until=self._final_until(asked_at),
                    answer=last.answer,
                    restarted=again,
                    extent=extent,
                    resume_at=last.resume_at,
                    label=next((page.label for page in reversed(of_work) if page.label), ""),
                    error=last.error,
                )
            )
        return parts

    def _has_strangers(self, pages: Sequence[PageRows], frame: pl.DataFrame) -> bool:
        """Return whether there are rows of subjects that were not asked for (a symbol that was renamed): the coverage
        of the one that was says nothing of them."""
        import polars as pl

        column = self._schema.subject
        asked = [dict(page.work.unit.values).get(column or "") for page in pages]
        if column is None or not frame.height or None in asked:
            return False
        known = {value for values in asked for value in values or ()}
        return not known.issuperset(frame[column].unique().cast(pl.String).to_list())

    def _subject_rows(self, pages: Sequence[PageRows]) -> dict[str, int]:
        unit = pages[0].work.unit
        subjects = unit.subjects
        if len(subjects) == 1:
            return {subjects[0]: sum(page.rows for page in pages)}
        column = self._schema.subject
        names = [name for name, _ in unit.values]
        counts: dict[str, int] = defaultdict(int)
        for page in pages:
            if page.batch is None or not page.rows:
                continue
            if column not in names or column not in page.batch.frame.columns:
                # Whose rows these are cannot be told: each subject is taken to have had an answer with rows.
                for subject in subjects:
                    counts[subject] += page.rows
                continue
            place = names.index(column)
            of_value = {str(value): rows for value, rows in page.batch.frame.group_by(column).len().iter_rows()}
            for subject in subjects:
                counts[subject] += of_value.get(subject.split("|")[place], 0)
        return dict(counts)

    def _extents(self, frame: pl.DataFrame) -> Mapping[str, tuple[str, str]]:
        import polars as pl

        if not frame.height or self._schema.time is None:
            return {}
        time = pl.col(self._schema.time)
        bounds = [time.min().alias("low"), time.max().alias("high")]
        if self._schema.subject is None:
            low, high = frame.select(bounds).row(0)
            return {"*": (_text(low), _text(high))}
        return {
            str(subject): (_text(low), _text(high))
            for subject, low, high in frame.group_by(self._schema.subject).agg(bounds).iter_rows()
        }

    def _widened(self, work: Work, extents: Mapping[str, tuple[str, str]]) -> tuple[dict[str, tuple[str, str]], bool]:
        """Return the extent of a chain with this segment's rows, and whether they meet those sealed before."""
        result = dict(work.extent)
        if self._schema.time is None:
            return result, bool(work.rows)
        overlaps = False
        names = ["*"] if self._schema.subject is None else [s for s in work.unit.subjects if s in extents]
        if not names and extents:
            names = list(extents)
        for name in names:
            if name not in extents:
                continue
            low, high = extents[name]
            before = result.get(name)
            if before is not None:
                overlaps = overlaps or not (low > before[1] or high < before[0])
                low, high = min(low, before[0]), max(high, before[1])
            result[name] = (low, high)
        return result, overlaps

    def _bounds(self, frame: pl.DataFrame) -> tuple[str | None, str | None]:
        if not frame.height or self._schema.time is None:
            return None, None
        column = frame[self._schema.time]
        return _text(column.min()), _text(column.max())


def _text(value: Any) -> str:
    return value.isoformat() if isinstance(value, date | datetime) else str(value)
