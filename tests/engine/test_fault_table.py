"""Every row of the failure table, spoken by the replica in the words of each of the three providers whose definitions
ship: how the run ends, what its report says, and that the next run recovers.

By day the steps run in this process, over real sockets, into real stores, and one provider speaks; the slow tests are
the same of the other two, and of the first with the real command. Which recorded error body means what is in
`test_definitions.py`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any

import polars as pl
import pytest
from synced_place import Ended, Place

from marketsync.configuration import shipped_definitions
from providers.replica.limits import next_midnight
from tasks.workspace import Options

FIRST, LAST = date(2000, 3, 1), date(2013, 3, 1)
PAGE_ROWS = 1_000
HOUR = timedelta(hours=1)


@dataclass(frozen=True)
class Speaker:
    """One provider: its dataset, the symbols as it calls them, and what a whole sync of them takes."""

    name: str
    dataset: str
    symbols: tuple[str, str]
    units: int
    requests: int
    settings: tuple[tuple[str, Any], ...] = ()
    time: str = "date"
    other_dataset: str = ""

    @property
    def definition(self) -> str:
        """The shipped definition with smaller pages (a chain for every unit) and little patience."""
        text = shipped_definitions()[self.name].read_text(encoding="utf-8")
        for size in ("size: 10000, cap: 10000", "size: 5000, cap: 5000"):
            text = text.replace(size, f"size: {PAGE_ROWS}, cap: {PAGE_ROWS}")
        changed = text.replace("\n      path: ", "\n      timeout: 1 second\n      path: ")
        changed = changed.replace("\n  path: /\n", "\n  timeout: 1 second\n  path: /\n")
        assert "timeout" in changed
        return changed


SPEAKERS = {
    "alpaca": Speaker("alpaca", "daily_bars", ("AAPL", "IBM"), 3, 8, time="ts", other_dataset="minute_bars"),
    "nasdaq_data_link": Speaker(
        "nasdaq_data_link", "wiki_prices", ("AAPL", "IBM"), 3, 8, other_dataset="wiki_prices_csv"
    ),
    "tushare": Speaker(
        "tushare",
        "daily_by_symbol",
        ("AAPL.US", "IBM.US"),
        4,
        8,
        (("calendars", {"daily_by_symbol": "XNYS"}),),
        other_dataset="trade_cal",
    ),
}


Run = Callable[..., Ended]


def _here(place: Place, *arguments: str) -> Ended:
    return place.sync_here(Options(retry_failed="--retry-failed" in arguments))


SLOW = [pytest.mark.slow, pytest.mark.timeout(900)]


def cases(*speakers: str) -> list[Any]:
    """Return how each speaks: the first one also to the real command."""
    slow = [("here", speaker) for speaker in speakers[1:]] + [("process", speakers[0])]
    return [("here", speakers[0]), *(pytest.param(one, marks=SLOW) for one in slow)]


@pytest.fixture(params=cases(*SPEAKERS), ids="-".join)
def case(request: pytest.FixtureRequest) -> tuple[str, str]:
    """How a plan is run, and which provider it asks."""
    return request.param


@pytest.fixture
def speaker(case: tuple[str, str]) -> Speaker:
    return SPEAKERS[case[1]]


@pytest.fixture
def run(case: tuple[str, str]) -> Run:
    """Run the plan of a place: in this process, or as the real command."""
    return _here if case[0] == "here" else Place.sync


@pytest.fixture
def asking(place: Callable[..., Place]) -> Callable[..., Place]:
    """A place that asks one provider for two symbols with one thread; `faults` are the replica's."""

    def made(speaker: Speaker, *faults: dict[str, Any], **more: Any) -> Place:
        result = place(faults=[{"provider": speaker.name, **fault} for fault in faults], **more.pop("replica", {}))
        write(result, speaker, **more)
        return result

    return made


def write(
    place: Place, speaker: Speaker, *, tuning: dict[str, Any] | None = None, datasets: tuple[str, ...] = (), **plan: Any
) -> None:
    place.write(
        {
            "datasets": [f"{speaker.name}.{dataset}" for dataset in datasets or (speaker.dataset,)],
            "universe": list(speaker.symbols),
            "since": str(FIRST),
            "until": str(LAST),
            "tuning": {"threads": 1},
            **plan,
        },
        name=speaker.name,
        definition=speaker.definition,
        upstream={
            **dict(speaker.settings),
            "limits": [
                {"requests": 100_000, "per": "minute"},
                {"requests": 50_000, "per": "day", "resets": f"00:00 {ZONES[speaker.name]}"},
            ],
            "tuning": {"attempts": 3, "back_off": "10 ms", **(tuning or {})},
        },
    )


