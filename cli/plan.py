"""`marketsync plan add` and `plan list`: the plans of an upstream.yml."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.options import Config, Json, listed
from cli.output import many, put, put_json, say
from marketsync.errors import ConfigurationError, ExitCode

if TYPE_CHECKING:
    from tasks.inquiry import DatasetDiff

plan_app = typer.Typer(name="plan", no_args_is_help=True, help="Add, list and compare plans.")


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.add_typer(plan_app)


@plan_app.command("add")
def add(
    name: Annotated[str, typer.Argument(help="What the plan is called.")],
    dataset: Annotated[list[str], typer.Option("--dataset", help="upstream.dataset; give it again for more.")],
    universe: Annotated[str | None, typer.Option(help="A universe of the file.")] = None,
    symbols: Annotated[str | None, typer.Option(help="The symbols themselves, joined by commas.")] = None,
    since: Annotated[str | None, typer.Option(help="The first day wanted, such as 2020-01-01.")] = None,
    until: Annotated[str | None, typer.Option(help="The last day wanted, included.")] = None,
    store: Annotated[list[str] | None, typer.Option("--store", help="A store of the file; again for more.")] = None,
    schedule: Annotated[str | None, typer.Option(help="A cron expression, such as '0 19 * * 1-5'.")] = None,
    zone: Annotated[str | None, typer.Option(help="The time zone of --schedule.")] = None,
    fresh_by: Annotated[str | None, typer.Option(help="Rows are there by, such as '19:00 America/New_York'.")] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Replace a plan of this name.")] = False,
    config: Config = Path("upstream.yml"),
) -> None:
    """Add a plan to upstream.yml; comments and order of the file stay as they are.

    An upstream that the file lacks is added too when its definition is shipped.
    """
    from marketsync.configuration import shipped_definitions
    from marketsync.document import read_document
    from marketsync.editing import add_parts

    if universe and symbols:
        raise ConfigurationError("--universe and --symbols exclude one another: give the name of a universe, or a list")
    given: dict[str, Any] = {
        "datasets": dataset,
        "universe": listed([symbols]) if symbols else universe,
        "since": since,
        "until": until,
        "stores": store or None,
        "schedule": schedule,
        "zone": zone,
        "fresh_by": fresh_by,
    }
    value = read_document(config).value
    upstreams = (value.get("upstreams") if isinstance(value, dict) else None) or {}
    needed = dict.fromkeys(one.partition(".")[0] for one in dataset)
    missing = [one for one in needed if one not in upstreams and one in shipped_definitions()]
    parts: list[tuple[str, str, Any]] = [("upstreams", one, None) for one in missing]
    parts.append(("plans", name, {field: one for field, one in given.items() if one is not None}))
    add_parts(config, parts, replace=replace)
    for one in missing:
        say(f"{config}: added the upstream {one}; `marketsync check` says what it still needs")
    put(f"{config}: added the plan {name}; run it with: marketsync sync {name} -c {config}")


@plan_app.command("list")
def list_plans(config: Config = Path("upstream.yml"), as_json: Json = False) -> None:
    """List the plans: what, over what, since when, into which stores, how often."""
    from marketsync.configuration import load_configuration

    loaded = load_configuration(config)
    plans = loaded.configuration.plans
    if as_json:
        put_json({"plans": {name: plan.model_dump(mode="json", exclude_defaults=True) for name, plan in plans.items()}})
        return
    if not plans:
        say(f"{config} has no plan yet; add one with marketsync plan add")
    for name, plan in plans.items():
        over = "" if plan.universe is None else f" over {_universe(plan.universe)}"
        since = f" since {plan.since}" if plan.since else ""
        until = f" until {plan.until}" if plan.until else ""
        when = f", {plan.schedule} {plan.zone}" if plan.schedule else ""
        put(f"{name}: {', '.join(plan.datasets)}{over}{since}{until} into {', '.join(plan.stores)}{when}")


def _universe(universe: str | tuple[str, ...]) -> str:
    if isinstance(universe, str):
        return universe
    return ", ".join(universe[:5]) + (f" and {len(universe) - 5} more" if len(universe) > 5 else "")


@plan_app.command("diff")
def diff(
    name: Annotated[str | None, typer.Argument(help="The plan; all of them when none is named.")] = None,
    config: Config = Path("upstream.yml"),
    as_json: Json = False,
) -> None:
    """Say what the file as it stands would newly ask for, and what it leaves. Sends nothing."""
    from dataclasses import asdict

    from tasks.inquiry import diff as compare
    from tasks.workspace import open_workspace

    workspace = open_workspace(config)
    names = [name] if name else list(workspace.loaded.configuration.plans)
    found = {one: compare(workspace, one) for one in names}
    refused = any(part.conflicts for parts in found.values() for part in parts)
    if as_json:
        put_json({one: [asdict(part) for part in parts] for one, parts in found.items()})
    else:
        for one, parts in found.items():
            for part in parts:
                _show(one, part)
    if refused:
        raise typer.Exit(int(ExitCode.CONFIGURATION))


def _show(one: str, part: DatasetDiff) -> None:
    """Tell what a sync would do with one dataset of a plan."""
    least = "at least " if part.at_least else ""
    put(f"{one}: {part.dataset}: {least}{many(part.requests, 'request')} would be sent")
    for store, message in part.conflicts.items():
        put(f"  cannot be synced into {store}: {message}")
    if part.not_known_yet:
        put(f"  not known yet: {part.not_known_yet}")
    if part.new_request:
        put("  the request itself changed: everything is asked again under the new one")
    for why, count in part.owed.items():
        put(f"  {many(count, 'unit')}: {why}")
    if part.new_subjects:
        put(f"  new: {_some(part.new_subjects)}")
    if part.gone_subjects:
        put(f"  no longer asked for, rows stay: {_some(part.gone_subjects)}")
    if part.new_columns:
        put(f"  new columns: {', '.join(part.new_columns)} (empty in old rows until `sync {one} --refetch`)")
    for store, count in part.copies.items():
        put(f"  {store} gets what it lacks of {many(count, 'subject')} from its sibling, at no request")
    put(f"  left as they are: {many(part.left, 'subject')}")


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10:,} more" if len(names) > 10 else "")
