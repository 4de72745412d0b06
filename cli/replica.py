"""`marketsync replica`: the local stand-in for providers, for trying things out without an account."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.output import say


def register(app: typer.Typer) -> None:
    """Add this module's command."""
    app.command("replica")(replica)


def replica(
    port: Annotated[
        int, typer.Option("--port", min=0, max=65_535, help="The loopback port; 0 takes a free one.")
    ] = 8740,
    faults: Annotated[Path | None, typer.Option("--faults", help="A YAML file of faults, limits, delay.")] = None,
    data: Annotated[
        str | None, typer.Option("--data", help="bokeh (the default), or generated:ROWS.", show_default=False)
    ] = None,
    log: Annotated[Path | None, typer.Option("--log", help="Append one JSON object a request to this file.")] = None,
) -> None:
    """Serve real bars over the protocols of Alpaca, Tushare and Nasdaq Data Link on this machine, until Ctrl-C."""
    from providers.replica.server import Replica

    server = Replica(port=port, data=data, faults=faults, log=log)
    url = server.start()
    try:
        say(f"replica of alpaca, tushare and nasdaq_data_link: {url} (Ctrl-C ends it)")
        server.serve_forever()
    except KeyboardInterrupt:
        say("replica: ended")
    finally:
        server.stop()
