"""Behaviour of loading and checking: what is accepted, and what every refusal says (file, line, field, remedy)."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marketsync.configuration import (
    check_file,
    inspect_file,
    load_configuration,
    load_definition,
    load_maintenance,
)
from marketsync.document import parse_document
from marketsync.errors import ConfigurationError, ExitCode
from marketsync.upstream import STORE_SCHEMES

DEFINITION = """\
provider: acme
base_url: https://api.acme.example
datasets:
  bars:
    over: {symbol: {universe: $plan}, window: 1 year}
    request: {path: /bars, query: {s: $symbol, from: $window.start, to: $window.end}}
    page: {token: next, send: cursor}
    response: {rows: data}
    schema: {symbol: str, date: date, close: f64}
    key: [symbol, date]
"""
UPSTREAM = """\
upstreams:
  alpaca: {tier: basic}
universes:
  tech: [AAPL, MSFT]
stores:
  default: delta://./data
plans:
  nightly:
    datasets: alpaca.daily_bars
    universe: tech
    since: 2000-01-01
"""
MAINTENANCE = """\
stores:
  a: delta://./a
  b: delta://./b
links:
  ab: {stores: [a, b]}
"""


@pytest.fixture
def write(tmp_path: Path):
    def written(text: str | bytes, name: str = "file.yml") -> Path:
        path = tmp_path / name
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return written


def changed(text: str, old: str, new: str) -> str:
    assert old in text
    return text.replace(old, new, 1)


# ------------------------------------------------------------ what is accepted


def test_the_three_kinds_are_recognised_by_what_is_in_them(write):
    assert inspect_file(write(DEFINITION)).kind == "definition"
    assert inspect_file(write(UPSTREAM)).kind == "upstream"
    assert inspect_file(write(MAINTENANCE)).kind == "maintenance"
    assert check_file(write(DEFINITION)) == []
    assert check_file(write(UPSTREAM)) == []
    assert check_file(write(MAINTENANCE)) == []


def test_a_configuration_comes_with_the_definitions_of_its_upstreams(write):
    loaded = load_configuration(write(UPSTREAM))
    assert loaded.plan("nightly").since == date(2000, 1, 1)
    assert loaded.dataset("alpaca.daily_bars").key == ("symbol", "ts")
    assert loaded.universe("tech") == ("AAPL", "MSFT")


def test_an_upstream_overrides_its_definition(write, tmp_path):
    write(DEFINITION, "acme.yml")
    text = """
upstreams:
  mine:
    definition: ./acme.yml
    base_url: http://127.0.0.1:9
    limits: [{requests: 3, per: second}]
    tuning: {attempts: 2}
  same: {definition: ./acme.yml}
"""
    loaded = load_configuration(write(text, "upstream.yml"))
    mine, same = loaded.definitions["mine"], loaded.definitions["same"]
    assert (mine.base_url, mine.attempts) == ("http://127.0.0.1:9", 2)
    assert [limit.requests for limit in mine.limits] == [3]
    assert (same.base_url, same.attempts, same.limits) == ("https://api.acme.example", 5, ())


def test_only_the_limits_of_the_tier_hold_and_without_a_tier_the_first_one(write):
    basic = load_configuration(write("upstreams: {alpaca: {tier: basic}}")).definitions["alpaca"]
    plus = load_configuration(write("upstreams: {alpaca: {tier: algo_trader_plus}}")).definitions["alpaca"]
    unsaid = inspect_file(write("upstreams: {alpaca: }"))
    default = load_configuration(write("upstreams: {alpaca: }")).definitions["alpaca"]
    assert [limit.requests for limit in basic.limits] == [200]
    assert [limit.requests for limit in plus.limits] == [10_000]
    assert default.limits == basic.limits
    assert "limits of 'basic' hold" in str(unsaid.warnings[0])


def test_an_upstream_can_put_a_dataset_on_another_calendar(write):
    loaded = load_configuration(write("upstreams: {tushare: {calendars: {daily: XNYS}}}"))
    assert loaded.dataset("tushare.daily").calendar_name == "XNYS"
    assert loaded.dataset("tushare.daily").over.session == "XNYS"
    assert loaded.dataset("tushare.adj_factor").calendar_name == "XSHG"


def test_rows_of_the_same_provider_are_those_of_the_same_upstream(write):
    parent = """
  symbols:
    request: {path: /symbols}
    schema: {symbol: str}
    key: [symbol]
