"""A table that the user made by hand becomes the plan's: the next sync asks only for what is missing in it."""

from __future__ import annotations

import json
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import polars as pl
import pytest

from marketsync.coverage import Interval
from marketsync.errors import AdoptionRefused, ConfigurationError
from marketsync.timing import midnight
from tasks.adopt import Asked, adopt, believed
from tasks.inquiry import refuse_conflicts
from tasks.workspace import Scope, Workspace, close_workspaces, open_workspace

SYMBOLS = ["AAPL", "FB", "IBM", "MSFT"]
PLAN = {"datasets": ["alpaca.daily_bars"], "universe": SYMBOLS, "since": "2012-01-01", "until": "2013-02-28"}
FIRST, LAST = date(2012, 1, 1), date(2013, 2, 28)
HOLE = (date(2012, 6, 4), date(2012, 6, 8))


def what_the_user_has(here, last: date = date(2012, 12, 31)) -> pl.DataFrame:
    """Bars of AAPL, IBM and MSFT, in another order and other types, with a column of the user's; IBM lacks a week."""
    rows = here.source(["AAPL", "IBM", "MSFT"], FIRST, last).with_columns(pl.from_epoch("ts", "us"))
    hole = (pl.col("symbol") == "IBM") & pl.col("ts").dt.date().is_between(*HOLE)
    return rows.filter(~hole).select(
        pl.lit("checked").alias("note"),
        pl.col("volume").cast(pl.Float64),
        "close",
        "high",
        "low",
        "open",
        pl.col("ts").dt.replace_time_zone("UTC"),
        "symbol",
        "vwap",
        pl.col("trades").cast(pl.Int32),
    )


def asked(here, after: int = 0) -> list[tuple[str, str, str]]:
    """Which symbols were asked for, from which day to which."""
    found = [one["request"]["params"] for one in here.log[after:]]
    return sorted((one["symbols"], one["start"][:10], one["end"][:10]) for one in found)


MISSING = [
    ("AAPL,IBM,MSFT", "2013-01-01", "2013-02-28"),
    ("FB", "2012-01-01", "2013-02-28"),
    ("IBM", "2012-06-02", "2012-06-08"),
]


def test_files_made_by_hand_are_taken_over_by_the_command_and_only_what_is_missing_is_asked(place):
    here = place()
    here.write(PLAN, stores={"default": "parquet://./data"})
    folder = here.folder / "data" / "alpaca" / "daily_bars"
    folder.mkdir(parents=True)
    what_the_user_has(here).rename({"volume": "Volume"}).write_parquet(folder / "mine.parquet")

    with pytest.raises(ConfigurationError, match=r"`marketsync adopt alpaca\.daily_bars` takes it over"):
        refuse_conflicts(open_workspace(here.config), ["p"])  # before a sync asks for anything
    with pytest.raises(AdoptionRefused, match=r"(?s)nothing was changed.*--rename Volume=volume"):
        adopt(open_workspace(here.config), "p")

    dry = here.run("adopt", "alpaca.daily_bars", "--rename", "Volume=volume", "--dry-run", "--json")
    (found,) = json.loads(dry.stdout)["adopted"]
    assert (found["owed_requests"], found["complete"], found["incomplete"]) == (3, 745, 0)
    assert [one.name for one in folder.iterdir()] == ["mine.parquet"]
    done = here.run("adopt", "p", "--rename", "Volume=volume")
    assert done.returncode == 0, done.stderr
    assert "3 of 4 subjects; 745 sessions complete, 0 with rows" in done.stdout
    assert "still owed: 3 units, about 3 requests: the next sync asks for it" in done.stdout
    assert (here.folder / "data" / "_adopted" / "alpaca" / "daily_bars" / "mine.parquet").exists()
    assert here.requests == 0
    run = here.sync_here()
    assert (run.code, run.sent) == (0, 3), run.words
    assert asked(here) == MISSING
    assert here.bars().equals(here.source(SYMBOLS, FIRST, LAST))
    assert run.report["datasets"][0]["judgement"]["missing"] == 0
    assert here.sync_here().sent == 0


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["postgresql", "mysql", "clickhouse", "mongodb"])
def test_a_server_s_table_made_by_hand_is_taken_over_and_only_what_is_missing_is_asked(place, request, scheme):
    here = place()
    fixture = {"postgresql": "postgres"}.get(scheme, scheme)
    url = request.getfixturevalue(fixture)
    here.write(PLAN, stores={"default": url})
    fill(scheme, url, what_the_user_has(here))
    refused_then_adopted(here)


