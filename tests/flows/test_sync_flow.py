"""The flow that syncs a plan, on a real Prefect server: what it does, what it shows, and how it ends."""

from __future__ import annotations

import json
import threading
import time
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from replica_market import ALL_ROWS, ROWS_OF_IBM, eventually

pytestmark = [pytest.mark.prefect, pytest.mark.xdist_group("prefect"), pytest.mark.usefixtures("prefect_server")]

CAUGHT_UP = "marketsync.plan.caught-up"


# ---------------------------------------------------------------- reading the server


def client():
    from prefect.client.orchestration import get_client

    return get_client(sync_client=True)


def run_flow(config: Path, plan: str = "five", **parameters: Any) -> Any:
    """Run the flow in this process and return its final state."""
    from flows.sync import sync_plan

    return sync_plan(plan=plan, config=str(config), **parameters, return_state=True)


def deployed(config: Path, plan: str = "five", **parameters: Any) -> Any:
    """Make a deployment of the flow, as prefect.yaml does, and return its id."""
    from flows.sync import sync_plan

    with client() as api:
        return api.create_deployment(
            api.create_flow(sync_plan),
            name=f"of-{uuid4()}",
            entrypoint="flows/sync.py:sync_plan",
            parameters={"plan": plan, "config": str(config), **parameters},
        )


def flow_run_of(deployment: Any) -> Any:
    with client() as api:
        return api.create_flow_run_from_deployment(deployment)


def carried_out(flow_run: Any) -> Any:
    """Do what a worker does with a flow run of a deployment; return its final state."""
    from prefect.flow_engine import run_flow as engine
    from prefect.states import Pending

    from flows.sync import sync_plan

    with client() as api:
        # Otherwise a run that is scheduled for later is waited for.
        api.set_flow_run_state(flow_run.id, Pending(), force=True)
        flow_run = api.read_flow_run(flow_run.id)
    return engine(sync_plan, flow_run=flow_run, parameters=flow_run.parameters, return_type="state")


def runs_of(deployment: Any) -> list[Any]:
    from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterId
    from prefect.client.schemas.sorting import FlowRunSort

    chosen = DeploymentFilter(id=DeploymentFilterId(any_=[deployment]))
    with client() as api:
        return api.read_flow_runs(deployment_filter=chosen, sort=FlowRunSort.EXPECTED_START_TIME_ASC)


def scheduled(deployment: Any) -> list[Any]:
    return [run for run in runs_of(deployment) if run.state.is_scheduled()]


def artifacts(flow_run_id: Any) -> dict[str, Any]:
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId

    chosen = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[flow_run_id]))
    with client() as api:
        return {artifact.key: artifact for artifact in api.read_artifacts(artifact_filter=chosen)}


def task_states(flow_run_id: Any) -> dict[str, str]:
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

    chosen = FlowRunFilter(id=FlowRunFilterId(any_=[flow_run_id]))
    with client() as api:
        return {run.name: run.state.name for run in api.read_task_runs(flow_run_filter=chosen) if run.state}


def events_of(flow_run_id: Any) -> list[dict[str, Any]]:
    """Return our events of a flow run that has ended: one emitted after all of its own has arrived by then."""
    from prefect.events import emit_event

    marker = f"test.marker.{uuid4()}"
    emit_event(event=marker, resource={"prefect.resource.id": "test.marker"})

    def received(name: str) -> list[dict[str, Any]]:
        wanted = {"filter": {"event": {"name": [name]}}, "limit": 50}
        with client() as api:
            return api._client.post("/events/filter", json=wanted).json()["events"]

    eventually(lambda: received(marker), "the marker event")
    of_run = f"prefect.flow-run.{flow_run_id}"
    return [
        event
        for event in received(CAUGHT_UP)
        if any(related["prefect.resource.id"] == of_run for related in event["related"])
    ]


# ---------------------------------------------------------------- a run that is done