ZONES = {"alpaca": "America/New_York", "nasdaq_data_link": "UTC", "tushare": "Asia/Shanghai"}


def work(ended: Ended) -> dict[str, int]:
    """The counts of work that are not zero."""
    return {name: count for name, count in ended.report["work"].items() if count}


def kinds(ended: Ended) -> list[str]:
    """What kinds of things the run has to tell, each remark once."""
    return [one["kind"] for one in (*ended.report["errors"], *ended.report["remarks"])]


def check_rows(place: Place, speaker: Speaker) -> None:
    """Every row of the source is stored once."""
    prices = ["open", "high", "low", "close"]
    stored = place.stored_here(f"{speaker.name}.{speaker.dataset}")
    if speaker.time == "ts":
        stored = stored.with_columns(pl.col("ts").dt.convert_time_zone("America/New_York").dt.date().alias("date"))
    stored = stored.select(pl.col("symbol").str.strip_suffix(".US"), "date", *prices).sort("symbol", "date")
    parts = [
        place.replica.market.series(symbol.removesuffix(".US"), "1Day").frame(0, 10_000) for symbol in speaker.symbols
    ]
    source = pl.concat(parts).filter(pl.col("date").is_between(FIRST, LAST)).select("symbol", "date", *prices)
    assert stored.equals(source.sort("symbol", "date"))


def check_recovers(place: Place, speaker: Speaker, run: Run, requests: int, *arguments: str) -> None:
    """The next run, with the faults over, asks for exactly what is owed, and everything is there."""
    place.replica.set_faults([])
    done = run(place, *arguments)
    assert (done.code, done.state, done.sent) == (0, "completed", requests), done.words
    check_rows(place, speaker)
    assert place.spooled() == []
    again = run(place)
    assert (again.code, again.sent) == (0, 0), again.words


# ---------------------------------------------------------------- rows, empty, not yet


def test_rows(asking, run, speaker):
    made = asking(speaker)
    check_recovers(made, speaker, run, speaker.requests)


@pytest.mark.parametrize("fault", ["empty", "no_content"])
def test_nothing_there_is_covered_as_empty_and_not_asked_again(asking, run, speaker, fault):
    made = asking(speaker, {"fault": fault, "when": {"request": 1}})
    done = run(made)
    assert (done.code, done.state) == (0, "completed"), done.words
    assert work(done) == {"units": speaker.units, "done": speaker.units - 1, "empty": 1}
    assert done.report["datasets"][0]["judgement"]["empty"] > 100, "sessions that the provider has nothing for"
    assert run(made).sent == 0


# Tushare has no words for it
@pytest.mark.parametrize("case", cases("alpaca", "nasdaq_data_link"), indirect=True, ids="-".join)
def test_not_published_yet_is_asked_again_by_the_next_run(asking, run, speaker):
    made = asking(speaker, {"fault": "not_yet", "when": {"request": 1}})
    done = run(made)
    assert (done.code, done.state) == (75, "waiting_for_publication")
    assert work(done) == {"units": speaker.units, "done": speaker.units - 1, "not_yet": 1}
    assert kinds(done) == ["not_yet"]
    assert "not published yet" in done.words
    assert done.report["resume_at"] is not None
    check_recovers(made, speaker, run, speaker.requests + 1 - done.sent)


@pytest.mark.parametrize("case", cases("tushare"), indirect=True, ids="-".join)
def test_a_session_that_tushare_does_not_know_yet_is_not_published_and_one_of_long_ago_is_a_wrong_request(
    asking, run, speaker
):
    """A day's file is looked for; not found means that it is late while it may be, and after that that it is not."""
    today = datetime.now(UTC).date()
    days = pl.date_range(today - timedelta(days=40), today - timedelta(days=2), eager=True)
    days = days.filter(days.dt.weekday() <= 5)
    rows = pl.DataFrame({"symbol": "AAPL", "date": days}).with_columns(
        *(pl.lit(10.0).alias(price) for price in ("open", "high", "low", "close")), pl.lit(100).alias("volume")
    )
    late, old = days[-1], days[0]
    made = asking(
        speaker,
        {"fault": "not_yet", "when": {"match": {"body": f"{late:%Y%m%d}"}}},
        {"fault": "not_yet", "when": {"match": {"body": f"{old:%Y%m%d}"}}},
        replica={"data": rows},
        datasets=("daily",),
        since=str(days[0]),
        until=str(days[-1]),
    )
    done = run(made)
    assert (done.code, done.state) == (75, "waiting_for_publication"), done.words
    counts = work(done)
    assert (counts.get("not_yet"), counts.get("dropped")) == (1, 1)
    assert sorted(set(kinds(done)) & {"not_yet", "dropped"}) == ["dropped", "not_yet"]
    made.replica.set_faults([])
    again = run(made)
    assert [str(late).replace("-", "")] == [
        day
        for entry in made.log[-again.sent :]
        if (day := entry["request"]["params"]["params"]["trade_date"]) in (f"{late:%Y%m%d}", f"{old:%Y%m%d}")
    ]
    assert again.report["work"]["not_yet"] == 0


