"""What the tests of the flows share: a Prefect server for the session, and markets that are stopped in the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from replica_market import CONFIGURATION, Market, monthly_definition

from providers.replica.server import Replica


@pytest.fixture
def market(tmp_path: Path) -> Iterator[Callable[..., Market]]:
    """Start a replica and write a configuration that asks it; `upstream` is YAML for the upstream, `monthly`
    asks in some hundred small requests, and the rest are options of the replica."""
    running: list[Replica] = []

    def started(*, upstream: str = "", monthly: bool = False, **options: Any) -> Market:
        replica = Replica(data="bokeh", **{"limits": "unlimited", **options})
        running.append(replica)
        replica.start()
        folder = tmp_path / f"market-{len(running)}"
        secrets = folder / ".secrets"
        secrets.mkdir(parents=True)
        for name, value in replica.credentials.items():
            (secrets / name).write_text(value, encoding="utf-8")
        lines = upstream.splitlines()
        if monthly:
            (folder / "monthly.yml").write_text(monthly_definition(), encoding="utf-8")
            lines.append("definition: ./monthly.yml")
        config = folder / "upstream.yml"
        indented = "\n".join(f"    {line}" for line in lines)
        config.write_text(CONFIGURATION.format(url=replica.url, upstream=indented), encoding="utf-8")
        return Market(config, replica)

    yield started
    from tasks.workspace import close_workspaces

    close_workspaces()
    for replica in running:
        replica.stop()


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[str]:
    """A Prefect server of this session with an empty database; its API's URL."""
    from prefect.settings import PREFECT_API_URL
    from prefect.testing.utilities import prefect_test_harness

    import flows  # noqa: F401 - before prefect, whose settings it gives

    with prefect_test_harness(server_startup_timeout=180):
        yield PREFECT_API_URL.value()
