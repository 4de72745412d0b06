"""The file a user owns, `upstream.yml`: upstreams, universes, market hours, stores and plans, as pydantic models.

How YAML is read with line numbers is in `configuration.py`; what a definition may say is in `definition.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from datetime import date, datetime
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from marketsync.definition import FixedSpanText, Limit, Model, ZoneText
from marketsync.durations import parse_daily_time, within_reach

NAME = r"^[A-Za-z][A-Za-z0-9_-]*$"
Name = Annotated[str, Field(pattern=NAME)]


# those of storage.registry, which is not imported here: in a folder, on a server, and logs, which have no tables
FOLDER_SCHEMES = ("delta", "parquet", "csv", "excel", "chdb")
LOG_SCHEMES = ("nats", "redis", "rediss")
STORE_SCHEMES = (
    *FOLDER_SCHEMES,
    *LOG_SCHEMES,
    "clickhouse",
    "dolphindb",
    "marketstore",
    "marketstores",
    "mongodb",
    "mongodb+srv",
    "mysql",
    "postgresql",
)


def _daily_text(text: str) -> str:
    parse_daily_time(text)
    return text


_CRON_FIELDS = (("minute", 0, 59), ("hour", 0, 23), ("day of month", 1, 31), ("month", 1, 12), ("day of week", 0, 7))
_CRON_NAMES = re.compile(r"jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec|mon|tue|wed|thu|fri|sat|sun", re.IGNORECASE)
_CRON_PART = re.compile(r"(?:\*|(\d+)(?:-(\d+))?)(?:/[1-9]\d*)?")


def _cron_text(text: str) -> str:
    fields = text.split()
    if len(fields) != len(_CRON_FIELDS):
        raise ValueError(
            f"'{text}' is not a cron expression; write minute, hour, day of month, month and day of week, "
            "such as 0 19 * * 1-5"
        )
    for field, (what, least, most) in zip(fields, _CRON_FIELDS, strict=True):
        for part in field.split(","):
            found = _CRON_PART.fullmatch(_CRON_NAMES.sub(str(least), part))
            numbers = [int(number) for number in found.groups() if number] if found else []
            if not found or any(not least <= number <= most for number in numbers):
                raise ValueError(f"'{field}' is not a {what} of a cron expression; write {least} to {most}, *, or */5")
    return text


Day = Annotated[date | datetime, AfterValidator(within_reach)]


def _one_or_more(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _symbols(value: Any) -> Any:
    """Read a list of symbols: numbers are taken as written, but what YAML takes for something else is refused."""
    if not isinstance(value, (list, tuple)):
        return value
    wrong = []
    for index, item in enumerate(value):
        if isinstance(item, bool) or item is None or isinstance(item, float):
            what = "true or false" if isinstance(item, bool) else "nothing" if item is None else "a number"
            wrong.append(f"{index}: is what YAML reads as {what}, and no symbol; put it in quotes: '{item}'")
        elif isinstance(item, (dict, list)):
            what = "a list" if isinstance(item, list) else "a block of fields"
            wrong.append(f"{index}: is {what}, and no symbol; write one symbol an item")
    if wrong:
        raise ValueError("\n".join(wrong))
    return [str(item) for item in value]


Symbols = Annotated[tuple[str, ...], BeforeValidator(_symbols)]


class Tuning(Model):
    """How hard this machine works for an upstream; the provider's limits hold whatever stands here."""

    threads: int = Field(
        default=4, ge=1, le=64, description="Requests under way at once in one process (4 to 10 is best)."
    )
    attempts: int | None = Field(default=None, ge=1, le=20, description="Overrides the definition's attempts.")
    max_wait: FixedSpanText = Field(
        default="10 minutes",
        description="A cool-down longer than this ends the provider's work for now (exit code 75).",
    )
    back_off: FixedSpanText = Field(
        default="1 second", description="The first pause after a passing fault; doubled each time."
    )


