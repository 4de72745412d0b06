"""`marketsync quickstart`: the main job, end to end, on this machine alone, in under a minute."""

from __future__ import annotations

import re
import socket
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.output import make_folder, program, say
from marketsync.errors import ConfigurationError

if TYPE_CHECKING:
    from marketsync.report import RunReport
    from providers.replica import Replica

PORT = 8740
_LOCAL = re.compile(r"http://127\.0\.0\.1:(\d+)")
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
    make_folder(directory)
    config = directory / "upstream.yml"
    changed = _is_changed(config)
    named = _port_named_by(config) if changed else PORT
    with _replica(named, changed) as replica:
        _write(directory, config, replica)
        if replica is not None:
            say(
                f"1. A replica of Alpaca's market data API serves real bars on {replica.url} (no account, no internet)."
            )
        else:
            say(f"1. No replica is started: {config} names another service, or one that runs already.")
        if changed:
            say(
                f"2. {config} was edited, and stays as it is (delete it, or choose another --directory, to begin anew)."
            )
        else:
            say(f"2. {config} says what is wanted: five symbols, 2000-03-01 to 2013-03-01, into {directory / 'data'}.")
        say("3. marketsync sync quickstart")
        report = _sync(config)
        sent = report.requests.sent
        port = replica.port if replica is not None else None
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
    serve = f"{me} replica --port {port} &  then: " if port is not None else ""
    say(f"  {serve}{me} sync -c {config} --refetch")
    say(f"  {me} init myproject   # your own configuration, for a real provider")
    code = int(report.state.exit_code)
    if code:
        raise typer.Exit(code)


def _write(directory: Path, config: Path, replica: Replica | None) -> None:
    """Write what is missing, and upstream.yml anew where it is as we wrote it (the port may be another)."""
    if not _is_changed(config) and replica is not None:
        config.write_text(CONFIGURATION.format(url=replica.url), encoding="utf-8")
    if not (directory / "holes.yml").exists():
        (directory / "holes.yml").write_text(_known_holes(), encoding="utf-8")
    secrets = directory / ".secrets"
    secrets.mkdir(mode=0o700, exist_ok=True)
    for name, value in (replica.credentials if replica is not None else {}).items():
        file = secrets / name
        if not file.exists():
            file.write_text(value, encoding="utf-8")
            file.chmod(0o600)
    if not (directory / ".gitignore").exists():
        (directory / ".gitignore").write_text(".marketsync/\n.secrets/\ndata/\n", encoding="utf-8")


def _is_changed(config: Path) -> bool:
    """Return whether there is a quickstart's upstream.yml that is not as we wrote it, whatever its port; raise
    ConfigurationError when there is one of something else."""
    if not config.exists():
        return False
    text = config.read_text(encoding="utf-8")
    if "What `marketsync quickstart` synced" not in text:
        raise ConfigurationError(f"{config} is there already and is not the quickstart's; choose another --directory")
    before, after = CONFIGURATION.split("{url}")
    ours = text.startswith(before) and text.endswith(after)
    return not (ours and _LOCAL.fullmatch(text[len(before) : len(text) - len(after)]))


def _port_named_by(config: Path) -> int | None:
    """Return the port of this machine that the upstream.yml asks; None when it asks another service."""
    from marketsync.configuration import load_configuration

    upstream = load_configuration(config).configuration.upstreams.get("alpaca")
    found = _LOCAL.fullmatch(((upstream and upstream.base_url) or "").rstrip("/"))
    return int(found[1]) if found else None


def _replica(port: int | None, exactly: bool) -> AbstractContextManager[Replica | None]:
    """Return a replica at this port, or at any free one where it need not be `exactly` this; None when there is no
    port, or something answers there already."""
    from providers.replica.server import Replica

    if port is not None and _is_free(port):
        return Replica(port=port, data="bokeh")
    return nullcontext() if exactly else Replica(data="bokeh")


def _known_holes() -> str:
    from importlib.resources import files

    return files("providers.replica").joinpath("known_holes.yml").read_text(encoding="utf-8")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _sync(config: Path) -> RunReport:
    from cli.progress import Progress
    from tasks.sync import sync

    with Progress(str(config.resolve()), quiet=False) as progress:
        return sync(config, ["quickstart"], begun=progress.begun)[0]
