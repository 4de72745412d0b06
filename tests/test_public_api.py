"""`from marketsync import ...`: what it gives, that it costs nothing until used, and what it says when a user's own
file hides one of our packages. The replica serves real bars over a real socket."""

from __future__ import annotations

import ast
import os
import pkgutil
import signal
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import polars as pl
import pytest

import marketsync
from marketsync import MarketSyncError, estimate, explain, open_store, query, read_report, status, sync
from marketsync.errors import ConfigurationError
from marketsync.report import RunState
from marketsync.shadowing import Shadowed, refuse_shadows
from providers.replica import Replica

CONFIGURATION = """\
upstreams:
  alpaca: {{base_url: "{url}"}}
stores:
  default: delta://./data
plans:
  bars:
    datasets: [alpaca.daily_bars]
    universe: [AAPL, IBM]
    since: 2012-01-01
    until: 2012-12-31
"""


def python(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run code as a user does who has started Python in the folder."""
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture
def market(tmp_path, monkeypatch):
    with Replica(limits="unlimited") as replica:
        for name, value in replica.credentials.items():
            monkeypatch.setenv(name, value)
        config = tmp_path / "upstream.yml"
        config.write_text(CONFIGURATION.format(url=replica.url))
        yield replica, config


def test_importing_the_package_loads_nothing_else(tmp_path):
    code = "import sys; before = set(sys.modules); import marketsync; print(sorted(set(sys.modules) - before))"
    assert python(code, tmp_path).stdout.strip() == "['marketsync']"


def test_asking_for_the_reader_loads_no_part_of_a_run(tmp_path):
    code = (
        "import sys; from marketsync import open_store; print({'tasks', 'providers', 'sqlalchemy'} & set(sys.modules))"
    )
    assert python(code, tmp_path).stdout.strip() == "set()"


def test_every_public_name_is_there_and_is_listed():
    for name in marketsync.__all__:
        assert callable(getattr(marketsync, name))
    assert set(marketsync.__all__) <= set(dir(marketsync))


def test_the_stub_for_type_checkers_names_the_same():
    tree = ast.parse(Path(marketsync.__file__).with_suffix(".pyi").read_text())
    named = [
        alias.asname or alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names
    ]
    named += [target.id for node in tree.body if isinstance(node, ast.Assign) for target in node.targets]
    assert sorted(name for name in named if not name.startswith("_")) == sorted(marketsync.__all__)


def test_no_public_name_is_that_of_a_module():
    # `from marketsync import report` would give the function or the module, by what was imported before.
    modules = {module.name for module in pkgutil.iter_modules(marketsync.__path__)}
    assert modules.isdisjoint(marketsync.__all__)


def test_a_name_that_is_not_public_is_refused_with_those_that_are():
    with pytest.raises(AttributeError, match="'open_stores'; it has open_store, follow, sync, estimate"):
        _ = marketsync.open_stores


@pytest.mark.parametrize(
    ("name", "asked"), [("storage", "open_store"), ("tasks", "sync"), ("providers", "estimate"), ("storage", "query")]
)
@pytest.mark.parametrize("form", ["file", "package", "folder"])
def test_a_users_own_module_that_hides_ours_is_named_with_the_remedy(name, asked, form, tmp_path):
    own = tmp_path / (f"{name}.py" if form == "file" else name)
    if form == "file":
        own.write_text("rows = []\n")
    else:
        own.mkdir()
        if form == "package":
            (own / "__init__.py").write_text("")
    said = python(f"from marketsync import {asked}", tmp_path)
    assert said.returncode == 1
    assert f"Shadowed: import {name} finds {own.resolve()}, which hides MarketSync's own package" in said.stderr
    assert f"rename {own.name}, or run from another folder" in said.stderr


def test_a_users_module_that_was_imported_before_is_named_too(tmp_path):
    (tmp_path / "tasks.py").write_text("")
    said = python("import tasks\nimport sys\nsys.path.remove('')\nfrom marketsync import status", tmp_path)
    assert f"import tasks finds {(tmp_path / 'tasks.py').resolve()}" in said.stderr


def test_a_users_module_that_is_not_in_the_way_is_left_alone(tmp_path):
    for name in ("tasks", "cli", "flows"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported')\n")
    assert python("from marketsync import open_store; print(open_store.__name__)", tmp_path).stdout == "open_reader\n"


def test_a_hidden_package_can_be_caught_as_an_import_error_and_as_ours(tmp_path, monkeypatch):
    (tmp_path / "flows.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flows", raising=False)
    with pytest.raises(Shadowed) as caught:
        refuse_shadows(["flows"])
    assert isinstance(caught.value, ImportError)
    assert isinstance(caught.value, MarketSyncError)
    assert (caught.value.name, caught.value.path) == ("flows", str((tmp_path / "flows.py").resolve()))


def test_a_plan_is_estimated_synced_and_read_from_python(market):
    replica, config = market
    assert (
        estimate("bars", config, requests=5).requests == len(estimate("bars", config, requests=5).first_requests) == 1
    )
    report = sync("bars", config)
    assert (report.state, report.rows.inserted) == (RunState.COMPLETED, 500)
    assert estimate("bars", config).requests == 0
    assert sync("bars", config).requests.sent == 0
    assert len(replica.log) == 1

    assert status("bars", config).datasets[0].rows == 500
    assert read_report(report.run, config).rows.inserted == 500
    assert read_report(config=config).rows.inserted == 0
    assert "2012-10-29 is no session" in explain("alpaca.daily_bars", "IBM", "2012-10-29", config).lines[0]
    assert "has 1 row of IBM" in explain("alpaca.daily_bars", "IBM", date(2012, 10, 31), config).lines[-1]
    assert query("SELECT count(*) AS n FROM alpaca.daily_bars WHERE symbol = 'IBM'", config).item() == 250

    with open_store(f"delta://{config.parent}/data") as store:
        rows = store.scan("alpaca.daily_bars", symbols="AAPL", since="2012-12-01")
        assert isinstance(rows, pl.LazyFrame)
        assert rows.collect().height == 20


def test_a_sync_can_be_narrowed_to_days_and_symbols(market):
    _, config = market
    report = sync("bars", config, since="2012-06-01", until=date(2012, 6, 30), only="AAPL")
    assert report.rows.inserted == 21
    assert query("SELECT DISTINCT symbol FROM alpaca.daily_bars", config).to_series().to_list() == ["AAPL"]


def test_a_configuration_that_was_edited_in_between_counts(market):
    _, config = market
    sync("bars", config)
    config.write_text(config.read_text().replace("[AAPL, IBM]", "[AAPL, IBM, MSFT]"))
    assert estimate("bars", config).requests == 1
    assert sync("bars", config).rows.inserted == 250


def test_a_wrong_name_or_day_is_refused_in_words(market):
    _, config = market
    with pytest.raises(ConfigurationError, match="there is no plan 'bar'; did you mean bars"):
        sync("bar", config)
    with pytest.raises(ConfigurationError, match="since: '1 May' is no date; write 2024-01-31"):
        estimate("bars", config, since="1 May")
    with pytest.raises(ConfigurationError, match="day: '2012-10' is no date"):
        explain("alpaca.daily_bars", "IBM", "2012-10", config)
    with pytest.raises(ConfigurationError, match="there is no report of any run"):
        read_report(config=config)


@pytest.mark.slow
def test_an_interrupt_ends_a_sync_from_python_at_its_next_page(market):
    replica, config = market
    config.write_text(config.read_text().replace("since: 2012-01-01", "since: 2000-03-01\n    tuning: {threads: 1}"))
    replica.delay = (1.0, 1.0)
    code = "from marketsync import sync; print(sync('bars').state)"
    child = subprocess.Popen(
        [sys.executable, "-c", code], cwd=config.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while not replica.log and child.poll() is None:
        time.sleep(0.05)
    os.kill(child.pid, signal.SIGINT)
    said, wrong = child.communicate(timeout=60)
    assert (said, child.returncode) == ("paused\n", 0), wrong
    asked = len(replica.log)
    replica.delay = (0.0, 0.0)
    assert asked < 3
    assert sync("bars", config).state is RunState.COMPLETED
    assert query("SELECT count(*) AS n FROM alpaca.daily_bars", config).item() == 2 * 3229