class Upstream(Model):
    """One account at one provider."""

    definition: str | None = Field(
        default=None,
        description="A shipped definition's name, or the path of a file. Default: the upstream's own name.",
    )
    base_url: str | None = Field(default=None, description="Overrides the definition's base_url (a replica, a mirror).")
    account: str | None = Field(
        default=None,
        description="Limits are counted by this name: give two upstreams with one key the same. Default: the name.",
    )
    tier: str | None = Field(
        default=None,
        description="Chooses among the definition's limits that name a tier. Default: the tier that is named first.",
    )
    limits: tuple[Limit, ...] | None = Field(default=None, description="Replaces the definition's limits.")
    calendars: dict[str, str] = Field(
        default={}, description="Overrides the calendar of a dataset, by dataset ({daily: XHKG})."
    )
    tuning: Tuning = Field(default=Tuning(), description="Threads, attempts, waiting.")


class Universe(Model):
    """A named list of subjects: written out, in a file (one a line, or a CSV column), or another dataset's rows."""

    list: Symbols | None = Field(default=None, description="The symbols themselves.")
    file: str | None = Field(
        default=None,
        description="A text file with one symbol a line (# begins a comment). It is read as a CSV with a header when "
        "its name ends in .csv or `column` is given.",
    )
    rows: str | None = Field(default=None, description="A dataset (provider.dataset) whose rows hold the symbols.")
    column: str | None = Field(default=None, description="The CSV's or dataset's column. Default: symbol.")
    where: dict[str, str] = Field(default={}, description="With `rows`: only rows whose columns have these values.")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if sum(source is not None for source in (self.list, self.file, self.rows)) != 1:
            raise ValueError("give exactly one of list, file, rows")
        return self


def _as_universe(value: Any) -> Any:
    return {"list": value} if isinstance(value, list) else value


UniverseSpec = Annotated[Universe, BeforeValidator(_as_universe)]


class MarketHours(Model):
    """What a user knows about a calendar that its library does not."""

    holidays: tuple[date, ...] = Field(default=(), description="Further days without a session.")
    sessions: tuple[date, ...] = Field(default=(), description="Further days with a session.")
    flush_after_close: FixedSpanText | None = Field(
        default=None, description="Streams seal what they hold this long after the close."
    )


class StoreSpec(Model):
    """One place rows live."""

    url: str = Field(
        description="Engine and place: delta://./data, parquet://, csv://, excel://, chdb:// in a folder, "
        "postgresql://, mysql://, mongodb:// or dolphindb://user:$secret.PASSWORD@host/database, "
        "clickhouse://user:$secret.PASSWORD@host:8123/ or marketstore://host:5993/ on a server; a log that programs "
        "follow, beside a store with tables: nats://user:$secret.PASSWORD@host:4222/STREAM or "
        "redis://user:$secret.PASSWORD@host:6379/0."
    )


def _as_store(value: Any) -> Any:
    return {"url": value} if isinstance(value, str) else value


class Segmenting(Model):
    """When the spool seals a segment: whichever comes first. Smaller segments repeat less after a crash."""

    rows: int = Field(default=131_072, ge=1, description="Rows in a segment.")
    bytes: int = Field(default=64 << 20, ge=1, description="Bytes in memory.")
    requests: int = Field(
        default=50, ge=1, description="Requests whose rows are not sealed yet; at most these are repeated."
    )
    seconds: float = Field(default=30, gt=0, description="Seconds since the segment's first row.")


class Budget(Model):
    """When failed units stop a provider's other work."""

    in_a_row: int = Field(default=5, ge=1, description="Failed units one after another.")
    share: float = Field(default=0.1, gt=0, le=1, description="Failed units as a share of all tried (from 20 on).")


class Judge(Model):
    """What the run's judgement asks of the rows."""

    missing: float = Field(default=0.0, ge=0, le=1, description="The share of expected sessions that may be missing.")
    known_holes: str | None = Field(
        default=None,
        description="A YAML file of explained holes: {SYMBOL: {DATE: reason}}; they are shown, not counted.",
    )