# ---------------------------------------------------------------- too much for one answer


@pytest.mark.parametrize("fault", ["too_many_rows", "full_page_no_token"])
def test_what_one_answer_cannot_hold_is_asked_for_in_halves_and_nothing_is_cut_off(asking, run, speaker, fault):
    first = {"alpaca": 1, "nasdaq_data_link": 1, "tushare": 3}[speaker.name]  # that has a full page
    made = asking(speaker, {"fault": fault, "when": {"request": first}})
    done = run(made)
    assert (done.code, done.state) == (0, "completed"), done.words
    looked_behind = speaker.name == "tushare" and fault == "full_page_no_token"  # pages by offset: it asks for the next
    assert work(done) == dict.fromkeys(("units", "done"), speaker.units + (not looked_behind))
    assert made.log[first - 1]["verdict"] == "split"
    check_recovers(made, speaker, run, 0)


# ---------------------------------------------------------------- limits


# Tushare always means a minute
@pytest.mark.parametrize("case", cases("alpaca", "nasdaq_data_link"), indirect=True, ids="-".join)
def test_too_frequent_is_waited_for_as_long_as_the_provider_says(asking, run, speaker):
    made = asking(speaker, {"fault": "too_frequent", "when": {"request": 2}, "wait": 1, "retry_after": True})
    done = run(made)
    assert (done.code, done.state) == (0, "completed"), done.words
    assert done.report["requests"] == {"sent": speaker.requests + 1, "retried": 0, "cool_downs": 1}
    assert made.log[2]["received"] - made.log[1]["answered"] >= 0.5
    check_recovers(made, speaker, run, 0)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("wording", ["old", "new"])
def test_a_minute_of_tushare_is_slept_through_with_wait(asking, wording):
    speaker = SPEAKERS["tushare"]
    made = asking(
        speaker,
        {"fault": "too_frequent", "when": {"request": 2}, "wording": wording, "limit": 7},
        tuning={"max_wait": "5 seconds"},
    )
    done = made.sync("--wait")
    assert (done.code, done.state) == (0, "completed"), done.words
    assert made.log[2]["received"] - made.log[1]["answered"] >= 60
    check_recovers(made, speaker, Place.sync, 0)


def test_a_cool_down_longer_than_max_wait_ends_the_run_with_75_and_the_time_to_go_on(asking, run, speaker):
    wait = 60 if speaker.name == "tushare" else 90
    made = asking(
        speaker,
        {"fault": "too_frequent", "when": {"request": 2}, "wait": wait, "retry_after": True},
        tuning={"max_wait": "20 seconds"},
    )
    done = run(made)
    check_waits(made, run, done, datetime.now(UTC) + timedelta(seconds=wait), timedelta(seconds=20))
    assert done.report["requests"]["cool_downs"] == 1


@pytest.mark.parametrize("fault", ["hour_quota", "day_quota"])
def test_a_spent_quota_ends_the_run_with_75_and_its_reset(asking, run, speaker, fault):
    made = asking(
        speaker, {"fault": fault, "when": {"request": 2}, "wait": 3600, "limit": 5}, tuning={"max_wait": "1 minute"}
    )
    done = run(made)
    midnight = datetime.fromtimestamp(next_midnight(time.time(), ZONES[speaker.name]), UTC)
    by_the_clock = speaker.name == "nasdaq_data_link" or (speaker.name == "tushare" and fault == "day_quota")
    check_waits(made, run, done, midnight if by_the_clock else datetime.now(UTC) + HOUR, timedelta(seconds=30))


def check_waits(place: Place, run: Run, done: Ended, resume: datetime, about: timedelta) -> None:
    """The run waits; what was fetched before is kept; and until it may, no later run sends anything."""
    assert (done.code, done.state) == (75, "waiting_for_quota"), done.words
    assert abs(datetime.fromisoformat(done.report["resume_at"]) - resume) < about
    assert work(done)["waiting"] == 1
    assert [one for one in kinds(done) if one != "cool_down"] == ["waiting"]
    assert done.sent == place.requests == 2
    assert place.spooled() == []
    place.replica.set_faults([])
    again = run(place)
    assert (again.code, again.state, again.sent) == (75, "waiting_for_quota", 0), again.words
    assert again.report["resume_at"] is not None
    assert place.requests == 2


