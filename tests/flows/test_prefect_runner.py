"""The runner of steps inside a flow run, and the call that signals turn into a pause; the steps here are small."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from replica_market import eventually

from marketsync.errors import Interrupted, StoreError, WaitingForQuota
from tasks.fetch import Fetched
from tasks.tally import Counts, Note

pytestmark = [pytest.mark.prefect, pytest.mark.xdist_group("prefect")]
RESET = datetime(2026, 3, 2, tzinfo=UTC)


def doubled(number: int) -> int:
    return 2 * number


def waits(_: int) -> None:
    raise WaitingForQuota("the quota is spent", RESET)


def stops(_: int) -> None:
    raise Interrupted("paused")


def breaks(_: int) -> None:
    raise StoreError("the disk is full")


def inside_a_flow(body: Callable[[Any], Any]) -> Any:
    """Return what `body(runner)` returns inside a flow run."""
    from prefect import flow
    from prefect.task_runners import ThreadPoolTaskRunner

    from flows.runner import PrefectRunner

    @flow(name="of-a-test", task_runner=ThreadPoolTaskRunner(max_workers=4))
    def run() -> Any:
        from prefect.context import FlowRunContext

        return FlowRunContext.get().flow_run.id, body(PrefectRunner())

    return run()


def logged(flow_run_id: Any) -> list[str]:
    """Return the lines of a flow run's log that have arrived."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId

    with get_client(sync_client=True) as client:
        chosen = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[flow_run_id]))
        return [line.message for line in client.read_logs(chosen)]


