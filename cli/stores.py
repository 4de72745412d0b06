"""`marketsync stores` and `copy`: what stands behind the stores of upstream.yml, and rows from one store to another."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.options import Config, Json, listed
from cli.output import length, many, put, put_json, say, size
from marketsync.errors import ExitCode

if TYPE_CHECKING:
    from tasks.copy import Copied
    from tasks.stores import StoreState, TableState

LINE_SECONDS = 5.0


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command("stores")(stores)
    app.command("copy")(copy)


def stores(
    config: Config = Path("upstream.yml"),
    seconds: Annotated[float, typer.Option(help="How long a store may take to answer.")] = 15.0,
    as_json: Json = False,
) -> None:
    """List the stores: engine and version, tables, rows, newest times, and whether each can be reached.

    Exit codes: 0 all of them answered, 1 one could not be reached or read, 2 one is configured wrongly.
    """
    from tasks.stores import code_of
    from tasks.stores import stores as ask
    from tasks.workspace import open_workspace

    found = ask(open_workspace(config), seconds=seconds)
    if as_json:
        put_json({"stores": [{**asdict(one), "rows": one.rows, "bytes": one.bytes} for one in found]})
    else:
        for one in found:
            _show(one)
    raise typer.Exit(int(code_of(found)))


def _show(one: StoreState) -> None:
    parts = [one.url]
    if one.reachable:
        parts += [one.version, many(len(one.tables), "table"), many(one.rows, "row"), size(one.bytes)]
    put(f"{one.name}: " + ", ".join(parts) + (f": {one.problem}" if one.problem else ""))
    for table in one.tables:
        put(f"  {table.dataset}: {table.problem or _described(table)}")


def _described(table: TableState) -> str:
    parts = [many(table.rows, "row") if table.messages is None else f"a log of {many(table.messages, 'message')}"]
    if table.subjects is not None:
        parts.append(many(table.subjects, "symbol"))
    if table.newest is not None:
        parts.append(f"newest {table.newest}")
    parts.append(size(table.bytes))
    if table.known is None:
        parts.append("not in the ledger")
    elif not table.known:
        parts.append("another table than the ledger knows: the next sync fills it anew")
    return ", ".join(parts)


def copy(
    source: Annotated[str, typer.Option("--from", help="The store, by its name in upstream.yml or by its URL.")],
    target: Annotated[str, typer.Option("--to", help="The store, by its name in upstream.yml or by its URL.")],
    datasets: Annotated[
        list[str] | None, typer.Argument(help="Datasets such as alpaca.daily_bars; all that the store has when none.")
    ] = None,
    config: Config = Path("upstream.yml"),
    symbols: Annotated[list[str] | None, typer.Option(help="Only these symbols (A,B or repeated).")] = None,
    since: Annotated[str | None, typer.Option(help="Only rows from this day or instant on.")] = None,
    until: Annotated[str | None, typer.Option(help="Only rows up to this day (included) or instant.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be copied, or why it cannot be.")] = False,
    as_json: Json = False,
) -> None:
    """Copy rows from one store to another, whatever their engines; nothing is deleted, and equal rows stay as they are.

    Fingerprints of both are compared then, and what differs is named. Broken off, it goes on when it is run again.

    Exit codes: 0 done, 1 failed or not all arrived as it was, 2 configuration.
    """
    from tasks.public import copy as run

    shown = [0.0, time.monotonic()]  # when a line was printed last; the start of the dataset

    def told(one: Copied) -> None:
        now = time.monotonic()
        if now - shown[0] >= LINE_SECONDS and shown[0]:
            pace = one.read / (now - shown[1])
            left = max(0, one.rows - one.read) / pace
            say(f"{one.dataset}: {one.read:,} of {many(one.rows, 'row')}, {pace:,.0f} rows/s, {length(left)} to go")
        if now - shown[0] >= LINE_SECONDS:
            shown[0] = now

    found = run(
        source,
        target,
        datasets or (),
        config,
        symbols=listed(symbols),
        since=since,
        until=until,
        dry_run=dry_run,
        told=(lambda _: None) if as_json else told,
    )
    if as_json:
        put_json({"from": source, "to": target, "dry_run": dry_run, "datasets": [asdict(one) for one in found]})
    else:
        for one in found:
            _show_copied(one, dry_run)
    raise typer.Exit(int(ExitCode.FAILED if any(one.problems for one in found) else ExitCode.DONE))


def _show_copied(one: Copied, dry_run: bool) -> None:
    if dry_run:
        put(f"{one.dataset}: {many(one.rows, 'row')} would be compared and copied; {one.there:,} are there")
        return
    went_on = "went on where it was broken off, " if one.resumed else ""
    agree = f"; fingerprints agree ({many(one.rows, 'row')})" if one.agree else ""
    put(
        f"{one.dataset}: {went_on}{many(one.read, 'row')} read: {one.inserted:,} inserted, {one.updated:,} updated, "
        f"{one.unchanged:,} unchanged{agree}"
    )
    if one.covered:
        of = f"of {many(one.covered, 'symbol')} " if one.covered > 1 else ""
        put(f"  the ledger now knows {of}there what it knew here")
    for line in (*one.problems, *one.remarks):
        put(f"  {line}")