# ---------------------------------------------------------------- the request, the key, the permission


OF_IBM = {"alpaca": {"query": "IBM"}, "nasdaq_data_link": {"query": "IBM"}, "tushare": {"body": "IBM.US"}}


def test_a_wrong_argument_is_dropped_and_the_others_go_on(asking, run, speaker):
    made = asking(speaker, {"fault": "wrong_argument", "when": {"match": OF_IBM[speaker.name]}})
    done = run(made)
    assert (done.code, done.state) == (3, "completed_with_findings"), done.words
    counts = work(done)
    assert counts["dropped"] >= 1
    assert counts["units"] == counts["done"] + counts["dropped"]
    told = [one for one in done.report["remarks"] if one["kind"] == "dropped"]
    words = {"alpaca": "invalid symbol", "tushare": "参数错误", "nasdaq_data_link": "incorrect query parameters"}
    assert told
    for one in told:
        assert words[speaker.name] in one["message"]
        assert one["subject"] == speaker.symbols[1]
        assert "IBM" in one["request"]
    assert made.stored_here(f"{speaker.name}.{speaker.dataset}")["symbol"].unique().to_list() == [speaker.symbols[0]]
    again = run(made)
    assert again.sent == 0, "what was refused as wrong is not asked again by itself"
    assert again.code == 3, "and it stays a hole"
    made.replica.set_faults([])
    retried = run(made, "--retry-failed")
    assert (retried.code, retried.report["work"]["dropped"]) == (0, 0), retried.words
    check_rows(made, speaker)
    assert run(made).sent == 0


WORDS = {
    "bad_key": {"alpaca": "unauthorized", "tushare": "token不对", "nasdaq_data_link": "could not recognize"},
    "expired_token": {"alpaca": "expired", "tushare": "已过期", "nasdaq_data_link": "expired"},
    "no_permission": {
        "alpaca": "subscription does not permit",
        "tushare": "没有接口访问权限",
        "nasdaq_data_link": "do not have permission",
    },
    "unknown_error": {"alpaca": "unexpected state", "tushare": "未知错误", "nasdaq_data_link": "unforeseen"},
}


@pytest.mark.parametrize("fault", sorted(WORDS))
def test_what_asking_again_cannot_help_stops_the_dataset_at_once_and_is_told_once(asking, run, speaker, fault):
    made = asking(speaker, {"fault": fault, "when": {"request": "every 1"}})
    done = run(made)
    assert (done.code, done.state) == (1, "failed")
    assert done.sent == made.requests == 1
    assert work(done)["failed"] == 1
    assert kinds(done) == ["stopped"]
    (told,) = done.report["errors"]
    assert WORDS[fault][speaker.name] in told["message"]
    assert told["request"]
    for secret in made.replica.credentials.values():
        assert secret not in json.dumps(done.report)
    kept = list((made.folder / ".marketsync" / "answers").glob("*/*.txt"))
    assert len(kept) == (fault == "unknown_error")
    for file in kept:
        assert str(file) in told["message"]
        assert WORDS[fault][speaker.name] in file.read_text(encoding="utf-8")
    check_recovers(made, speaker, run, speaker.requests)


OF_OTHER = {  # what a request of the second dataset, and no request of the first, has in it
    "alpaca": {"query": "timeframe=1Min"},
    "nasdaq_data_link": {"path": "PRICES.csv"},
    "tushare": {"body": "trade_cal"},
}
OF_FIRST = {
    "alpaca": {"query": "timeframe=1Day"},
    "nasdaq_data_link": {"path": "PRICES.json"},
    "tushare": {"body": '"daily"'},
}


def both(speaker: Speaker) -> tuple[str, str]:
    return speaker.dataset, speaker.other_dataset


def asked_of(place: Place, match: dict[str, str]) -> int:
    """Requests in the log that are of a dataset."""
    ((_, text),) = match.items()
    text = text.partition("=")[2] or text.strip('"')
    return sum(text in json.dumps(entry["request"]).replace(f'"{text}_', "") for entry in place.log)


