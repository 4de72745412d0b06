"""`marketsync export`: one dataset of a store as one file for people."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.options import Config, Json, listed, when
from cli.output import many, put, put_json, size


def register(app: typer.Typer) -> None:
    """Add this module's command."""
    app.command("export")(export)


def export(
    dataset: Annotated[str, typer.Argument(help="upstream.dataset, such as alpaca.daily_bars.")],
    file: Annotated[Path, typer.Argument(help="The file to write: .csv, .xlsx or .parquet.")],
    config: Config = Path("upstream.yml"),
    store: Annotated[str | None, typer.Option("--store", help="The store. Default: the first one.")] = None,
    symbols: Annotated[
        list[str] | None, typer.Option("--symbols", help="Only these, with commas between (or repeat it).")
    ] = None,
    since: Annotated[str | None, typer.Option("--since", help="Only from this day or instant on.")] = None,
    until: Annotated[str | None, typer.Option("--until", help="Only up to this instant, or day, included.")] = None,
    columns: Annotated[
        list[str] | None, typer.Option("--columns", help="Only these, with commas between, in this order.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there.")] = False,
    as_json: Json = False,
) -> None:
    """Write a dataset's rows to one file for Excel, pandas or anything else. Times are in UTC."""
    from dataclasses import asdict

    from tasks.export import export as write
    from tasks.workspace import open_workspace

    written = write(
        open_workspace(config),
        dataset,
        file,
        store=store,
        symbols=listed(symbols),
        since=when(since, "--since"),
        until=when(until, "--until"),
        columns=listed(columns),
        force=force,
    )
    if as_json:
        put_json(asdict(written))
        return
    put(f"{many(written.rows, 'row')} of {dataset} from {written.store} written to {file} ({size(written.bytes)})")