def test_a_flow_run_fetches_the_plan_and_shows_what_it_did(market, tmp_path):
    here = market()
    state = run_flow(here.config, report_folder=str(tmp_path / "reports"), report_address="https://reports.example/")
    flow_run_id = state.state_details.flow_run_id

    assert (state.type.value, state.name) == ("COMPLETED", "Completed")
    assert here.rows == ALL_ROWS
    assert state.result().orchestrator == "prefect"
    assert [row.state for row in here.ledger.runs("five")] == ["completed"]
    with client() as api:
        assert api.read_flow_run(flow_run_id).name == "sync-five"
    steps = {"prepare alpaca.daily_bars", "fetch alpaca.daily_bars", "judge alpaca.daily_bars"}
    eventually(lambda: task_states(flow_run_id) == dict.fromkeys(steps, "Completed"), "the task runs")

    shown = artifacts(flow_run_id)
    assert shown["progress-five"].data == 100
    assert f"{ALL_ROWS:,} inserted" in shown["progress-five"].description
    line = json.loads(shown["datasets-five"].data)[0]
    assert (line["dataset"], line["store"], line["rows"], line["inserted"]) == (
        "alpaca.daily_bars",
        "default",
        ALL_ROWS,
        ALL_ROWS,
    )
    assert line["newest"].startswith("2013-03-01")
    assert f"{ALL_ROWS:,} inserted" in shown["report-five"].data
    [page] = (tmp_path / "reports").iterdir()
    assert f"https://reports.example/{page.name}" in shown["html-five"].data
    assert "<html" in page.read_text(encoding="utf-8")

    [event] = events_of(flow_run_id)
    assert event["resource"]["prefect.resource.id"] == "marketsync.plan.five"
    assert event["payload"]["rows"] == ALL_ROWS


def test_the_command_line_gets_the_report_of_its_flow(market):
    from flows.sync import run_from_command_line
    from tasks.workspace import Options

    here = market()
    report = run_from_command_line(here.config, "five", Options(only=("IBM",), until=date(2001, 3, 1)))
    assert (str(report.state), report.plan, report.rows.inserted) == ("completed", "five", here.rows)
    assert 0 < here.rows < ALL_ROWS


@pytest.mark.slow
def test_a_long_run_is_cut_into_tasks_that_go_on_where_the_last_stopped(market, monkeypatch):
    import flows.sync

    monkeypatch.setattr(flows.sync, "STEP_SECONDS", 1.0)
    here = market(monthly=True, delay=(0.05, 0.05), upstream="limits: []")
    state = run_flow(here.config, only=["IBM"])
    assert here.rows == ROWS_OF_IBM
    assert here.requests == state.result().requests.sent == 157
    assert here.requests == len({json.dumps(entry["request"]) for entry in here.replica.log})
    flow_run_id = state.state_details.flow_run_id
    names = eventually(lambda: (found := task_states(flow_run_id)).get("judge alpaca.daily_bars") and found, "tasks")
    fetches = {name: ended for name, ended in names.items() if name.startswith("fetch")}
    assert {"fetch alpaca.daily_bars", "fetch alpaca.daily_bars (2)"} <= set(fetches)
    assert set(fetches.values()) == {"GoesOn", "Completed"}


# ---------------------------------------------------------------- a quota


SPENT_TODAY = "limits:\n  - {requests: 2, per: day, resets: '00:00 America/New_York'}"
SPENT_FOR_SECONDS = "limits:\n  - {requests: 2, per: 3 seconds}\ntuning: {max_wait: 1 second}"


@pytest.mark.slow
def test_a_spent_quota_ends_the_run_and_schedules_the_run_that_goes_on_once(market):
    here = market(upstream=SPENT_TODAY)
    daily = deployed(here.config)

    first = carried_out(flow_run_of(daily))
    assert (first.type.value, first.name) == ("COMPLETED", "WaitingForQuota")
    assert here.requests == 2
    [later] = scheduled(daily)
    reset = first.result().resume_at
    assert reset <= later.expected_start_time <= reset + timedelta(minutes=1, seconds=1)
    assert reset.astimezone(UTC) - datetime.now(UTC) < timedelta(days=1)
    assert later.name in first.message
    assert later.parameters["plan"] == "five"
    assert later.parent_task_run_id is None
    assert not events_of(first.state_details.flow_run_id)

    # A run by hand on the same day learns of the same reset and must not double the continuation.
    second = carried_out(flow_run_of(daily))
    assert second.name == "WaitingForQuota"
    assert here.requests == 2
    assert [run.id for run in scheduled(daily)] == [later.id]