def refused_then_adopted(here) -> None:
    zone = Asked(table="prices", zone="UTC")
    (found,) = adopt(open_workspace(here.config), "alpaca.daily_bars", zone)
    assert (found.rows, found.complete, found.owed_requests) == (745, 745, 3)
    (again,) = adopt(open_workspace(here.config), "p")
    assert (again.already, again.spans, again.owed_requests) == (True, (), 3)
    (other,) = adopt(open_workspace(here.config), "p", Asked(table="another"))
    assert other.already
    assert "was not looked at" in " ".join(other.notes)
    assert "was not looked at" not in " ".join(again.notes)
    run = here.sync_here()
    assert (run.code, run.sent) == (0, 3), run.words
    assert asked(here) == MISSING
    assert here.bars().equals(here.source(SYMBOLS, FIRST, LAST))
    assert run.report["datasets"][0]["judgement"]["missing"] == 0
    assert here.sync_here().sent == 0


def fill(scheme: str, url: str, frame: pl.DataFrame) -> None:
    """Make the table `prices` and fill it, by the engine's own client."""
    rows = frame.with_columns(pl.col("ts").dt.replace_time_zone(None)).rows()
    types = ["varchar(9)", "double", "double", "double", "double", "double", "datetime", "varchar(9)", "double", "int"]
    if scheme == "postgresql":
        import psycopg

        columns = ", ".join(f"{n} {t}" for n, t in zip(frame.columns, types, strict=True))
        columns = columns.replace("double", "double precision").replace("datetime", "timestamp")
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute(f"CREATE TABLE prices ({columns})")  # pyright: ignore[reportArgumentType]
            with connection.cursor().copy("COPY prices FROM STDIN") as copy:
                for row in rows:
                    copy.write_row(row)
    elif scheme == "mysql":
        from private_mariadb import asked as ask

        ask(url, f"CREATE TABLE prices ({', '.join(f'`{n}` {t}' for n, t in zip(frame.columns, types, strict=True))})")
        lines = ", ".join(
            "(" + ", ".join(repr(v) if not isinstance(v, datetime) else f"'{v}'" for v in r) + ")" for r in rows
        )
        ask(url, f"INSERT INTO prices VALUES {lines}")
    elif scheme == "clickhouse":
        from private_clickhouse import clickhouse_client

        client = clickhouse_client(url)
        columns = ", ".join(
            f"{n} " + {"varchar(9)": "String", "double": "Float64", "int": "Int32", "datetime": "DateTime('UTC')"}[t]
            for n, t in zip(frame.columns, types, strict=True)
        )
        client.command("DROP TABLE IF EXISTS default.prices SYNC")
        client.command(f"CREATE TABLE default.prices ({columns}) ENGINE = MergeTree ORDER BY note")
        client.insert_arrow("default.prices", frame.to_arrow())
        client.close()
    else:
        import pymongo

        with pymongo.MongoClient(url) as client:
            client.get_database().prices.insert_many(frame.to_dicts())


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["csv", "delta"])
def test_files_of_other_kinds_are_taken_over_and_only_what_is_missing_is_asked(place, scheme):
    here = place()
    here.write(PLAN, stores={"default": f"{scheme}://./data"})
    frame = what_the_user_has(here)
    folder = here.folder / "data" / "prices"
    if scheme == "delta":
        frame.write_delta(str(folder))
    else:
        folder.mkdir(parents=True)
        frame.write_csv(folder / "prices.csv", datetime_format="%Y-%m-%dT%H:%M:%SZ")
    refused_then_adopted(here)
    assert folder.exists()


def test_a_ledger_that_was_lost_is_built_anew_from_our_own_table(place):
    here = place()
    here.write({**PLAN, "universe": ["AAPL", "IBM"]}, stores={"default": "delta://./data"})
    here.sync_here()
    for file in (here.folder / ".marketsync").glob("ledger.db*"):
        file.unlink()
    before = here.requests
    (found,) = adopt(open_workspace(here.config), "p")
    assert (found.already, found.believed_subjects, found.owed_requests) == (True, 2, 0)
    assert (here.sync_here().sent, here.requests) == (0, before)


# ---------------------------------------------------------------- what rows prove


def scope_of(here, dataset: str, name: str = "alpaca") -> Scope:
    here.write({**PLAN, "datasets": [dataset], "universe": ["AAPL", "IBM"]}, name=name)
    workspace = Workspace(Path(here.config))
    return Scope(workspace, "p", dataset, "", workspace.clock.now())


