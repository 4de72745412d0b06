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
    "export": ("export",),
    "look": ("status", "report", "explain", "query"),
    "stores": ("stores", "copy"),
    "adopt": ("adopt",),
    "follow": ("follow",),
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
    # before anything else, since imports take most of a short command's time
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, _stop)
    hang_up = getattr(signal, "SIGHUP", None)
    if hang_up is not None and signal.getsignal(hang_up) is signal.SIG_DFL:  # nohup has it ignored
        signal.signal(hang_up, _stop)
    _open_closed_streams()
    if "cli.output" in sys.modules:  # main is called again in one process
        vars(sys.modules["cli.output"])["answered"] = False
    import gc
    import logging

    # Importing makes some 300,000 objects that all stay: looking for garbage among them is a tenth of a start.
    gc.set_threshold(200_000, 10, 10)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    for client in ("urllib3", "clickhouse_connect"):  # what they say of a server that is down, the store's error says
        logging.getLogger(client).setLevel(logging.ERROR)
    if sys.argv[1:] == ["--version"]:
        from importlib.metadata import version

        sys.stdout.write(f"marketsync {version('marketsync')}\n")
        sys.exit(int(ExitCode.DONE))
    try:
        build(sys.argv[1:])()
    except SystemExit as ended:
        if ended.code == _TYPER_INTERRUPTED:
            sys.exit(_interrupted())
        if ended.code == ExitCode.CONFIGURATION:  # Typer has said on stderr what is wrong with the arguments
            _failed_as_json(["the arguments are wrong: stderr says which; --help lists what the command takes"])
        raise
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
        sys.exit(_interrupted())
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(int(ExitCode.DONE))
    except BaseException as error:  # noqa: BLE001 - whatever it is (polars' panics are no Exception), in a line
        message = _of_the_machine(error) or _unforeseen(error)
        sys.stderr.write(f"{message}\n")
        _failed_as_json([message])
        sys.exit(int(ExitCode.FAILED))


def _of_the_machine(error: BaseException) -> str | None:
    """Return what to tell of an error that is the disk's, the system's or the ledger's; None for one of ours."""
    import errno

    database = sys.modules.get("sqlalchemy.exc")
    if database is not None and isinstance(error, database.SQLAlchemyError):
        cause = str(getattr(error, "orig", None) or error)
        if "disk is full" not in cause:
            return f"the ledger failed: {cause}; see `ledger` and `state` in upstream.yml, then run again"
        full, what = True, f"the ledger says: {cause}"
    elif isinstance(error, OSError):
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        what = ": ".join(str(part) for part in (error.filename, error.strerror or error) if part)
    elif (rows := sys.modules.get("polars.exceptions")) is not None and isinstance(error, rows.PolarsError):
        why = " ".join(str(error).split("Resolved plan until failure")[0].split())
        return f"rows could not be read: {why}; `marketsync status` says which table it is"
    else:
        return None
    if full:
        return f"the disk is full ({what}); nothing that was acknowledged is lost: free some space, then run again"
    return f"{what}; check that the path is right, who owns it, and its permissions"


def _unforeseen(error: BaseException) -> str:
    """Keep the details of an error that nobody foresaw, without secrets, and return what to tell of it."""
    import os
    import tempfile
    import time
    import traceback
    from pathlib import Path

    from providers.redaction import redact

    details = redact("".join(traceback.format_exception(error)))
    if os.environ.get("MARKETSYNC_DEBUG"):
        sys.stderr.write(details)
    workspaces = sys.modules.get("tasks.workspace")
    known = workspaces.state_folders() if workspaces is not None else []
    where = "could not be kept: MARKETSYNC_DEBUG=1 shows them"
    for folder in (*known, Path(tempfile.gettempdir())):
        path = folder / f"error-{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}.txt"
        try:
            path.write_text(details, encoding="utf-8")
        except OSError:
            continue
        where = f"are in {path}, and MARKETSYNC_DEBUG=1 shows them here"
        break
    said = " ".join(redact(str(error)).split())
    what = type(error).__name__ + (f": {said[:_SHOWN]}" if said else "")
    return f"marketsync failed where it should not ({what}); the details {where}: please report them"


def _open_closed_streams() -> None:
    """Give a process that was started without stdout or stderr (a daemon's child) a place to write to."""
    import os

    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - for as long as the process


def _answered() -> bool:
    """Whether the one object of --json is printed, or being printed."""
    output = sys.modules.get("cli.output")
    return output is not None and output.answered


def _failed_as_json(messages: list[str], state: str = "failed") -> None:
    """Keep the promise of --json when there is nothing else to print: one object on stdout."""
    if "--json" in sys.argv[1:] and not _answered():
        import json

        sys.stdout.write(json.dumps({"state": state, "errors": [{"message": one} for one in messages]}) + "\n")


_asked = 0
_SHOWN = 300  # characters of an error that nobody foresaw
_TYPER_INTERRUPTED = 130  # what Typer makes of a KeyboardInterrupt
_GRACE_SECONDS = 3.0  # from the second signal until the process ends, whatever it is doing


def _stop(number: int, frame: object) -> None:
    """End a run well at its next page: what was fetched is sealed and delivered. A second signal ends it at once."""
    global _asked
    _asked += 1
    if _answered() and _asked == 1:
        return  # all is done but the printing, and half an object is none
    watch = sys.modules.get("tasks.watch")
    if _asked == 1 and watch is not None and watch.interrupt_all():
        sys.stderr.write("stopping at the next page (again to stop at once)\n")
        return
    if _asked == 2:
        # Threads that wait for an answer would keep the process; what they hold is as safe as it is from a kill -9.
        import threading

        timer = threading.Timer(_GRACE_SECONDS, _leave)
        timer.daemon = True
        timer.start()
    elif _asked > 2:
        _leave()
    if not _answered():
        raise KeyboardInterrupt


def _interrupted() -> int:
    """Say that the command was stopped before its end, and return the exit code of that."""
    if _asked > 1:
        sys.stderr.write("stopped at once; what was sealed is kept, and the next run goes on from there\n")
    else:
        sys.stderr.write("stopped\n")
    _failed_as_json(["stopped by a signal"], "paused")
    return int(ExitCode.PAUSED)


def _leave() -> None:
    import os

    code = _interrupted()
    if not _answered():  # else the main thread may be in the middle of writing it
        sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
