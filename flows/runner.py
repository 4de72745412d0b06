"""What runs the steps of a run as Prefect tasks of the flow run it is made in, and what makes a signal a pause.

Prefect keeps no progress and no result: the ledger does. What the steps do is in `tasks/`, what a flow is made of in
the modules named after the flows.
"""

from __future__ import annotations

import contextvars
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from prefect import Task, allow_failure, get_run_logger
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.exceptions import TerminationSignal
from prefect.futures import PrefectFuture, as_completed
from prefect.states import Completed, Failed

from marketsync.definition import Verdict
from marketsync.errors import Interrupted, MarketSyncError, WaitingForQuota
from marketsync.rendering.words import many, share
from marketsync.report import DatasetReport
from tasks.fetch import Fetched
from tasks.runner import Pending
from tasks.steps import Prepared
from tasks.tally import Note
from tasks.watch import interrupt_all

INTERRUPT_SECONDS = 0.2  # how often every watch of the process is told, once a run is to stop
POLL_SECONDS = 5.0  # how often the server is asked whether somebody stopped the run there
SHOWN_REMARKS = 20  # of one step in its log
GRAVE = ("failed", "stopped", "store")  # notes of what makes a step fail
OURS = ("marketsync", "providers", "storage", "tasks", "flows")  # packages whose log a flow run shows

T = TypeVar("T")
log = logging.getLogger(__name__)


def _is_news(record: logging.LogRecord) -> bool:
    """Return False for what Prefect logs of an error of ours beside the message, which is in the final state: its way
    through its own code, or the state's inner parts."""
    if record.exc_info is None:
        return True
    return not isinstance(record.exc_info[1], MarketSyncError) and not record.msg.startswith(
        "Task run failed with state"
    )


for _name in ("prefect.flow_runs", "prefect.task_runs"):
    logging.getLogger(_name).addFilter(_is_news)


@dataclass(frozen=True)
class _Raised:
    """What a step raised that is no failure of the step."""

    error: Interrupted | WaitingForQuota


class StepFailed(MarketSyncError):
    """A step came to its end, and something in it failed; Prefect wants an exception in a state that is Failed, so
    what the step returned travels in one."""

    def __init__(self, message: str, result: Any):
        super().__init__(message)
        self.result = result


class PrefectPending:
    """A step that was submitted as a Prefect task."""

    def __init__(self, future: PrefectFuture[Any]):
        self.future = future

    def result(self) -> Any:
        """Wait for the step and return what it returned, or raise what it raised."""
        try:
            value = self.future.result()
        except StepFailed as failed:
            return failed.result
        if isinstance(value, _Raised):
            raise value.error
        return value


class PrefectRunner:
    """A `tasks.runner.Runner` inside a flow run: each step is one Prefect task, run by the flow's task runner.

    Steps can be submitted from any thread of the process: the flow run is remembered, not looked for in the thread.
    """

    def __init__(self) -> None:
        self._context = contextvars.copy_context()
        self._lock = threading.Lock()
        self._tasks: dict[Callable[..., Any], Task[..., Any]] = {}
        self._names: Counter[str] = Counter()

    def submit(
        self, step: Callable[..., Any], *args: Any, after: Iterable[Pending] = (), name: str = ""
    ) -> PrefectPending:
        """Run `step(*args)` as a task once the steps of `after` have ended, whether well or not.

        The task run is called `name`, with a number from the second of that name on. A step that raises
        `WaitingForQuota` or `Interrupted` has not failed: its task run completes under that name, and the error is
        raised by `result()`.
        """
        before = [allow_failure(pending.future) for pending in after if isinstance(pending, PrefectPending)]
        with self._lock:
            self._names[name] += 1
            number = self._names[name]
            run_name = name or step.__name__
            run_name = run_name if number == 1 else f"{run_name} ({number})"
            # A future's own context: Prefect sets variables in it.
            future = self._context.copy().run(self._submit, self._task(step), run_name, args, before)
        return PrefectPending(future)

    @staticmethod
    def _submit(task: Task[..., Any], run_name: str, args: tuple[Any, ...], before: list[Any]) -> PrefectFuture[Any]:
        named = task.with_options(task_run_name=run_name.replace("{", "(").replace("}", ")"))
        return named.submit(args, wait_for=before)

    def _task(self, step: Callable[..., Any]) -> Task[..., Any]:
        if step not in self._tasks:
            self._tasks[step] = step_as_task(step)
        return self._tasks[step]

    def as_completed(self, pending: Iterable[Pending]) -> Iterator[Pending]:
        """Yield the steps as they end."""
        known = {item.future: item for item in pending if isinstance(item, PrefectPending)}
        for future in as_completed(list(known)):
            yield known[future]


def step_as_task(step: Callable[..., Any]) -> Task[..., Any]:
    """Wrap a step as a Prefect task of the arguments in one tuple: nothing cached, nothing kept, nothing retried.

    A retry would be wrong here: requests are retried below, within their limits, and the ledger knows what is owed.
    """

    def run(arguments: tuple[Any, ...]) -> Any:
        try:
            result = step(*arguments)
        except WaitingForQuota as wait:
            return Completed(name="WaitingForQuota", message=str(wait), data=_Raised(wait))
        except Interrupted as stop:
            return Completed(name="Paused", message=str(stop), data=_Raised(stop))
        except MarketSyncError as error:
            # The message was written for a person; the way through our code would only hide it.
            return Failed(message=str(error), data=error)
        return _told(result)

    run.__doc__ = step.__doc__
    return Task(
        run,
        name=step.__name__,
        description=(step.__doc__ or "").strip() or None,
        cache_policy=NO_CACHE,
        persist_result=False,
        retries=0,
        log_prints=False,
    )