class Plan(Model):
    """Which datasets, over what, since when, into which stores, how often, judged how."""

    datasets: Annotated[tuple[str, ...], BeforeValidator(_one_or_more)] = Field(
        min_length=1, description="Datasets as upstream.dataset (alpaca.daily_bars)."
    )
    universe: str | Symbols | None = Field(
        default=None, description="What $plan stands for in `over`: the name of a universe, or a list."
    )
    since: Day | None = Field(default=None, description="The first day wanted.")
    until: Day | None = Field(default=None, description="The last day wanted, included. Default: until now.")
    stores: Annotated[tuple[Name, ...], BeforeValidator(_one_or_more)] = Field(
        default=("default",), min_length=1, description="The stores that get every row."
    )
    priority: int = Field(
        default=0, description="Plans with a greater number run first; today's sessions come before all."
    )
    schedule: Annotated[str, AfterValidator(_cron_text)] | None = Field(
        default=None, description="A cron expression for deployments, such as 0 19 * * 1-5."
    )
    zone: ZoneText = Field(default="UTC", description="The time zone of `schedule`.")
    fresh_by: Annotated[str, AfterValidator(_daily_text)] | None = Field(
        default=None,
        description="The promise: a session's rows are there by this time, such as 19:00 America/New_York.",
    )
    segment: Segmenting = Field(default=Segmenting(), description="When the spool seals a segment.")
    budget: Budget = Field(default=Budget(), description="When failures stop the rest.")
    judge: Judge = Field(default=Judge(), description="What the judgement asks.")
    tuning: dict[Literal["threads"], int] = Field(default={}, description="threads: overrides the upstream's.")


class Configuration(Model):
    """The whole of upstream.yml."""

    state: str = Field(default=".marketsync", description="The folder of ledger, spool and limits, beside this file.")
    ledger: str | None = Field(
        default=None,
        description="Default: SQLite in `state`. postgresql://user:$secret.PW@host/db for several machines.",
    )
    maintenance: bool = Field(default=False, description="True stops every run at its next page, as a pause does.")
    upstreams: dict[Name, Upstream | None] = Field(default={}, description="Accounts at providers, by name.")
    market_hours: dict[str, MarketHours] = Field(default={}, description="Corrections to calendars, by calendar.")
    universes: dict[Name, UniverseSpec] = Field(default={}, description="Named lists of subjects.")
    stores: dict[Name, Annotated[StoreSpec, BeforeValidator(_as_store)]] = Field(
        default={"default": StoreSpec(url="delta://./data")}, description="Stores by name: a URL each."
    )
    plans: dict[Name, Plan] = Field(default={}, description="Plans by name.")

    @model_validator(mode="before")
    @classmethod
    def _without_empty_blocks(cls, data: Any) -> Any:
        """A block whose every line is a comment is a block that is not there."""
        if not isinstance(data, dict):
            return data
        return {name: part for name, part in data.items() if part is not None or name not in cls.model_fields}

    @model_validator(mode="after")
    def _references(self) -> Self:
        problems = list(self._broken_references())
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _broken_references(self) -> Iterator[str]:
        """Tell of every name that is used and not given, one line each: field: message; remedy."""
        for name, plan in self.plans.items():
            for dataset in plan.datasets:
                upstream, dot, _ = dataset.partition(".")
                if not dot:
                    yield f"plans.{name}.datasets: '{dataset}' is not upstream.dataset; write alpaca.daily_bars"
                elif upstream not in self.upstreams:
                    yield f"plans.{name}.datasets: {_unknown('upstream', upstream, self.upstreams)}"
            for store in plan.stores:
                if store not in self.stores:
                    yield f"plans.{name}.stores: {_unknown('store', store, self.stores)}"
            if isinstance(plan.universe, str) and plan.universe not in self.universes:
                yield f"plans.{name}.universe: {_unknown('universe', plan.universe, self.universes)}"
            if plan.since and plan.until and str(plan.until) < str(plan.since):
                yield f"plans.{name}.until: {plan.until} is before since, {plan.since}; swap them"


def _unknown(what: str, name: str, known: Iterable[str]) -> str:
    from marketsync.document import closest

    near = closest(name, list(known))
    plural = "universes" if what == "universe" else f"{what}s"
    hint = f"did you mean {near}? " if near else ""
    return f"there is no {what} '{name}'; {hint}{plural}: {', '.join(known) or 'none yet'}"
