"""`marketsync follow`: the batches of a log (NATS, Redis) as they come, as JSON lines or as tables to look at."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.options import Config
from cli.output import many, put, say

if TYPE_CHECKING:
    from storage.following import Followed


class Shape(StrEnum):
    """How a batch is printed."""

    JSON = "json"
    TABLE = "table"


def register(app: typer.Typer) -> None:
    """Add this module's command."""
    app.command("follow")(follow)


def follow(
    store: Annotated[str, typer.Argument(help="A store of the configuration that is a log, or its URL.")],
    dataset: Annotated[str, typer.Argument(help="upstream.dataset, such as alpaca.daily_bars.")],
    config: Config = Path("upstream.yml"),
    group: Annotated[
        str | None,
        typer.Option("--group", help="The server remembers by this name what was printed, and the next goes on there."),
    ] = None,
    start: Annotated[
        str, typer.Option("--start", help="all, new, or a day or time of publication; a group that is there goes on.")
    ] = "all",
    idle: Annotated[
        float | None,
        typer.Option("--idle", min=0, help="End when nothing came for so many seconds (0: none)."),
    ] = None,
    shape: Annotated[Shape, typer.Option("--format", help="JSON lines, or a table for each batch.")] = Shape.JSON,
) -> None:
    """Print the rows of a dataset as they are published: one JSON object a row, which begins with its batch and mode.

    A replacement or a deletion is an object of its own before its rows, with the span that they replace.
    """
    from storage.following import follow as open_log

    with open_log(_url(store, config), dataset, group=group, start=start, idle_seconds=idle) as batches:
        try:
            for batch in batches:
                for text in _lines(batch) if shape is Shape.JSON else [_table(batch)]:
                    put(text)
                sys.stdout.flush()  # before it is acknowledged: what a broken pipe lost comes again
                batch.ack()
        except KeyboardInterrupt:
            return
        finally:
            if batches.lost:
                places = many(batches.lost, "place")
                say(f"batches of {dataset} lost at {places}: the server dropped them before they were read")


def _url(store: str, config: Path) -> str:
    if "://" in store:
        return store
    from tasks.workspace import open_workspace

    return open_workspace(config).store_url(store)


def _lines(batch: Followed) -> Iterator[str]:
    """Yield the lines of JSON that say what the batch is, where it is more than rows, and its rows."""
    from cli.output import plain

    about = {"_batch": batch.id, "_mode": batch.mode}
    if batch.span is not None:
        span = {"subjects": batch.span.subjects, "since": batch.span.since, "until": batch.span.until}
        yield json.dumps({**about, "_rows": batch.frame.height, "_span": span}, default=plain, ensure_ascii=False)
    begin = json.dumps(about, ensure_ascii=False)[:-1]
    for line in batch.frame.write_ndjson().split("\n")[
        :-1
    ]:  # NaN and infinities are null, as JSON has no word for them
        yield f"{begin}, {line[1:]}"


def _table(batch: Followed) -> str:
    import polars as pl

    with pl.Config(tbl_rows=20, tbl_cols=20, tbl_hide_dataframe_shape=True, tbl_width_chars=200):
        span = "" if batch.span is None else f" of {batch.span}"
        return f"{batch.id}: {batch.mode}{span}, {many(batch.frame.height, 'row')}\n{batch.frame}"