def _told(result: Any) -> Any:
    """Return what a step returned in a state that tells a person what came of it."""
    if isinstance(result, Fetched):
        return _fetched(result)
    if isinstance(result, Prepared):
        _log(result.notes)
        parts = ["the tables are ready" if not result.stores_down else f"without {', '.join(result.stores_down)}"]
        if result.drained:
            parts.append(f"{many(result.drained, 'row')} of an earlier run delivered")
        if result.copied:
            parts.append(f"{many(result.copied, 'row')} copied from another store")
        return Completed(message="; ".join(parts), data=result)
    if isinstance(result, list) and result and all(isinstance(part, DatasetReport) for part in result):
        return Completed(message="; ".join(_judged(part) for part in result), data=result)
    return result


def _log(notes: Sequence[Note]) -> None:
    logger = get_run_logger()
    for note in notes[:SHOWN_REMARKS]:
        level = logging.ERROR if note.kind in GRAVE else logging.WARNING
        logger.log(level, "%s: %s", f"{note.dataset} {note.subject}".strip(), note.message)
    if len(notes) > SHOWN_REMARKS:
        logger.warning("the report has %s", many(len(notes) - SHOWN_REMARKS, "more remark"))


def _fetched(result: Fetched) -> State[Any]:
    _log(result.notes)
    counts = result.counts
    rows, requests = many(counts.fetched, "row"), many(counts.sent, "request")
    message = f"{rows} of {requests}, {counts.done:,} of {many(counts.units, 'unit')} done"
    waits = result.halt is not None and result.halt.verdict is Verdict.QUOTA
    if (result.halt is not None and not waits) or counts.failed or result.stores_down:
        # The graph is red where the run failed. What else failed is in the log and in the report.
        why = next((note.message for note in result.notes if note.kind in GRAVE), "see the report")
        failed = f"{many(counts.failed, 'unit')} failed" if counts.failed else "stopped"
        message = f"{message}, {failed}: {why}"
        return Failed(message=message, data=StepFailed(message, result))
    if result.halt is not None:
        until = f", until {result.halt.resume_at:%Y-%m-%d %H:%M} UTC" if result.halt.resume_at else ""
        return Completed(name="WaitingForQuota", message=f"{message}; the quota is spent{until}", data=result)
    if result.stopped is not None:
        name = "Cancelled" if result.stopped == "cancelled" else "Paused"
        return Completed(name=name, message=message, data=result)
    return Completed(name="GoesOn" if result.more else "Completed", message=message, data=result)


def _judged(part: DatasetReport) -> str:
    if part.state:
        return f"{part.store}: {part.state}"
    rows = "a log" if part.log else "no table yet" if part.size is None else many(part.size.rows, "row")
    if part.judgement is None:
        return f"{part.store}: {rows}"
    missing = many(part.judgement.missing, "session")
    return f"{part.store}: {rows}, {share(part.judgement.completeness)} complete, {missing} missing"


@contextmanager
def logged_in_run() -> Iterator[None]:
    """Have what our packages log meanwhile, from whatever thread, shown in the log of the flow run we are in."""
    handler = _ToFlowRun(get_run_logger())
    loggers = [logging.getLogger(name) for name in OURS]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)


class _ToFlowRun(logging.Handler):
    """Hands records on to the log of one flow run, whichever thread they come from."""

    def __init__(self, logger: logging.Logger | logging.LoggerAdapter[Any]):
        super().__init__()
        self._logger = logger

    def emit(self, record: logging.LogRecord) -> None:
        self._logger.log(record.levelno, record.getMessage())


class Stoppable:
    """A call that SIGTERM, Ctrl-C, a cancellation and a suspension turn into a pause, where they would break it off.

    Prefect and Python raise a signal as an exception in the main thread, so the call goes on in another thread while
    the main one waits. The first signal asks every running step of the process to stop at its next page, and those
    that begin afterwards too, so that what was fetched is sealed and delivered. The second is not held back.
    """

    def __init__(self, is_to_stop: Callable[[], bool] | None = None):
        """`is_to_stop` is asked every `POLL_SECONDS`, for what the server says without a signal."""
        self.signal: TerminationSignal | KeyboardInterrupt | None = None
        self.asked = threading.Event()
        self._is_to_stop = is_to_stop
        self._over = threading.Event()

    def run(self, call: Callable[[], T]) -> T:
        """Return what `call` returns, or raise what it raises; `asked` and `signal` then say whether it was stopped."""
        done: Future[T] = Future()
        context = contextvars.copy_context()

        def work() -> None:
            try:
                done.set_result(context.run(call))
            except BaseException as error:  # noqa: BLE001 - raised again in the thread that waits
                done.set_exception(error)

        worker = threading.Thread(target=work, name="run", daemon=True)
        teller = threading.Thread(target=contextvars.copy_context().run, args=[self._tell], name="stop", daemon=True)
        try:
            teller.start()
            worker.start()
            return done.result()
        except (TerminationSignal, KeyboardInterrupt) as signal:
            if worker.ident is None:
                raise
            self.signal = signal
            self.asked.set()
            log.warning("stopping at the next page; again to stop at once")
            return done.result()
        finally:
            self._over.set()
            if teller.ident is not None:
                teller.join()

    def _tell(self) -> None:
        polled = time.monotonic()
        while not self._over.wait(INTERRUPT_SECONDS):
            if self.asked.is_set():
                interrupt_all()
            elif self._is_to_stop is not None and time.monotonic() - polled >= POLL_SECONDS:
                if self._is_to_stop():
                    self.asked.set()
                polled = time.monotonic()
