"""A definition or a plan that is valid and asks, or reads, the wrong thing: the run says so, and is not complete."""

from __future__ import annotations

from datetime import date

from marketsync.configuration import shipped_definitions

PLAN = {"datasets": ["alpaca.daily_bars"], "universe": ["AAPL", "IBM"], "since": "2012-01-01", "until": "2013-03-01"}


def alpaca(old: str, new: str) -> str:
    text = shipped_definitions()["alpaca"].read_text(encoding="utf-8")
    assert old in text
    return text.replace(old, new)


def words(run) -> str:
    return " ".join(one["message"] for one in run.report["remarks"])


def test_a_column_that_no_answer_has_is_told(place):
    here = place()
    here.write(PLAN, definition=alpaca("vw: {as: vwap,", "vwp: {as: vwap,"))
    run = here.sync_typed()
    assert run.code == 0
    assert [one["kind"] for one in run.report["remarks"]] == ["never_seen"]
    assert "no row of any answer had vwp (stored as vwap)" in words(run)
    here.write({**PLAN, "universe": ["MSFT"]})
    assert here.sync_typed().report["remarks"] == []


def test_a_plan_that_gets_nothing_at_all_is_not_complete(place):
    here = place()
    here.write({**PLAN, "since": "2014-01-01", "until": "2014-12-31"})
    run = here.sync_typed()
    assert (run.code, run.state) == (3, "completed_with_findings")
    [judgement] = [part["judgement"] for part in run.report["datasets"]]
    assert (judgement["present"], judgement["missing"]) == (0, 0)
    report = here.typed("report").stdout
    assert "not one row of 2 subjects" in report
    assert "0 %" in report.replace("success 100 %", "").split("fresh")[1]
    assert "100 %" not in report.replace("success 100 %", "")


def test_a_page_that_is_full_and_leads_nowhere_because_the_path_is_misspelt_is_halved_until_all_rows_are_there(place):
    here = place()
    wrong = alpaca("page: {token: next_page_token,", "page: {token: next_pagetoken,").replace(
        "size: 10000", "size: 300"
    )
    here.write({**PLAN, "universe": ["AAPL"], "since": "2010-01-01"}, definition=wrong)
    run = here.sync_typed()
    assert run.code == 0, run.words
    assert here.bars().equals(here.source(["AAPL"], date(2010, 1, 1), date(2013, 3, 1)))


def test_rows_that_are_set_aside_are_a_finding_that_says_where_they_are(place):
    here = place()
    here.write(
        PLAN,
        definition=alpaca("v: {as: volume, type: i64,", "v: {as: volume, type: i32,").replace(
            "n: {as: trades, type: i64,", "n: {as: trades, type: bool,"
        ),
    )
    run = here.sync_typed()
    assert run.code == 3
    assert run.report["rows"]["quarantined"] == run.report["rows"]["fetched"]
    assert "set aside" in words(run)
    assert "trades" in words(run)
    holes = run.report["datasets"][0]["judgement"]["holes"]
    assert all("set aside" in hole["reason"] for hole in holes), holes
