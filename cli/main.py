"""The `marketsync` command: registers what the modules beside it define, and turns errors into exit codes."""

from __future__ import annotations

import signal
import sys

from marketsync.errors import ConfigurationError, ExitCode, MarketSyncError


def build():
    """Return the Typer application."""
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
    for name in ("quickstart", "init", "check", "sync", "plan", "look", "control", "catalog", "replica"):
        importlib.import_module(f"cli.{name}").register(app)
    return app


def main() -> None:
    """Run the command line and end with an exit code that scripts can rely on."""
    import logging

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, _stop)
    try:
        build()()
    except ConfigurationError as error:
        for problem in error.problems:
            sys.stderr.write(f"{problem}\n")
        sys.exit(int(ExitCode.CONFIGURATION))
    except MarketSyncError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(int(error.exit_code))
    except KeyboardInterrupt:
        sys.exit(int(ExitCode.PAUSED))
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(int(ExitCode.DONE))


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
