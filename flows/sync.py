"""The flow that syncs one plan: the steps of `tasks/sync.py` as Prefect tasks, and a run's end as a Prefect state.

A flow run that must wait for a quota ends, and asks its deployment for the run that goes on; see `continuation.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, date, datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from prefect import flow, get_run_logger
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import State
from prefect.exceptions import Pause, TerminationSignal
from prefect.states import Cancelled, Completed, Failed
from prefect.task_runners import ThreadPoolTaskRunner
from pydantic import BeforeValidator, Field

from flows.artifacts import REFUSED, ProgressDisplay, sentence, show
from flows.continuation import continue_later, flow_run, is_caught_up, tell_caught_up
from flows.runner import PrefectRunner, Stoppable, logged_in_run
from marketsync.errors import ConfigurationError, Interrupted, MarketSyncError, WaitingForQuota
from marketsync.ledger import RunRow
from marketsync.rendering.words import many
from marketsync.report import Remark, RequestCounts, RowCounts, RunReport, RunState
from marketsync.upstream import NAME
from tasks.inquiry import Estimate, estimate
from tasks.steps import progress
from tasks.sync import begin, broken_off, describe, finish, not_started, sweep
from tasks.workspace import Options, Workspace, open_workspace

DATASETS_AT_ONCE = 4
STEP_SECONDS = 45.0  # of work in one task: a task costs about 35 ms, and a person reads some hundreds of them at most
LONGEST_STEP_SECONDS = 900.0
MOST_TASKS = 500  # of one flow run
OF_THE_RUN = ("paused", "schema", "void", "no_rows")  # remarks that no task has logged
SUSPENDED = (
    "the flow run was suspended on the Prefect server; resume it there, or let another run go on where it stopped"
)


def _date_or_instant(value: Any) -> Any:
    """Read text as a day when it is one, so that `until` means that day included; naive instants are UTC."""
    if isinstance(value, str):
        text = value.strip()
        value = date.fromisoformat(text) if len(text) <= 10 else datetime.fromisoformat(text)
    if isinstance(value, datetime) and value.tzinfo is None:
        value = value.replace(tzinfo=UTC)
    return value


Day = Annotated[date | datetime, BeforeValidator(_date_or_instant)]

# Prefect declares the parameter for one kind of future only.
_ON_THREADS: Any = ThreadPoolTaskRunner(max_workers=DATASETS_AT_ONCE)


@flow(
    name="sync-plan",
    flow_run_name="sync-{plan}",
    description="Fetches what a plan still owes, within every limit of its providers; delivers it to the plan's "
    "stores, judges it against the trading calendar and reports. It can be stopped and started at any time: what was "
    "done stays done.",
    task_runner=_ON_THREADS,
    persist_result=False,
    retries=0,
    log_prints=False,
)
def sync_plan(
    plan: Annotated[str, Field(pattern=NAME, examples=["daily"])],
    config: Annotated[str, Field(min_length=1, examples=["upstream.yml", "/market/upstream.yml"])] = "upstream.yml",
    since: Day | None = None,
    until: Day | None = None,
    only: list[str] = [],  # noqa: B006 - read only, and what Prefect shows in its form
    retry_failed: bool = False,
    refetch: bool = False,
    report_folder: str | None = None,
    report_address: str | None = None,
    refetch_begun: datetime | None = None,
) -> State[Any]:
    """Sync one plan; the state returned holds the `RunReport`, or the error that left none.

    The state is Completed, under a name that tells how: CompletedWithFindings, WaitingForQuota,
    WaitingForPublication, Paused, Cancelled; or Failed with the first error. (Prefect's form shows the words below.)

    Args:
        plan: The name of a plan in upstream.yml, such as daily. The plan says which datasets, of what, since when,
            into which stores.
        config: The path of upstream.yml on the machine of the worker, such as /market/upstream.yml. A relative path
            begins in MARKETSYNC_HOME.
        since: The first day wanted, such as 2020-01-01, instead of the plan's own. None: as the plan says.
        until: The last day wanted (that day included), such as 2020-12-31, instead of the plan's own. None: as the
            plan says, which usually is up to now.
        only: Sync only these symbols, one an item, such as AAPL. Empty: all of the plan's. A run of some symbols never
            makes the plan count as caught up.
        retry_failed: Ask only for what failed or was dropped in earlier runs.
        refetch: Ask again for everything in the range, also for what is there already. This spends quota.
        report_folder: A folder on the machine of the worker, such as /market/reports. Each run's report is written
            there as an HTML file and linked from the run. None: no file is written.
        report_address: The URL at which a web server shows that folder, such as https://reports.example.com. None:
            the link is a file path.
        refetch_begun: Leave this empty. A run that fetches again and has to wait for its quota fills it in for the
            run that goes on, so that nothing is asked for twice.
    """
    logger = get_run_logger()
    options = Options(since, until, tuple(only), retry_failed, refetch)
    try:
        workspace = open_workspace(config)
        workspace.plan(plan)
        with logged_in_run(), get_client(sync_client=True) as client:
            stoppable = Stoppable(partial(_is_to_stop, client))
            report = _synced(workspace, plan, options, refetch_begun, stoppable)
            told = _state_on_server(client) if stoppable.asked.is_set() else None
    except MarketSyncError as error:
        what = ": the configuration is wrong" if isinstance(error, ConfigurationError) else ""
        logger.error("plan %s was not synced%s\n%s", plan, what, error)
        return Failed(message=str(error), data=error)
    for remark in report.remarks:
        if remark.kind in OF_THE_RUN:
            logger.warning("%s: %s", " ".join(filter(None, (remark.dataset, remark.subject))) or plan, remark.message)
    show(workspace, report, html_folder=Path(report_folder) if report_folder else None, html_address=report_address)
    if is_caught_up(report, options):
        tell_caught_up(workspace, report)
    ended = _ended(report, _what_next(workspace, report, options))
    if told is not None and told.is_cancelling():
        if isinstance(stoppable.signal, TerminationSignal):
            # The worker sent it, and sets the final state once we are gone.
            logger.info("plan %s was cancelled: %s", plan, ended.message)
            raise stoppable.signal
        return Cancelled(message=ended.message, data=RunFailed(str(ended.message), report))
    if told is not None and told.is_paused():
        raise Pause(state=told)
    return ended


def _synced(
    workspace: Workspace, plan: str, options: Options, refetch_begun: datetime | None, stoppable: Stoppable
) -> RunReport:
    """Run a plan once and return its report."""
    path = str(workspace.path.resolve())
    sweep(path)
    run, state = begin(path, plan)
    if state is not None:
        return not_started(path, plan, run, state)
    if options.refetch:
        # What was asked since the first of these runs began has been fetched again already; a flow run that was
        # suspended or retried began long before.
        this = flow_run()
        known = (refetch_begun, None if this is None else this.start_time)
        # Prefect's own kind of datetime is not one that the report can be written with.
        began = [datetime.fromtimestamp(instant.timestamp(), UTC) for instant in known if instant is not None]
        run = replace(run, started=min([run.started, *began]))
    try:
        expected = expected_of(workspace, plan, options)
        if expected is not None:
            requests = many(expected.requests, "request")
            get_run_logger().info("plan %s: about %s to send (run %s)", plan, requests, run.run_id)
        with ProgressDisplay(run, expected) as display:
            report = stoppable.run(partial(_steps, workspace, run, options, step_seconds(expected)))
            display.ended(report)
        return report
    except BaseException as error:
        broken_off(path, run, error)
        raise


def _steps(workspace: Workspace, run: RunRow, options: Options, seconds: float) -> RunReport:
    path = str(workspace.path.resolve())
    try:
        outcomes = describe(path, run.plan, run, options, PrefectRunner(), seconds=seconds)
    except WaitingForQuota as wait:
        return _broke(workspace, run, RunState.WAITING_FOR_QUOTA, str(wait), wait.resume_at)
    except Interrupted as stop:
        return _broke(workspace, run, RunState.PAUSED, str(stop))
    except Pause:
        # Prefect raises it in place of the next step. Every step that began has ended.
        return _broke(workspace, run, RunState.PAUSED, SUSPENDED)
    return finish(path, run.plan, run, outcomes, "prefect")


def expected_of(workspace: Workspace, plan: str, options: Options) -> Estimate | None:
    """Return what a run is expected to ask; None where that is not known yet (a universe that this run fetches)."""
    try:
        return estimate(workspace, plan, options)
    except MarketSyncError:
        # If it is an error and not only too early to say, the step that meets it says so.
        return None


def step_seconds(expected: Estimate | None) -> float:
    """Return how long a fetching step may work so that a long run does not take more than about `MOST_TASKS`."""
    if expected is None:
        return STEP_SECONDS
    whole = sum(one.seconds or 0.0 for one in expected.datasets)
    return min(LONGEST_STEP_SECONDS, max(STEP_SECONDS, whole / (0.9 * MOST_TASKS)))


def _broke(
    workspace: Workspace, run: RunRow, state: RunState, message: str, resume_at: datetime | None = None
) -> RunReport:
    """Close a run that a step ended early, with a report that says why."""
    workspace.ledger.close_run(run.run_id, str(state), {"resume_at": resume_at.isoformat() if resume_at else None})
    counts = progress(run.run_id)
    kind = "waiting" if resume_at else "paused"
    return RunReport(
        run=run.run_id,
        plan=run.plan,
        state=state,
        resume_at=resume_at,
        started=run.started,
        ended=workspace.clock.now(),
        requests=RequestCounts(sent=counts.sent, retried=counts.retried, cool_downs=counts.cool_downs),
        rows=RowCounts(fetched=counts.fetched, duplicates=counts.duplicates, quarantined=counts.quarantined),
        remarks=(Remark(kind=kind, message=message, resume_at=resume_at),),
        orchestrator="prefect",
    )


def _what_next(workspace: Workspace, report: RunReport, options: Options) -> str:
    """Have a run that waits for a quota go on by itself; return the sentence that says how it goes on."""
    if report.state is RunState.WAITING_FOR_PUBLICATION:
        at = f"after {report.resume_at:%Y-%m-%d %H:%M} UTC " if report.resume_at else ""
        return f"what is not published yet is asked for by the next run {at}".rstrip()
    if report.state is not RunState.WAITING_FOR_QUOTA or report.resume_at is None:
        return ""
    at = f"{report.resume_at:%Y-%m-%d %H:%M} UTC"
    changes: dict[str, Any] = {"retry_failed": False}
    if options.refetch and report.started is not None:
        changes["refetch_begun"] = report.started.isoformat()
    try:
        later = continue_later(workspace, report, report.resume_at, changes)
    except (*REFUSED, RuntimeError) as error:
        get_run_logger().error("plan %s: its continuation could not be scheduled: %s", report.plan, error)
        return f"the quota is there again at {at}, but the run that goes on could not be scheduled: start one then"
    if later is None:
        return f"the quota is there again at {at}: run it again then, nothing is fetched twice"
    return f"the quota is there again at {at}: flow run '{later.name}' is scheduled to go on"


def _state_on_server(client: SyncPrefectClient) -> State[Any] | None:
    """Return the state that the server says this flow run has; None where it does not answer."""
    this = flow_run()
    if this is None:
        return None
    try:
        return client.read_flow_run(this.id).state
    except REFUSED:
        return None


def _is_to_stop(client: SyncPrefectClient) -> bool:
    """Return whether somebody suspended this flow run on the server or cancelled it there, where no worker would send
    a signal."""
    this, state = flow_run(), _state_on_server(client)
    if this is None or state is None:
        return False
    return state.is_paused() or (state.is_cancelling() and this.deployment_id is None)


class RunFailed(MarketSyncError):
    """A run failed; Prefect wants an exception in a state that is not Completed, so the report travels in one."""

    def __init__(self, message: str, report: RunReport):
        super().__init__(message)
        self.report = report
        self.exit_code = report.state.exit_code


NAMES: Mapping[RunState, str] = {
    RunState.COMPLETED: "Completed",
    RunState.COMPLETED_WITH_FINDINGS: "CompletedWithFindings",
    RunState.WAITING_FOR_QUOTA: "WaitingForQuota",
    RunState.WAITING_FOR_PUBLICATION: "WaitingForPublication",
    RunState.PAUSED: "Paused",
    RunState.CANCELLED: "Cancelled",
}


def _ended(report: RunReport, next_sentence: str) -> State[Any]:
    """Return the final state of a flow run from its report."""
    parts = [next_sentence, sentence(report)]
    if report.state is RunState.FAILED:
        first = report.errors[0].message if report.errors else "see the report for what failed"
        message = "; ".join([first, *filter(None, parts)])
        return Failed(message=message, data=RunFailed(message, report))
    if report.state is RunState.COMPLETED_WITH_FINDINGS:
        parts.extend(report.findings[:3])
    if report.state in (RunState.PAUSED, RunState.CANCELLED):
        why = [remark.message for remark in report.remarks if remark.kind == "paused"]
        parts.extend(why or ["another run goes on where this one stopped"])
    message = "; ".join(filter(None, parts))
    return Completed(name=NAMES[report.state], message=message, data=report)


def run_from_command_line(config: str | Path, plan: str, options: Options) -> RunReport:
    """Run the flow in this process, against PREFECT_API_URL or a server started for it, and return the report.

    Raises what the run raised: `ConfigurationError` and the other exceptions of `marketsync.errors`.
    """
    state = sync_plan(
        plan=plan,
        config=str(Path(config).resolve()),
        since=options.since,
        until=options.until,
        only=list(options.only),
        retry_failed=options.retry_failed,
        refetch=options.refetch,
        return_state=True,
    )
    result = state.result(raise_on_failure=False)
    if isinstance(result, RunReport):
        return result
    if isinstance(result, RunFailed):
        return result.report
    if isinstance(result, BaseException):
        raise result
    raise MarketSyncError(
        f"plan {plan}: Prefect ended the flow run as {state.name}: {state.message or 'no reason given'}"
    )
