"""Behaviour of check, init, plan add and list, providers and datasets, as a person types them."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import command_here
import pytest

from marketsync.configuration import check_file, load_configuration, shipped_definitions


def marketsync(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return command_here.run(cwd, *map(str, arguments))


@pytest.mark.parametrize("provider", ["alpaca", "tushare", "nasdaq_data_link"])
def test_init_writes_a_file_that_passes_check(tmp_path, provider):
    done = marketsync("init", "project", "--provider", provider, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert check_file(tmp_path / "project" / "upstream.yml") == []
    assert load_configuration(tmp_path / "project" / "upstream.yml").plan("daily").datasets[0].startswith(provider)
    assert ".secrets/" in (tmp_path / "project" / ".gitignore").read_text()


def test_init_leaves_a_file_that_is_there_alone_and_adds_to_a_gitignore(tmp_path):
    (tmp_path / ".gitignore").write_text("*.pyc\n.secrets/")
    assert marketsync("init", cwd=tmp_path).returncode == 0
    assert (tmp_path / ".gitignore").read_text() == "*.pyc\n.secrets/\n.marketsync/\ndata/\n"
    (tmp_path / "upstream.yml").write_text("mine: true\n")
    again = marketsync("init", cwd=tmp_path)
    assert again.returncode == 2
    assert "is there already" in again.stderr
    assert (tmp_path / "upstream.yml").read_text() == "mine: true\n"


def test_init_names_the_provider_that_was_probably_meant(tmp_path):
    done = marketsync("init", "--provider", "alpacca", cwd=tmp_path)
    assert done.returncode == 2
    assert "did you mean alpaca?" in done.stderr
    assert not (tmp_path / "upstream.yml").exists()


def test_check_ends_with_2_and_tells_each_problem_on_a_line_of_its_own(tmp_path):
    (tmp_path / "good.yml").write_text("upstreams: {alpaca: {tier: basic}}\n")
    (tmp_path / "bad.yml").write_text("upstreams: {alpaca: {teir: basic}}\nplan: {}\n")
    good = marketsync("check", "good.yml", cwd=tmp_path)
    assert (good.returncode, good.stdout.splitlines()[-1]) == (
        0,
        "good.yml: valid (1 upstream, 0 universes, 1 store, 0 plans)",
    )
    bad = marketsync("check", "good.yml", "bad.yml", cwd=tmp_path)
    assert bad.returncode == 2
    told = [line for line in bad.stdout.splitlines() if line.startswith("bad.yml") and "[warning]" not in line]
    assert [line.split(" ")[0] for line in told] == [
        "bad.yml:1:",
        "bad.yml:2:",
    ]
    assert "Traceback" not in bad.stdout + bad.stderr


def test_check_tells_a_url_that_no_store_can_be_opened_by_and_connects_to_none(tmp_path):
    (tmp_path / "upstream.yml").write_text(
        "stores:\n"
        "  a: delta://./data?x=1\n"
        "  b: mysql://host/market?ssl_caa=1\n"
        "  c: postgresql://user:$secret.NOT_YET@host/market?sslmod=1\n"
        "  d: nats://host:4222/MARKET\n"
        "  e: chdb://./engine\n"
    )
    done = marketsync("check", cwd=tmp_path)
    assert done.returncode == 2
    told = [line for line in done.stdout.splitlines() if not line.endswith("[warning]")]
    assert [line.split(": ")[:2] for line in told] == [
        ["upstream.yml:2", "stores.a"],
        ["upstream.yml:3", "stores.b"],
    ]
    assert "ssl_caa is no option" in told[1]
    assert [path.name for path in tmp_path.iterdir()] == ["upstream.yml"]


def test_check_tells_a_problem_of_a_definition_once_when_two_files_have_it(tmp_path):
    source = shipped_definitions()["alpaca"].read_text(encoding="utf-8").replace("calendar: XNYS", "calendar: XNYC")
    (tmp_path / "mine.yml").write_text(source)
    (tmp_path / "upstream.yml").write_text("upstreams: {alpaca: {definition: ./mine.yml, tier: basic}}\n")
    done = marketsync("check", str(tmp_path / "mine.yml"), "upstream.yml", cwd=tmp_path)
    lines = done.stdout.splitlines()
    assert done.returncode == 2
    assert len([line for line in lines if "there is no calendar 'XNYC'" in line]) == source.count("XNYC")
    assert "upstream.yml: not valid, because of what is told above" in lines


def test_check_can_require_that_secrets_have_values(tmp_path):
    (tmp_path / "upstream.yml").write_text("upstreams: {tushare: {tier: points_120}}\n")
    assert marketsync("check", cwd=tmp_path).returncode == 0
    required = marketsync("check", "--secrets", cwd=tmp_path)
    assert required.returncode == 2
    assert "the secret TUSHARE_TOKEN has no value" in required.stdout
    (tmp_path / ".secrets").mkdir()
    (tmp_path / ".secrets" / "TUSHARE_TOKEN").write_text("t")
    assert marketsync("check", "--secrets", cwd=tmp_path).returncode == 0


def test_check_prints_json_alone(tmp_path):
    (tmp_path / "bad.yml").write_text("upstreams: {alpaca: {teir: basic}}\n")
    done = marketsync("check", "bad.yml", "--json", cwd=tmp_path)
    (found,) = json.loads(done.stdout)["files"]
    assert (found["kind"], found["problems"][0]["line"], found["problems"][0]["field"]) == (
        "upstream",
        1,
        "upstreams.alpaca.teir",
    )


def test_a_plan_is_added_with_the_upstream_it_needs_and_then_listed(tmp_path):
    assert marketsync("init", cwd=tmp_path).returncode == 0
    added = marketsync("plan", "add", "shares", "--dataset", "tushare.daily", "--since", "2024-01-01", cwd=tmp_path)
    assert added.returncode == 0, added.stderr
    assert "added the upstream tushare" in added.stderr
    listed = marketsync("plan", "list", cwd=tmp_path)
    assert listed.stdout.splitlines()[-1] == "shares: tushare.daily since 2024-01-01 into default"
    loaded = load_configuration(tmp_path / "upstream.yml")
    assert list(loaded.configuration.plans) == ["daily", "shares"]


def test_a_plan_that_would_not_run_is_refused_with_2_and_the_file_stays(tmp_path):
    assert marketsync("init", cwd=tmp_path).returncode == 0
    before = (tmp_path / "upstream.yml").read_text()
    wrong = marketsync("plan", "add", "x", "--dataset", "alpaca.daily_bar", "--since", "2024-01-01", cwd=tmp_path)
    taken = marketsync("plan", "add", "daily", "--dataset", "alpaca.daily_bars", cwd=tmp_path)
    assert (wrong.returncode, taken.returncode) == (2, 2)
    assert "did you mean daily_bars?" in wrong.stderr
    assert "--replace" in taken.stderr
    assert (tmp_path / "upstream.yml").read_text() == before


def test_providers_and_datasets_can_be_listed_before_there_is_any_configuration(tmp_path):
    listed = marketsync("providers", cwd=tmp_path)
    assert listed.returncode == 0
    assert "alpaca: Alpaca Market Data; 7 datasets" in listed.stdout
    assert "ALPACA_KEY_ID" in listed.stdout
    columns = marketsync("datasets", "tushare", "--columns", cwd=tmp_path)
    assert "tushare.daily: One bar a session and share" in columns.stdout
    assert "Volume in lots of 100 shares." in columns.stdout
    unknown = marketsync("datasets", "tushar", cwd=tmp_path)
    assert unknown.returncode == 2
    assert "did you mean tushare?" in unknown.stderr


def test_one_dataset_can_be_shown_by_its_name(tmp_path):
    shown = marketsync("datasets", "alpaca.daily_bars", "--columns", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith("alpaca.daily_bars: ")
    assert "minute_bars" not in shown.stdout
    (tmp_path / "upstream.yml").write_text("upstreams: {mine: {definition: alpaca, tier: basic}}\n")
    found = json.loads(marketsync("datasets", "mine.daily_bars", "--json", cwd=tmp_path).stdout)
    assert [one["name"] for one in found["datasets"]] == ["mine.daily_bars"]
    wrong = marketsync("datasets", "alpaca.daily_bar", cwd=tmp_path)
    assert wrong.returncode == 2
    assert "alpaca has no dataset 'daily_bar'; did you mean daily_bars?" in wrong.stderr