@pytest.mark.slow
def test_the_run_that_goes_on_after_the_reset_asks_only_for_the_rest(market):
    here = market(upstream=SPENT_FOR_SECONDS)
    daily = deployed(here.config)
    first = carried_out(flow_run_of(daily))
    assert first.name == "WaitingForQuota"
    [later] = scheduled(daily)

    wait = (first.result().resume_at - datetime.now(UTC)).total_seconds()
    time.sleep(max(0.0, wait) + 0.5)
    second = carried_out(later)
    assert (second.name, here.rows) == ("Completed", ALL_ROWS)
    assert here.requests == 3
    assert not scheduled(daily)
    [event] = events_of(second.state_details.flow_run_id)
    assert event["payload"]["run"] == second.result().run


@pytest.mark.slow
def test_a_run_that_goes_on_too_early_schedules_another(market):
    here = market(upstream=SPENT_TODAY)
    daily = deployed(here.config)
    carried_out(flow_run_of(daily))
    [early] = scheduled(daily)

    again = carried_out(early)
    assert again.name == "WaitingForQuota"
    [later] = scheduled(daily)
    assert later.id != early.id
    assert later.expected_start_time >= early.expected_start_time


@pytest.mark.slow
def test_a_continuation_that_was_cancelled_is_scheduled_anew(market):
    from prefect.states import Cancelled

    here = market(upstream=SPENT_TODAY)
    daily = deployed(here.config)
    carried_out(flow_run_of(daily))
    [later] = scheduled(daily)
    with client() as api:
        api.set_flow_run_state(later.id, Cancelled(), force=True)
    assert not scheduled(daily)

    carried_out(flow_run_of(daily))
    [anew] = scheduled(daily)
    assert anew.id != later.id


@pytest.mark.slow
def test_fetching_again_goes_on_after_the_reset_with_what_is_not_fetched_again_yet(market):
    here = market(upstream=SPENT_FOR_SECONDS.replace("requests: 2", "requests: 3"))
    assert run_flow(here.config).name == "Completed"
    assert here.requests == 3
    config = here.config.read_text(encoding="utf-8")
    daily = deployed(here.config, refetch=True)
    time.sleep(3.5)
    here.config.write_text(config.replace("requests: 3", "requests: 2"), encoding="utf-8")
    from tasks.workspace import close_workspaces

    close_workspaces()
    first = carried_out(flow_run_of(daily))
    assert (first.name, here.requests) == ("WaitingForQuota", 5)
    [later] = scheduled(daily)
    time.sleep(3.5)
    second = carried_out(later)
    assert (second.name, here.requests) == ("Completed", 6)


@pytest.mark.slow
def test_a_quota_without_a_deployment_says_when_to_run_again(market):
    state = run_flow(market(upstream=SPENT_TODAY).config)
    assert state.name == "WaitingForQuota"
    assert "run it again then" in state.message


# ---------------------------------------------------------------- the user's word


@pytest.mark.slow
def test_a_paused_plan_sends_nothing_until_it_is_resumed(market):
    from marketsync.ledger import Desired

    here = market()
    daily = deployed(here.config)
    here.ledger.set_control("five", Desired.PAUSE)
    for _ in range(2):
        state = carried_out(flow_run_of(daily))
        assert (state.type.value, state.name) == ("COMPLETED", "Paused")
        assert "marketsync resume five" in state.message
    assert here.requests == 0
    assert not events_of(state.state_details.flow_run_id)

    here.ledger.set_control("five", Desired.RUN)
    assert carried_out(flow_run_of(daily)).name == "Completed"
    assert here.rows == ALL_ROWS


@pytest.mark.parametrize(
    ("word", "name"), [("pause", "Paused"), pytest.param("cancel", "Cancelled", marks=pytest.mark.slow)]
)
def test_a_running_plan_stops_at_its_next_page_when_it_is_told_to(market, word, name):
    from marketsync.ledger import Desired

    here = market(monthly=True, delay=(0.2, 0.2), upstream="limits: []")
    ledger = here.ledger

    def tell() -> None:
        eventually(lambda: here.requests > 5, "requests")
        ledger.set_control("five", Desired(word))

    telling = threading.Thread(target=tell)
    telling.start()
    state = run_flow(here.config)
    telling.join()
    assert (state.type.value, state.name) == ("COMPLETED", name)
    assert 5 < here.requests < 100
    assert 0 < here.rows < ALL_ROWS


