"""What the questions about a plan answer (estimate, status, explain, plan diff, check) while things are not as they
should be: refused requests, ticks, lists without dates, edited schemas, children of datasets that are not here yet.

A provider on a real socket, a Delta store, the command's own steps; the command line itself where its words matter.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import date, timedelta
from pathlib import Path

import command_here
import pytest

from cli.main import build
from marketsync.clock import ManualClock
from marketsync.errors import ConfigurationError, ExitCode, SchemaConflict
from marketsync.ledger import Desired
from marketsync.report import RunState
from tasks import inquiry
from tasks.sync import sync
from tasks.workspace import Options, Workspace, close_workspaces, open_workspace
from tests.providers.loopback import Loopback, answer

ROOT = Path(__file__).parent.parent
DEFINITION = """\
provider: acme
base_url: {url}
attempts: 1
faults:
  - {{when: {{status: 400}}, then: drop, say: message}}
  - {{when: {{status: 503}}, then: retry, say: message}}
datasets:
  codes:
    request: {{path: /codes}}
    schema: {{code: str, name: str}}
    key: [code]
    subject: code
  facts:
    request: {{path: /facts}}
    schema: {{id: i64, name: str}}
    key: [id]
  bars:
    over: {{symbol: {{universe: $plan}}, window: 1 year}}
    request: {{path: /bars, query: {{s: $symbol, from: $window.start, to: $window.last}}}}
    schema: {{symbol: {{type: str, value: $symbol}}, day: {{type: date}}, close: f64}}
    key: [symbol, day]
  child:
    over: {{code: {{rows: codes}}, window: 1 year}}
    request: {{path: /child, query: {{c: $code, from: $window.start, to: $window.last}}}}
    schema: {{code: {{type: str, value: $code}}, day: date, close: f64}}
    key: [code, day]
  ticks:
    over: {{symbol: {{universe: $plan}}, window: 1 day}}
    frequency: irregular
    request: {{path: /ticks, query: {{s: $symbol, from: $window.start, to: $window.end}}}}
    page: {{token: next, send: token, cap: 1000}}
    response: {{rows: ticks}}
    schema: {{symbol: {{type: str, value: $symbol}}, at: datetime, price: f64}}
    key: [symbol, at]
"""
UPSTREAM = """\
upstreams:
  acme: {definition: ./acme.yml, tuning: {back_off: 1 second, threads: 1}}
stores:
  default: delta://./data
plans:
  bars: {datasets: acme.bars, universe: [A, B, C], since: 2020-01-01, until: 2020-12-31}
  lists: {datasets: [acme.codes, acme.facts]}
  ticks: {datasets: acme.ticks, universe: [A, B], since: 2020-01-01, until: 2020-01-10}
  family: {datasets: [acme.child, acme.codes], since: 2020-01-01, until: 2020-12-31}
