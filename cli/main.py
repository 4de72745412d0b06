"""The `marketsync` command: registers what the modules beside it define, and turns errors into exit codes."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from marketsync.errors import ConfigurationError, ExitCode, MarketSyncError

if TYPE_CHECKING:
    import typer


MODULES = {
    "quickstart": ("quickstart",),
    "init": ("init",),
    "check": ("check",),
    "sync": ("sync", "estimate"),
    "plan": ("plan",),
    "look": ("status", "report", "explain", "query"),
    "control": ("pause", "resume", "cancel", "schedule"),
    "catalog": ("providers", "datasets"),
    "replica": ("replica",),
}


def build(arguments: Sequence[str] = ()) -> typer.Typer:
    """Return the Typer application: the module of the command that is asked for, or all of them."""
    import importlib

    import typer

    app = typer.Typer(
        name="marketsync",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        help="Keeps market data right, where its owner needs it: fetched inside every limit, complete against the "
        "calendar, in any store.",
    )
    app.callback()(lambda: None)
    # What is imported at every start is paid for by every nightly run, so only what is needed is.
    asked = [module for module, commands in MODULES.items() if arguments and arguments[0] in commands]
    for module in asked or MODULES:
        importlib.import_module(f"cli.{module}").register(app)
    return app


def main() -> None:
    """Run the command line and end with an exit code that scripts can rely on."""
    import logging

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, _stop)
    try:
        build(sys.argv[1:])()
    except ConfigurationError as error:
        for problem in error.problems:
            sys.stderr.write(f"{problem}\n")
        _failed_as_json([str(problem) for problem in error.problems])
        sys.exit(int(ExitCode.CONFIGURATION))
    except MarketSyncError as error:
        sys.stderr.write(f"{error}\n")
        _failed_as_json([str(error)])
        sys.exit(int(error.exit_code))
    except KeyboardInterrupt:
        sys.exit(int(ExitCode.PAUSED))
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(int(ExitCode.DONE))
    except Exception as error:
        database = sys.modules.get("sqlalchemy.exc")
        if database is None or not isinstance(error, database.SQLAlchemyError):
            raise
        cause = getattr(error, "orig", None) or error
        sys.stderr.write(f"the ledger failed: {cause}; see `ledger` and `state` in upstream.yml, then run again\n")
        sys.exit(int(ExitCode.FAILED))


def _failed_as_json(messages: list[str]) -> None:
    """Keep the promise of --json when there is nothing else to print: one object on stdout."""
    if "--json" in sys.argv[1:]:
        import json

        sys.stdout.write(json.dumps({"state": "failed", "errors": [{"message": one} for one in messages]}) + "\n")


_asked = 0


def _stop(number: int, frame: object) -> None:
    """End a run well at its next page: what was fetched is sealed and delivered. A second signal ends it at once."""
    global _asked
    _asked += 1
    watch = sys.modules.get("tasks.watch")
    if _asked == 1 and watch is not None and watch.interrupt_all():
        sys.stderr.write("stopping at the next page (again to stop at once)\n")
        return
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
