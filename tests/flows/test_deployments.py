"""Deployments: what prefect.yaml says fits the flow, the form explains itself, and plans become deployments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).parents[2]
# All tests of the flows are one group, so that Prefect is imported and started once.
pytestmark = [pytest.mark.prefect, pytest.mark.xdist_group("prefect")]

CONFIGURATION = """\
upstreams:
  alpaca:
plans:
  nightly:
    datasets: [alpaca.daily_bars]
    universe: [IBM]
    since: 2020-01-01
    schedule: 30 19 * * 1-5
    zone: America/New_York
  once:
    datasets: [alpaca.daily_bars]
    universe: [AAPL]
    since: 2020-01-01
"""


def declared() -> list[dict[str, Any]]:
    return YAML(typ="safe", pure=True).load(ROOT / "prefect.yaml")["deployments"]


def schema() -> dict[str, Any]:
    from prefect.utilities.callables import parameter_schema

    from flows.sync import sync_plan

    return parameter_schema(sync_plan).model_dump_for_openapi()


@pytest.mark.slow
def test_every_field_of_the_form_is_explained():
    fields = schema()["properties"]
    assert list(fields)[:2] == ["plan", "config"]
    for name, field in fields.items():
        assert len(field.get("description", "")) > 20, name
    assert schema()["required"] == ["plan"]


def test_the_deployments_of_prefect_yaml_are_of_the_flow_and_its_parameters():
    for deployment in declared():
        path, _, function = deployment["entrypoint"].partition(":")
        assert (ROOT / path).is_file()
        assert f"def {function}(" in (ROOT / path).read_text(encoding="utf-8")
        assert set(deployment["parameters"]) <= set(schema()["properties"])
        assert deployment["work_pool"]["name"] == "marketsync"
        for schedule in deployment.get("schedules", []):
            assert schedule["timezone"] != "UTC"


@pytest.mark.parametrize("until", ["2001-03-01", "2001-03-01T15:30:00-05:00", "2001-03-01T15:30:00"])
def test_a_day_stays_a_day_and_an_instant_has_a_zone(until):
    from datetime import UTC, datetime

    from flows.sync import sync_plan

    value = sync_plan.validate_parameters({"plan": "daily", "until": until})["until"]
    if len(until) == 10:
        assert not isinstance(value, datetime)
    elif until.endswith("-05:00"):
        assert value == datetime(2001, 3, 1, 20, 30, tzinfo=UTC)
    else:
        assert value == datetime(2001, 3, 1, 15, 30, tzinfo=UTC)


def test_a_name_that_no_plan_can_have_is_refused_before_the_run():
    from prefect.exceptions import ParameterTypeError

    from flows.sync import sync_plan

    with pytest.raises(ParameterTypeError, match="plan"):
        sync_plan.validate_parameters({"plan": "no such name!"})


def test_every_plan_becomes_a_deployment_on_its_own_schedule(prefect_server, tmp_path):
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate

    from flows.deployments import deploy_plans
    from marketsync.errors import ConfigurationError

    config = tmp_path / "upstream.yml"
    config.write_text(CONFIGURATION, encoding="utf-8")
    with pytest.raises(ConfigurationError, match="prefect work-pool create deployed"):
        deploy_plans(config, "deployed")
    with get_client(sync_client=True) as client:
        client.create_work_pool(WorkPoolCreate(name="deployed", type="process"))
        for _ in range(2):  # the second time changes nothing
            assert deploy_plans(config, "deployed") == [
                "sync-plan/nightly: 30 19 * * 1-5, America/New_York",
                "sync-plan/once: no schedule; start it by hand",
            ]
            nightly = client.read_deployment_by_name("sync-plan/nightly")
            [schedule] = nightly.schedules
            assert (schedule.schedule.cron, schedule.schedule.timezone) == ("30 19 * * 1-5", "America/New_York")
            assert nightly.parameters == {"plan": "nightly", "config": str(config)}
            assert nightly.global_concurrency_limit.limit == 1
            assert nightly.job_variables == {"env": {"DO_NOT_TRACK": "1"}}
            assert (ROOT / nightly.entrypoint.partition(":")[0]).is_file()
            assert not client.read_deployment_by_name("sync-plan/once").schedules

        config.write_text(CONFIGURATION.replace("    schedule: 30 19 * * 1-5\n", ""), encoding="utf-8")
        deploy_plans(config, "deployed")
        assert not client.read_deployment_by_name("sync-plan/nightly").schedules
