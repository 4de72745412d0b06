"""What the tests of the engine share: places to sync in, whose replicas and processes are ended with the test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from synced_place import Place

from providers.replica import Replica
from tasks.workspace import close_workspaces


@pytest.fixture
def place(tmp_path: Path, calendars: Path) -> Iterator[Callable[..., Place]]:
    """Start a replica (with any of its options; no limits unless they are given) and return a place that asks it."""
    running: list[Replica] = []

    def made(**options: Any) -> Place:
        replica = Replica(**{"data": "bokeh", "limits": "unlimited", **options})
        running.append(replica)
        replica.start()
        folder = tmp_path / f"place-{len(running)}"
        (folder / ".marketsync").mkdir(parents=True)
        (folder / ".marketsync" / "calendars").symlink_to(calendars)
        return Place(folder, replica)

    yield made
    close_workspaces()
    for replica in running:
        replica.stop()
