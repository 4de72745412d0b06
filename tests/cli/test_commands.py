"""Every command: what it answers, its exit code, that `--json` prints one object and nothing else, and that a wrong
input ends with 2 and a sentence that says where and what to do. Most run in this process, some (`apart`) in their own.

What a sync does is in `tests/engine`; init, check, plan add and the catalogue are in `test_configuration_commands.py`;
Prefect is in `tests/flows`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from copy import copy
from datetime import date
from pathlib import Path

import command_here
import polars as pl
import pytest
import requests

from cli.control import on_calendar
from providers.replica import Replica

ROOT = Path(__file__).parents[2]
SYMBOLS = ["AAPL", "IBM"]
CONFIGURATION = """\
upstreams:
  alpaca:
    base_url: {url}
    tier: algo_trader_plus
universes:
  two: [AAPL, IBM]
stores:
  default: delta://./data
  second: parquet://./second
plans:
  daily:
    datasets: [alpaca.daily_bars]
    universe: two
    since: 2010-01-01
    until: 2013-02-28
    schedule: 0 19 * * 1-5
    zone: America/New_York
  more:
    datasets: [alpaca.daily_bars]
    universe: [MSFT]
    since: 2013-01-01
    until: 2013-01-31
    stores: [second]
"""
ROWS = 2 * 794  # bars of the two symbols between 2010-01-01 and 2013-02-28


class Project:
    """A folder with a configuration, and the command run in it."""

    def __init__(self, folder: Path, replica: Replica):
        self.folder, self.replica = folder, replica
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "upstream.yml").write_text(CONFIGURATION.format(url=replica.url), encoding="utf-8")
        (folder / ".secrets").mkdir()
        for name, value in replica.credentials.items():
            (folder / ".secrets" / name).write_text(value, encoding="utf-8")

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        gone = ("PREFECT_API_URL", "PYTHONDONTWRITEBYTECODE")
        environment = {name: value for name, value in os.environ.items() if name not in gone}
        return subprocess.Popen(
            [sys.executable, "-m", "cli", *arguments],
            cwd=self.folder,
            env={**environment, "PYTHONPATH": str(ROOT), "COLUMNS": "200"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return command_here.run(self.folder, *arguments)

    def apart(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """The same in a process of its own."""
        process = self.start(*arguments)
        try:
            out, err = process.communicate(timeout=120)
        except BaseException:
            process.kill()
            process.communicate()
            raise
        assert "Traceback" not in out + err, out + err
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def done(self, *arguments: str) -> str:
        """Run a command that must end with 0; return what it printed as its result."""
        done = self.run(*arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def object(self, *arguments: str) -> dict:
        """Run a command with --json; return the object that is all of stdout."""
        found = json.loads(self.done(*arguments, "--json"))
        assert isinstance(found, dict)
        return found


@pytest.fixture(scope="module")
def replica() -> Iterator[Replica]:
    with Replica(limits="unlimited") as running:
        yield running


@pytest.fixture(scope="module")
def synced(tmp_path_factory: pytest.TempPathFactory, replica: Replica) -> Project:
    """A project whose plan `daily` has been synced; tests only look at it."""
    project = Project(tmp_path_factory.mktemp("synced") / "project", replica)
    project.done("sync", "daily")
    return project


@pytest.fixture
def fresh(tmp_path: Path, replica: Replica, synced: Project) -> Project:
    """A project where nothing has run yet; only the trading calendar is worked out already."""
    project = Project(tmp_path / "project", replica)
    shutil.copytree(synced.folder / ".marketsync" / "calendars", project.folder / ".marketsync" / "calendars")
    return project


@pytest.fixture
def own(tmp_path: Path, synced: Project) -> Project:
    """A synced project that a test may change."""
    project = copy(synced)
    project.folder = Path(shutil.copytree(synced.folder, tmp_path / "own"))
    return project


# ---------------------------------------------------------------- sync

KEYS = {
    "run": None,
    "plan": None,
    "state": None,
    "seconds": None,
    "work": ["units", "done", "empty", "not_yet", "waiting", "dropped", "failed", "cancelled"],
    "requests": ["sent", "retried", "cool_downs"],
    "rows": ["fetched", "inserted", "updated", "unchanged", "duplicates", "quarantined"],
    "bytes": None,
    "resume_at": None,
    "errors": None,
}


def test_sync_prints_one_object_with_the_keys_that_scripts_rely_on(fresh):
    ended = fresh.apart("sync", "daily", "--json")
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    assert list(found)[: len(KEYS)] == list(KEYS)
    for name, parts in KEYS.items():
        assert parts is None or list(found[name]) == parts
    assert (found["plan"], found["state"], found["resume_at"], found["errors"]) == ("daily", "completed", None, [])
    assert found["rows"]["fetched"] == found["rows"]["inserted"] == ROWS
    assert found["requests"]["sent"] == found["work"]["units"] == found["work"]["done"] == 1


@pytest.mark.slow
def test_sync_says_while_it_waits_for_what_and_until_when(fresh):
    file = fresh.folder / "upstream.yml"
    text = file.read_text().replace("tier: algo_trader_plus", "limits: [{requests: 1, per: 8 seconds}]")
    file.write_text(text.replace("since: 2010-01-01", "since: 2004-01-01"))  # windows of 5 years: several requests
    done = fresh.apart("sync", "daily")
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("daily: ")]
    told = [
        line for line in lines if re.search(r"waits until \d\d:\d\d:\d\d UTC for the limit of 1 per 8 seconds", line)
    ]
    assert told, lines
    assert not any("to go" in line for line in told)


def test_sync_of_several_plans_prints_one_object_and_ends_with_the_gravest_code(fresh, replica):
    replica.set_faults([{"fault": "bad_key", "when": {"match": {"query": "MSFT"}}}])
    try:
        both = fresh.run("sync", "--json")
    finally:
        replica.set_faults([])
    runs = {one["plan"]: one["state"] for one in json.loads(both.stdout)["runs"]}
    assert (both.returncode, runs) == (1, {"daily": "completed", "more": "failed"})


def test_sync_tells_a_person_what_it_did(fresh):
    out = fresh.done("sync", "daily")
    for words in ("daily", f"{ROWS:,}", "alpaca.daily_bars"):
        assert words in out
    assert "\x1b" not in out, "no colours where there is no terminal"


FAULTS = [
    ("wrong_argument", {}, 3, "invalid symbol"),
    ("bad_key", {}, 1, "unauthorized"),
    ("too_frequent", {"wait": 3600}, 75, "UTC"),
]


@pytest.mark.parametrize(("fault", "options", "code", "words"), FAULTS, ids=[str(fault[2]) for fault in FAULTS])
def test_a_code_other_than_0_comes_with_the_providers_words(fresh, replica, fault, options, code, words):
    replica.set_faults([{"fault": fault, **options}])
    try:
        ended = fresh.run("sync", "daily")
    finally:
        replica.set_faults([])
    assert ended.returncode == code
    assert words in ended.stdout


# ---------------------------------------------------------------- questions


def test_estimate_says_what_a_sync_would_take_and_sends_nothing(fresh, synced, replica):
    before = len(replica.log)
    out = fresh.done("estimate", "daily", "--requests")
    assert "1 request for 2 subjects" in out
    assert "/v2/stocks/bars" in out
    assert "complete on" in out
    found = fresh.object("estimate", "daily")
    assert found["requests"] >= 1
    assert fresh.object("estimate", "daily", "--requests")["first_requests"]
    assert "sync would send no request" in synced.done("estimate", "daily")
    assert len(replica.log) == before


def test_status_says_how_plans_stand(fresh, synced):
    assert "daily: never run" in fresh.done("status", "daily")
    owed = fresh.object("status", "daily", "--owed")
    assert owed["owed"]
    out = synced.done("status")
    assert "daily: completed" in out
    assert f"{ROWS:,} rows" in out
    assert "more: never run" in out
    found = synced.object("status")
    assert [one["plan"] for one in found["plans"]] == ["daily", "more"]


def test_status_can_be_watched_until_ctrl_c(synced):
    process = synced.start("status", "daily", "--watch")
    assert process.stdout is not None
    while "daily: completed" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode in (0, 4)
    assert "Traceback" not in err


def test_report_shows_the_last_run_or_any_as_text_markdown_page_or_object(synced, tmp_path):
    found = synced.object("report")
    assert (found["plan"], found["state"], found["rows"]["inserted"]) == ("daily", "completed", ROWS)
    assert synced.object("report", found["run"])["run"] == found["run"]
    assert "daily" in synced.done("report")
    assert "| " in synced.done("report", "--markdown")
    page = tmp_path / "report.html"
    assert synced.done("report", "--html", str(page)) == ""
    text = page.read_text(encoding="utf-8")
    assert "<svg" in text
    assert "http://" not in text.replace("http://www.w3.org/", "").replace(synced.replica.url, "")


@pytest.mark.parametrize(
    ("day", "words"),
    [
        ("2012-07-03", ["default has 1 row of IBM", "GET /v2/stocks/bars?symbols=AAPL,IBM", "delivered to default"]),
        ("2012-07-04", ["no session"]),
        ("2012-07-07", ["no session"]),
        ("2009-07-01", ["does not want 2009-07-01"]),
    ],
)
def test_explain_says_why_a_row_is_or_is_not_here(synced, day, words):
    out = synced.done("explain", "alpaca.daily_bars", "IBM", day)
    for one in words:
        assert one in out, out
    found = synced.object("explain", "alpaca.daily_bars", "IBM", day)
    assert found["lines"]


def test_query_runs_sql_over_any_store(synced, replica):
    sql = "SELECT symbol, count(*) AS bars, max(close) AS top FROM alpaca.daily_bars GROUP BY symbol ORDER BY symbol"
    found = synced.object("query", sql)
    expected = []
    for symbol in SYMBOLS:
        series = replica.market.series(symbol, "1Day")
        assert series is not None
        bars = series.frame(0, len(series)).filter(pl.col("date").is_between(date(2010, 1, 1), date(2013, 2, 28)))
        expected.append({"symbol": symbol, "bars": bars.height, "top": bars["close"].max()})
    assert (found["store"], found["columns"], found["rows"]) == ("default", ["symbol", "bars", "top"], expected)
    shown = synced.run("query", sql, "--store", "default")
    assert "AAPL" in shown.stdout
    assert "2 rows from default" in shown.stderr


def test_a_query_as_json_is_json_even_where_a_value_is_not_finite(synced):
    sql = "SELECT CAST('NaN' AS DOUBLE) AS a, CAST('-inf' AS DOUBLE) AS b, CAST('1.5' AS DOUBLE) AS c"

    def refuse(word: str):
        raise AssertionError(f"{word} is no JSON")

    found = json.loads(synced.done("query", sql, "--json"), parse_constant=refuse)
    assert found["rows"] == [{"a": None, "b": None, "c": 1.5}]


# ---------------------------------------------------------------- plans


def test_plan_diff_says_what_an_edit_would_newly_ask_for_and_what_it_leaves(own, replica):
    before = len(replica.log)
    assert "0 requests would be sent" in own.done("plan", "diff", "daily")
    file = own.folder / "upstream.yml"
    file.write_text(file.read_text(encoding="utf-8").replace("[AAPL, IBM]", "[AAPL, GOOG]"), encoding="utf-8")
    (part,) = own.object("plan", "diff", "daily")["daily"]
    assert (part["new_subjects"], part["gone_subjects"]) == (["GOOG"], ["IBM"])
    assert part["requests"] >= 1
    out = own.done("plan", "diff")
    assert "new: GOOG" in out
    assert "rows stay: IBM" in out
    assert len(replica.log) == before


def test_plans_and_the_catalogue_are_objects_too(fresh):
    assert list(fresh.object("plan", "list")["plans"]) == ["daily", "more"]
    assert {one["name"] for one in fresh.object("providers")["providers"]} >= {"alpaca", "tushare", "nasdaq_data_link"}
    assert "alpaca.daily_bars" in {one["name"] for one in fresh.object("datasets")["datasets"]}
    assert fresh.object("check", "upstream.yml")["files"][0]["problems"] == []


@pytest.mark.slow
def test_a_plan_that_was_added_by_hand_can_be_paused_resumed_and_cancelled(fresh, replica):
    fresh.done("plan", "add", "mine", "--dataset", "alpaca.daily_bars", "--symbols", "MSFT", "--since", "2013-02-01",
               "--until", "2013-02-28")  # fmt: skip
    assert "mine" in fresh.done("pause", "mine")
    before = len(replica.log)
    held = fresh.run("sync", "mine", "--json")
    assert (held.returncode, json.loads(held.stdout)["state"]) == (4, "paused")
    assert len(replica.log) == before
    assert "paused by hand" in fresh.done("status", "mine")
    fresh.done("cancel", "mine")
    assert "cancelled by hand" in fresh.done("status", "mine")
    fresh.done("resume", "mine")
    assert fresh.object("sync", "mine")["state"] == "completed"


def test_a_schedule_is_printed_for_cron_and_for_systemd(fresh):
    cron = fresh.done("schedule", "--print", "cron", "daily").splitlines()
    assert cron[0] == "CRON_TZ=America/New_York"
    assert cron[1].startswith("0 19 * * 1-5 ")
    assert cron[1].endswith(f"sync daily -c {fresh.folder / 'upstream.yml'} --local --wait")
    systemd = fresh.done("schedule", "--print", "systemd")
    assert "OnCalendar=Mon..Fri *-*-* 19:0:00 America/New_York" in systemd
    assert "SuccessExitStatus=3 4 75" in systemd


@pytest.mark.parametrize(
    ("cron", "days"),
    [
        ("0 19 * * 0-4", "Sun,Mon,Tue,Wed,Thu "),  # the week of systemd begins on Monday: it refuses Sun..Thu
        ("0 19 * * */2", "Sun,Tue,Thu,Sat "),
        ("0 19 * * 1-5/2", "Mon,Wed,Fri "),
        ("0 19 * * 5-7", "Fri..Sun "),
        ("0 19 * * 0", "Sun "),
        ("0 19 * * *", ""),
    ],
)
def test_weekdays_are_written_as_systemd_takes_them(cron, days):
    assert on_calendar(cron, "UTC") == f"{days}*-*-* 19:0:00 UTC"


# ---------------------------------------------------------------- the replica


def test_the_replica_serves_on_its_port_with_faults_and_a_log_until_it_is_told_to_stop(fresh):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (fresh.folder / "faults.yml").write_text("- {fault: server_error, when: {request: 1}}\n", encoding="utf-8")
    process = fresh.start(
        "replica", "--port", str(port), "--data", "generated:100", "--faults", "faults.yml", "--log", "log.jsonl"
    )
    try:
        assert process.stderr is not None
        assert f"http://127.0.0.1:{port}" in process.stderr.readline()
        headers = {"APCA-API-KEY-ID": "REPLICA-KEY", "APCA-API-SECRET-KEY": "replica-secret"}
        query = {"symbols": "AAAA", "timeframe": "1Day", "start": "2000-01-03", "end": "2000-02-01"}
        statuses = []
        for _ in range(2):
            answer = requests.get(f"http://127.0.0.1:{port}/v2/stocks/bars", params=query, headers=headers, timeout=20)
            statuses.append(answer.status_code)
    finally:
        process.send_signal(signal.SIGINT)
        try:
            _, err = process.communicate(timeout=30)
        finally:
            process.kill()
    assert statuses == [500, 200]
    assert process.returncode in (0, 4)
    assert "Traceback" not in err
    lines = [json.loads(line) for line in (fresh.folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert (lines[0]["status"], lines[0]["provider"], lines[0]["verdict"]) == (500, "alpaca", "retry")
    for name in ("received", "answered", "provider", "account", "request", "status", "verdict"):
        assert name in lines[1]
    assert "REPLICA-KEY" not in json.dumps(lines)


# ---------------------------------------------------------------- wrong inputs

WRONG = [
    # (command, what the sentence must name, what it must tell to do)
    (["sync", "nosuch"], "nosuch", "daily"),
    (["sync", "-c", "nowhere.yml"], "nowhere.yml", ""),
    (["sync", "daily", "--since", "tomorrow"], "tomorrow", "2024-01-31"),
    (["sync", "daily", "--until", "2010-13-01"], "2010-13-01", "2024-01-31"),
    (["sync", "daily", "--prefect", "--local"], "--prefect and --local", "exclude"),
    (["sync", "daily", "--only", "NOPE"], "NOPE", ""),
    (["sync", "daily", "--frobnicate"], "--frobnicate", ""),
    (["status", "--watch", "--json"], "--watch and --json", "one object"),
    (["frobnicate"], "frobnicate", ""),
    (["estimate", "nosuch"], "nosuch", "daily"),
    (["status", "nosuch"], "nosuch", "daily"),
    (["pause", "nosuch"], "nosuch", "daily"),
    (["resume", "nosuch"], "nosuch", "daily"),
    (["cancel", "nosuch"], "nosuch", "daily"),
    (["report", "nosuch"], "nosuch", "marketsync sync"),
    (["explain", "alpaca.daily_bars", "IBM", "yesterday"], "yesterday", "2024-01-31"),
    (["explain", "alpaca.daily_bar", "IBM", "2012-01-03"], "daily_bar", "daily_bars"),
    (["explain", "IBM", "IBM", "2012-01-03"], "IBM", "."),
    (["query", "SELECT 1", "--store", "nosuch"], "nosuch", "default"),
    (["query", "SELECT * FROM alpaca.nosuch"], "nosuch", ""),
    (["query", "SELEKT"], "SELEKT", ""),
    (["plan", "diff", "nosuch"], "nosuch", "daily"),
    (["plan", "add", "daily", "--dataset", "alpaca.daily_bars"], "daily", "--replace"),
    (["schedule", "--print", "cron", "more"], "more", "schedule"),
    (["check", "nowhere.yml"], "nowhere.yml", ""),
    (["replica", "--port", "0", "--data", "made-up"], "made-up", "bokeh"),
    (["replica", "--port", "0", "--faults", "nowhere.yml"], "nowhere.yml", ""),
    (["quickstart", "--directory", "."], "upstream.yml", "--directory"),
]


@pytest.mark.parametrize(("command", "named", "remedy"), WRONG, ids=[" ".join(wrong[0]) for wrong in WRONG])
def test_a_wrong_input_ends_with_2_and_says_what_and_what_next(synced, command, named, remedy):
    before = len(synced.replica.log)
    ended = synced.run(*command)
    said = ended.stderr + ended.stdout
    assert ended.returncode == 2, said
    assert named in said
    assert remedy in said
    assert len(synced.replica.log) == before


Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(params=["here", pytest.param("process", marks=pytest.mark.slow)])
def run(request) -> Run:
    """Run a command of a project: in this process by day, in its own in the slow tests."""
    return Project.run if request.param == "here" else Project.apart


BROKEN = {
    "no YAML": ("plans: [", "upstream.yml:"),
    "an unknown field": ("plan: {}\n", "upstream.yml:1"),
    "an unknown store": ("upstreams: {alpaca: }\nplans: {p: {datasets: [alpaca.daily_bars], stores: [x]}}\n", ":2"),
    "an unknown dataset": ("upstreams: {alpaca: }\nplans: {p: {datasets: [alpaca.daily], since: 2020-01-01}}\n", ":2"),
    "an unknown engine": ("stores: {default: 'oracle://x'}\n", ":1"),
}


@pytest.mark.parametrize("what", BROKEN)
@pytest.mark.parametrize("command", [["sync"], ["status", "--json"]], ids=["sync", "status"])
def test_a_broken_file_is_told_with_its_line_whatever_the_command(fresh, run, what, command):
    text, place = BROKEN[what]
    (fresh.folder / "upstream.yml").write_text(text, encoding="utf-8")
    ended = run(fresh, *command)
    assert ended.returncode == 2
    assert place in ended.stderr
    if "--json" in command:
        assert json.loads(ended.stdout)["errors"]
    else:
        assert ended.stdout == ""


def test_a_secret_without_a_value_names_both_places_for_it(fresh):
    for secret in (fresh.folder / ".secrets").iterdir():
        secret.unlink()
    ended = fresh.run("sync", "daily", "--json")
    assert ended.returncode == 2
    assert "ALPACA_KEY_ID" in ended.stderr
    assert ".secrets" in ended.stderr
    assert json.loads(ended.stdout)["errors"]


def test_arguments_that_are_wrong_are_told_in_an_object_too(fresh):
    ended = fresh.run("sync", "daily", "--frobnicate", "--json")
    assert ended.returncode == 2
    assert "--frobnicate" in ended.stderr
    assert json.loads(ended.stdout)["errors"]


# ---------------------------------------------------------------- what nobody foresaw

UNFORESEEN = """
import sys
from cli.main import main
import tasks.inquiry
from providers.redaction import hide
def status(*_, **__):
    hide(["sesame-sesame"])
    raise Unforeseen("of http://host/?q=sesame-sesame")
