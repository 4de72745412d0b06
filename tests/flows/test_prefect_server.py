"""prefect.yaml on a server and a worker of its own: schedules make runs, parameters arrive, stops are pauses.

A server whose libraries do not fit starts, takes deployments, and then schedules nothing at all without a word: hence
these processes, and not only the server that the other tests share.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from replica_market import ALL_ROWS, Market, eventually

ROOT = Path(__file__).parents[2]
START_SECONDS = 180
pytestmark = [
    pytest.mark.prefect,
    pytest.mark.slow,
    pytest.mark.xdist_group("prefect"),
    pytest.mark.timeout(600),
]


@dataclass
class Site:
    """A server, and how commands and clients reach it."""

    api: str
    environment: dict[str, str]

    def prefect(self, *arguments: str) -> str:
        """Run a command of Prefect in the project's folder and return what it said."""
        command = [sys.executable, "-m", "prefect", "--no-prompt", *arguments]
        done = subprocess.run(
            command, cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=START_SECONDS, check=False
        )
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def client(self) -> Any:
        from prefect.client.orchestration import SyncPrefectClient

        return SyncPrefectClient(self.api)

    def deployment(self, name: str) -> Any:
        with self.client() as client:
            return client.read_deployment_by_name(f"sync-plan/{name}")

    def begin(self, **parameters: Any) -> Any:
        """Ask the deployment `manual` for a run and return it."""
        with self.client() as client:
            return client.create_flow_run_from_deployment(self.deployment("manual").id, parameters=parameters)

    def state(self, flow_run: Any) -> Any:
        with self.client() as client:
            return client.read_flow_run(flow_run.id).state

    def logged(self, flow_run: Any) -> list[str]:
        """Return the lines of a run's log that have arrived."""
        from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId

        with self.client() as client:
            chosen = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[flow_run.id]))
            return [line.message for line in client.read_logs(chosen)]

    def ended(self, flow_run: Any) -> Any:
        """Return the final state of a run."""
        return eventually(
            lambda: (state := self.state(flow_run)).is_final() and state, "the end of the run", START_SECONDS
        )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A server with the deployments of prefect.yaml, and a worker; both are stopped in the end."""
    folder = tmp_path_factory.mktemp("prefect")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    api = f"http://127.0.0.1:{port}/api"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")} | {
        "PREFECT_HOME": str(folder / "home"),
        "PREFECT_API_URL": api,
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_UI_ENABLED": "false",
        "PREFECT_WORKER_QUERY_SECONDS": "1",
        "DO_NOT_TRACK": "1",
        "MARKETSYNC_HOME": str(ROOT),
    }
    here = Site(api, environment)
    started: list[subprocess.Popen[bytes]] = []

    def start(name: str, *arguments: str) -> None:
        with (folder / f"{name}.log").open("wb") as log:
            command = [sys.executable, "-m", "prefect", *arguments]
            started.append(
                subprocess.Popen(
                    command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
                )
            )

    try:
        start("server", "server", "start", "--host", "127.0.0.1", "--port", str(port))
        eventually(lambda: _answers(f"{api}/health"), f"the server, see {folder / 'server.log'}", START_SECONDS)
        here.prefect("work-pool", "create", "marketsync", "--type", "process")
        here.prefect("deploy", "--all")
        start("worker", "worker", "start", "--pool", "marketsync", "--type", "process")
        yield here
    finally:
        for process in reversed(started):
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def test_the_schedule_makes_runs_at_its_hour_in_its_zone(site):
    from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterId

    daily = site.deployment("daily")
    chosen = DeploymentFilter(id=DeploymentFilterId(any_=[daily.id]))

    def scheduled() -> list[Any]:
        with site.client() as client:
            return client.read_flow_runs(deployment_filter=chosen)

    runs = eventually(scheduled, "a scheduled run of sync-plan/daily")
    for run in runs:
        local = run.expected_start_time.astimezone(ZoneInfo("America/New_York"))
        assert (local.hour, local.minute) == (19, 30)
        assert local.isoweekday() <= 5
        assert run.parameters["plan"] == "daily"


def test_runs_of_a_deployment_wait_for_one_another(site):
    for name, limit in (("daily", 1), ("manual", 4)):
        deployment = site.deployment(name)
        assert deployment.global_concurrency_limit.limit == limit
        assert str(deployment.concurrency_options.collision_strategy.value) == "ENQUEUE"


def test_a_worker_runs_the_plan_that_the_form_was_given(site, market: Callable[..., Market]):
    here = market()
    state = site.ended(site.begin(plan="five", config=str(here.config), only=["IBM"], until="2001-03-01"))
    assert (state.type.value, state.name) == ("COMPLETED", "Completed"), state.message
    assert 0 < here.rows < 300
    state = site.ended(site.begin(plan="five", config=str(here.config)))
    assert (state.type.value, state.name) == ("COMPLETED", "Completed"), state.message
    assert here.rows == ALL_ROWS


def test_two_runs_of_one_plan_at_once_share_the_work(site, market: Callable[..., Market]):
    here = market(monthly=True, delay=(0.1, 0.1), upstream="limits: []")
    both = [site.begin(plan="five", config=str(here.config)) for _ in range(2)]
    for flow_run in both:
        assert site.ended(flow_run).name == "Completed"
    assert here.rows == ALL_ROWS
    assert here.requests == len({json.dumps(entry["request"]) for entry in here.replica.log})


def test_a_failed_run_says_why_without_the_way_through_the_code(site, market: Callable[..., Market]):
    here = market(accounts={"alpaca": {"ANOTHER": {"secret": "not-ours"}}})
    flow_run = site.begin(plan="five", config=str(here.config))
    state = site.ended(flow_run)
    assert (state.type.value, state.name) == ("FAILED", "Failed")
    assert "the key of alpaca is refused" in state.message
    said = eventually(
        lambda: (lines := site.logged(flow_run)) and any(state.message in line for line in lines) and lines,
        "the end of the log",
    )
    assert not [line for line in said if "Traceback" in line or "unexpected exception" in line]


def test_a_cancelled_run_of_a_worker_keeps_what_it_fetched(site, market: Callable[..., Market]):
    from prefect.states import Cancelling

    here = market(monthly=True, delay=(0.2, 0.2), upstream="limits: []")
    flow_run = site.begin(plan="five", config=str(here.config))
    eventually(lambda: here.requests > 5, "requests", START_SECONDS)
    with site.client() as client:
        client.set_flow_run_state(flow_run.id, Cancelling())
    assert site.ended(flow_run).type.value == "CANCELLED"
    [run] = here.ledger.runs("five")
    assert run.state == "paused"
    assert 0 < here.rows < ALL_ROWS

    here.replica.delay = (0.0, 0.0)
    assert site.ended(site.begin(plan="five", config=str(here.config))).name == "Completed"
    assert here.rows == ALL_ROWS
    assert here.requests <= 785 + 4  # what its threads were asking when it stopped may be asked again, no more


def test_a_signal_to_the_command_line_pauses_its_flow(site, market: Callable[..., Market]):
    here = market(monthly=True, delay=(0.2, 0.2), upstream="limits: []")
    command = [sys.executable, "-m", "cli", "sync", "five", "-c", str(here.config)]
    process = subprocess.Popen(command, cwd=ROOT, env=site.environment, stderr=subprocess.PIPE, text=True)
    eventually(lambda: here.requests > 5, "requests", START_SECONDS)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=START_SECONDS)
    assert process.returncode == 4, said
    assert "as a Prefect flow" in said
    assert [run.state for run in here.ledger.runs("five")] == ["paused"]
    assert 0 < here.rows < ALL_ROWS
