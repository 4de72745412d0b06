"""`marketsync init`: a first upstream.yml, commented, that passes `marketsync check`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.output import make_folder, put
from marketsync.errors import ConfigurationError

TEMPLATE = """\
{schema}# What is kept, where, and how often. Check it with `marketsync check`; see what a plan would take with
# `marketsync estimate {plan}`; run it with `marketsync sync {plan}`.

# Accounts at providers. MarketSync describes {provider}; describe another one in a file of your own, named here by
# definition: ./my_provider.yml. Secrets are environment variables or files in .secrets/:
# {secrets}
upstreams:
  {provider}:
    tier: {tier}  # your account's; it decides how fast the provider may be asked
{universes}
# Where rows live. delta:// is a Delta Lake folder, read by polars, Spark, DuckDB and many more.
stores:
  default: delta://./data

plans:
  {plan}:
    datasets: [{dataset}]
{over}    since: {since}
    stores: [default]
{schedule}"""
SCHEDULE = """\
    schedule: {schedule}  # for deployments and `marketsync schedule`; a sync by hand needs none
    zone: {zone}
"""
UNIVERSE = """
# What is asked for, by name. A long list is kept in a file: {file: symbols.txt}, one symbol a line.
universes:
  mine: [AAPL, MSFT, IBM]
"""
IGNORED = (".marketsync/", ".secrets/", "data/")
CHOICES = {
    "alpaca": {
        "tier": "basic",
        "dataset": "alpaca.daily_bars",
        "since": "2020-01-01",
        "zone": "America/New_York",
        "schedule": "0 19 * * 1-5",
    },
    "tushare": {
        "tier": "points_2000",
        "dataset": "tushare.daily",
        "since": "2020-01-01",
        "zone": "Asia/Shanghai",
        "schedule": "30 17 * * 1-5",
    },
    "nasdaq_data_link": {
        "tier": "free",
        "dataset": "nasdaq_data_link.wiki_prices",
        "since": "2010-01-01\n    until: 2018-03-27  # the table ends here",
    },
}


def register(app: typer.Typer) -> None:
    """Add this module's command."""
    app.command("init")(init)


def init(
    directory: Annotated[Path, typer.Argument(help="Where to put it; made when it is not there.")] = Path("."),
    provider: Annotated[str, typer.Option(help=f"The provider to begin with: {', '.join(CHOICES)}.")] = "alpaca",
) -> None:
    """Write a first upstream.yml, with comments, and a .gitignore that keeps state and secrets out of it."""
    from marketsync.configuration import DEFAULT_FILE, load_definition, problems_of

    if provider not in CHOICES:
        from marketsync.document import closest

        near = closest(provider, list(CHOICES))
        hint = f"did you mean {near}? " if near else ""
        raise ConfigurationError(f"there is no provider '{provider}' to begin with; {hint}one of {', '.join(CHOICES)}")
    path = directory / DEFAULT_FILE
    if path.exists():
        raise ConfigurationError(f"{path} is there already; add to it with: marketsync plan add NAME -c {path} ...")
    text = _text(provider, load_definition(provider))
    make_folder(directory)
    problems = problems_of(path, text)
    if problems:
        raise ConfigurationError(problems)
    path.write_text(text, encoding="utf-8")
    _ignore(directory / ".gitignore")
    put(f"wrote {path}; next: marketsync check {path}")


def _text(provider: str, definition) -> str:
    from marketsync.configuration import secrets_in

    choice = CHOICES[provider]
    dataset = definition.datasets[choice["dataset"].partition(".")[2]]
    over_universe = any(spec.universe == "$plan" for spec in dataset.over.subjects.values())
    schema = Path(__file__).resolve().parent.parent / "docs" / "schema" / "upstream.json"
    schedule = SCHEDULE.format(**choice) if "schedule" in choice else ""
    return TEMPLATE.format(
        schema=f"# yaml-language-server: $schema={schema.as_uri()}\n" if schema.exists() else "",
        provider=provider,
        plan="daily",
        secrets=", ".join(secrets_in(definition)),
        universes=UNIVERSE if over_universe else "",
        over="    universe: mine\n" if over_universe else "",
        schedule=schedule,
        tier=choice["tier"],
        dataset=choice["dataset"],
        since=choice["since"],
    )


def _ignore(path: Path) -> None:
    present = path.read_text(encoding="utf-8") if path.exists() else ""
    missing = [line for line in IGNORED if line not in present.splitlines()]
    if missing:
        start = present if not present or present.endswith("\n") else present + "\n"
        path.write_text(start + "".join(f"{line}\n" for line in missing), encoding="utf-8")
