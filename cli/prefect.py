"""`marketsync sync --prefect`: the same run as a Prefect flow."""

from __future__ import annotations

from collections.abc import Sequence

from marketsync.errors import ConfigurationError
from marketsync.report import RunReport
from tasks.workspace import Options, open_workspace


def sync_with_prefect(config: str, plans: Sequence[str], options: Options) -> list[RunReport]:
    """Run plans (all when none is named) as flows; ConfigurationError when Prefect is not installed."""
    try:
        from flows.sync import run_from_command_line
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "prefect":
            raise
        raise ConfigurationError(
            "Prefect is not installed here; `make server` installs it, --local does without"
        ) from error
    names = list(plans) or list(open_workspace(config).loaded.configuration.plans)
    return [run_from_command_line(config, name, options) for name in names]
