"""Options that many commands share, and what they read in them."""

from __future__ import annotations

from datetime import date, datetime
from pathlib import Path
from typing import Annotated

import typer

from marketsync.errors import ConfigurationError

Config = Annotated[Path, typer.Option("-c", "--config", help="The configuration file.", show_default=True)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")]


def when(text: str | None, option: str) -> date | datetime | None:
    """Return the day or instant that an option gives; ConfigurationError for neither."""
    from marketsync.durations import parse_when

    try:
        return None if text is None else parse_when(text)
    except ValueError as error:
        raise ConfigurationError(f"{option}: {error}") from None


def listed(values: list[str] | None) -> list[str]:
    """Return what an option lists that may be repeated and may have commas between: `A,B`."""
    return [one.strip() for value in values or () for one in value.split(",") if one.strip()]