@pytest.mark.slow
def test_a_cancellation_in_the_user_interface_stops_a_run_that_has_no_worker(market, monkeypatch):
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterState, FlowRunFilterStateName
    from prefect.states import Cancelling

    import flows.runner

    monkeypatch.setattr(flows.runner, "POLL_SECONDS", 0.2)
    here = market(monthly=True, delay=(0.2, 0.2), upstream="limits: []")
    running = FlowRunFilter(state=FlowRunFilterState(name=FlowRunFilterStateName(any_=["Running"])))

    def cancel() -> None:
        eventually(lambda: here.requests > 5, "requests")
        with client() as api:
            [this] = api.read_flow_runs(flow_run_filter=running)
            api.set_flow_run_state(this.id, Cancelling())

    cancelling = threading.Thread(target=cancel)
    cancelling.start()
    state = run_flow(here.config)
    cancelling.join()
    assert (state.type.value, state.name) == ("CANCELLED", "Cancelled")
    assert [row.state for row in here.ledger.runs("five")] == ["paused"]
    assert 0 < here.rows < ALL_ROWS

    here.replica.delay = (0.0, 0.0)
    assert run_flow(here.config).name == "Completed"
    assert here.rows == ALL_ROWS


@pytest.mark.slow
def test_a_run_that_is_suspended_pauses_at_its_next_page_and_asks_only_for_the_rest_when_resumed(market, monkeypatch):
    from prefect.exceptions import Pause
    from prefect.states import Suspended

    import flows.runner

    monkeypatch.setattr(flows.runner, "POLL_SECONDS", 0.2)
    here = market(monthly=True, delay=(0.2, 0.2), upstream="limits: []")
    # A run that fetches again would ask for all once more, if it did not know that it had begun before.
    this = flow_run_of(deployed(here.config, refetch=True))

    def suspend() -> None:
        eventually(lambda: here.requests > 5, "requests")
        with client() as api:
            api.set_flow_run_state(this.id, Suspended(timeout_seconds=300))

    suspending = threading.Thread(target=suspend)
    suspending.start()
    with pytest.raises(Pause):
        carried_out(this)
    suspending.join()
    with client() as api:
        assert api.read_flow_run(this.id).state.name == "Suspended"
    assert [row.state for row in here.ledger.runs("five")] == ["paused"]
    assert 0 < here.rows < ALL_ROWS

    here.replica.delay = (0.0, 0.0)
    with client() as api:
        api.resume_flow_run(this.id)
    assert carried_out(this).name == "Completed"
    assert here.rows == ALL_ROWS
    assert here.requests == len({json.dumps(entry["request"]) for entry in here.replica.log})


# ---------------------------------------------------------------- what goes wrong


@pytest.mark.slow
def test_a_refused_key_fails_the_run_with_what_the_provider_said(market):
    from flows.sync import run_from_command_line
    from tasks.workspace import Options

    here = market(accounts={"alpaca": {"ANOTHER": {"secret": "not-ours"}}})
    state = run_flow(here.config)
    assert state.type.value == "FAILED"
    assert "the key of alpaca is refused" in state.message
    flow_run_id = state.state_details.flow_run_id
    steps = eventually(lambda: (found := task_states(flow_run_id)).get("judge alpaca.daily_bars") and found, "tasks")
    assert steps["fetch alpaca.daily_bars"] == "Failed"
    assert not events_of(state.state_details.flow_run_id)
    report = run_from_command_line(here.config, "five", Options())
    assert int(report.state.exit_code) == 1


def test_a_plan_that_does_not_exist_is_an_error_of_the_configuration(market):
    from flows.sync import run_from_command_line
    from marketsync.errors import ConfigurationError
    from tasks.workspace import Options

    with pytest.raises(ConfigurationError, match=r"there is no plan 'six'"):
        run_from_command_line(market().config, "six", Options())


@pytest.mark.slow
def test_a_run_of_some_symbols_does_not_say_that_the_plan_is_caught_up(market):
    state = run_flow(market().config, only=["IBM"])
    assert state.name == "Completed"
    assert not events_of(state.state_details.flow_run_id)