def counts(rows: list[tuple[str, datetime | date, int]]) -> pl.DataFrame:
    frame = pl.DataFrame(rows, schema=["subject", "at", "n"], orient="row")
    return frame.cast({"n": pl.Int64, **({"at": pl.Datetime("us", "UTC")} if frame["at"].dtype != pl.Date else {})})


@pytest.fixture
def scope(place):
    yield lambda *arguments: scope_of(place(), *arguments)
    close_workspaces()


NOW = datetime(2012, 7, 2, 12, tzinfo=UTC)  # a Monday, before the session
OPEN = datetime(2012, 6, 26, 13, 30, tzinfo=UTC)


def quarters(first: datetime, minutes: int) -> list[tuple[str, datetime, int]]:
    return [
        ("AAPL", first + timedelta(minutes=at), min(15, minutes - at)) for at in range(0, minutes, 15) if minutes > at
    ]


def test_a_session_of_minute_bars_is_believed_only_when_it_has_all_of_its_minutes(scope):
    given = scope("alpaca.minute_bars")
    whole = counts([*quarters(OPEN, 390), *quarters(OPEN + timedelta(days=1), 389)])
    belief = believed(given, ["AAPL"], whole, NOW)
    assert belief.spans == {"AAPL": [Interval(OPEN, OPEN + timedelta(minutes=390))]}
    assert (belief.complete, belief.incomplete) == (1, 1)
    told = believed(given, ["AAPL"], whole, NOW, spans=True)
    assert told.spans == {"AAPL": [Interval(OPEN, OPEN + timedelta(days=1, minutes=390))]}
    assert "as you said (--believe-spans)" in " ".join(told.notes)


def test_bars_outside_of_a_session_stand_for_none_that_it_lacks(scope):
    early = counts([("AAPL", OPEN - timedelta(minutes=15), 15), *quarters(OPEN, 375)])
    assert believed(scope("alpaca.minute_bars"), ["AAPL"], early, NOW).spans == {}


def test_nothing_that_may_still_settle_or_come_late_and_nothing_after_the_newest_row_is_believed(scope):
    given = scope("alpaca.daily_bars")
    days = [datetime(2012, 6, day, 4, tzinfo=UTC) for day in (20, 21, 22, 25, 26, 27, 28, 29)]
    (span,) = believed(given, ["AAPL"], counts([("AAPL", day, 1) for day in days]), NOW).spans["AAPL"]
    # on Monday morning Friday's answer would not be final: it settles with the session after it
    assert span == Interval(midnight(date(2012, 6, 20)), midnight(date(2012, 6, 29)))
    # on Saturday what was published on Wednesday might still come late
    saturday = believed(given, ["AAPL"], counts([("AAPL", day, 1) for day in days]), NOW - timedelta(days=2))
    assert saturday.spans["AAPL"][-1].end == midnight(date(2012, 6, 27))
    (span,) = believed(given, ["AAPL"], counts([("AAPL", day, 1) for day in days[:3]]), NOW).spans["AAPL"]
    assert span.end == midnight(date(2012, 6, 23))


def test_rows_of_symbols_that_nobody_asks_for_prove_nothing_and_are_told(scope):
    day = datetime(2012, 6, 20, 4, tzinfo=UTC)
    belief = believed(scope("alpaca.daily_bars"), ["AAPL"], counts([("ZZZ", day, 1), ("AAPL", day, 1)]), NOW)
    assert list(belief.spans) == ["AAPL"]
    assert "1 rows are of 1 subjects that no plan asks for" in " ".join(belief.notes)


def test_a_request_that_answers_for_all_symbols_is_sent_again_unless_the_user_says_that_rows_are_all(scope):
    given = scope("tushare.daily", "tushare")
    rows = counts([(symbol, date(2012, 6, day), 1) for symbol in ("000001.SZ", "600000.SH") for day in (18, 19, 20)])
    if [one.name for one in given.subjects] != ["*"]:
        pytest.fail("tushare.daily is no longer asked by session; take another dataset for this")
    belief = believed(given, ["*"], rows, NOW)
    assert (belief.spans, belief.incomplete) == ({}, 3)
    assert "adopt it with --believe-spans" in " ".join(belief.notes)
    told = believed(given, ["*"], rows, NOW, spans=True)
    assert [one.end for one in told.spans["*"]] == [midnight(date(2012, 6, 21))]
