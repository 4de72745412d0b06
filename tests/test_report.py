"""The report of a run: what it says by itself, and that every rendering says it safely and in bounded space."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from marketsync.errors import ExitCode
from marketsync.rendering import drawings, terminal, words
from marketsync.rendering.html import html
from marketsync.rendering.markdown import markdown
from marketsync.report import (
    DatasetReport,
    Freshness,
    FreshState,
    Hole,
    HoleState,
    Judgement,
    MonthCoverage,
    NextStep,
    QuotaLeft,
    Remark,
    RequestCounts,
    RowCounts,
    RunReport,
    RunState,
    SubjectCoverage,
    TableSize,
    Unexpected,
    Unsound,
    Watermark,
    WorkCounts,
    state_after,
    suggested,
    watermarks_of,
)

STARTED = datetime(2025, 4, 1, 2, 0, 7, tzinfo=UTC)


def judgement(**more) -> Judgement:
    whole = {
        "dataset": "alpaca.daily_bars",
        "store": "default",
        "calendar": "XNYS",
        "frequency": "session",
        "since": date(2025, 1, 2),
        "until": date(2025, 4, 1),
        "sessions": 60,
        "expected": 120,
        "present": 120,
        "rows": 120,
        "subjects": (
            SubjectCoverage(subject="AAPL", first=date(2025, 1, 2), last=date(2025, 3, 31), expected=60, present=60),
            SubjectCoverage(subject="IBM", first=date(2025, 1, 2), last=date(2025, 3, 31), expected=60, present=60),
        ),
        "months": MonthCoverage(
            months=("2025-01", "2025-02", "2025-03"),
            subjects=("AAPL", "IBM"),
            expected=((20, 19, 21), (20, 19, 21)),
            present=((20, 19, 21), (20, 19, 21)),
            explained=((0, 0, 0), (0, 0, 0)),
            rows=(40, 38, 42),
        ),
        "freshness": Freshness(promise="19:00 America/New_York", state=FreshState.ON_TIME, session=date(2025, 3, 31)),
    }
    return Judgement(**{**whole, **more})


def good() -> RunReport:
    part = DatasetReport(
        dataset="alpaca.daily_bars",
        store="default",
        store_url="delta://./data",
        rows=RowCounts(fetched=125, inserted=120, duplicates=5),
        size=TableSize(rows=120, bytes=9_000, files=1, commits=2, location="data/alpaca.daily_bars"),
        watermarks=(
            Watermark(subject="AAPL", oldest="2025-01-02", newest="2025-03-31"),
            Watermark(subject="IBM", oldest="2025-01-02", newest="2025-03-31"),
        ),
        judgement=judgement(),
    )
    return RunReport(
        run="r-1",
        plan="nightly",
        seconds=12.4,
        started=STARTED,
        ended=STARTED + timedelta(seconds=12),
        work=WorkCounts(units=6, done=5, empty=1),
        requests=RequestCounts(sent=8, retried=1),
        rows=part.rows,
        bytes=45_678,
        datasets=(part,),
        quotas=(QuotaLeft(account="alpaca", limit="200 per minute", allowed=200, used=8),),
        timings={"plan": 0.1, "fetch": 10.0, "deliver": 2.0, "judge": 0.2},
        version="0.1.0",
    )


def troubled() -> RunReport:
    holes = (
        Hole(
            state=HoleState.MISSING,
            first=date(2025, 3, 5),
            last=date(2025, 3, 6),
            sessions=2,
            subjects=("IBM",),
            reason="not in the provider's answer",
        ),
        Hole(
            state=HoleState.EXPLAINED,
            first=date(2025, 2, 3),
            last=date(2025, 2, 3),
            sessions=1,
            subjects=("AAPL", "IBM"),
            reason="halted",
        ),
    )
    part = replace(
        good().datasets[0],
        judgement=judgement(
            present=116,
            missing=2,
            explained=2,
            holes=holes,
            unexpected=(Unexpected(subject="IBM", day=date(2025, 3, 8)),),
            unexpected_rows=1,
            unsound=(Unsound(rule="volume below zero", rows=1, examples=("IBM 2025-03-07 volume -1",)),),
            freshness=Freshness(
                promise="19:00 America/New_York",
                state=FreshState.LATE,
                session=date(2025, 3, 31),
                behind=("IBM",),
                late_seconds=7200,
            ),
        ),
    )
    return replace(
        good(),
        state=RunState.FAILED,
        work=WorkCounts(units=8, done=5, empty=1, dropped=1, failed=1),
        success_rate=None,
        datasets=(part,),
        findings=(),
        errors=(Remark(kind="failed", dataset="alpaca.daily_bars", subject="XYZ", message="time-out after 5 tries"),),
        remarks=(
            Remark(
                kind="dropped",
                dataset="alpaca.daily_bars",
                subject="APPL",
                message='422: invalid symbol "APPL"',
                request="GET /v2/stocks/bars?symbols=APPL",
                count=3,
            ),
        ),
        left_out={"dropped": 7},
        next_steps=(
            NextStep(
                command="marketsync sync nightly", why="asks again for 1 failed unit, once what is told above is mended"
            ),
        ),
    )


# ---------------------------------------------------------------- the model


def test_json_begins_with_the_stable_keys_in_their_order_and_comes_back_whole():
    report = replace(troubled(), resume_at=datetime(2025, 4, 2, tzinfo=UTC))
    said = json.loads(report.to_json())
    assert list(said)[:10] == [
        "run", "plan", "state", "seconds", "work", "requests", "rows", "bytes", "resume_at", "errors",
    ]  # fmt: skip
    assert set(said["work"]) >= {"units", "done", "empty", "not_yet", "waiting", "dropped", "failed", "cancelled"}
    assert set(said["requests"]) == {"sent", "retried", "cool_downs"}
    assert set(said["rows"]) == {"fetched", "inserted", "updated", "unchanged", "duplicates", "quarantined"}
    assert said["state"] == "failed"
    assert said["resume_at"] == "2025-04-02T00:00:00Z"
    assert said["datasets"][0]["judgement"]["holes"][0]["first"] == "2025-03-05"
    assert RunReport.from_json(report.to_json()) == report


def test_what_is_no_report_is_refused():
    with pytest.raises(ValueError, match="this is not a run's report"):
        RunReport.from_json('{"run": 1}')


def test_the_success_rate_counts_units_that_came_to_an_end():
    assert good().success_rate == 1.0
    assert troubled().success_rate == 0.75
    assert RunReport(run="r", plan="p", work=WorkCounts(units=3, waiting=3)).success_rate is None


def test_findings_follow_from_the_judgement():
    assert good().findings == ()
    assert troubled().findings == (
        "alpaca.daily_bars: 2 sessions missing of 120 expected",
        "alpaca.daily_bars: 1 row on days without a session",
        "alpaca.daily_bars: 1 row with volume below zero, such as IBM 2025-03-07 volume -1",
        "alpaca.daily_bars: 1 subject without 2025-03-31, due 19:00 America/New_York",
    )


def test_a_share_of_missing_sessions_can_be_allowed():
    assert judgement(missing=2, present=118, allowed_missing=0.02).findings == []
    assert judgement(missing=3, present=117, allowed_missing=0.02).findings != []


def test_completeness_leaves_out_what_is_not_yet_due():
    assert judgement(present=100, not_yet=20).completeness == 1.0
    assert judgement(present=90, missing=10, not_yet=20).completeness == 0.9
    assert judgement(expected=0, present=0).completeness is None


@pytest.mark.parametrize(
    ("what", "state", "code"),
    [
        ({}, RunState.COMPLETED, ExitCode.DONE),
        ({"findings": True}, RunState.COMPLETED_WITH_FINDINGS, ExitCode.FINDINGS),
        ({"findings": True, "waits_for_quota": True}, RunState.WAITING_FOR_QUOTA, ExitCode.WAITING),
        ({"waits_for_publication": True}, RunState.WAITING_FOR_PUBLICATION, ExitCode.WAITING),
        ({"paused": True, "waits_for_quota": True}, RunState.PAUSED, ExitCode.PAUSED),
        ({"cancelled": True, "paused": True}, RunState.CANCELLED, ExitCode.PAUSED),
        ({"stopped": True, "cancelled": True, "findings": True}, RunState.FAILED, ExitCode.FAILED),
    ],
)
def test_the_gravest_thing_that_happened_is_the_state(what, state, code):
    assert state_after(WorkCounts(units=1, done=1), **what) is state
    assert state.exit_code is code


def test_a_dropped_unit_is_a_finding_and_a_failed_one_a_failure():
    assert state_after(WorkCounts(units=2, done=1, dropped=1)) is RunState.COMPLETED_WITH_FINDINGS
    assert state_after(WorkCounts(units=2, done=1, failed=1), paused=True) is RunState.FAILED


def test_a_waiting_run_is_told_when_to_go_on():
    report = replace(good(), state=RunState.WAITING_FOR_QUOTA, resume_at=datetime(2025, 4, 1, 16, tzinfo=UTC))
    (step,) = suggested(report)
    assert step.command == "marketsync sync nightly"
    assert "after 2025-04-01 16:00 UTC" in step.why
    assert suggested(good()) == ()


def test_watermarks_take_first_days_from_a_full_judgement_only():
    newest = {"AAPL": date(2025, 3, 31), "NEW": date(2025, 3, 31)}
    whole = {m.subject: (m.oldest, m.newest) for m in watermarks_of(judgement(), newest)}
    assert whole["AAPL"] == ("2025-01-02", "2025-03-31")
    assert whole["NEW"] == (None, "2025-03-31")
    assert watermarks_of(judgement(full=False), newest)[0].oldest is None


# ---------------------------------------------------------------- words


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.04, "0.0 s"),
        (9.96, "10.0 s"),
        (12.4, "12 s"),
        (59.6, "1 min 0 s"),
        (185, "3 min 5 s"),
        (7805, "2 h 10 min"),
        (273_600, "3 d 4 h"),
    ],
)
def test_durations_are_said_as_people_say_them(seconds, said):
    assert words.duration(seconds) == said


def test_only_what_is_whole_is_called_100_percent():
    assert words.share(0.999999) == "99.99 %"
    assert words.share(1.0) == "100 %"
    assert words.share(None) == "-"


@pytest.mark.parametrize(
    ("count", "said"), [(0, "0 B"), (999, "999 B"), (1482133, "1.5 MB"), (250_000, "250 kB"), (3e12, "3.0 TB")]
)
def test_sizes_are_in_powers_of_a_thousand(count, said):
    assert words.size(count) == said


# ---------------------------------------------------------------- terminal


def test_a_good_run_fits_a_screen_of_80_columns_and_24_lines():
    lines = terminal.text(good()).splitlines()
    assert max(map(len, lines)) <= 80
    assert len(lines) <= 24
    assert lines[0] == "nightly: completed in 12 s  run r-1"
    assert "100 %" in lines[-1]
    assert "on time" in lines[-1]


def test_trouble_names_the_hole_the_reason_and_the_next_command():
    said = terminal.text(troubled())
    assert max(map(len, said.splitlines())) <= 80
    flat = " ".join(said.split())
    for part in (
        "nightly: failed after 12 s",
        "missing from alpaca.daily_bars in default",
        "1 row with volume below zero, such as IBM 2025-03-07 volume -1",
        "IBM: 2025-03-05 to 2025-03-06, 2 sessions missing (not in the provider's answer)",
        "failed alpaca.daily_bars XYZ: time-out after 5 tries",
        'dropped alpaca.daily_bars APPL: 422: invalid symbol "APPL" (3 alike)',
        "and 7 more",
        "marketsync sync nightly",
        "1 subject without 2025-03-31",
    ):
        assert part in flat


def test_a_long_error_keeps_the_remedy_that_it_ends_with():
    message = "an answer that the definition does not explain; " + "it is kept in a folder " * 20 + "; name the rows"
    report = replace(good(), remarks=(Remark(kind="stopped", message=message),))
    assert "; name the rows" in " ".join(terminal.text(report).split())
    assert "; name the rows" in markdown(report)


def test_without_a_terminal_there_are_no_escape_codes_and_80_columns(capsys):
    terminal.show(troubled(), Console(width=300))
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert max(map(len, out.splitlines())) <= 80


def test_a_terminal_gets_colours():
    console = Console(force_terminal=True, width=100, color_system="standard", record=True, file=None, quiet=False)
    with console.capture() as captured:
        terminal.show(good(), console)
    assert "\x1b[" in captured.get()


def test_markup_and_escape_codes_of_a_provider_stay_text():
    report = replace(good(), remarks=(Remark(kind="dropped", message="[red]no[/red] \x1b[2J \u202eevil"),))
    said = terminal.text(report)
    assert "[red]no[/red]" in said
    assert "\x1b" not in said
    assert "\u202e" not in said


# ---------------------------------------------------------------- markdown


def test_markdown_has_the_tables_and_escapes_what_others_said():
    report = replace(troubled(), errors=(Remark(kind="failed", message="a | b\n# c <script> `d` *e*"),))
    said = markdown(report)
    assert "# nightly: failed after 12 s" in said
    assert "| missing | 2025-03-05 to 2025-03-06 | 2 | IBM | not in the provider's answer |" in said
    assert r"a \| b \# c \<script\> \`d\` \*e\*" in said
    tables = [line for line in said.splitlines() if line.startswith("|")]
    assert all(line.endswith("|") for line in tables)


def test_markdown_tables_have_as_many_cells_in_every_line():
    widths = []
    for line in markdown(troubled()).splitlines():
        if line.startswith("|"):
            widths.append(len(re.split(r"(?<!\\)\|", line)))
        else:
            assert len(set(widths)) <= 1, widths
            widths = []


def test_markdown_cuts_long_lists_and_says_so():
    holes = tuple(
        Hole(state=HoleState.MISSING, first=day, last=day, sessions=1, subjects=("A",))
        for day in (date(2024, 1, 1) + timedelta(days=2 * n) for n in range(300))
    )
    part = replace(good().datasets[0], judgement=judgement(holes=holes, missing=300))
    said = markdown(replace(good(), datasets=(part,), findings=()))
    assert "And 250 more holes" in said
    assert len(said) < 20_000


# ---------------------------------------------------------------- HTML


class Page(HTMLParser):
    """The tags, attributes and text of a page; complains of tags that do not close."""

    VOID = frozenset({"meta", "br"})

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.urls: list[str] = []
        self.words: list[str] = []
        self.handlers: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.urls += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "action", "data")]
        self.handlers += [name for name, _ in attrs if name.startswith("on")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def test_the_page_is_one_file_that_loads_nothing_and_runs_nothing():
    page = html(troubled())
    parsed = Page(page)
    assert parsed.urls == []
    assert parsed.handlers == []
    assert not {"script", "link", "img", "iframe", "object"} & set(parsed.tags)
    assert "@import" not in page
    assert re.findall(r"url\(([^)]*)\)", page) == ["#hatch"]
    assert "prefers-color-scheme:dark" in page
    assert "@media print" in page


def test_the_page_tells_what_the_report_holds():
    said = Page(html(troubled())).text
    for part in (
        "failed",
        "75.00 %",
        "2 sessions missing of 120 expected",
        "time-out after 5 tries",
        '422: invalid symbol "APPL"',
        "GET /v2/stocks/bars?symbols=APPL",
        "7 lines more",
        "2025-03-05 to 2025-03-06",
        "halted",
        "volume below zero",
        "late by 2 h 0 min",
        "200 per minute",
        "marketsync sync nightly",
        "delta://./data",
    ):
        assert part in said, part


EVIL = st.text(alphabet=st.sampled_from(list("<>&\"'/=`\\\x00\x1b\u202e abc()!-")), min_size=1, max_size=30)


@given(EVIL)
def test_whatever_a_provider_says_becomes_text(evil):
    part = replace(
        troubled().datasets[0],
        dataset=evil,
        store=evil,
        store_url=evil,
        state=evil,
        judgement=replace(
            troubled().datasets[0].judgement,  # type: ignore[type-var]
            dataset=evil,
            calendar=evil,
            remarks=(evil,),
            months=replace(judgement().months, subjects=(evil, "<script>alert(1)</script>")),  # type: ignore[type-var]
            holes=(
                Hole(
                    state=HoleState.MISSING,
                    first=date(2025, 3, 5),
                    last=date(2025, 3, 5),
                    sessions=1,
                    subjects=(evil,),
                    reason=evil,
                ),
            ),
        ),
    )
    report = replace(
        troubled(), run=evil, plan=evil, datasets=(part,), errors=(Remark(kind=evil, message=evil, request=evil),)
    )
    page = html(report)
    expected = Page(html(replace(report, run="x", plan="x", errors=(Remark(kind="x", message="x", request="x"),))))
    assert Page(page).tags == expected.tags
    assert "script" not in Page(page).tags
    assert not Page(page).handlers
    assert "\x1b" not in page
    for drawing in re.findall(r"<svg viewBox.*?</svg>", page):
        ElementTree.fromstring(drawing)


def test_the_heat_map_is_accessible_and_draws_what_the_figures_say():
    coverage = MonthCoverage(
        months=("2025-01", "2025-02", "2025-03", "2025-04"),
        subjects=("A", "B"),
        expected=((20, 20, 20, 20), (0, 0, 20, 20)),
        present=((20, 20, 0, 19), (0, 0, 20, 15)),
        explained=((0, 0, 0, 0), (0, 0, 0, 5)),
        rows=(20, 20, 20, 34),
    )
    drawn = ElementTree.fromstring(drawings.heat_map(coverage, "x.bars", "d0"))
    assert drawn.get("role") == "img"
    titles = {element.get("id"): element.text for element in drawn.iter() if element.get("id")}
    assert titles["d0-t"] == "Coverage of x.bars"
    assert "21 of 120 expected sessions are missing" in (titles["d0-d"] or "")
    assert drawn.get("aria-labelledby") == "d0-t d0-d"
    cells = [(rect.get("class"), rect[0].text) for rect in drawn.iter("rect")]
    assert cells == [
        ("full", "A 2025-01 to 2025-02: 40 of 40 sessions"),
        ("most", "A 2025-03: 0 of 20 sessions, 20 missing"),
        ("few", "A 2025-04: 19 of 20 sessions, 1 missing"),
        ("full", "B 2025-03: 20 of 20 sessions"),
        ("excused", "B 2025-04: 15 of 20 sessions, 5 explained or empty"),
    ]
    bars = [rect[0].text for rect in ElementTree.fromstring(drawings.rows_plot(coverage, "x", "d1")).iter("rect")]
    assert bars == ["2025-01: 20 rows", "2025-02: 20 rows", "2025-03: 20 rows", "2025-04: 34 rows"]


@pytest.mark.parametrize("draw", [drawings.heat_map, drawings.rows_plot])
def test_no_label_is_cut_off_at_the_edge_of_a_drawing(draw):
    months = tuple(f"{year}-{month:02d}" for year in range(2000, 2013) for month in range(1, 13))
    full = ((20,) * len(months),)
    coverage = MonthCoverage(
        months=months, subjects=("A",), expected=full, present=full, explained=((0,) * len(months),), rows=full[0]
    )
    drawn = ElementTree.fromstring(draw(coverage, "x.bars", "d0"))
    _, _, width, height = map(float, drawn.get("viewBox", "").split())
    letters = 11  # the size of a label, whose lowest parts reach a quarter of it below its line
    for label in drawn.iter("text"):
        assert letters - 3 <= float(label.get("y", "")) <= height - letters / 4, label.text
        reach = 0 if label.get("text-anchor") == "end" else 0.65 * letters * len(label.text or "")
        assert float(label.get("x", "")) + reach <= width


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ((20, 20, 0), "full"),
        ((20, 19, 0), "few"),
        ((20, 18, 0), "some"),
        ((20, 10, 0), "most"),
        ((20, 18, 2), "excused"),
        ((0, 0, 0), "none"),
    ],
)
def test_a_cell_has_the_colour_of_what_is_missing(values, kind):
    assert drawings.cell(*values) == kind


def test_five_thousand_symbols_make_a_page_that_opens():
    names = tuple(f"S{n:04d}" for n in range(5000))
    months = tuple(f"{2000 + m // 12}-{m % 12 + 1:02d}" for m in range(300))
    lines = [tuple(20 - (n % 7 == 0 and (m * n) % 5 == 1) for m in range(300)) for n in range(5000)]
    coverage = MonthCoverage(
        months=months,
        subjects=names,
        expected=((20,) * 300,) * 5000,
        present=tuple(lines),
        explained=((0,) * 300,) * 5000,
        rows=(100_000,) * 300,
    )
    holes = tuple(
        Hole(state=HoleState.MISSING, first=date(2020, 1, 1), last=date(2020, 1, 2), sessions=2, subjects=(name,))
        for name in names
    )
    part = replace(
        good().datasets[0],
        judgement=judgement(
            months=coverage,
            holes=holes,
            missing=10_000,
            expected=30_000_000,
            subjects=tuple(SubjectCoverage(subject=name, expected=6000, present=5998, missing=2) for name in names),
        ),
        watermarks=tuple(Watermark(subject=name, oldest="2000-01-03", newest="2025-03-31") for name in names),
    )
    page = html(replace(good(), datasets=(part,), findings=()))
    assert len(page) < 4_000_000
    said = Page(page).text
    assert "A line each for the 119 subjects with the most missing sessions" in said
    assert "sums up the other 4,881" in said
    assert "4,500 lines more" in said
    cut, others = drawings.shown(coverage)
    assert others == 4881
    assert sum(map(sum, cut.present)) == sum(map(sum, coverage.present))
    assert "S0000" not in cut.subjects


def test_more_months_than_fit_become_years():
    months = tuple(f"{1970 + m // 12}-{m % 12 + 1:02d}" for m in range(600))
    coverage = MonthCoverage(
        months=months,
        subjects=("A",),
        expected=((20,) * 600,),
        present=((20,) * 600,),
        explained=((0,) * 600,),
        rows=(20,) * 600,
    )
    cut, _ = drawings.shown(coverage)
    assert cut.months[0] == "1970"
    assert cut.expected[0][0] == 240
    part = replace(good().datasets[0], judgement=judgement(months=coverage))
    assert "A column is a year." in Page(html(replace(good(), datasets=(part,), findings=()))).text


def test_an_empty_report_is_still_a_page():
    report = RunReport(run="r", plan="p")
    Page(html(report))
    assert markdown(report).startswith("# p: completed in 0.0 s")
    assert terminal.text(report).startswith("p: completed in 0.0 s")
