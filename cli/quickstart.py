"""`marketsync quickstart`: the main job, end to end, on this machine alone, in under a minute."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.output import make_folder, program, say
from marketsync.errors import ConfigurationError

if TYPE_CHECKING:
    from marketsync.report import RunReport

PORT = 8740
CONFIGURATION = """\
# What `marketsync quickstart` synced. Every field is explained in docs/reference.
upstreams:
  alpaca:                              # the shipped definition of the same name
    base_url: {url}  # the replica on this machine; leave the line out for the real service

universes:
  five: [AAPL, FB, GOOG, IBM, MSFT]

stores:
  default: delta://./data              # a folder that polars, DuckDB, Spark ... read as it is

plans:
  quickstart:
    datasets: [alpaca.daily_bars]
    universe: five
    since: 2000-03-01
    until: 2013-03-01                  # fixed: run it again, and nothing is asked
    stores: [default]
    judge:
      known_holes: holes.yml           # what really is not in the data, explained
"""


def register(app: typer.Typer) -> None:
    """Add this module's command."""
    app.command("quickstart")(quickstart)


def quickstart(
    directory: Annotated[Path, typer.Option("--directory", help="Where to put it.")] = Path("quickstart"),
) -> None:
    """Sync real daily bars (five symbols, 2000-2013) from a replica on this machine into a Delta Lake folder."""
    from providers.replica.server import Replica

    make_folder(directory)
    config = directory / "upstream.yml"
    with Replica(port=_free_port(), data="bokeh") as replica:
        _write(directory, config, replica.url, replica.credentials)
        say(f"1. A replica of Alpaca's market data API serves real bars on {replica.url} (no account, no internet).")
        say(f"2. {config} says what is wanted: five symbols, 2000-03-01 to 2013-03-01, into {directory / 'data'}.")
        say("3. marketsync sync quickstart")
        report = _sync(config)
        sent = report.requests.sent
    from marketsync.rendering.html import html as page
    from marketsync.rendering.terminal import show
    from tasks.sync import full
    from tasks.workspace import open_workspace

    show(report)
    file = directory / "report.html"
    file.write_text(page(full(open_workspace(config), report)), encoding="utf-8")
    if not sent:
        say("Everything was here already: no request was sent.")
    say("")
    say("Type next:")
    me = program()
    sql = "SELECT symbol, count(*) AS bars, max(close) AS highest FROM alpaca.daily_bars GROUP BY symbol"
    say(f'  {me} query "{sql}" -c {config}')
    say(f"  {me} explain alpaca.daily_bars IBM 2001-09-12 -c {config}")
    say(f"  open {file}   # the report with the coverage of every month")
    say(f"  {me} replica --port {PORT} &  then: {me} sync -c {config} --refetch")
    say(f"  {me} init myproject   # your own configuration, for a real provider")
    code = int(report.state.exit_code)
    if code:
        raise typer.Exit(code)


def _write(directory: Path, config: Path, url: str, credentials: dict[str, str]) -> None:
    if config.exists() and "What `marketsync quickstart` synced" not in config.read_text(encoding="utf-8"):
        raise ConfigurationError(f"{config} is there already and is not the quickstart's; choose another --directory")
    config.write_text(CONFIGURATION.format(url=url), encoding="utf-8")
    (directory / "holes.yml").write_text(_known_holes(), encoding="utf-8")
    secrets = directory / ".secrets"
    secrets.mkdir(mode=0o700, exist_ok=True)
    for name, value in credentials.items():
        file = secrets / name
        file.write_text(value, encoding="utf-8")
        file.chmod(0o600)
    (directory / ".gitignore").write_text(".marketsync/\n.secrets/\ndata/\n", encoding="utf-8")


def _known_holes() -> str:
    from importlib.resources import files

    return files("providers.replica").joinpath("known_holes.yml").read_text(encoding="utf-8")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", PORT))
        except OSError:
            return 0
    return PORT


def _sync(config: Path) -> RunReport:
    from cli.progress import Progress
    from tasks.sync import sync

    with Progress(str(config.resolve()), quiet=False) as progress:
        return sync(config, ["quickstart"], begun=progress.begun)[0]
