"""What is said of stores is so: the table of the documentation is what the stores declare, and the servers of
compose.yaml are where their URLs say they are, with no password of anybody's in the file."""

from __future__ import annotations

import re
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from ruamel.yaml import YAML

from marketsync.upstream import STORE_SCHEMES
from providers.secrets import Secrets
from storage.registry import open_store

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "compose.yaml").read_text(encoding="utf-8")
COMPOSED = YAML(typ="safe").load(TEXT)
SERVICES = {name: one for name, one in COMPOSED["services"].items() if one.get("profiles") == ["stores"]}
PAGE = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| `(\w+)` \| `([^`]+)` \| `(MARKETSYNC_TEST_\w+)=([^`]+)` \|$", PAGE, re.MULTILINE)


def test_the_table_of_stores_is_what_they_declare():
    done = subprocess.run(
        [sys.executable, "scripts/stores_table.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_every_server_that_rows_are_stored_in_and_that_can_be_had_is_a_service_with_a_url():
    assert {row[0] for row in ROWS} == set(SERVICES)
    assert {urlsplit(row[1]).scheme for row in ROWS} <= set(STORE_SCHEMES)


@pytest.mark.parametrize(("service", "url", "variable", "tested"), ROWS, ids=[row[0] for row in ROWS])
def test_the_url_of_a_service_can_be_opened_and_leads_to_it(service: str, url: str, variable: str, tested: str):
    filled = Secrets(environment={"STORES_PASSWORD": "a/b@c:d"}).fill_url(url)
    with closing(open_store(filled, service)) as store:  # nothing is connected before it is asked
        assert "a/b@c:d" not in store.url
    environment = SERVICES[service].get("environment", {})
    users = {value for name, value in environment.items() if name.endswith(("_USER", "_USERNAME"))}
    users |= set(re.findall(r"--user (\w+)", " ".join(SERVICES[service].get("entrypoint", []))))
    users = users or {"root" if service == "mysql" else ""}
    for parts in (urlsplit(url), urlsplit(tested)):
        assert f"127.0.0.1:{parts.port}:{parts.port}" in SERVICES[service]["ports"]
        if environment:
            assert parts.username in users
    databases = {value for name, value in environment.items() if name.endswith(("_DB", "_DATABASE"))}
    if databases:
        assert urlsplit(url).path == "/" + databases.pop()
    if "replicaSet" in url:
        sets = parse_qs(urlsplit(url).query)["replicaSet"]
        assert f"--replSet {sets[0]} " in " ".join(SERVICES[service]["entrypoint"])
    assert f'"{variable}"' in (ROOT / "tests" / "conftest.py").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_a_service_is_pinned_looked_after_and_kept_to_this_machine(name: str):
    service = SERVICES[name]
    assert re.search(r":\d+\.\d+(-alpine)?$", service["image"]) or name == "marketstore"
    assert service["restart"] == "unless-stopped"
    assert service["healthcheck"]["test"][0] in ("CMD", "CMD-SHELL")
    assert service["healthcheck"]["retries"] * 5 >= 60
    for published in service["ports"]:
        assert published.startswith("127.0.0.1:")
    for mounted in service["volumes"]:
        assert mounted.partition(":")[0] in COMPOSED["volumes"]
    has_password = service.get("secrets") == [{"source": "STORES_PASSWORD", "mode": 0o444}]
    assert has_password or name == "marketstore", "there is no password, or one that nobody chose"
    for variable, value in service.get("environment", {}).items():
        assert ("PASSWORD" in variable) == (value == "/run/secrets/STORES_PASSWORD")


def test_prefect_alone_starts_no_store_and_needs_no_password():
    assert set(COMPOSED["services"]) - set(SERVICES) == {"prefect", "deploy", "worker"}
    assert "$" not in re.sub(r"\$\$|\$\{\w+:-[^}]*\}", "", yaml_without_comments(TEXT)), "wanted whatever is started"
    assert COMPOSED["secrets"] == {"STORES_PASSWORD": {"environment": "STORES_PASSWORD"}}


def yaml_without_comments(text: str) -> str:
    return "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