@pytest.mark.parametrize("fault", ["no_permission", "unknown_error"])
def test_what_stops_one_dataset_lets_another_go_on(asking, run, speaker, fault):
    made = asking(
        speaker,
        {"fault": fault, "when": {"match": OF_FIRST[speaker.name]}},
        datasets=both(speaker),
        since="2012-06-01",
    )
    done = run(made)
    assert (done.code, done.state) == (1, "failed")
    assert kinds(done).count("stopped") == 1
    assert done.report["errors"][0]["dataset"] == f"{speaker.name}.{speaker.dataset}"
    assert asked_of(made, OF_FIRST[speaker.name]) == 1
    others = asked_of(made, OF_OTHER[speaker.name])
    assert others >= 1
    assert work(done)["done" if speaker.name != "alpaca" else "empty"] >= 1, "the other one's units are done"
    made.replica.set_faults([])
    # of the other dataset this market has not one row, which is a finding
    assert run(made).code == (3 if speaker.name == "alpaca" else 0)
    assert asked_of(made, OF_OTHER[speaker.name]) == others, "nothing of the other is asked again"


def test_a_refused_key_stops_every_dataset_of_the_provider_and_is_told_once(asking, run, speaker):
    made = asking(speaker, {"fault": "bad_key"}, datasets=both(speaker), since="2012-06-01")
    done = run(made)
    assert (done.code, done.state) == (1, "failed")
    assert [one["kind"] for one in done.report["errors"]] == ["stopped"]
    assert made.requests <= 2, "at most what was under way in each dataset"


# ---------------------------------------------------------------- what passes

PASSING = [
    {"fault": "server_error"},
    {"fault": "connection_reset"},
    {"fault": "malformed"},
    *(
        pytest.param(fault, marks=pytest.mark.slow)
        for fault in (
            {"fault": "timeout"},
            {"fault": "connection_reset", "at": "middle"},
            {"fault": "bad_gateway"},
            {"fault": "unavailable", "retry_after": True},
            {"fault": "truncated"},
            {"fault": "html_in_200"},
        )
    ),
]


@pytest.mark.parametrize("fault", PASSING, ids=lambda fault: "-".join(map(str, fault.values())))
def test_what_passes_is_asked_again_and_nobody_has_to_know(asking, run, speaker, fault):
    made = asking(speaker, {**fault, "when": {"request": 2}})
    done = run(made)
    assert (done.code, done.state) == (0, "completed"), done.words
    assert done.report["requests"] == {"sent": speaker.requests + 1, "retried": 1, "cool_downs": 0}
    assert work(done) == {"units": speaker.units, "done": speaker.units}
    assert kinds(done) == []
    check_recovers(made, speaker, run, 0)


def test_a_slow_answer_is_an_answer(asking, run, speaker):
    made = asking(speaker, {"fault": "slow", "when": {"request": 2}, "seconds": 0.5})
    check_recovers(made, speaker, run, speaker.requests)


SECOND = {
    "alpaca": {"query": "start=2005-01-01"},
    "nasdaq_data_link": {"query": "date.gte=2005-01-01"},
    "tushare": {"body": "20091231"},
}


def test_what_does_not_pass_fails_its_unit_after_the_attempts_and_the_others_go_on(asking, run, speaker):
    made = asking(speaker, {"fault": "server_error", "when": {"match": SECOND[speaker.name]}})
    done = run(made)
    hit = 2 if speaker.name == "tushare" else 1  # a unit of each symbol
    assert (done.code, done.state) == (1, "failed"), done.words
    assert work(done) == {"units": speaker.units, "done": speaker.units - hit, "failed": hit}
    assert [one["kind"] for one in done.report["errors"]] == ["failed"] * hit
    assert "failed 3 times" in done.report["errors"][0]["message"]
    assert done.report["requests"]["retried"] == 2 * hit
    check_recovers(made, speaker, run, speaker.requests + 3 * hit - done.sent)


def test_a_spent_failure_budget_leaves_the_provider_alone(asking, run, speaker):
    made = asking(speaker, {"fault": "server_error"}, budget={"in_a_row": 2})
    done = run(made)
    assert (done.code, done.state) == (1, "failed")
    assert work(done)["failed"] == 2
    assert done.sent == made.requests == 2 * 3
    check_recovers(made, speaker, run, speaker.requests)


def test_a_refused_page_token_begins_the_unit_again(asking, run, speaker):
    second = {"alpaca": 2, "nasdaq_data_link": 2, "tushare": 4}[speaker.name]  # the second page of a chain
    made = asking(speaker, {"fault": "token_refused", "when": {"request": second}})
    done = run(made)
    assert (done.code, done.state) == (0, "completed"), done.words
    assert done.report["requests"] == {"sent": speaker.requests + 2, "retried": 1, "cool_downs": 0}
    assert made.log[second]["request"] == made.log[second - 2]["request"]
    assert done.report["rows"]["fetched"] > made.stored_here(f"{speaker.name}.{speaker.dataset}").height
    check_recovers(made, speaker, run, 0)
