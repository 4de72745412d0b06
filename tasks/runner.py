"""What a run is executed on: a `Runner` submits steps and gives futures. Threads here; Prefect's in `flows/`.

Steps are plain functions with small picklable arguments, so that the same description of a run works on threads,
under Prefect and on Dask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from concurrent.futures import as_completed as _as_completed
from typing import Any, Protocol

AIR_SECONDS = 0.25


class Pending(Protocol):
    """A step that was submitted."""

    def result(self) -> Any:
        """Wait for the step and return what it returned, or raise what it raised."""
        ...


class Runner(Protocol):
    """Where steps run."""

    def submit(self, step: Callable[..., Any], *args: Any, after: Iterable[Pending] = (), name: str = "") -> Pending:
        """Run `step(*args)` once the steps of `after` have ended, whether well or not."""
        ...

    def as_completed(self, pending: Iterable[Pending]) -> Iterator[Pending]:
        """Yield the steps as they end."""
        ...


class Step:
    """A step on a pool of threads."""

    def __init__(self, future: Future[Any]):
        self.future = future

    def result(self) -> Any:
        """Wait for the step and return what it returned, or raise what it raised.

        The wait comes up for air: polars handles SIGINT in a way that restarts a plain wait, so that Ctrl-C would only
        be heard when the step has ended.
        """
        while not wait([self.future], timeout=AIR_SECONDS).done:
            continue
        return self.future.result()


class ThreadRunner:
    """Steps on a pool of threads of this process; a context manager."""

    def __init__(self, workers: int = 4):
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="step")

    def __enter__(self) -> ThreadRunner:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True)

    def submit(self, step: Callable[..., Any], *args: Any, after: Iterable[Pending] = (), name: str = "") -> Step:
        before = [pending.future for pending in after if isinstance(pending, Step)]

        def run() -> Any:
            wait(before)
            return step(*args)

        return Step(self._pool.submit(run))

    def as_completed(self, pending: Iterable[Pending]) -> Iterator[Pending]:
        steps = {item.future: item for item in pending if isinstance(item, Step)}
        for future in _as_completed(steps):
            yield steps[future]


class InlineRunner:
    """Steps one after the other in the calling thread: for the simulator, and wherever order must be certain."""

    def submit(self, step: Callable[..., Any], *args: Any, after: Iterable[Pending] = (), name: str = "") -> Pending:
        done: Future[Any] = Future()
        try:
            done.set_result(step(*args))
        except Exception as error:  # noqa: BLE001 - handed on by result()
            done.set_exception(error)
        return done

    def as_completed(self, pending: Iterable[Pending]) -> Iterator[Pending]:
        yield from pending
