"""`marketsync sync` and `estimate`: run plans, or say beforehand what that takes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.options import Config, Json, when
from cli.output import length, many, put, put_json, put_object, say
from marketsync.errors import ConfigurationError


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command("sync")(sync)
    app.command("estimate")(estimate)


def sync(
    plans: Annotated[
        list[str] | None, typer.Argument(help="Plans to sync; all of the file's when none is named.")
    ] = None,
    config: Config = Path("upstream.yml"),
    prefect: Annotated[bool, typer.Option("--prefect", help="Run as a Prefect flow.")] = False,
    local: Annotated[bool, typer.Option("--local", help="Run on threads, even when PREFECT_API_URL is set.")] = False,
    since: Annotated[str | None, typer.Option(help="Instead of the plan's since.")] = None,
    until: Annotated[str | None, typer.Option(help="Instead of the plan's until (that day included).")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Only this symbol (repeat for several).")] = None,
    retry_failed: Annotated[bool, typer.Option(help="Ask only for what failed or was dropped.")] = False,
    refetch: Annotated[bool, typer.Option(help="Ask again for what is covered already.")] = False,
    wait: Annotated[bool, typer.Option(help="Sleep through quotas and go on, instead of ending with code 75.")] = False,
    as_json: Json = False,
) -> None:
    """Fetch what the plans still owe, deliver it to their stores, judge it and report.

    Exit codes: 0 done, 1 failed, 2 configuration, 3 findings, 4 paused or cancelled, 75 waiting (run again later).
    With --json, the object is the run's report; with several plans it is {"runs": [report, ...]}.
    """
    import os

    from cli.progress import Progress
    from tasks.inquiry import refuse_conflicts, refuse_nothing
    from tasks.sync import as_json as reports_as_json
    from tasks.sync import exit_code
    from tasks.sync import sync as run
    from tasks.workspace import Options, open_workspace

    if prefect and local:
        raise ConfigurationError("--prefect and --local exclude one another")
    options = Options(when(since, "--since"), when(until, "--until"), tuple(only or ()), retry_failed, refetch)
    path = str(config.resolve())
    workspace = open_workspace(path)
    plans = list(dict.fromkeys(plans or ()))  # a plan that is named twice is one plan
    names = plans or list(workspace.loaded.configuration.plans)
    if not names:
        raise ConfigurationError(f"{config} has no plan yet, so there is nothing to sync; add one: marketsync plan add")
    refuse_nothing(workspace, names, options)
    refuse_conflicts(workspace, names)
    if prefect or (os.environ.get("PREFECT_API_URL") and not local):
        from cli.prefect import sync_with_prefect

        say("sync: as a Prefect flow" + ("" if prefect else " (PREFECT_API_URL is set; --local for threads)"))
        reports = sync_with_prefect(path, plans, options)
    else:
        with Progress(path, quiet=as_json) as progress:
            reports = run(path, plans, options, wait=wait, told=say, begun=progress.begun)
    if as_json:
        put_object(reports_as_json(reports))
    else:
        from marketsync.rendering.terminal import show

        for report in reports:
            show(report)
    raise typer.Exit(int(exit_code(reports)))


def estimate(
    plan: Annotated[str, typer.Argument(help="The plan.")],
    config: Config = Path("upstream.yml"),
    requests: Annotated[bool, typer.Option("--requests", help="List the first requests.")] = False,
    as_json: Json = False,
) -> None:
    """Say how many requests a sync would send, how long it takes, and which limit decides that. Sends nothing."""
    from dataclasses import asdict

    from tasks.inquiry import estimate as ask
    from tasks.workspace import open_workspace

    found = ask(open_workspace(config), plan, requests=20 if requests else 0)
    if as_json:
        put_json(asdict(found))
        return
    for one in found.datasets:
        if one.not_known_yet:
            put(f"{one.dataset}: not known yet: {one.not_known_yet}")
            continue
        rows = "" if one.rows is None or one.at_least else f", about {one.rows:,} rows"
        least = "at least " if one.at_least else ""
        put(
            f"{one.dataset}: {least}{many(one.requests, 'request')} for {many(one.subjects, 'subject')} in "
            f"{many(one.units, 'unit')}{rows}"
        )
        if one.at_least:
            put("  how many pages each unit has is not known before it is asked: this is one page for each")
        if one.impossible:
            put(f"  cannot be done: {one.impossible}")
        elif one.seconds is not None and one.done_at is not None:
            over = f", over {one.periods} quota periods" if one.periods > 1 else ""
            when = f"{one.done_at:%Y-%m-%d %H:%M} UTC" + (" at the earliest" if one.at_least else "")
            put(f"  takes {least or 'about '}{length(one.seconds)}{over}; complete on {when}")
            put(f"  decided by: {one.binding or 'how fast the provider answers (no limit binds)'}")
    if not found.requests and not found.at_least:
        put("nothing is owed: a sync would send no request")
    for line in found.first_requests:
        put(f"  {line}")
