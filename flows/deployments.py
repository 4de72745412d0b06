"""Deployments from a configuration: one for each plan of upstream.yml, on the plan's own schedule and in its zone.

    python -m flows.deployments [upstream.yml] [--pool marketsync]

prefect.yaml declares what a project wants beside them; both make deployments of the same flow.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.client.schemas.objects import ConcurrencyLimitStrategy, ConcurrencyOptions
from prefect.client.schemas.schedules import CronSchedule
from prefect.exceptions import ObjectNotFound, PrefectException
from prefect.utilities.callables import parameter_schema

from flows.sync import sync_plan
from marketsync.configuration import load_configuration
from marketsync.errors import ConfigurationError, MarketSyncError
from marketsync.rendering.words import names
from marketsync.upstream import Plan

ROOT = Path(__file__).resolve().parent.parent
ENTRYPOINT = "flows/sync.py:sync_plan"
POOL = "marketsync"


def deploy_plans(config: str | Path, pool: str = POOL) -> list[str]:
    """Make or renew a deployment `sync-plan/NAME` for every plan of a configuration; return a sentence for each.

    A plan without a schedule gets none, and loses the one it had; whether a deployment is paused is left as it is.
    Runs begin in MARKETSYNC_HOME, or where this project is. Raises `ConfigurationError` for a wrong file and for a
    pool that does not exist, and Prefect's and httpx's own errors when the server cannot be reached.
    """
    loaded = load_configuration(config)
    home = os.environ.get("MARKETSYNC_HOME") or str(ROOT)
    with get_client(sync_client=True) as client:
        try:
            client.read_work_pool(pool)
        except ObjectNotFound:
            raise ConfigurationError(
                f"there is no work pool '{pool}' on {client.api_url}; make it with "
                f"`prefect work-pool create {pool} --type process`"
            ) from None
        flow = client.create_flow(sync_plan)
        return [
            _deploy(client, flow, name, plan, Path(config).resolve(), pool, home)
            for name, plan in loaded.configuration.plans.items()
        ]


def _deploy(client: SyncPrefectClient, flow, name: str, plan: Plan, config: Path, pool: str, home: str) -> str:
    schedules = []
    if plan.schedule is not None:
        cron = CronSchedule(cron=plan.schedule, timezone=plan.zone)
        schedules = [DeploymentScheduleCreate(schedule=cron, active=True)]
    deployment = client.create_deployment(
        flow,
        name,
        description=f"Syncs the plan {name} of {config}: {names(plan.datasets)} into {names(plan.stores)}.",
        entrypoint=ENTRYPOINT,
        pull_steps=[{"prefect.deployments.steps.set_working_directory": {"directory": home}}],
        parameters={"plan": name, "config": str(config)},
        parameter_openapi_schema=parameter_schema(sync_plan).model_dump_for_openapi(),
        enforce_parameter_schema=True,
        schedules=schedules,
        concurrency_limit=1,
        concurrency_options=ConcurrencyOptions(collision_strategy=ConcurrencyLimitStrategy.ENQUEUE),
        work_pool_name=pool,
        job_variables={"env": {"DO_NOT_TRACK": "1"}},
        tags=["marketsync"],
    )
    if not schedules:
        for old in client.read_deployment_schedules(deployment):
            client.delete_deployment_schedule(deployment, old.id)
        return f"sync-plan/{name}: no schedule; start it by hand"
    return f"sync-plan/{name}: {plan.schedule}, {plan.zone}"


def main() -> int:
    """Make the deployments and say what they are; exit code 2 for a configuration that is wrong, 1 for Prefect."""
    parser = argparse.ArgumentParser(prog="python -m flows.deployments", description=deploy_plans.__doc__)
    parser.add_argument("config", nargs="?", type=Path, default=Path("upstream.yml"), help="default: upstream.yml")
    parser.add_argument("--pool", default=POOL, help=f"the work pool whose workers run them; default: {POOL}")
    options = parser.parse_args()
    try:
        lines = deploy_plans(options.config, options.pool)
    except MarketSyncError as error:
        sys.stderr.write(f"{error}\n")
        return int(error.exit_code)
    except (PrefectException, httpx.HTTPError) as error:
        sys.stderr.write(f"the Prefect server did not take the deployments: {error}\n")
        return 1
    sys.stdout.write("\n".join([*lines, ""]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