def ends(flow_run_id: Any, count: int) -> dict[str, str]:
    """Return the state of each task run of a flow run by its name, once there are `count`."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

    chosen = FlowRunFilter(id=FlowRunFilterId(any_=[flow_run_id]))

    def found() -> dict[str, str] | None:
        with get_client(sync_client=True) as client:
            runs = client.read_task_runs(flow_run_filter=chosen)
        ended = {run.name: run.state.name for run in runs if run.state and run.state.is_final()}
        return ended if len(ended) == count else None

    return eventually(found, f"{count} task runs that have ended")


def test_steps_are_tasks_from_any_thread_and_numbered_where_names_repeat(prefect_server):
    def body(runner: Any) -> list[int]:
        results: list[int] = []

        def one(number: int) -> None:
            for _ in range(2):
                results.append(runner.submit(doubled, number, name=f"double {number}").result())

        threads = [threading.Thread(target=one, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return sorted(results)

    flow_run_id, results = inside_a_flow(body)
    assert results == [0, 0, 2, 2, 4, 4]
    names = {f"double {number}{again}" for number in range(3) for again in ("", " (2)")}
    assert ends(flow_run_id, 6) == dict.fromkeys(names, "Completed")


def test_waiting_and_stopping_are_raised_and_no_failures(prefect_server):
    def body(runner: Any) -> datetime:
        with pytest.raises(Interrupted, match="paused"):
            runner.submit(stops, 1, name="stops").result()
        with pytest.raises(WaitingForQuota) as raised:
            runner.submit(waits, 1, name="waits").result()
        return raised.value.resume_at

    flow_run_id, resume_at = inside_a_flow(body)
    assert resume_at == RESET
    assert ends(flow_run_id, 2) == {"stops": "Paused", "waits": "WaitingForQuota"}


def test_a_step_runs_after_another_even_where_that_failed(prefect_server):
    began: list[str] = []

    def slow(_: int) -> None:
        time.sleep(0.3)
        began.append("slow")
        raise StoreError("the disk is full")

    def then(_: int) -> str:
        began.append("then")
        return "done"

    def body(runner: Any) -> None:
        first = runner.submit(slow, 1, name="slow")
        second = runner.submit(then, 1, after=[first], name="then")
        assert second.result() == "done"
        with pytest.raises(StoreError, match="the disk is full"):
            first.result()
        assert {pending.result() for pending in runner.as_completed([second])} == {"done"}

    flow_run_id, _ = inside_a_flow(body)
    assert began == ["slow", "then"]
    assert ends(flow_run_id, 2) == {"slow": "Failed", "then": "Completed"}


def test_a_step_that_breaks_says_why_in_its_state(prefect_server):
    def body(runner: Any) -> str:
        pending = runner.submit(breaks, 1, name="breaks")
        with pytest.raises(StoreError):
            pending.result()
        return pending.future.state.message

    assert inside_a_flow(body)[1] == "the disk is full"


def test_a_step_in_which_something_failed_is_red_and_hands_on_what_it_did(prefect_server):
    def fetches(_: int) -> Fetched:
        note = Note("failed", "alpaca.daily_bars", "IBM", "the answer makes no sense")
        return Fetched("alpaca.daily_bars", Counts(units=2, done=1, failed=1, sent=2), [note])

    def body(runner: Any) -> tuple[Fetched, str]:
        pending = runner.submit(fetches, 1, name="fetches")
        return pending.result(), pending.future.state.message

    flow_run_id, (fetched, message) = inside_a_flow(body)
    assert (fetched.dataset, fetched.counts.failed) == ("alpaca.daily_bars", 1)
    assert message == "0 rows of 2 requests, 1 of 2 units done, 1 unit failed: the answer makes no sense"
    assert ends(flow_run_id, 1) == {"fetches": "Failed"}


def test_what_our_packages_log_from_any_thread_is_shown_in_the_run(prefect_server):
    from flows.runner import logged_in_run

    def body(_: Any) -> None:
        with logged_in_run():
            speaking = threading.Thread(target=logging.getLogger("tasks.fetch").warning, args=("segment %s is lost", 7))
            speaking.start()
            speaking.join()
        logging.getLogger("tasks.fetch").warning("not of the run")

    flow_run_id, _ = inside_a_flow(body)
    assert "not of the run" not in eventually(
        lambda: (said := logged(flow_run_id)) and "segment 7 is lost" in said and said, "the line in the run's log"
    )


# ---------------------------------------------------------------- what is stopped


def test_a_call_that_is_not_stopped_returns_or_raises_as_if_called():
    from flows.runner import Stoppable

    stoppable = Stoppable()
    assert stoppable.run(lambda: doubled(2)) == 4
    with pytest.raises(StoreError):
        Stoppable().run(lambda: breaks(1))
    assert not stoppable.asked.is_set()


@pytest.mark.parametrize("name", ["KeyboardInterrupt", "TerminationSignal"])
def test_a_signal_asks_every_step_to_stop_and_the_call_ends_as_it_likes(monkeypatch, name):
    import signal

    from prefect.exceptions import TerminationSignal

    import flows.runner

    told: list[float] = []
    monkeypatch.setattr(flows.runner, "interrupt_all", lambda: told.append(time.monotonic()))

    def raised(number: int, frame: object) -> None:
        raise KeyboardInterrupt if name == "KeyboardInterrupt" else TerminationSignal(signal=number)

    before = signal.signal(signal.SIGUSR1, raised)
    try:

        def call() -> str:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)
            until = time.monotonic() + 60
            while len(told) < 3 and time.monotonic() < until:  # a step that begins later is told, too
                time.sleep(0.01)
            return "sealed"

        stoppable = flows.runner.Stoppable()
        assert stoppable.run(call) == "sealed"
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert type(stoppable.signal).__name__ == name
    assert stoppable.asked.is_set()
    assert len(told) >= 3


def test_a_second_signal_is_not_held_back(monkeypatch):
    import signal

    import flows.runner

    monkeypatch.setattr(flows.runner, "interrupt_all", lambda: None)
    free = threading.Event()

    def raised(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, raised)
    stoppable = flows.runner.Stoppable()

    def call() -> None:
        signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)
        stoppable.asked.wait(60)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)
        free.wait(60)

    try:
        with pytest.raises(KeyboardInterrupt):
            stoppable.run(call)
    finally:
        signal.signal(signal.SIGUSR1, before)
        free.set()


def test_a_cancellation_that_nobody_signals_is_asked_for(monkeypatch):
    import flows.runner

    told = threading.Event()
    monkeypatch.setattr(flows.runner, "interrupt_all", told.set)
    monkeypatch.setattr(flows.runner, "POLL_SECONDS", 0.0)
    stoppable = flows.runner.Stoppable(lambda: True)
    assert stoppable.run(lambda: told.wait(60))
    assert stoppable.signal is None
    assert stoppable.asked.is_set()