"""
    write(changed(DEFINITION, "{universe: $plan}", "{rows: acme.symbols}") + parent.lstrip("\n"), "acme.yml")
    loaded = load_configuration(write("upstreams: {paid: {definition: ./acme.yml}}", "upstream.yml"))
    assert loaded.dataset("paid.bars").over.subjects["symbol"].rows == "paid.symbols"


def test_symbols_stay_text_even_when_they_look_like_something_else(write):
    loaded = load_configuration(write("universes: {shares: [000001, 600000, NO, ON, 0700]}"))
    assert loaded.universe("shares") == ("000001", "600000", "NO", "ON", "0700")


def test_a_universe_can_be_a_text_file_or_a_column_of_a_csv(write):
    write("AAPL\n# a comment\nMSFT  # beside\n\nAAPL\n", "symbols.txt")
    write("name,symbol\nApple,AAPL\nMicrosoft,MSFT\n", "symbols.csv")
    text = "universes: {a: {file: symbols.txt}, b: {file: symbols.csv}, c: {file: symbols.csv, column: name}}"
    loaded = load_configuration(write(text, "upstream.yml"))
    assert loaded.universe("a") == loaded.universe("b") == ("AAPL", "MSFT")
    assert loaded.universe("c") == ("Apple", "Microsoft")


def test_a_relative_store_lies_beside_the_file_wherever_we_run(write, tmp_path, monkeypatch):
    path = write(UPSTREAM)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load_configuration(path).store_url("default") == f"delta://{tmp_path / 'data'}"


def test_anchors_and_merges_are_understood():
    text = "a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\n"
    document = parse_document(text, "f")
    assert document.value == {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}}
    assert document.line(("b", "x")) == 1


def test_a_missing_secret_is_a_warning_unless_secrets_are_required(write, monkeypatch):
    monkeypatch.delenv("ALPACA_KEY_ID", raising=False)
    monkeypatch.setenv("ALPACA_SECRET_KEY", "x")
    found = inspect_file(write(UPSTREAM))
    assert found.problems == ()
    assert ["ALPACA_KEY_ID" in str(warning) for warning in found.warnings] == [True]
    required = inspect_file(write(UPSTREAM), secrets_required=True)
    assert "set the environment variable ALPACA_KEY_ID" in str(required.problems[0])


# ------------------------------------------------------------ what is refused, and how

DEFINITIONS_REFUSED = [
    # old, new, line, field, what the message and the remedy say
    ("token: next", "tokn: next", 7, "datasets.bars.page.tokn", "did you mean token? fields: offset, page, token"),
    ("send: cursor", "offset: skip", 7, "datasets.bars.page.offset", "offset and token exclude one another"),
    (", send: cursor", "", 7, "datasets.bars.page", "style token needs send"),
    ("close: f64", "close: f46", 9, "datasets.bars.schema.close", "'f46' is not one of str, bool"),
    ("close: f64", "close: {type: int}", 9, "datasets.bars.schema.close.type", "f64, date, datetime"),
    ("[symbol, date]", "[symbol, day]", 10, "datasets.bars.key", "columns: symbol, date, close"),
    ("1 year", "1 yeer", 5, "datasets.bars.over.window", "write a positive number and a unit"),
    ("window: 1 year", "windw: 1 year", 5, "datasets.bars.over.windw", "did you mean window?"),
    ("$symbol,", "$symbl,", 6, "datasets.bars.request.query.s", "did you mean $symbol? names: $symbol, $window.start"),
    ("$window.end", "$window.ende", 6, "datasets.bars.request.query.to", "did you mean $window.end?"),
    ("to: $window.end", "to: $session", 6, "datasets.bars.request.query.to", "$session has no value"),
    ("s: $symbol, ", "", 5, "datasets.bars.over.symbol", "the request does not use $symbol"),
    ("from: $window.start, to: $window.end", "", 5, "datasets.bars.over.window", "would be asked the same"),
    ("https://", "ftp://", 2, "base_url", "use a URL that begins with https://"),
    ("acme\n", "Acme Inc\n", 1, "provider", "use lower-case letters, digits and _"),
    ("provider: acme\n", "", 1, "provider", "is missing (The provider's short name.)"),
    ("    key: [symbol, date]\n", "", 4, "datasets.bars.key", "is missing (The columns that identify a row.)"),
    ("{rows: data}", "rows", 8, "datasets.bars.response", "must be a block of fields (name: value), and is 'rows'"),
    ("rows: data}", "rows: data, shape: recods}", 8, "datasets.bars.response.shape", "did you mean records?"),
    ("1 year}", "1 year, session: XNYS}", 5, "datasets.bars.over.window", "exclude one another"),
    ("    key", "    published: soon\n    key", 10, "datasets.bars.published", "30 minutes after close"),
    ("{universe: $plan}", "{rows: acme.bars}", 5, "datasets.bars.over.symbol.rows", "bars -> bars"),
    ("{universe: $plan}", "{rows: acme.bar}", 5, "datasets.bars.over.symbol.rows", "did you mean bars?"),
    ("{universe: $plan}", "{list: [a], universe: b}", 5, "datasets.bars.over.symbol", "exactly one of universe, list"),
    ("{symbol: str, ", "{ticker: str, ", 10, "datasets.bars.key", "key names 'symbol'"),
    ("datasets:\n", "limits: [{requests: 0, per: day}]\ndatasets:\n", 3, "limits.0.requests", "must be at least 1"),
    ("datasets:\n", "limits: [{requests: 5}]\ndatasets:\n", 3, "limits.0.requests", "requests: 200, per: minute"),
    ("datasets:\n", "faults: [{when: {status: 9}, then: cooldown}]\ndatasets:\n", 3, "faults.0.then", "cool_down?"),
    ("datasets:\n", "faults: [{when: {body: '['}, then: drop}]\ndatasets:\n", 3, "faults.0.when.body", "unterminated"),
    (
        "datasets:\n",
        "faults:\n  - {when: {status: 429}, then: cool_down, wait: $match.1}\ndatasets:\n",
        4,
        "faults.0.wait",
        "the rule's regular expression has no group",
    ),
    (
        "datasets:\n",
        "faults: [{when: {status: 429}, then: cool_down, wait: a while}]\ndatasets:\n",
        3,
        "faults.0.wait",
        "write $header.Retry-After, $match.1 or a span",
    ),
    ("window: 1 year", "window: 5 sessions", 5, "datasets.bars.over.window", "days, weeks, months or years"),
    ("query: {s", "timeout: 2 sessions, query: {s", 6, "datasets.bars.request.timeout", "hours, days or weeks"),
    ("datasets:\n", "limits: [{requests: 5, per: 2 sessions}]\ndatasets:\n", 3, "limits.0.per", "months or years"),
    (
        "datasets:\n",
        "faults: [{when: {status: 429}, then: quota, per: session}]\ndatasets:\n",
        3,
        "faults.0.per",
        "months or years",
    ),
    (
        "datasets:\n",
        "faults: [{when: {status: 429}, then: cool_down, wait: 2 sessions}]\ndatasets:\n",
        3,
        "faults.0.wait",
        "a span such as 60 seconds",
    ),
    ("query: {s", "dates: YYYYMMDD, query: {s", 6, "datasets.bars.request.dates", "did you mean '%Y%m%d'?"),
    ("query: {s", "dates: unixms, query: {s", 6, "datasets.bars.request.dates", "did you mean unix_ms?"),
    (
        "date: date",
        "date: {type: date, format: YYYY-MM-DD}",
        9,
        "datasets.bars.schema.date.format",
        "is neither a pattern with % nor one of iso, unix_s, unix_ms, unix_us, unix_ns, unix_auto "
        "(did you mean '%Y-%m-%d'?)",
    ),
    ("date: date", "date: {type: datetime, format: unixms}", 9, "datasets.bars.schema.date.format", "mean unix_ms?"),
    (
        "date: date",
        "date: {type: datetime, format: 'dd.mm.yyyy HH:MM:SS'}",
        9,
        "datasets.bars.schema.date.format",
        "did you mean '%d.%m.%Y %H:%M:%S'?",
    ),
    ("    key", "    published: 2 months after close\n    key", 10, "datasets.bars.published", "hours, days or weeks"),
    (
        "datasets:\n",
        "faults:\n  - {when: {status: 429}, then: cool_down, wait: 60}\ndatasets:\n",
        4,
        "faults.0.wait",
        "must be a text, and is '60' (write 60 seconds, or with another unit)",
    ),
    ("query: {s", "timeout: 30, query: {s", 6, "datasets.bars.request.timeout", "write 30 seconds, or with another"),
    ("window: 1 year", "window: 5", 5, "datasets.bars.over.window", "'5' is not a span of time (write a positive"),
    ("{universe: $plan}", "$plans", 5, "datasets.bars.over.symbol", "there is no $plans here (did you mean $plan?"),
    (
        "datasets:\n",
        "auth:\n  headers:\n    X-Key: ${NAME}\ndatasets:\n",
        5,
        "auth.headers.X-Key",
        "${NAME} means nothing here (a secret is written $secret.NAME)",
    ),
    (
        "close: f64}",
        "close: f64, c: {as: close, type: f64}}",
        9,
        "datasets.bars.schema",
        "close and c become the same column 'close' (give one of them another `as`)",
    ),
    ("query: {s: $symbol", "query: {s: [$symbol]", 6, "datasets.bars.request.query.s", "and is a list"),
]


@pytest.mark.parametrize(("old", "new", "line", "field", "said"), DEFINITIONS_REFUSED)
def test_a_wrong_definition_is_refused_with_line_field_and_remedy(write, old, new, line, field, said):
    path = write(changed(DEFINITION, old, new))
    problems = check_file(path)
    assert [(p.line, p.field) for p in problems] == [(line, field)], "\n".join(map(str, problems))
    assert said in str(problems[0])
    assert str(problems[0]).startswith(f"{path}:{line}: {field}: ")
    with pytest.raises(ConfigurationError) as refused:
        load_definition(path)
    assert refused.value.exit_code == ExitCode.CONFIGURATION


def test_an_unknown_calendar_is_found_by_checking_and_near_names_are_told(write):
    path = write(changed(DEFINITION, "    key", "    calendar: XNSY\n    key"))
    (problem,) = check_file(path)
    assert (problem.line, problem.field) == (10, "datasets.bars.calendar")
    assert "did you mean XNYS" in str(problem)


UPSTREAMS_REFUSED = [
    ("tier: basic", "teir: basic", 2, "upstreams.alpaca.teir", "did you mean tier? fields: definition, base_url"),
    ("tier: basic", "tier: basik", 2, "upstreams.alpaca.tier", "did you mean basic? tiers: basic, algo_trader_plus"),
    ("tier: basic", "definition: alpaka", 2, "upstreams.alpaca.definition", "did you mean alpaca? shipped: alpaca"),
    ("tier: basic", "definition: ./my.yml", 2, "upstreams.alpaca.definition", "there is no definition file"),
    ("tier: basic", "tuning: {threads: 100}", 2, "upstreams.alpaca.tuning.threads", "must be at most 64, and is 100"),
    (
        "basic}",
        "basic, tuning: {max_wait: 2 sessions}}",
        2,
        "upstreams.alpaca.tuning.max_wait",
        "'2 sessions' cannot be counted here (write milliseconds, seconds, minutes, hours, days or weeks)",
    ),
    ("basic}", "basic, tuning: {back_off: 2 months}}", 2, "upstreams.alpaca.tuning.back_off", "hours, days or weeks"),
    ("basic}", "basic, calendars: {dail: XNYS}}", 2, "upstreams.alpaca.calendars.dail", "datasets: daily_bars"),
    (
        "basic}",
        "basic, calendars: {daily_bars: NYS}}",
        2,
        "upstreams.alpaca.calendars.daily_bars",
        "did you mean XNYS",
    ),
    ("daily_bars", "daily_bar", 9, "plans.nightly.datasets", "did you mean daily_bars?"),
    ("alpaca.daily_bars", "alpacca.daily_bars", 9, "plans.nightly.datasets", "did you mean alpaca? upstreams: alpaca"),
    ("alpaca.daily_bars", "daily_bars", 9, "plans.nightly.datasets", "write alpaca.daily_bars"),
    ("universe: tech", "universe: teck", 10, "plans.nightly.universe", "did you mean tech?"),
    (
        "    universe: tech\n",
        "",
        8,
        "plans.nightly.universe",
        "is missing: alpaca.daily_bars is asked symbol by symbol",
    ),
    ("    since: 2000-01-01\n", "", 8, "plans.nightly.since", "it must be known where to begin"),
    ("2000-01-01", "2000-13-01", 11, "plans.nightly.since", "must be a date such as 2020-01-31, and is '2000-13-01'"),
    ("2000-01-01\n", "2000-01-01\n    until: 1999-01-01\n", 12, "plans.nightly.until", "is before since"),
    ("    since", "    stores: [defalt]\n    since", 11, "plans.nightly.stores", "did you mean default?"),
    ("    since", "    schedule: daily\n    since", 11, "plans.nightly.schedule", "such as 0 19 * * 1-5"),
    ("    since", "    schedule: 0 25 * * *\n    since", 11, "plans.nightly.schedule", "'25' is not a hour"),
    ("    since", "    zone: Mars/Base\n    since", 11, "plans.nightly.zone", "use an IANA name"),
    ("    since", "    segment: {rows: few}\n    since", 11, "plans.nightly.segment.rows", "must be a whole number"),
    (
        "    since",
        "    judge: {known_holes: h.yml}\n    since",
        11,
        "plans.nightly.judge.known_holes",
        "there is no file",
    ),
    ("delta://", "detla://", 6, "stores.default", "did you mean delta://? stores: delta://"),
    ("delta://./data", "./data", 6, "stores.default", "write delta://./data"),
    (
        "[AAPL, MSFT]",
        "[AAPL, TRUE]",
        4,
        "universes.tech.1",
        "is what YAML reads as true or false, and no symbol (put it in quotes: 'TRUE')",
    ),
    (
        "[AAPL, MSFT]",
        "[1e5, MSFT]",
        4,
        "universes.tech.0",
        "reads as a number, and no symbol (put it in quotes: '1e5')",
    ),
    ("universe: tech", "universe: [A, ~]", 10, "plans.nightly.universe.1", "(put it in quotes: '~')"),
    ("delta://./data", "postgresql://me:${PW}@host/db", 6, "stores.default", "a secret is written $secret.PW"),
    ("[AAPL, MSFT]", "[]", 4, "universes.tech", "the universe is empty"),
    ("[AAPL, MSFT]", "{file: tech.txt}", 4, "universes.tech.file", "there is no such universe file"),
    ("[AAPL, MSFT]", "{rows: alpaca.daily_bars, column: tickr}", 4, "universes.tech.rows", "columns: symbol, ts"),
    ("[AAPL, MSFT]", "{rows: alpaca.bars}", 4, "universes.tech.rows", "alpaca has no dataset 'bars'"),
    ("  nightly:", '  "night run":', 8, "plans.night run", "use letters, digits, _ and -"),
    ("    datasets: alpaca.daily_bars\n", "    datasets: []\n", 9, "plans.nightly.datasets", "needs at least 1"),
    ("universes:", "market_hours: {XNYC: {}}\nuniverses:", 3, "market_hours.XNYC", "did you mean XNYS"),
    ("universes:", "universe:", 3, "universe", "did you mean universes?"),
    ("plans:", "lans:", 7, "lans", "did you mean plans?"),
]


@pytest.mark.parametrize(("old", "new", "line", "field", "said"), UPSTREAMS_REFUSED)
def test_a_wrong_upstream_file_is_refused_with_line_field_and_remedy(write, old, new, line, field, said):
    path = write(changed(UPSTREAM, old, new))
    problems = check_file(path)
    assert [(p.line, p.field) for p in problems] == [(line, field)], "\n".join(map(str, problems))
    assert said in str(problems[0])
    assert str(problems[0]).startswith(f"{path}:{line}: {field}: ")


MAINTENANCE_REFUSED = [
    ("[a, b]", "[a, c]", 5, "links.ab.stores", "there is no store 'c' (stores: a, b)"),
    ("[a, b]", "[a]", 5, "links.ab.stores", "needs at least 2, and has 1"),
    ("links:", "link:", 4, "link", "did you mean links?"),
    ("[a, b]", "[a, b], policy: strict", 5, "links.ab.policy", "policies: default"),
    (
        "links:",
        "policies: {p: {winner: oldest}}\nlinks:",
        4,
        "policies.p.winner",
        "authority, majority, newest, refetch",
    ),
    ("links:", "policies: {p: {winner: authority}}\nlinks:", 4, "policies.p", "authority names the winning store"),
    ("delta://./b", "delta:/b", 3, "stores.b", "is not a store's URL"),
    ("links:", "reporting: {email: me@here}\nlinks:", 4, "reporting.email", "must be a list"),
]


@pytest.mark.parametrize(("old", "new", "line", "field", "said"), MAINTENANCE_REFUSED)
def test_a_wrong_maintenance_file_is_refused_with_line_field_and_remedy(write, old, new, line, field, said):
    path = write(changed(MAINTENANCE, old, new))
    problems = check_file(path)
    assert [(p.line, p.field) for p in problems] == [(line, field)], "\n".join(map(str, problems))
    assert said in str(problems[0])
    with pytest.raises(ConfigurationError):
        load_maintenance(path)


NOT_YAML = [
    ("", None, "the file is empty"),
    ("# only a comment\n", None, "the file is empty"),
    ("auth:\n  headers: {X-Key: ${NAME}}\n", 2, "${...} means nothing here (a secret is written $secret.NAME)"),
    ("- a\n", 1, "the file holds a list, not fields"),
    ("hello\n", 1, "the file holds a text, not fields"),
    ("a: 1\nb: 2\n", 1, "none of its fields (a, b)"),
    ("upstreams:\n\ta: 1\n", 2, "a tab stands in the indent"),
    ("upstreams:\n  a: 1\n  a: 2\n", 3, "'a' is given twice; the first is in line 2"),
    ("upstreams: {a: 1\nplans: 2\n", 2, "is not closed before this line (it begins in line 1)"),
    ("upstreams: [a\nplans: 2\n", 2, "is not closed before this line (it begins in line 1)"),
    ('upstreams: "a\nplans: 2\n', 3, "a quote that is opened is never closed (it begins in line 1)"),
    ("upstreams:\n  a: 1\n b: 2\n", 3, "does not line up"),
    ("upstreams: a: b\n", 1, "a colon stands where none can"),
    ("upstreams: *a\n", 1, "an anchor that is not above"),
    ("upstreams: &a [*a]\n", 1, "this alias holds itself"),
    ("upstreams: @a\n", 1, "put the value in quotes"),
    ("upstreams: !!python/object a\n", 1, "means nothing here"),
    ("upstreams: 1\n---\nupstreams: 2\n", 2, "more than one document"),
    (b"\xff\xfeu\x00", None, "encoded in UTF-16"),
    (b"upstreams: 1\nplans: \xe9\n", 2, "byte 0xe9 is not UTF-8"),
    ("upstreams: \x01\n", 1, "a control character"),
]


@pytest.mark.parametrize(("text", "line", "said"), NOT_YAML)
def test_what_is_not_yaml_is_refused_in_plain_words(write, text, line, said):
    path = write(text)
    problems = check_file(path)
    assert len(problems) == 1
    assert problems[0].line == line
    assert said in str(problems[0])
    assert str(problems[0]).startswith(str(path))


def test_a_missing_file_names_the_one_that_is_nearly_called_so(write, tmp_path):
    write(UPSTREAM, "upstream.yml")
    assert "did you mean upstream.yml?" in str(check_file(tmp_path / "upstreams.yml")[0])
    assert "this is a folder" in str(check_file(tmp_path)[0])


def test_everything_that_is_wrong_is_told_at_once(write):
    text = DEFINITION
    for old, new in [("token: next", "tokn: next"), ("$symbol,", "$symbl,"), ("f64", "f46"), ("query:", "querry:")]:
        text = changed(text, old, new)
    problems = check_file(write(changed(text, "    key", "    published: soon\n    key")))
    assert [problem.field for problem in problems] == [
        "datasets.bars.request.querry",
        "datasets.bars.request.query.s",
        "datasets.bars.page.tokn",
        "datasets.bars.schema.close",
        "datasets.bars.published",
    ]


def test_problems_of_several_files_come_together_each_with_its_file(write):
    wrong = write(changed(DEFINITION, "token: next", "tokn: next"), "acme.yml")
    text = changed(UPSTREAM, "stores:\n", "stores:\n  other: nowhere\n")
    text = changed(text, "  alpaca: {tier: basic}\n", "  alpaca: {tier: basic}\n  acme: {definition: ./acme.yml}\n")
    path = write(text, "upstream.yml")
    with pytest.raises(ConfigurationError) as refused:
        load_configuration(path)
    assert [(p.file, p.line) for p in refused.value.problems] == [(str(wrong), 7), (str(path), 7)]


def test_a_field_of_a_definition_and_a_secret_can_be_pointed_at(write, tmp_path):
    auth = "auth: {headers: {Key: $secret.ACME_KEY}}\ndatasets:\n"
    write(changed(DEFINITION, "datasets:\n", auth), "acme.yml")
    loaded = load_configuration(
        write(
            "upstreams: {a: {definition: ./acme.yml}}\nstores: {s: 'postgresql://u:$secret.PW@h/d'}\n", "upstream.yml"
        )
    )
    rows = loaded.place("a", ("datasets", "bars", "response", "rows"))
    assert rows == f"{tmp_path}/acme.yml:9: datasets.bars.response.rows"
    assert loaded.secret_place("ACME_KEY") == f"{tmp_path}/acme.yml:3: auth.headers.Key"
    assert loaded.secret_place("PW") == f"{tmp_path}/upstream.yml:2: stores.s"
    assert loaded.secret_place("UNUSED") == ""


@pytest.mark.parametrize(("old", "new"), [("1 year", "1 yaer"), ("key: [symbol", "key: [symbo"), ("f64", "f65")])
def test_a_dataset_with_a_mistake_is_not_called_absent(write, old, new):
    write(changed(DEFINITION, old, new), "acme.yml")
    plan = "plans: {p: {datasets: acme.bars, universe: [A], since: 2020-01-01}}\n"
    (problem,) = check_file(write("upstreams: {acme: {definition: ./acme.yml}}\n" + plan, "upstream.yml"))
    assert problem.file.endswith("acme.yml")


def test_a_universe_that_was_meant_to_be_the_plans_is_told_where_the_plan_uses_it(write):
    write(changed(DEFINITION, "$plan", "plan"), "acme.yml")
    plan = "plans: {p: {datasets: acme.bars, universe: [A], since: 2020-01-01}}\n"
    (problem,) = check_file(write("upstreams: {acme: {definition: ./acme.yml}}\n" + plan, "upstream.yml"))
    assert "did you mean $plan in the definition?" in problem.remedy


def test_what_is_wrong_in_a_shared_part_is_told_once_and_where_it_stands(write):
    two = DEFINITION + DEFINITION[DEFINITION.index("  bars:") :].replace("bars:", "more:", 1)
    two = two.replace("    page: {token: next, send: cursor}\n", "")
    problems = check_file(write(changed(two, "datasets:\n", "page: {token: next, sand: cursor}\ndatasets:\n")))
    assert [(problem.line, problem.field) for problem in problems] == [(3, "page.sand")]


def test_a_broken_part_does_not_make_what_refers_to_it_look_wrong(write):
    text = changed(UPSTREAM, "tech: [AAPL, MSFT]", "tech: {lists: [AAPL], column: 5}")
    text = changed(text, "delta://./data", "{url: delta://./data, path: x}")
    assert {p.field for p in check_file(write(text))} == {
        "universes.tech.lists",
        "universes.tech.column",
        "stores.default.path",
    }


def test_a_secret_given_in_the_file_is_not_repeated_in_what_is_said_about_it(write):
    auth = "auth: {headers: {X: [hunter2]}, basic: {user: a, password: {of: hunter2}}}\ndatasets:\n"
    problems = check_file(write(changed(DEFINITION, "datasets:\n", auth)))
    assert len(problems) == 2
    assert not any("hunter2" in str(problem) for problem in problems)
    store = changed(UPSTREAM, "delta://./data", "postgresql://me:hunter2@host/db")
    assert not any("hunter2" in str(problem) for problem in check_file(write(store)))


def test_loading_imports_no_calendar_and_no_frame_library(write):
    code = (
        "import sys; from marketsync.configuration import load_configuration; "
        f"load_configuration({str(write(UPSTREAM))!r}); "
        "print([m for m in ('pandas', 'polars', 'exchange_calendars', 'ruamel', 'marketsync.explaining')"
        " if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent
    )
    assert done.stdout.strip() == "[]"


# ------------------------------------------------------------ whatever is written

WHOLE = [
    DEFINITION,
    UPSTREAM,
    MAINTENANCE,
    *(path.read_text() for path in sorted((Path(__file__).parent.parent / "providers" / "definitions").glob("*.yml"))),
]
JUNK = [
    "",
    "{",
    "}",
    "[",
    "]",
    ":",
    "- ",
    "&a ",
    "*a",
    "!x ",
    "'",
    '"',
    "\t",
    "null",
    "~",
    "5",
    "true",
    "<<: ",
    "$",
    "|\n",
]


@settings(max_examples=120)
@given(text=st.sampled_from(WHOLE), data=st.data())
def test_no_file_however_spoilt_makes_check_fail_otherwise_than_by_telling(text, data):
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(text)))
        end = data.draw(st.integers(start, min(len(text), start + 30)))
        text = text[:start] + data.draw(st.sampled_from(JUNK)) + text[end:]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file.yml"
        path.write_text(text)
        problems = check_file(path)
    lines = text.count("\n") + 2
    assert all(problem.message and (problem.line is None or 1 <= problem.line <= lines) for problem in problems)
    assert not any("validat" in problem.message or "pydantic" in problem.message for problem in problems)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=120)
@given(text=st.sampled_from(WHOLE), value=VALUES, data=st.data())
def test_any_value_in_any_place_is_either_fine_or_told_where_it_stands(text, value, data):
    whole = parse_document(text, "f").value
    path: list[str | int] = []
    at = whole
    while isinstance(at, dict | list) and at and (not path or data.draw(st.booleans())):
        path.append(data.draw(st.sampled_from(list(at) if isinstance(at, dict) else list(range(len(at))))))
        at = at[path[-1]]
    put(whole, path, value)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "file.yml"
        file.write_text(json.dumps(whole, indent=1))
        problems = check_file(file)
    assert all(problem.message for problem in problems)


def put(value: Any, path: list[str | int], new: Any) -> None:
    for step in path[:-1]:
        value = value[step]
    value[path[-1]] = new


def test_every_engine_can_be_named_by_a_store():
    from storage.registry import ENGINES

    assert set(ENGINES) <= set(STORE_SCHEMES), "marketsync.upstream.STORE_SCHEMES must name storage.registry.ENGINES"


# ------------------------------------------------------------ $names and what stands behind them


@pytest.mark.parametrize(
    "path",
    ["/files/$session.zip", "/$session-$dataset.csv.gz", "/$session_", "/$dataset/$session.json"],
)
def test_a_name_ends_before_an_extension_or_a_hyphen(write, path):
    by_session = DEFINITION.replace("{symbol: {universe: $plan}, window: 1 year}", "{session: XNYS}")
    text = changed(by_session, "{path: /bars, query: {s: $symbol, from: $window.start, to: $window.end}}", path)
    text = changed(text, f"request: {path}", f"request: {{path: {path}, query: {{d: $session}}}}")
    problems = check_file(write(text))
    if path == "/$session_":
        assert "there is no $session_" in problems[0].message
    else:
        assert problems == []


def test_window_names_joined_by_hyphens_are_names_of_their_own(write):
    text = changed(DEFINITION, "path: /bars", "path: /bars/$window.year-$window.month-$window.day.csv")
    assert check_file(write(text)) == []


# ------------------------------------------------------------ symbols that would be taken for others

BATCHED = DEFINITION.replace("{universe: $plan}", "{universe: $plan, batch: 10}")
OWN = """\
upstreams: {acme: {definition: ./acme.yml}}
universes:
  tech:
    - AAPL
    - "A,B"
  kept: {file: symbols.txt}
