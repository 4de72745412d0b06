"""What MongoDB refuses to do with a time-series collection, and the stand-in for it does: a process that sends one of
these commands is told of in the file that the environment names. (A pymongo listener cannot refuse a command itself.)

Every collection of a database whose name begins with `DATABASES` counts as one, but for ours (`_...`) and those that
are called ordinary. The rules are those of MongoDB 7.0: "Time Series Collection Limitations" in its manual.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pymongo import monitoring

FILE = "MARKETSYNC_TEST_TIMESERIES"
DATABASES = "series"
_WRITES = ("insert", "update", "delete", "findAndModify")
_installed: list[monitoring.CommandListener] = []


def breach(name: str, command: Mapping[str, Any]) -> str | None:
    """Return why MongoDB would refuse the command on a time-series collection; None where it would not."""
    if name in _WRITES and "autocommit" in command:
        return "it is in a transaction"
    if name == "findAndModify":
        return "it finds and modifies"
    if name == "update":
        for each in command["updates"]:
            if each.get("upsert") or not each.get("multi"):
                return "it is an upsert, or an update of one document"
        return "it may change what was measured"  # an update of the metaField would do, and nobody needs one
    if name == "delete" and any(each["limit"] for each in command["deletes"]):
        return "it deletes one document of several"
    if name == "createIndexes" and any(each.get("unique") or each.get("sparse") for each in command["indexes"]):
        return "it makes a unique or sparse index"
    if name == "collMod" and "validator" in command:
        return "it sets a validator"
    if name in ("reIndex", "distinct"):
        return f"it is {name}"
    if name == "create" and "timeseries" not in command:
        return "it makes an ordinary collection"
    if name == "create" and {"capped", "validator"} & command.keys():
        return "it makes a capped one, or one with a validator"
    if name == "aggregate" and any({"$merge", "$changeStream"} & stage.keys() for stage in command["pipeline"]):
        return "it merges into one, or follows one"
    return None


class _Rules(monitoring.CommandListener):
    def started(self, event: monitoring.CommandStartedEvent) -> None:
        target = event.command.get(event.command_name)
        if event.command_name == "renameCollection":
            told = str(target).startswith(DATABASES) and "it renames one"
        elif not event.database_name.startswith(DATABASES) or not isinstance(target, str):
            return
        elif target.startswith("_") or "ordinary" in target:
            return
        else:
            told = breach(event.command_name, event.command)
        if told:
            with Path(os.environ[FILE]).open("a") as file:
                file.write(f"{event.command_name} of {target}: {told}: {event.command}\n")

    def succeeded(self, event: monitoring.CommandSucceededEvent) -> None:
        pass

    def failed(self, event: monitoring.CommandFailedEvent) -> None:
        pass


def install() -> None:
    """Watch every client that this process makes from now on."""
    if not _installed:
        _installed.append(_Rules())
        monitoring.register(_installed[0])
