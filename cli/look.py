"""`marketsync status`, `report`, `explain`, `query`: look at what there is; nothing is asked of a provider."""

from __future__ import annotations

import errno
import sys
from datetime import date
from pathlib import Path
from typing import Annotated

import typer

from cli.options import Config, Json
from cli.output import many, put, put_json, put_object, say
from marketsync.errors import ConfigurationError


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command("status")(status)
    app.command("report")(report)
    app.command("explain")(explain)
    app.command("query")(query)


def status(
    plan: Annotated[str | None, typer.Argument(help="The plan; all of them when none is named.")] = None,
    config: Config = Path("upstream.yml"),
    owed: Annotated[bool, typer.Option("--owed", help="List what is still to be asked.")] = False,
    as_json: Json = False,
    watch: Annotated[bool, typer.Option("--watch", help="Show it again every two seconds until Ctrl-C.")] = False,
) -> None:
    """Say how plans stand: covered until when, what is owed, what waits, what runs."""
    import time
    from dataclasses import asdict

    from tasks.inquiry import status as ask
    from tasks.workspace import open_workspace

    if watch and as_json:
        raise ConfigurationError("--watch and --json exclude one another: --json prints one object, and ends")
    workspace = open_workspace(config)
    names = [plan] if plan else list(workspace.loaded.configuration.plans)
    try:
        while True:
            found = [ask(workspace, name, owed=owed) for name in names]
            if as_json:
                put_json(asdict(found[0]) if plan else {"plans": [asdict(one) for one in found]})
            else:
                if watch:
                    put("\033[2J\033[H")
                for one in found:
                    _show(one)
            if not watch:
                return
            sys.stdout.flush()  # where it is piped, too
            time.sleep(2.0)
    except KeyboardInterrupt:
        if not watch:
            raise


def _show(one) -> None:
    state = "running" if one.running else (one.last_state or "never run")
    wanted = {"pause": ", paused by hand", "cancel": ", cancelled by hand"}.get(one.desired, "")
    resumes = f", goes on after {one.resume_at:%Y-%m-%d %H:%M} UTC" if one.resume_at else ""
    put(f"{one.plan}: {state}{wanted}{resumes}")
    for part in one.datasets:
        until = f"covered until {part.covered_until:%Y-%m-%d}" if part.covered_until else "not covered yet"
        if part.covered_until and part.uncovered:
            until += f" except for {many(part.uncovered, 'subject')}"
        rows = "" if part.rows is None else f", {many(part.rows, 'row')}"
        newest = f", newest {part.watermark}" if part.watermark else ""
        put(f"  {part.dataset} in {part.store}: {many(part.subjects, 'subject')}, {until}{rows}{newest}")
        if part.owed_units:
            about = "at least" if part.owed_at_least else "about"
            put(f"    owed: {many(part.owed_units, 'unit')}, {about} {many(part.owed_requests, 'request')}")
        if part.spooled_rows:
            put(f"    in the spool: {many(part.spooled_rows, 'row')} on their way")
        if part.set_aside:
            put(f"    set aside: {many(part.set_aside, 'row')}, with the reason in quarantine/{part.dataset}/")
        if part.states:
            put("    " + ", ".join(f"{count:,} {state}" for state, count in sorted(part.states.items())))
        if part.problem:
            put(f"    {part.problem}")
    for unit in one.owed:
        more = f" and {unit['more_subjects']} more" if unit["more_subjects"] else ""
        put(f"  owed {unit['dataset']} {', '.join(unit['subjects'])}{more}: {unit['start']:%F} to {unit['end']:%F}")


def report(
    run: Annotated[str | None, typer.Argument(help="The run; the last one when none is named.")] = None,
    config: Config = Path("upstream.yml"),
    html: Annotated[Path | None, typer.Option("--html", help="Write the report as one HTML file.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the report as Markdown.")] = False,
    as_json: Json = False,
) -> None:
    """Show the report of a run."""
    from tasks.sync import full, kept
    from tasks.workspace import open_workspace

    workspace = open_workspace(config)
    # a run's id is no path
    found = None if run is not None and Path(run).name != run else kept(workspace, run)
    if found is None:
        wanted = f"run {run}" if run else "any run"
        raise ConfigurationError(f"there is no report of {wanted} in {workspace.state}; `marketsync sync` makes one")
    if html is not None:
        from marketsync.rendering.html import html as page

        text = page(full(workspace, found))
        try:
            html.write_text(text, encoding="utf-8")
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise ConfigurationError(f"the report cannot be written to {html}: {error.strerror}") from None
        say(f"written: {html}")
    if as_json:
        put_object(found.to_json())
    elif markdown:
        from marketsync.rendering.markdown import markdown as page

        put(page(found))
    elif html is None:
        from marketsync.rendering.terminal import show

        show(found)


def explain(
    dataset: Annotated[str, typer.Argument(help="upstream.dataset, such as alpaca.daily_bars.")],
    symbol: Annotated[str, typer.Argument(help="The symbol.")],
    day: Annotated[
        str | None,
        typer.Argument(metavar="DATE", help="The day, such as 2024-01-31; a list without dates needs none."),
    ] = None,
    config: Config = Path("upstream.yml"),
    as_json: Json = False,
) -> None:
    """Say why a row is or is not here: calendar, request, answer, segment, delivery, coverage."""
    from dataclasses import asdict

    from marketsync.durations import within_reach
    from tasks.inquiry import explain as ask
    from tasks.workspace import open_workspace

    try:
        session = within_reach(date.fromisoformat(day)) if day else None
    except ValueError as error:
        why = str(error) if "reach" in str(error) else f"'{day}' is not a day; write 2024-01-31"
        raise ConfigurationError(why) from None
    found = ask(open_workspace(config), dataset, symbol, session)
    if as_json:
        put_json(asdict(found))
        return
    for line in found.lines:
        put(line)


def query(
    sql: Annotated[str, typer.Argument(help="A SELECT; tables are named upstream.dataset.")],
    config: Config = Path("upstream.yml"),
    store: Annotated[str | None, typer.Option("--store", help="The store. Default: the first with tables.")] = None,
    as_json: Json = False,
) -> None:
    """Run SQL over a store's tables."""
    import polars as pl

    from tasks.workspace import open_workspace

    workspace = open_workspace(config)
    name = workspace.readable(store)
    frame = workspace.store(name).query(sql)
    if as_json:
        put_json({"store": name, "columns": frame.columns, "rows": frame.to_dicts()})
        return
    with pl.Config(tbl_rows=100, tbl_cols=50, tbl_hide_dataframe_shape=True, fmt_str_lengths=60, tbl_width_chars=200):
        put(str(frame))
    say(f"{many(frame.height, 'row')} from {name}")
