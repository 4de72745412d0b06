"""Behaviour of adding to an upstream.yml: only what is added changes, and only valid files are written."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marketsync.configuration import load_configuration
from marketsync.document import parse_document
from marketsync.editing import add_parts, add_plan, add_store, add_universe, add_upstream
from marketsync.errors import ConfigurationError

FILE = """\
# The desk's configuration.   Two spaces stay two spaces.
upstreams:
    alpaca: {tier: "basic"}   # ours


universes:
    tech:   [AAPL,  MSFT]  # not yet sorted
stores:
    default: 'delta://./data'

plans:
    # the first plan
    nightly:
        datasets:
            - alpaca.daily_bars
        universe: tech
        since: 2000-01-01
        # about nightly, still
    # the second plan
    minutes: {datasets: alpaca.minute_bars, universe: tech, since: 2024-01-01}
    # about minutes

# the end
"""
PLAN = {"datasets": ["alpaca.daily_bars"], "universe": "tech", "since": "2010-01-01"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "upstream.yml").write_text(FILE)
    return tmp_path / "upstream.yml"


def without(lines: list[str], added: list[str]) -> list[str]:
    at = lines.index(added[0])
    assert lines[at : at + len(added)] == added
    return lines[:at] + lines[at + len(added) :]


def test_a_plan_is_added_at_the_end_of_the_plans_and_nothing_else_changes(path):
    add_plan(path, "weekly", PLAN)
    added = ["    weekly:", "      datasets: [alpaca.daily_bars]", "      universe: tech", "      since: 2010-01-01"]
    lines = path.read_text().splitlines()
    assert without(lines, added) == FILE.splitlines()
    assert lines.index("    # about minutes") + 1 == lines.index("    weekly:") < lines.index("# the end")
    assert list(load_configuration(path).configuration.plans) == ["nightly", "minutes", "weekly"]


def test_a_universe_a_store_and_an_upstream_are_added_alike(path):
    add_universe(path, "big", ["IBM", "TRUE", "000001"])
    add_store(path, "copy", "parquet://./copy")
    add_upstream(path, "tushare", {"tier": "points_2000"})
    add_upstream(path, "nasdaq_data_link")
    loaded = load_configuration(path)
    assert loaded.universe("big") == ("IBM", "TRUE", "000001")
    assert loaded.configuration.stores["copy"].url == "parquet://./copy"
    assert list(loaded.definitions) == ["alpaca", "tushare", "nasdaq_data_link"]
    kept = iter(path.read_text().splitlines())
    assert all(line in kept for line in FILE.splitlines())  # in their order, with the new lines among them


def test_a_block_that_is_not_there_yet_is_begun(tmp_path):
    path = tmp_path / "upstream.yml"
    path.write_text("upstreams:\n  alpaca: {tier: basic}\nplans:  # none yet\n")
    add_universe(path, "tech", ["AAPL"])
    add_plan(path, "nightly", PLAN)
    text = path.read_text()
    assert "plans:  # none yet\n  nightly:\n" in text
    assert load_configuration(path).plan("nightly").universe == "tech"


def test_a_block_in_braces_is_added_to_as_well_and_comments_stay(tmp_path):
    path = tmp_path / "upstream.yml"
    path.write_text("# kept\nupstreams: {alpaca: {tier: basic}}  # kept too\nuniverses: {tech: [AAPL]}\nplans: {}\n")
    add_universe(path, "big", ["IBM"])
    add_plan(path, "nightly", PLAN)
    text = path.read_text()
    assert "# kept\n" in text
    assert "# kept too" in text
    assert load_configuration(path).universe("big") == ("IBM",)


def test_a_name_that_is_taken_is_refused_and_the_file_left_as_it_is(path):
    with pytest.raises(ConfigurationError, match=r"plans\.nightly: is there already"):
        add_plan(path, "nightly", PLAN)
    assert path.read_text() == FILE


def test_a_plan_is_replaced_when_asked_and_its_neighbours_stay(path):
    add_plan(path, "nightly", PLAN, replace=True)
    loaded = load_configuration(path)
    assert str(loaded.plan("nightly").since) == "2010-01-01"
    assert list(loaded.configuration.plans) == ["nightly", "minutes"]
    assert "    # the second plan\n    minutes: {datasets: alpaca.minute_bars" in path.read_text()


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        ({**PLAN, "universe": "teck"}, "did you mean tech?"),
        ({**PLAN, "datasets": ["alpaca.daily_bar"]}, "did you mean daily_bars?"),
        ({**PLAN, "since": "soon"}, "must be a date"),
        ({**PLAN, "every": "day"}, "there is no field 'every' here"),
        ({"datasets": ["alpaca.daily_bars"], "universe": "tech"}, "since: is missing"),
    ],
)
def test_what_would_not_be_valid_is_not_written(path, plan, said):
    with pytest.raises(ConfigurationError) as refused:
        add_plan(path, "weekly", plan)
    assert said in str(refused.value)
    assert str(refused.value).startswith(str(path))
    assert path.read_text() == FILE
    assert os.listdir(path.parent) == ["upstream.yml"]


def test_a_file_that_is_broken_already_is_not_written(path):
    path.write_text(FILE.replace("tier:", "teir:"))
    with pytest.raises(ConfigurationError, match="did you mean tier"):
        add_universe(path, "big", ["IBM"])


def test_several_parts_are_added_together_or_not_at_all(path):
    parts = [("universes", "big", ["IBM"]), ("plans", "weekly", {**PLAN, "universe": "bigg"})]
    with pytest.raises(ConfigurationError):
        add_parts(path, parts)
    assert path.read_text() == FILE
    add_parts(path, [parts[0], ("plans", "weekly", {**PLAN, "universe": "big"})])
    assert load_configuration(path).plan("weekly").universe == "big"


def test_permissions_links_line_endings_and_byte_order_marks_are_kept(path, tmp_path):
    path.write_bytes(b"\xef\xbb\xbf" + FILE.replace("\n", "\r\n").encode())
    path.chmod(0o640)
    link = tmp_path / "link.yml"
    link.symlink_to(path)
    add_plan(link, "weekly", PLAN)
    data = path.read_bytes()
    assert link.is_symlink()
    assert data.startswith(b"\xef\xbb\xbf")
    assert data.count(b"\n") == data.count(b"\r\n") == FILE.count("\n") + 4
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_a_file_that_changes_meanwhile_is_not_overwritten(path, monkeypatch):
    import marketsync.editing as editing

    def changing(*arguments):
        path.write_text(FILE + "# somebody else\n")
        return []

    monkeypatch.setattr(editing, "problems_of", changing)
    with pytest.raises(ConfigurationError, match="was changed by somebody else"):
        add_plan(path, "weekly", PLAN)
    assert path.read_text().endswith("# somebody else\n")


def test_a_long_list_is_wrapped(path):
    symbols = [f"SYM{number}" for number in range(300)]
    add_universe(path, "big", symbols)
    assert max(map(len, path.read_text().splitlines())) <= 120
    assert load_configuration(path).universe("big") == tuple(symbols)


symbols = st.lists(
    st.text(min_size=1, max_size=12).filter(lambda s: s.isprintable() and s.strip()), min_size=1, max_size=6
)


@settings(max_examples=80)
@given(symbols=symbols, name=st.from_regex(r"[A-Za-z][A-Za-z0-9_-]{0,9}", fullmatch=True))
def test_whatever_a_symbol_looks_like_it_is_read_back_as_it_was_written(tmp_path_factory, symbols, name):
    path = tmp_path_factory.mktemp("edit") / "upstream.yml"
    path.write_text(FILE)
    add_universe(path, name, symbols, replace=True)
    assert parse_document(path.read_text(), "f").value["universes"][name] == symbols
    assert load_configuration(path).universe(name) == tuple(dict.fromkeys(symbols))
