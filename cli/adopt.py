"""`marketsync adopt`: take over a table that is in a store already, with its rows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.options import Config, Json
from cli.output import many, put, put_json
from marketsync.errors import ConfigurationError


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command("adopt")(adopt)


def adopt(
    name: Annotated[str, typer.Argument(metavar="PLAN_OR_DATASET", help="A plan, or upstream.dataset.")],
    config: Config = Path("upstream.yml"),
    store: Annotated[str | None, typer.Option("--store", help="The store. Default: the plan's first one.")] = None,
    table: Annotated[
        str | None,
        typer.Option("--table", help="The table, collection, file or folder. Default: what has the dataset's name."),
    ] = None,
    rename: Annotated[
        list[str] | None, typer.Option("--rename", metavar="THEIRS=OURS", help="A column that has another name.")
    ] = None,
    zone: Annotated[
        str | None, typer.Option("--zone", help="The zone of times that say none: UTC, America/New_York.")
    ] = None,
    believe_spans: Annotated[
        bool,
        typer.Option(
            "--believe-spans", help="Take sessions that have rows (without a calendar: all between them) for complete."
        ),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Change nothing; say what would be.")] = False,
    as_json: Json = False,
) -> None:
    """Take over a table that somebody else made, with its rows, so that the next sync asks only for what is missing."""
    from dataclasses import asdict

    from tasks.adopt import Asked
    from tasks.adopt import adopt as take
    from tasks.workspace import open_workspace

    found = take(
        open_workspace(config), name, Asked(store, table, _renamed(rename or ()), _zone(zone), believe_spans, dry_run)
    )
    if as_json:
        put_json({"dry_run": dry_run, "adopted": [asdict(one) for one in found]})
        return
    for one in found:
        _show(one)


def _renamed(pairs) -> tuple[tuple[str, str], ...]:
    found = []
    for pair in pairs:
        theirs, equals, ours = pair.partition("=")
        if not (theirs and equals and ours):
            raise ConfigurationError(f"--rename {pair}: write the table's name, =, the dataset's: --rename Close=close")
        found.append((theirs, ours))
    return tuple(found)


def _zone(name: str | None) -> str | None:
    from zoneinfo import ZoneInfo

    try:
        return None if name is None else str(ZoneInfo(name))
    except (OSError, ValueError, KeyError):
        raise ConfigurationError(
            f"--zone {name}: there is no such time zone; write UTC, America/New_York, Asia/Shanghai ..."
        ) from None


def _show(one) -> None:
    from tasks.adopt import SHOWN_SPANS

    if one.already:
        put(f"{one.dataset} in {one.store}: {one.table} is a table of ours already, {many(one.rows, 'row')}; it stays")
    else:
        would = "would be adopted" if one.dry else "adopted"
        put(f"{one.dataset} in {one.store}: {one.table} {would}, {many(one.rows, 'row')}")
    for line in one.done:
        put(f"  {line}")
    if one.kept:
        put(f"  the original is {one.kept}")
    for line in one.notes:
        put(f"  note: {line}")
    put(
        f"  believed: {one.believed_subjects:,} of {many(one.subjects, 'subject')}; {many(one.complete, 'session')} "
        f"complete, {one.incomplete:,} with rows and not provably all"
    )
    for span in one.spans[:SHOWN_SPANS]:
        more = f" and {len(span.subjects) - 5} more" if len(span.subjects) > 5 else ""
        put(f"    {', '.join(span.subjects[:5])}{more}: {span.start:%F %R} to {span.end:%F %R} UTC")
    if len(one.spans) > SHOWN_SPANS:
        put(f"    and {many(len(one.spans) - SHOWN_SPANS, 'span')} more: --json lists them")
    if not one.spans:
        put("    nothing that was not known before")
    least = "at least " if one.owed_at_least else "about "
    owed = (
        f"{many(one.owed_units, 'unit')}, {least}{many(one.owed_requests, 'request')}" if one.owed_units else "nothing"
    )
    put(f"  still owed: {owed}" + (": the next sync asks for it" if one.owed_units else ""))
    if one.dry:
        put("  nothing was changed")