"""


class Place:
    """A folder with a configuration, and the provider that it asks."""

    def __init__(self, folder: Path, server: Loopback):
        self.folder, self.server = folder, server
        self.config = folder / "upstream.yml"
        self.define(DEFINITION)
        self.config.write_text(UPSTREAM)
        server.routes["/codes"] = self.gives(b'[{"code": "X", "name": "one"}, {"code": "Y", "name": "two"}]')
        server.routes["/facts"] = self.gives(b'[{"id": 1, "name": "one"}]')
        server.routes["/bars"] = self.bars
        server.routes["/child"] = self.gives(b'[{"day": "2020-03-02", "close": 1.5}]')
        self.refused: dict[str, bytes] = {}

    def gives(self, body: bytes):
        return lambda connection, request: connection.sendall(answer(body))

    def bars(self, connection, request) -> None:
        symbol = request.path.partition("s=")[2][:1]
        if symbol in self.refused:
            connection.sendall(self.refused[symbol])
        else:
            connection.sendall(answer(b'[{"day": "2020-03-02", "close": 1.5}]'))

    def define(self, text: str) -> None:
        (self.folder / "acme.yml").write_text(text.format(url=self.server.url))

    def sync(self, plan: str, **options) -> RunState:
        return sync(self.config, [plan], Options(**options))[0].state

    def workspace(self) -> Workspace:
        close_workspaces()
        return Workspace(self.config)

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return command_here.run(self.folder, *arguments)


@pytest.fixture
def place(tmp_path: Path, calendars: Path) -> Iterator[Place]:
    server = Loopback()
    (tmp_path / ".marketsync").mkdir()
    (tmp_path / ".marketsync" / "calendars").symlink_to(calendars)
    yield Place(tmp_path, server)
    close_workspaces()
    server.close()


def explained(place: Place, dataset: str, subject: str, day: date | None) -> list[str]:
    workspace = place.workspace()
    try:
        return list(inquiry.explain(workspace, dataset, subject, day).lines)
    finally:
        workspace.close()


# ---------------------------------------------------------------- explain


def test_a_row_that_was_asked_for_in_vain_is_explained_with_the_providers_words_and_the_way_to_retry(place):
    place.refused["B"] = answer(b'{"message": "B is not a share"}', "400 Bad Request")
    assert place.sync("bars").exit_code is ExitCode.FINDINGS
    said = explained(place, "acme.bars", "B", date(2020, 3, 2))[-1]
    assert said.startswith("default has none: the provider refused the request, and it was dropped on 20")
    assert "B is not a share" in said
    assert said.endswith("`marketsync sync bars --retry-failed --only B`.")
    assert "has 1 row of A" in explained(place, "acme.bars", "A", date(2020, 3, 2))[-1]


def test_a_request_that_failed_is_told_with_when_and_why(place):
    place.refused["B"] = answer(b'{"message": "out for lunch"}', "503 Unavailable")
    place.sync("bars")
    said = explained(place, "acme.bars", "B", date(2020, 3, 2))[-1]
    assert said.startswith("default has none: the request failed on 20")
    assert "out for lunch" in said
    assert said.endswith("run `marketsync sync bars` to ask again.")


def test_what_was_cancelled_by_hand_is_not_called_never_asked(place):
    place.refused["B"] = answer(b"{}", "503 Unavailable")
    place.sync("bars")
    workspace = place.workspace()
    workspace.ledger.retry("bars", "acme.bars")
    workspace.ledger.cancel_work("bars")
    workspace.close()
    assert "cancelled by hand" in explained(place, "acme.bars", "B", date(2020, 3, 2))[-1]


def test_a_list_without_dates_is_explained_without_a_day_and_whatever_the_day(place):
    assert place.sync("lists") is RunState.COMPLETED
    for day in (None, date(2001, 1, 1)):
        lines = explained(place, "acme.codes", "X", day)
        assert lines[0] == "acme.codes is a list without dates: this is how it stands, whatever the day."
        assert lines[-1].startswith("default has 1 row of X; the first came with segment acme.codes-")
        assert not any("not wanted" in line for line in lines)
    gone = explained(place, "acme.codes", "Z", None)
    assert gone[-1] == "default has none: the provider was asked and gave no row of Z."


def test_rows_that_name_no_symbol_are_told_as_such(place):
    place.sync("lists")
    lines = explained(place, "acme.facts", "anything", None)
    assert lines[1] == (
        "acme.facts has no column for a symbol (`subject:` in its definition names one): "
        "what is told here is true of all its rows."
    )
    assert lines[-1].startswith("default has 1 row; the first came with segment")


def test_rows_with_a_time_need_a_day_and_a_dataset_must_be_there(place):
    with pytest.raises(ConfigurationError, match="say which day"):
        explained(place, "acme.bars", "A", None)
    with pytest.raises(ConfigurationError, match=r"did you mean acme\.bars\?"):
        explained(place, "acme.bar", "A", None)


def test_a_symbol_outside_of_the_universe_is_never_asked_and_a_child_waits_for_its_parent(place):
    assert "NO is not in the universe of plan bars" in explained(place, "acme.bars", "NO", date(2020, 3, 2))[-1]
    assert "acme.child has not been asked yet" in explained(place, "acme.child", "X", date(2020, 3, 2))[-1]


def test_a_symbol_that_another_plan_asks_for_need_not_be_added_to_this_one(place):
    more = "  more: {datasets: acme.bars, universe: [D], since: 2020-01-01, until: 2020-12-31}\n"
    place.config.write_text(UPSTREAM + more)
    place.sync("more")
    said = explained(place, "acme.bars", "D", date(2020, 3, 2))
    assert "plan bars: D is not in its universe; plan more asks for it." in said
    assert not any("add it" in line for line in said)
    assert "default has 1 row of D on 2020-03-02" in said[-1]


# ---------------------------------------------------------------- status


def test_a_symbol_more_is_the_only_one_that_is_not_covered_yet(place):
    place.sync("bars")
    place.config.write_text(UPSTREAM.replace("universe: [A, B, C]", "universe: [A, B, C, D, E]"))
    workspace = place.workspace()
    (bars,) = inquiry.status(workspace, "bars").datasets
    workspace.close()
    assert (bars.subjects, bars.uncovered, bars.covered_until.date()) == (5, 2, date(2021, 1, 1))
    assert "5 subjects, covered until 2021-01-01 except for 2 subjects" in place.run("status", "bars").stdout


def test_the_leases_of_a_process_that_was_killed_are_not_called_running(place):
    arrived = threading.Event()

    def hangs(connection, request) -> None:
        arrived.set()
        connection.recv(1)  # until the asking process is gone

    place.server.routes["/bars"] = hangs
    running = subprocess.Popen(
        [sys.executable, "-m", "cli", "sync", "bars", "--local"],
        cwd=place.folder,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "HOME": str(place.folder)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    assert arrived.wait(60)
    said = place.run("status", "bars").stdout
    assert "bars: running" in said
    assert " leased" in said
    running.kill()
    running.wait()
    said = place.run("status", "bars").stdout
    assert "bars: not ended" in said
    assert " left by a process that is gone" in said


# ---------------------------------------------------------------- estimate


def test_what_cannot_be_known_is_estimated_as_a_least_and_not_as_a_number(place):
    workspace = place.workspace()
    ticks = inquiry.estimate(workspace, "ticks").datasets[0]
    assert (ticks.requests, ticks.units, ticks.rows, ticks.at_least) == (20, 20, None, True)
    assert not inquiry.estimate(workspace, "bars").at_least
    assert inquiry.status(workspace, "ticks").datasets[0].owed_at_least
    assert inquiry.diff(workspace, "ticks")[0].at_least
    workspace.close()
    told = place.run("estimate", "ticks")
    assert told.stdout.startswith("acme.ticks: at least 20 requests for 2 subjects in 20 units\n")
    assert "complete on" not in told.stdout or "at the earliest" in told.stdout
    assert json.loads(place.run("estimate", "ticks", "--json").stdout)["at_least"] is True
    assert "owed: 20 units, at least 20 requests" in place.run("status", "ticks").stdout


def test_minute_bars_of_a_market_that_never_closes_are_estimated_with_its_own_hours(place):
    place.define(DEFINITION.replace("frequency: irregular", "frequency: minute\n    calendar: 24/7"))
    (ticks,) = inquiry.estimate(place.workspace(), "ticks").datasets
    assert (ticks.rows, ticks.requests) == (2 * 10 * 1440, 2 * 10 * 2)  # at most 1,000 a page
    place.define(DEFINITION.replace("frequency: irregular", "frequency: minute\n    calendar: XNYS"))
    (ticks,) = inquiry.estimate(place.workspace(), "ticks").datasets
    assert ticks.rows == 2 * 7 * 390


def test_pages_of_a_size_that_nobody_tells_are_not_counted_by_a_guess(place):
    place.define(DEFINITION.replace("page: {{token: next, send: token, cap: 1000}}", "page: {{token: n, send: t}}"))
    workspace = place.workspace()
    assert inquiry.estimate(workspace, "ticks").at_least
    workspace.close()


# ---------------------------------------------------------------- a parent and its child


@pytest.mark.slow
def test_a_parent_and_its_child_can_be_estimated_looked_at_and_synced_from_nothing(place):
    before = place.run("estimate", "family")
    assert before.returncode == 0
    assert "acme.child: not known yet: acme.child asks over the rows of acme.codes" in before.stdout
    assert "acme.codes: 1 request for 1 subject in 1 unit" in before.stdout
    assert "nothing is owed" not in before.stdout
    assert place.run("status", "family").returncode == 0
    assert "not known yet" in place.run("plan", "diff", "family").stdout
    done = place.run("sync", "family", "--json")
    report = json.loads(done.stdout)
    assert (done.returncode, report["state"], report["requests"]["sent"]) == (0, "completed", 3), done.stderr
    counted = {part["dataset"]: part["size"]["rows"] for part in report["datasets"]}
    assert counted == {"acme.child": 2, "acme.codes": 2}
    after = place.run("estimate", "family")
    assert "acme.child: 0 requests for 2 subjects" in after.stdout
    assert "acme.child in default: 2 subjects, covered until 2021-01-01, 2 rows" in place.run("status", "family").stdout


def test_a_limit_per_month_that_names_no_reset_can_be_worked_under(place):
    place.define(DEFINITION.replace("attempts: 1\n", "attempts: 1\nlimits: [{{requests: 1000, per: month}}]\n"))
    place.config.write_text(UPSTREAM.replace("threads: 1", "threads: 2"))
    assert place.sync("bars") is RunState.COMPLETED


# ---------------------------------------------------------------- where the mistake is


def test_rows_that_are_elsewhere_are_told_with_the_file_line_and_field_and_the_whole_remedy(place):
    place.define(DEFINITION.replace("    frequency: irregular\n", "").replace("rows: ticks", "rows: tiks"))
    place.server.routes["/ticks"] = place.gives(b'{"ticks": [], "next": null}')
    (error,) = json.loads(place.run("sync", "ticks", "--local", "--json").stdout)["errors"]
    said = error["message"]
    line = DEFINITION.replace("    frequency: irregular\n", "").split("{rows: ticks}")[0].count("\n") + 1
    assert f"acme.yml:{line}: datasets.ticks.response.rows: the answer holds no 'tiks': it has" in said
    assert "{when: {path: {tiks: null}}, then: empty}" in said


def test_a_secret_without_a_value_is_told_with_the_line_that_asks_for_it(place):
    place.define("auth: {{headers: {{Key: $secret.ACME_KEY}}}}\n" + DEFINITION)
    done = place.run("sync", "bars", "--local")
    assert done.returncode == 2
    assert "acme.yml:1: auth.headers.Key: the secret ACME_KEY has no value" in " ".join(done.stderr.split())


# ---------------------------------------------------------------- what a run is asked to do beside its plan


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (Options(only=("Q",)), "plan bars does not ask for Q"),
        (Options(only=("A", "Q")), "plan bars does not ask for Q"),
        (Options(since=date(2020, 6, 1), until=date(2020, 5, 1)), "swap them"),
        (Options(since=date(2021, 6, 1)), r"since 2021-06-01 \(--since\) is after until 2020-12-31 of plan bars"),
        (Options(until=date(2019, 6, 1)), r"since 2020-01-01 of plan bars is after until 2019-06-01 \(--until\)"),
        (Options(since=date(9000, 1, 1), until=date(9001, 1, 1)), "is in the future"),
    ],
)
def test_options_that_can_only_come_to_nothing_are_refused(place, options, why):
    workspace = place.workspace()
    with pytest.raises(ConfigurationError, match=why):
        inquiry.refuse_nothing(workspace, ["bars"], options)
    workspace.close()


def test_a_symbol_that_one_of_the_plans_asks_for_is_enough_and_unknown_children_are_not_judged(place):
    workspace = place.workspace()
    inquiry.refuse_nothing(workspace, ["bars", "lists"], Options(only=("A",)))
    inquiry.refuse_nothing(workspace, ["family"], Options(only=("Q",)))
    with pytest.raises(ConfigurationError, match=r"acme\.codes, acme\.facts is asked for all symbols at once"):
        inquiry.refuse_nothing(workspace, ["lists"], Options(only=("A",)))
    inquiry.refuse_nothing(workspace, ["bars"], Options(since=date(2020, 5, 1), until=date(2020, 5, 1), only=("B",)))
    workspace.close()


def test_the_command_ends_with_2_before_anything_is_asked(place):
    for arguments in (["--only", "Q"], ["--since", "2020-06-01", "--until", "2020-05-01"]):
        done = place.run("sync", "bars", *arguments)
        assert done.returncode == int(ExitCode.CONFIGURATION), done.stdout
        assert done.stderr.count("\n") == 1
    assert place.server.received == []


# ---------------------------------------------------------------- what a report says of a run that came to no end


@pytest.mark.slow
def test_a_paused_plan_says_why_nothing_was_asked_and_how_it_goes_on(place):
    assert place.run("pause", "bars").returncode == 0
    done = place.run("sync", "bars")
    assert done.returncode == int(ExitCode.PAUSED)
    assert "paused: plan bars is paused by hand; `marketsync resume bars` lets it run" in " ".join(done.stdout.split())
    assert "paused :" not in done.stdout
    (step,) = json.loads(place.run("sync", "bars", "--json").stdout)["next_steps"]
    assert step["command"] == "marketsync resume bars"
    assert place.run("resume", "bars").returncode == 0
    assert place.run("sync", "bars").returncode == 0


@pytest.mark.slow
def test_a_run_that_is_paused_while_it_asks_says_so_too(place):
    def pauses(connection, request) -> None:
        open_workspace(place.config).ledger.set_control("bars", Desired.PAUSE)
        connection.sendall(answer(b'[{"day": "2020-03-02", "close": 1.5}]'))
        time.sleep(1.0)  # the worker polls every half second

    place.server.routes["/bars"] = pauses
    report = sync(place.config, ["bars"])[0]
    assert report.state is RunState.PAUSED
    assert [remark.kind for remark in report.remarks] == ["paused"]
    assert "marketsync resume bars" in report.remarks[0].message
    assert report.next_steps[0].command == "marketsync resume bars"


@pytest.mark.slow
def test_maintenance_is_told_with_the_file_that_says_it(place):
    place.config.write_text("maintenance: true\n" + UPSTREAM)
    done = place.run("sync", "bars", "--json")
    (remark,) = json.loads(done.stdout)["remarks"]
    assert (done.returncode, remark["kind"]) == (int(ExitCode.PAUSED), "maintenance")
    assert str(place.config) in remark["message"]


def test_what_this_machine_says_is_not_put_into_the_providers_mouth(place):
    place.define(DEFINITION.replace("{url}", "http://127.0.0.1:9"))
    done = place.run("sync", "bars", "--json")
    messages = [error["message"] for error in json.loads(done.stdout)["errors"]]
    assert done.returncode == int(ExitCode.FAILED)
    assert messages
    for message in messages:
        assert "refused" in message
        assert "it says" not in message


def test_a_killed_run_is_not_called_running_for_ever(place):
    workspace = place.workspace()
    workspace.ledger.open_run("bars")
    assert inquiry.status(workspace, "bars").running
    workspace.clock = ManualClock(workspace.clock.now() + timedelta(minutes=5))
    found = inquiry.status(workspace, "bars")
    assert (found.running, found.last_state) == (False, "not ended")
    workspace.close()


def test_a_run_that_breaks_off_before_its_first_step_has_ended(place):
    def breaks(run) -> None:
        raise ConfigurationError("the progress display is broken")

    with pytest.raises(ConfigurationError):
        sync(place.config, ["bars"], begun=breaks)
    workspace = place.workspace()
    assert workspace.ledger.runs("bars")[0].ended is not None
    workspace.close()


def test_half_a_report_is_told_and_stops_no_run(place):
    assert place.sync("bars") is RunState.COMPLETED
    (kept,) = (place.folder / ".marketsync" / "reports").glob("*.json")
    kept.write_bytes(kept.read_bytes()[:100])
    done = place.run("report")
    assert (done.returncode, "Traceback" in done.stderr) == (1, False)
    assert f"the report {kept} cannot be read" in done.stderr
    assert place.sync("bars") is RunState.COMPLETED


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is always full")
def test_a_full_disk_is_told_as_such_and_a_wrong_place_as_usage(place):
    assert place.sync("bars") is RunState.COMPLETED
    full = place.run("report", "--html", "/dev/full")
    assert full.returncode == int(ExitCode.FAILED)
    assert full.stderr.startswith("the disk is full (No space left on device")
    assert "run again" in full.stderr
    wrong = place.run("report", "--html", str(place.folder / "data"))
    assert (wrong.returncode, "cannot be written" in wrong.stderr) == (int(ExitCode.CONFIGURATION), True)


# ---------------------------------------------------------------- a table whose file was overwritten


def test_a_list_is_counted_although_it_has_no_times(place):
    assert place.sync("lists") is RunState.COMPLETED
    parts = {part.dataset: part for part in inquiry.status(place.workspace(), "lists").datasets}
    assert (parts["acme.codes"].rows, parts["acme.codes"].watermark, parts["acme.codes"].problem) == (2, None, "")


def test_a_day_whose_row_was_set_aside_is_not_said_to_have_had_none(place):
    place.server.routes["/bars"] = place.gives(b'[{"day": "2020-03-02", "close": "n/a"}]')
    (report,) = sync(place.config, ["bars"], Options(only=("A",)))
    assert (report.rows.quarantined, report.state) == (1, RunState.COMPLETED_WITH_FINDINGS)
    (remark,) = [one for one in report.remarks if one.kind == "quarantined"]
    assert remark.message.startswith("1 row was set aside")
    assert "marketsync sync bars --refetch" in remark.message
    last = inquiry.explain(place.workspace(), "acme.bars", "A", date(2020, 3, 2)).lines[-1]
    assert "the 1 that were set aside" in last
    assert "quarantine/acme.bars" in last


@pytest.mark.slow
def test_a_damaged_table_is_told_by_every_question_and_fails_the_run(place):
    assert place.sync("bars") is RunState.COMPLETED
    (part,) = (place.folder / "data").rglob("*.parquet")
    part.write_bytes(b"x" * part.stat().st_size)
    for command, code in (
        (["query", "SELECT max(close) FROM acme.bars"], 1),
        (["status", "bars"], 0),
        (["explain", "acme.bars", "A", "2020-03-02"], 0),
        (["sync", "bars"], 1),
        (["report"], 0),
        (["report", "--html", "report.html"], 0),
    ):
        done = place.run(*command)
        said = " ".join((done.stdout + done.stderr).split())
        assert (done.returncode, "Traceback" in said) == (code, False), (command, said)
        if "--html" in command:
            said = (place.folder / "report.html").read_text()
        assert "cannot be read: parquet: File out of specification" in said, command
        assert "put the files back from a backup" in said, command
    assert place.run("sync", "bars", "--refetch").returncode == 1


# ---------------------------------------------------------------- edited schemas

EDITS = {
    "type": (
        "day: {{type: date}}, close: f64",
        "day: {{type: date}}, close: f32",
        "column 'close' was f64 and is now f32",
    ),
    "key": ("key: [symbol, day]", "key: [symbol, day, close]", "key was (symbol, day) and is now (symbol, day, close)"),
    "gone": ("day: {{type: date}}, close: f64", "day: {{type: date}}", "column 'close' is in the table and no longer"),
}


@pytest.mark.parametrize("edit", ["type", *(pytest.param(each, marks=pytest.mark.slow) for each in ("key", "gone"))])
def test_an_edit_that_a_table_cannot_follow_is_told_by_check_diff_and_sync_with_2(place, edit):
    assert place.sync("bars") is RunState.COMPLETED
    asked = len(place.server.received)
    old, new, what = EDITS[edit]
    assert old in DEFINITION
    place.define(DEFINITION.replace(old, new, 1))
    field = "key" if edit == "key" else "schema"
    line = DEFINITION[: DEFINITION.index(f"    {field}:", DEFINITION.index("  bars:"))].count("\n") + 1
    for command in (["check"], ["plan", "diff", "bars"], ["sync", "bars"]):
        done = place.run(*command)
        assert done.returncode == 2, (command, done.stdout, done.stderr)
        assert what in done.stdout + done.stderr
        assert "drop the table" in done.stdout + done.stderr
        assert f"acme.yml:{line}: datasets.bars.{field}" in done.stdout + done.stderr
        assert "Traceback" not in done.stderr
    assert "upstream.yml:6: plans.bars.datasets: store default: " in place.run("check").stdout
    assert len(place.server.received) == asked


def test_a_step_that_meets_such_a_table_ends_with_2_as_well(place):
    # as in a Prefect flow, which does not come by the command line
    place.sync("bars")
    close_workspaces()
    old, new, what = EDITS["type"]
    place.define(DEFINITION.replace(old, new, 1))
    with pytest.raises(SchemaConflict, match=what) as caught:
        place.sync("bars")
    assert caught.value.exit_code is ExitCode.CONFIGURATION


def test_a_column_more_is_no_conflict_and_checking_makes_nothing(place):
    shutil.rmtree(place.folder / ".marketsync")
    assert place.run("check").returncode == 0
    assert not (place.folder / ".marketsync").exists()
    assert not (place.folder / "data").exists()
    place.sync("bars")
    place.define(
        DEFINITION.replace("close: f64}}\n    key: [symbol, day]", "close: f64, more: i64}}\n    key: [symbol, day]")
    )
    assert place.run("check").returncode == 0
    told = place.run("plan", "diff", "bars")
    assert (told.returncode, "new columns: more" in told.stdout) == (0, True)


def test_a_run_after_a_new_column_says_that_older_rows_are_null_there_and_how_to_fill_them(place):
    place.sync("bars")
    place.define(
        DEFINITION.replace("day: {{type: date}}, close: f64", "day: {{type: date}}, close: f64, volume: i64", 1)
    )
    close_workspaces()
    (report,) = sync(place.config, ["bars"])
    (remark,) = [remark for remark in report.remarks if remark.kind == "schema"]
    assert "new in the definition: volume; older rows are null there" in remark.message
    assert "`marketsync sync bars --refetch` fills them all, with `--since DAY` those from a day on" in remark.message


def test_every_command_can_be_built_alone():
    assert build(["plan"]).registered_groups