class Unforeseen(BaseException):
    "Not even an Exception, as a panic of polars is not."
tasks.inquiry.status = status
sys.argv = ["marketsync", *sys.argv[1:]]
main()
"""


def unforeseen(project: Project, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `marketsync status` where it fails as nobody foresaw, with a secret in the words."""
    return subprocess.run(
        [sys.executable, "-c", UNFORESEEN, "status", *arguments],
        cwd=project.folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_an_error_that_nobody_foresaw_is_one_line_and_names_the_file_that_keeps_the_details(own):
    ended = unforeseen(own, "--json")
    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    assert "Unforeseen" in line
    assert "MARKETSYNC_DEBUG=1" in line
    assert json.loads(ended.stdout)["errors"] == [{"message": line}]
    (kept,) = (own.folder / ".marketsync").glob("error-*.txt")
    assert str(kept) in line
    details = kept.read_text(encoding="utf-8")
    assert "Traceback" in details
    assert "sesame" not in details + ended.stderr + ended.stdout


def test_the_traceback_of_such_an_error_is_shown_to_who_asks_for_it(own):
    ended = unforeseen(own, MARKETSYNC_DEBUG="1")
    assert ended.returncode == 1
    assert "Traceback" in ended.stderr
    assert "sesame" not in ended.stderr


def test_a_command_whose_output_was_closed_does_its_work_all_the_same(fresh):
    done = subprocess.run(
        f"{sys.executable} -m cli sync daily >&- 2>&-; echo $?",
        shell=True,
        cwd=fresh.folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout == "0\n"
    assert fresh.object("status", "daily")["datasets"][0]["rows"] == ROWS


def test_a_sync_that_has_nothing_to_ask_loads_no_heavy_library(own):
    """Process start is paid for by every nightly run."""
    code = (
        "import sys; sys.argv = ['marketsync', 'sync', 'daily', '--local', '--json']\n"
        "from cli.main import main\n"
        "try: main()\n"
        "except SystemExit as ended: assert not ended.code, ended.code\n"
        "heavy = {'prefect', 'pandas', 'exchange_calendars', 'great_expectations', 'chdb', 'clickhouse_connect'}\n"
        "sys.stderr.write(repr(sorted(heavy & set(sys.modules))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=own.folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["requests"]["sent"] == 0
    assert done.stderr.endswith("[]"), done.stderr