plans:
  nightly: {datasets: acme.bars, universe: tech, since: 2000-01-01}
"""


def test_a_symbol_that_holds_what_joins_symbols_is_refused_where_it_stands(write):
    write(BATCHED, "acme.yml")
    write("AAPL\nMSFT\n", "symbols.txt")
    (problem,) = check_file(write(OWN, "upstream.yml"))
    assert (problem.line, problem.field) == (5, "universes.tech.1")
    assert "would answer for 'A', 'B'" in problem.message
    assert "symbols of their own" in problem.remedy
    with pytest.raises(ConfigurationError, match="'A,B' holds ','"):
        load_configuration(write(OWN, "upstream.yml"))


def test_a_symbol_with_a_comma_is_one_symbol_where_a_request_asks_for_one(write):
    write(DEFINITION, "acme.yml")
    write("AAPL\n", "symbols.txt")
    assert check_file(write(OWN, "upstream.yml")) == []


@pytest.mark.parametrize("line", ["AAPL,Apple Inc", "AAPL MSFT", "AAPL;MSFT", "AAPL\tApple"])
def test_a_table_is_not_taken_for_a_list_of_symbols(write, tmp_path, line):
    (tmp_path / "syms.txt").write_text(f"# mine\nIBM  # blue\n{line}\n")
    (problem,) = check_file(write(changed(UPSTREAM, "[AAPL, MSFT]", "{file: syms.txt}")))
    assert f"line 3 is '{line}', and one symbol a line is wanted" in problem.message
    assert problem.remedy.startswith("name the file .csv or give `column:`")
    (tmp_path / "syms.txt").write_text("symbol,name\nAAPL,Apple Inc\n")
    asked = changed(UPSTREAM, "[AAPL, MSFT]", "{file: syms.txt, column: symbol}")
    assert load_configuration(write(asked)).universe("tech") == ("AAPL",)


def test_a_line_of_several_symbols_in_a_universe_file_is_told_with_the_file(write):
    write(BATCHED, "acme.yml")
    write('symbol\nIBM\n"AAPL,MSFT"\n', "symbols.csv")
    text = changed(changed(OWN, "universe: tech", "universe: kept"), '"A,B"', "B").replace("symbols.txt", "symbols.csv")
    (problem,) = check_file(write(text, "upstream.yml"))
    assert problem.field == "universes.kept.file"
    assert problem.message.startswith("symbols.csv: the symbol 'AAPL,MSFT' holds ','")


@pytest.mark.parametrize("symbol", ['"A\\nB"', '"A\\tB"', '" "', '""'])
def test_a_symbol_without_a_name_or_with_a_control_character_is_refused(write, symbol):
    write(DEFINITION, "acme.yml")
    write("AAPL\n", "symbols.txt")
    (problem,) = check_file(write(changed(OWN, '"A,B"', symbol), "upstream.yml"))
    assert "is not a symbol" in problem.message


def test_a_list_of_a_definition_is_looked_at_as_well(write):
    text = changed(DEFINITION, "{universe: $plan}", '{list: [A, "B,C"], batch: 2}')
    (problem,) = check_file(write(text))
    assert (problem.field, problem.line) == ("datasets.bars.over.symbol.list", 5)


# ------------------------------------------------------------ secrets in files


@pytest.mark.parametrize(
    ("content", "why"),
    [(b"", "is empty"), (b" \n", "is empty"), (b"\xff\xfe\x00k", "is not UTF-8"), (b"a\nb\n", "more than one line")],
)
def test_a_secret_file_that_holds_no_key_is_named(write, tmp_path, content, why):
    (tmp_path / ".secrets").mkdir()
    (tmp_path / ".secrets" / "TUSHARE_TOKEN").write_bytes(content)
    path = write("upstreams: {tushare: {tier: points_120}}\n")
    (problem,) = inspect_file(path, secrets_required=True).problems
    assert "the secret TUSHARE_TOKEN has no value" in problem.message
    assert str(tmp_path / ".secrets" / "TUSHARE_TOKEN") in problem.message
    assert why in problem.message


def test_a_variable_that_names_a_file_that_is_not_there_is_told(write, tmp_path, monkeypatch):
    monkeypatch.setenv("TUSHARE_TOKEN_FILE", str(tmp_path / "gone"))
    (problem,) = inspect_file(write("upstreams: {tushare: {tier: points_120}}\n"), secrets_required=True).problems
    assert f"TUSHARE_TOKEN_FILE names {tmp_path / 'gone'}, which is not there" in problem.message


def test_a_last_key_that_is_no_column_is_told_with_the_columns(write):
    text = changed(DEFINITION, "page: {token: next, send: cursor}", "page: {after: stamp, send: cursor}")
    (problem,) = check_file(write(text))
    assert "page.after names 'stamp', which is not a column" in problem.message
    assert problem.remedy == "columns: symbol, date, close"


@pytest.mark.parametrize(("old", "day"), [("since: 2000-01-01", "0001-01-01"), ("since: 2000-01-01", "9999-12-31")])
def test_a_day_that_no_market_has_is_refused(write, old, day):
    (problem,) = check_file(write(changed(UPSTREAM, old, f"since: {day}")))
    assert problem.field == "plans.nightly.since"
    assert f"{day} is out of reach" in problem.message
    assert "from 1700-01-01 to 2261-12-31" in problem.message + problem.remedy


def test_a_window_of_ages_is_refused(write):
    (problem,) = check_file(write(changed(DEFINITION, "window: 1 year", "window: 9000 years")))
    assert problem.field == "datasets.bars.over.window"
    assert "500 years" in problem.remedy
