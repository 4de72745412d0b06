"""How a run that waits for a quota goes on by itself, and how others hear that a plan is caught up.

No process sleeps and no run is suspended until then: the run ends, and the deployment is asked for another one at the
reset. What is owed is in the ledger, so that the next run knows where to go on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from prefect.client.schemas.objects import FlowRun
from prefect.context import FlowRunContext
from prefect.deployments import run_deployment
from prefect.events import emit_event

from marketsync.report import RunReport, RunState
from tasks.workspace import Options, Workspace

CAUGHT_UP = "marketsync.plan.caught-up"
GRACE_SECONDS = 1  # after a reset, before it is trusted
RETRIES = 5  # of a key that a run holds which will never go on


def flow_run() -> FlowRun | None:
    """Return the flow run we are in."""
    context = FlowRunContext.get()
    return None if context is None else context.flow_run


def continue_later(
    workspace: Workspace, report: RunReport, resume_at: datetime, changes: Mapping[str, Any]
) -> FlowRun | None:
    """Schedule the run that goes on at `resume_at`, once however often it is asked for; return it, or None when this
    flow run has no deployment.

    `changes` replace parameters of this flow run in the next.
    """
    this = flow_run()
    if this is None or this.deployment_id is None:
        return None
    parameters = {**this.parameters, **changes}
    at = _whole_minute(resume_at + timedelta(seconds=GRACE_SECONDS))
    key = key_of(report.plan, accounts(workspace, report), at, parameters)
    for _ in range(RETRIES):
        found = _schedule(this.deployment_id, report.plan, at, key, parameters)
        held_by_this = found.id == this.id
        if not held_by_this and not (found.state is not None and found.state.is_final()):
            return found
        # The key is this run's own (the reset came, and the quota was spent again), or that of a run that is over.
        key = f"{key}:{found.id}"
        at = max(at, _whole_minute(workspace.clock.now() + timedelta(minutes=1)))
    raise RuntimeError(f"plan {report.plan}: every continuation under {key} is over already")


def _schedule(deployment: UUID, plan: str, at: datetime, key: str, parameters: Mapping[str, Any]) -> FlowRun:
    scheduled = run_deployment(
        deployment,
        parameters=dict(parameters),
        scheduled_time=at,
        timeout=0,
        as_subflow=False,
        idempotency_key=key,
        flow_run_name=f"sync-{plan} (goes on)",
        tags=["continuation"],
    )
    assert isinstance(scheduled, FlowRun)  # a coroutine only where an event loop runs
    return scheduled


def _whole_minute(instant: datetime) -> datetime:
    """Round up to a minute, so that runs which learn of one reset a second apart ask for the same continuation."""
    floor = instant.astimezone(UTC).replace(second=0, microsecond=0)
    return floor if floor == instant else floor + timedelta(minutes=1)


def accounts(workspace: Workspace, report: RunReport) -> list[str]:
    """Return the accounts whose quota a run waits for, sorted."""
    upstreams = {remark.dataset.partition(".")[0] for remark in report.remarks if remark.kind == "waiting"}
    upstreams = upstreams or {quota.account for quota in report.quotas if not quota.left}
    configured = workspace.loaded.configuration.upstreams
    return sorted({workspace.upstream(name).account or name if name in configured else name for name in upstreams})


def key_of(plan: str, accounts: list[str], at: datetime, parameters: Mapping[str, Any]) -> str:
    """Return the idempotency key plan:account:window:parameters, the last as a hash.

    Deployments of one plan share a continuation, so that a run by hand and one on schedule do not double it; another
    configuration, range or choice of symbols has its own.
    """
    given = {name: value for name, value in parameters.items() if value and name != "plan"}
    told = hashlib.sha256(json.dumps(given, sort_keys=True, default=str).encode()).hexdigest()[:12]
    return f"{plan}:{'+'.join(accounts)}:{at.astimezone(UTC):%Y-%m-%dT%H:%MZ}:{told}"


def is_caught_up(report: RunReport, options: Options) -> bool:
    """Return whether a plan has everything it wants that the provider has: nothing waits, failed or was left out, no
    store was down, and the run was of the whole plan."""
    whole = not (options.only or options.since or options.until or options.retry_failed)
    ended = report.state in (RunState.COMPLETED, RunState.COMPLETED_WITH_FINDINGS)
    work = report.work
    left = work.waiting + work.failed + work.not_yet + work.cancelled
    return whole and ended and not left and not any(part.state for part in report.datasets)


def tell_caught_up(workspace: Workspace, report: RunReport) -> None:
    """Emit the event that a plan is caught up; automations compare its stores then."""
    emit_event(
        event=CAUGHT_UP,
        resource={
            "prefect.resource.id": f"marketsync.plan.{report.plan}",
            "prefect.resource.name": report.plan,
            "marketsync.state": str(report.state),
        },
        payload={
            "run": report.run,
            "plan": report.plan,
            "datasets": sorted({part.dataset for part in report.datasets}),
            "stores": sorted({part.store for part in report.datasets}),
            "rows": report.rows.fetched,
            "findings": list(report.findings),
        },
    )
