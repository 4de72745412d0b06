"""The fetching step: lease what is owed, follow each unit's chain of pages, act on every verdict, hand pages on.

What an answer means is ruled in `providers/`; what then happens (DESIGN: the failure table) is here. The step runs its
own threads, seals into the spool and delivers while it fetches; it ends when nothing is owed, time is up, or it must
wait.
"""

from __future__ import annotations

import logging
import random
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from marketsync.coverage import Answer
from marketsync.definition import Verdict
from marketsync.durations import parse_span
from marketsync.errors import Interrupted, LeaseLost, WaitingForQuota
from marketsync.ledger import Segment, Work, WorkState
from marketsync.planning import Unit
from providers.client import Ask, Outcome
from storage.protocol import Written
from tasks.deliver import Deliverer
from tasks.runner import AIR_SECONDS
from tasks.segments import PageRows, SegmentWriter
from tasks.tally import Counts, Note, Tally
from tasks.watch import Stop, Watch

if TYPE_CHECKING:
    import polars as pl

    from tasks.workspace import Scope

log = logging.getLogger(__name__)

COOL_DOWNS = 30  # in a row on one request before the unit is left for the next run
LONGEST_BACK_OFF = 60.0
EMPTY_PAGES = 1000  # in a row, each with a next one: such a chain does not end, and would spend every quota
DROPS_IN_A_ROW = 12  # after so many refused requests it is not one subject that is wrong


@dataclass(frozen=True)
class Halt:
    """Why a step asks no more: `state` is that of the units left over."""

    verdict: Verdict
    message: str
    resume_at: datetime | None = None


@dataclass
class Fetched:
    """What a fetching step did."""

    dataset: str
    counts: Counts = field(default_factory=Counts)
    notes: list[Note] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=dict)  # notes there was no room for, by kind
    more: bool = False  # time was up; units are still owed
    halt: Halt | None = None
    stopped: str | None = None  # paused, cancelled, maintenance, interrupted
    stores: dict[str, Written] = field(default_factory=dict)
    stores_down: dict[str, str] = field(default_factory=dict)
    started: datetime | None = None
    ended: datetime | None = None


class UnitSource:
    """Hands out leased units to the threads of one step, planning lazily and claiming in small groups."""

    def __init__(self, scope: Scope, owner: str, tally: Tally, threads: int, *, newest_first: bool = False):
        self._scope, self._owner, self._tally = scope, owner, tally
        self._lock = threading.Lock()
        self._newest_first = newest_first
        self._newest: set[str] = set()  # work ids of units under way that ask for the newest
        self._ended = threading.Condition(self._lock)
        self._ready: deque[Work] = deque()
        self._asked: deque[Unit] = deque()
        self._chunk = max(2, threads)
        self._largest = max(8, threads * 32)
        self._planned: Iterator[Unit] = iter(())
        self._whole: set[str] = set()  # work ids of units that were split once and now cannot be
        self.elsewhere = 0
        self.plan()

    def plan(self) -> None:
        """Plan anew from the coverage as it is now."""
        with self._lock:
            self._planned = self._scope.plan_units()
            self.elsewhere = 0

    def put_first(self, unit: Unit) -> None:
        """Put a unit (half of one that was too large) in front."""
        with self._lock:
            self._asked.append(unit)

    def next(self, over: Callable[[], bool]) -> Work | None:
        """Lease the next unit; None when nothing more is owed (or it is in other hands: `elsewhere`).

        With `newest_first`, what is older waits until the newest is there (or the step is `over`): side by side they
        would spend a day's quota together, and the newest is what it is for.
        """
        with self._lock:
            while True:
                if (not self._ready or (self._newest_first and self._asked)) and not self._lease():
                    return None
                if not self._newest_first:
                    return self._ready.popleft()
                work = next((work for work in self._ready if self._scope.recent(work.unit)), None)
                if work is not None:
                    self._newest.add(work.work_id)
                elif not self._newest:
                    work = self._ready[0]
                if work is not None:
                    self._ready.remove(work)
                    return work
                self._ended.wait(AIR_SECONDS)
                if over():
                    return None

    def ended(self, work: Work) -> None:
        """Note that a unit's chain is at its end, or was left."""
        if not self._newest_first:
            return
        with self._lock:
            self._newest.discard(work.work_id)
            self._ended.notify_all()

    def _lease(self) -> bool:
        """Lease more units; False when none is ready after that."""
        while candidates := self._candidates():
            claims = self._scope.ledger.claim(
                run_id=self._scope.run_id,
                plan=self._scope.plan_name,
                dataset=self._scope.dataset,
                request_hash=self._scope.request_hash,
                candidates=candidates,
                owner=self._owner,
                still_owed=self._scope.still_owed,
                store_ids=self._scope.store_ids,
                whole=self._whole,
                begun_since=self._scope.run_started if self._scope.options.refetch else None,
            )
            for unit in claims.too_large:
                parts = self._scope.halves(unit)
                if parts is None:
                    self._whole.add(unit.work_id(self._scope.request_hash))
                self._asked.extend(parts or (unit,))
            self._ready.extend(claims.work)
            self.elsewhere += len(claims.elsewhere)
            self._tally.add(units=len(claims.work))
            if self._ready:
                break
        return bool(self._ready)

    def _candidates(self) -> list[Unit]:
        chosen: list[Unit] = []
        while self._asked and len(chosen) < self._chunk:
            chosen.append(self._asked.popleft())
        for unit in self._planned:
            chosen.append(unit)
            if len(chosen) >= self._chunk:
                break
        self._chunk = min(self._largest, self._chunk * 2)
        return chosen

    def give_back(self) -> None:
        """Give back what was leased and not begun."""
        with self._lock:
            self._scope.ledger.give_back(list(self._ready), self._owner)
            self._tally.add(units=-len(self._ready))
            self._ready.clear()


class Fetcher:
    """One fetching step of one dataset of one plan."""

    def __init__(self, scope: Scope, watch: Watch, tally: Tally, *, seconds: float | None, threaded: bool = True):
        self._scope, self._watch, self._tally = scope, watch, tally
        self._clock = scope.clock
        self._threaded = threaded
        self._threads = scope.threads if threaded else 1
        self._deadline = None if seconds is None else self._clock.timestamp() + seconds
        self._halt: Halt | None = None
        self._lock = threading.Lock()
        self._failures_in_a_row = 0
        self._dropped_in_a_row = 0
        self._absent: set[str] | None = None  # the columns that no row of any answer so far had
        self._asked = False  # whether this step has sent a request
        self._cut_short = False  # whether time was up before all was asked
        self._tried = 0
        self._failed = 0
        self._random = random.Random(scope.run_id)
        self._broken: BaseException | None = None
        tuning = scope.tuning
        self._attempts = tuning.attempts or scope.definition.attempts
        self._max_wait = parse_span(tuning.max_wait).seconds
        self._back_off = parse_span(tuning.back_off).seconds

    def run(self) -> Fetched:
        """Fetch until nothing is owed, time is up, or everything must stop or wait."""
        scope = self._scope
        result = Fetched(scope.dataset, started=self._clock.now())
        with ExitStack() as stack:
            holds: list[str] = []
            # Called when the deliverers have ended: until then nobody else may deliver what is in the lane.
            stack.callback(lambda: [self._watch.release(hold) for hold in holds])
            deliverers = [
                stack.enter_context(
                    Deliverer(
                        scope.ledger,
                        scope.spool,
                        target,
                        scope.schema,
                        owner=self._watch.owner,
                        clock=self._clock,
                        tally=self._tally,
                        batch_rows=scope.plan.segment.rows,
                        threaded=self._threaded,
                    )
                )
                for target in scope.targets
            ]
            source = UnitSource(
                scope, self._watch.owner, self._tally, self._threads, newest_first=self._threads > 1 and scope.has_quota
            )

            def sealed(segment: Segment, frame: pl.DataFrame | None) -> None:
                for deliverer in deliverers:
                    deliverer.put(segment, frame)

            writer = stack.enter_context(
                SegmentWriter(
                    ledger=scope.ledger,
                    spool=scope.spool,
                    schema=scope.schema,
                    gate=scope.gate,
                    segmenting=scope.plan.segment,
                    dataset=scope.dataset,
                    run_id=scope.run_id,
                    owner=self._watch.owner,
                    host=scope.host,
                    stores=scope.store_ids,
                    watch=self._watch,
                    clock=self._clock,
                    tally=self._tally,
                    final_until=scope.timing.final_until,
                    sealed=sealed,
                    threads=self._threads,
                    threaded=self._threaded,
                )
            )
            holds.append(f"lane:{writer.lane}")
            self._watch.keep(holds[0])
            while True:
                self._round(source, writer)
                source.give_back()
                if self._broken is not None:
                    raise self._broken
                if not source.elsewhere or self._over():
                    break
                if self._time_is_up():
                    self._cut_short = True
                    break
                # Others hold living leases on the rest: what they leave is ours, so wait for them.
                writer.flush()
                for deliverer in deliverers:
                    deliverer.flush()
                if self._clock.sleep(1.0, self._watch.wake):
                    break
                source.plan()
            result.more = self._cut_short and self._halt is None and self._watch.stop is None
        if not (result.more or self._over() or any(deliverer.down for deliverer in deliverers)):
            self._await_others()
        for deliverer, target in zip(deliverers, scope.targets, strict=True):
            if deliverer.down is not None:
                result.stores_down[target.store_id] = deliverer.down
        if self._absent:
            self._tally.note(self._never_seen(sorted(self._absent)))
        result.halt = self._halt
        result.stopped = None if self._watch.stop is None else str(self._watch.stop)
        result.counts = self._tally.counts
        result.notes = self._tally.notes
        result.left_out = dict(self._tally.left_out)
        result.stores = self._tally.stores
        result.ended = self._clock.now()
        return result

    def _never_seen(self, columns: Sequence[str]) -> Note:
        """Say which columns no row of this step had."""
        raw = self._scope.spec.raw_of
        names = ", ".join(
            column if raw[column] == column else f"{raw[column]} (stored as {column})" for column in columns
        )
        return Note(
            "never_seen",
            self._scope.dataset,
            "",
            f"no row of any answer had {names}: stored without a value; is the field spelt as the provider spells it?",
        )

    def _await_others(self) -> None:
        """Wait until what other processes have received is in the stores: what is judged next would miss it."""
        scope = self._scope
        while scope.ledger.on_the_way(scope.store_ids, scope.dataset) and not self._time_is_up():
            if self._clock.sleep(1.0, self._watch.wake):
                return

    def _round(self, source: UnitSource, writer: SegmentWriter) -> None:
        if not self._threaded:
            self._pull(source, writer)
            return
        threads = [
            threading.Thread(target=self._pull, args=(source, writer), name=f"fetch-{self._scope.dataset}-{n}")
            for n in range(self._threads)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _time_is_up(self) -> bool:
        return self._deadline is not None and self._clock.timestamp() >= self._deadline

    def _over(self, *, in_trouble: bool = False) -> bool:
        """Whether nothing more is to be begun. A step that time leaves no room asks for one page all the same, and one
        whose request is `in_trouble` asks until that is settled: a run of steps would never end otherwise, since each
        step would count its attempts anew."""
        if self._halt is None:
            # Another dataset of the provider may have learned that nothing more is to be asked of it.
            self._halt = self._scope.halt
        if self._asked and not in_trouble and self._time_is_up():
            self._cut_short = True
            return True
        return self._halt is not None or self._watch.stop is not None or self._broken is not None

    def _pull(self, source: UnitSource, writer: SegmentWriter) -> None:
        try:
            while not self._over():
                if not self._threaded:
                    self._watch.look()
                work = source.next(self._over)
                if work is None:
                    return
                try:
                    self._chain(work, source, writer)
                except LeaseLost as lost:
                    self._tally.add(units=-1)
                    log.warning("%s", lost)
                finally:
                    source.ended(work)
        except Interrupted:
            return
        except BaseException as error:  # noqa: BLE001 - raised again by the step when every thread has ended
            with self._lock:
                self._broken = self._broken or error
            self._watch.wake.set()

    # ------------------------------------------------------------ one chain

    def _chain(self, work: Work, source: UnitSource, writer: SegmentWriter) -> None:
        scope, unit = self._scope, work.unit
        ask = ask_of(scope, unit)
        cursor = work.cursor
        attempt = cooled = restarts = empty_pages = 0
        rows = work.rows
        while True:
            if self._over(in_trouble=bool(attempt or cooled or restarts)):
                self._leave(work, writer, cursor, WorkState.OWED)
                return
            try:
                writer.admit()
            except Interrupted:
                self._leave(work, writer, cursor, WorkState.OWED)
                return
            try:
                outcome = scope.client.ask(
                    ask,
                    cursor,
                    max_wait_seconds=self._max_wait,
                    wake=self._watch.wake,
                    priority=scope.priority(unit),
                )
            except Interrupted:
                writer.forgo()
                self._leave(work, writer, cursor, WorkState.OWED)
                return
            except WaitingForQuota as wait:
                writer.forgo()
                self._wait_until(work, writer, cursor, wait.resume_at, str(wait))
                return
            except BaseException:
                writer.forgo()
                raise
            self._asked = True
            self._tally.add(sent=outcome.requests, bytes=outcome.bytes)
            verdict = outcome.verdict
            if verdict in (Verdict.ROWS, Verdict.EMPTY):
                attempt = cooled = 0
                rows += outcome.rows
                if outcome.rows and outcome.batch is not None:
                    with self._lock:
                        absent = set(outcome.batch.absent)
                        self._absent = absent if self._absent is None else self._absent & absent
                last = outcome.cursor is None
                writer.add(
                    PageRows(
                        work,
                        WorkState.SEALED if last else WorkState.LEASED,
                        outcome.cursor,
                        outcome.sent_at,
                        outcome.batch,
                        outcome.rows,
                        outcome.bytes,
                        requests=1,
                        restarted=restarts > 0,
                        label=outcome.label,
                    )
                )
                cursor = outcome.cursor
                empty_pages = 0 if outcome.rows else empty_pages + 1
                if not last and empty_pages >= EMPTY_PAGES:
                    self._endless(work, writer, outcome)
                    return
                self._dropped_in_a_row = 0
                if last:
                    self._tally.add(**({"done": 1} if rows else {"done": 1, "empty": 1}))
                    self._succeeded()
                    return
                continue
            writer.forgo()
            if verdict is Verdict.RETRY:
                attempt += 1
                if attempt >= self._attempts:
                    self._failed_unit(work, writer, cursor, outcome)
                    return
                self._tally.add(retried=1)
                pause = min(LONGEST_BACK_OFF, self._back_off * 2 ** (attempt - 1)) * self._random.uniform(0.5, 1.0)
                self._clock.sleep(max(pause, outcome.wait_seconds or 0.0), self._watch.wake)
            elif verdict is Verdict.COOL_DOWN:
                self._tally.add(cool_downs=1)
                cooled += 1
                seconds = outcome.wait_seconds or 0.0
                if seconds > self._max_wait or cooled > COOL_DOWNS:
                    until = outcome.until or outcome.answered_at + timedelta(seconds=max(seconds, 60.0))
                    self._wait_until(work, writer, cursor, until, _said(outcome, "asks to wait longer than max_wait"))
                    return
                # The limiter holds every thread and process back until then; it is asked again at the next turn.
            elif verdict is Verdict.QUOTA:
                until = outcome.until or outcome.answered_at + timedelta(days=1)
                self._wait_until(work, writer, cursor, until, _said(outcome, "says that the quota is spent"))
                return
            elif verdict is Verdict.NOT_YET:
                self._tally.add(done=1, not_yet=1)
                writer.add(
                    PageRows(
                        work,
                        WorkState.NOT_YET,
                        None,
                        outcome.sent_at,
                        answer=Answer.NOT_YET,
                        label=outcome.label,
                        error=outcome.message or None,
                    )
                )
                self._note("not_yet", unit, outcome, "not published yet; asked again next run")
                self._succeeded()
                return
            elif verdict is Verdict.SPLIT:
                self._split(work, source, writer, outcome)
                return
            elif verdict is Verdict.RESTART:
                restarts += 1
                if restarts > 2:
                    self._failed_unit(work, writer, None, outcome)
                    return
                cursor = None
                self._tally.add(retried=1)
            elif verdict is Verdict.DROP:
                self._drop(work, source, writer, outcome)
                return
            else:  # stop_provider, stop_dataset, refresh_auth that did not help, fail
                self._stop(work, writer, cursor, outcome)
                return

    def _leave(
        self,
        work: Work,
        writer: SegmentWriter,
        cursor: Mapping[str, object] | None,
        state: WorkState,
        outcome: Outcome | None = None,
        *,
        resume_at: datetime | None = None,
        error: str | None = None,
    ) -> None:
        """End this worker's hold on a unit in the order of its pages: after those that are on their way."""
        writer.add(
            PageRows(
                work,
                state,
                None if cursor is None else dict(cursor),
                self._clock.now() if outcome is None else outcome.sent_at,
                resume_at=resume_at,
                label="" if outcome is None else outcome.label,
                error=error or (None if outcome is None else outcome.message),
            )
        )
        if state is WorkState.OWED:
            # It did not come to an end: a run counts those that did.
            self._tally.add(**({"cancelled": 1} if self._watch.stop is Stop.CANCEL else {"units": -1}))

    def _wait_until(
        self,
        work: Work,
        writer: SegmentWriter,
        cursor: Mapping[str, object] | None,
        until: datetime,
        message: str,
    ) -> None:
        self._tally.add(waiting=1)
        if self._stop_all(Halt(Verdict.QUOTA, message, until)):
            self._note_text("waiting", work.unit, message, resume_at=until)
        self._leave(work, writer, cursor, WorkState.WAITING, resume_at=until, error=message)

    def _failed_unit(
        self, work: Work, writer: SegmentWriter, cursor: Mapping[str, object] | None, outcome: Outcome
    ) -> None:
        self._tally.add(failed=1)
        self._note("failed", work.unit, outcome, f"failed {self._attempts} times")
        self._leave(work, writer, cursor, WorkState.FAILED, outcome)
        budget = self._scope.plan.budget
        with self._lock:
            self._tried += 1
            self._failed += 1
            self._failures_in_a_row += 1
            spent = self._failures_in_a_row >= budget.in_a_row or (
                self._tried >= 20 and self._failed > budget.share * self._tried
            )
        if spent:
            self._stop_all(
                Halt(
                    Verdict.RETRY,
                    f"{self._failed} of {self._tried} units failed ({self._failures_in_a_row} in a row): the failure "
                    f"budget is spent, {self._scope.upstream_name} is left alone until the next run",
                )
            )

    def _succeeded(self) -> None:
        with self._lock:
            self._tried += 1
            self._failures_in_a_row = 0

    def _endless(self, work: Work, writer: SegmentWriter, outcome: Outcome) -> None:
        """Give a chain up that goes on without a row: it fails, and others go on."""
        why = f"{EMPTY_PAGES:,} pages in a row held no row, and each told of a next one: the pages do not seem to end"
        self._tally.add(failed=1)
        self._note("failed", work.unit, outcome, why)
        self._leave(work, writer, None, WorkState.FAILED, outcome, error=why)

    def _split(self, work: Work, source: UnitSource, writer: SegmentWriter, outcome: Outcome) -> None:
        parts = self._scope.halves(work.unit)
        if parts is None:
            self._tally.add(failed=1)
            self._note(
                "failed",
                work.unit,
                outcome,
                "one answer cannot hold these rows and the request cannot be made smaller; page the dataset, or use "
                "shorter windows",
            )
            self._leave(work, writer, None, WorkState.FAILED, outcome)
            return
        self._leave(work, writer, None, WorkState.SPLIT, outcome)
        self._tally.add(units=-1)
        self._replaced(source, writer, parts)

    def _drop(self, work: Work, source: UnitSource, writer: SegmentWriter, outcome: Outcome) -> None:
        """Drop what the provider calls a wrong request. Where many subjects share a request, they are asked in smaller
        groups until the one it means stands alone, unless it seems to mean every request."""
        self._succeeded()
        with self._lock:
            self._dropped_in_a_row += 1
            parts = self._scope.apart(work.unit) if self._dropped_in_a_row <= DROPS_IN_A_ROW else None
        if parts is None:
            self._tally.add(dropped=1)
            self._note("dropped", work.unit, outcome, "refused as a wrong request")
            self._leave(work, writer, None, WorkState.DROPPED, outcome)
            return
        self._leave(work, writer, None, WorkState.OWED, outcome)
        self._replaced(source, writer, parts)

    def _replaced(self, source: UnitSource, writer: SegmentWriter, parts: Sequence[Unit]) -> None:
        """Ask for the parts of a unit in its stead."""
        # The parent's lease must have ended before its parts can be leased.
        writer.flush()
        for part in parts:
            source.put_first(part)

    def _stop(self, work: Work, writer: SegmentWriter, cursor: Mapping[str, object] | None, outcome: Outcome) -> None:
        verdict = Verdict.STOP_PROVIDER if outcome.verdict is Verdict.REFRESH_AUTH else outcome.verdict
        what = {
            Verdict.STOP_PROVIDER: f"the key of {self._scope.upstream_name} is refused: nothing more is asked of it",
            Verdict.REFRESH_AUTH: f"the token of {self._scope.upstream_name} is refused even when it is fresh",
            Verdict.STOP_DATASET: f"no permission for {self._scope.dataset}: it is left out, other datasets go on",
        }.get(outcome.verdict, f"an answer that the definition of {self._scope.upstream_name} does not explain")
        if outcome.verdict is Verdict.FAIL and outcome.raw:
            kept = self._scope.keep_answer(work.work_id, outcome.raw)
            what = f"{what}; it is kept in {kept}"
        if self._stop_all(Halt(verdict, _said(outcome, what))):
            self._tally.add(failed=1)
            self._note("stopped", work.unit, outcome, what)
            self._leave(work, writer, cursor, WorkState.FAILED, outcome)
        else:  # others were under way when it was told: they are not at fault, and it is told once
            self._leave(work, writer, cursor, WorkState.OWED)

    def _stop_all(self, halt: Halt) -> bool:
        """Let nothing more be asked; return whether this is the first to say so."""
        with self._lock:
            first = self._halt is None
            if first:
                self._halt = halt
        return self._scope.halted(halt) and first

    def _note(self, kind: str, unit: Unit, outcome: Outcome, what: str) -> None:
        self._note_text(kind, unit, _said(outcome, what), outcome.label)

    def _note_text(
        self, kind: str, unit: Unit, message: str, label: str = "", resume_at: datetime | None = None
    ) -> None:
        shown = ", ".join(unit.subjects[:5]) + (f" and {len(unit.subjects) - 5} more" if len(unit.subjects) > 5 else "")
        self._tally.note(Note(kind, unit.dataset, shown, message, label, resume_at))


def _said(outcome: Outcome, what: str) -> str:
    if not outcome.status:  # nobody answered: these are this machine's words
        return f"{what}: {outcome.message}" if outcome.message else what
    words = f" — it says: {outcome.message}" if outcome.message else ""
    return f"{what} (HTTP {outcome.status}){words}"


def ask_of(scope: Scope, unit: Unit) -> Ask:
    """Return what the provider is asked for a unit."""
    return Ask(
        dataset=scope.dataset_name,
        values=dict(unit.values),
        start=unit.start,
        end=unit.end,
        window_start=unit.window_start,
        window_end=unit.window_end,
        session=unit.session,
    )
